from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from distdiff import metrics
from distdiff.baselines import Baseline
from distdiff.baselines.gene_mean import GeneMean
from distdiff.data.store.store import CountStore
from distdiff.evaluation import Contestant, default_contestants, evaluate
from distdiff.imputers import Imputed, Imputer
from distdiff.report import COLUMNS, number


class Spy(Imputer):
    """Answer ones; remember what was shown."""

    def __init__(self, point: bool = False) -> None:
        self.point, self.shown = point, []

    def impute(self, cells, observed, *, draws=0, seed=0):
        self.shown.append((cells, observed))
        mean = torch.where(observed, cells.counts, 1.0)
        return Imputed(mean, mean.expand(draws, -1, -1) if draws and not self.point else None)


class Noisy(GeneMean):
    """The gene mean times a wrong factor, with a name of ours."""

    def rate(self, counts, observed, cells):
        return 3.0 * super().rate(counts, observed, cells)


@pytest.fixture(scope="module")
def store(atlas):
    return CountStore.open(atlas)


@pytest.fixture(scope="module")
def report(store):
    contestants = default_contestants("cell_type", extra=[Contestant("distdiff", Noisy(), ("mean", "1 draw", "draws"))])
    return evaluate(store, store.rows("all")[:60], contestants, draws=3, resamples=(40, 10), progress=False)


def _rows(report):
    return {row.name: row for row in report.rows}


def test_the_table_has_every_baseline_and_every_metric(report):
    names = list(_rows(report))
    assert names == [
        "distdiff mean", "distdiff 1 draw", "distdiff 3 draws", "kNN pool mean", "kNN pool 1 draw", "kNN pool 3 draws",
        "PCA regression", "ridge", "gene mean x depth", "gene mean", "cell-type mean x depth", "cell-type mean",
        "none (zero)", "constant 1", "perfect",
    ]  # fmt: skip
    table = report.table
    assert len(table) == len(names) * len(COLUMNS)
    assert list(table.columns) == ["imputer", "metric", "value", "error", "note"]
    assert set(table.query("note == 'control'").imputer) == {"none (zero)", "constant 1", "perfect"}
    assert set(table.query("note == 'peeks'").imputer) == {"cell-type mean", "cell-type mean x depth"}
    assert np.isfinite(table.query("metric not in ('pearson', 'spearman')").value).all()
    assert report.setting["targets"] == report.targets.sum()
    assert report.targets.mean() == pytest.approx(0.5, abs=0.05)


def test_the_controls_are_known_answers(report):
    rows, x, t = _rows(report), report.truth, report.targets
    perfect, nothing, one = rows["perfect"].values, rows["none (zero)"].values, rows["constant 1"].values
    assert perfect["deviance"] == pytest.approx(2e-6 * (x[t] == 0).mean())  # zeros meet the floor of the mean
    for metric in ("log1p_mse", "rmse", "mae", "bias", "crps", "energy", "mmd", "swd", "correlation"):
        assert perfect[metric] == pytest.approx(0, abs=1e-6), metric
    assert perfect["spearman"] == pytest.approx(1)
    assert nothing["bias"] == pytest.approx(-x[t].mean())
    assert nothing["mae"] == nothing["crps"] == pytest.approx(x[t].mean())
    assert np.isnan(nothing["spearman"])
    assert one["rmse"] == pytest.approx(np.sqrt(np.mean((x[t] - 1) ** 2)))


def test_the_rows_are_the_metrics_of_the_answers(report):
    rows, x, t = _rows(report), report.truth, report.targets
    n = t.sum()
    assert rows["distdiff mean"].values["deviance"] == pytest.approx(
        metrics.poisson_deviance(x, t, report.mean).sum() / n
    )
    assert rows["distdiff 1 draw"].values["crps"] == pytest.approx(np.abs(report.draws[0] - x)[t].mean())
    assert rows["distdiff 3 draws"].values["crps"] == pytest.approx(metrics.crps(x, t, report.draws).sum() / n)
    assert rows["distdiff 3 draws"].values["rmse"] == pytest.approx(
        np.sqrt(np.mean((report.draws.mean(0) - x)[t] ** 2))
    )
    assert report.draws.shape == (3, *x.shape)
    assert (report.mean[~t] == x[~t]).all()


