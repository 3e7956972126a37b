"""modafill's ops beside their rivals: checked against the float64 reference, then timed in turns in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from modafill.benchmarks import cases, report
from modafill.benchmarks.runner import run_case

__all__ = ["run"]

SECONDS_PER_ROW = 0.5
QUICK_SECONDS_PER_ROW = 0.02


def run(
    suite: str,
    *,
    json_path: Path | None = None,
    threads: list[int] | None = None,
    device: str = "cpu",
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Time a suite and return what its file holds, ``{"machine": {…}, "rows": […]}``.

    Args:
        suite: a name of :data:`modafill.benchmarks.cases.SUITES`, or ``"all"``.
        json_path: where to write the result; it is replaced after each case, in one move.
        threads: CPU thread counts, each a pass of its own; None = one and :func:`torch.get_num_threads`. A GPU is timed
            once.
        device: ``"cpu"`` or ``"cuda"``, with an index if wanted.
        quick: tiny shapes, few repetitions and no compilation: a test of the benchmark, not of speed.
        progress: show a bar and what is left out on standard error, and the table on standard output.

    Raises:
        ValueError: no such suite or device, a thread count below 1, or a ``json_path`` that is no place for a file.
    """
    if json_path is not None and json_path.is_dir():
        raise ValueError(f"json: got {str(json_path)!r}, a folder, expected a file")
    where = _device(device)
    if threads is None:
        threads = sorted({1, torch.get_num_threads()})
    if not threads or min(threads) < 1:
        raise ValueError(f"threads: got {threads}, expected counts of at least 1")
    if where.type != "cpu":
        threads = [torch.get_num_threads()]
    selected = cases.select(suite, cases.Plan(where, threads, quick))
    notices: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"machine": {**report.machine(where), "left_out": []}, "rows": rows}
    with Progress(console=Console(stderr=True), disable=not progress) as bar:

        def notice(text: str) -> None:
            if progress and text not in notices:
                bar.console.print(text)
            notices[text] = None

        task = bar.add_task(suite, total=len(selected))
        for case in selected:
            bar.update(task, description=f"{case.op} {case.mode} {list(case.shape)} ×{case.threads}")
            rows += run_case(case, seconds=QUICK_SECONDS_PER_ROW if quick else SECONDS_PER_ROW, notice=notice)
            result["machine"]["left_out"] = list(notices)
            if json_path is not None:
                report.write_json(result, json_path)
            bar.advance(task)
    if progress:
        report.print_report(result)
    return result


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device
