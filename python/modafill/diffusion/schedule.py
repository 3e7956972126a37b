"""Noise schedules: computed in float64, kept as one float32 table that kernels index by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modafill.ops import backends, reference


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance schedule over diffusion steps 1…N.

    Attributes:
        betas: float64 ``[N]``, β_1…β_N, each in (0, 1).
        alpha_bar: float64 ``[N + 1]``, ᾱ_0 = 1 … ᾱ_N.
        table: float32 ``[N + 1, 5]``, the coefficients that ops index by step (columns: :mod:`modafill.ops.reference`).
    """

    betas: Tensor
    alpha_bar: Tensor = field(init=False, repr=False)
    table: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        betas = self.betas
        if betas.ndim != 1 or betas.numel() == 0:
            raise ValueError(f"betas: got shape {tuple(betas.shape)}, expected a non-empty vector")
        betas = betas.to(dtype=torch.float64, device="cpu")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas: got values in [{betas.min():g}, {betas.max():g}], expected all in (0, 1)")
        if betas.numel() > reference.MAX_STEP:
            raise ValueError(f"betas: got {betas.numel()} steps, expected at most {reference.MAX_STEP}")
        log_alpha_bar = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
        alpha_bar = log_alpha_bar.exp()
        one_minus = -torch.expm1(log_alpha_bar)
        table = torch.zeros(len(betas) + 1, reference.TABLE_COLUMNS, dtype=torch.float64)
        table[:, reference.SQRT_ALPHA_BAR] = alpha_bar.sqrt()
        table[:, reference.SQRT_ONE_MINUS_ALPHA_BAR] = one_minus.sqrt()
        table[0, reference.POSTERIOR_X] = 1.0
        table[1:, reference.POSTERIOR_X] = (1 - betas).rsqrt()
        table[1:, reference.POSTERIOR_EPS] = -betas / ((1 - betas).sqrt() * one_minus[1:].sqrt())
        table[1:, reference.POSTERIOR_STD] = (betas * one_minus[:-1] / one_minus[1:]).sqrt()
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alpha_bar", alpha_bar)
        object.__setattr__(self, "table", table.to(torch.float32))

    @property
    def steps(self) -> int:
        """N, the number of diffusion steps."""
        return len(self.betas)

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 3e-4, beta_end: float = 0.06) -> Schedule:
        """β from ``beta_start`` to ``beta_end`` in equal steps.

        The defaults are ADMC's (§4.2); CDTP's public code uses 1e-4 → 0.02.
        """
        steps = backends.integer("steps", steps, low=1)
        return cls(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """ᾱ_n ∝ cos²((n/N + s)/(1 + s) · π/2), β clipped at ``max_beta`` (Nichol & Dhariwal 2021, eq. 17)."""
        steps = backends.integer("steps", steps, low=1)
        n = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((n + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp(max=max_beta))

    def last_step(self, min_alpha_bar: float) -> int:
        """The largest step n with ᾱ_n ≥ ``min_alpha_bar``."""
        if not 0 < min_alpha_bar < 1:
            raise ValueError(f"min_alpha_bar: got {min_alpha_bar}, expected a value in (0, 1)")
        return max(1, int((self.alpha_bar >= min_alpha_bar).sum()) - 1)

    def check_step(self, name: str, step: int) -> None:
        """Raise ValueError unless 1 ≤ ``step`` ≤ N."""
        if not 1 <= step <= self.steps:
            raise ValueError(f"{name}: got {step}, expected a diffusion step in 1…{self.steps}")
