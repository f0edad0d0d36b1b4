import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # many small things; and sums, so bits, depend on the number of threads
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the scripts

import pytest
import torch

import common

TINY = {  # flags for a run of seconds
    "biflow": "--size 16 --width 8 --mults 1 --batch 4 --clips 8 --streams 2 --frames 34 --eps 0,0.2 --tol 0.1 "
              "--step 0.25 --iters 6",
    "flowloss": "--size 24 --frames 8 --width 8 --mults 1,1 --batch 2 --clips 6 --videos 2 --steps 2 --iters 4 "
                "--base_iters 2 --raft_iters 2 --points 2 --objectives none,gated --psi 3",
    "flowmo": "--frames 6 --width 32 --layers 1 --batch 4 --clips 24 --prompts 4 --steps 4 --guided 0-1 --iters 4 "
              "--methods base,random,flowmo,freeinit,steps",
    "motionprompt": "--frames 6 --width 32 --layers 1 --batch 4 --clips 24 --prompts 4 --steps 4 --K 1 --iters 4 "
                    "--raft_iters 2 --disc_iters 2 --fakes 4"}
TINY = {name: ["--device", "cpu", "--preset", "tiny", *flags.split()] for name, flags in TINY.items()}
torch.set_num_threads(1)  # a plugin may have imported it before the line above


@pytest.fixture
def runner(monkeypatch, tmp_path, capsys):
    """runner(script) -> run(*more) -> (exit status, stdout, stderr), in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    locks, open_run = [], common.open_run

    def open_and_note(*args):
        out, lock = open_run(*args)
        locks.append(lock)
        return out, lock
    monkeypatch.setattr(common, "open_run", open_and_note)

    def of(script):
        def run(*more):
            monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *TINY[script.__name__], *map(str, more)])
            status = 0
            try:
                common.run(script.main)
            except SystemExit as e:
                status = e.code
            finally:
                while locks:
                    os.close(locks.pop())  # as the end of a process does
            return status, *capsys.readouterr()
        return run
    yield of
    signal.signal(signal.SIGINT, handler)
