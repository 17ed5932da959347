"""A trained model on the held-out cells of a store: its scores, and those of others on the same cells."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff import files
from distdiff.config import Evaluation
from distdiff.data.store.store import CountStore
from distdiff.imputers import Imputer
from distdiff.imputers.labels import WithLabels
from distdiff.imputers.panel import OnPanel
from distdiff.model import Model
from distdiff.process.counts import Counts
from distdiff.seen import CELLS, counter

if TYPE_CHECKING:
    from distdiff.evaluation import Contestant
    from distdiff.realism import Realism
    from distdiff.report import Report

log = logging.getLogger("distdiff")

OURS = "distdiff"
"""What tables call the model."""

VALIDATED = 2048
"""Validation cells that a comparison takes, at most."""


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
        on = _on_genes(store, model)
        ours_too = {k: tuple(v) for k, v in store.manifest.labels.items()}
        known = tuple(k for k in model.required_labels if ours_too.get(k) == tuple(model.spec.labels[k]))
        cells = store.cells(store.rows("val")[:VALIDATED], known)
        hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(0, "champion"))
        found.append(deviances({OURS: on(model.imputer())}, store, cells, hidden)[OURS])
    return found[0], found[1]


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
    recode, ours = _recoded(store, model), partial(answering, model, store)

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
    recode = _recoded(store, model)
    if missing := [label for label in model.required_labels if label not in recode]:
        raise ValueError(
            f"{store.url} has no label {missing[0]!r}, without which this model has no answer (train.label_dropout=0); "
            f"shard it with labels=[{missing[0]!r}]"
        )
    with_labels = bool(model.required_labels) if use_labels is None else use_labels
    return _on_genes(store, model)(WithLabels(imputer, with_labels, recode))


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


def _recoded(store: CountStore, model: Model) -> dict[str, torch.Tensor]:
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


def _on_genes(store: CountStore, model: Model) -> Callable[[Imputer], Imputer]:
    """Let the model's imputers answer about cells of a store whose genes it knows, whatever their order."""
    genes, panel = tuple(model.spec.genes), tuple(store.genes)
    return lambda imputer: imputer if panel == genes else OnPanel(imputer, genes, panel)


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
    return deviances({OURS: _on_genes(store, model)(model.imputer()), **cheap()}, store, cells, hidden)
