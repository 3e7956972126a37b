"""Whole loops beside diffusers' own schedulers, which get the noise that ours drew."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_repaint
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from modafill import ops
from modafill.diffusion import schedulers
from modafill.diffusion.schedulers import DDIMScheduler, DDPMScheduler, RePaintScheduler
from modafill.ops.reference import Draw

SHAPE = (4, 3, 10)
SEED = 11
ZEROS = torch.zeros(2, 3)
ROWS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)


def network(x: Tensor, t: int) -> Tensor:
    """A bounded function of the sample and the timestep, for comparing loops."""
    return torch.tanh(0.8 * x.flip(1) + 0.1 * x.sum(-1, keepdim=True) + 0.002 * t)


class Fed:
    """diffusers' source of noise, replaced by a list of draws."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draws: Iterator[Tensor] = iter(())
        for module in (scheduling_ddim, scheduling_ddpm, scheduling_repaint):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: next(self.draws))


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Fed:
    return Fed(monkeypatch)


def rival(name: str, ours: Any, **config: Any) -> Any:
    """diffusers' scheduler of the same settings, with its cumulated product in float64."""
    made = getattr(diffusers, name)(**config)
    made.alphas_cumprod = ours.alphas_cumprod.clone()
    made.betas = ours.schedule.betas.clone()
    return made


def distance(x: Tensor, y: Tensor) -> float:
    """Norm of the difference over the norm: without clipping these loops end far from 1."""
    return float((x - y).norm() / y.norm())


def noise_of(t: int, draw: Draw = Draw.REVERSE) -> Tensor:
    return ops.randn(SHAPE, seed=SEED, step=t + 1, draw=draw, dtype=torch.float64)


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no clip": {"clip_sample": False},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.0},
    "v": {"prediction_type": "v_prediction", "clip_sample": False},
    "v and clip": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample", "clip_sample": False},
    "offset": {"steps_offset": 1, "clip_sample": False},
    "given betas": {"trained_betas": [0.01 + 0.0003 * n for n in range(200)], "num_train_timesteps": 200},
}


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("settings", list(SETTINGS))
def test_ddim_loops(fed: Fed, settings: str, recompute: bool, eta: float) -> None:
    config = SETTINGS[settings]
    ours = DDIMScheduler(**config)
    theirs = rival("DDIMScheduler", ours, **config)
    compare_loops(fed, ours, theirs, 40, eta=eta, use_clipped_model_output=recompute)


@pytest.mark.parametrize("steps", [25, 200])
@pytest.mark.parametrize("settings", list(SETTINGS))
def test_ddpm_loops(fed: Fed, settings: str, steps: int) -> None:
    config = SETTINGS[settings]
    ours = DDPMScheduler(**config)
    compare_loops(fed, ours, rival("DDPMScheduler", ours, **config), steps)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("steps", [7, 10, 1000])
