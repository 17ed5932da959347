from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distdiff.process.schedule import SCHEDULES, attrition, levels, schedule, sigma_max

unit = st.floats(0.001, 0.999)


@pytest.mark.parametrize("name", SCHEDULES)
@given(t=unit)
def test_speed_is_minus_the_slope_of_p(name, t):  # MATHS 1.2, 1.3
    s = schedule(name)
    point = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    p = s.p(point)
    (slope,) = torch.autograd.grad(p, point)
    assert torch.allclose(-slope, s.speed(p.detach()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_falls_from_one_to_zero(name):  # MATHS 1.1
    p = schedule(name).p(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (p.diff() < 0).all()
    assert p[0] > 1 - 1e-6
    assert p[-1] < 1e-6


def test_fisher_is_uniform_in_logit_p():  # MATHS 1.3
    p = schedule("fisher").p(torch.linspace(0.2, 0.8, 7, dtype=torch.float64))
    steps = torch.logit(p).diff()
    assert torch.allclose(steps, steps[0].expand_as(steps), rtol=1e-9)
    assert schedule("fisher").p(torch.tensor(0.347, dtype=torch.float64)) == pytest.approx(0.99, abs=5e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_run_from_exactly_zero_to_exactly_one(name):
    p = levels(schedule(name), 7)
    assert p[0] == 0
    assert p[-1] == 1
    assert len(p) == 8
    assert (p.diff() > 0).all()


@given(p_t=unit, gap=unit, eta=st.floats(0, 1))
def test_every_attrition_rule_stays_under_the_cap(p_t, gap, eta):  # MATHS 4.3, 4.4
    t, s = torch.tensor(p_t), torch.tensor(p_t + gap * (1 - p_t))
    cap = sigma_max(t, s)
    for rule in ("none", "max", "cap", "rescale"):
        assert 0 <= attrition(rule, eta, t, s) <= cap + 1e-6
    assert attrition("max", eta, t, s) == cap
    assert attrition("cap", eta, t, s) == min(eta, float(cap)) or eta > cap


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedule("cosin"), "did you mean 'cosine'"),
        (lambda: levels(schedule("cosine"), 0), "steps=0"),
        (lambda: attrition("rescal", 0.1, torch.tensor(0.5), torch.tensor(0.6)), "did you mean 'rescale'"),
        (lambda: attrition("cap", 1.5, torch.tensor(0.5), torch.tensor(0.6)), "got 1.5"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
