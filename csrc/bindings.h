// What the binding files share: how a caller's numbers are checked, and who binds what.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/logits.h"

namespace ppo_fast {

// ValueError with the message unless the condition holds.
void require(bool holds, const std::string& message);

// Threads of at least 1, on an instruction set by its name that this machine can run.
RunOn checked_run(int threads, const std::string& isa);

// The op reads labels: an address of 0 for none will not do.
void require_labels(const RowGrid& grid);

// float32, float64, bfloat16, float16 as 0 to 3.
DType checked_dtype(int dtype);

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_policy(pybind11::module_& m);

}  // namespace ppo_fast
