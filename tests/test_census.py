from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from distdiff.data.ingest.source import Source
from tests.scripts import loaded

RECIPE = Path(__file__).parents[1] / "data_prep" / "census.py"


@pytest.fixture(scope="module")
def census():
    return loaded(RECIPE)


@pytest.fixture(scope="module")
def cells():
    x = np.random.default_rng(0).poisson(0.6, (57, 9)).astype(np.float32)
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(["T", "B", "NK"] * 19), "donor_id": [f"d{i % 4}" for i in range(57)]},
        index=[f"c{i}" for i in range(57)],
    )
    ids = [f"ENSG{i}" for i in range(9)]
    var = pd.DataFrame({"feature_id": ids, "feature_name": [f"g{i // 2}" for i in range(9)]}, index=ids)
    return ad.AnnData(sparse.csr_matrix(x), obs=obs, var=var)


@pytest.fixture(scope="module")
def soma(cells, tmp_path_factory):
    """A tiny local experiment laid out as the Census lays out its own."""
    pytest.importorskip("tiledbsoma", reason="the recipe for SOMA experiments needs: pip install tiledbsoma")
    import tiledbsoma.io

    uri = str(tmp_path_factory.mktemp("soma") / "experiment")
    tiledbsoma.io.from_anndata(uri, cells.copy(), measurement_name="RNA", X_layer_name="raw")
    return uri


def pieces(folder):
    return [Source.open(p) for p in sorted(folder.glob("*.h5ad"))]


@pytest.mark.filterwarnings("ignore")
def test_a_query_becomes_pieces(census, soma, cells, tmp_path, capsys):
    arguments = [str(tmp_path / "t"), "--soma", soma, "--filter", "cell_type != 'B'", "--columns", "cell_type,donor_id"]
    census.main([*arguments, "--cells-per-file", "15"])
    assert "3 files; next: distdiff shard" in capsys.readouterr().out
    want = np.flatnonzero(cells.obs["cell_type"] != "B")
    sources = pieces(tmp_path / "t")
    assert [s.n_cells for s in sources] == [15, 15, 8]
    assert {s.genes for s in sources} == {tuple(cells.var["feature_id"])}
    assert [int(n) for s in sources for n in s.obs_names] == want.tolist()
    assert [k for s in sources for k in s.obs("donor_id")] == cells.obs["donor_id"].iloc[want].tolist()
    np.testing.assert_array_equal(np.vstack([s.read(0, s.n_cells).toarray() for s in sources]), cells.X[want].toarray())


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_query_goes_on_and_another_is_refused(census, soma, tmp_path):
    arguments = [str(tmp_path / "t"), "--soma", soma, "--cells-per-file", "20", "--genes", "feature_name"]
    census.main(arguments)
    assert pieces(tmp_path / "t")[0].genes[:3] == ("g0", "g0-1", "g1")
    files = sorted((tmp_path / "t").glob("*.h5ad"))
    before = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    census.main(arguments)
    assert [f.stat().st_mtime_ns == b for f, b in zip(files, before, strict=True)] == [True, False, True]
    assert sum(s.n_cells for s in pieces(tmp_path / "t")) == 57
    other = [*arguments, "--filter", "cell_type == 'B'"]
    with pytest.raises(SystemExit, match="holds the cells of another query; give --overwrite"):
        census.main(other)
    census.main([*other, "--overwrite"])
    assert sum(s.n_cells for s in pieces(tmp_path / "t")) == 19


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--filter", "celltype == 'B'"], "--filter \"celltype == 'B'\" is not understood"),
        (["--filter", "cell_type == "], "is not understood"),
        (["--filter", "cell_type == 'X'"], "chooses no cell"),
        (["--columns", "cell_tpe"], r"no column of obs \(--columns\) 'cell_tpe'; known: cell_type, donor_id"),
        (["--genes", "symbol"], r"no column of var \(--genes\) 'symbol'; known: feature_id, feature_name"),
        (["--layer", "normalized"], "'normalized'; known: raw"),
        (["--cells-per-file", "0"], "give 1 or more"),
    ],
)
def test_what_is_asked_wrongly(census, soma, tmp_path, options, said):
    with pytest.raises(SystemExit, match=said):
        census.main([str(tmp_path / "t"), "--soma", soma, *options])
    assert not (tmp_path / "t").exists()


def test_no_experiment_there(census, soma, tmp_path):
    with pytest.raises(SystemExit, match="is no SOMA experiment"):
        census.main([str(tmp_path / "t"), "--soma", str(tmp_path / "nothing")])


def test_without_the_packages_it_says_what_to_install(census, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(SystemExit, match=r"pip install cellxgene-census.*give those straight to `distdiff shard`"):
        census.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="pip install tiledbsoma"):
        census.main([str(tmp_path), "--soma", "x"])


def test_a_download_that_fails_says_how_else(census, tmp_path, monkeypatch):
    class Offline:
        @staticmethod
        def open_soma(census_version):
            raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "cellxgene_census", Offline)
    with pytest.raises(SystemExit, match=r"version 'stable', cannot be opened \(no route to host\).*--soma PATH"):
        census.main([str(tmp_path)])
