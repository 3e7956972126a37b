// Two convolutions with a GELU between them, by blocks whose hidden rows stay in the second-level cache.
#include <algorithm>
#include <type_traits>

#include "../common/convolution.h"
#include "conv_few_rows.h"
#include "gelu.h"
#include "matrix.h"

namespace modafill {
namespace {

// Rows of the result that are worked on at a time, and the longest piece of one sample.
constexpr int64_t kBlockRows = 96;
// What a sample is cut into for several threads has no fewer rows, and no fewer multiplications.
constexpr int64_t kPieceRows = 8, kPieceWork = 7 << 19;

// Zeros behind the `count` real columns of a row: what infinity or NaN left there would survive the zero weights that
// it meets next.
template <class C>
MODAFILL_INLINE void clear_padding(C *row, int64_t count) {
  C *const last = row + padded<C>(count) - kWidth<C>;
  store(last, first_lanes<C>(count - (last - row)) ? load(last) : Vector<C>{});
}

// Weights [out, in, taps] as the right operand of a product: rows tap * stride + input, columns output.
template <class T, class C>
MODAFILL_INLINE void pack_weights(C *to, const T *from, int64_t outputs, int64_t inputs, int64_t taps, int64_t stride) {
  if (stride > inputs)
    std::fill_n(to, taps * stride * padded<C>(outputs), C(0));
  pack_transposed<T>(
      to, inputs * taps, outputs, taps * stride, [&](int64_t output) { return from + output * inputs * taps; },
      [&](int64_t i) { return i % taps * stride + i / taps; });
}

template <class T, class C>
void pack_weights(C *to, const void *weights, int64_t outputs, int64_t inputs, int64_t taps, int64_t stride,
                  int threads) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  // A copy takes about as long as three multiplications.
  for_each_run(panels, 3 * outputs * inputs * taps, threads, [=](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanel;
    pack_weights<T>(to + taps * stride * first, static_cast<const T *>(weights) + first * inputs * taps,
                    std::min(outputs, end * kPanel) - first, inputs, taps, stride);
  });
}

// As pack_weights for the way back: rows tap * stride + output, columns input, the taps in the opposite order.
template <class T, class C>
MODAFILL_INLINE void pack_backwards(C *to, const void *weights, int64_t outputs, int64_t inputs, int64_t taps,
                                    int64_t stride) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  for (int64_t first = 0; first < inputs; first += kPanel) {
    const int64_t width = padded<C>(std::min(inputs - first, kPanel)), real = std::min(inputs - first, width);
    std::fill_n(to, taps * stride * width, C(0));
    for (int64_t output = 0; output < outputs; ++output) {
      const T *const from = static_cast<const T *>(weights) + (output * inputs + first) * taps;
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t i = 0; i < real; ++i)
          to[((taps - 1 - tap) * stride + output) * width + i] = Element<T>::load(from[i * taps + tap]);
    }
    to += taps * stride * width;
  }
}

template <class T, class C>
MODAFILL_INLINE void copy_bias(C *to, const void *bias, int64_t count) {
  std::fill_n(to, padded<C>(count), C(0));
  for (int64_t i = 0; bias && i < count; ++i)
    to[i] = Element<T>::load(static_cast<const T *>(bias)[i]);
}

// A batch in pieces: some rows of one sample each; a block is as many of them as fill kBlockRows, or fewer where
// `threads` would not get the same number of blocks each.
struct Pieces {
  int64_t length, rows, per_sample, per_block, count;

  explicit Pieces(const ConvGeluConvArgs &args, int64_t threads = 1, int64_t work = 0) : length(args.length) {
    const int64_t shared =
        std::min({(threads + args.batch - 1) / args.batch, length / kPieceRows, work / args.batch / kPieceWork});
    const int64_t pieces = std::max((length + kBlockRows - 1) / kBlockRows, shared);
    rows = (length + pieces - 1) / pieces;
    per_sample = (length + rows - 1) / rows;
    count = args.batch * per_sample;
    const int64_t most = std::max<int64_t>(1, kBlockRows / rows), least = (count + most - 1) / most;
    const int64_t even = std::min(count, (least + threads - 1) / threads * threads);
    per_block = (count + even - 1) / even;
  }
  // Of `halo` rows at each end of a piece, those that are known to lie outside its sample.
  int64_t around(int64_t halo) const { return per_sample == 1 ? halo : 0; }
  int64_t blocks() const { return (count + per_block - 1) / per_block; }
  int64_t in_block(int64_t block) const { return std::min(per_block, count - block * per_block); }
  int64_t sample(int64_t block, int64_t piece) const { return (block * per_block + piece) / per_sample; }
  int64_t start(int64_t block, int64_t piece) const { return (block * per_block + piece) % per_sample * rows; }

