"""Completed embeddings as a Parquet table, for who reads columns with pandas, Spark or Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from modafill.errors import require
from modafill.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetWriter:
    """As :class:`~modafill.data.StoreWriter`: blocks of samples to a file that appears whole or not at all.

    Columns: ``id``; for each modality its name (a list of D floats, or for sequences a list of such lists, of the true
    length), ``NAME.available`` and ``NAME.generated``; ``label.NAME``, ``group.NAME``, ``split.NAME`` and ``order``
    where there are such. The metadata ``modafill`` are the task, as JSON. Each block becomes a row group.

    Args:
        path: the file to create or replace.
        modalities, widths, kinds, task: as for a store.
    """

    def __init__(
        self,
        path: Path,
        *,
        modalities: Sequence[str],
        widths: Mapping[str, int],
        kinds: Mapping[str, str],
        task: Mapping[str, Any],
    ) -> None:
        require("pyarrow.parquet", "scale", "a Parquet table")
        self.path = path
        self.modalities, self.widths, self.kinds = tuple(modalities), dict(widths), dict(kinds)
        self._about = {"modafill": json.dumps(dict(task))}
        self._writer: Any = None
        self._replacing = ExitStack()
        self._beside = self._replacing.enter_context(replacing(path))

    def append(
        self,
        features: Mapping[str, np.ndarray],
        *,
        available: np.ndarray,
        generated: np.ndarray,
        lengths: Mapping[str, np.ndarray],
        ids: Sequence[str],
        order: np.ndarray | None,
        labels: Mapping[str, np.ndarray],
        groups: Mapping[str, np.ndarray],
        splits: Mapping[str, np.ndarray],
    ) -> None:
        """Append ``n`` samples that are complete.

        Args:
            features: name → ``[n, D]``, or ``[n, T, D]`` with ``lengths``.
            available, generated: bool ``[n, M]``.
            lengths: name → int ``[n]``, of sequences.
            ids, order, labels, groups, splits: as for a store.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
        for m, name in enumerate(self.modalities):
            columns[name] = self._lists(name, np.asarray(features[name], dtype=np.float32), lengths.get(name))
            columns[f"{name}.available"] = pa.array(available[:, m])
            columns[f"{name}.generated"] = pa.array(generated[:, m])
        for kind, named in (("label", labels), ("group", groups), ("split", splits)):
            for name, values in named.items():
                columns[f"{kind}.{name}"] = pa.array(values.tolist())
        if order is not None:
            columns["order"] = pa.array(order)
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._beside, table.schema.with_metadata(self._about))
        self._writer.write_table(table.replace_schema_metadata(self._about))

    def _lists(self, name: str, values: np.ndarray, lengths: np.ndarray | None) -> pa.Array:
        import pyarrow as pa

        if self.kinds[name] == "vector":
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.widths[name])
        assert lengths is not None
        real = values[np.arange(values.shape[1]) < lengths[:, None]]
        steps = pa.FixedSizeListArray.from_arrays(pa.array(real.reshape(-1)), self.widths[name])
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), steps)

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._replacing:
            if self._writer is not None:
                self._writer.close()
            if error is not None:
                raise error
