// How a tensor core adds: one row of an output.
//
// Options::tensor_core 0 sums exact products in float64 and rounds once: a good tensor core for finding wrong code.
// 80 and 90 follow what measurements of the hardware found (Fasi et al., PeerJ Computer Science 7:e330, 2021, for
// A100; Khattak and Mikaitis, arXiv:2512.07004, 2025, for H100): products are exact, a block of them and the
// accumulator are aligned to the largest exponent, bits below the kept ones are cut off, and so is the float32 result.
#pragma once

#include <algorithm>
#include <cmath>

namespace ptxsim {

struct TensorCore {
  int block = 0;       // products added at once; 0: float64
  int extra_bits = 0;  // kept below the 24 of a float32
  bool truncate = false;

  static TensorCore of(int architecture, bool tf32, bool perturb) {
    // tf32 products come from half as many lanes of the same datapath.
    if (architecture == 80) return {tf32 ? 4 : 8, 1, true};
    if (architecture == 90) return {tf32 ? 8 : 16, 2, true};
    return {0, 0, perturb};
  }

  static float cut(double value) {
    auto result = static_cast<float>(value);
    if (std::isfinite(result) && std::fabs(static_cast<double>(result)) > std::fabs(value))
      result = std::nextafter(result, 0.0f);
    return result;
  }

  // acc[n] += sum over k of a[k] * b[k][n], for one row of the output.
  void add_row(float* acc, int columns, const float* a, const float* b, int b_stride, int depth) const {
    if (block == 0) {
      constexpr int kMaxColumns = 256;
      double sums[kMaxColumns];
      for (int n = 0; n < columns; ++n) sums[n] = acc[n];
      for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < columns; ++n)
          sums[n] += static_cast<double>(a[k]) * static_cast<double>(b[k * b_stride + n]);
      }
      for (int n = 0; n < columns; ++n) acc[n] = truncate ? cut(sums[n]) : static_cast<float>(sums[n]);
      return;
    }
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < depth; k += block) {
        acc[n] = add_block(acc[n], a + k, b + k * b_stride + n, std::min(block, depth - k), b_stride);
      }
    }
  }

private:
  float add_block(float acc, const float* a, const float* b, int count, int stride) const {
    // The exponent of a product is the sum of its factors' exponents, before any carry.
    int top = acc == 0 ? -10000 : std::ilogb(acc);
    bool finite = std::isfinite(acc);
    double plain = acc;
    for (int k = 0; k < count; ++k) {
      const double product = static_cast<double>(a[k]) * b[k * stride];
      plain += product;
      finite = finite && std::isfinite(product);
      if (product != 0) top = std::max(top, std::ilogb(a[k]) + std::ilogb(b[k * stride]));
    }
    if (!finite || top == -10000) return static_cast<float>(plain);
    const int lowest = top - 23 - extra_bits;
    const auto kept = [lowest](double value) { return std::trunc(std::ldexp(value, -lowest)); };
    double sum = kept(acc);
    for (int k = 0; k < count; ++k) sum += kept(static_cast<double>(a[k]) * b[k * stride]);
    return cut(std::ldexp(sum, lowest));
  }
};

}  // namespace ptxsim
