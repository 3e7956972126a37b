"""Memory that an input and ``out`` share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor


def neighbours(x: Tensor, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Copies of ``x``, each with an ``out`` before or behind it, and whether these two share an element."""
    n, m = x.numel(), math.prod(shape)
    for x_at, out_at, shared in ((0, n, False), (0, n - 1, True), (m, 0, False), (m - 1, 0, True)):
        room = x.new_empty(n + m)
        yield room[x_at : x_at + n].view(x.shape).copy_(x), room[out_at : out_at + m].view(*shape), shared
