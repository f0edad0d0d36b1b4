"""Generative Video Bi-flow (Liu and Ritschel, ICCV 2025), https://arxiv.org/abs/2503.06364

A neural ODE carries one frame into the next, instead of carrying noise into it: a shorter way, so fewer solver steps.
Alone (FLOW) it drifts off, because it never saw its own errors. BI-FLOW is trained on noisy frames and learns, beside
the way forward in time, the way back out of the noise; while streaming, both are solved together.

    Eq. 3   FLOW      min E || f(x_t, t) - (x1 - x0) ||^2,           x_t = x0 + t (x1 - x0)
    Eq. 4   corrupted interpolation                                  x_{t,a} = x0 + t (x1 - x0) + a n,  n ~ N(0, 1)
    Eq. 5   BI-FLOW   min E || f_v(x_{t,a}, t, a) - (x1 - x0) ||^2 + || f_n(x_{t,a}, t, a) - n ||^2
    Eq. 7   streaming        dx = f_v(x, t, 0) dt                    from the last frame, t = 0 ... 1
    Eq. 8   along a curve    dx = [ f_v dt/dk + f_n da/dk ] dk       (t, a)(k), k = 0 ... 1
    Eq. 9   joint sampling   x^i = Solve(x^{i-1} + eps n)            on the line (t, a): (0, eps) -> (1, 0)
    Eq. 1   CONDIFF, the baseline: from noise to the next frame, the last frame as a condition

    python biflow.py --dataset sky                    # two CPU cores: about 9 minutes; a GPU: the `small` preset
    python biflow.py --dataset sky --eval_only        # its evaluation again, from the checkpoint
    python biflow.py --dataset mazes --joint one      # another world, the paper's one network 3 -> 6

prints the form of the paper's Tab. 1 and Tab. 2 and writes out/biflow-sky-procedural/: FLOW needs the fewest network
evaluations and drifts away, CONDIFF pays the way from noise at every frame, BI-FLOW stays, at about half the price.

The paper's text describes one network 3 -> 6 (--joint one), its released code trains two networks 3 -> 3, each two
thirds as wide (--joint two). Ours is `two`: measured better, see the README.
"""
import itertools
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
from common import Fault, averaged, cut, frechet, like, opt, to_float, to_uint8

@dataclass
class Config:
    dataset: str = opt("sky", "sky, biking, riding, carla, mazes, minerl, or a folder of your clips in --data_dir")
    data_dir: str = opt("", "real clips: DATA_DIR/DATASET/{train,test}/; empty: data, else a procedural world")
    preset: str = opt("auto", "tiny (two CPU cores), small (one GPU), paper (128 px, its numbers); auto: by device")
    iters: int = opt(3500, "training steps, each on one batch shared by all methods", 0, 10**8)
    batch: int = opt(16, "pairs of frames in a batch", 1, 65536)
    size: int = opt(32, "height and width of a frame, pixels; a multiple of 2^(levels - 1) x patch", 16, 1024)
    seed: int = opt(0, "of weights, data order, noise and first frames", 0, 2**31)
    device: str = opt("auto", "auto, cpu, cuda, mps")
    out_dir: str = opt("", "folder to write; empty: out/biflow-DATASET[-procedural]")
    resume: bool = opt(False, "continue the run in the output folder, bit for bit on CPU")
    eval_only: bool = opt(False, "skip training, evaluate the checkpoint in the output folder")
    compile: bool = opt(False, "torch.compile the networks")
    amp: bool = opt(False, "bfloat16 autocast inside the networks")
    methods: str = opt("flow,condiff,biflow", "which to train and compare")
    joint: str = opt("two", "BI-FLOW as one network 3->6 (paper) or two 3->3 (released code)", choices=("one", "two"))
    width: int = opt(32, "channels at the first level; two networks: two thirds of it each, to the nearest 8", 8, 1024)
    mults: str = opt("1,1.5,2", "channels of each level, in widths")
    blocks: int = opt(1, "residual blocks a level", 1, 8)
    patch: int = opt(2, "pixels (squared) folded into channels before the first level", 1, 8)
    lr: float = opt(1e-3, "AdamW's learning rate, after 100 steps of warm-up", 0, 1)
    lr_end: float = opt(0.05, "share of lr left at the end of a cosine; 1: constant", 0, 1)
    ema: float = opt(0.995, "decay of the weight average that is sampled from; 0: the last weights", 0, 0.999999)
    wind: str = opt("known", "procedural sky: does one frame tell the wind's speed", choices=("known", "unknown"))
    clips: int = opt(1000, "training clips of a procedural world, 32 frames each", 2, 10**6)
    eps: str = opt("0,0.1,0.2,0.3", "noise levels of joint sampling to compare (Eq. 9); 0 is plain streaming (Eq. 7)")
    tol: float = opt(1e-2, "absolute and relative tolerance of the adaptive Heun solver", 1e-6, 1)
    step: float = opt(0.05, "step of the Euler solver in the equal-budget table", 1e-3, 1)
    streams: int = opt(16, "videos streamed by every method, from held-out first frames", 2, 4096)
    frames: int = opt(128, "frames in a stream", 32, 10**5)
    features: str = opt("own", "of the Frechet distance: own, r3d_18, or a TorchScript I3D file (i3d_torchscript.pt)")

