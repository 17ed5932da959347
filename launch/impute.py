"""Impute under accelerate: ``accelerate launch launch/impute.py --model M --data atlas.zarr --out X.zarr``.

Options as of ``distdiff impute``. Rank r of ``world`` processes computes every world-th of the output shards that are
missing, beginning with the r-th; rank 0 puts the result together. All processes must see the folder of the output.
"""

import sys

from distdiff.cli import main

if __name__ == "__main__":
    main(["impute", *sys.argv[1:]])
