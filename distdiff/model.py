"""Model: weights, law and gene names in one folder, and every task of docs/MATHS.md 5 on AnnData objects."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from safetensors.torch import save
from tqdm import tqdm

from distdiff import files, received, saved
from distdiff.component import Untrusted, build, complete, nearest
from distdiff.data.ingest.source import Source, layer_names
from distdiff.denoise import Denoiser
from distdiff.imputers import Imputer
from distdiff.imputers.blend import Blend
from distdiff.imputers.conditional import Conditional
from distdiff.imputers.graphed import Graphed
from distdiff.imputers.repaint import RePaint
from distdiff.process import Process
from distdiff.process.schedule import placed
from distdiff.seen import FILE, Seen, counter
from distdiff.tasks import Block, Reader, check_labels, columns_of, device_of
from distdiff.tasks.deepen import deepen
from distdiff.tasks.denoise import Library, denoise
from distdiff.tasks.depths import Depth, depths_of
from distdiff.tasks.expected import expected_columns
from distdiff.tasks.frame import copied, framed, warn_left_out
from distdiff.tasks.generate import check_guidance, generate, label_codes, one_a_cell, warn_rare
from distdiff.tasks.impute import (
    Answer,
    FillCounts,
    ImputationPlan,
    absent_of,
    check_draws,
    check_options,
    chosen_layers,
    is_imputation_layer,
    mask_of,
)
from distdiff.tasks.latent import KEY, NOTE, latent
from distdiff.tasks.likelihood import check_ood, nats
from distdiff.tasks.made import generated_names, record
from distdiff.types import DataSpec

log = logging.getLogger("distdiff")

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from distdiff.data.store.manifest import Manifest


@dataclass(repr=False)
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
        Where it comes from: data fingerprint, config, scores; ``depth``: quantiles of the training cells' molecules;
        ``excess``: where along a walk dispersion is at stake (docs/MATHS.md 4.11); ``nats``: likelihood of held-out
        cells; ``training``: numbers of training cells by label value, quantiles of their depth
        (:func:`~distdiff.training.cells.training_cells`).
    seen
        Filter of the training cells, or ``None``.
    blend
        Estimators that imputation by one call blends with the network (docs/MATHS.md 5.10), or ``None``.
    where
        Folder or address that it was loaded from.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.model import Model
    >>> from distdiff.types import DataSpec
    >>> spec = DataSpec(("CD3E", "MS4A1"), {"cell_type": ("B", "T")}, np.ones(2, np.float32))
    >>> Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 8})
    distdiff model, not trained
      genes    2: CD3E, MS4A1
      labels   cell_type (2): B, T
      law      counts; network mlp, 2,028 weights
    """

    process: Process
    denoiser: Denoiser
    spec: DataSpec
    options: dict[str, Any]
    info: dict[str, Any] = field(default_factory=dict)
    seen: Seen | None = None
    where: str = ""
    blend: Blend | None = None

    def __repr__(self) -> str:
        weights = sum(tensor.numel() for tensor in self.denoiser.parameters())
        return saved.described(self.spec, self.options, self.info, weights, self.where)

    @classmethod
    def new(cls, spec: DataSpec, process: Mapping[str, Any], denoiser: Mapping[str, Any], *, seed: int = 0) -> Model:
        """Build an untrained model; its weights depend on ``seed`` alone, no global random state is changed."""
        law = build(Process, process)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build(Denoiser, denoiser, spec, law.outputs)
        network.relative = law.relative
        network.largest = None if spec.gene_max is None else torch.as_tensor(spec.gene_max)
        options = {"process": complete(Process, process), "denoiser": complete(Denoiser, denoiser, given=2)}
        return cls(law, network, spec, options)

    @property
    def required_labels(self) -> tuple[str, ...]:
        """Labels that every training cell came with (``train.label_dropout=0``): the model has no answer without."""
        train = self.info.get("config", {}).get("train", {})
        return tuple(self.spec.labels) if train.get("label_dropout", 1.0) == 0 else ()

    def check_store(self, manifest: Manifest, where: str) -> None:
        """Refuse a store of measurements for a law of whole counts.

        Raises
        ------
        ValueError
            It is one.
        """
        if self.process.whole:
            manifest.refuse_measurements(f"process {type(self.process).__name__}", where)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = True) -> Path:
        """Write ``model.json`` and ``weights.safetensors`` (weights, statistics of genes); whole or not at all.

        Raises
        ------
        ValueError
            A weight that is not finite: no model of it is read again.
        """
        tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in self.denoiser.state_dict().items()}
        tensors["spec.gene_mean"] = torch.as_tensor(np.asarray(self.spec.gene_mean, dtype=np.float32))
        if self.spec.gene_max is not None:
            tensors["spec.gene_max"] = torch.as_tensor(np.asarray(self.spec.gene_max, dtype=np.float32))
        tensors |= {} if self.blend is None else self.blend.tensors()
        received.check_finite(tensors)
        names = saved.names_of(self.spec.genes, self.spec.labels)
        weights = save(tensors, metadata={saved.NAMES: names})
        card = {
            "format": saved.FORMAT,
            **self.options,
            "genes": list(self.spec.genes),
            "labels": {k: list(v) for k, v in self.spec.labels.items()},
            "info": {**self.info, "weights_sha256": hashlib.sha256(weights).hexdigest()},
        }
        card["info"].pop("seen", None)  # type: ignore[attr-defined]
        if self.seen is not None:
            cells_seen = self.seen.to_bytes()
            card["info"]["seen"] = {**self.seen.about(), "sha256": hashlib.sha256(cells_seen).hexdigest()}  # type: ignore[index]
        folder = Path(folder).expanduser()
        with files.whole(folder, overwrite=overwrite) as temporary:
            temporary.mkdir()
            if self.seen is not None:
                (temporary / FILE).write_bytes(cells_seen)
            (temporary / "weights.safetensors").write_bytes(weights)
            (temporary / "model.json").write_text(json.dumps(saved.sealed(card), indent=1))
        self.info = card["info"]  # type: ignore[assignment]
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, trust: Sequence[str] = ()) -> Model:
        """Load a folder written by :meth:`save`. For the MLflow registry use :func:`distdiff.load`.

        Parameters
        ----------
        trust
            Packages whose code the model may run: those of its kinds ``module:Class``. By default none, and nothing
            but distdiff's own kinds is built.

        Raises
        ------
        ValueError
            No model there, a damaged one (weights are compared with the sha256 that they were saved with), one of a
            newer format, or one with code from a package that is not trusted.
        """
        folder = Path(folder).expanduser()
        try:
            card, spec, tensors = saved.read(folder, trust)
            with saved.bounded(card, tensors):
                model = cls._of(spec, card)
            received.check_fit(saved.network(tensors), model.denoiser.state_dict())
            model.blend = Blend.of(tensors, spec.n_genes)
            if "seen" in card["info"]:
                model.seen = Seen.read(folder, card["info"]["seen"])
        except FileNotFoundError as error:
            hint = " (use distdiff.load for models:/ addresses)" if str(folder).startswith("models:") else ""
            raise ValueError(
                f"{folder} is no distdiff model: {error.filename or 'weights.safetensors'} is missing{hint}"
            ) from None
        except (saved.WrongFormat, Untrusted, ImportError):
            raise
        except Exception as error:  # whatever the file made of a constructor's arguments
            reason = "".join(c for c in (str(error) or type(error).__name__).splitlines()[0] if c.isprintable())
            raise ValueError(f"the model in {folder} is damaged: {reason[:300]}") from error
        model.denoiser.load_state_dict(saved.network(tensors))
        model.denoiser.eval()
        model.info, model.where = card["info"], str(folder)
        return model

    @classmethod
    def _of(cls, spec: DataSpec, card: Mapping[str, Any]) -> Model:
        """The untrained model of a card that somebody else may have written."""
        try:
            return cls.new(spec, card["process"], card["denoiser"])
        except ImportError:
            raise
        except Exception as error:  # whatever a constructor made of its options
            raise ValueError(f"model.json: its options cannot be used: {error}") from error

    # -- imputation ----------------------------------------------------------------------------------------------

    def imputer(
        self, method: Literal["conditional", "repaint"] = "conditional", *, graph: bool = False, **options: Any
    ) -> Imputer:  # fmt: skip
        """The imputer ``conditional`` (one call for the mean, ``steps`` for a draw) or ``repaint``.

        Parameters
        ----------
        graph
            Replay batches as CUDA graphs (``conditional`` alone; see :mod:`~distdiff.imputers.graphed`). They hold the
            network alone, without its blend.

        Raises
        ------
        ValueError
            Unknown method or option, ``spacing="variance"`` without measured variances, guidance of a model that was
            not trained for it, a graph of what can be none.
        """
        kinds: dict[str, Any] = {"conditional": Conditional, "repaint": RePaint}
        if method not in kinds:
            raise ValueError(f"unknown imputation method {method!r}{nearest(method, kinds)}")
        check_options(method, {name: signature(kind).parameters for name, kind in kinds.items()}, options)
        check_guidance(self.spec, self.required_labels, options.get("guidance", 1.0))
        if method == "conditional":
            options.setdefault("blend", None if graph else self.blend)
        made = kinds[method](self.process, self.denoiser, **self.spaced(options, "impute"))
        return Graphed(made) if graph else made

    def spaced(self, options: Mapping[str, Any], task: Literal["impute", "generate"]) -> dict[str, Any]:
        """``spacing="variance"`` -> levels placed by the excess variance of validation cells (docs/MATHS.md 4.11)."""
        options = dict(options)
        if options.get("spacing") == "variance":
            if "excess" not in self.info:
                raise ValueError(
                    "spacing='variance' needs info['excess'], measured when a model with a dispersion is trained"
                )
            measured = self.info["excess"]
            options["spacing"] = placed(measured["p"], measured[task], options.get("steps", 1))
        return options

    def plan_imputation(
        self, rows: Any, *, method: Literal["conditional", "repaint"] = "conditional", use_labels: bool = False,
        unseen: Literal["unknown", "refuse"] = "unknown", batch_size: int = 256, device: str = "auto",
        mask: np.ndarray | sp.spmatrix | None = None, sites: str | None = None, groups: str | None = None,
        genes: Sequence[str] | None = None, draws: int = 1, mean_only: bool = False, seed: int = 0,
        progress: bool = True, **options: Any,
    ) -> ImputationPlan:  # fmt: skip
        """Check an imputation of ``rows`` (see :class:`~distdiff.tasks.Reader`) and move the network to its device.

        Options as for :meth:`impute`; ``mask`` is in the order of the rows, ``options`` are those of :meth:`imputer`.

        Raises
        ------
        ValueError
            An option that does not fit the model or the input, or nothing to impute.
        """
        check_draws(draws, mean_only)
        reader = Reader(self.spec, rows, use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device)
        check_labels(reader, self.required_labels, options.get("guidance", 1.0))
        trained, unknown = counter(self.seen, reader.columns, reader.absent)
        imputer = self.imputer(method, **options)
        used = getattr(imputer, "blend", None)
        plan = ImputationPlan.of(
            reader, imputer, mask=mask, sites=sites, groups=groups, genes=genes, draws=draws,
            mean_only=mean_only, seed=seed, progress=progress, trained=trained,
            provenance=self.provenance(
                method=method, blend=0.0 if used is None else used.weight,
                calibrated=used is not None and bool(used.knots.numel()),
                **({"cells_trained_on_unknown": unknown} if unknown else {}),
            ),
            depth=self.info.get("depth"),
        )  # fmt: skip
        self.denoiser.to(reader.device).eval()
        return plan

    def impute(
        self, adata: AnnData, *, layer: str | None = None,
        mask: str | np.ndarray | sp.spmatrix | DataFrame | None = None, sites: str | None = None,
        groups: str | None = None, draws: int = 1, mean_only: bool = False, layers: Sequence[str] | None = None,
        ood: int = 4, genes: Sequence[str] | None = None,
        method: Literal["conditional", "repaint"] = "conditional", steps: int | None = None, guidance: float = 1.0,
        spacing: str | Sequence[float] = "time", solver: str = "plain", readout: str | None = None,
        jump: int | None = None, iters: int | None = None, sigma: tuple[str, float] | None = None, graph: bool = False,
        seed: int = 0, use_labels: bool = False, unseen: Literal["unknown", "refuse"] = "unknown",
        batch_size: int | None = None, device: str = "auto", progress: bool = False,
    ) -> AnnData:  # fmt: skip
        """Impute an AnnData and return a copy with new layers; the input is never changed.

        Parameters
        ----------
        layer
            Where the raw counts are (default ``X``; ``"raw"`` for ``.raw.X``).
        mask
            Targets, true = to be imputed: an array or sparse matrix ``[cells, genes]`` in the order of the counts, or a
            DataFrame or the name of a layer, which are taken by names. What stands under it is not looked at; of a cell
            that shows no molecule elsewhere the targets are 0 in every layer.
        sites, groups
            ``sites="dropout"``: zeros of genes that some cell of the same group expresses (docs/MATHS.md 8.5);
            ``groups`` is an obs column or ``"leiden"``. Without mask and sites the targets are the model's genes that
            the input lacks, which are appended as new genes.
        draws, mean_only, seed
            Draws from the predictive law: layers ``imputed`` (the first), ``imputed_draw2`` ...; ``mean_only`` writes
            the posterior mean alone. A draw depends on the seed and the row, not on the batch.
        layers
            What to write: ``mean``, ``draws``, ``mask`` (layer ``imputed_mask``), ``ood`` (``obs["distdiff_nats"]``, a
            likelihood bound from ``ood=4`` network calls, large where a cell is unlike the training cells); by default
            these, with ``mean_only`` the mean and the mask. On request ``sd`` and quantiles of the predictive law
            (``q5``, ``q97.5``): layers ``imputed_sd``, ``imputed_q5`` ...
        genes
            Genes of the result (default: all of the input's, and those that are appended).
        method, graph
            ``conditional`` or ``repaint``; the first as CUDA graphs (see :meth:`imputer`).
        steps, guidance, spacing, solver, readout, jump, iters, sigma
            Of :class:`~distdiff.imputers.conditional.Conditional` (1 step by default) or
            :class:`~distdiff.imputers.repaint.RePaint` (100 steps); ``None``: the method's own.
        use_labels
            Condition on the obs columns that the model was trained with; by default the answer does not know them,
            so that their groups can be compared in it (:class:`~distdiff.tasks.Reader`). ``unseen``: values that the
            model never saw are ``unknown``, or refused.
        batch_size, device, progress
            Cells of a network call (256), ``cpu``, ``cuda:0`` or ``auto`` (the GPU, if there is one); show a bar.

        Returns
        -------
        AnnData
            Layers ``imputed_mean`` (float32, molecules) and ``imputed`` (whole molecules), observed entries equal to
            the input; ``uns["distdiff"]`` says what was done.
        """
        options = _given(
            sites=sites, groups=groups, draws=draws, method=method, steps=steps, guidance=guidance, spacing=spacing,
            solver=solver, readout=readout, jump=jump, iters=iters, sigma=sigma, graph=graph or None, seed=seed,
            use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device,
        )  # fmt: skip
        wanted = {"layers": layers, "ood": check_ood(ood), "mean_only": mean_only, "progress": progress}
        return self._impute(adata, layer, mask, wanted, keep=genes, **options)

    def complete(
        self, adata: AnnData, genes: Sequence[str] | None = None, *, layer: str | None = None, draws: int = 1,
        mean_only: bool = False, layers: Sequence[str] | None = None, report: Any = None, ood: int = 4,
        steps: int | None = None, guidance: float = 1.0, spacing: str | Sequence[float] = "time",
        solver: str = "plain", readout: str | None = None, seed: int = 0, use_labels: bool = False,
        unseen: Literal["unknown", "refuse"] = "unknown", batch_size: int | None = None, device: str = "auto",
        progress: bool = False,
    ) -> AnnData:  # fmt: skip
        """Append genes that the input lacks (all of the model's, or ``genes``) and impute them (docs/MATHS.md 5.6).

        ``report``: what :func:`distdiff.panel` returned, or the folder that it was written to; then ``var`` tells of
        each gene its ``reliability`` and what is expected of it (``expected_correlation`` ...). The other options are
        those of :meth:`impute`.
        """
        options = _given(
            draws=draws, steps=steps, guidance=guidance, spacing=spacing, solver=solver, readout=readout, seed=seed,
            use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device,
        )  # fmt: skip
        wanted = {
            "layers": layers, "ood": check_ood(ood), "mean_only": mean_only, "progress": progress, "report": report
        }  # fmt: skip
        return self._impute(adata, layer, None, wanted, append=genes, **options)

    def _impute(
        self, adata: AnnData, layer: str | None, mask: Any, wanted: Mapping[str, Any], *,
        keep: Sequence[str] | None = None, append: Sequence[str] | None = None, **options: Any,
    ) -> AnnData:  # fmt: skip
        """Impute by a plan of ``options``; ``wanted``: what of it to write; ``keep``: in which genes."""
        panel = mask is None and options.get("sites") is None
        layers, statistics = chosen_layers(
            wanted["layers"], self.process, method=options.get("method", "conditional"), mean_only=wanted["mean_only"],
            panel=panel,
        )  # fmt: skip
        if statistics:
            options["statistics"] = statistics
        options["mean_only"] = wanted["mean_only"] or "draws" not in layers
        rows = counts_of(adata, layer)
        if panel and keep is not None:  # of a panel's absent genes only those that are written
            append = absent_of(keep, rows.genes)
        shown = wanted["progress"]
        plan = self.plan_imputation(rows, mask=mask_of(adata, mask, rows), genes=append, progress=shown, **options)
        at = None if keep is None else columns_of(keep, plan.genes)
        about_genes = None
        if wanted.get("report") is not None:
            about_genes = expected_columns(
                wanted["report"], plan.reader, self.info.get("weights_sha256", ""), keep or plan.genes
            )
        out, left_out = framed(adata, layer, plan.added, keep=keep)
        if about_genes is not None:
            out.var[about_genes.columns] = about_genes
        for name in filter(is_imputation_layer, layer_names(out)):  # of an earlier imputation
            del out.layers[name]
        out.obs = out.obs.drop(columns="distdiff_nats", errors="ignore")
        estimate = f"imputed_{plan.imputer.readout}"
        names = [name for name in plan.layers if "mean" in layers or name != estimate]
        found = {name: np.zeros(out.shape, dtype=np.float32) for name in names}
        filled, bounds = [], []

        def on_block(block: Block, answer: Answer) -> None:
            if "mask" in layers:
                these = answer.filled.cpu().numpy()
                filled.append(sp.csr_matrix(these if at is None else these[:, at]))
            if "ood" in layers and wanted["ood"]:
                bounds.append(self._nats(block, wanted["ood"], plan.seed))

        counts = plan.run(found, columns=at, progress=shown, on_block=on_block)
        for name, values in found.items():
            out.layers[name] = values
        if filled:
            out.layers["imputed_mask"] = sp.vstack(filled, format="csr")
        if bounds:
            out.obs["distdiff_nats"] = np.concatenate(bounds)
        for text in counts.warnings("impute"):
            log.warning("impute: %s", text)
        about = {**plan.provenance, **dataclasses.asdict(counts), **warn_left_out(left_out, "impute")}
        record(out.uns, about, [*found, *(["imputed_mask"] if filled else [])], layer_names(out))
        return out

    def _nats(self, block: Block, levels: int, seed: int = 0) -> np.ndarray:
        """The likelihood bound of a block's cells that stands in ``obs["distdiff_nats"]``, ``float32 [b]``."""
        return nats(self.process, self.denoiser, block.cells, block.observed, levels=levels, seed=seed).cpu().numpy()

    # -- the other tasks of docs/MATHS.md 5 -----------------------------------------------------------------------

    def generate(
        self, n: int, obs: Mapping[str, str | Sequence[str]] | None = None, *, steps: int = 16,
        spacing: str | Sequence[float] | None = None, solver: str = "plain", sigma: tuple[str, float] = ("none", 0.0),
        guidance: float = 1.0, depth: Depth = None, seed: int = 0, batch_size: int | None = None,
        device: str = "auto", progress: bool = False,
    ) -> AnnData:  # fmt: skip
        """Draw ``n`` cells from nothing but labels (docs/MATHS.md 5.1).

        Parameters
        ----------
        obs
            Label -> a value for all cells, or one a cell; labels that are not given are left open. A value that few
            training cells had is warned of.
        steps, spacing, solver, sigma, guidance, seed
            Of :func:`~distdiff.tasks.generate.generate`.
        depth
            Molecules of a cell: None draws them from the depths of the training cells with its labels, ``"free"`` takes
            what the walk gives (their depth varies too little), a number or one a cell asks for them
            (:func:`~distdiff.tasks.depths.depths_of`).
        batch_size, device, progress
            As for :meth:`impute`.

        Returns
        -------
        AnnData
            ``X``: CSR float32, whole molecules; ``obs``: the asked labels; ``uns["distdiff_made"]`` marks them as
            generated, whatever is done to them later.
        """
        import anndata as ad
        import pandas as pd

        if n < 1:
            raise ValueError(f"generate: n must be at least 1, got {n}")
        check_guidance(self.spec, self.required_labels, guidance)
        labels = label_codes(self.spec, obs or {}, n)
        warn_rare(self.info, obs or {})
        depths = depths_of(self.process, self.denoiser, self.spec, self.info, labels, n, depth, seed=seed)
        options = self.spaced({"steps": steps, "spacing": spacing, "depth": depths}, "generate")
        options |= _given(solver=solver, sigma=sigma, guidance=guidance, seed=seed, batch_size=batch_size)
        self.denoiser.to(device_of(device)).eval()
        made = []
        with tqdm(total=n, unit=" cells", desc="generate", disable=not progress) as bar:
            for part in generate(self.process, self.denoiser, self.spec, n, labels, **options):
                made.append(sp.csr_matrix(received.check_answer(part.cpu().numpy(), "X", int(bar.n))))
                bar.update(part.shape[0])
        index = pd.Index(generated_names(0, n))
        columns = {k: one_a_cell(v, n) for k, v in (obs or {}).items()}
        frame = pd.DataFrame({k: pd.Categorical(v) for k, v in columns.items()}, index=index)
        out = ad.AnnData(sp.vstack(made, format="csr"), obs=frame, var=pd.DataFrame(index=list(self.spec.genes)))
        record(out.uns, self.provenance(task="generate", steps=steps, guidance=guidance, seed=seed), [], [])
        return out

    def denoise(
        self, adata: AnnData, *, layer: str | None = None, genes: Sequence[str] | Literal["model", "all"] = "model",
        copy: bool = True, key_added: str | None = None, readout: str = "mean", depth: float = 1.0,
        library: str | None = None, ood: int = 0, use_labels: bool = False,
        unseen: Literal["unknown", "refuse"] = "unknown", batch_size: int | None = None, device: str = "auto",
        progress: bool = False,
    ) -> AnnData | None:  # fmt: skip
        """Denoise every count of an AnnData in one network call (docs/MATHS.md 5.4), into a layer ``denoised``.

        Of cells far shallower than the training cells (and of empty ones) the answer leans towards an average cell, at
        more molecules than they show: they are warned of, and counted in ``uns``.

        Parameters
        ----------
        layer
            Where the raw counts are (default ``X``; ``"raw"`` for ``.raw.X``).
        genes
            ``"model"``: the copy holds the genes that the model knows; ``"all"``: it holds all of the input's, the
            layer is 0 in those that the model does not know, and ``var["distdiff_known"]`` marks the others; or names.
        copy
            False writes into ``adata`` itself, as ``genes="all"`` does, and returns None.
        key_added
            Name of the layer; by default ``denoised``, or ``denoised_<readout>``.
        readout
            ``mean``: expected molecules, the rate of each gene at the cell's own depth; ``log1p``, ``log1p_cp10k``,
            ``median``, ``q5`` ...: what else another measurement of the same cell, ``depth`` times as deep, would
            show (on the read-out's own scale). ``open_problems`` is made for that benchmark's score alone
            (:func:`distdiff.readouts.open_problems`).
        library
            What ``log1p_cp10k`` is normalised to: ``panel``, the molecules expected in the model's genes; ``cell``, all
            molecules of the cell in ``adata``; or a column of obs. By default ``cell`` where ``adata`` has genes that
            the model does not know, as scanpy would normalise it, else ``panel``.
        ood
            Network calls of ``obs["distdiff_nats"]`` (0: none), as for :meth:`impute`.
        use_labels, unseen, batch_size, device, progress
            As for :meth:`impute`.

        Returns
        -------
        AnnData or None
            The layer is float32, CSR where that is smaller.
        """
        ood = check_ood(ood)
        reader = self._reader(
            adata, layer, _given(use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device)
        )
        name = key_added or ("denoised" if readout == "mean" else f"denoised_{readout}")
        if not copy and genes != "model" and genes != "all":
            raise ValueError("denoise: copy=False writes all of adata's genes; leave genes= out, or copy=True")
        if not copy and tuple(reader.rows.genes) != tuple(adata.var_names):
            raise ValueError(f"denoise: layer {layer!r} has other genes than adata; copy=True gives an AnnData of them")
        keep = reader.chosen(genes if copy else "all")
        out, left_out = framed(adata, layer, keep=keep) if copy else (adata, [])
        wide = keep is None and not reader.known.all()
        at = None if keep is None else columns_of(keep, reader.rows.genes)
        parts, bounds, to, counts = [], [], Library(reader, library, readout), FillCounts()
        for block in reader.blocks(progress=progress, desc="denoise"):
            counts.add_cells(self.spec, block, self.info.get("depth"))
            new = denoise(
                self.process, self.denoiser, block.cells, block.observed, readout=readout, depth=depth,
                library=to.of(block),
            )  # fmt: skip
            answer = received.check_answer(reader.widen(new).cpu().numpy(), name, block.start)
            answer = answer if at is None else answer[:, at]
            parts.append(sp.csr_matrix(answer) if wide and 2 * reader.known.sum() < len(reader.known) else answer)
            if ood:
                bounds.append(self._nats(block, ood))
        out.layers[name] = sp.vstack(parts, format="csr") if sp.issparse(parts[0]) else np.concatenate(parts)
        if wide:
            out.var["distdiff_known"] = reader.known
        if bounds:
            out.obs["distdiff_nats"] = np.concatenate(bounds)
        for text in counts.warnings("denoise"):
            log.warning("denoise: %s", text)
        about = self.provenance(
            task="denoise", layer=name, readout=readout, depth=depth, **to.provenance(), **reader.provenance(),
            cells_shallower_than_trained=counts.cells_shallower_than_trained, **warn_left_out(left_out, "denoise"),
        )  # fmt: skip
        record(out.uns, about, [name], layer_names(out))
        return out if copy else None

    def deepen(
        self, adata: AnnData, times: float, *, layer: str | None = None, steps: int = 8, seed: int = 0,
        beyond: Literal["refuse", "allow"] = "refuse", genes: Sequence[str] | None = None, ood: int = 0,
        use_labels: bool = False, unseen: Literal["unknown", "refuse"] = "unknown", batch_size: int | None = None,
        device: str = "auto", progress: bool = False,
    ) -> AnnData:  # fmt: skip
        """Add the molecules that ``times`` the depth would have shown (docs/MATHS.md 5.5), in a copy of ``adata``.

        Layer ``deepened``: whole counts (CSR), never below the observed ones. Refused where a cell would become deeper
        than the cells the model was trained on, unless ``beyond="allow"``. ``genes``: those of the result (default: all
        of the input's); ``ood`` and the other options are those of :meth:`impute`.
        """
        ood = check_ood(ood)
        reader = self._reader(
            adata, layer, _given(use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device)
        )
        at = None if genes is None else columns_of(genes, reader.rows.genes)
        out, left_out = framed(adata, layer, keep=genes)
        parts, bounds = [], []
        for block in reader.blocks(progress=progress, desc="deepen"):
            new = deepen(
                self.process, self.denoiser, self.spec, block.cells, block.observed, times=times, steps=steps,
                seed=seed, depth=self.info.get("depth"), beyond=beyond,
            )  # fmt: skip
            answer = reader.widen(new, block.given).cpu().numpy()
            answer = received.check_answer(answer, "deepened", block.start)
            parts.append(sp.csr_matrix(answer if at is None else answer[:, at]))
            if ood:
                bounds.append(self._nats(block, ood, seed))
        if bounds:
            out.obs["distdiff_nats"] = np.concatenate(bounds)
        out.layers["deepened"] = sp.vstack(parts, format="csr")
        about = self.provenance(
            task="deepen", times=times, steps=steps, seed=seed, **reader.provenance(),
            **warn_left_out(left_out, "deepen"),
        )  # fmt: skip
        record(out.uns, about, ["deepened"], layer_names(out))
        return out

    def latent(
        self, adata: AnnData, *, layer: str | None = None, copy: bool = True, key_added: str = KEY,
        use_labels: bool = False, unseen: Literal["unknown", "refuse"] = "unknown", batch_size: int | None = None,
        device: str = "auto", progress: bool = False,
    ) -> AnnData | None:  # fmt: skip
        """Write where each cell lies in the network, its last hidden state before the answers, into ``obsm``.

        For ``sc.pp.neighbors(adata, use_rep="X_distdiff")``, UMAP and clustering. Distances are those of the network,
        not of molecules: a few directions dominate. On 10x PBMC 3k (MLP, 2,000 genes, 40,000 training cells) Leiden
        clusters of it agree with the cell types less than those of the PCA of log counts (adjusted Rand index 0.44
        against 0.87 at resolution 0.5), so compare both.

        Parameters
        ----------
        layer
            Where the raw counts are (default ``X``; ``"raw"`` for ``.raw.X``).
        copy
            False writes into ``adata`` itself and returns None.
        key_added
            Entry of ``obsm``, ``float32 [cells, width of the network]``; what was done stands in
            ``uns["distdiff_latent"]``, so that ``uns["distdiff"]`` still speaks of layers.
        use_labels, unseen, batch_size, device, progress
            As for :meth:`impute`.

        Raises
        ------
        ValueError
            The denoiser has no hidden state of a cell.
        """
        reader = self._reader(
            adata, layer, _given(use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device)
        )
        found = []
        for block in reader.blocks(progress=progress, desc="latent"):
            new = latent(self.process, self.denoiser, block.cells, block.observed).cpu().numpy()
            found.append(received.check_answer(new, key_added, block.start))
        out = copied(adata) if copy else adata
        out.obsm[key_added] = np.concatenate(found)
        out.uns[NOTE] = self.provenance(task="latent", **reader.provenance())
        return out if copy else None

    def likelihood(
        self, adata: AnnData, *, layer: str | None = None, levels: int = 32, seed: int = 0, use_labels: bool = False,
        unseen: Literal["unknown", "refuse"] = "unknown", batch_size: int | None = None, device: str = "auto",
        progress: bool = False,
    ) -> DataFrame:  # fmt: skip
        """Bound on ``-log p`` of every cell (docs/MATHS.md 3.3), an out-of-distribution score.

        Returns
        -------
        pandas.DataFrame
            Index ``adata.obs_names``; ``nats``, ``molecules`` (in the model's genes), ``bits_per_molecule``.
        """
        import pandas as pd

        reader = self._reader(
            adata, layer, _given(use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device)
        )
        found = [
            torch.stack(
                (
                    nats(self.process, self.denoiser, b.cells, b.observed, levels=levels, seed=seed),
                    b.cells.counts.sum(1),
                )
            )
            for b in reader.blocks(progress=progress, desc="likelihood")
        ]
        cost, molecules = torch.cat(found, 1).cpu().double().numpy()
        received.check_answer(cost, "nats")
        bits = cost / np.log(2) / np.where(molecules > 0, molecules, np.nan)
        return pd.DataFrame({"nats": cost, "molecules": molecules, "bits_per_molecule": bits}, index=adata.obs_names)

    def certify(self, adata: AnnData, **options: Any) -> Any:
        """Test on raw counts whether this model's answers can be believed; options of :func:`distdiff.certify`."""
        package = sys.modules[__package__]  # as its users see it: certify lies floors above and knows the baselines
        return package.certify(self, adata, **options)

    def panel(self, adata: AnnData, atlas: Any, **options: Any) -> Any:
        """Tell how well each gene that a panel lacks will be predicted; options of :func:`distdiff.panel`."""
        return sys.modules[__package__].panel(self, adata, atlas, **options)  # floors above, as certify

    def _reader(self, adata: AnnData, layer: str | None, options: Mapping[str, Any]) -> Reader:
        reader = Reader(self.spec, counts_of(adata, layer), **options)
        check_labels(reader, self.required_labels)
        self.denoiser.to(reader.device).eval()
        return reader

    def fingerprint(self) -> str:
        """SHA-256 of weights, options, genes and labels: two models with the same answer the same."""
        shape = {
            **self.options,
            "genes": list(self.spec.genes),
            "labels": {k: list(v) for k, v in self.spec.labels.items()},
        }
        found = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
        largest = self.denoiser.largest
        tensors = {**self.denoiser.state_dict(), **({} if largest is None else {"largest": largest})}
        tensors |= {} if self.blend is None else self.blend.tensors()
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def provenance(self, **what: Any) -> dict[str, Any]:
        """Which model did ``what``: stands in ``uns['distdiff']`` of every output.

        ``valid_for_tests`` is about the layers that were written; raw counts beside them stay valid (`distdiff.de`).
        """
        return {
            "model": self.info.get("name", "unnamed"), "weights_sha256": self.info.get("weights_sha256", ""),
            "trained_on": self.info.get("data", ""), "valid_for_tests": False, **what,
        }  # fmt: skip


def counts_of(adata: AnnData, layer: str | None) -> Source:
    """The counts of an AnnData in memory, backed or lazy.

    Raises
    ------
    TypeError
        It is something else.
    """
    if not hasattr(adata, "obs_names"):
        raise TypeError(
            f"an AnnData is wanted, got {type(adata).__name__}; read a file with anndata.read_h5ad; the "
            "commands distdiff impute, denoise ... take files as they are"
        )
    return Source.from_anndata(adata, layer=layer)


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None; the others are left to whoever takes them."""
    return {name: value for name, value in options.items() if value is not None}
