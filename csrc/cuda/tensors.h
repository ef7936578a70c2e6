// What CUDA operators take from tensors: pointers, the device and its current stream, scratch memory.
#pragma once

#include "../maps.h"
#include "launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#ifndef FASTCONV_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace fastconv {

// An operator's call: its kernels run on the device of its tensors, in that device's current stream.
class Call {
 public:
#ifdef FASTCONV_EMULATED
  explicit Call(const Tensor&) {}
  ~Call() { emu::forbid_all(); }
  Stream stream() const { return nullptr; }
  void check_device(const Tensor&) const {}
#else
  explicit Call(const Tensor& tensor) : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }
  Stream stream() const { return stream_; }
  // A kernel that reads memory of another device ends all further work of the process on its own.
  void check_device(const Tensor& tensor) const {
    STD_TORCH_CHECK(
        tensor.is_cuda() && tensor.get_device_index() == device_, "fastconv_native: tensors must be on one CUDA device");
  }
#endif
  Call(const Call&) = delete;

  template <class T = void>
  const T* read(const Tensor& tensor) const {
    check_device(tensor);
#ifdef FASTCONV_EMULATED
    emu::allow(tensor.const_data_ptr(), tensor.numel() * tensor.element_size(), false);
#endif
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <class T = void>
  const T* read(const std::optional<Tensor>& tensor) const {
    return tensor ? read<T>(*tensor) : nullptr;
  }
  // Of tensors of one dimension that need not be dense.
  const void* read_strided(const Tensor& tensor) const {
    check_device(tensor);
#ifdef FASTCONV_EMULATED
    emu::allow(tensor.const_data_ptr(), strided_bytes(tensor), false);
#endif
    return tensor.const_data_ptr();
  }
  template <class T>
  T* write_strided(const Tensor& tensor) const {
    check_device(tensor);
#ifdef FASTCONV_EMULATED
    emu::allow(tensor.const_data_ptr(), strided_bytes(tensor), true);
#endif
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
  template <class T = void>
  T* write(const Tensor& tensor) const {
    check_device(tensor);
#ifdef FASTCONV_EMULATED
    emu::allow(tensor.const_data_ptr(), tensor.numel() * tensor.element_size(), true);
#endif
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
  template <class T = void>
  T* write(const std::optional<Tensor>& tensor) const {
    return tensor ? write<T>(*tensor) : nullptr;
  }

 private:
#ifdef FASTCONV_EMULATED
  static size_t strided_bytes(const Tensor& tensor) {
    return tensor.numel() == 0 ? 0 : ((tensor.size(0) - 1) * tensor.stride(0) + 1) * tensor.element_size();
  }
#else
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  Stream stream_;
#endif
};

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// float32, of the device of `like`; it lives until the stream is done with it, as every tensor's memory does.
inline Tensor scratch(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes), ScalarType::Float);
}

template <class T_>
struct Type {
  using T = T_;
};

// body(Type<T>) for the T that holds an element.
template <class Body>
void by_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(Type<float>{});
    case ScalarType::BFloat16:
      return body(Type<bf16>{});
    case ScalarType::Half:
      return body(Type<f16>{});
    default:
      STD_TORCH_CHECK(false, "fastconv_native: dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace fastconv
