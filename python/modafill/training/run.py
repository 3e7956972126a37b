"""A run: one folder that holds what was asked for (``run.json``), the data it used and a folder per fold and seed."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from modafill.data import FeatureStore, Labels, Split, make_splits, open_data
from modafill.errors import OutOfMemory, is_out_of_memory
from modafill.files import read_json, read_tensors, write_json
from modafill.models.config import ModelConfig
from modafill.processes import given, holding, join_processes, stop_if_orphaned, worker_pool, world_size
from modafill.training.admc import ADMCTrainer
from modafill.training.cdtp import CDTPTrainer
from modafill.training.loop import FORMAT, EpochDone, Report, TrainingError, check_key
from modafill.training.part import digest_data

RUN_FILE = "run.json"
FORMAT_VERSION = 2
Trainer = ADMCTrainer | CDTPTrainer
TRAINERS: dict[str, type[ADMCTrainer] | type[CDTPTrainer]] = {"admc": ADMCTrainer, "cdtp": CDTPTrainer}

# What `accelerate launch` asks for and training does not do, with the value that asks for nothing.
LAUNCHER_OPTIONS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    **dict.fromkeys(
        (f"ACCELERATE_USE_{what}" for what in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")), "false"
    ),
}


@dataclass(frozen=True)
class Run:
    """What was asked for.

    Attributes:
        folder: where everything goes.
        model: a name in :data:`TRAINERS`.
        data: absolute path of the archive or store.
        mapping: name or path of the mapping of an ``.npz`` archive; None recognises it by its arrays.
        config: numbers of the model.
        variants: what is trained beside each other: ADMC's conditionings, CDTP's ablations.
        folds: cross-validation folds; 1 uses the data's own split, or holds out a fifth.
        seeds: one complete training each.
        split_seed: of the folds, which are the same for all seeds.
        window: turns per sample; 0 reads single vectors; None takes the data's own setting.
        label: one of the data's further labels; None takes the first.
        own_split: keep the parts that the data come with; False divides all samples anew.

    Raises:
        ValueError: no such model or variant, no variant or seed, or a window of less than 0.
    """

    folder: Path
    model: str
    data: str
    mapping: str | None
    config: ModelConfig
    variants: tuple[str, ...]
    folds: int
    seeds: tuple[int, ...]
    split_seed: int = 0
    window: int | None = None
    label: str | None = None
    own_split: bool = True

    def __post_init__(self) -> None:
        if self.model not in TRAINERS:
            raise ValueError(f"model: got {self.model!r}, expected one of {', '.join(TRAINERS)}")
        known = TRAINERS[self.model].VARIANTS
        unknown = [variant for variant in self.variants if variant not in known]
        if unknown or not self.variants:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"variants: got {got}, expected one of {', '.join(known)}")
        if not self.seeds:
            raise ValueError("seeds: got none, expected at least one")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window: got {self.window}, expected a number of turns, or 0 for single vectors")

    def describe(self) -> dict[str, Any]:
        """JSON-able content of ``run.json``."""
        values = {**asdict(self), "format_version": FORMAT_VERSION, "config": self.config.to_dict()}
        del values["folder"]
        return json.loads(json.dumps(values))

    @classmethod
    def load(cls, folder: Path) -> Run:
        """The run that lives in ``folder``; ValueError if there is none."""
        file = folder / RUN_FILE
        if not file.is_file():
            raise ValueError(f"{folder}: no {RUN_FILE} there, expected a folder written by `modafill train`")
        values = read_json(file)
        if "format_version" not in values:
            raise ValueError(f"{file}: not a run, expected an object with a format_version")
        _check_version(file, values.pop("format_version"))
        if values.get("model") not in TRAINERS:
            raise ValueError(f"{file}: model {values.get('model')!r}, expected one of {', '.join(TRAINERS)}")
        expected = {f.name for f in fields(cls)} - {"folder"}
        if set(values) != expected:
            raise ValueError(f"{file}: not a run, expected an object with {', '.join(sorted(expected))}")
        try:
            values["config"] = TRAINERS[values["model"]].CONFIG.from_dict(values["config"])
            for name in ("variants", "seeds"):
                values[name] = tuple(values[name])
            return cls(folder=folder, **values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    def write(self) -> None:
        """Write ``run.json``, or check that the folder holds this very run, which is then resumed."""
        file = self.folder / RUN_FILE
        if file.is_file():
            found = read_json(file)
            _check_version(file, found.get("format_version"))
            differing = [k for k, v in self.describe().items() if found.get(k) != v]
            if differing:
                raise ValueError(f"{self.folder}: holds a run with other {', '.join(differing)}; choose another folder")
        else:
            write_json(file, self.describe())

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(fold, seed) of every training in the run."""
        return [(fold, seed) for seed in self.seeds for fold in range(self.folds)]

    def part_folder(self, fold: int, seed: int) -> Path:
        """Folder of one fold and seed."""
        return self.folder / f"fold{fold}-seed{seed}"

    @property
    def finished(self) -> list[tuple[int, int]]:
        """The parts that are trained."""
        return [part for part in self.parts if (self.part_folder(*part) / "model").is_dir()]

    def open_store(self) -> FeatureStore:
        """The features, converted once if they come in a foreign format."""
        store = open_data(Path(self.data), self.folder, self.mapping)
        window = store.task.get("window") if self.window is None else self.window
        return store.windowed(window) if window else store

    def splits(self, store: FeatureStore) -> list[Split]:
        """The split of each fold."""
        return make_splits(store, folds=self.folds, seed=self.split_seed, own_split=self.own_split)

    def fit_labels(self, store: FeatureStore, split: Split) -> Labels:
        """What is to be recognised, fitted on the training part."""
        further = store.task.get("labels", {})
        if self.label is not None and self.label not in further:
            raise ValueError(f"label: got {self.label!r}, expected one of {list(further)}, the data's further labels")
        spec = store.task.get("label") if self.label is None else further[self.label]
        if spec is None:
            raise ValueError(f"{store.name}: the data name no label, expected one in the mapping")
        return Labels.fit(spec, store.labels(spec["name"]), split.train)

    def trainer(self, fold: int, seed: int, accelerator: Accelerator, report: Report) -> Trainer:
        """The trainer of one fold and seed, labels fitted on its training part."""
        store = self.open_store()
        split = self.splits(store)[fold]
        labels = self.fit_labels(store, split)
        folder, config, make = self.part_folder(fold, seed), cast(Any, self.config), TRAINERS[self.model]
        return make(folder, store, split, labels, config, self.variants, seed, accelerator, report)

    def check_data(self) -> str:
        """Raise ValueError where a fold cannot be trained; otherwise a line that says how the data are divided.

        One pass over all features finds NaN, infinity and samples with nothing observed, in whichever part they are.
        """
        trainer = TRAINERS[self.model]
        with self.open_store() as store:
            splits = self.splits(store)
            for batch in store.unwindowed().iter_batches(np.arange(len(store)), 1024):
                try:
                    batch.validate()
                except ValueError as error:
                    raise ValueError(f"{store.name}: {error}") from error
            for fold, split in enumerate(splits):
                trainer.check(store, self.fit_labels(store, split), cast(Any, self.config), self.variants)
                for what, rows in (("training", split.train), ("validation", split.valid)):
                    seen = store.available(rows)
                    columns = zip((*store.modalities, "all modalities"), (*seen.T, seen.all(1)), strict=True)
                    absent = [name for name, observed in columns if not observed.any()]
                    if absent:
                        raise ValueError(
                            f"{store.name}: fold {fold}: none of the {len(rows)} {what} samples has {absent[0]}, "
                            "expected at least one; leave a modality out, or divide the data otherwise (--ignore-split)"
                        )
            unit = "samples"
            if store.group_names:
                unit += f" in {len(np.unique(store.groups(store.task.get('group')))):,} groups"
            train, valid, test = (f"{np.mean([len(rows) for rows in part]):,.0f}" for part in zip(*splits, strict=True))
            how = f"on average over {self.folds} folds"
            if self.own_split and store.split_names:
                how = "the data's own split"
            elif self.folds == 1:
                how = "held out at random; more --folds test on more"
            return f"{len(store):,} {unit}: {train} for training, {valid} for validation, {test} for testing ({how})"

    def check_finished(self) -> None:
        """Raise ValueError where a part was trained with other data than there are now: a run has one data set."""
        stages = {part: sorted((self.part_folder(*part) / "stages").glob("*.safetensors")) for part in self.finished}
        folds = sorted({fold for (fold, _), files in stages.items() if files})
        if not folds:
            return
        with self.open_store() as store:
            splits = self.splits(store)
            digests = digest_data(store, [(splits[fold], self.fit_labels(store, splits[fold])) for fold in folds])
        for part, files in stages.items():
            if files:
                found = read_tensors(files[0])[1].get("key")
                found = found if isinstance(found, dict) else {}
                digest = digests[folds.index(part[0])]
                check_key(self.part_folder(*part), found, {**found, "format": FORMAT, "data": digest})


