"""recipes.py against pipelines of diffusers with tiny random weights."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import flowmo
import motionprompt
from conftest import ROOT
import recipes
from flowloss import TinyRAFT

try:
    import diffusers
    import transformers
except ImportError:
    diffusers = None


@pytest.fixture(scope="module")
def peers():
    """For tests on real pipelines; the others run without."""
    if diffusers is None:
        pytest.skip("pip install diffusers transformers")


def tokenizer(words):
    """Whole words between begin and end, padded: no file and no network."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["<pad>", "<s>", "</s>", "<unk>", *words.split()]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(names)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>"
    )


def gradients(*modules):
    return [p for m in modules for p in m.parameters() if p.requires_grad or p.grad is not None]


# ---------------------------------------- FlowMo in Wan


@pytest.fixture(scope="module")
def wan(peers):
    torch.manual_seed(0)
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    words = "a red circle moving left"
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        )
    ).eval()
    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    plan = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return WanPipeline(
        tokenizer=tokenizer(words), text_encoder=text, vae=vae, transformer=net, scheduler=plan
    )


def wan_run(wan, monkeypatch, guided, eta=0.05, **more):
    """What the scheduler makes of every step, and the loss before and after every guided one."""
    after, losses, step = [], [], wan.scheduler.step

    def watched(z, velocity, eta):
        moved, u = flowmo.flowmo_step(z, velocity, eta)
        with torch.no_grad():
            losses.append((flowmo.flowmo_loss(velocity(z)).item(), flowmo.flowmo_loss(u).item()))
        return moved, u

    def noted(*args, **named):
        after.append(step(*args, **named)[0])
        return after[-1:]

    with monkeypatch.context() as m:
        m.setattr(recipes, "flowmo_step", watched)
        m.setattr(wan.scheduler, "step", noted)
        video = recipes.wan_flowmo(
            wan,
            "a red circle moving left",
            guided=guided,
            eta=eta,
            steps=6,
            size=(17, 32, 32),
            **more,
        )
    return video, after, losses


def test_flowmo_in_wan_lowers_its_loss(wan, monkeypatch):
    video, after, losses = wan_run(wan, monkeypatch, range(3), 0.005)
    assert video.shape == (1, 3, 17, 32, 32) and video.isfinite().all() and len(after) == 6
    assert len(losses) == 3 and all(b < a for a, b in losses)
    assert not gradients(wan.transformer)


def test_checkpointing_in_wan_gives_the_same_video(wan, monkeypatch):
    plain = wan_run(wan, monkeypatch, range(2))[0]
    wan.transformer.gradient_checkpointing = False
    torch.testing.assert_close(wan_run(wan, monkeypatch, range(2), checkpointing=True)[0], plain)
    assert wan.transformer.is_gradient_checkpointing
    wan.transformer.disable_gradient_checkpointing()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flowmo_in_wan_in_half_precision(wan, monkeypatch, dtype):
    half = copy.deepcopy(wan.transformer).to(dtype)
    with monkeypatch.context() as m:
        m.setattr(wan, "transformer", half)
        video, _, losses = wan_run(wan, monkeypatch, range(3), 0.005)
    assert video.isfinite().all() and losses[0][1] < losses[0][0]


def test_without_the_reset_unipc_undoes_flowmo(wan, monkeypatch):
    class Stubborn(type(wan.scheduler)):  # nobody makes it forget
        last_sample = property(lambda self: self.kept, lambda self, value: self.keep(value))

        def keep(self, value):
            if value is not None or not hasattr(self, "kept"):
                self.kept = value

    moved = []
    for stubborn in (False, True):
        with monkeypatch.context() as m:
            if stubborn:
                m.setattr(wan, "scheduler", Stubborn.from_config(wan.scheduler.config))
            plain, guided = (wan_run(wan, m, [2], eta)[1] for eta in (0.0, 0.05))
        assert torch.equal(guided[1], plain[1])
        moved.append((guided[2] - plain[2]).abs().mean().item())
    assert 0.04 < moved[0] < 0.06 and moved[1] < 0.5 * moved[0]  # what remains comes from u alone


