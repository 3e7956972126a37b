// Small dense products for ops that keep their operands in the caches. Vectors are the compiler's own, as wide as the
// instruction set's; sums run in a fixed order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "rows.h"

namespace modafill {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kPanelVectors = 3, kRowBlock = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kPanelVectors = 3, kRowBlock = 4;
#else
constexpr int kVectorBytes = 16, kPanelVectors = 2, kRowBlock = 4;
#endif

template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(kVectorBytes), may_alias, aligned(sizeof(C))));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
constexpr int kWidth = kVectorBytes / sizeof(C);

template <class C>
MODAFILL_INLINE Vector<C> load(const C *from) {
  return *reinterpret_cast<const Vector<C> *>(from);
}
template <class C>
MODAFILL_INLINE void store(C *to, Vector<C> value) {
  *reinterpret_cast<Vector<C> *>(to) = value;
}

// One value out of all lanes, by halves.
template <class C, int kBytes = kVectorBytes, class F>
MODAFILL_INLINE C reduce(const C *lanes, F f) {
  if constexpr (kBytes == 2 * sizeof(C)) {
    return f(lanes[0], lanes[1]);
  } else {
    typedef C Part __attribute__((vector_size(kBytes / 2), may_alias, aligned(sizeof(C))));
    Part low, high;
    std::memcpy(&low, lanes, sizeof low);
    std::memcpy(&high, lanes + kBytes / 2 / sizeof(C), sizeof high);
    const Part both = f(low, high);
    return reduce<C, kBytes / 2>(reinterpret_cast<const C *>(&both), f);
  }
}

template <class C>
MODAFILL_INLINE C lanes_sum(Vector<C> value) {
  return reduce(reinterpret_cast<const C *>(&value), [](auto a, auto b) { return a + b; });
}

// The lanes before `count`.
template <class C>
MODAFILL_INLINE auto first_lanes(int64_t count) {
  using Integer = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  typedef Integer Integers __attribute__((vector_size(kVectorBytes)));
  Integers lane;
  for (int i = 0; i < kWidth<C>; ++i)
    lane[i] = i;
  return lane < static_cast<Integer>(count);
}

// The least multiple of a vector's width that holds n.
template <class C>
constexpr int64_t padded(int64_t n) {
  return (n + kWidth<C> - 1) / kWidth<C> * kWidth<C>;
}

// Memory for the length of a call, aligned to cache lines and not cleared.
template <class C>
class Scratch {
public:
  explicit Scratch(int64_t count) : data_(static_cast<C *>(std::aligned_alloc(64, (count * sizeof(C) / 64 + 1) * 64))) {
    if (!data_)
      throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  C *get() const { return data_; }

private:
  C *data_;
};

// sums [width] += each of `count` rows.
template <class C>
MODAFILL_INLINE void add_rows(C *sums, const C *from, int64_t count, int64_t width) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < width; ++i)
      sums[i] += from[row * width + i];
}

// Fewer multiplications than this do not pay for a second thread.
constexpr int64_t kWorkPerThread = 1 << 18;

// run(first, last) for runs of tasks that together take `work` multiplications.
template <class F>
void for_each_run(int64_t tasks, int64_t work, int threads, F run) {
  deal_out(tasks, std::min({tasks, work / kWorkPerThread, static_cast<int64_t>(threads)}), run);
}

// The right operand [k, n] of a product, whose rows lie at row_of(row), as panels of columns, each [k, up to
// kPanelVectors vectors]; columns beyond n are zeros. It takes k * padded(n) elements.
template <class T, class C = Compute<T>, class F>
MODAFILL_INLINE void pack(C *to, int64_t k, int64_t n, F row_of) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t width = padded<C>(n - first < kPanel ? n - first : kPanel);
    const int64_t real = n - first < width ? n - first : width;
    for (int64_t row = 0; row < k; ++row, to += width) {
      const T *const from = row_of(row) + first;
      for (int64_t column = 0; column < real; ++column)
        to[column] = Element<T>::load(from[column]);
      for (int64_t column = real; column < width; ++column)
        to[column] = C(0);
    }
  }
}

#if defined(__GNUC__) && !defined(__clang__)
// A square of vectors becomes its transpose: at each stage, rows a stride apart swap the halves that are off the
// diagonal.
template <class C>
MODAFILL_INLINE void transpose(Vector<C> (&rows)[kWidth<C>]) {
  using Integer = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  typedef Integer Integers __attribute__((vector_size(kVectorBytes)));
#pragma GCC unroll 4
  for (int stride = kWidth<C> / 2; stride; stride /= 2) {
    Integers low, high;
    for (int lane = 0; lane < kWidth<C>; ++lane) {
      low[lane] = lane & stride ? (lane ^ stride) + kWidth<C> : lane;
      high[lane] = lane & stride ? lane + kWidth<C> : lane ^ stride;
    }
#pragma GCC unroll 16
    for (int row = 0; row < kWidth<C>; ++row)
      if (!(row & stride)) {
        const Vector<C> a = rows[row], b = rows[row + stride];
        rows[row] = __builtin_shuffle(a, b, low);
        rows[row + stride] = __builtin_shuffle(a, b, high);
      }
  }
}
#endif

