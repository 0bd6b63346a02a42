// The plainest calls of the public ops, each in one step.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn {

void register_plain_calls(pybind11::module_& m);

}  // namespace fastattn
