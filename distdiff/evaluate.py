"""The honest table: hide entries of held-out cells, let every imputer fill the same ones, score all the same way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from distdiff import files, metrics
from distdiff.component import build, nearest
from distdiff.data.masks import dropout_sites, expressed, mcar
from distdiff.impute import Imputer
from distdiff.rng import numpy_generator
from distdiff.types import Cells

if TYPE_CHECKING:
    from distdiff.data.store import CountStore

ANSWERS = ("mean", "1 draw", "draws")

MMD_CELLS = 2000
"""MMD compares at most so many cells, chosen at random, the same for every imputer: its matrices are cells x cells."""


@dataclass(frozen=True)
class Column:
    """One metric: heading, whether the largest, smallest or the nearest to zero is best, and the block it stands in."""

    heading: str
    best: str
    block: str


COLUMNS = {
    "deviance": Column("deviance", "low", "means"),
    "log1p_mse": Column("log1p MSE", "low", "means"),
    "rmse": Column("RMSE", "low", "means"),
    "mae": Column("MAE", "low", "means"),
    "bias": Column("bias", "zero", "means"),
    "pearson": Column("Pearson", "high", "means"),
    "spearman": Column("Spearman", "high", "means"),
    "crps": Column("CRPS", "low", "laws"),
    "energy": Column("energy dist.", "low", "laws"),
    "mmd": Column("MMD^2 x 1000", "low", "laws"),
    "swd": Column("sliced W2", "low", "laws"),
    "correlation": Column("corr. error", "low", "laws"),
    "fit_seconds": Column("fit s", "none", "laws"),
    "fill_seconds": Column("fill s", "none", "laws"),
}
BLOCKS = {
    "means": "Scores of the answer as a point (Poisson deviance is the headline for means)",
    "laws": "Scores of the answer as a law (CRPS is the headline for draws)",
}


@dataclass(frozen=True)
class Contestant:
    """An imputer and the rows it fills: ``mean``, ``1 draw``, ``draws`` (the ensemble; its mean is the point)."""

    name: str
    imputer: Imputer
    answers: tuple[str, ...] = ("mean",)

    def __post_init__(self) -> None:
        for answer in self.answers:
            if answer not in ANSWERS:
                raise ValueError(f"contestant {self.name!r}: unknown answer {answer!r}{nearest(answer, ANSWERS)}")


@dataclass
class Row:
    """One line of the table.

    Attributes
    ----------
    values, errors
        Metric -> value, and its standard error by bootstrap over cells.
    replicates
        Metric -> ``float64 [R]``; the same resamples for every row, so differences are paired.
    note
        ``control`` (a yardstick), ``peeks`` (knows something made from the hidden entries) or nothing.
    """

    name: str
    values: dict[str, float]
    errors: dict[str, float]
    replicates: dict[str, NDArray[np.float64]]
    note: str = ""


@dataclass
class Report:
    """The table and what the figures need."""

    rows: list[Row]
    setting: dict[str, Any]
    truth: NDArray[np.float32]
    targets: NDArray[np.bool_]
    mean: NDArray[np.float32] | None = None
    draws: NDArray[np.float32] | None = None
    ours: str = "distdiff"
    lines: list[str] = field(default_factory=list)

    @property
    def table(self) -> Any:
        """Tidy ``pandas.DataFrame``: imputer, metric, value, error, note."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"imputer": r.name, "metric": m, "value": r.values[m], "error": r.errors.get(m), "note": r.note}
                for r in self.rows
                for m in COLUMNS
            ]
        )

    def claims(self) -> list[str]:
        """Plain sentences on the headline metrics: who is first, and whether resampling cells could undo it."""
        k = self.setting["draws"]
        wanted = (("deviance", "mean"), ("crps", f"{k} draws"), ("energy", "1 draw"))
        names = {"deviance": "Poisson deviance", "crps": "CRPS", "energy": "energy distance"}
        out = []
        for metric, suffix in wanted:
            mine = next((r for r in self.rows if r.name == f"{self.ours} {suffix}"), None)
            others = [r for r in self.rows if not r.note.startswith("control") and not r.name.startswith(self.ours)]
            others = [r for r in others if math.isfinite(r.values[metric])]
            if mine is None or not others:
                continue
            rival = min(others, key=lambda r: r.values[metric])
            low, high = np.nanquantile(rival.replicates[metric] - mine.replicates[metric], [0.025, 0.975])
            ahead = mine.values[metric] < rival.values[metric]
            sure = low > 0 if ahead else high < 0
            known = ", which peeks" if rival.note == "peeks" else ""
            out.append(
                f"{mine.name} is {'first' if ahead else 'NOT first'} in {names[metric]}: "
                f"{mine.values[metric]:.4g} against {rival.values[metric]:.4g} of {rival.name}{known} (95 % of "
                f"resamples: difference {low:.3g} to {high:.3g}"
                f"{'' if sure else '; not a safe order'})"
            )
        return out

    def to_text(self) -> str:
        """Aligned text; ``*`` marks the best of a column, brackets hold the standard error of the last digits."""
        return self._render(_text_block)

    def to_markdown(self) -> str:
        """The same as Markdown tables."""
        return self._render(_markdown_block)

    def metrics(self) -> dict[str, float]:
        """Flat numbers of our own rows, for a tracker: ``test/<metric>/<row>``."""
        mine = (r for r in self.rows if r.name.startswith(self.ours))
        return {f"test/{m}/{r.name}": r.values[m] for r in mine for m in COLUMNS}

    def to_json(self, path: str | Path) -> None:
        """Setting, rows and claims as JSON."""
        rows = [{"imputer": r.name, "note": r.note, "values": r.values, "errors": r.errors} for r in self.rows]
        text = json.dumps({"setting": self.setting, "rows": rows, "claims": self.claims()}, indent=1)
        with files.whole(path, overwrite=True) as temporary:
            temporary.write_text(text)

    def write(self, folder: str | Path) -> Path:
        """Write ``table.md``, ``table.json`` and ``calibration.png`` into ``folder``, whole or not at all."""
        from distdiff.plots import calibration

        with files.whole(folder, overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / "table.md").write_text(self.to_markdown())
            self.to_json(temporary / "table.json")
            if self.draws is not None and self.mean is not None:
                calibration(self.truth, self.targets, self.mean, self.draws, temporary / "calibration.png")
        return Path(folder)

    def _render(self, block: Callable[[list[str], list[list[str]]], str]) -> str:
        competing = sorted((r for r in self.rows if not r.note.startswith("control")), key=_by_deviance)
        controls = sorted((r for r in self.rows if r.note.startswith("control")), key=_by_deviance)
        parts = [_describe(self.setting)]
        for name, title in BLOCKS.items():
            keys = [m for m, c in COLUMNS.items() if c.block == name]
            best = {m: _best(competing, m) for m in keys}
            body = [
                [f"{r.name}{' +' if r.note == 'peeks' else ''}", *(_cell(r, m, best[m]) for m in keys)]
                for r in [*competing, *controls]
            ]
            parts.append(f"{title}\n\n{block(['imputer', *(COLUMNS[m].heading for m in keys)], body)}")
        parts.append("\n".join(["+ peeks: the labels were made from the full counts", *self.claims()]))
        return "\n\n".join(parts) + "\n"


