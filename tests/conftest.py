import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # many small things; sums, so bits, depend on the threads
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that plain `pytest` finds the scripts

import pytest
import torch

import common

TINY = {  # flags for a run of seconds
    "biflow": "--size 16 --width 8 --mults 1 --batch 4 --clips 8 --streams 2 --frames 34 "
              "--eps 0,0.2 --tol 0.1 --iters 6",
    "flowloss": "--size 24 --frames 8 --width 8 --mults 1,1 --batch 2 --clips 6 --videos 2 "
                "--steps 2 --iters 4 --base_iters 2 --raft_iters 2 --points 2 "
                "--objectives none,gated --psi 3",
    "flowmo": "--frames 6 --width 32 --layers 1 --batch 4 --clips 24 --prompts 4 --steps 4 "
              "--guided 0-1 --iters 4 --methods base,random,flowmo,freeinit,steps",
    "motionprompt": "--frames 6 --width 32 --layers 1 --batch 4 --clips 24 --prompts 4 --steps 4 "
                    "--K 1 --iters 4 --raft_iters 2 --disc_iters 2 --fakes 4",
}
for name, flags in TINY.items():
    TINY[name] = ["--device", "cpu", "--preset", "tiny", *flags.split()]
torch.set_num_threads(1)  # a plugin may have imported it before the line above
rendered = functools.cache(common.render)  # the same worlds for every run in this process


@pytest.fixture
def runner(monkeypatch, tmp_path, capsys):
    """runner(script) -> run(*flags, tiny=True) -> (exit status, stdout, stderr).

    In this process and an empty folder; the flags come after those of TINY, if tiny.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "render", rendered)
    # A job in the background ignores Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def of(script):
        def run(*flags, tiny=True):
            before = TINY[script.__name__] if tiny else []
            argv = [f"{script.__name__}.py", *before, *map(str, flags)]
            monkeypatch.setattr(sys, "argv", argv)
            status = 0
            try:
                common.run(script.main)
            except SystemExit as e:
                status = e.code
            return status, *capsys.readouterr()

        return run

    yield of
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(name) -> the folder it was started in, the process: a whole run, as of a user.

    Made once for all tests: they read it, or copy it.
    """
    @functools.cache
    def of(name):
        cwd = tmp_path_factory.mktemp(name)
        command = [sys.executable, str(ROOT / f"{name}.py"), *TINY[name]]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return cwd, done

    return of
