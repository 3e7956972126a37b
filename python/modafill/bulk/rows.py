"""Rows of a store through a model, so many at a time as fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from modafill.data import Batch, FeatureStore
from modafill.data.patterns import name_rows
from modafill.errors import OutOfMemory, is_out_of_memory
from modafill.imputer import ModalityImputer
from modafill.models.cdtp import CDTP

_COMPLETIONS_BYTES = 2**29
_MOST_ROWS = 1024

_T = TypeVar("_T")
_log = logging.getLogger("modafill.bulk")


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


def rows_at_a_time(imputer: ModalityImputer, n_samples: int = 1) -> int:
    """So many that K completions of each stay within half a gigabyte."""
    model = imputer.model
    steps = sum(model.lengths) if isinstance(model, CDTP) else len(imputer.modalities)
    return max(1, min(_MOST_ROWS, _COMPLETIONS_BYTES // (4 * max(1, n_samples) * steps * model.config.width)))


def through(
    imputer: ModalityImputer, store: FeatureStore, rows: range, batch_size: int, work: Callable[[Batch], _T]
) -> Iterator[tuple[np.ndarray, _T]]:
    """Row numbers and what ``work`` makes of them, ``batch_size`` at a time, on the model's device.

    Where memory runs out the batch is halved, which is logged as a warning, and stays so.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    start = rows.start
    while start < rows.stop:
        part = np.arange(start, min(start + batch_size, rows.stop))
        try:
            done = work(_read(imputer, store, part))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise OutOfMemory(f"{store.name}: out of memory with row {start} alone ({error})") from error
            batch_size = len(part) // 2
            _log.warning("out of memory with %d rows at a time; going on with %d", len(part), batch_size)
        else:
            yield part, done
            start += len(part)
            continue
        # Only now is the error gone, and what its frames held with it.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _read(imputer: ModalityImputer, store: FeatureStore, rows: np.ndarray) -> Batch:
    """The model's modalities of the given rows, on its device."""
    device, names, model = next(imputer.parameters()).device, imputer.modalities, imputer.model
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
    return Batch(features, available, read.row_id, lengths)
