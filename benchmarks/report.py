"""What a benchmark run leaves behind: the machine it ran on, the JSON file and the table."""

from __future__ import annotations

import filecmp
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import modafill
from modafill import ops
from modafill.benchmarks.rivals import last_level_cache
from modafill.benchmarks.runner import ROOFLINES
from modafill.ops.backends import _C, OPS, native_build


def machine(device: torch.device) -> dict[str, Any]:
    """Everything about this machine and these versions that a reader of the figures needs."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instruction_set": native_build()["cpu_isa"],
        "instruction_set_of_torch": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "modafill": modafill.__version__,
        "dispatch": {op: ops.explain(op, device=device).backend for op in OPS},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write ``result`` beside ``path``, then rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def speed_up(row: Mapping[str, Any], rival: Mapping[str, Any] | None) -> float | None:
    """Median time of ``rival`` over that of ``row``; None unless both are correct."""
    if rival is None or not (row["correct"] and rival["correct"]):
        return None
    return rival["p50_ms"] / row["p50_ms"]


def is_ours(row: Mapping[str, Any]) -> bool:
    """Whether the row's provider is one of modafill's."""
    return row["provider"] == "modafill" or row["provider"].startswith("modafill-")


def print_report(result: Mapping[str, Any], console: Console | None = None) -> None:
    """A table per case: median times, bandwidth, its fraction of the roofline, and the speed-ups of correct rows.

    ``× rival`` is over the fastest correct rival, ``× paper`` over eager as the paper writes it, where that was timed.
    """
    console = console or Console()
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        shape = "×".join(map(str, row["shape"]))
        plural = "" if row["threads"] == 1 else "s"
        threads = "" if row["device"] == "cuda" else f", {row['threads']} thread{plural}"
        groups.setdefault(f"{row['op']} ({row['mode']}), {shape} {row['dtype']}{threads}", []).append(row)
    for title, rows in groups.items():
        console.print(_table(title, rows))
    described = [str(result["machine"][key]) for key in ("cpu", "gpu", "instruction_set") if result["machine"][key]]
    console.print(f"{', '.join(described)}; torch {result['machine']['torch']}")


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    # With the padding of both neighbours between columns the widest table is cut at 80 characters.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("provider", no_wrap=True)
    rivals = [row for row in rows if not is_ours(row) and row["provider"] not in ROOFLINES and row["correct"]]
    fastest = min(rivals, key=lambda row: row["p50_ms"], default=None)
    paper = next((row for row in rivals if row["provider"] == "eager-paper"), None)
    work = "GFLOP/s" if any(row["gflop_per_s"] for row in rows) else "GB/s"
    for heading in ("ms", "20–80 %", work, "roofline", "× rival", *(["× paper"] if paper else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        measured = row["provider"] not in ROOFLINES
        table.add_row(
            row["provider"] if row["correct"] else f"{row['provider']} WRONG",
            _three_digits(row["p50_ms"]),
            f"{_three_digits(row['p20_ms'])}–{_three_digits(row['p80_ms'])}",
            _rate(row["gflop_per_s"] if work == "GFLOP/s" else row["gb_per_s"]),
            "" if row["roofline_fraction"] is None else f"{row['roofline_fraction']:.2f}",
            _ratio(speed_up(row, fastest)) if is_ours(row) else "",
            *([_ratio(speed_up(row, paper)) if measured else ""] if paper else []),
            style=None if row["correct"] else "red",
        )
    return table


def _rate(value: float | None) -> str:
    return "" if value is None or value < 0.05 else f"{value:.1f}"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 3 - len(str(int(value))) + (value < 1))}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(command) or "").split("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Commit of the checkout that the package lies in, if it lies in one of modafill's.

    ``dirty``: tracked files differ from it, or the installed Python files from those of the checkout, or a source of
    the extension is younger than the extension.
    """
    package = Path(modafill.__file__).parent
    top = _output(["git", "-C", str(package), "rev-parse", "--show-toplevel"])
    if not top or not (Path(top) / "python" / "modafill" / "ops").is_dir():
        return None
    folders = {"python/modafill": package, "kernels": package / "kernels", "benchmarks": package / "benchmarks"}
    stale = any(
        not (installed / name).is_file() or not filecmp.cmp(Path(top) / source / name, installed / name, shallow=False)
        for source, installed in folders.items()
        if installed.is_dir()
        for name in (path.relative_to(Path(top) / source) for path in (Path(top) / source).rglob("*.py"))
    )
    if _C is not None:
        built = Path(_C.__file__).stat().st_mtime
        stale |= any(path.stat().st_mtime > built for path in (Path(top) / "csrc").rglob("*") if path.is_file())
    changed = _output(["git", "-C", top, "status", "--porcelain", "--untracked-files=no"])
    return {"id": _output(["git", "-C", top, "rev-parse", "HEAD"]), "dirty": bool(changed) or stale}


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
