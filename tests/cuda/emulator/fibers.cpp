#include "fibers.h"

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;  // kept for the next cluster
  std::vector<Block> blocks;                             // of the cluster that runs
  Barrier cluster;
  Fiber* current = nullptr;
  std::function<void()> kernel;
  std::int64_t events = 0;  // a round of turns without one is a wait that nothing can end
  std::string complaint;
  unsigned seed = 0;
};

Machine machine;

void yield() { swapcontext(&machine.current->context, &machine.scheduler); }

int arrive(Barrier& barrier) {
  ++machine.events;
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return generation;
}

void wait(const Barrier& barrier, int generation) {
  while (barrier.generation == generation) yield();
}

void enter() {
  machine.kernel();
  ++machine.events;
  here().done = true;
  --here().block->running;
  yield();
}

bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

void finish(const Copy& copy) {
  ++machine.events;
  std::memcpy(copy.to, copy.from, copy.bytes);
  *copy.barrier -= copy.bytes;
}

void set_up(std::int64_t first_block, int threads, int cluster, int shared_bytes) {
  machine.blocks.assign(static_cast<std::size_t>(cluster), Block{});
  machine.fibers.resize(static_cast<std::size_t>(cluster * threads));
  machine.cluster = {cluster * threads, 0, 0};
  while (machine.stacks.size() < machine.fibers.size()) machine.stacks.emplace_back(new unsigned char[kStackBytes]);
  for (int rank = 0; rank < cluster; ++rank) {
    Block& block = machine.blocks[static_cast<std::size_t>(rank)];
    block.index = {static_cast<unsigned>(first_block + rank)};
    block.size = {static_cast<unsigned>(threads)};
    block.rank = rank;
    block.running = threads;
    block.shared.assign(static_cast<std::size_t>(shared_bytes), 0xff);
    block.warps.assign(static_cast<std::size_t>(threads / 32), Warp{{32, 0, 0}, {}});
    block.barrier = {threads, 0, 0};
    for (int thread = 0; thread < threads; ++thread) {
      const auto at = static_cast<std::size_t>(rank * threads + thread);
      Fiber& fiber = machine.fibers[at];
      fiber.thread_index = {static_cast<unsigned>(thread)};
      fiber.block = &block;
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = machine.stacks[at].get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &enter, 0);
    }
  }
}

using Turns = std::vector<Fiber*>;

// Let each of them run up to its next wait; whether anything came of it.
bool take_turns(Turns& turns) {
  const std::int64_t before = machine.events;
  for (Fiber* fiber : turns) {
    machine.current = fiber;
    fiber->block->started = true;
    swapcontext(&machine.scheduler, &fiber->context);
  }
  turns.erase(std::remove_if(turns.begin(), turns.end(), [](Fiber* f) { return f->done; }), turns.end());
  return machine.events != before;
}

// All threads by turns: in order, backwards, or shuffled anew in each round. Or block after block, or warp after warp,
// where one only starts once those before it can go no further without it.
void run_cluster() {
  const std::size_t together = machine.seed == 3 ? machine.blocks[0].size.x : machine.seed == 4 ? 32 : SIZE_MAX;
  std::vector<Turns> groups;
  for (std::size_t i = 0; i < machine.fibers.size(); ++i) {
    if (i % together == 0) groups.emplace_back();
    groups.back().push_back(&machine.fibers[i]);
  }
  std::mt19937 random(machine.seed);
  if (machine.seed == 1) std::reverse(groups[0].begin(), groups[0].end());
  bool moved = true;
  while (moved) {
    moved = false;
    for (Turns& turns : groups) {
      if (machine.seed == 2) std::shuffle(turns.begin(), turns.end(), random);
      while (!turns.empty() && take_turns(turns)) {
        moved = true;
        if (groups.size() == 1) break;
      }
    }
  }
  for (const Turns& turns : groups) {
    if (!turns.empty()) return complain("threads wait for what never comes");
  }
  for (const Block& block : machine.blocks) {
    if (!block.copies.empty()) complain("a block has left while bytes were on their way to it");
  }
}

}  // namespace

Fiber& here() { return *machine.current; }

void complain(const std::string& what) {
  if (machine.complaint.empty()) machine.complaint = what;
}

void sync_block() {
  Barrier& barrier = here().block->barrier;
  wait(barrier, arrive(barrier));
}

void sync_warp() {
  Barrier& barrier = here().block->warps[here().thread_index.x / 32].barrier;
  wait(barrier, arrive(barrier));
}

void arrive_at_cluster() { here().cluster_generation = arrive(machine.cluster); }

void wait_for_cluster() { wait(machine.cluster, here().cluster_generation); }

// Done at once for an even seed, when somebody waits for it for an odd one.
void start_copy(const Copy& copy) {
  Block& block = *here().block;
  const auto* to = static_cast<unsigned char*>(copy.to);
  if (!aligned(copy.to) || !aligned(copy.from) || copy.bytes % 16 != 0) complain("a bulk copy is not aligned");
  if (to < block.shared.data() || to + copy.bytes > block.shared.data() + block.shared.size()) {
    return complain("a bulk copy leaves shared memory");
  }
  if (machine.seed % 2 == 0) {
    finish(copy);
  } else {
    block.copies.push_back(copy);
  }
}

void wait_for_bytes(std::int64_t* barrier) {
  auto& copies = here().block->copies;
  const auto due = std::partition(copies.begin(), copies.end(), [&](const Copy& c) { return c.barrier != barrier; });
  std::for_each(due, copies.end(), finish);
  copies.erase(due, copies.end());
  while (*barrier != 0) yield();
  ++machine.events;
}

void* in_peer(void* shared, int rank) {
  Block& peer = machine.blocks[static_cast<std::size_t>(rank)];
  if (!peer.started) complain("a store to a block that has not started");
  if (peer.running == 0) complain("a store to a block that has left");
  return peer.shared.data() + (static_cast<unsigned char*>(shared) - here().block->shared.data());
}

void set_seed(unsigned seed) { machine.seed = seed; }

void run(std::int64_t blocks, int threads, int cluster, int shared_bytes, const std::function<void()>& kernel) {
  machine.kernel = kernel;
  machine.complaint.clear();
  for (std::int64_t first = 0; first < blocks && machine.complaint.empty(); first += cluster) {
    set_up(first, threads, cluster, shared_bytes);
    run_cluster();
  }
  if (!machine.complaint.empty()) throw std::runtime_error(machine.complaint);
}

}  // namespace emulator
