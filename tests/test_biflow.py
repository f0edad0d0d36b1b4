"""Equations, solvers, networks and features of biflow.py, against what shares no code with them."""

import itertools
import math
import weakref
from dataclasses import fields
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import biflow
import common
from biflow import biflow_step, biflow_step_back, condiff_step, denoise_step, flow_step
from biflow import frechet, own_features, predict_step, solve_heun, stream
from common import Fault
from study import solve_euler

exact = partial(solve_heun, tol=1e-7, max_evals=10**6)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def like(s, x):
    return s.reshape(-1, *[1] * (x.ndim - 1))


# ---------------------------------------- losses


def test_losses_equal_plain_loops():
    x0, x1, n = (randn(3, 3, 2, 2, seed=s) for s in range(3))
    t, a = torch.tensor([0.0, 0.3, 0.9]).double(), torch.tensor([1.0, 0.2, 0.7]).double()
    v = lambda x, t, a: math.sin(3 * x + t) + a * x  # any field, made of single numbers
    w = lambda x, t, a: math.cos(x - a) * t + x * x
    lift = lambda g: (
        lambda *args: torch.stack(
            [
                torch.tensor(g(*p)).double()
                for p in zip(*(s.expand_as(args[0]).flatten().tolist() for s in args))
            ]
        ).view_as(args[0])
    )  # of all pixels
    V, W = lift(v), lift(w)
    flow = biflow.flow_loss(lambda x, t: V(x, like(t, x), like(0 * t, x)), x0, x1, t)
    joint = lambda x, t, a: (V(x, like(t, x), like(a, x)), W(x, like(t, x), like(a, x)))
    both = biflow.biflow_loss(joint, x0, x1, t, a, n)
    con = biflow.condiff_loss(lambda x, x0, a: V(x, x0, like(a, x)), x0, x1, a, n)
    want = torch.zeros(4, 3).double()
    for b in range(3):
        T, A = t[b].item(), a[b].item()
        for p, q, z in zip(
            *(y[b].flatten().tolist() for y in (x0, x1, n))
        ):  # one pixel: last frame, next frame, noise
            want[0, b] += (v((1 - T) * p + T * q, T, 0) - (q - p)) ** 2 / 12  # Eq. 3
            x = (1 - T) * p + T * q + A * z  # Eq. 4
            want[1, b] += (v(x, T, A) - (q - p)) ** 2 / 12  # Eq. 5
            want[2, b] += (w(x, T, A) - z) ** 2 / 12
            want[3, b] += (v((1 - A) * z + A * q, p, A) - (q - z)) ** 2 / 12  # Eq. 1
    torch.testing.assert_close(torch.stack([flow, *both, con]), want)


# ---------------------------------------- one frame onwards

PAIR = tuple(randn(4, 3, 5, 5, seed=s) for s in (10, 11, 12))  # x0, x1, n
EPS = torch.tensor([0.0, 0.1, 0.5, 1.0]).double()
SOLVERS = [solve_heun, solve_euler]


def pair_field(x, t, alpha):
    return PAIR[1] - PAIR[0], PAIR[2]


@pytest.mark.parametrize("solve", SOLVERS)
def test_joint_sampling_with_the_exact_field_lands_on_x1_and_back_on_x0(solve):
    x0, x1, n = PAIR
    x, evals, _ = biflow_step(pair_field, x0, n, EPS, solve)
    torch.testing.assert_close(x, x1)
    assert evals.shape == (4,) and (evals >= 2).all()
    torch.testing.assert_close(biflow_step_back(pair_field, x1, n, EPS, solve)[0], x0)


@pytest.mark.parametrize("step", [biflow_step, biflow_step_back])
def test_one_number_may_stand_for_all_samples(step):
    wavy = lambda x, t, a: (torch.sin(3 * x) + like(t, x) - like(a, x), torch.cos(x + like(t, x)))
    one = step(wavy, PAIR[0], PAIR[2], 0.2, solve_heun)
    many = step(wavy, PAIR[0], PAIR[2], torch.full((4,), 0.2, dtype=torch.float64), solve_heun)
    assert all(torch.equal(p, q) for p, q in zip(one, many))


