"""Imputation behind MLflow's ``predict``: a table, or the path of an AnnData file, in; a table out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from distdiff.data.ingest.source import Source
from distdiff.tasks.impute import MaskLayer, mask_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from distdiff.model import Model

PATH = "path"
"""Column that names files instead of holding a gene's counts."""


def predict(
    model: Model,
    data: Any,
    *,
    layer: str = "",
    mask: str = "",
    sites: str = "",
    groups: str = "",
    readout: str = "mean",
    batch_size: int = 256,
    use_labels: bool = False,
) -> DataFrame:
    """Impute cells and return ``float32 [cells, genes]``: expected molecules where imputed, else the given counts.

    Parameters
    ----------
    model
        The model.
    data
        A frame, cells x genes (or a list of dicts, one for each cell): counts, and NaN where they are imputed. Genes of
        the model that the frame lacks are imputed and follow its own columns. Columns named as labels of the model
        (cell_type ...) are labels; other columns that are no genes of the model must hold counts and come back as they
        were. Or an AnnData, the path of one (h5ad, zarr), or a frame with a column ``path``.
    layer, mask, sites, groups
        For AnnData: the layer of the counts and what to impute, as in ``distdiff impute``; by default the absent genes.
    readout
        Point estimate: ``mean``, ``log1p``, ``median`` ...
    batch_size
        Cells of a call of the network.
    use_labels
        Condition on the labels (see :class:`~distdiff.tasks.Reader`).

    Raises
    ------
    ValueError
        A column that holds no numbers or is given twice, entries that are no counts, no gene of the model, or nothing
        to impute in an AnnData.

    Examples
    --------
    >>> predict(model, pd.DataFrame({"CD3D": [2, None], "MS4A1": [0, 3]}))  # doctest: +SKIP
    """
    import pandas as pd

    options = {"readout": readout, "batch_size": int(batch_size), "mean_only": True, "use_labels": use_labels}
    targets = {**options, "sites": sites or None, "groups": groups or None}
    if hasattr(data, "obs_names"):
        source = Source.from_anndata(data, layer=layer or None)
        return _impute_source(model, source, mask_of(data, mask or None, source), targets)
    if isinstance(data, (str, Path)):
        data = pd.DataFrame({PATH: [str(data)]})
    if not isinstance(data, pd.DataFrame):
        data = pd.DataFrame(data)
    if PATH not in data.columns:
        return _impute_frame(model, data, options)
    parts = []
    for path in data[PATH]:
        source = Source.open(path, layer=layer or None, every=True)
        mask_layer = MaskLayer(Source.open(path, layer=mask, every=True), source.genes) if mask else None
        parts.append(_impute_source(model, source, mask_layer, targets))
        source.close()
    return pd.concat(parts)


def _impute_source(model: Model, source: Source, mask: Any, options: dict[str, Any]) -> DataFrame:
    import pandas as pd

    plan = model.plan_imputation(source, mask=mask, **options)
    values = np.zeros((source.n_cells, len(source.genes) + len(plan.added)), dtype=np.float32)
    plan.run({plan.layers[0]: values}, progress=False)
    return pd.DataFrame(values, index=source.obs_names, columns=[*source.genes, *plan.added])


def _impute_frame(model: Model, frame: DataFrame, options: dict[str, Any]) -> DataFrame:
    import anndata as ad
    import pandas as pd

    labels = [name for name in model.spec.labels if name in frame.columns]
    counts = _counts(frame.drop(columns=labels))
    genes, known = list(counts.columns), set(model.spec.genes)
    if known.isdisjoint(genes):
        raise ValueError(
            f"none of the frame's {len(genes)} columns ({', '.join(genes[:3])}...) is among the model's "
            f"{model.spec.n_genes} genes ({', '.join(model.spec.genes[:3])}...); are both symbols or both Ensembl ids?"
        )
    absent = [gene for gene in model.spec.genes if gene not in set(genes)]
    given = np.hstack((counts.to_numpy(), np.full((len(frame), len(absent)), np.nan, dtype=np.float32)))
    hidden = np.isnan(given)
    index = frame.index.astype(str) if frame.index.is_unique else pd.RangeIndex(len(frame)).astype(str)
    obs, var = frame[labels].set_axis(index), pd.DataFrame(index=genes + absent)
    cells = ad.AnnData(sp.csr_matrix(np.where(hidden, 0, given)), obs=obs, var=var)
    plan = model.plan_imputation(Source.from_anndata(cells), mask=hidden, **options)
    values = np.zeros(given.shape, dtype=np.float32)
    plan.run({plan.layers[0]: values}, progress=False)
    # a cell without any count, or a gene that the model lacks, is not imputed
    columns = var.index.isin(model.spec.genes)
    imputed = hidden & columns & (np.nansum(given[:, columns], axis=1) > 0)[:, None]
    return pd.DataFrame(np.where(imputed, values, given), index=frame.index, columns=genes + absent)


def _counts(frame: DataFrame) -> DataFrame:
    """The columns of a frame as float32, NaN where a count is missing.

    Raises
    ------
    ValueError
        A column is given twice or holds something else than numbers (named).
    """
    frame = frame.set_axis(frame.columns.astype(str), axis=1)
    if (repeated := frame.columns[frame.columns.duplicated()]).size:
        raise ValueError(
            f"column {repeated[0]!r} is given {(frame.columns == repeated[0]).sum()} times; name each gene once"
        )
    try:
        return frame.astype(np.float32)
    except (TypeError, ValueError):
        for name in frame.columns:  # only to name the column
            try:
                frame[name].astype(np.float32)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"column {name!r} must hold counts, and NaN where they are to be imputed ({error}); give one "
                    "column for each gene, and the model's labels where there are any"
                ) from error
        raise
