"""Blackout, Gaussian, masked and JUMP: the same laws as count diffusion, against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distdiff.component import build, complete, kinds
from distdiff.process import Process
from distdiff.process.blackout import Blackout
from distdiff.process.counts import Counts
from distdiff.process.gaussian import Gaussian
from distdiff.process.jump import Jump
from distdiff.process.masked import MASK, Masked
from distdiff.process.schedule import levels, schedule, sigma_max
from distdiff.rng import generator
from distdiff.sampling import sample
from tests import laws

unit = st.floats(0.05, 0.95)
X0 = torch.tensor([[0.0, 1.0, 3.0, 40.0]])
SMALL = {"masked": {"classes": 50}}


@pytest.mark.parametrize("kind", kinds(Process))
def test_every_process_is_its_saved_options(kind):
    options = complete(Process, {"kind": kind})
    assert build(Process, json.loads(json.dumps(options))) == build(Process, {"kind": kind})


@pytest.mark.parametrize("kind", kinds(Process))
def test_every_process_starts_at_its_prior_and_ends_on_data(kind):
    """Whatever the network answers, a walk from the prior ends on finite data with a likelihood, or that says not."""
    process = build(Process, {"kind": kind, **SMALL.get(kind, {})})
    rng, shape = generator(0, kind), (64, 5)
    counts = torch.poisson(torch.full(shape, 2.0), generator=torch.Generator().manual_seed(0))
    x_0 = process.enter(counts, rng=rng)
    assert torch.allclose(process.leave(x_0), counts, atol=2.0 if kind == "jump" else 0.5)
    raw = torch.zeros(*shape, process.outputs)
    gone = process.forward(x_0, 1.0, 0.0, rng=rng)
    if kind != "gaussian":
        assert torch.equal(gone, process.prior(shape, rng=rng))

    def predict(x, p):
        return process.natural(raw, x, torch.as_tensor(p).expand_as(x))

    for sigma in (("none", 0.0), ("cap", 0.1), ("max", 1.0)):
        grid = levels(process.schedule, 5)
        out = process.leave(sample(process, predict, process.prior(shape, rng=rng), list(grid), sigma=sigma, rng=rng))
        assert out.isfinite().all()
        assert (out >= 0).all()
    laws.entries_with_p_one_never_move(process, predict(x_0, 1.0), x_0)
    for name, p in (("loss", 0.4), ("bound", 0.4)):
        if (kind, name) == ("gaussian", "bound"):
            with pytest.raises(ValueError, match="Gaussian has no likelihood of counts"):
                process.bound(predict(x_0, 0.4), x_0, x_0, 0.4)
            continue
        x = process.forward(x_0, 1.0, p, rng=rng)
        value = getattr(process, name)(predict(x, p), x_0, x, p)
        assert value.shape == x.shape
        assert value.isfinite().all()
    for cap in (0.5, 0.9):
        with pytest.raises(ValueError, match=r"attrition sigma=0.3 is outside \[0, 0.2\]"):
            process.reverse(x_0, predict(x_0, 0.5), 0.5, 0.9, sigma=0.3, rng=rng)
        with pytest.raises(ValueError, match="0 <= p_t <= p_s <= 1"):
            process.forward(x_0, cap, cap + 0.05, rng=rng)


# -- Gaussian ---------------------------------------------------------------------------------------------------------


@given(p_s=unit, share=unit)
def test_gaussian_forward_composes(p_s, share):  # docs/MATHS.md 8.1
    p_t = p_s * share
    laws.forward_composes(Gaussian(), X0 / 10, p_s, p_t, (X0 / 10 * p_t**0.5)[0], torch.full((4,), 1 - p_t))


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@given(p_t=unit, gap=unit, share=st.floats(0, 1))
def test_gaussian_step_given_the_truth_keeps_the_marginal(noise, p_t, gap, share):  # docs/MATHS.md 8.3, DDIM
    process, p_s, rng = Gaussian(noise=noise), p_t + gap * (1 - p_t), generator(0, "g", str(p_t), str(gap))
    x_0 = (X0 / 10).expand(laws.N, -1)
    x_t = process.forward(x_0, 1.0, p_t, rng=rng)
    sigma = share * float(sigma_max(torch.tensor(p_t), torch.tensor(p_s)))
    x_s = process.reverse(x_t, x_0.unsqueeze(-1), p_t, p_s, sigma=sigma, rng=rng)
    laws.moments_close(x_s, (X0 / 10 * p_s**0.5)[0], torch.full((4,), 1 - p_s))


def test_ancestral_step_has_the_ddpm_posterior():  # docs/MATHS.md 8.3: mean and variance given x_t and x_0
    process, p_t, p_s = Gaussian(noise=1.0), 0.3, 0.5
    x_t, x_0 = torch.full((laws.N, 1), 0.7), torch.full((laws.N, 1), 1.9)
    alpha = p_t / p_s
    beta = (1 - p_s) / (1 - p_t) * (1 - alpha)
    mean = p_s**0.5 * (1 - alpha) / (1 - p_t) * 1.9 + alpha**0.5 * (1 - p_s) / (1 - p_t) * 0.7
    laws.moments_close(process.reverse(x_t, x_0.unsqueeze(-1), p_t, p_s, rng=generator(0)), mean, beta)


M, V = torch.tensor([1.0, 0.2]), torch.tensor([0.5, 2.0])


def _normal(x, p):
    """``E[x_0 | x_p]`` for ``x_0 ~ N(M, V)``."""
    p = torch.as_tensor(p)
    return (M + p.sqrt() * V / (p * V + 1 - p) * (x - p.sqrt() * M)).unsqueeze(-1)


@pytest.mark.parametrize(
    ("noise", "solver", "steps"), [(1.0, "plain", 200), (0.0, "plain", 60), (0.0, "multistep", 25)]
)
def test_gaussian_walks_end_on_the_law(noise, solver, steps):
    laws.exact_answer_samples_the_law(
        Gaussian(noise=noise), _normal, 2, levels(schedule("cosine"), steps), M.double(), V.double(),
        tolerance=0.05, solver=solver,
    )  # fmt: skip


def test_multistep_needs_fewer_calls_than_ddim():
    process, errors = Gaussian(noise=0.0), {}
    for solver in ("plain", "multistep"):
        rng = generator(3, "few")
        x = sample(
            process, _normal, process.prior((laws.N, 2), rng=rng), list(levels(schedule("cosine"), 8)), solver=solver,
            rng=rng,
        )  # fmt: skip
        errors[solver] = float((x.var(0) / V - 1).abs().max())
    assert errors["multistep"] < 0.5 * errors["plain"]


def test_eps_and_x0_are_one_answer():  # docs/MATHS.md 8.1, 8.2
    eps_process, x_0, eps = Gaussian(predict="eps"), torch.tensor([[0.5, 2.0]]), torch.tensor([[0.3, -1.0]])
    x = 0.4**0.5 * x_0 + 0.6**0.5 * eps
    eta = eps_process.natural(eps.unsqueeze(-1), x, 0.4)
    assert torch.allclose(eta[..., 0], x_0, atol=1e-6)
    off = eps_process.natural((eps + 0.1).unsqueeze(-1), x, 0.4)
    assert torch.allclose(eps_process.loss(off, x_0, x, 0.4), torch.full((1, 2), 0.01), atol=1e-6)
    assert not eps_process.relative
    assert torch.allclose(
        Gaussian().natural(torch.log(torch.tensor([[[3.0]]])), x[:, :1], 0.0), torch.tensor(3.0).log1p()
    )


# -- masked -----------------------------------------------------------------------------------------------------------


@given(p_s=unit, share=unit)
def test_masking_composes(p_s, share):  # docs/MATHS.md 9.1
    p_t = p_s * share
    laws.forward_composes(
        Masked(), X0, p_s, p_t, (p_t * X0 + (1 - p_t) * MASK)[0], (p_t * (1 - p_t) * (X0 - MASK) ** 2)[0]
    )


PROBS = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])


def _classes(x, p):
    return PROBS.log().expand(len(x), 2, 3)


@pytest.mark.parametrize("rule", [("none", 0.0), ("cap", 0.3), ("max", 1.0)])
@pytest.mark.parametrize("steps", [1, 6])
def test_masked_walks_end_on_the_law(steps, rule):  # docs/MATHS.md 9.3, MDLM and ReMDM, any number of steps
    process, rng = Masked(classes=3), generator(0, "masked", steps)
    x = sample(
        process,
        _classes,
        process.prior((laws.N, 2), rng=rng),
        list(levels(process.schedule, steps)),
        sigma=rule,
        rng=rng,
    )
    for k in range(3):
        assert torch.allclose((x == k).float().mean(0), PROBS[:, k], atol=5 * 0.5 / laws.N**0.5)


@given(p_t=unit, gap=unit, share=st.floats(0, 1))
def test_unmasked_share_is_p_for_every_remasking(p_t, gap, share):  # docs/MATHS.md 9.3
    process, p_s, rng = Masked(classes=3), p_t + gap * (1 - p_t), generator(0, "share", str(p_t), str(gap))
    x_t = process.forward(torch.ones(laws.N, 2), 1.0, p_t, rng=rng)
    sigma = share * float(sigma_max(torch.tensor(p_t), torch.tensor(p_s)))
    seen = process.reverse(x_t, _classes(x_t, p_t), p_t, p_s, sigma=sigma, rng=rng) >= 0
    assert torch.allclose(seen.double().mean(0), torch.tensor(p_s, dtype=torch.float64), atol=5 * 0.5 / laws.N**0.5)


def test_masked_answers_start_as_a_poisson():
    eta = Masked(classes=40).natural(
        torch.cat((torch.full((1, 1, 1), math.log(2.5)), torch.zeros(1, 1, 39)), -1), torch.full((1, 1), MASK), 0.0
    )
    want = torch.distributions.Poisson(2.5).log_prob(torch.arange(40.0))
    assert torch.allclose(eta[0, 0], want, atol=1e-5)
    assert Masked(classes=40).mean(eta, torch.full((1, 1), MASK), 0.0) == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("process", [Masked(classes=3), Counts(head="mean")])
def test_bound_of_the_exact_answer_is_the_entropy(process):  # docs/MATHS.md 3.3, 9.2
    """Integrated over p, the exact answer's bound is ``-log p(x_0)`` on average: the entropy of the data."""
    n, rate = 4000, 1.3
    if isinstance(process, Masked):
        x_0 = torch.multinomial(PROBS[0], n, True, generator=torch.Generator().manual_seed(0)).float().unsqueeze(1)
        entropy, answer = float(-(PROBS[0] * PROBS[0].log()).sum()), PROBS[0].log().expand(n, 1, 3)
    else:
        law = torch.distributions.Poisson(rate)
        x_0 = torch.poisson(torch.full((n, 1), rate), generator=torch.Generator().manual_seed(0))
        k = torch.arange(60.0)
        entropy, answer = float(-(law.log_prob(k).exp() * law.log_prob(k)).sum()), torch.full((n, 1, 1), math.log(rate))
    total, points = 0.0, 100
    for i in range(points):
        p = (i + 0.5) / points
        x = process.forward(x_0, 1.0, p, rng=generator(0, "bound", i))
        total += float(process.bound(answer, x_0, x, p).mean()) / points
    assert total == pytest.approx(entropy, rel=0.03)


