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

import pytest
import torch
from support.bulk import ROWS, contents, same, write_store

from modafill import ModalityImputer
from modafill.bulk import impute_store
from modafill.data import FeatureStore
from modafill.diffusion import Sampling


@pytest.fixture
def imputer(make_admc: Any) -> ModalityImputer:
    return ModalityImputer(make_admc("clean"))


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
        names = ["000000000000.h5", "000000000008.h5"]
        checksums = [f"{name}.sha256" for name in names]
        assert sorted(path.name for path in shards.iterdir()) == [*checksums, "call.json", "lock", "shards"]
        assert sorted(path.name for path in (shards / "shards").iterdir()) == names
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
    finished = sorted(path.stem for path in (tmp_path / ".out.h5.shards").glob("*.sha256"))
    assert len(finished) >= 3
    times = {name: (tmp_path / ".out.h5.shards/shards" / name).stat().st_mtime_ns for name in finished}
    time.sleep(0.01)
    again = begin(str(tmp_path / "out.h5"))
    first = int(again.stdout.readline())  # type: ignore[union-attr]
    assert first == 40 * len(finished)
    assert all((tmp_path / ".out.h5.shards/shards" / name).stat().st_mtime_ns == t for name, t in times.items())
    assert again.wait(300) == 0
    whole = begin(str(tmp_path / "whole.h5"))
    assert whole.wait(300) == 0
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
    code = "from modafill import cli, terminal; terminal._SECONDS_BETWEEN_LINES = 0; cli.main()"
    command = [sys.executable, "-c", code, "impute", tmp_path / "model", tmp_path / "in.h5", tmp_path / "out.h5"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"imputing: 2048 of 3000, [\d.e+]+/s, about \d+ min left", run.stderr)
    assert len(contents(tmp_path / "out.h5")["y"]) == 3000
