// Matrix products of items of any type with float32 sums, for vectors of LANES floats. Included once by each kernels_*.cpp.
//
// Both operands are widened to float32 as they are packed, a part of the contraction at a time: b in panels of a few vectors,
// [DEPTH, WIDTH], which stay in the first-level cache (of sixteen lanes in the second) while a block of rows passes by; a in groups of
// HEIGHT rows. The sums of HEIGHT rows and WIDTH columns are in registers. What is packed next is fetched meanwhile. (The blocks are those
// of Goto and van de Geijn, 10.1145/1356052.1356053.)
//
// Bytes: each item of b is read and packed once for every share of rows, each of a once for every group of column tiles, out is read and
// written for every DEPTH of the contraction. Floor: the CPU's multiply-adds, two vectors in a cycle and core; with AVX2 on two cores of a
// Zen 3, 195 GFLOP/s from registers, 127 to 161 were measured, MKL 102 to 148; with AVX-512 on two of an Emerald Rapids, 350, of bfloat16
// 270 to 285, torch 160, of float32 250 to 290, MKL 220 to 310 (benchmarks/NOTES.md).
#include "product.h"
#include "vectors.h"

namespace tisdpo {
namespace {

#if LANES == 16 || defined(__aarch64__)
constexpr int64_t HEIGHT = 6, VECTORS = 4;  // 24 sums of 32 registers
#else
constexpr int64_t HEIGHT = 6, VECTORS = 2;  // 12 of 16
#endif
constexpr int64_t WIDTH = VECTORS * LANES;
constexpr int64_t ROWS = 96, COLUMNS = 64;  // of a tile: whole groups and panels
constexpr int64_t LINES = 8;                // fetched for later with each group of sums
constexpr int64_t BLOCK_ROWS = 288;         // of a, packed at a time: 288 KB, for the second-level cache
constexpr int64_t DEPTH = 256;              // a panel is 16 KB, with sixteen lanes 64, from the second-level cache
static_assert(ROWS % HEIGHT == 0 && ROWS % LANES == 0 && BLOCK_ROWS % HEIGHT == 0 && COLUMNS % WIDTH == 0 && DEPTH % LANES == 0, "whole");

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <Type T>
INLINE Float widened(const char* p) {
  if (T == Type::float32) return load<Float>(p);
  return T == Type::bfloat16 ? from_bfloat16(load<Half>(p)) : from_float16(load<Half>(p));
}

// n <= LANES items, and zeros.
template <Type T>
INLINE Float first_of(const char* p, int64_t n) {
  char items[4 * LANES] = {};
  __builtin_memcpy(items, p, n * bytes(T));
  return widened<T>(items);
}

// Transposes LANES x LANES floats: each round sends the first bit of the row's number to the end of the lane's, and that one's first to
// the row's.
INLINE void transpose(Float v[LANES]) {
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bits){__VA_ARGS__})
#endif
#if LANES == 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
  Float t[LANES];
#pragma GCC unroll 4
  for (int bit = 1; bit < LANES; bit *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      t[2 * i] = SHUFFLE(v[i], v[i + LANES / 2], LOW);
      t[2 * i + 1] = SHUFFLE(v[i], v[i + LANES / 2], HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) v[i] = t[i];
  }
#undef LOW
#undef HIGH
#undef SHUFFLE
}

// Columns j..j+n and K k..k+depth of b: panels [DEPTH, WIDTH]. Behind the last column, whose sums nobody reads, stand zeros or that column.
template <Type T>
void pack_b(const Matrix& b, int64_t k, int64_t depth, int64_t j, int64_t n, float* to) {
  int64_t whole = parts(n, WIDTH) * WIDTH;
  if (b.column_stride == 1) {
    for (int64_t d = 0; d < depth; d++)
      for (int64_t c = 0; c < whole; c += LANES) {
        const char* from = b.at(k + d, j + c);
        Float v = c + LANES <= n ? widened<T>(from) : c < n ? first_of<T>(from, n - c) : Float{};
        store(to + c / WIDTH * WIDTH * DEPTH + d * WIDTH + c % WIDTH, v);
      }
    return;
  }
  for (int64_t c = 0; c < whole; c += LANES) {
    float* panel = to + c / WIDTH * WIDTH * DEPTH + c % WIDTH;
    const char* columns[LANES];
    for (int64_t i = 0; i < LANES; i++) columns[i] = b.at(k, j + at_most(c + i, n - 1));
    for (int64_t d = 0; d < depth; d += LANES) {
      Float v[LANES];
      if (d + LANES <= depth) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < LANES; i++) v[i] = widened<T>(columns[i] + d * bytes(T));
      } else {
        for (int64_t i = 0; i < LANES; i++) v[i] = first_of<T>(columns[i] + d * bytes(T), depth - d);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; i++) store(panel + (d + i) * WIDTH, v[i]);
    }
  }
}

