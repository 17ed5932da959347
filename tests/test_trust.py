"""What somebody sent runs no code: kinds of a model are built-in names, unless its user trusts the package."""

from __future__ import annotations

import ast
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest

import distdiff
from distdiff import cli, component, config, experiment, heldout
from distdiff.data.store.store import CountStore
from distdiff.model import Model

MODULE = '''
from dataclasses import dataclass

from distdiff.denoise.mlp import MLP
from distdiff.process.counts import Counts
from distdiff.process.schedule import Linear


@dataclass(frozen=True)
class Law(Counts):
    """Counts by another name."""


class Network(MLP):
    """A perceptron by another name."""


@dataclass(frozen=True)
class Times(Linear):
    """Linear by another name."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that must not be imported unasked."""
    folder = tmp_path / "site" / "sentalong"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "laws.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield "sentalong"
    for name in [name for name in sys.modules if name.partition(".")[0] == "sentalong"]:
        del sys.modules[name]


@pytest.fixture
def saved(atlas, tmp_path):
    model = Model.new(CountStore.open(atlas).spec(()), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    model.info |= {"config": {"data": {"store": str(atlas)}}, "data": CountStore.open(atlas).manifest.fingerprint}
    return model.save(tmp_path / "model")


def asks(folder: Path, part: str, options: dict) -> Path:
    card = json.loads((folder / "model.json").read_text())
    card[part] |= options
    del card["sha256"]  # as a model of a version that wrote no hash, or of somebody who can make one
    (folder / "model.json").write_text(json.dumps(card))
    return folder


PLACES = {
    "process": ("process", {"kind": "sentalong.laws:Law"}),
    "denoiser": ("denoiser", {"kind": "sentalong.laws:Network"}),
    "schedule": ("process", {"schedule": "sentalong.laws:Times"}),
    "discrete schedule": ("process", {"schedule": "sentalong.laws:Times@10"}),
    "schedule with options": ("process", {"schedule": {"kind": "sentalong.laws:Times", "times": 10}}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_model_imports_nothing_that_its_user_does_not_trust(place, saved, package):
    asks(saved, *PLACES[place])
    for trust in ((), ("sentalon",), ("laws",), ("sentalong.law",), "s"):
        with pytest.raises(component.Untrusted, match=r"code of the module 'sentalong.laws'.*trust=\['sentalong'\]"):
            distdiff.load(saved, trust=trust)
        assert not [name for name in sys.modules if name.startswith("sentalong")]
    for trust in (("sentalong",), ["other", "sentalong.laws"], "sentalong"):
        assert Model.load(saved, trust=trust).spec.n_genes == 30
    assert "sentalong.laws" in sys.modules


def _train(saved, atlas, tmp_path, **trust):
    tree = {
        "data": {"store": str(atlas)}, "denoiser": {"kind": "mlp", "width": 8, "depth": 1},
        "train": {"out": str(tmp_path / "run"), "cells": 32, "batch": 32, "start": str(saved)},
        "tracking": {"enabled": False}, "evaluate": {"enabled": False},
    }  # fmt: skip
    experiment.train(config.parse(tree), **trust)


def _compare(saved, atlas, tmp_path, *, new, **trust):
    """The model is a new one, or the champion."""
    other = Model.load(saved, trust=("sentalong",))
    for name in [name for name in sys.modules if name.startswith("sentalong")]:
        del sys.modules[name]
    plain = Model(other.process, other.denoiser, other.spec, other.options, other.info)
    plain.options = {"process": {"kind": "counts"}, "denoiser": {"kind": "mlp", "width": 8, "depth": 1}}
    plain.save(tmp_path / "plain")
    heldout.compare(*((saved, tmp_path / "plain") if new else (tmp_path / "plain", saved)), **trust)


def _command(saved, atlas, tmp_path, *, words, **trust):
    for name in trust.get("trust", ()):
        words = [*words, "--trust", name]
    paths = {"ATLAS": str(atlas), "MODEL": str(saved), "OUT": str(tmp_path / "out.zarr")}
    try:
        cli.main([paths.get(word, word) for word in words])
    except SystemExit as left:
        if left.code:
            raise component.Untrusted("left with an error") from None


def _pyfunc(saved, atlas, tmp_path, **trust):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of its own hints
        from distdiff.tracking.pyfunc import ImputationModel

    context = type("Context", (), {"artifacts": {"model": str(saved)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTDIFF_TRUST", ",".join(trust.get("trust", ())))
        ImputationModel().load_context(context)


WAYS = {
    "train.start": _train,
    "the new one of a comparison": partial(_compare, new=True),
    "the champion of a comparison": partial(_compare, new=False),
    "pyfunc": _pyfunc,
    "generate": partial(_command, words=["generate", "--model", "MODEL", "--n", "3", "--out", "OUT"]),
    "evaluate": partial(_command, words=["evaluate", "--model", "MODEL", "--data", "ATLAS", "--repaint-steps", "0"]),
    **{name: partial(_command, words=[name, "--model", "MODEL", "--data", "ATLAS", "--out", "OUT", *more])
       for name, more in {"denoise": [], "deepen": ["--times", "1", "--beyond", "allow"],
                          "impute": ["--mask", "MASK"]}.items()},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_no_way_in_imports_it_and_every_way_in_can_be_told_to(way, saved, atlas, package, tmp_path):
    import numpy as np

    np.save(tmp_path / "mask.npy", np.ones((199, 30), dtype=bool))
    asks(saved, *PLACES["schedule"])
    do = WAYS[way]
    if way == "impute":
        words = [str(tmp_path / "mask.npy") if word == "MASK" else word for word in do.keywords["words"]]
        do = partial(_command, words=words)
    with pytest.raises(component.Untrusted):
        do(saved, atlas, tmp_path)
    assert not [name for name in sys.modules if name.startswith("sentalong")]
    do(saved, atlas, tmp_path, trust=("sentalong",))
    assert "sentalong.laws" in sys.modules


@pytest.mark.parametrize(
    "kind", ["os", "..", "../../x", "counts.counts", "counts/../counts", "_laws", "", "schedule", 3, None, ["counts"],
             {"a": 1}, "distdiff.process.counts:Counts", ":", ":X", "a:b:c", ".counts:Counts"],
)  # fmt: skip
@pytest.mark.parametrize("part", ["process", "denoiser"])
def test_a_kind_is_the_name_of_a_file_and_nothing_else(part, kind, saved):
    asks(saved, part, {"kind": kind})
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"kind|asks for code of the module"):
        distdiff.load(saved)
    assert not [name for name in set(sys.modules) - before if not name.startswith("distdiff.")]


def test_nothing_else_imports_by_name():
    """Every import of a name that is not in the source goes through ``component``, where trust is asked for."""
    root, found = Path(distdiff.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in {"import_module", "__import__", "entry_points", "exec", "run_path", "spec_from_file_location",
                        "unpickle", "pickle"}:  # fmt: skip
                found.add(path.relative_to(root).as_posix())
    assert found == {"component.py", "__init__.py"}  # the second takes names from a table of its own


def test_a_run_of_ones_own_kinds_trains_is_scored_and_goes_on(atlas, package, tmp_path):
    tree = {
        "data": {"store": str(atlas)}, "process": {"kind": "sentalong.laws:Law", "schedule": "sentalong.laws:Times"},
        "denoiser": {"kind": "sentalong.laws:Network", "width": 8, "depth": 1},
        "train": {"out": str(tmp_path / "run"), "cells": 64, "batch": 32, "checkpoint_cells": 32},
        "tracking": {"enabled": False}, "evaluate": {"cells": 10, "repaint_steps": 0},
    }  # fmt: skip
    assert experiment.train(config.parse(tree)).report is not None
    again = experiment.train(config.parse(tree))  # from its last checkpoint
    with pytest.raises(component.Untrusted):
        distdiff.load(again.model)
    assert distdiff.load(again.model, trust=("sentalong",)).options["process"]["kind"] == "sentalong.laws:Law"
