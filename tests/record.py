"""Video that this project did not draw: python tests/record.py SET [--data_dir data]

    doom         a walk through rooms: each turn follows from what is seen, so from one frame
    doom-turns   the turns are also random, so one frame does not tell what follows

Needs `pip install vizdoom` besides numpy, pillow and tqdm; nothing else is downloaded. Writes 400
and 60 clips of 64 frames, uint8 (T, H, W, 3) of 64 px, to data/SET/{train,test}: 362 MB, about a
minute. One seed: the same bytes each time on one machine.

Licences, as the package (vizdoom 1.3.2, no licence file) states them. Metadata: MIT for ViZDoom's
code, while "ZDoom uses code from several sources with varying licensing schemes". freedoom2.wad,
whose textures the clips show: "freely redistributable under the terms of the modified BSD license".

The map is ViZDoom's my_way_home: eight rooms, each with its own walls, and brick corridors. With a
constant turn the player faces a wall most of the time, so this one goes where its view is deepest
and turns away when a wall is near.

The split is by what is seen: the map in tiles, the compass in quarters, and of each seven views
(tile, quarter) one is the test's. A test clip starts in such a view, no frame of a train clip lies
in one. With two rooms held out, whose walls no train clip shows, train clips were 70 to 80 from the
test on Bi-flow's measure; so they are 5 (doom) and 1 (doom-turns). The last line printed says how
alike both parts are.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

SEED = 0
COUNTS = {"train": 400, "test": 60}
FRAMES = 64
SIZE = 64
LEAD = 60  # at most so many frames of random walk before a clip
SPEED = 14  # 25 is Doom's walk
MOST = 6  # degrees that a frame may turn
NEAR = 8  # depth of a wall to turn away from: some 60 of the map's units; a room is 160 wide
TILE = 112  # map units, half the way from one room's middle to the next
SETS = ["doom", "doom-turns"]


class Fault(Exception):
    """Something the user can mend: shown as one line, exit status 2."""


try:
    import numpy as np
    from PIL import Image
    from tqdm import tqdm
except ImportError as e:
    print(f"error: {e}: pip install numpy pillow tqdm", file=sys.stderr)
    sys.exit(2)

# ---------------------------------------- the walk

# degrees to the right of the middle, of each column of 160 in a view 90 degrees wide
ANGLES = np.degrees(np.arctan((np.arange(160) - 79.5) / 80))


def start_game(scratch):
    """The game, without window and weapon; what it writes goes to the folder `scratch`.

    Raises Fault if the package is not there.
    """
    try:
        import vizdoom as vzd
    except ImportError as e:
        raise Fault(f"vizdoom cannot be loaded ({e}): pip install vizdoom")
    here = Path(vzd.__file__).parent
    game = vzd.DoomGame()
    game.set_doom_game_path(str(here / "freedoom2.wad"))  # else a doom2.wad lying about is taken
    game.set_doom_scenario_path(str(here / "scenarios" / "my_way_home.wad"))
    game.set_screen_resolution(vzd.ScreenResolution.RES_160X120)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.set_window_visible(False)
    turn = vzd.Button.TURN_LEFT_RIGHT_DELTA
    step = vzd.Button.MOVE_FORWARD_BACKWARD_DELTA
    game.set_available_buttons([turn, step])
    v = vzd.GameVariable
    game.set_available_game_variables([v.POSITION_X, v.POSITION_Y, v.ANGLE])
    game.set_episode_start_time(10)  # the first frames are still being set up
    game.set_seed(SEED)
    cwd = os.getcwd()
    os.chdir(scratch)  # it has no option for this
    try:
        game.init()
    finally:
        os.chdir(cwd)
    return game


def wall_near(depth):
    """Whether a wall is right ahead, in a view's depth (120, 160)."""
    return depth[50:70, 56:104].mean(0).min() < NEAR


def steer(depth, way, side):
    """Degrees to turn right and speed: towards the deepest part of the view, off by `way`.

    If a wall is near: stand and turn to `side`, 1 right or -1 left.
    """
    if wall_near(depth):
        return side * MOST, 0
    ahead = depth[50:70].mean(0)  # (160,): at the height of the eyes
    wide = np.convolve(ahead, np.ones(31) / 31, "same")
    turn = ANGLES[wide.argmax()] / 3 + way
    return float(np.clip(turn, -MOST, MOST)), SPEED


