from __future__ import annotations

import pytest
import torch

from distdiff.denoise import Denoiser
from distdiff.imputers.conditional import Conditional
from distdiff.imputers.repaint import RePaint
from distdiff.process.counts import Counts
from distdiff.process.schedule import levels
from distdiff.rng import generator
from distdiff.sampling import predictor, sample, to_depth
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
    want = min(w, 1) * conditional + (1 - min(w, 1)) * unconditional  # all genes alike: the total is all there is
    assert torch.allclose(eta[..., 0], want[:, None].expand(2, 3))
    assert (network.calls, network.rows) == (calls, rows)


@pytest.mark.parametrize("w", [0.5, 1.5, 3.0])
def test_guidance_moves_shares_and_keeps_the_total(w):  # docs/MATHS.md 4.6
    rng = generator(0, "guidance")
    law, p = Counts(), torch.tensor([[0.0, 0.2, 1.0, 0.7]]).expand(5, 4)
    c, u = (torch.stack((rng.normal(5, 4) * 2, rng.normal(5, 4)), -1) for _ in range(2))
    eta = law.guided(c, u, w, p)
    shift = eta[..., 0] - (u + w * (c - u))[..., 0]
    assert torch.allclose(shift, shift[:, :1].expand(5, 4), atol=1e-4)  # one factor a cell, shares as before
    total, total_c, total_u = (law.lost(e, p).sum(1).log() for e in (eta, c, u))
    assert torch.allclose(total, total_c if w >= 1 else (1 - w) * total_u + w * total_c, atol=1e-4)
    assert torch.equal(eta[..., 1], (u + w * (c - u))[..., 1])
    whole = law.guided(c, u, w, torch.ones(5, 4))  # nothing is lost: nothing to hold, and no NaN
    assert whole.isfinite().all()


def test_a_walk_to_a_depth_keeps_shares_and_reaches_it():  # docs/MATHS.md 4.12
    law, rng = Counts(head="mean"), generator(0, "depth")
    share = torch.tensor([0.1, 0.2, 0.7])
    wanted = torch.tensor([300.0, 3000.0]).repeat(500).unsqueeze(1)
    predict = to_depth(law, lambda x, p: (1000 * share).log().expand_as(x).unsqueeze(-1), wanted)
    x = sample(law, predict, torch.zeros(1000, 3), list(levels(law.schedule, 16, "geometric")), rng=rng)
    for depth in (300.0, 3000.0):
        of = x[wanted[:, 0] == depth]
        assert float(of.sum(1).mean()) == pytest.approx(depth, rel=0.02)
        assert torch.allclose(of.mean(0) / of.sum(1).mean(), share, atol=0.01)
    full = to_depth(law, lambda x, p: torch.zeros(2, 3, 1), torch.tensor([[5.0], [5.0]]))
    assert law.lost(full(torch.tensor([[9.0, 0, 0], [5.0, 0, 0]]), P), P).sum() == 0  # as deep as wanted: no more


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
