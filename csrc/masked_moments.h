// Moments of columns under a mask, and what is made of them, a chunk of one column or of neighbouring ones at a time. One
// body for every instruction set: moments.cpp includes it for each, after lanes.h; hence no include guard.

#include "cpu/blocks.h"

namespace ppo_fast {
namespace PPO_FAST_ISA {
namespace moments {

// Calls body(at, n) for every tile of what lies side by side in memory from `begin` to `end`.
template <class Body>
inline void for_tiles(std::int64_t begin, std::int64_t end, const Body& body) {
  for (std::int64_t at = begin; at < end; at += kTile) body(at, end - at < kTile ? end - at : kTile);
}

template <class C>
inline void take(const MaskedColumns& in, std::int64_t at, std::int64_t n, C* x, C* counted) {
  take_counted(in.mask + at, TokenRows{in.x, in.dtype, 0}, at, n, x);
  take_mask(in.mask + at, n, counted);
}

// A mean as a number of C and what rounding took from it: differences from the first are exact where an offset dominates.
template <class C>
struct Centre {
  C near;
  C rest;

  explicit Centre(double mean)
      : near(static_cast<C>(mean)), rest(static_cast<C>(mean - static_cast<double>(near))) {}
};

template <class C>
Moments moments_along(const MaskedColumns& in, std::int64_t begin, std::int64_t end) {
  Moments whole{0.0, 0.0, 0.0};
  C x[kTile], counted[kTile];
  for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
    take(in, at, n, x, counted);
    whole = merged(whole, tile_moments(x, counted, n));
  });
  return whole;
}

// Of n neighbouring columns, `rows` numbers each, which fit the L2 cache: read twice. Those of column i go to parts[i * stride].
template <class C>
void moments_across(const MaskedColumns& in, std::int64_t first, std::int64_t rows, std::int64_t n, Moments* parts,
                    std::int64_t stride) {
  C x[kTile], counted[kTile];
  double count[kTile], mean[kTile], squares[kTile];
  for (std::int64_t i = 0; i < n; ++i) count[i] = mean[i] = squares[i] = 0.0;
  for (std::int64_t row = 0; row < rows; ++row) {
    take(in, first + row * in.inner, n, x, counted);
    for (std::int64_t i = 0; i < n; ++i) count[i] += static_cast<double>(counted[i]);
    for (std::int64_t i = 0; i < n; ++i) mean[i] += static_cast<double>(x[i]);
  }
  for (std::int64_t i = 0; i < n; ++i) mean[i] = count[i] > 0.0 ? mean[i] / count[i] : 0.0;
  for (std::int64_t row = 0; row < rows; ++row) {
    take(in, first + row * in.inner, n, x, counted);
    for (std::int64_t i = 0; i < n; ++i) {
      const double deviation = (static_cast<double>(x[i]) - mean[i]) * static_cast<double>(counted[i]);
      squares[i] += deviation * deviation;
    }
  }
  for (std::int64_t i = 0; i < n; ++i) parts[i * stride] = {count[i], mean[i], squares[i]};
}

// Chunks [begin, end) of `cut`, each to parts[column * cut.chunks + its number].
template <class C>
void some_moments(const MaskedColumns& in, const Cut& cut, Moments* parts, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const Chunk chunk = cut.chunk(i);
    Moments* own = parts + chunk.column * cut.chunks + chunk.number;
    if (in.inner == 1) {
      *own = moments_along<C>(in, chunk.first, chunk.first + chunk.rows);
    } else {
      moments_across<C>(in, chunk.first, chunk.rows, chunk.columns, own, cut.chunks);
    }
  }
}

// What a gradient is made of, for each element of a tile: (x - mean) times this, or this alone for a mean.
template <class C>
struct Slopes {
  C factor[kTile];
  C near[kTile];
  C rest[kTile];

  void set(std::int64_t i, const MaskedColumns& in, Moment moment, const Moments& whole, C grad) {
    const double freedom = freedom_of(whole, moment == Moment::kVariance && in.unbiased);
    const Centre<C> centre(whole.mean);
    factor[i] = static_cast<C>((moment == Moment::kVariance ? 2.0 : 1.0) * static_cast<double>(grad) / freedom);
    near[i] = centre.near;
    rest[i] = centre.rest;
  }
};

