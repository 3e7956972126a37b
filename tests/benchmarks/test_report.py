"""Reports and comparisons, held to figures computed by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from modafill import benchmarks, cli
from modafill.benchmarks import cases, compare, page, report
from modafill.benchmarks.runner import Case, Check, Contender, Unavailable

ROOT = Path(__file__).resolve().parents[2]


def _row(provider: str, ms: float, **changes: Any) -> dict[str, Any]:
    """A row whose 20–80 % are a tenth to either side."""
    return {
        "op": "step", "mode": "fresh", "shape": [4, 3], "batch": 4, "dtype": "float32", "device": "cpu", "threads": 1,
        "provider": provider, "p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.1 * ms, "samples": 9, "gb_per_s": 8 / ms,
        "roofline_fraction": None, "peak_memory_bytes": None, "correct": True, "max_error": 0.0, **changes,
    }  # fmt: skip


def _result(*rows: dict[str, Any], **machine: Any) -> dict[str, Any]:
    known = {"cpu": "a cpu", "gpu": None, "instruction_set": "v3", "torch": "2.9", "left_out": [], "date": "2026-01-02"}
    commit = {"id": "0123456789abcdef", "dirty": False}
    return {"machine": {**known, "commit": commit, **machine}, "rows": list(rows)}


class Page(HTMLParser):
    """What a browser would make of the page: tags with attributes, the text, and the tables' cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag not in ("td", "th", "tr", "table")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def rows(self) -> dict[str, dict[str, str]]:
        """The cells of the last table by their row's first cell and the column's heading."""
        headings, *lines = self.tables[-1]
        return {line[0]: dict(zip(headings, line, strict=True)) for line in lines if len(line) > 1}


def _html(*rows: dict[str, Any], **machine: Any) -> str:
    return page.render("here", {"step": _result(*rows, **machine)})


def _marks(text: str) -> list[list[tuple[float, float]]]:
    """Of the first chart, where the marks of each rival are."""
    chart = ET.fromstring(re.sub(r"xlink:|xmlns\S*", "", text[text.index("<svg") : text.index("</svg>") + 6]))
    (axes,) = (group for group in chart.iter("g") if group.get("id", "").endswith("-axes_1"))
    lines = [
        [(float(use.get("x", 0)), float(use.get("y", 0))) for use in line.iter("use")] for line in axes.findall("g")
    ]
    return [
        line for line, group in zip(lines, axes.findall("g"), strict=True) if line and "line2d" in group.get("id", "")
    ]


def test_rows_are_grouped_by_case_and_series_in_the_order_of_the_first():
    a, b, c = _row("modafill", 1), _row("modafill", 1, shape=[8, 3]), _row("modafill", 1, mode="out")
    others = [_row("eager", 2), _row("eager", 2, shape=[8, 3]), _row("eager", 2, mode="out")]
    groups = report.group([a, b, c, *others], report.CASE)
    assert list(groups.values()) == [[a, others[0]], [b, others[1]], [c, others[2]]]
    assert list(groups) == [
        ("step", "fresh", (4, 3), "float32", "cpu", 1),
        ("step", "fresh", (8, 3), "float32", "cpu", 1),
        ("step", "out", (4, 3), "float32", "cpu", 1),
    ]
    assert list(report.group([a, b, c, *others], report.SERIES).values()) == [
        [a, b, others[0], others[1]],
        [c, others[2]],
    ]


@pytest.mark.parametrize(
    "field, other", [("op", "randn"), ("mode", "out"), ("dtype", "float16"), ("device", "cuda"), ("threads", 2)]
)
def test_a_chart_for_each_series(field, other):
    rows = [_row(name, ms, shape=shape) for name, ms in (("modafill", 1), ("eager", 2)) for shape in ([4, 3], [8, 3])]
    text = _html(*rows, *({**row, field: other} for row in rows))
    tags = [tag for tag, _ in Page(text).tags]
    assert tags.count("svg") == 2
    assert tags.count("h3") == 2
    assert tags.count("table") == 4  # the machine, the contents, and one each