def test_no_noise_is_plain_streaming_of_the_velocity():
    f = lambda x, t, a: (torch.sin(3 * x) + like(t, x) - like(a, x), 100 * torch.cos(x))
    got = biflow_step(f, PAIR[0], PAIR[2], 0 * EPS, solve_heun)
    predicted = predict_step(f, PAIR[0], solve_heun)
    flow = flow_step(lambda x, t: f(x, t, 0 * t)[0], PAIR[0], solve_heun)
    assert all(torch.equal(p, q) for p, q in zip(got, predicted))
    assert all(torch.equal(p, q) for p, q in zip(got, flow))


def test_denoising_along_alpha_takes_the_noise_off_and_leaves_the_clock_alone():
    x0, x1, n = PAIR[0], PAIR[1], PAIR[2][:1].expand(4, -1, -1, -1)
    for t in (0.0, 0.25, torch.tensor([0.0, 0.2, 0.6, 1.0]).double()):
        seen = []

        def f(x, clock, alpha):
            seen.append(clock)
            return 9 * x, n[: len(x)]  # f_v has no part in it; the same noise on all

        clean = x0 + like(torch.as_tensor(t), x0) * (x1 - x0)
        noisy = clean + like(EPS, x0) * n
        torch.testing.assert_close(denoise_step(f, noisy, t, EPS, solve_heun)[0], clean)
        assert all(set(clock.tolist()) <= set(seen[0].tolist()) for clock in seen)
        assert torch.equal(seen[0], torch.as_tensor(t).double().expand(4))


# Gaussian frames: x0 ~ N(0, S0^2), x1 = RHO x0 + R N(0, 1): ODEs have closed forms.
S0, RHO, R = 0.7, 1.1, 0.5
S1 = math.sqrt(RHO**2 * S0**2 + R**2)


def gauss_field(x, t, alpha):
    """E[x1 - x0 | x], E[n | x] for x = (1 - t) x0 + t x1 + alpha n."""
    cov = RHO * S0**2
    var = (1 - t) ** 2 * S0**2 + 2 * t * (1 - t) * cov + t**2 * S1**2 + alpha**2
    v = (1 - t) * (cov - S0**2) + t * (S1**2 - cov)  # cov(x1 - x0, x)
    return like(v / var, x) * x, like(alpha / var, x) * x


@pytest.mark.parametrize("back", [False, True])
def test_gaussian_frames_are_carried_by_the_closed_form_map_at_every_eps(back):
    start, end = (S1, S0) if back else (S0, S1)
    x, n = start * randn(4, 5000), randn(4, 5000, seed=1)
    step = biflow_step_back if back else biflow_step
    got = step(gauss_field, x, n, EPS, exact)[0]
    noisy = (
        x + EPS[:, None] * n
    )  # its variance start^2 + eps^2 becomes end^2, and the map is linear
    torch.testing.assert_close(
        got, noisy * (end / (start**2 + EPS**2).sqrt())[:, None], rtol=1e-5, atol=1e-6
    )
    assert (got.std(1) / end - 1).abs().max() < 0.03


def test_gaussian_frames_are_denoised_by_the_closed_form_map():
    t = torch.tensor([0.0, 0.3, 0.7, 1.0]).double()
    var = (1 - t) ** 2 * S0**2 + 2 * t * (1 - t) * RHO * S0**2 + t**2 * S1**2  # of a clean mixture
    alpha = torch.tensor([0.1, 0.3, 0.5, 1.0]).double()
    x = randn(4, 5000)
    want = x * (var / (var + alpha**2)).sqrt()[:, None]  # the map from one Gaussian to another
    got = denoise_step(gauss_field, x, t, alpha, exact)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_gaussian_condiff_draws_the_next_frame_given_the_last():
    def f(x, x0, alpha):  # E[x1 - n | x, x0] for x = alpha x1 + (1 - alpha) n
        var = alpha**2 * R**2 + (1 - alpha) ** 2
        return RHO * x0 + like((alpha * R**2 - (1 - alpha)) / var, x) * (
            x - like(alpha, x) * RHO * x0
        )

    x0, n = S0 * randn(4, 5000), randn(4, 5000, seed=1)
    torch.testing.assert_close(
        condiff_step(f, x0, n, exact)[0], RHO * x0 + R * n, rtol=1e-5, atol=1e-6
    )


