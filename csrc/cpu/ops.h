// The CPU ops: one set of functions for each instruction set the extension was compiled for.
#pragma once

#include "../common/attention.h"
#include "../common/convolution.h"
#include "../common/tokens.h"

namespace modafill {

#define MODAFILL_DECLARE_OPS(isa)                                                                                      \
  namespace isa {                                                                                                      \
  void masked_reverse_step(const MaskedReverseStepArgs &args, int threads);                                            \
  void ddim_step(const DdimStepArgs &args, int threads);                                                               \
  void add_noise(const AddNoiseArgs &args, int threads);                                                               \
  void randn(const RandnArgs &args, int threads);                                                                      \
  void prompt_attention(const PromptAttentionForward &job, int threads);                                               \
  void prompt_attention_backward(const PromptAttentionBackward &job, int threads);                                     \
  void conv_gelu_conv(const ConvGeluConvArgs &args, int threads);                                                      \
  void conv_gelu_conv_backward(const ConvGeluConvBackward &job, int threads);                                          \
  }

#define MODAFILL_DECLARE_TOKEN_OPS(isa)                                                                                \
  namespace isa {                                                                                                      \
  void token_denoiser(const TokenDenoiserArgs &args, int threads);                                                     \
  int64_t token_denoiser_size(const TokenDenoiserArgs &args);                                                          \
  void pack_token_denoiser(const TokenDenoiserArgs &args, int threads);                                                \
  }

MODAFILL_DECLARE_OPS(baseline)
MODAFILL_DECLARE_TOKEN_OPS(baseline)
#ifdef MODAFILL_X86
MODAFILL_DECLARE_OPS(v3)
MODAFILL_DECLARE_TOKEN_OPS(v3)
MODAFILL_DECLARE_OPS(v4)
MODAFILL_DECLARE_TOKEN_OPS(v4)
#endif
#ifdef MODAFILL_BFLOAT16
MODAFILL_DECLARE_TOKEN_OPS(v4bf16)
#endif

#undef MODAFILL_DECLARE_OPS
#undef MODAFILL_DECLARE_TOKEN_OPS

} // namespace modafill
