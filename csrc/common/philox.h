// Counter-based normals, bit for bit the same wherever they are computed: the twin of kernels/philox.py.
//
// Only correctly rounded operations in a fixed order, so no contraction into fused multiply-adds is allowed.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MODAFILL_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MODAFILL_INLINE inline __attribute__((always_inline))
#else
#define MODAFILL_INLINE inline
#endif

namespace modafill {
// Internal linkage: each instruction set compiles its own copy of what is below.
namespace {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// Philox4x32-10 (Salmon et al., SC'11).
MODAFILL_INLINE Words philox(uint64_t seed, Words c) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.w0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c.w2) * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

MODAFILL_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MODAFILL_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MODAFILL_INLINE float square_root(float value) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

// r = sqrt(-2 ln u) of a word, u = w 2^-32 + 2^-33; ln by a minimax polynomial on [sqrt(1/2), sqrt(2)].
MODAFILL_INLINE float radius(uint32_t word) {
  const float u = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
  const int32_t i = static_cast<int32_t>(bits_of(u));
  const int32_t exponent = (i - 0x3F3504F3) >> 23;
  const float x = float_of(static_cast<uint32_t>(i - exponent * (1 << 23))) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float z = x * x;
  float p = 0.0868527889251709f;
  p = p * x + -0.14326858520507812f;
  p = p * x + 0.14948199689388275f;
  p = p * x + -0.16570641100406647f;
  p = p * x + 0.19958797097206116f;
  p = p * x + -0.2500152587890625f;
  p = p * x + 0.3333404064178467f;
  p = p * (x * z);
  p = p + e * -2.12194440e-4f;
  p = p - 0.5f * z;
  return square_root(-2.0f * ((x + p) + e * 0.693359375f));
}

// (cos, sin) of 2 pi w 2^-32: the quadrant comes off exactly, in integers.
MODAFILL_INLINE void circle(uint32_t word, float &cosine, float &sine) {
  const uint32_t quadrant = (word + (1u << 29)) >> 30;
  const float y = static_cast<float>(static_cast<int32_t>(word - (quadrant << 30))) * 0x1p-30f;
  const float t = y * y;
  float s = -0.0045560323633253574f;
  s = s * t + 0.0796605572104454f;
  s = s * t + -0.6459611058235168f;
  s = s * t + 1.570796251296997f;
  s = s * y;
  float c = 0.0008935543592087924f;
  c = c * t + -0.0208552498370409f;
  c = c * t + 0.25366851687431335f;
  c = c * t + -1.2337005138397217f;
  c = c * t + 1.0f;
  const bool swap = quadrant & 1u;
  sine = float_of(bits_of(swap ? c : s) ^ ((quadrant & 2u) << 30));
  cosine = float_of(bits_of(swap ? s : c) ^ (((quadrant + 1u) & 2u) << 30));
}

struct Normals {
  float z0, z1, z2, z3;
};

MODAFILL_INLINE Normals box_muller(Words w) {
  const float r0 = radius(w.w0), r1 = radius(w.w2);
  float cos0, sin0, cos1, sin1;
  circle(w.w1, cos0, sin0);
  circle(w.w3, cos1, sin1);
  return {r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1};
}

enum class Draw : uint32_t { kReverse = 0, kForward = 1, kDropout = 4 };

// The four normals of a quad of elements; `draw` is the fourth counter word, step | draw << 24.
MODAFILL_INLINE Normals normals(uint64_t seed, uint64_t row_id, uint32_t draw, uint32_t quad) {
  return box_muller(philox(seed, {quad, static_cast<uint32_t>(row_id), static_cast<uint32_t>(row_id >> 32), draw}));
}

MODAFILL_INLINE uint32_t draw_word(int64_t step, uint32_t draw) { return static_cast<uint32_t>(step) | draw << 24; }

} // namespace
} // namespace modafill
