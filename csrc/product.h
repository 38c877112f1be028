// What the operator `mm_bf16` (register.cpp) asks of the products of bfloat16 matrices (product.cpp).
#pragma once

#include <cstdint>

namespace tisdpo {

// Items as bits; one of the strides, in items, is 1.
struct Matrix {
  const uint16_t* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

// out [M, N] = a [M, K] @ b [K, N], or with `add` out += it.
struct Product {
  Matrix a, b;
  int64_t M = 0, N = 0, K = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  bool add = false;
  bool by_brgemm = false;  // else by what is compiled here

  bool a_is_transposed() const { return a.column_stride != 1; }
};

constexpr int64_t TILE = 64;    // rows and columns of out that are multiplied at a time
constexpr int64_t DEPTH = 1024;  // of the contraction, likewise
constexpr int64_t WORDS = TILE * DEPTH / 2;  // of 32 bits in a packed tile: two items that follow each other along K

inline int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE; }
inline int64_t depths(int64_t n) { return (n + DEPTH - 1) / DEPTH; }

bool multiplies_bf16();  // whether this CPU does, given that it has AVX-512
bool has_amx_bf16();     // whether it has the units for which brgemm is better than what is compiled here
bool has_brgemm();       // whether this libtorch hands it out

// Columns of tiles first..last and rows top..bottom of out. `scratch`: 2 * WORDS. For an `a` whose rows are stored one by one.
void multiply_columns(const Product& p, int64_t first, int64_t last, int64_t top, int64_t bottom, uint32_t* scratch);

// For a transposed `a`: column tiles first..last of b into `packed` [tiles(N), depths(K), WORDS]; then the row tiles first..last of out,
// with `scratch` [depths(K), WORDS].
void pack_columns(const Product& p, int64_t first, int64_t last, uint32_t* packed);
void multiply_rows(const Product& p, int64_t first, int64_t last, const uint32_t* packed, uint32_t* scratch);

}  // namespace tisdpo
