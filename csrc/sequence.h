// One sequence of the experience stage, from its end to its start. One body for every instruction set: experience.cpp
// includes it once for each, after lanes.h, inside that set's target pragma; hence no include guard.
//
// A block is one register of tokens. Blocks are counted from the sequence's first slot, and what does not count adds
// zeros, so that a token's result does not depend on the padding after it. Where a whole block counts, its recurrence is a
// scan inside the register; else it is taken slot by slot.

#include "cpu/blocks.h"

namespace ppo_fast {
namespace PPO_FAST_ISA {

// The estimate of KL(pi || ref) from d = logprob - ref_logprob; a loop for each kind, so that each is vectorised.
template <class C>
inline void kl_block(const C* d, std::int64_t width, KlKind kind, C* kl) {
  switch (kind) {
    case KlKind::kK1:
      for (std::int64_t i = 0; i < width; ++i) kl[i] = d[i];
      break;
    case KlKind::kK2:
      for (std::int64_t i = 0; i < width; ++i) kl[i] = d[i] * d[i] / 2;
      break;
    case KlKind::kK3:
      for (std::int64_t i = 0; i < width; ++i) kl[i] = expm1_less_x<C>(-d[i], exp_any(-d[i]));
      break;
    case KlKind::kAbs:
      for (std::int64_t i = 0; i < width; ++i) kl[i] = d[i] < 0 ? -d[i] : d[i];
      break;
  }
}

// d kl / d logprob.
template <class C>
inline void kl_slope_block(const C* d, std::int64_t width, KlKind kind, C* slope) {
  switch (kind) {
    case KlKind::kK1:
      for (std::int64_t i = 0; i < width; ++i) slope[i] = 1;
      break;
    case KlKind::kK2:
      for (std::int64_t i = 0; i < width; ++i) slope[i] = d[i];
      break;
    case KlKind::kK3:
      for (std::int64_t i = 0; i < width; ++i) slope[i] = d[i] - expm1_less_x<C>(-d[i], exp_any(-d[i]));
      break;
    case KlKind::kAbs:
      for (std::int64_t i = 0; i < width; ++i) slope[i] = d[i] > 0 ? C(1) : d[i] < 0 ? C(-1) : C(0) * d[i];
      break;
  }
}

// x moved K lanes towards the first, filled from the right with the first lanes of `fill`.
template <int K, class V, int... I>
inline V shifted(V x, V fill, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, fill, (I + K)...);
}
template <int K, class C>
inline typename Lanes<C>::Vec shifted(typename Lanes<C>::Vec x, typename Lanes<C>::Vec fill) {
  return shifted<K>(x, fill, std::make_integer_sequence<int, Lanes<C>::kWidth>{});
}
template <class V, int... I>
inline V first_lane(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I * 0)...);
}

// What all blocks of a sequence share: powers of the decay for the scan inside a register.
template <class C>
struct Recurrence {
  using V = typename Lanes<C>::Vec;
  static constexpr int kWidth = Lanes<C>::kWidth;
  C gamma;
  C decay;
  C power[4];     // decay^1, ^2, ^4, ^8
  V to_the_next;  // decay^(W - lane): what a lane takes of the slot after the block

  Recurrence(C gamma_, C decay_) : gamma(gamma_), decay(decay_) {
    power[0] = decay;
    for (int k = 1; k < 4; ++k) power[k] = power[k - 1] * power[k - 1];
    C factor = decay;
    for (int lane = kWidth - 1; lane >= 0; --lane, factor *= decay) to_the_next[lane] = factor;
  }

  // A_i = x_i + decay A_{i+1} in a register, A after it being `next` in every lane.
  V scan(V x, V next) const {
    x += power[0] * shifted<1, C>(x, V{});
    if constexpr (kWidth > 2) x += power[1] * shifted<2, C>(x, V{});
    if constexpr (kWidth > 4) x += power[2] * shifted<4, C>(x, V{});
    if constexpr (kWidth > 8) x += power[3] * shifted<8, C>(x, V{});
    return x + to_the_next * next;
  }
};

// Where the tokens of a tile lie, in the dtype of the arithmetic; null: not given, or not wanted.
template <class C>
struct TilePointers {
  const std::uint8_t* mask;
  const C* logprobs;
  const C* ref_logprobs;
  const C* token_rewards;
  const C* values;
  C* rewards;
  C* kl;
  C* advantages;
  C* returns;

