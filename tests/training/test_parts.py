from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from distdiff.training.ema import Ema
from distdiff.training.engine import Engine
from distdiff.training.optim import Optim


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
    ema.update(list(model.parameters()), 0)  # every fourth step alone
    assert float(ema.model.weight) == 0
    ema.update(list(model.parameters()), 3)  # decay min(.9, 4/13), four times
    first = 1 - (4 / 13) ** 4
    assert float(ema.model.weight) == pytest.approx(first)
    ema.update(list(model.parameters()), 1003)  # decay .9, four times
    assert float(ema.model.weight) == pytest.approx(1 - (1 - first) * 0.9**4)


def test_optimiser_and_average_move_all_weights_in_one_call_each():
    """One kernel for each of the two groups of weights, and one for the average, however many weights there are."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(7)))
    ema = Ema(model, 0.9)
    engine = Engine(Accelerator(cpu=True), model, Optim(), share=4, accumulate=1)
    engine.network(torch.ones(4, 3)).sum().backward()
    engine.step()
    engine.network(torch.ones(4, 3)).sum().backward()
    with Calls():
        engine.step()
        ema.update(list(model.parameters()), 3)
    assert called.count("_fused_adamw_") == 2
    assert called.count("_foreach_lerp_") == 1
    assert not {"addcdiv_", "addcmul_", "lerp_", "sqrt"} & set(called)
