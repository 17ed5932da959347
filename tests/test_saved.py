"""A model folder that is damaged, or made to harm, is refused in one sentence; no task writes what is not finite."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distdiff import batch, received
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.tracking.predict import predict

OPTIONS = ({"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1})


@pytest.fixture(scope="module")
def model(atlas):
    return Model.new(CountStore.open(atlas).spec(("cell_type",)), *OPTIONS)


def unsealed(folder):
    """The card of a model of a version that wrote no hash of it."""
    card = json.loads((folder / "model.json").read_text())
    del card["sha256"]
    return card


def resaved(folder, tensors):
    """Other weights in a model's folder, and the sum that belongs to them."""
    save_file(tensors, folder / "weights.safetensors")
    card = unsealed(folder)
    card["info"]["weights_sha256"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(card))


def test_any_flipped_bit_of_the_weights_is_refused(model, tmp_path):
    model.save(tmp_path / "model")
    file = tmp_path / "model" / "weights.safetensors"
    content, rng = file.read_bytes(), np.random.default_rng(0)
    for at in (*range(0, 24, 3), *rng.integers(24, len(content), 40)):
        harmed = bytearray(content)
        harmed[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(harmed)
        with pytest.raises(ValueError, match=r"model is damaged: .*(not the file that was saved|cannot be read)"):
            Model.load(tmp_path / "model")
    for piece in (b"", content[:100], content[:-1], content + b"x"):
        file.write_bytes(piece)
        with pytest.raises(ValueError, match="is damaged"):
            Model.load(tmp_path / "model")
    other = Model.new(model.spec, *OPTIONS, seed=1).save(tmp_path / "other")
    shutil.copy(other / "weights.safetensors", file)  # of the same shape
    with pytest.raises(ValueError, match="is not the file that was saved with model"):
        Model.load(tmp_path / "model")
    file.write_bytes(content)
    assert Model.load(tmp_path / "model").info["weights_sha256"] == model.info["weights_sha256"]


def drop(name):
    return lambda t: t.pop(name)


def put(name, tensor):
    return lambda t: t.__setitem__(name, tensor)


def one(name, value):
    return lambda t: t[name].view(-1).__setitem__(0, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one("network.answer.weight", float("nan")), "network.answer.weight holds 1 numbers that are not finite"),
        (one("network.answer.weight", float("-inf")), "network.answer.weight holds 1 numbers that are not finite"),
        (one("spec.gene_mean", float("nan")), "spec.gene_mean holds 1"),
        (one("spec.gene_mean", -1.0), "spec.gene_mean holds numbers that are negative"),
        (drop("spec.gene_mean"), "spec.gene_mean is missing"),
        (put("spec.gene_mean", torch.ones(3)), r"spec.gene_mean has shape \[3\] of torch.float32, \[30\] real"),
        (drop("network.answer.weight"), "tensor answer.weight is missing"),
        (put("network.answer.weight", torch.ones(2, 3)), r"tensor answer.weight has shape \[2, 3\], \["),
        (put("network.more", torch.ones(2)), "tensor more is not part of this model"),
        (put("more", torch.ones(2)), "tensor more is not part of this model"),
        (lambda t: t.clear(), "spec.gene_mean is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, tmp_path, change, words):
    folder = model.save(tmp_path / "model")
    tensors = load_file(folder / "weights.safetensors")
    change(tensors)
    resaved(folder, tensors)
    with pytest.raises(ValueError, match=f"is damaged: .*{words}"):
        Model.load(folder)


def test_a_weight_of_the_own_count_that_older_models_hold_is_not_used(model, tmp_path):
    folder = model.save(tmp_path / "model")
    tensors = load_file(folder / "weights.safetensors")
    resaved(folder, {**tensors, "shrink": torch.full((30,), torch.inf)})
    assert Model.load(folder).fingerprint() == model.fingerprint()


def at(path, value):
    *parents, last = path.split(".")

    def do(card):
        for parent in parents:
            card = card[parent]
        card[last] = value

    return do


@pytest.mark.parametrize("part", ["format", "process", "denoiser", "genes", "labels", "info"])
@pytest.mark.parametrize("value", [None, True, 3.5, "x", [], [[]], {"a": 1}, 10**30, "gone"])
def test_a_card_of_wrong_types_is_one_sentence(model, tmp_path, part, value):
    folder = model.save(tmp_path / "model")
    card = unsealed(folder)
    card.pop(part) if value == "gone" else card.update({part: value})
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"is damaged: .|has model format") as told:
        Model.load(folder)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (at("genes", ["g"] * 30), "holds a name twice"), (at("genes", list(range(30))), "must be names"),
        (at("genes", [["g"]] * 30), "must be names"), (at("labels.cell_type", 3), "must be a list"),
        (at("labels.cell_type", [1, 2]), "must be names"), (at("info.depth", "x"), "info.depth must be a mapping"),
        (at("info.depth", {"q01": "x"}), "info.depth must hold finite"), (at("info.config", []), "info.config must"),
        (at("info.config", {"train": 3}), "info.config.train"), (at("info.name", 3), "info.name must be text"),
        (at("info.excess", {"p": [0.1], "impute": [1]}), "of one length"), (at("info.nats", {}), "info.nats"),
        (at("info.training", {"cells": 1.5}), "whole numbers of cells"),
        (at("info.training", {"cells": 3, "labels": {"cell_type": 3}}), "map labels to numbers"),
        (at("info.training", {"cells": 3, "labels": {"cell_type": {"B": -1}}}), "whole numbers of cells"),
        (at("info.training", {"cells": 3, "depth": [2.0, 1.0]}), "info.training.depth must ascend"),
        (at("info.training", {"cells": 3, "depth": ["x"]}), "must hold finite"),
        (lambda card: card["genes"].reverse(), "not those that the weights were saved with"),
        (lambda card: card["labels"]["cell_type"].reverse(), "not those that the weights were saved with"),
        (at("genes", [f"other{i}" for i in range(30)]), "not those that the weights were saved with"),
        (at("info.weights_sha256", "0" * 64), "is not the file"), (at("info.weights_sha256", None), "is not the file"),
        (at("denoiser.depth", 10**12), "tensors"), (at("denoiser.width", 10**7), "tensor of shape"),
        (at("denoiser.width", 10**12), "tensor of shape"), (at("denoiser.width", 8), "has shape"),
        (at("denoiser.width", "x"), "."), (at("denoiser.width", float("nan")), "an option is nan"),
        (at("denoiser.zzz", 1), "unknown option"), (at("process.schedule", "fisher@1000000000000"), "times at most"),
        (at("process.schedule", [1, float("nan"), 0]), "."), (at("process.schedule", [0.5] * 10_000), "."),
        (at("process.schedule", {"kind": ["x"]}), "kind must be a name"), (at("process.head", ["x"]), "."),
    ],
)  # fmt: skip
def test_a_card_that_asks_for_the_absurd_is_refused_at_once(model, tmp_path, change, words):
    folder = model.save(tmp_path / "model")
    card = unsealed(folder)
    change(card)
    (folder / "model.json").write_text(json.dumps(card))
    began = time.process_time()
    with pytest.raises(ValueError, match=f"is damaged: .*{words}"):
        Model.load(folder)
    assert time.process_time() - began < 2


