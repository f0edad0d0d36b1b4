"""MotionPrompt (Nam, Kim, Lee and Ye, CVPR 2025), https://arxiv.org/abs/2411.15540

A prompt acts on all frames at once. MotionPrompt appends a few tokens to it and moves their embeddings while sampling,
so that the optical flow between frames of the clean estimate looks like real video's to a discriminator. No weight
changes, and neither does the prompt itself. Its steps (the paper's equation numbers are unknown to us):

    append     T = (embeddings of n tokens), T0 = those of words of quality; c(T) = text encoder of (prompt, T)
    Tweedie    x_{0|t} = D(x; sigma, c(T))                                      the clean estimate
    flow       f = RAFT(decode(x_{0|t})_i, decode(x_{0|t})_j)                   of random pairs of frames, two decoded
    loss       l = lambda1 log(1 - phi(f)) + lambda2 TV(f) + lambda3 || T - T0 ||^2        phi: chance of being real
    optimise   T <- Adam(dl / dT), K times; then a step of the sampler with c(T); the next step goes on from T
    half-way   the second half of the steps has the plain prompt, which keeps the appearance

    python motionprompt.py                                   # two CPU cores: about 14 minutes; a GPU: `small`
    python motionprompt.py --eval_only --methods all         # the same models, all controls and ablations

trains a text-to-video EDM model on captioned clips, a tiny RAFT, and the discriminator on flows of steady clips against
flows of what the model generates; samples the same prompts and noise with and without MotionPrompt, prints what became
of the motion, and writes out/motionprompt-sprites-procedural/.
"""
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.utils import flow_to_image
from tqdm import tqdm

import common
from common import Fault, averaged, descend, make_rng, edm_denoise, edm_weight, encode, karras_sigmas, like, normalise, opt
from common import plain, to_float, to_uint8, warm_decay

@dataclass
class Config:
    dataset: str = opt("sprites", "sprites, or a folder of your captioned clips in --data_dir")
    data_dir: str = opt("", "real clips: DATA_DIR/DATASET/{train,test}/; empty: data, else a procedural world", free=True)
    preset: str = opt("auto", "tiny (two CPU cores), small (one GPU), paper (16 frames, larger); auto: by device")
    iters: int = opt(4000, "training steps of the text-to-video model", 0, 10**8)
    raft_iters: int = opt(1200, "steps of the tiny RAFT", 0, 10**8)
    disc_iters: int = opt(600, "steps of the discriminator", 0, 10**8)
    batch: int = opt(16, "clips in a batch", 1, 65536)
    size: int = opt(16, "height and width of a frame, pixels; a multiple of 4", 8, 1024)
    frames: int = opt(8, "frames of a clip", 4, 256)
    seed: int = opt(0, "of weights, data order, noise and prompts", 0, 2**31)
    device: str = opt("auto", "auto, cpu, cuda, mps", free=True)
    out_dir: str = opt("", "folder to write; empty: out/motionprompt-DATASET[-procedural]", free=True)
    resume: bool = opt(False, "continue the run in the output folder, bit for bit on CPU", free=True)
    eval_only: bool = opt(False, "skip training, sample with the models in the output folder", free=True)
    compile: bool = opt(False, "torch.compile the video network", free=True)
    amp: bool = opt(False, "bfloat16 autocast inside the video network")
    methods: str = opt("base,words,motionprompt,random,latent", "what to sample with, of METHODS; or all", free=True)
    tokens: str = opt("steady,steady", "words whose embeddings the appended tokens start from; n of them", free=True)
    K: int = opt(4, "optimisation steps at every guided step of the sampler", 0, 10**4, free=True)
    lr: float = opt(0.05, "of Adam, for the tokens", 0, 100, free=True)
    lambda1: float = opt(1.0, "weight of the discriminator's log(1 - phi)", 0, 10**6, free=True)
    lambda2: float = opt(0.1, "weight of the flow's total variation, per pixel of flow", 0, 10**6, free=True)
    lambda3: float = opt(0.01, "weight of the distance of the tokens from where they started", 0, 10**6, free=True)
    guided: str = opt("", "steps with tokens, counted from 0: numbers and ranges; empty: the first half, as the paper", free=True)
    pairs: int = opt(2, "random pairs of frames at every optimisation step", 1, 256, free=True)
    gap: int = opt(3, "frames between the two of a pair, at most", 1, 255)
    keep: bool = opt(True, "tokens go on from one step of the sampler to the next; --no-keep: from T0 at each", free=True)
    inner_rho: float = opt(0.0, "guidance by the prompt inside the optimisation; 0: conditional only", 0, 100, free=True)
    vit: str = opt("tiny", "of the discriminator: ours, or torchvision's, pretrained", choices=("tiny", "vit_b_16"))
    latent_eta: float = opt(0.05, "size of a step on the latent, a share of sigma, for the method `latent`", 0, 100, free=True)
    steps: int = opt(16, "steps of the Euler sampler", 2, 10000)
    rho: float = opt(1.0, "guidance by the prompt, D_P + rho (D_P - D_0)", 0, 100)
    width: int = opt(128, "channels of the transformer; the convolutions around it have a third", 32, 4096)
    layers: int = opt(3, "layers of the transformer", 1, 100)
    train_lr: float = opt(1.5e-3, "AdamW's learning rate for the models; the last 40 % decay to 0", 0, 1)
    ema: float = opt(0.995, "decay of the weight average that is sampled from; 0: the last weights", 0, 0.999999)
    drop: float = opt(0.1, "share of captions left out while training, for D_0", 0, 1)
    clips: int = opt(8000, "training clips of a procedural world", 2, 10**6)
    fakes: int = opt(256, "clips to generate for the discriminator", 4, 10**6)
    prompts: int = opt(128, "prompts to sample", 2, 10**5, free=True)

