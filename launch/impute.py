"""Impute under accelerate: ``accelerate launch launch/impute.py --model M --data atlas.zarr --out X.zarr``.

Options as of ``distdiff impute``. The processes say nothing to each other: each takes output shards that nobody has.
"""

import sys

from distdiff.cli import main

if __name__ == "__main__":
    main(["impute", *sys.argv[1:]])