PRESETS = {
    "tiny": {},
    "small": dict(iters=6000, batch=64, size=64, width=96, mults="1,1.5,2", blocks=2, lr=5e-4, ema=0.999, clips=4000,
                  streams=64, frames=256, amp=True),
    "paper": dict(iters=200000, batch=128, size=128, width=192, mults="1,1,2,2,2,4,4", blocks=2, patch=1, lr=1e-4,
                  lr_end=1.0, ema=0.0, clips=20000, streams=128, frames=512, amp=True),
}
WINDOW, STRIDE = 32, 16  # frames; Sec. 3.1
NAMES = {"flow": "FLOW", "condiff": "CONDIFF", "biflow": "BI-FLOW"}

# Notation. B, C, H, W: batch, channels, height, width. x0, x1: a frame and the next one, (B, 3, H, W) in [-1, 1].
# Clock: t = 0 is the last frame, t = 1 the next. alpha in [0, 1]: how much noise n lies on the frame, 0 is clean.
# CONDIFF's own alpha runs from noise (0) to the next frame (1). t, alpha, eps: (B,).

# ----------------------------------------------------------------------------------------------- THE METHOD: losses
def mse(a, b):
    """Mean squared error of every sample, (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)

def flow_loss(f, x0, x1, t):
    """FLOW, Eq. 3, of every sample (B,). f(x, t) -> d x / d t, like x."""
    x_t = x0 + like(t, x0) * (x1 - x0)
    return mse(f(x_t, t), x1 - x0)  # Eq. 3

def biflow_loss(f, x0, x1, t, alpha, n):
    """BI-FLOW, Eqs. 4 and 5: both terms of every sample, 2 x (B,). f(x, t, alpha) -> (f_v, f_n), each like x."""
    x = x0 + like(t, x0) * (x1 - x0) + like(alpha, x0) * n  # Eq. 4
    f_v, f_n = f(x, t, alpha)
    return mse(f_v, x1 - x0), mse(f_n, n)  # Eq. 5

def condiff_loss(f, x0, x1, alpha, n):
    """CONDIFF, Eq. 1 from noise to x1 given x0, of every sample (B,). f(x, x0, alpha) -> d x / d alpha, like x."""
    x_a = n + like(alpha, x0) * (x1 - n)
    return mse(f(x_a, x0, alpha), x1 - n)  # Eq. 1

# ------------------------------------------------------------------------------------- THE METHOD: one frame onwards
def flow_step(f, x, solve):
    """Streaming, Eq. 7: the next frame and the evaluations it took (B,). f(x, t) as in flow_loss."""
    return solve(f, x)[:2]

def biflow_step(f, x, n, eps, solve, back=False):
    """Joint sampling, Eqs. 8 and 9: the next frame, or with back=True the one before (Sec. 5), and its evaluations.

    f(x, t, alpha) -> (f_v, f_n) as in biflow_loss; x, n (B, C, H, W), n ~ N(0, 1); eps (B,) in [0, 1], 0 is Eq. 7.
    """
    return between(f, x, n, eps, [0.0 if back else 1.0], solve, back)[0]

def between(f, x, n, eps, ks, solve, back=False):
    """The solution at each k of ks (ascending; descending if back): [(state (B, C, H, W), evaluations so far (B,))].

    On the way forward the noise left at k is eps (1 - k); k = 1 is the next frame. The states in between are what the
    network was trained on: linear mixes of two frames, not motion-compensated ones.
    """
    def joint(x, k, eps):  # Eq. 8 on a straight line
        f_v, f_n = f(x, k, eps * (k if back else 1 - k))  # forward (0, eps) -> (1, 0); back from (1, eps) to (0, 0)
        return f_v * 1 + f_n * like(eps if back else -eps, x)  # (dt/dk, dalpha/dk) = (1, -eps), or (1, eps)

    x, k, total, states = x + like(eps, x) * n, 1.0 if back else 0.0, 0, []  # Eq. 9
    for stop in ks:
        x, evals, _ = solve(joint, x, (eps,), k, stop)
        k, total = stop, total + evals
        states.append((x, total))
    return states

def condiff_step(f, x, n, solve):
    """CONDIFF: from noise n to the frame after x, and its evaluations (B,). f(x, x0, alpha) as in condiff_loss."""
    return solve(lambda x_a, k, x0: f(x_a, x0, k), n, (x,))[:2]

def stream(step, x, generator=None):
    """Frames x^1, x^2, ... for ever, in constant memory, with the evaluations of each: yields (x (B, C, H, W), (B,)).

    step(x, n) -> (next frame, evaluations). All methods draw the same noise n, even one that has no use for it, so
    their random numbers match. Drive it by hand with next(), or change the frame it goes on from with .send(frame).
    """
    while True:
        n = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        x, evals = step(x, n)
        x = x.clamp(-1, 1)  # released code: clamped before it becomes the next initial value
        given = yield x, evals
        x = x if given is None else given

# ----------------------------------------------------------------------------------------------------------- solvers
@torch.no_grad()
def solve_heun(field, x, args=(), start=0.0, end=1.0, atol=1e-2, rtol=1e-2, max_evals=2000):
    """Adaptive Heun 2(1), an integral step-size controller and Hairer's first step (II.4), all PER SAMPLE.

    field(x, k, *args) -> dx/dk, like x; x (B, ...), k (B,), args per-sample tensors whose rows follow the samples.
    Finished samples are not evaluated again; a rejected step keeps the slope it started with.
    Returns x(end), evaluations (B,), accepted steps (B,). Raises FloatingPointError if field or step break down.
    """
    sign, span, rms = (1 if end >= start else -1), abs(end - start), lambda e: e.flatten(1).square().mean(1).sqrt()
    if start == end:
        return x, *torch.zeros(2, len(x), dtype=torch.long, device=x.device)
    x, k = x.clone(), x.new_full((len(x),), start)
    evals, accepted = torch.tensor([[2], [0]], device=x.device).repeat(1, len(x))  # two: slope, and the one in d2
    slope, scale = field(x, k, *args).clone(), atol + rtol * x.abs()
    d0, d1 = rms(x / scale), rms(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=span)
    d2 = rms((field(x + like(sign * h0, x) * slope, k + sign * h0, *args) - slope) / scale) / h0
    top = torch.maximum(d1, d2)
    h = torch.minimum(100 * h0, torch.where(top <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / top).sqrt()))
    live, known = torch.arange(len(x), device=x.device), torch.ones(len(x), dtype=torch.bool, device=x.device)
    # live: the samples not yet at `end`, their number L; with a trailing underscore: theirs alone, (L, ...)
    while len(live):
        stale = live[~known[live]]  # those that moved, so that their slope is not known yet
        if len(stale):
            slope[stale] = field(x[stale], k[stale], *(a[stale] for a in args))
            evals[stale] += 1
        x_, k_, slope_ = x[live], k[live], slope[live]
        left = (end - k_).abs()
        h_ = sign * torch.minimum(h[live], left)
        slope2 = field(x_ + like(h_, x) * slope_, k_ + h_, *(a[live] for a in args))
        evals[live] += 1
        new, difference = x_ + like(h_ / 2, x) * (slope_ + slope2), like(h_ / 2, x) * (slope2 - slope_)  # Heun; - Euler
        error = rms(difference / (atol + rtol * torch.maximum(x_.abs(), new.abs())))
        ok, last = error < 1, h_.abs() >= left
        if not error.isfinite().all() or evals.max() > max_evals:
            raise FloatingPointError(f"the ODE solver broke down at k = {k_.min():.3g} after {evals.max()} evaluations")
        x[live] = torch.where(like(ok, x), new, x_)
        k[live] = torch.where(ok, k_ + h_, k_)
        h[live] = h_.abs() * (0.9 * error.clamp(min=1e-12) ** -0.5).clamp(0.2, 10)  # safety, least and largest change
        known[live] = ~ok
        accepted[live] += ok
        live = live[~(ok & last)]
    return x, evals, accepted

@torch.no_grad()
def solve_euler(field, x, args=(), start=0.0, end=1.0, step=0.05):
    """Euler with equal steps of at most `step`; arguments and returns as solve_heun."""
    n = max(1, math.ceil(abs(end - start) / step - 1e-6))
    for i in range(n):
        x = x + (end - start) / n * field(x, x.new_full((len(x),), start + (end - start) * i / n), *args)
    count = torch.full((len(x),), n, device=x.device)
    return x, count, count

# ----------------------------------------------------------------------------------------------------------- network
def sinusoids(s, dim):
    """Clock s (B,) in [0, 1] -> (B, dim)."""
    w = torch.exp(torch.linspace(0, math.log(1000), dim // 2, device=s.device))
    return torch.cat([torch.sin(s[:, None] * w), torch.cos(s[:, None] * w)], 1)

def norm(channels):
    return nn.GroupNorm(math.gcd(8, channels), channels)

class Block(nn.Module):
    """Residual block, scaled and shifted by the embedding of (t, alpha); self-attention after it where asked."""

    def __init__(self, cin, cout, emb, attend=False):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attn = nn.MultiheadAttention(cout, math.gcd(4, cout), batch_first=True) if attend else None
        self.norm3 = norm(cout) if attend else None
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        x = self.skip(x) + h
        if self.attn is not None:
            s = self.norm3(x).flatten(2).transpose(1, 2)  # (B, H W, C)
            x = x + self.attn(s, s, s, need_weights=False)[0].transpose(1, 2).reshape(x.shape)
        return x

class UNet(nn.Module):
    """A 2D diffusion UNet in (x, t, alpha), no temporal layers: (B, cin, H, W) -> (B, cout, H, W), float32."""

    def __init__(self, cin, cout, width, mults, blocks, patch, amp=False):
        super().__init__()
        emb, ch = 4 * width, [int(width * m) for m in mults]
        self.width, self.patch, self.amp = width, patch, amp
        embed = lambda: nn.Sequential(nn.Linear(width // 2 * 2, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.emb_t, self.emb_a = embed(), embed()
        self.inp = nn.Conv2d(cin * patch**2, ch[0], 3, padding=1)
        attend = lambda level: level == max(1, len(ch) - 2) and len(ch) > 1  # second-lowest level, as the released code
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [], ch[0]
        for level, co in enumerate(ch):
            for _ in range(blocks):
                self.down.append(Block(c, co, emb, attend(level)))
                skips.append(c := co)
            if level < len(ch) - 1:
                self.down.append(nn.Conv2d(c, c, 3, 2, 1))
        self.mid = Block(c, c, emb, attend=True)
        for level, co in reversed(list(enumerate(ch))):
            for _ in range(blocks):
                self.up.append(Block(c + skips.pop(), co, emb, attend(level)))
                c = co
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, cout * patch**2, 3, padding=1))
        nn.init.zeros_(self.out[-1].weight)

    def forward(self, x, t, alpha):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            emb = F.silu(self.emb_t(sinusoids(t, self.width)) + self.emb_a(sinusoids(alpha, self.width)))  # (B, emb)
            h, skips = self.inp(F.pixel_unshuffle(x, self.patch)), []  # (B, width, H / patch, W / patch)
            for layer in self.down:
                if isinstance(layer, Block):
                    h = layer(h, emb)
                    skips.append(h)
                else:
                    h = layer(h)  # half as high and wide
            h = self.mid(h, emb)  # (B, width mults[-1], H / fold, W / fold), fold = patch 2^(levels - 1)
            for layer in self.up:
                if isinstance(layer, Block):
                    h = layer(torch.cat([h, skips.pop()], 1), emb)
                else:
                    h = layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))
            return F.pixel_shuffle(self.out(h), self.patch).float()  # (B, cout, H, W)

class Joint(nn.Module):
    """BI-FLOW's field (f_v, f_n): one network 3 -> 6, or two 3 -> 3."""

    def __init__(self, *nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x, t, alpha):
        outs = [net(x, t, alpha) for net in self.nets]
        return outs if len(outs) == 2 else outs[0].chunk(2, 1)

