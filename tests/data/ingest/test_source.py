from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from distdiff.data.counts import check_counts
from distdiff.data.ingest.source import Source
from tests.data.conftest import make_adata, make_counts, save


@pytest.fixture
def adata():
    x = make_counts(30, 12)
    a = make_adata(x, kind=["T", "B", None] * 10, age=np.arange(30.0), batch=[True, False] * 15)
    a.obs.loc["c1", "age"] = np.nan
    a.raw = make_adata(make_counts(30, 20, 5), names=a.obs_names)
    a.layers["raw_counts"] = make_counts(30, 12, 3).tocsc()
    a.layers["dense"] = make_counts(30, 12, 4).toarray()
    return a


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", "memory"])
@pytest.mark.parametrize("layer", [None, "raw_counts", "dense", "raw"])
def test_any_rows_of_any_encoding(adata, tmp_path, suffix, layer):
    if suffix == "memory":
        source = Source.from_anndata(adata, layer)
    else:
        source = Source.open(save(adata, tmp_path / f"a{suffix}"), layer)
    want = {None: adata.X, "raw": adata.raw.X}[layer] if layer in (None, "raw") else adata.layers[layer]
    want = want.toarray() if sparse.issparse(want) else want
    assert source.n_cells == 30
    assert source.genes == tuple(f"g{i}" for i in range(want.shape[1]))
    assert source.obs_names.tolist() == adata.obs_names.tolist()
    for start, stop in [(0, 30), (3, 17), (29, 30), (5, 5)]:
        got = source.read(start, stop)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got.toarray(), want[start:stop])
    assert source.bytes_per_cell > 0
    assert ("CSC" in source.note or "csc" in source.note) == (layer == "raw_counts")
    source.close()


@pytest.mark.parametrize("memory", [True, False])
def test_obs_columns_are_text(adata, tmp_path, memory):
    source = Source.from_anndata(adata) if memory else Source.open(save(adata, tmp_path / "a.h5ad"))
    assert source.obs("kind").tolist() == ["T", "B", None] * 10
    assert source.obs("age").tolist()[:3] == ["0", None, "2"]
    assert source.obs("batch").tolist()[:2] == ["True", "False"]
    with pytest.raises(ValueError, match=r"obs has no column 'kinds'; did you mean 'kind'\?"):
        source.obs("kinds")


def test_files_that_are_none(adata, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no.h5ad does not exist"):
        Source.open(tmp_path / "no.h5ad")
    text = tmp_path / "text.h5ad"
    text.write_text("gene,cell")
    with pytest.raises(ValueError, match=r"text.h5ad cannot be opened as h5ad.*truncated, or not an h5ad"):
        Source.open(text)
    cut = save(adata, tmp_path / "cut.h5ad")
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        Source.open(cut)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot be opened as a zarr folder"):
        Source.open(tmp_path / "folder")


def test_a_store_is_no_input(folder):
    with pytest.raises(ValueError, match=r"is no AnnData.*it is a distdiff store already"):
        Source.open(folder)


def test_missing_matrices(adata, tmp_path):
    adata.X = None
    path = save(adata, tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"has no X; choose one of its layers with layer=: dense, raw_counts"):
        Source.open(path)
    with pytest.raises(ValueError, match=r"no layer 'raw_count'; did you mean 'raw_counts'\?"):
        Source.open(path, "raw_count")
    with pytest.raises(ValueError, match="no layer 'raw_count'; did you mean 'raw_counts'"):
        Source.from_anndata(adata, "raw_count")
    with pytest.raises(ValueError, match="no X"):
        Source.from_anndata(adata)


@pytest.mark.filterwarnings("ignore:.*not unique")
def test_duplicate_names(tmp_path):
    x = make_counts(3, 3)
    genes = save(make_adata(x, genes=["a", "b", "a"]), tmp_path / "genes.h5ad")
    with pytest.raises(ValueError, match=r"gene 'a' occurs more than once.*var_names_make_unique"):
        Source.open(genes)
    cells = Source.open(save(make_adata(x, names=["x", "y", "y"]), tmp_path / "cells.h5ad"))
    assert cells.obs_names.tolist() == ["x", "y", "y-1"]
    assert "1 cells have the name of one before them, such as 'y', and got a number" in cells.renamed
    assert not Source.open(save(make_adata(x), tmp_path / "once.h5ad")).renamed


def test_damage_inside_is_told_at_the_read(adata, tmp_path):
    import h5py

    path = save(adata, tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as f:
        f["X/indices"][5] = 999
    with pytest.raises(ValueError, match="rows 0 to 30 do not fit obs and var"):
        Source.open(path).read(0, 30)
    with pytest.raises(ValueError, match="rows 3 to 99 asked, it has 30"):
        Source.open(path).read(3, 99)
    with h5py.File(path, "r+") as f:
        indices = f["X/indices"][:-9]
        del f["X/indices"]
        f["X/indices"] = indices
        data = f["X/data"][:-9]
        del f["X/data"]
        f["X/data"] = data
    with pytest.raises(ValueError, match=r"entries promised, .* found; truncated or damaged"):
        Source.open(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1.0, "cell 'c4', gene 'g2': -1.0 is negative"),
        (1.5, r"1.5 is not a whole number: was this log-normalised\? choose a raw-count layer with layer="),
        (np.nan, "nan is not finite"),
        (np.inf, "inf is not finite"),
        (1e12, "above the largest count"),
    ],
)
def test_what_is_no_count(value, said):
    x = make_counts(8, 5).astype(np.float64).tolil()
    x[4, 2] = value
    x[7, 4] = value
    with pytest.raises(ValueError, match=said):
        check_counts(x.tocsr(), [f"g{i}" for i in range(5)], [f"c{i}" for i in range(8)], "a.h5ad")


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i4", "i8", "f4", "f8", bool])
def test_counts_of_any_dtype_pass(dtype):
    x = sparse.csr_matrix(np.array([[0, 1], [1, 0]], dtype=dtype))
    check_counts(x, ["a", "b"], ["x", "y"], "here")
    check_counts(sparse.csr_matrix((0, 2), dtype=dtype), ["a", "b"], [], "here")


def test_a_negative_integer_is_found():
    with pytest.raises(ValueError, match=r"cell 'y', gene 'a': -3.0 is negative"):
        check_counts(sparse.csr_matrix(np.array([[0, 1], [-3, 0]])), ["a", "b"], ["x", "y"], "here")


def test_counts_that_float32_cannot_tell_apart_are_refused():
    from distdiff.data.counts import dense

    assert dense(sparse.csr_matrix([[0, 2**24 - 1]])).tolist() == [[0.0, 2**24 - 1]]
    with pytest.raises(ValueError, match="a count of 16777216 overflows float32"):
        dense(sparse.csr_matrix([[0, 2**24]]))


def test_x_is_no_layer_though_anndata_0_13_lists_it_among_them():
    from types import SimpleNamespace

    from distdiff.data.ingest.source import layer_names

    assert layer_names(SimpleNamespace(layers={None: 0, "counts": 1})) == ["counts"]
