"""Data sets that a grid makes in its own folder, seeded: simulated sets, the toy, digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distdiff import files
from distdiff.data import images, toy
from distdiff.data.ingest.shard import shard
from distdiff.data.store.store import CountStore

if TYPE_CHECKING:
    from anndata import AnnData

TOY_CELLS = 6_000
"""Samples of the toy, of which a fifth are test cells; the paper's own has 20,000 for training."""

SPLITS = {"toy": (0.7, 0.1, 0.2), "digits": (0.6, 0.05, 0.35)}
"""Training, validation and test cells."""


def opened(name: str, seed: int, folder: Path) -> CountStore:
    """The store of ``toy`` or ``digits``; it is made first where it is not there.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.grid.made import opened
    >>> store = opened("digits", 0, Path("grid"))
    >>> len(store.rows("test")), len(store.genes)
    (629, 64)
    """
    if name == "digits":
        out, genes = folder / f"digits-{seed}.zarr", images.pixels(1, 8, 8)
        return stored(images.digits, out, labels=("label",), genes=genes, split=SPLITS[name], seed=seed)
    out = folder / f"toy-{seed}.zarr"
    return stored(lambda: toy.samples(TOY_CELLS, seed), out, split=SPLITS[name], seed=seed)


def stored(
    make: Callable[[], AnnData], out: Path, *, split: tuple[float, float, float], seed: int,
    labels: tuple[str, ...] = (), genes: str | list[str] = "all",
) -> CountStore:  # fmt: skip
    """The store ``out`` of what ``make`` returns; made once, whole or not at all."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        source = out.with_suffix(".h5ad")
        if not source.exists():
            data = make()
            with files.whole(source) as temporary:
                data.write_h5ad(temporary)
        shard([source], out, labels=labels, genes=genes, split=split, seed=seed, workers=0, progress=False)
        source.unlink()
    return CountStore.open(str(out))
