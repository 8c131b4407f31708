// What the checks of every binding share. Tensors come as addresses, sizes, strides in elements and a dtype code.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/experience.h"
#include "cpu/logits.h"

namespace py = pybind11;

namespace ppo_fast {

constexpr Isa kIsas[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};  // best first

inline const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      return "portable";
  }
  return "unknown";
}

inline void require(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

inline Isa isa_named(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name != name_of(isa)) continue;
    require(isa_supported(isa), "isa: this machine cannot run '" + name + "'");
    return isa;
  }
  throw py::value_error("isa is '" + name + "', expected one of avx512, avx2, portable");
}

template <class T>
inline T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline RunOn checked_run(int threads, const std::string& isa) {
  require(threads >= 1, "threads is " + std::to_string(threads) + ", expected 1 or more");
  return {threads, isa_named(isa)};
}

inline DType checked_dtype(int dtype) {
  require(dtype >= 0 && dtype <= 3, "dtype is code " + std::to_string(dtype) + ", expected 0 to 3");
  return static_cast<DType>(dtype);
}

// The op reads labels: an address of 0 for none will not do.
inline void require_labels(const RowGrid& grid) {
  require(grid.rows == 0 || grid.labels != nullptr, "labels is a null address");
}

inline TokenRows checked_rows(const char* name, const py::tuple& rows) {
  require(rows.size() == 3, std::string(name) + " has " + std::to_string(rows.size()) + " parts, expected 3");
  const int dtype = rows[1].cast<int>();
  require(dtype >= 0 && dtype <= 3, std::string(name) + " has dtype code " + std::to_string(dtype) + ", expected 0 to 3");
  return {pointer<const void>(rows[0].cast<std::uintptr_t>()), static_cast<DType>(dtype), rows[2].cast<std::int64_t>()};
}

inline DType checked_compute(int compute) {
  require(compute == 0 || compute == 1, "compute is code " + std::to_string(compute) + ", expected 0 or 1");
  return static_cast<DType>(compute);
}

inline void check_starts(const std::int64_t* cu_seqlens, std::int64_t sequences, std::int64_t tokens) {
  if (cu_seqlens == nullptr) return;
  for (std::int64_t s = 0; s < sequences; ++s) {
    require(cu_seqlens[s] >= 0 && cu_seqlens[s] <= cu_seqlens[s + 1] && cu_seqlens[s + 1] <= tokens,
            "cu_seqlens does not rise from 0 to " + std::to_string(tokens) + " at sequence " + std::to_string(s));
  }
}

// The token losses and the masked moments, into the table of what Python sees.
void define_token_ops(py::module_& m);

// The exact KL and the policy loss from logits.
void define_policy_ops(py::module_& m);

// The CUDA kernels, where they are built.
void define_cuda_ops(py::module_& m);

}  // namespace ppo_fast