def test_flowmo_in_wans_image_to_video(wan, monkeypatch):
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from diffusers.pipelines.wan import pipeline_wan_i2v

    no_mending = SimpleNamespace(fix_text=lambda text: text)  # ftfy, which may not be installed
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", no_mending, raising=False)
    torch.manual_seed(0)
    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=16,
    )
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
        intermediate_size=16,
    )
    pipe = WanImageToVideoPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text_encoder,
        vae=wan.vae,
        transformer=net,
        scheduler=wan.scheduler,
        image_encoder=transformers.CLIPVisionModel(config).eval(),
        image_processor=transformers.CLIPImageProcessor(),
    )
    images = moving(1, 1)[:, :, 0], -moving(1, 1)[:, :, 0]
    made = [wan_run(pipe, monkeypatch, range(2), 0.005, image=image) for image in images]
    for video, _, losses in made:
        assert video.shape == (1, 3, 17, 32, 32) and video.isfinite().all()
        assert len(losses) == 2 and all(b < a for a, b in losses)
    assert not torch.allclose(made[0][0], made[1][0], atol=1e-3)


# ---------------------------------------- FlowLoss in SVD


@pytest.fixture
def svd(peers):
    torch.manual_seed(0)
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    net = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2
    )
    image = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            patch_size=56,
            intermediate_size=16,
        )
    ).eval()
    return StableVideoDiffusionPipeline(
        vae, image, net, EulerDiscreteScheduler(), transformers.CLIPImageProcessor()
    )


def moving(B=2, T=4, size=32):
    """A square that moves to the right, (B, 3, T, H, W) in [-1, 1]."""
    video = -torch.ones(B, 3, T, size, size)
    for t in range(T):
        video[:, :, t, 10:20, 4 + 2 * t : 14 + 2 * t] = 1
    return video


def test_flowloss_in_svd_decodes_only_what_the_gate_lets_through(svd, monkeypatch):
    raft, decoded, decode = TinyRAFT().requires_grad_(False), [], svd.vae.decode
    levels, gate = [], recipes.gate
    monkeypatch.setattr(
        recipes, "gate", lambda sigma, psi: levels.append(sigma) or gate(sigma, psi)
    )
    svd.vae.decode = lambda z, **named: decoded.append(len(z)) or decode(z, **named)

    def of(psi, scale=0.1):
        decoded.clear()
        svd.unet.zero_grad()
        torch.manual_seed(3)
        value = recipes.svd_loss(svd, moving(), raft, psi=psi, scale=scale)
        value.backward()
        return value.item(), svd.unet.conv_in.weight.grad.clone(), sum(decoded)

    closed, both = of(1e-9), of(1e9)
    one = of(levels[0].mean().item())
    assert [closed[2], one[2], both[2]] == [0, 4, 8]  # frames
    recon = of(1e9, scale=0.0)
    assert closed[0] == recon[0] < one[0] < both[0]
    assert torch.equal(closed[1], recon[1]) and not torch.allclose(one[1], recon[1])


def test_flowloss_in_svd_falls(svd):
    raft = TinyRAFT().requires_grad_(False)
    optimiser, values = torch.optim.AdamW(svd.unet.parameters(), 1e-3), []
    for _ in range(6):
        torch.manual_seed(3)
        value = recipes.svd_loss(svd, moving(), raft, psi=1e9, scale=0.01)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.95 * values[0]
    assert not gradients(svd.vae) and all(p.grad is None for p in svd.image_encoder.parameters())


# ---------------------------------------- MotionPrompt in AnimateDiff


@pytest.fixture(scope="module")
def animatediff(peers):
    torch.manual_seed(0)
    from diffusers import (
        AnimateDiffPipeline,
        AutoencoderKL,
        DDIMScheduler,
        MotionAdapter,
        UNet2DConditionModel,
    )

    net = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    return AnimateDiffPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer("a red circle moving authentic steady"),
        unet=net,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(beta_schedule="linear"),
    )


def ANIMATE(logits):
    def discriminate(flow):
        logits.append(flow.square().mean((1, 2, 3)))
        return 1e3 * logits[-1]

    return dict(
        estimate=lambda a, b: (b - a)[:, :2],
        discriminate=discriminate,
        words="authentic steady",
        lambdas=(1, 0, 0),
        steps=4,
        frames=4,
        size=8,
    )


