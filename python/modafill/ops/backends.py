"""Which backend runs an op and why, and what the ops share: argument checks, the direct path, registration.

What every op keeps to, as PyTorch's own do:

- Under :class:`torch.autocast`, ``prompt_attention`` and ``conv_gelu_conv`` do as PyTorch's attention and convolutions:
  their floating-point tensors, float64 apart, are cast to the dtype of autocast, which is that of the result; gradients
  have the dtype of the tensors that they belong to. All other ops run in the dtype of their inputs.
- :func:`torch.vmap` gives what a loop over the mapped dimension gives, and is one. Equal seeds and row ids are equal
  noise there too: map one of them where noise is to differ.
- Gradients are those of reverse mode; forward mode (``jvp``, ``jacfwd``, dual numbers) is refused, and so are second
  derivatives of the two networks' ops, unless they run as PyTorch's own layers.
- Tensors on ``meta`` give shapes, dtypes and strides alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from modafill.ops import reference

# A source tree that was never built still has the reference backend; an extension that fails to load is an error.
_C: Any = importlib.import_module("modafill._C") if importlib.util.find_spec("modafill._C") else None

_NOT_BUILT = "the extension was never built; see CONTRIBUTING.md"

BACKENDS = ("cpu", "cuda", "triton", "torch", "reference")
ENVIRONMENT = "MODAFILL_BACKEND"
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The backends that each op has beside the reference.
OPS = {
    **dict.fromkeys(("masked_reverse_step", "ddim_step", "add_noise", "randn"), ("cpu", "cuda", "triton")),
    "prompt_attention": ("cpu", "triton"),
    "conv_gelu_conv": ("cpu", "triton", "torch"),
    "token_denoiser": ("cpu", "triton", "torch"),
}
# Those that PyTorch knows, with what stands above; the others are for inference, and run as PyTorch's layers where
# something traces.
REGISTERED = tuple(op for op in OPS if op != "token_denoiser")
# What auto does call by call, by dtype and the backend that it prefers: ops that have such a rule say it here.
RULES: dict[str, Callable[[torch.dtype, str], str]] = {}

# glibc maps blocks of this size and more anew for each allocation.
_MAPPED_BYTES = 32 * 2**20

# What os.environ looks names up in, encoded.
_ENVIRON: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = getattr(os.environ, "encodekey", str)(ENVIRONMENT)

_PLAIN = frozenset((Tensor, torch.nn.Parameter))

# Bound here, because they are asked at every call.
_is_compiling, _profiles = torch.compiler.is_compiling, torch.autograd._profiler_enabled
_is_tracing = torch._C._is_tracing
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack

library = torch.library.Library("modafill", "DEF")


class BackendError(RuntimeError):
    """A backend or a device was named that cannot run here."""


@dataclass(frozen=True)
class Choice:
    """What a call would run, and why not something faster.

    Attributes:
        op: the op's name.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` (PyTorch's own layers) or ``"reference"``.
        reason: why this one.
        rejected: for each backend that is preferred to it but cannot run, why not.
        rule: what else decides, call by call; empty where nothing does.
    """

    op: str
    backend: str
    reason: str
    rejected: dict[str, str]
    rule: str = ""

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.op}: {self.backend} ({self.reason})",
                *(f"  not {name}: {why}" for name, why in self.rejected.items()),
                *([f"  but {self.rule}"] if self.rule else []),
            ]
        )


def explain(
    op: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Choice:
    """What ``modafill.ops.<op>`` runs for tensors of ``dtype`` on ``device``.

    Raises:
        TypeError: ``dtype`` is no :class:`torch.dtype`.
        ValueError: ``op``, ``device`` or ``backend`` is no name of one, or ``dtype`` no floating-point type.
        RuntimeError: torch sees no such CUDA device, or ``backend`` names one that cannot run.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device: got {str(device)!r}, expected cpu, cuda or cuda:N")
    check_dtype(dtype)
    # Not in _choose: fake tensors are on CUDA devices that are not here.
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            raise BackendError(f"device: got {str(device)!r}, but torch sees {count} CUDA devices")
    return _choose(op, where, dtype, requested(backend))


