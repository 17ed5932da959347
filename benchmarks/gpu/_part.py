"""What the parts share: options, results that are written as they come, a deadline, the device, made stores."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).parents[1]
sys.path.append(str(BENCHMARKS))  # for what the other benchmarks import of each other

from distdiff import files  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16


class Part:
    """A part of the run: its options, and what it found, on disk after every addition."""

    def __init__(self, about: str | None) -> None:
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, help="JSON to write")
        parser.add_argument("--work", type=Path, required=True, help="folder for what is made on the way")
        parser.add_argument("--seconds", type=float, default=60.0, help="time that this part has")
        parser.add_argument("--dry", action="store_true", help="small, to see that it runs")
        a = parser.parse_args()
        self.out, self.work, self.dry = a.out, a.work, a.dry
        self.ends = time.monotonic() + a.seconds
        self.found: dict[str, Any] = {}
        self.work.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()

    def add(self, name: str, value: Any, *, show: bool = True) -> None:
        """Keep a finding, on disk at once."""
        self.found[name] = value
        with files.whole(self.out, overwrite=True) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1, default=float))
        if show:
            print(f"{name}: {json.dumps(value, default=float)}", flush=True)

    def case(self, name: str, needs: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Keep what ``measure`` returns; what stops it is the result then, and the next case begins.

        With fewer than ``needs`` seconds left it is not begun.
        """
        began = time.monotonic()
        if not self.dry and self.left() < needs:
            found = {"skipped": f"{self.left():.0f} s were left, it needs about {needs:.0f}"}
        else:
            try:
                found = measure()
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            release()
        self.add(name, {**found, "took s": round(time.monotonic() - began, 1)})
        return found


def beside(name: str) -> Any:
    """The script ``benchmarks/<name>.py`` as a module, whatever the names of the parts."""
    found = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def release() -> None:
    """Give freed device memory back, so that one case does not starve the next."""
    import gc

    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait() -> None:
    """Wait until the device has done what it was told."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_flops(size: int = 8192) -> float:
    """FLOP/s of a large bf16 matrix product on random numbers: the ceiling that shares are of."""
    size = size if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=HALF) for _ in range(2))
    took = []
    for _ in range(12):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        took.append(time.perf_counter() - began)
    return 2 * size**3 / sorted(took[2:])[5]


class Load:
    """``with Load() as load: ...; load.busy``: share of the time in which the GPU had a kernel running (NVML)."""

    def __enter__(self) -> Load:
        self.seen: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def busy(self) -> float | None:
        return sum(self.seen) / len(self.seen) / 100 if self.seen else None

    def _watch(self) -> None:
        if DEVICE.type != "cuda":
            return
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._stop.wait(0.1):
            self.seen.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)


def made(
    folder: Path, cells: int, genes: int, *, molecules: float = 400.0, copies: int = 1, seconds: float = 1e9
) -> Path:
    """A store of made cells (gamma-Poisson, ``molecules`` a cell on average), drawn on the device.

    Parameters
    ----------
    copies
        How often the files of ``cells / copies`` cells are given to ``shard``.
    seconds
        Time for making: where the first file says that it would not do, fewer cells are made and given more often.
    """
    import anndata as ad
    import numpy as np
    import pandas as pd
    from scipy import sparse

    from distdiff.data.ingest.shard import shard

    store = folder / f"{cells}x{genes}.zarr"
    if store.exists():
        return store
    piece = min(cells, 50_000)
    rng = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.from_numpy(np.random.default_rng(0).gamma(0.25, 1.0, genes) + 1e-4).float().to(DEVICE)
    weight *= molecules / weight.sum()
    inputs: list[Path] = []
    began = time.perf_counter()
    for number, first in enumerate(range(0, -(-cells // copies), piece)):
        n = min(piece, -(-cells // copies) - first)
        parts = []
        for start in range(0, n, 10_000):
            depth = torch.empty(min(10_000, n - start), 1, device=DEVICE).log_normal_(0, 0.4, generator=rng)
            x = torch.poisson(depth * weight, generator=rng)
            row, column = x.nonzero(as_tuple=True)
            starts = torch.bincount(row, minlength=len(x)).cumsum(0).cpu().numpy()
            parts.append(sparse.csr_matrix(
                (x[row, column].cpu().numpy(), column.int().cpu().numpy(), np.r_[0, starts]), shape=tuple(x.shape),
            ))  # fmt: skip
        obs = pd.DataFrame(index=[f"c{number}_{i}" for i in range(n)])
        var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
        inputs.append(folder / f"made{genes}_{number}.h5ad")
        ad.AnnData(sparse.vstack(parts, format="csr"), obs=obs, var=var).write_h5ad(inputs[-1])
        whole = (time.perf_counter() - began) / (first + n) * -(-cells // copies)
        if copies == 1 and whole > seconds:
            copies = -(-cells // (first + n))
            break
    shard(inputs * copies, store, progress=False, split=(0.98, 0.01, 0.01))
    for path in inputs:
        path.unlink()
    return store
