// The one engine behind every convolution: a block's product C[row, column] = Σ_k A[row, k] · B[column, k].
//
// Operands pass through shared memory in stages of 64 bytes of k. What A and B are is said by their sources (operands.h),
// which fill a stage; what becomes of C by who calls `multiply_tiles` (conv.h, conv_wgrad.h).
#pragma once

#include "device.h"

namespace fastconv {

// How numbers are multiplied; all sums are float32.
struct Bf16 {
  using Element = bf16;
};
struct F16 {
  using Element = f16;
};
struct Tf32 {
  using Element = float;
};
struct Ieee {  // by fused multiply-adds, without tensor cores
  using Element = float;
};

// Which index of an operand is contiguous in memory: the summed one, k, or that of its row (of B: of C's column).
enum class Major { kSum, kSide };

constexpr int kStages = 3;
constexpr int kStepBytes = 64;   // of k in a stage
constexpr int kChunkBytes = 16;  // what a thread copies at once

template <class Math_, int kRows_, int kColumns_, int kWarpsDown_, int kWarpsAcross_>
struct Shape {
  using Math = Math_;
  using T = typename Math::Element;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpsDown = kWarpsDown_, kWarpsAcross = kWarpsAcross_;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / kWarpsAcross;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // of 16×8 tiles
  static constexpr int kDepth = kStepBytes / sizeof(T);                     // summed in a step
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0);
};

// A thread's sums: of tile (i, j), rows g and g + 8 of columns 2t and 2t + 1, for lane 4g + t.
template <class S>
using Sums = float[S::kDown][S::kAcross][4];

struct Lane {
  int group, member, down, across;  // of the warp's tiles: the first row, the first column

  template <class S>
  static FASTCONV_DEVICE Lane of() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return {lane / 4, lane % 4, warp / S::kWarpsAcross * S::kWarpRows, warp % S::kWarpsAcross * S::kWarpColumns};
  }
};

// An operand of kSide rows in shared memory. Its lines hold 16-byte chunks, permuted so that neither the copies nor the
// reads of fragments meet in a bank.
template <class T, int kSide, Major kMajor, int kThreads>
struct Staging {
  static constexpr int kVector = kChunkBytes / sizeof(T);
  static constexpr int kDepth = kStepBytes / sizeof(T);
  static constexpr int kLineChunks = (kMajor == Major::kSum ? kStepBytes : kSide * static_cast<int>(sizeof(T))) / kChunkBytes;
  static constexpr int kLineBytes = kLineChunks * kChunkBytes;
  static constexpr int kLineStep = kThreads / kLineChunks;  // from one of a thread's chunks to the next
  static constexpr int kPasses = kSide * kStepBytes / kChunkBytes / kThreads;
  // A thread's lines are permuted alike.
  static_assert(kThreads % kLineChunks == 0 && kLineStep % (kMajor == Major::kSide && sizeof(T) == 4 ? 4 : 8) == 0);

  static FASTCONV_DEVICE int line() { return threadIdx.x / kLineChunks; }
  static FASTCONV_DEVICE int chunk() { return threadIdx.x % kLineChunks; }

  static FASTCONV_DEVICE uint32_t address(int line, int chunk) {
    int twist = line / 2 % 4;
    if constexpr (kMajor == Major::kSide) twist = sizeof(T) == 2 ? line % 8 : line % 4 * 2;
    return line * kLineBytes + (chunk ^ twist) * kChunkBytes;
  }
  // Of one 32-bit element, where lines run along the side.
  static FASTCONV_DEVICE uint32_t word_address(int line, int side) { return address(line, side / 4) + side % 4 * 4; }
};

// Fragments of 32 bytes of k: of 16 rows of A, of 16 columns of B.
template <class T, int kSide, Major kMajor, int kThreads>
struct Fragments {
  using Place = Staging<T, kSide, kMajor, kThreads>;

