"""FlowMo (Shaulov, Hazan, Wolf and Chefer, NeurIPS 2025), https://arxiv.org/abs/2506.01144

A text-to-video model's own prediction tells how restless the motion will
be: what differs between neighbouring frames of it should vary little over
time. FlowMo moves the noisy video, in early steps of sampling, so that it
varies less at the worst place. Nothing is trained.

    Eq. 1   flow matching   z_t = (1 - t) z_1 + t z_0,  u(z_t, t) -> z_0 - z_1
                            z_0: noise, at t = 1; z_1: the video, at t = 0
            with a prompt   u = u_0 + w (u_P - u_0)             u_P with, u_0 without it:
                            classifier-free guidance (CFG); the paper's rho is our w - 1
    Eq. 2   debiasing       (Delta u)_f = | u_{f+1} - u_f |     everywhere
    Eq. 3   variance        sigma2_{w,h,c} = Var_f (Delta u)_{f,w,h,c}
    Eq. 7   place           s_{w,h} = mean_c sigma2_{w,h,c}     the paper's patch
    Eq. 8   loss            L = max_{w,h} s_{w,h}
    Eq. 9   guidance        z <- z - eta grad_z L               then u is evaluated again

The optimiser of Eq. 9 is Adam, new at every step. Its first step divides
a gradient by its own size, so every element of z that L depends on moves
by eta. Left out: Eqs. 4 and 5, pictures of the clean estimate z - t u,
and Eq. 6, a sampler's step that is misprinted.

    python flowmo.py                                    # 2 minutes on two cores
    python flowmo.py --prompt "a red circle moving up"  # one gif, without and with it
    python flowmo.py --train --preset tiny              # the shipped model anew: 50 minutes

A run prints how many clips move as one thing, told by tracking the shape:
without guidance, with random steps as large, and with FlowMo.
"""
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

# Before torch: threads that wait must sleep, or a busy neighbour makes training 100 times slower.
if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

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

SHIPPED = Path(__file__).resolve().parent / "assets" / "models" / "sprites.pt"
SAVE_EVERY = 500  # training steps
PLACE = 4  # a place of the paper's latent is 8x8 pixels; 4x4 of these small clips

@dataclass
class Config:
    dataset: str = opt("sprites", "sprites, or a folder of your captioned clips in --data_dir")
    data_dir: str = opt("", "where DATASET/{train,test}/ lies; else data", free=True)
    preset: str = opt("tiny", "tiny (two CPU cores), small (one GPU, never run to its end)")
    prompt: str = opt("", "sample this, without and with FlowMo: one gif", free=True)
    train: bool = opt(False, "train a text-to-video model first")
    model: str = opt("", "a ckpt.pt of --train to sample from; empty: the shipped one")
    resume: bool = opt(False, "go on with the training in the output folder", free=True)
    eval_only: bool = opt(False, "evaluate the run in the output folder again", free=True)
    out_dir: str = opt("", "the run's folder; else out/flowmo-DATASET[-procedural]", free=True)
    device: str = opt("auto", "auto (cuda if it is there, else cpu), cpu, cuda, mps", free=True)
    compile: bool = opt(False, "torch.compile the network", free=True)
    amp: bool = opt(False, "bfloat16 autocast inside the network")
    seed: int = opt(0, "of weights, data, noise and prompts", 0, 2**31)
    prompts: int = opt(128, "prompts to sample, those of the test clips", 2, 10**5, free=True)
    steps: int = opt(16, "steps of the Euler sampler", 1, 10000, free=True)
    sample_batch: int = opt(32, "videos sampled at once", 1, 65536, free=True)
    guidance_scale: float = opt(2.0, "w of classifier-free guidance; 1: none", 0, 100, free=True)
    guided: str = opt("5-10", "guided steps from 0, ranges with commas between", free=True)
    eta: float = opt(0.05, "how far a guided step moves every element of z", 0, 100, free=True)
    iters: int = opt(12000, "--train: steps", 1, 10**8)
    batch: int = opt(16, "--train: clips in a batch", 1, 65536)
    lr: float = opt(1.5e-3, "--train: AdamW's learning rate", 0, 1)
    size: int = opt(16, "--train: height and width of a frame, a multiple of 4", 8, 1024)
    frames: int = opt(8, "--train: frames of a clip", 4, 256)
    width: int = opt(128, "--train: channels of the transformer, a multiple of 32", 32, 4096)
    layers: int = opt(3, "--train: layers of the transformer", 1, 100)
    ema: float = opt(0.995, "--train: decay of the average of weights", 0, 0.999999)
    clips: int = opt(8000, "--train: clips of the procedural world", 2, 10**6)

