"""Real clips: read right, or refused in one line."""
import json
import os
import pickle
import re
import tracemalloc

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
TENSORS = ["npy", "npy channels last", "npz", "pt", "PT", "pt 0..1", "pt -1..1", "npy 0..255",
           "npy uint32", "pt int64", "npy uint16", "npy big-endian uint16"]
FORMATS = [*FRAMES, "nested", *ANIMATED, *TENSORS]


def tensor(path, kind, video):
    """Writes a clip (T, 3, H, W) as the file of one of TENSORS."""
    if kind == "npz":
        np.savez(path, video=video.numpy())
    elif kind == "npy channels last":
        np.save(path, last(video))
    elif kind == "npy 0..255":
        np.save(path, video.double().numpy())
    elif kind == "npy uint32":
        np.save(path, video.numpy().astype(np.uint32))
    elif kind == "npy uint16":
        np.save(path, video.numpy().astype(np.uint16) * 257)
    elif kind == "npy big-endian uint16":
        np.save(path, (video.numpy().astype(np.uint16) * 257).astype(">u2"))
    elif kind == "npy":
        np.save(path, video.numpy())
    elif kind == "pt 0..1":
        torch.save(video / 255, path)
    elif kind == "pt -1..1":
        torch.save(video / 127.5 - 1, path)
    elif kind == "pt int64":
        torch.save(video.long(), path)
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


def test_an_npz_of_capital_suffix_gives_the_one_array_that_is_a_video(tmp_path):
    for k in range(2):
        with open(tmp_path / f"{k}.NPZ", "wb") as file:  # to a name, savez would add .npz
            np.savez(file, actions=np.zeros((6, 4)), video=last(grey(k)))
    assert everything(tmp_path) == {"0.NPZ": LEVELS, "1.NPZ": [v + 1 for v in LEVELS]}


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


@pytest.mark.parametrize("names, crossed", [
    (["1_cam1.png", "1_cam2.png", "2_cam1.png", "2_cam2.png"], True),
    (["3_cam1.png", "4_cam1.png", "5_cam1.png", "6_cam1.png"], False),
    (["1_10.png", "2_20.png", "3_30.png", "4_40.png"], False),
])
def test_two_counters_that_cross_are_read_as_one_clip_and_said(tmp_path, capsys, names, crossed):
    named(tmp_path / "a", names)
    named(tmp_path / "b", ["1.png", "2.png"])
    assert everything(tmp_path)["a"] == LEVELS[:4]
    said = "1_cam1.png, 1_cam2.png, 2_cam1.png, 2_cam2.png" in capsys.readouterr().err
    assert said == crossed


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

@pytest.mark.parametrize("odd", [1.0000012, -0.001, 1.04])
def test_a_value_a_little_outside_changes_nothing_else(tmp_path, odd, capsys):
    video = grey().float() / 255
    torch.save(video, tmp_path / "b.pt")
    video[5, :, 0, 0] = odd
    torch.save(video, tmp_path / "a.pt")
    expected = grey()
    expected[5, :, 0, 0] = 255 if odd > 1 else 0
    found = load_real(tmp_path.name, tmp_path.parent, 16)
    clip = [s.frames(0) for s in found if s.names == ["a.pt"]][0]
    assert torch.equal(clip, expected)
    assert capsys.readouterr().out.count("\n") == 1


def test_the_range_of_floats_is_that_of_the_whole_set_also_of_the_other_split(tmp_path):
    for split, video in (("train", grey() / 510 + 0.1), ("test", grey() / 127.5 - 1)):
        (tmp_path / split).mkdir()
        torch.save(video, tmp_path / split / "a.pt")
    train, test = load(tmp_path)
    assert level(test, 0) == LEVELS
    expected = [(v / 510 + 1.1) * 127.5 for v in LEVELS]  # not as 0 .. 1, though they would fit
    np.testing.assert_allclose(level(train, 0), expected, atol=0.5)


@pytest.mark.parametrize("low, high", [
    (-2.1, 2.6), (0, 1.06), (0, 1.08), (0, 31), (-0.15, 1), (-1.2, 1), (-20, 255), (0, 300)])
