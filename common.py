"""What the four scripts share: the command line, clips (real folders and procedural worlds),
helpers for noise levels, and what a run writes.

Tensors: video (B, C, T, H, W) and frame (B, C, H, W), float in [-1, 1]; a stored clip is uint8
(T, 3, H, W). Flow (2, H, W) in pixels, x (right) first, then y (down): frame2(p + flow(p)) =
frame1(p).
"""
import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

FORMAT = 3  # of config.json, checkpoints and results.json; another number cannot be read

class Fault(Exception):
    """Something the user can mend: shown as one line, exit status 2."""

# ---------------------------------------- command line

def opt(default, help, low=None, high=None, free=False):
    """A Config field: default, line in --help, what it may be; free: may change on --resume."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, free=free))

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(f"{message}; --help lists every flag")

def parse_args(script, Config, presets, doc, argv=None):
    """Config from the command line, over the preset, over the defaults. Raises Fault.

    With --resume or --eval_only the settings of the run in the output folder take the place of the
    preset, and a flag that would change what was trained is refused.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=doc, formatter_class=raw, allow_abbrev=False)
    for f in fields(Config):
        how = dict(type=f.type)
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)  # --amp, --no-amp
        help = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, str):
            if not value.strip():  # a shell's variable that is not set
                raise Fault(f"--{name} {value!r} is empty: leave the flag out, or say what")
            given[name] = os.path.expanduser(value)  # no shell does it in --flag=~

    preset = given.get("preset", Config.preset)
    if given.get("resume") or given.get("eval_only"):
        cfg = settings_of_run(script, Config, given)
    elif preset in presets:
        cfg = Config(**{**presets[preset], **given})
    else:
        raise Fault(f"--preset {preset}: unknown; choose one of {', '.join(presets)}")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        low = f.metadata["low"]
        high = f.metadata["high"]
        if low is not None and not low <= value <= high:  # refuses nan, too
            raise Fault(f"--{f.name} {value}: must lie between {low} and {high}")
    return cfg

def settings_of_run(script, Config, given):
    """The Config of the run in the output folder, with the flags given that may change."""
    out = find_run(script, given.get("dataset", Config.dataset), given.get("out_dir", ""))
    if out is None:
        raise Fault(f"nothing to continue: {given.get('out_dir', 'out/')} holds no run of "
                    f"{script}.py; --out_dir names another folder")
    saved = read_config(out, script)["config"]
    for f in fields(Config):
        if f.name in given and not f.metadata["free"] and given[f.name] != saved[f.name]:
            raise Fault(f"--{f.name} {given[f.name]}: the run in {out} was trained with "
                        f"{saved[f.name]}; leave the flag out, or name another --out_dir")
    return Config(**{**saved, **given, "out_dir": str(out)})

def check_list(cfg, name, kind, low, high):
    """A field of numbers with commas between them: all in [low, high], else Fault."""
    text = getattr(cfg, name)
    try:
        fits = all(low <= kind(v) <= high for v in text.split(","))
    except ValueError:
        fits = False
    if not fits:
        raise Fault(f"--{name} {text}: must be numbers between {low} and {high}, with commas")

def run(main):
    """Call main(); a Fault or Ctrl-C ends in one line instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # letters that a terminal lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (Fault, FloatingPointError) as e:
        tqdm.write(f"error: {e}", file=sys.stderr)  # on a line of its own, below any bar
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write("interrupted; what was saved is intact: --resume goes on", file=sys.stderr)
        sys.exit(130)

def pick_device(name):
    """The device of this name; 'auto': cuda if it is there, else cpu. Raises Fault."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = re.split(r"\n|\. ", str(e))[0]  # torch lists all it knows
        raise Fault(f"--device {name} cannot be used here ({reason}); try --device cpu")
    if name.startswith("mps"):
        print("warning: never tried on mps, which lacks the backward of grid_sample and, before "
              "torch 2.8, ConvTranspose3d", file=sys.stderr)
    return torch.device(name)

# ---------------------------------------- real clips
# What is not surely read right is refused; a clip that is broken is left out, and named.

IMAGES = ".jpg .jpeg .png .webp".split()
ARRAYS = ".npy .pt".split()
OTHERS = (".avif .bmp .dng .exr .heic .heif .jfif .jp2 .jpe .jxl .npz .pgm .ppm .tga .tif .tiff "
          ".avi .m4v .mkv .mov .mp4 .mpg .webm .wmv").split()
FOLDERS = {
    "sky": ["sky_timelapse"], "mazes": ["gqn_mazes"], "minerl": ["minerl_navigate"],
    "carla": ["carla_no_traffic"], "biking": ["mountain_biking"], "riding": ["horseback_riding"],
}
HELD = 1 << 30  # bytes of frames in memory; what is beyond is read when it is needed
NUMBER = r"((?:(?<![^\W_])-)?\d+(?:\.\d+)?)"  # -1 in t_-1.png, but 1 in take-1.png

def natural(name):
    """A sort key: frame_2 comes before frame_10, 0.25 before 0.5, and -1 before 0."""
    parts = re.split(NUMBER, name.lower())
    parts[1::2] = [Decimal(number) for number in parts[1::2]]
    return parts, name

def _is_clip(path):
    suffix = path.suffix.lower()
    if suffix != ".webp" or not path.is_file():
        return suffix == ".gif" or suffix in ARRAYS
    with open(path, "rb") as file:
        head = file.read(21)
    return head[12:16] == b"VP8X" and head[-1] & 2 == 2  # the bit for animation

def _stop(error):
    raise Fault(f"a folder cannot be read: {error}")

def _find(root):
    """The files of every clip below a folder, by its name. Raises Fault."""
    found = {}
    seen = set(root.resolve().parents)  # a link may lead back up
    for folder, below, names in os.walk(root, onerror=_stop, followlinks=True):
        below[:] = sorted(n for n in below if n[0] not in ".@")
        if Path(folder).resolve() in seen:
            below.clear()
            continue
        seen.add(Path(folder).resolve())
        frames = []
        kinds = set()
        for path in [Path(folder, n) for n in sorted(names, key=natural) if n[0] != "."]:
            suffix = path.suffix.lower()
            bare = path.with_suffix("")
            if suffix in OTHERS and not bare.is_dir():
                to = str(bare).replace("%", "%%")
                raise Fault(f"{path} is not read: save pictures as png, arrays as uint8 .npy, a "
                            f'video by mkdir "{bare}" && ffmpeg -i "{path}" "{to}/%05d.png"')
            if _is_clip(path):
                found[path.relative_to(root).as_posix()] = [path]
                kinds.add(f"clips #{suffix}")
            elif suffix in IMAGES:
                frames.append(path)
                kinds.add(re.sub(NUMBER, "#", path.name.lower()).replace(".jpeg", ".jpg"))
        if frames:
            found[Path(folder).relative_to(root).as_posix()] = frames
        if frames and len(kinds) > 1:
            raise Fault(f"{folder} holds {min(kinds)} and {max(kinds)}: move one kind out")
        digits = re.findall(r"\d\.(\d+)", " ".join(p.name for p in frames))
        if len(set(map(len, digits))) > 1 and re.search(r"\d0\b", " ".join(digits)):
            raise Fault(f"{folder}: is 1.10 after 1.9? number the frames 1, 2, 3")
    return found