# -- Blackout, JUMP ---------------------------------------------------------------------------------------------------


def test_blackout_weights():  # docs/MATHS.md 1.4, with both of its weights
    one, two = Blackout(), Blackout(weight="finite")
    table = one.schedule.table(torch.zeros(1, dtype=torch.float64))
    k = torch.tensor([100, 500, 900])
    instantaneous = table[k] * ((-table[k].log()) - (-table[k - 1].log())) * 1000
    assert torch.allclose(one.weights(table[k]), instantaneous)
    assert torch.allclose(two.weights(table[k]), (table[k - 1] - table[k]) * 1000)
    slope = one.schedule.base.speed(table[k])
    assert torch.allclose(one.weights(table[k]), slope, rtol=0.05)
    assert torch.allclose(two.weights(table[k]), slope, rtol=0.05)
    assert one.weights(torch.zeros(1)) == 1
    assert one.outputs == 1
    with pytest.raises(ValueError, match="needs a schedule with times"):
        Blackout(schedule="cosine")
    with pytest.raises(ValueError, match="blackout: weight='paper'"):
        Blackout(weight="paper")


def test_jump_round_trip_keeps_the_mean_with_the_noise_of_its_scale():  # docs/MATHS.md 7.1, 7.2
    process, data = Jump(scale=50.0), torch.tensor([[0.0, 0.3, 7.0]]).expand(laws.N, 3)
    back = process.leave(process.enter(data, rng=generator(0, "jump")))
    laws.moments_close(back, data[0], data[0] / 50)
    x, eta = torch.full((1, 1), 20.0), torch.full((1, 1, 2), math.log(8.0))
    assert process.mean(eta, x, 0.5) == pytest.approx((20 + 4) / 50)
    assert process.rate(eta)[0, 0] == pytest.approx(8 / 50)
    with pytest.raises(ValueError, match="data >= 0, got -1"):
        process.enter(torch.full((1, 1), -1.0), rng=generator(0))
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        Jump(scale=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Gaussian(predict="x1"), "did you mean 'x0'"),
        (lambda: Gaussian(noise=2), r"noise must lie in \[0, 1\], got 2"),
        (lambda: Gaussian(scale=0), "scale must be positive"),
        (lambda: Masked(classes=1), "classes must be at least 2"),
        (lambda: Masked(classes=3).enter(torch.full((1, 1), 7.0), rng=generator(0)), "a count of 7 has no class"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_clamped_classes_hold_larger_counts():
    assert Masked(classes=3, clamp=True).enter(torch.full((1, 1), 7.0), rng=generator(0)) == 2
