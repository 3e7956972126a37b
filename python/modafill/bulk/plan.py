"""What an imputation is and how its rows are divided: the same for every engine that does the work."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import torch

from modafill import __version__
from modafill.data import FeatureStore
from modafill.files import read_json, remove, replacing, write_json
from modafill.imputer import ModalityImputer
from modafill.ops import backends
from modafill.processes import holding

# No reader of a folder of Parquet files takes a name with _ for one.
MANIFEST_FILE = "_manifest.json"
MANIFEST_VERSION = 1
_CALL_FILE, _SHARDS = "call.json", "shards"


@dataclass(frozen=True)
class Plan:
    """An imputation of ``rows`` rows in shards, whose files are in ``folder``.

    A shard begins where a batch begins, so that the networks see the same batches however many shards there are, and
    noise belongs to the row. With the same threads on the same kind of machine, any engine, any number of workers and
    any order therefore write the same bytes.

    Attributes:
        folder: of the plan (``call.json``), of the shards (``shards``), and of a checksum for each that is finished.
        rows: of the store.
        shard_rows: rows of a shard, whole batches.
        batch_size: rows that are completed at a time.
        n_samples: K completions per row, averaged.
        seed: of the noise.
        suffix: ``".h5"`` or ``".parquet"``, of the shards.
        identity: what else the bits depend on (:func:`identify`).
    """

    folder: Path
    rows: int
    shard_rows: int
    batch_size: int
    n_samples: int
    seed: int
    suffix: str
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> list[range]:
        """Rows of each shard."""
        return [range(start, min(start + self.shard_rows, self.rows)) for start in range(0, self.rows, self.shard_rows)]

    def path(self, shard: range) -> Path:
        """The file of a shard, named after its first row."""
        return self.folder / _SHARDS / f"{shard.start:012d}{self.suffix}"

    def whole(self, suffix: str) -> Path:
        """Where shards are put together, beside them: what is left of that by a killed process goes with them."""
        return self.folder / _SHARDS / f"whole{suffix}"

    @contextmanager
    def writing(self, shard: range) -> Iterator[Path]:
        """Where to write a shard; at the end it appears, and then its checksum."""
        with replacing(self.path(shard)) as beside:
            yield beside
            digest = _sha256(beside)
        with replacing(self._checksum(shard)) as beside:
            beside.write_text(f"{digest}  {_SHARDS}/{self.path(shard).name}\n", encoding="utf-8")

    def _checksum(self, shard: range) -> Path:
        return self.folder / f"{self.path(shard).name}.sha256"

    def sha256(self, shard: range) -> str:
        """Of a finished shard, as it was written."""
        return self._checksum(shard).read_bytes()[:64].decode("ascii", "replace")

    def _fits(self, shard: range) -> bool:
        path = self.path(shard)
        return path.is_file() and self._checksum(shard).is_file() and _sha256(path) == self.sha256(shard)

    def finished(self) -> list[range]:
        """Shards that are whole."""
        names = {entry.name for folder in (self.folder, self.folder / _SHARDS) for entry in os.scandir(folder)}
        return [s for s in self.shards if {self.path(s).name, self._checksum(s).name} <= names]

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder, in which are finished shards of the very same plan that fit their checksums, or none.

        Raises:
            ValueError: another process holds it, or it has shards of another plan.
        """
        (self.folder / _SHARDS).mkdir(parents=True, exist_ok=True)
        with _holding(self.folder):
            file, finished = self.folder / _CALL_FILE, self.finished()
            if file.exists() and finished:
                try:
                    differing = self.differing(read_json(file))
                except (OSError, ValueError) as error:
                    raise ValueError(f"{error}; remove the folder {self.folder}") from error
                if differing:
                    raise ValueError(
                        f"{self.folder}: holds shards of a call with other {', '.join(differing)}; repeat that call or "
                        "remove the folder"
                    )
            # What nobody knows, was begun, or was changed.
            known = [s for s in finished if file.exists() and self._fits(s)]
            kept = {path for s in known for path in (self.path(s), self._checksum(s))}
            for path in (*(self.folder / _SHARDS).iterdir(), *self.folder.glob("*.sha256")):
                if path not in kept:
                    remove(path)
            write_json(file, self.call)
            try:
                yield
            except BaseException:
                # A call that came to nothing is in nobody's way.
                if not self.finished():
                    shutil.rmtree(self.folder)
                raise

    @property
    def call(self) -> dict[str, Any]:
        """All that the bytes depend on, JSON-able."""
        own = {name: value for name, value in asdict(self).items() if name not in ("folder", "identity")}
        call: dict[str, Any] = json.loads(json.dumps({**self.identity, **own}))
        return call

    def differing(self, call: dict[str, Any]) -> list[str]:
        """Names of what another call has otherwise."""
        return [name for name, value in self.call.items() if call.get(name) != value]

    def publish(self, out: Path) -> None:
        """Move the folder of shards to ``out``, with a manifest: the call, and rows, bytes and checksum of each."""
        shards = [
            {
                "file": self.path(shard).name,
                "rows": [shard.start, shard.stop],
                "bytes": self.path(shard).stat().st_size,
                "sha256": self.sha256(shard),
            }
            for shard in self.shards
        ]
        folder = self.folder / _SHARDS
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        manifest = {"format": "modafill-shards", "version": MANIFEST_VERSION, **self.call, "shards": shards}
        write_json(folder / MANIFEST_FILE, manifest)
        os.replace(folder, out)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What :meth:`Plan.publish` wrote; ValueError names what is wrong with it."""
    file = folder / MANIFEST_FILE
    manifest = read_json(file)
    if manifest.get("format") != "modafill-shards" or manifest.get("version") != MANIFEST_VERSION:
        found = f"{manifest.get('format')!r}, version {manifest.get('version')!r}"
        raise ValueError(f"{file}: got {found}, expected 'modafill-shards', version {MANIFEST_VERSION}")
    shards = manifest.get("shards")
    row = 0
    for shard in shards if isinstance(shards, list) else ():
        rows = shard.get("rows") if isinstance(shard, dict) else None
        name = shard.get("file") if isinstance(shard, dict) else None
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(f"{file}: got the shard {shard!r}, expected the name of a file in the folder")
        if not isinstance(rows, list) or rows[:1] != [row] or len(rows) != 2 or not isinstance(rows[1], int):
            raise ValueError(f"{file}: {name} has the rows {rows!r}, expected those from {row}")
        row = rows[1]
    if not isinstance(shards, list) or row != manifest.get("rows"):
        raise ValueError(f"{file}: its shards have {row} rows, expected {manifest.get('rows')}")
    return manifest


def check_shards(folder: Path, manifest: dict[str, Any]) -> Iterator[int]:
    """Compare every file with the manifest; yields the rows done so far.

    Raises:
        ValueError: at the end, the files that are absent, damaged, or not in the manifest.
    """
    wrong: list[str] = []
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            wrong.append(f"{shard['file']} is absent")
        elif path.stat().st_size != shard.get("bytes") or _sha256(path) != shard.get("sha256"):
            wrong.append(f"{shard['file']} is damaged")
        yield shard["rows"][1]
    known = {MANIFEST_FILE, *(shard["file"] for shard in manifest["shards"])}
    wrong += [f"{path.name} is not in {MANIFEST_FILE}" for path in sorted(folder.iterdir()) if path.name not in known]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{folder}: {', '.join(wrong[:5])}{more}")


def folder_beside(out: Path) -> Path:
    """Where the shards of ``out`` are made."""
    return out.absolute().with_name(f".{out.name}.shards")


def clean_up(out: Path) -> None:
    """Remove the shards of an ``out`` that is there: the process that made it was killed before it could."""
    folder = folder_beside(out)
    if out.exists() and folder.is_dir():
        with _holding(folder):
            shutil.rmtree(folder)


def _holding(folder: Path) -> Any:
    return holding(folder / "lock", f"{folder}: another process is writing shards there")


def identify(imputer: ModalityImputer, store: FeatureStore, threads: int) -> dict[str, Any]:
    """What the bits of a shard depend on beside the call's own options; ``threads``: of each worker."""
    weights = hashlib.sha256()
    for name, tensor in imputer.model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    stat, device = store.path.stat(), next(imputer.parameters()).device
    on_gpu = device.type == "cuda"
    # A conversion of the same archive is the same store, wherever it lies.
    source = store.task.get("source") or [str(store.path.resolve()), stat.st_size, stat.st_mtime_ns]
    return {
        "weights": weights.hexdigest(),
        "config": imputer.model.config.to_dict(),
        "modalities": list(imputer.modalities),
        "sampling": {name: str(value) for name, value in asdict(imputer.sampling).items()},
        "store": [source, store.window],
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": None if on_gpu else threads,
        "instructions": [
            backends.native_build()["cpu_isa"], torch.backends.cpu.get_cpu_capability(), backends.multiplies_bfloat16(),
        ],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_convolutions": on_gpu and torch.backends.cudnn.allow_tf32,
        "backend": backends.requested("auto"),
        "versions": [__version__, torch.__version__, h5py.version.hdf5_version],
    }  # fmt: skip


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