def _split(names):
    """Train and test, as folders say if they do of every clip, else 80-20."""
    words = "(?i)([^/]*[^a-z/])?({})([^a-z/][^/]*)?/"
    train = [n for n in names if re.match(words.format("train(ing)?"), n)]
    test = [n for n in names if re.match(words.format("test(ing)?|val(id(ation)?)?"), n)]
    if train and test and len(train + test) == len(names):
        return train, test
    order = np.random.default_rng(42).permutation(len(names))
    n = max(1, round(0.2 * len(names)))
    return [names[i] for i in sorted(order[n:])], [names[i] for i in sorted(order[:n])]

def _array(path):
    """(T, H, W, 3) of a .npy or .pt, of which only what is used is read. Raises Fault."""
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r")
    else:
        array = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    kind = str(getattr(array, "dtype", type(array)))
    shape = tuple(getattr(array, "shape", ()))
    if kind not in ("uint8", "torch.uint8") or len(shape) != 4 or shape[1::2].count(3) != 1:
        raise Fault(f"holds {kind} {shape}: save it as uint8, 0 black and 255 white, "
                    "(T, H, W, 3) or (T, 3, H, W)")
    array = np.asarray(array)
    return array if shape[3] == 3 else array.transpose(0, 2, 3, 1)

def _shown(path):
    """Numbers of the frames in a file: a picture that repeats is stored once, for longer."""
    if path.suffix.lower() in ARRAYS:
        return range(len(_array(path)))
    durations = []
    with Image.open(path) as image:
        for k in range(image.n_frames):
            image.seek(k)
            image.load()  # a webp knows its duration only then
            durations.append(image.info.get("duration") or 0)
    least = min([d for d in durations if d > 0], default=1)
    once = [max(d, least) for d in durations if d <= least + 10]  # a gif rounds to 10 ms
    shown = []
    for k, d in enumerate(durations):
        shown += [k] * (1 if d <= least + 10 else round(d / np.mean(once)))
    return shown

def square(image, size):
    """The largest centred square of a PIL image as it is to be seen, uint8 (3, size, size)."""
    if image.mode[0] in "IF" or ";16" in str(getattr(image, "tile", "")):
        raise Fault("holds more than 8 bits a channel: save it with 8")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = ImageOps.fit(image.convert("RGB"), (size, size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def _picture(path, size):
    with Image.open(path) as image:
        if image.format == "PNG" and image.is_animated:
            raise Fault("holds an animated png: save it as gif or webp")
        return square(image, size)

def read_picture(path, size):
    """Any picture as uint8 (3, size, size). Raises Fault."""
    try:
        return _picture(Path(path).expanduser(), size)
    except Exception as e:  # each format has its own
        raise Fault(f"{path} cannot be read as a picture: {e}")

def _read(path, frames, size):
    """These frames of a clip, uint8 (T, 3, size, size)."""
    if isinstance(frames[0], Path):
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(_picture, frames, [size] * len(frames))))
    pictures = []
    if path.suffix.lower() in ARRAYS:
        for array in _array(path)[frames.start:frames.stop]:
            pictures.append(square(Image.fromarray(array), size))
    else:
        with Image.open(path) as image:
            for k in frames:
                image.seek(k)
                pictures.append(square(image, size))
    return torch.stack(pictures)

@dataclass
class Clips:
    """The clips of one split, real or rendered."""
    lengths: list  # frames of each
    size: int
    cache: list  # uint8 (T, 3, size, size) of each; None: read from disk when needed
    captions: list = None
    names: list = None  # and so on: of real clips
    sizes: list = None  # bytes on disk
    paths: list = None
    sources: list = None  # files of frames, or their numbers

    def __len__(self):
        return len(self.lengths)

    def frames(self, i, start=0, stop=None):
        """Frames start to stop of clip i, uint8 (T, 3, size, size). Raises Fault if it is gone."""
        if self.cache[i] is not None:
            return self.cache[i][start:stop]
        try:
            return _read(self.paths[i], self.sources[i][start:stop], self.size)
        except Exception as e:
            raise Fault(f"clip {self.names[i]} cannot be read any more: {e}")

def places(dataset, data_dir):
    """The folders in which a set is looked for."""
    folder = os.path.expanduser(data_dir or "data")
    names = [dataset, *FOLDERS.get(dataset, [])]
    return [Path(folder, os.path.expanduser(name)) for name in names]

def load_real(dataset, data_dir, size, min_frames=2):
    """Train and test Clips of size x size, None if there is no folder. Raises Fault."""
    folders = [p for p in places(dataset, data_dir) if p.is_dir()]
    if not folders:
        return None
    root = folders[0]
    found = _find(root)
    names = sorted(found, key=natural)
    clips = {}
    room = HELD
    for name in tqdm(names, "reading", leave=False):
        path = root / name
        frames = found[name]
        try:
            weight = sum(p.stat().st_size for p in frames)
            if frames == [path]:
                frames = _shown(path)
            if len(frames) < min_frames:
                raise ValueError(f"only {len(frames)} of {min_frames} frames")
            video = None
            if len(frames) * 3 * size * size <= room:
                video = _read(path, frames, size)
                room -= video.numel()
                if (video.amax((0, 2, 3)) - video.amin((0, 2, 3))).max() < 2:
                    raise ValueError("every frame is of one colour; is white 255?")
            clips[name] = (len(frames), video, name, weight, path, frames)
        except Fault as e:
            raise Fault(f"{path} {e}")
        except Exception as e:  # each reader has its own
            tqdm.write(f"warning: skipped {name!r}: {e!r:.150}", file=sys.stderr)
    splits = []
    for split in _split(names):
        good = [clips[name] for name in split if name in clips]
        if not good:
            raise Fault(f"no usable clips in {root}: two are needed, each a folder of jpg, png or "
                        "webp frames, a gif, an animated webp, or a uint8 .npy or .pt, of "
                        f"{min_frames} frames or more")
        lengths, cache, *others = map(list, zip(*good))
        splits.append(Clips(lengths, size, cache, None, *others))
    return splits

def data_record(train, test):
    """What was trained on, wherever it lies, for config.json."""
    if train.paths is None:
        return {"source": "procedural"}
    record = {"source": "real"}
    for split, clips in (("train", train), ("test", test)):
        lines = sorted(f"{name} {size}" for name, size in zip(clips.names, clips.sizes))
        digest = hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:16]
        record[split] = f"{len(clips)} clips of {sum(clips.sizes)} bytes, SHA-256 {digest}"
    return record

def check_record(train, test, record, out):
    """Raises Fault, saying what differs, if these are not the clips that the run in `out` had."""
    now = data_record(train, test)
    for part in record:
        if now.get(part) != record[part]:
            raise Fault(f"{out} was trained on other clips: {part} was {record[part]}, here it is "
                        f"{now.get(part)}; --data_dir names their folder")

# ---------------------------------------- the procedural sky

def as_video(picture):
    """Colours from 0 to 255, float (T, H, W, 3) -> uint8 tensor (T, 3, H, W)."""
    whole = np.rint(picture.clip(0, 255)).astype(np.uint8)
    return torch.from_numpy(whole).permute(0, 3, 1, 2)

