// Runs CUDA kernels on a CPU: one fiber a thread, one block after the other. csrc/cuda/device.h leads here.
//
// A thread runs until it meets others: at a barrier, or at an instruction of a whole warp. Bytes of shared memory have a
// shadow, which tells accesses apart that no barrier orders; bytes of an asynchronous copy are there only behind its wait.
// What a GPU would leave undefined is an error, with the line of the kernel that asked for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__ __attribute__((weak, noinline))
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

// What was counted since the last `reset_counts`.
struct Counts {
  uint64_t launches, blocks, barriers, multiplications, matrix_loads, matrix_load_conflicts, async_copies;
  uint64_t shared_accesses, global_accesses;
};

enum class Access { kRead, kWrite, kCopy, kArrive };
enum class GlobalAccess { kRead, kReadOwn, kWrite };  // kReadOwn: of what this thread may write in the same launch
enum class WarpOp { kShuffle, kLoadMatrices, kMultiply };

// ---- called by the host

void set_schedule(uint32_t seed);  // in which order warps and lanes run
bool fault(int number);            // whether a fault that tests have put into the kernels is switched on
void allow(const void* first, size_t bytes, bool is_writable);  // what kernels may touch of global memory
void forbid_all();
// Throws std::runtime_error for whatever a GPU leaves undefined.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// ---- called by kernels

const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();

[[noreturn]] void fail(const std::string& what, int line);  // ends the launch with an error
void block_barrier(int line);
// Runs `operation` for the whole warp when its last lane has come; `arguments` is what the lanes brought.
void together(WarpOp kind, void* argument, void (*operation)(void** arguments, int line), int line);
int warp();

uint8_t* shared_bytes();
void touch_shared(uint32_t address, uint32_t bytes, Access access, int line);
void touch_shared_as_warp(uint32_t address, uint32_t bytes, int line);
void touch_global(const void* address, uint32_t bytes, GlobalAccess access, int line);
void copy_async(uint32_t shared, const void* global, uint32_t bytes, int line);  // 16 bytes, zeros behind `bytes`
void copy_async_commit();
void copy_async_wait(int groups);
Counts& counts();

template <class V>
V load_shared(uint32_t address, int line) {
  touch_shared(address, sizeof(V), Access::kRead, line);
  V value;
  memcpy(&value, shared_bytes() + address, sizeof value);
  return value;
}

template <class V>
void store_shared(uint32_t address, const V& value, int line) {
  touch_shared(address, sizeof(V), Access::kWrite, line);
  memcpy(shared_bytes() + address, &value, sizeof value);
}

template <class V>
V load_global(const void* address, int line) {
  touch_global(address, sizeof(V), GlobalAccess::kRead, line);
  V value;
  memcpy(&value, address, sizeof value);
  return value;
}

template <class V>
V load_own(const void* address, int line) {
  touch_global(address, sizeof(V), GlobalAccess::kReadOwn, line);
  V value;
  memcpy(&value, address, sizeof value);
  return value;
}

template <class V>
void store_global(void* address, const V& value, int line) {
  touch_global(address, sizeof(V), GlobalAccess::kWrite, line);
  memcpy(address, &value, sizeof value);
}

}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
