"""flowloss.py: every equation against an oracle of another kind; then the script end to end."""
import itertools
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import flowloss
from common import edm_denoise, edm_weight, karras_sigmas, sample_edm
from flowloss import TinyRAFT, correlation, flow_difference, flow_loss, flow_weight, gate, look_up, recon_loss, upsample
from flowloss import visible, warp


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- EDM

def test_preconditioning_is_that_of_edm_and_d_tends_to_x_without_noise():
    x, sigma, data = randn(3, 2, 4, 4).double(), torch.tensor([0.01, 0.7, 30.0]).double(), 0.5
    seen = []
    D = edm_denoise(lambda z, c: seen.append((z, c)) or z.sin(), x, sigma, data)
    for b, s in enumerate(sigma.tolist()):
        skip, out = data**2 / (s**2 + data**2), s * data / math.hypot(s, data)
        torch.testing.assert_close(seen[0][0][b], x[b] / math.hypot(s, data))
        assert seen[0][1][b].item() == pytest.approx(math.log(s) / 4)
        torch.testing.assert_close(D[b], skip * x[b] + out * (x[b] / math.hypot(s, data)).sin())
        assert edm_weight(sigma, data)[b].item() == pytest.approx(1 / out**2)  # so that F's own target has weight 1
    near = edm_denoise(lambda z, c: z.sin(), x, torch.full((3,), 1e-6).double())
    torch.testing.assert_close(near, x, rtol=0, atol=1e-5)


def test_a_network_of_zeros_has_loss_one():
    y, n = randn(4000, 8), randn(4000, 8, seed=1)
    sigma = (0.7 + 1.6 * randn(4000, seed=2)).exp()
    D = edm_denoise(lambda z, c: 0 * z, y + sigma[:, None] * n, sigma)
    assert recon_loss(D, y, sigma).mean().item() == pytest.approx(1, abs=0.03)


def test_karras_levels_are_those_of_the_formula():
    levels = karras_sigmas(5, 0.1, 10, 3).tolist()
    assert levels[-1] == 0 and len(levels) == 6
    high, low = 10 ** (1 / 3), 0.1 ** (1 / 3)
    assert levels[:5] == pytest.approx([(high + k / 4 * (low - high)) ** 3 for k in range(5)])


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)])
def test_the_sampler_converges_to_the_exact_path_of_a_gaussian_at_its_order(heun, order):
    s, high, low = 0.7, 5.0, 0.05  # data N(0, s^2): D(x) = s^2 / (s^2 + sigma^2) x, x(sigma) = x(high) sqrt(...)
    calls = []
    denoise = lambda x, sigma: calls.append(0) or s**2 / (s**2 + sigma[:, None] ** 2) * x
    x, errors = randn(4, 3).double(), []
    for steps in (16, 32, 64):
        levels = karras_sigmas(steps, low, high)[:-1].double()  # to `low` and not to 0, where the order is another
        got = sample_edm(denoise, x, levels, heun)
        errors.append((got / x - math.sqrt((s**2 + low**2) / (s**2 + high**2))).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(rate - order) < 0.35 for rate in rates), rates
    assert len(calls) == (16 + 32 + 64 - 3) * order


# ---------------------------------------------------------------------------------------------- THE METHOD

def test_the_gate_and_the_weights_are_the_papers():
    sigma = torch.tensor([0.1, 0.5, 0.999, 1.0, 2.0]).double()
    assert gate(sigma, 1.0).tolist() == pytest.approx([1 / 1.01, 1 / 1.25, 1 / (1 + 0.999**2), 0, 0])
    below = sigma < 1
    torch.testing.assert_close(flow_weight("gated", sigma, 1.0)[below], 1 / sigma[below] ** 2)
    assert flow_weight("gated", sigma, 1.0)[~below].eq(0).all() and flow_weight("none", sigma, 1.0).eq(0).all()
    torch.testing.assert_close(flow_weight("soft", sigma, 1.0), 1 / sigma**2)
    torch.testing.assert_close(flow_weight("lambda", sigma, 1.0), (sigma**2 + 1) / sigma**2)
    assert flow_weight("constant", sigma, 1.0).eq(1).all()


@pytest.mark.parametrize("prior, psi, share", [("edm", 0.25, 0.438), ("edm", 1, 0.841), ("svd", 1, 0.331),
                                               ("svd", 5, 0.715)])
def test_the_share_of_steps_below_the_gate_is_the_normal_cdf(prior, psi, share):
    sigma = flowloss.noise_of(prior, torch.zeros(40000, 1, 1), torch.Generator().manual_seed(0))[0]
    assert (sigma < psi).float().mean().item() == pytest.approx(share, abs=0.01)


