"""Images as counts: a cell is an image, a gene one colour of one pixel (CountsDiff's CIFAR-10 and CelebA; digits)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distdiff import files

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def pixels(colours: int, height: int, width: int) -> list[str]:
    """Gene names ``c0y0x0`` ..., colour slowest: the order in which the UNet reads them.

    Examples
    --------
    >>> from distdiff.data.images import pixels
    >>> pixels(colours=1, height=2, width=2)
    ['c0y0x0', 'c0y0x1', 'c0y1x0', 'c0y1x1']
    """
    return [f"c{c}y{y}x{x}" for c in range(colours) for y in range(height) for x in range(width)]


def shape_of(names: Sequence[str]) -> tuple[int, int, int]:
    """Colours, height and width of images whose genes are `pixels`.

    Raises
    ------
    ValueError
        They are not.

    Examples
    --------
    >>> from distdiff.data.images import pixels, shape_of
    >>> shape_of(pixels(3, 8, 4))
    (3, 8, 4)
    """
    found = re.fullmatch(r"c(\d+)y(\d+)x(\d+)", names[-1]) if len(names) else None
    shape = tuple(int(last) + 1 for last in found.groups()) if found else (0, 0, 0)
    if list(names) != pixels(*shape):
        raise ValueError("the genes are no pixels of images (c0y0x0, c0y0x1, ...); give what data_prep/images.py made")
    return shape  # type: ignore[return-value]


def digits() -> AnnData:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels of 0 to 16; which digit is in ``obs``.

    Examples
    --------
    >>> from distdiff.data.images import digits
    >>> data = digits()
    >>> data.shape, int(data.X.max()), data.obs["label"].iloc[0]
    ((1797, 64), 16, '0')
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    names = [f"digit{i}" for i in range(len(found.data))]
    return _anndata(found.data.astype(np.uint8), names, [str(c) for c in found.target], (1, 8, 8))


def cifar10(folder: str | Path) -> AnnData:
    """CIFAR-10 from its binary files (``*.bin``: a class byte and 3 x 32 x 32 bytes an image); labels in ``obs``.

    Raises
    ------
    FileNotFoundError
        No such file; the message names the source.
    ValueError
        A file of another length, a class above 9.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from distdiff.data.images import cifar10
    >>> Path("cifar").mkdir()
    >>> np.append(np.uint8(3), np.zeros(3072, np.uint8)).tofile("cifar/data.bin")
    >>> cifar10("cifar").obs["label"].tolist()
    ['cat']
    """
    found = sorted(Path(folder).glob("*.bin"))
    if not found:
        pickled = " (this is the Python version: it is pickled, which can run code, and is not read)"
        raise FileNotFoundError(
            f"{folder} holds no *.bin{pickled if (Path(folder) / 'batches.meta').exists() else ''}: get the binary "
            "version of CIFAR-10 (cifar-10-binary.tar.gz, from www.cs.toronto.edu/~kriz/cifar.html), unpack it and "
            "give the folder"
        )
    rows = []
    for path in found:
        raw = np.fromfile(path, dtype=np.uint8)
        if len(raw) % 3073 or not len(raw) or raw[::3073].max() > 9:
            raise ValueError(f"{path} is no CIFAR-10 binary file: 3,073 bytes an image, the first from 0 to 9")
        rows.append(raw.reshape(-1, 3073))
    images = np.concatenate(rows)
    names = [f"{path.stem}-{i}" for path, part in zip(found, rows, strict=True) for i in range(len(part))]
    return _anndata(images[:, 1:], names, [CIFAR_CLASSES[c] for c in images[:, 0]], (3, 32, 32))


def folder(path: str | Path, size: int, crop: int | None = None) -> AnnData:
    """All images under a folder: the middle ``crop`` x ``crop`` pixels (None: all), scaled to ``size`` x ``size``, RGB.

    CelebA: ``crop=178, size=64``. Images in sub-folders are labelled with the sub-folder's name. Needs Pillow, which is
    installed with matplotlib. Memory holds them all: `parts` reads some at a time.

    Raises
    ------
    FileNotFoundError
        No image there.
    ValueError
        An image that cannot be read, or is smaller than ``crop`` (named).

    Examples
    --------
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from distdiff.data.images import folder
    >>> Path("pictures/red").mkdir(parents=True)
    >>> Image.new("RGB", (8, 8), "red").save("pictures/red/one.png")
    >>> data = folder("pictures", size=2)
    >>> data.X.tolist(), data.obs["label"].tolist()
    ([[255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]], ['red'])
    """
    return next(parts(path, size, crop, images_a_part=sys.maxsize))


def parts(
    path: str | Path, size: int, crop: int | None = None, known: DataFrame | None = None, *, images_a_part: int = 10_000
) -> Iterator[AnnData]:
    """The images under a folder as `folder` reads them, ``images_a_part`` at a time.

    Parameters
    ----------
    path, size, crop
        As `folder`.
    known
        What is known of each image, by its file's name, instead of the sub-folder's name (`attributes`).
    images_a_part
        Images of one part, and in memory at once.

    Raises
    ------
    FileNotFoundError, ValueError
        As `folder`; an image that is not in ``known``.

    Examples
    --------
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from distdiff.data.images import parts
    >>> Path("three").mkdir()
    >>> for name in "abc":
    ...     Image.new("RGB", (8, 8), "red").save(f"three/{name}.png")
    >>> [part.shape for part in parts("three", size=2, images_a_part=2)]
    [(2, 12), (1, 12)]
    """
    root = Path(path)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{root} holds no image ({', '.join(SUFFIXES)}); unpack img_align_celeba.zip there")
    if known is not None and (unknown := [p for p in found if p.name not in known.index]):
        raise ValueError(f"{unknown[0]} is not among the {len(known)} images whose attributes were given")
    labels = [p.parent.name if p.parent != root else "" for p in found]
    labelled = any(labels)
    for start in range(0, len(found), images_a_part):
        some = found[start : start + images_a_part]
        images = np.empty((len(some), 3 * size * size), dtype=np.uint8)
        for row, image in zip(images, _scaled(some, size, crop), strict=True):
            row[:] = image
        names = [str(p.relative_to(root)) for p in some]
        data = _anndata(images, names, labels[start : start + len(some)] if labelled else [], (3, size, size))
        if known is not None:
            data.obs = known.loc[[p.name for p in some]].set_axis(names)
        yield data


def attributes(path: str | Path) -> DataFrame:
    r"""The yes and no of CelebA's ``list_attr_celeba.txt``: a row an image, a column an attribute.

    Its lines: the number of images; the names of the attributes; then a file's name and a 1 or -1 for each.

    Raises
    ------
    ValueError
        Not such a file.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.data.images import attributes
    >>> _ = Path("list_attr_celeba.txt").write_text("1\nMale Smiling\n000001.jpg -1  1\n")
    >>> attributes("list_attr_celeba.txt").loc["000001.jpg"].to_dict()
    {'Male': 'no', 'Smiling': 'yes'}
    """
    import pandas as pd

    wrong = f"{path} is no list_attr_celeba.txt: a number of images, names of attributes, then 1 or -1 for each image"
    with open(path, encoding="utf-8", errors="replace") as file:
        number, names = file.readline().split(), file.readline().split()
        try:
            found = pd.read_csv(file, sep=r"\s+", header=None, index_col=0)
        except (pd.errors.ParserError, pd.errors.EmptyDataError):
            raise ValueError(wrong) from None
    if number != [str(len(found))] or found.shape[1] != len(names) or not found.isin((-1, 1)).all(axis=None):
        raise ValueError(wrong)
    return found.set_axis(names, axis=1).replace({1: "yes", -1: "no"}).rename_axis(None)


def _scaled(paths: Sequence[Path], size: int, crop: int | None) -> Iterator[np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    for path in paths:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from None
        width, height = image.size
        if crop is not None:
            if min(width, height) < crop:
                raise ValueError(f"{path} has {width} x {height} pixels, fewer than crop={crop}")
            x, y = (width - crop) // 2, (height - crop) // 2
            image = image.crop((x, y, x + crop, y + crop))
        scaled = image.resize((size, size), Image.Resampling.BILINEAR)
        yield np.asarray(scaled, dtype=np.uint8).transpose(2, 0, 1).ravel()


def _anndata(images: np.ndarray, names: list[str], labels: list[str], shape: tuple[int, int, int]) -> AnnData:
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(index=names)
    if any(labels):
        obs["label"] = pd.Categorical(labels)
    return ad.AnnData(images, obs=obs, var=pd.DataFrame(index=pixels(*shape)))


def write(data: AnnData, out: Path, *, overwrite: bool = False) -> None:
    """Write as h5ad; the file appears only when it is complete.

    Examples
    --------
    >>> from pathlib import Path
    >>> import anndata
    >>> import numpy as np
    >>> from distdiff.data.images import write
    >>> write(anndata.AnnData(np.zeros((2, 12), np.uint8)), Path("images.h5ad"))
    >>> anndata.read_h5ad("images.h5ad").shape
    (2, 12)
    """
    with files.whole(out, overwrite=overwrite) as temporary:
        data.write_h5ad(temporary)
