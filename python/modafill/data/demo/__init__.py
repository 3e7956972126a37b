"""A small real data set for demonstrations; its source and licence are in ``ATTRIBUTION.md``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def demo_path() -> Path:
    """The path of ``digits.npz``: 2,000 handwritten digits in three feature sets (mapping ``digits``)."""
    path = resources.files(__name__) / "digits.npz"
    if not isinstance(path, Path):
        raise ValueError("the demonstration data need modafill to be installed as files, not inside an archive")
    return path
