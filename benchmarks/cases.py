"""The suites: which ops are timed at which sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from modafill.benchmarks import rivals
from modafill.benchmarks.runner import Case, Problem


@dataclass(frozen=True)
class Plan:
    """What the caller asks of a suite: device, thread counts (of the CPU), and tiny shapes if ``quick``."""

    device: torch.device
    threads: Sequence[int]
    quick: bool


def step(plan: Plan) -> list[Case]:
    """The step ops at ADMC's size, three modalities of 256 channels."""
    if plan.quick:
        shapes = [(8, 3, 32)]
    elif plan.device.type == "cuda":
        shapes = [(batch, 3, 256) for batch in (64, 1024, 16384, 131072)]
    else:
        shapes = [(batch, 3, 256) for batch in (64, 1024, 16384)]
    dtypes = [torch.float32]
    if plan.device.type == "cuda":
        dtypes += [torch.bfloat16, torch.float16]
    kinds: list[tuple[str, str, Callable[[Case], Problem]]] = [
        ("masked_reverse_step", "fresh", rivals.MaskedReverseStep),
        ("masked_reverse_step", "out", rivals.MaskedReverseStep),
        ("add_noise", "fresh", rivals.AddNoise),
        ("randn", "fresh", rivals.Randn),
        ("randn", "out", rivals.Randn),
    ]
    return [
        Case(op, mode, shape, dtype, plan.device, threads, problem, plan.quick)
        for threads in plan.threads
        for op, mode, problem in kinds
        for dtype in dtypes
        for shape in shapes
    ]


SUITES: dict[str, Callable[[Plan], list[Case]]] = {"step": step}


def select(suite: str, plan: Plan) -> list[Case]:
    """The cases of ``suite``, or of every suite for ``"all"``.

    Raises:
        ValueError: no suite has that name.
    """
    if suite == "all":
        return [case for make in SUITES.values() for case in make(plan)]
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, expected one of {', '.join([*SUITES, 'all'])}")
    return SUITES[suite](plan)