  static FASTCONV_DEVICE void rows(uint32_t (&words)[4], uint32_t stage, int row, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (kMajor == Major::kSum) {
      load_matrices(words, stage + Place::address(row + lane % 16, 2 * step + lane / 16));
    } else if constexpr (sizeof(T) == 2) {
      const int k = 16 * step + lane % 8 + lane / 16 * 8;
      load_matrices_transposed(words, stage + Place::address(k, row / 8 + lane / 8 % 2));
    } else {
      FASTCONV_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int k = 8 * step + lane % 4 + i / 2 * 4;
        words[i] = load_shared<uint32_t>(stage + Place::word_address(k, row + lane / 4 + i % 2 * 8));
      }
    }
  }

  static FASTCONV_DEVICE void columns(uint32_t (&first)[2], uint32_t (&second)[2], uint32_t stage, int column, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (kMajor == Major::kSide && sizeof(T) == 4) {
      FASTCONV_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int k = 8 * step + lane % 4 + i * 4;
        first[i] = load_shared<uint32_t>(stage + Place::word_address(k, column + lane / 4));
        second[i] = load_shared<uint32_t>(stage + Place::word_address(k, column + 8 + lane / 4));
      }
    } else {
      uint32_t words[4];
      if constexpr (kMajor == Major::kSum) {
        load_matrices(words, stage + Place::address(column + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      } else {
        const int k = 16 * step + lane % 8 + lane / 8 % 2 * 8;
        load_matrices_transposed(words, stage + Place::address(k, column / 8 + lane / 16));
      }
      first[0] = words[0];
      first[1] = words[1];
      second[0] = words[2];
      second[1] = words[3];
    }
  }

  // kCount elements along k of a row (column) from `k` on, a multiple of kCount; kCount is 4 where lines run along k, else 1.
  static constexpr int kCount = kMajor == Major::kSum ? 4 : 1;
  static FASTCONV_DEVICE void elements(float (&values)[kCount], uint32_t stage, int side, int k) {
    if constexpr (kMajor == Major::kSum) {
      const Words4 words = load_shared<Words4>(stage + Place::address(side, k / 4));
      FASTCONV_UNROLL
      for (int i = 0; i < 4; ++i) values[i] = as_float(words.word[i]);
    } else {
      values[0] = as_float(load_shared<uint32_t>(stage + Place::word_address(k, side)));
    }
  }
};

template <class Math>
FASTCONV_DEVICE void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
FASTCONV_DEVICE void multiply_fragments<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_bf16(d, a, b);
}
template <>
FASTCONV_DEVICE void multiply_fragments<F16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_f16(d, a, b);
}
template <>
FASTCONV_DEVICE void multiply_fragments<Tf32>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_tf32(d, a, b);
}

// Adds a stage's products by tensor cores.
template <class S, class A, class B>
FASTCONV_DEVICE void multiply_stage(Sums<S>& sums, uint32_t stage_a, uint32_t stage_b, const Lane& lane) {
  FASTCONV_UNROLL
  for (int step = 0; step < kStepBytes / 32; ++step) {
    uint32_t a[S::kDown][4], b[S::kAcross][2];
    FASTCONV_UNROLL
    for (int i = 0; i < S::kDown; ++i) A::rows(a[i], stage_a, lane.down + 16 * i, step);
    FASTCONV_UNROLL
    for (int j = 0; j < S::kAcross; j += 2) B::columns(b[j], b[j + 1], stage_b, lane.across + 8 * j, step);
    if constexpr (sizeof(typename S::T) == 4) {
      FASTCONV_UNROLL
      for (int i = 0; i < S::kDown; ++i) {
        FASTCONV_UNROLL
        for (int e = 0; e < 4; ++e) a[i][e] = round_to_tf32(a[i][e]);
      }
      FASTCONV_UNROLL
      for (int j = 0; j < S::kAcross; ++j) {
        FASTCONV_UNROLL
        for (int e = 0; e < 2; ++e) b[j][e] = round_to_tf32(b[j][e]);
      }
    }
    FASTCONV_UNROLL
    for (int i = 0; i < S::kDown; ++i) {
      FASTCONV_UNROLL
      for (int j = 0; j < S::kAcross; ++j) multiply_fragments<typename S::Math>(sums[i][j], a[i], b[j]);
    }
  }
}