# ---------------------------------------- solvers


def oscillator(x, k, rate, wave=0.0):
    """Damped rotation of x (B, 2); with `wave` it almost halts, then steps are rejected."""
    speed = rate * (1 - wave * torch.cos(6 * math.pi * k))
    return like(speed, x) * (torch.stack([-x[:, 1], x[:, 0]], 1) - 0.3 * x)


def oscillator_at_1(x, rate):
    c, s, d = torch.cos(rate), torch.sin(rate), torch.exp(-0.3 * rate)
    return torch.stack([d * (c * x[:, 0] - s * x[:, 1]), d * (s * x[:, 0] + c * x[:, 1])], 1)


def accepted(evals, tries):
    """Accepted steps: two evaluations to begin with, one a try, one after each but the last."""
    return evals - tries - 1


X, RATE = randn(6, 2, seed=5), torch.tensor([0.01, 0.5, 2.0, 5.0, 12.0, 40.0]).double()


def test_heun_is_of_second_order_in_its_accepted_steps_and_euler_of_first():
    error = lambda x: (x - oscillator_at_1(X, RATE)).norm(dim=1)[2:5]
    heun = lambda tol: solve_heun(oscillator, X, (RATE,), tol, max_evals=10**5)
    (xa, *na), (xb, *nb) = heun(1e-4), heun(1e-6)
    order = (error(xa) / error(xb)).log() / (accepted(*nb) / accepted(*na))[2:5].log()
    assert ((order > 1.8) & (order < 2.3)).all()
    ea, eb = (error(solve_euler(oscillator, X, (RATE,), s)[0]) for s in (500, 1000))
    assert ((ea / eb - 2).abs() < 0.15).all()


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_heun_keeps_its_tolerance_on_a_linear_ode(tol):
    x, evals, _ = solve_heun(oscillator, X, (RATE,), tol, max_evals=10**5)
    error = (x - oscillator_at_1(X, RATE)).square().mean(1).sqrt()
    assert (error < 2 * tol).all() and (evals.diff() > 0).all()  # the harder, the more evaluations


def heun_alone(rate, x, tol):
    """Adaptive Heun of one sample of `oscillator` at wave 0.95: x(1), evaluations, accepted."""
    speed = lambda k: rate * (1 - 0.95 * math.cos(6 * math.pi * k))
    f = lambda x, k: [speed(k) * (-x[1] - 0.3 * x[0]), speed(k) * (x[0] - 0.3 * x[1])]
    add = lambda x, h, s: [p + h * q for p, q in zip(x, s)]
    norm = lambda e, scale: math.sqrt(sum((p / q) ** 2 for p, q in zip(e, scale)) / len(e))
    s, scale = f(x, 0), [tol + tol * abs(p) for p in x]
    d0, d1 = norm(x, scale), norm(s, scale)
    h0 = min(1.0, 0.01 * d0 / d1)
    d2 = norm(add(f(add(x, h0, s), h0), -1, s), scale) / h0
    h, k, evals, accepted = min(100 * h0, math.sqrt(0.01 / max(d1, d2))), 0.0, 2, 0
    while k < 1:
        step = min(h, 1 - k)
        s2 = f(add(x, step, s), k + step)
        new = [p + step / 2 * (a + b) for p, a, b in zip(x, s, s2)]
        scale = [tol + tol * max(abs(p), abs(q)) for p, q in zip(x, new)]
        error = norm([step / 2 * (b - a) for a, b in zip(s, s2)], scale)
        evals += 1
        if error < 1:
            done, x, k, accepted = step == 1 - k, new, k + step, accepted + 1
            if done:
                break
            s, evals = f(x, k), evals + 1
        h = step * min(10, max(0.2, 0.9 / math.sqrt(error)))
    return x, evals, accepted


