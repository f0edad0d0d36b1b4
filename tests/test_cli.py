"""biflow.py as it is run: end to end, interrupted, resumed, evaluated again, with bad input."""
import contextlib
import dataclasses
import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import biflow
import common
from conftest import ROOT, TINY, content, refused, rendered, same_weights

FILES = {"config.json", "log.csv", "ckpt.pt", "samples.gif", "sheet.png", "results.json"}
KEYS = {"method", "solver", "eps", "evaluations", "distance", "first_window", "last_window", "slope",
        "floor", "curve", "ms_per_frame", "samples", "real_samples", "floor_samples", "params",
        "failed"}


@pytest.fixture
def run(runner):
    return runner(biflow)


@pytest.fixture
def whole(finished):
    """The folder of a run that nothing disturbed; to be read only."""
    return finished("biflow")[0] / "out" / "biflow-sky-procedural"


@pytest.fixture
def out(whole, tmp_path):
    """A copy of that folder, 'o' in the empty folder in which `run` runs."""
    return shutil.copytree(whole, tmp_path / "o")


def results_of(out):
    return json.loads((out / "results.json").read_text())


def numbers(out):
    """Tab. 1, but for what a clock measures."""
    rows = results_of(out)["rows"]
    for row in rows:
        row.pop("ms_per_frame", None)  # a row that failed has none
    return rows


def at_step(monkeypatch, step, happens):
    """happens(loss) takes the place of FLOW's loss in the step-th step from here on."""
    flow_loss, calls = biflow.flow_loss, []

    def loss(*args):
        calls.append(step)
        found = flow_loss(*args)
        return happens(found) if len(calls) == step else found

    monkeypatch.setattr(biflow, "flow_loss", loss)


def interrupted(run, step, times=1):
    """A run into 'o' that gets a Ctrl-C in this step; a second one stops it before it can save."""
    def ctrl_c(loss):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return loss

    with pytest.MonkeyPatch.context() as m:
        at_step(m, step, ctrl_c)
        return run("--out_dir", "o")


def train_on(run):
    """--resume of the run in 'o', stopped when it has been trained."""
    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(biflow, "evaluate", stopped)
        assert run("--out_dir", "o", "--resume", tiny=False)[0] == 130


# ---------------------------------------- end to end

def test_a_run_writes_its_files_and_nothing_else(finished, whole):
    cwd, _ = finished("biflow")
    assert {p.name for p in whole.iterdir()} == FILES
    assert [p.name for p in cwd.iterdir()] == ["out"]


def test_a_run_prints_its_tables_and_names_its_files(finished):
    text = finished("biflow")[1].stdout
    for part in ("PROCEDURAL", "Tab. 1", "BI-FLOW eps 0.2", "CONDIFF", "FLOW", "reported",
                 "out/biflow-sky-procedural", *FILES):
        assert part in text


def test_a_run_warns_of_nothing(finished):
    err = finished("biflow")[1].stderr
    assert "Warning" not in err and "Traceback" not in err


def test_the_results_say_what_was_run(whole):
    results = results_of(whole)
    assert results["script"] == "biflow" and results["command"].startswith("biflow.py --device cpu")
    assert (results["preset"], results["seed"], results["device"]) == ("tiny", 0, "cpu")
    assert results["torch"] == torch.__version__ and results["wall_s"] > 0
    assert results["dataset"] == dict(name="sky", source="procedural", clips=[8, 256])
    assert results["iters"] == 6 and results["reported_eps"] in (0, 0.2)


def test_every_method_is_measured(whole):
    rows = results_of(whole)["rows"]
    names = [row["method"] for row in rows]
    assert names == ["FLOW", "CONDIFF", "BI-FLOW eps 0", "BI-FLOW eps 0.2"]
    for row in rows:
        assert row.keys() == KEYS
        assert row["evaluations"] >= 3 and row["failed"] is None
        assert 0 <= row["distance"] < 1e9 and row["ms_per_frame"] > 0 and row["floor"] > 0
        assert row["slope"] is None and len(row["curve"]) == 1  # 34 frames have one window
        assert (row["samples"], row["real_samples"], row["floor_samples"]) == (8, 1024, 8)


