"""Data parallel training in two processes is training on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAIN = """
import os, sys, torch
from pathlib import Path
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from modafill.nn import ConvGeluConv, PromptAttention

class Network(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attention = PromptAttention(8, 2, dropout, n_modes=3, max_query_length=5, max_key_length=5)
        self.encoder = ConvGeluConv(8, 16, 8)

    def forward(self, x, mode, row_id):
        return self.encoder(x + self.attention(x, x, x, mode=mode, seed=7, row_id=row_id)[0])

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
if world > 1:
    store = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
own = slice(rank * 8 // world, (rank + 1) * 8 // world)
found = []
for dropout in (0.0, 0.4):
    torch.manual_seed(0)
    network = Network(dropout).double()
    x, target = torch.randn(2, 8, 5, 8, dtype=torch.float64).unbind()
    mode, row_id = torch.randint(3, (8,)), torch.arange(8)
    if world > 1:
        network = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (network(x[own], mode[own], row_id[own]) - target[own]).square().mean().backward()
        optimizer.step()
    found += [*(p.detach() for p in network.parameters()), *(p.grad for p in network.parameters())]
torch.save(found, folder / f"{rank}of{world}.pt")
if world > 1:
    torch.distributed.barrier()
    # Threads of gloo that are still at work abort a process that tears them down, now and then on a busy machine.
    os._exit(0)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same weights and gradients, without dropout and with it, which belongs to the seed and the row."""
    arguments = [(0, 1), (0, 2), (1, 2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(rank), str(world), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in arguments
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    alone, *both = (torch.load(tmp_path / f"{rank}of{world}.pt") for rank, world in arguments)
    for parts in both:
        assert len(parts) == len(alone) == 36
        for found, expected in zip(parts, alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