// As `pack` for the transpose of rows [n, k], which are read along their dense dimension: element `row` of a row comes
// to place(row) of `depth` places; what nothing comes to keeps its value.
template <class T, class C = Compute<T>, class F, class P>
MODAFILL_INLINE void pack_transposed(C *to, int64_t k, int64_t n, int64_t depth, F row_of, P place) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t width = padded<C>(n - first < kPanel ? n - first : kPanel);
    const int64_t real = n - first < width ? n - first : width;
    int64_t done = 0; // elements of each row that are in place
#if defined(__GNUC__) && !defined(__clang__)
    if constexpr (std::is_same_v<T, C>) {
      for (; done + kWidth<C> <= k; done += kWidth<C>)
        for (int64_t column = 0; column < width; column += kWidth<C>) {
          Vector<C> square[kWidth<C>];
#pragma GCC unroll 16
          for (int i = 0; i < kWidth<C>; ++i)
            square[i] = column + i < real ? load(row_of(first + column + i) + done) : Vector<C>{};
          transpose<C>(square);
#pragma GCC unroll 16
          for (int i = 0; i < kWidth<C>; ++i)
            store(to + place(done + i) * width + column, square[i]);
        }
    }
#endif
    for (int64_t column = 0; column < width; ++column)
      for (int64_t row = done; row < k; ++row)
        to[place(row) * width + column] = column < real ? Element<T>::load(row_of(first + column)[row]) : C(0);
    to += depth * width;
  }
}

template <class T, class C = Compute<T>, class F>
MODAFILL_INLINE void pack_transposed(C *to, int64_t k, int64_t n, F row_of) {
  pack_transposed<T>(to, k, n, k, row_of, [](int64_t row) { return row; });
}

// kRows rows of out (+)= a b for one panel of kVectors vectors, whose rows are panel_row apart. a(row, i) lies at
// a[row * a_row + i * a_step].
template <int kRows, int kVectors, bool kAdd, class C>
MODAFILL_INLINE void multiply_block(C *out, int64_t out_row, const C *a, int64_t a_row, int64_t a_step, const C *panel,
                                    int64_t k, int64_t panel_row) {
  Vector<C> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sum[row][v] = Vector<C>{};
  for (int64_t i = 0; i < k; ++i, panel += panel_row, a += a_step) {
    Vector<C> b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      b[v] = load(panel + v * kWidth<C>);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[row][v] += a[row * a_row] * b[v];
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store(out + row * out_row + v * kWidth<C>,
            kAdd ? load(out + row * out_row + v * kWidth<C>) + sum[row][v] : sum[row][v]);
}

template <int kVectors, bool kAdd, class C>
MODAFILL_INLINE void multiply_panel(C *out, int64_t out_row, const C *a, int64_t a_row, int64_t a_step, const C *panel,
                                    int64_t m, int64_t k, int64_t panel_row = kVectors * kWidth<C>) {
  int64_t row = 0;
  const auto block = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    for (; row + kRows <= m; row += kRows)
      multiply_block<kRows, kVectors, kAdd>(out + row * out_row, out_row, a + row * a_row, a_row, a_step, panel, k,
                                            panel_row);
  };
  block(std::integral_constant<int, kRowBlock>{});
  if constexpr (kRowBlock > 4)
    block(std::integral_constant<int, 4>{});
  block(std::integral_constant<int, 2>{});
  block(std::integral_constant<int, 1>{});
}

// The operands of out [m, n] (+)= a [m, k] b, for several pieces of out and a in turn that share b.
template <class C>
struct Product {
  C *out;
  int64_t out_row;
  const C *a;
  int64_t a_row, a_step; // a(row, i) lies at a[row * a_row + i * a_step]
  const C *b;
  int64_t m, n, k;
  int64_t b_columns, b_rows; // that b was packed with, at least n and k
  int64_t pieces = 1, out_piece = 0, a_piece = 0;
};

// Terms that are summed in one register: longer sums are sums of such sums, which keeps their rounding errors small.
constexpr int64_t kTerms = 256;

// What is written behind column n stays within padded(b_columns).
template <bool kAdd, class C>
MODAFILL_INLINE void multiply(const Product<C> &p) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  const C *b = p.b;
  for (int64_t first = 0; first < p.n; first += kPanel) {
    const int64_t vectors = padded<C>(std::min(p.b_columns - first, kPanel)) / kWidth<C>;
    for (int64_t term = 0; term == 0 || term < p.k; term += kTerms) {
      const C *const panel = b + term * vectors * kWidth<C>;
      const int64_t terms = std::min(p.k - term, kTerms);
      for (int64_t piece = 0; piece < p.pieces; ++piece) {
        C *const out = p.out + piece * p.out_piece + first;
        const C *const a = p.a + piece * p.a_piece + term * p.a_step;
        const auto run = [&](auto count) {
          if (kAdd || term)
            multiply_panel<decltype(count)::value, true>(out, p.out_row, a, p.a_row, p.a_step, panel, p.m, terms);
          else
            multiply_panel<decltype(count)::value, false>(out, p.out_row, a, p.a_row, p.a_step, panel, p.m, terms);
        };
        if (vectors == 1)
          run(std::integral_constant<int, 1>{});
        else if (vectors == 2)
          run(std::integral_constant<int, 2>{});
        else
          run(std::integral_constant<int, kPanelVectors>{});
      }
    }
    b += p.b_rows * vectors * kWidth<C>;
  }
}

