"""torch.compile: the same numbers where it works, one line and an uncompiled run where it does not."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from distdiff.component import build
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.training.compiled import compile_denoiser, compile_law
from distdiff.training.losses import law_of
from distdiff.types import Condition, DataSpec

SPEC = DataSpec(tuple("abcdef"), {"type": ("x", "y")}, np.linspace(0.2, 2, 6, dtype=np.float32))


def network(**options):
    torch.manual_seed(0)
    made = build(Denoiser, options, SPEC, 2)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return made


def inputs():
    p = torch.tensor([[1.0, 0.5, 0, 1, 0.2, 0], [1, 1, 1, 0, 0, 0]])
    return torch.log1p(torch.arange(12.0).reshape(2, 6) * p), p, Condition({"type": torch.tensor([1, -1])})


def same(options: dict) -> None:
    plain, compiled = network(**options), network(**options)
    assert compile_denoiser(compiled, 2, 6, ("type",))
    assert compiled._compiled_call_impl is not None
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert all(w.grad is None for w in compiled.parameters())
    a, b = plain(*inputs()), compiled(*inputs())
    assert torch.allclose(a, b, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    for w, v in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(w.grad, v.grad, atol=1e-4)


def same_law(options: dict) -> None:
    law = law_of(build(Process, options))
    outputs, (x, p, _) = law.args[0].outputs, inputs()
    compiled = compile_law(law, outputs, 2, 6, torch.device("cpu"))
    assert compiled is not law
    raw = torch.randn(2, outputs, 6, generator=torch.Generator().manual_seed(0))
    gradients = []
    for of in (law, compiled):
        answers = raw.clone().requires_grad_()
        losses = of(answers.transpose(1, 2), torch.expm1(x).round() + 2 * (p < 1), torch.expm1(x).round(), p)
        losses.sum().backward()
        gradients.append(torch.cat((answers.grad.flatten(), losses.detach())))
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("network", "law"),
    [
        ({"kind": "mlp", "width": 16}, {"kind": "counts"}),
        pytest.param(
            {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
            {"kind": "counts", "head": "loadings", "weight": "nll"},
            marks=pytest.mark.long,
        ),
    ],
)
def test_compiled_answers_losses_and_gradients_are_the_same(network, law):
    """In a process of its own: the checks of types that tests install cannot be compiled."""
    code = f"from tests.training.test_compiled import same, same_law; same({network!r}); same_law({law!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("no C++ compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    plain, tried = network(kind="mlp", width=16), network(kind="mlp", width=16)

    def compile_in_place(*args, **options):
        tried._compiled_call_impl = broken

    monkeypatch.setattr(tried, "compile", compile_in_place)
    with caplog.at_level(logging.WARNING, "distdiff"):
        assert not compile_denoiser(tried, 2, 6, ("type",))
    assert [r.getMessage() for r in caplog.records] == [
        "train.compile: RuntimeError: no C++ compiler here; the network runs uncompiled"
    ]
    assert torch.equal(tried(*inputs()), plain(*inputs()))


def test_a_loss_that_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    def broken(law):
        raise RuntimeError("no C++ compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    law = law_of(build(Process, {"kind": "counts"}))
    with caplog.at_level(logging.WARNING, "distdiff"):
        assert compile_law(law, 2, 2, 6, torch.device("cpu")) is law
    assert "no C++ compiler here; the loss runs uncompiled" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "transformer", "pack": True}, "denoiser.pack computes a number of tokens that depends on the cells"),
        ({"kind": "latent"}, "as many tokens as there are non-zero entries"),
        ({"kind": "lsh"}, "as many blocks as"),
    ],
)
def test_networks_whose_shapes_differ_are_not_compiled(options, words, caplog):
    with caplog.at_level(logging.WARNING, "distdiff"):
        assert not compile_denoiser(network(width=16, heads=2, **options), 2, 6)
    assert words in caplog.text
