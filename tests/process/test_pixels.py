"""Count diffusion that stops at white: the law of counts below it, never above it."""

from __future__ import annotations

import pytest
import torch

from distdiff.process.counts import Counts
from distdiff.process.pixels import Pixels
from distdiff.process.schedule import levels
from distdiff.rng import generator
from distdiff.sampling import sample


@pytest.mark.parametrize("head", ["mean", "nb"])
@pytest.mark.parametrize("sigma", [("none", 0.0), ("rescale", 0.5)])
def test_no_walk_ends_above_white_and_all_reach_it(head, sigma):
    law, shape, rng = Pixels(head=head, brightest=16), (200, 8), generator(0, "white")
    bright = torch.full((*shape, law.outputs), 3.5)  # 33 molecules

    def predict(x, p):
        assert (x <= 16).all()
        return bright

    x = sample(law, predict, law.prior(shape, rng=rng), list(levels(law.schedule, 6)), sigma=sigma, rng=rng)
    assert x.max() == 16
    assert x.mean() > 14
    assert law.mean(bright, torch.zeros(shape), 0.0).max() == 16


def test_below_white_it_is_the_law_of_counts():
    x, eta = torch.tensor([[0.0, 3.0, 7.0]]).expand(500, -1), torch.zeros(500, 3, 1)
    drawn = [law.reverse(x, eta, 0.2, 0.6, rng=generator(0, "same")) for law in (Counts(head="mean"), Pixels())]
    assert torch.equal(*drawn)


def test_a_brightest_out_of_range_is_refused():
    for brightest in (0, 2**24 + 1):
        with pytest.raises(ValueError, match=f"brightest must lie between 1 and 16,777,216, got {brightest}"):
            Pixels(brightest=brightest)
