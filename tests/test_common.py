"""Worlds, batches, the command line and what a run writes."""
import csv
import errno
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Fault, opt
from conftest import content


@dataclass
class Small:
    dataset: str = opt("sky", "what")
    preset: str = opt("tiny", "one of two")
    size: int = opt(32, "pixels", 8, 64)
    lr: float = opt(0.1, "rate", 0, 1)
    kind: str = opt("a", "which")
    amp: bool = opt(False, "100 % faster")
    count: int = opt(4, "to sample", 1, 9, free=True)
    device: str = opt("auto", "where", free=True)
    resume: bool = opt(False, "go on", free=True)
    eval_only: bool = opt(False, "again", free=True)
    out_dir: str = opt("", "folder", free=True)
    data_dir: str = opt("", "clips", free=True)


def parse(flags="", presets={"tiny": {}, "small": dict(size=64, lr=0.2)}):
    return common.parse_args("a", Small, presets, "the doc", flags.split())


def says(text):
    """Expect a Fault of one line that has this text."""
    return pytest.raises(Fault, match=f"^(?!.*\\n).*{text}")


# ---------------------------------------- worlds

@pytest.mark.parametrize("name", common.WORLDS)
def test_a_world_is_a_function_of_seed_split_and_index(name):
    a, b = (common.render(name, "train", 2, 16, 8, 5).cache for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    clips = list(a)
    for seed, split in ((5, "test"), (6, "train")):
        clips += common.render(name, split, 2, 16, 8, seed).cache
    assert len({clip.numpy().tobytes() for clip in clips}) == len(clips) == 6


@pytest.mark.parametrize("name", common.WORLDS)
def test_a_world_moves_and_shows_something(name):
    for clip in common.render(name, "train", 4, 16, 40, 0).cache:
        assert clip.shape == (40, 3, 16, 16) and clip.dtype == torch.uint8
        moves = (clip[1:] != clip[:-1]).flatten(1).any(1).all()
        assert moves or name == "shapes"  # which may rest
        assert clip.float().std() > 15


PINNED = {  # so that results of other days stay comparable
    ("sky", 16): ["0fc555cab39bacdc", "29d6ee8e18cf5628"],
    ("sky", 32): ["9906a441ae811ccd", "c28a784923a1d739"],
    ("shapes", 16): ["44e55072f666576c", "c25aeaf46864b13d"],
    ("shapes", 32): ["2981d8ceeab84b46", "23b374d49cbe4dce"],
    ("robot", 16): ["c9c850e68dbf1832", "e89a09653617e8ca"],
    ("robot", 32): ["ab55c47d7aa14ba0", "ae9cfbc8b4ffc237"],
    ("sprites", 16): ["5821cea2ed795bdf", "b3ea2c1bea8cca70"],
    ("sprites", 32): ["796d31cb7ecfbf12", "4737d12ef859cfd9"],
}


@pytest.mark.parametrize("name, size", PINNED)
def test_a_world_shows_the_same_bytes_as_ever(name, size):
    found = []
    for split, seed in (("train", 0), ("test", 3)):
        video = torch.stack(common.render(name, split, 3, size, 12, seed).cache)
        found.append(hashlib.sha256(video.numpy().tobytes()).hexdigest()[:16])
    assert found == PINNED[name, size]


# ---------------------------------------- batches

def numbered(*lengths):
    """Clips of which frame i of clip k is grey 10 k + i."""
    cache = []
    for k, n in enumerate(lengths):
        levels = torch.arange(10 * k, 10 * k + n, dtype=torch.uint8)
        cache.append(levels.view(-1, 1, 1, 1).expand(-1, 3, 2, 2))
    return common.Clips(list(lengths), 2, cache)


def test_batches_are_a_function_of_seed_and_step():
    a, b, other = (common.Batches(numbered(3, 2, 6), 16, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(a[7], b[7])
    assert not torch.equal(a[7], a[8]) and not torch.equal(a[7], other[7])


def test_batches_are_drawn_evenly_and_never_cross_clips():
    batches = common.Batches(numbered(3, 2, 6), 16, 2, 0)
    pairs = torch.cat([batches[i] for i in range(200)])[:, :, 0, 0, 0].tolist()  # 3200
    assert {tuple(p) for p in pairs} == {
        (0, 1), (1, 2), (10, 11), (20, 21), (21, 22), (22, 23), (23, 24), (24, 25)}
    for pair in ([0, 1], [10, 11], [24, 25]):
        assert 340 < pairs.count(pair) < 460  # 400, sigma 19


CPU = torch.device("cpu")


def test_prefetched_draws_come_in_order_and_are_those_of_their_step():
    def draw(step):
        time.sleep(0.01 if step % 3 == 0 else 0)  # late, so that others overtake it
        return torch.full((2,), step), torch.rand(3, generator=common.make_rng(0, 1, step))

    found = list(common.prefetched(draw, 5, 30, CPU))
    assert [step for step, _ in found] == list(range(6, 31))
    for step, (number, noise) in found:
        assert number.tolist() == [step, step] and torch.equal(noise, draw(step)[1])


def counting(asked, bad=None):
    """A draw that notes its steps; the one numbered `bad` cannot be read."""
    def draw(step):
        asked.append(step)
        if step == bad:
            raise Fault("clip c7 cannot be read any more")
        return [torch.tensor(step)]

    return draw


def test_a_fault_in_a_thread_reaches_the_caller_after_the_draws_before():
    got = []
    with says("clip c7 cannot be read"):
        for step, _ in common.prefetched(counting([], bad=4), 0, 100, CPU):
            got.append(step)
    assert got == [1, 2, 3]


def test_prefetched_is_only_a_few_draws_ahead_and_ends_where_it_is_told():
    asked = []
    found = common.prefetched(counting(asked), 0, 10**6, CPU)
    assert next(found)[0] == 1 and next(found)[0] == 2
    found.close()
    assert len(asked) < 20
    asked.clear()
    assert [step for step, _ in common.prefetched(counting(asked), 3, 5, CPU)] == [4, 5]
    assert asked == [4, 5] and list(common.prefetched(counting(asked), 5, 5, CPU)) == []


def test_the_average_of_weights_is_that_of_a_plain_loop_and_soon_forgets_its_start():
    weight = torch.nn.Parameter(torch.zeros(3))
    module = torch.nn.ParameterList([weight])
    average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=common.ema_decay(0.9))
    want = 0.0
    for n in range(200):
        weight.data.fill_(n)
        average.update_parameters(module)
        decay = min(0.9, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * n if n else 0.0  # the first is a copy
        assert average.module[0].tolist() == pytest.approx([want] * 3, rel=1e-4)
        if n == 20:
            assert want > 0.65 * n  # without the ramp: 0.55


def test_a_set_that_is_nowhere_is_replaced_by_a_world_that_says_so_loudly(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, test, source = common.load_clips("sky", "", 8, (3, 2), 4, 0)
    assert (source, len(train), len(test), train.lengths) == ("procedural", 3, 2, [4, 4, 4])
    assert "PROCEDURAL" in capsys.readouterr().out


@pytest.mark.parametrize("dataset, data_dir, looked", [
    ("sky", "nowhere", "nowhere/sky, nowhere/sky_timelapse"),
    ("biking", "", "data/mountain_biking"),
    ("unknown", "", "data/unknown")])
def test_a_set_that_is_nowhere_and_has_no_world_or_was_named_is_a_fault(
        tmp_path, monkeypatch, dataset, data_dir, looked):
    monkeypatch.chdir(tmp_path)
    with says(f"--dataset {dataset}: no clips found: looked in .*{looked}"):
        common.load_clips(dataset, data_dir, 8, (2, 2), 4, 0)


def test_a_set_that_is_there_is_used_silently(tmp_path, capsys):
    (tmp_path / "sky_timelapse").mkdir()
    for k in range(2):
        video = np.random.default_rng(k).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
        np.save(tmp_path / "sky_timelapse" / f"{k}.npy", video)
    assert common.load_clips("sky", str(tmp_path), 8, (2, 2), 4, 0)[2] == "real"
    assert "PROCEDURAL" not in capsys.readouterr().out


def test_noise_differs_by_seed_by_use_and_by_step():
    keys = [(0, 0, 3), (0, 1, 3), (1, 0, 3), (2, 9, 3), (0, 0, 4), (2**31, 9, 10**6)]
    draws = {tuple(torch.randn(4, generator=common.make_rng(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_noise_is_the_same_for_the_same_key():
    a, b = (torch.randn(4, generator=common.make_rng(5, 1, 2)) for _ in range(2))
    assert torch.equal(a, b)


# ---------------------------------------- the command line

@pytest.mark.parametrize("script", ["biflow", "flowloss", "flowmo", "motionprompt"])
def test_the_preset_is_tiny_on_every_device(monkeypatch, script):
    module = importlib.import_module(script)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        assert common.parse_args(script, module.Config, module.PRESETS, "", []).preset == "tiny"


def test_what_is_given_goes_over_the_preset_and_that_over_the_default():
    cfg = parse("--preset small --lr 0.3")
    assert (cfg.preset, cfg.size, cfg.lr, cfg.kind) == ("small", 64, 0.3, "a")


def test_a_switch_is_turned_on_and_off():
    presets = {"tiny": {}, "small": dict(amp=True)}
    assert parse("--preset tiny --amp", presets).amp and parse("--preset small", presets).amp
    assert not parse("--preset small --no-amp", presets).amp


@pytest.mark.parametrize("flags, text", [
    ("--preset big", "--preset big: unknown; choose one of tiny, small"),
    ("--size 7", "--size 7: must lie between 8 and 64"), ("--size 65", "--size 65: must lie"),
    ("--lr nan", "--lr nan: must lie"),
    ("--size x", "--size: invalid int.*--help lists every flag"),
    ("--nope 1", "--nope 1; --help lists every flag"), ("--siz 16", "--siz 16")])
def test_a_flag_that_is_unknown_or_out_of_its_range_is_a_fault(flags, text):
    with says(text):
        parse(flags)


def test_the_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for part in ("the doc", "pixels [32]", "100 % faster [False]", "to sample [4]"):
        assert part in text


def test_an_empty_flag_is_a_fault_and_not_one_that_was_left_out():
    for name in ("dataset", "preset", "kind", "device", "out_dir", "data_dir"):
        for value in ("", " ", "\t\u3000"):
            for flags in ([f"--{name}", value], ["--resume", f"--{name}={value}"]):
                with says(f"--{name} .* is empty"):
                    common.parse_args("a", Small, {"tiny": {}}, "", flags)


def test_a_tilde_is_the_home_folder_in_every_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cfg = parse("--out_dir ~/runs/a --data_dir ~ --dataset=~/clips --kind a~b")
    home = tmp_path / "home"
    assert cfg.out_dir == str(home / "runs" / "a") and cfg.data_dir == str(home)
    assert cfg.dataset == str(home / "clips") and cfg.kind == "a~b"
    assert common.open_run("a", cfg, numbered(3), numbered(3)) == home / "runs" / "a"
    assert parse("--resume --out_dir=~/runs/a").dataset == str(home / "clips")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("encoding, shown", [
    ("cp1252", b"\\u65e5\\u672c \xe9"), ("ascii", b"\\u65e5\\u672c \\xe9"),
    ("utf-8", "\u65e5\u672c \xe9".encode())])
def test_a_letter_that_a_terminal_lacks_is_escaped(monkeypatch, encoding, shown):
    def main():
        print("\u65e5\u672c \xe9")
        raise Fault("\u65e5\u672c \xe9")

    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as stop:
        common.run(main)
    printed = [sys.stdout, sys.stderr]
    monkeypatch.undo()
    for stream in printed:
        stream.flush()
    assert stop.value.code == 2
    assert printed[0].buffer.getvalue() == shown + b"\n"
    assert printed[1].buffer.getvalue() == b"error: " + shown + b"\n"


def test_a_list_of_numbers_is_checked_one_by_one():
    cfg = Small(kind="0,0.5,1")
    common.check_list(cfg, "kind", float, 0, 1)
    for kind in ("0,2", "0,x", "", "0,,1", "nan"):
        with says(f"--kind {kind}: must be numbers between 0 and 1"):
            common.check_list(Small(kind=kind), "kind", float, 0, 1)


@pytest.mark.parametrize("name", ["nonsense", "meta", "mps"])
def test_a_device_that_cannot_be_used_is_a_fault(name):
    with says(f"--device {name} cannot be used here .*try --device cpu") as fault:
        common.pick_device(name)
    assert len(str(fault.value)) < 500


def test_mps_is_taken_where_it_is_asked_for_alone_and_what_it_lacks_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    assert capsys.readouterr().err == "" and common.pick_device("mps").type == "mps"
    warning, = capsys.readouterr().err.splitlines()
    assert "never tried" in warning and "grid_sample" in warning and "ConvTranspose3d" in warning
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.pick_device("auto").type == "cuda" and capsys.readouterr().err == ""


# ---------------------------------------- a run goes on

@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder of a run of Small with --size 16 --preset small, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    world = numbered(3, 3)
    return common.open_run("a", parse("--preset small --size 16 --out_dir o"), world, world)


@pytest.mark.parametrize("how", ["--resume", "--eval_only"])
def test_a_run_goes_on_with_its_own_settings(made, how):
    cfg = parse(f"{how} --out_dir o")
    assert (cfg.size, cfg.lr, cfg.preset) == (16, 0.2, "small")  # not this machine's preset


def test_a_free_flag_may_change(made):
    assert parse("--eval_only --out_dir o --count 7 --device cpu").count == 7


def test_a_flag_that_says_what_the_run_had_is_no_change(made):
    assert parse("--resume --out_dir o --size 16 --lr 0.2 --no-amp --preset small").size == 16


@pytest.mark.parametrize("flags, had", [
    ("--size 32", 16), ("--lr 0.1", 0.2), ("--amp", False), ("--dataset hills", "sky")])
def test_a_flag_that_would_change_what_was_trained_is_a_fault(made, flags, had):
    with says(f"{flags.split()[0]} .*the run in o was trained with {had}; .*--out_dir"):
        parse(f"--resume --out_dir o {flags}")


def test_a_free_flag_out_of_its_range_is_a_fault_on_resume_too(made):
    with says("--count 10: must lie between 1 and 9"):
        parse("--resume --out_dir o --count 10")


def test_nothing_to_go_on_with_is_a_fault(made):
    for flags in ("--resume", "--eval_only --out_dir nowhere", "--resume --dataset other"):
        with says("nothing to continue: .* no run of a.py"):
            parse(flags)


@pytest.mark.parametrize("name", ["a-sky", "a-sky-procedural"])
def test_a_run_is_found_in_its_usual_folder(made, name):
    shutil.copytree(made, f"out/{name}")
    assert parse("--eval_only").out_dir == f"out/{name}"


def test_of_two_usual_folders_one_must_be_named(made):
    for name in ("a-sky", "a-sky-procedural"):
        shutil.copytree(made, f"out/{name}")
    with says("out/a-sky and out/a-sky-procedural both hold a run; .*--out_dir"):
        parse("--eval_only")
    assert parse("--eval_only --out_dir out/a-sky").out_dir == "out/a-sky"
    Path("out/a-sky-procedural/ckpt.pt").write_bytes(b"weights")
    assert parse("--eval_only").out_dir == "out/a-sky-procedural"  # the other trained nothing


@pytest.mark.parametrize("config, text", [
    ("{", "config.json is not a readable file"), ("[]", "not a readable file of a.py"),
    ('{"size": 16}', "not a readable file of a.py"),  # as the first version wrote it
    ('{"format": 1, "script": "a", "config": {}}', "by a.py in format 1, and read is what"),
    (f'{{"format": {common.FORMAT}, "script": "b"}}', r"written by b\.py .* what a\.py wrote")])
def test_a_folder_that_another_program_wrote_is_a_fault(made, config, text):
    (made / "config.json").write_text(config)
    with says(text):
        parse("--resume --out_dir o")


def test_a_new_run_notes_its_settings_and_its_clips(made):
    config = json.loads((made / "config.json").read_text())
    assert config.keys() == {"script", "format", "config", "data"}
    assert config["script"] == "a" and config["config"]["size"] == 16
    assert config["data"] == {"source": "procedural"}


@pytest.mark.parametrize("name", ["ckpt.pt", "raft.pt"])
def test_a_new_run_never_goes_into_a_folder_in_which_something_was_trained(made, name):
    (made / name).write_bytes(b"weights")
    before = content(made)
    cfg = Small(out_dir="o")
    for start in (lambda: common.check_folder("a", cfg, "procedural"),
                  lambda: common.open_run("a", cfg, numbered(3), numbered(3))):
        with says("o holds an earlier run: --resume .*--eval_only .*--out_dir"):
            start()
    assert content(made) == before


def test_a_run_that_trained_nothing_is_started_again(made):
    assert common.open_run("a", parse("--size 24 --out_dir o"), numbered(3), numbered(3)) == made
    assert json.loads((made / "config.json").read_text())["config"]["size"] == 24


def test_a_folder_of_another_program_is_not_written_over(made):
    (made / "config.json").write_text('{"architectures": ["UNet"]}')
    with says("not a readable file of a.py"):
        common.check_folder("a", Small(out_dir="o"), "real")
    (made / "config.json").write_text(f'{{"format": {common.FORMAT}, "script": "b"}}')
    with says(r"written by b\.py .* what a\.py wrote"):
        common.open_run("a", Small(out_dir="o"), numbered(3), numbered(3))


def test_the_folder_of_a_run_has_the_name_of_its_clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = parse("--dataset some/my:set")
    assert common.source_of(cfg) == "procedural"
    folder = common.run_folder("a", cfg.dataset, cfg.out_dir, "procedural")
    assert folder == Path("out/a-my_set-procedural")
    Path("data/some/my:set").mkdir(parents=True)
    assert common.source_of(cfg) == "real"
    assert common.run_folder("a", cfg.dataset, cfg.out_dir, "real") == Path("out/a-my_set")


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with says("cannot write file/below/config.json"):
        common.save_json(Path("file/below/config.json"), {})
    with says("cannot write into file: .*--out_dir"):
        common.check_folder("a", Small(out_dir="file/below"), "real")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with says("cannot write into .: .*--out_dir"):
        common.check_folder("a", Small(out_dir="o/below"), "real")
    assert (tmp_path / "file").read_text() == "not a folder" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------- what a run writes

def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(data, path):
    path.write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file")


def log_of(*rows):
    return SimpleNamespace(rows=list(rows))


@pytest.mark.parametrize("where, what", [
    ("os.replace", no_space), ("torch.save", half), ("torch.save", no_space)])
def test_a_full_disk_leaves_the_old_file_whole_and_no_part_behind(
        tmp_path, monkeypatch, where, what):
    path = tmp_path / "ckpt.pt"
    common.save_checkpoint(tmp_path, "a", Small(), log_of(), step=1)
    before = path.read_bytes()
    monkeypatch.setattr(where, what)
    with says("cannot write .*ckpt.pt: .*intact"):
        common.save_checkpoint(tmp_path, "a", Small(), log_of(), step=2)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt.pt", "log.csv"}


def test_a_file_is_only_there_when_it_is_whole(tmp_path):
    with common.written_aside(tmp_path / "new" / "a.txt") as part:
        part.write_text("all of it")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text() == "all of it" and not part.exists()


def test_a_checkpoint_comes_back(tmp_path):
    weights = torch.randn(2, 3)
    common.save_checkpoint(tmp_path, "a", Small(size=16), log_of({"step": 50}), step=3, w=weights)
    saved = common.load_checkpoint(tmp_path / "ckpt.pt", "a")
    assert saved["step"] == 3 and torch.equal(saved["w"], weights)
    assert saved["config"]["size"] == 16 and saved["log"] == [{"step": 50}]


def test_a_checkpoint_of_another_script_is_a_fault(tmp_path):
    common.save_checkpoint(tmp_path, "b", Small(), log_of())
    with says(r"written by b\.py .* what a\.py wrote"):
        common.load_checkpoint(tmp_path / "ckpt.pt", "a")


def test_a_checkpoint_of_another_format_is_a_fault(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(common, "FORMAT", 1)
        common.save_checkpoint(tmp_path, "a", Small(), log_of())
    with says("in format 1, .* wrote in format 3"):
        common.load_checkpoint(tmp_path / "ckpt.pt", "a")


def test_a_checkpoint_that_is_not_there_is_a_fault(tmp_path):
    with says("ckpt.pt is not there: .*--resume"):
        common.load_checkpoint(tmp_path / "ckpt.pt", "a")


class Runs:
    """A pickle with code: unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["cut", "empty", "garbage", "code", "another pickle"])
def test_a_checkpoint_that_cannot_be_read_is_a_fault_and_no_code_in_it_runs(tmp_path, kind):
    path = tmp_path / "ckpt.pt"
    common.save_checkpoint(tmp_path, "a", Small(), log_of(), w=torch.ones(100))
    data = {
        "cut": path.read_bytes()[:700],
        "empty": b"",
        "garbage": b"garbage",
        "code": pickle.dumps(Runs(tmp_path / "ran"), 2),
        "another pickle": pickle.dumps([1], 2),
    }
    path.write_bytes(data[kind])
    with says("is not a readable file of a.py"):
        common.load_checkpoint(path, "a")
    assert not (tmp_path / "ran").exists()


def test_the_log_holds_means_over_50_steps_and_over_what_is_left():
    log = common.Log(120)
    for step in range(1, 121):
        log.add(step, up=torch.tensor(float(step)), two=torch.tensor(2.0))
    assert [(row["step"], row["up"], row["two"]) for row in log.rows] == [
        (50, 25.5, 2), (100, 75.5, 2), (120, 110.5, 2)]
    assert all(row["seconds"] >= 0 for row in log.rows)


def test_the_log_of_a_resumed_run_goes_on():
    log = common.Log(100, 50, [dict(step=50, loss=1.0, seconds=1000.0)])
    for step in range(51, 101):
        log.add(step, loss=torch.tensor(3.0))
    assert [row["loss"] for row in log.rows] == [1, 3] and log.rows[1]["seconds"] >= 1000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_and_ends_the_log(value):
    log = common.Log(100, 50)
    with says("the loss second is not finite, of 50 steps to 100;"):
        for step in range(51, 101):
            second = torch.tensor(value if step == 57 else 1.0)
            log.add(step, first=torch.tensor(1.0), second=second)
    assert log.rows == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_log_notes_one_ctrl_c_stops_at_the_second_and_restores_the_handlers():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    log = common.Log(100)
    assert not log.interrupted
    signal.raise_signal(signal.SIGTERM)
    assert log.interrupted
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    log.close()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_after_a_ctrl_c_the_log_says_stop_and_has_all_losses():
    log = common.Log(100)
    for step in (1, 2):
        assert not log.add(step, loss=torch.tensor(float(step)))
    signal.raise_signal(signal.SIGINT)
    assert log.add(3, loss=torch.tensor(3.0))
    assert [(row["step"], row["loss"]) for row in log.rows] == [(3, 2.0)]


def test_the_losses_of_a_checkpoint_are_csv_with_empty_cells_where_a_row_lacks_one(tmp_path):
    log = log_of(dict(step=1, loss=0.5), dict(step=2, other=0.25))
    common.save_checkpoint(tmp_path, "a", Small(), log)
    common.save_checkpoint(tmp_path, "a", Small(), log_of(dict(step=3, loss=1.0)), "raft")
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["step", "loss", "other"], ["1", "0.5", ""], ["2", "", "0.25"]]
    assert (tmp_path / "log-raft.csv").read_text() == "step,loss\n3,1.0\n"


def test_a_checkpoint_that_does_not_fit_is_a_fault(tmp_path):
    net = torch.nn.Linear(2, 3)
    path = tmp_path / "ckpt.pt"
    common.save_checkpoint(tmp_path, "a", Small(), log_of(), step=7, net=net.state_dict())
    other = torch.nn.Linear(2, 3)
    cfg = Small(resume=True)
    assert common.restore(path, "a", cfg, net=other)["step"] == 7
    assert torch.equal(other.weight, net.weight)
    assert common.restore(path, "a", Small(), net=other) == dict(step=0, log=[])
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 3).parameters(), 1.0)
    for parts in (dict(net=torch.nn.Linear(3, 3)), dict(missing=net), dict(net=optimizer)):
        with says("ckpt.pt does not fit these settings"):
            common.restore(path, "a", cfg, **parts)


def test_results_are_strict_json(tmp_path):
    path = tmp_path / "results.json"
    common.save_json(path, {"a": 1.5, "b": None})
    assert json.loads(path.read_text()) == {"a": 1.5, "b": None}
    with pytest.raises(ValueError):
        common.save_json(path, {"a": math.nan})
    assert json.loads(path.read_text())["a"] == 1.5


def test_a_table_is_aligned():
    rows = [dict(a="x", b=1.23456789, c=None), dict(a="long", b=20.0, c=3)]
    columns = {"a": ("name", ""), "b": ("value", ".2f"), "c": ("n", "d")}
    assert common.table(rows, columns) == "name  value  n\nx      1.23  -\nlong  20.00  3"


# ---------------------------------------- pictures

def plain(count, size, *colour):
    """Frames of one colour, uint8 (count, 3, size, size)."""
    colour = torch.tensor(colour, dtype=torch.uint8)
    return colour.view(1, 3, 1, 1).expand(count, -1, size, size)


def pages_of(path):
    """The pages of a gif, each as often as it is shown for 80 ms."""
    pages = []
    with Image.open(path) as image:
        for k in range(image.n_frames):
            image.seek(k)
            pages += [image.convert("RGB")] * round(image.info["duration"] / 80)
    return pages


def test_a_sheet_shows_every_frame_at_its_place():
    red, black = plain(3, 8, 200, 0, 0), plain(1, 8, 0, 0, 0)
    page = common.sheet([("red", red), ("black", black)], ["0", "1", "2"], width=16, left=50)
    assert page.size == (50 + 3 * 18, 16 + 2 * 18)
    assert page.getpixel((50 + 18 + 8, 16 + 8)) == (200, 0, 0)
    assert page.getpixel((50 + 8, 16 + 18 + 8)) == (0, 0, 0)
    assert page.getpixel((50 + 2 * 18 + 8, 16 + 18 + 8)) == (255, 255, 255)  # that row is shorter


def strongest(colour):
    """Which of red, green and blue a colour has most of."""
    return colour.index(max(colour))


BLUE_THEN_GREEN = torch.cat([plain(40, 16, 0, 0, 200), plain(1, 16, 0, 200, 0)])[None]
RED_THEN_BLACK = torch.cat([plain(2, 16, 200, 0, 0), plain(1, 16, 0, 0, 0)])[None]
VIDEOS = {"long": BLUE_THEN_GREEN, "short": RED_THEN_BLACK}


def test_the_sheet_of_a_run_shows_every_kind_from_its_first_frame_to_its_last(tmp_path):
    common.save_sheet(tmp_path / "sheet.png", VIDEOS)
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.size[1] == 16 + 2 * 66  # 16 pixels are shown as 64
        found = [page.getpixel((90 + 66 * k + 32, 16 + 66 * row + 32))
                 for row in (0, 1) for k in (0, 9)]
    white = (255, 255, 255)  # the second kind has no such frame
    assert found == [(0, 0, 200), (0, 200, 0), (200, 0, 0), white]


def test_the_gif_of_a_run_shows_all_frames_and_a_shorter_kind_rests_on_its_last(tmp_path):
    common.save_gif(tmp_path / "a.gif", VIDEOS, width=64)
    pages = pages_of(tmp_path / "a.gif")
    assert len(pages) == 41
    left, right = (2 + 32, 16 + 32), (2 + 66 + 32, 16 + 32)
    assert [strongest(pages[k].getpixel(left)) for k in (0, 39, 40)] == [2, 2, 1]
    assert strongest(pages[1].getpixel(right)) == 0
    assert max(pages[40].getpixel(right)) < 30


def test_the_gif_of_a_run_shows_four_clips_and_repeats_a_kind_that_has_fewer(tmp_path):
    videos = {"many": BLUE_THEN_GREEN.expand(5, -1, -1, -1, -1), "one": RED_THEN_BLACK}
    common.save_gif(tmp_path / "a.gif", videos, width=64)
    page = pages_of(tmp_path / "a.gif")[0]
    assert page.size == (2 + 2 * 66, 16 + 4 * 66)
    assert strongest(page.getpixel((2 + 32, 16 + 3 * 66 + 32))) == 2
    assert strongest(page.getpixel((2 + 66 + 32, 16 + 3 * 66 + 32))) == 0


def test_the_sheet_of_changes_shows_what_was_mended_or_broken(tmp_path, capsys):
    world = [common.sprites(common.world_rng(0, "test", k), 16, 8) for k in range(60)]
    steady = [clip for clip in world if not clip["flaw"]][:8]
    flawed = [clip for clip in world if clip["flaw"]][:8]
    prompts = [clip["caption"] for clip in steady]
    good, bad = (torch.stack([c["video"] for c in clips]) for clips in (steady, flawed))
    before, after = good.clone(), good.clone()
    before[[1, 3, 4, 5, 7]] = bad[[1, 3, 4, 5, 7]]  # mended
    after[[2]] = bad[[2]]  # broken
    common.save_changes(tmp_path, {"without": before, "with": after}, prompts, True)
    assert "turned 5 coherent and broke 1" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.size == (210 + 8 * 66, 16 + 2 * 6 * 66)
        for row, k in enumerate([1, 2, 3, 4, 5, 7]):
            for which, videos in enumerate((before, after)):
                x, y = 210 + 32, 16 + (2 * row + which) * 66 + 32
                assert page.getpixel((x, y)) == tuple(videos[k, 0, :, 8, 8].tolist())
    common.save_changes(tmp_path, {"without": before, "with": after}, prompts, False)
    with Image.open(tmp_path / "sheet.png") as page:  # nothing judges: the first six
        assert page.size == (210 + 8 * 66, 16 + 2 * 6 * 66)
