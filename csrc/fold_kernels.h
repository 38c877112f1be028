// The folds over rows of logits, for vectors of LANES floats. Included once by each kernels_*.cpp, which has set the instruction set.
//
// A row is visited in blocks that stay in the first-level cache: a block is read once from memory, widened, biased and scaled, and then
// used as often as needed. Bytes a logit: `item` for the statistics, `item` + the size of D for the gradient, per model. Exponentials a
// logit: one per model for the statistics, one for the gradient (two for forward KL).

#include "vectors.h"

namespace tisdpo {
namespace {

constexpr int64_t BLOCK = 1024;  // logits: 4 KB, with a reference 8 KB
constexpr float INFINITE = __builtin_inff();

INLINE float sum(Float v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// e^x within one rounding error for x <= 88; 0 below the smallest normal number, NaN for NaN.
INLINE Float exp(Float x) {
  constexpr float ROUND = 0x1.8p23f;  // adding it leaves the nearest integer in the last bits
  Float shifted = x * 0x1.715476p0f + ROUND;
  Float n = shifted - ROUND;
  Float r = x - n * 0x1.63p-1f;  // exact: ln 2 in two parts
  r = r - n * -0x1.bd0106p-13f;
  Float p = every(0x1.6a2352p-10f);  // minimax on |r| <= ln(2) / 2, relative error 3e-9
  p = p * r + 0x1.123a6cp-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.55549p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Float y = p * (Float)(((Bits)shifted << 23) + 0x3f800000u);  // times 2^n: what is no number stays none, whatever its bits
  return x < -0x1.5d589ep6f ? Float{} : y;
}

// tanh x: a polynomial near 0, where 1 - e^-2|x| would lose digits.
INLINE Float tanh(Float x) {
  Bits sign = (Bits)x & 0x80000000u;
  Float a = (Float)((Bits)x ^ sign);
  Float e = exp(-2.0f * a);
  Float far = (Float)((Bits)((1.0f - e) / (1.0f + e)) | sign);
  Float s = x * x;
  Float p = every(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  return a < 0.625f ? x + x * (s * p) : far;
}

// n items at p as floats at `to`, and -inf behind them up to a whole vector.
INLINE void widen(const char* p, Type type, int64_t n, float* to) {
  int64_t i = 0;
  char tail[4 * LANES] = {};
  for (; i < n; i += LANES) {
    const char* from = p + i * bytes(type);
    if (i + LANES > n) {
      __builtin_memcpy(tail, from, (n - i) * bytes(type));
      from = tail;
    }
    if (type == Type::float32) store(to + i, load<Float>(from));
    else store(to + i, type == Type::bfloat16 ? from_bfloat16(load<Half>(from)) : from_float16(load<Half>(from)));
  }
  for (int64_t j = n; j < i; j++) to[j] = -INFINITE;
}

// n floats as items at p.
INLINE void narrow(const float* from, int64_t n, Type type, char* p) {
  char tail[4 * LANES];
  for (int64_t i = 0; i < n; i += LANES) {
    Float x = load<Float>(from + i);
    char* to = i + LANES > n ? tail : p + i * bytes(type);
    if (type == Type::float32) store(to, x);
    else store(to, type == Type::bfloat16 ? to_bfloat16(x) : to_float16(x));
    if (to == tail) __builtin_memcpy(p + i * bytes(type), tail, (n - i) * bytes(type));
  }
}

// Transformed logits begin..begin+n of a row, -inf behind them up to a whole vector; in `buffer`, or where they are if nothing changes.
INLINE const float* logits(const Fold& f, const Model& model, int64_t row, int64_t begin, int64_t n, float* buffer) {
  const char* from = model.rows.row(row) + begin * bytes(model.rows.type);
  bool changed = model.bias || f.softcap || f.inner != 1.0f;
  if (!changed && model.rows.type == Type::float32 && n % LANES == 0) return reinterpret_cast<const float*>(from);
  // the type is a constant in each of the three loops
  if (model.rows.type == Type::float32) widen(from, Type::float32, n, buffer);
  else if (model.rows.type == Type::bfloat16) widen(from, Type::bfloat16, n, buffer);
  else widen(from, Type::float16, n, buffer);
  if (!changed) return buffer;
  int64_t whole = n - n % LANES;
  if (model.bias) {
    for (int64_t i = 0; i < whole; i += LANES) store(buffer + i, load<Float>(buffer + i) + load<Float>(model.bias + begin + i));
    for (int64_t i = whole; i < n; i++) buffer[i] += model.bias[begin + i];
  }
  for (int64_t i = 0; i < n; i += LANES) {
    Float x = f.inner * load<Float>(buffer + i);
    store(buffer + i, f.softcap ? f.outer * tanh(x) : x);
  }
  for (int64_t i = n; i % LANES; i++) buffer[i] = -INFINITE;  // the soft cap made a number of it
  return buffer;
}

INLINE float logit(const Fold& f, const Model& model, int64_t row, int64_t column) {
  float buffer[LANES];
  return logits(f, model, row, column, 1, buffer)[0];
}

INLINE float maximum(const float* z, int64_t n) {
  Float a = every(-INFINITE), b = a;
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    Float x = load<Float>(z + i), y = load<Float>(z + i + LANES);
    a = x > a ? x : a;
    b = y > b ? y : b;
  }
  for (; i < n; i += LANES) {
    Float x = load<Float>(z + i);
    a = x > a ? x : a;
  }
  a = b > a ? b : a;
  float largest = a[0];
  for (int k = 1; k < LANES; k++) largest = a[k] > largest ? a[k] : largest;
  return largest;
}

// One model of a row so far: the maximum m of its logits and the sum of e^(z - m).
struct Sum {
  float m = -INFINITE;
  double s = 0;

  // What is subtracted: 0 while everything was -inf, so that -inf - shift stays -inf.
  float shift() const { return m == -INFINITE ? 0 : m; }
  double log() const { return __builtin_log(s); }
};

// Raise the maximum to that of a block; the factor by which the sums so far shrink.
INLINE double raise(Sum& sum, float largest) {
  if (!(largest > sum.m)) return 1;
  double shrink = sum.s == 0 ? 0 : __builtin_exp((double)sum.m - largest);
  sum.m = largest;
  sum.s *= shrink;
  return shrink;
}

INLINE void add_block(Sum& sum, const float* z, int64_t n) {
  raise(sum, maximum(z, n));
  float shift = sum.shift();
  Float s{};
  for (int64_t i = 0; i < n; i += LANES) s += exp(load<Float>(z + i) - shift);
  sum.s += tisdpo::sum(s);
}

// Adds a block to both models and to t = sum e^(z - m) ((z - m) - (q - mq)), a term of KL(z || q), 0 where e^(z - m) is.
INLINE void add_blocks(Sum& sum, Sum& ref, double& t, const float* z, const float* q, int64_t n) {
  double moved = (double)sum.shift() - ref.shift(), s_before = sum.s;
  double shrink = raise(sum, maximum(z, n));
  raise(ref, maximum(q, n));
  float shift = sum.shift(), ref_shift = ref.shift();
  moved -= (double)shift - ref_shift;  // the terms so far, seen from the new maxima
  t = shrink * (t + s_before * moved);
  Float s{}, s_ref{}, terms{};
  for (int64_t i = 0; i < n; i += LANES) {
    Float x = load<Float>(z + i) - shift, y = load<Float>(q + i) - ref_shift;
    Float p = exp(x);
    s += p;
    s_ref += exp(y);
    terms += p > 0.0f ? p * (x - y) : Float{};
  }
  sum.s += tisdpo::sum(s);
  ref.s += tisdpo::sum(s_ref);
  t += tisdpo::sum(terms);
}

void statistics(const Fold& f, const Statistics& out, int64_t begin_row, int64_t end_row) {
  alignas(64) float z_buffer[BLOCK], q_buffer[BLOCK];
  bool has_ref = f.reference.rows.data;
  for (int64_t row = begin_row; row < end_row; row++) {
    int64_t target = f.target[row];
    if (target < 0) {
      for (float* column : {out.lse, out.logp, out.ref_lse, out.ref_logp, out.kl})
        if (column) column[row] = 0;
      continue;
    }
    Sum policy, reference;
    double t = 0;
    for (int64_t begin = 0; begin < f.vocabulary; begin += BLOCK) {
      int64_t n = f.vocabulary - begin < BLOCK ? f.vocabulary - begin : BLOCK;
      const float* z = logits(f, f.policy, row, begin, n, z_buffer);
      const float* q = has_ref ? logits(f, f.reference, row, begin, n, q_buffer) : nullptr;
      if (f.kl == KL::reverse) add_blocks(policy, reference, t, z, q, n);
      else if (f.kl == KL::forward) add_blocks(reference, policy, t, q, z, n);
      else {
        add_block(policy, z, n);
        if (has_ref) add_block(reference, q, n);
      }
    }
    // The target's log-prob is formed from z - m: next to huge logits the log-sum-exp is rounded.
    double log_s = policy.log(), log_q = reference.log();
    out.lse[row] = policy.shift() + log_s;
    out.logp[row] = ((double)logit(f, f.policy, row, target) - policy.shift()) - log_s;
    if (has_ref) {
      out.ref_lse[row] = reference.shift() + log_q;
      out.ref_logp[row] = ((double)logit(f, f.reference, row, target) - reference.shift()) - log_q;
    }
    if (f.kl == KL::reverse) out.kl[row] = t / policy.s - log_s + log_q;
    if (f.kl == KL::forward) out.kl[row] = t / reference.s - log_q + log_s;
  }
}

void gradient(const Fold& f, const Statistics& stats, const Upstream& upstream, const Rows& out, int64_t first, int64_t last,
              int64_t begin_row, int64_t end_row) {
  alignas(64) float z_buffer[BLOCK], q_buffer[BLOCK], d_buffer[BLOCK];
  float slope = f.outer * f.inner;  // dz/d raw, of a soft cap where it is steepest
  for (int64_t row = begin_row; row < end_row; row++) {
    int64_t target = f.target[row], item = bytes(out.type);
    char* out_row = out.row(row);
    if (target < 0) {
      __builtin_memset(out_row, 0, (last - first) * item);
      continue;
    }
    float lse = stats.lse[row], ref_lse = f.kl == KL::none ? 0 : stats.ref_lse[row];
    float g = (upstream.g_logp ? upstream.g_logp[row] : 1) * slope, g_kl = f.kl == KL::none ? 0 : upstream.g_kl[row] * slope;
    float factor = f.kl == KL::reverse ? -g - g_kl * (lse - ref_lse + stats.kl[row]) : g_kl - g;
    for (int64_t begin = first; begin < last; begin += BLOCK) {
      int64_t n = last - begin < BLOCK ? last - begin : BLOCK;
      const float* z = logits(f, f.policy, row, begin, n, z_buffer);
      const float* q = f.kl == KL::none ? nullptr : logits(f, f.reference, row, begin, n, q_buffer);
      // D may lie over z: a vector is read before it is written, and items of D are no wider than those of z
      bool direct = out.type == Type::float32 && n % LANES == 0;
      float* d = direct ? reinterpret_cast<float*>(out_row) + begin - first : d_buffer;
      bool here = begin <= target && target < begin + n;
      if (f.kl == KL::none) {
        for (int64_t i = 0; i < n; i += LANES) store(d + i, exp(load<Float>(z + i) - lse) * factor);
      } else if (f.kl == KL::reverse) {
        for (int64_t i = 0; i < n; i += LANES) {
          Float x = load<Float>(z + i);
          Float p = exp(x - lse);
          store(d + i, p > 0.0f ? p * (g_kl * (x - load<Float>(q + i)) + factor) : p);
        }
      } else {
        for (int64_t i = 0; i < n; i += LANES)
          store(d + i, exp(load<Float>(z + i) - lse) * factor - g_kl * exp(load<Float>(q + i) - ref_lse));
      }
      if (here) d[target - begin] += g;
      if (f.softcap) {  // z is a copy: d did not overwrite it
        for (int64_t i = 0; i < n; i += LANES) {
          Float b = load<Float>(z + i) * (1 / f.outer);
          store(d + i, load<Float>(d + i) * (1.0f - b * b));
        }
      }
      if (!direct) {
        char* to = out_row + (begin - first) * item;
        if (out.type == Type::float32) narrow(d, n, Type::float32, to);
        else if (out.type == Type::bfloat16) narrow(d, n, Type::bfloat16, to);
        else narrow(d, n, Type::float16, to);
      }
    }
  }
}

}  // namespace

extern const Kernels KERNELS{statistics, gradient};

}  // namespace tisdpo
