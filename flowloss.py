"""FlowLoss (Wu, Ota and Kanezaki, 2025), https://arxiv.org/abs/2504.14535

A video diffusion model that is trained on reconstruction alone learns late what moves where. FlowLoss compares the
optical flow of the denoised video with that of the true one: flow against flow, nothing is warped. Flow of a prediction
at high noise means nothing, so the term is gated by the noise level. The paper's equations (their numbers are unknown):

    EDM       D(x; s) = c_skip x + c_out F(c_in x; c_noise)            lambda(s) = (s^2 + 1) / s^2,  data of variance 1
    L_recon   E lambda(s) || D(y + s n; s) - y ||^2
    L_flow    S E lambda(s) sum_t o(a_t) || f_t(y) - f_t(D) ||^2       f: optical flow; o: 1 where visible, else 0.3
    L         L_recon + w(s) L_flow,   w(s) = 1 / (s^2 + 1) if s < psi, else 0          so w lambda = 1 / s^2 below psi

A tiny RAFT learns flow, a base image-to-video model learns motion in general, and from there the same model is fine-
tuned on robot clips under each objective, on the same data and the same noise.

    python flowloss.py --dataset robot                  # two CPU cores: about 13 minutes; a GPU: the `small` preset
    python flowloss.py --dataset robot --eval_only      # its tables and pictures again, from the checkpoint

prints the form of the paper's Fig. 4 and writes out/flowloss-robot-procedural/, beside what every script writes:
noise.png (Fig. 3: flow against noise) and weights.png (Fig. 2: losses and weights by noise level).
"""
import copy
import itertools
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import flow_to_image
from tqdm import tqdm

import common
from common import Fault, averaged, cut, descend, make_rng, edm_denoise, edm_weight, karras_sigmas, like, normalise, opt
from common import sample_edm, to_float, to_uint8

@dataclass
class Config:
    dataset: str = opt("robot", "robot, or a folder of your clips in --data_dir")
    data_dir: str = opt("", "real clips: DATA_DIR/DATASET/{train,test}/; empty: data, else a procedural world", free=True)
    preset: str = opt("auto", "tiny (two CPU cores), small (one GPU), paper (128 px); auto: by device")
    iters: int = opt(800, "fine-tuning steps of every objective", 1, 10**8)
    base_iters: int = opt(2500, "steps of the base model, on general motion", 0, 10**8)
    raft_iters: int = opt(2000, "steps of the tiny RAFT", 0, 10**8)
    batch: int = opt(4, "clips in a batch", 1, 65536)
    size: int = opt(32, "height and width in pixels; a multiple of 2^(levels - 1) x patch, 24 and up", 24, 1024)
    frames: int = opt(16, "frames of a clip", 8, 256)
    seed: int = opt(0, "of weights, data order and noise", 0, 2**31)
    device: str = opt("auto", "auto, cpu, cuda, mps", free=True)
    out_dir: str = opt("", "folder to write; empty: out/flowloss-DATASET[-procedural]", free=True)
    resume: bool = opt(False, "continue the run in the output folder, bit for bit on CPU", free=True)
    eval_only: bool = opt(False, "skip training, evaluate the checkpoint in the output folder", free=True)
    compile: bool = opt(False, "torch.compile the denoisers", free=True)
    amp: bool = opt(False, "bfloat16 autocast inside the denoisers")
    objectives: str = opt("none,constant,gated", "of none, constant, lambda, soft, gated; which to compare")
    psi: float = opt(2.0, "the gate: noise levels from here on have no flow term", 0, 1000)
    scale: float = opt(0.1, "S, of the squared difference in pixels^2, a mean over pixels and pairs", 0, 10**6)
    pairs: str = opt("first", "flow from the first frame (paper, likely) or the one before", choices=("first", "next"))
    n_pairs: int = opt(1, "pairs of frames drawn a clip and step, an unbiased sample of the mean over t", 1, 256)
    hidden: float = opt(0.3, "o, weight where the true flow's target is not visible", 0, 1)
    prior: str = opt("wide", "of ln sigma: SVD's, EDM's, or between: see PRIOR", choices=("svd", "edm", "wide"))
    raft: str = opt("tiny", "flow estimator: ours, or torchvision's with its weights", choices=("tiny", "raft_small"))
    updates: int = opt(2, "updates of the flow estimator in the loss", 1, 32)
    augment: float = opt(0.02, "noise on the condition, the first frame, while training (SVD)", 0, 1)
    width: int = opt(32, "channels at the first level", 8, 1024)
    mults: str = opt("1,1.5,2", "channels of each level, in widths")
    patch: int = opt(2, "pixels (squared) folded into channels before the first level", 1, 8)
    lr: float = opt(2e-3, "AdamW's learning rate for the base model, after 50 steps of warm-up", 0, 1)
    lr_tune: float = opt(5e-4, "the same for fine-tuning, constant", 0, 1)
    ema: float = opt(0.98, "decay of the weight average that is sampled from; 0: the last weights", 0, 0.999999)
    clips: int = opt(500, "training clips of a procedural world", 2, 10**6)
    points: str = opt("50,100,200,800", "fine-tuning steps at which to evaluate")
    videos: int = opt(32, "held-out clips to generate at each of them", 2, 4096, free=True)
    steps: int = opt(10, "steps of the Heun sampler; evaluations: twice as many less one", 1, 1000, free=True)

