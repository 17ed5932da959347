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
    """Impute cells and return ``float32 [cells, genes]``: expected molecules where imputed, else what was given.

    Parameters
    ----------
    data
        A frame, cells x genes (or a list of dicts, a cell each): counts, NaN where they are to be imputed. Genes of the
        model that it lacks are imputed as well and stand behind its own; columns named as labels of the model
        (cell_type ...) are labels. Or an AnnData, the path of one (h5ad, zarr), or a frame with a column ``path``.
    layer, mask, sites, groups
        Of AnnData: where counts are, and what to impute, as of ``distdiff impute``; nothing: the genes that are absent.
    use_labels
        Condition on the labels (see :class:`~distdiff.tasks.Reader`).
    readout
        ``mean``, ``log1p``, ``median`` ...

    Raises
    ------
    ValueError
        Columns that are no numbers, entries that are no counts, no gene in common, nothing to impute in an AnnData.
    """
    import pandas as pd

    options = {"readout": readout, "batch_size": int(batch_size), "mean_only": True, "use_labels": use_labels}
    targets = {**options, "sites": sites or None, "groups": groups or None}
    if hasattr(data, "obs_names"):
        rows = Source.from_anndata(data, layer=layer or None)
        return _cells(model, rows, mask_of(data, mask or None, rows), targets)
    if isinstance(data, (str, Path)):
        data = pd.DataFrame({PATH: [str(data)]})
    if not isinstance(data, pd.DataFrame):
        data = pd.DataFrame(data)
    if PATH not in data.columns:
        return _frame(model, data, options)
    parts = []
    for path in data[PATH]:
        rows = Source.open(path, layer=layer or None, every=True)
        masked = MaskLayer(Source.open(path, layer=mask, every=True), rows.genes) if mask else None
        parts.append(_cells(model, rows, masked, targets))
        rows.close()
    return pd.concat(parts)


def _cells(model: Model, rows: Source, masked: Any, options: dict[str, Any]) -> DataFrame:
    import pandas as pd

    plan = model.plan_imputation(rows, mask=masked, **options)
    values = np.zeros((rows.n_cells, len(rows.genes) + len(plan.added)), dtype=np.float32)
    plan.run({plan.layers[0]: values}, progress=False)
    return pd.DataFrame(values, index=rows.obs_names, columns=[*rows.genes, *plan.added])


def _frame(model: Model, frame: DataFrame, options: dict[str, Any]) -> DataFrame:
    import anndata as ad
    import pandas as pd

    labels = [name for name in model.spec.labels if name in frame.columns]
    given = frame.drop(columns=labels)
    genes = [str(gene) for gene in given.columns]
    try:
        counts = given.to_numpy(dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the frame must hold counts, a gene a column, and NaN where they are to be imputed: {error}"
        ) from error
    have = set(genes)
    if not have & set(model.spec.genes):
        raise ValueError(
            f"none of the frame's {len(genes)} columns ({', '.join(genes[:3])}...) is among the model's "
            f"{model.spec.n_genes} genes ({', '.join(model.spec.genes[:3])}...); are both symbols or both Ensembl ids?"
        )
    absent = [gene for gene in model.spec.genes if gene not in have]
    out = np.hstack((counts, np.full((len(frame), len(absent)), np.nan, dtype=np.float32)))
    hidden = np.isnan(out)
    index = frame.index.astype(str) if frame.index.is_unique else pd.RangeIndex(len(frame)).astype(str)
    obs, var = frame[labels].set_axis(index), pd.DataFrame(index=genes + absent)
    cells = ad.AnnData(sp.csr_matrix(np.where(hidden, 0, out)), obs=obs, var=var)
    plan = model.plan_imputation(Source.from_anndata(cells), mask=hidden, **options)
    values = np.zeros(out.shape, dtype=np.float32)
    plan.run({plan.layers[0]: values}, progress=False)
    # a cell without any count, or a gene that the model does not know, has no answer
    known = var.index.isin(model.spec.genes)
    answered = known & (np.nansum(out[:, known], axis=1) > 0)[:, None]
    return pd.DataFrame(np.where(hidden & answered, values, out), index=frame.index, columns=genes + absent)