// Adds a stage's products one by one, for the same rows and columns.
template <class S, class A, class B>
FASTCONV_DEVICE void multiply_stage_ieee(Sums<S>& sums, uint32_t stage_a, uint32_t stage_b, const Lane& lane) {
  constexpr int kCount = A::kCount < B::kCount ? A::kCount : B::kCount;
  static_assert(A::kCount == B::kCount || kCount == 1);
  for (int k = 0; k < S::kDepth; k += 4) {
    float b[S::kAcross][2][4];
    FASTCONV_UNROLL
    for (int j = 0; j < S::kAcross; ++j) {
      FASTCONV_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = lane.across + 8 * j + 2 * lane.member + e;
        FASTCONV_UNROLL
        for (int first = 0; first < 4; first += B::kCount) {
          float values[B::kCount];
          B::elements(values, stage_b, column, k + first);
          FASTCONV_UNROLL
          for (int n = 0; n < B::kCount; ++n) b[j][e][first + n] = values[n];
        }
      }
    }
    FASTCONV_UNROLL
    for (int i = 0; i < S::kDown; ++i) {
      FASTCONV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = lane.down + 16 * i + 8 * half + lane.group;
        float a[4];
        FASTCONV_UNROLL
        for (int first = 0; first < 4; first += A::kCount) {
          float values[A::kCount];
          A::elements(values, stage_a, row, k + first);
          FASTCONV_UNROLL
          for (int n = 0; n < A::kCount; ++n) a[first + n] = values[n];
        }
        FASTCONV_UNROLL
        for (int n = 0; n < 4; ++n) {
          FASTCONV_UNROLL
          for (int j = 0; j < S::kAcross; ++j) {
            FASTCONV_UNROLL
            for (int e = 0; e < 2; ++e) {
              float& sum = sums[i][j][2 * half + e];
              sum = fmaf(a[n], b[j][e][n], sum);
            }
          }
        }
      }
    }
  }
}

template <class Math>
constexpr bool kIsIeee = false;
template <>
inline constexpr bool kIsIeee<Ieee> = true;

// Blocks that a processor should have room for. Single elements, and products one by one, take more registers.
template <class S, bool kVector>
constexpr int kResident = kIsIeee<typename S::Math> || !kVector ? 256 / S::kThreads : S::kThreads == 256 ? 2 : 3;

// sums = Σ over `steps` stages of what the sources a and b fill. Shared memory is free again behind it.
template <class S, class A, class B>
FASTCONV_DEVICE void multiply_tiles(Sums<S>& sums, A& a, B& b, int steps) {
  using Rows = Fragments<typename S::T, S::kRows, A::kMajor, S::kThreads>;
  using Columns = Fragments<typename S::T, S::kColumns, B::kMajor, S::kThreads>;
  const uint32_t memory = shared_memory();
  const Lane lane = Lane::of<S>();
  const auto fill = [&](int stage) {
    a.fill(memory + stage * S::kStageBytes);
    b.fill(memory + stage * S::kStageBytes + S::kRows * kStepBytes);
  };
  FASTCONV_UNROLL
  for (int i = 0; i < S::kDown; ++i) {
    FASTCONV_UNROLL
    for (int j = 0; j < S::kAcross; ++j) {
      FASTCONV_UNROLL
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
    }
  }
  FASTCONV_UNROLL
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) fill(stage);
    copy_async_commit();
  }
  int reading = 0, writing = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    block_barrier();  // the stage to read is there, and everybody has left the one to write
    if (step + kStages - 1 < steps) fill(writing);
    copy_async_commit();
    const uint32_t stage = memory + reading * S::kStageBytes;
    if constexpr (kIsIeee<typename S::Math>) {
      multiply_stage_ieee<S, Rows, Columns>(sums, stage, stage + S::kRows * kStepBytes, lane);
    } else {
      multiply_stage<S, Rows, Columns>(sums, stage, stage + S::kRows * kStepBytes, lane);
    }
    reading = reading + 1 == kStages ? 0 : reading + 1;
    writing = writing + 1 == kStages ? 0 : writing + 1;
  }
  block_barrier();  // the last copies were waited for: the groups behind them are empty
}

}  // namespace fastconv
