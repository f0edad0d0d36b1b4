"""motionprompt.py: the method against oracles and a toy with a known optimum; then end to end."""
import inspect
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import flowloss
import flowmo
import motionprompt
from common import karras_sigmas, like
from conftest import ROOT, content, refused
from motionprompt import (append, as_edm, flow_of_pairs, motion_loss, optimise_tokens, prompted,
                          random_pairs, random_tokens, total_variation)
from test_flowmo import FakeClips, given, gpu  # noqa: F401


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------- the loss

def test_total_variation_equals_a_plain_loop_and_is_zero_for_constant_flow():
    flow = randn(2, 2, 3, 4)
    want = []
    for f in flow:
        right = []
        for c, y, x in itertools.product(range(2), range(3), range(3)):
            right.append(abs(f[c, y, x + 1] - f[c, y, x]))
        down = []
        for c, y, x in itertools.product(range(2), range(2), range(4)):
            down.append(abs(f[c, y + 1, x] - f[c, y, x]))
        want.append((sum(right) / len(right) + sum(down) / len(down)).item())
    assert total_variation(flow).tolist() == pytest.approx(want)
    assert total_variation(torch.full((1, 2, 5, 5), 3.0)).item() == 0


def test_the_loss_is_the_papers_and_exact_where_phi_is_near_one():
    logit, flow = randn(6), randn(6, 2, 4, 4)
    T, T0 = randn(3, 2, 5, seed=1), randn(3, 2, 5, seed=2)
    phi = torch.sigmoid(logit).view(3, 2)
    want = 0.7 * (1 - phi).log().mean(1)
    want = want + 0.3 * total_variation(flow).view(3, 2).mean(1)
    want = want + 0.2 * (T - T0).square().sum((1, 2))
    torch.testing.assert_close(motion_loss(logit, flow, T, T0, (0.7, 0.3, 0.2)), want)
    far = torch.tensor([200.0], requires_grad=True)
    loss = motion_loss(far, flow[:1], T[:1], T[:1], (1, 0, 0))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-200) and far.grad.item() == pytest.approx(-1)


def test_pairs_are_uniform_over_all_that_are_allowed():
    i, j = random_pairs(20000, 6, 1, 3, torch.Generator().manual_seed(0))
    assert (i < j).all() and (j - i).max() == 3 and i.min() == 0 and j.max() == 5
    counts = torch.bincount((6 * i + j).flatten(), minlength=36)
    allowed = counts[counts > 0]
    assert len(allowed) == 5 + 4 + 3 and (allowed.float() / 20000 - 1 / 12).abs().max() < 0.01


def test_two_frames_of_a_pair_are_decoded_and_no_more():
    D, i, j = randn(2, 3, 6, 4, 4), torch.tensor([[0, 2], [1, 4]]), torch.tensor([[3, 5], [2, 5]])
    shapes = []

    def decode(v):
        shapes.append(v.shape)
        return v

    flow = flow_of_pairs(D, i, j, decode, lambda a, b: torch.stack([a[:, 0], b[:, 0]], 1))
    assert shapes == [(4, 3, 2, 4, 4)]
    for k, (b, p, q) in enumerate([(0, 0, 3), (0, 2, 5), (1, 1, 2), (1, 4, 5)]):
        assert torch.equal(flow[k], torch.stack([D[b, 0, p], D[b, 0, q]]))
    with pytest.raises(ValueError, match="5 frames of 2"):  # as a VAE that compresses time
        flow_of_pairs(D, i, j, lambda z: z[:, :, [0, 0, 0, 1, 1]], lambda a, b: a[:, :2])


# ---------------------------------------- a toy: the last token is a motion, and one is the best

L, d = 4, 3
PROMPT, START, MIX = randn(2, L, d), torch.zeros(2, 1, d), randn(d, 3, seed=5)
WANT = torch.tensor([0.6, -0.4])


def encode(T):
    return PROMPT if T is None else torch.cat([PROMPT[:, :-1], T.expand(2, 1, d)], 1)


def denoise(x, sigma, c):
    motion = (c[:, -1] @ MIX.to(c)).view(-1, 3, 1, 1, 1)
    moved = motion * torch.arange(x.shape[2]).to(x).view(1, 1, -1, 1, 1)
    return x / (1 + like(sigma, x) ** 2) + moved


