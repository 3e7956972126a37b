"""``python kill.py WRITES ARGUMENTS…``: runs ``modafill ARGUMENTS…`` until it gets through, killed every few writes.

Each attempt is a process of its own that dies by SIGKILL at its WRITES-th file, by turns before and after that file
takes its place. A checkpoint is written after every epoch. Prints the number of kills.
"""

import os
import signal
import sys
from functools import partial

import torch
import torch._dynamo  # what takes seconds to import is imported once
import torch.utils.tensorboard

import modafill.cli
from modafill.training import part

writes, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
part.train_stage = partial(part.train_stage, checkpoint_seconds=0)
real_replace = os.replace


def attempt(kill_after: bool) -> None:
    left = writes

    def replace(source: str, target: str) -> None:
        nonlocal left
        left -= 1
        if left or kill_after:
            real_replace(source, target)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    torch.set_num_threads(1)
    modafill.cli.main()


for kills in range(1000):
    if not (pid := os.fork()):
        attempt(kill_after=bool(kills % 2))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != -signal.SIGKILL:
        print(kills)
        sys.exit(status)