  // Rows [start - before, start - before + pitch) of each piece of a tensor [batch, length, width], zeros outside it.
  template <class T, class C>
  MODAFILL_INLINE void gather(C *to, const T *from, int64_t block, int64_t width, int64_t before, int64_t pitch) const {
    for (int64_t piece = 0; piece < in_block(block); ++piece)
      for (int64_t row = 0; row < pitch; ++row, to += width) {
        const int64_t l = start(block, piece) + row - before;
        const T *const source = from + (sample(block, piece) * length + l) * width;
        if (l < 0 || l >= length)
          std::fill_n(to, width, C(0));
        else
          for (int64_t i = 0; i < width; ++i)
            to[i] = Element<T>::load(source[i]);
      }
  }
};

template <class T>
void conv_gelu_conv_of(const ConvGeluConvArgs &args, int threads) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<T, C>)
    if (has_few_rows(args))
      return few_rows<C>(args, threads);
  const int64_t first_halo = args.first_taps / 2, second_halo = args.second_taps / 2;
  const int64_t hidden = padded<C>(args.hidden), outputs = padded<C>(args.outputs);
  const int64_t first_depth = args.first_taps * args.inputs, second_depth = args.second_taps * hidden;
  const Scratch<C> first(first_depth * hidden), second(second_depth * outputs);
  pack_weights<T>(first.get(), args.first, args.hidden, args.inputs, args.first_taps, args.inputs, threads);
  pack_weights<T>(second.get(), args.second, args.outputs, args.hidden, args.second_taps, hidden, threads);
  const Scratch<C> first_bias(hidden), second_bias(outputs);
  copy_bias<T>(first_bias.get(), args.first_bias, args.hidden);
  copy_bias<T>(second_bias.get(), args.second_bias, args.outputs);
  const int64_t work = args.batch * args.length * (first_depth * args.hidden + second_depth * args.outputs);
  const Pieces pieces(args, std::clamp<int64_t>(work / kWorkPerThread, 1, threads), work);
  const int64_t rows = pieces.rows, hidden_rows = rows + 2 * second_halo, input_rows = hidden_rows + 2 * first_halo;
  const int64_t outside = pieces.around(second_halo);
  for_each_run(pieces.blocks(), work, threads, [&](int64_t begin, int64_t end) {
    const Scratch<C> x(pieces.per_block * input_rows * args.inputs), h(pieces.per_block * hidden_rows * hidden),
        y(pieces.per_block * rows * outputs);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t count = pieces.in_block(block);
      pieces.gather(x.get(), static_cast<const T *>(args.x), block, args.inputs, first_halo + second_halo, input_rows);
      // Rows of neighbouring taps lie behind each other, so a window of them is one long row of the left operand.
      multiply<false>(Product<C>{h.get() + outside * hidden, hidden, x.get() + outside * args.inputs, args.inputs, 1,
                                 first.get(), hidden_rows - 2 * outside, args.hidden, first_depth, args.hidden,
                                 first_depth, count, hidden_rows * hidden, input_rows * args.inputs});
      for (int64_t piece = 0; piece < count; ++piece)
        for (int64_t row = 0; row < hidden_rows; ++row) {
          const int64_t l = pieces.start(block, piece) + row - second_halo;
          C *const to = h.get() + (piece * hidden_rows + row) * hidden;
          if (l < 0 || l >= args.length) {
            std::fill_n(to, hidden, C(0));
            continue;
          }
          for (int64_t i = 0; i < hidden; i += kWidth<C>) {
            const Vector<C> sum = load(to + i) + load(first_bias.get() + i);
            store(to + i, gelu<C>(sum, args.tanh).value);
          }
          clear_padding(to, args.hidden);
        }
      multiply<false>(Product<C>{y.get(), outputs, h.get(), hidden, 1, second.get(), rows, args.outputs, second_depth,
                                 args.outputs, second_depth, count, rows * outputs, hidden_rows * hidden});
      for (int64_t piece = 0; piece < count; ++piece) {
        const int64_t real = std::min(rows, args.length - pieces.start(block, piece));
        T *const out = static_cast<T *>(args.out) +
                       (pieces.sample(block, piece) * args.length + pieces.start(block, piece)) * args.outputs;
        for (int64_t row = 0; row < real; ++row)
          for (int64_t i = 0; i < args.outputs; ++i)
            out[row * args.outputs + i] =
                Element<T>::store(y.get()[(piece * rows + row) * outputs + i] + second_bias.get()[i]);
      }
    }
  });
}

