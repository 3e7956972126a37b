"""The op tests once more, on an extension with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What starts processes of its own, and what takes long for the little C++ that it runs.
LEFT_OUT = ("instruction_set", "every_thread", "hidden_tensor", "memory", "importing", "opcheck", "compiles", "export")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, sanitized: dict[str, str]) -> Run:
    """Runs python with the arguments and instruction set given, on an extension built here."""
    folder = tmp_path_factory.mktemp("sanitized")
    settings = [f"build-dir={folder / 'build'}"]
    settings += [f"cmake.define.{name}" for name in ("MODAFILL_SANITIZE=ON", "MODAFILL_CUDA=OFF")]
    settings += ["cmake.define.CMAKE_CXX_COMPILER=g++"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", str(ROOT)]
    install += [f"--config-settings={setting}" for setting in settings]
    built = subprocess.run(install, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    path = ":".join([str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    # Threads that spin while they wait take most of the time.
    environment = {**sanitized, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}

    def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Without site, so that an editable install of the package does not come before this one.
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=ROOT,
            env={**environment, "MODAFILL_CPU_ISA": isa},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_the_op_tests(isa: str, python: Run) -> None:
    found = python(isa, "-c", "from modafill import _C; print(_C.cpu_isa)")
    if "this processor does not have" in found.stdout:
        pytest.skip(f"this processor does not have {isa}")
    # Nothing captured: a report is the last that its process says.
    options = ["-v", "-s", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(LEFT_OUT)})"]
    run = python(isa, "-m", "pytest", *options, "tests/ops")
    assert run.returncode == 0, run.stdout[-20000:]


WRITE = """
import torch
from modafill import _C
out = torch.empty(8)
_C.randn(0, out.data_ptr() + {offset}, 0, 0, 1, 0, 1, 0, 0, 1, {width}, 1)
print("written")
"""


@pytest.mark.parametrize(
    "offset, width, report",
    [(0, 8, "written"), (0, 9, "heap-buffer-overflow"), (-4, 8, "heap-buffer-overflow"), (2, 7, "misaligned address")],
)
def test_what_the_sanitizers_see_of_a_tensor(offset: int, width: int, report: str, python: Run) -> None:
    run = python("baseline", "-c", WRITE.format(offset=offset, width=width))
    assert report in run.stdout, run.stdout
    assert (run.returncode == 0) == (report == "written")
