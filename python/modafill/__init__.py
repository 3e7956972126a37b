"""Fill in missing modalities by conditional diffusion, on fused kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modafill.imputer import Imputation, ModalityImputer

__version__ = "0.1.0"
__all__ = ["Imputation", "ModalityImputer", "__version__"]

_MODULES = ("data", "diffusion", "nn", "ops")


def __getattr__(name: str) -> Any:
    # The imputer brings h5py and the models along: only those who ask for it pay for them.
    if name in ("Imputation", "ModalityImputer"):
        return getattr(import_module("modafill.imputer"), name)
    if name in _MODULES:
        return import_module(f"modafill.{name}")
    raise AttributeError(f"module 'modafill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