def test_a_batch_gives_exactly_what_each_sample_alone_and_a_plain_python_solver_give():
    field = partial(oscillator, wave=0.95)
    x, evals, tries = solve_heun(field, X, (RATE,))
    for i in range(len(X)):
        alone = solve_heun(field, X[i : i + 1], (RATE[i : i + 1],))
        assert torch.equal(alone[0][0], x[i]) and (alone[1], alone[2]) == (evals[i], tries[i])
        plain = heun_alone(RATE[i].item(), X[i].tolist(), 1e-2)
        assert plain[1:] == (evals[i], accepted(evals, tries)[i])
        assert plain[0] == pytest.approx(x[i].tolist(), rel=1e-9)
    assert (tries - accepted(evals, tries)).max() > 0  # some steps were rejected: tested too


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_batch_costs_the_sum_of_its_samples_and_no_slope_is_asked_for_twice(solve):
    asked = []

    def f(x, k, rate, sample):
        asked.extend(zip(sample.tolist(), k.tolist(), map(tuple, x.tolist())))
        assert torch.equal(
            rate, RATE[sample]
        )  # rows of args follow their samples, also when others have finished
        return oscillator(x, k, rate, wave=0.95)

    before = X.clone()
    _, evals, tries = solve(f, X, (RATE, torch.arange(6)))
    assert torch.equal(X, before)  # the caller's tensor is left alone
    assert len(asked) == evals.sum() and len(set(asked)) == len(asked)
    for i in range(6):
        assert (
            sum(s == i for s, _, _ in asked) == evals[i]
        )  # a finished sample is not evaluated again
        assert all(0 <= k <= 1 for s, k, _ in asked if s == i)
    if (
        solve is solve_heun
    ):  # 2 for the first step, a slope for every accepted step but the last; the rest are tries
        assert (tries > accepted(evals, tries)).any() and evals.max() > 5 * evals.min()


@pytest.mark.parametrize(
    "solve", [partial(solve_heun, tol=1e-5), partial(solve_euler, steps=10000)]
)
def test_backward_inverts_forward(solve):
    there = solve(oscillator, X[:3], (RATE[:3],))[0]
    back = solve(lambda x, k, rate: -oscillator(x, 1 - k, rate), there, (RATE[:3],))[0]
    assert (there - X[:3]).abs().max() > 0.5 and (back - X[:3]).abs().max() < 1e-3


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_frames_are_solved_and_trained_on(kind):
    f = lambda x, t, a: (torch.sin(2 * x) - common.like(t, x), torch.cos(x))
    x0, n = PAIR[0].to(kind), PAIR[2].to(kind)
    x, evals, _ = biflow_step(f, x0, n, 0.2, solve_heun)
    exact, many, _ = biflow_step(f, x0.double(), n.double(), 0.2, solve_heun)
    assert x.dtype == kind and (evals - many).abs().max() <= 4
    assert (x.double() - exact).abs().max() < 0.1
    assert sum(biflow.biflow_loss(f, x0, x0, 0.3, 0.5, n)).dtype == kind


def test_a_still_field_and_one_that_breaks_down():
    x, evals, _ = solve_heun(lambda x, k: 0 * x, X)
    assert torch.equal(x, X) and evals.max() < 20
    with pytest.raises(FloatingPointError, match="broke down"):
        solve_heun(lambda x, k: x / 0, X)
    with pytest.raises(FloatingPointError, match="after 5[0-9] evaluations"):
        solve_heun(oscillator, X, (RATE * 100,), max_evals=50)


# ---------------------------------------- streaming