def test_the_reported_noise_level_is_that_of_the_lowest_distance(whole):
    results = results_of(whole)
    best = min(results["rows"][2:4], key=lambda row: row["distance"])
    assert results["reported_eps"] == best["eps"]


def test_the_log_has_every_loss(whole):
    log = (whole / "log.csv").read_text().splitlines()
    assert log[0] == "step,flow,seconds,condiff,biflow_v,biflow_n"
    assert len(log) == 4 and log[-1].startswith("6,,")  # a row a method: others' cells are empty


@pytest.mark.parametrize("name", ["samples.gif", "sheet.png"])
def test_the_pictures_show_something(whole, name):
    with Image.open(whole / name) as image:
        assert min(image.size) > 50 and len(image.convert("RGB").getcolors(1 << 20)) > 20


# ---------------------------------------- a folder that holds a run

def test_eval_only_needs_no_other_flag_and_repeats_the_numbers(run, out, tmp_path):
    (tmp_path / "out").mkdir()
    out = out.rename(tmp_path / "out" / "biflow-sky-procedural")
    before = numbers(out)
    kept = {name: content(out)[name] for name in ("ckpt.pt", "config.json", "log.csv")}
    (out / "results.json").unlink()
    assert run("--eval_only", tiny=False)[0] == 0
    assert numbers(out) == before and kept.items() <= content(out).items()


def test_eval_only_may_sample_more(run, out):
    assert run("--out_dir", "o", "--eval_only", "--streams", 3, "--eps", 0.3, tiny=False)[0] == 0
    rows = results_of(out)["rows"]
    assert [row["samples"] for row in rows] == 3 * [12] and rows[2]["method"] == "BI-FLOW eps 0.3"


def test_eval_only_wants_a_training_that_came_to_its_end(run, out):
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    saved["steps"]["condiff"] = 4
    torch.save(saved, out / "ckpt.pt")
    says = "ckpt.pt has 4 of 6 steps of condiff"
    refused(run("--out_dir", "o", "--eval_only", tiny=False), says)


@pytest.mark.parametrize("flags, had", [
    ("--eval_only --seed 1", 0), ("--eval_only --width 16", 8), ("--resume --iters 7", 6)])
def test_what_was_trained_cannot_be_changed(run, out, flags, had):
    before = content(out)
    _, flag, value = flags.split()
    refused(run("--out_dir", "o", *flags.split(), tiny=False),
            f"{flag} {value}: the run in o was trained with {had}")
    assert content(out) == before


# ---------------------------------------- stopped

def test_ctrl_c_saves_and_ends_in_one_line(run, tmp_path):
    status, _, err = interrupted(run, 4)
    assert status == 130 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted; ") and "--resume" in err
    assert torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)["steps"] == {"flow": 4}
    assert content(tmp_path / "o").keys() == {"config.json", "log.csv", "ckpt.pt"}


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_last_regular_save(run, tmp_path, monkeypatch):
    monkeypatch.setattr(biflow, "SAVE_EVERY", 2)
    assert interrupted(run, 5, times=2)[0] == 130
    assert torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)["steps"] == {"flow": 4}


def test_resumed_it_ends_as_if_nothing_had_been(run, whole, tmp_path):
    assert interrupted(run, 4)[0] == 130
    assert run("--out_dir", "o", "--resume", tiny=False)[0] == 0
    assert same_weights(tmp_path / "o", whole) and numbers(tmp_path / "o") == numbers(whole)
    assert content(tmp_path / "o").keys() == FILES


def test_resumed_before_the_first_save_it_starts_again(run, whole, tmp_path):
    assert interrupted(run, 1, times=2)[0] == 130
    assert content(tmp_path / "o").keys() == {"config.json"}
    tqdm._instances.clear()  # the bar of the run that was cut off
    refused(run("--out_dir", "o", "--eval_only", tiny=False), "ckpt.pt is not there", "--resume")
    train_on(run)
    assert same_weights(tmp_path / "o", whole)


def test_killed_while_it_saves_it_keeps_the_save_before(run, whole, tmp_path):
    assert interrupted(run, 3)[0] == 130
    before = content(tmp_path / "o")
    dies = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv.pop(1))
