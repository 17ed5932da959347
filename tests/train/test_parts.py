from __future__ import annotations

import itertools
import os

import pytest
import torch

from distdiff.train import checkpoint
from distdiff.train.ema import Ema
from distdiff.train.optim import Optim


def test_learning_rate_warms_up_then_falls_to_zero_in_cells():
    optim = Optim(lr=1.0, warmup_cells=100)
    rates = [optim.rate(seen, 1000) for seen in range(0, 1001, 10)]
    assert rates[0] == pytest.approx(0.01, rel=0.01)
    assert max(rates) == optim.rate(100, 1000)
    assert rates[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_weight_decay_spares_biases_and_embeddings():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, spared = Optim(weight_decay=0.5).build(model).param_groups
    assert [p is model[1].weight for p in decayed["params"]] == [True]
    assert len(spared["params"]) == 4
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)


def test_ema_follows_the_weights_after_the_step():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = Ema(model, 0.9)
    torch.nn.init.ones_(model.weight)
    ema.update(model, 0)  # every fourth step alone
    assert float(ema.model.weight) == 0
    ema.update(model, 3)  # decay min(.9, 4/13), four times
    first = 1 - (4 / 13) ** 4
    assert float(ema.model.weight) == pytest.approx(first)
    ema.update(model, 1003)  # decay .9, four times
    assert float(ema.model.weight) == pytest.approx(1 - (1 - first) * 0.9**4)


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


def trained():
    model = network()
    optimizer = Optim().build(model)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_checkpoint_brings_back_weights_average_and_optimiser_exactly(tmp_path):
    model, optimizer = trained()
    ema = Ema(model, 0.9)
    path = checkpoint.save(tmp_path, 3, model, ema.model, optimizer, {"config": {"a": 1}, "progress": {}})
    other, other_ema = network(1), Ema(network(2), 0.9)
    other_optimizer = Optim().build(other)
    state = checkpoint.load(path, other, other_ema.model, other_optimizer, {"config": {"a": 1}})
    assert state["step"] == 3
    for a, b in ((model, other), (ema.model, other_ema.model)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    for net, opt in ((model, optimizer), (other, other_optimizer)):
        opt.zero_grad()
        net(torch.ones(2, 3)).sum().backward()
        opt.step()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))
    assert not list(tmp_path.rglob("*.pkl"))
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}


def test_a_half_written_checkpoint_is_invisible(tmp_path, monkeypatch):
    model, optimizer = trained()
    first = checkpoint.save(tmp_path, 3, model, model, optimizer, {})

    def dies(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="power cut"):
        checkpoint.save(tmp_path, 6, model, model, optimizer, {})
    assert checkpoint.latest(tmp_path) == first
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, model, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]
    assert checkpoint.find("auto", tmp_path).name == "step-000000010"
    assert checkpoint.find("never", tmp_path) is None


def test_another_runs_checkpoint_is_refused_by_name(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 3, model, model, optimizer, {"config": {"optim": {"lr": 0.1}}, "data": "abc"})
    with pytest.raises(ValueError, match=r"another config: optim.lr was 0.1, is 0.2; .*train.resume=never"):
        checkpoint.load(path, model, model, optimizer, {"config": {"optim": {"lr": 0.2}}})
    with pytest.raises(ValueError, match="another data: was 'abc', is 'xyz'"):
        checkpoint.load(path, model, model, optimizer, {"data": "xyz"})
    with pytest.raises(ValueError, match="is no checkpoint folder"):
        checkpoint.find(str(tmp_path / "nowhere"), tmp_path)
