"""What every denoiser must obey; a new file in distdiff/denoise is picked up here without a change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distdiff.component import build, kinds
from distdiff.denoise import Denoiser, adopt
from distdiff.types import UNKNOWN, Condition, DataSpec

GENES = 12
SPEC = DataSpec(
    tuple(f"g{i}" for i in range(GENES)), {"type": ("a", "b", "c")}, np.linspace(0.1, 3, GENES, dtype=np.float32)
)
ATTENTION = {"width": 16, "depth": 2, "heads": 2}
SMALL = {
    "mlp": {"width": 32, "depth": 2, "linear": 4},
    "transformer": ATTENTION,
    "lsh": ATTENTION | {"bucket": 4},
    "latent": ATTENTION | {"latents": 4},
    "csdi": ATTENTION,
    "unet": {"shape": (3, 2, 2), "channels": (16, 16), "layers": 1, "groups": 4},
}
VARIANTS = {
    "mlp, factorised": {"kind": "mlp", "width": 32, "depth": 2, "rank": 6},
    "transformer, packed": {"kind": "transformer", **ATTENTION, "pack": True},
    "transformer, recomputed": {"kind": "transformer", **ATTENTION, "checkpoint": True},
    "latent, tokens alone": {"kind": "latent", **ATTENTION, "latents": 4, "shortcut": False},
    "transformer, tokens alone": {"kind": "transformer", **ATTENTION, "shortcut": False},
    "csdi, hashed": {"kind": "csdi", **ATTENTION, "attention": "lsh", "bucket": 4},
    "csdi, gene embedding": {"kind": "csdi", **ATTENTION, "gene_embedding": True},
}
KINDS = [*kinds(Denoiser), *VARIANTS]
POSITIONAL = ("unet",)  # a gene's neighbours are those next to it


def options_of(kind):
    return VARIANTS.get(kind) or {"kind": kind, **SMALL.get(kind, {})}


def make(kind, spec=SPEC, outputs=2, *, trained=True):
    if kind == "unet":
        pytest.importorskip("diffusers", reason="the UNet needs the extra 'images'")
    torch.manual_seed(0)
    network = build(Denoiser, options_of(kind), spec, outputs)
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


@pytest.mark.parametrize("kind", [k for k in kinds(Denoiser) if k != "unet"])
def test_a_depth_that_would_be_built_until_memory_is_full(kind):
    for depth in (10**9, 1001, -1):
        with pytest.raises(ValueError, match=f"depth must be between 0 and 1,000, got {depth:,}"):
            build(Denoiser, options_of(kind) | {"depth": depth}, SPEC, 2)


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
    if kind == "unet":  # of a 2 x 2 image one place is left in the middle: its attention has nothing to choose from
        silent = [n for n in silent if ".to_q." not in n and ".to_k." not in n]
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_gene_that_is_not_seen_holds_reaches_no_other_gene(kind):
    network, (x, p, cond) = make(kind), batch()
    noisy = torch.where(p == 0, 7.0, x)
    changed = (network(noisy, p, cond) - network(x, p, cond)).abs().amax(-1)
    assert changed[p > 0].max() < 1e-5


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in POSITIONAL and not k.startswith("mlp")])
def test_a_token_that_is_not_seen_is_looked_at_by_no_other(kind):
    """Another identity, hence another query and another place in every sort, changes its own answer alone."""
    network, (x, p, cond) = make(kind), batch()
    p[:, 3:6] = 0.0
    x = torch.where(p == 0, 0.0, x)
    before, state = network(x, p, cond), network.state_dict()
    for name in ("gene", "ask", "position"):
        if name in state:
            state[name][3:6] += torch.randn(state[name][3:6].shape, generator=torch.Generator().manual_seed(3))
    changed = (network(x, p, cond) - before).abs().amax(-1)
    assert changed[:, 3:6].min() > 1e-5
    assert changed[:, [0, 1, 2, *range(6, GENES)]].max() < 1e-5


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in POSITIONAL])
def test_weights_of_genes_follow_their_names(kind):
    network, (x, p, cond) = make(kind), batch()
    order = torch.randperm(GENES, generator=torch.Generator().manual_seed(2))
    genes = tuple(SPEC.genes[i] for i in order)
    shuffled = make(kind, DataSpec(genes, SPEC.labels, SPEC.gene_mean[order.numpy()]))
    torch.nn.init.ones_(next(shuffled.parameters()))
    assert adopt(shuffled, genes, network.state_dict(), SPEC.genes) == (GENES, ())
    assert torch.allclose(shuffled(x[:, order], p[:, order], cond), network(x, p, cond)[:, order], atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in POSITIONAL])
def test_a_denoiser_adopts_what_is_known_of_other_genes(kind):
    network = make(kind)
    genes = ("new", *SPEC.genes[5:], *(f"newer{i}" for i in range(20)))
    to = make(kind, DataSpec(genes, {"type": ("a",)}, np.ones(len(genes), dtype=np.float32)))
    fresh = {k: v.clone() for k, v in to.state_dict().items()}
    known, left = adopt(to, genes, network.state_dict(), SPEC.genes)
    assert known == GENES - 5
    assert all("condition.tables" in name or name.startswith("tables") for name in left)
    assert left
    for name, axis in network.gene_axes.items():
        if name not in fresh:
            continue
        per_gene = [
            w[name].movedim(axis, 0).unflatten(0, (-1, n))
            for w, n in ((to.state_dict(), len(genes)), (fresh, len(genes)), (network.state_dict(), GENES))
        ]
        now, before, source = per_gene
        assert torch.equal(now[:, 1:8], source[:, 5:])
        assert torch.equal(now[:, [0, *range(8, 28)]], before[:, [0, *range(8, 28)]])


def test_adopting_from_another_denoiser_is_refused():
    with pytest.raises(ValueError, match="of another denoiser"):
        adopt(make("mlp"), SPEC.genes, make("transformer").state_dict(), SPEC.genes)
    wider = build(Denoiser, {"kind": "mlp", "width": 48, "depth": 2, "linear": 4}, SPEC, 2)
    with pytest.raises(ValueError, match="has shape"):
        adopt(make("mlp"), SPEC.genes, wider.state_dict(), SPEC.genes)


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    network, inputs = make(kind), batch()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "w.safetensors")
    again = make(kind, trained=False)
    again.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again(*inputs), network(*inputs))


def test_packing_and_recomputing_change_nothing_that_is_asked():
    """Where all zeros are asked (p < 1) the packed network has the tokens of the whole one."""
    x, p, cond = batch()
    p = torch.where((p == 1) & (x == 0), 0.5, p)
    whole = make("transformer")(x, p, cond)
    packed, recomputed = make("transformer, packed"), make("transformer, recomputed")
    asked = p < 1
    assert torch.allclose(packed(x, p, cond)[asked], whole[asked], atol=1e-5)
    grads = []
    for network in (make("transformer"), recomputed, packed):
        out = network(x, p, cond)[asked]
        assert torch.allclose(out, whole[asked], atol=1e-5)
        grads.append(torch.autograd.grad(out.square().sum(), network.gene)[0])
    assert torch.allclose(grads[0], grads[1], atol=1e-4)
    assert torch.allclose(grads[0], grads[2], atol=1e-4)


def test_a_packed_network_skips_zeros_that_are_known():
    network, (x, p, cond) = make("transformer, packed"), batch()
    p[:, 4:8], x[:, 4:8] = 1.0, 0.0
    before, state = network(x, p, cond), network.state_dict()
    state["gene"][4:8] += torch.arange(16)
    assert torch.equal(network(x, p, cond)[p < 1], before[p < 1])


def test_one_bucket_is_full_attention():
    """The same with one chunk and with many rounds; with small buckets it is not."""
    inputs = batch()
    full = build(Denoiser, {"kind": "lsh", **ATTENTION, "bucket": GENES + 1, "rounds": 1}, SPEC, 2).eval()
    rounds = build(Denoiser, {"kind": "lsh", **ATTENTION, "bucket": 4 * GENES, "rounds": 3}, SPEC, 2).eval()
    small = build(Denoiser, {"kind": "lsh", **ATTENTION, "bucket": 2, "rounds": 1}, SPEC, 2).eval()
    state = {k: v for k, v in make("lsh").state_dict().items() if "rotations" not in k}
    answers = []
    for network in (full, rounds, small):
        network.load_state_dict(state, strict=False)
        answers.append(network(*inputs))
    assert torch.allclose(answers[0], answers[1], atol=1e-5)
    assert not torch.allclose(answers[0], answers[2], atol=1e-3)


def test_csdi_has_the_published_number_of_weights():
    """527,825 there, of which one encoder layer a block is built and never called (counted in its published code)."""
    spec = DataSpec(SPEC.genes, {}, SPEC.gene_mean)
    network = build(Denoiser, {"kind": "csdi"}, spec, 1)
    unused = torch.nn.TransformerEncoderLayer(64, 8, 64)
    count = sum(w.numel() for w in network.parameters()) + 6 * sum(w.numel() for w in unused.parameters())
    assert count == 527_825


def test_csdi_layer_is_torchs_encoder_layer():
    from distdiff.denoise.csdi import _Encoder

    torch.manual_seed(0)
    mine = _Encoder(16, 2, 0.0, None).eval()
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 16, 0.0, "gelu", batch_first=True).eval()
    pairs = {
        "self_attn.in_proj_weight": "qkv.weight", "self_attn.in_proj_bias": "qkv.bias",
        "self_attn.out_proj.weight": "project.weight", "self_attn.out_proj.bias": "project.bias",
        "linear1.weight": "narrow.weight", "linear1.bias": "narrow.bias", "linear2.weight": "widen.weight",
        "linear2.bias": "widen.bias", "norm1.weight": "norm_attention.weight", "norm1.bias": "norm_attention.bias",
        "norm2.weight": "norm_out.weight", "norm2.bias": "norm_out.bias",
    }  # fmt: skip
    theirs.load_state_dict({k: mine.state_dict()[v] for k, v in pairs.items()})
    h, seen = torch.randn(3, 7, 16), torch.rand(3, 7) < 0.6
    seen[:, 0] = True
    assert torch.allclose(mine(h, seen), theirs(h, src_key_padding_mask=~seen), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_answers_as_the_cpu_does(kind, gpu):
    network, (x, p, cond) = make(kind), batch()
    want = network(x, p, cond)
    network.to(gpu)
    on_gpu = x.to(gpu), p.to(gpu), cond.to(gpu)
    assert torch.allclose(network(*on_gpu).cpu(), want, atol=1e-3)
    with torch.autocast(gpu.type, dtype=torch.bfloat16):
        out = network(*on_gpu)
    out.square().sum().backward()  # outside, as in training
    assert torch.allclose(out.cpu(), want, atol=0.05, rtol=0.05)
    assert all(w.grad.isfinite().all() for w in network.parameters() if w.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind):
    network, inputs = make(kind), batch()
    want = network(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = network(*inputs)
    assert got.dtype == torch.float32
    assert torch.allclose(got, want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "transformer", "width": 16, "heads": 3}, "transformer: heads=3 must divide width=16"),
        ({"kind": "lsh", "width": 16, "heads": 3}, "lsh: heads=3 must divide width=16"),
        ({"kind": "latent", "width": 16, "heads": 16}, "leave a head two channels"),
        ({"kind": "csdi", "heads": 5}, "csdi: heads=5 must divide width=64"),
        ({"kind": "lsh", "bucket": 0}, "bucket must be at least 1, got 0"),
        ({"kind": "lsh", "rounds": -1}, "rounds must be at least 1, got -1"),
        ({"kind": "latent", "latents": 0}, "latents must be at least 1, got 0"),
        ({"kind": "csdi", "attention": "lhs"}, "did you mean 'lsh'"),
        ({"kind": "unet"}, r"shape=\[3, 32, 32\] holds 3072 values, the data 12"),
        ({"kind": "unet", "shape": (3, 2, 2)}, "cannot be halved 3 times"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build(Denoiser, options, SPEC, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_genes(kind):
    empty = DataSpec((), {}, np.zeros(0, dtype=np.float32))
    with pytest.raises(ValueError, match=r"no genes|holds"):
        make(kind, empty)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "mpl"}, "did you mean 'mlp'"),
        ({}, "'kind' is missing; known: csdi, latent, lsh, mlp, transformer, unet"),
        ({"kind": "mlp", "widht": 3}, "unknown option 'widht'; did you mean 'width'"),
        ({"kind": "os:path"}, "is not a subclass"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        build(Denoiser, options, SPEC, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hidden_state_is_a_vector_a_cell_of_its_own_evidence(kind):
    network = make(kind)
    x, p, cond = batch()
    with torch.no_grad():
        h = network.hidden(x, p, cond)
        assert h.shape[0] == len(x)
        assert h.ndim == 2
        assert torch.isfinite(h).all()
        assert (h[0] - h[1]).abs().max() > 1e-4  # cells are told apart
        alone = network.hidden(x[2:3], p[2:3], Condition({"type": cond.labels["type"][2:3]}))
        assert torch.allclose(alone[0], h[2], atol=1e-5)
        unmeasured = torch.where(p == 0, 7.0, x)  # (unet: a neighbour of a pixel that was not measured)
        assert torch.allclose(network.hidden(unmeasured, p, cond), h, atol=1e-5)


def test_a_denoiser_without_a_hidden_state_says_so():
    class Plain(Denoiser):
        def forward(self, x, p, cond):
            return x.unsqueeze(-1)

    with pytest.raises(ValueError, match="denoiser Plain has no hidden state of a cell"):
        Plain().hidden(*batch())