def native_build() -> dict[str, Any]:
    """The instruction set in use, whether OpenMP is, and the GPU architectures the extension was built for."""
    if _C is None:
        return {"extension": _NOT_BUILT, "cpu_isa": None, "openmp": False, "cuda_architectures": []}
    return {
        "extension": "built",
        "cpu_isa": _C.cpu_isa,
        "openmp": _C.openmp,
        "cuda_architectures": _C.cuda_architectures.split(),
    }


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor was measured to multiply bfloat16 faster than float32.

    It is where it has AMX, or AVX512-BF16 of AMD's: Intel's without AMX was half as fast as float32.
    """
    vendor = Path("/proc/cpuinfo")
    amd = vendor.is_file() and "AuthenticAMD" in vendor.read_text(encoding="utf-8", errors="replace")
    return torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported())


def requested(backend: str) -> str:
    """The backend asked for by argument or, for ``"auto"``, by the environment."""
    return _environment() or "auto" if backend == "auto" else backend


def _environment() -> str | None:
    # os.environ raises and catches two errors where a name is not set, which takes longer than all else here.
    found = _ENVIRON.get(_KEY)
    return None if found is None else os.environ[ENVIRONMENT]


@functools.lru_cache(maxsize=256)
def _choose(op: str, device: torch.device, dtype: torch.dtype, backend: str) -> Choice:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected auto, {', '.join(BACKENDS)}")
        why = _why_not(op, backend, device, dtype)
        if why is not None:
            raise BackendError(f"{op}: the {backend} backend cannot run: {why}")
        return Choice(op, backend, "asked for by name", {})
    rejected: dict[str, str] = {}
    for name in ("cpu", "torch") if device.type == "cpu" else ("cuda", "triton", "torch"):
        if name == "torch" and name not in OPS[op]:
            continue
        why = _why_not(op, name, device, dtype)
        if why is None:
            rule = RULES[op](dtype, name) if op in RULES else ""
            return Choice(op, name, f"preferred for {dtype_name(dtype)} on {device.type}", rejected, rule)
        rejected[name] = why
    return Choice(op, "reference", "nothing faster can run", rejected)


def _why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps ``backend`` from running ``op``, or None."""
    if backend == "reference":
        return None
    if backend not in OPS[op]:
        return f"{op} has no such backend"
    if backend == "torch":
        return None
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if backend == "cpu" else "cuda") and not (interpreted and device.type == "cpu"):
        return f"the tensors are on {device.type}"
    dtypes = CPU_DTYPES if backend == "cpu" else GPU_DTYPES
    if dtype not in dtypes:
        return f"it takes {', '.join(map(dtype_name, dtypes))}, not {dtype_name(dtype)}"
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if _C is None:
        return _NOT_BUILT
    if backend == "cuda":
        if not _C.cuda_architectures:
            return "modafill was built without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or later, the device has {major}.{minor}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select(op: str, device: torch.device, dtype: torch.dtype, backend: str) -> str:
    """The name of the backend that runs this call."""
    return _choose(op, device, dtype, requested(backend)).backend


def runs_directly(*tensors: Any) -> bool:
    """Whether a call of the extension stands in for one of the registered op: as :func:`runs_eagerly`, without grad."""
    if _is_watched():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if type(t) in _PLAIN:
            if grad and t.requires_grad:
                return False
        elif isinstance(t, Tensor):
            return False
    return True


def runs_eagerly(*tensors: Any) -> bool:
    """Whether nothing but autograd need see this call.

    Nothing traces or profiles, no dispatch or function mode and no functorch transform is active, and every tensor is
    a plain one.
    """
    if _is_watched():
        return False
    for t in tensors:  # noqa: SIM110 (a generator takes longer than a small op)
        if type(t) not in _PLAIN and isinstance(t, Tensor):
            return False
    return True


