// Products of bfloat16 matrices by the units that CPUs have for it, with float32 sums: torch.mm on a CPU rounds them to bfloat16.
//
// b is packed as words of two items that follow each other along K, [K / 2, columns], a tile at a time; a is read row by row, and the sums
// of a few rows stay in registers (AVX-512 BF16). On CPUs with AMX the tiles are multiplied by oneDNN's brgemm, which wants the same layout
// and which libtorch_cpu exports as at::native::cpublas::brgemm. That is no part of the stable ABI, so the symbol is weak: its mangled name
// holds the types of its arguments, and a libtorch without exactly this function leaves a null pointer.
//
// Intel's AVX-512 BF16 does a quarter as many instructions in a cycle as multiply-adds, half as much work: its CPUs without AMX widen
// (product_kernels.h).
//
// Bytes: each item of a and b is read once for every group of tiles and written packed to the second-level cache; the next tile of b
// is fetched meanwhile. Floor: the CPU's products of pairs; on two cores that do 1000 to 1045 GFLOP/s from registers, 920 to 950 were
// measured, without the fetching 820 (benchmarks/NOTES.md).
#include "product.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif

// A [M, K] with rows of lda items, B packed in rows of ldb words, C [M, N] of float32; C += with add.
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* A,
                                  const uint16_t* B, float* C, bool packed) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
// Gives back what the calling thread holds of the units (AMX tiles).
__attribute__((weak)) void brgemm_release(bool packed) __asm__("_ZN2at6native7cpublas14brgemm_releaseEb");

namespace tisdpo {
namespace {

constexpr int64_t TILE = 64;    // rows and columns of out that are multiplied at a time
constexpr int64_t DEPTH = 1024;  // of the contraction, likewise
constexpr int64_t WORDS = TILE * DEPTH / 2;  // of 32 bits in a packed tile: two items that follow each other along K

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// A matrix of bfloat16, as bits.
struct Items {
  const uint16_t* data;
  int64_t row_stride, column_stride;

  Items(const uint16_t* data, int64_t row_stride, int64_t column_stride)
      : data(data), row_stride(row_stride), column_stride(column_stride) {}
  Items(const Matrix& m) : Items(reinterpret_cast<const uint16_t*>(m.data), m.row_stride, m.column_stride) {}
};

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

// Words of the items of two rows that are `stride` apart, of which `rows` and n columns exist: of the first 16 columns and of the next.
inline void interleave(const uint16_t* items, int64_t stride, int64_t rows, int64_t n, __m512i& first, __m512i& second) {
  const __mmask32 columns = first_of_32(n);
  __m512i lower = _mm512_maskz_loadu_epi16(rows > 0 ? columns : 0, items);
  __m512i upper = _mm512_maskz_loadu_epi16(rows > 1 ? columns : 0, items + stride);
  // By turns in each quarter of a vector; then the quarters in their order.
  __m512i left = _mm512_unpacklo_epi16(lower, upper), right = _mm512_unpackhi_epi16(lower, upper);
  first = _mm512_permutex2var_epi64(left, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right);
  second = _mm512_permutex2var_epi64(left, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), right);
}

// Columns j..j+n and K k..k+depth of b: words [depth / 2, TILE], zeros up to whole groups of 32 along K.
void pack_b(const Items& b, int64_t k, int64_t depth, int64_t j, int64_t n, uint32_t* to) {
  if (b.column_stride == 1) {
    for (int64_t d = 0; d < depth || d % 32; d += 2)
      for (int64_t c = 0; c < n; c += 32) {
        __m512i first, second;
        interleave(b.data + (k + d) * b.row_stride + j + c, b.row_stride, depth - d, n - c, first, second);
        _mm512_storeu_si512(to + d / 2 * TILE + c, first);
        _mm512_storeu_si512(to + d / 2 * TILE + c + 16, second);
      }
    return;
  }
  for (int64_t c = 0; c < n; c += 16) {
    const uint16_t* columns[16];  // of those beyond n nothing is asked, so they may be copies of the last
    for (int i = 0; i < 16; i++) columns[i] = b.data + (j + at_most(c + i, n - 1)) * b.column_stride + k;
    for (int64_t d = 0; d < depth; d += 32) {
      const __mmask32 items = first_of_32(depth - d);
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) v[i] = _mm512_maskz_loadu_epi16(items, columns[i] + d);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (d / 2 + i) * TILE + c, v[i]);
    }
  }
}

