"""The fused ops, each with several backends and a float64 reference.

What they do under autocast, vmap and forward mode, and on meta tensors, stands in :mod:`modafill.ops.backends`.
"""

from modafill.ops import reference
from modafill.ops.add_noise import add_noise
from modafill.ops.backends import Choice, explain
from modafill.ops.conv_gelu_conv import conv_gelu_conv
from modafill.ops.ddim_step import ddim_step
from modafill.ops.masked_reverse_step import masked_reverse_step
from modafill.ops.prompt_attention import prompt_attention
from modafill.ops.randn import randn
from modafill.ops.reference import Draw
from modafill.ops.token_denoiser import TokenNetwork, can_loop, find_missing, reverse_loop, token_denoiser

__all__ = [
    "Choice",
    "Draw",
    "TokenNetwork",
    "add_noise",
    "can_loop",
    "conv_gelu_conv",
    "ddim_step",
    "explain",
    "find_missing",
    "masked_reverse_step",
    "prompt_attention",
    "randn",
    "reference",
    "reverse_loop",
    "token_denoiser",
]
