"""Conv1D → GELU → Conv1D in one op, whose hidden rows never leave the chip."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modafill.ops import backends, reference
from modafill.ops.backends import _C

_ARGUMENTS = "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str approximate"
_SCHEMA = f"({_ARGUMENTS}, str backend) -> Tensor"
_BACKWARD_SCHEMA = f"(Tensor grad, {_ARGUMENTS}, bool[] need, str backend) -> Tensor[]"

MAX_TAPS = 7
_HAS_BFLOAT16 = backends.multiplies_bfloat16()
# The gradients of the weights are summed in groups of rows, each with tables of its own.
_GROUP_BYTES = 1 << 24
_GROUP_ROWS = 96
_FEW_GROUPS, _MAX_GROUPS = 4, 16
# Fewer rows do not pay for a copy of the weights.
_ROWS_FOR_A_COPY = 64


def _check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str) -> None:
    dtype, device = x.dtype, x.device
    if x.ndim != 3 or not dtype.is_floating_point:
        raise ValueError(f"x: got {backends.describe(x)}, expected a floating-point tensor [B, L, C]")
    for name, w, inputs, what in (("w1", w1, x.shape[2], "hidden, {} (C)"), ("w2", w2, None, "out, {} (hidden)")):
        backends.check_tensor(name, w)
        inputs = w1.shape[0] if inputs is None else inputs
        if w.ndim != 3 or w.shape[1] != inputs or w.dtype != dtype or w.device != device or w.shape[0] < 1:
            expected = f"{backends.dtype_name(dtype)} [{what.format(inputs)}, taps] on {device}"
            turned = name == "w1" and w.ndim == 3 and w.shape[1] == x.shape[1]
            hint = f"; an x {list(x.shape)} that is nn.Conv1d's [B, C, L] goes in as x.mT" if turned else ""
            raise ValueError(f"{name}: got {backends.describe(w)}, expected {expected}{hint}")
        if w.shape[2] % 2 == 0 or w.shape[2] > MAX_TAPS:
            raise ValueError(f"{name}: got {w.shape[2]} taps, expected an odd number up to {MAX_TAPS}")
    if w1.shape[1] < 1:
        raise ValueError("x: got no channels, expected at least one")
    for name, b, w in (("b1", b1, w1), ("b2", b2, w2)):
        if b is not None:
            backends.check_tensor(name, b)
            if b.shape != w.shape[:1] or b.dtype != dtype or b.device != device:
                expected = f"{backends.dtype_name(dtype)} [{w.shape[0]}] on {device}"
                raise ValueError(f"{name}: got {backends.describe(b)}, expected {expected}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")


def _in_torch(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str) -> Tensor:
    """The op in PyTorch's own layers, which keep the hidden rows for the gradient."""
    if w1.shape[2] == w2.shape[2] == 1 and x.dtype != torch.float32:
        return F.linear(F.gelu(F.linear(x, w1[..., 0], b1), approximate=approximate), w2[..., 0], b2)
    if _one_long_sample(x, w1, w2):
        hidden = F.gelu(F.conv1d(x.transpose(1, 2), w1, b1, padding=w1.shape[2] // 2), approximate=approximate)
        return F.conv1d(hidden, w2, b2, padding=w2.shape[2] // 2).transpose(1, 2)
    # As images of one row, [B, L, C] in memory is channels-last, which nothing has to transpose.
    image = x.transpose(1, 2).unsqueeze(2)
    hidden = F.gelu(F.conv2d(image, w1.unsqueeze(2), b1, padding=(0, w1.shape[2] // 2)), approximate=approximate)
    return F.conv2d(hidden, w2.unsqueeze(2), b2, padding=(0, w2.shape[2] // 2)).squeeze(2).transpose(1, 2)


def _one_long_sample(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """Where a CPU was measured to convolve rows of channels faster than images."""
    if not x.is_cpu or x.shape[0] != 1 or torch.compiler.is_exporting() or x.shape[1] < 16:
        return False
    return max(w1.shape[2], w2.shape[2]) > 1 and max(w1.numel(), w2.numel()) >= 150_000


@dataclass(frozen=True)
class _Rule:
    """Where PyTorch's layers were measured to be faster: from so many rows, weights of the larger convolution and n."""

    rows: int = 0
    weights: int = 0
    n: int = 0

    def holds(self, rows: int, weights: int) -> bool:
        return rows >= self.rows and weights >= self.weights and rows * weights >= self.n

    def __str__(self) -> str:
        named = (("rows", self.rows), ("weights", self.weights), ("n", self.n))
        return " and ".join(f"{name} >= {least:,}" for name, least in named if least)


# Measured on a CPU with AVX-512. The gradient makes hidden rows again, which costs a sixth.
_TRAINING, _TRAINING_SMALL = _Rule(rows=256, weights=8192, n=15_000_000), _Rule(rows=256, n=50_000_000)
_INFERENCE, _BFLOAT16 = _Rule(n=150_000_000), _Rule(n=1_000_000)


def _rule(dtype: torch.dtype, backend: str) -> str:
    """What :func:`modafill.ops.explain` says of ``dtype`` on a CPU."""
    if dtype == torch.float64 or backend != "cpu":
        return ""
    if dtype == torch.bfloat16 and _HAS_BFLOAT16:
        where = f"where {_BFLOAT16}"
    else:
        training = f"in training where {_TRAINING}, or {_TRAINING_SMALL}"
        where = f"{training}; in inference with several taps where {_INFERENCE}"
    return (
        f"torch by size, n = rows x weights of the larger convolution: {where}. Not with out= or in an exported program"
    )


backends.RULES["conv_gelu_conv"] = _rule


def _torch_is_faster(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> bool:
    """The rule that :func:`modafill.ops.explain` prints."""
    if not x.is_cpu or x.ndim != 3 or x.dtype == torch.float64:
        return False
    if torch.compiler.is_exporting():
        return False  # a program for any batch
    if not isinstance(w1, Tensor) or not isinstance(w2, Tensor):
        return False  # and is refused later
    if x.dtype not in backends.CPU_DTYPES:
        return True
    rows, weights = x.shape[0] * x.shape[1], max(w1.numel(), w2.numel())
    if x.dtype == torch.bfloat16 and _HAS_BFLOAT16:
        return _BFLOAT16.holds(rows, weights)
    training = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, w1, b1, w2, b2))
    if training:
        return _TRAINING.holds(rows, weights) or _TRAINING_SMALL.holds(rows, weights)
    return any(w.ndim == 3 and w.shape[2] > 1 for w in (w1, w2)) and _INFERENCE.holds(rows, weights)


def _within_reach(x: Tensor, w: Tensor) -> Tensor:
    """``w`` without the taps that meet nothing but padding: in samples of length 1, all but the middle one."""
    taps = 2 * x.shape[1] - 1
    if w.shape[2] <= taps or x.shape[0] * x.shape[1] < _ROWS_FOR_A_COPY:
        return w.contiguous()
    return w.narrow(2, (w.shape[2] - taps) // 2, taps).contiguous()


def _description(
    out: Tensor | None, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> Any:
    return _C.ConvGeluConvArgs(
        backends.DTYPE_CODES[x.dtype],
        *map(backends.pointer, (out, x, w1, b1, w2, b2)),
        *x.shape,
        w1.shape[0],
        w2.shape[0],
        w1.shape[2],
        w2.shape[2],
        approximate == "tanh",
    )


def _run(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    _check(x, w1, b1, w2, b2, approximate)
    backend = backends.select("conv_gelu_conv", x.device, x.dtype, backend)
    shape = (*x.shape[:2], w2.shape[0])
    if out is not None:
        # Rows are read after others are written.
        backends.check_out(out, shape, x.dtype, x.device, x, w1, b1, w2, b2)
    if backend in ("torch", "reference"):
        op = _in_torch if backend == "torch" else reference.conv_gelu_conv
        result = op(x, w1, b1, w2, b2, approximate=approximate)
        return result.to(x.dtype).contiguous() if out is None else out.copy_(result)
    x, w1, w2 = x.contiguous(), _within_reach(x, w1), _within_reach(x, w2)
    b1, b2 = backends.contiguous(b1), backends.contiguous(b2)
    if out is None:
        out = backends.fresh(torch.empty(shape, dtype=x.dtype, device=x.device), backend)
    if out.numel() == 0:
        pass
    elif backend == "triton":
        backends.launch_triton("conv_gelu_conv", out, x, w1, b1, w2, b2, approximate)
    else:
        described = _description(out, x, w1, b1, w2, b2, approximate)
        backends.launch("conv_gelu_conv", backend, x.device, described)
    return out


def _fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str, backend: str
) -> Tensor:
    _check(x, w1, b1, w2, b2, approximate)
    return x.new_empty((*x.shape[:2], w2.shape[0]))


def _groups(x: Tensor, w1: Tensor, w2: Tensor) -> int:
    """In how many parts weight gradients are summed: a function of the shapes alone, so that their bits are too."""
    size = (w1.numel() + w2.numel()) * (8 if x.dtype == torch.float64 else 4)
    most = max(_FEW_GROUPS, min(_MAX_GROUPS, _GROUP_BYTES // max(size, 1)))
    return max(1, min(most, x.shape[0] * x.shape[1] // _GROUP_ROWS))


def _check_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> None:
    _check(x, w1, b1, w2, b2, approximate)
    backends.check_described("grad", grad, (*x.shape[:2], w2.shape[0]), x.dtype, x.device)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    need: list[bool],
    backend: str,
) -> list[Tensor]:
    _check_backward(grad, x, w1, b1, w2, b2, approximate)
    backend = backends.select("conv_gelu_conv", x.device, x.dtype, backend)
    if backend in ("torch", "reference"):
        op = _in_torch if backend == "torch" else reference.conv_gelu_conv
        dtype = x.dtype if backend == "torch" else torch.float64
        convolutions = functools.partial(op, approximate=approximate)
        out = _fake_backward(grad, x, w1, b1, w2, b2, approximate, need, backend)
        return backends.gradients(convolutions, (x, w1, b1, w2, b2), need, grad, out, dtype)
    grad, x, all_taps = grad.contiguous(), x.contiguous(), (w1.shape[2], w2.shape[2])
    w1, w2 = _within_reach(x, w1), _within_reach(x, w2)
    b1, b2 = backends.contiguous(b1), backends.contiguous(b2)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    made: list[Tensor | None] = [backends.fresh(torch.empty_like(x), backend) if need[0] else None]
    for t, n in zip((w1, b1, w2, b2), need[1:], strict=True):
        made.append(torch.empty_like(t, dtype=compute) if n and t is not None else None)
    if grad.numel() == 0:
        for t in made:
            if t is not None:
                t.zero_()
    elif backend == "triton":
        function = "conv_gelu_conv_backward"
        backends.launch_triton("conv_gelu_conv", made, grad, x, w1, b1, w2, approximate, function=function)
    else:
        backends.launch(
            "conv_gelu_conv_backward",
            backend,
            x.device,
            _description(None, x, w1, b1, w2, b2, approximate),
            grad.data_ptr(),
            *map(backends.pointer, made),
            _groups(x, w1, w2),
        )
    for i, taps in ((1, all_taps[0]), (3, all_taps[1])):
        t = made[i]
        if t is not None and t.shape[2] < taps:
            made[i] = F.pad(t, [(taps - t.shape[2]) // 2] * 2)
    return [t.to(x.dtype) for t in made if t is not None]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    need: list[bool],
    backend: str,
) -> list[Tensor]:
    _check_backward(grad, x, w1, b1, w2, b2, approximate)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, n in zip((x, w1, b1, w2, b2), need, strict=True)
        if n and t is not None
    ]


_Backward = backends.once_differentiable("conv_gelu_conv", lambda: _backward_op)


class _Function(backends.Function):
    op = "conv_gelu_conv"

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.approximate, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = list(ctx.needs_input_grad[:5])
        args = (grad, *ctx.saved_tensors, ctx.approximate, need, ctx.backend)
        if backends.runs_directly(*args):
            found = iter(_run_backward(*args))
        else:
            found = iter(backends.dispatch(_backward_op, _Backward, *args))
        return (*(next(found) if n else None for n in need), None, None)


class _Eager(_Function):
    """For calls that nothing but autograd need see: past the dispatcher."""

    forward = staticmethod(_run)


_op = backends.register("conv_gelu_conv", _SCHEMA, _run, _fake, lambda *args: _Function.apply(*args))
_backward_op: Any = backends.register(
    "conv_gelu_conv_backward",
    _BACKWARD_SCHEMA,
    _run_backward,
    _fake_backward,
    lambda *args: list(_Backward.apply(*args)),
)


def conv_gelu_conv(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "none",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Conv1D → GELU → Conv1D with same padding, the condition encoder of CDTP (§3.2).

    The hidden ``[B, L, hidden]`` tensor does not exist, forward or backward: on a CPU a thread makes the hidden rows of
    at most 96 rows of the result at a time (a small batch is one such block), and again for the gradient. Weight
    gradients are summed in a fixed order, in parts of the weights' size in float32 or more: up to 4, or as many as 16
    MiB hold, at most 16. The exception is ``"torch"``, PyTorch's own layers: auto takes them where they were measured
    to be faster (``explain`` prints the rule), and where nothing else takes the dtype. They keep the hidden tensor, lay
    the result out as they please, and have second and forward-mode derivatives, which all else refuses.

    Args:
        x: ``[B, L, C]``; float32, float64 or bfloat16 on the CPU.
        w1: ``[hidden, C, taps]``, like ``x``, as :class:`torch.nn.Conv1d` has it; an odd number of taps, 1…7.
        b1: ``[hidden]`` or None.
        w2: ``[out, hidden, taps]``; b2: ``[out]`` or None.
        approximate: ``"none"`` (exact GELU) or ``"tanh"``.
        out: ``[B, L, out]``, contiguous; no input may overlap it. Only where no gradient is needed.
        backend: ``"auto"`` or one of :data:`modafill.ops.backends.BACKENDS`; see :func:`modafill.ops.explain`.

    Returns:
        ``[B, L, out]`` in the dtype of ``x``, under autocast in its dtype (:mod:`modafill.ops.backends`);
        differentiable in every tensor, once.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        NotImplementedError: a second or forward-mode derivative is asked for, and ``"torch"`` does not run.
        RuntimeError: ``backend`` names one that cannot run here.
    """
    backends.check_tensor("x", x)
    x, w1, b1, w2, b2 = backends.autocast(x, w1, b1, w2, b2)
    backend = backends.requested(backend)
    if out is None and (backend == "torch" or (backend == "auto" and _torch_is_faster(x, w1, b1, w2, b2))):
        _check(x, w1, b1, w2, b2, approximate)
        return _in_torch(x, w1, b1, w2, b2, approximate)
    args = (x, w1, b1, w2, b2, approximate, backend)
    if backends.runs_directly(x, w1, b1, w2, b2, out):
        return backends.written(_run(*args, out), out)
    backends.check_out_allowed(out)
    if backends.runs_eagerly(x, w1, b1, w2, b2):
        return backends.apply(_Eager, *args)
    return backends.dispatch(_op, _Function, *args)
