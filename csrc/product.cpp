// Products of bfloat16 matrices that keep their float32 sums: torch.mm on a CPU rounds them to bfloat16.
//
// Tiles are multiplied by oneDNN's brgemm (AVX-512 BF16 or AMX units), which libtorch_cpu exports as at::native::cpublas::brgemm. That is
// no part of the stable ABI, so the symbol is weak: its mangled name holds the types of its arguments, and a libtorch without exactly this
// function leaves a null pointer, upon which products are made in float32 (tisdpo/ops/products.py). What remains to be done here is the
// layout: brgemm wants b as words of two items that follow each other along K, [K / 2, columns], and a row by row.
//
// Bytes: each item of a and b is read once for every group of tiles and written packed to the second-level cache.
#include "product.h"

#ifdef __x86_64__
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

// A [M, K] with rows of lda items, B packed in rows of ldb words, C [M, N] of float32; C += with add.
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* A,
                                  const uint16_t* B, float* C, bool packed) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
// Gives back what the calling thread holds of the units (AMX tiles).
__attribute__((weak)) void brgemm_release(bool packed) __asm__("_ZN2at6native7cpublas14brgemm_releaseEb");

namespace tisdpo {
namespace {

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }
inline __mmask16 first_of_16(int64_t n) { return n >= 16 ? 0xffffu : n <= 0 ? 0 : (1u << n) - 1; }

// Transposes 16 x 16 words: each round sends the first bit of the row's number to the end of the lane's, and that one's first to the row's.
inline void transpose(__m512i v[16]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  __m512i t[16];
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      t[2 * i] = _mm512_permutex2var_epi32(v[i], low, v[i + 8]);
      t[2 * i + 1] = _mm512_permutex2var_epi32(v[i], high, v[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = t[i];
  }
}

// Words of the items of rows p and q (0 without q), 16 columns of which n exist.
inline __m512i pairs(const uint16_t* p, const uint16_t* q, int64_t n) {
  __m512i lower = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of_16(n), p));
  if (!q) return lower;
  return _mm512_or_si512(lower, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of_16(n), q)), 16));
}

// Columns j..j+n and K k..k+depth of b: words [depth / 2, TILE], zeros up to whole groups of 32 along K.
void pack_b(const Matrix& b, int64_t k, int64_t depth, int64_t j, int64_t n, uint32_t* to) {
  if (b.column_stride == 1) {
    for (int64_t d = 0; d < depth || d % 32; d += 2) {
      const uint16_t* p = b.data + (k + d) * b.row_stride + j;
      for (int64_t c = 0; c < n; c += 16) {
        __m512i words = d < depth ? pairs(p + c, d + 1 < depth ? p + b.row_stride + c : nullptr, n - c) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + d / 2 * TILE + c, words);
      }
    }
    return;
  }
  for (int64_t c = 0; c < n; c += 16)
    for (int64_t d = 0; d < depth; d += 32) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        __mmask32 mask = c + i < n ? first_of_32(depth - d) : 0;
        v[i] = _mm512_maskz_loadu_epi16(mask, b.data + (j + c + i) * b.column_stride + k + d);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (d / 2 + i) * TILE + c, v[i]);
    }
}

// Rows i..i+m and K k..k+depth of a: items [m, DEPTH], zeros up to whole groups of 32 along K.
void pack_a(const Matrix& a, int64_t i, int64_t m, int64_t k, int64_t depth, uint32_t* to) {
  if (a.column_stride == 1) {
    for (int64_t r = 0; r < m; r++)
      for (int64_t d = 0; d < depth; d += 32)
        _mm512_storeu_si512(to + (r * DEPTH + d) / 2,
                            _mm512_maskz_loadu_epi16(first_of_32(depth - d), a.data + (i + r) * a.row_stride + k + d));
    return;
  }
  for (int64_t d = 0; d < depth; d += 32)
    for (int64_t r = 0; r < m; r += 16) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int w = 0; w < 16; w++) {
        int64_t e = d + 2 * w;
        const uint16_t* p = a.data + (k + e) * a.column_stride + i + r;
        v[w] = e < depth ? pairs(p, e + 1 < depth ? p + a.column_stride : nullptr, m - r) : _mm512_setzero_si512();
      }
      transpose(v);
