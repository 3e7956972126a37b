"""Every Triton kernel compiled ahead of time for every architecture: registers, spills, exact arithmetic."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, which compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from modafill.kernels.rows import config  # noqa: E402

CAPABILITIES = (80, 86, 89, 90, 100, 120)
MAX_REGISTERS = 128  # 16 warps of 32 threads on every architecture
FLOATS = {"eta": "fp32", "clip": "fp32"}
INTEGERS = {"step": "i64", "prev_step": "i64", "seed": "i64"}
POINTERS = {
    "available": "*i1",
    "table": "*fp32",
    "step_values": "*i64",
    "prev_step_values": "*i64",
    "seeds": "*i64",
    "row_ids": "*i64",
}
# Integers for all rows, or a value in memory for each.
OPTIONAL = ("step_values", "prev_step_values", "seeds", "row_ids")
ELEMENTS = {"out", "x", "eps", "observed", "noisy", "noise"}
CASES = {
    "masked_reverse_step": [{}],
    "add_noise": [{}],
    "randn": [{}],
    "ddim_step": [{"NOISY": True, "CLIPPED": True}, {"NOISY": False, "CLIPPED": False}],
}


def _compile(op: str, capability: int, dtype: str, in_memory: bool, constants: dict[str, Any]) -> Any:
    kernel = getattr(importlib.import_module(f"modafill.kernels.{op}"), f"{op}_kernel")
    settings = config(op, capability, 768)
    constants = {**constants, "BLOCK": settings["BLOCK"]}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or (name in OPTIONAL and not in_memory):
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name)
            continue
        signature[name] = f"*{dtype}" if name in ELEMENTS else {**POINTERS, **INTEGERS, **FLOATS}.get(name, "i32")
        if signature[name].startswith("*") or name == "width":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": settings["num_warps"], "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", CASES)
def test_compiles_within_budget(op: str, capability: int, tmp_path: Path) -> None:
    for constants in CASES[op]:
        for dtype, in_memory in (("fp32", True), ("bf16", False)):
            compiled = _compile(op, capability, dtype, in_memory, constants)
            used = _resources(compiled.asm["cubin"], tmp_path)
            assert 0 < used["REG"] <= MAX_REGISTERS
            assert used["STACK"] == used["LOCAL"] == 0, "spills"
            assert compiled.metadata.shared <= 16 * 1024
            inexact = re.findall(
                r"\b(?:fma\.rn\.f32|div\.full\.f32|div\.approx\S*|sqrt\.approx\S*)", compiled.asm["ptx"]
            )
            assert not inexact, "the noise would not have the bits of the CPU's"
