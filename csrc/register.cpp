// The operators of the namespace tisdpo_cpp: their schemas, the checks of their arguments, and the choice of the kernels.
//
// libtorch's stable ABI only, and no Python: one build serves every Python and every later torch. Results are written to tensors that the
// caller made (tisdpo/ops/cpp_fold.py, which also brings vectors to contiguous float32).

#include "fold.h"
#include "product.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include <unistd.h>

namespace {

using namespace tisdpo;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of the schemas below, as tisdpo/ops/extension.py has it: to be raised with every change.
constexpr int64_t INTERFACE = 2;

// At least so many logits or tokens for each thread.
constexpr int64_t GRAIN = 32768;

// Rows of out are shared out by so many: a multiple of what every product (product_kernels.h) sums in registers together.
constexpr int64_t GROUP = 6;

// So many floats of whole panels stay in the second-level cache while rows pass by (2 MB, on the CPU that was measured).
constexpr int64_t TURNED_ITEMS = 3 << 17;

int64_t interface() { return INTERFACE; }

// The levels that this CPU can run, and the one that is taken: "avx512" widens bfloat16 to float32, "avx512_bf16" multiplies it in pairs,
// "amx" leaves it to brgemm, which does without AMX, too. Intel's pairs take four times as long as a multiply-add (benchmarks/NOTES.md).
std::string capability() {
  std::string best = "default", levels = best;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels += " " + (best = "avx2");
  if (best == "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    levels += " " + (best = "avx512");
    if (multiplies_bf16()) {
      levels += " avx512_bf16";
      if (__builtin_cpu_is("amd")) best = "avx512_bf16";
      if (has_brgemm()) levels += " amx";
      if (has_brgemm() && has_amx_bf16()) best = "amx";
    }
  }
#endif
  const char* asked = std::getenv("TISDPO_CPU_CAPABILITY");
  if (!asked || !*asked) return best;
  STD_TORCH_CHECK(!std::strchr(asked, ' ') && (" " + levels + " ").find(" " + std::string(asked) + " ") != std::string::npos,
                  "TISDPO_CPU_CAPABILITY must be one of what this CPU can run (", levels, "), got ", asked);
  return asked;
}

const Kernels& kernels() {
#ifdef __x86_64__
  std::string level = capability();
  if (level == "avx2") return avx2_kernels;
  if (level != "default") return avx512_kernels;
#endif
  return default_kernels;
}

template <class F>
void over_rows(int64_t rows, int64_t row_size, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(row_size, 1)), f);
}

std::string shape(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); i++) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

std::string strides(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); i++) text += (i ? ", " : "") + std::to_string(x.stride(i));
  return text + "]";
}

// The data of a contiguous CPU vector of n items.
template <class T>
T* data(const Tensor& x, const char* name, ScalarType type, int64_t n) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU, got a tensor elsewhere");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
  STD_TORCH_CHECK(x.numel() == n, name, " must have ", n, " items, got shape ", shape(x));
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous, got strides ", strides(x), " for shape ", shape(x));
  return static_cast<T*>(x.data_ptr());
}

float* floats(const Tensor& x, const char* name, int64_t n) { return data<float>(x, name, ScalarType::Float, n); }

float* floats(const OptionalTensor& x, const char* name, int64_t n) { return x ? floats(*x, name, n) : nullptr; }

Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

// Rows of [n, V] or [B, T, V] with rows * V items, which lie next to each other within a row.
Rows rows_of(const Tensor& x, const char* name, int64_t rows, int64_t vocabulary) {
  int64_t d = x.dim();
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU, got a tensor elsewhere");
  STD_TORCH_CHECK((d == 2 || d == 3) && x.size(d - 1) == vocabulary && x.numel() == rows * vocabulary,
                  name, " must have ", rows, " rows of ", vocabulary, " logits in two or three dimensions, got shape ", shape(x));
  STD_TORCH_CHECK(x.stride(d - 1) == 1 || vocabulary <= 1, name, " must have stride 1 within a row, got ", x.stride(d - 1));
  Rows out{static_cast<char*>(x.data_ptr()), type_of(x, name)};
  out.inner = std::max<int64_t>(1, x.size(d - 2));
  out.inner_stride = x.stride(d - 2);
  out.outer_stride = d == 3 ? x.stride(0) : 0;
  return out;
}

