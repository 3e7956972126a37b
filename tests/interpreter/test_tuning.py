"""Tuning, with a timer that runs each call once and likes the last candidate best."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modafill.kernels import resources, tuned, tuning


@pytest.mark.parametrize("op", resources.OPS)
def test_every_kernel_gets_the_fastest_candidate(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"_BATCH": 2, "_HEADS": 1, "_LENGTHS": (5,), "_CONVOLUTIONS": ((5, 4, 3),), "_ROWS": (2,)}
    small["_NETWORK"] = (16, 2, 16)
    # The interpreter has no bfloat16.
    small["DTYPES"] = {2: torch.float16, 4: torch.float32}
    for name, value in small.items():
        monkeypatch.setattr(tuning, name, value)
    blocks = {"BLOCK_M": 16, "BLOCK_N": 16}
    fastest = []
    candidates = {
        "ROW": {"BLOCK": 64},
        "ATTENTION": blocks,
        "CONVOLUTION": {**blocks, "BLOCK_K": 16},
        "TOKEN": {"BLOCK_F": 16, "BLOCK_K": 16},
    }
    for name, rest in candidates.items():
        fastest.append({**rest, "num_warps": 4})
        monkeypatch.setattr(tuning, f"{name}_CANDIDATES", [{**rest, "num_warps": 2}, fastest[-1]])
    monkeypatch.setitem(tuned._listed(op), 0, tuned.tuned(op, 0))
    calls: list[Any] = []

    def timer(call: tuning.Call) -> float:
        call()
        calls.append(call)
        return 1.0 / len(calls)

    entry = tuning.tune(op, timer, lambda line: None, device="cpu")

    def configurations(place: Any) -> list[dict[str, int]]:
        if "num_warps" in place:
            return [place]
        return [
            found for inner in (place.values() if isinstance(place, dict) else place) for found in configurations(inner)
        ]

    found = configurations(entry)
    assert len(calls) == 2 * len(found)
    assert all(any(one.items() <= config.items() for one in fastest) for config in found)
    assert tuned.tuned(op, 0) == entry
