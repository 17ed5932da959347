"""Model: weights, law and gene names in one folder; imputation of AnnData objects and files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from distdiff import files
from distdiff.component import build, complete, nearest
from distdiff.data.source import Source, check_counts, codes
from distdiff.denoise import Denoiser
from distdiff.impute import Imputer, targets
from distdiff.impute.conditional import Conditional
from distdiff.impute.repaint import RePaint
from distdiff.process import Process
from distdiff.types import Cells, Condition, DataSpec

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT = 1


@dataclass
class Filled:
    """What an imputation did; stands in ``uns['distdiff']`` of the output."""

    cells: int = 0
    genes: int = 0
    targets: int = 0
    molecules_added: float = 0.0
    cells_without_evidence: int = 0
    genes_unknown_to_model: int = 0
    genes_absent_from_input: int = 0
    targets_of_unknown_genes: int = 0
    seconds: float = 0.0


@dataclass
class Model:
    """A trained model.

    Parameters
    ----------
    process, denoiser
        The law and the network.
    spec
        Genes, label vocabularies, gene means of the training cells.
    options
        ``{"process": {...}, "denoiser": {...}}``: how to build both.
    info
        Where it comes from: data fingerprint, config, scores.
    """

    process: Process
    denoiser: Denoiser
    spec: DataSpec
    options: dict[str, Any]
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(cls, spec: DataSpec, process: Mapping[str, Any], denoiser: Mapping[str, Any], *, seed: int = 0) -> Model:
        """Build an untrained model; its weights depend on ``seed`` alone, no global random state is changed."""
        law = build(Process, process)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build(Denoiser, denoiser, spec, law.outputs)
        network.relative = law.relative
        options = {"process": complete(Process, process), "denoiser": complete(Denoiser, denoiser, given=2)}
        return cls(law, network, spec, options)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = True) -> Path:
        """Write ``model.json`` and ``weights.safetensors`` (weights and gene means); whole or not at all."""
        tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in self.denoiser.state_dict().items()}
        tensors["spec.gene_mean"] = torch.as_tensor(np.asarray(self.spec.gene_mean, dtype=np.float32))
        weights = save(tensors)
        card = {
            "format": FORMAT,
            **self.options,
            "genes": list(self.spec.genes),
            "labels": {k: list(v) for k, v in self.spec.labels.items()},
            "info": {**self.info, "weights_sha256": hashlib.sha256(weights).hexdigest()},
        }
        with files.whole(folder, overwrite=overwrite) as temporary:
            temporary.mkdir()
            (temporary / "weights.safetensors").write_bytes(weights)
            (temporary / "model.json").write_text(json.dumps(card, indent=1))
        self.info = card["info"]  # type: ignore[assignment]
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Model:
        """Load a folder written by :meth:`save`. For the MLflow registry use :func:`distdiff.load`.

        Raises
        ------
        ValueError
            No model there, a damaged one, or one of a newer format.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / "model.json").read_text())
            tensors = load_file(folder / "weights.safetensors")
        except FileNotFoundError as error:
            hint = " (use distdiff.load for models:/ addresses)" if str(folder).startswith("models:") else ""
            raise ValueError(
                f"{folder} is no distdiff model: {error.filename or 'weights.safetensors'} is missing{hint}"
            ) from None
        except Exception as error:
            raise ValueError(f"the model in {folder} is damaged: {error}") from error
        if card.get("format", 0) > FORMAT:
            raise ValueError(f"{folder} has model format {card['format']}, this distdiff reads up to {FORMAT}; upgrade")
        spec = DataSpec(
            tuple(card["genes"]),
            {k: tuple(v) for k, v in card["labels"].items()},
            tensors.pop("spec.gene_mean").numpy(),
        )
        model = cls.new(spec, card["process"], card["denoiser"])
        model.denoiser.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items()})
        model.denoiser.eval()
        model.info = card["info"]
        return model

    # -- imputation ----------------------------------------------------------------------------------------------

    def imputer(self, method: Literal["conditional", "repaint"] = "conditional", **options: Any) -> Imputer:
        """The imputer ``conditional`` (one call for the mean, ``steps`` for a draw) or ``repaint``."""
        kinds: dict[str, Any] = {"conditional": Conditional, "repaint": RePaint}
        if method not in kinds:
            raise ValueError(f"unknown imputation method {method!r}{nearest(method, kinds)}")
        return kinds[method](self.process, self.denoiser, **options)

    def impute(
        self,
        adata: AnnData,
        *,
        layer: str | None = None,
        mask: str | np.ndarray | sp.spmatrix | None = None,
        sites: Literal["dropout"] | None = None,
        groups: str | None = None,
        draws: int = 1,
        mean_only: bool = False,
        seed: int = 0,
        use_labels: bool = True,
        progress: bool = False,
        **options: Any,
    ) -> AnnData:
        """Impute an AnnData and return a copy with new layers; the input is never changed.

        Parameters
        ----------
        layer
            Where the raw counts are (default ``X``; ``"raw"`` for ``.raw.X``).
        mask
            Targets: name of a layer, or an array/sparse matrix ``[cells, genes]``; true = to be imputed.
        sites, groups
            ``sites="dropout"``: zeros of genes that some cell of the same group expresses (MATHS 8.5); ``groups`` is
            an obs column or ``"leiden"``. Without mask and sites the targets are the model's genes that the input
            lacks, which are appended as new genes.
        draws, mean_only
            Draws from the predictive law: layers ``imputed`` (the first), ``imputed_draw2`` ...; ``mean_only`` writes
            the posterior mean alone.
        use_labels
            Condition on the obs columns that the model was trained with, where they are present.
        **options
            Of :meth:`imputer` (``method``, ``steps``, ``guidance``) and ``batch_size``, ``device``.

        Returns
        -------
        AnnData
            Layers ``imputed_mean`` (float32, molecules) and ``imputed`` (whole molecules), observed entries equal to
            the input; ``uns["distdiff"]`` says what was done.
        """
        job = Job.plan(
            self, Source.from_anndata(adata, layer=layer), mask=_mask(adata, mask), sites=sites, groups=groups,
            draws=draws, mean_only=mean_only, seed=seed, use_labels=use_labels, **options,
        )  # fmt: skip
        out = extend(adata, job.added)
        layers = {name: np.zeros(out.shape, dtype=np.float32) for name in job.layers}
        filled = job.run(layers, progress=progress)
        for name, values in layers.items():
            out.layers[name] = values
        out.uns["distdiff"] = {**job.provenance, **dataclasses.asdict(filled)}
        return out


