"""What goes wrong around a run, for all four scripts: nothing is lost, and it is told in one line.

How biflow.py is stopped and goes on is in test_cli.py.
"""
import ast
import errno
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import biflow
import common
import flowloss
import flowmo
import motionprompt
from conftest import ROOT, TINY, content, refused, rendered, same_weights

STAGED = [flowloss, flowmo, motionprompt]
FIRST = {"flowloss": "base.pt", "motionprompt": "raft.pt"}  # what a run saves first, or ckpt.pt
NETWORKS = {"flowloss": 2, "flowmo": 1, "motionprompt": 2}  # trained one after the other
CLOCK = {"ms_per_frame", "s_per_step", "s_per_video", "cost_ratio"}


@pytest.fixture(params=[biflow, *STAGED], ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(params=STAGED, ids=lambda script: script.__name__)
def staged(request):
    return request.param


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """whole(script): the folder of a run that nothing disturbed; to be read only."""
    @functools.cache
    def of(script):
        name = script.__name__
        if script is biflow:
            return finished(name)[0] / "out" / "biflow-sky-procedural"
        cwd = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as m, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            m.chdir(cwd)
            m.setattr(common, "render", rendered)
            m.setattr(sys, "argv", [f"{name}.py", *TINY[name]])
            common.run(script.main)
        return next((cwd / "out").iterdir())

    return of


def ends_in_one_line(result, *says):
    """As refused(), after a training that left its progress bar."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
    for text in says:
        assert text in lines[0]


def rows_of(out):
    """The rows of results.json, but for what a clock measures."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def at_first_step(monkeypatch, happens):
    """happens() before the first step that an optimizer takes from here on."""
    step, taken = torch.optim.AdamW.step, []

    def first(self, *args, **named):
        if not taken:
            taken.append(happens())
        return step(self, *args, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", first)


def ctrl_c(*_):
    signal.raise_signal(signal.SIGINT)


# ---------------------------------------- stopped

def test_a_script_runs_from_anywhere(staged, tmp_path):
    command = [sys.executable, str(ROOT / f"{staged.__name__}.py"), "--dataset", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    refused((done.returncode, done.stdout, done.stderr), "--dataset nowhere: no clips found")


def test_interrupted_in_every_stage_and_resumed_it_ends_as_if_nothing_had_been(
        staged, runner, whole, monkeypatch):
    run = runner(staged)
    step, seen, again = torch.optim.AdamW.step, set(), ()
    stopped = True
    while stopped:  # a Ctrl-C in the first step of every network, then one before the evaluation
        stopped = set()

        def interrupting(self, *args, **named):
            network = tuple(p.shape for p in self.param_groups[0]["params"])
            if not stopped and network not in seen:
                stopped.add(network)
                ctrl_c()
            return step(self, *args, **named)

        with monkeypatch.context() as m:
            m.setattr(torch.optim.AdamW, "step", interrupting)
            if staged is flowloss:
                m.setattr(flowloss, "evaluate", ctrl_c)
            else:
                m.setattr(common, "score", ctrl_c)
            status, _, err = run("--out_dir", "o", *again)
        assert status == 130 and "interrupted" in err and "Traceback" not in err
        seen |= stopped
        again = ("--resume",)
    assert len(seen) == NETWORKS[staged.__name__]
    assert same_weights(Path("o"), whole(staged))


class Killed(BaseException):
    """As kill -9: nothing of ours catches it."""


def test_killed_while_it_saves_it_keeps_the_save_before(staged, runner, monkeypatch):
    run = runner(staged)
    with monkeypatch.context() as m:
        at_first_step(m, ctrl_c)
        assert run("--out_dir", "o")[0] == 130
    before = content(Path("o"))

    def dies(state, path):
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(torch, "save", dies)
        run("--out_dir", "o", "--resume", tiny=False)
    name = FIRST.get(staged.__name__, "ckpt.pt")
    assert content(Path("o")) == before | {f".{name}.part": b"half"}


def test_a_full_disk_is_one_line(script, runner, monkeypatch):
    replace = os.replace
    name = FIRST.get(script.__name__, "ckpt.pt")

    def full(source, target):
        if target.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    ends_in_one_line(runner(script)("--out_dir", "o"),
                     f"cannot write o/{name}", "No space left on device", "is intact")
    assert content(Path("o")).keys() == {"config.json"}


# ---------------------------------------- a folder that holds a run

def test_killed_before_its_first_save_a_run_starts_again_and_goes_on(script, runner, monkeypatch):
    def dies():
        raise Killed

    run = runner(script)
    with monkeypatch.context() as m, pytest.raises(Killed):
        at_first_step(m, dies)
        run("--out_dir", "o", "--seed", 5)
    assert content(Path("o")).keys() == {"config.json"}
    tqdm._instances.clear()
    for flags in (["--resume"], [*TINY[script.__name__], "--seed", 6]):
        with monkeypatch.context() as m:
            at_first_step(m, ctrl_c)
            assert run("--out_dir", "o", *flags, tiny=False)[0] == 130
        seed = json.loads(Path("o/config.json").read_text())["config"]["seed"]
        assert seed == (5 if flags == ["--resume"] else 6)
        for path in Path("o").glob("*.pt"):
            assert torch.load(path, weights_only=True)["config"]["seed"] == seed
            path.unlink()


def test_a_folder_is_refused_before_any_clip_is_rendered(script, runner, monkeypatch):
    monkeypatch.setattr(common, "render", lambda *_, **__: pytest.fail("rendered"))
    Path("o").mkdir()
    Path("o/ckpt.pt").write_bytes(b"weights")
    refused(runner(script)("--out_dir", "o"), "o holds an earlier run", "--resume")
    Path("file").touch()
    refused(runner(script)("--out_dir", "file/o"), "cannot write into file", "--out_dir")
    assert content(Path()) == {"file": b"", "o/ckpt.pt": b"weights"}


@pytest.mark.parametrize("how", ["--resume", "--eval_only"])
def test_a_cut_checkpoint_is_refused_and_left_alone(script, how, runner, whole):
    out = Path(shutil.copytree(whole(script), "o"))
    (out / "ckpt.pt").write_bytes((out / "ckpt.pt").read_bytes()[:5000])
    before = content(out)
    result = runner(script)("--out_dir", "o", how, tiny=False)
    ends_in_one_line(result, "ckpt.pt is not a readable file of")
    assert content(out) == before


def test_eval_only_needs_no_other_flag_and_repeats_the_numbers(staged, runner, whole):
    out = Path(shutil.copytree(whole(staged), "o"))
    for name in ("results.json", "samples.gif", "sheet.png"):
        (out / name).unlink()
    assert runner(staged)("--out_dir", "o", "--eval_only", tiny=False)[0] == 0
    assert rows_of(out) == rows_of(whole(staged))
    assert content(out).keys() == content(whole(staged)).keys()


@pytest.mark.parametrize("how", ["--resume", "--eval_only"])
def test_another_size_than_that_of_the_run_is_refused(script, how, runner, whole):
    shutil.copytree(whole(script), "o")
    flag = "gap" if script is motionprompt else "size"  # its size is the video model's
    refused(runner(script)("--out_dir", "o", how, f"--{flag}", 64, tiny=False),
            f"--{flag} 64: the run in o was trained with")


def test_no_flag_that_shapes_the_training_is_free(script):
    bound = {f.name for f in fields(script.Config) if not f.metadata["free"]}
    shapes = {"dataset", "preset", "seed", "amp", "lr"}
    if script is motionprompt:
        shapes |= {"model", "raft_iters", "disc_iters", "fakes", "noise", "gap"}
    else:
        shapes |= {"iters", "batch", "clips", "width", "size", "ema"}
    assert bound >= shapes


# ---------------------------------------- data

def clips_of_noise(folder, count=10, frames=10, size=32):
    """Real clips with captions, as folders of frames."""
    rng = np.random.default_rng(0)
    for k in range(count):
        (folder / f"c{k}").mkdir(parents=True)
        (folder / f"c{k}.txt").write_text("a red thing moving left, steady\n")
        for t in range(frames):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"c{k}" / f"{t}.png")


@pytest.mark.parametrize("staged", [flowloss, motionprompt], indirect=True)  # flowmo: its own tests
def test_real_clips_run_but_for_one_that_is_broken_and_named(staged, runner):
    clips_of_noise(Path("data/mine"))
    Path("data/mine/c10.npy").write_bytes(b"cut off")
    status, text, err = runner(staged)("--dataset", "mine")
    assert status == 0 and "c10.npy" in err and "PROCEDURAL" not in text
    out = Path(f"out/{staged.__name__}-mine")
    assert json.loads((out / "results.json").read_text())["dataset"]["source"] == "real"


def test_clips_of_floats_are_refused_in_one_line(script, runner):
    clips_of_noise(Path("data/mine"))
    np.save("data/mine/c10.npy", np.zeros((10, 32, 32, 3), np.float32))
    ends_in_one_line(runner(script)("--dataset", "mine"), "c10.npy holds float32", "as uint8")


def test_clips_that_vanish_are_one_line(script, runner, monkeypatch):
    clips_of_noise(Path("data/mine"))
    monkeypatch.setattr(common, "HELD", 0)  # so they are read when they are needed
    at_first_step(monkeypatch, lambda: shutil.rmtree("data"))
    ends_in_one_line(runner(script)("--dataset", "mine"), "cannot be read any more")


# ---------------------------------------- flags

def test_every_number_has_a_range_and_is_refused_outside_it(script, runner):
    run = runner(script)
    numbers = [f for f in fields(script.Config) if f.type in (int, float)]
    assert len(numbers) > 10
    for f in numbers:
        values = [-1, "x", 10**18]
        if f.type is float:
            values = [-1, "x", 1e300, "nan"]
        for value in values:
            refused(run(f"--{f.name}={value}"), f"--{f.name}")
    assert not list(Path().rglob("*"))


def test_an_empty_word_is_refused_by_every_flag(script, runner):
    run = runner(script)
    for f in fields(script.Config):
        if f.type is str:
            refused(run(f"--{f.name}", ""), f"--{f.name} '' is empty")
    assert not list(Path().rglob("*"))


def test_the_help_fits_two_screens(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    lines = capsys.readouterr().out.splitlines()
    assert 40 < len(lines) <= 100 and max(map(len, lines)) <= 100


# ---------------------------------------- where the code lies

def test_a_link_to_a_script_finds_the_shipped_models(script, tmp_path):
    link = tmp_path / "linked.py"
    link.symlink_to(ROOT / f"{script.__name__}.py")
    spec = importlib.util.spec_from_file_location("linked", link)
    linked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked)
    assert linked.SHIPPED == script.SHIPPED and linked.SHIPPED.exists()


def test_the_scripts_work_in_a_package_beside_another_common(tmp_path):
    (tmp_path / "package").mkdir()
    for name in ("common", *TINY):
        shutil.copy(ROOT / f"{name}.py", tmp_path / "package")
    (tmp_path / "common.py").write_text("mine = True\n")
    code = f"""
import importlib
import common
for name in {list(TINY)}:
    script = importlib.import_module("package." + name)
    assert script.common.__name__ == "package.common" and script.Fault is script.common.Fault
assert common.mine
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------- the code

# They may use float64: what they take is on the CPU.
ON_CPU = {"own_features", "frechet", "karras_sigmas"}


class Watch(TorchDispatchMode):
    """Notes the function of ours in which float64 appears; MPS has none."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.dtype == torch.float64:
            frame = sys._getframe()
            while Path(frame.f_code.co_filename).parent != ROOT:
                frame = frame.f_back
            self.found.add(frame.f_code.co_name)
        return result


def test_a_run_has_float64_on_the_cpu_alone(script, runner):
    with Watch() as watch:
        assert runner(script)("--out_dir", "o")[0] == 0
    assert watch.found <= ON_CPU and (watch.found or script is flowmo)


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")], ids=lambda path: path.name)
def test_what_is_used_of_our_modules_is_there(path):
    ours = {m.__name__: m for m in (biflow, common, flowloss, flowmo, motionprompt)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = ours.get(node.value.id)
            assert module is None or hasattr(module, node.attr), (node.lineno, node.attr)
