"""One experiment from a config: train, keep the best model, evaluate, log, register."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
)

from distdiff import files, received, saved, tracking
from distdiff.baselines._blend import fit_blend
from distdiff.component import Untrusted, modules, nearest
from distdiff.config import Config, Evaluation
from distdiff.data.store.manifest import SPLITS
from distdiff.data.store.store import CountStore
from distdiff.denoise import Denoiser, adopt
from distdiff.imputers import Imputer
from distdiff.imputers.labels import WithLabels
from distdiff.imputers.panel import OnPanel
from distdiff.model import Model
from distdiff.pl.training import kept
from distdiff.process.counts import Counts
from distdiff.seen import CELLS, Seen, counter, salt_of
from distdiff.tasks.depths import has_depths, label_depths
from distdiff.tasks.measure import measure
from distdiff.training import checkpoint, loop
from distdiff.training.cells import training_cells
from distdiff.training.fit import settled
from distdiff.training.launched import check_world
from distdiff.training.loop import Hooks
from distdiff.training.loop import train as fit
from distdiff.training.owner import owned
from distdiff.training.peers import Peers
from distdiff.training.progress import Progress
from distdiff.training.settings import Recipe
from distdiff.training.stop import EXCHANGE
from distdiff.training.trace import NAME as TRACE
from distdiff.waits import waiting

if TYPE_CHECKING:
    from distdiff.evaluation import Contestant
    from distdiff.realism import Realism
    from distdiff.report import Report

log = logging.getLogger("distdiff")


@dataclass(frozen=True)
class Outcome:
    """What :func:`train` leaves: the best model's folder, its record, the table, the MLflow run and registry line."""

    model: Path
    progress: Progress
    report: Report | None = None
    run_id: str | None = None
    registered: str = ""


def train(config: Config, *, trust: Sequence[str] = (), progress: bool = True) -> Outcome:
    """Run an experiment in this process, or as one rank of many under ``accelerate launch``.

    Parameters
    ----------
    trust
        Packages whose code may run if ``train.start`` or the registry's champion ask for it, besides those that the
        config itself names.
    progress
        Show bars, and lines on what is done. Warnings are logged in any case.

    Raises
    ------
    ValueError
        A store or config that does not fit.
    RuntimeError
        The launcher was asked for several processes but only one runs, another run works in ``train.out``, or what
        stands there in the end is not what this run saved.
    Lost
        Another process, or machine, of the run is gone.
    """
    with _products(config.train.precision), _on_cpu(), Peers() as peers:
        return _train(config, (*trust, *modules((config.process, config.denoiser))), peers, progress)


def _train(config: Config, trust: Sequence[str], peers: Peers, show: bool) -> Outcome:
    files.local(config.train.out)
    store = config.loader.open(config.data.store)
    if config.data.genes == "panel":
        store = store.panel()
    _check_label_names(config, store)
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier training here, in another precision
    accelerator = Accelerator(
        mixed_precision=_precision(config.train.precision), step_scheduler_with_optimizer=False, cpu=_cpu(),
        kwargs_handlers=_exchange(),
    )  # fmt: skip
    if not show:
        accelerator.print = lambda *words, **options: None  # type: ignore[method-assign]
    check_world(accelerator)
    model = _new(config, store, accelerator, trust)
    with owned(Path(config.train.out), main=accelerator.is_main_process):
        return _owning(config, store, model, accelerator, trust, peers, show)


def _new(config: Config, store: CountStore, accelerator: Accelerator, trust: Sequence[str]) -> Model:
    """The untrained model of an experiment; all that can be refused is refused here, before anything is written."""
    alone = accelerator.distributed_type is DistributedType.NO and accelerator.device.type == "cpu"
    with saved.affordable(config.denoiser, COPIES if alone else 1):
        model = Model.new(store.spec(config.data.labels), config.process, config.denoiser, seed=config.train.seed)
    model.check_store(store.manifest, config.data.store)
    salt_of(config.train.manifest)
    if len(store.genes) > MANY and accelerator.is_main_process:
        log.warning(
            "train: %s genes; each costs time and memory in every step, and most hold few molecules: shard with "
            "genes='hvg:2000' (distdiff.train takes it too), or go on if all are wanted", f"{len(store.genes):,}",
        )  # fmt: skip
    loop.check(_recipe(config, store, model), accelerator)
    if config.evaluate.enabled and not store.manifest.split.n_cells[SPLITS.index("test")]:
        raise ValueError("evaluate.enabled: the store has no test cells: rebuild the store with another split=")
    if config.train.start and not _going_on(config):  # a checkpoint holds what became of those weights
        accelerator.print(_start(model, config.train.start, trust))
    return model