def test_standard_errors_are_those_of_cells(report):
    row = _rows(report)["constant 1"]
    per_cell = metrics.error(report.truth, report.targets, np.ones_like(report.truth))
    n = report.targets.sum(1)
    share = per_cell / n.mean() - row.values["bias"] * n / n.mean()
    assert row.errors["bias"] == pytest.approx(share.std() / np.sqrt(len(n)), rel=0.35)
    assert row.replicates["bias"].shape == (40,)
    assert row.replicates["energy"].shape == (10,)


def test_imputers_see_no_hidden_count_and_all_see_the_same(store):
    first, second = Spy(), Spy()
    done = evaluate(
        store, store.rows("all")[:30], [Contestant("a", first), Contestant("b", second)],
        batch=8, rate=0.3, resamples=(5, 5), progress=False,
    )  # fmt: skip
    assert [len(cells) for cells, _ in first.shown] == [8, 8, 8, 6]
    for start, (a, seen_a), (b, seen_b) in zip(range(0, 30, 8), first.shown, second.shown, strict=True):
        assert torch.equal(a.counts, b.counts)
        assert torch.equal(seen_a, seen_b)
        assert (a.counts[~seen_a] == 0).all()
        part = slice(start, start + 8)
        assert (seen_a.numpy() == ~done.targets[part]).all()
        assert (a.counts.numpy() == np.where(done.targets[part], 0, done.truth[part])).all()
    a, b = _rows(done)["a"], _rows(done)["b"]
    scored = [m for m in COLUMNS if "seconds" not in m]
    np.testing.assert_equal([a.values[m] for m in scored], [b.values[m] for m in scored])


def test_batches_of_another_size_change_nothing_but_draws(store):
    def run(batch):
        return evaluate(
            store, store.rows("all")[:30], [Contestant("a", GeneMean(True))], batch=batch, resamples=(5, 5),
            progress=False,
        ).rows[0].values["deviance"]  # fmt: skip

    assert run(7) == pytest.approx(run(30), rel=1e-6)


