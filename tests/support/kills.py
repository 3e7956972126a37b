"""``python -m support.kills``, in ``tests``: kill -9 at random moments of a training and of an imputation.

Each command is begun, killed, looked at and begun again until it ends by itself; then what it made is compared with
what an undisturbed one made, and the next round begins, until there were so many kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from support.smallest import SMALLEST, settings

from modafill.data import FeatureStore, convert, demo_path
from modafill.files import read_tensors


@dataclass
class Report:
    """What the kills did; all but the first three should stay 0."""

    kills: int = 0
    rounds: int = 0
    kills_with_shards: int = 0
    corrupt_files: int = 0
    lost_shards: int = 0
    other_results: int = 0


def begin(*arguments: object) -> subprocess.Popen[bytes]:
    """A command, of one thread in each process."""
    return subprocess.Popen(
        [sys.executable, "-m", "modafill", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def corrupt(folder: Path) -> list[Path]:
    """Files under their final names that cannot be read, and shards that do not fit their checksum."""
    found = []
    for checksum in folder.glob(".*.shards/*.sha256"):
        expected, name = checksum.read_text(encoding="utf-8").split()
        shard = checksum.parent / name
        if not shard.is_file() or hashlib.sha256(shard.read_bytes()).hexdigest() != expected:
            found.append(shard)
    for path in folder.rglob("*"):
        if path.name.endswith(".tmp") or any(part.endswith(".tmp") for part in path.parts):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                read_tensors(path)
            elif path.suffix == ".h5":
                with FeatureStore(path) as store:
                    store.read(np.arange(len(store)), generated=True)
        except (OSError, ValueError):
            found.append(path)
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all model files of a run."""
    files = [path] if path.is_file() else sorted(path.glob("fold*/model/*"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def finished_shards(out: Path) -> dict[str, int]:
    """Names of whole shards, and when they were written."""
    folder = out.with_name(f".{out.name}.shards")
    paths = [folder / "shards" / path.stem for path in folder.glob("*.sha256")]
    return {path.name: path.stat().st_mtime_ns for path in paths if path.exists()}


def reaches_a_moment(
    process: subprocess.Popen[bytes], out: Path, seconds: float, shards: int, chance: random.Random
) -> bool:
    """Wait until a random time or, where there are shards, in half of the cases a random number of them."""
    wanted = chance.randrange(1, shards) if shards and chance.random() < 0.5 else None
    deadline = time.monotonic() + chance.uniform(0.0, seconds)
    while process.poll() is None:
        if time.monotonic() >= deadline if wanted is None else len(finished_shards(out)) >= wanted:
            return True
        time.sleep(0.002)
    return False


def disturb(
    command: Callable[[Path], list[object]], folder: Path, name: str, count: int, seed: int, shards: int = 0
) -> Report:
    """Kill ``command``, which writes to the path it is given, ``count`` times."""
    chance, report = random.Random(seed), Report()
    begun = time.monotonic()
    undisturbed = begin(*command(folder / f"whole-{name}"))
    assert undisturbed.wait(600) == 0
    seconds, expected = time.monotonic() - begun, digest(folder / f"whole-{name}")
    while report.kills < count:
        report.rounds += 1
        out, ended = folder / name, False
        while not ended:
            before = finished_shards(out)
            process = begin(*command(out))
            if report.kills < count and reaches_a_moment(process, out, seconds, shards, chance):
                # Its workers have to die with it.
                process.kill()
                report.kills += 1
            errors = process.communicate(timeout=600)[1]
            ended = process.returncode != -signal.SIGKILL
            assert ended is False or process.returncode == 0 or b"exists already" in errors, errors.decode()
            report.corrupt_files += len(corrupt(folder))
            if not ended and not out.is_file():
                now = finished_shards(out)
                report.kills_with_shards += bool(now)
                report.lost_shards += sum(now.get(shard) != made for shard, made in before.items())
        report.other_results += digest(out) != expected
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        shutil.rmtree(out.with_name(f".{out.name}.shards"), ignore_errors=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m support.kills", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, store = folder / "digits.npz", folder / "digits.h5"
        shutil.copy(demo_path(), data)
        convert(data, store)
        numbers = settings({**SMALLEST, "batch_size": 256, "adn_epochs": 12})
        reports = {
            "train": disturb(
                lambda out: ["train", "admc", "--data", store, "--out", out, *numbers],
                folder, "run", given.count, given.seed,
            ),
            "impute": disturb(
                lambda out: [
                    "impute", folder / "whole-run", store, out, "--batch-size", 8, "--shard-rows", 40, "--workers", 2,
                    "--samples", 64, "--steps", 40,
                ],
                folder, "out.h5", given.count, given.seed + 1, shards=2000 // 40,
            ),
        }  # fmt: skip
    print(json.dumps({name: asdict(report) for name, report in reports.items()}))


if __name__ == "__main__":
    main()
