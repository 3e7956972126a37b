"""Stores in, completed stores or tables out; finished shards of a large store are not made again."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modafill import __version__
from modafill.data import Batch, FeatureStore, StoreWriter
from modafill.data.patterns import name_rows
from modafill.files import replacing, write_json
from modafill.imputer import ModalityImputer
from modafill.models.cdtp import CDTP
from modafill.ops import backends

_MOST_ROWS, _COMPLETIONS_BYTES = 1024, 2**29
_MERGED_ROWS = 2048
SHARD_ROWS = 65536


def impute_store(
    imputer: ModalityImputer,
    store: FeatureStore,
    out: Path,
    *,
    n_samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Iterator[int]:
    """Write a store of completed embeddings, what was generated marked; yields the rows done so far.

    The file appears at ``out`` when the last row is written, or not at all. Labels, groups, splits and ids come along.
    A store of more than ``shard_rows`` rows goes through in shards of so many, each a file in the folder
    ``.NAME.shards`` beside ``out``: the same call after a process died begins behind the last that was finished, and
    ends with the same bits. They are put together at the end.

    Args:
        imputer: whose device does the work.
        store: what to complete, as the model reads it (:meth:`FeatureStore.windowed`).
        n_samples: K completions per row, averaged.
        seed: the noise of a row depends on it and the row number alone.
        batch_size: rows that are completed at a time; None = as many as keep K completions within half a gigabyte.
        shard_rows: rows of a shard.

    Raises:
        ValueError: a store that the model cannot read, or shards of another call in the way.
    """
    check_store(imputer, store)
    if shard_rows < 1:
        raise ValueError(f"shard_rows: got {shard_rows}, expected at least 1")
    options: dict[str, Any] = {"n_samples": n_samples, "seed": seed, "batch_size": batch_size}
    if len(store) <= shard_rows:
        yield from _write_shard(imputer, store, out, 0, len(store), **options)
        return
    folder = out.absolute().with_name(f".{out.name}.shards")
    with _only_one(folder):
        _claim(folder, {**_identity(imputer, store), **options, "shard_rows": shard_rows})
        starts = range(0, len(store), shard_rows)
        shards = [folder / f"{start:012d}.h5" for start in starts]
        found = sum(shard.exists() for shard in shards)
        if found:
            yield min(found * shard_rows, len(store))
        for start, shard in zip(starts, shards, strict=True):
            if not shard.exists():
                stop = min(start + shard_rows, len(store))
                yield from _write_shard(imputer, store, shard, start, stop, **options)
        _merge(imputer, store, shards, out)
        shutil.rmtree(folder)


def _write_shard(
    imputer: ModalityImputer, store: FeatureStore, out: Path, start: int, stop: int, **options: Any
) -> Iterator[int]:
    with _writer(imputer, store, out) as writer:
        columns = _columns(store)
        seed, n_samples = options["seed"], options["n_samples"]
        for rows, batch in _batches(imputer, store, n_samples, options["batch_size"], start, stop):
            done = imputer.complete(batch, n_samples=n_samples, seed=seed)
            writer.append(
                {name: x.cpu().numpy() for name, x in done.embeddings.items()},
                available=~done.generated.cpu().numpy(),
                generated=done.generated.cpu().numpy(),
                lengths={name: n.cpu().numpy() for name, n in done.lengths.items()},
                **columns(rows),
            )
            yield int(rows[-1]) + 1


def _writer(imputer: ModalityImputer, store: FeatureStore, out: Path) -> StoreWriter:
    names = imputer.modalities
    return StoreWriter(
        out,
        modalities=names,
        widths=dict.fromkeys(names, imputer.model.config.width),
        kinds=dict.fromkeys(names, "sequence" if isinstance(imputer.model, CDTP) else "vector"),
        task={k: v for k, v in store.task.items() if k != "window"},
    )


def _columns(store: FeatureStore) -> Callable[[np.ndarray], dict[str, Any]]:
    """What comes along with the given rows, as :meth:`StoreWriter.append` takes it."""
    order = store.order()
    named = {
        "labels": {name: store.labels(name) for name in store.label_names},
        "groups": {name: store.groups(name) for name in store.group_names},
        "splits": {name: store.split(name) for name in store.split_names},
    }
    return lambda rows: {
        "ids": store.ids(rows),
        "order": None if order is None else order[rows],
        **{kind: {name: values[rows] for name, values in columns.items()} for kind, columns in named.items()},
    }


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder of shards, made if need be, against other processes; the system lets go when this one dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is writing shards there") from error
        yield


def _identity(imputer: ModalityImputer, store: FeatureStore) -> dict[str, Any]:
    """What the bits of a shard depend on beside the call's own options."""
    weights = hashlib.sha256()
    for name, tensor in imputer.model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    stat, device = store.path.stat(), next(imputer.parameters()).device
    # A conversion of the same archive is the same store, wherever it lies.
    source = store.task.get("source") or [str(store.path.resolve()), stat.st_size, stat.st_mtime_ns]
    return {
        "weights": weights.hexdigest(),
        "config": imputer.model.config.to_dict(),
        "modalities": list(imputer.modalities),
        "sampling": {name: str(value) for name, value in asdict(imputer.sampling).items()},
        "store": [source, store.window],
        "machine": [
            device.type, torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads(),
            torch.get_float32_matmul_precision(), backends.native_build()["cpu_isa"], backends.requested("auto"),
            __version__, torch.__version__,
        ],
    }  # fmt: skip


