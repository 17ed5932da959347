from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distdiff.process.schedule import (
    Cosine,
    Discrete,
    Table,
    attrition,
    check_grid,
    levels,
    placed,
    schedule,
    sigma_max,
)

SCHEDULES = ("cosine", "fisher", "linear", (1.0, 0.8, 0.3, 0.0))

unit = st.floats(0.001, 0.999)


@pytest.mark.parametrize("name", SCHEDULES)
@given(t=unit)
def test_speed_is_minus_the_slope_of_p(name, t):  # docs/MATHS.md 1.2, 1.3
    s = schedule(name)
    point = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    p = s.p(point)
    (slope,) = torch.autograd.grad(p, point)
    assert torch.allclose(-slope, s.speed(p.detach()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_falls_from_one_to_zero(name):  # docs/MATHS.md 1.1
    p = schedule(name).p(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (p.diff() < 0).all()
    assert p[0] > 1 - 1e-6
    assert p[-1] < 1e-6


def test_fisher_is_uniform_in_logit_p():  # docs/MATHS.md 1.3
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
def test_every_attrition_rule_stays_under_the_cap(p_t, gap, eta):  # docs/MATHS.md 4.3, 4.4
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


def test_a_table_interpolates_its_values():
    s = schedule([1, 0.8, 0.3, 0])
    assert s == Table((1.0, 0.8, 0.3, 0.0))
    p = s.p(torch.tensor([0.0, 1 / 6, 1 / 3, 0.5, 1.0], dtype=torch.float64))
    assert torch.allclose(p, torch.tensor([1.0, 0.9, 0.8, 0.55, 0.0], dtype=torch.float64))


def test_discrete_time_snaps_and_weighs_by_its_intervals():  # docs/MATHS.md 1.4
    s = schedule({"kind": "fisher", "times": 1000})
    assert s == schedule("fisher@1000")
    t = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = s.p(t)
    table = s.table(p)
    k = s.index(p)
    assert torch.equal(table[k], p)
    assert k.min() >= 1
    assert k.max() <= 1000
    assert ((k - t * 1000) < 1).all()
    assert torch.allclose(s.speed(p), 1000 * (table[k - 1] - table[k]))
    middle = (p > 0.01) & (p < 0.99)
    assert torch.allclose(s.speed(p)[middle], s.base.speed(p)[middle], rtol=0.02)  # -p' in the limit
    assert torch.allclose(torch.logit(table[1:]).diff(), torch.tensor(-2 * s.base.span / 1000, dtype=torch.float64))


@pytest.mark.parametrize("times", [2, 7, 50])
def test_discrete_weights_add_up_to_one(times):
    s = Discrete(Cosine(), times)
    assert float(s.speed(s.table(torch.zeros(1, dtype=torch.float64))[1:]).mean()) == pytest.approx(1.0)


def test_levels_even_in_logit():
    p = levels(schedule("cosine"), 6, "logit").double()
    gaps = torch.logit(p[1:-1]).diff()
    assert torch.allclose(gaps, gaps[0].expand_as(gaps), rtol=1e-4)
    assert levels(schedule("cosine"), 2, [0, 0.4, 1]).tolist() == pytest.approx([0, 0.4, 1])


def test_placed_levels_lose_least_variance():  # docs/MATHS.md 4.11: against every other choice
    import itertools

    p = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
    excess = [5.0, 4.0, 9.0, 2.0, 1.0, 0.2]

    def lost(at):
        return sum(((b - a) / (1 - a)) ** 2 * excess[p.index(a)] for a, b in itertools.pairwise(at))

    for steps in (1, 2, 3, 5):
        got = placed(p, excess, steps)
        every = [[0.0, *mid, 1.0] for mid in itertools.combinations(p[1:], steps - 1)]
        assert lost(got) == pytest.approx(min(lost(at) for at in every))
    deeper = placed(p, excess, 2, start=0.4)
    assert deeper[0] == 0.4
    assert deeper[-1] == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedule("cosinus"), "did you mean 'cosine'"),
        (lambda: schedule({"kind": "cosine", "time": 5}), "unknown option 'time'; did you mean 'times'"),
        (lambda: schedule([1, 0.5]), "must fall from 1 to 0"),
        (lambda: schedule([1, 0.5, 0.6, 0]), "must fall from 1 to 0"),
        (lambda: schedule({"kind": "fisher", "times": 1}), "times >= 2, got 1"),
        (lambda: schedule("fisher@many"), "the number of times is wanted after @"),
        (lambda: schedule("distdiff.types:Cells"), "is not a subclass of"),
        (lambda: levels(schedule("cosine"), 2, [0, 0.5, 0.9]), "must end at p = 1 .* ends at 0.9"),
        (lambda: levels(schedule("cosine"), 2, [0, 0.5, 0.5, 1]), "must rise within"),
        (lambda: levels(schedule("cosine"), 2, [0.1, 0.5, 1]), "2 steps need 3 levels from 0"),
        (lambda: levels(schedule("cosine"), 2, "lgit"), "did you mean 'logit'"),
        (lambda: check_grid([]), "ends at nothing"),
        (lambda: placed([0, 0.5], [1, 1], 5), "5 steps cannot be placed on 2"),
    ],
)
def test_bad_schedules_and_grids_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_schedule_of_ones_own():
    assert schedule("distdiff.process.schedule:Cosine") == Cosine()