def _check_version(file: Path, version: Any) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: format version {version}, this modafill reads version {FORMAT_VERSION}")


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process dies; folders made for nothing go again."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, expected a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with holding(lock, f"{folder}: another process is training into this folder"):
        try:
            yield
        finally:
            if made and not (folder / RUN_FILE).exists():
                lock.unlink()
                for path in made:
                    with suppress(OSError):  # it holds something
                        path.rmdir()


def _begin(run: Run, announce: Callable[[str], None]) -> None:
    """Check the data, then write ``run.json``; a new run whose data cannot be trained on leaves nothing behind."""
    if (run.folder / RUN_FILE).is_file():
        run.write()
    converted = run.folder / f"{Path(run.data).stem}.h5"
    existed = converted.exists()
    try:
        said = run.check_data()
        run.check_finished()
        announce(said)
    except BaseException:
        if not existed:
            converted.unlink(missing_ok=True)
        raise
    run.write()


def train_part(run: Run, fold: int, seed: int, report: Report) -> None:
    """Train one fold and seed, going on where an earlier process stopped.

    Raises:
        OutOfMemory: the model, or a batch of it, does not fit.
    """
    folder = run.part_folder(fold, seed)
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("tensorboard")
    try:
        run.trainer(fold, seed, accelerator, lambda done: report(replace(done, part=folder.name))).run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise OutOfMemory(
            f"{folder}: out of memory ({reason}); what was saved is kept, and a smaller model or a smaller "
            "--set batch_size=... needs less"
        ) from error
    finally:
        # Not end_training, after which processes that train together no longer know each other.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()  # here and not after each stage, because it collects garbage for half a second


