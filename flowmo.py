"""FlowMo (Shaulov, Hazan, Wolf and Chefer, 2025), https://arxiv.org/abs/2506.01144

A text-to-video model's own prediction tells how restless the motion will be: the difference between the predictions of
neighbouring frames should vary little over time. FlowMo moves the noisy latent, in the first steps of sampling, so that
at the worst place it varies less. Nothing is trained for it. The paper's equations:

    Eq. 1   flow matching     z_t = (1 - t) z_1 + t z_0,  u(z_t, t) -> z_0 - z_1     t = 1 is noise, t = 0 the video
            guidance by text  u = u_P + rho (u_P - u_0)                              u_0: without a prompt
    Eq. 2   debiasing         (Delta u)_f = | u_{f+1} - u_f |                        at every place and channel
    Eq. 3   variance          sigma2_{w,h,c} = Var_f [ (Delta u)_{f,w,h,c} ]
    Eq. 4   clean estimate    zbar_1 = z_t - t u                                     for pictures, as is Eq. 5
    Eq. 7   patch             s_{w,h} = mean_c sigma2_{w,h,c}                        a patch is one place of the latent
    Eq. 8   loss              L = max_{w,h} s_{w,h}
    Eq. 9   guidance          z <- z - eta grad_z L,  then u is evaluated again      with Adam, fresh at every step

A first Adam step divides the gradient by its own size, so every element of z moves by eta: a sign step. Adam is the
paper's, making it anew at every step its code's. Other rows are Eq. 9 as printed, the released code's order (u is not
evaluated again) and two of the paper's three ablations; the third, all steps guided, is --guided 0-15.

    python flowmo.py                                  # two CPU cores: about 9 minutes; a GPU: the `small` preset
    python flowmo.py --eval_only --eta 0.03           # other guidance, same model: two minutes
    python flowmo.py --eval_only --methods all        # all variants and ablations

trains a small model on captioned clips, some of them coherent and some not, samples the same prompts and noise with and
without guidance, and prints what became of the motion. It writes out/flowmo-sprites-procedural/.
"""
import math
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import Fault, auc, averaged, descend, make_rng, encode, like, normalise, opt, plain, smoothness, to_uint8
from common import warm_decay

@dataclass
class Config:
    dataset: str = opt("sprites", "sprites, or a folder of your captioned clips in --data_dir")
    data_dir: str = opt("", "real clips: DATA_DIR/DATASET/{train,test}/; empty: data, else a procedural world", free=True)
    preset: str = opt("auto", "tiny (two CPU cores), small (one GPU), paper (its sampling: 50 steps); auto: by device")
    iters: int = opt(3000, "training steps of the text-to-video model", 0, 10**8)
    batch: int = opt(16, "clips in a batch", 1, 65536)
    size: int = opt(16, "height and width of a frame, pixels; a multiple of 4", 8, 1024)
    frames: int = opt(8, "frames of a clip", 4, 256)
    seed: int = opt(0, "of weights, data order, noise and prompts", 0, 2**31)
    device: str = opt("auto", "auto, cpu, cuda, mps", free=True)
    out_dir: str = opt("", "folder to write; empty: out/flowmo-DATASET[-procedural]", free=True)
    resume: bool = opt(False, "continue the run in the output folder, bit for bit on CPU", free=True)
    eval_only: bool = opt(False, "skip training, sample from the model in the output folder", free=True)
    compile: bool = opt(False, "torch.compile the network", free=True)
    amp: bool = opt(False, "bfloat16 autocast inside the network")
    methods: str = opt("base,random,flowmo,flowmo-mean,freeinit,steps", "what to sample with, of METHODS; or all", free=True)
    eta: float = opt(0.05, "size of a guidance step: of every element of z (paper: 0.005)", 0, 100, free=True)
    eta_plain: float = opt(1.0, "the same for flowmo-gd, a factor of the gradient", 0, 10**6, free=True)
    guided: str = opt("3-7", "guided steps, counted from 0: numbers and ranges (paper: 0-11 of 50)", free=True)
    steps: int = opt(16, "steps of the Euler sampler", 1, 10000, free=True)
    shift: float = opt(1.0, "time grid: 1 is linear; Wan has 5, most steps near noise", 0.01, 100, free=True)
    rho: float = opt(1.0, "guidance by the prompt, u_P + rho (u_P - u_0)", 0, 100, free=True)
    fold: str = opt("1,4", "frames and pixels (squared) that make one place for the loss, as a latent would", free=True)
    checkpointing: bool = opt(False, "recompute activations in the guidance's backward pass: less memory, more time", free=True)
    width: int = opt(128, "channels of the transformer; the convolutions around it have a third", 32, 4096)
    layers: int = opt(3, "layers of the transformer", 1, 100)
    lr: float = opt(1.5e-3, "AdamW's learning rate, after 100 steps of warm-up; the last 40 % decay to 0", 0, 1)
    ema: float = opt(0.995, "decay of the weight average that is sampled from; 0: the last weights", 0, 0.999999)
    drop: float = opt(0.1, "share of captions left out while training, for u_0", 0, 1)
    clips: int = opt(8000, "training clips of a procedural world", 2, 10**6)
    prompts: int = opt(256, "prompts to sample", 2, 10**5, free=True)

