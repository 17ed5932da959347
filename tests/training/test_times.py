"""Times of training cells: even over the global batch for any number of ranks, learned from the loss without bias."""

from __future__ import annotations

import json

import pytest
import torch

from distdiff.rng import generator
from distdiff.training.times import BINS, Times

CPU = torch.device("cpu")


class Alone:
    """An accelerator of one process."""

    num_processes, process_index, is_main_process = 1, 0, True

    @staticmethod
    def reduce(tensor, how):
        return tensor

    @staticmethod
    def gather(tensor):
        return tensor


class First(Alone):
    """... and the first of two."""

    num_processes = 2


class Second(First):
    """... and the second."""

    process_index, is_main_process = 1, False


def test_stratified_times_are_even_over_the_global_batch_whoever_draws_them():
    times = Times("stratified", 64, 0, CPU)
    whole, weight = times.draw(5, 0, 64, rng=generator(0))
    assert torch.equal(torch.sort((whole[:, 0] * 64).long()).values, torch.arange(64))  # one in each stratum
    assert (weight == 1).all()
    halves = torch.cat([times.draw(5, place, 32, rng=generator(9))[0] for place in (0, 32)])
    assert torch.equal(halves, whole)
    assert not torch.equal(times.draw(6, 0, 64, rng=generator(0))[0], whole)


def test_learned_times_follow_the_loss_and_their_weights_undo_it():
    times, rng = Times("learned", 4096, 0, CPU), generator(0, "learned")
    for step in range(12):
        t, _ = times.draw(step, 0, 4096, rng=rng)
        times.record(t, 1.0 + 9.0 * (t[:, 0] < 0.25), torch.ones(4096, dtype=torch.bool))
        times.update(Alone())
    t, weight = times.draw(20, 0, 4096, rng=rng)
    early = (t[:, 0] < 0.25).float()
    share = 0.1 + 0.9 * 10 / 3.25  # floor and root mean square, over their mean
    assert float(early.mean()) == pytest.approx(0.25 * share, rel=0.03)
    assert float(weight.mean()) == pytest.approx(1, abs=0.02)
    assert float((weight[:, 0] * early).mean()) == pytest.approx(0.25, abs=0.01)  # the mean of the loss is unchanged
    assert weight.max() <= 1 / 0.1 + 1e-3


def test_hidden_cells_do_not_teach_and_the_density_travels():
    times = Times("learned", 8, 0, CPU)
    t = torch.full((8, 1), 0.5)
    times.record(t, torch.full((8,), 100.0), torch.zeros(8, dtype=torch.bool))
    times.update(Alone())
    assert times.state(Alone())["density"] == [1.0] * BINS
    times.record(t, torch.full((8,), 2.0), torch.ones(8, dtype=torch.bool))
    times.update(Alone())
    again = Times("learned", 8, 0, CPU)
    again.load(times.state(Alone()), Alone())
    assert torch.equal(again.draw(3, 0, 8, rng=generator(0))[0], times.draw(3, 0, 8, rng=generator(0))[0])


def test_what_was_recorded_since_the_density_moved_is_kept_for_any_number_of_processes():
    times, t = Times("learned", 8, 0, CPU), torch.linspace(0, 0.99, 8).unsqueeze(1)
    times.record(t, torch.arange(1.0, 9), torch.ones(8))
    state = json.loads(json.dumps(times.state(Alone())))
    for ranks in ((Alone,), (First, Second)):
        parts = []
        for rank in ranks:
            parts.append(Times("learned", 8, 0, CPU))
            parts[-1].load(state, rank())
        assert torch.equal(sum(part.sums for part in parts), times.sums)


def test_uniform_times_come_from_the_cells_own_noise():
    t, weight = Times("uniform", 64, 0, CPU).draw(0, 0, 1000, rng=generator(4))
    assert torch.equal(t, generator(4).uniform(1000, 1))
    assert (weight == 1).all()
