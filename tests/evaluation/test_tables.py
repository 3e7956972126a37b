"""Tables by hand."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from rich.console import Console

from modafill.evaluation.tables import AVERAGE, FULL, Record, make_tables, save_tables

SETS = ["{a}", "{t}", "{v}", "{at}", "{av}", "{tv}"]


@pytest.fixture
def records() -> list[Record]:
    """Method "x" with everything; "y" without {v} and the complete set; "z" in the first of the two folds alone."""
    out = []
    for fold in (0, 1):
        for i, available in enumerate(SETS):
            out.append(Record("Q", "UA", "x", available, fold, 7, 0.1 * i + 0.2 * fold))
        out.append(Record("Q", "UA", "x", FULL, fold, 7, 0.9))
        out.append(Record("Q", "NRMSE", "x", "{a}", fold, 7, 1.5))
        out += [Record("Q", "UA", "y", available, fold, 7, 0.5) for available in SETS if available != "{v}"]
    out += [Record("Q", "UA", "z", available, 0, 7, 0.5) for available in SETS]
    return out


def test_cells(records):
    recognition, error = make_tables(records)
    assert recognition.columns == (*SETS, AVERAGE, FULL)
    x, y = recognition.cells["x"], recognition.cells["y"]
    spread = math.sqrt(2 * 0.1**2)  # of two values 0.2 apart, n - 1 in the denominator
    for i, available in enumerate(SETS):
        assert x[available] == pytest.approx((0.1 * i + 0.1, spread))
    assert x[AVERAGE] == pytest.approx((0.35, spread))
    assert x[FULL] == (0.9, 0)
    # Neither an average over the easier sets nor one over fewer trainings than the title says.
    assert set(y) == {*SETS} - {"{v}"}
    assert recognition.cells["z"] == {}
    assert recognition.trials == 2
    assert error.columns == ("{a}", AVERAGE)
    assert error.cells == {"x": {"{a}": (1.5, 0.0), AVERAGE: (1.5, 0.0)}}


def test_average_is_taken_within_a_fold_first():
    """Its spread is that of the folds' averages: here 0, though every single cell varies."""
    values = {(0, "{a}"): 0.2, (0, "{t}"): 0.8, (1, "{a}"): 0.8, (1, "{t}"): 0.2}
    (table,) = make_tables([Record("Q", "UA", "x", name, fold, 0, value) for (fold, name), value in values.items()])
    assert table.cells["x"][AVERAGE] == pytest.approx((0.5, 0.0))
    assert table.cells["x"]["{a}"][1] > 0.4


def test_seeds_and_folds_are_trials():
    (table,) = make_tables([Record("Q", "UA", "x", "{a}", fold, seed, 0.5) for fold in (0, 1) for seed in (0, 1, 2)])
    assert table.trials == 6


def test_text(records):
    recognition, error = make_tables(records)
    assert recognition.title == "Q — UA (higher is better; mean ± std of 2)"
    assert error.title == "Q — NRMSE (lower is better; mean ± std of 2)"
    x, y, z = recognition.rows()
    assert x == ["x", *(f"{10 * i + 10:.1f} ± 14.1" for i in range(6)), "35.0 ± 14.1", "90.0 ± 0.0"]
    assert y == ["y", "50.0 ± 0.0", "50.0 ± 0.0", "–", *["50.0 ± 0.0"] * 3, "–", "–"]
    assert z == ["z", *["–"] * 8]
    assert error.rows() == [["x", "1.500 ± 0.000", "1.500 ± 0.000"]]
    assert recognition.markdown("the protocol").splitlines() == [
        "**Q — UA (higher is better; mean ± std of 2)**",
        "",
        "the protocol",
        "",
        "| method | {a} | {t} | {v} | {at} | {av} | {tv} | average | full |",
        "| --- |" + " ---: |" * 8,
        f"| {' | '.join(x)} |",
        f"| {' | '.join(y)} |",
        f"| {' | '.join(z)} |",
    ]


def test_narrow_terminals_cut_no_figure(records):
    for width in range(60, 140):
        console = Console(width=width, file=io.StringIO())
        console.print(make_tables(records)[0].rich(width))
        text = console.file.getvalue()
        assert "…" not in text
        assert text.count("14.1") == 7
        assert max(map(len, text.splitlines())) <= width
        assert ("35.0 ± 14.1" in text) == (width >= 109)


@pytest.mark.parametrize("modalities", [3, 4, 6])
def test_many_sets_cut_no_figure_either(modalities):
    sets = [f"{{{'x' * size}{i}}}" for size in range(1, modalities) for i in range(math.comb(modalities, size))]
    values = {name: 0.1234 + i / 1000 for i, name in enumerate(sets)}
    records = [
        Record("Q", metric, "a method, probabilities averaged", name, fold, 0, value)
        for metric in ("UA", "CRPS")
        for fold in (0, 1)
        for name, value in values.items()
    ]
    for table in make_tables(records):
        console = Console(width=80, file=io.StringIO())
        console.print(table.rich(80))
        text = console.file.getvalue()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        for value in values.values():
            assert (f"{100 * value:.1f}" if table.metric == "UA" else f"{value:.3f}") in text


def test_one_trial_has_no_spread(records):
    (table,) = make_tables([r for r in records if r.method == "z"])
    assert table.rows() == [["z", *["50.0"] * 7]]
    assert table.title == "Q — UA (higher is better)"


def test_files(records, tmp_path):
    save_tables(tmp_path / "results", records, make_tables(records), "about it", {"n_samples": 4})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.csv", "results.json", "results.md"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["about"] == "about it"
    assert content["protocol"] == {"n_samples": 4}
    assert [Record(**record) for record in content["records"]] == records
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [
        Record(**{**r, "fold": int(r["fold"]), "seed": int(r["seed"]), "value": float(r["value"])}) for r in rows
    ] == records
    text = (tmp_path / "results.md").read_text()
    assert text == "\n".join(table.markdown("about it") for table in make_tables(records))
