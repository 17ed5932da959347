"""The command line: shard, store, train, the tasks on files (impute ... generate), evaluate, quickstart."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from distdiff import console

app = typer.Typer(
    name="distdiff", no_args_is_help=True, pretty_exceptions_enable=False, context_settings=console.NAMES,
    help="Diffusion models on single-cell counts: impute, denoise, deepen, complete and generate cells.",
)  # fmt: skip

stores = typer.Typer(no_args_is_help=True, help="Look at a store, check it, turn it back into AnnData.")
app.add_typer(stores, name="store")

server = typer.Typer(no_args_is_help=True, help="Send to MLflow what runs could not send.")
app.add_typer(server, name="mlflow")
console.add(app)

Config = Annotated[Path, typer.Option(help="YAML file of the experiment, or a config that ships with distdiff.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust", help="A package whose code a model may run (may be repeated).")
]


@app.command()
def shard(
    inputs: Annotated[list[Path], typer.Argument(help="h5ad, AnnData zarr, 10x h5 or mtx.")],
    out: Annotated[Path, typer.Option(help="Store to write, for example atlas.zarr.")],
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X; 'raw' for .raw.X).")] = None,
    genes: Annotated[str, typer.Option(help="all, hvg:N, top:N, cv:N, A,B,C, or a file.")] = "all",
    panel: Annotated[str | None, typer.Option(help="Genes to store apart, chosen as --genes.")] = None,
    join: Annotated[str, typer.Option(help="Of several files: inner (genes of all), outer (of any).")] = "inner",
    labels: Annotated[str, typer.Option(help="obs columns to keep, comma-separated.")] = "",
    split: Annotated[str, typer.Option(help="Shares of training, validation, test cells.")] = "0.8,0.1,0.1",
    split_by: Annotated[str | None, typer.Option(help="obs column whose groups stay together (donor).")] = None,
    strata: Annotated[str | None, typer.Option(help="obs column whose values lie together (loader.strata).")] = None,
    shuffle: Annotated[bool, typer.Option(help="Shuffle the cells, training cells first.")] = True,
    min_counts: Annotated[float, typer.Option(help="Drop cells with fewer molecules.")] = 0,
    min_genes: Annotated[int, typer.Option(help="Drop cells with fewer genes.")] = 0,
    min_cells: Annotated[int, typer.Option(help="Drop genes that fewer cells have.")] = 0,
    max_mito: Annotated[float, typer.Option(help="Drop cells with more percent of molecules from MT- genes.")] = 100.0,
    counts: Annotated[
        bool, typer.Option("--counts/--measurements", help="Whole molecules, or any numbers, as float32.")
    ] = True,
    rounding: Annotated[str | None, typer.Option(help="random: make counts with decimals whole.")] = None,
    codec: Annotated[str, typer.Option(help="local (lz4, fastest) or compact (zstd, smallest).")] = "local",
    workers: Annotated[int | None, typer.Option(help="Dask processes (0: none, work in this process).")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, tcp://...")] = None,
    seed: Annotated[int, typer.Option(help="Seed of split and order.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Build a sharded zarr store from count matrices; the same command goes on with a build that was stopped."""
    from distdiff.data.ingest.shard import shard as build

    try:
        first, second, third = (float(part) for part in split.split(","))
    except ValueError:
        raise ValueError(f"split={split!r} must be three numbers such as 0.8,0.1,0.1") from None
    manifest = build(
        inputs, out, layer=layer, genes=genes, panel=panel, join=join, labels=_words(labels),
        split=(first, second, third), split_by=split_by, strata=strata, shuffle=shuffle, min_counts=min_counts,
        min_genes=min_genes, min_cells=min_cells, max_mito=max_mito, counts=counts, codec=codec,
        rounding=rounding,  # type: ignore[arg-type]
        workers=workers, scheduler=scheduler, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    typer.echo(
        f"{out}: {manifest.n_cells} cells x {len(manifest.genes)} genes, fingerprint {manifest.fingerprint[:12]}"
    )


@stores.command()
def info(path: Annotated[str, typer.Argument(help="Folder or URL of a store.")]) -> None:
    """What a store holds."""
    from distdiff.data.store.store import CountStore

    typer.echo(CountStore.open(path).describe())


@stores.command()
def verify(path: Annotated[str, typer.Argument(help="Folder or URL of a store.")]) -> None:
    """Read every count once and compare it with what was built."""
    from distdiff.data.store.store import CountStore

    store = CountStore.open(path)
    store.verify(progress=True)
    typer.echo(f"{path}: {len(store.manifest.shards)} shards are as built, fingerprint {store.manifest.fingerprint}")


@stores.command()
def export(
    path: Annotated[str, typer.Argument(help="Folder or URL of a store.")],
    out: Annotated[Path, typer.Option(help="Output, .h5ad or .zarr.")],
    panel: Annotated[bool, typer.Option("--panel", help="Only the genes of the panel.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a store as AnnData, cells in the order of their sources."""
    from distdiff.data.store.export import export as write
    from distdiff.data.store.store import CountStore

    store = CountStore.open(path)
    write(store.panel() if panel else store, out, overwrite=overwrite)
    typer.echo(f"{out}: {store.n_cells} cells, fingerprint {store.manifest.fingerprint[:12]}")


@stores.command()
def upload(
    path: Annotated[Path, typer.Argument(help="Folder of a store.")],
    url: Annotated[str, typer.Argument(help="Where to: s3://BUCKET/PATH or gs://BUCKET/PATH.")],
    overwrite: Overwrite = False,
) -> None:
    """Copy a store to an object store; the same command goes on with a copy that was cut."""
    from distdiff.data.store.upload import upload as send

    manifest, sent = send(path, url, overwrite=overwrite)
    typer.echo(f"{url}: {manifest.n_cells} cells, {sent:,} bytes sent, fingerprint {manifest.fingerprint[:12]}")


@server.command()
def sync(
    folder: Annotated[Path, typer.Argument(help="train.out of a run, or a folder of many.")],
    uri: Annotated[str, typer.Option(help="The server (default: MLFLOW_TRACKING_URI).")] = "",
    anew: Annotated[bool, typer.Option("--anew", help="Begin a run anew that the server does not know.")] = False,
    trust: Trust = None,
) -> None:
    """Send what runs kept while their MLflow server could not be reached: metrics, files, the model."""
    from distdiff import heldout, tracking

    compare = functools.partial(heldout.compare, trust=tuple(trust or ()), remote=False)
    lines = tracking.sync(folder, compare=compare, uri=uri, anew=anew)
    typer.echo("\n".join(lines) or f"{folder}: all was sent before")


@app.command()
def train(
    context: typer.Context,
    config: Config = Path("default"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example data.store=mine.zarr train.out=runs/mine")
    ] = None,
    trust: Trust = None,
) -> None:
    """Train a model (the same function as ``accelerate launch launch/train.py``).

    Asked to stop (SIGTERM, SIGUSR1, the time limit) it saves and leaves with status 75; the same command goes on.
    """
    from distdiff import config as configs
    from distdiff import experiment
    from distdiff.training.peers import Lost
    from distdiff.training.stop import Stopped

    resolved = configs.load(config, overrides or [])
    try:
        outcome = experiment.train(resolved, trust=tuple(trust or ()), progress=_shown(context))
    except (Stopped, Lost) as stopped:
        typer.echo(f"distdiff: {stopped}", err=True)
        raise typer.Exit(stopped.code) from None
    if outcome.report is not None:
        typer.echo(outcome.report.to_text())
    if outcome.registered or not resolved.tracking.enabled:
        typer.echo(f"model: {outcome.model}" + (f"; registered: {outcome.registered}" if outcome.registered else ""))


ModelName = Annotated[str, typer.Option("--model", help="models:/NAME@champion, or a model folder.")]
Data = Annotated[str, typer.Option("--data", help="h5ad, AnnData zarr, 10x, or a distdiff store (folder or URL).")]
Out = Annotated[Path, typer.Option("--out", help="Output: .zarr for any size, .h5ad for small ones.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Keep = Annotated[str | None, typer.Option("--genes", help="Genes to write: A,B,C, or a file with one a line.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Of mean, draws, mask, ood (default: these), sd, quantiles such as q5.")
]
Steps = Annotated[int | None, typer.Option("--steps", help="Network calls of a draw (default: 1; repaint 100).")]
Guidance = Annotated[float, typer.Option("--guidance", help="Weight of the labels; 1 keeps the law calibrated.")]
Spacing = Annotated[str, typer.Option("--spacing", help="Where the steps lie: time, variance, or p by p: 0,0.5,1.")]
Solver = Annotated[str, typer.Option("--solver", help="Of the walk: plain, or another of the documentation.")]
Readout = Annotated[str | None, typer.Option("--readout", help="Point estimate: mean (default), log1p, median, q5.")]
MeanOnly = Annotated[bool, typer.Option("--mean-only", help="Only the posterior mean (one call).")]
Ood = Annotated[int, typer.Option("--ood", help="Network calls of obs['distdiff_nats'] (0: none).")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of layers that are no draws: float32, float16, int32, int16.")]
Sparse = Annotated[bool | None, typer.Option("--sparse/--dense", help="Layers as CSR or dense (default: the smaller).")]


def _on_cells(
    *,
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X).")] = None,
    use_labels: Annotated[bool, typer.Option("--use-labels/--no-labels", help="Condition on obs labels.")] = False,
    unseen: Annotated[str, typer.Option(help="Label values that the model never saw: unknown, or refuse.")] = "unknown",
) -> None:
    """Options of every task on measured cells."""


def _job(
    *,
    batch_size: Annotated[int | None, typer.Option(help="Cells of a network call (default: by trial).")] = None,
    shard_cells: Annotated[int | None, typer.Option(help="Cells of an output shard.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16; auto: the second on a GPU.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda:0; auto: the GPU, if there is one.")] = "auto",
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler: its workers do it.")] = None,
    workers: Annotated[int | None, typer.Option(help="Dask workers to start here, one a GPU.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a .zarr result again and compare its checksums.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="With --verify: compute again what is damaged.")] = False,
    overwrite: Overwrite = False,
    trust: Trust = None,
) -> None:
    """Options of every task on files."""


def _with(*declared: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``declared`` besides its own; it takes them as ``**shared``."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for options in declared:
            parameters += inspect.signature(options, eval_str=True).parameters.values()
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return add


@app.command()
@_with(_on_cells, _job)
def impute(
    context: typer.Context, model: ModelName, data: Data, out: Out,
    mask: Annotated[str | None, typer.Option(help="Targets: a layer, or a .npz/.npy file, true = impute.")] = None,
    sites: Annotated[str | None, typer.Option(help="'dropout': zeros that scIDPMs' Algorithm 1 suspects.")] = None,
    groups: Annotated[str | None, typer.Option(help="obs column for --sites, or 'leiden'.")] = None,
    draws: Annotated[int, typer.Option(help="Draws from the predictive law to write.")] = 1,
    mean_only: MeanOnly = False, layers: Layers = None, ood: Ood = 4, steps: Steps = None,
    method: Annotated[str, typer.Option(help="conditional or repaint.")] = "conditional",
    guidance: Guidance = 1.0, spacing: Spacing = "time", solver: Solver = "plain", readout: Readout = None,
    jump: Annotated[int | None, typer.Option(help="Steps between two returns of RePaint.")] = None,
    iters: Annotated[int | None, typer.Option(help="Passes of RePaint over the same steps.")] = None,
    sigma: Annotated[
        tuple[str, float] | None, typer.Option(help="Rule and strength of RePaint's attrition, such as: cap 0.5.")
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Replay batches as CUDA graphs.")] = False,
    seed: Seed = 0, genes: Keep = None, dtype: Dtype = "float32", sparse: Sparse = None, **shared: Any,
) -> None:  # fmt: skip
    """Impute a file of any size; observed counts come back unchanged. The same command continues a job."""
    _batch(
        context, "impute", model, data, out, mask=mask, sites=sites, groups=groups, draws=draws, mean_only=mean_only,
        layers=_names(layers), ood=ood, steps=steps, method=method, guidance=guidance, spacing=_levels(spacing),
        solver=solver, readout=readout, jump=jump, iters=iters, sigma=sigma, graph=graph or None, seed=seed,
        genes=_genes(genes), dtype=dtype, sparse=sparse, **shared,
    )  # fmt: skip


@app.command()
@_with(_on_cells, _job)
def complete(
    context: typer.Context, model: ModelName, data: Data, out: Out,
    genes: Annotated[str | None, typer.Option(help="Genes to append (default: all that the input lacks).")] = None,
    draws: Annotated[int, typer.Option(help="Draws from the predictive law to write.")] = 1,
    mean_only: MeanOnly = False, layers: Layers = None,
    report: Annotated[str | None, typer.Option(help="Folder of distdiff panel: var gets what it expects.")] = None,
    ood: Ood = 4, steps: Steps = None, guidance: Guidance = 1.0, spacing: Spacing = "time", solver: Solver = "plain",
    readout: Readout = None, seed: Seed = 0, dtype: Dtype = "float32", sparse: Sparse = None, **shared: Any,
) -> None:  # fmt: skip
    """Append genes that the input lacks and impute them."""
    _batch(
        context, "complete", model, data, out, genes=_genes(genes), draws=draws, mean_only=mean_only,
        layers=_names(layers), report=report, ood=ood, steps=steps, guidance=guidance, spacing=_levels(spacing),
        solver=solver, readout=readout, seed=seed, dtype=dtype, sparse=sparse, **shared,
    )  # fmt: skip


@app.command()
@_with(_on_cells, _job)
def denoise(
    context: typer.Context, model: ModelName, data: Data, out: Out,
    readout: Annotated[str, typer.Option(help="mean, log1p, log1p_cp10k, median, q5 ...")] = "mean",
    depth: Annotated[float, typer.Option(help="Depth of the other measurement that is read out.")] = 1.0,
    library: Annotated[str | None, typer.Option(help="log1p_cp10k is of: panel, cell, or an obs column.")] = None,
    ood: Ood = 0,
    genes: Annotated[str, typer.Option(help="model: those that it knows; all (others: 0); A,B,C; a file.")] = "model",
    dtype: Dtype = "float32", sparse: Sparse = None, **shared: Any,
) -> None:  # fmt: skip
    """Write the rate behind every count."""
    wanted = genes if genes in ("model", "all") else _genes(genes)
    _batch(
        context, "denoise", model, data, out, readout=readout, depth=depth, library=library, ood=ood, genes=wanted,
        dtype=dtype, sparse=sparse, **shared,
    )  # fmt: skip


@app.command()
@_with(_on_cells, _job)
def deepen(
    context: typer.Context, model: ModelName, data: Data, out: Out,
    times: Annotated[float, typer.Option(help="How many times the depth.")],
    steps: Annotated[int, typer.Option(help="Network calls of a walk.")] = 8,
    beyond: Annotated[str, typer.Option(help="refuse or allow cells deeper than those of training.")] = "refuse",
    ood: Ood = 0, seed: Seed = 0, genes: Keep = None, sparse: Sparse = True, **shared: Any,
) -> None:  # fmt: skip
    """Add the molecules that more depth would have shown."""
    _batch(
        context, "deepen", model, data, out, times=times, steps=steps, beyond=beyond, ood=ood, seed=seed,
        genes=_genes(genes), sparse=sparse, **shared,
    )  # fmt: skip


@app.command()
@_with(_on_cells, _job)
def latent(context: typer.Context, model: ModelName, data: Data, out: Out, **shared: Any) -> None:
    """Write obsm['X_distdiff'], the network's last hidden state of each cell, for neighbours and UMAP."""
    _batch(context, "latent", model, data, out, **shared)


@app.command()
@_with(_job)
def generate(
    context: typer.Context, model: ModelName, n: Annotated[int, typer.Option("--n", help="Number of cells.")], out: Out,
    obs: Annotated[list[str] | None, typer.Option(help="label=value of all cells, for example cell_type=B.")] = None,
    steps: Annotated[int, typer.Option(help="Network calls of a walk.")] = 16,
    spacing: Annotated[
        str | None, typer.Option(help="Where the steps lie: geometric (default), time, variance, or p by p: 0,0.5,1.")
    ] = None,
    solver: Solver = "plain",
    sigma: Annotated[tuple[str, float], typer.Option(help="Rule and strength of attrition.")] = ("none", 0.0),
    guidance: Guidance = 1.0,
    depth: Annotated[str | None, typer.Option(help="Molecules of a cell, or free (default: drawn).")] = None,
    seed: Seed = 0, **shared: Any,
) -> None:  # fmt: skip
    """Generate cells from labels alone; cell i depends on the seed and i."""
    labels = {}
    for word in obs or []:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--obs {word!r}: label=value is wanted")
        labels[key] = value
    _batch(
        context, "generate", model, None, out, n=n, obs=labels, steps=steps,
        spacing=None if spacing is None else _levels(spacing), solver=solver, sigma=sigma, guidance=guidance,
        depth=_depth(depth), seed=seed, **shared,
    )  # fmt: skip


def _levels(text: str) -> str | list[float]:
    """A way to place steps, or the levels themselves."""
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        return text


def _batch(
    context: typer.Context, kind: str, model: str, data: str | None, out: Path, *, scheduler: str | None,
    workers: int | None, verify: bool, repair: bool, trust: list[str] | None, **options: Any,
) -> None:  # fmt: skip
    """One of the tasks on files, in this process or on the workers of a cluster."""
    import distdiff
    from distdiff import batch, files

    load = functools.partial(distdiff.load, trust=tuple(trust or ()))
    options = {name: value for name, value in options.items() if value is not None}
    if repair and not verify:
        raise ValueError("--repair needs --verify")
    if verify:
        for name in ("overwrite", "batch_size", "shard_cells", "precision"):
            options.pop(name, None)
        found = batch.check(
            kind, load(model) if repair else None, data, out, repair=repair, progress=_shown(context), **options
        )
        typer.echo(found)
        return
    first = os.environ.get("RANK", "0") == "0"  # under a launcher one process speaks for all
    echo, shown = typer.echo if first else lambda text: None, first and _shown(context)
    notify = echo if shown else lambda text: None
    words = [Path(w).name if os.sep in w and "://" not in w else w for w in context.obj or [kind]]
    options |= {"command": " ".join(["distdiff", *words])}
    if scheduler is not None or workers is not None:
        load_there = functools.partial(load, str(files.absolute(model)) if Path(model).exists() else model)
        filled = batch.on_cluster(
            scheduler, kind, load_there, data, out, workers=workers, progress=shown, notify=notify, **options
        )
    else:
        filled = batch.run(kind, load(model), data, out, progress=shown, notify=notify, **options)
    echo(f"{out}: {filled.line()}")
    if kind in ("impute", "complete"):
        echo(f"  {filled.molecules_added:,.0f} molecules expected in the targets")
    notes = {
        f"genes unknown to the model {_unknown(kind, options.get('genes'))}": filled.genes_unknown_to_model,
        "genes of the model absent from the input": filled.genes_absent_from_input,
        "cells that the model was trained on (scores on these are too good)": filled.cells_trained_on,
    }
    for text in (*filled.warnings(kind), *(f"{number} {text}" for text, number in notes.items() if number)):
        echo(f"  {text}")


def _unknown(kind: str, genes: Any) -> str:
    """What became of the genes that the model does not know."""
    if kind != "denoise":
        return "are not looked at" if kind == "latent" else "left as they were"
    return "are 0 in the layer" if genes == "all" else "are not in the result"


def _shown(context: typer.Context) -> bool:
    """Whether bars and lines on the way are wanted (no ``--quiet``)."""
    return not context.find_root().params.get("quiet")


def _depth(text: str | None) -> float | str | None:
    """Molecules, a word, or nothing."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else _words(text)


def _genes(text: str | None) -> list[str] | None:
    """Names of genes: a file with one a line, or words."""
    if text is None:
        return None
    from distdiff.data.ingest.choose import file_of, listed

    file = file_of(text)
    return list(_words(text)) if file is None else listed(file)


@app.command()
def evaluate(
    context: typer.Context,
    model: ModelName,
    data: Annotated[str, typer.Option(help="A store (its test cells are scored), h5ad, AnnData zarr, or 10x.")],
    out: Annotated[Path | None, typer.Option(help="Folder for table and figures.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X).")] = None,
    task: Annotated[
        str, typer.Option(help="impute, or generate: cells of each label against held-out cells.")
    ] = "impute",
    rate: Annotated[float, typer.Option(help="Share of entries to hide.")] = 0.5,
    protocol: Annotated[
        str, typer.Option(help="mcar (zeros scored), mar, mnar_low, mnar_high, genes, paper.")
    ] = "mcar",
    draws: Annotated[int, typer.Option(help="Draws of an ensemble, at least 2.")] = 5,
    cells: Annotated[
        int | None, typer.Option(help="Most test cells to score (2000); cells to generate of each label value (200).")
    ] = None,
    cell_type: Annotated[str | None, typer.Option(help="Label of the cell-type rows; label to generate.")] = None,
    repaint_steps: Annotated[int, typer.Option(help="Steps of the RePaint row (0: none).")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of masks and draws.")] = 0,
    keep_trained: Annotated[
        bool, typer.Option("--keep-trained", help="Score also cells that the model was trained on.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Network calls of a generated cell.")] = 16,
    guidance: Annotated[float, typer.Option(help="Weight of the labels of generated cells.")] = 1.0,
    depth: Annotated[str | None, typer.Option(help="Molecules of a generated cell, or free (default: drawn).")] = None,
    scvi: Annotated[bool, typer.Option(help="With --task generate: train scVI for a row, if it is installed.")] = True,
    trust: Trust = None,
) -> None:
    """Hide entries of test cells, let the model and the baselines fill them, print the table.

    With --task generate: generate cells of each value of a label and compare them with held-out cells.
    """
    import distdiff

    report = distdiff.evaluate(
        model, data, task=task, layer=layer, rate=rate, protocol=protocol, draws=draws, cells=cells,  # type: ignore[arg-type]
        cell_type=cell_type, repaint_steps=repaint_steps, keep_trained=keep_trained, steps=steps, guidance=guidance,
        depth=_depth(depth), scvi=scvi, seed=seed, trust=tuple(trust or ()), progress=_shown(context),
    )  # fmt: skip
    typer.echo(report.to_text())
    if out is not None:
        report.write(out)
        typer.echo(f"written to {out}")


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="Raw counts: h5ad, AnnData zarr, 10x.")],
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X).")] = None,
    groupby: Annotated[str | None, typer.Option(help="obs column with groups (default: Leiden clusters).")] = None,
    cells: Annotated[int, typer.Option(help="Most cells to use, chosen at random.")] = 3000,
    genes: Annotated[int, typer.Option(help="Most genes to use, by variance over mean.")] = 2000,
    model: Annotated[bool, typer.Option("--model", help="Train a model for a minute or so too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Should these counts be denoised at all, and how? Minutes, no model needed."""
    import distdiff

    found = distdiff.check(data, layer=layer, groupby=groupby, cells=cells, genes=genes, model=model, seed=seed)
    typer.echo(found.to_text())
    if out is not None:
        typer.echo(f"written to {found.write(out, overwrite=overwrite)}")


@app.command()
def certify(
    context: typer.Context,
    model: ModelName,
    data: Annotated[Path, typer.Option(help="Raw counts: h5ad, AnnData zarr, 10x.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the page, the numbers and the text.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X).")] = None,
    groupby: Annotated[
        str | None, typer.Option(help="obs column with cell types (default: the model's label, or Leiden clusters).")
    ] = None,
    sample: Annotated[str | None, typer.Option(help="obs column with batches or donors.")] = None,
    cells: Annotated[int, typer.Option(help="Most cells to score, chosen at random.")] = 3000,
    genes: Annotated[int, typer.Option(help="Most genes to score, by variance over mean.")] = 2000,
    draws: Annotated[int, typer.Option(help="Draws of each hidden count, at least 2.")] = 10,
    keep_trained: Annotated[
        bool, typer.Option("--keep-trained", help="Score also cells that the model was trained on.")
    ] = False,
    track: Annotated[
        bool, typer.Option("--track", help="Log it to MLflow, and link it from the model's card.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of masks, draws and splits.")] = 0,
    trust: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """Can this model's answers on these cells be believed? Each test passes, fails, or is to be looked at."""
    import distdiff

    found = distdiff.certify(
        model, data, layer=layer, groupby=groupby, sample=sample, cells=cells, genes=genes, draws=draws,
        keep_trained=keep_trained, track=track, seed=seed, trust=tuple(trust or ()), progress=_shown(context),
    )  # fmt: skip
    typer.echo(found.to_text())
    if track:
        typer.echo(found.about["tracked"])
    if out is not None:
        typer.echo(f"written to {found.write(out, overwrite=overwrite)}")


@app.command()
def panel(
    context: typer.Context,
    model: ModelName,
    data: Annotated[str, typer.Option(help="The query (h5ad, AnnData zarr, 10x, store), or a .txt file of genes.")],
    atlas: Annotated[str, typer.Option(help="The store that the model was trained on, or other counts of all genes.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the table, names of reliable genes, a figure.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the query with raw counts (default: X).")] = None,
    genes: Annotated[str | None, typer.Option(help="Genes to tell of (default: all that the query lacks).")] = None,
    groupby: Annotated[str | None, typer.Option(help="Label of the atlas: also correlation within its groups.")] = None,
    cells: Annotated[int, typer.Option(help="Most cells of the atlas, chosen at random.")] = 2000,
    draws: Annotated[int, typer.Option(help="Draws of each hidden count, at least 2.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of cells, thinning, draws and resamples.")] = 0,
    trust: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """Which genes can a panel be completed by? Expected reliability of each, before it is used."""
    import distdiff

    found = distdiff.panel(
        model, data, atlas, layer=layer, genes=_genes(genes), groupby=groupby, cells=cells, draws=draws, seed=seed,
        trust=tuple(trust or ()), progress=_shown(context),
    )  # fmt: skip
    typer.echo(found.to_text())
    if out is not None:
        typer.echo(f"written to {found.write(out, overwrite=overwrite)}")


@app.command()
def de(
    data: Annotated[Path, typer.Option(help="h5ad with raw counts, and layers of distdiff if there are any.")],
    groupby: Annotated[str, typer.Option(help="obs column with the groups.")],
    out: Annotated[Path, typer.Option(help="Table to write, .csv or .tsv; or .h5ad, the input with uns.")],
    groups: Annotated[str, typer.Option(help="Those to test, comma-separated.")] = "all",
    reference: Annotated[str, typer.Option(help="Group to compare with; rest: all other cells.")] = "rest",
    sample: Annotated[str | None, typer.Option(help="obs column with the donor: donors are the replicates.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X).")] = None,
    depth: Annotated[str | None, typer.Option(help="obs column with a cell's depth (default: its molecules).")] = None,
    allow_invalid: Annotated[
        bool, typer.Option("--allow-invalid", help="Test what a model made; the reason against it is written too.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Differential expression on raw counts: a negative binomial score test, or donors as replicates."""
    from distdiff import differential

    tested = differential.of_file(
        data, out, groupby=groupby, groups=groups if groups == "all" else _words(groups), reference=reference,
        sample=sample, layer=layer, depth=depth, allow_invalid=allow_invalid, overwrite=overwrite,
    )  # fmt: skip
    typer.echo(f"{out}: {tested}")


@app.command()
def benchmark(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of a grid, or one of configs/eval by name: light.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example cells=500.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Store, in place of the file's (may be repeated).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for cells, tables, figures.")] = Path("benchmark"),
    workers: Annotated[int | None, typer.Option(help="Dask processes to start (default: work here).")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, tcp://...")] = None,
) -> None:
    """Score rows on data sets under protocols, and print the tables; the same command goes on with a grid."""
    from distdiff import grid

    result = grid.run(
        config, out, data=tuple(data or ()), overrides=tuple(overrides or ()), workers=workers, scheduler=scheduler,
        progress=_shown(context),
    )  # fmt: skip
    typer.echo(result.markdown)
    typer.echo(f"{out}: results.parquet, table.md, figures")


@app.command()
def quickstart(
    data: Annotated[Path | None, typer.Option(help="Your own h5ad with raw counts.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = Path("distdiff-quickstart"),
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X).")] = None,
    cell_type: Annotated[str | None, typer.Option(help="obs column with cell types.")] = None,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Stop once the store is built.")] = False,
) -> None:
    """Do the whole job on real counts in minutes: shard, train, impute, evaluate, log."""
    from distdiff import quickstart as quick

    quick.run(data, out, layer=layer, cell_type=cell_type, prepare_only=prepare_only)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


HOME = re.compile(r"^(--[\w-]+=|)~(?=/|$)")
"""``--out=~/x``: shells leave it to us."""
INTERRUPTED = "distdiff: interrupted; nothing half-written was published, and the same command goes on with a long job"


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake is one sentence and exit code 2.

    DISTDIFF_DEBUG=1 shows the traceback; so does one process of several, where the first to fail explains the others.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = [HOME.sub(lambda at: f"{at[1]}{Path.home()}", word) for word in given]
    flags = {**console.flags_of(app, ["shard"]), **console.flags_of(app, words)}  # (advice may be to shard anew)
    try:
        with console.warnings_in_flags(flags):
            app(words, obj=words)
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        if os.environ.get("DISTDIFF_DEBUG") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        typer.echo(f"distdiff: error: {console.in_flags(_lines(error), flags)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo(INTERRUPTED, err=True)
        sys.exit(130)
    except SystemExit as leaving:  # typer makes a silent one of Ctrl-C
        if isinstance(getattr(leaving.__context__, "__cause__", None), KeyboardInterrupt):
            typer.echo(INTERRUPTED, err=True)
        raise


def _lines(error: Exception) -> str:
    """What an error says, its list items on lines of their own, without other line ends and control characters."""
    items = str(error).split("\n- ")
    return "\n- ".join("".join(c if c.isprintable() else " " for c in " ".join(item.split())) for item in items)


if __name__ == "__main__":
    main()