def test_the_table_has_the_figures():
    cells = Page(
        _html(
            _row("modafill", 2.0, roofline_fraction=0.25, peak_memory_bytes=3_500_000, network_evaluations=50),
            _row("modafill-fast", 1.25, network_evaluations=8, another_network=True),
            _row("eager-paper", 8.0),
            _row("eager", 5.0, roofline_fraction=0.1),
            _row("torch.compile", 1.0, correct=False, roofline_fraction=0.9),
            _row("triad", 0.5, roofline_fraction=1.0),
        )
    ).rows()
    assert cells["modafill"] == {
        "provider": "modafill", "ms": "2.00", "20–80 %": "1.80–2.20", "GB/s": "4.0", "roofline": "0.25",
        "× rival": "2.50", "× paper": "4.00", "modafill ×": "", "peak MB": "3.5", "evaluations": "50",
    }  # fmt: skip
    ratios = ("roofline", "× rival", "× paper", "modafill ×")
    assert [cells["modafill-fast"][name] for name in ratios] == ["", "", "6.40", ""]
    assert [cells["eager"][name] for name in ratios] == ["0.10", "", "1.60", "2.50"]
    assert [cells["eager-paper"][name] for name in ratios] == ["", "", "1.00", "4.00"]
    assert [cells["triad"][name] for name in ratios] == ["1.00", "", "", ""]
    assert [cells["torch.compile WRONG"][name] for name in ratios] == ["", "", "", ""]


def test_products_are_shown_with_their_rate():
    cells = Page(_html(_row("modafill", 2.0, gflop_per_s=123.4), _row("eager", 4.0, gflop_per_s=None))).rows()
    assert (cells["modafill"]["GFLOP/s"], cells["eager"]["GFLOP/s"]) == ("123.4", "")
    assert "GB/s" not in cells["modafill"]


def test_marks_lie_on_a_log_scale_and_wrong_rows_have_none():
    shapes = ([4, 3], [8, 3])
    rows = [
        _row(name, ms, shape=shape)
        for shape in shapes
        for name, ms in (("modafill", 4), ("half", 2), ("same", 4), ("double", 8), ("eightfold", 32), ("triad", 1))
    ]
    half, same, double, eightfold = _marks(_html(*rows))
    assert half[0][0] == half[1][0]
    assert half[0][1] < half[1][1]  # the first shape on top
    unit = double[0][0] - same[0][0]
    assert unit > 10
    assert same[0][0] - half[0][0] == pytest.approx(unit, abs=0.01)
    assert eightfold[0][0] - same[0][0] == pytest.approx(3 * unit, abs=0.01)
    rows[2]["correct"] = False  # "same" at the first shape
    assert [len(marks) for marks in _marks(_html(*rows))] == [2, 2, 2, 1]  # in the order of the first that is right
    rows[6]["correct"] = False  # ours at the second
    assert [len(marks) for marks in _marks(_html(*rows))] == [1, 1, 1]
    rows[0]["correct"] = False
    text = _html(*rows)
    assert "<svg" not in text
    assert "No correct row to draw" in text
    assert "modafill WRONG" in Page(text).rows()


def test_a_wrong_row_of_ours_has_no_bar():
    def bars(*correct: bool) -> int:
        rows = [_row("modafill", 1, shape=[n, 3], correct=c, roofline_fraction=0.5) for n, c in enumerate(correct)]
        return _html(*rows).count("var(--c03)") - page._style().count("var(--c03)")

    assert bars(True, True, True) == 3
    assert bars(True, False, True) == 2


def test_the_contents_have_the_span_over_the_fastest_correct_rival():
    rows = [_row("modafill", 1), _row("eager", 4), _row("torch.compile", 2)]
    rows += [_row("modafill", 1, shape=[8, 3]), _row("eager", 3, shape=[8, 3])]
    rows += [_row("torch.compile", 0.1, shape=[8, 3], correct=False)]
    contents = Page(_html(*rows)).tables[1]
    assert contents[1] == ["step (fresh), float32, 1 thread", "2", "2.00–3.00", "1 WRONG"]