PRESETS = {
    "tiny": {},
    "small": dict(
        iters=8000, batch=64, size=32, frames=16, width=384, layers=8, lr=5e-4, ema=0.999,
        clips=40000, prompts=256, steps=50, guided="16-31", amp=True,
    ),
}

# The paper guides the first 12 of Wan's 50 steps, t = 1 to 0.946, with eta = 0.005 and w = 5. We
# guide t = 0.69 to 0.38: of clips so small, L tells only there which will be incoherent.

# B, C, T, H, W: batch, channels, frames, height, width. z_1: the video, of variance 1; z_0: noise.
# t: the clock, (B,). c: what the text encoder makes of a caption, (B, L, d).

# ---------------------------------------- THE METHOD
# From place_variance to flowmo_step is one block to paste. It needs torch.

def interpolate(z_1, z_0, t):
    """z_t between video z_1 and noise z_0, (B, ...) both; t (B,). FlowMo, Eq. 1."""
    return like(1 - t, z_1) * z_1 + like(t, z_1) * z_0

def flow_matching_loss(u, z_1, z_0, t):
    """Eq. 1's loss of every video, (B,), over the error of the best linear guess at this t."""
    error = (u - (z_0 - z_1)).square().flatten(1).mean(1)  # Eq. 1
    return (t**2 + (1 - t) ** 2) * error

