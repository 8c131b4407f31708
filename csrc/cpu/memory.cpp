#include "cpu/memory.h"

#include <atomic>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ppo_fast {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

std::size_t whole_pages(std::size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

struct Spare {
  void* data;
  std::size_t bytes;  // whole pages
};

// One block, taken and left by exchange: no lock that a fork could leave held.
std::atomic<Spare*> spare{nullptr};

void release(Spare* block) {
  if (block == nullptr) return;
  std::free(block->data);
  delete block;
}

}  // namespace

void* take_block(std::size_t bytes) {
  const std::size_t size = whole_pages(bytes);
  Spare* kept = spare.exchange(nullptr);
  if (kept != nullptr && kept->bytes == size) {
    void* data = kept->data;
    delete kept;
    return data;
  }
  release(kept);
  void* data = std::aligned_alloc(kHugePage, size);
#ifdef __linux__
  if (data != nullptr) madvise(data, size, MADV_HUGEPAGE);  // a wish: where it is not granted, memory stays as it was
#endif
  return data;
}

void return_block(void* data, std::size_t bytes) {
  const std::size_t size = whole_pages(bytes);
  Spare* block = size <= kMostSpareBytes ? new (std::nothrow) Spare{data, size} : nullptr;
  if (block == nullptr) return std::free(data);
  release(spare.exchange(block));
}

}  // namespace ppo_fast
