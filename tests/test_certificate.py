"""`distdiff.certify`: it passes where it should, fails where it should, and refuses the rest in a sentence."""

from __future__ import annotations

import dataclasses
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import distdiff
from distdiff import inmemory, trial
from distdiff.cli import app


def cells(n=600, genes=60, seed=0):
    """Cells of three types that lie along two programs, deep enough to tell."""
    rng, law = np.random.default_rng(seed), np.random.default_rng(99)
    base, programs = law.normal(0, 1, (3, genes)), law.normal(0, 0.8, (2, genes))
    kind = rng.integers(0, 3, n)
    rate = np.exp(base[kind] + rng.normal(size=(n, 2)) @ programs) * rng.lognormal(0, 0.3, (n, 1))
    obs = pd.DataFrame({"kind": [f"type{k}" for k in kind], "donor": rng.choice(["d1", "d2"], n)})
    obs.index = [f"c{seed}_{i}" for i in range(n)]
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)


def trained(adata, n):
    return distdiff.train(
        adata, config="quick", labels=["kind"], cells=n, width=64, batch=64, lr=3e-3, progress=False,
        blend=False, evaluate={"enabled": False}, tracking={"enabled": False},
    )  # fmt: skip


@pytest.fixture(scope="module")
def good():
    return trained(cells(1200), 38_400)


@pytest.fixture(scope="module")
def fresh():
    return cells(600, seed=1)


@pytest.fixture(scope="module")
def certificate(good, fresh):
    return good.certify(fresh, sample="donor")


def statuses(found):
    return {item.name: item.status for item in found.items}


def test_a_trained_model_passes_what_matters_and_fails_nothing(certificate):
    found = statuses(certificate)
    assert "fail" not in found.values(), certificate.to_text()
    passed = {name for name, status in found.items() if status == "pass"}
    assert passed > {
        "place of the truth among draws", "coverage of intervals", "coverage by expression", "coverage by depth",
        "coverage by group", "coverage by batch", "better than gene mean x depth", "better than cell-type mean",
        "co-expression", "random halves of one group",
        "groups with few training cells",
    }, certificate.to_text()  # fmt: skip
    assert certificate.scores["the model"]["deviance"] < certificate.scores["gene mean x depth"]["deviance"]


def test_a_model_that_was_trained_too_short_fails(fresh):
    found = statuses(distdiff.certify(trained(cells(), 64), fresh))
    assert found["better than gene mean x depth"] == found["better than kNN + NB"] == "fail"


def test_a_model_whose_genes_are_mixed_up_fails(good, fresh):
    names = np.random.default_rng(0).permutation(good.spec.genes)
    mixed = dataclasses.replace(good, spec=dataclasses.replace(good.spec, genes=tuple(names)), seen=None)
    found = statuses(distdiff.certify(mixed, fresh))
    for name in ("place of the truth among draws", "means by decile", "zeros", "better than gene mean x depth",
                 "cells unlike those of training"):  # fmt: skip
        assert found[name] == "fail", (name, found)


def test_a_model_that_invents_a_program_fails(good, fresh, monkeypatch):
    honest = trial.Asked.denoise

    def inventing(self, counts):
        """Cells with an odd number of molecules are another type."""
        rate, own = honest(self, counts)
        sign = 2 * (counts.sum(1, keepdims=True) % 2) - 1
        return rate * np.exp(sign * np.linspace(-2.5, 2.5, rate.shape[1])), own

    monkeypatch.setattr(trial.Asked, "denoise", inventing)
    found = statuses(distdiff.certify(good, fresh))
    assert found["co-expression"] == found["cells that are all alike"] == "fail"
    assert found["genes permuted within groups"] == "look"


def test_cells_of_training_are_left_out_and_serve_the_cheap_methods(good):
    both = ad.concat([cells(1200), cells(300, seed=2)])
    about = distdiff.certify(good, both, draws=2).about
    assert 900 < about["trained_left_out"] <= 960
    assert about["cheap_methods_learn_from"] == about["trained_left_out"]
    assert about["cells"] == 1500 - about["trained_left_out"]
    kept = distdiff.certify(good, both, keep_trained=True, draws=2).about
    assert kept["trained_kept"]
    assert kept["cells"] == kept["cheap_methods_learn_from"] == 750