def test_a_card_is_under_its_own_hash_and_one_without_loads(model, tmp_path):
    folder = model.save(tmp_path / "model")
    whole = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(unsealed(folder)))
    assert Model.load(folder).info == model.info
    for card in (whole | {"info": whole["info"] | {"store": "other"}}, whole | {"sha256": "0" * 64}):
        (folder / "model.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match=r"model.json was changed or damaged after it was written"):
            Model.load(folder)
    (folder / "model.json").write_text(json.dumps({"sha257" if k == "sha256" else k: v for k, v in whole.items()}))
    with pytest.raises(ValueError, match=r"unknown key 'sha257'; did you mean 'sha256'"):
        Model.load(folder)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_a_file_of_a_model_is_a_file(model, tmp_path, name):
    folder = model.save(tmp_path / "model")
    texts = {b"": "", b"[" * 100_000 + b"]" * 100_000: "64 levels", b"\xff\xfe": "", b'{"a": ' + b"[" * 70 + b"]" * 70 +
             b"}": "64 levels", b"1" * 5000: "", b"\x80\x04cos\nsystem\n(S'touch x'\ntR.": ""}  # fmt: skip
    for text, words in texts.items():
        (folder / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"is damaged: .*{words if name == 'model.json' else ''}"):
            Model.load(folder)
    for make in (os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p.name)):
        (folder / name).unlink() if not (folder / name).is_dir() else (folder / name).rmdir()
        make(folder / name)
        with pytest.raises(ValueError, match=r"is damaged: .*cannot be read"):
            Model.load(folder)
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(received.LARGEST + 1)
    with pytest.raises(ValueError, match=r"is damaged: .*cannot be read"):
        Model.load(folder)


def test_no_task_writes_a_number_that_is_not_finite(model, counts, tmp_path):
    """Weights that are finite, but so large that the answer is not."""
    wild = Model.new(model.spec, *OPTIONS)
    with torch.no_grad():
        for weights in wild.denoiser.parameters():
            weights.fill_(3e38)
    wild = Model.load(wild.save(tmp_path / "wild"))
    given, hidden, out = tmp_path / "in.h5ad", tmp_path / "mask.npy", tmp_path / "out.zarr"
    mask = mcar(counts.shape, 0.5, np.random.default_rng(0))
    counts.write_h5ad(given)
    np.save(hidden, mask)
    means = {"impute": {"mask": str(hidden), "layers": ("mean",)}, "denoise": {}}
    ways = {
        "impute": lambda: wild.impute(counts, mask=mask),
        "mean only": lambda: wild.impute(counts, mask=mask, mean_only=True),
        "denoise": lambda: wild.denoise(counts),
        "deepen": lambda: wild.deepen(counts, 2, beyond="allow"),
        "generate": lambda: wild.generate(3),
        "likelihood": lambda: wild.likelihood(counts),
        "predict": lambda: predict(wild, counts.to_df().iloc[:, :5]),
        **{f"{kind} {sparse} {dtype}": functools.partial(batch.run, kind, wild, given, out, progress=False,
                                                         sparse=sparse, dtype=dtype, **means[kind])
           for kind in ("impute", "denoise") for sparse in (True, False) for dtype in ("float32", "int32")},
        "deepen a file": lambda: batch.run("deepen", wild, given, out, times=2, beyond="allow", progress=False),
        "generate a file": lambda: batch.generate_file(wild, 3, out, progress=False),
    }  # fmt: skip
    for name, way in ways.items():
        with pytest.raises(
            ArithmeticError, match=r"row \d+, column \d+ is (nan|inf|-inf), no finite|no draw .*not finite"
        ):
            way()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "mask.npy", "wild"], name
    with torch.no_grad():
        next(wild.denoiser.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        wild.save(tmp_path / "wilder")
    assert not (tmp_path / "wilder").exists()
