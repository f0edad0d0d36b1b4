"""What the four scripts share: the command line, clips (real folders and procedural worlds), small helpers for
noise levels, and what every run writes. Nothing here belongs to one paper.

Tensors: video (B, C, T, H, W) and frame (B, C, H, W), float in [-1, 1]; a stored clip is uint8 (T, 3, H, W).
Flow (2, H, W) in pixels, channel 0 = x (right), 1 = y (down): frame2(p + flow(p)) = frame1(p).
"""
import argparse
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, asdict, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

IMAGES, TENSORS = {".jpg", ".jpeg", ".png", ".webp"}, {".npy", ".npz", ".pt"}
FOLDERS = {"sky": ("sky_timelapse",), "mazes": ("gqn_mazes", "mazes"), "minerl": ("minerl_navigate",),
           "carla": ("carla_no_traffic",), "biking": ("mountain_biking",), "riding": ("horseback_riding",)}

class Fault(Exception):
    """Something the user can mend: shown as one line, exit status 2."""

# ---------------------------------------------------------------------------------------------- command line
def opt(default, help, lo=None, hi=None, choices=None):
    """A Config field: its default, its line in --help, and what it may be."""
    return field(default=default, metadata=dict(help=help, lo=lo, hi=hi, choices=choices))

def parse_args(Config, presets, doc, argv=None):
    """Config from the command line: what the user gave, over the preset's values, over the defaults. Raises Fault."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(Fault(f"{message}; --help lists every flag"))
    for f in fields(Config):
        default = f", ".join(f"{p} {v.get(f.name, f.default)}" for p, v in presets.items()) \
            if any(f.name in v for v in presets.values()) else f.default
        text = f"{f.metadata['help']} [{default}]".replace("%", "%%")
        kind = dict(type=f.type, metavar=f.type.__name__.upper())
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else kind  # --amp, --no-amp
        parser.add_argument(f"--{f.name}", default=MISSING, help=text, **kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not MISSING}
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "small" if torch.cuda.is_available() and given.get("device", "auto") != "cpu" else "tiny"
    if preset not in presets:
        raise Fault(f"--preset {preset}: unknown; choose one of {', '.join(presets)}")
    cfg = Config(**{**presets[preset], **given, "preset": preset})
    for f in fields(Config):
        v, m = getattr(cfg, f.name), f.metadata
        if m["choices"] and v not in m["choices"]:
            raise Fault(f"--{f.name} {v}: unknown; choose one of {', '.join(map(str, m['choices']))}")
        if m["lo"] is not None and not m["lo"] <= v <= m["hi"]:  # also refuses nan
            raise Fault(f"--{f.name} {v}: must lie between {m['lo']} and {m['hi']}")
    return cfg

def check_list(cfg, name, kind, low, high):
    """A field that holds numbers with commas between them: all of them in [low, high], else Fault."""
    try:
        values = [kind(v) for v in getattr(cfg, name).split(",")]
    except ValueError:
        values = [math.nan]
    if not all(low <= v <= high for v in values):
        raise Fault(f"--{name} {getattr(cfg, name)}: must be numbers between {low} and {high}, separated by commas")

def check_names(cfg, name, known):
    """A field that holds names with commas between them: all of them known, else Fault."""
    for given in getattr(cfg, name).split(","):
        if given not in known:
            raise Fault(f"--{name} {getattr(cfg, name)}: {given!r} is unknown; choose from {','.join(known)}")

def guided_steps(cfg):
    """--guided, steps of a sampler counted from 0, as a set: '0-3,6' -> {0, 1, 2, 3, 6}. Raises Fault."""
    try:
        ends = [[int(n) for n in part.split("-")] for part in cfg.guided.split(",") if part]
        assert all(len(e) <= 2 and 0 <= e[0] <= e[-1] < cfg.steps for e in ends)
    except (ValueError, AssertionError):
        raise Fault(f"--guided {cfg.guided}: must be steps from 0 to {cfg.steps - 1} and ranges of them, as in 0-3,6")
    return {k for e in ends for k in range(e[0], e[-1] + 1)}

def run(main):
    """Call main(); a Fault or Ctrl-C ends in one line instead of a traceback."""
    try:
        main()
    except Fault as e:
        text = str(e).strip().splitlines()[-1].split("Fault: ")[-1]  # one from a loader's worker brings its traceback
        sys.exit(print(f"error: {text}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted; what was saved before is intact", file=sys.stderr) or 130)

def pick_device(name):
    """'auto' -> cuda, mps or cpu, whichever is there; a device that is not there is a Fault."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise Fault(f"--device {name} cannot be used here ({str(e).splitlines()[0]}); try --device cpu")
    return torch.device(name)

# ---------------------------------------------------------------------------------------------- real clips
def _number(path):
    """Frames sort by the last number in their name, else by name."""
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else -1, path.name)

def _animated(path):
    try:
        with Image.open(path) as im:
            return getattr(im, "n_frames", 1) > 1
    except OSError:  # broken: found out, and named, when it is read
        return False

def _sources(root):
    """Every clip below root: a folder of frames (list of paths), or one animated or tensor file (path)."""
    found = []
    for folder, subfolders, names in sorted(os.walk(root, followlinks=True)):
        paths = [Path(folder, n) for n in names if not n.startswith(".")]
        found += sorted(p for p in paths if p.suffix.lower() in TENSORS | {".gif"})
        frames = sorted((p for p in paths if p.suffix.lower() in IMAGES), key=_number)
        if frames and frames[0].suffix.lower() == ".webp" and _animated(frames[0]):
            found += frames
        elif frames:
            found.append(frames)
    return found

def _fit(image, size):
    """Any PIL image as uint8 (3, size, size): largest centred square, antialiased."""
    return torch.from_numpy(np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.BICUBIC))).permute(2, 0, 1)

def _tensor_clip(path, size):
    """A .npy/.npz/.pt clip (T, H, W, C) or (T, C, H, W), uint8 or float in [0, 1], [-1, 1] or [0, 255]."""
    a = torch.load(path, weights_only=True, map_location="cpu") if path.suffix == ".pt" else np.load(path)
    a = torch.as_tensor(a if path.suffix != ".npz" else a[a.files[0]])
    if a.ndim != 4 or 3 not in (a.shape[1], a.shape[-1]):
        raise ValueError(f"shape {tuple(a.shape)} is neither (T, H, W, 3) nor (T, 3, H, W)")
    a = a if a.shape[-1] == 3 else a.permute(0, 2, 3, 1)
    if a.is_floating_point():
        if not a.isfinite().all():
            raise ValueError("holds values that are not finite")
        a = (a + 1) * 127.5 if a.min() < 0 else a * 255 if a.max() <= 1 else a
    a = a.round().clamp(0, 255).to(torch.uint8).numpy()
    return torch.stack([_fit(Image.fromarray(x), size) for x in a])

def read_clip(source, size, start=0, stop=None):
    """One clip, or frames start..stop of it, as uint8 (T, 3, size, size). Raises OSError or ValueError if broken."""
    if isinstance(source, list):
        frames, sizes = [], set()
        for path in source[start:stop]:
            with Image.open(path) as im:
                frames.append(_fit(im, size))
                sizes.add(im.size)
        if len(sizes) > 1:
            raise ValueError("its frames differ in size")
        return torch.stack(frames)
    if source.suffix.lower() in TENSORS:
        return _tensor_clip(source, size)[start:stop]
    with Image.open(source) as im:
        return torch.stack([_fit(f, size) for f in ImageSequence.Iterator(im)])[start:stop]

def _split(root, split):
    """The clips of 'train' or 'test': sub-folders in any usual spelling, else a seeded 80-20 split over clips."""
    called = lambda d, word: d.is_dir() and re.search(f"(^|[^a-z])({word})([^a-z]|$)", d.name.lower())
    sub = {s: [d for d in sorted(root.iterdir()) if called(d, word)]
           for s, word in (("train", "train(ing)?"), ("test", "test(ing)?|val(id(ation)?)?"))}
    if sub["train"] and sub["test"]:
        return [c for d in sub[split] for c in _sources(d)]
    clips = _sources(root)
    order = np.random.default_rng(42).permutation(len(clips))
    n_test = max(1, round(0.2 * len(clips)))
    return [clips[i] for i in sorted(order[:n_test] if split == "test" else order[n_test:])]

