"""Train under accelerate: ``accelerate launch launch/train.py --config configs/pbmc68k.yaml [key=value ...]``."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from distdiff.cli import main

if __name__ == "__main__":
    record(main)(["train", *sys.argv[1:]])  # the launcher's last words are then the first failure's