PRESETS = {
    "tiny": {},
    "small": dict(iters=8000, raft_iters=3000, disc_iters=1500, batch=64, size=32, frames=16, width=384, layers=8,
                  train_lr=5e-4, ema=0.999, clips=40000, fakes=2000, prompts=256, steps=30, gap=6, amp=True),
    "paper": dict(iters=100000, raft_iters=20000, disc_iters=20000, batch=64, size=64, frames=16, width=768, layers=12,
                  train_lr=2e-4, ema=0.9995, clips=100000, fakes=5000, prompts=800, steps=50, gap=15, amp=True),
}
FREE = 3  # places for tokens behind the longest caption

# Notation. B, C, T, H, W: batch, channels, frames, height, width. x: noisy video at noise level sigma (B,), data of
# variance 1; D: the clean estimate. Prompt (B, L, d), tokens (B, n, d): embeddings of words. Flow (N, 2, H, W), pixels.

# ----------------------------------------------------------------------------------------------- THE METHOD
def total_variation(flow):
    """TV of flow (N, 2, H, W), pixels: mean over pixels of its differences to the right and downwards, (N,).
    Paper silent: we use absolute differences, each axis for itself, as the usual TV of images."""
    right, down = flow.diff(dim=3).abs().flatten(1), flow.diff(dim=2).abs().flatten(1)
    return right.mean(1) + down.mean(1)

def motion_loss(logit, flow, tokens, start, weights):
    """l = lambda1 log(1 - phi(f)) + lambda2 TV(f) + lambda3 || T - T0 ||^2 of every video, (B,).

    logit (B K,), flow (B K, 2, H, W): K pairs of frames each, phi = sigmoid(logit); tokens, start (B, n, d).
    """
    B = len(tokens)
    fooled = F.logsigmoid(-logit).view(B, -1).mean(1)  # log(1 - phi), stable where phi is near 1
    away = (tokens - start).square().flatten(1).sum(1)
    return weights[0] * fooled + weights[1] * total_variation(flow).view(B, -1).mean(1) + weights[2] * away

def random_pairs(batch, frames, count, gap, g):
    """Pairs i < j of frames at most `gap` apart, uniform over all there are: (B, K) twice."""
    i, j = torch.triu_indices(frames, frames, 1)
    near = j - i <= gap
    pick = torch.randint(int(near.sum()), (batch, count), generator=g)
    return i[near][pick], j[near][pick]

def flow_of_pairs(D, i, j, decode, estimate):
    """Flow from frame i to frame j of clean estimates D (B, C, T, H, W), i, j (B, K): (B K, 2, H, W).

    decode((B K, C, 2, H, W)) -> video in [-1, 1]: the two frames of every pair and no more.
    """
    rows = torch.arange(len(D), device=D.device)[:, None]
    two = torch.stack([D.transpose(1, 2)[rows, k.to(D.device)] for k in (i, j)], 3).flatten(0, 1)  # (B K, C, 2, H, W)
    return estimate(*decode(two).unbind(2))

def euler(denoise, x, sigmas, text_at):
    """Euler's steps from x at sigmas[0] to sigmas[-1]; text_at(step, x, sigma (B,)) -> c for denoise(x, sigma, c)."""
    for step, (now, then) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        sigma = x.new_full((len(x),), now)
        c = text_at(step, x, sigma)
        with torch.no_grad():
            x = x + (then - now) * ((x - denoise(x, sigma, c)) / now)  # EDM Eq. 3
    return x

