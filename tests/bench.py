"""Speed, as ratios measured in one run: python tests/bench.py [part of a line's name ...]

Every line says what it must be, if anything. Peers are optional: pip install diffusers torchode.
On a GPU the networks are compared in bf16 and compiled, with the `small` preset. Not a test: a
busy machine proves nothing.
"""

import contextlib
import gc
import io
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import biflow  # noqa: E402
import common  # noqa: E402
import flowloss  # noqa: E402
import flowmo  # noqa: E402
import motionprompt  # noqa: E402

DEVICE = common.pick_device("auto")
GPU = DEVICE.type == "cuda"
CFG = biflow.Config(**biflow.PRESETS["small" if GPU else "tiny"])
LINES = []


def bench(f):
    """A benchmark: a generator of (name, value, what it must be, how it was measured)."""
    LINES.append(f)
    return f


def clock(f):
    """Seconds that f() takes, the device's work included."""
    if GPU:
        torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def versus(*fs, rounds=7):
    """Seconds of each f, the median of rounds that take turns: a slow moment hits all alike."""
    for f in fs:
        f()
    return np.median([[clock(f) for f in fs] for _ in range(rounds)], 0)


def network(method):
    """A network whose field is uneven enough to need some steps, more on some samples."""
    net = biflow.build(CFG)[method].to(DEVICE).eval()
    g = torch.Generator().manual_seed(0)
    for k, p in net.named_parameters():
        if ".out." in f".{k}" and p.ndim == 4 and p.shape[-1] == 3:
            p.data.copy_(0.06 * torch.randn(p.shape, generator=g))
    return net


@bench
def solver_overhead():
    """The time of a frame against that of its network evaluations, each at its batch size."""
    x, n = torch.randn(2, CFG.streams, 3, CFG.size, CFG.size, device=DEVICE).clamp(-1, 1)
    for m in biflow.METHODS:
        net, inside = network(m), []
        step, forward = biflow.make_step(m, net, 0.2, biflow.solve_heun), net.forward

        def timed(*args):
            result = []
            inside.append(clock(lambda: result.append(forward(*args))))
            return result[0]

        net.forward = timed
        ratios, evals = [], step(x, n)[1].float().mean().item()  # the first one warms up
        for _ in range(7):
            inside.clear()
            ratios.append(clock(lambda: step(x, n)) / sum(inside))
        yield (
            f"frame / its evaluations, {biflow.METHODS[m]}",
            np.median(ratios),
            "<= 1.10",
            f"batch {len(x)}, {CFG.size} px, {evals:.1f} evaluations in {len(inside)} calls, "
            f"{sum(inside) / len(inside) * 1e3:.1f} ms a call",
        )


