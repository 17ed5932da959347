"""Imputation of files: the output is the input, plus layers written row block by row block."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from distdiff import files
from distdiff.component import nearest
from distdiff.data.export import zarr_v3
from distdiff.data.masks import load_mask
from distdiff.data.source import Source
from distdiff.data.store import CountStore
from distdiff.model import Model
from distdiff.tasks.impute import Filled, Job, extend

ROWS = 256  # rows of a chunk on disk


class StoreRows:
    """A distdiff store behind the face of a Source."""

    def __init__(self, store: CountStore):
        self.store, self.n_cells, self.genes = store, store.n_cells, store.genes
        self.obs_names = store.names(store.rows("all"))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of a row range."""
        return self.store.read(np.arange(start, stop))

    def obs(self, key: str) -> np.ndarray:
        """Values of a label, ``None`` where missing."""
        labels = self.store.manifest.labels
        if key not in labels:
            raise ValueError(f"the store has no label {key!r}{nearest(key, labels)}; shard with --labels {key}")
        values = np.array([*labels[key], None], dtype=object)
        return values[self.store.labels(self.store.rows("all"), [key])[key]]


def impute_file(
    model: Model,
    data: str | Path,
    out: str | Path,
    *,
    layer: str | None = None,
    mask: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Filled:
    """Impute an h5ad file, an AnnData zarr folder or a distdiff store into ``out`` (``.h5ad`` or ``.zarr``).

    ``out`` holds everything the input holds, bit-equal, plus the layers and ``uns['distdiff']`` of
    :meth:`Model.impute <distdiff.model.Model.impute>`; it appears only once it is whole.

    Parameters
    ----------
    mask
        A layer of the input, or a ``.npz``/``.npy`` file.
    **options
        Of :meth:`Job.plan <distdiff.tasks.impute.Job.plan>`.

    Raises
    ------
    FileExistsError
        ``out`` exists and ``overwrite`` is false.
    ValueError
        A bad suffix of ``out``, ``out`` is the input, or what
        :meth:`Job.plan <distdiff.tasks.impute.Job.plan>` refuses.
    """
    data, out = Path(data), Path(out)
    if out.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"--out {out} must end in .h5ad or .zarr")
    if out.exists() and data.exists() and out.resolve() == data.resolve():
        raise ValueError(f"--out {out} is the input itself; the input is never changed, give another name")
    is_store = (data / "manifest.json").exists()
    rows: Any = StoreRows(CountStore.open(data)) if is_store else Source.open(data, layer=layer)
    with files.whole(out, overwrite=overwrite) as temporary:
        job = Job.plan(model, rows, mask=_read_mask(rows, data, mask, is_store), **options)
        if not is_store and data.suffix == out.suffix and not job.added:
            (shutil.copytree if data.is_dir() else shutil.copyfile)(data, temporary)
        else:
            write(extend(_whole(rows, data, is_store), job.added), temporary)
        with _opened(temporary) as group:
            layers = {
                name: _layer(group, name, (rows.n_cells, len(rows.genes) + len(job.added))) for name in job.layers
            }
            filled = job.run(layers, progress=progress)
            _write_uns(group, {**job.provenance, **dataclasses.asdict(filled), "input": data.name})
    return filled


def _read_mask(rows: Any, data: Path, mask: str | None, is_store: bool) -> np.ndarray | sp.spmatrix | None:
    if mask is None:
        return None
    if mask.endswith((".npz", ".npy")):
        return load_mask(mask, (rows.n_cells, len(rows.genes)))
    if is_store:
        raise ValueError(f"--mask {mask}: a store has no layers; give a .npz or .npy file")
    source = Source.open(data, layer=mask)
    return source.read(0, source.n_cells)


def _whole(rows: Any, data: Path, is_store: bool) -> Any:
    import anndata as ad
    import pandas as pd

    if not is_store:
        return ad.read_h5ad(data) if data.suffix == ".h5ad" else ad.read_zarr(data)
    obs = pd.DataFrame(index=pd.Index(rows.obs_names.astype(str)))
    for key in rows.store.manifest.labels:
        obs[key] = pd.Categorical(rows.obs(key))
    counts = rows.read(0, rows.n_cells).astype(np.float32)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(rows.genes)))


def write(adata: Any, path: Path) -> None:
    """Write an AnnData by its suffix: ``.h5ad``, or zarr v3 whatever the version's default is."""
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
        return
    with zarr_v3(), _no_word_on_consolidation():
        adata.write_zarr(path)


@contextlib.contextmanager
def _no_word_on_consolidation() -> Iterator[None]:
    """AnnData consolidates metadata, of which zarr warns that v3 does not specify it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        yield


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix == ".h5ad":
        import h5py

        with h5py.File(path, "r+") as file:
            yield file
    else:
        import zarr

        yield zarr.open_group(path, mode="r+", use_consolidated=False)
        with _no_word_on_consolidation():
            zarr.consolidate_metadata(str(path))  # what the input had does not know the new layers


def _layer(group: Any, name: str, shape: tuple[int, int]) -> Any:
    """Create an empty float32 layer in AnnData's on-disk form (a dense array)."""
    layers = group.require_group("layers")
    if name in layers:
        del layers[name]
    chunks = (min(ROWS, shape[0]), shape[1])
    if hasattr(layers, "create_array"):
        array = layers.create_array(name, shape=shape, dtype="f4", chunks=chunks)
    else:
        array = layers.create_dataset(name, shape=shape, dtype="f4", chunks=chunks, compression="lzf", shuffle=True)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return array


def _write_uns(group: Any, provenance: dict[str, Any]) -> None:
    from anndata.io import write_elem

    uns = group.require_group("uns")
    if "distdiff" in uns:
        del uns["distdiff"]
    write_elem(uns, "distdiff", provenance)
