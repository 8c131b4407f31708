// KL-shaped rewards, GAE and the moments of its advantages, one block a sequence; and their whitening. The twin of
// kernels/experience.py.
//
// A sequence is read once, in tiles from its end to its start, four neighbouring slots a thread. A tile's recurrence
// A_t = delta_t + decay_t A_{t+1} is a scan over (decay, delta) in lanes, warps and the block; between tiles A and the
// value of the next counted token are carried. Tiles are counted from the sequence's first slot, whatever its padding.
#include "cuda/experience.h"

#include "cuda/device.cuh"
#include "cuda/moments.cuh"
#include "cuda/row_math.cuh"

namespace ppo_fast::cuda {
namespace {

constexpr int kEach = 4;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = kThreads * kEach;
constexpr int kWhitenedTiles = 4;  // of a block: the moments are merged anew in each
constexpr float kWhitenEps = 1e-8f;

struct Shared {
  int has[kWarps];  // whether the warp hands a value to its left, and which
  float value[kWarps];
  int last[kWarps];  // its last counted slot, or -1
  float decay[kWarps];
  float delta[kWarps];
  Moments moments[kWarps];
  float mean;
  float rest;
  float scale;
};

// Four neighbouring numbers from slot `t` on, 0 past the end.
template <class T>
PPO_FAST_DEVICE void load_four_of(const T* row, int t, int size, float (&x)[kEach]) {
  struct alignas(kEach * sizeof(T)) Four {
    T of[kEach];
  };
  if (t + kEach <= size && reinterpret_cast<std::uintptr_t>(row) % sizeof(Four) == 0) {
    const Four four = *reinterpret_cast<const Four*>(row + t);
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = widen(four.of[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) x[i] = t + i < size ? widen(row[t + i]) : 0.0f;
}

PPO_FAST_DEVICE void load_four(const TokenRows& rows, std::int64_t row, int t, int size, float (&x)[kEach]) {
  switch (rows.dtype) {
    case DType::kFloat32:
      return load_four_of(static_cast<const float*>(rows.data) + row, t, size, x);
    case DType::kBFloat16:
      return load_four_of(static_cast<const Bf16*>(rows.data) + row, t, size, x);
    case DType::kFloat16:
      return load_four_of(static_cast<const Fp16*>(rows.data) + row, t, size, x);
    case DType::kFloat64:  // no binding lets it in
      return;
  }
}

PPO_FAST_DEVICE void store_four(float* row, int t, int size, const float (&x)[kEach]) {
  if (t + kEach <= size && reinterpret_cast<std::uintptr_t>(row) % sizeof(float4) == 0) {
    *reinterpret_cast<float4*>(row + t) = {x[0], x[1], x[2], x[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (t + i < size) row[t + i] = x[i];
  }
}

// Bit i: slot t + i counts.
PPO_FAST_DEVICE unsigned load_mask(const std::uint8_t* row, int t, int size) {
  unsigned counted = 0;
  if (t + kEach <= size && reinterpret_cast<std::uintptr_t>(row) % kEach == 0) {
    const unsigned bytes = *reinterpret_cast<const unsigned*>(row + t);
#pragma unroll
    for (int i = 0; i < kEach; ++i) counted |= ((bytes >> (8 * i)) & 0xffu) != 0 ? 1u << i : 0u;
    return counted;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) counted |= t + i < size && row[t + i] != 0 ? 1u << i : 0u;
  return counted;
}

PPO_FAST_DEVICE bool bit(unsigned bits, int i) { return (bits >> i & 1u) != 0; }

struct Sequence {
  std::int64_t index;
  std::int64_t first;  // its first slot in contiguous tensors
  int size;
  bool packed;
  float kl_coef;
  float gamma;
  float lam;
  float bootstrap;
};

PPO_FAST_DEVICE std::int64_t start_of(const Experience& in, std::int64_t sequence) {
  return in.cu_seqlens_64 ? static_cast<const std::int64_t*>(in.cu_seqlens)[sequence]
                          : static_cast<const std::int32_t*>(in.cu_seqlens)[sequence];
}

PPO_FAST_DEVICE Sequence sequence_of(const Experience& in) {
  Sequence s;
  s.index = blockIdx.x;
  s.packed = in.cu_seqlens != nullptr;
  s.first = s.packed ? start_of(in, s.index) : s.index * in.tokens;
  s.size = static_cast<int>(s.packed ? start_of(in, s.index + 1) - s.first : in.tokens);
  s.kl_coef = in.coefficients[0];
  s.gamma = in.gamma != nullptr ? in.gamma[s.index] : in.coefficients[2];
  s.lam = in.lam != nullptr ? in.lam[s.index] : in.coefficients[3];
  s.bootstrap = in.bootstrap != nullptr ? in.bootstrap[s.index] : in.coefficients[4];
  return s;
}

// Where the sequence starts in a tensor: rows a stride apart, or one after the other where packed.
PPO_FAST_DEVICE std::int64_t row_of(const Sequence& s, const TokenRows& rows) {
  return s.packed ? s.first : s.index * rows.row_stride;
}

// e^x - 1 - x >= 0: by its series near 0, where the difference would cancel.
PPO_FAST_DEVICE float expm1_less_x(float x) {
  if (!(x < 1.0f && x > -1.0f)) return exp_fast(x) - 1.0f - x;
  float series = 1.0f;
#pragma unroll
  for (int n = 11; n >= 3; --n) series = fmaf(x * (1.0f / static_cast<float>(n)), series, 1.0f);
  return 0.5f * x * x * series;
}

// The estimate of KL(pi || ref) from d = logprob - ref_logprob.
PPO_FAST_DEVICE float kl_of_kind(float d, KlKind kind) {
  switch (kind) {
    case KlKind::kK1:
      return d;
    case KlKind::kK2:
      return 0.5f * d * d;
    case KlKind::kK3:
      return expm1_less_x(-d);
    case KlKind::kAbs:
      return fabsf(d);
  }
  return NAN;
}

// r_t = -kl_coef kl_t + token_reward_t, plus the clipped score at the slot that is paid; what is not given is left out.
PPO_FAST_DEVICE void shape_rewards(const Experience& in, const Sequence& s, int t, unsigned counted, int last,
                                   float (&r)[kEach]) {
  float x[kEach], kl[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) r[i] = 0.0f;
  if (in.logprobs.data != nullptr) {
    float ref[kEach];
    load_four(in.logprobs, row_of(s, in.logprobs), t, s.size, x);
    load_four(in.ref_logprobs, row_of(s, in.ref_logprobs), t, s.size, ref);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      kl[i] = bit(counted, i) ? kl_of_kind(x[i] - ref[i], in.kind) : 0.0f;
      r[i] = bit(counted, i) ? -s.kl_coef * kl[i] : 0.0f;
    }
    if (in.kl != nullptr) store_four(in.kl + s.first, t, s.size, kl);
  }
  if (in.token_rewards.data != nullptr) {
    load_four(in.token_rewards, row_of(s, in.token_rewards), t, s.size, x);
#pragma unroll
    for (int i = 0; i < kEach; ++i) r[i] += bit(counted, i) ? x[i] : 0.0f;
  }
  if (in.scores != nullptr) {
    const std::int64_t paid = in.score_index != nullptr ? in.score_index[s.index] : last;
    const float score = held(in.scores[s.index], in.coefficients[1]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) r[i] += bit(counted, i) && t + i == paid ? score : 0.0f;
  }
  if (in.rewards != nullptr) store_four(in.rewards + s.first, t, s.size, r);
}

// What passes from tile to tile, the same in every thread.
struct Carried {
  int last;         // the sequence's last counted slot, once it has been met
  float value;      // of the nearest counted slot to the right of the tile, or of the next slot
  float advantage;  // of the slot to the right of the tile
};

// Hand each thread the value to its right: of the nearest counted slot, or of the next one where masked slots are steps.
// Finds the last counted slot on the way.
PPO_FAST_DEVICE float value_to_the_right(Shared& shared, const float (&v)[kEach], int t, unsigned counted, bool carry,
                                         Carried& carried) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float own = v[0];
  if (carry) {
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) own = bit(counted, i) ? v[i] : own;
  }
  const unsigned with_token = __ballot_sync(kAllLanes, counted != 0);
  const unsigned has = carry ? with_token : kAllLanes;
  const unsigned right = has & ~((2u << lane) - 1u);
  const float from_lane = __shfl_sync(kAllLanes, own, right != 0 ? __ffs(right) - 1 : lane);
  const float of_warp = __shfl_sync(kAllLanes, own, has != 0 ? __ffs(has) - 1 : 0);
  const int last = __shfl_sync(kAllLanes, t + 31 - __clz(counted), with_token != 0 ? 31 - __clz(with_token) : 0);
  if (lane == 0) {
    shared.has[warp] = has != 0;
    shared.value[warp] = of_warp;
    shared.last[warp] = with_token != 0 ? last : -1;
  }
  __syncthreads();
  float from_warp = carried.value;
  int last_of_tile = -1;
#pragma unroll
  for (int w = kWarps - 1; w >= 0; --w) {
    if (w == warp) from_warp = carried.value;
    if (shared.has[w] != 0) carried.value = shared.value[w];
    last_of_tile = max(last_of_tile, shared.last[w]);
  }
  if (carried.last < 0) carried.last = last_of_tile;
  return right != 0 ? from_lane : from_warp;
}

// Turn deltas into advantages, from the tile's end to its start.
PPO_FAST_DEVICE void scan(Shared& shared, const float (&decay)[kEach], float (&delta)[kEach], Carried& carried) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float whole_decay = 1.0f, whole_delta = 0.0f;  // of this thread's slots, then of all from it to the warp's end
#pragma unroll
  for (int i = kEach - 1; i >= 0; --i) {
    whole_delta = fmaf(decay[i], whole_delta, delta[i]);
    whole_decay *= decay[i];
  }
#pragma unroll
  for (int gap = 1; gap < 32; gap *= 2) {
    const float right_decay = __shfl_down_sync(kAllLanes, whole_decay, gap);
    const float right_delta = __shfl_down_sync(kAllLanes, whole_delta, gap);
    if (lane + gap < 32) {
      whole_delta = fmaf(whole_decay, right_delta, whole_delta);
      whole_decay *= right_decay;
    }
  }
  const float right_decay = __shfl_down_sync(kAllLanes, whole_decay, 1);
  const float right_delta = __shfl_down_sync(kAllLanes, whole_delta, 1);
  if (lane == 0) {
    shared.decay[warp] = whole_decay;
    shared.delta[warp] = whole_delta;
  }
  __syncthreads();
  float advantage = 0.0f;
#pragma unroll
  for (int w = kWarps - 1; w >= 0; --w) {
    if (w == warp) advantage = carried.advantage;
    carried.advantage = fmaf(shared.decay[w], carried.advantage, shared.delta[w]);
  }
  if (lane < 31) advantage = fmaf(right_decay, advantage, right_delta);
#pragma unroll
  for (int i = kEach - 1; i >= 0; --i) {
    advantage = fmaf(decay[i], advantage, delta[i]);
    delta[i] = advantage;
  }
}

PPO_FAST_DEVICE void experience_tile(const Experience& in, const Sequence& s, int start, Shared& shared,
                                     Carried& carried, Moments& moments) {
  const int t = start + static_cast<int>(threadIdx.x) * kEach;
  const auto* mask = static_cast<const std::uint8_t*>(in.mask.data) + row_of(s, in.mask);
  const unsigned counted = load_mask(mask, t, s.size);
  float v[kEach] = {};
  if (in.values.data != nullptr) load_four(in.values, row_of(s, in.values), t, s.size, v);
#pragma unroll
  for (int i = 0; i < kEach; ++i) v[i] = bit(counted, i) ? v[i] : 0.0f;
  float following = value_to_the_right(shared, v, t, counted, in.carry, carried);
  float r[kEach];
  shape_rewards(in, s, t, counted, carried.last, r);
  if (in.values.data == nullptr) {
    __syncthreads();  // the next tile writes to what this one has read
    return;
  }
  float decay[kEach], delta[kEach];
#pragma unroll
  for (int i = kEach - 1; i >= 0; --i) {
    const bool takes_part = in.carry ? bit(counted, i) : t + i <= carried.last;
    const float next = t + i == carried.last ? s.bootstrap : following;
    delta[i] = takes_part ? r[i] + (s.gamma * next - v[i]) : 0.0f;
    decay[i] = takes_part ? s.gamma * s.lam : 1.0f;
    if (bit(counted, i) || !in.carry) following = v[i];
  }
  scan(shared, decay, delta, carried);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    delta[i] = bit(counted, i) ? delta[i] : 0.0f;
    v[i] = bit(counted, i) ? delta[i] + v[i] : 0.0f;
    if (in.parts != nullptr && bit(counted, i)) add(moments, delta[i]);
  }
  store_four(in.advantages + s.first, t, s.size, delta);
  store_four(in.returns + s.first, t, s.size, v);
}

// Two blocks a multiprocessor, at least: with more in mind the compiler spills on sm_90a.
__global__ void __launch_bounds__(kThreads, 2) experience_kernel(const Experience in) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const Sequence s = sequence_of(in);
  Carried carried{-1, s.bootstrap, 0.0f};
  Moments moments{};
  for (int start = (s.size - 1) / kTile * kTile; start >= 0 && s.size > 0; start -= kTile) {
    experience_tile(in, s, start, shared, carried, moments);
  }
  if (in.parts == nullptr) return;
  moments = moments_of_block(moments, shared.moments);
  if (threadIdx.x == 0) store_part(in.parts, s.index, in.sequences, moments);
}

