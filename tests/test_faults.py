"""What goes wrong around a run, for all four scripts: nothing is lost, nothing is overwritten, one clear line."""
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import biflow
import common
import flowloss
import flowmo
import motionprompt
from conftest import TINY

ROOT = Path(__file__).parents[1]
SCRIPTS = [biflow, flowloss, flowmo, motionprompt]
OUT = {"biflow": "biflow-sky-procedural", "flowloss": "flowloss-robot-procedural",
       "flowmo": "flowmo-sprites-procedural", "motionprompt": "motionprompt-sprites-procedural"}
CLOCK = {"ms_per_frame", "s_per_step", "s_per_video", "cost_ratio"}
open_run = common.open_run


@pytest.fixture(params=SCRIPTS, ids=lambda s: s.__name__)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(script): the folder of a whole run of it, started as a user would; made once."""
    made = {}

    def of(script):
        name = script.__name__
        if name not in made:
            cwd = tmp_path_factory.mktemp(name)
            command = [sys.executable, ROOT / f"{name}.py", *TINY[name]]
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
            made[name] = cwd / "out" / OUT[name]
        return made[name]
    return of


def refused(result, *says):
    """Exit status 2 and one clear line."""
    status, _, err = result
    lines = [line[line.find("error: "):] for line in err.split("\n") if "error: " in line or "Traceback" in line]
    assert status == 2 and len(lines) == 1 and all(s in lines[0] for s in says), err


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def learned(out):
    """Every tensor of the checkpoint, by where it stands."""
    found = {}

    def walk(x, path):
        if torch.is_tensor(x):
            found[path] = x
        elif isinstance(x, (dict, list, tuple)):
            for k, v in x.items() if isinstance(x, dict) else enumerate(x):
                walk(v, (*path, k))
    walk(torch.load(out / "ckpt.pt", weights_only=True), ())
    return found


def same_run(a, b):
    """The same weights bit for bit, and the same numbers but for what a clock measures."""
    rows = lambda out: [{k: v for k, v in r.items() if k not in CLOCK}
                        for r in json.loads((out / "results.json").read_text())["rows"]]
    one, two = learned(a), learned(b)
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    assert rows(a) == rows(b) and {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}


# ---------------------------------------------------------------------------------------------- stopped

def test_interrupted_in_every_stage_and_resumed_it_ends_as_if_nothing_had_been(script, runner, finished, monkeypatch):
    run, whole, step, again, seen = runner(script), finished(script), torch.optim.AdamW.step, (), set()
    for _ in range(9):  # a Ctrl-C in the first step of every network, a run each, and one in the evaluation
        taken = []

        def interrupting(self, *args, **named):
            network = tuple(p.shape for p in self.param_groups[0]["params"])
            if not taken and network not in seen:
                taken.append(network)
                signal.raise_signal(signal.SIGINT)
            return step(self, *args, **named)
        with monkeypatch.context() as m:
            m.setattr(torch.optim.AdamW, "step", interrupting)
            m.setattr(common, "save_gif", lambda *_, **__: signal.raise_signal(signal.SIGINT))
            status, _, err = run("--out_dir", "o", *again)
        assert status == 130 and "interrupted" in err and "Traceback" not in err
        seen, again = seen | set(taken), ("--resume",)
        if not taken:
            break
    assert len(seen) == {biflow: 3, flowloss: 2, flowmo: 1, motionprompt: 3}[script]
    assert run("--out_dir", "o", "--resume")[0] == 0
    same_run(Path("o"), whole)


def test_killed_while_it_saves_it_goes_on_from_the_save_before(script, runner, finished, monkeypatch):
    class Killed(BaseException):
        """As kill -9: nothing of ours catches it."""
    run, step, taken = runner(script), torch.optim.AdamW.step, []

    def interrupting(*args, **named):
        if not taken:
            taken.append(signal.raise_signal(signal.SIGINT))
        return step(*args, **named)
    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", interrupting)
        assert run("--out_dir", "o")[0] == 130
    before = Path("o/ckpt.pt").read_bytes()

    def dies(state, path):
        path.write_bytes(b"half")
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(torch, "save", dies)
        with pytest.raises(Killed):
            run("--out_dir", "o", "--resume")
    assert Path("o/ckpt.pt").read_bytes() == before and Path("o/.ckpt.pt.part").exists()
    assert run("--out_dir", "o", "--resume")[0] == 0
    same_run(Path("o"), finished(script))


def test_a_full_disk_is_one_line_and_the_checkpoint_of_before_stays(script, runner, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished(script), tmp_path / "o")
    before = content(out)

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    refused(runner(script)("--out_dir", out, "--eval_only"), "cannot write", "No space left on device", "is intact")
    assert content(out) == before
    refused(runner(script)("--out_dir", "new"), "cannot write", "No space left on device")
    assert not list((tmp_path / "new").iterdir())


# ---------------------------------------------------------------------------------------------- folders

def test_a_folder_that_cannot_be_written_is_one_line(script, runner, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(runner(script)("--out_dir", "file/below"), "cannot write to file/below", "--out_dir")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_two_runs_into_one_folder_are_refused_and_change_nothing(script, runner, finished, tmp_path):
    run, out = runner(script), shutil.copytree(finished(script), tmp_path / "o")
    before = content(out)
    refused(run("--out_dir", out), "holds an earlier run", "--resume", "--eval_only", "--out_dir")
    _, lock = open_run(script.__name__, script.Config(out_dir=str(out), eval_only=True), "procedural")
    try:
        refused(run("--out_dir", out, "--resume"), "in use by another run")
    finally:
        os.close(lock)
    assert content(out) == before


# ---------------------------------------------------------------------------------------------- checkpoints

class Code:
    """Runs when it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("kind", ["truncated", "empty", "another script's", "code", "another size"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_left_alone(script, kind, runner, finished, tmp_path):
    out = shutil.copytree(finished(script), tmp_path / "o")
    ckpt, flags, says = out / "ckpt.pt", [], "is not a readable checkpoint"
    if kind == "truncated":
        ckpt.write_bytes(ckpt.read_bytes()[:5000])
    elif kind == "empty":
        ckpt.write_bytes(b"")
    elif kind == "code":
        ckpt.write_bytes(pickle.dumps(Code(), protocol=2))
    elif kind == "another size":
        flags, says = ["--width", "64"], "trained with --width"
    else:
        other = SCRIPTS[SCRIPTS.index(script) - 1].__name__
        torch.save(torch.load(ckpt, weights_only=True) | dict(script=other), ckpt)
        says = f"was written by {other}.py, not {script.__name__}.py"
    before = content(out)
    for again in ("--resume", "--eval_only"):
        refused(runner(script)("--out_dir", out, again, *flags), says)
    assert content(out) == before and not Path("ran").exists()


# ---------------------------------------------------------------------------------------------- data

def clips_of_noise(folder, count=19, frames=10, size=32):
    """Real clips with captions, as folders of frames."""
    rng = np.random.default_rng(0)
    for k in range(count):
        (folder / f"c{k}").mkdir(parents=True)
        for t in range(frames):
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"c{k}" / f"{t}.png")
    for k in range(count + 1):
        (folder / f"c{k}.txt").write_text("a red thing moving left, steady\n")


def test_clips_with_nan_are_left_out_and_named(script, runner, tmp_path):
    clips_of_noise(tmp_path / "data" / "mine")
    np.save(tmp_path / "data" / "mine" / "c19.npy", np.full((10, 32, 32, 3), np.nan, np.float32))
    more = ["--methods", "biflow", "--eps", 0.1] if script is biflow else []
    status, _, err = runner(script)("--dataset", "mine", *more)
    assert status == 0 and "c19.npy" in err and "not finite" in err, err


def test_a_data_set_that_vanishes_is_one_line(script, runner, tmp_path, monkeypatch):
    clips_of_noise(tmp_path / "data" / "mine")
    monkeypatch.setattr(common.load_real, "__defaults__", (0,))  # too large to be held in memory
    step = torch.optim.AdamW.step

    def vanishing(*args, **named):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        return step(*args, **named)
    monkeypatch.setattr(torch.optim.AdamW, "step", vanishing)
    refused(runner(script)("--dataset", "mine"), "cannot be read any more")


# ---------------------------------------------------------------------------------------------- flags

def test_every_numeric_flag_refuses_what_is_below_its_range_and_what_is_no_number(script, runner):
    run, numeric = runner(script), [f for f in fields(script.Config) if f.type in (int, float)]
    assert len(numeric) > 10
    for f in numeric:
        assert f.metadata["lo"] is not None and f.metadata["hi"] is not None, f.name
        for value in (-1, "x", 1e300 if f.type is float else 10**18, *(["nan"] if f.type is float else [])):
            refused(run(f"--{f.name}={value}"), f"--{f.name}")
    assert not list(Path().rglob("*"))
