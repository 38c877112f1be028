// The kernels as a program: a case on standard input, its results on standard output. test_cpp_elsewhere.py builds it for what this CPU is not.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#ifndef LANES
#define LANES 4
#endif
#define KERNELS kernels
#define PRODUCTS products
namespace tisdpo {
struct Kernels;
struct ProductKernels;
extern const Kernels kernels;
extern const ProductKernels products;
}  // namespace tisdpo
#include "fold_kernels.h"
#include "product_kernels.h"

template <class T>
std::vector<T> read(int64_t n) {
  std::vector<T> x(n + 1);  // never null
  if (fread(x.data(), sizeof(T), n, stdin) != (size_t)n) abort();
  return x;
}

using namespace tisdpo;

// Statistics and D.
void fold() {
  auto sizes = read<int64_t>(6);  // rows, vocabulary, type, kl, has bias, soft cap
  auto scales = read<float>(2);
  int64_t rows = sizes[0], V = sizes[1];
  Type type = (Type)sizes[2];
  auto z = read<char>(rows * V * bytes(type)), q = read<char>(rows * V * bytes(type));
  auto bias = read<float>(sizes[4] ? V : 0), ref_bias = read<float>(sizes[4] ? V : 0);
  auto target = read<int64_t>(rows);
  auto g = read<float>(rows), g_kl = read<float>(rows);
  std::vector<float> columns(5 * rows + 1), d(rows * V + 1);
  Fold f;
  f.policy = {{z.data(), type, 1, V, 0}, sizes[4] ? bias.data() : nullptr};
  f.reference = {{q.data(), type, 1, V, 0}, sizes[4] ? ref_bias.data() : nullptr};
  f.target = target.data();
  f.vocabulary = V;
  f.kl = (KL)sizes[3];
  f.inner = scales[0], f.outer = scales[1];
  f.softcap = sizes[5];
  float* c = columns.data();
  Statistics s{c, c + rows, c + 2 * rows, c + 3 * rows, c + 4 * rows};
  kernels.statistics(f, s, 0, rows);
  for (bool some : {false, true}) {  // all columns, and some of them again
    int64_t first = some ? V / 4 : 0, last = some ? V / 2 : V;
    kernels.gradient(f, s, {g.data(), g_kl.data()}, {(char*)(d.data() + first), Type::float32, 1, V, 0}, first, last, 0, rows);
  }
  fwrite(c, 4, 5 * rows, stdout);
  fwrite(d.data(), 4, rows * V, stdout);
}

// out [M, N] += a [M, K] @ b [K, N], in the shares of two threads; of a transposed a a part of K after the other.
void product() {
  auto sizes = read<int64_t>(8);  // M, N, K, types, whether each is stored by columns, and whether to turn the product
  int64_t M = sizes[0], N = sizes[1], K = sizes[2];
  Type types[2] = {(Type)sizes[3], (Type)sizes[4]};
  auto a = read<char>(M * K * bytes(types[0])), b = read<char>(K * N * bytes(types[1]));
  auto out = read<float>(M * N);
  Matrix x{a.data(), types[0], sizes[5] ? 1 : K, sizes[5] ? M : 1}, y{b.data(), types[1], sizes[6] ? 1 : N, sizes[6] ? K : 1};
  Product p{x, y, M, N, K, out.data(), N, true};
  if (sizes[7]) p = p.turned();
  int64_t columns = parts(p.N, products.columns), depths = parts(K, products.depth), half = p.M / 24 * 12;
  std::vector<char> packed(columns * depths * products.tile_bytes);
  std::vector<char> scratch(2 * columns * products.tile_bytes + (products.block_rows + depths * products.rows) * products.row_bytes);
  if (p.a_is_transposed() || sizes[7]) {
    int64_t depth = sizes[7] ? K : products.depth;
    for (int64_t k = 0; k < K; k += depth) {
      Product part = p.part(k, K - k < depth ? K - k : depth);
      for (auto share : {0, 1}) products.pack_columns(part, share ? columns / 2 : 0, share ? columns : columns / 2, packed.data());
      for (auto share : {0, 1}) products.multiply_rows(part, share ? half : 0, share ? p.M : half, packed.data(), scratch.data());
    }
  } else {
    for (auto share : {0, 1})
      products.multiply_columns(p, share ? columns / 2 : 0, share ? columns : columns / 2, 0, M, scratch.data());
  }
  fwrite(out.data(), 4, M * N, stdout);
}

int main() { read<int64_t>(1)[0] ? product() : fold(); }
