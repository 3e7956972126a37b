"""What this installation is and what it would run: the facts behind ``modafill info`` and a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from modafill import __version__
from modafill.ops import backends


def info() -> dict[str, Any]:
    """Versions, what the extension was built for, and the backend of each op for float32 here, as plain values.

    ``gpu`` is its name, or why there is none to run on.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    native = backends.native_build()
    return {
        "modafill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if gpu else _why_no_gpu(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if gpu else None,
        **native,
        "ops": {op: _choice(op, device) for op in backends.OPS},
    }


def _choice(op: str, device: torch.device) -> dict[str, Any]:
    try:
        choice = backends.explain(op, device=device)
    except backends.BackendError as error:
        return {"backend": "none", "reason": str(error), "rejected": {}}
    return {"backend": choice.backend, "reason": choice.reason, "rejected": choice.rejected}


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "none: this torch was built without CUDA; install one with it to use a GPU"
    return "none: torch sees no CUDA device"


def render(facts: dict[str, Any]) -> Table:
    """The facts of :func:`info` as a table for a terminal."""
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "ops":
            shown = {None: "–", True: "yes", False: "no"}.get(value) if isinstance(value, bool | None) else value
            table.add_row(name.replace("_", " "), escape(" ".join(shown) if isinstance(shown, list) else str(shown)))
    for op, choice in facts["ops"].items():
        table.add_row(op, f"[bold]{choice['backend']}[/bold]: {escape(choice['reason'])}")
        for backend, why in choice["rejected"].items():
            table.add_row("", f"[dim]not {backend}: {escape(why)}[/dim]")
    return table
