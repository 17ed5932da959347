from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdiff.data.ingest.split import by_cell, by_group, shares


@given(st.integers(1, 500), st.tuples(*[st.integers(0, 10)] * 3), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_by_cell_gives_the_exact_shares(n, parts, seed):
    total = sum(parts)
    if not parts[0]:
        return
    split = tuple(p / total for p in parts)
    exact = np.array(split) * n
    if exact[0] < 1:  # may or may not be rounded up
        return
    code = by_cell(n, split, seed)
    sizes = np.bincount(code, minlength=3)
    assert sizes.sum() == n
    assert (np.abs(sizes - exact) < 1).all()
    assert np.array_equal(code, by_cell(n, split, seed))


def test_no_cell_left_for_training():
    with pytest.raises(ValueError, match="of 2 cells leaves none for training"):
        by_cell(2, (0.1, 0.45, 0.45), 0)


def test_seed_moves_the_cells():
    a, b = (by_cell(1000, (0.8, 0.1, 0.1), s) for s in (0, 1))
    assert np.bincount(a).tolist() == np.bincount(b).tolist() == [800, 100, 100]
    assert not np.array_equal(a, b)


@given(st.lists(st.integers(1, 60), min_size=3, max_size=20), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_groups_stay_whole_and_every_split_gets_one(sizes, seed):
    groups = np.repeat(np.array([f"d{i}" for i in range(len(sizes))], dtype=object), sizes)
    code = by_group(groups, (0.6, 0.2, 0.2), seed, "donor")
    assert all(len(set(code[groups == g])) == 1 for g in set(groups))
    assert set(code) == {0, 1, 2}


def test_equal_groups_come_close_to_the_shares():
    groups = np.repeat(np.array([f"d{i}" for i in range(20)], dtype=object), 10)
    assert np.bincount(by_group(groups, (0.8, 0.1, 0.1), 0, "donor")).tolist() == [160, 20, 20]
    assert np.bincount(by_group(groups, (0.5, 0.5, 0.0), 0, "donor"), minlength=3).tolist() == [100, 100, 0]


def test_splits_that_cannot_be():
    with pytest.raises(ValueError, match=r"split by 'donor': 2 group\(s\) \(a, b\) for 3 splits"):
        by_group(np.array(["a", "b"], dtype=object), (0.8, 0.1, 0.1), 0, "donor")
    with pytest.raises(ValueError, match="1 of 2 cells have no 'donor'"):
        by_group(np.array(["a", None], dtype=object), (1.0, 0.0, 0.0), 0, "donor")
    for bad in [(0.5, 0.5), (0.5, 0.1, 0.1), (1.2, -0.2, 0.0)]:
        with pytest.raises(ValueError, match="three shares"):
            shares(bad)
    with pytest.raises(ValueError, match="training share is 0"):
        shares((0.0, 0.5, 0.5))
