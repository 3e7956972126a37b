"""From generated sequences to a completed set: the second stage of the prompts' "MLP" over time (CDTP §3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modafill.data import all_patterns


class TimeMaps(nn.Module):
    """x̂_target = GELU(W [P_G; x_{target←s₁}; x_{target←s₂} …] + b), over the time axis, for every set of sources.

    W is ``[L_target, ℓp + Σ L]`` and shared by the channels (MPLMM's Conv1d over transposed sequences, which is the
    paper's MLP); each target has one for each non-empty set of sources. Lengths of what comes in are fixed, so that
    what goes out always has the target's.

    Args:
        lengths: L of each modality, which is that of what is generated for it.
        generated: L of what is generated for target t from source s.
        prompt_length: ℓp, 0 without generative prompts.
    """

    def __init__(self, lengths: Sequence[int], generated: dict[tuple[int, int], int], prompt_length: int) -> None:
        super().__init__()
        count = len(lengths)
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for target in range(count):
            for pattern in all_patterns(count).tolist():
                sources = [s for s in range(count) if pattern[s]]
                if pattern[target]:
                    continue
                width = prompt_length + sum(generated[target, s] for s in sources)
                bound = 1.0 / math.sqrt(width)
                key = _key(target, sources)
                self.weights[key] = nn.Parameter(torch.empty(lengths[target], width).uniform_(-bound, bound))
                self.biases[key] = nn.Parameter(torch.empty(lengths[target], 1).uniform_(-bound, bound))

    def forward(self, target: int, sources: list[int], prompt: Tensor | None, generated: Sequence[Tensor]) -> Tensor:
        """``[B, L, d]`` of ``generated [B, L, d]`` from each of ``sources`` and the ``prompt [ℓp, d]``."""
        key = _key(target, sources)
        parts = [*generated] if prompt is None else [prompt.expand(len(generated[0]), -1, -1), *generated]
        return nn.functional.gelu(self.weights[key] @ torch.cat(parts, dim=1) + self.biases[key])


def _key(target: int, sources: list[int]) -> str:
    return f"{target}<{'+'.join(map(str, sources))}"
