from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distdiff.process.schedule import schedule
from distdiff.process.survival import Survival
from distdiff.rng import generator


def draw(mixture, cells=4000, genes=50):
    rng = generator(0, "survival")
    p, timed = mixture.draw(schedule("cosine"), rng.uniform(cells, 1), genes, rng=rng)
    assert ((p == 0) | (p == 1))[~timed[:, 0]].all()  # only hidden cells do without t
    assert (p > 0)[timed[:, 0]].all()
    return p


def test_patterns_come_in_their_shares():
    p = draw(Survival(hidden=0.5, two_level=0.3, uniform=0.2))
    alike = (p == p[:, :1]).all(1) & (p[:, 0] > 0) & (p[:, 0] < 1)
    gone = ((p == 0) | (p == 1)).all(1)
    assert float(alike.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(gone.float().mean()) == pytest.approx(0.5, abs=0.03)


def test_two_levels_share_one_target_level_a_cell():
    p = draw(Survival(hidden=0, two_level=1, uniform=0))
    target = p < 1
    level = torch.where(target, p, 0).amax(1, keepdim=True)
    assert torch.equal(p[target], level.expand_as(p)[target])
    share = target.float().mean(1)
    assert float(share.quantile(0.05)) > 0.1
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)


def test_logit_levels_meet_cells_that_are_nearly_empty():
    alone = Survival(hidden=0, two_level=0, uniform=1)
    plain, logit = draw(alone)[:, 0], draw(replace(alone, levels="logit"))[:, 0]
    moved = plain != logit
    assert float(moved.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((logit[moved] < 0.01).float().mean()) == pytest.approx((7 - 4.6) / 7, abs=0.03)
    assert 0.0009 < float(logit[moved].min()) < float(logit[moved].max()) < 0.5001
    assert float((plain < 0.01).float().mean()) < 0.1
    both = Survival(hidden=0, two_level=0.5, uniform=0.5)
    a, b = draw(both), draw(replace(both, levels="logit"))
    kept = (a == b).all(1)  # of two levels nothing changes
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": -1}, "must be >= 0"),
        ({"target_share": (0.9, 0.1)}, "low <= high"),
        ({"hidden": 0, "two_level": 0, "uniform": 0}, "not all 0"),
    ],
)
def test_bad_mixtures_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Survival(**options)
