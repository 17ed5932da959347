"""Protocol ``generate`` of a grid: right scores on cells of a known law, rows that draw cells and rows that cannot."""

from __future__ import annotations

from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from distdiff import grid
from distdiff.data import toy
from distdiff.data.store.store import CountStore
from distdiff.grid import made
from distdiff.grid.generate import Real, _by_type, _ours, _peer, compared
from distdiff.grid.spec import Ours, Peer, read

TINY = ["train.cells=256", "denoiser.width=8", "train.eval_cells=128", "train.checkpoint_cells=128"]


def cells(n: int, seed: int, mean=(0.2, 1.0, 4.0, 9.0), spread: float = 0.7) -> sp.csr_matrix:
    """Counts whose genes rise and fall together."""
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(rng.lognormal(0, spread, (n, 1)) * np.array(mean)).astype(np.float32))


def real(n: int = 400, **options) -> Real:
    codes = np.arange(n) % 2
    return Real(cells(n, 0, **options), codes, cells(n, 1, **options), codes, seed=0)


def test_the_test_cells_themselves_have_no_error():
    found = compared(real().test, real(), few=5)
    for name in ("mean", "variance", "zeros", "swd", "correlation"):
        assert found[f"generate_{name}"][0] == pytest.approx(0, abs=1e-6)
    for name in ("depth", "depth_sd", "nearest"):
        assert found[f"generate_{name}"][0] == pytest.approx(1)
    assert found["generate_energy"][0] <= 0  # without bias, and copies are nearer than other cells of the law


def test_what_is_wrong_shows_in_its_own_score():
    truth = real()
    good = compared(cells(400, 2), truth, few=20)
    double = compared(cells(400, 2, mean=(0.4, 2.0, 8.0, 18.0)), truth, few=20)
    alone = compared(cells(400, 2, spread=0.0), truth, few=20)
    assert double["generate_depth"][0] == pytest.approx(2, rel=0.2)
    expected = np.log1p(2 * np.array([0.2, 1, 4, 9]) * np.exp(0.245)) - np.log1p(
        np.array([0.2, 1, 4, 9]) * np.exp(0.245)
    )
    assert double["generate_mean"][0] == pytest.approx(expected.mean(), abs=0.1)
    for name, worse in (("energy", double), ("swd", double), ("energy", alone), ("correlation", alone)):
        gap = worse[f"generate_{name}"][0] - good[f"generate_{name}"][0]
        assert gap > 3 * max(good[f"generate_{name}"][1], worse[f"generate_{name}"][1]), name
    assert alone["generate_depth_sd"][0] < 0.6 < good["generate_depth_sd"][0]
    assert all(error > 0 for value, error in good.values())


def test_cells_of_another_type_are_not_recognised():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 100)
    rates = np.where(codes[:, None] == 0, [5.0, 0.5], [0.5, 5.0])
    truth = Real(*(part for _ in range(2) for part in (sp.csr_matrix(rng.poisson(rates).astype(np.float32)), codes)), 0)
    assert compared(truth.test, truth, few=3)["generate_recognised"][0] > 0.9
    assert compared(truth.test[::-1], truth, few=3)["generate_recognised"][0] < 0.1
    untyped = Real(truth.train, codes * 0 - 1, truth.test, codes * 0 - 1, seed=0)
    assert "generate_recognised" not in compared(truth.test, untyped, few=3)
    assert "generate_recognised" not in compared(truth.test, truth, few=3, asked=False)


@pytest.mark.parametrize("generator", ["resampled", "marginals", "nb", "poisson"])
def test_a_generator_keeps_types_and_means_and_sees_no_test_cell(generator):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, 600)
    rates = np.where(codes[:, None] == 0, [6.0, 0.5, 2.0], [0.5, 6.0, 2.0])
    train, test = (sp.csr_matrix(rng.poisson(rates).astype(np.float32)) for _ in range(2))
    drawn = _by_type(_peer(Peer(generator), Real(train, codes, test, codes, 0), 3), codes)
    other = _by_type(_peer(Peer(generator), Real(train, codes, test * 7, codes, 0), 3), codes)
    assert (drawn != other).nnz == 0
    assert (drawn.data % 1 == 0).all()
    for code in (0, 1):
        assert np.asarray(drawn[codes == code].mean(0)).ravel() == pytest.approx(rates[codes == code][0], rel=0.25)
    alone = _by_type(_peer(Peer(generator), Real(train, codes, test, codes, 0), 3), np.full(5, -1))
    assert alone.shape == (5, 3)  # cells without a type are drawn from all training cells


