"""Generative Video Bi-flow (Liu and Ritschel, ICCV 2025), https://arxiv.org/abs/2503.06364

A neural ODE carries a frame into the next one: a shorter way than from noise (CONDIFF, the
baseline), so fewer solver steps. Alone (FLOW) it drifts off, because it never saw its own errors.
BI-FLOW learns, on noisy frames, the way forward in time and the way out of the noise, and streams
along both at once.

    Eq. 1   CONDIFF   min E || f(x_a, x0, a) - (x1 - n) ||^2,     x_a = n + a (x1 - n)
    Eq. 3   FLOW      min E || f(x_t, t) - (x1 - x0) ||^2,        x_t = x0 + t (x1 - x0)
    Eq. 4   noisy interpolation      x_{t,a} = x0 + t (x1 - x0) + a n,     n ~ N(0, 1)
    Eq. 5   BI-FLOW   min E || f_v(x_{t,a}, t, a) - (x1 - x0) ||^2 + || f_n(x_{t,a}, t, a) - n ||^2
    Eq. 6   denoise   dx = f_n(x, t, a) da                        a from the noise level to 0
    Eq. 7   predict   dx = f_v(x, t, 0) dt                        t from 0 to 1
    Eq. 8   jointly   dx = [ f_v dt/dk + f_n da/dk ] dk           along a curve (t, a)(k)
    Eq. 9             x^i = Solve(x^{i-1} + eps n)                on the line (0, eps) -> (1, 0)

    python biflow.py --dataset sky                       # train all three and compare them
    python biflow.py --dataset clips --methods biflow    # train BI-FLOW alone on data/clips
    python biflow.py --first photo.jpg                   # continue a picture; no training

A run prints the form of the paper's Tab. 1: distance to real clips, network evaluations a frame.
"""
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

# Before torch: threads that wait must sleep, or a busy neighbour makes training 100 times slower.
if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

if __package__:  # copied into a package of yours
    from . import common
    from .common import Fault, like, make_rng, opt, to_float, to_uint8
else:
    import common
    from common import Fault, like, make_rng, opt, to_float, to_uint8

WINDOW = 32  # frames over which a distance is measured (Sec. 3.1)
STRIDE = 16  # frames from one window to the next (Sec. 3.1)
CLIP = 8     # frames our features look at; a window is cut into such clips
SHIPPED = Path(__file__).resolve().parent / "assets" / "models" / "biflow-sky.pt"
SAVE_EVERY = 500  # training steps

@dataclass
class Config:
    dataset: str = opt("sky", "sky, biking, riding, carla, minerl, or a folder in --data_dir")
    data_dir: str = opt("", "where DATASET/{train,test}/ lies; else data", free=True)
    preset: str = opt("tiny", "tiny (two CPU cores), small (one GPU, never run to its end), paper")
    first: str = opt("", "a picture to continue, by the run in the output folder", free=True)
    resume: bool = opt(False, "go on with the run in the output folder", free=True)
    eval_only: bool = opt(False, "evaluate the run in the output folder again", free=True)
    out_dir: str = opt("", "the run's folder; else out/biflow-DATASET[-procedural]", free=True)
    device: str = opt("auto", "auto (cuda if it is there, else cpu), cpu, cuda, mps", free=True)
    compile: bool = opt(False, "torch.compile the networks", free=True)
    amp: bool = opt(False, "bfloat16 autocast inside the networks")
    methods: str = opt("flow,condiff,biflow", "what to train and compare; --resume may add one",
                       free=True)
    seed: int = opt(0, "of weights, data, noise and first frames", 0, 2**31)
    iters: int = opt(2500, "training steps", 1, 10**8)
    batch: int = opt(16, "pairs of frames in a batch", 1, 65536)
    size: int = opt(32, "height and width of a frame, pixels", 16, 1024)
    clips: int = opt(1000, "training clips of the procedural world, 32 frames each", 2, 10**6)
    width: int = opt(24, "channels at the first level; BI-FLOW's two networks: 2/3", 8, 1024)
    mults: str = opt("1,1.5,2", "channels of each level, in widths")
    blocks: int = opt(1, "residual blocks a level", 1, 8)
    patch: int = opt(2, "pixels (squared) that become channels", 1, 8)
    lr: float = opt(1.5e-3, "AdamW's learning rate, after 100 steps of warm-up", 0, 1)
    lr_end: float = opt(0.05, "share of lr to which its last fifth falls; 1: constant", 0, 1)
    ema: float = opt(0.995, "decay of the average of weights to sample from", 0, 0.999999)
    eps: str = opt("0,0.1", "noise levels to compare (Eq. 9)", free=True)
    tol: float = opt(1e-2, "tolerance of Heun's solver", 1e-6, 1, free=True)
    streams: int = opt(16, "videos streamed by every method", 2, 4096, free=True)
    frames: int = opt(0, "frames in a stream; 0: 128, or 64 with --first", 0, 10**5, free=True)

