"""flowloss.py: every equation against an oracle of another kind; then the script end to end."""
import inspect
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import flowloss
from common import edm_weight, karras_sigmas
from conftest import refused
from flowloss import Config, TinyRAFT, correlation, flow_difference, flow_loss, gate, look_up
from flowloss import recon_loss, upsample, visible, warp


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------- EDM

def edm_denoise(network, x, sigma):
    """EDM's Table 1 for data of variance 1, each sample for itself: an oracle."""
    made = []
    for b, s in enumerate(sigma.tolist()):
        total = math.hypot(s, 1)
        F_theta = network(x[b:b + 1] / total, math.log(s) / 4)[0]
        made.append(x[b] / total**2 + s / total * F_theta)
    return torch.stack(made)


def test_the_weight_is_that_of_edm():
    sigma = torch.tensor([0.01, 0.7, 30.0]).double()
    for b, s in enumerate(sigma.tolist()):
        out = s * 0.5 / math.hypot(s, 0.5)
        assert edm_weight(sigma, 0.5)[b].item() == pytest.approx(1 / out**2)


class Stub(torch.nn.Module):
    """A network whose mask is always `mask`; it keeps what it is given."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, c_noise):
        self.given = x, c_noise
        return torch.cat([x[:, :3].sin(), torch.full_like(x[:, :1], self.mask)], 1)


def test_the_denoiser_is_edms_where_the_mask_says_so_and_elsewhere_the_first_frame():
    x = randn(2, 3, 4, 5, 6).double()
    first = randn(2, 3, 5, 6, seed=1).double()
    sigma = torch.tensor([0.3, 8.0]).double()
    moving = Stub(50.0)
    D = flowloss.denoise(moving, x, sigma, first)
    torch.testing.assert_close(D, edm_denoise(lambda z, c: z.sin(), x, sigma))
    rests = flowloss.denoise(Stub(-50.0), x, sigma, first)
    torch.testing.assert_close(rests, first[:, :, None].expand_as(x))
    half = flowloss.denoise(Stub(0.0), x, sigma, first)
    torch.testing.assert_close(half, (D + rests) / 2)

    z, c_noise = moving.given
    apart = ((x[1] - first[1][:, None]) / 8).clamp(-5, 5)
    torch.testing.assert_close(z[1], torch.cat([x[1] / 65**0.5, apart, rests[1]]))
    assert c_noise.tolist() == pytest.approx([math.log(0.3) / 4, math.log(8) / 4])


def test_a_network_of_zeros_has_loss_one():
    y = randn(4000, 8)
    n = randn(4000, 8, seed=1)
    sigma = (0.7 + 1.6 * randn(4000, seed=2)).exp()
    D = edm_denoise(lambda z, c: 0 * z, y + sigma[:, None] * n, sigma)
    assert recon_loss(D, y, sigma).mean().item() == pytest.approx(1, abs=0.03)


def test_karras_levels_are_those_of_the_formula():
    levels = karras_sigmas(5, 0.1, 10, 3).tolist()
    assert levels[-1] == 0 and len(levels) == 6
    high, low = 10 ** (1 / 3), 0.1 ** (1 / 3)
    assert levels[:5] == pytest.approx([(high + k / 4 * (low - high)) ** 3 for k in range(5)])


def test_the_sampler_gives_the_variance_of_the_data_and_forgets_where_it_began():
    s = 0.7  # data N(0, s^2): D(x) = s^2 / (s^2 + sigma^2) x
    calls = []

    def denoise(x, sigma):
        calls.append(sigma[0].item())
        return s**2 / (s**2 + sigma[:, None] ** 2) * x

    levels = karras_sigmas(320, 0.05, 20)  # few steps give too little variance
    start = levels[0] * randn(5000, 1)
    x = flowloss.sample(denoise, start, levels, torch.Generator().manual_seed(0))
    assert x.var().item() == pytest.approx(s**2, rel=0.05)
    assert abs(torch.corrcoef(torch.cat([start, x], 1).T)[0, 1]) < 0.05
    assert calls == levels[:-1].tolist()


# ---------------------------------------- THE METHOD

def test_the_gate_is_the_papers():
    sigma = torch.tensor([0.1, 0.5, 0.999, 1.0, 2.0]).double()
    want = [1 / 1.01, 1 / 1.25, 1 / (1 + 0.999**2), 0, 0]
    assert gate(sigma, 1.0).tolist() == pytest.approx(want)


@pytest.mark.parametrize("psi", [0.25, 1, 2, 5])
def test_the_share_of_steps_below_the_gate_is_the_normal_cdf(psi):
    sigma, _, _ = flowloss.draw(0, 6, 1, torch.zeros(40000, 1, 1))
    share = torch.distributions.Normal(flowloss.P_MEAN, flowloss.P_STD).cdf(torch.tensor(psi).log())
    assert (sigma < psi).float().mean().item() == pytest.approx(share.item(), abs=0.01)


def shear(a, b):
    """A smooth, differentiable stand-in for an estimator: (N, 3, H, W) twice -> (N, 2, H, W)."""
    return torch.stack([(a * b).sum(1), (a - b**2).sum(1)], 1)


def test_flow_difference_equals_a_plain_loop_and_weighs_what_is_hidden_less(monkeypatch):
    video = randn(2, 3, 5, 4, 6)
    truth = randn(2, 3, 5, 4, 6, seed=1)
    pairs = torch.tensor([[[0, 3], [2, 1]], [[1, 4], [3, 0]]])
    seen = randn(4, 1, 4, 6, seed=2) > 0
    monkeypatch.setattr(flowloss, "visible", lambda f, b: seen)
    want = []
    for b in range(2):
        total = 0
        for k in range(2):
            i, j = pairs[b, k]
            ours = shear(video[b, :, i][None], video[b, :, j][None])[0]
            true = shear(truth[b, :, i][None], truth[b, :, j][None])[0]
            squared = (ours - true).square().sum(0)
            for y, x in np.ndindex(4, 6):
                total += squared[y, x] * (1 if seen[2 * b + k, 0, y, x] else 0.3)
        want.append(total / (2 * 4 * 6))
    torch.testing.assert_close(flow_difference(shear, video, truth, pairs), torch.stack(want))


def test_identical_videos_have_no_flow_loss_and_the_truth_never_gets_a_gradient():
    raft = TinyRAFT()
    video = randn(1, 3, 3, 24, 24)
    pairs = torch.tensor([[[0, 1], [0, 2]]])
    same = video.clone().requires_grad_()
    truth = video.clone().requires_grad_()
    loss = flow_difference(raft, same, truth, pairs).sum()
    loss.backward()
    assert loss.item() == 0 and same.grad.abs().max() == 0 and truth.grad is None
    other = (video + 0.3 * randn(1, 3, 3, 24, 24, seed=1)).requires_grad_()
    flow_difference(raft, other, truth, pairs).sum().backward()
    assert other.grad.abs().max() > 0 and truth.grad is None


def test_the_flow_term_weighs_one_over_sigma_squared_below_the_gate_and_costs_nothing_above():
    D = randn(4, 3, 3, 4, 4).requires_grad_()
    truth = randn(4, 3, 3, 4, 4, seed=1)
    sigma = torch.tensor([0.5, 1.0, 3.0, 0.2])
    pairs = torch.tensor([[[0, 1], [0, 2]]]).expand(4, -1, -1)
    decoded = []
    estimated = []

    def decode(y):
        decoded.append(len(y))
        return y

    def estimate(a, b):
        estimated.append(len(a))
        return shear(a, b)

    loss = flow_loss(estimate, decode, D, truth, gate(sigma, 1.0), sigma, pairs, 0.1)
    loss.sum().backward()
    assert decoded == [2] and estimated == [8, 4]  # two clips, two pairs; the truth there and back
    assert loss[1:3].eq(0).all() and D.grad[1:3].eq(0).all()
    for k in (0, 3):  # w lambda = 1 / sigma^2
        alone = flow_difference(shear, D[k:k + 1], truth[k:k + 1], pairs[k:k + 1])
        torch.testing.assert_close(loss[k:k + 1], 0.1 / sigma[k] ** 2 * alone)
    none = flow_loss(None, None, D, truth, 0 * sigma, sigma, pairs)
    assert none.eq(0).all()


def test_visible_is_false_where_the_way_back_does_not_return():
    forward = torch.zeros(1, 2, 8, 8)
    forward[:, 0] = 2
    back = -forward
    back[..., 4:] = 1  # what the left half moves onto from column 2 on says it came from elsewhere
    seen = visible(forward, back)[0, 0]
    assert seen[:, :2].all() and not seen[:, 2:].any()


@pytest.mark.parametrize("motion, hidden", [
    ((3, 0), (slice(None), slice(5, 8))), ((-2, 0), (slice(None), slice(0, 2))),
    ((0, 1), (slice(7, 8), slice(None))), ((0, -4), (slice(0, 4), slice(None)))])
def test_what_leaves_the_picture_is_hidden_and_no_more(motion, hidden):
    forward = torch.tensor(motion).float().view(1, 2, 1, 1).expand(1, 2, 8, 8)
    want = torch.ones(8, 8, dtype=torch.bool)
    want[hidden] = False
    assert torch.equal(visible(forward, -forward)[0, 0], want)
    rest = torch.zeros(1, 2, 8, 8)
    assert visible(rest, rest).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flow_of_half_precision_is_warped_and_judged_as_in_float32(dtype):
    forward = torch.zeros(1, 2, 48, 1024)  # places that bfloat16 cannot tell; over 32,768 pixels
    backward = torch.zeros(1, 2, 48, 1024)
    for left in range(20, 900, 90):  # boxes that move by 6.25 px, which half types hold
        forward[:, 0, 10:40, left:left + 48] = 6.25
        backward[:, 0, 10:40, left + 6:left + 54] = -6.25
    want = visible(forward, backward)
    assert 0.01 < (~want).float().mean() < 0.5
    assert torch.equal(visible(forward.to(dtype), backward.to(dtype)), want)
    column = torch.arange(1024.0).div(4).expand(1, 1, 48, 1024).to(dtype)
    for flow in (forward, forward.to(dtype)):
        torch.testing.assert_close(warp(column, flow), warp(column.float(), forward))
    assert warp(column.double(), forward).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_videos_of_half_precision_give_the_loss_and_a_gradient(dtype):
    raft = TinyRAFT().requires_grad_(False)
    D = randn(2, 3, 3, 24, 24)
    truth = randn(2, 3, 3, 24, 24, seed=1)
    sigma = torch.tensor([0.004, 0.5])  # 1 / 0.004^2 is not a number in float16
    pairs = torch.tensor([[[0, 1]], [[0, 2]]])

    def loss_of(D, truth, sigma):
        return flow_loss(raft, lambda y: y, D, truth, gate(sigma, 2.0), sigma, pairs)

    half = D.to(dtype).requires_grad_()
    loss = loss_of(half, truth.to(dtype), sigma.to(dtype))
    loss.sum().backward()
    want = loss_of(half.detach().float(), truth.to(dtype).float(), sigma.to(dtype).float())
    assert loss.dtype == torch.float32 and half.grad.dtype == dtype
    torch.testing.assert_close(loss.detach(), want, rtol=1e-2, atol=0)
    assert half.grad[1].isfinite().all() and half.grad[1].abs().max() > 0


def test_the_method_pastes_as_one_block():
    source = inspect.getsource(flowloss)
    block = source[source.index("def gate("):source.index("def recon_loss(")]
    pasted = dict(torch=torch, F=F)
    exec(block, pasted)
    D = randn(2, 3, 3, 6, 6)
    truth = randn(2, 3, 3, 6, 6, seed=1)
    sigma = torch.tensor([0.5, 3.0])
    pairs = torch.tensor([[[0, 1]], [[0, 2]]])
    rest = shear, lambda y: y, D, truth, gate(sigma, 2.0), sigma, pairs, 0.1
    assert torch.equal(pasted["flow_loss"](*rest), flow_loss(*rest))
    assert torch.equal(pasted["gate"](sigma, 2.0), gate(sigma, 2.0))


# ---------------------------------------- tiny RAFT

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
        around = list(itertools.product((-1, 0, 1), (-1, 0, 1)))  # dy, dx
        want = [bilinear(image, x + dx, y + dy) for image, x, y in levels for dy, dx in around]
        assert got[:, y, x].tolist() == pytest.approx(want, abs=1e-5)


def test_upsampling_keeps_a_constant_and_with_the_right_weights_a_linear_flow():
    constant = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    want = 2 * constant[..., :1, :1].expand(1, 2, 8, 10)
    torch.testing.assert_close(upsample(constant, randn(1, 36, 4, 5)), want)
    # Fine pixel (r, s) of a cell: half way to the neighbour below, right.
    mask = torch.full((1, 9, 2, 2, 4, 5), -1e4)
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
    for p in (*raft.head1.parameters(), *raft.head2.parameters()):
        p.data.mul_(4)  # flows of a pixel or so, so that the lookups move
    a, b, way = (randn(1, 3, 24, 24, seed=k).double() for k in range(3))
    value = lambda x, detach: (raft(x, b, 3, detach) * torch.linspace(0, 1, 24).double()).sum()
    slopes = []
    for detach in (False, True):
        x = a.clone().requires_grad_()
        slopes.append((torch.autograd.grad(value(x, detach), x)[0] * way).sum().item())
    h = 1e-6
    finite = (value(a + h * way, False) - value(a - h * way, False)).item() / (2 * h)
    assert slopes[0] == pytest.approx(finite, rel=1e-4)
    assert abs(slopes[1] - finite) > 0.05 * abs(finite)


@pytest.mark.parametrize("height, width", [
    (24, 24), (31, 33), (50, 50), (64, 64), (98, 98), (100, 100), (51, 130), (202, 25)])
def test_the_raft_works_at_any_size_and_depends_on_no_other_sample(height, width, monkeypatch):
    raft, coarse, upsample = TinyRAFT().eval(), [], flowloss.upsample

    def noted(flow, mask):
        coarse.append(2 * max(flow.shape[-2:]))
        return upsample(flow, mask)

    monkeypatch.setattr(flowloss, "upsample", noted)
    a, b = randn(3, 3, height, width), randn(3, 3, height, width, seed=1)
    flow = raft(a, b)
    assert coarse[-1] <= 52  # or it would cost too much
    assert flow.shape == (3, 2, height, width) and flow.isfinite().all()
    torch.testing.assert_close(raft(a[1:2], b[1:2]), flow[1:2], rtol=1e-4, atol=1e-4)
    assert len(raft(a, b, updates=3, every=True)) == 3


def test_the_raft_is_as_good_at_a_size_that_nothing_divides():
    raft, _, _ = flowloss.load_model(flowloss.SHIPPED, "cpu")

    def error(height, width):
        """Of flow, in flow's own length, cut from the middle of a square one."""
        shares = []
        for k in range(2):
            clip = common.robot(common.world_rng(5, "test", k), max(height, width), 16, flow=True)
            top = (max(height, width) - height) // 2
            cut = (..., slice(top, top + height), slice(0, width))
            a, b = common.to_float(clip["video"][8:10])[cut][:, None]
            true = clip["flow"][8][cut]
            size = true.square().sum(0).sqrt()
            with torch.no_grad():
                apart = (raft(a, b)[0] - true).square().sum(0).sqrt()
            shares.append(apart[size > 0.25].mean() / size[size > 0.25].mean())
        return torch.stack(shares).mean().item()

    for whole, odd in ((64, (62, 62)), (96, (98, 98)), (128, (101, 131))):
        assert error(*odd) < 1.3 * error(whole, whole), odd


