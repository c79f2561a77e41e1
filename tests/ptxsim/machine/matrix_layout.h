// Where an operand of wgmma or tcgen05.mma lies in shared memory, as its matrix descriptor says.
//
// Bits 0-13 of a descriptor are the start, 16-29 the leading and 32-45 the stride byte offset, in units of 16 bytes;
// how its top bits name a swizzle is the instruction's own.
#pragma once

#include <cstdint>

namespace ptxsim {

inline constexpr int kUnit = 16;  // bytes that stay together under any swizzle

class MatrixLayout {
public:
  // A swizzled row spans 2^swizzle_log units. Elements follow one another along k, or along mn if transposed.
  MatrixLayout(uint64_t bits, int swizzle_log, int element_bytes, bool transposed)
      : start_(field(bits, 0)),
        leading_(field(bits, 16)),
        stride_(field(bits, 32)),
        units_(uint64_t{1} << swizzle_log),
        element_bytes_(element_bytes),
        transposed_(transposed) {}

  // The address of the unit that holds element (mn, k).
  uint64_t unit(int mn, int k) const {
    const auto row = static_cast<uint64_t>(transposed_ ? k % 8 : mn % 8);
    const auto along = static_cast<uint64_t>((transposed_ ? mn : k) * element_bytes_ / kUnit);
    uint64_t address = start_ + row * kUnit * units_;
    if (!transposed_) {
      address += static_cast<uint64_t>(mn / 8) * stride_ + along * (units_ == 1 ? leading_ : kUnit);
    } else {
      const auto down = static_cast<uint64_t>(k / 8);
      address += units_ == 1 ? along * stride_ + down * leading_
                             : along % units_ * kUnit + along / units_ * leading_ + down * stride_;
    }
    // The swizzle exchanges units by address bits 7 and up.
    return address ^ ((address >> 7 & (units_ - 1)) << 4);
  }

  // Calls visit(unit address, first mn, first k) for every unit of the rows [first, first + size) of an operand.
  template <class Visit>
  void for_units(int first, int size, int depth, Visit visit) const {
    const int together = kUnit / element_bytes_;
    const int mn_step = transposed_ ? together : 1, k_step = transposed_ ? 1 : together;
    for (int mn = first; mn < first + size; mn += mn_step) {
      for (int k = 0; k < depth; k += k_step) visit(unit(mn, k), mn - first, k);
    }
  }

private:
  static uint64_t field(uint64_t bits, int shift) { return (bits >> shift & 0x3fff) << 4; }
  uint64_t start_, leading_, stride_, units_;
  int element_bytes_;
  bool transposed_;
};

}  // namespace ptxsim
