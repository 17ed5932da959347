from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from distdiff.data.masks import (
    dropout_sites,
    expressed,
    gene_folds,
    load_mask,
    mar_blocks,
    mcar,
    mnar,
    rare,
    split_molecules,
)


def test_mcar_hides_the_share_it_is_asked_for():
    a = mcar((400, 300), 0.1, np.random.default_rng(1))
    assert a.dtype == bool
    assert abs(a.mean() - 0.1) < 5 * np.sqrt(0.09 / a.size)
    assert np.array_equal(a, mcar((400, 300), 0.1, np.random.default_rng(1)))
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got"):
            mcar((2, 2), rate, np.random.default_rng(0))


def algorithm_1(x, groups):
    """scIDPMs, algorithm 1, as it is written: loops over groups and genes."""
    sites = np.zeros(x.shape, bool)
    for group in set(groups[groups >= 0].tolist()):
        cells = np.flatnonzero(groups == group)
        for gene in range(x.shape[1]):
            if (x[cells, gene] > 0).any():
                sites[cells, gene] = x[cells, gene] == 0
    return sites


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_dropout_sites_are_those_of_algorithm_1(seed, n, g, k):
    rng = np.random.default_rng(seed)
    x, groups = rng.poisson(0.4, (n, g)), rng.integers(-1, k, n)
    counts = sparse.csr_matrix(x)
    some = expressed(counts, groups, k)
    want = algorithm_1(x, groups)
    assert np.array_equal(dropout_sites(counts, groups, some), want)
    assert np.array_equal(dropout_sites(x, groups, some), want)
    assert not want[groups < 0].any()
    cut = n // 2
    halves = expressed(counts[:cut], groups[:cut], k) | expressed(counts[cut:], groups[cut:], k)
    assert np.array_equal(halves, some)


def test_groups_that_do_not_fit():
    x = sparse.csr_matrix(np.eye(3))
    with pytest.raises(ValueError, match=r"groups have shape \(2,\) for 3 cells"):
        expressed(x, np.array([0, 1]))
    with pytest.raises(ValueError, match="group codes 0 to 4 for 2 groups"):
        expressed(x, np.array([0, 1, 4]), 2)
    with pytest.raises(ValueError, match="the genes must be the same"):
        dropout_sites(x, np.zeros(3, int), np.zeros((1, 4), bool))
    assert expressed(x, np.full(3, -1)).shape == (0, 3)


def test_masks_from_files(tmp_path):
    want = np.random.default_rng(0).random((7, 5)) < 0.4
    np.save(tmp_path / "m.npy", want)
    sparse.save_npz(tmp_path / "b.npz", sparse.csr_matrix(want))
    sparse.save_npz(tmp_path / "f.npz", sparse.coo_matrix(want.astype(np.float32)))
    assert np.array_equal(load_mask(tmp_path / "m.npy", (7, 5)), want)
    for name in ("b.npz", "f.npz"):
        mask = load_mask(tmp_path / name, (7, 5))
        assert mask.dtype == bool
        assert np.array_equal(mask[2:6].toarray(), want[2:6])


def test_mask_files_that_cannot_be_used(tmp_path):
    np.save(tmp_path / "m.npy", np.zeros((7, 5), bool))
    np.save(tmp_path / "i.npy", np.zeros((7, 5), int))
    np.save(tmp_path / "o.npy", np.full((7, 5), None), allow_pickle=True)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("no zip")
    sparse.save_npz(tmp_path / "two.npz", sparse.csr_matrix(np.full((7, 5), 2)))
    for name, said in {
        "m.txt": r"\.npz .* or \.npy .* is wanted",
        "i.npy": r"save mask.astype\(bool\)",
        "o.npy": "cannot be read",
        "other.npz": "cannot be read",
        "text.npz": "cannot be read",
        "two.npz": "values other than 0 and 1",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_mask(tmp_path / name, (7, 5))
    with pytest.raises(ValueError, match=r"has shape \(7, 5\), the data have \(7, 6\)"):
        load_mask(tmp_path / "m.npy", (7, 6))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_mask(tmp_path / "no.npy", (7, 5))


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.3])
def test_blocks_hide_whole_groups_of_genes_of_a_group_of_cells(rate):
    rng = np.random.default_rng(0)
    hidden = mar_blocks((400, 200), rate, rng)
    assert hidden.mean() == pytest.approx(rate, abs=0.005)
    kinds = {row.tobytes() for row in hidden}
    assert len(kinds) == (4 if rate == 0.1 else 5)  # every block hides the same genes in its cells; the rest miss none
    assert (hidden.sum(1) == 0).any()
    assert np.array_equal(hidden, mar_blocks((400, 200), rate, np.random.default_rng(0)))
    for wrong in (0.0, 0.5):
        with pytest.raises(ValueError, match="blocks hide a share"):
            mar_blocks((10, 10), wrong, rng)


