"""What the pictures of distdiff.pl show: titles and plotted numbers, on Agg."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib import pyplot
from matplotlib.figure import Figure

from distdiff import metrics, pl
from distdiff.pl import canvas, cells, genes, layers, training
from distdiff.report import Report, Row
from distdiff.rng import numpy_generator

matplotlib.use("Agg")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def _adata(n=60, g=12, seed=0, draws=3):
    """Counts of three groups, each with a gene of its own, and the layers that distdiff writes."""
    rng = np.random.default_rng(seed)
    group = np.arange(n) % 3
    rate = rng.gamma(2.0, 1.0, g) + 12 * (np.arange(g) == group[:, None])
    x = rng.poisson(rate).astype(np.float32)
    split = np.where(np.arange(n) < n // 2, "train", "test")
    obs = pd.DataFrame(
        {"type": pd.Categorical(np.array(["B", "T", "NK"])[group]), "split": split},
        index=[f"c{i}" for i in range(n)],
    )  # fmt: skip
    a = AnnData(sp.csr_matrix(x), obs, pd.DataFrame(index=[f"g{i}" for i in range(g)]))
    a.layers["denoised"] = rate.astype(np.float32)
    a.layers["imputed_mean"] = rate.astype(np.float32)
    a.layers["imputed"] = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    for i in range(2, draws + 1):
        a.layers[f"imputed_draw{i}"] = rng.poisson(rate).astype(np.float32)
    return a


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 3.0, (40, 30)).astype(np.float32)
    truth = rng.poisson(rate).astype(np.float32)
    targets = rng.random(truth.shape) < 0.5
    return truth, targets, rate, rng.poisson(rate, (3, *rate.shape)).astype(np.float32)


def _report(made, rows=()):
    truth, targets, mean, draws = made
    setting = {"store": "atlas.zarr", "targets": int(targets.sum()), "cells": len(truth), "draws": len(draws)}
    return Report(list(rows), setting, truth, targets, mean, draws)


def _table(n=40):
    rng = np.random.default_rng(0)
    found = rng.uniform(-0.1, 0.9, n)
    verdict = np.array(["reliable", "weak", "not reliable", "unknown"])[np.arange(n) % 4]
    return pd.DataFrame(
        {"correlation": found, "correlation_low": found - 0.1, "correlation_high": found + 0.1, "reliability": verdict,
         "mean": rng.gamma(1.0, 1.0, n), "ceiling": 0.95},
        index=[f"g{i}" for i in range(n)],
    )  # fmt: skip


def _row(name, crps, calls, energy=0.5, note=""):
    return Row(name, {"crps": crps, "energy": energy}, {"crps": 0.01, "energy": 0.3}, {}, note, calls)


def _title(axes):
    figure = (axes[0] if isinstance(axes, list) else axes).figure
    return figure.get_suptitle()


# -- scanpy's manner ------------------------------------------------------------------------------------------------


EVERY = {
    "umap": (lambda a, r, **k: pl.umap(a, color="type", **k), 2),
    "dotplot": (lambda a, r, **k: pl.dotplot(a, groupby="type", **k), 2),
    "violin": (lambda a, r, **k: pl.violin(a, ["g0", "g1", "g2"], "type", **k), 3),
    "scatter": (lambda a, r, **k: pl.scatter(a, "g0", "g1", **k), 2),
    "depth": (lambda a, r, **k: pl.depth(a, a, **k), 2),
    "calibration": (lambda a, r, **k: pl.calibration(r, **k), 3),
    "score_by_calls": (lambda a, r, **k: pl.score_by_calls(r, **k), 2),
    "panel": (lambda a, r, **k: pl.panel(_table(), **k), 2),
    "training_curve": (lambda a, r, **k: pl.training_curve([{"cells": 8, "loss": 1.0, "val/deviance": 1.0}], **k), 1),
}


@pytest.fixture
def drawn(made, monkeypatch):
    monkeypatch.setattr(cells, "_embed", lambda matrices, seed: np.random.default_rng(seed).random(
        (sum(m.shape[0] for m in matrices), 2)))  # fmt: skip
    return _adata(), _report(made, [_row("distdiff 3 draws", 0.4, 1), _row("distdiff 1 draw", 0.6, 1)])


def test_the_table_above_names_every_plot():
    assert sorted(EVERY) == sorted(pl.__all__)


@pytest.mark.parametrize("name", EVERY)
def test_show_save_and_ax(name, drawn, tmp_path, monkeypatch):
    draw, n = EVERY[name]
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(True))
    axes = draw(*drawn, show=False)
    assert len(np.ravel([axes])) == n
    assert not shown
    assert draw(*drawn) is None
    assert shown == [True]  # by default it is shown
    pyplot.close("all")

    path = tmp_path / "deep" / "figure.png"
    axes = draw(*drawn, save=path)
    assert path.read_bytes()[:8] == PNG
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]
    assert len(shown) == 1  # a saved figure is not shown
    assert not pyplot.get_fignums()  # and is none of pyplot's
    first = path.read_bytes()
    draw(*drawn, save=path)
    assert path.read_bytes() == first  # same numbers, same picture

    mine = list(np.ravel(Figure().subplots(1, n, squeeze=False)))
    again = draw(*drawn, ax=mine if n > 1 else mine[0])
    assert list(np.ravel([again])) == mine
    assert mine[0].has_data()
    assert mine[0].get_title()  # a title stands in the caller's axes too
    assert len(shown) == 1
    with pytest.raises(ValueError, match=f"{n + 1} axes, and this plot has {n} panel"):
        draw(*drawn, ax=[*mine, mine[0]])
    with pytest.raises(ValueError, match="suffix must be one of"):
        draw(*drawn, save=tmp_path / "figure.h5ad")
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize("name", EVERY)
def test_titles_carry_n_and_the_name_of_the_data(name, drawn):
    draw, n = EVERY[name]
    axes = draw(*drawn, name="PBMC 68k", show=False)
    title = _title(axes) if n > 1 else axes.get_title()
    assert "PBMC 68k" in title
    hidden = f"n = {int(drawn[1].targets.sum()):,} hidden"
    count = {"calibration": hidden, "score_by_calls": hidden, "training_curve": "n = 1", "panel": "n = 40"}.get(
        name, "n = 60"
    )
    assert count in title


def test_importing_distdiff_imports_no_plotting_library():
    code = "import sys, distdiff, distdiff.pl; sys.exit(bool({'matplotlib', 'scanpy', 'anndata'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_picture_that_fails_leaves_the_older_one(made, tmp_path, monkeypatch):
    path = tmp_path / "cal.png"
    path.write_bytes(b"older")
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pl.calibration(_report(made), save=path)
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["cal.png"]


def test_marks_are_distinct():
    for n in (1, 10, 25, 60):
        assert len(set(canvas.marks(n))) == n
    assert len(canvas.marks(75)) == 75


# -- training -------------------------------------------------------------------------------------------------------


def test_training_curve():
    history = [{"cells": 64 * i, "loss": 3 / i, "val/deviance": abs(i - 5) + 1.0, "val/loss": 9.0} for i in range(1, 9)]
    axes = pl.training_curve(history, name="atlas.zarr", show=False)
    twin = next(a for a in axes.figure.axes if a is not axes)
    assert "n = 1 validation, 64 cells" in pl.training_curve(history[:1], show=False).get_title()
    assert list(axes.lines[0].get_ydata()) == [h["loss"] for h in history]
    assert list(twin.lines[0].get_ydata()) == [h["val/deviance"] for h in history]
    assert twin.lines[1].get_xdata() == 64 * 5  # the ring is around the best
    assert axes.get_title() == "Training on atlas.zarr: n = 8 validations, 512 cells seen"
    assert (
        pl.training_curve(history, judge="val/loss", show=False)
        .figure.axes[1]
        .get_ylabel()
        .startswith("loss of held-out")
    )


def test_training_curve_of_a_model_is_that_of_its_history():
    history = [{"cells": i, "loss": 1.0 / i, "val/loss": 2.0 / i, "lr": 0.1} for i in (8, 16)]
    kept = training.kept(history, "val/loss")
    trained = SimpleNamespace(info={"store": "atlas.zarr", "judge": "val/loss", "history": kept})
    axes = pl.training_curve(trained, show=False)
    assert list(axes.figure.axes[1].lines[0].get_ydata()) == [0.25, 0.125]
    assert "atlas.zarr" in axes.get_title()
    trained.info = {}
    with pytest.raises(ValueError, match="no validation to draw"):
        pl.training_curve(trained, show=False)


@pytest.mark.parametrize("n", [1, 999, 1000, 1001, 4321])
def test_a_model_keeps_few_points_of_its_curve_and_always_the_best_and_last(n):
    history = [{"cells": i, "loss": 1.0, "val/deviance": 1.0 if i != n // 3 else 0.5} for i in range(n)]
    kept = training.kept(history, "val/deviance")
    assert len(kept["cells"]) <= training.POINTS + 1
    assert {n // 3, n - 1} <= set(kept["cells"])
    assert kept["cells"] == sorted(set(kept["cells"]))


# -- cells ----------------------------------------------------------------------------------------------------------


def _at(axes):
    """Points of a panel above the ghost of all panels."""
    return np.concatenate([c.get_offsets() for c in axes.collections[1:]])


@pytest.mark.parametrize(("n", "most"), [(30, 3000), (301, 100)])
def test_umap_draws_each_cell_once_a_panel(n, most, monkeypatch):
    seen = []

    def embed(matrices, seed):
        seen.append(matrices)
        return np.stack([np.arange(sum(m.shape[0] for m in matrices))] * 2, 1).astype(float)

    monkeypatch.setattr(cells, "_embed", embed)
    a = _adata(n)
    axes = pl.umap(a, layers={"true": None, "drawn": "imputed", "rate": "denoised"}, color="type", training="split",
                   max_cells=most, name="x", show=False)  # fmt: skip
    rows = layers.thinned(a, most)
    k = len(rows)
    assert k == min(n, most)
    assert (np.diff(rows) > 0).all()
    assert (seen[0][0].toarray() == a.X.toarray()[rows]).all()
    assert (seen[0][2] == a.layers["denoised"][rows]).all()
    for i, panel in enumerate(axes):
        assert sorted(_at(panel)[:, 0]) == list(range(i * k, (i + 1) * k))
    assert [panel.get_title() for panel in axes] == ["true", "drawn", "rate"]
    of = "" if k == n else f" of {n:,}"
    assert _title(axes) == f"x: n = {k}{of} cells; {(rows >= n // 2).sum()} held out"
    named = {text.get_text() for text in axes[0].figure.legends[0].texts}
    assert named == {"B", "T", "NK", "training cell", "held-out cell", "cells of the other panels"}
    held = [c for c in axes[0].collections[1:] if len(c.get_linewidths()) and c.get_linewidths()[0] > 0]
    assert sum(len(c.get_offsets()) for c in held) == (rows >= n // 2).sum()  # a dark edge


@pytest.mark.parametrize("values", [[None, "a"], [1.5, 2.5], [True, False], [f"t{i}" for i in range(40)]])
def test_umap_colours(values, monkeypatch):
    monkeypatch.setattr(cells, "_embed", lambda m, seed: np.zeros((sum(x.shape[0] for x in m), 2)))
    a = _adata(80)
    a.obs["value"] = [values[i % len(values)] for i in range(80)]
    axes = pl.umap(a, color="value", show=False)
    assert all(len(_at(panel)) == 80 for panel in axes)
    legends = axes[0].figure.legends
    words = {t.get_text() for t in legends[0].texts} if legends else set()
    assert {None: {"unlabelled", "a"}, True: {"True", "False"}}.get(values[0], set()) <= words
    assert "t0" not in words  # too many to name
    if values[0] == 1.5:
        assert axes[0].figure.axes[-1].get_ylabel() == "value"  # a colour bar


def test_the_embedding_is_joint_and_repeats():
    a = _adata(40)
    both = [a.X, a.layers["imputed_mean"]]
    place = cells._embed(both, 0)
    assert place.shape == (80, 2)
    assert np.isfinite(place).all()
    assert (place == cells._embed([sp.csr_matrix(m) for m in both], 0)).all()


def test_depth_compares_the_genes_that_both_have():
    real, generated = _adata(50), _adata(30, seed=1)[:, ::-1][:, :9].copy()
    axes = pl.depth(real, generated, name="x", show=False)
    assert _title(axes) == "x: n = 50 real and 30 generated cells, 9 genes"
    shared = generated.var_names
    medians = [np.median(np.asarray(a[:, shared].X.sum(1))) for a in (real, generated)]
    assert [float(line.get_xdata()[0]) for line in axes[0].lines[:4:2]] == pytest.approx(medians)
    texts = [t.get_text() for t in axes[0].get_legend().texts]
    assert texts == [f"real, n = 50, median {medians[0]:,.0f}", f"generated, n = 30, median {medians[1]:,.0f}"]
    for patch in axes[0].patches + axes[1].patches:
        assert patch.get_data().values.sum() == pytest.approx(1)  # no cell is outside
    generated.X = sp.csr_matrix(generated.shape, dtype=np.float32)
    assert pl.depth(real, generated, show=False)  # cells of nothing
    generated.var_names = [f"h{i}" for i in range(9)]
    with pytest.raises(ValueError, match="share 0 genes"):
        pl.depth(real, generated)


# -- genes ----------------------------------------------------------------------------------------------------------


def _log(a, layer, gene):
    x = a.X if layer is None else a.layers[layer]
    x = x.toarray() if sp.issparse(x) else np.asarray(x)
    return np.log1p(x[:, a.var_names.get_loc(gene)] / x.sum(1) * 1e4)


@pytest.mark.parametrize("n", [60, 601])
def test_dotplot_shows_means_and_shares(n):
    a = _adata(n)
    names = ["g5", "g0", "g1"]
    axes = pl.dotplot(a, names, "type", layers=[None, "imputed", "denoised"], show=False)
    groups = list(a.obs["type"].cat.categories)
    means = {k: np.array([[_log(a, k, g)[a.obs["type"] == t].mean() for g in names] for t in groups])
             for k in (None, "imputed", "denoised")}  # fmt: skip
    top = np.max([m.max(0) for m in means.values()], 0)
    for panel, layer in zip(axes, (None, "imputed", "denoised"), strict=True):
        dots = panel.collections[0]
        assert np.allclose(dots.get_array(), (means[layer] / top).ravel(), atol=1e-5)
        x = np.asarray(
            a.X.todense() if layer is None else a.layers[layer].todense() if layer == "imputed" else a.layers[layer]
        )
        x = x[:, a.var_names.get_indexer(names)]
        share = 1 - np.exp(-x) if layer == "denoised" else x > 0
        share = np.array([share[a.obs["type"] == t].mean(0) for t in groups])
        assert np.allclose(dots.get_sizes(), genes.DOT * share.ravel(), rtol=1e-5)
        assert [t.get_text() for t in panel.get_xticklabels()] == names
    assert [t.get_text() for t in axes[0].get_yticklabels()] == [
        f"{t} (n = {(a.obs['type'] == t).sum()})" for t in ("B", "NK", "T")
    ]
    assert [p.get_title() for p in axes] == ["counts as given", "imputed (one draw)", "denoised (posterior mean)"]


def test_markers_are_the_groups_own_genes():
    a = _adata(90)
    assert genes.markers(a, "type", n=1) == ["g0", "g2", "g1"]  # of B, NK, T
    a.obs["type"] = a.obs["type"].astype(object)
    a.obs.loc["c0", "type"] = "alone"
    a.obs.loc["c1", "type"] = None
    assert set(genes.markers(a, "type", n=1)) == {"g0", "g1", "g2"}
    assert len(pl.dotplot(a, groupby="type", show=False)[0].get_yticklabels()) == 5  # alone and unlabelled too
    a.obs["one"] = "same"
    with pytest.raises(ValueError, match="two groups"):
        pl.dotplot(a, groupby="one")


def test_genes_that_were_not_measured_are_no_zeros():
    a = _adata()
    a.var["distdiff_added"] = [name in ("g1", "g3") for name in a.var_names]
    before, after = pl.dotplot(a, ["g0", "g1"], "type", show=False)
    assert len(before.collections[0].get_offsets()) == 3
    assert len(after.collections[0].get_offsets()) == 6
    assert [len(x.collections) for x in pl.violin(a, ["g0", "g1"], "type", show=False)] == [8, 4]  # bodies and bars
    before, after = pl.scatter(a, "g0", "g1", show=False)
    assert [t.get_text() for t in before.texts] == ["not measured"]
    assert len(after.collections[0].get_offsets()) == 60


def test_violins_carry_the_mean_and_rubins_interval():
    a = _adata(60, draws=3)
    axes = pl.violin(a, "g4", "type", show=False)
    draws = ["imputed", "imputed_draw2", "imputed_draw3"]
    bars = axes.containers[1]  # of the second layer
    for g, t in enumerate(a.obs["type"].cat.categories):
        part = (a.obs["type"] == t).to_numpy()
        means = [_log(a, d, "g4")[part].mean() for d in draws]
        within = np.mean([_log(a, d, "g4")[part].var(ddof=1) / part.sum() for d in draws])
        error = np.sqrt(within + (1 + 1 / 3) * np.var(means, ddof=1))
        low, high = bars[2][0].get_segments()[g][:, 1]
        assert (low + high) / 2 == pytest.approx(np.mean(means), rel=1e-4)
        assert (high - low) / 2 == pytest.approx(2 * error, rel=1e-3)
    words = [t.get_text() for t in axes.figure.legends[0].texts]
    assert words == ["counts as given", "imputed (one draw)", "group mean, 2 s.e. (3 draws, Rubin's rules)"]


def test_violins_of_few_cells_are_the_cells_and_one_has_no_interval():
    a = _adata(60)
    a.obs["type"] = np.where(np.arange(60) == 7, "one", np.where(np.arange(60) < 6, "few", "many"))
    axes = pl.violin(a, ["g0"], "type", layers=[None], show=False)
    points = [c.get_offsets() for c in axes.collections if len(c.get_offsets()) in (1, 6)]
    x = _log(a, None, "g0")
    assert sorted(points[0][:, 1]) == pytest.approx(sorted(x[:6]))
    assert points[1][:, 1] == pytest.approx(x[7])
    few, many, one = axes.containers[0][2][0].get_segments()
    assert np.isfinite(few).all()
    assert np.isfinite(many).all()
    assert not np.isfinite(one).any()  # no bar


def test_violins_carry_the_quantiles_of_one_cell():
    a = _adata()
    a.layers["imputed_q5"], a.layers["imputed_q95"] = a.layers["imputed_mean"] * 0.5, a.layers["imputed_mean"] * 2
    axes = pl.violin(a, ["g0"], "type", layers=[None, "imputed_mean"], show=False)
    depth = a.layers["imputed_mean"].sum(1)
    part = (a.obs["type"] == "B").to_numpy()
    low = np.log1p(a.layers["imputed_q5"][part, 0] / depth[part] * 1e4).mean()
    ends = [s[:, 1] for c in axes.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert any(end[0] == pytest.approx(low, rel=1e-5) for end in ends)
    assert "5 % to 95 % of one cell" in [t.get_text() for t in axes.figure.legends[0].texts]


def test_scatter_shows_cells_and_their_rank_correlation():
    a = _adata()
    before, after = pl.scatter(a, "g0", "g1", layers=[None, "denoised"], show=False)
    for panel, layer in ((before, None), (after, "denoised")):
        x, y = _log(a, layer, "g0"), _log(a, layer, "g1")
        assert np.allclose(panel.collections[0].get_offsets(), np.stack((x, y), 1), atol=1e-5)
        rho = pd.Series(x).corr(pd.Series(y), method="spearman")
        assert f"rank correlation {rho:.2f}, {((x == 0) & (y == 0)).mean():.0%} at (0, 0)" in panel.get_title()
    a.X = sp.csr_matrix(a.X.toarray() * (np.arange(12) > 0))
    assert "rank correlation undefined" in pl.scatter(a, "g0", "g1", show=False)[0].get_title()


# -- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a: pl.umap(a, layers=["imputd"]), "no layer 'imputd'; did you mean 'imputed'"),
        (lambda a: pl.umap(a, color="typ"), "color='typ' is no column of obs; did you mean 'type'"),
        (lambda a: pl.umap(a, training="spli"), "training='spli' is no column"),
        (lambda a: pl.umap(a[:3].copy()), "at least 4 cells"),
        (lambda a: pl.umap(a, layers=[]), "at least one layer"),
        (lambda a: pl.umap(a, max_cells=0), "max_cells must be at least 1"),
        (lambda a: pl.dotplot(a, groupby="cell_type"), "groupby='cell_type' is no column"),
        (lambda a: pl.violin(a, ["CD3D"], "type"), "'CD3D' is no gene of this AnnData"),
        (lambda a: pl.scatter(a, "g0", "gx"), "y: 'gx' is no gene|x: 'gx' is no gene"),
        (lambda a: pl.scatter(AnnData(a.X, a.obs, a.var), "g0", "g1"), "none of the layers imputed, imputed_mean"),
    ],
)
def test_what_is_absent_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(_adata())


def test_backed_lazy_and_raw_counts_give_the_same_picture(tmp_path):
    import anndata

    a = _adata()
    a.raw = AnnData(a.X.copy(), a.obs, a.var)[:, ::-1].copy()
    a.write_h5ad(tmp_path / "a.h5ad")
    wanted = pl.scatter(a, "g0", "g1", max_cells=20, show=False)[0].collections[0].get_offsets()
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    drawn = pl.scatter(backed, "g0", "g1", max_cells=20, show=False)
    assert np.allclose(drawn[0].collections[0].get_offsets(), wanted)
    assert _title(drawn) == "a.h5ad: n = 20 of 60 cells"
    raw = pl.scatter(a, "g0", "g1", layers=["raw"], max_cells=20, show=False)
    assert np.allclose(raw.collections[0].get_offsets(), wanted)
    assert list(layers.chosen(a, None)) == ["counts as given", "imputed (one draw)"]


# -- laws -----------------------------------------------------------------------------------------------------------


def test_calibration_shows_pit_coverage_and_means(made):
    truth, targets, mean, draws = made
    pit_axes, coverage_axes, means_axes = axes = pl.calibration(_report(made), seed=3, show=False)
    assert _title(axes) == f"atlas.zarr: n = {targets.sum():,} hidden counts of 40 cells, 3 draws"
    u = metrics.pit(truth, targets, draws, numpy_generator(3, "pit"))
    assert np.allclose(pit_axes.patches[-1].get_data().values, np.histogram(u, 20, (0, 1))[0] / len(u) * 20)
    assert len(coverage_axes.lines) == 4  # the diagonal and three thirds
    x = means_axes.containers[0][0].get_xdata()
    order = np.sort(mean[targets])
    assert x[-1] == pytest.approx(np.array_split(order, 20)[-1].mean(), rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_calibration_of_an_imputer_with_one_answer(made, mean):
    truth, targets, _, draws = made
    report = _report((truth, targets, np.full_like(truth, mean), np.full_like(draws, mean)))
    assert len(pl.calibration(report, show=False)) == 3


def test_calibration_of_an_anndata_is_that_of_its_arrays(made):
    truth, targets, mean, draws = made
    a = AnnData(sp.csr_matrix(truth))
    a.layers.update({"imputed_mean": mean, "imputed": draws[0], "imputed_draw2": draws[1], "imputed_draw3": draws[2],
                 "hidden": sp.csr_matrix(targets)})  # fmt: skip
    mine = pl.calibration(a, mask="hidden", show=False)[0].patches[-1].get_data().values
    assert np.allclose(mine, pl.calibration(_report(made), show=False)[0].patches[-1].get_data().values)
    with pytest.raises(ValueError, match="mask is not given"):
        pl.calibration(a)
    with pytest.raises(ValueError, match="'hiden' is missing"):
        pl.calibration(a, mask="hiden")
    a.layers["hidden"] = np.zeros(a.shape, dtype=bool)
    with pytest.raises(ValueError, match="no count was hidden"):
        pl.calibration(a, mask="hidden")
    report = _report(made)
    report.draws = None
    with pytest.raises(ValueError, match="no draws"):
        pl.calibration(report)


def test_score_by_calls_draws_each_method_and_the_best_rival(made):
    rows = [
        _row("distdiff mean", 9.0, 1), _row("distdiff 3 draws", 0.40, 1), _row("distdiff, 8 calls 3 draws", 0.35, 8),
        _row("distdiff 1 draw", 0.7, 1, 0.1), _row("distdiff, 8 calls 1 draw", 0.7, 8, 0.2),
        _row("RePaint, same network 3 draws", 0.5, 100), _row("kNN pool 3 draws", 0.45, 0),
        _row("kNN pool 1 draw", 0.45, 0, 0.9), _row("perfect 3 draws", 0.0, 0, note="control"),
    ]  # fmt: skip
    crps, energy = axes = pl.score_by_calls(_report(made, rows), show=False)
    ours = next(c for c in crps.containers if c.get_label() == "distdiff")
    assert list(ours[0].get_xdata()) == [1, 8]
    assert list(ours[0].get_ydata()) == [0.40, 0.35]
    segment = ours[2][0].get_segments()[0][:, 1]
    assert list(segment) == pytest.approx([0.38, 0.42])
    rival = next(line for line in crps.lines if str(line.get_label()).startswith("kNN"))
    assert rival.get_label() == "kNN pool, no network"
    assert set(rival.get_ydata()) == {0.45}
    one = energy.containers[0]
    assert list(one[0].get_ydata()) == [0.1, 0.2]
    assert one[2][0].get_segments()[0][0, 1] == 0  # no distance is below 0
    assert "atlas.zarr" in _title(axes)
    assert [t.get_text() for t in axes[0].figure.legends[0].texts] == [
        "kNN pool, no network", "distdiff", "RePaint, same network",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no row of this report"):
        pl.score_by_calls(_report(made, rows[-3:]))


def test_a_report_writes_both_pictures(made, tmp_path):
    values = dict.fromkeys(
        ("deviance", "log1p_mse", "rmse", "mae", "bias", "pearson", "spearman", "crps", "energy", "mmd", "swd",
         "correlation", "fit_seconds", "fill_seconds"), 0.5,
    )  # fmt: skip
    report = _report(made, [Row("distdiff 3 draws", values, {}, {}, "", 1)])
    report.setting |= {
        "data": "abc",
        "genes": 30,
        "protocol": "mcar",
        "rate": 0.5,
        "zeros_among_targets": 0.5,
        "seed": 0,
    }
    report.write(tmp_path / "evaluation")
    assert sorted(p.name for p in (tmp_path / "evaluation").iterdir()) == [
        "calibration.png", "score_by_calls.png", "table.json", "table.md",
    ]  # fmt: skip


# -- panel ------------------------------------------------------------------------------------------------------------


def test_panel_draws_genes_by_rank_with_their_verdict():
    table = _table()
    table.loc["g3", "correlation"] = np.nan  # shown by no cell
    ranked, expressed = pl.panel(table, show=False)
    points = {line.get_label(): line.get_xydata() for line in ranked.lines if "(" in line.get_label()}
    assert set(points) == {"reliable (10)", "weak (10)", "not reliable (10)", "unknown (9)"}
    drawn = np.concatenate(list(points.values()))
    drawn = drawn[np.argsort(drawn[:, 0])]
    assert np.allclose(drawn[:, 0], np.arange(1, 40))
    assert np.allclose(drawn[:, 1], np.sort(table["correlation"].dropna())[::-1])
    assert "most that Poisson counts allow" in expressed.get_legend().get_texts()[0].get_text()