def walk(game, rng, random_turns):
    """A clip, uint8 (T, H, W, 3), and its part; None if it belongs to neither or the game ended.

    It starts after a random walk, at the first frame that is not full of wall.
    """
    game.new_episode()
    lead = rng.integers(LEAD)
    frames = []
    where = []
    tic = 0
    while len(frames) < FRAMES:
        if game.is_episode_finished():  # it found the vest, for which the map was made
            return None
        state = game.get_state()
        depth = state.depth_buffer
        near = wall_near(depth)
        if frames or (tic >= lead and not near):
            picture = Image.fromarray(state.screen_buffer[:, 20:140])  # the middle, 120 x 120
            frames.append(np.asarray(picture.resize((SIZE, SIZE), Image.BOX)))
            where.append(state.game_variables)
            part = split(np.stack(where))
            if part is None:
                return None
        if tic % 16 == 0:
            way = rng.uniform(-4, 4)
        if tic == 0 or not near:  # once turning away it does not change its mind
            side = rng.choice([-1, 1])
        if frames and not random_turns:
            way = 0
            side = 1
        game.make_action(list(steer(depth, way, side)))
        tic += 1
    return np.stack(frames), part

# ---------------------------------------- train and test

def held_out(where):
    """Which views are the test's: x, y, angle (T, 3) -> bool (T,)."""
    column, row = np.floor(where[:, :2] / TILE).astype(int).T
    quarter = np.floor((where[:, 2] + 45) % 360 / 90).astype(int)  # 0: east, 1: north
    return (column + 2 * row + 3 * quarter) % 7 == 0


def split(where):
    """"test", "train", or None: a clip that starts in the train's views and meets the test's."""
    held = held_out(where)
    if held[0]:
        return "test"
    return None if held.any() else "train"


def nearest(frames, others):
    """Distance of each frame to the nearest of the others: (N, D), (M, D) -> (N,), RMS."""
    square = (frames**2).sum(1)[:, None] + (others**2).sum(1) - 2 * frames @ others.T  # (N, M)
    return np.sqrt(np.maximum(square.min(1), 0) / frames.shape[1])


def alikeness(train, test):
    """Mean distance to the nearest frame of another train clip, of test and of train frames.

    Two arrays (clips, frames, D), two clips of train at least; as many train clips are looked at
    as there are test clips. The same number twice: the test shows what the training showed.
    """
    everything = train.reshape(-1, train.shape[2])
    tests = nearest(test.reshape(-1, test.shape[2]), everything)
    trains = []
    for i in range(min(len(train), len(test))):
        others = np.delete(train, i, 0).reshape(-1, train.shape[2])
        trains.append(nearest(train[i], others))
    return tests.mean(), np.concatenate(trains).mean()


def small(clip):
    """Every eighth frame at 16 px, (T / 8, 768): what is compared."""
    part = clip[::8].reshape(-1, 16, SIZE // 16, 16, SIZE // 16, 3)
    return part.mean((2, 4)).reshape(len(part), -1).astype(np.float32)


def record(name, folder, game):
    """Write a set's clips into a folder; small frames of each part, (clips, frames, D)."""
    rng = np.random.default_rng([SEED, SETS.index(name)])
    seen = {"train": [], "test": []}
    for part in COUNTS:
        (folder / part).mkdir(parents=True)
    with tqdm(total=sum(COUNTS.values()), desc=name, unit="clip") as bar:
        while bar.n < bar.total:
            found = walk(game, rng, name == "doom-turns")
            if found is None:
                continue
            clip, part = found
            if len(seen[part]) == COUNTS[part]:
                continue
            np.save(folder / part / f"{len(seen[part]):04d}.npy", clip)
            seen[part].append(small(clip))
            bar.update()
    return np.stack(seen["train"]), np.stack(seen["test"])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data_dir", default="data", help="where the set's folder is made")
    args = parser.parse_args(argv)
    out = Path(args.data_dir).expanduser() / args.set
    if os.path.lexists(out):
        raise Fault(f"{out} is there already: delete it, or name another place by --data_dir")
    out.parent.mkdir(parents=True, exist_ok=True)
    # a folder aside, so that a recording that was interrupted leaves nothing that looks whole
    with tempfile.TemporaryDirectory(prefix=f".{args.set}-", dir=out.parent) as aside:
        game = start_game(aside)
        whole = Path(aside) / args.set
        train, test = record(args.set, whole, game)
        game.close()
        whole.rename(out)
    tests, trains = alikeness(train, test)
    print(f"{out}: {len(train)} + {len(test)} clips. To the nearest frame of another train clip: "
          f"test {tests:.1f}, train {trains:.1f} of 255")


if __name__ == "__main__":
    try:
        main()
    except (Fault, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was kept", file=sys.stderr)
        sys.exit(130)
