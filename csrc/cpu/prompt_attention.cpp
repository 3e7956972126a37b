// Attention with a learned bias that each sample picks by its mode; the bias of a sample is never copied.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "matrix.h"

namespace modafill {
namespace {

// Queries that are worked on at a time: their logits stay in the second-level cache.
constexpr int64_t kTile = 32;

template <class T>
struct Rows {
  T *data;
  int64_t stride;

  template <class P>
  static Rows of(P *data, const HeadStrides &strides, int64_t b, int64_t h) {
    T *const typed = static_cast<T *>(data);
    return {typed ? typed + b * strides.batch + h * strides.head : nullptr, strides.row};
  }
  T *operator[](int64_t row) const { return data + row * stride; }
};

// One (sample, head), at the precision C, of tensors of T.
template <class T>
struct Head {
  using C = Compute<T>;

  const PromptAttentionArgs &args;
  int64_t b, h;
  Rows<const T> q, k, v;
  const T *bias;
  uint64_t seed, row_id;
  int64_t seen; // keys that exist; what lies behind them is never read

  Head(const PromptAttentionArgs &a, int64_t b, int64_t h)
      : args(a), b(b), h(h), q(Rows<const T>::of(a.q, a.q_strides, b, h)), k(Rows<const T>::of(a.k, a.k_strides, b, h)),
        v(Rows<const T>::of(a.v, a.v_strides, b, h)),
        bias(a.bias ? static_cast<const T *>(a.bias) + table() * a.queries * a.keys : nullptr),
        seed(a.dropped ? seed_of(a.key) : 0), row_id(a.dropped ? row_id_of(a.key, b) : 0),
        seen(a.key_lengths ? a.key_lengths[b] : a.keys) {}

  // Ask for row `i` of what a later task reads.
  MODAFILL_INLINE void fetch(int64_t i) const {
    if (i < args.queries)
      prefetch(q[i], static_cast<int>(args.width));
    if (i < args.keys) {
      prefetch(k[i], static_cast<int>(args.width));
      prefetch(v[i], static_cast<int>(args.width));
    }
  }

  // Which [queries, keys] table of the bias this head reads.
  int64_t table() const { return (args.mode ? args.mode[b] : 0) * args.bias_heads + (args.bias_heads > 1 ? h : 0); }

  const T *bias_end() const {
    return static_cast<const T *>(args.bias) + args.modes * args.bias_heads * args.queries * args.keys;
  }

  // Adds the bias to a row of logits, puts -inf behind the keys it may read, and returns how many vectors hold those.
  MODAFILL_INLINE int64_t finish_logits(C *s, int64_t i, int64_t visible) const {
    const Vector<C> hidden = Vector<C>{} - static_cast<C>(HUGE_VAL);
    const int64_t end = padded<C>(visible), last = end - kWidth<C>;
    const T *const row = bias ? bias + i * args.keys : nullptr;
    if constexpr (std::is_same_v<T, C>) {
      // The last vector may reach into the next row, but not beyond the tensor.
      if (!row || row + end <= bias_end()) {
        for (int64_t j = 0; j < last && row; j += kWidth<C>)
          store(s + j, load(s + j) + load(row + j));
        const Vector<C> logits = row ? load(s + last) + load(row + last) : load(s + last);
        store(s + last, first_lanes<C>(visible - last) ? logits : hidden);
        return end;
      }
    }
    for (int64_t j = 0; j < visible && row; ++j)
      s[j] += Element<T>::load(row[j]);
    for (int64_t j = visible; j < end; ++j)
      s[j] = hidden[0];
    return end;
  }

