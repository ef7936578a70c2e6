// Registers the CUDA kernels of the native operators, whose schemas come with the CPU library. Importing the module does it.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../schemas.h"
#include "operators.h"

#include <torch/headeronly/version.h>

#if !defined(FASTCONV_ARCHITECTURES) || !defined(FASTCONV_CUDA) || !defined(FASTCONV_SCHEMAS)
#error "setup.py passes what nvcc compiled for as FASTCONV_ARCHITECTURES, torch's CUDA as FASTCONV_CUDA, FASTCONV_SCHEMAS"
#endif

STABLE_TORCH_LIBRARY_IMPL(fastconv_native, CUDA, m) {
  fastconv::implement_passes(m);
  fastconv::implement_cuda_convolutions(m);
}

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue(
      "{s:s,s:s,s:s,s:s}", "architectures", FASTCONV_ARCHITECTURES, "cuda", FASTCONV_CUDA, "torch", TORCH_VERSION, "schemas",
      FASTCONV_SCHEMAS);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "How this library was built: architectures, CUDA, torch (the headers' version), schemas (of the operators, a digest)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", "The CUDA kernels of fastconv's native operators.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