Fold fold_of(const Tensor& z, const Tensor& target, const OptionalTensor& ref_z, const OptionalTensor& bias, const OptionalTensor& ref_bias,
             const std::string& kl, double inner, double outer, bool softcap) {
  STD_TORCH_CHECK(kl.empty() || kl == "reverse" || kl == "forward", "kl must be empty, reverse or forward, got ", kl);
  STD_TORCH_CHECK(kl.empty() || ref_z, "ref_z must be given with kl=", kl, ", got none");
  Fold f;
  int64_t rows = target.numel();
  f.vocabulary = z.size(z.dim() - 1);
  f.policy = {rows_of(z, "z", rows, f.vocabulary), floats(bias, "bias", f.vocabulary)};
  if (ref_z) f.reference = {rows_of(*ref_z, "ref_z", rows, f.vocabulary), floats(ref_bias, "ref_bias", f.vocabulary)};
  f.target = data<int64_t>(target, "target", ScalarType::Long, rows);
  for (int64_t i = 0; i < rows; i++)
    STD_TORCH_CHECK(f.target[i] < f.vocabulary, "target must be below the vocabulary size ", f.vocabulary, ", got ", f.target[i], " at ",
                    i);
  f.kl = kl == "reverse" ? KL::reverse : kl == "forward" ? KL::forward : KL::none;
  f.inner = inner, f.outer = outer, f.softcap = softcap;
  return f;
}

// out [5, n]: lse, logp, and where they are asked for ref_lse, ref_logp, KL.
void statistics(const Tensor& z, const Tensor& target, const OptionalTensor& ref_z, const OptionalTensor& bias,
                const OptionalTensor& ref_bias, const std::string& kl, double inner, double outer, bool softcap, const Tensor& out) {
  Fold f = fold_of(z, target, ref_z, bias, ref_bias, kl, inner, outer, softcap);
  int64_t rows = target.numel();
  float* p = floats(out, "out", 5 * rows);
  Statistics columns{p, p + rows, ref_z ? p + 2 * rows : nullptr, ref_z ? p + 3 * rows : nullptr, kl.empty() ? nullptr : p + 4 * rows};
  const Kernels& run = kernels();
  over_rows(rows, f.vocabulary, [&](int64_t begin, int64_t end) { run.statistics(f, columns, begin, end); });
}

// Of columns first..last of z. `out` may lie over z: in the same place, as items that are no wider.
void gradient(const Tensor& z, const Tensor& target, const OptionalTensor& ref_z, const OptionalTensor& bias,
              const OptionalTensor& ref_bias, const std::string& kl, double inner, double outer, bool softcap, const Tensor& lse,
              const OptionalTensor& ref_lse, const OptionalTensor& divergence, const OptionalTensor& g_logp, const OptionalTensor& g_kl,
              int64_t first, int64_t last, const Tensor& out) {
  Fold f = fold_of(z, target, ref_z, bias, ref_bias, kl, inner, outer, softcap);
  int64_t rows = target.numel();
  STD_TORCH_CHECK(kl.empty() || (ref_lse && divergence && g_kl), "ref_lse, divergence and g_kl must be given with kl=", kl, ", got ",
                  ref_lse.has_value(), ", ", divergence.has_value(), ", ", g_kl.has_value());
  Statistics stats{floats(lse, "lse", rows), nullptr, floats(ref_lse, "ref_lse", rows), nullptr, floats(divergence, "divergence", rows)};
  Upstream upstream{floats(g_logp, "g_logp", rows), floats(g_kl, "g_kl", rows)};
  STD_TORCH_CHECK(0 <= first && first <= last && last <= f.vocabulary, "first and last must lie within the vocabulary size ",
                  f.vocabulary, ", got ", first, " and ", last);
  Rows d = rows_of(out, "out", rows, last - first);
  int64_t item = bytes(f.policy.rows.type);
  STD_TORCH_CHECK(rows == 0 || d.data != f.policy.rows.data || bytes(d.type) <= item, "out over z must have items of at most ", item,
                  " bytes, got ", bytes(d.type));
  const Kernels& run = kernels();
  over_rows(rows, last - first, [&](int64_t begin, int64_t end) { run.gradient(f, stats, upstream, d, first, last, begin, end); });
}

