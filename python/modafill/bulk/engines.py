"""Who does the work of a plan: this process, several on this machine, those of torchrun, or a Ray cluster.

Each engine is a generator: from a job, the shards that are left, the rows that are done and the number of workers, it
yields the rows done so far.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

from accelerate import PartialState

from modafill.bulk.shards import Job
from modafill.processes import given, stop_if_orphaned, worker_pool

Engine = Callable[[Job, list[range], int, int], Iterator[int]]


def _local(job: Job, todo: list[range], done: int, workers: int) -> Iterator[int]:
    """This process, or ``workers`` processes of this machine."""
    if workers == 1:
        for shard in todo:
            yield from (done + rows for rows in job.write(shard))
            done += len(shard)
        return
    # Without a lock, which a worker that is killed might hold.
    stop = multiprocessing.get_context("spawn").RawValue("b", 0)
    with tempfile.TemporaryDirectory() as scratch:
        # Not through the pipe, at which this process would wait for ever for a worker that died before it read.
        packed = Path(scratch) / "job"
        packed.write_bytes(job.packed())
        yield from _pooled(job, todo, done, workers, (packed, stop))


def _pooled(job: Job, todo: list[range], done: int, workers: int, told: tuple[Path, Any]) -> Iterator[int]:
    with worker_pool(workers, told) as pool:
        assert pool is not None
        try:
            shards = {pool.submit(_write, shard): shard for shard in todo}
            for future in futures.as_completed(shards):
                future.result()
                done += len(shards[future])
                yield done
        except BaseException:
            told[1].value = 1
            raise


_JOB: Job | None = None


def _write(shard: range) -> None:
    global _JOB
    packed, stop = given()
    if _JOB is None:
        _JOB = Job.unpacked(packed.read_bytes(), "cpu")
    for _ in _JOB.write(shard):
        stop_if_orphaned()
        if stop.value:
            raise InterruptedError("stopped because another shard failed; the same command goes on")


def _torchrun(job: Job, todo: list[range], done: int, workers: int) -> Iterator[int]:
    """The shards of this process, one in ``WORLD_SIZE``."""
    state = PartialState()
    for shard in todo[state.process_index :: state.num_processes]:
        yield from (done + rows for rows in job.write(shard))
        done = sum(map(len, job.plan.finished()))


def _ray(job: Job, todo: list[range], done: int, workers: int) -> Iterator[int]:
    """Ray Data over a cluster, or over this machine if there is none; what a dead worker had begun another one does."""
    import ray

    device, threads = next(job.imputer.parameters()).device.type, job.plan.identity["threads"] or 1
    started = not ray.is_initialized()
    if started:
        here: dict[str, Any] = (
            {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * threads, "include_dashboard": False}
        )
        ray.init(log_to_driver=False, **here)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"start": shard.start, "stop": shard.stop} for shard in todo]
        written = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayWorker,
            fn_constructor_args=(job.packed(), device),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=1 if device == "cuda" else 0,
        )
        for batch in written.iter_batches(batch_size=1):
            done += int(batch["rows"][0])
            yield done
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ChildProcessError(f"ray: {reason}; the same command goes on") from error
    finally:
        if started:
            ray.shutdown()


class _RayWorker:
    def __init__(self, packed: bytes, device: str) -> None:
        self.job = Job.unpacked(packed, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            for _ in self.job.write(range(start, stop)):
                pass
        return {"rows": batch["stop"] - batch["start"]}


ENGINES: dict[str, Engine] = {"local": _local, "torchrun": _torchrun, "ray": _ray}
