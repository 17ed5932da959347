"""Checkpoints: exact, whole or invisible, written beside the training, shared out over processes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from distdiff import config, experiment, received
from distdiff.training import checkpoint, engine
from distdiff.training.ema import Ema
from distdiff.training.optim import Optim
from distdiff.training.progress import Progress

ONE = {"weights": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}, "optimizer": {"a/step": torch.ones(())}}


def prepared(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    return engine.prepare(Accelerator(cpu=True), network, Optim(), share=2, accumulate=1)


def trained(steps=3, seed=0):
    made = prepared(seed)
    for _ in range(steps):
        with made.one_pass():
            made.accelerator.backward(made.network(torch.ones(2, 3)).sum())
        made.step()
    return made


def write(folder, step, tensors=ONE, state=None, best=0, **how):
    with checkpoint.Writer(folder, **how) as writer:
        writer.save(step, tensors, state or {}, best)
    return checkpoint.latest(folder)


def test_checkpoint_brings_back_weights_average_and_optimiser_exactly(tmp_path):
    one, ema = trained(), Ema(trained(2).bare, 0.9)
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(3, checkpoint.snapshot(one, ema.model, writer), {"config": {"a": 1}, "progress": {}}, 0)
    saved = checkpoint.load(checkpoint.latest(tmp_path), {"config": {"a": 1}})
    other = prepared(1)
    other.bare.load_state_dict(saved.weights)
    other.load(saved.optimizer)
    assert saved.state["step"] == 3
    assert all(torch.equal(saved.ema[k], v) for k, v in ema.model.state_dict().items())
    for made in (one, other):
        with made.one_pass():
            made.accelerator.backward(made.network(torch.ones(2, 3)).sum())
        made.step()
    assert all(torch.equal(x, y) for x, y in zip(one.bare.parameters(), other.bare.parameters(), strict=True))
    assert {p.suffix for p in saved.path.iterdir()} == {".json", ".safetensors"}


def test_a_half_written_checkpoint_is_invisible_and_the_error_is_not_lost(tmp_path, monkeypatch):
    first = write(tmp_path, 3)

    def dies(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="power cut"):
        write(tmp_path, 6)
    writer = checkpoint.Writer(tmp_path)
    writer.save(6, ONE, {}, 0)
    with pytest.raises(OSError, match="power cut"):  # told at the next save, at the latest
        writer.save(9, ONE, {}, 0)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_training_waits_for_the_copy_alone(tmp_path, monkeypatch):
    made, gate, real = trained(), threading.Event(), checkpoint.save_file

    def slow(*args):
        assert gate.wait(20)
        real(*args)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    before = {k: v.clone() for k, v in made.bare.state_dict().items()}
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(3, checkpoint.snapshot(made, made.bare, writer), {}, 0)
        with torch.no_grad():
            for w in made.bare.parameters():
                w.add_(1)  # training goes on while nothing is on disk yet
        assert checkpoint.latest(tmp_path) is None
        gate.set()
    assert all(torch.equal(v, before[k]) for k, v in checkpoint.load(checkpoint.latest(tmp_path), {}).weights.items())


def test_the_newest_and_the_first_since_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 10, 11):
        write(tmp_path, step, best=3 if step > 3 else 0, keep=2)
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["03", "10", "11"]
    assert checkpoint.find("auto", tmp_path).name == "step-000000011"
    assert checkpoint.find("never", tmp_path) is None


def test_processes_share_the_writing_and_one_that_does_not_come_is_told(tmp_path, monkeypatch):
    made, tensors = trained(), {}
    writers = [checkpoint.Writer(tmp_path, process=i, processes=3, launch="x") for i in range(3)]
    for writer in writers:
        tensors[writer.process] = checkpoint.snapshot(made, made.bare, writer)
    names = [set(tensors[i]["weights"]) for i in range(3)]
    assert set.union(*names) == set(made.bare.state_dict())
    assert sum(map(len, names)) == len(made.bare.state_dict())
    for writer in writers:
        writer.save(3, tensors[writer.process], {}, 0)
    for writer in writers:
        writer.wait()
    path = checkpoint.latest(tmp_path)
    assert len(list(path.glob("weights-*-of-00003.safetensors"))) == 3
    assert load_file(path / "weights-00000-of-00003.safetensors").keys() == names[0]
    saved = checkpoint.load(path, {})
    assert all(torch.equal(saved.weights[k], v) for k, v in made.bare.state_dict().items())
    assert saved.optimizer.keys() == {key for key, _ in made.state()}

    monkeypatch.setattr(checkpoint, "PATIENCE", 0.1)
    writers[0].save(6, tensors[0], {}, 0)
    with pytest.raises(OSError, match=r"of-00003.safetensors of another process did not come"):
        writers[0].wait()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_launch_clears_what_killed_ones_left_and_moves_aside_what_it_will_write_anew(tmp_path):
    for step in (3, 6):
        write(tmp_path, step, state={"config": {}})
    (tmp_path / ".step-000000009.abcd").mkdir()
    found, launch = checkpoint.share(Accelerator(cpu=True), tmp_path, "auto")
    assert (found.name, len(launch)) == ("step-000000006", 8)
    assert len(list(tmp_path.iterdir())) == 2
    found, _ = checkpoint.share(Accelerator(cpu=True), tmp_path, str(tmp_path / "step-000000003"))
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("step-*")] == [
        "step-000000003", "left-1/step-000000006",
    ]  # fmt: skip
    assert checkpoint.share(Accelerator(cpu=True), tmp_path, "never")[0] is None
    assert (tmp_path / "left-2" / "step-000000003" / "state.json").exists()


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def zero(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def edit(change):
    """Change what state.json says and seal it again, as only a person would."""

    def do(path):
        state = json.loads((path / "state.json").read_text())
        del state[checkpoint.SEAL]
        change(state)
        (path / "state.json").write_text(json.dumps({**state, checkpoint.SEAL: checkpoint._seal(state)}))

    return do


def poison(name, tensors):
    """Other tensors in a file, and the sum that belongs to them."""

    def do(path):
        save_file(tensors, path / f"{name}.safetensors")
        sums = list(received.record(path / f"{name}.safetensors"))
        edit(lambda state: state["files"].update({f"{name}.safetensors": sums}))(path)

    return do


DAMAGES = {
    "optimizer gone": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "ema gone": (lambda path: (path / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    "last bit": (lambda path: flip(path / "weights.safetensors"), "weights.safetensors differs from what was written"),
    "header bit": (lambda path: flip(path / "ema.safetensors", 20), "ema.safetensors differs"),
    "zeros": (lambda path: zero(path / "optimizer.safetensors"), "optimizer.safetensors differs"),
    "empty": (lambda path: (path / "weights.safetensors").write_bytes(b""), "weights.safetensors differs"),
    "a pipe": (lambda path: ((path / "ema.safetensors").unlink(), os.mkfifo(path / "ema.safetensors")), "no regular"),
    "state digit": (lambda path: flip(path / "state.json", (path / "state.json").read_bytes().index(b'"step": 3') + 8),
                    "state.json differs"),
    "state cut": (lambda path: (path / "state.json").write_text("{"), "state.json cannot be read"),
    "state deep": (lambda path: (path / "state.json").write_text("[" * 100_000), "more than 64 levels"),
    "state list": (lambda path: (path / "state.json").write_text("[]"), "a mapping is wanted, it holds a list"),
    "no files": (edit(lambda state: state.pop("files")), "lists no weights"),
    "no optimizer": (edit(lambda state: state["files"].pop("optimizer.safetensors")), "lists no optimizer"),
    "a path": (edit(lambda state: state["files"].update({"../../x.safetensors": [1, 1]})), "is no file of a check"),
    "NaN": (poison("weights", {"a": torch.tensor([math.nan])}), "tensor a holds 1 numbers that are not finite"),
    "shape": (poison("ema", {"a": torch.ones(2)}), r"ema: tensor a has shape \[2\], \[1\] is wanted"),
    "name": (poison("weights", {"b": torch.ones(1)}), "weights: tensor a is missing"),
    "more": (poison("weights", {"a": torch.ones(1), "b": torch.ones(1)}), "weights: tensor b is not part"),
    "moments": (poison("optimizer", {"a/exp_avg": torch.ones(3)}), "optimizer: tensor a/exp_avg of shape"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, damage):
    before, path = write(tmp_path, 3), write(tmp_path, 33)
    harm, words = DAMAGES[damage]
    harm(path)
    with pytest.raises(ValueError, match=f"is damaged: .*{words}.*go back.*train.resume={before}, or start anew"):
        checkpoint.load(path, {}, like={"a": torch.ones(1)})
    assert checkpoint.load(before, {}, like={"a": torch.ones(1)}).state["step"] == 3
    shutil.rmtree(before)
    with pytest.raises(ValueError, match=f"is damaged: .*{words}.*; start anew with train.resume=never"):
        checkpoint.load(path, {}, like={"a": torch.ones(1)})


@pytest.mark.parametrize(
    "change", [{"step": "3"}, {"step": True}, {"best": None}, {"history": {}}, {"more": 1}, None, [], "x"]
)
def test_progress_of_another_type_is_refused(tmp_path, change):
    state = {"progress": {**vars(Progress()), **change} if isinstance(change, dict) else change}
    path = write(tmp_path, 3, state=state)
    with pytest.raises(ValueError, match=r"step-000000003: progress"):
        checkpoint.load(path, {}).progress(Progress)
    path = write(tmp_path, 4, state={"progress": {**vars(Progress()), "best": 1}})
    assert checkpoint.load(path, {}).progress(Progress) == Progress(best=1)


def test_a_step_that_lost_its_state_is_written_anew(tmp_path):
    (write(tmp_path, 3) / "state.json").unlink()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.load(write(tmp_path, 3), {}).state["step"] == 3


def test_a_run_goes_back_where_the_refusal_says(atlas, tmp_path):
    tree = {
        "data": {"store": str(atlas)}, "denoiser": {"kind": "mlp", "width": 8, "depth": 1},
        "train": {"out": str(tmp_path), "cells": 160, "batch": 32, "checkpoint_cells": 64, "eval_cells": 320},
        "tracking": {"enabled": False}, "evaluate": {"enabled": False},
    }  # fmt: skip
    outcome = experiment.train(config.parse(tree))
    newest = checkpoint.latest(tmp_path / "checkpoints")
    wanted = load_file(newest / "weights.safetensors")
    flip(newest / "optimizer.safetensors")
    with pytest.raises(ValueError, match="is damaged") as told:
        experiment.train(config.parse(tree))
    tree["train"]["resume"] = re.search(r"train\.resume=([^,]+),", str(told.value))[1]
    assert experiment.train(config.parse(tree)).progress.step == outcome.progress.step
    again = checkpoint.load(newest, {}).weights
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)


def test_another_runs_checkpoint_is_refused_by_name(tmp_path):
    state = {"config": {"optim": {"lr": 0.1}, "train": {"seed": 0}}, "data": "abc"}
    path = write(tmp_path, 3, state=state)
    other = {"config": {"optim": {"lr": 0.2}, "train": {"seed": 0}}}
    with pytest.raises(ValueError, match=r"another config: optim.lr was 0.1, is 0.2; .*train.resume=never"):
        checkpoint.load(path, other)
    assert checkpoint.load(path, other, changed=True).state["step"] == 3  # asked for by its path
    other["config"]["train"]["seed"] = 1
    with pytest.raises(ValueError, match=r"another config: train.seed was 0, is 1"):
        checkpoint.load(path, other, changed=True)
    with pytest.raises(ValueError, match="another data: was 'abc', is 'xyz'"):
        checkpoint.load(path, {"data": "xyz"})
    with pytest.raises(ValueError, match="is no checkpoint folder"):
        checkpoint.find(str(tmp_path / "nowhere"), tmp_path)
    (path / "state.json").write_text(json.dumps({"step": 3}))
    with pytest.raises(ValueError, match=r"has format 1 \(state.json\), this distdiff reads 4"):
        checkpoint.load(Path(path), {})
