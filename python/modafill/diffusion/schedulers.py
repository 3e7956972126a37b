"""Schedulers with the names and calls of diffusers, on the fused step ops: an existing loop changes one line.

A timestep t counts from 0 as in diffusers; it is step t + 1 of a :class:`~modafill.diffusion.Schedule`. Noise comes
from the counter-based generator of the ops, keyed by ``seed=`` and ``row_id=`` where they are given. Otherwise each
step takes a fresh seed from ``generator`` (or torch's own), so that ``torch.manual_seed`` makes a loop repeatable. In a
compiled step torch's own is what the compiler makes of it: other draws under inductor, and no ``generator``.

Timesteps are diffusers', and results agree within float32 rounding, but for these departures:

- The noise: it does not depend on the batch, its order or the device; RePaint's is of the seed, the row, the timestep
  and the number of calls since ``set_timesteps``, so parts of a batch want a scheduler each. ``variance_noise`` takes
  diffusers' own.
- A DDIM step goes from each of the n timesteps to the next one, and from the last to x̂₀. diffusers goes to t − N // n,
  which for ``"linspace"``, and for ``"trailing"`` where n does not divide N, is not where the next step begins: the
  sample then has another noise level than the network is told. For ``"leading"`` with ``steps_offset`` of N // n or
  more, its last step does not reach x̂₀.
- ``"trailing"`` gives n timesteps. For some n that do not divide N (61 for N = 1000), diffusers gives one more, −1.
- :meth:`RePaintScheduler.undo_step` draws once for a stride, with the β of that stride; diffusers takes those of the
  stride after it, which are other ones unless n = N.
- :class:`RePaintScheduler` heeds ``clip_sample_range``, takes bool masks and has ``add_noise``. It refuses n > N, which
  diffusers lowers to N, and other timesteps and predictions than its own, which diffusers ignores in a configuration.
- Refused, because they are not here: ``set_alpha_to_one=False``, ``thresholding``, ``rescale_betas_zero_snr``, sigmoid
  schedules and variances other than ``"fixed_small"``; and timesteps below 0, which diffusers counts from the end.
- ``betas`` and ``alphas_cumprod`` are float64: in float32, 1 − ᾱ has few digits left at the first timesteps.
- Refused, because it would do nothing or is ambiguous: what is not a setting of the scheduler, a list as ``generator``,
  ``generator`` beside ``seed``, ``variance_noise`` beside what else tells the noise.
- ``pred_original_sample`` has the dtype of ``prev_sample``; diffusers leaves a predicted x₀ in the model's.
- An output unpacks into its two tensors, diffusers' into their names.
- They are for loops of one's own: diffusers' pipelines make schedulers of theirs from a configuration, and there is no
  ``from_pretrained`` and ``save_pretrained``. ``dict(scheduler.config)`` is what diffusers' ``from_config`` takes.

Where an argument does not fit, a step raises before it draws or computes anything. Backends are those of
:mod:`modafill.ops`: one that ``MODAFILL_BACKEND`` names runs the ops, not the passes of PyTorch that some settings take
(see each class). Where it cannot draw the noise, it is refused for all settings.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from modafill import ops
from modafill.diffusion.scheduler_config import RePaintConfig, SchedulerConfig, check_share
from modafill.ops import backends
from modafill.ops.reference import SQRT_ALPHA_BAR, SQRT_ONE_MINUS_ALPHA_BAR, Draw, ddim_deviations, stride_deviation

_Made = TypeVar("_Made", bound="_Scheduler")

_CPU = torch.device("cpu")
_SMALL_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)
# Odd, so that every visit of a step has another seed (the golden ratio of 64 bits, as in splitmix64); as int64.
_VISIT = 0x9E3779B97F4A7C15 - 2**64


def _check_like(name: str, value: Tensor, like: str, x: Tensor) -> None:
    """``value`` is floating-point and has the shape and device of ``x``."""
    backends.check_tensor(name, value)
    if not value.is_floating_point() or value.shape != x.shape or value.device != x.device:
        raise ValueError(
            f"{name}: got {backends.describe(value)}, expected floating-point {list(x.shape)} on {x.device}, as {like}"
        )


class _Stride(NamedTuple):
    """The checked arguments of a step: ``sample`` in its widest dtype, diffusion steps t + 1 and t' + 1."""

    sample: Tensor
    step: int | Tensor
    previous: int | Tensor
    seed: int | Tensor
    row_id: Tensor | None


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

    def __getstate__(self) -> dict[str, Any]:
        # A copy has x̂₀ itself, and not the scheduler that would make it.
        return {"prev_sample": self.prev_sample, "_original": self.pred_original_sample}

    def to_tuple(self) -> tuple[Tensor, Tensor]:
        """``(prev_sample, pred_original_sample)``."""
        return self.prev_sample, self.pred_original_sample

    @property
    def pred_original_sample(self) -> Tensor:
        """x̂₀, clipped where the scheduler clips, in the dtype of ``prev_sample``.

        A step that does not need it leaves it to the first reading, with gradients if it was made with them, and keeps
        the sample and the model's output alive for that. Changes of those in place are seen where PyTorch counts them;
        not through ``.data``, an array or another library that shares the memory, or the replay of a CUDA graph: there,
        step with ``return_dict=False``.

        Raises:
            RuntimeError: one of them was changed in place since the step.
        """
        return self._original.get() if isinstance(self._original, _Pending) else self._original


