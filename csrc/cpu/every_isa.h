// Includes lanes.h and then the file that PPO_FAST_BODY names, once for each instruction set of this architecture, inside
// that set's target pragma and namespace. All that a body needs of other headers, standard ones first, stands before it:
// an inline function of theirs compiled for AVX-512 could be the copy that the linker keeps. So stands here what lanes.h needs.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PPO_FAST_X86 1
#include <immintrin.h>
#endif

#define PPO_FAST_ISA portable
#define PPO_FAST_BYTES 16
#include "cpu/lanes.h"
#include PPO_FAST_BODY
#undef PPO_FAST_ISA
#undef PPO_FAST_BYTES

#ifdef PPO_FAST_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define PPO_FAST_ISA avx2
#define PPO_FAST_BYTES 32
#include "cpu/lanes.h"
#include PPO_FAST_BODY
#undef PPO_FAST_ISA
#undef PPO_FAST_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define PPO_FAST_ISA avx512
#define PPO_FAST_BYTES 64
#include "cpu/lanes.h"
#include PPO_FAST_BODY
#undef PPO_FAST_ISA
#undef PPO_FAST_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // PPO_FAST_X86

#undef PPO_FAST_BODY

// The table of entry points that `PPO_FAST_OPS(namespace)` makes for each set, by the set that was chosen at run time.
#ifdef PPO_FAST_X86
#define PPO_FAST_CHOOSE(Table, isa)                         \
  static const Table portable_ops = PPO_FAST_OPS(portable); \
  static const Table avx2_ops = PPO_FAST_OPS(avx2);         \
  static const Table avx512_ops = PPO_FAST_OPS(avx512);     \
  return isa == Isa::kAvx512 ? avx512_ops : isa == Isa::kAvx2 ? avx2_ops : portable_ops
#else
#define PPO_FAST_CHOOSE(Table, isa)                         \
  static const Table portable_ops = PPO_FAST_OPS(portable); \
  (void)isa;                                                \
  return portable_ops
#endif
