"""Several 10x samples, each a folder of matrix.mtx, barcodes and features or an h5 file, with a label ``sample``.

python data_prep/tenx.py pbmc.zarr healthy=A/outs/filtered_feature_bc_matrix sick=B/outs/filtered_feature_bc_matrix.h5
distdiff train --config pbmc.yaml

Folders and files of Cell Ranger 2 and later, STARsolo and their likes; of several kinds of features gene expression is
kept. Cells with fewer than 200 genes or more than 20 % of their molecules from mitochondrial genes are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _recipe import command_line, finish, run

from distdiff import files
from distdiff.data.ingest.source import Source


def samples(words: Sequence[str]) -> dict[str, Path]:
    """``NAME=PATH`` of every sample.

    Raises
    ------
    ValueError
        Another form, or a name twice.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ValueError(f"sample {word!r}: write NAME=PATH, for example healthy=A/outs/filtered_feature_bc_matrix")
        if name in found:
            raise ValueError(f"sample {name!r} is given twice, {found[name]} and {path}; name each once")
        found[name] = Path(path)
    return found


def read(name: str, path: Path) -> Any:
    """One sample as AnnData, cells called ``NAME_BARCODE``."""
    import pandas as pd
    from anndata import AnnData

    source = Source.open(path)
    try:
        obs = pd.DataFrame({"sample": name}, index=[f"{name}_{barcode}" for barcode in source.obs_names])
        return AnnData(source.read(0, source.n_cells), obs=obs, var=pd.DataFrame(index=list(source.genes)))
    finally:
        source.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = command_line(__doc__, genes="hvg:2000", min_genes=200, min_cells=3, max_mito=20.0)
    parser.add_argument("out", type=Path, help="store to write, for example pbmc.zarr")
    parser.add_argument("samples", nargs="+", metavar="NAME=PATH", help="a sample's name and its folder or h5 file")
    parser.add_argument("--join", default="inner", choices=("inner", "outer"), help="genes of all samples, or of any")
    a = parser.parse_args(arguments)
    found = samples(a.samples)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(a.out) as folder:
        inputs = []
        for number, (name, path) in enumerate(found.items()):
            inputs.append(folder / f"{number:03}.h5ad")
            read(name, path).write_h5ad(inputs[-1])
        finish(a, inputs, a.out, ["sample"], join=a.join)


if __name__ == "__main__":
    run(main)
