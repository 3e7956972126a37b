// What token_denoiser is asked to do, on any device.
#pragma once

#include <vector>

#include "step.h"

namespace modafill {

// out [batch, tokens, width]: what the network says of each token that is not available, zeros for the others.
struct TokenDenoiserArgs {
  DType dtype, weights_dtype;
  void *out;
  const void *x;         // [batch, tokens, width]
  const bool *available; // [batch, tokens]
  const void *added;     // [tokens, 2, channels], for a token that is missing and one that is observed
  // Projection in [channels, width] and its bias, or two null pointers; for each layer, its normalisation, attention
  // in [3 channels, channels], attention out [channels, channels], normalisation, first [hidden, channels] and second
  // [channels, hidden], each followed by its bias; normalisation and projection out [width, channels] with theirs.
  std::vector<const void *> weights;
  void *packed; // the weights as the CPU wants them, or null
  bool pairs;   // whether bfloat16 weights are multiplied as such, with tokens that are rounded to it
  int64_t batch, tokens, width, channels, heads, hidden, layers;
  double epsilon; // of the normalisations
};

} // namespace modafill
