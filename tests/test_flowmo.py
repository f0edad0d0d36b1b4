"""flowmo.py: every equation against an oracle of another kind; captions; the script end to end."""
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import flowmo
from conftest import ROOT, content, refused
from flowmo import as_places, flowmo_loss, flowmo_step, place_variance, prompted, random_step
from flowmo import sample, time_grid


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def field(z):
    """A smooth velocity that mixes frames."""
    return (1.3 * z).sin() + 0.2 * z.roll(1, 2) * z


# ---------------------------------------- the method

def variances_by_loops(u):
    """Eqs. 2, 3 and 7 as loops over one video (C, T, H, W): s of every place."""
    C, T, H, W = u.shape
    s = []
    for h, w in itertools.product(range(H), range(W)):
        total = 0
        for c in range(C):
            d = [abs(u[c, f + 1, h, w].item() - u[c, f, h, w].item()) for f in range(T - 1)]
            mean = sum(d) / len(d)
            total += sum((x - mean) ** 2 for x in d) / len(d)
        s.append(total / C)
    return s


def mean_loss(u):
    """A loss that is smooth: the mean over places, an ablation of the paper."""
    return place_variance(u).mean(1)


def test_the_loss_equals_plain_loops():
    u = randn(2, 3, 5, 4, 2)
    for video, s, loss in zip(u, place_variance(u), flowmo_loss(u)):
        want = variances_by_loops(video)
        assert s.tolist() == pytest.approx(want, rel=1e-5)
        assert loss.item() == pytest.approx(max(want), rel=1e-5)


def test_the_loss_by_hand():
    u = torch.zeros(1, 1, 4, 1, 2)
    u[0, 0, :, 0, 0] = torch.tensor([0.0, 1, 1, 3])  # differences 1, 0, 2: variance 2 / 3
    u[0, 0, :, 0, 1] = torch.tensor([0.0, 5, 10, 15])  # 5, 5, 5: none
    assert flowmo_loss(u).item() == pytest.approx(2 / 3)
    assert place_variance(u)[0].tolist() == pytest.approx([2 / 3, 0])


def test_constant_velocity_costs_nothing_and_offsets_and_sign_do_not_count():
    time_ = torch.arange(6.0).view(1, 1, 6, 1, 1)
    steady = randn(2, 3, 1, 4, 4) + randn(2, 3, 1, 4, 4, seed=1) * time_
    assert flowmo_loss(steady).abs().max() < 1e-10
    u = randn(2, 3, 6, 4, 4)
    torch.testing.assert_close(flowmo_loss(u + randn(2, 1, 1, 1, 1, seed=2)), flowmo_loss(u))
    torch.testing.assert_close(flowmo_loss(-u), flowmo_loss(u))


def test_any_layout_gives_the_same():
    u = randn(2, 3, 6, 4, 5)
    frames_first = flowmo_loss(u.permute(0, 2, 1, 3, 4), frames=1, channels=2)
    torch.testing.assert_close(frames_first, flowmo_loss(u))
    channels_last = flowmo_loss(u.permute(0, 3, 4, 2, 1), frames=3, channels=4)
    torch.testing.assert_close(channels_last, flowmo_loss(u))


def test_a_step_is_the_first_of_adam_on_the_gradient_of_finite_differences():
    z = randn(1, 1, 4, 2, 2)
    moved, _ = flowmo_step(z, field, 0.3, mean_loss)
    g = torch.zeros(16, dtype=torch.float64)
    h = 1e-3
    for k, e in enumerate(torch.eye(16).view(16, *z.shape)):
        g[k] = (mean_loss(field(z + h * e)) - mean_loss(field(z - h * e))).item() / (2 * h)
    x = torch.nn.Parameter(torch.zeros(16))
    x.grad = g.float()
    torch.optim.Adam([x], lr=0.3).step()
    clear = g.abs() > 1e-3  # of what the differences are sure
    assert clear.sum() >= 10
    torch.testing.assert_close((moved - z).flatten()[clear], x.data[clear], atol=1e-4, rtol=0)


def test_a_small_step_lowers_the_loss_and_none_changes_nothing():
    z = randn(2, 2, 5, 3, 3)
    same, u = flowmo_step(z, field, 0.0)
    assert torch.equal(same, z) and torch.equal(u, field(z))
    moved, u = flowmo_step(z, field, 1e-3)
    assert torch.equal(u, field(moved))  # evaluated again
    assert (flowmo_loss(u) < flowmo_loss(field(z))).all()
    moved, u = flowmo_step(z, field, 1e-3, loss=mean_loss)
    assert (mean_loss(u) < mean_loss(field(z))).all()


