"""Large stores: shards that survive their process, and memory that does not grow."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modafill import ModalityImputer
from modafill.bulk import impute_store
from modafill.data import FeatureStore, StoreWriter
from modafill.diffusion import Sampling

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


@pytest.fixture
def imputer(make_admc: Any) -> ModalityImputer:
    return ModalityImputer(make_admc("clean"))


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


@pytest.mark.parametrize("shard_rows", [1, 7, 10, 29])
def test_shards_come_together_as_if_there_had_been_none(
    imputer: ModalityImputer, tmp_path: Path, shard_rows: int
) -> None:
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        # One row at a time, so that the networks see the same batches.
        list(impute_store(imputer, store, tmp_path / "whole.h5", seed=3, n_samples=2, batch_size=1))
        found = impute_store(
            imputer, store, tmp_path / "out.h5", seed=3, n_samples=2, batch_size=1, shard_rows=shard_rows
        )
        assert list(found) == list(range(1, ROWS + 1))
    assert same(tmp_path / "whole.h5", tmp_path / "out.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5", "out.h5", "whole.h5"]


def test_what_was_finished_is_not_done_again(
    imputer: ModalityImputer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    complete = imputer.complete
    monkeypatch.setattr(
        imputer, "complete", lambda batch, **more: seen.extend(batch.row_id.tolist()) or complete(batch, **more)
    )
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        options = {"seed": 3, "batch_size": 4, "shard_rows": 8}
        list(impute_store(imputer, store, tmp_path / "whole.h5", **options))
        seen.clear()
        progress = impute_store(imputer, store, tmp_path / "out.h5", **options)
        while next(progress) < 20:
            pass
        progress.close()
        assert seen == list(range(20))
        assert not (tmp_path / "out.h5").exists()
        shards = tmp_path / ".out.h5.shards"
        assert sorted(path.name for path in shards.iterdir()) == [
            "000000000000.h5", "000000000008.h5", "call.json", "lock",
        ]  # fmt: skip
        with pytest.raises(ValueError, match=r"\.out\.h5\.shards: holds shards of a call with other seed; repeat"):
            list(impute_store(imputer, store, tmp_path / "out.h5", **{**options, "seed": 4}))
        seen.clear()
        assert list(impute_store(imputer, store, tmp_path / "out.h5", **options)) == [16, 20, 24, 28, 30]
        assert seen == list(range(16, 30))
        with torch.no_grad():
            next(imputer.parameters()).add_(1.0)
        progress = impute_store(imputer, store, tmp_path / "out2.h5", **options)
        while next(progress) < 12:
            pass
        with pytest.raises(ValueError, match="another process is writing shards there"):
            next(impute_store(imputer, store, tmp_path / "out2.h5", **options))
        progress.close()
        with torch.no_grad():
            next(imputer.parameters()).sub_(0.5)
        with pytest.raises(ValueError, match="other weights; repeat that call or remove the folder"):
            list(impute_store(imputer, store, tmp_path / "out2.h5", **options))
        with pytest.raises(ValueError, match="shard_rows: got 0, expected at least 1"):
            list(impute_store(imputer, store, tmp_path / "out3.h5", shard_rows=0))
    assert same(tmp_path / "whole.h5", tmp_path / "out.h5")
    assert not shards.exists()


def test_shards_of_nobody_knows_whom_are_not_trusted(imputer: ModalityImputer, tmp_path: Path) -> None:
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        options = {"batch_size": 4, "shard_rows": 8}
        list(impute_store(imputer, store, tmp_path / "whole.h5", seed=3, **options))
        progress = impute_store(imputer, store, tmp_path / "out.h5", seed=4, **options)
        while next(progress) < 12:
            pass
        progress.close()
        (tmp_path / ".out.h5.shards" / "call.json").unlink()
        done = list(impute_store(imputer, store, tmp_path / "out.h5", seed=3, **options))
        assert done[:2] == [4, 8]
        assert same(tmp_path / "whole.h5", tmp_path / "out.h5")
        # A call that came to nothing is in nobody's way.
        imputer.sampling = Sampling(steps=10**6)
        with pytest.raises(ValueError, match="evaluations: got 1000000"):
            list(impute_store(imputer, store, tmp_path / "out3.h5", seed=3, **options))
        imputer.sampling = Sampling()
        list(impute_store(imputer, store, tmp_path / "out3.h5", seed=3, **options))
        assert same(tmp_path / "whole.h5", tmp_path / "out3.h5")


SCRIPT = """
import sys
from pathlib import Path
from modafill import ModalityImputer
from modafill.bulk import impute_store
from modafill.data import FeatureStore
model, source, out, shard_rows = sys.argv[1:]
imputer = ModalityImputer.from_pretrained(model)
with FeatureStore(source) as store:
    for done in impute_store(imputer, store, Path(out), seed=3, batch_size=2, shard_rows=int(shard_rows)):
        print(done, flush=True)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_dies_loses_no_finished_shard(
    imputer: ModalityImputer, tmp_path: Path, kind: signal.Signals
) -> None:
    imputer.save_pretrained(tmp_path / "model")
    write_store(tmp_path / "in.h5", 400)

    def begin(out: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "in.h5"), out, "40"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    process = begin(str(tmp_path / "out.h5"))
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 130:
            process.send_signal(kind)
            break
    process.communicate()
    assert process.returncode != 0
    finished = sorted(path.name for path in (tmp_path / ".out.h5.shards").glob("[0-9]*.h5"))
    assert len(finished) >= 3
    times = {name: (tmp_path / ".out.h5.shards" / name).stat().st_mtime_ns for name in finished}
    time.sleep(0.01)
    again = begin(str(tmp_path / "out.h5"))
    first = int(again.stdout.readline())  # type: ignore[union-attr]
    assert first == 40 * len(finished)
    assert all((tmp_path / ".out.h5.shards" / name).stat().st_mtime_ns == t for name, t in times.items())
    assert again.communicate()[1] == ""
    whole = begin(str(tmp_path / "whole.h5"))
    assert whole.communicate()[1] == ""
    assert same(tmp_path / "whole.h5", tmp_path / "out.h5")


