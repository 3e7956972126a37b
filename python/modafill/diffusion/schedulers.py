"""Schedulers with the names and calls of diffusers, on the fused step ops: an existing loop changes one line.

A timestep t counts from 0 as in diffusers; it is step t + 1 of a :class:`~modafill.diffusion.Schedule`. Noise comes
from the counter-based generator of the ops, keyed by ``seed=`` and ``row_id=`` where they are given. Otherwise each
step takes a fresh seed from ``generator`` (or torch's own), so that ``torch.manual_seed`` makes a loop repeatable. In a
compiled step torch's own is what the compiler makes of it: other draws under inductor, and no ``generator``.

Timesteps are diffusers', and results agree within float32 rounding, but for these departures:

- The noise: it does not depend on the batch, its order or the device. ``variance_noise`` takes diffusers' own.
- A DDIM step goes from each of the n timesteps to the next one, and from the last to x̂₀. diffusers goes to t − N // n,
  which for ``"linspace"``, and for ``"trailing"`` where n does not divide N, is not where the next step begins: the
  sample then has another noise level than the network is told.
- ``"trailing"`` gives n timesteps. For some n that do not divide N (61 for N = 1000), diffusers gives one more, −1.
- :meth:`RePaintScheduler.undo_step` draws once for a stride, with the β of that stride; diffusers takes those of the
  stride after it, which are other ones unless n = N.
- Refused, because they are not here: ``set_alpha_to_one=False``, ``thresholding``, ``rescale_betas_zero_snr``, sigmoid
  schedules and variances other than ``"fixed_small"``; and timesteps below 0, which diffusers counts from the end.
- ``betas`` and ``alphas_cumprod`` are float64: in float32, 1 − ᾱ has few digits left at the first timesteps.
- An output unpacks into its two tensors, diffusers' into their names.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from modafill import ops
from modafill.diffusion.schedule import Schedule
from modafill.ops import backends
from modafill.ops.reference import SQRT_ALPHA_BAR, SQRT_ONE_MINUS_ALPHA_BAR, Draw, ddim_deviations, stride_deviation

_Made = TypeVar("_Made", bound="_Scheduler")

_SMALL_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)
# Odd, so that every visit of a step has another seed (the golden ratio of 64 bits, as in splitmix64).
_VISIT = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class _ScheduleConfig(Mapping[str, Any]):
    """What every scheduler is told: its noise schedule and the bound of x̂₀."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | Tensor | None = None
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
        backends.integer("num_train_timesteps", self.num_train_timesteps, low=1)
        _check_choice("beta_schedule", self.beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        n = self.num_train_timesteps if self.trained_betas is None else len(self.trained_betas)
        if n != self.num_train_timesteps:
            raise ValueError(
                f"num_train_timesteps: got {self.num_train_timesteps}, expected {n}, the length of trained_betas"
            )
        if not self.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range: got {self.clip_sample_range}, expected a positive bound")

    def schedule(self) -> Schedule:
        """The noise schedule; ValueError if a β is outside (0, 1)."""
        if self.trained_betas is not None:
            return Schedule(torch.as_tensor(self.trained_betas, dtype=torch.float64))
        if self.beta_schedule == "linear":
            return Schedule.linear(self.num_train_timesteps, self.beta_start, self.beta_end)
        if self.beta_schedule == "squaredcos_cap_v2":
            return Schedule.cosine(self.num_train_timesteps)
        ends = self.beta_start**0.5, self.beta_end**0.5
        return Schedule(torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float64) ** 2)


