// A CPU in the place of csrc/cuda/device.cuh, by the same names: every thread of a block is a fiber, and a cluster's
// fibers run by turns, each up to the barrier at which it must wait. The kernels are compiled as they stand.
//
// What a real machine leaves open is decided by a seed, and a right kernel gives the same bits for all of them: in which
// order threads run, and whether a bulk copy is done at once or only when somebody waits for it. Shared memory starts
// as NaN. A wait that nothing can end, a misaligned copy, a store to a block that has not started or is gone are errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/halves.h"
#include "fibers.h"

#ifndef PPO_FAST_CLUSTERS
#error "say whether the emulated device has clusters: -DPPO_FAST_CLUSTERS=0 or 1"
#endif
#define PPO_FAST_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define threadIdx (emulator::here().thread_index)
#define blockIdx (emulator::here().block->index)
#define blockDim (emulator::here().block->size)
#define __syncthreads() emulator::sync_block()

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace ppo_fast::cuda {

using std::max;
using std::min;

constexpr unsigned kAllLanes = 0xffffffffu;

struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline float word_as_float(unsigned word) { return float_of(word); }
inline unsigned float_as_word(float x) { return bits_of(x); }

inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return ppo_fast::widen(BFloat16{x.bits}); }
inline float widen(Fp16 x) { return ppo_fast::widen(Float16{x.bits}); }
inline unsigned narrow_pair(Bf16, float low, float high) {
  return ppo_fast::narrow<BFloat16>(low).bits | static_cast<unsigned>(ppo_fast::narrow<BFloat16>(high).bits) << 16;
}
inline unsigned narrow_pair(Fp16, float low, float high) {
  return ppo_fast::narrow<Float16>(low).bits | static_cast<unsigned>(ppo_fast::narrow<Float16>(high).bits) << 16;
}
inline unsigned bytes_from(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (8 * shift));
}

inline void load_words(const void* global, unsigned (&words)[4]) { std::memcpy(words, global, sizeof words); }

inline int __ffs(unsigned bits) { return bits == 0 ? 0 : __builtin_ctz(bits) + 1; }
inline int __clz(unsigned bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int gap) {
  return emulator::exchange(value, emulator::lane() ^ gap);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int gap) {
  return emulator::exchange(value, emulator::lane() + gap < 32 ? emulator::lane() + gap : emulator::lane());
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= emulator::exchange(vote ? 1u : 0u, lane) << lane;
  return votes;
}

inline unsigned char* shared_memory() { return emulator::here().block->shared.data(); }

using ByteBarrier = std::int64_t;  // bytes that are expected and have not come
inline void init_barrier(ByteBarrier* barrier) { *barrier = 0; }
inline void publish_barriers() {}
inline void expect_bytes(ByteBarrier* barrier, unsigned bytes) { *barrier += bytes; }
inline void bulk_load(void* shared, const void* global, unsigned bytes, ByteBarrier* barrier) {
  emulator::start_copy({shared, global, bytes, barrier});
}
inline void wait_for_bytes(ByteBarrier* barrier) { emulator::wait_for_bytes(barrier); }
inline void wait_for_peers(ByteBarrier* barrier) { emulator::wait_for_bytes(barrier); }

inline int cluster_rank() { return emulator::here().block->rank; }
inline void cluster_arrive() { emulator::arrive_at_cluster(); }
inline void cluster_wait() { emulator::wait_for_cluster(); }
inline void store_to_peer(float4* shared, int rank, float4 value, ByteBarrier* barrier) {
  std::memcpy(emulator::in_peer(shared, rank), &value, sizeof value);
  *static_cast<ByteBarrier*>(emulator::in_peer(barrier, rank)) -= sizeof value;
}

struct DeviceLimits {
  bool clusters;
  int shared_bytes;
};
inline DeviceLimits use_device(int) { return {PPO_FAST_CLUSTERS != 0, 227 * 1024}; }

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int cluster;
  int shared_bytes;
  int most_shared_bytes;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, std::uintptr_t, Arguments... arguments) {
  emulator::run(shape.blocks, shape.threads, std::max(1, shape.cluster), shape.shared_bytes,
                [&] { kernel(arguments...); });
}

}  // namespace ppo_fast::cuda