PRESETS = {
    "tiny": {},
    "small": dict(
        iters=6000, batch=64, size=64, clips=4000, width=72, mults="1,2,3", blocks=2,
        lr=5e-4, ema=0.999, amp=True, streams=64, frames=256,
    ),
    # The released networks but for the clocks, 291 M parameters, BI-FLOW 259 M: 10 GB beside the
    # activations, 9 GB a checkpoint. The authors train minerl and mazes at --size 64 --mults
    # 1,1,2,2,4,4, and squash a frame to a square where we crop it.
    "paper": dict(
        iters=200000, batch=128, size=128, clips=4000, width=192, mults="1,1,2,2,2,4,4", blocks=2,
        patch=1, lr=1e-4, lr_end=1.0, ema=0.0, amp=True, streams=128, frames=512,
    ),
}
METHODS = {"flow": "FLOW", "condiff": "CONDIFF", "biflow": "BI-FLOW"}

# x0, x1: a frame and the next, (B, 3, H, W) in [-1, 1]. n: noise of that shape. t: the clock from
# the last frame (0) to the next (1). alpha: how much noise lies on a frame (CONDIFF's runs from
# noise, 0, to the frame, 1). eps: the alpha that streaming starts with. t, alpha, eps: (B,), or one
# number. k: the solver's clock, from 0 to 1.

# ---------------------------------------- THE METHOD: losses

def mse(a, b):
    """Mean squared error of every sample, (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)

def flow_loss(f, x0, x1, t):
    """FLOW, Eq. 3, of every sample (B,). f(x, t) -> dx/dt, like x."""
    x_t = x0 + like(t, x0) * (x1 - x0)
    return mse(f(x_t, t), x1 - x0)  # Eq. 3

def biflow_loss(f, x0, x1, t, alpha, n):
    """BI-FLOW, Eqs. 4 and 5: both terms, (B,) each. f(x, t, alpha) -> (f_v, f_n), each like x."""
    x = x0 + like(t, x0) * (x1 - x0) + like(alpha, x0) * n  # Eq. 4
    f_v, f_n = f(x, t, alpha)
    return mse(f_v, x1 - x0), mse(f_n, n)  # Eq. 5: their sum, unweighted

def condiff_loss(f, x0, x1, alpha, n):
    """CONDIFF, Eq. 1 from noise to x1, given x0 (B,). f(x, x0, alpha) -> dx/dalpha, like x."""
    x_alpha = n + like(alpha, x0) * (x1 - n)
    return mse(f(x_alpha, x0, alpha), x1 - n)  # Eq. 1

# ---------------------------------------- THE METHOD: one frame onwards
# solve(field, x, args) solves dx/dk = field(x, k, *args) from k = 0 to 1, as solve_heun does. args
# are handed on, not closed over, since a solver may go on with fewer samples. A step returns what
# solve does: the frame, evaluations, tries.

def flow_step(f, x, solve):
    """FLOW: the next frame. f(x, t) as in flow_loss."""
    return solve(f, x)

def condiff_step(f, x, n, solve):
    """CONDIFF: from noise n to the frame after x. f(x, x0, alpha) as in condiff_loss."""
    def along_alpha(x_alpha, k, x0):
        return f(x_alpha, x0, k)

    return solve(along_alpha, n, (x,))

def denoise_step(f, x, t, alpha, solve):
    """Eq. 6: out of the noise of level alpha, at one t. f(x, t, alpha) as in biflow_loss."""
    def along_alpha(x, k, t, alpha):
        return -like(alpha, x) * f(x, t, alpha * (1 - k))[1]  # Eq. 6, dalpha/dk = -alpha

    return solve(along_alpha, x, (per_sample(t, x), per_sample(alpha, x)))

def predict_step(f, x, solve):
    """Eq. 7, plain streaming: the next frame, with no noise. f(x, t, alpha) as in biflow_loss."""
    def along_t(x, k):
        return f(x, k, 0 * k)[0]  # Eq. 7

    return solve(along_t, x)

def biflow_step(f, x, n, eps, solve):
    """Joint sampling, Eqs. 8 and 9: the next frame. f(x, t, alpha) as in biflow_loss."""
    def along_line(x, k, eps):
        f_v, f_n = f(x, k, eps * (1 - k))
        return f_v - like(eps, x) * f_n  # Eq. 8, dt/dk = 1 and dalpha/dk = -eps

    return solve(along_line, x + like(eps, x) * n, (per_sample(eps, x),))  # Eq. 9

def biflow_step_back(f, x, n, eps, solve):
    """Sec. 5, against time: the frame before x, on the line (t, alpha) from (1, eps) to (0, 0)."""
    def along_line(x, k, eps):
        f_v, f_n = f(x, 1 - k, eps * (1 - k))
        return -f_v - like(eps, x) * f_n  # Eq. 8, dt/dk = -1 and dalpha/dk = -eps

    return solve(along_line, x + like(eps, x) * n, (per_sample(eps, x),))

def stream(step, x, rng=None):
    """Frames x^1, x^2, ... for ever, in constant memory: yields (x (B, C, H, W), evaluations (B,)).

    step(x, n) -> next frame, evaluations, tries. The noise n is drawn even for a method that has no
    use for it, so that all draw the same. rng: a torch.Generator on the CPU.
    """
    while True:
        n = torch.randn(x.shape, generator=rng).to(x)
        x, evals, _ = step(x, n)
        x = x.clamp(-1, 1)  # released code: before it becomes the next initial value
        yield x.clone(), evals  # a caller may write to what it is given

def per_sample(s, x):
    """A number, or (B,), as (B,) in at least float32, for samples x (B, ...)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(s, dtype=dtype, device=x.device).expand(len(x))

