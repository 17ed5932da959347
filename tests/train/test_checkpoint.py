"""Checkpoints: exact, whole or invisible, written beside the training, shared out over processes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from distdiff.train import checkpoint, engine
from distdiff.train.ema import Ema
from distdiff.train.optim import Optim

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
    with pytest.raises(ValueError, match="has format 1, this distdiff reads 2"):
        checkpoint.load(Path(path), {})