def default_contestants(
    cell_type: str | None, *, extra: Sequence[Contestant] = (), rate: float = 0.5
) -> list[Contestant]:
    """The baselines of every table, after ``extra``.

    Parameters
    ----------
    cell_type
        Label of the cell-type rows; ``None`` leaves them out.
    extra
        The contestants to compare with.
    rate
        Share of entries that the baselines with options to choose hide while they choose: that of the evaluation.
    """
    from distdiff.baselines import Baseline

    rows: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"kind": "knn", "hide": rate}, ANSWERS),
        ({"kind": "pca", "hide": rate}, ("mean",)),
        ({"kind": "ridge", "hide": rate}, ("mean",)),
        ({"kind": "gene_mean", "depth": True}, ("mean",)),
        ({"kind": "gene_mean"}, ("mean",)),
    ]
    if cell_type is not None:
        rows += [({"kind": "type_mean", "key": cell_type, "depth": d}, ("mean",)) for d in (True, False)]
    rows += [({"kind": "zero"}, ("mean",)), ({"kind": "constant"}, ("mean",)), ({"kind": "perfect"}, ("mean",))]
    made = [(build(Baseline, options), answers) for options, answers in rows]
    return [*extra, *(Contestant(baseline.label, baseline, answers) for baseline, answers in made)]


