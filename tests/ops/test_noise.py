"""The noise: Philox words, normals, their distribution, and what they depend on."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch

from modafill import ops
from modafill.ops import Draw, backends, reference

# (seed, row id, quad, fourth counter word, words): Random123's known-answer vectors for philox4x32-10.
KNOWN = [
    (0, 0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (-1, -1, 0xFFFFFFFF, 0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        0x299F31D0A4093822,
        0x13198A2E85A308D3,
        0x243F6A88,
        0x03707344,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("seed, row, quad, c3, expected", KNOWN)
def test_reference_gives_the_known_answers(seed: int, row: int, quad: int, c3: int, expected: list[int]) -> None:
    words = reference.philox(seed, torch.tensor([row]), torch.tensor([quad]), c3)
    assert words.reshape(-1).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
def test_normals_are_those_of_the_reference(seed: int) -> None:
    rows = torch.tensor([0, 1, -1, 2**40 + 3, -(2**62)])
    steps = torch.tensor([0, 1, 1000, 2**24 - 1, 7])
    for draw in Draw:
        ours = ops.randn((5, 4099), seed=seed, row_id=rows, step=steps, draw=draw, backend="cpu")
        exact = reference.randn((5, 4099), seed=seed, row_id=rows, step=steps, draw=draw)
        assert (ours.double() - exact).abs().max() <= 1e-6


def test_unsigned_and_signed_seeds_are_the_same_bits() -> None:
    assert torch.equal(ops.randn((2, 9), seed=2**64 - 5), ops.randn((2, 9), seed=-5))
    assert not torch.equal(ops.randn((2, 9), seed=5), ops.randn((2, 9), seed=5 + 2**32))


def test_seed_may_be_a_tensor() -> None:
    assert torch.equal(ops.randn((2, 9), seed=torch.tensor(-5)), ops.randn((2, 9), seed=-5))


def test_the_distribution_is_standard_normal() -> None:
    z = ops.randn((1000, 1000), seed=3).flatten().double()
    n = z.numel()
    for order, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        spread = math.sqrt(math.prod(range(1, 2 * order, 2)) / n)
        assert abs((z**order).mean().item() - moment) < 5 * spread
    cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    ks = (cdf - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max() + 0.5 / n
    assert ks * math.sqrt(n) < 1.95  # one in a thousand


def test_draws_steps_seeds_rows_and_neighbours_are_uncorrelated() -> None:
    base = ops.randn((100, 4000), seed=3).double()
    others = {
        "draw": ops.randn((100, 4000), seed=3, draw=Draw.FORWARD),
        "step": ops.randn((100, 4000), seed=3, step=1),
        "seed": ops.randn((100, 4000), seed=4),
        "row": ops.randn((100, 4000), seed=3, row_id=torch.arange(100) + 100),
        "element": base.roll(1, 1),
        "pair": base.roll(2, 1),
        "quad": base.roll(4, 1),
    }
    for name, other in others.items():
        assert abs((base * other).mean().item()) < 5 / math.sqrt(base.numel()), name
        assert abs((base**2 * other.double() ** 2).mean().item() - 1) < 5 * math.sqrt(8 / base.numel()), name


def test_a_row_has_its_bits_in_any_batch_and_order() -> None:
    whole = ops.randn((33, 7, 11), seed=9)
    order = torch.randperm(33)
    assert torch.equal(ops.randn((33, 7, 11), seed=9, row_id=order), whole[order])
    assert torch.equal(ops.randn((1, 77), seed=9, row_id=torch.tensor([20])), whole[20:21].flatten(1))
    wider = ops.randn((33, 5000), seed=9)
    assert torch.equal(wider[:, :77], whole.flatten(1))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (1,), (1, 1), (3, 2, 1), (2, 1023), (2, 1025), (3, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_odd_sizes_are_written_whole_and_nothing_else_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size = math.prod(shape)
    arena = torch.full((size + 64,), math.nan, dtype=dtype)
    out = arena[32 : 32 + size].view(shape)
    assert ops.randn(shape, seed=1, dtype=dtype, out=out) is out
    assert torch.equal(out, reference.randn(shape, seed=1).float().to(dtype)) or (
        out.double() - reference.randn(shape, seed=1)
    ).abs().max() <= (1e-6 if dtype != torch.bfloat16 else 2e-2)
    assert not out.isnan().any()
    assert arena[:32].isnan().all()
    assert arena[32 + size :].isnan().all()


def test_wider_types_hold_the_same_normals() -> None:
    z = ops.randn((3, 101), seed=5)
    assert torch.equal(ops.randn((3, 101), seed=5, dtype=torch.float64), z.double())
    assert torch.equal(ops.randn((3, 101), seed=5, dtype=torch.bfloat16), z.bfloat16())


def test_large_outputs_that_bypass_the_caches_have_the_same_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = (1 << 25) // (4099 * dtype.itemsize) + 2
        large = ops.randn((rows, 4099), seed=5, dtype=dtype)
        for row in (0, 1, rows - 1):
            small = ops.randn((1, 4099), seed=5, dtype=dtype, row_id=torch.tensor([row]))
            assert torch.equal(large[row : row + 1], small)


_DIGEST = """
import hashlib, sys, torch
from modafill import ops, _C
from modafill.diffusion.schedule import Schedule
torch.set_num_threads(int(sys.argv[1]))
table = Schedule.linear(50, 1e-3, 0.1).table
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    x, eps, observed = (ops.randn((701, 3, 37), seed=s, dtype=dtype) for s in (1, 2, 3))
    available = ops.randn((701, 3), seed=4) > 0
    steps = torch.arange(701) % 50 + 1
    outputs = [
        ops.masked_reverse_step(x, eps, observed, available, table, steps, seed=5),
        *ops.add_noise(x, table, steps, seed=5),
        ops.ddim_step(x, eps, table, steps, steps // 2, eta=0.7, clip=1.5, seed=5),
        ops.ddim_step(x, eps, table, steps, steps // 2),
    ]
    for out in outputs:
        digest.update(out.view(torch.uint8).numpy().tobytes())
print(_C.cpu_isa, digest.hexdigest())
"""


def _digest(isa: str, threads: int) -> str:
    run = subprocess.run(
        [sys.executable, "-c", _DIGEST, str(threads)],
        env={**os.environ, "MODAFILL_CPU_ISA": isa, backends.ENVIRONMENT: "cpu"},
        capture_output=True,
        text=True,
    )
    if "this processor does not have" in run.stderr:
        pytest.skip(f"this processor does not have {isa}")
    assert run.returncode == 0, run.stderr
    name, digest = run.stdout.split()
    assert name == isa
    return digest


@pytest.fixture(scope="module")
def baseline_digest() -> str:
    return _digest("baseline", 1)


@pytest.mark.parametrize("isa, threads", [("baseline", 2), ("v3", 1), ("v4", 1), ("v4", 2)])
def test_instruction_sets_and_threads_give_the_same_bits(isa: str, threads: int, baseline_digest: str) -> None:
    assert _digest(isa, threads) == baseline_digest


def test_the_bits_do_not_change_from_release_to_release() -> None:
    z = ops.randn((16, 64), seed=2026, step=3)
    assert hashlib.sha256(z.numpy().tobytes()).hexdigest()[:16] == "485687a51a4217f9"


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"shape": ()}, "shape"),
        ({"shape": (2, -1)}, "shape"),
        ({"step": -1}, "step"),
        ({"step": 2**24}, "step"),
        ({"step": torch.tensor([0, 2**24])}, "step"),
        ({"step": torch.tensor([1, 2, 3])}, "step"),
        ({"step": torch.tensor(1, dtype=torch.int32)}, "step"),
        ({"seed": 2**64}, "seed"),
        ({"seed": torch.tensor([1])}, "seed"),
        ({"row_id": torch.zeros(3, dtype=torch.int64)}, "row_id"),
        ({"row_id": torch.zeros(2)}, "row_id"),
        ({"dtype": torch.int32}, "dtype"),
        ({"draw": 5}, "draw"),
        ({"out": torch.empty(2, 4)}, "out"),
        ({"out": torch.empty(3, 2).T}, "out"),
        ({"out": torch.empty(2, 3, dtype=torch.float64)}, "out"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        ops.randn(**{"shape": (2, 3), "seed": 0, **kwargs})
