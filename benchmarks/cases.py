"""The suites: which ops are timed at which sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from modafill.benchmarks import networks, rivals, samplers, systems, training
from modafill.benchmarks.ddim import DdimStep
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


def ops(plan: Plan) -> list[Case]:
    """The DDIM step, and the ops that networks are trained with, forward, backward and both, at the models' sizes."""
    if plan.quick:
        steps, attention, convolution = [(8, 3, 32)], [(2, 2, 5, 8)], [(2, 5, 4, 8, 3), (2, 5, 4, 8, 1)]
    else:
        steps = [(batch, 3, 256) for batch in (64, 1024, 16384)]
        attention = [
            (batch, 8, length, 32)
            for batch in (1, 32, 256, 1024)
            for length in (8, 20, 50, 375, 500)
            if batch * length**2 <= 32 * 500**2
        ]
        convolution = [
            (batch, length, channels, channels, taps)
            for channels in (64, 256, 512)
            for taps in (1, 3)
            for batch, length in ((1, 20), (32, 8), (32, 50), (32, 500), (256, 20))
        ]
    kinds: list[tuple[str, Callable[[Case], Problem], Sequence[tuple[int, ...]], Sequence[str]]] = [
        ("ddim_step", DdimStep, steps, ("fresh", "out")),
        ("prompt_attention", networks.prompt_attention, attention, networks.MODES),
        ("conv_gelu_conv", networks.conv_gelu_conv, convolution, networks.MODES),
    ]
    return [
        Case(op, mode, shape, torch.float32, plan.device, threads, problem, plan.quick)
        for threads in plan.threads
        for op, problem, shapes, modes in kinds
        for mode in modes
        for shape in shapes
    ]


def cdtp(plan: Plan) -> list[Case]:
    """A training step and an imputation of CDTP at CMU-MOSI's shapes, in both sizes, the paper's with all threads."""
    shapes = systems.QUICK if plan.quick else systems.MOSI
    lengths = tuple(length for length, _ in shapes.values())
    sizes = [("small", (2,))] if plan.quick else [("small", (1, 8, 32, 128)), ("paper", (32,))]
    # On a GPU it is the whole batch or none.
    micro_batches = {"paper": 8} if plan.device.type == "cpu" else {}
    return [
        Case(
            f"cdtp-{preset}", mode, (batch, *lengths), torch.float32, plan.device, threads,
            partial(systems.Cdtp, preset, micro_batches.get(preset)), plan.quick, resident=True,
        )
        for threads in plan.threads
        for preset, batches in sizes
        if preset == "small" or threads == max(plan.threads)
        for batch in batches
        for mode in ("impute", "train")
    ]  # fmt: skip


def sampler(plan: Plan) -> list[Case]:
    """All steps of ADN in the paper's size, from one sample to more than the caches hold."""
    shapes = [(4, 3, 16)] if plan.quick else [(batch, 3, 256) for batch in (1, 32, 256, 1024, 8192)]
    return [
        Case("adn", "impute", shape, torch.float32, plan.device, threads, samplers.AdnSampler, plan.quick)
        for threads in plan.threads
        for shape in shapes
        if shape[0] <= 1024 or threads == max(plan.threads)
    ]


def train(plan: Plan) -> list[Case]:
    """A training step of ADN in the paper's size, and of CDTP's small denoisers at CMU-MOSI's lengths."""
    shapes = systems.QUICK if plan.quick else systems.MOSI
    lengths = tuple(length for length, _ in shapes.values())
    adn: list[tuple[int, ...]] = [(4, 3, 16)] if plan.quick else [(batch, 3, 256) for batch in (32, 128, 1024)]
    kinds: list[tuple[str, Callable[[Case], Problem], list[tuple[int, ...]]]] = [
        ("adn", training.AdnTraining, adn),
        ("unet", training.UnetTraining, [(2 if plan.quick else 32, *lengths)]),
    ]
    return [
        Case(op, "train", shape, torch.float32, plan.device, threads, problem, plan.quick, resident=op == "unet")
        for threads in plan.threads
        for op, problem, found in kinds
        for shape in found
    ]


SUITES: dict[str, Callable[[Plan], list[Case]]] = {
    "step": step,
    "ops": ops,
    "sampler": sampler,
    "train": train,
    "cdtp": cdtp,
}


def select(suite: str, plan: Plan) -> list[Case]:
    """The cases of ``suite``.

    Raises:
        ValueError: no suite has that name.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, expected one of {', '.join([*SUITES, 'all'])}")
    return SUITES[suite](plan)
