// Where a row of logits begins.
#pragma once

#include <cstdint>

#include "cpu/logits.h"

namespace ppo_fast {

template <class T>
const T* row_start(const RowGrid& grid, std::int64_t row) {
  const std::int64_t outer = row / grid.inner_rows;
  const std::int64_t inner = row % grid.inner_rows;
  return static_cast<const T*>(grid.logits) + outer * grid.outer_stride + inner * grid.inner_stride;
}

}  // namespace ppo_fast
