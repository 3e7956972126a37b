// What prompt_attention is asked to do, on any device.
#pragma once

#include "step.h"

namespace modafill {

// Elements between neighbours along batch, heads and length of a tensor [B, H, L, d] whose last dimension is dense.
struct HeadStrides {
  int64_t batch, head, row;
};

struct PromptAttentionArgs {
  DType dtype;
  const void *q, *k, *v;
  HeadStrides q_strides, k_strides, v_strides;
  const void *bias;           // [modes, bias_heads, queries, keys], or null
  const int64_t *mode;        // [batch], or null for mode 0
  const int64_t *key_lengths; // [batch], or null for all keys
  int64_t batch, heads, queries, keys, width, modes, bias_heads;
  double scale;
  bool causal;
  uint32_t dropped; // a word below this drops its probability
  double kept;      // what the others are multiplied by
  NoiseKey key;
};

struct PromptAttentionForward {
  PromptAttentionArgs attention;
  void *out;
  HeadStrides out_strides;
  void *logsumexp; // [batch, heads, queries] in the precision of the computation, or null
};

// Gradients that nobody wants are null. That of the bias has the precision of the computation and begins as zeros, as
// do the `groups` - 1 tables of `partial` that are added to it.
struct PromptAttentionBackward {
  PromptAttentionArgs attention;
  const void *grad;
  HeadStrides grad_strides;
  const void *logsumexp;
  void *q_grad, *k_grad, *v_grad, *bias_grad, *partial;
  HeadStrides q_grad_strides, k_grad_strides, v_grad_strides;
  int64_t groups;
};

// How many leading keys query `i` of sample `b` may read; MulT's mask leaves it i + |keys - queries| and those before.
inline int64_t visible_keys(const PromptAttentionArgs &args, int64_t b, int64_t i) {
  int64_t n = args.key_lengths ? args.key_lengths[b] : args.keys;
  if (args.causal) {
    const int64_t offset = args.keys > args.queries ? args.keys - args.queries : args.queries - args.keys;
    if (i + offset + 1 < n)
      n = i + offset + 1;
  }
  return n;
}

} // namespace modafill