def _mask(adata: AnnData, mask: str | np.ndarray | sp.spmatrix | None) -> np.ndarray | sp.spmatrix | None:
    if not isinstance(mask, str):
        return mask
    if mask not in adata.layers:
        raise ValueError(f"mask={mask!r} is no layer of this AnnData{nearest(mask, adata.layers)}")
    return adata.layers[mask]


def extend(adata: AnnData, genes: tuple[str, ...]) -> AnnData:
    """Copy an AnnData, with ``genes`` appended as unmeasured columns (``var['distdiff_added']``, counts 0)."""
    out = adata.copy()
    if not genes:
        return out
    import anndata as ad
    import pandas as pd

    empty = sp.csr_matrix((adata.n_obs, len(genes)), dtype=adata.X.dtype)
    x = sp.hstack((sp.csr_matrix(adata.X), empty), format="csr")
    var = adata.var.reindex([*adata.var_names, *genes])
    var["distdiff_added"] = np.r_[np.zeros(adata.n_vars, bool), np.ones(len(genes), bool)]
    return ad.AnnData(x, obs=out.obs, var=pd.DataFrame(var), obsm=dict(out.obsm), uns=dict(out.uns))


@dataclass
class Job:
    """One imputation: which counts, which targets, which layers. :meth:`plan` checks all before anything is written."""

    model: Model
    rows: Any
    imputer: Imputer
    hidden: targets.Hidden
    columns: np.ndarray  # int [g_in]: position in the model of each input gene, -1 unknown
    labels: dict[str, np.ndarray]
    added: tuple[str, ...]
    draws: int
    seed: int
    provenance: dict[str, Any]
    batch_size: int = 256
    device: str = "cpu"

    @classmethod
    def plan(
        cls,
        model: Model,
        rows: Any,
        *,
        mask: np.ndarray | sp.spmatrix | None = None,
        sites: str | None = None,
        groups: str | None = None,
        draws: int = 1,
        mean_only: bool = False,
        seed: int = 0,
        use_labels: bool = True,
        method: Literal["conditional", "repaint"] = "conditional",
        batch_size: int = 256,
        device: str = "auto",
        **options: Any,
    ) -> Job:
        """Resolve targets, genes and labels.

        Raises
        ------
        ValueError
            No gene in common, nothing to impute, a mask of another shape, ``draws < 1``, a label value that the model
            never saw, sites without groups, mask and sites together.
        """
        if draws < 1 and not mean_only:
            raise ValueError(f"draws must be at least 1, got {draws}; for the posterior mean alone give --mean-only")
        draws = 0 if mean_only else draws
        where = {gene: i for i, gene in enumerate(model.spec.genes)}
        columns = np.array([where.get(g, -1) for g in rows.genes], dtype=np.int64)
        known = int((columns >= 0).sum())
        if not known:
            raise ValueError(
                f"none of the input's {len(rows.genes)} genes is among the model's {model.spec.n_genes} (input: "
                f"{', '.join(rows.genes[:3])}..., model: {', '.join(model.spec.genes[:3])}...); are both symbols or "
                "both Ensembl ids?"
            )
        have = set(rows.genes)
        absent = tuple(g for g in model.spec.genes if g not in have)
        kind, hidden = _targets(rows, mask, sites, groups, seed)
        if kind == "panel" and not absent:
            raise ValueError(
                "nothing to impute: the input has all of the model's genes; say which entries are targets with --mask "
                "FILE|layer or --sites dropout --groups cell_type|leiden"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.denoiser.to(device).eval()
        provenance = {
            "model": model.info.get("name", "unnamed"), "weights_sha256": model.info.get("weights_sha256", ""),
            "targets": kind, "groups": groups or "", "method": method, "draws": draws, "seed": seed,
            "trained_on": model.info.get("data", ""),
        }  # fmt: skip
        return cls(
            model, rows, model.imputer(method, **options), hidden, columns,
            _labels(model.spec, rows) if use_labels else {}, absent if kind == "panel" else (), draws, seed,
            provenance, batch_size, device,
        )  # fmt: skip

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`run` fills."""
        drawn = ["imputed", *(f"imputed_draw{i}" for i in range(2, self.draws + 1))]
        return ["imputed_mean", *(drawn if self.draws else [])]

    def run(self, layers: Mapping[str, Any], *, progress: bool = True) -> Filled:
        """Fill ``layers`` (array-likes ``[cells, genes + added]``: numpy, h5py or zarr) block by block."""
        began, filled = time.perf_counter(), Filled()
        filled.genes = len(self.rows.genes) + len(self.added)
        filled.genes_unknown_to_model = int((self.columns < 0).sum())
        filled.genes_absent_from_input = self.model.spec.n_genes - int((self.columns >= 0).sum())
        with tqdm(total=self.rows.n_cells, unit=" cells", desc="impute", disable=not progress) as bar:
            for start, stop, answer in self._blocks(filled):
                for name, values in zip(self.layers, answer, strict=True):
                    layers[name][start:stop] = values
                bar.update(stop - start)
        filled.cells, filled.seconds = self.rows.n_cells, time.perf_counter() - began
        return filled

    def _blocks(self, filled: Filled) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        known = self.columns >= 0
        place = self.columns[known]
        names = getattr(self.rows, "obs_names", None)
        measured = np.zeros(self.model.spec.n_genes, dtype=bool)
        measured[place] = True
        for start in range(0, self.rows.n_cells, self.batch_size):
            stop = min(start + self.batch_size, self.rows.n_cells)
            counts = self.rows.read(start, stop)
            hidden = self.hidden(start, stop, counts)
            given = counts.toarray().astype(np.float32)
            check_counts(
                sp.csr_matrix(np.where(hidden, 0, given)), self.rows.genes,
                [str(n) for n in names[start:stop]] if names is not None else [str(n) for n in range(start, stop)],
                getattr(self.rows, "where", "the store"),
            )  # fmt: skip
            x = np.zeros((stop - start, self.model.spec.n_genes), dtype=np.float32)
            observed = np.zeros(x.shape, dtype=bool)
            observed[:, place] = ~hidden[:, known]
            x[:, place] = np.where(hidden[:, known], 0, given[:, known])
            empty = x.sum(1) == 0
            cells = Cells(
                torch.from_numpy(x),
                Condition({k: torch.from_numpy(v[start:stop]) for k, v in self.labels.items()}),
                torch.arange(start, stop),
            ).to(self.device)
            answer = self.imputer.impute(
                cells, torch.from_numpy(observed).to(self.device), draws=self.draws, seed=self.seed
            )
            fill = hidden & known & ~empty[:, None]
            out = []
            for values in (answer.mean, *(answer.draws if answer.draws is not None else ())):
                model_genes = values.cpu().numpy()
                full = given.copy()
                full[:, known] = np.where(fill[:, known], model_genes[:, place], given[:, known])
                if self.added:
                    full = np.hstack((full, np.where(empty[:, None], 0, model_genes[:, ~measured])))
                out.append(full)
            extra = 0 if not self.added else (~empty).sum() * len(self.added)
            filled.targets += int(fill.sum() + extra)
            filled.molecules_added += float(out[0].sum(dtype=np.float64) - np.where(fill, 0, given).sum())
            filled.cells_without_evidence += int(empty.sum())
            filled.targets_of_unknown_genes += int((hidden & ~known).sum())
            yield start, stop, out


def _targets(
    rows: Any, mask: np.ndarray | sp.spmatrix | None, sites: str | None, groups: str | None, seed: int
) -> tuple[str, targets.Hidden]:
    if mask is not None and sites is not None:
        raise ValueError("give either a mask or sites, not both")
    if mask is not None:
        if mask.shape != (rows.n_cells, len(rows.genes)):
            raise ValueError(f"the mask has shape {mask.shape}, the input {(rows.n_cells, len(rows.genes))}")
        return "mask", targets.by_mask(mask)
    if sites is None:
        return "panel", targets.nothing
    if sites != "dropout":
        raise ValueError(f"unknown sites {sites!r}{nearest(sites, ['dropout'])}")
    if not groups:
        raise ValueError("sites=dropout needs groups: an obs column such as cell_type, or leiden")
    code = targets.leiden(rows, seed=seed) if groups == "leiden" else codes(rows.obs(groups))
    return "dropout", targets.by_dropout(rows, code)


def _labels(spec: DataSpec, rows: Any) -> dict[str, np.ndarray]:
    found = {}
    for name, vocabulary in spec.labels.items():
        try:
            values = rows.obs(name)
        except ValueError:  # the column is absent: the model goes without
            continue
        if unseen := sorted(set(values) - {*vocabulary, None}):
            raise ValueError(
                f"obs[{name!r}] holds {unseen[0]!r}, which the model never saw in training"
                f"{nearest(unseen[0], vocabulary)}; rename it, leave it empty, or impute with --no-labels"
            )
        found[name] = codes(values, vocabulary)
    return found