@pytest.mark.parametrize("high", [False, True])
def test_not_at_random_hides_small_or_large_counts_gene_by_gene(high):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(2.0, 4.0, (400, 6)))
    valid = rng.random(counts.shape) < 0.7
    hidden = mnar(counts, 0.25, rng, high=high, valid=valid)
    assert not (hidden & ~valid).any()
    assert hidden.sum(0).tolist() == np.floor(0.25 * valid.sum(0)).tolist()
    for gene in range(6):
        seen, gone = counts[valid[:, gene], gene], counts[hidden[:, gene], gene]
        half = np.quantile(seen, 0.5)
        assert (gone >= half).all() if high else (gone <= half).all()
    sharp = mnar(counts, 0.25, rng, high=high, spare=0)
    threshold = np.sort(counts, axis=0)[:: -1 if high else 1][99]
    assert (np.where(sharp, counts, threshold) >= threshold).all() if high else (
        np.where(sharp, counts, threshold) <= threshold
    ).all()  # fmt: skip
    whole = mnar(counts, 0.25, rng, high=high, spare=5000)  # published: every entry of so small a set is a candidate
    assert counts[whole].mean() == pytest.approx(counts.mean(), rel=0.1)
    for options, message in (
        ({"rate": 1.0}, "must lie in"),
        ({"spare": -1}, "spare=-1"),
        ({"valid": valid[:3]}, "same"),
    ):
        with pytest.raises(ValueError, match=message):
            mnar(counts, **{"rate": 0.25, "rng": rng, **options})


def test_gene_folds_hold_every_gene_once():
    fold = gene_folds(103, 10, np.random.default_rng(0))
    assert sorted(np.bincount(fold).tolist()) == [10] * 7 + [11] * 3
    assert not np.array_equal(fold, np.sort(fold))
    for folds in (1, 104):
        with pytest.raises(ValueError, match=f"{folds} folds of 103 genes"):
            gene_folds(103, folds, np.random.default_rng(0))


def test_molecules_are_split_and_none_is_lost():
    counts = sparse.random(300, 50, 0.2, "csr", random_state=0, data_rvs=lambda n: np.full(n, 20.0))
    evidence, held = split_molecules(counts, 0.9, np.random.default_rng(0))
    assert abs(evidence + held - counts).nnz == 0
    assert evidence.sum() / counts.sum() == pytest.approx(0.9, abs=0.01)
    assert min(evidence.data.min(), held.data.min()) >= 1
    assert held.dtype == counts.dtype
    with pytest.raises(ValueError, match="whole numbers"):
        split_molecules(counts * 0.31, 0.9, np.random.default_rng(0))
    with pytest.raises(ValueError, match="must lie in"):
        split_molecules(counts, 1.0, np.random.default_rng(0))


def test_rare_types_have_few_training_cells():
    train = np.repeat([0, 1, 2, -1], [31, 30, 1, 40])
    assert rare(train, np.array([0, 1, 2, 3, -1])).tolist() == [False, True, True, False, False]
    assert rare(train, np.array([], int)).shape == (0,)
    assert rare(train, np.array([0]), at_most=31).tolist() == [True]