def steps_per_second(steps=24):
    """Training steps a second of `python biflow.py --dataset sky`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-c",
            "import os, sys\nos.environ.setdefault('GOMP_SPINCOUNT', '1000')\n"
            "sys.path.insert(0, sys.argv[1])\nimport pathlib, time, torch, biflow, common\n"
            "cfg = biflow.Config(clips=32, iters=int(sys.argv[2]))\n"
            "clips = common.render('sky', 'train', 32, 32, 32, 0)\n"
            "nets = biflow.build(cfg)\nbegan = []\nadd = common.Log.add\n"
            "def noted(log, step, **losses):\n"
            "    began.append(time.time())\n    add(log, step, **losses)\n"
            "common.Log.add = noted\n"
            "biflow.train(cfg, nets, clips, pathlib.Path(sys.argv[3]), torch.device('cpu'))\n"
            "print((len(began) - 4) / (began[-1] - began[3]))",
            str(Path(__file__).parents[1]),
            str(steps),
            folder,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout)


@bench
def busy_neighbours():
    """Training while other single-threaded work takes all cores, against training on idle ones."""
    idle = steps_per_second()
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(torch.get_num_threads())]
    try:
        busy = steps_per_second()
    finally:
        for other in others:
            other.kill()
    yield (
        "biflow.py: training on idle / on busy cores",
        idle / busy,
        "<= 6",
        f"{idle:.2f} against {busy:.2f} steps a second, {len(others)} cores",
    )


@bench
def network_against_diffusers():
    """Forward and backward of our UNet against diffusers' of nearly the same parameter count."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return (
            yield "our UNet / diffusers.UNet2DModel", None, "<= 1.00", "diffusers is not installed"
        )
    mults = [float(m) for m in CFG.mults.split(",")]
    count = lambda net: sum(p.numel() for p in net.parameters())
    batch, t = CFG.batch, torch.rand(CFG.batch, device=DEVICE)
    x = torch.randn(batch, 3, CFG.size, CFG.size, device=DEVICE)

    def peer(width):
        kinds = [
            "Attn" if i == max(1, len(mults) - 2) else "" for i in range(len(mults))
        ]  # as ours
        return UNet2DModel(
            sample_size=CFG.size,
            in_channels=3,
            out_channels=3,
            block_out_channels=[int(width * m) for m in mults],
            layers_per_block=CFG.blocks,
            norm_num_groups=4,
            attention_head_dim=width // 4,
            down_block_types=[f"{k}DownBlock2D" for k in kinds],
            up_block_types=[f"{k}UpBlock2D" for k in kinds[::-1]],
        )

    def pass_of(call, net):
        def both():
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                loss = call(net).float().square().mean()
            loss.backward()
            net.zero_grad()

        return both

    for patch in sorted({1, CFG.patch}):
        ours = biflow.UNet(3, 3, CFG.width, mults, CFG.blocks, patch).to(DEVICE)
        widths = range(16, 2 * CFG.width, 8)
        with torch.device("meta"):
            width = min(widths, key=lambda w: abs(count(peer(w)) - count(ours)))
        theirs = peer(width).to(DEVICE)
        if GPU:
            ours.compile()
            theirs.compile()
        a, b = versus(
            pass_of(lambda net: net(x, t), ours),
            pass_of(lambda net: net(x, 1000 * t).sample, theirs),
        )
        yield (
            f"our UNet / diffusers.UNet2DModel, patch {patch}",
            a / b,
            "<= 1.00",
            f"{count(ours) / 1e6:.2f} against {count(theirs) / 1e6:.2f} M parameters, "
            f"batch {batch}, {CFG.size} px, "
            f"{a * 1e3:.0f} against {b * 1e3:.0f} ms, " + ("bf16, compiled" if GPU else "fp32"),
        )


@bench
def solver_against_torchode():
    """A linear field, the same step control; theirs evaluates all until the slowest is done."""
    try:
        import torchode
    except ImportError:
        return (yield "our solver / torchode's", None, "< 1.00", "torchode is not installed")
    g = torch.Generator().manual_seed(0)
    a = torch.randn(768, 768, generator=g, dtype=torch.float64) / 768**0.5 / 2
    a = (a - a.T).to(DEVICE)  # a rotation: nothing dies out
    rate = torch.logspace(-1, 1.3, 64, dtype=torch.float64).to(DEVICE)  # mixed difficulty
    x, zero = (
        torch.randn(64, 768, generator=g, dtype=torch.float64).to(DEVICE),
        torch.zeros_like(rate),
    )
    term = torchode.ODETerm(lambda t, y: rate[:, None] * (y @ a))
    control = torchode.IntegralController(1e-2, 1e-2, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Heun(term), control).to(DEVICE)
    problem = torchode.InitialValueProblem(x, zero, zero + 1)

    @torch.no_grad()
    def theirs():
        return solver.solve(problem)

    def ours():
        return biflow.solve_heun(lambda x, k, rate: rate[:, None] * (x @ a), x, (rate,))

    (mine, evals, tries), other = ours(), theirs()
    accepted = (
        evals - tries - 1
    )  # two to begin with, one a try, one after every accepted step but the last
    note = f"batch 64, {int(evals.min())} to {int(evals.max())} evaluations"
    odd = (accepted != other.stats["n_accepted"]).sum().item()
    yield "samples with other accepted steps than torchode's", odd, "<= 0", note
    yield (
        "largest difference to torchode's solution",
        (mine - other.ys[:, -1]).abs().max().item(),
        "<= 1e-5",
        note,
    )
    p, q = versus(ours, theirs)
    yield (
        "our solver / torchode's",
        p / q,
        "< 1.00",
        f"{note}, {p * 1e3:.0f} against {q * 1e3:.0f} ms",
    )


