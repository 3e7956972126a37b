// Philox for many quads at once. Words live in the low halves of 64-bit lanes, where one instruction multiplies them in
// full; what gathers in the high halves is never read.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "../common/philox.h"

namespace modafill {
namespace {

constexpr int kLanes = 16;

struct alignas(64) LaneWords {
  uint32_t w0[kLanes], w1[kLanes], w2[kLanes], w3[kLanes];
};

#ifdef __SSE2__

#if defined(__AVX512F__)
using Wide = __m512i;
MODAFILL_INLINE Wide broadcast(uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); }
MODAFILL_INLINE Wide add(Wide a, Wide b) { return _mm512_add_epi64(a, b); }
MODAFILL_INLINE Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
MODAFILL_INLINE Wide high(Wide a) { return _mm512_srli_epi64(a, 32); }
MODAFILL_INLINE Wide mix(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Even lanes from `even`, odd lanes from `odd`.
MODAFILL_INLINE Wide weave(Wide even, Wide odd) {
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
#elif defined(__AVX2__)
using Wide = __m256i;
MODAFILL_INLINE Wide broadcast(uint64_t value) { return _mm256_set1_epi64x(static_cast<int64_t>(value)); }
MODAFILL_INLINE Wide add(Wide a, Wide b) { return _mm256_add_epi64(a, b); }
MODAFILL_INLINE Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
MODAFILL_INLINE Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
MODAFILL_INLINE Wide mix(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
MODAFILL_INLINE Wide weave(Wide even, Wide odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
#else
using Wide = __m128i;
MODAFILL_INLINE Wide broadcast(uint64_t value) { return _mm_set1_epi64x(static_cast<int64_t>(value)); }
MODAFILL_INLINE Wide add(Wide a, Wide b) { return _mm_add_epi64(a, b); }
MODAFILL_INLINE Wide multiply(Wide a, Wide b) { return _mm_mul_epu32(a, b); }
MODAFILL_INLINE Wide high(Wide a) { return _mm_srli_epi64(a, 32); }
MODAFILL_INLINE Wide mix(Wide a, Wide b, Wide c) { return _mm_xor_si128(_mm_xor_si128(a, b), c); }
MODAFILL_INLINE Wide weave(Wide even, Wide odd) {
  return _mm_or_si128(_mm_and_si128(even, broadcast(0xFFFFFFFFu)), _mm_slli_epi64(odd, 32));
}
#endif

struct WideWords {
  Wide w0, w1, w2, w3;
};

MODAFILL_INLINE void philox_round(WideWords &c, Wide k0, Wide k1) {
  const Wide p0 = multiply(c.w0, broadcast(0xD2511F53u)), p1 = multiply(c.w2, broadcast(0xCD9E8D57u));
  c = {mix(high(p1), c.w1, k0), p1, mix(high(p0), c.w3, k1), p0};
}

// The words of the kLanes quads that start at `counter`.
MODAFILL_INLINE void philox_lanes(uint64_t seed, Words counter, LaneWords &out) {
  constexpr int kQuads = sizeof(Wide) / sizeof(uint32_t);
  alignas(64) static constexpr uint64_t kEven[8] = {0, 2, 4, 6, 8, 10, 12, 14};
  Wide offsets;
  std::memcpy(&offsets, kEven, sizeof offsets);
  for (int done = 0; done < kLanes; done += kQuads) {
    WideWords even = {add(broadcast(counter.w0 + static_cast<uint32_t>(done)), offsets), broadcast(counter.w1),
                      broadcast(counter.w2), broadcast(counter.w3)};
    WideWords odd = even;
    odd.w0 = add(even.w0, broadcast(1));
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      philox_round(even, broadcast(k0), broadcast(k1));
      philox_round(odd, broadcast(k0), broadcast(k1));
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const auto store = [&](uint32_t *to, Wide words) { std::memcpy(to + done, &words, sizeof words); };
    store(out.w0, weave(even.w0, odd.w0));
    store(out.w1, weave(even.w1, odd.w1));
    store(out.w2, weave(even.w2, odd.w2));
    store(out.w3, weave(even.w3, odd.w3));
  }
}

#else

MODAFILL_INLINE void philox_lanes(uint64_t seed, Words counter, LaneWords &out) {
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) {
    const Words w = philox(seed, {counter.w0 + static_cast<uint32_t>(lane), counter.w1, counter.w2, counter.w3});
    out.w0[lane] = w.w0;
    out.w1[lane] = w.w1;
    out.w2[lane] = w.w2;
    out.w3[lane] = w.w3;
  }
}

#endif

} // namespace
} // namespace modafill
