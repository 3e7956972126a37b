"""Tunes launch configurations on the GPU that is here and writes them to configs/*.json. Nothing tunes at run time."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from modafill import ops
from modafill.diffusion.schedule import Schedule
from modafill.kernels import tuned

Call = Callable[[], Any]
Config = dict[str, int]

DTYPES = {2: torch.bfloat16, 4: torch.float32}
_BATCH, _HEADS, _LENGTHS = 32, 8, (50, 500)
_CONVOLUTIONS = ((50, 256, 3), (500, 512, 1))  # length, channels, taps
_ROWS = (1024, 16384)
_NETWORK = (256, 8, 1024)  # channels, heads, hidden


def _grid(**choices: tuple[int, ...]) -> list[Config]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


ROW_CANDIDATES = _grid(BLOCK=(64, 128, 256, 512), num_warps=(2, 4, 8))
ATTENTION_CANDIDATES = _grid(BLOCK_M=(16, 32, 64, 128), BLOCK_N=(16, 32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))
CONVOLUTION_CANDIDATES = _grid(
    BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128, 256), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(2, 3)
)


TOKEN_CANDIDATES = _grid(BLOCK_F=(16, 32, 64), BLOCK_K=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))


def best(
    candidates: list[Config], use: Callable[[Config], None], calls: list[Call], timer: Callable[[Call], float]
) -> Config:
    """The candidate with the smallest geometric mean of the times of ``calls``; those that cannot be launched are out.

    Args:
        candidates: configurations.
        use: makes the calls that follow use one.
        timer: milliseconds of a call.

    Raises:
        RuntimeError: none can be launched.
    """
    found: list[tuple[float, int]] = []
    for index, candidate in enumerate(candidates):
        use(candidate)
        try:
            times = [timer(call) for call in calls]
        except triton.runtime.errors.OutOfResources:
            continue
        found.append((sum(map(math.log, times)), index))
    if not found:
        raise RuntimeError(f"none of {len(candidates)} configurations can be launched")
    return candidates[min(found)[1]]


def _call(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Call:
    """``forward``, or its gradient for the tensors that are wanted."""
    if not wanted:
        return forward
    for x in wanted:
        x.requires_grad_()
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def _attention_calls(kernel: str, dtype: torch.dtype, width: int, device: str) -> Iterator[Call]:
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    for length in _LENGTHS:
        q, k, v = (torch.randn(_BATCH, _HEADS, length, width, **made) for _ in range(3))
        bias, mode = torch.randn(7, _HEADS, length, length, **made), torch.arange(_BATCH, device=device) % 7
        wanted = {"forward": [], "queries": [q], "keys": [k, v], "bias": [bias]}[kernel]
        yield _call(partial(ops.prompt_attention, q, k, v, bias, mode, backend="triton"), wanted)


def _convolution_calls(kernel: str, dtype: torch.dtype, device: str) -> Iterator[Call]:
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    for length, channels, taps in _CONVOLUTIONS:
        x = torch.randn(_BATCH, length, channels, **made)
        w1, w2 = (torch.randn(channels, channels, taps, **made) / channels**0.5 for _ in range(2))
        wanted = {"forward": [], "hidden": [w2], "inputs": [x], "weights": [w1, w2]}[kernel]
        yield _call(partial(ops.conv_gelu_conv, x, w1, None, w2, None, backend="triton"), wanted)


def _token_calls(dtype: torch.dtype, device: str) -> Iterator[Call]:
    layer = torch.nn.TransformerEncoderLayer(*_NETWORK, activation="gelu", batch_first=True, norm_first=True)
    norm = torch.nn.LayerNorm(_NETWORK[0])
    encoder = torch.nn.TransformerEncoder(layer, 4, norm=norm, enable_nested_tensor=False).to(device)
    network = ops.TokenNetwork(encoder, torch.nn.Linear(_NETWORK[0], _NETWORK[0], device=device), dtype=dtype)
    added = torch.randn(3, 2, _NETWORK[0], device=device)
    for batch in _ROWS:
        x, available = torch.randn(batch, 3, _NETWORK[0], device=device), torch.arange(3, device=device) == 0
        yield partial(ops.token_denoiser, network, x, available.expand(batch, 3), added, backend="triton")


def _row_calls(op: str, device: str) -> Iterator[Call]:
    table = Schedule.linear(1000, 3e-4, 0.06).table.to(device)
    for batch in _ROWS:
        x, eps, observed = (torch.randn(batch, 3, 256, device=device) for _ in range(3))
        noise: dict[str, Any] = {"seed": 1, "backend": "triton"}
        if op == "masked_reverse_step":
            available = torch.rand(batch, 3, device=device) < 0.5
            arguments = x, eps, observed, available, table, 500
            yield partial(ops.masked_reverse_step, *arguments, out=torch.empty_like(x), **noise)
        elif op == "ddim_step":
            yield partial(ops.ddim_step, x, eps, table, 500, 480, eta=0.5, out=torch.empty_like(x), **noise)
        elif op == "add_noise":
            yield partial(ops.add_noise, x, table, 500, **noise)
        else:
            yield partial(ops.randn, tuple(x.shape), out=x, **noise)


def tune(op: str, timer: Callable[[Call], float], progress: Callable[[str], None], device: str = "cuda") -> Any:
    """The entry of configs/``op``.json for the current GPU, measured."""
    capability = tuned.capability_of(torch.empty(0, device=device))
    entry: Any = json.loads(json.dumps(tuned.tuned(op, capability)))

    def use(place: Any, candidate: Config, listed: Any) -> None:
        place.update(candidate)
        tuned.replace(op, capability, listed)

    def one(label: str, place: Any, candidates: list[Config], calls: list[Call], alone: Any = None) -> None:
        """``alone`` is what is listed meanwhile, where a call would choose among places."""
        chosen = best(candidates, lambda candidate: use(place, candidate, alone or entry), calls, timer)
        use(place, chosen, entry)
        progress(f"{op} {label}: {chosen}")

    if op == "prompt_attention":
        for kernel, places in entry.items():
            for place in places:
                calls = list(_attention_calls(kernel, DTYPES[place["bytes"]], place["width"], device))
                one(f"{kernel}, {place['bytes']} bytes, d={place['width']}", place, ATTENTION_CANDIDATES, calls)
    elif op == "conv_gelu_conv":
        for kernel, places in entry.items():
            for size, place in places.items():
                calls = list(_convolution_calls(kernel, DTYPES[int(size)], device))
                one(f"{kernel}, {size} bytes", place, CONVOLUTION_CANDIDATES, calls)
    elif op == "token_denoiser":
        for size, places in entry.items():
            calls = list(_token_calls(DTYPES[int(size)], device))
            for place in places:
                label = f"{size} bytes, tile of {place['BLOCK_T']}"
                one(label, place, TOKEN_CANDIDATES, calls, {size: [place]})
    else:
        one("", entry, ROW_CANDIDATES, list(_row_calls(op, device)))
    return entry


def save(op: str, capability: int, entry: Any, folder: Path) -> Path:
    """Put ``entry`` into ``folder``/``op``.json beside the other capabilities, at once or not at all."""
    path = folder / f"{op}.json"
    table = (
        {int(c): found for c, found in json.loads(path.read_text(encoding="utf-8")).items()} if path.exists() else {}
    )
    table[capability] = entry
    lines = [f'  "{c}": {_rendered(table[c])}' for c in sorted(table)]
    beside = path.with_suffix(".json.new")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def _rendered(entry: Any, indent: int = 2) -> str:
    """JSON with a line for each configuration."""
    if isinstance(entry, dict) and all(isinstance(value, int) for value in entry.values()):
        return json.dumps(entry)
    before, after = "\n" + " " * (indent + 2), "\n" + " " * indent
    if isinstance(entry, list):
        return f"[{before}" + f",{before}".join(_rendered(e) for e in entry) + f"{after}]"
    inner = [f'"{key}": {_rendered(value, indent + 2)}' for key, value in entry.items()]
    return f"{{{before}" + f",{before}".join(inner) + f"{after}}}"
