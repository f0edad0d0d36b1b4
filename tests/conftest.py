import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # many small things; and sums, so bits, depend on the number of threads
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the scripts

import pytest
import torch

import common

torch.set_num_threads(1)  # a plugin may have imported it before the line above


@pytest.fixture
def runner(monkeypatch, tmp_path, capsys):
    """runner(script, flags) -> run(*more) -> (exit status, stdout, stderr), in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    locks, open_run = [], common.open_run

    def open_and_note(*args):
        out, lock = open_run(*args)
        locks.append(lock)
        return out, lock
    monkeypatch.setattr(common, "open_run", open_and_note)

    def of(script, flags):
        def run(*more):
            monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags, *map(str, more)])
            status = 0
            try:
                common.run(script.main)
            except SystemExit as e:
                status = e.code
            while locks:
                os.close(locks.pop())  # as the end of a process does
            return status, *capsys.readouterr()
        return run
    return of
