"""Choice of genes: by the definition, robust against outliers, and independent of how the cells are cut."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from distdiff.data.ingest.choose import Choice, Residuals, choose
from distdiff.data.store.moments import Moments
from distdiff.data.store.store import CountStore
from tests.data.conftest import build, make_adata, make_counts, save

PBMC = Path(__file__).parents[4] / "shared/data/pbmc3k_10x_human.h5ad"
MARKERS = {
    "CD3E", "MS4A1", "CD14", "IL7R", "CD8A", "CCR7", "LDHB", "CD79A", "LYZ", "S100A8", "GNLY", "NKG7", "FCGR3A",
    "MS4A7", "FCER1A", "CST3", "PPBP",
}  # fmt: skip


def by_definition(x: np.ndarray) -> np.ndarray:
    """Scores of docs/MATHS.md 12.1, on a dense matrix."""
    mu = x.sum(1, keepdims=True) * x.sum(0) / x.sum()
    z = np.clip((x - mu) / np.sqrt(mu + mu**2 / 100), -np.sqrt(len(x)), np.sqrt(len(x)))
    return np.sort(z, axis=0)[:-2].var(0)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poisson counts, ten markers of a type of 24 cells, and thirty genes with many molecules in one or two cells."""
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(-2, 1, 300)
    markers, outliers = np.split(rng.permutation(np.flatnonzero(mean < 0.5))[:40], [10])
    x = rng.poisson(mean * rng.lognormal(0, 0.3, (600, 1)))
    x[np.ix_(np.arange(24), markers)] += rng.poisson(3.0, (24, 10))
    for gene in outliers:
        x[rng.permutation(600)[: rng.integers(1, 3)], gene] = rng.integers(20, 80)
    return x, np.sort(markers), outliers


def test_the_score_is_that_of_the_definition():
    x = make_counts(300, 60, 5).toarray()
    x = x[:, x.sum(0) > 0]
    want = by_definition(x)
    for top in (1, 7, 30):
        assert np.array_equal(choose(sparse.csr_matrix(x), f"hvg:{top}"), np.sort(np.argsort(-want)[:top]))


@pytest.mark.parametrize("seed", range(3))
def test_markers_are_chosen_and_genes_of_one_or_two_cells_are_not(seed):
    x, markers, outliers = planted(seed)
    assert np.array_equal(choose(sparse.csr_matrix(x), "hvg:10"), markers)
    chosen = choose(sparse.csr_matrix(x), "hvg:40")
    assert np.isin(chosen, outliers).sum() < 10  # by chance 4: 30 of 290 that are left
    assert np.isin(choose(sparse.csr_matrix(x), "fano:30"), outliers).sum() > 25  # what hvg was before


def test_no_cut_and_no_order_of_the_cells_changes_a_bit():
    x = make_counts(200, 50, 1)
    share, rng = np.asarray(x.sum(0)).ravel() / x.sum(), np.random.default_rng(0)
    whole = Residuals.of(x, share, 14.0)
    for pieces in (2, 7, 200):
        parts = [x[rows] for rows in np.array_split(rng.permutation(200), pieces)]
        found = reduce(add, [Residuals.of(part, share, 14.0) for part in parts])
        for name in ("squares", "total", "largest", "depths"):
            assert np.array_equal(getattr(found, name), getattr(whole, name)), name


def test_a_store_has_the_genes_that_its_training_cells_choose(tmp_path, monkeypatch):
    x, _, _ = planted()
    path = save(make_adata(sparse.csr_matrix(x.astype(np.float32))), tmp_path / "a.h5ad")
    made = build(path, tmp_path / "one", genes="hvg:25")
    build(path, tmp_path / "all")
    store = CountStore.open(tmp_path / "all")
    train = x[store.origin(store.rows("train"))[1]]
    assert made.genes == tuple(f"g{i}" for i in choose(sparse.csr_matrix(train), "hvg:25"))
    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 150_000)
    assert build(path, tmp_path / "many", genes="hvg:25").fingerprint == made.fingerprint


def test_genes_with_most_molecules():
    x = sparse.csr_matrix([[3, 0, 1, 9], [3, 0, 2, 0]])
    assert choose(x, "top:2").tolist() == [0, 3]
    with pytest.raises(ValueError, match="only 3 genes have a count"):
        choose(x, "top:4")
    choice, among = Choice.parse("top:1", "abcd", "genes"), np.array([True, True, True, False])
    assert choice.pick("abcd", among, Moments.of(x), lambda of: of(x)).tolist() == [0]


def test_variable_genes_of_measurements_are_refused(tmp_path):
    path = save(make_adata(make_counts(30, 8)), tmp_path / "a.h5ad")
    for option in ("genes", "panel"):
        with pytest.raises(ValueError, match=r"genes 'hvg:3': the law of counts .* take cv:N, fano:N"):
            build(path, tmp_path / "out", counts=False, **{option: "hvg:3"})


@pytest.mark.skipif(not PBMC.is_file(), reason="../shared/data is not there")
def test_markers_of_real_cells_are_chosen():
    import anndata

    data = anndata.read_h5ad(PBMC)
    counts, names = sparse.csr_matrix(data.X), np.array(data.var_names)
    assert set(names[choose(counts, "hvg:1000")]) >= MARKERS
    assert len(MARKERS - set(names[choose(counts, "fano:1000")])) == 8
