"""Draws of a batch at once are those of its groups alone, bit for bit."""

from __future__ import annotations

import pytest
import torch

from distdiff.rng import generator
from distdiff.rng.stream import Streams

ROWS, GENES, SIZE = 23, 37, 5  # the last group has fewer rows


def streams():
    return [generator(0, "test", group) for group in range(0, ROWS, SIZE)]


DRAWS = {
    "uniform": lambda rng, a, b: rng.uniform(*a.shape),
    "normal": lambda rng, a, b: rng.normal(*a.shape),
    "binomial": lambda rng, a, b: rng.binomial((10 * a).round(), b),
    "one chance": lambda rng, a, b: rng.binomial((10 * a).round(), torch.tensor(0.3)),
    "poisson": lambda rng, a, b: rng.poisson(a),
    "nb": lambda rng, a, b: rng.nb(a, b),
}


@pytest.mark.parametrize("law", DRAWS)
def test_groups_draw_what_they_draw_alone(law):
    a, b = (generator(1, name).uniform(ROWS, GENES) for name in "ab")
    together, alone = Streams(streams(), SIZE), streams()
    for _ in range(2):  # and each group's generator has moved on as far
        whole = DRAWS[law](together, a, b)
        parts = zip(alone, a.split(SIZE), b.split(SIZE), strict=True)
        assert torch.equal(whole, torch.cat([DRAWS[law](rng, x, y) for rng, x, y in parts]))
    assert len(whole.unique()) > 2


def test_a_batch_of_other_groups_is_refused():
    with pytest.raises(ValueError, match="zip"):
        Streams(streams(), SIZE).uniform(ROWS + SIZE, 1)