def test_all_methods_stream_with_the_same_noise_and_frames_are_clamped():
    first, noise = PAIR[0].float(), {}
    for name, gain in (("a", 0.0), ("b", 9.0)):
        step = lambda x, n: (noise.setdefault(name, []).append(n) or gain * n, torch.ones(4), None)
        frames = [
            x for x, _ in itertools.islice(stream(step, first, torch.Generator().manual_seed(3)), 3)
        ]
        assert all(f.shape == first.shape and f.abs().max() <= 1 for f in frames)
    assert all(torch.equal(p, q) for p, q in zip(noise["a"], noise["b"]))
    assert not torch.equal(noise["a"][0], noise["a"][1])
    assert abs(torch.stack(noise["a"]).std() - 1) < 0.1


def test_a_stream_goes_on_for_ever_and_keeps_no_frame_but_the_last():
    frames, refs = stream(lambda x, n: (x + 1e-4, torch.ones(4), None), PAIR[0]), []
    for _ in range(500):
        refs.append(weakref.ref(next(frames)[0]))
    assert sum(r() is not None for r in refs) <= 1


def test_what_is_done_to_a_frame_that_was_handed_out_does_not_reach_the_next():
    first = PAIR[0].clamp(-1, 1)
    frames = stream(lambda x, n: (0.5 * x, torch.ones(4), None), first)
    for k in range(1, 4):
        x, _ = next(frames)
        torch.testing.assert_close(x, 0.5**k * first)
        x.fill_(9)


# ---------------------------------------- network

parameters = biflow.parameters


@pytest.mark.parametrize("preset", biflow.PRESETS)
def test_methods_have_the_same_network_but_for_channels(preset):
    with torch.device("meta"):  # shapes only: `paper` is large
        nets = biflow.build(biflow.Config(**biflow.PRESETS[preset]))
    count = {m: parameters(net) for m, net in nets.items()}
    assert max(count.values()) / min(count.values()) < 1.2
    inside = [
        [
            p.shape
            for k, p in net.named_parameters()
            if ".inp." not in f".{k}" and ".out." not in f".{k}"
        ]
        for net in (nets["flow"], nets["condiff"].net)
    ]
    assert inside[0] == inside[1]


def test_preset_paper_has_the_released_networks_but_for_the_clocks():
    with torch.device("meta"):
        nets = biflow.build(biflow.Config(**biflow.PRESETS["paper"]))
    millions = []
    for net in nets.values():
        scales = 0  # the clock's other half: released blocks only shift
        for block in net.modules():
            if isinstance(block, biflow.ResBlock):
                scales += parameters(block.clock) // 2
        millions.append((parameters(net) - scales) / 1e6)
    assert millions == pytest.approx([278.0, 278.0, 247.8], rel=1e-3)


def randomised(**more):
    nets = biflow.build(biflow.Config(width=8, mults="1,1.5", **more))
    g = torch.Generator().manual_seed(1)
    for p in nets.parameters():  # untrained output layers are zero, which would hide everything
        p.data.normal_(0, 0.2, generator=g)
    return nets


@pytest.mark.parametrize("method", biflow.METHODS)
def test_shapes_and_that_the_net_hears_its_inputs(method):
    f, x, t = randomised()[method], randn(2, 3, 16, 16).float(), torch.tensor([0.2, 0.7])
    given = {"flow": [x, t], "condiff": [x, x.flip(0), t], "biflow": [x, t, t.flip(0)]}[method]
    call = lambda *args: torch.stack(list(out)) if isinstance(out := f(*args), tuple) else out
    assert call(*given).shape == ((2, 2, 3, 16, 16) if method == "biflow" else (2, 3, 16, 16))
    for i in range(len(given)):
        changed = [v + 0.2 * (i == j) for j, v in enumerate(given)]
        assert (call(*changed) - call(*given)).abs().max() > 1e-3


@pytest.mark.parametrize("preset", biflow.PRESETS)
def test_no_norm_has_one_channel_a_group(preset):
    with torch.device("meta"):
        nets = biflow.build(biflow.Config(**biflow.PRESETS[preset]))
        smallest = biflow.build(biflow.Config(width=8, mults="1"))
    for net in (nets, smallest):
        norms = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert len(norms) > 10
        assert all(m.num_channels >= 2 * m.num_groups for m in norms)