def test_floats_of_another_range_are_refused(tmp_path, low, high):
    for k in range(2):
        torch.save(torch.linspace(low, high, 768).view(4, 3, 8, 8), tmp_path / f"{k}.pt")
    refuses(tmp_path, "floats", "0 .. 1, -1 .. 1 or 0 .. 255", f"{high:g}")


@pytest.mark.parametrize("low, high", [(-3, 200), (0, 300)])
def test_integers_beyond_8_bits_are_refused(tmp_path, low, high):
    np.save(tmp_path / "a.npy", grey().numpy().astype(np.int32))
    np.save(tmp_path / "b.npy", np.linspace(low, high, 768).reshape(4, 3, 8, 8).astype(int))
    refuses(tmp_path, "integers", f"{low}", f"{high}")


def sixteen(path, values):
    path.mkdir()
    for i, value in enumerate(values):
        Image.fromarray(np.full((16, 16), value, np.uint16)).save(path / f"{i}.png")


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    for name in ("a", "b"):
        sixteen(tmp_path / name, [v * 257 for v in LEVELS])
    assert everything(tmp_path)["a"] == LEVELS


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_16_bits_of_which_few_are_used_are_refused(tmp_path, kind):
    for k in range(2):
        if kind == "png":
            sixteen(tmp_path / f"{k}", [0, 1000, 4095])
        else:
            np.save(tmp_path / f"{k}.npy", np.full((4, 8, 8, 3), 4095, np.uint16))
    refuses(tmp_path, "16 bits", "4095", "65535")


@pytest.mark.parametrize("colour, dtype", [((200, 0, 0), np.uint8), ((0, 0, 0), np.float32)])
def test_a_set_of_one_colour_is_refused(tmp_path, colour, dtype):
    for k in range(3):
        np.save(tmp_path / f"{k}.npy", np.full((4, 8, 8, 3), colour, dtype))
    refuses(tmp_path, "every frame is of one colour: nothing to learn from")


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
    folder(tmp_path / "elsewhere" / "other", 50)
    links = [("linked", tmp_path / "elsewhere" / "far"), ("a/up", root), ("a/above", tmp_path),
             ("again", root / "a")]
    try:
        for name, target in links:
            (root / name).symlink_to(target, target_is_directory=True)
        (tmp_path / "elsewhere" / "far" / "back").symlink_to(tmp_path / "elsewhere")
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
    for name, data_dir in (("sky", ""), ("holiday", "mine"), ("holiday", "~/mine")):
        assert len(load_real(name, data_dir, 8)[0]) == 1
    assert places("holiday", "~/mine") == [tmp_path / "mine" / "holiday"]


@pytest.mark.parametrize("ext", ["mp4", "MOV", "avi", "mkv", "webm"])
def test_a_folder_of_videos_is_told_how_to_make_frames(tmp_path, ext):
    (tmp_path / f"my cat.{ext}").write_bytes(b"film")
    frames = tmp_path / "my cat"
    refuses(tmp_path, f'ffmpeg -i "{frames}.{ext}" "{frames}/%05d.png"')


