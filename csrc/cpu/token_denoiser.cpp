// A pre-norm transformer over the few tokens of each sample, all layers in one call. A thread takes some samples
// through every layer, so that what lies between the layers stays in its second-level cache; where samples are too few
// for that, the threads share each product's columns.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>

#include "../common/tokens.h"
#include "gelu.h"
#include "matrix.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace modafill {
namespace {

// Tokens that a thread takes through the network at a time.
constexpr int64_t kBlockTokens = 96;
// So few tokens do not pay for packing the weights.
constexpr int64_t kFewTokens = 24;

// How weights [n, k] lie: as they come, as `pack` lays them out, or so that each element is a pair of bfloat16 that
// follow each other along k.
enum class Layout { kRows, kPanels, kPairs };

// out [rows, n] = a [rows, k] times weight [n, k] transposed, plus the bias.
template <class C>
struct Linear {
  const C *weight, *bias;
  int64_t n, k;
};

template <class C>
struct Norm {
  const C *weight, *bias;
};

template <class C>
struct Layer {
  Norm<C> before_attention;
  Linear<C> query, key_value, attention_out;
  Norm<C> before_feedforward;
  Linear<C> first, second;
};

template <class C>
struct Network {
  Linear<C> in; // without weights where nothing is projected
  std::vector<Layer<C>> layers;
  Norm<C> norm;
  Linear<C> out;
};

// The network whose tensors are what matrix(source, n, k) and vector(source, n) make of those of `args`, in order.
template <class W, class M, class V>
auto assemble(const TokenDenoiserArgs &args, M matrix, V vector) {
  using C = std::remove_const_t<std::remove_pointer_t<decltype(vector(static_cast<const W *>(nullptr), 0))>>;
  size_t at = 0;
  const auto next = [&] { return static_cast<const W *>(args.weights[at++]); };
  const int64_t d = args.channels;
  const auto linear = [&](int64_t n, int64_t k) {
    const W *const weight = next(), *const bias = next();
    const C *const w = matrix(weight, n, k);
    return Linear<C>{w, vector(bias, n), n, k};
  };
  const auto norm = [&] {
    const C *const weight = static_cast<const C *>(args.weights[at++]);
    const C *const bias = static_cast<const C *>(args.weights[at++]);
    const C *const w = vector(weight, d);
    return Norm<C>{w, vector(bias, d)};
  };
  Network<C> net{};
  if (args.weights[0])
    net.in = linear(d, args.width);
  else
    at = 2;
  for (int64_t i = 0; i < args.layers; ++i) {
    Layer<C> layer{};
    layer.before_attention = norm();
    const W *const weight = next(), *const bias = next();
    const C *const query = matrix(weight, d, d);
    layer.query = {query, vector(bias, d), d, d};
    const C *const key_value = matrix(weight + d * d, 2 * d, d);
    layer.key_value = {key_value, vector(bias + d, 2 * d), 2 * d, d};
    layer.attention_out = linear(d, d);
    layer.before_feedforward = norm();
    layer.first = linear(args.hidden, d);
    layer.second = linear(d, args.hidden);
    net.layers.push_back(layer);
  }
  net.norm = norm();
  net.out = linear(args.width, d);
  return net;
}

// Pairs of weights [n, k] as a right operand [k / 2, n], in panels.
template <class C>
void pack_pairs(C *to, const BFloat16 *weights, int64_t n, int64_t k) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  static_assert(sizeof(C) == 2 * sizeof(BFloat16));
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t width = padded<C>(std::min(n - first, kPanel));
    std::fill_n(to, (k + 1) / 2 * width, C(0));
    for (int64_t column = 0; column < std::min(n - first, width); ++column)
      for (int64_t i = 0; i < k; i += 2)
        std::memcpy(to + i / 2 * width + column, weights + (first + column) * k + i,
                    std::min<int64_t>(2, k - i) * sizeof(BFloat16));
    to += (k + 1) / 2 * width;
  }
}

