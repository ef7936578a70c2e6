// Units of work shared among torch's threads, and memory for the length of a call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace fastconv {

// Floats at a cache line's boundary, uninitialised. A call has its own: nothing is kept, calls of several threads do not meet.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data_(static_cast<float*>(::operator new(std::max<int64_t>(floats, 1) * 4, kLine))) {}

  float* at(int64_t offset) const { return data_.get() + offset; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<float, Free> data_;
};

inline int64_t threads() { return torch::stable::get_num_threads(); }

// Each of [0, units) once by one of `workers`: a worker takes the next unit when it is done with one, so that a slow core
// delays nobody. What a unit computes must not depend on its worker, whose number only chooses scratch memory.
class Workers {
 public:
  explicit Workers(int64_t units) : units_(units), count_(std::max<int64_t>(1, std::min(units, threads()))) {}

  int64_t count() const { return count_; }

  // body(unit, worker)
  template <class Body>
  void run(const Body& body) const {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t unit = next++; unit < units_; unit = next++) body(unit, worker);
      }
    });
  }

 private:
  int64_t units_, count_;
};

}  // namespace fastconv
