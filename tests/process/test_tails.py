"""A gene's largest count in training holds its predictive law back (docs/MATHS.md 3.8)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.process.counts import Counts
from distdiff.sampling import predictor
from distdiff.types import Condition


@pytest.mark.parametrize("head", ["nb", "loadings"])
def test_no_scale_exceeds_the_largest_count_and_small_ones_stay(head):
    law = Counts(head=head, loadings=2)
    rate, size = torch.tensor([[140.0, 0.02, 3.0]]), torch.tensor([[0.047, 0.5, 2.0]])
    eta = torch.stack([rate.log(), size.log(), *[torch.ones(1, 3)] * (law.outputs - 2)], -1)
    largest = torch.tensor([197.0, 4.0, 300.0])
    found = law.moderated(eta, largest)
    torch.testing.assert_close(law.rate(found), rate)
    torch.testing.assert_close(law.log_size(found).exp(), size + rate / largest)
    assert bool((rate / law.log_size(found).exp() < largest).all())
    assert (law.log_size(found) - law.log_size(eta))[0, 1:].max() < 0.011
    assert torch.equal(found[..., 2:], eta[..., 2:])
    before, after = (
        stats.nbinom.sf(3 * 197, s, s / (s + 140)) for s in (0.047, law.log_size(found)[0, 0].exp().item())
    )
    assert before > 0.05
    assert after < 0.025


def test_what_has_no_size_is_left_alone():
    law, eta = Counts(head="mean"), torch.zeros(1, 2, 1)
    assert law.moderated(eta, torch.ones(2)) is eta


def test_a_model_keeps_the_largest_counts_and_answers_by_them(atlas, tmp_path):
    store = CountStore.open(atlas)
    model = Model.new(store.spec(()), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    train = store.read(store.rows("train"))
    assert np.array_equal(model.denoiser.largest.numpy(), train.max(0).toarray().ravel())
    again = Model.load(model.save(tmp_path / "model"))
    assert torch.equal(again.denoiser.largest, model.denoiser.largest)

    without = Model.new(
        dataclasses.replace(model.spec, gene_max=None), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1}
    )
    older = Model.load(without.save(tmp_path / "older"))  # as models were before
    assert older.denoiser.largest is None
    x, p = torch.zeros(1, 30), torch.zeros(1, 30)
    ours, theirs = (predictor(m.process, m.denoiser, Condition())(x, p) for m in (again, older))
    assert torch.equal(ours[..., 0], theirs[..., 0])
    assert bool((ours[..., 1] > theirs[..., 1]).all())
