"""How a network is told its diffusion step."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_embedding(step: Tensor, width: int) -> Tensor:
    """Sinusoids ``[B, width]`` of diffusion steps ``[B]`` (Ho et al. 2020)."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=step.device) * (-math.log(10_000.0) / half))
    angle = step[:, None].to(frequency.dtype) * frequency
    return torch.cat([angle.sin(), angle.cos(), angle.new_zeros(len(step), width - 2 * half)], dim=1)
