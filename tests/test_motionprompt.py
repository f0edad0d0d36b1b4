"""motionprompt.py: the method against oracles and on a toy with a known optimum; then the script end to end."""
import inspect
import json

import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import flowloss
import motionprompt
from common import karras_sigmas
from motionprompt import euler, flow_of_pairs, latent_guidance, motion_loss, prompted, random_pairs, total_variation


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- the loss

def test_total_variation_equals_a_plain_loop_and_is_zero_for_constant_flow():
    flow, want = randn(2, 2, 3, 4).double(), []
    for f in flow:
        right = [abs(f[c, y, x + 1] - f[c, y, x]) for c in range(2) for y in range(3) for x in range(3)]
        down = [abs(f[c, y + 1, x] - f[c, y, x]) for c in range(2) for y in range(2) for x in range(4)]
        want.append((sum(right) / len(right) + sum(down) / len(down)).item())
    assert total_variation(flow).tolist() == pytest.approx(want)
    assert total_variation(torch.ones(1, 2, 5, 5) * torch.tensor([3.0, -1]).view(1, 2, 1, 1)).item() == 0


def test_the_loss_is_the_papers_and_stable_where_phi_is_near_one():
    logit, flow, T, T0 = randn(6), randn(6, 2, 4, 4), randn(3, 2, 5, seed=1), randn(3, 2, 5, seed=2)
    phi = torch.sigmoid(logit).view(3, 2)
    want = 0.7 * (1 - phi).log().mean(1) + 0.3 * total_variation(flow).view(3, 2).mean(1) \
        + 0.2 * (T - T0).square().sum((1, 2))
    torch.testing.assert_close(motion_loss(logit, flow, T, T0, (0.7, 0.3, 0.2)), want)
    far = torch.tensor([200.0], requires_grad=True)
    loss = motion_loss(far, flow[:1], T[:1], T[:1], (1, 0, 0))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-200) and far.grad.item() == pytest.approx(-1)


def test_the_gradient_of_the_penalty_by_hand():
    T, T0 = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1)
    motion_loss(torch.zeros(2), torch.zeros(2, 2, 4, 4), T, T0, (0, 0, 0.5)).sum().backward()
    torch.testing.assert_close(T.grad, T.detach() - T0)  # 2 x 0.5 (T - T0)


def test_pairs_are_uniform_over_all_that_are_allowed():
    i, j = random_pairs(20000, 6, 1, 3, torch.Generator().manual_seed(0))
    assert (i < j).all() and (j - i).max() == 3 and i.min() == 0 and j.max() == 5
    counts = torch.bincount((6 * i + j).flatten(), minlength=36)
    allowed = counts[counts > 0]
    assert len(allowed) == 5 + 4 + 3 and (allowed.float() / 20000 - 1 / 12).abs().max() < 0.01


def test_two_frames_of_a_pair_are_decoded_and_no_more():
    D, i, j = randn(2, 3, 6, 4, 4), torch.tensor([[0, 2], [1, 4]]), torch.tensor([[3, 5], [2, 5]])
    shapes = []
    flow = flow_of_pairs(D, i, j, lambda v: shapes.append(v.shape) or v, lambda a, b: torch.stack([a, b], 1)[:, :, 0])
    assert shapes == [(4, 3, 2, 4, 4)]
    for k, (b, p, q) in enumerate([(0, 0, 3), (0, 2, 5), (1, 1, 2), (1, 4, 5)]):
        assert torch.equal(flow[k], torch.stack([D[b, 0, p], D[b, 0, q]]))


# ---------------------------------------------------------------------------------------------- sampling

L, d = 4, 3
prompt, start = randn(2, L, d), torch.zeros(2, 1, d)
encode = lambda p, T=None: p if T is None else torch.cat([p[:, :-1], T], 1)  # a text encoder that encodes nothing
mix = randn(d, 3, seed=5)
denoise = lambda x, sigma, c: x / (1 + sigma.view(-1, 1, 1, 1, 1) ** 2) \
    + (c[:, -1] @ mix).view(-1, 3, 1, 1, 1) * torch.arange(x.shape[2]).view(1, 1, -1, 1, 1)  # last token: a motion