def motionprompt(denoise, encode, prompt, start, x, sigmas, decode, estimate, discriminate, guided, K, lr, weights,
                 pairs, keep=True, inner=None, watch=None):
    """Euler sampling with tokens optimised in the steps `guided`, and the plain prompt in the others: x at sigmas[-1].

    denoise(x, sigma (B,), c) -> D; encode(prompt (B, L, d), tokens (B, n, d) or None) -> c; start: T0; x at sigmas[0],
    (B, C, T, H, W); decode, estimate as in flow_of_pairs; discriminate(flow) -> logit of being real (N,); pairs(B) ->
    i, j (B, K). keep: tokens go on from step to step, else every step starts from T0. inner: the denoiser inside the
    optimisation, if another one. watch(step, tokens) sees the tokens. Gradients reach the tokens alone if no weight
    requires one.
    """
    T = start
    def text_at(step, x, sigma):
        nonlocal T
        if step not in guided or not K: return encode(prompt, None)
        T = (T if keep else start).detach().clone().requires_grad_()
        adam = torch.optim.Adam([T], lr)  # afresh at every step, as in the lab's earlier code; paper silent
        for _ in range(K):
            with torch.enable_grad():
                D = (inner or denoise)(x, sigma, encode(prompt, T))  # Tweedie
                flow = flow_of_pairs(D, *pairs(len(x)), decode, estimate)
                loss = motion_loss(discriminate(flow), flow, T, start, weights)
                T.grad, = torch.autograd.grad(loss.sum(), T)
            adam.step()
        T = T.detach()
        if watch: watch(step, T)
        return encode(prompt, T)
    return euler(denoise, x, sigmas, text_at)

def latent_guidance(denoise, c, x, sigmas, decode, estimate, discriminate, guided, K, eta, weights, pairs, inner=None):
    """What the paper argues against: the same loss, but steps on the latent x itself, K times of size eta sigma.

    As in motionprompt; a step has the root mean square eta sigma in every video. The gradient goes through all frames.
    """
    for step, (now, then) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        sigma, none = x.new_full((len(x),), now), x.new_zeros(len(x), 1, 1)  # no tokens
        for _ in range(K if step in guided else 0):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                flow = flow_of_pairs((inner or denoise)(x, sigma, c), *pairs(len(x)), decode, estimate)
                g, = torch.autograd.grad(motion_loss(discriminate(flow), flow, none, none, weights).sum(), x)
            rms = g.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)
            x = x.detach() - eta * now * g / like(rms, g)
        x = euler(denoise, x, sigmas[step:step + 2], lambda *_: c)
    return x

def prompted(denoise, null, rho):
    """D_P + rho (D_P - D_0), both in one batch: denoise(x, sigma, c) with c (B, L, d); null (1, L, d): no prompt."""
    def guided(x, sigma, c):
        if not rho: return denoise(x, sigma, c)
        D_P, D_0 = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([c, null.expand_as(c)])).chunk(2)
        return D_P + rho * (D_P - D_0)
    return guided

