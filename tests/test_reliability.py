"""Bad days of an imputation: no memory, no space, no right to write."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bulk import ROWS, contents, same, write_store

from modafill import ModalityImputer
from modafill.bulk import impute_store, recognise_store
from modafill.bulk import stores as bulk_stores
from modafill.data import FeatureStore, convert


@pytest.fixture
def imputer(make_admc: Any) -> ModalityImputer:
    return ModalityImputer(make_admc("clean"))


def limit(imputer: ModalityImputer, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Let completions and recognitions of more than ``most`` rows fail; the batches that are tried."""
    tried: list[int] = []
    complete, recognise = imputer.complete, imputer.model.recognise

    def guarded(work: Any) -> Any:
        def run(batch: Any, **options: Any) -> Any:
            tried.append(len(batch))
            if len(batch) > most:
                raise error
            return work(batch, **options)

        return run

    monkeypatch.setattr(imputer, "complete", guarded(complete))
    monkeypatch.setattr(imputer.model, "recognise", guarded(recognise))
    return tried


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …")


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "error",
    [CPU, MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("CUDA error: out of memory"), CUBLAS],
    ids=["PyTorch's", "Python's", "C++'s", "CUDA's", "cuBLAS's"],
)
def test_where_memory_runs_out_it_goes_on_with_less(
    imputer: ModalityImputer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, error: Exception
) -> None:
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        list(impute_store(imputer, store, tmp_path / "whole.h5", batch_size=16))
        list(recognise_store(imputer, store, tmp_path / "whole.csv", batch_size=16))
        tried = limit(imputer, monkeypatch, 5, error)
        with caplog.at_level(logging.WARNING):
            assert list(impute_store(imputer, store, tmp_path / "out.h5", batch_size=16)) == [*range(4, 30, 4), ROWS]
        assert tried == [16, 8, *[4] * 7, 2]
        assert [record.getMessage() for record in caplog.records] == [
            "out of memory with 16 rows at a time; going on with 8",
            "out of memory with 8 rows at a time; going on with 4",
        ]
        list(recognise_store(imputer, store, tmp_path / "out.csv", batch_size=16))
        whole, found = contents(tmp_path / "whole.h5"), contents(tmp_path / "out.h5")
        for name, values in whole.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5)
            else:
                assert np.array_equal(found[name], values)
        assert len((tmp_path / "out.csv").read_text().splitlines()) == ROWS + 1
        # Of a single row there is no half.
        limit(imputer, monkeypatch, 0, error)
        with pytest.raises(MemoryError, match=r"in\.h5: out of memory with row 0 alone"):
            list(impute_store(imputer, store, tmp_path / "none.h5", batch_size=16))
        assert not (tmp_path / "none.h5").exists()


