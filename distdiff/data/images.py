"""Images as counts, for CountsDiff's CIFAR-10 and CelebA models: a cell is an image, a gene one colour of one pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distdiff import files

if TYPE_CHECKING:
    from anndata import AnnData

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
        raise FileNotFoundError(
            f"{folder} holds no *.bin: get the binary version of CIFAR-10 (cifar-10-binary.tar.gz, from "
            "www.cs.toronto.edu/~kriz/cifar.html), unpack it and give the folder"
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
    installed with matplotlib.

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
    root = Path(path)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{root} holds no image ({', '.join(SUFFIXES)}); unpack img_align_celeba.zip there")
    images = np.empty((len(found), 3 * size * size), dtype=np.uint8)
    for row, image in zip(images, _scaled(found, size, crop), strict=True):
        row[:] = image
    labels = [p.parent.name if p.parent != root else "" for p in found]
    return _anndata(images, [str(p.relative_to(root)) for p in found], labels, (3, size, size))


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