# ---------------------------------------- broken clips

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
    for name in ("bad_webp/1.webp", "bad_webp/2.webp", "text.pt", "text.npz", "text.npy",
                 "text.gif"):
        (train / name).write_bytes(b"not what its name says")
    for name in ("empty.pt", "empty.npy", "empty.npz", "empty.gif"):
        (train / name).write_bytes(b"")
    np.save(train / "nan.npy", np.full((4, 8, 8, 3), np.nan))
    np.save(train / "flat.npy", np.zeros((4, 8, 8), np.uint8))
    np.save(train / "words.npy", np.full((4, 8, 8, 3), "x"))
    np.save(train / "unclear.npy", np.zeros((4, 3, 8, 3), np.uint8))
    np.savez(train / "twice.npz", left=grey().numpy(), right=grey().numpy())
    torch.save(dict(video=1), train / "dict.pt")
    (train / "code.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), 2))
    for name in ("a", "b"):  # two clips whose folders share a name are two
        folder(train / name / "rgb", frames=1)
    got, _ = load(tmp_path)
    assert sorted(level(got, i)[0] for i in range(len(got))) == [0, 1, 2]
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "skipped 21 of 24 train clips" in err
    for name in ("cut_jpg", "mixed", "single", "bad_webp", "text.pt", "text.npz", "text.npy",
                 "text.gif", "empty.pt", "empty.npy", "empty.npz", "empty.gif", "nan.npy",
                 "flat.npy", "words.npy", "dict.pt", "code.pt", "train/a/rgb", "train/b/rgb"):
        assert name in err
    assert re.search(r"unclear.npy \([^)]*ambiguous", err)
    assert re.search(r"twice.npz \(.*left.*right", err)
    assert not (tmp_path / "ran").exists()


def test_a_broken_animated_webp_beside_whole_ones_is_skipped(tmp_path, capsys):
    for k in range(3):
        animated(tmp_path / f"{k}.webp", k)
    whole = (tmp_path / "1.webp").read_bytes()
    (tmp_path / "1.webp").write_bytes(whole[:len(whole) // 2])
    assert set(everything(tmp_path)) == {"0.webp", "2.webp"}
    assert "1.webp" in capsys.readouterr().err


def test_no_usable_clip_or_an_empty_folder_is_a_fault(tmp_path):
    refuses(tmp_path, "no usable train clips in")
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


@pytest.mark.parametrize("kind", ["png", "gif", "animated webp", "npy", "npz", "pt 0..1"])
def test_what_is_read_when_needed_is_what_memory_gives(tmp_path, monkeypatch, kind):
    for k in range(3):
        make(tmp_path, kind, k)
    held, _ = load(tmp_path)
    monkeypatch.setattr(common, "HELD", 0)
    read, _ = load(tmp_path)
    assert held.cache is not None and read.cache is None and held.lengths == read.lengths
    for start, stop in ((0, None), (2, 4), (5, 6)):
        assert torch.equal(held.frames(1, start, stop), read.frames(1, start, stop))


def test_a_long_npy_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "HELD", 0)
    for k in range(2):
        shape = (1000, 3, 64, 64)  # 12 MB, and 48 as floats
        video = np.lib.format.open_memmap(tmp_path / f"{k}.npy", "w+", np.float32, shape)
        video[7:9] = 0.5
        video[:, :, :32] = 0.5
        del video
    tracemalloc.start()
    train, _ = load(tmp_path)
    clip = train.frames(0, 6, 9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert train.lengths == [1000] and peak < 4e6
    assert clip.float().mean((1, 2, 3)).tolist() == [64.25, 128, 128]


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
    del record["train"]["digest"]
    assert record["train"] == {"clips": 4, "frames": 24, "bytes": 4 * size}


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
    is_another(root, record, "train clips are not those", "had 4 clips", "here are 5 clips")


def test_a_clip_of_another_name_than_in_the_record_is_a_fault(five):
    root, record = five
    (root / "4.npy").rename(root / "9.npy")
    is_another(root, record, "clips are not those")


def test_a_clip_of_another_size_than_in_the_record_is_a_fault(five):
    root, record = five
    np.save(load(root)[0].paths[0], grey(5, size=20).numpy())
    is_another(root, record, "train clips are not those", "18,944 bytes", "21,536 bytes")


@pytest.mark.parametrize("trained, here", [("real", "procedural"), ("procedural", "real")])
def test_real_clips_and_a_world_do_not_stand_in_for_each_other(five, trained, here):
    root, record = five
    world = Clips([6], 16, [grey()], [""])
    found = {"real": load(root), "procedural": (world, world)}
    with pytest.raises(Fault, match=f"HERE was trained on {trained} clips.* {here} ones"):
        check_record(*found[here], data_record(*found[trained]), "HERE")


# ---------------------------------------- a picture

def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    turned_picture(tmp_path / "a.jpg")
    frame = read_picture(tmp_path / "a.jpg", 8).float()
    assert frame[:, :3].mean() > 240 and frame[:, 5:].mean() < 15


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "I;16"])
def test_a_picture_of_any_kind_is_its_centred_square(tmp_path, mode):
    image = Image.new("L", (19, 7))
    image.paste(200, (6, 0, 13, 7))  # the centred square
    if mode == "I;16":
        image = Image.fromarray(np.array(image).astype(np.uint16) * 257)
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
