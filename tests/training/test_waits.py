"""A training step waits for the GPU nowhere; from log to log the loop does once (what the count sees: tests.waits)."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from distdiff import config
from distdiff.data.feed.resident import Resident
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.training import loop, noise, validation
from distdiff.training.optim import Optim
from distdiff.training.settings import Recipe
from tests.waits import DEVICE, NoNumbers, Waits


class Imagined(Accelerator):
    """As if there were a GPU."""

    device = DEVICE  # type: ignore[assignment]


def unfused(self: Optim, model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=self.lr, foreach=False)


def train(atlas: Path, out: Path, waits: Waits, device: torch.device, **sections) -> list[list[str]]:
    """Nine steps with a log after every third; the waits of each step, from the end of the step before."""
    store = CountStore.open(atlas)
    train = {"batch": 32, "grain": 8, "cells": 288, "eval_cells": 96, "checkpoint_cells": 10**9, "patience": 99}
    sections.setdefault("denoiser", {"kind": "mlp", "width": 8, "depth": 1})
    tree = {"data": {"store": str(atlas), "labels": ["cell_type"]}, **sections}
    c = config.parse({**tree, "train": {**train, "out": str(out), "checkpoint_minutes": 1e6, **tree.get("train", {})}})
    model = Model.new(store.spec(c.data.labels), c.process, c.denoiser)
    ends: list[int] = []

    class Ends(loop.Stop):
        """Asked at the end of each step."""

        def agreed(self) -> int:
            ends.append(len(waits.seen))
            return super().agreed()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Stop", Ends)
        with waits:
            recipe = Recipe(
                store, model.process, model.denoiser, c.survival, c.optim, c.train, labels=c.data.labels
            )  # fmt: skip
            accelerator = Imagined(cpu=True) if device == DEVICE else Accelerator()
            loop.train(recipe, accelerator, loop.Hooks(lambda *_: None), identity={})
    assert len(ends) == 9
    return [waits.seen[a:b] for a, b in itertools.pairwise(ends)]


CASES = [
    {},
    {"survival": {"time": "learned"}, "train": {"accumulate": 2}},
    {"process": {"kind": "counts", "head": "loadings", "schedule": [1.0, 0.4, 0.0], "weight": "nll"}},
    {"process": {"kind": "counts", "predict": "x0", "fit": "joint"}, "survival": {"time": "stratified"}},
    {"process": {"kind": "blackout"}},
    {"process": {"kind": "masked"}},
    {"process": {"kind": "jump"}},
    {"process": {"kind": "gaussian"}},
    {"denoiser": {"kind": "transformer", "width": 8, "depth": 1, "heads": 2}},
    {"denoiser": {"kind": "csdi", "width": 8, "depth": 1, "heads": 2}},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_waits_for_nothing_and_a_log_once(atlas, tmp_path, monkeypatch, case):
    monkeypatch.setattr(Optim, "build", unfused)  # (`meta` has no fused kernel)
    monkeypatch.setattr(validation, "generator", lambda *address, device: NoNumbers())
    monkeypatch.setattr(noise, "source", lambda settings, first, cells, device: NoNumbers())
    steps = train(atlas, tmp_path, Waits(), DEVICE, **case)
    found = [len(step) for step in steps]
    assert found == [0, 0, 1, 0, 0, 1, 0, 0], steps
    assert "window.py" in steps[2][0]


def test_the_count_sees_what_waits(atlas, tmp_path, monkeypatch):
    """Each kind of wait, put into the step, is found, with its place."""
    x = torch.ones(4, 5, device=DEVICE)
    kinds = [
        lambda: float(x.sum()), lambda: bool((x > 0).any()), lambda: x.tolist(), lambda: x.cpu(), lambda: x[x > 0],
        lambda: x.nonzero(), lambda: x.masked_select(x > 0), lambda: x.unique(), lambda: torch.where(x > 0),
        lambda: torch.repeat_interleave(x[0].long()), lambda: x.repeat_interleave(x[:, 0].long(), 0),
        lambda: torch.tensor([1.0], device=DEVICE), lambda: torch.as_tensor(1.0, device=DEVICE),
        lambda: x.new_tensor([1.0]), lambda: torch.ones(3).to(DEVICE), lambda: x.copy_(torch.ones(4, 5)),
        lambda: torch.ones(4, 5).copy_(x), lambda: torch.equal(x, x), lambda: torch.linalg.cholesky(x[:, :4]),
        lambda: x.index_put_((x > 0,), torch.ones(10, device=DEVICE)), lambda: torch.bincount(x[0].long()),
    ]  # fmt: skip
    for number, kind in enumerate(kinds):
        with Waits() as waits:
            kind()
        assert len(waits.seen) == 1, number
    with Waits() as waits:
        torch.full((3,), 2.0, device=DEVICE) + 1.0
        torch.ones(3).to(DEVICE, non_blocking=True)
        x.masked_fill(x > 0, 1.0).clamp_min(2.0).repeat_interleave(2, 0)
        torch.repeat_interleave(x[0].long(), output_size=7)
    assert waits.seen == []


def test_a_batch_of_the_resident_copy_waits_for_nothing(atlas):
    store = CountStore.open(atlas)
    copy = Resident.load(store, DEVICE)
    copy.cells(np.arange(3), ("cell_type",))  # labels are sent once
    with Waits() as waits:
        cells = copy.cells(np.arange(20), ("cell_type",))
    assert cells.counts.shape == (20, 30)
    assert waits.seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*CASES[:4], {"train": {"noise": "rows"}}, {"train": {"graph": True}}], ids=str)
def test_on_a_gpu_a_step_waits_for_nothing(atlas, tmp_path, monkeypatch, case):
    """Under torch's own watch over what synchronises, from the noise to the norm of the gradient."""
    real, watched = noise.Noise.draw, []

    def draw(*args):
        if args[-2] == 4:  # past what a first step sets up, before the log of the sixth
            torch.cuda.set_sync_debug_mode("error")
            watched.append(args[-2])
        return real(*args)

    class Watched(loop.Window):
        def add(self, *args):
            super().add(*args)
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(noise.Noise, "draw", draw)
    monkeypatch.setattr(loop, "Window", Watched)
    try:
        train(atlas, tmp_path, Waits(), torch.device("cuda"), **case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched
