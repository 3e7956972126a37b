"""What a benchmark run leaves behind: the machine it ran on, the JSON file and the table."""

from __future__ import annotations

import filecmp
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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

Row = Mapping[str, Any]
# {"machine": {…}, "rows": […]}
Result = Mapping[str, Any]

# Rows that are compared with each other, and cases that differ in nothing but the shape.
CASE = ("op", "mode", "shape", "dtype", "device", "threads")
SERIES = ("op", "mode", "dtype", "device", "threads")

_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("op", "mode", "dtype", "device", "provider"), str),
    **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "gb_per_s"), (int, float)),
    "shape": list,
    "threads": int,
    "correct": bool,
}


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


def read_result(path: Path) -> Result:
    """What :func:`write_json` wrote to ``path``.

    Raises:
        ValueError: something else lies there.
    """
    return parse_result(path.read_bytes(), str(path))


def parse_result(text: bytes, name: str) -> Result:
    """The result that ``text`` holds; ``name`` is what an error calls it."""
    try:
        result = json.loads(text)
        is_result = isinstance(result["machine"], dict) and all(
            isinstance(row[field], kind) for row in result["rows"] for field, kind in _FIELDS.items()
        )
    except (ValueError, LookupError, TypeError):
        is_result = False
    if not is_result:
        raise ValueError(f"{name}: got something else, expected a result of modafill bench")
    return result


def read_folder(folder: Path, without: Collection[str] = ()) -> dict[str, Result]:
    """The results in ``folder``, by the names of their files without ``.json``, but those of the names ``without``."""
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json")) if path.stem not in without}


def group(rows: Iterable[Row], fields: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that agree in ``fields``, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row, fields), []).append(row)
    return groups


def key(row: Row, fields: Sequence[str]) -> tuple[Any, ...]:
    """The row's values of ``fields``, to be looked up by; threads are those of a CPU."""
    threads = None if row["device"] == "cuda" else row["threads"]
    values = {**row, "shape": tuple(row["shape"]), "threads": threads}
    return tuple(values[field] for field in fields)


def title(row: Row, shape: str | None = None) -> str:
    """Op, mode, shape if it is given, dtype and where it ran."""
    where = f"{row['threads']} thread{'s' * (row['threads'] != 1)}" if row["device"] == "cpu" else row["device"]
    return f"{row['op']} ({row['mode']}), {f'{shape} ' if shape else ''}{row['dtype']}, {where}"


def shape_text(shape: Sequence[int]) -> str:
    """``64×3×256``."""
    return "×".join(map(str, shape))


def speed_up(row: Row | None, rival: Row | None) -> float | None:
    """Median time of ``rival`` over that of ``row``; None unless both are there and correct."""
    if row is None or rival is None or not (row["correct"] and rival["correct"]):
        return None
    return rival["p50_ms"] / row["p50_ms"]


def is_ours(row: Row) -> bool:
    """Whether the row's provider is one of modafill's."""
    return row["provider"] == "modafill" or row["provider"].startswith("modafill-")


def is_rival(row: Row) -> bool:
    """Whether the row is somebody else's way to do what modafill does; a roofline is not."""
    return not is_ours(row) and row["provider"] not in ROOFLINES


def provider(rows: Sequence[Row], name: str) -> Row | None:
    """The row of that provider in a case, if there is one."""
    return next((row for row in rows if row["provider"] == name), None)


def fastest_rival(rows: Sequence[Row], ours: Row | None) -> Row | None:
    """The fastest correct rival of a case that does the same work as ``ours`` in its precision or a higher one."""
    rivals = (row for row in rows if is_rival(row) and row["correct"] and comparable(ours, row))
    return min(rivals, key=lambda row: row["p50_ms"], default=None)


def comparable(ours: Row | None, rival: Row) -> bool:
    """Whether a ratio of their times says which is faster: as exact a rival, and the same network."""
    return ours is not None and not ours.get("another_network") and _digits(rival) >= _digits(ours)