# ---------------------------------------- network, draws, measures

def test_the_network_takes_any_width():
    for width in (8, 9, 46, 160):  # the last: 240 and 320 channels, of which 7 is no divisor
        net = flowloss.VideoUNet(width, 2)
        assert net(randn(2, 9, 2, 8, 16), randn(2)).shape == (2, 4, 2, 8, 16)


def test_draws_and_batches_are_functions_of_seed_and_step_alone():
    cfg = Config(size=24, frames=8, batch=2, pairs=3)
    first, other, again = [flowloss.general_clips(cfg, step) for step in (5, 6, 5)]
    assert torch.equal(first, again) and not torch.equal(first, other)
    y = torch.zeros(2, 3, 4, 6, 6)
    one, two = flowloss.draw(0, 6, 3, y), flowloss.draw(0, 6, 3, y)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[1], flowloss.draw(0, 2, 3, y)[1])

    seen = torch.cat([flowloss.draw_pairs(cfg, step) for step in range(200)])  # (400, 3, 2)
    assert seen[..., 0].eq(0).all()
    assert all(len(set(row)) == 3 for row in seen[..., 1].tolist())  # no frame twice
    counts = torch.bincount(seen[..., 1].flatten(), minlength=8)
    assert counts[0] == 0 and counts[1:].min() > 0.75 * 1200 / 7


