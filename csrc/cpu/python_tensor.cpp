#include "python_tensor.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fastattn {

PythonObjects python;

namespace {

// What DLPack 1.x (dmlc/dlpack, dlpack.h) calls DLTensor and DLPackExchangeAPI, as far as they are needed here. A
// type's table of functions lies in a capsule; reading a tensor through it takes 10 ns, an attribute of Python's 45
// to 80.
struct ExchangedTensor {
  char* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *size, *stride;
  uint64_t byte_offset;
};

struct ExchangeTable {
  uint32_t major, minor;
  const void* previous;
  void (*owning[3])();
  int (*read)(void* object, ExchangedTensor* tensor);  // borrows; not 0 where Python has raised
};

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

int (*exchange)(void* object, ExchangedTensor* tensor) = nullptr;

void fetch_exchange(const py::object& tensor_type) {
  const auto capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
  const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), name)) return;
  const auto* table = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (table->major == kMajor) exchange = table->read;
}

// False where torch has no such interface, or it does not take this tensor: its attributes say why.
bool read_exchanged(py::handle tensor, ExchangedTensor* found) {
  if (exchange == nullptr) return false;
  if (exchange(tensor.ptr(), found) == 0) return found->dims == 0 || found->stride != nullptr;
  PyErr_Clear();
  return false;
}

bool to_dtype(const ExchangedTensor& tensor, DType* dtype) {
  if (tensor.lanes != 1) return false;
  if (tensor.code == kBfloat) {
    *dtype = DType::kBFloat16;
    return tensor.bits == 16;
  }
  *dtype = tensor.bits == 64 ? DType::kFloat64 : tensor.bits == 32 ? DType::kFloat32 : DType::kFloat16;
  return tensor.code == kFloat && tensor.bits >= 16;
}

}  // namespace

void* read_data(py::handle tensor) {
  ExchangedTensor found;
  if (read_exchanged(tensor, &found)) return found.data + found.byte_offset;
  return PyLong_AsVoidPtr(call_method(tensor, python.data_ptr).ptr());
}

void fetch_python_objects() {
  const auto torch = py::module_::import("torch"), internals = py::module_::import("torch._C");
  const auto keep = [](const py::object& owner, const char* name) {
    return py::object(owner.attr(name)).release().ptr();
  };
  const char* dtypes[] = {"float32", "bfloat16", "float16", "float64"};
  for (int i = 0; i < 4; ++i) python.dtypes[i] = keep(torch, dtypes[i]);
  python.int64 = keep(torch, "int64");
  python.data_ptr = PyUnicode_InternFromString("data_ptr");
  python.size = PyUnicode_InternFromString("size");
  python.stride = PyUnicode_InternFromString("stride");
  python.dtype = PyUnicode_InternFromString("dtype");
  python.layout = PyUnicode_InternFromString("layout");
  python.is_cpu = PyUnicode_InternFromString("is_cpu");
  python.requires_grad = PyUnicode_InternFromString("requires_grad");
  python.tensor_type = keep(torch, "Tensor");
  fetch_exchange(torch.attr("Tensor"));
  python.parameter_type = keep(py::module_::import("torch.nn"), "Parameter");
  python.strided = keep(torch, "strided");
  python.empty_like = keep(torch, "empty_like");
  python.empty = keep(torch, "empty");
  python.dtype_keyword = py::make_tuple(py::handle(python.dtype)).release().ptr();
  python.is_grad_enabled = keep(torch, "is_grad_enabled");
  python.dispatch_modes = keep(internals, "_len_torch_dispatch_stack");
  python.function_modes = keep(internals, "_len_torch_function_stack");
  python.autocast = keep(internals, "_is_any_autocast_enabled");
  python.functorch = keep(internals, "_are_functorch_transforms_active");
  python.tracing_state = keep(internals, "_get_tracing_state");
  python.profiler = py::module_::import("torch.autograd.profiler").release().ptr();
  python.profiler_flag = PyUnicode_InternFromString("_is_profiler_enabled");
  python.forward_ad = py::module_::import("torch.autograd.forward_ad").release().ptr();
  python.forward_ad_level = PyUnicode_InternFromString("_current_level");
}

py::object call_method(py::handle object, PyObject* name) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

namespace {

int read_ints(py::handle tuple, int64_t* values) {
  const Py_ssize_t n = PyTuple_GET_SIZE(tuple.ptr());
  if (n > 4) throw std::invalid_argument("kernels take tensors of up to 4 dimensions, got " + std::to_string(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (values[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return static_cast<int>(n);
}

}  // namespace

DType read_dtype(py::handle tensor, bool* floating) {
  const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), python.dtype));
  if (!dtype) throw py::error_already_set();
  for (int i = 0; i < 4; ++i) {
    if (dtype.ptr() == python.dtypes[i]) return static_cast<DType>(i);
  }
  if (floating != nullptr) *floating = false;
  return DType::kFloat32;
}

TensorInfo read_tensor(py::handle tensor) {
  TensorInfo info{};
  ExchangedTensor found;
  if (read_exchanged(tensor, &found) && found.dims <= 4) {
    info.data = found.data + found.byte_offset;
    info.floating = to_dtype(found, &info.dtype);
    if (!info.floating) info.dtype = DType::kFloat32;
    info.int64 = found.code == kInt && found.bits == 64 && found.lanes == 1;
    info.dims = found.dims;
    std::copy_n(found.size, found.dims, info.size);
    std::copy_n(found.stride, found.dims, info.stride);
    info.dense = found.device_type == kCpu;
    return info;
  }
  info.floating = true;
  info.data = PyLong_AsVoidPtr(call_method(tensor, python.data_ptr).ptr());
  info.dtype = read_dtype(tensor, &info.floating);
  info.int64 = !info.floating && py::getattr(tensor, py::handle(python.dtype)).ptr() == python.int64;
  info.dims = read_ints(call_method(tensor, python.size), info.size);
  read_ints(call_method(tensor, python.stride), info.stride);
  const auto is_cpu = py::getattr(tensor, py::handle(python.is_cpu)),
             layout = py::getattr(tensor, py::handle(python.layout));
  info.dense = is_cpu.ptr() == Py_True && layout.ptr() == python.strided;
  return info;
}

View to_view(const TensorInfo& info) {
  View view{info.data, info.dtype, {}};
  for (int i = 0; i < info.dims; ++i) view.stride[i] = info.stride[i];
  return view;
}

bool set_operands(const TensorInfo& q, const TensorInfo& k, const TensorInfo& v, AttentionProblem* problem) {
  AttentionProblem& p = *problem;
  p.batch = q.size[0];
  p.num_heads_q = q.size[1];
  p.seq_len_q = q.size[2];
  p.head_dim = q.size[3];
  p.num_heads_kv = k.size[1];
  p.seq_len_k = k.size[2];
  p.head_dim_v = v.size[3];
  p.q = to_view(q);
  p.k = to_view(k);
  p.v = to_view(v);
  return q.dims == 4 && k.dims == 4 && v.dims == 4 && k.dtype == q.dtype && v.dtype == q.dtype &&
         k.size[0] == p.batch && v.size[0] == p.batch && v.size[1] == p.num_heads_kv && v.size[2] == p.seq_len_k &&
         k.size[3] == p.head_dim && p.num_heads_kv > 0 && p.num_heads_q % p.num_heads_kv == 0;
}

}  // namespace fastattn
