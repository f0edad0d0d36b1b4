"""FlowLoss (Wu, Ota and Kanezaki, 2025), https://arxiv.org/abs/2504.14535

A video diffusion model that is trained on reconstruction alone learns late what moves where.
FlowLoss compares the optical flow of the denoised video with that of the true one: flow against
flow, nothing is warped. Flow of a prediction at high noise means nothing, so a gate closes there.

    EDM       D(x; s) = c_skip x + c_out F(c_in x; c_noise)     Eq. 7, of data of variance 1. Ours,
              in denoise(): F is also given the first frame and (x - first) / s, and a mask that
              it makes lets pixels stay what they were in the first frame
    L_recon   E lambda(s) || D(y + s n; s) - y ||^2             lambda(s) = (s^2 + 1) / s^2
    L_flow    S E lambda(s) sum_t o(a_t) || f_t(y) - f_t(D) ||^2
              f: flow from the first frame to frame t; o: 1 where a_t says visible, else 0.3.
              Ours: the mean, not the sum, and over --pairs of t that each step draws
    L         L_recon + w(s) L_flow          w(s) = 1 / (s^2 + 1) if s < psi, else 0: the gate,
                                             different for every clip, so inside the E

The paper was not at hand: the equations come from reviews of it, without numbers, and what they
leave open is marked "paper silent". It fine-tunes Stable Video Diffusion. Here a small model that
knows boxes and arms of any make is fine-tuned on clips of one robot, with and without the flow
term, in finetune(). It is shipped, and so is the flow estimator, which tests/study.py trains.

    python flowloss.py --dataset robot              # fine-tune and compare; 4 minutes on two cores
    python flowloss.py --dataset robot --eval_only  # compare again, from the checkpoint
    python flowloss.py --first photo.jpg            # your picture, before and after fine-tuning
    python flowloss.py --train --out_dir out/new    # with a base model made anew: 1 hour

A run prints flow error and PSNR of held-out clips, early and late.
"""
import copy
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Before torch: threads that wait must sleep, or a busy neighbour makes training 100 times slower.
if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import flow_to_image
from tqdm import tqdm

if __package__:  # copied into a package of yours
    from . import common
    from .common import Fault, edm_weight, like, make_rng, opt, to_float, to_uint8
else:
    import common
    from common import Fault, edm_weight, like, make_rng, opt, to_float, to_uint8

SHIPPED = Path(__file__).resolve().parent / "assets" / "models" / "flowloss-robot.pt"
SAVE_EVERY = 500  # training steps
MOVING = 0.25     # pixels a frame: what moves less counts as background

@dataclass
class Config:
    dataset: str = opt("robot", "robot, or a folder of your clips in --data_dir")
    data_dir: str = opt("", "where DATASET/{train,test}/ lies; empty: data", free=True)
    preset: str = opt("tiny", "tiny (two CPU cores), small (one GPU, never run to its end)")
    first: str = opt("", "a picture to set in motion, by the run in the output folder", free=True)
    train: bool = opt(False, "train the base model first")
    model: str = opt("", "a base.pt of --train to start from; empty: the shipped one")
    resume: bool = opt(False, "go on with the run in the output folder", free=True)
    eval_only: bool = opt(False, "evaluate the run in the output folder again", free=True)
    out_dir: str = opt("", "else out/flowloss-DATASET[-procedural]", free=True)
    device: str = opt("auto", "auto (cuda if it is there, else cpu), cpu, cuda, mps", free=True)
    compile: bool = opt(False, "torch.compile the video networks", free=True)
    amp: bool = opt(False, "bfloat16 autocast inside the networks")
    seed: int = opt(0, "of weights, data and noise", 0, 2**31)
    iters: int = opt(300, "steps of fine-tuning", 1, 10**8)
    points: str = opt("50", "evaluate after these steps, and after the last")
    tune_lr: float = opt(2e-4, "AdamW's learning rate in fine-tuning, constant", 0, 1)
    psi: float = opt(2.0, "the gate: noise levels from here on have no flow term", 0, 1000)
    scale: float = opt(0.1, "S, the weight of the flow term", 0, 10**6)
    pairs: int = opt(1, "frames t to draw for a step; frames - 1: all, as in the paper", 1, 256)
    base_iters: int = opt(16000, "--train: steps of the base model", 1, 10**8)
    lr: float = opt(2e-3, "--train: AdamW's learning rate", 0, 1)
    batch: int = opt(4, "clips in a batch", 1, 65536)
    size: int = opt(32, "--train: height and width of a frame, pixels", 24, 1024)
    frames: int = opt(16, "--train: frames of a clip", 8, 256)
    width: int = opt(32, "--train: channels at the first level", 8, 1024)
    ema: float = opt(0.98, "decay of the average of weights to sample from", 0, 0.999999)
    clips: int = opt(500, "training clips of the procedural world", 2, 10**6)
    videos: int = opt(32, "held-out clips to generate", 2, 4096, free=True)
    steps: int = opt(20, "steps of the sampler", 1, 1000, free=True)
    sample_batch: int = opt(8, "clips sampled at once; another, other noise", 1, 4096, free=True)