def _name(source):
    return str(source[0].parent.name if isinstance(source, list) else source.name)

class Clips(torch.utils.data.Dataset):
    """Clips of one split. `frames(i, a, b)` is uint8 (b - a, 3, H, W); small sets are held in memory, others read.
    captions: of a procedural world that has them."""

    def __init__(self, sources, lengths, size, cache, captions=None):
        self.sources, self.lengths, self.size, self.cache, self.captions = sources, lengths, size, cache, captions

    def __len__(self):
        return len(self.lengths)

    def frames(self, i, start=0, stop=None):
        if self.cache is not None:
            return self.cache[i][start:stop]
        try:
            return read_clip(self.sources[i], self.size, start, stop)
        except (OSError, ValueError) as e:
            raise Fault(f"clip {_name(self.sources[i])} cannot be read any more: {e}")

def load_real(root, split, size, min_frames, max_bytes=4 << 30):
    """Real clips below root. Broken or too short ones are skipped with one warning; none left is a Fault."""
    sources, bad = _split(root, split), []
    lazy = sum(len(s) for s in sources if isinstance(s, list)) * 3 * size * size > max_bytes

    def read(source):
        try:
            if lazy and isinstance(source, list):
                read_clip(source, size, 0, 1)
                return len(source), None
            clip = read_clip(source, size)
            return len(clip), clip
        except Exception as e:  # garbage, code in a pickle, truncation: every reader raises something else
            return 0, (str(e) or type(e).__name__).splitlines()[0][:80]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(read, sources), f"reading {root.name} {split}", len(sources), leave=False))
    for source, (n, clip) in zip(sources, results):
        if n < min_frames:
            bad.append(f"{_name(source)} ({clip if isinstance(clip, str) else f'only {n} of {min_frames} frames'})")
    if bad:
        print(f"warning: skipped {len(bad)} of {len(sources)} {split} clips in {root}: "
              + ", ".join(bad), file=sys.stderr)
    keep = [(s, n, c) for s, (n, c) in zip(sources, results) if n >= min_frames]
    if not keep:
        raise Fault(f"no usable {split} clips in {root}: a clip is a folder of numbered jpg/png/webp frames, an "
                    f"animated gif/webp, or a .npy/.npz/.pt tensor, of {min_frames} frames or more; two clips at least")
    sources, lengths, cache = zip(*keep)
    return Clips(sources, lengths, size, None if lazy else cache)

def load_clips(dataset, data_dir, size, counts, frames, seed, min_frames=2, **world):
    """Train and test clips of a set, and whether they are 'real' or 'procedural'.

    Real clips are looked for in data_dir ('' = data) under the set's name; where there are none and data_dir is '',
    a procedural world of that name is rendered: counts = (train, test) clips of `frames` frames. Raises Fault.
    """
    names = (dataset, *FOLDERS.get(dataset, ()))
    places = [Path(data_dir or "data", n) for n in names]
    root = next((p for p in places if p.is_dir()), None)
    if root is not None:
        return load_real(root, "train", size, min_frames), load_real(root, "test", size, min_frames), "real"
    looked = "no clips found: looked in " + ", ".join(map(str, places))
    if dataset not in (*FOLDERS, *WORLDS):
        raise Fault(f"--dataset {dataset}: {looked}; name a folder of clips there, or one of {', '.join(FOLDERS)}")
    if data_dir or dataset not in WORLDS:
        raise Fault(f"--dataset {dataset}: {looked}; the README says where to get it"
                    + (", and without --data_dir a procedural world is used" if dataset in WORLDS else
                       f" (procedural worlds, for a start: {', '.join(WORLDS)})"))
    print(f"*** {looked}.\n*** PROCEDURAL world '{dataset}' is used instead: nothing below is real video. ***")
    train, test = (render(dataset, s, n, size, frames, seed, **world) for s, n in zip(("train", "test"), counts))
    return train, test, "procedural"

def captions_of(clips, dataset):
    """The caption of every clip; of a real one the text file beside it (clip7/, clip7.gif: clip7.txt). Raises Fault."""
    if clips.sources is None:
        if not clips.captions[0]:
            raise Fault(f"--dataset {dataset}: this procedural world has no captions; use sprites, or captioned clips")
        return clips.captions
    found = []
    for source in clips.sources:
        clip = source[0].parent if isinstance(source, list) else source
        path = clip.with_name((clip.name if clip.is_dir() else clip.stem) + ".txt")
        try:
            found.append(path.read_text().strip())
        except (OSError, UnicodeDecodeError) as e:
            raise Fault(f"clip {clip} has no caption: cannot read {path} ({type(e).__name__}); write one line into it")
    return found

def load_captioned(cfg, test=512):
    """Train and test clips of cfg.dataset, the captions of both, the words of the training ones, how many the longest
    has, and 'real' or 'procedural'. Raises Fault."""
    train_clips, test_clips, source = load_clips(cfg.dataset, cfg.data_dir, cfg.size, (cfg.clips, test), cfg.frames,
                                                 cfg.seed, min_frames=cfg.frames)
    captions = [captions_of(clips, cfg.dataset) for clips in (train_clips, test_clips)]
    words = [words_of(c) for c in captions[0]]
    return train_clips, test_clips, *captions, sorted(set().union(*words)), max(map(len, words)), source

class Batches(torch.utils.data.Dataset):
    """Item `step` is that step's batch of `length` consecutive frames, uint8 (B, length, 3, H, W), drawn evenly from
    all there are: a function of (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen."""

    def __init__(self, clips, batch, length, seed):
        self.clips, self.batch, self.length, self.seed = clips, batch, length, seed
        self.ends = np.cumsum([max(0, n - length + 1) for n in clips.lengths])  # starts up to and including each clip

    def where(self, step):
        """The clips of a step's batch, and the first frame in each: (B,) twice."""
        at = np.random.default_rng([self.seed, step]).integers(self.ends[-1], size=self.batch)
        clip = np.searchsorted(self.ends, at, side="right")
        return clip, at - np.concatenate([[0], self.ends])[clip]

    def __getitem__(self, step):
        return torch.stack([self.clips.frames(i, a, a + self.length) for i, a in zip(*self.where(step))])

def ahead(make, steps, device, clips):
    """make(step) for all of `steps` (a range); ahead of the training, by workers, where a GPU would have to wait for it
    or frames are read from disk. make: a method, or functools.partial of a function, which can be sent to a worker."""
    cuda = device.startswith("cuda")
    workers = min(8, os.cpu_count()) if cuda or clips.cache is None else 0
    way = "fork" if cuda else None  # clips in memory are shared with a fork, anything else would copy them
    return torch.utils.data.DataLoader(steps, batch_size=None, collate_fn=make, num_workers=workers, pin_memory=cuda,
                                       multiprocessing_context=way)

# ---------------------------------------------------------------------------------------------- procedural worlds
def world_rng(seed, split, index):
    """The random stream of one clip: the same for the same (seed, split, index), different for any other."""
    return np.random.default_rng([seed, {"train": 0, "test": 1}[split], index])

def _rendered(index, name, split, size, frames, seed, world):
    clip = WORLDS[name](world_rng(seed, split, index), size, frames, **world)
    return clip["video"], clip.get("caption", "")

def render(name, split, count, size, frames, seed, **world):
    """`count` clips of a procedural world, held in memory."""
    one = partial(_rendered, name=name, split=split, size=size, frames=frames, seed=seed, world=world)
    workers = min(8, os.cpu_count()) if count * frames * size**2 > 4e6 else 0
    loader = torch.utils.data.DataLoader(range(count), batch_size=None, collate_fn=one, num_workers=workers)
    cache, captions = zip(*((v.clone(), c) for v, c in tqdm(loader, f"rendering {name} {split}", leave=False)))
    return Clips(None, [frames] * count, size, cache, captions)

