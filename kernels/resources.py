"""What every kernel takes of a GPU at its listed configurations: registers, spills, shared memory. Needs no GPU."""

import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modafill.kernels import conv_gelu_conv, prompt_attention, rows, tuned

CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

STEP_OPS = ("masked_reverse_step", "ddim_step", "add_noise", "randn")
OPS = (*STEP_OPS, "prompt_attention", "conv_gelu_conv", "token_denoiser")

# Types of the kernels' arguments; what is not listed is a tensor of elements, or else an int32.
_ELEMENTS = {
    *("out", "x", "eps", "observed", "noisy", "noise", "q", "k", "v", "bias", "grad", "q_grad", "k_grad", "v_grad"),
    *("bias_grad", "y", "w1", "b1", "w2", "b2", "value", "value_grad", "x_grad", "left", "right"),
    *("matrices", "normalised"),
}
_TYPES = {
    "available": "*i1",
    **dict.fromkeys(("table", "logsumexp", "delta", "sums"), "*fp32"),
    **dict.fromkeys(("result", "state", "before", "shown", "added", "coefficients"), "*fp32"),
    **dict.fromkeys(("step_values", "prev_step_values", "seeds", "row_ids", "mode", "key_lengths"), "*i64"),
    **dict.fromkeys(("eta", "clip", "scale", "kept", "epsilon"), "fp32"),
    **dict.fromkeys(("step", "prev_step", "seed", "dropped"), "i64"),
}
# Integers that are multiples of 16 at the sizes that the models use.
_ALIGNED = {"width", "channels", "hidden", "outputs", "lefts", "rights", "size"}


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that is fixed when it is compiled.

    Attributes:
        op, kernel: file and function.
        capability: 10·major + minor.
        dtype: of the elements, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        case: what else sets it apart, for people.
        constants: values of constexpr arguments; None for a tensor that is not given.
        options: ``num_warps`` and so on.
    """

    op: str
    kernel: str
    capability: int
    dtype: str
    case: str
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def compile(self) -> Any:
        function = getattr(importlib.import_module(f"modafill.kernels.{self.op}"), self.kernel)
        signature: dict[str, Any] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for i, name in enumerate(function.arg_names):
            if name in self.constants:
                signature[name], constexprs[(i,)] = "constexpr", self.constants[name]
            elif name.endswith("strides"):
                signature[name] = ("i32",) * 3
                attributes |= {(i, place): [["tt.divisibility", 16]] for place in range(3)}
            else:
                signature[name] = f"*{self.dtype}" if name in _ELEMENTS else _TYPES.get(name, "i32")
                if signature[name].startswith("*") or name in _ALIGNED:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=self.options)


@dataclass(frozen=True)
class Usage:
    """Registers of a thread, bytes that it spills, bytes of shared memory of a block, and the PTX."""

    variant: Variant
    registers: int
    spilled: int
    shared: int
    ptx: str

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMITS[self.variant.capability]


def _split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration's constants and its options."""
    options = {name: value for name, value in settings.items() if name.islower()}
    return {name: value for name, value in settings.items() if name not in options}, options


def _step_variants(op: str, capability: int) -> Iterator[Variant]:
    constants, options = _split(rows.config(op, capability, 768))
    options["enable_fp_fusion"] = False
    cases: list[dict[str, bool]] = [{}]
    if op == "ddim_step":
        cases = [{"NOISY": True, "CLIPPED": True}, {"NOISY": False, "CLIPPED": False}]
    in_memory = ("step_values", "prev_step_values", "seeds", "row_ids")
    for dtype, case in itertools.product(("fp32", "bf16"), cases):
        # Steps and seeds in memory for one, given as integers for the other.
        given = {} if dtype == "fp32" else dict.fromkeys(in_memory)
        label = ", ".join(name.lower() for name, on in case.items() if on)
        yield Variant(op, f"{op}_kernel", capability, dtype, label, {**constants, **case, **given}, options)


def _attention_variants(capability: int) -> Iterator[Variant]:
    for width, (dtype, size), kernel, everything in itertools.product(
        (32, 64, 128), (("bf16", 2), ("fp32", 4)), ("forward", "queries", "keys", "bias"), (True, False)
    ):
        if not everything and width > 32:
            continue
        constants, options = _split(prompt_attention.config(kernel, capability, size, width, 500, 500))
        constants |= {"CAUSAL": everything, "DROPS": everything, "PRECISION": "tf32x3"}
        constants |= {} if everything else dict.fromkeys(("seeds", "row_ids", "key_lengths"))
        case = f"d={width}" + (", causal, key lengths, dropout" if everything else "")
        yield Variant("prompt_attention", f"{kernel}_kernel", capability, dtype, case, constants, options)


def _convolution_variants(capability: int) -> Iterator[Variant]:
    for (dtype, size), kernel, taps in itertools.product(
        (("bf16", 2), ("fp32", 4)), ("forward", "hidden", "inputs", "weights"), (1, 3)
    ):
        found, options = _split(conv_gelu_conv.config(kernel, capability, size))
        constants = {"TAPS1": taps, "TAPS2": taps, "TAPS": taps, "TANH": False, "ADD": True, "PRECISION": "tf32x3"}
        function = getattr(conv_gelu_conv, f"{kernel}_kernel")
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        case = f"{taps} tap{'s' if taps > 1 else ''}"
        yield Variant("conv_gelu_conv", f"{kernel}_kernel", capability, dtype, case, {**constants, **found}, options)


def _token_variants(capability: int) -> Iterator[Variant]:
    absent = {
        "none": ("before", "shown", "coefficients", "seeds", "row_ids"),
        "replace": ("result", "before", "seeds"),
        "clean": ("result", "shown", "seeds", "row_ids"),
    }
    for (dtype, size), loop in itertools.product((("bf16", "2"), ("fp32", "4")), absent):
        for found in tuned.tuned("token_denoiser", capability)[size]:
            constants, options = _split(found)
            # ADN in the paper's size.
            constants |= {"BLOCK_W": 64, "BLOCK_C": 256, "BLOCK_D": 32, "PRECISION": "tf32x3"}
            constants |= {"LOOP": loop, **dict.fromkeys(absent[loop])}
            options["enable_fp_fusion"] = False
            case = f"loop {loop}, tile of {found['BLOCK_T']}"
            yield Variant("token_denoiser", "token_denoiser_kernel", capability, dtype, case, constants, options)


def variants(op: str, capability: int) -> list[Variant]:
    """The kernels of ``op`` at the configurations listed for ``capability``, in both element sizes."""
    if op == "prompt_attention":
        return list(_attention_variants(capability))
    if op == "conv_gelu_conv":
        return list(_convolution_variants(capability))
    if op == "token_denoiser":
        return list(_token_variants(capability))
    return list(_step_variants(op, capability))


def measure_one(variant: Variant) -> Usage:
    """Compile a kernel and read what it takes from its binary."""
    compiled = variant.compile()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        listed = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed.stdout)}
    spilled = used["STACK"] + used["LOCAL"]
    return Usage(variant, used["REG"], spilled, compiled.metadata.shared, compiled.asm["ptx"])


def measure(chosen: Iterable[Variant]) -> Iterator[Usage]:
    """:func:`measure_one` of each, in order, over all cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(measure_one, chosen)
