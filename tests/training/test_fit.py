"""The batch size that a search finds: where it stops, what it touches, and that a run keeps it."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from distdiff import config, experiment
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.training import fit
from distdiff.training.settings import Recipe
from distdiff.training.trouble import OutOfMemory
from tests.training import processes
from tests.training.test_loop import assert_equal, final, make


def device(speeds, memory=10**9):
    """Seconds of a step on a device of these cells per second, with room for so many cells."""

    def seconds(cells):
        if cells > memory:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
        return cells / speeds(cells)

    return seconds


@pytest.mark.parametrize(
    ("speeds", "memory", "most", "tried", "chosen", "why"),
    [
        (lambda n: min(n, 300), 10**9, 10**6, [8, 16, 32, 64, 128, 256, 512, 1024], 512, "1024 gain nothing"),
        (lambda n: n, 100, 10**6, [8, 16, 32, 64], 64, "128 need more memory"),
        (lambda n: n, 10**9, 40, [8, 16, 32], 32, "64 would leave fewer than 300 steps"),
        (lambda n: 100 / n, 10**9, 10**6, [8, 16], 8, "16 gain nothing"),
        (lambda n: n, 10**9, 3, [8], 8, "16 would leave fewer than 300 steps"),
    ],
)
def test_doubling_ends_where_it_gains_nothing_or_memory_does(speeds, memory, most, tried, chosen, why):
    found, said = fit.search(device(speeds, memory), 8, most)
    assert list(found) == tried
    assert fit.best(found) == chosen
    assert why in said


def test_a_network_too_large_for_the_smallest_batch_says_what_to_do():
    with pytest.raises(OutOfMemory, match=r"not even 8 cells a pass .* smaller train\.grain"):
        fit.search(device(lambda n: n, memory=4), 8, 1000)
    with pytest.raises(RuntimeError, match="another"):
        fit.search(lambda n: (_ for _ in ()).throw(RuntimeError("another error")), 8, 1000)


def test_the_number_is_part_of_the_run_and_goes_on_with_it(atlas, tmp_path, monkeypatch, capsys):
    """Found once, in the config of model and checkpoint, the same weights as if it had been given; kept by a resume."""
    monkeypatch.setattr(fit, "FEWEST", 10)
    speeds = {8: 8.0, 16: 16.0, 32: 32.0, 64: 32.0}
    monkeypatch.setattr(fit._Trial, "seconds", lambda self, n: n / speeds[n])
    settings = make(atlas, tmp_path / "auto", batch="auto")
    assert settings.train.batch == 0
    experiment.train(settings)
    assert "train.batch=32, after a search" in capsys.readouterr().out
    assert json.loads((tmp_path / "auto" / "batch.json").read_text())["batch"] == 32
    assert Model.load(tmp_path / "auto" / "model").info["config"]["train"]["batch"] == 32
    experiment.train(make(atlas, tmp_path / "given", batch=32))
    assert_equal(final(tmp_path / "auto"), final(tmp_path / "given"))

    def never(self, n):
        raise AssertionError("a run that goes on must not search again")

    monkeypatch.setattr(fit._Trial, "seconds", never)
    again = experiment.train(make(atlas, tmp_path / "auto", batch="auto"))
    assert again.progress.step == 40
    assert "train.batch=32, as this run began with" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="search again"):
        experiment.train(make(atlas, tmp_path / "auto", batch="auto", resume="never"))


def test_a_real_search_leaves_the_network_as_it_was(atlas, tmp_path):
    """The sizes are multiples of the grain, within the cells that there are; weights and gradients stay untouched."""
    c = make(atlas, tmp_path, batch="auto", cells=300 * 40)
    store = CountStore.open(atlas)
    model = Model.new(store.spec(("cell_type",)), c.process, c.denoiser)
    before = [w.clone() for w in model.denoiser.parameters()]
    recipe = Recipe(
        store, model.process, model.denoiser, c.survival, c.optim, c.train, labels=("cell_type",)
    )  # fmt: skip
    found = fit.settled(recipe, Accelerator(cpu=True))
    assert found.batch in (8, 16, 32)
    assert all(torch.equal(w, v) and w.grad is None for w, v in zip(model.denoiser.parameters(), before, strict=True))


@pytest.mark.distributed
def test_processes_agree_on_one_number(atlas, tmp_path):
    """640 cells leave room for no more than a grain of 8 on each of two processes: 16 cells a step."""
    ranks = processes.run(
        make(atlas, tmp_path / "run", batch="auto", cells=640),
        tmp_path / "log",
        world=2,
        environment={"ACCELERATE_USE_CPU": "true"},
    )
    assert [len(losses) for losses, _ in ranks] == [40, 40]
    assert json.loads((tmp_path / "run" / "batch.json").read_text())["batch"] == 16
    assert all(0 <= log["data_wait"] < 1 for log in ranks[0][1])
    assert [log["data_wait"] for log in ranks[0][1]] == [log["data_wait"] for log in ranks[1][1]]


def test_a_size_that_is_no_number_is_refused(atlas):
    with pytest.raises(ValueError, match=r"train\.batch='many'"):
        config.parse({"data": {"store": str(atlas)}, "train": {"batch": "many"}})
    with pytest.raises(ValueError, match=r"train\.batch must be a number of cells or auto, got -1"):
        config.parse({"data": {"store": str(atlas)}, "train": {"batch": -1}})


def test_a_size_that_was_not_settled_is_refused(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "settled", lambda recipe, _: recipe.settings)
    with pytest.raises(ValueError, match=r"train\.batch=auto must be settled before training"):
        experiment.train(make(atlas, tmp_path, batch="auto"))
