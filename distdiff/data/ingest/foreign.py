"""Files and folders of other programs: what to give instead of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = "an h5ad file, an AnnData zarr folder, a 10x h5 file or a folder with a matrix.mtx"
"""What is read."""

SUFFIXES = {
    (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz"): (
        "a table of text; write it as h5ad once: anndata.AnnData(pandas.read_csv(PATH, index_col=0)).write_h5ad(OUT), "
        "with .T after the table where genes are its rows"
    ),
    (".parquet",): "a table; write it as h5ad once: anndata.AnnData(pandas.read_parquet(PATH)).write_h5ad(OUT)",
    (".npz", ".npy"): "a matrix without names of cells and genes; write it as h5ad: anndata.AnnData(X, obs, var)",
    (".rds", ".rdata", ".h5seurat"): "an R object; write it as h5ad in R once: anndataR::write_h5ad(object, OUT)",
    (".zip", ".tar", ".tar.gz", ".tgz"): "an archive; unpack it and give what is in it",
}  # fmt: skip
"""Ends of names, and what files of such names are."""


def by_name(path: Path) -> str:
    """What a file is by its name and what to do with it, or empty."""
    name = path.name.lower()
    return next((f"it is {what}" for ends, what in SUFFIXES.items() if name.endswith(ends)), "")


def by_groups(root: Any) -> str:
    """What an h5 file or zarr folder is that is no AnnData and no 10x matrix, and what to do with it, or empty."""
    if "mod" in root:
        names = ", ".join(sorted(map(str, root["mod"]))) or "none"
        return f"it is a MuData ({names}); write one modality as h5ad once: mudata.read(PATH).mod[NAME].write_h5ad(OUT)"
    if {"matrix", "row_attrs", "col_attrs"} <= set(root):
        return "it is a loom file; write it as h5ad once: anndata.io.read_loom(PATH).write_h5ad(OUT)"
    return ""


def by_content(folder: Path) -> str:
    """What a folder of another program is and what to give instead, or empty."""
    names = {file.name.removesuffix(".gz") for file in folder.iterdir()}
    if "all_genes.csv" in names:
        return "it is of Parse split-pipe (cells x genes); give its anndata.h5ad"
    if any(name.startswith("cells_x_") and name.endswith(".mtx") for name in names):
        return "it is of kallisto bustools (cells x genes); give the adata.h5ad that kb count --h5ad writes"
    if "quants_mat" in names or "quants_mat.mtx" in names:
        return "it is of alevin; write it as h5ad once: pyroe.load_fry(PATH).write_h5ad(OUT)"
    if "spliced.mtx" in names:
        return "give the path of one matrix in it (spliced.mtx); its barcodes.tsv and features.tsv must lie beside it"
    matrices = {str(file.parent) for file in folder.glob("*/**/*matrix.mtx*")}
    if inside := sorted(matrices | set(map(str, folder.glob("*.h5ad")))):
        more = f" or one of {len(inside) - 1} more" if len(inside) > 1 else ""
        return f"give {inside[0]}{more}"
    return ""
