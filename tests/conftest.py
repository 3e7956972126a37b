"""What all tests share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from support.smallest import SMALLEST, SMALLEST_CDTP, settings

from modafill.models.admc import ADMC, ADMCConfig, ModalitySpec

ROOT = Path(__file__).resolve().parents[1]

# A shared machine stalls now and then; the same commit tries the same examples, and a failure can be found again.
hypothesis.settings.register_profile("modafill", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("modafill")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """At least two threads, so that code that is parallel runs in parallel, and no more, so that tests can share."""
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks this small: a second thread gains them nothing and is long waited for where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: ``MODAFILL_DATA``, else ``shared/data`` beside the checkout."""
    path = Path(os.environ.get("MODAFILL_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no data in {path}; set MODAFILL_DATA to the folder that has it")
    return path


@pytest.fixture(scope="session")
def sanitized() -> dict[str, str]:
    """The environment of a process that loads what ``g++ -fsanitize=address,undefined`` built."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ is not installed")
    names = ("libasan.so", "libubsan.so")
    libraries = [subprocess.check_output([gxx, f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(map(os.path.isabs, libraries)):  # g++ repeats the name of a file that it does not have
        pytest.skip("g++ comes without its address and undefined-behaviour sanitizers")
    # The interpreter itself is not instrumented: it has to load them first, and its leaks are its own.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), **options}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@dataclass(frozen=True)
class Tiny:
    """Data of 96 samples, and the smallest ADMC that was trained on it with both conditionings by the command line."""

    archive: Path
    mapping: Path
    run: Path
    train_arguments: list[str]


def write_tiny(folder: Path, *, groups: bool = True) -> tuple[Path, Path]:
    """An archive of three classes and its mapping: text and vision vectors, ragged audio, a few modalities missing."""
    random = np.random.default_rng(3)
    n = 96
    label = np.arange(n) % 3
    available = random.random((n, 3)) < 0.9
    available[~available.any(1)] = True
    arrays = {
        "words": (random.normal(size=(n, 6)) + label[:, None]).astype(np.float32),
        "sound": (random.normal(size=(n, 5, 4)) - label[:, None, None]).astype(np.float32),
        "faces": (random.normal(size=(n, 3)) + 2 * label[:, None]).astype(np.float32),
        "sound_steps": random.integers(1, 6, n),
        "mood": np.array(["calm", "glad", "sad"])[label],
        "seen": available,
    }
    mapping = {
        "modalities": {"text": "words", "audio": "sound", "vision": "faces"},
        "lengths": {"audio": "sound_steps"},
        "label": {"name": "mood", "kind": "class"},
        "available": "seen",
    }
    if groups:
        arrays |= {"clip": np.arange(n) // 4, "turn": np.arange(n) % 4}
        mapping |= {"group": "clip", "order": "turn"}
    np.savez(folder / "tiny.npz", **arrays)
    (folder / "tiny.json").write_text(json.dumps(mapping))
    return folder / "tiny.npz", folder / "tiny.json"


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., tuple[Path, Path]]:
    """Writes the tiny archive and its mapping into a folder, without groups if asked."""
    return write_tiny


def _trained(folder: Path, arguments: list[str]) -> Tiny:
    archive, mapping = write_tiny(folder)
    arguments = ["train", arguments[0], "--data", str(archive), "--mapping", str(mapping), *arguments[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "modafill", *arguments, "--out", str(folder / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads that wait for each other are slow on a busy machine
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Tiny(archive, mapping, folder / "run", arguments)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    conditionings = ["--conditioning", "replace", "--conditioning", "clean"]
    return _trained(tmp_path_factory.mktemp("tiny"), ["admc", *settings(SMALLEST), *conditionings])


@pytest.fixture(scope="session")
def tiny_cdtp(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """As ``tiny``, but the smallest CDTP with two of its ablations."""
    variants = [part for name in ("full", "linear", "plain") for part in ("--variant", name)]
    return _trained(tmp_path_factory.mktemp("tiny_cdtp"), ["cdtp", *settings(SMALLEST_CDTP), *variants])


@pytest.fixture(scope="session")
def make_admc() -> Callable[..., ADMC]:
    """An untrained :data:`SMALLEST` ADMC of text ``[L, 5]``, audio ``[L, 4]`` and vision ``[3]`` for four classes."""

    def make(conditioning: str = "clean", **changes: Any) -> ADMC:
        torch.manual_seed(0)
        config = ADMCConfig(**{**SMALLEST, "textcnn_filters": 4, "conditioning": conditioning, **changes})
        specs = {"text": ModalitySpec(5, True), "audio": ModalitySpec(4, True), "vision": ModalitySpec(3, False)}
        model = ADMC(specs, 4, config).eval()
        model.scaler.mean.normal_()
        model.scaler.std.uniform_(0.2, 3.0)
        for unimodal in model.unimodal.values():
            unimodal.encoder.mean.normal_()
        return model

    return make
