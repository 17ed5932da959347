"""The whole job on real counts: shard, train, impute, evaluate, log. The code is also the shortest tour of distdiff."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from distdiff import config, experiment, files, pl, tracking
from distdiff.batch import impute_file
from distdiff.data.ingest.shard import shard
from distdiff.data.ingest.source import Source
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.rng import numpy_generator

CELL_TYPES = ("cell_type", "celltype", "cell_types", "bulk_labels", "louvain", "leiden")
MOST_GENES = 2000
PLOTTED = 3000  # cells of the figures
GENERATED = 500  # cells whose depth is compared with real ones


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
        print(f"The store is {store}. Next:\n  distdiff train data.store={shlex.quote(str(store))} train.out=RUN")
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

    _say(began, "5/5 figures")
    figures = _figures(source, data.name, model, hidden, imputed, cell_type, store, out / "figures")
    if outcome.registered:
        tracking.attach(out / "run", figures)
    print(f"\n{outcome.report.to_text()}\n")
    _paths(out, figures, outcome, time.perf_counter() - began)
    print(after(outcome.model, store, data, out / "dropout.h5ad", groups=cell_type or "leiden", layer=layer))


def after(model: Path, store: Path, data: Path, imputed: Path, *, groups: str, layer: str | None = None) -> str:
    """What to run next; the model is named by its folder, as the registry's champion may be one of other data."""
    of = f"--model {shlex.quote(str(model))} --data"
    counts = shlex.quote(str(data)) + (f" --layer {shlex.quote(layer)}" if layer else "")
    return (
        f"Next:\n  distdiff denoise {of} {counts} --out {shlex.quote(str(imputed.with_name('denoised.h5ad')))}\n"
        f"  distdiff impute {of} {counts} --sites dropout --groups {shlex.quote(groups)} "
        f"--out {shlex.quote(str(imputed))}\n  distdiff evaluate {of} {shlex.quote(str(store))} --rate 0.25\n"
        "  mlflow ui --backend-store-uri sqlite:///mlflow.db"
    )


def settings(store: Path, out: Path, cell_type: str | None, name: str) -> dict[str, object]:
    """The experiment of configs/pbmc68k.yaml for another store."""
    return {
        "data": {"store": str(store)},
        "denoiser": {"kind": "mlp", "width": 256, "depth": 3},
        "train": {"out": str(out), "resume": "never"},
        "evaluate": {"cell_type": cell_type},
        "tracking": {"model": name},
    }


def _guess(source: Source) -> str | None:
    for name in CELL_TYPES:
        with contextlib.suppress(ValueError):
            source.obs(name)
            return name
    return None


def _figures(
    source: Source, name: str, model: Model, hidden: np.ndarray, imputed: Path, cell_type: str | None, store: Path,
    folder: Path,
) -> Path:  # fmt: skip
    """Pictures of the imputation and of generated cells, in one folder, whole or not at all."""
    import anndata as ad
    import pandas as pd

    rows = np.arange(source.n_cells)[:: max(1, -(-source.n_cells // PLOTTED))]
    known = np.isin(np.array(source.genes), np.array(model.spec.genes))
    truth = source.read(0, source.n_cells)[rows][:, known]
    filled = {name: Source.open(imputed, layer=name, every=True) for name in ("imputed", "imputed_mean")}
    layers = {name: layer.read(0, source.n_cells)[rows][:, known] for name, layer in filled.items()}
    layers["hidden"] = truth.multiply(~hidden[np.ix_(rows, known)]).tocsr()
    opened = CountStore.open(store)
    trained = np.zeros(source.n_cells, dtype=bool)
    trained[opened.origin(opened.rows("train"))[1]] = True
    obs = pd.DataFrame({"training": trained[rows]}, index=[str(cell) for cell in rows])
    if cell_type:
        obs[cell_type] = source.obs(cell_type)[rows]
    cells = ad.AnnData(truth, obs, pd.DataFrame(index=np.array(source.genes)[known]), layers=layers)
    draws = {"true counts": None, "half hidden (zeros)": "hidden", "imputed (one draw)": "imputed"}
    means = {"true counts": None, "half hidden (zeros)": "hidden", "imputed (posterior mean)": "imputed_mean"}
    with files.whole(folder, overwrite=True) as temporary:
        temporary.mkdir()
        pl.umap(cells, layers=draws, color=cell_type, training="training", name=name, save=temporary / "umap.png")
        if cell_type and cells.obs[cell_type].nunique() > 1:
            pl.dotplot(cells, groupby=cell_type, layers=means, name=name, save=temporary / "markers.png")
            pl.violin(cells, groupby=cell_type, layers=draws, name=name, save=temporary / "violins.png")
        first, second = cells.var_names[np.argsort(-np.asarray(truth.sum(0)).ravel(), kind="stable")[:2]]
        pl.scatter(cells, first, second, layers=means, name=name, save=temporary / "genes.png")
        made = model.generate(min(GENERATED, source.n_cells))
        pl.depth(cells, made, name=name, save=temporary / "depth.png")
    return folder


def _say(began: float, text: str) -> None:
    print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)


def _paths(out: Path, figures: Path, outcome: experiment.Outcome, seconds: float) -> None:
    print(f"Done in {seconds:.0f} s. Written:")
    for path, what in (
        (out / "atlas.zarr", "the sharded store"),
        (outcome.model, f"the model ({outcome.registered or 'not registered'})"),
        (out / "imputed.h5ad", "layers imputed_mean and imputed, opens in scanpy"),
        (out / "run" / "evaluation", "table (md, json), calibration and score by network calls"),
        (figures, "UMAP and genes: true counts, half hidden, imputed; depth of generated cells"),
        (tracking.public_uri(tracking.tracking_uri()), "MLflow: config, metrics, table, figures, model"),
    ):
        print(f"  {path!s:<40} {what}")
