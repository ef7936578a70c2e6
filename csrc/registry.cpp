// Registers the native operators and their CPU kernels, and says what the compiled library is. Importing the module does it.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/operators.h"
#include "cpu/simd.h"
#include "schemas.h"

#include <torch/headeronly/version.h>

#if !defined(FASTCONV_FLAGS) || !defined(FASTCONV_SCHEMAS)
#error "setup.py passes the compiler's flags as FASTCONV_FLAGS, a digest of schemas.h as FASTCONV_SCHEMAS"
#endif

STABLE_TORCH_LIBRARY(fastconv_native, m) {
  fastconv::define_passes(m);
  fastconv::define_cpu_convolutions(m);
  fastconv::define_cuda_convolutions(m);  // of which the CUDA library has the implementations
}

STABLE_TORCH_LIBRARY_IMPL(fastconv_native, CPU, m) {
  fastconv::implement_passes(m);
  m.impl("conv2d", TORCH_BOX(&fastconv::conv2d));
  m.impl("winograd_conv2d", TORCH_BOX(&fastconv::winograd_conv2d));
  m.impl("winograd_filters", TORCH_BOX(&fastconv::winograd_filters));
  m.impl("winograd_weight_grad", TORCH_BOX(&fastconv::winograd_weight_grad));
  m.impl("first_conv2d", TORCH_BOX(&fastconv::first_conv2d));
  m.impl("first_weight_grad", TORCH_BOX(&fastconv::first_weight_grad));
  m.impl("amx_conv2d", TORCH_BOX(&fastconv::amx_conv2d));
  m.impl("amx_weight_grad", TORCH_BOX(&fastconv::amx_weight_grad));
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
      "{s:s,s:s,s:O,s:s,s:s}", "compiler", compiler, "flags", FASTCONV_FLAGS, "amx",
      fastconv::built_with_amx() ? Py_True : Py_False, "torch", TORCH_VERSION, "schemas", FASTCONV_SCHEMAS);
}

PyObject* winograd_filters_size(PyObject*, PyObject* arguments) {
  long long channels, out_channels;
  if (!PyArg_ParseTuple(arguments, "LL", &channels, &out_channels)) return nullptr;
  return PyLong_FromLongLong(fastconv::winograd_filters_size(channels, out_channels));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "How this library was built: compiler, flags, amx (whether it has kernels for it), torch (the headers' version), schemas."},
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