@pytest.mark.parametrize("method", biflow.METHODS)
def test_every_block_hears_every_clock(method):
    f = biflow.build(biflow.Config(methods=method))[method]  # the widths of `tiny`
    g = torch.Generator().manual_seed(1)
    for p in f.parameters():
        if not p.any():  # untrained last layers are zero, which would hide everything
            p.data.normal_(0, 0.1, generator=g)
    blocks = [m for m in f.modules() if isinstance(m, biflow.ResBlock)]
    heard = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, args: heard.append(args))
    x = randn(1, 3, 32, 32).float()
    t = torch.tensor([0.3])
    call = {"flow": lambda s: f(x, s), "condiff": lambda s: f(x, x, s),
            "biflow": lambda s: f(x, s, t)}
    clocks = [call[method]]
    if method == "biflow":
        clocks.append(lambda s: f(x, t, s))
    for clock in clocks:
        heard.clear()
        clock(t)
        before = list(heard)
        heard.clear()
        clock(t + 0.3)
        assert len(heard) == len(before) == len(blocks)
        for block, (h, emb), (_, other) in zip(blocks, before, heard):
            with torch.no_grad():
                moved = block(h, other) - block(h, emb)  # the clock alone has moved
            assert moved.std() > 1e-3 * block(h, emb).std()  # of a deaf one: 1e-7


def test_a_method_alone_starts_with_the_weights_that_it_has_among_others():
    together = biflow.build(biflow.Config(seed=3))
    other = biflow.build(biflow.Config(seed=4))
    for method in biflow.METHODS:
        alone = biflow.build(biflow.Config(seed=3, methods=method))
        assert list(alone) == [method]
        for key, value in alone.state_dict().items():
            assert torch.equal(value, together.state_dict()[key])
    weights = "flow.inp.weight"
    assert not torch.equal(other.state_dict()[weights], together.state_dict()[weights])


def test_a_longer_training_begins_as_a_shorter_one_and_all_end_low():
    short = biflow.Config(iters=1000, lr=1e-3, lr_end=0.05)
    long = biflow.Config(iters=5000, lr=1e-3, lr_end=0.05)
    rate = biflow.learning_rate
    for step in (1, 50, 100, 101, 500, 800):
        assert rate(short, step) == rate(long, step) == pytest.approx(1e-3 * min(1, step / 100))
    assert rate(short, 900) == pytest.approx(1e-3 * 0.525)
    assert rate(short, 1000) == rate(long, 5000) == pytest.approx(5e-5)


def test_amp_and_compile_give_the_same_answers():
    net, x, t = randomised()["flow"], randn(3, 3, 16, 16).float(), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        plain, low = net(x, t), randomised(amp=True)["flow"](x, t)
        # traced as --compile traces it, without the slow compiler of machine code
        traced = torch.compile(net, backend="eager", fullgraph=True)
        again = [traced(x[:k], t[:k]) for k in (3, 2)]  # samples finish, batches shrink
    assert low.dtype == torch.float32 and 0 < (low - plain).abs().max() < 0.03 * plain.abs().max()
    for k, y in zip((3, 2), again):
        torch.testing.assert_close(y, plain[:k], rtol=1e-4, atol=1e-4)


# ---------------------------------------- Frechet distance