@bench
def worlds():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, world in common.WORLDS.items():
        took = clock(lambda: [world(common.world_rng(0, "train", i), 32, 32) for i in range(40)])
        yield f"frames/s of world {name}", 40 * 32 / took, ">= 2000", "32 px, one core"
    torch.set_num_threads(threads)


@bench
def loading():
    """Frames of a folder of jpgs, read by threads, against what the training asks for."""
    nets = biflow.build(CFG).to(DEVICE)
    optimiser = torch.optim.AdamW(nets.parameters(), fused=True)
    x = torch.rand(CFG.batch, 3, CFG.size, CFG.size, device=DEVICE)
    t, alpha, n = biflow.draw(0, 1, x)

    def step():
        loss = biflow.flow_loss(nets["flow"], x, x, t) + biflow.condiff_loss(
            nets["condiff"], x, x, alpha, n
        )
        v, noise = biflow.biflow_loss(nets["biflow"], x, x, t, alpha, n)
        (loss + v + noise).mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    used = 2 * CFG.batch / versus(step)[0]
    with tempfile.TemporaryDirectory() as root:
        video = (
            common.sky(common.world_rng(0, "train", 0), 128, 64)["video"]
            .permute(0, 2, 3, 1)
            .numpy()
        )
        for clip in range(8):
            (folder := Path(root, "jpgs", f"clip{clip}")).mkdir(parents=True)
            for i, frame in enumerate(video):
                buffer = io.BytesIO()
                Image.fromarray(frame).save(buffer, "JPEG", quality=90)
                (folder / f"{i}.jpg").write_bytes(buffer.getvalue())
        held, common.HELD = common.HELD, 0
        clips, _ = common.load_real("jpgs", root, CFG.size)
        common.HELD = held
        every = common.Batches(clips, CFG.batch, 2, 0)
        batches = common.prefetched(lambda step: [every[step]], 0, 60, torch.device("cpu"))
        for _ in range(10):  # threads start
            next(batches)
        read = 50 * 2 * CFG.batch / clock(lambda: list(batches))
    yield (
        "frames/s of loading / of training",
        read / used,
        ">= 1.00",
        f"{read:.0f} / {used:.0f}, 128 px jpgs to {CFG.size} px, {min(8, os.cpu_count())} threads",
    )


@bench
def gated_step():
    """Fine-tuning steps of flowloss.py with its flow term, against those without, same noise."""
    cfg = flowloss.Config(**flowloss.PRESETS["small" if GPU else "tiny"])
    net = flowloss.VideoUNet(cfg.width, cfg.frames, cfg.amp).to(DEVICE)
    raft = flowloss.TinyRAFT().to(DEVICE).requires_grad_(False)
    y = torch.randn(cfg.batch, 3, cfg.frames, cfg.size, cfg.size, device=DEVICE)
    draws = [[x.to(DEVICE) for x in flowloss.draw(0, 6, step, y)] for step in range(12)]

    def steps(pairs_a_step):
        pairs = flowloss.draw_pairs(replace(cfg, pairs=pairs_a_step or 1), 1).to(DEVICE)
        for sigma, n, n_first in draws:
            D = flowloss.denoise(net, y + common.like(sigma, y) * n, sigma, y[:, :, 0])
            loss = flowloss.recon_loss(D, y, sigma)
            if pairs_a_step:
                w = flowloss.gate(sigma, cfg.psi)
                loss = loss + flowloss.flow_loss(
                    raft, lambda x: x, D, y, w, sigma, pairs, cfg.scale
                )
            loss.mean().backward()
            net.zero_grad()

    times = versus(*(lambda k=k: steps(k) for k in (0, 1, 4)), rounds=3)
    share = np.mean([(sigma < cfg.psi).float().mean().item() for sigma, _, _ in draws])
    note = f"{share:.0%} of samples below psi {cfg.psi:g}, {times[0] / 12 * 1e3:.0f} ms without"
    yield (
        "gated step, one pair / step on reconstruction alone",
        times[1] / times[0],
        "<= 1.25",
        note,
    )
    yield "gated step, four pairs / the same", times[2] / times[0], "", note


