"""Would sizes fitted to validation cells, as rates are (docs/MATHS.md 5.11), make better laws?

    python benchmarks/sizes.py --data pbmc3k.h5ad baron.h5ad --out benchmarks/results/sizes.json

A model of the config ``default``, blended; then its log sizes changed in ways that take the fewest nats on validation
cells: ``one factor`` for all, one ``by rate`` (six groups with as many predicted molecules), a ``cap``, ``towards the
gene's`` own most likely size. Half of the entries are hidden. Scores are those of benchmarks/defaults.py on test cells,
``sigmas`` the standard errors of the paired difference by which a change is worse than the model as it is.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch
from defaults import Hidden, Law, in_errors, score, sizes, store_of, trained
from small import arguments, splits

from distdiff.data.store.store import CountStore
from distdiff.process._laws import nb_nll

FACTORS = np.linspace(-1.5, 1.5, 31)
"""Logarithms of factors to choose from."""

CAPS = np.arange(-1.0, 8.0, 0.5)
SHARES = np.linspace(0, 1, 11)
GROUPS = 6
SCORES = ("CRPS", "log score")


def nats(of: Hidden, mean: np.ndarray, log_size: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of hidden entries, 0 elsewhere."""
    parts = (torch.from_numpy(np.ascontiguousarray(v, np.float32)) for v in (of.truth, mean, log_size))
    return np.where(of.hidden, nb_nll(*parts).numpy(), 0.0)


def changed(val: Hidden, law: Law, test: Law) -> dict[str, tuple[Any, Law]]:
    """What was chosen on validation cells, and the test cells' law with it."""
    mean, k = law

    def best(candidates: np.ndarray, of: Any) -> float:
        return float(candidates[np.argmin([nats(val, mean, of(c)).sum() for c in candidates])])

    own = sizes(mean, val)
    factor, cap = best(FACTORS, lambda c: k + c), best(CAPS, lambda c: np.minimum(k, c))
    share = best(SHARES, lambda w: (1 - w) * k + w * own)
    rates = np.sort(mean[val.hidden])
    total = rates.cumsum()
    edges = rates[np.searchsorted(total, total[-1] * np.arange(1, GROUPS) / GROUPS)]
    groups = [np.searchsorted(edges, of[0]) for of in (law, test)]
    costs = np.stack([nats(val, mean, k + c) for c in FACTORS])
    by_rate = np.array([FACTORS[np.where(groups[0] == g, costs, 0).sum((1, 2)).argmin()] for g in range(GROUPS)])
    found = {
        "one factor": (factor, test[1] + factor), "by rate": (by_rate.tolist(), test[1] + by_rate[groups[1]]),
        "cap": (cap, np.minimum(test[1], cap)), "towards the gene's": (share, (1 - share) * test[1] + share * own),
    }  # fmt: skip
    return {name: (chosen, (test[0], size.astype(np.float32))) for name, (chosen, size) in found.items()}


def scored(
    laws: dict[str, tuple[Any, Law]], test: Hidden, store: CountStore, of: dict[str, Any]
) -> list[dict[str, Any]]:
    """A record for each law, the first being what the others are compared with."""
    rows, base = [], {}
    for row, (chosen, law) in laws.items():
        scores, cells = score(law, test, store, of["seed"])
        base = base or cells
        sigmas = {name: in_errors(cells[name] - base[name]) for name in SCORES}
        rows.append({**of, "row": row, "chosen": chosen, **scores, "sigmas": sigmas})
        numbers = " ".join(f"{name} {scores[name]:.4f}" for name in (*SCORES, "energy", "correlation"))
        print(f"{of['set']:<22}{of['seed']} {row:<20} {numbers} {sigmas} {chosen}", flush=True)
    return rows


def main() -> None:
    a = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    for path, seed in splits(a.data, a.seeds):
        with tempfile.TemporaryDirectory() as folder:
            store = store_of(path, a.genes, a.cells, seed, Path(folder))
            model, _, _ = trained(store, Path(folder) / "run", [], seed)
            val, test = Hidden(store, "val", seed), Hidden(store, "test", seed)
            law = test.law(model)
            laws = {"as it is": (None, law), **changed(val, val.law(model), law)}
            rows += scored(laws, test, store, {"set": path.stem, "seed": seed})
        _record.write(a.out, began, {"rows": rows})


if __name__ == "__main__":
    main()
