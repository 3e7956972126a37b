"""Which backend runs, and how a caller learns why."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from modafill import ops
from modafill.diffusion.schedule import Schedule
from modafill.info import info
from modafill.ops import backends


@pytest.mark.parametrize("op", backends.OPS)
def test_explain_says_what_auto_runs_and_why_not_something_faster(op: str) -> None:
    choice = ops.explain(op)
    assert (choice.backend, choice.rejected) == ("cpu", {})
    half = ops.explain(op, dtype=torch.float16)
    assert half.backend == ("torch" if "torch" in backends.OPS[op] else "reference")
    assert "float16" in half.rejected["cpu"]
    assert op in str(half)
    assert half.rejected["cpu"] in str(half)


@pytest.mark.parametrize("backend", ["auto", *backends.BACKENDS])
def test_explain_on_a_gpu_that_is_not_here_names_the_device(backend: str) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    for op in backends.OPS:
        with pytest.raises(RuntimeError, match=rf"^device: got '{device}', but torch sees \d+ CUDA devices$"):
            ops.explain(op, device=device, backend=backend)


def test_explain_on_a_gpu_names_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    choice = ops.explain("randn", device="cuda", dtype=torch.float64)
    assert choice.backend == "reference"
    assert set(choice.rejected) == {"cuda", "triton"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_fake_tensors_are_on_a_gpu_that_is_not_here(backend: str) -> None:
    with torch.no_grad(), FakeTensorMode():
        x, table, w = (torch.empty(shape, device="cuda") for shape in ((2, 3, 8), (51, 5), (8, 8, 3)))
        q = torch.empty(2, 2, 5, 32, device="cuda")
        results = [
            ops.add_noise(x, table, 3, seed=1, backend=backend)[0],
            ops.conv_gelu_conv(x, w, None, w, None, backend=backend),
            ops.prompt_attention(q, q, q, None, backend=backend),
        ]
    assert [(result.device.type, result.shape) for result in results] == [("cuda", t.shape) for t in (x, x, q)]


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


def test_the_rule_is_that_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("modafill.ops.conv_gelu_conv")
    backends._choose.cache_clear()
    monkeypatch.setattr(module, "_HAS_BFLOAT16", True)
    training, small = "rows >= 256 and weights >= 8,192 and n >= 15,000,000", "rows >= 256 and n >= 50,000,000"
    several = "in inference with several taps where n >= 150,000,000"
    assert f"in training where {training}, or {small}; {several}. Not with out=" in str(ops.explain("conv_gelu_conv"))
    half = str(ops.explain("conv_gelu_conv", dtype=torch.bfloat16))
    assert "larger convolution: where n >= 1,000,000. Not with out=" in half
    assert "training" not in half
    for choice in (
        ops.explain("conv_gelu_conv", dtype=torch.float64),
        ops.explain("conv_gelu_conv", backend="cpu"),
        ops.explain("conv_gelu_conv", backend="torch", device="meta"),
        ops.explain("prompt_attention"),
    ):
        assert choice.rule == ""
    backends._choose.cache_clear()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^op: "):
        ops.explain("convolve")
    with pytest.raises(ValueError, match=r"^backend: "):
        ops.explain("randn", backend="fast")
    for device in ("gpu", "mps", torch.device("mps")):
        with pytest.raises(ValueError, match=r"^device: got '\w+', expected cpu, cuda or cuda:N$"):
            ops.explain("randn", device=device)
    assert ops.explain("randn", device="meta").backend == "reference"


def test_a_dtype_that_is_none_is_refused() -> None:
    for call in (ops.explain, lambda _, dtype: ops.randn((2, 3), seed=1, dtype=dtype)):
        with pytest.raises(TypeError, match=r"^dtype: got str 'float32', expected a torch.dtype"):
            call("randn", dtype="float32")
        with pytest.raises(ValueError, match=r"^dtype: got int64, expected a floating-point type$"):
            call("randn", dtype=torch.int64)


@pytest.mark.parametrize(
    "value, shown", [("a", "str 'a'"), ([3], "list"), (None, "NoneType None"), (3.0, "float 3.0"), (True, "bool True")]
)
def test_a_seed_or_step_that_is_no_integer_is_named(value: Any, shown: str, schedule: Schedule) -> None:
    good: dict[str, Any] = {"step": 5, "prev_step": 3, "seed": 1}
    for name in good:
        if (name, value) == ("seed", None):  # no seed is needed at eta = 0
            continue
        with pytest.raises(
            TypeError, match=f"^{name}: got {re.escape(shown)}, expected an integer or an int64 tensor$"
        ):
            ops.ddim_step(torch.zeros(2, 3), torch.zeros(2, 3), schedule.table, **{**good, name: value})


def test_integers_of_numpy_are_integers(schedule: Schedule) -> None:
    x = torch.zeros(2, 3)
    given = ops.add_noise(x, schedule.table, np.int16(3), seed=np.uint64(2**63 + 5))[0]
    assert torch.equal(given, ops.add_noise(x, schedule.table, 3, seed=2**63 + 5)[0])


def test_a_step_stays_a_symbol_while_something_traces(schedule: Schedule) -> None:
    def call(x: Tensor, table: Tensor, step: int) -> Tensor:
        return ops.add_noise(x, table, step, seed=step)[0]

    x = torch.zeros(2, 3)
    traced = make_fx(call, tracing_mode="symbolic")(x, schedule.table, 9)
    assert torch.equal(traced(x, schedule.table, 20), call(x, schedule.table, 20))


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
layer = torch.nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True, norm_first=True)
encoder = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(64), enable_nested_tensor=False)
network = ops.TokenNetwork(encoder, torch.nn.Linear(64, 64))
tokens, added = torch.ones(64, 3, 64), torch.ones(3, 2, 64)
calls = {
    "randn": lambda: ops.randn(x.shape, seed=1),
    "add_noise": lambda: ops.add_noise(x, table, 3, seed=1),
    "ddim_step": lambda: ops.ddim_step(x, x, table, 3, 2),
    "masked_reverse_step": lambda: ops.masked_reverse_step(x, x, x, x[..., 0] > 0, table, 3, seed=1),
    "prompt_attention": lambda: ops.prompt_attention(*plain[:1] * 3, None),
    "prompt_attention_backward": lambda: torch.autograd.grad(attention, q, plain[0]),
    "conv_gelu_conv": lambda: ops.conv_gelu_conv(plain[1], plain[2], None, plain[2], None),
    "conv_gelu_conv_backward": lambda: torch.autograd.grad(convolution, w, plain[1]),
    "token_denoiser": lambda: ops.token_denoiser(network, tokens, torch.zeros(64, 3, dtype=torch.bool), added),
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
