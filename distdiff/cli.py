"""The command line: shard, store, train, impute, evaluate, quickstart."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="distdiff", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Diffusion models on single-cell counts: impute, denoise, deepen, complete and generate cells.",
)  # fmt: skip

stores = typer.Typer(no_args_is_help=True, help="Look at a store, check it, turn it back into AnnData.")
app.add_typer(stores, name="store")

server = typer.Typer(no_args_is_help=True, help="What MLflow was told, and was not.")
app.add_typer(server, name="mlflow")

Config = Annotated[Path, typer.Option(help="YAML file of the experiment.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


@app.command()
def shard(
    inputs: Annotated[list[Path], typer.Argument(help="h5ad, AnnData zarr, 10x h5 or mtx.")],
    out: Annotated[Path, typer.Option(help="Store to write, for example atlas.zarr.")],
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X; 'raw' for .raw.X).")] = None,
    genes: Annotated[str, typer.Option(help="all, hvg:N, cv:N, seurat_v3:N, or a file with one gene a line.")] = "all",
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
    measurements: Annotated[bool, typer.Option("--measurements", help="Take any numbers, as float32.")] = False,
    codec: Annotated[str, typer.Option(help="local (lz4, fastest) or compact (zstd, smallest).")] = "local",
    workers: Annotated[int | None, typer.Option(help="Dask processes (0: none, work in this process).")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, tcp://...")] = None,
    seed: Annotated[int, typer.Option(help="Seed of split and order.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Build a sharded zarr store from count matrices; the same command goes on with a build that was stopped."""
    from distdiff.data.shard import shard as build

    try:
        first, second, third = (float(part) for part in split.split(","))
    except ValueError:
        raise ValueError(f"--split {split!r} must be three numbers such as 0.8,0.1,0.1") from None
    manifest = build(
        inputs, out, layer=layer, genes=genes, panel=panel, join=join, labels=_words(labels),
        split=(first, second, third), split_by=split_by, strata=strata, shuffle=shuffle, min_counts=min_counts,
        min_genes=min_genes, min_cells=min_cells, max_mito=max_mito, counts=not measurements, codec=codec,
        workers=workers, scheduler=scheduler, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    typer.echo(
        f"{out}: {manifest.n_cells} cells x {len(manifest.genes)} genes, fingerprint {manifest.fingerprint[:12]}"
    )


@stores.command()
def info(path: Annotated[str, typer.Argument(help="Folder or URL of a store.")]) -> None:
    """What a store holds."""
    from distdiff.data.store import CountStore

    typer.echo(CountStore.open(path).describe())


@stores.command()
def verify(path: Annotated[str, typer.Argument(help="Folder or URL of a store.")]) -> None:
    """Read every count once and compare it with what was built."""
    from distdiff.data.store import CountStore

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
    from distdiff.data.export import export as write
    from distdiff.data.store import CountStore

    store = CountStore.open(path)
    write(store.panel() if panel else store, out, overwrite=overwrite)
    typer.echo(f"{out}: {store.n_cells} cells, fingerprint {store.manifest.fingerprint[:12]}")


@server.command()
def sync(folder: Annotated[Path, typer.Argument(help="train.out of a run, or a folder of many.")]) -> None:
    """Send what runs kept while their MLflow server was away; metrics, files, the model and its registration."""
    from distdiff import experiment, tracking

    lines = tracking.sync(folder, judge=experiment.compare)
    typer.echo("\n".join(lines) or f"{folder}: all was sent before")


@app.command()
def train(
    config: Config,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example optim.lr=1e-4")] = None,
) -> None:
    """Train a model (the same function as ``accelerate launch launch/train.py``).

    Asked to stop (SIGTERM, SIGUSR1, the time limit) it saves and leaves with status 75; the same command goes on.
    """
    from distdiff import config as configs
    from distdiff import experiment
    from distdiff.train.stop import Stopped

    resolved = configs.load(config, overrides or [])
    try:
        outcome = experiment.train(resolved)
    except Stopped as stopped:
        typer.echo(f"distdiff: {stopped}", err=True)
        raise typer.Exit(stopped.code) from None
    if outcome.report is not None:
        typer.echo(outcome.report.to_text())
    if outcome.registered or not resolved.tracking.enabled:
        typer.echo(f"model: {outcome.model}" + (f"; registered: {outcome.registered}" if outcome.registered else ""))


@app.command()
def impute(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, or a model folder.")],
    data: Annotated[Path, typer.Option(help="h5ad, AnnData zarr, or a distdiff store.")],
    out: Annotated[Path, typer.Option(help="Output, .h5ad or .zarr.")],
    layer: Annotated[str | None, typer.Option(help="Layer with raw counts (default: X).")] = None,
    mask: Annotated[str | None, typer.Option(help="Targets: a layer, or a .npz/.npy file.")] = None,
    sites: Annotated[str | None, typer.Option(help="'dropout': zeros that scIDPMs' Algorithm 1 suspects.")] = None,
    groups: Annotated[str | None, typer.Option(help="obs column for --sites, or 'leiden'.")] = None,
    draws: Annotated[int, typer.Option(help="Draws from the predictive law to write.")] = 1,
    mean_only: Annotated[bool, typer.Option("--mean-only", help="Only the posterior mean (one call).")] = False,
    steps: Annotated[int, typer.Option(help="Network calls of a draw.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Cells of a network call.")] = 256,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Do not condition on obs columns.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Impute a file; observed counts come back unchanged."""
    import distdiff
    from distdiff.batch import impute_file

    filled = impute_file(
        distdiff.load(model), data, out, layer=layer, mask=mask, sites=sites, groups=groups, draws=draws,
        mean_only=mean_only, steps=steps, seed=seed, batch_size=batch_size, use_labels=not no_labels,
        overwrite=overwrite,
    )  # fmt: skip
    typer.echo(
        f"{out}: {filled.targets:,} targets in {filled.cells} cells x {filled.genes} genes, "
        f"{filled.molecules_added:,.0f} molecules expected there, {filled.seconds:.1f} s"
    )
    notes = {
        "cells without evidence left as they were": filled.cells_without_evidence,
        "genes unknown to the model left as they were": filled.genes_unknown_to_model,
        "genes of the model absent from the input": filled.genes_absent_from_input,
        "targets in unknown genes not filled": filled.targets_of_unknown_genes,
    }
    for text, number in notes.items():
        if number:
            typer.echo(f"  {number} {text}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, or a model folder.")],
    data: Annotated[Path, typer.Option(help="The distdiff store; its test cells are scored.")],
    out: Annotated[Path | None, typer.Option(help="Folder for table and figures.")] = None,
    rate: Annotated[float, typer.Option(help="Share of entries to hide.")] = 0.5,
    protocol: Annotated[str, typer.Option(help="mcar (zeros scored), or paper.")] = "mcar",
    draws: Annotated[int, typer.Option(help="Draws of an ensemble, at least 2.")] = 5,
    cells: Annotated[int, typer.Option(help="Most test cells to score.")] = 2000,
    cell_type: Annotated[str | None, typer.Option(help="Label of the cell-type rows.")] = None,
    repaint_steps: Annotated[int, typer.Option(help="Steps of the RePaint row (0: none).")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of masks and draws.")] = 0,
) -> None:
    """Hide entries of test cells, let the model and the baselines fill them, print the table."""
    import distdiff
    from distdiff import experiment
    from distdiff.config import Evaluation

    settings = Evaluation(
        rate=rate, protocol=protocol, draws=draws, cells=cells, cell_type=cell_type, repaint_steps=repaint_steps  # type: ignore[arg-type]
    )  # fmt: skip
    report = experiment.evaluate_model(distdiff.load(model), distdiff.CountStore.open(data), settings, seed=seed)
    typer.echo(report.to_text())
    if out is not None:
        report.write(out)
        typer.echo(f"written to {out}")


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake is one sentence and exit code 2.

    DISTDIFF_DEBUG=1 shows the traceback; so does one process of several, where the first to fail explains the others.
    """
    try:
        app(arguments)
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        if os.environ.get("DISTDIFF_DEBUG") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        typer.echo(f"distdiff: error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("distdiff: interrupted; nothing half-written was left", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
