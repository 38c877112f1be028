// Matrix products of items of any type with float32 sums, for vectors of LANES floats. Included once by each kernels_*.cpp.
//
// Both operands are widened to float32 as they are packed, a part of the contraction at a time: b in panels of a few vectors,
// [DEPTH, WIDTH], which stay in the first-level cache while a block of rows passes by; a in groups of HEIGHT rows. The sums of HEIGHT rows
// and WIDTH columns are in registers. What is packed or stored next is fetched meanwhile. (The blocks are those of Goto and van de Geijn,
// 10.1145/1356052.1356053.)
//
// With sixteen lanes a panel is too large for the first-level cache: there a group of rows stays, and all panels pass by. What is left to
// save is the packing. Rows of float32 that lie along K are read where they are; and of hidden @ weight.T it is the few rows of hidden that
// become the panels, so that nothing of the head is transposed, but the sums.
//
// Bytes: each item of b is read and packed once for every share of rows, each of a once for every group of column tiles, out is read and
// written for every DEPTH of the contraction (a turned product's once, and with eight lanes a transposed a's). Floor: the CPU's
// multiply-adds, two vectors in a cycle and core; with AVX2 on two cores of a Zen 3, 195 GFLOP/s from registers, 127 to 161 were measured,
// MKL 102 to 148; with AVX-512 on two of an Emerald Rapids, 350, of bfloat16 290 to 305, torch 160, of float32 290 to 310, MKL 240 to 310
// (benchmarks/NOTES.md).
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
constexpr bool WIDE = LANES == 16;
constexpr int64_t ROWS = 96, COLUMNS = 64;             // of a tile: whole groups and panels
constexpr int64_t BLOCK_ROWS = 288;                    // of a, packed at a time: 288 KB, for the second-level cache
constexpr int64_t SWEEP = WIDE ? HEIGHT : BLOCK_ROWS;  // rows of it that meet one panel after the other
constexpr int64_t DEPTH = 256;                         // a panel is 16 KB, with sixteen lanes 64, from the second-level cache
constexpr int64_t STEP = WIDE ? 8 : DEPTH;             // of the contraction, with which
constexpr int64_t LINES = WIDE ? 1 : 8;                // so many cache lines are fetched for later
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

// Calls one of the three: the type is a constant within.
#define OF_TYPE(type, function, ...)                                                   \
  (type == Type::float32 ? function<Type::float32>(__VA_ARGS__)                        \
                         : type == Type::bfloat16 ? function<Type::bfloat16>(__VA_ARGS__) : function<Type::float16>(__VA_ARGS__))

// Whether whole groups of rows, which lie along K, are multiplied where they are.
INLINE bool unpacked(const Matrix& a) { return WIDE && a.type == Type::float32; }

