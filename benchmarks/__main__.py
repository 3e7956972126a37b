"""``python -m modafill.benchmarks --suite step --json OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modafill.benchmarks import run


def main() -> int:
    """Run the suite that the command line names; exit status 2 for a mistake in it."""
    parser = argparse.ArgumentParser(prog="python -m modafill.benchmarks", description="Time modafill's ops.")
    parser.add_argument("--suite", default="step", help="which suite, or all (default: step)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="CPU thread counts (default: 1 and torch's own: OMP_NUM_THREADS or all cores)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the benchmark, measures nothing")
    given = parser.parse_args()
    try:
        run(given.suite, json_path=given.json, threads=given.threads, device=given.device, quick=given.quick)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
