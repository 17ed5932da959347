"""What the recipes share: options, labels by any of their names, and the end: a store and a config beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distdiff import config, files
from distdiff.data.ingest import container
from distdiff.data.ingest.shard import shard
from distdiff.data.store.manifest import Manifest

OPTIONS: dict[str, tuple[Any, str]] = {
    "genes": ("all", "all, hvg:N, cv:N, seurat_v3:N, A,B,C, or a file"),
    "min_counts": (0.0, "drop cells with fewer molecules"),
    "min_genes": (0, "drop cells with fewer genes"),
    "min_cells": (0, "drop genes that fewer cells have"),
    "max_mito": (100.0, "drop cells with more percent of molecules from genes named MT-"),
    "split_by": ("", "obs column whose values stay whole in training, validation or test"),
    "seed": (0, "of split and order"),
}
"""Options of `distdiff.data.ingest.shard.shard` that every recipe has: default and help."""


def command_line(doc: str | None, *, config: str = "default", **defaults: Any) -> argparse.ArgumentParser:
    """Options of a recipe; ``defaults`` are its own choices for `OPTIONS`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (off, text) in OPTIONS.items():
        value = defaults.pop(name, off)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(off), default=value, help=f"{text} ({value!r})")
    if defaults:
        raise ValueError(f"a recipe has no option {', '.join(defaults)}; known: {', '.join(OPTIONS)}")
    parser.add_argument("--config", default=config, help=f"what the config beside the store starts from ({config})")
    parser.add_argument("--overwrite", action="store_true", help="replace a store and a config of these names")
    return parser


def labels_of(path: Path, names: Mapping[str, Sequence[str]], *, needed: bool = True) -> dict[str, str]:
    """Which obs column of an AnnData file holds what, by the first of its names that is there.

    Parameters
    ----------
    names
        What is looked for, and the names that it may have; upper and lower case are the same.
    needed
        Whether each must be there.

    Raises
    ------
    ValueError
        No AnnData; a column that is not there (the columns that are there are named).
    """
    root = container.open_root(path)
    if "obs" not in root:
        raise ValueError(f"{path} is no AnnData (it has no obs); give the h5ad file that the recipe's --help names")
    columns = container.columns_of(root["obs"])
    lower = {column.lower(): column for column in reversed(columns)}
    found = {}
    for what, words in names.items():
        if column := next((lower[word.lower()] for word in words if word.lower() in lower), ""):
            found[what] = column
        elif needed:
            raise ValueError(
                f"{path}: obs has no column for {what} ({' or '.join(words)}); name the labels yourself by --labels, "
                f"out of: {', '.join(columns)}"
            )
    return found


def layer_of(path: Path) -> str | None:
    """Where the raw counts of an AnnData file are: ``raw`` where it has one, else None (``X``)."""
    root = container.open_root(path)
    return "raw" if "raw" in root and "X" in root["raw"] else None


def one_file(
    doc: str | None,
    arguments: Sequence[str] | None,
    *,
    config: str,
    names: Mapping[str, Sequence[str]],
    **defaults: Any,
) -> None:
    """The recipe of an atlas in one h5ad file of raw counts: the store, and the config beside it.

    Parameters
    ----------
    doc, arguments
        The recipe's own words, and its command line.
    config
        What the config starts from; the store's name in the help.
    names
        Labels, cell type first, as :func:`labels_of` finds them.
    **defaults
        Its own choices for `OPTIONS`.
    """
    parser = command_line(doc, config=config, **defaults)
    parser.add_argument("source", type=Path, help="h5ad of raw counts")
    parser.add_argument("out", type=Path, help=f"store to write, for example {config}.zarr")
    parser.add_argument("--labels", help="obs columns, with commas between, cell type first; found by name")
    a = parser.parse_args(arguments)
    labels = a.labels.split(",") if a.labels else list(labels_of(a.source, names).values())
    finish(a, [a.source], a.out, labels, layer=layer_of(a.source), overrides=[f"evaluate.cell_type={labels[0]}"])


def finish(
    a: argparse.Namespace, inputs: Sequence[Path], out: Path, labels: Sequence[str], *,
    overrides: Sequence[str] = (), **options: Any,
) -> Manifest:  # fmt: skip
    """Build the store ``out`` and write the config beside it.

    Parameters
    ----------
    a
        What `command_line` parsed.
    labels
        obs columns: labels of the store, and what the model is conditioned on.
    overrides
        Further ``key=value`` of the config.
    **options
        Of :func:`~distdiff.data.ingest.shard.shard`, before those of ``a``.

    Raises
    ------
    ValueError, OSError
        As `shard` and :func:`distdiff.config.load`; ``out`` has no name ending in ``.zarr``.
    FileExistsError
        The store or the config is there, without ``--overwrite``.
    """
    beside = out.with_suffix(".yaml")
    if out.suffix != ".zarr":
        raise ValueError(f"the store is called {out}; give a name that ends in .zarr ({out.name}.zarr)")
    if beside.exists() and not a.overwrite:
        raise FileExistsError(f"{beside} exists already; give --overwrite to replace it, or another name")
    words = [f"data.store={out}", f"data.labels={list(labels)}", f"train.out=runs/{out.stem}", *overrides]
    settings = config.load(a.config, [*words, f"tracking.model=distdiff-{out.stem}"])
    chosen = {name: getattr(a, name) for name in OPTIONS}
    chosen["split_by"] = chosen["split_by"] or None
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest = shard(inputs, out, labels=labels, overwrite=a.overwrite, **{**chosen, **options})
    head = f"# distdiff train --config {beside}\n# from the config {a.config}; every key is there\n"
    with files.whole(beside, overwrite=a.overwrite) as temporary:
        temporary.write_text(head + yaml.safe_dump(settings.as_dict(), sort_keys=False), encoding="utf-8")
    print(f"{out}: {manifest.n_cells} cells x {len(manifest.genes)} genes; next: distdiff train --config {beside}")
    return manifest


def run(main: Callable[[], object]) -> None:
    """Call ``main``; what cannot be done is one line."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