  // 0 or the factor of what is kept, for `count` probabilities of query i (room for a multiple of 64).
  MODAFILL_INLINE void keep(int64_t i, int64_t count, C *factors) const {
    const int64_t quads = (args.keys + 3) / 4;
    const uint32_t first = static_cast<uint32_t>((h * args.queries + i) * quads);
    const C kept = static_cast<C>(args.kept);
    for (int64_t group = 0; 4 * group < count; group += kLanes) {
      LaneWords w;
      philox_lanes(seed,
                   {first + static_cast<uint32_t>(group), static_cast<uint32_t>(row_id),
                    static_cast<uint32_t>(row_id >> 32), draw_word(0, static_cast<uint32_t>(Draw::kDropout))},
                   w);
      C *const to = factors + 4 * group;
      for (int lane = 0; lane < kLanes; ++lane) {
        to[4 * lane] = w.w0[lane] < args.dropped ? C(0) : kept;
        to[4 * lane + 1] = w.w1[lane] < args.dropped ? C(0) : kept;
        to[4 * lane + 2] = w.w2[lane] < args.dropped ? C(0) : kept;
        to[4 * lane + 3] = w.w3[lane] < args.dropped ? C(0) : kept;
      }
    }
  }
};

template <class T, class C>
MODAFILL_INLINE void write_row(T *to, const C *from, int64_t count, C factor) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = Element<T>::store(from[i] * factor);
}

// Maximum of a row whose length is a multiple of a vector's width.
template <class C>
MODAFILL_INLINE C row_maximum(const C *row, int64_t count) {
  Vector<C> most = load(row);
  for (int64_t j = kWidth<C>; j < count; j += kWidth<C>) {
    const Vector<C> next = load(row + j);
    most = (most > next) | (most != most) ? most : next; // NaN comes through
  }
  return reduce(reinterpret_cast<const C *>(&most), [](auto a, auto b) { return (a > b) | (a != a) ? a : b; });
}

template <class T>
void forward_of(const PromptAttentionForward &job, int threads) {
  using C = Compute<T>;
  const PromptAttentionArgs &args = job.attention;
  const int64_t tiles = (args.queries + kTile - 1) / kTile, tasks = args.batch * args.heads * tiles;
  const int64_t keys = padded<C>(args.keys), width = padded<C>(args.width);
  const C scale = static_cast<C>(args.scale);
  for_each_run(tasks, args.batch * args.heads * args.queries * args.keys * args.width, threads,
               [&](int64_t first, int64_t last) {
                 const Scratch<C> k_panels(keys * args.width), v_panels(args.keys * width), q_tile(kTile * args.width),
                     logits(kTile * keys), result(kTile * width), factors(keys + 64);
                 int64_t packed = -1;
                 for (int64_t task = first; task < last; ++task) {
                   const int64_t which = task / tiles, begin = task % tiles * kTile;
                   const int64_t count = std::min(kTile, args.queries - begin);
                   const Head<T> head(args, which / args.heads, which % args.heads);
                   const int64_t later = which + 1 < args.batch * args.heads ? which + 1 : which;
                   const Head<T> next(args, later / args.heads, later % args.heads);
                   if (which != packed) {
                     pack_transposed<T>(k_panels.get(), args.width, head.seen, [&](int64_t j) { return head.k[j]; });
                     pack<T>(v_panels.get(), head.seen, args.width, [&](int64_t j) { return head.v[j]; });
                     packed = which;
                   }
                   const int64_t reach = visible_keys(args, head.b, begin + count - 1), span = padded<C>(reach);
                   for (int64_t i = 0; i < count; ++i)
                     for (int64_t c = 0; c < args.width; ++c)
                       q_tile.get()[i * args.width + c] = Element<T>::load(head.q[begin + i][c]) * scale;
                   multiply<false>(Product<C>{logits.get(), keys, q_tile.get(), args.width, 1, k_panels.get(), count,
                                              reach, args.width, head.seen, args.width});
                   C sums[kTile];
                   for (int64_t i = 0; i < count; ++i) {
                     C *const s = logits.get() + i * keys;
                     next.fetch(begin + i);
                     const int64_t visible = visible_keys(args, head.b, begin + i);
                     const int64_t end = visible > 0 ? head.finish_logits(s, begin + i, visible) : 0;
                     const C most = end ? row_maximum(s, end) : -static_cast<C>(HUGE_VAL);
                     const bool nothing = most == -static_cast<C>(HUGE_VAL);
                     Vector<C> total{};
                     for (int64_t j = 0; j < (nothing ? 0 : end); j += kWidth<C>) {
                       const Vector<C> p = exponential(load(s + j) - most);
                       total += p;
                       store(s + j, p);
                     }
                     for (int64_t j = nothing ? 0 : end; j < span; ++j)
                       s[j] = C(0);
                     sums[i] = nothing ? C(1) : lanes_sum<C>(total);
                     if (job.logsumexp)
                       static_cast<C *>(job.logsumexp)[which * args.queries + begin + i] =
                           nothing ? static_cast<C>(HUGE_VAL) : most + std::log(sums[i]);
                     if (args.dropped) {
                       head.keep(begin + i, end, factors.get());
                       for (int64_t j = 0; j < end; j += kWidth<C>)
                         store(s + j, load(s + j) * load(factors.get() + j));
                     }
                   }
                   multiply<false>(Product<C>{result.get(), width, logits.get(), keys, 1, v_panels.get(), count,
                                              args.width, reach, args.width, head.seen});
                   const Rows<T> out = Rows<T>::of(job.out, job.out_strides, head.b, head.h);
                   for (int64_t i = 0; i < count; ++i)
                     write_row(out[begin + i], result.get() + i * width, args.width, C(1) / sums[i]);
                 }
               });
}

// The gradients of one (sample, head); `table` is where the bias gradient of this head is summed, or null.
template <class T>
struct HeadBackward {
  using C = Compute<T>;

