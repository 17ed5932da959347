"""Write what a result holds beside its computed values: obs, var, whatever the input holds; and results as h5ad."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distdiff.batch.layout import Field
from distdiff.batch.rows import by_columns, from_table, opened_anndata
from distdiff.batch.task import Task
from distdiff.data.ingest import legacy
from distdiff.data.ingest.container import rows_of
from distdiff.data.ingest.scan import select
from distdiff.data.store.export import CsrOnDisk, zarr_v3
from distdiff.tasks.frame import ADDED, reindex_genes, var_of, were_added
from distdiff.tasks.made import ENTRY, MADE, noted

PIECE = 8 << 20
"""Values copied at a time."""

MAPPINGS = ("layers", "obsm", "obsp", "varm", "varp", "uns")


def transfer(source: Any, target: Any, key: str) -> None:
    """Copy one element of an AnnData file into another file, h5ad or zarr, with bounded memory where it is numbers."""
    import anndata as ad

    elem = source[key]
    plain = not hasattr(elem, "keys") and elem.ndim and elem.dtype.kind in "biuf"
    if plain:
        _copy(elem, target, key)
    elif hasattr(elem, "keys") and not (elem.attrs.get("encoding-type") == "dataframe" and legacy.by_reference(elem)):
        group = target.require_group(key)
        describe(group, elem.attrs)
        for name in elem:
            transfer(elem, group, name)
    else:
        if key in target:
            del target[key]
        with zarr_v3():
            ad.io.write_elem(target, key, ad.io.read_elem(elem))


def describe(elem: Any, attributes: Mapping[str, Any]) -> None:
    """Set attributes, as zarr (JSON) or h5py (arrays of objects for text) wants them."""
    for key, value in attributes.items():
        value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        if isinstance(value, list) and value and not hasattr(elem, "create_array") and isinstance(value[0], str):
            value = np.array(value, dtype=object)
        elem.attrs[key] = value


def _copy(elem: Any, target: Any, key: str) -> None:
    if key in target:
        del target[key]
    rows = max(1, PIECE // max(1, int(np.prod(elem.shape[1:]))))
    chunks = tuple(max(1, n) for n in (min(elem.shape[0], max(1, rows // 16)), *elem.shape[1:]))
    if hasattr(target, "create_array"):
        array = target.create_array(key, shape=elem.shape, dtype=elem.dtype, chunks=chunks)
    else:
        array = target.create_dataset(key, shape=elem.shape, dtype=elem.dtype, chunks=chunks if elem.size else None,
                                      compression="lzf" if elem.size else None)  # fmt: skip
    describe(array, elem.attrs)
    for start in range(0, elem.shape[0], rows):
        array[start : start + rows] = elem[start : start + rows]


def build(root: Any, task: Task, fields: tuple[Field, ...]) -> None:
    """Write all of a result but its fields: what AnnData requires, and what the input holds."""
    ours = {f.path for f in fields}
    describe(root, {"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in MAPPINGS:
        describe(root.require_group(name), {"encoding-type": "dict", "encoding-version": "0.1.0"})
    if task.rows.frame is None:
        _own_obs(root, task, ours)
        _var(root, task, None)
        return
    with opened_anndata(task.rows.frame) as source:
        _inherited_obs(root, source, ours, task)
        if task.inherits:
            for key in source:
                if key in ("layers", "obsm", "uns"):
                    for name in source[key]:
                        if f"{key}/{name}" not in ours and not task.stale(f"{key}/{name}"):
                            transfer(source[key], root[key], name)
                elif key != "obs":
                    transfer(source, root, key)
            return
        genes = _var(root, task, source)
        for key in ("obsp", "uns", "raw"):
            if key in source:
                transfer(source, root, key)
        for name in (name for name in source.get("obsm", ()) if f"obsm/{name}" not in ours):
            transfer(source["obsm"], root["obsm"], name)
        _by_gene(root, task, source, genes, ours)


def _own_obs(root: Any, task: Task, ours: set[str]) -> None:
    import anndata as ad

    obs = root.require_group("obs")
    for key, values in task.rows.labels.items():
        group = obs.require_group(key)
        describe(group, {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        with zarr_v3():
            ad.io.write_elem(group, "categories", np.array(values, dtype=object))
    added = [path.removeprefix("obs/") for path in ours if path.startswith("obs/distdiff")]
    describe(obs, {
        "encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index",
        "column-order": [*task.rows.labels, *sorted(added)],
    })  # fmt: skip


def _inherited_obs(root: Any, source: Any, ours: set[str], task: Task) -> None:
    import anndata as ad

    obs, given = root.require_group("obs"), source["obs"]
    added = sorted(path.removeprefix("obs/") for path in ours if path.startswith("obs/"))
    new = [*added, *(name for name in given if name not in added and task.stale(f"obs/{name}"))]
    if legacy.by_reference(given):
        frame = legacy.frame(source, "obs")
        with zarr_v3():
            for name in frame.columns:
                values = frame[name]
                if name not in new:
                    plain = isinstance(values.dtype, np.dtype)
                    ad.io.write_elem(obs, str(name), values.to_numpy() if plain else values.array)
            ad.io.write_elem(obs, "_index", np.array(frame.index.astype(str), dtype=object))
        order = [str(name) for name in frame.columns]
        attributes = {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"}
    else:
        for name in given:
            if name not in new:
                transfer(given, obs, name)
        attributes = dict(given.attrs)
        order = [str(name) for name in attributes["column-order"]]
    describe(obs, {**attributes, "column-order": [*(n for n in order if n not in new), *added]})


def _var(root: Any, task: Task, source: Any) -> Any:
    """The var of the result: what the input knows of its genes, and which were appended; the input's gene names."""
    import anndata as ad
    import pandas as pd

    if source is None:
        var = pd.DataFrame(index=pd.Index(list(task.rows.genes)))
    else:
        var = ad.io.read_elem(source[task.rows.var])
    var.index = given = var.index.astype(str)
    var = var_of(var, task.genes)
    if task.added:
        var[ADDED] = np.isin(task.genes, task.added) | were_added(var)
    if task.about_genes is not None:
        var[task.about_genes.columns] = task.about_genes
    if "var" in root:
        del root["var"]
    with zarr_v3():
        ad.io.write_elem(root, "var", var)
    return given


