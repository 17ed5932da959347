from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from distdiff.data.ingest.shard import shard


def make_counts(n: int, g: int, seed: int = 0) -> sparse.csr_matrix:
    """Negative binomial counts with a wide spread of gene means, float32 as files have them."""
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(-1.5, 1.5, g) * rng.lognormal(0, 0.4, (n, 1))
    return sparse.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32))


def make_adata(x, *, genes=None, names=None, **obs) -> ad.AnnData:
    n, g = x.shape
    genes = [f"g{i}" for i in range(g)] if genes is None else list(genes)
    names = [f"c{i}" for i in range(n)] if names is None else list(names)
    return ad.AnnData(x, obs=pd.DataFrame(obs, index=pd.Index(names)), var=pd.DataFrame(index=pd.Index(genes)))


def save(adata: ad.AnnData, path: Path) -> Path:
    if path.suffix == ".zarr":
        with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
            ad.io.write_elem(zarr.open_group(str(path), mode="w", zarr_format=3), "/", adata)  # not consolidated
    else:
        adata.write_h5ad(path)
    return path


def build(inputs, out, **options):
    """shard() in this process, in silence, several small shards."""
    return shard(
        inputs, out, **{"workers": 0, "progress": False, "block": 16, "blocks_per_shard": 2, "shuffle": False} | options
    )


@pytest.fixture(scope="session")
def dense() -> np.ndarray:
    """What the store of `folder` holds: int64 [150, 40], no empty cell, every gene counted."""
    x = make_counts(150, 40).toarray().astype(np.int64)
    x[:, 0] += 1
    x[np.arange(40), np.arange(40)] += 1
    return x


@pytest.fixture(scope="session")
def folder(dense, tmp_path_factory) -> Path:
    """A small store: 150 cells, 10 blocks, 5 shards, labels ``kind`` (some missing) and ``donor``."""
    root = tmp_path_factory.mktemp("store")
    kind = pd.Categorical(np.array(["T", "B", None, "NK", "B"], dtype=object)[np.arange(150) % 5])
    donor = np.array([f"d{i}" for i in np.arange(150) // 25])
    save(make_adata(sparse.csr_matrix(dense.astype(np.float32)), kind=kind, donor=donor), root / "a.h5ad")
    build(root / "a.h5ad", root / "a.store", labels=("kind", "donor"))
    return root / "a.store"