def build(method, cfg):
    """The network of a method: the same in all but its channels (Sec. 3.1)."""
    torch.manual_seed(cfg.seed)
    mults = [float(m) for m in cfg.mults.split(",")]
    net = lambda cin, cout, width: UNet(cin, cout, width, mults, cfg.blocks, cfg.patch, cfg.amp)
    if method != "biflow":
        return net(6 if method == "condiff" else 3, 3, cfg.width)
    narrow = max(8, 8 * round(cfg.width * 2 / 3 / 8))
    return Joint(net(3, 6, cfg.width)) if cfg.joint == "one" else Joint(*(net(3, 3, narrow) for _ in "vn"))

def field(method, net):
    """The network as the callable that the losses and steps of THE METHOD take."""
    return {"flow": lambda x, t: net(x, t, 0 * t), "biflow": net,
            "condiff": lambda x, x0, alpha: net(torch.cat([x, x0], 1), 0 * alpha, alpha)}[method]

def losses(method, net, x0, x1, t, alpha, n):
    """The method's loss terms by name, each (B,); their sum is minimised."""
    f = field(method, net)
    if method == "biflow":
        return dict(zip(("biflow_v", "biflow_n"), biflow_loss(f, x0, x1, t, alpha, n)))
    return {method: flow_loss(f, x0, x1, t) if method == "flow" else condiff_loss(f, x0, x1, alpha, n)}