// The boundaries of sequences, which must stay within the tokens.
const int64_t* boundaries(const Tensor& cu_seqlens, int64_t tokens) {
  const int64_t* cu = data<int64_t>(cu_seqlens, "cu_seqlens", ScalarType::Long, cu_seqlens.numel());
  for (int64_t s = 0; s < cu_seqlens.numel(); s++)
    STD_TORCH_CHECK(cu[s] >= (s ? cu[s - 1] : 0) && cu[s] <= tokens, "cu_seqlens must not decrease and lie within 0..", tokens,
                    ", got ", cu[s], " at ", s);
  return cu;
}

// sums [3, S]: weighted log-ratio, weighted KL (0 without), log-prob; used [N]: the weights, given, formed from the contrast, or 1.
void sequence_sums(const Tensor& logps, const Tensor& ref_logps, const OptionalTensor& kl, const Tensor& cu_seqlens,
                   const OptionalTensor& token_weights, const OptionalTensor& pos_logps, const OptionalTensor& neg_logps, double k,
                   double mu_chosen, double mu_rejected, double lower, double upper, const Tensor& sums, const Tensor& used) {
  int64_t N = logps.numel(), S = cu_seqlens.numel() - 1;
  const int64_t* cu = boundaries(cu_seqlens, N);
  const float *logp = floats(logps, "logps", N), *ref = floats(ref_logps, "ref_logps", N), *div = floats(kl, "kl", N);
  const float *weight = floats(token_weights, "token_weights", N), *pos = floats(pos_logps, "pos_logps", N);
  const float* neg = floats(neg_logps, "neg_logps", N);
  STD_TORCH_CHECK(!pos == !neg, "pos_logps and neg_logps must come together, got ", !!pos, " and ", !!neg);
  float *out = floats(sums, "sums", 3 * S), *w_out = floats(used, "used", N);
  over_rows(S, N / std::max<int64_t>(S, 1), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; s++) {
      double D = 0, K = 0, L = 0, mu = s % 2 ? mu_rejected : mu_chosen;
      for (int64_t i = cu[s]; i < cu[s + 1]; i++) {
        float w = weight ? weight[i] : pos ? k * std::exp(mu * std::clamp<double>(pos[i] - neg[i], lower, upper)) : 1;
        w_out[i] = w;
        D += w * (logp[i] - ref[i]);
        if (div) K += w * div[i];
        L += logp[i];
      }
      out[s] = D, out[S + s] = K, out[2 * S + s] = L;
    }
  });
}

// out_D, out_K [N] = g [S] of the token's sequence times its weight; 0 for a gradient that is not there.
void spread(const OptionalTensor& g_D, const OptionalTensor& g_K, const Tensor& weights, const Tensor& cu_seqlens, const Tensor& out_D,
            const Tensor& out_K) {
  int64_t N = weights.numel(), S = cu_seqlens.numel() - 1;
  const int64_t* cu = boundaries(cu_seqlens, N);
  const float *w = floats(weights, "weights", N), *D = floats(g_D, "g_D", S), *K = floats(g_K, "g_K", S);
  float *to_D = floats(out_D, "out_D", N), *to_K = floats(out_K, "out_K", N);
  over_rows(S, N / std::max<int64_t>(S, 1), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; s++)
      for (int64_t i = cu[s]; i < cu[s + 1]; i++) to_D[i] = D ? D[s] * w[i] : 0, to_K[i] = K ? K[s] * w[i] : 0;
  });
}

// Memory that starts with a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t size) : data(static_cast<char*>(operator new(size, std::align_val_t(64)))) {}
  ~Scratch() { operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  char* const data;
};

