"""What record.py does without the packages of the games: none of them is needed here."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, content
import record

OPEN = np.full((120, 160), 20.0)  # the depth of a view without a wall: deepest in the middle
OPEN[:, 70:90] = 40


class Game:
    """Stands for vizdoom's: the player starts where `start` says and does as it is told."""

    def __init__(self, start, depth=OPEN, ends=10**9):
        self.start = start
        self.depth = depth
        self.left = ends
        self.actions = []

    def new_episode(self):
        self.where = np.array(self.start, float)

    def is_episode_finished(self):
        return self.left <= 0

    def get_state(self):
        picture = np.full((120, 160, 3), len(self.actions) % 256, np.uint8)
        return SimpleNamespace(
            screen_buffer=picture, depth_buffer=self.depth, game_variables=self.where.copy())

    def make_action(self, action):
        self.actions.append(action)
        self.left -= 1


def places(test):
    """Middles of tiles and quarters, (N, 3), whose views are the test's, or are not."""
    column, row, quarter = np.meshgrid(np.arange(-7, 7), np.arange(-7, 7), np.arange(4))
    x = (column.ravel() + 0.5) * record.TILE
    y = (row.ravel() + 0.5) * record.TILE
    where = np.stack([x, y, 90.0 * quarter.ravel()], 1)
    return where[record.held_out(where) == test]


def test_missing_package_is_one_line_that_says_how_to_install_it(tmp_path):
    code = ("import sys; sys.modules['vizdoom'] = None; sys.path.insert(0, 'tests'); "
            "sys.argv = ['record.py', 'doom', '--data_dir', sys.argv[1]]; "
            "import runpy; runpy.run_path('tests/record.py', run_name='__main__')")
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "pip install vizdoom" in done.stderr
    assert content(tmp_path) == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", record.SETS)
def test_folder_that_is_there_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(record.Fault, match="already"):
        record.main([name, "--data_dir", str(tmp_path)])
    assert content(tmp_path) == {f"{name}/mine.txt": b"mine"}


def test_one_view_in_seven_is_held_out_in_every_row_of_tiles_and_every_quarter():
    held = places(True)
    assert len(places(False)) == 6 * len(held)
    for axis in range(3):
        values, counts = np.unique(held[:, axis], return_counts=True)
        assert len(values) == (4 if axis == 2 else 14)
        assert len(set(counts)) == 1
    full = held + [0, 0, 360]  # the same heading
    assert record.held_out(full).all()


def test_a_clip_that_starts_in_the_trains_views_and_meets_the_tests_goes_to_neither():
    ours, other = places(False)[:5], places(True)[:5]
    assert record.split(ours) == "train"
    assert record.split(other) == "test"
    assert record.split(np.concatenate([other[:1], ours])) == "test"
    assert record.split(np.concatenate([ours, other[:1]])) is None


def test_it_turns_to_the_open_side_and_stands_before_a_wall():
    right = OPEN.copy()
    right[:, 130:] = 100
    turn, speed = record.steer(right, 0, 1)
    assert 0 < turn <= record.MOST and speed == record.SPEED
    turn, speed = record.steer(right[:, ::-1], 0, 1)
    assert -record.MOST <= turn < 0 and speed == record.SPEED
    wall = np.full((120, 160), record.NEAR - 1.0)
    assert record.steer(wall, 0, 1) == (record.MOST, 0)
    assert record.steer(wall, 0, -1) == (-record.MOST, 0)


def test_only_doom_turns_turns_at_random_in_a_clip():
    kinds = {}
    for random_turns in (False, True):
        game = Game(places(False)[0])
        clip, part = record.walk(game, np.random.default_rng(0), random_turns)
        assert clip.shape == (64, 64, 64, 3) and clip.dtype == np.uint8 and part == "train"
        turns = [action[0] for action in game.actions[-record.FRAMES:]]
        kinds[random_turns] = len(set(turns))
    assert kinds[False] == 1 and kinds[True] > 2


def test_a_game_that_ends_gives_no_clip():
    game = Game(places(False)[0], ends=20)
    assert record.walk(game, np.random.default_rng(0), False) is None


def test_alikeness_is_of_other_clips_and_in_grey_levels():
    rng = np.random.default_rng(0)
    train = rng.uniform(0, 255, (5, 4, 30)).astype(np.float32)
    tests, trains = record.alikeness(train, train[:2])
    assert tests < 0.1 < 50 < trains  # a train clip is not compared with itself
    twins = np.concatenate([train, train])
    assert max(record.alikeness(twins, twins)) < 0.1
    tests, _ = record.alikeness(train, train[:2] + 3)
    assert abs(tests - 3) < 0.1


def test_a_set_is_written_whole_and_split(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "COUNTS", {"train": 3, "test": 2})
    starts = [places(False)[0], places(True)[0]]

    class Two(Game):
        def new_episode(self):
            self.start = starts[0]
            starts.reverse()
            super().new_episode()

    train, test = record.record("doom", tmp_path / "doom", Two(starts[0]))
    names = sorted(content(tmp_path))
    assert names == [f"doom/test/{i:04d}.npy" for i in range(2)] + [
        f"doom/train/{i:04d}.npy" for i in range(3)]
    clip = np.load(tmp_path / names[0])
    assert clip.shape == (64, 64, 64, 3) and clip.dtype == np.uint8
    assert train.shape == (3, 8, 768) and test.shape == (2, 8, 768)


def test_a_recording_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "start_game", lambda scratch: Game(places(False)[0]))
    monkeypatch.setattr(record, "split", stop)
    with pytest.raises(KeyboardInterrupt):
        record.main(["doom", "--data_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
