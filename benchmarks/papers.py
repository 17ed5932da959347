"""The papers' tables on data that can be had: run the same rows with a reduced budget, and write docs/papers.md.

    python benchmarks/papers.py baron --data baron_pancreas_human.h5ad --work FOLDER
    python benchmarks/papers.py mca --data mca_6tissue_mouse.h5ad --work FOLDER
    python benchmarks/papers.py all --data baron_pancreas_human.h5ad --work FOLDER   # or donor, completion, denoising
    python benchmarks/papers.py splat --work FOLDER
    python benchmarks/papers.py page                                     # docs/papers.md from benchmarks/results

``baron`` and ``mca`` are CountsDiff's tables 2 and 3 (``configs/eval/countsdiff_tables.yaml``) on other data, with what
:data:`REDUCED` changes; ``splat`` is ``configs/eval/scidpms_splat.yaml`` with scIDPMs and our own model beside its
rows; ``all``, ``donor``, ``completion`` and ``denoising`` are the grids of these names, ``all`` with a minute of
training for each network. The same command goes on with what was stopped: the results are written after every row.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import Any

import _papers_page
import _record

RESULTS = Path(__file__).parent / "results"

STEPS = {"steps": 200, "batch": 32, "max_cells": 1000}
WALK = {**STEPS, "samples": 3}
REDUCED: dict[str, dict[str, Any]] = {
    "countsdiff": WALK,
    "blackout": WALK,
    "mdlm": WALK,
    "scidpms": {**WALK, "steps": 150, "batch": 16, "walk": 20},
    "scgpt": {**STEPS, "trials": 2},
    "xtrimogene": {**STEPS, "trials": 2},
    "forest": {"levels": 3, "copies": 1, "bins": 16, "max_cells": 500, "samples": 2},
}
"""Options of rows that differ from their defaults, which take hours on a CPU; other rows run as they ship."""

PAPER_ONLY = ("scgpt", "xtrimogene", "mdlm", "blackout", "forest")
"""Rows that run under the first protocol alone, for the time that they take; so does CountsDiff with attrition."""

TYPES = ("cell_type", "donor")
SETS: dict[str, dict[str, Any]] = {
    "baron": {"genes": "cv:200", "min_cells": 100, "labels": TYPES, "cells": 107, "protocols": 2},
    "mca": {
        "genes": "cv:200", "min_cells": 100, "labels": ("cell_type", "tissue"), "cells": 107, "protocols": 1,
        "most": 3000,
    },
    "all": {"genes": "cv:200", "min_cells": 100, "labels": TYPES, "cells": 107, "minutes": 1.0},
    "donor": {"genes": "hvg:1000", "labels": TYPES, "split_by": "donor", "split": (0.5, 0.25, 0.25)},
    "completion": {"genes": "hvg:1000", "labels": TYPES, "store": "pancreas"},
    "denoising": {"genes": "hvg:1000", "labels": TYPES, "store": "pancreas"},
}  # fmt: skip
"""How stores are built (200 genes: those of 100 cells with the highest coefficient of variation), and what of the grid
is another; ``most``: cells taken at all."""

SHIPPED = ("all", "donor", "completion", "denoising")
"""Grids that run as they ship, but for what stands in `SETS`."""

SPLAT_ROWS: tuple[dict[str, Any], ...] = (
    {"train": "default"},
    {"kind": "scidpms", "steps": 40, "batch": 8, "walk": 10, "samples": 2},
)


def store_of(name: str, data: Path, work: Path) -> Path:
    """The store of a set, made once."""
    from distdiff.data.ingest.shard import shard

    about, out = SETS[name], work / f"{SETS[name].get('store', name)}.zarr"
    if out.exists():
        return out
    source = data
    if "most" in about:
        import anndata
        import numpy as np

        cells = anndata.read_h5ad(data)
        labelled = np.flatnonzero(cells.obs[about["labels"][0]].notna().to_numpy())
        source = work / f"{name}.h5ad"
        cells[np.sort(np.random.default_rng(0).permutation(labelled)[: about["most"]])].write_h5ad(source)
    options = {k: about[k] for k in ("genes", "min_cells", "labels", "split_by", "split") if k in about}
    shard([source], out, **options, workers=0, progress=False)
    return out


def grid_of(name: str, store: Path | None) -> dict[str, Any]:
    """The grid that ships, with the reduced budget."""
    from distdiff import config, configtext

    shipped = "scidpms_splat" if name == "splat" else name if name in SHIPPED else "countsdiff_tables"
    raw, _ = configtext.read(config.shipped()["default"].parent / "eval" / f"{shipped}.yaml")
    if name == "splat":
        slow = [row for row in raw["rows"] if row["kind"] in ("saver", "scimpute")]
        return {**raw, "rows": [*(row for row in raw["rows"] if row not in slow), *SPLAT_ROWS, *slow]}
    about = {k: v for k, v in SETS[name].items() if k in ("cells", "minutes")}
    about["data"] = {SETS[name].get("store", name): {"store": str(store), "cell_type": SETS[name]["labels"][0]}}
    if name in SHIPPED:
        return {**raw, **about}
    rows = [{**row, **REDUCED.get(row.get("kind", ""), {})} for row in raw["rows"]]
    late = {"attrition": 2, "forest": 3}  # what takes longest runs last
    rows.sort(key=lambda row: max(late.get(word, row.get("kind") in PAPER_ONLY) for word in (row.get("kind"), *row)))
    protocols = raw["protocols"][: SETS[name]["protocols"]]
    return {**raw, **about, "rows": rows, "draws": 3, "protocols": protocols}


def compact(result: Any) -> list[dict[str, Any]]:
    """Rows of a grid's table with their scores as ``metric: [value, error]``, and those that did not run."""
    from distdiff.grid import table

    out = []
    lines = table.merged(result.table)
    for (data, protocol, row, answer), part in lines.groupby(["data", "protocol", "row", "answer"], sort=False):
        first = part.iloc[0]
        spent = {"fit": first.fit, "fill": first.fill, "capacity": first.capacity, "trials": first.trials}
        scores = {r.metric: [short(r.value), short(r.error)] for r in part.itertuples()}
        about = {"data": data, "protocol": protocol, "row": row, "answer": answer, "note": first.note}
        out.append(about | {"ours": bool(first.ours)} | {k: short(v) for k, v in spent.items()} | {"scores": scores})
    failed = result.table[result.table.status != "done"].drop_duplicates(["data", "protocol", "row"])
    return out + [
        {"data": r.data, "protocol": r.protocol, "row": r.row, "status": r.status, "reason": r.reason}
        for r in failed.itertuples()
    ]


