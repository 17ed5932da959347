"""What every denoiser must obey; a new file in distdiff/denoise is picked up here without a change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distdiff.component import build, kinds
from distdiff.denoise import Denoiser
from distdiff.types import UNKNOWN, Condition, DataSpec

GENES = 12
SPEC = DataSpec(
    tuple(f"g{i}" for i in range(GENES)), {"type": ("a", "b", "c")}, np.linspace(0.1, 3, GENES, dtype=np.float32)
)
SMALL = {"mlp": {"width": 32, "depth": 2, "linear": 4}, "transformer": {"width": 16, "depth": 2, "heads": 2}}
KINDS = kinds(Denoiser)


def make(kind, spec=SPEC, outputs=2, *, trained=True):
    torch.manual_seed(0)
    network = build(Denoiser, {"kind": kind, **SMALL.get(kind, {})}, spec, outputs)
    if trained:  # leave the zero start, where a network ignores its input
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def batch(cells=5, genes=GENES):
    rng = torch.Generator().manual_seed(1)
    p = torch.rand(cells, genes, generator=rng)
    p[:, 0], p[:, 1] = 0.0, 1.0
    x = torch.binomial(torch.full((cells, genes), 4.0), p, generator=rng)
    return torch.log1p(x), p, Condition({"type": torch.tensor([0, 1, 2, UNKNOWN, 0][:cells])})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_shape_and_dtype(kind, outputs):
    out = make(kind, outputs=outputs)(*batch())
    assert out.shape == (5, GENES, outputs)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_gene_mean_times_depth(kind):
    x, p, cond = batch()
    raw = make(kind, trained=False)(x, p, cond)[..., 0]
    seen = torch.expm1(x).sum(1, keepdim=True)
    mean = torch.as_tensor(SPEC.gene_mean)
    depth = (seen + 10) / ((p * mean).sum(1, keepdim=True) + 10)
    assert torch.allclose(raw, (mean * depth).log(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_do_not_see_each_other(kind):
    network, (x, p, cond) = make(kind), batch()
    whole = network(x, p, cond)
    alone = torch.cat([network(x[i : i + 1], p[i : i + 1], cond[i : i + 1]) for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_weight(kind):
    network = make(kind)
    network(*batch()).square().sum().backward()
    silent = [n for n, w in network.named_parameters() if w.grad is None or not w.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("kind", KINDS)
def test_labels_evidence_and_survival_matter_and_unknown_is_no_label(kind):
    network, (x, p, cond) = make(kind), batch()
    base = network(x, p, cond)
    other = network(x, p, Condition({"type": torch.tensor([1, 1, 2, UNKNOWN, 0])}))
    assert not torch.allclose(base[0], other[0], atol=1e-4)
    assert torch.equal(base[1:], other[1:])
    assert torch.equal(network(x, p, Condition({}))[3], base[3])
    more = x.clone()
    more[:, 1] += 1
    assert not torch.allclose(network(more, p, cond), base, atol=1e-3)
    assert not torch.allclose(network(x, p * 0.9, cond), base, atol=1e-4)


def test_permuting_genes_permutes_the_transformers_answers():
    network, (x, p, cond) = make("transformer"), batch()
    order = torch.randperm(GENES, generator=torch.Generator().manual_seed(2))
    shuffled = make("transformer")
    state = network.state_dict()
    for name in ("gene", "bias", "expectation.mean"):
        state[name] = state[name][order]
    shuffled.load_state_dict(state)
    assert torch.allclose(shuffled(x[:, order], p[:, order], cond), network(x, p, cond)[:, order], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind):
    network, inputs = make(kind), batch()
    want = network(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = network(*inputs)
    assert got.dtype == torch.float32
    assert torch.allclose(got, want, atol=0.05, rtol=0.05)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="heads=3 must divide width=16"):
        build(Denoiser, {"kind": "transformer", "width": 16, "heads": 3}, SPEC, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "mpl"}, "did you mean 'mlp'"),
        ({}, "'kind' is missing; known: mlp, transformer"),
        ({"kind": "mlp", "widht": 3}, "unknown option 'widht'; did you mean 'width'"),
        ({"kind": "os:path"}, "is not a subclass"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        build(Denoiser, options, SPEC, 1)
