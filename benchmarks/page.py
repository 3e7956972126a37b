"""A folder of results as one HTML file that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from modafill.benchmarks.compare import COLUMNS, Comparison
from modafill.benchmarks.report import (
    CASE,
    SERIES,
    Result,
    Row,
    columns,
    commit_text,
    fastest_rival,
    group,
    is_ours,
    is_rival,
    provider,
    ratio,
    shape_text,
    speed_up,
    title,
)
from modafill.files import replacing

# Charts are drawn in colours #0000NN, which become the variables --cNN of the page: it has light and dark ones.
_INK, _LINE, _OURS = "#000001", "#000002", "#000003"
_FIRST_SERIES = 4
_LIGHT = re.findall(r"\S+", "#1d2329 #d5d9de #3a5a80 #2468b0 #c8501e #1b8a5a #a0559b #a87900 #128a9c #b03050 #6b7078")
_DARK = re.findall(r"\S+", "#dfe3e8 #40474f #8fb4dd #6fa8e8 #ef8a5c #4fc38f #d08bcb #d9ac35 #4fc3d4 #ee7f98 #a0a7b0")
_SERIES_COLOURS = len(_LIGHT) - _FIRST_SERIES + 1
# Of no common factor with the colours, so that no two rivals share both.
_MARKERS = "osD^vPX"


def write_page(path: Path, name: str, results: Mapping[str, Result], comparison: Comparison | None = None) -> None:
    """Write the page of ``results``, by the names of their files, in one move; ``name`` is what its title says."""
    with replacing(path) as beside:
        beside.write_text(render(name, results, comparison), encoding="utf-8")


def render(name: str, results: Mapping[str, Result], comparison: Comparison | None = None) -> str:
    """The page's text, the same for the same results."""
    every_row = [row for result in results.values() for row in result["rows"]]
    rivals = {
        op: list(dict.fromkeys(row["provider"] for row in rows if is_rival(row)))
        for (op,), rows in group(every_row, ("op",)).items()
    }
    contents, sections = [], []
    for file, result in results.items():
        entries, parts = [], []
        for index, rows in enumerate(group(result["rows"], SERIES).values()):
            anchor = f"{_anchor(file)}-{index}"
            cases = list(group(rows, CASE).values())
            pairs = [(case, provider(case, "modafill")) for case in cases]
            found = [speed_up(ours, fastest_rival(case, ours)) for case, ours in pairs]
            ratios = sorted(x for x in found if x is not None)
            span = f"{ratio(ratios[0])}–{ratio(ratios[-1])}" if ratios else ""
            wrong = sum(not row["correct"] for row in rows)
            flag = f'<span class="wrong">{wrong} WRONG</span>' if wrong else ""
            link = f'<a href="#{anchor}">{escape(title(rows[0]))}</a>'
            entries.append(f"<tr><td>{link}</td><td>{len(cases)}</td><td>{span}</td><td>{flag}</td></tr>")
            parts.append(
                f'<section id="{anchor}"><h3>{escape(title(rows[0]))} {flag}</h3>'
                f"{_chart(cases, rivals[rows[0]['op']], anchor)}{_series_table(rows, cases)}</section>"
            )
        heading = f'<a href="#{_anchor(file)}">{escape(file)}</a>'
        contents.append(
            f'<table><caption>{heading}</caption><thead><tr><th scope="col">op</th><th scope="col">shapes</th>'
            '<th scope="col">× rival, worst–best</th><th scope="col"></th></tr></thead>'
            f"<tbody>{''.join(entries)}</tbody></table>"
        )
        sections.append(
            f'<section id="{_anchor(file)}"><h2>{escape(file)}</h2>{_left_out(result)}{"".join(parts)}</section>'
        )
    compared = "" if comparison is None else _compared(comparison)
    link = '<p><a href="#earlier">Changes against the earlier result</a></p>' if compared else ""
    page = f"modafill bench: {escape(name)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{page}</title><style>{_style()}</style></head><body><header><h1>{page}</h1></header><main>"
        f'{_machines(results)}{_LEGEND}<nav aria-label="Contents"><h2>Contents</h2>{link}{"".join(contents)}</nav>'
        f"{compared}{''.join(sections)}</main></body></html>\n"
    )


_LEGEND = """
<details><summary>How to read this</summary>
<p>Everybody is checked against the float64 reference before being timed; who fails is WRONG and has no speed. In the
charts a mark right of 1 is a rival that modafill is faster than, by that factor, at the shape on the left; the bar on
the right is the fraction of the roofline that modafill reaches. In the tables:</p>
<ul>
<li>ms: the median time of a call, with the 20th and 80th percentile;</li>
<li>GB/s or GFLOP/s: what the op has to move or to multiply and add, over that time; roofline: that over the same of a
copy or triad of the same size, or of a large product;</li>
<li>× rival: how many times as fast as the fastest correct rival of the same precision; × paper: as the formula that
papers print; modafill ×: how many times as fast modafill is as this row;</li>
<li>peak MB: the memory that a call takes on top; evaluations: runs of the network.</li>
</ul></details>
"""


