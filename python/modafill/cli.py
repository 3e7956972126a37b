"""``modafill`` and ``python -m modafill``: every use of the package from a shell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from modafill import __version__
from modafill.terminal import (
    announce,
    announce_notes,
    announcing,
    err_console,
    out_console,
    progress_bar,
    say,
    say_once,
    training_progress,
)

app = typer.Typer(
    name="modafill",
    help="Fill in missing modalities by conditional diffusion, and recognise from the completed set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
train_app = typer.Typer(help="Train a model. A run that was stopped goes on where it stopped.", no_args_is_help=True)
app.add_typer(train_app, name="train")

DATA_HELP = (
    "A feature store (.h5), an archive (.npz), MMSA's, MulT's or GCNet's pickle, or the folder of MMIN, MIntRec, GCNet "
    "or of .csd files."
)
DataPath = Annotated[Path, typer.Argument(help=DATA_HELP)]
Mapping = Annotated[
    str | None,
    typer.Option(
        help="Which array of an .npz (or file of a folder) is what: a built-in name (hazumi, mosi-bclstm, mmmo, "
        "digits) or a JSON file. Default: recognised by the names."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def info(as_json: AsJson = False) -> None:
    """What is installed here, what each op would run on, and why not on something faster."""
    from modafill.info import info as collect
    from modafill.info import render

    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        out_console.print(render(facts))


@app.command()
def inspect(path: DataPath, mapping: Mapping = None, as_json: AsJson = False) -> None:
    """Modalities, shapes, missing counts, labels, NaN and constant columns of a file.

    Of a folder of shards that **modafill impute** wrote: whether each file is as its manifest says.
    """
    from modafill.bulk import MANIFEST_FILE, check_shards, read_manifest
    from modafill.data import inspect_path, render_inspection

    if (path / MANIFEST_FILE).is_file():
        manifest = read_manifest(path)
        with progress_bar("comparing", manifest["rows"]) as advance:
            for done in check_shards(path, manifest):
                advance(done)
        if as_json:
            print(json.dumps(manifest, indent=2, ensure_ascii=False))
        else:
            count, rows = len(manifest["shards"]), manifest["rows"]
            say(f"{path}: {rows:,} completed samples in {count:,} shards, all as in {MANIFEST_FILE}")
        return
    report = inspect_path(path, mapping)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        out_console.print(render_inspection(report))


@app.command()
def convert(
    path: DataPath,
    out: Annotated[Path, typer.Argument(help="The feature store to write (.h5).")],
    mapping: Mapping = None,
) -> None:
    """Convert a foreign file or folder into a feature store, and say what is wrong with it.

    Pickles are read as data: nothing in them is run.
    """
    from modafill.data import convert as convert_data

    _must_be_new(out, ".h5")
    for note in convert_data(path, out, mapping):
        announce(f"{path}: {note}")
    say(f"wrote {out}")


Data = Annotated[Path, typer.Option(help=DATA_HELP)]
Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Folds = Annotated[
    int,
    typer.Option(help="Cross-validation folds (the data's own, where they come with folds); 1 uses their own split."),
]
Seeds = Annotated[int, typer.Option(help="Trainings per fold.")]
FirstSeed = Annotated[int, typer.Option(help="The seeds are first-seed, first-seed + 1, …")]
Window = Annotated[int | None, typer.Option(help="Turns per sample; 0 for single vectors. Default: what the data say.")]
Label = Annotated[
    str | None, typer.Option(help="Another label that the mapping has under 'labels'. Default: its 'label'.")
]
IgnoreSplit = Annotated[bool, typer.Option(help="Divide all samples anew, though the data come with a split.")]
Jobs = Annotated[int, typer.Option(help="Folds and seeds trained at a time, sharing the cores.")]


def _list_numbers(context: typer.Context, pairs: list[str] | None) -> list[str] | None:
    """``--set help``: every number of the model with its value in each preset."""
    if "help" not in (pairs or []):
        return pairs
    from modafill.training.run import TRAINERS

    config = TRAINERS[context.info_name or ""].CONFIG
    presets = {name: config.preset(name).to_dict() for name in config.PRESETS}
    table = Table("name", *presets, box=None)
    for name in next(iter(presets.values())):
        table.add_row(name, *(escape(json.dumps(numbers[name])) for numbers in presets.values()))
    out_console.print(table)
    say(f"What each one is: python -m pydoc {config.__module__}.{config.__qualname__}")
    raise typer.Exit


Change = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one number of the model, such as batch_size=64. Repeat for more. --set help prints them all.",
        is_eager=True,
        callback=_list_numbers,
    ),
]


@train_app.command("admc")
def train_admc(
    data: Data,
    out: Out,
    mapping: Mapping = None,
    preset: Annotated[
        str, typer.Option(help="'paper' (the numbers of §4.2 of ADMC) or 'small' (two CPU cores, minutes).")
    ] = "paper",
    conditioning: Annotated[
        list[str] | None,
        typer.Option(
            help="'clean' (observed tokens enter as they are) or 'replace' (the paper); repeat for both. Default: clean"
        ),
    ] = None,
    folds: Folds = 1,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    window: Window = None,
    label: Label = None,
    ignore_split: IgnoreSplit = False,
    jobs: Jobs = 1,
    change: Change = None,
) -> None:
    """Train ADMC: encoders, diffusion networks, fusion networks, and the rivals' fusion networks.

    Example: **modafill train admc --data hazumi2012.npz --out runs/hazumi --preset small --folds 5 --seeds 3**
    """
    from modafill.models.admc import ADMCConfig

    conditionings = tuple(dict.fromkeys(conditioning or ["clean"]))
    config = ADMCConfig.preset(preset, conditioning=conditionings[0], **_changes(ADMCConfig, change, "conditioning"))
    for other in conditionings[1:]:
        ADMCConfig.preset(preset, conditioning=other)
    _train(
        "admc", config, conditionings, data, out, mapping, folds, seeds, first_seed, window, label, ignore_split, jobs
    )


@train_app.command("cdtp")
def train_cdtp(
    data: Data,
    out: Out,
    mapping: Mapping = None,
    preset: Annotated[
        str, typer.Option(help="'paper' (the numbers of §4.3 of CDTP) or 'small' (two CPU cores, minutes).")
    ] = "paper",
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="'full', or an ablation to train beside it: 'no-generative', 'no-signal', 'no-type' (prompts), "
            "'append' (missing-type prompts as tokens), 'linear' (a linear map instead of diffusion, as in MPLMM), "
            "'plain' (MulT, missing modalities empty). Repeat for more; the first is the run's model. Default: full"
        ),
    ] = None,
    folds: Folds = 1,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    window: Window = None,
    label: Label = None,
    ignore_split: IgnoreSplit = False,
    jobs: Jobs = 1,
    change: Change = None,
) -> None:
    """Train CDTP: a MulT backbone, conditional diffusion between modalities, prompts, and ablations.

    Example: **modafill train cdtp --data hazumi2012.npz --out runs/cdtp --preset small --variant full --variant plain**
    """
    from modafill.models.cdtp import CDTPConfig

    variants = tuple(dict.fromkeys(variant or ["full"]))
    config = CDTPConfig.preset(preset, **_changes(CDTPConfig, change))
    _train("cdtp", config, variants, data, out, mapping, folds, seeds, first_seed, window, label, ignore_split, jobs)


def _train(
    model: str,
    config: Any,
    variants: tuple[str, ...],
    data: Path,
    out: Path,
    mapping: str | None,
    folds: int,
    seeds: int,
    first_seed: int,
    window: int | None,
    label: str | None,
    ignore_split: bool,
    jobs: int,
) -> None:
    from modafill.training import Run, train

    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    _must_exist(data)
    run = Run(
        folder=out.resolve(),
        model=model,
        data=str(data.resolve()),
        mapping=mapping,
        config=config,
        variants=variants,
        folds=folds,
        seeds=tuple(range(first_seed, first_seed + seeds)),
        window=window,
        label=label,
        own_split=not ignore_split,
    )
    whole = len(run.finished) == len(run.parts)
    with training_progress() as report:
        train(run, report, jobs, announcing(run))
    said = f"{out} holds this run, trained before" if whole else f"trained into {out}"
    say_once(f"{said}; next: modafill evaluate {out}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    samples: Annotated[int, typer.Option(min=1, help="Completions per row, K.")] = 16,
    start_steps: Annotated[
        str, typer.Option(help="Further start steps n of the paper's sampler, such as 30,80, shown beside its own.")
    ] = "",
    sampling_steps: Annotated[
        str, typer.Option(help="Further numbers of CDTP's DDIM steps, such as 1,5,50, shown beside its own.")
    ] = "",
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="An evaluated ADMC run on the same data and parts, to show in CDTP's tables. Repeat for more."
        ),
    ] = None,
    part: Annotated[
        str, typer.Option(help="test, or valid: to choose settings without looking at the test part.")
    ] = "test",
    missing: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside the patterns: 0.3 hides something in 30 % of the samples (ADMC's Table 3), entries:0.3 30 % "
            "of all modalities of all samples (GCNet), text=0.3,vision=0.5 each of these at its own rate. Repeat "
            "for more."
        ),
    ] = None,
    missing_seed: Annotated[int, typer.Option(help="Of what --missing draws.")] = 0,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric of recognition to print: of classes UA, WA, F1, 'F1 weighted' or NLL; of scores MAE or Corr, "
            "for −3…3 ACC-7, ACC-2, F1, 'ACC-2 nonzero' or 'F1 nonzero'; or all. Files have all. Default: UA, or MAE"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Folds and seeds evaluated at a time, sharing the cores.")] = 1,
) -> None:
    """Tables of a run: a row per method, a column per available set ({at}: audio and text are observed).

    Columns: "average" is that of the incomplete sets, "full" has every modality.

    ADMC: zero fill, mean fill, ridge regression and ADMC ("clean" or "replace" conditioning, "n=" its start step)
    complete the embeddings. A fusion network per pattern reads one completion, the frozen classifier the mean of K.

    CDTP: its variants, trained with missing modalities, read one completion. The frozen classifier is the plain
    backbone, trained before anything was hidden; it reads projected sequences completed by CDTP's diffusion or a rival.

    "probabilities averaged" ("scores averaged") averages an output over K completions. Linear models
    (logistic regression, of scores ridge regression) read what is observed, "complete data" is the frozen classifier
    with nothing missing. The error is that of the mean of K, which is the smaller the larger K is.

    Metrics: WA is accuracy, UA macro recall, F1 macro F1, F1 weighted that weighted by class (%); NLL the negative
    log-likelihood of the true class (nats). Of scores: MAE, the mean absolute error, Corr, Pearson's correlation, and
    for −3…3 ACC-7, ACC-2 and F1, "nonzero" without targets of 0 (%). NRMSE is the root mean squared error and CRPS the
    continuous ranked probability score of what was hidden, in units of its standard deviation.

    All figures are of the samples that have every modality, of which some are hidden: the others' truth is not known.

    The protocol stands before the tables: data, split, how many samples of it are measured (of all folds together),
    folds, seeds, sets, missing rates, metrics.

    Writes results.json, results.csv and results.md (results-valid.* for the validation part) into the run's folder, in
    place of those of an earlier call.
    """
    from modafill.data import MissingRate
    from modafill.evaluation.run import Protocol, metric_names
    from modafill.training import Run

    asked = Run.load(run)
    known = metric_names(asked)
    if metric not in (None, "all", *known):
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(known)}, all")

    starts, evaluations = _numbers("start-steps", start_steps), _numbers("sampling-steps", sampling_steps)
    rates = tuple(map(MissingRate.parse, missing or []))
    protocol = Protocol(samples, starts, evaluations, part, rates, missing_seed)
    with asked.open_store() as store:
        announce_notes(store)
    tables = _evaluate(run, protocol, jobs, tuple(beside or []))
    printed = (*(["UA", "MAE"] if metric is None else [metric]), "NRMSE", "CRPS")
    _print_tables(protocol.describe(asked), [table for table in tables if metric == "all" or table.metric in printed])
    stem = "results" if part == "test" else f"results-{part}"
    say(f"wrote {stem}.json, {stem}.csv and {stem}.md into {run}")


Steps = Annotated[
    int | None, typer.Option(help="Network evaluations for a completion; here and below the default is the model's.")
]
Solver = Annotated[str | None, typer.Option(help="ddim, dpm++ or heun.")]
Precision = Annotated[
    str | None, typer.Option("--dtype", help="Of the network's weights in products: bfloat16 or float16.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: a GPU where torch has one.")]


@app.command()
def curve(
    run: Annotated[Path, typer.Argument(help="Folder of a finished ADMC run.")],
    steps: Annotated[
        str, typer.Option(help="Network evaluations; of the paper's sampler the steps n that it starts at.")
    ] = "1,2,4,8,16,32,50",
    solvers: Annotated[str, typer.Option(help="Solvers of 'clean': ddim, dpm++, heun.")] = "ddim,dpm++,heun",
    samples: Annotated[int, typer.Option(help="Completions per row, K.")] = 16,
    part: Annotated[str, typer.Option(help="test, or valid: to choose without looking at the test part.")] = "test",
    dtype: Precision = None,
) -> None:
    """Draw quality against network evaluations and time, for each sampler of a run's diffusion networks.

    Columns: ms, for each completion, in batches of the whole part; UA and NLL of a classifier that saw complete data
    alone, its probabilities averaged over K completions; NRMSE of their mean; CRPS. All are means over the incomplete
    patterns, with mean and spread over folds and seeds. Times are of this machine as it is: leave it alone meanwhile.

    Writes curve.json, curve.csv and curve.png into the run's folder.
    """
    from modafill.evaluation.curve import draw_curve, render_curve
    from modafill.training import Run

    with Run.load(run).open_store() as store:
        announce_notes(store)
    with progress_bar("measuring", None) as advance:
        points = draw_curve(
            run,
            steps=_numbers("steps", steps),
            solvers=tuple(solver for solver in solvers.split(",") if solver),
            n_samples=samples,
            part=part,
            dtype=_dtype(dtype),
            progress=advance,
        )
    out_console.print(render_curve(points))
    say(f"wrote curve.json, curve.csv and curve.png into {run}")


RunOrModel = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one model.")]
InPath = Annotated[Path, typer.Argument(metavar="IN", help=DATA_HELP)]
NoiseSeed = Annotated[int, typer.Option(help="Of the noise; a row's noise depends on (seed, row number) alone.")]
Fold = Annotated[int, typer.Option(help="Which fold's model of a run.")]


@app.command()
def impute(
    run: RunOrModel,
    path: InPath,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="What to write: a store (.h5), a table (.parquet), or a new folder of shards and _manifest.json.",
        ),
    ],
    mapping: Mapping = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per row, averaged.")] = 1,
    seed: NoiseSeed = 0,
    fold: Fold = 0,
    steps: Steps = None,
    solver: Solver = None,
    dtype: Precision = None,
    device: Device = None,
    engine: Annotated[
        str,
        typer.Option(
            help="Who does it: local; torchrun, under which this command was started; ray, over the cluster of "
            "RAY_ADDRESS or this machine."
        ),
    ] = "local",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of local or ray, which share the cores of this one.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Of each worker of local or ray. Default: torch's, shared among them.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows completed at a time. Default: up to 1,024, K completions in 0.5 GB.")
    ] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of a shard; finished ones outlive a process that dies. Default: 65,536, and where several work "
            "no more than a 256th of all."
        ),
    ] = None,
    shard_format: Annotated[
        str | None, typer.Option(help="Of the shards in a folder: h5 (the default) or parquet.")
    ] = None,
) -> None:
    """Write completed embeddings, with what was generated marked.

    Examples: **modafill impute runs/hazumi in.h5 out.h5 --workers 4**

    **torchrun --nproc-per-node 8 -m modafill impute runs/hazumi in.h5 out --engine torchrun --shard-format parquet**

    A call that died goes on where it was when it is repeated. With the same threads for each worker (OMP_NUM_THREADS=1,
    or --threads) any engine and any number of workers write the same bytes.
    """
    from modafill.bulk import clean_up, impute_store
    from modafill.data.convert import is_store

    options = {"steps": steps, "solver": solver, "dtype": _dtype(dtype), "device": _device(device)}
    _must_exist(path)
    clean_up(out)
    _must_be_new(out, ".h5", ".parquet", "")
    if engine == "ray" and not is_store(path):
        raise ValueError(f"{path}: expected a feature store, which every node can read; modafill convert makes one")
    with (
        _model_and_store(run, fold, path, mapping, **options) as (imputer, store),
        progress_bar("imputing", len(store)) as advance,
    ):
        for done in impute_store(
            imputer,
            store,
            out,
            n_samples=samples,
            seed=seed,
            batch_size=batch_size,
            shard_rows=shard_rows,
            shard_format=shard_format,
            engine=engine,
            workers=workers,
            threads=threads,
        ):
            advance(done)
        observed = dict(zip(store.modalities, store.available().sum(0).tolist(), strict=True))
    counts = {name: len(store) - observed.get(name, 0) for name in imputer.modalities}
    generated = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    nothing = "" if any(counts.values()) else " (nothing was missing: these are the embeddings of what is there)"
    say_once(f"wrote {out}; generated of {len(store):,}: {generated}{nothing}")


@app.command()
def recognise(
    run: RunOrModel,
    path: InPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The table to write (.csv).")],
    mapping: Mapping = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per row; their probabilities are averaged.")] = 16,
    seed: NoiseSeed = 0,
    fold: Fold = 0,
    steps: Steps = None,
    solver: Solver = None,
    dtype: Precision = None,
    device: Device = None,
) -> None:
    """Write the likeliest class of each sample and the probability of every class, whatever is missing."""
    from modafill.bulk import recognise_store

    options = {"steps": steps, "solver": solver, "dtype": _dtype(dtype), "device": _device(device)}
    _must_exist(path)
    _must_be_new(out, ".csv")
    with (
        _model_and_store(run, fold, path, mapping, **options) as (imputer, store),
        progress_bar("recognising", len(store)) as advance,
    ):
        for done in recognise_store(imputer, store, out, n_samples=samples, seed=seed):
            advance(done)
    say(f"wrote {out}: {done:,} samples")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, its tables and its picture.")] = Path("modafill-demo"),
    data: Annotated[Path | None, typer.Option(help="Your own data instead of the digits that ship.")] = None,
    mapping: Mapping = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = 0,
) -> None:
    """Train a small ADMC, fill in missing modalities, recognise from them, and draw what was generated.

    Minutes on two cores. The data that ship are three views of 2,000 handwritten digits (UCI Multiple
    Features, CC BY 4.0).
    """
    from modafill.data import demo_path
    from modafill.evaluation.admc import draw_embeddings
    from modafill.evaluation.run import Protocol
    from modafill.models.admc import ADMCConfig
    from modafill.training import Run, train

    if data is not None:
        _must_exist(data)
    run = Run(
        folder=out.resolve(),
        model="admc",
        data=str((data or demo_path()).resolve()),
        mapping=mapping,
        config=ADMCConfig.preset("small", conditioning="clean"),
        variants=("clean",),
        folds=1,
        seeds=(seed,),
    )
    with training_progress() as report:
        train(run, report, announce=announcing(run))
    protocol = Protocol()
    tables = _evaluate(out, protocol)
    _print_tables(protocol.describe(run), [table for table in tables if table.metric in ("UA", "NRMSE", "CRPS")])
    picture = out / "embeddings.png"
    with err_console.status("drawing embeddings"):
        draw_embeddings(run, picture)
    say(f"tables: {out / 'results.md'}   picture: {picture}")


@app.command()
def bench(
    context: typer.Context,
    suite: Annotated[
        str, typer.Option(help="Which comparison to run: step, ops, sampler, train, cdtp, or all.")
    ] = "step",
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the rows of all suites.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a file of rows per suite, and report.html of all files there.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Time nothing: make report.html of the files in this folder.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Compare with earlier rows: a file, a folder of them, or a git revision with these files."),
    ] = None,
    threads: Annotated[
        str,
        typer.Option(
            help="CPU thread counts, such as 1,2. Default: one, and as many as torch takes: OMP_NUM_THREADS or all."
        ),
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Tiny shapes: does it run at all? The times mean nothing.")] = False,
) -> None:
    """Time the kernels beside PyTorch's own ways and diffusers, each checked before it is timed.

    Columns: ms, the median time of a call, with the 20th and 80th percentile; GB/s, the bytes that the op has to read
    and write over that time; roofline, GB/s over those of a plain copy or triad of the same size (suite sampler:
    GFLOP/s that the missing tokens need, over those of a large float32 product); × rival, how many times as fast as the
    fastest correct rival of the same precision; × paper, as the formula that papers print. Modes: fresh allocates the
    result, out writes into a given one; ops with gradients have forward, backward (its graph is kept) and both.

    Rivals: eager and torch.compile; eager-folded has one precomputed factor per term, eager-baddbmm one call for
    product, scale and bias, eager-channels-last convolves images of one row, eager-linear replaces convolutions of one
    tap. sdpa-materialised gives PyTorch's attention the bias of each sample as its mask, sdpa-folded as further columns
    of queries and keys (up to 256 in all), flex-attention as a score modification (on a CPU, forward alone). On GPUs
    also eager-graph, a CUDA graph, and torch.compile-max-autotune.

    Suite sampler: ADMC's diffusion network in the paper's size, all its steps, beside the paper's loop in PyTorch;
    "modafill-fast" is the default conditioning with few evaluations.

    Suite train: an update of ADMC's diffusion network in the paper's size, and of CDTP's small denoisers, from the
    noise to the optimizer.

    Suite cdtp: a training step and an imputation of the whole model, small and in the paper's size, beside the same
    model with its ops in plain PyTorch, and that one sample by sample. Files have network evaluations and peak memory.

    Against earlier rows what counts is the change of × rival, because machines drift: a row has changed if its 20–80 %
    do not meet those of then, neither in ms nor in times of the fastest rival that was correct both times. "gained" and
    "lost" are on that rival alone, where the row's own time went the other way.
    """
    counts = list(_numbers("threads", threads)) or None
    from modafill import benchmarks

    if report is None:
        benchmarks.run(suite, json_path=json_path, out=out, against=against, threads=counts, device=device, quick=quick)
        return
    others = [
        option.opts[0]
        for option in context.command.params
        if option.name not in ("report", "against")
        and (source := context.get_parameter_source(option.name or "")) is not None
        and source.name == "COMMANDLINE"
    ]
    if others:
        raise ValueError(f"report: got {', '.join(others)} beside it, expected --against alone: nothing is timed")
    benchmarks.write_report(report, against=against)


def _changes(config: Any, pairs: list[str] | None, *fixed: str) -> dict[str, Any]:
    """``name=value`` pairs with JSON values, checked against the fields of the configuration but ``fixed``."""
    known = {k: v for k, v in config().to_dict().items() if k not in fixed}
    changes: dict[str, Any] = {}
    for pair in pairs or []:
        name, _, text = pair.partition("=")
        if name not in known:
            raise ValueError(f"set: got {name!r}, expected one of {', '.join(known)}")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = text
        numeric = isinstance(known[name], (int, float)) and not isinstance(known[name], bool)
        wrong = numeric and (isinstance(changes[name], bool) or not isinstance(changes[name], (int, float)))
        wrong = wrong or (isinstance(known[name], int) and isinstance(changes[name], float))
        if wrong or (not numeric and known[name] is not None and not isinstance(changes[name], type(known[name]))):
            raise ValueError(f"set: got {name}={text}, expected a value like {json.dumps(known[name])}")
    return changes


def _dtype(name: str | None) -> Any:
    import torch

    kinds = {None: None, "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ValueError(f"dtype: got {name!r}, expected one of float32, bfloat16, float16")
    return kinds[name]


def _device(name: str | None) -> Any:
    import torch

    there = torch.cuda.device_count()
    try:
        found = torch.device(name or ("cuda" if there else "cpu"))
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected cpu, cuda or cuda:1")
    if found.type == "cuda" and (found.index or 0) >= there:
        raise ValueError(f"device: got {name!r}, but torch finds {there} GPUs; see `modafill info`")
    if found.type == "cuda" and found.index is None:
        # One for each process of this machine.
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % there)
    return found


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(",") if n)
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, expected numbers with commas, such as 30,80") from None


def _evaluate(folder: Path, protocol: Any, jobs: int = 1, beside: tuple[Path, ...] = ()) -> list[Any]:
    from modafill.evaluation.run import evaluate_run

    with progress_bar("evaluating (%)", 100) as advance:
        return evaluate_run(
            folder, protocol, beside=beside, jobs=jobs, progress=lambda share: advance(int(100 * share))
        )


def _print_tables(about: str, tables: list[Any]) -> None:
    say(about)
    for table in tables:
        out_console.print(table.rich(out_console.width))
    say("What the names mean: modafill evaluate --help")


@contextmanager
def _model_and_store(
    run: Path, fold: int, path: Path, mapping: str | None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """The imputer of a run's fold or of a model folder, and the samples as that model reads them."""
    import tempfile

    from modafill.bulk import check_store
    from modafill.data import open_data
    from modafill.imputer import ModalityImputer
    from modafill.training import Run

    folder = run
    if (run / "run.json").is_file():
        spec = Run.load(run)
        if not 0 <= fold < spec.folds:
            raise ValueError(f"fold: got {fold}, expected 0…{spec.folds - 1}")
        if (fold, spec.seeds[0]) not in spec.finished:
            name = spec.part_folder(fold, spec.seeds[0]).name
            raise ValueError(f"{run}: {name} not trained yet; run the same `modafill train` again")
        folder = spec.part_folder(fold, spec.seeds[0]).resolve() / "model"
    elif fold:
        raise ValueError(f"fold: got {fold}, but {run} is one model, not a run")
    imputer = ModalityImputer.from_pretrained(folder, **options)
    with tempfile.TemporaryDirectory() as scratch, open_data(path, Path(scratch), mapping) as store:
        announce_notes(store)
        check_store(imputer, store)
        yield imputer, store.windowed(imputer.model.window)


def _must_be_new(out: Path, *suffixes: str) -> None:
    if out.suffix not in suffixes:
        what = {".h5": "a feature store", ".csv": "a table with commas", ".parquet": "a Parquet table", "": "a folder"}
        expected = " or ".join(f"{suffix or 'nothing'} ({what[suffix]})" for suffix in suffixes)
        raise ValueError(f"{out}: expected a name that ends in {expected}")
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or choose another name")


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such file")


# What typer answers where Ctrl-C ended a command.
_INTERRUPTED = 130


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit status 2."""
    from modafill.errors import MissingExtra, OutOfMemory
    from modafill.ops.backends import BackendError
    from modafill.training.loop import TrainingError

    try:
        status = app(prog_name="modafill", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:
            print(f"modafill: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError, MissingExtra, OutOfMemory, TrainingError, BackendError) as error:
        print(f"modafill: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    if status == _INTERRUPTED:
        print(
            "modafill: interrupted; the same command goes on with a training or with the shards of a large store, and "
            "begins all else anew",
            file=sys.stderr,
        )
    raise SystemExit(status if isinstance(status, int) else 0)
