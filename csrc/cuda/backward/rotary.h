// A gradient of rotated queries or keys, rotated back. Dimension c of a row belongs to a pair that has one angle:
// (2c, 2c + 1) if INTERLEAVED, else (c, c + HALF); the first 2 HALF dimensions rotate, the others pass.
#pragma once
#include "common/types.h"

namespace posattn {

struct RotaryColumn {
  bool rotates;
  bool first;   // of the pair
  int pair;     // which angle
  int partner;  // the pair's other dimension

  __device__ __forceinline__ explicit RotaryColumn(int dimension) {
    rotates = dimension < 2 * HALF;
    first = INTERLEAVED ? dimension % 2 == 0 : dimension < HALF;
    pair = INTERLEAVED ? dimension / 2 : dimension - (first ? 0 : HALF);
    partner = INTERLEAVED ? dimension ^ 1 : first ? dimension + HALF : dimension - HALF;
  }

  __device__ __forceinline__ float back(float x, float other, float cos, float sin) const {
    return x * cos + (first ? other : -other) * sin;
  }
};

}  // namespace posattn
