// The only file that knows Python. Tensors arrive as addresses with shapes and element strides, already validated; each
// kernel has one register_* function, which fills its argument struct and runs it without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "dropout_mask.h"
#include "isa.h"

namespace py = pybind11;

namespace fastattn {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void register_isa(py::module_& m) {
  m.def("isa", [] { return isa_name(current_isa()); }, "Name of the instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Forces an instruction set; RuntimeError where it cannot run.");
  m.def("available_isas", &available_isas, "Instruction sets this machine can run, slowest first.");
  m.def("cpu_flags", &cpu_flags, "Further processor features, such as amx_bf16.");
}

void register_dropout_mask(py::module_& m) {
  m.def(
      "dropout_mask",
      [](uintptr_t keep, int64_t slices, int64_t rows, int64_t columns, uint64_t seed, uint64_t offset,
         uint32_t threshold) {
        const DropoutMaskArgs args{slices, rows, columns, {seed, offset, threshold, 1.0}, pointer<uint8_t>(keep)};
        py::gil_scoped_release release;
        FASTATTN_DISPATCH(dropout_mask, args);
      },
      "Writes the bool mask keep[slices, rows, columns] of the elements that dropout leaves.");
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastattn's C++ kernels.";
  fastattn::register_isa(m);
  fastattn::register_dropout_mask(m);
}