def test_other_errors_are_no_lack_of_memory(
    imputer: ModalityImputer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit(imputer, monkeypatch, 5, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with FeatureStore(write_store(tmp_path / "in.h5")) as store, pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(impute_store(imputer, store, tmp_path / "out.h5", batch_size=16))
    assert tried == [16]


def impute(tmp_path: Path, out: Path, most_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command, which cannot make files of more than ``most_bytes``, as if the disk were full."""

    def begin() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    arguments = ["impute", tmp_path / "model", tmp_path / "in.h5", out, "--batch-size", "512", "--shard-rows", "512"]
    return subprocess.run(
        [sys.executable, "-m", "modafill", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=begin,
    )  # fmt: skip


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_finished(make_admc: Any, tmp_path: Path) -> None:
    ModalityImputer(make_admc("clean", width=64)).save_pretrained(tmp_path / "model")
    write_store(tmp_path / "in.h5", 4096)
    whole, one = tmp_path / "whole.h5", tmp_path / "folder" / "out.h5"
    assert impute(tmp_path, whole).returncode == 0
    one.parent.mkdir()
    # Shards fit, the whole does not.
    full = impute(tmp_path, one, whole.stat().st_size // 2)
    assert full.returncode == 2
    assert full.stderr.startswith("modafill: ")
    assert full.stderr.count("\n") == 1, full.stderr
    assert [path.name for path in one.parent.iterdir()] == [".out.h5.shards"]
    shards = sorted((one.parent / ".out.h5.shards/shards").glob("*.h5"))
    assert len(shards) == 8
    made = [path.stat().st_mtime_ns for path in shards]
    # Not even a shard fits.
    none = impute(tmp_path, tmp_path / "none.h5", 20_000)
    assert none.returncode == 2
    assert none.stderr.count("\n") == 1, none.stderr
    assert not (tmp_path / ".none.h5.shards").exists()
    table = impute(tmp_path, tmp_path / "none.parquet", whole.stat().st_size // 2)
    assert table.returncode == 2
    assert not list(tmp_path.glob("*none.parquet*.tmp"))
    assert [path.stat().st_mtime_ns for path in shards] == made
    assert impute(tmp_path, one).returncode == 0
    assert one.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_full_disk_leaves_a_training_to_be_gone_on_with(tiny: Any, tmp_path: Path) -> None:
    convert(tiny.archive, tmp_path / "tiny.h5", tiny.mapping)
    arguments = [str(tmp_path / "tiny.h5") if word == str(tiny.archive) else word for word in tiny.train_arguments]
    at = arguments.index("--mapping")
    del arguments[at : at + 2]

    def train(most: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "modafill", *arguments, "--out", str(tmp_path / "run")],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most)),
        )  # fmt: skip

    # The encoders fit, the tokens do not.
    full = train(max(path.stat().st_size for path in tiny.run.glob("fold*/stages/encoder-*")) + 100)
    assert full.returncode == 2, full.stderr
    assert "tokens.safetensors: cannot be written" in full.stderr
    assert "Traceback" not in full.stderr
    stages = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("run/fold*/stages/*")}
    assert sorted(stages) == [f"encoder-{name}.safetensors" for name in ("audio", "text", "vision")]
    assert not list(tmp_path.glob("run/fold*/stages/.*"))
    done = train(resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    assert {
        path.name: path.stat().st_mtime_ns for path in tmp_path.glob("run/fold*/stages/*")
    }.items() >= stages.items()
    (model,) = tmp_path.glob("run/fold*/model/model.safetensors")
    assert model.read_bytes() == next(tiny.run.glob("fold*/model/model.safetensors")).read_bytes()


def test_where_nothing_may_be_written_nothing_is_done(
    imputer: ModalityImputer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit(imputer, monkeypatch, 1000, MemoryError())
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        for shard_rows in (8, 1000):
            with pytest.raises(OSError, match="/proc"):
                list(impute_store(imputer, store, Path("/proc/out.h5"), batch_size=4, shard_rows=shard_rows))
    assert tried == []


def test_two_at_once_for_one_file_are_refused(imputer: ModalityImputer, tmp_path: Path) -> None:
    """Nor does a call that looked before the other had ended take the place of what that made."""
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        first, late = (
            impute_store(imputer, store, tmp_path / "out.h5", batch_size=4, seed=seed, shard_rows=rows)
            for seed, rows in ((1, None), (2, 8))
        )
        next(first)
        with pytest.raises(ValueError, match="another process is writing shards there"):
            next(late)
        with pytest.MonkeyPatch.context() as patch:
            # Its first look, before it waits for the folder.
            patch.setattr(bulk_stores, "_check", lambda *_: list(first))
            with pytest.raises(FileExistsError, match=r"out\.h5: exists already"):
                next(impute_store(imputer, store, tmp_path / "out.h5", batch_size=4, seed=2))
        list(impute_store(imputer, store, tmp_path / "same.h5", batch_size=4, seed=1))
    assert same(tmp_path / "out.h5", tmp_path / "same.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5", "out.h5", "same.h5"]


def test_two_at_once_in_one_folder_are_refused(imputer: ModalityImputer, tmp_path: Path) -> None:
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        first = impute_store(imputer, store, tmp_path / "out", batch_size=4, shard_rows=8)
        next(first)
        with pytest.raises(ValueError, match="another process is writing shards there"):
            next(impute_store(imputer, store, tmp_path / "out", batch_size=4, shard_rows=8))
        assert list(first)[-1] == ROWS
        list(impute_store(imputer, store, tmp_path / "one", batch_size=4, shard_rows=8))
    paths = sorted((tmp_path / "one").glob("*.h5"))
    assert len(paths) == 4
    assert all(same(path, tmp_path / "out" / path.name) for path in paths)


@pytest.mark.slow
def test_kills_lose_nothing() -> None:
    """``python -m support.kills --count 50`` is the longer of it."""
    command = [sys.executable, "-m", "support.kills", "--count", "2", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    for report in json.loads(done.stdout).values():
        assert report["kills"] == 2
        assert report["rounds"] >= 1
        assert report["corrupt_files"] == report["lost_shards"] == report["other_results"] == 0
