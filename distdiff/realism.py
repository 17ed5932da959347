"""How real generated cells are: by label, against held-out cells and beside what is cheap.

Each label's cells are compared with the real cells of that label that no network was fitted to (validation and test
cells). The table's controls are training cells drawn again, which is as real as cells can be, but copies, and
draws gene by gene around the label's mean, which know nothing of how genes vary together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from tqdm import tqdm

from distdiff import files
from distdiff.component import nearest
from distdiff.model import Model
from distdiff.report import Column, number, text_block
from distdiff.rng import numpy_generator
from distdiff.tasks.depths import Depth

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

OURS, REAL, COPIES = "distdiff", "held-out cells", "training cells again"
FEW = 15
"""Training cells from which on a label is expected to be learned."""
LEARNED = 20_000
"""Training cells that the classifier learns from and that neighbours are looked for in, at most."""
GENES = 200
"""Genes of the highest mean whose correlations are compared."""

COLUMNS = {
    "recognised": Column("recognised", "high", "cells"),
    "depth_mean": Column("depth", "none", "cells"),
    "depth_sd": Column("sd of depth", "none", "cells"),
    "mean": Column("mean err.", "low", "cells"),
    "zeros": Column("zeros err.", "low", "cells"),
    "energy": Column("energy dist.", "low", "cells"),
    "correlation": Column("corr. err.", "low", "cells"),
    "nearest": Column("nearest", "none", "cells"),
}
"""Scores of one label's cells.

