"""Stores in; completed stores, tables or folders of shards out."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from modafill.bulk.engines import ENGINES
from modafill.bulk.plan import Plan, folder_beside, identify
from modafill.bulk.rows import check_store, rows_at_a_time, through
from modafill.bulk.shards import WRITERS, Job
from modafill.data import FeatureStore
from modafill.errors import require
from modafill.files import replacing
from modafill.imputer import ModalityImputer
from modafill.processes import threads_of_each, using_threads, world_size

SHARD_ROWS = 65536
_FEWEST_SHARDS = 256


def impute_store(
    imputer: ModalityImputer,
    store: FeatureStore,
    out: str | Path,
    *,
    n_samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    shard_rows: int | None = None,
    shard_format: str | None = None,
    engine: str = "local",
    workers: int = 1,
    threads: int | None = None,
) -> Iterator[int]:
    """Write completed embeddings, what was generated marked; yields the rows done so far, and works as it is read.

    What is written appears at ``out`` when the last row is done, or not at all. Labels, groups, splits and ids come
    along. Shards are made in the folder ``.NAME.shards`` beside ``out``, a file for each: the same call after a process
    died begins behind those that were finished, and ends with the same bytes. Where memory runs out, a worker goes on
    with half as many rows at a time, which is logged; the last digits may then differ.

    Several ``workers`` of ``"local"`` are fresh processes, which import the main module: in a script the call belongs
    under ``if __name__ == "__main__":``. On Linux they end with the thread that began them, so read this in one that
    lives until the last row.

    Args:
        imputer: whose device does the work.
        store: what to complete, as the model reads it (:meth:`FeatureStore.windowed`).
        out: a name that ends in ``.h5`` becomes a store, in ``.parquet`` a table, any other a folder of shards with
            ``_manifest.json`` (rows and SHA-256 of each).
        n_samples: K completions per row, averaged.
        seed: the noise of a row depends on it and the row number alone.
        batch_size: rows that are completed at a time; None = as many as keep K completions within half a gigabyte.
        shard_rows: rows of a shard, rounded up to whole batches. None = 65,536, and where several work, no more than a
            256th of all.
        shard_format: of a folder, ``"h5"`` (the default) or ``"parquet"``.
        engine: ``"local"``, ``"torchrun"`` (every process that it started calls this) or ``"ray"``.
        workers: processes of ``"local"`` (1 = this one) or of ``"ray"``.
        threads: of each worker; None = those of this process, shared among them. With ``"torchrun"`` they are set by
            ``OMP_NUM_THREADS``.

    Raises:
        ValueError: a store that the model cannot read, no such engine or format, a worker that would write other bits,
            or shards of another call in the way.
        FileExistsError: ``out`` is there.
        MissingExtra: pyarrow or Ray is not installed.
        OutOfMemory: a single row does not fit.
        ChildProcessError: a worker died; the same call goes on.
    """
    out = Path(out).absolute()
    _check(imputer, store, out, batch_size, shard_rows, shard_format, engine, workers, threads)
    size = batch_size or rows_at_a_time(imputer, n_samples)
    alone = engine == "local" and workers == 1
    if shard_rows is None:
        shard_rows = SHARD_ROWS if alone else min(SHARD_ROWS, -(-len(store) // _FEWEST_SHARDS))
    one_file = out.suffix in WRITERS
    plan = Plan(
        folder=folder_beside(out),
        rows=len(store),
        shard_rows=-(-shard_rows // size) * size,
        batch_size=size,
        n_samples=n_samples,
        seed=seed,
        suffix=".h5" if one_file else f".{shard_format or 'h5'}",
    )
    job = Job(imputer, store, plan)
    if engine == "torchrun":
        yield from _together(job, out, one_file)
        return
    threads = threads or threads_of_each(workers)
    with using_threads(threads) if alone else nullcontext():
        job = replace(job, plan=replace(plan, identity=identify(imputer, store, threads)))
        with job.plan.claimed():
            _check_new(out)  # another call may have made it in the meantime
            finished = job.plan.finished()
            todo = [shard for shard in job.plan.shards if shard not in finished]
            yield from _work(job, todo, engine, workers)
            _finish(job, out, one_file)


def _check(
    imputer: ModalityImputer,
    store: FeatureStore,
    out: Path,
    batch_size: int | None,
    shard_rows: int | None,
    shard_format: str | None,
    engine: str,
    workers: int,
    threads: int | None,
) -> None:
    """Raise for what :func:`impute_store` cannot do, before anything is done."""
    check_store(imputer, store)
    _check_new(out)
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, expected one of {', '.join(ENGINES)}")
    numbers = {"batch_size": batch_size, "shard_rows": shard_rows, "workers": workers, "threads": threads}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if workers > 1 and engine == "torchrun":
        raise ValueError(f"workers: got {workers}, expected 1: torchrun starts them (--nproc-per-node)")
    if threads is not None and engine == "torchrun":
        raise ValueError(f"threads: got {threads}, expected None: with torchrun they are set by OMP_NUM_THREADS")
    if workers > 1 and engine == "local" and next(imputer.parameters()).device.type == "cuda":
        raise ValueError(f"workers: got {workers}, expected 1 on a GPU; torchrun starts a process for each")
    world = world_size()
    if world > 1 and engine != "torchrun":
        raise ValueError(f"engine: got {engine!r}, expected torchrun where it started {world} processes (WORLD_SIZE)")
    if shard_format is not None and out.suffix in WRITERS:
        raise ValueError(f"shard_format: got {shard_format!r}, expected None for the single file {out.name}")
    if f".{shard_format or 'h5'}" not in WRITERS:
        raise ValueError(f"shard_format: got {shard_format!r}, expected h5 or parquet")
    if "parquet" in (out.suffix[1:], shard_format):
        require("pyarrow.parquet", "scale", "a Parquet table")
    if engine == "ray":
        require("ray.data", "scale", "the engine ray")


def _check_new(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out}: exists already; remove it or choose another name")


def _work(job: Job, todo: list[range], engine: str, workers: int) -> Iterator[int]:
    done = job.plan.rows - sum(map(len, todo))
    if done:
        yield done
    if todo:
        yield from ENGINES[engine](job, todo, done, workers)


def _finish(job: Job, out: Path, one_file: bool) -> None:
    if one_file:
        job.merge(out)
    else:
        job.plan.publish(out)
    shutil.rmtree(job.plan.folder)


def _together(job: Job, out: Path, one_file: bool) -> Iterator[int]:
    """All processes of torchrun; the first one decides what is left, and puts it together."""
    # Who is done first waits for the others, days if need be. It may change the number of threads.
    state = PartialState(cpu=next(job.imputer.parameters()).device.type == "cpu", timeout=timedelta(days=30))
    world = world_size()
    if state.num_processes != world:
        raise ValueError(f"engine: torchrun started {world} processes, but accelerate knows {state.num_processes}")
    identity = identify(job.imputer, job.store, torch.get_num_threads())
    job = replace(job, plan=replace(job.plan, identity=identity))
    with job.plan.claimed() if state.is_main_process else nullcontext():
        told: list[Any] = [None, None]
        if state.is_main_process:
            _check_new(out)
            finished = job.plan.finished()
            told = [job.plan.call, [shard for shard in job.plan.shards if shard not in finished]]
        call, todo = broadcast_object_list(told)
        job.check(call)
        yield from _work(job, todo, "torchrun", 1)
        state.wait_for_everyone()
        if state.is_main_process:
            _finish(job, out, one_file)
        state.wait_for_everyone()


def recognise_store(
    imputer: ModalityImputer,
    store: FeatureStore,
    out: Path,
    *,
    n_samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
) -> Iterator[int]:
    """Write a CSV file of ``id`` with the likeliest class and the probability of each, or the score.

    Yields the rows done so far, ``batch_size`` at a time, as :func:`impute_store`.

    The file appears at ``out`` when the last row is written, or not at all.
    """
    check_store(imputer, store)
    with replacing(out) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        classes = imputer.classes
        writer.writerow(["id", "class", *(f"p({name})" for name in classes)] if classes else ["id", "score"])
        size = batch_size or rows_at_a_time(imputer, n_samples)
        answers = through(
            imputer,
            store,
            range(len(store)),
            size,
            lambda batch: imputer.model.recognise(batch, n_samples=n_samples, seed=seed, sampling=imputer.sampling),
        )
        for rows, found in answers:
            said = found.cpu()
            for name, row in zip(store.ids(rows), said.view(len(rows), -1), strict=True):
                best = [classes[int(row.argmax())]] if classes else []
                writer.writerow([name, *best, *(f"{value:.6g}" for value in row.tolist())])
            yield int(rows[-1]) + 1
