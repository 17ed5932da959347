from __future__ import annotations

from pathlib import Path

import pytest

from distdiff import config
from distdiff.component import build
from distdiff.process import Process

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_repository_is_valid_and_complete(path):
    loaded = config.load(path)
    import yaml

    assert yaml.safe_load(path.read_text()).keys() == loaded.as_dict().keys()
    assert config.parse(loaded.as_dict()) == loaded


def test_the_quickstart_is_the_experiment_of_its_config(tmp_path):
    from distdiff import quickstart

    written = config.load(ROOT / "configs" / "pbmc68k.yaml")
    made = config.parse(quickstart.settings(Path(written.data.store), Path(written.train.out), "bulk_labels", "x"))
    assert made.identity() == written.identity()
    assert made.evaluate == written.evaluate
    assert made.train.eval_cells == written.train.eval_cells


def test_overrides_are_typed():
    c = config.load(
        None, ["data.store=x.zarr", "optim.lr=1e-4", "train.cells=100", "data.labels=[a, b]", "denoiser.width=8"]
    )
    assert (c.optim.lr, c.train.cells, c.data.labels, c.denoiser["width"]) == (1e-4, 100, ("a", "b"), 8)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optm.lr=1"], "unknown key 'optm'; did you mean 'optim'"),
        (["optim.rl=1"], "optim: unknown key 'rl'; did you mean 'lr'"),
        (["process.kind=count"], "unknown process kind 'count'; did you mean 'counts'"),
        (["process.weight=papper"], "weight='papper'; did you mean 'paper'"),
        (["denoiser.kind=mlp", "denoiser.widht=3"], "unknown option 'widht'; did you mean 'width'"),
        (["train.precision=bf61"], "train.precision='bf61': .*did you mean 'bf16'"),
        (["train.batch=many"], "train.batch='many'"),
        (["train.cells=0"], "train.cells must be at least 1, got 0"),
        (["evaluate.protocol=mcra"], "did you mean 'mcar'"),
        (["optim.lr"], "must read key=value"),
        (["data.store.x=1"], "'store' is a value, not a section"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_word(overrides, words):
    with pytest.raises(ValueError, match=words):
        config.load(None, ["data.store=x.zarr", *overrides])


def test_missing_store_and_file():
    with pytest.raises(ValueError, match=r"data is missing|data.store is missing"):
        config.load(None, [])
    with pytest.raises(ValueError, match="does not exist"):
        config.load("nowhere.yaml")


def test_identity_leaves_out_what_does_not_shape_the_weights():
    a = config.load(None, ["data.store=x.zarr", "train.out=a", "train.resume=never"])
    b = config.load(None, ["data.store=x.zarr", "train.out=b"])
    c = config.load(None, ["data.store=x.zarr", "optim.lr=1e-5"])
    assert a.identity() == b.identity()
    assert a.identity() != c.identity()
    assert a.digest() != b.digest()


def test_scores_of_other_labels_do_not_compare():
    """Validation tells the labels, which were made from the counts that are hidden."""
    plain, told = (config.load(None, ["data.store=x.zarr", f"data.labels={x}"]) for x in ("[]", "[cell_type]"))
    assert plain.comparable("val/deviance") != told.comparable("val/deviance")


def test_a_component_from_outside_the_tree(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("from distdiff.process.counts import Counts\nclass Mine(Counts): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(build(Process, {"kind": "elsewhere:Mine", "head": "mean"})).__name__ == "Mine"
