"""Real clips: read right, or refused in one line."""
import json
import os
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Clips, Fault, check_record, data_record, load_real, places, read_picture

LEVELS = [0, 40, 80, 120, 160, 200]  # frame i of a test clip is plain grey LEVELS[i] + its number


def grey(clip=0, size=16, frames=6):
    """A clip (T, 3, H, W) uint8 whose frames tell which they are."""
    levels = torch.tensor(LEVELS[:frames], dtype=torch.uint8) + clip
    return levels.view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


def last(video):
    """The same with the channels last, as numpy."""
    return video.permute(0, 2, 3, 1).numpy()


def images(clip=0, mode="RGB", size=16, frames=6):
    return [Image.fromarray(f).convert(mode) for f in last(grey(clip, size, frames))]


def folder(path, clip=0, ext="png", mode="RGB", size=16, frames=6):
    """Frames named frame_8, frame_9, frame_10, ...: in the order of their numbers, not names."""
    path.mkdir(parents=True)
    for i, image in enumerate(images(clip, mode, size, frames), 8):
        image.save(path / f"frame_{i}.{ext}")
    return path


def named(path, names):
    """A folder of one clip: grey frames of these names, LEVELS in the order given."""
    path.mkdir(parents=True)
    for name, image in zip(names, images()):
        image.save(path / name)


def animated(path, clip=0):
    first, *rest = images(clip)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=50, **lossless)


def load(root, min_frames=2, size=8):
    return load_real(root.name, root.parent, size, min_frames)


def level(split, i):
    return split.frames(i).float().mean((1, 2, 3)).tolist()


def everything(root):
    """The levels of every clip of both splits, by name."""
    found = {}
    for split in load(root):
        for i, name in enumerate(split.names):
            found[name] = level(split, i)
    return found


def one(root):
    """A clip called 'a' of a set."""
    for split in load(root):
        for i, name in enumerate(split.names):
            if name.split(".")[0] == "a":
                return split.frames(i)


def refuses(root, *words):
    """Loading is a Fault of one line that says these words."""
    with pytest.raises(Fault) as info:
        load(root)
    text = str(info.value)
    assert "\n" not in text
    for word in words:
        assert word in text


FRAMES = {  # suffix and mode
    "jpg": ("jpg", "RGB"),
    "JPEG": ("JPEG", "RGB"),
    "png": ("png", "RGB"),
    "webp": ("webp", "RGB"),
    "grey png": ("png", "L"),
    "rgba png": ("png", "RGBA"),
    "palette png": ("png", "P"),
}
ANIMATED = ["gif", "GIF", "animated webp"]
TENSORS = ["npy", "npy channels last", "pt", "PT", "pt channels last", "pt of strides"]
FORMATS = [*FRAMES, "nested", *ANIMATED, *TENSORS]


def tensor(path, kind, video):
    """Writes a clip (T, 3, H, W) as the file of one of TENSORS."""
    if kind == "npy channels last":
        np.save(path, last(video))
    elif kind == "npy":
        np.save(path, video.numpy())
    elif kind == "pt channels last":
        torch.save(torch.from_numpy(last(video)), path)
    elif kind == "pt of strides":
        torch.save(video.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), path)
    else:
        torch.save(video, path)


def make(root, kind, k):
    """Clip number k of a set in one of FORMATS."""
    if kind in FRAMES:
        ext, mode = FRAMES[kind]
        folder(root / f"clip{k}", k, ext, mode)
    elif kind == "nested":
        folder(root / "a" / f"video{k}" / "frames", k)
    elif kind in ANIMATED:
        animated(root / f"{k}.{kind.split()[-1]}", k)
    else:
        tensor(root / f"{k}.{kind.split()[0]}", kind, grey(k))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_layout_reads_the_same_clips_in_order(tmp_path, kind):
    for k in range(5):
        make(tmp_path, kind, k)
    train, test = load(tmp_path)
    assert (len(train), len(test)) == (4, 1)
    assert train.frames(0).shape == (6, 3, 8, 8) and train.frames(0).dtype == torch.uint8
    found = sorted([level(train, i) for i in range(4)] + [level(test, 0)])
    lossy = {"jpg": 1, "JPEG": 1, "webp": 2, "gif": 2, "GIF": 2, "palette png": 2}
    expected = [[v + k for v in LEVELS] for k in range(5)]
    np.testing.assert_allclose(found, expected, atol=lossy.get(kind, 0))