# ----------------------------------------------------------------------------------------------- train, evaluate
def feature_fn(name, device):
    """(features(uint8 (N, T, 3, H, W)) -> (N, D) float64, frames T of a clip) for --features. Raises Fault."""
    if name == "own":
        return common.own_features, 8
    if name == "r3d_18":
        from torchvision.models.video import R3D_18_Weights, r3d_18
        net = common.pretrained(r3d_18, "--features r3d_18", "--features own").eval().to(device)
        net.fc, prepare = nn.Identity(), R3D_18_Weights.KINETICS400_V1.transforms()
        return (lambda v: torch.cat([net(prepare(c)) for c in v.split(8)]).cpu().double()), 16
    try:
        net = torch.jit.load(name, map_location=device).eval()
    except (RuntimeError, ValueError) as e:
        raise Fault(f"--features {name}: neither own, r3d_18 nor a TorchScript file ({str(e).strip().splitlines()[0]})")
    keywords = dict(rescale=True, resize=True, return_features=True)  # of the usual i3d_torchscript.pt, on 0..255
    return (lambda v: torch.cat([net(c.float().transpose(1, 2), **keywords) for c in v.split(8)]).cpu().double()), 32

def real_clips(clips, length, count, seed):
    """Up to `count` clips of `length` frames, drawn without repetition from a split. Raises Fault if there are none."""
    places = [(i, a) for i, n in enumerate(clips.lengths) for a in range(0, n - length + 1, length)]
    if len(places) < 2:
        raise Fault(f"the Frechet distance needs real clips of at least {length} frames, and two of them at least")
    pick = np.random.default_rng([seed, 77]).permutation(len(places))[:count]
    return torch.stack([clips.frames(i, a, a + length) for i, a in (places[p] for p in pick)])

