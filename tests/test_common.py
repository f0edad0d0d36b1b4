"""Clips, worlds, the command line and what a run writes."""
import errno
import math
import os
import pickle
import resource
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from common import Fault, opt

LEVELS = [0, 40, 80, 120, 160, 200]  # frame i of a test clip is plain grey LEVELS[i] + the clip's number


def grey(clip=0, size=16, frames=6):
    """A clip (T, 3, H, W) uint8 whose frames tell which they are."""
    return torch.tensor(LEVELS[:frames], dtype=torch.uint8).add(clip).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def images(clip=0, mode="RGB", size=16, frames=6):
    return [Image.fromarray(f.permute(1, 2, 0).numpy()).convert(mode) for f in grey(clip, size, frames)]


def folder(path, clip=0, ext="png", mode="RGB", size=16, frames=6, first=8):
    """Frames named frame_8, frame_9, frame_10, ...: in the order of their numbers, not of their names."""
    path.mkdir(parents=True)
    for i, image in enumerate(images(clip, mode, size, frames), first):
        image.save(path / f"frame_{i}.{ext}")
    return path


def animated(path, clip):
    first, *rest = images(clip)
    first.save(path, save_all=True, append_images=rest, **(dict(lossless=True) if path.suffix == ".webp" else {}))


def level(clips, i):
    return clips.frames(i).float().mean((1, 2, 3)).tolist()


FORMATS = {
    "jpg": lambda d, k: folder(d / f"clip{k}", k, "jpg"),
    "JPEG": lambda d, k: folder(d / f"clip{k}", k, "JPEG"),
    "png": lambda d, k: folder(d / f"clip{k}", k),
    "webp": lambda d, k: folder(d / f"clip{k}", k, "webp"),
    "nested": lambda d, k: folder(d / "a" / f"video{k}" / "frames", k),
    "grey png": lambda d, k: folder(d / f"clip{k}", k, mode="L"),
    "rgba png": lambda d, k: folder(d / f"clip{k}", k, mode="RGBA"),
    "palette png": lambda d, k: folder(d / f"clip{k}", k, mode="P"),
    "gif": lambda d, k: animated(d / f"{k}.gif", k),
    "animated webp": lambda d, k: animated(d / f"{k}.webp", k),
    "npy THWC": lambda d, k: np.save(d / f"{k}.npy", grey(k).permute(0, 2, 3, 1).numpy()),
    "npy TCHW": lambda d, k: np.save(d / f"{k}.npy", grey(k).numpy()),
    "npz": lambda d, k: np.savez(d / f"{k}.npz", video=grey(k).numpy()),
    "pt": lambda d, k: torch.save(grey(k).clone(), d / f"{k}.pt"),
    "pt 0..1": lambda d, k: torch.save(grey(k) / 255, d / f"{k}.pt"),
    "pt -1..1": lambda d, k: torch.save(grey(k) / 127.5 - 1, d / f"{k}.pt"),
    "npy 0..255": lambda d, k: np.save(d / f"{k}.npy", grey(k).double().numpy()),
}


# ---------------------------------------------------------------------------------------------- real clips

@pytest.mark.parametrize("kind", FORMATS)
def test_every_layout_reads_the_same_clips_in_order(tmp_path, kind):
    for k in range(5):
        FORMATS[kind](tmp_path, k)
    train, test = (common.load_real(tmp_path, s, 8, 2) for s in ("train", "test"))
    assert (len(train), len(test)) == (4, 1) and train.frames(0).shape == (6, 3, 8, 8)
    assert train.frames(0).dtype == torch.uint8
    found = sorted([level(train, i) for i in range(4)] + [level(test, 0)])
    lossy = {"jpg": 1, "JPEG": 1, "webp": 2, "gif": 2, "palette png": 2}  # levels of 255
    np.testing.assert_allclose(found, [[v + k for v in LEVELS] for k in range(5)], atol=lossy.get(kind, 0))