def test_frames_are_cropped_to_the_centred_square_and_antialiased(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    wide[:, 8:16:2] = 100  # stripes finer than the target can show
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", np.stack([wide] * 3))
    clip = load(tmp_path, size=4)[0].frames(0)
    assert clip.shape == (3, 3, 4, 4)
    assert abs(clip.float().mean() - 150) < 5 and clip.float().std() < 25


# ---------------------------------------- order, and one clip a folder

@pytest.mark.parametrize("names", [
    ["1305031102.975304.png", "1305031103.011312.png", "1305031103.043227.png"],
    ["frame_2_480p.png", "frame_10_480p.png", "frame_11_480p.png"],
    ["2_cam1.png", "10_cam1.png", "11_cam1.png"],
    ["9.JPG", "10.jpeg", "11.jpg"],
    ["1700000000.875.png", "1700000001.0.png", "1700000001.125.png"],
    ["t0.png", "t0.25.png", "t0.5.png"],
    ["-10.png", "-9.png", "0.png"],
    ["t_-1.5.png", "t_-1.25.png", "t_1.png"],
    ["take-1.png", "take-2.png", "take-10.png"],
    ["2026-01-09.png", "2026-01-10.png", "2026-02-01.png"],
    ["1700000000000000001.png", "1700000000000000002.png", "1700000000000000010.png"],
])
def test_frames_come_in_the_natural_order_of_their_whole_names(tmp_path, names):
    named(tmp_path / "a", names)
    named(tmp_path / "b", names)
    np.testing.assert_allclose(everything(tmp_path)["a"], LEVELS[:3], atol=1)


def test_clips_come_in_natural_order(tmp_path):
    for k in range(12):
        np.save(tmp_path / f"c{k}.npy", grey(k).numpy())
    train, test = load(tmp_path)
    numbers = [int(name[1:-4]) for name in train.names]
    assert numbers == sorted(numbers) and len(numbers) == 10
    assert [level(train, i)[0] for i in range(10)] == numbers


@pytest.mark.parametrize("names, kinds", [
    (["00001.jpg", "00001.png", "00002.jpg", "00002.png"], ["#.jpg", "#.png"]),
    (["rgb_1.png", "depth_1.png", "rgb_2.png", "depth_2.png"], ["rgb_#.png", "depth_#.png"]),
    (["cover.jpg", "1.jpg", "2.jpg"], ["cover.jpg", "#.jpg"]),
])
def test_a_folder_of_two_kinds_of_frames_is_refused(tmp_path, names, kinds):
    named(tmp_path / "one", names)
    folder(tmp_path / "two")
    refuses(tmp_path, "one", *kinds)


@pytest.mark.parametrize("name", ["preview.webp", "preview.jpg", "zzz.webp"])
def test_a_picture_beside_animated_webps_is_refused(tmp_path, name):
    animated(tmp_path / "1.webp", 0)
    animated(tmp_path / "2.webp", 1)
    images()[3].save(tmp_path / name)
    refuses(tmp_path, tmp_path.name, name, "#.webp")


def test_frames_beside_a_file_that_is_a_clip_are_refused(tmp_path):
    folder(tmp_path / "both")
    np.save(tmp_path / "both" / "7.npy", grey().numpy())
    refuses(tmp_path, "both", "frame_#.png", "#.npy")


@pytest.mark.parametrize("names", [
    ["1.9.png", "1.10.png", "1.11.png"], ["2026.9.30.png", "2026.10.1.png", "2026.10.2.png"]])
def test_numbers_of_which_nobody_knows_whether_they_are_fractions_are_refused(tmp_path, names):
    named(tmp_path / "one", names)
    refuses(tmp_path, "one", "number the frames")


@pytest.mark.parametrize("name", [
    "IMG_10.HEIC", "IMG_10.bmp", "IMG_10.tif", "IMG_10.avif", "IMG_10.jfif", "IMG_10.JXL",
    "other.tiff", "poses.npz", "IMG_10.gif", "IMG_10.pt"])
def test_one_file_of_another_kind_among_the_frames_is_refused(tmp_path, name):
    folder(tmp_path / "one", ext="jpg")
    (tmp_path / "one" / "frame_10.jpg").rename(tmp_path / "one" / name)
    folder(tmp_path / "two")
    refuses(tmp_path, "one")


@pytest.mark.parametrize("name", ["1.tif", "1.HEIC", "1.avif", "cover.bmp", "clip.npz", "clip.NPZ"])
def test_a_folder_of_what_is_not_read_is_refused_beside_clips_that_are(tmp_path, name):
    for clip in ("a", "b", "c"):
        folder(tmp_path / clip)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(b"")
    refuses(tmp_path, f"d/{name} is not read", "png", "uint8 .npy")


@pytest.mark.parametrize("name", [
    "Thumbs.db", "desktop.ini", "labels.txt", "meta.json", "._frame_9.jpg", ".DS_Store", "noise"])
def test_what_is_no_picture_beside_the_frames_is_let_alone(tmp_path, name):
    for clip in ("a", "b"):
        folder(tmp_path / clip)
        (tmp_path / clip / name).write_bytes(b"x")
    assert everything(tmp_path)["a"] == LEVELS


# ---------------------------------------- time

@pytest.mark.parametrize("ext", ["gif", "webp"])
def test_ten_frames_of_which_some_repeat_come_back_as_ten(tmp_path, ext):
    shown = [0, 1, 1, 1, 2, 3, 3, 4, 5, 5]
    for name in ("a", "b"):
        first, *rest = [images()[k] for k in shown]
        more = {"lossless": True} if ext == "webp" else {}
        first.save(tmp_path / f"{name}.{ext}", save_all=True, append_images=rest, duration=40,
                   **more)
    with Image.open(tmp_path / f"a.{ext}") as image:
        assert image.n_frames == 6  # or this tests nothing
    expected = [LEVELS[k] for k in shown]
    np.testing.assert_allclose(everything(tmp_path)[f"a.{ext}"], expected, atol=2)


def test_frames_without_a_duration_count_as_the_shortest(tmp_path):
    for name in ("a", "b"):
        first, *rest = images()
        first.save(tmp_path / f"{name}.gif", save_all=True, append_images=rest,
                   duration=[0, 50, 100, 0, 50, 50])
    expected = [0, 40, 80, 80, 120, 160, 200]
    np.testing.assert_allclose(everything(tmp_path)["a.gif"], expected, atol=2)


def times(path, delays):
    """How often each picture of an animation of these delays in ms is shown."""
    pictures = []
    for k in range(len(delays)):
        pictures.append(Image.new("RGB", (8, 8), (10 * k, 0, 255 - 10 * k)))
    first, *rest = pictures
    first.save(path, save_all=True, append_images=rest, duration=delays, lossless=True)
    shown = common._shown(path)
    return [shown.count(k) for k in range(len(delays))]


@pytest.mark.parametrize("name, delays", [
    ("60 fps.gif", [20, 20, 10] * 3), ("75 fps.gif", [10, 20, 10] * 3),
    ("66 fps.gif", [10, 20] * 4), ("40 fps.gif", [20, 30] * 4), ("30 fps.gif", [30, 30, 40] * 3),
    ("28 fps.gif", [30, 40] * 4), ("24 fps.gif", [40, 40, 50] * 3), ("60 fps.webp", [16, 17] * 4),
    ("gif.webp", [20, 20, 10] * 3)])
def test_delays_that_are_only_rounded_repeat_nothing(tmp_path, name, delays):
    assert times(tmp_path / name, delays) == [1] * len(delays)


@pytest.mark.parametrize("name, delays, shown", [
    ("25 fps.gif", [40, 80, 40, 120], [1, 2, 1, 3]),
    ("60 fps.gif", [20, 10, 30, 20, 50, 10], [1, 1, 2, 1, 3, 1]),
    ("30 fps.gif", [30, 40, 70, 30, 60, 40], [1, 1, 2, 1, 2, 1]),
    ("40 fps.gif", [20, 30, 50, 30, 20, 80], [1, 1, 2, 1, 1, 3]),
    ("zero.gif", [0, 50, 100, 0], [1, 1, 2, 1]),
    ("60 fps.webp", [16, 17, 33, 50], [1, 1, 2, 3])])
def test_a_picture_that_is_shown_for_several_frames_is_repeated(tmp_path, name, delays, shown):
    assert times(tmp_path / name, delays) == shown


def test_a_gif_without_any_duration_shows_each_frame_once(tmp_path):
    for name in ("a", "b"):
        first, *rest = images()
        first.save(tmp_path / f"{name}.gif", save_all=True, append_images=rest)
    assert load(tmp_path)[0].lengths == [6]


# ---------------------------------------- train and test

@pytest.mark.parametrize("train, test", [
    ("train", "test"), ("sky_train", "sky_test"), ("Training", "val"), ("train", "validation")])
def test_train_and_test_folders_are_found_in_their_usual_spellings(tmp_path, train, test):
    for k in range(3):
        folder(tmp_path / train / f"c{k}", k)
    folder(tmp_path / test / "c", 9)
    got = load(tmp_path)
    assert [len(g) for g in got] == [3, 1] and level(got[1], 0)[0] == 9


def test_a_clip_outside_the_train_and_test_folders_makes_them_no_split(tmp_path):
    for k, name in enumerate(["train/a", "train/b", "train/c", "test/d", "e"]):
        folder(tmp_path / name, k)
    train, test = load(tmp_path)
    assert (len(train), len(test)) == (4, 1) and len(set(train.names + test.names)) == 5


@pytest.mark.parametrize("others", [0, 8])
def test_videos_called_train_and_test_are_videos(tmp_path, others):
    names = ["steam train", "test drive"] + [f"video {k}" for k in range(others)]
    for k, name in enumerate(names):
        folder(tmp_path / name, k)
    train, test = load(tmp_path)
    assert sorted(train.names + test.names) == names
    assert len(test) == max(1, round(0.2 * len(names)))


def test_clips_whose_names_only_contain_the_words_are_no_split(tmp_path):
    for k, name in enumerate(("trainspotting", "constraint", "contest", "valley", "value")):
        folder(tmp_path / name / "frames", k)
    assert [len(split) for split in load(tmp_path)] == [4, 1]


def test_without_split_folders_clips_are_split_80_20_and_the_same_every_time(tmp_path):
    for k in range(10):
        np.save(tmp_path / f"{k}.npy", grey(k).numpy())
    train, test = load(tmp_path)
    order = np.random.default_rng(42).permutation(10)
    assert test.names == [f"{k}.npy" for k in sorted(order[:2])]
    assert train.names == [f"{k}.npy" for k in sorted(order[2:])]
    assert load(tmp_path)[0].names == train.names


# ---------------------------------------- values

@pytest.mark.parametrize("ext, dtype", [
    ("npy", "float32"), ("npy", "float64"), ("npy", "uint16"), ("npy", ">u2"), ("npy", "int64"),
    ("npy", "bool"), ("pt", "float32"), ("pt", "float16"), ("pt", "int64"), ("pt", "int8")])
def test_arrays_of_other_values_than_bytes_are_refused(tmp_path, ext, dtype):
    for k in range(5):
        np.save(tmp_path / f"{k}.npy", grey(k).numpy())
    odd = (grey().numpy() > 100).astype(dtype)  # a mask: as bytes it would be black
    if ext == "npy":
        np.save(tmp_path / "odd.npy", odd)
    else:
        torch.save(torch.from_numpy(odd), tmp_path / "odd.pt")
    refuses(tmp_path, f"odd.{ext}", dtype, "save it as uint8")


@pytest.mark.parametrize("shape", [
    (4, 3, 8, 3), (4, 8, 8), (4, 8, 8, 4), (8, 8, 3), (1, 4, 3, 8, 8)])
def test_arrays_of_another_shape_are_refused(tmp_path, shape):
    for k in range(5):
        np.save(tmp_path / f"{k}.npy", grey(k).numpy())
    np.save(tmp_path / "odd.npy", np.zeros(shape, np.uint8))
    refuses(tmp_path, "odd.npy", str(shape), "(T, H, W, 3) or (T, 3, H, W)")


@pytest.mark.parametrize("value", [dict(video=grey()), [grey()], grey().bfloat16()])
def test_what_is_no_tensor_of_bytes_in_a_pt_is_refused(tmp_path, value):
    for k in range(5):
        np.save(tmp_path / f"{k}.npy", grey(k).numpy())
    torch.save(value, tmp_path / "odd.pt")
    refuses(tmp_path, "odd.pt", "save it as uint8")


def png_16(path, bands):
    """A PNG of 16 bits a channel and 1 or 3 channels."""
    def chunk(name, data):
        end = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + end

    row = b"\0" + struct.pack(">H", 4095) * bands * 16
    head = struct.pack(">IIBBBBB", 16, 16, 16, {1: 0, 3: 2}[bands], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(row * 16)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bands", [1, 3])
def test_pictures_of_16_bits_are_refused(tmp_path, bands):
    for k in range(5):
        folder(tmp_path / f"c{k}")
    png_16(tmp_path / "c3" / "frame_10.png", bands)
    refuses(tmp_path, "c3", "more than 8 bits a channel")
    with pytest.raises(Fault, match="frame_10.png cannot be read.*more than 8 bits"):
        read_picture(tmp_path / "c3" / "frame_10.png", 8)


def test_an_animated_png_is_refused(tmp_path):
    for k in range(2):
        (tmp_path / f"c{k}").mkdir()
        first, *rest = images()
        first.save(tmp_path / f"c{k}" / "1.png", save_all=True, append_images=rest, duration=50)
        images()[1].save(tmp_path / f"c{k}" / "2.png")
    refuses(tmp_path, "c0 holds an animated png", "gif or webp")


@pytest.mark.parametrize("colour", [(200, 0, 0), (0, 0, 0), None])
def test_clips_of_one_colour_and_masks_are_no_clips(tmp_path, capsys, colour):
    for k in range(3):
        video = np.full((4, 8, 8, 3), colour or 0, np.uint8)
        if colour is None:
            video[:, 2:4] = 1
        np.save(tmp_path / f"{k}.npy", video)
    refuses(tmp_path, "no usable clips")
    assert "every frame is of one colour" in capsys.readouterr().err


def turned_picture(path):
    """White on the left as it is stored; as it is to be shown, white at the top."""
    image = Image.new("RGB", (16, 8))
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)


def test_a_frame_is_turned_as_its_exif_says(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            turned_picture(tmp_path / name / f"{i}.jpg")
    clip = one(tmp_path).float()
    assert clip[:, :, :3].mean() > 240 and clip[:, :, 5:].mean() < 15


def test_what_is_transparent_is_black(tmp_path):
    paint = Image.new("RGBA", (16, 16), (200, 200, 200, 255))
    paint.paste((250, 250, 250, 0), (0, 0, 16, 8))
    palette = Image.fromarray(np.repeat([1, 0], 128).reshape(16, 16).astype(np.uint8), "L")
    palette = palette.convert("P")
    palette.putpalette([200, 200, 200, 250, 250, 250])
    palette.info["transparency"] = 1
    for ext, image in (("rgba", paint), ("la", paint.convert("LA")), ("p", palette)):
        for k in range(2):
            (tmp_path / ext / f"{k}").mkdir(parents=True)
            for i in range(3):
                image.save(tmp_path / ext / f"{k}" / f"{i}.png")
    for name in ("gif", "webp"):
        for k in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            second = paint.copy()
            second.paste((90, 90, 90, 255), (0, 12, 16, 16))
            more = {"lossless": True} if name == "webp" else {"disposal": 2}
            paint.save(tmp_path / name / f"{k}.{name}", save_all=True, append_images=[second],
                       duration=50, **more)
    for split in load(tmp_path):
        for i, name in enumerate(split.names):
            clip = split.frames(i).float()
            assert clip[:, :, :3].max() < 5, name
            assert abs(clip[:, :, 5].mean() - 200) < 3, name


# ---------------------------------------- where clips are found

def test_hidden_and_at_folders_and_hidden_files_are_not_read(tmp_path):
    for name in ("a", "b"):
        folder(tmp_path / name)
        (tmp_path / name / "._frame_8.png").write_bytes(b"")
        folder(tmp_path / name / "@eaDir")
        folder(tmp_path / ".trash" / name)
    assert set(everything(tmp_path)) == {"a", "b"}


def test_linked_folders_are_followed_but_not_back_up_nor_twice(tmp_path):
    root = tmp_path / "up" / "set"
    folder(root / "a")
    folder(tmp_path / "elsewhere" / "far" / "b")
    folder(tmp_path / "up" / "other", 50)
    links = [("linked", tmp_path / "elsewhere" / "far"), ("a/up", root), ("a/above", tmp_path),
             ("again", root / "a")]
    try:
        for name, target in links:
            (root / name).symlink_to(target, target_is_directory=True)
        (tmp_path / "elsewhere" / "far" / "back").symlink_to(tmp_path / "elsewhere" / "far")
    except OSError:
        pytest.skip("no links here")
    assert set(everything(root)) == {"a", "linked/b"}


def test_a_set_is_found_under_its_own_folder_name_and_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_real("sky", "", 8) is None and load_real("sky", "nowhere", 8) is None
    assert [p.as_posix() for p in places("sky", "")] == ["data/sky", "data/sky_timelapse"]
    for k in range(2):
        folder(tmp_path / "data" / "sky_timelapse" / f"c{k}", k)
        folder(tmp_path / "mine" / "holiday" / f"c{k}", k)
    for name, data_dir in (("sky", ""), ("holiday", "mine"), ("holiday", "~/mine"),
                           ("~/mine/holiday", ""), ("~/mine/holiday", "elsewhere")):
        assert len(load_real(name, data_dir, 8)[0]) == 1
    assert places("holiday", "~/mine") == [tmp_path / "mine" / "holiday"]


@pytest.mark.parametrize("ext", ["mp4", "MOV", "avi", "mkv", "webm"])
@pytest.mark.parametrize("others", [0, 5])
def test_a_video_is_told_how_to_make_frames_until_they_are_there(tmp_path, ext, others):
    for k in range(others):
        folder(tmp_path / f"c{k}")
    (tmp_path / f"my cat.{ext}").write_bytes(b"film")
    frames = tmp_path / "my cat"
    refuses(tmp_path, f'ffmpeg -i "{frames}.{ext}" "{frames}/%05d.png"', f'mkdir "{frames}"')
    folder(frames)
    folder(tmp_path / "more")
    assert "my cat" in everything(tmp_path)


def test_a_percent_sign_is_doubled_where_ffmpeg_reads_it(tmp_path):
    (tmp_path / "50%.mp4").write_bytes(b"film")
    refuses(tmp_path, f'mkdir "{tmp_path}/50%"', f'"{tmp_path}/50%%/%05d.png"')


@pytest.mark.parametrize("name", ["a\nb", "100%", "{x}", "[1]", "a b", "é", "x.npy"])
def test_clips_of_odd_names_are_read(tmp_path, name):
    folder(tmp_path / name)
    folder(tmp_path / "z", 9)
    assert everything(tmp_path)[name] == LEVELS


# ---------------------------------------- broken clips

class Runs:  # a pickle with code: unpickling it would make a file
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_broken_clips_are_skipped_with_a_warning_that_names_them(tmp_path, capsys):
    train = tmp_path / "train"
    for k in range(3):
        folder(train / f"good{k}", k)
    folder(tmp_path / "test" / "good", 3)
    cut = folder(train / "cut_jpg", ext="jpg", size=64)
    (cut / "frame_9.jpg").write_bytes((cut / "frame_9.jpg").read_bytes()[:300])
    folder(train / "single", frames=1)
    (train / "bad_webp").mkdir()
    bad = ["cut_jpg", "single", "bad_webp", "a/rgb", "b/rgb", "new\\nline.gif", "code.pt"]
    for name in ("bad_webp/1.webp", "bad_webp/2.webp", "new\nline.gif"):
        (train / name).write_bytes(b"not what its name says")
    for ext in ("pt", "npy", "gif"):
        (train / f"text.{ext}").write_bytes(b"not what its name says")
        (train / f"empty.{ext}").write_bytes(b"")
        bad += [f"text.{ext}", f"empty.{ext}"]
    np.save(train / "short.npy", grey(frames=1).numpy())
    np.save(train / "none.npy", np.zeros((0, 8, 8, 3), np.uint8))
    np.save(train / "words.npy", np.array([{}], object))
    (train / "code.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), 2))
    bad += ["short.npy", "none.npy", "words.npy"]
    for name in ("a", "b"):  # two clips whose folders share a name are two
        folder(train / name / "rgb", frames=1)
    got, _ = load(tmp_path)
    assert sorted(level(got, i)[0] for i in range(len(got))) == [0, 1, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == len(bad)
    for name in bad:
        assert sum(f"skipped 'train/{name}': " in line for line in lines) == 1, name
    assert not (tmp_path / "ran").exists()


def test_a_link_to_nowhere_is_a_clip_that_is_skipped(tmp_path, capsys):
    for k in range(3):
        folder(tmp_path / f"c{k}", k, "webp")
    try:
        (tmp_path / "c1" / "frame_20.webp").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("no links here")
    assert set(everything(tmp_path)) == {"c0", "c2"}
    assert "skipped 'c1'" in capsys.readouterr().err


def test_a_broken_animated_webp_beside_whole_ones_is_skipped(tmp_path, capsys):
    for k in range(3):
        animated(tmp_path / f"{k}.webp", k)
    whole = (tmp_path / "1.webp").read_bytes()
    (tmp_path / "1.webp").write_bytes(whole[:len(whole) // 2])
    assert set(everything(tmp_path)) == {"0.webp", "2.webp"}
    assert "1.webp" in capsys.readouterr().err


def test_no_usable_clip_or_an_empty_folder_is_a_fault(tmp_path):
    refuses(tmp_path, "no usable clips in")
    folder(tmp_path / "c")
    refuses(tmp_path, "no usable clips in", "two are needed")
    for k in range(3):
        folder(tmp_path / f"c{k}", frames=1)
    refuses(tmp_path, "no usable", "of 2 frames or more")


# ---------------------------------------- memory, and the record

def test_a_clip_of_more_frames_than_files_may_be_open_is_read(tmp_path):
    resource = pytest.importorskip("resource")
    for k in range(2):
        folder(tmp_path / f"c{k}")
        for i in range(100):
            images()[i % 6].save(tmp_path / f"c{k}" / f"frame_{i + 100}.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/dev/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        assert load(tmp_path)[0].lengths[0] == 106
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("kind", ["png", "gif", "animated webp", "npy", "npy channels last", "pt"])
def test_what_is_read_when_needed_is_what_memory_gives(tmp_path, monkeypatch, kind):
    for k in range(3):
        make(tmp_path, kind, k)
    held, _ = load(tmp_path)
    monkeypatch.setattr(common, "HELD", 0)
    read, _ = load(tmp_path)
    assert None not in held.cache and read.cache == [None] * 2 and held.lengths == read.lengths
    for start, stop in ((0, None), (2, 4), (5, 6)):
        assert torch.equal(held.frames(1, start, stop), read.frames(1, start, stop))


def test_what_fits_is_held_and_the_rest_is_read_when_needed(tmp_path, monkeypatch):
    np.save(tmp_path / "0.npy", np.repeat(grey().numpy(), 10, 0))
    for k in range(1, 5):
        np.save(tmp_path / f"{k}.npy", grey(k).numpy())
    monkeypatch.setattr(common, "HELD", 6 * 3 * 8 * 8 * 3)
    held = {}
    for split in load(tmp_path):
        for name, video in zip(split.names, split.cache):
            held[name] = video is not None
    assert held == {"0.npy": False, "1.npy": True, "2.npy": True, "3.npy": True, "4.npy": False}


def test_a_long_npy_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "HELD", 0)
    for k in range(2):
        shape = (1000, 3, 64, 64)  # 12 MB
        video = np.lib.format.open_memmap(tmp_path / f"{k}.npy", "w+", np.uint8, shape)
        video[7:9] = 128
        del video
    tracemalloc.start()
    train, _ = load(tmp_path)
    clip = train.frames(0, 6, 9)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert train.lengths == [1000] and most < 4e6
    assert clip.float().mean((1, 2, 3)).tolist() == [0, 128, 128]


def test_a_long_pt_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "HELD", 0)
    loaded = []
    load_pt = torch.load

    def watched(*args, **named):
        loaded.append(named["mmap"] and named["weights_only"])
        return load_pt(*args, **named)

    for k in range(2):
        torch.save(grey(k), tmp_path / f"{k}.pt")
    monkeypatch.setattr(torch, "load", watched)
    train, _ = load(tmp_path)
    assert level(train, 0)[2] in (80, 81) and loaded == [True] * 3


def test_of_a_webp_no_more_than_its_head_is_read_to_tell_frames_from_clips(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"RIFF0000WEBPVP8X0000\2" + bytes(1 << 22))
    (tmp_path / "b.webp").write_bytes(b"RIFF0000WEBPVP8X0000\0" + bytes(1 << 22))
    tracemalloc.start()
    found = [common._is_clip(tmp_path / name) for name in ("a.webp", "b.webp")]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [True, False] and most < 1 << 20


def test_a_clip_that_vanishes_while_it_is_used_is_a_fault_that_names_it(tmp_path, monkeypatch):
    for k in range(2):
        folder(tmp_path / "deep" / f"c{k}", k)
    monkeypatch.setattr(common, "HELD", 0)
    train, _ = load(tmp_path)
    train.paths[0].rename(tmp_path / "elsewhere")
    with pytest.raises(Fault, match=f"clip {train.names[0]} cannot be read any more"):
        train.frames(0)


def test_names_sizes_and_paths_are_of_the_clips_on_disk(tmp_path):
    folder(tmp_path / "train" / "a")
    animated(tmp_path / "train" / "b.gif")
    np.save(tmp_path / "test.npy", grey().numpy())
    (tmp_path / "test").mkdir()
    (tmp_path / "test.npy").rename(tmp_path / "test" / "c.npy")
    train, test = load(tmp_path)
    assert train.names == ["train/a", "train/b.gif"] and test.names == ["test/c.npy"]
    assert train.paths == [tmp_path / "train" / "a", tmp_path / "train" / "b.gif"]
    total = sum(p.stat().st_size for p in (tmp_path / "train" / "a").iterdir())
    assert train.sizes == [total, (tmp_path / "train" / "b.gif").stat().st_size]


def test_a_rendered_world_needs_no_disk():
    video = grey()
    world = Clips(lengths=[6], size=16, cache=[video], captions=["dawn"])
    assert len(world) == 1 and torch.equal(world.frames(0, 2, 4), video[2:4])
    assert (world.names, world.sizes, world.paths) == (None, None, None)


def test_the_record_is_of_the_clips_not_of_where_they_lie(tmp_path):
    for place in ("here", "there"):
        for k in range(5):
            (tmp_path / place).mkdir(exist_ok=True)
            np.save(tmp_path / place / f"{k}.npy", grey(k).numpy())
    record = data_record(*load(tmp_path / "here"))
    assert record == data_record(*load(tmp_path / "there"))
    size = (tmp_path / "here" / "0.npy").stat().st_size
    assert record["train"].startswith(f"4 clips of {4 * size} bytes, ")


@pytest.fixture
def five(tmp_path):
    """A set of five clips, and the record of a run on it."""
    for k in range(5):
        np.save(tmp_path / f"{k}.npy", grey(k).numpy())
    return tmp_path, data_record(*load(tmp_path))


def is_another(root, record, *words):
    """The clips are refused for that record in one line that says these words."""
    with pytest.raises(Fault) as info:
        check_record(*load(root), record, "HERE")
    text = str(info.value)
    assert "\n" not in text
    for word in (*words, "HERE"):
        assert word in text


def test_the_clips_of_the_record_pass(five):
    root, record = five
    check_record(*load(root), record, "HERE")


def test_the_record_passes_through_json(five):
    root, record = five
    check_record(*load(root), json.loads(json.dumps(record)), "HERE")


def test_one_more_clip_than_in_the_record_is_a_fault_that_tells_both_numbers(five):
    root, record = five
    np.save(root / "5.npy", grey(5).numpy())
    is_another(root, record, "other clips: train was 4 clips", "here it is 5 clips")


def test_a_clip_of_another_name_than_in_the_record_is_a_fault(five):
    root, record = five
    (root / "4.npy").rename(root / "9.npy")
    is_another(root, record, "other clips: ")


def test_a_clip_of_another_size_than_in_the_record_is_a_fault(five):
    root, record = five
    np.save(load(root)[0].paths[0], grey(5, size=20).numpy())
    is_another(root, record, "other clips: train was", "of 18944 bytes", "of 21536 bytes")


@pytest.mark.parametrize("trained, here", [("real", "procedural"), ("procedural", "real")])
def test_real_clips_and_a_world_do_not_stand_in_for_each_other(five, trained, here):
    root, record = five
    world = Clips([6], 16, [grey()], [""])
    found = {"real": load(root), "procedural": (world, world)}
    with pytest.raises(Fault, match=f"HERE was .*source was {trained}, here it is {here}; "):
        check_record(*found[here], data_record(*found[trained]), "HERE")


# ---------------------------------------- a picture

def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    turned_picture(tmp_path / "a.jpg")
    frame = read_picture(tmp_path / "a.jpg", 8).float()
    assert frame[:, :3].mean() > 240 and frame[:, 5:].mean() < 15


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK"])
def test_a_picture_of_any_kind_is_its_centred_square(tmp_path, mode):
    image = Image.new("L", (19, 7))
    image.paste(200, (6, 0, 13, 7))  # the centred square
    image.convert(mode).save(tmp_path / "a", "TIFF")
    frame = read_picture(str(tmp_path / "a"), 5)
    assert frame.shape == (3, 5, 5) and frame.dtype == torch.uint8
    assert abs(frame.float() - 200).max() < 10  # at the edge a little of what is beyond it


@pytest.mark.parametrize("name", ["text.png", "cut.png", "garbled.png", "empty.jpg", "none.jpg",
                                  "folder"])
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "text.png").write_text("not a picture\nat all")
    (tmp_path / "cut.png").write_bytes(whole[:5000])
    (tmp_path / "garbled.png").write_bytes(whole[:60] + bytes(40) + whole[100:])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Fault, match=f"{name} cannot be read as a picture") as info:
        read_picture(tmp_path / name, 8)
    assert "\n" not in str(info.value)
