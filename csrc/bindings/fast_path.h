#pragma once

#include <pybind11/pybind11.h>

namespace fast_path {

// Adds mixed_lora_fast_path, sample_fast_path, mixed_lora_has_bare_rows and slot_attention.
void bind(pybind11::module_& module);

}  // namespace fast_path
