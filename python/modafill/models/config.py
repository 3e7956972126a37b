"""What the configurations of all models share: checks of their numbers, presets, JSON, the noise schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch

from modafill.diffusion import Sampling, Schedule, solver_steps

_Config = TypeVar("_Config", bound="ModelConfig")

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelConfig:
    """Base of a frozen dataclass of numbers; a subclass has the fields named in :meth:`schedule` too.

    Types are read as text: a subclass's module has ``from __future__ import annotations``.

    Attributes:
        CHOICES: field → the strings it may be.
        RANGES: field → its least and its largest value.
        PRESETS: name → what differs from the defaults.
    """

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {}
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, unless strings, whole numbers, bools and ranges are what they may be."""
        for name, known in self.CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for number in fields(self):
            value = getattr(self, number.name)
            whole = number.type == "int" or (number.type == "int | None" and value is not None)
            if whole and (type(value) is not int or value < 1):
                raise ValueError(f"{number.name}: got {value!r}, expected a whole number, at least 1")
            if number.type == "bool" and type(value) is not bool:
                raise ValueError(f"{number.name}: got {value!r}, expected a bool")
            if str(number.type).startswith("tuple[int"):
                values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
                if not values or not all(type(v) is int and v > 0 for v in values):
                    got = list(values) if values else repr(value)
                    raise ValueError(f"{number.name}: got {got}, expected whole numbers, at least 1")
                object.__setattr__(self, number.name, values)
            if number.type == "float" and (type(value) is bool or not isinstance(value, (int, float))):
                raise ValueError(f"{number.name}: got {value!r}, expected a number")
        for name, (low, high) in self.RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a number from {low} to {high}")

    @classmethod
    def preset(cls: type[_Config], name: str, **changes: Any) -> _Config:
        """``"paper"``: the paper's numbers. ``"small"``: a model that trains on two CPU cores in minutes."""
        if name not in cls.PRESETS:
            raise ValueError(f"preset: got {name!r}, expected one of {', '.join(cls.PRESETS)}")
        return replace(cls(**cls.PRESETS[name]), **changes)

    def schedule(self) -> Schedule:
        """The linear noise schedule of ``diffusion_steps``, ``beta_start`` and ``beta_end``."""
        numbers: Any = self
        return Schedule.linear(numbers.diffusion_steps, numbers.beta_start, numbers.beta_end)

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise ValueError, naming the argument, unless a model of this configuration can sample so."""
        numbers: Any = self
        if sampling.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: got {sampling.dtype}, expected bfloat16, float16 or None")
        schedule = self.schedule()
        if getattr(self, "conditioning", None) == "replace":
            for name in ("solver", "eta"):
                given = getattr(sampling, name)
                if given is not None:
                    raise ValueError(f"{name}: got {given!r}, expected None with conditioning 'replace'")
            schedule.check_step("start_step", sampling.steps or numbers.start_step)
            return
        last = schedule.last_step(numbers.min_alpha_bar)
        solver_steps(schedule, last, sampling.steps or numbers.sampling_steps, sampling.solver or numbers.solver)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """Inverse of :meth:`to_dict`; unknown fields raise ValueError."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__.removesuffix('Config')} config: unknown fields {', '.join(unknown)}")
        return cls(**values)
