"""The step ops: the C++ path against the float64 reference, gradients, tracing, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.memory import neighbours
from torch import Tensor

from modafill import ops
from modafill.diffusion.schedule import Schedule
from modafill.ops import reference

DTYPES = {torch.float64: 1e-6, torch.float32: 4e-6, torch.bfloat16: 4e-2}
SHAPES = [(0, 3, 8), (1, 1, 1), (2, 3, 5), (7, 2, 256), (3, 5, 1), (4, 3, 0), (2, 3, 683), (70, 3, 257)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    x, eps, observed = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return x, eps, observed, torch.rand(shape[:2], generator=generator) < 0.5


def _steps(batch: int, kind: str) -> int | Tensor:
    if kind == "integer":
        return 17
    return torch.tensor(17) if kind == "scalar" else torch.arange(batch) * 7 % 50 + 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autograd_knows_that_out_was_written(backend: str, schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((2, 3, 5), torch.float32, generator)
    calls: list[Callable[[], Tensor]] = [
        lambda: ops.masked_reverse_step(x, eps, observed, available, schedule.table, 7, seed=1, out=x, backend=backend),
        lambda: ops.ddim_step(x, eps, schedule.table, 7, 3, out=x, backend=backend),
        lambda: ops.randn((2, 3, 5), seed=1, out=x, backend=backend),
    ]
    for call in calls:
        weight = torch.ones_like(x, requires_grad=True)
        loss = (x * weight).sum()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        ops.randn((2, 3, 5), seed=1, out=torch.empty(2, 3, 5), backend=backend)


@pytest.mark.parametrize("kind", ["integer", "scalar", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ops_agree_with_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, schedule: Schedule, generator: torch.Generator
) -> None:
    x, eps, observed, available = _inputs(shape, dtype, generator)
    step = _steps(shape[0], kind)
    rows = torch.arange(shape[0]) * (2**33 + 1) - 5
    common: dict[str, Any] = {"seed": -3, "row_id": rows}
    table, bound = schedule.table, DTYPES[dtype]

    def close(ours: Tensor, exact: Tensor) -> None:
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), exact, rtol=bound, atol=bound)

    out = torch.full_like(x, math.nan)
    args = (x, eps, observed, available, table, step)
    ops.masked_reverse_step(*args, **common, out=out, backend="cpu")
    close(out, reference.masked_reverse_step(*args, **common))
    for ours, exact in zip(
        ops.add_noise(x, table, step, **common, backend="cpu"),
        reference.add_noise(x, table, step, **common),
        strict=True,
    ):
        close(ours, exact)
    previous = (step // 2, _steps(shape[0], "rows").clamp(max=step - 1)) if kind == "integer" else (step // 2, 0)
    for eta, clip, prev_step in itertools.product((0.0, 0.4, 1.0), (None, 0.8), previous):
        out.fill_(math.nan)
        ops.ddim_step(x, eps, table, step, prev_step, eta=eta, clip=clip, **common, out=out, backend="cpu")
        close(out, reference.ddim_step(x, eps, table, step, prev_step, eta=eta, clip=clip, **common))


def test_every_backend_name_gives_the_same_step(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((3, 2, 9), torch.float32, generator)
    results = [
        ops.masked_reverse_step(x, eps, observed, available, schedule.table, 5, seed=1, backend=backend)
        for backend in ("auto", "cpu", "reference")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2])


def test_strided_inputs_are_read_as_they_are(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((6, 4, 10), torch.float32, generator)
    steps = torch.arange(1, 13)
    views = (x[::2, :, 1::3], eps.flip(0)[::2, :, 1::3], observed.permute(2, 1, 0)[:3].permute(2, 1, 0)[::2])
    for mask, step in ((available[::2], steps[::4]), (available.T.contiguous().T[1::2], 3)):
        args = (*views, mask, schedule.table, step)
        dense = (*(v.contiguous() for v in views), mask.contiguous(), schedule.table, step)
        assert torch.equal(ops.masked_reverse_step(*args, seed=1), ops.masked_reverse_step(*dense, seed=1))


def test_an_element_reads_only_what_it_needs(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((5, 3, 37), torch.float32, generator)
    for step in (1, 30):
        expected = ops.masked_reverse_step(x, eps, observed, available, schedule.table, step, seed=1)
        for hidden in (math.nan, math.inf):
            spoilt = [torch.where(mask[..., None], hidden, value) for mask, value in
                      ((available, x), (available, eps), (~available, observed))]  # fmt: skip
            for backend in ("cpu", "reference"):
                ours = ops.masked_reverse_step(*spoilt, available, schedule.table, step, seed=1, backend=backend)
                torch.testing.assert_close(ours, expected)


def test_the_last_step_keeps_the_observation_and_draws_nothing(schedule: Schedule, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        x, eps, observed, available = _inputs((5, 3, 7), dtype, generator)
        observed[..., 0] = -0.0
        first = ops.masked_reverse_step(x, eps, observed, available, schedule.table, 1, seed=1)
        assert torch.equal(first[available].view(torch.uint8), observed[available].view(torch.uint8))
        assert torch.equal(first, ops.masked_reverse_step(x, eps, observed, available, schedule.table, 1, seed=2))


def test_the_noise_is_that_of_randn(schedule: Schedule) -> None:
    x = torch.zeros(3, 2, 11)
    noisy, noise = ops.add_noise(x, schedule.table, 9, seed=4)
    assert torch.equal(noise, ops.randn((3, 2, 11), seed=4, step=9, draw=ops.Draw.FORWARD))
    assert torch.equal(noisy, schedule.table[9, reference.SQRT_ONE_MINUS_ALPHA_BAR] * noise)
    ours = ops.masked_reverse_step(x, x, x, torch.zeros(3, 2, dtype=torch.bool), schedule.table, 9, seed=4)
    z = ops.randn((3, 2, 11), seed=4, step=9, draw=ops.Draw.REVERSE)
    assert torch.equal(ours, schedule.table[9, reference.POSTERIOR_STD] * z)


def test_large_outputs_that_bypass_the_caches_have_the_same_bits(schedule: Schedule) -> None:
    rows = (1 << 25) // (3 * 683 * 8) + 2
    shape, some = (rows, 3, 683), torch.tensor([0, 1, rows // 2, rows - 1])
    x, eps, observed = (ops.randn(shape, seed=seed, dtype=torch.float64) for seed in range(3))
    available = torch.arange(3 * rows).view(rows, 3) % 2 == 0

    def every_op(x: Tensor, eps: Tensor, observed: Tensor, available: Tensor, row_id: Tensor) -> list[Tensor]:
        noise: dict[str, Any] = {"seed": 5, "row_id": row_id}
        return [
            ops.masked_reverse_step(x, eps, observed, available, schedule.table, 9, **noise),
            *ops.add_noise(x, schedule.table, 9, **noise),
            ops.ddim_step(x, eps, schedule.table, 9, 3, eta=0.5, **noise),
            ops.ddim_step(x, eps, schedule.table, 9, 3),
            ops.ddim_step(x, eps, schedule.table, 9, 3, clip=0.5),
        ]

    large = every_op(x, eps, observed, available, torch.arange(rows))
    small = every_op(x[some], eps[some], observed[some], available[some], some)
    for whole, part in zip(large, small, strict=True):
        assert torch.equal(whole[some], part)


def test_out_may_be_an_input(schedule: Schedule, generator: torch.Generator) -> None:
    for shape in ((3, 2, 7), (40, 3, 256)):
        x, eps, observed, available = _inputs(shape, torch.float32, generator)
        expected = ops.masked_reverse_step(x, eps, observed, available, schedule.table, 9, seed=4)
        for position in range(3):
            inputs = [x.clone(), eps.clone(), observed.clone()]
            out = inputs[position]
            assert ops.masked_reverse_step(*inputs, available, schedule.table, 9, seed=4, out=out) is out
            assert torch.equal(out, expected)
        expected = ops.ddim_step(x, eps, schedule.table, 9, 3)
        assert torch.equal(ops.ddim_step(x, eps, schedule.table, 9, 3, out=x), expected)


def test_out_overlaps_no_part_of_an_input(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((3, 2, 7), torch.float32, generator)

    def step(inputs: list[Tensor], out: Tensor | None) -> list[Tensor]:
        reverse = ops.masked_reverse_step(*inputs, available, schedule.table, 9, seed=4, out=out).clone()
        return [reverse, ops.ddim_step(*inputs[:2], schedule.table, 9, 3, out=out)]

    inputs = [x, eps, observed]
    expected = step(inputs, None)
    for i, value in enumerate(inputs):
        for copy, out, shared in neighbours(value, x.shape):
            args = [copy if j == i else other for j, other in enumerate(inputs)]
            if not shared:
                assert all(torch.equal(a, b) for a, b in zip(step(args, out), expected, strict=True))
                continue
            with pytest.raises(ValueError, match=r"^out: got a tensor that overlaps an input"):
                ops.masked_reverse_step(*args, available, schedule.table, 9, seed=4, out=out)
            if i < 2:
                with pytest.raises(ValueError, match=r"^out: got a tensor that overlaps an input"):
                    ops.ddim_step(*args[:2], schedule.table, 9, 3, out=out)


def test_out_lies_in_no_gap_of_a_strided_input(schedule: Schedule) -> None:
    room = torch.randn(4, 50)
    x = room[:, :10]
    for begin in (0, 11, 120):
        with pytest.raises(ValueError, match=r"^out: "):
            ops.ddim_step(x, x, schedule.table, 9, 3, out=room.view(-1)[begin : begin + 40].view(4, 10))
    # Behind the last element that x has.
    expected = ops.ddim_step(x, x, schedule.table, 9, 3)
    assert torch.equal(ops.ddim_step(x, x, schedule.table, 9, 3, out=room.view(-1)[160:].view(4, 10)), expected)


def test_out_that_does_not_fit_is_refused(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((3, 2, 8), torch.float32, generator)
    storage = torch.randn(100)
    refused = [
        (x, torch.empty(3, 2, 9)),
        (x, torch.empty(3, 2, 8, dtype=torch.float64)),
        (x, torch.empty(3, 8, 2).transpose(1, 2)),
        (storage[:48].view(3, 2, 8), storage[1:49].view(3, 2, 8)),
        (x.clone().requires_grad_(), torch.empty(3, 2, 8)),
    ]
    for value, out in refused:
        with pytest.raises(ValueError, match=r"^out: "):
            ops.masked_reverse_step(value, eps, observed, available, schedule.table, 9, seed=4, out=out)


def _differentiable(
    schedule: Schedule, available: Tensor, step: int | Tensor
) -> list[tuple[Callable[..., Tensor], int]]:
    table, prev_step = schedule.table, step // 2
    calls: list[tuple[Callable[..., Tensor], int]] = [
        (lambda x, eps, observed: ops.masked_reverse_step(x, eps, observed, available, table, step, seed=1), 3),
        (lambda x: ops.add_noise(x, table, step, seed=1)[0], 1),
    ]
    for eta, clip in ((0.0, None), (1.0, None), (0.5, 0.7)):
        calls.append(
            (lambda x, eps, e=eta, c=clip: ops.ddim_step(x, eps, table, step, prev_step, eta=e, clip=c, seed=1), 2)
        )
    return calls


@pytest.mark.parametrize("kind", ["integer", "rows"])
def test_gradients_in_every_subset(kind: str, schedule: Schedule, generator: torch.Generator) -> None:
    *values, available = _inputs((4, 3, 5), torch.float64, generator)
    for call, arity in _differentiable(schedule, available, _steps(4, kind)):
        for needed in itertools.product((False, True), repeat=arity):
            if any(needed):
                inputs = [v.clone().requires_grad_(need) for v, need in zip(values[:arity], needed, strict=True)]
                assert torch.autograd.gradcheck(call, inputs)
                call(*inputs).sum().backward()
                assert [v.grad is not None for v in inputs] == list(needed)


def test_a_gradient_does_not_cross_the_mask(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((4, 3, 5), torch.float32, generator)
    for value in (x, eps, observed):
        value.requires_grad_()
    out = ops.masked_reverse_step(x, eps, observed, available, schedule.table, 5, seed=1)
    out.backward(torch.where(available[..., None], math.nan, torch.ones_like(out)))
    assert torch.equal(x.grad.isnan(), torch.zeros_like(x, dtype=torch.bool))
    assert torch.equal(eps.grad == 0, available[..., None].expand_as(eps))


def test_second_derivatives_and_functorch(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((2, 3, 5), torch.float64, generator)
    for call, arity in _differentiable(schedule, available, 7)[:2]:
        values = [v.clone().requires_grad_() for v in (x, eps, observed)[:arity]]
        assert torch.autograd.gradgradcheck(call, values)
        expected = torch.autograd.grad(call(*values).sum(), values[0])[0]
        assert torch.equal(torch.func.grad(lambda first, c=call, v=values: c(first, *v[1:]).sum())(x), expected)


def _registered(schedule: Schedule, generator: torch.Generator) -> list[tuple[Any, tuple[Any, ...]]]:
    x, eps, observed, available = _inputs((4, 3, 5), torch.float32, generator)
    grad = [v.clone().requires_grad_() for v in (x, eps, observed)]
    step, rows, seed = torch.tensor([1, 50, 20, 7]), torch.arange(4), torch.tensor(3)
    table, op = schedule.table, torch.ops.modafill
    cases: list[tuple[Any, tuple[Any, ...]]] = []
    for x_, eps_, observed_ in ((x, eps, observed), grad):
        for tail in ((3, None, 1, None, None, "auto"), (0, step, 0, seed, rows, "auto")):
            cases.append((op.masked_reverse_step, (x_, eps_, observed_, available, table, *tail)))
            cases.append((op.add_noise, (x_, table, *tail)))
        for clip in (None, 1.0):
            cases.append((op.ddim_step, (x_, eps_, table, 3, None, 1, None, 0.5, 1, None, None, clip, "auto")))
            tail = (0, step, 0, step // 2, 0.5, 0, seed, rows, clip, "auto")
            cases.append((op.ddim_step, (x_, eps_, table, *tail)))
    cases.append((op.randn, ([3, 4], 3, None, 1, None, None, 2, torch.float32, torch.device("cpu"), "auto")))
    return cases


def test_registered_ops_pass_opcheck(schedule: Schedule, generator: torch.Generator) -> None:
    for op, args in _registered(schedule, generator):
        torch.library.opcheck(op, args)


def test_registered_ops_check_their_arguments(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, available = _inputs((4, 3, 5), torch.float32, generator)
    args = (x, eps[:2], observed, available, schedule.table, 3, None, 1, None, None, "auto")
    with pytest.raises(ValueError, match=r"^eps: "):
        torch.ops.modafill.masked_reverse_step(*args)


def test_compiles_whole_and_does_not_recompile_for_each_step(schedule: Schedule, generator: torch.Generator) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    x, eps, observed, available = _inputs((4, 3, 5), torch.float32, generator)
    table = schedule.table

    def every_op(x: Tensor, step: int, seed: int) -> Tensor:
        x = ops.masked_reverse_step(x, eps, observed, available, table, step, seed=seed)
        x = ops.ddim_step(x, eps, table, step, step - 1, eta=0.3, seed=seed)
        return ops.add_noise(x, table, step, seed=seed)[0] + ops.randn((4, 3, 5), seed=seed, step=step)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(every_op, fullgraph=True, backend=counter)
    for step, seed in ((5, 1), (6, 2), (7, 3), (20, -4), (49, 2**63 - 1)):
        assert torch.equal(compiled(x, step, seed), every_op(x, step, seed))
    assert counter.frame_count <= 2
    value = x.clone().requires_grad_()
    compiled(value, 9, 1).sum().backward()
    expected = x.clone().requires_grad_()
    every_op(expected, 9, 1).sum().backward()
    torch.testing.assert_close(value.grad, expected.grad)


def test_modes_and_subclasses_see_the_registered_op(schedule: Schedule) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Spy():
        ops.add_noise(torch.zeros(2, 3), schedule.table, 3, seed=1)
    assert torch.ops.modafill.add_noise.default in seen
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.add_noise(mode.from_tensor(torch.zeros(2, 3)), mode.from_tensor(schedule.table), 3, seed=1)[0]
        assert fake.shape == (2, 3)


BAD_CALLS: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("x", {"x": torch.zeros(2, 3)}, ValueError),
    ("x", {"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, ValueError),
    ("x", {"x": [1.0]}, TypeError),
    ("eps", {"eps": torch.zeros(2, 3, 5)}, ValueError),
    ("eps", {"eps": torch.zeros(2, 3, 4, dtype=torch.float64)}, ValueError),
    ("observed", {"observed": torch.zeros(1, 3, 4)}, ValueError),
    ("observed", {"observed": torch.zeros(2, 3, 4, device="meta")}, ValueError),
    ("available", {"available": torch.zeros(2, 3)}, ValueError),
    ("available", {"available": torch.zeros(2, 4, dtype=torch.bool)}, ValueError),
    ("table", {"table": torch.zeros(51, 4)}, ValueError),
    ("table", {"table": torch.zeros(51, 5, dtype=torch.float64)}, ValueError),
    ("table", {"table": torch.zeros(5, 51).T}, ValueError),
    ("table", {"table": torch.zeros(1, 5)}, ValueError),
    ("step", {"step": 0}, ValueError),
    ("step", {"step": 51}, ValueError),
    ("step", {"step": 1.0}, TypeError),
    ("step", {"step": torch.tensor([1, 51])}, ValueError),
    ("step", {"step": torch.tensor([0, 1])}, ValueError),
    ("step", {"step": torch.tensor(-1)}, ValueError),
    ("step", {"step": torch.tensor([1, 2, 3])}, ValueError),
    ("step", {"step": torch.tensor([1.0, 2.0])}, ValueError),
    ("seed", {"seed": 2**64}, ValueError),
    ("seed", {"seed": 0.5}, TypeError),
    ("seed", {"seed": torch.tensor(1.0)}, ValueError),
    ("row_id", {"row_id": torch.arange(3)}, ValueError),
    ("row_id", {"row_id": torch.arange(2, dtype=torch.int32)}, ValueError),
    ("backend", {"backend": "fast"}, ValueError),
]


@pytest.mark.parametrize("named, change, error", BAD_CALLS)
def test_errors_name_the_argument(
    named: str, change: dict[str, Any], error: type[Exception], schedule: Schedule
) -> None:
    good: dict[str, Any] = {
        **{name: torch.zeros(2, 3, 4) for name in ("x", "eps", "observed")},
        "available": torch.ones(2, 3, dtype=torch.bool),
        "table": schedule.table,
        "step": 3,
        "seed": 1,
    }
    for backend in ("auto", "reference"):
        with pytest.raises(error, match=f"^{named}: "):
            ops.masked_reverse_step(**{**good, "backend": backend, **change})


def test_an_array_of_numpy_is_named_and_not_printed(schedule: Schedule) -> None:
    with pytest.raises(TypeError, match=r"^x: got ndarray, expected a tensor$"):
        ops.add_noise(np.ones((5, 3, 8), np.float32), schedule.table, 3, seed=1)


@pytest.mark.parametrize(
    "named, change",
    [
        ("prev_step", {"prev_step": 5}),
        ("prev_step", {"prev_step": -1}),
        ("prev_step", {"prev_step": torch.tensor([3, 5])}),
        ("prev_step", {"step": torch.tensor([9, 3]), "prev_step": 4}),
        ("step", {"step": torch.tensor([9, 51])}),
        ("seed", {"eta": 0.1}),
        ("eta", {"eta": 1.1, "seed": 1}),
        ("eta", {"eta": math.nan}),
        ("clip", {"clip": 0.0}),
    ],
)
def test_ddim_errors_name_the_argument(named: str, change: dict[str, Any], schedule: Schedule) -> None:
    good: dict[str, Any] = {"x": torch.zeros(2, 3), "eps": torch.zeros(2, 3), "step": 5, "prev_step": 3}
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=f"^{named}: "):
            ops.ddim_step(**{**good, "table": schedule.table, "backend": backend, **change})


def test_one_ddim_stride_is_the_posterior_at_eta_one(schedule: Schedule, generator: torch.Generator) -> None:
    x, eps, observed, _ = _inputs((4, 3, 5), torch.float64, generator)
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    for step in (2, 25, 50):
        ancestral = ops.masked_reverse_step(x, eps, observed, nothing, schedule.table, step, seed=1)
        torch.testing.assert_close(
            ops.ddim_step(x, eps, schedule.table, step, step - 1, eta=1.0, seed=1), ancestral, rtol=1e-5, atol=1e-5
        )


def test_ddim_is_finite_where_the_signal_is_almost_gone() -> None:
    table = Schedule.linear().table
    x = torch.randn(3, 8)
    for eta in (0.0, 0.5, 1.0):
        for step, prev_step in ((1000, 999), (1000, 0), (700, 650), (2, 1), (1, 0)):
            out = ops.ddim_step(x, x, table, step, prev_step, eta=eta, seed=1, clip=1.0)
            assert out.isfinite().all()
