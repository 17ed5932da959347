"""The certificate of a model on the user's own cells: what an honest answer must print (docs/certify.md).

Half of the entries of cells that the model was not trained on are hidden, filled, and compared with what stood there;
cells whose right answer is known are denoised. Each item is ``pass``, ``look`` or ``fail``, with a number and what it
means.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from distdiff import certified, metrics, nulls, tracking
from distdiff.api import load
from distdiff.certified import Certificate, Item
from distdiff.data.masks import split_molecules
from distdiff.downstream import log_cp10k
from distdiff.model import Model
from distdiff.process.counts import of_molecules
from distdiff.rng import numpy_generator
from distdiff.tracking.versions import versions
from distdiff.trial import RIVALS, SCORES, Answers, Asked, Trial, prepared, rival, scored

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger("distdiff")

FloatArray = NDArray[np.floating]

NULL_CELLS = 1000
"""Most cells of a null test."""

OURS = "the model"


def certify(
    model: Model | str | Path, data: AnnData | str | Path, *, layer: str | None = None, groupby: str | None = None,
    sample: str | None = None, cells: int = 3000, genes: int = 2000, draws: int = 10, keep_trained: bool = False,
    track: bool = False, seed: int = 0, trust: Sequence[str] = (), progress: bool = False,
) -> Certificate:  # fmt: skip
    """Test on the user's own counts whether a model's answers can be believed.

    Parameters
    ----------
    model
        A model, its folder, or ``models:/NAME@champion``.
    data
        Raw counts: an AnnData, an h5ad file, an AnnData zarr folder or 10x output.
    layer
        Where the raw counts are (default ``X``).
    groupby
        Column of obs with cell types; None: the first of the model's labels that obs has, else Leiden clusters of the
        same counts.
    sample
        Column of obs with batches or donors, whose coverage is told apart.
    cells, genes
        At most so many are scored: cells at random, genes of largest variance over mean.
    draws
        Draws of each hidden count.
    keep_trained
        Score also cells that the model was trained on; else they are left out where the model holds its filter of them
        (`distdiff.seen`), and serve as the cells that the cheap methods learn from.
    track
        Log the certificate to MLflow: files and numbers go to the run that the model came from, or to a new one, and
        a line to the model's card (:func:`distdiff.tracking.certificates.log_certificate`). ``about["tracked"]`` says
        where.
    seed
        Of masks, draws and splits.
    trust
        Packages whose code the model may run.
    progress
        Tell each step.

    Returns
    -------
    Certificate
        ``print(found.to_text())``; ``found.write(folder)`` writes the page, the numbers and the text.

    Raises
    ------
    ValueError
        Values that are no counts, fewer than 50 cells to score, fewer than 10 genes that the model knows, a model whose
        states are no molecules or that has no answer without labels, no such column.

    Examples
    --------
    >>> import anndata, distdiff, numpy as np
    >>> counts = np.random.default_rng(0).poisson(3.0, (240, 12)).astype("float32")
    >>> model = distdiff.train(
    ...     anndata.AnnData(counts), cells=64, batch=32, width=8, evaluate={"enabled": False},
    ...     tracking={"enabled": False}, progress=False,
    ... )
    >>> fresh = anndata.AnnData(np.random.default_rng(1).poisson(3.0, (240, 12)).astype("float32"))
    >>> fresh.obs["cell_type"] = "all"
    >>> found = distdiff.certify(model, fresh, groupby="cell_type")
    >>> found.verdict.split(":")[0], next(i.status for i in found.items if i.name == "better than gene mean x depth")
    ('fail', 'fail')
    """
    if draws < 2:
        raise ValueError(f"certify: draws must be at least 2, got {draws}")
    clock = time.perf_counter(), time.process_time()
    found = model if isinstance(model, Model) else load(model, trust=trust)
    of_molecules(found.process, "certify")
    if found.required_labels:
        raise ValueError(
            f"certify: this model has no answer without {', '.join(found.required_labels)} (train.label_dropout=0), "
            "and an answer that is told the cell type cannot be tested without it"
        )
    tell: Callable[[str], None] = log.warning if progress else log.debug
    trial = prepared(found, data, layer, groupby, sample, cells, genes, keep_trained, seed)
    asked = Asked(found, trial, draws, seed)
    tell("certify: the model fills hidden counts")
    most = None if found.spec.gene_max is None else np.asarray(found.spec.gene_max)[trial.columns[trial.keep]]
    ours = scored(asked.fill, trial, draws, seed, watch=True, most=most)
    items = _calibration(ours, trial) + _means(ours, trial, most)
    rivals = {}
    for name, options in RIVALS.items():
        tell(f"certify: {name}")
        rivals[name] = scored(rival(options, trial, draws, seed), trial, draws, seed)
        items.append(_against(name, ours, rivals[name], seed))
    tell("certify: null tests")
    items += _nulls(asked, trial, seed) + _sources(asked, trial, found, seed)
    about = {
        **trial.about, "model": found.where or found.info.get("name", "in memory"), "weights": found.fingerprint()[:12],
        "trained_on": found.info.get("data", "")[:12], "draws": draws, "seed": seed,
        "seconds": round(time.perf_counter() - clock[0], 1), "cpu_seconds": round(time.process_time() - clock[1], 1),
        "versions": {k: v for k, v in versions().items() if k in ("distdiff", "torch", "numpy", "python")},
    }  # fmt: skip
    scores = {name: {m: float(s.sums[m].sum() / s.count.sum()) for m in SCORES} for name, s in
              {OURS: ours, **rivals}.items()}  # fmt: skip
    made = Certificate(certified.verdict(items), items, scores, about, trial.notes, ours.sample)
    if track:
        with tempfile.TemporaryDirectory(prefix="distdiff-") as temporary:
            about["tracked"] = tracking.log_certificate(
                made.write(Path(temporary) / "certificate"), model=found.where,
                weights=str(found.info.get("weights_sha256", "")), **tracking.described(made),
            )  # fmt: skip
    return made


LEVELS = np.array([0.5, 0.8, 0.95])


def _calibration(ours: Answers, trial: Trial) -> list[Item]:
    """PIT, and coverage in all, by expression, depth, group and batch."""
    part, u = "Does it know how sure it can be?", ours.entries["u"]
    share = np.histogram(u, 10, (0, 1))[0] / len(u) * 10
    worst = float(np.abs(share - 1).max())
    items = [Item(
        part, "place of the truth among draws", certified.status(worst, 0.1, 0.3), worst,
        "A hidden count should lie anywhere among the model's draws equally often: the fullest or emptiest tenth is "
        f"off by {worst:.1%} (10 % allowed).", ({"tenth": i, "density": float(s)} for i, s in enumerate(share)),
    )]  # fmt: skip
    whole = metrics.coverage(u, LEVELS)
    off = float(np.abs(whole - LEVELS).max())
    items.append(Item(
        part, "coverage of intervals", certified.status(off, 0.03, 0.08, abs(whole[2] - 0.95) <= 0.02), float(whole[2]),
        f"Intervals that promise 50, 80 and 95 % hold {whole[0]:.1%}, {whole[1]:.1%} and {whole[2]:.1%} of hidden "
        "counts.",
    ))  # fmt: skip
    depth = np.asarray(trial.scored.sum(1)).ravel()
    strata: dict[str, np.ndarray] = {
        "expression": certified.bands(np.asarray(trial.scored[:, trial.keep].mean(0)).ravel(), 10)[
            ours.entries["gene"]
        ],
        "depth": certified.bands(depth, 5)[ours.entries["cell"]],
        "group": trial.group.astype(str)[ours.entries["cell"]],
    }
    if trial.batch is not None:
        strata["batch"] = trial.batch[ours.entries["cell"]]
    for name, stratum in strata.items():
        rows = certified.coverage_rows(stratum, u, ours.entries["cell"], LEVELS)
        if not rows:
            continue
        off_row = max(rows, key=lambda row: abs(row["95 %"] - 0.95))
        low, high = min(row["95 %"] for row in rows), max(row["95 %"] for row in rows)
        good = "pass" if low >= 0.90 and high <= 0.99 else "look" if low >= 0.85 and high <= 0.995 else "fail"
        items.append(Item(
            part, f"coverage by {name}", good, off_row["95 %"],
            f"95 % intervals hold {low:.1%} to {high:.1%} of hidden counts across {certified.PLURAL[name]} "
            f"(90 to 99 % allowed); furthest off: {off_row['of']}.", rows,
        ))  # fmt: skip
    return items


def _means(ours: Answers, trial: Trial, most: FloatArray | None) -> list[Item]:
    """Predicted against observed means, zeros and tails."""
    part, e = "Are its numbers right on average?", ours.entries
    rows = certified.mean_rows(e["mean"], e["truth"])
    ratio, of_many = certified.furthest_off(rows)
    items = [Item(
        part, "means by decile", certified.status(of_many - 1, 0.25, 1.0, ratio <= 1.25), ratio,
        "In ten bands of predicted expression, seen over predicted molecules is "
        f"{min(r['ratio'] for r in rows):.2f} to {max(r['ratio'] for r in rows):.2f} "
        "(within 1.25 times, or within chance; a band with less than "
        f"{certified.FEW:.0%} of the molecules cannot fail).", rows,
    )]  # fmt: skip
    decile = certified.bands(np.asarray(trial.scored[:, trial.keep].mean(0)).ravel(), 10)[e["gene"]]
    n = np.maximum(np.bincount(decile, minlength=10), 1)
    zeros = [np.bincount(decile, weights=x, minlength=10) / n for x in (e["zero"], e["truth"] == 0)]
    gap = float(np.abs(zeros[0] - zeros[1]).max())
    items.append(Item(
        part, "zeros", certified.status(gap, 0.02, 0.05), gap,
        f"The model expects {e['zero'].mean():.1%} zeros among hidden counts, {(e['truth'] == 0).mean():.1%} are zero; "
        f"in no tenth of genes do they differ by more than {gap:.1%} of the counts.",
        [{"of": f"genes, tenth {i + 1}", "expected": float(a), "seen": float(b)} for i, (a, b) in
         enumerate(zip(*zeros, strict=True))],
    ))  # fmt: skip
    if most is not None:
        above, own = float(e["above"].mean()), float((e["truth"] > most[e["gene"]]).mean())
        items.append(Item(
            part, "tails", certified.status(above, 2 * own + 1e-4, 10 * own + 1e-3), above,
            f"{1e6 * above:,.0f} in a million draws exceed the largest count of their gene in training; of the true "
            f"counts {1e6 * own:,.0f} do (up to twice as many, and 100, allowed).",
        ))  # fmt: skip
    return items


def _against(name: str, ours: Answers, theirs: Answers, seed: int) -> Item:
    """Paired comparison with a cheap method on the same hidden counts."""
    n = len(ours.count)
    weights = metrics.bootstrap_weights(n, 500, numpy_generator(seed, "certify-resample")) / n
    rows: list[dict[str, Any]] = []
    better = worse = 0
    for metric, title in SCORES.items():
        per_cell = (theirs.sums[metric] - ours.sums[metric]) / (ours.count.mean())
        gain, low, high = metrics.paired_gain(per_cell, weights)
        better, worse = better + (low > 0), worse + (high < 0)
        value = [float(x.sums[metric].sum() / x.count.sum()) for x in (ours, theirs)]
        rows.append({"of": title, OURS: value[0], name: value[1], "gain": gain, "low": low, "high": high})
    trivial = name == "gene mean x depth"
    good = better >= 2 and not worse
    status = "pass" if good else "fail" if trivial or worse >= 2 else "look"
    words = ["worse", "not surely better", "better"]
    comparison = ", ".join(f"{r['of']} {words[(r['low'] > 0) - (r['high'] < 0) + 1]}" for r in rows)
    return Item(
        "Is it worth the trouble?", f"better than {name}", status, rows[0]["gain"],
        f"Against {name}, on the same hidden counts: {comparison} (better only where the 95 % interval of the "
        "difference excludes 0).", rows,
    )  # fmt: skip


def _nulls(model: Asked, trial: Trial, seed: int) -> list[Item]:
    """Cells whose right answer is known."""
    part, rng = "Does it invent what is not there?", numpy_generator(seed, "certify-nulls")
    some = np.sort(rng.permutation(trial.scored.shape[0])[:NULL_CELLS])
    counts, group, keep = trial.scored[some].toarray(), trial.group[some].astype(str), trial.keep
    top = np.argsort(-counts[:, keep].mean(0), kind="stable")[: nulls.TOP]
    logs = partial(log_cp10k, dtype=np.float64)
    real = logs(model.denoise(counts)[0])
    dealt = nulls.permuted(counts, group, rng)
    answer = logs(model.denoise(dealt)[0])[:, top]
    raw = nulls.mean_correlation(logs(dealt[:, keep])[:, top], group)
    corr, floor = (
        nulls.mean_correlation(answer, group),
        nulls.mean_correlation(nulls.permuted(answer, group, rng), group),
    )
    seen, held = (x.toarray().astype(np.float32) for x in split_molecules(
        sparse.csr_matrix(trial.scored[some], dtype=np.int64), 0.5, rng))  # fmt: skip
    rate = model.denoise(seen)[0]
    size = np.maximum(rate.sum(1, keepdims=True, dtype=np.float64), 1e-9)
    share = nulls.real_share(rate[:, top] / size, held[:, keep][:, top] / size, group)
    items = [
        Item(
            part, "co-expression", certified.status(1 - share, 0.2, 0.5), share,
            f"Of the co-expression within groups that denoising shows, molecules that the model had not seen bear out "
            f"{share:.0%} (80 % wanted; less means that genes are made to look alike).",
        ),
        Item(
            part, "genes permuted within groups", "pass" if corr - floor <= 0.02 else "look", corr,
            f"Genes that were made independent have a mean correlation of {corr:.3f} after denoising, {floor:.3f} by "
            f"chance and {raw:.3f} before: what is more than chance the model learnt from its training cells, and says "
            "of any cell.",
        ),
    ]  # fmt: skip
    same = nulls.flat(counts, rng)
    alike, given = logs(model.denoise(same)[0]), logs(same[:, keep])
    remaining = float(alike.var(0).sum() / max(real.var(0).sum(), 1e-12))
    before = float(given.var(0).sum() / max(logs(counts[:, keep]).var(0).sum(), 1e-12))
    items.append(Item(
        part, "cells that are all alike", certified.status(remaining, 0.1, max(0.3, before)), remaining,
        f"Cells that differ by chance and depth alone keep {remaining:.1%} of the variation that denoising shows among "
        f"real cells (0 is right, 10 % allowed; raw counts keep {before:.0%}).",
    ))  # fmt: skip
    name = max(set(group), key=lambda g: int((group == g).sum()))
    found = nulls.halves(real[group == name], rng)
    items.append(Item(
        part, "random halves of one group", certified.status(float(found.mean()), 0.07, 0.15), float(found.mean()),
        f"Random halves of {name} differ in {found.mean():.1%} of genes at p < 0.05 (5 % is chance), in the worst of "
        f"{len(found)} splits in {found.max():.1%}: genes err together, so test raw counts (distdiff.de).",
    ))  # fmt: skip
    markers = nulls.markers_of(trial.reference[:, keep].toarray(), trial.group_of_reference.astype(str))
    if markers:
        expected, present = nulls.leak(rate, held[:, keep], group, markers)
        ratio, chance = (expected + 1) / (present + 1), 3 / np.sqrt(present + 1)
        items.append(Item(
            part, "marker leakage", certified.status(ratio - 1, 0.25 + chance, 1 + chance), ratio,
            f"In cell types that lack them, {sum(map(len, markers.values()))} marker genes are denoised to {ratio:.2f} "
            f"times the {present:,.0f} molecules that are there (1 is right, 1.25 and {chance:.2f} for chance "
            "allowed).",
        ))  # fmt: skip
    return items


def _sources(model: Asked, trial: Trial, found: Model, seed: int) -> list[Item]:
    """How much of the answer is the cell's own, and whether the model knows such cells."""
    part, rng = "Does it know these cells?", numpy_generator(seed, "certify-sources")
    some = np.sort(rng.permutation(trial.scored.shape[0])[:NULL_CELLS])
    counts = trial.scored[some].toarray()
    items = []
    if getattr(found.process, "own", False):
        own = model.denoise(counts)[1]
        mean = counts[:, trial.keep].mean(0)
        rows = [{"of": f"genes, tenth {i + 1}", "prior": float(1 - own[:, certified.bands(mean, 10) == i].mean())}
                for i in range(10) if (certified.bands(mean, 10) == i).any()]  # fmt: skip
        prior = float(1 - own.mean())
        items.append(Item(
            part, "share of the prior", "pass" if prior < 0.9 else "look", prior,
            f"A denoised value is {prior:.0%} what the model expects from the cell's other genes and {1 - prior:.0%} "
            f"the gene's own count ({rows[-1]['prior']:.0%} for the highest tenth of genes): a value of a low gene is "
            "a prediction, not a measurement.", rows,
        ))  # fmt: skip
    if (quantiles := found.info.get("nats")) and trial.about["genes_absent_from_input"] == 0:
        cost = model.nats(counts[:500])
        surprised = float((cost > quantiles["q99"]).mean())
        items.append(Item(
            part, "cells unlike those of training", certified.status(surprised, 0.05, 0.3), surprised,
            f"{surprised:.1%} of cells surprise the model more than 99 % of the cells that were held out from its "
            f"training do (1 % is chance; median {np.median(cost):,.0f} nats, there {quantiles['q50']:,.0f}).",
        ))  # fmt: skip
    known = found.info.get("training", {}).get("labels", {})
    key = next((k for k in known if trial.label == f"obs[{k!r}]"), None)
    if key is not None:
        few = {
            str(g): known[key].get(str(g), 0)
            for g in np.unique(trial.group)
            if g != "missing" and known[key].get(str(g), 0) < 50
        }
        items.append(Item(
            part, "groups with few training cells", "look" if few else "pass", float(len(few)),
            "Every group had 50 training cells or more." if not few else "Fewer than 50 training cells: "
            + ", ".join(f"{g} ({n})" for g, n in few.items()) + "; trust what is said of these groups less.",
        ))  # fmt: skip
    return items
