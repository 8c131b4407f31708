// Exact KL and the clipped policy loss from logits on a CPU: one body (policy_row.h) for every instruction set, rows over
// threads.
#include "cpu/policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "cpu/halves.h"
#include "cpu/row_start.h"
#include "cpu/threads.h"

#define PPO_FAST_BODY "policy_row.h"
#include "cpu/every_isa.h"

namespace ppo_fast {
namespace {

using Rows = std::int64_t;

struct PolicyOps {  // by DType
  void (*forward[4])(const PolicyIn&, const PolicyOut&, Rows, Rows);
  void (*backward[4])(const RowGrid&, const RefGrid&, const PolicyState*, double, void*, Rows, Rows);
  void (*scale[4])(const RowGrid&, double, Rows, Rows);
  void (*kl[4])(const RowGrid&, const RefGrid&, void*, PolicyState*, Rows, Rows);
  void (*kl_backward[4])(const RowGrid&, const RefGrid&, const PolicyState*, const void*, void*, void*, Rows, Rows);
};

#define PPO_FAST_EVERY_DTYPE(f) \
  { f<float>, f<double>, f<BFloat16>, f<Float16> }
#define PPO_FAST_OPS(isa)                                                                            \
  PolicyOps {                                                                                        \
    PPO_FAST_EVERY_DTYPE(isa::policy_rows), PPO_FAST_EVERY_DTYPE(isa::policy_gradients),             \
        PPO_FAST_EVERY_DTYPE(isa::scaled_rows), PPO_FAST_EVERY_DTYPE(isa::kl_rows),                  \
        PPO_FAST_EVERY_DTYPE(isa::kl_gradients)                                                      \
  }

const PolicyOps& ops_of(Isa isa) { PPO_FAST_CHOOSE(PolicyOps, isa); }

#undef PPO_FAST_OPS
#undef PPO_FAST_EVERY_DTYPE

int by(const RowGrid& grid) { return static_cast<int>(grid.dtype); }

}  // namespace

void policy_forward(const PolicyIn& in, const PolicyOut& out, RunOn on) {
  const auto rows = ops_of(on.isa).forward[by(in.grid)];
  parallel_rows(in.grid.rows, in.grid.vocab, on.threads, [&](Rows begin, Rows end) { rows(in, out, begin, end); });
}

void policy_backward(const RowGrid& grid, const RefGrid& ref, const PolicyState* state, double grad_loss, void* grad_logits,
                     RunOn on) {
  const auto rows = ops_of(on.isa).backward[by(grid)];
  parallel_rows(grid.rows, grid.vocab, on.threads,
                [&](Rows begin, Rows end) { rows(grid, ref, state, grad_loss, grad_logits, begin, end); });
}

void scale_rows(const RowGrid& grid, double factor, RunOn on) {
  const auto rows = ops_of(on.isa).scale[by(grid)];
  parallel_rows(grid.rows, grid.vocab, on.threads, [&](Rows begin, Rows end) { rows(grid, factor, begin, end); });
}

void kl_forward(const RowGrid& grid, const RefGrid& ref, void* kl, PolicyState* state, RunOn on) {
  const auto rows = ops_of(on.isa).kl[by(grid)];
  parallel_rows(grid.rows, grid.vocab, on.threads,
                [&](Rows begin, Rows end) { rows(grid, ref, kl, state, begin, end); });
}

void kl_backward(const RowGrid& grid, const RefGrid& ref, const PolicyState* state, const void* grad_kl, void* grad_logits,
                 void* grad_ref_logits, RunOn on) {
  const auto rows = ops_of(on.isa).kl_backward[by(grid)];
  parallel_rows(grid.rows, grid.vocab, on.threads, [&](Rows begin, Rows end) {
    rows(grid, ref, state, grad_kl, grad_logits, grad_ref_logits, begin, end);
  });
}

}  // namespace ppo_fast
