"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path``; what was written there becomes ``path`` at the end, or is removed on an error.

    A folder that is already there keeps its other files: only those of the same names are replaced.
    """
    path = path.absolute()
    prefix = f".{path.name}.{socket.gethostname()}-"
    beside, ours = path.with_name(f"{prefix}{os.getpid()}.tmp"), re.compile(rf"{re.escape(prefix)}(\d+)\.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    # What processes of this machine left when they were killed; one may have had this one's number.
    for left in path.parent.iterdir():
        found = ours.fullmatch(left.name)
        if found and (left == beside or not _runs(int(found[1]))):
            remove(left)
    try:
        yield beside
        for written in beside.iterdir() if beside.is_dir() else (beside,):
            _sync(written)
        if beside.is_dir() and path.is_dir():
            for written in beside.iterdir():
                os.replace(written, path / written.name)
            beside.rmdir()
        else:
            os.replace(beside, path)
        _sync(path.parent)
    except BaseException:
        remove(beside)
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block; only the main thread meets it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    met: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: met.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if met:
            signal.raise_signal(signal.SIGINT)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def remove(path: Path) -> None:
    """A file or a folder with all that it holds, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. What is no JSON, or no object, raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a {type(value).__name__}, expected an object")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """Write named tensors and a JSON-able description as one safetensors file, whole or not at all."""
    with replacing(path) as beside:
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        beside.touch()
        mode = beside.stat().st_mode
        try:
            save_file(contiguous, beside, metadata={"about": json.dumps(about or {})})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        # safetensors lets nobody but the owner read, whatever the umask.
        beside.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of :func:`write_tensors`. A file that is no safetensors file raises ValueError naming it."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if not isinstance(about, dict):
                raise ValueError(f"its description is a {type(about).__name__}, expected an object")
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (no iteration protocol)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for one named purpose, independent of every other purpose's."""
    digest = hashlib.sha256(repr((seed, *map(str, names))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
