"""What schedulers are told: settings under diffusers' names, each checked and brought to its own type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from modafill.diffusion.schedule import Schedule
from modafill.ops import backends
from modafill.ops.reference import MAX_STEP


def _one_of(*known: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        return value

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {backends.describe(value)}, expected True or False")
    return value


def _bound(name: str, value: Any) -> float:
    bound = backends.number(name, value)
    if not bound > 0.0:
        raise ValueError(f"{name}: got {bound}, expected a positive bound")
    return bound


def check_share(name: str, value: Any) -> float:
    """``value`` as a number; ValueError if it is not in [0, 1]."""
    share = backends.number(name, value)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name}: got {share}, expected a value in [0, 1]")
    return share


def _betas(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        betas = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        betas = torch.empty(())
    if betas.ndim != 1 or len(betas) == 0:
        raise TypeError(f"{name}: got {backends.describe(value)}, expected None or a sequence of numbers")
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"{name}: got values in [{betas.min():g}, {betas.max():g}], expected all in (0, 1)")
    return tuple(betas.tolist())


# What each setting is checked by, and brought to its own type.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_train_timesteps": functools.partial(backends.integer, low=1, high=MAX_STEP),
    "beta_start": backends.number,
    "beta_end": backends.number,
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": _betas,
    "clip_sample": _flag,
    "clip_sample_range": _bound,
    "prediction_type": _one_of("epsilon", "sample", "v_prediction"),
    "timestep_spacing": _one_of("leading", "trailing", "linspace"),
    "steps_offset": functools.partial(backends.integer, low=0),
    "eta": check_share,
}


@dataclass(frozen=True)
class _ScheduleConfig(Mapping[str, Any]):
    """What every scheduler is told: its noise schedule and the bound of x̂₀."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def __getitem__(self, name: str) -> Any:
        if name not in tuple(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __post_init__(self) -> None:
        for name in self:
            object.__setattr__(self, name, _CHECKS[name](name, getattr(self, name)))
        n = self.num_train_timesteps if self.trained_betas is None else len(self.trained_betas)
        if n != self.num_train_timesteps:
            raise ValueError(
                f"num_train_timesteps: got {self.num_train_timesteps}, expected {n}, the length of trained_betas"
            )

    def schedule(self) -> Schedule:
        """The noise schedule; ValueError if one of its ends is outside (0, 1)."""
        if self.trained_betas is not None:
            return Schedule(torch.tensor(self.trained_betas, dtype=torch.float64))
        if self.beta_schedule == "squaredcos_cap_v2":
            return Schedule.cosine(self.num_train_timesteps)
        for name in ("beta_start", "beta_end"):
            if not 0.0 < self[name] < 1.0:
                raise ValueError(f"{name}: got {self[name]}, expected a value in (0, 1)")
        if self.beta_schedule == "linear":
            return Schedule.linear(self.num_train_timesteps, self.beta_start, self.beta_end)
        ends = self.beta_start**0.5, self.beta_end**0.5
        return Schedule(torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float64) ** 2)


@dataclass(frozen=True)
class SchedulerConfig(_ScheduleConfig):
    """Settings of DDIM and DDPM, under diffusers' names and with its defaults: attributes, and a mapping too.

    Attributes:
        num_train_timesteps: N.
        beta_start, beta_end: ends of the schedule.
        beta_schedule: ``"linear"``, ``"scaled_linear"`` (linear in √β) or ``"squaredcos_cap_v2"`` (cosine).
        trained_betas: β_1…β_N instead of a schedule: numbers, an array or a tensor, kept as a tuple.
        clip_sample: whether x̂₀ is clipped to ± ``clip_sample_range``.
        prediction_type: what the network gives: ``"epsilon"``, ``"sample"`` (x₀) or ``"v_prediction"``.
        timestep_spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``.
        steps_offset: added to the timesteps of ``"leading"``.
    """

    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0


@dataclass(frozen=True)
class RePaintConfig(_ScheduleConfig):
    """Settings of RePaint, under diffusers' names and with its defaults: attributes, and a mapping too.

    Attributes:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, clip_sample, clip_sample_range: as in
            :class:`SchedulerConfig`.
        eta: share of ancestral noise, 0…1.
    """

    eta: float = 0.0
    prediction_type: ClassVar[str] = "epsilon"
    timestep_spacing: ClassVar[str] = "leading"
    steps_offset: ClassVar[int] = 0
