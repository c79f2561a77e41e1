// Memory of exactly the size that a kernel may touch, so that AddressSanitizer sees one element too many.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/problem.h"

namespace posattn::test {

inline size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// Exact for the small multiples of a power of two that the tests draw.
inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffU) == 0) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000U) | (((bits >> 23 & 0xffU) - 112U) << 10) | (bits >> 13 & 0x3ffU));
}

inline float from_half(uint16_t h) {
  const int exponent = h >> 10 & 0x1f, mantissa = h & 0x3ff;
  const float sign = (h & 0x8000) != 0 ? -1.0F : 1.0F;
  if (exponent == 31)
    return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}

inline void store(void* to, int64_t index, DType dtype, float x) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[index] = x;
  } else if (dtype == DType::f16) {
    static_cast<uint16_t*>(to)[index] = std::isnan(x) ? 0x7e00 : to_half(x);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    static_cast<uint16_t*>(to)[index] = static_cast<uint16_t>(bits >> 16);
  }
}

inline float load(const void* from, int64_t index, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[index];
  const uint16_t half = static_cast<const uint16_t*>(from)[index];
  if (dtype == DType::f16) return from_half(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Owns every array of one problem, and draws the same values for the same seed.
class Memory {
public:
  explicit Memory(unsigned seed) : random_(seed) {}

  // `count` elements that end where the allocation ends and start off every alignment wider than an element.
  template <class T>
  T* array(int64_t count) {
    blocks_.emplace_back(new unsigned char[static_cast<size_t>(count + 1) * sizeof(T)]);
    return reinterpret_cast<T*>(blocks_.back().get()) + 1;
  }

  template <class T>
  T* filled(int64_t count, T value) {
    T* data = array<T>(count);
    for (int64_t i = 0; i < count; ++i) data[i] = value;
    return data;
  }

  // Multiples of 1/16 in [low, high): exact in every dtype.
  float draw(float low, float high) {
    const int steps = static_cast<int>((high - low) * 16.0F);
    return low + static_cast<float>(integer(steps)) / 16.0F;
  }

  int integer(int below) { return static_cast<int>(random_() % static_cast<unsigned>(below)); }

  float* drawn(int64_t count, float low, float high) {
    float* data = array<float>(count);
    for (int64_t i = 0; i < count; ++i) data[i] = draw(low, high);
    return data;
  }

  // A [batch, heads, rows, columns] tensor whose rows lie `gap` elements apart, drawn from [-1, 1).
  View tensor(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns, int64_t gap) {
    View view = blank(dtype, batch, heads, rows, columns, gap);
    each(view, batch, heads, rows, columns,
         [&](int64_t index) { posattn::test::store(view.data, index, dtype, draw(-1.0F, 1.0F)); });
    return view;
  }

  // The same, for a result: NaN until it is written, or zero.
  View result(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns, float value) {
    View view = blank(dtype, batch, heads, rows, columns, 0);
    each(view, batch, heads, rows, columns,
         [&](int64_t index) { posattn::test::store(view.data, index, dtype, value); });
    return view;
  }

  template <class Visit>
  static void each(const View& view, int64_t batch, int64_t heads, int64_t rows, int64_t columns, Visit visit) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c) visit(b * view.batch + h * view.head + r * view.row + c);
  }

private:
  View blank(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns, int64_t gap) {
    View view;
    view.dtype = dtype;
    view.row = columns + gap;
    view.head = rows * view.row;
    view.batch = heads * view.head;
    const int64_t count = batch * heads * rows == 0 ? 0 : batch * view.batch - gap;
    view.data = dtype == DType::f32 ? static_cast<void*>(array<float>(count)) : array<uint16_t>(count);
    return view;
  }

  std::mt19937 random_;
  std::deque<std::unique_ptr<unsigned char[]>> blocks_;
};

}  // namespace posattn::test
