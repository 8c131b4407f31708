// Logits to the clipped policy loss and its gradient. Where the device has clusters, a row lies in the shared memory of
// up to 8 blocks: it is read from device memory once, by the copy engine, and its gradient is written once. Elsewhere a
// block reads its row twice, the second time from its end, where the cache still holds it.
//
// A row is summed in an order that follows from the vocabulary and dtype alone: no atomics, no batch, no alignment.
#include "cuda/device.cuh"
#include "cuda/policy_rows.h"
#include "cuda/row_math.cuh"
#include "cuda/row_span.cuh"

namespace ppo_fast::cuda {
namespace {

constexpr int kMostBlocks = 8;  // of a cluster that every device schedules
constexpr int kMostThreads = 512;
constexpr int kFewThreads = 256;
constexpr int kMostChunks = 16;
constexpr int kWarp = 32;
// Three blocks of this size share a multiprocessor of 228 KiB, each of which costs another KiB: while one waits for its
// row, one sums and one writes.
constexpr int kThirdOfProcessor = 75 * 1024;

struct Shared {
  float4 parts[kMostBlocks];  // sums of every block of the cluster, and the label's logit from the one that has it
  RowSums warps[kMostThreads / kWarp];
  ByteBarrier exchanged;  // every block's part has come
  ByteBarrier arrived[kMostChunks];
  RowGradient gradient;
};
constexpr int kDataOffset = (static_cast<int>(sizeof(Shared)) + 127) / 128 * 128;

struct Work {
  PolicyRows rows;
  int cluster;  // blocks that share a row
  int share;    // columns of one of them, a multiple of the columns of a vector
};

PPO_FAST_DEVICE std::int64_t row_origin(const PolicyRows& in, std::int64_t row) {
  // Contiguous rows are one level, and a division of 64 bits costs more than all else here.
  if (row < in.inner_rows) return row * in.inner_stride;
  return row / in.inner_rows * in.outer_stride + row % in.inner_rows * in.inner_stride;
}

// Of the whole block, in thread 0. `warps` is free again after the next barrier.
PPO_FAST_DEVICE RowSums sums_of_block(RowSums sums, float scale, RowSums* warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  sums = sums_of_warp(sums, scale);
  if (lane == 0) warps[warp] = sums;
  __syncthreads();
  if (warp > 0) return sums;
  return sums_of_warp(lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : no_sums(), scale);
}

PPO_FAST_DEVICE RowInputs inputs_of(const PolicyRows& in, std::int64_t row, float weight, float inverse_temperature) {
  const float* c = in.coefficients;
  return {weight, inverse_temperature, in.old_logprobs[row], in.advantages[row], c[4], {c[0], c[1], c[2], c[3]}};
}

PPO_FAST_DEVICE void write_numbers(const PolicyRows& in, std::int64_t row, const RowResult& result) {
  in.logprobs[row] = result.logprob;
  in.entropy[row] = result.entropy;
  if (in.state == nullptr) return;
  float* state = in.state + row * 7;
  state[0] = result.top;
  state[1] = result.inverse_total;
  state[2] = -kInfinity;
  state[3] = result.a;
  state[4] = result.b;
  state[5] = result.c;
  state[6] = 0.0f;
}

PPO_FAST_DEVICE RowResult masked_result() { return {0.0f, 0.0f, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f}; }

constexpr int kNoLabel = -(1 << 30);  // as far from every column

// The label's column in [0, columns) of this block.
PPO_FAST_DEVICE int column_of_label(std::int64_t label, int first, int columns) {
  return label >= first && label < first + columns ? static_cast<int>(label - first) : kNoLabel;
}

template <class T>
PPO_FAST_DEVICE void mask_columns_from(int end, float (&x)[kGroup<T>]) {
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) x[i] = i < end ? x[i] : -kInfinity;
}

template <class T>
PPO_FAST_DEVICE void gradient_of_group(float (&x)[kGroup<T>], const RowGradient& row, int label) {
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) x[i] = gradient_of(x[i], row);
  if (static_cast<unsigned>(label) >= static_cast<unsigned>(kGroup<T>)) return;
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) {
    if (i == label) x[i] = row.at_label;
  }
}

// Write the columns of a vector that starts at column `first`, one by one: those that belong to the row.
template <class T>
PPO_FAST_DEVICE void write_columns(T* out, int first, int columns, const float (&x)[kGroup<T>]) {
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) {
    if (first + i >= 0 && first + i < columns) out[first + i] = narrow<T>(x[i]);
  }
}

