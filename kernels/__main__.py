"""What the Triton kernels take of a GPU, and tuning on the GPU that is here."""

import importlib.util
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from modafill.ops.backends import OPS

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Ops = Annotated[list[str] | None, typer.Option("--op", help="An op; may be repeated. Default: all of them.")]


def _chosen(given: list[str] | None) -> list[str]:
    for op in given or ():
        if op not in OPS:
            raise typer.TyperException(f"--op: got {op!r}, expected one of {', '.join(OPS)}")
    return given or list(OPS)


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise typer.TyperException("triton is not installed: pip install triton")


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
    chosen = _chosen(op)
    _check_triton()
    from modafill.kernels import resources as r

    for c in capability or ():
        if c not in r.CAPABILITIES:
            raise typer.TyperException(f"--capability: got {c}, expected one of {', '.join(map(str, r.CAPABILITIES))}")
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

    chosen = _chosen(op)
    if not torch.cuda.is_available():
        raise typer.TyperException("no CUDA GPU is here to tune on")
    _check_triton()
    import triton.testing

    from modafill.kernels import tuned, tuning

    folder = Path(str(files("modafill.kernels") / "configs")) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    capability = tuned.capability_of(torch.empty(0, device="cuda"))
    for name in chosen:
        entry = tuning.tune(name, lambda call: triton.testing.do_bench(call, return_mode="median"), print)
        print(f"wrote {tuning.save(name, capability, entry, folder)}")


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit status 2."""
    try:
        status = app(prog_name="python -m modafill.kernels", standalone_mode=False)
    except typer.TyperException as error:
        if message := " ".join(error.format_message().split()):
            print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