PPO_FAST_DEVICE Moments moments_of_parts(const float* parts, std::int64_t first, std::int64_t last, std::int64_t plane,
                                         Moments* warps) {
  Moments whole{};
  for (std::int64_t at = first + threadIdx.x; at < last; at += kThreads) {
    whole = merged(whole, load_part(parts, at, plane));
  }
  return moments_of_block(whole, warps);
}

__global__ void __launch_bounds__(kThreads)
    merge_parts_kernel(const float* parts, std::int64_t count, float* merged, std::int64_t groups, std::int64_t size) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const std::int64_t first = blockIdx.x * size;
  const std::int64_t last = first + size < count ? first + size : count;
  const Moments whole = moments_of_parts(parts, first, last, count, shared.moments);
  if (threadIdx.x == 0) store_part(merged, blockIdx.x, groups, whole);
}

__global__ void __launch_bounds__(kThreads) whiten_kernel(float* x, const std::uint8_t* mask, std::int64_t size,
                                                          const float* parts, std::int64_t count, float bessel) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const Moments whole = moments_of_parts(parts, 0, count, count, shared.moments);
  if (threadIdx.x == 0) {
    shared.mean = whole.pivot + whole.shift;
    shared.rest = whole.shift - (shared.mean - whole.pivot);
    shared.scale = rsqrtf(whole.squares / fmaxf(whole.count - bessel, 1.0f) + kWhitenEps);
  }
  __syncthreads();
  const float mean = shared.mean, rest = shared.rest, scale = shared.scale;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kWhitenedTiles * kTile;
  const std::int64_t left = size - first;
  const int here = static_cast<int>(left < kWhitenedTiles * kTile ? left : kWhitenedTiles * kTile);
  for (int t = static_cast<int>(threadIdx.x) * kEach; t < here; t += kTile) {
    const unsigned counted = load_mask(mask + first, t, here);
    float four[kEach];
    load_four_of(x + first, t, here, four);
#pragma unroll
    for (int i = 0; i < kEach; ++i) four[i] = bit(counted, i) ? ((four[i] - mean) - rest) * scale : 0.0f;
    store_four(x + first, t, here, four);
  }
}

LaunchShape shape_of(std::int64_t blocks) { return {blocks, kThreads, 0, static_cast<int>(sizeof(Shared)), 0}; }

}  // namespace

void experience(const Experience& in, int device, std::uintptr_t stream) {
  if (in.sequences == 0) return;
  use_device(device);
  launch(experience_kernel, shape_of(in.sequences), stream, in);
}

void merge_parts(const float* parts, std::int64_t count, float* merged, std::int64_t groups, std::int64_t size,
                 int device, std::uintptr_t stream) {
  if (groups == 0) return;
  use_device(device);
  launch(merge_parts_kernel, shape_of(groups), stream, parts, count, merged, groups, size);
}

void whiten_by_parts(float* x, const std::uint8_t* mask, std::int64_t size, const float* parts, std::int64_t count,
                     bool unbiased, int device, std::uintptr_t stream) {
  if (size == 0) return;
  use_device(device);
  const std::int64_t blocks = (size + kWhitenedTiles * kTile - 1) / (kWhitenedTiles * kTile);
  launch(whiten_kernel, shape_of(blocks), stream, x, mask, size, parts, count, unbiased ? 1.0f : 0.0f);
}

}  // namespace ppo_fast::cuda