// The network in the buffer `packed`, or where it would lie if that is null; `write` fills the buffer.
template <class C, class W>
Network<C> in_buffer(const TokenDenoiserArgs &args, C *packed, bool write, int64_t *size = nullptr) {
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    C *const at = packed ? packed + used : nullptr;
    used += count;
    return at;
  };
  const auto net = assemble<W>(
      args,
      [&](const W *source, int64_t n, int64_t k) -> const C * {
        C *const at = take((args.pairs ? (k + 1) / 2 : k) * padded<C>(n));
        if constexpr (std::is_same_v<W, BFloat16>)
          if (write && args.pairs) {
            pack_pairs(at, source, n, k);
            return at;
          }
        if (write)
          pack_transposed<W>(at, k, n, [&](int64_t row) { return source + row * k; });
        return at;
      },
      [&](auto *source, int64_t n) -> const C * {
        C *const at = take(padded<C>(n));
        for (int64_t i = 0; write && i < padded<C>(n); ++i)
          at[i] = i < n ? Element<std::remove_const_t<std::remove_pointer_t<decltype(source)>>>::load(source[i]) : C(0);
        return at;
      });
  if (size)
    *size = used;
  return net;
}

// One of the threads that work on the same rows.
struct Worker {
  int64_t id, team;
  // All of them have done what comes before.
  MODAFILL_INLINE void wait() const {
#ifdef _OPENMP
    if (team > 1) {
#pragma omp barrier
    }
#endif
  }
  // The runs of `count` things that this one does.
  template <class F>
  MODAFILL_INLINE void share(int64_t count, F run) const {
    run(count * id / team, count * (id + 1) / team);
  }
};

// What each worker has for itself.
template <class C>
struct Private {
  Scratch<C> given, normed, spare, scores;
  Scratch<uint32_t> pairs;
  Private(const TokenDenoiserArgs &args, int64_t tokens)
      : given(tokens * padded<C>(args.width)), normed(tokens * padded<C>(args.channels)), spare(tokens * widest(args)),
        scores(args.tokens), pairs(args.pairs ? tokens * widest(args) / 2 + 1 : 0) {}

private:
  static int64_t widest(const TokenDenoiserArgs &args) {
    return padded<C>(std::max({args.channels, args.hidden, args.width}));
  }
};

#ifdef __AVX512BF16__
// As multiply_block, for pairs.
template <int kRows, int kVectors>
MODAFILL_INLINE void multiply_pairs(float *out, int64_t out_row, const uint32_t *a, int64_t a_row, const float *panel,
                                    int64_t pairs) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sum[row][v] = _mm512_loadu_ps(out + row * out_row + 16 * v);
  for (int64_t i = 0; i < pairs; ++i, panel += 16 * kVectors) {
    __m512 b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      b[v] = _mm512_loadu_ps(panel + 16 * v);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(a[row * a_row + i]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[row][v] = _mm512_dpbf16_ps(sum[row][v], (__m512bh)pair, (__m512bh)b[v]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(out + row * out_row + 16 * v, sum[row][v]);
}

template <int kVectors>
MODAFILL_INLINE void multiply_pair_panel(float *out, int64_t out_row, const uint32_t *a, int64_t a_row,
                                         const float *panel, int64_t rows, int64_t pairs) {
  int64_t row = 0;
  const auto block = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; row + kRows <= rows; row += kRows)
      multiply_pairs<kRows, kVectors>(out + row * out_row, out_row, a + row * a_row, a_row, panel, pairs);
  };
  block(std::integral_constant<int, 8>{});
  block(std::integral_constant<int, 4>{});
  block(std::integral_constant<int, 1>{});
}
#endif

