// Rows over threads. A row is always computed whole by one thread, so results do not depend on how many there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace ppo_fast {

constexpr std::int64_t kElementsPerChunk = 1 << 15;  // about 10 us of work: above the price of a hand-over

inline std::int64_t rows_per_chunk(std::int64_t elements_per_row) {
  return std::max<std::int64_t>(1, kElementsPerChunk / std::max<std::int64_t>(1, elements_per_row));
}

// Calls work(data) on at most `threads` threads, the calling one included: those of torch where it has any.
void run_on_threads(int threads, void (*work)(void*), void* data);

// Runs `work` on at most `threads` threads, the calling one included, and on no more than there are chunks.
template <class Work>
void on_threads(std::int64_t chunks, int threads, const Work& work) {
  const int team = static_cast<int>(std::min<std::int64_t>(threads, chunks));
  run_on_threads(team, [](void* data) { (*static_cast<const Work*>(data))(); }, const_cast<Work*>(&work));
}

// Calls body(begin, end) over chunks of [0, rows).
template <class Body>
void parallel_rows(std::int64_t rows, std::int64_t elements_per_row, int threads, const Body& body) {
  const std::int64_t chunk = rows_per_chunk(elements_per_row);
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  std::atomic<std::int64_t> next{0};
  on_threads(chunks, threads, [&] {
    for (std::int64_t c = next.fetch_add(1); c < chunks; c = next.fetch_add(1)) {
      body(c * chunk, std::min(rows, (c + 1) * chunk));
    }
  });
}

// Calls first(begin, end) over chunks of [0, rows), then between() once, then last(begin, end) over the same chunks from the
// end, which the first sweep left in the caches. The threads are started once.
template <class First, class Between, class Last>
void parallel_sweeps(std::int64_t rows, std::int64_t elements_per_row, int threads, const First& first,
                     const Between& between, const Last& last) {
  const std::int64_t chunk = rows_per_chunk(elements_per_row);
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  if (chunks == 0) return;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> done{0};
  std::atomic<bool> ready{false};
  std::atomic<std::int64_t> left{chunks};
  on_threads(chunks, threads, [&] {
    for (std::int64_t c = next.fetch_add(1); c < chunks; c = next.fetch_add(1)) {
      first(c * chunk, std::min(rows, (c + 1) * chunk));
      if (done.fetch_add(1) + 1 == chunks) {
        between();
        ready.store(true);
      }
    }
    while (!ready.load()) std::this_thread::yield();  // for another thread's last chunk: too short to sleep
    for (std::int64_t c = left.fetch_sub(1) - 1; c >= 0; c = left.fetch_sub(1) - 1) {
      last(c * chunk, std::min(rows, (c + 1) * chunk));
    }
  });
}

}  // namespace ppo_fast
