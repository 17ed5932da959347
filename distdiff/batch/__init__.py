"""Tasks on files of any size: imputation, completion, denoising, deepening and generation.

``rows`` reads the input, ``task`` and ``tasks`` compute some rows, ``layout`` encodes values, ``output`` writes files.
``plan`` is decided once a job; ``compute`` makes shards of the output, ``finish`` the result; ``frame`` writes obs, var
and what the input holds beside. ``job`` runs all this under one lock (``workplace``); ``local`` starts it in one
process, ``ranks`` in those of ``accelerate launch``, ``cluster`` on a dask cluster. ``verify`` compares a result with
its checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distdiff.batch import local
from distdiff.batch.cluster import on_cluster
from distdiff.batch.frame import write_anndata
from distdiff.batch.summary import Summary
from distdiff.batch.tasks import make_task
from distdiff.batch.verify import verify
from distdiff.data.store.export import named
from distdiff.model import Model

__all__ = ["Summary", "generate_file", "impute_file", "make_task", "on_cluster", "run", "write_anndata"]


def impute_file(
    model: Model, data: str | Path, out: str | Path, *, layer: str | None = None, mask: str | None = None,
    overwrite: bool = False, progress: bool = True, **options: Any,
) -> Summary:  # fmt: skip
    """Impute an h5ad file, an AnnData zarr folder or a distdiff store into ``out`` (``.h5ad`` or ``.zarr``).

    ``out`` appears only once it is whole. It holds what the input holds, bit-equal, plus layers: ``imputed_mean``,
    ``imputed`` and further draws, ``imputed_mask`` (what was imputed); ``obs['distdiff_nats']``, an out-of-distribution
    score; and ``uns['distdiff']``. Memory does not grow with the number of cells. The same call continues a job that
    was stopped. Under ``accelerate launch`` all processes must make the call, and share the work.

    Parameters
    ----------
    mask
        A layer of the input, or a ``.npz``/``.npy`` file.
    **options
        Of :class:`~distdiff.batch.tasks.Impute`, of :func:`~distdiff.batch.local.run`, and of
        :meth:`Model.plan_imputation <distdiff.model.Model.plan_imputation>`.

    Raises
    ------
    FileExistsError
        ``out`` exists, or was begun, with another job, and ``overwrite`` is false; another command is writing it.
    OSError
        The disk is full, or cannot hold the result.
    ValueError
        A bad suffix of ``out``, ``out`` is the input, or what the job refuses.
    """
    return run("impute", model, data, out, layer=layer, mask=mask, overwrite=overwrite, progress=progress, **options)


def generate_file(
    model: Model, n: int, out: str | Path, *, obs: Mapping[str, str | Sequence[str]] | None = None,
    overwrite: bool = False, progress: bool = True, **options: Any,
) -> Summary:  # fmt: skip
    """Generate ``n`` cells into a file, as :meth:`Model.generate <distdiff.model.Model.generate>` does in memory."""
    return run("generate", model, None, out, n=n, obs=obs, overwrite=overwrite, progress=progress, **options)


def run(
    kind: str, model: Model, data: str | Path | None, out: str | Path, *, overwrite: bool = False,
    progress: bool = True, batch_size: int | None = None, shard_cells: int | None = None,
    precision: str = "auto", command: str = "", notify: Callable[[str], None] = lambda text: None, **options: Any,
) -> Summary:  # fmt: skip
    """Do ``impute``, ``complete``, ``denoise``, ``deepen`` or ``generate`` on files; see :func:`impute_file`.

    Parameters
    ----------
    notify
        Receives messages: what the result will take, what was removed.
    """
    out = named(out)
    if kind in ("impute", "complete"):
        options["progress"] = progress
    task = make_task(kind, model, data, out, **options)
    return local.run(
        task, out, data="" if data is None else Path(data).name, overwrite=overwrite, progress=progress,
        batch_size=batch_size, shard_cells=shard_cells, precision=precision, command=command, notify=notify,
    )  # fmt: skip


def check(kind: str, model: Model | None, data: str | Path | None, out: str | Path, *, repair: bool = False,
          progress: bool = True, **options: Any) -> str:  # fmt: skip
    """Compare a result with its checksums, and repair it on request: :func:`~distdiff.batch.verify.verify`."""
    task = None if model is None or not repair else make_task(kind, model, data, Path(out), **options)
    return verify(out, repair=repair, task=task, data="" if data is None else Path(data).name, progress=progress)
