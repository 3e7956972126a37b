"""Errors that are nobody's mistake, told from those that are by type."""

from __future__ import annotations

from importlib import import_module

import torch


class OutOfMemory(MemoryError):
    """Not even a single row fits the memory, or a model and a batch that it is trained on."""


class MissingExtra(ImportError):
    """A package that only an extra of modafill brings along."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the system's or a GPU's."""
    # PyTorch has no type of its own for the CPU's memory, nor for that of CUDA's libraries.
    said = ("can't allocate memory", "bad_alloc", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


def require(module: str, extra: str, what: str) -> None:
    """Raise MissingExtra, which says what to install, unless ``module`` can be imported."""
    try:
        import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{what}: needs {module.partition('.')[0]}: pip install 'modafill[{extra}]'") from error
