// The machine as the kernels see it: every PTX instruction and every CUDA call that they use, by a name that says what
// it is for. tests/cuda/emulator holds the same names for a CPU, so that the kernels run where there is no GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

// Clusters, their shared memory and bulk copies came with compute capability 9.0; host code plans for both.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PPO_FAST_CLUSTERS 1
#else
#define PPO_FAST_CLUSTERS 0
#endif

#define PPO_FAST_DEVICE __device__ __forceinline__

namespace ppo_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};

// 2^x to two units in the last place, in one instruction; results below 2^-126 are 0.
PPO_FAST_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, and NaN where one of them is, unlike fmaxf.
PPO_FAST_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

PPO_FAST_DEVICE float word_as_float(unsigned word) { return __uint_as_float(word); }
PPO_FAST_DEVICE unsigned float_as_word(float x) { return __float_as_uint(x); }

PPO_FAST_DEVICE float widen(float x) { return x; }
PPO_FAST_DEVICE float widen(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
PPO_FAST_DEVICE float widen(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two floats as two halves of a word, the first one low, rounded to nearest even.
PPO_FAST_DEVICE unsigned narrow_pair(Bf16, float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
PPO_FAST_DEVICE unsigned narrow_pair(Fp16, float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The four bytes of a word pair from `shift` bytes on, shift being 0 to 3.
PPO_FAST_DEVICE unsigned bytes_from(unsigned low, unsigned high, unsigned shift) {
  return __funnelshift_r(low, high, 8 * shift);
}

// Four words of global memory at once, from the cache of the whole device: the row is read there again.
PPO_FAST_DEVICE void load_words(const void* global, unsigned (&words)[4]) {
  const uint4 all = __ldcg(static_cast<const uint4*>(global));
  words[0] = all.x;
  words[1] = all.y;
  words[2] = all.z;
  words[3] = all.w;
}

extern __shared__ __align__(128) unsigned char dynamic_shared[];
PPO_FAST_DEVICE unsigned char* shared_memory() { return dynamic_shared; }

PPO_FAST_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// A barrier of shared memory that counts bytes on their way; used once, so that its phase is always the first.
using ByteBarrier = std::uint64_t;

PPO_FAST_DEVICE void init_barrier(ByteBarrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Let the copy engine and the other blocks of the cluster see the barriers that this thread has initialised; these
// blocks after a cluster barrier only.
PPO_FAST_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

PPO_FAST_DEVICE void expect_bytes(ByteBarrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Both addresses and the size are multiples of 16.
PPO_FAST_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, ByteBarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

PPO_FAST_DEVICE void wait_for_bytes(ByteBarrier* barrier) {
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  }
}

// The same for bytes that other blocks of the cluster store here.
PPO_FAST_DEVICE void wait_for_peers(ByteBarrier* barrier) {
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  }
}

PPO_FAST_DEVICE int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Every thread of the cluster arrives, then waits for all others. It orders nothing but published barriers.
PPO_FAST_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
PPO_FAST_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// Store to where `shared` of this block lies in the block `rank` of the cluster, and count its bytes at the barrier there.
PPO_FAST_DEVICE void store_to_peer(float4* shared, int rank, float4 value, ByteBarrier* barrier) {
  unsigned to, at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(shared)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(at)
      : "memory");
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

struct DeviceLimits {
  bool clusters;
  int shared_bytes;  // that one block may have
};

// Make `device` the current one of this runtime, which is not torch's, and say what it has.
inline DeviceLimits use_device(int device) {
  int major = 0, shared = 0;
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return {major >= 9, shared};
}

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int cluster;  // blocks of a cluster; 0 for a device without clusters
  int shared_bytes;
  int most_shared_bytes;  // of any launch of this kernel on this device
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, std::uintptr_t stream, Arguments&&... arguments) {
  if (shape.blocks > 0x7fffffff) throw std::invalid_argument("more blocks than a grid holds");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 0 ? 1 : 0;
  if (shape.most_shared_bytes > 48 * 1024) {  // the most, not this launch's: threads may launch different sizes
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.most_shared_bytes),
          "cudaFuncSetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "cudaFuncSetAttribute");
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "cudaLaunchKernelEx");
}

}  // namespace ppo_fast::cuda
