"""A store of three modalities with holes, and what a store holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modafill.data import FeatureStore, StoreWriter

ROWS = 30


def write_store(path: Path, rows: int = ROWS) -> Path:
    random = np.random.default_rng(0)
    available = random.random((rows, 3)) < 0.6
    available[:, 2] |= ~available.any(1)
    kinds = {"text": "sequence", "audio": "sequence", "vision": "vector"}
    with StoreWriter(
        path,
        modalities=list(kinds),
        widths={"text": 5, "audio": 4, "vision": 3},
        kinds=kinds,
        task={"label": {"name": "y", "kind": "class"}},
    ) as writer:
        lengths = random.integers(1, 6, (2, rows))
        writer.append(
            {
                "text": random.normal(size=(rows, 6, 5)),
                "audio": random.normal(size=(rows, 6, 4)),
                "vision": random.normal(size=(rows, 3)),
            },
            available=available,
            lengths={"text": lengths[0], "audio": lengths[1]},
            ids=[f"clip {i}" for i in range(rows)],
            labels={"y": np.arange(rows) % 4},
            groups={"who": np.arange(rows) // 3},
            order=np.arange(rows),
        )
    return path


def contents(path: Path) -> dict[str, np.ndarray]:
    with FeatureStore(path) as store:
        rows = np.arange(len(store))
        batch = store.read(rows, generated=True)
        return {
            **{name: x.numpy() for name, x in batch.features.items()},
            "available": store.available(),
            "generated": store.generated(),
            "ids": np.asarray(store.ids(rows)),
            "y": store.labels("y"),
            "who": store.groups("who"),
            "order": store.order(),
        }


def same(one: Path, other: Path) -> bool:
    a, b = contents(one), contents(other)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
