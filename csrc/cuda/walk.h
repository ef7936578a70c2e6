// Pixels of a map in steps, without a division for each.
#pragma once

#include "device.h"

namespace fastconv {

// A pixel, and as many pixels further as a step has, in reading order, image by image.
struct Walk {
  int n, row, column, step_n, step_row, step_column;

  static FASTCONV_DEVICE Walk of(int pixel, int step, int height, int width) {
    return {pixel / width / height, pixel / width % height, pixel % width,
            step / width / height,  step / width % height,  step % width};
  }

  FASTCONV_DEVICE void advance(int height, int width) {
    column += step_column;
    const bool next_row = column >= width;
    if (next_row) column -= width;
    row += step_row + next_row;
    const bool next_image = row >= height;
    if (next_image) row -= height;
    n += step_n + next_image;
  }
};

}  // namespace fastconv
