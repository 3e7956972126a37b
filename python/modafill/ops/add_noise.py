"""The forward process of a diffusion: noise a clean sample to a given step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from modafill.ops import backends, reference

_SCHEMA = (
    "(Tensor x, Tensor table, SymInt step, Tensor? step_tensor, SymInt seed, Tensor? seed_tensor, Tensor? row_id,"
    " str backend) -> (Tensor, Tensor)"
)


def _check(
    x: Tensor, table: Tensor, step: int, step_tensor: Tensor | None, seed_tensor: Tensor | None, row_id: Tensor | None
) -> None:
    backends.check_rows("x", x)
    backends.check_table(table, x)
    backends.check_step("step", step, step_tensor, x.shape[0], x.device, 1, table.shape[0] - 1)
    backends.check_noise(seed_tensor, row_id, x.shape[0], x.device)


def _run(
    x: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(x, table, step, step_tensor, seed_tensor, row_id)
    backend = backends.select("add_noise", x.device, x.dtype, backend)
    steps = table.shape[0] - 1
    if backend == "reference":
        backends.check_step_values("step", step_tensor, 1, steps)
        noisy, noise = reference.add_noise(
            x,
            table,
            step if step_tensor is None else step_tensor,
            seed=seed if seed_tensor is None else seed_tensor,
            row_id=row_id,
        )
        return noisy.to(x.dtype).contiguous(), noise.to(x.dtype)
    x, step_tensor, row_id = x.contiguous(), backends.contiguous(step_tensor), backends.contiguous(row_id)
    noisy, noise = (
        backends.fresh(torch.empty_like(x, memory_format=torch.contiguous_format), backend) for _ in range(2)
    )
    if backend == "triton":
        backends.launch_triton("add_noise", noisy, noise, x, table, step, step_tensor, seed, seed_tensor, row_id)
        return noisy, noise
    backends.launch(
        "add_noise",
        backend,
        x.device,
        backends.DTYPE_CODES[x.dtype],
        noisy.data_ptr(),
        noise.data_ptr(),
        x.data_ptr(),
        table.data_ptr(),
        steps,
        *backends.step_args(step, step_tensor),
        backends.pointer(seed_tensor),
        seed,
        backends.pointer(row_id),
        x.shape[0],
        math.prod(x.shape[1:]),
    )
    return noisy, noise


def _fake(
    x: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(x, table, step, step_tensor, seed_tensor, row_id)
    noisy = torch.empty_like(x, memory_format=torch.contiguous_format)
    return noisy, torch.empty_like(noisy)


class _Function(backends.Function):
    op = "add_noise"

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, table, step, step_tensor, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(table, step_tensor)
        ctx.step = step

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        table, step_tensor = ctx.saved_tensors
        row = backends.row_coefficients(table, ctx.step, step_tensor, grad)
        return (row[..., reference.SQRT_ALPHA_BAR] * grad).to(grad.dtype), *[None] * 7


_op = backends.register("add_noise", _SCHEMA, _run, _fake, lambda *args: _Function.apply(*args))


def add_noise(
    x: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noise a clean sample to step n (ADMC eq. 1; CDTP eq. 4 with √ᾱ_n, which its text prints as √α_n).

    Args:
        x: clean sample ``[B, ...]``; float32, float64 or bfloat16 on the CPU, float32, bfloat16 or float16 on a GPU.
        table: float32 ``[N + 1, 5]``, :attr:`modafill.diffusion.Schedule.table`.
        step: n in 1…N, an integer or int64 ``[]`` or ``[B]`` on the device of ``x``.
        seed: 64-bit integer or int64 ``[]`` on the device of ``x``.
        row_id: int64 ``[B]``, the identity of each row's noise; None = 0…B−1.
        backend: ``"auto"`` or one of :data:`modafill.ops.backends.BACKENDS`; see :func:`modafill.ops.explain`.

    Returns:
        ``(√ᾱ_n x + √(1 − ᾱ_n) ε, ε)``, both like ``x``; the first is differentiable in ``x``.

    Raises:
        ValueError: a shape, dtype, device or step does not fit. A step outside 1…N in a GPU tensor is not read back:
            the noisy row becomes NaN, the noise is as it is.
        RuntimeError: ``backend`` names one that cannot run here.
    """
    args = (x, table, *backends.split_step("step", step), *backends.split_seed(seed), row_id, backend)
    if backends.runs_directly(x, table, step, seed, row_id):
        return _run(*args)
    return backends.dispatch(_op, _Function, *args)
