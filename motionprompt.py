"""MotionPrompt (Nam, Kim, Lee and Ye, CVPR 2025), https://arxiv.org/abs/2411.15540

A prompt acts on all frames at once. MotionPrompt appends a token to it,
and moves the token's embedding while it samples, so that the optical flow
between frames of the clean estimate looks to a discriminator like flow of
real video. No weight of the video model changes, nor does the prompt.

    append     T0 = embedding of a word like 'authentic'; c(T) = text encoder of (prompt, T)
    Tweedie    x_{0|t} = D(x; sigma, c(T))                          the clean estimate
    flow       f = RAFT(x_{0|t}[i], x_{0|t}[j])                     frames i, j drawn by chance
    loss       l = lambda1 log(1 - phi(f)) + lambda2 TV(f) + lambda3 || T - T0 ||^2
               phi: the discriminator's probability that f is of real video, a sigmoid of its logit;
               means over the pairs of frames; TV of means over pixels
    optimise   T <- Adam(dl / dT), K times, through D_P = D(x; sigma, c(T))
    sample     a step through D_0 + w (D_P - D_0), D_0 of an empty prompt: classifier-free
               guidance (CFG)
    window     only at levels of noise in between; the other steps have the plain prompt

The paper was not at hand: the equations come from notes on it, without
their numbers, and what they leave open is marked "paper silent". The
video model is that of flowmo.py, trained as flow matching and read here
as EDM's denoiser:

    t = sigma / (1 + sigma)     z = x / (1 + sigma)     D(x; sigma) = z - t u(z, t)

    python motionprompt.py                                    # 4 minutes on two cores
    python motionprompt.py --prompt "a red circle moving up"  # one gif, without and with it
    python motionprompt.py --train --preset tiny              # RAFT and discriminator anew

The first samples prompts from the same noise without a token, with the word, with MotionPrompt, and
with tokens moved as far at random. It prints how many clips move as one thing, told by tracking.
"""
import math
import os
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
from tqdm import tqdm

if __package__:  # copied into a package of yours
    from . import common
    from .common import Fault, like, make_rng, opt, to_float, to_uint8
else:
    import common
    from common import Fault, like, make_rng, opt, to_float, to_uint8

SHIPPED = Path(__file__).resolve().parent / "assets" / "models" / "motionprompt.pt"
VIDEO_MODEL = SHIPPED.with_name("sprites.pt")
SAVE_EVERY = 500  # training steps

@dataclass
class Config:
    dataset: str = opt("sprites", "sprites, or a folder of your captioned clips in --data_dir")
    data_dir: str = opt("", "where DATASET/{train,test}/ lies; else data", free=True)
    preset: str = opt("tiny", "tiny (two CPU cores), small (one GPU, never run to its end)")
    prompt: str = opt("", "sample this, with and without MotionPrompt: one gif", free=True)
    train: bool = opt(False, "train flow estimator and discriminator first")
    model: str = opt("", "a ckpt.pt of flowmo.py --train; else the shipped one")
    disc: str = opt("", "a ckpt.pt of --train here; else the shipped one")
    resume: bool = opt(False, "go on with the training in the output folder", free=True)
    eval_only: bool = opt(False, "evaluate the run in the output folder again", free=True)
    out_dir: str = opt("", "else out/motionprompt-DATASET[-procedural]", free=True)
    device: str = opt("auto", "auto (cuda if it is there, else cpu), cpu, cuda, mps", free=True)
    compile: bool = opt(False, "torch.compile the video model", free=True)
    amp: bool = opt(False, "bfloat16 autocast inside the video model")
    seed: int = opt(0, "of weights, data, noise and prompts", 0, 2**31)
    prompts: int = opt(128, "prompts to sample, those of the test clips", 2, 10**5, free=True)
    steps: int = opt(16, "steps of the Euler sampler, of Karras' levels", 2, 10000)
    sample_batch: int = opt(32, "videos sampled at once", 1, 65536, free=True)
    guidance_scale: float = opt(2.0, "w of classifier-free guidance; 1: none", 0, 100, free=True)
    guided: str = opt("5-10", "guided steps from 0, ranges with commas between", free=True)
    tokens: str = opt("authentic", "words that the tokens start from", free=True)
    K: int = opt(3, "optimisation steps at every guided step", 0, 10**4, free=True)
    token_lr: float = opt(0.2, "Adam's learning rate for the tokens", 0, 100, free=True)
    lambda1: float = opt(1.0, "weight of log(1 - phi)", 0, 10**6, free=True)
    lambda2: float = opt(0.1, "weight of the total variation, a mean", 0, 10**6, free=True)
    lambda3: float = opt(0.001, "weight of the distance from T0", 0, 10**6, free=True)
    pairs: int = opt(2, "pairs of frames an optimisation step", 1, 256, free=True)
    gap: int = opt(3, "--train: at most so far apart are the two frames of a pair", 1, 255)
    raft_iters: int = opt(1200, "--train: steps of the tiny RAFT", 1, 10**8)
    disc_iters: int = opt(2000, "--train: steps of the discriminator", 1, 10**8)
    fakes: int = opt(1000, "--train: clips to generate for it", 4, 10**6)
    noise: float = opt(0.2, "--train: noise on clips before their flow is read", 0, 10)
    lr: float = opt(2e-3, "--train: AdamW's learning rate", 0, 1)