def _recipe(config: Config, store: CountStore, model: Model) -> Recipe:
    return Recipe(
        store, model.process, model.denoiser, config.survival, config.optim, config.train, config.loader,
        config.data.labels,
    )  # fmt: skip


MANY = 5000
"""Genes above which training is slow on a CPU, and which are mostly chosen by mistake."""

COPIES = 5
"""Of the weights that training on a CPU keeps: the weights, their gradient, two moments, their average."""


def _going_on(config: Config) -> bool:
    """Whether there is a checkpoint to go on from, as the main process sees it."""
    folder = Path(config.train.out) / "checkpoints"
    return broadcast_object_list([checkpoint.find(config.train.resume, folder) is not None])[0]


def _check_label_names(config: Config, store: CountStore) -> None:
    """All labels that a config names must be the store's, now and not when training is over."""
    asked = [("data.labels", label) for label in config.data.labels]
    asked += [("loader.strata", config.loader.strata)] if config.loader.strata not in ("", "auto") else []
    if config.evaluate.enabled and config.evaluate.cell_type:
        asked.append(("evaluate.cell_type", config.evaluate.cell_type))
    for where, label in asked:
        if label not in store.manifest.labels:
            raise ValueError(
                f"{where}: {config.data.store} has no label {label!r}{nearest(label, store.manifest.labels)}; "
                f"shard it with labels=[{label!r}]"
            )


