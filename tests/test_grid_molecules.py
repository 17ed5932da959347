"""Protocol ``molecules`` of a grid: what is held out, who answers, and that the right answer is first."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distdiff import grid
from distdiff.baselines import Baseline
from distdiff.baselines.gene_mean import GeneMean
from distdiff.baselines.zero import Zero
from distdiff.data.store.store import CountStore
from distdiff.grid import molecules
from distdiff.grid.spec import read

SMALL = {"resamples": [10, 5], "cells": 20, "draws": 2, "protocols": [{"protocol": "molecules"}], "answers": ["mean"]}


def run(rows, atlas, out, **settings):
    return grid.run({**SMALL, "rows": rows, **settings}, out, data=[str(atlas)], progress=False)


def test_rows_denoise_and_those_that_cannot_say_why(atlas, tmp_path):
    rows = [
        {"kind": "pca", "components": [4], "scale": [1.0]}, {"kind": "gene_mean", "depth": True},
        {"kind": "zero", "name": "own counts"}, {"kind": "ridge"}, {"kind": "gene_mean"}, {"kind": "perfect"},
    ]  # fmt: skip
    result = run(rows, atlas, tmp_path, nb=True, answers=["mean", "draws"], scores=["cells", "de"])
    table = result.table
    assert set(table[table.status == "done"].row) == {"PCA regression", "gene mean x depth", "own counts"}
    assert set(table.row) == {"PCA regression", "gene mean x depth", "own counts", "ridge", "gene mean", "perfect"}
    bad = table[table.status != "done"].drop_duplicates("row").set_index("row").reason
    assert "gene mean does not denoise: its answer does not follow the depth of a cell" in bad["gene mean"]
    assert set(table.protocol) == {"molecules 10%"}
    done = table[table.status == "done"].set_index(["row", "metric"]).value
    for metric in ("deviance", "nll"):
        assert done["PCA regression", metric] < done["own counts", metric]
    for name in ("nll", "cp10k_mse", "cp10k_mse_poisson", "op_mse", "op_poisson", "op_poisson_right", "rmse", "r2"):
        assert np.isfinite(done["PCA regression", name])
    assert done["PCA regression", "op_mse"] == pytest.approx(done["PCA regression", "cp10k_mse"], rel=1e-4)
    assert "- no score 'de': it is of completed cells, not of held-out molecules" in result.markdown
    assert "| row | deviance |" in result.markdown


def test_evidence_and_held_out_molecules_are_the_cells(atlas):
    store, seen = CountStore.open(str(atlas)), []
    rows = store.rows("test")

    class Watched(GeneMean):
        def denoise(self, counts, p):
            seen.append(counts.toarray())
            assert p == pytest.approx(0.8)
            return super().denoise(counts, p)

    found = molecules.scored("w", Watched(depth=True), store, rows, share=0.2, seed=3, resamples=(20, 5))
    whole = store.read(rows).toarray()
    assert (seen[0] <= whole).all()
    assert seen[0].sum() / whole.sum() == pytest.approx(0.8, abs=0.03)
    held = whole - seen[0]
    about = found["setting"]
    assert about["zeros_among_targets"] == pytest.approx((held == 0).mean())
    assert f"20% of their molecules held out ({int(held.sum()):,})" in about["said"]
    mean = GeneMean(depth=True)
    mean.fit(store, store.rows("train"))
    rate = 0.2 * mean.denoise(seen[0].astype(np.float32), 0.8)
    numbers = found["answers"][0]["numbers"]
    assert numbers["nll"][0] == pytest.approx(float((rate - held * np.log(rate)).mean()), rel=1e-5)
    assert numbers["rmse"][0] == pytest.approx(float(np.sqrt(((rate - held) ** 2).mean())), rel=1e-5)
    again = molecules.scored("w", Watched(depth=True), store, rows, share=0.2, seed=3, resamples=(20, 5))
    assert again["answers"][0]["numbers"] == numbers


class Truth(Baseline):
    """The rates that the counts were drawn from, in the order of the test cells."""

    label, denoises, rates = "truth", True, np.zeros(0)

    def rate(self, counts, observed, cells):
        return self.rates


def test_the_true_rate_is_first_the_right_way_round(tmp_path):
    import anndata

    from distdiff.data.ingest.shard import shard

    rng = np.random.default_rng(0)
    rates = rng.gamma(0.7, 2.0, (400, 30))
    data = anndata.AnnData(rng.poisson(rates).astype(np.float32))
    data.obs_names = [f"c{i}" for i in range(400)]
    data.write_h5ad(tmp_path / "x.h5ad")
    shard([tmp_path / "x.h5ad"], tmp_path / "x.zarr", split=(0.4, 0.1, 0.5), workers=0, progress=False)
    store = CountStore.open(str(tmp_path / "x.zarr"))
    rows = store.rows("test")
    _, places = store.origin(rows)
    at = [int(gene) for gene in store.genes]

    class Known(Truth):
        def denoise(self, counts, p):
            return rates[places][:, at].astype(np.float32)

    def numbers(row):
        return molecules.scored("x", row, store, rows, share=0.3, seed=0, resamples=(30, 10))["answers"][0]["numbers"]

    true, mean, own = numbers(Known()), numbers(GeneMean(depth=True)), numbers(Zero())
    for metric in ("deviance", "nll", "rmse", "op_poisson_right"):
        assert true[metric][0] < min(mean[metric][0], own[metric][0])
    assert true["op_poisson"][0] > own["op_poisson"][0]  # as Open Problems has it, exchanged
    assert true["cp10k_mse_poisson"][0] < true["cp10k_mse"][0]  # the mean of a logarithm, not the log of a mean
    assert abs(true["bias"][0]) < 4 * true["bias"][1]


def test_our_model_reads_out_what_each_score_asks_for(atlas, tmp_path):
    settings = ["train.cells=256", "denoiser.width=8", "train.eval_cells=128", "train.checkpoint_cells=128"]
    result = run([{"train": "quick", "settings": settings}, {"kind": "zero"}], atlas, tmp_path)
    done = result.table[result.table.ours]
    assert set(done.status) == {"done"}, done.reason.unique()
    assert (done.capacity > 100).all()
    assert (done.fit_cpu_seconds > 0.05).all()
    found = done.set_index("metric").value
    assert np.isfinite(found).all()
    assert found["cp10k_mse"] != pytest.approx(found["op_mse"], rel=1e-3)
    file = next(p for p in (tmp_path / "cells").iterdir() if "distdiff" in p.name)
    assert json.loads(file.read_text())["answers"][0]["note"] == ""


def test_nothing_held_out_and_wrong_keys_are_one_sentence(atlas):
    store = CountStore.open(str(atlas))
    with pytest.raises(ValueError, match="no molecule of 2 test cells was held out at rate 1e-09; give a larger"):
        molecules.scored("m", GeneMean(depth=True), store, store.rows("test")[:2], share=1e-9, seed=0, resamples=(5, 5))
    spec = {**SMALL, "data": {"a": {"store": "a.zarr"}}, "rows": [{"kind": "zero"}]}
    with pytest.raises(ValueError, match="scores every entry; leave targets out"):
        read({**spec, "protocols": [{"protocol": "molecules", "targets": "nonzero"}]})
    assert read(spec).protocols[0].rate == 0.1
    assert read({**spec, "protocols": [{"protocol": "mcar"}]}).protocols[0].rate == 0.5


class Nan(GeneMean):
    """Answers with NaN."""

    def denoise(self, counts, p):
        return np.full(counts.shape, np.nan, np.float32)


def test_a_row_that_answers_nonsense_is_marked(atlas, tmp_path):
    table = run([{"kind": f"{__name__}:Nan", "depth": True, "name": "nan"}, {"kind": "zero"}], atlas, tmp_path).table
    bad = table[table.row == "nan"]
    assert bad.reason.item() == "nan answered with numbers that are not finite; its row cannot be scored"