@bench
def raft_against_torchvision():
    from torchvision.models.optical_flow import raft_small

    ours, theirs = flowloss.TinyRAFT().to(DEVICE).eval(), raft_small().to(DEVICE).eval()
    a, b = torch.randn(2, 1, 3, 128, 128, device=DEVICE).clamp(-1, 1)
    for updates in (4, 12):
        with torch.no_grad():
            p, q = versus(
                lambda: ours(a, b, updates), lambda: theirs(a, b, num_flow_updates=updates)
            )
        note = f"128 px, {q * 1e3:.0f} against {p * 1e3:.0f} ms"
        yield f"torchvision's raft_small / tiny RAFT, {updates} updates", q / p, ">= 3", note


def text_to_video(cfg):
    """A network of random weights, and what it makes of a prompt of five words and of none."""
    torch.manual_seed(0)
    net = flowmo.TextToVideo(
        20, 9, cfg.size, cfg.frames, 384 if GPU else 128, 8 if GPU else 3, cfg.amp
    )
    net = net.to(DEVICE).eval().requires_grad_(False)
    text = torch.tensor([[1, 2, 3, 4, 5, 0, 0, 0, 0]], device=DEVICE)
    return net, net.embed(text), net.encode(net.embed(0 * text))


@bench
def guided_sampling():
    """FlowMo at the paper's 12 of 50 guided steps, against plain sampling with the same network."""
    cfg = flowmo.Config(**flowmo.PRESETS["small" if GPU else "tiny"])
    net, prompt, c_0 = text_to_video(cfg)
    noise = torch.randn(8, *net.shape, device=DEVICE)
    velocity = flowmo.prompted(net, net.encode(prompt).expand(8, -1, -1), c_0, 2.0)

    def guide(z, velocity):
        return flowmo.flowmo_step(z, velocity, 0.05)

    plain, guided = versus(
        lambda: flowmo.sample(velocity, noise, flowmo.time_grid(50)),
        lambda: flowmo.sample(velocity, noise, flowmo.time_grid(50), guide, range(12)),
        rounds=3,
    )
    note = f"{plain / 50 * 1e3:.0f} ms a plain step of 8 videos"
    yield (
        "guided / plain sampling",
        guided / plain,
        "<= 2.36",
        note + "; 2.36: the released code, by the paper",
    )