estimate = lambda a, b: (b - a)[:, :2]
want = torch.tensor([0.6, -0.4]).view(1, 2, 1, 1)
discriminate = lambda flow: 4 - 8 * (flow.mean((2, 3), keepdim=True) - want).square().sum((1, 2, 3))  # best at `want`


def sample(guided=(0, 1, 2), K=3, lr=0.1, weights=(1.0, 0.0, 0.0), x=None, sigmas=karras_sigmas(6), seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    x = sigmas[0] * randn(2, 3, 5, 4, 4, seed=3) if x is None else x
    return motionprompt.motionprompt(denoise, encode, prompt, start, x, sigmas, lambda v: v, estimate, discriminate,
                                     guided, K, lr, weights, lambda n: random_pairs(n, 5, 2, 1, g), **more)


def test_without_steps_or_guidance_it_is_plain_sampling_bit_for_bit():
    sigmas, x = karras_sigmas(6), karras_sigmas(6)[0] * randn(2, 3, 5, 4, 4, seed=3)
    free = x
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        D = denoise(free, torch.full((len(x),), now), prompt)
        free = free + (then - now) * ((free - D) / now)
    for other in (sample(K=0), sample(guided=()), euler(denoise, x, sigmas, lambda *_: prompt)):
        assert torch.equal(other, free)
    assert not torch.equal(sample(), free)


def test_the_second_half_is_plain_sampling_from_the_same_latent():
    sigmas, half = karras_sigmas(6), []
    def seen(x, sigma, c):
        half.append((sigma[0].item(), x))
        return denoise(x, sigma, c)
    g = torch.Generator().manual_seed(0)
    out = motionprompt.motionprompt(seen, encode, prompt, start, sigmas[0] * randn(2, 3, 5, 4, 4, seed=3), sigmas,
                                    lambda v: v, estimate, discriminate, (0, 1, 2), 3, 0.1, (1.0, 0, 0),
                                    lambda n: random_pairs(n, 5, 2, 1, g), inner=denoise)
    x = next(x for s, x in half if s == pytest.approx(sigmas[3].item()))
    assert torch.equal(out, euler(denoise, x, sigmas[3:], lambda *_: prompt))


def test_only_the_appended_tokens_move():
    before, tokens, given = prompt.clone(), [], []
    def watched(p, T=None):
        given.append(p)
        return encode(p, T)
    g = torch.Generator().manual_seed(0)
    x = (karras_sigmas(4)[0] * randn(2, 3, 5, 4, 4)).requires_grad_()
    weight = torch.nn.Parameter(mix.clone())
    motionprompt.motionprompt(denoise, watched, prompt, start, x, karras_sigmas(4), lambda v: v, estimate, discriminate,
                              (0, 1), 2, 0.1, (1.0, 0, 0), lambda n: random_pairs(n, 5, 2, 1, g),
                              watch=lambda step, T: tokens.append(T))
    assert torch.equal(prompt, before) and all(p is prompt for p in given) and x.grad is None and weight.grad is None
    assert len(tokens) == 2 and all((T != start).all() and not T.requires_grad for T in tokens) and (start == 0).all()


def test_the_loss_falls_and_the_tokens_reach_the_known_optimum():
    found, phi = [], []
    still = torch.zeros(2, 3, 5, 4, 4)  # where flow is what the token says, token @ mix a frame
    for K in (1, 10, 400):
        sample(guided=(0,), K=K, lr=0.02, x=still, watch=lambda step, T: found.append(T[:, 0] @ mix[:, :2]))
        phi.append(discriminate(found[-1].view(2, 2, 1, 1)).min().item())
    assert phi[0] < phi[1] < phi[2]
    torch.testing.assert_close(found[-1], want.view(1, 2).expand(2, 2), rtol=0, atol=1e-3)


def test_tokens_go_on_from_step_to_step_unless_they_are_not_to():
    fresh, kept = [], []
    sample(guided=(1, 2), K=1, keep=False, watch=lambda step, T: fresh.append(T))
    sample(guided=(1, 2), K=1, watch=lambda step, T: kept.append(T))
    assert torch.equal(fresh[0], kept[0]) and fresh[1].abs().max() < 0.11 < kept[1].abs().max()  # Adam: lr at first


def test_a_video_is_guided_alike_alone_and_in_a_batch():
    all_pairs = torch.triu_indices(5, 5, 1)[:, None].expand(-1, 2, -1)  # no chance in the choice of pairs
    def of(b):
        x = 9 * randn(2, 3, 5, 4, 4)[b]
        return motionprompt.motionprompt(denoise, encode, prompt[b], start[b], x, karras_sigmas(4), lambda v: v,
                                         estimate, discriminate, (0, 1), 2, 0.1, (1.0, 0.1, 0.1),
                                         lambda n: all_pairs[:, :n])
    torch.testing.assert_close(of(slice(0, 1)), of(slice(0, 2))[:1])


def test_latent_guidance_lowers_the_loss_and_moves_by_eta_sigma():
    sigmas, x, seen = torch.tensor([5.0, 1.0, 0.0]), 5 * randn(2, 3, 5, 4, 4), []
    def watched(x, sigma, c):
        seen.append(x.detach())
        return denoise(x, sigma, c)
    all_pairs = torch.triu_indices(5, 5, 1)[:, None].expand(-1, 2, -1)
    mild = lambda flow: discriminate(flow) / 20  # log(1 - phi) has no gradient where phi is 0
    latent_guidance(watched, prompt, x, sigmas, lambda v: v, estimate, mild, (0,), 2, 0.01, (1, 0, 0),
                    lambda n: all_pairs[:, :n])
    moved = (seen[1] - seen[0]).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(moved, torch.full((2,), 0.05))
    def loss(x):
        flow = flow_of_pairs(denoise(x, torch.full((2,), 5.0), prompt), *all_pairs[:, :2], lambda v: v, estimate)
        return F.logsigmoid(-mild(flow)).view(2, -1).mean(1)
    assert (loss(seen[2]) < loss(seen[0])).all()


def test_latent_guidance_optimises_under_the_inner_denoiser_and_samples_under_the_other():
    sigmas, called = karras_sigmas(3), []
    named = lambda name: lambda x, sigma, c: called.append((name, torch.is_grad_enabled())) or denoise(x, sigma, c)
    pairs = lambda n: torch.triu_indices(5, 5, 1)[:, None].expand(-1, n, -1)
    latent_guidance(named("plain"), prompt, randn(2, 3, 5, 4, 4), sigmas, lambda v: v, estimate, discriminate, (1,), 2,
                    0.01, (1, 0, 0), pairs, inner=named("inner"))
    assert called == [("plain", False)] + 2 * [("inner", True)] + 2 * [("plain", False)]


def test_guidance_by_the_prompt_is_linear_in_rho_and_one_batch():
    sizes, null = [], torch.ones(1, L, d)
    def counted(x, sigma, c):
        sizes.append(len(x))
        return denoise(x, sigma, c)
    x, sigma = randn(2, 3, 5, 4, 4), torch.tensor([1.0, 2.0])
    D_P, D_0 = denoise(x, sigma, prompt), denoise(x, sigma, null.expand_as(prompt))
    torch.testing.assert_close(prompted(counted, null, 1.5)(x, sigma, prompt), D_P + 1.5 * (D_P - D_0))
    assert torch.equal(prompted(counted, null, 0.0)(x, sigma, prompt), D_P) and sizes == [4, 2]


def test_tweedies_estimate_is_exact_for_gaussian_data():
    sigma, y = torch.full((200000,), 0.8), randn(200000, 1)
    x = y + 0.8 * randn(200000, 1, seed=1)
    D = common.edm_denoise(lambda z, c: 0 * z, x, sigma)  # with F = 0 D is the posterior mean for data of variance 1
    torch.testing.assert_close(D, x / (1 + 0.64))
    near = (x - 1).abs() < 0.05
    assert y[near].mean().item() == pytest.approx(D[near].mean().item(), abs=0.02)


# ---------------------------------------------------------------------------------------------- networks

def test_the_tiny_raft_is_the_one_of_flowloss_word_for_word():
    def copy(script):
        text = inspect.getsource(script)
        start = text.index("-- tiny RAFT\n")
        return text[start:text.index("\n# ----", start)].replace("RAFT\n\n", "RAFT\n").rstrip()
    assert copy(motionprompt) == copy(flowloss) and len(copy(flowloss).splitlines()) > 70


def test_appended_tokens_take_the_last_places_and_reach_every_place_of_the_text():
    torch.manual_seed(0)
    net = motionprompt.TextEncoder(9, 6, 32)
    prompt = net.words(torch.tensor([[1, 2, 3, 0, 0, 0]]))
    T = prompt[:, -2:].clone()
    torch.testing.assert_close(net(prompt, T), net(prompt))  # the empty word appended is nothing appended
    changed = (net(prompt, T + 1) - net(prompt)).abs().amax(2)[0]
    assert (changed > 0).all()


def test_spread_moves_the_word_of_quality_over_the_free_places_and_nothing_else():
    text = torch.tensor([[1, 2, 3, 4, 5, 9, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0, 0]]).repeat(300, 1)
    moved = motionprompt.spread(text, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, :5], text[:, :5]) and moved[1::2, 5:].eq(0).all()
    where = (moved[::2, 5:] == 9)
    assert where.sum(1).eq(1).all() and (where.float().mean(0) - 1 / 4).abs().max() < 0.08
    assert (moved[::2, 5:].sum(1) == 9).all()


