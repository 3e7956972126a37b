// Two convolutions with a GELU between them for few rows, which do not pay for packing the weights: products read both
// operands along their dense dimension.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/convolution.h"
#include "gelu.h"
#include "matrix.h"

namespace modafill {
namespace {

// Less than 32 rows are few; where a convolution has 32768 weights and more, less than 64 are.
constexpr int64_t kFewRows = 32, kFewForMany = 64, kManyWeights = 1 << 15;

bool has_few_rows(const ConvGeluConvArgs &args) {
  const int64_t most = args.hidden * std::max(args.inputs * args.first_taps, args.outputs * args.second_taps);
  return args.batch * args.length < (most < kManyWeights ? kFewRows : kFewForMany);
}

// Rows of `from` [batch, length, width], `pitch` apart, as weights [out, width, taps] meet them:
// [batch * length, width * taps].
template <class C>
void windows(C *to, const C *from, int64_t rows, int64_t length, int64_t width, int64_t pitch, int64_t taps) {
  for (int64_t row = 0; row < rows; ++row, to += width * taps)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t shift = tap - taps / 2, l = row % length + shift;
      const C *const source = l >= 0 && l < length ? from + (row + shift) * pitch : nullptr;
      for (int64_t i = 0; i < width; ++i)
        to[i * taps + tap] = source ? source[i] : C(0);
    }
}

// Columns [begin, end) of out [m, n] = a [m, k] b [k, n], whose rows are dense and n apart.
template <class C>
void weigh_columns(C *out, const C *a, int64_t a_row, int64_t a_step, const C *b, int64_t m, int64_t n, int64_t k,
                   int64_t begin, int64_t end) {
  for (int64_t term = 0; term == 0 || term < k; term += kTerms) {
    const C *const a_term = a + term * a_step, *const b_term = b + term * n;
    const int64_t terms = std::min(k - term, kTerms);
    int64_t column = begin;
    const auto panels = [&](auto vectors) {
      constexpr int kCount = decltype(vectors)::value;
      for (; column + kCount * kWidth<C> <= end; column += kCount * kWidth<C>) {
        C *const to = out + column;
        if (term)
          multiply_panel<kCount, true>(to, n, a_term, a_row, a_step, b_term + column, m, terms, n);
        else
          multiply_panel<kCount, false>(to, n, a_term, a_row, a_step, b_term + column, m, terms, n);
      }
    };
    panels(std::integral_constant<int, kPanelVectors>{});
    panels(std::integral_constant<int, 1>{});
    for (; column < end; ++column)
      for (int64_t row = 0; row < m; ++row) {
        C sum = 0;
        for (int64_t i = 0; i < terms; ++i)
          sum += a_term[row * a_row + i * a_step] * b_term[i * n + column];
        out[row * n + column] = term ? out[row * n + column] + sum : sum;
      }
  }
}

// run(begin, end) for runs of columns, in whole vectors, of products that take `depth` multiplications a column.
template <class C, class F>
void for_columns(int64_t columns, int64_t depth, int threads, F run) {
  for_each_run((columns + kWidth<C> - 1) / kWidth<C>, columns * depth, threads,
               [=](int64_t begin, int64_t end) { run(begin * kWidth<C>, std::min(columns, end * kWidth<C>)); });
}

// out [m, n] = a b as in weigh_columns.
template <class C>
void weigh(C *out, const C *a, int64_t a_row, int64_t a_step, const C *b, int64_t m, int64_t n, int64_t k,
           int threads) {
  for_columns<C>(n, m * k, threads,
                 [=](int64_t begin, int64_t end) { weigh_columns(out, a, a_row, a_step, b, m, n, k, begin, end); });
}

// The way back of `windows`: of [rows, width * taps] the sums [rows, width] of what each element was copied to.
template <class C>
void unwind(C *to, const C *from, int64_t rows, int64_t length, int64_t width, int64_t taps) {
  for (int64_t row = 0; row < rows; ++row, to += width) {
    std::fill_n(to, width, C(0));
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t shift = tap - taps / 2, l = row % length - shift;
      if (l < 0 || l >= length)
        continue;
      const C *const source = from + (row - shift) * width * taps + tap;
      for (int64_t i = 0; i < width; ++i)
        to[i] += source[i * taps];
    }
  }
}

// What each column of rows [rows, width] sums to.
template <class C>
void sum_rows(void *to, const C *from, int64_t rows, int64_t width) {
  C *const sums = static_cast<C *>(to);
  std::fill_n(sums, width, C(0));
  add_rows(sums, from, rows, width);
}