def test_what_is_put_in_stays_text():
    bad = "<script>alert('1')</script>&amp;\"><img src=x onerror=y>"
    text = page.render(
        bad,
        {bad: _result(_row("modafill", 1, op=bad), _row(bad, 2, op=bad, mode=bad, dtype=bad), _row(bad, 2, op=bad),
            cpu=bad, left_out=[bad], dispatch={bad: bad}, **{bad: bad})},
        compare.compare(
            {"x": _result(_row("modafill", 1, op=bad), cpu=bad, torch=bad)},
            compare.index({"x": _result(_row("modafill", 5, op=bad))}),
        ),
    )  # fmt: skip
    parsed = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    # The title and the heading, file names, machine, reasons, ops and rivals in charts and tables, and the warning.
    assert parsed.text.count(bad) >= 15
    assert bad in parsed.rows()
    label = next(attributes["aria-label"] for tag, attributes in parsed.tags if tag == "svg")
    assert bad in label


def test_nothing_is_loaded_and_every_link_has_its_place():
    rows = [
        _row(name, ms, threads=n, roofline_fraction=0.5) for name, ms in (("modafill", 1), ("e", 2)) for n in (1, 2)
    ]
    text = page.render("here", {"a": _result(*rows), "a-0": _result(*rows)})
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "image"} & {tag for tag, _ in parsed.tags}
    links = [v for _, attributes in parsed.tags for k, v in attributes.items() if k in ("href", "src", "xlink:href")]
    links += re.findall(r"url\(([^)]*)\)", text)
    assert len(links) > 20
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert "<?xml" not in text
    assert "<metadata" not in text
    policy = next(attributes["content"] for _, attributes in parsed.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy


def test_colours_follow_the_scheme_and_the_same_rows_give_the_same_page():
    rows = [_row("modafill", 1, roofline_fraction=0.5), *(_row(f"rival {n}", n) for n in range(1, 9))]
    text = _html(*rows)
    assert text == _html(*rows)
    drawn = text[text.index("<svg") : text.index("</svg>")]
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert len(used) == 11  # ink, lines, ours and eight rivals
    for scheme in re.findall(r":root\{([^}]*)\}", text):
        assert used <= set(re.findall(r"--(\w+):#", scheme))
    assert text.count(":root{") == 2


class _Problem:
    sets = 1

    def __init__(self, builders: dict[str, Callable[[], Contender]]) -> None:
        self.builders = builders


def _right(correct: bool = True) -> Contender:
    return Contender(lambda _: None, lambda: Check(correct, 0.0), 1)


def _absent() -> Contender:
    raise Unavailable("not today")


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Case]]:
    """Two suites of two cases and of one, whose names are their ops'."""

    def case(op: str, mode: str, **builders: Callable[[], Contender]) -> Case:
        device = torch.device("cpu")
        return Case(op, mode, (4, 3), torch.float32, device, 1, lambda _: _Problem({"modafill": _right, **builders}))

    known = {"first": [case("first", "fresh", eager=_right), case("first", "out", absent=_absent)]}
    known["second"] = [case("second", "fresh", eager=_right)]
    monkeypatch.setattr(cases, "SUITES", {name: lambda _, found=found: found for name, found in known.items()})
    return known


def _run(suite: str, **options: Any) -> dict[str, Any]:
    return benchmarks.run(suite, threads=[1], quick=True, progress=False, **options)