def toy_loss(lambda3=0.0):
    def loss(D, T):
        flow = D[:, :2].float().diff(dim=2).mean((2, 3, 4))  # (B, 2)
        return 8 * (flow - WANT).square().sum(1) + lambda3 * T.square().sum((1, 2))

    return loss


def sample(guided=(0, 1, 2), K=3, lr=0.1, sigmas=karras_sigmas(6), inner=denoise, outer=denoise):
    x = sigmas[0] * randn(2, 3, 5, 4, 4, seed=3)
    return motionprompt.motionprompt(
        outer, inner, encode, START, x, sigmas, guided, toy_loss(), K, lr)


def plain_sampling(x, sigmas, c_at):
    for step, (now, then) in enumerate(itertools.pairwise(sigmas.tolist())):
        D = denoise(x, torch.full((len(x),), now), c_at(step))
        x = x + (then - now) * ((x - D) / now)
    return x


def test_without_guided_steps_it_is_plain_sampling_and_with_k_0_that_with_the_words():
    sigmas = karras_sigmas(6)
    x = sigmas[0] * randn(2, 3, 5, 4, 4, seed=3)
    out, path = sample(guided=())
    torch.testing.assert_close(out, plain_sampling(x, sigmas, lambda step: PROMPT))
    assert path == {}
    out, path = sample(guided=(1, 2), K=0)
    words = plain_sampling(x, sigmas, lambda step: encode(START if step in (1, 2) else None))
    torch.testing.assert_close(out, words)
    assert list(path) == [1, 2] and torch.equal(path[2], START)
    assert not torch.allclose(sample()[0], out)


def test_the_other_steps_have_the_plain_prompt_and_guided_ones_the_tokens():
    seen = []

    def outer(x, sigma, c):
        seen.append((c, torch.is_grad_enabled()))
        return denoise(x, sigma, c)

    _, path = sample(guided=(1, 3), outer=outer)
    assert [grad for _, grad in seen] == 6 * [False]
    for step, (c, _) in enumerate(seen):
        assert torch.equal(c, encode(path[step]) if step in path else PROMPT)
    assert list(path) == [1, 3]


def test_tokens_go_on_from_step_to_step_with_adam_anew():
    _, path = sample(guided=(0, 1), K=1, lr=0.1)
    first = (path[0] - START).abs()
    # Adam's first step
    torch.testing.assert_close(first, torch.full_like(first, 0.1), atol=1e-3, rtol=0)
    second = (path[1] - path[0]).abs()
    torch.testing.assert_close(second, torch.full_like(second, 0.1), atol=1e-3, rtol=0)


def test_tokens_reach_the_known_optimum_and_the_penalty_holds_them_back():
    x, sigma = torch.zeros(2, 3, 5, 4, 4), torch.full((2,), 5.0)
    found = optimise_tokens(START, denoise, encode, toy_loss(), x, sigma, 400, 0.02)
    flow = found[:, 0] @ MIX[:, :2]
    torch.testing.assert_close(flow, WANT.expand(2, 2), rtol=0, atol=1e-2)
    held = optimise_tokens(START, denoise, encode, toy_loss(10.0), x, sigma, 400, 0.02)
    assert (held.norm(dim=2) < 0.7 * found.norm(dim=2)).all()


