"""A grid of rows on data sets: what is compared, what is resumed, what is marked, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from distdiff import grid
from distdiff.baselines.gene_mean import GeneMean
from distdiff.baselines.zero import Zero
from distdiff.data.ingest.shard import shard
from distdiff.grid import cell as cells
from distdiff.grid.spec import read
from distdiff.grid.table import best, markdown, merged
from distdiff.report import number

SMALL = {"resamples": [10, 5], "cells": 12, "draws": 2, "protocols": [{"protocol": "mcar", "rate": 0.3}]}
RIDGE = {"kind": "ridge", "alpha": [10.0]}


class Nan(GeneMean):
    """Answers with NaN."""

    def rate(self, counts, observed, cells):
        return np.full(counts.shape, np.nan)


class Short(GeneMean):
    """Answers with a gene too few."""

    def rate(self, counts, observed, cells):
        return np.zeros((len(counts), counts.shape[1] - 1))


class Absent(GeneMean):
    """Its library is not there."""

    def learn(self, store, rows):
        raise ImportError("this row needs nolibrary: pip install nolibrary")


def of_kind(name: str) -> dict[str, str]:
    return {"kind": f"{__name__}:{name}", "name": name}


def run(rows, atlas, out, **settings):
    return grid.run({**SMALL, "rows": rows, **settings}, out, data=[str(atlas)], progress=False)


def test_every_row_protocol_and_seed_has_its_lines_and_files(atlas, tmp_path):
    result = run(
        [RIDGE, {"kind": "gene_mean", "depth": True}, {"kind": "zero"}], atlas, tmp_path / "out", nb=True, seeds=[0, 1],
        protocols=[{"protocol": "mcar", "rate": 0.3}, {"protocol": "genes", "rate": 0.5, "folds": "all"}],
        cell_type="cell_type", scores=["cells", "open_problems", "frechet", "rare"],
    )  # fmt: skip
    table = result.table
    assert set(table.row) == {"ridge", "ridge + NB", "gene mean x depth", "gene mean x depth + NB", "none (zero)"}
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 5 * 2 * 3
    assert set(table[table.protocol == "genes 50%"].fold) == {0, 1}
    assert set(table[table.row == "ridge + NB"].answer) == {"draws"}  # its mean is the ridge's
    for metric in ("deviance", "r2", "op_poisson_right", "log_frechet"):
        assert np.isfinite(table[(table.metric == metric) & (table.row == "ridge")].value).all()
    assert "rare_deviance" not in set(table.metric)  # no rare type here
    first = best(merged(table[table.protocol == "mcar 30%"]).query("answer == 'mean'"), "deviance")
    assert first is not None
    assert first.row == "ridge"
    assert f"| ridge | **{number(first.value, first.error)}** |" in result.markdown
    assert "- no score 'rare': rare: 0 test cells" in result.markdown
    assert any(text.startswith("atlas, mcar 30%, deviance of the mean: ridge is first") for text in result.claims)
    again = pd.read_parquet(tmp_path / "out" / "results.parquet").value
    assert np.array_equal(again, table.value, equal_nan=True)
    assert (tmp_path / "out" / "deviance.png").stat().st_size > 5000
    assert not (tmp_path / "out" / "energy.png").exists()  # of single draws, which were not asked for


def test_a_second_run_computes_what_is_missing_alone(atlas, tmp_path, monkeypatch):
    rows = [{"kind": "gene_mean"}, {"kind": "zero"}]
    before = run(rows, atlas, tmp_path).table
    (gone,) = (tmp_path / "cells").glob("*gene-mean*")
    gone.write_text(gone.read_text()[:100])  # cut in the middle, as no run of ours leaves it
    computed = []
    monkeypatch.setattr(
        grid, "compute", lambda cell, folder: computed.append(cell.row.name) or cells.compute(cell, folder)
    )
    after = run(rows, atlas, tmp_path).table
    assert computed == ["gene mean"]
    assert before.value.equals(after.value)
    run(rows, atlas, tmp_path, cells=10)
    assert computed[1:] == ["gene mean", "none (zero)"]  # other cells are another question


@pytest.mark.parametrize(
    ("row", "status", "said"),
    [
        (of_kind("Nan"), "failed", "numbers that are not finite"),
        (of_kind("Short"), "failed", r"answered with shape \(10, 29\)"),
        (of_kind("Absent"), "absent", "pip install nolibrary"),
        ({"kind": "type_mean", "key": "donor"}, "failed", "has no label 'donor'; known: cell_type"),
        ({"kind": "countsdiff", "key": "donor", "steps": 2}, "failed", "has no label 'donor'; known: cell_type"),
    ],
)
def test_a_row_that_cannot_run_is_marked_and_tried_again(atlas, tmp_path, row, status, said):
    result = run([row, {"kind": "zero"}], atlas, tmp_path, answers=["mean"])
    bad = result.table[result.table.status != "done"]
    assert len(bad) == 1
    assert bad.status.item() == status
    assert re.search(said, bad.reason.item())
    assert "\n" not in bad.reason.item()
    assert f"| {status} |" in result.markdown
    assert bad.reason.item() in result.markdown
    assert np.isfinite(result.table[(result.table.row == "none (zero)")].value).any()
    (file,) = (p for p in (tmp_path / "cells").iterdir() if json.loads(p.read_text())["status"] != "done")
    assert cells.finished(file) is None


def small(counts, folder: Path, n: int, split) -> Path:
    folder.mkdir()
    counts[:n].write_h5ad(folder / "few.h5ad")
    shard([folder / "few.h5ad"], folder / "few.zarr", labels=("cell_type",), split=split, workers=0, progress=False)
    return folder / "few.zarr"


def test_too_few_test_cells_are_one_sentence(counts, tmp_path):
    for n, split, found in ((20, (0.9, 0.1, 0.0), 0), (11, (0.8, 0.1, 0.1), 1)):
        store = small(counts, tmp_path / str(n), n, split)
        table = run([{"kind": "zero"}], store, tmp_path / f"out{n}").table
        assert f"few has {found} test cells, and a bootstrap over cells needs two or more" in table.reason.item()


def test_scores_by_type_without_types_are_left_out_and_said(atlas, counts, tmp_path):
    run([{"kind": "zero"}], atlas, tmp_path, scores=["clustering", "probe", "rare"])
    (file,) = (tmp_path / "cells").iterdir()
    answer = json.loads(file.read_text())["answers"][0]
    assert len(answer["reasons"]) == 3
    assert all("cell_type" in reason or "type(s)" in reason for reason in answer["reasons"])
    assert "ari" not in answer["numbers"]
    lonely = small(counts[counts.obs.cell_type == "B"].copy(), tmp_path / "b", 40, (0.5, 0.1, 0.4))
    run([{"kind": "zero"}], lonely, tmp_path / "out", scores=["clustering"], cell_type="cell_type")
    (file,) = (tmp_path / "out" / "cells").iterdir()
    assert "two types or more" in json.loads(file.read_text())["answers"][0]["reasons"][0]


def test_a_data_set_without_the_named_types_is_one_sentence(atlas, tmp_path):
    table = run([{"kind": "zero"}], atlas, tmp_path, cell_type="louvain", answers=["mean"]).table
    assert table.reason.item() == "atlas has no label 'louvain' (cell_type); it has: cell_type"


def test_groups_of_one_cell_are_left_out_and_said(counts, tmp_path):
    some = counts[:60].copy()
    some.obs["cell_type"] = [f"type{i}" for i in range(60)]
    store = small(some, tmp_path / "alone", 60, (0.5, 0.1, 0.4))
    rows = [{"kind": "gene_mean"}, {"kind": "type_mean"}]
    protocols = [{"protocol": "paper", "rate": 0.5}]
    result = run(
        rows, store, tmp_path / "out", cell_type="cell_type", scores=["de", "rare", "cells"], protocols=protocols
    )
    assert set(result.table.status) == {"done"}
    assert result.markdown.count("- no score 'de': differential expression needs a type with two cells or more") == 1
    assert "- no score 'rare': rare: 0 test cells are of a type with at most 30 training cells" in result.markdown
    means = result.table[(result.table.metric == "rmse") & (result.table.answer == "mean")].set_index("row").value
    assert means["cell-type mean"] == means["gene mean"]  # a type without training cells has the mean of all


def test_every_score_has_its_column_and_its_spread(counts, tmp_path):
    some = counts.copy()
    kind = some.obs.cell_type.astype(str).to_numpy()
    kind[:24] = "rare"  # at most 30 training cells, and test cells
    some.obs["cell_type"] = kind
    some.write_h5ad(tmp_path / "rare.h5ad")
    store = tmp_path / "rare.zarr"
    shard([tmp_path / "rare.h5ad"], store, labels=("cell_type",), split=(0.5, 0.1, 0.4), workers=0, progress=False)
    result = run(
        [{"kind": "gene_mean", "depth": True}], store, tmp_path / "out", cell_type="cell_type", cells=80,
        scores=["cells", "open_problems", "rare", "frechet", "mmd", "clustering", "de"], answers=["mean"],
    )  # fmt: skip
    found = result.table.set_index("metric")
    assert set(found.index) >= {"rare_deviance", "log_frechet", "log_mmd", "ari", "de_recall", "de_false", "op_mse"}
    assert np.isfinite(found.value).all()
    assert (found.error.drop("de_false") > 0).all()  # no gene is found that should not be
    head = next(line for line in result.markdown.splitlines() if line.startswith("| row"))
    for name in ("rare deviance", "log MMD^2 of counts", "log scFID (PCA)", "DE recovered", "peak MiB", "trials"):
        assert f"| {name} " in head
    body = next(line for line in result.markdown.splitlines() if line.startswith("| gene mean"))
    assert len(body.split("|")) == len(head.split("|"))
    assert found.n_trials.unique().tolist() == [1]
    if Path("/proc/self/clear_refs").exists():
        assert (found.peak_mib > 50).all()


def test_a_row_says_how_many_combinations_it_compares(atlas, tmp_path):
    rows = [
        RIDGE, {"kind": "knn", "k": [5, 9], "prior": 1.0, "scale": [0.1, 1.0]},
        {"kind": "knn_smoothing", "k": [4, 8, 12, 16], "trials": 3},
        {"kind": "nmf", "components": [2, 3], "floor": 0.01},
    ]  # fmt: skip
    table = run(rows, atlas, tmp_path, answers=["mean"]).table.drop_duplicates("row").set_index("row").n_trials
    assert table.to_dict() == {"ridge": 4, "kNN pool": 4, "kNN-smoothing": 3, "Poisson NMF": 2}


def test_diffusion_rows_are_scored(atlas, tmp_path):
    small = {"steps": 4, "batch": 8, "width": 8, "depth": 1, "heads": 2, "walk": 2, "samples": 2}
    rows = [{"kind": kind, **small} for kind in ("countsdiff", "blackout", "mdlm", "scidpms")]
    table = run(rows, atlas, tmp_path).table
    assert set(table.status) == {"done"}, table.reason.unique()
    assert (table.capacity > 100).all()


def test_a_grid_is_one_run_of_mlflow_that_is_updated(atlas, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    rows = [{"kind": "gene_mean"}, {"kind": "zero"}]
    run(rows[:1], atlas, tmp_path / "out", experiment="grids", answers=["mean"])
    run(rows, atlas, tmp_path / "out", experiment="grids", answers=["mean"])
    (logged,) = mlflow.search_runs(experiment_names=["grids"], output_format="list")
    assert logged.info.status == "FINISHED"
    assert {f"atlas/mcar 30/{row}/mean/rmse" for row in ("gene mean", "none zero")} <= set(logged.data.metrics)
    client = mlflow.MlflowClient()
    history = client.get_metric_history(logged.info.run_id, "atlas/mcar 30/gene mean/mean/rmse")
    assert [point.step for point in history] == [1, 2]
    table = Path(client.download_artifacts(logged.info.run_id, "table.md", str(tmp_path)))
    assert "none (zero)" in table.read_text()


def test_simulated_sets_are_scored_against_counts_before_dropout(tmp_path, monkeypatch):
    from distdiff.data.splat import splat

    made = splat(cells=60, genes=40, groups=2, mid=1.0, library_loc=6.0)
    monkeypatch.setattr(cells, "published", lambda name, seed: made.copy())
    spec = {**SMALL, "data": {"s": {"splat": "splat30"}}, "protocols": [{"protocol": "dropout"}], "answers": ["mean"]}
    rows = [{"kind": "zero", "name": "as measured"}, {"kind": "type_mean", "key": "cell_type", "depth": True}]
    table = grid.run({**spec, "rows": rows}, tmp_path, progress=False).table
    rmse = table[table.metric == "rmse"].set_index("row").value
    assert rmse["cell-type mean x depth"] < rmse["as measured"]
    store = cells.opened("s", read({**spec, "rows": rows}).data["s"], tmp_path)
    tested = cells.scored_rows(store, 12, "s")
    _, places = store.origin(tested)
    seen = store.read(tested).toarray()
    true = made.layers["true"][places].toarray()[:, made.var_names.get_indexer(store.genes)]
    assert rmse["as measured"] == pytest.approx(np.sqrt(((true - seen) ** 2).mean()), rel=1e-5)


def test_a_model_is_trained_once_and_cells_it_saw_are_refused(atlas, tmp_path):
    settings = ["train.cells=256", "denoiser.width=8", "train.eval_cells=128", "train.checkpoint_cells=128"]
    rows = [{"train": "quick", "settings": settings}, {"kind": "zero"}]
    result = run(rows, atlas, tmp_path / "out")
    ours = result.table[result.table.ours]
    assert set(ours.answer) == {"mean", "draws"}
    assert (ours.capacity > 100).all()
    assert (ours.fit_cpu_seconds > 0.1).all()
    (model,) = (tmp_path / "out" / "models").iterdir()
    stamp = (model / "grid.json").stat().st_mtime_ns
    run(rows, atlas, tmp_path / "out", seeds=[1])
    assert (model / "grid.json").stat().st_mtime_ns == stamp
    given = run([{"model": str(model / "model"), "name": "given"}], atlas, tmp_path / "other").table
    again = ours[ours.metric == "deviance"].value.to_numpy()
    assert np.array_equal(given[given.metric == "deviance"].value.to_numpy(), again)
    other = tmp_path / "moved.zarr"
    shard([atlas.parent / "counts.h5ad"], other, labels=("cell_type",), seed=5, workers=0, progress=False)
    refused = run([{"model": str(model / "model")}], other, tmp_path / "moved").table
    assert "was trained on" in refused.reason.iloc[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row": []}, "unknown key 'row'; did you mean 'rows'"),
        ({"rows": [{"kind": "rigde"}]}, r"rows\[0\]: unknown baseline kind 'rigde'; did you mean 'ridge'"),
        ({"rows": [{"kind": "ridge", "alhpa": [1.0]}]}, "did you mean 'alpha'"),
        ({"rows": [{"train": "quick", "stetings": []}]}, "unknown key 'stetings'; did you mean 'settings'"),
        ({"rows": [{"train": "quick", "model": "m"}]}, "either model or train"),
        ({"rows": ["ridge"]}, "must be a mapping"),
        ({"rows": []}, "no rows"),
        ({"rows": [{"kind": "zero"}, {"kind": "zero"}]}, "are the same"),
        ({"data": {"a": {"stroe": "a.zarr"}}}, "unknown key 'stroe'; did you mean 'store'"),
        ({"data": {"a": {"splat": "splat31"}}}, "unknown splat 'splat31'"),
        ({"data": {}}, "no data"),
        ({"protocols": [{"protocol": "mcra"}]}, "mcar"),
        ({"protocols": [{"protocol": "mcar", "rate": 1.5}]}, "rate must lie between 0 and 1"),
        ({"protocols": [{"protocol": "mcar", "folds": "all"}]}, "of the protocol genes"),
        ({"protocols": [{"protocol": "dropout"}]}, "simulated sets"),
        ({"scores": ["cluster"]}, "clustering"),
        ({"seeds": []}, "must not be empty"),
        ({"minutes": -2}, "minutes must be a number of minutes"),
        ({"cells": "many"}, "cells='many'"),
    ],
)
def test_what_a_grid_refuses(change, said):
    whole = {**SMALL, "data": {"a": {"store": "a.zarr"}}, "rows": [{"kind": "zero"}], **change}
    with pytest.raises(ValueError, match=said):
        read(whole)


def test_rows_get_seed_share_and_label_of_their_cell():
    spec = {**SMALL, "rows": [{"kind": "with_nb", "of": {"kind": "knn"}}, {"kind": "type_mean"}], "cell_type": "kind"}
    made = read(spec, data=["a.zarr"])
    (data_set,), (protocol,) = made.data.values(), made.protocols
    first, second = (cells.fitted(row, data_set, protocol, 7).options for row in made.rows)
    assert first == {
        "kind": "with_nb", "hide": 0.3, "seed": 7, "of": {"kind": "knn", "hide": 0.3, "seed": 7}
    }  # fmt: skip
    assert second == {"kind": "type_mean", "key": "kind"}
    rows = [{"kind": "dca"}, {"kind": "dca", "minutes": 9, "name": "longer"}, {"kind": "knn"}]
    made = read({**SMALL, "rows": rows, "minutes": 2}, data=["a.zarr"])
    own = [cells.fitted(row, data_set, protocol, 7, made.settings.minutes).options for row in made.rows]
    assert [options.get("minutes") for options in own] == [2, 9, None]


@pytest.mark.parametrize(
    "name", ["all", "light", "countsdiff_tables", "donor", "scidpms_splat", "completion", "denoising"]
)
def test_shipped_grids_are_read(name):
    made = read(name, ["cell_type=group"], [] if name == "scidpms_splat" else ["atlas.zarr"])
    assert len(made.rows) > 5
    assert (len(made.data) == 6) == (name == "scidpms_splat")
    with pytest.raises(ValueError, match="did you mean 'light'"):
        read("ligt")


def test_a_tie_goes_to_no_control():
    part = pd.DataFrame({"row": ["p", "a"], "metric": "bias", "value": [0.0, -0.1], "note": ["control", ""]})
    found = best(part, "bias")
    assert found is not None
    assert found.row == "a"
    assert Zero().control


def test_markdown_of_a_grid_in_which_nothing_ran(atlas, tmp_path):
    result = run([of_kind("Absent")], atlas, tmp_path)
    assert result.claims == ()
    assert "Absent: absent: this row needs nolibrary" in markdown(result.table, {})


@pytest.mark.distributed
def test_workers_compute_the_same(atlas, tmp_path, forked_workers):
    rows = [{"kind": "gene_mean"}, {"kind": "zero"}]
    here = run(rows, atlas, tmp_path / "here", answers=["mean"]).table
    spec = {**SMALL, "rows": rows, "answers": ["mean"]}
    there = grid.run(spec, tmp_path / "there", data=[str(atlas)], workers=1, progress=False).table
    assert here.value.equals(there.value)
