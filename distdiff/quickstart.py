"""The whole job on real counts: shard, train, impute, evaluate, log. The code is also the shortest tour of distdiff."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from distdiff import config, experiment, files, tracking
from distdiff.batch import impute_file
from distdiff.data.ingest.shard import shard
from distdiff.data.ingest.source import Source
from distdiff.data.masks import mcar
from distdiff.model import Model
from distdiff.rng import numpy_generator

CELL_TYPES = ("cell_type", "celltype", "cell_types", "bulk_labels", "louvain", "leiden")
MOST_GENES = 2000
PLOTTED = 3000  # cells of the UMAP figure


def demo_counts(path: Path) -> None:
    """Write the UMI counts behind ``scanpy.datasets.pbmc68k_reduced`` (700 cells x 765 genes, ships with scanpy).

    Its ``raw.X`` is ``log1p(counts / n_counts * 1e4)``, so the counts come back exactly; were one of them further than
    0.1 from a whole number, this raises.
    """
    import anndata as ad
    import scanpy as sc

    reduced = sc.datasets.pbmc68k_reduced()
    counts = sp.csr_matrix(reduced.raw.X).astype(np.float64)
    counts.data = np.expm1(counts.data)
    counts = sp.diags(reduced.obs["n_counts"].to_numpy(np.float64) / 1e4) @ counts
    whole = np.round(counts.data)
    if np.abs(counts.data - whole).max() > 0.1:
        raise ValueError("scanpy's pbmc68k_reduced no longer holds log1p CP10k values; give your own file with --data")
    counts.data = whole.astype(np.float32)
    out = ad.AnnData(sp.csr_matrix(counts), obs=reduced.obs[["bulk_labels", "louvain"]], var=reduced.raw.var[[]])
    out.uns["provenance"] = "10x PBMC 68k (Zheng et al. 2017), 700 cells, counts recovered from scanpy's reduced set"
    with files.whole(path, overwrite=True) as temporary:
        out.write_h5ad(temporary)


def run(
    data: Path | None, out: Path, *, layer: str | None = None, cell_type: str | None = None, prepare_only: bool = False
) -> None:
    """Run the quickstart into ``out``; with ``data`` on one's own h5ad file."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        data, cell_type = out / "counts.h5ad", cell_type or "bulk_labels"
        _say(began, "1/5 counts: 10x PBMC, as shipped with scanpy")
        demo_counts(data)
    source = Source.open(data, layer=layer, every=True)
    cell_type = cell_type or _guess(source)
    genes = "all" if len(source.genes) <= MOST_GENES else f"hvg:{MOST_GENES}"

    _say(began, f"2/5 shard {data} (genes: {genes}, cell types: {cell_type or 'none'})")
    store = out / "atlas.zarr"
    shard([data], store, layer=layer, genes=genes, labels=(cell_type,) if cell_type else (), overwrite=True)
    if prepare_only:
        return

    _say(began, "3/5 train, then evaluate on held-out cells")
    name = "distdiff-quickstart"
    outcome = experiment.train(config.parse(settings(store, out / "run", cell_type, name)))
    if outcome.report is None:
        return  # not the main process

    _say(began, "4/5 impute: half of all entries hidden, all cells")
    mask, imputed = out / "mask.npz", out / "imputed.h5ad"
    hidden = mcar((source.n_cells, len(source.genes)), 0.5, numpy_generator(0, "quickstart"))
    with files.whole(mask, overwrite=True) as temporary:
        sp.save_npz(temporary, sp.csr_matrix(hidden))
    model = Model.load(outcome.model)
    impute_file(model, data, imputed, layer=layer, mask=str(mask), overwrite=True)

    _say(began, "5/5 figure")
    figure = _figure(source, model, hidden, imputed, cell_type, out / "umap.png")
    if outcome.registered:
        tracking.attach(out / "run", figure)
    print(f"\n{outcome.report.to_text()}\n")
    _paths(out, figure, outcome, time.perf_counter() - began)
    print(after(outcome.model, store, data, out / "dropout.h5ad", groups=cell_type or "leiden", layer=layer))


def after(model: Path, store: Path, data: Path, imputed: Path, *, groups: str, layer: str | None = None) -> str:
    """What to run next; the model is named by its folder, as the registry's champion may be one of other data."""
    of = f"--model {shlex.quote(str(model))} --data"
    counts = shlex.quote(str(data)) + (f" --layer {shlex.quote(layer)}" if layer else "")
    return (
        f"Next:\n  distdiff impute {of} {counts} --sites dropout --groups {shlex.quote(groups)} "
        f"--out {shlex.quote(str(imputed))}\n  distdiff evaluate {of} {shlex.quote(str(store))} --rate 0.25\n"
        "  mlflow ui --backend-store-uri sqlite:///mlflow.db"
    )


def settings(store: Path, out: Path, cell_type: str | None, name: str) -> dict[str, object]:
    """The experiment of configs/pbmc68k.yaml for another store."""
    return {
        "data": {"store": str(store)},
        "denoiser": {"kind": "mlp", "width": 256, "depth": 3},
        "train": {
            "out": str(out), "cells": 76_800, "eval_cells": 6_400, "patience": 3, "resume": "never",
            "checkpoint_cells": 12_800,
        },
        "evaluate": {"cell_type": cell_type},
        "tracking": {"model": name},
    }  # fmt: skip


def _guess(source: Source) -> str | None:
    for name in CELL_TYPES:
        with contextlib.suppress(ValueError):
            source.obs(name)
            return name
    return None


def _figure(source: Source, model: Model, hidden: np.ndarray, imputed: Path, cell_type: str | None, path: Path) -> Path:
    from distdiff.plots import umap

    rows = np.arange(source.n_cells)[:: max(1, -(-source.n_cells // PLOTTED))]
    known = np.isin(np.array(source.genes), np.array(model.spec.genes))
    truth = source.read(0, source.n_cells)[rows][:, known].toarray()
    after = Source.open(imputed, layer="imputed", every=True).read(0, source.n_cells)[rows][:, known].toarray()
    before = np.where(hidden[np.ix_(rows, known)], 0, truth)
    umap(before, after, truth, source.obs(cell_type)[rows] if cell_type else None, path)
    return path


def _say(began: float, text: str) -> None:
    print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)


def _paths(out: Path, figure: Path, outcome: experiment.Outcome, seconds: float) -> None:
    print(f"Done in {seconds:.0f} s. Written:")
    for path, what in (
        (out / "atlas.zarr", "the sharded store"),
        (outcome.model, f"the model ({outcome.registered or 'not registered'})"),
        (out / "imputed.h5ad", "layers imputed_mean and imputed, opens in scanpy"),
        (out / "run" / "evaluation", "table (md, json) and calibration.png"),
        (figure, "UMAP: true counts, half hidden, imputed (all cells, trained ones included)"),
        (tracking.public_uri(tracking.tracking_uri()), "MLflow: config, metrics, table, figures, model"),
    ):
        print(f"  {path!s:<40} {what}")