def test_the_discriminator_tells_flows_that_differ_from_flows_that_do_not():
    def accuracy(shift):
        torch.manual_seed(0)
        net = motionprompt.Discriminator(16)
        optimiser = torch.optim.AdamW(net.parameters(), 1e-3)
        draw = lambda k: (randn(32, 2, 1, 1, seed=k) + 0.1 * randn(32, 2, 16, 16, seed=k + 5000),
                          randn(32, 2, 1, 1, seed=k + 7000) + (0.1 + shift) * randn(32, 2, 16, 16, seed=k + 9000))
        for k in range(40):
            real, fake = draw(k)
            loss = -(F.logsigmoid(net(real)).mean() + F.logsigmoid(-net(fake)).mean())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        real, fake = draw(4000)
        return ((net(real) > 0).float().mean() + (net(fake) <= 0).float().mean()).item() / 2
    assert accuracy(1.0) > 0.9 and abs(accuracy(0.0) - 0.5) < 0.2


def test_a_large_vit_sees_the_flow_as_an_image_and_passes_gradients_on(run, monkeypatch):
    seen = []
    large = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1000))
    large.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    flow = randn(5, 2, 16, 16).requires_grad_()
    logit = motionprompt.Discriminator(16, large)(flow)
    assert logit.shape == (5,) and seen[0].shape == (5, 3, 224, 224) and (seen[0][:, 2] == 0).all()
    assert torch.autograd.grad(logit.sum(), flow)[0].abs().sum() > 0

    def offline(weights):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.models, "vit_b_16", offline)
    status, _, err = run("--vit", "vit_b_16")
    assert status == 2 and "--vit vit_b_16: its weights cannot be downloaded (no network); use --vit tiny" in err