PRESETS = {
    "tiny": {},
    "small": dict(iters=8000, batch=64, size=32, frames=16, width=384, layers=8, lr=5e-4, ema=0.999, clips=40000,
                  steps=50, guided="9-24", amp=True),
    "paper": dict(iters=100000, batch=64, size=64, frames=16, width=768, layers=12, lr=2e-4, ema=0.9995, clips=100000,
                  steps=50, shift=5.0, rho=4.0, guided="0-11", eta=0.005, fold="1,1", amp=True),
}

# Notation. B, C, T, H, W: batch, channels, frames, height, width. z_1: the video, variance 1; z_0: noise; z, u alike.
# Clock: t = 1 is noise, t = 0 the video; t (B,). Text: word indices (B, L), 0 where there is none.

# ----------------------------------------------------------------------------------------------- THE METHOD
def flowmo_loss(u, frames=2, channels=1, debias=True, over="max"):
    """L of every video, (B,): how much the motion in u varies at the place where it varies most. FlowMo, Eqs. 2 to 8.

    u: a prediction (B, ...) of any layout; frames, channels: its axes of those, all other axes are space. debias=False
    leaves Eq. 2 out, over="mean" averages over places: the paper's ablations. Needs three frames, or two without Eq. 2.
    A place of Wan's latent holds 8x8 pixels of four frames; in pixel space fold() gathers what is to count as one.
    """
    d = u.diff(dim=frames).abs() if debias else u  # Eq. 2, Delta u: a frame less than u
    variance = d.var(frames, unbiased=False, keepdim=True)  # Eq. 3: like u, one frame
    s = variance.mean(channels, keepdim=True).flatten(1)  # Eq. 7, (B, places)
    return s.amax(1) if over == "max" else s.mean(1)  # Eq. 8

def adam_direction(g):
    """What a fresh Adam does with its first gradient, whatever its betas: g / (|g| + 1e-8), so nearly its sign."""
    return g / (g.abs() + 1e-8)