  const PromptAttentionBackward &job;
  const PromptAttentionArgs &args = job.attention;
  const int64_t keys = padded<C>(args.keys), width = padded<C>(args.width);
  const bool need_logits = job.q_grad || job.k_grad || job.bias_grad;
  Scratch<C> k_panels{keys * args.width}, v_panels{keys * args.width}, k_rows{args.keys * width},
      q_tile{kTile * args.width}, q_panels{kTile * width}, grad_tile{kTile * args.width}, grad_panels{kTile * width},
      p{kTile * keys}, dp{kTile * keys}, result{kTile * width}, k_sum{args.keys * width}, v_sum{args.keys * width},
      factors{keys + 64};

  // `next_b`, `next_h`: what comes after it.
  void operator()(int64_t b, int64_t h, C *table, int64_t next_b, int64_t next_h) {
    const Head<T> head(args, b, h), next(args, std::min(next_b, args.batch - 1), next_h);
    const Rows<const T> next_grad = Rows<const T>::of(job.grad, job.grad_strides, next.b, next_h);
    const Rows<const T> grad = Rows<const T>::of(job.grad, job.grad_strides, b, h);
    const C *const logsumexp = static_cast<const C *>(job.logsumexp) + (b * args.heads + h) * args.queries;
    const C scale = static_cast<C>(args.scale);
    pack_transposed<T>(k_panels.get(), args.width, head.seen, [&](int64_t j) { return head.k[j]; });
    if (need_logits)
      pack_transposed<T>(v_panels.get(), args.width, head.seen, [&](int64_t j) { return head.v[j]; });
    if (job.q_grad)
      pack<T>(k_rows.get(), head.seen, args.width, [&](int64_t j) { return head.k[j]; });
    if (job.k_grad)
      std::fill_n(k_sum.get(), args.keys * width, C(0));
    if (job.v_grad)
      std::fill_n(v_sum.get(), args.keys * width, C(0));
    for (int64_t begin = 0; begin < args.queries; begin += kTile) {
      const int64_t count = std::min(kTile, args.queries - begin);
      const int64_t reach = visible_keys(args, b, begin + count - 1);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < args.width; ++c) {
          q_tile.get()[i * args.width + c] = Element<T>::load(head.q[begin + i][c]) * scale;
          grad_tile.get()[i * args.width + c] = Element<T>::load(grad[begin + i][c]);
        }
      multiply<false>(Product<C>{p.get(), keys, q_tile.get(), args.width, 1, k_panels.get(), count, reach, args.width,
                                 head.seen, args.width});
      if (need_logits)
        multiply<false>(Product<C>{dp.get(), keys, grad_tile.get(), args.width, 1, v_panels.get(), count, reach,
                                   args.width, head.seen, args.width});
      for (int64_t i = 0; i < count; ++i) {
        next.fetch(begin + i);
        prefetch(next_grad[begin + i], static_cast<int>(args.width));
        row(head, begin + i, logsumexp[begin + i], padded<C>(reach), p.get() + i * keys, dp.get() + i * keys, table);
      }
      if (job.v_grad) {
        pack<C>(grad_panels.get(), count, args.width, [&](int64_t i) { return grad_tile.get() + i * args.width; });
        multiply<true>(Product<C>{v_sum.get(), width, p.get(), 1, keys, grad_panels.get(), reach, args.width, count,
                                  args.width, count});
      }
      if (job.k_grad) {
        pack<C>(q_panels.get(), count, args.width, [&](int64_t i) { return q_tile.get() + i * args.width; });
        multiply<true>(Product<C>{k_sum.get(), width, dp.get(), 1, keys, q_panels.get(), reach, args.width, count,
                                  args.width, count});
      }
      if (job.q_grad) {
        multiply<false>(Product<C>{result.get(), width, dp.get(), keys, 1, k_rows.get(), count, args.width, reach,
                                   args.width, head.seen});
        const Rows<T> out = Rows<T>::of(job.q_grad, job.q_grad_strides, b, h);
        for (int64_t i = 0; i < count; ++i)
          write_row(out[begin + i], result.get() + i * width, args.width, scale);
      }
    }
    write(job.k_grad, job.k_grad_strides, b, h, k_sum.get());
    write(job.v_grad, job.v_grad_strides, b, h, v_sum.get());
  }

private:
  // From logits and dP to P with dropout and dS, in place; what no key is behind becomes 0.
  MODAFILL_INLINE void row(const Head<T> &head, int64_t i, C logsumexp, int64_t span, C *p_row, C *dp_row, C *table) {
    const int64_t visible = visible_keys(args, head.b, i);
    const int64_t end = visible > 0 ? head.finish_logits(p_row, i, visible) : 0;
    Vector<C> total{};
    if (args.dropped)
      head.keep(i, end, factors.get());
    for (int64_t j = 0; j < end; j += kWidth<C>) {
      const Vector<C> probability = exponential(load(p_row + j) - logsumexp);
      Vector<C> kept = probability;
      if (args.dropped)
        kept *= load(factors.get() + j);
      if (need_logits) {
        total += kept * load(dp_row + j);
        // What was dropped carries no gradient of its own, but its probability enters dS.
        store(dp_row + j, args.dropped ? load(dp_row + j) * load(factors.get() + j) : load(dp_row + j));
      }
      store(p_row + j, probability);
    }
    const C mean = need_logits ? lanes_sum<C>(total) : C(0);
    for (int64_t j = 0; j < end; j += kWidth<C>) {
      const Vector<C> probability = load(p_row + j);
      if (need_logits)
        store(dp_row + j, probability * (load(dp_row + j) - mean));
      if (args.dropped)
        store(p_row + j, probability * load(factors.get() + j));
    }
    for (int64_t j = end; j < span; ++j) {
      p_row[j] = C(0);
      if (need_logits)
        dp_row[j] = C(0);
    }
    if (table) {
      C *const to = table + i * args.keys;
      int64_t j = 0;
      for (; j + kWidth<C> <= visible; j += kWidth<C>)
        store(to + j, load(to + j) + load(dp_row + j));
      for (; j < visible; ++j)
        to[j] += dp_row[j];
    }
  }

