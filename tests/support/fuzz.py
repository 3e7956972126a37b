"""Mutated inputs of every layout: ``python -m support.fuzz`` prints how many were tried, refused and read.

A child process per layout, with limits on memory and on the time of an input, so that a crash or a hang is seen.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from support import foreign

from modafill.data import FeatureStore, convert
from modafill.data.readers.pickles import PickledArray, PickleFile, looks_like_pickle

MEMORY = 6 << 30
SECONDS = 30


def _dump(value: Any, protocol: int) -> Callable[[Path], None]:
    def write(at: Path) -> None:
        at.write_bytes(
            foreign.python2_pickle(value, protocol - 20) if protocol >= 20 else pickle.dumps(value, protocol)
        )

    return write


def _npz(at: Path) -> None:
    value = foreign.mmsa(sizes={"train": 8})["train"]
    with open(at, "wb") as file:
        np.savez(file, **{name: value[name] for name in foreign.WIDTHS}, y=np.arange(8))


def _store(at: Path) -> None:
    _npz(at.with_suffix(".npz"))
    convert(at.with_suffix(".npz"), at, NPZ_MAPPING)
    at.with_suffix(".npz").unlink()


NPZ_MAPPING = {"modalities": {name: name for name in foreign.WIDTHS}, "label": {"name": "y", "kind": "class"}}
SMALL = {"train": 6, "valid": 3, "test": 3}
LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "npz": _npz,
    "store": _store,
    "mmsa-2": _dump(foreign.mmsa(sizes=SMALL), 2),
    "mmsa-4": _dump(foreign.mmsa(sizes=SMALL), 4),
    "mult-python2-0": _dump(foreign.mult(sizes=SMALL), 20),
    "mult-python2-2": _dump(foreign.mult(sizes=SMALL), 22),
    "mmin": lambda at: foreign.write_mmin(at, n=12, folds=1),
    "mintrec": foreign.write_mintrec,
    "csd": lambda at: foreign.write_csd(at, videos=3),
    "gcnet": foreign.write_gcnet,
}


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """One to four changes: bytes flipped, cut off, zeroed, doubled, inserted, or one small number made large."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        # Most of a file is numbers; what describes them is at its ends.
        place = int(random.integers(len(data))) if random.random() < 0.5 else int(random.integers(min(len(data), 600)))
        if random.random() < 0.2:
            place = max(0, len(data) - 1 - place)
        length = int(random.integers(1, 40))
        kind = int(random.integers(7))
        if kind == 0:
            data[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            data[place] = int(random.integers(256))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == 4:
            data[place:place] = data[place : place + length]
        elif kind == 5:
            data[place:place] = random.bytes(length)
        else:
            data[place : place + 4] = b"\xff\xff\xff\x7f"[: len(data[place : place + 4])]
        if not data:
            break
    return bytes(data)


def run(layout: str, count: int, seed: int) -> dict[str, Any]:
    """Try so many inputs; answers counts and the tracebacks of what should not have been."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    report: dict[str, Any] = {"layout": layout, "tried": 0, "refused": 0, "read": 0, "wrong": []}
    with tempfile.TemporaryDirectory() as scratch:
        base, at, out = Path(scratch) / "base", Path(scratch) / "input", Path(scratch) / "out.h5"
        LAYOUTS[layout](base)
        files = sorted(path for path in base.rglob("*") if path.is_file()) if base.is_dir() else [base]
        original = None
        for number in range(count):
            random = np.random.default_rng([seed, number])
            victim = files[int(random.integers(len(files)))]
            shutil.rmtree(at) if at.is_dir() else at.unlink(missing_ok=True)
            shutil.copytree(base, at) if base.is_dir() else shutil.copy(base, at)
            spoilt = at / victim.relative_to(base) if base.is_dir() else at
            spoilt.write_bytes(mutate(victim.read_bytes(), random))
            out.unlink(missing_ok=True)
            signal.alarm(SECONDS)
            try:
                if layout == "store":
                    values = _values(at)
                else:
                    convert(at, out, NPZ_MAPPING if layout == "npz" else None)
                    values = _values(out)
                if original is None:
                    original = _values(base) if layout == "store" else None
                if layout == "npz" and original is None:
                    clean = Path(scratch) / "clean.h5"
                    convert(base, clean, NPZ_MAPPING)
                    original = _values(clean)
                if layout in ("npz", "store"):
                    _compare(values, original)
                if looks_like_pickle(spoilt):
                    _compare_pickles(spoilt)
                report["read"] += 1
            except (ValueError, FileNotFoundError) as error:
                if isinstance(error, UnicodeError) or (str(scratch) not in str(error) and "out.h5" not in str(error)):
                    report["wrong"].append([number, traceback.format_exc()[-1500:]])
                else:
                    report["refused"] += 1
                if out.exists():
                    report["wrong"].append([number, "half a store was left"])
            except BaseException:
                report["wrong"].append([number, traceback.format_exc()[-1500:]])
            signal.alarm(0)
            report["tried"] += 1
    return report


def _values(path: Path) -> list[np.ndarray]:
    with FeatureStore(path) as store:
        batch = store.read(np.arange(len(store)))
        labels = [store.labels(name) for name in store.label_names]
        return [*(x.numpy() for x in batch.features.values()), batch.available.numpy(), *labels]


def _compare(values: list[np.ndarray], original: list[np.ndarray] | None) -> None:
    if original is None:
        return
    for a, b in zip(values, original, strict=True):
        assert np.array_equal(a, b), "other values than were written"


def _compare_pickles(path: Path) -> None:
    """What was read is what Python reads, where Python can."""
    with PickleFile(path) as file, open(path, "rb") as content:
        try:
            theirs = _Plain(content, encoding="bytes").load()
        except Exception:
            return
        _same(file.value, theirs)


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        assert module.split(".")[0] in ("numpy", "_codecs", "collections", "builtins", "__builtin__"), module
        return super().find_class(module, name)


def _same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, PickledArray):
        np.testing.assert_array_equal(ours.load(), theirs)
    elif isinstance(ours, dict):
        for (a, x), (b, y) in zip(ours.items(), theirs.items(), strict=True):
            assert a == (b.decode() if isinstance(b, bytes) else b)
            _same(x, y)
    elif isinstance(ours, (list, tuple)):
        for x, y in zip(ours, theirs, strict=True):
            _same(x, y)


def main() -> None:
    """Print a JSON line for each layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=list(LAYOUTS), action="append")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    h5py._errors.silence_errors()
    for layout in asked.layout or LAYOUTS:
        report = run(layout, asked.count, asked.seed)
        print(json.dumps(report))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