// Rows of `a`, padded(k) apart, rounded to pairs of bfloat16.
template <class C>
MODAFILL_INLINE void round_to_pairs(uint32_t *to, const C *a, int64_t rows, int64_t k) {
  const int64_t pairs = (k + 1) / 2;
  for (int64_t row = 0; row < rows; ++row, a += padded<C>(k), to += pairs) {
    for (int64_t i = 0; i < k / 2; ++i)
      to[i] = Element<BFloat16>::store(a[2 * i]).bits |
              static_cast<uint32_t>(Element<BFloat16>::store(a[2 * i + 1]).bits) << 16;
    if (k % 2)
      to[pairs - 1] = Element<BFloat16>::store(a[k - 1]).bits;
  }
}

// This worker's columns of out [rows, n] (+)= linear(a), then finish(column, end) for each run of them. Rows of `out`
// and `a` lie padded(n) and padded(k) apart.
template <bool kAdd, Layout kLayout, class C, class F>
MODAFILL_INLINE void apply(const Linear<C> &linear, C *out, const C *a, int64_t rows, const Private<C> &own,
                           Worker worker, F finish) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  const int64_t out_row = padded<C>(linear.n), a_row = padded<C>(linear.k), pairs = (linear.k + 1) / 2;
  if constexpr (kLayout == Layout::kRows) {
    // Rows are dense: every size is a multiple of a vector's.
    C *const spare = own.spare.get();
    worker.share(linear.n / kWidth<C>, [&](int64_t begin, int64_t end) {
      begin *= kWidth<C>, end *= kWidth<C>;
      dot_columns(kAdd ? spare : out, out_row, a, linear.weight, linear.bias, rows, linear.k, begin, end);
      for (int64_t row = 0; kAdd && row < rows; ++row)
        for (int64_t i = begin; i < end; i += kWidth<C>)
          store(out + row * out_row + i, load(out + row * out_row + i) + load(spare + row * out_row + i));
      finish(begin, end);
    });
    return;
  }
  if constexpr (kLayout == Layout::kPairs)
    round_to_pairs(own.pairs.get(), a, rows, linear.k);
  worker.share((linear.n + kPanel - 1) / kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kPanel; first < std::min(linear.n, end * kPanel); first += kPanel) {
      const int64_t columns = padded<C>(std::min(linear.n - first, kPanel));
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = first; i < first + columns; i += kWidth<C>) {
          const Vector<C> bias = load(linear.bias + i);
          store(out + row * out_row + i, kAdd ? load(out + row * out_row + i) + bias : bias);
        }
      const auto multiply = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        for (int64_t term = 0; term < linear.k; term += kTerms) {
          const int64_t terms = std::min(linear.k - term, kTerms);
          if constexpr (kLayout == Layout::kPanels)
            multiply_panel<kVectors, true>(out + first, out_row, a + term, a_row, 1,
                                           linear.weight + linear.k * first + term * columns, rows, terms);
#ifdef __AVX512BF16__
          else if constexpr (kLayout == Layout::kPairs)
            multiply_pair_panel<kVectors>(out + first, out_row, own.pairs.get() + term / 2, pairs,
                                          linear.weight + pairs * first + term / 2 * columns, rows, (terms + 1) / 2);
#endif
        }
      };
      if (columns == kWidth<C>)
        multiply(std::integral_constant<int, 1>{});
      else if (columns == 2 * kWidth<C>)
        multiply(std::integral_constant<int, 2>{});
      else
        multiply(std::integral_constant<int, kPanelVectors>{});
      finish(first, first + columns);
    }
  });
}

// out [rows, ...] = the normalised rows of x; both lie padded(d) apart.
template <class C>
MODAFILL_INLINE void normalise(C *out, const C *x, const Norm<C> &norm, int64_t rows, int64_t d, C epsilon) {
  for (int64_t row = 0; row < rows; ++row, x += padded<C>(d), out += padded<C>(d)) {
    C sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i)
      sum += x[i];
    const C mean = sum / static_cast<C>(d);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < d; ++i)
      squares += (x[i] - mean) * (x[i] - mean);
    const C scale = C(1) / std::sqrt(squares / static_cast<C>(d) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i)
      out[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
  }
}