  TilePointers from(std::int64_t at) const {
    const auto moved = [at](auto* p) { return p == nullptr ? p : p + at; };
    return {mask + at,          moved(logprobs), moved(ref_logprobs), moved(token_rewards), moved(values),
            moved(rewards), moved(kl),       moved(advantages),   moved(returns)};
  }
};

// What a sequence hands on from a block to the one before it.
template <class C>
struct Carry {
  using V = typename Lanes<C>::Vec;
  static constexpr int kWidth = Lanes<C>::kWidth;
  bool met = false;   // whether a counted slot has been met
  V advantage{};      // of the slot to the right of the block, in every lane
  V next_value{};     // as the slot at the block's right end sees it, in every lane
  double pivot = 0.0;  // the first advantage met: moments are taken about it
  double count = 0.0;
  double total = 0.0;
  double squares = 0.0;

  Moments moments() const {
    if (count == 0.0) return {0.0, 0.0, 0.0};
    const double about_mean = squares - total * (total / count);
    return {count, pivot + total / count, about_mean < 0.0 ? 0.0 : about_mean};
  }
};

template <class C>
struct Shaping {
  C kl_coef;
  C score;
  std::int64_t paid;  // the slot that is paid the score, from the sequence's first; -1: the last counted one
  KlKind kind;
  bool scored;
  bool cut_out;  // a masked slot between counted ones is no step
  bool moments;
};