def test_only_resampled_cells_keep_what_ties_genes_together():
    truth, found = real(1000, mean=(0.2, 1.0, 4.0, 9.0, 2.0, 3.0, 5.0, 6.0)), {}
    for generator in ("resampled", "marginals", "nb", "poisson"):
        found[generator] = compared(_by_type(_peer(Peer(generator), truth, 0), truth.wanted), truth, few=10)
    tied = {name: scores["generate_correlation"][0] for name, scores in found.items()}
    assert 3 * tied["resampled"] < min(tied["marginals"], tied["nb"], tied["poisson"])
    variance = {name: scores["generate_variance"][0] for name, scores in found.items()}
    assert 3 * max(variance["nb"], variance["marginals"]) < variance["poisson"]
    assert found["resampled"]["generate_nearest"][0] == 0


def test_the_cells_of_a_model_get_the_labels_of_the_test_cells(atlas):
    store = CountStore.open(str(atlas))
    rows = store.rows("test")[:6]
    codes, asked = store.labels(rows, ["cell_type"])["cell_type"].copy(), []
    codes[2] = -1

    def generate(n, obs, **options):
        asked.append((n, obs, options))
        whole = np.tile(np.arange(len(store.genes))[::-1], (n, 1)) + 100 * len(asked)
        return anndata.AnnData(sp.csr_matrix(whole.astype(np.float32)))

    spec = SimpleNamespace(genes=tuple(store.genes)[::-1], labels={"cell_type": (), "donor": ()})
    fake = SimpleNamespace(genes=store.genes, manifest=store.manifest, labels=lambda rows, labels: {"cell_type": codes})
    options = Ours(train="quick", steps=3, guidance=2.0, attrition=0.1, depth="free")
    found = _ours(SimpleNamespace(spec=spec, generate=generate), options, fake, rows, seed=5).toarray()
    names = [store.manifest.labels["cell_type"][code] for code in codes if code >= 0]
    walk = {"guidance": 2.0, "seed": 5, "steps": 3, "depth": "free", "sigma": ("rescale", 0.1)}
    assert asked == [(5, {"cell_type": names}, walk), (1, {}, walk)]
    assert found[:, 0].tolist() == [100, 100, 200, 100, 100, 100]  # genes in the store's order, cells in the rows'
    with pytest.raises(ValueError, match="does not know 30 of the 30 genes"):
        _ours(SimpleNamespace(spec=SimpleNamespace(genes=(), labels={})), options, fake, rows, seed=5)


def test_rows_draw_cells_or_say_why_not(atlas, tmp_path):
    small = {"steps": 4, "batch": 8, "width": 8, "depth": 1, "heads": 2, "walk": 3}
    rows = [
        {"generator": "resampled"}, {"generator": "poisson"},
        {"train": "quick", "settings": [*TINY, "data.labels=[cell_type]"], "steps": 2},
        {"kind": "countsdiff", "key": "cell_type", **small}, {"kind": "blackout", **small}, {"kind": "mdlm", **small},
        {"kind": "ridge"}, {"kind": "scidpms", **small},
    ]  # fmt: skip
    spec = {
        "rows": rows, "resamples": [4, 4], "draws": 2, "answers": ["1 draw"], "cell_type": "cell_type", "cells": 30,
        "protocols": [{"protocol": "generate"}, {"protocol": "mcar"}],
    }  # fmt: skip
    spec["rows"] = [{**row, "name": row.get("name", str(i))} for i, row in enumerate(rows)]
    result = grid.run(spec, tmp_path, data=[str(atlas)], progress=False)
    drawn = result.table[result.table.protocol == "generate"]
    status = drawn.drop_duplicates("row").set_index("row").status.to_dict()
    assert status == dict.fromkeys("012345", "done") | {"6": "cannot", "7": "cannot"}, drawn.reason.unique()
    filled = result.table[result.table.protocol != "generate"].drop_duplicates("row").set_index("row")
    assert filled.status.to_dict() == {"0": "cannot", "1": "cannot"} | dict.fromkeys("234567", "done")
    assert "its protocol is generate" in filled.reason["0"]
    scores = drawn[drawn.status == "done"]
    assert set(scores.answer) == {"cells"}
    assert scores.groupby("row").metric.nunique().to_dict() == dict.fromkeys("0123", 10) | {"4": 9, "5": 9}
    assert set(scores[scores.metric == "generate_recognised"].row) == set("0123")  # the others are told no type
    assert np.isfinite(scores.value).all()
    assert (scores[scores.row.isin(list("2345"))].capacity > 100).all()
    assert (scores[scores.row == "0"].note == "control").all()
    energy = scores[scores.metric == "generate_energy"].set_index("row").value
    assert energy["0"] < energy["2"]  # real cells against those of a network that has hardly learned
    assert "| 6 | cannot |" in result.markdown
    assert "ridge fills entries of cells that are there" in result.markdown
    assert "The classifier recognises" in result.markdown
    assert (tmp_path / "generate_energy.png").stat().st_size > 5000
    assert any(claim.startswith("atlas, generate, energy dist. of the cells: ") for claim in result.claims)


