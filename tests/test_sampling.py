from __future__ import annotations

import pytest
import torch

from distdiff.denoise import Denoiser
from distdiff.imputers.conditional import Conditional
from distdiff.imputers.repaint import RePaint
from distdiff.process.counts import Counts
from distdiff.process.schedule import levels
from distdiff.rng import generator
from distdiff.sampling import predictor, sample
from distdiff.types import Cells, Condition


class Affine(Denoiser):
    """A stand-in denoiser that counts its calls; its answer depends on the label."""

    def __init__(self, outputs=1):
        super().__init__()
        self.calls, self.rows, self.outputs = 0, 0, outputs

    def forward(self, x, p, cond):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        label = cond.labels["type"].float() if cond.labels else torch.zeros(len(x))
        return (0.3 + 0.5 * label[:, None] + 0.0 * x).unsqueeze(-1).repeat(1, 1, self.outputs)


COND = Condition({"type": torch.tensor([0, 1])})
X, P = torch.zeros(2, 3), torch.full((2, 3), 0.25)


@pytest.mark.parametrize(("w", "calls", "rows"), [(0.0, 1, 2), (1.0, 1, 2), (2.0, 1, 4)])
def test_guidance_mixes_log_rates_and_calls_once(w, calls, rows):  # docs/MATHS.md 4.6
    network = Affine()
    eta = predictor(Counts(head="mean"), network, COND, guidance=w)(X, P)
    conditional, unconditional = torch.tensor([0.3, 0.8]), torch.tensor([-0.2, -0.2])
    want = w * conditional + (1 - w) * unconditional
    assert torch.allclose(eta[..., 0], want[:, None].expand(2, 3))
    assert (network.calls, network.rows) == (calls, rows)


def test_draws_repeat_their_covariates():
    eta = predictor(Counts(head="mean"), Affine(), COND)(X.repeat(3, 1), P.repeat(3, 1))
    assert torch.allclose(eta[:, 0, 0], torch.tensor([0.3, 0.8] * 3))


@pytest.mark.parametrize("sigma", [("none", 0.0), ("max", 0.0), ("cap", 0.05), ("rescale", 0.1)])
def test_walk_visits_every_level_and_ends_whole(sigma):
    seen = []
    process, grid = Counts(head="mean"), levels(Counts().schedule, 6)
    out = sample(
        process, predictor(process, Affine(), COND), X, list(grid), sigma=sigma, rng=generator(0),
        on_step=lambda x, p: (seen.append(float(p)), x)[1],
    )  # fmt: skip
    assert seen == grid[1:].tolist()
    assert torch.equal(out, out.round())
    assert (out >= 0).all()


def cells():
    counts = torch.poisson(torch.full((4, 30), 2.0), generator=torch.Generator().manual_seed(0))
    return Cells(counts, Condition({"type": torch.tensor([0, 1, 0, 1])}), torch.arange(4)), torch.rand(4, 30) < 0.5


@pytest.mark.parametrize("head", ["mean", "nb"])
@pytest.mark.parametrize(
    ("kind", "options", "calls"),
    [
        (Conditional, {}, 1),
        (Conditional, {"steps": 4}, 4),
        (RePaint, {"steps": 6}, 6),
        (RePaint, {"steps": 6, "jump": 3, "iters": 2}, 11),  # the first group never goes back to p = 0
    ],
)
def test_imputers_keep_evidence_ignore_targets_and_call_as_often_as_they_say(kind, options, calls, head):
    process = Counts(head=head)
    network = Affine(process.outputs)
    batch, observed = cells()
    imputer = kind(process, network, **options)
    answer = imputer.impute(batch, observed, draws=3, seed=5)
    assert network.calls == calls
    assert answer.draws.shape == (3, 4, 30)
    assert torch.equal(answer.draws, answer.draws.round())
    for values in (answer.mean, *answer.draws):
        assert torch.equal(values[observed], batch.counts[observed])
    poisoned = Cells(torch.where(observed, batch.counts, 1e6), batch.labels, batch.rows)
    again = imputer.impute(poisoned, observed, draws=3, seed=5)
    assert torch.equal(again.draws, answer.draws)
    assert torch.equal(again.mean, answer.mean)
    other = imputer.impute(batch, observed, draws=3, seed=6)
    assert not torch.equal(other.draws, answer.draws)
    assert imputer.impute(batch, observed, draws=0).draws is None


def test_mean_is_one_call_and_the_rate():  # docs/MATHS.md 5.3
    network, (batch, observed) = Affine(1), cells()
    answer = Conditional(Counts(head="mean"), network).impute(batch, observed)
    assert network.calls == 1
    want = torch.tensor([0.3, 0.8, 0.3, 0.8]).exp()[:, None].expand(4, 30)
    assert torch.allclose(answer.mean[~observed], want[~observed])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Conditional(Counts(), Affine(), steps=0), "steps=0"),
        (lambda: RePaint(Counts(), Affine(), jump=0), "jump >= 1, got 0"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "options", [{"head": "nb"}, {"head": "mean"}, {"head": "nb", "leap": "plain"}, {"head": "loadings"}]
)
def test_drawing_targets_alone_draws_the_same(options):
    """An entry's numbers have an address, so leaving others out changes nothing."""
    from distdiff.rng.rows import Rows

    process = Counts(**options)
    chance = torch.Generator().manual_seed(0)
    eta = torch.randn(40, 30, process.outputs, generator=chance)
    eta[..., 0] += torch.linspace(-3, 5, 30)  # rates below and above those that are drawn by inversion
    seen = torch.rand(40, 30, generator=chance) < 0.6
    x = torch.where(seen, torch.poisson(torch.full((40, 30), 3.0), generator=chance), 0.0)
    p = seen.float()
    grid = [torch.maximum(p, torch.tensor(level)) for level in (0.0, 0.4, 1.0)]

    def walk(only):
        rng = Rows(torch.arange(40), torch.zeros(40).long(), 3, "test")
        return sample(process, lambda x, p: eta, x, grid, rng=rng, only=only)

    whole = walk(None)
    assert (whole[~seen] > 20).any()
    assert torch.equal(walk(~seen), whole)
    assert torch.equal(whole[seen], x[seen])
