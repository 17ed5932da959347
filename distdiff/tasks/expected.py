"""What is expected of genes that a panel lacks: the table of a report, and its columns in a completed result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

    from distdiff.tasks import Reader

TABLE = "genes.csv"
"""The table in the folder of a report."""

RELIABLE = "reliable"
"""Verdict on a gene that the panel predicts."""

COLUMNS = (
    "correlation", "correlation_low", "correlation_high", "spearman", "deviance_explained", "deviance_explained_low",
    "deviance_explained_high", "coverage",
)  # fmt: skip
"""Columns of the table that a completed result gets, as ``expected_<name>``, beside ``reliability``."""


def panel_digest(reader: Reader) -> str:
    """Which of the model's genes an input measures, as 12 hexadecimal digits.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.ingest.source import Source
    >>> from distdiff.tasks import Reader
    >>> from distdiff.tasks.expected import panel_digest
    >>> from distdiff.types import DataSpec
    >>> spec = DataSpec(("gene1", "gene2", "CD3E"), {}, np.ones(3, np.float32))
    >>> panel_digest(Reader(spec, Source.open("counts.h5ad")))
    'cd70d568ee54'
    """
    measured = (gene for gene, known in zip(reader.spec.genes, reader.measured, strict=True) if known)
    return hashlib.sha256("\n".join(measured).encode()).hexdigest()[:12]


def expected_columns(report: Any, reader: Reader, weights: str, genes: Sequence[str]) -> DataFrame:
    """Columns of ``var`` of a completed result, a row for each of its genes.

    Parameters
    ----------
    report
        What `distdiff.panel` returned, or the folder that it was written to.
    reader
        The input that is completed.
    weights
        ``weights_sha256`` of the model.
    genes
        Genes of the result; ``reliability`` of those that the report does not speak of is ``measured`` where the input
        has them, else ``unknown``.

    Raises
    ------
    ValueError
        No report there, or one that was made for another panel or by another model.
    """
    import pandas as pd

    if isinstance(report, str | Path):
        folder = Path(report).expanduser()
        try:
            about = json.loads((folder / "panel.json").read_text())["about"]
            table = pd.read_csv(folder / TABLE, index_col=0, keep_default_na=False, na_values=[""])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"report={str(report)!r}: no report of distdiff.panel is there ({type(error).__name__}); make one: "
                "found = model.panel(adata, atlas); found.write(folder)"
            ) from None
    else:
        about, table = report.about, report.table
    if about["panel"] != panel_digest(reader):
        raise ValueError(
            f"report: it was made for a panel of {about['panel_genes']} genes that the model knows, and this input has "
            f"other ones ({int(reader.measured.sum())}); make one for this panel with distdiff.panel"
        )
    if weights and about["weights_sha256"] and about["weights_sha256"] != weights:
        raise ValueError("report: it was made with another model; make one with this model with distdiff.panel")
    table = table.rename(index=str)
    out = table.reindex(list(genes))[list(COLUMNS)].add_prefix("expected_").astype("float64")
    measured = set(reader.rows.genes)
    verdict = table["reliability"].reindex(list(genes))
    default = ["measured" if gene in measured else "unknown" for gene in genes]
    out["reliability"] = pd.Categorical(verdict.where(verdict.notna(), default).astype(str))
    return out
