"""The Triton kernels in the interpreter: the bits of the C++ path in float32, the reference in float16."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from modafill import ops
from modafill.diffusion.schedule import Schedule
from modafill.kernels import philox as device_philox
from modafill.kernels.rows import config
from modafill.ops import Draw, reference

TABLE = Schedule.linear(50, 1e-3, 0.1).table
SHAPES = [(3, 2, 5), (2, 3, 1), (1, 1, 1), (2, 3, 256), (2, 1, 1031), (0, 3, 4), (2, 3, 0)]


@triton.jit
def _words_kernel(out, seed: tl.int64, row_id: tl.int64, step: tl.int64, draw, BLOCK: tl.constexpr):
    quad = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = device_philox.words(seed.to(tl.int64), row_id.to(tl.int64), step, draw, quad)
    tl.store(out + 4 * quad, w0.to(tl.int64))
    tl.store(out + 4 * quad + 1, w1.to(tl.int64))
    tl.store(out + 4 * quad + 2, w2.to(tl.int64))
    tl.store(out + 4 * quad + 3, w3.to(tl.int64))


@pytest.mark.parametrize(
    "seed, row, step", [(0, 0, 0), (-1, -1, 2**24 - 1), (0x299F31D0A4093822, 0x13198A2E85A308D3, 7)]
)
def test_words_are_bit_equal(seed: int, row: int, step: int) -> None:
    out = torch.zeros(64, 4, dtype=torch.int64)
    _words_kernel[(1,)](out, seed, row, step, 3, BLOCK=64)
    expected = reference.philox(seed, torch.tensor([row]), torch.arange(64), step | 3 << 24)[0]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 + 11])
def test_normals_are_bit_equal(seed: int) -> None:
    rows = torch.tensor([0, -1, 2**40 + 3])
    for shape, draw, step in (((3, 20_001), Draw.INITIAL, 9), ((3, 5), Draw.RESAMPLE, torch.tensor([0, 2**24 - 1, 3]))):
        kwargs: dict[str, Any] = {"seed": seed, "row_id": rows, "draw": draw, "step": step}
        assert torch.equal(ops.randn(shape, **kwargs, backend="triton"), ops.randn(shape, **kwargs, backend="cpu"))


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, eps, observed = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    observed.flatten()[::3] = -0.0  # to be kept at step 1, sign and all
    return x, eps, observed, torch.rand(shape[:2], generator=generator) < 0.5


def _calls(shape: tuple[int, ...], step: int | Tensor, tensors: tuple[Tensor, ...], noise: dict[str, Any]) -> list[Any]:
    x, eps, observed, available = tensors
    calls: list[Any] = [
        lambda backend: ops.masked_reverse_step(x, eps, observed, available, TABLE, step, **noise, backend=backend),
        lambda backend: torch.stack(ops.add_noise(x, TABLE, step, **noise, backend=backend)),
    ]
    for eta, clip in itertools.product((0.0, 0.6, 1.0), (None, 0.8)):
        calls.append(
            lambda backend, e=eta, c=clip: ops.ddim_step(
                x, eps, TABLE, step, step // 2, eta=e, clip=c, **noise, backend=backend
            )
        )
    return calls


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_bit_equal_to_the_cpu(shape: tuple[int, ...]) -> None:
    tensors = _inputs(shape, torch.float32)
    rows = torch.arange(shape[0]) * (2**33 + 1) - 1
    seed = torch.tensor(-(2**40) - 7)
    for step, noise in (
        (1, {"seed": 3}),
        (50, {"seed": 2**64 - 9, "row_id": rows}),
        (torch.tensor(17), {"seed": seed}),
        (torch.arange(shape[0]) * 17 % 50 + 1, {"seed": seed, "row_id": rows}),
    ):
        for call in _calls(shape, step, tensors, noise):
            assert torch.equal(call("triton").view(torch.int32), call("cpu").view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_float16_agrees_with_the_reference(shape: tuple[int, ...]) -> None:
    tensors = _inputs(shape, torch.float16)
    for call in _calls(shape, 17, tensors, {"seed": 3}):
        torch.testing.assert_close(call("triton"), call("reference"), rtol=2e-3, atol=2e-3)


def test_an_element_reads_only_what_it_needs() -> None:
    x, eps, observed, available = _inputs((4, 3, 5), torch.float32)
    for step in (1, 30):
        expected = ops.masked_reverse_step(x, eps, observed, available, TABLE, step, seed=1, backend="cpu")
        mask = available[..., None]
        spoilt = (x.masked_fill(mask, math.nan), eps.masked_fill(mask, math.inf), observed.masked_fill(~mask, math.nan))
        ours = ops.masked_reverse_step(*spoilt, available, TABLE, step, seed=1, backend="triton")
        assert torch.equal(ours, expected)


def test_nothing_is_written_outside_the_output() -> None:
    x, eps, observed, available = _inputs((3, 2, 5), torch.float32)
    for call in (
        lambda out: ops.masked_reverse_step(x, eps, observed, available, TABLE, 9, seed=1, out=out, backend="triton"),
        lambda out: ops.ddim_step(x, eps, TABLE, 9, 3, eta=0.5, seed=1, out=out, backend="triton"),
        lambda out: ops.randn((3, 2, 5), seed=1, out=out, backend="triton"),
    ):
        arena = torch.full((94,), math.nan)
        out = arena[32:62].view(3, 2, 5)
        call(out)
        assert not out.isnan().any()
        assert arena[:32].isnan().all()
        assert arena[62:].isnan().all()


def test_out_may_be_x() -> None:
    x, eps, observed, available = _inputs((3, 2, 5), torch.float32)
    expected = ops.masked_reverse_step(x, eps, observed, available, TABLE, 9, seed=1, backend="cpu")
    ops.masked_reverse_step(x, eps, observed, available, TABLE, 9, seed=1, out=x, backend="triton")
    assert torch.equal(x, expected)


def test_a_step_outside_the_schedule_gives_nan_in_its_row() -> None:
    """In the result and in its gradients."""
    x, eps, observed, available = _inputs((4, 2, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, eps, observed)]
    step, bad = torch.tensor([0, 50, 51, 7]), [True, False, True, False]
    before = torch.zeros_like(step)
    outputs = [
        (ops.masked_reverse_step(x, eps, observed, available, TABLE, step, seed=1, backend="triton"), leaves),
        (ops.add_noise(x, TABLE, step, seed=1, backend="triton")[0], leaves[:1]),
        (ops.ddim_step(x, eps, TABLE, step, before, eta=1.0, seed=1, backend="triton"), leaves[:2]),
        (ops.ddim_step(x, eps, TABLE, step, before, clip=0.5, backend="triton"), leaves[:2]),
        (
            ops.ddim_step(x, eps, TABLE, torch.full((4,), 7), torch.tensor([7, 6, -1, 0]), backend="triton"),
            leaves[:2],
        ),
    ]
    for out, inputs in outputs:
        for found in (out, *torch.autograd.grad(out.sum(), inputs)):
            assert found.isnan().flatten(1).all(1).tolist() == bad
            assert found.isnan().flatten(1).any(1).tolist() == bad
    noise = ops.randn((2, 5), seed=1, step=torch.tensor([-1, 2**24 - 1]), backend="triton")
    assert noise.isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("op", ["masked_reverse_step", "add_noise", "randn", "ddim_step"])
def test_every_device_has_a_configuration(op: str) -> None:
    assert config(op, 90, 10_000) == config(op, 99, 10_000)
    for capability in (70, 80, 86, 87, 89, 90, 100, 103, 120, 121, 200):
        for width in (1, 5, 768, 10_000):
            settings = config(op, capability, width)
            assert settings["BLOCK"] >= 32
            assert settings["BLOCK"] >= 32 * settings["num_warps"]
            assert settings["BLOCK"] & (settings["BLOCK"] - 1) == 0