PRESETS = {
    "tiny": {},
    "small": dict(iters=2000, base_iters=6000, raft_iters=3000, batch=16, size=64, width=96, lr=5e-4, lr_tune=2e-4,
                  ema=0.995, clips=4000, points="100,300,1000", videos=64, steps=16, amp=True),
    "paper": dict(iters=10000, base_iters=50000, raft_iters=20000, batch=16, size=128, width=192, mults="1,1,2,2,4",
                  lr=1e-4, lr_tune=5e-5, ema=0.999, clips=20000, points="100,1000,10000", videos=128, amp=True),
}
PRIOR = {"svd": (0.7, 1.6), "edm": (-1.2, 1.2), "wide": (0.0, 1.5)}  # mean and spread of ln sigma. Paper silent: wide
# lies between SVD's, for latents, with too few low levels for pixels, and EDM's, with too few that decide motion.
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 10.0)  # where losses and flow are tabulated

# Notation. B, C, T, H, W: batch, channels, frames, height, width. y: the true video, of variance 1; D: the denoised.
# sigma (B,): noise level, from 0 (data). Flow (N, 2, H, W), pixels. Images for the flow estimator lie in [-1, 1].

# ----------------------------------------------------------------------------------------------- THE METHOD
def gate(sigma, psi):
    """w_psi(sigma), (B,): 1 / (sigma^2 + 1) below psi, else 0: the paper's hard gate."""
    return torch.where(sigma < psi, 1 / (sigma**2 + 1), 0.0)

def flow_weight(objective, sigma, psi):
    """The factor of the squared flow difference, w(sigma) lambda(sigma), of each objective, (B,).

    gated is the paper's: 1 / sigma^2 below psi. Ours, as the paper's variants are not public: none; constant, at every
    noise level alike; lambda, EDM's weight without w; soft, w without the cut.
    """
    return {"none": 0 * sigma, "constant": 1 + 0 * sigma, "lambda": edm_weight(sigma),
            "soft": edm_weight(sigma) / (sigma**2 + 1), "gated": edm_weight(sigma) * gate(sigma, psi)}[objective]

def warp(x, flow):
    """x (N, C, H, W) read off at p + flow(p), bilinear; outside, the nearest border pixel."""
    H, W = x.shape[-2:]
    v, u = torch.meshgrid(torch.arange(H, device=x.device), torch.arange(W, device=x.device), indexing="ij")
    grid = torch.stack([(u + flow[:, 0]) * 2 / (W - 1) - 1, (v + flow[:, 1]) * 2 / (H - 1) - 1], -1)  # (N, H, W, 2)
    return F.grid_sample(x, grid, align_corners=True, padding_mode="border")

def visible(forward, backward):
    """Where the target of a flow is seen, by agreement with the flow back: (N, 2, H, W) twice -> bool (N, 1, H, W)."""
    back = warp(backward, forward)
    slack = 0.01 * (forward.square() + back.square()).sum(1, keepdim=True) + 0.5  # the usual test, Sundaram et al. 2010
    return (forward + back).square().sum(1, keepdim=True) < slack

def flow_difference(estimate, video, truth, i, j, hidden=0.3):
    """sum_t o(a_t) || f_t(y) - f_t(D) ||^2 of every clip, as a mean over pixels and pairs, pixels^2: (B,).

    estimate(image1, image2) -> flow (N, 2, H, W); video, truth (B, 3, T, H, W) in [-1, 1]; i, j (B, K): pairs of
    frames. What is visible is read off the truth. Gradients reach the video alone.
    """
    rows = torch.arange(len(i), device=i.device)[:, None]
    take = lambda v, k: v.transpose(1, 2)[rows, k].flatten(0, 1)  # (B K, 3, H, W)
    with torch.no_grad():
        a, b = take(truth, i), take(truth, j)
        true, back = estimate(torch.cat([a, b]), torch.cat([b, a])).chunk(2)
        o = torch.where(visible(true, back), 1.0, hidden)  # (B K, 1, H, W)
    flow = estimate(take(video, i), take(video, j))
    return (o * (flow - true).square().sum(1, keepdim=True)).flatten(1).mean(1).view(i.shape).mean(1)

def flow_loss(estimate, decode, denoised, truth, weight, i, j, scale, hidden=0.3):
    """w(sigma) L_flow of every clip, (B,), weight = flow_weight(...) (B,). Source: FlowLoss.

    Samples of weight 0 are sorted out first: they are neither decoded nor is their flow estimated. decode(denoised) ->
    videos in [-1, 1], the truth is decoded already; the rest as in flow_difference.
    """
    on, loss = weight > 0, torch.zeros_like(weight)
    if on.any():
        loss[on] = scale * weight[on] * flow_difference(estimate, decode(denoised[on]), truth[on], i[on], j[on], hidden)
    return loss

def recon_loss(denoised, y, sigma):
    """L_recon of every clip, (B,): EDM's weighted squared error."""
    return edm_weight(sigma) * (denoised - y).square().flatten(1).mean(1)

# ----------------------------------------------------------------------------------------------- tiny RAFT
def correlation(a, b):
    """All pairs: features (N, C, H, W) twice -> (N H W, 1, H, W), scaled by 1 / sqrt(C)."""
    N, C, H, W = a.shape
    return (a.flatten(2).transpose(1, 2) @ b.flatten(2) / C**0.5).reshape(N * H * W, 1, H, W)

