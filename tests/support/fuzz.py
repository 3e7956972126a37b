"""Mutated inputs of every layout: ``python -m support.fuzz`` prints how many were tried, refused and read.

A child process per layout, with limits on memory and on the time of an input, so that a crash or a hang is seen.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
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
from support.oracles import NPZ_SPLITS, ORACLES, as_text, unpickle

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
    value = foreign.mmsa(sizes=dict.fromkeys(NPZ_SPLITS, 8))
    arrays: dict[str, np.ndarray] = {}
    for split, part in value.items():
        arrays |= {f"{name}_{split}": part[name] for name in foreign.WIDTHS}
        arrays |= {
            f"id_{split}": np.array(part["id"]),
            f"mood_{split}": np.array(["glad", "söt"] * 4),
            f"y_{split}": np.arange(8),
            f"clip_{split}": np.array([f"{split} clip {i // 3}" for i in range(8)]),
            f"turn_{split}": np.arange(8) % 3,
            f"steps_{split}": np.array(part["audio_lengths"]),
        }
    with open(at, "wb") as file:
        np.savez(file, **arrays)


def _store(at: Path) -> None:
    _npz(at.with_suffix(".npz"))
    convert(at.with_suffix(".npz"), at, NPZ_MAPPING)
    at.with_suffix(".npz").unlink()


NPZ_MAPPING = {
    "modalities": {name: f"{name}_{{split}}" for name in foreign.WIDTHS},
    "splits": list(NPZ_SPLITS),
    "lengths": {"audio": "steps_{split}"},
    "label": {"name": "mood_{split}", "kind": "class"},
    "labels": {"y": {"name": "y_{split}", "kind": "class"}},
    "group": "clip_{split}",
    "order": "turn_{split}",
    "id": "id_{split}",
}
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


# A key of a dict at the end of a pickle, in an opcode of each protocol.
_KEYS = (b"U\x01x", b"U\x05train", b"U\x04test", b"K\x01")


def graft(content: bytes, random: np.random.Generator) -> bytes:
    """Another item for the outermost dict of a pickle: nested deeply, or a graph of few objects and many paths."""
    depth = int(random.choice([3, 40, 1_000, 200_000]))
    shared = b"]" if random.random() < 0.5 else b")"
    value = [
        b")" + b"\x85" * depth,  # tuples in tuples
        b"]" * depth + b"a" * (depth - 1),  # lists in lists
        b"K\x00" + b"}K\x00K\x01s\x86" * depth,  # tuples with dicts in them
        shared + b"q\xffh\xff\x86" * depth,  # pairs of the same pair
        b"]q\xffh\xffa",  # a list that holds itself
    ][int(random.integers(5))]
    key = _KEYS[int(random.integers(len(_KEYS)))]
    item = value + b"K\x01" if random.random() < 0.4 else key + value
    return content[:-1] + item + b"s."


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
    report: dict[str, Any] = {"layout": layout, "tried": 0, "refused": 0, "read": 0, "compared": 0, "wrong": []}
    with tempfile.TemporaryDirectory() as scratch:
        base, at, out = Path(scratch) / "base", Path(scratch) / "input", Path(scratch) / "out.h5"
        LAYOUTS[layout](base)
        # As it was written it is read, and there is something to compare it with.
        assert _compared(layout, base, base, out), f"{layout}: its own oracle cannot read it"
        files = sorted(path for path in base.rglob("*") if path.is_file()) if base.is_dir() else [base]
        for number in range(count):
            random = np.random.default_rng([seed, number])
            victim = files[int(random.integers(len(files)))]
            shutil.rmtree(at) if at.is_dir() else at.unlink(missing_ok=True)
            shutil.copytree(base, at) if base.is_dir() else shutil.copy(base, at)
            spoilt = at / victim.relative_to(base) if base.is_dir() else at
            grafted = looks_like_pickle(victim) and random.random() < 0.15
            spoilt.write_bytes((graft if grafted else mutate)(victim.read_bytes(), random))
            out.unlink(missing_ok=True)
            signal.alarm(SECONDS)
            try:
                report["compared"] += _compared(layout, at, base, out)
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


def _compared(layout: str, at: Path, base: Path, out: Path) -> bool:
    """Read an input, as ``out`` where it is to be converted; whether there was something to compare it with."""
    if layout == "store":
        _compare(_columns(at), _columns(base))
        return True
    convert(at, out, NPZ_MAPPING if layout == "npz" else None)
    return _compare_samples(layout, at, out)


def _columns(path: Path) -> dict[str, np.ndarray]:
    """Everything that a store holds, by its name in the file."""
    with FeatureStore(path) as store:
        batch = store.read(np.arange(len(store)))
        order = store.order()
        return {
            **{f"features/{name}": x.numpy() for name, x in batch.features.items()},
            **{f"lengths/{name}": n.numpy() for name, n in batch.lengths.items()},
            "available": batch.available.numpy(),
            "generated": store.generated(),
            "ids": np.array(store.ids()),
            **({} if order is None else {"order": order}),
            **{f"labels/{name}": store.labels(name) for name in store.label_names},
            **{f"groups/{name}": store.groups(name) for name in store.group_names},
            **{f"splits/{name}": store.split(name) for name in store.split_names},
            "described": np.array([json.dumps([store.modalities, store.task, store.notes])]),
        }


def _compare(found: dict[str, np.ndarray], written: dict[str, np.ndarray]) -> None:
    assert found.keys() == written.keys()
    for name, values in found.items():
        assert np.array_equal(values, written[name]), f"{name}: other values than were written"


def _compare_samples(layout: str, at: Path, out: Path) -> bool:
    """Whether there was something to compare the conversion with: what numpy, h5py and pickle read of its source."""
    try:
        samples = list(ORACLES[layout.split("-")[0]](at))
    except Exception:
        return False
    found = _columns(out)
    ids = [re.sub(r"#\d+$", "", name) if name not in {s.id for s in samples} else name for name in found["ids"]]
    if sorted(ids) != sorted(sample.id for sample in samples):
        raise AssertionError(f"other ids: {sorted(ids)[:5]} for {sorted(s.id for s in samples)[:5]}")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, []).append(row)
    with FeatureStore(out) as store:
        modalities = store.modalities
    for sample in samples:
        row = rows[sample.id].pop(0)
        for m, name in enumerate(modalities):
            expected = sample.frames[name]
            with np.errstate(over="ignore", invalid="ignore"):
                available = expected is not None and bool(expected.astype(np.float32).any())
            assert found["available"][row, m] == available, f"{name} of {sample.id} is available, or is not"
            if expected is None or not available:
                continue
            with np.errstate(over="ignore"):
                expected = expected.astype(np.float32)
            expected = np.where(np.isfinite(expected), expected, 0)
            got = found[f"features/{name}"][row]
            if got.ndim == 2:
                got = got[: found[f"lengths/{name}"][row]]
            np.testing.assert_array_equal(got, expected, err_msg=f"{name} of {sample.id}")
        for column, expected in sample.columns.items():
            assert column in found, f"{column} is not in the store"
            got = found[column][row]
            same = got == expected if isinstance(expected, str) else _equal(got, np.asarray(expected).astype(got.dtype))
            assert same, f"{column} of {sample.id}: {got!r}, not {expected!r}"
    return True


def _compare_pickles(path: Path) -> None:
    """What was read is what Python reads, where Python can."""
    with PickleFile(path) as file:
        try:
            theirs = unpickle(path)
        except Exception:
            return
        _same(file.value, theirs)


def _same(ours: Any, theirs: Any) -> None:
    """Without recursion, each pair of objects once."""
    todo, seen = [(ours, theirs)], set()
    while todo:
        a, b = todo.pop()
        if (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        if isinstance(a, PickledArray):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            if a.dtype == object:
                todo += zip(a.load().reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True)
            else:
                np.testing.assert_array_equal(a.load(), b)
        elif isinstance(a, dict):
            assert isinstance(b, dict)
            for (key, x), (other, y) in zip(a.items(), b.items(), strict=True):
                todo += [(key, as_text(other) if isinstance(other, bytes) else other), (x, y)]
        elif isinstance(a, (list, tuple)):
            assert type(a) is type(b)
            todo += zip(a, b, strict=True)
        elif isinstance(a, (set, frozenset)):
            assert a == {as_text(item) if isinstance(item, bytes) else item for item in b}
        else:
            assert _equal(a, b), f"{a!r} for {b!r}"


def _equal(ours: Any, theirs: Any) -> bool:
    """Numbers and texts, NaN equal to NaN."""
    ours, theirs = (value.item() if isinstance(value, (np.generic, np.ndarray)) else value for value in (ours, theirs))
    return bool(ours == theirs) or (ours != ours and theirs != theirs)


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
