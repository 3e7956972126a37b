"""A shard of an imputation: rows in, a file out; and shards together."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modafill.bulk.parquet import ParquetWriter
from modafill.bulk.plan import Plan, identify
from modafill.bulk.rows import through
from modafill.data import FeatureStore, StoreWriter
from modafill.imputer import ModalityImputer
from modafill.models.cdtp import CDTP

WRITERS: dict[str, type[StoreWriter] | type[ParquetWriter]] = {".h5": StoreWriter, ".parquet": ParquetWriter}


@dataclass(frozen=True)
class Job:
    """All that a worker needs, wherever it is: the store has to lie at the same path there."""

    imputer: ModalityImputer
    store: FeatureStore
    plan: Plan

    def packed(self) -> bytes:
        """For other processes: the model goes by way of the CPU."""
        device = next(self.imputer.parameters()).device
        try:
            return pickle.dumps(replace(self, imputer=self.imputer.cpu()))
        finally:
            self.imputer.to(device)

    @staticmethod
    def unpacked(packed: bytes, device: str) -> Job:
        """Inverse of :meth:`packed`, in a worker.

        Raises:
            ValueError: the worker would write other bits than the process that made the plan.
        """
        job: Job = pickle.loads(packed)
        job.imputer.to(device)
        if device == "cpu":
            torch.set_num_threads(job.plan.identity["threads"])
        torch.set_float32_matmul_precision(job.plan.identity["float32_matmul_precision"])
        job.check(job.plan.call)
        return job

    def check(self, call: dict[str, Any]) -> None:
        """Raise ValueError if this process would write other bits than the one whose ``call`` this is."""
        here = replace(self.plan, identity=identify(self.imputer, self.store, torch.get_num_threads()))
        differing = here.differing(call)
        if differing:
            what = ", ".join(f"{name} {here.call[name]!r} and not {call.get(name)!r}" for name in differing)
            raise ValueError(f"worker: has {what}, expected what the plan was made with")

    def write(self, shard: range) -> Iterator[int]:
        """Write a shard into the plan's folder; yields the rows done so far."""
        plan, columns = self.plan, self._columns()
        with plan.writing(shard) as beside, self._writer(beside, plan.suffix) as writer:
            batches = through(
                self.imputer,
                self.store,
                shard,
                plan.batch_size,
                lambda batch: self.imputer.complete(batch, n_samples=plan.n_samples, seed=plan.seed),
            )
            for part, done in batches:
                generated = done.generated.cpu().numpy()
                writer.append(
                    {name: x.cpu().numpy() for name, x in done.embeddings.items()},
                    available=~generated,
                    generated=generated,
                    lengths={name: n.cpu().numpy() for name, n in done.lengths.items()},
                    **columns(part),
                )
                yield int(part[-1]) + 1 - shard.start

    def merge(self, out: Path) -> None:
        """Write all shards, which are stores, as one file; in blocks of a batch, as if there had been no shards."""
        plan, at_a_time, whole = self.plan, self.plan.batch_size, self.plan.whole(out.suffix)
        if len(plan.shards) == 1 and plan.suffix == out.suffix:
            os.replace(plan.path(plan.shards[0]), out)
            return
        with self._writer(whole, out.suffix) as writer:
            columns = self._columns()
            for shard in plan.shards:
                with FeatureStore(plan.path(shard)) as part:
                    for start in range(0, len(part), at_a_time):
                        rows = np.arange(start, min(start + at_a_time, len(part)))
                        batch = part.read(rows, generated=True)
                        writer.append(
                            {name: x.numpy() for name, x in batch.features.items()},
                            available=part.available(rows),
                            generated=part.generated(rows),
                            lengths={name: n.numpy() for name, n in batch.lengths.items()},
                            **columns(shard.start + rows),
                        )
        os.replace(whole, out)

    def _writer(self, path: Path, suffix: str) -> StoreWriter | ParquetWriter:
        names = self.imputer.modalities
        return WRITERS[suffix](
            path,
            modalities=names,
            widths=dict.fromkeys(names, self.imputer.model.config.width),
            kinds=dict.fromkeys(names, "sequence" if isinstance(self.imputer.model, CDTP) else "vector"),
            # What it was made from is not what it is.
            task={k: v for k, v in self.store.task.items() if k not in ("window", "source")},
        )

    def _columns(self) -> Callable[[np.ndarray], dict[str, Any]]:
        """What comes along with the given rows, as :meth:`StoreWriter.append` takes it."""
        store, order = self.store, self.store.order()
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