def look_up(pyramid, at, radius=3):
    """Correlations around `at` (N, 2, H, W), pixels of level 0, of every level: (N, levels (2 radius + 1)^2, H, W)."""
    N, _, H, W = at.shape
    step = torch.arange(-radius, radius + 1, device=at.device, dtype=at.dtype)
    window = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1)  # (2r+1, 2r+1, 2), x then y
    found = []
    for level, corr in enumerate(pyramid):
        h, w = corr.shape[-2:]
        p = ((at + 0.5) / 2**level - 0.5).permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) + window
        grid = torch.stack([(2 * p[..., 0] + 1) / w - 1, (2 * p[..., 1] + 1) / h - 1], -1)
        found.append(F.grid_sample(corr, grid, align_corners=False).view(N, H, W, -1))  # outside: 0
    return torch.cat(found, -1).permute(0, 3, 1, 2)

def upsample(flow, mask):
    """Convex upsampling by 2: every fine flow is a mean of the 3x3 coarse ones, weights softmax(mask (N, 36, H, W))."""
    N, _, H, W = flow.shape
    weight = mask.view(N, 1, 9, 2, 2, H, W).softmax(2)
    near = F.unfold(F.pad(2 * flow, (1, 1, 1, 1), mode="replicate"), 3).view(N, 2, 9, 1, 1, H, W)
    return (weight * near).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(N, 2, 2 * H, 2 * W)

