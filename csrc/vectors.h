// Vectors of LANES floats and how items of every type get there. Included once by each file that has set an instruction set.
//
// Everything is in the anonymous namespace and only compiler builtins are called: a function shared with another file would be linked once,
// perhaps in a version that this CPU cannot run.
#pragma once

#include "fold.h"

namespace tisdpo {
namespace {

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

template <class V>
INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

INLINE Float every(float x) { return x - Float{}; }  // -0.0 stays -0.0

INLINE Float from_bfloat16(Half h) { return (Float)(__builtin_convertvector(h, Bits) << 16); }

INLINE Half to_bfloat16(Float x) {
  Bits u = (Bits)x;
  Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0u, Half);
}

INLINE Float from_float16(Half h) {
  Bits u = __builtin_convertvector(h, Bits);
  Bits magnitude = (u & 0x7fffu) << 13;
  Bits normal = magnitude + (112u << 23);  // the exponents' biases differ by 112
  Bits subnormal = (Bits)((Float)(magnitude + (113u << 23)) - every(0x1p-14f));  // 2^-14 (1 + m / 1024) less 2^-14
  Bits special = magnitude | 0x7f800000u;
  return (Float)((magnitude >= (0x7c00u << 13) ? special : magnitude >= (1u << 23) ? normal : subnormal) | ((u & 0x8000u) << 16));
}

INLINE Half to_float16(Float x) {
  Bits u = (Bits)x & 0x7fffffffu;
  Bits normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  Bits subnormal = (Bits)((Float)u + 0.5f) - (126u << 23);  // adding 1/2 rounds to multiples of 2^-24
  Bits special = u > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  Bits y = u >= 0x47800000u ? special : u < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector(y | (((Bits)x >> 16) & 0x8000u), Half);
}

}  // namespace
}  // namespace tisdpo
