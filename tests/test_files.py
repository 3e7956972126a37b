from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from modafill import files
from modafill.files import derive_seed, read_json, read_tensors, replacing, write_json, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_replacing_makes_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("one", "two"):
        with replacing(path) as beside:
            assert beside.parent == path.parent, "a rename must not cross file systems"
            beside.write_text(text)
            assert not path.exists() or path.read_text() != text
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_leaves_nothing_behind(tmp_path: Path, error: type[BaseException], folder: bool) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as beside:
            if folder:
                beside.mkdir()
                (beside / "b").write_text("half")
            else:
                beside.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["a"]
    assert path.read_text() == "old"


def test_replacing_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_goes(tmp_path: Path, folder: bool) -> None:
    """And nobody else's: another file's, another machine's, a living process's, the user's own."""
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    here = socket.gethostname()
    left = tmp_path / f".a[1].h5.{here}-{ended.pid}.tmp"
    others = [
        f".b.h5.{here}-{ended.pid}.tmp",
        f".a[1].h5.elsewhere-{ended.pid}.tmp",
        f".a[1].h5.{here}-{os.getppid()}.tmp",
        f"{ended.pid}.tmp",
    ]
    for name in others:
        (tmp_path / name).write_text("theirs")
    if folder:
        left.mkdir()
        (left / "b").write_text("half")
    else:
        left.write_text("half")
    with replacing(tmp_path / "a[1].h5") as beside:
        assert names(tmp_path) == sorted(others)
        beside.write_text("whole")
    assert names(tmp_path) == sorted([*others, "a[1].h5"])


def test_a_folder_keeps_its_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "notes.md").write_text("mine")
    (path / "a").write_text("old")
    with replacing(path) as beside:
        beside.mkdir()
        (beside / "a").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(path) == ["a", "notes.md"]
    assert (path / "a").read_text() == "new"
    assert (path / "notes.md").read_text() == "mine"


def test_the_working_directory_can_be_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing(Path()) as beside:
        beside.mkdir()
        (beside / "a").write_text("new")
    assert names(tmp_path) == ["a"]


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"name": "喜び", "list": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "喜び" in text
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "got a list, expected an object"),
    ],
    ids=["empty", "half", "bytes", "deep", "list"],
)
def test_what_is_no_json_object_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_who_may_read_decides_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [mode, mode]


def test_tensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    tensors = {
        "slice": base[:, 1:3],
        "transposed": base.T,
        "shared": base,
        "shared again": base,
        "gradient": torch.ones(2, requires_grad=True),
        "nothing": torch.zeros(0, 3),
        "bits": torch.tensor([torch.nan, torch.inf, -0.0]),
        "index": torch.tensor([2**60]),
        "bool": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"epoch": 3, "why": "喜び"})
    back, about = read_tensors(tmp_path / "a.safetensors")
    assert about == {"epoch": 3, "why": "喜び"}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(torch.signbit(back[name]), torch.signbit(tensor))
        torch.testing.assert_close(back[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    write_tensors(tmp_path / "b.safetensors", {"a": base})
    assert read_tensors(tmp_path / "b.safetensors")[1] == {}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors: not a readable safetensors file"):
        read_tensors(path)


def test_a_file_that_ends_too_soon_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.safetensors: not a readable safetensors file"):
        read_tensors(path)


def test_tensors_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(1)})

    def break_off(tensors: object, target: Path, metadata: object) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", break_off)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.zeros(1)})
    assert names(tmp_path) == ["a.safetensors"]
    assert read_tensors(path)[0]["a"].item() == 1


def test_derived_seeds() -> None:
    seeds = [derive_seed(s, *n) for s in (0, 1, -1, 2**64) for n in ((), ("a",), ("a", 1), ("a", 2), ("a1",), ("b",))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, "x", 1) == derive_seed(3, "x", "1")
    # Results on disk depend on these, so they must not change with the version or the process.
    assert derive_seed(0, "weights") == 8730110008906084551
