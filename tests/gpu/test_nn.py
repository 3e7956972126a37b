"""The modules on a GPU, where they read nothing back."""

from __future__ import annotations

import torch

from modafill.nn import PromptAttention


def test_padding_that_does_not_fit_gives_nan() -> None:
    attention = PromptAttention(24, 3).cuda()
    x = torch.randn(4, 7, 24, device="cuda")
    padding = torch.zeros(4, 7, dtype=torch.bool, device="cuda")
    padding[1, 4:] = padding[2, 0] = True
    for mask in (padding, torch.zeros(4, 7, device="cuda").masked_fill(padding, -torch.inf)):
        found = attention(x, x, x, mask)[0].isnan().flatten(1)
        assert found.all(1).tolist() == [False, False, True, False]
        assert not found[[0, 1, 3]].any()
