// Stands in for torch's header where the kernels are built without torch: threads of the standard library.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline int64_t& thread_count() {
  static int64_t count = 1;
  return count;
}

inline int64_t get_num_threads() { return thread_count(); }

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t, const Body& body) {
  std::vector<std::thread> others;
  for (int64_t i = begin + 1; i < end; ++i) others.emplace_back([&body, i] { body(i, i + 1); });
  if (begin < end) body(begin, begin + 1);
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
