// Rows over threads. A row is always computed whole by one thread, so results do not depend on how many there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace ppo_fast {

constexpr std::int64_t kElementsPerChunk = 1 << 15;  // about 10 us of work: above the price of a hand-over

// Calls body(begin, end) over chunks of [0, rows) on at most `threads` threads, the calling one included.
template <class Body>
void parallel_rows(std::int64_t rows, std::int64_t elements_per_row, int threads, const Body& body) {
  const std::int64_t chunk = std::max<std::int64_t>(1, kElementsPerChunk / std::max<std::int64_t>(1, elements_per_row));
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t c = next.fetch_add(1); c < chunks; c = next.fetch_add(1)) {
      body(c * chunk, std::min(rows, (c + 1) * chunk));
    }
  };
  std::vector<std::thread> others;
  const std::int64_t helpers = std::min<std::int64_t>(threads, chunks) - 1;
  try {
    for (std::int64_t i = 0; i < helpers; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, share the rows.
  }
  work();
  for (std::thread& t : others) t.join();
}

}  // namespace ppo_fast
