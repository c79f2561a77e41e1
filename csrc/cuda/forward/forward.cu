// Attention forward for sm_80 and later, by mma.sync.
//
// With two groups of 16 rows a warp, fragments of K and V are read half as often, and shared memory keeps well under
// the tensor cores' time; with one it would bind.
#include "forward/products_mma.h"
//
#include "forward/forward.h"