def flowmo_step(z, velocity, eta, loss=flowmo_loss, direction=adam_direction, of=lambda z, u: u, refresh=True):
    """One guided step before the sampler's own: the moved z and u there. FlowMo, Algorithm 1, lines 1 to 12; Eq. 9.

    velocity(z) -> u, like z (B, ...), with guidance by text and all, called before the move and after. loss(u) -> (B,);
    every video has its own. direction: what Adam makes of the gradient; lambda g: g is Eq. 9 as printed. of(z, u): what
    the loss is taken of. refresh=False keeps the u from before, as the released code does.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        u = velocity(z)
        gradient, = torch.autograd.grad(loss(of(z, u)).sum(), z)
    z = z.detach() - eta * direction(gradient)  # Eq. 9
    return z, velocity(z) if refresh else u.detach()

def prompted(network, text, rho):
    """The velocity with a prompt, u_P + rho (u_P - u_0): velocity(z, t (B,)); both in one batch. Scale is 1 + rho."""
    def velocity(z, t):
        if not rho:
            return network(z, t, text)
        u_P, u_0 = network(torch.cat([z, z]), torch.cat([t, t]), torch.cat([text, 0 * text])).chunk(2)
        return u_P + rho * (u_P - u_0)
    return velocity

def fold(u, frames, pixels):
    """(B, C, T, H, W) -> (B, C frames pixels^2, T / frames, H / pixels, W / pixels): what a latent would have as one
    place. Left-over frames and pixels at the end are cut off."""
    B, C, T, H, W = u.shape
    t, h, w = T // frames, H // pixels, W // pixels
    u = u[:, :, :t * frames, :h * pixels, :w * pixels].reshape(B, C, t, frames, h, pixels, w, pixels)
    return u.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)

# ----------------------------------------------------------------------------------------------- sampler
def time_grid(steps, shift=1.0):
    """Times from 1 (noise) to 0, (steps + 1,). shift: t -> shift t / (1 + (shift - 1) t), as Wan (5)."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()

def sample(velocity, z, times, guide=None, guided=(), watch=None):
    """Euler steps from z at times[0] to times[-1]; in the steps `guided` guide(z, v, t) -> (z, u) comes first.

    velocity(z, t (B,)) -> u; watch(i, z, u, t) sees every step. Wan's solver, UniPC, is not used: its corrector goes
    back to the latent of the step before, and little of what guidance did is left. Eq. 6 as printed, z <- (1 - t) z -
    t u, is no Euler step.
    """
    with torch.no_grad():
        for i, (now, then) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
            at = lambda z: velocity(z, z.new_full((len(z),), now))
            z, u = guide(z, at, now) if guide and i in guided else (z, at(z))
            if watch: watch(i, z, u, now)
            z = z + (then - now) * u
    return z

def freeinit_noise(video, noise, fresh, t=0.936, cutoff=0.25, order=4):
    """FreeInit's (Wu et al., ECCV 2024) noise to sample from again: low frequencies of the noised result, others fresh.

    video, noise, fresh (B, C, T, H, W): the result, the noise it came from, new noise. At t = 1 nothing of the result
    would be left; where FreeInit was made, noise to the last step leaves 7 %, which is t = 0.936. Paper silent.
    """
    z = (1 - t) * video + t * noise
    square = sum((2 * torch.fft.fftfreq(n, device=z.device)).view([-1] + [1] * (2 - k)) ** 2
                 for k, n in enumerate(z.shape[2:]))  # (T, H, W), 1: Nyquist
    low = 1 / (1 + (square / cutoff**2) ** order)  # Butterworth
    dims = (2, 3, 4)
    mixed = torch.fft.fftn(z, dim=dims) * low + torch.fft.fftn(fresh, dim=dims) * (1 - low)
    return torch.fft.ifftn(mixed, dim=dims).real

# ----------------------------------------------------------------------------------------------- network
class Convolutions(nn.Module):
    """Residual block over space, then time, scaled and shifted by the embedding of t and text."""
    def __init__(self, cin, cout, emb):
        super().__init__()
        group = lambda c: nn.GroupNorm(math.gcd(8, c), c)
        self.norm1, self.space1 = group(cin), nn.Conv3d(cin, cout, (1, 3, 3), padding=(0, 1, 1))
        self.norm2, self.space2 = group(cout), nn.Conv3d(cout, cout, (1, 3, 3), padding=(0, 1, 1))
        self.norm3, self.time = group(cout), nn.Conv3d(cout, cout, (3, 1, 1), padding=(1, 0, 0))
        self.emb, self.skip = nn.Linear(emb, 2 * cout), nn.Conv3d(cin, cout, 1) if cin != cout else nn.Identity()
        for layer in (self.space2, self.time):
            nn.init.zeros_(layer.weight)
    def forward(self, x, emb):  # (B, C, T, H, W)
        scale, shift = self.emb(emb)[..., None, None, None].chunk(2, 1)
        h = self.space1(F.silu(self.norm1(x)))
        x = self.skip(x) + self.space2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return x + self.time(F.silu(self.norm3(x)))