def _claim(folder: Path, call: dict[str, Any]) -> None:
    """Find in the folder shards of the very same call, or none: those of a call that nobody knows are removed."""
    file, call = folder / "call.json", json.loads(json.dumps(call))
    shards = list(folder.glob("*.h5"))
    if not file.exists() or not shards:
        for shard in shards:
            shard.unlink()
        write_json(file, call)
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    differing = [name for name, value in call.items() if found.get(name) != value]
    if differing:
        raise ValueError(
            f"{folder}: holds shards of a call with other {', '.join(differing)}; repeat that call or remove the folder"
        )


def _merge(imputer: ModalityImputer, store: FeatureStore, shards: list[Path], out: Path) -> None:
    with _writer(imputer, store, out) as writer:
        columns, done = _columns(store), 0
        at_a_time = _rows_at_a_time(imputer, 1, _MERGED_ROWS)
        for shard in shards:
            with FeatureStore(shard) as part:
                for start in range(0, len(part), at_a_time):
                    rows = np.arange(start, min(start + at_a_time, len(part)))
                    batch, generated = part.read(rows, generated=True), part.generated(rows)
                    writer.append(
                        {name: x.numpy() for name, x in batch.features.items()},
                        available=part.available(rows),
                        generated=generated,
                        lengths={name: n.numpy() for name, n in batch.lengths.items()},
                        **columns(done + rows),
                    )
                done += len(part)


def recognise_store(
    imputer: ModalityImputer,
    store: FeatureStore,
    out: Path,
    *,
    n_samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
) -> Iterator[int]:
    """Write a CSV file of ``id`` with the likeliest class and the probability of each, or the score.

    Yields the rows done so far, ``batch_size`` at a time, as :func:`impute_store`.

    The file appears at ``out`` when the last row is written, or not at all.
    """
    check_store(imputer, store)
    with replacing(out) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        classes = imputer.classes
        writer.writerow(["id", "class", *(f"p({name})" for name in classes)] if classes else ["id", "score"])
        for rows, batch in _batches(imputer, store, n_samples, batch_size, 0, len(store)):
            said = imputer.model.recognise(batch, n_samples=n_samples, seed=seed, sampling=imputer.sampling).cpu()
            for name, row in zip(store.ids(rows), said.view(len(rows), -1), strict=True):
                best = [classes[int(row.argmax())]] if classes else []
                writer.writerow([name, *best, *(f"{value:.6g}" for value in row.tolist())])
            yield int(rows[-1]) + 1


def check_store(imputer: ModalityImputer, store: FeatureStore) -> None:
    """Raise ValueError unless the model can read ``store``; a modality that it lacks is missing in every row."""
    shared = [name for name in imputer.modalities if name in store.modalities]
    if not shared:
        expected = f"the model was trained on {', '.join(imputer.modalities)}"
        raise ValueError(f"{store.name}: has the modalities {', '.join(store.modalities)}, {expected}")
    for name in shared:
        width, expected_width = store.widths[name], imputer.model.modalities[name].width
        if width != expected_width:
            completed = "these are completed embeddings, " if bool(store.generated().any()) else ""
            raise ValueError(
                f"{store.name}: {completed}{name} has {width} features, expected {expected_width}, as in training"
            )
    empty = np.flatnonzero(~store.available()[:, [store.modalities.index(name) for name in shared]].any(1))
    if len(empty):
        where = name_rows(empty.tolist())
        raise ValueError(f"{store.name}: nothing is observed in {where}, expected at least one modality")


def _rows_at_a_time(imputer: ModalityImputer, n_samples: int, most: int) -> int:
    """So many that K completions of each stay within half a gigabyte."""
    model = imputer.model
    steps = sum(model.lengths) if isinstance(model, CDTP) else len(imputer.modalities)
    return max(1, min(most, _COMPLETIONS_BYTES // (4 * max(1, n_samples) * steps * model.config.width)))


def _batches(
    imputer: ModalityImputer, store: FeatureStore, n_samples: int, batch_size: int | None, first: int, stop: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Row numbers and the model's modalities of rows ``first`` to ``stop``, on the model's device."""
    device, names, model = next(imputer.parameters()).device, imputer.modalities, imputer.model
    if batch_size is None:
        batch_size = _rows_at_a_time(imputer, n_samples, _MOST_ROWS)
    for start in range(first, stop, batch_size):
        rows = np.arange(start, min(start + batch_size, stop))
        read = store.read(rows).to(device)
        available = torch.zeros(len(rows), len(names), dtype=torch.bool, device=device)
        features, lengths = {}, {}
        for m, (name, spec) in enumerate(model.modalities.items()):
            if name in store.modalities:
                features[name] = read.features[name]
                available[:, m] = read.available[:, store.modalities.index(name)]
                if name in read.lengths:
                    lengths[name] = read.lengths[name]
            else:
                features[name] = torch.zeros(len(rows), *([1] if spec.sequence else []), spec.width, device=device)
                if spec.sequence:
                    lengths[name] = torch.zeros_like(read.row_id)
        yield rows, Batch(features, available, read.row_id, lengths)
