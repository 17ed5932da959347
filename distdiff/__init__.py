"""distdiff: diffusion models on single-cell counts."""

__version__ = "0.1.0"
