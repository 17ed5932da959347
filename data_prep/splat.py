"""The six Splat sets of 500 cells x 1000 genes as h5ad files: ``python data_prep/splat.py FOLDER [--seed 0]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from distdiff import files
from distdiff.data.splat import SETS, published, rates

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    a = parser.parse_args()
    for name, want in SETS.items():
        data = published(name, a.seed)
        with files.whole(a.folder / f"{name}.h5ad", overwrite=a.overwrite) as temporary:
            data.write_h5ad(temporary)
        dropout, zeros = rates(data)
        print(f"{name}.h5ad: dropout {dropout:.3f} (published {want.dropout}), zeros {zeros:.3f} ({want.zeros})")
