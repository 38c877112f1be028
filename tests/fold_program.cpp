// The folds as a program: a case on standard input, statistics and D on standard output. test_cpp_elsewhere.py builds it for what this CPU is not.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#ifndef LANES
#define LANES 4
#endif
#define KERNELS kernels
namespace tisdpo {
struct Kernels;
extern const Kernels kernels;
}  // namespace tisdpo
#include "fold_kernels.h"

template <class T>
std::vector<T> read(int64_t n) {
  std::vector<T> x(n + 1);  // never null
  if (fread(x.data(), sizeof(T), n, stdin) != (size_t)n) abort();
  return x;
}

int main() {
  using namespace tisdpo;
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
  kernels.gradient(f, s, {g.data(), g_kl.data()}, {(char*)d.data(), Type::float32, 1, V, 0}, 0, rows);
  fwrite(c, 4, 5 * rows, stdout);
  fwrite(d.data(), 4, rows * V, stdout);
}
