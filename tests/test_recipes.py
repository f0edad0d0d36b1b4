"""The README's recipes, run as they are printed against pipelines of diffusers with tiny random weights."""
import re
from pathlib import Path

import pytest
import torch

import flowmo
import motionprompt
from flowloss import TinyRAFT

diffusers = pytest.importorskip("diffusers", reason="the recipes need: pip install diffusers transformers")
transformers = pytest.importorskip("transformers", reason="the recipes need: pip install diffusers transformers")
README = (Path(__file__).parents[1] / "README.md").read_text()


def recipe(paper, change=lambda source: source):
    """What the README's recipe of that paper defines."""
    source, = re.findall(rf"```python\n(# {paper} [^\n]*diffusers.*?)```", README, re.S)
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 25 and max(map(len, lines)) <= 120
    space = {}
    exec(compile(change(source), f"README.md, {paper}", "exec"), space)
    return space


def tokenizer(words):
    """Whole words between begin and end, padded: no file and no network."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    names = ["<pad>", "<s>", "</s>", "<unk>", *words.split()]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(names)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def gradients(*modules):
    return [p for m in modules for p in m.parameters() if p.requires_grad or p.grad is not None]


# -------------------------------------------------------------------------------------------------------- FlowMo in Wan

@pytest.fixture(scope="module")
def wan():
    torch.manual_seed(0)
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    words = "a red circle moving left"
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    net = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
                                text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True])
    plan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    return WanPipeline(tokenizer=tokenizer(words), text_encoder=text, vae=vae, transformer=net, scheduler=plan)


def wan_run(wan, space, guided, eta=0.05):
    """What the scheduler makes of every step, and the loss before and after every guided one."""
    after, losses, step, guide = [], [], wan.scheduler.step, flowmo.flowmo_step
    def watched(z, velocity, eta):
        z2, u = guide(z, velocity, eta)
        with torch.no_grad():
            losses.append((flowmo.flowmo_loss(velocity(z)).item(), flowmo.flowmo_loss(u).item()))
        return z2, u
    def noted(*args, **named):
        after.append(step(*args, **named)[0])
        return after[-1:]
    space["flowmo_step"], wan.scheduler.step = watched, noted
    try:
        video = space["wan_flowmo"](wan, "a red circle moving left", guided=guided, eta=eta, steps=6, size=(17, 32, 32))
    finally:
        del wan.scheduler.step
    return video, after, losses


def test_flowmo_in_wan_lowers_its_loss(wan):
    video, after, losses = wan_run(wan, recipe("FlowMo"), range(3), 0.005)
    assert video.shape == (1, 3, 17, 32, 32) and video.isfinite().all() and len(after) == 6
    assert len(losses) == 3 and all(b < a for a, b in losses)
    assert not gradients(wan.transformer)


def test_without_the_reset_unipc_undoes_flowmo(wan):
    reset, moved = "scheduler.last_sample, scheduler.lower_order_nums = None, 0", []
    for change in (lambda s: s, lambda s: s.replace(reset, "pass")):
        plain, guided = (wan_run(wan, recipe("FlowMo", change), [2], eta)[1] for eta in (0.0, 0.05))
        assert torch.equal(guided[1], plain[1])
        moved.append((guided[2] - plain[2]).abs().mean().item())
    assert 0.04 < moved[0] < 0.06 and moved[1] < 0.25 * moved[0]  # what remains comes from u alone


# ------------------------------------------------------------------------------------------------------ FlowLoss in SVD

@pytest.fixture
def svd():
    torch.manual_seed(0)
    from diffusers import (AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline,
                           UNetSpatioTemporalConditionModel)
    net = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=2, projection_class_embeddings_input_dim=24, addition_time_embed_dim=8)
    vae = AutoencoderKLTemporalDecoder(block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2)
    image = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56,
        intermediate_size=16)).eval()
    return StableVideoDiffusionPipeline(vae, image, net, EulerDiscreteScheduler(), transformers.CLIPImageProcessor())


def moving(B=2, T=4, size=32):
    """A square that moves to the right, (B, 3, T, H, W) in [-1, 1]."""
    video = -torch.ones(B, 3, T, size, size)
    for t in range(T):
        video[:, :, t, 10:20, 4 + 2 * t:14 + 2 * t] = 1
    return video


def test_flowloss_in_svd_decodes_only_what_the_gate_lets_through(svd):
    space, raft, decoded, decode = recipe("FlowLoss"), TinyRAFT().requires_grad_(False), [], svd.vae.decode
    levels, gate = [], space["gate"]
    space["gate"] = lambda sigma, psi: levels.append(sigma) or gate(sigma, psi)
    svd.vae.decode = lambda z, **named: decoded.append(len(z)) or decode(z, **named)
    def of(psi, scale=0.1):
        decoded.clear()
        svd.unet.zero_grad()
        torch.manual_seed(3)
        value = space["svd_loss"](svd, moving(), raft, psi=psi, scale=scale)
        value.backward()
        return value.item(), svd.unet.conv_in.weight.grad.clone(), sum(decoded)
    closed, both = of(1e-9), of(1e9)
    one = of(levels[0].mean().item())
    assert [closed[2], one[2], both[2]] == [0, 4, 8]  # frames
    recon = of(1e9, scale=0.0)
    assert closed[0] == recon[0] < one[0] < both[0]
    assert torch.equal(closed[1], recon[1]) and not torch.allclose(one[1], recon[1])


def test_flowloss_in_svd_falls(svd):
    loss, raft = recipe("FlowLoss")["svd_loss"], TinyRAFT().requires_grad_(False)
    optimiser, values = torch.optim.AdamW(svd.unet.parameters(), 1e-3), []
    for _ in range(6):
        torch.manual_seed(3)
        value = loss(svd, moving(), raft, psi=1e9, scale=0.01)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.95 * values[0]
    assert not gradients(svd.vae) and all(p.grad is None for p in svd.image_encoder.parameters())


# ------------------------------------------------------------------------------------------ MotionPrompt in AnimateDiff

@pytest.fixture(scope="module")
def animatediff():
    torch.manual_seed(0)
    from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
    net = UNet2DConditionModel(block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
                               down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
                               up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    vae = AutoencoderKL(block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
                        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4)
    adapter = MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
                            motion_num_attention_heads=2)
    return AnimateDiffPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer("a red circle moving authentic steady"),
                               unet=net, motion_adapter=adapter, scheduler=DDIMScheduler(beta_schedule="linear"))


def test_motionprompt_in_animatediff_moves_new_tokens_only_and_its_loss_falls(animatediff):
    space, tokens, logits, plain = recipe("MotionPrompt"), [], [], []
    def watched(denoise, encode, prompt, start, x, *rest, inner):
        pairs = lambda B: (torch.tensor([[0]]), torch.tensor([[3]]))  # always the same, so that losses compare
        assert start.shape == (1, 2, 16)  # two words
        def noted(ids, T):
            plain.append(T is None)
            return encode(ids, T)
        seen = lambda step, T: tokens.append((T - start).abs().max().item())
        return motionprompt.motionprompt(denoise, noted, prompt, start, x, *rest[:-1], pairs, inner=inner, watch=seen)
    space["motionprompt"] = watched
    table = animatediff.text_encoder.get_input_embeddings().weight.clone()
    def discriminate(flow):
        logits.append(flow.square().mean((1, 2, 3)))
        return 1e3 * logits[-1]
    video = space["animate"](animatediff, "a red circle moving", lambda a, b: (b - a)[:, :2], discriminate,
                             words="authentic steady", K=4, lr=0.05, weights=(1, 0, 0), steps=4, frames=4, size=8)
    assert video.shape == (1, 3, 4, 16, 16) and video.isfinite().all()
    assert len(tokens) == 2 and min(tokens) > 0.05
    assert plain == 5 * [False] + 5 * [False] + [True] * 2  # the second half has the plain prompt
    steps = torch.cat(logits).view(2, 4)
    assert (steps.diff(dim=1) > 0).all()  # log(1 - phi) falls as the logit rises
    assert torch.equal(table, animatediff.text_encoder.get_input_embeddings().weight)
    assert not gradients(animatediff.unet, animatediff.vae, animatediff.text_encoder)
    assert not animatediff.text_encoder.get_input_embeddings()._forward_hooks


# --------------------------------------------------------------------------------------------- Bi-flow with UNet2DModel

def test_biflow_with_unet2dmodel_learns_and_streams():
    torch.manual_seed(0)
    space = recipe("Bi-flow")
    nets = space["networks"](sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                             down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    frames = moving(4, 2, 16)
    optimiser, values = torch.optim.AdamW(nets.parameters(), 2e-3), []
    for k in range(40):
        loss = space["training_loss"](nets, frames[:, :, 0], frames[:, :, 1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.6 * sum(values[:5])
    out = space["video"](nets.eval(), frames[:, :, 0], eps=0.1)
    for _ in range(2):
        x, evaluations = next(out)
        assert x.shape == (4, 3, 16, 16) and x.abs().max() <= 1 and (evaluations >= 2).all()
    a, b = (torch.stack(space["field_of"](nets)(x, torch.ones(4), s * torch.ones(4))) for s in (0, 1))
    assert not torch.allclose(a, b)  # the networks know alpha