constexpr std::uint8_t kAllCount[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

template <class C>
inline bool whole_block_counts(const std::uint8_t* mask) {
  return std::memcmp(mask, kAllCount, Lanes<C>::kWidth) == 0;  // a bool is 0 or 1; another byte goes slot by slot
}

inline bool nothing_counts(const std::uint8_t* mask, std::int64_t n) {
  std::uint8_t any = 0;
  for (std::int64_t i = 0; i < n; ++i) any |= mask[i];
  return any == 0;
}

// Blocks from `first` downwards while every slot of them counts; returns the first slot of the block that it stopped at.
// `paid` is the slot of the tile that is paid, if it lies here; the sequence's last slot may lie in the first of them.
// `kUsual`: k1, no dense rewards, everything wanted; the compiler then leaves the branches out.
template <bool kUsual, class C>
inline std::int64_t full_blocks(const TilePointers<C>& tile, std::int64_t first, const Shaping<C>& shaping,
                                const Recurrence<C>& recurrence, std::int64_t paid, Carry<C>& carry) {
  using V = typename Lanes<C>::Vec;
  constexpr int kWidth = Lanes<C>::kWidth;
  const auto lanes = std::make_integer_sequence<int, kWidth>{};
  const TilePointers<C> in = tile;        // copies, which stay in registers: the stores below could alias the originals
  const Recurrence<C> chain = recurrence;
  Carry<C> own = carry;
  C pivot = static_cast<C>(own.pivot);
  DoubleSum<C> sum, squares;  // in double: a pivot far from the mean leaves little of the variance in float
  std::int64_t at = first;
  for (; at >= 0 && whole_block_counts<C>(in.mask + at); at -= kWidth) {
    V r{};
    if (kUsual || in.logprobs != nullptr) {
      V kl = load(in.logprobs + at) - load(in.ref_logprobs + at);
      if (!kUsual && shaping.kind != KlKind::kK1) {
        C d[kWidth];
        store(d, kl);
        kl_block(d, kWidth, shaping.kind, d);
        kl = load(d);
      }
      if (kUsual || in.kl != nullptr) store(in.kl + at, kl);
      r = -shaping.kl_coef * kl;
    }
    if (!kUsual && in.token_rewards != nullptr) r += load(in.token_rewards + at);
    if (!own.met && shaping.scored && shaping.paid < 0) paid = at + kWidth - 1;
    if (paid >= at && paid < at + kWidth) r[paid - at] += shaping.score;
    if (kUsual || in.rewards != nullptr) store(in.rewards + at, r);
    if (!kUsual && in.values == nullptr) {
      own.met = true;
      continue;
    }
    const V v = load(in.values + at);
    const V delta = r + (chain.gamma * shifted<1, C>(v, own.next_value) - v);
    const V advantage = chain.scan(delta, own.advantage);
    store(in.advantages + at, advantage);
    store(in.returns + at, advantage + v);
    if (!own.met) pivot = advantage[kWidth - 1];
    own.met = true;
    own.advantage = first_lane(advantage, lanes);
    own.next_value = first_lane(v, lanes);
    if (kUsual || shaping.moments) {
      sum.add(advantage);
      squares.add_squares(advantage, V{} + C(1), static_cast<double>(pivot));
    }
  }
  own.pivot = static_cast<double>(pivot);
  own.count += static_cast<double>(first - at);
  if (shaping.moments) own.total += sum.total() - own.pivot * static_cast<double>(first - at);
  own.squares += squares.total();
  carry = own;
  return at;
}

// Any block of n slots, slot by slot; `paid` is the lane that is paid, -1 for the last counted one if it is met here.
template <class C>
inline void mixed_block(const TilePointers<C>& at, const Shaping<C>& shaping, const Recurrence<C>& recurrence,
                        std::int64_t paid, std::int64_t n, Carry<C>& carry) {
  C advantage = carry.advantage[0];
  C next_value = carry.next_value[0];
  for (std::int64_t i = n - 1; i >= 0; --i) {
    const bool counted = at.mask[i] != 0;
    const bool last = counted && !carry.met;
    carry.met = carry.met || counted;
    C kl = counted && at.logprobs != nullptr ? at.logprobs[i] - at.ref_logprobs[i] : C(0);
    if (counted) kl_block(&kl, 1, shaping.kind, &kl);
    C r = counted && at.logprobs != nullptr ? -shaping.kl_coef * kl : C(0);
    if (counted && at.token_rewards != nullptr) r += at.token_rewards[i];
    if (shaping.scored && counted && (shaping.paid < 0 ? last : i == paid)) r += shaping.score;
    if (at.kl != nullptr) at.kl[i] = kl;
    if (at.rewards != nullptr) at.rewards[i] = r;
    if (at.values == nullptr) continue;
    const C v = counted ? at.values[i] : C(0);
    if (counted || (carry.met && !shaping.cut_out)) {
      const C delta = r + (recurrence.gamma * next_value - v);
      advantage = delta + recurrence.decay * advantage;
      next_value = v;
    }
    at.advantages[i] = counted ? advantage : C(0);
    at.returns[i] = counted ? advantage + v : C(0);
    if (last) carry.pivot = static_cast<double>(advantage);
    if (counted && shaping.moments) {
      const double x = static_cast<double>(advantage) - carry.pivot;
      carry.count += 1.0;
      carry.total += x;
      carry.squares += x * x;
    }
  }
  carry.advantage = typename Lanes<C>::Vec{} + advantage;
  carry.next_value = typename Lanes<C>::Vec{} + next_value;
}

inline int size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

template <class C>
inline void zero_slots(const TilePointers<C>& at, std::int64_t n) {
  for (C* out : {at.rewards, at.kl, at.advantages, at.returns}) {
    if (out != nullptr) std::memset(out, 0, n * sizeof(C));
  }
}

// The slots [start, start + n) of a sequence.
template <bool kUsual, class C>
inline void one_tile(const TilePointers<C>& tile, const Shaping<C>& shaping, const Recurrence<C>& recurrence,
                     std::int64_t start, std::int64_t n, Carry<C>& carry) {
  constexpr std::int64_t kWidth = Lanes<C>::kWidth;
  const std::int64_t paid = shaping.scored && shaping.paid >= 0 ? shaping.paid - start : -1;
  for (std::int64_t first = (n - 1) / kWidth * kWidth; first >= 0; first -= kWidth) {
    const std::int64_t size = n - first < kWidth ? n - first : kWidth;
    if (size == kWidth) {
      first = full_blocks<kUsual>(tile, first, shaping, recurrence, paid, carry);
      if (first < 0) break;
    }
    if (shaping.cut_out && nothing_counts(tile.mask + first, size)) {
      zero_slots(tile.from(first), size);  // a hole: nothing of the inputs is read
    } else {
      mixed_block(tile.from(first), shaping, recurrence, paid - first, size, carry);
    }
  }
}

constexpr std::int64_t kStep = 16;   // slots of padding taken at a time: a cache line of float
constexpr std::int64_t kAhead = 512;  // slots of padding next to the tokens where inputs are asked for

inline void prefetch(const TokenRows& rows, std::int64_t at) {
  if (rows.data != nullptr) __builtin_prefetch(static_cast<const char*>(rows.data) + at * size_of(rows.dtype));
}

// Padding is taken from its end as the tokens are, and asks for the inputs before them: else every sequence would begin
// where no hardware prefetcher is, which costs more than its tokens do.
template <class C>
void one_sequence(const ExperienceIn& in, const ExperienceOut& out, std::int64_t sequence) {
  const auto [first, size] = span_of(in.cu_seqlens, in.tokens, sequence);
  const auto start_of = [&in, sequence, packed_first = first](const TokenRows& rows) {
    return in.cu_seqlens == nullptr ? sequence * rows.row_stride : packed_first;
  };
  const auto own = [&](const void* numbers, double common) {
    return numbers == nullptr ? static_cast<C>(common) : static_cast<const C*>(numbers)[sequence];
  };
  const C gamma = own(in.gamma, in.all_gamma);
  const Recurrence<C> recurrence(gamma, gamma * own(in.lam, in.all_lam));
  const Shaping<C> shaping{static_cast<C>(in.kl_coef),
                           held(own(in.scores, 0.0), static_cast<C>(in.clip_score)),
                           in.score_index == nullptr ? -1 : in.score_index[sequence],
                           in.kind,
                           in.scores != nullptr && (in.score_index == nullptr || in.score_index[sequence] >= 0),
                           in.carry,
                           out.moments != nullptr};
  Carry<C> carry;
  carry.next_value = typename Lanes<C>::Vec{} + own(in.bootstrap, 0.0);
  const bool usual = in.kind == KlKind::kK1 && in.logprobs.data != nullptr && in.token_rewards.data == nullptr &&
                     out.rewards != nullptr && in.values.data != nullptr && shaping.moments;
  C buffers[4][kTile];
  const auto* mask = static_cast<const std::uint8_t*>(in.mask.data) + start_of(in.mask);
  const auto output = [&](void* data, std::int64_t at) { return data == nullptr ? nullptr : static_cast<C*>(data) + at; };
  const auto outputs = [&, first_slot = first](std::int64_t start) {
    const std::int64_t at = first_slot + start;
    return TilePointers<C>{mask + start, nullptr, nullptr, nullptr, nullptr, output(out.rewards, at), output(out.kl, at),
                           output(out.advantages, at), output(out.returns, at)};
  };
  const std::int64_t counted_end = end_of_counted(mask, size);
  std::int64_t padding = size;
  for (; padding - kStep >= counted_end; padding -= kStep) {
    zero_slots(outputs(padding - kStep), kStep);
    if (padding - counted_end > kAhead) continue;
    for (const TokenRows* rows : {&in.logprobs, &in.ref_logprobs, &in.token_rewards, &in.values}) {
      prefetch(*rows, start_of(*rows) + padding - kStep);
    }
  }
  zero_slots(outputs(counted_end), padding - counted_end);
  for (std::int64_t start = (counted_end - 1) / kTile * kTile; start >= 0 && counted_end > 0; start -= kTile) {
    const std::int64_t n = counted_end - start < kTile ? counted_end - start : kTile;
    TilePointers<C> tile = outputs(start);
    tile.logprobs = as_compute(in.logprobs, start_of(in.logprobs) + start, n, buffers[0]);
    tile.ref_logprobs = as_compute(in.ref_logprobs, start_of(in.ref_logprobs) + start, n, buffers[1]);
    tile.token_rewards = as_compute(in.token_rewards, start_of(in.token_rewards) + start, n, buffers[2]);
    tile.values = as_compute(in.values, start_of(in.values) + start, n, buffers[3]);
    if (usual) {
      one_tile<true>(tile, shaping, recurrence, start, n, carry);
    } else {
      one_tile<false>(tile, shaping, recurrence, start, n, carry);
    }
  }
  if (out.moments != nullptr) out.moments[sequence] = carry.moments();
}

// From the last one to the first, as each of them: the memory is then walked through in one direction.
template <class C>
void some_sequences(const ExperienceIn& in, const ExperienceOut& out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = end - 1; s >= begin; --s) one_sequence<C>(in, out, s);
}

// The recurrence run the other way: G_t = g_t + gamma lam G_before, with g_t what comes down on A_t, is the gradient of the
// reward of slot t; V_t entered as -V_t in its own delta and as gamma V_t in that of the slot before.
template <class C>
void some_gradients(const GaeGradient& in, std::int64_t begin, std::int64_t end) {
  for (std::int64_t sequence = begin; sequence < end; ++sequence) {
    const auto [first, size] = span_of(in.cu_seqlens, in.tokens, sequence);
    const auto own = [&](const void* numbers, double common) {
      return numbers == nullptr ? static_cast<C>(common) : static_cast<const C*>(numbers)[sequence];
    };
    const C gamma = own(in.gamma, in.all_gamma);
    const C decay = gamma * own(in.lam, in.all_lam);
    C before = C(0);
    C of_last = C(0);
    for (std::int64_t t = first; t < first + size; ++t) {
      const bool counted = in.mask[t] != 0;
      const C of_return = counted ? static_cast<const C*>(in.grad_returns)[t] : C(0);
      const C g = counted ? static_cast<const C*>(in.grad_advantages)[t] + of_return : C(0);
      const C grad = g + decay * before;
      static_cast<C*>(in.grad_rewards)[t] = counted ? grad : C(0);
      static_cast<C*>(in.grad_values)[t] = counted ? of_return + (gamma * before - grad) : C(0);
      if (counted) of_last = grad;
      if (counted || !in.carry) before = grad;
    }
    static_cast<C*>(in.grad_bootstrap)[sequence] = gamma * of_last;
  }
}

// x is 0 where the mask is, and stays so. The mean is taken as a number of C and what rounding took from it.
template <class C>
void whiten_some(void* x, const std::uint8_t* mask, Affine to_white, std::int64_t begin, std::int64_t end) {
  using V = typename Lanes<C>::Vec;
  constexpr std::int64_t kWidth = Lanes<C>::kWidth;
  const C near = static_cast<C>(to_white.mean);
  const C rest = static_cast<C>(to_white.mean - static_cast<double>(near));
  const C factor = static_cast<C>(to_white.scale);
  C* y = static_cast<C*>(x);
  std::int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    if (whole_block_counts<C>(mask + i)) {
      const V whitened = ((load(y + i) - near) - rest) * factor;
      store(y + i, whitened);
    } else if (!nothing_counts(mask + i, kWidth)) {
      for (std::int64_t k = i; k < i + kWidth; ++k) y[k] = mask[k] ? ((y[k] - near) - rest) * factor : C(0);
    }
  }
  for (; i < end; ++i) y[i] = mask[i] ? ((y[i] - near) - rest) * factor : C(0);
}

template <class C>
void whiten_sequences(const ExperienceIn& in, const ExperienceOut& out, Affine to_white, std::int64_t begin,
                      std::int64_t end) {
  const auto* mask = static_cast<const std::uint8_t*>(in.mask.data);
  for (std::int64_t s = begin; s < end; ++s) {
    const auto [first, size] = span_of(in.cu_seqlens, in.tokens, s);
    const std::int64_t of_mask = in.cu_seqlens == nullptr ? s * in.mask.row_stride : first;
    whiten_some<C>(static_cast<C*>(out.advantages) + first, mask + of_mask, to_white, 0, size);
  }
}

// The estimate, or the gradient where there is one to pass on: a clamp passes it at its bounds and stops it beyond.
template <class C>
void some_estimates(const KlIn& in, std::int64_t begin, std::int64_t end) {
  C raw[kTile], d[kTile], kl[kTile], other[kTile];
  const C input_clamp = static_cast<C>(in.input_clamp);
  const C output_clamp = static_cast<C>(in.output_clamp);
  for (std::int64_t start = begin; start < end; start += kTile) {
    const std::int64_t n = end - start < kTile ? end - start : kTile;
    load_block(in.logprobs, start, n, raw);
    load_block(in.ref_logprobs, start, n, other);
    for (std::int64_t i = 0; i < n; ++i) raw[i] -= other[i];
    for (std::int64_t i = 0; i < n; ++i) d[i] = held(raw[i], input_clamp);
    kl_block(d, n, in.kind, kl);
    if (in.grad == nullptr) {
      for (std::int64_t i = 0; i < n; ++i) kl[i] = held(kl[i], output_clamp);
      std::memcpy(static_cast<C*>(in.out) + start, kl, n * sizeof(C));
      continue;
    }
    const C* grad = static_cast<const C*>(in.grad) + start;
    kl_slope_block(d, n, in.kind, other);
    for (std::int64_t i = 0; i < n; ++i) {
      const bool stopped = raw[i] > input_clamp || raw[i] < -input_clamp || kl[i] > output_clamp || kl[i] < -output_clamp;
      other[i] = grad[i] * (stopped ? C(0) : other[i]);
    }
    narrow_block(other, n, in.logprobs.dtype, in.out, start);
  }
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
