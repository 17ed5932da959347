from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from distdiff.data import counts
from distdiff.data.feed.resident import to_dense
from distdiff.data.store import coding
from distdiff.data.store.coding import Coded, Slots


@st.composite
def matrices(draw):
    n, g = draw(st.integers(0, 12)), draw(st.integers(1, 3000))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    x = rng.random((n, g)) < draw(st.sampled_from([0.0, 0.002, 0.05, 1.0]))
    values = rng.integers(1, draw(st.sampled_from([2, 300, 70_000])), (n, g))
    return sparse.csr_matrix(np.where(x, values, 0).astype(np.uint32))


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from(["uint8", "uint16", "uint32"]))
def test_decoding_undoes_encoding(counts, dtype):
    coded = coding.encode(counts, dtype)
    assert coded.values.dtype == dtype
    g = counts.shape[1]
    group = np.random.default_rng(0).integers(-1, 2, g).astype(np.int8)
    place = np.where(group < 0, -1, np.where(group == 0, np.cumsum(group == 0), np.cumsum(group == 1)) - 1)
    for spilled in ("uint8", "uint32"):
        once = coding.encode(counts, spilled)
        got = coding.recoded(once, place.astype(np.int32), np.maximum(group, 0), dtype)
        for k in range(len(got)):
            assert np.array_equal(got[k], np.diff(coding.encode(counts[:, group == k], dtype).starts))
    back = coding.decode(coded, counts.shape[1], np.uint32)
    assert (back != counts).nnz == 0
    assert np.array_equal(back.indptr, counts.indptr)
    assert np.array_equal(back.indices, counts.indices)
    order = np.random.default_rng(0).permutation(counts.shape[0])
    other = coding.decode(coding.encode(counts, dtype, order), counts.shape[1], np.uint32)
    assert (other != counts[order]).nnz == 0


@settings(max_examples=60, deadline=None)
@given(matrices(), st.data())
def test_cells_cut_dense_and_by_torch_agree_with_slicing(counts, data):
    n, g = counts.shape
    coded = coding.encode(counts, "uint8")
    slots = Slots(coded.gaps[None], coded.values[None], coded.starts[None])
    which = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)) if n else [], np.int64)
    zero = np.zeros(len(which), np.int64)
    columns = np.random.default_rng(len(which)).permutation(g)[: max(1, g // 2)]
    place = np.full(g, -1, np.int32)
    place[columns] = np.arange(len(columns))
    want = counts[which][:, columns].toarray()
    got = coding.csr(slots, zero, which, place, len(columns), np.int64)
    assert got.has_sorted_indices
    assert np.array_equal(got.toarray(), want)
    out = np.zeros(want.shape, np.float32)
    coding.add_dense(slots, zero, which, place, out)
    assert np.array_equal(out, want)
    piece = coding.cut(slots, zero, which)
    onto = torch.from_numpy(np.where(place < 0, len(columns), place).astype(np.int64))
    there = to_dense(*(torch.from_numpy(a) for a in piece), onto, len(columns))
    assert np.array_equal(there.numpy(), want)


def test_floats_are_kept_as_they_are():
    x = sparse.csr_matrix(np.array([[0, -1.5, 0, 3e20], [0.1, 0, 0, 0]], np.float32))
    back = coding.decode(coding.encode(x, "float32"), 4, np.float32)
    assert np.array_equal(back.toarray(), x.toarray())


def test_most_entries_take_two_bytes():
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.1, (200, 2000)).astype(np.uint32))
    assert len(coding.encode(counts, "uint8").gaps) == counts.nnz


@pytest.mark.parametrize(
    ("nnz", "sums", "largest", "wanted"),
    [
        (100, {"uint8": 100, "uint16": 100}, 255, "uint8"),
        (100, {"uint8": 140, "uint16": 100}, 900, "uint8"),
        (100, {"uint8": 160, "uint16": 100}, 900, "uint16"),
        (100, {"uint8": 100, "uint16": 100}, 255 * 64 + 1, "uint16"),  # one block would be nothing but this count
        (100, {"uint8": 10**8, "uint16": 10**6}, 2**32 - 1, "uint32"),
    ],
)
def test_the_width_is_the_one_that_takes_fewest_bytes(nnz, sums, largest, wanted):
    assert coding.narrowest(nnz, sums, largest) == wanted


def test_what_is_no_block_is_told():
    counts = sparse.csr_matrix(np.array([[0, 3, 1], [2, 0, 0]], np.uint32))
    coded = coding.encode(counts, "uint8")

    def said(**changes):
        made = {"gaps": coded.gaps.copy(), "values": coded.values.copy(), "starts": coded.starts.astype(np.uint32)}
        for name, (at, value) in changes.items():
            made[name][at] = value
        return coding.fault(Slots(**{k: v[None] for k, v in made.items()}), 0, 2, 3)

    assert said() == ""
    assert said(starts=(2, 9)) == "its cell starts make no sense"
    assert said(starts=(1, 4)) == "its cell starts make no sense"
    assert said(gaps=(1, 200)) == "its gene numbers make no sense"
    assert said(values=(slice(None), 0)) == "its entries are all 0"
    assert said(gaps=(slice(None), 0)) == "its entries are all 0"
    gone = Slots(np.zeros((1, 4), np.uint8), np.zeros((1, 4), np.uint8), np.full((1, 3), 2**32 - 1, np.uint32))
    assert coding.fault(gone, 0, 2, 3)
    assert isinstance(coded, Coded)


def test_one_pass_adds_up_what_numpy_adds_up():
    rng = np.random.default_rng(3)
    x = rng.poisson(rng.gamma(0.3, 300, (30, 9))).astype(np.float32)
    rows = np.array([0, 3, 4, 17, 29])
    train = np.array([True, False, True, True, False])
    moments, nnz, (one, two, largest) = coding.sums(sparse.csr_matrix(x), rows, train)
    some = x[rows][train].astype(np.float64)
    want = np.stack([some.sum(0), (some**2).sum(0), (some > 0).sum(0), some.max(0)])
    np.testing.assert_array_equal(moments, want)
    assert nnz.tolist() == (x[rows] > 0).sum(0).tolist()
    assert largest == x[rows].max()
    coded = sparse.csr_matrix(x[rows])
    assert one == coding.encode(coded, "uint8").starts[-1]
    assert two == coding.encode(coded, "uint16").starts[-1]
    np.testing.assert_array_equal(coding.totals(sparse.csr_matrix(x)), x.sum(1))


@pytest.mark.parametrize(("value", "bad"), [(3, 0), (0.5, 1), (-1, 1), (np.nan, 1), (np.inf, 1), (2**32, 1)])
def test_what_is_no_count(value, bad):
    assert counts.any_bad(np.array([1, value, 2], np.float64), 2**32 - 1) == bad
