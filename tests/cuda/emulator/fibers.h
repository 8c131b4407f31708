// Blocks of threads on one CPU thread: fibers that run by turns, each up to the barrier at which it must wait.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <ucontext.h>

namespace emulator {

struct Index {
  unsigned x;
};

// Fibers come one by one; the last one opens the barrier for all.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  int generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  std::int64_t* barrier;  // counts down
};

struct Warp {
  Barrier barrier;
  std::uint64_t slots[32];
};

struct Block {
  Index index;
  Index size;
  int rank;
  bool started = false;
  int running;  // threads that have not returned
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::vector<Copy> copies;  // on their way
  Barrier barrier;
};

struct Fiber {
  ucontext_t context;
  Index thread_index;
  Block* block;
  int cluster_generation;
  bool done;
};

Fiber& here();
inline int lane() { return static_cast<int>(here().thread_index.x % 32); }
void complain(const std::string& what);  // kept, and thrown once the launch has ended
void sync_block();
void sync_warp();
void arrive_at_cluster();
void wait_for_cluster();
void start_copy(const Copy& copy);
void wait_for_bytes(std::int64_t* barrier);
void* in_peer(void* shared, int rank);

// The value that another lane brings to the same exchange.
template <class T>
T exchange(T value, int source) {
  Warp& warp = here().block->warps[here().thread_index.x / 32];
  std::memcpy(&warp.slots[lane()], &value, sizeof value);
  sync_warp();
  T other;
  std::memcpy(&other, &warp.slots[source], sizeof other);
  sync_warp();
  return other;
}

void set_seed(unsigned seed);
void run(std::int64_t blocks, int threads, int cluster, int shared_bytes, const std::function<void()>& kernel);

}  // namespace emulator