def noise_of(seed, step, x, device):
    """t, alpha ~ U(0, 1) (B,) and n ~ N(0, 1) like x: a function of (seed, step), the same for all methods."""
    g = common.dice(seed, 1, step)
    return *torch.rand(2, len(x), generator=g).to(device), torch.randn(x.shape, generator=g).to(device)

def train(cfg, clips, nets, averages, out, device):
    """All methods side by side: every step shows them the same frames, clocks and noise. Returns the log's rows."""
    opts = {m: torch.optim.AdamW(net.parameters(), cfg.lr, fused=device.type != "mps") for m, net in nets.items()}
    parts, start, log, began = dict(nets=nets, averages=averages, opts=opts), 0, [], time.time()
    if cfg.resume:
        state = common.load_checkpoint(out / "ckpt.pt", "biflow", cfg, MUST_FIT + SAME_TRAINING)
        start, log, began = state["step"], state["log"], began - state["seconds"]
        for part, m in itertools.product(parts, nets):
            parts[part][m].load_state_dict(state[part][m])

    def save():
        common.save_checkpoint(out / "ckpt.pt", "biflow", cfg, step=step, log=log, seconds=time.time() - began,
                               **{part: {m: v.state_dict() for m, v in held.items()} for part, held in parts.items()})
        common.write(out / "log.csv", common.as_csv(log))

    step, recent, bar = start, [], tqdm(total=cfg.iters, initial=start, desc="training")
    make = common.Batches(clips, cfg.batch, 2, cfg.seed).__getitem__
    loader = common.ahead(make, range(start, cfg.iters), cfg.device, clips)
    with common.interruptible() as interrupted:
        for step, frames in enumerate(loader, start + 1):
            x0, x1 = to_float(frames.to(device, non_blocking=True)).unbind(1)  # 2 x (B, 3, H, W)
            t, alpha, n = noise_of(cfg.seed, step, x0, device)
            cosine, row = 0.5 + 0.5 * math.cos(math.pi * step / cfg.iters), {}
            lr = cfg.lr * min(1, step / 100) * (cfg.lr_end + (1 - cfg.lr_end) * cosine)
            for m, net in nets.items():
                terms = losses(m, net, x0, x1, t, alpha, n)
                loss = sum(term.mean() for term in terms.values())  # Eq. 5: unit weights
                opts[m].param_groups[0]["lr"] = lr
                opts[m].zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                opts[m].step()
                averages[m].update_parameters(net)
                row |= {k: v.detach().mean() for k, v in terms.items()}
            recent.append(torch.stack(list(row.values())))
            if step % 50 == 0 or step == cfg.iters or interrupted[0]:  # reading the loss more often would stall a GPU
                values = torch.stack(recent).cpu()  # (steps, terms)
                broken = (~values.isfinite()).nonzero()
                if len(broken):
                    when, which = step - len(values) + 1 + int(broken[0, 0]), list(row)[broken[0, 1]]
                    raise Fault(f"the loss {which} is not finite at step {when}; try a lower --lr; "
                                f"{out / 'ckpt.pt'} is as it was before")
                means = dict(zip(row, values.mean(0).tolist()))
                log.append(dict(step=step, **means, seconds=round(time.time() - began, 2)))
                bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()}, refresh=False)
                bar.update(step - bar.n)
                recent = []
                if step % 1000 == 0 or step == cfg.iters or interrupted[0]:
                    save()
                if interrupted[0]:
                    raise KeyboardInterrupt
    bar.close()
    if step == start == 0:
        save()
    return log