MEMORY = """
import resource, sys
from pathlib import Path
from modafill import ModalityImputer
from modafill.bulk import impute_store
from modafill.data import FeatureStore
model, source, out = sys.argv[1:]
imputer = ModalityImputer.from_pretrained(model, steps=1)
peaks = []
with FeatureStore(source) as store:
    for done in impute_store(imputer, store, Path(out), shard_rows=4096, batch_size=512):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[len(peaks) // 4], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(make_admc: Any, tmp_path: Path) -> None:
    """Its completions are 123 MB, of which three quarters are made between the two figures."""
    wide = make_admc("clean", width=256, adn_width=8, textcnn_filters=4)
    ModalityImputer(wide).save_pretrained(tmp_path / "model")
    write_store(tmp_path / "in.h5", 40_000)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "model"), str(tmp_path / "in.h5"), str(tmp_path / "out.h5")],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    quarter, whole = map(int, run.stdout.split())
    assert whole - quarter < 40_000  # kilobytes
    with FeatureStore(tmp_path / "out.h5") as out:
        assert len(out) == 40_000


def test_progress_has_a_rate_and_the_time_left(imputer: ModalityImputer, tmp_path: Path) -> None:
    imputer.save_pretrained(tmp_path / "model")
    write_store(tmp_path / "in.h5", 3000)
    code = "import modafill.cli as c; c._SECONDS_BETWEEN_LINES = 0; c.main()"
    command = [sys.executable, "-c", code, "impute", tmp_path / "model", tmp_path / "in.h5", tmp_path / "out.h5"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"imputing: 2048 of 3000, [\d.e+]+/s, about \d+ min left", run.stderr)
    assert len(contents(tmp_path / "out.h5")["y"]) == 3000
