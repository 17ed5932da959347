"""A network whose steps take a known time, so that a run lasts long enough to be interrupted."""

from __future__ import annotations

import time

from distdiff.denoise.mlp import MLP


class Slow(MLP):
    def __init__(self, spec, outputs, *, seconds: float = 0.02):
        super().__init__(spec, outputs, width=16, depth=1)
        self.seconds = seconds

    def forward(self, x, p, cond):
        if self.training:
            time.sleep(self.seconds)
        return super().forward(x, p, cond)
