// The named barriers of a block (bar.sync, bar.arrive) and the order that they give to memory accesses.
#pragma once

#include <map>
#include <vector>

#include "warp.h"

namespace ptxsim {

class Barriers {
public:
  void reset() { barriers_.clear(); }
  // Counts the warp in and, for a sync, puts it to wait.
  void arrive(Warp& warp, const Instruction& in);
  // Lets the warps of every complete barrier go on; false if there was none.
  bool release(std::vector<Warp>& warps);

private:
  struct Barrier {
    int arrived = 0;              // warps
    int needed = 0;               // warps; 0: all that live
    std::vector<uint32_t> clock;  // the arrivals' clocks, joined
    Knowledge seen;
    std::vector<int> waiting;
  };
  std::map<int, Barrier> barriers_;
};

}  // namespace ptxsim