def test_frechet_equals_closed_forms_of_gaussians():
    white = lambda x: (
        (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    )  # exactly N(0, I)
    a, b, p, q = (
        white(randn(200, 3)),
        white(randn(200, 3, seed=1)),
        randn(3, 3, seed=2),
        randn(3, 3, seed=3),
    )
    m, s = torch.tensor([[0.5, -1, 2], [0.5, 1, 3]]).double()
    assert frechet(a, b * s + m) == pytest.approx((m**2 + (1 - s) ** 2).sum().item(), rel=1e-9)
    w = torch.linalg.eigvals(p @ p.T @ q @ q.T).real  # another way to the trace of the root
    want = ((p**2).sum() + (q**2).sum() - 2 * w.sqrt().sum()).item()
    assert frechet(a @ p.T, b @ q.T) == pytest.approx(want, rel=1e-9)
    assert abs(frechet(a @ p.T, a @ p.T)) < 1e-9 and frechet(a, b @ q.T) == pytest.approx(
        frechet(b @ q.T, a), abs=1e-9
    )


@cache
def sky_clips():
    """Test clips as the reference, train clips to be corrupted, uint8 (N, 8, 3, 32, 32)."""
    clips = lambda split, count: (
        torch.stack(common.render("sky", split, count, 32, 32, 0).cache)
        .unflatten(1, (4, 8))
        .flatten(0, 1)
    )
    return clips("test", 100), clips("train", 40)


def blur(v, sigma):
    k = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * sigma**2 + 1e-9))
    x = v.flatten(0, 2)[:, None].float()  # (N T 3, 1, H, W)
    for shape, pad in (((1, 1, 1, 9), (4, 4, 0, 0)), ((1, 1, 9, 1), (0, 0, 4, 4))):
        x = F.conv2d(F.pad(x, pad, mode="reflect"), (k / k.sum()).view(shape))
    return x.view(v.shape).round().to(torch.uint8)


def noise(v, sigma):
    return (v + sigma * randn(*v.shape).float()).round().clamp(0, 255).to(torch.uint8)


def shuffle(v, share):
    """That share of the clips with their frames in random order."""
    rng, v = np.random.default_rng(0), v.clone()
    for clip in v[: round(share * len(v))]:
        clip[:] = clip[torch.from_numpy(rng.permutation(8))]
    return v


def freeze(v, hold):
    return v[:, torch.arange(8) // hold * hold]


@pytest.mark.parametrize(
    "harm, levels",
    [
        (blur, (0, 0.5, 0.7, 1, 2)),
        (noise, (0, 4, 8, 16, 32)),
        (shuffle, (0, 0.2, 0.4, 0.7, 1)),
        (freeze, (1, 2, 4, 8)),
    ],
)
def test_our_distance_rises_monotonically_under(harm, levels):
    reference, clips = sky_clips()
    distance = [
        frechet(own_features(harm(clips, level)), own_features(reference)) for level in levels
    ]
    steps = np.diff(distance)
    assert (steps > distance[0]).all(), (
        distance
    )  # each by more than the floor, the distance of real clips
    assert distance[-1] > 50 * distance[0]


def test_our_features_work_at_the_smallest_size():
    size = next(f.metadata["low"] for f in fields(biflow.Config) if f.name == "size")
    assert own_features(torch.randint(256, (2, 8, 3, size, size)).to(torch.uint8)).isfinite().all()


def test_real_clips_are_drawn_without_repetition_and_too_few_are_a_fault():
    held = [
        torch.arange(n).add(50 * k).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        for k, n in enumerate((20, 7, 17))
    ]
    clips = common.Clips(lengths=[20, 7, 17], size=2, cache=held)
    starts = biflow.real_clips(clips, 10, 0)[:, 0, 0, 0, 0].tolist()
    assert sorted(starts) == [0, 8, 100, 108] and len(biflow.real_clips(clips, 3, 0)) == 3
    with pytest.raises(Fault, match="two real clips of 8 frames"):
        biflow.real_clips(common.Clips(lengths=[15], size=2, cache=held[:1]), 10, 0)


# ---------------------------------------- shipped networks


def test_the_shipped_networks_know_the_sky_and_say_how_they_were_made():
    saved = common.load_checkpoint(biflow.SHIPPED, "biflow")
    assert biflow.SHIPPED.stat().st_size < 4e6 and 0 <= saved["eps"] <= 1
    assert {"command", "commit", "steps", "seconds", "device"} <= saved["made"].keys()
    nets, cfg = biflow.load_averages(saved, "cpu")
    pairs = common.Batches(common.render("sky", "test", 16, cfg.size, 8, 5), 32, 2, 0)[0]
    x0, x1 = common.to_float(pairs).unbind(1)
    t, alpha, n = biflow.draw(0, 1, x0)
    with torch.no_grad():
        flow = biflow.flow_loss(nets["flow"], x0, x1, t).mean()
        v, noise = biflow.biflow_loss(nets["biflow"], x0, x1, t, alpha, n)
        condiff = biflow.condiff_loss(nets["condiff"], x0, x1, alpha, n).mean()
        frame = flow_step(nets["flow"], x0, solve_heun)[0]
    still = biflow.mse(x1, x0).mean()  # what a network that predicts no change has
    assert flow < 0.2 * still and v.mean() < 0.7 * still and noise.mean() < 0.2 and condiff < 0.2
    assert biflow.mse(frame, x1).mean() < 0.2 * still


# ---------------------------------------- a GPU, as far as that can be traced without one
# Tensors that have a device and a shape but no values: an operation on two devices is an error.


def to_fake_gpu(net):
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            value = torch.empty(p.shape, dtype=p.dtype, device="cuda")
            module.register_parameter(name, torch.nn.Parameter(value))
    return net


def fake_inputs(*_):
    """What common.prefetched yields: frames and draws on the GPU."""
    for step in range(1, 4):
        frames = torch.empty(2, 2, 3, 16, 16, dtype=torch.uint8, device="cuda")
        t, alpha = torch.empty(2, 2, device="cuda")
        yield step, (frames, t, alpha, torch.empty(2, 3, 16, 16, device="cuda"))


class FakeLog:
    def __init__(self, *_):
        self.rows = []

    def add(self, step, **losses):
        assert step > 0 and all(loss.device.type == "cuda" for loss in losses.values())

    def close(self):
        pass


def fake_backward(loss):
    """autograd's engine asks the driver of a GPU: `backward()` is the one line that is not traced."""
    assert loss.device.type == "cuda" and loss.requires_grad


@pytest.mark.parametrize("method", biflow.METHODS)
def test_training_on_a_gpu_meets_no_tensor_on_the_cpu(method, monkeypatch, tmp_path):
    cfg = biflow.Config(size=16, width=8, mults="1,1.5", methods=method, iters=3)
    net = biflow.build(cfg)
    monkeypatch.setattr(common, "prefetched", fake_inputs)
    monkeypatch.setattr(common, "Log", FakeLog)
    monkeypatch.setattr(common, "save_checkpoint", lambda *_, **state: None)  # no values to write
    monkeypatch.setattr(torch.Tensor, "backward", fake_backward)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode():
        to_fake_gpu(net)
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda optimizer: None)
        clips = common.Clips([4], 16, [None])
        averages = biflow.train(cfg, net, clips, tmp_path, torch.device("cuda"))
        assert all(p.device.type == "cuda" for p in averages.parameters())


