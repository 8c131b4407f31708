// Where the columns of a row lie in shared memory, in vectors of 16 bytes, and which of them the copy engine brings.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace ppo_fast::cuda {

constexpr int kVectorBytes = 16;
constexpr int kChunkVectors = 1024;  // of one bulk copy: the sums start on the first while others are on their way

struct alignas(kVectorBytes) Vector {
  unsigned words[4];
};

// Shared memory holds the bytes of a row at the same distance from a multiple of 16 as global memory does.
struct RowSpan {
  int shift;       // bytes from a multiple of 16 to the first column
  int columns;     // in all
  int vectors;     // that hold a byte of the row
  int full_first;  // [full_first, full_last) are inside the row from end to end
  int full_last;
};

template <class T>
PPO_FAST_DEVICE RowSpan span_of(const T* first_column, int columns) {
  const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(first_column) % kVectorBytes);
  const int end = shift + columns * static_cast<int>(sizeof(T));
  const int full_first = shift == 0 ? 0 : 1;
  const int full_last = end / kVectorBytes;
  return {shift, columns, (end + kVectorBytes - 1) / kVectorBytes, full_first, full_last < full_first ? full_first : full_last};
}

// Column that vector `index` starts with; below 0 for one that starts before the row.
template <class T>
PPO_FAST_DEVICE int column_of(const RowSpan& span, int index) {
  return (index * kVectorBytes - span.shift) / static_cast<int>(sizeof(T));
}

// Sums are made of columns 8 k to 8 k + 7 (4 for floats) wherever the row lies, so that they have the same bits
// everywhere; such a group ends in the vector after its first one where the row is not aligned.
template <class T>
constexpr int kGroup = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
PPO_FAST_DEVICE int groups_of(const RowSpan& span) {
  return (span.columns + kGroup<T> - 1) / kGroup<T>;
}

// The vectors of chunk c, within those that are full: with the groups [1024 c, 1024 (c + 1)) end its bytes.
struct Chunk {
  int first;
  int last;
};

PPO_FAST_DEVICE Chunk chunk_of(const RowSpan& span, int c) {
  const int first = c == 0 ? 0 : c * kChunkVectors + 1;
  const int last = (c + 1) * kChunkVectors + 1;
  Chunk chunk{first < span.full_first ? span.full_first : first, last > span.full_last ? span.full_last : last};
  if (chunk.last < chunk.first) chunk.last = chunk.first;
  return chunk;
}

// Four words from `shift` bytes into two neighbouring vectors on.
PPO_FAST_DEVICE Vector straddling(const Vector& low, const Vector& high, int shift) {
  unsigned w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = low.words[i];
    w[i + 4] = high.words[i];
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) vector.words[i] = bytes_from(w[i], w[i + 1], static_cast<unsigned>(shift & 3));
  return vector;
}

template <class T>
PPO_FAST_DEVICE void unpack(const Vector& vector, float (&x)[kGroup<T>]) {
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = word_as_float(vector.words[i]);
    } else {
      x[i] = widen(T{static_cast<std::uint16_t>(vector.words[i / 2] >> (16 * (i % 2)))});
    }
  }
}

template <class T>
PPO_FAST_DEVICE Vector packed(const float (&x)[kGroup<T>]) {
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      vector.words[i] = float_as_word(x[i]);
    } else {
      vector.words[i] = narrow_pair(T{}, x[2 * i], x[2 * i + 1]);
    }
  }
  return vector;
}

template <class T>
PPO_FAST_DEVICE T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{static_cast<std::uint16_t>(narrow_pair(T{}, x, 0.0f))};
  }
}

}  // namespace ppo_fast::cuda
