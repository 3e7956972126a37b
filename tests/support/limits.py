"""Calls with a bound on their memory."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any


def error_within(room: int, call: Callable[[], object], seconds: float = 20) -> str:
    """The message of the ValueError that a call raises in a process that may take ``room`` bytes more than this one."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_call, args=(room, call, answers))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert not answers.empty(), f"no answer within {seconds} s and {room} bytes"
    return answers.get()


def _call(room: int, call: Callable[[], object], answers: Any) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room,) * 2)
    try:
        answer = f"no error, but {call()!r}"[:200]
    except ValueError as error:
        answer = str(error)
    except BaseException as error:
        answer = f"not a ValueError, but {error!r}"[:200]
    answers.put(answer)
