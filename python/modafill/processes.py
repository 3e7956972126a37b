"""Processes of one machine: a pool of fresh ones, and locks between them."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState


@contextmanager
def holding(lock: Path, busy: str) -> Iterator[None]:
    """Hold the file ``lock``; ValueError ``busy`` if another process does. The system lets go when this one dies."""
    with open(lock, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have taken the file away.
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError
        except BlockingIOError as error:
            raise ValueError(busy) from error
        yield


@contextmanager
def worker_pool(jobs: int, given: Any = None) -> Iterator[futures.ProcessPoolExecutor | None]:
    """A pool of ``jobs`` fresh processes that share torch's threads; None for one job, for the caller to do itself.

    After an error nothing new begins. ``given`` is what :func:`given` returns in the workers.

    Raises:
        ValueError: less than one job.
        ChildProcessError: a process died; what other processes finished stays.
    """
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected at least 1")
    if jobs == 1:
        yield None
        return
    pool = futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _start_worker, (given, threads_of_each(jobs), os.getpid())
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died (killed, or out of memory); the same command goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_of_each(jobs: int) -> int:
    """Torch's threads of this process, shared among ``jobs``."""
    return max(1, torch.get_num_threads() // jobs)


def world_size() -> int:
    """How many processes torchrun or ``accelerate launch`` began, of which this is one.

    Raises:
        ValueError: SLURM began several, which do not know each other; or ``WORLD_SIZE`` is no number of processes.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS: got {tasks} processes that do not know each other, expected torchrun in each (srun "
            "--ntasks-per-node=1 torchrun …), or WORLD_SIZE=1 where each is to work for itself"
        )
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"WORLD_SIZE: got {size!r}, expected a number of processes, as torchrun sets it")
    return int(size)


def check_alone() -> None:
    """Raise ValueError where torchrun or ``accelerate launch`` began several processes for what one does."""
    if (world := world_size()) > 1:
        raise ValueError(f"WORLD_SIZE: got {world} processes, expected one: this is not shared among them")


def join_processes(cpu: bool) -> PartialState:
    """Make this process known to the others that torchrun or ``accelerate launch`` began.

    They wait for each other for days if need be: one may read all data meanwhile. Where the caller has made the state
    of accelerate before, its timeout stays.

    Raises:
        ValueError: a variable that tells them apart is not set.
    """
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ValueError(
            f"WORLD_SIZE: got {world_size()} processes, but {', '.join(absent)} is not set; begin them with torchrun"
        )
    return PartialState(cpu=cpu, timeout=timedelta(days=30))


_PR_SET_PDEATHSIG = 1
_GIVEN: Any = None
_PARENT = 0


def _start_worker(given: Any, threads: int, parent: int) -> None:
    global _GIVEN, _PARENT
    _GIVEN, _PARENT = given, parent
    if sys.platform == "linux":
        # It dies with its parent, so that what it writes cannot meet the next call's.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    stop_if_orphaned()  # while it started
    torch.set_num_threads(threads)


def given() -> Any:
    """In a worker: what its pool was opened with."""
    return _GIVEN


def stop_if_orphaned() -> None:
    """In a worker: end where the process that began it was killed, which leaves its workers behind."""
    if os.getppid() != _PARENT:
        os._exit(1)
