// Attention forward for Hopper (sm_90a), by wgmma.
#include "products_wgmma.h"
//
#include "forward.h"
