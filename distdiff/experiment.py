"""One experiment from a config: train, keep the best model, evaluate, log, register."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from distdiff import files, heldout, received, saved, tracking
from distdiff.baselines._blend import fit_blend
from distdiff.component import Untrusted, modules, nearest
from distdiff.config import Config
from distdiff.data.store.manifest import SPLITS
from distdiff.data.store.store import CountStore
from distdiff.denoise import Denoiser, adopt
from distdiff.heldout import OURS
from distdiff.model import Model
from distdiff.pl.training import kept
from distdiff.process.counts import Counts
from distdiff.seen import CELLS, Seen, salt_of
from distdiff.tasks.depths import has_depths, label_depths
from distdiff.tasks.measure import measure
from distdiff.training import checkpoint, loop, machine
from distdiff.training.cells import training_cells
from distdiff.training.fit import settled
from distdiff.training.launched import check_world
from distdiff.training.loop import Hooks
from distdiff.training.loop import train as fit
from distdiff.training.owner import owned
from distdiff.training.peers import Peers
from distdiff.training.progress import Progress
from distdiff.training.settings import Recipe
from distdiff.training.trace import NAME as TRACE
from distdiff.waits import waiting

if TYPE_CHECKING:
    from distdiff.imputers.blend import Blend
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
    with machine.products(config.train.precision), machine.on_cpu(), Peers() as peers:
        return _train(config, (*trust, *modules((config.process, config.denoiser))), peers, progress)


def _train(config: Config, trust: Sequence[str], peers: Peers, show: bool) -> Outcome:
    files.local(config.train.out)
    store = config.loader.open(config.data.store)
    if config.data.genes == "panel":
        store = store.panel()
    _check_label_names(config, store)
    accelerator = machine.accelerator(config.train.precision)
    if not show:
        accelerator.print = lambda *words, **options: None  # type: ignore[method-assign]
    check_world(accelerator)
    model = _new(config, store, accelerator, trust)
    if unused := sorted(set(store.manifest.labels) - set(config.data.labels)):
        accelerator.print(
            f"distdiff train: the store's labels {', '.join(unused)} are not used; to generate cells by label, train "
            f"with data.labels=[{', '.join(unused)}]"
        )
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
    out, profile, going_on = Path(config.train.out), _profile(store), _going_on(config)
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
        compare=partial(heldout.compare, trust=trust),
        resume=going_on, enabled=main and config.tracking.enabled,
    ) as run:  # fmt: skip
        best, progress = _fitted(config, replace(recipe, settings=config.train), model, accelerator, peers, run, show)
        if not main:
            return Outcome(best, progress)
        _logged(config, store, best, progress, run)
        finished = Model.load(best, trust=trust)
        finished.denoiser.to(accelerator.device)
        with waiting("train: measures the model on held-out cells", show=show):
            _measured(config, store, finished, progress, run)
        if finished.blend is not None and finished.blend.weight:
            accelerator.print(_told(finished.blend, finished.info["blend"]))
        finished.save(best)
        report = _evaluated(config, store, finished, accelerator, run, show) if config.evaluate.enabled else None
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


def _fitted(
    config: Config, recipe: Recipe, model: Model, accelerator: Accelerator, peers: Peers, run: tracking.Run, show: bool
) -> tuple[Path, Progress]:
    """Train; the folder of the best model, and the record."""
    best, fingerprint = Path(config.train.out) / "model", recipe.store.manifest.fingerprint

    def save_best(denoiser: Denoiser, numbers: dict[str, float]) -> None:
        Model(model.process, denoiser, model.spec, model.options, {**model.info, "validation": numbers}).save(best)

    hooks = Hooks(
        save_best, _existing_scores(best, fingerprint), on_log=lambda seen, numbers: run.metrics(numbers, seen),
        peers=peers, show=show,
    )  # fmt: skip
    progress = fit(recipe, accelerator, hooks, identity={"config": config.identity(), "data": fingerprint})
    accelerator.wait_for_everyone()
    peers.close()
    accelerator.end_training()
    return best, progress


def _logged(config: Config, store: CountStore, best: Path, progress: Progress, run: tracking.Run) -> None:
    """The curve and the trace go to the tracking server; what stands as the best model must be what was saved."""
    from distdiff import pl

    out = Path(config.train.out)
    if progress.history:
        curve = out / "training.png"
        pl.training_curve(progress.history, judge=progress.judge, name=store.path.name, save=curve)
        run.artifact(curve)
    if config.train.trace and (out / TRACE).exists():
        run.artifact(out / TRACE)
    if _existing_scores(best, store.manifest.fingerprint).get(progress.judge) != progress.best:
        raise RuntimeError(
            f"{best} is not the model that this run saved at step {progress.best_step} ({progress.judge} "
            f"{progress.best}), so it is neither measured nor registered: "
            + ("no validation gave a number" if math.isinf(progress.best) else "somebody else wrote there meanwhile")
        )


def _measured(config: Config, store: CountStore, finished: Model, progress: Progress, run: tracking.Run) -> None:
    """Put into a trained model what is known of it and its cells once it is trained."""
    seed, labels = config.train.seed, config.data.labels
    finished.blend = None  # of an earlier run that had nothing left to do
    finished.info.pop("blend", None)
    finished.info |= {"judge": progress.judge, "history": kept(progress.history, progress.judge)}
    finished.info |= measure(finished.process, finished.denoiser, store, labels=finished.required_labels, seed=seed)
    if config.train.blend and _blends(finished):
        finished.blend, finished.info["blend"] = fit_blend(finished.process, finished.denoiser, store, seed=seed)
        run.metrics({f"val/blend_{name}": value for name, value in finished.info["blend"].items()})
    finished.info["training"] = training_cells(store, labels, seed=seed)
    if has_depths(finished.process, finished.denoiser):
        finished.info["training"]["label_depth"] = label_depths(store, labels, seed=seed)
    finished.seen = cells_seen(store, config.train.manifest)


def _told(blend: Blend, found: Mapping[str, float]) -> str:
    """What a user is told of a model's blend."""
    parts = " and ".join(f"{of.weight:.0%} of a {of.NAME}" for of in blend.estimators)
    return (
        f"distdiff train: imputation by one call takes {parts} (deviance on validation cells {found['best']:.4f}, of "
        f"the network alone {found['network']:.4f})"
    )