def test_out_has_a_file_per_suite_and_a_report_of_all(suites, tmp_path):
    out = tmp_path / "new"
    whole = _run("all", out=out)
    assert sorted(path.name for path in out.iterdir()) == ["first.json", "report.html", "second.json"]
    first, second = (json.loads((out / f"{name}.json").read_text()) for name in ("first", "second"))
    assert [(row["op"], row["mode"], row["provider"]) for row in first["rows"]] == [
        ("first", "fresh", "modafill"), ("first", "fresh", "eager"), ("first", "out", "modafill"),
    ]  # fmt: skip
    assert [(row["op"], row["provider"]) for row in second["rows"]] == [("second", "modafill"), ("second", "eager")]
    assert whole["rows"] == first["rows"] + second["rows"]
    reasons = ["absent left out of first: not today"]
    assert (first["machine"]["left_out"], second["machine"]["left_out"]) == (reasons, [])
    assert whole["machine"]["left_out"] == reasons
    assert reasons[0] in Page((out / "report.html").read_text()).text


def test_out_replaces_its_own_suite_alone(suites, tmp_path):
    (tmp_path / "first.json").write_text("not even JSON")
    other = json.dumps(_result(_row("modafill", 1, op="older-op")))
    (tmp_path / "older.json").write_text(other)
    seen = []

    def look() -> Contender:
        seen.append(json.loads((tmp_path / "first.json").read_text())["rows"])
        return _right()

    suites["first"][1] = dataclasses.replace(suites["first"][1], problem=lambda _: _Problem({"looking": look}))
    _run("first", out=tmp_path)
    assert [[row["mode"] for row in rows] for rows in seen] == [["fresh", "fresh"]]  # written after the first case
    assert (tmp_path / "older.json").read_text() == other
    assert not (tmp_path / "second.json").exists()
    assert len(json.loads((tmp_path / "first.json").read_text())["rows"]) == 3
    text = Page((tmp_path / "report.html").read_text()).text
    assert "older-op (fresh)" in text
    assert "first (out)" in text


