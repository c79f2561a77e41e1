// Attention forward for sm_90a, by wgmma.
#include "forward/products_sm90.h"
//
#include "forward/forward.h"