def test_flow_of_small_clips_is_in_their_own_pixels():
    estimate = motionprompt.estimator(lambda a, b, updates: torch.full_like(a[:, :2], 3.0), 16)
    assert torch.equal(estimate(randn(1, 3, 16, 16), randn(1, 3, 16, 16)), torch.full((1, 2, 16, 16), 1.5))


# ---------------------------------------------------------------------------------------------- metrics

def test_consistency_is_one_for_a_shape_that_moves_and_falls_when_it_changes_or_the_background_flickers():
    clips = [common.sprites(common.world_rng(0, "test", k), 32, 8) for k in range(300)]
    video, flaw = torch.stack([c["video"] for c in clips]), [c["flaw"] for c in clips]
    subject, ground = common.consistency(video)
    of = lambda x, kind: x[torch.tensor([f == kind for f in flaw])].mean().item()
    assert of(subject, "") > 0.95 and of(subject, "changes") < of(subject, "") - 0.05
    assert of(subject, "flickers") < of(subject, "") - 0.05 and of(ground, "") > 0.8
    noisy = (video.float() + 20 * randn(*video.shape)).clamp(0, 255).to(torch.uint8)
    assert (common.consistency(noisy)[1] < ground - 0.05).float().mean() > 0.95


def test_a_calibrated_score_is_the_share_of_real_ones():
    p = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    real = torch.rand(20000, generator=torch.Generator().manual_seed(1)) < p
    for phi, share in common.calibration(p[real], p[~real]):
        assert phi == pytest.approx(share, abs=0.03)


