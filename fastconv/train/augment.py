"""Random moves of training images, in batches on their device, by random numbers of a whole epoch from the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_RANGES = {"turn": (0, 180), "scale": (0, 0.9), "shift": (0, 1), "crop": (0.01, 1), "jitter": (0, 1), "cutout": (0, 1)}
_PADDINGS = ("zeros", "reflection")
_LONGEST = 4 / 3  # the most that a crop is longer than wide, or wider than long
GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue are: ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """How far training images are moved at random. All numbers are uniform in their ranges, anew for each image.

    Attributes:
        turn: by up to as many degrees, left or right.
        scale: sizes times 1 - scale to 1 + scale.
        shift: by up to this share of the size, left or right and up or down; by whole pixels, which are not blended, where
            images are neither turned, scaled, cropped nor stored larger than nets see them.
        crop: the least share of the area that a crop keeps, 3/4 to 4/3 as wide as high, resized to the whole; 1: none.
        flip: half of the images left to right.
        jitter: brightness, contrast and saturation, each times 1 - jitter to 1 + jitter.
        cutout: the side of a square that is erased, as a share of the size. Its centre lies on any pixel, so that it may
            stand out beyond the edge; it is filled with the mean of the training images (DeVries and Taylor, 2017).
        padding: what lies outside: "zeros" (black) or "reflection" (at the edge, which is doubled).

    Raises:
        ValueError: a value out of its range.
    """

    turn: float = 0
    scale: float = 0
    shift: float = 0
    crop: float = 1
    flip: bool = False
    jitter: float = 0
    cutout: float = 0
    padding: str = "zeros"

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"augmentation: {name} must be in [{least}, {most}], got {name}={getattr(self, name)}")
        if self.flip not in (False, True):
            raise ValueError(f"augmentation: flip must be true or false, got flip={self.flip!r}")
        if self.padding not in _PADDINGS:
            raise ValueError(f"augmentation: padding must be one of {', '.join(_PADDINGS)}, got padding={self.padding!r}")


_WRITTEN = Augmentation(turn=15, scale=0.15, shift=0.1)
_DEFAULTS = {
    "digits": _WRITTEN,
    "mnist": _WRITTEN,
    "cifar10": Augmentation(shift=0.125, flip=True, cutout=0.25, padding="reflection"),  # four pixels of 32
    "folder": Augmentation(crop=0.35, flip=True, jitter=0.2),
    "synthetic": Augmentation(),
}


def default(data_name: str) -> Augmentation:
    """What suits a data set of this name, with its path or without.

    Raises:
        ValueError: a name that is not known.
    """
    kind = data_name.partition(":")[0]
    if kind not in _DEFAULTS:
        raise ValueError(f"augmentation: there are defaults for {', '.join(_DEFAULTS)}, got {data_name!r}")
    return _DEFAULTS[kind]


@dataclass(frozen=True)
class Moves:
    """What becomes of each of N images; None: nothing of that kind.

    Attributes:
        matrix: float32 [N, 2, 3], from (x, y, 1) in the moved image to (x, y) in the given one, both from -1 to 1.
        shift: int64 [N, 2], down and right, whole pixels.
        flip: bool [N].
        colour: float32 [N, 3], factors of brightness, contrast and saturation.
        hole: int64 [N, 2], first row and column of what is erased; they may be negative.
    """

    matrix: Tensor | None = None
    shift: Tensor | None = None
    flip: Tensor | None = None
    colour: Tensor | None = None
    hole: Tensor | None = None

    def take(self, rows: Tensor | slice) -> Moves:
        return self._each(lambda values: values[rows])

    def to(self, device: torch.device) -> Moves:
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Moves:
        return Moves(**{name: None if values is None else change(values) for name, values in vars(self).items()})


def draw(augmentation: Augmentation, count: int, *, stored: int, seen: int, generator: torch.Generator) -> Moves:
    """Moves of `count` images of stored×stored pixels, of which nets see seen×seen.

    As many numbers are drawn whatever is asked for: the same seed flips the same images with jitter and without.
    """
    asked = augmentation
    turn, scale, right, down, area, ratio, x, y, flip, *colour, top, left = torch.rand(14, count, generator=generator)
    flipped = flip < 0.5 if asked.flip else None
    hole = None
    if asked.cutout:
        hole = torch.stack((_whole(top, seen), _whole(left, seen)), 1) - _side(asked, seen) // 2
    factors = 1 + asked.jitter * _around_zero(torch.stack(colour, 1)) if asked.jitter else None
    if stored == seen and not asked.turn and not asked.scale and asked.crop == 1:
        shift = None
        if asked.shift:
            most = max(1, round(asked.shift * seen))
            shift = torch.stack((_whole(down, 2 * most + 1), _whole(right, 2 * most + 1)), 1) - most
        return Moves(shift=shift, flip=flipped, colour=factors, hole=hole)

    angle = torch.deg2rad(asked.turn * _around_zero(turn))
    zoom = 1 + asked.scale * _around_zero(scale)
    cosine, sine = angle.cos() / zoom, angle.sin() / zoom
    mirror = 1 if flipped is None else 1 - 2 * flipped.to(torch.float32)
    area = 1 - (1 - asked.crop) * area
    # No longer than fits: the crop keeps its area and lies within the image.
    ratio = torch.exp(_around_zero(ratio) * torch.clamp(-area.log(), max=math.log(_LONGEST)))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x = (1 - width) * _around_zero(x) + width * 2 * asked.shift * _around_zero(right)
    y = (1 - height) * _around_zero(y) + height * 2 * asked.shift * _around_zero(down)
    matrix = torch.stack((width * cosine * mirror, -width * sine, x, height * sine * mirror, height * cosine, y), 1)
    return Moves(matrix=matrix.view(count, 2, 3), colour=factors, hole=hole)


def apply(pixels: Tensor, moves: Moves, augmentation: Augmentation, *, seen: int, fill: Sequence[float] | Tensor) -> Tensor:
    """The moved images, float32 [B, C, seen, seen] in [0, 1].

    Args:
        pixels: uint8 [B, C, S, S].
        moves: drawn for these images, on their device.
        fill: by channel, in [0, 1]: what takes the place of what is erased.
    """
    if moves.matrix is None:
        images = _shifted(pixels, moves, augmentation.padding).to(torch.float32) / 255
    else:
        places = _grid(moves.matrix, seen)
        # A crop has nothing outside, but the outer half of a pixel at the edge is blended with what lies beyond.
        cropped = not (augmentation.turn or augmentation.scale or augmentation.shift)
        padding = "reflection" if cropped else augmentation.padding
        images = F.grid_sample(
            pixels.to(torch.float32) / 255, places, mode="bilinear", padding_mode=padding, align_corners=False
        )
    if moves.colour is not None:
        images = _coloured(images, moves.colour)
    if moves.hole is not None:
        along = torch.arange(seen, device=pixels.device) - moves.hole[..., None]  # [B, 2, seen]
        erased = (along >= 0) & (along < _side(augmentation, seen))
        erased = erased[:, 0, :, None] & erased[:, 1, None, :]  # [B, seen, seen]
        fill = torch.as_tensor(fill, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
        images = torch.where(erased[:, None], fill, images)
    return images


def _around_zero(numbers: Tensor) -> Tensor:
    """From [0, 1) to [-1, 1)."""
    return 2 * numbers - 1


def _whole(numbers: Tensor, count: int) -> Tensor:
    """From [0, 1) to 0, 1, ..., count - 1; the product may be rounded up to count."""
    return (numbers * count).to(torch.int64).clamp(max=count - 1)


def _side(augmentation: Augmentation, seen: int) -> int:
    return max(1, round(augmentation.cutout * seen))


def _shifted(pixels: Tensor, moves: Moves, padding: str) -> Tensor:
    """Whole pixels, of which none is blended with another one: one gather."""
    if moves.shift is None and moves.flip is None:
        return pixels
    size = pixels.shape[-1]
    rows = columns = torch.arange(size, device=pixels.device)[None]  # [1 or B, size]: where each pixel comes from
    if moves.shift is not None:
        rows, columns = rows - moves.shift[:, :1], columns - moves.shift[:, 1:]
    outside = (rows < 0) | (rows >= size), (columns < 0) | (columns >= size)
    rows, columns = (torch.where(at < 0, -1 - at, torch.where(at >= size, 2 * size - 1 - at, at)) for at in (rows, columns))
    if moves.flip is not None:
        columns = torch.where(moves.flip[:, None], size - 1 - columns, columns)
    places = (rows[:, :, None] * size + columns[:, None, :]).flatten(1)  # [B, size * size]
    moved = pixels.flatten(2).gather(2, places[:, None].expand(-1, pixels.shape[1], -1)).view_as(pixels)
    if padding == "zeros" and moves.shift is not None:
        moved = moved.masked_fill((outside[0][:, :, None] | outside[1][:, None, :])[:, None], 0)
    return moved


def _grid(matrix: Tensor, size: int) -> Tensor:
    """Where each pixel comes from, [B, size, size, 2].

    F.affine_grid multiplies matrices, which TensorFloat-32 would round to a tenth of a pixel and libraries round
    differently for other sizes of batches.
    """
    along = (2 * torch.arange(size, device=matrix.device) + 1) / size - 1  # pixels' centres
    by_column = matrix[:, None, None, :, 0] * along[:, None]  # [B, 1, size, 2]
    by_row = matrix[:, None, None, :, 1] * along[:, None, None] + matrix[:, None, None, :, 2]  # [B, size, 1, 2]
    return by_column + by_row


def _coloured(images: Tensor, factors: Tensor) -> Tensor:
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    images = images * brightness
    grey = _grey(images)
    images = torch.lerp(grey.mean((2, 3), keepdim=True), images, contrast)
    if images.shape[1] > 1:
        images = torch.lerp(_grey(images), images, saturation)
    return images.clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Brightness of each pixel, [B, 1, S, S]."""
    if images.shape[1] != len(GREY):
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue
