// One sequence of the experience stage, from its end to its start. One body for every instruction set: experience.cpp
// includes it once for each, inside that set's target pragma; hence no include guard. The loops are written for the
// compiler's vectoriser; the recurrence is a chain of one multiply-add a token, hidden behind the memory's traffic.
//
// Tiles are counted from the sequence's first slot and filled up with slots that do not count, so that a token's result
// does not depend on the padding after it.

namespace ppo_fast {
namespace PPO_FAST_ISA {

constexpr std::int64_t kTile = 512;  // tokens: a tile of every buffer fits into L1
constexpr int kSums = 8;             // partial sums of the moments, by position modulo this

template <class C, class T>
inline void widen_block(const T* x, std::int64_t n, C* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = static_cast<C>(widen(x[i]));
}

template <class C>
inline void load_block(const TokenRows& rows, std::int64_t at, std::int64_t n, std::int64_t width, C* y) {
  switch (rows.dtype) {
    case DType::kFloat32:
      widen_block(static_cast<const float*>(rows.data) + at, n, y);
      break;
    case DType::kFloat64:
      widen_block(static_cast<const double*>(rows.data) + at, n, y);
      break;
    case DType::kBFloat16:
      widen_block(static_cast<const BFloat16*>(rows.data) + at, n, y);
      break;
    case DType::kFloat16:
      widen_block(static_cast<const Float16*>(rows.data) + at, n, y);
      break;
  }
  for (std::int64_t i = n; i < width; ++i) y[i] = C(0);
}

template <class C, class T>
inline void narrow_to(const C* x, std::int64_t n, T* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = narrow<T>(x[i]);
}

template <class C>
inline void narrow_block(const C* x, std::int64_t n, DType dtype, void* out, std::int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return narrow_to(x, n, static_cast<float*>(out) + at);
    case DType::kFloat64:
      return narrow_to(x, n, static_cast<double*>(out) + at);
    case DType::kBFloat16:
      return narrow_to(x, n, static_cast<BFloat16*>(out) + at);
    case DType::kFloat16:
      return narrow_to(x, n, static_cast<Float16*>(out) + at);
  }
}

// e^x in float, relative error below 2e-7, as code that the vectoriser takes: x = n ln 2 + r, and 2^n in two factors, since
// 2^128 is no float though e^x may be one. The polynomial is that of lanes.h.
inline float exp_any(float x) {
  const float kShift = 0x1.8p23f;  // adding it rounds to an integer, left in the last bits
  const float bounded = x > 90.0f ? 90.0f : x < -105.0f ? -105.0f : x;
  const float shifted = bounded * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (bounded - n * 0.693145751953125f) - n * 1.42860682e-6f;
  float q = r * 0.0013814539f + 0.0083687454f;
  q = q * r + 0.041668389f;
  q = q * r + 0.16666521f;
  q = q * r + 0.49999994f;
  const float y = (q * r) * r + r + 1.0f;
  const std::int32_t power = static_cast<std::int32_t>(n);
  const std::int32_t half = power >> 1;
  const float factor = float_of(static_cast<std::uint32_t>(half + 127) << 23);
  const float rest = float_of(static_cast<std::uint32_t>(power - half + 127) << 23);
  return x == x ? y * factor * rest : x;
}
inline double exp_any(double x) { return std::exp(x); }

// e^x - 1 - x >= 0: by its series near 0, where the difference would cancel.
template <class C>
inline C expm1_less_x(C x) {
  C series = 1 + x / 9 * (1 + x / 10 * (1 + x / 11 * (1 + x / 12)));
  series = 1 + x / 6 * (1 + x / 7 * (1 + x / 8 * series));
  series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series)));
  const C near = sizeof(C) == sizeof(float) ? C(0.5) : C(0.125);
  return x < near && x > -near ? series : exp_any(x) - 1 - x;
}

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
      for (std::int64_t i = 0; i < width; ++i) kl[i] = expm1_less_x(-d[i]);
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
      for (std::int64_t i = 0; i < width; ++i) slope[i] = d[i] - expm1_less_x(-d[i]);
      break;
    case KlKind::kAbs:
      for (std::int64_t i = 0; i < width; ++i) slope[i] = d[i] > 0 ? C(1) : d[i] < 0 ? C(-1) : C(0) * d[i];
      break;
  }
}

// NaN stays NaN.
template <class C>
inline C held(C x, C bound) {
  return x > bound ? bound : x < -bound ? -bound : x;
}

template <class C>
struct Tile {
  std::uint8_t counted[kTile];
  C kl[kTile];
  C rewards[kTile];
  C values[kTile + 1];
  C advantages[kTile];
  C returns[kTile];
  C scratch[kTile];
};

// What a sequence hands on from a tile to the one before it.
template <class C>
struct Carry {
  bool met = false;      // whether a counted slot has been met
  C advantage = C(0);    // of the slot to the right of the tile
  C next_value = C(0);   // as the slot at the tile's right end sees it
  double pivot = 0.0;    // the first advantage met: moments are taken about it
  double count = 0.0;
  double sums[kSums] = {};
  double squares[kSums] = {};
};

// A_t = delta_t + gamma lam A_{t+1} over the slots [0, end), where `end` follows the last slot that takes part.
template <class C>
inline void scan_tile(Tile<C>& tile, std::int64_t end, bool all, bool cut_out, C gamma, C decay, Carry<C>& carry) {
  C advantage = carry.advantage;
  if (all) {
    tile.values[end] = carry.next_value;
    for (std::int64_t i = 0; i < end; ++i) {
      tile.scratch[i] = tile.rewards[i] + (gamma * tile.values[i + 1] - tile.values[i]);
    }
    for (std::int64_t i = end - 1; i >= 0; --i) {
      advantage = tile.scratch[i] + decay * advantage;
      tile.advantages[i] = advantage;
    }
    for (std::int64_t i = 0; i < end; ++i) tile.returns[i] = tile.advantages[i] + tile.values[i];
    carry.next_value = tile.values[0];
  } else {
    for (std::int64_t i = end - 1; i >= 0; --i) {
      tile.advantages[i] = tile.returns[i] = C(0);
      if (!tile.counted[i] && cut_out) continue;
      const C delta = tile.rewards[i] + (gamma * carry.next_value - tile.values[i]);
      advantage = delta + decay * advantage;
      carry.next_value = tile.values[i];
      if (!tile.counted[i]) continue;
      tile.advantages[i] = advantage;
      tile.returns[i] = advantage + tile.values[i];
    }
  }
  carry.advantage = advantage;
}

template <class C>
inline void add_moments(const Tile<C>& tile, std::int64_t width, Carry<C>& carry) {
  for (std::int64_t i = 0; i < width; i += kSums) {
    for (int k = 0; k < kSums; ++k) {
      const double x = tile.counted[i + k] ? static_cast<double>(tile.advantages[i + k]) - carry.pivot : 0.0;
      carry.sums[k] += x;
      carry.squares[k] += x * x;
    }
  }
}

template <class C>
inline Moments moments_of(const Carry<C>& carry) {
  if (carry.count == 0.0) return {0.0, 0.0, 0.0};
  double sum = 0.0;
  double squares = 0.0;
  for (int k = 0; k < kSums; ++k) {
    sum += carry.sums[k];
    squares += carry.squares[k];
  }
  const double about_mean = squares - sum * (sum / carry.count);
  return {carry.count, carry.pivot + sum / carry.count, about_mean < 0.0 ? 0.0 : about_mean};
}

template <class C>
inline void copy_out(void* out, std::int64_t at, const C* from, std::int64_t n) {
  if (out != nullptr) std::memcpy(static_cast<C*>(out) + at, from, n * sizeof(C));
}

template <class C>
void one_sequence(const ExperienceIn& in, const ExperienceOut& out, std::int64_t sequence) {
  const bool packed = in.cu_seqlens != nullptr;
  const std::int64_t first = packed ? in.cu_seqlens[sequence] : sequence * in.tokens;
  const std::int64_t size = packed ? in.cu_seqlens[sequence + 1] - first : in.tokens;
  const auto start_of = [&](const TokenRows& rows) { return packed ? first : sequence * rows.row_stride; };
  const auto own = [&](const void* numbers, double common) {
    return numbers == nullptr ? static_cast<C>(common) : static_cast<const C*>(numbers)[sequence];
  };
  const std::uint8_t* mask = static_cast<const std::uint8_t*>(in.mask.data) + start_of(in.mask);
  const C gamma = own(in.gamma, in.all_gamma);
  const C decay = gamma * own(in.lam, in.all_lam);
  const C clip = static_cast<C>(in.clip_score);
  const C kl_coef = static_cast<C>(in.kl_coef);
  const C score = held(own(in.scores, 0.0), clip);

  Tile<C> tile;
  Carry<C> carry;
  carry.next_value = own(in.bootstrap, 0.0);
  for (std::int64_t start = (size - 1) / kTile * kTile; start >= 0 && size > 0; start -= kTile) {
    const std::int64_t n = size - start < kTile ? size - start : kTile;
    const std::int64_t width = (n + 15) / 16 * 16;
    for (std::int64_t i = 0; i < n; ++i) tile.counted[i] = mask[start + i] != 0;
    for (std::int64_t i = n; i < width; ++i) tile.counted[i] = 0;
    std::int64_t counted = 0;
    for (std::int64_t i = 0; i < width; ++i) counted += tile.counted[i];
    std::int64_t end = n;
    if (!carry.met) {
      while (end > 0 && !tile.counted[end - 1]) --end;
    }
    const bool ends_here = !carry.met && end > 0;
    carry.met = carry.met || ends_here;
    if (counted == 0 && (in.carry || !carry.met)) {  // padding: nothing of the inputs is read
      for (void* filled : {out.rewards, out.kl, out.advantages, out.returns}) {
        if (filled != nullptr) std::memset(static_cast<C*>(filled) + first + start, 0, n * sizeof(C));
      }
      continue;
    }

    std::memset(tile.rewards, 0, width * sizeof(C));
    if (in.logprobs.data != nullptr) {
      load_block(in.logprobs, start_of(in.logprobs) + start, n, width, tile.scratch);
      load_block(in.ref_logprobs, start_of(in.ref_logprobs) + start, n, width, tile.rewards);
      for (std::int64_t i = 0; i < width; ++i) {
        tile.scratch[i] = tile.counted[i] ? tile.scratch[i] - tile.rewards[i] : C(0);
      }
      kl_block(tile.scratch, width, in.kind, tile.kl);
      for (std::int64_t i = 0; i < width; ++i) tile.rewards[i] = tile.counted[i] ? -kl_coef * tile.kl[i] : C(0);
      copy_out(out.kl, first + start, tile.kl, n);
    }
    if (in.token_rewards.data != nullptr) {
      load_block(in.token_rewards, start_of(in.token_rewards) + start, n, width, tile.scratch);
      for (std::int64_t i = 0; i < width; ++i) tile.rewards[i] += tile.counted[i] ? tile.scratch[i] : C(0);
    }
    if (in.scores != nullptr) {
      const std::int64_t paid = in.score_index != nullptr ? in.score_index[sequence] - start : ends_here ? end - 1 : -1;
      if (paid >= 0 && paid < n && tile.counted[paid]) tile.rewards[paid] += score;
    }
    copy_out(out.rewards, first + start, tile.rewards, n);

    if (in.values.data == nullptr) continue;
    load_block(in.values, start_of(in.values) + start, n, width, tile.values);
    for (std::int64_t i = 0; i < width; ++i) tile.values[i] = tile.counted[i] ? tile.values[i] : C(0);
    const std::int64_t scanned = carry.met ? end : 0;
    std::memset(tile.advantages + scanned, 0, (width - scanned) * sizeof(C));
    std::memset(tile.returns + scanned, 0, (width - scanned) * sizeof(C));
    scan_tile(tile, scanned, counted == scanned, in.carry, gamma, decay, carry);
    copy_out(out.advantages, first + start, tile.advantages, n);
    copy_out(out.returns, first + start, tile.returns, n);
    if (out.moments == nullptr) continue;
    if (ends_here) carry.pivot = tile.advantages[end - 1];
    carry.count += static_cast<double>(counted);
    add_moments(tile, width, carry);
  }
  if (out.moments != nullptr) out.moments[sequence] = moments_of(carry);
}

template <class C>
void some_sequences(const ExperienceIn& in, const ExperienceOut& out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) one_sequence<C>(in, out, s);
}

// The recurrence run the other way: G_t = g_t + gamma lam G_before, with g_t what comes down on A_t, is the gradient of the
// reward of slot t; V_t entered as -V_t in its own delta and as gamma V_t in that of the slot before.
template <class C>
void some_gradients(const GaeGradient& in, std::int64_t begin, std::int64_t end) {
  for (std::int64_t sequence = begin; sequence < end; ++sequence) {
    const bool packed = in.cu_seqlens != nullptr;
    const std::int64_t first = packed ? in.cu_seqlens[sequence] : sequence * in.tokens;
    const std::int64_t stop = packed ? in.cu_seqlens[sequence + 1] : first + in.tokens;
    const auto own = [&](const void* numbers, double common) {
      return numbers == nullptr ? static_cast<C>(common) : static_cast<const C*>(numbers)[sequence];
    };
    const C gamma = own(in.gamma, in.all_gamma);
    const C decay = gamma * own(in.lam, in.all_lam);
    C before = C(0);
    C of_last = C(0);
    for (std::int64_t t = first; t < stop; ++t) {
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

template <class C>
void whiten_some(void* x, const std::uint8_t* mask, double mean, double scale, std::int64_t begin, std::int64_t end) {
  C* y = static_cast<C*>(x);
  for (std::int64_t i = begin; i < end; ++i) {
    y[i] = mask[i] ? static_cast<C>((static_cast<double>(y[i]) - mean) * scale) : C(0);
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
    load_block(in.logprobs, start, n, n, raw);
    load_block(in.ref_logprobs, start, n, n, other);
    for (std::int64_t i = 0; i < n; ++i) raw[i] -= other[i];
    for (std::int64_t i = 0; i < n; ++i) d[i] = held(raw[i], input_clamp);
    kl_block(d, n, in.kind, kl);
    if (in.grad == nullptr) {
      for (std::int64_t i = 0; i < n; ++i) kl[i] = held(kl[i], output_clamp);
      copy_out(in.out, start, kl, n);
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