template <class C>
inline void gradient_tile(const MaskedColumns& in, Moment moment, const Slopes<C>& slopes, std::int64_t at, std::int64_t n,
                          void* grad_x) {
  C x[kTile], counted[kTile];
  if (moment == Moment::kMean) {
    take_mask(in.mask + at, n, counted);
    for (std::int64_t i = 0; i < n; ++i) x[i] = counted[i] > C(0) ? slopes.factor[i] : C(0);
  } else {
    take(in, at, n, x, counted);
    for (std::int64_t i = 0; i < n; ++i) {
      const C slope = slopes.factor[i] * ((x[i] - slopes.near[i]) - slopes.rest[i]);
      x[i] = counted[i] > C(0) ? slope : C(0);
    }
  }
  narrow_block(x, n, in.dtype, grad_x, at);
}

template <class C>
void some_gradients(const MaskedColumns& in, const Cut& cut, Moment moment, const Moments* whole, const void* grad,
                    void* grad_x, std::int64_t begin, std::int64_t end) {
  const C* down = static_cast<const C*>(grad);
  Slopes<C> slopes;
  for (std::int64_t c = begin; c < end; ++c) {
    const Chunk chunk = cut.chunk(c);
    const bool along = in.inner == 1;
    const std::int64_t width = along ? (chunk.rows < kTile ? chunk.rows : kTile) : chunk.columns;
    for (std::int64_t i = 0; i < width; ++i) {
      const std::int64_t column = chunk.column + (along ? 0 : i);
      slopes.set(i, in, moment, whole[column], down[column]);
    }
    if (along) {
      for_tiles(chunk.first, chunk.first + chunk.rows,
                [&](std::int64_t at, std::int64_t n) { gradient_tile(in, moment, slopes, at, n, grad_x); });
    } else {
      for (std::int64_t row = 0; row < chunk.rows; ++row) {
        gradient_tile(in, moment, slopes, chunk.first + row * in.inner, width, grad_x);
      }
    }
  }
}

// (x - mean) scale, and the mean again if it is kept.
template <class C>
void normalize_some(const MaskedColumns& in, Affine affine, bool keep_mean, void* out, std::int64_t begin,
                    std::int64_t end) {
  const Centre<C> centre(affine.mean);
  const C scale = static_cast<C>(affine.scale);
  const C near = keep_mean ? centre.near : C(0), rest = keep_mean ? centre.rest : C(0);
  C x[kTile], counted[kTile];
  for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
    take(in, at, n, x, counted);
    C* y = static_cast<C*>(out) + at;
    for (std::int64_t i = 0; i < n; ++i) {
      const C normal = ((x[i] - centre.near) - centre.rest) * scale;
      y[i] = counted[i] > C(0) ? near + (normal + rest) : C(0);
    }
  });
}

// The sums of the gradient, and of its product with x - mean.
template <class C>
GradientSums gradient_sums(const MaskedColumns& in, const void* grad, double mean, std::int64_t begin, std::int64_t end) {
  using V = typename Lanes<C>::Vec;
  const Centre<C> centre(mean);
  C x[kTile], g[kTile];
  DoubleSum<C> grads, products;
  for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
    take_counted(in.mask + at, TokenRows{in.x, in.dtype, 0}, at, n, x);
    take_counted(in.mask + at, TokenRows{grad, sizeof(C) == 4 ? DType::kFloat32 : DType::kFloat64, 0}, at, n, g);
    for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) {
      const V own = load(g + i);
      grads.add(own);
      products.add(own * ((load(x + i) - centre.near) - centre.rest));
    }
  });
  return {grads.total(), products.total()};
}

// scale (g - mean g - slope (x - mean)), and mean g more if the mean is kept.
template <class C>
void normalize_gradient(const MaskedColumns& in, const NormalGradient& of, const void* grad, void* grad_x,
                        std::int64_t begin, std::int64_t end) {
  const Centre<C> centre(of.mean);
  const C scale = static_cast<C>(of.scale), slope = static_cast<C>(of.slope), mean_grad = static_cast<C>(of.mean_grad);
  const C of_mean = of.keep_mean ? mean_grad : C(0);
  C x[kTile], counted[kTile];
  for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
    take(in, at, n, x, counted);
    const C* g = static_cast<const C*>(grad) + at;
    for (std::int64_t i = 0; i < n; ++i) {
      const C centred = (x[i] - centre.near) - centre.rest;
      const C own = scale * ((g[i] - mean_grad) - slope * centred) + of_mean;
      x[i] = counted[i] > C(0) ? own : C(0);
    }
    narrow_block(x, n, in.dtype, grad_x, at);
  });
}

}  // namespace moments
}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
