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
from tqdm import tqdm

import common

TINY = {  # flags for a run of seconds
    "biflow": "--size 16 --width 8 --mults 1 --batch 4 --clips 8 --streams 2 --frames 34 "
              "--eps 0,0.2 --tol 0.1 --iters 6",
    "flowloss": "--size 24 --frames 8 --width 8 --batch 2 --clips 6 --videos 2 --steps 2 "
                "--train --iters 4 --base_iters 3 --points 2 --psi 3",
    "flowmo": "--frames 6 --width 32 --layers 1 --batch 4 --clips 24 --prompts 4 --steps 4 "
              "--guided 0-1 --iters 12 --train",
    "motionprompt": "--prompts 4 --steps 4 --guided 1-2 --K 1 --raft_iters 2 --disc_iters 2 "
                    "--fakes 4 --train",
}
for name, flags in TINY.items():
    TINY[name] = ["--device", "cpu", "--preset", "tiny", *flags.split()]
torch.set_num_threads(1)  # a plugin may have imported it before the line above
rendered = functools.cache(common.render)  # the same worlds for every run in this process


@pytest.fixture(autouse=True)
def undisturbed():
    """Ctrl-C raises, as it does not in a job in the background; no bar or handler stays behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    tqdm._instances.clear()  # of a run that failed; they would move the bars of the next one


@pytest.fixture
def runner(monkeypatch, tmp_path, capsys):
    """runner(script) -> run(*flags, tiny=True) -> (exit status, stdout, stderr).

    In this process and an empty folder; the flags come after those of TINY, if tiny.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "render", rendered)

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

    return of


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


def refused(result, *says):
    """That a run ended with exit status 2 and one clear line, that has these texts."""
    status, _, err = result
    lines = [line.split("\r")[-1] for line in err.split("\n")]  # of a bar what is left in the end
    lines = [line for line in lines if line.strip()]
    assert status == 2 and len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for text in says:
        assert text in lines[0]


def content(folder):
    """All files below a folder, by name."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def tensors(value, path=()):
    """Every tensor of a checkpoint, by where it stands."""
    if torch.is_tensor(value):
        return {path: value}
    found = {}
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            found |= tensors(part, (*path, key))
    return found


def same_weights(a, b):
    """Whether two runs have learned the same, and their optimizers too, bit for bit."""
    a, b = (tensors(torch.load(out / "ckpt.pt", weights_only=True)) for out in (a, b))
    return len(a) > 10 and a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
