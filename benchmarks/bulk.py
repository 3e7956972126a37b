"""``python -m modafill.benchmarks.bulk``: a large store through an ADMC of the paper's size, its rate and memory.

The model is untrained: how fast it is does not depend on what it learned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modafill import ModalityImputer
from modafill.benchmarks.report import machine
from modafill.data import StoreWriter
from modafill.models.admc import ADMC, ADMCConfig, ModalitySpec

MODALITIES = ("text", "audio", "vision")
BLOCK = 8192


def write_store(path: Path, rows: int, width: int) -> None:
    """Normal features, of which one to all are observed, every set equally often."""
    random = np.random.default_rng(0)
    with StoreWriter(
        path,
        modalities=MODALITIES,
        widths=dict.fromkeys(MODALITIES, width),
        kinds=dict.fromkeys(MODALITIES, "vector"),
    ) as writer:
        for start in range(0, rows, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, rows))
            available = (1 + numbers[:, None] % 7) >> np.arange(3) & 1 == 1
            features = {name: random.standard_normal((len(numbers), width), dtype=np.float32) for name in MODALITIES}
            writer.append(features, available=available)


def resident(pid: int) -> int:
    """Bytes of memory that belong to a process and its children alone or in part (Linux)."""
    found = 0
    for process in (pid, *_children(pid)):
        try:
            lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # it has ended
            continue
        found += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:  # it has ended
        return []


def measure(folder: Path, rows: int, width: int, workers: int, config: ADMCConfig) -> dict[str, Any]:
    """Impute ``rows`` rows by the command line; the rate, and the memory of its second and last quarter."""
    torch.manual_seed(0)
    specs = {name: ModalitySpec(width, False) for name in MODALITIES}
    ModalityImputer(ADMC(specs, 4, config)).save_pretrained(folder / "model")
    store, out = folder / "in.h5", folder / "out.h5"
    write_store(store, rows, width)
    arguments = ["impute", folder / "model", store, out, "--workers", workers]
    process = subprocess.Popen([sys.executable, "-m", "modafill", *map(str, arguments)])
    begun, seen = time.monotonic(), []
    while process.poll() is None:
        seen.append(resident(process.pid))
        time.sleep(0.2)
    seconds = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(process.returncode)
    quarter = max(1, len(seen) // 4)
    return {
        "rows": rows,
        "width": width,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "rows_per_s": rows / seconds,
        "peak_bytes": max(seen),
        "second_quarter_peak_bytes": max(seen[quarter : 2 * quarter], default=0),
        "last_quarter_peak_bytes": max(seen[-quarter:]),
        "model_bytes": (folder / "model/model.safetensors").stat().st_size,
        "store_bytes": store.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modafill.benchmarks.bulk", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256, help="features of each of three modalities")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cores")
    parser.add_argument("--preset", default="paper", help="of the model: paper or small")
    parser.add_argument("--folder", type=Path, help="for 9 kB a row; default: the system's place for such files")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    for name in ("rows", "width", "workers"):
        if getattr(given, name) < 1:
            parser.error(f"{name}: got {getattr(given, name)}, expected at least 1")
    config = ADMCConfig.preset(given.preset, conditioning="clean")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = {
            "machine": machine(torch.device("cpu")),
            **measure(Path(folder), given.rows, given.width, given.workers, config),
        }
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