Matrix matrix_of(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU, got a tensor elsewhere");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must have shape [", rows, ", ", columns, "], got ",
                  shape(x));
  int64_t along_column = columns > 1 ? x.stride(1) : 1, along_row = rows > 1 ? x.stride(0) : 1;
  STD_TORCH_CHECK(along_column == 1 || along_row == 1, name, " must have stride 1 along rows or columns, got ", x.stride(0), " and ",
                  x.stride(1));
  return {static_cast<const char*>(x.data_ptr()), type_of(x, name), x.stride(0), along_column};
}

const ProductKernels& products(Type a, Type b) {
  std::string level = capability();
#ifdef __x86_64__
  if (a == Type::bfloat16 && b == Type::bfloat16) {
    if (level == "amx") return brgemm_products;
    if (level == "avx512_bf16") return bf16_products;
  }
  if (level == "avx2") return avx2_products;
  if (level != "default") return avx512_products;
#endif
  return default_products;
}

// Bytes of each core's second-level cache, 0 where the system does not say.
inline int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  return sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  return 0;
#endif
}

// The types of items whose products are to be made by `mm`: 16-bit ones, as torch has none that keep their float32 sums, and float32 where
// that was measured to be faster than torch's (on one CPU of each kind, for the few hundred rows of a chunk): with AVX2 on AMD's, for which
// MKL takes slower code, and with AVX-512 on Intel's whose second-level cache is as large as what is packed and stored there.
std::string multiplied() {
  std::string level = capability();
  if (level == "default") return "";
  std::string types = "bfloat16 float16";
#ifdef __x86_64__
  if (level == "avx2" ? __builtin_cpu_is("amd") : __builtin_cpu_is("intel") && second_level_cache() >= 2 << 20) types += " float32";
#endif
  return types;
}

// While one lives, numbers below 1.2e-38 are zeros to this thread: Intel's CPUs take a hundred times as long for an operation with one, and
// of a pair that is told apart for certain the slope is so small. (Those of float16 are normal numbers of float32.)
class NoSubnormals {
#ifdef __x86_64__
  const unsigned before = __builtin_ia32_stmxcsr();

 public:
  NoSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~NoSubnormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// f(first, last) for shares of 0..count in torch's threads.
template <class F>
void in_threads(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    [[maybe_unused]] NoSubnormals off;
    f(first, last);
  });
}

// A product by shares of rows, for which all of b is packed.
void multiply_by_rows(const ProductKernels& run, const Product& p) {
  int64_t threads = torch::stable::get_num_threads(), columns = parts(p.N, run.columns), depths = parts(p.K, run.depth);
  Scratch packed(columns * depths * run.tile_bytes);
  in_threads(columns, [&](int64_t first, int64_t last) { run.pack_columns(p, first, last, packed.data); });
  int64_t group = p.out_is_transposed ? 8 * GROUP : GROUP;  // whole cache lines of out
  int64_t height = parts(parts(p.M, threads), group) * group;
  in_threads(parts(p.M, height), [&](int64_t first, int64_t last) {
    Scratch scratch(depths * run.rows * run.row_bytes);
    run.multiply_rows(p, first * height, std::min(last * height, p.M), packed.data, scratch.data);
  });
}