def short(value: float) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def ready(spec: dict[str, Any], folder: Path) -> bool:
    """Whether all cells of a grid of one row and one data set are finished."""
    from distdiff import grid
    from distdiff.grid.cell import finished
    from distdiff.grid.spec import read

    (name,) = spec["data"]
    if "train" in spec["rows"][0] and not list(folder.glob(f"models/{name}-*/grid.json")):
        return False
    cells = grid._cells(read(spec), folder, progress=False)
    return all(finished(folder / "cells" / cell.file) for cell in cells)


def run(name: str, data: Path | None, work: Path, *, finished: bool = False) -> None:
    from distdiff import grid
    from distdiff.data.store.store import CountStore

    began = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    store = None if name == "splat" else store_of(name, Path(data or ""), work)
    spec, rows, content = grid_of(name, store), [], {}
    if store:
        opened = CountStore.open(store)
        content = {"cells": {split: len(opened.rows(split)) for split in ("train", "val", "test")},
                   "genes": len(opened.genes), "data": Path(data or "").name}  # fmt: skip
    for protocol, row in itertools.product(spec["protocols"], spec["rows"]):
        if protocol != spec["protocols"][0] and (row.get("kind") in PAPER_ONLY or "attrition" in row):
            continue
        some = {**spec, "protocols": [protocol], "rows": [row]}
        folder = work / f"grid-{SETS.get(name, {}).get('store', name)}"
        if finished:
            some["data"] = {k: v for k, v in spec["data"].items() if ready({**some, "data": {k: v}}, folder)}
        if some["data"]:
            rows += compact(grid.run(some, folder, progress=False))
        print(f"{time.strftime('%H:%M:%S')} {protocol['protocol']} {row}", flush=True)
        _record.write(RESULTS / f"papers_{name}.json", began, {**content, "spec": without_paths(spec), "rows": rows})


def without_paths(spec: dict[str, Any]) -> dict[str, Any]:
    sets = {k: {**v, "store": Path(v["store"]).name} if "store" in v else v for k, v in spec["data"].items()}
    return {**spec, "data": sets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SETS, "splat", "page"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--finished", action="store_true", help="write what is finished, compute nothing")
    a = parser.parse_args()
    if a.what == "page":
        (RESULTS.parents[1] / "docs" / "papers.md").write_text(_papers_page.page())
        return
    if a.what in SETS and (a.data is None or not a.data.exists()):
        parser.error(f"{a.what} needs --data, the h5ad file of its counts; {a.data} is none")
    if a.work is None:
        parser.error("--work must name a folder for stores, models and finished cells")
    run(a.what, a.data, a.work, finished=a.finished)


if __name__ == "__main__":
    main()