def sky(rng, size, frames, wind="known", flow=False):
    """Two layers of cloud drifting over a sky gradient behind a ridge of hills.

    Wind speed .5 to 1.5 px a frame at 32 px; with wind='known' it follows the hour of day, so one frame determines
    the motion; 'unknown' draws it apart. Returns video uint8 (T, 3, H, W), with flow=True also the exact forward flow
    (T-1, 2, H, W) and `visible` (T-1, H, W), True where one layer alone makes the pixel, here and at its target.
    """
    hour, speed = rng.uniform(size=2)  # 0 = noon, calm ... 1 = dusk, windy
    speed = (0.5 + (hour if wind == "known" else speed)) * size / 32
    n = 2 ** math.ceil(math.log2(size + speed * frames + 1))  # torus wide enough that nothing comes round again
    fy, fx = np.fft.fftfreq(2 * size)[:, None], np.fft.rfftfreq(n)[None]
    f = np.hypot(fx * 1.0, fy * 1.6) * size / 32  # clouds are wider than high
    layers = []
    cirrus, cumulus = (0.5, 1.9, rng.uniform(-0.8, 0.3), 2.0), (1.0, 2.1, rng.uniform(-0.6, 0.5), 5.0)
    for drift, power, cover, sharp in (cirrus, cumulus):
        amplitude = np.where(f > 0, np.maximum(f, 1 / 40) ** -power, 0) * np.exp(-((f / 0.25) ** 4))
        spec = amplitude * np.exp(2j * np.pi * rng.uniform(size=f.shape))  # band-limited: sub-pixel drift is exact
        lit = spec * (1 - np.exp(-2j * np.pi * fy * 2.5 * size / 32))  # light from above: density minus density above
        rows = np.fft.ifft(np.stack([spec, lit]), axis=1)[:, :size]  # (2, H, n/2+1), still a spectrum along x
        rows[0] /= np.fft.irfft(rows[0], n).std()
        rows[1] /= np.fft.irfft(rows[1], n).std()
        shift = np.exp(-2j * np.pi * fx * drift * speed * np.arange(frames)[:, None])  # (T, n/2+1)
        density, light = np.fft.irfft(rows[:, None] * shift[None, :, None], n)[..., :size].astype(np.float32)
        layers.append((1 / (1 + np.exp(-sharp * (density + cover))), light))  # opacity, light: (T, H, W)
    tone = lambda *keys: np.array([np.interp(hour, [0, 0.55, 1], k) for k in zip(*keys)], np.float32)  # (3,)
    top = tone((40, 100, 190), (80, 105, 165), (45, 40, 95))
    low = tone((165, 205, 240), (245, 205, 150), (235, 110, 80))
    bright = tone((252, 252, 255), (255, 235, 205), (250, 170, 130))
    dark = tone((165, 175, 190), (160, 130, 130), (80, 60, 95))
    y = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    picture = (top + (low - top) * y**1.3)[:, None]  # (H, 1, 3); constant along x, so that drift is exact
    for (alpha, light), strength in zip(layers, (0.75, 1.0)):
        cloud = dark + (bright - dark) * (0.6 + 0.4 * np.tanh(light))[..., None]
        picture = picture + (strength * alpha)[..., None] * (cloud - picture)  # (T, H, W, 3)
    x = np.arange(size) / size
    ridge = 0.9 + 0.05 * sum(np.sin(2 * np.pi * (k * x + rng.uniform())) / k for k in (0.7, 1.9, 4.3))
    hill = 1 / (1 + np.exp(np.clip((ridge - y - 0.5 / size) * 2 * size, -30, 30)))[..., None]  # (H, W, 1)
    picture = picture + hill * (0.18 * dark + 8 - picture)
    out = dict(video=torch.from_numpy(np.rint(picture.clip(0, 255)).astype(np.uint8)).permute(0, 3, 1, 2))
    if flow:
        low_cloud = layers[1][0]  # the upper layer shows where the lower one is clear
        u = np.where(hill[..., 0] > 0.5, 0, np.where(low_cloud > 0.5, speed, 0.5 * speed))[:-1]  # (T-1, H, W)
        kind = np.where(hill[..., 0] > 0.99, 2, np.where(hill[..., 0] > 0.01, -1,
                        np.where(low_cloud > 0.98, 1, np.where(low_cloud < 0.02, 0, -1))))  # (T, H, W)
        target = np.arange(size) + u
        at = lambda k, x: np.take_along_axis(k[1:], np.clip(x, 0, size - 1).astype(int), 2)
        same = (kind[:-1] >= 0) & (at(kind, np.floor(target)) == kind[:-1]) & (at(kind, np.ceil(target)) == kind[:-1])
        out["flow"] = torch.from_numpy(np.stack([u, np.zeros_like(u)], 1)).float()
        out["visible"] = torch.from_numpy(same & (target <= size - 1))
    return out

def _maze(rng, cells):
    """Walls of a maze with a few loops, bool (2 cells + 1, 2 cells + 1); rooms lie at odd indices."""
    wall = np.ones((2 * cells + 1,) * 2, bool)
    wall[1::2, 1::2] = False
    for i, j in np.ndindex(cells, cells):  # from every room a way on to the next row or column, now and then to both
        ways = [w for w in ((1, 0), (0, 1)) if i + w[0] < cells and j + w[1] < cells]
        for a, b in rng.permutation(ways)[:1 + (rng.uniform() < 0.25)] if ways else ():
            wall[2 * i + 1 + a, 2 * j + 1 + b] = False
    return wall

def _walk(rng, wall, frames):
    """A first-person walk: positions (T, 2) and headings (T,); it turns where the way ends or a side way tempts."""
    free = np.argwhere(~wall[1::2, 1::2]) * 2 + 1
    here, pose = free[rng.integers(len(free))], []
    steps = [np.array(s) for s in ((1, 0), (0, 1), (-1, 0), (0, -1))]  # headings 0, 90, 180, 270 degrees
    heading = int(rng.choice([h for h in range(4) if not wall[tuple(here + steps[h])]]))
    late = rng.integers(8)  # start within the first step
    while len(pose) < frames + late:
        ways = [t for t in (0, 1, -1) if not wall[tuple(here + steps[(heading + t) % 4])]] or [2]
        turn = ways[0] if rng.uniform() < 0.5 else ways[rng.integers(len(ways))]
        for k in range(6 * abs(turn)):  # a quarter turn takes 6 frames
            pose.append((*here, np.pi / 2 * (heading + turn * (k + 1) / (6 * abs(turn)))))
        heading = (heading + turn) % 4
        for k in range(8):  # a room (2 units) takes 8 frames
            pose.append((*(here + steps[heading] * (k + 1) / 4), np.pi / 2 * heading))
        here = here + 2 * steps[heading]
    pose = np.array(pose, np.float32)[late:late + frames]
    return pose[:, :2] + 0.5, pose[:, 2]

