// Vectors of floats as wide as the machine has them, by the compiler's own vector types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <int N>
struct VectorOf {
  typedef float F __attribute__((vector_size(N * 4)));
  typedef float Unaligned __attribute__((vector_size(N * 4), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(N * 4)));
  typedef uint32_t Bits __attribute__((vector_size(N * 4)));
  typedef uint16_t Halves __attribute__((vector_size(N * 2), aligned(2), may_alias));
};

using Vec = VectorOf<kLanes>::F;

template <class V>
constexpr int lanes() {
  return sizeof(V) / sizeof(float);
}

template <class V = Vec>
static inline V load(const float* from) {
  return *reinterpret_cast<const typename VectorOf<lanes<V>()>::Unaligned*>(from);
}

// bfloat16 numbers: the upper halves of floats.
template <class V = Vec>
static inline V load(const uint16_t* from) {
  typedef VectorOf<lanes<V>()> Of;
  const typename Of::Bits bits =
      __builtin_convertvector(*reinterpret_cast<const typename Of::Halves*>(from), typename Of::Bits) << 16;
  V value;
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

template <class V>
static inline void store(float* to, V value) {
  *reinterpret_cast<typename VectorOf<lanes<V>()>::Unaligned*>(to) = value;
}

template <class V = Vec>
static inline V splat(float value) {
  return value - V{};
}

template <class V>
static inline V largest(V a, V b) {
  return a > b ? a : b;
}

// The lanes are added in one fixed order, so that a result never depends on how it was reached.
template <class V>
static inline float sum(V value) {
  float total = 0.0f;
  for (int lane = 0; lane < lanes<V>(); ++lane) total += value[lane];
  return total;
}

template <class V>
static inline float largest_lane(V value) {
  float found = value[0];
  for (int lane = 1; lane < lanes<V>(); ++lane) found = value[lane] > found ? value[lane] : found;
  return found;
}

// e^x within 2 units in the last place; 0 below -87.3, which is what a softmax wants of minus infinity.
// Source: Cody and Waite's reduction, x = n ln 2 + r, and a polynomial of degree 6 for e^r.
template <class V>
static inline V exponential(V x) {
  typedef typename VectorOf<lanes<V>()>::I I;
  const V low = splat<V>(-87.33654f), high = splat<V>(88.37626f);
  const I tiny = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V rounder = splat<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const V shifted = x * 1.44269504f + rounder;
  const V whole = shifted - rounder;
  V r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  V p = splat<V>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I bits = __builtin_convertvector(whole, I);
  bits = (bits + 127) << 23;
  V power;
  std::memcpy(&power, &bits, sizeof(V));
  const V result = p * power;
  return tiny ? V{} : result;
}
