"""Choosing and saving launch configurations; no kernel runs here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from modafill.kernels import conv_gelu_conv, prompt_attention, resources, tuned, tuning  # noqa: E402


def test_the_fastest_candidate_wins() -> None:
    used: list[dict[str, int]] = []
    times = {1: [3.0, 1.0], 2: [1.0, 2.0], 4: [0.1, None], 8: [2.0, 2.0]}

    def timer(call: Any) -> float:
        found = times[used[-1]["num_warps"]][call()]
        if found is None:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return found

    candidates = [{"num_warps": warps} for warps in times]
    assert tuning.best(candidates, used.append, [lambda: 0, lambda: 1], timer) == {"num_warps": 2}
    assert used == candidates
    with pytest.raises(RuntimeError, match="none of 1 configurations can be launched"):
        tuning.best([{"num_warps": 4}], used.append, [lambda: 1], timer)


@pytest.mark.parametrize("op", resources.OPS)
def test_saving_keeps_the_other_capabilities(op: str, tmp_path: Path) -> None:
    entries = {str(c): tuned.tuned(op, c) for c in resources.CAPABILITIES}
    for capability in sorted(resources.CAPABILITIES, reverse=True):
        tuning.save(op, capability, entries[str(capability)], tmp_path)
    path = tmp_path / f"{op}.json"
    assert json.loads(path.read_text()) == entries
    assert list(json.loads(path.read_text())) == sorted(entries, key=int)
    # The file that is shipped is what the command would write.
    assert path.read_text() == (Path(tuned.__file__).parent / "configs" / f"{op}.json").read_text()


@pytest.mark.parametrize("capability", [70, 80, 86, 87, 89, 90, 100, 103, 120, 121, 200])
def test_every_device_and_shape_has_a_configuration(capability: int) -> None:
    for kernel in ("forward", "queries", "keys", "bias"):
        for size in (2, 4):
            for width in range(4, 129, 4):
                for length in (1, 17, 500, 2048):
                    found = prompt_attention.config(kernel, capability, size, width, length, length)
                    assert found["BLOCK_D"] >= width
                    assert found["BLOCK_D"] % found["BLOCK_K"] == 0
                    assert all(value & (value - 1) == 0 for name, value in found.items() if name != "num_stages")
                    assert min(found["BLOCK_M"], found["BLOCK_N"], found["BLOCK_K"]) >= 16
    for kernel in ("forward", "hidden", "inputs", "weights"):
        for size in (2, 4):
            found = conv_gelu_conv.config(kernel, capability, size, BLOCK_M=7, BLOCK_N=1000)
            assert found["BLOCK_M"] == 16
            assert all(value & (value - 1) == 0 for name, value in found.items() if name != "num_stages")


def test_tuning_without_a_gpu_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    run = subprocess.run([sys.executable, "-m", "modafill.kernels", "tune"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "error: no CUDA GPU is here to tune on\n"
