"""What the light grid takes: CPU seconds and peak memory of every row, at two numbers of cells.

    python benchmarks/light.py --data mca_6tissue_mouse.h5ad --cell-type cell_type --cells 750 1500 --work FOLDER

Each size is a random subset of the labelled cells and the 2,000 genes of the most cells, in a process of its own. Peak
memory is that of the whole process; ``peak_mib_per_1000_cells`` is its slope between the two sizes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import _record

GENES = 2000


def one(data: Path, cell_type: str, cells: int, out: Any) -> None:
    """The light grid on ``cells`` cells, to the queue ``out``."""
    import anndata
    import numpy as np

    from distdiff import grid
    from distdiff.data.ingest.shard import shard
    from distdiff.grid.cell import peak_memory

    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), anndata.read_h5ad(data)
        some = np.flatnonzero(whole.obs[cell_type].notna().to_numpy())
        some = np.sort(np.random.default_rng(0).permutation(some)[:cells])
        whole[some].write_h5ad(folder / "some.h5ad")
        del whole
        shard(
            [folder / "some.h5ad"], folder / "some.zarr", genes=f"top:{GENES}", labels=(cell_type,), workers=0,
            progress=False,
        )  # fmt: skip
        peak_memory(restart=True)
        began, began_cpu = time.perf_counter(), time.process_time()
        result = grid.run(
            "light", folder / "out", data=[str(folder / "some.zarr")], overrides=[f"cell_type={cell_type}"],
            progress=False,
        )  # fmt: skip
        took = time.perf_counter() - began, time.process_time() - began_cpu
        rows = {}
        for path in (folder / "out" / "cells").iterdir():
            record = json.loads(path.read_text())
            first = record["answers"][0]
            rows[record["row"]] = {
                "fit_cpu_s": round(first["fit_cpu_seconds"], 2), "fill_cpu_s": round(first["fill_cpu_seconds"], 2),
                "peak_mib": round(record["peak_mib"]),
            }  # fmt: skip
        bad = result.table[result.table.status != "done"].row.unique().tolist()
    out.put({"cells": cells, "wall_s": round(took[0], 1), "cpu_s": round(took[1], 1), "rows": rows, "not_run": bad})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cell-type", required=True)
    parser.add_argument("--cells", type=int, nargs=2, default=[750, 1500])
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps each size's measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "light.json")
    a = parser.parse_args()
    began, context, found = time.perf_counter(), multiprocessing.get_context("spawn"), []
    a.work.mkdir(parents=True, exist_ok=True)
    for cells in a.cells:
        kept = a.work / f"light-{cells}.json"
        if not kept.exists():
            queue = context.Queue()
            process = context.Process(target=one, args=(a.data, a.cell_type, cells, queue))
            process.start()
            measured = queue.get()
            process.join()
            kept.write_text(json.dumps(measured, indent=1))
        found.append(json.loads(kept.read_text()))
    small, large = found
    slope = {
        row: round(1000 * (large["rows"][row]["peak_mib"] - spent["peak_mib"]) / (a.cells[1] - a.cells[0]), 1)
        for row, spent in small["rows"].items()
    }
    _record.write(a.out, began, {"data": a.data.name, "genes": GENES, "sizes": found, "peak_mib_per_1000_cells": slope})


if __name__ == "__main__":
    main()
