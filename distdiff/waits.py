"""Lines on what takes its time: a wait longer than a few seconds says what is waited for."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

PATIENCE = 5.0
"""Seconds after which a wait is told."""

MEASURED = 3.0
"""Seconds of training from which the time of the rest is told."""

FEWEST = 5
"""Steps of which that time is made, at least; the first, which compiles and fills caches, is not among them."""


def print_line(text: str) -> None:
    """A line on stderr, above any bar; none where the logger ``distdiff`` tells errors alone (``--quiet``)."""
    if logging.getLogger("distdiff").isEnabledFor(logging.WARNING):
        tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def waiting(what: str, *, show: bool = True, to: Callable[[str], None] = print_line) -> Iterator[None]:
    """Tell that ``what`` is going on, once it has gone on for :data:`PATIENCE` seconds (a context).

    Examples
    --------
    >>> from distdiff.waits import waiting
    >>> with waiting("clusters 2,700 cells (leiden)"):  # over at once: nothing is told
    ...     pass
    """
    line = threading.Timer(PATIENCE, to, [f"distdiff {what}; this takes a while"])
    line.daemon = True
    if show:
        line.start()
    try:
        yield
    finally:
        line.cancel()


class Pace:
    """Tells once how long a run of steps takes, from its first ones.

    Parameters
    ----------
    steps, batch
        Steps of the whole run, and cells of each.

    Examples
    --------
    >>> from distdiff.waits import Pace
    >>> now = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    >>> pace = Pace(steps=606, batch=100, clock=lambda: next(now))
    >>> [text for step in range(1, 8) if (text := pace.after(step))]  # one second a step
    ['about 10 min for 60,600 cells (100 a second), less if validation stops improving']
    """

    def __init__(self, steps: int, batch: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps, self.batch, self.clock = steps, batch, clock
        self._first: tuple[int, float] | None = None
        self._said = False

    def after(self, step: int) -> str:
        """What to say after ``step`` steps of the run; mostly nothing."""
        if self._said:
            return ""
        now = self.clock()
        if self._first is None:
            self._first = step, now
            return ""
        done, took = step - self._first[0], now - self._first[1]
        if done < FEWEST or took < MEASURED:
            return ""
        self._said = True
        return (
            f"about {duration((self.steps - step) * took / done)} for {self.steps * self.batch:,} cells "
            f"({done * self.batch / took:,.0f} a second), less if validation stops improving"
        )


def duration(seconds: float) -> str:
    """Some time in the unit that fits it.

    Examples
    --------
    >>> from distdiff.waits import duration
    >>> duration(40), duration(600), duration(3 * 3600 + 1000)
    ('40 s', '10 min', '3.3 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
