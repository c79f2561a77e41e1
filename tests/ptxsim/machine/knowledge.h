// What a warp knows of other blocks: for each, the clocks of its warps that are ordered before.
//
// Only releases and acquires through global memory carry it from block to block; barriers spread it inside one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace ptxsim {

using Clocks = std::vector<uint32_t>;

inline void join(Clocks& to, const Clocks& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

struct Knowledge {
  std::map<int, Clocks> blocks;

  void join(const Knowledge& other) {
    for (const auto& [block, clocks] : other.blocks) ptxsim::join(blocks[block], clocks);
  }
};

}  // namespace ptxsim