// Backward of one group of blocks at a time; the hidden rows are computed again.
template <class T>
struct Backward {
  using C = Compute<T>;

  const ConvGeluConvBackward &job;
  const ConvGeluConvArgs &args = job.forward;
  const Pieces pieces{args}; // not for several threads: their number is not to change the sums
  const int64_t first_halo = args.first_taps / 2, second_halo = args.second_taps / 2;
  const int64_t halo = std::max(first_halo, second_halo);
  const int64_t inputs = padded<C>(args.inputs), hidden = padded<C>(args.hidden);
  const int64_t rows = pieces.rows, hidden_rows = rows + 2 * halo, outside = pieces.around(halo);
  const int64_t input_rows = hidden_rows + 2 * first_halo, grad_rows = hidden_rows + 2 * second_halo;
  const int64_t first_depth = args.first_taps * args.inputs, grad_depth = args.second_taps * args.outputs;
  const int64_t delta_depth = args.first_taps * hidden;
  const bool need_delta = job.x_grad || job.first_grad || job.first_bias_grad;
  const bool need_hidden = need_delta || job.second_grad;
  // Right operands of the products: of conv 1, and of both convolutions backwards.
  Scratch<C> first{first_depth * hidden}, second_back{grad_depth * hidden}, first_back{delta_depth * inputs},
      first_bias{hidden};

  explicit Backward(const ConvGeluConvBackward &job) : job(job) {
    if (!need_hidden)
      return;
    pack_weights<T>(first.get(), args.first, args.hidden, args.inputs, args.first_taps, args.inputs, 1);
    copy_bias<T>(first_bias.get(), args.first_bias, args.hidden);
    if (need_delta)
      pack_backwards<T>(second_back.get(), args.second, args.outputs, args.hidden, args.second_taps, args.outputs);
    if (job.x_grad)
      pack_backwards<T>(first_back.get(), args.first, args.hidden, args.inputs, args.first_taps, hidden);
  }

  // What a thread needs: of a block, its input, its gradient, its hidden rows, their gradient, and rows of its own.
  struct Rooms {
    Scratch<C> x, grad, h, delta, own, panels, result;

    explicit Rooms(const Backward &b)
        : x(b.pieces.per_block * b.input_rows * b.args.inputs), grad(b.pieces.per_block * b.grad_rows * b.args.outputs),
          h(b.pieces.per_block * b.hidden_rows * b.hidden), delta(b.pieces.per_block * b.hidden_rows * b.hidden),
          own(b.pieces.per_block * b.rows * std::max(b.hidden, b.args.outputs)),
          panels(b.pieces.per_block * b.rows * std::max(b.hidden, b.inputs)),
          result(b.pieces.per_block * b.rows * b.inputs) {}
  };

  // Sums of a group: [taps][outputs, hidden] of the second weights, [taps][hidden, inputs] of the first, and the
  // biases.
  int64_t second_size() const { return job.second_grad ? args.second_taps * args.outputs * hidden : 0; }
  int64_t first_size() const { return job.first_grad ? args.first_taps * hidden * inputs : 0; }
  int64_t group_size() const {
    const bool sums = job.first_grad || job.first_bias_grad || job.second_grad || job.second_bias_grad;
    return sums ? second_size() + first_size() + hidden + padded<C>(args.outputs) : 0;
  }

