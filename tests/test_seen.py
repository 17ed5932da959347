"""Which cells a model was trained on: none missed, false ones as rare as promised, and a damaged filter is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.numpy import save_file

import distdiff
from distdiff import saved
from distdiff.seen import BITS, FILE, HASHES, SALT, Seen, cell_hashes, counter


def cells(n, seed=0, genes=60, mean=1.0):
    return sp.csr_matrix(np.random.default_rng(seed).poisson(mean, (n, genes)).astype(np.float32))


def test_planted_cells_are_all_found_and_others_are_not():
    trained, fresh = cells(6000), cells(5940, seed=1)
    seen = Seen.of(6000, (trained[start : start + 1000] for start in range(0, 6000, 1000)))
    query = sp.vstack([fresh, trained[::100]]).tocsr()
    found = seen.found(query)
    assert found[-60:].all()
    assert not found[:-60].any()
    assert len(seen.bits) == 29 * 6000 / 8


def test_false_positives_are_as_rare_as_promised():
    """With fewer bits a cell the same arithmetic has a rate that can be measured; at 29 it is 9e-7."""
    trained, fresh = cells(2000), cells(30_000, seed=1)
    seen = Seen.of(2000, (trained,))
    few = Seen(2000, seen.bits[: 2000 * 12 // 8])
    hashes, enough = cell_hashes(trained)
    bits = np.zeros_like(few.bits)
    from distdiff.seen import _places

    at = _places(hashes[enough], len(bits))
    np.bitwise_or.at(bits, at >> 3, np.uint8(1) << (at & 7).astype(np.uint8))
    promised = (1 - np.exp(-HASHES / 12)) ** HASHES
    assert Seen(2000, bits).found(fresh).mean() == pytest.approx(promised, rel=0.2)
    assert (1 - np.exp(-HASHES / BITS)) ** HASHES < 1e-6
    assert abs(np.unpackbits(seen.bits).mean() - (1 - np.exp(-HASHES / BITS))) < 0.005


def test_thinned_copies_are_other_cells_and_shallow_ones_are_not_claimed():
    trained = cells(500)
    seen = Seen.of(500, (trained,))
    thinned = trained.copy()
    thinned.data = np.random.default_rng(0).binomial(thinned.data.astype(int), 0.9).astype(np.float32)
    same = np.asarray((thinned != trained).sum(1)).ravel() == 0
    assert not (seen.found(thinned) & ~same).any()
    shallow = cells(500, mean=0.01)
    assert not Seen.of(500, (shallow,)).found(shallow).any()


def test_order_of_genes_dtype_and_other_genes_do_not_matter():
    trained, rng = cells(300), np.random.default_rng(0)
    seen, order = Seen.of(300, (trained,)), rng.permutation(60)
    wide = sp.hstack([trained[:, order], cells(300, 5, genes=7)]).tocsr()
    assert seen.found(wide, np.r_[order, np.full(7, -1)]).all()
    assert seen.found(trained.astype(np.int64)).all()
    assert seen.found(trained.astype(np.uint16)).all()
    assert not seen.found(trained[:, order]).any()
    stored_zeros = trained.copy()
    stored_zeros.data[::7] = 0
    dropped = stored_zeros.copy()
    dropped.eliminate_zeros()
    assert (cell_hashes(stored_zeros)[0] == cell_hashes(dropped)[0]).all()


def test_a_salt_closes_the_filter(monkeypatch):
    trained = cells(200)
    seen = Seen.of(200, (trained,), salt="secret")
    monkeypatch.setenv(SALT, "guess")
    with pytest.raises(ValueError, match="has a salt, and DISTDIFF_SALT is not that"):
        seen.found(trained)
    assert "salt" in counter(seen, np.arange(60), 0)[1]
    monkeypatch.setenv(SALT, "secret")
    assert seen.found(trained).all()
    assert not Seen(seen.cells, seen.bits).found(trained).any(), "without the salt the filter says nothing"


@pytest.fixture(scope="module")
def trained(counts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    model = distdiff.train(
        counts, out=folder / "run", cells=64, batch=32, width=8, evaluate={"enabled": False},
        tracking={"enabled": False}, progress=False,
    )  # fmt: skip
    return model, folder / "run"


def test_a_model_knows_its_training_cells_again(counts, trained):
    model, run = trained
    store = distdiff.CountStore.open(run / "atlas.zarr")
    assert model.seen is not None
    assert model.seen.cells == len(store.rows("train"))
    known = store.read(store.rows("train"))
    assert (model.seen.found(known) == (np.diff(known.indptr) >= 8)).all()
    assert not model.seen.found(store.read(store.rows("test"))).any()
    adata = counts[:, ::-1].copy()
    out = model.impute(adata, mask=np.ones(adata.shape, bool), mean_only=True)
    enough = np.asarray((counts.X > 0).sum(1)).ravel() >= 8
    assert 0.7 * enough.sum() < out.uns["distdiff"]["cells_trained_on"] <= model.seen.cells
    lacking = model.impute(adata[:, :20].copy(), mean_only=True)
    assert lacking.uns["distdiff"]["cells_trained_on"] == 0
    assert "lacks 10 of the model's genes" in lacking.uns["distdiff"]["cells_trained_on_unknown"]


def test_evaluation_leaves_out_what_was_trained_on(counts, trained, tmp_path):
    model, run = trained
    own = distdiff.CountStore.open(run / "atlas.zarr")
    mixed = distdiff.CountStore.open(run / "atlas.zarr")
    options = {"cells": 40, "repaint_steps": 0, "draws": 2}
    assert distdiff.evaluate(model, own, **options).setting["trained_on"] == 0
    test, train = own.rows("test"), own.rows("train")

    class Planted:
        """The store, with training cells among its test cells."""

        def __getattr__(self, name):
            return getattr(mixed, name)

        def rows(self, split):
            return np.sort(np.r_[test, train[:3]]) if split == "test" else mixed.rows(split)

    from distdiff import heldout

    rows, about = heldout.not_trained_on(Planted(), model, Planted().rows("test"), keep=False)
    assert about == {"trained_on": 3, "trained_on_kept": False}
    assert rows.tolist() == test.tolist()
    kept, about = heldout.not_trained_on(Planted(), model, Planted().rows("test"), keep=True)
    assert len(kept) == len(test) + 3
    assert about["trained_on_kept"]
    with pytest.raises(ValueError, match=r"trained on all 3 test cells .* \(keep_trained=True\)"):
        heldout.not_trained_on(Planted(), model, train[:3], keep=False)


def test_opting_out_and_models_without_a_filter(counts, trained, tmp_path):
    from distdiff import experiment

    store = distdiff.CountStore.open(trained[1] / "atlas.zarr")
    assert experiment.cells_seen(store, "none") is None
    with pytest.raises(ValueError, match=r"train\.manifest=salted: set DISTDIFF_SALT"):
        experiment.cells_seen(store, "salted")
    model = distdiff.load(trained[1] / "model")
    model.seen = None
    model.save(tmp_path / "old")
    assert not (tmp_path / "old" / FILE).exists()
    old = distdiff.load(tmp_path / "old")
    assert old.seen is None
    out = old.impute(counts[:5].copy(), mask=np.ones((5, 30), bool), mean_only=True)
    assert "holds no filter" in out.uns["distdiff"]["cells_trained_on_unknown"]


def _resealed(folder, **seen):
    card = json.loads((folder / "model.json").read_text())
    card.pop(saved.SEAL)
    card["info"]["seen"] |= seen
    (folder / "model.json").write_text(json.dumps(saved.sealed(card)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / FILE).unlink(), "is missing; copy the folder again"),
        (lambda f: (f / FILE).write_bytes(b"x" * 99), "is not the file that was saved"),
        (lambda f: save_file({"bits": np.zeros(600, np.uint8)}, f / FILE), "is not the file that was saved"),
        (lambda f: _resealed(f, cells=10**12), r"\d+ are wanted for 10+ cells"),
        (lambda f: _resealed(f, cells="many"), "info.seen must hold a number of cells"),
        (lambda f: _resealed(f, sha256=7), "is not the file that was saved"),
    ],
)
def test_a_damaged_filter_is_one_sentence(trained, tmp_path, damage, words):
    folder = distdiff.load(trained[1] / "model").save(tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=rf"the model in .* is damaged: .*{words}") as error:
        distdiff.load(folder)
    assert "\n" not in str(error.value)