def _is_watched() -> int | bool:
    return (
        _is_compiling()
        or _profiles()
        or _dispatch_modes()
        or _function_modes()
        or _functorch_level() is not None
        or _is_tracing()
        or forward_ad._current_level >= 0
    )


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """``tensors``, the first on the op's device, as autocast wants them for an op that runs in its dtype."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def describe(value: Any) -> str:
    """``value`` as an error message shows it."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)} on {value.device}"
    if hasattr(value, "shape") or not isinstance(value, (str, int, float, type(None))):
        return type(value).__name__
    return f"{type(value).__name__} {value!r}"


def number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    try:
        # A tensor's value on a GPU would have to be waited for.
        if isinstance(value, (bool, str, Tensor)):
            raise TypeError
        return float(value)
    except TypeError:
        raise TypeError(f"{name}: got {describe(value)}, expected a number") from None


def check_flag(name: str, value: Any) -> None:
    """TypeError unless ``value`` is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name}: got {describe(value)}, expected a bool")


_STEP = "an integer or an int64 tensor"


def integer(
    name: str, value: Any, expected: str = "an integer", low: int | None = None, high: int | None = None
) -> int:
    """``value`` as an integer in ``low``…``high``; one that is a symbol while something traces stays one.

    Raises:
        TypeError: it is none: a bool, a float, a tensor (whose value on a GPU would have to be waited for).
        ValueError: it is out of range.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}") from None
    if low is not None and high is not None and not low <= found <= high:
        raise ValueError(f"{name}: got {found}, expected {low}…{high}")
    if low is not None and found < low:
        raise ValueError(f"{name}: got {found}, expected at least {low}")
    return found


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, expected a tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name}: got a {value.layout} tensor, expected a dense one")


def check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {describe(dtype)}, expected a torch.dtype, such as torch.float32")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype_name(dtype)}, expected a floating-point type")


def check_rows(name: str, x: Tensor) -> None:
    """``x`` holds floating-point rows ``[B, ...]``."""
    check_tensor(name, x)
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"{name}: got {describe(x)}, expected a floating-point tensor [B, ...]")


def check_same(name: str, value: Tensor, x: Tensor) -> None:
    """``value`` has the shape, dtype and device of ``x``."""
    check_tensor(name, value)
    if value.shape != x.shape or value.dtype != x.dtype or value.device != x.device:
        raise ValueError(f"{name}: got {describe(value)}, expected {describe(x)}, as x")


def check_table(table: Tensor, x: Tensor) -> None:
    check_tensor("table", table)
    if (
        table.dtype != torch.float32
        or table.ndim != 2
        or table.shape[1] != reference.TABLE_COLUMNS
        or table.shape[0] < 2
        or table.device != x.device
        or not table.is_contiguous()
    ):
        stride = "" if table.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"table: got {describe(table)}{stride}, expected contiguous float32 [N + 1, {reference.TABLE_COLUMNS}]"
            f" on {x.device}, as Schedule.table is"
        )


def check_step(
    name: str, step: int, step_tensor: Tensor | None, batch: int, device: torch.device, low: int, high: int
) -> None:
    """One step for all rows or one for each; values in a CPU tensor are checked where they are read."""
    if step_tensor is None:
        if not low <= step <= high:
            raise ValueError(f"{name}: got {step}, expected a diffusion step in {low}…{high}")
    elif (
        step_tensor.dtype != torch.int64
        or step_tensor.device != device
        or tuple(step_tensor.shape) not in ((), (batch,))
    ):
        raise ValueError(
            f"{name}: got {describe(step_tensor)}, expected an integer or int64 [] or [{batch}] on {device}"
        )


def check_step_values(name: str, step_tensor: Tensor | None, low: int, high: int) -> None:
    """Steps in a CPU tensor lie in the schedule; a device tensor is never read back."""
    if step_tensor is not None and step_tensor.is_cpu:
        for value in step_tensor.reshape(-1).unique().tolist():
            check_step(name, value, None, 0, step_tensor.device, low, high)