def test_measures_of_videos_equal_plain_loops():
    a = (255 * torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))).byte()
    b = (255 * torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1))).byte()
    for k in range(2):
        want = []
        for t in range(3):
            squared = ((a[k, t].double() / 255 - b[k, t].double() / 255) ** 2).mean().item()
            want.append(-10 * math.log10(squared))
        assert flowloss.psnr(a, b)[k].item() == pytest.approx(sum(want) / 3, rel=1e-5)
    flow = randn(2, 3, 2, 4, 4)
    true = randn(2, 3, 2, 4, 4, seed=1)
    got = flowloss.end_point_error(flow, true)
    want = math.dist(flow[1, 2, :, 3, 0], true[1, 2, :, 3, 0])
    assert got[1, 2, 3, 0].item() == pytest.approx(want)

    found = flowloss.flow_of(shear, a)
    x = common.to_float(a)
    torch.testing.assert_close(found[1, 0], shear(x[1, :1], x[1, 1:2])[0])
    assert flowloss.mean_where(got, got < 0) is None


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


# ---------------------------------------- worlds

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
    assert speed[:4, 20:].max() < speed[8:12, 20:].max()  # the block moves once it is pushed
    assert speed[[0, -1]].max() < 0.5 * speed.max()  # smooth at both ends


