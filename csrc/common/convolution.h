// What conv_gelu_conv is asked to do, on any device.
#pragma once

#include "step.h"

namespace modafill {

// out [batch, length, outputs] = conv(gelu(conv(x [batch, length, inputs]))), contiguous; weights are [out, in, taps]
// with an odd number of taps, biases may be null.
struct ConvGeluConvArgs {
  DType dtype;
  void *out;
  const void *x, *first, *first_bias, *second, *second_bias;
  int64_t batch, length, inputs, hidden, outputs, first_taps, second_taps;
  bool tanh;
};

// Gradients that nobody wants are null. Those of weights and biases have the precision of the computation; `groups`
// says in how many parts of the batch they are summed.
struct ConvGeluConvBackward {
  ConvGeluConvArgs forward; // `out` is not read
  const void *grad;
  void *x_grad, *first_grad, *first_bias_grad, *second_grad, *second_bias_grad;
  int64_t groups;
};

} // namespace modafill