// One head of one query against the tokens of its sample, whose keys and values lie `step` apart.
template <class C>
MODAFILL_INLINE void attend(C *out, const C *q, const C *k, const C *v, C *scores, int64_t tokens, int64_t step,
                            int64_t width, C scale) {
  C largest = -INFINITY, total = 0;
  for (int64_t token = 0; token < tokens; ++token) {
    const C *const key = k + token * step;
    C score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t i = 0; i < width; ++i)
      score += q[i] * key[i];
    scores[token] = score * scale;
    largest = std::max(largest, scores[token]);
  }
  for (int64_t token = 0; token < tokens; ++token) {
    scores[token] = std::exp(scores[token] - largest);
    total += scores[token];
  }
  for (int64_t token = 0; token < tokens; ++token) {
    const C weight = scores[token] / total;
    const C *const value = v + token * step;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      out[i] = token ? out[i] + weight * value[i] : weight * value[i];
  }
}

// What the threads that work on the same samples share, for so many tokens.
template <class C>
struct Shared {
  Scratch<C> h, query, key_value, attended, kept, hidden, out;
  std::vector<int64_t> missing; // tokens
  Shared(const TokenDenoiserArgs &args, int64_t tokens)
      : h(tokens * padded<C>(args.channels)), query(tokens * padded<C>(args.channels)),
        key_value(tokens * padded<C>(2 * args.channels)), attended(tokens * padded<C>(args.channels)),
        kept(tokens * padded<C>(args.channels)), hidden(tokens * padded<C>(args.hidden)),
        out(tokens * padded<C>(args.width)) {
    missing.reserve(tokens);
  }
};

