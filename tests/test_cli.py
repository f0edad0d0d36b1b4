"""biflow.py as it is run: end to end, interrupted, resumed, evaluated again, and given bad input."""
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import biflow
import common
from conftest import TINY

ROOT = Path(__file__).parents[1]
FILES = {"config.json", "log.csv", "ckpt.pt", "samples.gif", "sheet.png", "curves.png", "results.json"}
KEYS = {"method", "joint", "eps", "solver", "nfe", "features", "fvd", "fvd_first", "fvd_last", "slope", "floor",
        "ms_per_frame", "iters", "params"}
rendered, open_run = cache(common.render), common.open_run


@pytest.fixture
def run(runner, monkeypatch):
    monkeypatch.setattr(common, "render", rendered)
    return runner(biflow)


def refused(result, *says):
    """Exit status 2 and one clear line."""
    status, _, err = result
    lines = [line for line in err.split("\n") if line.strip("\r ")]
    assert status == 2 and len(lines) == 1, err
    assert lines[0].split("\r")[-1].startswith("error: ") and all(s in err for s in says), err
    assert "Traceback" not in err


def content(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(out):
    state = torch.load(out / "ckpt.pt", weights_only=True)
    found = {(part, m, k): v for part in ("nets", "averages") for m, d in state[part].items() for k, v in d.items()}
    moments = {(m, i, k): v for m, d in state["opts"].items() for i, s in d["state"].items() for k, v in s.items()}
    return found | moments


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def numbers(out):
    """results.json but for what a clock measures or the command line says."""
    results = json.loads((out / "results.json").read_text())
    rows = [{k: v for k, v in r.items() if k != "ms_per_frame"} for r in results.pop("rows")]
    return {k: v for k, v in results.items() if k not in ("wall_s", "command")}, rows


def interrupt_at(monkeypatch, step):
    """A Ctrl-C while the losses of that step are computed."""
    losses, calls = biflow.losses, []

    def interrupted(method, *args):
        calls.append(method)
        if calls.count("flow") == step and method == "flow":
            signal.raise_signal(signal.SIGINT)
        return losses(method, *args)
    monkeypatch.setattr(biflow, "losses", interrupted)


# ---------------------------------------------------------------------------------------------- end to end

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run as a user would start it, from an empty folder: (folder, completed process)."""
    cwd = tmp_path_factory.mktemp("user")
    command = [sys.executable, str(ROOT / "biflow.py"), "--dataset", "sky", *TINY["biflow"]]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_a_run_writes_what_it_says_and_prints_the_tables(finished):
    cwd, done = finished
    out = cwd / "out" / "biflow-sky-procedural"
    assert {p.name for p in out.iterdir()} == FILES and [p.name for p in cwd.iterdir()] == ["out"]
    assert "PROCEDURAL" in done.stdout and "Traceback" not in done.stderr and "Warning" not in done.stderr
    for text in ("Tab. 1", "Tab. 2", "BI-FLOW eps 0.2", "CONDIFF", "FLOW", *FILES, str(out.relative_to(cwd))):
        assert text in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert {"script", "command", "preset", "seed", "device", "torch", "wall_s", "dataset", "rows"} <= results.keys()
    assert results["command"].startswith("biflow.py --dataset sky") and results["preset"] == "tiny"
    assert results["dataset"] == dict(name="sky", source="procedural", clips=[8, 256], size=16)
    rows = results["rows"]
    assert [r["method"] for r in rows[:6]] == ["FLOW", "CONDIFF", "BI-FLOW eps 0", "BI-FLOW eps 0.2", "FLOW", "CONDIFF"]
    assert [r["solver"] for r in rows] == 4 * ["heun"] + 3 * ["euler"]
    assert len(rows) == 7 and rows[6]["method"] in (rows[2]["method"], rows[3]["method"])
    for r in rows:
        assert KEYS <= r.keys() and r["features"] == "own" and r["iters"] == 6
        assert all(abs(r[k]) < 1e9 for k in ("fvd", "fvd_first", "fvd_last", "slope", "floor"))  # finite numbers
        assert r["ms_per_frame"] > 0 and (r["joint"] is not None) == r["method"].startswith("BI")
        assert r["nfe"] == 4 if r["solver"] == "euler" else r["nfe"] >= 3
    log = (out / "log.csv").read_text().splitlines()
    assert log[0] == "step,flow,condiff,biflow_v,biflow_n,seconds" and log[-1].startswith("6,")
    assert json.loads((out / "config.json").read_text())["width"] == 8
    for name in ("samples.gif", "sheet.png", "curves.png"):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 50 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_a_second_run_into_the_folder_and_one_at_the_same_time_are_refused_and_change_nothing(finished, run, tmp_path):
    out = shutil.copytree(finished[0] / "out" / "biflow-sky-procedural", tmp_path / "o")
    before = content(out)
    refused(run("--out_dir", out), "holds an earlier run", "--resume", "--eval_only", "--out_dir")
    _, lock = open_run("biflow", biflow.Config(out_dir=str(out), eval_only=True), "procedural")  # another, going on
    try:
        refused(run("--out_dir", out, "--resume"), "in use by another run")
    finally:
        os.close(lock)
    assert content(out) == before


def test_eval_only_repeats_the_numbers(finished, run, tmp_path):
    out = shutil.copytree(finished[0] / "out" / "biflow-sky-procedural", tmp_path / "o")
    before, kept = numbers(out), {k: v for k, v in content(out).items() if k in ("ckpt.pt", "config.json", "log.csv")}
    assert run("--out_dir", out, "--eval_only")[0] == 0  # how many iterations there were the checkpoint knows
    assert numbers(out) == before and kept.items() <= content(out).items()


def test_ctrl_c_saves_and_resume_equals_an_uninterrupted_run_bit_for_bit_even_after_a_kill_during_saving(
        finished, run, tmp_path, monkeypatch):
    whole = finished[0] / "out" / "biflow-sky-procedural"
    with monkeypatch.context() as m:
        interrupt_at(m, step=4)
        status, _, err = run("--out_dir", "o", "--iters", 6)
    out = tmp_path / "o"
    assert status == 130 and "interrupted" in err and "Traceback" not in err
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 4 and not (out / "results.json").exists()
    before = content(out)
    die = ("import os, signal, sys, torch; sys.path.insert(0, sys.argv.pop(1)); import biflow, common\n"
           "def save(state, path):\n    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
           "torch.save = save; common.run(biflow.main)")
    killed = subprocess.run([sys.executable, "-c", die, str(ROOT), *TINY["biflow"], "--out_dir", "o",
                             "--resume"],
                            capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL and before.items() <= content(out).items()
    assert run("--out_dir", "o", "--iters", 6, "--resume")[0] == 0
    assert same_weights(out, whole) and numbers(out) == numbers(whole)
    assert {p.name for p in out.iterdir()} == FILES  # the half-written file of the killed run is gone too


def test_a_loss_that_is_not_finite_stops_with_its_step_before_the_checkpoint_is_overwritten(run, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        interrupt_at(m, step=2)
        assert run("--out_dir", "o", "--iters", 9)[0] == 130
    before, flow_loss, calls = content(tmp_path / "o"), biflow.flow_loss, []

    def breaks(*args):
        calls.append(0)
        return flow_loss(*args) * (float("nan") if len(calls) == 3 else 1)
    monkeypatch.setattr(biflow, "flow_loss", breaks)
    status, _, err = run("--out_dir", "o", "--iters", 9, "--resume")
    assert status == 2 and re.search(r"error: the loss flow is not finite at step 5; .*ckpt\.pt", err)
    assert content(tmp_path / "o") == before


@pytest.mark.parametrize("layout", ["folders", "gif"])
def test_real_clips_run_without_a_flag_but_data_dir(run, tmp_path, layout):
    for k in range(5):
        frames = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in rendered("sky", "train", 8, 16, 32, 0).frames(k)]
        if layout == "gif":
            (tmp_path / "mine" / "sky").mkdir(parents=True, exist_ok=True)
            frames[0].save(tmp_path / "mine" / "sky" / f"{k}.gif", save_all=True, append_images=frames[1:])
        else:
            (folder := tmp_path / "mine" / "sky" / f"c{k}").mkdir(parents=True)
            for i, frame in enumerate(frames):
                frame.save(folder / f"{i}.jpg")
    status, stdout, err = run(*"--data_dir mine --iters 1 --methods biflow --eps 0.1 --device auto".split())
    results = json.loads((tmp_path / "out" / "biflow-sky" / "results.json").read_text())
    assert status == 0 and "PROCEDURAL" not in stdout and "warning" not in err
    assert results["device"].split(":")[0] == common.pick_device("auto").type  # the one it ran on
    assert results["dataset"] == dict(name="sky", source="real", clips=[4, 1], size=16)


# ---------------------------------------------------------------------------------------------- bad input

@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, but what I3D is handed around in
@pytest.mark.parametrize("flags, says", [
    ("--dataset nonsense", "--dataset nonsense: no clips found: looked in data/nonsense"),
    ("--dataset biking", "--dataset biking: no clips found: looked in data/biking, data/mountain_biking"),
    ("--data_dir elsewhere", "--dataset sky: no clips found: looked in elsewhere/sky, elsewhere/sky_timelapse"),
    ("--preset huge", "--preset huge: unknown; choose one of tiny, small, paper"),
    ("--joint three", "--joint three: unknown; choose one of one, two"),
    ("--wind strong", "--wind strong: unknown; choose one of known, unknown"),
    ("--methods flow,magic", "'magic' is unknown; choose from flow,condiff,biflow"), ("--methods ", "is unknown"),
    ("--size 18 --mults 1,2", "--size 18: must be 8 or a larger multiple of 4"),
    *[(f"--{f} {v}", f"--{f}") for f, v in (
        ("iters", -1), ("batch", 0), ("batch", "x"), ("size", 0), ("size", 10**9), ("seed", -1), ("width", 0),
        ("blocks", 0), ("patch", 0), ("lr", "nan"), ("lr", -1), ("lr", "inf"), ("lr_end", 2), ("ema", 1), ("clips", 0),
        ("streams", 1), ("frames", 31), ("tol", 0), ("tol", "nan"), ("step", 0), ("step", -0.1), ("eps", -0.1),
        ("eps", "nan"), ("eps", ""), ("eps", "0.1,x"), ("eps", 1e9), ("mults", "a"), ("mults", 0), ("mults", "1,0"),
        ("device", "nonsense"))],
    ("--unknown 1", "--unknown"),
    ("--features nothing.pt", "--features nothing.pt: neither own, r3d_18 nor a TorchScript file"),
    ("--resume", "nothing to continue"), ("--eval_only", "nothing to continue"),
    ("--out_dir file/below", "cannot write to file/below"),
])
def test_bad_input_is_one_clear_line_and_exit_status_2(run, tmp_path, flags, says):
    (tmp_path / "file").write_text("not a folder")
    name, _, value = flags.partition(" ")
    refused(run("--iters", 1, *(flags.split() if value else [f"{name}=" if flags.endswith(" ") else name])), says)
    assert not list(tmp_path.rglob("ckpt.pt")) and (tmp_path / "file").read_text() == "not a folder"


def test_too_short_or_too_few_real_clips_are_refused_before_training(run, tmp_path):
    for k in range(4):
        (folder := tmp_path / "mine" / "sky" / f"c{k}").mkdir(parents=True)
        for i in range(5):  # enough to train on, not to evaluate
            Image.new("RGB", (16, 16), (50 * i,) * 3).save(folder / f"{i}.png")
    refused(run("--data_dir", "mine", "--iters", 1), "real clips of at least 8 frames")
    assert not list(tmp_path.rglob("ckpt.pt"))
    (tmp_path / "empty" / "sky").mkdir(parents=True)
    refused(run("--data_dir", "empty"), "no usable train clips in empty/sky")


def test_a_checkpoint_of_another_config_or_a_corrupt_one_is_refused_and_left_alone(finished, run, tmp_path):
    out = shutil.copytree(finished[0] / "out" / "biflow-sky-procedural", tmp_path / "o")
    before = content(out)
    for flags, says in (("--eval_only --width 16", "trained with --width 8, this run has 16"),
                        ("--resume --iters 7", "trained with --iters 6, this run has 7"),
                        ("--eval_only --joint one", "trained with --joint two, this run has one"),
                        ("--resume --iters 6 --seed 1", "trained with --seed 0, this run has 1")):
        refused(run("--out_dir", out, *flags.split()), says)
    assert content(out) == before
    (out / "ckpt.pt").write_bytes(before["ckpt.pt"][:5000])
    for flag in ("--eval_only", "--resume"):
        refused(run("--out_dir", out, flag, "--iters", 6), "ckpt.pt is not a readable checkpoint")
    assert content(out) == before | {"ckpt.pt": before["ckpt.pt"][:5000]}


def test_the_readme_shows_pictures_that_are_there_and_flags_that_exist():
    readme = (ROOT / "README.md").read_text()
    shown, kept = set(re.findall(r"\]\((assets/[^)]+)\)", readme)), list((ROOT / "assets").iterdir())
    assert shown == {f"assets/{p.name}" for p in kept} and sum(p.stat().st_size for p in kept) < 4e6
    flags = r"((?: --\w+(?: [^\s#`-][^\s#`]*)?)*)"
    commands = re.findall(rf"python (biflow|flowloss|flowmo|motionprompt)\.py{flags}", readme)
    assert {script for script, _ in commands} == {"biflow", "flowloss", "flowmo", "motionprompt"}
    for script, flags in commands:
        known = {f.name for f in dataclasses.fields(importlib.import_module(script).Config)} | {"help"}
        assert set(re.findall(r"--(\w+)", flags)) <= known, (script, flags)
