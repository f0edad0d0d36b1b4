"""The four methods in pipelines of diffusers: to import, or to copy into your own project.

pip install diffusers transformers. Each function is tested on the pipeline's real classes with tiny
random weights, not on trained ones. Pipelines in bfloat16 and float16 work; the methods compute in
float32 where a small type would lose what matters.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from biflow import biflow_loss, biflow_step, solve_heun, stream  # noqa: E402
from common import like  # noqa: E402
from flowloss import flow_loss, gate, recon_loss  # noqa: E402
from flowmo import flowmo_step  # noqa: E402
from motionprompt import flow_of_pairs, motion_loss, motionprompt, random_pairs  # noqa: E402

# ---------------------------------------- FlowMo in Wan

def wan_flowmo(pipe, prompt, negative="", image=None, guided=range(12), eta=0.005,
               guidance_scale=5.0, steps=50, size=(81, 480, 832), seed=0, checkpointing=False):
    """A video (1, 3, T, H, W) in [-1, 1] by WanPipeline and its UniPC scheduler, with FlowMo.

    size: T, H, W. image (1, 3, H, W) in [-1, 1]: by WanImageToVideoPipeline instead.
    checkpointing: the gradient of a guided step keeps less and takes a forward pass more.
    """
    transformer = pipe.transformer.requires_grad_(False)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    scheduler = pipe.scheduler
    device = pipe._execution_device
    frames, height, width = size
    rng = torch.Generator().manual_seed(seed)
    channels = pipe.vae.config.z_dim
    shape = (channels, height, width, frames, torch.float32, device, rng)
    more = {}
    with torch.no_grad():
        text = torch.cat(pipe.encode_prompt(prompt, negative, device=device))
        text = text.to(transformer.dtype)
        if image is None:
            z = pipe.prepare_latents(1, *shape)
            condition = z[:, :0]
        else:
            image = image.to(device, pipe.vae.dtype)
            z, condition = pipe.prepare_latents(image, 1, *shape)
            if transformer.config.image_dim:
                seen = pipe.encode_image([image[0].float().add(1).div(2).clamp(0, 1)], device)
                more["encoder_hidden_states_image"] = seen.to(transformer.dtype).expand(2, -1, -1)
    scheduler.set_timesteps(steps, device)

    for step, t in enumerate(scheduler.timesteps):
        def velocity(z):
            x = torch.cat([z, condition], 1).to(transformer.dtype)
            both = torch.cat([x, x])
            u = transformer(both, t.expand(2), text, **more, return_dict=False)[0]
            u_P, u_0 = u.float().chunk(2)
            return u_0 + guidance_scale * (u_P - u_0)

        if step in guided:
            z, u = flowmo_step(z, velocity, eta)
            scheduler.last_sample = None  # else UniPC goes back to the z of the step before
            scheduler.lower_order_nums = 0
        else:
            with torch.no_grad():
                u = velocity(z)
        z = scheduler.step(u, t, z, return_dict=False)[0]

    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1).to(z)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1).to(z)
    with torch.no_grad():
        return pipe.vae.decode((z * std + mean).to(pipe.vae.dtype)).sample.float()

# ---------------------------------------- FlowLoss in Stable Video Diffusion

def svd_loss(pipe, video, estimate, psi=1.0, scale=0.1, fps=6, bucket=127, augment=0.02):
    """The loss of a training step of StableVideoDiffusionPipeline: EDM, v-prediction.

    video (B, 3, T, H, W) in [-1, 1]; estimate(image1, image2) -> flow, as torch_raft() makes one.
    fps, bucket, augment: what SVD is told of the clip.
    """
    B, _, T = video.shape[:3]
    vae = pipe.vae.requires_grad_(False)
    factor = vae.config.scaling_factor
    dtype = pipe.unet.dtype

    def decode(z):  # (N, C, T, h, w) -> (N, 3, T, H, W)
        frames = (z / factor).transpose(1, 2).flatten(0, 1).to(vae.dtype)
        return vae.decode(frames, num_frames=T).sample.unflatten(0, (-1, T)).transpose(1, 2)

    with torch.no_grad():
        frames = video.transpose(1, 2).flatten(0, 1).to(vae.dtype)
        y = factor * vae.encode(frames).latent_dist.sample()
        y = y.unflatten(0, (B, T)).transpose(1, 2).float()  # (B, 4, T, H/8, W/8)
        start = video[:, :, 0]
        noisy = start + augment * torch.randn_like(start)
        first = vae.encode(noisy.to(vae.dtype)).latent_dist.mode().float()
        small = F.interpolate(start / 2 + 0.5, (224, 224), mode="bicubic", antialias=True)
        image = pipe._encode_image(small.clamp(0, 1), y.device, 1, False).to(dtype)

    sigma = (0.7 + 1.6 * torch.randn(B, device=y.device)).exp()
    x = y + like(sigma, y) * torch.randn_like(y)
    root = like((sigma**2 + 1).sqrt(), y)
    both = torch.cat([x / root, first[:, :, None].expand_as(y)], 1).transpose(1, 2)
    told = torch.tensor([[fps, bucket, augment]], device=y.device, dtype=dtype).expand(B, 3)
    v = pipe.unet(both.to(dtype), sigma.log() / 4, image, told).sample.float().transpose(1, 2)
    D = x / root**2 - like(sigma, y) / root * v

    t = torch.randint(1, T, (B, 1), device=y.device)
    pairs = torch.stack([0 * t, t], -1)  # one a clip: from the first frame to another
    w = gate(sigma, psi)  # 0 from psi on: such clips are not decoded, and no flow is read
    loss = recon_loss(D, y, sigma) + flow_loss(estimate, decode, D, video, w, sigma, pairs, scale)
    return loss.mean()

def torch_raft(raft):
    """estimate(image1, image2) -> flow of torchvision's raft_small or raft_large.

    For pictures of 128 px and more; the tiny one of this project knows only small ones. The sides
    must be multiples of 8.
    """
    raft = raft.eval().requires_grad_(False)

    def estimate(image1, image2):
        return raft(image1.float(), image2.float(), num_flow_updates=12)[-1]

    return estimate

# ---------------------------------------- MotionPrompt in AnimateDiff

def animate(pipe, prompt, estimate, discriminate, words="authentic", K=3, lr=1e-3,
            lambdas=(1, 0.1, 1), guided=range(4, 15), guidance_scale=7.5, steps=25, frames=16,
            size=64):
    """A video (1, 3, T, H, W) in [-1, 1] by AnimateDiffPipeline and its CLIP text encoder.

    estimate(image1, image2) -> flow; discriminate(flow) -> logit of being real; size: of a latent.
    """
    unet = pipe.unet.requires_grad_(False)
    vae = pipe.vae.requires_grad_(False)
    clip = pipe.text_encoder.requires_grad_(False)
    device = unet.device
    dtype = unet.dtype
    table = clip.get_input_embeddings()

    def ids(text):
        found = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
        return found.input_ids.to(device)

    at = len(pipe.tokenizer(prompt).input_ids) - 1  # where the tokens stand: before the end
    n = len(pipe.tokenizer(words).input_ids) - 2  # without begin and end
    short = ids(prompt)
    long = ids(f"{prompt} {words}")

    def encode(T):  # through the whole text encoder, in the place of the words
        if T is None:
            return clip(short)[0]

        def put(module, inputs, embedded):
            return torch.cat([embedded[:, :at], T.to(embedded), embedded[:, at + n:]], 1)

        with table.register_forward_hook(put):
            return clip(long)[0]

    # sigma of EDM, where x = z / sqrt(alpha)
    levels = (1 / pipe.scheduler.alphas_cumprod - 1).sqrt().to(device)
    used = torch.linspace(len(levels) - 1, 0, steps).long()
    sigmas = torch.cat([levels[used], torch.zeros(1, device=device)]).float()

    def conditional(x, sigma, c):  # the network predicts the noise: D = x - sigma n
        z = x / (sigma[0] ** 2 + 1).sqrt()
        t = (levels - sigma[0]).abs().argmin()
        noise = unet(z.to(dtype), t, c.to(dtype).repeat_interleave(frames, 0)).sample
        return x - sigma[0] * noise.float()

    with torch.no_grad():
        c_0 = clip(ids(""))[0]
        T0 = table(long)[:, at:at + n].float()

    def denoise(x, sigma, c):
        D_0 = conditional(x, sigma, c_0)
        return D_0 + guidance_scale * (conditional(x, sigma, c) - D_0)

    def decode(z):  # (N, 4, T, h, w) -> (N, 3, T, H, W)
        flat = (z / vae.config.scaling_factor).transpose(1, 2).flatten(0, 1)
        video = vae.decode(flat.to(vae.dtype)).sample.float()
        return video.unflatten(0, (len(z), -1)).transpose(1, 2)

    def loss(D, T):
        i, j = random_pairs(len(D), frames, 1, frames // 2, None)
        flow = flow_of_pairs(D, i, j, decode, estimate)
        return motion_loss(discriminate(flow), flow, T, T0, lambdas)

    x = sigmas[0] * torch.randn(1, 4, frames, size, size).to(device)
    x, _ = motionprompt(denoise, conditional, encode, T0, x, sigmas, guided, loss, K, lr)
    with torch.no_grad():
        return decode(x)

# ---------------------------------------- Bi-flow with diffusers' UNet2DModel

def networks(**config):
    """Two UNets 3 -> 3 of t and, as the label, alpha; config as UNet2DModel's.

    One for the velocity and one for the noise, as in the authors' code.
    """
    from diffusers import UNet2DModel
    more = dict(in_channels=3, out_channels=3, class_embed_type="timestep")
    return torch.nn.ModuleList([UNet2DModel(**more, **config) for _ in range(2)])

def field_of(nets):
    """field(x, t, alpha) -> v, n; t and alpha go in unscaled, as the authors' networks have it."""
    def field(x, t, alpha):
        return [net(x, t, class_labels=alpha).sample for net in nets]

    return field

def training_loss(nets, x0, x1):
    """x0, x1 (B, 3, H, W) in [-1, 1]: a frame and the next."""
    t, alpha = torch.rand(2, len(x0), device=x0.device)
    v, n = biflow_loss(field_of(nets), x0, x1, t, alpha, torch.randn_like(x0))
    return (v + n).mean()

def stream_video(nets, first, eps=0.2):
    """Yields the frames after first (B, 3, H, W), and the evaluations of each, for ever."""
    def step(x, n):
        return biflow_step(field_of(nets), x, n, eps, solve_heun)

    yield from stream(step, first)

# ---------------------------------------- several GPUs

def distributed(net):
    """The network as one field of all processes of `torchrun --nproc_per_node N train.py`.

    Use it as the field of biflow_loss, and give every process clips of its own: backward() then
    has the mean gradient of all. gloo on CPU, nccl on CUDA.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend)
    if backend == "nccl":
        device = torch.distributed.get_rank() % torch.cuda.device_count()
        torch.cuda.set_device(device)
        net = net.to(device)
    return torch.nn.parallel.DistributedDataParallel(net)
