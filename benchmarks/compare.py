"""Results beside earlier ones: what became faster or slower, by the rivals of each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modafill.benchmarks.report import (
    CASE,
    Result,
    Row,
    commit_text,
    fastest_rival,
    group,
    is_ours,
    is_rival,
    key,
    output,
    parse_result,
    ratio,
    read_folder,
    read_result,
    shape_text,
    speed_up,
    three_digits,
    title,
)

# With another of these no time can be compared.
_HARDWARE = ("cpu", "gpu")
_OF_THE_RUN = ("commit", "date", "dispatch", "left_out", "modafill")


@dataclass(frozen=True)
class Pair:
    """One of modafill's rows; ``rivals``: the fastest now and the fastest then of those correct both times."""

    now: Row
    then: Row
    rivals: tuple[Row, Row] | None

    @property
    def now_x_rival(self) -> float | None:
        """How many times as fast as the rival; None without one, or where it is wrong itself."""
        return speed_up(self.now, self.rivals and self.rivals[0])

    @property
    def then_x_rival(self) -> float | None:
        """The same of then, when another rival may have been the fastest."""
        return speed_up(self.then, self.rivals and self.rivals[1])

    @property
    def times(self) -> float | None:
        """Time of then over that of now, which a drift of the machine's speed moves too."""
        return speed_up(self.now, self.then)

    @property
    def change(self) -> float | None:
        """``now_x_rival`` over ``then_x_rival``: the figure that counts."""
        if self.now_x_rival is None or self.then_x_rival is None:
            return None
        return self.now_x_rival / self.then_x_rival

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"``, ``"gained"``, ``"lost"``, ``"WRONG"`` or ``"correct"`` if new, or nothing.

        A row has changed where the ranges of 20–80 % do not meet, neither in milliseconds nor in times of the rival,
        which the same machine slowed or sped up as much. It gained or lost on the rival where its own time went the
        other way.
        """
        if self.now["correct"] != self.then["correct"]:
            return "correct" if self.now["correct"] else "WRONG"
        units = [(1.0, 1.0), *([(self.rivals[0]["p50_ms"], self.rivals[1]["p50_ms"])] if self.rivals else [])]
        if self.times is None or not all(self._apart(*unit) for unit in units):
            return ""
        better = (self.times if self.change is None else self.change) > 1
        if better != (self.times > 1):
            return "gained" if better else "lost"
        return "faster" if better else "slower"

    def _apart(self, now_unit: float, then_unit: float) -> bool:
        (now_low, now_high), (then_low, then_high) = (
            (row["p20_ms"] / unit, row["p80_ms"] / unit) for row, unit in ((self.now, now_unit), (self.then, then_unit))
        )
        return now_high < then_low or then_high < now_low


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        pairs: modafill's rows that are there both times.
        only_now, only_then: how many of them are not.
        before: commits and dates of the earlier results.
        differences: field of the machine, then and now, where rows that are there both times have others.
    """

    pairs: list[Pair]
    only_now: int
    only_then: int
    before: str
    differences: list[tuple[str, object, object]]

    @property
    def changed(self) -> dict[str, list[Pair]]:
        """The pairs with a verdict, by the titles of their series."""
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            if pair.verdict:
                found.setdefault(title(pair.now), []).append(pair)
        return found

    @property
    def warning(self) -> str:
        """Says that the machines differ, where they do."""
        found = self._differing(hardware=True)
        return f"ANOTHER MACHINE, so that times cannot be compared: {found}" if found else ""

    @property
    def others(self) -> str:
        """What else differs."""
        found = self._differing(hardware=False)
        return f"Also different, for the rivals too: {found}" if found else ""

    @property
    def counts(self) -> str:
        """How many of modafill's rows changed, and what is with the rest."""
        changed = sum(map(len, self.changed.values()))
        return (
            f"{changed} changed, {len(self.pairs) - changed} did not beyond their spread, {self.only_now} only now, "
            f"{self.only_then} only then"
        )

    def _differing(self, hardware: bool) -> str:
        return "; ".join(
            f"{name}: {then} then, {now} now" for name, then, now in self.differences if (name in _HARDWARE) == hardware
        )


COLUMNS: dict[str, Callable[[Pair], str]] = {
    "provider": lambda pair: pair.now["provider"],
    "shape": lambda pair: shape_text(pair.now["shape"]),
    "ms": lambda pair: f"{three_digits(pair.then['p50_ms'])}→{three_digits(pair.now['p50_ms'])}",
    "time": lambda pair: ratio(pair.times),
    "× rival": lambda pair: f"{ratio(pair.then_x_rival)}→{ratio(pair.now_x_rival)}" if pair.rivals else "",
    "change": lambda pair: ratio(pair.change),
    "": lambda pair: pair.verdict,
}


# Rows and their machines by case and provider.
Earlier = Mapping[tuple[object, ...], tuple[Row, Mapping[str, object]]]
_IDENTITY = (*CASE, "provider")


