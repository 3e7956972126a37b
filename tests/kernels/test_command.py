"""``python -m modafill.kernels`` as its users meet it: a mistake is one line, with Triton and without it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None
runpy.run_module("modafill.kernels", run_name="__main__")
"""


def _run(*command: str) -> tuple[int, str, str]:
    # No GPU, where there is one.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_without_triton_both_say_how_to_get_it() -> None:
    missing = "error: triton is not installed: pip install triton\n"
    assert _run("-c", WITHOUT_TRITON, "resources") == (2, "", missing)
    with_gpu = "import torch; torch.cuda.is_available = lambda: True" + WITHOUT_TRITON
    assert _run("-c", with_gpu, "tune") == (2, "", missing)


def test_tuning_looks_for_a_gpu_before_triton() -> None:
    missing = "error: no CUDA GPU is here to tune on\n"
    assert _run("-c", WITHOUT_TRITON, "tune") == (2, "", missing)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tune", "--bogus"], "No such option: --bogus"),
        (["tune", "--op", "convolve"], "--op: got 'convolve', expected one of masked_reverse_step, "),
        (["resources", "--capability", "x"], "Invalid value for '--capability'"),
        pytest.param(
            ["resources", "--capability", "70"],
            "--capability: got 70, expected one of 80, ",
            marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
        ),
        (["resourses"], "resourses"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    status, out, err = _run("-m", "modafill.kernels", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_help_is_plain() -> None:
    status, out, err = _run("-m", "modafill.kernels", "--help")
    assert (status, err) == (0, "")
    assert "resources" in out
    assert "`" not in out
