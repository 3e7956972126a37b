"""Which backend runs, and how a caller learns why."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


def test_info_is_plain_and_covers_every_op() -> None:
    facts = json.loads(json.dumps(info()))
    assert set(facts["ops"]) == set(backends.OPS)
    assert facts["cpu_isa"] in ("baseline", "v3", "v4")
    if not torch.cuda.is_available():
        assert facts["gpu"].startswith("none: ")
