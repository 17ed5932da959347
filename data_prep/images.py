"""Images as h5ad files of counts, for `distdiff shard` and configs/cifar10.yaml, configs/celeba64.yaml.

python data_prep/images.py cifar10 cifar-10-batches-bin cifar10.h5ad
python data_prep/images.py folder img_align_celeba celeba64.h5ad --crop 178 --size 64
distdiff shard cifar10.h5ad --out cifar10.zarr --labels label
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distdiff.data import images

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cifar10", "folder"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--crop", type=int)
    parser.add_argument("--overwrite", action="store_true")
    a = parser.parse_args()
    data = images.cifar10(a.source) if a.kind == "cifar10" else images.folder(a.source, a.size, a.crop)
    images.write(data, a.out, overwrite=a.overwrite)
    print(f"{a.out}: {data.n_obs} images of {data.n_vars} values, obs: {', '.join(data.obs) or 'nothing'}")
