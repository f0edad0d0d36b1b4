"""The study: what proves the claims of the README, kept apart from the scripts that a reader reads.

    python tests/study.py --help               # every part, with what it takes
    python tests/study.py biflow-counts out/sky-0 out/sky-1 out/sky-2

A part prints a table in Markdown; tests/RESULTS.md holds them, each with the command that gave it.
matplotlib is an optional extra: pip install matplotlib.
"""
import argparse
import copy
import json
import math
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
import flowloss  # noqa: E402
from biflow import solve_heun  # noqa: E402
from common import edm_weight, frechet, like, make_rng, own_features, to_float, to_uint8  # noqa: E402

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


def commit_here():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    return done.stdout.strip()


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
    made = dict(command="python " + results["command"], commit=commit_here(), steps=saved["step"],
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


# ---------------------------------------- FlowLoss
# Shared: a base and a RAFT come from a file that flowloss.load_model reads: the shipped one, or a
# base.pt. Clips of the robot's world: training ones 0 to 499 of a seed, held-out ones by --clips.


def flowloss_base(args):
    """base.pt of another seed, with the shipped flow estimator: 16,000 steps, 50 minutes."""
    raft, _, _ = flowloss.load_model(flowloss.SHIPPED, args.device)
    cfg = flowloss.Config(seed=args.seed, resume=True)
    if args.iters:
        cfg.base_iters = args.iters
    out = Path(args.out) / f"flowloss-base-{args.seed}"
    flowloss.train_base(cfg, raft, out, torch.device(args.device))
    print(f"wrote {out / 'base.pt'}")


def plain_denoise(net, x, sigma, first):
    """EDM's Eq. 7 alone, with the first frame as input: as flowloss.denoise, without what is ours."""
    first = first[:, :, None].expand_as(x)
    s = like(sigma, x)
    total = (s**2 + 1).sqrt()
    out = net(torch.cat([x / total, 0 * x, first], 1), sigma.log() / 4)
    return x / total**2 + s / total * out[:, :3]


def flowloss_tricks(args):
    """What our two tricks in denoise are worth: bases of --iters steps, `ours` and `plain` (runs)."""
    device = torch.device(args.device)
    raft, _, _ = flowloss.load_model(flowloss.SHIPPED, device)
    cfg = flowloss.Config(seed=args.seed, base_iters=args.iters or 3000, resume=True)
    real, true, moving = held_out_robots(cfg, args.clips)
    zero = true.square().sum(2).sqrt()[moving].mean().item()
    rows = [["zero flow", "", zero, "", ""]]
    for name in args.runs or ["ours", "plain"]:
        if name == "plain":
            flowloss.denoise = plain_denoise
        out = Path(args.out) / f"flowloss-{name}-{args.seed}"
        net = flowloss.train_base(cfg, raft, out, device).eval()
        loss = common.load_checkpoint(out / "base.pt", "flowloss")["log"][-4:]
        loss = sum(row["recon"] for row in loss) / len(loss)
        made = flowloss.generate(net, to_float(real[:, 0]), cfg.steps, cfg.seed, name)
        error = flowloss.end_point_error(flowloss.flow_of(raft, made), true)
        rows.append([name, loss, error[moving].mean().item(), error[~moving].mean().item(),
                     flowloss.psnr(made, real).mean().item()])
    print(markdown(["", "L_recon, last 200 steps", "flow error, px", "background", "PSNR"], rows))


def dis_flow(video):
    """OpenCV's DIS flow of videos uint8 (N, T, 3, H, W), frames enlarged 8x: (N, T - 1, 2, H, W)."""
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    size = video.shape[-1]
    found = []
    for clip in video.cpu().permute(0, 1, 3, 4, 2).numpy():
        grey = []
        for frame in clip:
            large = cv2.resize(frame, (8 * size, 8 * size), interpolation=cv2.INTER_CUBIC)
            grey.append(cv2.cvtColor(large, cv2.COLOR_RGB2GRAY))
        for a, b in zip(grey, grey[1:]):
            flow = cv2.resize(dis.calc(a, b, None), (size, size), interpolation=cv2.INTER_AREA)
            found.append(torch.from_numpy(flow / 8).permute(2, 0, 1))
    return torch.stack(found).unflatten(0, (len(video), -1))


def held_out_robots(cfg, count):
    """Videos uint8 (N, T, 3, H, W), exact flow (N, T - 1, 2, H, W), where it moves."""
    videos = []
    flows = []
    for k in range(count):
        rng = common.world_rng(cfg.seed, "test", k)
        clip = common.robot(rng, cfg.size, cfg.frames, flow=True)
        videos.append(clip["video"])
        flows.append(clip["flow"])
    true = torch.stack(flows)
    return torch.stack(videos), true, true.square().sum(2).sqrt() > flowloss.MOVING


def per_clip(made, real, true, moving, raft):
    """What is wrong with every clip: sums over its pixels, so that clips can be drawn again."""
    def sums(flow):
        error = flowloss.end_point_error(flow, true)
        return (error * moving).sum((1, 2, 3)), (error * ~moving).sum((1, 2, 3))

    ours, background = sums(flowloss.flow_of(raft, made).cpu())
    dis, _ = sums(dis_flow(made))
    found = dict(ours=ours, dis=dis, background=background, psnr=flowloss.psnr(made, real))
    return {name: value.tolist() for name, value in found.items()}


def flow_factor(kind, sigma, psi):
    """w lambda of the paper's gate, and of weightings of ours: its own are not public."""
    if kind == "gated":
        return edm_weight(sigma) * flowloss.gate(sigma, psi)
    if kind == "constant":  # at every noise level alike
        return torch.ones_like(sigma)
    if kind == "lambda":  # EDM's weight without w
        return edm_weight(sigma)
    if kind == "soft":  # w without the cut
        return edm_weight(sigma) / (sigma**2 + 1)
    raise common.Fault(f"--settings: {kind} is none of gated, constant, lambda, soft")


def read_setting(text):
    """'gated:0.1:2:15' -> kind, S, psi, pairs a step."""
    kind, scale, psi, pairs = text.split(":")
    return kind, float(scale), float(psi), int(pairs)


def flowloss_tune(args):
    """Fine-tune under many settings at once, on the same draws; per-clip errors to a json file."""
    device = torch.device(args.device)
    raft, base, _ = flowloss.load_model(Path(args.model or flowloss.SHIPPED), device)
    raft.requires_grad_(False)
    points = [int(point) for point in args.points.split(",")]
    cfg = flowloss.Config(seed=args.seed, tune_lr=args.lr, pairs=15, iters=max(points))
    settings = ["none", *args.settings.split(",")]
    nets = nn.ModuleDict({str(k): copy.deepcopy(base) for k in range(len(settings))})
    average = AveragedModel(nets, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizer = torch.optim.AdamW(nets.parameters(), cfg.tune_lr)
    clips, _, _ = common.load_clips("robot", "", cfg.size, (cfg.clips, 96), cfg.frames, cfg.seed)
    batches = common.Batches(clips, cfg.batch, cfg.frames, cfg.seed)
    real, true, moving = held_out_robots(cfg, args.clips)
    zero = (true.square().sum(2).sqrt() * moving).sum((1, 2, 3))
    found = dict(seed=args.seed, lr=args.lr, clips=args.clips, zero=zero.tolist(),
                 moving=moving.sum((1, 2, 3)).tolist(), still=(~moving).sum((1, 2, 3)).tolist(),
                 real=per_clip(real, real, true, moving, raft), rows=[])

    def decode(y):
        return y * base.std + base.mean

    def measure(setting, step, net):
        first = to_float(real[:, 0]).to(device)
        made = flowloss.generate(net.eval(), first, cfg.steps, cfg.seed, setting)
        row = per_clip(made, real, true, moving, raft)
        found["rows"].append(dict(setting=setting, step=step, **row))
        net.train()

    measure("base", 0, base)
    for step in tqdm(range(1, max(points) + 1), "fine-tuning"):
        truth = to_float(batches[step - 1].to(device)).transpose(1, 2)
        y = (truth - base.mean) / base.std
        sigma, n, n_first = flowloss.draw(cfg.seed, 6, step, y)
        first = y[:, :, 0] + flowloss.AUGMENT * n_first
        pairs = flowloss.draw_pairs(cfg, step).to(device)
        loss = 0
        for k, setting in enumerate(settings):
            D = flowloss.denoise(nets[str(k)], y + like(sigma, y) * n, sigma, first)
            each = flowloss.recon_loss(D, y, sigma)
            if setting != "none":
                kind, scale, psi, count = read_setting(setting)
                weight = scale * flow_factor(kind, sigma, psi)
                on = weight > 0
                if on.any():
                    apart = flowloss.flow_difference(
                        raft, decode(D[on]), truth[on], pairs[on][:, :count])
                    each[on] = each[on] + weight[on] * apart
            loss = loss + each.mean()
        optimizer.zero_grad()
        loss.backward()
        for net in nets.values():
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(nets)
        if step in points:
            for k, setting in enumerate(settings):
                measure(setting, step, average.module[str(k)])
            common.save_json(Path(args.out), found)
    print(flowloss_table([found]))


def change(runs, setting, step, key):
    """Change against reconstruction alone, %, with a 95 % interval over clips; runs are pooled.

    Clips are drawn again within every run. PSNR: the difference in dB.
    """
    rng = np.random.default_rng(0)
    ours = []
    theirs = []
    for run in runs:
        rows = {(row["setting"], row["step"]): row for row in run["rows"]}
        ours.append(np.array(rows[setting, step][key]))
        theirs.append(np.array(rows["none", step][key]))

    def of(drawn):
        a = np.concatenate([x[i] for x, i in zip(ours, drawn)])
        b = np.concatenate([x[i] for x, i in zip(theirs, drawn)])
        if key == "psnr":
            return a.mean() - b.mean()
        return 100 * (a.sum() / b.sum() - 1)

    middle = of([np.arange(len(x)) for x in ours])
    drawn = [of([rng.integers(len(x), size=len(x)) for x in ours]) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return middle, low, high


def flowloss_table(runs):
    """Rows of one or several runs of flowloss-tune: errors a seed, changes pooled."""
    lines = []
    for row in runs[0]["rows"]:
        setting = row["setting"]
        step = row["step"]
        cells = [setting, step]
        for key, where in (("ours", "moving"), ("dis", "moving"), ("background", "still")):
            values = []
            for run in runs:
                same = [r for r in run["rows"] if (r["setting"], r["step"]) == (setting, step)]
                values.append(f"{sum(same[0][key]) / sum(run[where]):.3f}")
            cells.append(" / ".join(values))
        for key in ("ours", "dis", "background", "psnr"):
            if setting in ("base", "none"):
                cells.append("")
                continue
            middle, low, high = change(runs, setting, step, key)
            cells.append(f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(cells)
    zero = " / ".join(f"{sum(run['zero']) / sum(run['moving']):.3f}" for run in runs)
    floors = []
    for key in ("ours", "dis"):
        floors.append(" / ".join(f"{sum(r['real'][key]) / sum(r['moving']):.3f}" for r in runs))
    heads = ["setting", "step", "flow error, px", "by DIS", "background",
             "change, %", "by DIS, %", "background, %", "PSNR, dB"]
    return (f"zero flow {zero} px; on real clips our estimator errs by {floors[0]}, DIS by "
            f"{floors[1]}; clips {runs[0]['clips']} a seed\n\n" + markdown(heads, lines))


def flowloss_verdict(args):
    """Gated against reconstruction alone, per seed and pooled, from json files of flowloss-tune."""
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in args.runs]
    print(flowloss_table(runs))
    settings = [row["setting"] for row in runs[0]["rows"] if row["setting"] not in ("base", "none")]
    lines = []
    for setting in dict.fromkeys(settings):
        for step in sorted({row["step"] for row in runs[0]["rows"]} - {0}):
            cells = [setting, step]
            for run in runs:
                middle, low, high = change([run], setting, step, "ours")
                cells.append(f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]")
            lines.append(cells)
    print("\nFlow error of every seed, change in %\n")
    print(markdown(["setting", "step", *[f"seed {run['seed']}" for run in runs]], lines))


def flowloss_raft(args):
    """The tiny RAFT: robots by distance in time and by noise; real pairs of a folder (runs)."""
    raft, base, _ = flowloss.load_model(Path(args.model or flowloss.SHIPPED), args.device)
    cfg = flowloss.Config(seed=args.seed)
    rows = []
    for apart in (1, 3, 8, 15):
        errors = []
        zeros = []
        for k in range(args.clips):
            rng = common.world_rng(cfg.seed, "test", k)
            starts = range(cfg.frames - 1) if apart == 1 else [0]
            for start in starts:
                clock = np.array([start, start + apart]) / (cfg.frames - 1)
                rng = common.world_rng(cfg.seed, "test", k)
                clip = common.robot(rng, cfg.size, 2, flow=True, clock=clock)
                a, b = to_float(clip["video"])[:, None]
                with torch.no_grad():
                    flow = raft(a, b)
                true = clip["flow"]
                size = true.square().sum(1).sqrt()
                on = size > flowloss.MOVING
                errors.append((flow - true).square().sum(1).sqrt()[on])
                zeros.append(size[on])
        error = torch.cat(errors).mean().item()
        zero = torch.cat(zeros).mean().item()
        rows.append([f"robot, {apart} frames apart", error, zero, zero / error])
    for folder in args.runs:
        rows += real_pairs(raft, Path(folder))
    print(markdown(["", "tiny RAFT, px", "zero flow, px", "times better"], rows))

    real, true, moving = held_out_robots(cfg, min(16, args.clips))
    rows = []
    for sigma in (0, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4):
        n = torch.randn(real.shape, generator=make_rng(cfg.seed, 0, 2))
        noisy = to_float(real) + sigma * base.std * n
        with torch.no_grad():
            flow = torch.stack([raft(clip[:-1], clip[1:]) for clip in noisy])
        rows.append([sigma, flowloss.end_point_error(flow, true)[moving].mean().item()])
    print()
    print(markdown(["sigma", "error on moving pixels, px"], rows))


def real_pairs(raft, folder):
    """Folders of frame1.png, frame2.png, flow.npy (H, W, 2), made small: 32 px high."""
    from PIL import Image

    errors = []
    zeros = []
    for pair in sorted(p for p in folder.iterdir() if p.is_dir()):
        flow = torch.from_numpy(np.load(pair / "flow.npy")).float().permute(2, 0, 1)[None]
        shrink = flow.shape[2] / 32
        size = (32, 2 * round(flow.shape[3] / shrink / 2))
        true = nn.functional.interpolate(flow, size, mode="area") / shrink
        images = []
        for name in ("frame1.png", "frame2.png"):
            with Image.open(pair / name) as image:
                small = image.convert("RGB").resize(size[::-1], Image.Resampling.BOX)
            images.append(to_float(torch.from_numpy(np.array(small))).permute(2, 0, 1)[None])
        with torch.no_grad():
            error = (raft(*images) - true).square().sum(1).sqrt()
        length = true.square().sum(1).sqrt()
        on = length > flowloss.MOVING
        errors.append(error[on])
        zeros.append(length[on])
    ratios = [z.mean().item() / e.mean().item() for e, z in zip(errors, zeros)]
    error = torch.cat(errors).mean().item()
    zero = torch.cat(zeros).mean().item()
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    alike = [torch.stack([x.mean() for x in values]).mean().item() for values in (errors, zeros)]
    return [
        [f"{len(errors)} real pairs, all moving pixels alike", error, zero, zero / error],
        ["every pair alike", *alike, alike[1] / alike[0]],
        ["times better, pair by pair", "", "", each],
    ]


def flowloss_noise(args):
    """Figs. 2 and 3: losses, weights and flow by noise level; assets/flowloss-noise.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    raft, base, _ = flowloss.load_model(Path(args.model or flowloss.SHIPPED), args.device)
    cfg = flowloss.Config(seed=args.seed)
    real, true, moving = held_out_robots(cfg, 8)
    truth = to_float(real).transpose(1, 2)
    y = (truth - base.mean) / base.std
    n = torch.randn(y.shape, generator=make_rng(cfg.seed, 0, 3))
    t = torch.arange(1, cfg.frames).expand(len(y), -1)
    pairs = torch.stack([torch.zeros_like(t), t], -1)
    sigmas = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 80]
    recon = []
    apart = []
    noisy_error = []
    clean_error = []
    for sigma in tqdm(sigmas, "noise levels"):
        x = y + sigma * n
        s = torch.full((len(y),), float(sigma))
        with torch.no_grad():
            D = flowloss.denoise(base, x, s, y[:, :, 0])
            recon.append(flowloss.recon_loss(D, y, s).mean().item())
            apart.append(flowloss.flow_difference(raft, D * base.std + base.mean, truth, pairs).mean().item())
            for video, errors in ((x, noisy_error), (D, clean_error)):
                frames = (video * base.std + base.mean).transpose(1, 2)  # (N, T, 3, H, W)
                flow = torch.stack([raft(clip[:-1], clip[1:]) for clip in frames])
                errors.append(flowloss.end_point_error(flow, true)[moving].mean().item())
    s = torch.tensor(sigmas)
    lam = edm_weight(s)
    curves = {
        "constant": torch.tensor(apart),
        "lambda": lam * torch.tensor(apart),
        "lambda w, no gate": torch.tensor(apart) / s**2,
    }
    for psi in (0.5, 2, 10):
        kept = torch.where(s < psi, torch.tensor(apart) / s**2, math.nan)
        curves[f"gated, psi {psi:g}"] = kept
    fig, axes = plt.subplots(1, 4, figsize=(20, 4.2))
    axes[0].loglog(sigmas, recon, "o-")
    axes[0].set_title("L_recon of the base (paper: Fig. 2a)")
    for k, (label, curve) in enumerate(curves.items()):
        axes[1].loglog(sigmas, curve, "o-", label=label, lw=4 - k / 2, ms=3)
    axes[1].set_title("flow difference, weighted, pixels^2 (Fig. 2b)")
    axes[1].legend()
    grid = torch.logspace(-2, 2, 200)
    density = (-((grid.log() - flowloss.P_MEAN) ** 2) / (2 * flowloss.P_STD**2)).exp()
    axes[2].semilogx(grid, density, "k")
    for k, psi in enumerate((0.5, 2, 10)):
        share = 0.5 + 0.5 * math.erf((math.log(psi) - flowloss.P_MEAN) / flowloss.P_STD / 2**0.5)
        label = f"psi {psi:g}: {100 * share:.0f} % of steps below"
        axes[2].axvline(psi, ls="--", color=f"C{k}", label=label)
    axes[2].set_title("noise prior and gates (Fig. 2d)")
    axes[2].legend()
    axes[3].semilogx(sigmas, noisy_error, "o-", label="flow of the noisy clip (Fig. 3)")
    axes[3].semilogx(sigmas, clean_error, "o-", label="flow of D")
    zero = true.square().sum(2).sqrt()[moving].mean().item()
    axes[3].axhline(zero, color="grey", ls=":", label="zero flow")
    axes[3].set_title("error of flow on moving pixels, px")
    axes[3].legend()
    for axis in axes:
        axis.set_xlabel("sigma")
    fig.tight_layout()
    path = ROOT / "assets" / "flowloss-noise.png"
    fig.savefig(path, dpi=60)
    rows = zip(sigmas, recon, apart, noisy_error, clean_error)
    print(markdown(["sigma", "L_recon", "flow difference, px^2", "flow error, noisy, px",
                    "flow error, D, px"], list(rows)))
    print(f"wrote {path}")


def ship_flowloss(args):
    """assets/models/flowloss-robot.pt from a run of --train, in float16, and how it was made."""
    run = Path(args.runs[0])
    saved = common.load_checkpoint(run / "ckpt.pt", "flowloss")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    config = {**saved["config"], "out_dir": "", "resume": False}
    step = max(saved["kept"])
    seconds = saved["log"][-1]["seconds"]
    for name in ("raft", "base"):
        seconds += common.load_checkpoint(run / f"{name}.pt", "flowloss")["log"][-1]["seconds"]

    def halved(weights):
        return {name: value.half() for name, value in weights.items()}

    kept = {step: {name: halved(weights) for name, weights in saved["kept"][step].items()}}
    made = dict(
        command=f"python flowloss.py --dataset robot --train --seed {config['seed']}",
        commit=commit_here(), seconds=round(seconds), device=results["device"],
        torch=results["torch"], machine=f"{platform.machine()}, {torch.get_num_threads()} threads")
    shipped = dict(script="flowloss", format=common.FORMAT, config=config, step=saved["step"],
                   raft=halved(saved["raft"]), base=halved(saved["base"]), kept=kept, made=made)
    with common.written_aside(flowloss.SHIPPED) as part:
        torch.save(shipped, part)
    print(f"wrote {flowloss.SHIPPED}, {flowloss.SHIPPED.stat().st_size / 1e6:.2f} MB: {made}")


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
    "flowloss-base": flowloss_base,
    "flowloss-tricks": flowloss_tricks,
    "flowloss-tune": flowloss_tune,
    "flowloss-verdict": flowloss_verdict,
    "flowloss-raft": flowloss_raft,
    "flowloss-noise": flowloss_noise,
    "ship-flowloss": ship_flowloss,
}


def main():
    text = "\n".join(f"  {name:16s} {part.__doc__.splitlines()[0]}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, metavar="PART")
    parser.add_argument("runs", nargs="*", help="output folders, one a seed; or what the part says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=128, help="frames in a stream")
    parser.add_argument("--features", default="r3d_18", help="r3d_18 or a TorchScript I3D file")
    parser.add_argument("--out", default="out/study", help="folder of a part that trains")
    parser.add_argument("--iters", type=int, default=0, help="of a part that trains; 0: as biflow.py")
    parser.add_argument("--model", default="", help="base.pt of flowloss.py; empty: the shipped one")
    parser.add_argument("--settings", default="gated:0.1:2:1",
                        help="flowloss-tune: KIND:S:PSI:PAIRS, with commas between")
    parser.add_argument("--points", default="25,50,100,200,800", help="steps to evaluate after")
    parser.add_argument("--lr", type=float, default=flowloss.Config.tune_lr, help="of fine-tuning")
    parser.add_argument("--clips", type=int, default=48, help="held-out clips")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    common.run(main)