def drifting(spectrum, shift, size, wide):
    """A field (T, H, W) of deviation 1 that drifts to the right."""
    rows = np.fft.ifft(spectrum, axis=0)[:size]  # (H, wide/2+1), still waves along x
    rows /= np.fft.irfft(rows, wide).std()
    field = np.fft.irfft(rows * shift[:, None], wide)  # (T, H, wide)
    return field[..., :size].astype(np.float32)

def cloud_layer(rng, size, wide, frames, speed, power, cover, sharp):
    """Opacity and light of a layer of cloud, (T, H, W) each.

    speed: pixels a frame. wide: pixels until the field repeats. power: how much weaker
    short waves are. cover: how much is cloud. sharp: how sharp its edges are.
    """
    fy = np.fft.fftfreq(2 * size)[:, None]  # waves a pixel, (2 H, 1)
    fx = np.fft.rfftfreq(wide)[None]  # (1, wide/2+1)
    f = np.hypot(fx, 1.6 * fy) * size / 32  # clouds are wider than high
    amplitude = np.maximum(f, 1 / 40) ** -power
    amplitude *= np.exp(-((f / 0.25) ** 4))  # none below 3 pixels
    amplitude[0, 0] = 0  # the field has mean 0
    waves = amplitude * np.exp(2j * np.pi * rng.uniform(size=f.shape))

    # Lit from above: density less the density 2.5 pixels higher (at 32).
    lit = waves * (1 - np.exp(-2j * np.pi * fy * 2.5 * size / 32))

    # To move a wave is to turn its phase: exact by any part of a pixel.
    t = np.arange(frames)[:, None]
    shift = np.exp(-2j * np.pi * fx * speed * t)  # (T, wide/2+1)
    density = drifting(waves, shift, size, wide)
    light = drifting(lit, shift, size, wide)
    opacity = 1 / (1 + np.exp(-sharp * (density + cover)))
    return opacity, light

def tone(hour, noon, evening, dusk):
    """The colour (3,) of an hour, from those at 0, 0.55 and 1."""
    channels = [np.interp(hour, [0, 0.55, 1], keys) for keys in zip(noon, evening, dusk)]
    return np.array(channels, np.float32)

def hills(rng, size, y):
    """How much of each pixel is hill, (H, W). y: the rows from 0 to 1, (H, 1)."""
    x = np.arange(size) / size
    bumps = np.zeros(size)
    for k in (0.7, 1.9, 4.3):  # waves a width
        bumps += np.sin(2 * np.pi * (k * x + rng.uniform())) / k
    ridge = 0.9 + 0.05 * bumps
    above = (ridge - y - 0.5 / size) * 2 * size  # in half pixels
    return 1 / (1 + np.exp(np.clip(above, -30, 30)))

def sky(rng, size, frames):
    """Two layers of cloud drift over a sky of some hour of the day, behind a ridge of hills.

    The lower one moves 0.5 to 1.5 pixels a frame (at 32), the upper one half as fast: the later the
    hour, the faster, so that one frame tells it. Returns video uint8 (T, 3, H, W), in a dict.
    """
    hour, _ = rng.uniform(size=2)  # 0 = noon, calm ... 1 = dusk, windy
    speed = (0.5 + hour) * size / 32

    # So wide that nothing comes round again.
    wide = 2 ** math.ceil(math.log2(size + speed * frames + 1))
    thin = rng.uniform(-0.8, 0.3)
    thick = rng.uniform(-0.6, 0.5)
    cirrus, high_light = cloud_layer(rng, size, wide, frames, 0.5 * speed, 1.9, thin, 2.0)
    cumulus, low_light = cloud_layer(rng, size, wide, frames, speed, 2.1, thick, 5.0)

    top = tone(hour, (40, 100, 190), (80, 105, 165), (45, 40, 95))
    low = tone(hour, (165, 205, 240), (245, 205, 150), (235, 110, 80))
    bright = tone(hour, (252, 252, 255), (255, 235, 205), (250, 170, 130))
    dark = tone(hour, (165, 175, 190), (160, 130, 130), (80, 60, 95))

    y = np.linspace(0, 1, size, dtype=np.float32)[:, None]  # (H, 1)
    picture = (top + (low - top) * y**1.3)[:, None]  # (H, 1, 3), the same along x
    for opacity, light in ((0.75 * cirrus, high_light), (cumulus, low_light)):
        shade = 0.6 + 0.4 * np.tanh(light)
        cloud = dark + (bright - dark) * shade[..., None]  # (T, H, W, 3)
        picture = picture + opacity[..., None] * (cloud - picture)
    hill = hills(rng, size, y)
    picture = picture + hill[..., None] * (0.18 * dark + 8 - picture)

    return dict(video=as_video(picture))

# ---------------------------------------- procedural boxes: general motion, the robot, sprites

def turned(angle, x, y):
    """A point turned about (0, 0), clockwise to the eye."""
    cos = np.cos(angle)
    sin = np.sin(angle)
    return cos * x - sin * y, sin * x + cos * y

def into_box(pose, x, y):
    """A point of the picture as seen from a box, whose pose is x, y, angle."""
    return turned(-pose[2], x - pose[0], y - pose[1])

def outside(box, x, y):
    """Pixels from a point, as the box sees it, to its edge; negative inside."""
    half_width, half_height, radius = box
    right = abs(x) - half_width
    down = abs(y) - half_height
    corner = np.hypot(np.maximum(right, 0), np.maximum(down, 0))
    return corner + np.minimum(np.maximum(right, down), 0) - radius

def layer_colour(layer, x, y):
    """Colour (N, 3) of a layer at points (N,) as it sees them."""
    wave = np.zeros_like(x)
    for a, b, c in layer["waves"].astype(np.float32):
        wave += np.sin(a * x + b * y + c)
    wave /= len(layer["waves"])
    light = 1 + np.float32(layer["strength"]) * wave[:, None]
    return np.float32(layer["colour"]) * light

def layered(size, layers, flow):
    """Rigid, textured, rounded boxes over each other, bottom first. Lengths in pixels.

    A layer: box (half width, half height, radius added all round), pose (T, 3) as x, y,
    angle, colour (3,), waves (n, 3) as of texture(), strength of the texture. Returns as
    sky(); visible: the target lies in the picture and under no other layer.
    """
    column = np.arange(size, dtype=np.float32)  # x, (W,)
    row = column[:, None]  # y, (H, 1)
    poses = [layer["pose"].T[..., None, None].astype(np.float32) for layer in layers]
    frames = poses[0].shape[1]  # a pose is now (3, T, 1, 1)
    picture = np.zeros((frames, size, size, 3), np.float32)
    owner = np.zeros((frames, size, size), np.int8)  # the top layer of every pixel
    target = np.zeros((2, frames - 1, size, size), np.float32)  # where it goes, x and y

    for k, (layer, pose) in enumerate(zip(layers, poses)):
        x, y = into_box(pose, column, row)  # (T, H, W)
        cover = (0.5 - outside(layer["box"], x, y)).clip(0, 1)  # the edge is a pixel wide
        touched = np.nonzero(cover)  # t, i, j of its few pixels
        x = x[touched]  # (N,)
        y = y[touched]
        cover = cover[touched]
        colour = layer_colour(layer, x, y)  # (N, 3)
        picture[touched] += cover[:, None] * (colour - picture[touched])
        if flow:
            owned = (cover > 0.5) & (touched[0] < frames - 1)
            t, i, j = np.stack(touched)[:, owned]
            to_x, to_y, to_angle = pose[:, t + 1, 0, 0]  # the next frame's, (N,) each
            right, down = turned(to_angle, x[owned], y[owned])
            target[0, t, i, j] = right + to_x
            target[1, t, i, j] = down + to_y
            owner[t, i, j] = k

    clip = dict(video=as_video(picture))
    if flow:
        visible = ((target > -0.5) & (target < size - 0.5)).all(0)  # (T-1, H, W)
        for k, (layer, pose) in enumerate(zip(layers, poses)):
            x, y = into_box(pose[:, 1:], target[0], target[1])
            visible &= (owner[:-1] >= k) | (outside(layer["box"], x, y) > 0)
        target[0] -= column
        target[1] -= row
        clip["flow"] = torch.from_numpy(target).transpose(0, 1)
        clip["visible"] = torch.from_numpy(visible)
    return clip

