"""One training loop for every stage of every model: accelerate, best-on-validation, resumable at any moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from modafill.files import derive_seed, read_tensors, write_tensors


@dataclass(frozen=True)
class EpochDone:
    """Progress: one more epoch of a stage is done, or a whole part.

    Attributes:
        stage: its name.
        epoch, epochs: of the stage: done, and at most.
        scalars: ``loss`` of the epoch, ``learning_rate``, and ``validation_loss`` where there is one.
        number, stages: place of the stage among all of its part, counted from 1.
        part: folder name of the fold and seed.
        parts_done, parts: of the run.
        part_done: the part is trained; there is no epoch to tell of.
    """

    stage: str
    epoch: int
    epochs: int
    scalars: dict[str, float]
    number: int = 1
    stages: int = 1
    part: str = ""
    parts_done: int = 0
    parts: int = 1
    part_done: bool = False


# Of checkpoints and results of stages.
FORMAT = 3

Report = Callable[[EpochDone], None]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why."""


@dataclass
class Stage:
    """One network to train.

    Attributes:
        name: file name of the result and prefix of its scalars.
        model: the network; holds the result after :func:`train_stage`.
        batches: ``(epoch, rank, processes)`` → this process's share of each batch, a function of these alone; a share
            may be empty, and every process gets as many.
        loss: ``(model, batch, epoch)`` → scalar loss, a mean over the share; or ``[K]``, K such means to be added.
        weight: ``(batch, epoch)`` → of how many items each of these means is; only asked of several processes.
        validate: loss of the current weights on validation; None keeps the last (or averaged) weights.
        epochs: at most so many.
        learning_rate: Adam's.
        patience: epochs without a lower validation loss before it stops; None never stops early.
        ema_decay: decay per update of the averaged weights that become the result; 0 for none.
        grad_clip: largest gradient norm, 1.0 as in MMIN; ADMC names none.
        key: what else the result depends on; a checkpoint of another key is refused.
        draws: what dropout's seed is named by; None = ``name``. Stages to be compared share it.
        precision: ``"bfloat16"`` makes losses under :class:`torch.autocast`; weights, gradients and validation stay as
            they are.
    """

    name: str
    model: nn.Module
    batches: Callable[[int, int, int], Iterable[Any]]
    loss: Callable[[nn.Module, Any, int], Tensor]
    epochs: int
    learning_rate: float
    validate: Callable[[], float] | None = None
    patience: int | None = None
    ema_decay: float = 0.0
    grad_clip: float = 1.0
    weight: Callable[[Any, int], float | tuple[float, ...]] = lambda batch, epoch: len(batch)
    key: dict[str, Any] = field(default_factory=dict)
    draws: str | None = None
    precision: str = "float32"


def linear_decay(epochs: int) -> Callable[[int], float]:
    """ADMC's "Lambda LR" as MMIN codes it: constant for the first half of the epochs, then linearly towards 0."""
    constant = epochs - epochs // 2
    return lambda epoch: 1.0 - max(0, epoch + 1 - constant) / (epochs // 2 + 1)


def adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
    """Adam, a parameter's whole update in one kernel."""
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True)


