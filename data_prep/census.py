r"""Cells of the CELLxGENE Census, or of any SOMA experiment, as h5ad files for `distdiff shard`.

python data_prep/census.py blood --organism homo_sapiens --version 2025-11-08 \
    --filter "tissue_general == 'blood' and is_primary_data == True" --columns cell_type,donor_id,assay
python data_prep/census.py blood --soma /data/experiment --filter "cell_type == 'T cell'"
distdiff shard blood/*.h5ad --out blood.zarr --labels cell_type

With --store blood.zarr the last line is done too, all --columns as labels, and the config blood.yaml lies beside it.
The query goes piece by piece, never whole through memory; one that was interrupted goes on where it stopped when the
same command is given again. The first form needs internet and `pip install cellxgene-census`, the second tiledbsoma.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distdiff import files

OTHER_WAYS = (
    "Without internet: download it elsewhere and give a copy of its SOMA experiment by --soma PATH; or take the H5AD "
    "files of single datasets (cellxgene_census.download_source_h5ad, or the H5AD downloads of "
    "cellxgene.cziscience.com/datasets) and give those straight to `distdiff shard`"
)


@contextlib.contextmanager
def census(organism: str, version: str) -> Iterator[Any]:
    """The experiment of one organism, over the network.

    Raises
    ------
    ModuleNotFoundError
        ``cellxgene_census`` is missing.
    ConnectionError
        The Census cannot be opened or read.
    ValueError
        No such organism; known ones are named.
    """
    try:
        import cellxgene_census
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"the Census needs: pip install cellxgene-census. {OTHER_WAYS}") from e
    try:
        opened = cellxgene_census.open_soma(census_version=version)
    except Exception as e:  # of requests, botocore or tiledb
        raise ConnectionError(f"the Census, version {version!r}, cannot be opened ({e}). {OTHER_WAYS}") from e
    with opened:
        organisms = opened["census_data"]
        name = organism.lower().replace(" ", "_")
        if name not in organisms:
            raise ValueError(f"the Census has no organism {organism!r}; known: {', '.join(sorted(organisms))}")
        try:
            yield organisms[name]
        except _soma_error() as e:
            raise ConnectionError(
                f"the Census cannot be read ({e}); give the command again to go on. {OTHER_WAYS}"
            ) from e


@contextlib.contextmanager
def local(path: str) -> Iterator[Any]:
    """A SOMA experiment on disk.

    Raises
    ------
    ModuleNotFoundError
        ``tiledbsoma`` is missing.
    ValueError
        No experiment there.
    """
    try:
        import tiledbsoma
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("--soma needs: pip install tiledbsoma") from e
    try:
        opened = tiledbsoma.Experiment.open(path)
    except (tiledbsoma.SOMAError, TypeError) as e:
        raise ValueError(f"{path} is no SOMA experiment ({e}); give the folder that holds obs and ms") from e
    with opened:
        yield opened


def write(
    experiment: Any,
    folder: Path,
    *,
    value_filter: str | None = None,
    columns: Sequence[str] | None = None,
    measurement: str = "RNA",
    layer: str = "raw",
    genes: str = "feature_id",
    cells_per_file: int = 100_000,
    overwrite: bool = False,
) -> list[Path]:
    """Write the chosen cells, in order of their ``soma_joinid``, as ``folder/cells-00000.h5ad`` and so on.

    ``X`` holds the counts, obs_names are the ``soma_joinid``. A piece that is there from the same query is kept.

    Parameters
    ----------
    experiment
        Open ``tiledbsoma.Experiment``.
    folder
        Where to; other files in it are left alone.
    value_filter
        TileDB-SOMA value filter on obs; None is all cells.
    columns
        Of obs; None is all.
    measurement, layer
        Names in ``ms`` and in its ``X``.
    genes
        Column of var that names the genes; names that are not unique get a number.
    cells_per_file
        Cells of one file, and in memory at once.
    overwrite
        Replace what another query left in the folder.

    Raises
    ------
    ValueError
        No such column, measurement or layer, no cell chosen, or ``cells_per_file`` below 1.
    FileExistsError
        The folder holds another query.
    """
    import tiledbsoma

    if cells_per_file < 1:
        raise ValueError(f"cells_per_file={cells_per_file}; give 1 or more (--cells-per-file)")
    _known("measurement (--measurement)", measurement, experiment.ms)
    _known("layer (--layer)", layer, experiment.ms[measurement].X)
    _known("column of var (--genes)", genes, experiment.ms[measurement].var.keys())
    for column in columns or ():
        _known("column of obs (--columns)", column, experiment.obs.keys())
    try:
        with experiment.axis_query(measurement, obs_query=tiledbsoma.AxisQuery(value_filter=value_filter)) as query:
            chosen = np.sort(query.obs_joinids().to_numpy())
    except tiledbsoma.SOMAError as e:
        if "schema" not in str(e) and "parse" not in str(e).lower():
            raise
        raise ValueError(f"--filter {value_filter!r} is not understood ({str(e).splitlines()[0]})") from e
    if not len(chosen):
        raise ValueError(f"--filter {value_filter!r} chooses no cell of {experiment.uri}; loosen it")
    kept = None if columns is None else ["soma_joinid", *columns]
    names = {"var": [genes], **({} if kept is None else {"obs": list(dict.fromkeys(kept))})}
    asked = {
        "uri": experiment.uri,
        "cells": hashlib.sha256(chosen.tobytes()).hexdigest(),
        "cells_per_file": cells_per_file,
        "columns": kept,
        "genes": genes,
        "measurement": measurement,
        "layer": layer,
    }
    _claim(folder, asked, overwrite)
    written = []
    for i, start in enumerate(range(0, len(chosen), cells_per_file)):
        path = folder / f"cells-{i:05d}.h5ad"
        written.append(path)
        if path.exists():
            continue
        piece = tiledbsoma.AxisQuery(coords=(chosen[start : start + cells_per_file],))
        with experiment.axis_query(measurement, obs_query=piece) as query:
            data = query.to_anndata(layer, column_names=names, obs_id_name="soma_joinid", var_id_name=genes)
        data.obs.index.name = data.var.index.name = None
        data.var_names_make_unique()
        with files.whole(path) as temporary:
            data.write_h5ad(temporary, compression="gzip", compression_opts=1)
        print(f"{path}: {data.n_obs} cells of {data.n_vars} genes", flush=True)
    return written


def _claim(folder: Path, asked: dict[str, Any], overwrite: bool) -> None:
    """Make the folder this query's; what another one left goes if it may."""
    told = folder / "query.json"
    if told.exists() and json.loads(told.read_text()) != asked:
        if not overwrite:
            raise FileExistsError(f"{folder} holds the cells of another query; give --overwrite, or another folder")
        told.unlink()
    if not told.exists():
        old = sorted(folder.glob("cells-*.h5ad"))
        if old and not overwrite:
            raise FileExistsError(f"{old[0]} exists already; give --overwrite to replace it, or another folder")
        for path in old:
            path.unlink()
        with files.whole(told) as temporary:
            temporary.write_text(json.dumps(asked, indent=1))