def test_scvi_is_absent_or_draws(atlas, tmp_path):
    spec = {"rows": [{"generator": "scvi"}], "protocols": [{"protocol": "generate"}], "resamples": [2, 2], "cells": 10}
    try:
        import scvi  # noqa: F401
    except ImportError:
        table = grid.run(spec, tmp_path, data=[str(atlas)], progress=False).table
        assert table.status.item() == "absent"
        assert "pip install 'distdiff[baselines]'" in table.reason.item()


def test_toy_and_digits_are_made_once(tmp_path):
    for name, shape, splits in (("toy", 10, {"train": 0.7, "test": 0.2}), ("digits", 64, {"train": 0.6, "test": 0.35})):
        store = made.opened(name, 0, tmp_path)
        assert len(store.genes) == shape
        for split, share in splits.items():
            assert len(store.rows(split)) / store.manifest.n_cells == pytest.approx(share, abs=0.01)
        stamp = (tmp_path / f"{name}-0.zarr").stat().st_mtime_ns
        assert made.opened(name, 0, tmp_path).manifest.fingerprint == store.manifest.fingerprint
        assert (tmp_path / f"{name}-0.zarr").stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob("*.h5ad"))
    found = read({"data": {"d": {"made": "digits"}}, "rows": [{"kind": "zero"}], "protocols": [{"protocol": "mcar"}]})
    assert found.data["d"].cell_type == "label"


def test_the_toy_has_its_exact_moments():
    drawn = toy.samples(40_000, seed=1).X.toarray()
    mean, variance = toy.exact_moments()
    assert drawn.mean(0) == pytest.approx(mean, rel=0.04)
    assert drawn.var(0) == pytest.approx(variance, rel=0.15)
    assert np.corrcoef(drawn.T)[7, 1] > 0.3  # one size factor for all dimensions
    with pytest.raises(ValueError, match="n=0 samples"):
        toy.samples(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"a": {"made": "toys"}}}, "did you mean 'toy'"),
        ({"data": {"a": {"made": "toy", "splat": "splat30"}}}, "either store, splat or made"),
        ({"rows": [{"generator": "nbb"}]}, "did you mean 'nb'"),
        ({"rows": [{"generator": "nb", "kind": "zero"}]}, "unknown key 'kind'"),
        ({"rows": [{"kind": "zero", "ours": True}]}, "ours is of rows with model or train"),
        ({"rows": [{"train": "quick", "ours": "no way"}]}, "ours must be true or false"),
        ({"rows": [{"train": "quick", "attrition": 2.0}]}, "attrition must lie between 0 and 1"),
        ({"data": {"a": {"made": "toy"}}, "protocols": [{"protocol": "dropout"}]}, "simulated sets"),
    ],
)
def test_what_is_refused(change, said):
    whole = {"data": {"a": {"made": "toy"}}, "rows": [{"kind": "zero"}], "protocols": [{"protocol": "generate"}]}
    with pytest.raises(ValueError, match=said):
        read({**whole, **change})


@pytest.mark.parametrize("name", ["toy", "digits"])
def test_shipped_grids_draw_by_our_rows_and_by_others(name):
    found = read(name)
    assert [protocol.protocol for protocol in found.protocols] == ["generate"]
    ours = {line.name for line in found.rows if line.ours}
    assert ours
    assert all(row.startswith("distdiff") for row in ours)
    assert {"Gaussian (DDPM)", "masked (MDLM)"} <= {line.name for line in found.rows if not line.ours}


def test_a_folder_of_results_hides_no_grid_and_no_config(atlas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "quick"):  # as --out toy leaves it
        (tmp_path / name).mkdir()
    assert read("toy").data["toy"].made == "toy"
    spec = {"rows": [{"train": "quick", "settings": TINY}], "protocols": [{"protocol": "generate"}]}
    result = grid.run({**spec, "cells": 10, "resamples": [2, 2]}, "out", data=[str(atlas)], progress=False)
    assert set(result.table.status) == {"done"}, result.table.reason.unique()