def shear(a, b):
    """A smooth, differentiable stand-in for an estimator: (N, 3, H, W) twice -> (N, 2, H, W)."""
    return torch.stack([(a * b).sum(1), (a - b**2).sum(1)], 1)


def test_flow_difference_equals_a_plain_loop_and_weighs_what_is_hidden_less(monkeypatch):
    video, truth = randn(2, 3, 5, 4, 6), randn(2, 3, 5, 4, 6, seed=1)
    i, j = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[3, 1], [4, 0]])
    seen = randn(4, 1, 4, 6, seed=2) > 0
    monkeypatch.setattr(flowloss, "visible", lambda f, b: seen)
    want = []
    for b in range(2):
        total = 0
        for k in range(2):
            pair = lambda v: shear(v[b, :, i[b, k]][None], v[b, :, j[b, k]][None])[0]
            squared = (pair(video) - pair(truth)).square().sum(0)
            total += sum(squared[y, x] * (1 if seen[2 * b + k, 0, y, x] else 0.3) for y in range(4) for x in range(6))
        want.append(total / (2 * 4 * 6))
    torch.testing.assert_close(flow_difference(shear, video, truth, i, j, 0.3), torch.stack(want))


def test_identical_videos_have_no_flow_loss_and_no_gradient_and_the_truth_never_gets_one():
    raft, video = TinyRAFT(), randn(1, 3, 3, 24, 24)
    i, j = torch.tensor([[0, 0]]), torch.tensor([[1, 2]])
    same, truth = video.clone().requires_grad_(), video.clone().requires_grad_()
    loss = flow_difference(lambda a, b: raft(a, b, 2), same, truth, i, j).sum()
    loss.backward()
    assert loss.item() == 0 and same.grad.abs().max() == 0 and truth.grad is None
    other = (video + 0.3 * randn(1, 3, 3, 24, 24, seed=1)).requires_grad_()
    flow_difference(lambda a, b: raft(a, b, 2), other, truth, i, j).sum().backward()
    assert other.grad.abs().max() > 0 and truth.grad is None


def test_samples_behind_the_gate_are_neither_decoded_nor_estimated():
    D, truth = randn(4, 3, 3, 4, 4).requires_grad_(), randn(4, 3, 3, 4, 4, seed=1)
    sigma = torch.tensor([0.5, 1.0, 3.0, 0.2])
    decoded, estimated = [], []
    decode = lambda y: decoded.append(len(y)) or y
    estimate = lambda a, b: estimated.append(len(a)) or shear(a, b)
    i, j = torch.zeros(4, 2, dtype=torch.long), torch.tensor([[1, 2]] * 4)
    loss = flow_loss(estimate, decode, D, truth, flow_weight("gated", sigma, 1.0), i, j, 0.1)
    loss.sum().backward()
    assert decoded == [2] and estimated == [8, 4]  # two samples, two pairs each; the truth there and back
    assert loss[1:3].eq(0).all() and loss[[0, 3]].gt(0).all() and D.grad[1:3].eq(0).all()
    alone = flow_difference(shear, D[3:], truth[3:], i[3:], j[3:])
    torch.testing.assert_close(loss[3:], 0.1 / 0.2**2 * alone)
    none = flow_loss(None, None, D, truth, flow_weight("none", sigma, 1.0), i, j, 0.1)
    assert none.eq(0).all()


def test_visible_is_false_where_the_way_back_does_not_return():
    forward = torch.zeros(1, 2, 8, 8)
    forward[:, 0] = 2
    back = -forward
    back[..., 4:] = 1  # what the left half moves onto from column 2 on says it came from elsewhere
    assert visible(forward, back)[0, 0, :, :2].all() and not visible(forward, back)[0, 0, :, 2:].any()


# ---------------------------------------------------------------------------------------------- tiny RAFT