def _known(what: str, word: str, known: Any) -> None:
    if word not in known:
        raise ValueError(f"there is no {what} {word!r}; known: {', '.join(sorted(known))}")


def _soma_error() -> type[Exception]:
    import tiledbsoma

    return tiledbsoma.SOMAError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the h5ad files")
    parser.add_argument("--soma", metavar="PATH", help="a SOMA experiment on disk instead of the Census")
    parser.add_argument("--organism", default="homo_sapiens")
    parser.add_argument("--version", default="stable", help="of the Census; a date for one that can be had again")
    parser.add_argument("--filter", help="value filter on obs, such as \"tissue_general == 'blood'\"")
    parser.add_argument("--columns", help="of obs, with commas between; all")
    parser.add_argument("--measurement", default="RNA")
    parser.add_argument("--layer", default="raw")
    parser.add_argument("--genes", default="feature_id", help="column of var that names the genes")
    parser.add_argument("--cells-per-file", type=int, default=100_000)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--store", type=Path, help="build this store too, with a config beside it")
    parser.add_argument("--genes-kept", default="hvg:2000", help="of the store: all, hvg:N, cv:N, ... (hvg:2000)")
    a = parser.parse_args(arguments)
    try:
        with local(a.soma) if a.soma else census(a.organism, a.version) as experiment:
            written = write(
                experiment,
                a.folder,
                value_filter=a.filter,
                columns=a.columns.split(",") if a.columns else None,
                measurement=a.measurement,
                layer=a.layer,
                genes=a.genes,
                cells_per_file=a.cells_per_file,
                overwrite=a.overwrite,
            )
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"error: {e}") from e
    if a.store is None:
        print(f"{len(written)} files; next: distdiff shard {a.folder}/*.h5ad --out {a.folder}.zarr")
        return
    from _recipe import command_line, finish, run

    words = ["--genes", a.genes_kept, *(["--overwrite"] if a.overwrite else [])]
    options = command_line(None, min_cells=10).parse_args(words)
    run(lambda: finish(options, written, a.store, a.columns.split(",") if a.columns else []))


if __name__ == "__main__":
    main()