def test_spacings(fed: Fed, spacing: str, steps: int) -> None:
    config = {"timestep_spacing": spacing, "clip_sample": False}
    ours = DDPMScheduler(**config)
    theirs = rival("DDPMScheduler", ours, **config)
    compare_loops(fed, ours, theirs, steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


def compare_loops(fed: Fed, ours: Any, theirs: Any, steps: int, **options: Any) -> None:
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    run_loops(fed, ours, theirs, **options)


def run_loops(fed: Fed, ours: Any, theirs: Any, **options: Any) -> None:
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = y = ops.randn(SHAPE, seed=SEED, dtype=torch.float64)
    for t in ours.timesteps:
        fed.draws = iter([noise_of(int(t))])
        mine = ours.step(network(x, int(t)), t, x, **options, seed=SEED)
        other = theirs.step(network(y, int(t)), t, y, **options)
        x, y = mine.prev_sample, other.prev_sample
        assert distance(mine.pred_original_sample, other.pred_original_sample) < 1e-5
    assert distance(x, y) < 1e-5


def compare_first_steps(
    fed: Fed, ours: Any, theirs: Any, dtype: torch.dtype, given: Sequence[Tensor] = (), **options: Any
) -> None:
    """From t = N − 1, where 1/√ᾱ is largest: ours may be wrong by twice what diffusers is in the same dtype.

    The float32 table of coefficients adds a rounding of the largest value.
    """
    t, steps = ours.timesteps[0], []
    assert int(t) == len(ours) - 1
    inputs = [ops.randn(SHAPE, seed=seed).to(dtype) for seed in (1, 2)]
    inputs[0] = inputs[0].clamp(-1, 1)
    seed = {"seed": SEED}
    for scheduler, kind, extra in ((theirs, torch.float64, {}), (theirs, dtype, {}), (ours, dtype, seed)):
        fed.draws = iter([noise_of(int(t)).to(kind)])
        output, sample = (x.to(kind) for x in inputs)
        more = [x.to(kind) if x.is_floating_point() or scheduler is theirs else x for x in given]
        more = [x[..., None] if x.ndim == 2 and scheduler is theirs else x for x in more]
        steps.append(scheduler.step(output, t, sample, *more, **options, **extra, return_dict=False))
    for exact, other, mine in zip(*steps, strict=True):
        assert mine.dtype == dtype
        allowed = 2 * (other - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= allowed


DDIM = [{"eta": eta, "use_clipped_model_output": again} for eta in (0.0, 0.7) for again in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "options"), [*(("DDIMScheduler", options) for options in DDIM), ("DDPMScheduler", {})]
)
def test_steps_are_exact_where_the_signal_is_least(
    fed: Fed, name: str, options: dict[str, Any], prediction: str, schedule: str, clip: bool, dtype: torch.dtype
) -> None:
    config = {"beta_schedule": schedule, "clip_sample": clip, "prediction_type": prediction}
    config["timestep_spacing"] = "trailing"
    ours = getattr(schedulers, name)(**config)
    theirs = rival(name, ours, **config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(2)
    compare_first_steps(fed, ours, theirs, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mask", ["rows", "mixed"])
def test_repaint_is_exact_where_the_signal_is_least(
    fed: Fed, mask: str, eta: float, schedule: str, clip: bool, dtype: torch.dtype
) -> None:
    config = {"beta_schedule": schedule, "clip_sample": clip, "eta": eta}
    ours = RePaintScheduler(**config)
    theirs = rival("RePaintScheduler", ours, **config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(1000, jump_n_sample=1)
    given = ROWS if mask == "rows" else torch.sigmoid(ops.randn(SHAPE, seed=5)).to(dtype)
    compare_first_steps(fed, ours, theirs, dtype, [ops.randn(SHAPE, seed=3).to(dtype), given])


@pytest.mark.parametrize("mask", ["rows", "elements", "mixed"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize("clip", [False, True])
def test_repaint_loops(fed: Fed, mask: str, eta: float, steps: int, clip: bool) -> None:
    config = {"num_train_timesteps": 100, "eta": eta, "clip_sample": clip}
    ours = RePaintScheduler(**config)
    theirs = rival("RePaintScheduler", ours, **config)
    ours.set_timesteps(steps, jump_n_sample=1)
    theirs.set_timesteps(steps, jump_n_sample=1)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    known = ops.randn(SHAPE, seed=3, dtype=torch.float64)
    masks = {
        "rows": ROWS,
        "elements": ops.randn(SHAPE, seed=4) > 0,
        "mixed": torch.sigmoid(ops.randn(SHAPE, seed=5, dtype=torch.float64)),
    }
    given = masks[mask]
    full = (given[..., None].expand(SHAPE) if given.ndim == 2 else given).to(torch.float64)
    x = y = ops.randn(SHAPE, seed=SEED, dtype=torch.float64)
    for visit, t in enumerate(ours.timesteps.tolist()):
        seed = (SEED + visit * schedulers._VISIT) % 2**64
        fed.draws = iter([ops.randn(SHAPE, seed=seed, step=t + 1, draw=Draw.REVERSE, dtype=torch.float64)])
        mine = ours.step(network(x, t), t, x, known, given, seed=SEED)
        other = theirs.step(network(y, t), t, y, known, full)
        x, y = mine.prev_sample, other.prev_sample
    assert distance(x, y) < 1e-5
    if mask == "rows":
        torch.testing.assert_close(x[given], known[given], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(3, 2), (2, 4), (10, 10)])
def test_repaint_jumps(fed: Fed, jump_length: int, jump_n_sample: int) -> None:
    config = {"num_train_timesteps": 25, "eta": 1.0, "clip_sample": False, "beta_end": 0.3}
    ours = RePaintScheduler(**config)
    theirs = rival("RePaintScheduler", ours, **config)
    jumps = {"jump_length": jump_length, "jump_n_sample": jump_n_sample}
    ours.set_timesteps(25, **jumps)
    theirs.set_timesteps(25, **jumps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    known, mask = ops.randn(SHAPE, seed=3, dtype=torch.float64), torch.eye(3, dtype=torch.bool)[[0, 1, 2, 0]]
    x = y = ops.randn(SHAPE, seed=SEED, dtype=torch.float64)
    last, seen = ours.timesteps[0] + 1, set()
    for visit, t in enumerate(ours.timesteps):
        seed = (SEED + visit * schedulers._VISIT) % 2**64
        forward = bool(t >= last)
        at, draw = (last, Draw.RESAMPLE) if forward else (t, Draw.REVERSE)
        draws = ops.randn(SHAPE, seed=seed, step=int(at) + 1, draw=draw, dtype=torch.float64)
        seen.add(float(draws[0, 0, 0]))
        fed.draws = iter([draws])
        if forward:
            x, y = ours.undo_step(x, last, seed=SEED), theirs.undo_step(y, last)
        else:
            x = ours.step(network(x, int(t)), t, x, known, mask, seed=SEED).prev_sample
            y = theirs.step(network(y, int(t)), t, y, known, mask[..., None].double()).prev_sample
        last = t
    assert distance(x, y) < 1e-5
    assert len(seen) == len(ours.timesteps), "no draw is used twice"


def test_undoing_a_long_stride_has_the_marginal_of_its_timestep() -> None:
    """From x₀ = 0 noised to t' = t − n, forward to t: the variance is 1 − ᾱ_t, in closed form."""
    ours = RePaintScheduler(num_train_timesteps=100, beta_end=0.2)
    ours.set_timesteps(20)
    bar = ours.alphas_cumprod
    for t in (4, 5, 60, 95):
        before = (1 - bar[t - 5]).sqrt() if t >= 5 else torch.zeros((), dtype=torch.float64)
        start = torch.ones(20000, 1, dtype=torch.float64) * before
        moved = ours.undo_step(start, t, seed=1)
        ratio = bar[t] / bar[t - 5] if t >= 5 else bar[t]
        torch.testing.assert_close(moved.mean(), ratio.sqrt() * before, rtol=0, atol=0.02)
        torch.testing.assert_close(moved.var(), 1 - ratio, rtol=0.05, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_timestep_that_is_not_read_and_does_not_exist_gives_nan(prediction: str) -> None:
    """As on a GPU: a compiler does not read them on a CPU. The op that ε goes to does."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=prediction == "epsilon")
    x = torch.ones(4, 3)
    compiled = torch.compile(lambda t: scheduler.step(x, t, x).prev_sample, backend="aot_eager", fullgraph=True)
    found = compiled(torch.tensor([-1, 5, 1000, 999]))
    assert found.isnan().all(1).tolist() == [True, False, True, False]
    assert found.isnan().any(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("steps", [1000, 50])
def test_undoing_adds_the_noise_of_the_stride_as_exactly_as_the_table_tells(steps: int) -> None:
    ours = RePaintScheduler()
    bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - ours.betas).cumprod(0)])
    stride = 1000 // steps
    for t in range(stride - 1, 1000, 37 * stride):
        ours.set_timesteps(steps)
        moved = ours.undo_step(torch.zeros(1, 1, dtype=torch.float64), t, seed=SEED)
        noise = ops.randn((1, 1), seed=SEED, step=t + 1, draw=Draw.RESAMPLE, dtype=torch.float64)
        expected = (1 - bar[t + 1] / bar[t + 1 - stride]).sqrt()
        torch.testing.assert_close((moved / noise).squeeze(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_the_forward_process(name: str) -> None:
    ours = getattr(schedulers, name)()
    theirs = rival(name, ours)
    x, noise, t = ops.randn(SHAPE, seed=1), ops.randn(SHAPE, seed=2), torch.tensor([0, 17, 500, 999])
    for method in ("add_noise", "get_velocity"):
        expected = getattr(theirs, method)(x, noise, t)
        torch.testing.assert_close(getattr(ours, method)(x, noise, t), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.scale_model_input(x, 3), x)
    assert (len(ours), ours.init_noise_sigma, ours.order) == (len(theirs), theirs.init_noise_sigma, theirs.order)


def loop(scheduler: Any, **options: Any) -> Tensor:
    scheduler.set_timesteps(10)
    x = ops.randn(SHAPE, seed=0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, int(t)), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("steps", [1000, 50])
def test_timesteps_are_diffusers(spacing: str, steps: int) -> None:
    config = {"num_train_timesteps": steps, "timestep_spacing": spacing}
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    for k in range(1, steps + 1):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(k)
        expected = theirs.timesteps.tolist()
        # One more than asked for, which is no timestep.
        if len(expected) > k:
            assert expected.pop() == -1
        assert ours.timesteps.tolist() == expected


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_goes_to_the_next_timestep(spacing: str) -> None:
    """With the true ε of one x₀, a loop stays on x = √ᾱ x₀ + √(1−ᾱ) ε at every timestep; diffusers leaves it."""
    x0, eps = ops.randn(SHAPE, seed=1, dtype=torch.float64), ops.randn(SHAPE, seed=2, dtype=torch.float64)
    ours = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    theirs = rival("DDIMScheduler", ours, timestep_spacing=spacing, clip_sample=False)
    for scheduler, stays in ((ours, True), (theirs, False)):
        scheduler.set_timesteps(7)
        wrong = []
        for t, following in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
            bar, after = ours.alphas_cumprod[t], ours.alphas_cumprod[following]
            x = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
            expected = after.sqrt() * x0 + (1 - after).sqrt() * eps
            wrong.append(distance(scheduler.step(eps, int(t), x).prev_sample, expected))
        assert (max(wrong) < 1e-4) is stays


@pytest.mark.parametrize("given", [[999, 700, 350, 349, 2], torch.tensor([900, 10, 0])], ids=["list", "tensor"])
def test_timesteps_of_ones_own(fed: Fed, given: Any) -> None:
    ours = DDPMScheduler(clip_sample=False)
    theirs = rival("DDPMScheduler", ours, clip_sample=False)
    ours.set_timesteps(timesteps=given)
    theirs.set_timesteps(timesteps=[int(t) for t in given])
    assert ours.timesteps.tolist() == list(given)
    assert ours.num_inference_steps == len(given)
    run_loops(fed, ours, theirs)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("settings", ["defaults", "no clip", "v", "sample"])
def test_given_noise(settings: str, recompute: bool, eta: float) -> None:
    ours = DDIMScheduler(**SETTINGS[settings])
    theirs = rival("DDIMScheduler", ours, **SETTINGS[settings])
    x, output, noise = (ops.randn(SHAPE, seed=seed, dtype=torch.float64) for seed in (1, 2, 3))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    state = torch.get_rng_state()
    mine, other = (scheduler.step(output, 500, x, eta, recompute, None, noise, False) for scheduler in (ours, theirs))
    for ones, others in zip(mine, other, strict=True):
        assert distance(ones, others) < 1e-6
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"


def test_noise_without_a_seed_is_torchs_to_repeat() -> None:
    torch.manual_seed(3)
    first = loop(DDPMScheduler())
    assert not torch.equal(loop(DDPMScheduler()), first)
    torch.manual_seed(3)
    assert torch.equal(loop(DDPMScheduler()), first)
    draws = [loop(DDPMScheduler(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_noise_with_a_seed_belongs_to_the_row() -> None:
    def partial(rows: list[int]) -> Tensor:
        scheduler = DDPMScheduler()
        scheduler.set_timesteps(5)
        x = ops.randn((4, 6), seed=0)[rows]
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, seed=SEED, row_id=torch.tensor(rows) + 7).prev_sample
        return x

    torch.testing.assert_close(partial([2, 0]), partial([0, 1, 2, 3])[[2, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", ["no clip", "defaults", "sample", "v and clip"])
@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler])
def test_timesteps_per_row(make: Callable[..., Any], settings: str) -> None:
    scheduler = make(**SETTINGS[settings])
    scheduler.set_timesteps(10)
    x, t = ops.randn(SHAPE, seed=0), torch.tensor([900, 0, 300, 300])
    options = {"eta": 0.7} if make is DDIMScheduler else {}
    together = scheduler.step(0.3 * x, t, x, **options, seed=SEED)
    for row, at in enumerate(t.tolist()):
        alone = scheduler.step(0.3 * x, at, x, **options, seed=SEED)
        torch.testing.assert_close(together.prev_sample[row], alone.prev_sample[row], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            together.pred_original_sample[row], alone.pred_original_sample[row], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", ["v and clip", "defaults", "sample"])
def test_dtypes_are_kept(dtype: torch.dtype, settings: str) -> None:
    ours = DDIMScheduler(**SETTINGS[settings])
    x = ops.randn(SHAPE, seed=0).to(dtype)
    previous, origin = ours.step(0.3 * x, 500, x, return_dict=False)
    exact = ours.step(0.3 * x.double(), 500, x.double())
    assert previous.dtype == origin.dtype == dtype
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(previous.double(), exact.prev_sample, rtol=tolerance, atol=tolerance)


def test_timesteps_per_row_follow_the_last_plan() -> None:
    """The strides of a plan are cached on the device; another plan has others."""
    x, t, scheduler = ops.randn(SHAPE, seed=0), torch.tensor([900, 0, 300, 500]), DDIMScheduler(clip_sample=False)
    for steps in (10, 100, 10):
        scheduler.set_timesteps(steps)
        fresh = DDIMScheduler(clip_sample=False)
        fresh.set_timesteps(steps)
        assert torch.equal(scheduler.step(0.3 * x, t, x).prev_sample, fresh.step(0.3 * x, t, x).prev_sample)


@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler, RePaintScheduler])
def test_timesteps_lie_on_the_device_asked_for(make: Callable[..., Any]) -> None:
    scheduler = make()
    scheduler.set_timesteps(10, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.device.type == "cpu"


def test_ddim_without_eta_draws_nothing() -> None:
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state(), generator.get_state()
    loop(DDIMScheduler())
    loop(DDIMScheduler(), generator=generator)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    loop(DDIMScheduler(), eta=0.1, generator=generator)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert not torch.equal(generator.get_state(), before[1])
    loop(DDIMScheduler(), eta=0.1)
    assert not torch.equal(torch.get_rng_state(), before[0])


def test_a_seed_in_a_tensor_gives_other_noise_on_every_visit() -> None:
    x = ops.randn(SHAPE, seed=0)
    seen = []
    for seed in (SEED, torch.tensor(SEED)):
        scheduler = RePaintScheduler(eta=1.0, clip_sample=False)
        steps = [scheduler.step(0.3 * x, 500, x, x, ROWS, seed=seed).prev_sample for _ in range(3)]
        undone = [scheduler.undo_step(x, 500, seed=seed) for _ in range(3)]
        seen.append(torch.stack([*steps, *undone]))
        assert len({float(one[3, 2, 0]) for one in seen[-1]}) == 6
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("config", "t", "mask", "fused"),
    [
        ({"eta": 1.0, "clip_sample": False}, 500, ROWS, True),
        ({"eta": 1.0, "clip_sample": False}, 0, ROWS, True),
        ({"eta": 0.5, "clip_sample": False}, 500, ROWS, False),
        ({"eta": 1.0}, 500, ROWS, False),
        ({"eta": 1.0, "clip_sample": False}, 500, ROWS.float()[..., None], False),
        ({"eta": 1.0, "clip_sample": False}, torch.tensor([500, 1, 2, 3]), ROWS, True),
    ],
)
def test_repaint_is_one_pass_where_it_can_be(
    config: dict[str, Any], t: int | Tensor, mask: Tensor, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    real = ops.masked_reverse_step
    monkeypatch.setattr(ops, "masked_reverse_step", lambda *a, **o: called.append(a) or real(*a, **o))
    x = ops.randn(SHAPE, seed=0)
    RePaintScheduler(**config).step(0.3 * x, t, x, x, mask, seed=SEED)
    assert len(called) == fused
    scheduler = RePaintScheduler(**config)
    scheduler.set_timesteps(10)
    scheduler.step(0.3 * x, 900, x, x, ROWS, seed=SEED)
    assert len(called) == fused, "a stride of more than one step is not its formula"


def one_step(scheduler: Any, output: Tensor, sample: Tensor, t: Any = 500, **options: Any) -> Any:
    more = (torch.zeros_like(sample), ROWS[: len(sample)]) if isinstance(scheduler, RePaintScheduler) else ()
    noise = {} if "generator" in options else {"seed": SEED}
    return scheduler.step(output, t, sample, *more, **{**noise, **options})


def plan(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(steps, **({"jump_n_sample": 1} if isinstance(scheduler, RePaintScheduler) else {}))


class AncestralDDIM(DDIMScheduler):
    """With noise, which is what the tests of noise need of every scheduler."""

    def step(self, *args: Any, **options: Any) -> Any:
        return super().step(*args, **{"eta": 0.7, **options})


UNCLIPPED = {"clip_sample": False}
# Every scheduler, through an op and through PyTorch.
WAYS = [
    pytest.param(AncestralDDIM, UNCLIPPED, id="DDIM-op"),
    pytest.param(AncestralDDIM, {}, id="DDIM-passes"),
    pytest.param(DDPMScheduler, {}, id="DDPM-op"),
    pytest.param(DDPMScheduler, SETTINGS["v"], id="DDPM-passes"),
    pytest.param(RePaintScheduler, {**UNCLIPPED, "eta": 1.0}, id="RePaint-op"),
    pytest.param(RePaintScheduler, {**UNCLIPPED, "eta": 0.5}, id="RePaint-ddim"),
    pytest.param(RePaintScheduler, {"eta": 0.5}, id="RePaint-passes"),
    pytest.param(RePaintScheduler, {}, id="RePaint-known"),
]
STEPS_WITHOUT_X0 = [(DDIMScheduler, UNCLIPPED), (DDPMScheduler, {}), (RePaintScheduler, {**UNCLIPPED, "eta": 1.0})]
STEPS_WITH_X0 = [(DDIMScheduler, {}), (DDPMScheduler, SETTINGS["v"]), (DDIMScheduler, SETTINGS["v and clip"])]


@pytest.mark.parametrize(("make", "config"), WAYS)
def test_noise_is_the_rows(make: Any, config: dict[str, Any]) -> None:
    """A row that is alone, or elsewhere in its batch, gets the noise of its id; another id gets another noise."""
    x, ids = ops.randn(SHAPE, seed=0), torch.tensor([7, 8, 9, 10])
    whole = one_step(make(**config), 0.3 * x, x, row_id=ids).prev_sample
    # The first row's mask has both kinds of token.
    same = one_step(make(**config), 0.3 * x[:1], x[:1], row_id=ids[:1]).prev_sample
    torch.testing.assert_close(same, whole[:1])
    for other in ({"row_id": ids[1:2]}, {}):
        assert not torch.allclose(one_step(make(**config), 0.3 * x[:1], x[:1], **other).prev_sample, same)


@pytest.mark.parametrize(("make", "config"), WAYS)
def test_noise_is_the_generators(make: Any, config: dict[str, Any]) -> None:
    x = ops.randn(SHAPE, seed=0)
    state = torch.get_rng_state()
    drawn = [
        one_step(make(**config), 0.3 * x, x, generator=torch.Generator().manual_seed(seed)).prev_sample
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_undoing_has_the_rows_and_the_generators_noise() -> None:
    x, ids = ops.randn(SHAPE, seed=0), torch.tensor([7, 8, 9, 10])
    whole = RePaintScheduler().undo_step(x, 500, seed=SEED, row_id=ids)
    assert RePaintScheduler().undo_step(x.bfloat16(), 500, seed=SEED).dtype == torch.bfloat16
    found = RePaintScheduler().undo_step(x[[2, 0]], 500, seed=SEED, row_id=ids[[2, 0]])
    torch.testing.assert_close(found, whole[[2, 0]])
    assert not torch.allclose(RePaintScheduler().undo_step(x, 500, seed=SEED), whole)
    state = torch.get_rng_state()
    drawn = [RePaintScheduler().undo_step(x, 500, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("make", "config"), WAYS)
def test_every_way_keeps_the_dtype(make: Any, config: dict[str, Any], dtype: torch.dtype) -> None:
    x = ops.randn(SHAPE, seed=0).to(dtype)
    for options in ({}, {"return_dict": False}):
        done = one_step(make(**config), 0.3 * x, x, **options)
        assert done[0].dtype == done[1].dtype == dtype


@pytest.mark.parametrize("t", [500, torch.tensor([900, 0, 300, 300])], ids=["int", "[B]"])
@pytest.mark.parametrize(
    ("make", "config"),
    [*WAYS, (AncestralDDIM, SETTINGS["v"]), (AncestralDDIM, SETTINGS["sample"]), (DDPMScheduler, SETTINGS["sample"])],
)
def test_a_step_in_bf16_is_rounded_once(make: Any, config: dict[str, Any], t: int | Tensor) -> None:
    x, output = (ops.randn(SHAPE, seed=seed).bfloat16() for seed in (0, 1))
    found, exact = one_step(make(**config), output, x, t), one_step(make(**config), output.float(), x.float(), t)
    for one, other in zip(found, exact, strict=True):
        assert torch.equal(one, other.bfloat16())


@pytest.mark.parametrize("kind", ["bf16 output", "bf16 sample", "float64 output"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMScheduler again", "DDPMScheduler", "RePaintScheduler"])
def test_dtypes_that_differ(fed: Fed, name: str, prediction: str, clip: bool, kind: str) -> None:
    """As under autocast: the dtype is diffusers', the values what they are where both are in the wider one."""
    name, _, again = name.partition(" ")
    config: dict[str, Any] = {"clip_sample": clip, "prediction_type": prediction}
    options: dict[str, Any] = {}
    if name == "RePaintScheduler":
        config["eta"] = 0.7
        if config.pop("prediction_type") != "epsilon":
            return
    elif name == "DDIMScheduler":
        options = {"eta": 0.7, "use_clipped_model_output": bool(again)}
    ours = getattr(schedulers, name)(**config)
    theirs = rival(name, ours, **config)
    for scheduler in (ours, theirs):
        plan(scheduler, 10)
    dtypes = {
        "bf16 output": (torch.float32, torch.bfloat16),
        "bf16 sample": (torch.bfloat16, torch.float32),
        "float64 output": (torch.float32, torch.float64),
    }[kind]
    x, output = (ops.randn(SHAPE, seed=seed).to(dtype) for seed, dtype in zip((1, 2), dtypes, strict=True))
    more: tuple[tuple[Tensor, ...], ...] = ((), ())
    if name == "RePaintScheduler":
        known = ops.randn(SHAPE, seed=3).to(dtypes[1])
        more = (known, ROWS), (known, ROWS[..., None].to(dtypes[1]))
    fed.draws = iter([noise_of(500).to(output.dtype)])
    mine = ours.step(output, 500, x, *more[0], **options, seed=SEED)
    other = theirs.step(output, 500, x, *more[1], **options)
    assert mine.prev_sample.dtype == other.prev_sample.dtype == torch.promote_types(*dtypes)
    assert mine.pred_original_sample.dtype == mine.prev_sample.dtype
    # diffusers rounds the noise, and a predicted sample, to the model's dtype.
    tolerance = 1e-2 if torch.bfloat16 in dtypes else 1e-5
    assert distance(mine.prev_sample, other.prev_sample) < tolerance
    assert distance(mine.pred_original_sample, other.pred_original_sample) < tolerance
    wide = [v.to(mine.prev_sample.dtype) for v in (output, x, *more[0][:1])]
    ours.set_timesteps(10)
    exact = ours.step(wide[0], 500, *wide[1:], *more[0][1:], **options, seed=SEED)
    assert torch.equal(mine.prev_sample, exact.prev_sample)
    assert torch.equal(mine.pred_original_sample, exact.pred_original_sample)


@pytest.mark.parametrize("wide", ["original_image", "mask"])
def test_all_that_repaint_mixes_counts_for_the_dtype(fed: Fed, wide: str) -> None:
    ours = RePaintScheduler()
    theirs = rival("RePaintScheduler", ours)
    for scheduler in (ours, theirs):
        plan(scheduler, 10)
    x, share = ops.randn(SHAPE, seed=1).bfloat16(), torch.sigmoid(ops.randn(SHAPE, seed=5)).bfloat16()
    given = {"original_image": 0.7 * x, "mask": share}
    given[wide] = given[wide].float()
    fed.draws = iter([noise_of(500).bfloat16()])
    mine, other = ours.step(0.3 * x, 500, x, **given, seed=SEED), theirs.step(0.3 * x, 500, x, **given)
    assert mine.prev_sample.dtype == other.prev_sample.dtype == torch.float32
    assert distance(mine.prev_sample, other.prev_sample) < 1e-2


def test_a_mix_is_not_rounded_on_the_way() -> None:
    """The last step leads to x̂₀ = 1 and what is known is −1: 1 − 2s, where bfloat16 has s, and has no 1 − s."""
    x, share = torch.full(SHAPE, 3.0, dtype=torch.bfloat16), torch.full(SHAPE, 255 / 512, dtype=torch.bfloat16)
    done = RePaintScheduler().step(0 * x, 0, x, torch.full_like(x, -1.0), share, seed=SEED).prev_sample
    assert torch.equal(done, torch.full_like(x, 1 / 256))


def test_given_noise_counts_for_the_dtype() -> None:
    ours = DDIMScheduler()
    theirs = rival("DDIMScheduler", ours)
    theirs.set_timesteps(1000)
    x, noise = ops.randn(SHAPE, seed=1).bfloat16(), ops.randn(SHAPE, seed=2)
    for eta, dtype in ((0.0, torch.bfloat16), (0.7, torch.float32)):
        found, expected = (s.step(0.3 * x, 500, x, eta, variance_noise=noise).prev_sample for s in (ours, theirs))
        assert found.dtype == expected.dtype == dtype
        assert distance(found.float(), expected.float()) < 1e-2


def test_a_step_under_autocast() -> None:
    x, layer = ops.randn(SHAPE, seed=0), torch.nn.Linear(10, 10)
    for make, config in ((DDIMScheduler, UNCLIPPED), (DDPMScheduler, {}), (RePaintScheduler, {})):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            output = layer(x)
            done = one_step(make(**config), output, x).prev_sample
        assert (output.dtype, done.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(done, one_step(make(**config), output.float(), x).prev_sample)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_forward_process_has_diffusers_dtype(name: str, dtypes: tuple[str, str]) -> None:
    ours = getattr(schedulers, name)()
    theirs = rival(name, ours)
    x, noise = (ops.randn(SHAPE, seed=seed).to(getattr(torch, d)) for seed, d in enumerate(dtypes))
    t = torch.tensor([0, 17, 500, 999])
    for method in ("add_noise", "get_velocity"):
        found, expected = (getattr(one, method)(x, noise, t) for one in (ours, theirs))
        assert found.dtype == expected.dtype
        assert distance(found.float(), expected.float()) < 1e-2


@pytest.mark.parametrize("steps", [10, 7, 300])
def test_a_timestep_outside_the_plan_has_the_stride_of_diffusers(steps: int) -> None:
    x, ours = ops.randn(SHAPE, seed=0, dtype=torch.float64), DDIMScheduler(clip_sample=False)
    theirs = rival("DDIMScheduler", ours, clip_sample=False)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    outside = [t for t in (1, 55, 503, 999) if t not in ours.timesteps]
    assert len(outside) >= 3
    for t in outside:
        found, expected = (scheduler.step(0.3 * x, t, x).prev_sample for scheduler in (ours, theirs))
        assert distance(found, expected) < 1e-5
        rows = ours.step(0.3 * x, torch.full((4,), t), x).prev_sample
        assert distance(rows, expected) < 1e-5


@pytest.mark.parametrize(("steps", "ends"), [(600, True), (500, False)])
def test_the_last_step_reaches_x0_whatever_the_offset(steps: int, ends: bool) -> None:
    """From t = 1: diffusers' DDIM goes to t − N // n, which is 0 where n > N / 2, and stays in the noise of it."""
    config = {"steps_offset": 1, "clip_sample": False}
    x, ours = ops.randn(SHAPE, seed=0, dtype=torch.float64), DDIMScheduler(**config)
    theirs = rival("DDIMScheduler", ours, **config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
        assert int(scheduler.timesteps[-1]) == 1
    mine, other = (scheduler.step(0.3 * x, 1, x) for scheduler in (ours, theirs))
    assert distance(mine.prev_sample, mine.pred_original_sample) < 1e-6
    assert (distance(other.prev_sample, other.pred_original_sample) > 1e-4) is ends


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("first", [0.3, 1.0])
def test_the_eta_of_repaint_can_be_set(first: float, clip: bool) -> None:
    """As diffusers' pipeline does."""
    x, scheduler = ops.randn(SHAPE, seed=0), RePaintScheduler(eta=first, clip_sample=clip)
    assert scheduler.eta == first
    for eta in (0.0, 0.6, 1):
        scheduler.eta = eta
        scheduler.set_timesteps(1000)
        found, expected = (one_step(s, 0.3 * x, x) for s in (scheduler, RePaintScheduler(eta=eta, clip_sample=clip)))
        assert torch.equal(found.prev_sample, expected.prev_sample)
        assert scheduler.config.eta == first
    for wrong, error, message in ((1.5, ValueError, "eta: got 1.5, expected a value in"), ("1", TypeError, "eta: got")):
        with pytest.raises(error, match=message):
            scheduler.eta = wrong
    assert scheduler.eta == 1.0


@pytest.mark.parametrize("clip", [False, True])
def test_repaint_draws_its_noise_once(clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = ops.randn
    monkeypatch.setattr(ops, "randn", lambda *a, **o: drawn.append(a) or real(*a, **o))
    x = torch.ones(SHAPE)
    RePaintScheduler(eta=0.5, clip_sample=clip).step(x, 500, x, x, ROWS, seed=SEED)
    assert len(drawn) == 1


@pytest.mark.parametrize("reader", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("maker", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(("make", "config"), STEPS_WITHOUT_X0)
def test_x0_has_the_grad_mode_of_its_step(make: Any, config: dict[str, Any], maker: Any, reader: Any) -> None:
    x = ops.randn(SHAPE, seed=0)
    output = (0.3 * x).requires_grad_()
    with maker():
        done = one_step(make(**config), output, x)
    with reader():
        found = done.pred_original_sample
    assert found.requires_grad is (maker is torch.enable_grad)
    assert not found.is_inference()
    if found.requires_grad:
        found.sum().backward()
        assert float(output.grad.abs().max()) > 0
    x.zero_()
    assert done.pred_original_sample is found, "it is made once"


def mask_of(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    "mask", [mask_of((4, 3, 1)), mask_of((10,)), mask_of(()), mask_of((3, 10)), mask_of((1, 3, 1))]
)
def test_masks_that_broadcast(mask: Tensor) -> None:
    x = ops.randn(SHAPE, seed=0)
    for kind in (mask, mask.bool()):
        if kind.dtype == torch.bool and kind.ndim == 2:
            continue
        done = RePaintScheduler().step(0.3 * x, 0, x, 2 * x, kind, seed=SEED)
        torch.testing.assert_close(done.prev_sample, 2 * x)


BAD_MASKS = [
    (mask_of((2, 4, 3, 10)), r"float32 \[2, 4, 3, 10\]"),
    (mask_of((5, 1, 1)), r"float32 \[5, 1, 1\]"),
    (mask_of((4, 3)), r"float32 \[4, 3\]"),
    (mask_of((3, 10), torch.bool), r"bool \[3, 10\]"),
    (mask_of((1, 3), torch.bool), r"bool \[1, 3\]"),
    (mask_of((4, 3, 1), torch.uint8), r"uint8 \[4, 3, 1\]"),
    (mask_of((4, 3, 1), torch.int64), r"int64 \[4, 3, 1\]"),
    (ROWS.to("meta"), r"bool \[4, 3\] on meta"),
    (None, "NoneType None"),
    (ROWS.tolist(), "list"),
]
X = torch.ones(SHAPE)
LIKE = r"expected floating-point \[4, 3, 10\] on cpu, as sample"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_a_copy_of_an_output_has_its_estimate(duplicate: Any) -> None:
    output = DDIMScheduler(**UNCLIPPED).step(X, 500, X + 1)
    again = duplicate(output)
    assert torch.equal(again.prev_sample, output.prev_sample)
    assert torch.equal(again.pred_original_sample, output.pred_original_sample)


BAD_STEPS: list[tuple[dict[str, Any], str]] = [
    ({"sample": X.long()}, r"sample: got int64 \[4, 3, 10\] on cpu, expected a floating-point tensor"),
    ({"sample": 1.0}, "sample: got float 1.0, expected a tensor"),
    ({"model_output": X.long()}, rf"model_output: got int64 \[4, 3, 10\] on cpu, {LIKE}"),
    ({"model_output": X[:1]}, rf"model_output: got float32 \[1, 3, 10\] on cpu, {LIKE}"),
    ({"model_output": X.to("meta")}, rf"model_output: got float32 \[4, 3, 10\] on meta, {LIKE}"),
    ({"model_output": None}, "model_output: got NoneType None, expected a tensor"),
    ({"timestep": 1000}, "timestep: got 1000, expected 0…999"),
    ({"seed": "a"}, "seed: got str 'a', expected an integer or an int64 tensor"),
    ({"seed": True}, "seed: got bool True, expected an integer or an int64 tensor"),
    ({"seed": 2**64 + 3}, "seed: got 18446744073709551619, expected a 64-bit integer"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed: got int64 \[2\] on cpu, expected an integer or int64 \[\]"),
    ({"row_id": torch.zeros(99)}, r"row_id: got float32 \[99\] on cpu, expected int64 \[4\] on cpu"),
    ({"row_id": [0, 1, 2, 3]}, "row_id: got list, expected a tensor"),
    ({"generator": [torch.Generator()] * 4}, "generator: got list, expected one torch.Generator or None"),
    ({"generator": torch.Generator(), "seed": 1}, "seed: got it beside generator, expected one of them"),
    ({"return_dict": "no"}, "return_dict: got str 'no', expected a bool"),
]
ONLY = {
    "DDIM": [
        ({"eta": 1.5}, r"eta: got 1.5, expected a value in \[0, 1\]"),
        ({"eta": None}, "eta: got NoneType None, expected a number"),
        ({"eta": "0"}, "eta: got str '0', expected a number"),
        ({"eta": True}, "eta: got bool True, expected a number"),
        ({"eta": object()}, "eta: got object, expected a number"),
        ({"eta": torch.tensor(0.0)}, "eta: got float32 .*, expected a number"),
        ({"use_clipped_model_output": torch.Generator()}, "use_clipped_model_output: got Generator, expected a bool"),
        ({"variance_noise": X.long()}, rf"variance_noise: got int64 \[4, 3, 10\] on cpu, {LIKE}"),
        (
            {"variance_noise": X, "row_id": torch.arange(4)},
            "variance_noise: got it beside row_id, expected one of them",
        ),
        ({"variance_noise": X, "seed": 0}, "variance_noise: got it beside seed, expected one of them"),
        ({"variance_noise": X, "generator": torch.Generator()}, "variance_noise: got it beside generator"),
    ],
    "DDPM": [],
    "RePaint": [
        ({"original_image": None}, "original_image: got NoneType None, expected a tensor"),
        ({"original_image": X[:1]}, rf"original_image: got float32 \[1, 3, 10\] on cpu, {LIKE}"),
        ({"original_image": torch.ones(2, *SHAPE)}, rf"original_image: got float32 \[2, 4, 3, 10\] on cpu, {LIKE}"),
        ({"original_image": X.long()}, rf"original_image: got int64 \[4, 3, 10\] on cpu, {LIKE}"),
        *(({"mask": mask}, f"mask: got {got}.*, expected") for mask, got in BAD_MASKS),
    ],
}
BY_CLASS = {"DDIM": DDIMScheduler, "DDPM": DDPMScheduler, "RePaint": RePaintScheduler}


@pytest.mark.parametrize(
    ("name", "config", "wrong", "message"),
    [
        (name, config, wrong, message)
        for name, config in [
            *(("DDIM", config) for config in (UNCLIPPED, {}, SETTINGS["sample"])),
            *(("DDPM", config) for config in ({}, SETTINGS["v"])),
            *(("RePaint", config) for config in ({**UNCLIPPED, "eta": 1.0}, {**UNCLIPPED, "eta": 0.5}, {})),
        ]
        for wrong, message in BAD_STEPS + ONLY[name]
    ],
)
def test_a_step_checks_its_arguments_before_any_work(
    name: str, config: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    """By name, in every way of stepping; nothing is drawn, and a visit that failed is none."""
    scheduler = BY_CLASS[name](**config)
    right = {"model_output": X, "timestep": 500, "sample": X}
    if name == "RePaint":
        right |= {"original_image": X, "mask": ROWS}
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=message):
        scheduler.step(**{**right, **wrong})
    assert torch.equal(torch.get_rng_state(), state)
    expected = BY_CLASS[name](**config).step(**right, seed=SEED).prev_sample
    assert torch.equal(scheduler.step(**right, seed=SEED).prev_sample, expected)


@pytest.mark.parametrize(
    ("wrong", "message"), [case for case in BAD_STEPS if not case[0].keys() & {"model_output", "return_dict"}]
)
def test_undoing_checks_its_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RePaintScheduler().undo_step(**{"sample": X, "timestep": 500, **wrong})


@pytest.mark.parametrize(("make", "config"), [*WAYS, (DDIMScheduler, {}), (DDIMScheduler, SETTINGS["sample"])])
def test_a_backend_that_cannot_run_is_refused_by_every_way(
    make: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make(**config)
    for backend, error in (("cuda", RuntimeError), ("gpu", ValueError)):
        monkeypatch.setenv("MODAFILL_BACKEND", backend)
        with pytest.raises(error, match=backend):
            one_step(scheduler, X, X)
    monkeypatch.setenv("MODAFILL_BACKEND", "reference")
    assert bool(one_step(scheduler, X, X).prev_sample.isfinite().all())


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "RePaintScheduler"])
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_train_timesteps", 0, "num_train_timesteps: got 0, expected 1…"),
        ("num_train_timesteps", -1, "num_train_timesteps: got -1, expected 1…"),
        ("num_train_timesteps", 2**40, "num_train_timesteps: got 1099511627776, expected 1…"),
        ("num_train_timesteps", True, "num_train_timesteps: got bool True, expected an integer"),
        ("beta_start", -0.1, r"beta_start: got -0.1, expected a value in \(0, 1\)"),
        ("beta_start", None, "beta_start: got NoneType None, expected a number"),
        ("beta_start", "a", "beta_start: got str 'a', expected a number"),
        ("beta_end", 1.0, r"beta_end: got 1.0, expected a value in \(0, 1\)"),
        ("beta_end", float("nan"), r"beta_end: got nan, expected a value in \(0, 1\)"),
        ("clip_sample_range", "a", "clip_sample_range: got str 'a', expected a number"),
        ("clip_sample_range", 0.0, "clip_sample_range: got 0.0, expected a positive bound"),
        ("clip_sample", "False", "clip_sample: got str 'False', expected True or False"),
        ("clip_sample", 1, "clip_sample: got int 1, expected True or False"),
        ("trained_betas", 0.1, "trained_betas: got float 0.1, expected None or a sequence of numbers"),
        ("trained_betas", (0.1 for _ in range(9)), "trained_betas: got generator, expected None or a sequence"),
        ("trained_betas", "abc", "trained_betas: got str 'abc', expected None or a sequence"),
        ("trained_betas", [], "trained_betas: got list, expected None or a sequence of numbers"),
        ("trained_betas", [0.1, 1.5], r"trained_betas: got values in \[0.1, 1.5\], expected all in \(0, 1\)"),
        ("trained_betas", [0.1, 0.2], "num_train_timesteps: got 1000, expected 2, the length of trained_betas"),
        ("steps_offset", -1, "steps_offset: got -1, expected"),
        ("steps_offset", 0.5, "steps_offset: got (float )?0.5, expected"),
        ("steps_offset", "1", "steps_offset: got (str )?'1', expected"),
        ("eta", None, "eta: got NoneType None, expected a number"),
        ("eta", "0", "eta: got str '0', expected a number"),
        ("eta", -0.1, r"eta: got -0.1, expected a value in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_settings_are_checked(name: str, schedule: str, setting: str, value: Any, message: str) -> None:
    if setting == "eta" and name != "RePaintScheduler":
        message = "unexpected keyword argument 'eta'"
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(schedulers, name)(**{"beta_schedule": schedule, setting: value})


def test_a_bool_is_no_offset() -> None:
    with pytest.raises(TypeError, match="steps_offset: got bool True, expected an integer"):
        DDIMScheduler(steps_offset=True)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "RePaintScheduler"])
def test_given_betas_of_any_kind_are_the_same_settings(name: str) -> None:
    given = [0.1, 0.25, 0.5]
    kinds = (given, tuple(given), np.array(given), torch.tensor(given, dtype=torch.float64))
    made = [getattr(schedulers, name)(3, trained_betas=kind) for kind in kinds]
    assert all(one.config == made[0].config for one in made)
    assert len({one.config for one in made}) == 1
    assert made[3].config.trained_betas == tuple(given)
    assert made[3].config != getattr(schedulers, name)(3, trained_betas=torch.tensor([0.1, 0.25, 0.6])).config


def test_repaint_of_another_configuration() -> None:
    """diffusers' has its own bound, spacing and prediction whatever it is given; ours heeds the bound or refuses."""
    config = diffusers.DDPMScheduler(clip_sample_range=0.5, steps_offset=1, timestep_spacing="trailing").config
    theirs = diffusers.RePaintScheduler.from_config(config)
    theirs.set_timesteps(10, jump_n_sample=1)
    assert theirs.timesteps.tolist() == list(range(900, -1, -100))
    x = 3 * ops.randn(SHAPE, seed=0)
    found = theirs.step(0 * x, 0, x, x, torch.zeros(SHAPE)).pred_original_sample
    assert float(found.abs().max()) == 1.0
    for changes, message in (
        ({}, "timestep_spacing: got 'trailing', expected 'leading'"),
        ({"timestep_spacing": "leading"}, "steps_offset: got 1, expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RePaintScheduler.from_config(config, **changes)
    ours = RePaintScheduler.from_config(config, timestep_spacing="leading", steps_offset=0)
    found = ours.step(0 * x, 0, x, x, torch.zeros(SHAPE), seed=SEED).pred_original_sample
    assert float(found.abs().max()) == 0.5
    # More steps than there are timesteps: theirs are as many as there are.
    theirs.set_timesteps(1001, jump_n_sample=1)
    assert len(theirs.timesteps) == 1000
    with pytest.raises(ValueError, match="num_inference_steps: got 1001, expected 1…1000"):
        ours.set_timesteps(1001)


@pytest.mark.parametrize(("make", "config"), STEPS_WITHOUT_X0)
def test_a_loop_that_reads_prev_sample_alone_makes_no_x0(
    make: Callable[..., Any], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = make._estimate
    monkeypatch.setattr(make, "_estimate", lambda *a: calls.append(a) or real(*a))
    x = ops.randn(SHAPE, seed=0)
    done = one_step(make(**config), 0.3 * x, x)
    assert not calls
    assert torch.equal(done.pred_original_sample, one_step(make(**config), 0.3 * x, x, return_dict=False)[1])
    assert len(calls) == 2


@pytest.mark.parametrize("changed", ["sample", "model_output"])
@pytest.mark.parametrize(("make", "config"), [*STEPS_WITHOUT_X0, (DDIMScheduler, SETTINGS["sample"])])
def test_x0_of_changed_inputs_is_refused(make: Callable[..., Any], config: dict[str, Any], changed: str) -> None:
    x = ops.randn(SHAPE, seed=0)
    inputs = {"sample": x, "model_output": 0.3 * x}
    done = one_step(make(**config), inputs["model_output"], x)
    inputs[changed].copy_(done.prev_sample)
    with pytest.raises(RuntimeError, match="pred_original_sample: the sample or the model's output was changed"):
        _ = done.pred_original_sample


@pytest.mark.parametrize(("make", "config"), STEPS_WITH_X0)
def test_x0_that_a_step_made_stays(make: Callable[..., Any], config: dict[str, Any]) -> None:
    x, scheduler = ops.randn(SHAPE, seed=0), make(**config)
    output = 0.3 * x
    done, expected = one_step(scheduler, output, x), one_step(scheduler, output, x, return_dict=False)[1]
    for changed in (x, output):
        changed.zero_()
    assert torch.equal(done.pred_original_sample, expected)


@pytest.mark.parametrize(("make", "config"), STEPS_WITHOUT_X0)
def test_x0_in_inference_mode(make: Callable[..., Any], config: dict[str, Any]) -> None:
    """Tensors of this mode do not show that they were changed."""
    with torch.inference_mode():
        x = ops.randn(SHAPE, seed=0)
        output = 0.3 * x
        done, expected = (one_step(make(**config), output, x, return_dict=kind) for kind in (True, False))
        x.copy_(done.prev_sample)
        assert torch.equal(done.pred_original_sample, expected[1])


def test_x0_of_a_sample_prediction_is_the_models_output() -> None:
    x = ops.randn(SHAPE, seed=0)
    for dtype in (torch.float32, torch.bfloat16):
        output = (3 * x).to(dtype)
        for config in (SETTINGS["sample"], {"prediction_type": "sample"}):
            found = DDIMScheduler(**config).step(output, 999, x.to(dtype)).pred_original_sample
            assert torch.equal(found, output.clamp(-1, 1) if len(config) == 1 else output)


@pytest.mark.parametrize(
    "timestep", [500, torch.tensor(500), torch.tensor([900, 0, 300, 300])], ids=["int", "[]", "[B]"]
)
@pytest.mark.parametrize("settings", ["no clip", "defaults", "v", "sample"])
@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler])
def test_a_step_compiles_whole(make: Callable[..., Any], settings: str, timestep: int | Tensor) -> None:
    """With the seed that it draws itself, the same as in eager mode; the first call traces, the second does not."""
    scheduler, x = make(**SETTINGS[settings]), ops.randn(SHAPE, seed=0)
    options = {"eta": 0.7} if make is DDIMScheduler else {}

    def step(model_output: Tensor, sample: Tensor) -> Any:
        return scheduler.step(model_output, timestep, sample, **options)

    torch.compiler.reset()
    # With the decompositions of inductor, and without its code generation.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager_decomp_partition")
    torch.manual_seed(3)
    found = [compiled(0.3 * x, x) for _ in range(2)]
    torch.manual_seed(3)
    for one in found:
        expected = step(0.3 * x, x)
        torch.testing.assert_close(one.prev_sample, expected.prev_sample)
        torch.testing.assert_close(one.pred_original_sample, expected.pred_original_sample)
    assert not torch.equal(found[0].prev_sample, found[1].prev_sample)


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["same", "mixed"])
@pytest.mark.parametrize(("make", "config"), WAYS)
def test_one_graph_does_for_all_timesteps(make: Any, config: dict[str, Any], number: torch.dtype) -> None:
    """The first integer is a constant, every later one a symbol: two graphs, in which a loop is what it is in eager."""
    whole, eager = make(**config), make(**config)
    for scheduler in (whole, eager):
        plan(scheduler, 20)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(output: Tensor, t: int, x: Tensor) -> Tensor:
        return one_step(whole, output, x, t).prev_sample

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x = ops.randn(SHAPE, seed=0)
    for t in eager.timesteps.tolist():
        output = network(x, t).to(number)
        found, x = compiled(output, t, x), one_step(eager, output, x, t).prev_sample
        torch.testing.assert_close(found, x)
    assert t == 0
    assert counter.frame_count <= 2


def test_one_graph_does_on_the_device_of_the_timesteps() -> None:
    """On meta, where no GPU is: the tables are there before the first step."""
    scheduler, x = DDIMScheduler(), torch.ones(SHAPE, device="meta")
    scheduler.set_timesteps(20, device="meta")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda t: scheduler.step(x, t, x).prev_sample, fullgraph=True, backend=counter)
    for t in scheduler.timesteps:
        assert compiled(t).shape == SHAPE
    assert counter.frame_count == 1


def test_undoing_compiles_to_one_graph() -> None:
    whole, eager, x = RePaintScheduler(), RePaintScheduler(), ops.randn(SHAPE, seed=0)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, t: whole.undo_step(x, t, seed=SEED), fullgraph=True, backend=counter)
    for t in range(12, -1, -1):
        torch.testing.assert_close(compiled(x, t), eager.undo_step(x, t, seed=SEED))
    assert counter.frame_count <= 2


def test_drawn_seeds_stay() -> None:
    """A loop repeats between versions: the seed of a step is one draw of torch's generator, below 2⁶³ − 1."""
    x = ops.randn(SHAPE, seed=0)
    torch.manual_seed(3)
    drawn = DDPMScheduler().step(0.3 * x, 500, x).prev_sample
    torch.manual_seed(3)
    seed = int(torch.randint(2**63 - 1, ()))
    assert torch.equal(drawn, DDPMScheduler().step(0.3 * x, 500, x, seed=seed).prev_sample)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIMScheduler(beta_schedule="sigmoid"), "beta_schedule: got 'sigmoid', expected one of linear, "),
        (lambda: DDIMScheduler(prediction_type="flow"), "prediction_type: got 'flow'"),
        (lambda: DDIMScheduler(timestep_spacing="log"), "timestep_spacing: got 'log'"),
        (lambda: DDIMScheduler(beta_end=1.5), r"beta_end: got 1.5, expected a value in \(0, 1\)"),
        (lambda: DDIMScheduler().set_timesteps(0), r"num_inference_steps: got 0, expected 1…1000"),
        (lambda: DDIMScheduler().set_timesteps(1001), "num_inference_steps: got 1001"),
        (lambda: DDIMScheduler(steps_offset=1).set_timesteps(1000), "steps_offset: got 1, expected at most 0"),
        (
            lambda: DDPMScheduler().step(torch.zeros(2, 3), 1000, torch.zeros(2, 3)),
            "timestep: got 1000, expected 0…999",
        ),
        (
            lambda: DDIMScheduler(prediction_type="sample").step(torch.zeros(2, 1), 5, ZEROS),
            r"model_output: got float32 \[2, 1\] on cpu, expected floating-point \[2, 3\] on cpu, as sample",
        ),
        (lambda: DDIMScheduler().step(ZEROS.long(), 5, ZEROS.long()), r"sample: got int64 \[2, 3\]"),
        (lambda: DDIMScheduler().step(ZEROS, 5, ZEROS, eta=1.5), r"eta: got 1.5, expected a value in \[0, 1\]"),
        (lambda: RePaintScheduler(eta=1.5), r"eta: got 1.5, expected a value in \[0, 1\]"),
        (lambda: DDPMScheduler(clip_sample_range=0.0), "clip_sample_range: got 0.0, expected a positive bound"),
        (lambda: DDIMScheduler(trained_betas=[0.1, 0.2]), "num_train_timesteps: got 1000, expected 2, the length of"),
        (lambda: RePaintScheduler().set_timesteps(9, jump_length=0), "jump_length: got 0, expected at least 1"),
        (
            lambda: DDIMScheduler().add_noise(ZEROS, ZEROS[:1], 5),
            r"noise: got float32 \[1, 3\] on cpu, expected floating-point \[2, 3\] on cpu, as ori",
        ),
        (
            lambda: DDIMScheduler().get_velocity(ZEROS, ZEROS[0], 5),
            r"noise: got float32 \[3\] on cpu, expected floating-point \[2, 3\] on cpu, as sam",
        ),
        (lambda: DDIMScheduler().add_noise(ZEROS.long(), ZEROS, 5), r"original_samples: got int64 \[2, 3\]"),
        (lambda: DDIMScheduler().set_timesteps(), "num_inference_steps, timesteps: got neither, expected one of them"),
        (lambda: DDIMScheduler().set_timesteps(2, timesteps=[3, 1]), "num_inference_steps, timesteps: got both"),
        (
            lambda: DDIMScheduler().set_timesteps(timesteps=[1, 3]),
            r"timesteps: got \[1, 3\], expected them to descend in",
        ),
        (
            lambda: DDIMScheduler().set_timesteps(timesteps=[3, 3]),
            r"timesteps: got \[3, 3\], expected them to descend in",
        ),
        (lambda: DDIMScheduler().set_timesteps(timesteps=[1000, 3]), r"timesteps: got \[1000, 3\], .* in 999…0"),
        (lambda: DDIMScheduler().set_timesteps(timesteps=[3, -1]), r"timesteps: got \[3, -1\], .* in 999…0"),
        (lambda: DDIMScheduler().set_timesteps(timesteps=[]), r"timesteps: got float32 \[0\]"),
        (
            lambda: DDIMScheduler().set_timesteps(timesteps=[3.5, 1]),
            r"timesteps: got float32 \[2\] on cpu, expected a list",
        ),
        (
            lambda: DDIMScheduler().step(ZEROS, 5, ZEROS, 1.0, variance_noise=ZEROS[0]),
            r"variance_noise: got float32 \[3\] on cpu, expected floating-point \[2, 3\] on cpu, as sample",
        ),
        (
            lambda: DDIMScheduler().step(ZEROS, 5, ZEROS, 1.0, variance_noise=ZEROS, seed=1),
            "variance_noise: got it beside seed, expected one of them",
        ),
    ],
)
def test_mistakes(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIMScheduler(1000.0), "num_train_timesteps: got float 1000.0, expected an integer"),
        (lambda: DDIMScheduler().set_timesteps(10.0), "num_inference_steps: got float 10.0, expected an integer"),
        (lambda: RePaintScheduler().set_timesteps(10, "cpu"), "jump_length: got str 'cpu', expected an integer"),
        (lambda: DDIMScheduler(sample_scale=1), r"DDIMScheduler\(\) got an unexpected keyword argument 'sample_scale'"),
        (lambda: DDIMScheduler.from_config({"a": 1}), r"DDIMScheduler\(\) got an unexpected keyword argument 'a'"),
        (lambda: DDIMScheduler.from_config("google/ddpm"), "config: got str 'google/ddpm', expected a mapping"),
        (lambda: DDIMScheduler().add_noise(ZEROS, 0.0, 5), "noise: got float 0.0, expected a tensor"),
    ],
)
def test_wrong_types(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        (1000, "got 1000, expected 0…999"),
        (-1, "got -1, expected 0…999"),
        (torch.tensor(1000), "got 1000, expected 0…999"),
        (torch.tensor([0, 1000]), "got 1000, expected 0…999"),
        (torch.tensor([-1, 3]), "got -1, expected 0…999"),
        (torch.tensor([-2]), "got -2, expected 0…999"),
        (torch.tensor([1, 2, 3]), r"got int64 \[3\] on cpu, expected an integer or int64 \[\] or \[2\]"),
        (torch.tensor(900.9), r"got float32 \[\] on cpu, expected an integer or int64"),
        (torch.tensor([True, False]), r"got bool \[2\] on cpu, expected an integer or int64"),
    ],
)
@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler])
def test_timesteps_outside_the_schedule(
    make: Callable[..., Any], timestep: int | Tensor, message: str, prediction: str
) -> None:
    scheduler = make(prediction_type=prediction)
    with pytest.raises(ValueError, match=f"timestep: {message}"):
        scheduler.step(ZEROS, timestep, ZEROS)
    for method in (scheduler.add_noise, scheduler.get_velocity):
        with pytest.raises(ValueError, match=f"timesteps: {message}"):
            method(ZEROS, ZEROS, timestep)


@pytest.mark.parametrize(
    ("timestep", "got"),
    [(900.9, "float 900.9"), ("3", "str '3'"), (True, "bool True"), (None, "NoneType None"), ([1, 2], "list")],
)
def test_timesteps_that_are_no_integers(timestep: Any, got: str) -> None:
    scheduler = DDIMScheduler()
    with pytest.raises(TypeError, match=f"timestep: got {got}, expected an integer or an int64 tensor"):
        scheduler.step(ZEROS, timestep, ZEROS)
    for method in (scheduler.add_noise, scheduler.get_velocity):
        with pytest.raises(TypeError, match=f"timesteps: got {got}, expected an integer or an int64 tensor"):
            method(ZEROS, ZEROS, timestep)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_integer_timesteps_of_any_kind(dtype: torch.dtype) -> None:
    ours, x, noise = DDIMScheduler(), ops.randn(SHAPE, seed=1), ops.randn(SHAPE, seed=2)
    theirs = rival("DDIMScheduler", ours)
    for t in ([0, 17, 255, 100], [17]):
        given = torch.tensor(t, dtype=dtype)
        expected = theirs.add_noise(x, noise, given.long())
        torch.testing.assert_close(ours.add_noise(x, noise, given), expected, rtol=1e-5, atol=1e-5)
        steps = [ours.step(noise, given, x), ours.step(noise, given.long().expand(4), x)]
        torch.testing.assert_close(steps[0].prev_sample, steps[1].prev_sample, rtol=1e-6, atol=1e-6)
    for one in (np.int64(17), 17):
        assert torch.equal(ours.add_noise(x, noise, one), ours.add_noise(x, noise, torch.tensor([17])))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("DDIMScheduler", "eta"),
        ("DDIMScheduler", "variance_type"),
        ("DDPMScheduler", "eta"),
        ("DDPMScheduler", "set_alpha_to_one"),
        ("RePaintScheduler", "set_alpha_to_one"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(name: str, setting: str) -> None:
    for module in (schedulers, diffusers):
        with pytest.raises(TypeError, match=rf"{name}.*\(\) got an unexpected keyword argument '{setting}'"):
            getattr(module, name)(**{setting: 1.0})


NAMES = ["DDIMScheduler", "DDPMScheduler", "RePaintScheduler"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_diffusers(name: str) -> None:
    """Every setting of diffusers is taken at its default, and the first four by position."""
    theirs = inspect.signature(getattr(diffusers, name)).parameters
    make = getattr(schedulers, name)
    for setting, parameter in theirs.items():
        assert make(**{setting: parameter.default}).config == make().config
    ours = inspect.signature(make).parameters.values()
    first = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert first == list(theirs)[:4]
    assert make(50, 0.001, 0.03, "scaled_linear").betas[[0, -1]].tolist() == pytest.approx([0.001, 0.03])


@pytest.mark.parametrize(
    ("name", "setting", "value", "expected"),
    [
        ("DDIMScheduler", "set_alpha_to_one", False, "True"),
        ("DDIMScheduler", "thresholding", True, "False"),
        ("DDIMScheduler", "rescale_betas_zero_snr", True, "False"),
        ("DDPMScheduler", "variance_type", "learned_range", "'fixed_small'"),
        ("DDPMScheduler", "thresholding", True, "False"),
        ("RePaintScheduler", "prediction_type", "sample", "'epsilon'"),
        ("RePaintScheduler", "timestep_spacing", "trailing", "'leading'"),
        ("RePaintScheduler", "steps_offset", 1, "0"),
    ],
)
def test_settings_that_are_not_varied(name: str, setting: str, value: object, expected: str) -> None:
    make = getattr(schedulers, name)
    for call in (lambda: make(**{setting: value}), lambda: make.from_config({setting: value})):
        with pytest.raises(ValueError, match=f"{setting}: got {value!r}, expected {expected}, all that {name} does"):
            call()


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_configurations_of_diffusers(name: str, source: str) -> None:
    given = {"num_train_timesteps": 50, "beta_start": 0.002, "beta_schedule": "scaled_linear", "clip_sample": False}
    config = {**getattr(diffusers, source)(**given).config, "_name_or_path": "a"}
    make = getattr(schedulers, name)
    if source == "RePaintScheduler" != name:
        with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'eta'"):
            make.from_config(config)
        del config["eta"]
    made = make.from_config(config, beta_end=0.03)
    assert type(made) is make
    assert made.config == make(**given, beta_end=0.03).config
    theirs = getattr(diffusers, source)(**given, beta_end=0.03)
    torch.testing.assert_close(made.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=50 * 2**-23, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_a_mapping(name: str) -> None:
    made = getattr(schedulers, name)(50, clip_sample_range=2.0)
    assert made.config["num_train_timesteps"] == made.config.num_train_timesteps == 50
    assert dict(made.config)["clip_sample_range"] == 2.0
    assert len(made.config) == len(dict(made.config))
    assert "clip_sample" in made.config
    assert "_class_name" not in made.config
    with pytest.raises(KeyError, match="schedule"):
        made.config["schedule"]
    assert type(made).from_config(made.config).config == made.config
    # Theirs has no clip_sample_range for RePaint, and leaves it out.
    theirs = getattr(diffusers, name).from_config(dict(made.config))
    torch.testing.assert_close(made.betas.float(), theirs.betas, rtol=1e-6, atol=0)
    if hasattr(theirs, "final_alpha_cumprod"):
        assert made.final_alpha_cumprod == theirs.final_alpha_cumprod


def test_foreign_settings_of_a_configuration_are_left_out() -> None:
    """As in diffusers: DDIM reads no variance_type, DDPM no set_alpha_to_one."""
    for name, setting, value in (
        ("DDIMScheduler", "variance_type", "fixed_large"),
        ("DDPMScheduler", "set_alpha_to_one", False),
    ):
        assert getattr(schedulers, name).from_config({setting: value}).config == getattr(schedulers, name)().config


def test_what_a_scheduler_shows() -> None:
    shown = repr(DDIMScheduler(20, trained_betas=[0.01] * 20))
    assert shown.startswith(
        "DDIMScheduler(num_train_timesteps=20, beta_start=0.0001, beta_end=0.02, beta_schedule='lin"
    )
    assert "prediction_type='epsilon', timestep_spacing='leading', steps_offset=0)" in shown
    assert "trained_betas=(0.01, 0.01, 0.01, 0.01, 0.01, 0.01, ...)" in shown
    assert repr(RePaintScheduler(eta=0.5)).endswith("clip_sample_range=1.0, eta=0.5)")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_an_output_reads_as_diffusers(name: str) -> None:
    x, ours = ops.randn(SHAPE, seed=0), getattr(schedulers, name)()
    theirs = rival(name, ours)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for done in (ours.step(0.3 * x, 0, x), theirs.step(0.3 * x, 0, x)):
        assert done[0] is done["prev_sample"] is done.prev_sample
        for read in (done[1], done[-1], done["pred_original_sample"], done[1:][0], done.to_tuple()[1]):
            assert torch.equal(read, done.pred_original_sample)
        assert len(done[:]) == len(done.to_tuple()) == 2
        for key, error in ((2, IndexError), ("_original", KeyError)):
            with pytest.raises(error):
                done[key]
    done = ours.step(0.3 * x, 0, x)
    previous, origin = done
    assert previous is done.prev_sample
    assert torch.equal(origin, done.pred_original_sample)
    assert repr(done) == f"SchedulerOutput(prev_sample={done.prev_sample!r})"


@pytest.mark.parametrize("name", NAMES)
def test_calls_have_diffusers_names(name: str) -> None:
    """What we take by position is what diffusers takes by position, and that is all of it."""
    for method in ("step", "add_noise", "scale_model_input", "set_timesteps"):
        ours, theirs = (
            [
                parameter.name
                for parameter in inspect.signature(getattr(getattr(module, name), method)).parameters.values()
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ]
            for module in (schedulers, diffusers)
        )
        # diffusers' DDIM has no timesteps of one's own.
        assert ours == theirs or (name, method, ours) == ("DDIMScheduler", "set_timesteps", [*theirs, "timesteps"])