  void block(int64_t index, const Rooms &r, C *sums) const {
    const int64_t count = pieces.in_block(index);
    C *const second_sum = sums, *const first_sum = second_sum + second_size(),
             *const bias_sum = first_sum + first_size();
    pieces.gather(r.x.get(), static_cast<const T *>(args.x), index, args.inputs, halo + first_halo, input_rows);
    pieces.gather(r.grad.get(), static_cast<const T *>(job.grad), index, args.outputs, halo + second_halo, grad_rows);
    if (need_hidden)
      multiply<false>(Product<C>{r.h.get() + outside * hidden, hidden, r.x.get() + outside * args.inputs, args.inputs,
                                 1, first.get(), hidden_rows - 2 * outside, args.hidden, first_depth, args.hidden,
                                 first_depth, count, hidden_rows * hidden, input_rows * args.inputs});
    if (need_delta)
      multiply<false>(Product<C>{r.delta.get() + outside * hidden, hidden, r.grad.get() + outside * args.outputs,
                                 args.outputs, 1, second_back.get(), hidden_rows - 2 * outside, args.hidden, grad_depth,
                                 args.hidden, grad_depth, count, hidden_rows * hidden, grad_rows * args.outputs});
    for (int64_t piece = 0; piece < count && need_hidden; ++piece)
      for (int64_t row = 0; row < hidden_rows; ++row) {
        const int64_t l = pieces.start(index, piece) + row - halo;
        C *const h = r.h.get() + (piece * hidden_rows + row) * hidden;
        C *const delta = r.delta.get() + (piece * hidden_rows + row) * hidden;
        if (l < 0 || l >= args.length) {
          std::fill_n(h, hidden, C(0));
          std::fill_n(delta, hidden, C(0));
          continue;
        }
        for (int64_t i = 0; i < hidden; i += kWidth<C>) {
          const Gelu<C> g = gelu<C>(load(h + i) + load(first_bias.get() + i), args.tanh);
          store(h + i, g.value);
          if (need_delta)
            store(delta + i, load(delta + i) * g.slope);
        }
        if (need_delta)
          clear_padding(delta, args.hidden);
      }
    if (job.second_grad || job.second_bias_grad)
      own_rows(r.own.get(), r.grad.get(), index, args.outputs, args.outputs, halo + second_halo, grad_rows);
    if (job.second_bias_grad)
      add_rows(bias_sum + hidden, r.own.get(), count * rows, args.outputs);
    for (int64_t tap = 0; tap < args.second_taps && job.second_grad; ++tap)
      add_product(second_sum + tap * args.outputs * hidden, hidden, r, args.outputs, args.outputs, r.h.get(), index,
                  args.hidden, hidden, halo - second_halo + tap, hidden_rows);
    if (job.first_grad || job.first_bias_grad)
      own_rows(r.own.get(), r.delta.get(), index, hidden, hidden, halo, hidden_rows);
    if (job.first_bias_grad)
      add_rows(bias_sum, r.own.get(), count * rows, hidden);
    for (int64_t tap = 0; tap < args.first_taps && job.first_grad; ++tap)
      add_product(first_sum + tap * hidden * inputs, inputs, r, hidden, args.hidden, r.x.get(), index, args.inputs,
                  args.inputs, halo + tap, input_rows);
    if (!job.x_grad)
      return;
    multiply<false>(Product<C>{r.result.get(), inputs, r.delta.get() + (halo - first_halo) * hidden, hidden, 1,
                               first_back.get(), rows, args.inputs, delta_depth, args.inputs, delta_depth, count,
                               rows * inputs, hidden_rows * hidden});
    for (int64_t piece = 0; piece < count; ++piece) {
      const int64_t start = pieces.start(index, piece), real = std::min(rows, args.length - start);
      T *const out = static_cast<T *>(job.x_grad) + (pieces.sample(index, piece) * args.length + start) * args.inputs;
      for (int64_t row = 0; row < real; ++row)
        for (int64_t i = 0; i < args.inputs; ++i)
          out[row * args.inputs + i] = Element<T>::store(r.result.get()[(piece * rows + row) * inputs + i]);
    }
  }

private:
  // The rows of each piece itself, without those around it, behind each other; zeros where the sample ends.
  MODAFILL_INLINE void own_rows(C *to, const C *from, int64_t index, int64_t width, int64_t stride, int64_t before,
                                int64_t pitch) const {
    for (int64_t piece = 0; piece < pieces.in_block(index); ++piece)
      for (int64_t row = 0; row < rows; ++row, to += width) {
        if (pieces.start(index, piece) + row < args.length)
          std::copy_n(from + (piece * pitch + before + row) * stride, width, to);
        else
          std::fill_n(to, width, C(0));
      }
  }

