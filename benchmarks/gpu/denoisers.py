"""Which denoiser when, with a GPU: held-out scores after equal seconds of training on a small real data set.

.gpu/small.h5ad (pack.sh brings it), its 2,000 most variable genes; without it made counts (Splat), which is said.
Curves against seconds; score and protocol are those of benchmarks/denoisers.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _part import DEVICE, Part, beside

SMALL = Path(__file__).parents[2] / ".gpu" / "small.h5ad"
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "mlp": ({"kind": "mlp"}, 512),
    "latent": ({"kind": "latent"}, 256),
    "transformer": ({"kind": "transformer"}, 128),
    "transformer, width 256": ({"kind": "transformer", "width": 256, "depth": 4, "heads": 8}, 128),
}
OVERHEAD = 4.0
"""Seconds a network besides training: first steps, scores along the curve."""


def main() -> None:
    part, script = Part(__doc__), beside("denoisers")
    from distdiff.data.ingest.shard import shard

    store = part.work / "small.zarr"
    if SMALL.exists() and not part.dry:
        data = SMALL
    else:
        from distdiff.data.splat import SETS, published

        data = part.work / "splat.h5ad"
        published(next(iter(SETS))).write_h5ad(data)
    shard([data], store, genes="hvg:200" if part.dry else "hvg:2000", progress=False)
    seconds = 1.0 if part.dry else (part.left() - 6) / len(NETWORKS) - OVERHEAD
    part.add("setting", {"data": data.name, "seconds": seconds, "device": DEVICE.type})
    for name, (options, batch) in NETWORKS.items():
        if part.dry and "width" in name:
            continue
        batch = 32 if part.dry else batch

        def one(options: dict[str, Any] = options, batch: int = batch) -> dict[str, Any]:
            return script.trained(options, str(store), seconds, 0, batch=batch, device=DEVICE)

        part.case(name, seconds, one)


if __name__ == "__main__":
    main()
