// The per-element formulas of the step ops and the arguments they take; the twin of modafill/ops/reference.py.
#pragma once

#include <cstdint>

#include "philox.h"

namespace modafill {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum Column : int { kSignal, kSigma, kPosteriorX, kPosteriorEps, kPosteriorStd, kColumns };

constexpr int64_t kMaxStep = (int64_t{1} << 24) - 1;

// A step for all rows, or one for each.
struct Steps {
  const int64_t *values; // null: `value` holds for all rows
  int64_t stride;        // 0 or 1
  int64_t value;
};

// What identifies a row's noise.
struct NoiseKey {
  const int64_t *seeds; // null: `seed`
  int64_t seed;
  const int64_t *row_ids; // null: 0, 1, 2, ...
};

// float32 [last + 1, kColumns].
struct Table {
  const float *values;
  int64_t last;
};

struct MaskedReverseStepArgs {
  DType dtype;
  void *out;
  const void *x, *eps, *observed;
  const bool *available;
  Table table;
  Steps step;
  NoiseKey key;
  int64_t batch, modalities, width;
};

struct DdimStepArgs {
  DType dtype;
  void *out;
  const void *x, *eps;
  Table table;
  Steps step, prev_step;
  double eta, clip; // clip: infinity for none
  NoiseKey key;
  int64_t batch, width;
};

struct AddNoiseArgs {
  DType dtype;
  void *noisy, *noise;
  const void *x;
  Table table;
  Steps step;
  NoiseKey key;
  int64_t batch, width;
};

struct RandnArgs {
  DType dtype;
  void *out;
  Steps step;
  NoiseKey key;
  uint32_t draw;
  int64_t batch, width;
};

namespace {

MODAFILL_INLINE int64_t step_of(const Steps &steps, int64_t row) {
  return steps.values ? steps.values[row * steps.stride] : steps.value;
}

MODAFILL_INLINE uint64_t seed_of(const NoiseKey &key) {
  return static_cast<uint64_t>(key.seeds ? *key.seeds : key.seed);
}

MODAFILL_INLINE uint64_t row_id_of(const NoiseKey &key, int64_t row) {
  return static_cast<uint64_t>(key.row_ids ? key.row_ids[row] : row);
}

MODAFILL_INLINE float not_a_number() { return float_of(0x7FC00000u); }

MODAFILL_INLINE double square_root(double value) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(value);
#else
  return __builtin_sqrt(value);
#endif
}

// ADMC eq. 3 for a missing element, and its forward process one step earlier for an observed one.
template <class C>
struct ReverseRow {
  C x, eps, std, signal, sigma;
  bool noisy;

  MODAFILL_INLINE ReverseRow(const Table &table, int64_t step) {
    const bool inside = step >= 1 && step <= table.last;
    const float *now = table.values + (inside ? step : 0) * kColumns;
    const float *before = table.values + (inside ? step - 1 : 0) * kColumns;
    x = inside ? now[kPosteriorX] : not_a_number();
    eps = now[kPosteriorEps];
    std = now[kPosteriorStd];
    signal = inside ? before[kSignal] : not_a_number();
    sigma = before[kSigma];
    noisy = step > 1;
  }
  MODAFILL_INLINE C generated(C x_n, C eps_n) const { return x * x_n + eps * eps_n; }
  MODAFILL_INLINE C generated(C x_n, C eps_n, C z) const { return generated(x_n, eps_n) + std * z; }
  MODAFILL_INLINE C renoised(C x_0) const { return signal * x_0; }
  MODAFILL_INLINE C renoised(C x_0, C z) const { return renoised(x_0) + sigma * z; }
};

// The forward process at a step.
template <class C>
struct ForwardRow {
  C signal, sigma;

  MODAFILL_INLINE ForwardRow(const Table &table, int64_t step) {
    const bool inside = step >= 1 && step <= table.last;
    const float *now = table.values + (inside ? step : 0) * kColumns;
    signal = inside ? now[kSignal] : not_a_number();
    sigma = inside ? now[kSigma] : not_a_number();
  }
  MODAFILL_INLINE C noisy(C x_0, C z) const { return signal * x_0 + sigma * z; }
};

// CDTP eq. 8-9 with the stride folded into two coefficients where nothing is clipped.
template <class C>
struct DdimRow {
  C signal, sigma, prev_signal, direction, std, x, eps;

  MODAFILL_INLINE DdimRow(const Table &table, int64_t step, int64_t prev_step, C eta) {
    const bool inside = step >= 1 && step <= table.last && prev_step >= 0 && prev_step < step;
    const float *now = table.values + (inside ? step : 1) * kColumns;
    const float *before = table.values + (inside ? prev_step : 0) * kColumns;
    signal = now[kSignal];
    sigma = now[kSigma];
    prev_signal = inside ? before[kSignal] : not_a_number();
    const C prev_sigma = before[kSigma];
    const C ratio = signal / prev_signal;
    // 1 - ratio^2, from whichever column of the table is the more exact one.
    const C spread = prev_sigma < prev_signal
                         ? (sigma - prev_sigma) * (sigma + prev_sigma) / (prev_signal * prev_signal)
                         : C(1) - ratio * ratio;
    std = eta * prev_sigma / sigma * square_root(spread);
    // prev_sigma^2 - std^2 as a sum of squares, which does not cancel.
    const C carried = eta * prev_sigma * prev_sigma * ratio / sigma;
    direction = square_root((C(1) - eta * eta) * (prev_sigma * prev_sigma) + carried * carried);
    x = prev_signal / signal;
    eps = direction - x * sigma;
  }
  MODAFILL_INLINE C folded(C x_t, C eps_t) const { return x * x_t + eps * eps_t; }
  MODAFILL_INLINE C clipped(C x_t, C eps_t, C bound) const {
    C x_0 = (x_t - sigma * eps_t) / signal;
    x_0 = x_0 < -bound ? -bound : x_0 > bound ? bound : x_0;
    return prev_signal * x_0 + direction * ((x_t - signal * x_0) / sigma);
  }
  MODAFILL_INLINE C with_noise(C mean, C z) const { return mean + std * z; }
};

} // namespace
} // namespace modafill
