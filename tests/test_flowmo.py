"""flowmo.py: every equation against an oracle of another kind; captions and tracking; then the script end to end."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common
import flowmo
from common import COLOURS, FORMS, WAYS
from flowmo import adam_direction, flowmo_loss, flowmo_step, fold, freeinit_noise, prompted, sample, time_grid


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


field = lambda z: (1.3 * z).sin() + 0.2 * z.roll(1, 2) * z  # a smooth velocity that mixes frames


# ---------------------------------------------------------------------------------------------- THE METHOD

def plain(u, debias=True, over=max):
    """Eqs. 2 to 8 as loops over one video (C, T, H, W)."""
    C, T, H, W = u.shape
    s = []
    for h, w in itertools.product(range(H), range(W)):
        total = 0
        for c in range(C):
            line = [u[c, f, h, w].item() for f in range(T)]
            d = [abs(b - a) for a, b in itertools.pairwise(line)] if debias else line
            mean = sum(d) / len(d)
            total += sum((x - mean) ** 2 for x in d) / len(d)
        s.append(total / C)
    return over(s)


@pytest.mark.parametrize("debias, over", [(True, "max"), (True, "mean"), (False, "max")])
def test_the_loss_equals_plain_loops(debias, over):
    u = randn(2, 3, 5, 4, 2)
    want = [plain(v, debias, max if over == "max" else lambda s: sum(s) / len(s)) for v in u]
    assert flowmo_loss(u, debias=debias, over=over).tolist() == pytest.approx(want)


def test_the_loss_by_hand():
    u = torch.zeros(1, 1, 4, 1, 2)
    u[0, 0, :, 0, 0] = torch.tensor([0.0, 1, 1, 3])  # differences 1, 0, 2: variance 2 / 3
    u[0, 0, :, 0, 1] = torch.tensor([0.0, 5, 10, 15])  # 5, 5, 5: none
    assert flowmo_loss(u).item() == pytest.approx(2 / 3)
    assert flowmo_loss(u, over="mean").item() == pytest.approx(1 / 3)


def test_constant_velocity_costs_nothing_and_offsets_and_sign_do_not_count():
    steady = randn(2, 3, 1, 4, 4) + randn(2, 3, 1, 4, 4, seed=1) * torch.arange(6.0).double().view(1, 1, 6, 1, 1)
    assert flowmo_loss(steady).abs().max() < 1e-24
    u = randn(2, 3, 6, 4, 4)
    torch.testing.assert_close(flowmo_loss(u + randn(2, 1, 1, 1, 1, seed=2)), flowmo_loss(u))
    torch.testing.assert_close(flowmo_loss(-u), flowmo_loss(u))


def test_any_layout_gives_the_same():
    u = randn(2, 3, 6, 4, 5)
    torch.testing.assert_close(flowmo_loss(u.permute(0, 2, 1, 3, 4), frames=1, channels=2), flowmo_loss(u))
    torch.testing.assert_close(flowmo_loss(u.permute(0, 3, 4, 2, 1), frames=3, channels=4), flowmo_loss(u))


def test_a_video_is_guided_alike_alone_and_in_a_batch():
    z = randn(3, 2, 5, 3, 3)
    moved, u = flowmo_step(z, field, 0.05)
    for b in range(3):
        one, u1 = flowmo_step(z[b:b + 1], field, 0.05)
        assert torch.equal(one, moved[b:b + 1]) and torch.equal(u1, u[b:b + 1])


def test_the_gradient_is_that_of_finite_differences():
    z = randn(1, 1, 4, 2, 2)
    moved, _ = flowmo_step(z, field, 1.0, direction=lambda g: g)
    gradient, h = (z - moved).flatten(), 1e-6
    for k, e in enumerate(torch.eye(16).double().view(16, *z.shape)):
        want = (flowmo_loss(field(z + h * e)) - flowmo_loss(field(z - h * e))).item() / (2 * h)
        assert gradient[k].item() == pytest.approx(want, abs=1e-6)


def test_the_direction_is_the_first_step_of_adam():
    g = torch.cat([randn(50), torch.zeros(1).double(), 1e-9 * randn(5, seed=1)])
    x = torch.nn.Parameter(torch.zeros_like(g))
    x.grad = g.clone()
    torch.optim.Adam([x], lr=0.3).step()
    torch.testing.assert_close(x.data, -0.3 * adam_direction(g))


def test_eta_zero_changes_nothing_and_a_small_step_lowers_the_loss():
    z = randn(2, 2, 5, 3, 3)
    same, u = flowmo_step(z, field, 0.0)
    assert torch.equal(same, z) and torch.equal(u, field(z)) and not u.requires_grad
    for direction in (adam_direction, lambda g: g):
        moved, u = flowmo_step(z, field, 1e-3, direction=direction)
        assert (flowmo_loss(u) < flowmo_loss(field(z))).all() and torch.equal(u, field(moved))


def test_without_a_refresh_the_old_velocity_goes_on_and_the_network_is_called_once():
    calls, z = [], randn(1, 2, 5, 3, 3)
    moved, u = flowmo_step(z, lambda z: calls.append(0) or field(z), 0.05, refresh=False)
    assert len(calls) == 1 and torch.equal(u, field(z)) and not torch.equal(moved, z)


def test_the_loss_can_be_of_the_clean_estimate():
    z, t = randn(1, 2, 5, 3, 3), 0.7
    moved, _ = flowmo_step(z, field, 1e-3, of=lambda z, u: z - t * u)
    clean = lambda z: flowmo_loss(z - t * field(z)).item()
    assert clean(moved) < clean(z)


def test_guidance_by_text_is_linear_in_rho_and_one_batch():
    text, sizes = torch.tensor([[1, 2], [3, 0]]), []

    def network(z, t, text):
        sizes.append(len(z))
        return z * text.sum(1).view(-1, 1) + t.view(-1, 1)
    z, t = randn(2, 4), torch.tensor([0.5, 0.7]).double()
    u_P, u_0 = network(z, t, text), network(z, t, 0 * text)
    sizes.clear()
    torch.testing.assert_close(prompted(network, text, 1.5)(z, t), u_P + 1.5 * (u_P - u_0))
    assert sizes == [4]
    assert torch.equal(prompted(network, text, 0.0)(z, t), u_P) and sizes == [4, 2]


def test_fold_gathers_neighbours_of_space_and_time_into_channels():
    u = randn(1, 2, 7, 5, 4)
    f = fold(u, 2, 2)
    assert f.shape == (1, 2 * 2 * 4, 3, 2, 2)
    assert sorted(f[0, :, 1, 1, 0].tolist()) == sorted(u[0, :, 2:4, 2:4, 0:2].flatten().tolist())
    assert torch.equal(fold(u, 1, 1), u)


# ---------------------------------------------------------------------------------------------- sampler

def test_the_time_grid_is_linear_or_follows_the_formula():
    assert time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(4, 5).tolist() == pytest.approx([1, 5 * 0.75 / 4, 5 * 0.5 / 3, 5 * 0.25 / 2, 0])
    assert time_grid(50, 5)[11].item() == pytest.approx(0.946, abs=1e-3)  # Wan's twelfth step, 946 of 1000


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_sampler_converges_to_the_exact_path_of_a_gaussian(shift):
    s, errors = 0.6, []  # data N(0, s^2): z_t = sqrt((1-t)^2 s^2 + t^2) along the path, u = d z_t / d t
    u = lambda z, t: z * ((t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)).view(-1, 1)
    z = randn(3, 4)
    for steps in (50, 100, 200):
        errors.append((sample(u, z, time_grid(steps, shift).double()) / z - s).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 0.02 and all(abs(rate - 1) < 0.15 for rate in rates), (errors, rates)


def test_unguided_steps_are_untouched_and_guided_ones_are_those_named():
    velocity, z, times, seen = lambda z, t: field(z) * t.view(-1, 1, 1, 1, 1), randn(2, 2, 5, 3, 3), time_grid(6), []

    def guide(z, v, t):
        seen.append(round(t, 4))
        return flowmo_step(z, v, 0.05)
    free = sample(velocity, z, times)
    assert torch.equal(sample(velocity, z, times, guide, ()), free) and not seen
    guided = sample(velocity, z, times, guide, {1, 3})
    assert seen == pytest.approx([5 / 6, 3 / 6], abs=1e-3) and not torch.equal(guided, free)
    assert torch.equal(sample(velocity, z, times, lambda z, v, t: flowmo_step(z, v, 0.0), {0, 1, 2}), free)


def test_the_shares_of_freeinit_sum_to_one_and_its_noise_is_real():
    video, noise, fresh = randn(1, 2, 8, 6, 6), randn(1, 2, 8, 6, 6, seed=1), randn(1, 2, 8, 6, 6, seed=2)
    z = 0.1 * video + 0.9 * noise
    same = freeinit_noise(video, noise, z, t=0.9)
    assert same.dtype == torch.float64
    torch.testing.assert_close(same, z)  # low frequencies of z and high ones of z are z
    slow, fast = torch.ones_like(z), (-1.0) ** torch.arange(8).double().view(1, 1, 8, 1, 1) * torch.ones_like(z)
    torch.testing.assert_close(freeinit_noise(slow, 0 * z, 0 * z, t=0.0), slow)
    assert freeinit_noise(fast, 0 * z, 0 * z, t=0.0).abs().max() < 1e-4
    torch.testing.assert_close(freeinit_noise(0 * z, 0 * z, fast, t=0.0), fast, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------- network

def test_the_network_starts_as_the_best_linear_guess_and_reads_every_word():
    net = flowmo.TextToVideo(10, 4, 16, 4, 48, 1)
    z, t = randn(2, 3, 4, 16, 16).float(), torch.tensor([0.2, 0.9])
    text = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    a = (2 * t - 1) / (t**2 + (1 - t) ** 2)
    torch.testing.assert_close(net(z, t, text), a.view(-1, 1, 1, 1, 1) * z)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    before = net(z, t, text)
    for k in range(4):
        other = text.clone()
        other[0, k] = 9
        changed = (net(z, t, other) - before).abs().amax((1, 2, 3, 4))
        assert changed[0] > 0 and changed[1] == 0


def test_checkpointing_gives_the_same_gradient_with_less_kept():
    z, kept = randn(1, 3, 4, 16, 16).float(), []
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        net = flowmo.TextToVideo(10, 4, 16, 4, 48, 3, checkpointing=on).requires_grad_(False)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
        total = [0]
        note = lambda x: total.__setitem__(0, total[0] + x.numel()) or x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            velocity = lambda z: net(z, torch.tensor([0.9]), torch.ones(1, 4, dtype=torch.long))
            results.append(flowmo_step(z, velocity, 0.1, direction=lambda g: g)[0])
        kept.append(total[0])
    torch.testing.assert_close(*results)
    assert kept[1] < 0.5 * kept[0]


# ---------------------------------------------------------------------------------------------- captions and tracking

def drawn(n=200, size=16, split="test"):
    clips = [common.sprites(common.world_rng(0, split, k), size, 8) for k in range(n)]
    return clips, torch.stack([c["video"] for c in clips])


def test_captions_tell_what_is_to_be_seen_and_the_word_of_quality_is_true():
    clips, _ = drawn()
    for c in clips:
        words = common.words_of(c["caption"])
        assert words[0] == "a" and words[3] == "moving" and len(words) in (5, 6)
        assert words[1] in COLOURS and words[2] in FORMS and words[4] in WAYS
        assert len(words) == 5 or words[5] == ("shaky" if c["flaw"] else "steady")
    assert 0.5 < np.mean([c["flaw"] == "" for c in clips]) < 0.8
    assert 0.35 < np.mean(["," in c["caption"] for c in clips]) < 0.65


@pytest.mark.parametrize("size", [16, 32])
def test_tracking_finds_what_was_drawn(size):
    clips, video = drawn(size=size)
    steady = torch.tensor([c["flaw"] == "" for c in clips])
    assert torch.equal(common.coherent(common.track(video)), steady)
    text = [common.words_of(c["caption"]) for c in clips]
    found = common.judge(video, [(w[1], w[2], w[4]) for w in text])
    assert found["colour"].all() and found["form"].all() and found["way"][steady].all()
    assert found["flicker"].nanmean() < 1
    mirror = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert not common.judge(video, [(w[1], w[2], mirror[w[4]]) for w in text])["way"][steady].any()


def test_tracking_is_exact_to_a_quarter_of_a_pixel():
    clip = common.sprites(common.world_rng(0, "test", 3), 32, 8, flow=True, steady=1.0)
    found = common.track(clip["video"][None])
    on = found["solid"][0, :-1] > 0.9
    true = torch.stack([f[:, m].mean(1) for f, m in zip(clip["flow"], on)])  # (T - 1, 2)
    assert (found["centre"][0].diff(dim=0) - true).abs().max() < 0.25


def test_words_are_encoded_by_place_and_unknown_ones_are_nothing():
    assert common.encode(["A red, circle", "blue"], ["a", "circle", "red"], 4).tolist() == [[1, 3, 2, 0], [0, 0, 0, 0]]


def test_bootstrap_and_auc():
    assert common.bootstrap(torch.ones(50)) == [1, 1]
    low, high = common.bootstrap(randn(400).numpy() + 0.1)
    assert low < 0.1 < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    value, positive = torch.tensor([1.0, 2, 3, 4]), torch.tensor([False, True, False, True])
    assert common.auc(value, positive) == pytest.approx(3 / 4) and math.isnan(common.auc(value, value > 9))


# ---------------------------------------------------------------------------------------------- end to end

@pytest.fixture
def run(runner):
    return runner(flowmo)


CLOCK = ("s_per_video", "cost_ratio")
numbers = lambda folder: [{k: v for k, v in r.items() if k not in CLOCK}
                          for r in json.loads((folder / "results.json").read_text())["rows"]]


def test_a_run_writes_all_and_repeats_its_numbers(run, tmp_path):
    status, text, err = run("--out_dir", "a", "--methods", "all")
    assert status == 0, err
    files = "config.json log.csv ckpt.pt samples.gif sheet.png estimates.png curves.png results.json"
    assert {p.name for p in (tmp_path / "a").iterdir()} == set(files.split())
    rows = numbers(tmp_path / "a")
    assert [r["method"] for r in rows] == list(flowmo.METHODS)
    keys = ("method eta guided_steps coherent coherent_ci motion_smoothness dynamic_degree flicker prompt_acc "
            "patch_variance evaluations seed")
    assert set(keys.split()) <= rows[0].keys()
    premise = json.loads((tmp_path / "a" / "results.json").read_text())["premise"]
    assert {"u, max", "u, --fold, max", "u, 2x4x4, mean", "clean estimate, mean"} <= premise.keys()
    evals = {r["method"]: r["evaluations"] for r in rows}
    assert evals["base"] == 4 and evals["flowmo"] == evals["steps"] == 8 and evals["flowmo-norefresh"] == 6
    status, _, err = run("--out_dir", "a", "--eval_only", "--iters", 3)
    assert status == 2 and "--iters 3: the run in a was trained with 4" in err
    assert run("--out_dir", "a", "--methods", "flowmo", "--eval_only")[0] == 0
    assert numbers(tmp_path / "a")[0]["coherent_ci"] is None  # a cost and a difference need base
    assert run("--out_dir", "a", "--methods", "base,flowmo", "--eval_only")[0] == 0
    by_name = {r["method"]: r for r in rows}
    for r in numbers(tmp_path / "a"):  # whatever else is sampled; but for the comparison with what was not
        assert r | dict(coherent_ci_random=0) == by_name[r["method"]] | dict(coherent_ci_random=0)


def test_the_network_is_evaluated_as_often_as_the_table_says(run, monkeypatch):
    calls, real = [], flowmo.TextToVideo.forward
    monkeypatch.setattr(flowmo.TextToVideo, "forward", lambda *x: calls.append(0) or real(*x))
    counts = []
    for methods in ("base", "base,flowmo", "base,steps", "base,freeinit"):
        assert run("--iters", 0, "--methods", methods, "--out_dir", methods)[0] == 0
        counts.append(len(calls))
        calls.clear()
    assert [n - counts[0] for n in counts[1:]] == [4 + 2, 8, 8]  # a backward pass is no call


def clip_of(folder, name, caption, seed):
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    for t in range(6):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{t}.png")
    if caption:
        (folder / f"{name}.txt").write_text(caption + "\n")


def test_captioned_clips_of_ones_own_work_and_a_missing_caption_is_named(run, tmp_path):
    for k in range(5):
        clip_of(tmp_path / "data" / "mine", f"clip.{k}", f"Waves on a beach, {k}", k)
    status, text, err = run("--dataset", "mine", "--iters", 2, "--methods", "base,flowmo")
    assert status == 0, err
    rows = numbers(tmp_path / "out" / "flowmo-mine")
    assert "coherent" not in rows[0] and 0 < rows[0]["motion_smoothness"] < 1
    (tmp_path / "data" / "mine" / "clip.2.txt").unlink()
    status, _, err = run("--dataset", "mine", "--out_dir", "d")
    assert status == 2 and "clip.2 has no caption" in err


@pytest.mark.parametrize("flags, says", [
    ("--methods best", "--methods best: 'best' is unknown"), ("--guided x", "--guided x: must be steps"),
    ("--guided 2-1", "--guided 2-1: must be steps"),
    ("--guided 0-9", "--guided 0-9: must be steps from 0 to 3"), ("--size 18", "--size 18"),
    ("--fold 3,1", "--fold 3,1: must be two numbers"), ("--fold 1", "--fold 1"),
    ("--eta -1", "--eta -1.0: must lie between"), ("--dataset sky", "has no captions"),
    ("--dataset nowhere", "no clips found: looked in data/nowhere"), ("--eval_only", "nothing to continue")])
def test_bad_input_is_one_clear_line_and_exit_status_2(run, tmp_path, flags, says):
    status, _, err = run(*flags.split())
    assert status == 2 and says in err and err.count("\n") == 1 and not list(tmp_path.rglob("*.pt"))