// The network for samples `rows[0...count)` of the batch, by all workers of a team. `shared` knows what is missing.
template <Layout kLayout, class C>
void denoise(const TokenDenoiserArgs &args, const Network<C> &net, const int64_t *rows, int64_t count,
             const Shared<C> &shared, const Private<C> &own, Worker worker) {
  const int64_t d = args.channels, pitch = padded<C>(d), wide = padded<C>(2 * d), m = args.tokens, w = args.width;
  const int64_t tokens = count * m, head = d / args.heads, kept = static_cast<int64_t>(shared.missing.size());
  const C epsilon = static_cast<C>(args.epsilon), scale = C(1) / std::sqrt(static_cast<C>(head));
  C *const normed = own.normed.get(), *h = shared.h.get();
  const int64_t *const missing = shared.missing.data();
  const auto nothing = [](int64_t, int64_t) {};
  const auto sample = [&](int64_t token) { return rows[token / m]; };

  // Tokens of the samples, projected, and what is added to them.
  const C *const x = static_cast<const C *>(args.x);
  const auto added = [&](int64_t begin, int64_t end) {
    for (int64_t token = 0; token < tokens; ++token) {
      const C *const from =
          static_cast<const C *>(args.added) + (2 * (token % m) + args.available[sample(token) * m + token % m]) * d;
      for (int64_t i = begin; i < std::min(end, d); ++i)
        h[token * pitch + i] += from[i];
    }
  };
  if (net.in.weight) {
    for (int64_t token = 0; token < tokens; ++token)
      std::copy_n(x + (sample(token) * m + token % m) * w, w, own.given.get() + token * padded<C>(w));
    apply<false, kLayout>(net.in, h, own.given.get(), tokens, own, worker, added);
  } else {
    worker.share(tokens, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        std::copy_n(x + (sample(token) * m + token % m) * w, w, h + token * pitch);
    });
    worker.wait();
    worker.share(d, added);
  }
  worker.wait();

  for (size_t index = 0; index < net.layers.size(); ++index) {
    const Layer<C> &layer = net.layers[index];
    const bool last = index + 1 == net.layers.size();
    const int64_t queries = last ? kept : tokens;
    const auto token_of = [&](int64_t query) { return last ? missing[query] : query; };
    normalise(normed, h, layer.before_attention, tokens, d, epsilon);
    C *const key_value = shared.key_value.get(), *const attended = shared.attended.get();
    apply<false, kLayout>(layer.key_value, key_value, normed, tokens, own, worker, nothing);
    for (int64_t query = 0; last && query < kept; ++query)
      std::copy_n(normed + missing[query] * pitch, missing[query] > query ? d : 0, normed + query * pitch);
    apply<false, kLayout>(layer.query, shared.query.get(), normed, queries, own, worker, nothing);
    worker.wait();
    worker.share(args.heads, [&](int64_t begin, int64_t end) {
      for (int64_t query = 0; query < queries; ++query)
        for (int64_t i = begin * head; i < end * head; i += head) {
          const C *const keys = key_value + token_of(query) / m * m * wide + i;
          attend(attended + query * pitch + i, shared.query.get() + query * pitch + i, keys, keys + d, own.scores.get(),
                 m, wide, head, scale);
        }
    });
    if (last) {
      // Nobody reads the observed tokens any more.
      worker.share(kept, [&](int64_t begin, int64_t end) {
        for (int64_t query = begin; query < end; ++query)
          std::copy_n(h + missing[query] * pitch, d, shared.kept.get() + query * pitch);
      });
      h = shared.kept.get();
    }
    worker.wait();
    apply<true, kLayout>(layer.attention_out, h, attended, queries, own, worker, nothing);
    worker.wait();
    normalise(normed, h, layer.before_feedforward, queries, d, epsilon);
    C *const hidden = shared.hidden.get();
    const int64_t hidden_row = padded<C>(args.hidden);
    apply<false, kLayout>(layer.first, hidden, normed, queries, own, worker, [&](int64_t begin, int64_t end) {
      for (int64_t query = 0; query < queries; ++query)
        for (int64_t i = begin; i < end; i += kWidth<C>) {
          C *const at = hidden + query * hidden_row + i;
          store(at, gelu<C>(load(at), false).value);
        }
    });
    worker.wait();
    apply<true, kLayout>(layer.second, h, hidden, queries, own, worker, nothing);
    worker.wait();
  }

  normalise(normed, h, net.norm, kept, d, epsilon);
  C *const said = shared.out.get();
  apply<false, kLayout>(net.out, said, normed, kept, own, worker, [&](int64_t begin, int64_t end) {
    for (int64_t query = 0; query < kept; ++query) {
      const int64_t token = missing[query];
      C *const to = static_cast<C *>(args.out) + (sample(token) * m + token % m) * w;
      for (int64_t i = begin; i < std::min(end, w); ++i)
        to[i] = said[query * padded<C>(w) + i];
    }
  });
}

template <class C>
void find_missing(const TokenDenoiserArgs &args, Shared<C> &shared, const int64_t *rows, int64_t count) {
  shared.missing.clear();
  for (int64_t token = 0; token < count * args.tokens; ++token)
    if (!args.available[rows[token / args.tokens] * args.tokens + token % args.tokens])
      shared.missing.push_back(token);
}