// Rows i..i+m and K k..k+depth of a, [m, DEPTH], zeros up to whole groups of HEIGHT.
template <Type T>
void pack_rows(const Matrix& a, int64_t i, int64_t m, int64_t k, int64_t depth, float* to) {
  for (int64_t r = 0; r < m; r++)
    for (int64_t d = 0; d < depth; d += LANES) {
      const char* from = a.at(i + r, k + d);
      store(to + r * DEPTH + d, d + LANES <= depth ? widened<T>(from) : first_of<T>(from, depth - d));
    }
  for (int64_t r = m; r % HEIGHT; r++) __builtin_memset(to + r * DEPTH, 0, sizeof(float) * DEPTH);
}

// The same of a transposed a: groups [DEPTH, HEIGHT]. A few of K at a time, so that what is written stays in the cache.
template <Type T>
void pack_transposed(const Matrix& a, int64_t i, int64_t m, int64_t k, int64_t depth, float* to) {
  float line[ROWS + LANES];
  for (int64_t begin = 0; begin < depth; begin += 16)
    for (int64_t d = begin; d < at_most(begin + 16, depth); d++) {
      const char* from = a.at(i, k + d);
      for (int64_t r = 0; r < m; r += LANES)
        store(line + r, r + LANES <= m ? widened<T>(from + r * bytes(T)) : first_of<T>(from + r * bytes(T), m - r));
      for (int64_t r = m + (LANES - m % LANES) % LANES; r % HEIGHT; r++) line[r] = 0;
      for (int64_t r = 0; r < m; r += HEIGHT) __builtin_memcpy(to + r * DEPTH + d * HEIGHT, line + r, sizeof(float) * HEIGHT);
    }
}

// The cache lines of what is packed next, to be fetched a few at a time while something else is multiplied: its rows are far apart in
// memory, and no hardware prefetcher follows.
class Ahead {
 public:
  Ahead() = default;
  // Rows i..i+m and columns j..j+n of a matrix.
  INLINE Ahead(const Matrix& x, int64_t i, int64_t m, int64_t j, int64_t n) : line_(x.at(i, j)) {
    bool by_rows = x.column_stride == 1;
    lines_ = left_ = parts((by_rows ? n : m) * bytes(x.type), 64);
    rows_ = by_rows ? m : n;
    skip_ = (by_rows ? x.row_stride : x.column_stride) * bytes(x.type) - 64 * lines_;
  }
  INLINE void fetch() {
    for (int64_t count = 0; count < LINES && rows_ > 0; count++) {
      __builtin_prefetch(line_, 0, 2);  // to the second-level cache
      line_ += 64;
      if (--left_ > 0) continue;
      left_ = lines_, line_ += skip_, rows_--;
    }
  }

 private:
  const char* line_ = nullptr;
  int64_t lines_ = 0, left_ = 0, rows_ = 0, skip_ = 0;
};

// The sums over `depth` of HEIGHT rows and a panel, to the `rows` and n columns of out that exist.
template <bool TRANSPOSED>
void multiply_group(int64_t depth, const float* a, const float* b, float* out, int64_t stride, int64_t rows, int64_t n, bool add,
                    Ahead& next_b, Ahead& next_a) {
#pragma GCC unroll 12
  for (int64_t r = 0; r < HEIGHT; r++)
    if (r < rows) __builtin_prefetch(out + r * stride, 1);
  Float sums[HEIGHT][VECTORS] = {};
  next_b.fetch();
  next_a.fetch();
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; d++) {
    Float column[VECTORS];
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; v++) column[v] = load<Float>(b + d * WIDTH + v * LANES);
#pragma GCC unroll 12
    for (int64_t r = 0; r < HEIGHT; r++) {
      Float x = every(TRANSPOSED ? a[d * HEIGHT + r] : a[r * DEPTH + d]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < VECTORS; v++) sums[r][v] += x * column[v];
    }
  }
  if (rows >= HEIGHT && n >= WIDTH) {
#pragma GCC unroll 12
    for (int64_t r = 0; r < HEIGHT; r++)
#pragma GCC unroll 4
      for (int64_t v = 0; v < VECTORS; v++) {
        float* to = out + r * stride + v * LANES;
        store(to, add ? load<Float>(to) + sums[r][v] : sums[r][v]);
      }
    return;
  }
  float all[HEIGHT][WIDTH];
#pragma GCC unroll 12
  for (int64_t r = 0; r < HEIGHT; r++)
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; v++) store(&all[r][v * LANES], sums[r][v]);
  for (int64_t r = 0; r < at_most(rows, HEIGHT); r++)
    for (int64_t c = 0; c < at_most(n, WIDTH); c++) out[r * stride + c] = add ? out[r * stride + c] + all[r][c] : all[r][c];
}

