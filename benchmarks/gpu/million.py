"""Impute a million cells x 2,000 genes: a store to a finished file, reading and writing included.

An untrained default network on made counts, a tenth of the entries hidden. Each task on a store of 65,536 cells, then
on the whole million, if that rate says that it fits into the time left; at last the small store with CUDA
graphs, and with draws by torch instead of our own kernels. ``busy``: share of the time in which a kernel ran.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from _part import DEVICE, Load, Part, beside, made

from distdiff.batch import local
from distdiff.data.store.store import CountStore
from distdiff.model import Model

ORDER = ("1 draw", "mean", "5 draws")


def main() -> None:
    part, by_hand = Part(__doc__), beside("impute")
    few, many, genes = (2048, 4096, 200) if part.dry else (65_536, 1_000_000, 2000)
    began = time.monotonic()
    small = made(part.work, few, genes)
    part.add("made the small store", {"cells": few, "s": round(time.monotonic() - began, 1)})
    model = Model.new(CountStore.open(small).spec(()), {"kind": "counts"}, {"kind": "mlp"})

    def impute(store: Path, task: str, **flags: Any) -> dict[str, Any]:
        out = part.work / "imputed.zarr"
        asked = by_hand.task_of(model, store, out, by_hand.TASKS[task] | {"device": str(DEVICE)} | flags)
        began = time.perf_counter()
        with Load() as load:
            filled = local.run(asked, out, progress=False)
        took = time.perf_counter() - began
        size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        shutil.rmtree(out)
        return {"cells": filled.cells, "s": took, "cells/s": filled.cells / took, "busy": load.busy,
                "bytes a cell": size / filled.cells}  # fmt: skip

    part.case("warm-up", 0, lambda: impute(small, "1 draw"))  # imports, compiled loops, the device's first calls
    task = ORDER[0]
    rates = {task: part.case(f"{few:,}, {task}", 4, lambda: impute(small, task)).get("cells/s")}
    began = time.monotonic()
    large = made(part.work, many, genes, seconds=20)
    part.add("made the large store", {
        "cells": CountStore.open(large).n_cells, "s": round(time.monotonic() - began, 1),
        "note": "where making all cells would take more than 20 s, fewer are made and given to shard several times",
    })  # fmt: skip
    for task in ORDER:
        if task not in rates:
            rates[task] = part.case(f"{few:,}, {task}", 4, lambda task=task: impute(small, task)).get("cells/s")
        if rates[task]:
            part.case(f"{many:,}, {task}", 0.9 * many / rates[task], lambda task=task: impute(large, task))
    if DEVICE.type == "cuda":
        for task in ORDER:
            part.case(f"{few:,}, {task}, graph", 4, lambda task=task: impute(small, task, graph=True))
        os.environ["DISTDIFF_FUSED"] = "0"
        for task in ORDER[1:]:
            part.case(f"{few:,}, {task}, draws by torch", 4, lambda task=task: impute(small, task))
        del os.environ["DISTDIFF_FUSED"]


if __name__ == "__main__":
    main()