// Write a row from what `make` says of each vector: the full ones at once, the two at its ends by their columns.
template <class T, class Make>
PPO_FAST_DEVICE void write_row(T* out, const RowSpan& span, Make make) {
  float x[kGroup<T>];
  for (int v = span.full_first + threadIdx.x; v < span.full_last; v += blockDim.x) {
    make(v, x);
    *reinterpret_cast<Vector*>(out + column_of<T>(span, v)) = packed<T>(x);
  }
  if (threadIdx.x >= 2) return;
  const int end = threadIdx.x == 0 ? span.full_first - 1 : span.full_last;
  if (end < 0 || end >= span.vectors) return;
  make(end, x);
  write_columns<T>(out, column_of<T>(span, end), span.columns, x);
}

template <class T>
PPO_FAST_DEVICE void write_zeros(T* out, const RowSpan& span) {
  write_row(out, span, [](int, float(&x)[kGroup<T>]) {
    for (float& column : x) column = 0.0f;
  });
}

#if PPO_FAST_CLUSTERS

// Of the whole row, block by block.
PPO_FAST_DEVICE RowSums sums_of_cluster(const float4* parts, int cluster, float scale) {
  float top = -kInfinity;
#pragma unroll
  for (int i = 0; i < kMostBlocks; ++i) top = i < cluster ? fmaxf(top, parts[i].x) : top;
  RowSums whole{top, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kMostBlocks; ++i) {
    if (i >= cluster) break;
    const RowSums part = moved({parts[i].x, parts[i].y, parts[i].z}, top, scale);
    whole.total += part.total;
    whole.weighted += part.weighted;
  }
  return whole;
}

// By one thread: start the copies of all full vectors, and expect the parts of `cluster` blocks.
PPO_FAST_DEVICE void start_copies(const unsigned char* global, const RowSpan& span, int chunks, int cluster,
                                  unsigned char* data, Shared& shared) {
  init_barrier(&shared.exchanged);
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) init_barrier(shared.arrived + c);
  publish_barriers();
  expect_bytes(&shared.exchanged, static_cast<unsigned>(cluster * sizeof(float4)));
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
    const Chunk chunk = chunk_of(span, c);
    const int at = chunk.first * kVectorBytes;
    const auto bytes = static_cast<unsigned>((chunk.last - chunk.first) * kVectorBytes);
    expect_bytes(shared.arrived + c, bytes);
    if (bytes > 0) bulk_load(data + at, global + at, bytes, shared.arrived + c);
  }
}

// Copy the few columns beside the full vectors.
template <class T>
PPO_FAST_DEVICE void copy_ends(const T* row, const RowSpan& span, unsigned char* data) {
  T* columns = reinterpret_cast<T*>(data + span.shift);
  const int head = min(span.columns, column_of<T>(span, span.full_first));
  const int tail = max(head, column_of<T>(span, span.full_last)) + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < head) columns[threadIdx.x] = row[threadIdx.x];
  if (tail < span.columns) columns[tail] = row[tail];
}

// Sum this thread's groups of columns, chunk by chunk as they arrive.
template <class T>
PPO_FAST_DEVICE RowSums sums_of_share(const RowSpan& span, int chunks, float scale, const unsigned char* data,
                                      ByteBarrier* arrived) {
  const auto* vectors = reinterpret_cast<const Vector*>(data);
  const auto load = [&](int group, float(&x)[kGroup<T>]) {
    Vector vector = vectors[group];
    if (span.shift != 0) vector = straddling(vector, vectors[group + 1], span.shift);
    unpack<T>(vector, x);
  };
  const int full = span.columns / kGroup<T>;
  RowSums sums = no_sums();
  float x[kGroup<T>];
  for (int c = 0; c < chunks; ++c) {
    wait_for_bytes(arrived + c);
    const int last = min(full, (c + 1) * kChunkVectors);
    for (int g = c * kChunkVectors + threadIdx.x; g < last; g += blockDim.x) {
      load(g, x);
      take(sums, x, scale);
    }
  }
  if (threadIdx.x == 0 && full < groups_of<T>(span)) {
    load(full, x);
    mask_columns_from<T>(span.columns - full * kGroup<T>, x);
    take(sums, x, scale);
  }
  return sums;
}

template <class T>
PPO_FAST_DEVICE void write_share(T* out, const RowSpan& span, const RowGradient& row, int label,
                                 const unsigned char* data) {
  const auto* vectors = reinterpret_cast<const Vector*>(data);
  write_row(out, span, [&](int v, float(&x)[kGroup<T>]) {
    unpack<T>(vectors[v], x);
    gradient_of_group<T>(x, row, label - column_of<T>(span, v));
  });
}

