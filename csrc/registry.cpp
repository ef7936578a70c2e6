// Schemas of the native operators, and what the compiled library says of itself. Importing the module registers them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/operators.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#ifndef FASTCONV_FLAGS
#error "setup.py passes the compiler's flags as FASTCONV_FLAGS"
#endif

STABLE_TORCH_LIBRARY(fastconv_native, m) {
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool relu) -> Tensor");
  m.def(
      "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) output, Tensor(b!)? code, "
      "int[2] size, int[2] padding, bool relu, bool turned, Tensor? filters=None) -> ()");
  m.def("winograd_filters(Tensor weight, Tensor(a!) filters) -> ()");
  m.def("winograd_weight_grad(Tensor grad, Tensor x, Tensor(a!) weight_grad, int[2] padding) -> ()");
  m.def(
      "first_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) output, Tensor(b!)? code, "
      "int[2] size, int[2] stride, int[2] padding, bool relu) -> ()");
  m.def(
      "first_weight_grad(Tensor grad, Tensor? gate, Tensor x, Tensor(a!) weight_grad, Tensor(b!)? bias_grad, int[2] size, "
      "int[2] stride, int[2] padding) -> ()");
  m.def(
      "amx_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) output, Tensor(b!)? code, "
      "int[2] size, int[2] padding, bool relu, bool turned) -> ()");
  m.def("amx_weight_grad(Tensor grad, Tensor x, Tensor(a!) weight_grad, int[2] padding) -> ()");
  m.def("relu_backward(Tensor grad, Tensor output, Tensor(a!) masked, Tensor(b!)? bias_grad) -> ()");
  m.def("bias_grad(Tensor grad, Tensor(a!) bias_grad) -> ()");
  m.def(
      "max_pool2d(Tensor x, Tensor(a!) output, Tensor(b!) code, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool relu) -> ()");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor code, Tensor(a!) input_grad, Tensor(b!)? bias_grad, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation) -> ()");
  m.def(
      "avg_pool2d(Tensor x, Tensor(a!) output, int[2] kernel_size, int[2] stride, int[2] padding, bool count_include_pad, "
      "int? divisor_override) -> ()");
  m.def(
      "avg_pool2d_backward(Tensor grad, Tensor(a!) input_grad, int[2] kernel_size, int[2] stride, int[2] padding, "
      "bool count_include_pad, int? divisor_override) -> ()");
  m.def("global_avg_pool2d(Tensor x, Tensor(a!) output) -> ()");
  m.def("global_avg_pool2d_backward(Tensor grad, Tensor(a!) input_grad) -> ()");
  m.def("batch_norm_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "batch_norm_relu(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "bool relu, Tensor(a!) output) -> ()");
  m.def(
      "batch_norm_relu_max_pool2d(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, Tensor(a!) output, Tensor(b!) code) -> ()");
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor? gate, Tensor? x, Tensor mean, Tensor var, Tensor? weight, float eps, "
      "bool training, Tensor(a!)? sums, Tensor(b!)? input_grad, Tensor(c!)? closed) -> ()");
  m.def(
      "batch_norm_relu_max_pool2d_backward(Tensor grad, Tensor code, Tensor? x, Tensor mean, Tensor var, Tensor? weight, "
      "float eps, bool training, Tensor(a!)? sums, Tensor(b!)? input_grad) -> ()");
  m.def(
      "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, "
      "float unbiased) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastconv_native, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&fastconv::conv2d));
  m.impl("winograd_conv2d", TORCH_BOX(&fastconv::winograd_conv2d));
  m.impl("winograd_filters", TORCH_BOX(&fastconv::winograd_filters));
  m.impl("winograd_weight_grad", TORCH_BOX(&fastconv::winograd_weight_grad));
  m.impl("first_conv2d", TORCH_BOX(&fastconv::first_conv2d));
  m.impl("first_weight_grad", TORCH_BOX(&fastconv::first_weight_grad));
  m.impl("amx_conv2d", TORCH_BOX(&fastconv::amx_conv2d));
  m.impl("amx_weight_grad", TORCH_BOX(&fastconv::amx_weight_grad));
  m.impl("relu_backward", TORCH_BOX(&fastconv::relu_backward));
  m.impl("bias_grad", TORCH_BOX(&fastconv::bias_grad));
  m.impl("max_pool2d", TORCH_BOX(&fastconv::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&fastconv::max_pool2d_backward));
  m.impl("avg_pool2d", TORCH_BOX(&fastconv::avg_pool2d));
  m.impl("avg_pool2d_backward", TORCH_BOX(&fastconv::avg_pool2d_backward));
  m.impl("global_avg_pool2d", TORCH_BOX(&fastconv::global_avg_pool2d));
  m.impl("global_avg_pool2d_backward", TORCH_BOX(&fastconv::global_avg_pool2d_backward));
  m.impl("batch_norm_statistics", TORCH_BOX(&fastconv::batch_norm_statistics));
  m.impl("batch_norm_relu", TORCH_BOX(&fastconv::batch_norm_relu));
  m.impl("batch_norm_relu_max_pool2d", TORCH_BOX(&fastconv::batch_norm_relu_max_pool2d));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&fastconv::batch_norm_relu_backward));
  m.impl("batch_norm_relu_max_pool2d_backward", TORCH_BOX(&fastconv::batch_norm_relu_max_pool2d_backward));
  m.impl("batch_norm_update", TORCH_BOX(&fastconv::batch_norm_update));
}

namespace {

PyObject* cpu_capability(PyObject*, PyObject*) {
  switch (fastconv::instruction_set()) {
    case fastconv::InstructionSet::kAvx512:
      return PyUnicode_FromString(fastconv::multiplies_bfloat16() ? "AVX512_BF16" : "AVX512");
    case fastconv::InstructionSet::kAvx2:
      return PyUnicode_FromString("AVX2");
    default:
      return PyUnicode_FromString("default");
  }
}

PyObject* has_amx(PyObject*, PyObject*) { return PyBool_FromLong(fastconv::has_amx()); }

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = __VERSION__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  return Py_BuildValue(
      "{s:s,s:s,s:s,s:O,s:O,s:s}", "compiler", compiler, "flags", FASTCONV_FLAGS, "kind", "cpu", "cuda", Py_False, "amx",
      fastconv::built_with_amx() ? Py_True : Py_False, "torch", TORCH_VERSION);
}

PyObject* winograd_filters_size(PyObject*, PyObject* arguments) {
  long long channels, out_channels;
  if (!PyArg_ParseTuple(arguments, "LL", &channels, &out_channels)) return nullptr;
  return PyLong_FromLongLong(fastconv::winograd_filters_size(channels, out_channels));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "How this library was built: compiler, flags, kind, cuda, amx (whether it has kernels for it), torch (the headers' version)."},
    {"cpu_capability", cpu_capability, METH_NOARGS, "The instruction set in use: 'AVX512_BF16', 'AVX512', 'AVX2' or 'default'."},
    {"winograd_filters_size", winograd_filters_size, METH_VARARGS,
     "Floats of a weight [out_channels, channels, 3, 3] transformed by winograd_filters; 0 if that does not pay."},
    {"has_amx", has_amx, METH_NOARGS, "Whether this process may run the kernels for Intel's AMX."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "The compiled library of fastconv; its operators are torch.ops.fastconv_native.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

// A few functions need no binding library: torch's pybind11 refuses to be included beside the stable ABI.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