def _owning(
    config: Config, store: CountStore, model: Model, accelerator: Accelerator, trust: Sequence[str], peers: Peers,
    show: bool,
) -> Outcome:  # fmt: skip
    """The experiment, by the only run that works in its folder."""
    began, fingerprint, main = time.perf_counter(), store.manifest.fingerprint, accelerator.is_main_process
    out, best, profile = Path(config.train.out), Path(config.train.out) / "model", _profile(store)
    going_on = _going_on(config)
    recipe = _recipe(config, store, model)
    config = replace(
        config, train=settled(recipe, accelerator), survival=recipe.survival, loader=recipe.loading,
        tracking=config.tracking.named(store.path.name),
    )  # fmt: skip
    model.info = {
        "name": config.tracking.model, "data": fingerprint, "store": store.path.name,
        "config": config.as_dict(), "config_digest": config.digest(),
    }  # fmt: skip
    accelerator.print(
        f"distdiff train: {store.n_cells} cells x {len(store.genes)} genes, "
        f"{sum(p.numel() for p in model.denoiser.parameters()):,} weights, {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}, config {config.digest()}"
    )
    with tracking.run(
        experiment=config.tracking.experiment, name=config.run_name(), params=config.as_dict(),
        tags={"data_fingerprint": fingerprint, "config_digest": config.digest(), "store": config.data.store},
        folder=out, dataset=tracking.Dataset(store.path.name, store.url, fingerprint, profile),
        compare=partial(compare, trust=trust),
        resume=going_on, enabled=main and config.tracking.enabled,
    ) as run:  # fmt: skip

        def save_best(denoiser: Denoiser, numbers: dict[str, float]) -> None:
            Model(model.process, denoiser, model.spec, model.options, {**model.info, "validation": numbers}).save(best)

        hooks = Hooks(
            save_best, _existing_scores(best, fingerprint), on_log=lambda seen, numbers: run.metrics(numbers, seen),
            peers=peers, show=show,
        )  # fmt: skip
        progress = fit(
            replace(recipe, settings=config.train), accelerator, hooks,
            identity={"config": config.identity(), "data": fingerprint},
        )  # fmt: skip
        accelerator.wait_for_everyone()
        peers.close()
        accelerator.end_training()
        if not main:
            return Outcome(best, progress)
        _after_training(progress, store.path.name, out, run)
        if config.train.trace and (out / TRACE).exists():
            run.artifact(out / TRACE)
        if _existing_scores(best, fingerprint).get(progress.judge) != progress.best:
            raise RuntimeError(
                f"{best} is not the model that this run saved at step {progress.best_step} ({progress.judge} "
                f"{progress.best}), so it is neither measured nor registered: "
                + (
                    "no validation gave a number"
                    if math.isinf(progress.best)
                    else "somebody else wrote there meanwhile"
                )
            )
        finished = Model.load(best, trust=trust)
        finished.blend = None  # of an earlier run that had nothing left to do
        finished.info.pop("blend", None)
        finished.info |= {"judge": progress.judge, "history": kept(progress.history, progress.judge)}
        finished.denoiser.to(accelerator.device)
        with waiting("train: measures the model on held-out cells", show=show):
            finished.info |= measure(
                finished.process, finished.denoiser, store, labels=finished.required_labels, seed=config.train.seed
            )
            if config.train.blend and _blends(finished):
                finished.blend, finished.info["blend"] = fit_blend(
                    finished.process, finished.denoiser, store, seed=config.train.seed
                )
                found = finished.info["blend"]
                run.metrics({f"val/blend_{name}": value for name, value in found.items()})
        if finished.blend is not None and finished.blend.weight:
            accelerator.print(
                "distdiff train: imputation by one call takes "
                + " and ".join(f"{of.weight:.0%} of a {of.NAME}" for of in finished.blend.estimators)
                + f" (deviance on validation cells {found['best']:.4f}, of the network alone {found['network']:.4f})"
            )
        finished.info["training"] = training_cells(store, config.data.labels, seed=config.train.seed)
        if has_depths(finished.process, finished.denoiser):
            finished.info["training"]["label_depth"] = label_depths(store, config.data.labels, seed=config.train.seed)
        finished.seen = cells_seen(store, config.train.manifest)
        finished.save(best)
        report = None
        if config.evaluate.enabled:
            with waiting("train: compares the model with cheap estimators on validation cells", show=show):
                cheap = against_cheap(finished, store, seed=config.train.seed)
            run.metrics({f"val/deviance of {name}": value for name, value in cheap.items()})
            if (rival := min(cheap, key=cheap.__getitem__)) != OURS:
                accelerator.print(
                    f"distdiff train: on validation cells {rival} beats the model (deviance {cheap[rival]:.4f} against "
                    f"{cheap[OURS]:.4f}): train longer (train.cells, train.patience) or use that estimator"
                )
            report = evaluate_model(finished, store, config.evaluate, seed=config.train.seed, progress=show)
            report.write(out / "evaluation")
            run.artifact(out / "evaluation")
            run.metrics(report.metrics())
            if config.evaluate.generated and config.data.labels:
                real = evaluate_generated(
                    finished, store, cells=config.evaluate.generated, seed=config.train.seed, scvi=False
                )
                real.write(out / "generated")
                run.artifact(out / "generated")
                run.metrics(real.metrics())
                accelerator.print(real.to_text())
        card = tracking.card(
            best, profile=profile, score=(progress.judge, progress.best), scores=report.metrics() if report else {},
            claims=report.claims() if report else (),
        )  # fmt: skip
        text = tracking.write_card(card, out / "card")
        run.artifact(out / "card")
        run.metrics({"val/best": progress.best, "seconds": time.perf_counter() - began}, progress.step)
        run.register(
            config.tracking.model, best, score=progress.best, data=f"{fingerprint}/{config.comparable(progress.judge)}",
            description=text, step=progress.step,
        )  # fmt: skip
    return Outcome(best, progress, report, run.run_id, run.registered)


def _blends(model: Model) -> bool:
    """Whether imputation by this model may be blended with a regression, which knows counts and no labels."""
    return isinstance(model.process, Counts) and model.process.molecules and not model.required_labels


def cells_seen(store: CountStore, manifest: str) -> Seen | None:
    """The filter of a store's training cells, by ``train.manifest``; they are read once, some thousands at a time."""
    if manifest == "none" or store.manifest.dtype == "float32":
        return None
    rows = store.rows("train")
    blocks = (store.read(rows[start : start + CELLS]) for start in range(0, len(rows), CELLS))
    return Seen.of(len(rows), blocks, salt=salt_of(manifest))


