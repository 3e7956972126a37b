"""Each published layout through the whole command line: inspected, converted, trained on, imputed."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign

from modafill import cli
from modafill.data import FeatureStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def _pickled(value: Any, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
        return folder / name

    return write


def _in(folder_of: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder_of(folder / "data")
        return folder / "data"

    return write


LAYOUTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "mmsa": (_pickled(foreign.mmsa(), "unaligned_50.pkl"), []),
    "mmsa, aligned": (_pickled(foreign.mmsa(aligned=True), "aligned_50.pkl"), ["--label", "class"]),
    "mult": (_pickled(foreign.python2_pickle(foreign.mult(), 2), "mosi_data.pkl"), []),
    "mult, emotions": (_pickled(foreign.mult(emotions=True), "iemocap_data.pkl"), []),
    "mmin": (_in(foreign.write_mmin), ["--folds", "2"]),
    "mintrec": (_in(foreign.write_mintrec), []),
    "csd": (_in(foreign.write_csd), []),
    "gcnet": (_in(foreign.write_gcnet), ["--window", "4"]),
    "gcnet, sessions": (_in(lambda at: foreign.write_gcnet(at, sessions=True)), ["--folds", "2", "--window", "4"]),
}
ONE_EPOCH = {
    "epochs": 1,
    "diffusion_epochs": 1,
    "width": 16,
    "layers": 1,
    "unet_channels": [16, 16],
    "sampling_steps": 2,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inspect_convert_train_impute(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write, options = LAYOUTS[name]
    source, layout = write(tmp_path), name.split(",")[0]
    monkeypatch.chdir(tmp_path)

    def modafill(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["modafill", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        assert not end.value.code, err
        return out

    report = json.loads(modafill("inspect", source, "--json"))
    assert report["format"] == layout
    modafill("convert", source, "all.h5")
    stored = json.loads(modafill("inspect", "all.h5", "--json"))
    for key in ("samples", "patterns", "label", "splits", "groups"):
        assert stored[key] == report[key]
    changes = [part for key, value in ONE_EPOCH.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    modafill("train", "cdtp", "--data", source, "--out", "run", "--preset", "small", *changes, *options)
    modafill("impute", "run", source, "completed.h5")
    with FeatureStore(tmp_path / "completed.h5") as completed:
        assert len(completed) == report["samples"]
        assert (completed.available() | completed.generated()).all()
        batch = completed.read(np.arange(len(completed)), generated=True)
        assert all(np.isfinite(x.numpy()).all() for x in batch.features.values())
