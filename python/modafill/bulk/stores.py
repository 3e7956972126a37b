"""Stores in, completed stores or tables out; what was finished when a process died is not done again."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from modafill.data import Batch, FeatureStore, StoreWriter
from modafill.data.patterns import name_rows
from modafill.files import replacing
from modafill.imputer import ModalityImputer
from modafill.models.cdtp import CDTP

_MOST_ROWS, _COMPLETIONS_BYTES = 1024, 2**29
_MERGED_ROWS = 8192
SHARD_ROWS = 65536


def impute_store(
    imputer: ModalityImputer,
    store: FeatureStore,
    out: Path,
    *,
    n_samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
) -> Iterator[int]:
    """Write a store of completed embeddings, what was generated marked; yields the rows done so far.

    The file appears at ``out`` when the last row is written, or not at all. Labels, groups, splits and ids come along.
    ``batch_size`` rows are completed at a time; None = as many as keep K completions within half a gigabyte.
    """
    check_store(imputer, store)
    width = imputer.model.config.width
    names = imputer.modalities
    kind = "sequence" if isinstance(imputer.model, CDTP) else "vector"
    order = store.order()
    labels = {name: store.labels(name) for name in store.label_names}
    groups = {name: store.groups(name) for name in store.group_names}
    splits = {name: store.split(name) for name in store.split_names}
    with StoreWriter(
        out,
        modalities=names,
        widths=dict.fromkeys(names, width),
        kinds=dict.fromkeys(names, kind),
        task={k: v for k, v in store.task.items() if k != "window"},
    ) as writer:
        for rows, batch in _batches(imputer, store, n_samples, batch_size):
            done = imputer.complete(batch, n_samples=n_samples, seed=seed)
            writer.append(
                {name: x.cpu().numpy() for name, x in done.embeddings.items()},
                available=~done.generated.cpu().numpy(),
                generated=done.generated.cpu().numpy(),
                lengths={name: n.cpu().numpy() for name, n in done.lengths.items()},
                ids=store.ids(rows),
                labels={name: values[rows] for name, values in labels.items()},
                groups={name: values[rows] for name, values in groups.items()},
                splits={name: values[rows] for name, values in splits.items()},
                order=None if order is None else order[rows],
            )
            yield int(rows[-1]) + 1


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
        for rows, batch in _batches(imputer, store, n_samples, batch_size):
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


def _batches(
    imputer: ModalityImputer, store: FeatureStore, n_samples: int, batch_size: int | None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Row numbers and the model's modalities of a whole store, on the model's device."""
    device, names, model = next(imputer.parameters()).device, imputer.modalities, imputer.model
    if batch_size is None:
        steps = sum(model.lengths) if isinstance(model, CDTP) else len(names)
        completions = 4 * max(1, n_samples) * steps * model.config.width
        batch_size = max(1, min(_MOST_ROWS, _COMPLETIONS_BYTES // completions))
    for start in range(0, len(store), batch_size):
        rows = np.arange(start, min(start + batch_size, len(store)))
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