PRESETS = {
    "tiny": {},
    "small": dict(
        iters=2000, points="100,300", base_iters=20000, batch=16, size=64, width=96, lr=5e-4,
        ema=0.995, clips=4000, videos=64, steps=30, amp=True,
    ),
}
METHODS = {"none": "reconstruction", "gated": "+ flow"}
LEVELS = (1, 1.5, 2)  # channels of each level of the network, in widths
PATCH = 2  # squares of 2x2 pixels become channels

# EDM's noise prior, ln sigma ~ N(P_MEAN, P_STD^2). Paper silent: EDM's own values, -1.2 and 1.2,
# seldom draw the high levels that decide motion.
P_MEAN = 0.0
P_STD = 1.5
AUGMENT = 0.02  # noise on the first frame, in training alone; SVD adds it in sampling, too

# y: the true video, of variance 1, (B, 3, T, H, W). D: the denoised one. n: noise. sigma: the noise
# level, (B,). truth: the true video in [-1, 1]. Flow: (N, 2, H, W) in pixels.

# ---------------------------------------- THE METHOD
# From here to flow_loss is one block to paste. It needs torch, and torch.nn.functional as F.

def gate(sigma, psi):
    """w(sigma), (B,): 1 / (sigma^2 + 1) below psi, else 0. The paper's hard gate."""
    return torch.where(sigma < psi, 1 / (sigma**2 + 1), 0.0)

def at_least_float32(x):
    """bfloat16 cannot tell places above 256; of half types grid_sample is wrong on a CPU."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def warp(x, flow):
    """x (N, C, H, W) read off at p + flow(p), bilinear; outside, the nearest border pixel.

    Of whatever type, it is worked out and returned in float32 at least.
    """
    x = at_least_float32(x)
    flow = at_least_float32(flow).to(x.dtype)
    H, W = x.shape[-2:]
    column = torch.arange(W, device=x.device)
    row = torch.arange(H, device=x.device)[:, None]
    grid_x = 2 * (column + flow[:, 0]) / (W - 1) - 1  # (N, H, W), -1 to 1 from centre to centre
    grid_y = 2 * (row + flow[:, 1]) / (H - 1) - 1
    grid = torch.stack([grid_x, grid_y], -1)
    return F.grid_sample(x, grid, align_corners=True, padding_mode="border")

def visible(forward, backward):
    """a_t: where the target of a flow can be seen, bool (N, 1, H, W); both flows (N, 2, H, W).

    It is in the picture, and the flow back returns: the usual test (Sundaram et al. 2010).
    """
    forward = at_least_float32(forward)
    backward = at_least_float32(backward)
    H, W = forward.shape[-2:]
    to_x = torch.arange(W, device=forward.device) + forward[:, :1]  # (N, 1, H, W)
    to_y = torch.arange(H, device=forward.device)[:, None] + forward[:, 1:]
    inside = (to_x > -0.5) & (to_x < W - 0.5) & (to_y > -0.5) & (to_y < H - 0.5)
    back = warp(backward, forward)
    apart = (forward + back).square().sum(1, keepdim=True)
    size = (forward.square() + back.square()).sum(1, keepdim=True)
    return inside & (apart < 0.01 * size + 0.5)

def flow_difference(estimate, video, truth, pairs, hidden=0.3):
    """The mean over t and pixels of o(a_t) || f_t(y) - f_t(D) ||^2, pixels^2, (B,).

    estimate(image1, image2) -> flow; it is given float32. video, truth (B, 3, T, H, W) in [-1, 1].
    pairs (B, K, 2): from which frame to which. Only the video gets a gradient.
    """
    rows = torch.arange(len(pairs), device=pairs.device)[:, None]  # (B, 1)

    def frames(video, k):  # those that pairs[..., k] names, (B K, 3, H, W)
        return video.float().transpose(1, 2)[rows, pairs[..., k]].flatten(0, 1)

    with torch.no_grad():
        a = frames(truth, 0)
        b = frames(truth, 1)
        true, back = estimate(torch.cat([a, b]), torch.cat([b, a])).float().chunk(2)  # f_t(y)
        o = torch.where(visible(true, back), 1.0, hidden)  # (B K, 1, H, W)
    flow = estimate(frames(video, 0), frames(video, 1)).float()  # f_t(D)
    squared = (flow - true).square().sum(1, keepdim=True)  # (B K, 1, H, W)
    difference = (o * squared).flatten(1).mean(1)  # (B K,)
    return difference.unflatten(0, pairs.shape[:2]).mean(1)

def flow_loss(estimate, decode, D, truth, w, sigma, pairs, scale=0.1):
    """w(sigma) L_flow of every clip, (B,), to be added to L_recon. Source: FlowLoss.

    decode(D) -> video in [-1, 1], of a latent model its VAE; the truth is decoded already. w =
    gate(sigma, psi). Where it is 0 nothing is decoded and no flow estimated. The rest as in
    flow_difference.
    """
    w = w.float()
    sigma = sigma.float()
    lam = (sigma**2 + 1) / sigma**2  # lambda
    loss = torch.zeros_like(w)
    on = w > 0
    if on.any():
        difference = flow_difference(estimate, decode(D[on]), truth[on], pairs[on])
        loss[on] = scale * w[on] * lam[on] * difference  # S: paper 1e-6 on sums, ours on means
    return loss

def recon_loss(D, y, sigma):
    """L_recon of every clip, (B,): EDM's weighted squared error."""
    return edm_weight(sigma.float()) * (D - y).float().square().flatten(1).mean(1)