@dataclass(frozen=True)
class SchedulerConfig(_ScheduleConfig):
    """Settings of DDIM and DDPM, under diffusers' names and with its defaults: attributes, and a mapping too.

    Attributes:
        num_train_timesteps: N.
        beta_start, beta_end: ends of the schedule.
        beta_schedule: ``"linear"``, ``"scaled_linear"`` (linear in √β) or ``"squaredcos_cap_v2"`` (cosine).
        trained_betas: β_1…β_N instead of a schedule.
        clip_sample: whether x̂₀ is clipped to ± ``clip_sample_range``.
        prediction_type: what the network gives: ``"epsilon"``, ``"sample"`` (x₀) or ``"v_prediction"``.
        timestep_spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``.
        steps_offset: added to the timesteps of ``"leading"``.
    """

    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("prediction_type", self.prediction_type, ("epsilon", "sample", "v_prediction"))
        _check_choice("timestep_spacing", self.timestep_spacing, ("leading", "trailing", "linspace"))


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: got {self.eta}, expected a value in [0, 1]")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")


def _check_shape(name: str, value: Tensor, like: str, x: Tensor) -> None:
    backends.check_tensor(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {list(x.shape)}, as {like}")


@dataclass(frozen=True)
class SchedulerOutput:
    """Result of a step; ``output[0]``, ``output["prev_sample"]`` and ``prev_sample, x0 = output`` read it too.

    Attributes:
        prev_sample: the sample at the previous timestep.
    """

    prev_sample: Tensor
    _original: Tensor | _Pending = field(repr=False)

    def __getitem__(self, key: int | slice | str) -> Any:
        names = ("prev_sample", "pred_original_sample")
        if isinstance(key, str):
            if key not in names:
                raise KeyError(key)
            return getattr(self, key)
        # By name, so that output[0] makes no x̂₀.
        chosen = names[key]
        return getattr(self, chosen) if isinstance(chosen, str) else tuple(getattr(self, name) for name in chosen)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.to_tuple())

    def to_tuple(self) -> tuple[Tensor, Tensor]:
        """``(prev_sample, pred_original_sample)``."""
        return self.prev_sample, self.pred_original_sample

    @property
    def pred_original_sample(self) -> Tensor:
        """x̂₀, clipped where the scheduler clips.

        A step that does not need it makes it here, of the sample and the model's output, which it keeps alive for that.

        Raises:
            RuntimeError: one of them was changed in place since the step.
        """
        x0 = self._original.make() if isinstance(self._original, _Pending) else self._original
        return x0.to(self.prev_sample.dtype)


class _Pending:
    """x̂₀ of a step that did not make it."""

    def __init__(self, scheduler: _Scheduler, model_output: Tensor, sample: Tensor, step: int | Tensor) -> None:
        self._scheduler, self._inputs, self._step = scheduler, (model_output, sample), step
        self._versions = [x._version for x in self._inputs]

    def make(self) -> Tensor:
        if [x._version for x in self._inputs] != self._versions:
            raise RuntimeError(
                "pred_original_sample: the sample or the model's output was changed in place since the step; read it"
                " before that, or step with return_dict=False"
            )
        return self._scheduler._estimate(*self._inputs, self._step)[0]