def one_step(method, net, eps, solve):
    """step(x, n) for stream(), of a method at a noise level eps."""
    f = field(method, net)
    return {"flow": lambda x, n: flow_step(f, x, solve), "condiff": lambda x, n: condiff_step(f, x, n, solve),
            "biflow": lambda x, n: biflow_step(f, x, n, x.new_full((len(x),), eps), solve)}[method]

def roll(step, first, frames, seed, name):
    """Stream `frames` frames from first (B, 3, H, W): uint8 (B, frames, 3, H, W), evaluations a frame, ms a frame."""
    video, count, began = [to_uint8(first)], 0.0, time.time()
    videos = stream(step, first, torch.Generator().manual_seed(seed))
    for _ in tqdm(range(frames - 1), f"streaming {name}", leave=False):
        x, evals = next(videos)
        video.append(to_uint8(x))
        count += evals.float().mean().item()
    return torch.stack(video, 1), count / (frames - 1), (time.time() - began) * 1e3 / len(first) / (frames - 1)

@torch.no_grad()
def by_decile(cfg, nets, clips, device):
    """Held-out losses in ten bins of the clock (FLOW: t; others: alpha); a mean over noise levels hides everything."""
    x0, x1 = to_float(common.Batches(clips, 256, 2, cfg.seed)[0].to(device)).unbind(1)
    t, u, n = noise_of(cfg.seed, 0, x0, device)
    found = {}
    for clock, (m, net) in itertools.product((torch.arange(10, device=device)[:, None] + u) / 10, nets.items()):
        for k, v in losses(m, net, x0, x1, clock if m == "flow" else t, clock, n).items():
            found.setdefault(k, []).append(round(v.mean().item(), 6))
    return found