  // sum [m, n] += own [rows, m] transposed times the rows of `from` that begin `before` rows into each piece.
  MODAFILL_INLINE void add_product(C *sum, int64_t sum_row, const Rooms &r, int64_t own_width, int64_t m, const C *from,
                                   int64_t index, int64_t n, int64_t stride, int64_t before, int64_t pitch) const {
    const int64_t all = pieces.in_block(index) * rows;
    pack<C>(r.panels.get(), all, n,
            [&](int64_t row) { return from + (row / rows * pitch + before + row % rows) * stride; });
    multiply<true>(Product<C>{sum, sum_row, r.own.get(), 1, own_width, r.panels.get(), m, n, all, n, all});
  }
};

template <class T>
void conv_gelu_conv_backward_of(const ConvGeluConvBackward &job, int threads) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<T, C>)
    if (has_few_rows(job.forward))
      return few_rows_backward<C>(job, threads);
  const Backward<T> backward(job);
  const ConvGeluConvArgs &args = job.forward;
  const int64_t blocks = backward.pieces.blocks(), size = backward.group_size();
  const int64_t work =
      3 * args.batch * args.length * args.hidden * (args.first_taps * args.inputs + args.second_taps * args.outputs);
  // Without sums a block can go to any thread.
  const int64_t groups = size ? job.groups : blocks;
  const Scratch<C> sums(groups * size);
  for_each_run(groups, work, threads, [&](int64_t begin, int64_t end) {
    const typename Backward<T>::Rooms rooms(backward);
    for (int64_t group = begin; group < end; ++group) {
      std::fill_n(sums.get() + group * size, size, C(0));
      for (int64_t block = blocks * group / groups; block < blocks * (group + 1) / groups; ++block)
        backward.block(block, rooms, sums.get() + group * size);
    }
  });
  const auto total = [&](int64_t at) {
    C sum = sums.get()[at];
    for (int64_t group = 1; group < job.groups; ++group)
      sum += sums.get()[group * size + at];
    return sum;
  };
  // [taps][rows, columns] of the sums to [rows, columns, taps].
  const auto write = [&](void *to, int64_t offset, int64_t rows, int64_t columns, int64_t taps, int64_t row_stride,
                         int64_t tap_stride) {
    if (to)
      for_each_run(rows, rows * columns * taps * job.groups, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t column = 0; column < columns; ++column)
            for (int64_t tap = 0; tap < taps; ++tap)
              static_cast<C *>(to)[(row * columns + column) * taps + tap] =
                  total(offset + tap * tap_stride + row * row_stride + column);
      });
  };
  const int64_t hidden = backward.hidden, inputs = backward.inputs,
                biases = backward.second_size() + backward.first_size();
  write(job.second_grad, 0, args.outputs, args.hidden, args.second_taps, hidden, args.outputs * hidden);
  write(job.first_grad, backward.second_size(), args.hidden, args.inputs, args.first_taps, inputs, hidden * inputs);
  write(job.first_bias_grad, biases, 1, args.hidden, 1, 0, 0);
  write(job.second_bias_grad, biases + hidden, 1, args.outputs, 1, 0, 0);
}

} // namespace

namespace MODAFILL_ISA {

void conv_gelu_conv(const ConvGeluConvArgs &args, int threads) {
  for_dtype(args.dtype, [&](auto element) { conv_gelu_conv_of<decltype(element)>(args, threads); });
}

void conv_gelu_conv_backward(const ConvGeluConvBackward &job, int threads) {
  for_dtype(job.forward.dtype, [&](auto element) { conv_gelu_conv_backward_of<decltype(element)>(job, threads); });
}

} // namespace MODAFILL_ISA
} // namespace modafill