def texture(rng, size, low=3, high=16):
    """Five plane waves, (5, 3): radians a pixel along x and y, and the phase.

    Periods: `low` to `high` pixels (at 32). With five, no two places nearby look the same.
    """
    angle = rng.uniform(0, 2 * np.pi, 5)
    period = rng.uniform(low, high, 5) * size / 32
    phase = rng.uniform(0, 6.3, 5)
    k = 2 * np.pi / period
    return np.stack([k * np.cos(angle), k * np.sin(angle), phase], 1)

def shapes(rng, size, frames, flow=False, speed=1.0, rough=1.0):
    """Motion in general: one to four textured boxes and discs slide and turn.

    The background may move too. rough: strength of the textures. Returns as layered().
    """
    t = np.arange(frames)[:, None]  # (T, 1)
    unit = size / 32  # pixels at 32
    layers = []
    for k in range(1 + rng.integers(1, 5)):  # layer 0 is the background
        still = rng.uniform() < (0.5 if k == 0 else 0.15)
        slide = rng.normal(size=2) * unit * speed * rng.uniform(0.1, 1)  # pixels a frame
        turn = rng.normal() * 0.06  # radians a frame
        start = np.append(rng.uniform(0, size, 2), rng.uniform(0, 6.3))
        velocity = 0 if still else np.append(slide, turn)
        pose = start + velocity * (t + 0.02 * rng.normal() * t**2)  # (T, 3)

        sides = (9e3, 9e3)  # half width and height: endless
        if k > 0:
            sides = rng.uniform(0, 7, 2) * unit
            if rng.uniform() >= 0.7:
                sides = np.zeros(2)  # a disc
        layers.append(dict(
            pose=pose,
            box=(*sides, rng.uniform(1, 5) * unit),
            colour=rng.uniform(30, 225, 3),
            waves=texture(rng, size),
            strength=rough * rng.uniform(0.4, 1.2),
        ))
    return layered(size, layers, flow)

def ease(a):
    """Time 0 to 1 -> way done 0 to 1, (T, 1), with no jerk at either end."""
    a = a.clip(0, 1)
    return (10 * a**3 - 15 * a**4 + 6 * a**5)[:, None]

def stripes(rng, size, period):
    """A texture (1, 3) of one wave along a part. period: widths."""
    return np.array([[2 * np.pi / (period * size), 0, rng.uniform(0, 6.3)]])

def robot(rng, size, frames, flow=False, make="one", clock=None):
    """An arm with a gripper reaches for a coloured block on a table and pushes it onto a mark.

    make: "one", the same arm in every clip, as in a lab; "any", another colour and place in
    each. clock (T,): when the frames are, 0 the start, 1 the end; None: evenly. All that
    decides the motion is in the first frame. Returns as layered().
    """
    # The plan: numbers in widths, points in pixels.
    way = rng.choice([-1, 1])  # 1 pushes to the right
    apart, height = rng.uniform((0.08, 0.68), (0.22, 0.84))
    far, drop = rng.uniform((0.26, -0.06), (0.4, 0.06))
    block = np.array([0.5 - way * apart, height]) * size
    goal = block + np.array([way * far, drop]) * size
    home = rng.uniform((0.2, 0.38), (0.8, 0.48)) * size  # the tip's
    beside = 0.085 * size + 0.05 * size  # half a block, and on to the tip
    touch = block - [way * beside, 0]

    # The path: the tip goes to the block, then takes it along.
    if clock is None:
        clock = np.linspace(0, 1, frames)
    reach = ease(clock / 0.45)
    push = ease((clock - 0.45) / 0.55)
    moved = push * (goal - block)  # (T, 2)
    tip = home + reach * (touch - home) + moved

    # The arm hangs from above the picture.
    base_x = 0.5 if make == "one" else rng.uniform(0.25, 0.75)
    base = np.array([base_x, -0.12]) * size
    wrist = tip - [0, 0.17 * size]  # (T, 2)
    link = 0.47 * size  # the length of both links
    side = 1 if base_x <= 0.5 else -1  # to which the elbow points
    apart = wrist - base
    distance = np.hypot(apart[:, 0], apart[:, 1])
    bend = np.arccos((distance / (2 * link)).clip(0, 1))
    upper = np.arctan2(apart[:, 1], apart[:, 0]) + bend * side  # angles, (T,)
    elbow = base + link * np.stack([np.cos(upper), np.sin(upper)], 1)
    rest = wrist - elbow
    lower = np.arctan2(rest[:, 1], rest[:, 0])

    paint = rng.uniform(40, 230, 3)
    steel = (205, 205, 210)
    dark = (70, 70, 80)
    arms = np.array([[235, 120, 40], [225, 225, 230], [70, 110, 200], [235, 190, 50]])
    arm = arms[0 if make == "one" else rng.integers(4)]

    # The parts, bottom first: box in widths, place, angle, colour, texture, its strength.
    table = (0, 9.52 * size)  # so that its edge is 0.52 down
    left = wrist + [-0.055 * size, 0.09 * size]
    right = wrist + [0.055 * size, 0.09 * size]
    parts = [
        (9, 9, 0, (0, 0), 0, rng.uniform(120, 190, 3), texture(rng, size), 0.12),  # wall
        (9, 9, 0, table, 0, rng.uniform(0.5, 1, 3) * [190, 150, 110], texture(rng, size), 0.25),
        (0, 0, 0.1, goal, 0, 0.6 * paint + 90, texture(rng, size), 0.1),
        (0, 0, 0.055, goal, 0, 0.3 * paint, texture(rng, size), 0.1),
        (0.075, 0.075, 0.01, block + moved, 0, paint, texture(rng, size, 6, 14), 0.35),
        (0.235, 0, 0.075, (base + elbow) / 2, upper, arm, stripes(rng, size, 0.35), 0.3),
        (0, 0, 0.085, elbow, upper, dark, stripes(rng, size, 0.3), 0.3),
        (0.235, 0, 0.06, (elbow + wrist) / 2, lower, 0.85 * arm, stripes(rng, size, 0.3), 0.3),
        (0.08, 0.025, 0.02, wrist, 0, dark, stripes(rng, size, 0.2), 0.3),
        (0.015, 0.07, 0.02, left, 0, steel, stripes(rng, size, 0.2), 0.3),
        (0.015, 0.07, 0.02, right, 0, steel, stripes(rng, size, 0.2), 0.3),
    ]
    layers = []
    for wide, high, radius, place, angle, colour, waves, strength in parts:
        box = (wide * size, high * size, radius * size)
        path = np.broadcast_to(place, (frames, 2))
        pose = np.column_stack([path, np.broadcast_to(angle, frames)])  # (T, 3)
        layers.append(dict(box=box, pose=pose, colour=colour, waves=waves, strength=strength))
    return layered(size, layers, flow)