// The cache lines of what is packed or stored next, to be fetched a few at a time while something else is multiplied: its rows are far
// apart in memory, and no hardware prefetcher follows. (Where a panel comes from the second-level cache, many at a time would delay it.)
class Ahead {
 public:
  static constexpr bool PACKS = false;
  Ahead() = default;
  // Rows i..i+m and columns j..j+n of a matrix.
  INLINE Ahead(const Matrix& x, int64_t i, int64_t m, int64_t j, int64_t n) : line_(x.at(i, j)) {
    bool by_rows = x.column_stride == 1;
    lines_ = left_ = parts((by_rows ? n : m) * bytes(x.type), 64);
    rows_ = by_rows ? m : n;
    skip_ = (by_rows ? x.row_stride : x.column_stride) * bytes(x.type) - 64 * lines_;
  }
  INLINE void step() {
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

// The next part of a b whose rows lie along its columns, packed a vector at a time while something else is multiplied. Fetched only, it
// would not stay: rows that are a power of two apart share a part of the second-level cache.
class Packing {
 public:
  static constexpr bool PACKS = true;
  Packing() = default;
  // Rows k..k+depth and columns j..j+n, to panels.
  Packing(const Matrix& b, int64_t k, int64_t depth, int64_t j, int64_t n, float* to)
      : ahead_(b, k, depth, j, n),
        type_(b.type),
        from_(b.at(k, j)),
        to_(to),
        rows_(depth),
        columns_(n),
        stride_(b.row_stride * bytes(b.type)) {
    for (int64_t line = 0; line < EARLIER; line++) ahead_.step();
  }
  INLINE void step() {
    if (rows_ <= 0) return;
    const char* from = from_ + column_ * bytes(type_);
    if (column_ * bytes(type_) % 64 == 0) ahead_.step();
    float* to = to_ + column_ / WIDTH * WIDTH * DEPTH + column_ % WIDTH;
    if (column_ + LANES > columns_)
      store(to, OF_TYPE(type_, first_of, from, columns_ - column_));
    else
      store(to, OF_TYPE(type_, widened, from));
    column_ += LANES;
    if (column_ < columns_) return;
    column_ = 0, from_ += stride_, to_ += WIDTH, rows_--;
  }
  void finish() {
    while (rows_ > 0) step();
  }

 private:
  static constexpr int64_t EARLIER = 32;  // lines between fetching and packing
  Ahead ahead_;
  Type type_ = Type::float32;
  const char* from_ = nullptr;
  float* to_ = nullptr;
  int64_t rows_ = 0, columns_ = 0, stride_ = 0, column_ = 0;
};

// Adds the products of a column of a, HEIGHT items, and of the first COUNT vectors of a row of a panel.
template <int64_t COUNT>
INLINE void add_products(const float* a, int64_t stride, const float* b, Float (&sums)[HEIGHT][COUNT]) {
  Float vectors[COUNT];
#pragma GCC unroll 4
  for (int64_t v = 0; v < COUNT; v++) vectors[v] = load<Float>(b + v * LANES);
#pragma GCC unroll 12
  for (int64_t r = 0; r < HEIGHT; r++) {
    Float x = every(a[r * stride]);
#pragma GCC unroll 4
    for (int64_t v = 0; v < COUNT; v++) sums[r][v] += x * vectors[v];
  }
}

// The sums over `depth` of HEIGHT rows and the first COUNT vectors of a panel, to the `rows` and n columns of out that exist. Rows of a
// are a_stride apart, or where it is packed transposed HEIGHT items of them lie together.
template <bool TRANSPOSED, int64_t COUNT, class Next>
void multiply_group(int64_t depth, const float* a, int64_t a_stride, const float* b, float* out, int64_t stride, int64_t rows, int64_t n,
                    bool add, Next& next, Ahead& ahead) {
#pragma GCC unroll 12
  for (int64_t r = 0; r < HEIGHT; r++)
    if (r < rows) __builtin_prefetch(out + r * stride, 1);
  Float sums[HEIGHT][COUNT] = {};
  if constexpr (WIDE) {
    for (int64_t d = 0; d < depth;) {
      next.step();
      ahead.step();
      for (int64_t stop = at_most(d + STEP, depth); d < stop; d++)
        add_products<COUNT>(a + d * (TRANSPOSED ? HEIGHT : 1), TRANSPOSED ? 1 : a_stride, b + d * WIDTH, sums);
    }
  } else {
    next.step();
    ahead.step();
#pragma GCC unroll 4
    for (int64_t d = 0; d < depth; d++)
      add_products<COUNT>(a + d * (TRANSPOSED ? HEIGHT : 1), TRANSPOSED ? 1 : DEPTH, b + d * WIDTH, sums);
  }
  if (rows >= HEIGHT && n >= COUNT * LANES) {
#pragma GCC unroll 12
    for (int64_t r = 0; r < HEIGHT; r++)
#pragma GCC unroll 4
      for (int64_t v = 0; v < COUNT; v++) {
        float* to = out + r * stride + v * LANES;
        store(to, add ? load<Float>(to) + sums[r][v] : sums[r][v]);
      }
    return;
  }
  float all[HEIGHT][COUNT * LANES];
#pragma GCC unroll 12
  for (int64_t r = 0; r < HEIGHT; r++)
#pragma GCC unroll 4
    for (int64_t v = 0; v < COUNT; v++) store(&all[r][v * LANES], sums[r][v]);
  for (int64_t r = 0; r < at_most(rows, HEIGHT); r++)
    for (int64_t c = 0; c < at_most(n, COUNT * LANES); c++) out[r * stride + c] = add ? out[r * stride + c] + all[r][c] : all[r][c];
}

template <bool TRANSPOSED, class Next>
void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, float* out, int64_t stride, int64_t rows, int64_t n,
                   bool add, Next& next, Ahead& ahead) {
  for (int64_t c = 0; c < n; c += WIDTH) {
    auto group = multiply_group<TRANSPOSED, VECTORS, Next>;
    if constexpr (WIDE) {  // of a few columns no more sums than vectors
      constexpr decltype(group) of_vectors[] = {multiply_group<TRANSPOSED, 1, Next>, multiply_group<TRANSPOSED, 2, Next>,
                                                multiply_group<TRANSPOSED, 3, Next>};
      if (n - c <= WIDTH - LANES) group = of_vectors[parts(n - c, LANES) - 1];
    }
    for (int64_t r = 0; r < rows; r += HEIGHT)
      group(depth, a + r * a_stride, a_stride, b + c * DEPTH, out + r * stride + c, stride, rows - r, n - c, add, next, ahead);
  }
}

template <class Next>
void multiply_parts(const Product& p, int64_t first, int64_t last, int64_t top, int64_t bottom, char* scratch) {
  int64_t begin = first * COLUMNS, end = at_most(last * COLUMNS, p.N), size = (last - first) * COLUMNS * DEPTH;
  float *b = reinterpret_cast<float*>(scratch), *next_b = b + size, *a = next_b + size;
  for (int64_t k = 0; k < p.K; k += DEPTH) {
    int64_t depth = at_most(DEPTH, p.K - k), next_k = k + DEPTH, next_depth = at_most(DEPTH, p.K - next_k);
    if (k == 0 || !Next::PACKS)
      for (int64_t j = begin; j < end; j += COLUMNS)
        OF_TYPE(p.b.type, pack_b, p.b, k, depth, j, at_most(COLUMNS, p.N - j), b + (j - begin) * DEPTH);
    Next next;
    if constexpr (Next::PACKS) {
      if (next_k < p.K) next = Next(p.b, next_k, next_depth, begin, end - begin, next_b);
    } else {
      if (next_k < p.K) next = Next(p.b, next_k, next_depth, begin, end - begin);
      else if (end < p.N) next = Next(p.b, 0, at_most(DEPTH, p.K), end, at_most(end - begin, p.N - end));
    }
    for (int64_t i = top, m; i < bottom; i += m) {
      m = at_most(BLOCK_ROWS, bottom - i);
      if (unpacked(p.a) && m > HEIGHT) m -= m % HEIGHT;  // the last few rows are a block of their own
      const float* rows = a;
      int64_t stride = DEPTH, next_i = i + m;
      if (unpacked(p.a) && m % HEIGHT == 0)
        rows = reinterpret_cast<const float*>(p.a.at(i, k)), stride = p.a.row_stride;
      else
        OF_TYPE(p.a.type, pack_rows, p.a, i, m, k, depth, a);
      Ahead ahead;
      if (next_i + HEIGHT <= bottom) ahead = Ahead(p.a, next_i, at_most(BLOCK_ROWS, bottom - next_i), k, depth);
      else if (next_k < p.K) ahead = Ahead(p.a, top, at_most(BLOCK_ROWS, bottom - top), next_k, next_depth);
      for (int64_t r = 0; r < m; r += SWEEP)
        for (int64_t j = begin; j < end; j += COLUMNS)
          multiply_tile<false>(depth, rows + r * stride, stride, b + (j - begin) * DEPTH, p.out + (i + r) * p.out_stride + j, p.out_stride,
                               at_most(SWEEP, m - r), at_most(COLUMNS, p.N - j), p.add || k > 0, next, ahead);
    }
    if constexpr (Next::PACKS) {
      next.finish();
      float* other = b;
      b = next_b, next_b = other;
    }
  }
}

void multiply_columns(const Product& p, int64_t first, int64_t last, int64_t top, int64_t bottom, char* scratch) {
  (WIDE && p.b.column_stride == 1 ? multiply_parts<Packing> : multiply_parts<Ahead>)(p, first, last, top, bottom, scratch);
}

void pack_columns(const Product& p, int64_t first, int64_t last, char* packed) {
  for (int64_t tile = first; tile < last; tile++)
    for (int64_t k = 0; k < p.K; k += DEPTH) {
      float* to = reinterpret_cast<float*>(packed) + (tile * parts(p.K, DEPTH) + k / DEPTH) * COLUMNS * DEPTH;
      OF_TYPE(p.b.type, pack_b, p.b, k, at_most(DEPTH, p.K - k), tile * COLUMNS, at_most(COLUMNS, p.N - tile * COLUMNS), to);
    }
}

// Rows i..i+m and columns j..j+n of out, whose columns are stored one by one, from a tile of it.
void store_transposed(const Product& p, int64_t i, int64_t m, int64_t j, int64_t n, const float* tile) {
  for (int64_t r = 0; r < m; r += LANES)
    for (int64_t c = 0; c < n; c += LANES) {
      Float v[LANES];
#pragma GCC unroll 16
      for (int64_t t = 0; t < LANES; t++) v[t] = load<Float>(tile + (r + t) * COLUMNS + c);
      transpose(v);
      for (int64_t t = 0; t < at_most(LANES, n - c); t++) {
        float* to = p.out + (j + c + t) * p.out_stride + i + r;
        if (r + LANES <= m)
          store(to, p.add ? load<Float>(to) + v[t] : v[t]);
        else
          for (int64_t e = 0; e < m - r; e++) to[e] = p.add ? to[e] + v[t][e] : v[t][e];
      }
    }
}

// Rows i..i+m and columns j..j+n of out, to be fetched.
Ahead tile_of_out(const Product& p, int64_t i, int64_t m, int64_t j, int64_t n) {
  Matrix out{reinterpret_cast<const char*>(p.out), Type::float32, p.out_stride, 1};
  return p.out_is_transposed ? Ahead(out, j, n, i, m) : Ahead(out, i, m, j, n);
}

template <bool TRANSPOSED>
void multiply_blocks(const Product& p, int64_t top, int64_t bottom, const char* packed, char* scratch) {
  alignas(64) float tile[ROWS * COLUMNS];
  for (int64_t i = top; i < bottom; i += ROWS) {
    int64_t m = at_most(ROWS, bottom - i), next = i + ROWS;
    const float* a = reinterpret_cast<float*>(scratch);
    int64_t a_stride = DEPTH, part = ROWS;  // of a, in floats: from row to row, and from an item of K to the next, in whole parts
    if (!TRANSPOSED && unpacked(p.a) && m % HEIGHT == 0) {
      a = reinterpret_cast<const float*>(p.a.at(i, 0)), a_stride = p.a.row_stride, part = 1;
    } else {
      for (int64_t k = 0; k < p.K; k += DEPTH) {
        float* to = reinterpret_cast<float*>(scratch) + k * ROWS;
        int64_t depth = at_most(DEPTH, p.K - k);
        if (TRANSPOSED)
          OF_TYPE(p.a.type, pack_transposed, p.a, i, m, k, depth, to);
        else
          OF_TYPE(p.a.type, pack_rows, p.a, i, m, k, depth, to);
      }
    }
    Ahead next_a;
    if (next < bottom) next_a = Ahead(p.a, next, at_most(ROWS, bottom - next), 0, p.K);
    const float* b = reinterpret_cast<const float*>(packed);
    for (int64_t j = 0; j < p.N; j += COLUMNS) {
      int64_t n = at_most(COLUMNS, p.N - j), next_j = j + COLUMNS;
      Ahead next_out;
      if (p.out_is_transposed) next_out = tile_of_out(p, i, m, j, n);
      else if (WIDE && next_j < p.N) next_out = tile_of_out(p, i, m, next_j, at_most(COLUMNS, p.N - next_j));
      else if (WIDE && next < bottom) next_out = tile_of_out(p, next, at_most(ROWS, bottom - next), 0, at_most(COLUMNS, p.N));
      float* out = p.out_is_transposed ? tile : p.out + i * p.out_stride + j;
      int64_t stride = p.out_is_transposed ? COLUMNS : p.out_stride;
      int64_t wide = p.out_is_transposed ? parts(n, LANES) * LANES : n;  // a tile has room for whole vectors
      bool add = p.add && !p.out_is_transposed;
      for (int64_t k = 0; k < p.K; k += DEPTH, b += COLUMNS * DEPTH)
        multiply_tile<TRANSPOSED>(at_most(DEPTH, p.K - k), a + k * part, a_stride, b, out, stride, m, wide, add || k > 0, next_out, next_a);
      if (p.out_is_transposed) store_transposed(p, i, m, j, n, tile);
    }
  }
}

void multiply_rows(const Product& p, int64_t top, int64_t bottom, const char* packed, char* scratch) {
  (!WIDE || p.a_is_transposed() ? multiply_blocks<true> : multiply_blocks<false>)(p, top, bottom, packed, scratch);
}

#undef OF_TYPE

}  // namespace

extern const ProductKernels PRODUCTS{
    ROWS, COLUMNS, BLOCK_ROWS, DEPTH, WIDE ? LANES : 0, sizeof(float) * COLUMNS * DEPTH, sizeof(float) * DEPTH, multiply_columns,
    pack_columns, multiply_rows};

}  // namespace tisdpo