def _evaluated(
    config: Config, store: CountStore, finished: Model, accelerator: Accelerator, run: tracking.Run, show: bool
) -> Report:
    """Compare a trained model with cheap estimators and on test cells; generate, where the config asks for it."""
    out, seed = Path(config.train.out), config.train.seed
    with waiting("train: compares the model with cheap estimators on validation cells", show=show):
        cheap = heldout.against_cheap(finished, store, seed=seed)
    run.metrics({f"val/deviance of {name}": value for name, value in cheap.items()})
    if (rival := min(cheap, key=cheap.__getitem__)) != OURS:
        accelerator.print(
            f"distdiff train: on validation cells {rival} beats the model (deviance {cheap[rival]:.4f} against "
            f"{cheap[OURS]:.4f}): train longer (train.cells, train.patience) or use that estimator"
        )
    report = heldout.evaluate_model(finished, store, config.evaluate, seed=seed, progress=show)
    report.write(out / "evaluation")
    run.artifact(out / "evaluation")
    run.metrics(report.metrics())
    if config.evaluate.generated and config.data.labels:
        real = heldout.evaluate_generated(finished, store, cells=config.evaluate.generated, seed=seed, scvi=False)
        real.write(out / "generated")
        run.artifact(out / "generated")
        run.metrics(real.metrics())
        accelerator.print(real.to_text())
    return report


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