def _anchor(text: str) -> str:
    """A name that ids and links can have, another for each text."""
    return "r-" + "".join(c if re.match(r"[A-Za-z0-9]", c) else f"_{ord(c):x}_" for c in text)


def _table(
    headings: Iterable[str],
    groups: Mapping[str, Iterable[tuple[Iterable[str], str]]],
    *,
    caption: str = "",
    style: str = "",
) -> str:
    """``groups``: by their headings, which may be empty, rows of cells and what class a row is of."""
    names = list(headings)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    bodies = []
    for heading, rows in groups.items():
        top = f'<tr><th scope="rowgroup" colspan="{len(names)}">{escape(heading)}</th></tr>' if heading else ""
        lines = [
            f'<tr{f" class={kind}" if kind else ""}><th scope="row">{escape(first)}</th>'
            f"{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
            for (first, *cells), kind in rows
        ]
        bodies.append(f"<tbody>{top}{''.join(lines)}</tbody>")
    return (
        f'<div class="wide"><table{f" class={style}" if style else ""}>'
        f"{f'<caption>{escape(caption)}</caption>' if caption else ''}"
        f"<thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div>"
    )


def _machines(results: Mapping[str, Result]) -> str:
    machines = [result["machine"] for result in results.values()]
    fields = [
        field for field in dict.fromkeys(field for machine in machines for field in machine) if field != "left_out"
    ]
    rows = [
        ([field.replace("_", " "), *(_machine_text(field, machine) for machine in machines)], "") for field in fields
    ]
    return f"<section><h2>Machine</h2>{_table(['', *results], {'': rows}, style='words')}</section>"


def _machine_text(field: str, machine: Mapping[str, Any]) -> str:
    value = machine.get(field)
    if field == "commit":
        return commit_text(machine)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {entry}" for name, entry in value.items())
    return "–" if value is None else str(value)


def _left_out(result: Result) -> str:
    reasons = result["machine"].get("left_out") or []
    listed = "".join(f"<li>{escape(str(reason))}</li>" for reason in reasons)
    return f"<details><summary>Left out: {len(reasons)}</summary><ul>{listed}</ul></details>" if reasons else ""


def _series_table(rows: Sequence[Row], cases: Sequence[Sequence[Row]]) -> str:
    shown: dict[str, Callable[[Row, Sequence[Row]], str]] = columns(rows)
    shown["modafill ×"] = lambda row, case: ratio(speed_up(provider(case, "modafill"), row)) if is_rival(row) else ""
    if any(row.get("peak_memory_bytes") is not None for row in rows):
        shown["peak MB"] = lambda row, case: (
            "" if row.get("peak_memory_bytes") is None else f"{row['peak_memory_bytes'] / 1e6:.1f}"
        )
    if any(row.get("network_evaluations") is not None for row in rows):
        shown["evaluations"] = lambda row, case: str(row.get("network_evaluations") or "")
    lines = {
        shape_text(case[0]["shape"]): [
            (
                [cell(row, case) for cell in shown.values()],
                ("ours" if is_ours(row) else "") if row["correct"] else "wrong",
            )
            for row in case
        ]
        for case in cases
    }
    return (
        f"<details><summary>Table of {len(rows)} rows</summary>{_table(shown, lines, caption=title(rows[0]))}</details>"
    )


def _compared(comparison: Comparison) -> str:
    warning = f'<p class="warning" role="alert">{escape(comparison.warning)}</p>' if comparison.warning else ""
    others = f"<p>{escape(comparison.others)}.</p>" if comparison.others else ""
    lines = {
        name: [
            ([cell(pair) for cell in COLUMNS.values()], "wrong" if pair.verdict == "WRONG" else "") for pair in pairs
        ]
        for name, pairs in comparison.changed.items()
    }
    return (
        f'<section id="earlier"><h2>Changes against the earlier result</h2>{warning}{others}'
        f"<p>Earlier: {escape(comparison.before)}.</p><p>Machines drift, so what counts is how many times as fast as "
        "the fastest rival that was correct both times. A row is listed if its ranges of 20–80 % do not meet, neither "
        "in milliseconds nor in times of that rival, or if it became wrong or correct. It gained or lost on that rival "
        "where its own time went the other way.</p>"
        f"{_table(COLUMNS, lines) if lines else ''}<p>{escape(comparison.counts)}.</p></section>"
    )