  MODAFILL_INLINE void write(void *to, const HeadStrides &strides, int64_t b, int64_t h, const C *sum) {
    if (!to)
      return;
    const Rows<T> out = Rows<T>::of(to, strides, b, h);
    for (int64_t j = 0; j < args.keys; ++j)
      write_row(out[j], sum + j * width, args.width, C(1));
  }
};

template <class T>
void round_to(T *to, const Compute<T> *from, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = Element<T>::store(from[i]);
}

template <class T>
void backward_of(const PromptAttentionBackward &job, int threads) {
  using C = Compute<T>;
  const PromptAttentionArgs &args = job.attention;
  const int64_t work = args.batch * args.heads * args.queries * args.keys * args.width * 3;
  const int64_t one_table = args.queries * args.keys, size = args.modes * args.bias_heads * one_table;
  T *const bias_grad = static_cast<T *>(job.bias_grad);
  // Groups of samples have tables of their own; those of the first one are the result where that is not rounded.
  constexpr bool kRounded = !std::is_same_v<T, C>;
  const auto sums = [&](int64_t group) {
    C *const partial = static_cast<C *>(job.partial);
    return kRounded ? partial + group * size : group ? partial + (group - 1) * size : static_cast<C *>(job.bias_grad);
  };
  // A lone group that is rounded keeps the tables of one head at a time.
  const bool in_turn = bias_grad && kRounded && job.groups == 1;
  // A task adds to tables of its own, sample by sample: one per group of samples and head of the bias.
  const int64_t own_heads = bias_grad && args.bias_heads == 1 ? 1 : args.heads;
  const int64_t groups = bias_grad ? job.groups : args.batch;
  for_each_run(groups * own_heads, work, threads, [&](int64_t first, int64_t last) {
    HeadBackward<T> backward{job};
    const Scratch<C> in_turn_sums(in_turn ? args.modes * one_table : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t group = task / own_heads;
      const int64_t first_head = own_heads == 1 ? 0 : task % own_heads;
      const int64_t last_head = own_heads == 1 ? args.heads : first_head + 1;
      if (in_turn)
        std::fill_n(in_turn_sums.get(), args.modes * one_table, C(0));
      for (int64_t b = args.batch * group / groups; b < args.batch * (group + 1) / groups; ++b)
        for (int64_t h = first_head; h < last_head; ++h) {
          const Head<T> head(args, b, h);
          C *const table = in_turn     ? in_turn_sums.get() + head.table() / args.bias_heads * one_table
                           : bias_grad ? sums(group) + head.table() * one_table
                                       : nullptr;
          if (h + 1 < last_head || (!bias_grad && h + 1 < args.heads))
            backward(b, h, table, b, h + 1);
          else
            backward(b, h, table, b + 1, bias_grad ? first_head : 0);
        }
      for (int64_t mode = 0; mode < (in_turn ? args.modes : 0); ++mode)
        round_to(bias_grad + (mode * args.bias_heads + first_head) * one_table, in_turn_sums.get() + mode * one_table,
                 one_table);
    }
  });
  if (bias_grad && job.groups > 1) {
    for_each_run(size, size * job.groups, threads, [&](int64_t first, int64_t last) {
      for (int64_t group = 1; group < job.groups; ++group)
        for (int64_t i = first; i < last; ++i)
          sums(0)[i] += sums(group)[i];
      if constexpr (kRounded)
        round_to(bias_grad + first, sums(0) + first, last - first);
    });
  }
}

} // namespace

namespace MODAFILL_ISA {

void prompt_attention(const PromptAttentionForward &job, int threads) {
  for_dtype(job.attention.dtype, [&](auto element) { forward_of<decltype(element)>(job, threads); });
}

void prompt_attention_backward(const PromptAttentionBackward &job, int threads) {
  for_dtype(job.attention.dtype, [&](auto element) { backward_of<decltype(element)>(job, threads); });
}

} // namespace MODAFILL_ISA
} // namespace modafill
