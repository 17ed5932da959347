from __future__ import annotations

from pathlib import Path

import pytest

from distdiff import config
from distdiff.component import build
from distdiff.grid import spec as grid_spec
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


def test_the_registry_has_a_name_for_each_store():
    auto = config.Tracking()
    assert [auto.named(data).model for data in ("mine.zarr", "a:b'c")] == ["distdiff-mine", "distdiff-a-b-c"]
    assert config.Tracking(model="pbmc").named("mine.zarr").model == "pbmc"


def test_overrides_are_typed():
    c = config.load(
        None, ["data.store=x.zarr", "optim.lr=1e-4", "train.cells=100", "data.labels=[a, b]", "denoiser.width=8"]
    )
    assert (c.optim.lr, c.train.cells, c.data.labels, c.denoiser["width"]) == (1e-4, 100, ("a", "b"), 8)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("loader.resident=no", ("loader", "resident"), "no"),
        ("loader.resident=yes", ("loader", "resident"), "yes"),
        ("train.out=12345", ("train", "out"), "12345"),
        ("train.out=2024-01-02", ("train", "out"), "2024-01-02"),
        ("train.out=1e5", ("train", "out"), "1e5"),
        ("train.out=nan", ("train", "out"), "nan"),
        ("train.start=", ("train", "start"), ""),
        ("tracking.model=null", ("tracking", "model"), "null"),
        ("data.labels=cell_type", ("data", "labels"), ("cell_type",)),
        ("data.labels=cell_type, donor", ("data", "labels"), ("cell_type", "donor")),
        ("data.labels=[no, 1]", ("data", "labels"), ("no", "1")),
        ("data.labels=", ("data", "labels"), ()),
        ("evaluate.cell_type=1", ("evaluate", "cell_type"), "1"),
        ("evaluate.cell_type=null", ("evaluate", "cell_type"), None),
        ("train.compile=yes", ("train", "compile"), True),
        ("train.cells=1e5", ("train", "cells"), 100_000),
        ("loader.weights=0.5", ("loader", "weights"), 0.5),
        ("denoiser.width=1e2", ("denoiser", "width"), 100),
        ("process.schedule=cosine", ("process", "schedule"), "cosine"),
        ("train.out=~/x", ("train", "out"), "/home/me/x"),
        ("train.start=~/x", ("train", "start"), "/home/me/x"),
        ("train.resume=~/x", ("train", "resume"), "/home/me/x"),
    ],
)
def test_values_are_read_as_their_key_wants_them(tmp_path, monkeypatch, override, key, value):
    """On the command line and in a file, where ``no`` and ``12345`` are no text to YAML."""
    monkeypatch.setenv("HOME", "/home/me")
    path, _, word = override.partition("=")
    section, name = path.split(".")
    given = [config.load(None, ["data.store=~/x.zarr", override])]
    if word and word != "cell_type, donor":
        tree = f"data:\n  store: ~/x.zarr\n{f'{section}:' if section != 'data' else ''}\n  {name}: {word}\n"
        (tmp_path / "c.yaml").write_text(tree)
        given.append(config.load(tmp_path / "c.yaml"))
    for made in given:
        found = getattr(made, key[0])
        assert (found[key[1]] if isinstance(found, dict) else getattr(found, key[1])) == value
        assert made.data.store == "/home/me/x.zarr"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.rate=2", "evaluate.rate must lie between 0 and 1, got 2"),
        ("evaluate.rate=nan", "evaluate.rate must lie"),
        ("evaluate.draws=1", "evaluate.draws must be at least 2"),
        ("evaluate.cells=0", "evaluate.cells must be at least 1"),
        ("evaluate.repaint_steps=-1", "evaluate.repaint_steps at least 0"),
        ("evaluate.protocol=paper", "needs the label of the cell groups"),
        ("optim.lr=-1", "optim.lr must be above 0"),
        ("optim.lr=nan", "optim.lr must be above 0"),
        ("optim.weight_decay=-1", "optim.weight_decay not below"),
        ("optim.clip=-1", "optim.clip must be above 0"),
        ("optim.clip=nan", "optim.clip must be above 0"),
        ("optim.warmup_cells=-1", "optim.warmup_cells not below"),
        ("optim.ema=2", r"optim.betas and optim.ema must lie in \[0, 1\)"),
        ("optim.betas=[2, 2]", r"optim.betas and optim.ema must lie in \[0, 1\)"),
        ("survival.hidden=nan", "survival shares must be >= 0"),
        ("survival.target_share=[0.5, nan]", "survival target_share"),
        ("denoiser.depth=-1", "denoiser.depth must be a whole number >= 1, got -1"),
        ("denoiser.width=1.5", "denoiser.width must be a whole number >= 1, got 1.5"),
        ("denoiser.width=no", "denoiser.width must be a whole number >= 1, got False"),
        ("denoiser.rank=-1", "denoiser.rank must be a whole number >= 0, got -1"),
        ("process.loadings=-3", "process.loadings must be a whole number"),
        ("denoiser={kind: csdi, dropout: 1.5}", "denoiser.dropout must be between 0 and 0.99, got 1.5"),
        ("process={kind: jump, scale: 1.0e-320}", "process.scale must be between 1e-06 and 1e"),
        ("process.own=2", "process.own must be yes or no"),
        ("loader.weights=nan", "loader.weights must be finite"),
        ("train.seed=-1", "train.seed in"),
        ("train.seed=99999999999999999999", "train.seed"),
        ("train.cells=1000000000000000000000000000000", "train.cells"),
        ("train.minutes=nan", "train.minutes not below"),
        ("train.checkpoint_minutes=nan", "train.checkpoint_minutes must be above"),
        ("train.label_dropout=nan", "train.label_dropout must lie"),
        ("train.out=", "train.out must be a folder"),
        ("data.store=", "data.store must be"),
        ("data.labels=[a, a]", "data.labels must name each label once"),
        ("tracking.model=a/b", "tracking.model must be a name .* none of /"),
        ("tracking.model=it's", "tracking.model must be a name"),
        ("tracking.experiment=", "tracking.experiment must be a name"),
    ],
)
def test_every_value_is_checked_when_it_is_read(override, words):
    with pytest.raises(ValueError, match=words):
        config.load(None, ["data.store=x.zarr", override])


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
        (["train.cells=-1"], "train.cells must be a number of cells or auto, got -1"),
        (["evaluate.protocol=mcra"], "did you mean 'mcar'"),
        (["optim.lr"], "must read key=value"),
        (["data.store.x=1"], "'store' is a value, not a section"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_word(overrides, words):
    with pytest.raises(ValueError, match=words):
        config.load(None, ["data.store=x.zarr", *overrides])


def test_a_section_that_is_empty_holds_the_defaults_and_a_key_stands_once(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {store: x.zarr}\ntrain:\noptim:\n  # lr: 1\n")
    assert config.load(tmp_path / "c.yaml") == config.load(None, ["data.store=x.zarr"])
    assert config.load(tmp_path / "c.yaml", ["train.cells=64"]).train.cells == 64
    (tmp_path / "c.yaml").write_text("data: {store: x.zarr}\ntrain: {cells: 1, cells: 2}\n")
    with pytest.raises(ValueError, match=r"line 2, column 19: the key 'cells' stands twice"):
        config.load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("data: {store: x.zarr}\noptim: {lr: yes}\n")
    with pytest.raises(ValueError, match=r"optim.lr must be a number, got True"):
        config.load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(
        "base: &b {cells: 64}\n".replace("base", "train") + "data: {store: x.zarr}\n"
        "loader: {weights: {no: 1.0, 3: 2.0}, strata: kind}\n"
    )
    assert config.load(tmp_path / "c.yaml").loader.weights == {"no": 1.0, "3": 2.0}


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
    d = config.load(None, ["data.store=x.zarr", "train.out=a", "train.graph=true"])
    e = config.load(None, ["data.store=x.zarr", "train.out=a", "train.noise=rows"])
    assert a.identity() == d.identity() != e.identity()
    assert "noise" not in a.identity()["train"]  # checkpoints from before there was a choice go on


def test_scores_of_other_labels_do_not_compare():
    """Validation tells the labels, which were made from the counts that are hidden."""
    plain, told = (config.load(None, ["data.store=x.zarr", f"data.labels={x}"]) for x in ("[]", "[cell_type]"))
    assert plain.comparable("val/deviance") != told.comparable("val/deviance")


def test_a_component_from_outside_the_tree(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("from distdiff.process.counts import Counts\nclass Mine(Counts): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(build(Process, {"kind": "elsewhere:Mine", "head": "mean"})).__name__ == "Mine"


def test_a_key_of_several_types_names_them_all():
    with pytest.raises(ValueError, match=r"train\.graph='maybe': .*valid boolean.*; or Input should be 'auto'$"):
        config.load("default", ["data.store=x.zarr", "train.graph=maybe"])
    with pytest.raises(ValueError, match=r"train\.\w+='x': [^;]*$"):  # two keys are wrong: one is named
        config.load("default", ["data.store=x.zarr", "train.keep=x", "train.patience=x"])


def test_a_folder_of_results_does_not_hide_what_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "light"):
        (tmp_path / name).mkdir()
    assert config.load("digits").denoiser["kind"] == "unet"
    assert len(grid_spec.read("light", data=["a.zarr"]).rows) > 5
