"""One reverse step of ADMC's imputation: posterior sample where missing, re-noised observation where present."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modafill.ops import backends, reference

_SCHEMA = (
    "(Tensor x, Tensor eps, Tensor observed, Tensor available, Tensor table, SymInt step, Tensor? step_tensor,"
    " SymInt seed, Tensor? seed_tensor, Tensor? row_id, str backend) -> Tensor"
)


def _check(
    x: Tensor,
    eps: Tensor,
    observed: Tensor,
    available: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
) -> None:
    backends.check_rows("x", x)
    if x.ndim != 3:
        raise ValueError(f"x: got {backends.describe(x)}, expected [B, M, D]")
    backends.check_same("eps", eps, x)
    backends.check_same("observed", observed, x)
    backends.check_tensor("available", available)
    if available.dtype != torch.bool or available.shape != x.shape[:2] or available.device != x.device:
        raise ValueError(
            f"available: got {backends.describe(available)}, expected bool {list(x.shape[:2])} on {x.device}"
        )
    backends.check_table(table, x)
    backends.check_step("step", step, step_tensor, x.shape[0], x.device, 1, table.shape[0] - 1)
    backends.check_noise(seed_tensor, row_id, x.shape[0], x.device)


def _run(
    x: Tensor,
    eps: Tensor,
    observed: Tensor,
    available: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    _check(x, eps, observed, available, table, step, step_tensor, seed_tensor, row_id)
    backend = backends.select("masked_reverse_step", x.device, x.dtype, backend)
    if out is not None:
        backends.check_out(out, x.shape, x.dtype, x.device, x, eps, observed, may_be_input=True)
    steps = table.shape[0] - 1
    if backend == "reference":
        backends.check_step_values("step", step_tensor, 1, steps)
        result = reference.masked_reverse_step(
            x,
            eps,
            observed,
            available,
            table,
            step if step_tensor is None else step_tensor,
            seed=seed if seed_tensor is None else seed_tensor,
            row_id=row_id,
        )
        return result.to(x.dtype).contiguous() if out is None else out.copy_(result)
    x, eps, observed, available = x.contiguous(), eps.contiguous(), observed.contiguous(), available.contiguous()
    step_tensor, row_id = backends.contiguous(step_tensor), backends.contiguous(row_id)
    if out is None:
        out = backends.fresh(torch.empty_like(x, memory_format=torch.contiguous_format), backend)
    if backend == "triton":
        backends.launch_triton(
            "masked_reverse_step", out, x, eps, observed, available, table, step, step_tensor, seed, seed_tensor, row_id
        )
        return out
    backends.launch(
        "masked_reverse_step",
        backend,
        x.device,
        backends.DTYPE_CODES[x.dtype],
        out.data_ptr(),
        x.data_ptr(),
        eps.data_ptr(),
        observed.data_ptr(),
        available.data_ptr(),
        table.data_ptr(),
        steps,
        *backends.step_args(step, step_tensor),
        backends.pointer(seed_tensor),
        seed,
        backends.pointer(row_id),
        *x.shape,
    )
    return out


def _fake(
    x: Tensor,
    eps: Tensor,
    observed: Tensor,
    available: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    backend: str,
) -> Tensor:
    _check(x, eps, observed, available, table, step, step_tensor, seed_tensor, row_id)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Function(backends.Function):
    op = "masked_reverse_step"

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, _, available, table, step, step_tensor, *_ = inputs
        ctx.save_for_backward(available, table, step_tensor)
        ctx.step = step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        available, table, step_tensor = ctx.saved_tensors
        need_x, need_eps, need_observed = ctx.needs_input_grad[:3]
        available = available[..., None]
        missing = torch.where(available, 0.0, grad)
        row = backends.row_coefficients(table, ctx.step, step_tensor, grad)
        grads: list[Tensor | None] = [None] * 11
        if need_x:
            grads[0] = (row[..., reference.POSTERIOR_X] * missing).to(grad.dtype)
        if need_eps:
            grads[1] = (row[..., reference.POSTERIOR_EPS] * missing).to(grad.dtype)
        if need_observed:
            previous = None if step_tensor is None else step_tensor - 1
            before = backends.row_coefficients(table, ctx.step - 1, previous, grad, low=0)
            # Of N + 1, which is no step, the one before is.
            before = torch.where(row.isnan(), row, before)
            grads[2] = (before[..., reference.SQRT_ALPHA_BAR] * torch.where(available, grad, 0.0)).to(grad.dtype)
        return tuple(grads)


_op = backends.register("masked_reverse_step", _SCHEMA, _run, _fake, lambda *args: _Function.apply(*args))


def masked_reverse_step(
    x: Tensor,
    eps: Tensor,
    observed: Tensor,
    available: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Step ``n → n − 1`` of a diffusion that keeps what was observed (ADMC eq. 3–4), in one pass.

    A missing modality becomes x_n/√α_n − β_n/(√α_n √(1−ᾱ_n)) ε̂ + √β̃_n z; an observed one becomes
    √ᾱ_{n−1} x_obs + √(1−ᾱ_{n−1}) z. A missing element reads ``x`` and ``eps`` alone, an observed one ``observed``
    alone, so NaN in what is not read does no harm. At step 1 no noise is drawn and the observed part is exact.

    Two departures from the paper's text: the posterior variance is β̃_n = β_n(1−ᾱ_{n−1})/(1−ᾱ_n), which its σ² leaves
    open and which alone gives no noise at step 1, and the mean is scaled by 1/√α_n (eq. 3 prints 1/√ᾱ_n, which is no
    posterior mean).

    Args:
        x: noisy features ``[B, M, D]``; float32, float64 or bfloat16 on the CPU, float32, bfloat16 or float16 on a GPU.
        eps: the denoiser's ε̂, like ``x``.
        observed: clean features, like ``x``.
        available: bool ``[B, M]``, True = observed.
        table: float32 ``[N + 1, 5]``, :attr:`modafill.diffusion.Schedule.table`.
        step: n in 1…N, an integer or int64 ``[]`` or ``[B]`` on the device of ``x``.
        seed: 64-bit integer or int64 ``[]`` on the device of ``x``; read there, so a replayed CUDA graph may change it.
        row_id: int64 ``[B]``, the identity of each row's noise; None = 0…B−1.
        out: like ``x``, contiguous; may be ``x``, ``eps`` or ``observed`` itself. Only where no gradient is needed.
        backend: ``"auto"`` or one of :data:`modafill.ops.backends.BACKENDS`; see :func:`modafill.ops.explain`.

    Returns:
        ``[B, M, D]`` in the dtype of ``x``; differentiable in ``x``, ``eps`` and ``observed``.

    Raises:
        ValueError: a shape, dtype, device or step does not fit. A step outside 1…N in a GPU tensor is not read back:
            the row becomes NaN.
        RuntimeError: ``backend`` names one that cannot run here.
    """
    args = (x, eps, observed, available, table, *backends.split_step("step", step), *backends.split_seed(seed), row_id)
    if backends.runs_directly(x, eps, observed, available, table, step, seed, row_id, out):
        return backends.written(_run(*args, backend, out), out)
    backends.check_out_allowed(out)
    return backends.dispatch(_op, _Function, *args, backend)
