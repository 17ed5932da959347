"""AnnData files as anndata 0.6 and 0.7 laid them out, made with h5py and zarr."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import zarr

TEXT = h5py.string_dtype()


def write_07(root, adata):
    """Categories in ``obs/__categories``, referred to by an attribute of the codes. ``root``: h5py, or zarr v2."""
    _csr(root, "X", adata.X)
    _frame(root, "obs", adata.obs)
    _frame(root, "var", adata.var)
    layers = root.create_group("layers")
    for name, values in adata.layers.items():
        _csr(layers, name, values)
    raw = root.create_group("raw")
    raw.attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})
    _csr(raw, "X", adata.raw.X)
    _frame(raw, "var", adata.raw.var)
    root.create_group("uns")
    _array(root.create_group("obsm"), "X_pca", adata.obsm["X_pca"])


def write_06(root, adata):
    """obs and var are arrays of records, categories lie in ``uns``, raw beside the rest."""
    for name, x in (("X", adata.X), ("raw.X", adata.raw.X)):
        group = root.create_group(name)
        group["data"], group["indices"], group["indptr"] = x.data, x.indices, x.indptr
        group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": x.shape})
    uns = root.create_group("uns")
    for key, frame in (("obs", adata.obs), ("var", adata.var), ("raw.var", adata.raw.var)):
        columns = {"index": frame.index.to_numpy(dtype="S")}
        for name in frame:
            values = frame[name]
            if isinstance(values.dtype, pd.CategoricalDtype):
                uns[f"{name}_categories"] = values.cat.categories.to_numpy(dtype=object).astype("S")
                values = values.cat.codes
            columns[name] = values.to_numpy(dtype="S" if values.dtype == object else values.dtype)
        records = np.zeros(len(frame), dtype=[(k, v.dtype) for k, v in columns.items()])
        for name, values in columns.items():
            records[name] = values
        root[key] = records
    root.create_group("obsm")["X_pca"] = adata.obsm["X_pca"]


def write(adata, path, version):
    """Write an AnnData as ``0.6`` or ``0.7`` did, by the suffix of ``path``."""
    root = h5py.File(path, "w") if path.suffix != ".zarr" else zarr.open_group(str(path), mode="w", zarr_format=2)
    {"0.6": write_06, "0.7": write_07}[version](root, adata)
    if path.suffix != ".zarr":
        root.close()
    return path


def _array(group, name, values):
    if hasattr(group, "create_array"):
        if values.dtype == object:
            array = group.create_array(name, shape=values.shape, dtype=str)
            array[:] = values.astype(str)
            return array
        return group.create_array(name, data=values)
    return group.create_dataset(name, data=values, dtype=TEXT if values.dtype == object else None)


def _csr(root, name, x):
    group = root.create_group(name)
    for part in ("data", "indices", "indptr"):
        _array(group, part, getattr(x, part))
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(x.shape)})


def _frame(root, name, frame):
    group = root.create_group(name)
    group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "_index"})
    group.attrs["column-order"] = list(frame.columns)
    _array(group, "_index", frame.index.to_numpy(dtype=object))
    for key in frame:
        values = frame[key]
        if not isinstance(values.dtype, pd.CategoricalDtype):
            _array(group, key, values.to_numpy())
            continue
        categories = _array(group.require_group("__categories"), key, values.cat.categories.to_numpy(dtype=object))
        categories.attrs["ordered"] = False
        codes = _array(group, key, values.cat.codes.to_numpy())
        codes.attrs["categories"] = f"__categories/{key}" if hasattr(group, "create_array") else categories.ref
