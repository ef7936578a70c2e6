// What device.h's instructions for fragments and conversions do, lane by lane: on a GPU, where nvcc compiles this file, and in
// the emulation, whose model of them is compared with what a GPU has answered.
#include "device.h"

#ifndef FASTCONV_EMULATED
#include <cuda_runtime.h>
#endif

namespace fastconv {

constexpr int kLanes = 32, kMatrixWords = 256;
constexpr int kOperands = 10;  // of a lane for a product: four words of a, two of b, four of d
constexpr int kValues = 8;     // of a lane to convert
constexpr int kIn = kLanes * 3 * kOperands + kMatrixWords + kLanes * kValues;
// Of a lane: three products' d, two kinds of fragments, conversions of each value to TF32, bfloat16 and float16 by themselves and
// to pairs of both, and of its bits as float16 to float32.
constexpr int kOutPerLane = 3 * 4 + 2 * 4 + kValues * 6;
constexpr int kOut = kLanes * kOutPerLane;

struct ProbeParams {
  const uint32_t* in;
  uint32_t* out;
  int64_t unused;  // parameters are passed in memory from 17 bytes on
};

__global__ void probe_kernel(const ProbeParams p) {
  const int lane = threadIdx.x;
  uint32_t* out = p.out + lane * kOutPerLane;
  for (int kind = 0; kind < 3; ++kind) {
    const uint32_t* const from = p.in + (kind * kLanes + lane) * kOperands;
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = load<uint32_t>(from + i);
    for (int i = 0; i < 2; ++i) b[i] = load<uint32_t>(from + 4 + i);
    for (int i = 0; i < 4; ++i) d[i] = as_float(load<uint32_t>(from + 6 + i));
    if (kind == 0) multiply_bf16(d, a, b);
    if (kind == 1) multiply_f16(d, a, b);
    if (kind == 2) multiply_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) store(out++, as_bits(d[i]));
  }
  const uint32_t* const matrices = p.in + kLanes * 3 * kOperands;
  for (int i = lane; i < kMatrixWords; i += kLanes) store_shared(shared_memory() + 4 * i, load<uint32_t>(matrices + i));
  block_barrier();
  // 32 rows of 16 bytes stand in each of two columns; lanes ask for the second column's, in an order of their own.
  const uint32_t row = shared_memory() + (lane * 5 % kLanes) * 32 + 16;
  uint32_t words[4];
  load_matrices(words, row);
  for (int i = 0; i < 4; ++i) store(out++, words[i]);
  load_matrices_transposed(words, row);
  for (int i = 0; i < 4; ++i) store(out++, words[i]);
  const uint32_t* const values = matrices + kMatrixWords + lane * kValues;
  for (int i = 0; i < kValues; ++i) {
    const uint32_t bits = load<uint32_t>(values + i), next = load<uint32_t>(values + (i + 1) % kValues);
    store(out++, round_to_tf32(bits));
    store(out++, static_cast<uint32_t>(narrow<bf16>(as_float(bits)).bits));
    store(out++, static_cast<uint32_t>(narrow<f16>(as_float(bits)).bits));
    store(out++, pack<bf16>(as_float(bits), as_float(next)));
    store(out++, pack<f16>(as_float(bits), as_float(next)));
    store(out++, as_bits(widen(f16{static_cast<uint16_t>(bits >> 8)})));
  }
}

}  // namespace fastconv

extern "C" {
int probe_inputs() { return fastconv::kIn; }
int probe_outputs() { return fastconv::kOut; }

// out[probe_outputs()] of in[probe_inputs()]; 0, or the number of CUDA's error.
int probe(const uint32_t* in, uint32_t* out) {
  using namespace fastconv;
  constexpr int kBytes = kMatrixWords * 4;
#ifdef FASTCONV_EMULATED
  emu::allow(in, kIn * 4, false);
  emu::allow(out, kOut * 4, true);
  emu::launch(dim3(1), dim3(kLanes), kBytes, [&] { probe_kernel(ProbeParams{in, out, 0}); });
  emu::forbid_all();
  return 0;
#else
  uint32_t *device_in = nullptr, *device_out = nullptr;
  cudaMalloc(&device_in, kIn * 4);
  cudaMalloc(&device_out, kOut * 4);
  cudaMemcpy(device_in, in, kIn * 4, cudaMemcpyHostToDevice);
  probe_kernel<<<1, kLanes, kBytes>>>(ProbeParams{device_in, device_out, 0});
  cudaMemcpy(out, device_out, kOut * 4, cudaMemcpyDeviceToHost);
  const cudaError_t error = cudaGetLastError();
  cudaFree(device_in);
  cudaFree(device_out);
  return static_cast<int>(error);
#endif
}
}