PRESETS = {
    "tiny": {},
    "small": dict(  # for the model of `flowmo.py --train --preset small`
        raft_iters=3000, disc_iters=4000, fakes=4000, prompts=256, steps=30, guided="9-19", gap=6,
        amp=True,
    ),
}

# B, C, T, H, W: batch, channels, frames, height, width. x: the noisy video, at noise level sigma
# (B,), of data of variance 1. D: the clean estimate. Flow: (N, 2, H, W) in pixels. Prompt (B, L, d)
# and tokens (B, n, d): embeddings of words. c: what the text encoder makes of both.

# ---------------------------------------- THE METHOD
# From here to optimise_tokens is one block to paste. It needs torch, and torch.nn.functional as F.

def append(prompt, tokens, ends):
    """Tokens (B, n, d) right behind the words of a prompt (B, L, d); ends (B,): their number."""
    places = ends[:, None] + torch.arange(tokens.shape[1], device=ends.device)  # (B, n)
    return prompt.scatter(1, places[..., None].expand_as(tokens), tokens)

def total_variation(flow):
    """TV(f) of flow (N, 2, H, W), (N,): what differs between neighbours, to the right and down.

    The paper's is a sum over pixels; ours is a mean, so that its weight fits every size.
    """
    right = flow.diff(dim=3).abs().flatten(1).mean(1)
    down = flow.diff(dim=2).abs().flatten(1).mean(1)
    return right + down

def motion_loss(logit, flow, T, T0, lambdas):
    """l of every video, (B,). Source: MotionPrompt.

    logit (B P,), phi = sigmoid(logit), and flow (B P, 2, H, W): of P pairs of frames each. T, T0
    (B, n, d). lambdas: lambda1, lambda2, lambda3.
    """
    lambda1, lambda2, lambda3 = lambdas
    log_fake = F.logsigmoid(-logit).view(len(T), -1).mean(1)  # log(1 - phi), exact near 1, too
    rough = total_variation(flow).view(len(T), -1).mean(1)
    away = (T - T0).square().flatten(1).sum(1)
    return lambda1 * log_fake + lambda2 * rough + lambda3 * away

def random_pairs(batch, frames, count, gap, rng):
    """Frames i < j, at most `gap` apart, every such pair alike: (B, count) twice."""
    i, j = torch.triu_indices(frames, frames, 1)
    near = j - i <= gap
    drawn = torch.randint(int(near.sum()), (batch, count), generator=rng)
    return i[near][drawn], j[near][drawn]

def flow_of_pairs(D, i, j, decode, estimate):
    """Flow from frame i to frame j of estimates D (B, C, T, H, W); i, j (B, P): (B P, 2, H, W).

    decode((N, C, 2, H, W)) -> video (N, 3, 2, H, W) in [-1, 1], best in float32, of a decoder that
    takes every frame by itself, as Stable Diffusion's: two frames and no more, to save memory.
    estimate(image1, image2) -> flow. Raises ValueError if two frames do not come back.
    """
    rows = torch.arange(len(D), device=D.device)[:, None]
    frames = D.transpose(1, 2)  # (B, T, C, H, W)
    first = frames[rows, i.to(D.device)].flatten(0, 1)  # (B P, C, H, W)
    second = frames[rows, j.to(D.device)].flatten(0, 1)
    video = decode(torch.stack([first, second], 2))
    if video.shape[2] != 2:
        raise ValueError(f"decode made {video.shape[2]} frames of 2: it must take each by itself")
    return estimate(video[:, :, 0], video[:, :, 1])

