"""What ``import modafill`` alone gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import modafill


@pytest.mark.parametrize("name", ["ModalityImputer", "Imputation", "data", "diffusion", "nn", "ops"])
def test_what_is_listed_is_there_and_comes_when_asked_for(name: str) -> None:
    assert name in dir(modafill)
    code = f"import sys, modafill; before = 'torch' in sys.modules; print(before, modafill.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", name if name[0].isupper() else f"modafill.{name}"], done.stderr


def test_nothing_else_is_listed() -> None:
    assert not {"Any", "TYPE_CHECKING", "annotations", "import_module"} & set(dir(modafill))
    with pytest.raises(AttributeError, match="module 'modafill' has no attribute 'difusion'"):
        _ = modafill.difusion
