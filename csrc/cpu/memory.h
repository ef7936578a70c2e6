// Memory for the length of a call. It begins with a cache line, as tensors' does: vectors that lie across two take twice the time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace fastconv {

template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kLine); }
  template <class Other>
  bool operator==(const LineAllocator<Other>&) const {
    return true;
  }
};

using Floats = std::vector<float, LineAllocator<float>>;

// Floats that are not set to zero. A call has its own: nothing is kept, calls of several threads do not meet.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data_(Allocator().allocate(std::max<int64_t>(floats, 1))) {}

  float* at(int64_t offset) const { return data_.get() + offset; }

 private:
  using Allocator = LineAllocator<float>;
  struct Free {
    void operator()(float* data) const { Allocator().deallocate(data, 0); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace fastconv
