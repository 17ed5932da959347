from __future__ import annotations

import numpy as np
import pytest
import torch

from distdiff.model import Model
from distdiff.types import DataSpec
from tests.tracking.runs import SMALL, register


def test_the_alias_moves_only_to_a_better_score(here, model):
    assert register(model, 2.0).registered == "pbmc version 1, now 'champion'"
    assert "stays at version 1 (validation 2.0000 against 3.0000)" in register(model, 3.0).registered
    assert "stays at version 1" in register(model, float("nan")).registered
    assert register(model, 1.0).registered == "pbmc version 4, now 'champion'"


def test_a_champion_of_other_data_is_scored_again_on_the_new_data(here, model):
    register(model, 2.0)
    assert "stays at version 1, which was trained on other data" in register(model, 0.1, "other").registered

    def compare(new, champion):
        assert Model.load(new).spec.genes == Model.load(champion).spec.genes
        return scores

    scores = (5.0, 4.0)
    said = register(model, 0.2, "other", compare=compare).registered
    assert "stays at version 1 (on the new model's validation cells 4.0000 against 5.0000)" in said
    scores = (3.0, 4.0)
    assert register(model, 9.0, "other", compare=compare).registered == "pbmc version 4, now 'champion'"
    assert "stays at version 4 (validation 9.0000" in register(model, 10.0, "other", compare=compare).registered


def test_models_of_different_data_are_scored_on_the_same_cells(atlas, tmp_path):
    from distdiff.data.store.store import CountStore
    from distdiff.denoise import adopt
    from distdiff.heldout import compare

    store = CountStore.open(atlas)

    def saved(name, genes, labels, data=store.manifest.fingerprint):
        made = Model.new(DataSpec(genes, labels, np.full(len(genes), 0.5, np.float32)), {"kind": "counts"}, SMALL)
        made.info = {"data": data, "config": {"data": {"store": str(atlas)}}}
        return made.save(tmp_path / name)

    new = saved("new", store.genes, {"cell_type": ("B", "T")})
    champion = saved("champion", ("stranger", *store.genes[4::-1]), {"cell_type": ("T", "B", "Q")})
    ours, theirs = compare(new, champion)
    assert 0 < ours < 100
    assert ours == pytest.approx(theirs), "untrained networks say the same of the same genes"
    genes = list(store.genes)
    rng = np.random.default_rng(0)
    for order in (genes[::-1], rng.permutation(genes).tolist(), genes):
        taught = Model.load(new)
        for weights in taught.denoiser.parameters():
            weights.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        one = taught.save(tmp_path / "one")
        twin = Model.new(DataSpec(tuple(order), taught.spec.labels, np.full(len(order), 0.5, np.float32)),
                         {"kind": "counts"}, SMALL)  # fmt: skip
        adopt(twin.denoiser, twin.spec.genes, taught.denoiser.state_dict(), taught.spec.genes)
        twin.info = dict(taught.info)
        other = twin.save(tmp_path / "other")
        for pair in ((one, other), (other, one)):
            assert compare(*pair)[0] == pytest.approx(compare(*pair)[1], rel=1e-4), "the same network by name"
    with pytest.raises(ValueError, match="is not what the model was trained on any more"):
        compare(saved("old", store.genes, {}, "another"), champion)


def test_scores_compare_where_they_mean_the_same():
    from distdiff.config import load

    def of(judge, *overrides):
        return load(None, ["data.store=x.zarr", *overrides]).comparable(judge)

    assert of("val/deviance") == of("val/deviance", "process.weight=nll", "optim.lr=1e-5")
    assert of("val/deviance") != of("val/deviance", "data.genes=panel")
    assert of("val/loss") == of("val/loss", "optim.lr=1e-5")
    assert of("val/loss") != of("val/loss", "process.weight=nll")
    assert of("val/loss") != of("val/loss", "survival.hidden=0.9")