class _Pending:
    """x̂₀ of a step that did not make it."""

    def __init__(self, scheduler: _Scheduler, model_output: Tensor, stride: _Stride) -> None:
        self._inputs = (scheduler, model_output, stride)
        self._versions = (model_output._version, stride.sample._version)
        self._grad = torch.is_grad_enabled()
        self._made: Tensor | None = None

    def get(self) -> Tensor:
        if self._made is not None:
            return self._made
        scheduler, model_output, stride = self._inputs
        if (model_output._version, stride.sample._version) != self._versions:
            raise RuntimeError(
                "pred_original_sample: the sample or the model's output was changed in place since the step; read it"
                " before that, or step with return_dict=False"
            )
        with torch.inference_mode(False), torch.set_grad_enabled(self._grad):
            self._made = scheduler._estimate(model_output, stride)[0].to(stride.sample.dtype)
        del self._inputs
        return self._made


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
        self._plan(torch.arange(self.schedule.steps - 1, -1, -1), torch.arange(-1, self.schedule.steps - 1))

    @classmethod
    def from_config(cls: type[_Made], config: Mapping[str, Any], **changes: Any) -> _Made:
        """The scheduler of a configuration: of diffusers (DDIM's, DDPM's, RePaint's), of this module or in a dict.

        Args:
            config: settings by name. Names that begin with ``_`` are ignored, and, as in diffusers, what only another
                scheduler reads: ``variance_type`` by DDIM, ``set_alpha_to_one`` by DDPM, both by RePaint. diffusers'
                RePaint ignores all settings that it has not; this one refuses those that it does not do.
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
        self._tables = {_CPU: (self.schedule.table, previous)}
        # Now, because a compiler that first found none would trace again.
        self._on(self.timesteps.device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """The forward process √ᾱ_t x₀ + √(1−ᾱ_t) ε.

        Args:
            original_samples: x₀ ``[B, …]``, floating-point.
            noise: ε, of that shape.
            timesteps: 0…N−1, as in :meth:`DDIMScheduler.step`.

        Raises:
            TypeError: ``timesteps`` is neither an integer nor a tensor.
            ValueError: a wrong shape or dtype, or a timestep outside 0…N−1, unless it is on a GPU.

        Returns:
            In the wider dtype of ``original_samples`` and ``noise``.
        """
        signal, sigma, x, noise, dtype = self._forward("original_samples", original_samples, noise, timesteps)
        return (signal * x + sigma * noise).to(dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """The target of v-prediction, √ᾱ_t ε − √(1−ᾱ_t) x₀; all else as in :meth:`add_noise`."""
        signal, sigma, x, noise, dtype = self._forward("sample", sample, noise, timesteps)
        return (signal * noise - sigma * x).to(dtype)

    def _forward(
        self, name: str, x: Tensor, noise: Tensor, timesteps: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
        backends.check_rows(name, x)
        _check_like("noise", noise, name, x)
        step = self._timestep("timesteps", timesteps, x) + 1
        dtype = torch.promote_types(x.dtype, noise.dtype)
        x, noise = _wide(x.to(dtype)), _wide(noise.to(dtype))
        return *self._coefficients(x, step), x, noise, dtype

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The schedule's table and the previous timestep of each, on ``device``."""
        if device not in self._tables:
            table, previous = self._tables[_CPU]
            self._tables[device] = table.to(device), previous.to(device)
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

        What is on a GPU stays there and is not read back; nor are values read while compiling, where an int becomes a
        tensor too: what indexes by a symbol would be traced again for each of its values.
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
            # The check would make a compiler take the value for a constant.
            plain = type(timestep) is int
            found = timestep if plain else backends.integer(name, timestep, "an integer or an int64 tensor")
            values = [found]
        for t in values:
            if not 0 <= t <= last:
                raise ValueError(f"{name}: got {t}, expected 0…{last}")
        if torch.compiler.is_compiling():
            return torch.full((), values[0], dtype=torch.int64, device=x.device)
        return found

    def _begin(
        self,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None,
        seed: int | Tensor | None,
        row_id: Tensor | None,
        inputs: Mapping[str, Tensor],
        draws: bool = True,
    ) -> tuple[_Stride, tuple[Tensor, ...]]:
        """Every argument of a step checked, ``sample`` and ``inputs`` in the widest dtype of them, and a seed.

        ``inputs`` are like ``sample``. Nothing is drawn unless the step ``draws``, nor before the last check.
        """
        backends.check_rows("sample", sample)
        for name, value in inputs.items():
            _check_like(name, value, "sample", sample)
        t = self._timestep("timestep", timestep, sample)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {backends.describe(generator)}, expected one torch.Generator or None")
        if seed is not None and generator is not None:
            raise ValueError("seed: got it beside generator, expected one of them")
        backends.check_noise(None if seed is None else backends.split_seed(seed)[1], row_id, len(sample), sample.device)
        dtype = functools.reduce(torch.promote_types, [value.dtype for value in inputs.values()], sample.dtype)
        if not torch.compiler.is_compiling():
            # The noise is what every way of stepping has of the ops.
            backends.select("randn", sample.device, torch.promote_types(dtype, torch.float32), "auto")
        previous: int | Tensor
        if isinstance(t, Tensor):
            # A timestep on a GPU that does not exist has a step that does not, which gives NaN.
            within = t.reshape(-1).clamp(0, self.schedule.steps - 1)
            previous = self._on(sample.device)[1].index_select(0, within).reshape(t.shape)
        else:
            previous = self._previous[t]
        key = self._seed(seed, generator, sample.device) if draws else 0
        cast = tuple(value.to(dtype) for value in inputs.values())
        return _Stride(sample.to(dtype), t + 1, previous + 1, key, row_id), cast

    def _seed(self, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> int | Tensor:
        if seed is None:
            where = _CPU if generator is None else generator.device
            drawn = torch.randint(2**63 - 1, (), generator=generator, device=where)
            # A compiler does not know the value.
            seed = drawn.to(device) if drawn.is_cuda or torch.compiler.is_compiling() else int(drawn)
        return seed

    @property
    def _clip(self) -> float | None:
        return self.config.clip_sample_range if self.config.clip_sample else None

    def _estimate(self, model_output: Tensor, stride: _Stride) -> tuple[Tensor, Tensor]:
        """x̂₀, clipped where the scheduler clips, and the network's ε̂, in float32 or more."""
        signal, sigma = self._coefficients(stride.sample, stride.step)
        x, output = _wide(stride.sample), _wide(model_output)
        if self.config.prediction_type == "epsilon":
            x0, eps = (x - sigma * output) / signal, output
        elif self.config.prediction_type == "sample":
            x0, eps = output, (x - signal * output) / sigma
        else:
            x0, eps = signal * x - sigma * output, signal * output + sigma * x
        return x0 if self._clip is None else x0.clamp(-self._clip, self._clip), eps

    def _advance(
        self, model_output: Tensor, stride: _Stride, eta: float, recompute: bool, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The sample at the end of ``stride``, in its dtype or a wider one, and x̂₀ where it was made on the way.

        ``recompute``: whether ε̂ is made again from the clipped x̂₀. ``noise``: normals in place of the seed's. The op
        takes ε̂ alone and divides by √ᾱ for x̂₀, 5e-5 at the end of a cosine schedule; so only the network's own ε̂ and
        sample go there, and what is computed here is never rounded before that division.
        """
        sample, step, previous, seed, row_id = stride
        clip = self._clip
        if self.config.prediction_type == "epsilon" and (recompute or clip is None) and noise is None:
            table = self._on(sample.device)[0]
            done = ops.ddim_step(
                sample, model_output, table, step, previous, eta=eta, seed=seed, row_id=row_id, clip=clip
            )
            return done, None
        x0, eps = self._estimate(model_output, stride)
        signal, sigma = self._coefficients(sample, step)
        prev_signal, prev_sigma = self._coefficients(sample, previous, low=0)
        if recompute and clip is not None:
            eps = (_wide(sample) - signal * x0) / sigma
        if eta == 0.0:
            return prev_signal * x0 + prev_sigma * eps, x0
        std, direction = ddim_deviations(signal, sigma, prev_signal, prev_sigma, eta)
        if noise is None:
            noise = self._noise(stride, Draw.REVERSE)
        return prev_signal * x0 + direction * eps + std * _wide(noise), x0

    def _noise(self, stride: _Stride, draw: Draw) -> Tensor:
        """Normals in the shape of the sample, in float32 or more."""
        sample, step, _, seed, row_id = stride
        dtype, device = torch.promote_types(sample.dtype, torch.float32), sample.device
        return ops.randn(sample.shape, seed=seed, row_id=row_id, step=step, draw=draw, dtype=dtype, device=device)

    def _output(
        self, done: Tensor, x0: Tensor | None, model_output: Tensor, stride: _Stride, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        sample = stride.sample
        done = done.to(sample.dtype)
        if x0 is None or x0 is model_output:
            # A loop that reads prev_sample alone does not pay for x̂₀; a compiler drops it by itself.
            watched = not (torch.compiler.is_compiling() or model_output.is_inference() or sample.is_inference())
            if return_dict and watched:
                return SchedulerOutput(done, _Pending(self, model_output, stride))
            x0 = self._estimate(model_output, stride)[0]
        x0 = x0.to(sample.dtype)
        return SchedulerOutput(done, x0) if return_dict else (done, x0)


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DDIMScheduler(_Scheduler):
    """DDIM (Song et al. 2021) in place of ``diffusers.DDIMScheduler``.

    Predictions of ε without clipping, or with ``use_clipped_model_output``, are :func:`modafill.ops.ddim_step`, one
    pass; all else, ``variance_noise`` too, is several passes of PyTorch.

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
            model_output: floating-point, of the shape and on the device of ``sample``.
            timestep: 0…N−1, an integer, or integers ``[]``, ``[1]`` or ``[B]``.
            sample: ``[B, …]``, floating-point.
            eta: 0 deterministic, 1 ancestral.
            use_clipped_model_output: whether ε̂ is recomputed from the clipped x̂₀.
            generator: draws the seed where ``seed`` is None and ``eta`` > 0.
            variance_noise: standard normal noise like ``model_output``, instead of a seed; not read where ``eta`` is 0.
            return_dict: False gives ``(prev_sample, pred_original_sample)``.
            seed, row_id: as in :func:`modafill.ops.ddim_step`.

        Returns:
            The sample and x̂₀, in the widest dtype of the floating-point tensors that are read.

        Raises:
            TypeError: ``timestep`` is neither an integer nor a tensor, or another argument of no type that is taken.
            ValueError: a wrong shape, dtype or device, a value out of range (a timestep on a GPU is not read back, and
                its row becomes NaN), ``generator`` beside ``seed``, or ``variance_noise`` beside any of ``generator``,
                ``seed`` and ``row_id``.
            RuntimeError: ``MODAFILL_BACKEND`` names a backend that cannot run here.
        """
        eta = check_share("eta", eta)
        backends.check_flag("use_clipped_model_output", use_clipped_model_output)
        backends.check_flag("return_dict", return_dict)
        inputs = {"model_output": model_output}
        if variance_noise is not None:
            for name, other in (("generator", generator), ("seed", seed), ("row_id", row_id)):
                if other is not None:
                    raise ValueError(f"variance_noise: got it beside {name}, expected one of them")
            backends.check_rows("sample", sample)
            _check_like("variance_noise", variance_noise, "sample", sample)
            if eta > 0.0:
                inputs["variance_noise"] = variance_noise
        draws = eta > 0.0 and variance_noise is None
        stride, (model_output, *noise) = self._begin(timestep, sample, generator, seed, row_id, inputs, draws)
        done, x0 = self._advance(model_output, stride, eta, use_clipped_model_output, *noise)
        return self._output(done, x0, model_output, stride, return_dict)


class DDPMScheduler(_Scheduler):
    """Ancestral sampling (Ho et al. 2020) in place of ``diffusers.DDPMScheduler``, with its ``fixed_small`` variance.

    A stride t → t' is DDIM's with η = 1: the same mean and the same variance β̃. Predictions of ε are
    :func:`modafill.ops.ddim_step`, one pass, clipped or not; others are several passes of PyTorch.

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
        """The sample one timestep earlier; arguments, results and errors as in :meth:`DDIMScheduler.step`."""
        backends.check_flag("return_dict", return_dict)
        stride, (model_output,) = self._begin(timestep, sample, generator, seed, row_id, {"model_output": model_output})
        done, x0 = self._advance(model_output, stride, 1.0, True)
        return self._output(done, x0, model_output, stride, return_dict)


class RePaintScheduler(_Scheduler):
    """Masked sampling (Lugmayr et al. 2022) in place of ``diffusers.RePaintScheduler``.

    Single steps (n > N / 2) with η = 1, no clipping and a bool mask ``[B, M]`` for samples ``[B, M, D]`` are
    :func:`modafill.ops.masked_reverse_step`, one pass; all else is several passes of PyTorch, with
    :func:`modafill.ops.ddim_step` among them where nothing is clipped.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, config: as in :class:`DDIMScheduler`, but fields of
            :class:`RePaintConfig`; timesteps are always ``"leading"``, predictions always ε.

    Attributes:
        eta: share of ancestral noise, 0…1, that of the configuration unless another is set.
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

    _eta: float | None = None

    @property
    def eta(self) -> float:
        return self.config.eta if self._eta is None else self._eta

    @eta.setter
    def eta(self, value: float) -> None:
        self._eta = check_share("eta", value)

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
            original_image: what is known, like ``model_output``.
            mask: True or 1 where it is known, on the device of ``sample``: bool ``[B, M]`` for samples ``[B, M, D]``,
                or bool or floating-point that broadcasts to the shape of ``sample``. One in floating-point mixes, and
                its dtype counts for that of the result.
            model_output, timestep, sample, generator, seed, row_id, return_dict: as in :meth:`DDIMScheduler.step`. A
                timestep that is visited again gets other noise under the same seed.

        Results and errors are those of :meth:`DDIMScheduler.step`.
        """
        backends.check_flag("return_dict", return_dict)
        known_there = _full_mask(mask, sample)
        inputs = {"model_output": model_output, "original_image": original_image}
        if mask.is_floating_point():
            inputs["mask"] = known_there
        stride, (model_output, original_image, *shares) = self._begin(timestep, sample, generator, seed, row_id, inputs)
        sample, step, previous, key, _ = stride
        x0 = None
        single = self.schedule.steps // self.num_inference_steps == 1
        if _by_token(mask, sample) and single and self._clip is None and self.eta == 1.0:
            table = self._on(sample.device)[0]
            done = ops.masked_reverse_step(
                sample, model_output, original_image, mask, table, step, seed=key, row_id=row_id
            )
        else:
            noise = self._noise(stride, Draw.REVERSE)
            # The op draws the same normals faster than the passes in its place would take them.
            given = noise if self.eta > 0.0 and self._clip is not None else None
            unknown, x0 = self._advance(model_output, stride, self.eta, False, given)
            signal, sigma = self._coefficients(sample, previous, low=0)
            known = signal * _wide(original_image) + sigma * noise
            if shares:
                share = _wide(shares[0])
                done = share * known + (1 - share) * unknown
            else:
                done = torch.where(known_there, known, unknown)
        return self._output(done, x0, model_output, stride, return_dict)

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
        the stride is 1. Arguments and errors are those of :meth:`step`.
        """
        stride, _ = self._begin(timestep, sample, generator, seed, row_id, {})
        signal, sigma = self._coefficients(sample, stride.step)
        prev_signal, prev_sigma = self._coefficients(sample, stride.previous, low=0)
        noise = self._noise(stride, Draw.RESAMPLE)
        deviation = stride_deviation(signal, sigma, prev_signal, prev_sigma)
        return (signal / prev_signal * _wide(sample) + deviation * noise).to(sample.dtype)

    def _plan(self, timesteps: Tensor, previous: Tensor, device: torch.device | str | None = None) -> None:
        super()._plan(timesteps, previous, device)
        # A tensor: a compiler would trace a step again for every count.
        self._visits = torch.zeros((), dtype=torch.int64, device=_CPU)

    def _seed(self, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> int | Tensor:
        """Another seed for each call since :meth:`set_timesteps`."""
        value, given = backends.split_seed(super()._seed(seed, generator, device))
        shift = self._visits * _VISIT  # modulo 2⁶⁴
        self._visits = self._visits + 1
        total = (value if given is None else given) + (
            shift.to(device) if torch.compiler.is_compiling() else int(shift)
        )
        return total if isinstance(total, Tensor) else total % 2**64


def _by_token(mask: Tensor, sample: Tensor) -> bool:
    return mask.dtype == torch.bool and mask.ndim == 2 and sample.ndim == 3


def _full_mask(mask: Tensor, sample: Tensor) -> Tensor:
    """``mask`` in the shape of ``sample``; TypeError or ValueError if it cannot be."""
    backends.check_rows("sample", sample)
    backends.check_tensor("mask", mask)
    by_token, of_kind = _by_token(mask, sample), mask.dtype == torch.bool or mask.is_floating_point()
    pairs = zip(mask.shape[::-1], sample.shape[::-1], strict=False)
    broadcasts = mask.ndim <= sample.ndim and all(size in (1, whole) for size, whole in pairs)
    fits = mask.shape == sample.shape[:2] if by_token else broadcasts
    if not (fits and of_kind and mask.device == sample.device):
        rows = f"bool {list(sample.shape[:2])}, or " if sample.ndim == 3 else ""
        raise ValueError(
            f"mask: got {backends.describe(mask)}, expected {rows}bool or floating-point that broadcasts to"
            f" {list(sample.shape)}, on {sample.device}"
        )
    return (mask[..., None] if by_token else mask).expand(sample.shape)
