"""Tables of results: a row per method, a column per available set, mean ± standard deviation over folds and seeds."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from modafill.files import replacing, write_json

AVERAGE, FULL = "average", "full"
_METHOD_WIDTH = 17
_NONE = "–"
LOWER_IS_BETTER = ("NLL", "NRMSE", "CRPS", "MAE")
NOT_A_SHARE = (*LOWER_IS_BETTER, "Corr")


@dataclass(frozen=True)
class Record:
    """One figure of one fold and seed: ``available`` is the observed set, such as ``{at}``, or ``full``."""

    question: str
    metric: str
    method: str
    available: str
    fold: int
    seed: int
    value: float


@dataclass(frozen=True)
class Table:
    """One question and metric: ``cells[method][column]`` is (mean, standard deviation) in ``columns`` order."""

    question: str
    metric: str
    columns: tuple[str, ...]
    cells: dict[str, dict[str, tuple[float, float]]]
    trials: int

    @property
    def title(self) -> str:
        """The question with its metric and the number of trainings."""
        direction = "lower" if self.metric in LOWER_IS_BETTER else "higher"
        spread = f"; mean ± std of {self.trials}" if self.trials > 1 else ""
        return f"{self.question} — {self.metric} ({direction} is better{spread})"

    def rows(self) -> list[list[str]]:
        """Formatted cells, method first."""
        percent = self.metric not in NOT_A_SHARE

        def text(cell: tuple[float, float] | None) -> str:
            if cell is None:
                return _NONE
            mean, std = cell
            body = f"{100 * mean:.1f} ± {100 * std:.1f}" if percent else f"{mean:.3f} ± {std:.3f}"
            return body if self.trials > 1 else body.split(" ±")[0]

        return [[method, *(text(row.get(column)) for column in self.columns)] for method, row in self.cells.items()]

    def markdown(self, about: str) -> str:
        """GitHub-flavoured Markdown, with the protocol under the title."""
        lines = [["method", *self.columns], ["---"] + ["---:"] * len(self.columns), *self.rows()]
        return f"**{self.title}**\n\n{about}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def rich(self, width: int) -> RenderableType:
        """For a terminal of ``width`` columns.

        Where a line is too short for a row, a figure's spread stands below it; where it still is, the columns go into
        several tables.
        """
        rows = [["method", *self.columns], *self.rows()]
        narrow = sum(map(_width, zip(*rows, strict=True))) + 2 * len(self.columns) > width
        gap = 1 if narrow else 2
        if narrow:
            rows = [[cell.replace(" ± ", "\n±") for cell in row] for row in rows]
        widths = [_width(column) for column in zip(*rows, strict=True)]
        method_width = min(widths[0], _METHOD_WIDTH) if narrow else widths[0]
        blocks: list[list[int]] = [[]]
        for index in range(1, len(widths)):
            if blocks[-1] and method_width + sum(gap + widths[i] for i in [*blocks[-1], index]) > width:
                blocks.append([])
            blocks[-1].append(index)
        tables: list[RenderableType] = [Text(self.title, style="bold")]
        for block in blocks:
            table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
            table.add_column("method", no_wrap=not narrow, max_width=method_width)
            for index in block:
                table.add_column(rows[0][index], justify="right", no_wrap=True)
            for row in rows[1:]:
                if any(row[index] != _NONE for index in block):
                    table.add_row(row[0], *(row[index] for index in block))
            tables += [table, ""]
        return Group(*tables)


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n"))


def make_tables(records: Sequence[Record]) -> list[Table]:
    """Aggregate records; the average over incomplete sets is taken within each fold and seed first.

    A figure that some training lacks (a correlation of constant answers) is no cell and makes no average.
    """
    tables = []
    for question, metric in dict.fromkeys((r.question, r.metric) for r in records):
        chosen = [r for r in records if (r.question, r.metric) == (question, metric)]
        columns = [*dict.fromkeys(r.available for r in chosen if r.available != FULL), AVERAGE]
        columns += [FULL] if any(r.available == FULL for r in chosen) else []
        count = len({(r.fold, r.seed) for r in chosen})
        cells: dict[str, dict[str, tuple[float, float]]] = {}
        for method in dict.fromkeys(r.method for r in chosen):
            trials: dict[tuple[int, int], dict[str, float]] = {}
            for r in chosen:
                if r.method == method:
                    trials.setdefault((r.fold, r.seed), {})[r.available] = r.value
            for values in trials.values():
                incomplete = [v for name, v in values.items() if name != FULL]
                if len(incomplete) == len(columns) - 1 - (FULL in columns):
                    values[AVERAGE] = statistics.fmean(incomplete)
            cells[method] = {}
            for column in columns:
                found = [values[column] for values in trials.values() if column in values]
                if len(found) == count:
                    spread = statistics.stdev(found) if len(found) > 1 else 0.0
                    cells[method][column] = (statistics.fmean(found), spread)
        tables.append(Table(question, metric, tuple(columns), cells, count))
    return tables


def save_tables(
    stem: Path, records: Sequence[Record], tables: Sequence[Table], about: str, protocol: Mapping[str, Any]
) -> None:
    """Write ``stem`` + ``.json`` (every figure), ``.csv`` (the same, flat) and ``.md`` (the tables).

    Each table has ``about``, the protocol in words, under its title; ``.json`` has both.
    """
    content = {"about": about, "protocol": dict(protocol), "records": [asdict(r) for r in records]}
    write_json(stem.with_suffix(".json"), content)
    with replacing(stem.with_suffix(".csv")) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Record.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(r) for r in records)
    with replacing(stem.with_suffix(".md")) as beside:
        beside.write_text("\n".join(t.markdown(about) for t in tables), encoding="utf-8")
