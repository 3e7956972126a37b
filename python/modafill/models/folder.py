"""Models as folders: ``config.json`` and ``model.safetensors``. Loading one executes no code of its maker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn

from modafill.files import read_json, read_tensors, replacing, write_json, write_tensors

FORMAT_VERSION = 2


def save_folder(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write ``model`` and ``config`` to the folder ``path``, whole or not at all; its other files stay."""
    with replacing(path) as beside:
        beside.mkdir()
        write_json(beside / "config.json", {"format_version": FORMAT_VERSION, **config})
        write_tensors(beside / "model.safetensors", model.state_dict())


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; ValueError names what is wrong with it."""
    file = path / "config.json"
    if not file.is_file():
        models = sorted(path.glob("fold*-seed*/model"))
        hint = f"; this is a run, its models are folders such as {models[0]}" if models else ""
        raise ValueError(f"{path}: no config.json there, expected a folder written by save_pretrained{hint}")
    config = read_json(file)
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format version {config.get('format_version')}, this modafill reads version {FORMAT_VERSION}"
        )
    return config


def find_folder(path: str | Path) -> Path:
    """An existing model folder, or one downloaded by its Hugging Face Hub id ``owner/name``."""
    folder = Path(path)
    if folder.exists():
        return folder
    # A name in a folder that is here was not meant for the hub.
    if str(path).count("/") != 1 or (folder.parent != Path() and folder.parent.exists()):
        raise ValueError(f"path: got {str(path)!r}, expected an existing folder or a hub id 'owner/name'")
    try:
        return Path(snapshot_download(str(path), allow_patterns=["config.json", "model.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"path: got {str(path)!r}, not a folder here, and not to be had from the hub ({reason})"
        ) from error


def load_weights(path: Path, model: nn.Module) -> None:
    """Give ``model`` the weights in the safetensors file ``path``; other names or shapes raise ValueError.

    Its parameters may be on the meta device: a description that lies about sizes has no memory yet.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    tensors, _ = read_tensors(path)
    own = model.state_dict()
    for name in sorted(set(own) | set(tensors)):
        found = list(tensors[name].shape) if name in tensors else "nothing"
        expected = list(own[name].shape) if name in own else "nothing"
        if found != expected:
            raise ValueError(f"{path}: {name}: got {found}, expected {expected}; the checkpoint is of another model")
    # Copies: what was read may be the file itself, mapped.
    model.load_state_dict({name: t.to(own[name].dtype, copy=True) for name, t in tensors.items()}, assign=True)