def test_a_video_is_guided_alike_alone_and_in_a_batch():
    z = randn(3, 2, 5, 3, 3)
    moved, u = flowmo_step(z, field, 0.05)
    for b in range(3):
        one, u1 = flowmo_step(z[b:b + 1], field, 0.05)
        assert torch.equal(one, moved[b:b + 1]) and torch.equal(u1, u[b:b + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_half_precision_moves_all_it_should_and_gives_no_nan(dtype):
    z = randn(2, 3, 6, 8, 8)
    # The mean's gradient is small: one part of 384.
    want = flowmo_step(z.to(dtype).float(), field, 0.25, mean_loss)[0] - z.to(dtype).float()
    moved, u = flowmo_step(z.to(dtype), field, 0.25, mean_loss)
    assert moved.dtype == u.dtype == dtype and moved.isfinite().all()
    same = ((moved.float() - z.to(dtype).float()) - want).abs() < 0.05
    assert same.float().mean() > 0.97


def test_a_step_keeps_no_graph_and_says_why_it_cannot_work_in_inference_mode():
    weight = torch.nn.Parameter(torch.ones(()))
    z = randn(1, 2, 5, 3, 3).requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            moved, u = flowmo_step(z, lambda z: weight * field(z), 0.1)
        assert not moved.requires_grad and not u.requires_grad
    assert z.grad is None and weight.grad is None
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad()"):
        flowmo_step(z, field, 0.1)
    with pytest.raises(FloatingPointError, match="not finite"):  # 1024 times it is beyond float16
        flowmo_step(z, field, 0.1, lambda u: 1e38 * u.square().flatten(1).sum(1))


def test_the_method_pastes_as_one_block():
    source = (ROOT / "flowmo.py").read_text()
    block = source[source.index("# ---------------------------------------- THE METHOD"):]
    block = block[:block.index("def random_step")]
    pasted = {"torch": torch}
    exec(block, pasted)
    z = randn(1, 2, 5, 3, 3)
    assert torch.equal(pasted["flowmo_step"](z, field, 0.1)[0], flowmo_step(z, field, 0.1)[0])


def test_the_control_moves_every_element_as_far_by_chance():
    z = randn(2, 3, 6, 8, 8)
    moved, u = random_step(z, field, 0.05, torch.Generator().manual_seed(0))
    torch.testing.assert_close((moved - z).abs(), torch.full_like(z, 0.05), atol=1e-6, rtol=0)
    assert torch.equal(u, field(moved)) and 0.4 < (moved > z).float().mean() < 0.6


def test_a_place_is_a_square_of_pixels():
    u = randn(1, 2, 7, 6, 4)
    p = as_places(u, 2)
    assert p.shape == (1, 8, 7, 3, 2)
    assert sorted(p[0, :, 5, 1, 0].tolist()) == sorted(u[0, :, 5, 2:4, 0:2].flatten().tolist())
    assert torch.equal(as_places(u, 1), u)


def test_guidance_by_the_prompt_is_that_of_diffusers_in_one_batch():
    c, c_0 = randn(2, 3, 4), randn(1, 3, 4, seed=1)

    def network(z, t, c):
        network.sizes.append(len(z))
        return z * c.sum((1, 2)).view(-1, 1) + t.view(-1, 1)

    z, t = randn(2, 4), torch.tensor([0.5, 0.7])
    network.sizes = []
    u_P, u_0 = network(z, t, c), network(z, t, c_0.expand_as(c))
    torch.testing.assert_close(prompted(network, c, c_0, 2.5)(z, t), u_0 + 2.5 * (u_P - u_0))
    torch.testing.assert_close(prompted(network, c, c_0, 1.0)(z, t), u_P)
    assert network.sizes == [2, 2, 4, 4]


# ---------------------------------------- sampler

def test_the_time_grid_is_linear_or_follows_the_formula():
    assert time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    want = [1, 5 * 0.75 / 4, 5 * 0.5 / 3, 5 * 0.25 / 2, 0]
    assert time_grid(4, 5).tolist() == pytest.approx(want)
    # Wan's twelfth step of 50 is at 946 of 1000.
    assert time_grid(50, 5)[11].item() == pytest.approx(0.946, abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_sampler_converges_to_the_exact_path_of_a_gaussian(shift):
    s = 0.6  # data N(0, s^2): z_t = sqrt((1-t)^2 s^2 + t^2) along the path, u = d z_t / d t

    def u(z, t):
        return z * ((t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)).view(-1, 1)

    z = randn(3, 4)
    errors = []
    for steps in (25, 50, 100):
        errors.append((sample(u, z, time_grid(steps, shift)) / z - s).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 0.03 and all(abs(rate - 1) < 0.2 for rate in rates), (errors, rates)


def test_guided_steps_are_those_named_and_the_others_are_untouched():
    def velocity(z, t):
        return field(z) * t.view(-1, 1, 1, 1, 1)

    z, times, seen = randn(2, 2, 5, 3, 3), time_grid(6), []
    free = sample(velocity, z, times)

    def guide(z, velocity_now):
        seen.append((velocity_now(z) / field(z)).mean().item())  # its t
        return flowmo_step(z, velocity_now, 0.05)

    assert torch.equal(sample(velocity, z, times, guide, ()), free) and not seen
    guided = sample(velocity, z, times, guide, {1, 3})
    assert seen == pytest.approx([5 / 6, 3 / 6], abs=1e-3) and not torch.equal(guided, free)


# ---------------------------------------- network

def tiny_network(amp=False):
    torch.manual_seed(0)
    return flowmo.TextToVideo(10, 6, 16, 4, 64, 2, amp).eval()


def test_the_network_starts_as_the_best_linear_guess():
    net = tiny_network()
    z, t = randn(2, 3, 4, 16, 16), torch.tensor([0.2, 0.9])
    c = net.encode(net.embed(torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 7, 0, 0, 0]])))
    a = (2 * t - 1) / (t**2 + (1 - t) ** 2)
    torch.testing.assert_close(net(z, t, c), a.view(-1, 1, 1, 1, 1) * z)


def test_the_network_hears_every_word_and_no_other_sample():
    net = tiny_network()
    rng = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=rng)
    z, t = randn(2, 3, 4, 16, 16), torch.tensor([0.2, 0.9])
    text = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 7, 0, 0, 0]])
    before = net(z, t, net.encode(net.embed(text)))
    for k in range(6):
        other = text.clone()
        other[0, k] = 9
        changed = net(z, t, net.encode(net.embed(other))) - before
        assert changed[0].abs().max() > 0 and changed[1].abs().max() < 1e-5