def _existing_scores(model: Path, fingerprint: str) -> dict[str, float]:
    """Validation numbers of the model that stands there, if it was trained on these data; else none."""
    try:
        info = received.json_of(model / "model.json")["info"]
        return dict(info["validation"]) if info["data"] == fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _profile(store: CountStore) -> dict[str, int]:
    """Numbers that describe a store."""
    splits = zip(("training cells", "validation cells", "test cells"), store.manifest.split.n_cells, strict=True)
    return {"cells": store.n_cells, "genes": len(store.genes), **{name: int(n) for name, n in splits}}


def compare(new: Path, champion: Path, *, trust: Sequence[str] = (), remote: bool = True) -> tuple[float, float]:
    """Poisson deviance of a new model and of a champion trained on other data, on what the new one was held out from.

    Half of the entries of the validation cells are hidden, in genes that both know. The store is the one that the new
    model's config names. Labels were made from the counts that are hidden, so they are withheld; from a model that
    never went without, only those that it knows by other values.

    Parameters
    ----------
    trust
        Packages whose code the two models may run.
    remote
        Whether a store at a URL is opened: not for a model that somebody sent.

    Raises
    ------
    ValueError
        No such store, another one there by now, or no gene in common.
    """
    from distdiff.data.masks import mcar
    from distdiff.evaluation import deviances
    from distdiff.rng import numpy_generator

    ours, theirs = (Model.load(folder, trust=trust) for folder in (new, champion))
    settings = ours.info["config"]["data"]
    if not remote and files.is_url(settings["store"]):
        raise ValueError(f"the store is at {settings['store']}, an address that only the run's folder names")
    store = CountStore.open(settings["store"])
    if store.manifest.fingerprint != ours.info["data"]:
        raise ValueError(f"{settings['store']} is not what the model was trained on any more")
    store = _shared(_shared(store, ours), theirs)
    found = []
    for model in (ours, theirs):
        on = _on(store, model)
        ours_too = {k: tuple(v) for k, v in store.manifest.labels.items()}
        known = tuple(k for k in model.required_labels if ours_too.get(k) == tuple(model.spec.labels[k]))
        cells = store.cells(store.rows("val")[:VALIDATED], known)
        hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(0, "champion"))
        found.append(deviances({OURS: on(model.imputer())}, store, cells, hidden)[OURS])
    return found[0], found[1]


def _start(model: Model, address: str, trust: Sequence[str]) -> str:
    """Take over the weights of a trained model, those of genes by name; returns what to say about it."""
    try:
        trained = Model.load(tracking.fetch(address), trust=trust)
        known, fresh_labels = adopt(model.denoiser, model.spec.genes, trained.denoiser.state_dict(), trained.spec.genes)
    except Untrusted:
        raise
    except ValueError as error:
        raise ValueError(f"train.start={address}: {error}") from None
    fresh = f"; labels with other values start fresh ({', '.join(fresh_labels)})" if fresh_labels else ""
    total = model.spec.n_genes
    return f"distdiff train: {known} of {total} genes start from {address}, {total - known} are new to it{fresh}"