``recognised``: share that a classifier of real training cells takes for the label. ``depth_mean``, ``depth_sd``: of
molecules, over those of all real cells of the label (held-out cells alone are often too few for a spread); the others
against held-out cells. ``mean``: absolute difference of log(1 + mean), average over genes. ``zeros``: of the share of
zeros. ``energy``: energy distance of log(1 + counts). ``correlation``: absolute difference of
gene-gene correlations of log(1 + counts). ``nearest``: median distance to the nearest training cell over that of
held-out cells: 1 as real cells, 0 for copies.
"""

SCVI_MISSING = "left out: scvi-tools is not installed (pip install 'distdiff[baselines]')"


@dataclass
class Realism:
    """Scores by contestant and label.

    Attributes
    ----------
    label
        The label, and ``values``: its values in the order of their training cells.
    rows
        Contestant -> value -> score -> number; the value ``""`` holds means over the values with 15 training cells or
        more.
    training, held_out
        Value -> number of training cells, of held-out cells.
    notes
        What was left out, and why.
    real, generated
        AnnData of the held-out and of the generated cells, for the figure.

    Examples
    --------
    >>> from distdiff.realism import Realism
    >>> scores = dict.fromkeys(("recognised", "depth_mean", "depth_sd", "mean", "zeros", "energy", "correlation",
    ...                         "nearest"), 1.0)  # fmt: skip
    >>> found = Realism("cell_type", ("B",), {"distdiff": {"B": scores, "": scores}}, {"B": 40}, {"B": 9}, {"cells": 9})
    >>> found.metrics()["generate/recognised/B"]
    1.0
    """

    label: str
    values: tuple[str, ...]
    rows: dict[str, dict[str, dict[str, float]]]
    training: dict[str, int]
    held_out: dict[str, int]
    setting: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    real: Any = None
    generated: Any = None

    @property
    def table(self) -> Any:
        """Tidy ``pandas.DataFrame``: cells, label, training cells, metric, value."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"cells": name, "label": value, "training_cells": self.training.get(value), "metric": m, "value": s[m]}
                for name, scored in self.rows.items()
                for value, s in scored.items()
                for m in COLUMNS
            ]
        )

    def claims(self) -> list[str]:
        """Sentences: which labels are recognised less than 90 % as often as their real cells, and few cells."""
        ours, real = self.rows[OURS], self.rows[REAL]
        learned = [v for v in self.values if self.training[v] >= FEW and self.held_out[v]]
        short = [v for v in learned if ours[v]["recognised"] < 0.9 * real[v]["recognised"]]
        claims = [
            f"{len(learned) - len(short)} of {len(learned)} labels with {FEW} training cells or more are recognised at "
            f"least 90 % as often as their held-out cells" + (f"; not {', '.join(short)}" if short else "")
        ]
        if few := [f"{v} ({self.training[v]})" for v in self.values if self.training[v] < FEW]:
            claims.append(f"labels with fewer than {FEW} training cells: {', '.join(few)}")
        return [*claims, *self.notes]

    def metrics(self) -> dict[str, float]:
        """Scores of our own cells, for tracking: ``generate/<score>/<value>``, means without a value."""
        return {
            f"generate/{m}" + (f"/{value}" if value else ""): scores[m]
            for value, scores in self.rows[OURS].items()
            for m in COLUMNS
            if math.isfinite(scores[m])
        }

    def to_text(self) -> str:
        """Aligned text: the means over labels, then each label."""
        s = self.setting
        where = f"{s['store'] or 'a store'} ({s['data']})"
        parts = [
            f"{s['cells']} generated cells a value of {self.label!r} x {s['genes']} genes, {s['steps']} steps, "
            f"guidance {s['guidance']:g}; seed {s['seed']}. Against validation and test cells of {where}. Mean and "
            "spread of depth are multiples of those of all real cells of the label, nearest is the distance to a "
            "training cell as a multiple of that of held-out cells."
        ]
        for value in ("", *self.values):
            title = f"mean of the labels with {FEW} training cells or more"
            if value:
                title = f"{value}: {self.training[value]} training, {self.held_out[value]} held-out cells"
            body = [
                [name, *(number(scored[value][m]) for m in COLUMNS)]
                for name, scored in self.rows.items()
                if value in scored
            ]
            parts.append(f"{title}\n\n" + text_block(["cells", *(c.heading for c in COLUMNS.values())], body))
        return "\n\n".join([*parts, "\n".join(self.claims())]) + "\n"

    def to_json(self, path: str | Path) -> None:
        """Setting, scores and claims as JSON."""
        whole = {
            "setting": self.setting, "label": self.label, "training_cells": self.training,
            "held_out_cells": self.held_out, "rows": self.rows, "claims": self.claims(),
        }  # fmt: skip
        with files.whole(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(_plain(whole), indent=1))

    def write(self, folder: str | Path) -> Path:
        """Write ``generate.txt``, ``generate.json`` and ``depth.png`` into ``folder``; it appears when complete."""
        from distdiff import pl

        with files.whole(folder, overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / "generate.txt").write_text(self.to_text())
            self.to_json(temporary / "generate.json")
            if self.real is not None and self.generated is not None:
                pl.depth(self.real, self.generated, name=self.setting["store"], save=temporary / "depth.png")
        return Path(folder)


