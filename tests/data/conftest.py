from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modafill.data import FeatureStore, StoreWriter


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """The path of a data file that is not part of the project; skips where it is absent."""
    folder = Path(os.environ.get("MODAFILL_DATA", Path(__file__).parents[3] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder} (set MODAFILL_DATA)")
        return folder / name

    return find


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., FeatureStore]:
    """Writes a store of the vectors ``text [n, 5]``, ``audio [n, 3]``, ``vision [n, 2]`` (or the features given)."""

    def make(n: int = 40, features: dict[str, Any] | None = None, **columns: Any) -> FeatureStore:
        random = np.random.default_rng(7)
        if features is None:
            features = {name: random.normal(size=(n, d)) for name, d in (("text", 5), ("audio", 3), ("vision", 2))}
        sequences = {name for name, x in features.items() if isinstance(x, list) or x.ndim == 3}
        path = tmp_path / f"store{len(list(tmp_path.glob('*.h5')))}.h5"
        with StoreWriter(
            path,
            modalities=list(features),
            widths={name: x[0].shape[-1] for name, x in features.items()},
            kinds={name: "sequence" if name in sequences else "vector" for name in features},
            steps=columns.pop("steps", None),
            task=columns.pop("task", None),
        ) as writer:
            writer.append(features, **columns)
        return FeatureStore(path)

    return make