# ---------------------------------------- tiny RAFT

def correlation(a, b):
    """All pairs: features (N, C, H, W) twice -> (N H W, 1, H, W), scaled by 1 / sqrt(C)."""
    N, C, H, W = a.shape
    dots = a.flatten(2).transpose(1, 2) @ b.flatten(2)  # (N, H W, H W)
    return (dots / C**0.5).reshape(N * H * W, 1, H, W)

def look_up(pyramid, at, radius=3):
    """Correlations of every level around `at` (N, 2, H, W), in pixels of level 0.

    Returns (N, levels (2 radius + 1)^2, H, W).
    """
    N, _, H, W = at.shape
    step = torch.arange(-radius, radius + 1, device=at.device, dtype=at.dtype)
    window = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1)  # (2r+1, 2r+1, 2): x, y
    found = []
    for level, corr in enumerate(pyramid):
        h, w = corr.shape[-2:]
        centre = (at + 0.5) / 2**level - 0.5  # in pixels of this level
        p = centre.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) + window  # (N H W, 2r+1, 2r+1, 2)
        grid_x = (2 * p[..., 0] + 1) / w - 1
        grid_y = (2 * p[..., 1] + 1) / h - 1
        grid = torch.stack([grid_x, grid_y], -1)
        near = F.grid_sample(corr, grid, align_corners=False)  # outside: 0
        found.append(near.view(N, H, W, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2)

def upsample(flow, mask):
    """Convex upsampling by 2: each fine flow is a mean of the 3x3 coarse ones around it.

    The weights are softmax(mask), mask (N, 36, H, W).
    """
    N, _, H, W = flow.shape
    weight = mask.view(N, 1, 9, 2, 2, H, W).softmax(2)
    padded = F.pad(2 * flow, (1, 1, 1, 1), mode="replicate")
    near = F.unfold(padded, 3).view(N, 2, 9, 1, 1, H, W)
    fine = (weight * near).sum(2)  # (N, 2, 2, 2, H, W): x or y, row, column within a cell
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(N, 2, 2 * H, 2 * W)

class Encoder(nn.Module):
    """Image (N, 3, H, W) -> features (N, channels, H/2, W/2)."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = norm(16)
        self.conv2 = nn.Conv2d(16, 32, 3, 2, padding=1)
        self.norm2 = norm(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.norm3 = norm(32)
        self.out = nn.Conv2d(32, channels, 1)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = x + F.relu(self.norm3(self.conv3(x)))
        return self.out(x)

class TinyRAFT(nn.Module):
    """RAFT (Teed and Deng, ECCV 2020), small: stride 2, two levels, radius 3, a ConvGRU.

    image1, image2 (N, 3, H, W) in [-1, 1], of 24 px and up -> flow (N, 2, H, W) in pixels;
    every=True: of every update. Images above 50 px are made smaller by a power of two first, their
    last row and column repeated until it divides them, and their flow larger after.

    detach: RAFT cuts the gradient through the lookup's place between updates. That trains well,
    but then autograd's gradient to the images is not that of the output (the test compares finite
    differences). A loss on the flow needs it whole: detach only to train the RAFT itself.
    """

    def __init__(self, hidden=32, context=24):
        super().__init__()
        self.hidden = hidden
        inputs = hidden + context + 40 + 2
        self.features = Encoder(32, nn.InstanceNorm2d)
        self.context = Encoder(hidden + context, nn.Identity)
        self.motion1 = nn.Conv2d(98 + 2, 48, 1)  # 98: two levels of 7x7
        self.motion2 = nn.Conv2d(48, 40, 3, padding=1)
        self.gates = nn.Conv2d(inputs, 2 * hidden, 3, padding=1)
        self.candidate = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.head1 = nn.Conv2d(hidden, 48, 3, padding=1)
        self.head2 = nn.Conv2d(48, 2, 3, padding=1)
        self.mask = nn.Conv2d(hidden, 36, 1)

    def forward(self, image1, image2, updates=2, detach=False, every=False):
        height, width = image1.shape[-2:]
        shrink = 1
        while max(height, width) > 50 * shrink:  # all pairs cost size^4
            shrink *= 2
        fold = 2 * shrink  # what is left must be even
        pad = (0, -width % fold, 0, -height % fold)  # right and below: no place moves
        image1 = F.avg_pool2d(F.pad(image1, pad, mode="replicate"), shrink)
        image2 = F.avg_pool2d(F.pad(image2, pad, mode="replicate"), shrink)

        features = self.features(torch.cat([image1, image2]))
        a, b = F.instance_norm(features).chunk(2)  # else correlations start near 0
        corr = correlation(a, b)
        pyramid = [corr, F.avg_pool2d(corr, 2, ceil_mode=True)]
        net, inp = self.context(image1).tensor_split([self.hidden], 1)
        net = net.tanh()  # the hidden state
        inp = inp.relu()  # the context

        H, W = a.shape[-2:]
        column = torch.arange(W, device=a.device).expand(H, W)
        row = torch.arange(H, device=a.device)[:, None].expand(H, W)
        start = torch.stack([column, row]).to(a.dtype).expand(len(a), -1, -1, -1)
        flow = torch.zeros_like(start)
        flows = []
        for update in range(updates):
            if detach:
                flow = flow.detach()
            near = look_up(pyramid, start + flow)
            motion = F.relu(self.motion1(torch.cat([near, flow], 1)))
            motion = F.relu(self.motion2(motion))
            x = torch.cat([inp, motion, flow], 1)
            z, r = self.gates(torch.cat([net, x], 1)).sigmoid().chunk(2, 1)
            candidate = self.candidate(torch.cat([r * net, x], 1)).tanh()
            net = (1 - z) * net + z * candidate
            flow = flow + self.head2(F.relu(self.head1(net)))
            if every or update == updates - 1:
                fine = upsample(flow, self.mask(net))
                large = F.interpolate(fine, scale_factor=float(shrink), mode="bilinear")
                flows.append(shrink * large[..., :height, :width])
        return flows if every else flows[-1]

# ---------------------------------------- network

def on_frames(layer, x):
    """A layer for pictures on every frame of x (B, C, T, H, W)."""
    B, _, T, _, _ = x.shape
    h = layer(x.transpose(1, 2).flatten(0, 1))  # (B T, C, H, W)
    return h.unflatten(0, (B, T)).transpose(1, 2)

def group_norm(channels):
    return nn.GroupNorm(math.gcd(8, channels), channels)

class ResBlock(nn.Module):
    """Residual block over space, then over time; self-attention over both where asked."""

    def __init__(self, cin, cout, dim, time, attend):
        super().__init__()
        self.norm1 = group_norm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.clock = nn.Linear(dim, 2 * cout)
        self.norm2 = group_norm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.norm3 = group_norm(cout)
        self.time = nn.Conv2d(cout, cout, (3, 1), padding=(1, 0)) if time else None
        heads = math.gcd(cout, max(1, cout // 32))  # they must divide the channels
        self.attention = nn.MultiheadAttention(cout, heads, batch_first=True) if attend else None
        nn.init.zeros_(self.conv2.weight)
        if time:
            nn.init.zeros_(self.time.weight)

    def forward(self, x, emb):  # (B, C, T, H, W), (B, T, dim)
        clock = self.clock(emb).transpose(1, 2)[..., None, None]  # (B, 2 C, T, 1, 1)
        scale, shift = clock.chunk(2, 1)
        h = on_frames(self.conv1, F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        x = on_frames(self.skip, x) + on_frames(self.conv2, F.silu(h))
        h = self.norm3(x)
        if self.time is not None:
            along = self.time(F.silu(h).flatten(3))  # (B, C, T, H W)
            x = x + along.reshape(x.shape)
        if self.attention is not None:
            tokens = h.flatten(2).transpose(1, 2)  # (B, T H W, C): every place at every time
            tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            x = x + tokens.transpose(1, 2).reshape(x.shape)
        return x

class VideoUNet(nn.Module):
    """(B, 9, T, H, W), c_noise (B,) -> (B, 4, T, H, W), float32: see denoise."""

    def __init__(self, width, frames, amp=False):
        super().__init__()
        channels = [int(width * m) for m in LEVELS]
        dim = 4 * width
        self.width = width
        self.amp = amp
        self.register_buffer("mean", torch.tensor(0.0))  # of the pixels it was trained on
        self.register_buffer("std", torch.tensor(1.0))
        self.embed = nn.Sequential(
            nn.Linear(2 * (width // 2), dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.frame = nn.Parameter(0.1 * torch.randn(frames, dim))
        self.inp = nn.Conv2d(9 * PATCH**2, channels[0], 3, padding=1)
        self.shrink = nn.AvgPool2d(2)
        self.grow = nn.Upsample(scale_factor=2.0)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, c in enumerate(channels):
            above = channels[max(0, level - 1)]
            time = level > 0  # at full size it would cost the most
            attend = level == len(channels) - 1
            self.down.append(ResBlock(above, c, dim, time, attend))
            self.up.append(ResBlock(c, above, dim, time, attend))
        self.mid = ResBlock(c, c, dim, time=True, attend=True)
        self.norm = group_norm(channels[0])
        self.out = nn.Conv2d(channels[0] + 9 * PATCH**2, 4 * PATCH**2, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, c_noise):
        x = F.pixel_unshuffle(x.transpose(1, 2), PATCH).transpose(1, 2)  # (B, 9 PATCH^2, ...)
        w = torch.exp(torch.linspace(0, math.log(100), self.width // 2, device=x.device))
        angle = c_noise[:, None] * w
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            emb = self.embed(torch.cat([angle.sin(), angle.cos()], 1))
            emb = emb[:, None] + self.frame  # (B, T, dim)
            h = on_frames(self.inp, x)
            skips = []
            for level, block in enumerate(self.down):
                if level > 0:
                    h = on_frames(self.shrink, h)
                h = block(h, emb)
                skips.append(h)
            h = self.mid(h, emb)
            for level in reversed(range(len(skips))):
                h = self.up[level](h + skips[level], emb)
                if level > 0:
                    h = on_frames(self.grow, h)
            h = torch.cat([F.silu(self.norm(h)), x], 1)  # noise need not pass a narrow network
            h = on_frames(self.out, h)
        return F.pixel_shuffle(h.float().transpose(1, 2), PATCH).transpose(1, 2)

def denoise(net, x, sigma, first):
    """D(x; sigma) of a network of this file, given the first frame (B, 3, H, W): EDM's Eq. 7.

    Ours, for a network so small: it is also shown (x - first) / sigma, mere noise where nothing
    moves, and a mask that it makes lets pixels stay what they were in the first frame.
    """
    first = first[:, :, None].expand_as(x)
    s = like(sigma, x)
    total = (s**2 + 1).sqrt()
    apart = ((x - first) / s).clamp(-5, 5)
    out = net(torch.cat([x / total, apart, first], 1), sigma.log() / 4)  # (B, 4, T, H, W)
    F_theta, mask = out.tensor_split([3], 1)
    D = x / total**2 + s / total * F_theta  # Eq. 7
    return first + mask.sigmoid() * (D - first)  # ours

# ---------------------------------------- train the base model

def general_clips(cfg, step):
    """A batch of moving boxes, discs and arms of any make, uint8 (B, T, 3, H, W)."""
    clips = []
    for k in range(cfg.batch):
        rng = np.random.default_rng([cfg.seed, 4, step - 1, k])
        if ((step - 1) * cfg.batch + k) % 4 < 3:  # three arms, then a clip of boxes
            clip = common.robot(rng, cfg.size, cfg.frames, make="any")
        else:
            clip = common.shapes(rng, cfg.size, cfg.frames, rough=0.3)
        clips.append(clip["video"])
    return torch.stack(clips)

def draw(seed, use, step, y):
    """sigma (B,), n like y, noise like its first frame: a function of (seed, use, step) alone."""
    rng = make_rng(seed, use, step)
    sigma = (P_MEAN + P_STD * torch.randn(len(y), generator=rng)).exp()
    n = torch.randn(y.shape, generator=rng)
    n_first = torch.randn(y[:, :, 0].shape, generator=rng)
    return sigma, n, n_first

def train_base(cfg, raft, out, device):
    """The image-to-video model, on motion in general, by L_recon alone."""
    torch.manual_seed(cfg.seed + 1)
    net = VideoUNet(cfg.width, cfg.frames, cfg.amp).to(device)
    some = to_float(torch.cat([general_clips(cfg, step) for step in range(1, 51)]))
    net.mean.fill_(some.mean())
    net.std.fill_(some.std())
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr, fused=device.type != "mps")
    saved = common.restore(out / "base.pt", "flowloss", cfg, base=net, optimizer=optimizer)
    log = common.Log(cfg.base_iters, saved["step"], saved["log"], "base model")
    if cfg.compile:
        net.compile()

    def inputs(step):
        frames = general_clips(cfg, step)
        return frames, *draw(cfg.seed, 2, step, frames.transpose(1, 2))

    loader = common.prefetched(inputs, saved["step"], cfg.base_iters, device)
    for step, (frames, sigma, n, n_first) in loader:
        y = (to_float(frames).transpose(1, 2) - net.mean) / net.std  # (B, 3, T, H, W)
        first = y[:, :, 0] + AUGMENT * n_first
        D = denoise(net, y + like(sigma, y) * n, sigma, first)
        loss = recon_loss(D, y, sigma).mean()

        decay = 2.5 * (1 - step / cfg.base_iters)  # in the last 40 %
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, step / 50, decay + 1e-3)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

        stop = log.add(step, recon=loss)
        if step % SAVE_EVERY == 0 or step == cfg.base_iters or stop:
            common.save_checkpoint(
                out, "flowloss", cfg, log, "base", step=step, raft=raft.state_dict(),
                base=net.state_dict(), optimizer=optimizer.state_dict())
        if stop:
            raise KeyboardInterrupt
    log.close()
    return net

# ---------------------------------------- load

def load_model(path, device, amp=False, tuned=False):
    """A flow estimator, a base model, and all that was saved with them. Raises Fault.

    tuned: what a fine-tuning kept is asked for, so it must have come to its end.
    """
    saved = common.load_checkpoint(path, "flowloss")
    made = saved["config"]
    if tuned or "kept" not in saved:
        steps = made["iters"] if tuned else made["base_iters"]
        if saved["step"] != steps:
            raise Fault(f"{path} has {saved['step']} of {steps} steps: --resume makes the others")
    raft = TinyRAFT()
    raft.load_state_dict(saved["raft"])
    base = VideoUNet(made["width"], made["frames"], amp)
    base.load_state_dict(saved["base"])
    return raft.to(device), base.to(device), saved

# ---------------------------------------- fine-tune

def draw_pairs(cfg, step):
    """From the first frame to cfg.pairs others, drawn for every clip: (B, K, 2).

    Paper silent: from the first, as DOT, the estimator it uses, tracks from one frame.
    """
    rng = make_rng(cfg.seed, 5, step)
    order = torch.rand(cfg.batch, cfg.frames - 1, generator=rng).argsort(1)  # of frames 1 and on
    t = 1 + order[:, :cfg.pairs]  # (B, K)
    return torch.stack([torch.zeros_like(t), t], -1)

def finetune(cfg, base, raft, clips, out, device):
    """Both objectives from the same base, on the same clips, noise and pairs.

    Returns the averaged weights at every point: {step: {objective: state_dict}}.
    """
    nets = nn.ModuleDict({name: copy.deepcopy(base) for name in METHODS}).requires_grad_()
    average = AveragedModel(nets, multi_avg_fn=common.ema_decay(cfg.ema))
    optimizer = torch.optim.AdamW(nets.parameters(), cfg.tune_lr, fused=device.type != "mps")
    raft.requires_grad_(False)
    saved = common.restore(
        out / "ckpt.pt", "flowloss", cfg, nets=nets, average=average, optimizer=optimizer)
    kept = saved.get("kept", {})
    points = {cfg.iters, *map(int, cfg.points.split(","))}
    log = common.Log(cfg.iters, saved["step"], saved["log"], "fine-tuning")
    for net in nets.values():
        if cfg.compile:
            net.compile()
    batches = common.Batches(clips, cfg.batch, cfg.frames, cfg.seed)

    def inputs(step):
        frames = batches[step - 1]  # they count from 0
        return frames, *draw(cfg.seed, 6, step, frames.transpose(1, 2)), draw_pairs(cfg, step)

    def decode(y):  # stands where a latent model has its VAE
        return y * base.std + base.mean

    loader = common.prefetched(inputs, saved["step"], cfg.iters, device)
    for step, (frames, sigma, n, n_first, pairs) in loader:
        truth = to_float(frames).transpose(1, 2)  # (B, 3, T, H, W)
        y = (truth - base.mean) / base.std
        x = y + like(sigma, y) * n
        first = y[:, :, 0] + AUGMENT * n_first
        optimizer.zero_grad()

        D = denoise(nets["none"], x, sigma, first)
        loss_none = recon_loss(D, y, sigma).mean()
        loss_none.backward()  # at once: one graph at a time

        D = denoise(nets["gated"], x, sigma, first)
        loss_recon = recon_loss(D, y, sigma).mean()
        w = gate(sigma, cfg.psi)
        loss_flow = flow_loss(raft, decode, D, truth, w, sigma, pairs, cfg.scale).mean()
        loss = loss_recon + loss_flow  # L = L_recon + w L_flow
        loss.backward()

        for net in nets.values():
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(nets)

        stop = log.add(step, none=loss_none, gated_recon=loss_recon, gated_flow=loss_flow)
        if step in points:
            weights = copy.deepcopy(average.module)
            kept[step] = {name: net.state_dict() for name, net in weights.items()}
        if step % SAVE_EVERY == 0 or step == cfg.iters or stop:
            common.save_checkpoint(
                out, "flowloss", cfg, log, step=step, kept=kept, raft=raft.state_dict(),
                base=base.state_dict(), nets=nets.state_dict(), average=average.state_dict(),
                optimizer=optimizer.state_dict())
        if stop:
            raise KeyboardInterrupt
    log.close()
    return kept

# ---------------------------------------- sampler

@torch.no_grad()
def sample(denoise, x, sigmas, rng):
    """From x at sigmas[0] to sigmas[-1], with fresh noise at every step: DDPM's, at EDM's levels.

    It mends what earlier steps got wrong, a lot of a small network. denoise(x, sigma (B,)) -> D.
    """
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        D = denoise(x, torch.full((len(x),), now, device=x.device))
        old = then**2 / now  # the level of noise that stays, as DDPM has it
        new = (then**2 - old**2) ** 0.5  # old^2 + new^2 = then^2
        n = torch.randn(x.shape, generator=rng).to(x.device)
        x = D + old * (x - D) / now + new * n
    return x

# ---------------------------------------- evaluate

@torch.no_grad()
def generate(cfg, base, kept, first):
    """Yields (objective, step, videos) of the base model and of all that a fine-tuning kept.

    First frames (N, 3, H, W) in [-1, 1] -> videos uint8 (N, T, 3, H, W), from the same noise.
    """
    plan = [("base", 0, base.state_dict())]
    for step, weights in kept.items():
        for name, objective in METHODS.items():
            plan.append((objective, step, weights[name]))
    net = copy.deepcopy(base).eval()
    if cfg.compile:
        net.compile()
    first = (first - net.mean) / net.std
    sigmas = common.karras_sigmas(cfg.steps, low=0.05)  # noise of 0.05 nobody sees
    for objective, step, weights in plan:
        net.load_state_dict(weights)
        rng = make_rng(cfg.seed, 0, 0)
        made = []
        batches = first.split(cfg.sample_batch)
        for some in tqdm(batches, f"generating, {objective}, {step}", leave=False):
            def denoise_some(x, sigma):
                return denoise(net, x, sigma, some)

            shape = (len(some), 3, len(net.frame), *first.shape[2:])
            x = sigmas[0] * torch.randn(shape, generator=rng).to(first.device)
            made.append(sample(denoise_some, x, sigmas, rng))
        videos = torch.cat(made) * net.std + net.mean  # (N, 3, T, H, W)
        yield objective, step, to_uint8(videos).transpose(1, 2)

@torch.no_grad()
def flow_of(estimate, video):
    """Flow from every frame to the next, of videos uint8 (N, T, 3, H, W): (N, T - 1, 2, H, W)."""
    return torch.stack([estimate(clip[:-1], clip[1:]) for clip in to_float(video)])

def end_point_error(flow, true):
    """(N, T, 2, H, W) twice -> (N, T, H, W), pixels."""
    return (flow - true).square().sum(2).sqrt()

def psnr(a, b):
    """Of videos uint8 (N, T, 3, H, W), every frame against its own, then averaged: (N,)."""
    squared = (a.float() - b.float()).square().mean((2, 3, 4)) / 255**2  # (N, T)
    return -10 * squared.clamp(min=1e-10).log10().mean(1)

def exact_flow(cfg, count):
    """Of held-out procedural clips, (N, T - 1, 2, H, W)."""
    found = []
    for k in range(count):
        rng = common.world_rng(cfg.seed, "test", k)
        clip = common.WORLDS[cfg.dataset](rng, cfg.size, cfg.frames, flow=True)
        found.append(clip["flow"])
    return torch.stack(found)

def flow_picture(flow):
    return flow_to_image(flow[0].cpu())[None]

def mean_where(value, where):
    """A number; None where there is nothing, as in clips that rest."""
    return value[where].mean().item() if where.any() else None

def evaluate(cfg, kept, base, raft, test_clips, source, device):
    """Held-out clips from their first frames: rows, and videos and pictures of the last ones."""
    count = min(cfg.videos, len(test_clips))
    real = torch.stack([test_clips.frames(k, 0, cfg.frames) for k in range(count)]).to(device)
    found = flow_of(raft, real)  # (N, T - 1, 2, H, W)
    exact = source == "procedural" and cfg.dataset != "sky"
    true = exact_flow(cfg, count).to(device) if exact else found
    moving = true.square().sum(2).sqrt() > MOVING  # (N, T - 1, H, W)
    if not moving.any():
        print(f"warning: nothing moves in the held-out clips by {MOVING} px a frame, so there is "
              "no flow error", file=sys.stderr)
    zero = mean_where(end_point_error(0 * true, true), moving)
    floor = mean_where(end_point_error(found, true), moving)
    rows = []
    videos = {"real": real.cpu()}
    pictures = {"real": videos["real"], "flow of real": flow_picture(true)}
    for objective, step, made in generate(cfg, base, kept, to_float(real[:, 0])):
        flow = flow_of(raft, made)
        error = end_point_error(flow, true)
        rows.append(dict(
            objective=objective, step=step, psi=cfg.psi, scale=cfg.scale, seed=cfg.seed,
            epe_moving=mean_where(error, moving), epe_background=mean_where(error, ~moving),
            epe_zero=zero, epe_floor=floor if exact else None,
            psnr=psnr(made, real).mean().item(), videos=count,
        ))
        videos[objective] = made.cpu()
        pictures[objective] = videos[objective]
        pictures[f"flow of {objective}"] = flow_picture(flow)
    return rows, videos, pictures

COLUMNS = {
    "objective": ("objective", ""), "step": ("step", "d"),
    "epe_moving": ("flow error, px", ".3f"), "epe_background": ("of background", ".3f"),
    "epe_zero": ("of zero flow", ".3f"), "epe_floor": ("of real clips", ".3f"),
    "psnr": ("PSNR", ".2f"),
}

# ---------------------------------------- your own picture

def move_picture(cfg, device):
    """--first: one gif of what base, reconstruction and + flow make of a picture."""
    folder = common.find_run("flowloss", cfg.dataset, cfg.out_dir)
    if folder is None and (cfg.out_dir or cfg.dataset != "robot"):
        raise Fault(f"--first: there is no run on {cfg.dataset} in {cfg.out_dir or 'out/'}; "
                    "fine-tune one, or leave --out_dir and --dataset out for the shipped networks")
    path = folder / "ckpt.pt" if folder else SHIPPED
    _, base, saved = load_model(path, device, cfg.amp, tuned=True)
    made = saved["config"]
    kept = {made["iters"]: saved["kept"][made["iters"]]}
    print(f"{path}: {made['dataset']}, {made['iters']} steps of fine-tuning")
    picture = common.read_picture(cfg.first, made["size"])
    first = to_float(picture)[None].to(device)  # (1, 3, H, W)
    videos = {name: video for name, _, video in generate(cfg, base, kept, first)}
    gif = Path(folder or "out") / "flowloss-first.gif"
    common.save_gif(gif, videos, width=192, ms=120)
    print(f"wrote {gif}")

# ---------------------------------------- main

def main():
    began = time.time()
    cfg = common.parse_args("flowloss", Config, PRESETS, __doc__)
    trains = cfg.train and not cfg.eval_only
    if len([flag for flag in (cfg.first, cfg.train, cfg.model) if flag]) > 1:
        raise Fault("--train makes a model, --model loads one, --first has its own: one alone")
    device = common.pick_device(cfg.device)
    if cfg.first:
        return move_picture(cfg, device)
    path = Path(cfg.out_dir, "ckpt.pt")  # of a run that goes on
    if not cfg.eval_only and not (cfg.resume and path.exists()):
        path = Path(cfg.model or SHIPPED).expanduser()
    raft, base, saved = load_model(path, device, cfg.amp, tuned=cfg.eval_only)
    if not trains:
        for name in ("size", "frames", "width"):
            setattr(cfg, name, saved["config"][name])
        print(f"flow estimator and base model: {path}, {cfg.frames} frames of {cfg.size} pixels")
    common.check_list(cfg, "points", int, 1, 10**8)
    if cfg.size % 8:
        raise Fault(f"--size {cfg.size}: must be a multiple of 8")
    if cfg.pairs >= cfg.frames:
        raise Fault(f"--pairs {cfg.pairs}: a clip of {cfg.frames} frames has {cfg.frames - 1}")
    common.check_folder("flowloss", cfg, common.source_of(cfg))
    train_clips, test_clips, source = common.load_clips(
        cfg.dataset, cfg.data_dir, cfg.size, (cfg.clips, 96), cfg.frames, cfg.seed,
        min_frames=cfg.frames)
    out = common.open_run("flowloss", cfg, train_clips, test_clips)
    print(f"preset {cfg.preset} on {device}, {len(train_clips)} + {len(test_clips)} {source} clips")

    if trains:
        base = train_base(cfg, raft, out, device)
    if cfg.eval_only:
        kept = saved["kept"]
    else:
        kept = finetune(cfg, base, raft, train_clips, out, device)
    rows, videos, pictures = evaluate(cfg, kept, base, raft, test_clips, source, device)
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)])
    common.write_results(out, "flowloss", cfg, device, dataset, rows, began, iters=cfg.iters)
    common.save_sheet(out / "sheet.png", pictures, left=130)
    common.save_gif(out / "samples.gif", videos, width=128, ms=120)
    print(f"\n{rows[0]['videos']} held-out clips, {cfg.steps} steps of the sampler")
    print(common.table(rows, COLUMNS))
    print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} in {out}/")
    print(f"{time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
