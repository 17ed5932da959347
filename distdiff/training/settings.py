"""What a training run is: its settings, and the law, network and cells that they are for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from distdiff.data.feed.loader import Loading
from distdiff.data.store.store import CountStore
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.counts import Counts
from distdiff.process.survival import Survival
from distdiff.training.optim import Optim

MOST = 10**15
"""Cells of a run, at most: its steps are counted in 64 bits, and in the floating-point numbers of the schedule."""


AUTO = ("cells", "batch", "eval_cells")
"""Numbers of ``train`` that may read ``auto`` in YAML; they are 0 here until they are settled."""

PASSES, SHORTEST, LONGEST = 180, 50_000, 1_000_000
"""A run of automatic length sees every training cell so often, within these bounds in cells."""

VALIDATIONS = 20
"""Of a run whose ``eval_cells`` is automatic."""


def length(cells: int) -> int:
    """Cells that a run on so many training cells sees in all, where none are asked for.

    Examples
    --------
    >>> from distdiff.training.settings import length
    >>> [length(cells) for cells in (200, 2_000, 50_000)]
    [50000, 360000, 1000000]
    """
    return min(max(PASSES * cells, SHORTEST), LONGEST)


@dataclass(frozen=True)
class Training:
    """What a run does, in cells.

    Parameters
    ----------
    out
        Folder of the run: checkpoints, the best model.
    cells
        Training cells to see in all (with repeats); ``auto`` in YAML, 0 here: :func:`length` of their number.
    batch
        Cells of a step over all processes; ``auto`` in YAML, 0 here: found by a search (see
        :mod:`~distdiff.training.fit`), and part of the config from then on.
    grain
        Cells that share a noise generator; it divides each process's share of the batch, so that any number of
        processes sees the same noise.
    accumulate
        Passes that a process's share of a step is cut into, to need less memory; the result is the same.
    eval_cells
        Validate each time this many cells have been seen; ``auto`` in YAML, 0 here: 20 times in all.
    checkpoint_cells
        Save a checkpoint each time this many cells have been seen.
    checkpoint_minutes
        Save also when this many minutes have passed since the last save; training waits for a copy alone.
    keep
        Newest checkpoints that stay, besides the first one since the best validation.
    minutes
        Save and leave after so many minutes of training (0: a SLURM job leaves before its end, others never).
    patience
        Validations in a row, worse than the best by more than chance, after which training stops; it and ``cells`` may
        change when a run is continued, and the learning rate then follows the new length.
    label_dropout
        Share of cells trained without their labels (guidance needs some; CountsDiff, section 3.4); of cells with
        evidence and targets, as imputation has them, at least .6, for it goes without labels by default. 0: of none.
    precision
        ``auto``: bf16 where the device is a GPU that has it, else float32; ``fp16`` scales its losses; ``tf32`` is
        float32 whose matrix products a GPU may round to 10 bits.
    compile
        ``torch.compile`` the network and the loss, where it can be (see :mod:`~distdiff.training.compiled`). Takes half
        a minute; then a transformer of width 512 (2,000 genes) trained 1.5 times faster so on an H100.
    graph
        Replay the step as one CUDA graph (see :mod:`~distdiff.training.graphed`): one GPU, networks of one shape.
        ``auto``: for ``mlp`` alone, which trained 2.9 times faster so on an H100; attention keeps a GPU busy anyway.
    noise
        ``streams``: torch's generators, one for ``grain`` cells. ``rows``: numbers by the cell's place in the run, the
        same for any ``grain``; on a GPU by one kernel a draw instead of one for ``grain`` cells (needs triton).
    trace
        Write a profiler's trace of a few steps of the main process to ``out`` (see :mod:`~distdiff.training.trace`).
    start
        A trained model (folder, ``models:/`` address) whose weights to start from; those of genes follow their names.
    resume
        ``auto`` continues the newest checkpoint in ``out``; ``never``; or the path of one, where ``optim`` may differ.
    seed
        Seed of the weights, the order of cells and the noise.
    manifest
        Filter of the training cells in the model's folder, by which it tells whether it saw a cell: ``cells``;
        ``salted``: only for those who have DISTDIFF_SALT; ``none`` (see :mod:`~distdiff.seen`).
    blend
        Impute by one call with a blend of the network, a PCA regression and a Poisson factorisation, where that is
        better on validation cells (:mod:`~distdiff.imputers.blend`).
    """

    out: str = "runs/distdiff"
    cells: int = 0
    batch: int = 128
    grain: int = 32
    accumulate: int = 1
    eval_cells: int = 0
    checkpoint_cells: int = 20_000
    checkpoint_minutes: float = 10.0
    keep: int = 2
    minutes: float = 0.0
    patience: int = 3
    label_dropout: float = 0.2
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    compile: bool = False
    graph: bool | Literal["auto"] = "auto"
    noise: Literal["streams", "rows"] = "streams"
    trace: bool = False
    start: str = ""
    resume: str = "auto"
    seed: int = 0
    manifest: Literal["cells", "salted", "none"] = "cells"
    blend: bool = True

    def __post_init__(self) -> None:
        for name in AUTO:
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be a number of cells or auto, got {getattr(self, name)}")
        for name in ("grain", "accumulate", "checkpoint_cells", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not self.out or not self.resume:
            raise ValueError("train.out must be a folder, and train.resume auto, never or a checkpoint; got nothing")
        if self.cells > MOST or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"train.cells must be at most {MOST:,} and train.seed in [0, 2^63), got {self.cells} and {self.seed}"
            )
        if not (self.checkpoint_minutes > 0 and self.minutes >= 0):
            raise ValueError(
                f"train.checkpoint_minutes must be above 0 and train.minutes not below, got {self.checkpoint_minutes} "
                f"and {self.minutes}"
            )
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"train.label_dropout must lie in [0, 1], got {self.label_dropout}")

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run.

        Raises
        ------
        ValueError
            ``cells`` is not settled.
        """
        if not self.cells:
            raise ValueError("train.cells=auto must be settled before training (distdiff.training.fit.settled)")
        return math.ceil(self.cells / self.batch)

    def crosses(self, steps: int, every: int) -> bool:
        """Whether the last of ``steps`` steps took the cells seen over a multiple of ``every``."""
        return steps * self.batch // every > (steps - 1) * self.batch // every

    def share(self, processes: int) -> int:
        """Cells of a step on each of so many processes.

        Raises
        ------
        ValueError
            ``batch`` is not settled, or cannot be shared out in whole grains.
        """
        if not self.batch:
            raise ValueError("train.batch=auto must be settled before training (distdiff.training.fit.settled)")
        if self.batch % (processes * self.accumulate * self.grain):
            passes = f" in {self.accumulate} passes (train.accumulate)" if self.accumulate > 1 else ""
            raise ValueError(
                f"train.batch={self.batch} cannot be shared by {processes} processes{passes} in groups of train.grain="
                f"{self.grain} cells; use a multiple of {processes * self.accumulate * self.grain}, or a smaller grain"
            )
        return self.batch // processes


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run is made of.

    Parameters
    ----------
    store
        Cells to train on (split ``train``) and to validate on (``val``).
    process, denoiser
        The law and the network; training changes the network's weights.
    survival
        Mixture of survival probabilities to train under.
    optim, settings, loading
        How weights move, how long the run is, how cells come in.
    labels
        Covariates that the network is conditioned on.
    """

    store: CountStore
    process: Process
    denoiser: Denoiser
    survival: Survival
    optim: Optim
    settings: Training
    loading: Loading = field(default_factory=Loading)
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Decide what is ``auto`` of the mixture and of the order of cells."""
        law = self.process
        cells = isinstance(law, Counts) and law.molecules and law.weight == "none" and self.denoiser.depths
        object.__setattr__(self, "survival", self.survival.settled(near_zero=bool(self.labels) and cells))
        object.__setattr__(self, "loading", self.loading.settled(self.store, self.labels))