// out[row, o] = a[row] b[o] + bias[o] for kRows rows of a and kOuts of b, each of `k` elements.
template <int kRows, int kOuts, class C>
MODAFILL_INLINE void dot_products(C *out, int64_t out_row, const C *a, const C *b, const C *bias, int64_t k) {
  Vector<C> sum[kRows][kOuts];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o)
      sum[row][o] = Vector<C>{};
  int64_t i = 0;
  for (; i + kWidth<C> <= k; i += kWidth<C>) {
    Vector<C> weights[kOuts];
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o)
      weights[o] = load(b + o * k + i);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Vector<C> value = load(a + row * k + i);
#pragma GCC unroll 4
      for (int o = 0; o < kOuts; ++o)
        sum[row][o] += value * weights[o];
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int o = 0; o < kOuts; ++o) {
      C total = lanes_sum<C>(sum[row][o]);
      for (int64_t j = i; j < k; ++j)
        total += a[row * k + j] * b[o * k + j];
      out[row * out_row + o] = bias ? total + bias[o] : total;
    }
}

template <int kOuts, class C>
MODAFILL_INLINE void dot_rows(C *out, int64_t out_row, const C *a, const C *b, const C *bias, int64_t rows, int64_t k) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    dot_products<4, kOuts>(out + row * out_row, out_row, a + row * k, b, bias, k);
  for (; row < rows; ++row)
    dot_products<1, kOuts>(out + row * out_row, out_row, a + row * k, b, bias, k);
}

// Columns [begin, end) of out [rows, ...] = a [rows, k] times b [..., k] transposed, plus the bias.
template <class C>
void dot_columns(C *out, int64_t out_row, const C *a, const C *b, const C *bias, int64_t rows, int64_t k, int64_t begin,
                 int64_t end) {
  constexpr int kOuts = kVectorBytes == 64 ? 4 : 2; // what the registers hold
  int64_t o = begin;
  for (; o + kOuts <= end; o += kOuts)
    dot_rows<kOuts>(out + o, out_row, a, b + o * k, bias ? bias + o : nullptr, rows, k);
  for (; o < end; ++o)
    dot_rows<1>(out + o, out_row, a, b + o * k, bias ? bias + o : nullptr, rows, k);
}

// e^x for x that is not large: 0 below the range of normal numbers, within 2 units in the last place above it.
// Its integers are unsigned: those of a NaN overflow.
MODAFILL_INLINE Vector<float> exponential(Vector<float> x) {
  typedef uint32_t Integers __attribute__((vector_size(kVectorBytes)));
  const Vector<float> low = Vector<float>{} - 87.33654f;
  const Vector<float> bounded = x < low ? low : x;
  const Vector<float> shifted = bounded * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the integer lands in the low bits
  const Vector<float> n = shifted - 12582912.0f;
  const Vector<float> r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers power = (reinterpret_cast<Integers>(shifted) + 127u) << 23;
  const Vector<float> result = p * reinterpret_cast<Vector<float>>(power);
  return x < low ? Vector<float>{} : result;
}

MODAFILL_INLINE Vector<double> exponential(Vector<double> x) {
  typedef uint64_t Integers __attribute__((vector_size(kVectorBytes)));
  const Vector<double> low = Vector<double>{} - 708.39641853226408;
  const Vector<double> bounded = x < low ? low : x;
  const Vector<double> shifted = bounded * 1.4426950408889634 + 6755399441055744.0; // 1.5 * 2^52
  const Vector<double> n = shifted - 6755399441055744.0;
  const Vector<double> r = (bounded - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  // Taylor to degree 13: the remainder on |r| < ln(2) / 2 is below the rounding.
  Vector<double> p = Vector<double>{} + 1.0 / 6227020800.0;
  constexpr double kFactors[] = {1.0 / 479001600.0,
                                 1.0 / 39916800.0,
                                 1.0 / 3628800.0,
                                 1.0 / 362880.0,
                                 1.0 / 40320.0,
                                 1.0 / 5040.0,
                                 1.0 / 720.0,
                                 1.0 / 120.0,
                                 1.0 / 24.0,
                                 1.0 / 6.0,
                                 0.5,
                                 1.0,
                                 1.0};
#pragma GCC unroll 13
  for (int i = 0; i < 13; ++i)
    p = p * r + kFactors[i];
  const Integers power = (reinterpret_cast<Integers>(shifted) + 1023u) << 52;
  const Vector<double> result = p * reinterpret_cast<Vector<double>>(power);
  return x < low ? Vector<double>{} : result;
}

} // namespace
} // namespace modafill
