// The row ops on a CPU: one body (row.h) compiled for every instruction set, chosen at run time, rows over threads.
#include "cpu/logits.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/halves.h"
#include "cpu/row_start.h"
#include "cpu/threads.h"

#define PPO_FAST_BODY "row.h"
#include "cpu/every_isa.h"

namespace ppo_fast {
namespace {

struct RowOps {
  void (*forward[4])(const RowGrid&, const ForwardOut&, std::int64_t, std::int64_t);    // by DType
  void (*backward[4])(const RowGrid&, const BackwardIn&, std::int64_t, std::int64_t);  // by DType
  void (*exp)(const float*, float*, std::int64_t, double);
  void (*half_exp)(const float*, float*, std::int64_t, double);
};

#define PPO_FAST_OPS(isa)                                                                                           \
  RowOps {                                                                                                          \
    {isa::forward_rows<float>, isa::forward_rows<double>, isa::forward_rows<BFloat16>, isa::forward_rows<Float16>}, \
        {isa::backward_rows<float>, isa::backward_rows<double>, isa::backward_rows<BFloat16>,                       \
         isa::backward_rows<Float16>},                                                                              \
        isa::exp_rows<float>, isa::exp_rows<BFloat16>                                                               \
  }

const RowOps& ops_of(Isa isa) { PPO_FAST_CHOOSE(RowOps, isa); }

#undef PPO_FAST_OPS

}  // namespace

bool isa_supported(Isa isa) {
#ifdef PPO_FAST_X86
  // f16c is not asked for: every processor with AVX2 has it, and older compilers do not know its name here.
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx512) {
    return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kPortable;
}

std::int64_t first_bad_label(const RowGrid& grid) {
  for (std::int64_t r = 0; grid.labels != nullptr && r < grid.rows; ++r) {
    if (grid.labels[r] < grid.least_label || grid.labels[r] >= grid.vocab) return r;
  }
  return -1;
}

std::int64_t first_bad_temperature(const RowGrid& grid) {
  const std::int64_t temperatures = grid.temperature_stride == 0 ? std::min<std::int64_t>(grid.rows, 1) : grid.rows;
  for (std::int64_t r = 0; r < temperatures; ++r) {
    const double t = grid.temperature[r * grid.temperature_stride];
    if (!(t > 0.0 && std::isfinite(t))) return r;
  }
  return -1;
}

void logprob_forward(const RowGrid& grid, const ForwardOut& out, RunOn on) {
  const auto rows = ops_of(on.isa).forward[static_cast<int>(grid.dtype)];
  parallel_rows(grid.rows, grid.vocab, on.threads,
                [&](std::int64_t begin, std::int64_t end) { rows(grid, out, begin, end); });
}

void logprob_backward(const RowGrid& grid, const BackwardIn& in, RunOn on) {
  const auto rows = ops_of(on.isa).backward[static_cast<int>(grid.dtype)];
  parallel_rows(grid.rows, grid.vocab, on.threads,
                [&](std::int64_t begin, std::int64_t end) { rows(grid, in, begin, end); });
}

void exp_float32(const float* x, float* y, std::int64_t n, double temperature, bool halves, Isa isa) {
  const RowOps& ops = ops_of(isa);
  (halves ? ops.half_exp : ops.exp)(x, y, n, temperature);
}

}  // namespace ppo_fast