def check_noise(seed_tensor: Tensor | None, row_id: Tensor | None, batch: int, device: torch.device) -> None:
    if seed_tensor is not None and (
        seed_tensor.dtype != torch.int64 or seed_tensor.ndim != 0 or seed_tensor.device != device
    ):
        raise ValueError(f"seed: got {describe(seed_tensor)}, expected an integer or int64 [] on {device}")
    if row_id is not None:
        check_tensor("row_id", row_id)
        if row_id.dtype != torch.int64 or tuple(row_id.shape) != (batch,) or row_id.device != device:
            raise ValueError(f"row_id: got {describe(row_id)}, expected int64 [{batch}] on {device}")


def check_described(name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """``value`` has these properties."""
    if value.shape != tuple(shape) or value.dtype != dtype or value.device != device:
        raise ValueError(f"{name}: got {describe(value)}, expected {dtype_name(dtype)} {list(shape)} on {device}")


def check_out(
    out: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *inputs: Tensor | None,
    may_be_input: bool = False,
) -> None:
    """``out`` is contiguous, has these properties, and overlaps no input, unless it ``may_be_input`` and is one."""
    check_tensor("out", out)
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or out.device != device or not out.is_contiguous():
        stride = "" if out.is_contiguous() else f" with strides {out.stride()}"
        raise ValueError(
            f"out: got {describe(out)}{stride}, expected contiguous {dtype_name(dtype)} {list(shape)} on {device}"
        )
    begin = out.data_ptr()
    if begin == 0:  # no elements, or none in memory: on meta
        return
    end = begin + out.nbytes
    for value in inputs:
        if value is None:
            continue
        first = value.data_ptr()
        if first < end and begin < first + _extent(value):
            if may_be_input and first == begin and value.is_contiguous():
                continue
            expected = "one of its own or exactly an input" if may_be_input else "one of its own"
            raise ValueError(f"out: got a tensor that overlaps an input, expected {expected}")


def _extent(value: Tensor) -> int:
    """How many bytes there are from the first element in memory to the end of the last one."""
    if value.is_contiguous():
        return value.nbytes
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.element_size()


def split_step(name: str, step: int | Tensor) -> tuple[int, Tensor | None]:
    """A step argument as the registered ops take it."""
    if isinstance(step, Tensor):
        return 0, step
    return (step if type(step) is int else integer(name, step, _STEP)), None


def split_seed(seed: int | Tensor) -> tuple[int, Tensor | None]:
    """A seed argument as the registered ops take it: 64 bits, two's complement."""
    if isinstance(seed, Tensor):
        return 0, seed
    seed = seed if type(seed) is int else integer("seed", seed, _STEP)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected a 64-bit integer")
    return (seed - 2**64 if seed >= 2**63 else seed), None


def check_out_allowed(out: Tensor | None) -> None:
    """The registered ops are functional: ``out`` needs the direct path."""
    if out is not None:
        raise ValueError("out: got a tensor while a gradient is needed or a transform is active, expected None")


def written(result: Any, out: Tensor | None) -> Any:
    """``result``; autograd is told that ``out`` has new values, so that a backward that needs the old ones fails."""
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return result


def fresh(result: Tensor, backend: str) -> Tensor:
    """``result``, which ``backend`` is about to fill for the first time: a large one gets huge pages."""
    if backend == "cpu" and result.nbytes >= _MAPPED_BYTES:
        _C.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result


def pointer(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def step_args(step: int, step_tensor: Tensor | None) -> tuple[int, int, int]:
    """(address, stride, value) of a step, as the extension takes it."""
    return (0, 0, step) if step_tensor is None else (step_tensor.data_ptr(), step_tensor.ndim, 0)


def contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def launch(op: str, backend: str, device: torch.device, *args: Any) -> None:
    """Call the extension's function for ``op`` with torch's thread count or current stream as the last argument."""
    if backend == "cpu":
        getattr(_C, op)(*args, torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            getattr(_C, f"{op}_cuda")(*args, torch._C._cuda_getCurrentRawStream(device.index))


def in_functorch() -> bool:
    """Whether a functorch transform is active, which has to see an autograd function before the dispatcher."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` outside functorch; it does not look up forward's signature, which takes longer."""
    plain: Any = super(torch.autograd.Function, function)
    return plain.apply(*args)


def dispatch(op: Any, function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call a registered op, or its autograd function under a functorch transform."""
    if in_functorch():
        return function.apply(*args)
    return op(*args)


def one_by_one(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The vmap rule of all ops: ``call`` for each element of the mapped dimension."""
    found = [
        call(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if not found:
        raise ValueError("vmap: got a dimension of size 0, expected at least 1")
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return type(found[0])(map(torch.stack, zip(*found, strict=True))), type(found[0])([0] * len(found[0]))


class Function(torch.autograd.Function):
    """The autograd function of an op, with what all have in common under functorch and forward mode."""

    op: str

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(cls.apply, info, in_dims, *args)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{cls.op}: it has no forward-mode derivative (jvp, jacfwd, dual numbers): use reverse mode"
            " (backward, torch.func.grad, vjp, jacrev)"
        )


def once_differentiable(name: str, backward_op: Callable[[], Any]) -> type[torch.autograd.Function]:
    """The autograd function of the registered op that makes the gradient of ``name``: its own gradient is refused."""

    class Backward(Function):
        op = name

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                return tuple(backward_op()(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
            raise NotImplementedError(f"{name}: its gradient has no gradient (double backward)")

    return Backward


@contextlib.contextmanager
def _above_autograd() -> Iterator[None]:
    """Autograd records, also inside a registered op, which the dispatcher runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    need: Sequence[bool],
    grad: Tensor,
    out: Sequence[Tensor],
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Gradients of ``function`` for the inputs that need one: made in ``dtype``, written into ``out``."""
    with _above_autograd():
        leaves = [
            None if x is None else x.detach().to(dtype).requires_grad_(n) for x, n in zip(inputs, need, strict=True)
        ]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        grads = torch.autograd.grad(function(*leaves), wanted, grad.to(dtype), materialize_grads=True)
    return [o.copy_(g) for o, g in zip(out, grads, strict=True)]


def launch_triton(op: str, *args: Any, function: str | None = None, **options: Any) -> None:
    """Call ``modafill.kernels.<op>.<function or op>``; triton is imported here and nowhere earlier."""
    getattr(importlib.import_module(f"modafill.kernels.{op}"), function or op)(*args, **options)


def register(name: str, schema: str, run: Callable, fake: Callable, differentiable: Callable | None = None) -> Any:
    """Define ``modafill::<name>``; ``differentiable`` is its implementation for autograd."""
    library.define(f"{name}{schema}")
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"modafill::{name}", fake, lib=library)
    if differentiable is not None:
        library.impl(name, differentiable, "Autograd")
    op = getattr(torch.ops.modafill, name).default
    torch.library.register_vmap(f"modafill::{name}", functools.partial(one_by_one, op), lib=library)
    return op


def row_coefficients(table: Tensor, step: int, step_tensor: Tensor | None, like: Tensor, low: int = 1) -> Tensor:
    """Rows of ``table`` for the backward passes, ``[B or 1, ..., 5]`` in the precision of ``like [B, ...]``.

    Steps before ``low`` and behind the last are NaN.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if step_tensor is None:
        rows = table[step : step + 1]
    else:
        wanted = step_tensor.reshape(-1)
        rows = table.index_select(0, wanted.clamp(0, table.shape[0] - 1))
        rows = torch.where(((wanted >= low) & (wanted < table.shape[0]))[:, None], rows, torch.nan)
    return rows.to(dtype).reshape(-1, *[1] * (like.ndim - 1), table.shape[1])