def test_the_paper_protocol_hides_dropouts_from_everyone(store):
    spy, perfect = Spy(), [c for c in default_contestants(None) if c.name == "perfect"]
    done = evaluate(
        store, store.rows("all")[:50], [Contestant("spy", spy), *perfect], protocol="paper", groups="cell_type",
        resamples=(5, 5), progress=False,
    )  # fmt: skip
    everyone = store.rows("all")
    x, code = store.read(everyone).toarray(), store.labels(everyone, ["cell_type"])["cell_type"]
    missing = np.stack([(x[code == c] > 0).any(0) for c in range(2)])[code[:50]] & (x[:50] == 0)
    assert missing.any()
    seen = np.concatenate([o.numpy() for _, o in spy.shown])
    assert not seen[missing].any()
    assert not done.targets[missing].any()
    assert (seen | done.targets | missing).all()
    assert not (seen & done.targets).any()
    # missing entries are no part of the comparison: the truth has distance zero, ones at dropouts change nothing
    assert _rows(done)["perfect"].values["swd"] == 0
    ones = np.where(done.targets, 1.0, done.truth)
    rows = _rows(done)["spy"]
    wanted = metrics.correlation_error(np.log1p(done.truth), np.log1p(ones), metrics.once(50))[0]
    assert rows.values["correlation"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "genes", "rate": 0.7}, "has 0 folds, got fold 0"),
        ({"protocol": "genes", "rate": 0.1, "fold": 10}, "has 10 folds, got fold 10"),
        ({"protocol": "mar", "rate": 0.6}, "blocks hide a share of entries"),
        ({"targets": "nonzeros"}, "unknown targets 'nonzeros'; did you mean 'nonzero'"),
        ({"protocol": "papre"}, "unknown protocol 'papre'; did you mean 'paper'"),
        ({"protocol": "paper"}, "needs the label of the cell groups"),
        ({"rate": 1.0}, r"must lie in \(0, 1\), got 1"),
    ],
)
def test_mistakes_are_told(store, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(store, store.rows("all")[:5], [Contestant("a", Spy())], progress=False, **options)


def test_more_mistakes_are_told(store):
    with pytest.raises(ValueError, match="no cells"):
        evaluate(store, store.rows("all")[:0], [Contestant("a", Spy())])
    with pytest.raises(ValueError, match="unknown answer 'drawz'; did you mean 'draws'"):
        Contestant("a", Spy(), ("drawz",))
    with pytest.raises(ValueError, match="'1 draw' needs draws"):
        evaluate(store, store.rows("all")[:5], [Contestant("a", Spy(True), ("1 draw",))], progress=False)


def test_claims_say_plainly_who_is_first(report, store):
    rows = _rows(report)
    said = report.claims()
    assert said[0].startswith("distdiff mean is NOT first in Poisson deviance: ")
    assert "safe" not in said[0]
    rivals = [r for r in report.rows if r.note != "control" and not r.name.startswith("distdiff")]
    best = min(rivals, key=lambda r: r.values["deviance"])
    assert best.name in said[0]
    assert ("which peeks" in said[0]) == (best.note == "peeks")
    twin = evaluate(
        store, store.rows("all")[:40], [Contestant("distdiff", GeneMean(True), ("mean", "draws")),
        Contestant("base", Noisy())], draws=2, resamples=(50, 10), progress=False,
    )  # fmt: skip
    assert twin.claims()[0].startswith("distdiff mean is first in Poisson deviance")
    assert rows["distdiff mean"].values["deviance"] > best.values["deviance"]


def test_an_order_that_resampling_undoes_is_called_unsafe(store):
    class Nearly(GeneMean):
        def rate(self, counts, observed, cells):
            return super().rate(counts, observed, cells) * (1 + 1e-3 * np.sin(np.arange(counts.shape[1])))

    done = evaluate(
        store, store.rows("all")[:40], [Contestant("distdiff", Nearly(), ("mean", "draws")),
        Contestant("base", GeneMean())], draws=2, resamples=(100, 10), progress=False,
    )  # fmt: skip
    assert "not a safe order" in done.claims()[0]


def test_text_is_aligned_sorted_and_starred(report):
    text = report.to_text()
    blocks = [b for b in text.split("\n\n") if b.startswith("imputer")]
    assert len(blocks) == 2
    for block in blocks:
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len(lines[0]) <= 130
        names = [line.split("  ")[0] for line in lines[2:]]
        assert set(names[-3:]) == {"perfect", "constant 1", "none (zero)"}
        assert "cell-type mean +" in names
        assert all("*" not in line for line in lines[-3:])
    deviance = [float(line[25:].split("(")[0].split("*")[0]) for line in blocks[0].splitlines()[2:-3]]
    assert deviance == sorted(deviance)
    assert blocks[0].splitlines()[2].count("*") >= 1
    assert report.claims()[0] in text
    assert "| --- | ---: |" in report.to_markdown()


def test_json_and_folder(report, tmp_path):
    folder = report.write(tmp_path / "evaluation")
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.png", "table.json", "table.md"]
    stored = json.loads((folder / "table.json").read_text())
    assert stored["setting"]["protocol"] == "mcar"
    assert [r["imputer"] for r in stored["rows"]] == [r.name for r in report.rows]
    flat = report.metrics()
    assert flat["test/deviance/distdiff mean"] == _rows(report)["distdiff mean"].values["deviance"]
    assert all("distdiff" in key for key in flat)


def test_numbers_carry_two_digits_of_their_error():
    assert number(0.95021, 0.00313) == "0.9502(31)"
    assert number(0.95021, 0.0099999) == "0.950(10)"
    assert number(12.3, 1.26) == "12.3(13)"
    assert number(40.93, 2.1) == "40.9(21)"
    assert number(1234.5, 126.0) == "1234(126)"
    assert number(0.5) == "0.5"
    assert number(float("nan"), 0.1) == "-"
    assert number(0.0, 0.0) == "0"


def test_baselines_of_the_table_hide_as_much_as_the_evaluation():
    hides = {c.imputer.hide for c in default_contestants(None, rate=0.25) if hasattr(c.imputer, "hide")}
    assert hides == {0.25}
    assert all(isinstance(c.imputer, Baseline) for c in default_contestants("cell_type"))


def test_mmd_of_many_cells_is_that_of_some(store, monkeypatch):
    def value(at_most):
        monkeypatch.setattr("distdiff.evaluation.MMD_CELLS", at_most)
        return evaluate(
            store, store.rows("all")[:60], [Contestant("a", Noisy())], resamples=(5, 5), progress=False
        ).rows[0].values["mmd"]  # fmt: skip

    whole, some = value(60), value(45)
    assert whole != some
    assert some == pytest.approx(whole, rel=0.6)
    assert value(2000) == pytest.approx(whole)
    assert np.isnan(value(1))


def test_the_model_is_held_against_the_cheap_estimators(atlas):
    from distdiff.baselines import Baseline
    from distdiff.component import build
    from distdiff.heldout import against_cheap
    from distdiff.model import Model

    store = CountStore.open(atlas)
    untrained = Model.new(store.spec(()), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    found = against_cheap(untrained, store)
    assert len(found) == 5
    depth = build(Baseline, {"kind": "gene_mean", "depth": True}).label
    assert found["distdiff"] == pytest.approx(found[depth], rel=0.2)  # where it starts
    assert min(found.values()) < found["distdiff"]  # and something here knows better


def test_a_model_with_labels_is_scored_without_them_and_a_row_that_has_them_peeks(atlas):
    """They were made from the full counts: what a model makes of them must not stand beside imputers without."""
    from distdiff.config import Evaluation
    from distdiff.heldout import against_cheap, evaluate_model
    from distdiff.model import Model

    store = CountStore.open(atlas)
    model = Model.new(store.spec(("cell_type",)), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    generator = torch.Generator().manual_seed(0)
    for weights in model.denoiser.parameters():
        weights.data.normal_(0, 0.3, generator=generator)
    settings = Evaluation(repaint_steps=0, draws=2)
    rows = _rows(evaluate_model(model, store, settings))
    cheap = against_cheap(model, store)
    with torch.no_grad():
        for name, table in model.denoiser.named_parameters():
            if name.startswith(model.denoiser.label_tables):
                table.add_(1.0)
    other = _rows(evaluate_model(model, store, settings))
    assert other["distdiff mean"].values["deviance"] == rows["distdiff mean"].values["deviance"]
    assert against_cheap(model, store) == cheap
    told = "distdiff, labels told"
    assert other[told].values["deviance"] != rows[told].values["deviance"] != rows["distdiff mean"].values["deviance"]
    assert (rows[told].note, rows["distdiff mean"].note) == ("peeks", "")
    model.info["config"] = {"train": {"label_dropout": 0}}
    always = _rows(evaluate_model(model, store, settings))
    assert told not in always
    assert always["distdiff mean"].note == "peeks"
    assert always["distdiff mean"].values["deviance"] == other[told].values["deviance"]


def test_a_store_with_other_genes_is_scored_on_those_that_both_know(atlas, counts, tmp_path, caplog):
    """Another order: the same table. A subset and unknown genes: told, and every imputer sees the same genes."""
    from distdiff.config import Evaluation
    from distdiff.data.ingest.shard import shard
    from distdiff.heldout import evaluate_model
    from distdiff.model import Model

    def table(store):
        return evaluate_model(model, store, Evaluation(repaint_steps=0, draws=2), seed=1)

    store = CountStore.open(atlas)
    model = Model.new(store.spec(()), {"kind": "counts"}, {"kind": "transformer", "width": 8, "depth": 1, "heads": 2})
    straight = _rows(table(store))["distdiff mean"].values
    turned = counts[:, ::-1].copy()
    turned.write_h5ad(tmp_path / "turned.h5ad")
    shard([tmp_path / "turned.h5ad"], tmp_path / "turned.zarr", labels=("cell_type",), workers=0, progress=False)
    other = _rows(table(CountStore.open(tmp_path / "turned.zarr")))["distdiff mean"].values
    assert other["deviance"] == pytest.approx(straight["deviance"], rel=1e-4)

    some = counts[:, :20].copy()
    some.var_names = [*some.var_names[:15], *(f"new{i}" for i in range(5))]
    some.write_h5ad(tmp_path / "some.h5ad")
    shard([tmp_path / "some.h5ad"], tmp_path / "some.zarr", labels=("cell_type",), workers=0, progress=False)
    report = table(CountStore.open(tmp_path / "some.zarr"))
    assert report.setting["genes"] == 15
    assert "15 genes are scored; 5 of the store's are unknown to the model" in caplog.text
    some.var_names = [f"else{i}" for i in range(20)]
    some.write_h5ad(tmp_path / "none.h5ad")
    shard([tmp_path / "none.h5ad"], tmp_path / "none.zarr", labels=("cell_type",), workers=0, progress=False)
    with pytest.raises(ValueError, match="none of the store's 20 genes"):
        table(CountStore.open(tmp_path / "none.zarr"))


@pytest.mark.parametrize("protocol", ["mar", "mnar_low", "mnar_high", "genes"])
def test_a_protocol_hides_what_it_scores(protocol, store):
    spy = Spy()
    rate = 0.1 if protocol == "genes" else 0.25
    report = evaluate(
        store, store.rows("all")[:80], [Contestant("spy", spy)], protocol=protocol, rate=rate, resamples=(5, 5),
        progress=False, batch=80,
    )  # fmt: skip
    (cells, observed), scored = spy.shown[0], report.targets
    assert np.array_equal(~observed.numpy(), scored)
    assert (cells.counts[~observed] == 0).all()
    assert scored.mean() == pytest.approx(rate, abs=0.03)
    if protocol == "genes":
        assert (scored == scored[:1]).all()
    if protocol.startswith("mnar"):
        gone, seen = report.truth[scored].mean(), report.truth[~scored].mean()
        assert gone < 0.5 * seen if protocol == "mnar_low" else gone > 1.5 * seen


def test_nonzero_targets_are_drawn_among_nonzeros(store):
    spy = Spy()
    report = evaluate(
        store, store.rows("all")[:80], [Contestant("spy", spy)], protocol="mnar_low", rate=0.25, targets="nonzero",
        resamples=(5, 5), progress=False, batch=80,
    )  # fmt: skip
    (_, observed), scored = spy.shown[0], report.targets
    assert np.array_equal(~observed.numpy(), scored)
    assert (report.truth[scored] > 0).all()
    some = report.truth > 0
    assert scored.sum() == pytest.approx(0.25 * some.sum(), rel=0.1)
    assert report.truth[scored].mean() < 0.7 * report.truth[some & ~scored].mean()


def test_folds_of_genes_hide_every_gene_once(store):
    hidden = []
    for fold in range(5):
        spy = Spy()
        evaluate(
            store, store.rows("all")[:5], [Contestant("spy", spy)], protocol="genes", rate=0.2, fold=fold,
            resamples=(2, 2), progress=False,
        )  # fmt: skip
        hidden.append(~spy.shown[0][1][0].numpy())
    assert (np.sum(hidden, axis=0) == 1).all()


def test_zeros_can_be_hidden_and_not_scored(store):
    spy = Spy()
    report = evaluate(
        store, store.rows("all")[:60], [Contestant("spy", spy)], targets="nonzero", resamples=(2, 2), progress=False
    )
    hidden = ~spy.shown[0][1].numpy()
    assert (report.truth[report.targets] > 0).all()
    assert (report.targets <= hidden).all()
    assert (hidden & ~report.targets).any()
    assert report.setting["zeros_among_targets"] == 0