def test_two_frames_of_the_robot_world_at_any_times_are_those_of_the_clip_and_their_flow_is_exact():
    at = lambda **kind: common.robot(common.world_rng(0, "test", 3), 64, flow=True, **kind)
    clip, pair = at(frames=16), at(frames=2, clock=np.array([2, 13]) / 15)
    assert torch.equal(pair["video"], clip["video"][[2, 13]])
    video, flow = common.to_float(pair["video"]), pair["flow"]
    on = (flow.square().sum(1).sqrt() > 8) & pair["visible"]  # more than neighbours move
    apart = lambda a, b: (a - b).abs().mean(1)[on].median()
    assert on.sum() > 50
    assert apart(warp(video[1:], flow), video[:1]) < 0.2 * apart(video[1:], video[:1])


# ---------------------------------------- end to end

@pytest.fixture
def run(runner):
    return runner(flowloss)


def test_a_run_writes_its_files_and_a_row_for_every_point(run, tmp_path):
    status, text, err = run("--out_dir", "a", "--points", "2,900")
    assert status == 0, err
    files = ("config.json log-base.csv log.csv base.pt ckpt.pt samples.gif "
             "sheet.png results.json")
    assert {p.name for p in (tmp_path / "a").iterdir()} == set(files.split())
    rows = json.loads((tmp_path / "a" / "results.json").read_text())["rows"]
    want = [("base", 0), ("reconstruction", 2), ("+ flow", 2), ("reconstruction", 4), ("+ flow", 4)]
    assert [(row["objective"], row["step"]) for row in rows] == want
    keys = "psi scale epe_moving epe_background epe_zero epe_floor psnr seed videos"
    assert set(keys.split()) <= rows[0].keys()


