"""Images as counts: scikit-learn's digits (no download), CIFAR-10, CelebA, or a folder of one's own.

python data_prep/images.py digits digits.zarr
python data_prep/images.py cifar10 cifar-10-batches-bin cifar10.zarr
python data_prep/images.py celeba img_align_celeba celeba64.zarr --attributes list_attr_celeba.txt
python data_prep/images.py folder pictures mine.zarr --size 32 --config cifar10
distdiff train --config digits.yaml

CIFAR-10: cifar-10-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, unpacked; its Python version is pickled, which
can run code, and is not read. CelebA: img_align_celeba.zip and list_attr_celeba.txt of
mmlab.ie.cuhk.edu.hk/projects/CelebA.html. Images become counts of 0 to 255, colour slowest, in the order in which the
UNet reads them. Training a UNet needs: pip install 'distdiff[images]'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _recipe import command_line, finish, run

from distdiff import files
from distdiff.data import images

CONFIGS = {"digits": "digits", "cifar10": "cifar10", "celeba": "celeba64", "folder": "cifar10"}


def parts(a: Any) -> Iterator[Any]:
    """The images as AnnData, some thousand at a time."""
    if a.kind == "digits":
        yield images.digits()
    elif a.source is None:
        raise ValueError(f"images {a.kind}: give the folder of its files too (images.py {a.kind} FOLDER {a.out})")
    elif a.kind == "cifar10":
        yield images.cifar10(a.source)
    elif a.kind == "celeba":
        known = images.attributes(a.attributes) if a.attributes else None
        yield from images.parts(a.source, a.size or 64, a.crop or 178, known)
    else:
        yield from images.parts(a.source, a.size or 32, a.crop)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = command_line(__doc__, config="")
    parser.add_argument("kind", choices=CONFIGS)
    parser.add_argument("source", type=Path, nargs="?", help="folder of the images (digits: none)")
    parser.add_argument("out", type=Path, help="store to write, for example digits.zarr")
    parser.add_argument("--size", type=int, help="pixels a side (celeba 64, folder 32)")
    parser.add_argument("--crop", type=int, help="middle pixels that are kept before (celeba 178, folder all)")
    parser.add_argument("--attributes", type=Path, help="celeba: list_attr_celeba.txt; its 40 attributes become labels")
    a = parser.parse_args(arguments)
    a.config = a.config or CONFIGS[a.kind]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(a.out) as folder:
        inputs = []
        for number, data in enumerate(parts(a)):
            inputs.append(folder / f"{number:05}.h5ad")
            images.write(data, inputs[-1])
        shape = images.shape_of(data.var_names)
        words = [f"denoiser.shape={list(shape)}"]
        finish(a, inputs, a.out, list(data.obs), genes=images.pixels(*shape), overrides=words)


if __name__ == "__main__":
    run(main)