def test_frames_are_cropped_to_the_centred_square_and_antialiased(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    wide[:, 8:16:2] = 100  # stripes finer than the target can show
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", np.stack([wide] * 3))
    clip = common.load_real(tmp_path, "train", 4, 2).frames(0)
    assert clip.shape == (3, 3, 4, 4) and abs(clip.float().mean() - 150) < 5 and clip.float().std() < 25


@pytest.mark.parametrize("train, test", [("train", "test"), ("sky_train", "sky_test"), ("Training", "val")])
def test_train_and_test_folders_are_found_in_their_usual_spellings(tmp_path, train, test):
    for k in range(3):
        folder(tmp_path / train / f"c{k}", k)
    folder(tmp_path / test / "c", 9)
    got = [common.load_real(tmp_path, s, 8, 2) for s in ("train", "test")]
    assert [len(g) for g in got] == [3, 1] and level(got[1], 0)[0] == 9


def test_clips_whose_names_only_contain_the_words_are_no_split(tmp_path):
    for k, name in enumerate(("trainspotting", "constraint", "contest", "valley", "value")):
        folder(tmp_path / name, k)
    assert [len(common.load_real(tmp_path, s, 8, 2)) for s in ("train", "test")] == [4, 1]


def test_without_split_folders_clips_are_split_80_20_disjoint_and_the_same_every_time(tmp_path):
    for k in range(10):
        np.save(tmp_path / f"{k}.npy", grey(k).numpy())
    both = lambda: [common.load_real(tmp_path, split, 8, 2) for split in ("train", "test")]
    train, test = ([level(c, i)[0] for i in range(len(c))] for c in both())
    assert (len(train), len(test)) == (8, 2) and sorted(train + test) == list(range(10))
    assert [[level(c, i)[0] for i in range(len(c))] for c in both()] == [train, test]


class Runs:  # a pickle with code: unpickling it would make a file
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_broken_clips_are_skipped_with_one_warning_that_names_each(tmp_path, capsys):
    train = tmp_path / "train"
    for k in range(3):
        folder(train / f"good{k}", k)
    folder(tmp_path / "test" / "good", 3)
    cut = folder(train / "cut_jpg", ext="jpg", size=64)
    (cut / "frame_9.jpg").write_bytes((cut / "frame_9.jpg").read_bytes()[:300])
    images(size=12)[0].save(folder(train / "mixed") / "frame_9.png")
    folder(train / "single", frames=1)
    (train / "bad_webp").mkdir()
    for name in ("bad_webp/1.webp", "bad_webp/2.webp", "text.pt", "text.npz", "text.npy", "text.gif"):
        (train / name).write_bytes(b"not what its name says")
    for name in ("empty.pt", "empty.npy", "empty.npz", "empty.gif"):
        (train / name).write_bytes(b"")
    np.save(train / "nan.npy", np.full((4, 8, 8, 3), np.nan))
    np.save(train / "flat.npy", np.zeros((4, 8, 8), np.uint8))
    np.save(train / "words.npy", np.full((4, 8, 8, 3), "x"))
    torch.save(dict(video=1), train / "dict.pt")
    (train / "code.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), 2))
    for name in ("a", "b"):  # two clips whose folders share a name are two
        folder(train / name / "rgb", frames=1)
    clips = common.load_real(tmp_path, "train", 8, 2)
    assert sorted(level(clips, i)[0] for i in range(len(clips))) == [0, 1, 2]
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "skipped 19 of 22" in err
    for name in ("cut_jpg", "mixed", "single", "bad_webp", "text.pt", "text.npz", "text.npy", "text.gif", "empty.pt",
                 "empty.npy", "empty.npz", "empty.gif", "nan.npy", "flat.npy", "words.npy", "dict.pt", "code.pt"):
        assert name in err
    assert err.count("rgb") == 2 and not (tmp_path / "ran").exists()


def test_no_usable_clip_or_an_empty_folder_is_a_fault(tmp_path):
    with pytest.raises(Fault, match="no usable train clips in"):
        common.load_real(tmp_path, "train", 8, 2)
    for k in range(3):
        folder(tmp_path / f"c{k}", frames=1)
    with pytest.raises(Fault, match="of 2 frames or more"):
        common.load_real(tmp_path, "train", 8, 2)


def test_a_clip_of_more_frames_than_files_may_be_open_is_read(tmp_path):
    for k in range(2):
        folder(tmp_path / f"c{k}", frames=6)
        for i in range(300):
            images()[0].save(tmp_path / f"c{k}" / f"{i + 100}.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 100, limits[1]))
    try:
        assert common.load_real(tmp_path, "train", 8, 2).lengths[0] == 306
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python >= 3.12, of the workers
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # there need not be a GPU
def test_what_workers_make_ahead_of_a_gpu_or_read_from_disk_is_what_memory_gives(tmp_path):
    for k in range(5):
        folder(tmp_path / f"c{k}", k)
    held, read = (common.load_real(tmp_path, "train", 8, 2, max_bytes=b) for b in (1 << 30, 0))
    assert held.cache is not None and read.cache is None and held.lengths == read.lengths
    made = lambda c: common.Batches(c, 8, 2, 0).__getitem__
    kinds = (held, "cpu"), (read, "cpu"), (held, "cuda")
    loaders = [common.ahead(made(c), range(5), device, c) for c, device in kinds]
    assert [loader.num_workers > 0 for loader in loaders] == [False, True, True]
    a, b, c = (torch.stack(list(loader)) for loader in loaders)
    assert len(a) == 5 and torch.equal(a, b) and torch.equal(a, c)


def test_a_clip_that_vanishes_while_it_is_used_is_a_fault_that_names_it(tmp_path):
    for k in range(2):
        folder(tmp_path / f"c{k}", k)
    clips = common.load_real(tmp_path, "train", 8, 2, max_bytes=0)
    (gone := clips.sources[0][0].parent).rename(tmp_path / "elsewhere")
    with pytest.raises(Fault, match=f"clip {gone.name} cannot be read any more"):
        common.Batches(clips, 4, 2, 0)[0]


def test_a_set_is_found_under_its_own_folder_name_else_a_world_says_so_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load = lambda name="sky", data_dir="": common.load_clips(name, data_dir, 8, (2, 2), 4, 0)
    train, test, source = load()
    assert source == "procedural" and len(train) == len(test) == 2 and "PROCEDURAL" in capsys.readouterr().out
    for name, data_dir, says in (("sky", "nowhere", "nowhere/sky_timelapse"), ("biking", "", "data/mountain_biking"),
                                 ("unknown", "", "biking")):
        with pytest.raises(Fault, match=says):
            load(name, data_dir)
    for k in range(3):
        folder(tmp_path / "data" / "sky_timelapse" / f"c{k}", k)
        folder(tmp_path / "mine" / "holiday" / f"c{k}", k)
    assert load()[2] == load("holiday", "mine")[2] == "real" and "PROCEDURAL" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- batches

def test_batches_are_a_function_of_seed_and_step_evenly_drawn_and_never_cross_clips():
    lengths = (3, 2, 6)
    cache = [torch.tensor([10 * k + i for i in range(n)], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
             for k, n in enumerate(lengths)]
    clips = common.Clips(None, lengths, 2, cache)
    a, b, other = (common.Batches(clips, 16, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(a[7], b[7]) and not torch.equal(a[7], a[8]) and not torch.equal(a[7], other[7])
    pairs = torch.cat([a[i] for i in range(200)])[:, :, 0, 0, 0].tolist()  # 3200
    found = {tuple(p): pairs.count(p) for p in pairs}
    assert set(found) == {(10 * k + i, 10 * k + i + 1) for k, n in enumerate(lengths) for i in range(n - 1)}
    assert all(340 < count < 460 for count in found.values())  # 400 each, sigma 19
    by_loader = list(common.ahead(a.__getitem__, range(5, 8), "cpu", clips))
    assert all(torch.equal(x, a[i]) for i, x in zip(range(5, 8), by_loader))


# ---------------------------------------------------------------------------------------------- procedural worlds

@pytest.mark.parametrize("name", common.WORLDS)
def test_a_world_is_a_function_of_seed_split_and_index_and_never_repeats(name):
    render = lambda seed, split: common.render(name, split, 6, 16, 40, seed)
    a, b, test, other = render(0, "train"), render(0, "train"), render(0, "test"), render(1, "train")
    assert a.frames(0).shape == (40, 3, 16, 16) and a.frames(0).dtype == torch.uint8
    assert all(torch.equal(x, y) for x, y in zip(a.cache, b.cache))
    clips = [c.numpy().tobytes() for w in (a, test, other) for c in w.cache]
    assert len(set(clips)) == len(clips)
    for clip in a.cache:
        assert name == "shapes" or (clip[1:] != clip[:-1]).flatten(1).any(1).all()  # all move on; shapes may rest
        assert clip.float().std() > 15  # and shows something


def test_sky_flow_is_exact_where_visible():
    for index in range(3):
        o = common.sky(common.world_rng(0, "test", index), 32, 12, flow=True)
        video, flow, visible = common.to_float(o["video"]).double(), o["flow"].double(), o["visible"]
        assert flow.shape == (11, 2, 32, 32) and visible.shape == (11, 32, 32) and visible.float().mean() > 0.15
        v, u = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        target = torch.stack([u, v]) + flow  # frame2(p + flow(p)) = frame1(p)
        back = F.grid_sample(video[1:], (target.permute(0, 2, 3, 1) + 0.5) / 16 - 1, "bicubic", align_corners=False)
        error, still = ((x - video[:-1]).abs().amax(1)[visible].mean() * 127.5 for x in (back, video[1:]))
        assert error < 1.5 and error < 0.3 * still  # levels of 255; half a level is rounding


def test_sky_wind_follows_the_look_only_where_it_is_known():
    def link(wind):  # rank correlation of the wind's speed with how red the first frame is
        clips = [common.sky(common.world_rng(0, "train", i), 16, 2, wind=wind, flow=True) for i in range(40)]
        red = [(o["video"][0, 0].float().mean() / (1 + o["video"][0, 2].float().mean())).item() for o in clips]
        return np.corrcoef(*(np.argsort(np.argsort(x)) for x in ([o["flow"].max().item() for o in clips], red)))[0, 1]

    assert link("known") > 0.85 and abs(link("unknown")) < 0.35


# ---------------------------------------------------------------------------------------------- what a run writes

def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(data, path):
    path.write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file")


@pytest.mark.parametrize("where, what", [("os.replace", no_space), ("torch.save", half), ("torch.save", no_space)])
def test_a_full_disk_leaves_the_old_file_whole_and_no_part_behind(tmp_path, monkeypatch, where, what):
    path = tmp_path / "ckpt.pt"
    common.save_checkpoint(path, "a", Small(), step=1)
    before = path.read_bytes()
    monkeypatch.setattr(where, what)
    with pytest.raises(Fault, match="cannot write .*ckpt.pt.*intact"):
        common.save_checkpoint(path, "a", Small(), step=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@dataclass
class Small:
    preset: str = opt("auto", "one of two")
    size: int = opt(32, "pixels", 8, 64)
    lr: float = opt(0.1, "rate", 0, 1)
    kind: str = opt("a", "which", choices=("a", "b"))
    amp: bool = opt(False, "100 % faster")


def test_a_checkpoint_that_does_not_fit_or_cannot_be_read_is_a_fault(tmp_path):
    path = tmp_path / "ckpt.pt"
    load = lambda script="a", cfg=Small(): common.load_checkpoint(path, script, cfg, ("size",))
    common.save_checkpoint(path, "a", Small(), step=3, net=dict(w=torch.ones(2)))
    assert load()["step"] == 3 and load(cfg=Small(lr=0.5))["net"]["w"].sum() == 2
    with pytest.raises(Fault, match=r"written by a\.py, not b\.py"):
        load("b")
    with pytest.raises(Fault, match="trained with --size 32, this run has 16"):
        load(cfg=Small(size=16))
    whole = path.read_bytes()
    code = pickle.dumps(Runs(tmp_path / "ran"), 2)
    for data in (whole[:len(whole) // 2], b"", b"garbage", code, pickle.dumps([1], 2)):
        path.write_bytes(data)
        with pytest.raises(Fault, match="not a readable checkpoint"):
            load()
    assert not (tmp_path / "ran").exists()


def test_interruptible_notes_the_first_ctrl_c_stops_at_the_second_and_restores_the_handlers():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), common.interruptible() as hit:
        assert not hit[0]
        signal.raise_signal(signal.SIGTERM)
        assert hit[0]
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_the_command_line_gives_goes_over_the_preset_and_that_over_the_default():
    presets = {"tiny": {}, "small": dict(size=64, lr=0.2)}
    parse = lambda argv: common.parse_args(Small, presets, "doc", argv)
    cfg = parse(["--preset", "small", "--lr", "0.3", "--amp"])
    assert (cfg.preset, cfg.size, cfg.lr, cfg.kind, cfg.amp) == ("small", 64, 0.3, "a", True)
    presets["small"]["amp"] = True
    assert parse(["--preset", "small"]).amp and not parse(["--preset", "small", "--no-amp"]).amp
    for argv, says in (("--preset big", "--preset big: unknown; choose one of tiny, small"), ("--kind c", "of a, b"),
                       ("--size 7", "--size 7: must lie between 8 and 64"), ("--lr nan", "--lr nan: must lie between"),
                       ("--lr 1e9", "--lr 1000000000.0: must lie"), ("--size x", "--size"), ("--nope", "--nope")):
        with pytest.raises(Fault, match=says):
            parse(argv.split())


def test_help_shows_every_flag_with_its_defaults_by_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_args(Small, {"tiny": {}, "small": dict(size=64)}, "the doc", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(s in text for s in ("the doc", "pixels [tiny 32, small 64]", "100 % faster [False]"))


def test_a_device_that_is_not_there_is_a_fault():
    with pytest.raises(Fault, match="--device nonsense cannot be used here .*try --device cpu"):
        common.pick_device("nonsense")


def test_tables_and_csv_say_what_the_rows_say():
    rows = [dict(a="x", b=1.23456789, c=None), dict(a="long", b=20.0, c=3)]
    assert common.as_csv(rows) == "a,b,c\nx,1.23457,None\nlong,20,3\n" and common.as_csv([]) == ""
    assert common.table(rows, {"a": ("name", ""), "b": ("value", ".2f"), "c": ("n", "d")}) == \
        "name  value  n\nx      1.23  -\nlong  20.00  3"


def test_sheet_gif_and_curves_show_what_they_are_given(tmp_path):
    red = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    page = common.sheet([("red", red), ("black", red[:1] * 0)], ["0", "1", "2"], scale=2, left=50)
    assert page.size == (50 + 3 * 18, 16 + 2 * 18)
    assert page.getpixel((50 + 18 + 8, 16 + 8)) == (200, 0, 0) and page.getpixel((58, 16 + 18 + 8)) == (0, 0, 0)
    assert page.getpixel((50 + 2 * 18 + 8, 16 + 18 + 8)) == (255, 255, 255)  # a row with fewer frames ends in white
    common.save_gif(tmp_path / "a.gif", [page, common.sheet([("x", red)] * 2, [], scale=2, left=50), page])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.size == page.size
    panel = dict(title="t", x="x", y="y", log=True, lines={
        "up": ([0, 1, 2], [1, 10, 100]), "dot": ([1], [1e-12]), "none": ([0], [math.nan])})
    flat = dict(panel, log=False, lines={"flat": ([0, 1], [3, 3])})
    common.save_curves(tmp_path / "c.png", [panel, flat, dict(flat, lines={})], size=(300, 200))
    with Image.open(tmp_path / "c.png") as chart:
        inks = {c for _, c in chart.getcolors(1 << 16)}
        assert chart.size == (600, 400) and {(214, 39, 40), (31, 119, 180)} <= inks  # both lines are drawn
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "c.png"]


def test_ticks_are_round_few_and_inside():
    assert common.ticks(0.0, 15.0, False) == [0, 5, 10, 15] and common.ticks(0.3, 139.0, True) == [1, 10, 100]
    assert common.ticks(3.27, 61.5, True) == [5, 10, 20, 50]
    assert common.ticks(1e-4, 2e3, True) == pytest.approx([1e-4, 1e-2, 1, 100])
    ranges = ((-1.7, 1, False), (0.447, 0.717, False), (2, 2.1, True), (32, 128, False), (9.99, 10, False))
    for low, high, log in ranges:
        found = common.ticks(low, high, log)
        assert 2 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
        assert all(float(f"{v:.5g}") == pytest.approx(v) for v in found)  # what is printed is where the line is


def test_noise_differs_by_seed_by_use_and_by_step():
    draws = {tuple(torch.randn(4, generator=common.dice(*key)).tolist())
             for key in ((0, 0, 3), (0, 1, 3), (1, 0, 3), (2, 9, 3), (0, 0, 4), (2**31, 9, 10**6))}
    assert len(draws) == 6
    assert torch.equal(torch.randn(4, generator=common.dice(5, 1, 2)), torch.randn(4, generator=common.dice(5, 1, 2)))


def test_a_training_step_cuts_the_gradient_and_keeps_the_rates_of_its_groups():
    net = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)])
    before = [p.item() for p in net.parameters()]
    groups = [dict(params=net[0].parameters()), dict(params=net[1].parameters(), lr=0.1)]
    optimiser = torch.optim.SGD(groups, lr=1.0)
    for share in (0.5, 0.5):  # a second time: of the rates it was made with, not of the last ones
        common.descend(300 * net[0].weight.sum() + 400 * net[1].weight.sum(), net, optimiser, share)
    moved = [a - b.item() for a, b in zip(before, net.parameters())]
    assert moved == pytest.approx([2 * 0.5 * 0.6, 2 * 0.05 * 0.8])  # the gradient (300, 400) cut to (0.6, 0.8)
    assert [common.warm_decay(k, 1000) for k in (50, 100, 600, 1000)] == pytest.approx([0.5, 1, 1, 0.01])
