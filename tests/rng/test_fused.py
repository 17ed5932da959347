"""The kernels draw the numbers of Rows: bit for bit under Triton's interpreter, nearly so and in law on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from scipy import stats

from distdiff import imputers
from distdiff.rng.rows import Rows
from tests.rng.test_rows import follows

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def calls(rng: Rows, cells: int, genes: int) -> dict[str, torch.Tensor]:
    """Every law, one call after another, over seven decades of its parameters; on the generator's device."""
    given = torch.Generator().manual_seed(1)
    mean = 10 ** (torch.rand(cells, genes, generator=given) * 7 - 3)
    log_size, p = torch.rand(cells, genes, generator=given) * 10 - 5, torch.rand(cells, genes, generator=given)
    p[0], mean[1, : genes // 2] = torch.tensor([0.0, 1.0]).repeat(genes)[:genes], 0.0
    mean, log_size, p = (a.to(rng.device) for a in (mean, log_size, p))
    return {
        "uniform": rng.uniform(cells, genes),
        "normal": rng.normal(cells, genes),
        "binomial": rng.binomial((3 * mean).ceil(), p),
        "nb": rng.nb(mean, log_size),
        "one p a cell": rng.binomial(mean.ceil(), p[:, :1]),
        "poisson": rng.poisson(mean),
        "none": rng.binomial(mean[:0], p[:0]) if cells == 0 else mean[:0],
        "as it was": rng.uniform(cells, 1),
    }


def both(cells: int, genes: int, device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    rows = torch.arange(cells) * 7919
    made = [Rows(rows, rows % 3, 5, "test"), Rows(rows.to(device), (rows % 3).to(device), 5, "test", fused=True)]
    return [{k: v.cpu() for k, v in calls(rng, cells, genes).items()} for rng in made]


def same_numbers() -> None:
    for name, want in (pair := both(9, 31))[0].items():
        got = pair[1][name]
        assert got.shape == want.shape, name
        assert torch.allclose(got, want, atol=1e-6) if name == "normal" else torch.equal(got, want), name
    row, column = torch.tensor([3, 0, 23, 3]), torch.tensor([50, 1, 2, 7])
    rows = torch.arange(24)
    plain, fused = (Rows(rows, rows, 5, fused=f) for f in (False, True))
    mean = torch.tensor([[0.5], [2000.0], [4.0], [30.0]])
    for rng in (plain, fused):
        rng.uniform(24, 2)
    with plain.only(row, column), fused.only(row, column):
        assert torch.equal(plain.nb(mean, mean.log() - 3), fused.nb(mean, mean.log() - 3))
    odd = torch.tensor([[float("inf"), float("nan"), 3.0]])
    one = Rows(rows[:1], rows[:1], 0, fused=True)
    for x in (one.poisson(odd), one.nb(odd, torch.zeros(1, 3)), one.binomial(odd, torch.full((1, 3), 0.4))):
        assert x.isnan().tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match="3 rows of noise were asked for, the generator names 1"):
        one.uniform(3, 2)


@needs_triton
def test_interpreted_kernels_draw_the_same_numbers():
    """In a process of its own, as Triton is told when it is imported."""
    code = "import warnings; warnings.simplefilter('ignore'); from tests.rng.test_fused import same_numbers as s; s()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("law", ["uniform", "binomial", "poisson", "nb"])
def test_kernels_compile_for_a_gpu_that_is_not_there(law):
    """To machine code of an H100, types and loops included; as a first call (1) and any other."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distdiff.rng import fused

    kernel = getattr(fused, f"_{law}")
    constants = {"COLUMNS": law == "nb", "BLOCK": fused.BLOCK, **({"LAW": 1} if law == "uniform" else {})}
    floats = ("out", "n", "p", "rate", "mean", "log_size")
    kinds = {"start": "*i64", "columns": "*i64", **dict.fromkeys(("wide", "size", "call"), "i32")}
    kinds |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature={k: kinds[k] for k in kernel.arg_names}, constexprs=constants)
    assert (
        len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["cubin"])
        > 1000
    )


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_numbers_are_nearly_all_the_same():
    want, got = both(300, 2000, "cuda")
    assert torch.equal(got.pop("uniform"), want.pop("uniform"))
    assert torch.allclose(got.pop("normal"), want.pop("normal"), atol=1e-4)
    for name in want:
        assert (got[name] != want[name]).sum() <= 1e-4 * want[name].numel(), name


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_laws_hold():
    n, shape = 20_000, (20_000, 2)
    rng = Rows(torch.arange(n).cuda(), torch.zeros(n).long().cuda(), 0, "laws", fused=True)

    def full(value: float) -> torch.Tensor:
        return torch.full(shape, float(value), device="cuda")

    for rate in (0.05, 9.99, 10.0, 3000.0):
        follows(rng.poisson(full(rate)).cpu(), stats.poisson(rate))
    for n_, p in ((7, 0.9), (40, 0.2), (5000, 0.3)):
        follows(rng.binomial(full(n_), full(p)).cpu(), stats.binom(n_, p))
    for mean, log_size in ((0.1, -0.7), (9.0, 4.6), (5.0, -2.3), (5e4, -0.3)):
        size = float(full(log_size).exp()[0, 0])
        follows(rng.nb(full(mean), full(log_size)).cpu(), stats.nbinom(size, size / (size + mean)))


def test_where_kernels_do_not_run_draws_are_torchs(caplog):
    """No GPU, no triton, no compiler: told once, and nothing fails."""
    imputers._kernels_run.cache_clear()
    assert not any(imputers._kernels_run(torch.device("cpu")) for _ in range(2))
    assert caplog.text.count("draws are not made by fused kernels on cpu") == 1
    assert not imputers.fused_draws(torch.device("cpu"))