def prompted(network, c, c_0, guidance_scale):
    """velocity(z, t (B,)) -> u: classifier-free guidance, its two passes in one batch.

    network(z, t, c) -> u; c (B, L, d) encodes the prompts, c_0 (1, L, d) an empty one.
    """
    def velocity(z, t):
        both = torch.cat([c, c_0.expand_as(c)])
        u_P, u_0 = network(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return u_0 + guidance_scale * (u_P - u_0)  # Eq. 1, with a prompt

    return velocity

def place_variance(u, frames=2, channels=1):
    """s of every place of every video, (B, places), float32. FlowMo, Eqs. 2, 3 and 7.

    u: a prediction (B, ...) of any layout, three frames or more.
    frames, channels: which axes those are; all others are space.
    """
    d = u.float().diff(dim=frames).abs()  # Eq. 2: one frame less than u
    variance = d.var(frames, unbiased=False, keepdim=True)  # Eq. 3
    s = variance.mean(channels, keepdim=True)  # Eq. 7
    return s.flatten(1)

def flowmo_loss(u, frames=2, channels=1):
    """L of every video, (B,), float32. FlowMo, Eq. 8. Arguments as in place_variance."""
    s = place_variance(u, frames, channels)
    return s.amax(1)  # Eq. 8: the worst place

def flowmo_step(z, velocity, eta, loss=flowmo_loss):
    """What comes before a guided step of the sampler: the moved z, and u there.

    FlowMo, Algorithm 1, lines 1 to 12. z (B, ...), best in float32: in bfloat16 an eta of 0.005
    is less than the type can tell. velocity(z) -> u like z, noise less video, with guidance; freeze
    its weights, and let no no_grad be in it. loss(u) -> (B,). Works under no_grad, and returns no
    graph. A solver that goes back to an earlier z, as Wan's UniPC, undoes the step. Raises
    RuntimeError under inference_mode, FloatingPointError if the gradient is not finite.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("FlowMo needs a gradient: use torch.no_grad(), not inference_mode()")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        u = velocity(z)
        # 1024: else a gradient that passes through a float16 network would be 0 there.
        gradient, = torch.autograd.grad(1024 * loss(u).sum(), z)
    gradient = gradient.float() / 1024
    if not gradient.isfinite().all():
        raise FloatingPointError("the gradient of FlowMo's loss is not finite: is u, or is 1024 "
                                 "times the loss more than the network's type can hold?")
    direction = gradient / (gradient.abs() + 1e-8)  # the first step of Adam
    z = (z.detach().float() - eta * direction).to(z.dtype)  # Eq. 9
    with torch.no_grad():
        return z, velocity(z)

# ---------------------------------------- beside the method: the control; a place, in pixels

def random_step(z, velocity, eta, rng):
    """The control: every element of z moves by eta, up or down by chance."""
    coin = torch.randint(2, z.shape, generator=rng).to(z)
    z = z + eta * (2 * coin - 1)
    return z, velocity(z)

def as_places(u, pixels):
    """(B, C, T, H, W) -> (B, C pixels^2, T, H / pixels, W / pixels): squares become places."""
    return F.pixel_unshuffle(u.transpose(1, 2), pixels).transpose(1, 2)

# ---------------------------------------- sampler

def time_grid(steps, shift=1.0):
    """Times from 1 (noise) to 0, (steps + 1,). shift: t -> s t / (1 + (s - 1) t); Wan has 5."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)

@torch.no_grad()
def sample(velocity, z, times, guide=None, guided=()):
    """Euler's steps from z at times[0] to times[-1]; z (B, ...), velocity(z, t (B,)) -> u.

    In the steps `guided`, guide(z, velocity_now) -> (z, u) comes first.
    """
    for step, (now, then) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        t = torch.full((len(z),), now, device=z.device)

        def velocity_now(z):
            return velocity(z, t)

        if guide is not None and step in guided:
            z, u = guide(z, velocity_now)
        else:
            u = velocity_now(z)
        z = z + (then - now) * u  # Eq. 1: u is dz / dt
    return z

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

def build(cfg, words, length):
    return TextToVideo(len(words), length, cfg.size, cfg.frames, cfg.width, cfg.layers, cfg.amp)

# ---------------------------------------- train

def move_last_word(text, rng):
    """The last word moves by up to SPARE places: so places behind a caption get a meaning."""
    rows = torch.arange(len(text))
    last = (text > 0).sum(1).clamp(min=1) - 1  # (B,)
    moved = text.clone()
    moved[rows, last] = 0
    moved[rows, last + torch.randint(SPARE + 1, last.shape, generator=rng)] = text[rows, last]
    return moved

def train(cfg, clips, captions, out, device):
    """The text-to-video model, as flow matching. Returns it, of averaged weights, and its words."""
    split = [common.split_words(caption) for caption in captions]
    words = sorted(set().union(*split))
    length = max(len(caption) for caption in split) + SPARE
    text = common.to_indices(captions, words, length)  # (N, L)
    torch.manual_seed(cfg.seed)
    net = build(cfg, words, length).to(device)
    some = [clips.frames(k, 0, cfg.frames) for k in range(min(500, len(clips)))]
    some = to_float(torch.cat(some))
    net.mean.fill_(some.mean())
    net.std.fill_(some.std())
    average = AveragedModel(net, multi_avg_fn=common.ema_decay(cfg.ema))
    # Text has a tenth of the rate, or words move faster than they are learned.
    slow = {net.order, *net.embed.parameters(), *net.text.parameters()}
    groups = [dict(params=[p for p in net.parameters() if p not in slow], factor=1.0),
              dict(params=[p for p in net.parameters() if p in slow], factor=0.1)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device.type != "mps")
    saved = common.restore(
        out / "ckpt.pt", "flowmo", cfg, net=net, average=average, optimizer=optimizer)
    if saved.get("words", words) != words:
        raise Fault(f"{out / 'ckpt.pt'} was trained on other captions: name another --out_dir")
    log = common.Log(cfg.iters, saved["step"], saved["log"])
    if cfg.compile:
        net.compile()
    batches = common.Batches(clips, cfg.batch, cfg.frames, cfg.seed)

    def draw(step):
        frames = batches[step - 1]  # they count from 0
        rng = make_rng(cfg.seed, 1, step)
        z_0 = torch.randn(frames.transpose(1, 2).shape, generator=rng)  # (B, 3, T, H, W)
        t = torch.rand(cfg.batch, generator=rng)
        near = torch.rand(cfg.batch, generator=rng) < 0.4  # noise, where it is decided what moves
        t = torch.where(near, 0.85 + 0.15 * t, t)
        stays = torch.rand(cfg.batch, 1, generator=rng) >= 0.1  # the others teach u_0
        clip, _ = batches.where(step - 1)
        said = stays * move_last_word(text[clip], make_rng(cfg.seed, 2, step))  # (B, L)
        return frames, z_0, t, said

    loader = common.prefetched(draw, saved["step"], cfg.iters, device)
    for step, (frames, z_0, t, said) in loader:
        z_1 = (to_float(frames).transpose(1, 2) - net.mean) / net.std  # (B, 3, T, H, W)
        z = interpolate(z_1, z_0, t)
        c = net.encode(net.embed(said))
        loss = flow_matching_loss(net(z, t, c), z_1, z_0, t).mean()

        decay = 2.5 * (1 - step / cfg.iters)  # in the last 40 %
        share = min(1, step / 100, decay + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * cfg.lr * share
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)

        stop = log.add(step, loss=loss)
        if step % SAVE_EVERY == 0 or step == cfg.iters or stop:
            common.save_checkpoint(
                out, "flowmo", cfg, log, step=step, words=words, length=length,
                model=average.module.state_dict(), net=net.state_dict(),
                average=average.state_dict(), optimizer=optimizer.state_dict())
        if stop:
            raise KeyboardInterrupt
    log.close()
    return average.module.eval().requires_grad_(False), words

# ---------------------------------------- load

def load_model(cfg, device):
    """A text-to-video model and its words. Its shape goes into cfg. Raises Fault."""
    if cfg.prompt or cfg.eval_only:
        common.use_run("flowmo", cfg, "model")
    path = Path(cfg.model or SHIPPED).expanduser()
    saved = common.load_checkpoint(path, "flowmo")
    made = saved["config"]
    if saved["step"] != made["iters"]:
        raise Fault(f"{path} has {saved['step']} of {made['iters']} steps of training: --resume "
                    "makes the others")
    for name in ("size", "frames", "width", "layers"):
        setattr(cfg, name, made[name])
    net = build(cfg, saved["words"], saved["length"])
    net.load_state_dict(saved["model"])
    print(f"text-to-video model: {path}, {cfg.frames} frames of {cfg.size} pixels")
    return net.to(device).eval().requires_grad_(False), saved["words"]

# ---------------------------------------- sample and evaluate

METHODS = {"base": "no guidance", "random": "random step", "flowmo": "FlowMo"}

@torch.no_grad()
def compare(cfg, net, words, prompts, methods):
    """One video of each prompt by every method, all from the same noise.

    Returns rows and {method: uint8 (N, T, 3, H, W)}. Evaluations and seconds are of one video; the
    gradient of a guided step takes about two evaluations more.
    """
    device = net.mean.device
    shape = (len(prompts), *net.shape)
    noise = torch.randn(shape, generator=make_rng(cfg.seed, 3, 0)).to(device)
    text = common.to_indices(prompts, words, net.length).to(device)
    c_0 = net.encode(net.embed(0 * text[:1]))
    times = time_grid(cfg.steps)
    size = cfg.sample_batch
    starts = range(0, len(prompts), size)
    if cfg.compile:
        net.compile()

    def loss(u):
        return flowmo_loss(as_places(u, PLACE))

    def one_batch(a, method, times, guided, rng):
        def guide(z, velocity):
            if method == "random":
                return random_step(z, velocity, cfg.eta, rng)
            return flowmo_step(z, velocity, cfg.eta, loss)

        c = net.encode(net.embed(text[a:a + size]))
        velocity = common.counted(prompted(net, c, c_0, cfg.guidance_scale))
        z = sample(velocity, noise[a:a + size], times, guide, guided)
        return to_uint8(z * net.std + net.mean).transpose(1, 2), velocity.calls

    for a in {starts[0], starts[-1]}:  # once untimed: it compiles, and wakes the device
        one_batch(a, "flowmo", times[:2], {0}, None)
    rows = []
    videos = {}
    for method in methods:
        guided = set() if method == "base" else common.guided_steps(cfg)
        rng = make_rng(cfg.seed, 4, 0)
        made = []
        began = time.perf_counter()
        for a in tqdm(starts, f"sampling, {METHODS[method]}", leave=False):
            video, calls = one_batch(a, method, times, guided, rng)
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
    "over_random_text": ("than random", ""), "obeyed": ("obeyed", ".3f"),
    "speed": ("px a frame", ".2f"), "evaluations": ("evaluations", "d"),
    "cost_ratio": ("time", ".2f"),
}

