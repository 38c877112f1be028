// What the operators (register.cpp) ask of the kernels (fold_kernels.h), which exist once for every vector width.
#pragma once

#include <cstdint>

// Never a function of its own: that would be linked once for all files, perhaps as compiled for instructions that this CPU has not.
#define INLINE inline __attribute__((always_inline))

namespace tisdpo {

enum class Type { float32, bfloat16, float16 };
enum class KL { none, reverse, forward };

INLINE int64_t bytes(Type type) { return type == Type::float32 ? 4 : 2; }

// Rows of V items, numbered through two dimensions, so that a slice of padded [B, T, V] logits needs no copy.
struct Rows {
  char* data = nullptr;
  Type type = Type::float32;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;  // rows of the inner dimension; strides in items

  INLINE char* row(int64_t r) const { return data + (r / inner * outer_stride + r % inner * inner_stride) * bytes(type); }
};

// The logits of one model: raw rows, its bias [V] or nullptr.
struct Model {
  Rows rows;
  const float* bias = nullptr;
};

// Arguments of both folds. z = inner * raw, or with a soft cap z = outer * tanh(inner * raw). `reference.rows.data` is nullptr without one.
// Vectors have one float a row; a row with a negative target is ignored.
struct Fold {
  Model policy, reference;
  const int64_t* target = nullptr;
  int64_t vocabulary = 0;
  KL kl = KL::none;
  float inner = 1, outer = 1;
  bool softcap = false;
};

struct Statistics {
  float *lse = nullptr, *logp = nullptr, *ref_lse = nullptr, *ref_logp = nullptr, *kl = nullptr;
};

struct Upstream {
  const float* g_logp = nullptr;  // nullptr: ones
  const float* g_kl = nullptr;
};

// The folds over rows begin..end, compiled for one instruction set.
struct Kernels {
  void (*statistics)(const Fold&, const Statistics&, int64_t begin, int64_t end);
  // Columns first..last of the logits, to as many of out.
  void (*gradient)(const Fold&, const Statistics&, const Upstream&, const Rows& out, int64_t first, int64_t last, int64_t begin,
                   int64_t end);
};

extern const Kernels default_kernels, avx2_kernels, avx512_kernels;

}  // namespace tisdpo