# ---------------------------------------- solvers

def rms(x):
    """Root mean square of every sample, (B, ...) -> (B,), in at least float32."""
    x = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return x.square().mean(1).sqrt()

def take(rows, *tensors):
    """Those rows of every tensor."""
    return [tensor[rows] for tensor in tensors]

def hairer_first_step(field, x, slope, args, tol):
    """Length of a first step (B,), by trying Euler's: Hairer, Norsett and Wanner, Sec. II.4."""
    scale = tol + tol * x.abs()
    d0 = rms(x / scale)
    d1 = rms(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = h0.clamp(max=1.0)  # the whole way
    change = field(x + like(h0, x) * slope, h0, *args) - slope
    d2 = rms(change / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = (0.01 / steepest).sqrt()
    still = steepest <= 1e-15
    h1 = torch.where(still, (1e-3 * h0).clamp(min=1e-6), h1)
    return torch.minimum(100 * h0, h1)

@torch.no_grad()
def solve_heun(field, x, args=(), tol=1e-2, max_evals=2000):
    """Adaptive Heun 2(1) with an integral step-size controller, every sample at steps of its own.

    field(x, k, *args) -> dx/dk, like x (B, ...), at k (B,); the rows of args follow the samples,
    of which one that has arrived leaves the batch. Returns x at k = 1, evaluations (B,) and tried
    steps (B,). FloatingPointError: a broken field.
    """
    result = torch.empty_like(x)
    row = torch.arange(len(x), device=x.device)  # of result: where each sample of x belongs
    evals = torch.zeros_like(row)
    tries = torch.zeros_like(row)
    k = per_sample(0.0, x)
    slope = field(x, k, *args).clone()  # written to in place below; a field may keep its own
    h = hairer_first_step(field, x, slope, args, tol)
    evals += 2
    while len(row) > 0:
        left = 1 - k
        h = torch.minimum(h, left)
        slope_end = field(x + like(h, x) * slope, k + h, *args)
        evals[row] += 1
        tries[row] += 1
        heun = x + like(h / 2, x) * (slope + slope_end)
        difference = like(h / 2, x) * (slope_end - slope)  # Heun's step less Euler's
        error = rms(difference / (tol + tol * torch.maximum(x.abs(), heun.abs())))
        if not error.isfinite().all() or evals.max() > max_evals:
            raise FloatingPointError(f"the solver broke down after {evals.max()} evaluations: "
                                     "train longer, or loosen the tolerance")

        good = error < 1
        last = good & (h >= left)
        done = torch.where(good, h, 0.0)  # a rejected step does not move
        x = x + like(done / 2, x) * (slope + slope_end)  # heun, or where rejected x as it was
        k = k + done
        h = h * (0.9 / error.clamp(min=1e-12).sqrt()).clamp(0.2, 10)  # error goes with h^2
        if last.any():  # the others go on without those that have arrived
            ends, places = take(last, x, row)
            result[places] = ends.to(result.dtype)
            x, k, h, slope, good, row, *args = take(~last, x, k, h, slope, good, row, *args)
        if good.any():  # those that moved need a new slope
            x_moved, k_moved, places, *args_moved = take(good, x, k, row, *args)
            slope[good] = field(x_moved, k_moved, *args_moved)
            evals[places] += 1
    return result, evals, tries

# ---------------------------------------- network

def sinusoids(s, dim):
    """A clock s (B,) in [0, 1] -> (B, dim); frequencies 1 to 1000 (released code: up to 1)."""
    w = 10 ** torch.linspace(0, 3, dim // 2, device=s.device)
    angle = s.float()[:, None] * w
    return torch.cat([angle.sin(), angle.cos()], 1)

def group_norm(channels):
    return nn.GroupNorm(math.gcd(32, channels // 2), channels)  # two channels a group at least

def embedding(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))

class Attention(nn.Module):
    """Self-attention over all places of a frame."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        q, k, v = tokens[:, None].chunk(3, -1)  # (B, 1, H W, C) each: one head
        h = F.scaled_dot_product_attention(q, k, v)
        h = h[:, 0].transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + self.out(h)

class ResBlock(nn.Module):
    """Residual block that hears the clocks; self-attention after it where asked.

    Ours: they scale and shift after the norm. Released code adds a constant to each channel before
    it, of which a norm of few channels a group takes away the most.
    """

    def __init__(self, cin, cout, dim, attend=False):
        super().__init__()
        self.norm1 = group_norm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.clock = nn.Linear(dim, 2 * cout)
        self.norm2 = group_norm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout) if attend else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.clock(emb)[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return self.attention(self.skip(x) + h)

class UNet(nn.Module):
    """The 2D diffusion UNet of the released code: (B, cin, H, W) -> (B, cout, H, W), float32.

    It hears one clock, or two (t, alpha). No layer looks along time.
    """

    def __init__(self, cin, cout, width, mults, blocks, patch, amp=False, two_clocks=False):
        super().__init__()
        channels = [int(width * m) for m in mults]
        attended = max(0, len(channels) - 2)  # the second-lowest level, as the released code
        dim = 4 * width
        self.width = width
        self.patch = patch
        self.amp = amp
        self.embed_t = embedding(width)
        self.embed_alpha = embedding(width) if two_clocks else None

        c = channels[0]
        self.inp = nn.Conv2d(cin * patch**2, c, 3, padding=1)
        skips = [c]
        self.down = nn.ModuleList()
        for level in range(len(channels)):
            for _ in range(blocks):
                self.down.append(ResBlock(c, channels[level], dim, level == attended))
                c = channels[level]
                skips.append(c)
            if level < len(channels) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.mid1 = ResBlock(c, c, dim, attend=True)
        self.mid2 = ResBlock(c, c, dim)
        self.up = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(c + skips.pop(), channels[level], dim, level == attended))
                c = channels[level]
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        last = nn.Conv2d(c, cout * patch**2, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), last)

    def forward(self, x, t, alpha=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            emb = self.embed_t(sinusoids(t, self.width))  # (B, 4 width)
            if self.embed_alpha is not None:
                emb = emb + self.embed_alpha(sinusoids(alpha, self.width))
            emb = F.silu(emb)
            # Ours: squares of patch x patch pixels become channels, a quarter of the cost at 2.
            h = self.inp(F.pixel_unshuffle(x, self.patch))  # (B, width, H / patch, W / patch)
            skips = [h]
            for layer in self.down:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
                skips.append(h)
            h = self.mid2(self.mid1(h, emb), emb)
            for layer in self.up:
                if isinstance(layer, ResBlock):
                    h = layer(torch.cat([h, skips.pop()], 1), emb)
                else:
                    h = layer(F.interpolate(h, scale_factor=2.0))
            return F.pixel_shuffle(self.out(h), self.patch).float()  # (B, cout, H, W)

class ConDiff(nn.Module):
    """CONDIFF's field f(x, x0, alpha): one network 6 -> 3."""

    def __init__(self, *settings):
        super().__init__()
        self.net = UNet(6, 3, *settings)

    def forward(self, x, x0, alpha):
        return self.net(torch.cat([x, x0], 1), alpha)

class BiFlow(nn.Module):
    """BI-FLOW's field (f_v, f_n): two networks 3 -> 3, as released (paper: one 3 -> 6)."""

    def __init__(self, *settings):
        super().__init__()
        self.v = UNet(3, 3, *settings, two_clocks=True)
        self.n = UNet(3, 3, *settings, two_clocks=True)

    def forward(self, x, t, alpha):
        return self.v(x, t, alpha), self.n(x, t, alpha)

def build(cfg):
    """The field of every method in cfg.methods, its weights drawn from (seed, method).

    BI-FLOW's two networks have about the parameters of one of the others.
    """
    mults = [float(m) for m in cfg.mults.split(",")]
    settings = (mults, cfg.blocks, cfg.patch, cfg.amp)
    narrow = max(8, 8 * round(cfg.width * 2 / 3 / 8))
    nets = nn.ModuleDict()
    for method in cfg.methods.split(","):
        torch.manual_seed(cfg.seed)  # for each alike: trained alone or together, it is the same
        if method == "flow":
            nets[method] = UNet(3, 3, cfg.width, *settings)
        elif method == "condiff":
            nets[method] = ConDiff(cfg.width, *settings)
        else:
            nets[method] = BiFlow(narrow, *settings)
    return nets.to(memory_format=torch.channels_last)  # faster on a CPU

def parameters(net):
    return sum(p.numel() for p in net.parameters())

# ---------------------------------------- train

def draw(seed, step, x):
    """t, alpha ~ U(0, 1), (B,), and n ~ N(0, 1) of x's shape: a function of (seed, step) alone."""
    rng = make_rng(seed, 1, step)
    t, alpha = torch.rand(2, len(x), generator=rng)
    n = torch.randn(x.shape, generator=rng)
    return t, alpha, n

def learning_rate(cfg, step):
    """Ours: up over 100 steps, constant, and down a line over the last fifth (released: constant).

    So a longer training begins as a shorter one does.
    """
    left = min(1, (cfg.iters - step) / (0.2 * cfg.iters))
    return cfg.lr * min(1, step / 100) * (cfg.lr_end + (1 - cfg.lr_end) * left)

def compile_all(nets):
    for net in nets.values():
        net.compile()

def train(cfg, nets, clips, out, device):
    """Every method in turn, on the same frames, clocks and noise. Returns averaged networks."""
    saved = common.restore(out / "ckpt.pt", "biflow", cfg)
    steps = saved.get("steps", {})  # of training that each method has had
    optimizers = saved.get("optimizers", {})  # their states, of those in the midst of it
    for method in sorted(steps.keys() - nets.keys()):  # the run has them, asked for again or not
        nets.update(build(replace(cfg, methods=method)).to(device))
    averages = nn.ModuleDict()
    for method, net in nets.items():
        averages[method] = AveragedModel(net, multi_avg_fn=common.ema_decay(cfg.ema))
    if steps:
        nets.load_state_dict(saved["nets"], strict=False)  # a method may be new to the run
        averages.load_state_dict(saved["averages"], strict=False)
    batches = common.Batches(clips, cfg.batch, 2, cfg.seed)

    def inputs(step):
        frames = batches[step - 1]  # uint8 (B, 2, 3, H, W)
        return frames, *draw(cfg.seed, step, frames[:, 0])

    rows = saved["log"]
    for method, net in nets.items():
        start = steps.get(method, 0)
        if start == cfg.iters:
            continue
        optimizer = torch.optim.AdamW(
            net.parameters(), cfg.lr, betas=(0.9, 0.99), fused=device.type != "mps")
        if method in optimizers:
            optimizer.load_state_dict(optimizers[method])
        if cfg.compile:
            net.compile()
        log = common.Log(cfg.iters, start, rows, METHODS[method])

        for step, (frames, t, alpha, n) in common.prefetched(inputs, start, cfg.iters, device):
            x0, x1 = to_float(frames).unbind(1)  # (B, 3, H, W) each
            if method == "flow":
                losses = {"flow": flow_loss(net, x0, x1, t).mean()}
            elif method == "condiff":
                losses = {"condiff": condiff_loss(net, x0, x1, alpha, n).mean()}
            else:
                loss_v, loss_n = biflow_loss(net, x0, x1, t, alpha, n)
                losses = {"biflow_v": loss_v.mean(), "biflow_n": loss_n.mean()}

            loss = sum(losses.values())  # Eq. 5, where there are two
            optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            averages[method].update_parameters(net)

            steps[method] = step
            stop = log.add(step, **losses)
            if step == start + 10 and device.type == "cuda":
                tqdm.write(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")
            if step % SAVE_EVERY == 0 or step == cfg.iters or stop:
                optimizers[method] = optimizer.state_dict()
                common.save_checkpoint(
                    out, "biflow", cfg, log, steps=steps, nets=nets.state_dict(),
                    averages=averages.state_dict(), optimizers=optimizers)
            if stop:
                raise KeyboardInterrupt
        log.close()
        rows = log.rows
        del optimizers[method]
    return modules_of(averages)

def modules_of(averages):
    """The networks to sample from."""
    return nn.ModuleDict({method: a.module for method, a in averages.items()}).eval()

# ---------------------------------------- distance to real clips

def own_features(video):
    """Fixed, seeded features of short clips that see motion: uint8 (N, T > 4, 3, H, W) -> (N, 46).

    Log-energies of six random filters on the frames, on what changes from one frame to the next,
    and over four frames; how far change goes with the gradients (the direction of motion); means
    and deviations of colour; at two scales. A change of 1 is a factor e.
    """
    bank = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(video.device)
    bank = (bank - bank.mean((2, 3), keepdim=True)) / 75**0.5  # blind to brightness
    x = to_float(video)
    found = [4 * x.mean((1, 3, 4)), 4 * x.std((1, 3, 4))]  # (N, 3) each
    for _ in range(2):
        for change in (x, x[:, 1:] - x[:, :-1], x[:, 4:] - x[:, :-4]):
            response = F.conv2d(change.flatten(0, 1), bank).unflatten(0, change.shape[:2])
            power = response.square().mean((3, 4))  # (N, T, 6)
            found.append((power + 1e-3).log().mean(1))
        dt = x.diff(dim=1)[..., 1:, 1:]
        gx = x.diff(dim=-1)[:, :-1, ..., 1:, :]
        gy = x.diff(dim=-2)[:, :-1, ..., 1:]
        for gradient in (gx, gy):
            together = (dt * gradient).mean((1, 2, 3, 4))  # (N,)
            energies = [y.square().mean((1, 2, 3, 4)) + 1e-3 for y in (dt, gradient)]
            found.append(2 * (together / (energies[0] * energies[1]).sqrt())[:, None])
        x = F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
    return torch.cat(found, 1).cpu().double()  # MPS has no float64

def frechet(a, b):
    """Frechet distance of two sets of features (N, D), (M, D), each taken as a Gaussian."""
    a = a.double()
    b = b.double()
    cov_a = torch.atleast_2d(torch.cov(a.T))  # (D, D)
    cov_b = torch.atleast_2d(torch.cov(b.T))
    w, v = torch.linalg.eigh(cov_a)
    root = (v * w.clamp(min=0).sqrt()) @ v.T  # C_a^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + cov_a.trace() + cov_b.trace() - 2 * cross)  # cross: tr (C_a C_b)^(1/2)

# ---------------------------------------- evaluate

def make_heun(tol):
    def heun(field, x, args=()):
        return solve_heun(field, x, args, tol)

    return heun

def make_step(method, net, eps, solve):
    """step(x, n) of a method, for stream()."""
    def step(x, n):
        if method == "flow":
            return flow_step(net, x, solve)
        if method == "condiff":
            return condiff_step(net, x, n, solve)
        return biflow_step(net, x, n, eps, solve)

    return step

def roll(step, first, frames, seed, name):
    """Stream from first (B, 3, H, W): uint8 (B, frames, 3, H, W), evaluations and ms a frame."""
    began = time.perf_counter()
    videos = stream(step, first, torch.Generator().manual_seed(seed))
    video = [to_uint8(first)]
    count = 0.0
    for _ in tqdm(range(frames - 1), f"streaming {name}", leave=False):
        x, evals = next(videos)
        video.append(to_uint8(x))
        count += evals.float().mean().item()
    ms = 1000 * (time.perf_counter() - began) / (frames - 1) / len(first)
    return torch.stack(video, 1), count / (frames - 1), ms

def real_clips(clips, count, seed):
    """At most `count` real clips of CLIP frames that do not overlap, uint8 (N, CLIP, 3, H, W)."""
    places = []
    for i, length in enumerate(clips.lengths):
        places += [(i, start) for start in range(0, length - CLIP + 1, CLIP)]
    if len(places) < 2:
        raise Fault(f"to measure a distance takes two real clips of {CLIP} frames at least")
    found = []
    for k in np.random.default_rng([seed, 77]).permutation(len(places))[:count]:
        i, start = places[k]
        found.append(clips.frames(i, start, start + CLIP))
    return torch.stack(found)

def first_frames(clips, count, frames, seed):
    """Random frames to stream from, uint8 (count, 3, H, W), and the real clip after the first."""
    rng = np.random.default_rng([seed, 1])
    first = []
    for i in rng.integers(len(clips), size=count):
        start = rng.integers(clips.lengths[i])
        first.append(clips.frames(i, start, start + 1))
        if len(first) == 1:
            sequel = clips.frames(i, start, start + frames)
    return torch.cat(first), sequel

def distances(video, reference, device):
    """Distance to real clips, of the windows of streams uint8 (B, T, 3, H, W); its rise a frame."""
    ends = range(WINDOW, video.shape[1] + 1, STRIDE)
    found = []
    for end in ends:
        window = video[:, end - WINDOW:end].unflatten(1, (-1, CLIP)).flatten(0, 1)  # (N, CLIP, ...)
        found.append(frechet(own_features(window.to(device)), reference))
    slope = float(np.polyfit(ends, found, 1)[0]) if len(ends) > 1 else None
    return found, slope

def evaluate(cfg, nets, train_clips, test_clips, device):
    """Sec. 3.1: all methods stream from the same frames. Returns the rows of Tab. 1, and videos."""
    samples = cfg.streams * WINDOW // CLIP  # clips in a window of all streams
    real = real_clips(test_clips, 1024, cfg.seed).to(device)
    reference = own_features(real)
    floors = []  # of as many real clips of the training: several draws show how sure it is
    for k in range(3):
        as_many = real_clips(train_clips, samples, cfg.seed + 1000 * k).to(device)
        floors.append(frechet(own_features(as_many), reference))
    if min(len(real), len(as_many)) < samples:
        print(f"warning: {samples} clips are compared with {len(real)} real ones, and the floor is "
              f"of {len(as_many)}: so few make distances large and uncertain", file=sys.stderr)
    print(f"floor: {min(floors):.2f} to {max(floors):.2f}, three draws of real clips: "
          "a distance in this range is as good as real")
    frames = cfg.frames or 128
    first, sequel = first_frames(test_clips, cfg.streams, frames, cfg.seed)
    x0 = to_float(first).to(device)
    plan = [("flow", None), ("condiff", None)]
    plan += [("biflow", float(eps)) for eps in cfg.eps.split(",")]
    rows = []
    videos = {}
    for method, eps in plan:
        if method not in nets:
            continue
        name = METHODS[method] if eps is None else f"{METHODS[method]} eps {eps:g}"
        row = dict(
            method=name, eps=eps, solver="heun", params=parameters(nets[method]), floor=floors[0],
            samples=samples, real_samples=len(real), floor_samples=len(as_many), failed=None)
        rows.append(row)
        step = make_step(method, nets[method], eps, make_heun(cfg.tol))
        try:
            video, evaluations, ms = roll(step, x0, frames, cfg.seed, name)
        except FloatingPointError as e:
            row["failed"] = str(e)  # the other methods' rows stand
            continue
        curve, slope = distances(video, reference, device)
        row.update(
            evaluations=evaluations, distance=float(np.mean(curve)), first_window=curve[0],
            last_window=curve[-1], slope=slope, curve=curve, ms_per_frame=ms)
        videos[name.replace("eps ", "")] = video  # short enough to stand over a picture
    videos["real"] = sequel[None]
    return rows, videos

def best_eps(rows):
    """The noise level with the lowest mean distance, which the paper reports; None: no BI-FLOW."""
    tried = [row for row in rows if row["eps"] is not None and not row["failed"]]
    return min(tried, key=lambda row: row["distance"])["eps"] if tried else None

# ---------------------------------------- load

def load_averages(saved, device):
    """The networks of a checkpoint, to sample from, and the Config they were made with."""
    made = Config(**{**saved["config"], "methods": ",".join(saved["steps"])})
    averages = nn.ModuleDict()
    for method, net in build(made).items():
        averages[method] = AveragedModel(net)
    averages.load_state_dict(saved["averages"])
    return modules_of(averages).to(device), made

# ---------------------------------------- your own picture

def continue_picture(cfg, device):
    """--first: one gif that goes on from a picture, the methods side by side."""
    folder = common.find_run("biflow", cfg.dataset, cfg.out_dir)
    if folder is not None:
        saved = common.load_checkpoint(folder / "ckpt.pt", "biflow")
        eps = common.read_made(folder / "results.json", "biflow")["reported_eps"]
    elif cfg.out_dir or cfg.dataset != "sky":
        raise Fault(f"--first: there is no run on {cfg.dataset} in {cfg.out_dir or 'out/'}; "
                    "train one, or leave --out_dir and --dataset out for the shipped networks")
    else:
        saved = common.load_checkpoint(SHIPPED, "biflow")
        eps = saved["eps"]
    nets, made = load_averages(saved, device)
    if cfg.compile:
        compile_all(nets)
    print(f"{folder or SHIPPED}: {made.dataset}, {made.iters} steps")
    first = to_float(common.read_picture(cfg.first, made.size))[None].to(device)  # (1, 3, H, W)
    videos = {}
    for method, net in nets.items():
        if method == "biflow" and eps is None:
            continue  # its solver broke down at every noise level
        step = make_step(method, net, eps, make_heun(cfg.tol))
        name = METHODS[method]
        videos[name] = roll(step, first, cfg.frames or 64, cfg.seed, name)[0]
    gif = Path(folder or "out") / "biflow-first.gif"
    common.save_gif(gif, videos, width=192)
    print(f"wrote {gif}")

# ---------------------------------------- main

COLUMNS = {
    "method": ("method", ""), "distance": ("distance", ".2f"),
    "evaluations": ("evaluations", ".2f"), "first_window": ("first window", ".2f"),
    "last_window": ("last window", ".2f"), "slope": ("slope/frame", ".4f"),
    "floor": ("floor", ".2f"), "ms_per_frame": ("ms/frame", ".2f"),
}

def check(cfg):
    """What single values cannot tell. Raises Fault."""
    asked = cfg.methods.split(",")
    if not set(asked) <= METHODS.keys() or len(asked) > len(set(asked)):
        raise Fault(f"--methods {cfg.methods}: must be some of {', '.join(METHODS)}, separated by "
                    "commas")
    common.check_list(cfg, "eps", float, 0, 1)
    common.check_list(cfg, "mults", float, 0.25, 8)
    if cfg.width % 8:
        raise Fault(f"--width {cfg.width}: must be a multiple of 8")
    fold = cfg.patch * 2 ** cfg.mults.count(",")
    if cfg.size % fold or cfg.size == fold:
        raise Fault(f"--size {cfg.size}: must be {2 * fold} or a larger multiple of {fold}")
    if 0 < cfg.frames < WINDOW:
        raise Fault(f"--frames {cfg.frames}: must be {WINDOW} at least")

def main():
    began = time.time()
    cfg = common.parse_args("biflow", Config, PRESETS, __doc__)
    check(cfg)
    device = common.pick_device(cfg.device)
    if cfg.first:
        return continue_picture(cfg, device)
    common.check_folder("biflow", cfg, common.source_of(cfg))
    train_clips, test_clips, source = common.load_clips(
        cfg.dataset, cfg.data_dir, cfg.size, (cfg.clips, 256), WINDOW, cfg.seed)
    for clips in (train_clips, test_clips):
        real_clips(clips, 2, cfg.seed)  # too few or too short: better known before the training
    out = common.open_run("biflow", cfg, train_clips, test_clips)
    print(f"preset {cfg.preset} on {device}, {len(train_clips)} + {len(test_clips)} {source} clips")

    if cfg.eval_only:
        saved = common.load_checkpoint(out / "ckpt.pt", "biflow")
        for method, step in saved["steps"].items():
            if step != cfg.iters:
                raise Fault(f"{out / 'ckpt.pt'} has {step} of {cfg.iters} steps of {method}: "
                            "--resume makes the others")
        nets, _ = load_averages(saved, device)
    else:
        nets = build(cfg).to(device)
        for method, net in nets.items():
            print(f"{METHODS[method]}: {parameters(net) / 1e6:.2f} M parameters")
        nets = train(cfg, nets, train_clips, out, device)
    if cfg.compile:
        compile_all(nets)
    rows, videos = evaluate(cfg, nets, train_clips, test_clips, device)
    eps = best_eps(rows)
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)])
    common.write_results(
        out, "biflow", cfg, device, dataset, rows, began, iters=cfg.iters, reported_eps=eps)
    common.save_sheet(out / "sheet.png", videos)
    common.save_gif(out / "samples.gif", videos, every=2)
    print(f"\nTab. 1: {cfg.streams} streams, adaptive Heun, tolerance {cfg.tol:g}")
    print(common.table(rows, COLUMNS))
    for row in rows:
        if row["failed"]:
            print(f"{row['method']}: {row['failed']}")
    if eps is not None:
        print(f"\nBI-FLOW as reported: eps {eps:g}, the lowest distance of its noise levels")
    print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} in {out}/")
    print(f"{time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
