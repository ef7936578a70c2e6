// Units of work shared among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastconv {

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
