"""CUDA graphs: what is refused where; what goes in and out, with a stand-in for the recording; on a GPU the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from distdiff import config, experiment, graphs
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.denoise import Denoiser
from distdiff.graphs import WARM, Captured
from distdiff.imputers.graphed import Graphed
from distdiff.model import Model
from distdiff.rng import numpy_generator
from distdiff.training import checkpoint, graphed
from distdiff.types import DataSpec

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def stand_in(monkeypatch):
    """A recording that keeps where its tensors are, and replays by calling: what a graph does, but for the speed."""
    recorded = []

    def record(function, inputs):
        recorded.append(inputs)
        return lambda: function(*inputs)

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "call_on_own_stream", lambda function, given: function(*given))
    return recorded


def test_each_call_is_made_once_on_what_it_was_given(stand_in):
    weight, given = torch.zeros(3), [torch.randn(2, 3) for _ in range(WARM + 4)]

    def function(x, y):
        weight.add_(x.sum(0))
        return weight * y, x + 1

    captured, want = Captured(function, "here"), torch.zeros(3)
    answers = []
    for x in given:
        want = want + x.sum(0)
        answers.append((captured(x, x[:1]), (want * x[:1], x + 1)))
    assert all(torch.allclose(a, b) for got, wanted in answers for a, b in zip(got, wanted, strict=True))
    assert len(stand_in) == 1  # recorded once, and no answer was overwritten by a later one
    with pytest.raises(ValueError, match=r"here: a CUDA graph takes one shape, recorded was \[\(2, 3\), \(1, 3\)\]"):
        captured(torch.zeros(4, 3), torch.zeros(1, 3))


def test_what_cannot_be_recorded_is_named(monkeypatch, stand_in, caplog):
    def record(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "record", record)
    captured = Captured(lambda x: (x,), "train.graph")
    for _ in range(WARM):
        captured(torch.ones(1))
    with pytest.raises(ValueError, match=r"train.graph: .*\(operation not permitted when stream is capturing\); leave"):
        captured(torch.ones(1))

    captured, seen = Captured(lambda x: (seen.append(x) or x,), "train.graph", must=False), []
    for n in range(WARM + 3):
        (got,) = captured(torch.full((1 + n % 2,), float(n)))  # another shape is no trouble either
        assert len(got) == 1 + n % 2
    assert len(seen) == WARM + 3
    assert caplog.text.count("is slower") == 1


def denoiser(**options) -> Denoiser:
    spec = DataSpec(tuple("abcd"), {}, np.ones(4, dtype=np.float32))
    return Model.new(spec, {"kind": "counts"}, options).denoiser


@pytest.mark.parametrize(
    ("machine", "network", "accumulate", "words"),
    [
        ({"device": torch.device("cpu")}, {}, 1, "CUDA graphs need a GPU, this is a cpu"),
        ({"distributed_type": DistributedType.MULTI_GPU}, {}, 1, "one process only, this is MULTI_GPU"),
        ({"distributed_type": DistributedType.DEEPSPEED}, {}, 1, "one process only, this is DEEPSPEED"),
        ({"distributed_type": DistributedType.FSDP}, {}, 1, "one process only, this is FSDP"),
        ({}, {}, 4, "train.accumulate=4"),
        ({"scaler": object()}, {}, 1, "use bf16"),
        ({}, {"kind": "latent", "width": 8, "heads": 2}, 1, "shapes differ from batch to batch"),
        ({}, {"kind": "csdi", "width": 8, "heads": 2}, 1, "set denoiser.dropout=0"),
        ({}, {"kind": "csdi", "width": 8, "heads": 2, "dropout": 0.0}, 1, ""),
        ({}, {}, 1, ""),
    ],
)
def test_training_is_refused_a_graph_where_there_can_be_none(machine, network, accumulate, words):
    gpu = {"device": torch.device("cuda"), "distributed_type": DistributedType.NO, "scaler": None}
    accelerator = SimpleNamespace(**{**gpu, **machine})
    made = denoiser(**{"kind": "mlp", "width": 8} | network)
    if words:
        with pytest.raises(ValueError, match=rf"^train.graph=true: .*{words}.*train.graph=false"):
            graphed.wanted(True, accelerator, made, accumulate)  # type: ignore[arg-type]
    else:
        assert graphed.wanted(True, accelerator, made, accumulate)  # type: ignore[arg-type]
    assert graphed.wanted("auto", accelerator, made, accumulate) == (made.light and not words)  # type: ignore[arg-type]
    assert not graphed.wanted(False, accelerator, made, accumulate)  # type: ignore[arg-type]


def run(atlas: Path, out: Path, **train) -> dict[str, torch.Tensor]:
    """Weights, averages and moments after 40 steps, and the losses logged."""
    tree = {
        "data": {"store": str(atlas), "labels": ["cell_type"]}, "denoiser": {"kind": "mlp", "width": 16, "depth": 1},
        "survival": {"time": "learned"}, "evaluate": {"enabled": False}, "tracking": {"enabled": False},
        "optim": {"warmup_cells": 100},
        "train": {"cells": 1280, "batch": 32, "grain": 8, "eval_cells": 320, "patience": 99, "out": str(out), **train},
    }  # fmt: skip
    progress = experiment.train(config.parse(json.loads(json.dumps(tree)))).progress
    saved = checkpoint.load(checkpoint.latest(out / "checkpoints"), {})
    found = {f"{n}:{k}": v for n in ("weights", "ema", "optimizer") for k, v in getattr(saved, n).items()}
    return found | {"losses": torch.tensor([[h["loss"], h["grad_norm"], h["val/loss"]] for h in progress.history])}


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.allclose(a[k], b[k], atol=1e-4, rtol=1e-3)] == []


@pytest.mark.parametrize("noise", ["streams", "rows"])
def test_a_step_in_a_graph_is_the_step(atlas, tmp_path, monkeypatch, stand_in, noise):
    """With the stand-in: the split into noise and the rest, the learning rate as a tensor, a resumed run."""
    plain = run(atlas, tmp_path / "plain", noise=noise)
    with pytest.raises(ValueError, match=r"train\.graph=true: CUDA graphs need a GPU"):
        run(atlas, tmp_path / "no", graph=True)
    monkeypatch.setattr(graphed, "reason", lambda *_: "")
    monkeypatch.setattr("distdiff.training.engine.Engine.capturable", on_cpu)
    assert_near(run(atlas, tmp_path / "graph", graph=True, noise=noise), plain)
    assert len(stand_in) == 1
    run(atlas, tmp_path / "half", graph=True, noise=noise, cells=1280, minutes=0.0, checkpoint_cells=640)
    newest = checkpoint.latest(tmp_path / "half" / "checkpoints")
    first = newest.parent / "step-000000020"
    assert first.exists()
    resumed = run(atlas, tmp_path / "resumed", noise=noise, resume=str(first), checkpoint_cells=640)
    assert_near({k: v for k, v in resumed.items() if k != "losses"}, {k: plain[k] for k in resumed if k != "losses"})


def on_cpu(engine) -> None:
    """As on a GPU, but for `capturable`, which torch refuses on a CPU."""
    for group in engine.optimizer.param_groups:
        group["lr"] = torch.full((), group["lr"])


def imputer_of(atlas: Path, **options) -> tuple[Model, CountStore]:
    store = CountStore.open(atlas)
    return Model.new(store.spec(("cell_type",)), {"kind": "counts"}, {"kind": "mlp", "width": 8, **options}), store


def test_an_imputers_graph_is_refused_where_there_can_be_none(atlas):
    model, store = imputer_of(atlas)
    cells = store.cells(store.rows("all")[:8], ("cell_type",))
    with pytest.raises(ValueError, match="graph=True: CUDA graphs need a GPU, these cells are on cpu"):
        model.imputer(graph=True).impute(cells, cells.counts > 0)
    for options, words in (
        ({"readout": "log1p"}, "the read-out 'log1p'"), ({"statistics": ("q5", "sd")}, "the read-out 'q5'"),
        ({"solver": "trapezoidal"}, "solver 'trapezoidal'"), ({"method": "repaint"}, "method RePaint"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"graph=True: {words}"):
            model.imputer(graph=True, **options)
    ragged = imputer_of(atlas, kind="latent", heads=2)[0]
    with pytest.raises(ValueError, match="graph=True: shapes differ"):
        ragged.imputer(graph=True)


def batches(store: CountStore, device: str = "cpu"):
    for start in (0, 20, 40, 60, 80, 100, 120):
        cells = store.cells(store.rows("all")[start : start + 20], ("cell_type",)).to(device)
        hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(start, "hidden"))
        yield cells, torch.from_numpy(~hidden).to(device)


def same_answers(graph, plain, store: CountStore, device: str = "cpu") -> None:
    for cells, observed in batches(store, device):
        for draws in (0, 2):
            a, b = (of.impute(cells, observed, draws=draws, seed=3) for of in (graph, plain))
            assert torch.allclose(a.mean, b.mean, rtol=1e-4)
            assert a.statistics.keys() == b.statistics.keys() == {"sd"}
            assert torch.allclose(a.statistics["sd"], b.statistics["sd"], rtol=1e-4)
            assert (a.draws is None) == (draws == 0)
            if draws:
                assert (a.draws != b.draws).float().mean() < 1e-3
                assert not torch.equal(a.draws[0], a.draws[1])


def test_an_imputers_graph_gives_its_answers(atlas, monkeypatch, stand_in):
    model, store = imputer_of(atlas)
    graph = model.imputer(graph=True, statistics=("sd",), steps=2)
    assert isinstance(graph, Graphed)
    monkeypatch.setattr("distdiff.imputers.graphed._check", lambda device, draws: None)
    same_answers(graph, model.imputer(statistics=("sd",), steps=2), store)
    assert len(stand_in) == 2  # with draws and without


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"noise": "rows"}, {"compile": True}], ids=str)
def test_on_a_gpu_training_is_the_same(atlas, tmp_path, options):
    options = {"precision": "fp32", **options}
    near = {"bf16": 0.05}.get(options["precision"], 1e-3)
    plain, graph = (run(atlas, tmp_path / str(g), graph=g, **options) for g in (False, True))
    assert torch.allclose(graph["losses"], plain["losses"], rtol=near)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_imputation_is_the_same(atlas):
    model, store = imputer_of(atlas)
    model.denoiser.cuda().eval()
    same_answers(model.imputer(graph=True, statistics=("sd",)), model.imputer(statistics=("sd",)), store, "cuda")
