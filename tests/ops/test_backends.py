"""Which backend runs, and how a caller learns why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modafill import ops
from modafill.info import info
from modafill.ops import backends


@pytest.mark.parametrize("op", backends.OPS)
def test_explain_says_what_auto_runs_and_why_not_something_faster(op: str) -> None:
    choice = ops.explain(op)
    assert (choice.backend, choice.rejected) == ("cpu", {})
    half = ops.explain(op, dtype=torch.float16)
    assert half.backend == ("torch" if op == "conv_gelu_conv" else "reference")
    assert "float16" in half.rejected["cpu"]
    assert op in str(half)
    assert half.rejected["cpu"] in str(half)


def test_explain_on_a_gpu_without_one_names_each_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    choice = ops.explain("randn", device="cuda", dtype=torch.float64)
    assert choice.backend == "reference"
    assert set(choice.rejected) == {"cuda", "triton"}


def test_a_named_backend_that_cannot_run_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._choose.cache_clear()
    for backend in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"randn: the {backend} backend cannot run: the tensors are on cpu"):
            ops.randn((2, 3), seed=1, backend=backend)
    with pytest.raises(RuntimeError, match="float16"):
        ops.randn((2, 3), seed=1, dtype=torch.float16, backend="cpu")


def test_the_environment_names_a_backend_and_an_argument_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert ops.explain("randn").backend == "reference"
    assert ops.explain("randn", backend="cpu").backend == "cpu"
    monkeypatch.setenv(backends.ENVIRONMENT, "cuda")
    with pytest.raises(RuntimeError, match="cuda backend cannot run"):
        ops.randn((2, 3), seed=1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^op: "):
        ops.explain("convolve")
    with pytest.raises(ValueError, match=r"^backend: "):
        ops.explain("randn", backend="fast")
    with pytest.raises(ValueError, match=r"^device: got 'gpu', expected cpu, cuda or cuda:N"):
        ops.explain("randn", device="gpu")


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, modafill.ops, modafill.info, modafill.kernels; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import modafill.ops"],
        env={**os.environ, "MODAFILL_CPU_ISA": "v9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0, "not a reason to run the reference instead"
    assert "MODAFILL_CPU_ISA: got v9" in run.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.skipif(not backends.native_build()["openmp"], reason="built without OpenMP")
def test_large_calls_use_every_thread() -> None:
    """Teams of 2, 3, … threads in turn: each large call starts the thread that none before it had."""
    code = """
import os, torch
from modafill import ops
from modafill.diffusion import Schedule
torch.set_num_threads(1)
x, table = torch.ones(64, 4, 512), Schedule.linear(50).table
q, rows, w = (torch.ones(shape, requires_grad=True) for shape in ((8, 4, 64, 32), (16, 64, 64), (64, 64, 3)))
attention, convolution = ops.prompt_attention(q, q, q, None), ops.conv_gelu_conv(rows, w, None, w, None)
plain = [t.detach() for t in (q, rows, w)]
calls = {
    "randn": lambda: ops.randn(x.shape, seed=1),
    "add_noise": lambda: ops.add_noise(x, table, 3, seed=1),
    "ddim_step": lambda: ops.ddim_step(x, x, table, 3, 2),
    "masked_reverse_step": lambda: ops.masked_reverse_step(x, x, x, x[..., 0] > 0, table, 3, seed=1),
    "prompt_attention": lambda: ops.prompt_attention(*plain[:1] * 3, None),
    "prompt_attention_backward": lambda: torch.autograd.grad(attention, q, plain[0]),
    "conv_gelu_conv": lambda: ops.conv_gelu_conv(plain[1], plain[2], None, plain[2], None),
    "conv_gelu_conv_backward": lambda: torch.autograd.grad(convolution, w, plain[1]),
}
for threads, (name, call) in enumerate(calls.items(), 2):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    call()
    print(name, len(os.listdir("/proc/self/task")) - before)
"""
    environment = {**os.environ, backends.ENVIRONMENT: "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = [*backends.OPS, *(f"{op}_backward" for op in ("prompt_attention", "conv_gelu_conv"))]
    assert dict(line.split() for line in run.stdout.splitlines()) == dict.fromkeys(names, "1")


def test_info_is_plain_and_covers_every_op() -> None:
    facts = json.loads(json.dumps(info()))
    assert set(facts["ops"]) == set(backends.OPS)
    assert facts["cpu_isa"] in ("baseline", "v3", "v4")
    if not torch.cuda.is_available():
        assert facts["gpu"].startswith("none: ")