def index(results: Mapping[str, Result]) -> Earlier:
    """The rows of ``results``, to be looked up.

    Raises:
        ValueError: two of them are the same case and provider.
    """
    found: dict[tuple[object, ...], tuple[Row, Mapping[str, object]]] = {}
    for name, result in results.items():
        for row in result["rows"]:
            identity = key(row, _IDENTITY)
            if identity in found:
                what = f"{row['provider']}: {title(row, shape_text(row['shape']))}"
                raise ValueError(f"against: got two rows of {what}, one of them in {name}, expected one in all files")
            found[identity] = row, result["machine"]
    return found


def compare(now: Mapping[str, Result], then: Earlier) -> Comparison:
    """Modafill's rows of ``now`` beside those of ``then`` with the same case and provider, whatever file has them."""
    pairs: list[Pair] = []
    differences: dict[tuple[str, object, object], None] = {}
    machines: dict[str, None] = {}
    met: set[tuple[object, ...]] = set()
    only_now = 0
    for result in now.values():
        for case in group(result["rows"], CASE).values():
            both: list[tuple[Row, Row]] = []
            for row in case:
                identity = key(row, _IDENTITY)
                if identity in then:
                    before, machine = then[identity]
                    both.append((row, before))
                    met.add(identity)
                    machines[f"commit {commit_text(machine)}, {machine.get('date')}"] = None
                    differences |= dict.fromkeys(_differences(machine, result["machine"]))
                elif is_ours(row):
                    only_now += 1
            rivals = [pair for pair in both if is_rival(pair[0]) and pair[0]["correct"] and pair[1]["correct"]]
            for ours in both:
                if is_ours(ours[0]):
                    of_now, of_then = (fastest_rival([pair[t] for pair in rivals], ours[t]) for t in (0, 1))
                    pairs.append(Pair(*ours, (of_now, of_then) if of_now and of_then else None))
    only_then = sum(is_ours(row) for identity, (row, _) in then.items() if identity not in met)
    return Comparison(pairs, only_now, only_then, "; ".join(machines) or "nothing of these", list(differences))


def _differences(then: Mapping[str, object], now: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    for name in dict.fromkeys((*then, *now)):
        if name not in _OF_THE_RUN and then.get(name) != now.get(name):
            yield name, then.get(name), now.get(name)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """The rows that changed, and how many did not."""
    console = console or Console()
    if comparison.warning:
        console.print(escape(comparison.warning), style="bold red")
    console.print(escape(f"Earlier: {comparison.before}"))
    if comparison.others:
        console.print(escape(comparison.others))
    for name, pairs in comparison.changed.items():
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for heading in COLUMNS:
            words = heading in ("provider", "shape", "")
            table.add_column(heading, justify="left" if words else "right", no_wrap=not words)
        for pair in pairs:
            table.add_row(*(escape(cell(pair)) for cell in COLUMNS.values()))
        console.print(table)
    console.print(comparison.counts)


def earlier(against: str, folder: Path | None, name: str | None = None) -> Earlier:
    """The rows to compare with.

    Args:
        against: a result, a folder of results, or else a revision of the git checkout that ``folder`` lies in, whose
            files at the same place are read.
        folder: where the new results are; None = nowhere.
        name: of the new results' file, if it is one; None = they are all files of ``folder``.

    Raises:
        ValueError: ``against`` is nothing of that kind, has no results, or has one twice.
    """
    path = Path(against)
    if path.is_file():
        return index({path.stem: read_result(path)})
    if path.is_dir():
        found = read_folder(path)
        if not found:
            raise ValueError(f"against: got {against!r}, a folder without .json files, expected results")
        return index(found)
    if folder is None:
        raise ValueError(
            f"against: got {against!r}, no file or folder; expected one, or with a place for results (json, out or "
            "report) a git revision"
        )
    folder = folder.resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    top = output(["git", "-C", str(existing), "rev-parse", "--show-toplevel"])
    if not top:
        raise ValueError(f"against: got {against!r}, no file or folder, and {folder} is in no git checkout")
    git = ["git", "-C", top]
    commit = output([*git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{against}^{{commit}}"])
    if not commit:
        raise ValueError(f"against: got {against!r}, expected a file, a folder or a git revision")
    place = folder.relative_to(top).as_posix()
    tree = f"{commit}:{'' if place == '.' else place}"
    names = (output([*git, "ls-tree", "--name-only", "-z", tree]) or "").split("\0")
    prefix = tree if tree.endswith(":") else f"{tree}/"
    found = {
        Path(file).stem: parse_result((output([*git, "show", f"{prefix}{file}"]) or "").encode(), f"{against}:{file}")
        for file in sorted(names)
        if (file == name if name else file.endswith(".json"))
    }
    if not found:
        raise ValueError(f"against: got {against!r}, a revision without {name or '.json files'} in {place}")
    return index(found)