class _Scheduler:
    """What the schedulers share: timesteps, coefficients, seeds."""

    order = 1
    init_noise_sigma = 1.0
    _settings: type[SchedulerConfig | RePaintConfig] = SchedulerConfig
    # diffusers' settings that are not varied, at the value that is what is done; None where any is.
    _fixed: ClassVar[dict[str, Any]] = {
        "thresholding": False,
        "dynamic_thresholding_ratio": None,
        "sample_max_value": None,
        "rescale_betas_zero_snr": False,
    }
    # Settings of another scheduler, which a configuration may hold.
    _foreign: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        **config: Any,
    ) -> None:
        varied = {f.name for f in fields(self._settings)}
        for name in [name for name in config if name not in varied]:
            if name not in self._fixed:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument '{name}'")
            value, fixed = config.pop(name), self._fixed[name]
            if fixed is not None and value != fixed:
                raise ValueError(f"{name}: got {value!r}, expected {fixed!r}, all that {type(self).__name__} does")
        self.config = self._settings(num_train_timesteps, beta_start, beta_end, beta_schedule, **config)
        self.schedule = self.config.schedule()
        self.num_inference_steps = self.schedule.steps
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._plan(torch.arange(self.schedule.steps - 1, -1, -1), torch.arange(-1, self.schedule.steps - 1))

    @classmethod
    def from_config(cls: type[_Made], config: Mapping[str, Any], **changes: Any) -> _Made:
        """The scheduler of a configuration: of diffusers (DDIM's, DDPM's, RePaint's), of this module or in a dict.

        Args:
            config: settings by name. Names that begin with ``_`` are ignored, and, as in diffusers, what only another
                scheduler reads: ``variance_type`` by DDIM, ``set_alpha_to_one`` by DDPM, both by RePaint.
            changes: settings in place of those.

        Raises:
            TypeError: ``config`` is no mapping, or a setting has no meaning here.
            ValueError: a setting has a value that is not supported.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config: got {backends.describe(config)}, expected a mapping, as scheduler.config is")
        kept = {name: config[name] for name in config if not name.startswith("_") and name not in cls._foreign}
        return cls(**{**kept, **changes})

    def __len__(self) -> int:
        return self.schedule.steps

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in self.config.items())
        return f"{type(self).__name__}({settings})"

    @property
    def betas(self) -> Tensor:
        """β of each timestep, float64 ``[N]``."""
        return self.schedule.betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of each timestep, float64 ``[N]``."""
        return self.schedule.alpha_bar[1:]

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """ᾱ where the last step goes: 1, float64 ``[]``."""
        return self.schedule.alpha_bar[0]

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """``sample``: these schedulers do not scale the network's input."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the timesteps of a loop, descending. A step goes from each to the next, the last to x̂₀.

        Args:
            num_inference_steps: how many, 1…N, at the spacing of the configuration.
            device: where :attr:`timesteps` lie, int64.
            timesteps: these instead, descending in N−1…0.

        Raises:
            TypeError: ``num_inference_steps`` is no integer.
            ValueError: a value out of range, ``timesteps`` that do not descend, both arguments or neither.
        """
        if (num_inference_steps is None) == (timesteps is None):
            got = "neither" if timesteps is None else "both"
            raise ValueError(f"num_inference_steps, timesteps: got {got}, expected one of them")
        chosen = self._spaced(num_inference_steps) if timesteps is None else self._given(timesteps)
        n, k = self.schedule.steps, len(chosen)
        previous = torch.arange(n) - n // k
        previous[chosen] = torch.cat([chosen[1:], torch.tensor([-1])])
        self.num_inference_steps = k
        self._plan(chosen, previous.clamp(min=-1), device)

    def _spaced(self, num_inference_steps: Any) -> Tensor:
        n = self.schedule.steps
        k = backends.integer("num_inference_steps", num_inference_steps, low=1, high=n)
        spacing = self.config.timestep_spacing
        if spacing == "leading":
            timesteps = torch.arange(k).flip(0) * (n // k) + self.config.steps_offset
            if int(timesteps[0]) >= n:
                raise ValueError(
                    f"steps_offset: got {self.config.steps_offset}, expected at most {n - 1 - (k - 1) * (n // k)}"
                )
            return timesteps
        # In the order of operations of numpy's linspace and arange, so that halves round as in diffusers.
        if spacing == "linspace":
            exact = torch.arange(k, dtype=torch.float64).flip(0) * ((n - 1) / max(k - 1, 1))
            return exact.round().to(torch.int64)
        exact = n + torch.arange(k, dtype=torch.float64) * ((n - n / k) - n)
        return exact.round().to(torch.int64) - 1

    def _given(self, timesteps: Sequence[int] | Tensor) -> Tensor:
        given, n = torch.as_tensor(timesteps, device="cpu"), self.schedule.steps
        if given.dtype != torch.int64 or given.ndim != 1 or len(given) == 0:
            raise ValueError(f"timesteps: got {backends.describe(given)}, expected a list of integers or int64 [n]")
        if int(given[0]) >= n or int(given[-1]) < 0 or bool((given.diff() >= 0).any()):
            raise ValueError(f"timesteps: got {reprlib.repr(given.tolist())}, expected them to descend in {n - 1}…0")
        return given

    def _plan(self, timesteps: Tensor, previous: Tensor, device: torch.device | str | None = None) -> None:
        self.timesteps = timesteps.to(device) if device is not None else timesteps
        self._previous = previous.tolist()
        self._tables.clear()
        self._visits = 0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """The forward process √ᾱ_t x₀ + √(1−ᾱ_t) ε.

        Args:
            original_samples: x₀ ``[B, …]``, floating-point.
            noise: ε, of that shape.
            timesteps: 0…N−1, as in :meth:`DDIMScheduler.step`.

        Raises:
            TypeError: ``timesteps`` is neither an integer nor a tensor.
            ValueError: a wrong shape or dtype, or a timestep outside 0…N−1, unless it is on a GPU.
        """
        signal, sigma = self._forward("original_samples", original_samples, noise, timesteps)
        return (signal * _wide(original_samples) + sigma * _wide(noise)).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """The target of v-prediction, √ᾱ_t ε − √(1−ᾱ_t) x₀; arguments and errors as in :meth:`add_noise`."""
        signal, sigma = self._forward("sample", sample, noise, timesteps)
        return (signal * _wide(noise) - sigma * _wide(sample)).to(sample.dtype)

    def _forward(self, name: str, x: Tensor, noise: Tensor, timesteps: int | Tensor) -> tuple[Tensor, Tensor]:
        backends.check_rows(name, x)
        _check_shape("noise", noise, name, x)
        return self._coefficients(x, self._timestep("timesteps", timesteps, x) + 1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The schedule's table and the previous timestep of each, on ``device``."""
        if device not in self._tables:
            self._tables[device] = self.schedule.table.to(device), torch.tensor(self._previous, device=device)
        return self._tables[device]

    def _coefficients(self, x: Tensor, step: int | Tensor, low: int = 1) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1−ᾱ) of a diffusion step, to be broadcast against ``x [B, …]`` in float32 or more.

        Where a tensor has a step before ``low`` or behind the last they are NaN.
        """
        if isinstance(step, int):
            # Scalars on the CPU, which any device takes without waiting.
            row = self.schedule.table[step].to(torch.float64)
        else:
            row = backends.row_coefficients(self._on(x.device)[0], 0, step, x, low)
        return row[..., SQRT_ALPHA_BAR], row[..., SQRT_ONE_MINUS_ALPHA_BAR]

    def _timestep(self, name: str, timestep: int | Tensor, x: Tensor) -> int | Tensor:
        """``timestep`` for rows ``x [B, …]``: an int, or int64 ``[]`` or ``[B]`` on their device.

        What is on a GPU stays there and is not read back; nor are values read while compiling.
        """
        last = self.schedule.steps - 1
        if isinstance(timestep, Tensor):
            if timestep.shape == (1,):
                timestep = timestep[0]
            if timestep.dtype in _SMALL_INTEGERS:
                timestep = timestep.to(torch.int64)
            moved = timestep.to(x.device)
            backends.check_step(name, 0, moved, len(x), x.device, 0, last)
            if not timestep.is_cpu or torch.compiler.is_compiling():
                return moved
            values = timestep.reshape(-1).tolist()
            found: int | Tensor = moved if timestep.ndim else values[0]
            values = [min(values), max(values)] if values else []
        else:
            found = backends.integer(name, timestep, "an integer or an int64 tensor")
            values = [found]
        for t in values:
            if not 0 <= t <= last:
                raise ValueError(f"{name}: got {t}, expected 0…{last}")
        return found

    def _strides(self, timestep: int | Tensor, sample: Tensor) -> tuple[int | Tensor, int | Tensor]:
        """Diffusion steps (t + 1, t' + 1)."""
        backends.check_rows("sample", sample)
        t = self._timestep("timestep", timestep, sample)
        if isinstance(t, Tensor):
            # A timestep on a GPU that does not exist has a step that does not, which gives NaN.
            within = t.reshape(-1).clamp(0, self.schedule.steps - 1)
            previous = self._on(sample.device)[1].index_select(0, within)
            return t + 1, previous.reshape(t.shape) + 1
        return t + 1, self._previous[t] + 1

    def _seed(self, seed: int | Tensor | None, generator: torch.Generator | None, sample: Tensor) -> int | Tensor:
        if seed is None:
            device = "cpu" if generator is None else generator.device
            drawn = torch.randint(2**63 - 1, (), generator=generator, device=device)
            # A compiler does not know the value.
            seed = drawn.to(sample.device) if drawn.is_cuda or torch.compiler.is_compiling() else int(drawn)
        return seed

    @property
    def _clip(self) -> float | None:
        return self.config.clip_sample_range if self.config.clip_sample else None

    def _estimate(self, model_output: Tensor, sample: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """x̂₀, clipped where the scheduler clips, and the network's ε̂, in float32 or more."""
        signal, sigma = self._coefficients(sample, step)
        x, output = _wide(sample), _wide(model_output, sample.dtype)
        if self.config.prediction_type == "epsilon":
            x0, eps = (x - sigma * output) / signal, output
        elif self.config.prediction_type == "sample":
            x0, eps = output, (x - signal * output) / sigma
        else:
            x0, eps = signal * x - sigma * output, signal * output + sigma * x
        return x0 if self._clip is None else x0.clamp(-self._clip, self._clip), eps

    def _advance(
        self,
        model_output: Tensor,
        sample: Tensor,
        step: int | Tensor,
        previous: int | Tensor,
        eta: float,
        recompute: bool,
        seed: int | Tensor,
        row_id: Tensor | None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The sample at ``previous``, in its dtype or a wider one, and x̂₀ where it was made on the way.

        ``recompute``: whether ε̂ is made again from the clipped x̂₀. ``noise``: normals in place of the seed's. The op
        takes ε̂ alone and divides by √ᾱ for x̂₀, 5e-5 at the end of a cosine schedule; so only the network's own ε̂ and
        sample go there, and what is computed here is never rounded before that division.
        """
        _check_shape("model_output", model_output, "sample", sample)
        clip = self._clip
        if self.config.prediction_type == "epsilon" and (recompute or clip is None) and noise is None:
            table = self._on(sample.device)[0]
            done = ops.ddim_step(
                sample, model_output, table, step, previous, eta=eta, seed=seed, row_id=row_id, clip=clip
            )
            return done, None
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta: got {eta}, expected a value in [0, 1]")
        x0, eps = self._estimate(model_output, sample, step)
        signal, sigma = self._coefficients(sample, step)
        prev_signal, prev_sigma = self._coefficients(sample, previous, low=0)
        if recompute and clip is not None:
            eps = (_wide(sample) - signal * x0) / sigma
        if eta == 0.0:
            return prev_signal * x0 + prev_sigma * eps, x0
        std, direction = ddim_deviations(signal, sigma, prev_signal, prev_sigma, eta)
        if noise is None:
            noise = self._noise(sample, step, Draw.REVERSE, seed, row_id)
        return prev_signal * x0 + direction * eps + std * _wide(noise), x0

    def _noise(
        self, sample: Tensor, step: int | Tensor, draw: Draw, seed: int | Tensor, row_id: Tensor | None
    ) -> Tensor:
        """Normals in the shape of ``sample``, in float32 or more."""
        dtype, device = torch.promote_types(sample.dtype, torch.float32), sample.device
        return ops.randn(sample.shape, seed=seed, row_id=row_id, step=step, draw=draw, dtype=dtype, device=device)

    def _output(
        self,
        previous: Tensor,
        x0: Tensor | None,
        model_output: Tensor,
        sample: Tensor,
        step: int | Tensor,
        return_dict: bool,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        previous = previous.to(sample.dtype)
        if x0 is None or x0 is model_output:
            # A loop that reads prev_sample alone does not pay for x̂₀; a compiler drops it by itself.
            watched = not (torch.compiler.is_compiling() or model_output.is_inference() or sample.is_inference())
            if return_dict and watched:
                return SchedulerOutput(previous, _Pending(self, model_output, sample, step))
            x0 = self._estimate(model_output, sample, step)[0]
        return SchedulerOutput(previous, x0) if return_dict else (previous, x0.to(sample.dtype))


def _wide(x: Tensor, like: torch.dtype | None = None) -> Tensor:
    """``x`` in float32, or in its own dtype or ``like`` where that is wider."""
    return x.to(torch.promote_types(torch.promote_types(x.dtype, like or x.dtype), torch.float32))


class DDIMScheduler(_Scheduler):
    """DDIM (Song et al. 2021) in place of ``diffusers.DDIMScheduler``, on :func:`modafill.ops.ddim_step`.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, config: fields of :class:`SchedulerConfig`. Other
            settings of diffusers are taken where their value is what is done here (``set_alpha_to_one=True``).

    Raises:
        TypeError: an unknown setting.
        ValueError: a value that is not supported.
    """

    _fixed: ClassVar = {**_Scheduler._fixed, "set_alpha_to_one": True}
    _foreign = ("variance_type",)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        row_id: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The sample one timestep earlier.

        Args:
            model_output: like ``sample``.
            timestep: 0…N−1, an integer, or integers ``[]``, ``[1]`` or ``[B]``.
            sample: ``[B, …]``, floating-point.
            eta: 0 deterministic, 1 ancestral.
            use_clipped_model_output: whether ε̂ is recomputed from the clipped x̂₀. The fused op does that; without it, a
                scheduler that clips takes several passes.
            generator: draws the seed where ``seed`` is None and ``eta`` > 0.
            variance_noise: standard normal noise like ``sample``, instead of a seed and of the fused op.
            return_dict: False gives ``(prev_sample, pred_original_sample)``.
            seed, row_id: as in :func:`modafill.ops.ddim_step`.

        Raises:
            TypeError: ``timestep`` is neither an integer nor a tensor.
            ValueError: a wrong shape or dtype, a timestep outside 0…N−1 (on a GPU it is not read back, and its row
                becomes NaN), or ``variance_noise`` beside ``generator`` or ``seed``.
        """
        if variance_noise is not None:
            if generator is not None or seed is not None:
                raise ValueError("variance_noise: got it beside generator or seed, expected one of them")
            _check_shape("variance_noise", variance_noise, "sample", sample)
        step, previous = self._strides(timestep, sample)
        key = self._seed(seed, generator, sample) if eta > 0 and variance_noise is None else 0
        again = use_clipped_model_output
        done, x0 = self._advance(model_output, sample, step, previous, eta, again, key, row_id, variance_noise)
        return self._output(done, x0, model_output, sample, step, return_dict)


class DDPMScheduler(_Scheduler):
    """Ancestral sampling (Ho et al. 2020) in place of ``diffusers.DDPMScheduler``, with its ``fixed_small`` variance.

    A stride t → t' is DDIM's with η = 1: the same mean and the same variance β̃.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, config: as in :class:`DDIMScheduler`.
    """

    _fixed: ClassVar = {**_Scheduler._fixed, "variance_type": "fixed_small"}
    _foreign = ("set_alpha_to_one",)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        row_id: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The sample one timestep earlier; arguments and errors as in :meth:`DDIMScheduler.step`."""
        step, previous = self._strides(timestep, sample)
        seed = self._seed(seed, generator, sample)
        done, x0 = self._advance(model_output, sample, step, previous, 1.0, True, seed, row_id)
        return self._output(done, x0, model_output, sample, step, return_dict)


class RePaintScheduler(_Scheduler):
    """Masked sampling (Lugmayr et al. 2022) in place of ``diffusers.RePaintScheduler``.

    Single steps with η = 1, no clipping and a bool mask ``[B, M]`` for samples ``[B, M, D]`` are
    :func:`modafill.ops.masked_reverse_step`, one pass; everything else is a DDIM step and the mix.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, config: as in :class:`DDIMScheduler`, but fields of
            :class:`RePaintConfig`; timesteps are always ``"leading"``, predictions always ε.
    """

    config: RePaintConfig
    _settings = RePaintConfig
    _fixed: ClassVar = {
        **_Scheduler._fixed,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    _foreign = ("set_alpha_to_one", "variance_type")

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        device: torch.device | str | None = None,
    ) -> None:
        """Timesteps with RePaint's jumps: ``jump_length`` steps forward, ``jump_n_sample`` − 1 times at each place.

        Where a timestep is larger than the one before, the loop calls :meth:`undo_step`. With ``jump_n_sample=1`` that
        never happens.
        """
        for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
            backends.integer(name, value, low=1)
        super().set_timesteps(num_inference_steps)
        jumps = dict.fromkeys(range(0, num_inference_steps - jump_length, jump_length), jump_n_sample - 1)
        places, at = [], num_inference_steps
        while at > 0:
            at -= 1
            places.append(at)
            if jumps.get(at, 0) > 0:
                jumps[at] -= 1
                places += range(at + 1, at + jump_length + 1)
                at += jump_length
        stride = self.schedule.steps // num_inference_steps
        previous = (torch.arange(self.schedule.steps) - stride).clamp(min=-1)
        self._plan(torch.tensor(places) * stride, previous, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        row_id: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The sample one timestep earlier, what is known noised afresh.

        Args:
            original_image: what is known, like ``sample``.
            mask: True or 1 where it is known: bool ``[B, M]`` for samples ``[B, M, D]``, or bool or float that
                broadcasts against ``sample``; a float mixes.
            model_output, timestep, sample, generator, seed, row_id, return_dict: as in :meth:`DDIMScheduler.step`. A
                timestep that is visited again gets other noise under the same seed.
        """
        step, previous = self._strides(timestep, sample)
        seed = self._visited(self._seed(seed, generator, sample))
        by_token = mask.dtype == torch.bool and mask.ndim == 2 and sample.ndim == 3
        single = isinstance(step, int) and isinstance(previous, int) and step - previous == 1
        x0 = None
        if by_token and single and self._clip is None and self.config.eta == 1.0:
            table = self._on(sample.device)[0]
            done = ops.masked_reverse_step(
                sample, model_output, original_image, mask, table, step, seed=seed, row_id=row_id
            )
        else:
            unknown, x0 = self._advance(model_output, sample, step, previous, self.config.eta, False, seed, row_id)
            signal, sigma = self._coefficients(sample, previous, low=0)
            known = signal * _wide(original_image) + sigma * self._noise(sample, step, Draw.REVERSE, seed, row_id)
            if mask.dtype == torch.bool:
                done = torch.where(mask[..., None] if by_token else mask, known, unknown.to(known.dtype))
            else:
                share = _wide(mask)
                done = share * known + (1 - share) * unknown
        return self._output(done, x0, model_output, sample, step, return_dict)

    def undo_step(
        self,
        sample: Tensor,
        timestep: int | Tensor,
        generator: torch.Generator | None = None,
        *,
        seed: int | Tensor | None = None,
        row_id: Tensor | None = None,
    ) -> Tensor:
        """Noise a sample forward to ``timestep`` from where a step from it led: √r x + √(1−r) z, r = ᾱ_t/ᾱ_t'.

        One draw for a stride of any length. diffusers takes the β of the stride after it, which is another one unless
        the stride is 1.
        """
        seed = self._visited(self._seed(seed, generator, sample))
        step, previous = self._strides(timestep, sample)
        signal, sigma = self._coefficients(sample, step)
        prev_signal, prev_sigma = self._coefficients(sample, previous, low=0)
        noise = self._noise(sample, step, Draw.RESAMPLE, seed, row_id)
        deviation = stride_deviation(signal, sigma, prev_signal, prev_sigma)
        return (signal / prev_signal * _wide(sample) + deviation * noise).to(sample.dtype)

    def _visited(self, seed: int | Tensor) -> int | Tensor:
        """Another seed for each call since :meth:`set_timesteps`."""
        self._visits += 1
        shift = (self._visits - 1) * _VISIT % 2**64
        if isinstance(seed, Tensor):
            return seed + (shift - 2**64 if shift >= 2**63 else shift)
        return (seed + shift) % 2**64
