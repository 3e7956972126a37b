"""The figures of a large store, of a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from modafill.benchmarks import bulk
from modafill.models.admc import ADMCConfig


@pytest.mark.slow
def test_rate_and_memory_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = bulk.measure(tmp_path, 3000, 8, 1, ADMCConfig.preset("small", conditioning="clean"))
    assert found["rows_per_s"] * found["seconds"] == pytest.approx(3000)
    assert found["store_bytes"] > 3000 * 3 * 8 * 4
    # Python with torch, and no more than that and a batch.
    assert 50e6 < found["peak_bytes"] < 2e9
    assert (tmp_path / "out.h5").exists()