def _plain(tree: Any) -> Any:
    """The same without numbers that JSON has not."""
    if isinstance(tree, Mapping):
        return {k: _plain(v) for k, v in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def evaluate_generated(
    model: Model, store: CountStore, *, label: str | None = None, cells: int = 200, seed: int = 0, steps: int = 16,
    guidance: float = 1.0, depth: Depth = None, spacing: Any = None, progress: bool = True, scvi: bool = True,
) -> Realism:  # fmt: skip
    """Generate cells of every value of a label and score them against held-out cells of a store.

    Parameters
    ----------
    store
        Its genes in the model's order; those that it lacks are not compared.
    label
        Label of the model and the store; by default the model's first.
    cells
        Cells to generate of each value, and to draw of each control.
    steps, guidance, depth, spacing
        Of :meth:`Model.generate <distdiff.model.Model.generate>`.
    scvi
        Whether scVI is trained (minutes) for a row of its prior's samples, where scvi-tools is installed.

    Raises
    ------
    ValueError
        No such label, fewer than two of its values among the training cells, or no held-out cells.
    """
    label = label or next(iter(model.spec.labels), "")
    known = [name for name in model.spec.labels if name in store.manifest.labels]
    if label not in known:
        raise ValueError(
            f"evaluate, task='generate', needs a label that both the model and the store have, got {label!r}"
            f"{nearest(label, known)}; train with data.labels, shard with labels="
        )
    if cells < 2:
        raise ValueError(f"evaluate, task='generate': cells must be at least 2, got {cells}")
    data = _Data.of(store, label, seed)
    values = [v for v in data.order() if v in model.spec.labels[label]]
    if len(values) < 2 or not len(data.held_out[1]):
        raise ValueError(
            f"evaluate, task='generate': {len(values)} values of {label!r} have training cells, and there are "
            f"{len(data.held_out[1])} held-out cells; two values and some held-out cells are wanted"
        )
    contestants: dict[str, Callable[[str], sp.csr_matrix]] = {
        OURS: _ours(model, store, label, cells, seed, steps=steps, guidance=guidance, depth=depth, spacing=spacing),
        REAL: lambda value: data.of_value("held_out", value),
        COPIES: lambda value: _again(data.of_value("train", value), cells, data.rng(value)),
        "NB of the label's mean": lambda value: independent(data.of_value("train", value), cells, data.rng(value)),
        "Poisson of the label's mean": lambda value: independent(
            data.of_value("train", value), cells, data.rng(value), poisson=True
        ),
    }
    notes = []
    if scvi:
        try:
            contestants["scVI, prior"] = _scvi(data, cells, seed)
        except ImportError:
            notes.append(f"scVI, prior: {SCVI_MISSING}")
    judge, rows, made = _Judge(data), {name: {} for name in contestants}, []  # type: ignore[var-annotated]
    for value in tqdm(values, desc="generate", unit=" labels", disable=not progress):
        for name, of_value in contestants.items():
            found = of_value(value)
            if found.shape[0]:
                rows[name][value] = judge(found, value, held_out=name == REAL)
            if name == OURS:
                made.append(found)
    training, held_out = data.numbers("train"), data.numbers("held_out")
    for scored in rows.values():
        common = [scored[v] for v in values if v in scored and training[v] >= FEW and held_out[v] >= 2]
        scored[""] = {m: _mean([s[m] for s in common]) for m in COLUMNS}
    setting = {
        "store": store.path.name if hasattr(store, "path") else "", "data": store.manifest.fingerprint[:12],
        "genes": len(store.genes), "cells": cells, "steps": steps, "guidance": guidance, "seed": seed,
        "depth": "drawn" if depth is None else str(depth), "spacing": str(spacing or "default"),
    }  # fmt: skip
    return Realism(
        label, tuple(values), rows, {v: training[v] for v in values}, {v: held_out[v] for v in values}, setting, notes,
        _frame(data.held_out[0], store.genes), _frame(sp.vstack(made, format="csr"), store.genes),
    )  # fmt: skip


def _frame(counts: sp.csr_matrix, genes: tuple[str, ...]) -> Any:
    import anndata as ad
    import pandas as pd

    return ad.AnnData(counts, var=pd.DataFrame(index=list(genes)))


@dataclass
class _Data:
    """Real cells of a store: counts and codes of a label, those without a value left out."""

    names: tuple[str, ...]
    train: tuple[sp.csr_matrix, NDArray[np.int64]]
    held_out: tuple[sp.csr_matrix, NDArray[np.int64]]
    seed: int

    @classmethod
    def of(cls, store: CountStore, label: str, seed: int) -> _Data:
        rng, parts = numpy_generator(seed, "realism"), []
        for splits in (("train",), ("val", "test")):
            rows = np.concatenate([store.rows(split) for split in splits])
            codes = store.labels(rows, [label])[label]
            some = np.sort(rng.permutation(np.flatnonzero(codes >= 0))[:LEARNED])
            order = np.argsort(rows[some], kind="stable")
            some = some[order]
            parts.append((store.read(rows[some]).astype(np.float32), codes[some]))
        return cls(tuple(store.manifest.labels[label]), parts[0], parts[1], seed)

    def numbers(self, split: str) -> dict[str, int]:
        """Cells of each value."""
        codes = getattr(self, split)[1]
        return dict(zip(self.names, np.bincount(codes, minlength=len(self.names)).tolist(), strict=True))

    def order(self) -> list[str]:
        """Values that training cells have, the commonest first."""
        found = self.numbers("train")
        return sorted((v for v in self.names if found[v]), key=lambda v: -found[v])

    def of_value(self, split: str, value: str) -> sp.csr_matrix:
        """Counts of the cells of a value."""
        counts, codes = getattr(self, split)
        return counts[codes == self.names.index(value)]

    def rng(self, value: str) -> np.random.Generator:
        """Chance of the controls of a value."""
        return numpy_generator(self.seed, "realism", value)


def _ours(model: Model, store: CountStore, label: str, cells: int, seed: int, **options: Any) -> Any:
    column = {gene: i for i, gene in enumerate(model.spec.genes)}
    at = [column[gene] for gene in store.genes]

    def generated(value: str) -> sp.csr_matrix:
        # one seed for all values would give their cells the same chances, and the means over values all of its luck
        own = int(numpy_generator(seed, "realism", "generate", value).integers(2**31))
        return model.generate(cells, {label: value}, seed=own, **options).X[:, at]

    return generated


def _again(counts: sp.csr_matrix, cells: int, rng: np.random.Generator) -> sp.csr_matrix:
    """Training cells, drawn with replacement."""
    return counts[rng.integers(0, counts.shape[0], cells)]


def independent(counts: sp.csr_matrix, cells: int, rng: np.random.Generator, *, poisson: bool = False) -> sp.csr_matrix:
    """Each gene by itself: Poisson, or the negative binomial of its mean and variance in ``counts``.

    Examples
    --------
    >>> import numpy as np
    >>> import scipy.sparse as sp
    >>> from distdiff.realism import independent
    >>> seen = sp.csr_matrix(np.random.default_rng(0).poisson([[0.5, 4.0]] * 50))
    >>> independent(seen, cells=3, rng=np.random.default_rng(1)).shape
    (3, 2)
    """
    mean = np.asarray(counts.mean(0)).ravel().astype(np.float64)
    over = np.zeros_like(mean)
    if not poisson and counts.shape[0] > 1:
        square = np.asarray(counts.multiply(counts).mean(0)).ravel()
        variance = (square - mean**2) * counts.shape[0] / (counts.shape[0] - 1)
        over = np.maximum(variance - mean, 0) / np.maximum(mean, 1e-12) ** 2  # 1 / size
    varies = over > 1e-9
    rate = np.broadcast_to(mean, (cells, len(mean))).copy()
    rate[:, varies] *= rng.gamma(1 / over[varies], over[varies], (cells, int(varies.sum())))
    return sp.csr_matrix(rng.poisson(rate).astype(np.float32))


def _scvi(data: _Data, cells: int, seed: int) -> Callable[[str], sp.csr_matrix]:
    """Cells of scVI, told the label: latents of its prior, library sizes of the label's training cells."""
    from distdiff.baselines.scvi import prior_sampler

    counts, codes = data.train
    draw = prior_sampler(counts, codes, seed=seed)

    def of_value(value: str) -> sp.csr_matrix:
        library = depths(data.of_value("train", value))
        return draw(data.names.index(value), data.rng(value).choice(library, cells))

    return of_value


class _Judge:
    """Scores of cells of one value; the classifier and the neighbours are of the training cells."""

    def __init__(self, data: _Data) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.data = data
        counts, codes = data.train
        shown = log_cp10k(counts)
        self.classifier = classifier(shown, codes)
        self.neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(shown)

    def __call__(self, counts: sp.csr_matrix, value: str, *, held_out: bool = False) -> dict[str, float]:
        real, code = self.data.of_value("held_out", value), self.data.names.index(value)
        depth, all_depths = (
            depths(counts),
            np.concatenate((depths(real), depths(self.data.of_value("train", value)))),
        )
        spread = all_depths.std(ddof=1) if len(all_depths) > 1 else math.nan
        found = dict.fromkeys(COLUMNS, math.nan) | {
            "recognised": float((self.classifier.predict(log_cp10k(counts)) == code).mean()),
            "depth_mean": float(depth.mean() / all_depths.mean()),
            "depth_sd": float(depth.std(ddof=1) / spread) if len(depth) > 1 and spread > 0 else math.nan,
        }
        if not real.shape[0]:
            return found
        found["nearest"] = self._distance(counts) / self._distance(real)
        if held_out:  # their own truth
            return found
        a, b = np.log1p(counts.toarray()), np.log1p(real.toarray())
        means = [np.log1p(np.asarray(x.mean(0)).ravel()) for x in (counts, real)]
        zeros = [1 - x.getnnz(0) / x.shape[0] for x in (counts, real)]
        return found | {
            "mean": float(np.abs(means[0] - means[1]).mean()),
            "zeros": float(np.abs(zeros[0] - zeros[1]).mean()),
            "energy": energy(a, b),
            "correlation": correlation(a, b),
        }

    def _distance(self, counts: sp.csr_matrix) -> float:
        """Median distance of log(1 + CP10k) to the nearest training cell."""
        return float(np.median(self.neighbours.kneighbors(log_cp10k(counts))[0]))


def _mean(values: list[float]) -> float:
    """Mean of those that are numbers."""
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else math.nan


def classifier(shown: sp.csr_matrix, codes: NDArray[np.int64]) -> Any:
    """Logistic regression of label codes ``[n]`` on log CP10k ``[n g]``, every label weighing the same.

    Examples
    --------
    >>> import numpy as np
    >>> import scipy.sparse as sp
    >>> from distdiff.realism import classifier
    >>> shown = sp.csr_matrix([[5.0, 0.0], [4.0, 1.0], [0.0, 5.0]])
    >>> classifier(shown, np.array([0, 0, 1])).predict(shown).tolist()
    [0, 0, 1]
    """
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=500, class_weight="balanced").fit(shown, codes)