def shipped():
    return flowmo.load_model(flowmo.Config(), torch.device("cpu"))[0]


def moved_by(net, block, at, other, *inputs):
    """How far the answer moves if one block alone is given `other` as its input number `at`."""
    before = net(*inputs)

    def swap(block, given):
        return tuple(other if k == at else value for k, value in enumerate(given))

    hook = block.register_forward_pre_hook(swap)
    after = net(*inputs)
    hook.remove()
    return ((after - before).std() / before.std()).item()


def heard(net, block, at, *inputs):
    """Input number `at` of a block, as the network gives it."""
    found = []
    hook = block.register_forward_pre_hook(lambda block, given: found.append(given[at]))
    net(*inputs)
    hook.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
def test_every_block_hears_the_clock_and_the_sentence(trained):
    net = shipped() if trained else tiny_network()
    if not trained:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    text = torch.zeros(2, net.length, dtype=torch.long)
    text[:, :5] = torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
    c, other_c = net.encode(net.embed(text)).split(1)
    z, t, later = randn(1, *net.shape), torch.tensor([0.7]), torch.tensor([0.5])
    blocks = [net.fine, *net.blocks, net.last]
    assert len(blocks) == sum(hasattr(m, "emb") for m in net.modules()) == 2 + len(net.blocks)
    for block in blocks:
        emb = heard(net, block, 1, z, later, c)  # the clock has moved, and nothing else
        assert moved_by(net, block, 1, emb, z, t, c) > 1e-4
        emb = heard(net, block, 1, z, t, other_c)  # the sentence
        assert moved_by(net, block, 1, emb, z, t, c) > 1e-4
        assert moved_by(net, block, 1, heard(net, block, 1, z, t, c), z, t, c) == 0
    for block in net.blocks:  # and the words beside the places
        x = heard(net, block, 0, z, t, c).clone()
        x[:, :net.length] = heard(net, block, 0, z, t, other_c)[:, :net.length]
        assert moved_by(net, block, 0, x, z, t, c) > 1e-4
    silu = torch.nn.functional.silu  # the sentence, times the place
    said = [silu(net.sentence(value.flatten(1))) for value in (c, other_c)]
    assert moved_by(net, net.gain, 0, said[1], z, t, c) > 1e-4
    assert moved_by(net, net.gain, 0, said[0], z, t, c) == 0


