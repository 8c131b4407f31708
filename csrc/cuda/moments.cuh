// Count, mean and sum of squares about the mean of a part, and how parts add up; the twin of kernels/partial_moments.py.
//
// The mean is kept in two parts, a value near it and a small rest: a large common offset costs the variance nothing.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device.cuh"

namespace ppo_fast::cuda {

struct Moments {
  float count;
  float pivot;
  float shift;    // mean less the pivot
  float squares;  // about the mean
};

// Welford 1962, about the first number that counts; a pivot may be any number, but an infinite one would turn into NaN.
PPO_FAST_DEVICE void add(Moments& part, float x) {
  if (part.count == 0.0f) part.pivot = fabsf(x) < HUGE_VALF ? x : 0.0f;
  part.count += 1.0f;
  const float d = x - part.pivot;
  const float gap = d - part.shift;
  part.shift += __fdividef(gap, part.count);
  part.squares += gap * (d - part.shift);
}

// Chan, Golub and LeVeque 1983: M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b).
PPO_FAST_DEVICE Moments merged(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  if (a.count == 0.0f) return b;
  const float count = a.count + b.count;
  const float share = __fdividef(b.count, count);
  const float gap = (b.pivot - a.pivot) + b.shift - a.shift;
  return {count, a.pivot, a.shift + gap * share, a.squares + b.squares + a.count * share * gap * gap};
}

// Of every lane, in lane 0.
PPO_FAST_DEVICE Moments moments_of_warp(Moments part) {
#pragma unroll
  for (int gap = 16; gap > 0; gap /= 2) {
    const Moments right{__shfl_down_sync(kAllLanes, part.count, gap), __shfl_down_sync(kAllLanes, part.pivot, gap),
                        __shfl_down_sync(kAllLanes, part.shift, gap), __shfl_down_sync(kAllLanes, part.squares, gap)};
    part = merged(part, right);
  }
  return part;
}

// Of the whole block, in thread 0.
PPO_FAST_DEVICE Moments moments_of_block(Moments part, Moments* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  part = moments_of_warp(part);
  if (lane == 0) warps[warp] = part;
  __syncthreads();
  if (warp > 0) return part;
  return moments_of_warp(lane < static_cast<int>(blockDim.x) / 32 ? warps[lane] : Moments{});
}

PPO_FAST_DEVICE Moments load_part(const float* parts, std::int64_t at, std::int64_t plane) {
  return {parts[at], parts[at + plane], parts[at + 2 * plane], parts[at + 3 * plane]};
}

PPO_FAST_DEVICE void store_part(float* parts, std::int64_t at, std::int64_t plane, const Moments& part) {
  parts[at] = part.count;
  parts[at + plane] = part.pivot;
  parts[at + 2 * plane] = part.shift;
  parts[at + 3 * plane] = part.squares;
}

}  // namespace ppo_fast::cuda
