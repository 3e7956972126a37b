"""``python tests`` has to fail where anything failed, died or was never run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tests_main", TESTS / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _junit(path: Path, **count: int) -> Path:
    attributes = " ".join(f'{key}="{value}"' for key, value in count.items())
    path.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
    return path


@pytest.mark.parametrize(
    ("count", "status", "may_be_empty", "expected"),
    [
        ({"tests": 9, "failures": 0, "errors": 0, "skipped": 2}, 0, False, "7 passed, 0 failed, 2 skipped"),
        ({"tests": 9, "failures": 1, "errors": 2, "skipped": 0}, 1, False, "6 passed, 3 failed, 0 skipped"),
        ({"tests": 1, "failures": 0, "errors": 1, "skipped": 0}, 2, False, "0 passed, 1 failed, 0 skipped"),
        ({"tests": 0, "failures": 0, "errors": 0, "skipped": 0}, 5, False, "0 passed, 1 failed, 0 skipped"),
        ({"tests": 0, "failures": 0, "errors": 0, "skipped": 0}, 5, True, "0 passed, 0 failed, 0 skipped"),
        # A whole module that skips itself leaves pytest with no test and this status.
        ({"tests": 1, "failures": 0, "errors": 0, "skipped": 1}, 5, False, "0 passed, 0 failed, 1 skipped"),
        # All passed, then the process crashed on its way out.
        ({"tests": 3, "failures": 0, "errors": 0, "skipped": 0}, -11, False, "3 passed, 1 failed, 0 skipped"),
    ],
)
def test_totals_of_a_process(
    runner: ModuleType, tmp_path: Path, count: dict[str, int], status: int, may_be_empty: bool, expected: str
) -> None:
    junit = _junit(tmp_path / "junit.xml", **count)
    assert str(runner.read_totals(junit, status, may_be_empty=may_be_empty)) == expected


@pytest.mark.parametrize("status", [-11, 1, 5])
def test_a_process_that_left_no_report_has_failed(runner: ModuleType, tmp_path: Path, status: int) -> None:
    assert runner.read_totals(tmp_path / "none.xml", status, may_be_empty=True).failed == 1


def test_groups_cover_each_directory_of_tests_once(runner: ModuleType) -> None:
    assert runner.GROUPS["main"].paths == ("tests",)
    assert {path for name in runner.GROUPS if name != "main" for path in runner.GROUPS[name].paths} == set(runner.APART)
    assert runner.GROUPS["main"].without == runner.APART
    assert all((TESTS.parent / path).is_dir() for path in runner.APART)


def test_an_unknown_group_is_a_mistake_of_the_caller() -> None:
    done = subprocess.run([sys.executable, str(TESTS), "gpus"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpus" in done.stderr


def test_a_missing_test_tool_is_one_line() -> None:
    code = f"import runpy, sys; sys.modules['pytest'] = None; runpy.run_path({str(TESTS)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "gpu"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: not installed: pytest; pip install '.[test]' first\n"


def test_without_a_gpu_the_reason_stands_there_once() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(TESTS), "gpu"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("no CUDA GPU") == 1
    assert re.fullmatch(r"0 passed, 0 failed, \d+ skipped", done.stdout.splitlines()[-1])