def test_nothing_but_the_tokens_gets_a_gradient():
    weight = torch.nn.Parameter(torch.ones(()))
    x = (9 * randn(2, 3, 5, 4, 4)).requires_grad_()

    def inner(x, sigma, c):
        return weight * denoise(x, sigma, c)

    before = PROMPT.clone()
    sigma = torch.full((2,), 5.0)
    T = optimise_tokens(START, inner, encode, toy_loss(), x, sigma, 2, 0.1)
    assert weight.grad is None and x.grad is None and not T.requires_grad
    assert torch.equal(PROMPT, before) and (START == 0).all()
    with torch.no_grad():
        again = optimise_tokens(START, inner, encode, toy_loss(), x, sigma, 2, 0.1)
    assert torch.equal(T, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_optimised_in_float32_whatever_the_pipeline_has(dtype):
    def half(T):
        return encode(None if T is None else T.float()).to(dtype)

    x, sigma = randn(2, 3, 5, 4, 4), torch.full((2,), 2.0)
    want = optimise_tokens(START, denoise, encode, toy_loss(), x, sigma, 5, 1e-3)
    got = optimise_tokens(START, denoise, half, toy_loss(), x.to(dtype), sigma, 5, 1e-3)
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    assert (got != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_end_the_sampling_at_a_step_that_is_named(dtype, wrong):
    def broken(x, sigma, c):
        D = denoise(x, sigma, c.to(x.dtype))
        return D * wrong if sigma[0] < 30 else D

    def run():
        x = (9 * randn(2, 3, 5, 4, 4)).to(dtype)
        return motionprompt.motionprompt(
            denoise, broken, encode, START, x, karras_sigmas(6), {0, 2}, toy_loss())

    assert karras_sigmas(6)[0] > 30 > karras_sigmas(6)[2]
    with pytest.raises(FloatingPointError, match="step 2 of the sampler.*not finite"):
        run()
    with pytest.raises(FloatingPointError, match="not finite"):
        optimise_tokens(START, broken, encode, toy_loss(), randn(2, 3, 5, 4, 4).to(dtype),
                        torch.full((2,), 5.0), 1, 0.1)


@pytest.mark.parametrize("guided", [(), (0, 1, 2, 3, 4, 5)])
def test_a_video_that_is_not_finite_is_no_black_clip(guided):
    def broken(x, sigma, c):  # as a network that overflows in its last step
        return denoise(x, sigma, c) / (sigma[0] > 0.01)

    x = 80 * randn(2, 3, 5, 4, 4)
    with pytest.raises(FloatingPointError, match="step 5 of the sampler: x is not finite"):
        motionprompt.motionprompt(
            broken, denoise, encode, START, x, karras_sigmas(6), guided, toy_loss())


def test_tokens_beyond_the_type_of_the_networks_are_told_too():
    x, sigma = randn(2, 3, 5, 4, 4).half(), torch.full((2,), 5.0)
    with pytest.raises(FloatingPointError, match="torch.float16"):  # each step moves them by 1e5
        optimise_tokens(START, denoise, encode, toy_loss(), x, sigma, 1, 1e5)
    far = optimise_tokens(START, denoise, encode, toy_loss(), x.float(), sigma, 1, 1e5)
    assert far.isfinite().all() and far.abs().min() > 9e4


@pytest.mark.parametrize("zeros", [1, 2, 5])
def test_a_step_from_zero_to_zero_changes_nothing(zeros):
    def network(x, sigma, c):
        return denoise(x, sigma, c) + 0 * like(sigma.log(), x)  # as EDM's, which takes ln sigma

    x = 80 * randn(2, 3, 5, 4, 4)
    once = karras_sigmas(4)
    levels = torch.cat([once, torch.zeros(zeros)])
    want, _ = motionprompt.motionprompt(network, network, encode, START, x, once, (), None)
    got, _ = motionprompt.motionprompt(network, network, encode, START, x, levels, (), None)
    assert torch.equal(got, want) and got.isfinite().all()
    got = random_tokens(network, encode, START, {}, x, levels, None)
    assert torch.equal(got, want)
    mixed = motionprompt.euler_step(network, x, torch.tensor([0.0, 2.0]), torch.zeros(2), PROMPT)
    assert torch.equal(mixed[0], x[0]) and not torch.equal(mixed[1], x[1])


def test_random_tokens_go_as_far_as_those_of_the_path():
    sigmas = karras_sigmas(6)
    x = sigmas[0] * randn(2, 3, 5, 4, 4, seed=3)
    _, path = sample(guided=(1, 2))
    far = []

    def watched(T):
        far.append(None if T is None else T)
        return encode(T)

    out = random_tokens(denoise, watched, START, path, x, sigmas, torch.Generator().manual_seed(0))
    used = [T for T in far if T is not None]
    for T, (step, there) in zip(used, path.items(), strict=True):
        torch.testing.assert_close(T.norm(dim=2), there.norm(dim=2))
        assert not torch.allclose(T, there, atol=0.05)
    assert out.isfinite().all()


def test_the_method_pastes_as_one_block():
    source = (ROOT / "motionprompt.py").read_text()
    block = source[source.index("# ---------------------------------------- THE METHOD"):]
    block = block[:block.index("def euler_step")]
    pasted = {"torch": torch, "F": F}
    exec(block, pasted)
    x, sigma = randn(2, 3, 5, 4, 4), torch.full((2,), 2.0)
    args = (START, denoise, encode, toy_loss(), x, sigma, 2, 0.1)
    assert torch.equal(pasted["optimise_tokens"](*args), optimise_tokens(*args))


# ---------------------------------------- EDM out of flow matching

def test_the_optimum_of_flow_matching_read_as_edm_is_edms_optimum_on_a_gaussian():
    s = 1.7  # data N(0, s^2); both optima in closed form

    def u(z, t, c):
        t = like(t, z)
        return z * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    x = randn(5, 3).double()
    sigma = torch.tensor([0.01, 0.5, 1.0, 7.0, 80.0]).double()
    D = as_edm(u)(x, sigma, None)
    torch.testing.assert_close(D, x * (s**2 / (s**2 + sigma**2)).view(-1, 1))


def test_eulers_steps_are_the_same_path_on_both_clocks():
    """A fine walk from sigma 4 down to 1 is one from t = 0.8 to 0.5."""
    def u(z, t, c):
        return (1.3 * z).sin() + like(t, z)

    sigmas = torch.linspace(4, 1, 3001).double()
    x = randn(2, 3).double()
    z = x / 5
    for now, then in itertools.pairwise(sigmas):
        x = motionprompt.euler_step(as_edm(u), x, now.expand(2), then, None)
    times = torch.linspace(0.8, 0.5, 3001).double()
    z = flowmo.sample(lambda z, t: u(z, t.to(z), None), z, times)
    torch.testing.assert_close(x / 2, z, atol=2e-3, rtol=0)


def test_guidance_by_the_prompt_is_that_of_diffusers_in_one_batch():
    sizes = []

    def counted(x, sigma, c):
        sizes.append(len(x))
        return denoise(x, sigma, c)

    c_0 = torch.ones(1, L, d)
    x, sigma = randn(2, 3, 5, 4, 4), torch.tensor([1.0, 2.0])
    D_P, D_0 = denoise(x, sigma, PROMPT), denoise(x, sigma, c_0.expand_as(PROMPT))
    got = prompted(counted, c_0, 2.5)(x, sigma, PROMPT)
    torch.testing.assert_close(got, D_0 + 2.5 * (D_P - D_0))
    assert sizes == [4]


def test_tokens_stand_right_behind_the_words():
    prompt, tokens = randn(2, 6, 3), randn(2, 2, 3, seed=1)
    got = append(prompt, tokens, torch.tensor([2, 4]))
    assert torch.equal(got[0, 2:4], tokens[0]) and torch.equal(got[1, 4:6], tokens[1])
    assert torch.equal(got[0, :2], prompt[0, :2]) and torch.equal(got[0, 4:], prompt[0, 4:])


# ---------------------------------------- networks

def section(script, name):
    text = inspect.getsource(script)
    start = text.index(f"# ---------------------------------------- {name}\n")
    end = text.index("\n# ----", start + 1)
    return text[start:end].rstrip()


def test_the_copies_are_word_for_word_the_same():
    raft = section(flowloss, "tiny RAFT")
    assert section(motionprompt, "tiny RAFT") == raft and len(raft.splitlines()) > 70
    network = section(flowmo, "network: text to video").split("\ndef build")[0].rstrip()
    copied = section(motionprompt, "network: text to video")
    assert copied == network and len(network.splitlines()) > 100


def test_the_discriminator_tells_flows_that_differ_from_flows_that_do_not():
    def accuracy(shift):
        torch.manual_seed(0)
        net = motionprompt.Discriminator(16)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

        def draw(k):
            real = randn(32, 2, 1, 1, seed=k) + 0.1 * randn(32, 2, 16, 16, seed=k + 5000)
            rough = (0.1 + shift) * randn(32, 2, 16, 16, seed=k + 9000)
            return real, randn(32, 2, 1, 1, seed=k + 7000) + rough

        for k in range(40):
            real, fake = draw(k)
            loss = -(F.logsigmoid(net(real)).mean() + F.logsigmoid(-net(fake)).mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        real, fake = draw(4000)
        return ((net(real) > 0).float().mean() + (net(fake) <= 0).float().mean()).item() / 2

    assert accuracy(1.0) > 0.9 and abs(accuracy(0.0) - 0.5) < 0.2


def test_flow_of_small_clips_is_in_their_own_pixels():
    estimate = motionprompt.estimator(lambda a, b: torch.full_like(a[:, :2], 3.0))
    flow = estimate(randn(1, 3, 16, 16), randn(1, 3, 16, 16))
    assert torch.equal(flow, torch.full((1, 2, 16, 16), 1.5))


def test_a_noisy_pair_is_of_one_clip_turned_alike_with_the_noise_that_is_asked_for():
    """Frame t of clip n holds n on its left, t on its right half."""
    clips = torch.zeros(64, 8, 3, 8, 8, dtype=torch.uint8)
    clips[..., :4] = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1, 1)
    clips[..., 4:] = 200 + torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1)
    turns = set()
    gaps = set()
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        cfg = motionprompt.Config(noise=0.0, gap=3)
        pair = motionprompt.noisy_pair(cfg, clips, rng)
        first, second = [common.to_uint8(image) for image in pair]
        named = first < 100  # (64, 3, 8, 8): the half that holds n
        assert torch.equal(named, second < 100) and torch.equal(first[named], second[named])
        assert torch.equal(first[named].view(64, -1), clips[:, 0, :, :, :4].flatten(1))
        gaps |= set((second.int() - first.int())[~named].tolist())
        turns.add(tuple(named[0, 0].flatten().tolist()))
    assert gaps == {1, 2, 3} and len(turns) == 4
    rng.manual_seed(seed)
    clean = motionprompt.noisy_pair(motionprompt.Config(noise=0.0), clips, rng)
    rng.manual_seed(seed)
    noisy = motionprompt.noisy_pair(motionprompt.Config(noise=0.2), clips, rng)
    noise = torch.stack(noisy) - torch.stack(clean)
    assert noise.std().item() == pytest.approx(0.2, rel=0.02) and noise.mean().abs() < 0.01


# ---------------------------------------- end to end

@pytest.fixture
def run(runner):
    return runner(motionprompt)


FEW = ["--prompts", 4, "--steps", 4, "--guided", "1-2", "--device", "cpu"]


def test_without_train_it_samples_with_the_shipped_models_again_and_again(run):
    status, text, err = run(*FEW, tiny=False)
    assert status == 0, err
    assert "models/sprites.pt" in text and "models/motionprompt.pt" in text
    assert "sigma" in text
    out = Path("out/motionprompt-sprites-procedural")
    assert content(out).keys() == set("config.json results.json samples.gif sheet.png".split())
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(motionprompt.METHODS.values())
    assert [row["evaluations"] for row in rows] == [4, 4, 4 + 2 * 3, 4]
    assert run(*FEW, "--K", 0, tiny=False)[0] == 0  # mere samples may be overwritten
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows[1]["coherent"] == rows[2]["coherent"] and rows[2]["over_words"] == [0, 0, 0]


def test_a_prompt_goes_back_to_both_models_of_a_run(run, tmp_path):
    video, disc = tmp_path / "video.pt", tmp_path / "disc.pt"
    video.write_bytes(motionprompt.VIDEO_MODEL.read_bytes())
    disc.write_bytes(motionprompt.SHIPPED.read_bytes())
    say = ["--prompt", "a red circle", "--steps", 2, "--guided", 1, "--K", 1, "--device", "cpu"]
    status, _, err = run("--model", video, "--out_dir", "t")
    assert status == 0, err
    status, text, err = run(*say, "--out_dir", "t", tiny=False)
    assert status == 0 and f"text-to-video model: {video}" in text, err
    assert "discriminator: t/ckpt.pt" in text
    few = ["--prompts", 2, *say[2:]]
    assert run(*few, "--model", video, "--disc", disc, "--out_dir", "s", tiny=False)[0] == 0
    status, text, err = run(*say, "--out_dir", "s", tiny=False)
    assert status == 0 and f"model: {video}" in text and f"discriminator: {disc}" in text, err


def test_preset_small_trains_for_the_shipped_video_model(run):
    few = ["--preset", "small", "--prompts", 2, "--steps", 2, "--guided", 1, "--fakes", 4]
    iters = ["--raft_iters", 1, "--disc_iters", 1, "--K", 1, "--pairs", 1]
    status, text, err = run("--train", *few, *iters, "--device", "cpu", tiny=False)
    assert status == 0, err


def test_a_discriminator_of_another_size_is_told(run, tmp_path, monkeypatch):
    saved = torch.load(motionprompt.SHIPPED, weights_only=True)
    saved["disc"] = motionprompt.Discriminator(32).state_dict()
    torch.save(saved, tmp_path / "large.pt")
    refused(run("--disc", "large.pt", *FEW, tiny=False), "large.pt is not for clips of 16 pixels")


def test_real_clips_are_read_when_they_are_needed_and_only_those(monkeypatch, tmp_path):
    class Reader:
        def __len__(self):
            return 10**6  # more than anybody could hold

        def frames(self, k, start, stop):
            asked.append(k)
            return torch.full((stop - start, 3, 16, 16), k % 256, dtype=torch.uint8)

    asked = []
    cfg = motionprompt.Config(disc_iters=2, noise=0.1)
    fake = torch.zeros(4, 8, 3, 16, 16, dtype=torch.uint8)
    raft = motionprompt.TinyRAFT().requires_grad_(False)
    motionprompt.train_discriminator(cfg, raft, Reader(), fake, tmp_path, torch.device("cpu"))
    assert len(asked) == 64 and len(set(asked)) > 60 and max(asked) > 10**5


def test_the_first_row_pays_for_no_warm_up(monkeypatch):
    """The first call of each size, with and without a gradient, takes a second, as if compiled."""
    cfg = motionprompt.Config(steps=2, guided="1", sample_batch=3, K=1)
    net, words = motionprompt.load_video_model(cfg, torch.device("cpu"))
    raft, disc = motionprompt.load_disc(cfg, 16, torch.device("cpu"))
    seen = {}

    def compiled(net, given):
        key = (len(given[0]), given[2].requires_grad)
        seen[key] = seen.get(key, 0) + 1

    net.register_forward_pre_hook(compiled)
    monkeypatch.setattr(
        motionprompt.time, "perf_counter", lambda: len(seen) + 0.01 * sum(seen.values()))
    prompts = ["a red circle"] * 5
    rows, _ = motionprompt.compare(cfg, net, words, raft, disc, prompts, motionprompt.METHODS)
    assert max(row["s_per_video"] for row in rows) < 0.1
    assert seen.keys() == {(6, False), (4, False), (3, True), (2, True)}


def test_a_prompt_becomes_one_gif_and_unknown_words_are_named(run):
    flags = ["--guided", "1-2", "--steps", 4]
    status, text, err = run("--prompt", "A red circle moving left", *flags, tiny=False)
    assert status == 0 and "wrote out/motionprompt-prompt.gif" in text, err
    with Image.open("out/motionprompt-prompt.gif") as image:
        assert image.n_frames > 1
    refused(run("--prompt", "a purple circle", tiny=False), "does not know 'purple'", "yellow")
    refused(run("--tokens", "smooth", tiny=False),
            "--tokens 'smooth'", "does not know", "authentic")
    refused(run("--prompt", "a red circle", "--out_dir", "nowhere", tiny=False),
            "--prompt: there is no run on sprites in nowhere")


@pytest.mark.parametrize("flags, says", [
    ("--guided x", "--guided x: must be steps"), ("--gap 8", "--gap 8: must be below the 8 frames"),
    ("--tokens authentic,steady,shaky", "one to 2 words"), ("--tokens ...", "one to 2 words"),
    ("--prompt x", "leave --prompt and --disc out"),
    ("--dataset nowhere", "no clips found: looked in data/nowhere"),
    ("--dataset sky", "has no captions"), ("--eval_only", "nothing to continue"),
    ("--disc x.pt", "--train makes a discriminator"), ("--model x.pt", "x.pt is not there")])
def test_bad_input_is_one_clear_line_and_exit_status_2(run, tmp_path, flags, says):
    refused(run(*flags.split()), says)
    assert not list(tmp_path.rglob("*.pt"))


# ---------------------------------------- the shipped models

def test_the_shipped_raft_sees_motion_and_the_discriminator_tells_steady_from_flawed():
    path = motionprompt.SHIPPED
    assert path.stat().st_size < 1e6
    saved = common.load_checkpoint(path, "motionprompt")
    assert saved["made"].keys() >= {"command", "commit", "steps", "minutes", "machine"}
    cfg = motionprompt.Config()
    raft, disc = motionprompt.load_disc(cfg, 16, torch.device("cpu"))
    assert cfg.gap == saved["config"]["gap"]
    estimate = motionprompt.estimator(raft)

    clips = [common.sprites(common.world_rng(5, "test", k), 16, 8, flow=True) for k in range(60)]
    steady = torch.tensor([not clip["flaw"] for clip in clips])
    video = torch.stack([clip["video"] for clip in clips])
    truth = torch.stack([clip["flow"][2] for clip in clips])[steady]
    frames = common.to_float(video[steady])
    moving = truth.square().sum(1) > 0.06
    error = (estimate(frames[:, 2], frames[:, 3]) - truth).norm(dim=1)[moving].mean()
    assert error < 0.5 * truth.norm(dim=1)[moving].mean()

    rng = torch.Generator().manual_seed(0)
    pairs = [motionprompt.noisy_pair(cfg, video, rng) for _ in range(8)]
    logits = [disc(estimate(image1, image2)) for image1, image2 in pairs]
    phi = torch.stack(logits).mean(0)
    auc = (phi[steady][:, None] > phi[~steady]).float().mean()
    assert auc > 0.75


# ---------------------------------------- a GPU, as far as that can be traced without one

def test_training_on_a_gpu_meets_no_tensor_on_the_cpu(gpu, monkeypatch, tmp_path):  # noqa: F811
    cfg, cuda = motionprompt.Config(), torch.device("cuda")
    image, flow = ((16, 3, 16, 16), torch.float32), ((16, 2, 16, 16), torch.float32)
    monkeypatch.setattr(common, "prefetched", given(image, image, flow))
    raft = motionprompt.train_raft(cfg, (3, 8, 16, 16), tmp_path, cuda)
    monkeypatch.setattr(common, "prefetched", given(image, image, image, image))
    fake = torch.empty(4, 8, 3, 16, 16)
    disc = motionprompt.train_discriminator(cfg, raft, FakeClips(), fake, tmp_path, cuda)
    for net in (raft, disc):
        assert all(p.device.type == "cuda" for p in net.parameters())
    assert not gpu


def test_the_method_and_sampling_on_a_gpu_meet_no_tensor_on_the_cpu(gpu, monkeypatch):  # noqa: F811
    def pairs(batch, frames, count, gap, rng):  # on the CPU, and its shapes depend on values
        return torch.zeros(2, batch, count, dtype=torch.long).unbind()

    monkeypatch.setattr(motionprompt, "random_pairs", pairs)
    cuda = torch.device("cuda")
    x, sigma = torch.empty(2, 3, 8, 16, 16, device=cuda), torch.empty(2, device=cuda)
    flow, logit = torch.empty(4, 2, 16, 16, device=cuda), torch.empty(4, device=cuda)
    T, c = torch.empty(2, 1, 32, device=cuda), torch.empty(2, 6, 32, device=cuda)
    raft = motionprompt.TinyRAFT().to(cuda).requires_grad_(False)
    disc = motionprompt.Discriminator(16).to(cuda).requires_grad_(False)
    i, j = pairs(2, 8, 2, 3, None)
    made = [total_variation(flow), motion_loss(logit, flow, T, T, (1, 1, 1)), disc(flow),
            flow_of_pairs(x, i, j, torch.nn.Identity(), motionprompt.estimator(raft)),
            append(c, T, torch.ones(2, dtype=torch.long, device=cuda))]
    assert all(value.device.type == "cuda" for value in made) and not gpu
    net = motionprompt.TextToVideo(4, 6, 16, 8, 32, 1).to(cuda).requires_grad_(False)
    D = as_edm(net)
    assert D(x, sigma, c).device.type == prompted(D, c[:1], 2.0)(x, sigma, c).device.type == "cuda"
    assert motionprompt.euler_step(D, x, sigma, 0.5, c).device.type == "cuda"
    cfg = motionprompt.Config(steps=3, guided="1")
    rows, videos = motionprompt.compare(
        cfg, net, ["a", "red", "bar", "authentic"], raft, disc, ["a red bar", "a"],
        motionprompt.METHODS)
    assert [row["evaluations"] for row in rows] == [3, 3, 6, 3]
    assert all(video.shape == (2, 8, 3, 16, 16) for video in videos.values())
    # Whether tokens and video are finite; optimise_tokens has its optimizer's line in torch, too.
    assert gpu == {"optimise_tokens", "motionprompt"}