// Rows i..i+m and K k..k+depth of a: items [m, DEPTH], zeros up to whole groups of 32 along K.
void pack_a(const Items& a, int64_t top, int64_t m, int64_t k, int64_t depth, uint32_t* to) {
  if (a.column_stride == 1) {
    for (int64_t r = 0; r < m; r++)
      for (int64_t d = 0; d < depth; d += 32)
        _mm512_storeu_si512(to + (r * DEPTH + d) / 2,
                            _mm512_maskz_loadu_epi16(first_of_32(depth - d), a.data + (top + r) * a.row_stride + k + d));
    return;
  }
  for (int64_t d = 0; d < depth; d += 32)
    for (int64_t r = 0; r < m; r += 32) {
      __m512i v[16], w[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        interleave(a.data + (k + d + 2 * i) * a.column_stride + top + r, a.column_stride, depth - d - 2 * i, m - r, v[i], w[i]);
      transpose(v);
      transpose(w);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        _mm512_storeu_si512(to + ((r + i) * DEPTH + d) / 2, v[i]);
        _mm512_storeu_si512(to + ((r + 16 + i) * DEPTH + d) / 2, w[i]);
      }
    }
}

// The cache lines of a tile that is packed next, to be fetched one by one while this one is multiplied.
class Ahead {
 public:
  Ahead() = default;
  // Rows of so many items in memory, not of the matrix.
  Ahead(const uint16_t* items, int64_t rows, int64_t columns, int64_t stride)
      : line_(reinterpret_cast<const char*>(items)),
        lines_((2 * columns + 63) / 64),
        left_(lines_),
        rows_(rows),
        skip_(2 * stride - 64 * lines_) {}
  void fetch() {
    if (rows_ == 0) return;
    _mm_prefetch(line_, _MM_HINT_T0);
    line_ += 64;
    if (--left_ > 0) return;
    left_ = lines_, line_ += skip_, rows_--;
  }

 private:
  const char* line_ = nullptr;
  int64_t lines_ = 0, left_ = 0, rows_ = 0, skip_ = 0;
};

Ahead tile_of_b(const Items& b, int64_t k, int64_t depth, int64_t j, int64_t n) {
  if (b.column_stride == 1) return {b.data + k * b.row_stride + j, depth, n, b.row_stride};
  return {b.data + j * b.column_stride + k, n, depth, b.column_stride};
}

// Two items as a word, in all lanes.
inline __m512bh broadcast(const uint16_t* items) {
  int32_t word;
  std::memcpy(&word, items, sizeof word);
  return (__m512bh)_mm512_set1_epi32(word);
}

