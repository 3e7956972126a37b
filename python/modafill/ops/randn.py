"""Counter-based standard normal noise: a row's values depend on its identity alone, not on the batch it is in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modafill.ops import backends, reference
from modafill.ops.reference import Draw

_SCHEMA = (
    "(SymInt[] shape, SymInt step, Tensor? step_tensor, SymInt seed, Tensor? seed_tensor, Tensor? row_id, int draw,"
    " ScalarType dtype, Device device, str backend) -> Tensor"
)


def _check(
    shape: Sequence[int],
    step: int,
    step_tensor: Tensor | None,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    draw: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if len(shape) == 0 or any(n < 0 for n in shape):
        raise ValueError(f"shape: got {list(shape)}, expected [B, ...] with sizes of at least 0")
    backends.check_dtype(dtype)
    if draw not in range(len(Draw)):
        raise ValueError(f"draw: got {draw}, expected a member of Draw")
    backends.check_step("step", step, step_tensor, shape[0], device, 0, reference.MAX_STEP)
    backends.check_noise(seed_tensor, row_id, shape[0], device)


def _run(
    shape: Sequence[int],
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    draw: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    _check(shape, step, step_tensor, seed_tensor, row_id, draw, dtype, device)
    backend = backends.select("randn", device, dtype, backend)
    if out is not None:
        backends.check_out(out, shape, dtype, device)
    if backend == "reference":
        backends.check_step_values("step", step_tensor, 0, reference.MAX_STEP)
        result = reference.randn(
            tuple(shape),
            seed=seed if seed_tensor is None else seed_tensor,
            row_id=row_id,
            step=step if step_tensor is None else step_tensor,
            draw=draw,
            device=device,
        )
        return result.to(dtype) if out is None else out.copy_(result)
    step_tensor, row_id = backends.contiguous(step_tensor), backends.contiguous(row_id)
    if out is None:
        out = backends.fresh(torch.empty(shape, dtype=dtype, device=device), backend)
    if backend == "triton":
        backends.launch_triton("randn", out, step, step_tensor, seed, seed_tensor, row_id, draw)
        return out
    backends.launch(
        "randn",
        backend,
        out.device,
        backends.DTYPE_CODES[dtype],
        out.data_ptr(),
        *backends.step_args(step, step_tensor),
        backends.pointer(seed_tensor),
        seed,
        backends.pointer(row_id),
        draw,
        shape[0],
        math.prod(shape[1:]),
    )
    return out


def _fake(
    shape: Sequence[int],
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    draw: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    _check(shape, step, step_tensor, seed_tensor, row_id, draw, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device)


_op = backends.register("randn", _SCHEMA, _run, _fake)


def randn(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    step: int | Tensor = 0,
    draw: int = Draw.INITIAL,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standard normal noise from Philox4x32-10 (Salmon et al., SC'11) and Box–Muller; torch's generator is not touched.

    Element e of row b depends on (seed, row_id[b], step, draw, e) alone: the same bits on the CPU, in CUDA and in
    Triton, in any batch and any order. Values are those of float32, widened or rounded to ``dtype``.

    Args:
        shape: ``[B, ...]``; the first dimension counts rows.
        seed: 64-bit integer or int64 ``[]`` on the device.
        row_id: int64 ``[B]``, the identity of each row's noise; None = 0…B−1.
        step: 0…2²⁴−1, an integer or int64 ``[]`` or ``[B]`` on the device.
        draw: which of a step's independent draws, a :class:`modafill.ops.Draw`.
        dtype: float32, float64 or bfloat16 on the CPU, float32, bfloat16 or float16 on a GPU.
        device: None = that of ``out``, else of ``row_id``, ``step`` or ``seed`` where they are tensors, else the CPU.
        out: contiguous, of this shape, dtype and device.
        backend: ``"auto"`` or one of :data:`modafill.ops.backends.BACKENDS`; see :func:`modafill.ops.explain`.

    Raises:
        ValueError: an argument does not fit. A step out of range in a GPU tensor is not read back: the row becomes NaN.
        RuntimeError: ``backend`` names one that cannot run here.
    """
    if device is None:
        device = next((t.device for t in (out, row_id, step, seed) if isinstance(t, Tensor)), "cpu")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        if not torch.cuda.is_available():
            raise backends.BackendError("device: got 'cuda', but torch sees 0 CUDA devices")
        device = torch.device("cuda", torch.cuda.current_device())
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: got {backends.describe(shape)}, expected a sequence of integers [B, ...]")
    args = (
        list(shape),
        *backends.split_step("step", step),
        *backends.split_seed(seed),
        row_id,
        int(draw),
        dtype,
        device,
        backend,
    )
    if backends.runs_directly(row_id, step, seed, out):
        return backends.written(_run(*args, out), out)
    backends.check_out_allowed(out)
    return _op(*args)
