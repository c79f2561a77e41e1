// Tensor maps: what cp.async.bulk.tensor knows of a tensor in global memory and of its tiles in shared memory.
//
// The hardware's format is not published and only a driver makes it, so the machine has its own, made by
// tests/ptxsim/tensor_map.py. It has the same size and holds the address as a plain 64-bit word.
#pragma once

#include <array>
#include <cstdint>

namespace ptxsim {

inline constexpr int kMapBytes = 128;
inline constexpr int kMapDimensions = 5;

struct TensorMap {
  static constexpr uint64_t kMagic = 0x70616d726f736e74;  // "tnsormap"
  uint64_t magic;
  uint64_t address;
  uint32_t dimensions;
  uint32_t element_bytes;
  uint32_t swizzle_bytes;  // 0, 32, 64 or 128
  uint32_t nan_fill;       // of what lies outside: NaN instead of zero
  std::array<uint32_t, kMapDimensions> sizes;
  std::array<uint32_t, kMapDimensions> box;
  std::array<uint64_t, kMapDimensions - 1> strides;  // bytes; the first dimension is contiguous
  std::array<uint8_t, 24> unused;

  uint32_t box_bytes() const {
    uint32_t bytes = element_bytes;
    for (uint32_t d = 0; d < dimensions; ++d) bytes *= box[d];
    return bytes;
  }
  // Where byte `offset` of the box lies in shared memory: units of 16 bytes are exchanged by address bits 7 and up.
  uint64_t shared_address(uint64_t start, uint64_t offset) const {
    const uint64_t address = start + offset;
    const uint64_t units = swizzle_bytes ? swizzle_bytes / 16 : 1;
    return address ^ ((address >> 7 & (units - 1)) << 4);
  }
  // Calls visit(offset in the box, global address, first, last) for each 16 bytes, of which [first, last) are inside
  // the tensor.
  template <class Visit>
  void for_pieces(const std::array<int64_t, kMapDimensions>& corner, Visit visit) const {
    const uint32_t row_bytes = box[0] * element_bytes, bytes = box_bytes();
    for (uint32_t offset = 0; offset < bytes; offset += 16) {
      uint32_t row = offset / row_bytes;
      int64_t global = 0;
      bool inside = true;
      for (uint32_t d = 1; d < dimensions; ++d) {
        const int64_t at = corner[d] + row % box[d];
        row /= box[d];
        inside &= at >= 0 && at < sizes[d];
        global += at * static_cast<int64_t>(strides[d - 1]);
      }
      const int64_t start = corner[0] * element_bytes + offset % row_bytes;
      const int64_t end = static_cast<int64_t>(sizes[0]) * element_bytes;
      const auto clamp = [&](int64_t at) { return static_cast<int>(at < 0 ? 0 : at > 16 ? 16 : at); };
      const int first = clamp(-start), last = inside ? clamp(end - start) : 0;
      visit(offset, address + static_cast<uint64_t>(global + start), inside ? first : 0, first < last ? last : 0);
    }
  }
};
static_assert(sizeof(TensorMap) == kMapBytes, "a tensor map has the size of the driver's");

}  // namespace ptxsim