def test_json_has_all_suites_and_nothing_beside_it(suites, tmp_path):
    whole = _run("all", json_path=tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text()) == whole
    assert {row["op"] for row in whole["rows"]} == {"first", "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


def _compare(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> compare.Comparison:
    return compare.compare({"now": _result(*now)}, compare.index({"then": _result(*then)}))


def test_a_comparison_by_hand():
    then = [_row("modafill", 10), _row("a", 20), _row("b", 30), _row("gone", 5), _row("wrong now", 4)]
    now = [_row("modafill", 6), _row("a", 24), _row("b", 18), _row("new", 1), _row("wrong now", 2, correct=False)]
    now += [_row("triad", 0.1)]
    (pair,) = _compare(now, [*then, _row("triad", 0.1)]).pairs
    assert pair.then_x_rival == pytest.approx(20 / 10)
    assert pair.now_x_rival == pytest.approx(18 / 6)
    assert pair.change == pytest.approx(1.5)
    assert pair.times == pytest.approx(10 / 6)
    assert pair.verdict == "faster"
    cells = [cell(pair) for cell in compare.COLUMNS.values()]
    assert cells == ["modafill", "4×3", "10.0→6.00", "1.67", "2.00→3.00", "1.50", "faster"]


@pytest.mark.parametrize(
    "then, now, verdict",
    [
        ((10, 20), (10, 20), ""),
        ((10, 20), (11.9, 20), ""),  # 9–11 and 10.7–13.1 meet
        ((10, 20), (12.5, 20), "slower"),  # 11.25–13.75
        ((10, 20), (8, 20), "faster"),  # 7.2–8.8
        ((10, 20), (20, 40), ""),  # everything takes twice as long
        ((10, 20), (20, 80), "gained"),  # and the rival four times
        ((10, 80), (5, 20), "lost"),
        ((10, 20), (10, 80), ""),  # it is the rival that changed
        ((10, None), (20, None), "slower"),
        ((10, None), (5, None), "faster"),
        ((10, None), (11, None), ""),
    ],
)
def test_a_change_is_what_neither_spread_nor_drift_explains(then, now, verdict):
    def rows(ours: float, rival: float | None) -> list[dict[str, Any]]:
        return [_row("modafill", ours), *([_row("eager", rival)] if rival else [])]

    comparison = _compare(rows(*now), rows(*then))
    assert [pair.verdict for pair in comparison.pairs] == [verdict]
    assert list(comparison.changed) == (["step (fresh), float32, 1 thread"] if verdict else [])


def test_a_row_that_became_wrong_is_told_and_has_no_speed():
    right, wrong = [_row("modafill", 10), _row("eager", 20)], [_row("modafill", 1, correct=False), _row("eager", 20)]
    (now,), (before,) = _compare(wrong, right).pairs, _compare(right, wrong).pairs
    assert (now.verdict, now.change, now.times, now.now_x_rival) == ("WRONG", None, None, None)
    assert (before.verdict, before.change, before.then_x_rival) == ("correct", None, None)
    assert _compare(wrong, wrong).pairs[0].verdict == ""


@pytest.mark.parametrize(
    "field, other",
    [("op", "x"), ("mode", "x"), ("shape", [4, 4]), ("dtype", "x"), ("device", "cuda"), ("threads", 2),
     ("provider", "modafill-fast")],
)  # fmt: skip
def test_rows_of_another_case_are_not_compared(field, other):
    comparison = _compare(
        [_row("modafill", 1), _row("eager", 9)],
        [{**_row("modafill", 5), field: other}],
    )
    assert (comparison.pairs, comparison.only_now, comparison.only_then) == ([], 1, 1)


def test_rows_are_found_in_whatever_file():
    now = {"all": _result(_row("modafill", 1), _row("modafill", 1, op="randn"))}
    then = {"step": _result(_row("modafill", 2)), "more": _result(_row("modafill", 3, op="randn"), _row("x", 3))}
    comparison = compare.compare(now, compare.index(then))
    assert [pair.then["p50_ms"] for pair in comparison.pairs] == [2, 3]
    assert comparison.counts == "2 changed, 0 did not beyond their spread, 0 only now, 0 only then"


def test_another_machine_is_said_first():
    rows = [_row("modafill", 10)]
    then = compare.index({"x": _result(*rows, cpu="an [old] cpu", torch="2.8", date="2025-01-01")})
    comparison = compare.compare({"x": _result(*rows, gpu="a gpu")}, then)
    assert "cpu: an [old] cpu then, a cpu now" in comparison.warning
    assert "gpu: None then, a gpu now" in comparison.warning
    assert "torch" not in comparison.warning
    printed = io.StringIO()
    compare.print_comparison(comparison, Console(file=printed, width=200))
    first, before, other, counts = printed.getvalue().splitlines()
    assert first == comparison.warning
    assert before == "Earlier: commit 0123456789ab, 2025-01-01"
    assert "torch: 2.8 then, 2.9 now" in other
    assert counts == "0 changed, 1 did not beyond their spread, 0 only now, 0 only then"
    parsed = Page(page.render("here", {"x": _result(*rows)}, comparison))
    assert any(attributes.get("role") == "alert" for _, attributes in parsed.tags)
    assert comparison.warning in parsed.text
    same = compare.compare({"x": _result(*rows)}, compare.index({"x": _result(*rows), "y": _result(cpu="another")}))
    assert (same.warning, same.others) == ("", "")
    assert not any(attributes.get("role") == "alert" for _, attributes in Page(page.render("h", {}, same)).tags)


def test_what_changed_is_printed_within_80_columns_and_shown_in_the_page():
    then = [
        _row("modafill-bfloat16", 40_000, shape=[256, 20, 512, 512, 3]),
        _row("eager", 80_000, shape=[256, 20, 512, 512, 3]),
    ]
    now = [
        _row("modafill-bfloat16", 10_000, shape=[256, 20, 512, 512, 3]),
        _row("eager", 80_000, shape=[256, 20, 512, 512, 3]),
    ]
    then, now = [*then, _row("modafill", 1)], [*now, _row("modafill", 1)]
    comparison = _compare(now, then)
    printed = io.StringIO()
    compare.print_comparison(comparison, Console(file=printed, width=80))
    assert all(
        text in printed.getvalue() for text in ("40000→10000", "2.00→8.00", "4.00", "faster", "1 changed, 1 did")
    )
    headings, title, *lines = Page(page.render("here", {}, comparison)).tables[-1]
    assert headings == list(compare.COLUMNS)
    assert title == ["step (fresh), float32, 1 thread"]
    assert lines == [
        ["modafill-bfloat16", "256×20×512×512×3", "40000→10000", "4.00", "2.00→8.00", "4.00", "faster"]
    ]  # fmt: skip


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("place", ["", "results/here"])
def test_a_revision_of_the_checkout(tmp_path, place, suites):
    _git(tmp_path, "init", "-q")
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for ms in (10, 40):
        (folder / "step.json").write_text(json.dumps(_result(_row("modafill", ms))))
        (folder / "randn.json").write_text(json.dumps(_result(_row("modafill", ms, op="randn"))))
        (folder / "notes.txt").write_text("nothing")
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / "elsewhere" / "step.json").write_text(json.dumps(_result(_row("modafill", 7, op="elsewhere"))))
        _git(tmp_path, "add", "-A")
        _git(tmp_path, "commit", "-q", "-m", str(ms))

    def times(found: compare.Earlier) -> dict[str, float]:
        return {row["op"]: row["p50_ms"] for row, _ in found.values()}

    assert times(compare.earlier("HEAD~1", folder)) == {"step": 10, "randn": 10}
    assert times(compare.earlier("HEAD", folder)) == {"step": 40, "randn": 40}
    assert times(compare.earlier(_git(tmp_path, "rev-parse", "HEAD~1")[:9], folder, "randn.json")) == {"randn": 10}
    assert times(compare.earlier(str(folder / "step.json"), None)) == {"step": 40}
    assert times(compare.earlier(str(folder), None)) == {"step": 40, "randn": 40}
    benchmarks.write_report(folder, against="HEAD~1", progress=False)
    assert "2 changed, 0 did not" in Page((folder / "report.html").read_text()).text
    with pytest.raises(ValueError, match=r"against: got 'HEAD~9', expected a file, a folder or a git revision"):
        _run("first", out=folder, against="HEAD~9")
    with pytest.raises(ValueError, match=r"against: got 'HEAD', a revision without \.json files in "):
        _run("first", out=tmp_path / "new", against="HEAD")
    with pytest.raises(ValueError, match=r"against: got 'HEAD', a revision without other\.json in "):
        _run("first", json_path=folder / "other.json", against="HEAD")
    assert not (folder / "first.json").exists()
    assert not (tmp_path / "new").exists()


def test_a_commit_is_changed_where_what_is_installed_differs_but_not_by_tests(tmp_path, monkeypatch):
    installed = tmp_path / ".venv" / "modafill"
    for name in ("python/modafill/ops/one.py", "kernels/two.py", "benchmarks/three.py", "benchmarks/test_speed.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        if "test" not in name:
            copy = installed / name.removeprefix("python/modafill/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(name)
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", "python", "kernels", "benchmarks")
    _git(tmp_path, "commit", "-q", "-m", "all")
    monkeypatch.setattr(report.modafill, "__file__", str(installed / "__init__.py"))
    monkeypatch.setattr(report, "_C", None)
    assert report._commit() == {"id": _git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (installed / "benchmarks" / "three.py").write_text("other")
    assert report._commit() == {"id": _git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_an_earlier_result_is_read_before_it_is_replaced(suites, tmp_path):
    old = _row("modafill", 1e6, op="first")
    (tmp_path / "first.json").write_text(json.dumps(_result(old, _row("modafill", 1, op="gone"))))
    _run("first", out=tmp_path, against=str(tmp_path))
    text = Page((tmp_path / "report.html").read_text()).text
    assert "1 changed, 0 did not beyond their spread, 1 only now, 1 only then" in text


def _mistakes(folder: Path) -> dict[str, tuple[Callable[[], object], str]]:
    file, out = folder / "step.json", folder / "new"
    two, broken, empty = folder / "two", folder / "broken", folder / "empty"
    return {
        "both": (lambda: _run("first", json_path=folder / "a.json", out=out), r"json: got .* beside out "),
        "file": (lambda: _run("first", out=file), r"out: got .*step\.json', a file, expected a folder"),
        "suite": (lambda: _run("frist", out=out), r"suite: got 'frist'"),
        "broken": (lambda: _run("first", out=broken), r"broken\.json: got something else, expected a result"),
        "nothing": (lambda: _run("first", against="HEAD"), r"against: got 'HEAD', no file or folder"),
        "checkout": (lambda: _run("first", out=out, against="HEAD"), r"against: got 'HEAD', .* in no git checkout"),
        "against": (lambda: _run("first", out=out, against=str(empty)), r"against: got .*, a folder without \.json"),
        "twice": (lambda: _run("first", out=out, against=str(two)), r"against: got two rows of modafill: step"),
        "report": (lambda: benchmarks.write_report(empty), r"report: got .*empty', expected a folder with results"),
        "absent": (lambda: benchmarks.write_report(folder / "no"), r"report: got .*no', expected a folder with"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _mistakes(Path()))
def test_mistakes_are_told_before_any_work(name, tmp_path, suites, monkeypatch):
    (tmp_path / "step.json").write_text(json.dumps(_result(_row("modafill", 1))))
    for folder, files in (("two", ("a", "b")), ("broken", ("broken",)), ("empty", ())):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / f"{file}.json").write_text((tmp_path / "step.json").read_text())
    (tmp_path / "broken" / "broken.json").write_text('{"rows": []}')
    monkeypatch.setattr(benchmarks, "run_case", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    before = sorted(tmp_path.rglob("*"))
    call, message = _mistakes(tmp_path)[name]
    with pytest.raises(ValueError, match=message):
        call()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"machine": {}}', '{"machine": [], "rows": []}', '{"machine": {}, "rows": [1]}',
     json.dumps({"machine": {}, "rows": [{**_row("modafill", 1), "p50_ms": None}]}), "\udcff"],
)  # fmt: skip
def test_what_is_no_result_is_refused(text):
    with pytest.raises(ValueError, match=r"^here: got something else"):
        report.parse_result(text.encode(errors="surrogateescape"), "here")
    report.parse_result(json.dumps(_result(_row("modafill", 1))).encode(), "here")


def _command(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, *arguments: object, module: bool = False
) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["modafill", *([] if module else ["bench"]), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("modafill.benchmarks", run_name="__main__") if module else cli.main()
    return end.value.code or 0, *capfd.readouterr()


@pytest.mark.parametrize("module", [False, True])
def test_the_command_makes_a_report(monkeypatch, capfd, tmp_path, module):
    (tmp_path / "step.json").write_text(json.dumps(_result(_row("modafill", 1))))
    (tmp_path / "old.txt").write_text(json.dumps(_result(_row("modafill", 4))))
    monkeypatch.setattr(benchmarks, "run", lambda *_, **__: pytest.fail("timed"))
    arguments = ("--report", tmp_path, "--against", tmp_path / "old.txt")
    status, out, err = _command(monkeypatch, capfd, *arguments, module=module)
    assert (status, err) == (0, "")
    assert "4.00→1.00" in out
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'report.html'}"
    assert "4.00→1.00" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "options",
    [["--suite", "step"], ["--json", "x.json"], ["--out", "x"], ["--device", "cpu"], ["--quick"], ["--threads", "1"]],
)
def test_a_report_times_nothing(monkeypatch, capfd, tmp_path, options):
    status, out, err = _command(monkeypatch, capfd, *options, "--report", tmp_path)
    assert (status, out) == (2, "")
    assert err == f"modafill: report: got {options[0]} beside it, expected --against alone: nothing is timed\n"


def test_the_command_passes_on_where_to_write_and_what_to_compare_with(monkeypatch, capfd, tmp_path):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(benchmarks, "run", lambda suite, **options: asked.append({"suite": suite, **options}))
    assert _command(monkeypatch, capfd, "--suite", "all", "--out", tmp_path, "--against", "HEAD~3")[0] == 0
    (given,) = asked
    assert (given["suite"], given["out"], given["against"], given["json_path"]) == ("all", tmp_path, "HEAD~3", None)


@pytest.fixture(scope="module")
def speed() -> Any:
    """benchmarks/test_speed.py, which no wheel has."""
    spec = importlib.util.spec_from_file_location("test_speed", ROOT / "benchmarks" / "test_speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_provider_of_the_cpu_is_under_pytest_benchmark(speed):
    given = [entry.values for entry in speed._pairs()]
    assert all(case.device.type == "cpu" and case.threads == 1 and not case.quick for case, _ in given)
    found: dict[tuple[str, str], str] = {}
    for case, name in given:
        if case.shape[-1] != 1:
            found[case.op, case.mode] = f"{found.get((case.op, case.mode), '')} {name}".strip()
    assert found[("ddim_step", "fresh")] == "modafill eager-paper eager-folded torch.compile diffusers-ddim triad copy"
    assert found[("conv_gelu_conv", "both")] == "modafill eager eager-channels-last torch.compile eager-linear"
    assert set(found) == {
        *((op, mode) for op in ("masked_reverse_step", "randn", "ddim_step") for mode in ("fresh", "out")),
        *((op, mode) for op in ("prompt_attention", "conv_gelu_conv") for mode in ("forward", "backward", "both")),
        ("add_noise", "fresh"),
    }


def test_who_is_wrong_or_missing_is_not_timed(speed, suites):
    timed: list[Callable[[], Any]] = []

    class Benchmark:
        def __call__(self, run: Callable[[], Any]) -> None:
            timed.append(run)

    def attempt(name: str, contender: Callable[[], Contender]) -> None:
        problem = _Problem({"only": contender})
        problem.sets = 2
        case = Case("op", "fresh", (4, 3), torch.float32, torch.device("cpu"), 1, lambda _: problem)
        speed.test_speed(case, name, Benchmark())

    with pytest.raises(AssertionError, match="off by"):
        attempt("only", lambda: _right(correct=False))
    with pytest.raises(pytest.skip.Exception, match="not today"):
        attempt("only", _absent)
    with pytest.raises(pytest.skip.Exception, match="no form for this shape"):
        attempt("other", _right)
    assert timed == []
    attempt("only", lambda: Contender(lambda i: i, lambda: Check(True, 0.0), 1))
    assert [timed[0]() for _ in range(3)] == [0, 1, 0]


def test_a_rival_multiplies_in_the_same_precision_or_a_higher_one() -> None:
    half = {"precision": "bfloat16"}
    rows = [
        _row("modafill", 4.0, precision="float32"),
        _row("modafill-bfloat16", 2.0, **half),
        _row("eager", 8.0, precision="float32"),
        _row("eager-bfloat16", 3.0, **half),
    ]
    cell = report.columns(rows)["× rival"]
    assert [cell(row, rows) for row in rows] == ["2.00", "1.50", "", ""]
    assert [cell(row, rows[:3]) for row in rows[:2]] == ["2.00", "4.00"]
    quick = _row("eager", 2.5, precision="float32")
    assert [cell(row, [*rows, quick]) for row in rows[:2]] == ["0.62", "1.25"], "where bfloat16 is the slower one"
    # Of ops that take their inputs' precision.
    assert cell(_row("modafill", 4.0), [_row("eager", 6.0)]) == "1.50"


def test_rows_of_a_gpu_are_compared_whatever_the_host_has() -> None:
    rows = {n: _result(_row("modafill", 1.0, device="cuda", threads=n)) for n in (8, 16)}
    found = compare.compare({"x": rows[16]}, compare.index({"x": rows[8]}))
    assert (len(found.pairs), found.only_now, found.only_then) == (1, 0, 0)
    other = {n: _result(_row("modafill", 1.0, threads=n)) for n in (1, 2)}
    found = compare.compare({"x": other[2]}, compare.index({"x": other[1]}))
    assert (len(found.pairs), found.only_now, found.only_then) == (0, 1, 1)
