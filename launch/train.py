"""Train under accelerate: ``accelerate launch launch/train.py --config configs/pbmc68k.yaml [key=value ...]``."""

import sys

from distdiff.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
