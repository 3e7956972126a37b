// What the CPU ops share: element types, noise by the chunk, loops over rows and threads.
#pragma once

#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "ops.h"
#include "philox_lanes.h"

namespace modafill {
// Internal linkage: a copy for each instruction set.
namespace {

// Elements that one thread works on at a time; the noise of a chunk stays in the first-level cache.
constexpr int kChunk = 1024;

// Fewer elements than this do not pay for a second thread.
constexpr int64_t kElementsPerThread = 16384;

// Outputs larger than this leave the caches anyway and are written past them.
constexpr int64_t kStreamedBytes = int64_t{1} << 25;

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Element {
  using Compute = T;
  static MODAFILL_INLINE T load(T value) { return value; }
  static MODAFILL_INLINE T store(T value) { return value; }
};

template <>
struct Element<BFloat16> {
  using Compute = float;
  static MODAFILL_INLINE float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
  // Round to nearest, ties to even; NaN stays NaN.
  static MODAFILL_INLINE BFloat16 store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
  }
};

template <class T>
using Compute = typename Element<T>::Compute;

// out[i] = f(i), i < count; out may be what f reads at i.
template <class T, class F>
MODAFILL_INLINE void fill(T *out, int count, F f) {
#pragma omp simd
  for (int i = 0; i < count; ++i)
    out[i] = Element<T>::store(f(i));
}

// Ask for what is read after the noise is made: memory works while the arithmetic units do.
template <class T>
MODAFILL_INLINE void prefetch(const T *values, int count) {
#ifdef __GNUC__
  for (int i = 0; i < count; i += 64 / sizeof(T))
    __builtin_prefetch(values + i);
  asm volatile(""); // GCC takes the function for one without effect and drops its calls
#endif
}

// Normals of `count` elements of a row from element `begin`, a multiple of 4; z has room for kChunk.
MODAFILL_INLINE void fill_normals(uint64_t seed, uint64_t row_id, uint32_t draw, int64_t begin, int count, float *z) {
  const uint32_t first = static_cast<uint32_t>(begin / 4);
  const int quads = (count + 3) / 4;
  for (int group = 0; group < quads; group += kLanes) {
    LaneWords w;
    philox_lanes(seed,
                 {first + static_cast<uint32_t>(group), static_cast<uint32_t>(row_id),
                  static_cast<uint32_t>(row_id >> 32), draw},
                 w);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const Normals n = box_muller({w.w0[lane], w.w1[lane], w.w2[lane], w.w3[lane]});
      float *quad = z + 4 * (group + lane);
      quad[0] = n.z0;
      quad[1] = n.z1;
      quad[2] = n.z2;
      quad[3] = n.z3;
    }
  }
}

// run(first, last) for runs of `tasks` tasks, dealt out to `team` threads; what one of them throws comes to the caller.
template <class F>
MODAFILL_INLINE void deal_out(int64_t tasks, int64_t team, F run) {
#ifdef _OPENMP
  if (team > 1) {
    std::exception_ptr thrown; // an exception that leaves a parallel region ends the process
#pragma omp parallel num_threads(static_cast<int>(team))
    {
      const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
      try {
        run(tasks * id / count, tasks * (id + 1) / count);
      } catch (...) {
#pragma omp critical(modafill_thrown)
        thrown = std::current_exception();
      }
    }
    if (thrown)
      std::rethrow_exception(thrown);
    return;
  }
#endif
  run(0, tasks);
}

// body(row, begin, count) for every chunk of every row of `width` elements.
template <class F>
MODAFILL_INLINE void for_each_chunk(int64_t batch, int64_t width, int threads, F body) {
  const int64_t chunks = (width + kChunk - 1) / kChunk, tasks = batch * chunks;
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / chunks, begin = task % chunks * kChunk;
      body(row, begin, static_cast<int>(width - begin < kChunk ? width - begin : kChunk));
    }
#ifdef __SSE2__
    // Streaming stores are ordered with nothing that follows, the caller's reads included.
    _mm_sfence();
#endif
  };
  const int64_t useful = batch * width / kElementsPerThread;
  deal_out(tasks, useful < threads ? useful : threads, run);
}

// Where a chunk of output is computed: in place, or beside it and then written past the caches.
template <class T>
class Destination {
public:
  MODAFILL_INLINE Destination(T *out, int64_t total) : out_(out), streamed_(total * sizeof(T) > kStreamedBytes) {}
  MODAFILL_INLINE T *data() { return streamed_ ? staged_ : out_; }
  MODAFILL_INLINE void flush(int count) {
#ifdef __SSE2__
    if (!streamed_)
      return;
    int i = 0;
    for (; i < count && reinterpret_cast<uintptr_t>(out_ + i) % 16; ++i)
      out_[i] = staged_[i];
    constexpr int kVector = 16 / sizeof(T);
    for (; i + kVector <= count; i += kVector)
      _mm_stream_si128(reinterpret_cast<__m128i *>(out_ + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i *>(staged_ + i)));
    for (; i < count; ++i)
      out_[i] = staged_[i];
#endif
  }

private:
  T *out_;
#ifdef __SSE2__
  bool streamed_;
  alignas(64) T staged_[kChunk];
#else
  static constexpr bool streamed_ = false;
  static constexpr T *staged_ = nullptr;
#endif
};

// f(T{}) for the element type that `dtype` names.
template <class F>
MODAFILL_INLINE void for_dtype(DType dtype, F f) {
  switch (dtype) {
  case DType::kFloat64:
    return f(double{});
  case DType::kBFloat16:
    return f(BFloat16{});
  default:
    return f(float{});
  }
}

} // namespace
} // namespace modafill