def test_look_up_equals_a_plain_loop():
    a, b = randn(1, 5, 6, 8), randn(1, 5, 6, 8, seed=1)
    corr = correlation(a, b)
    pyramid = [corr, F.avg_pool2d(corr, 2)]
    at = torch.tensor([2.25, 3.5]).view(1, 2, 1, 1) + randn(1, 2, 6, 8, seed=2)
    got = look_up(pyramid, at, 1)[0]  # (2 * 9, 6, 8)

    def bilinear(image, x, y):
        total, h, w = 0.0, *image.shape
        for dx, dy in itertools.product((0, 1), (0, 1)):
            u, v = math.floor(x) + dx, math.floor(y) + dy
            if 0 <= u < w and 0 <= v < h:
                total += (1 - abs(x - u)) * (1 - abs(y - v)) * image[v, u].item()
        return total

    for y, x in ((0, 0), (2, 5), (5, 7)):
        c = (a[0, :, y, x, None, None] * b[0]).sum(0) / 5**0.5
        pooled = F.avg_pool2d(c[None, None], 2)[0, 0]
        px, py = at[0, :, y, x].tolist()
        levels = (c, px, py), (pooled, (px + 0.5) / 2 - 0.5, (py + 0.5) / 2 - 0.5)
        want = [bilinear(image, qx + dx, qy + dy) for image, qx, qy in levels for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert got[:, y, x].tolist() == pytest.approx(want, abs=1e-5)


def test_upsampling_keeps_a_constant_and_with_the_right_weights_a_linear_flow():
    constant = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    torch.testing.assert_close(upsample(constant, randn(1, 36, 4, 5)), 2 * constant[..., :1, :1].expand(1, 2, 8, 10))
    mask = torch.full((1, 9, 2, 2, 4, 5), -1e4)  # fine pixel (r, s) of a cell: half way to the neighbour below, right
    for r, s in itertools.product((0, 1), (0, 1)):
        for dy, dx in itertools.product((0, r), (0, s)):
            mask[0, 3 * (1 + dy) + 1 + dx, r, s] = 0
    ramp = torch.arange(5.0).expand(4, 5) + 10 * torch.arange(4.0)[:, None]
    fine = upsample(torch.stack([ramp, -ramp])[None], mask.view(1, 36, 4, 5))[0, 0]
    want = 2 * (torch.arange(10.0) / 2 + 10 * torch.arange(8.0)[:, None] / 2)
    torch.testing.assert_close(fine[:7, :9], want[:7, :9])


def test_without_the_cut_autograd_is_the_gradient_of_the_flow_and_with_it_it_is_not():
    torch.manual_seed(0)
    raft = TinyRAFT().double()
    for p in raft.head.parameters():
        p.data.mul_(8)  # flows of a pixel or so, so that the lookups move
    a, b, way = (randn(1, 3, 24, 24, seed=k).double() for k in range(3))
    value = lambda x, detach: (raft(x, b, 3, detach) * torch.linspace(0, 1, 24).double()).sum()
    slopes = []
    for detach in (False, True):
        x = a.clone().requires_grad_()
        slopes.append((torch.autograd.grad(value(x, detach), x)[0] * way).sum().item())
    h = 1e-6
    finite = (value(a + h * way, False) - value(a - h * way, False)).item() / (2 * h)
    assert slopes[0] == pytest.approx(finite, rel=1e-4) and abs(slopes[1] - finite) > 0.05 * abs(finite)


def test_the_raft_works_from_24_pixels_up_and_depends_on_no_other_sample(monkeypatch):
    raft, coarse, upsample = TinyRAFT().eval(), [], flowloss.upsample
    monkeypatch.setattr(flowloss, "upsample", lambda f, mask: coarse.append(2 * f.shape[-1]) or upsample(f, mask))
    for size in (24, 30, 64, 100):
        a, b = randn(3, 3, size, size), randn(3, 3, size, size, seed=1)
        flow = raft(a, b)
        assert size % coarse[-1] == 0  # made smaller and larger by a whole factor, or flow would lie askew
        assert flow.shape == (3, 2, size, size) and flow.isfinite().all()
        torch.testing.assert_close(raft(a[1:2], b[1:2]), flow[1:2], rtol=1e-4, atol=1e-4)
    assert len(raft(a, b, updates=3, every=True)) == 3


def test_the_network_takes_any_width_and_frames_of_one_pixel_patches():
    for width, patch in ((9, 2), (8, 1)):
        net = flowloss.VideoUNet(width, [1, 1.5], patch)
        assert net(randn(2, 3, 4, 8, 8), randn(2), randn(2, 3, 8, 8)).shape == (2, 3, 4, 8, 8)


def test_a_few_steps_teach_the_raft_a_constant_motion():
    torch.manual_seed(0)
    raft = TinyRAFT()
    optimiser = torch.optim.AdamW(raft.parameters(), 2e-3)
    texture = F.avg_pool2d(randn(8, 3, 40, 40), 3, 1, 1) * 2
    true = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
    a, b = texture[..., 4:28, 4:28], texture[..., 5:29, 2:26]  # b(p + (2, -1)) = a(p)
    errors = []
    for _ in range(40):
        loss = sum((f - true).abs().mean() for f in raft(a, b, 2, True, True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert errors[-1] < 0.25 * errors[0]


# ---------------------------------------------------------------------------------------------- worlds

@pytest.mark.parametrize("name", ["robot", "shapes"])
def test_warping_by_the_exact_flow_reproduces_the_next_frame_where_visible(name):
    moved, still = [], []
    for k in range(6):
        d = common.WORLDS[name](common.world_rng(0, "test", k), 64, 8, flow=True)
        video, flow = common.to_float(d["video"]), d["flow"]
        assert flow.shape == (7, 2, 64, 64) and d["visible"].shape == (7, 64, 64)
        on = (flow.square().sum(1) > 0.25) & d["visible"]
        moved.append((warp(video[1:], flow) - video[:-1]).abs().mean(1)[on])
        still.append((video[1:] - video[:-1]).abs().mean(1)[on])
    assert torch.cat(moved).median() < 0.2 * torch.cat(still).median()


def test_the_block_of_the_robot_world_is_pushed_and_the_background_rests():
    d = common.robot(common.world_rng(0, "test", 0), 32, 16, flow=True)
    speed = d["flow"].square().sum(1).sqrt()  # (15, 32, 32)
    assert (speed == 0).float().mean() > 0.6 and speed.amax((1, 2))[3] > 0.5
    assert speed[:4, 20:].max() < speed[8:12, 20:].max()  # on the table things move once the block is pushed
    assert speed[[0, -1]].max() < 0.5 * speed.max()  # smooth at both ends


def test_two_frames_of_the_robot_world_at_any_times_are_those_of_the_clip_and_their_flow_is_exact():
    at = lambda **kind: common.robot(common.world_rng(0, "test", 3), 64, flow=True, **kind)
    clip, pair = at(frames=16), at(frames=2, clock=np.array([2, 13]) / 15)
    assert torch.equal(pair["video"], clip["video"][[2, 13]])
    video, flow = common.to_float(pair["video"]), pair["flow"]
    on = (flow.square().sum(1).sqrt() > 8) & pair["visible"]  # far beyond what neighbouring frames move
    apart = lambda a, b: (a - b).abs().mean(1)[on].median()
    assert on.sum() > 50 and apart(warp(video[1:], flow), video[:1]) < 0.2 * apart(video[1:], video[:1])


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    a = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noisy = [flowloss.ssim(a, (a + s * randn(2, 3, 16, 16))) for s in (0, 0.05, 0.2)]
    assert noisy[0] == pytest.approx(1) and noisy[0] > noisy[1] > noisy[2]


# ---------------------------------------------------------------------------------------------- end to end

@pytest.fixture
def run(runner):
    return runner(flowloss)


def weights(out):
    state = torch.load(out / "ckpt.pt", weights_only=True)
    return {(n, k): v for n, d in state["tune"]["parts"].items() if "optimiser" not in n for k, v in d.items()}


def test_a_run_writes_all_resumes_bit_for_bit_and_repeats_its_numbers(run, tmp_path, monkeypatch):
    status, text, err = run("--out_dir", "a")
    assert status == 0, err
    files = "config.json log.csv ckpt.pt samples.gif sheet.png curves.png weights.png noise.png results.json"
    assert {p.name for p in (tmp_path / "a").iterdir()} == set(files.split())
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [(r["objective"], r["step"]) for r in results["rows"]] == [
        ("base", 0), ("none", 2), ("gated", 2), ("none", 4), ("gated", 4)]
    keys = ("objective psi step epe_moving epe_background epe_zero epe_floor psnr ssim fvd features active_share "
            "s_per_step seed")
    assert set(keys.split()) <= results["rows"][0].keys()
    numbers = lambda rows: [{k: v for k, v in r.items() if k != "s_per_step"} for r in rows]
    with monkeypatch.context() as m:  # a Ctrl-C in the third step of fine-tuning
        calls, real = [], flowloss.flow_loss

        def interrupted(*args):
            calls.append(0)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGINT)
            return real(*args)
        m.setattr(flowloss, "flow_loss", interrupted)
        assert run("--out_dir", "b")[0] == 130
    assert torch.load(tmp_path / "b" / "ckpt.pt", weights_only=True)["tune"]["step"] == 3
    assert run("--out_dir", "b", "--resume")[0] == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    again = json.loads((tmp_path / "b" / "results.json").read_text())
    assert numbers(again["rows"]) == numbers(results["rows"])


@pytest.mark.parametrize("flags, says", [
    ("--objectives all", "--objectives all: 'all' is unknown; choose from none,constant,lambda,soft,gated"),
    ("--points 1,x", "--points 1,x: must be numbers"),
    ("--size 26", "--size 26: must be even, and 8 or a larger multiple of 4"),
    ("--size 25 --patch 1 --mults 1", "--size 25: must be even"),
    ("--n_pairs 8", "--n_pairs 8: a clip of 8 frames has 7 pairs"), ("--psi -1", "--psi -1.0: must lie between"),
    ("--dataset nowhere", "no clips found: looked in data/nowhere"), ("--eval_only", "nothing to continue")])
def test_bad_input_is_one_clear_line_and_exit_status_2(run, tmp_path, flags, says):
    status, _, err = run(*flags.split())
    assert status == 2 and says in err and err.count("\n") == 1 and not list(tmp_path.rglob("*.pt"))