def _chart(cases: Sequence[Sequence[Row]], rivals: Sequence[str], anchor: str) -> str:
    """One row per shape: a mark per rival at modafill's speed-up, and a bar at modafill's fraction of the roofline."""
    points: dict[str, list[tuple[int, float]]] = {}
    fractions: list[tuple[int, float]] = []
    for index, case in enumerate(cases):
        ours = provider(case, "modafill")
        if ours is None or not ours["correct"]:
            continue
        if ours.get("roofline_fraction") is not None:
            fractions.append((index, ours["roofline_fraction"]))
        for row in case:
            speed = speed_up(ours, row) if is_rival(row) else None
            if speed is not None:
                points.setdefault(row["provider"], []).append((index, speed))
    if not points and not fractions:
        return "<p>No correct row to draw.</p>"
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": anchor,
            "font.size": 9,
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _LINE,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "grid.color": _LINE,
        }
    ):
        figure = Figure(figsize=(9, 1.1 + 0.24 * len(cases) + 0.2 * (len(points) > 6)), layout="constrained")
        figure.patch.set_visible(False)
        left, *right = figure.subplots(
            1, 1 + bool(fractions), sharey=True, squeeze=False, width_ratios=(3, 1)[: 1 + bool(fractions)]
        )[0]
        for axes in (left, *right):
            axes.patch.set_visible(False)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", color=_LINE)
            axes.grid(axis="x", linewidth=0.6)
            axes.set_axisbelow(True)
        left.set(
            ylim=(len(cases) - 0.5, -0.5),
            yticks=range(len(cases)),
            yticklabels=[shape_text(c[0]["shape"]) for c in cases],
        )
        for line in range(len(cases) + 1):
            left.axhline(line - 0.5, color=_LINE, linewidth=0.4)
        for place, (name, marked) in enumerate(points.items()):
            # Beside each other, so that equal ones do not hide each other.
            shift = 0.6 * ((place + 0.5) / len(points) - 0.5)
            left.plot(
                [speed for _, speed in marked],
                [index + shift for index, _ in marked],
                linestyle="none",
                marker=_MARKERS[rivals.index(name) % len(_MARKERS)],
                markersize=6,
                color=f"#0000{_FIRST_SERIES + rivals.index(name) % _SERIES_COLOURS:02x}",
                markeredgewidth=0,
                label=name,
            )
        _ratio_axis(left, [speed for marked in points.values() for _, speed in marked])
        if points:
            figure.legend(loc="outside upper left", ncols=6, frameon=False, handletextpad=0.1, columnspacing=1.2)
        for axes in right:
            axes.barh(*zip(*fractions, strict=True), height=0.5, color=_OURS)
            axes.set(xlabel="fraction of the roofline", xlim=(0, max([1.0, *(1.05 * value for _, value in fractions)])))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"(fill|stroke): #0000([0-9a-f]{2})\b", r"\1: var(--c\2)", drawn)
    # One name space for all charts of the page.
    drawn = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{anchor}-", drawn)
    label = escape(f"How many times as fast as each rival, by shape: {title(cases[0][0])}. The table has the figures.")
    return f'<figure class="wide"><svg role="img" aria-label="{label}"{drawn.removeprefix("<svg")}</figure>'


def _ratio_axis(axes: Axes, speeds: Sequence[float]) -> None:
    low, high = min([1.0, *speeds]) / 1.2, max([1.0, *speeds]) * 1.2
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if high < 6 * low else (1, 2, 5) if high < 100 * low else (1,)
    axes.set(xscale="log", xlim=(low, high), xlabel="times as fast as the rival")
    decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))]
    axes.xaxis.set_major_locator(FixedLocator([step * ten for ten in decades for step in steps]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color=_INK, linewidth=1)


def _style() -> str:
    light, dark = (
        "".join(f"--c{i:02x}:{colour};" for i, colour in enumerate(colours, 1)) for colours in (_LIGHT, _DARK)
    )
    return (
        f":root{{color-scheme:light dark;--paper:#fff;--wrong:#b3261e;{light}}}"
        f"@media(prefers-color-scheme:dark){{:root{{--paper:#15181c;--wrong:#ff8a80;{dark}}}}}" + _RULES
    )


_RULES = """
body{margin:0 auto;padding:1rem;max-width:62rem;background:var(--paper);color:var(--c01);
font:1rem/1.5 system-ui,sans-serif}
h2{margin-top:2.5rem;border-bottom:1px solid var(--c02)}
h3{margin:2rem 0 .5rem}
a{color:var(--c03)}
.wide{margin:0;overflow-x:auto}
svg{min-width:40rem;max-width:100%;height:auto}
svg text{font-family:inherit!important}
table{border-collapse:collapse;margin:.5rem 0;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.25rem 0}
th,td{padding:.15rem .6rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--c02)}
th:first-child,td:first-child,.words :is(td,th){text-align:left}
th[colspan]{padding-top:.7rem}
tr:not(.ours,.wrong)>th[scope=row]{font-weight:400}
.ours{font-weight:600}
.wrong,.warning{color:var(--wrong);font-weight:600}
.warning{border:2px solid;padding:.5rem 1rem}
summary{cursor:pointer;margin:.25rem 0}
"""
