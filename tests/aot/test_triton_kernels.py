"""Every Triton kernel compiled ahead of time for every architecture at its listed configurations."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, which compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from modafill.kernels import conv_gelu_conv, prompt_attention, resources

# Bytes: six registers of the loop with noise.
KNOWN = {("token_denoiser", 80, "fp32"): 24}
STEP_REGISTERS = 128  # 16 warps of 32 threads on every architecture


@pytest.mark.parametrize("op", resources.STEP_OPS)
def test_step_kernels_are_small_and_exact(op: str) -> None:
    for capability in resources.CAPABILITIES:
        for used in map(resources.measure_one, resources.variants(op, capability)):
            assert used.fits, used.variant
            assert 0 < used.registers <= STEP_REGISTERS
            assert used.shared <= 16 * 1024
            inexact = re.findall(r"\b(?:fma\.rn\.f32|div\.full\.f32|div\.approx\S*|sqrt\.approx\S*)", used.ptx)
            assert not inexact, "the noise would not have the bits of the CPU's"


@pytest.mark.slow
@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv", "token_denoiser"])
def test_no_kernel_spills(op: str) -> None:
    chosen = [v for capability in resources.CAPABILITIES for v in resources.variants(op, capability)]
    functions = vars(importlib.import_module(f"modafill.kernels.{op}"))
    assert {v.kernel for v in chosen} == {name for name in functions if "_kernel" in name}
    bad = [
        f"{used.variant.kernel} sm_{used.variant.capability} {used.variant.dtype} {used.variant.case}: "
        f"{used.spilled} bytes spilled, {used.shared} of shared memory"
        for used in resources.measure(chosen)
        if not (used.fits or used.spilled <= KNOWN.get((op, used.variant.capability, used.variant.dtype), 0))
    ]
    assert not bad, "\n".join(bad)


def test_the_command_prints_the_table() -> None:
    command = [sys.executable, "-m", "modafill.kernels", "resources", "--op", "randn", "--capability", "90"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    header, *lines = run.stdout.splitlines()
    assert header.split() == ["op", "kernel", "sm", "type", "regs", "spill", "shared", "limit", "case"]
    assert [line.split()[:4] for line in lines] == [["randn", "randn_kernel", "90", t] for t in ("fp32", "bf16")]


def test_a_kernel_that_spills_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from modafill.kernels import tuned

    entry = {"bytes": 4, "width": 128, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(tuned, "tuned", lambda op, capability: {"keys": [entry]})
    monkeypatch.setattr(prompt_attention, "tuned", tuned.tuned)
    constants, options = resources._split(prompt_attention.config("keys", 90, 4, 128, 500, 500))
    constants |= {"CAUSAL": False, "DROPS": False, "PRECISION": "tf32x3"}
    used = resources.measure_one(
        resources.Variant("prompt_attention", "keys_kernel", 90, "fp32", "", constants, options)
    )
    assert not used.fits


def test_unknown_names_are_refused() -> None:
    for option, value in (("--op", "softmax"), ("--capability", "75")):
        command = [sys.executable, "-m", "modafill.kernels", "resources", option, value]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 2
        assert run.stderr.startswith(f"error: {option}: got ")


ONES = {
    "prompt_attention": ("batch", "heads", "queries", "keys", "modes", "bias_heads", "offset", "groups"),
    "conv_gelu_conv": ("rows", "length", "channels", "hidden", "outputs", "lefts", "rights", "groups"),
}
ABSENT = {
    "forward_kernel": [("logsumexp",), ("bias", "mode"), ("key_lengths",), ("b1", "b2")],
    "queries_kernel": [("q_grad",), ("bias", "mode", "key_lengths")],
    "keys_kernel": [("k_grad",), ("v_grad",), ("bias", "mode", "key_lengths")],
    "bias_kernel": [("mode", "key_lengths")],
    "hidden_kernel": [("value",), ("value_grad",), ("b1",)],
}


@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv"])
def test_what_is_1_or_not_given_is_compiled_in(op: str) -> None:
    """An argument that is 1 or None becomes a constant of the kernel, which the interpreter does not try."""
    chosen = []
    for v in {v.kernel: v for v in resources.variants(op, 90)}.values():
        names = getattr(conv_gelu_conv if op == "conv_gelu_conv" else prompt_attention, v.kernel).arg_names
        ones = {name: 1 for name in ONES[op] if name in names}
        for extra in ({}, ones, *(dict.fromkeys(a) for a in ABSENT.get(v.kernel, ()) if set(a) <= set(names))):
            chosen.append(dataclasses.replace(v, constants={**v.constants, **extra}))
    assert all(used.registers > 0 for used in resources.measure(chosen))