def test_the_page_stands_alone_and_the_numbers_are_json(certificate, tmp_path):
    folder = certificate.write(tmp_path / "certificate")
    page = (folder / "certificate.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "<script" not in page
    assert 'name="viewport"' in page
    whole = json.loads((folder / "certificate.json").read_text())
    assert whole["status"] == certificate.status
    assert {"expression", "depth", "group", "batch"} <= {i["name"].removeprefix("coverage by ") for i in whole["items"]}
    assert whole["about"]["data"] == certificate.about["data"]
    with pytest.raises(FileExistsError, match="overwrite"):
        certificate.write(folder)


def test_the_same_seed_gives_the_same_certificate(good, fresh, certificate):
    again = good.certify(fresh, sample="donor")
    assert [item.value for item in again.items] == [item.value for item in certificate.items]
    assert again.about["data"] == certificate.about["data"]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda a: a[:80].copy(), {}, "80 cells with molecules, at least 100"),
        (lambda a: a[:40].copy(), {}, "40 cells with molecules to score, at least 50"),
        (lambda a: ad.AnnData(a.X.log1p(), a.obs, a.var), {}, "is not a whole number"),
        (lambda a: ad.AnnData(a.X, a.obs, pd.DataFrame(index=[f"h{i}" for i in range(60)])), {}, "none of the input's"),
        (lambda a: a[:, :5].copy(), {}, "5 genes that the model knows, at least 10"),
        (lambda a: a, {"groupby": "kinds"}, "no column 'kinds'"),
        (lambda a: a, {"draws": 1}, "draws must be at least 2"),
    ],
)
def test_bad_input_is_one_sentence(good, fresh, change, options, words):
    with pytest.raises(ValueError, match=words) as error:
        distdiff.certify(good, change(fresh), **options)
    assert "\n" not in str(error.value)


def test_one_group_and_no_labels_are_said(good, fresh, monkeypatch):
    one = fresh[:100].copy()
    one.obs["kind"] = "all"
    found = distdiff.certify(good, one)
    assert any("all cells are of one group" in note for note in found.notes)
    assert "marker leakage" not in statuses(found)
    code = np.unique(fresh.obs["kind"], return_inverse=True)[1]
    monkeypatch.setattr(inmemory, "leiden", lambda rows, seed: code[: rows.n_cells])
    bare = ad.AnnData(fresh.X[:100], var=fresh.var)
    assert distdiff.certify(good, bare).about["groups"].startswith("Leiden clusters of the same counts")


def test_the_command(good, fresh, tmp_path):
    good.save(tmp_path / "model")
    fresh[:100].copy().write_h5ad(tmp_path / "mine.h5ad")
    words = ["certify", "--model", tmp_path / "model", "--data", tmp_path / "mine.h5ad", "--out", tmp_path / "c"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "verdict: " in done.output
    assert (tmp_path / "c" / "certificate.html").exists()


def test_it_is_logged_to_mlflow_on_request(good, fresh, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    found = good.certify(fresh[:200].copy(), draws=2, track=True)
    assert found.about["tracked"].startswith("logged to a new run ")
    (run,) = mlflow.search_runs(experiment_names=["distdiff"], output_format="list")
    assert run.data.tags["certificate"] == found.status
    assert run.data.metrics["certificate/zeros"] == next(i.value for i in found.items if i.name == "zeros")
    assert run.data.metrics["certificate/deviance of the model"] == found.scores["the model"]["deviance"]
    folder = f"certificates/{found.about['data']}"
    paths = [f.path for f in mlflow.MlflowClient().list_artifacts(run.info.run_id, folder)]
    assert f"{folder}/certificate.html" in paths
    assert "tracked" not in good.certify(fresh[:200].copy(), draws=2).about