template <bool TRANSPOSED>
void multiply_tile(int64_t depth, const float* a, const float* b, float* out, int64_t stride, int64_t rows, int64_t n, bool add,
                   Ahead& next_b, Ahead& next_a) {
  for (int64_t c = 0; c < n; c += WIDTH)
    for (int64_t r = 0; r < rows; r += HEIGHT)
      multiply_group<TRANSPOSED>(depth, a + r * DEPTH, b + c * DEPTH, out + r * stride + c, stride, rows - r, n - c, add, next_b,
                                 next_a);
}

// Calls one of the three: the type is a constant within.
#define OF_TYPE(type, function, ...)                                                   \
  (type == Type::float32 ? function<Type::float32>(__VA_ARGS__)                        \
                         : type == Type::bfloat16 ? function<Type::bfloat16>(__VA_ARGS__) : function<Type::float16>(__VA_ARGS__))

void multiply_columns(const Product& p, int64_t first, int64_t last, int64_t top, int64_t bottom, char* scratch) {
  float *b = reinterpret_cast<float*>(scratch), *a = b + (last - first) * COLUMNS * DEPTH;
  int64_t begin = first * COLUMNS, end = at_most(last * COLUMNS, p.N);
  for (int64_t k = 0; k < p.K; k += DEPTH) {
    int64_t depth = at_most(DEPTH, p.K - k), next_k = k + DEPTH;
    for (int64_t j = begin; j < end; j += COLUMNS)
      OF_TYPE(p.b.type, pack_b, p.b, k, depth, j, at_most(COLUMNS, p.N - j), b + (j - begin) * DEPTH);
    Ahead next_b;
    if (next_k < p.K) next_b = Ahead(p.b, next_k, at_most(DEPTH, p.K - next_k), begin, end - begin);
    else if (end < p.N) next_b = Ahead(p.b, 0, at_most(DEPTH, p.K), end, at_most(end - begin, p.N - end));
    for (int64_t i = top; i < bottom; i += BLOCK_ROWS) {
      int64_t m = at_most(BLOCK_ROWS, bottom - i), next = i + BLOCK_ROWS;
      OF_TYPE(p.a.type, pack_rows, p.a, i, m, k, depth, a);
      Ahead next_a;
      if (next < bottom) next_a = Ahead(p.a, next, at_most(BLOCK_ROWS, bottom - next), k, depth);
      else if (next_k < p.K) next_a = Ahead(p.a, top, at_most(BLOCK_ROWS, bottom - top), next_k, at_most(DEPTH, p.K - next_k));
      for (int64_t j = begin; j < end; j += COLUMNS)
        multiply_tile<false>(depth, a, b + (j - begin) * DEPTH, p.out + i * p.out_stride + j, p.out_stride, m,
                             at_most(COLUMNS, p.N - j), p.add || k > 0, next_b, next_a);
    }
  }
}

void pack_columns(const Product& p, int64_t first, int64_t last, char* packed) {
  for (int64_t tile = first; tile < last; tile++)
    for (int64_t k = 0; k < p.K; k += DEPTH) {
      float* to = reinterpret_cast<float*>(packed) + (tile * parts(p.K, DEPTH) + k / DEPTH) * COLUMNS * DEPTH;
      OF_TYPE(p.b.type, pack_b, p.b, k, at_most(DEPTH, p.K - k), tile * COLUMNS, at_most(COLUMNS, p.N - tile * COLUMNS), to);
    }
}

void multiply_rows(const Product& p, int64_t top, int64_t bottom, const char* packed, char* scratch) {
  float* a = reinterpret_cast<float*>(scratch);
  Ahead nothing;
  for (int64_t i = top; i < bottom; i += ROWS) {
    int64_t m = at_most(ROWS, bottom - i), next = i + ROWS;
    for (int64_t k = 0; k < p.K; k += DEPTH) OF_TYPE(p.a.type, pack_transposed, p.a, i, m, k, at_most(DEPTH, p.K - k), a + k * ROWS);
    Ahead next_a;
    if (next < bottom) next_a = Ahead(p.a, next, at_most(ROWS, bottom - next), 0, p.K);
    const float* b = reinterpret_cast<const float*>(packed);
    for (int64_t j = 0; j < p.N; j += COLUMNS)
      for (int64_t k = 0; k < p.K; k += DEPTH, b += COLUMNS * DEPTH)
        multiply_tile<true>(at_most(DEPTH, p.K - k), a + k * ROWS, b, p.out + i * p.out_stride + j, p.out_stride, m,
                            at_most(COLUMNS, p.N - j), p.add || k > 0, nothing, next_a);
  }
}

#undef OF_TYPE

}  // namespace

extern const ProductKernels PRODUCTS{
    ROWS, COLUMNS, BLOCK_ROWS, DEPTH, sizeof(float) * COLUMNS * DEPTH, sizeof(float) * DEPTH, multiply_columns, pack_columns,
    multiply_rows};

}  // namespace tisdpo