def train(run: Run, report: Report, jobs: int = 1, announce: Callable[[str], None] = lambda _: None) -> None:
    """Train every fold and seed of ``run``; finished ones are skipped.

    Args:
        report: called after each epoch.
        jobs: processes that train different parts at a time; torch's threads are divided among them.
        announce: called once with a line that says how the data are divided.

    Raises:
        ValueError: data that cannot be trained on, a folder that holds something else, or an option of ``accelerate
            launch`` that would be without effect.
    """
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected at least 1")
    for name, without in LAUNCHER_OPTIONS.items():
        value = os.environ.get(name, without)
        if value.lower() != without:
            raise ValueError(
                f"{name}: got {value!r} from `accelerate launch` or its configuration, expected {without!r}: training "
                "does not do that; --set precision=bfloat16 and --set batch_size=... are its own options"
            )
    if world_size() > 1:
        if jobs > 1:
            raise ValueError(f"jobs: got {jobs}, expected 1 where several processes train together (WORLD_SIZE)")
        _train_together(run, report, announce)
        return
    context = multiprocessing.get_context("spawn")
    # The second without a lock, which a worker that is killed might hold.
    progress, stop = context.SimpleQueue(), context.RawValue("b", 0)

    def report_epoch(done: EpochDone) -> None:
        report(replace(done, parts_done=len(run.finished), parts=len(run.parts)))

    def report_part(part: tuple[int, int]) -> None:
        report_epoch(EpochDone("", 0, 0, {}, part=run.part_folder(*part).name, part_done=True))

    def show_progress() -> None:
        while not progress.empty():
            report_epoch(progress.get())

    with _only_one(run.folder):
        _begin(run, announce)
        finished = run.finished
        todo = [part for part in run.parts if part not in finished]
        with worker_pool(jobs, (progress, stop)) as pool:
            if pool is None:
                for part in todo:
                    train_part(run, *part, report_epoch)
                    report_part(part)
                return
            parts = {pool.submit(_work, run, *part): part for part in todo}
            waiting = set(parts)
            try:
                while waiting:
                    done, waiting = futures.wait(waiting, timeout=0.2, return_when=futures.FIRST_COMPLETED)
                    show_progress()
                    for future in done:
                        future.result()
                        report_part(parts[future])
            except BaseException:
                # What runs ends with its epoch; a queue that nobody reads would hold it up for ever.
                stop.value = 1
                waiting = {future for future in parts if not future.cancel()}
                while futures.wait(waiting, timeout=0.2).not_done:
                    show_progress()
                raise


def _train_together(run: Run, report: Report, announce: Callable[[str], None]) -> None:
    """Every part in turn, by all processes that torchrun, ``accelerate launch`` or SLURM began; the first writes."""
    # Asked for by name: without a GPU accelerate takes each process for the only one otherwise.
    state = join_processes(cpu=not torch.accelerator.is_available())
    with _only_one(run.folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _begin(run, announce)
        (finished,) = broadcast_object_list([run.finished])
        for part in run.parts:
            if part in finished:
                continue

            def report_epoch(done: EpochDone) -> None:
                if state.is_main_process:
                    report(replace(done, parts_done=len(run.finished), parts=len(run.parts)))

            train_part(run, *part, report_epoch)
            state.wait_for_everyone()
            report_epoch(EpochDone("", 0, 0, {}, part=run.part_folder(*part).name, part_done=True))


def _work(run: Run, fold: int, seed: int) -> None:
    name = run.part_folder(fold, seed).name
    progress, stop = given()

    def go_on() -> None:
        if stop.value:
            raise TrainingError(f"{name}: stopped because another part failed; the same command goes on")

    def report(done: EpochDone) -> None:
        go_on()
        stop_if_orphaned()
        progress.put(done)

    go_on()
    train_part(run, fold, seed, report)
