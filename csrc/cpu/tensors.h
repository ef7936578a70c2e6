// What CPU kernels take from tensors: pointers, and the type of an element.
#pragma once

#include "../maps.h"
#include "scalar.h"
#include "simd.h"

namespace fastconv {

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>) for the T that holds an element.
template <class Body>
void by_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(Type<float>{});
    case ScalarType::BFloat16:
      return body(Type<BFloat16>{});
    case ScalarType::Half:
      return body(Type<Half>{});
    default:
      STD_TORCH_CHECK(false, "fastconv_native: dtype must be float32, bfloat16 or float16");
  }
}

// body(Type<Code>) for the integer that holds a winner's code.
template <class Body>
void by_code(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Byte:
      return body(Type<uint8_t>{});
    case ScalarType::Int:
      return body(Type<int32_t>{});
    default:
      STD_TORCH_CHECK(false, "fastconv_native: codes must be uint8 or int32");
  }
}

}  // namespace fastconv