#pragma GCC unroll 16
      for (int w = 0; w < 16; w++) _mm512_storeu_si512(to + ((r + w) * DEPTH + d) / 2, v[w]);
    }
}

// Rows top..bottom of a column tile. In blocks of TILE rows and, of what is left, of powers of two: brgemm compiles a kernel for each size.
void multiply(int64_t top, int64_t bottom, int64_t n, int64_t depth, const uint16_t* a, int64_t lda, const uint32_t* b, float* out,
              int64_t out_stride, bool add) {
  for (int64_t i = top, m = TILE; i < bottom; i += m) {
    while (m > bottom - i) m /= 2;
    brgemm(m, n, depth, lda, TILE, out_stride, add, a + (i - top) * lda, reinterpret_cast<const uint16_t*>(b), out + (i - top) * out_stride,
           true);
  }
}

int64_t whole(int64_t depth) { return (depth + 31) / 32 * 32; }

}  // namespace

bool multiplies_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && brgemm && brgemm_release;
}

void multiply_columns(const Product& p, int64_t first, int64_t last, int64_t top, int64_t bottom, uint32_t* scratch) {
  uint32_t* odd = scratch + WORDS;
  for (int64_t k = 0; k < p.K; k += DEPTH) {
    int64_t depth = at_most(DEPTH, p.K - k);
    for (int64_t tile = first; tile < last; tile++) {
      int64_t j = tile * TILE, n = at_most(TILE, p.N - j);
      pack_b(p.b, k, depth, j, n, scratch);
      bool add = p.add || k > 0;
      if (depth % 2 == 0) {
        multiply(top, bottom, n, depth, p.a.data + top * p.a.row_stride + k, p.a.row_stride, scratch, p.out + top * p.out_stride + j,
                 p.out_stride, add);
        continue;
      }
      for (int64_t i = top; i < bottom; i += TILE) {  // no word may begin with the last item of a row
        int64_t end = at_most(i + TILE, bottom);
        pack_a(p.a, i, end - i, k, depth, odd);
        multiply(i, end, n, depth + 1, reinterpret_cast<uint16_t*>(odd), DEPTH, scratch, p.out + i * p.out_stride + j, p.out_stride, add);
      }
    }
  }
  brgemm_release(true);
}

void pack_columns(const Product& p, int64_t first, int64_t last, uint32_t* packed) {
  for (int64_t tile = first; tile < last; tile++)
    for (int64_t k = 0; k < p.K; k += DEPTH)
      pack_b(p.b, k, at_most(DEPTH, p.K - k), tile * TILE, at_most(TILE, p.N - tile * TILE),
             packed + (tile * depths(p.K) + k / DEPTH) * WORDS);
}

void multiply_rows(const Product& p, int64_t first, int64_t last, const uint32_t* packed, uint32_t* scratch) {
  for (int64_t row_tile = first; row_tile < last; row_tile++) {
    int64_t i = row_tile * TILE, end = at_most(i + TILE, p.M);
    for (int64_t k = 0; k < p.K; k += DEPTH) pack_a(p.a, i, end - i, k, at_most(DEPTH, p.K - k), scratch + k / DEPTH * WORDS);
    for (int64_t tile = 0; tile < tiles(p.N); tile++)
      for (int64_t k = 0; k < p.K; k += DEPTH)
        multiply(i, end, at_most(TILE, p.N - tile * TILE), whole(at_most(DEPTH, p.K - k)),
                 reinterpret_cast<uint16_t*>(scratch + k / DEPTH * WORDS), DEPTH, packed + (tile * depths(p.K) + k / DEPTH) * WORDS,
                 p.out + i * p.out_stride + tile * TILE, p.out_stride, p.add || k > 0);
  }
  brgemm_release(true);
}

}  // namespace tisdpo

#ifdef __clang__
#pragma clang attribute pop
#endif
#else

namespace tisdpo {

bool multiplies_bf16() { return false; }
void multiply_columns(const Product&, int64_t, int64_t, int64_t, int64_t, uint32_t*) {}
void pack_columns(const Product&, int64_t, int64_t, uint32_t*) {}
void multiply_rows(const Product&, int64_t, int64_t, const uint32_t*, uint32_t*) {}

}  // namespace tisdpo
#endif