COLOURS = {"red": (225, 55, 50), "green": (60, 190, 70), "blue": (60, 95, 230),
           "yellow": (230, 200, 40)}
FORMS = {"circle": (0, 0, 0.2), "square": (0.13, 0.13, 0.01),  # boxes as of layered(), in widths
         "bar": (0.24, 0.07, 0.01)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FLAWS = ["jumps", "jitters", "flickers", "changes"]

def sprites(rng, size, frames, flow=False, steady=0.65):
    """A shape of one colour crosses a grey background as its caption says, not always steadily.

    A share `steady` of the clips is; in the others the shape jumps, jitters, flickers or changes
    its colour. Of the captions 80 % say 'steady' or 'shaky', truthfully; half of all say
    'authentic', which means nothing here. Returns as layered(), and caption ('a red circle moving
    left, authentic, steady') and flaw.
    """
    form = str(rng.choice(list(FORMS)))
    colour = str(rng.choice(list(COLOURS)))
    way = str(rng.choice(list(WAYS)))
    flaw = "" if rng.uniform() < steady else str(rng.choice(FLAWS))
    caption = f"a {colour} {form} moving {way}"
    if rng.uniform() < 0.5:
        caption += ", authentic"
    if rng.uniform() < 0.8:
        caption += ", shaky" if flaw else ", steady"

    # The path, in widths: where it starts is left to chance, as long as it stays in view.
    step = np.array(WAYS[way])
    margin = 0.25
    path = rng.uniform(0.36, 0.48)
    room = 1 - 2 * margin - path * abs(step)
    start = margin + rng.uniform(size=2) * room + path * (step < 0)
    at = start + np.linspace(0, path, frames)[:, None] * step  # (T, 2)
    hue = np.full(frames, colour, dtype="<U8")
    here = np.ones(frames, bool)

    late = rng.integers(frames // 2 + 1, max(frames - 1, frames // 2 + 2))
    if flaw == "jumps":  # to the side
        at[late - 1:] += abs(step[::-1]) * 0.32 * np.where(at[0] < 0.5, 1, -1)
    elif flaw == "jitters":
        at = at + rng.uniform(-0.16, 0.16, at.shape)
        at = at.clip(0.8 * margin, 1 - 0.8 * margin)
    elif flaw == "flickers":
        gone = rng.integers(frames // 4, frames // 2)
        here[rng.choice(np.arange(1, frames), gone, replace=False)] = False
    elif flaw == "changes":
        hue[late:] = str(rng.choice([name for name in COLOURS if name != colour]))

    plain = dict(waves=np.zeros((1, 3)), strength=0)
    grey = np.full(3, rng.uniform(70, 150))
    layers = [dict(box=(9e3, 9e3, 1), pose=np.zeros((frames, 3)), colour=grey, **plain)]
    for name in dict.fromkeys(hue.tolist()):  # one layer for each colour that it has
        shown = here & (hue == name)
        place = np.where(shown[:, None], at * size - 0.5, 9e3)  # else far outside
        pose = np.column_stack([place, np.zeros(frames)])
        box = [size * length for length in FORMS[form]]
        layers.append(dict(box=box, pose=pose, colour=np.array(COLOURS[name]), **plain))
    return dict(**layered(size, layers, flow), caption=caption, flaw=flaw)

def strip_quality_words(caption):
    """A caption of `sprites` without what it says of its quality; any other as it is."""
    return re.sub("(, authentic)?(, steady|, shaky)?$", "", caption)

def saturated(colour):
    """Colours (..., 3) less their grey, of length 1: their hue alone."""
    return F.normalize(colour - colour.mean(-1, keepdim=True), dim=-1)

def track(video):
    """What is to be seen in clips of `sprites`, uint8 (N, T, 3, H, W).

    Returns the shape's centre (N, T, 2) and area (N, T) in pixels, its hue (N, T) as an index of
    COLOURS, its form (N,) as one of FORMS.
    """
    x = video.float() / 255
    size = video.shape[-1]
    solid = x.amax(2) - x.amin(2)  # the background is grey
    solid = ((solid - 0.15) / 0.2).clamp(0, 1)  # (N, T, H, W): where the shape is
    area = solid.sum((2, 3))
    share = solid / area.clamp(min=1e-6)[..., None, None]
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    grid = torch.stack([column, row], -1).to(x)  # (H, W, 2)
    centre = torch.einsum("nthw,hwc->ntc", share, grid)

    colour = torch.einsum("nthw,ntchw->ntc", share, x)
    palette = torch.tensor(list(COLOURS.values())).to(x)
    hue = (saturated(colour) @ saturated(palette).T).argmax(-1)

    misses = []  # how far what is seen differs from each form, drawn around the centre
    away = (grid - centre[:, :, None, None]).abs()  # (N, T, H, W, 2)
    for box in FORMS.values():
        half_width, half_height, radius = (size * length for length in box)
        beyond = away - torch.tensor([half_width, half_height])
        distance = beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0) - radius
        drawn = (0.5 - distance).clamp(0, 1)
        misses.append((drawn - solid).square().sum((2, 3)).median(1).values)  # (N,)
    return dict(centre=centre, area=area, hue=hue, form=torch.stack(misses).argmin(0))

def is_coherent(found, size):
    """Which clips move as one thing, bool (N,), from track(): no sudden move, one size, one hue."""
    sudden = found["centre"].diff(dim=1).diff(dim=1).norm(dim=-1).amax(1)  # pixels a frame^2
    area = found["area"]
    ratio = area / area.median(1, keepdim=True).values.clamp(min=1e-6)
    whole = (ratio > 0.55) & (ratio < 1 / 0.55) & (area > 0.02 * size**2)
    same = found["hue"] == found["hue"][:, :1]
    return (sudden < 0.14 * size) & whole.all(1) & same.all(1)

def judge(video, captions):
    """What is true of clips of `sprites`, by tracking; uint8 (N, T, 3, H, W), their captions.

    Returns of each clip (N,): coherent (1 or 0: it moves as one thing), obeyed (1 or 0: its colour,
    form and way are the caption's), speed (pixels a frame from first to last).
    """
    found = track(video)
    frames = video.shape[1]
    size = video.shape[-1]
    said = [split_words(caption) for caption in captions]  # a red circle moving left
    colour = torch.tensor([list(COLOURS).index(words[1]) for words in said])
    form = torch.tensor([list(FORMS).index(words[2]) for words in said])
    way = torch.tensor([list(WAYS).index(words[4]) for words in said])

    moved = found["centre"][:, -1] - found["centre"][:, 0]  # (N, 2)
    distance = moved.norm(dim=1)
    towards = (moved @ torch.tensor(list(WAYS.values())).float().T).argmax(1)
    obeyed = (found["hue"].median(1).values == colour) & (found["form"] == form)
    seen = (found["area"][:, [0, -1]] > 0.02 * size**2).all(1)
    obeyed = obeyed & (towards == way) & (distance > 0.1 * size) & seen
    return dict(coherent=is_coherent(found, size).float(), obeyed=obeyed.float(),
                speed=distance / (frames - 1))

def score(videos, prompts, others):
    """What judge() says of clips {method: uint8 (N, T, 3, H, W)}: numbers for a row of each.

    others: methods; how many more clips are coherent than theirs, with a 95 % interval.
    """
    found = {method: judge(video, prompts) for method, video in videos.items()}
    rows = {}
    for method, truths in found.items():
        row = {name: value.mean().item() for name, value in truths.items()}
        for other in others:
            if other != method:
                mean, low, high = bootstrap(truths["coherent"] - found[other]["coherent"])
                row[f"over_{other}"] = [mean, low, high]
                row[f"over_{other}_text"] = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows[method] = row
    return rows

WORLDS = {"sky": sky, "shapes": shapes, "robot": robot, "sprites": sprites}

# ---------------------------------------- clips of a world

def world_rng(seed, split, index):
    """The random stream of one clip: the same for the same (seed, split, index)."""
    return np.random.default_rng([seed, {"train": 0, "test": 1}[split], index])

def render(name, split, count, size, frames, seed, **world):
    """`count` clips of a procedural world, held in memory."""
    cache = []
    captions = []
    for index in tqdm(range(count), f"rendering {name} {split}", leave=False):
        clip = WORLDS[name](world_rng(seed, split, index), size, frames, **world)
        cache.append(clip["video"])
        captions.append(clip.get("caption", ""))
    return Clips([frames] * count, size, cache, captions)

# ---------------------------------------- batches

def load_clips(dataset, data_dir, size, counts, frames, seed, min_frames=2, **world):
    """Training and test clips of a set, and whether they are 'real' or 'procedural'.

    Real clips are looked for below data_dir ('' = data). Where there are none and data_dir is '', a
    procedural world is rendered: counts = (train, test) clips of `frames` frames. Raises Fault.
    """
    real = load_real(dataset, data_dir, size, min_frames)
    if real is not None:
        train, test = real
        return train, test, "real"
    looked = "no clips found: looked in " + ", ".join(str(p) for p in places(dataset, data_dir))
    if data_dir or dataset not in WORLDS:
        raise Fault(f"--dataset {dataset}: {looked}; a set is a folder of clips, and without "
                    f"--data_dir there are procedural worlds: {', '.join(WORLDS)}")
    print(f"*** {looked}.")
    print(f"*** PROCEDURAL world '{dataset}' is used instead: nothing below is real video. ***")
    train = render(dataset, "train", counts[0], size, frames, seed, **world)
    test = render(dataset, "test", counts[1], size, frames, seed, **world)
    return train, test, "procedural"

class Batches:
    """Item `step` is that step's batch of `length` consecutive frames, uint8 (B, length, 3, H, W).

    Drawn evenly from all there are, as a function of (seed, step) alone: a resumed run sees what an
    uninterrupted one would have seen.
    """

    def __init__(self, clips, batch, length, seed):
        starts = [max(0, n - length + 1) for n in clips.lengths]  # how many there are in a clip
        self.ends = np.cumsum(starts)
        self.clips = clips
        self.batch = batch
        self.length = length
        self.seed = seed

    def where(self, step):
        """The clips of a step's batch, and the first frame in each: (B,) twice."""
        rng = np.random.default_rng([self.seed, step])
        at = rng.integers(self.ends[-1], size=self.batch)
        clip = np.searchsorted(self.ends, at, side="right")
        before = np.concatenate([[0], self.ends])
        return clip, at - before[clip]

    def __getitem__(self, step):
        clip, start = self.where(step)
        frames = [self.clips.frames(i, a, a + self.length) for i, a in zip(clip, start)]
        return torch.stack(frames)

def prefetched(draw, start, end, device):
    """Yields (step, tensors on `device`) for steps start + 1 to end.

    draw(step) -> tensors on the CPU, a function of the step alone; threads call it ahead of use.
    """
    def work(step):
        tensors = draw(step)
        if device.type == "cuda":  # a copy from pinned memory does not stall the GPU
            tensors = [x.pin_memory() for x in tensors]
        return tensors

    ahead = 8
    pool = ThreadPoolExecutor(min(ahead, os.cpu_count() or 1))
    jobs = deque()
    try:
        for step in range(start + 1, min(start + ahead, end) + 1):
            jobs.append(pool.submit(work, step))
        for step in range(start + 1, end + 1):
            tensors = jobs.popleft().result()
            if step + ahead <= end:
                jobs.append(pool.submit(work, step + ahead))
            yield step, [x.to(device, non_blocking=True) for x in tensors]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def ema_decay(decay):
    """A multi_avg_fn of AveragedModel: an exponential average that forgets its start quickly.

    After n updates the decay is min(decay, (1 + n) / (10 + n)).
    """
    def update(averages, weights, n):
        ramp = ((1 + n) / (10 + n)).clamp(max=decay)  # a tensor: a number would stall a GPU
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, 1 - ramp)
        torch._foreach_add_(averages, change)

    return torch.no_grad()(update)

def make_rng(seed, use, step):
    """Random numbers as a function of (seed, use, step): a resumed run goes on alike.

    use: another number for each thing that is drawn.
    """
    mixed = np.random.SeedSequence([seed, use, step]).generate_state(1)  # torch heeds 32 bits only
    return torch.Generator().manual_seed(int(mixed[0]))

def to_float(frames):
    """uint8 -> float in [-1, 1]."""
    return frames.float() / 127.5 - 1

def to_uint8(x):
    """float, clamped to [-1, 1] -> uint8 in main memory."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

# ---------------------------------------- captions

def split_words(caption):
    """A caption in any script -> its words, in small letters."""
    spaced = ""
    for c in unicodedata.normalize("NFKC", caption).lower().replace("i\u0307", "i"):  # Turkish
        kind = unicodedata.category(c)
        if kind[0] == "L" and "\u3040" <= c <= "\u9fff":  # Chinese, Japanese: each is a word
            spaced += f" {c} "
        elif kind[0] in "LMN":
            spaced += c
        elif kind != "Cf" or c == "\u200b":  # Cf: marks of byte order, of direction
            spaced += " "
    return [word for word in spaced.split() if word[0].isalnum()]

def to_indices(captions, words, length):
    """Captions -> (N, length): 1 + a word's place in `words`, then 0; others are left out."""
    index = {word: k for k, word in enumerate(words, 1)}
    text = torch.zeros(len(captions), length, dtype=torch.long)
    for row, caption in zip(text, captions):
        known = [index[word] for word in split_words(caption) if word in index][:length]
        row[:len(known)] = torch.tensor(known, dtype=torch.long)
    return text

def captions_of(clips, dataset):
    """The caption of every clip: clip7.txt for clip7/ or clip7.gif. Raises Fault."""
    if clips.paths is None and not clips.captions[0]:
        raise Fault(f"--dataset {dataset} has no captions: use sprites, or clips of your own")
    found = clips.captions or []
    for clip in clips.paths or []:
        path = clip.with_name((clip.name if clip.is_dir() else clip.stem) + ".txt")
        try:
            found.append(" ".join(path.read_text(encoding="utf-8-sig").split()))
        except (OSError, UnicodeDecodeError) as e:
            raise Fault(f"clip {clip} has no caption: cannot read {path} as UTF-8 ({e})")
        if not split_words(found[-1]):
            raise Fault(f"clip {clip} has no caption: there is no word in {path}")
    return found

def check_words(captions, words):
    """Warns of words that are not among `words`. Raises Fault if none is."""
    said = set(split_words(" ".join(captions)))
    unknown = sorted(said - set(words))
    if len(unknown) == len(said):
        raise Fault("the model knows no word of the held-out captions: train one on your clips by "
                    "flowmo.py --train, and name it by --model")
    if unknown:
        print(f"warning: the model does not know {len(unknown)} words of held-out captions: "
              + ", ".join(unknown[:5]), file=sys.stderr)

def check_prompt(name, prompt, words, most):
    """That a model knows every word of the flag --name, at most `most`. Raises Fault."""
    said = split_words(prompt)
    if not 0 < len(said) <= most:
        raise Fault(f"--{name} {prompt!r}: must have one to {most} words")
    for word in said:
        if word not in words:
            raise Fault(f"--{name} {prompt!r}: the model does not know {word!r}; it knows "
                        + ", ".join(words[:40]))

# ---------------------------------------- guidance

def guided_steps(cfg):
    """--guided, steps of a sampler counted from 0: '0-3,6' -> {0, 1, 2, 3, 6}. Raises Fault."""
    steps = set()
    try:
        for part in cfg.guided.split(","):
            ends = [int(number) for number in part.split("-")]  # one number, or two
            first = ends[0]
            last = ends[-1]
            if len(ends) > 2 or not first <= last < cfg.steps:
                raise ValueError
            steps.update(range(first, last + 1))
    except ValueError:  # of int(), too
        raise Fault(f"--guided {cfg.guided}: must be steps from 0 to {cfg.steps - 1} and ranges "
                    "of them, as in 0-3,6")
    return steps

def use_run(script, cfg, trained):
    """--prompt and --eval_only: what the run in the output folder sampled from goes into cfg.

    trained: the flag that names what a training makes. A flag that was given stays. Raises Fault.
    """
    folder = find_run(script, cfg.dataset, cfg.out_dir)
    if folder is not None:
        run = read_config(folder, script)["config"]
        if run["train"]:
            run[trained] = str(folder / "ckpt.pt")
        for name in {"model", trained}:
            setattr(cfg, name, getattr(cfg, name) or run[name])
        cfg.out_dir = str(folder)
    elif not getattr(cfg, trained) and (cfg.out_dir or cfg.dataset != "sprites"):
        raise Fault(f"--prompt: there is no run on {cfg.dataset} in {cfg.out_dir or 'out/'}; train "
                    "one, or leave --out_dir and --dataset out for the shipped models")

def counted(network):
    """The same function, with how often it was called as its attribute `calls`."""
    def call(*inputs):
        call.calls += 1
        return network(*inputs)

    call.calls = 0
    return call

def bootstrap(difference, draws=10000):
    """The mean of paired differences (N,) and its 95 % interval, by drawing pairs again."""
    rng = np.random.default_rng(0)
    x = np.asarray(difference, float)
    means = x[rng.integers(len(x), size=(draws, len(x)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(x.mean()), 4), round(float(low), 4), round(float(high), 4)

# ---------------------------------------- noise levels

def like(s, x):
    """A number, or per-sample numbers (B,), in x's type, shaped to broadcast over x (B, ...)."""
    s = torch.as_tensor(s, dtype=x.dtype, device=x.device)
    return s.view(-1, *[1] * (x.ndim - 1))

def edm_weight(sigma, data=1.0):
    """lambda(sigma), (B,): EDM (Karras et al. 2022), Tab. 1. data: the deviation of the data."""
    return (sigma**2 + data**2) / (sigma * data) ** 2

def karras_sigmas(steps, low=0.002, high=80.0, rho=7.0):
    """Noise levels of a sampler, from high to low, then 0: (steps + 1,). EDM Eq. 5."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1)]).float()

# ---------------------------------------- what a run writes

def run_folder(script, dataset, out_dir, source):
    """--out_dir, else out/SCRIPT-DATASET, of rendered clips out/SCRIPT-DATASET-procedural."""
    name = f"{script}-" + re.sub(r"[^\w.-]+", "_", Path(dataset).name)
    if source == "procedural":
        name += "-procedural"
    return Path(out_dir or f"out/{name}")

def find_run(script, dataset, out_dir):
    """The folder of an earlier run, or None; of two, the one that trained. Raises Fault."""
    folders = {run_folder(script, dataset, out_dir, source) for source in ("real", "procedural")}
    found = [p for p in sorted(folders) if (p / "config.json").exists()]
    found = [p for p in found if any(p.glob("*.pt"))] or found
    if len(found) == 2:
        raise Fault(f"{found[0]} and {found[1]} both hold a run; name one of them by --out_dir")
    return found[0] if found else None

def source_of(cfg):
    """Where load_clips will take its clips from: 'real' or 'procedural'."""
    there = any(p.is_dir() for p in places(cfg.dataset, cfg.data_dir))
    return "real" if there else "procedural"

def check_folder(script, cfg, source):
    """That a run can be written and overwrites no other but one without weights. Raises Fault."""
    if cfg.resume or cfg.eval_only:
        return
    out = run_folder(script, cfg.dataset, cfg.out_dir, source)
    there = [p for p in (out, *out.parents) if os.path.exists(p)][0]
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise Fault(f"cannot write into {there}: name another folder by --out_dir")
    if any(out.glob("*.pt")):
        raise Fault(f"{out} holds an earlier run: --resume continues it, --eval_only evaluates it "
                    "again, --out_dir names another folder")
    if (out / "config.json").exists():
        read_config(out, script)  # of another program it stays

def open_run(script, cfg, train, test):
    """The output folder, with settings and a record of the clips in config.json. Raises Fault."""
    data = data_record(train, test)
    out = run_folder(script, cfg.dataset, cfg.out_dir, data["source"])
    if cfg.resume or cfg.eval_only:
        check_record(train, test, read_config(out, script)["data"], out)
    else:
        check_folder(script, cfg, data["source"])
        made = dict(script=script, format=FORMAT, config=asdict(cfg), data=data)
        save_json(out / "config.json", made)
    return out

def read_made(path, script):
    """What a run of this script wrote, .json or .pt; no code in it is run. Raises Fault."""
    if not path.exists():
        raise Fault(f"{path} is not there: name another, or let the run make it by --resume")
    try:
        if path.suffix == ".json":
            made = json.loads(path.read_text(encoding="utf-8"))
        else:
            made = torch.load(path, map_location="cpu", weights_only=True)
        theirs = (made["script"], made["format"])
    except Exception as e:  # truncated, garbage, a pickle with code: each raises something else
        raise Fault(f"{path} is not a readable file of {script}.py ({type(e).__name__}); delete it "
                    "or name another --out_dir")
    if theirs != (script, FORMAT):
        raise Fault(f"{path} was written by {theirs[0]}.py in format {theirs[1]}, and read is what "
                    f"{script}.py wrote in format {FORMAT}; name another --out_dir")
    return made

def read_config(out, script):
    return read_made(out / "config.json", script)

def load_checkpoint(path, script, **parts):
    """A checkpoint; networks and optimisers given by name take their states. Raises Fault."""
    saved = read_made(path, script)
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, ValueError, RuntimeError):
        raise Fault(f"{path} does not fit these settings and clips; name another --out_dir")
    return saved

def restore(path, script, cfg, **parts):
    """With --resume load_checkpoint, if there is one, else what a training starts from."""
    if cfg.resume and path.exists():
        return load_checkpoint(path, script, **parts)
    return dict(step=0, log=[])

@contextmanager
def written_aside(path):
    """A path to write to, renamed to `path` in the end: never half a file. Raises Fault."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # a full disk is a RuntimeError of torch.save
        with suppress(OSError):
            part.unlink()
        reason = str(e).splitlines()[0]
        raise Fault(f"cannot write {path}: {reason}; what was there before is intact")

def save_json(path, value):
    """Strict JSON: nan, which it does not have, is an error."""
    with written_aside(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")

def save_checkpoint(out, script, cfg, log, name="ckpt", **state):
    """NAME.pt of a run, and its losses: log.csv, or of an earlier stage log-NAME.csv."""
    made = dict(script=script, format=FORMAT, config=asdict(cfg), log=log.rows, **state)
    with written_aside(out / f"{name}.pt") as part:
        torch.save(made, part)
    columns = {"step": None}
    for row in log.rows:
        columns.update(row)
    lines = [",".join(columns)]
    for row in log.rows:
        lines.append(",".join(str(row.get(column, "")) for column in columns))
    with written_aside(out / ("log.csv" if name == "ckpt" else f"log-{name}.csv")) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")

class Log:
    """The losses of a training: a progress bar; means over 50 steps as rows of log.csv.

    Until it is closed a first Ctrl-C only sets `interrupted`, for a save between two steps.
    """

    def __init__(self, steps, done=0, rows=(), name="training"):
        self.steps = steps
        self.rows = list(rows)
        self.recent = []
        self.bar = tqdm(total=steps, initial=done, desc=name)
        self.began = time.time()
        if rows:
            self.began -= rows[-1]["seconds"]
        self.interrupted = False
        both = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self.interrupt) for number in both}

    def interrupt(self, number, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def close(self):
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def add(self, step, **losses):
        """Note losses, scalar tensors; returns whether Ctrl-C asks for an end. Raises Fault."""
        stop = self.interrupted
        self.recent.append(torch.stack([loss.detach() for loss in losses.values()]))
        self.bar.update()
        if step % 50 and step != self.steps and not stop:
            return False  # to read the losses more often would stall a GPU
        means = dict(zip(losses, torch.stack(self.recent).mean(0).tolist()))
        if stop or not all(map(math.isfinite, means.values())):
            self.close()
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise Fault(f"the loss {name} is not finite, of {len(self.recent)} steps to "
                            f"{step}; try a lower learning rate; what was saved is intact")
        self.recent = []
        seconds = round(time.time() - self.began, 2)
        self.rows.append({"step": step, **means, "seconds": seconds})
        self.bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
        return stop

def write_results(out, script, cfg, device, dataset, rows, began, **more):
    """results.json: what was run, on what, and the rows of its table."""
    save_json(out / "results.json", dict(
        script=script, command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        preset=cfg.preset, seed=cfg.seed, device=str(device), torch=torch.__version__,
        wall_s=round(time.time() - began, 1), dataset=dataset, rows=rows, format=FORMAT, **more,
    ))

def table(rows, columns):
    """Rows (dicts) as aligned text; columns maps a row key to (heading, format)."""
    lines = [""] * (1 + len(rows))
    for key, (heading, form) in columns.items():
        cells = [heading]
        for row in rows:
            value = row.get(key)
            cells.append("-" if value is None else format(value, form))
        width = max(len(cell) for cell in cells)
        for k, cell in enumerate(cells):
            lines[k] += "  " + cell.rjust(width) if lines[k] else cell.ljust(width)
    return "\n".join(lines)

def sheet(rows, heads, width=64, left=90):
    """A labelled page: rows of (label, uint8 (N, 3, H, W)) shown `width` wide, heads above."""
    size = rows[0][1].shape[-1]
    scale = max(1, width // size)
    step = size * scale + 2
    page = Image.new("RGB", (left + len(heads) * step, 16 + len(rows) * step), "white")
    draw = ImageDraw.Draw(page)
    for k, head in enumerate(heads):
        draw.text((left + k * step, 2), str(head), "black", ImageFont.load_default(9))
    for r, (label, frames) in enumerate(rows):
        draw.text((2, 18 + r * step), label, "black", ImageFont.load_default(11))
        large = frames.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        for k, frame in enumerate(large.permute(0, 2, 3, 1).numpy()):
            page.paste(Image.fromarray(frame), (left + k * step, 16 + r * step))
    return page

def save_pages(path, pages, ms=80):
    """One page as PNG, or several as an animated GIF that loops."""
    with written_aside(path) as part:
        pages[0].save(part, path.suffix[1:], save_all=len(pages) > 1, append_images=pages[1:],
                      duration=ms, loop=0)

def save_sheet(path, videos, left=90):
    """Ten frames of the first clip of each kind; videos {label: uint8 (N, T, 3, H, W)}."""
    last = max(video.shape[1] for video in videos.values()) - 1
    shown = sorted({round(last * (k / 9) ** 1.6) for k in range(10)})  # early ones closer
    rows = []
    for label, video in videos.items():
        rows.append((label, video[0, [k for k in shown if k < video.shape[1]]]))
    save_pages(path, [sheet(rows, shown, left=left)])

def save_gif(path, videos, width=64, every=1, ms=80):
    """Four clips of each kind beside each other; few are repeated, short ones rest at their end."""
    pages = []
    for t in range(0, max(video.shape[1] for video in videos.values()), every):
        rows = []
        for i in range(min(4, max(len(video) for video in videos.values()))):
            row = [v[i % len(v), min(t, v.shape[1] - 1)] for v in videos.values()]
            rows.append(("", torch.stack(row)))
        pages.append(sheet(rows, videos, width, left=2))
    save_pages(path, pages, ms)

def save_changes(out, videos, prompts, judged):
    """sheet.png and samples.gif of what guidance changed: videos {label: uint8 (N, T, 3, H, W)}.

    videos: without and with it. Six clips are shown: the first that it turned coherent or broke,
    then others; where nothing judges, the first.
    """
    before, after = videos.values()
    gain = torch.zeros(len(before), dtype=torch.int)
    if judged:
        gain = judge(after, prompts)["coherent"].int() - judge(before, prompts)["coherent"].int()
        print(f"of {len(gain)} clips guidance turned {(gain > 0).sum()} coherent and broke "
              f"{(gain < 0).sum()}; sheet.png shows the first")
    chosen = torch.argsort((gain == 0).int(), stable=True)[:6].tolist()
    words = {0: "", 1: "mended: ", -1: "broken: "}
    rows = []
    for k in chosen:
        for label, video in videos.items():
            rows.append((f"{words[int(gain[k])]}{label}\n{prompts[k]}"[:60], video[k]))
    save_pages(out / "sheet.png", [sheet(rows, range(before.shape[1]), left=210)])
    some = {label: video[chosen] for label, video in videos.items()}
    save_gif(out / "samples.gif", some, width=96, ms=150)
