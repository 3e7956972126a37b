"""Launch configurations tuned per compute capability (configs/*.json), and launches with them."""

import functools
import json
import os
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor


def interpreted(tensor: Tensor) -> bool:
    """Whether Triton's interpreter runs a kernel on ``tensor``."""
    return tensor.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"


def capability_of(tensor: Tensor) -> int:
    """10·major + minor of the tensor's device; 0 for the interpreter."""
    if interpreted(tensor):
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@functools.cache
def _listed(op: str) -> dict[int, Any]:
    text = (files(__package__) / "configs" / f"{op}.json").read_text(encoding="utf-8")
    return {int(capability): found for capability, found in json.loads(text).items()}


def replace(op: str, capability: int, entry: Any) -> None:
    """Launch ``op`` on devices of ``capability`` with another entry, in this process."""
    _listed(op)[capability] = entry


def tuned(op: str, capability: int) -> Any:
    """What configs/``op``.json lists for a compute capability, or else for the newest before it, or else the oldest."""
    listed = _listed(op)
    return listed[max((c for c in listed if c <= capability), default=min(listed))]


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **settings: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on the device and current stream of ``like``."""
    if programs == 0:
        return
    if interpreted(like):
        kernel[(programs,)](*args, **settings)
        return
    with torch.cuda.device(like.device):
        kernel[(programs,)](*args, **settings)
