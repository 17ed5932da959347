from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdiff.data.feed.plan import TURNS, Mixed, Plan

plans = st.builds(
    Plan,
    n_cells=st.integers(1, 300),
    batch=st.integers(1, 64),
    block=st.integers(1, 40),
    window=st.integers(1, 5),
    seed=st.integers(0, 5),
)


def stretch(plan: Plan, n: int) -> np.ndarray:
    """Cells of the first steps that hold at least ``n``, sorted within each step."""
    return np.concatenate([plan.rows(s) for s in range(-(-n // plan.batch))])


@given(plans)
@settings(max_examples=150, deadline=None)
def test_each_epoch_reads_every_cell_once(plan):
    one_by_one = Plan(plan.n_cells, 1, plan.block, plan.window, plan.seed)  # a step a cell: the bare order
    order = stretch(one_by_one, 2 * plan.n_cells)
    for epoch in range(2):
        part = order[epoch * plan.n_cells : (epoch + 1) * plan.n_cells]
        assert np.array_equal(np.sort(part), np.arange(plan.n_cells))


@given(plans, st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_a_batch_is_the_next_cells_of_the_order(plan, step):
    one_by_one = Plan(plan.n_cells, 1, plan.block, plan.window, plan.seed)
    want = [one_by_one.rows(s)[0] for s in range(step * plan.batch, (step + 1) * plan.batch)]
    rows = plan.rows(step)
    assert rows.dtype == np.int64
    assert np.array_equal(rows, np.sort(want))


@given(plans, st.integers(0, 60), st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_share_a_batch_and_order_is_that_of_one(plan, step, data):
    world = data.draw(st.sampled_from([w for w in range(1, plan.batch + 1) if plan.batch % w == 0]))
    parts = [plan.rank_rows(step, r, world) for r in reversed(range(world))][::-1]
    assert {len(p) for p in parts} == {plan.batch // world}
    assert np.array_equal(np.concatenate(parts), plan.rows(step))


def test_a_step_does_not_depend_on_what_was_asked_before():
    plan = Plan(n_cells=1000, batch=32, block=16, window=4, seed=7)
    straight = [plan.rows(s) for s in range(120)]
    for s in np.random.default_rng(0).permutation(120):
        assert np.array_equal(plan.rows(int(s)), straight[s])


def test_epochs_and_seeds_differ():
    plan = Plan(n_cells=640, batch=64, block=16, window=4)
    first, second = plan.rows(0), plan.rows(10)
    assert plan.epoch(0) == 0
    assert plan.epoch(9) == 0
    assert plan.epoch(10) == 1
    assert plan.steps_per_epoch == 10.0
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Plan(n_cells=640, batch=64, block=16, window=4, seed=1).rows(0))


def test_a_window_mixes_its_blocks_and_no_others():
    plan = Plan(n_cells=1024, batch=64, block=16, window=4)
    assert len(np.unique(plan.rows(0) // 16)) == 4
    half = Plan(n_cells=1024, batch=32, block=16, window=4)
    assert np.array_equal(np.sort(np.r_[half.rows(0), half.rows(1)]), plan.rows(0))
    assert len(np.unique(half.rows(0) // 16)) == 4


@pytest.mark.parametrize("world", [3, 5])
def test_a_batch_that_cannot_be_dealt(world):
    with pytest.raises(ValueError, match=rf"batch 64 is no multiple of {world} ranks; use \d+ or \d+ ranks"):
        Plan(100, 64).rank_rows(0, 0, world)


def test_more_ranks_than_cells_in_a_batch():
    with pytest.raises(ValueError, match="batch 4 is no multiple of 8 ranks; use 4 ranks, or a batch of 8"):
        Plan(100, 4).rank_rows(0, 0, 8)


def test_numbers_that_make_no_sense():
    with pytest.raises(ValueError, match="Plan batch=0: at least 1"):
        Plan(10, 0)
    with pytest.raises(ValueError, match="step -1"):
        Plan(10, 2).rows(-1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Plan(10, 2).rank_rows(0, 2, 2)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_strata_are_read_in_proportion_without_replacement_by_any_number_of_ranks(data):
    sizes = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    weights = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)).filter(any))
    batch = data.draw(st.sampled_from([4, 12, 60]))
    codes = np.random.default_rng(sum(sizes)).permutation(np.repeat(np.arange(len(sizes)), sizes))
    strata = [np.flatnonzero(codes == c) for c in range(len(sizes))]
    plan = Mixed(strata, weights, batch=batch, block=8, window=4, seed=3)
    steps = 20
    rows = [plan.rows(step) for step in range(steps)]
    share = np.array(weights) / sum(weights)
    for step, cells in enumerate(rows):
        assert len(cells) == batch
        assert (np.diff(cells) >= 0).all()
        world = data.draw(st.sampled_from([1, 2, 4]))
        assert np.array_equal(np.concatenate([plan.rank_rows(step, r, world) for r in range(world)]), cells)
        got = np.bincount(codes[cells], minlength=len(sizes))
        off = np.abs(got - share * batch)
        assert (off < 2.01 + len(sizes) * batch / TURNS).all()  # to within two cells in every batch
    seen = np.bincount(np.concatenate(rows), minlength=sum(sizes))
    for cells in strata:
        assert seen[cells].max() - seen[cells].min() <= 1  # nobody twice before everybody once


def test_strata_that_make_no_sense():
    one = np.arange(3)
    for strata, weights, said in [
        ([one, np.empty(0, int)], None, "strata of .3, 0. cells"),
        ([one], [0.0], "weights .0.0. for 1 strata"),
        ([one], [-1.0], "weights"),
        ([one], [1.0, 2.0], "for 1 strata"),
        ([one], [np.nan], "weights"),
    ]:
        with pytest.raises(ValueError, match=said):
            Mixed(strata, weights, batch=4)