def _by_gene(root: Any, task: Task, source: Any, genes: Any, ours: set[str]) -> None:
    """layers, varm and varp in the genes of the result; those of X do not fit the genes of raw."""
    import anndata as ad

    at = genes.get_indexer(list(task.genes))
    if task.rows.var == "var":
        for name in source.get("layers", ()):
            if f"layers/{name}" not in ours and not task.stale(f"layers/{name}") and by_columns(source["layers"][name]):
                _in_genes(source["layers"][name], root["layers"], name, at)
    parent = source[task.rows.var.rpartition("/")[0]] if "/" in task.rows.var else source
    for key in ("varm", "varp"):
        for name in filter(lambda name: by_columns(parent[key][name]), parent.get(key, ())):
            values = ad.io.read_elem(parent[key][name])
            axes, fill = ((0,), np.nan) if key == "varm" else ((0, 1), 0)
            with zarr_v3():
                ad.io.write_elem(root[key], name, reindex_genes(values, at, axes, fill, task.genes))


def _in_genes(elem: Any, target: Any, name: str, at: np.ndarray) -> None:
    """Copy a layer block by block, its columns ``at`` (-1: zeros), with bounded memory."""
    rows = rows_of(elem, name)
    n, width = rows.shape
    step = max(1, PIECE // max(1, width))
    spans = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    dense = not hasattr(elem, "keys")
    if dense:
        chunks = (max(1, min(n, step // 16)), max(1, len(at)))
        create = target.create_array if hasattr(target, "create_array") else target.create_dataset
        array = create(name, shape=(n, len(at)), dtype=elem.dtype, chunks=chunks if n and len(at) else None)
        describe(array, elem.attrs)
        for span in spans:
            given = rows[span]
            array[span] = np.where(at >= 0, given[:, at.clip(0)], np.zeros((), given.dtype))
        return
    new_columns = np.full(width, -1, np.int32)
    new_columns[at[at >= 0]] = np.flatnonzero(at >= 0)
    nnz = sum(select(rows[span], new_columns, len(at)).nnz for span in spans)
    whole = CsrOnDisk(target, name, (n, len(at)), nnz, rows.dtype)
    for span in spans:
        whole.append(select(rows[span], new_columns, len(at)))


def to_h5ad(root: Any, path: Path, task: Task, fields: tuple[Field, ...]) -> None:
    """Write the result whose fields are in the zarr group ``root`` as h5ad."""
    import h5py

    whole_input = task.inherits and task.rows.frame.is_file() and not from_table(task.rows.frame)
    if whole_input:
        shutil.copyfile(task.rows.frame, path)
    with h5py.File(path, "r+" if whole_input else "w") as file:
        if whole_input:
            present = [f"{group}/{name}" for group in ("layers", "obs") for name in file.get(group, ())]
            for old in {old for old in present if task.stale(old)} | {f.path for f in fields}:
                if old in file:
                    del file[old]
        for field in fields:
            parent, _, leaf = field.path.rpartition("/")
            where = file.require_group(parent) if parent else file
            transfer(root.require_group(parent) if parent else root, where, leaf)
        if not whole_input:
            build(file, task, fields)
            return
        for name in MAPPINGS:
            file.require_group(name)
        added = sorted(f.path.removeprefix("obs/") for f in fields if f.path.startswith("obs/"))
        order = [str(n) for n in file["obs"].attrs["column-order"] if n not in added and n in file["obs"]]
        describe(file["obs"], {"column-order": [*order, *added]})


@contextlib.contextmanager
def as_zarr(path: Path) -> Iterator[Any]:
    """The group of zarr v3 at ``path``, open for writing; what is there stays."""
    import zarr

    with zarr_v3():
        yield zarr.open_group(str(path), mode="a", zarr_format=3, use_consolidated=False)


def write_uns(root: Any, about: dict[str, Any], name: str = "distdiff") -> None:
    """Provenance in ``uns[name]``."""
    import anndata as ad

    uns = root.require_group("uns")
    if name in uns:
        del uns[name]
    with zarr_v3():
        ad.io.write_elem(uns, name, about)


def write_made(root: Any, task: Task) -> None:
    """What models made of the result, in ``uns``; before the entry on this task is written."""
    import anndata as ad

    uns = root.require_group("uns")
    before = {name: ad.io.read_elem(uns[name]) for name in (ENTRY, MADE) if name in uns}
    layers = [f.path.removeprefix("layers/") for f in task.fields if f.path.startswith("layers/")]
    kept = list(root.get("layers", ()))
    write_uns(root, noted(before, task.name, layers, kept), MADE)


def write_uns_h5ad(path: Path, task: Task, about: dict[str, Any], key: str, note: str) -> None:
    """What was done, in ``uns`` of an h5ad file, and ``note`` (JSON) as its attribute ``key``."""
    import h5py

    with h5py.File(path, "r+") as file:
        if task.uns == ENTRY:
            write_made(file, task)
        write_uns(file, about, task.uns)
        file.attrs[key] = note


def consolidate(store: Path) -> None:
    """Write the consolidated metadata that AnnData reads."""
    import zarr

    with _without_consolidation_warning():
        zarr.consolidate_metadata(str(store))


def write_anndata(adata: Any, path: Path) -> None:
    """Write an AnnData by its suffix: ``.h5ad``, or zarr v3 whatever the version's default is."""
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
        return
    with zarr_v3(), _without_consolidation_warning():
        adata.write_zarr(path)


@contextlib.contextmanager
def _without_consolidation_warning() -> Iterator[None]:
    """AnnData reads consolidated metadata; zarr warns that its v3 does not specify them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        yield