def train_stage(
    stage: Stage,
    folder: Path,
    accelerator: Accelerator,
    *,
    seed: int,
    report: Report,
    checkpoint_seconds: float = 20.0,
) -> None:
    """Train ``stage`` or load its finished result, ``folder/<name>.safetensors``.

    A run that was killed goes on from its last checkpoint (``<name>.resume.safetensors``) and, on the same CPU with the
    same number of threads, ends with the same bits as one that was not: data order, dropout and noise of an epoch
    depend on (seed, stage, epoch) alone. Several processes share each batch and average by the items of their shares:
    what one process does, but for the order of sums, and for dropout, of which each process has its own.

    Args:
        checkpoint_seconds: at least so long between two checkpoints; no influence on the result.

    Raises:
        TrainingError: the loss of a batch or its gradient is not finite. The last checkpoint stays.
    """
    result, resume = folder / f"{stage.name}.safetensors", folder / f"{stage.name}.resume.safetensors"
    key = {"stage": stage.name, "seed": seed, "format": FORMAT, **stage.key}
    processes = accelerator.num_processes
    # One process looks, so that a slow file system cannot part them.
    finished, begun = broadcast_object_list([result.is_file(), resume.is_file()])
    if finished:
        tensors, about = read_tensors(result)
        check_key(result, about.get("key"), key)
        with reading(result):
            stage.model.load_state_dict(tensors)
        stage.model.eval()
        if accelerator.is_main_process:
            resume.unlink(missing_ok=True)  # still there if the process died between the two
        return
    optimizer = adam(stage.model.parameters(), stage.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_decay(stage.epochs))
    ema = _Average(stage.model, stage.ema_decay) if stage.ema_decay > 0 else None
    best: dict[str, Tensor] = {}
    state: dict[str, Any] = {"epoch": 0, "lowest": math.inf, "stale": 0}
    if begun:
        tensors, about = read_tensors(resume)
        check_key(resume, about.get("key"), key)
        with reading(resume):
            state = {name: about["state"][name] for name in state}
            schedule.load_state_dict(about["schedule"])
            best = _take(tensors, "best.")
            stage.model.load_state_dict(_take(tensors, "model."))
            if ema is not None:
                ema.load(_take(tensors, "ema."))
            moments = _take(tensors, "adam.")
            parameters: dict[int, dict[str, Tensor]] = {}
            for name, tensor in moments.items():
                index, moment = name.split(".", 1)
                parameters.setdefault(int(index), {})[moment] = tensor
            optimizer.load_state_dict({"state": parameters, "param_groups": about["param_groups"]})
    model, weights = stage.model, list(stage.model.parameters())
    saved, warm = time.monotonic(), False
    while state["epoch"] < stage.epochs and (stage.patience is None or state["stale"] < stage.patience):
        epoch = state["epoch"]
        model.train()
        torch.manual_seed(derive_seed(seed, stage.draws or stage.name, epoch, accelerator.process_index))
        found: list[Tensor] = []
        for batch in stage.batches(epoch, accelerator.process_index, processes):
            loss = torch.zeros((), device=accelerator.device)
            share = _share(stage.weight(batch, epoch), accelerator.device) if processes > 1 else 1.0
            # Kernels that are compiled on first use: once on each machine, for all of its processes.
            with nullcontext() if warm else accelerator.local_main_process_first():
                if len(batch):
                    half = torch.autocast(accelerator.device.type, torch.bfloat16)
                    with half if stage.precision == "bfloat16" else nullcontext():
                        loss = (stage.loss(model, batch, epoch) * share).sum()
                    loss.backward()
            warm, loss = True, loss.detach()
            if processes > 1:
                loss = _add(weights, loss)
            found.append(torch.stack([loss.float(), nn.utils.clip_grad_norm_(weights, stage.grad_clip).float()]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update()
        numbers = torch.stack(found).cpu() if found else torch.zeros(1, 2)
        wrong = (~numbers.isfinite()).nonzero().tolist()
        if wrong:
            batch, which = wrong[0]
            what, value = ("loss", "norm of the gradient")[which], float(numbers[batch, which])
            kept = "the last checkpoint is kept" if resume.is_file() else "there is no checkpoint yet"
            where = f"batch {batch + 1} of {len(numbers)} in epoch {epoch + 1}"
            raise TrainingError(f"{stage.name}: the {what} of {where} is {value}; {kept}")
        mean = float(numbers[:, 0].sum()) / len(numbers)
        scalars = {"loss": mean, "learning_rate": float(schedule.get_last_lr()[0])}
        schedule.step()
        if stage.validate is not None:
            model.eval()
            with torch.no_grad():
                validation_loss = stage.validate()
            if processes > 1:
                # One process decides, so that rounding cannot part them.
                decided = torch.tensor(validation_loss, dtype=torch.float64, device=accelerator.device)
                validation_loss = float(broadcast(decided))
            scalars["validation_loss"] = validation_loss
            if not math.isfinite(validation_loss):
                raise TrainingError(f"{stage.name}: the validation loss of epoch {epoch + 1} is {validation_loss}")
            if validation_loss < state["lowest"]:
                state.update(lowest=validation_loss, stale=0)
                best = {name: tensor.detach().clone() for name, tensor in stage.model.state_dict().items()}
            else:
                state["stale"] += 1
        state["epoch"] = epoch + 1
        accelerator.log({f"{stage.name}/{name}": value for name, value in scalars.items()}, step=epoch + 1)
        report(EpochDone(stage.name, epoch + 1, stage.epochs, scalars))
        if accelerator.is_main_process and time.monotonic() - saved >= checkpoint_seconds:
            about = {
                "key": key,
                "state": state,
                "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"}
                | {"lr_lambdas": [None]},
                "param_groups": optimizer.state_dict()["param_groups"],
            }
            tensors = {f"model.{n}": t for n, t in stage.model.state_dict().items()}
            tensors |= {f"best.{n}": t for n, t in best.items()}
            tensors |= {f"ema.{n}": t for n, t in (ema.state() if ema is not None else {}).items()}
            tensors |= {f"adam.{i}.{n}": t for i, p in optimizer.state_dict()["state"].items() for n, t in p.items()}
            write_tensors(resume, tensors, about)
            saved = time.monotonic()
    if ema is not None:
        stage.model.load_state_dict(ema.averaged, strict=False)
    elif best:
        stage.model.load_state_dict(best)
    stage.model.eval()
    if accelerator.is_main_process:
        write_tensors(result, stage.model.state_dict(), {"key": key, "state": state})
        resume.unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def _share(items: float | tuple[float, ...], device: torch.device) -> Tensor:
    """Which part of all processes' items this one has, float32, for each term."""
    own = torch.tensor(items, dtype=torch.float32, device=device)
    total = own.clone()
    torch.distributed.all_reduce(total)
    return own / total.clamp(min=torch.finfo(torch.float32).tiny)


def _add(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Add the gradients of all processes, in place; answers the sum of the losses.

    A parameter without a gradient in every process keeps none.
    """
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=loss.device)
    given = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    flat = torch.cat([loss.float()[None], there, *(g.float() for g in given)])
    torch.distributed.all_reduce(flat)
    used = flat[1 : 1 + len(parameters)].tolist()
    summed = flat[1 + len(parameters) :].split([p.numel() for p in parameters])
    for p, seen, gradient in zip(parameters, used, summed, strict=True):
        p.grad = gradient.view_as(p).to(p.dtype) if seen else None
    return flat[0]


class _Average:
    """Averaged parameters, whose decay grows as (1 + n) / (10 + n), so that short trainings forget their start.

    As torch's AveragedModel, which would read a counter back from the device for each parameter.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self._current = [p.detach() for p in model.parameters()]
        self.averaged = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self) -> None:
        averaged, n = list(self.averaged.values()), self.count
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(averaged, self._current, 1.0 - decay)
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        return {"n_averaged": torch.tensor(self.count)} | {f"module.{n}": t for n, t in self.averaged.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["n_averaged"])
        for name, tensor in self.averaged.items():
            tensor.copy_(state[f"module.{name}"])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What PyTorch says of a checkpoint that lacks something, or has another shape, as an error that names it."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged ({reason}); remove it, and its stage begins anew") from error


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_key(path: Path, found: Any, expected: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, if ``path`` was made from something else."""
    found = found if isinstance(found, dict) else {}
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differing:
        if "format" in differing:
            came = f"format {found.get('format')}, expected {expected['format']}, as this modafill writes"
            raise ValueError(f"{path}: {came}; train into another folder")
        raise ValueError(f"{path}: made with other {', '.join(differing)}; train into another folder")
