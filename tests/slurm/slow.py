"""A network whose calls take a known time, so that a run lasts long enough to be interrupted."""

from __future__ import annotations

import time

from distdiff.denoise.mlp import MLP


class Slow(MLP):
    """``seconds``: of a call in training; ``asked``: of one afterwards."""

    def __init__(self, spec, outputs, *, seconds: float = 0.02, asked: float = 0.0):
        super().__init__(spec, outputs, width=16, depth=1)
        self.seconds, self.asked = seconds, asked

    def forward(self, x, p, cond):
        time.sleep(self.seconds if self.training else self.asked)
        return super().forward(x, p, cond)