# ----------------------------------------------------------------------------------------------- tiny RAFT
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

    image1, image2 (N, 3, H, W) in [-1, 1], H and W even, 24 px and up -> flow (N, 2, H, W) in
    pixels; every=True: of every update. Images above 48 px are made smaller by powers of two
    first, and their flow larger after.

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
        size = image1.shape[-2:]
        halvings = max(0, math.ceil(math.log2(max(size) / 48)))  # all pairs cost size^4
        shrink = math.gcd(2**halvings, size[0] // 2, size[1] // 2)  # what is left must be even
        image1 = F.avg_pool2d(image1, shrink)
        image2 = F.avg_pool2d(image2, shrink)

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
                flows.append(shrink * F.interpolate(fine, size, mode="bilinear"))
        return flows if every else flows[-1]

# ----------------------------------------------------------------------------------------------- networks
layer_of = lambda d, wide: nn.TransformerEncoderLayer(d, d // 32, wide * d, 0.0, batch_first=True, norm_first=True)
conv = partial(nn.Conv3d, kernel_size=(1, 3, 3), padding=(0, 1, 1))  # over space, frame by frame

class Convolutions(nn.Module):
    """Residual block over space, then time, scaled and shifted by the embedding of sigma and text."""
    def __init__(self, cin, cout, emb):
        super().__init__()
        norm = lambda c: nn.GroupNorm(math.gcd(8, c), c)
        self.norm1, self.conv1, self.norm2, self.conv2 = norm(cin), conv(cin, cout), norm(cout), conv(cout, cout)
        self.norm3, self.time = norm(cout), nn.Conv3d(cout, cout, (3, 1, 1), padding=(1, 0, 0))
        self.emb, self.skip = nn.Linear(emb, 2 * cout), nn.Conv3d(cin, cout, 1)
    def forward(self, x, emb):  # (B, C, T, H, W)
        scale, shift = self.emb(emb)[..., None, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        x = self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return x + self.time(F.silu(self.norm3(x)))

class Attention(nn.Module):
    """Transformer block over words and places of all frames together, with adaptive layer norm."""
    def __init__(self, d):
        super().__init__()
        self.norm, self.emb = nn.LayerNorm(d, elementwise_affine=False), nn.Linear(d, 6 * d)
        self.attend = nn.MultiheadAttention(d, d // 32, batch_first=True)
        self.wide, self.back = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        for p in self.emb.parameters(): nn.init.zeros_(p)
    def forward(self, x, emb):  # (B, N, d)
        scale1, shift1, gate1, scale2, shift2, gate2 = self.emb(emb)[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attend(h, h, h, need_weights=False)[0]
        return x + gate2 * self.back(F.gelu(self.wide(self.norm(x) * (1 + scale2) + shift2)))

class TextEncoder(nn.Module):
    """Words (B, L) -> embeddings; embeddings, and tokens in place of the last ones -> c (B, L, d), by a transformer."""
    def __init__(self, vocabulary, length, d):
        super().__init__()
        self.words, self.order = nn.Embedding(vocabulary, d), nn.Parameter(torch.randn(length, d))
        self.layer = layer_of(d, 2)
    def forward(self, prompt, tokens=None):  # prompt (B, L, d) = self.words(...); tokens (B, n, d) take the last places
        if tokens is not None:
            prompt = torch.cat([prompt[:, :prompt.shape[1] - tokens.shape[1]], tokens], 1)
        return self.layer(prompt + self.order)

class VideoNet(nn.Module):
    """F(x (B, 3, T, H, W), c_noise (B,), c (B, L, d)) -> like x: convolutions at half size, a transformer at a quarter.
    'left' means another place in every frame: the embedding of place and frame is multiplied by the text."""
    def __init__(self, length, size, frames, d, layers, amp=False):
        super().__init__()
        ch, self.d, self.length, self.amp = max(8, d // 24 * 8), d, length, amp
        self.place, self.gain = nn.Parameter(torch.randn(frames, (size // 4) ** 2, d)), nn.Linear(d, d)
        self.clock = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.sentence = nn.Sequential(nn.Linear(length * d, d), nn.SiLU(), nn.Linear(d, d))
        self.inp, self.one = conv(12, ch), Convolutions(ch, ch, d)
        self.down, self.up = nn.Conv3d(ch, d, (1, 2, 2), (1, 2, 2)), nn.ConvTranspose3d(d, ch, (1, 2, 2), (1, 2, 2))
        self.blocks, self.two = nn.ModuleList(Attention(d) for _ in range(layers)), Convolutions(2 * ch, ch, d)
        self.out = nn.Sequential(nn.GroupNorm(math.gcd(8, ch), ch), nn.SiLU(), conv(ch, 12))
        for p in self.out[-1].parameters(): nn.init.zeros_(p)
    def forward(self, x, c_noise, c):
        fold = lambda f, v: f(v.transpose(1, 2), 2).transpose(1, 2)  # over space, frame by frame
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            w = torch.exp(torch.linspace(0, math.log(200), self.d // 2, device=x.device)) * c_noise[:, None]
            said = self.sentence(c.flatten(1))
            emb = F.silu(self.clock(torch.cat([w.sin(), w.cos()], 1)) + said)  # (B, d)
            fine = self.one(self.inp(fold(F.pixel_unshuffle, x)), emb)  # (B, ch, T, H/2, W/2)
            coarse = self.down(fine)  # (B, d, T, H/4, W/4)
            h = coarse.flatten(3).permute(0, 2, 3, 1) + self.place * self.gain(F.silu(said))[:, None, None]
            h = torch.cat([c, h.flatten(1, 2)], 1)  # (B, L + T H W / 16, d)
            for block in self.blocks:
                h = block(h, emb)
            h = self.up(h[:, self.length:].transpose(1, 2).reshape(coarse.shape))  # (B, ch, T, H/2, W/2)
            return fold(F.pixel_shuffle, self.out(self.two(torch.cat([h, fine], 1), emb))).float()

class Discriminator(nn.Module):
    """Flow (N, 2, H, W) in pixels -> logit of being real (N,): a small ViT, or `large`, and a 3-layer MLP."""
    def __init__(self, size, large=None, d=64, patch=4):
        super().__init__()
        self.size, self.large, wide = size, large, 1000 if large else d
        self.inp, self.place = nn.Conv2d(2, d, patch, patch), nn.Parameter(0.02 * torch.randn((size // patch) ** 2, d))
        self.vit = nn.Sequential(layer_of(d, 2), layer_of(d, 2))
        self.head = nn.Sequential(nn.Linear(wide, d), nn.GELU(), nn.Linear(d, d), nn.GELU(), nn.Linear(d, 1))
    def forward(self, flow):
        flow = flow * (10 / self.size)  # in tenths of the frame
        if self.large:  # takes u, v and 0 as an image of 224 px
            h = self.large(F.interpolate(F.pad(flow, (0, 0, 0, 0, 0, 1)), 224, mode="bilinear"))
        else:
            h = self.vit(self.inp(flow).flatten(2).transpose(1, 2) + self.place).mean(1)
        return self.head(h).squeeze(1)

# ----------------------------------------------------------------------------------------------- train
def estimator(raft, size, updates=2):
    """estimate(image1, image2) -> flow, of images smaller than the tiny RAFT takes too; the gradient is not cut."""
    k = math.ceil(24 / size)
    enlarge = lambda v: F.interpolate(v, scale_factor=k, mode="bilinear") if k > 1 else v
    return lambda a, b: F.avg_pool2d(raft(enlarge(a), enlarge(b), updates), k) / k

def flow_pairs(cfg, step, count):
    """Image pairs with exact flow: image1, image2 uint8 (N, 3, H, W), flow (N, 2, H, W), from two worlds."""
    def pair(rng):
        gap = int(rng.integers(1, cfg.gap + 1))
        clip = common.shapes(rng, cfg.size, 2, flow=True, speed=0.5 * gap) if rng.uniform() < 0.4 else \
            common.sprites(rng, cfg.size, max(4, (cfg.frames - 1) // gap + 1), flow=True, steady=1.0)
        t = rng.integers(len(clip["flow"]))
        return clip["video"][t], clip["video"][t + 1], clip["flow"][t]
    return [torch.stack(x) for x in zip(*(pair(np.random.default_rng([cfg.seed, 5, step, k])) for k in range(count)))]

def train_raft(cfg, stage, device):
    """Tiny RAFT on procedural pairs of steady motion, some with noise."""
    torch.manual_seed(cfg.seed + 1)
    raft = TinyRAFT().to(device)
    optimiser, grow = torch.optim.AdamW(raft.parameters(), 2e-3), math.ceil(24 / cfg.size)
    def step(k, pairs):
        a, b, true = (x.to(device) for x in pairs)
        g = make_rng(cfg.seed, 5, k)
        noise = 0.2 * torch.rand(1, generator=g) * (torch.rand(1, generator=g) < 0.5)
        a, b = (to_float(x) + (noise * torch.randn(x.shape, generator=g)).to(device) for x in (a, b))
        a, b = (F.interpolate(x, scale_factor=grow, mode="bilinear") if grow > 1 else x for x in (a, b))
        true = grow * F.interpolate(true, scale_factor=grow)
        weight = 1 + 4 * (true.square().sum(1) > 0.01)  # (N, H, W)
        flows = raft(a, b, updates=4, detach=True, every=True)
        loss = sum(0.8 ** (3 - n) * (weight * (f - true).abs().sum(1)).mean() for n, f in enumerate(flows))
        descend(loss, raft, optimiser, warm_decay(k, cfg.raft_iters))
        return dict(raft=loss)
    stage("raft", cfg.raft_iters, dict(raft=raft, optimiser=optimiser), partial(flow_pairs, cfg, count=16), step)
    return raft.eval().requires_grad_(False)

def train_video(cfg, stage, net, average, clips, text, moments, device):
    """The text encoder and the text-to-video denoiser, on `clips` with captions `text` (N, L)."""
    optimiser = torch.optim.AdamW([  # words at a tenth, else what they mean moves on faster than it is learned
        dict(params=net["video"].parameters()), dict(params=net["text"].parameters(), lr=0.1 * cfg.train_lr)],
        cfg.train_lr, betas=(0.9, 0.98))
    batches = common.Batches(clips, cfg.batch, cfg.frames, cfg.seed)
    def step(k, batch):
        g = make_rng(cfg.seed, 1, k)
        y = normalise(batch.to(device), moments)
        t, near = torch.rand(2, cfg.batch, generator=g)
        t = torch.where(near < 0.4, 0.85 + 0.15 * t, t).clamp(0.01, 0.99)  # motion is decided at high noise
        sigma = (t / (1 - t)).to(device)
        n, keep = torch.randn(y.shape, generator=g).to(device), torch.rand(cfg.batch, 1, generator=g) >= cfg.drop
        words = spread(text[batches.where(k)[0]], g) * keep
        D = denoiser(net)(y + like(sigma, y) * n, sigma, net["text"](net["text"].words(words.to(device))))
        loss = (edm_weight(sigma) * (D - y).square().flatten(1).mean(1)).mean()
        descend(loss, net, optimiser, warm_decay(k, cfg.iters), average)
        return dict(video=loss)
    stage("video", cfg.iters, dict(net=net, average=average, optimiser=optimiser), batches.__getitem__, step)

def spread(text, g):
    """The last word of the longest captions, in `sprites` the word of quality, moves to a random place from its own to
    the last, so that tokens there mean something: (B, L) -> (B, L)."""
    own = text.shape[1] - FREE - 1
    place = own + torch.randint(FREE + 1, (len(text), 1), generator=g)
    return text.clone().index_fill_(1, torch.arange(own, text.shape[1]), 0).scatter(1, place, text[:, own:own + 1])

def denoiser(net):
    """denoise(x, sigma, c) -> D(x; sigma, c) of the trained network."""
    return lambda x, sigma, c: edm_denoise(lambda z, c_noise: net["video"](z, c_noise, c), x, sigma)

def train_discriminator(cfg, stage, real, fake, estimate, device):
    """The discriminator on flows of real (N, T, 3, H, W) against generated clips: the usual GAN loss, but no generator
    is trained. The flow of both comes from the same estimator and the same law of pairs."""
    torch.manual_seed(cfg.seed + 2)
    large = cfg.vit == "vit_b_16" and common.pretrained(torchvision.models.vit_b_16, "--vit vit_b_16", "--vit tiny")
    net = Discriminator(cfg.size, large).to(device)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-5 if large else 1e-3, weight_decay=0.05)
    clips = real.to(device), fake.to(device)
    def step(k, _):
        g, logits = make_rng(cfg.seed, 6, k), []
        for kind in clips:
            video = to_float(kind[torch.randint(len(kind), (32,), generator=g)]).transpose(1, 2)
            with torch.no_grad():
                flow = flow_of_pairs(video, *random_pairs(32, cfg.frames, 1, cfg.gap, g), lambda v: v, estimate)
            logits.append(net(flow))
        loss = -(F.logsigmoid(logits[0]).mean() + F.logsigmoid(-logits[1]).mean()) / 2
        descend(loss, net, optimiser, warm_decay(k, cfg.disc_iters))
        return dict(disc=loss)
    stage("disc", cfg.disc_iters, dict(disc=net, optimiser=optimiser), None, step)
    return net.eval().requires_grad_(False)

@torch.no_grad()
def scores(cfg, disc, clips, estimate, device, rounds=4):
    """phi of every clip, over a few pairs each, (N, rounds). clips uint8 (N, T, 3, H, W)."""
    video, g = to_float(clips).transpose(1, 2).to(device), make_rng(cfg.seed, 7, 0)
    flow = flow_of_pairs(video, *random_pairs(len(video), cfg.frames, rounds, cfg.gap, g), lambda v: v, estimate)
    return disc(flow).sigmoid().view(len(video), rounds).cpu()

# ----------------------------------------------------------------------------------------------- evaluate
METHODS = ("base", "words", "motionprompt", "random", "tv_only", "disc_only", "no_penalty", "latent")

def evaluate(cfg, net, estimate, disc, prompts, vocabulary, noise, sigmas, moments, device):
    """Sample the same prompts and noise with every method: rows, videos."""
    text, denoise = net["text"], denoiser(net)
    decode, guided = lambda v: v * moments[1] + moments[0], common.guided_steps(cfg)
    rows, videos, moved, length = [], {}, {}, net["video"].length
    null = text(text.words(torch.zeros(1, length).long().to(device)))
    sampler, inner = (prompted(denoise, null, rho) for rho in (cfg.rho, cfg.inner_rho))
    said = text.words(encode(prompts, vocabulary, length).to(device))  # (N, L, d)
    names = cfg.tokens.split(",")
    first = text.words(torch.tensor([[vocabulary.index(w) + 1 for w in names]]).to(device))  # (1, n, d)
    weights = (cfg.lambda1, cfg.lambda2, cfg.lambda3)
    kinds = {"motionprompt": weights, "tv_only": (0, *weights[1:]), "disc_only": (weights[0], 0, weights[2]),
             "no_penalty": (*weights[:2], 0)}
    for name in cfg.methods.split(","):
        g, parts, began = make_rng(cfg.seed, 8, 0), [], time.perf_counter()
        pairs = lambda n: random_pairs(n, cfg.frames, cfg.pairs, cfg.gap, g)
        if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
        for a in tqdm(range(0, len(noise), 32), f"sampling {name}", leave=False):
            x, prompt = sigmas[0] * noise[a:a + 32].to(device), said[a:a + 32]
            start, tools = first.expand(len(x), -1, -1), (decode, estimate, disc, guided, cfg.K)
            def control(step, x, sigma):  # words: far is 0; random: as far as MotionPrompt's T from T0 at this step
                if step not in guided or name == "base": return text(prompt)
                away = torch.randn(start.shape, generator=g).to(start) * (name == "random")
                far = moved.get((a, step), start.new_zeros(len(x))) / away.flatten(1).norm(dim=1).clamp(min=1e-12)
                return text(prompt, start + like(far, away) * away)
            watch = lambda step, T: moved.setdefault((a, step), (T - start).flatten(1).norm(dim=1))
            if name in kinds:
                x = motionprompt(sampler, text, prompt, start, x, sigmas, *tools, cfg.lr, kinds[name], pairs, cfg.keep,
                                 inner, watch if name == "motionprompt" else None)
            elif name == "latent":
                x = latent_guidance(sampler, text(prompt), x, sigmas, *tools, cfg.latent_eta, weights, pairs, inner)
            else:
                x = euler(sampler, x, sigmas, control)
            parts.append(x.cpu())
        z = torch.cat(parts)
        videos[name] = to_uint8(decode(z)).transpose(1, 2)
        cost = 2 if cfg.inner_rho else 1  # forward and backward; without guidance by the prompt half of each
        inner_steps = cfg.K * len(guided) * (name in kinds or name == "latent")
        rows.append(dict(method=name, n=len(names), K=cfg.K, lr=cfg.lr, evaluations=cfg.steps + cost * inner_steps,
                         peak_mb=torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
                         s_per_video=(time.perf_counter() - began) / len(noise), seed=cfg.seed,
                         motion_smoothness=common.smoothness(videos[name]).mean().item(),
                         disc_score=scores(cfg, disc, videos[name], estimate, device).mean().item()))
    plain_s = next((r["s_per_video"] for r in rows if r["method"] == "base"), None)
    for row in rows: row["cost_ratio"] = plain_s and row["s_per_video"] / plain_s
    return rows, videos

def pictures(cfg, out, videos, estimate, log, device):
    """samples.gif, sheet.png (with the flow of MotionPrompt and base, colour wheels) and curves.png (losses)."""
    pages = [common.sheet([(k, v[:8, a]) for k, v in videos.items()], [f"frame {a}"], scale=max(1, 64 // cfg.size))
             for a in range(cfg.frames)]
    common.save_pages(out / "samples.gif", pages, ms=150)
    wheel = lambda v: flow_to_image(estimate(to_float(v[:-1]).to(device), to_float(v[1:]).to(device)).cpu())
    lines = [line for n in range(min(4, cfg.prompts)) for k in ("base", "motionprompt") if k in videos for line in (
        (f"{k}\nprompt {n}", videos[k][n, :-1]), ("  its flow", wheel(videos[k][n])))] or [("real", videos["real"][0])]
    page = common.sheet(lines, [f"frame {a}" for a in range(cfg.frames - 1)], scale=max(1, 64 // cfg.size))
    common.save_page(out / "sheet.png", page)
    series = {k: [(r["step"], r[k]) for r in log if r[k] != ""] for k in ("raft", "video", "disc")}
    common.save_curves(out / "curves.png", [dict(title=f"loss: {k}", x="step", y="", lines={k: tuple(zip(*v))})
                                            for k, v in series.items() if v])

COLUMNS = {"method": ("method", ""), "coherent": ("coherent", ".3f"), "coherent_ci": ("- base, 95 %", ""),
           "coherent_ci_words": ("- words, 95 %", ""), "coherent_ci_random": ("- random, 95 %", ""),
           "subject_consistency": ("subject", ".4f"), "background_consistency": ("backgr.", ".4f"),
           "flicker": ("flicker", ".2f"), "motion_smoothness": ("smooth", ".4f"), "dynamic_degree": ("speed", ".3f"),
           "prompt_acc": ("prompt", ".3f"), "disc_score": ("phi", ".3f"), "evaluations": ("evals", ".0f"),
           "cost_ratio": ("time", ".2f"), "peak_mb": ("MB", ".0f")}
def check(cfg):
    """What single values cannot tell. Raises Fault."""
    cfg.methods = ",".join(METHODS) if cfg.methods == "all" else cfg.methods
    cfg.guided = cfg.guided or f"0-{cfg.steps // 2 - 1}"
    common.guided_steps(cfg)
    common.check_names(cfg, "methods", METHODS)
    if cfg.size % 4 or cfg.width % 32: raise Fault(f"--size {cfg.size}: a multiple of 4, --width {cfg.width} of 32")
    if cfg.tokens.count(",") >= FREE: raise Fault(f"--tokens {cfg.tokens}: at most {FREE} words")
    if cfg.gap >= cfg.frames: raise Fault(f"--gap {cfg.gap}: must be below --frames {cfg.frames}")
    if "random" in cfg.methods and "motionprompt" not in cfg.methods.split("random")[0]:
        raise Fault(f"--methods {cfg.methods}: random goes as far as motionprompt did; name that one before it")

def main():
    began, cfg = time.time(), common.parse_args("motionprompt", Config, PRESETS, __doc__)
    check(cfg)
    device = common.pick_device(cfg.device)
    cfg.device = str(device)
    train_clips, test_clips, captions, test_captions, words, longest, source = common.load_captioned(cfg)
    length = longest + FREE
    if len(train_clips) < 4: raise Fault(f"{len(train_clips)} training clips: the discriminator needs 4 at least")
    for w in set(cfg.tokens.split(",")) - set(words):
        raise Fault(f"--tokens {cfg.tokens}: {w!r} is in no caption; choose from {', '.join(words)}")
    out = common.open_run("motionprompt", cfg, train_clips, test_clips)
    saved = common.load_stages(out / "ckpt.pt", "motionprompt", cfg, ("disc", cfg.disc_iters))
    if saved.setdefault("words", words) != words:
        raise Fault(f"{out / 'ckpt.pt'} was trained on other captions than those in --data_dir; use another --out_dir")
    moments = common.moments(train_clips)
    torch.manual_seed(cfg.seed)
    shape = length, cfg.size, cfg.frames, cfg.width, cfg.layers, cfg.amp
    net = nn.ModuleDict(dict(text=TextEncoder(len(words) + 1, length, cfg.width), video=VideoNet(*shape))).to(device)
    average = averaged(net, cfg.ema)
    print(f"{cfg.preset} preset on {device}, {len(train_clips)} + {len(test_clips)} captioned clips ({source}), "
          f"{sum(p.numel() for p in net.parameters()):,} parameters")
    if cfg.compile: [module["video"].compile() for module in (net, average.module)]
    stage = partial(common.stage, "motionprompt", cfg, out, saved, train_clips, ["raft", "video", "disc"])
    estimate = estimator(train_raft(cfg, stage, device), cfg.size)
    train_video(cfg, stage, net, average, train_clips, encode(captions, words, length), moments, device)
    net = average.module.eval().requires_grad_(False)
    stack = lambda clips, which: torch.stack([clips.frames(k, 0, cfg.frames) for k in which])
    say = lambda words: net["text"](net["text"].words(words.to(device)))
    sigmas = karras_sigmas(cfg.steps, low=0.02)  # noise of 0.02 nobody sees
    if "fakes" not in saved:  # base samples of training captions, for the discriminator
        asked = encode([plain(c) for c in captions[:cfg.fakes]], words, length)
        noise = torch.randn(len(asked), 3, cfg.frames, cfg.size, cfg.size, generator=make_rng(cfg.seed, 9, 0))
        sampler = prompted(denoiser(net), say(0 * asked[:1]), cfg.rho)
        made = [euler(sampler, sigmas[0] * noise[a:a + 32].to(device), sigmas, lambda *_, c=say(asked[a:a + 32]): c)
                for a in tqdm(range(0, len(asked), 32), "generating clips for the discriminator", leave=False)]
        saved["fakes"] = to_uint8(torch.cat(made).cpu() * moments[1] + moments[0]).transpose(1, 2).contiguous()
    fakes, kept = saved["fakes"], int(0.75 * len(saved["fakes"]))
    whole = lambda clips: torch.cat([common.coherent(common.track(c)) for c in clips.split(256)]) \
        if source == "procedural" else torch.ones(len(clips)) > 0
    real = stack(train_clips, range(min(4 * cfg.fakes, len(train_clips))))
    disc = train_discriminator(cfg, stage, real[whole(real)], fakes[:kept], estimate, device)  # real video is coherent
    held_out = stack(test_clips, range(min(cfg.fakes, len(test_clips)))), fakes[kept:]
    phi, good = [scores(cfg, disc, v, estimate, device) for v in held_out], [whole(v) for v in held_out]
    quality = dict(real=(phi[0][good[0]] > 0.5).float().mean().item(), generated=(phi[1] <= 0.5).float().mean().item())
    quality |= dict(balanced=sum(quality.values()) / 2, calibration=common.calibration(phi[0][good[0]], phi[1]))
    if source == "procedural":  # does phi rank coherent clips above the others?
        quality |= {f"auc_{k}": common.auc(p.mean(1), g) for k, p, g in zip(("real", "generated"), phi, good)}
    prompts = [plain(test_captions[k % len(test_captions)]) for k in range(cfg.prompts)]
    noise = torch.randn(cfg.prompts, 3, cfg.frames, cfg.size, cfg.size, generator=make_rng(cfg.seed, 4, 0))
    rows, videos = evaluate(cfg, net, estimate, disc, prompts, words, noise, sigmas, moments, device)
    if source == "procedural":
        common.score(rows, videos, prompts, ("base", "words", "random"))
    videos["real"] = stack(test_clips, range(min(cfg.prompts, len(test_clips))))
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)], size=cfg.size)
    common.write_results(out, "motionprompt", cfg, device, dataset, common.finite(rows), began,
                         discriminator=common.finite(quality))
    pictures(cfg, out, videos, estimate, saved["log"], device)
    print("\ndiscriminator, held out:", ", ".join(f"{k} {v:.2f}" for k, v in quality.items() if k != "calibration"))
    print("phi against the share of real pairs:", ", ".join(f"{p:.2f} {q:.2f}" for p, q in quality["calibration"]))
    print(f"\n{cfg.prompts} prompts, Euler, {cfg.steps} steps, guided {cfg.guided}, tokens {cfg.tokens}, K {cfg.K}, "
          f"lr {cfg.lr}\n" + common.table(rows, COLUMNS))
    print(f"\nwrote {', '.join(p.name for p in sorted(out.iterdir()))} in {out}/ after {time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