template <class C, class W>
void token_denoiser_of(const TokenDenoiserArgs &args, int threads) {
#ifndef __AVX512BF16__
  if (args.pairs)
    throw std::invalid_argument("pairs: this build or processor has no products of bfloat16");
#endif
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < args.batch; ++row) {
    const bool *const seen = args.available + row * args.tokens;
    if (!std::all_of(seen, seen + args.tokens, [](bool value) { return value; }))
      rows.push_back(row);
  }
  std::fill_n(static_cast<C *>(args.out), args.batch * args.tokens * args.width, C(0));
  const int64_t count = static_cast<int64_t>(rows.size());
  if (!count)
    return;
  const int64_t weights = args.channels * (4 * args.channels + 2 * args.hidden) * args.layers;
  const int64_t useful = std::clamp<int64_t>(count * args.tokens * weights / kWorkPerThread, 1, threads);
  // Packed or not: a network gives the same bits before and after a larger call packs it.
  bool whole_vectors = std::is_same_v<C, W>;
  for (const int64_t size : {args.channels, args.hidden, args.width})
    whole_vectors &= size % kWidth<C> == 0;
  const bool few = count * args.tokens <= kFewTokens, as_they_come = few && whole_vectors;
  int64_t size = 0;
  in_buffer<C, W>(args, nullptr, false, &size);
  const Scratch<C> packed(args.packed || as_they_come ? 0 : size);
  Network<C> net;
  if constexpr (std::is_same_v<C, W>)
    if (as_they_come)
      net = assemble<W>(
          args, [](const W *source, int64_t, int64_t) { return source; },
          [](const W *source, int64_t) { return source; });
  if (!as_they_come)
    net = in_buffer<C, W>(args, args.packed ? static_cast<C *>(args.packed) : packed.get(), !args.packed);
  const auto run = [&](const int64_t *samples, int64_t n, Shared<C> &shared, const Private<C> &own, Worker worker) {
    if (as_they_come)
      return denoise<Layout::kRows>(args, net, samples, n, shared, own, worker);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<C, float>)
      if (args.pairs)
        return denoise<Layout::kPairs>(args, net, samples, n, shared, own, worker);
#endif
    denoise<Layout::kPanels>(args, net, samples, n, shared, own, worker);
  };
  if (few) {
    Shared<C> shared(args, count * args.tokens);
    find_missing(args, shared, rows.data(), count);
    // Before they begin: one that had no memory would leave the others waiting.
    std::vector<std::unique_ptr<Private<C>>> own;
    for (int64_t id = 0; id < useful; ++id)
      own.push_back(std::make_unique<Private<C>>(args, count * args.tokens));
    deal_out(useful, useful, [&](int64_t, int64_t) {
      Worker worker{0, 1};
#ifdef _OPENMP
      if (useful > 1)
        worker = {omp_get_thread_num(), omp_get_num_threads()};
#endif
      run(rows.data(), count, shared, *own[worker.id], worker);
    });
    return;
  }
  const int64_t most = std::max<int64_t>(1, kBlockTokens / args.tokens), least = (count + most - 1) / most;
  // As many blocks for each thread.
  const int64_t blocks = std::min(count, (least + useful - 1) / useful * useful);
  deal_out(blocks, std::min(blocks, useful), [&](int64_t begin, int64_t end) {
    const int64_t largest = (count + blocks - 1) / blocks * args.tokens;
    Shared<C> shared(args, largest);
    const Private<C> own(args, largest);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = count * block / blocks, behind = count * (block + 1) / blocks;
      find_missing(args, shared, rows.data() + first, behind - first);
      run(rows.data() + first, behind - first, shared, own, Worker{0, 1});
    }
  });
}

// f(C{}, W{}) for the types of the tokens and of the weights.
template <class F>
void for_types(const TokenDenoiserArgs &args, F f) {
  if (args.dtype == DType::kFloat64)
    return f(double{}, double{});
  if (args.weights_dtype == DType::kBFloat16)
    return f(float{}, BFloat16{});
  f(float{}, float{});
}

} // namespace

namespace MODAFILL_ISA {

void token_denoiser(const TokenDenoiserArgs &args, int threads) {
  for_types(args, [&](auto c, auto w) { token_denoiser_of<decltype(c), decltype(w)>(args, threads); });
}

int64_t token_denoiser_size(const TokenDenoiserArgs &args) {
  int64_t size = 0;
  for_types(args, [&](auto c, auto w) { in_buffer<decltype(c), decltype(w)>(args, nullptr, false, &size); });
  return size;
}

void pack_token_denoiser(const TokenDenoiserArgs &args, int) {
  for_types(args, [&](auto c, auto w) {
    in_buffer<decltype(c), decltype(w)>(args, static_cast<decltype(c) *>(args.packed), true);
  });
}

} // namespace MODAFILL_ISA
} // namespace modafill
