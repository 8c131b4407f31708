// The row ops over [rows, vocab] logits: what a caller passes, and the two entry points.
#pragma once

#include <cstdint>

namespace ppo_fast {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Two levels of stride in elements, so that logits[:, :-1] of a [B, T, V] tensor needs no copy:
// row r starts at (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride. A row itself is contiguous.
struct RowGrid {
  const void* logits;
  DType dtype;
  std::int64_t rows;
  std::int64_t vocab;
  std::int64_t inner_rows;
  std::int64_t outer_stride;
  std::int64_t inner_stride;
  const std::int64_t* labels;  // [rows], null where the op reads none
  const double* temperature;   // row r has temperature[r * temperature_stride]
  std::int64_t temperature_stride;
  std::int64_t least_label = 0;  // -1 where a label may lie in another slice of the vocabulary: a gradient then has no target
};

struct RunOn {
  int threads;
  Isa isa;
};

// What the backward needs of a row, kept in double so that nothing is lost between the two passes:
// top = max x, total = sum exp((x - top) / T), mean = sum p (x - top) / T.
struct RowStats {
  double top;
  double total;
  double mean;
};

// Outputs are double for float64 logits and float otherwise.
struct ForwardOut {
  void* logprobs;   // [rows]
  void* entropy;    // [rows], or null: not wanted, and stats.mean is 0
  RowStats* stats;  // [rows]
};

struct BackwardIn {
  const RowStats* stats;       // [rows], from the forward
  const void* grad_logprobs;   // [rows] or null, typed like the outputs
  const void* grad_entropy;    // [rows] or null
  void* grad_logits;           // [rows, vocab] contiguous, in the dtype of the logits
};

bool isa_supported(Isa isa);

// The first row whose label is outside [0, vocab), or whose temperature is not a positive number; -1 for none.
std::int64_t first_bad_label(const RowGrid& grid);
std::int64_t first_bad_temperature(const RowGrid& grid);

void logprob_forward(const RowGrid& grid, const ForwardOut& out, RunOn on);
void logprob_backward(const RowGrid& grid, const BackwardIn& in, RunOn on);

// e^(x / T) of n floats in [-inf, 0] as the row ops have it for float logits, or for 16-bit ones; for its accuracy test.
void exp_float32(const float* x, float* y, std::int64_t n, double temperature, bool halves, Isa isa);

}  // namespace ppo_fast
