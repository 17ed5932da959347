"""Attention under masks and over ragged cells against a softmax written out; why a kernel cannot run."""

from __future__ import annotations

import pytest
import torch

from distdiff.denoise.attention import Ragged, attend, no_flash


def softmax(q, k, v, seen):
    logits = (q @ k.transpose(-1, -2) * v.shape[-1] ** -0.5).masked_fill(~seen[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_in_a_channel_is_exact(dtype):
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 7, generator=rng).to(dtype).requires_grad_() for n in (5, 9))
    v = torch.randn(2, 3, 9, 8, generator=rng).to(dtype).requires_grad_()
    seen = torch.rand(2, 9, generator=rng) < 0.5
    seen[:, 0] = True
    out = attend(q, k, v, seen)
    want = softmax(q.float(), k.float(), v.float(), seen)
    assert torch.allclose(out.float(), want, atol=1e-5 if dtype == torch.float32 else 0.03)
    d_k, d_v = torch.autograd.grad(out.float().square().sum(), (k, v))
    assert d_v.transpose(1, 2)[~seen].abs().max() == 0
    assert d_k.transpose(1, 2)[~seen].abs().max() == 0
    louder = torch.where(seen[:, None, :, None], k, 50.0).to(dtype)
    assert torch.equal(attend(q, louder, v, seen), out)


@pytest.mark.parametrize("cells", [1, 3, 11])
def test_ragged_cells_answer_as_each_would_alone(cells):
    rng = torch.Generator().manual_seed(cells)
    n_q, n_k = torch.randint(1, 9, (cells,), generator=rng), torch.randint(1, 7, (cells,), generator=rng)
    q_cell, k_cell = (torch.arange(cells).repeat_interleave(n) for n in (n_q, n_k))
    q, k, v = (torch.randn(len(c), 2, e, generator=rng) for c, e in ((q_cell, 7), (k_cell, 7), (k_cell, 8)))
    got = Ragged(q_cell, k_cell, cells).attend(q, k, v)
    for cell in range(cells):
        alone = [x[c == cell].transpose(0, 1).unsqueeze(0) for x, c in ((q, q_cell), (k, k_cell), (v, k_cell))]
        want = softmax(*alone, torch.ones(1, int(n_k[cell]), dtype=torch.bool))
        assert torch.allclose(got[q_cell == cell], want[0].transpose(0, 1), atol=1e-5)


@pytest.mark.gpu
def test_the_variable_length_kernel_answers_as_the_padded_one(gpu):
    rng = torch.Generator().manual_seed(0)
    n_q, n_k = torch.randint(1, 900, (7,), generator=rng), torch.randint(1, 700, (7,), generator=rng)
    q_cell, k_cell = (torch.arange(7).repeat_interleave(n) for n in (n_q, n_k))
    q, k, v = (torch.randn(len(c), 4, e, generator=rng) for c, e in ((q_cell, 63), (k_cell, 63), (k_cell, 64)))
    want = Ragged(q_cell, k_cell, 7).attend(q, k, v)
    ragged = Ragged(q_cell.to(gpu), k_cell.to(gpu), 7)
    got = ragged.attend(*(x.to(gpu, torch.bfloat16) for x in (q, k, v)))
    assert torch.allclose(got.float().cpu(), want, atol=0.03)


@pytest.mark.parametrize(
    ("capability", "dtype", "channels", "built", "words"),
    [
        ((8, 6), torch.bfloat16, 64, True, ""),
        ((9, 0), torch.float16, 256, True, ""),
        ((7, 5), torch.float16, 64, True, "capability 7.5, they need 8.0"),
        ((9, 0), torch.float32, 64, True, "float32, they need bfloat16"),
        ((9, 0), torch.bfloat16, 20, True, "20 channels"),
        ((9, 0), torch.bfloat16, 64, False, "built without"),
    ],
)
def test_why_flash_attention_cannot_run(capability, dtype, channels, built, words):
    reason = no_flash(capability, dtype, channels, built)
    assert words in reason if words else reason == ""


def test_a_kernel_that_cannot_run_is_told_once(monkeypatch, caplog):
    from distdiff.denoise import attention

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    attention._tell_kernel.cache_clear()
    for _ in range(3):
        attention._tell_kernel(torch.device("cuda", 0), torch.float16, 64)
    attention._tell_kernel.cache_clear()
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention: flash kernels cannot run (compute capability 7.0, they need 8.0); "
        "torch takes another kernel, slower"
    )