def evaluate_model(
    model: Model, store: CountStore, settings: Evaluation, *, seed: int = 0, extra: Sequence[Contestant] = (),
    keep_trained: bool = False, progress: bool = True,
) -> Report:  # fmt: skip
    """Score a model, ``extra`` and the baselines on the store's test cells, same masks (see ``distdiff.evaluation``).

    The genes that both know are scored, whatever their order; the model's others count as not measured. A model with
    labels answers without them, as its tasks do; a row of its own has them, and peeks. Cells that the model was trained
    on (`distdiff.seen`) are left out, unless ``keep_trained``.
    """
    from distdiff.evaluation import Contestant, default_contestants, evaluate

    model.check_store(store.manifest, store.url)
    store = _shared(store, model)
    recode, ours = _recode(store, model), partial(answering, model, store)

    model.denoiser.to("cuda" if torch.cuda.is_available() else "cpu")
    mine = [Contestant(OURS, ours(model.imputer()), ("mean", "1 draw", "draws"), 1)]
    if isinstance(model.process, Counts) and model.process.molecules:
        mine.append(Contestant(f"{OURS}, log1p read-out", ours(model.imputer(readout="log1p"))))
        mine.append(Contestant(f"{OURS}, 8 calls", ours(model.imputer(steps=8)), ("1 draw", "draws"), 8))
    if settings.repaint_steps:
        repaint = ours(model.imputer("repaint", steps=settings.repaint_steps))
        mine.append(Contestant("RePaint, same network", repaint, ("1 draw", "draws"), settings.repaint_steps))
    if recode and not model.required_labels:
        mine.append(Contestant(f"{OURS}, labels told", ours(model.imputer(), use_labels=True)))
    rows = store.rows("test")
    if not len(rows):
        raise ValueError("the store has no test cells: rebuild the store with another split=")
    rows, about = not_trained_on(store, model, rows, keep=keep_trained)
    rows = rows[:: max(1, -(-len(rows) // settings.cells))]
    contestants = default_contestants(settings.cell_type, extra=[*mine, *extra], rate=settings.rate)
    report = evaluate(
        store, rows, contestants, rate=settings.rate, protocol=settings.protocol, draws=settings.draws, seed=seed,
        labels=tuple(recode), groups=settings.cell_type, progress=progress,
    )  # fmt: skip
    report.setting |= about
    if settings.protocol == "genes":
        _expected(report, ours(model.imputer()), store, rows, settings, seed)
    return report


def _expected(
    report: Report, imputer: Imputer, store: CountStore, rows: np.ndarray, settings: Evaluation, seed: int
) -> None:  # fmt: skip
    """Put into a report of hidden genes whether the reliability that validation cells lead one to expect comes true."""
    from distdiff.data.masks import gene_folds
    from distdiff.reliability import agreed, agreement
    from distdiff.rng import numpy_generator

    before = store.rows("val")
    before = before[:: max(1, -(-len(before) // settings.cells))]
    if not len(before):
        return
    fold = gene_folds(len(store.genes), round(1 / settings.rate), numpy_generator(seed, "evaluate"))
    report.genes = agreement(
        imputer, store.genes, store.read(before), store.read(rows), fold, draws=max(2, settings.draws), seed=seed
    )
    report.setting["reliability"] = agreed(report.genes)


def answering(model: Model, store: CountStore, imputer: Imputer, use_labels: bool | None = None) -> Imputer:
    """The model's ``imputer`` for cells of a store whose genes it knows; without labels, unless it needs or gets them.

    Raises
    ------
    ValueError
        A gene that the model does not know, or a label missing without which it has no answer.
    """
    if unknown := set(store.genes) - set(model.spec.genes):
        raise ValueError(
            f"the model does not know {len(unknown)} of the {len(store.genes)} genes of {store.url} "
            f"({', '.join(sorted(unknown)[:3])}); train one on this store"
        )
    recode = _recode(store, model)
    if missing := [label for label in model.required_labels if label not in recode]:
        raise ValueError(
            f"{store.url} has no label {missing[0]!r}, without which this model has no answer (train.label_dropout=0); "
            f"shard it with labels=[{missing[0]!r}]"
        )
    with_labels = bool(model.required_labels) if use_labels is None else use_labels
    return _on(store, model)(WithLabels(imputer, with_labels, recode))


def not_trained_on(
    store: CountStore, model: Model, rows: np.ndarray, *, keep: bool
) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
    """Test cells without those that the model was trained on, and what the report says of these."""
    of_store, of_model = set(store.genes), {gene: i for i, gene in enumerate(model.spec.genes)}
    columns = np.array([of_model[gene] for gene in store.genes])
    _, why = counter(model.seen, columns, len(of_model.keys() - of_store))
    if why or model.seen is None:
        return rows, {"trained_on": f"unknown: {why}"}
    parts = [rows[start : start + CELLS] for start in range(0, len(rows), CELLS)]
    found = np.concatenate([model.seen.found(store.read(part), columns) for part in parts])
    if keep or not found.any():
        return rows, {"trained_on": int(found.sum()), "trained_on_kept": keep}
    if found.all():
        raise ValueError(
            f"the model was trained on all {len(rows)} test cells of this store; give cells that it has not seen, or "
            "score these nevertheless (keep_trained=True)"
        )
    log.warning("evaluate: the model was trained on %d of %d test cells; they are left out", found.sum(), len(rows))
    return rows[~found], {"trained_on": int(found.sum()), "trained_on_kept": False}


def _recode(store: CountStore, model: Model) -> dict[str, torch.Tensor]:
    """The model's code of each value of the labels that both have, ``int64 [values]``, -1 where it never saw it."""
    found = {}
    for label, values in model.spec.labels.items():
        if label in store.manifest.labels:
            code_of = {value: code for code, value in enumerate(values)}
            found[label] = torch.tensor([code_of.get(value, -1) for value in store.manifest.labels[label]])
    return found


def evaluate_generated(model: Model, store: CountStore, **options: Any) -> Realism:
    """Score generated cells against a store's held-out cells; options of ``distdiff.realism.evaluate_generated``."""
    from distdiff import realism

    model.check_store(store.manifest, store.url)
    model.denoiser.to("cuda" if torch.cuda.is_available() else "cpu")
    return realism.evaluate_generated(model, _shared(store, model), **options)


def _shared(store: CountStore, model: Model) -> CountStore:
    """The store on the genes that the model knows too, in the model's order."""
    genes, have = tuple(model.spec.genes), set(store.genes)
    panel = tuple(gene for gene in genes if gene in have)
    if not panel:
        raise ValueError(
            f"none of the store's {len(have)} genes ({', '.join(store.genes[:3])}...) is among the model's "
            f"{len(genes)} ({', '.join(genes[:3])}...); are both symbols or both Ensembl ids?"
        )
    if panel == tuple(store.genes) == genes:
        return store
    if len(panel) < max(len(have), len(genes)):
        log.warning(
            "evaluate: %d genes are scored; %d of the store's are unknown to the model and left out, %d of the model's "
            "are absent and count as not measured", len(panel), len(have) - len(panel), len(genes) - len(panel),
        )  # fmt: skip
    return store.panel(panel)


def _on(store: CountStore, model: Model) -> Callable[[Imputer], Imputer]:
    """Let the model's imputers answer about cells of a store whose genes it knows, whatever their order."""
    genes, panel = tuple(model.spec.genes), tuple(store.genes)
    return lambda imputer: imputer if panel == genes else OnPanel(imputer, genes, panel)


OURS = "distdiff"
"""What tables call the model."""


VALIDATED = 2048
"""Validation cells that a comparison takes, at most."""


def against_cheap(model: Model, store: CountStore, *, seed: int = 0, limit: int = VALIDATED) -> dict[str, float]:
    """Poisson deviance of the model and of the cheap estimators on validation cells, half of the entries hidden.

    A model that a regression beats on the user's own data should not be used there; this is how one finds out. None is
    told labels (a model that never went without is).
    """
    from distdiff.data.masks import mcar
    from distdiff.evaluation import cheap, deviances
    from distdiff.rng import numpy_generator

    cells = store.cells(store.rows("val")[:limit], model.required_labels)
    hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(seed, "cheap"))
    return deviances({OURS: _on(store, model)(model.imputer()), **cheap()}, store, cells, hidden)


def _after_training(progress: Progress, data: str, out: Path, run: tracking.Run) -> None:
    from distdiff import pl

    if progress.history:
        path = out / "training.png"
        pl.training_curve(progress.history, judge=progress.judge, name=data, save=path)
        run.artifact(path)


def _precision(asked: str) -> str:
    if asked in ("fp32", "tf32", "fp16"):
        return "fp16" if asked == "fp16" else "no"
    if asked == "bf16" or (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        return "bf16"
    return "no"


@contextlib.contextmanager
def _products(asked: str) -> Iterator[None]:
    """How exact products of float32 matrices are for the time of a run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if asked == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Without a GPU, tell DeepSpeed so: where it is installed it prints otherwise that it found none."""
    if not _cpu() or "DS_ACCELERATOR" in os.environ:
        yield
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        os.environ.pop("DS_ACCELERATOR", None)


def _cpu() -> bool:
    """Whether accelerate must be told to use the CPU: without it, several processes of a CPU machine each run alone.

    DeepSpeed chooses its device itself, and accelerate drops it when told.
    """
    return not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"


def _exchange() -> list[KwargsHandler]:
    """How processes talk: one that does not answer for ten minutes ends the job; buffers are constants.

    DeepSpeed on CPUs is told of gloo; without, each process takes itself for the only one.
    """
    backend = "gloo" if not (torch.cuda.is_available() or _cpu()) else None
    return [
        InitProcessGroupKwargs(backend=backend, timeout=EXCHANGE),
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