def test_motionprompt_in_animatediff_moves_new_tokens_only_and_its_loss_falls(
    animatediff, monkeypatch
):
    paths, starts, logits = [], [], []

    def watched(denoise, inner, encode, T0, x, *rest):
        x, path = motionprompt.motionprompt(denoise, inner, encode, T0, x, *rest)
        paths.append(path)
        starts.append(T0)
        return x, path

    def same_pair(*_):  # so that losses compare
        return torch.tensor([[0]]), torch.tensor([[3]])

    monkeypatch.setattr(recipes, "motionprompt", watched)
    monkeypatch.setattr(recipes, "random_pairs", same_pair)
    table = animatediff.text_encoder.get_input_embeddings().weight.clone()
    video = recipes.animate(
        animatediff, "a red circle moving", K=4, lr=0.05, guided=(0, 1), **ANIMATE(logits)
    )
    assert video.shape == (1, 3, 4, 16, 16) and video.isfinite().all()
    assert starts[0].shape == (1, 2, 16) and list(paths[0]) == [0, 1]
    assert all((T - starts[0]).abs().max() > 0.05 for T in paths[0].values())
    steps = torch.cat(logits).view(2, 4)
    assert (steps.diff(dim=1) > 0).all()  # log(1 - phi) falls as the logit rises
    assert torch.equal(table, animatediff.text_encoder.get_input_embeddings().weight)
    assert not gradients(animatediff.unet, animatediff.vae, animatediff.text_encoder)
    assert not animatediff.text_encoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_motionprompt_in_animatediff_in_half_precision(animatediff, dtype):
    half = copy.deepcopy(animatediff).to(dtype)
    video = recipes.animate(half, "a red circle moving", K=2, lr=0.05, guided=(1,), **ANIMATE([]))
    assert video.isfinite().all() and video.dtype == torch.float32


# ---------------------------------------- Bi-flow with UNet2DModel


def test_biflow_with_unet2dmodel_learns_and_streams(peers):
    torch.manual_seed(0)
    nets = recipes.networks(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    frames = moving(4, 2, 16)
    optimiser, values = torch.optim.AdamW(nets.parameters(), 2e-3), []
    for k in range(40):
        loss = recipes.training_loss(nets, frames[:, :, 0], frames[:, :, 1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.6 * sum(values[:5])
    out = recipes.stream_video(nets.eval(), frames[:, :, 0], eps=0.1)
    for _ in range(2):
        x, evaluations = next(out)
        assert x.shape == (4, 3, 16, 16) and x.abs().max() <= 1 and (evaluations >= 2).all()
    a, b = (
        torch.stack(recipes.field_of(nets)(x, torch.ones(4), s * torch.ones(4))) for s in (0, 1)
    )
    assert not torch.allclose(a, b)  # the networks know alpha


# ---------------------------------------- several processes


def test_two_processes_have_the_gradient_of_one_with_both_batches(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"""
import sys
import torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import biflow
from recipes import distributed

torch.manual_seed(0)
net = biflow.UNet(3, 6, 8, [1], 1, 2)
for p in net.parameters():
    torch.nn.init.normal_(p, std=0.1)
x0, x1, noise = torch.randn(3, 4, 3, 8, 8)
t, alpha = torch.rand(2, 4)

def gradients(module, some):
    def field(x, t, alpha):
        return module(x, t, alpha).chunk(2, 1)
    v, n = biflow.biflow_loss(field, x0[some], x1[some], t[some], alpha[some], noise[some])
    net.zero_grad()
    (v + n).mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]

whole = gradients(net, slice(0, 4))
module = distributed(net)
rank = torch.distributed.get_rank()
mine = gradients(module, slice(2 * rank, 2 * rank + 2))
assert len(mine) == len(whole) > 5 and max(g.abs().max() for g in whole) > 0
for a, b in zip(mine, whole):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
open(f"same {{rank}}", "w").close()  # what they print may mix
torch.distributed.destroy_process_group()
""")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(script),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "same 0").exists() and (tmp_path / "same 1").exists()


# ---------------------------------------- torchvision's RAFT


def test_torchvisions_raft_is_an_estimator_with_a_gradient_to_the_pictures_alone():
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    raft = raft_small()
    estimate = recipes.torch_raft(raft)
    a, b = torch.rand(2, 1, 3, 128, 128).half() * 2 - 1
    a.requires_grad_()
    flow = estimate(a, b)
    assert flow.shape == (1, 2, 128, 128) and flow.dtype == torch.float32
    flow.square().mean().backward()
    assert a.grad.isfinite().all() and not gradients(raft)
