// What the operator `mm` (register.cpp) asks of the matrix products: of any items (product_kernels.h, which exists once for every vector
// width) and of bfloat16 by the units that CPUs have for it (product_bf16.cpp).
#pragma once

#include "fold.h"

namespace tisdpo {

// One of the strides, in items, is 1.
struct Matrix {
  const char* data = nullptr;
  Type type = Type::float32;
  int64_t row_stride = 0, column_stride = 0;

  INLINE const char* at(int64_t row, int64_t column) const { return data + (row * row_stride + column * column_stride) * bytes(type); }
};

// out [M, N] = a [M, K] @ b [K, N], or with `add` out += it, in float32.
struct Product {
  Matrix a, b;
  int64_t M = 0, N = 0, K = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  bool add = false;
  bool out_is_transposed = false;  // item (i, j) lies at j * out_stride + i

  INLINE bool a_is_transposed() const { return a.column_stride != 1; }

  // Its part k..k+depth of the contraction, added to those before it.
  INLINE Product part(int64_t k, int64_t depth) const {
    Product p = *this;
    p.a.data = a.at(0, k), p.b.data = b.at(k, 0), p.K = depth, p.add = add || k > 0;
    return p;
  }

  // The same as out^T = b^T @ a^T, where the rows of a and the columns of b lie along K.
  INLINE Product turned() const {
    return {{b.data, b.type, b.column_stride, 1}, {a.data, a.type, 1, a.row_stride}, N, M, K, out, out_stride, add, true};
  }
};

INLINE int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The products for one kind of items and CPU. `out` is made in tiles, a part of the contraction at a time.
struct ProductKernels {
  int64_t rows, columns;  // of a tile
  int64_t block_rows;     // of a that are packed at a time
  int64_t depth;          // of a part of the contraction
  int64_t turned_width;   // 0, or where multiply_rows serves `turned` products, too: their columns are summed in multiples of it
  int64_t tile_bytes;     // such a part of the columns of a tile of b, packed
  int64_t row_bytes;      // and of a row of a

  // Column tiles first..last and rows top..bottom of out. For an `a` whose rows are stored one by one.
  // `scratch`: twice tile_bytes for each of the tiles (some use it once), row_bytes for each row of a block.
  void (*multiply_columns)(const Product&, int64_t first, int64_t last, int64_t top, int64_t bottom, char* scratch);

  // For a transposed `a`, with a turned_width for any: column tiles first..last of b into `packed`, tile_bytes for each part of each; then
  // the rows top..bottom of out.
  // `scratch`: row_bytes for each row of a tile and part.
  void (*pack_columns)(const Product&, int64_t first, int64_t last, char* packed);
  void (*multiply_rows)(const Product&, int64_t top, int64_t bottom, const char* packed, char* scratch);
};

extern const ProductKernels default_products, avx2_products, avx512_products;  // of any items
extern const ProductKernels bf16_products, brgemm_products;                    // of bfloat16, where the next say so

bool multiplies_bf16();  // whether this CPU can, given that it has AVX-512
bool has_amx_bf16();     // whether it has the units for which brgemm is better than what is compiled here
bool has_brgemm();       // whether this libtorch hands it out

}  // namespace tisdpo
