"""``python -m modafill.benchmarks``: what ``modafill bench`` is, with the same options."""

from __future__ import annotations

import sys

from modafill.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
