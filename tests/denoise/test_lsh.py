"""Hashed attention against a dense softmax over the same meetings, and the rules of these (docs/MATHS.md 10.1)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distdiff.denoise import lsh
from distdiff.denoise.lsh import ITSELF, lsh_attention, meetings, places, rotations


def made(n, *, cells=2, heads=3, channels=6, share=0.6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    qk, v = (torch.randn(cells, heads, n, channels, generator=rng).requires_grad_() for _ in range(2))
    seen = torch.rand(cells, n, generator=rng) < share
    seen[:, 0] = True
    return qk, v, seen


def often(qk, seen, turns, bucket):
    """How often each query meets each key over the rounds, ``[l n n]``."""
    pairs, n = qk.shape[:2]
    found = torch.zeros(pairs, n + 1, n + 1)
    for turn in turns:
        met = meetings(places(qk, turn), seen, bucket)
        pair = torch.arange(pairs).view(-1, 1, 1, 1)
        one = torch.ones(())
        found.index_put_((pair, met.query.unsqueeze(-1), met.keys().unsqueeze(-2)), one, accumulate=True)
    return found[:, :n, :n]


def dense(qk, v, seen, turns, bucket):
    cells, heads, n, e = qk.shape
    q, k = qk.flatten(0, 1), F.normalize(qk, dim=-1).flatten(0, 1)
    weights = often(q.detach(), seen.repeat_interleave(heads, 0), turns, bucket)
    logits = torch.where(torch.eye(n, dtype=torch.bool), torch.tensor(ITSELF), q @ k.transpose(1, 2) * e**-0.5)
    return ((logits + weights.log()).softmax(-1) @ v.flatten(0, 1)).view(cells, heads, n, e)


@pytest.mark.parametrize(
    ("n", "bucket", "share"), [(13, 4, 0.6), (13, 16, 0.6), (40, 4, 0.3), (40, 8, 1.0), (9, 1, 0.5)]
)
@pytest.mark.parametrize("workspace", [1 << 18, 1])
def test_answers_and_gradients_are_those_of_a_dense_softmax(n, bucket, share, workspace, monkeypatch):
    monkeypatch.setitem(lsh.WORKSPACE, "cpu", workspace)
    qk, v, seen = made(n, share=share)
    turns = rotations(6, n, bucket, 3, rng=torch.Generator().manual_seed(1))
    got, want = lsh_attention(qk, v, seen, turns, bucket), dense(qk, v, seen, turns, bucket)
    assert torch.allclose(got, want, atol=1e-5)
    above = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    for mine, theirs in zip(
        torch.autograd.grad(got, (qk, v), above), torch.autograd.grad(want, (qk, v), above), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_one_bucket_is_full_shared_attention():
    qk, v, seen = made(20, share=0.7)
    logits = qk @ F.normalize(qk, dim=-1).transpose(-1, -2) * 6**-0.5
    logits = logits.masked_fill(torch.eye(20, dtype=torch.bool), ITSELF).masked_fill(~seen[:, None, None], -torch.inf)
    want = logits.softmax(-1) @ v
    for rounds in (1, 4):
        turns = rotations(6, 20, 20, rounds, rng=torch.Generator().manual_seed(1))
        assert torch.allclose(lsh_attention(qk, v, seen, turns, 20), want, atol=1e-5)


def test_every_query_meets_its_chunk_and_the_one_before():
    """All seen, n a multiple of the bucket: two chunks of keys a query a round, each key at most once."""
    qk, _, _ = made(48)
    turn = rotations(6, 48, 8, 1, rng=torch.Generator().manual_seed(1))
    counts = often(qk.detach().flatten(0, 1), torch.ones(6, 48, dtype=torch.bool), turn, 8)
    assert torch.equal(counts.sum(-1), torch.full((6, 48), 16.0))
    assert counts.max() == 1
    assert torch.equal(counts.diagonal(dim1=1, dim2=2), torch.ones(6, 48))


def test_tokens_that_are_not_seen_ask_and_are_never_met():
    qk, _, seen = made(40, share=0.4)
    seen = seen.repeat_interleave(3, 0)
    turn = rotations(6, 40, 4, 2, rng=torch.Generator().manual_seed(1))
    counts = often(qk.detach().flatten(0, 1), seen, turn, 4)
    assert counts.transpose(1, 2)[~seen].max() == 0
    assert counts.sum(-1).min() >= 2  # each meets something in each round


def test_rotations_are_those_of_their_generator():
    one, two, other = (rotations(8, 5000, 16, 2, rng=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.shape == (2, 2, 8, 9)  # 313 chunks: two factors of 18 buckets
    assert rotations(8, 500, 16, 2).shape == (2, 1, 8, 16)  # 32 chunks: 32 buckets


def test_tokens_alike_share_a_bucket():
    rng = torch.Generator().manual_seed(0)
    turn = rotations(16, 1000, 10, 1, rng=rng)[0]
    centre = torch.randn(1, 30, 16, generator=rng)
    near = centre + 0.05 * torch.randn(1, 30, 16, generator=rng)
    same = (places(centre, turn).floor() == places(near, turn).floor()).float().mean()
    far = (places(centre, turn).floor() == places(centre.flip(1), turn).floor()).float().mean()
    assert same > 0.8
    assert far < 0.2


def test_twice_is_the_same():
    qk, v, seen = made(300)
    turns = rotations(6, 300, 16, 2, rng=torch.Generator().manual_seed(1))
    assert torch.equal(lsh_attention(qk, v, seen, turns, 16), lsh_attention(qk, v, seen, turns, 16))


def test_a_backward_pass_outside_autocast(monkeypatch):
    """CUDA's autocast leaves a normalised key float32, a CPU's does not; the backward pass knows neither."""
    normalize = F.normalize
    monkeypatch.setattr(F, "normalize", lambda x, dim: normalize(x.float(), dim=dim))
    qk, v = (torch.randn(2, 2, 40, 8).bfloat16().requires_grad_() for _ in range(2))
    seen = torch.ones(2, 40, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        out = lsh_attention(qk, v, seen, rotations(8, 40, bucket=8, rounds=2), bucket=8)
    out.float().square().sum().backward()
    assert out.dtype == qk.grad.dtype == v.grad.dtype == torch.bfloat16
    assert qk.grad.isfinite().all()
    assert v.grad.abs().sum() > 0
