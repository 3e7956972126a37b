"""``python -m modafill.kernels``: what the Triton kernels take of a GPU, and tuning on the GPU that is here."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Ops = Annotated[list[str] | None, typer.Option("--op", help="An op; may be repeated. Default: all of them.")]


def _chosen(given: list[str] | None, known: tuple[str, ...]) -> list[str]:
    for op in given or ():
        if op not in known:
            print(f"error: --op: got {op!r}, expected one of {', '.join(known)}", file=sys.stderr)
            raise typer.Exit(2)
    return given or list(known)


@app.command()
def resources(
    op: Ops = None,
    capability: Annotated[
        list[int] | None, typer.Option(help="10·major + minor, as 90; may be repeated. Default: 80 86 89 90 100 120.")
    ] = None,
) -> None:
    """Compile every kernel at its listed configurations and print registers, spills and shared memory.

    Needs no GPU. Exit status 1 if a kernel spills or wants more shared memory than a block may have.
    """
    from modafill.kernels import resources as r

    chosen = _chosen(op, r.OPS)
    for c in capability or ():
        if c not in r.CAPABILITIES:
            print(
                f"error: --capability: got {c}, expected one of {', '.join(map(str, r.CAPABILITIES))}", file=sys.stderr
            )
            raise typer.Exit(2)
    print(f"{'op':20} {'kernel':26} {'sm':>4} {'type':5} {'regs':>5} {'spill':>6} {'shared':>7} {'limit':>7}  case")
    fits = True
    for used in r.measure(v for o in chosen for c in capability or r.CAPABILITIES for v in r.variants(o, c)):
        v, fits = used.variant, fits and used.fits
        print(
            f"{v.op:20} {v.kernel:26} {v.capability:4} {v.dtype:5} {used.registers:5} {used.spilled:6} {used.shared:7}"
            f" {r.SHARED_LIMITS[v.capability]:7}  {v.case}{'' if used.fits else '  DOES NOT FIT'}",
            flush=True,
        )
    raise typer.Exit(0 if fits else 1)


@app.command()
def tune(
    op: Ops = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write <op>.json into. Default: the installed package's own.")
    ] = None,
) -> None:
    """Time the candidates on this GPU, keep the fastest for its compute capability and write configs/<op>.json."""
    import torch

    from modafill.kernels import resources as r
    from modafill.kernels import tuned, tuning

    chosen = _chosen(op, r.OPS)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU is here to tune on", file=sys.stderr)
        raise typer.Exit(2)
    import triton.testing

    folder = Path(str(files("modafill.kernels") / "configs")) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    capability = tuned.capability_of(torch.empty(0, device="cuda"))
    for name in chosen:
        entry = tuning.tune(name, lambda call: triton.testing.do_bench(call, return_mode="median"), print)
        print(f"wrote {tuning.save(name, capability, entry, folder)}")


if __name__ == "__main__":
    app()
