"""The three kinds of prompts (CDTP §3.3, MPLMM), for every missing pattern of M modalities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modafill.data import all_patterns


class Prompts(nn.Module):
    """Generative, missing-signal and missing-type prompts.

    Missing-type prompts P'_MT = P_MT · M_P, with M_P = Σ_m (P_{(N)MS}^m)ᵀ M_m over the modalities, the missing-signal
    prompt of each being the one of its state. Types are those that multiply: P^m ``[L_m, d]`` and M_m ``[L_m, w]`` give
    M_P ``[d, w]`` (MPLMM's; the paper's M_m ``[d_p, ℓp]`` fits only where L_m = ℓp). Departure: MPLMM's later code
    starts all of them at zero, a saddle that they never leave; here each factor is random and P'_MT has a standard
    deviation of about 0.02.

    Args:
        lengths: L of each modality.
        width: d.
        prompt_length: ℓp.
        type_width: w, the last dimension of the missing-type prompts.
    """

    signal: nn.ParameterList
    projection: nn.ParameterList
    patterns: Tensor

    def __init__(self, lengths: Sequence[int], width: int, prompt_length: int, type_width: int) -> None:
        super().__init__()
        count = len(lengths)
        self.generative = nn.Parameter(torch.randn(count, prompt_length, width) * 0.02)
        self.signal = nn.ParameterList(nn.Parameter(torch.randn(2, length, width) * 0.02) for length in lengths)
        self.missing_type = nn.Parameter(torch.randn(count, prompt_length, width) * width**-0.5)
        self.projection = nn.ParameterList(
            nn.Parameter(torch.randn(length, type_width) * (count * length) ** -0.5) for length in lengths
        )
        self.register_buffer("patterns", all_patterns(count), persistent=False)

    def types(self) -> Tensor:
        """P'_MT of every pattern: ``[2^M − 1, M, ℓp, w]``, in the order of :func:`modafill.data.all_patterns`."""
        projected: Tensor | float = 0.0
        for m, (signal, matrix) in enumerate(zip(self.signal, self.projection, strict=True)):
            states = torch.einsum("sld,lw->sdw", signal, matrix)
            projected = projected + states[self.patterns[:, m].long()]
        return torch.einsum("mld,pdw->pmlw", self.missing_type, projected)

    def biases(self, lengths: Sequence[int]) -> list[Tensor]:
        """P'_MT as tables ``[2^M − 1, 1, L, L]`` of each modality's logits.

        The paper adds P'_MT ``[ℓp, d_p]`` to logits ``[L, L]``, which do not fit: it is resampled (bilinear).
        """
        return [
            nn.functional.interpolate(table[:, None], (n, n), mode="bilinear", align_corners=False)
            for table, n in zip(self.types().unbind(1), lengths, strict=True)
        ]
