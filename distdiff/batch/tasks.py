"""What a job does to its rows: impute (and complete), denoise, deepen, generate. Each is read, computed, kept."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from distdiff import files
from distdiff.batch.output import Field, Values
from distdiff.batch.rows import FileRows, NewRows
from distdiff.component import nearest
from distdiff.data.ingest.source import Source
from distdiff.data.masks import load_mask
from distdiff.imputers import by_row
from distdiff.model import Model
from distdiff.process.schedule import levels
from distdiff.sampling import predictor, sample
from distdiff.tasks import Block, Reader, check_labels
from distdiff.tasks.deepen import deepen
from distdiff.tasks.denoise import denoise
from distdiff.tasks.frame import warn_left_out
from distdiff.tasks.generate import check_guidance, label_codes
from distdiff.tasks.impute import FillCounts, MaskLayer, check_names, is_imputation_layer
from distdiff.tasks.likelihood import nats
from distdiff.types import Cells, Condition

NATS = "obs/distdiff_nats"

LAYERS = ("mean", "draws", "mask", "sd", "ood")
"""What an imputation can write, and quantiles (``q5``)."""

DTYPES = ("float32", "float16", "int32", "int16", "uint16")


class Task(ABC):
    """One task on the rows of one input.

    Attributes
    ----------
    rows
        The input (see :mod:`~distdiff.batch.rows`).
    genes
        Genes of the result.
    inherits
        Whether the result holds whatever else the input holds, its X untouched; else X is a field.
    fields
        What is written.
    """

    name: str
    inherits = False
    model: Model
    rows: Any
    genes: tuple[str, ...]
    added: tuple[str, ...] = ()
    fields: list[Field]
    device: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs of this task to give the same result; plain JSON."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Any:
        """Rows of the input, on the CPU; called in a thread of its own."""

    @abstractmethod
    def compute(self, block: Any) -> tuple[Values, Callable[[], FillCounts]]:
        """The fields of a block that was read, still on the device, and what tells what was done (and waits for it)."""

    def provenance(self) -> dict[str, Any]:
        """What stands in ``uns['distdiff']``, beside what was done."""
        return self.model.provenance(task=self.name)

    def about(self) -> dict[str, Any]:
        """What else stands there whatever the task is."""
        return {}

    def stale(self, path: str) -> bool:
        """Whether something of the input is of an earlier run, and this one takes its place or not at all."""
        return path == NATS

    def labels(self, start: int, stop: int) -> Values:
        """Names and labels of some rows, where they are not inherited."""
        if self.rows.frame is not None:
            return {}
        codes = {f"obs/{k}/codes": self.rows.codes(k, start, stop) for k in self.rows.labels}
        return {"obs/_index": self.rows.names(start, stop), **codes}

    def label_fields(self) -> list[Field]:
        """The fields of :meth:`labels`."""
        if self.rows.frame is not None:
            return []
        wide = {k: "int16" if len(v) < 2**15 else "int32" for k, v in self.rows.labels.items()}
        return [Field("obs/_index", "str"), *(Field(f"obs/{k}/codes", dtype) for k, dtype in wide.items())]


class OnCells(Task):
    """A task on cells that were measured.

    Parameters
    ----------
    model, rows
        The model and the input.
    keep
        Genes of the result that are to be written; ``None``: all.
    ood
        Levels of the likelihood bound that stands in ``obs['distdiff_nats']``, each a network call; 0: none.
    """

    reader: Reader
    whole = False

    def __init__(
        self, model: Model, rows: Any, reader: Reader, genes: tuple[str, ...], *, keep: Sequence[str] | None, ood: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.reader, self.ood, self.seed = model, rows, reader, ood, seed
        self.device = reader.device
        check_labels(reader, model.required_labels)
        self.at: np.ndarray | None = None
        self.genes = genes
        if keep is not None:
            check_names(keep)
        if keep is not None and tuple(keep) != genes:
            place = {gene: i for i, gene in enumerate(genes)}
            if unknown := [g for g in keep if g not in place]:
                raise ValueError(
                    f"--genes: {unknown[0]!r} is no gene of the result{nearest(unknown[0], genes)}; these are the "
                    "input's, and those of the model that it lacks where they are imputed"
                )
            self.genes, self.at = tuple(keep), np.array([place[g] for g in keep], dtype=np.int64)
        self.inherits = rows.frame is not None and rows.whole(self.genes)
        self.left = [] if self.inherits or rows.frame is None else rows.left_out()
        warn_left_out(self.left, rows.where)
        self.fields = [*self.label_fields(), *([] if self.inherits else [Field("X", "float32", len(self.genes), True)])]
        if ood:
            self.fields.append(Field(NATS, "float32"))

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {
            "genes": hashlib.sha256("\n".join(self.genes).encode()).hexdigest(), "labels": sorted(self.reader.labels),
            "ood": self.ood, "seed": self.seed,
        }  # fmt: skip

    def read(self, start: int, stop: int) -> Block:
        """See :class:`Task`."""
        return self._fitting(self.reader.block(start, stop))

    def _fitting(self, block: Block) -> Block:
        """Refuse decimals of genes that the model does not know where they would stand in a layer of whole numbers."""
        if self.reader.unknown and self.whole:
            given = block.given[:, torch.from_numpy(~self.reader.known)]
            if bool((given != given.round()).any()):
                at = np.flatnonzero(~self.reader.known)[int((given != given.round()).any(0).nonzero()[0])]
                raise ValueError(
                    f"{self.rows.where}: {self.rows.genes[at]!r}, which the model does not know, holds decimals, and "
                    "draws are layers of whole numbers: say in var['feature_types'] what is no Gene Expression, leave "
                    "those columns out, or write no draws (--layers mean)"
                )
        return block

    def drawn(self, path: str, width: int, sparse: bool | None) -> Field:
        """A layer of draws: whole numbers of 32 bits, floating point where features that are no genes stand beside."""
        self.whole = getattr(self.rows, "expressed", None) is None
        return Field(path, "int32" if self.whole else "float32", width, sparse)

    def compute(self, block: Block) -> tuple[Values, Callable[[], FillCounts]]:
        """See :class:`Task`."""
        block = block.to(self.device)
        layers, filled = self.answer(block)
        found: Values = {k: self._kept(v) for k, v in layers.items()}
        if not self.inherits:
            found["X"] = self._counts(block.counts)
        if self.ood:
            found[NATS] = nats(
                self.model.process, self.model.denoiser, block.cells, block.observed, levels=self.ood, seed=self.seed
            )
        return found, filled

    @abstractmethod
    def answer(self, block: Block) -> tuple[dict[str, torch.Tensor], Callable[[], FillCounts]]:
        """The layers ``layers/NAME`` of a block, all genes of the result."""

    def about(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {"left_out": self.left} if self.left else {}

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            return values
        return values[:, torch.from_numpy(self.at).to(values.device, non_blocking=True)]

    def _counts(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """The observed counts in the genes of the result, ascending."""
        wide = sp.csr_matrix((counts.data, counts.indices, counts.indptr), (counts.shape[0], self._width))
        return wide if self.at is None else wide[:, self.at].sorted_indices()

    @property
    def _width(self) -> int:
        return len(self.rows.genes) + len(self.added)


class Impute(OnCells):
    """Imputation (docs/MATHS.md 5.2, 5.3), and completion of a panel by genes that it lacks (docs/MATHS.md 5.6).

    Parameters
    ----------
    layers
        Of :data:`LAYERS`, and quantiles such as ``q5``.
    dtype
        Of the mean and of what tells its uncertainty; draws are whole numbers of 32 bits.
    sparse
        Whether layers are CSR; ``None``: where that takes less room.
    append
        Genes that the input lacks and that are to be appended (``complete``).
    mask, sites, groups, draws, **options
        Of :meth:`Model.plan_imputation <distdiff.model.Model.plan_imputation>`; a mask is named, not given.
    """

    name = "impute"

    def __init__(
        self, model: Model, rows: Any, *, data: str | Path, layers: Sequence[str] = ("mean", "draws", "mask", "ood"),
        dtype: str = "float32", sparse: bool | None = None, mask: str | None = None, draws: int = 1,
        mean_only: bool = False, ood: int = 4, seed: int = 0, keep: Sequence[str] | None = None,
        append: Sequence[str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        for named in (keep, append):
            if named is not None:
                check_names(named)
        layers = tuple(dict.fromkeys(layers))
        self.mean_only = mean_only or "draws" not in layers
        also = [name for name in layers if name not in LAYERS or name == "sd"]
        if unknown := [n for n in also if n != "sd" and not n.startswith("q")]:
            raise ValueError(f"unknown layer {unknown[0]!r}{nearest(unknown[0], LAYERS)}; or a quantile such as q5")
        if not {"mean", "draws"} & set(layers):
            raise ValueError(f"layers {','.join(layers)}: mean or draws must be among them")
        if also:
            if options.get("method", "conditional") != "conditional":
                raise ValueError(f"layer {also[0]!r} needs method 'conditional', which knows its predictive law")
            options["statistics"] = also
        asked = None if keep is None or mask is not None or options.get("sites") is not None else keep
        if append is None and asked is not None:  # of a panel's absent genes only those that are written
            have = set(rows.genes)
            append = [g for g in asked if g not in have] or None
        told = {k: v for k, v in options.items() if k not in ("batch_size", "device", "graph")}
        self.options = {**told, "mask": _named(mask), "draws": draws, "layers": list(layers), "dtype": dtype,
                        "sparse": sparse, "append": None if append is None else list(append),
                        "mean_only": self.mean_only}  # fmt: skip
        self.job = model.plan_imputation(
            rows, mask=_mask(rows, data, mask), draws=draws, mean_only=self.mean_only, seed=seed, genes=append,
            **options,
        )  # fmt: skip
        self.layers, self.added = layers, self.job.added
        super().__init__(
            model, rows, self.job.reader, self.job.genes, keep=keep, ood=ood if "ood" in layers else 0, seed=seed
        )
        _check_dtype(dtype, sparse)
        width = len(self.genes)
        for name in self.job.layers:
            if not ("mean" in layers or name != f"imputed_{self.job.imputer.readout}"):
                continue
            drawn = name == "imputed" or name.startswith("imputed_draw")
            field = self.drawn if drawn else partial(Field, dtype=dtype)
            self.fields.append(field(f"layers/{name}", width=width, sparse=sparse))
        if "mask" in layers:
            self.fields.append(Field("layers/imputed_mask", "bool", width, sparse))

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {**super().identity(), **self.options}

    def stale(self, path: str) -> bool:
        """See :class:`Task`."""
        return super().stale(path) or (path.startswith("layers/") and is_imputation_layer(path.removeprefix("layers/")))

    def read(self, start: int, stop: int) -> Block:
        """See :class:`Task`."""
        return self._fitting(self.reader.block(start, stop, self.job.hidden))

    def answer(self, block: Block) -> tuple[dict[str, torch.Tensor], Callable[[], FillCounts]]:
        """See :class:`OnCells`."""
        answer = self.job.answer(block)
        found = {f"layers/{k}": v for k, v in answer.layers.items()}
        if "mask" in self.layers:
            found["layers/imputed_mask"] = answer.filled
        wanted = {f.path for f in self.fields}
        return {k: v for k, v in found.items() if k in wanted}, lambda: FillCounts().add(answer)

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        about = self.job.provenance
        return {**about, "task": self.name, "sites": about["targets"], "mask": self.options["mask"] or ""}


class Denoise(OnCells):
    """The rate behind every count (docs/MATHS.md 5.4); options of :meth:`distdiff.model.Model.denoise`."""

    name = "denoise"

    def __init__(
        self, model: Model, rows: Any, *, readout: str = "mean", depth: float = 1.0, shrink: bool = True,
        dtype: str = "float32", sparse: bool | None = None, ood: int = 0, seed: int = 0,
        keep: Sequence[str] | None = None, **reading: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            model, rows, Reader(model.spec, rows, **reading), tuple(rows.genes), keep=keep, ood=ood, seed=seed
        )
        _check_dtype(dtype, sparse)
        self.options: dict[str, Any] = {"readout": readout, "depth": depth, "shrink": shrink}
        self.layer = "layers/denoised" if readout == "mean" else f"layers/denoised_{readout}"
        self.fields.append(Field(self.layer, dtype, len(self.genes), sparse))

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {**super().identity(), **self.options, "dtype": self.fields[-1].dtype, "sparse": self.fields[-1].sparse}

    def answer(self, block: Block) -> tuple[dict[str, torch.Tensor], Callable[[], FillCounts]]:
        """See :class:`OnCells`."""
        m, options = self.model, {**self.options, "shrink": self.model.shrink if self.options["shrink"] else None}
        new = denoise(m.process, m.denoiser, block.cells, block.observed, **options)
        return {self.layer: self.reader.widen(block.given, new)}, _all_of(new)

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.model.provenance(task=self.name, **self.options, **self.reader.label_provenance())


class Deepen(OnCells):
    """What more depth would have shown (docs/MATHS.md 5.5); options of :meth:`distdiff.model.Model.deepen`."""

    name = "deepen"

    def __init__(
        self, model: Model, rows: Any, *, times: float, steps: int = 8, beyond: str = "refuse", ood: int = 0,
        seed: int = 0, sparse: bool | None = True, keep: Sequence[str] | None = None, **reading: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            model, rows, Reader(model.spec, rows, **reading), tuple(rows.genes), keep=keep, ood=ood, seed=seed
        )
        self.options: dict[str, Any] = {"times": times, "steps": steps, "beyond": beyond, "seed": seed}
        self.fields.append(self.drawn("layers/deepened", len(self.genes), sparse))

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {**super().identity(), **self.options, "sparse": self.fields[-1].sparse}

    def answer(self, block: Block) -> tuple[dict[str, torch.Tensor], Callable[[], FillCounts]]:
        """See :class:`OnCells`."""
        m, depth = self.model, self.model.info.get("depth")
        new = deepen(m.process, m.denoiser, m.spec, block.cells, block.observed, depth=depth, **self.options)
        return {"layers/deepened": self.reader.widen(block.given, new)}, _all_of(new)

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.model.provenance(task=self.name, **self.options, **self.reader.label_provenance())


class Generate(Task):
    """Cells from labels alone (docs/MATHS.md 5.1); cell ``i`` depends on the seed and ``i``.

    Parameters
    ----------
    n, obs
        Number of cells, and label -> value of all of them, or one a cell.
    **options
        ``steps``, ``spacing``, ``solver``, ``sigma``, ``guidance``.
    """

    name = "generate"

    def __init__(
        self, model: Model, n: int, obs: Mapping[str, str | Sequence[str]] | None = None, *, seed: int = 0,
        steps: int = 16, spacing: Any = "time", solver: str = "plain", sigma: tuple[str, float] = ("none", 0.0),
        guidance: float = 1.0, device: str = "auto",
    ) -> None:  # fmt: skip
        if n < 1:
            raise ValueError(f"generate: n must be at least 1, got {n}")
        check_guidance(model.spec, model.required_labels, guidance)
        self.model, self.seed, self.genes = model, seed, model.spec.genes
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.all_codes = {k: v.numpy() for k, v in label_codes(model.spec, obs or {}, n).items()}
        self.rows = NewRows(n, self.genes, {k: self.all_codes[k] for k in obs or {}}, model.spec.labels)
        self.options = {"n": n, "steps": steps, "spacing": spacing, "solver": solver, "sigma": list(sigma),
                        "guidance": guidance, "seed": seed}  # fmt: skip
        spaced = model.spaced({"steps": steps, "spacing": spacing}, "generate")
        self.grid = list(levels(model.process.schedule, **spaced).to(self.device))
        self.fields = [*self.label_fields(), Field("X", "float32", len(self.genes), None)]

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        asked = hashlib.sha256()
        for key in sorted(self.all_codes):
            asked.update(key.encode() + self.all_codes[key].tobytes())
        return {**self.options, "obs": asked.hexdigest()}

    def read(self, start: int, stop: int) -> Cells:
        """See :class:`Task`."""
        labels = {k: torch.from_numpy(v[start:stop]) for k, v in self.all_codes.items()}
        return Cells(torch.zeros(stop - start, 0), Condition(labels), torch.arange(start, stop))

    @torch.no_grad()
    def compute(self, block: Cells) -> tuple[Values, Callable[[], FillCounts]]:
        """See :class:`Task`."""
        cells, process, o = block.to(self.device), self.model.process, self.options
        rng = by_row(cells, 1, self.seed, "generate")
        x = process.prior((len(cells), len(self.genes)), rng=rng)
        predict = predictor(process, self.model.denoiser, cells.labels, guidance=o["guidance"])
        x = sample(process, predict, x, self.grid, sigma=tuple(o["sigma"]), solver=o["solver"], rng=rng)
        return {"X": process.leave(x)}, _all_of(x)

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.model.provenance(task=self.name, **{k: str(v) for k, v in self.options.items()})


def _all_of(new: torch.Tensor) -> Callable[[], FillCounts]:
    return lambda: FillCounts(cells=len(new), targets=new.numel())


def _check_dtype(dtype: str, sparse: bool | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}")
    if dtype == "float16" and sparse:
        raise ValueError("scipy has no sparse float16: write it dense (--dense), or sparse as float32")


def _mask(rows: Any, data: str | Path, mask: str | None) -> Any:
    """A mask by its name: rows of it are read as they are needed where its file allows."""
    if mask is None:
        return None
    if mask.endswith((".npz", ".npy")):
        return load_mask(mask, (rows.n_cells, len(rows.genes)))
    if not isinstance(rows, FileRows):
        raise ValueError(f"--mask {mask}: a store has no layers; give a .npz or .npy file")
    return MaskLayer(Source.open(data, layer=mask, every=True), rows.genes)


def _named(mask: str | None) -> str | None:
    """A mask's name, and for a file which version of it."""
    if mask is None or not mask.endswith((".npz", ".npy")):
        return mask
    return f"{Path(mask).name} {files.stamp(mask)}" if Path(mask).exists() else mask