def depths(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Molecules of each cell ``[n]``.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> from distdiff.realism import depths
    >>> depths(sp.csr_matrix([[1.0, 2.0], [0.0, 0.0]]))
    array([3., 0.])
    """
    return np.asarray(counts.sum(1), dtype=np.float64).ravel()


def log_cp10k(counts: sp.csr_matrix) -> sp.csr_matrix:
    """``log(1 + 10,000 x / depth)``, sparse as the counts are; a cell without molecules stays zero.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> from distdiff.realism import log_cp10k
    >>> log_cp10k(sp.csr_matrix([[1.0, 1.0], [0.0, 0.0]])).toarray().round(1)
    array([[8.5, 8.5],
           [0. , 0. ]])
    """
    depth = depths(counts)
    return (sp.diags_array(1e4 / np.maximum(depth, 1)) @ counts).tocsr().log1p()


def energy(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Energy distance ``2 E|a - b| - E|a - a'| - E|b - b'|`` of two samples of vectors, without bias; NaN below two.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.realism import energy
    >>> rng = np.random.default_rng(0)
    >>> round(energy(rng.normal(size=(500, 2)), rng.normal(size=(500, 2)) + 3), 1)
    5.5
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    within = [cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * cdist(a, b).mean() - sum(within))


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Mean absolute difference of gene-gene correlations, over the :data:`GENES` genes of the highest mean in ``b``.

    Pairs in which a gene is constant in either sample are left out; NaN where none is left.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.realism import correlation
    >>> x = np.random.default_rng(0).normal(size=(100, 1))
    >>> round(correlation(np.hstack((x, -x)), np.hstack((x, x))), 6)  # from 1 to -1
    2.0
    """
    genes = np.argsort(-b.mean(0), kind="stable")[:GENES]
    x, y = a[:, genes], b[:, genes]
    varies = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
    if min(len(a), len(b)) < 3 or varies.sum() < 2:
        return math.nan
    gap = np.abs(np.corrcoef(x[:, varies].T) - np.corrcoef(y[:, varies].T))
    return float(gap[np.triu_indices(len(gap), 1)].mean())