@torch.no_grad()
def evaluate(cfg, nets, train_clips, test_clips, device):
    """The protocol of Sec. 3.1: every method streams from the same first frames. Returns rows and videos by row."""
    features, length = feature_fn(cfg.features, device)
    count = cfg.streams * (WINDOW // length)  # as many as a window of the streams has
    reference = features(real_clips(test_clips, length, 1024, cfg.seed).to(device))
    floor = frechet(features(real_clips(train_clips, length, count, cfg.seed).to(device)), reference)
    rng = np.random.default_rng([cfg.seed, 1])
    starts = [(i, rng.integers(test_clips.lengths[i])) for i in rng.integers(len(test_clips), size=cfg.streams)]
    starts.sort(key=lambda s: s[1] - test_clips.lengths[s[0]])  # the first, to be shown, have the longest real sequel
    first = to_float(torch.cat([test_clips.frames(i, a, a + 1) for i, a in starts])).to(device)
    videos = {"real": test_clips.frames(starts[0][0], starts[0][1])[None]}
    rows, same = [], dict(features=cfg.features, samples=count, floor=floor, iters=cfg.iters)
    heun = lambda f, x, args=(), a=0.0, b=1.0: solve_heun(f, x, args, a, b, cfg.tol, cfg.tol)
    euler = lambda f, x, args=(), a=0.0, b=1.0: solve_euler(f, x, args, a, b, cfg.step)

    def row(m, eps, solver, solve):
        name = NAMES[m] + (f" eps {eps:g}" if m == "biflow" else "")
        video, nfe, ms = roll(one_step(m, nets[m], eps, solve), first, cfg.frames, cfg.seed, f"{name}, {solver}")
        ends = range(WINDOW, cfg.frames + 1, STRIDE)
        curve = [frechet(features(cut(video[:, e - WINDOW:e], length).to(device)), reference) for e in ends]
        slope = float(np.polyfit(list(ends), curve, 1)[0]) if len(curve) > 1 else 0.0
        rows.append(dict(method=name, joint=cfg.joint if m == "biflow" else None, eps=eps, solver=solver, nfe=nfe,
                         fvd=float(np.mean(curve)), fvd_first=curve[0], fvd_last=curve[-1], slope=slope, **same,
                         ms_per_frame=ms, params=sum(p.numel() for p in nets[m].parameters()), curve=curve))
        if solver == "heun":
            videos[name] = video

    for m in nets:  # equal accuracy, Tab. 1
        for eps in [float(e) for e in cfg.eps.split(",")] if m == "biflow" else [None]:
            row(m, eps, "heun", heun)
    best = min((r for r in rows if r["joint"]), key=lambda r: r["fvd"], default=None)  # as the paper reports BI-FLOW
    for m in nets:  # equal budget, Tab. 2
        row(m, best["eps"] if m == "biflow" else None, "euler", euler)
    if best:  # Sec. 5: backward in time, and between two frames
        f, one, eps = field("biflow", nets["biflow"]), first[:1], first.new_full((1,), best["eps"])
        back = lambda x, n: biflow_step(f, x, n, eps, heun, back=True)
        videos["backward"] = roll(back, one, cfg.frames, cfg.seed, "backward")[0]
        n = torch.randn(one.shape, generator=torch.Generator().manual_seed(cfg.seed)).to(device)
        states = [x for x, _ in between(f, one, n, eps, np.linspace(0, 1, 10).tolist()[1:], heun)]
        videos["between"] = to_uint8(torch.stack([one + eps * n, *states], 1))
    return rows, videos, best

def pictures(out, rows, videos, log):
    """samples.gif, sheet.png and curves.png."""
    between, shown = videos.get("between"), {k: v for k, v in videos.items() if k != "between"}
    frames, ends = len(videos[rows[0]["method"]][0]), list(range(WINDOW, len(videos[rows[0]["method"]][0]) + 1, STRIDE))
    at = sorted({round((frames - 1) * (k / 9) ** 1.6) for k in range(10)})
    label = lambda k: k.replace(" eps", "\neps").replace("real", "real\n(while it\nlasts)")
    lines = [(label(k), v[0][[a for a in at if a < v.shape[1]]]) for k, v in shown.items()]
    lines += [("states from\nframe 0\n+ eps n\nto frame 1", between[0])] if between is not None else []
    page = common.sheet(lines, at, scale=max(1, 64 // lines[0][1].shape[-1]))
    common.save_page(out / "sheet.png", page)
    four = lambda a: [(label(k), v[:4, min(a, v.shape[1] - 1)]) for k, v in shown.items()]
    common.save_gif(out / "samples.gif", [common.sheet(four(a), [f"frame {a}"]) for a in range(0, frames, 2)])
    heun = [r for r in rows if r["solver"] == "heun"]
    curves = {r["method"]: (ends, r["curve"]) for r in heun} | {"floor (real)": (ends, [rows[0]["floor"]] * len(ends))}
    panels = [dict(title="distance over time", x="end of window, frames", y="Frechet distance", log=True, lines=curves),
              dict(title="distance against evaluations", x="evaluations a frame", y="mean Frechet distance", log=True,
                   lines={r["method"]: ([r["nfe"]], [r["fvd"]]) for r in heun})]
    if len(log) > 1:
        terms = {k: ([r["step"] for r in log], [r[k] for r in log]) for k in log[0] if k not in ("step", "seconds")}
        panels.append(dict(title="training loss", x="step", y="loss", log=True, lines=terms))
    common.save_curves(out / "curves.png", panels)

COLUMNS = {"method": ("method", ""), "solver": ("solver", ""), "fvd": ("FD", ".2f"), "nfe": ("steps", ".2f"),
           "fvd_first": ("FD first", ".2f"), "fvd_last": ("FD last", ".2f"), "slope": ("slope/frame", ".4f"),
           "floor": ("floor", ".2f"), "ms_per_frame": ("ms/frame", ".2f")}
MUST_FIT = ("dataset", "size", "methods", "joint", "width", "mults", "blocks", "patch")
SAME_TRAINING = ("seed", "batch", "iters", "lr", "lr_end", "ema", "clips", "wind", "amp")

def check(cfg):
    """What single values cannot tell. Raises Fault."""
    common.check_names(cfg, "methods", NAMES)
    common.check_list(cfg, "eps", float, 0, 1)
    common.check_list(cfg, "mults", float, 0.25, 8)
    fold = cfg.patch * 2 ** (cfg.mults.count(","))
    if cfg.size % fold or cfg.size == fold:
        raise Fault(f"--size {cfg.size}: must be {2 * fold} or a larger multiple of {fold} (patch x 2 a level but one)")

def main():
    began, cfg = time.time(), common.parse_args(Config, PRESETS, __doc__)
    check(cfg)
    device = common.pick_device(cfg.device)
    cfg.device = str(device)  # results.json names the one in use
    world = {"wind": cfg.wind} if cfg.dataset == "sky" else {}
    train_clips, test_clips, source = common.load_clips(cfg.dataset, cfg.data_dir, cfg.size, (cfg.clips, 256), WINDOW,
                                                        cfg.seed, **world)
    length = feature_fn(cfg.features, device)[1]  # a fault of the evaluation is to be found out before the training
    for clips in (train_clips, test_clips):
        real_clips(clips, length, 2, cfg.seed)
    out, lock = common.open_run("biflow", cfg, source)
    nets = {m: build(m, cfg).to(device) for m in NAMES if m in cfg.methods.split(",")}
    averages = {m: averaged(net, cfg.ema) for m, net in nets.items()}
    print(f"{cfg.preset} preset on {device}, {len(train_clips)} + {len(test_clips)} clips ({source}), parameters:",
          ", ".join(f"{NAMES[m]} {sum(p.numel() for p in v.parameters()):,}" for m, v in nets.items()))
    for net in [*nets.values(), *(a.module for a in averages.values())] if cfg.compile else ():
        net.compile()
    if cfg.eval_only:
        state = common.load_checkpoint(out / "ckpt.pt", "biflow", cfg, MUST_FIT)
        log, cfg.iters = state["log"], state["step"]  # the row says what it was trained for
        for m in nets:
            averages[m].load_state_dict(state["averages"][m])
    else:
        log = train(cfg, train_clips, nets, averages, out, device)
    nets = {m: a.module.eval() for m, a in averages.items()}
    deciles = by_decile(cfg, nets, test_clips, device)
    try:
        rows, videos, best = evaluate(cfg, nets, train_clips, test_clips, device)
    except FloatingPointError as e:
        raise Fault(f"{e}: the network's field is broken; train longer or loosen --tol")
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)], size=cfg.size)
    common.write_results(out, "biflow", cfg, dataset, rows, began, reported_eps=best and best["eps"],
                         loss_by_decile=deciles)
    pictures(out, rows, videos, log)
    print("\nheld-out loss by decile of t (FLOW) or alpha (the others):",
          *(f"  {k:9s}" + " ".join(f"{v:8.4f}" for v in vs) for k, vs in deciles.items()), sep="\n")
    for title, solver in ((f"Tab. 1: adaptive Heun, tolerance {cfg.tol:g}", "heun"),
                          (f"Tab. 2: Euler, step {cfg.step:g}", "euler")):
        print("\n" + title, common.table([r for r in rows if r["solver"] == solver], COLUMNS), sep="\n")
    print(f"\nBI-FLOW as reported: eps {best['eps']}, the lowest mean distance of its noise levels" if best else "")
    print(f"wrote {', '.join(p.name for p in sorted(out.iterdir()))} in {out}/ after {time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
