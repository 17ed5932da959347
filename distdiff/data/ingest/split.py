"""Which cell belongs to training, validation or test: by cell, or by whole groups such as donors."""

from __future__ import annotations

import numpy as np

from distdiff.data.store.manifest import SPLITS
from distdiff.rng import numpy_generator


def shares(split: tuple[float, ...]) -> tuple[float, float, float]:
    """Three checked shares.

    Raises
    ------
    ValueError
        Not three, negative, a sum other than 1, or no share for training.
    """
    if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        raise ValueError(f"split {tuple(split)}: three shares (train, val, test) that sum to 1 are wanted")
    if split[0] <= 0:
        raise ValueError(f"split {tuple(split)}: the training share is 0; gene statistics need training cells")
    return float(split[0]), float(split[1]), float(split[2])


def by_cell(n: int, split: tuple[float, float, float], seed: int) -> np.ndarray:
    """Split codes ``uint8 [n]`` of a seeded permutation; sizes are the shares rounded by largest remainder.

    Raises
    ------
    ValueError
        So few cells that training gets none.
    """
    exact = np.asarray(split) * n
    sizes = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - sizes), kind="stable")
    sizes[by_remainder[: n - int(sizes.sum())]] += 1
    if sizes[0] == 0:
        raise ValueError(f"split {split} of {n} cells leaves none for training; give more cells or a larger share")
    codes = np.empty(n, np.uint8)
    codes[numpy_generator(seed, "split").permutation(n)] = np.repeat(np.arange(3, dtype=np.uint8), sizes)
    return codes


def by_group(groups: np.ndarray, split: tuple[float, float, float], seed: int, column: str) -> np.ndarray:
    """Split codes ``uint8 [n]`` that keep each group whole.

    Groups go, largest first (ties in seeded order), to the split that lacks most cells; every split with a share gets
    at least one group.

    Parameters
    ----------
    groups
        ``object [n]``, name of each cell's group, None where missing.
    split
        Shares of the three splits.
    seed
        Breaks ties between groups of equal size.
    column
        Name of the column, for messages.

    Raises
    ------
    ValueError
        A cell has no group, or there are fewer groups than splits with a share.
    """
    missing = int(sum(g is None for g in groups))
    if missing:
        raise ValueError(
            f"split by {column!r}: {missing} of {len(groups)} cells have no {column!r}, so their group cannot be kept "
            "whole; remove those cells or split by another column"
        )
    names, group_of = np.unique(groups.astype(str), return_inverse=True)
    wanted = [i for i in range(3) if split[i] > 0]
    if len(names) < len(wanted):
        raise ValueError(
            f"split by {column!r}: {len(names)} group(s) ({', '.join(names[:3])}) for {len(wanted)} splits "
            f"({', '.join(SPLITS[i] for i in wanted)}); set shares to 0 or split by cell"
        )
    sizes = np.bincount(group_of)
    shuffled = numpy_generator(seed, "split").permutation(len(names))
    lacking = np.asarray(split) * len(groups)
    empty = set(wanted)
    split_of = np.empty(len(names), np.uint8)
    largest_first = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    for remaining, group in zip(range(len(names), 0, -1), largest_first, strict=True):
        among = empty if remaining <= len(empty) else wanted
        best = max(sorted(among), key=lambda i: lacking[i])
        split_of[group] = best
        lacking[best] -= sizes[group]
        empty.discard(best)
    return split_of[group_of]
