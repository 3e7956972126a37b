"""Checks every provider against the oracle, then times them in turns; knows nothing of any op."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch

from modafill.processes import using_threads

ROOFLINES = ("triad", "copy", "matmul")

# A call shorter than this is timed several times a turn.
_SHORT_NS = 2_000_000
_LONGEST_BURST = 10
_MIN_ROUNDS, _MAX_ROUNDS = 5, 2000
# Of a contender whose calls are this long two are timed, without another to warm up; of one whose calls are this much
# longer, the one whose memory is measured.
_LONG_NS, _VERY_LONG_NS = 5_000_000_000, 60_000_000_000


class Unavailable(Exception):
    """A provider that cannot run here; its text is the reason, which is printed."""


@dataclass(frozen=True)
class Check:
    """Verdict of the gate: ``max_error`` is the largest |provider − float64 reference| over the compared elements."""

    correct: bool
    max_error: float


@dataclass(frozen=True)
class Contender:
    """A provider ready to be timed on one case.

    Attributes:
        run: makes one call on the buffer set of the given index and returns its result.
        check: the correctness gate, on set 0.
        traffic: bytes that one call has to move at least.
        flops: what it has to multiply and add at least, for ops whose roofline is the matrix rate.
        about: further fields of its row, known after the check.
    """

    run: Callable[[int], Any]
    check: Callable[[], Check]
    traffic: int
    about: Mapping[str, Any] = field(default_factory=dict)
    flops: int = 0


class Problem(Protocol):
    """The inputs of one case and who can work on them."""

    @property
    def sets(self) -> int:
        """How many buffer sets there are."""

    @property
    def builders(self) -> Mapping[str, Callable[[], Contender]]:
        """By provider name, what makes the contender; it compiles and warms up, and raises Unavailable."""


@dataclass(frozen=True)
class Case:
    """One group of rows: providers of one op at one size, to be compared with each other alone.

    Attributes:
        mode: ``"fresh"`` where each call allocates its result, ``"out"`` where it writes into a buffer that is reused.
        shape: of the op's main tensor, batch first.
        threads: ``torch.set_num_threads`` during the case.
        problem: allocates the inputs.
        quick: leave out what takes long to prepare.
        resident: measure the memory of a call on the CPU too, by the growth of the process's resident set.
    """

    op: str
    mode: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    threads: int
    problem: Callable[[Case], Problem]
    quick: bool = False
    resident: bool = False


def run_case(case: Case, *, seconds: float, notice: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """The rows of ``case``, spending about ``seconds`` of timed work on each; what is left out goes to ``notice``."""
    # Each case compiles the same functions anew; without this the eighth would fall back to eager.
    torch.compiler.reset()
    on_device = torch.cuda.device(case.device) if case.device.type == "cuda" else nullcontext()
    with using_threads(case.threads), torch.no_grad(), on_device:
        problem = case.problem(case)
        contenders: dict[str, Contender] = {}
        checks: dict[str, Check] = {}
        for name, build in problem.builders.items():
            try:
                contender = build()
                checks[name] = contender.check()
            except (Unavailable, torch.OutOfMemoryError) as reason:
                notice(f"{name} left out of {case.op}: {reason}")
            else:
                contenders[name] = contender
        timer = _CudaTimer(case.device, problem.sets) if case.device.type == "cuda" else _CpuTimer(problem.sets)
        peaks: dict[str, int | None] = {}
        trials: dict[str, int] = {}
        for name, contender in contenders.items():
            begun = time.perf_counter_ns()
            peaks[name] = _peak_memory(contender.run, case)
            if case.device.type == "cpu" and peaks[name] is not None:
                trials[name] = time.perf_counter_ns() - begun
        samples = measure({n: c.run for n, c in contenders.items()}, timer, seconds=seconds, trials=trials)
    quantiles = {name: _percentiles(times) for name, times in samples.items()}
    speed = {name: contenders[name].traffic / (quantiles[name][1] * 1e6) for name in contenders}
    rate = {name: contenders[name].flops / (quantiles[name][1] * 1e6) for name in contenders}
    bound = rate if any(rate.values()) else speed
    roofline = max((bound[name] for name in ROOFLINES if name in bound), default=None)

    def of_the_roofline(name: str) -> float | None:
        """None where the product that bounds it is of another precision."""
        same = contenders[name].about.get("precision", own) == own
        return bound[name] / roofline if roofline and same else None

    own = str(case.dtype).removeprefix("torch.")
    return [
        {
            "op": case.op,
            "mode": case.mode,
            "shape": list(case.shape),
            "batch": case.shape[0],
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": case.device.type,
            "threads": case.threads,
            "provider": name,
            "p20_ms": quantiles[name][0],
            "p50_ms": quantiles[name][1],
            "p80_ms": quantiles[name][2],
            "samples": len(samples[name]),
            "gb_per_s": speed[name],
            "gflop_per_s": rate[name] or None,
            "roofline_fraction": of_the_roofline(name),
            "peak_memory_bytes": peaks[name],
            "correct": checks[name].correct,
            "max_error": checks[name].max_error,
            **contenders[name].about,
        }
        for name in contenders
    ]


class Timer(Protocol):
    """Times calls of one contender, each on the next buffer set."""

    def __call__(self, run: Callable[[int], Any], calls: int, warm_up: bool = True) -> list[int]:
        """Nanoseconds of each of ``calls`` calls, after an untimed one if they ``warm_up``.

        That one wakes the worker threads and, where results are allocated afresh, brings their pages back from a host
        that takes free memory away between turns, as virtual machines do: what is timed is a call in a loop.
        """


def measure(
    runs: Mapping[str, Callable[[int], Any]],
    timer: Timer,
    *,
    seconds: float,
    trials: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, list[int]]:
    """Nanoseconds of each call, by name; ``trials`` are those of a first call, where there was one.

    The contenders take turns, and each round starts with the next one, so that a drift of the machine's clock or load
    meets all of them. Rounds go on until ``seconds`` have passed for each contender.
    """
    first_calls = {name: trials[name] if name in trials else timer(run, 1)[0] for name, run in runs.items()}
    bursts = {name: _burst(trial) for name, trial in first_calls.items()}
    samples: dict[str, list[int]] = {name: [] for name in runs}
    # Rounds that a contender takes part in.
    rounds = dict.fromkeys(runs, _MAX_ROUNDS)
    for name, trial in first_calls.items():
        if trial >= _VERY_LONG_NS:
            samples[name], rounds[name] = [trial], 0
        elif trial >= _LONG_NS:
            # A first call that somebody else made had no warm-up.
            samples[name], rounds[name] = ([], 2) if name in trials else ([trial], 1)
    names: Sequence[str] = list(runs)
    deadline = time.perf_counter() + seconds * len(names)
    for index in range(_MAX_ROUNDS):
        if index >= _MIN_ROUNDS and time.perf_counter() > deadline:
            break
        first = index % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            if index < rounds[name]:
                samples[name] += timer(runs[name], bursts[name], rounds[name] == _MAX_ROUNDS)
    return samples


def _burst(trial: int) -> int:
    return max(1, min(_LONGEST_BURST, _SHORT_NS // max(1, trial)))


class _CpuTimer:
    """Wall-clock time of each call.

    Every call, of whichever contender, takes the next buffer set; the sets together are at least twice the last-level
    cache, so that inputs come from memory at every size. The result is freed after the clock is read.
    """

    def __init__(self, sets: int) -> None:
        self._sets = sets
        self._next = 0

    def __call__(self, run: Callable[[int], Any], calls: int, warm_up: bool = True) -> list[int]:
        if warm_up:
            run(self._advance())
        times = []
        for _ in range(calls):
            index = self._advance()
            start = time.perf_counter_ns()
            result = run(index)
            times.append(time.perf_counter_ns() - start)
            del result
        return times

    def _advance(self) -> int:
        self._next = (self._next + 1) % self._sets
        return self._next


class _CudaTimer:
    """Time between CUDA events around each call.

    A buffer of twice the L2 cache is zeroed before each call: it empties the cache, and gives the host time to queue
    the call, so that what is measured is the device's time and not the launch from Python.
    """

    def __init__(self, device: torch.device, sets: int) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)
        self._sets = sets

    def __call__(self, run: Callable[[int], Any], calls: int, warm_up: bool = True) -> list[int]:
        if warm_up:
            run(0)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for index, (start, end) in enumerate(events):
            self._flush.zero_()
            start.record()
            result = run(index % self._sets)
            end.record()
            del result
        torch.cuda.synchronize()
        return [int(start.elapsed_time(end) * 1e6) for start, end in events]


def _peak_memory(run: Callable[[int], Any], case: Case) -> int | None:
    """Bytes that one call allocates beyond what is there already; None on the CPU, unless the case asks for it."""
    if case.device.type != "cuda":
        return _resident_growth(run) if case.resident and _PEAK_RESET.exists() else None
    before = torch.cuda.memory_allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    run(0)
    return torch.cuda.max_memory_allocated(case.device) - before


_PEAK_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _resident_growth(run: Callable[[int], Any]) -> int:
    """How far one call raises the resident set, after what is free went back to the system (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _PEAK_RESET.write_text("5")
    before = _resident("VmRSS")
    run(0)
    return _resident("VmHWM") - before


def _resident(field_name: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field_name}:"))
    return int(line.split()[1]) * 1024


def _percentiles(nanoseconds: Sequence[int]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile in milliseconds."""
    p20, p50, p80 = np.percentile(nanoseconds, [20, 50, 80]) / 1e6
    return float(p20), float(p50), float(p80)
