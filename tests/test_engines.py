"""One imputation by every engine: the same bytes, whatever died meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.bulk import contents, same, write_store

from modafill import ModalityImputer, cli
from modafill.bulk import check_shards, clean_up, impute_store, read_manifest
from modafill.bulk.plan import Plan, identify
from modafill.bulk.shards import Job
from modafill.data import FeatureStore, convert
from modafill.errors import MissingExtra

ROWS = 1600
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(make_admc: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``in.h5``, and what one process makes of it without shards, ``out.h5`` and ``out.parquet``."""
    folder = tmp_path_factory.mktemp("engines")
    ModalityImputer(make_admc("clean")).save_pretrained(folder / "model")
    write_store(folder / "in.h5", ROWS)
    for name in ("out.h5", "out.parquet"):
        run(folder, folder / name)
    return folder


def begin(folder: Path, out: Path, *options: str, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    arguments = ["impute", folder / "model", folder / "in.h5", out, "--batch-size", "16", "--seed", "3", *options]
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "modafill", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(folder: Path, out: Path, *options: str, launch: tuple[str, ...] = ()) -> str:
    process = begin(folder, out, *options, launch=launch)
    said, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    return said


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options, launch",
    [
        ("out.h5", ("--shard-rows", "100"), ()),
        ("out.h5", ("--engine", "torchrun"), TORCHRUN),
        ("out.parquet", ("--workers", "2"), ()),
    ],
    ids=["shards", "torchrun", "two processes"],
)
def test_whoever_does_it_writes_the_same_bytes(
    folder: Path, tmp_path: Path, name: str, options: tuple[str, ...], launch: tuple[str, ...]
) -> None:
    assert run(folder, tmp_path / name, *options, launch=launch).count("wrote") == 1
    assert digest(tmp_path / name) == digest(folder / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def until_begun(process: subprocess.Popen[str], shards: Path) -> None:
    """Until two shards are finished."""
    while process.poll() is None and len(list(shards.glob("*.sha256"))) < 2:
        time.sleep(0.01)
    assert process.poll() is None


def processes_of(parent: int, name: str) -> list[int]:
    """Descendants of a process, with ``name`` in their command line."""
    parents, found = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if name in (process / "cmdline").read_text():
                found.append(int(process.name))

    def descends(pid: int) -> bool:
        while pid > 1 and pid != parent:
            pid = parents.get(pid, 0)
        return pid == parent

    return [pid for pid in found if descends(pid)]


@pytest.mark.slow
def test_ray_does_again_what_a_dead_worker_had_begun(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / ".out.h5.shards"
    process = begin(folder, tmp_path / "out.h5", "--shard-rows", "16", "--engine", "ray", "--workers", "2")
    until_begun(process, shards)
    workers = processes_of(process.pid, "ray::MapWorker")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    left = 100 - len(list(shards.glob("*.sha256")))
    said, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert left > 0
    assert "wrote" in said
    assert digest(tmp_path / "out.h5") == digest(folder / "out.h5")


@pytest.mark.slow
@pytest.mark.parametrize("options, launch", [(("--workers", "2"), ()), (("--engine", "torchrun"), TORCHRUN)])
def test_the_death_of_a_worker_loses_no_finished_shard(
    folder: Path, tmp_path: Path, options: tuple[str, ...], launch: tuple[str, ...]
) -> None:
    shards = tmp_path / ".out.h5.shards"
    process = begin(folder, tmp_path / "out.h5", "--shard-rows", "16", *options, launch=launch)
    until_begun(process, shards)
    os.kill(processes_of(process.pid, "impute" if launch else "spawn_main")[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    if not launch:
        assert "a worker process died (killed, or out of memory); the same command goes on" in err
    made = {path.stem: (shards / "shards" / path.stem).stat().st_mtime_ns for path in shards.glob("*.sha256")}
    assert 2 <= len(made) < 100
    # By whomever it is taken up.
    arguments = ["--batch-size", "16", "--seed", "3", "--shard-rows", "16"]
    again = ModalityImputer.from_pretrained(folder / "model")
    with FeatureStore(folder / "in.h5") as store:
        progress = impute_store(again, store, tmp_path / "out.h5", batch_size=16, shard_rows=16, seed=3, threads=1)
        assert next(progress) == 16 * len(made)
        assert {name: (shards / "shards" / name).stat().st_mtime_ns for name in made} == made
        progress.close()
    run(folder, tmp_path / "out.h5", *arguments[4:])
    assert digest(tmp_path / "out.h5") == digest(folder / "out.h5")


@pytest.mark.slow
def test_workers_die_with_who_began_them(folder: Path, tmp_path: Path) -> None:
    process = begin(folder, tmp_path / "out.h5", "--shard-rows", "16", "--workers", "2")
    until_begun(process, tmp_path / ".out.h5.shards")
    workers = processes_of(process.pid, "spawn_main")
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # they cannot look for it themselves
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_workers_die_with_who_dies_while_they_start(tmp_path: Path) -> None:
    """They import for seconds before they can ask to be told."""
    script = tmp_path / "begin.py"
    script.write_text(
        """
import multiprocessing
import os
import signal
import time
from modafill.processes import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as pool:
        for _ in range(2):
            pool.submit(time.sleep, 600)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    with (tmp_path / "pids").open("w") as pids:  # not a pipe, which would stay open as long as they live
        subprocess.run([sys.executable, str(script)], stdout=pids)
    workers = (tmp_path / "pids").read_text().split()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_where_all_shards_are_there_they_are_put_together(folder: Path, tmp_path: Path, engine: str) -> None:
    imputer = ModalityImputer.from_pretrained(folder / "model")
    options = {"batch_size": 16, "shard_rows": 400, "seed": 3, "threads": 1, "workers": 2}
    with FeatureStore(folder / "in.h5") as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "merge", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            list(impute_store(imputer, store, tmp_path / "out.h5", **options))
    with FeatureStore(folder / "in.h5") as store:
        assert list(impute_store(imputer, store, tmp_path / "out.h5", engine=engine, **options)) == [ROWS]
    assert digest(tmp_path / "out.h5") == digest(folder / "out.h5")


def test_a_worker_of_another_kind_is_refused(make_admc: Any, tmp_path: Path) -> None:
    imputer = ModalityImputer(make_admc("clean"))
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        plan = Plan(tmp_path, ROWS, 16, 16, 1, 0, ".h5", identify(imputer, store, torch.get_num_threads()))
        Job(imputer, store, plan).check(plan.call)
        for name, other in (("instructions", ["v3", "AVX2", False]), ("versions", ["0.0"]), ("weights", "")):
            with pytest.raises(ValueError, match=rf"worker: has {name} .* expected what the plan was made with"):
                Job(imputer, store, plan).check({**plan.call, name: other})


def test_a_folder_of_shards_has_a_manifest_that_fits(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", "--shard-rows", "300")
    manifest = json.loads((tmp_path / "out/_manifest.json").read_text())
    assert manifest["rows"] == ROWS
    assert [shard["rows"] for shard in manifest["shards"]] == [[i, min(i + 304, ROWS)] for i in range(0, ROWS, 304)]
    names = [shard["file"] for shard in manifest["shards"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "_manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = contents(folder / "out.h5")
    parts = [contents(tmp_path / "out" / name) for name in names]
    assert all(np.array_equal(np.concatenate([part[name] for part in parts]), whole[name]) for name in whole)
    for shard in manifest["shards"]:
        assert digest(tmp_path / "out" / shard["file"]) == shard["sha256"]
        assert (tmp_path / "out" / shard["file"]).stat().st_size == shard["bytes"]


def test_a_folder_of_shards_is_inspected(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(folder, out, "--shard-rows", "300")
    monkeypatch.setattr(sys, "argv", ["modafill", "inspect", str(out)])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    said = capsys.readouterr().out
    assert said == f"{out}: {ROWS:,} completed samples in 6 shards, all as in _manifest.json\n"
    manifest = json.loads((out / "_manifest.json").read_text())
    first, second, third = (out / shard["file"] for shard in manifest["shards"][:3])
    damaged = bytearray(first.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    first.write_bytes(damaged)
    second.unlink()
    third.write_bytes(third.read_bytes()[:-1])
    (out / "other.h5").touch()
    wrong = f"{first.name} is damaged, {second.name} is absent, {third.name} is damaged"
    with pytest.raises(ValueError, match=f"^{out}: {wrong}, other.h5 is not in _manifest.json$"):
        list(check_shards(out, read_manifest(out)))
    for change, reason in (
        ({"version": 2}, "version 2, expected 'modafill-shards', version 1"),
        ({"rows": ROWS + 1}, f"its shards have {ROWS} rows, expected {ROWS + 1}"),
        ({"shards": manifest["shards"][1:]}, "expected those from 0"),
        ({"shards": [{"file": "../x", "rows": [0, ROWS]}]}, "expected the name of a file in the folder"),
        ({"shards": None}, "its shards have 0 rows"),
    ):
        (out / "_manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=reason):
            read_manifest(out)


@pytest.mark.parametrize("shards", [False, True], ids=["one table", "a folder"])
def test_a_table_has_what_a_store_has(folder: Path, tmp_path: Path, shards: bool) -> None:
    out = folder / "out.parquet"
    if shards:
        out = tmp_path / "out"
        run(folder, out, "--shard-format", "parquet", "--shard-rows", "400")
        assert len(list(out.glob("*.parquet"))) == 4
    table = pq.read_table(out)
    expected = contents(folder / "out.h5")
    with FeatureStore(folder / "out.h5") as store:
        for m, name in enumerate(store.modalities):
            found = np.stack(table[name].to_pylist())
            assert np.array_equal(found.astype(np.float32), expected[name])
            assert np.array_equal(table[f"{name}.available"], expected["available"][:, m])
            assert np.array_equal(table[f"{name}.generated"], expected["generated"][:, m])
    assert table["id"].to_pylist() == expected["ids"].tolist()
    assert table["label.y"].to_pylist() == expected["y"].tolist()
    assert table["group.who"].to_pylist() == expected["who"].tolist()
    assert table["order"].to_pylist() == expected["order"].tolist()
    if not shards:
        assert json.loads(pq.read_schema(out).metadata[b"modafill"])["label"]["name"] == "y"


def test_a_table_of_sequences_keeps_their_lengths(tiny_cdtp: Any, tmp_path: Path) -> None:
    imputer = ModalityImputer.from_pretrained(tiny_cdtp.run / "fold0-seed0/model")
    convert(tiny_cdtp.archive, tmp_path / "in.h5", tiny_cdtp.mapping)
    with FeatureStore(tmp_path / "in.h5") as store:
        for name in ("out.h5", "out.parquet"):
            list(impute_store(imputer, store, tmp_path / name, seed=1, batch_size=8, shard_rows=40))
    table = pq.read_table(tmp_path / "out.parquet")
    with FeatureStore(tmp_path / "out.h5") as done:
        batch = done.read(np.arange(len(done)), generated=True)
        assert len(set(batch.lengths["audio"].tolist())) > 2
        for name in done.modalities:
            for row, steps in enumerate(table[name].to_pylist()):
                length = int(batch.lengths[name][row])
                assert np.array_equal(np.float32(steps), batch.features[name][row, :length].numpy())


def test_a_shard_that_does_not_fit_its_checksum_is_made_again(make_admc: Any, tmp_path: Path) -> None:
    imputer, options = ModalityImputer(make_admc("clean")), {"batch_size": 4, "shard_rows": 8}
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        list(impute_store(imputer, store, tmp_path / "whole.h5", **options))
        progress = impute_store(imputer, store, tmp_path / "out.h5", **options)
        while next(progress) < 28:
            pass
        progress.close()
        _, second, third = sorted((tmp_path / ".out.h5.shards/shards").glob("*.h5"))
        damaged = bytearray(second.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        second.write_bytes(damaged)
        third.unlink()
        progress = impute_store(imputer, store, tmp_path / "out.h5", **options)
        assert next(progress) == 8
        progress.close()
        list(impute_store(imputer, store, tmp_path / "out.h5", **options))
    assert same(tmp_path / "whole.h5", tmp_path / "out.h5")


def test_damaged_files_of_a_plan_are_made_again_or_named(make_admc: Any, tmp_path: Path) -> None:
    imputer, options = ModalityImputer(make_admc("clean")), {"batch_size": 4, "shard_rows": 8}
    shards = tmp_path / ".out.h5.shards"
    with FeatureStore(write_store(tmp_path / "in.h5")) as store:
        list(impute_store(imputer, store, tmp_path / "whole.h5", **options))
        progress = impute_store(imputer, store, tmp_path / "out.h5", **options)
        while next(progress) < 28:
            pass
        progress.close()
        call, whole = shards / "call.json", (shards / "call.json").read_text()
        for content in ("", "{", "[]"):
            call.write_text(content)
            with pytest.raises(ValueError, match=r"call\.json: .*; remove the folder .*\.out\.h5\.shards"):
                next(impute_store(imputer, store, tmp_path / "out.h5", **options))
        call.write_text(whole)
        empty, text, folder = sorted(shards.glob("*.sha256"))
        empty.write_text("")
        text.write_bytes(b"\xff\n")
        (shards / "shards" / folder.stem).unlink()
        (shards / "shards" / folder.stem / "more").mkdir(parents=True)
        assert next(impute_store(imputer, store, tmp_path / "out.h5", **options)) == 4
        list(impute_store(imputer, store, tmp_path / "out.h5", **options))
    assert same(tmp_path / "whole.h5", tmp_path / "out.h5")


def test_what_a_killed_process_left_behind_goes(make_admc: Any, tmp_path: Path) -> None:
    imputer, options = ModalityImputer(make_admc("clean")), {"batch_size": 4, "shard_rows": 8}
    with FeatureStore(write_store(tmp_path / "in.h5")) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr("modafill.bulk.stores.shutil.rmtree", lambda _: None)
        list(impute_store(imputer, store, tmp_path / "out.h5", **options))
    left = tmp_path / ".out.h5.shards"
    assert left.exists()
    clean_up(tmp_path / "other.h5")
    assert left.exists()
    clean_up(tmp_path / "out.h5")
    assert not left.exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"engine": "slurm"}, "engine: got 'slurm', expected one of local, torchrun, ray"),
        ({"workers": 0}, "workers: got 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size: got -1, expected at least 1"),
        ({"threads": 0}, "threads: got 0, expected at least 1"),
        ({"engine": "torchrun", "threads": 2}, "threads: got 2, expected None: with torchrun"),
        ({"engine": "torchrun", "workers": 2}, "workers: got 2, expected 1: torchrun starts them"),
        ({"shard_format": "csv"}, "shard_format: got 'csv', expected h5 or parquet"),
        ({"out": "out.h5", "shard_format": "h5"}, "shard_format: got 'h5', expected None for the single file out.h5"),
    ],
)
def test_mistakes_are_named(make_admc: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    imputer, out = ModalityImputer(make_admc("clean")), tmp_path / options.pop("out", "out")
    with FeatureStore(write_store(tmp_path / "in.h5")) as store, pytest.raises(ValueError, match=re.escape(message)):
        next(impute_store(imputer, store, out, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5"]


@pytest.mark.parametrize(
    "module, options",
    [("ray.data", {"engine": "ray"}), ("pyarrow.parquet", {"shard_format": "parquet"})],
)
def test_what_is_not_installed_is_named(
    make_admc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with (
        FeatureStore(write_store(tmp_path / "in.h5")) as store,
        pytest.raises(MissingExtra, match=r"pip install 'modafill\[scale\]'"),
    ):
        next(impute_store(ModalityImputer(make_admc("clean")), store, tmp_path / "out", **options))


def test_several_processes_want_torchrun(make_admc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        FeatureStore(write_store(tmp_path / "in.h5")) as store,
        pytest.raises(ValueError, match=r"engine: got 'local', expected torchrun where it started 2 processes"),
    ):
        next(impute_store(ModalityImputer(make_admc("clean")), store, tmp_path / "out.h5"))
