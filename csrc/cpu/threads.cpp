#include "cpu/threads.h"

#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace ppo_fast {
namespace {

// OpenMP's entry for a parallel region, as every runtime that serves GCC's code has it: work(data) on `threads` threads.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// The threads of a runtime are gone in the child of a fork, and GCC's runtime waits for them forever.
std::atomic<bool> forked{false};

#if defined(__linux__) || defined(__APPLE__)
const int watched = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// The runtime that the process has loaded for all to see, which is the one that torch computes on; null where there is none.
Parallel find_parallel() {
  return watched == 0 ? reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")) : nullptr;
}
#else
Parallel find_parallel() { return nullptr; }
#endif

void on_own_threads(int threads, void (*work)(void*), void* data) {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, data);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, share the work.
  }
  work(data);
  for (std::thread& t : others) t.join();
}

}  // namespace

// Torch's threads wait for their next work by spinning, some milliseconds long: threads of our own, started meanwhile, would
// have to share the cores with them, which costs more than many an op does.
void run_on_threads(int threads, void (*work)(void*), void* data) {
  static const Parallel parallel = find_parallel();
  if (threads <= 1) {
    work(data);
  } else if (parallel == nullptr || forked.load()) {
    on_own_threads(threads, work, data);
  } else {
    parallel(work, data, static_cast<unsigned>(threads), 0);
  }
}

}  // namespace ppo_fast
