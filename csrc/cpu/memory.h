// Memory of large results. Fresh pages cost several times what the kernel that fills them does, so the block of the last
// large result that was let go is kept for the next one, on huge pages where the system grants them.
#pragma once

#include <cstddef>

namespace ppo_fast {

constexpr std::size_t kMostSpareBytes = std::size_t{1} << 29;  // a larger block goes back to the system

// At least `bytes` bytes, aligned to a huge page; null where there is no memory.
void* take_block(std::size_t bytes);

// `data` from take_block(bytes): the next one to ask gets it.
void return_block(void* data, std::size_t bytes);

}  // namespace ppo_fast