def _digits(row: Row) -> float:
    """Of what products are rounded to, where a provider chooses that itself."""
    dtype = getattr(torch, row.get("precision", row["dtype"]))
    return -torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def columns(rows: Sequence[Row]) -> dict[str, Callable[[Row, Sequence[Row]], str]]:
    """What a table of ``rows`` shows: by heading, the text of a cell from its row and the rows of its case.

    ``× rival`` is over the fastest correct rival, ``× paper`` over eager as the paper writes it, where that was timed.
    """
    by_flops = any(row.get("gflop_per_s") for row in rows)
    shown: dict[str, Callable[[Row, Sequence[Row]], str]] = {
        "provider": lambda row, case: row["provider"] if row["correct"] else f"{row['provider']} WRONG",
        "ms": lambda row, case: three_digits(row["p50_ms"]),
        "20–80 %": lambda row, case: f"{three_digits(row['p20_ms'])}–{three_digits(row['p80_ms'])}",
        "GFLOP/s" if by_flops else "GB/s": lambda row, case: _rate(row["gflop_per_s" if by_flops else "gb_per_s"]),
        "roofline": lambda row, case: ratio(row.get("roofline_fraction") if row["correct"] else None),
        "× rival": lambda row, case: ratio(speed_up(row, fastest_rival(case, row))) if is_ours(row) else "",
    }
    if any(row.get("another_network") for row in rows):
        shown["evaluations"] = lambda row, case: str(row.get("network_evaluations", ""))
    if any(row["provider"] == "eager-paper" and row["correct"] for row in rows):
        shown["× paper"] = lambda row, case: (
            "" if row["provider"] in ROOFLINES else ratio(speed_up(row, provider(case, "eager-paper")))
        )
    return shown


def print_report(result: Mapping[str, Any], console: Console | None = None) -> None:
    """A table per case: median times, bandwidth, its fraction of the roofline, and the speed-ups of correct rows."""
    console = console or Console()
    for case in group(result["rows"], CASE).values():
        # With the padding of both neighbours between columns the widest table is cut at 80 characters.
        table = Table(
            title=title(case[0], shape_text(case[0]["shape"])),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        shown = columns(case)
        for heading in shown:
            table.add_column(heading, justify="left" if heading == "provider" else "right", no_wrap=True)
        for row in case:
            table.add_row(*(cell(row, case) for cell in shown.values()), style=None if row["correct"] else "red")
        console.print(table)
    described = [str(result["machine"][name]) for name in ("cpu", "gpu", "instruction_set") if result["machine"][name]]
    console.print(f"{', '.join(described)}; torch {result['machine']['torch']}")


def three_digits(value: float) -> str:
    """Three significant digits of what is at least one, and three behind the point of what is less."""
    return f"{value:.{max(0, 3 - len(str(int(value))) + (value < 1))}f}"


def ratio(value: float | None) -> str:
    """Two digits behind the point; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def _rate(value: float | None) -> str:
    return "" if value is None or value < 0.05 else f"{value:.1f}"


def commit_text(machine: Mapping[str, Any]) -> str:
    """The first digits of the machine's commit, and whether what ran was another state."""
    commit = machine.get("commit")
    return f"{str(commit['id'])[:12]}{', changed' if commit['dirty'] else ''}" if commit else "unknown"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (output(command) or "").split("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Commit of the checkout that the package lies in, if it lies in one of modafill's.

    ``dirty``: tracked files differ from it, or the installed Python files (no tests among them) from those of the
    checkout, or a source of the extension is younger than the extension.
    """
    package = Path(modafill.__file__).parent
    top = output(["git", "-C", str(package), "rev-parse", "--show-toplevel"])
    if not top or not (Path(top) / "python" / "modafill" / "ops").is_dir():
        return None
    folders = {"python/modafill": package, "kernels": package / "kernels", "benchmarks": package / "benchmarks"}
    stale = any(
        not (installed / name).is_file() or not filecmp.cmp(Path(top) / source / name, installed / name, shallow=False)
        for source, installed in folders.items()
        if installed.is_dir()
        for name in (path.relative_to(Path(top) / source) for path in (Path(top) / source).rglob("*.py"))
        if not name.name.startswith("test_")
    )
    if _C is not None:
        built = Path(_C.__file__).stat().st_mtime
        stale |= any(path.stat().st_mtime > built for path in (Path(top) / "csrc").rglob("*") if path.is_file())
    changed = output(["git", "-C", top, "status", "--porcelain", "--untracked-files=no"])
    return {"id": output(["git", "-C", top, "rev-parse", "HEAD"]), "dirty": bool(changed) or stale}


def output(command: Sequence[str]) -> str | None:
    """What ``command`` prints, without white space around it; None where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