template <class C>
void few_rows(const ConvGeluConvArgs &args, int threads) {
  const int64_t rows = args.batch * args.length, count = args.hidden, hidden = padded<C>(count);
  const int64_t first_depth = args.inputs * args.first_taps, second_depth = count * args.second_taps;
  const bool first_direct = args.first_taps == 1, second_direct = args.second_taps == 1 && hidden == count;
  const Scratch<C> first_windows(first_direct ? 0 : rows * first_depth), h(rows * hidden),
      second_windows(second_direct ? 0 : rows * second_depth);
  const C *const x = static_cast<const C *>(args.x), *const first = static_cast<const C *>(args.first);
  if (!first_direct)
    windows(first_windows.get(), x, rows, args.length, args.inputs, args.inputs, args.first_taps);
  const C *const a = first_direct ? x : first_windows.get(), *const first_bias =
                                                                 static_cast<const C *>(args.first_bias);
  C *const made = h.get();
  const bool tanh = args.tanh;
  for_columns<C>(count, rows * first_depth, threads, [=](int64_t begin, int64_t end) {
    dot_columns(made, hidden, a, first, first_bias, rows, first_depth, begin, end);
    // What lies behind the last column is read here and nowhere else.
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = begin; i < end; i += kWidth<C>)
        store(made + row * hidden + i, gelu<C>(load(made + row * hidden + i), tanh).value);
  });
  if (!second_direct)
    windows(second_windows.get(), made, rows, args.length, count, hidden, args.second_taps);
  const C *const b = second_direct ? made : second_windows.get();
  C *const out = static_cast<C *>(args.out);
  const C *const second = static_cast<const C *>(args.second), *const second_bias =
                                                                   static_cast<const C *>(args.second_bias);
  const int64_t outputs = args.outputs;
  for_columns<C>(outputs, rows * second_depth, threads, [=](int64_t begin, int64_t end) {
    dot_columns(out, outputs, b, second, second_bias, rows, second_depth, begin, end);
  });
}

// Hidden rows are dense here, and recomputed.
template <class C>
void few_rows_backward(const ConvGeluConvBackward &job, int threads) {
  const ConvGeluConvArgs &args = job.forward;
  const int64_t rows = args.batch * args.length, length = args.length, inputs = args.inputs, hidden = args.hidden,
                outputs = args.outputs, first_depth = inputs * args.first_taps,
                second_depth = hidden * args.second_taps;
  const C *const x = static_cast<const C *>(args.x), *const grad = static_cast<const C *>(job.grad);
  const C *const first = static_cast<const C *>(args.first), *const second = static_cast<const C *>(args.second);
  const bool need_delta = job.x_grad || job.first_grad || job.first_bias_grad, tanh = args.tanh;
  if (job.second_bias_grad)
    sum_rows(job.second_bias_grad, grad, rows, outputs);
  if (!need_delta && !job.second_grad)
    return;
  const Scratch<C> x_windows(args.first_taps == 1 ? 0 : rows * first_depth), pre(rows * hidden + kWidth<C>),
      slope(rows * hidden + kWidth<C>), wide(rows * std::max(first_depth, second_depth)), delta(rows * hidden);
  const C *const a = args.first_taps == 1 ? x : x_windows.get();
  if (args.first_taps > 1)
    windows(x_windows.get(), x, rows, length, inputs, inputs, args.first_taps);
  C *const h = pre.get(), *const slopes = slope.get();
  const C *const first_bias = static_cast<const C *>(args.first_bias);
  for_columns<C>(hidden, rows * first_depth, threads, [=](int64_t begin, int64_t end) {
    dot_columns(h, hidden, a, first, first_bias, rows, first_depth, begin, end);
  });
  for (int64_t i = 0; i < rows * hidden; i += kWidth<C>) {
    const Gelu<C> g = gelu<C>(load(h + i), tanh);
    store(h + i, g.value);
    store(slopes + i, g.slope);
  }
  if (job.second_grad) {
    const C *b = h;
    if (args.second_taps > 1) {
      windows(wide.get(), h, rows, length, hidden, hidden, args.second_taps);
      b = wide.get();
    }
    weigh(static_cast<C *>(job.second_grad), grad, 1, outputs, b, outputs, second_depth, rows, threads);
  }
  if (!need_delta)
    return;
  weigh(wide.get(), grad, outputs, 1, second, rows, second_depth, outputs, threads);
  unwind(delta.get(), wide.get(), rows, length, hidden, args.second_taps);
  for (int64_t i = 0; i < rows * hidden; ++i)
    delta.get()[i] *= slopes[i];
  if (job.first_bias_grad)
    sum_rows(job.first_bias_grad, delta.get(), rows, hidden);
  if (job.first_grad)
    weigh(static_cast<C *>(job.first_grad), delta.get(), 1, hidden, a, hidden, first_depth, rows, threads);
  if (job.x_grad) {
    weigh(wide.get(), delta.get(), hidden, 1, first, rows, first_depth, hidden, threads);
    unwind(static_cast<C *>(job.x_grad), wide.get(), rows, length, inputs, args.first_taps);
  }
}

} // namespace
} // namespace modafill