import biflow, common
def save(state, path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
common.run(biflow.main)
"""
    command = [sys.executable, "-c", dies, str(ROOT), "--out_dir", "o", "--resume"]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert content(tmp_path / "o") == before | {".ckpt.pt.part": b"half"}
    train_on(run)
    assert same_weights(tmp_path / "o", whole) and ".ckpt.pt.part" not in content(tmp_path / "o")


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint_is_overwritten(
        run, tmp_path, monkeypatch):
    assert interrupted(run, 3)[0] == 130
    before = content(tmp_path / "o")
    at_step(monkeypatch, 2, lambda loss: loss * float("nan"))
    status, _, err = run("--out_dir", "o", "--resume", tiny=False)
    assert status == 2 and "error: the loss flow is not finite, of 3 steps to 6; " in err
    assert content(tmp_path / "o") == before


def test_a_solver_that_breaks_down_fails_its_row_alone_and_says_so(run, whole, out, monkeypatch):
    solve = biflow.condiff_step

    def breaks(*_):
        raise FloatingPointError("the solver broke down after 2001 evaluations: train longer")

    monkeypatch.setattr(biflow, "condiff_step", breaks)
    status, text, _ = run("--out_dir", "o", "--eval_only", tiny=False)
    assert status == 0 and "\nCONDIFF: the solver broke down after 2001 evaluations" in text
    before = numbers(whole)
    after = numbers(out)
    assert after[0] == before[0] and after[2:] == before[2:]
    assert after[1]["failed"].startswith("the solver broke down") and "distance" not in after[1]
    monkeypatch.setattr(biflow, "condiff_step", solve)
    monkeypatch.setattr(biflow, "biflow_step", breaks)
    assert run("--out_dir", "o", "--eval_only", tiny=False)[0] == 0
    assert results_of(out)["reported_eps"] is None


# ---------------------------------------- methods

def test_one_method_alone_learns_what_it_learns_among_others_and_others_are_added(
        run, whole, tmp_path):
    assert run("--out_dir", "o", "--methods", "biflow")[0] == 0
    names = [row["method"] for row in results_of(tmp_path / "o")["rows"]]
    assert names == ["BI-FLOW eps 0", "BI-FLOW eps 0.2"]
    assert interrupted_while_adding(run, "condiff") == 130
    assert run("--out_dir", "o", "--resume", "--methods", "flow", tiny=False)[0] == 0
    assert numbers(tmp_path / "o") == numbers(whole)
    ours = torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)
    theirs = torch.load(whole / "ckpt.pt", weights_only=True)
    assert ours["steps"] == theirs["steps"] == {"flow": 6, "condiff": 6, "biflow": 6}
    for kind in ("nets", "averages"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert all(torch.equal(value, theirs[kind][key]) for key, value in ours[kind].items())


def interrupted_while_adding(run, method):
    """--resume of 'o' with one method more, with a Ctrl-C in its third step."""
    loss = biflow.condiff_loss
    calls = []

    def ctrl_c(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(biflow, "condiff_loss", ctrl_c)
        return run("--out_dir", "o", "--resume", "--methods", method, tiny=False)[0]


@pytest.mark.parametrize("methods", ["flow,flow", "Flow", "flow;biflow", "flow,"])
def test_methods_that_are_none_are_refused(run, methods):
    refused(run("--methods", methods), f"--methods {methods}", "flow, condiff, biflow")


# ---------------------------------------- real clips

def write_clips(folder, count, frames):
    for k in range(count):
        (folder / f"c{k}").mkdir(parents=True)
        for t, frame in enumerate(rendered("sky", "train", 8, 16, 60, 0).frames(k, 0, frames)):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            image.save(folder / f"c{k}" / f"{t}.png")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder with data/sky and a run on it, out/biflow-sky, to be copied; and what it printed."""
    cwd = tmp_path_factory.mktemp("real")
    write_clips(cwd / "data" / "sky", 5, 60)
    text = io.StringIO()
    warned = io.StringIO()
    with (pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(text),
          contextlib.redirect_stderr(warned)):
        m.chdir(cwd)
        # With seed 2 the clip to be shown starts at its frame 17 of 60.
        m.setattr(sys, "argv", ["biflow.py", *TINY["biflow"], "--iters", "1", "--seed", "2"])
        common.run(biflow.main)
    return cwd, text.getvalue(), warned.getvalue()


@pytest.fixture
def here(told, tmp_path):
    """A copy of that folder, in which `run` runs."""
    return shutil.copytree(told[0], tmp_path, dirs_exist_ok=True)


def test_real_clips_are_found_and_the_results_say_so(told):
    found = results_of(told[0] / "out" / "biflow-sky")["dataset"]
    assert found == dict(name="sky", source="real", clips=[4, 1]) and "PROCEDURAL" not in told[1]


def test_few_real_clips_are_warned_of(told):
    assert "warning: 8 clips are compared with 7 real ones" in told[2]


def test_a_long_real_clip_is_shown_as_long_as_the_streams(told):
    assert len(pages_of(told[0] / "out" / "biflow-sky" / "samples.gif")) == 17  # every other frame


def test_a_run_goes_on_from_elsewhere_with_its_clips_moved(run, here, monkeypatch):
    before = numbers(here / "out" / "biflow-sky")
    (here / "data").rename(here / "moved")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    flags = ["--out_dir", "../out/biflow-sky", "--data_dir", "../moved"]
    assert run("--resume", *flags, tiny=False)[0] == 0
    assert numbers(here / "out" / "biflow-sky") == before


def test_a_run_on_real_clips_does_not_go_on_with_others(run, here):
    Image.new("RGB", (16, 16), "red").save(here / "data" / "sky" / "c0" / "5.png")
    before = content(here)
    refused(run("--resume", tiny=False), "out/biflow-sky was trained on other clips")
    assert content(here) == before


def test_a_run_on_real_clips_that_are_not_where_it_is_told_does_not_go_on(run, here):
    before = content(here)
    refused(run("--resume", "--data_dir", "nowhere", tiny=False), "looked in nowhere/sky")
    assert content(here) == before


@pytest.mark.parametrize("train, test", [(5, 5), (40, 5), (5, 40)])
def test_clips_too_short_to_measure_a_distance_are_refused_before_training(
        run, tmp_path, train, test):
    write_clips(tmp_path / "data" / "sky" / "train", 3, train)
    write_clips(tmp_path / "data" / "sky" / "test", 3, test)
    refused(run(), "takes two real clips of 8 frames")
    assert not (tmp_path / "out").exists()


# ---------------------------------------- your own picture

def picture(path, size=(33, 70), mode="RGB"):
    """A picture of one colour, but for what is beyond its centred square."""
    image = Image.new("RGB", size, "blue")
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((200, 120, 40), (left, top, left + side, top + side))
    image.convert(mode).save(path)


def pages_of(path):
    """The pages of a gif, each as often as it is shown for 80 ms."""
    pages = []
    with Image.open(path) as image:
        for k in range(image.n_frames):
            image.seek(k)
            pages += [image.convert("RGB")] * round(image.info["duration"] / 80)
    return pages


def starts_with_the_picture(page, x):
    colour = np.array(page.getpixel((x, 16 + 96)))
    return abs(colour - (200, 120, 40)).max() < 25  # a gif has few colours


@pytest.mark.parametrize("name, size, mode", [
    ("a.png", (33, 70), "RGB"), ("a.jpg", (64, 48), "RGB"), ("b.png", (16, 16), "RGBA"),
    ("c.png", (7, 5), "P")])
def test_a_picture_is_continued_by_the_run_in_the_folder(run, out, name, size, mode):
    picture(name, size, mode)
    before = content(out)
    status, text, _ = run("--first", name, "--out_dir", "o", "--frames", 32, tiny=False)
    assert status == 0 and "o: sky, 6 steps" in text
    after = content(out)
    assert before.items() <= after.items() and after.keys() - before.keys() == {"biflow-first.gif"}
    pages = pages_of(out / "biflow-first.gif")
    assert len(pages) == 32
    for k in range(3):  # the methods, side by side
        assert starts_with_the_picture(pages[0], 2 + 194 * k + 96)


def test_without_a_run_the_shipped_model_continues_the_picture(run, out, monkeypatch):
    picture("a.png")
    torch.save(torch.load(out / "ckpt.pt", weights_only=True) | dict(eps=0.1), "shipped.pt")
    shutil.rmtree(out)
    monkeypatch.setattr(biflow, "SHIPPED", Path("shipped.pt"))
    status, text, _ = run("--first", "a.png", "--frames", 32, tiny=False)
    assert status == 0 and "shipped.pt: sky, 6 steps\n" in text
    assert len(pages_of("out/biflow-first.gif")) == 32


def test_a_picture_is_continued_to_the_tolerance_asked_for(run, out, monkeypatch):
    picture("a.png")
    solve, used = biflow.solve_heun, set()

    def noting(field, x, args=(), tol=0.01):
        used.add(tol)
        return solve(field, x, args, tol)

    monkeypatch.setattr(biflow, "solve_heun", noting)
    flags = "--first a.png --out_dir o --frames 32 --tol 0.3"
    assert run(*flags.split(), tiny=False)[0] == 0
    assert used == {0.3}


def test_a_picture_without_a_run_and_without_a_shipped_model_is_refused(run, tmp_path, monkeypatch):
    picture("a.png")
    monkeypatch.setattr(biflow, "SHIPPED", tmp_path / "nowhere.pt")
    refused(run("--first", "a.png", tiny=False), "nowhere.pt is not there")


@pytest.mark.parametrize("flag", ["--out_dir", "--dataset"])
def test_a_run_that_is_named_and_not_there_is_not_replaced_by_the_shipped_model(run, flag):
    picture("a.png")
    refused(run("--first", "a.png", flag, "nowhere", tiny=False), "--first: there is no run")
    assert content(Path()).keys() == {"a.png"}


# ---------------------------------------- bad input

@pytest.mark.parametrize("flags, says", [
    ("--dataset nonsense", "--dataset nonsense: no clips found: looked in data/nonsense"),
    ("--data_dir elsewhere", "--dataset sky: no clips found: looked in elsewhere/sky"),
    ("--size 18 --mults 1,2", "--size 18: must be 8 or a larger multiple of 4"),
    ("--width 12", "--width 12: must be a multiple of 8"),
    ("--mults a", "--mults a: must be numbers between 0.25 and 8"),
    ("--eps 0.1,2", "--eps 0.1,2: must be numbers between 0 and 1"),
    ("--eps=", "--eps"),
    ("--joint one", "--joint"),
    ("--eval_only", "nothing to continue"),
    ("--out_dir file/below", "cannot write into file"),
])
def test_bad_input_is_one_clear_line_and_nothing_is_written(run, tmp_path, flags, says):
    (tmp_path / "file").write_text("not a folder")
    refused(run(*flags.split()), says)
    assert content(tmp_path) == {"file": b"not a folder"}


# ---------------------------------------- the README

def test_readme_and_results_show_all_pictures_that_are_there_and_no_others():
    shown = set(re.findall(r"!\[[^]]*\]\((assets/[^)]+)\)", (ROOT / "README.md").read_text()))
    results = (ROOT / "tests" / "RESULTS.md").read_text()
    shown |= set(re.findall(r"!\[[^]]*\]\(\.\./(assets/[^)]+)\)", results))
    pictures = [p for p in (ROOT / "assets").iterdir() if p.is_file()]
    assert shown == {f"assets/{p.name}" for p in pictures}
    assert sum(p.stat().st_size for p in pictures) < 4e6


def test_the_readme_calls_the_scripts_with_flags_that_exist():
    flags = r"((?: --\w+(?: [^\s#`-][^\s#`]*)?)*)"
    scripts = "biflow|flowloss|flowmo|motionprompt"
    commands = re.findall(rf"python ({scripts})\.py{flags}", (ROOT / "README.md").read_text())
    assert {script for script, _ in commands} == set(scripts.split("|"))
    for script, flags in commands:
        known = {f.name for f in dataclasses.fields(importlib.import_module(script).Config)}
        assert set(re.findall(r"--(\w+)", flags)) <= known | {"help"}, (script, flags)
