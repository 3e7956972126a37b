"""A trained model by its folder, whichever it is."""

from __future__ import annotations

from pathlib import Path

from modafill.models.admc import ADMC
from modafill.models.cdtp import CDTP
from modafill.models.folder import find_folder, read_config

MODELS: dict[str, type[ADMC] | type[CDTP]] = {"admc": ADMC, "cdtp": CDTP}


def load_pretrained(path: str | Path) -> ADMC | CDTP:
    """The model of a folder or a Hugging Face Hub id, in evaluation mode; ValueError if it is none of ours."""
    folder = find_folder(path)
    name = read_config(folder).get("model")
    if name not in MODELS:
        raise ValueError(f"{folder}: holds the model {name!r}, expected one of {', '.join(MODELS)}")
    return MODELS[name].from_pretrained(folder)