def optimise_tokens(T, denoise, encode, loss, x, sigma, K, lr):
    """T (B, n, d) after K steps of Adam on loss(D, T) -> (B,). Source: MotionPrompt.

    denoise(x, sigma (B,), c) -> D, with no guidance; encode(tokens) -> c. Freeze the weights: it
    saves memory. lr: what an element of T moves by at first; 0.2 fits embeddings of deviation 1,
    as ours, CLIP's take a hundredth. T is float32 whatever x is: smaller types lose small steps.
    Raises FloatingPointError if T is not finite in the end.
    """
    T = T.detach().float().clone().requires_grad_()
    adam = torch.optim.Adam([T], lr)  # anew at every step of the sampler; paper silent
    for _ in range(K):
        with torch.enable_grad():
            D = denoise(x, sigma, encode(T.to(x.dtype)))  # Tweedie
            # 1024: else a gradient that passes through a float16 network would be 0 there.
            gradient, = torch.autograd.grad(1024 * loss(D, T).sum(), T)
        T.grad = gradient / 1024
        adam.step()
    if not T.to(x.dtype).isfinite().all():
        raise FloatingPointError(
            f"the tokens are not finite in {x.dtype}: is the clean estimate, or is 1024 times the "
            "loss or lr more than the networks' type can hold?")
    return T.detach()

def euler_step(denoise, x, sigma, then, c):
    """x (B, ...) from noise level sigma (B,) to `then`, a number or (B,). EDM Eq. 3."""
    with torch.no_grad():
        D = denoise(x, sigma, c)
    slope = (x - D) / like(sigma, x)  # dx / dsigma
    moved = x + like(then - sigma, x) * slope
    return torch.where(like(sigma, x) > 0, moved, x)  # some lists of levels end in two zeros

def motionprompt(denoise, inner, encode, T0, x, sigmas, guided, loss, K=3, lr=0.2):
    """Sampling with tokens that are optimised on the way. Source: MotionPrompt.

    denoise(x, sigma (B,), c) -> D: the sampler's, with guidance by the prompt; inner: the one to
    optimise through, with none. encode(tokens (B, n, d), or None for the prompt alone) -> c. T0
    (B, n, d), lr: as in optimise_tokens. x (B, C, T, H, W) at sigmas[0], best in float32, whatever
    the networks are. guided: steps with tokens, which go on from step to step. loss(D, T) -> (B,).
    K = 0: the words that T0 is of, not optimised. Returns x at sigmas[-1] and {step: T}.
    """
    T = T0
    path = {}
    for step in range(len(sigmas) - 1):
        sigma = sigmas[step].to(x).expand(len(x))
        if step in guided:
            try:
                T = optimise_tokens(T, inner, encode, loss, x, sigma, K, lr)
            except FloatingPointError as e:
                raise FloatingPointError(f"step {step} of the sampler: {e}")
            path[step] = T
            c = encode(T.to(x.dtype))
        else:
            c = encode(None)
        x = euler_step(denoise, x, sigma, sigmas[step + 1].to(x), c)
        if not x.isfinite().all():
            raise FloatingPointError(f"step {step} of the sampler: x is not finite any more")
    return x, path

def as_edm(u):
    """A network of flow matching, u(z, t, c), as EDM's denoiser D(x, sigma, c)."""
    def denoise(x, sigma, c):
        t = sigma / (1 + sigma)
        z = x / like(1 + sigma, x)
        return z - like(t, x) * u(z, t, c)  # D(x; sigma)

    return denoise

def prompted(denoise, c_0, guidance_scale):
    """Classifier-free guidance, both in one batch; c_0 (1, L, d) encodes an empty prompt."""
    def guided_denoise(x, sigma, c):
        both = torch.cat([c, c_0.expand_as(c)])
        D_P, D_0 = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return D_0 + guidance_scale * (D_P - D_0)

    return guided_denoise

# ---------------------------------------- beside the method: its control

def random_tokens(denoise, encode, T0, path, x, sigmas, rng):
    """The control: at every step of `path` a token as far from T0, in a direction by chance."""
    for step in range(len(sigmas) - 1):
        sigma = sigmas[step].to(x).expand(len(x))
        c = encode(None)
        if step in path:
            distance = (path[step] - T0).flatten(1).norm(dim=1)  # (B,)
            way = torch.randn(T0.shape, generator=rng).to(T0)
            way = way / like(way.flatten(1).norm(dim=1), way)
            c = encode(T0 + like(distance, way) * way)
        x = euler_step(denoise, x, sigma, sigmas[step + 1].to(x), c)
    return x

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

# ---------------------------------------- network: text to video

SPARE = 2  # places behind the longest caption, for the tokens of motionprompt.py

def on_frames(layer, x):
    """A layer for pictures on every frame of x (B, C, T, H, W)."""
    B, _, T, _, _ = x.shape
    h = layer(x.transpose(1, 2).flatten(0, 1))  # (B T, C, H, W)
    return h.unflatten(0, (B, T)).transpose(1, 2)