def mazes(rng, size, frames, tan=0.9):
    """A first-person walk through a textured maze by ray casting; which way it turns no frame tells.

    Returns video uint8 (T, 3, H, W). tan: half the picture's width at depth 1, which is also the height of a wall.
    """
    wall = _maze(rng, 6)
    at, angle = _walk(rng, wall, frames)
    v, u = np.mgrid[:16, :16]
    patterns = np.array([(v % 4 == 0) | ((u + 4 * (v // 4 % 2)) % 8 == 0), (u // 4 + v // 4) % 2 == 0, u // 2 % 2 == 0,
                         np.hypot(u - 7.5, v - 7.5) < 5, (u + v) // 4 % 2 == 0])  # bricks, checks, stripes, disc, slant
    hues = rng.uniform(40, 235, size=(5, 1, 1, 3)) * rng.uniform(0.9, 1.05, size=(5, 16, 16, 1))
    texture = np.where(rng.permutation(patterns)[..., None], 0.55 * hues, hues).reshape(-1, 3).astype(np.float32)
    style = rng.integers(4, size=wall.shape, dtype=np.int32)  # of every wall; the fifth texture is the floor
    s = 2 * size  # 2 x 2 rays a pixel, averaged
    screen = ((np.arange(s, dtype=np.float32) + 0.5) / s * 2 - 1) * np.float32(tan)
    ahead, right = (np.stack(a, -1)[:, None] for a in ((np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))))
    ray, at = ahead + screen[:, None] * right, at[:, None]  # (T, s, 2); ahead is 1, so length along the ray is depth
    cell, step = np.broadcast_to(np.floor(at), ray.shape).astype(np.int32), np.where(ray > 0, 1, -1).astype(np.int32)
    per = 1 / np.maximum(np.abs(ray), 1e-6)
    reach = np.where(ray > 0, cell + 1 - at, at - cell) * per  # depth of the next grid line on each axis
    depth, side = np.zeros(ray.shape[:2], np.float32), np.zeros(ray.shape[:2], bool)
    moving = np.ones(ray.shape[:2], bool)
    while moving.any():
        axis = reach[..., 1] < reach[..., 0]
        depth, side = np.where(moving, reach.min(-1), depth), np.where(moving, axis, side)
        move = np.stack([~axis, axis], -1) & moving[..., None]
        cell, reach = cell + step * move, reach + per * move
        moving &= ~wall[cell[..., 0], cell[..., 1]]
    hit = at + ray * depth[..., None]
    height = screen[:, None] * depth[:, None]  # (T, rows, columns), 0 = eye, down; walls reach from -.5 to .5
    down, far = height > 0.5, 0.5 / np.maximum(screen, 1e-3)[:, None]  # where the floor is, and its depth
    pick = lambda x: (x % 1 * 16).astype(np.int32)
    floor = at[:, :, None] + ray[:, None] * far[..., None]  # (T, rows, columns, 2)
    on_floor = pick(floor[..., 0]) * 16 + pick(floor[..., 1])
    on_wall = pick(height + 0.5) * 16 + pick(np.where(side, hit[..., 0], hit[..., 1]))[:, None]
    kind = style[cell[..., 0], cell[..., 1]][:, None] * 256
    light = np.where(down, 0.8 / (1 + 0.06 * far), (np.where(side, 0.75, 1.0) / (1 + 0.06 * depth))[:, None])
    picture = texture[np.where(down, 4 * 256 + on_floor, kind + on_wall)] * light[..., None].astype(np.float32)
    above = np.array([95, 150, 215]) + np.array([90, 60, 25]) * (1 + screen / tan).clip(0, 1)[:, None]  # (rows, 3)
    picture = np.where((height < -0.5)[..., None], above[:, None].astype(np.float32), picture)
    picture = picture.reshape(frames, size, 2, size, 2, 3).mean((2, 4))
    return dict(video=torch.from_numpy(np.rint(picture.clip(0, 255)).astype(np.uint8)).permute(0, 3, 1, 2))

def layered(size, layers, flow):
    """Rigid, textured rounded boxes over each other, bottom first.

    A layer: box (half width, half height, radius of the corners), pose (T, 3) as x, y, angle, colour (3,), waves
    (n, 3), strength of the texture. Returns video uint8 (T, 3, H, W), with flow=True also the exact forward flow
    (T-1, 2, H, W) and `visible` (T-1, H, W): the target lies in the picture and under no other layer.
    """
    local = lambda pose, x, y: (np.cos(pose[2]) * (x - pose[0]) + np.sin(pose[2]) * (y - pose[1]),
                                np.cos(pose[2]) * (y - pose[1]) - np.sin(pose[2]) * (x - pose[0]))
    def outside(box, x, y):  # signed distance to the box
        x, y = abs(x) - box[0], abs(y) - box[1]
        return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0) - box[2]

    u, v = np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32)[:, None]
    poses = [layer["pose"].T[..., None, None].astype(np.float32) for layer in layers]  # (3, T, 1, 1) each
    frames = poses[0].shape[1]
    picture, owner = np.zeros((frames, size, size, 3), np.float32), np.zeros((frames, size, size), np.int8)
    target = np.zeros((2, frames - 1, size, size), np.float32)
    for k, (layer, pose) in enumerate(zip(layers, poses)):
        x, y = local(pose, u, v)  # (T, H, W) each
        cover = (0.5 - outside(layer["box"], x, y)).clip(0, 1)
        t, i, j = np.nonzero(cover)  # a small layer touches few pixels
        x, y, cover = x[t, i, j], y[t, i, j], cover[t, i, j]
        wave = sum(np.sin(a * x + b * y + c) for a, b, c in layer["waves"].astype(np.float32)) / len(layer["waves"])
        colour = np.float32(layer["colour"]) * (1 + np.float32(layer["strength"]) * wave)[:, None]
        picture[t, i, j] += cover[:, None] * (colour - picture[t, i, j])
        if flow:
            on = (cover > 0.5) & (t < frames - 1)
            t, i, j, x, y, (cx, cy, angle) = t[on], i[on], j[on], x[on], y[on], pose[:, t[on] + 1, 0, 0]
            c, s = np.cos(angle), np.sin(angle)
            target[:, t, i, j] = c * x - s * y + cx, s * x + c * y + cy
            owner[t, i, j] = k
    found = dict(video=torch.from_numpy(np.rint(picture.clip(0, 255)).astype(np.uint8)).permute(0, 3, 1, 2))
    if flow:
        seen = (target > -0.5).all(0) & (target < size - 0.5).all(0)
        for k, (layer, pose) in enumerate(zip(layers, poses)):
            seen &= (owner[:-1] >= k) | (outside(layer["box"], *local(pose[:, 1:], *target)) > 0)
        target -= np.stack(np.broadcast_arrays(u, v))[:, None]
        found |= dict(flow=torch.from_numpy(target).transpose(0, 1), visible=torch.from_numpy(seen))
    return found

def texture(rng, size, low=3, high=16):
    """Five plane waves of `low` to `high` pixels a period (at 32 px): too many to look the same anywhere near."""
    angle, k = rng.uniform(0, 2 * np.pi, 5), 2 * np.pi / (rng.uniform(low, high, 5) * size / 32)
    return np.stack([k * np.cos(angle), k * np.sin(angle), rng.uniform(0, 6.3, 5)], 1)

def shapes(rng, size, frames, flow=False, speed=1.0, rough=1.0):
    """Motion in general: one to four textured boxes and discs, turning, over a background that may move itself."""
    t, unit, layers = np.arange(frames)[:, None], size / 32, []
    for k in range(1 + rng.integers(1, 5)):
        still = rng.uniform() < (0.5 if k == 0 else 0.15)
        velocity = np.append(rng.normal(size=2) * unit * speed * rng.uniform(0.1, 1), rng.normal() * 0.06)
        start = np.append(rng.uniform(0, size, 2), rng.uniform(0, 6.3))
        pose = start + (0 if still else 1) * velocity * (t + 0.02 * rng.normal() * t**2)
        side = rng.uniform(0, 7, 2) * (rng.uniform() < 0.7) * unit if k else (9e3, 9e3)
        layers.append(dict(box=(*side, rng.uniform(1, 5) * unit), pose=pose, colour=rng.uniform(30, 225, 3),
                           waves=texture(rng, size), strength=rough * rng.uniform(0.4, 1.2)))
    return layered(size, layers, flow)

def robot(rng, size, frames, flow=False, make="one", clock=None):
    """An arm with a gripper reaches for a coloured block on a table and pushes it onto a mark, in one smooth move each.

    make: the same arm in every clip, as in a lab, or "any", of another colour and at another place in each. clock:
    when the frames are, 0 is the start and 1 the end; None: evenly. All that decides the motion is to be seen in the
    first frame. Returns as layered().
    """
    S, still = float(size), lambda x, y, angle=0.0: np.tile([x, y, angle], (frames, 1))
    smooth = lambda a: (10 * a**3 - 15 * a**4 + 6 * a**5)[:, None]  # no jerk at either end
    clock = np.linspace(0, 1, frames) if clock is None else clock
    reach, push = smooth((clock / 0.45).clip(0, 1)), smooth(((clock - 0.45) / 0.55).clip(0, 1))
    way, side = rng.choice([-1, 1]), 0.085 * S
    block = np.array([0.5 - way * rng.uniform(0.08, 0.22), rng.uniform(0.68, 0.84)]) * S
    goal = block + np.array([way * rng.uniform(0.26, 0.4), rng.uniform(-0.06, 0.06)]) * S
    home = np.array([rng.uniform(0.2, 0.8), rng.uniform(0.38, 0.48)]) * S
    touch = block - np.array([way * (side + 0.05 * S), 0])
    tip = home + reach * (touch - home) + push * (goal - block)  # (T, 2)
    base = np.array([0.5 if make == "one" else rng.uniform(0.25, 0.75), -0.12]) * S
    wrist, long = tip - np.array([0, 0.17 * S]), 0.47 * S
    apart = wrist - base
    bend = np.arccos((np.hypot(*apart.T) / (2 * long)).clip(0, 1)) * (1 if base[0] <= S / 2 else -1)
    upper = np.arctan2(apart[:, 1], apart[:, 0]) + bend
    elbow = base + long * np.stack([np.cos(upper), np.sin(upper)], 1)
    lower = np.arctan2(*(wrist - elbow).T[::-1])
    at = lambda p, angle=0.0: np.column_stack([p, np.broadcast_to(angle, frames)])
    paint, steel, dark = rng.uniform(40, 230, 3), np.array([205, 205, 210.0]), np.array([70, 70, 80.0])
    arm = np.array([[235, 120, 40], [225, 225, 230], [70, 110, 200], [235, 190, 50]])
    arm = arm[0 if make == "one" else rng.integers(4)]
    bands = lambda period: np.array([[2 * np.pi / (period * S), 0, rng.uniform(0, 6.3)]])
    part = lambda box, pose, colour, waves, strength=0.3: dict(box=tuple(S * b for b in box), pose=pose, colour=colour,
                                                               waves=waves, strength=strength)
    return layered(size, [
        part((9, 9, 0), still(0, 0), rng.uniform(120, 190, 3), texture(rng, size), 0.12),  # wall
        part((9, 9, 0), still(0, 9.52 * S), rng.uniform(0.5, 1, 3) * [190, 150, 110], texture(rng, S), 0.25),  # table
        part((0, 0, 0.1), still(*goal), 0.6 * paint + 90, texture(rng, size), 0.1),  # mark
        part((0, 0, 0.055), still(*goal), 0.3 * paint, texture(rng, size), 0.1),
        part((0.075, 0.075, 0.01), at(block + push * (goal - block)), paint, texture(rng, size, 6, 14), 0.35),  # block
        part((long / 2 / S, 0, 0.075), at((base + elbow) / 2, upper), arm, bands(0.35)),
        part((0, 0, 0.085), at(elbow, upper), dark, bands(0.3)),
        part((long / 2 / S, 0, 0.06), at((elbow + wrist) / 2, lower), arm * 0.85, bands(0.3)),
        part((0.08, 0.025, 0.02), at(wrist), dark, bands(0.2)),  # gripper
        part((0.015, 0.07, 0.02), at(wrist + [-0.055 * S, 0.09 * S]), steel, bands(0.2)),
        part((0.015, 0.07, 0.02), at(wrist + [0.055 * S, 0.09 * S]), steel, bands(0.2))], flow)

COLOURS = {"red": (225, 55, 50), "green": (60, 190, 70), "blue": (60, 95, 230), "yellow": (230, 200, 40)}
FORMS = {"circle": (0, 0, 0.2), "square": (0.13, 0.13, 0.01), "bar": (0.24, 0.07, 0.01)}  # box of layered(), widths
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FLAWS = ("jumps", "jitters", "flickers", "changes")

def sprites(rng, size, frames, flow=False, steady=0.65, worded=0.5):
    """A textured shape crosses a textured background as its caption says; not all do so steadily.

    Of the clips a share `steady` is; the others have a flaw: the shape jumps, jitters, flickers or changes its colour.
    A share `worded` says so, truthfully. Returns as layered(), and caption ('a red circle moving left, steady'), flaw.
    """
    form, colour, way = (str(rng.choice(list(names))) for names in (FORMS, COLOURS, WAYS))
    flaw = "" if rng.uniform() < steady else str(rng.choice(FLAWS))
    step, margin = np.array(WAYS[way]), 0.25
    path = rng.uniform(0.36, 0.48)  # of the width: what decides where a shape can start, so that it stays in view
    start = margin + rng.uniform(size=2) * (1 - 2 * margin - path * abs(step)) + path * (step < 0)
    at = start + np.linspace(0, path, frames)[:, None] * step  # (T, 2), widths
    hue, here = [colour] * frames, np.ones(frames, bool)
    when = rng.integers(frames // 2 + 1, max(frames - 1, frames // 2 + 2))
    if flaw == "jumps":
        at[when - 1:] += abs(step[::-1]) * 0.32 * np.where(at[0] < 0.5, 1, -1)
    elif flaw == "jitters":
        at = (at + rng.uniform(-0.16, 0.16, at.shape)).clip(0.8 * margin, 1 - 0.8 * margin)
    elif flaw == "flickers":
        here[rng.choice(np.arange(1, frames), rng.integers(frames // 4, frames // 2), replace=False)] = False
    elif flaw == "changes":
        hue[when:] = [str(rng.choice([c for c in COLOURS if c != colour]))] * (frames - when)
    place = lambda seen: np.column_stack([np.where(seen[:, None], at * size - 0.5, 9e3), np.zeros(frames)])
    ground = dict(box=(9e3, 9e3, 1), pose=np.zeros((frames, 3)), colour=np.full(3, rng.uniform(70, 150)),
                  waves=texture(rng, size, 8, 24), strength=0.3)
    waves = texture(rng, size, 6, 12)
    found = layered(size, [ground] + [dict(box=tuple(size * b for b in FORMS[form]), strength=0.25, waves=waves,
                                           colour=np.array(COLOURS[c]), pose=place(here & (np.array(hue) == c)))
                                      for c in dict.fromkeys(hue)], flow)
    quality = (", shaky" if flaw else ", steady") if rng.uniform() < worded else ""
    return found | dict(caption=f"a {colour} {form} moving {way}{quality}", flaw=flaw)

def track(video):
    """What is to be seen in clips of `sprites`, uint8 (N, T, 3, H, W): centre (N, T, 2) in pixels, area (N, T) of the
    shape in pixels, hue (N, T) and form (N,) as indices of COLOURS and FORMS, solid (N, T, H, W): where it is."""
    x, size = video.float() / 255, video.shape[-1]
    solid = ((x.amax(2) - x.amin(2) - 0.15) / 0.2).clamp(0, 1)  # the background is grey
    area = solid.sum((2, 3))
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy"), -1).to(x)  # (H, W, 2)
    share = solid / area.clamp(min=1e-6)[..., None, None]
    centre = torch.einsum("nthw,hwc->ntc", share, grid)
    unit = lambda c: F.normalize(c - c.mean(-1, keepdim=True), dim=-1)
    palette = unit(torch.tensor(list(COLOURS.values())).to(x))  # (colours, 3)
    hue = (unit(torch.einsum("nthw,ntchw->ntc", share, x)) @ palette.T).argmax(-1)
    boxes = size * torch.tensor(list(FORMS.values())).to(x)[:, None, None, None, None]  # (forms, 1, 1, 1, 1, 3)
    far = (grid - centre[:, :, None, None]).abs() - boxes[..., :2]  # (forms, N, T, H, W, 2)
    outside = far.clamp(min=0).norm(dim=-1) + far.amax(-1).clamp(max=0) - boxes[..., 2]
    miss = ((0.5 - outside).clamp(0, 1) - solid).square().sum((-1, -2))  # (forms, N, T)
    return dict(centre=centre, area=area, hue=hue, form=miss.median(-1).values.argmin(0), solid=solid)

def coherent(found):
    """Which clips move as one thing, bool (N,): no sudden move, and the shape keeps its size and its colour."""
    size, area = found["solid"].shape[-1], found["area"]
    sudden = found["centre"].diff(dim=1).diff(dim=1).norm(dim=-1).amax(1)  # pixels a frame^2
    ratio = area / area.median(1, keepdim=True).values.clamp(min=1e-6)
    whole = (ratio > 0.55).all(1) & (ratio < 1 / 0.55).all(1) & (area > 0.02 * size**2).all(1)
    return whole & (sudden < 0.14 * size) & (found["hue"] == found["hue"][:, :1]).all(1)

def judge(video, text):
    """What is true of clips of `sprites`, by tracking: uint8 (N, T, 3, H, W), [(colour, form, way)] -> dict of (N,)."""
    found = track(video)
    way = torch.tensor(list(WAYS.values())).float()
    moved = found["centre"][:, -1] - found["centre"][:, 0]
    said = lambda names, k: torch.tensor([list(names).index(words[k]) for words in text])
    colour, form = found["hue"].median(1).values == said(COLOURS, 0), found["form"] == said(FORMS, 1)
    towards = ((moved @ way.T).argmax(1) == said(WAYS, 2)) & (moved.norm(dim=1) > 0.1 * video.shape[-1])
    still = (found["solid"] == 0)[:, 1:] & (found["solid"] == 0)[:, :-1]  # (N, T - 1, H, W), background
    change = video.float().diff(dim=1).abs().mean(2) * still
    return dict(coherent=coherent(found).float(), colour=colour.float(), form=form.float(), way=towards.float(),
                prompt=(colour & form & towards).float(), speed=moved.norm(dim=1) / (video.shape[1] - 1),
                flicker=change.sum((1, 2, 3)) / still.sum((1, 2, 3)))

def consistency(video):
    """VBench's subject and background consistency, (N,) twice, 1 at best: cosine similarity of every frame to the first
    and to the one before, of the tracked shape and of what is behind it (VBench: of DINO and CLIP features)."""
    found, x, W = track(video), video.float() / 255 - 0.5, video.shape[-1]
    solid = found["solid"][:, :, None]
    window = torch.stack(torch.meshgrid(*[torch.linspace(-0.5, 0.5, 8)] * 2, indexing="xy"), -1)  # half the frame
    at = ((2 * found["centre"] + 1) / W - 1).flatten(0, 1)[:, None, None]  # (N T, 1, 1, 2), in [-1, 1]
    shape = F.grid_sample((x * solid).flatten(0, 1), at + window, align_corners=False).view(*x.shape[:2], -1)
    ground = ((x - x.mean((3, 4), keepdim=True)) * (solid < 0.1)).flatten(2)
    like_others = lambda v: (F.cosine_similarity(v[:, 1:], v[:, :1], dim=2).mean(1)
                             + F.cosine_similarity(v[:, 1:], v[:, :-1], dim=2).mean(1)) / 2
    return like_others(shape), like_others(ground)

def score(rows, videos, prompts, others=()):
    """What tracking says of every method's clips, for prompts of `sprites`, into rows; with 95 % intervals of how many
    more clips are coherent than those of the methods `others`. Returns the judgements, {method: dict of (N,)}."""
    text = [words_of(p)[1:3] + words_of(p)[4:5] for p in prompts]  # "a red circle moving left"
    found = {name: judge(video, text) for name, video in videos.items()}
    for row in rows:
        f, (subject, ground) = found[row["method"]], consistency(videos[row["method"]])
        steady, against = f["coherent"] == 1, lambda other: bootstrap(f["coherent"] - found[other]["coherent"])
        row |= {k: f[k].mean().item() for k in ("coherent", "colour", "form", "way")} | dict(
            prompt_acc=f["prompt"].mean().item(), flicker=f["flicker"].nanmean().item(),
            subject_consistency=subject.mean().item(), background_consistency=ground.mean().item(),
            dynamic_degree=f["speed"][steady].median().item() if steady.any() else None)
        for other in others:
            row["coherent_ci" + f"_{other}" * (other != "base")] = against(other) \
                if other in found and other != row["method"] else None
    return found

def words_of(caption):
    return re.findall(r"[a-z0-9]+", caption.lower())

def encode(captions, vocabulary, length):
    """Captions -> word indices (N, L), 0 where there is none or an unknown one; what is too long is cut off."""
    index = {w: k for k, w in enumerate(vocabulary, 1)}
    rows = [[index.get(w, 0) for w in words_of(c)][:length] for c in captions]
    return torch.tensor([r + [0] * (length - len(r)) for r in rows])

def plain(caption):
    """A caption of `sprites` without its word of quality; any other as it is."""
    return re.sub(", (steady|shaky)$", "", caption)

WORLDS = {"sky": sky, "mazes": mazes, "shapes": shapes, "robot": robot, "sprites": sprites}

# ---------------------------------------------------------------------------------------------- training
def moments(clips):
    """Mean and deviation of the pixels of (some of the) clips, in [-1, 1], for normalise()."""
    some = to_float(torch.cat([clips.frames(k) for k in range(min(200, len(clips)))]))
    return some.mean().item(), some.std().item()

def normalise(clips, moments):
    """uint8 (B, T, 3, H, W) -> (B, 3, T, H, W) of mean 0 and variance 1."""
    return ((to_float(clips) - moments[0]) / moments[1]).transpose(1, 2)

def dice(seed, use, step):
    """Random numbers as a function of (seed, use, step) alone, so that a resumed run goes on as it was."""
    mixed = np.random.SeedSequence([seed, use, step]).generate_state(1)  # of a seed torch heeds 32 bits and no more
    return torch.Generator().manual_seed(int(mixed[0]))

def averaged(net, decay):
    """The average of a network's weights over training, to sample from."""
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))

def descend(loss, net, optimiser, share=1.0, average=None):
    """A training step: the gradient cut to length 1, every group at `share` of the rate it was made with."""
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for group in optimiser.param_groups:
        group["lr"] = share * group.setdefault("initial_lr", group["lr"])
    optimiser.step()
    if average:
        average.update_parameters(net)

def warm_decay(k, until):
    """The share at step k: up over 100 steps, and down to 1 % over the last 40 % of `until`."""
    return min(1, k / 100, 0.01 + (until - k) / (0.4 * until))

def pretrained(make, flag, instead):
    """A network of torchvision with its best weights: make(weights="DEFAULT"). Raises Fault if they cannot be had."""
    try:
        return make(weights="DEFAULT")
    except OSError as e:  # URLError is one
        raise Fault(f"{flag}: its weights cannot be downloaded ({e}); use {instead}")

# ---------------------------------------------------------------------------------------------- noise levels
def like(s, x):
    """Per-sample scalars s (B,) shaped to broadcast over x (B, ...)."""
    return s.view(-1, *[1] * (x.ndim - 1))

def to_float(frames):
    """uint8 -> float in [-1, 1]."""
    return frames.float() / 127.5 - 1

def to_uint8(x):
    """float in [-1, 1], clamped to it -> uint8 in main memory."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

def edm_weight(sigma, data=1.0):
    """lambda(sigma) = (sigma^2 + data^2) / (sigma data)^2, (B,): EDM (Karras et al. 2022), Tab. 1; data: its std."""
    return (sigma**2 + data**2) / (sigma * data) ** 2

def edm_denoise(network, x, sigma, data=1.0):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM Eq. 7. network(x, c_noise (B,)) -> like x; sigma (B,)."""
    total = (sigma**2 + data**2).sqrt()
    c_skip, c_out, c_in, c_noise = data**2 / total**2, sigma * data / total, 1 / total, sigma.log() / 4  # EDM Tab. 1
    return like(c_skip, x) * x + like(c_out, x) * network(like(c_in, x) * x, c_noise)

def karras_sigmas(steps, low=0.002, high=80.0, rho=7.0):
    """Noise levels of a sampler, from high to low, then 0: (steps + 1,). EDM Eq. 5."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1)]).float()

def sample_edm(denoise, x, sigmas, heun=True):
    """EDM's deterministic sampler (Algorithm 1), Heun's or Euler's steps: x = sigmas[0] n (B, ...) -> x at sigmas[-1].

    denoise(x, sigma (B,)) -> D(x; sigma), like x. Heun takes two evaluations a step, but one for the last, to 0.
    """
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        slope = (x - denoise(x, x.new_full((len(x),), now))) / now  # dx/dsigma, EDM Eq. 3
        euler = x + (then - now) * slope
        if heun and then > 0:
            slope = (slope + (euler - denoise(euler, x.new_full((len(x),), then))) / then) / 2
        x = x + (then - now) * slope
    return x

# ---------------------------------------------------------------------------------------------- Frechet distance
def own_features(video):
    """Fixed, seeded, motion-sensitive features of short clips: uint8 (N, T > 4, 3, H, W) -> (N, 46) float64.

    Log-energies of six random filters on the frames, on what changes from one frame to the next, and over four frames;
    how far change correlates with the gradients (the direction of motion); colour means and spreads; at two scales. A
    change of 1 is a factor e. Energies below (4 grey levels)^2, which nobody sees, count as none.
    """
    bank = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(video.device)
    bank = (bank - bank.mean((2, 3), keepdim=True)) / 75**0.5  # blind to brightness
    x, out, unseen = to_float(video), [], 1e-3
    out += [4 * x.mean((1, 3, 4)), 4 * x.std((1, 3, 4))]  # (N, 3) each
    for _ in range(2):
        for signal in (x, x[:, 1:] - x[:, :-1], x[:, 4:] - x[:, :-4]):
            response = F.conv2d(signal.flatten(0, 1), bank).unflatten(0, signal.shape[:2])
            out.append((unseen + response.square().mean((3, 4))).log().mean(1))  # (N, 6)
        dt, gx, gy = x.diff(dim=1)[..., 1:, 1:], x.diff(dim=-1)[:, :-1, ..., 1:, :], x.diff(dim=-2)[:, :-1, ..., 1:]
        energy = lambda a: a.square().mean((1, 2, 3, 4)) + unseen
        out += [2 * ((dt * g).mean((1, 2, 3, 4)) / (energy(dt) * energy(g)).sqrt())[:, None] for g in (gx, gy)]
        x = F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
    return torch.cat(out, 1).cpu().double()  # MPS has no float64

def frechet(a, b):
    """Frechet distance of two sets of features (N, D), (M, D): |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    w, v = torch.linalg.eigh(cov_a)
    root = (v * w.clamp(min=0).sqrt()) @ v.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # tr (C_a C_b)^(1/2)
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)

def cut(videos, length):
    """Non-overlapping clips of `length` frames: (N, T, ...) -> (N * (T // length), length, ...)."""
    n = videos.shape[1] // length
    return videos[:, :n * length].unflatten(1, (n, length)).flatten(0, 1)

# ---------------------------------------------------------------------------------------------- statistics
def smoothness(video):
    """VBench's idea of motion smoothness, (N,), 1 at best: how well a frame is the mean of its neighbours (VBench uses
    an interpolation network instead of the mean). uint8 (N, T, 3, H, W)."""
    x = video.float() / 255
    return 1 - (x[:, 1:-1] - (x[:, 2:] + x[:, :-2]) / 2).abs().flatten(1).mean(1)

def bootstrap(difference, draws=10000):
    """95 % interval of the mean of paired differences (N,), by resampling pairs."""
    rng, x = np.random.default_rng(0), np.asarray(difference, float)
    means = x[rng.integers(len(x), size=(draws, len(x)))].mean(1)
    return [round(float(q), 4) for q in np.percentile(means, [2.5, 97.5])]

def auc(value, positive):
    """Chance that a positive one has the larger value: (N,), bool (N,). Ties count half; nan if one kind is missing."""
    a, b = value[positive], value[~positive]
    return ((a[:, None] > b).double() + (a[:, None] == b).double() / 2).mean().item() if len(a) and len(b) else math.nan

def calibration(real, fake, bins=5):
    """Mean phi and share of real pairs, of pairs sorted by phi into bins of equal size: [(phi, share), ...]."""
    phi = torch.cat([real.flatten(), fake.flatten()])
    truth = torch.cat([torch.ones(real.numel()), torch.zeros(fake.numel())])[phi.argsort()]
    return [(p.mean().item(), q.mean().item()) for p, q in zip(phi.sort().values.chunk(bins), truth.chunk(bins))]

# ---------------------------------------------------------------------------------------------- what a run writes
def open_run(script, cfg, source):
    """The output folder, locked for this run; a folder with an earlier run is never overwritten. Raises Fault."""
    name = re.sub(r"[^\w.-]+", "_", Path(cfg.dataset).name) + ("-procedural" if source == "procedural" else "")
    out = Path(cfg.out_dir or f"out/{script}-{name}")
    again, kept = cfg.resume or cfg.eval_only, (out / "ckpt.pt").exists()
    if kept and not again:
        raise Fault(f"{out} holds an earlier run: --resume continues it, --eval_only repeats its evaluation, "
                    "--out_dir names another folder")
    if again and not kept:
        raise Fault(f"nothing to continue: {out / 'ckpt.pt'} is not there; run once without --resume and --eval_only")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Fault(f"{out} is in use by another run; give --out_dir another folder")
    except OSError as e:
        raise Fault(f"cannot write to {out}: {e.strerror}; give --out_dir another folder")
    if not again:
        write(out / "config.json", json.dumps(asdict(cfg), indent=1))
    return out, lock

def write(path, data):
    """Write text or, through a callable, anything to a temporary file and rename it: never half a one. Raises Fault."""
    part = path.with_name(f".{path.name}.part")
    try:
        if callable(data):
            data(part)
        else:
            part.write_text(data)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        raise Fault(f"cannot write {path}: {str(e).splitlines()[0]}; what was there before is intact")

def save_checkpoint(path, script, cfg, **state):
    write(path, lambda p: torch.save(dict(state, script=script, config=asdict(cfg)), p))

def load_checkpoint(path, script, cfg, must_fit):
    """A checkpoint of this script whose config fits in the fields `must_fit`; no code in it is run. Raises Fault."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # load_state_dict moves what it needs
        made_by, made_with = state["script"], state["config"]
    except Exception as e:  # truncated, garbage, a pickle with code: each raises something else
        raise Fault(f"{path} is not a readable checkpoint ({type(e).__name__}); delete it or name another --out_dir")
    if made_by != script:
        raise Fault(f"{path} was written by {made_by}.py, not {script}.py")
    for k in must_fit:
        if made_with.get(k) != getattr(cfg, k):
            raise Fault(f"{path} was trained with --{k} {made_with.get(k)}, this run has {getattr(cfg, k)}; "
                        f"use the same value or another --out_dir")
    return state

def as_csv(rows):
    """Rows (dicts with the same keys) as CSV text."""
    text = lambda v: f"{v:.6g}" if isinstance(v, float) else str(v)
    return "".join(",".join(map(text, r)) + "\n" for r in [list(rows[0]), *(r.values() for r in rows)]) if rows else ""

@contextmanager
def interruptible():
    """Inside the block Ctrl-C (or SIGTERM) only sets the yielded list's item 0, so that the loop can save between two
    steps; a second Ctrl-C stops at once."""
    hit = [False]

    def note(number, frame):
        if hit[0]:
            raise KeyboardInterrupt
        hit[0] = True

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield hit
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)

def load_stages(path, script, cfg, must_fit, same_training, last):
    """The checkpoint that stage() goes on from: empty, or with --resume and --eval_only what is there. Raises Fault.

    last: name and steps of the last stage, which --eval_only needs to be complete."""
    if not (cfg.resume or cfg.eval_only):
        return {"log": []}
    saved = load_checkpoint(path, script, cfg, must_fit + (same_training if cfg.resume else ()))
    done = saved.get(last[0], {}).get("step", 0)
    if cfg.eval_only and done != last[1]:
        raise Fault(f"{path} has {done} steps of stage {last[0]}, not {last[1]}: --resume makes the missing ones; "
                    "of a finished run give the number it has")
    return {k: v for k, v in saved.items() if k not in ("script", "config")}

def stage(script, cfg, out, saved, clips, columns, name, until, parts, make, step, watch=()):
    """Run step(k, make(k)) -> {loss: scalar tensor} for every k up to `until` not done yet; saves; ends at Ctrl-C.

    parts: what has a state_dict. saved: the checkpoint, {name: {step, parts}, "log": rows}. columns: the losses of all
    stages, for the log. make, clips: as in ahead(); None: the step needs no data. watch: further steps to save at.
    Raises Fault if a loss is not finite, before it saves.
    """
    done = saved.get(name, {}).get("step", 0)
    for k, part in parts.items() if done else ():
        part.load_state_dict(saved[name]["parts"][k])
    bar, recent, began = tqdm(total=until, initial=done, desc=name), [], time.time()
    with interruptible() as interrupted:
        steps = range(done + 1, until + 1)
        for k, data in zip(steps, ahead(make, steps, cfg.device, clips) if make else steps):
            losses = step(k, data)
            recent.append(torch.stack([v.detach() for v in losses.values()]))
            if k % 25 and k != until and k not in watch and not interrupted[0]:
                continue  # reading the loss more often would stall a GPU
            values = torch.stack(recent).cpu()
            broken = (~values.isfinite()).nonzero()
            if len(broken):
                when, which = k - len(values) + 1 + int(broken[0, 0]), list(losses)[broken[0, 1]]
                raise Fault(f"the loss {which} of stage {name} is not finite at step {when}; try a lower "
                            f"learning rate; {out / 'ckpt.pt'} is as it was before")
            means = dict(zip(losses, values.mean(0).tolist()))
            saved["log"].append({"stage": name, "step": k} | {n: means.get(n, "") for n in columns}
                                | {"seconds": round(time.time() - began, 2)})
            bar.set_postfix({n: f"{v:.4f}" for n, v in means.items()}, refresh=False)
            bar.update(k - bar.n)
            recent = []
            if k % 500 == 0 or k == until or k in watch or interrupted[0]:
                saved[name] = dict(step=k, parts={n: part.state_dict() for n, part in parts.items()})
                save_checkpoint(out / "ckpt.pt", script, cfg, **saved)
                write(out / "log.csv", as_csv(saved["log"]))
            if interrupted[0]:
                raise KeyboardInterrupt
    bar.close()

def write_results(out, script, cfg, dataset, rows, started, **more):
    write(out / "results.json", json.dumps(dict(
        script=script, command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), preset=cfg.preset, seed=cfg.seed,
        device=str(cfg.device), torch=torch.__version__, wall_s=round(time.time() - started, 1), dataset=dataset,
        rows=rows, **more), indent=1))

def table(rows, columns):
    """Rows (dicts) as aligned text; columns maps a row key to (heading, format)."""
    cells = [[h for h, _ in columns.values()]]
    cells += [["-" if r.get(k) is None else format(r[k], f) for k, (_, f) in columns.items()] for r in rows]
    widths = [max(map(len, c)) for c in zip(*cells)]
    return "\n".join("  ".join(f"{c:{'>' if k else '<'}{w}}" for k, (c, w) in enumerate(zip(r, widths))) for r in cells)

def sheet(rows, heads, scale=2, left=90):
    """A labelled contact sheet: rows of (label, uint8 (N, 3, H, W)), heads over the columns -> PIL image."""
    size, n = rows[0][1].shape[-1] * scale, max(len(r[1]) for r in rows)
    page = Image.new("RGB", (left + n * (size + 2), 16 + len(rows) * (size + 2)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for k, h in enumerate(heads):
        draw.text((left + k * (size + 2), 1), str(h), "black", font)
    for r, (label, frames) in enumerate(rows):
        draw.multiline_text((2, 18 + r * (size + 2)), label, "black", font)
        for k, f in enumerate(frames):
            image = Image.fromarray(f.permute(1, 2, 0).cpu().numpy()).resize((size, size), Image.NEAREST)
            page.paste(image, (left + k * (size + 2), 16 + r * (size + 2)))
    return page

def save_page(path, page):
    write(path, lambda p: page.save(p, "PNG"))

def save_gif(path, pages, ms=80):
    write(path, lambda p: pages[0].save(p, "GIF", save_all=True, append_images=pages[1:], duration=ms, loop=0))

INKS = ["#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#7f7f7f", "#e377c2", "#bcbd22",
        "#222222", "#5254a3"]

def ticks(low, high, log):
    """Round values in [low, high], three to six of them: on a log scale powers of ten, or 1, 2 and 5 times those."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 2, 5)):
            found = [d * 10.0**n for n in powers for d in digits if low <= d * 10.0**n <= high]
            if len(found) >= 3:
                return found[::math.ceil(len(found) / 6)]
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next(f for f in (0.2, 0.5, 1, 2) if high - low <= 6 * f * step)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

def save_curves(path, panels, size=(840, 520), across=2):
    """Line charts. A panel: dict(title, x, y, lines={label: (xs, ys)}, log=False, log_x=False); one point is a dot."""
    across, down = min(across, len(panels)), -(-len(panels) // across)
    labels = list(dict.fromkeys(label for panel in panels for label in panel["lines"]))  # one ink in all panels
    page = Image.new("RGB", (size[0] * across, size[1] * down), "white")  # twice as large as it is shown: smooth lines
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(22)
    for k, panel in enumerate(panels):
        lines, log, log_x = panel["lines"], panel.get("log", False), panel.get("log_x", False)
        above, edge = k // across * size[1], k % across * size[0]
        x0, y0, y1 = edge + 90, above + size[1] - 84, above + 76  # the frame, its labels to the right of it
        x1 = edge + size[0] - 32 - max([draw.textlength(label, font) for label in lines], default=0)
        drawn = {label: [(x, max(y, 1e-9) if log else y) for x, y in zip(xs, ys) if math.isfinite(y)]
                 for label, (xs, ys) in lines.items()}
        points = sum(drawn.values(), []) or [(1.0, 1.0)]
        ranges = [(min(v), max(v) if max(v) > min(v) else min(v) + (abs(min(v)) or 1.0)) for v in zip(*points)]
        share = lambda v, low, high, log: math.log(v / low, high / low) if log else (v - low) / (high - low)
        at_x = lambda x: x0 + 12 + share(x, *ranges[0], log_x) * (x1 - x0 - 24)
        at_y = lambda y: y0 - 12 - share(y, *ranges[1], log) * (y0 - y1 - 24)
        draw.text((edge + 16, above + 8), panel["title"], "black", font)
        draw.text((edge + 16, above + 38), panel["y"], "#777777", font)
        draw.text(((x0 + x1) / 2, y0 + 40), panel["x"], "#777777", font, anchor="ma")
        for x in ticks(*ranges[0], log_x):
            draw.line((at_x(x), y1, at_x(x), y0), "#e6e6e6", 2)
            draw.text((at_x(x), y0 + 8), f"{x:.5g}", "black", font, anchor="ma")
        for y in ticks(*ranges[1], log):
            draw.line((x0, at_y(y), x1, at_y(y)), "#e6e6e6", 2)
            draw.text((x0 - 8, at_y(y)), f"{y:.5g}", "black", font, anchor="rm")
        draw.rectangle((x0, y1, x1, y0), outline="#999999", width=2)
        for n, (label, line) in enumerate(drawn.items()):
            ink, path_ = INKS[labels.index(label) % len(INKS)], [(at_x(x), at_y(y)) for x, y in line]
            draw.line(path_, ink, 4, joint="curve")
            for x, y in path_ if len(path_) <= 20 else ():
                draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=ink)
            draw.text((x1 + 12, y1 + 28 * n), label, ink, font)
    save_page(path, page)