# ---------------------------------------- main

def main():
    began = time.time()
    cfg = common.parse_args("flowmo", Config, PRESETS, __doc__)
    common.guided_steps(cfg)  # or a Fault
    trains = cfg.train and not cfg.eval_only
    if trains and (cfg.prompt or cfg.model):
        raise Fault("--train makes a model: leave --prompt and --model out")
    device = common.pick_device(cfg.device)
    if not trains:
        net, words = load_model(cfg, device)
    if cfg.size % 4:
        raise Fault(f"--size {cfg.size}: must be a multiple of 4")
    if cfg.width % 32:
        raise Fault(f"--width {cfg.width}: must be a multiple of 32")
    if cfg.prompt:
        common.check_prompt("prompt", cfg.prompt, words, net.length)
        _, videos = compare(cfg, net, words, 4 * [cfg.prompt], ["base", "flowmo"])
        gif = Path(cfg.out_dir or "out", "flowmo-prompt.gif")
        common.save_gif(gif, videos, width=96, ms=150)
        print(f"wrote {gif}")
        return
    common.check_folder("flowmo", cfg, common.source_of(cfg))
    counts = (cfg.clips if trains else 2, 512)  # sampling needs no training clips
    train_clips, test_clips, source = common.load_clips(
        cfg.dataset, cfg.data_dir, cfg.size, counts, cfg.frames, cfg.seed, min_frames=cfg.frames)
    test_captions = common.captions_of(test_clips, cfg.dataset)
    if trains:
        captions = common.captions_of(train_clips, cfg.dataset)
    else:
        common.check_words(test_captions, words)
    out = common.open_run("flowmo", cfg, train_clips, test_clips)
    print(f"preset {cfg.preset} on {device}, {len(train_clips)} + {len(test_clips)} {source} clips")

    if trains:
        net, words = train(cfg, train_clips, captions, out, device)
    if source == "procedural":
        test_captions = [common.strip_quality_words(caption) for caption in test_captions]
    prompts = [test_captions[k % len(test_captions)] for k in range(cfg.prompts)]
    rows, videos = compare(cfg, net, words, prompts, METHODS)
    if source == "procedural":
        scores = common.score(videos, prompts, ("base", "random"))
        for row, score in zip(rows, scores.values()):
            row.update(score)
    dataset = dict(name=cfg.dataset, source=source, clips=[len(train_clips), len(test_clips)])
    common.write_results(out, "flowmo", cfg, device, dataset, rows, began)
    shown = {"without": videos["base"], "FlowMo": videos["flowmo"]}
    common.save_changes(out, shown, prompts, source == "procedural")
    print(f"\n{cfg.prompts} prompts, {cfg.steps} steps of Euler's, guided {cfg.guided}, "
          f"eta {cfg.eta}")
    print(common.table(rows, COLUMNS))
    print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} in {out}/")
    print(f"{time.time() - began:.0f} s")

if __name__ == "__main__":
    common.run(main)