class ResBlock(nn.Module):
    """Convolutions over space, then over time, scaled and shifted by clock and sentence."""

    def __init__(self, cin, cout, d):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(d, 2 * cout)
        self.norm2 = nn.GroupNorm(8, cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1)
        self.norm3 = nn.GroupNorm(8, cout)
        self.time = nn.Conv2d(cout, cout, (3, 1), padding=(1, 0))

    def forward(self, x, emb):  # (B, C, T, H, W), (B, d)
        scale, shift = self.emb(emb)[..., None, None, None].chunk(2, 1)
        h = on_frames(self.conv1, F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        x = on_frames(self.skip, x) + on_frames(self.conv2, F.silu(h))
        h = F.silu(self.norm3(x)).flatten(3)  # (B, C, T, H W)
        return x + self.time(h).reshape(x.shape)

class TransformerBlock(nn.Module):
    """Transformer block with adaptive layer norm, over words and places of all frames together."""

    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.emb = nn.Linear(d, 6 * d)
        self.attend = nn.MultiheadAttention(d, d // 32, batch_first=True)
        self.wide = nn.Linear(d, 4 * d)
        self.back = nn.Linear(4 * d, d)
        nn.init.zeros_(self.emb.weight)
        nn.init.zeros_(self.emb.bias)

    def forward(self, x, emb):  # (B, N, d), (B, d)
        scale1, shift1, gate1, scale2, shift2, gate2 = self.emb(emb)[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attend(h, h, h, need_weights=False)[0]
        h = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.back(F.gelu(self.wide(h)))

class TextToVideo(nn.Module):
    """u(z (B, 3, T, H, W), t (B,), c (B, L, d)) -> like z, float32: Eq. 1 of FlowMo.

    embed: indices of words (B, L), 0 for none -> (B, L, d). encode: those -> c, the text encoder.
    Convolutions at half size, a transformer at a quarter.
    """

    def __init__(self, words, length, size, frames, d, layers, amp=False):
        super().__init__()
        channels = d // 4
        self.d = d
        self.length = length
        self.shape = (3, frames, size, size)
        self.amp = amp
        self.register_buffer("mean", torch.tensor(0.0))  # of the pixels it was trained on
        self.register_buffer("std", torch.tensor(1.0))
        self.embed = nn.Embedding(words + 1, d)
        self.order = nn.Parameter(torch.randn(length, d))
        self.text = nn.TransformerEncoderLayer(
            d, d // 32, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.clock = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.sentence = nn.Sequential(nn.Linear(length * d, d), nn.SiLU(), nn.Linear(d, d))
        self.place = nn.Parameter(torch.randn(frames, (size // 4) ** 2, d))
        self.gain = nn.Linear(d, d)
        self.inp = nn.Conv2d(12, channels, 3, padding=1)
        self.fine = ResBlock(channels, channels, d)
        self.down = nn.Conv2d(channels, d, 2, 2)
        self.blocks = nn.ModuleList(TransformerBlock(d) for _ in range(layers))
        self.up = nn.ConvTranspose2d(d, channels, 2, 2)
        self.last = ResBlock(2 * channels, channels, d)
        self.norm = nn.GroupNorm(8, channels)
        self.out = nn.Conv2d(channels + 12, 12, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def encode(self, prompt):
        return self.text(prompt + self.order)

    def forward(self, z, t, c):
        # Ours: around the network stands the best linear guess of u, for data of variance 1.
        total = like((t**2 + (1 - t) ** 2).sqrt(), z)  # the deviation of z, (B, 1, 1, 1, 1)
        x = (z / total).transpose(1, 2)  # (B, T, 3, H, W)
        x = F.pixel_unshuffle(x, 2).transpose(1, 2)  # (B, 12, T, H/2, W/2)
        frequency = torch.linspace(0, math.log(200), self.d // 2, device=z.device).exp()
        angle = frequency * t[:, None]  # (B, d / 2)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.amp):
            said = self.sentence(c.flatten(1))  # (B, d)
            waves = torch.cat([angle.sin(), angle.cos()], 1)  # (B, d)
            emb = F.silu(self.clock(waves) + said)
            fine = self.fine(on_frames(self.inp, x), emb)  # (B, channels, T, H/2, W/2)
            coarse = on_frames(self.down, fine)  # (B, d, T, H/4, W/4)
            # Ours: the sentence times the place; added alone it says the same to every frame.
            place = self.place * self.gain(F.silu(said))[:, None, None]  # (B, T, H W / 16, d)
            h = coarse.flatten(3).permute(0, 2, 3, 1) + place
            h = torch.cat([c, h.flatten(1, 2)], 1)  # (B, L + T H W / 16, d)
            for block in self.blocks:
                h = block(h, emb)
            h = h[:, self.length:].transpose(1, 2).reshape(coarse.shape)
            h = self.last(torch.cat([on_frames(self.up, h), fine], 1), emb)
            # Ours: the input goes into the last layer, too; noise need not pass a narrow network.
            h = torch.cat([F.silu(self.norm(h)), x], 1)
            h = on_frames(self.out, h)  # (B, 12, T, H/2, W/2)
        h = F.pixel_shuffle(h.float().transpose(1, 2), 2).transpose(1, 2)
        guess = like(2 * t - 1, z) / total**2 * z
        return guess + h / total

# ---------------------------------------- discriminator

class Discriminator(nn.Module):
    """Flow (N, 2, H, W) in pixels -> logit of being real (N,): a ViT and an MLP of three layers.

    The paper's ViT is a pretrained one.
    """

    def __init__(self, size, d=64, patch=4):
        super().__init__()
        self.size = size
        self.inp = nn.Conv2d(2, d, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, d))
        self.vit = nn.Sequential(*[
            nn.TransformerEncoderLayer(d, 2, 2 * d, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)])
        self.head = nn.Sequential(
            nn.Linear(d, d), nn.GELU(), nn.Linear(d, d), nn.GELU(), nn.Linear(d, 1))

    def forward(self, flow):
        h = self.inp(flow * (10 / self.size))  # in tenths of a frame
        h = self.vit(h.flatten(2).transpose(1, 2) + self.place)
        return self.head(h.mean(1)).squeeze(1)

# ---------------------------------------- train

def estimator(raft):
    """estimate(image1, image2) -> flow: smaller images than RAFT takes are enlarged first."""
    def estimate(image1, image2):
        k = math.ceil(24 / image1.shape[-1])
        if k > 1:
            image1 = F.interpolate(image1, scale_factor=k, mode="bilinear")
            image2 = F.interpolate(image2, scale_factor=k, mode="bilinear")
        return F.avg_pool2d(raft(image1, image2), k) / k

    return estimate

def flow_pair(cfg, frames, size, rng):
    """Two frames uint8 (3, size, size) and the exact flow between them, of one of two worlds."""
    gap = rng.integers(1, cfg.gap + 1)
    if rng.uniform() < 0.4:
        clip = common.shapes(rng, size, 2, flow=True, speed=0.5 * gap)
    else:
        few = max(4, (frames - 1) // gap + 1)
        clip = common.sprites(rng, size, few, flow=True, steady=1.0)
    t = rng.integers(len(clip["flow"]))
    return clip["video"][t], clip["video"][t + 1], clip["flow"][t]

def train_raft(cfg, shape, out, device):
    """The tiny RAFT for videos of `shape`, on exact flow of two worlds, half of it noisy."""
    _, frames, size, _ = shape
    torch.manual_seed(cfg.seed + 1)
    raft = TinyRAFT().to(device)
    optimizer = torch.optim.AdamW(raft.parameters(), cfg.lr, fused=device.type != "mps")
    saved = common.restore(out / "raft.pt", "motionprompt", cfg, raft=raft, optimizer=optimizer)
    log = common.Log(cfg.raft_iters, saved["step"], saved["log"], "flow estimator")
    k = math.ceil(24 / size)  # RAFT takes images of 24 px and more

    def draw(step):
        pairs = []
        for n in range(16):
            rng = np.random.default_rng([cfg.seed, 5, step - 1, n])
            pairs.append(flow_pair(cfg, frames, size, rng))
        image1, image2, true = [torch.stack(part) for part in zip(*pairs)]
        rng = make_rng(cfg.seed, 5, step)
        noise = cfg.noise * torch.rand(1, generator=rng) * (torch.rand(1, generator=rng) < 0.5)
        image1 = to_float(image1) + noise * torch.randn(image1.shape, generator=rng)
        image2 = to_float(image2) + noise * torch.randn(image2.shape, generator=rng)
        return image1, image2, true

    loader = common.prefetched(draw, saved["step"], cfg.raft_iters, device)
    for step, (image1, image2, true) in loader:
        image1 = F.interpolate(image1, scale_factor=k, mode="bilinear")
        image2 = F.interpolate(image2, scale_factor=k, mode="bilinear")
        true = k * F.interpolate(true, scale_factor=k)
        weight = 1 + 4 * (true.square().sum(1) > 0.01)  # (N, H, W): what moves counts more
        loss = 0
        flows = raft(image1, image2, updates=4, detach=True, every=True)
        for n, flow in enumerate(flows):
            loss = loss + 0.8 ** (3 - n) * (weight * (flow - true).abs().sum(1)).mean()

        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, step / 100, 1.01 - step / cfg.raft_iters)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(raft.parameters(), 1.0)
        optimizer.step()

        stop = log.add(step, flow=loss)
        if step % SAVE_EVERY == 0 or step == cfg.raft_iters or stop:
            common.save_checkpoint(
                out, "motionprompt", cfg, log, "raft", step=step, raft=raft.state_dict(),
                optimizer=optimizer.state_dict())
        if stop:
            raise KeyboardInterrupt
    log.close()
    return raft.eval().requires_grad_(False)

def noisy_pair(cfg, clips, rng):
    """Two frames of clips uint8 (N, T, 3, H, W), mirrored, turned, noisy: (N, 3, H, W) twice.

    The noise is ours, as the discriminator judges flow of estimates, which are not clean; the paper
    trains it on flow of clean video.
    """
    i, j = random_pairs(len(clips), clips.shape[1], 1, cfg.gap, rng)
    rows = torch.arange(len(clips))
    video = torch.stack([clips[rows, i[:, 0]], clips[rows, j[:, 0]]])  # (2, N, 3, H, W)
    if torch.rand(1, generator=rng) < 0.5:
        video = video.flip(4)
    if torch.rand(1, generator=rng) < 0.5:
        video = video.flip(3)
    if torch.rand(1, generator=rng) < 0.5:
        video = video.transpose(3, 4)
    image1, image2 = to_float(video) + cfg.noise * torch.randn(video.shape, generator=rng)
    return image1, image2

def train_discriminator(cfg, raft, real, fake, out, device):
    """Flow of real clips against flow of generated ones, uint8 (N, T, 3, H, W).

    The usual loss of a GAN's discriminator, but no generator is trained.
    """
    frames, _, size, _ = fake.shape[1:]
    torch.manual_seed(cfg.seed + 2)
    disc = Discriminator(size).to(device)
    optimizer = torch.optim.AdamW(
        disc.parameters(), 0.5 * cfg.lr, weight_decay=0.05, fused=device.type != "mps")
    saved = common.restore(out / "ckpt.pt", "motionprompt", cfg, disc=disc, optimizer=optimizer)
    log = common.Log(cfg.disc_iters, saved["step"], saved["log"], "discriminator")
    estimate = estimator(raft)

    def draw(step):
        rng = make_rng(cfg.seed, 6, step)
        chosen = torch.randint(len(real), (32,), generator=rng).tolist()
        some_real = torch.stack([real.frames(n, 0, frames) for n in chosen])
        some_fake = fake[torch.randint(len(fake), (32,), generator=rng)]
        return *noisy_pair(cfg, some_real, rng), *noisy_pair(cfg, some_fake, rng)

    loader = common.prefetched(draw, saved["step"], cfg.disc_iters, device)
    for step, (real1, real2, fake1, fake2) in loader:
        real_logit = disc(estimate(real1, real2))
        fake_logit = disc(estimate(fake1, fake2))
        loss = -F.logsigmoid(real_logit).mean() / 2 - F.logsigmoid(-fake_logit).mean() / 2

        decay = 2.5 * (1 - step / cfg.disc_iters)  # in the last 40 %
        optimizer.param_groups[0]["lr"] = 0.5 * cfg.lr * min(1, step / 100, decay + 0.01)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(disc.parameters(), 1.0)
        optimizer.step()

        stop = log.add(step, disc=loss)
        if step % SAVE_EVERY == 0 or step == cfg.disc_iters or stop:
            common.save_checkpoint(
                out, "motionprompt", cfg, log, step=step, raft=raft.state_dict(),
                disc=disc.state_dict(), optimizer=optimizer.state_dict())
        if stop:
            raise KeyboardInterrupt
    log.close()
    return disc.eval().requires_grad_(False)

# ---------------------------------------- load

def load_finished(path, script, steps):
    saved = common.load_checkpoint(path, script)
    asked = saved["config"][steps]
    if saved["step"] != asked:
        raise Fault(f"{path} has {saved['step']} of {asked} steps of training: {script}.py "
                    "--resume makes the others")
    return saved

def load_video_model(cfg, device):
    """The text-to-video model of flowmo.py and its words. Raises Fault."""
    path = Path(cfg.model or VIDEO_MODEL).expanduser()
    saved = load_finished(path, "flowmo", "iters")
    made = saved["config"]
    net = TextToVideo(len(saved["words"]), saved["length"], made["size"], made["frames"],
                      made["width"], made["layers"], cfg.amp)
    net.load_state_dict(saved["model"])
    print(f"text-to-video model: {path}, {made['frames']} frames of {made['size']} pixels")
    return net.to(device).eval().requires_grad_(False), saved["words"]

def load_disc(cfg, size, device):
    """The flow estimator and the discriminator, whose gap goes into cfg. Raises Fault."""
    path = Path(cfg.disc or SHIPPED).expanduser()
    saved = load_finished(path, "motionprompt", "disc_iters")
    cfg.gap = saved["config"]["gap"]
    raft = TinyRAFT()
    raft.load_state_dict(saved["raft"])
    disc = Discriminator(size)
    try:
        disc.load_state_dict(saved["disc"])
    except RuntimeError:
        raise Fault(f"the discriminator in {path} is not for clips of {size} pixels, as the video "
                    "model's: make one by --train, and name it by --disc")
    print(f"flow estimator and discriminator: {path}")
    raft.to(device).eval().requires_grad_(False)
    disc.to(device).eval().requires_grad_(False)
    return raft, disc

# ---------------------------------------- sample and evaluate

METHODS = {"base": "no token", "words": "the word", "motionprompt": "MotionPrompt",
           "random": "random token"}

def levels(cfg):
    return common.karras_sigmas(cfg.steps, low=0.02)  # noise of 0.02 nobody sees

def compare(cfg, net, words, raft, disc, prompts, methods, use=3):
    """One video of each prompt by every method, all from the same noise, which is that of `use`.

    Returns rows and {method: uint8 (N, T, 3, H, W)}. Evaluations and seconds are of one video; a
    gradient takes about two evaluations more. "random" needs "motionprompt" before it.
    """
    device = net.mean.device
    shape = (len(prompts), *net.shape)
    noise = torch.randn(shape, generator=make_rng(cfg.seed, use, 0)).to(device)
    n = len(common.split_words(cfg.tokens))
    start = common.to_indices([cfg.tokens], words, n).to(device)
    text = common.to_indices(prompts, words, net.length - n).to(device)
    text = F.pad(text, (0, n))  # (N, L): room for the tokens
    ends = (text > 0).sum(1)  # (N,): how many words
    with torch.no_grad():
        c_0 = net.encode(net.embed(0 * text[:1]))
        T0 = net.embed(start)  # (1, n, d)
    sigmas = levels(cfg)
    lambdas = (cfg.lambda1, cfg.lambda2, cfg.lambda3)
    estimate = estimator(raft)
    size = cfg.sample_batch
    starts = range(0, len(prompts), size)
    paths = {}  # of the tokens of every batch

    def decode(video):  # stands where a latent model has its VAE
        return video * net.std + net.mean

    def one_batch(a, method, sigmas, guided, rng):
        def encode(tokens):
            prompt = net.embed(text[a:a + size])
            if tokens is not None:
                prompt = append(prompt, tokens, ends[a:a + size])
            return net.encode(prompt)

        def loss(D, T):
            i, j = random_pairs(len(D), D.shape[2], cfg.pairs, cfg.gap, rng)
            flow = flow_of_pairs(D, i, j, decode, estimate)
            return motion_loss(disc(flow), flow, T, T0, lambdas)

        inner = common.counted(as_edm(net))
        denoise = common.counted(as_edm(net))
        if cfg.guidance_scale != 1:
            denoise = common.counted(prompted(as_edm(net), c_0, cfg.guidance_scale))
        x = sigmas[0] * noise[a:a + size]
        T = T0.expand(len(x), -1, -1)
        if method == "random":
            x = random_tokens(denoise, encode, T, paths[a], x, sigmas, rng)
        else:
            K = cfg.K if method == "motionprompt" else 0
            x, paths[a] = motionprompt(
                denoise, inner, encode, T, x, sigmas, guided, loss, K, cfg.token_lr)
        return to_uint8(decode(x)).transpose(1, 2), denoise.calls + inner.calls

    for a in {starts[0], starts[-1]}:  # once untimed: it compiles, and wakes the device
        for method in methods:
            one_batch(a, method, sigmas[:2], {0}, make_rng(cfg.seed, 8, 0))
    rows = []
    videos = {}
    for method in methods:
        guided = set() if method == "base" else common.guided_steps(cfg)
        rng = make_rng(cfg.seed, 8, 0)
        made = []
        began = time.perf_counter()
        for a in tqdm(starts, f"sampling, {METHODS[method]}", leave=False):
            video, calls = one_batch(a, method, sigmas, guided, rng)
            made.append(video)
        seconds = (time.perf_counter() - began) / len(prompts)
        videos[method] = torch.cat(made)
        rows.append(dict(method=METHODS[method], seed=cfg.seed, prompts=len(prompts),
                         evaluations=calls, s_per_video=seconds))
        rows[-1]["cost_ratio"] = seconds / rows[0]["s_per_video"]
    return rows, videos

COLUMNS = {
    "method": ("method", ""), "coherent": ("coherent", ".3f"),
    "over_base_text": ("more than without, 95 %", ""),
    "over_words_text": ("than the word", ""), "over_random_text": ("than random", ""),
    "obeyed": ("obeyed", ".3f"),
    "speed": ("px a frame", ".2f"), "evaluations": ("evaluations", "d"),
    "cost_ratio": ("time", ".2f"),
}

# ---------------------------------------- main

def main():
    began = time.time()
    cfg = common.parse_args("motionprompt", Config, PRESETS, __doc__)
    common.guided_steps(cfg)  # or a Fault
    trains = cfg.train and not cfg.eval_only
    if trains and (cfg.prompt or cfg.disc):
        raise Fault("--train makes a discriminator: leave --prompt and --disc out")
    device = common.pick_device(cfg.device)
    if cfg.prompt or cfg.eval_only:
        common.use_run("motionprompt", cfg, "disc")
    net, words = load_video_model(cfg, device)
    _, frames, size, _ = net.shape
    common.check_prompt("tokens", cfg.tokens, words, SPARE)
    if not trains:
        raft, disc = load_disc(cfg, size, device)
    if cfg.gap >= frames:
        raise Fault(f"--gap {cfg.gap}: must be below the {frames} frames of the video model")
    if cfg.compile:
        net.compile()
    if cfg.prompt:
        common.check_prompt("prompt", cfg.prompt, words, net.length - SPARE)
        prompts = 4 * [cfg.prompt]
        _, videos = compare(cfg, net, words, raft, disc, prompts, ["base", "motionprompt"])
        gif = Path(cfg.out_dir or "out", "motionprompt-prompt.gif")
        common.save_gif(gif, videos, width=96, ms=150)
        print(f"wrote {gif}")
        return
    common.check_folder("motionprompt", cfg, common.source_of(cfg))
    counts = (4 * cfg.fakes if trains else 2, 512)  # sampling needs no training clips
    world = {"steady": 1.0} if cfg.dataset == "sprites" else {}  # real video has no flaws
    train_clips, test_clips, source = common.load_clips(
        cfg.dataset, cfg.data_dir, size, counts, frames, cfg.seed, min_frames=frames, **world)
    test_captions = common.captions_of(test_clips, cfg.dataset)
    common.check_words(test_captions, words)
    captions = common.captions_of(train_clips, cfg.dataset) if trains else []
    if source == "procedural":
        captions = [common.strip_quality_words(caption) for caption in captions]
        test_captions = [common.strip_quality_words(caption) for caption in test_captions]
    out = common.open_run("motionprompt", cfg, train_clips, test_clips)
    print(f"preset {cfg.preset} on {device}, {len(train_clips)} + {len(test_clips)} {source} clips")

    if trains:
        raft = train_raft(cfg, net.shape, out, device)
        prompts = [captions[k % len(captions)] for k in range(cfg.fakes)]
        # Without guidance: such clips have more of the faults that are to be known. Paper silent.
        unguided = replace(cfg, guidance_scale=1.0, tokens="")
        _, fakes = compare(unguided, net, words, raft, None, prompts, ["base"], use=7)
        disc = train_discriminator(cfg, raft, train_clips, fakes["base"], out, device)
    prompts = [test_captions[k % len(test_captions)] for k in range(cfg.prompts)]
    rows, videos = compare(cfg, net, words, raft, disc, prompts, METHODS)
    if source == "procedural":
        scores = common.score(videos, prompts, ("base", "words", "random"))
        for row, score in zip(rows, scores.values()):
            row.update(score)
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)])
    common.write_results(out, "motionprompt", cfg, device, dataset, rows, began)
    shown = {"without": videos["base"], "MotionPrompt": videos["motionprompt"]}
    common.save_changes(out, shown, prompts, source == "procedural")
    used = levels(cfg)[sorted(common.guided_steps(cfg))]
    print(f"\n{cfg.prompts} prompts, {cfg.steps} steps of Euler's, guided {cfg.guided}: sigma "
          f"{used[0]:.1f} to {used[-1]:.1f}")
    print(common.table(rows, COLUMNS))
    print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} in {out}/")
    print(f"{time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