def evaluate(
    store: CountStore,
    rows: np.ndarray,
    contestants: Sequence[Contestant],
    *,
    rate: float = 0.5,
    protocol: str = "mcar",
    draws: int = 5,
    seed: int = 0,
    batch: int = 256,
    labels: Sequence[str] = (),
    groups: str | None = None,
    resamples: tuple[int, int] = (200, 40),
    progress: bool = True,
) -> Report:
    """Score imputers on cells ``rows`` of a store; each is fitted on the training cells first.

    Parameters
    ----------
    rate, protocol
        ``mcar``: every entry is hidden with probability ``rate``, zeros included, and scored. ``paper``: the published
        protocol; zeros of a gene that some cell of the same ``groups`` value expresses count as missing: they are
        neither evidence nor scored, so that almost every target is a non-zero count.
    draws
        Draws of an ensemble.
    labels
        Covariates given to the imputers.
    groups
        Label of the ``paper`` protocol's groups.
    resamples
        Bootstrap replicates over cells of per-cell scores, and of scores of distributions.

    Raises
    ------
    ValueError
        No cells, a rate outside (0, 1), an unknown protocol, ``paper`` without groups, no entry to score.
    """
    if not len(rows):
        raise ValueError("no cells to evaluate on")
    keys = tuple(dict.fromkeys([*labels, *([groups] if groups else []), *_label_keys(contestants)]))
    cells = store.cells(rows, keys)
    truth = cells.counts.numpy()
    hidden = mcar(truth.shape, rate, numpy_generator(seed, "evaluate"))
    observed, targets = _protocol(store, rows, protocol, groups, hidden)
    if not targets.any():
        raise ValueError(f"protocol {protocol!r} at rate {rate} leaves no entry to score in {len(rows)} cells")
    score = _Score(truth, targets, seed, resamples)
    setting = {
        "store": store.path.name if hasattr(store, "path") else "", "data": store.manifest.fingerprint[:12],
        "cells": len(rows), "genes": truth.shape[1], "targets": int(targets.sum()),
        "zeros_among_targets": float((truth[targets] == 0).mean()), "protocol": protocol, "rate": rate,
        "draws": draws, "seed": seed,
    }  # fmt: skip
    report = Report([], setting, truth, targets)
    bar = tqdm(contestants, desc="evaluate", unit=" imputers", disable=not progress)
    for contestant in bar:
        bar.set_postfix_str(contestant.name)
        began = time.perf_counter()
        contestant.imputer.fit(store, store.rows("train"))
        fitted = time.perf_counter()
        wanted = draws if set(contestant.answers) & {"1 draw", "draws"} else 0
        mean, drawn = _fill(contestant.imputer, cells, observed, wanted, seed, batch)
        seconds = {"fit_seconds": fitted - began, "fill_seconds": time.perf_counter() - fitted}
        report.rows += _rows(contestant, mean, drawn, score, seconds)
        if contestant.name == report.ours:
            report.mean, report.draws = mean, drawn
    return report


