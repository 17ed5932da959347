"""Plots of results, in scanpy's manner: ``show``, ``save`` and ``ax``; matplotlib is imported by the first of them.

Of every function: ``save`` is a path (``.png``, ``.pdf``, ``.svg``), written whole or not at all; ``ax`` is where to
draw, one axes, or as many as there are panels; ``show=False`` returns the axes, ``show=True`` shows the figure. By
default a figure is shown, unless it is saved or drawn into ``ax``.
"""

from distdiff.pl.cells import depth, umap
from distdiff.pl.completed import panel
from distdiff.pl.genes import dotplot, scatter, violin
from distdiff.pl.laws import calibration, score_by_calls
from distdiff.pl.training import training_curve

__all__ = ["calibration", "depth", "dotplot", "panel", "scatter", "score_by_calls", "training_curve", "umap", "violin"]