def test_every_step_and_loss_on_a_gpu_meets_no_tensor_on_the_cpu():
    net = biflow.build(biflow.Config(size=16, width=8, mults="1,1.5"))
    once = lambda field, x, args=(): (field(x, torch.zeros(len(x), device="cuda"), *args), 0, 0)
    with FakeTensorMode(), torch.no_grad():
        to_fake_gpu(net)
        x0, x1, n = torch.empty(3, 2, 3, 16, 16, device="cuda")
        alpha = torch.empty(2, device="cuda")
        for t in (0.3, torch.empty(2, device="cuda")):
            made = [
                biflow.biflow_loss(net["biflow"], x0, x1, alpha, alpha, n)[0],
                denoise_step(net["biflow"], x0, t, t, once)[0],
                biflow_step(net["biflow"], x0, n, t, once)[0],
                biflow_step_back(net["biflow"], x0, n, t, once)[0],
                predict_step(net["biflow"], x0, once)[0],
                flow_step(net["flow"], x0, once)[0],
                condiff_step(net["condiff"], x0, n, once)[0],
            ]
            assert all(x.device.type == "cuda" for x in made)
        # The loop of solve_heun branches on values, which these tensors have not: its parts.
        args = (alpha,)
        field = lambda x, k, a: common.like(a, x) * x
        h = biflow.hairer_first_step(field, x0, x1, args, 0.01)
        assert h.device.type == "cuda" and biflow.rms(x0).device.type == "cuda"