# ---------------------------------------------------------------------------------------------- end to end

@pytest.fixture
def run(runner):
    return runner(motionprompt)


CLOCK = ("s_per_video", "cost_ratio")
numbers = lambda folder: [{k: v for k, v in r.items() if k not in CLOCK}
                          for r in json.loads((folder / "results.json").read_text())["rows"]]


def test_a_run_writes_all_and_repeats_its_numbers(run, tmp_path):
    status, text, err = run("--out_dir", "a", "--methods", "all")
    assert status == 0, err
    files = "config.json log.csv ckpt.pt samples.gif sheet.png curves.png results.json"
    assert {p.name for p in (tmp_path / "a").iterdir()} == set(files.split())
    rows = numbers(tmp_path / "a")
    assert [r["method"] for r in rows] == list(motionprompt.METHODS)
    keys = ("method n K lr coherent coherent_ci subject_consistency background_consistency flicker motion_smoothness "
            "dynamic_degree prompt_acc disc_score peak_mb evaluations seed")
    assert set(keys.split()) <= rows[0].keys()
    assert run("--out_dir", "a", "--methods", "base,words", "--eval_only")[0] == 0
    for row, before in zip(numbers(tmp_path / "a"), rows):
        same = row.keys() - {"coherent_ci_words", "coherent_ci_random"}  # compared with what was not sampled now
        assert {k: row[k] for k in same} == {k: before[k] for k in same}


def test_tokens_are_in_the_text_at_the_guided_steps_alone(run, tmp_path, monkeypatch):
    given, encode = [], motionprompt.TextEncoder.forward
    monkeypatch.setattr(motionprompt.TextEncoder, "forward",
                        lambda self, p, T=None: given.append(T is not None) or encode(self, p, T))
    for guided in ("", "1,3"):
        assert run("--methods", "words", "--out_dir", guided or "half", "--guided", guided)[0] == 0
        assert given[-4:] == [guided == "", True, False, guided != ""]
    status, _, err = run("--guided", "2-9")
    assert status == 2 and "--guided 2-9: must be steps from 0 to 3" in err


def test_without_optimisation_the_tokens_are_the_words(run, tmp_path):
    assert run("--K", 0, "--methods", "words,motionprompt,random")[0] == 0
    rows = numbers(tmp_path / "out" / "motionprompt-sprites-procedural")
    same = [{k: v for k, v in r.items() if k != "method" and not k.startswith("coherent_ci")} for r in rows]
    assert same[0] == same[2] and rows[1]["evaluations"] == rows[0]["evaluations"]


@pytest.mark.parametrize("flags, says", [
    ("--methods best", "--methods best: 'best' is unknown"), ("--methods base,random", "name that one before it"),
    ("--tokens sharp", "--tokens sharp: 'sharp' is in no caption"), ("--tokens a,a,a,a", "at most 3 words"),
    ("--gap 6", "--gap 6: must be below --frames 6"),
    ("--clips 3", "3 training clips: the discriminator needs 4"), ("--size 18", "--size 18"),
    ("--lr -1", "--lr -1.0: must lie between"),
    ("--dataset nowhere", "no clips found: looked in data/nowhere"), ("--eval_only", "nothing to continue")])
def test_bad_input_is_one_clear_line_and_exit_status_2(run, tmp_path, flags, says):
    status, _, err = run(*flags.split())
    assert status == 2 and says in err and err.count("\n") == 1 and not list(tmp_path.rglob("*.pt"))
