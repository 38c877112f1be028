// The instruction set that every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include <initializer_list>

#define LANES 4
#define KERNELS default_kernels
#define PRODUCTS default_products
#include "fold_kernels.h"
#include "product_kernels.h"
