"""Tables of AnnData files that anndata 0.6 and 0.7 wrote: where they keep the names behind categories."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def compound(table: Any) -> bool:
    """Whether an obs or var is one array of records, as anndata before 0.7 wrote it."""
    return not hasattr(table, "keys")


def by_reference(table: Any) -> bool:
    """Whether it is a group whose columns refer to their categories, as anndata 0.7 wrote it."""
    return not compound(table) and str(table.attrs.get("encoding-version", "")) == "0.1.0"


def column(table: Any, key: str) -> Any:
    """One column of an obs or var that is a group: an array, or a Categorical."""
    import pandas as pd
    from anndata.io import read_elem

    element = table[key]
    named = element.attrs.get("categories")
    if named is None or hasattr(element, "keys"):
        return read_elem(element)
    categories = table[named] if not isinstance(named, str) else table[named.removeprefix(f"{table.name.strip('/')}/")]
    return pd.Categorical.from_codes(read_elem(element), read_elem(categories))


def frame(root: Any, key: str) -> pd.DataFrame:
    """The table ``key`` (``obs``, ``var``, ``raw/var`` ...) of an AnnData of any age, as anndata reads it.

    Parameters
    ----------
    root
        Group of h5py or zarr; before 0.7 the categories lie in its ``uns``.
    """
    import pandas as pd
    from anndata.io import read_elem

    if not compound(root[key]):
        return read_elem(root[key])
    records = root[key][...]
    columns = {name: _text(records[name]) for name in records.dtype.names}
    table = pd.DataFrame(columns).set_index(records.dtype.names[0])
    uns = root.get("uns", {})
    for name in table.columns:
        if f"{name}_categories" in uns and table[name].dtype.kind in "iu":
            categories = pd.Index(_text(np.atleast_1d(np.asarray(uns[f"{name}_categories"][...]))))
            codes = table[name].to_numpy()
            if codes.max(initial=-1) < len(categories):
                table[name] = pd.Categorical.from_codes(np.where(codes < 0, -1, codes), categories)
    return table


@contextlib.contextmanager
def anew(path: Path) -> Iterator[Any]:
    """A file of anndata before 0.7 as the anndata of today writes it, in memory."""
    import anndata as ad
    import h5py

    adata = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
    with h5py.File("anew", "w", driver="core", backing_store=False) as file:
        ad.io.write_elem(file, "/", adata)
        yield file


def _text(values: np.ndarray) -> np.ndarray:
    """Bytes as text; anything else as it is."""
    if values.dtype.kind not in "SO":
        return values
    return np.array([v.decode() if isinstance(v, bytes) else v for v in values.tolist()], dtype=object)