def _label_keys(contestants: Sequence[Contestant]) -> list[str]:
    return [c.imputer.key for c in contestants if hasattr(c.imputer, "key")]


def _protocol(
    store: CountStore, rows: np.ndarray, protocol: str, groups: str | None, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which entries are evidence and which are scored: ``bool [b g]`` each."""
    if protocol == "mcar":
        return ~hidden, hidden
    if protocol != "paper":
        raise ValueError(f"unknown protocol {protocol!r}{nearest(protocol, ('mcar', 'paper'))}")
    if groups is None:
        raise ValueError("protocol 'paper' needs the label of the cell groups (--cell-type)")
    everyone = store.rows("all")
    code = store.labels(everyone, [groups])[groups]
    some = np.zeros((int(code.max()) + 1, hidden.shape[1]), dtype=bool)
    for start in range(0, len(everyone), 4096):
        part = everyone[start : start + 4096]
        some |= expressed(store.read(part), code[part], n_groups=len(some))
    missing = dropout_sites(store.read(rows), code[rows], some)
    return ~hidden & ~missing, hidden & ~missing


def _fill(
    imputer: Imputer, cells: Cells, observed: np.ndarray, draws: int, seed: int, batch: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Impute batch by batch; hidden counts are erased, except for the imputer that is the truth."""
    means, drawn, device = [], [], _device(imputer)
    for start in range(0, len(cells), batch):
        part, seen = cells[start : start + batch], torch.from_numpy(observed[start : start + batch])
        if not getattr(imputer, "sees_hidden", False):
            part = Cells(torch.where(seen, part.counts, torch.zeros(())), part.labels, part.rows)
        answer = imputer.impute(part.to(device), seen.to(device), draws=draws, seed=seed)
        means.append(answer.mean.cpu().numpy())
        if answer.draws is not None:
            drawn.append(answer.draws.cpu().numpy())
    return np.concatenate(means), np.concatenate(drawn, 1) if drawn else None


def _device(imputer: Imputer) -> torch.device:
    network = getattr(imputer, "denoiser", None)
    return next(network.parameters()).device if network is not None else torch.device("cpu")


def _rows(
    contestant: Contestant, mean: np.ndarray, drawn: np.ndarray | None, score: _Score, seconds: dict[str, float]
) -> list[Row]:
    imputer, out = contestant.imputer, []
    note = "control" if getattr(imputer, "control", False) else "peeks" if getattr(imputer, "peeks", False) else ""
    for answer in contestant.answers:
        if answer == "mean":
            point, law = mean, None
        else:
            if drawn is None:
                raise ValueError(
                    f"contestant {contestant.name!r}: answer {answer!r} needs draws, its imputer gave none"
                )
            point, law = (drawn[0], None) if answer == "1 draw" else (drawn.mean(0), drawn)
        suffix = answer if answer != "draws" else f"{len(law) if law is not None else 0} draws"
        name = contestant.name if contestant.answers == ("mean",) else f"{contestant.name} {suffix}"
        values, errors, replicates = score(point, law)
        out.append(Row(name, values | seconds, errors, replicates, note))
    return out


class _Score:
    """All metrics of one answer, with the same bootstrap resamples and directions for every imputer.

    Completed cells are the truth with its targets replaced, as in the papers: entries that are neither evidence nor
    target (``paper`` protocol) stay as they are.
    """

    def __init__(self, truth: np.ndarray, targets: np.ndarray, seed: int, resamples: tuple[int, int]) -> None:
        n, genes = truth.shape
        rng = numpy_generator(seed, "bootstrap")
        self.truth, self.targets = truth, targets
        self.many = np.concatenate((metrics.once(n), metrics.bootstrap_weights(n, resamples[0], rng)))
        self.few = self.many[: 1 + resamples[1]]
        self.log_truth = np.log1p(truth)
        self.directions = metrics.unit_directions(genes, 500, rng)
        self.count = targets.sum(1)
        self.some = np.sort(rng.permutation(n)[:MMD_CELLS])

    def __call__(
        self, point: np.ndarray, law: np.ndarray | None
    ) -> tuple[dict[str, float], dict[str, float], dict[str, NDArray[np.float64]]]:
        t, m = self.truth, self.targets

        def pooled(sums: NDArray[np.floating]) -> NDArray[np.floating]:
            return metrics.pooled(sums, self.count, self.many)

        log_point = np.where(m, np.log1p(np.maximum(point, 0)), self.log_truth)  # only targets may differ
        found: dict[str, Any] = {
            "deviance": pooled(metrics.poisson_deviance(t, m, point)),
            "log1p_mse": pooled(metrics.log1p_squared_error(t, m, point)),
            "rmse": np.sqrt(pooled(metrics.squared_error(t, m, point))),
            "mae": pooled(metrics.absolute_error(t, m, point)),
            "bias": pooled(metrics.error(t, m, point)),
            "pearson": metrics.cell_mean(metrics.pearson(t, m, point), self.many),
            "spearman": metrics.cell_mean(metrics.spearman(t, m, point), self.many),
            "crps": pooled(metrics.crps(t, m, law if law is not None else point[None])),
            "energy": metrics.energy_distance(t, m, point, self.few),
            "mmd": self._mmd(log_point),
            "swd": metrics.sliced_wasserstein(self.log_truth, log_point, self.few, self.directions),
            "correlation": metrics.correlation_error(self.log_truth, log_point, self.few),
        }
        values = {k: float(v[0]) for k, v in found.items()}
        replicates = {k: np.asarray(v[1:], dtype=np.float64) for k, v in found.items()}
        errors = {k: float(np.nanstd(v)) if np.isfinite(v).any() else math.nan for k, v in replicates.items()}
        return values, errors, replicates

    def _mmd(self, log_point: NDArray[np.floating]) -> NDArray[np.floating]:
        if len(self.some) < 2:
            return np.full(len(self.few), np.nan)
        return 1000 * metrics.mmd(self.log_truth[self.some], log_point[self.some], self.few[:, self.some])


def _by_deviance(row: Row) -> float:
    return row.values["deviance"]


def _best(rows: Sequence[Row], metric: str) -> float:
    values = [r.values[metric] for r in rows if math.isfinite(r.values[metric])]
    rule = COLUMNS[metric].best
    if not values or rule == "none":
        return math.nan
    if rule == "zero":
        return min(values, key=abs)
    return max(values) if rule == "high" else min(values)


def _cell(row: Row, metric: str, best: float) -> str:
    value, error = row.values[metric], row.errors.get(metric, math.nan)
    star = "*" if value == best and not row.note.startswith("control") else ""
    return number(value, error) + star


def number(value: float, error: float = math.nan) -> str:
    """``0.9502(31)``: the value and, in brackets, two digits of its standard error in units of the last digits."""
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(error) or error <= 1e-12 or error < 1e-6 * abs(value):
        return f"{value:.3g}"
    places = 1 - math.floor(math.log10(float(f"{error:.1e}")))  # rounded first: .00999 has the digits of .010
    if places <= 0:
        return f"{value:.0f}({error:.0f})"
    return f"{value:.{places}f}({round(error * 10**places)})"


def _describe(s: dict[str, Any]) -> str:
    return (
        f"{s['cells']} held-out cells x {s['genes']} genes of {s['store'] or 'a store'} ({s['data']}), protocol "
        f"{s['protocol']}, {s['rate']:.0%} hidden: {s['targets']:,} entries scored, {s['zeros_among_targets']:.0%} of "
        f"them zero; seed {s['seed']}. MMD, sliced W2 and correlations on log1p counts of completed cells."
    )


def _text_block(head: list[str], body: list[list[str]]) -> str:
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join([line[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(line[1:], width[1:], strict=True))])
        for line in [head, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _markdown_block(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("*", "**★**")
