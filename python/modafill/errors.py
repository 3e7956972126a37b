"""Errors that are nobody's mistake, told from those that are by type."""

from __future__ import annotations

from importlib import import_module


class OutOfMemory(MemoryError):
    """Not even a single row fits the memory."""


class MissingExtra(ImportError):
    """A package that only an extra of modafill brings along."""


def require(module: str, extra: str, what: str) -> None:
    """Raise MissingExtra, which says what to install, unless ``module`` can be imported."""
    try:
        import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{what}: needs {module.partition('.')[0]}: pip install 'modafill[{extra}]'") from error
