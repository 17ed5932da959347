"""The six Splat sets of scIDPMs, 500 cells x 1000 genes in four groups, made by `distdiff.data.splat`.

python data_prep/splat.py FOLDER
distdiff train --config FOLDER/splat55.yaml

NAME.h5ad holds the observed counts in ``X``, those before dropout in ``layers["true"]`` and the group in ``obs``;
NAME.zarr and NAME.yaml are the store of the observed counts and its config.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _recipe import command_line, finish, run

from distdiff import files
from distdiff.data.splat import SETS, published, rates


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="for the files")
    parser.add_argument("--only", choices=SETS, help="one of the six")
    a = parser.parse_args(arguments)
    for name in [a.only] if a.only else SETS:
        data, want = published(name, a.seed), SETS[name]
        path = a.folder / f"{name}.h5ad"
        with files.whole(path, overwrite=a.overwrite) as temporary:
            data.write_h5ad(temporary)
        dropout, zeros = rates(data)
        print(f"{path}: dropout {dropout:.3f} (published {want.dropout}), zeros {zeros:.3f} ({want.zeros})")
        finish(a, [path], a.folder / f"{name}.zarr", ["group"], overrides=["evaluate.cell_type=group"])


if __name__ == "__main__":
    run(main)
