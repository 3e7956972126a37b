"""The CUDA kernels' bodies on the CPU, under sanitizers: indexing, alignment, masking, and the bits of the C++ path."""

from __future__ import annotations

import itertools
import math
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modafill import ops
from modafill.diffusion.schedule import Schedule
from modafill.ops import Draw, backends

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).parent / "shim"
TABLE = Schedule.linear(50, 1e-3, 0.1).table
SHAPES = [(3, 2, 5), (2, 3, 1), (1, 1, 1), (2, 3, 4), (5, 2, 64), (2, 1, 1031), (300, 1, 8), (0, 3, 4), (2, 3, 0)]

Argument = tuple[str, Any]
Request = tuple[str, list[Argument]]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, sanitized: dict[str, str]
) -> Callable[[list[Request]], list[list[bytes]]]:
    """The extension with its CUDA half compiled by g++; calls it in a process of its own."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("shim")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for source in [*(folder / "csrc" / "cuda").glob("*.cu*")]:
        text = source.read_text()
        text = re.sub(r"(\S+)<<<(\w+), (\w+), .*?>>>\((\w+)\)", r"run_grid(\1, \2, \3, \4)", text)
        source.write_text(text)
    gxx = ["g++", "-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-fno-math-errno"]
    gxx += [f"-I{path}" for path in (SHIM, pybind11.get_include(), sysconfig.get_path("include"))]
    gxx += ["-DMODAFILL_ISA=baseline", '-DMODAFILL_CUDA_ARCHITECTURES="shim"']
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    kernels = map(str, (folder / "csrc" / "cuda").glob("*.cu"))
    # The CPU half is there to be linked, and compiles twice as fast without sanitizers.
    rest = [folder / "csrc" / "bindings.cpp", *(folder / "csrc" / "cpu").glob("*.cpp")]
    objects = [f"{source.stem}.o" for source in rest]
    for command in (
        [*gxx, "-c", *map(str, rest)],
        [*gxx, *sanitizers, "-shared", "-x", "c++", *kernels, "-x", "none", *objects, "-o", str(library)],
    ):
        built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr

    def call(requests: list[Request]) -> list[list[bytes]]:
        child = subprocess.run(
            [sys.executable, str(SHIM / "child.py"), str(folder)],
            input=pickle.dumps(requests),
            env=sanitized,
            capture_output=True,
        )
        assert child.returncode == 0, child.stderr.decode()[-20000:]
        return pickle.loads(child.stdout)

    return call


def _input(value: Tensor | None) -> Argument:
    if value is None:
        return ("value", 0)
    return ("input", value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _values(*values: float) -> list[Argument]:
    return [("value", value) for value in values]


def _step(step: int | Tensor) -> list[Argument]:
    if isinstance(step, Tensor):
        return [_input(step), *_values(step.ndim, 0)]
    return _values(0, 0, step)


def _requests(
    shape: tuple[int, ...], dtype: torch.dtype, step: int | Tensor, noise: dict[str, Any], tensors: tuple[Tensor, ...]
) -> list[tuple[str, list[Argument], Callable[[], tuple[Tensor, ...]]]]:
    """Each call of the extension beside what the C++ path gives for it."""
    x, eps, observed, available = (t.to(dtype) if t.is_floating_point() else t for t in tensors)
    batch, width, size = shape[0], math.prod(shape[1:]), x.numel() * x.element_size()
    code, schedule = ("value", backends.DTYPE_CODES[dtype]), [_input(TABLE), ("value", len(TABLE) - 1)]
    seed, rows = noise["seed"], noise.get("row_id")
    seed_words = [_input(seed), ("value", 0)] if isinstance(seed, Tensor) else _values(0, seed)
    key = [*seed_words, _input(rows)]
    stream, prev_step = ("value", 0), step // 2

    def masked_reverse_step() -> tuple[Tensor, ...]:
        return (ops.masked_reverse_step(x, eps, observed, available, TABLE, step, **noise),)

    def ddim_step(eta: float, clip: float | None) -> tuple[Tensor, ...]:
        return (ops.ddim_step(x, eps, TABLE, step, prev_step, eta=eta, clip=clip, **noise),)

    def randn() -> tuple[Tensor, ...]:
        return (ops.randn(shape, step=step, draw=Draw.RESAMPLE, dtype=dtype, **noise),)

    inputs = [_input(x), _input(eps)]
    arguments = [code, ("output", size), *inputs, _input(observed), _input(available), *schedule, *_step(step), *key]
    requests = [("masked_reverse_step_cuda", [*arguments, *_values(*shape), stream], masked_reverse_step)]
    arguments = [code, ("output", size), ("output", size), _input(x), *schedule, *_step(step), *key]
    requests.append(
        ("add_noise_cuda", [*arguments, *_values(batch, width), stream], lambda: ops.add_noise(x, TABLE, step, **noise))
    )
    arguments = [code, ("output", size), *_step(step), *key, ("value", int(Draw.RESAMPLE))]
    requests.append(("randn_cuda", [*arguments, *_values(batch, width), stream], randn))
    for eta, clip in itertools.product((0.0, 0.6), (None, 0.8)):
        arguments = [code, ("output", size), *inputs, *schedule, *_step(step), *_step(prev_step)]
        arguments += [*_values(eta, math.inf if clip is None else clip), *key, *_values(batch, width), stream]
        requests.append(("ddim_step_cuda", arguments, lambda e=eta, c=clip: ddim_step(e, c)))
    return requests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bodies_have_the_bits_of_the_cpu(dtype: torch.dtype, run: Any) -> None:
    requests = []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        tensors = (*(torch.randn(shape, generator=generator) for _ in range(3)), torch.rand(shape[:2]) < 0.5)
        rows = torch.arange(shape[0]) * (2**33 + 1) - 1
        for step, noise in (
            (1, {"seed": 3}),
            (50, {"seed": -9, "row_id": rows}),
            (torch.tensor(17), {"seed": torch.tensor(-(2**40) - 7)}),
            (torch.arange(shape[0]) * 17 % 50 + 1, {"seed": 5, "row_id": rows}),
        ):
            requests += _requests(shape, dtype, step, noise, tensors)
    for (name, arguments, expected), outputs in zip(requests, run([r[:2] for r in requests]), strict=True):
        for ours, wanted in zip(outputs, expected(), strict=True):
            assert ours == _input(wanted)[1], (name, [a for a in arguments if a[0] == "value"])


def test_what_an_element_does_not_need_is_not_used(run: Any) -> None:
    x, eps, observed = (torch.randn(4, 3, 5) for _ in range(3))
    mask = torch.rand(4, 3) < 0.5
    hidden = mask[..., None]
    spoilt = (
        x.masked_fill(hidden, math.nan),
        eps.masked_fill(hidden, math.nan),
        observed.masked_fill(~hidden, math.nan),
    )
    for step in (1, 30):
        name, arguments, expected = _requests((4, 3, 5), torch.float32, step, {"seed": 1}, (*spoilt, mask))[0]
        assert run([(name, arguments)])[0][0] == _input(expected()[0])[1]
        assert not expected()[0].isnan().any()


def test_a_step_outside_the_schedule_gives_nan_in_its_row(run: Any) -> None:
    tensors = (*(torch.randn(4, 2, 5) for _ in range(3)), torch.rand(4, 2) < 0.5)
    step = torch.tensor([0, 50, 51, 7])
    for name, arguments, _ in _requests((4, 2, 5), torch.float32, step, {"seed": 1}, tensors):
        if name != "randn_cuda":
            out = torch.frombuffer(bytearray(run([(name, arguments)])[0][0]), dtype=torch.float32).view(4, 10)
            assert out.isnan().all(1).tolist() == [True, False, True, False]
            assert out.isnan().any(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("width", [5, 8])
def test_a_buffer_that_is_too_short_is_seen(width: int, run: Any) -> None:
    x = torch.zeros(3, 1, width)
    name, arguments, _ = _requests(x.shape, torch.float32, 30, {"seed": 1}, (x, x, x, x[..., 0] == 0))[1]
    run([(name, arguments)])
    for i in (1, 2, 3):  # noisy, noise and x
        kind, value = arguments[i]
        short = value - 4 if kind == "output" else value[:-4]
        with pytest.raises(AssertionError, match="heap-buffer-overflow"):
            run([(name, [*arguments[:i], (kind, short), *arguments[i + 1 :]])])