// The columns n of ROWS rows. Six rows of a tile are 24 sums, beside which four vectors of b and a word of a have a register each.
template <int ROWS>
inline void multiply_rows_of_tile(int64_t n, int64_t depth, const uint16_t* a, int64_t lda, const uint32_t* b, float* out,
                                  int64_t out_stride, bool add, Ahead& ahead) {
  constexpr int VECTORS = TILE / 16;
  const __mmask16 exists[VECTORS] = {first_of_16(n), first_of_16(n - 16), first_of_16(n - 32), first_of_16(n - 48)};
  __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
      sums[r][v] = add ? _mm512_maskz_loadu_ps(exists[v], out + r * out_stride + 16 * v) : _mm512_setzero_ps();
  for (int64_t d = 0; d < depth;) {
    ahead.fetch();
    for (int64_t stop = at_most(d + 16, depth); d < stop; d += 2, b += TILE) {
      __m512bh words[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) words[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
        __m512bh word = broadcast(a + r * lda + d);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], word, words[v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) _mm512_mask_storeu_ps(out + r * out_stride + 16 * v, exists[v], sums[r][v]);
}

// Rows top..bottom of a column tile.
template <bool BRGEMM>
void multiply(const Product& p, int64_t top, int64_t bottom, int64_t n, int64_t depth, const uint16_t* a, int64_t lda, const uint32_t* b,
              float* out, bool add, Ahead& ahead) {
  if (BRGEMM) {  // in blocks of TILE rows and, of what is left, of powers of two: it compiles a kernel for each size
    for (int64_t i = top, m = TILE; i < bottom; i += m) {
      while (m > bottom - i) m /= 2;
      brgemm(m, n, depth, lda, TILE, p.out_stride, add, a + (i - top) * lda, reinterpret_cast<const uint16_t*>(b),
             out + (i - top) * p.out_stride, true);
    }
    return;
  }
  constexpr decltype(&multiply_rows_of_tile<1>) of_rows[] = {multiply_rows_of_tile<1>, multiply_rows_of_tile<2>, multiply_rows_of_tile<3>,
                                                             multiply_rows_of_tile<4>, multiply_rows_of_tile<5>, multiply_rows_of_tile<6>};
  for (int64_t i = top; i < bottom; i += 6, a += 6 * lda, out += 6 * p.out_stride)
    of_rows[at_most(6, bottom - i) - 1](n, depth, a, lda, b, out, p.out_stride, add, ahead);
}

int64_t whole(int64_t depth) { return (depth + 31) / 32 * 32; }

template <bool BRGEMM>
void multiply_columns(const Product& p, int64_t first, int64_t last, int64_t top, int64_t bottom, char* scratch) {
  uint32_t *words = reinterpret_cast<uint32_t*>(scratch), *odd = words + WORDS;
  const Items a = p.a, b = p.b;
  for (int64_t k = 0; k < p.K; k += DEPTH) {
    int64_t depth = at_most(DEPTH, p.K - k);
    for (int64_t tile = first; tile < last; tile++) {
      int64_t j = tile * TILE, n = at_most(TILE, p.N - j);
      pack_b(b, k, depth, j, n, words);
      bool add = p.add || k > 0;
      int64_t next_k = k, next_j = j + TILE;
      if (tile + 1 == last) {
        if (k + DEPTH < p.K) next_k = k + DEPTH, next_j = first * TILE;
        else next_k = 0;
      }
      Ahead ahead;
      if (next_j < p.N) ahead = tile_of_b(b, next_k, at_most(DEPTH, p.K - next_k), next_j, at_most(TILE, p.N - next_j));
      if (depth % 2 == 0) {
        multiply<BRGEMM>(p, top, bottom, n, depth, a.data + top * a.row_stride + k, a.row_stride, words,
                         p.out + top * p.out_stride + j, add, ahead);
        continue;
      }
      for (int64_t i = top; i < bottom; i += TILE) {  // no word may begin with the last item of a row
        int64_t end = at_most(i + TILE, bottom);
        pack_a(a, i, end - i, k, depth, odd);
        multiply<BRGEMM>(p, i, end, n, depth + 1, reinterpret_cast<uint16_t*>(odd), DEPTH, words, p.out + i * p.out_stride + j, add,
                         ahead);
      }
    }
  }
  if (BRGEMM) brgemm_release(true);
}

void pack_columns(const Product& p, int64_t first, int64_t last, char* packed) {
  uint32_t* words = reinterpret_cast<uint32_t*>(packed);
  for (int64_t tile = first; tile < last; tile++)
    for (int64_t k = 0; k < p.K; k += DEPTH)
      pack_b(p.b, k, at_most(DEPTH, p.K - k), tile * TILE, at_most(TILE, p.N - tile * TILE),
             words + (tile * parts(p.K, DEPTH) + k / DEPTH) * WORDS);
}

template <bool BRGEMM>
void multiply_rows(const Product& p, int64_t top, int64_t bottom, const char* packed, char* scratch) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(packed);
  uint32_t* rows = reinterpret_cast<uint32_t*>(scratch);
  const Items a = p.a;
  for (int64_t i = top; i < bottom; i += TILE) {
    int64_t end = at_most(i + TILE, bottom);
    for (int64_t k = 0; k < p.K; k += DEPTH) pack_a(a, i, end - i, k, at_most(DEPTH, p.K - k), rows + k / DEPTH * WORDS);
    Ahead ahead;
    if (end < bottom) ahead = tile_of_b({a.data, a.column_stride, 1}, 0, at_most(DEPTH, p.K), end, at_most(TILE, bottom - end));
    for (int64_t tile = 0; tile < parts(p.N, TILE); tile++)
      for (int64_t k = 0; k < p.K; k += DEPTH)
        multiply<BRGEMM>(p, i, end, at_most(TILE, p.N - tile * TILE), whole(at_most(DEPTH, p.K - k)),
                         reinterpret_cast<uint16_t*>(rows + k / DEPTH * WORDS), DEPTH,
                         words + (tile * parts(p.K, DEPTH) + k / DEPTH) * WORDS, p.out + i * p.out_stride + tile * TILE,
                         p.add || k > 0, ahead);
  }
  if (BRGEMM) brgemm_release(true);
}

}  // namespace

bool multiplies_bf16() { return __builtin_cpu_supports("avx512bf16"); }

bool has_amx_bf16() {  // not by __builtin_cpu_supports, where older compilers refuse the name
  unsigned a, b, c, d;
  static const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22));
  return has;
}

bool has_brgemm() { return brgemm && brgemm_release; }

extern const ProductKernels bf16_products{TILE, TILE, TILE, DEPTH, 0, 4 * WORDS, 2 * DEPTH, multiply_columns<false>, pack_columns,
                                          multiply_rows<false>};
extern const ProductKernels brgemm_products{TILE, TILE, TILE, DEPTH, 0, 4 * WORDS, 2 * DEPTH, multiply_columns<true>, pack_columns,
                                            multiply_rows<true>};

}  // namespace tisdpo

#ifdef __clang__
#pragma clang attribute pop
#endif
#else

namespace tisdpo {

bool multiplies_bf16() { return false; }
bool has_amx_bf16() { return false; }
bool has_brgemm() { return false; }
extern const ProductKernels bf16_products{}, brgemm_products{};

}  // namespace tisdpo
#endif