class Encoder(nn.Module):
    """Image (N, 3, H, W) -> features (N, cout, H/2, W/2)."""
    def __init__(self, cout, normal):
        super().__init__()
        layer = lambda a, b, k=3, s=1: nn.Sequential(nn.Conv2d(a, b, k, s, k // 2), normal(b), nn.ReLU())
        self.one, self.two, self.three = layer(3, 16), layer(16, 32, 3, 2), layer(32, 32)
        self.out = nn.Conv2d(32, cout, 1)
    def forward(self, x):
        x = self.two(self.one(x))
        return self.out(x + self.three(x))

class TinyRAFT(nn.Module):
    """RAFT (Teed and Deng, ECCV 2020), small: 24 px and up, stride 2, two levels, radius 3, a ConvGRU.

    image1, image2 (N, 3, H, W) in [-1, 1], H and W even -> flow (N, 2, H, W) in pixels; every=True: of every update.
    Images above 48 px are made smaller by powers of two first, and their flow larger after.
    detach: RAFT cuts the gradient through the lookup's coordinates between updates. That trains well, but what autograd
    then returns is not the gradient of the output (the test compares finite differences): a loss on the flow, which
    needs the gradient to the images, must not cut it.
    """
    def __init__(self, hidden=32, context=24):
        super().__init__()
        self.hidden = hidden
        self.features, self.context = Encoder(32, nn.InstanceNorm2d), Encoder(hidden + context, lambda c: nn.Identity())
        self.motion = nn.Sequential(nn.Conv2d(98 + 2, 48, 1), nn.ReLU(), nn.Conv2d(48, 40, 3, padding=1), nn.ReLU())
        self.gates = nn.Conv2d(hidden + context + 40 + 2, 2 * hidden, 3, padding=1)
        self.candidate = nn.Conv2d(hidden + context + 40 + 2, hidden, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(hidden, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 2, 3, padding=1))
        self.mask = nn.Conv2d(hidden, 36, 1)
    def forward(self, image1, image2, updates=4, detach=False, every=False):
        size = image1.shape[-2:]
        k = math.gcd(2 ** max(0, math.ceil(math.log2(max(size) / 48))), size[0] // 2, size[1] // 2)  # size / k is even
        image1, image2 = (F.avg_pool2d(x, k) if k > 1 else x for x in (image1, image2))  # all pairs: a cost of size^4
        a, b = F.instance_norm(self.features(torch.cat([image1, image2]))).chunk(2)  # else correlations start near 0
        pyramid = [correlation(a, b)]
        pyramid.append(F.avg_pool2d(pyramid[0], 2, ceil_mode=True))
        net, inp = self.context(image1).split([self.hidden, self.context.out.out_channels - self.hidden], 1)
        net, inp = net.tanh(), inp.relu()  # hidden state, context
        H, W = a.shape[-2:]
        v, u = torch.meshgrid(torch.arange(H, device=a.device), torch.arange(W, device=a.device), indexing="ij")
        start = torch.stack([u, v]).to(a.dtype).expand(len(a), -1, -1, -1)
        flow, flows = torch.zeros_like(start), []
        for step in range(updates):
            flow = flow.detach() if detach else flow
            x = torch.cat([inp, self.motion(torch.cat([look_up(pyramid, start + flow), flow], 1)), flow], 1)
            z, r = self.gates(torch.cat([net, x], 1)).sigmoid().chunk(2, 1)
            net = (1 - z) * net + z * self.candidate(torch.cat([r * net, x], 1)).tanh()
            flow = flow + self.head(net)
            if every or step == updates - 1:
                fine = upsample(flow, self.mask(net))
                flows.append(k * F.interpolate(fine, size, mode="bilinear") if k > 1 else fine)
        return flows if every else flows[-1]

# ----------------------------------------------------------------------------------------------- network
class Block(nn.Module):
    """Residual block of convolutions over space, then over time, scaled and shifted by the embedding of sigma."""
    def __init__(self, cin, cout, emb, time=True, attend=False):
        super().__init__()
        group = lambda c: nn.GroupNorm(math.gcd(8, c), c)
        self.norm1, self.space1 = group(cin), nn.Conv3d(cin, cout, (1, 3, 3), padding=(0, 1, 1))
        self.norm2, self.space2 = group(cout), nn.Conv3d(cout, cout, (1, 3, 3), padding=(0, 1, 1))
        self.norm3, self.time = group(cout), nn.Conv3d(cout, cout, (3, 1, 1), padding=(1, 0, 0)) if time else None
        self.emb, self.skip = nn.Linear(emb, 2 * cout), nn.Conv3d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attn = nn.MultiheadAttention(cout, math.gcd(4, cout), batch_first=True) if attend else None
        for layer in (self.space2, self.time) if time else (self.space2,):
            nn.init.zeros_(layer.weight)
    def forward(self, x, emb):  # (B, C, T, H, W)
        scale, shift = self.emb(emb)[..., None, None, None].chunk(2, 1)
        h = self.space1(F.silu(self.norm1(x)))
        x = self.skip(x) + self.space2(F.silu(self.norm2(h) * (1 + scale) + shift))
        s = self.norm3(x)
        x = x if self.time is None else x + self.time(F.silu(s))
        if self.attn is not None:
            s = s.flatten(2).transpose(1, 2)  # (B, T H W, C): every place at every time
            x = x + self.attn(s, s, s, need_weights=False)[0].transpose(1, 2).reshape(x.shape)
        return x

class VideoUNet(nn.Module):
    """Image to video, factorised over space and time: F(x (B, 3, T, H, W), c_noise (B,), first (B, 3, H, W)) -> like x.

    Every frame is given the first one and, in units of the noise, its difference to it and to its own 3x3 mean: with
    little noise these are mostly noise, and a small network learns to take it out much sooner. A mask, an output too,
    lets pixels rest: `rest` is what F has to be for D to be the first frame.
    """
    def __init__(self, width, mults, patch, amp=False):
        super().__init__()
        emb, ch = 4 * width, [int(width * m) for m in mults]
        self.width, self.patch, self.amp = width, patch, amp
        self.emb = nn.Sequential(nn.Linear(width // 2 * 2, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.inp = nn.Conv3d(12 * patch**2 + 3, ch[0], (1, 3, 3), padding=(0, 1, 1))
        self.down, self.up, last = nn.ModuleList(), nn.ModuleList(), len(ch) - 1
        for level, (a, b) in enumerate(zip([ch[0], *ch], ch)):
            kind = dict(time=level > 0 or last == 0, attend=level == last)  # at full size time would cost the most
            self.down.append(Block(a, b, emb, **kind))
            self.up.insert(0, Block(2 * b if level == last else b + ch[level + 1], b, emb, **kind))
        self.mid = Block(ch[-1], ch[-1], emb, attend=True)
        self.out = nn.Sequential(nn.GroupNorm(math.gcd(8, ch[0]), ch[0]), nn.SiLU(),
                                 nn.Conv3d(ch[0], 4 * patch**2, (1, 3, 3), padding=(0, 1, 1)))
        nn.init.zeros_(self.out[-1].weight)
    def forward(self, x, c_noise, first):
        fold = lambda f, v: f(v.transpose(1, 2), self.patch).transpose(1, 2)  # over space, frame by frame
        sigma, first = like((4 * c_noise).exp(), x), first[:, :, None].expand_as(x)
        y = x * (sigma**2 + 1).sqrt()  # as it was before c_in
        apart = (y - first) / sigma  # where nothing moves this is the noise itself
        # EDM Eq. 7 with D = first, solved for F; the clamp, as it is huge where things move
        rest = ((sigma * first - apart) / (sigma**2 + 1).sqrt()).clamp(-4, 4)  # (B, 3, T, H, W)
        mean = F.avg_pool3d(y, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        x = torch.cat([x, first, apart.clamp(-5, 5), ((y - mean) / sigma).clamp(-5, 5)], 1)  # (B, 12, T, H, W)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            w = torch.exp(torch.linspace(0, math.log(100), self.width // 2, device=x.device)) * c_noise[:, None]
            emb = self.emb(torch.cat([w.sin(), w.cos()], 1))
            x = fold(F.pixel_unshuffle, x)  # (B, 12 patch^2, T, H / patch, W / patch)
            place = torch.meshgrid(*(torch.linspace(-1, 1, n, device=x.device) for n in x.shape[2:]), indexing="ij")
            h, skips = self.inp(torch.cat([x, torch.stack(place).expand(len(x), -1, -1, -1, -1)], 1)), []
            for level, block in enumerate(self.down):
                h = block(F.avg_pool3d(h, (1, 2, 2)) if level else h, emb)
                skips.append(h)
            h = self.mid(h, emb)
            for level, block in enumerate(self.up):
                h = F.interpolate(h, scale_factor=(1, 2, 2)) if level else h
                h = block(torch.cat([h, skips.pop()], 1), emb)
            out, mask = fold(F.pixel_shuffle, self.out(h)).float().split([3, 1], 1)  # (B, 3 and 1, T, H, W)
            return out + mask.sigmoid() * (rest - out)

# ----------------------------------------------------------------------------------------------- metrics
end_point_error = lambda flow, true: (flow - true).square().sum(1).sqrt()  # (N, 2, H, W) twice -> (N, H, W), pixels

def ssim(a, b):
    """Structural similarity (Wang et al., 2004) of images (N, 3, H, W) in [0, 1], 7x7 windows: a number."""
    mean = lambda x: F.avg_pool2d(x, 7, 1)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return (((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean().item()

@torch.no_grad()
def flows_of(estimate, video):
    """Flow from every frame to the next of videos (B, 3, T, H, W) in [-1, 1]: (B, T - 1, 2, H, W)."""
    return torch.stack([estimate(v[:-1], v[1:]) for v in video.transpose(1, 2)])

# ----------------------------------------------------------------------------------------------- train
def flow_pairs(cfg, step, count):
    """Image pairs with exact flow: image1, image2 (N, 3, H, W) in [-1, 1], flow (N, 2, H, W), from three worlds."""
    found = []
    for k in range(count):
        rng = np.random.default_rng([cfg.seed, 3, step, k])
        which, near, t = rng.uniform(), rng.uniform() < 0.5, rng.choice(cfg.frames, 2, replace=False)
        if which < 0.55:  # neighbours, and frames as far apart as the loss asks for
            t = t.min() + np.arange(2) if near else np.sort(t)
            clip = common.robot(rng, cfg.size, 2, flow=True, clock=t / (cfg.frames - 1))
        else:
            clip = common.sky(rng, cfg.size, 2, flow=True) if which < 0.65 else \
                common.shapes(rng, cfg.size, 2, flow=True, speed=0.7 * rng.integers(1, 4))
        found.append((clip["video"], clip["flow"][0]))
    video, flow = (torch.stack(x) for x in zip(*found))
    return *to_float(video).unbind(1), flow

def train_raft(cfg, stage, device):
    """Tiny RAFT on procedural pairs, some with noise: RAFT's sequence loss, moving pixels counting five times."""
    torch.manual_seed(cfg.seed)
    raft = TinyRAFT().to(device)
    optimiser = torch.optim.AdamW(raft.parameters(), 2e-3)
    def step(k, pairs):
        a, b, true = (x.to(device) for x in pairs)
        g = make_rng(cfg.seed, 1, k)
        noise = 0.1 * torch.rand(1, generator=g) * (torch.rand(1, generator=g) < 0.3)
        a, b = (x + (noise * torch.randn(x.shape, generator=g)).to(device) for x in (a, b))
        weight = 1 + 4 * (true.square().sum(1) > 0.01)  # (N, H, W)
        flows = raft(a, b, updates=4, detach=True, every=True)
        loss = sum(0.8 ** (3 - n) * (weight * (f - true).abs().sum(1)).mean() for n, f in enumerate(flows))
        descend(loss, raft, optimiser, min(1, k / 50, 1.02 - k / cfg.raft_iters))
        return dict(flow=loss)

    stage("raft", cfg.raft_iters, dict(raft=raft, optimiser=optimiser), partial(flow_pairs, cfg, count=16), step)
    raft.eval().requires_grad_(False)
    return lambda a, b: raft(a, b, cfg.updates)  # the gradient is not cut: see TinyRAFT

def large_raft(cfg, device):
    """torchvision's raft_small, which takes 128 px and more: smaller images are enlarged for it. Raises Fault."""
    from torchvision.models.optical_flow import raft_small
    raft = common.pretrained(raft_small, "--raft raft_small", "--raft tiny").eval().requires_grad_(False).to(device)
    def estimate(a, b):
        k = max(1, math.ceil(128 / a.shape[-1]))
        a, b = (F.interpolate(x, scale_factor=k, mode="bicubic").clamp(-1, 1) if k > 1 else x for x in (a, b))
        return F.avg_pool2d(raft(a, b, num_flow_updates=cfg.updates)[-1], k) / k
    return estimate

def decoder(moments):
    """y -> video in [-1, 1]; stands where a latent model has its VAE."""
    return lambda y: y * moments[1] + moments[0]

def denoiser(net, first, amount=0.0, noise=None):
    """D(x, sigma) of a network given the first frame (B, 3, H, W), with noise augmentation of the condition."""
    first = first if noise is None else first + amount * noise
    return lambda x, sigma: edm_denoise(lambda z, c: net(z, c, first), x, sigma)

def noise_of(prior, y, g):
    """sigma (B,) of the prior, noise like y, noise like its first frame."""
    mean, spread = PRIOR[prior]
    draw = lambda *shape: torch.randn(*shape, generator=g).to(y.device)
    return (mean + spread * draw(len(y))).exp(), draw(*y.shape), draw(*y[:, :, 0].shape)

def general_clips(cfg, step):
    """A batch of motion in general, boxes and arms of any make: uint8 (B, T, 3, H, W)."""
    rngs = [np.random.default_rng([cfg.seed, 4, step, b]) for b in range(cfg.batch)]
    return torch.stack([(common.shapes(rng, cfg.size, cfg.frames, rough=0.3) if b % 2 else
                         common.robot(rng, cfg.size, cfg.frames, make="any"))["video"] for b, rng in enumerate(rngs)])

def train_base(cfg, stage, moments, device):
    """The image-to-video model on motion in general, reconstruction alone: its average."""
    torch.manual_seed(cfg.seed + 1)
    net = VideoUNet(cfg.width, [float(m) for m in cfg.mults.split(",")], cfg.patch, cfg.amp).to(device)
    average, optimiser = averaged(net, cfg.ema), torch.optim.AdamW(net.parameters(), cfg.lr)
    if cfg.compile: net.compile()
    def step(k, clips):
        y, g = normalise(clips.to(device), moments), make_rng(cfg.seed, 2, k)
        sigma, n, aug = noise_of(cfg.prior, y, g)
        D = denoiser(net, y[:, :, 0], cfg.augment, aug)(y + like(sigma, y) * n, sigma)
        loss = recon_loss(D, y, sigma).mean()
        descend(loss, net, optimiser, min(1, k / 50), average)
        return dict(base=loss)

    parts = dict(net=net, average=average, optimiser=optimiser)
    stage("base", cfg.base_iters, parts, partial(general_clips, cfg), step)
    return average.module

def tune(cfg, stage, saved, base, estimate, clips, moments, device):
    """Fine-tune the base model under every objective: the same start, clips, noise and pairs. Weights go to saved."""
    objectives, parts = cfg.objectives.split(","), {}
    for o in objectives:
        net = copy.deepcopy(base)
        parts |= {f"{o} net": net, f"{o} average": averaged(net, cfg.ema),
                  f"{o} optimiser": torch.optim.AdamW(net.parameters(), cfg.lr_tune)}
        if cfg.compile: net.compile()
    batches, decode = common.Batches(clips, cfg.batch, cfg.frames, cfg.seed), decoder(moments)
    meter = saved.setdefault("meter", {o: [0.0, 0, 0] for o in objectives})  # seconds, steps, samples with a flow term
    def step(k, batch):
        y, g = normalise(batch.to(device), moments), make_rng(cfg.seed, 3, k)
        sigma, n, aug = noise_of(cfg.prior, y, g)
        j = torch.rand(len(y), cfg.frames - 1, generator=g).argsort(1)[:, :cfg.n_pairs].to(device) + 1  # (B, K)
        i, losses = 0 * j if cfg.pairs == "first" else j - 1, {}
        for o in objectives:
            began = time.perf_counter()
            net, average, optimiser = (parts[f"{o} {part}"] for part in ("net", "average", "optimiser"))
            D = denoiser(net, y[:, :, 0], cfg.augment, aug)(y + like(sigma, y) * n, sigma)
            weight = flow_weight(o, sigma, cfg.psi)
            flow = flow_loss(estimate, decode, D, decode(y), weight, i, j, cfg.scale, cfg.hidden)
            loss = (recon_loss(D, y, sigma) + flow).mean()  # L = L_recon + w(sigma) L_flow
            descend(loss, net, optimiser, average=average)
            losses[o] = loss
            if device.type == "cuda": torch.cuda.synchronize()  # the times are compared
            spent = time.perf_counter() - began, 1, int((weight > 0).sum())
            meter[o] = [a + b for a, b in zip(meter[o], spent)]
        if k in points_of(cfg):
            kept = {o: {n: v.clone() for n, v in parts[f"{o} average"].module.state_dict().items()} for o in objectives}
            saved.setdefault("points", {})[k] = kept
        return losses

    stage("tune", cfg.iters, parts, batches.__getitem__, step, watch=points_of(cfg))

# ----------------------------------------------------------------------------------------------- evaluate
def points_of(cfg):
    """Steps at which the fine-tuned models are evaluated: those of --points that are reached, and the last."""
    return sorted({int(p) for p in cfg.points.split(",") if int(p) < cfg.iters} | {cfg.iters})

@torch.no_grad()
def evaluate(cfg, saved, base, estimate, test_clips, world, moments, device):
    """Generate held-out clips from their first frames, for every objective and point: rows, videos, flows.

    True flow is exact in a procedural world, else the estimator's on the real clip. Moving: over 1/4 pixel a frame.
    """
    count = min(cfg.videos, len(test_clips))
    real = torch.stack([test_clips.frames(k, 0, cfg.frames) for k in range(count)]).to(device)  # (N, T, 3, H, W)
    y, video = normalise(real, moments), to_float(real).transpose(1, 2)
    found = flows_of(estimate, video)  # (N, T - 1, 2, H, W)
    exact = lambda k: world(common.world_rng(cfg.seed, "test", k), cfg.size, cfg.frames, flow=True)["flow"]
    true = torch.stack([exact(k) for k in range(count)]).to(device) if world else found
    moving = true.square().sum(2).sqrt() > 0.25  # (N, T - 1, H, W)
    error = lambda flows: end_point_error(flows.flatten(0, 1), true.flatten(0, 1)).view(moving.shape)
    same = dict(epe_zero=error(0 * true)[moving].mean().item(), features="own", psi=cfg.psi, seed=cfg.seed,
                epe_floor=error(found)[moving].mean().item() if world else None)
    others = range(count, len(test_clips)) if len(test_clips) > count + 1 else range(count)
    reference = common.own_features(cut(torch.stack([test_clips.frames(k, 0, cfg.frames) for k in others]), 8))
    first, sigmas = y[:, :, 0], karras_sigmas(cfg.steps, low=0.05)  # noise of 0.05 nobody sees
    noise = torch.randn(y.shape, generator=make_rng(cfg.seed, 0, 0)).to(device)
    rows, videos, flows, net = [], {"truth": real.cpu()}, {"truth": true}, copy.deepcopy(base).eval()
    def row(name, step, weights, seconds=None, share=None):
        net.load_state_dict(weights)
        made = []
        for a in tqdm(range(0, count, 8), f"generating {name}, step {step}", leave=False):
            made.append(sample_edm(denoiser(net, first[a:a + 8]), sigmas[0] * noise[a:a + 8], sigmas))
        made = to_uint8(decoder(moments)(torch.cat(made))).transpose(1, 2)  # (N, T, 3, H, W)
        flow = flows_of(estimate, to_float(made.to(device)).transpose(1, 2))
        e, a, b = error(flow), to_float(made).flatten(0, 1) / 2 + 0.5, to_float(real.cpu()).flatten(0, 1) / 2 + 0.5
        rows.append(dict(objective=name, step=step, epe_moving=e[moving].mean().item(),
                         epe_background=e[~moving].mean().item(), ssim=ssim(a, b), active_share=share,
                         s_per_step=seconds,
                         psnr=-10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10().mean().item(),
                         fvd=common.frechet(common.own_features(cut(made, 8)), reference), **same))
        videos[name, step], flows[name, step] = made, flow

    row("base", 0, base.state_dict())
    for k, weights in saved["points"].items():
        for o, w in weights.items():
            seconds, steps, active = saved["meter"][o]
            row(o, k, w, seconds / steps, active / steps / cfg.batch)
    return rows, videos, flows

@torch.no_grad()
def by_noise(cfg, nets, estimate, clips, moments, device):
    """Fig. 2 and 3 as numbers: what happens at every noise level of SIGMAS, on clips (N, T, 3, H, W)."""
    y, decode = normalise(clips.to(device), moments), decoder(moments)
    n, truth = torch.randn(y.shape, generator=make_rng(cfg.seed, 0, 1)).to(device), decode(y)
    j = torch.arange(1, cfg.frames, device=device).expand(len(y), -1)
    i = 0 * j if cfg.pairs == "first" else j - 1
    found, true = dict(sigma=SIGMAS, noisy_flow=[]), flows_of(estimate, truth)
    for s in SIGMAS:
        noisy = y + s * n
        e = end_point_error(flows_of(estimate, decode(noisy)).flatten(0, 1), true.flatten(0, 1))
        found["noisy_flow"].append(e[true.flatten(0, 1).square().sum(1) > 0.06].mean().item())
        for o, net in nets.items():
            sigma = y.new_full((len(y),), s)
            D = denoiser(net, y[:, :, 0])(noisy, sigma)
            found.setdefault(f"{o} recon", []).append(recon_loss(D, y, sigma).mean().item())
            apart = flow_difference(estimate, decode(D), truth, i, j, cfg.hidden)
            found.setdefault(f"{o} flow", []).append(apart.mean().item())
    return found

def pictures(cfg, out, rows, videos, flows, noise, estimate, moments):
    """samples.gif, sheet.png (Fig. 5), curves.png (Fig. 4), noise.png (Fig. 3) and weights.png (Fig. 2)."""
    objectives, points = cfg.objectives.split(","), points_of(cfg)
    shown = ["truth", ("base", 0), *itertools.product(objectives, sorted({*points[1:2], points[-1]}))]
    at = np.linspace(0, cfg.frames - 2, 8).round().astype(int)
    colours = flow_to_image(torch.cat([flows[k][0][at].cpu() for k in shown])).split(len(at))
    label = lambda k: "real" if k == "truth" else f"{k[0]}\nstep {k[1]}"
    lines = [line for k, c in zip(shown, colours) for line in ((label(k), videos[k][0][at]), ("  its flow", c))]
    page = common.sheet(lines, [f"frame {a}" for a in at], scale=max(1, 64 // cfg.size))
    common.save_page(out / "sheet.png", page)
    pages = [common.sheet([(label(k), videos[k][:4, a]) for k in shown], [f"frame {a}"]) for a in range(cfg.frames)]
    common.save_pages(out / "samples.gif", pages, ms=150)
    over = lambda o, key: tuple([r[k] for r in rows if r["objective"] == o] for k in ("step", key))
    titles = {"epe_moving": "flow error, moving (px)", "epe_background": "flow error, background (px)", "psnr": "PSNR",
              "ssim": "SSIM", "fvd": "Frechet distance"}
    common.save_curves(out / "curves.png", [dict(title=title, x="fine-tuning step", y=key, lines={
        o: over(o, key) for o in objectives}) for key, title in titles.items()])
    pair = normalise(videos["truth"][:1, cfg.frames // 4:cfg.frames // 4 + 2], moments)  # (1, 3, 2, H, W)
    n, levels = torch.randn(pair.shape, generator=make_rng(cfg.seed, 0, 2)), (0, *SIGMAS)
    noisy = torch.cat([decoder(moments)(pair + s * n) for s in levels])
    flow = flow_to_image(estimate(*noisy.to(flows["truth"].device).unbind(2)).cpu())
    page = common.sheet([("frame and\nnoise", to_uint8(noisy[:, :, 0])), ("its flow", flow)],
                        [f"sigma {s:g}" for s in levels], scale=max(1, 64 // cfg.size))
    common.save_page(out / "noise.png", page)
    sigma, psi = torch.tensor(SIGMAS), min(max(cfg.psi, SIGMAS[0]), SIGMAS[-1])
    mean, spread = PRIOR[cfg.prior]
    density = (-((sigma.log() - mean) ** 2) / (2 * spread**2)).exp()
    share = 0.5 + 0.5 * math.erf((math.log(max(cfg.psi, 1e-9)) - mean) / spread / 2**0.5)
    of = lambda kind: {o: (SIGMAS, noise[f"{o} {kind}"]) for o in ["base", *objectives]}
    weights = {o: flow_weight(o, sigma, cfg.psi).tolist() for o in objectives}
    panels = [
        dict(title="L_recon", y="held-out", lines=of("recon"), log=True),
        dict(title="flow difference, unweighted", y="pixels^2", lines=of("flow"), log=True),
        dict(title="weight w lambda", y="", log=True, lines={
            o: tuple(zip(*kept)) for o, w in weights.items() if (kept := [p for p in zip(SIGMAS, w) if p[1] > 0])}),
        dict(title=f"prior of sigma: {share:.0%} below psi {cfg.psi:g}", y="density", lines={
            cfg.prior: (SIGMAS, density.tolist()), "psi": ([psi] * 2, [0, 1])}),
        dict(title="flow of noised clips against flow of clean", y="error, px",
             lines={"moving pixels": (SIGMAS, noise["noisy_flow"])})]
    common.save_curves(out / "weights.png", [dict(panel, x="sigma", log_x=True) for panel in panels])

COLUMNS = {"objective": ("objective", ""), "step": ("step", "d"), "epe_moving": ("EPE moving", ".3f"),
           "epe_background": ("backgr.", ".3f"), "epe_zero": ("zero", ".3f"), "epe_floor": ("floor", ".3f"),
           "psnr": ("PSNR", ".2f"), "ssim": ("SSIM", ".4f"), "fvd": ("FD", ".2f"), "active_share": ("share", ".2f"),
           "s_per_step": ("s/step", ".3f")}
def check(cfg):
    """What single values cannot tell. Raises Fault."""
    common.check_names(cfg, "objectives", ("none", "constant", "lambda", "soft", "gated"))
    common.check_list(cfg, "mults", float, 0.25, 8)
    common.check_list(cfg, "points", int, 1, 10**8)
    fold = cfg.patch * 2 ** cfg.mults.count(",")
    if cfg.size % fold or cfg.size == fold or cfg.size % 2:
        raise Fault(f"--size {cfg.size}: must be even, and {2 * fold} or a larger multiple of {fold} (patch x 2 a level"
                    " but one)")
    if cfg.n_pairs >= cfg.frames:
        raise Fault(f"--n_pairs {cfg.n_pairs}: a clip of {cfg.frames} frames has {cfg.frames - 1} pairs; lower it")

def main():
    began, cfg = time.time(), common.parse_args("flowloss", Config, PRESETS, __doc__)
    check(cfg)
    device = common.pick_device(cfg.device)
    cfg.device = str(device)
    train_clips, test_clips, source = common.load_clips(cfg.dataset, cfg.data_dir, cfg.size, (cfg.clips, 96),
                                                        cfg.frames, cfg.seed, min_frames=cfg.frames)
    if min(len(test_clips), cfg.videos) * (cfg.frames // 8) < 2:
        raise Fault(f"the Frechet distance needs more than {len(test_clips)} test clip of {cfg.frames} frames")
    out = common.open_run("flowloss", cfg, train_clips, test_clips)
    saved = common.load_stages(out / "ckpt.pt", "flowloss", cfg, ("tune", cfg.iters))
    moments = common.moments(train_clips)  # EDM with sigma_data = 1 wants data of variance 1
    print(f"{cfg.preset} preset on {device}, {len(train_clips)} + {len(test_clips)} clips ({source})")
    columns = ["flow", "base", *cfg.objectives.split(",")]
    stage = partial(common.stage, "flowloss", cfg, out, saved, train_clips, columns)
    estimate = train_raft(cfg, stage, device) if cfg.raft == "tiny" else large_raft(cfg, device)
    base = train_base(cfg, stage, moments, device)
    tune(cfg, stage, saved, base, estimate, train_clips, moments, device)
    world = common.WORLDS.get(cfg.dataset) if source == "procedural" else None
    rows, videos, flows = evaluate(cfg, saved, base, estimate, test_clips, world, moments, device)
    nets = {"base": base} | {o: copy.deepcopy(base) for o in cfg.objectives.split(",")}
    for o, weights in saved["points"][cfg.iters].items():
        nets[o].load_state_dict(weights)
    held_out = torch.stack([test_clips.frames(k, 0, cfg.frames) for k in range(min(8, len(test_clips)))])
    noise = by_noise(cfg, nets, estimate, held_out, moments, device)
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)], size=cfg.size)
    common.write_results(out, "flowloss", cfg, device, dataset, common.finite(rows), began, by_noise=common.finite(noise))
    pictures(cfg, out, rows, videos, flows, noise, estimate, moments)
    print("\nby noise level:", *(f"  {k:16s}" + " ".join(f"{v:8.3f}" for v in vs) for k, vs in noise.items()), sep="\n")
    print(f"\nFig. 4: {len(videos['truth'])} held-out clips, Heun, {cfg.steps} steps\n" + common.table(rows, COLUMNS))
    print(f"\nwrote {', '.join(p.name for p in sorted(out.iterdir()))} in {out}/ after {time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