@pytest.fixture
def model(run, tmp_path):
    """base.pt of a run that trained."""
    assert run("--out_dir", "made")[0] == 0
    return tmp_path / "made" / "base.pt"


def test_without_train_it_starts_from_a_model_and_says_so(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(flowloss, "SHIPPED", model)
    status, text, err = run("--no-train", "--out_dir", "o")
    assert status == 0, err
    assert f"flow estimator and base model: {model}" in text
    assert not (tmp_path / "o" / "base.pt").exists()
    made = torch.load(tmp_path / "made" / "ckpt.pt", weights_only=True)["nets"]
    here = torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)["nets"]
    assert all(torch.equal(made[k], here[k]) for k in made)

    monkeypatch.setattr(flowloss, "SHIPPED", tmp_path / "nothing.pt")
    other = ("--size", 64, "--frames", 10, "--width", 16)  # for --train; here the model has them
    assert run("--no-train", "--model", model, "--out_dir", "p", *other)[0] == 0
    shape = json.loads((tmp_path / "p" / "config.json").read_text())["config"]
    assert (shape["size"], shape["frames"], shape["width"]) == (24, 8, 8)
    refused(run("--model", model, "--out_dir", "q"), "--train makes a model, --model loads one")
    refused(run("--no-train", "--out_dir", "q"), "nothing.pt is not there")
    half = torch.load(model, weights_only=True) | dict(step=2)
    torch.save(half, tmp_path / "half.pt")
    refused(run("--no-train", "--model", "half.pt", "--out_dir", "q"), "half.pt has 2 of 3 steps")
    assert not (tmp_path / "q").exists()


