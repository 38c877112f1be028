// AVX2 and FMA. The instructions are switched on after the system headers, so that nothing shared with other files is compiled with them.
#include <initializer_list>

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LANES 8
#define KERNELS avx2_kernels
#define PRODUCTS avx2_products
#include "fold_kernels.h"
#include "product_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
