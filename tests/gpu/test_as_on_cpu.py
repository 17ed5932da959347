"""A GPU gives the CPU's answers: laws, walks, tasks and files on both devices, in float32, with the same noise."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from distdiff.batch import run
from distdiff.component import kinds
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.process import Process
from distdiff.rng import Rng
from distdiff.rng.rows import Rows
from distdiff.sampling import SOLVERS, predictor, sample
from distdiff.types import Condition

pytestmark = pytest.mark.gpu

NETWORK = {"kind": "mlp", "width": 32, "depth": 1}
HEADS = {"counts, mean": {"kind": "counts", "head": "mean"}, "counts, loadings": {"kind": "counts", "head": "loadings"}}
FLIPPED = 0.01
"""Share of drawn entries that may differ: a uniform number can lie between two roundings of one probability."""


def laws() -> list[str]:
    found = [k for k in kinds(Process) if k not in ("schedule", "survival")]
    return [*found, *HEADS]


def make(kind: str, atlas) -> Model:
    model = Model.new(CountStore.open(atlas).spec(("cell_type",)), HEADS.get(kind) or {"kind": kind}, NETWORK)
    torch.manual_seed(0)
    for parameter in model.denoiser.parameters():  # away from the zero start, where a network ignores its input
        torch.nn.init.normal_(parameter, std=0.1)
    model.denoiser.eval()
    return model


def rows(n: int, device: torch.device | str) -> Rng:
    return Rows(torch.arange(n, device=device), torch.zeros(n, dtype=torch.long, device=device), 0, "gpu")


def assert_near(got: torch.Tensor, want: torch.Tensor, *, drawn: bool = False, atol: float = 1e-4) -> None:
    got, want = got.cpu().double(), want.double()
    away = ~torch.isclose(got, want, rtol=1e-4, atol=atol)
    assert away.double().mean() <= (FLIPPED if drawn else 0), (got[away][:5], want[away][:5])


@pytest.mark.parametrize("kind", laws())
def test_laws(kind, atlas, gpu):
    """Every function of a law, given the same inputs on both devices."""
    model = make(kind, atlas)
    process, network = model.process, model.denoiser
    cells = CountStore.open(atlas).cells(np.arange(64), ("cell_type",))
    p = torch.rand(cells.counts.shape, generator=torch.Generator().manual_seed(0))
    p[:, 0], p[:, 1] = 0.0, 1.0
    p_s = p + 0.5 * (1 - p)

    steps = {  # name: whether it is drawn, and the call on what the calls before it gave
        "x_0": (True, lambda g, rng: process.enter(g["counts"], rng=rng)),
        "prior": (True, lambda g, rng: process.prior(tuple(p.shape), rng=rng)),
        "x": (True, lambda g, rng: process.forward(g["x_0"], 1.0, g["p"], rng=rng)),
        "eta": (False, lambda g, rng: predictor(process, network, cells.labels.to(rng.device))(g["x"], g["p"])),
        "loss": (False, lambda g, rng: process.loss(g["eta"], g["x_0"], g["x"], g["p"])),
        "bound": (False, lambda g, rng: process.bound(g["eta"], g["x_0"], g["x"], g["p"].clamp(0.01, 0.99))),
        "mean": (False, lambda g, rng: process.mean(g["eta"], g["x"], g["p"])),
        "reverse": (True, lambda g, rng: process.reverse(g["x"], g["eta"], g["p"], g["p_s"], rng=rng)),
    }
    given = {"counts": cells.counts, "p": p, "p_s": p_s}
    with torch.no_grad():
        rng = rows(64, "cpu")
        for name, (_, call) in steps.items():
            with contextlib.suppress(ValueError) if name == "bound" else contextlib.nullcontext():
                given[name] = call(given, rng)  # a process without a likelihood says so
        network.to(gpu)
        there, rng = {name: value.to(gpu) for name, value in given.items()}, rows(64, gpu)
        # log-likelihoods are differences of log k!; float32 rounds away up to this much (5,800 molecules: .005)
        lost = 1e-4 + 2**-23 * torch.lgamma(given["x_0"].max() + 1).item()
        for name, (drawn, call) in steps.items():
            if name in given:
                near = lost if name in ("loss", "bound") else 1e-4
                assert_near(call(there, rng), given[name], drawn=drawn, atol=near)


@pytest.mark.parametrize("solver", SOLVERS)
def test_walks(solver, atlas, gpu):
    model = make("gaussian" if solver == "multistep" else "counts", atlas)
    process = model.process

    def walk(device):
        model.denoiser.to(device)
        grid = [torch.tensor(level, device=device) for level in (0.0, 0.2, 0.6, 1.0)]
        rng = rows(256, device)
        labels = Condition({"cell_type": torch.zeros(256, dtype=torch.long, device=device)})
        with torch.no_grad():
            predict = predictor(process, model.denoiser, labels, guidance=1.5)
            return sample(process, predict, process.prior((256, 30), rng=rng), grid, solver=solver, rng=rng)

    got, want = walk(gpu).cpu(), walk("cpu")
    # a flipped entry moves its cell's later steps a little, so whole cells are counted, and the mean must agree
    same = torch.isclose(got, want, rtol=1e-3, atol=1e-3).all(1).double().mean()
    assert same > 0.9, same
    assert torch.allclose(got.mean(), want.mean(), rtol=0.02)


@pytest.fixture
def half_hidden(counts):
    mask = np.random.default_rng(0).random(counts.shape) < 0.5
    return counts, mask


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def test_tasks(atlas, half_hidden, gpu):
    """Impute, denoise, likelihood and generate through the public class, each on both devices."""
    model, (adata, mask) = make("counts", atlas), half_hidden

    def answers(device):
        on = {"device": str(device)}
        imputed = model.impute(adata, mask=mask, draws=2, seed=1, **on)
        yield "mean", imputed.layers["imputed_mean"], 0.0
        yield "draw", imputed.layers["imputed_draw2"], FLIPPED
        yield "denoised", model.denoise(adata, **on).layers["denoised"], 0.0
        yield "nats", model.likelihood(adata, levels=4, **on)["nats"].to_numpy(), FLIPPED
        model.denoiser.to(device)
        yield "generated", model.generate(64, steps=4, seed=1).X, 0.05

    for (name, got, flipped), (_, want, _) in zip(answers(gpu), list(answers("cpu")), strict=True):
        away = ~np.isclose(dense(got), dense(want), rtol=1e-3, atol=1e-3)
        assert away.mean() <= flipped, (name, away.mean())


@pytest.mark.parametrize(("precision", "rtol"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_files(precision, rtol, atlas, half_hidden, tmp_path, gpu):
    """The engine for atlases: reading, computing and writing overlap; the result is the CPU's."""
    import anndata as ad

    model, (_, mask) = make("counts", atlas), half_hidden
    cells = CountStore.open(atlas).n_cells
    np.save(tmp_path / "mask.npy", mask[:cells])

    def impute(device, precision):
        out = tmp_path / f"{torch.device(device).type}-{precision}.zarr"
        layers = {"layers": ("mean",), "mask": str(tmp_path / "mask.npy"), "progress": False, "overwrite": True}
        run("impute", model, atlas, out, device=str(device), precision=precision, **layers)
        return dense(ad.read_zarr(out).layers["imputed_mean"])

    want = impute("cpu", "float32")
    assert np.allclose(impute(gpu, precision), want, rtol=rtol, atol=rtol / 10)