template <class T>
PPO_FAST_DEVICE void cluster_row(const Work& work) {
  const PolicyRows& in = work.rows;
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  unsigned char* data = shared_memory() + kDataOffset;
  const int rank = cluster_rank();
  const std::int64_t row = blockIdx.x / work.cluster;
  const int vocab = static_cast<int>(in.vocab);
  const int first = min(vocab, rank * work.share);
  const std::int64_t origin = row_origin(in, row) + first;
  const T* logits = static_cast<const T*>(in.logits) + origin;
  T* out = in.grad_logits == nullptr ? nullptr : static_cast<T*>(in.grad_logits) + origin;
  const RowSpan span = span_of(logits, min(work.share, vocab - first));
  const float weight = in.weights[row];
  if (weight == -kInfinity) {  // for every block of the cluster alike
    if (rank == 0 && threadIdx.x == 0) write_numbers(in, row, masked_result());
    if (out != nullptr) write_zeros(out, span);
    return;
  }
  const int chunks = (groups_of<T>(span) + kChunkVectors - 1) / kChunkVectors;
  if (threadIdx.x == 0) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(logits) - span.shift;
    start_copies(bytes, span, chunks, work.cluster, data, shared);
  }
  copy_ends(logits, span, data);
  const float inverse_temperature = 1.0f / in.temperature[row * in.temperature_stride];
  const float scale = inverse_temperature * kLog2E;
  const std::int64_t label = in.labels[row];
  const int label_here = column_of_label(label, first, span.columns);
  RowInputs inputs{};
  if (threadIdx.x == 0) inputs = inputs_of(in, row, weight, inverse_temperature);
  __syncthreads();   // the barriers and the columns beside the full vectors are there
  cluster_arrive();  // this block has started, and its peers may write to it

  RowSums sums = sums_of_share<T>(span, chunks, scale, data, shared.arrived);
  sums = sums_of_block(sums, scale, shared.warps);
  cluster_wait();
  if (threadIdx.x == 0) {
    float target = 0.0f;
    if (label_here >= 0) target = widen(reinterpret_cast<const T*>(data + span.shift)[label_here]);
#pragma unroll 1
    for (int peer = 0; peer < work.cluster; ++peer) {
      store_to_peer(shared.parts + rank, peer, {sums.top, sums.total, sums.weighted, target}, &shared.exchanged);
    }
    wait_for_peers(&shared.exchanged);  // the last time that a peer writes here: a block leaves when it is done
    const bool in_range = label >= 0 && label < vocab;
    target = in_range ? shared.parts[static_cast<int>(label) / work.share].w : 0.0f;
    const RowResult result = row_result(sums_of_cluster(shared.parts, work.cluster, scale), target, in_range, inputs);
    shared.gradient = row_gradient(result, target, inverse_temperature);
    if (rank == 0) write_numbers(in, row, result);
  }
  if (out == nullptr) return;
  __syncthreads();
  const RowGradient gradient = shared.gradient;
  if (gradient.active) {
    write_share(out, span, gradient, label_here, data);
  } else {
    write_zeros(out, span);
  }
}

#else

