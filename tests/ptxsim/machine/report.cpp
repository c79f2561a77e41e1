// The names under which findings reach Python.
#include "report.h"

namespace ptxsim {

const char* name_of(Finding finding) {
  static const char* const names[kFindings] = {
      "shared_race",   "intra_warp_race", "in_flight",         "uninitialised_shared", "proxy_fence",
      "wgmma_pending", "wgmma_fence",     "global_race",       "tensor_race",          "tensor_in_flight",
      "tensor_wait",   "tensor_fence",    "tensor_allocation", "uninitialised_tensor",
  };
  return names[static_cast<int>(finding)];
}

}  // namespace ptxsim
