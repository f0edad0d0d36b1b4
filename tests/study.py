"""The study: what proves the claims of the README, kept apart from the scripts that a reader reads.

    python tests/study.py --help               # every part, with what it takes
    python tests/study.py biflow-counts out/sky-0 out/sky-1 out/sky-2

A part prints a table in Markdown; tests/RESULTS.md holds them, each with the command that gave it.
matplotlib is an optional extra: pip install matplotlib.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import biflow  # noqa: E402
import common  # noqa: E402
from biflow import solve_heun  # noqa: E402
from common import frechet, make_rng, own_features, to_float, to_uint8  # noqa: E402

# ---------------------------------------- shared by the parts


def markdown(heads, rows):
    """A table; cells that are floats get three digits."""
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_seeds(results, key):
    """The values of several runs with slashes between."""
    return " / ".join("-" if r[key] is None else f"{r[key]:.3g}" for r in results)


def biflow_run(folder, device):
    """Networks, settings, clips and results of a run of biflow.py."""
    folder = Path(folder)
    nets, cfg = biflow.load_averages(common.load_checkpoint(folder / "ckpt.pt", "biflow"), device)
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]
    if record["source"] != "procedural":
        raise common.Fault(f"{folder} was trained on real clips; this part is of the procedural sky")
    train, test, _ = common.load_clips(
        cfg.dataset, "", cfg.size, (cfg.clips, 256), biflow.WINDOW, cfg.seed)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return nets, cfg, train, test, results


def starts(cfg, test, device):
    first, _ = biflow.first_frames(test, cfg.streams, 1, cfg.seed)
    return to_float(first).to(device)


# ---------------------------------------- Bi-flow


def biflow_table(args):
    """Tab. 1 of several runs, one a seed, from their results.json."""
    results = []
    for folder in args.runs:
        results.append(json.loads((Path(folder) / "results.json").read_text(encoding="utf-8")))
    keys = ("fvd", "nfe", "fvd_first", "fvd_last", "slope", "floor")
    rows = []
    for k, row in enumerate(results[0]["rows"]):
        of_seeds = [run["rows"][k] for run in results]
        rows.append([row["method"], *(over_seeds(of_seeds, key) for key in keys)])
    reported = []
    for run in results:
        reported += [row for row in run["rows"] if row["eps"] == run["reported_eps"]]
    rows.append(["BI-FLOW as reported", *(over_seeds(reported, key) for key in keys)])
    heads = ["", "distance", "evaluations", "first window", "last window", "slope", "floor"]
    print(markdown(heads, rows))
    print("\neps as reported:", " / ".join(f"{run['reported_eps']:g}" for run in results),
          "| seconds:", " / ".join(f"{run['wall_s']:.0f}" for run in results))


@torch.no_grad()
def solve_euler(field, x, args=(), steps=20):
    """Euler with equal steps; arguments and returns as solve_heun."""
    for i in range(steps):
        k = biflow.per_sample(i / steps, x)
        x = x + field(x, k, *args) / steps
    count = torch.full((len(x),), steps, device=x.device)
    return x, count, count


def biflow_euler(args):
    """Tab. 2: all methods at 20 evaluations a frame, BI-FLOW at the eps its run reported."""
    rows = {}
    for folder in args.runs:
        nets, cfg, _, test, results = biflow_run(folder, args.device)
        x = starts(cfg, test, args.device)
        reference = own_features(biflow.real_clips(test, 1024, cfg.seed).to(args.device))
        for method, eps in (("flow", None), ("condiff", None), ("biflow", results["reported_eps"])):
            step = biflow.make_step(method, nets[method], eps, solve_euler)
            video = biflow.roll(step, x, cfg.frames or 128, cfg.seed, method)[0]
            curve, slope = biflow.distances(video, reference, args.device)
            found = dict(fvd=float(np.mean(curve)), fvd_last=curve[-1], slope=slope)
            rows.setdefault(biflow.NAMES[method], []).append(found)
    paper = {"FLOW": 2109, "CONDIFF": 994, "BI-FLOW": 491}
    table = []
    for name, of_seeds in rows.items():
        cells = [over_seeds(of_seeds, key) for key in ("fvd", "fvd_last", "slope")]
        table.append([name, *cells, paper[name]])
    print(markdown(["Euler, 20 steps", "distance", "last window", "slope", "paper: FVD"], table))


def biflow_counts(args):
    """Evaluations a frame in both counts: per sample, and of the released code, by the batch.

    The released solver counts 2 + 2 x tries of the batch's slowest sample: it evaluates a known
    slope again, and the paper's numbers are of that kind.
    """
    rows = {}
    for folder in args.runs:
        nets, cfg, _, test, results = biflow_run(folder, args.device)
        x = starts(cfg, test, args.device)
        for method, eps in (("flow", None), ("condiff", None), ("biflow", results["reported_eps"])):
            seen = []

            def step(x, n):
                found = biflow.make_step(method, nets[method], eps, solve_heun)(x, n)
                seen.append((found[1].float().mean().item(), 2 + 2 * found[2].max().item()))
                return found

            biflow.roll(step, x, args.frames, cfg.seed, method)
            ours, theirs = np.mean(seen, 0)
            rows.setdefault(biflow.NAMES[method], []).append((ours, theirs))
    paper = {"FLOW": 7.84, "BI-FLOW": 14.57, "CONDIFF": 46.18}
    table = []
    for name, counts in rows.items():
        ours = " / ".join(f"{a:.1f}" for a, _ in counts)
        theirs = " / ".join(f"{b:.1f}" for _, b in counts)
        table.append([name, ours, theirs, f"{paper[name]:.2f}"])
    print(markdown(["", "per sample", "as the released code counts", "paper, sky"], table))


class OneNetwork(nn.Module):
    """BI-FLOW's field by one network 3 -> 6, as the paper's text has it."""

    def __init__(self, *settings):
        super().__init__()
        self.net = biflow.UNet(3, 6, *settings, two_clocks=True)

    def forward(self, x, t, alpha):
        return self.net(x, t, alpha).chunk(2, 1)


def train_and_show(args, cfg, nets, train, test):
    """A training and evaluation as in biflow.py, in a folder of its own; prints its Tab. 1."""
    out = Path(args.out)
    device = torch.device(args.device)
    began = time.time()
    if args.iters:
        cfg = replace(cfg, iters=args.iters)
    nets = biflow.train(cfg, nets.to(device), train, out, device)
    rows, videos = biflow.evaluate(cfg, nets, train, test, device)
    common.save_sheet(out / "sheet.png", videos)
    common.write_results(out, "biflow", cfg, device, {"name": args.part}, rows, began,
                         iters=cfg.iters, reported_eps=biflow.best_eps(rows))
    print(f"\n{args.part}, seed {cfg.seed}, {cfg.iters} steps\n")
    print(common.table(rows, biflow.COLUMNS))


def biflow_one(args):
    """BI-FLOW as one network 3 -> 6 instead of two 3 -> 3, all else equal."""
    cfg = biflow.Config(seed=args.seed)
    nets = biflow.build(cfg)
    torch.manual_seed(cfg.seed)
    mults = [float(m) for m in cfg.mults.split(",")]
    nets["biflow"] = OneNetwork(cfg.width, mults, cfg.blocks, cfg.patch)
    clips = common.load_clips("sky", "", cfg.size, (cfg.clips, 256), biflow.WINDOW, cfg.seed)
    train_and_show(args, cfg, nets, clips[0], clips[1])


def biflow_wind(args):
    """Sky whose wind one frame does not tell."""
    cfg = biflow.Config(seed=args.seed)
    clips = common.load_clips(
        "sky", "", cfg.size, (cfg.clips, 256), biflow.WINDOW, cfg.seed, wind="unknown")
    train_and_show(args, cfg, biflow.build(cfg), clips[0], clips[1])


def biflow_mazes(args):
    """The paper's order in mazes is another one: CONDIFF, BI-FLOW, FLOW."""
    common.WORLDS["mazes"] = mazes
    cfg = biflow.Config(seed=args.seed)
    train = common.render("mazes", "train", cfg.clips, cfg.size, biflow.WINDOW, cfg.seed)
    test = common.render("mazes", "test", 256, cfg.size, biflow.WINDOW, cfg.seed)
    train_and_show(args, cfg, biflow.build(cfg), train, test)


