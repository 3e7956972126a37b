"""``python tests``: every test, each group in the process that it needs, and one line of totals at the end."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_TESTS = 5
NEEDED = ("modafill", "pytest", "hypothesis", "xdist")
# More processes than this wait for each other's files and memory.
MOST_WORKERS = 8


@dataclass(frozen=True)
class Group:
    """Tests that share a process.

    Attributes:
        paths: relative to the root; a directory takes what lies below it.
        without: directories that belong to other groups.
        environment: variables that the process needs; the interpreter's has to be there before Triton is imported.
        when_named: it repeats what other groups test, and runs only where the command line asks for it.
        alone: one process and not one for each core: they would share a GPU, or build the same thing.
        spread: single tests go to the next free process, and not files, whose tests share what was trained for them.
    """

    paths: tuple[str, ...]
    without: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    when_named: bool = False
    alone: bool = False
    spread: bool = False


APART = ("tests/interpreter", "tests/aot", "tests/gpu", "tests/sanitize")
GROUPS = {
    "main": Group(("tests",), without=APART),
    "interpreter": Group(("tests/interpreter",), environment={"TRITON_INTERPRET": "1"}, spread=True),
    "aot": Group(("tests/aot",), spread=True),
    "gpu": Group(("tests/gpu",), alone=True),
    "sanitize": Group(("tests/sanitize",), when_named=True, alone=True),
}


@dataclass
class Totals:
    """How many tests passed, failed (errors among them) and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def read_totals(junit: Path, status: int, *, may_be_empty: bool) -> Totals:
    """Totals of one pytest process from its JUnit file and exit status.

    A process that died, or that found no test where there should be some, counts as one failure.
    """
    totals = Totals()
    try:
        suites = list(ET.parse(junit).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        suites = []
    for suite in suites:
        count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        totals += Totals(max(0, count["tests"] - failed - count["skipped"]), failed, count["skipped"])
    empty = status == NO_TESTS and bool(suites) and (may_be_empty or totals.skipped > 0)
    if status != 0 and not empty:
        totals.failed = max(totals.failed, 1)
    return totals


def run_group(name: str, *, fast: bool) -> Totals:
    """Run a group in a process of its own, its output going where ours goes."""
    group = GROUPS[name]
    print(f"== {name}", flush=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | group.environment
    workers = 1 if group.alone else min(os.cpu_count() or 1, MOST_WORKERS)
    # Processes that share the cores must not spin while they wait.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-ra", f"--junitxml={junit}", *group.paths]
        command += [f"--ignore={path}" for path in group.without]
        if workers > 1:
            # In the order of collection, which has long files first: one that began last would run alone.
            spread = ["worksteal"] if group.spread else ["loadfile", "--no-loadscope-reorder"]
            command += ["-n", str(workers), "--dist", *spread]
        command += ["-m", "not slow"] if fast else []
        status = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode
        # Only a choice of the fast tests can leave a group with none.
        return read_totals(junit, status, may_be_empty=fast)


def main() -> int:
    """Run the groups that the command line names; exit status 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python tests", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)} (default: all but sanitize)")
    parser.add_argument("--fast", action="store_true", help="leave out the tests marked slow")
    given = parser.parse_args()
    unknown = [name for name in given.groups if name not in GROUPS]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(2, f"error: not installed: {', '.join(missing)}; pip install '.[test]' first\n")
    totals = Totals()
    for name in given.groups or [name for name, group in GROUPS.items() if not group.when_named]:
        totals += run_group(name, fast=given.fast)
    print(totals, flush=True)
    return 1 if totals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