// out [M, N] = a [M, K] @ b [K, N], or out += it, with float32 sums.
void mm(const Tensor& a, const Tensor& b, const Tensor& out, bool add) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must be matrices, got shapes ", shape(a), " and ", shape(b));
  int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  Rows rows = rows_of(out, "out", M, N);
  STD_TORCH_CHECK(rows.type == Type::float32 && out.dim() == 2, "out must be a matrix of Float, got ", out.scalar_type());
  Product p{matrix_of(a, "a", M, K), matrix_of(b, "b", K, N), M, N, K, reinterpret_cast<float*>(rows.data), rows.inner_stride, add};
  if (M == 0 || N == 0) return;
  if (K == 0) {
    for (int64_t i = 0; !add && i < M; i++) std::fill_n(p.out + i * p.out_stride, N, 0.0f);
    return;
  }
  const ProductKernels& run = products(p.a.type, p.b.type);
  // Where the rows of both lie along K and a has the fewer, a's are packed, if they fit into the cache and at most a sixteenth is padding.
  int64_t padded = run.turned_width ? parts(M, run.turned_width) * run.turned_width : 0, panels = parts(M, run.columns) * run.columns * K;
  if (padded && !p.a_is_transposed() && p.b.column_stride != 1 && M <= N && padded * 16 <= M * 17 && panels <= TURNED_ITEMS) {
    p = p.turned();
    std::swap(M, N);
  }
  if (p.out_is_transposed) return multiply_by_rows(run, p);
  if (p.a_is_transposed()) {
    // With sixteen lanes a part of the contraction at a time, so that what is packed of b stays in the second-level cache: that saves more
    // than it costs to read out again (a short rest goes with the part before it). It makes no difference with eight, nor for more columns
    // than fit there.
    for (int64_t k = 0, size; k < K; k += size) {
      size = !run.turned_width || 2 * (K - k) < 3 * run.depth ? K - k : run.depth;
      multiply_by_rows(run, p.part(k, size));
    }
    return;
  }
  int64_t threads = torch::stable::get_num_threads(), columns = parts(N, run.columns);
  // Groups of up to 8 column tiles, so that out is in the cache while the contraction goes on; as many for one thread as for another, and
  // where they are too few, of rows too.
  int64_t wanted = std::min(columns, parts(parts(columns, 8), threads) * threads), width = parts(columns, wanted);
  int64_t groups = parts(columns, width), shares = std::clamp<int64_t>(threads / groups, 1, parts(M, GROUP));
  int64_t height = parts(parts(M, shares), GROUP) * GROUP;
  in_threads(groups * shares, [&](int64_t first, int64_t last) {
    Scratch scratch(2 * width * run.tile_bytes + run.block_rows * run.row_bytes);
    for (int64_t i = first; i < last; i++) {
      int64_t group = i / shares * width, top = i % shares * height;
      if (top < M) run.multiply_columns(p, group, std::min(group + width, columns), top, std::min(top + height, M), scratch.data);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(tisdpo_cpp, m) {
  m.def(
      "statistics(Tensor z, Tensor target, Tensor? ref_z, Tensor? bias, Tensor? ref_bias, str kl, float inner, float outer, bool softcap, "
      "Tensor(a!) out) -> ()");
  m.def(
      "gradient(Tensor z, Tensor target, Tensor? ref_z, Tensor? bias, Tensor? ref_bias, str kl, float inner, float outer, bool softcap, "
      "Tensor lse, Tensor? ref_lse, Tensor? divergence, Tensor? g_logp, Tensor? g_kl, int first, int last, "
      "Tensor(a!) out) -> ()");
  m.def(
      "sequence_sums(Tensor logps, Tensor ref_logps, Tensor? kl, Tensor cu_seqlens, Tensor? token_weights, Tensor? pos_logps, "
      "Tensor? neg_logps, float k, float mu_chosen, float mu_rejected, float lower, float upper, Tensor(a!) sums, Tensor(b!) used) -> ()");
  m.def("spread(Tensor? g_D, Tensor? g_K, Tensor weights, Tensor cu_seqlens, Tensor(a!) out_D, Tensor(b!) out_K) -> ()");
  m.def("mm(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()");
  m.def("interface() -> int");
  m.def("capability() -> str");
  m.def("multiplied() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tisdpo_cpp, CPU, m) {
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("gradient", TORCH_BOX(&gradient));
  m.impl("sequence_sums", TORCH_BOX(&sequence_sums));
  m.impl("spread", TORCH_BOX(&spread));
  m.impl("mm", TORCH_BOX(&mm));
}

STABLE_TORCH_LIBRARY_IMPL(tisdpo_cpp, CompositeExplicitAutograd, m) {
  m.impl("interface", TORCH_BOX(&interface));
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("multiplied", TORCH_BOX(&multiplied));
}