def biflow_twice(args):
    """CONDIFF alone, trained for --iters steps (0: twice as many as biflow.py), on the same draws.

    The methods share no weight, so this is the CONDIFF that `biflow.py --iters N` would give.
    """
    cfg = biflow.Config(seed=args.seed)
    cfg = replace(cfg, iters=args.iters or 2 * cfg.iters)
    clips, test, _ = common.load_clips(
        "sky", "", cfg.size, (cfg.clips, 256), biflow.WINDOW, cfg.seed)
    net = biflow.build(cfg)["condiff"].to(args.device)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr)
    batches = common.Batches(clips, cfg.batch, 2, cfg.seed)
    for step in tqdm(range(1, cfg.iters + 1)):
        x0, x1 = to_float(batches[step - 1].to(args.device)).unbind(1)
        _, alpha, n = biflow.draw(cfg.seed, step, x0)
        loss = biflow.condiff_loss(net, x0, x1, alpha, n).mean()
        optimizer.param_groups[0]["lr"] = biflow.learning_rate(cfg, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
    reference = own_features(biflow.real_clips(test, 1024, cfg.seed).to(args.device))
    rows = []
    for name, solve in (("Heun", solve_heun), ("Euler, 20 steps", solve_euler)):
        step = biflow.make_step("condiff", average.module.eval(), None, solve)
        video, nfe, _ = biflow.roll(step, starts(cfg, test, args.device), 128, cfg.seed, name)
        curve, slope = biflow.distances(video, reference, args.device)
        rows.append([name, float(np.mean(curve)), nfe, curve[-1], slope])
    print(f"\nCONDIFF, seed {cfg.seed}, {cfg.iters} steps\n")
    print(markdown(["solver", "distance", "evaluations", "last window", "slope"], rows))


def biflow_deciles(args):
    """Held-out losses in ten bins of the clock: FLOW's t, the others' alpha."""
    for folder in args.runs:
        nets, cfg, _, test, _ = biflow_run(folder, args.device)
        pairs = common.Batches(test, 256, 2, cfg.seed)[0].to(args.device)
        x0, x1 = to_float(pairs).unbind(1)
        t, u, n = biflow.draw(cfg.seed, 0, x0)
        rows = {"FLOW": [], "CONDIFF": [], "BI-FLOW, v": [], "BI-FLOW, n": []}
        with torch.no_grad():
            for decile in range(10):
                clock = (decile + u) / 10
                v, noise = biflow.biflow_loss(nets["biflow"], x0, x1, t, clock, n)
                rows["FLOW"].append(biflow.flow_loss(nets["flow"], x0, x1, clock).mean())
                rows["CONDIFF"].append(biflow.condiff_loss(nets["condiff"], x0, x1, clock, n).mean())
                rows["BI-FLOW, v"].append(v.mean())
                rows["BI-FLOW, n"].append(noise.mean())
        heads = [f"{folder}", *(f"{d / 10:.1f}" for d in range(10))]
        print(markdown(heads, [[k, *(v.item() for v in values)] for k, values in rows.items()]))


def corruption(f, x, n, at=0.1):
    """What is left of noise that we put on frames ourselves, (B,): high where x is corrupt."""
    alpha = torch.full((len(x),), at, device=x.device)
    found = f(x + at * n, 0 * alpha, alpha)[1]
    return at * biflow.rms(found - n)


def biflow_eps(args):
    """A fixed eps against one chosen for every sample and frame, which the paper leaves open.

    The rule: 0.2 where the network finds 15 % more corruption than in real frames, else 0.
    """
    table = []
    for folder in args.runs:
        nets, cfg, _, test, _ = biflow_run(folder, args.device)
        x = starts(cfg, test, args.device)
        reference = own_features(biflow.real_clips(test, 1024, cfg.seed).to(args.device))
        n = torch.randn(x.shape, generator=make_rng(cfg.seed, 3, 0)).to(x)
        with torch.no_grad():
            clean = corruption(nets["biflow"], x, n).mean()

        def adaptive(x, n):
            with torch.no_grad():
                corrupt = corruption(nets["biflow"], x, n) > 1.15 * clean
            eps = torch.where(corrupt, 0.2, 0.0)
            frame, evals, tries = biflow.biflow_step(nets["biflow"], x, n, eps, solve_heun)
            return frame, evals + 1, tries

        rules = {f"{eps:g}": biflow.make_step("biflow", nets["biflow"], eps, solve_heun)
                 for eps in (0.1, 0.15, 0.2)}
        rules["0.2 where corrupt"] = adaptive
        for name, step in rules.items():
            video, nfe, _ = biflow.roll(step, x, args.frames, cfg.seed, name)
            curve, slope = biflow.distances(video, reference, args.device)
            table.append([folder, name, float(np.mean(curve)), nfe, slope])
    print(markdown(["run", "eps", "distance", "evaluations", "slope"], table))


def biflow_between(args):
    """A picture of the states between a frame (plus eps n) and the next: what the network trains on."""
    nets, cfg, _, test, results = biflow_run(args.runs[0], args.device)
    x = starts(cfg, test, args.device)[:4]
    eps = results["reported_eps"]
    n = torch.randn(x.shape, generator=make_rng(cfg.seed, 3, 1)).to(x)
    states = [x + eps * n]
    for stop in np.linspace(0, 1, 9)[1:].tolist():
        def part_way(field, x, args):
            def slower(x, k, *args):
                return stop * field(x, stop * k, *args)
            return solve_heun(slower, x, args)

        states.append(biflow.biflow_step(nets["biflow"], x, n, eps, part_way)[0])
    rows = []
    for i in range(len(x)):
        rows.append(("", torch.cat([to_uint8(s[i:i + 1]) for s in states])))
    path = Path(args.runs[0]) / "between.png"
    common.save_pages(path, [common.sheet(rows, [f"{k}/8" for k in range(9)], scale=2, left=4)])
    print(f"wrote {path}")


def kinetics_features(name, device):
    """(features(uint8 (N, T, 3, H, W)) -> (N, D), frames T) of a network the user has.

    name: r3d_18 (torchvision's weights), or a TorchScript I3D file (i3d_torchscript.pt).
    """
    if name == "r3d_18":
        from torchvision.models.video import R3D_18_Weights, r3d_18
        net = common.pretrained(r3d_18, "r3d_18", "an I3D file").eval().to(device)
        net.fc = nn.Identity()
        prepare = R3D_18_Weights.KINETICS400_V1.transforms()
        return lambda v: torch.cat([net(prepare(c)) for c in v.split(8)]).cpu().double(), 16
    net = torch.jit.load(name, map_location=device).eval()
    options = dict(rescale=True, resize=True, return_features=True)  # of the usual file; 0 .. 255

    def features(v):
        found = [net(c.float().transpose(1, 2), **options) for c in v.split(8)]
        return torch.cat(found).cpu().double()

    return features, 32


@torch.no_grad()
def biflow_fvd(args):
    """The ranking by the user's own Kinetics network: r3d_18 or a TorchScript I3D file."""
    features, length = kinetics_features(args.features, args.device)
    for folder in args.runs:
        nets, cfg, _, test, results = biflow_run(folder, args.device)
        x = starts(cfg, test, args.device)
        real = torch.stack([test.frames(i, 0, length) for i in range(len(test))])
        reference = features(real.to(args.device))
        rows = []
        for method, eps in (("flow", None), ("condiff", None), ("biflow", results["reported_eps"])):
            step = biflow.make_step(method, nets[method], eps, solve_heun)
            video = biflow.roll(step, x, cfg.frames or 128, cfg.seed, method)[0]
            clips = video[:, :video.shape[1] // length * length].unflatten(1, (-1, length)).flatten(0, 1)
            rows.append([biflow.NAMES[method], frechet(features(clips.to(args.device)), reference)])
        print(markdown([f"{folder}", f"FVD by {args.features}"], rows))


def ship_biflow(args):
    """assets/models/biflow-sky.pt from a run: averaged weights in float16, and how they were made."""
    folder = Path(args.runs[0])
    saved = common.load_checkpoint(folder / "ckpt.pt", "biflow")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.strip()
    made = dict(command="python " + results["command"], commit=commit, steps=saved["step"],
                seconds=results["wall_s"], device=results["device"], torch=results["torch"],
                machine=f"{platform.machine()}, {torch.get_num_threads()} threads")
    average = {}
    for name, value in saved["average"].items():
        average[name] = value.half() if value.is_floating_point() else value
    kept = dict(script="biflow", format=common.FORMAT, config=saved["config"], step=saved["step"],
                average=average, eps=results["reported_eps"], made=made)
    with common.written_aside(biflow.SHIPPED) as part:
        torch.save(kept, part)
    print(f"wrote {biflow.SHIPPED}, {biflow.SHIPPED.stat().st_size / 1e6:.2f} MB: {made}")


# ---------------------------------------- mazes: a world in which one frame does not tell the motion


def _maze(rng, cells):
    """Walls of a maze with a few loops, bool (2 cells + 1, 2 cells + 1); rooms lie at odd indices."""
    wall = np.ones((2 * cells + 1, 2 * cells + 1), bool)
    wall[1::2, 1::2] = False
    for i, j in np.ndindex(cells, cells):  # from every room on to the next row or column, or both
        ways = [w for w in ((1, 0), (0, 1)) if i + w[0] < cells and j + w[1] < cells]
        if ways:
            for a, b in rng.permutation(ways)[:1 + (rng.uniform() < 0.25)]:
                wall[2 * i + 1 + a, 2 * j + 1 + b] = False
    return wall


def _walk(rng, wall, frames):
    """A first-person walk: positions (T, 2) and headings (T,); it turns where the way ends or a side way tempts."""
    free = np.argwhere(~wall[1::2, 1::2]) * 2 + 1
    here = free[rng.integers(len(free))]
    pose = []
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
    return dict(video=common.as_video(picture))


# ---------------------------------------- main

PARTS = {
    "biflow-table": biflow_table,
    "biflow-euler": biflow_euler,
    "biflow-counts": biflow_counts,
    "biflow-twice": biflow_twice,
    "biflow-one": biflow_one,
    "biflow-wind": biflow_wind,
    "biflow-mazes": biflow_mazes,
    "biflow-deciles": biflow_deciles,
    "biflow-eps": biflow_eps,
    "biflow-between": biflow_between,
    "biflow-fvd": biflow_fvd,
    "ship-biflow": ship_biflow,
}


def main():
    text = "\n".join(f"  {name:16s} {part.__doc__.splitlines()[0]}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, metavar="PART")
    parser.add_argument("runs", nargs="*", help="output folders of biflow.py, one a seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=128, help="frames in a stream")
    parser.add_argument("--features", default="r3d_18", help="r3d_18 or a TorchScript I3D file")
    parser.add_argument("--out", default="out/study", help="folder of a part that trains")
    parser.add_argument("--iters", type=int, default=0, help="of a part that trains; 0: as biflow.py")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    common.run(main)
