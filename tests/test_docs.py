"""The examples of the documentation that need no trained model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from modafill.data import NpzMapping

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("file", "contains"), [("README.md", "masked_reverse_step"), ("docs/data.md", "StoreWriter")])
def test_examples_run(file: str, contains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if contains in block]
    names: dict[str, object] = {}
    exec(example, names)
    if file == "docs/data.md":
        audio = names["batch"].features["audio"]
        assert (audio.shape, names["batch"].lengths["audio"].tolist()) == (torch.Size([2, 35, 74]), [20, 35])
    else:
        assert names["x"].isfinite().all()


def test_mappings_are_read() -> None:
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    mappings = [NpzMapping.from_dict("docs", json.loads(block)) for block in blocks]
    assert [list(mapping.modalities) for mapping in mappings] == [["text", "audio", "vision"], ["text", "audio"]]
    keys = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(keys) == {field.name for field in dataclasses.fields(NpzMapping)} - {"name"}
