"""What commands say: results on standard output, what happens meanwhile on standard error."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out_console, err_console = Console(), Console(stderr=True)


def _first_process() -> bool:
    """Whether no other process of torchrun or accelerate speaks for this one."""
    return os.environ.get("RANK", "0") == "0"


def say_once(text: str) -> None:
    """The last word of a command that several processes may share, after which they part."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if _first_process():
        say(text)


def say(text: str) -> None:
    """A line on standard output."""
    out_console.print(escape(text), highlight=False, soft_wrap=True)


def announce(text: str) -> None:
    """A line on standard error."""
    err_console.print(escape(text), highlight=False, soft_wrap=True)


def announce_notes(store: Any) -> None:
    """Flaws of the data and what was made of them, in the first of several processes."""
    if _first_process():
        for note in store.notes:
            announce(f"{store.name}: {note}")


def announcing(run: Any) -> Callable[[str], None]:
    """What a training announces its data with: their flaws first."""

    def flaws_first(text: str) -> None:
        with run.open_store() as store:
            announce_notes(store)
        announce(text)

    return flaws_first


# Bars are for terminals; a log gets a line now and then.
_SECONDS_BETWEEN_LINES = 30.0


class _Log:
    def __init__(self) -> None:
        self.last = time.monotonic()

    def line(self, text: str) -> None:
        """Print ``text`` on standard error, unless that is a terminal or the last line is too young."""
        if not err_console.is_terminal and _first_process() and time.monotonic() - self.last >= _SECONDS_BETWEEN_LINES:
            print(text, file=sys.stderr, flush=True)
            self.last = time.monotonic()


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Any]:
    """Yield what is to be called with how much is done, and of how much where ``total`` did not say so."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    log, quiet, begun = _Log(), not err_console.is_terminal or not _first_process(), time.monotonic()
    before: int | None = None
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=err_console, transient=True, disable=quiet) as progress:
        task = progress.add_task(what, total=total, rate="")

        def advance(done: int, of: int | None = None) -> None:
            nonlocal before, begun
            if before is None:
                before, begun = done, time.monotonic()  # what an earlier process did takes no time
            seconds, rate, left = time.monotonic() - begun, "", ""
            total_rows = of or total or done
            if done > before and seconds:
                rate = f"{(done - before) / seconds:.3g}/s"
                minutes = (total_rows - done) * seconds / (done - before) / 60
                left = f", {rate}, about {math.ceil(minutes)} min left" if done < total_rows else ""
            progress.update(task, completed=done, total=of, rate=rate)
            log.line(f"{what}: {done} of {of or total}{left}")

        yield advance


@contextmanager
def training_progress() -> Iterator[Any]:
    """A bar per fold and seed that is in training, showing its current stage, and one for all of them."""
    from modafill.training import EpochDone

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn())
    log, quiet = _Log(), not err_console.is_terminal
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=err_console, disable=quiet) as progress:
        bars: dict[str, Any] = {}
        begun, before = 0.0, 0

        def report(done: EpochDone) -> None:
            nonlocal begun, before
            if not begun:
                begun, before = time.monotonic(), done.parts_done - done.part_done
            left = ""
            if before < done.parts_done < done.parts:
                each = (time.monotonic() - begun) / (done.parts_done - before)
                left = f"about {math.ceil(each * (done.parts - done.parts_done) / 60)} min left"
            if done.parts > 1:
                if "" not in bars:
                    bars[""] = progress.add_task("trained", total=done.parts, note="")
                progress.update(bars[""], completed=done.parts_done, note=left)
            if done.part_done:
                if done.part in bars:
                    progress.remove_task(bars.pop(done.part))
                overall = f"{done.parts_done} of {done.parts}" + (f", {left}" if left else "")
                log.line(f"{done.part} trained: {overall}")
                return
            if done.part not in bars:
                bars[done.part] = progress.add_task(done.part, note="")
            loss = f"loss {done.scalars['loss']:.3g}"
            if "validation_loss" in done.scalars:
                loss += f", validation {done.scalars['validation_loss']:.3g}"
            stage = f"{done.part} {done.number}/{done.stages} {done.stage}"
            progress.update(bars[done.part], description=stage, completed=done.epoch, total=done.epochs, note=loss)
            log.line(
                f"{done.part}, stage {done.number} of {done.stages} ({done.stage}), "
                f"epoch {done.epoch} of {done.epochs}: {loss}"
            )

        yield report
