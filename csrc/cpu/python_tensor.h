// What the bindings know of Python tensors, read through DLPack's C exchange interface where torch offers it and
// through their attributes otherwise: no torch header is needed, and one build serves every version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "attention.h"
#include "common.h"

namespace fastattn {

// What a kernel needs to know of a tensor of up to four dimensions.
struct TensorInfo {
  void* data;
  DType dtype;  // of floating tensors; kFloat32 for all others
  int dims;
  int64_t size[4], stride[4];
  bool floating;  // of a dtype that DType has
  bool int64;
  bool dense;  // of ordinary (strided) layout, in the CPU's memory
};

// Python objects asked for at every call, fetched once by fetch_python_objects().
struct PythonObjects {
  PyObject* dtypes[4];  // torch's, which are singletons, in the order of DType
  PyObject* int64;
  PyObject *data_ptr, *size, *stride, *dtype, *layout, *is_cpu, *requires_grad;             // names
  PyObject *tensor_type, *parameter_type, *strided, *empty_like, *empty, *is_grad_enabled;  // of torch
  PyObject* dtype_keyword;                                                                  // ("dtype",)
  PyObject *dispatch_modes, *function_modes, *autocast, *functorch, *tracing_state;  // functions: what is active?
  PyObject *profiler, *profiler_flag, *forward_ad, *forward_ad_level;                // modules and their flags' names
};
extern PythonObjects python;
void fetch_python_objects();

// Any of these throws pybind11::error_already_set where Python raises.
pybind11::object call_method(pybind11::handle object, PyObject* name);
DType read_dtype(pybind11::handle tensor, bool* floating = nullptr);  // false: none of DType's, and kFloat32
void* read_data(pybind11::handle tensor);
TensorInfo read_tensor(pybind11::handle tensor);  // std::invalid_argument for more than four dimensions
View to_view(const TensorInfo& info);

// Fills the sizes and the views of an attention problem from query [batch, num_heads_q, seq_len_q, head_dim], key
// [batch, num_heads_kv, seq_len_k, head_dim] and value [batch, num_heads_kv, seq_len_k, head_dim_v]; false where their
// shapes or dtypes do not fit each other.
bool set_operands(const TensorInfo& q, const TensorInfo& k, const TensorInfo& v, AttentionProblem* problem);

// Address of a contiguous tensor that may be None.
template <typename T>
T* read_pointer(pybind11::handle tensor) {
  if (tensor.is_none()) return nullptr;
  return static_cast<T*>(read_data(tensor));
}

}  // namespace fastattn