class Attention(nn.Module):
    """Transformer block over words and patches of all frames together, with adaptive layer norm."""
    def __init__(self, d):
        super().__init__()
        self.heads, norm = max(1, d // 32), partial(nn.LayerNorm, d, elementwise_affine=False)
        self.norm1, self.norm2, self.emb = norm(), norm(), nn.Linear(d, 6 * d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.wide, self.back = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        nn.init.zeros_(self.emb.weight)
        nn.init.zeros_(self.emb.bias)
    def forward(self, x, emb):  # (B, N, d)
        scale1, shift1, gate1, scale2, shift2, gate2 = self.emb(emb)[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d / heads) each
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.back(F.gelu(self.wide(self.norm2(x) * (1 + scale2) + shift2)))

class TextToVideo(nn.Module):
    """u(z (B, 3, T, H, W), t (B,), text (B, L)) -> like z: convolutions at half size, a transformer at a quarter.

    Around it stands the best linear guess of the velocity for data of variance 1, so that the network has a target of
    variance 1 at every t: u = a(t) z + b(t) F(b(t) z, t, text), b = 1 / sqrt(t^2 + (1 - t)^2), a = (2 t - 1) b^2.
    'left' means another place in every frame: with the embedding of place and frame multiplied by the text it is
    learned from 500 steps on; with both only added, 1,500 steps did not begin to.
    """
    def __init__(self, vocabulary, length, size, frames, d, layers, amp=False, checkpointing=False):
        super().__init__()
        c, self.d, self.length, self.amp, self.checkpointing = max(8, d // 24 * 8), d, length, amp, checkpointing
        self.words, self.order = nn.Embedding(vocabulary, d), nn.Parameter(torch.randn(length, d))
        self.place, self.gain = nn.Parameter(torch.randn(frames, (size // 4) ** 2, d)), nn.Linear(d, d)
        self.clock = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.sentence = nn.Sequential(nn.Linear(length * d, d), nn.SiLU(), nn.Linear(d, d))
        self.inp, self.one = nn.Conv3d(12, c, (1, 3, 3), padding=(0, 1, 1)), Convolutions(c, c, d)
        self.down, self.up = nn.Conv3d(c, d, (1, 2, 2), (1, 2, 2)), nn.ConvTranspose3d(d, c, (1, 2, 2), (1, 2, 2))
        self.blocks, self.two = nn.ModuleList(Attention(d) for _ in range(layers)), Convolutions(2 * c, c, d)
        self.out = nn.Sequential(nn.GroupNorm(math.gcd(8, c), c), nn.SiLU(),
                                 nn.Conv3d(c, 12, (1, 3, 3), padding=(0, 1, 1)))
        nn.init.zeros_(self.out[-1].weight)
        nn.init.zeros_(self.out[-1].bias)
    def forward(self, z, t, text):
        fold = lambda f, v: f(v.transpose(1, 2), 2).transpose(1, 2)  # over space, frame by frame
        b = like((t**2 + (1 - t) ** 2).rsqrt(), z)
        recompute = self.checkpointing and z.requires_grad
        run = lambda block, *x: checkpoint(block, *x, use_reentrant=False) if recompute else block(*x)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.amp):
            w = torch.exp(torch.linspace(0, math.log(200), self.d // 2, device=z.device)) * t[:, None]
            words = self.words(text)  # (B, L, d)
            said = self.sentence(words.flatten(1))
            emb = F.silu(self.clock(torch.cat([w.sin(), w.cos()], 1)) + said)  # (B, d)
            fine = run(self.one, self.inp(fold(F.pixel_unshuffle, b * z)), emb)  # (B, c, T, H/2, W/2)
            coarse = self.down(fine)  # (B, d, T, H/4, W/4)
            place = self.place * self.gain(F.silu(said))[:, None, None]  # a product of place and text: see above
            x = coarse.flatten(3).permute(0, 2, 3, 1) + place  # (B, T, H W / 16, d)
            x = torch.cat([words + self.order, x.flatten(1, 2)], 1)  # (B, L + T H W / 16, d)
            for block in self.blocks:
                x = run(block, x, emb)
            x = self.up(x[:, self.length:].transpose(1, 2).reshape(coarse.shape))  # (B, c, T, H/2, W/2)
            x = fold(F.pixel_shuffle, self.out(run(self.two, torch.cat([x, fine], 1), emb))).float()
        return like(2 * t - 1, z) * b**2 * z + b * x

# ----------------------------------------------------------------------------------------------- train
def flow_matching_loss(network, z_1, z_0, t, text):
    """Eq. 1's loss of every video, (B,), over the variance that the best linear guess leaves of the target."""
    z = (1 - like(t, z_1)) * z_1 + like(t, z_1) * z_0  # Eq. 1
    error = (network(z, t, text) - (z_0 - z_1)).square().flatten(1).mean(1)
    return (t**2 + (1 - t) ** 2) * error

def train(cfg, stage, net, average, clips, text, moments, device):
    """The text-to-video model, on `clips` with captions `text` (N, L)."""
    optimiser = torch.optim.AdamW(net.parameters(), cfg.lr, betas=(0.9, 0.98))
    batches = common.Batches(clips, cfg.batch, cfg.frames, cfg.seed)
    def step(k, batch):
        g = make_rng(cfg.seed, 1, k)
        z_1 = normalise(batch.to(device), moments)
        z_0 = torch.randn(z_1.shape, generator=g).to(device)
        t = torch.rand(cfg.batch, generator=g)
        near = torch.rand(cfg.batch, generator=g) < 0.4  # near noise is where motion is decided
        t = torch.where(near, 0.85 + 0.15 * t, t).to(device)
        keep = torch.rand(cfg.batch, 1, generator=g) >= cfg.drop
        loss = flow_matching_loss(net, z_1, z_0, t, (text[batches.where(k)[0]] * keep).to(device)).mean()
        descend(loss, net, optimiser, warm_decay(k, cfg.iters), average)
        return dict(loss=loss)

    stage("train", cfg.iters, dict(net=net, average=average, optimiser=optimiser), batches.__getitem__, step)

@torch.no_grad()
def by_decile(cfg, net, clips, text, moments, device):
    """Held-out loss for t in [0, 0.1], [0.1, 0.2], ..., 10 numbers: a mean would hide where a model fails."""
    n = min(256, len(clips))
    z_1 = normalise(torch.stack([clips.frames(k, 0, cfg.frames) for k in range(n)]), moments).to(device)
    z_0 = torch.randn(z_1.shape, generator=make_rng(cfg.seed, 2, 0)).to(device)
    u = (torch.arange(n, device=device) + 0.5) / n
    return [flow_matching_loss(net, z_1, z_0, (d + u) / 10, text[:n].to(device)).mean().item() for d in range(10)]

# ----------------------------------------------------------------------------------------------- evaluate
METHODS = ("base", "random", "flowmo", "flowmo-gd", "flowmo-norefresh", "flowmo-mean", "flowmo-nodebias", "flowmo-x",
           "freeinit", "steps", "steady")  # see guidance()

def guidance(cfg, method):
    """How `method` guides a step: guide(z, v, t) -> (z, u); None if it does not."""
    place = [int(n) for n in cfg.fold.split(",")]  # frames, pixels
    loss = lambda **how: lambda u: flowmo_loss(fold(u, *place), **how)
    coin = make_rng(cfg.seed, 3, 0)
    signs = lambda g: (2 * torch.randint(2, g.shape, generator=coin) - 1).to(g)
    how = {"flowmo": lambda t: {}, "flowmo-gd": lambda t: dict(eta=cfg.eta_plain, direction=lambda g: g),
           "flowmo-norefresh": lambda t: dict(refresh=False), "flowmo-mean": lambda t: dict(loss=loss(over="mean")),
           "flowmo-nodebias": lambda t: dict(loss=loss(debias=False)),
           "flowmo-x": lambda t: dict(of=lambda z, u: z - t * u),
           "random": lambda t: dict(direction=signs)}.get(method)  # the control: a step of the same form and size
    return how and (lambda z, v, t: flowmo_step(z, v, **dict(eta=cfg.eta, loss=loss()) | how(t)))

def evaluations(cfg, method):
    """Network evaluations a video: a backward pass to z counts as one (no weight has a gradient)."""
    more = 0 if guidance(cfg, method) is None else 1 if method == "flowmo-norefresh" else 2
    return {"freeinit": 2 * cfg.steps, "steps": cfg.steps + 2 * len(common.guided_steps(cfg))}.get(
        method, cfg.steps + more * len(common.guided_steps(cfg)))

def evaluate(cfg, net, prompts, words, noise, moments, device):
    """Sample the same prompts and noise with every method: rows, videos, and what note() keeps."""
    rows, videos, spread, told = [], {}, {}, {}
    grid, chosen = time_grid(cfg.steps, cfg.shift), common.guided_steps(cfg)
    again, text = torch.randn(noise.shape, generator=make_rng(cfg.seed, 3, 1)), encode(prompts, words, net.length)
    for name in cfg.methods.split(","):
        guide, parts, seconds, looked = guidance(cfg, name), [], 0.0, []
        said = encode([p + ", steady" for p in prompts], words, net.length) if name == "steady" else text
        def watch(i, z, u, t):
            if device.type == "cuda": torch.cuda.synchronize()  # what is queued is sampling
            began = time.perf_counter()
            note(spread, told, name, i, z, u, t, [int(n) for n in cfg.fold.split(",")])
            looked.append(time.perf_counter() - began)  # is not part of sampling
        for a in tqdm(range(0, len(noise), 32), f"sampling {name}", leave=False):
            z, velocity = noise[a:a + 32].to(device), prompted(net, said[a:a + 32].to(device), cfg.rho)
            times = time_grid(evaluations(cfg, "steps"), cfg.shift) if name == "steps" else grid
            began = time.perf_counter()
            out = sample(velocity, z, times, guide, chosen, watch if name in ("base", "flowmo") else None)
            if name == "freeinit":
                out = sample(velocity, freeinit_noise(out, z, again[a:a + 32].to(device)), times)
            parts.append(out.cpu())
            seconds += time.perf_counter() - began
        seconds = (seconds - sum(looked)) / len(noise)
        z = torch.cat(parts)
        videos[name] = to_uint8(z * moments[1] + moments[0]).transpose(1, 2)
        rows.append(dict(method=name, eta=cfg.eta_plain if name == "flowmo-gd" else cfg.eta, guided_steps=len(chosen),
                         s_per_video=seconds, evaluations=evaluations(cfg, name), seed=cfg.seed,
                         motion_smoothness=smoothness(videos[name]).mean().item(),
                         patch_variance=flowmo_loss(z).mean().item()))
        if guide is None:
            rows[-1] |= dict(eta=None, guided_steps=0)
    plain_s = next((r["s_per_video"] for r in rows if r["method"] == "base"), None)
    for row in rows:
        row["cost_ratio"] = plain_s and row["s_per_video"] / plain_s
    spread = {k: torch.cat(v) for k, v in spread.items()}  # (statistic, step): (N,)
    return rows, videos, spread, told

def note(spread, told, name, i, z, u, t, place):
    """Keep what the paper looks at: spread (statistic, step): Eq. 8 of u and of the clean estimate (Eq. 4), of base;
    told (method, step): the first clean estimate, for pictures."""
    clean = z - t * u  # Eq. 4
    if name == "base":
        for kind, value in (("u", u), ("u, --fold", fold(u, *place)), ("u, 2x4x4", fold(u, 2, 4)),
                            ("clean estimate", clean)):  # of single pixels, but for what is folded
            for over in ("max", "mean"):
                spread.setdefault((f"{kind}, {over}", i), []).append(flowmo_loss(value, over=over).cpu())
    told.setdefault((name, i), clean[:1].cpu())

def premise(spread, coherent):
    """The paper's motivation: for every statistic and step of "base", its means over coherent and incoherent clips and
    its AUC for incoherent ones: {statistic: {"coherent": [...], "incoherent": [...], "auc": [...]}}."""
    found = {}
    for (kind, i), value in spread.items():
        entry = found.setdefault(kind, dict(coherent=[], incoherent=[], auc=[]))
        for key, v in (("coherent", value[coherent].mean().item()), ("incoherent", value[~coherent].mean().item()),
                       ("auc", auc(value, ~coherent))):
            entry[key].append(None if math.isnan(v) else round(v, 5))
    return found

def pictures(cfg, out, rows, videos, told, found, log):
    """samples.gif, sheet.png, estimates.png (Eqs. 4, 5) and curves.png (the paper's motivation)."""
    pages = [common.sheet([(k, v[:8, a]) for k, v in videos.items()], [f"frame {a}"], scale=max(1, 64 // cfg.size))
             for a in range(cfg.frames)]
    common.save_pages(out / "samples.gif", pages, ms=150)
    shown = [(f"{k}\nprompt {n}", videos[k][n]) for n in range(min(6, cfg.prompts))
             for k in ("base", "flowmo") if k in videos]
    page = common.sheet(shown or [(k, v[0]) for k, v in videos.items()], [f"frame {a}" for a in range(cfg.frames)],
                        scale=max(1, 64 // cfg.size))
    common.save_page(out / "sheet.png", page)
    grey = lambda z: ((z - z.min()) / (z.max() - z.min()).clamp(min=1e-6) * 255).byte().expand(-1, 3, -1, -1)  # Eq. 5
    at = sorted({i for _, i in told})[::max(1, cfg.steps // 8)]
    lines = [(f"{k}\nstep {i}", grey(told[k, i][0, :1].transpose(0, 1))) for k in videos for i in at if (k, i) in told]
    if lines:
        common.save_page(out / "estimates.png", common.sheet(lines, [f"frame {a}" for a in range(cfg.frames)],
                                                             scale=max(1, 64 // cfg.size)))
    known = lambda ys: tuple(zip(*((k, y) for k, y in enumerate(ys) if y is not None))) or ((0,), (0.5,))
    panels = [dict(title="training loss", x="step", y="loss", log=True, lines={
        "training": ([r["step"] for r in log], [r["loss"] for r in log])})] if log else []
    if found:
        panels += [dict(title=f"variance of {kind}", x="sampling step", y="Eq. 8, mean over clips", lines={
            which: known(found[kind][which]) for which in ("coherent", "incoherent")})
            for kind in ("u, max", "clean estimate, max")]
        panels.append(dict(title="AUC: does a larger variance tell an incoherent clip?", x="sampling step",
                           y="AUC; 0.5 is chance", lines={kind: known(f["auc"]) for kind, f in found.items()}))
    if panels:
        common.save_curves(out / "curves.png", panels)

COLUMNS = {"method": ("method", ""), "coherent": ("coherent", ".3f"), "coherent_ci": ("- base, 95 %", ""),
           "coherent_ci_random": ("- random, 95 %", ""), "motion_smoothness": ("smooth", ".4f"),
           "subject_consistency": ("subject", ".4f"), "dynamic_degree": ("speed", ".3f"),
           "flicker": ("flicker", ".2f"), "prompt_acc": ("prompt", ".3f"),
           "colour": ("colour", ".3f"), "form": ("form", ".3f"), "way": ("way", ".3f"),
           "patch_variance": ("variance", ".3f"), "evaluations": ("evals", "d"), "cost_ratio": ("time", ".2f")}
def check(cfg):
    """What single values cannot tell. Raises Fault."""
    if cfg.methods == "all":
        cfg.methods = ",".join(METHODS)
    common.check_names(cfg, "methods", METHODS)
    common.check_list(cfg, "fold", int, 1, 64)
    common.guided_steps(cfg)
    if cfg.size % 4 or cfg.width % 32:
        raise Fault(f"--size {cfg.size} must be a multiple of 4, --width {cfg.width} one of 32")
    fold = [int(n) for n in cfg.fold.split(",")]
    if len(fold) != 2 or cfg.frames // fold[0] < 3 or cfg.size < fold[1]:
        raise Fault(f"--fold {cfg.fold}: must be two numbers, frames and pixels, that leave three frames and one pixel")

def main():
    began, cfg = time.time(), common.parse_args("flowmo", Config, PRESETS, __doc__)
    check(cfg)
    device = common.pick_device(cfg.device)
    cfg.device = str(device)
    train_clips, test_clips, captions, test_captions, words, length, source = common.load_captioned(cfg)
    out = common.open_run("flowmo", cfg, train_clips, test_clips)
    saved = common.load_stages(out / "ckpt.pt", "flowmo", cfg, ("train", cfg.iters))
    if saved.setdefault("words", words) != words:
        raise Fault(f"{out / 'ckpt.pt'} was trained on other captions than those in --data_dir; use another --out_dir")
    moments = common.moments(train_clips)
    torch.manual_seed(cfg.seed)
    net = TextToVideo(len(words) + 1, length, cfg.size, cfg.frames, cfg.width, cfg.layers, cfg.amp,
                      cfg.checkpointing).to(device)
    average = averaged(net, cfg.ema)
    print(f"{cfg.preset} preset on {device}, {len(train_clips)} + {len(test_clips)} captioned clips ({source}), "
          f"{sum(p.numel() for p in net.parameters()):,} parameters")
    for module in (net, average.module) if cfg.compile else ():
        module.compile()
    stage = partial(common.stage, "flowmo", cfg, out, saved, train_clips, ["loss"])
    train(cfg, stage, net, average, train_clips, encode(captions, words, length), moments, device)
    net = average.module.eval().requires_grad_(False)  # no weight needs a gradient
    deciles = by_decile(cfg, net, test_clips, encode(test_captions, words, length), moments, device)
    # prompts are held-out captions without their word of quality; the noise is the same for every method
    prompts = [plain(test_captions[k % len(test_captions)]) for k in range(cfg.prompts)]
    noise = torch.randn(cfg.prompts, 3, cfg.frames, cfg.size, cfg.size, generator=make_rng(cfg.seed, 4, 0))
    rows, videos, spread, told = evaluate(cfg, net, prompts, words, noise, moments, device)
    real = torch.stack([test_clips.frames(k, 0, cfg.frames) for k in range(min(cfg.prompts, len(test_clips)))])
    found, reference = {}, [dict(method="real", motion_smoothness=smoothness(real).mean().item())]
    if source == "procedural":
        judged = common.score(rows, videos, prompts, ("base", "random"))
        common.score(reference, {"real": real}, test_captions[:len(real)])
        found = premise(spread, judged["base"]["coherent"] == 1) if "base" in judged else {}
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)], size=cfg.size)
    common.write_results(out, "flowmo", cfg, device, dataset, common.finite(rows), began,
                         loss_by_decile=common.finite(deciles), premise=common.finite(found),
                         reference=common.finite(reference))
    pictures(cfg, out, rows, videos | {"real": real}, told, found, saved["log"])
    print("\nheld-out loss by decile of t:", " ".join(f"{v:.3f}" for v in deciles))
    for kind, f in found.items():
        print(f"AUC, step 0 ... {cfg.steps - 1}, {kind + ':':22s}",
              " ".join("  - " if v is None else f"{v:.2f}" for v in f["auc"]))
    print(f"\n{cfg.prompts} prompts, Euler, {cfg.steps} steps, guided {cfg.guided}, eta {cfg.eta}\n"
          + common.table(reference + rows, COLUMNS))
    print(f"\nwrote {', '.join(p.name for p in sorted(out.iterdir()))} in {out}/ after {time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
