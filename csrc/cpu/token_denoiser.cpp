// A pre-norm transformer over the few tokens of each sample, all layers in one call. A thread takes some samples
// through every layer, so that what lies between the layers stays in its second-level cache; where samples are too few
// for that, the threads share each product's columns.
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "../common/tokens.h"
#include "gelu.h"
#include "matrix.h"

namespace modafill {
namespace {

// Tokens that a thread takes through the network at a time.
constexpr int64_t kBlockTokens = 96;
// So few tokens do not pay for packing the weights.
constexpr int64_t kFewTokens = 24;

// out [rows, n] = a [rows, k] times weight [n, k] transposed, plus the bias.
template <class C>
struct Linear {
  const C *weight, *bias; // as `pack` lays them out, or as they come
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
        C *const at = take(k * padded<C>(n));
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

// This worker's columns of out [rows, n] (+)= linear(a), then finish(column, end) for each run of them. Rows of `out`
// and `a` lie padded(n) and padded(k) apart.
template <bool kAdd, bool kPacked, class C, class F>
MODAFILL_INLINE void apply(const Linear<C> &linear, C *out, const C *a, int64_t rows, C *spare, Worker worker,
                           F finish) {
  constexpr int64_t kPanel = kPanelVectors * kWidth<C>;
  const int64_t out_row = padded<C>(linear.n), a_row = padded<C>(linear.k);
  if constexpr (!kPacked) {
    // Rows are dense: every size is a multiple of a vector's.
    worker.share(linear.n / kWidth<C>, [&](int64_t begin, int64_t end) {
      begin *= kWidth<C>, end *= kWidth<C>;
      dot_columns(kAdd ? spare : out, out_row, a, linear.weight, linear.bias, rows, linear.k, begin, end);
      for (int64_t row = 0; kAdd && row < rows; ++row)
        for (int64_t i = begin; i < end; i += kWidth<C>)
          store(out + row * out_row + i, load(out + row * out_row + i) + load(spare + row * out_row + i));
      finish(begin, end);
    });
  } else {
    worker.share((linear.n + kPanel - 1) / kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kPanel; first < std::min(linear.n, end * kPanel); first += kPanel) {
        const int64_t columns = padded<C>(std::min(linear.n - first, kPanel));
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t i = first; i < first + columns; i += kWidth<C>) {
            const Vector<C> bias = load(linear.bias + i);
            store(out + row * out_row + i, kAdd ? load(out + row * out_row + i) + bias : bias);
          }
        for (int64_t term = 0; term < linear.k; term += kTerms) {
          const C *const panel = linear.weight + linear.k * first + term * columns;
          const int64_t terms = std::min(linear.k - term, kTerms);
          const auto run = [&](auto vectors) {
            multiply_panel<decltype(vectors)::value, true>(out + first, out_row, a + term, a_row, 1, panel, rows,
                                                           terms);
          };
          if (columns == kWidth<C>)
            run(std::integral_constant<int, 1>{});
          else if (columns == 2 * kWidth<C>)
            run(std::integral_constant<int, 2>{});
          else
            run(std::integral_constant<int, kPanelVectors>{});
        }
        finish(first, first + columns);
      }
    });
  }
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

// What each of them has for itself.
template <class C>
struct Private {
  Scratch<C> given, normed, spare, scores;
  Private(const TokenDenoiserArgs &args, int64_t tokens)
      : given(tokens * padded<C>(args.width)), normed(tokens * padded<C>(args.channels)),
        spare(tokens * padded<C>(std::max({args.channels, args.hidden, args.width}))), scores(args.tokens) {}
};

// The network for samples `rows[0...count)` of the batch, by all workers of a team. `shared` knows what is missing.
template <bool kPacked, class C>
void denoise(const TokenDenoiserArgs &args, const Network<C> &net, const int64_t *rows, int64_t count,
             const Shared<C> &shared, const Private<C> &own, Worker worker) {
  const int64_t d = args.channels, pitch = padded<C>(d), wide = padded<C>(2 * d), m = args.tokens, w = args.width;
  const int64_t tokens = count * m, head = d / args.heads, kept = static_cast<int64_t>(shared.missing.size());
  const C epsilon = static_cast<C>(args.epsilon), scale = C(1) / std::sqrt(static_cast<C>(head));
  C *const normed = own.normed.get(), *const spare = own.spare.get(), *h = shared.h.get();
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
    apply<false, kPacked>(net.in, h, own.given.get(), tokens, spare, worker, added);
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
    apply<false, kPacked>(layer.key_value, key_value, normed, tokens, spare, worker, nothing);
    for (int64_t query = 0; last && query < kept; ++query)
      std::copy_n(normed + missing[query] * pitch, missing[query] > query ? d : 0, normed + query * pitch);
    apply<false, kPacked>(layer.query, shared.query.get(), normed, queries, spare, worker, nothing);
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
    apply<true, kPacked>(layer.attention_out, h, attended, queries, spare, worker, nothing);
    worker.wait();
    normalise(normed, h, layer.before_feedforward, queries, d, epsilon);
    C *const hidden = shared.hidden.get();
    const int64_t hidden_row = padded<C>(args.hidden);
    apply<false, kPacked>(layer.first, hidden, normed, queries, spare, worker, [&](int64_t begin, int64_t end) {
      for (int64_t query = 0; query < queries; ++query)
        for (int64_t i = begin; i < end; i += kWidth<C>) {
          C *const at = hidden + query * hidden_row + i;
          store(at, gelu<C>(load(at), false).value);
        }
    });
    worker.wait();
    apply<true, kPacked>(layer.second, h, hidden, queries, spare, worker, nothing);
    worker.wait();
  }

  normalise(normed, h, net.norm, kept, d, epsilon);
  C *const said = shared.out.get();
  apply<false, kPacked>(net.out, said, normed, kept, spare, worker, [&](int64_t begin, int64_t end) {
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
  bool whole_vectors = true;
  for (const int64_t size : {args.channels, args.hidden, args.width})
    whole_vectors &= size % kWidth<C> == 0;
  if constexpr (std::is_same_v<C, W>)
    if (!args.packed && whole_vectors && count * args.tokens <= kFewTokens) {
      const auto net = assemble<W>(
          args, [](const W *source, int64_t, int64_t) { return source; },
          [](const W *source, int64_t) { return source; });
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
        denoise<false>(args, net, rows.data(), count, shared, *own[worker.id], worker);
      });
      return;
    }
  int64_t size = 0;
  in_buffer<C, W>(args, nullptr, false, &size);
  const Scratch<C> own(args.packed ? 0 : size);
  const auto net = in_buffer<C, W>(args, args.packed ? static_cast<C *>(args.packed) : own.get(), !args.packed);
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
      denoise<true>(args, net, rows.data() + first, behind - first, shared, own, Worker{0, 1});
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
