"""The examples of the documentation that need no trained model."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calls import make_call
from support.smallest import SMALLEST, SMALLEST_CDTP, settings
from torch import nn

from modafill import cli
from modafill import nn as modules
from modafill.data import NpzMapping, demo_path
from modafill.diffusion import schedulers
from modafill.ops import backends

ROOT = Path(__file__).parents[1]
NUMBERS = {"admc": SMALLEST, "cdtp": SMALLEST_CDTP}
OPS = (ROOT / "docs/ops.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", OPS, re.DOTALL))
def test_examples_of_the_ops_run(example: str) -> None:
    """Each by itself; they assert what they show."""
    torch.manual_seed(0)
    exec(example, {})


def test_every_op_module_and_scheduler_has_a_line() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*)\|$", OPS, re.MULTILINE)
    assert {op for op, _ in rows} == set(backends.OPS)
    named = {name.rsplit(".", 1)[-1] for _, above in rows for name in re.findall(r"`([\w.]+)`", above)}
    made = [modules.ConvGeluConv, modules.PromptAttention]
    made += [schedulers.DDIMScheduler, schedulers.DDPMScheduler, schedulers.RePaintScheduler]
    assert named == {kind.__name__ for kind in made}
    assert all(f"`{backend}`" in OPS for backend in backends.BACKENDS)


@pytest.mark.parametrize("name", backends.REGISTERED)
def test_every_op_exports(name: str) -> None:
    call = make_call(name)

    class Module(nn.Module):
        def forward(self, **tensors: torch.Tensor) -> list[torch.Tensor]:
            return call(**tensors)

    program = torch.export.export(Module(), (), call.tensors).module()
    assert all(torch.equal(a, b) for a, b in zip(program(**call.tensors), call(), strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", ["index", "walkthrough", "train", "impute", "cluster", "benchmark"])
def test_a_page_runs_from_its_first_block_to_its_last(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models are trained as shown, but for fewer and smaller numbers."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for language, block in blocks:
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "modafill"
            if arguments[0] == "train" and "--data" in arguments:
                arguments += settings({**NUMBERS[arguments[1]], "batch_size": 256})
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert end.value.code == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(file: str) -> None:
    path = ROOT / file
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_page_is_in_the_site() -> None:
    named = set(re.findall(r"\b(\w+\.md)\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}


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


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_readmes_examples_of_a_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the demonstration's widths, but trained for seconds."""
    monkeypatch.chdir(tmp_path)
    numbers = settings({**SMALLEST, "width": 64, "batch_size": 256})
    arguments = ["train", "admc", "--data", str(demo_path()), "--out", "modafill-demo", *numbers]
    monkeypatch.setattr(sys, "argv", ["modafill", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks[:2]:
        assert "modafill-demo/fold0-seed0/model" in block
        exec(block, names)
    done = names["done"]
    assert done.embeddings["zernike"].shape == done.std["zernike"].shape == (32, 64)
    assert done.generated.shape == (32, 3)
    answers = names["Classifier"]()(names["features"], done.generated.logical_not())
    assert answers.shape == (32, 10)


COMMANDS = [
    pytest.param(command, id=f"{path.name}: {command[:60]}")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    for command in re.findall(
        r"^ {4}(?:.* -m )?(modafill .*)$", path.read_text(encoding="utf-8").replace("\\\n", ""), re.MULTILINE
    )
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_only_shown_have_their_options(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, capsys.readouterr().err


def test_the_first_command_on_data_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.findall(
        r"^    modafill (inspect .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )[0]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["modafill", *command.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, capsys.readouterr().err


def test_mappings_are_read() -> None:
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    mappings = [NpzMapping.from_dict("docs", json.loads(block)) for block in blocks]
    assert [list(mapping.modalities) for mapping in mappings] == [["text", "audio", "vision"], ["text", "audio"]]
    keys = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(keys) == {field.name for field in dataclasses.fields(NpzMapping)} - {"name"}
