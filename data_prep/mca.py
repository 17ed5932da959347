"""Mouse Cell Atlas (Han et al. 2018, Cell 172:1091; GEO GSE108097): tables of counts without background, or h5ad files.

python data_prep/mca.py rmbatch_dge/*.txt.gz mca.zarr --cells MCA_CellAssignments.csv
distdiff train --config mca.yaml

Tables and assignments: figshare.com/s/865e694ad06d5857db4b (MCA_BatchRemove_dge.zip, MCA_CellAssignments.csv). A table
is text, genes x cells, a blank between; the assignments name Cell.name, ClusterID, Tissue, Batch and Annotation. Tables
leave out genes without counts, so genes of any table are kept and are zero where one lacks them. Cells without an
assignment stay, their labels unknown; without --cells there is the batch alone, from the names of the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _recipe import command_line, finish, labels_of, layer_of, run

from distdiff import files

LABELS = {
    "cell type": ("Annotation", "cell_type", "celltype"),
    "tissue": ("Tissue",),
    "batch": ("Batch", "sample"),
}
TABLES = (".txt", ".txt.gz", ".tar.gz")
GENES_AT_ONCE = 2_000


def table(path: Path, assignments: Any = None) -> Any:
    """One table as AnnData, cells x genes in CSR; labels from the assignments.

    Raises
    ------
    ValueError
        No such table, or none of its cells is in the assignments.
    """
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    wrong = f"{path} is no table of the Mouse Cell Atlas: names of cells in the first line, then a gene a line"
    genes: list[str] = []
    parts = []
    try:
        for part in pd.read_csv(path, sep=" ", quotechar='"', chunksize=GENES_AT_ONCE):
            cells = part.columns.astype(str)
            genes.extend(part.index.astype(str))
            parts.append(sparse.csr_matrix(part.to_numpy(np.float32)))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{wrong} ({str(error).splitlines()[0]})") from None
    if not genes or genes[0].isdigit():  # a header as long as the lines: cells x genes, or another table
        raise ValueError(wrong)
    obs = pd.DataFrame({"Batch": cells.str.rpartition(".").get_level_values(0)}, index=cells)
    if assignments is not None:
        known = cells.isin(assignments.index)
        if not known.any():
            raise ValueError(f"{path}: none of its cells, such as {cells[0]}, is among the Cell.name of --cells")
        obs = assignments.reindex(cells).assign(Batch=obs["Batch"])
        print(f"{path}: {len(cells)} cells, {int(known.sum())} of them with an assignment")
    return AnnData(sparse.vstack(parts).T.tocsr(), obs=obs, var=pd.DataFrame(index=genes))


def assigned(path: Path) -> Any:
    """The assignments, a row a cell.

    Raises
    ------
    ValueError
        A column is missing.
    """
    import pandas as pd

    found = pd.read_csv(path, dtype=str)
    wanted = ["Cell.name", "ClusterID", "Tissue", "Batch", "Annotation"]
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{path} has no column {missing[0]}; give MCA_CellAssignments.csv, which has {wanted}")
    return found[wanted].drop_duplicates("Cell.name").set_index("Cell.name")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = command_line(__doc__, genes="hvg:2000", min_cells=10)
    parser.add_argument("sources", type=Path, nargs="+", help="tables of counts, or h5ad files")
    parser.add_argument("out", type=Path, help="store to write, for example mca.zarr")
    parser.add_argument("--cells", type=Path, help="MCA_CellAssignments.csv")
    parser.add_argument("--labels", help="obs columns, with commas between; found by name")
    a = parser.parse_args(arguments)
    assignments = assigned(a.cells) if a.cells else None
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(a.out) as folder:
        inputs = []
        for number, source in enumerate(a.sources):
            if source.name.endswith(TABLES):
                inputs.append(folder / f"{number:03}-{source.name.partition('.')[0]}.h5ad")
                table(source, assignments).write_h5ad(inputs[-1])
            else:
                inputs.append(source)
        labels = a.labels.split(",") if a.labels else list(labels_of(inputs[0], LABELS, needed=False).values())
        finish(a, inputs, a.out, labels, layer=layer_of(inputs[0]), join="outer")


if __name__ == "__main__":
    run(main)