def test_a_model_that_is_loaded_works_in_bfloat16_where_that_is_asked_for():
    x = randn(1, 3, 16, 32, 32)
    D = []
    for amp in (False, True):
        _, base, saved = flowloss.load_model(flowloss.SHIPPED, "cpu", amp)
        with torch.no_grad():
            D.append(flowloss.denoise(base, x, torch.ones(1), x[:, :, 0]))
    assert 0 < (D[0] - D[1]).abs().max() < 0.1


def test_a_picture_is_set_in_motion_by_base_and_both_objectives(run, model, tmp_path):
    picture = np.zeros((40, 30, 3), np.uint8)
    picture[10:20] = 200
    Image.fromarray(picture).save("photo.png")
    status, text, err = run("--first", "photo.png", "--out_dir", "made", tiny=False)
    assert status == 0, err
    with Image.open(tmp_path / "made" / "flowloss-first.gif") as gif:
        assert gif.n_frames == 8 and gif.width > 3 * 24
    refused(run("--first", "photo.png", "--out_dir", "nowhere", tiny=False), "there is no run")


def test_clips_that_rest_give_no_flow_error_instead_of_nan(run, tmp_path, monkeypatch):
    monkeypatch.setattr(flowloss, "MOVING", 1e9)
    status, text, err = run("--out_dir", "o")
    assert status == 0 and err.count("warning: nothing moves in the held-out clips") == 1
    row = json.loads((tmp_path / "o" / "results.json").read_text())["rows"][-1]
    assert row["epe_moving"] is row["epe_zero"] is row["epe_floor"] is None
    assert math.isfinite(row["epe_background"])


@pytest.mark.parametrize("flags, says", [
    ("--points 1,x", "--points 1,x: must be numbers"),
    ("--size 28", "--size 28: must be a multiple of 8"),
    ("--pairs 8", "--pairs 8: a clip of 8 frames has 7"),
    ("--psi -1", "--psi -1.0: must lie between"),
    ("--first a.png", "--train makes a model, --model loads one, --first has its own: one alone"),
    ("--dataset nowhere", "no clips found: looked in data/nowhere"),
    ("--eval_only", "nothing to continue")])
def test_bad_input_is_one_clear_line_and_exit_status_2(run, tmp_path, flags, says):
    refused(run(*flags.split()), says)
    assert not list(tmp_path.rglob("*.pt"))


def test_the_shipped_flow_estimator_sees_motion_and_the_base_denoises():
    raft, base, saved = flowloss.load_model(flowloss.SHIPPED, "cpu")
    assert flowloss.SHIPPED.stat().st_size < 4e6
    small = [saved["raft"], saved["base"]]
    assert sum(2 * v.numel() for part in small for v in part.values()) < 2e6
    clip = common.robot(common.world_rng(0, "test", 1), 32, 16, flow=True)
    true = clip["flow"][None]
    error = flowloss.end_point_error(flowloss.flow_of(raft, clip["video"][None]), true)
    size = true.square().sum(2).sqrt()
    assert error[size > 0.25].mean() < 0.3 * size[size > 0.25].mean()

    y = (common.to_float(clip["video"]).transpose(0, 1)[None] - base.mean) / base.std
    sigma = torch.tensor([0.5])
    with torch.no_grad():
        D = flowloss.denoise(base, y + 0.5 * randn(*y.shape), sigma, y[:, :, 0])
    assert recon_loss(D, y, sigma).item() < 0.15  # untrained: about 1
    assert set(saved["kept"][max(saved["kept"])]) == {"none", "gated"} and saved["made"]["command"]


def test_of_a_world_whose_flow_is_not_known_the_estimator_finds_it(runner, tmp_path):
    assert runner(flowloss)("--dataset", "sky", "--out_dir", "o")[0] == 0
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert all(row["epe_floor"] is None and row["epe_moving"] > 0 for row in rows)
