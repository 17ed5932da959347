"""The tasks: impute (and complete), denoise, deepen, latent, generate."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distdiff import files
from distdiff.batch.layout import Field, Values
from distdiff.batch.rows import FileRows, NewRows, StoreRows, open_rows
from distdiff.batch.task import OnCells, Task
from distdiff.component import nearest
from distdiff.data.ingest.source import Source
from distdiff.data.masks import load_mask
from distdiff.model import Model
from distdiff.tasks import Block, Reader, check_names, device_of
from distdiff.tasks.deepen import deepen
from distdiff.tasks.denoise import Library, denoise
from distdiff.tasks.depths import Depth, depths_of
from distdiff.tasks.expected import expected_columns
from distdiff.tasks.generate import check_guidance, label_codes, walk, walk_levels, warn_rare
from distdiff.tasks.impute import FillCounts, MaskLayer, absent_of, chosen_layers, is_imputation_layer
from distdiff.tasks.latent import KEY, NOTE, latent
from distdiff.types import Cells, Condition

DTYPES = ("float32", "float16", "int32", "int16", "uint16")


class Impute(OnCells):
    """Imputation (docs/MATHS.md 5.2, 5.3), and completion of a panel by genes that it lacks (docs/MATHS.md 5.6).

    Parameters
    ----------
    layers
        Of :data:`~distdiff.tasks.impute.LAYERS` (default: :func:`~distdiff.tasks.impute.chosen_layers`), and quantiles
        such as ``q5``.
    dtype
        Of the mean, its standard deviation and quantiles; draws are whole numbers of 32 bits.
    sparse
        Whether layers are CSR; ``None``: where that takes less room.
    append
        Genes that the input lacks and that are to be appended (``complete``).
    report
        Folder of a report of :func:`distdiff.panel`, whose columns ``var`` gets (``complete``).
    mask, draws, **options
        ``sites``, ``groups`` and others of :meth:`Model.plan_imputation <distdiff.model.Model.plan_imputation>`; a mask
        is named, not given.
    """

    name = "impute"

    def __init__(
        self, model: Model, rows: Any, *, data: str | Path, layers: Sequence[str] | None = None,
        dtype: str = "float32", sparse: bool | None = None, mask: str | None = None, draws: int = 1,
        mean_only: bool = False, ood: int = 4, seed: int = 0, genes: Sequence[str] | None = None,
        append: Sequence[str] | None = None, report: str | Path | None = None, **options: Any,
    ) -> None:  # fmt: skip
        for names in (genes, append):
            if names is not None:
                check_names(names)
        layers, statistics = chosen_layers(
            layers, model.process, method=options.get("method", "conditional"), mean_only=mean_only,
            panel=mask is None and options.get("sites") is None,
        )  # fmt: skip
        self.mean_only = mean_only or "draws" not in layers
        if statistics:
            options["statistics"] = statistics
        panel = mask is None and options.get("sites") is None
        if append is None and genes is not None and panel:  # of a panel's absent genes only those that are written
            append = absent_of(genes, rows.genes)
        plain = {k: v for k, v in options.items() if k not in ("batch_size", "device", "graph", "progress")}
        self.options = {**plain, "mask": _identified(mask), "draws": draws, "layers": list(layers), "dtype": dtype,
                        "sparse": sparse, "append": None if append is None else list(append),
                        "mean_only": self.mean_only}  # fmt: skip
        self.job = model.plan_imputation(
            rows, mask=_mask(rows, data, mask), draws=draws, mean_only=self.mean_only, seed=seed, genes=append,
            **options,
        )  # fmt: skip
        self.layers, self.added = layers, self.job.added
        super().__init__(
            model, rows, self.job.reader, self.job.genes, keep=genes, ood=ood if "ood" in layers else 0, seed=seed
        )
        if report is not None:
            weights = model.info.get("weights_sha256", "")
            self.about_genes = expected_columns(report, self.job.reader, weights, self.genes)
            self.options["report"] = hashlib.sha256(self.about_genes.to_csv().encode()).hexdigest()
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
        self, model: Model, rows: Any, *, readout: str = "mean", depth: float = 1.0, library: str | None = None,
        dtype: str = "float32", sparse: bool | None = None, ood: int = 0, seed: int = 0,
        genes: Sequence[str] | Literal["model", "all"] | None = "model", **reading: Any,
    ) -> None:  # fmt: skip
        reader = Reader(model.spec, rows, **reading)
        super().__init__(model, rows, reader, tuple(rows.genes), keep=reader.chosen(genes), ood=ood, seed=seed)
        _check_dtype(dtype, sparse)
        self.options: dict[str, Any] = {"readout": readout, "depth": depth}
        self.library = Library(reader, library, readout)
        self.layer = "layers/denoised" if readout == "mean" else f"layers/denoised_{readout}"
        self.fields.append(Field(self.layer, dtype, len(self.genes), sparse))

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {
            **super().identity(), **self.options, **self.library.provenance(), "dtype": self.fields[-1].dtype,
            "sparse": self.fields[-1].sparse,
        }  # fmt: skip

    def answer(self, block: Block) -> tuple[dict[str, torch.Tensor], Callable[[], FillCounts]]:
        """See :class:`OnCells`."""
        m, library = self.model, self.library.of(block)
        new = denoise(m.process, m.denoiser, block.cells, block.observed, library=library, **self.options)
        count = partial(FillCounts().add_cells, m.spec, block, m.info.get("depth"))
        return {self.layer: self.reader.widen(new)}, count

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.model.provenance(
            task=self.name, **self.options, **self.library.provenance(), **self.reader.label_provenance()
        )


class Deepen(OnCells):
    """What more depth would have shown (docs/MATHS.md 5.5); options of :meth:`distdiff.model.Model.deepen`."""

    name = "deepen"

    def __init__(
        self, model: Model, rows: Any, *, times: float, steps: int = 8, beyond: str = "refuse", ood: int = 0,
        seed: int = 0, sparse: bool | None = True, genes: Sequence[str] | None = None, **reading: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            model, rows, Reader(model.spec, rows, **reading), tuple(rows.genes), keep=genes, ood=ood, seed=seed
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
        return {"layers/deepened": self.reader.widen(new, block.given)}, _all_of(new)

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.model.provenance(task=self.name, **self.options, **self.reader.label_provenance())


class Latent(OnCells):
    """Where each cell lies in the network: ``obsm["X_distdiff"]``; options of :meth:`distdiff.model.Model.latent`."""

    name = "latent"
    uns = NOTE

    def __init__(self, model: Model, rows: Any, **reading: Any) -> None:
        reader = Reader(model.spec, rows, **reading)
        super().__init__(model, rows, reader, tuple(rows.genes), keep=None, ood=0, seed=0)
        model.denoiser.to(self.device).eval()
        width = self._of(reader.block(0, 1).to(self.device)).shape[1]
        self.fields.append(Field(f"obsm/{KEY}", "float32", width))

    def answer(self, block: Block) -> tuple[dict[str, torch.Tensor], Callable[[], FillCounts]]:
        """See :class:`OnCells`."""
        found = self._of(block)
        return {f"obsm/{KEY}": found}, lambda: FillCounts(cells=len(found))

    def _of(self, block: Block) -> torch.Tensor:
        return latent(self.model.process, self.model.denoiser, block.cells, block.observed)

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.model.provenance(task=self.name, **self.reader.label_provenance())


class Generate(Task):
    """Cells from labels alone (docs/MATHS.md 5.1); cell ``i`` depends on the seed and ``i``.

    Parameters
    ----------
    n, obs
        Number of cells, and label -> value of all of them, or one a cell.
    steps, spacing, solver, sigma, guidance
        Of :func:`~distdiff.tasks.generate.generate`.
    depth
        Of :func:`~distdiff.tasks.depths.depths_of`.
    """

    name = "generate"

    def __init__(
        self, model: Model, n: int, obs: Mapping[str, str | Sequence[str]] | None = None, *, seed: int = 0,
        steps: int = 16, spacing: Any = None, solver: str = "plain", sigma: tuple[str, float] = ("none", 0.0),
        guidance: float = 1.0, depth: Depth = None, device: str = "auto",
    ) -> None:  # fmt: skip
        if n < 1:
            raise ValueError(f"generate: n must be at least 1, got {n}")
        check_guidance(model.spec, model.required_labels, guidance)
        self.model, self.seed, self.genes = model, seed, model.spec.genes
        self.device = device_of(device)
        warn_rare(model.info, obs or {})
        codes = label_codes(model.spec, obs or {}, n)
        self.all_codes = {k: v.numpy() for k, v in codes.items()}
        self.depth = depths_of(model.process, model.denoiser, model.spec, model.info, codes, n, depth, seed=seed)
        self.rows = NewRows(n, self.genes, {k: self.all_codes[k] for k in obs or {}}, model.spec.labels)
        self.options = {"n": n, "steps": steps, "spacing": spacing, "solver": solver, "sigma": list(sigma),
                        "guidance": guidance, "seed": seed,
                        "depth": depth if depth is None or np.ndim(depth) == 0 else "one a cell"}  # fmt: skip
        spaced = model.spaced({"steps": steps, "spacing": spacing}, "generate")
        self.grid = list(walk_levels(model.process, model.denoiser, **spaced).to(self.device))
        self.fields = [*self.label_fields(), Field("X", "float32", len(self.genes), None)]

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        digest = hashlib.sha256()
        for key in sorted(self.all_codes):
            digest.update(key.encode() + self.all_codes[key].tobytes())
        if self.depth is not None:
            digest.update(self.depth.numpy().tobytes())
        return {**self.options, "obs": digest.hexdigest()}

    def read(self, start: int, stop: int) -> Cells:
        """See :class:`Task`."""
        labels = {k: torch.from_numpy(v[start:stop]) for k, v in self.all_codes.items()}
        return Cells(torch.zeros(stop - start, 0), Condition(labels), torch.arange(start, stop))

    @torch.no_grad()
    def compute(self, block: Cells) -> tuple[Values, Callable[[], FillCounts]]:
        """See :class:`Task`."""
        cells, o = block.to(self.device), self.options
        x = walk(
            self.model.process, self.model.denoiser, cells, len(self.genes), self.grid,
            depth=None if self.depth is None else self.depth[block.rows], sigma=tuple(o["sigma"]), solver=o["solver"],
            guidance=o["guidance"], seed=self.seed,
        )  # fmt: skip
        return {"X": x}, _all_of(x)

    def provenance(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.model.provenance(task=self.name, **{k: str(v) for k, v in self.options.items()})


def _all_of(new: torch.Tensor) -> Callable[[], FillCounts]:
    return lambda: FillCounts(cells=len(new), targets=new.numel())


def _check_dtype(dtype: str, sparse: bool | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}")
    if dtype == "float16" and sparse:
        raise ValueError("scipy has no sparse float16: write it dense (sparse=False), or as dtype='float32'")


def _mask(rows: Any, data: str | Path, mask: str | None) -> Any:
    """A mask from a file, or from a layer of the input, whose rows are read as they are needed."""
    if mask is None:
        return None
    if mask.endswith((".npz", ".npy")):
        return load_mask(mask, (rows.n_cells, len(rows.genes)))
    if not isinstance(rows, FileRows):
        raise ValueError(f"mask={mask!r}: a store has no layers; give a .npz or .npy file")
    return MaskLayer(Source.open(data, layer=mask, every=True), rows.genes)


def _identified(mask: str | None) -> str | None:
    """A mask's name, and for a file its size and time of change."""
    if mask is None or not mask.endswith((".npz", ".npy")):
        return mask
    return f"{Path(mask).name} {files.stamp(mask)}" if Path(mask).exists() else mask


ON_CELLS: dict[str, Any] = {"impute": Impute, "complete": Impute, "denoise": Denoise, "deepen": Deepen,
                            "latent": Latent}  # fmt: skip


def make_task(kind: str, model: Model, data: str | Path | None, out: Path, *, layer: str | None = None,
              device: str = "auto", **options: Any) -> Task:  # fmt: skip
    """The task of a job.

    Raises
    ------
    ValueError
        ``out`` is the input, or what the task refuses.
    """
    device = _device() if device == "auto" else device
    if kind == "generate":
        return Generate(model, device=device, **options)
    if data is None:
        raise ValueError(f"{kind} needs an input (data)")
    if Path(data).exists():
        files.refuse_nested(out, data)
    rows = open_rows(data, layer)
    if isinstance(rows, StoreRows):
        model.check_store(rows.store.manifest, rows.where)
    if kind == "complete":
        options["append"] = options.pop("genes", None)
    if kind in ("impute", "complete"):
        options["data"] = data
    return ON_CELLS[kind](model, rows, device=device, **options)


def _device() -> str:
    """The GPU of this process by its ``LOCAL_RANK``, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