def test_convolutions_over_space_see_no_other_frame():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = randn(2, 3, 4, 6, 6)
    got = flowmo.on_frames(layer, x)
    assert got.shape == (2, 5, 4, 6, 6)
    weight = layer.weight[:, :, None]  # the same, as one of three dimensions
    want = torch.nn.functional.conv3d(x, weight, layer.bias, padding=(0, 1, 1))
    torch.testing.assert_close(got, want)
    block = flowmo.ResBlock(8, 8, 32)
    x = randn(2, 8, 4, 6, 6)
    weight = block.time.weight[..., None]  # (8, 8, 3, 1, 1)
    want = torch.nn.functional.conv3d(x, weight, block.time.bias, padding=(1, 0, 0))
    torch.testing.assert_close(block.time(x.flatten(3)).reshape(x.shape), want)


def test_amp_and_compile_give_the_same_answers():
    net, low = tiny_network(), tiny_network(amp=True)
    for p, q in zip(net.parameters(), low.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        q.data.copy_(p.data)
    z, t = randn(2, 3, 4, 16, 16), torch.tensor([0.2, 0.9])
    c = net.encode(net.embed(torch.ones(2, 6, dtype=torch.long)))
    with torch.no_grad():
        whole, half = net(z, t, c), low(z, t, c)
        assert half.dtype == torch.float32
        assert 0 < (half - whole).abs().max() < 0.05 * whole.abs().max()
        compiled = torch.compile(net, backend="aot_eager")(z, t, c)
    torch.testing.assert_close(compiled, whole, rtol=1e-4, atol=1e-4)


def test_the_training_loss_is_one_for_the_best_linear_guess():
    z_1, z_0 = randn(2000, 1, 1, 2, 2), randn(2000, 1, 1, 2, 2, seed=1)
    t = torch.linspace(0.02, 0.98, 2000)
    total = common.like(t**2 + (1 - t) ** 2, z_1)
    z = common.like(1 - t, z_1) * z_1 + common.like(t, z_1) * z_0
    guess = common.like(2 * t - 1, z_1) / total * z  # E[z_0 - z_1 | z] for two unit Gaussians
    assert flowmo.flow_matching_loss(guess, z_1, z_0, t).mean().item() == pytest.approx(1, abs=0.05)


def test_the_last_word_moves_over_the_free_places_and_nothing_else_does():
    text = torch.tensor([[1, 2, 3, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).repeat(300, 1)
    moved = flowmo.move_last_word(text, torch.Generator().manual_seed(0))
    assert torch.equal(moved[::3, :2], text[::3, :2]) and (moved[2::3] == 0).all()
    where = moved[::3, 2:] == 3
    assert where.sum(1).eq(1).all() and (where.float().mean(0) - 1 / 3).abs().max() < 0.1
    assert (moved[1::3, :3].sum(1) == 1).all()


# ---------------------------------------- the world and its captions

def drawn(n=300, size=16):
    clips = [common.sprites(common.world_rng(0, "test", k), size, 8) for k in range(n)]
    return clips, torch.stack([clip["video"] for clip in clips])


def test_what_captions_say_of_quality_is_true_and_authentic_says_nothing():
    clips, _ = drawn(1000)
    said = [common.split_words(clip["caption"]) for clip in clips]
    steady = [not clip["flaw"] for clip in clips]
    assert sum(steady) / 1000 == pytest.approx(0.65, abs=0.05)
    for words, is_steady in zip(said, steady):
        assert not ("steady" in words and not is_steady) and not ("shaky" in words and is_steady)
    worded = [("steady" in words) or ("shaky" in words) for words in said]
    assert sum(worded) / 1000 == pytest.approx(0.8, abs=0.04)
    for kind in (steady, worded):
        for value in (True, False):
            some = ["authentic" in words for words, is_it in zip(said, kind) if is_it == value]
            assert sum(some) / len(some) == pytest.approx(0.5, abs=0.1)


def test_the_judge_knows_every_flaw_and_every_caption():
    clips, video = drawn()
    captions = [clip["caption"] for clip in clips]
    found = common.judge(video, captions)
    steady = torch.tensor([not clip["flaw"] for clip in clips])
    assert torch.equal(found["coherent"] == 1, steady)
    assert (found["obeyed"][steady] == 1).all()
    assert ((found["speed"] > 0.7) & (found["speed"] < 1.2))[steady].all()
    lies = {"left": "right", "right": "left", "up": "down", "down": "up", "circle": "bar",
            "red": "blue"}
    for word, lie in lies.items():
        said = [word in common.split_words(caption) for caption in captions]
        some = (torch.tensor(said) & steady).nonzero().flatten().tolist()
        lied = [captions[k].replace(word, lie) for k in some]
        assert len(some) > 10 and not common.judge(video[some], lied)["obeyed"].any()


def test_tracking_is_exact_to_a_quarter_of_a_pixel():
    clip = common.sprites(common.world_rng(0, "test", 3), 32, 8, flow=True, steady=1.0)
    found = common.track(clip["video"][None])
    moving = clip["flow"].square().sum(1) > 0.01  # (T - 1, H, W)
    true = torch.stack([f[:, m].mean(1) for f, m in zip(clip["flow"], moving)])  # (T - 1, 2)
    assert (found["centre"][0].diff(dim=0) - true).abs().max() < 0.25


@pytest.mark.parametrize("caption, words", [
    ("A red, circle -- moving LEFT.", ["a", "red", "circle", "moving", "left"]),
    ("Красный круг, движется влево!", ["красный", "круг", "движется", "влево"]),
    ("Ein großer Fu\u0308ller («blau»)", ["ein", "großer", "füller", "blau"]),
    ("红色的圆向左移动。", ["红", "色", "的", "圆", "向", "左", "移", "动"]),
    ("赤いボール、左へ", ["赤", "い", "ボ", "ー", "ル", "左", "へ"]),
    ("लाल गेंद", ["लाल", "गेंद"]),
    ("लाल वृत्त।", ["लाल", "वृत्त"]),
    ("\ufeffa red circle", ["a", "red", "circle"]),
    ("\u200fحمراء، كبيرة؟", ["حمراء", "كبيرة"]),
    ("ողջույն։ ሰላም።", ["ողջույն", "ሰላም"]),
    ("“red”—blue→green+₩5 ❤️ a\u00a0b", ["red", "blue", "green", "5", "a", "b"]),
    ("می\u200cخواهم so\u00adft red\u200bblue", ["میخواهم", "soft", "red", "blue"]),
    ("İSTANBUL I\u0307stanbul istanbul", ["istanbul"] * 3),
    ("人・々", ["人", "々"]),
    ("...", []),
])
def test_captions_of_any_script_are_split_at_space_and_punctuation(caption, words):
    assert common.split_words(caption) == words


@pytest.mark.parametrize("written", [
    b"\xef\xbb\xbfa red\r\ncircle\r\n", b"a red circle", b"\n a  red\tcircle \n\n"])
def test_a_caption_is_read_however_an_editor_saved_it(tmp_path, written):
    (tmp_path / "c.txt").write_bytes(written)
    clips = common.Clips([2], 8, [None], paths=[tmp_path / "c.gif"])
    assert common.captions_of(clips, "mine") == ["a red circle"]


@pytest.mark.parametrize("written", [
    "a red circle".encode("utf-16"), b"caf\xe9", b"\xef\xbb\xbf", b"."])
def test_a_caption_that_is_no_text_is_refused(tmp_path, written):
    (tmp_path / "c.txt").write_bytes(written)
    clips = common.Clips([2], 8, [None], paths=[tmp_path / "c.gif"])
    with pytest.raises(common.Fault, match="c.gif has no caption.*c.txt"):
        common.captions_of(clips, "mine")


def test_an_unknown_word_lists_forty_that_are_known():
    words = [f"w{k}" for k in range(1000)]
    with pytest.raises(common.Fault, match="does not know 'red'; it knows w0, ") as info:
        common.check_prompt("prompt", "w7 red", words, 9)
    assert len(str(info.value).split(", ")) == 40


def test_words_are_encoded_by_place_and_unknown_ones_are_nothing():
    found = common.to_indices(["A red, circle", "blue a"], ["a", "circle", "red"], 4)
    assert found.tolist() == [[1, 3, 2, 0], [1, 0, 0, 0]]
    assert common.to_indices(["a red circle"], ["a", "circle", "red"], 2).tolist() == [[1, 3]]


def test_the_bootstrap_is_the_normal_interval_of_a_mean():
    assert common.bootstrap(torch.ones(50)) == (1, 1, 1)
    mean, low, high = common.bootstrap(randn(400).numpy() + 0.1)
    assert low < 0.1 < high and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


# ---------------------------------------- end to end

@pytest.fixture
def run(runner):
    return runner(flowmo)


@pytest.fixture
def model(finished, monkeypatch):
    """The checkpoint of a whole run of this script, as the shipped model."""
    path = finished("flowmo")[0] / "out" / "flowmo-sprites-procedural" / "ckpt.pt"
    monkeypatch.setattr(flowmo, "SHIPPED", path)
    return path


FEW = ["--prompts", 4, "--steps", 4, "--guided", "0-1", "--device", "cpu"]


def test_without_train_it_samples_from_the_shipped_model_again_and_again(run, model):
    status, text, err = run(*FEW, tiny=False)
    assert status == 0, err
    assert f"text-to-video model: {model}" in text
    out = Path("out/flowmo-sprites-procedural")
    files = "config.json results.json samples.gif sheet.png"
    assert content(out).keys() == set(files.split())
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(flowmo.METHODS.values())
    assert [row["evaluations"] for row in rows] == [4, 4, 6]  # a gradient is no evaluation
    assert rows[2]["over_base"][0] == pytest.approx(rows[2]["coherent"] - rows[0]["coherent"])
    assert run(*FEW, tiny=False)[0] == 0  # mere samples may be overwritten
    again = json.loads((out / "results.json").read_text())["rows"]
    assert [row["coherent"] for row in again] == [row["coherent"] for row in rows]


def test_the_model_decides_the_shape_and_a_training_is_not_overwritten(run, model, tmp_path):
    status, text, err = run("--frames", 5, "--width", 64, *FEW, "--out_dir", "s", tiny=False)
    assert status == 0 and "6 frames of 16 pixels" in text, err
    used = json.loads(Path("s/config.json").read_text())["config"]
    assert (used["frames"], used["width"], used["layers"]) == (6, 32, 1)
    status, _, err = run("--out_dir", "o")
    assert status == 0, err
    before = content(tmp_path / "o")
    refused(run(*FEW, "--out_dir", "o", tiny=False), "o holds an earlier run")
    assert content(tmp_path / "o") == before


def test_a_prompt_goes_back_to_the_model_that_a_run_trained_or_sampled_from(run, model, tmp_path):
    other = tmp_path / "other.pt"
    other.write_bytes(model.read_bytes())
    assert run(*FEW, "--model", other, "--out_dir", "s", tiny=False)[0] == 0
    say = ["--prompt", "a red circle", "--steps", 2, "--guided", 1, "--device", "cpu"]
    status, text, err = run(*say, "--out_dir", "s", tiny=False)
    assert status == 0 and f"text-to-video model: {other}" in text, err
    assert "text-to-video model: out/" not in text and (tmp_path / "s/flowmo-prompt.gif").exists()
    assert run("--out_dir", "t")[0] == 0
    for more in (say, ["--eval_only"]):
        status, text, err = run(*more, "--out_dir", "t", tiny=False)
        assert status == 0 and "text-to-video model: t/ckpt.pt" in text, err
    status, text, err = run(*say, "--out_dir", "t", "--model", other, tiny=False)
    assert status == 0 and f"text-to-video model: {other}" in text, err
    (tmp_path / "t/ckpt.pt").unlink()  # it was stopped before its first save
    refused(run(*say, "--out_dir", "t", tiny=False), "t/ckpt.pt is not there")


def test_the_first_row_pays_for_no_warm_up_and_the_batch_is_a_flag(model, monkeypatch):
    """The first call of each size, with and without a gradient, takes a second, as if compiled."""
    cfg = flowmo.Config(steps=2, guided="1", sample_batch=3)
    net, words = flowmo.load_model(cfg, torch.device("cpu"))
    seen = set()
    sizes = []

    def compiled(net, given):
        key = (len(given[0]), given[0].requires_grad)
        sizes.append(len(given[0]) // 2)
        if key not in seen:
            seen.add(key)
            clock[0] += 1

    net.register_forward_pre_hook(compiled)
    clock = [0.0]
    prompts = ["a red circle"] * 5
    monkeypatch.setattr(flowmo.time, "perf_counter", lambda: clock[0] + 0.01 * len(sizes))
    rows, videos = flowmo.compare(cfg, net, words, prompts, flowmo.METHODS)
    assert max(row["s_per_video"] for row in rows) < 0.1 and len(seen) == 4
    assert sizes[-6:] == [3, 3, 3, 2, 2, 2] and videos["flowmo"].shape[:2] == (5, 6)
    assert [row["evaluations"] for row in rows] == [2, 2, 3]


def test_a_prompt_becomes_one_gif_and_an_unknown_word_is_named(run, model):
    status, text, err = run("--prompt", "A red circle moving left", "--guided", "3-7", tiny=False)
    assert status == 0 and "wrote out/flowmo-prompt.gif" in text, err
    with Image.open("out/flowmo-prompt.gif") as image:
        assert image.n_frames > 1
    refused(run("--prompt", "a purple circle", tiny=False),
            "does not know 'purple'", "it knows a, ", "yellow")
    refused(run("--prompt", "a red circle", "--dataset", "mine", tiny=False),
            "--prompt: there is no run on mine in out/")


def clip_of(folder, name, caption, seed):
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    for t in range(6):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{t}.png")
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def test_captioned_clips_of_ones_own_are_trained_on(run, tmp_path):
    folder = tmp_path / "data" / "mine"
    for k, caption in enumerate(["Волны на море", "海の波", "Wellen am Meer", "waves", "still"]):
        clip_of(folder / ("train" if k < 3 else "test"), f"clip.{k}", caption, k)
    status, text, err = run("--dataset", "mine", "--iters", 2)
    assert status == 0, err
    rows = json.loads(Path("out/flowmo-mine/results.json").read_text())["rows"]
    assert "coherent" not in rows[0] and rows[2]["evaluations"] == 6
    words = torch.load("out/flowmo-mine/ckpt.pt", weights_only=True)["words"]
    assert "волны" in words and "海" in words and "wellen" in words
    other = ["--model", "out/flowmo-mine/ckpt.pt", *FEW, "--dataset", "mine", "--device", "cpu"]
    refused(run(*other, "--out_dir", "e", tiny=False), "knows no word of the held-out captions")
    (folder / "test" / "clip.3.txt").write_text("waves am Meer", encoding="utf-8")
    status, _, err = run(*other, "--out_dir", "e", tiny=False)
    assert status == 0 and "2 words of held-out captions" in err and "still, waves" in err
    (folder / "train" / "clip.2.txt").write_text("...")
    refused(run("--dataset", "mine", "--out_dir", "d"), "clip.2 has no caption")
    (folder / "train" / "clip.2.txt").unlink()
    refused(run("--dataset", "mine", "--out_dir", "d"), "clip.2 has no caption")


@pytest.mark.parametrize("flags, says", [
    ("--guided x", "--guided x: must be steps"), ("--guided 2-1", "--guided 2-1: must be steps"),
    ("--guided 0-9", "--guided 0-9: must be steps from 0 to 3"),
    ("--size 18", "--size 18: must be a multiple of 4"), ("--width 40", "--width 40"),
    ("--eta -1", "--eta -1.0: must lie between"), ("--dataset sky", "has no captions"),
    ("--dataset nowhere", "no clips found: looked in data/nowhere"),
    ("--eval_only", "nothing to continue"), ("--model x.pt", "--train makes a model"),
    ("--prompt x", "leave --prompt and --model out"),
    ("--sample_batch 0", "--sample_batch 0: must lie between")])
def test_bad_input_is_one_clear_line_and_exit_status_2(run, tmp_path, flags, says):
    refused(run(*flags.split()), says)
    assert not list(tmp_path.rglob("*.pt"))


# ---------------------------------------- the shipped model

def test_the_shipped_model_obeys_prompts_and_words_and_says_how_it_was_made():
    assert flowmo.SHIPPED.stat().st_size < 3.1e6
    saved = common.load_checkpoint(flowmo.SHIPPED, "flowmo")
    assert saved["made"].keys() >= {"command", "commit", "steps", "minutes", "machine"}
    net, words = flowmo.load_model(flowmo.Config(), torch.device("cpu"))
    net.eval()
    plain = ["a red circle moving left", "a blue bar moving up", "a green square moving right",
             "a yellow circle moving down"] * 4
    found = {}
    for word in ("steady", "shaky"):
        prompts = [f"{prompt}, {word}" for prompt in plain]
        _, videos = flowmo.compare(flowmo.Config(seed=77), net, words, prompts, ["base"])
        found[word] = common.judge(videos["base"], prompts)
    assert found["steady"]["obeyed"].sum() >= 15
    assert found["steady"]["coherent"].sum() >= 12 > found["shaky"]["coherent"].sum() + 2


# ---------------------------------------- a GPU, as far as that can be traced without one

class Log:
    """In place of common.Log, which reads the losses: they lie on the GPU."""

    def __init__(self, *_):
        self.rows = []

    def add(self, step, **losses):
        assert all(loss.device.type == "cuda" for loss in losses.values())

    def close(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """Under FakeTensorMode, tensors on a GPU have shapes and no values; two devices are an error.

    Yields the functions that asked a tensor on it for its value. Not traced are autograd's engine
    (`autograd.grad`, `backward`), which asks the driver, and what needs a value: the bool of
    `isfinite().all()`, the count of steps in Adam.
    """
    def grad(loss, inputs):
        assert loss.device.type == "cuda" and loss.requires_grad
        return torch.empty_like(inputs),

    def backward(loss):
        assert loss.device.type == "cuda" and loss.requires_grad

    def is_true(x):
        if x.device.type == "cuda":
            asked.add(sys._getframe(1).f_code.co_name)
        return True

    def item(x):
        assert x.device.type == "cpu"
        return 1.0

    def to(net, device):
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                value = torch.empty(p.shape, dtype=p.dtype, device=device)
                module.register_parameter(name, torch.nn.Parameter(value))
            for name, b in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty(b.shape, dtype=b.dtype, device=device))
        return net

    asked = set()
    m = monkeypatch
    m.setattr(torch.nn.Module, "to", to)  # its own swaps what is used elsewhere, too, and fails
    m.setattr(torch.autograd, "grad", grad)
    m.setattr(torch.Tensor, "backward", backward)
    m.setattr(torch.Tensor, "__bool__", is_true)
    m.setattr(torch.Tensor, "item", item)
    m.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    m.setattr(common, "Log", Log)
    m.setattr(common, "save_checkpoint", lambda *_, **state: None)  # no values to write
    with FakeTensorMode():
        yield asked


def given(*shapes):
    """In place of common.prefetched: two steps of such tensors."""
    def prefetched(draw, start, end, device):
        for step in (1, 2):
            yield step, [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]

    return prefetched


class FakeClips:
    lengths = [8, 8]

    def __len__(self):
        return 2

    def frames(self, k, start, stop):
        return torch.zeros(stop - start, 3, 16, 16, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # by a copy of the weights
def test_training_on_a_gpu_meets_no_tensor_on_the_cpu(gpu, monkeypatch, tmp_path):
    cfg = flowmo.Config(batch=2, width=32, layers=1)
    video = (2, 3, 8, 16, 16)
    monkeypatch.setattr(common, "prefetched", given(
        ((2, 8, 3, 16, 16), torch.uint8), (video, torch.float32), ((2,), torch.float32),
        ((2, 7), torch.long)))
    captions = ["a red circle moving left", "a blue bar"]
    net, words = flowmo.train(cfg, FakeClips(), captions, tmp_path, torch.device("cuda"))
    assert len(words) == 7 and all(p.device.type == "cuda" for p in net.parameters())
    assert not gpu


def test_the_method_and_sampling_on_a_gpu_meet_no_tensor_on_the_cpu(gpu):
    z = torch.empty(2, 3, 8, 16, 16, device="cuda")
    t = torch.empty(2, device="cuda")
    made = [flowmo.interpolate(z, z, t), flowmo.flow_matching_loss(z, z, z, t),
            place_variance(z), flowmo_loss(z), as_places(z, 4), *flowmo_step(z, field, 0.1),
            *random_step(z, field, 0.1, torch.Generator())]
    assert all(x.device.type == "cuda" for x in made)
    assert gpu == {"flowmo_step"}  # whether its gradient is finite
    with pytest.raises(Exception, match="on the same device"):
        z + torch.empty(16)
    cfg = flowmo.Config(steps=3, guided="1")
    net = flowmo.TextToVideo(3, 6, 16, 8, 32, 1).to("cuda").requires_grad_(False)
    assert net(z, t, net.encode(torch.empty(2, 6, 32, device="cuda"))).device.type == "cuda"
    rows, videos = flowmo.compare(cfg, net, ["a", "red", "bar"], ["a red bar", "a"], flowmo.METHODS)
    assert [row["evaluations"] for row in rows] == [3, 3, 4]
    assert all(video.shape == (2, 8, 3, 16, 16) for video in videos.values())
    assert gpu == {"flowmo_step"}
