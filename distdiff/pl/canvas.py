"""Where plots are drawn: axes that were given or a new figure, colours, and what happens to a finished figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, PALE, GREY, RED = "#22303c", "#0072B2", "#c9d6df", "#8a9aa6", "#D55E00"
SERIES = (GREY, ACCENT, "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
"""Colours of the compared layers, in their order."""

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#22303c")
"""Okabe and Ito's colours, which colour-blind people tell apart; the black is the ink of these plots."""

MARKERS = "os^Dv<>P"
"""Shapes that tell apart what has the same colour."""


@dataclass
class Canvas:
    """Axes to draw in.

    Attributes
    ----------
    axes
        One a panel.
    figure
        The figure, where it was made for this plot; ``None``: the axes are the caller's.
    shown
        Whether to show it, as asked.
    save
        Where to write it.
    """

    axes: list[Any]
    figure: Any
    shown: bool | None
    save: str | Path | None

    def title(self, text: str) -> None:
        """Put the title over the whole figure, or over the first of the caller's axes."""
        if self.figure is not None and len(self.axes) > 1:
            self.figure.suptitle(text, fontsize="large")
            return
        below = self.axes[0].get_title()
        self.axes[0].set_title(f"{text}\n{below}" if below else text)

    def done(self) -> Axes | list[Axes] | None:
        """Save and show as asked; return the axes unless the figure was shown.

        Raises
        ------
        ValueError
            A suffix that matplotlib cannot write.
        """
        figure: Any = self.axes[0].figure
        if self.save is not None:
            path = Path(self.save).expanduser()
            kind, known = path.suffix.removeprefix(".") or "png", figure.canvas.get_supported_filetypes()
            if kind not in known:
                raise ValueError(f"save={str(self.save)!r}: the suffix must be one of {', '.join(sorted(known))}")
            with files.whole(path, overwrite=True) as temporary:
                figure.savefig(temporary, dpi=150, format=kind)
        if self.shown or (self.shown is None and self.save is None and self.figure is not None):
            from matplotlib import pyplot

            pyplot.show()
            return None
        return self.axes[0] if len(self.axes) == 1 else self.axes


def canvas(
    panels: tuple[int, int],
    size: tuple[float, float],
    *,
    show: bool | None,
    save: str | Path | None,
    ax: Axes | Sequence[Axes] | None,
    **options: Any,
) -> Canvas:
    """Axes for ``panels`` (rows, columns): the caller's, or those of a new figure of ``size`` inches.

    A figure that is only saved is an object of its own and leaves pyplot untouched.

    Raises
    ------
    ValueError
        ``ax`` holds another number of axes.
    """
    n = panels[0] * panels[1]
    if ax is not None:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(axes) != n:
            raise ValueError(f"ax holds {len(axes)} axes, and this plot has {n} panels: give {n}, or none")
        return Canvas(axes, None, show, save)
    if save is not None and not show:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
    else:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=size, layout="constrained")
    axes = list(np.ravel(np.asarray(figure.subplots(*panels, **options), dtype=object)))
    return Canvas(axes, figure, show, save)


def marks(n: int) -> list[tuple[str, str]]:
    """``n`` pairs of colour and shape, all different up to 64, then again from the first."""
    shapes, colours = len(MARKERS), len(OKABE_ITO)
    return [(OKABE_ITO[i % colours], MARKERS[i // colours % shapes]) for i in range(n)]
