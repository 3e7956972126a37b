"""One DDIM step of any stride."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from modafill.ops import backends, reference

_SCHEMA = (
    "(Tensor x, Tensor eps, Tensor table, SymInt step, Tensor? step_tensor, SymInt prev_step,"
    " Tensor? prev_step_tensor, float eta, SymInt seed, Tensor? seed_tensor, Tensor? row_id, float? clip, str backend)"
    " -> Tensor"
)


def _check(
    x: Tensor,
    eps: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    prev_step: int,
    prev_step_tensor: Tensor | None,
    eta: float,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    clip: float | None,
) -> None:
    backends.check_rows("x", x)
    backends.check_same("eps", eps, x)
    backends.check_table(table, x)
    last = table.shape[0] - 1
    backends.check_step("step", step, step_tensor, x.shape[0], x.device, 1, last)
    # A stride of integers is known whole; a stride that involves a tensor is bounded by what is known of it.
    before = step - 1 if step_tensor is None else last - 1
    backends.check_step("prev_step", prev_step, prev_step_tensor, x.shape[0], x.device, 0, before)
    backends.check_noise(seed_tensor, row_id, x.shape[0], x.device)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: got {eta}, expected a value in [0, 1]")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip: got {clip}, expected None or a positive bound")


def _check_step_values(
    step: int, step_tensor: Tensor | None, prev_step: int, prev_step_tensor: Tensor | None, last: int
) -> None:
    """Steps in CPU tensors lie in the schedule and go down; device tensors are never read back."""
    backends.check_step_values("step", step_tensor, 1, last)
    backends.check_step_values("prev_step", prev_step_tensor, 0, last)
    now = step if step_tensor is None else step_tensor
    before = prev_step if prev_step_tensor is None else prev_step_tensor
    later = torch.as_tensor(before >= now)
    if later.is_cpu and bool(later.any()):
        raise ValueError(f"prev_step: got {before} for step {now}, expected an earlier step")


def _run(
    x: Tensor,
    eps: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    prev_step: int,
    prev_step_tensor: Tensor | None,
    eta: float,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    clip: float | None,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    _check(x, eps, table, step, step_tensor, prev_step, prev_step_tensor, eta, seed_tensor, row_id, clip)
    backend = backends.select("ddim_step", x.device, x.dtype, backend)
    if out is not None:
        backends.check_out(out, x.shape, x.dtype, x.device, x, eps, may_be_input=True)
    if backend == "reference":
        _check_step_values(step, step_tensor, prev_step, prev_step_tensor, table.shape[0] - 1)
        result = reference.ddim_step(
            x,
            eps,
            table,
            step if step_tensor is None else step_tensor,
            prev_step if prev_step_tensor is None else prev_step_tensor,
            eta=eta,
            seed=seed if seed_tensor is None else seed_tensor,
            row_id=row_id,
            clip=clip,
        )
        return result.to(x.dtype).contiguous() if out is None else out.copy_(result)
    x, eps = x.contiguous(), eps.contiguous()
    step_tensor, prev_step_tensor = backends.contiguous(step_tensor), backends.contiguous(prev_step_tensor)
    row_id = backends.contiguous(row_id)
    if out is None:
        out = backends.fresh(torch.empty_like(x, memory_format=torch.contiguous_format), backend)
    if backend == "triton":
        backends.launch_triton(
            "ddim_step",
            out,
            x,
            eps,
            table,
            step,
            step_tensor,
            prev_step,
            prev_step_tensor,
            eta,
            seed,
            seed_tensor,
            row_id,
            clip,
        )
        return out
    backends.launch(
        "ddim_step",
        backend,
        x.device,
        backends.DTYPE_CODES[x.dtype],
        out.data_ptr(),
        x.data_ptr(),
        eps.data_ptr(),
        table.data_ptr(),
        table.shape[0] - 1,
        *backends.step_args(step, step_tensor),
        *backends.step_args(prev_step, prev_step_tensor),
        eta,
        math.inf if clip is None else clip,
        backends.pointer(seed_tensor),
        seed,
        backends.pointer(row_id),
        x.shape[0],
        math.prod(x.shape[1:]),
    )
    return out


def _fake(
    x: Tensor,
    eps: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    prev_step: int,
    prev_step_tensor: Tensor | None,
    eta: float,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    clip: float | None,
    backend: str,
) -> Tensor:
    _check(x, eps, table, step, step_tensor, prev_step, prev_step_tensor, eta, seed_tensor, row_id, clip)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Function(backends.Function):
    op = "ddim_step"

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, eps, table, step, step_tensor, prev_step, prev_step_tensor, eta, *_, clip, _ = inputs
        # Without clipping the step is linear, and its gradient needs no input.
        ctx.save_for_backward(table, step_tensor, prev_step_tensor, *((x, eps) if clip is not None else ()))
        ctx.step, ctx.prev_step, ctx.eta, ctx.clip = step, prev_step, eta, clip

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, step_tensor, prev_step_tensor, *inputs = ctx.saved_tensors
        now = backends.row_coefficients(table, ctx.step, step_tensor, grad)
        before = backends.row_coefficients(table, ctx.prev_step, prev_step_tensor, grad, low=0)
        if step_tensor is not None or prev_step_tensor is not None:
            step = ctx.step if step_tensor is None else step_tensor
            earlier = step > (ctx.prev_step if prev_step_tensor is None else prev_step_tensor)
            before = torch.where(earlier.reshape(-1, *[1] * grad.ndim), before, torch.nan)
        signal, sigma = now[..., reference.SQRT_ALPHA_BAR], now[..., reference.SQRT_ONE_MINUS_ALPHA_BAR]
        prev_signal, prev_sigma = before[..., reference.SQRT_ALPHA_BAR], before[..., reference.SQRT_ONE_MINUS_ALPHA_BAR]
        _, direction = reference.ddim_deviations(signal, sigma, prev_signal, prev_sigma, ctx.eta)
        to_x, to_eps = prev_signal / signal, direction - prev_signal * sigma / signal
        if ctx.clip is not None:
            x, eps = inputs
            inside = ((x - sigma * eps) / signal).abs() <= ctx.clip
            to_x, to_eps = torch.where(inside, to_x, direction / sigma), torch.where(inside, to_eps, 0.0 * direction)
        need_x, need_eps = ctx.needs_input_grad[:2]
        grad_x = (to_x * grad).to(grad.dtype) if need_x else None
        grad_eps = (to_eps * grad).to(grad.dtype) if need_eps else None
        return grad_x, grad_eps, *[None] * 11


_op = backends.register("ddim_step", _SCHEMA, _run, _fake, lambda *args: _Function.apply(*args))


def ddim_step(
    x: Tensor,
    eps: Tensor,
    table: Tensor,
    step: int | Tensor,
    prev_step: int | Tensor,
    *,
    eta: float = 0.0,
    seed: int | Tensor | None = None,
    row_id: Tensor | None = None,
    clip: float | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """DDIM step t → t' of any stride (CDTP eq. 8–9; Song et al. 2021, eq. 12).

    x̂₀ = (x_t − √(1−ᾱ_t) ε̂)/√ᾱ_t, then √ᾱ_t' x̂₀ + √(1−ᾱ_t'−σ²) ε̂ + σ z with
    σ = η √((1−ᾱ_t')/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_t'), the variance of the stride t → t': CDTP's text gives that of t → t − 1,
    which is wrong for any longer stride.

    Args:
        x: ``[B, ...]``; float32, float64 or bfloat16 on the CPU, float32, bfloat16 or float16 on a GPU.
        eps: the denoiser's ε̂, like ``x``.
        table: float32 ``[N + 1, 5]``, :attr:`modafill.diffusion.Schedule.table`.
        step: t in 1…N, an integer or int64 ``[]`` or ``[B]`` on the device of ``x``.
        prev_step: t' in 0…t−1, in the same forms.
        eta: 0 for the deterministic step, 1 for the ancestral one.
        seed: 64-bit integer or int64 ``[]`` on the device of ``x``; needed where ``eta`` > 0.
        row_id: int64 ``[B]``, the identity of each row's noise; None = 0…B−1.
        clip: bound of |x̂₀|; ε̂ is then recomputed from the clipped x̂₀. None = no bound.
        out: like ``x``, contiguous; may be ``x`` or ``eps`` itself. Only where no gradient is needed.
        backend: ``"auto"`` or one of :data:`modafill.ops.backends.BACKENDS`; see :func:`modafill.ops.explain`.

    Returns:
        Like ``x``; differentiable in ``x`` and ``eps``.

    Raises:
        ValueError: a shape, dtype, device, step, ``eta`` or ``clip`` does not fit, or ``seed`` is missing. Steps in GPU
            tensors are not read back: a row whose steps do not fit becomes NaN.
        RuntimeError: ``backend`` names one that cannot run here.
    """
    eta = backends.number("eta", eta)
    if eta > 0.0 and seed is None:
        raise ValueError("seed: got None, expected an integer because eta > 0 draws noise")
    args = (
        x,
        eps,
        table,
        *backends.split_step("step", step),
        *backends.split_step("prev_step", prev_step),
        eta,
        *backends.split_seed(0 if seed is None else seed),
        row_id,
        None if clip is None else backends.number("clip", clip),
    )
    if backends.runs_directly(x, eps, table, step, prev_step, seed, row_id, out):
        return backends.written(_run(*args, backend, out), out)
    backends.check_out_allowed(out)
    return backends.dispatch(_op, _Function, *args, backend)
