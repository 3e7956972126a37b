"""modafill's ops beside their rivals: checked against the float64 reference, then timed in turns in one process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from modafill.benchmarks import cases, compare, page, report
from modafill.benchmarks.runner import run_case

__all__ = ["run", "write_report"]

SECONDS_PER_ROW = 0.5
QUICK_SECONDS_PER_ROW = 0.02


def run(
    suite: str,
    *,
    json_path: Path | None = None,
    out: Path | None = None,
    against: str | None = None,
    threads: list[int] | None = None,
    device: str = "cpu",
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Time a suite and return what its file holds, ``{"machine": {…}, "rows": […]}``.

    Args:
        suite: a name of :data:`modafill.benchmarks.cases.SUITES`, or ``"all"``.
        json_path: where to write the result; it is replaced after each case, in one move.
        out: folder for a file of each suite, replaced in the same way, and at the end ``report.html`` of all files
            there. It or ``json_path``, not both.
        against: what to compare with at the end; see :func:`modafill.benchmarks.compare.earlier`.
        threads: CPU thread counts, each a pass of its own; None = one and :func:`torch.get_num_threads`. A GPU is timed
            once.
        device: ``"cpu"`` or ``"cuda"``, with an index if wanted.
        quick: tiny shapes, few repetitions and no compilation: a test of the benchmark, not of speed.
        progress: show a bar and what is left out on standard error, and the tables on standard output.

    Raises:
        ValueError: no such suite or device, a thread count below 1, a ``json_path`` or ``out`` that is no place for a
            file or folder, both of them, nothing at ``against``, or something else than results in ``out``.
    """
    if json_path is not None and out is not None:
        raise ValueError(f"json: got {str(json_path)!r} beside out {str(out)!r}, expected one of them")
    if json_path is not None and json_path.is_dir():
        raise ValueError(f"json: got {str(json_path)!r}, a folder, expected a file")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"out: got {str(out)!r}, a file, expected a folder")
    where = _device(device)
    if threads is None:
        threads = sorted({1, torch.get_num_threads()})
    if not threads or min(threads) < 1:
        raise ValueError(f"threads: got {threads}, expected counts of at least 1")
    if where.type != "cpu":
        threads = [torch.get_num_threads()]
    plan = cases.Plan(where, threads, quick)
    names = list(cases.SUITES) if suite == "all" else [suite]
    chosen = {name: cases.select(name, plan) for name in names}
    then = None
    if against is not None:
        place = (out, None) if json_path is None else (json_path.parent, json_path.name)
        then = compare.earlier(against, *place)
    if out is not None:
        # What the page will show too has to be readable before hours are spent.
        report.read_folder(out, without=names)
        out.mkdir(parents=True, exist_ok=True)
    machine = report.machine(where)
    whole: dict[str, Any] = {"machine": {**machine, "left_out": []}, "rows": []}
    with Progress(console=Console(stderr=True), disable=not progress) as bar:

        def notice(text: str, result: dict[str, Any]) -> None:
            if progress and text not in whole["machine"]["left_out"]:
                bar.console.print(text)
            for kept in (whole, result):
                if text not in kept["machine"]["left_out"]:
                    kept["machine"]["left_out"].append(text)

        task = bar.add_task(suite, total=sum(map(len, chosen.values())))
        for name, selected in chosen.items():
            result: dict[str, Any] = {"machine": {**machine, "left_out": []}, "rows": []}
            for case in selected:
                bar.update(task, description=f"{case.op} {case.mode} {list(case.shape)} ×{case.threads}")
                seconds = QUICK_SECONDS_PER_ROW if quick else SECONDS_PER_ROW
                rows = run_case(case, seconds=seconds, notice=partial(notice, result=result))
                whole["rows"] += rows
                result["rows"] += rows
                if json_path is not None:
                    report.write_json(whole, json_path)
                if out is not None:
                    report.write_json(result, out / f"{name}.json")
                bar.advance(task)
    if progress:
        report.print_report(whole)
    _finish({suite: whole} if out is None else report.read_folder(out), out, then, progress)
    return whole


def write_report(folder: Path, *, against: str | None = None, progress: bool = True) -> None:
    """Make ``report.html`` of all results in ``folder``; nothing is timed.

    Args:
        folder: with ``.json`` files of :func:`run`.
        against: what to compare with; see :func:`modafill.benchmarks.compare.earlier`.
        progress: print what changed and where the report is.

    Raises:
        ValueError: no result in ``folder``, or something else than results, or nothing at ``against``.
    """
    results = report.read_folder(folder)
    if not results:
        raise ValueError(f"report: got {str(folder)!r}, expected a folder with results of modafill bench (.json)")
    _finish(results, folder, None if against is None else compare.earlier(against, folder), progress)


def _finish(
    results: Mapping[str, report.Result], folder: Path | None, then: compare.Earlier | None, progress: bool
) -> None:
    comparison = None if then is None else compare.compare(results, then)
    if progress and comparison is not None:
        compare.print_comparison(comparison)
    if folder is not None:
        path = folder / "report.html"
        page.write_page(path, folder.resolve().name, results, comparison)
        if progress:
            Console().print(escape(f"wrote {path}"), highlight=False, soft_wrap=True)


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