// Columns [first, first + a vector's) of a row, filled up with -inf.
template <class T>
PPO_FAST_DEVICE void load_group(const T* row, int first, int columns, bool aligned, float (&x)[kGroup<T>]) {
  if (aligned && first + kGroup<T> <= columns) {
    Vector vector;
    load_words(row + first, vector.words);
    unpack<T>(vector, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) x[i] = first + i < columns ? widen(row[first + i]) : -kInfinity;
}

template <class T>
PPO_FAST_DEVICE void two_pass_row(const Work& work) {
  const PolicyRows& in = work.rows;
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const std::int64_t row = blockIdx.x;
  const int vocab = static_cast<int>(in.vocab);
  const std::int64_t origin = row_origin(in, row);
  const T* logits = static_cast<const T*>(in.logits) + origin;
  T* out = in.grad_logits == nullptr ? nullptr : static_cast<T*>(in.grad_logits) + origin;
  const RowSpan span = span_of(logits, vocab);
  const float weight = in.weights[row];
  if (weight == -kInfinity) {
    if (threadIdx.x == 0) write_numbers(in, row, masked_result());
    if (out != nullptr) write_zeros(out, span);
    return;
  }
  const float inverse_temperature = 1.0f / in.temperature[row * in.temperature_stride];
  const float scale = inverse_temperature * kLog2E;
  const std::int64_t label = in.labels[row];
  const int label_here = column_of_label(label, 0, vocab);
  const float target = label_here < 0 ? 0.0f : widen(logits[label_here]);  // before a fast warp writes over it

  const int groups = groups_of<T>(span), stride = blockDim.x;
  const bool aligned = span.shift == 0;
  RowSums sums = no_sums();
#pragma unroll 2
  for (int g = threadIdx.x; g < groups; g += stride) {
    float x[kGroup<T>];
    load_group(logits, g * kGroup<T>, vocab, aligned, x);
    take(sums, x, scale);
  }
  sums = sums_of_block(sums, scale, shared.warps);
  if (threadIdx.x == 0) {
    const RowInputs inputs = inputs_of(in, row, weight, inverse_temperature);
    const RowResult result = row_result(sums, target, label_here >= 0, inputs);
    shared.gradient = row_gradient(result, target, inverse_temperature);
    write_numbers(in, row, result);
  }
  if (out == nullptr) return;
  __syncthreads();
  const RowGradient gradient = shared.gradient;
  if (!gradient.active) {
    write_zeros(out, span);
    return;
  }
#pragma unroll 2
  for (int g = (groups - 1) / stride * stride + threadIdx.x; g >= 0; g -= stride) {
    float x[kGroup<T>];
    load_group(logits, g * kGroup<T>, vocab, aligned, x);
    gradient_of_group<T>(x, gradient, label_here - g * kGroup<T>);
    if (aligned && (g + 1) * kGroup<T> <= vocab) {
      *reinterpret_cast<Vector*>(out + g * kGroup<T>) = packed<T>(x);
    } else {
      write_columns<T>(out, g * kGroup<T>, vocab, x);
    }
  }
}

#endif

template <class T>
__global__ void __launch_bounds__(kMostThreads) policy_rows_kernel(const Work work) {
#if PPO_FAST_CLUSTERS
  cluster_row<T>(work);
#else
  two_pass_row<T>(work);
#endif
}

struct Plan {
  int cluster;
  int share;
  int threads;
  int shared_bytes;
};

Plan plan_for(std::int64_t vocab, int element_bytes, int cluster) {
  const std::int64_t group = kVectorBytes / element_bytes;
  const std::int64_t share = ((vocab + cluster - 1) / cluster + group - 1) / group * group;
  // One vector more, since a share need not start at a multiple of 16 bytes.
  const std::int64_t bytes = kDataOffset + share * element_bytes + kVectorBytes;
  const bool small = bytes <= kThirdOfProcessor;
  return {cluster, static_cast<int>(share), small ? kFewThreads : kMostThreads,
          static_cast<int>(bytes < INT32_MAX ? bytes : INT32_MAX)};
}

Plan cluster_plan(std::int64_t vocab, int element_bytes, int asked, int most_shared_bytes) {
  int cluster = asked > 0 ? asked : 1;
  while (asked == 0 && cluster < kMostBlocks && plan_for(vocab, element_bytes, cluster).shared_bytes > kThirdOfProcessor) {
    cluster *= 2;
  }
  const Plan plan = plan_for(vocab, element_bytes, cluster);
  if (plan.shared_bytes > most_shared_bytes) {
    throw std::invalid_argument("a row of " + std::to_string(vocab) + " logits does not fit the shared memory of " +
                                std::to_string(cluster) + (cluster == 1 ? " block" : " blocks"));
  }
  return plan;
}

template <class T>
void launch_rows(const PolicyRows& rows, int cluster, const DeviceLimits& limits, std::uintptr_t stream) {
  const Plan plan = limits.clusters ? cluster_plan(rows.vocab, sizeof(T), cluster, limits.shared_bytes)
                                    : Plan{1, 0, kMostThreads, kDataOffset};
  const LaunchShape shape{rows.rows * plan.cluster, plan.threads, limits.clusters ? plan.cluster : 0,
                          plan.shared_bytes, limits.clusters ? limits.shared_bytes : 0};
  launch(policy_rows_kernel<T>, shape, stream, Work{rows, plan.cluster, plan.share});
}

}  // namespace

void policy_rows(const PolicyRows& rows, DType dtype, int cluster, int device, std::uintptr_t stream) {
  if (rows.rows == 0) return;
  const DeviceLimits limits = use_device(device);
  switch (dtype) {
    case DType::kFloat32:
      return launch_rows<float>(rows, cluster, limits, stream);
    case DType::kBFloat16:
      return launch_rows<Bf16>(rows, cluster, limits, stream);
    case DType::kFloat16:
      return launch_rows<Fp16>(rows, cluster, limits, stream);
    case DType::kFloat64:
      throw std::invalid_argument("there is no CUDA kernel for float64 logits");
  }
}

}  // namespace ppo_fast::cuda
