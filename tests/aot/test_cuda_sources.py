"""Every .cu compiled by nvcc for every architecture: registers, spills, exact arithmetic."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CAPABILITIES = (80, 86, 89, 90, 100, 120)
KERNELS_PER_SOURCE = 6  # three element types, whole quads or not
MAX_REGISTERS = 64  # four blocks of 256 threads on every architecture
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def _nvcc(*arguments: str) -> str:
    run = subprocess.run([str(NVCC), "-std=c++17", "-O3", "--fmad=false", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def test_there_are_sources() -> None:
    assert {source.stem for source in SOURCES} == {"masked_reverse_step", "ddim_step", "add_noise", "randn"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in CAPABILITIES]
    log = _nvcc("-Xptxas=-v", "-c", str(source), "-o", str(tmp_path / "op.o"), "--threads=2", *codes)
    for capability in CAPABILITIES:
        assert len(re.findall(rf"Compiling entry function .* for 'sm_{capability}'", log)) == KERNELS_PER_SOURCE
    spills = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)]
    assert len(spills) >= 3 * KERNELS_PER_SOURCE * len(CAPABILITIES)
    assert not any(spills), log
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == KERNELS_PER_SOURCE * len(CAPABILITIES)
    assert max(registers) <= MAX_REGISTERS


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_float_arithmetic_is_exactly_rounded(source: Path, tmp_path: Path) -> None:
    ptx = tmp_path / "op.ptx"
    _nvcc("-arch=compute_80", "-ptx", str(source), "-o", str(ptx))
    text = ptx.read_text()
    assert "sqrt.rn.f32" in text
    assert not re.findall(r"\b(?:fma\.rn\.f32|div\.full\.f32|div\.approx\S*|sqrt\.approx\S*)", text)
