// Shared memory has 32 banks of 4 bytes and moves at most 128 bytes a wavefront; global memory moves 32-byte sectors.
#include "traffic.h"

#include <algorithm>

namespace ptxsim {

void count_bank_conflicts(Report& report, const Instruction& in, const uint64_t* addresses, LaneMask mask, int bytes) {
  // Wide accesses go in parts of a warp: halves for 8 bytes a lane, quarters for 16.
  const int lanes_per_part = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  uint64_t wavefronts = 0, ideal = 0;
  for (int first = 0; first < kLanes; first += lanes_per_part) {
    uint32_t words_in_bank[32] = {};
    uint64_t seen[32][32];
    uint32_t words = 0;
    for (int lane = first; lane < first + lanes_per_part; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int byte = 0; byte < std::max(bytes, 4); byte += 4) {
        const uint64_t word = (addresses[lane] + static_cast<uint64_t>(byte)) / 4;
        const auto bank = static_cast<size_t>(word % 32);
        uint64_t* in_bank = seen[bank];
        // Lanes that read the same word share it.
        if (std::find(in_bank, in_bank + words_in_bank[bank], word) != in_bank + words_in_bank[bank]) continue;
        in_bank[words_in_bank[bank]++] = word;
        ++words;
      }
    }
    wavefronts += *std::max_element(words_in_bank, words_in_bank + 32);
    ideal += (words + 31) / 32;
  }
  report.shared_wavefronts += wavefronts;
  report.shared_ideal_wavefronts += ideal;
  ++report.shared_requests;
  Report::Conflict& conflict = report.conflicts[static_cast<size_t>(in.index)];
  ++conflict.requests;
  conflict.wavefronts += wavefronts;
  conflict.ideal += ideal;
}

void count_sectors(Report& report, const uint64_t* addresses, LaneMask mask, int bytes) {
  uint64_t sectors[96];
  int count = 0, lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    ++lanes;
    const uint64_t last = (addresses[lane] + static_cast<uint64_t>(bytes) - 1) / 32;
    for (uint64_t sector = addresses[lane] / 32; sector <= last; ++sector) {
      // Neighbouring lanes share sectors, so the search from the end is short.
      int i = count - 1;
      while (i >= 0 && sectors[i] != sector) --i;
      if (i < 0) sectors[count++] = sector;
    }
  }
  report.global_sectors += static_cast<uint64_t>(count);
  report.global_ideal_sectors += static_cast<uint64_t>((lanes * bytes + 31) / 32);
  ++report.global_requests;
}

}  // namespace ptxsim