@bench
def optimised_tokens():
    """MotionPrompt at its 6 of 16 steps, K 3, against plain sampling; what flow adds."""
    cfg = motionprompt.Config(**motionprompt.PRESETS["small" if GPU else "tiny"])
    net, prompt, c_0 = text_to_video(cfg)
    raft = motionprompt.TinyRAFT().to(DEVICE).eval().requires_grad_(False)
    disc = motionprompt.Discriminator(net.shape[-1]).to(DEVICE).eval().requires_grad_(False)
    estimate = motionprompt.estimator(raft)
    prompt = prompt.expand(16, -1, -1)
    ends = torch.full((16,), 5, device=DEVICE)
    T0 = torch.randn(16, 1, prompt.shape[2], device=DEVICE)
    sigmas = motionprompt.levels(cfg)
    x = sigmas[0] * torch.randn(16, *net.shape, device=DEVICE)
    inner = motionprompt.as_edm(net)
    denoise = motionprompt.prompted(inner, c_0, 2.0)
    rng = torch.Generator().manual_seed(0)

    def encode(T):
        return net.encode(prompt if T is None else motionprompt.append(prompt, T, ends))

    def loss(D, T):
        i, j = motionprompt.random_pairs(16, D.shape[2], cfg.pairs, cfg.gap, rng)
        flow = motionprompt.flow_of_pairs(D, i, j, torch.nn.Identity(), estimate)
        return motionprompt.motion_loss(disc(flow), flow, T, T0, (1.0, 0.1, 0.001))

    def still(D, T):  # the network alone
        return D.square().flatten(1).mean(1)

    def run(K, loss):
        guided = common.guided_steps(cfg) if K else ()
        return lambda: motionprompt.motionprompt(
            denoise, inner, encode, T0, x, sigmas, guided, loss, K
        )

    plain, network, whole = versus(run(0, loss), run(3, still), run(3, loss), rounds=3)
    note = f"{plain / cfg.steps * 1e3:.0f} ms a plain step of 16 videos"
    yield "MotionPrompt / plain sampling", whole / plain, "", note
    yield "the same, the network alone", network / plain, "", "without reading flow"


@bench
def training():
    """Steps a second of the training loops."""
    preset = "small" if GPU else "tiny"
    mo = flowmo.Config(**{**flowmo.PRESETS[preset], "iters": 8})
    mp = motionprompt.Config(**{**motionprompt.PRESETS[preset], "raft_iters": 8, "disc_iters": 8})
    loss = flowloss.Config(**{**flowloss.PRESETS[preset], "base_iters": 8})
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips = common.render("sprites", "train", 64, mo.size, mo.frames, 0)
        some = torch.stack(clips.cache)
        raft = flowloss.TinyRAFT()
        seconds = clock(lambda: flowloss.train_base(loss, raft, folder, DEVICE))
        yield (
            "flowloss.py: steps/s, base model",
            8 / seconds,
            "",
            f"{loss.batch} clips of {loss.frames}, {loss.size} px",
        )
        seconds = clock(lambda: flowmo.train(mo, clips, clips.captions, folder, DEVICE))
        yield (
            "flowmo.py: steps/s",
            8 / seconds,
            "",
            f"{mo.batch} clips of {mo.frames}, {mo.size} px",
        )
        shape = (3, mo.frames, mo.size, mo.size)
        raft = motionprompt.train_raft(mp, shape, folder, DEVICE)
        seconds = clock(
            lambda: motionprompt.train_discriminator(mp, raft, clips, some, folder, DEVICE)
        )
        yield "motionprompt.py: steps/s, discriminator", 8 / seconds, "", "64 pairs of frames"


@bench
def memory():
    """The most memory that a short run of each script takes: the process, not a GPU."""
    short = {
        "biflow": "--iters 2 --streams 2 --frames 40",
        "flowmo": "--prompts 32",
        "flowloss": "--iters 2",
        "motionprompt": "--prompts 32",
    }
    for script, flags in short.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, Path(__file__).parents[1] / f"{script}.py", *flags.split()]
            run = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(run.pid, 0)
        yield (
            f"{script}.py: MB at most",
            usage.ru_maxrss / 1024 if status == 0 else None,
            "<= 8000",
            "whole process",
        )


def main(wanted):
    device = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}\n\n{'':50s}{'value':>10s}  must be")
    for f in LINES:
        if wanted and not any(w in f.__name__ for w in wanted):
            continue
        for name, value, must, note in f():
            sign, bound = must.split() if must else (">=", "-inf")
            holds = value is None or (
                value <= float(bound) if "<" in sign else value >= float(bound)
            )
            shown = (
                "skipped" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            )
            print(
                f"{name:50s}{shown:>10s}  {must:8s}{'' if holds else 'NOT MET'}  {note}", flush=True
            )
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
