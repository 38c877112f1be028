// AVX-512. The instructions are switched on after the system headers, so that nothing shared with other files is compiled with them.
#include <initializer_list>

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define LANES 16
#define KERNELS avx512_kernels
#define PRODUCTS avx512_products
#include "fold_kernels.h"
#include "product_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
