"""MLflow: one run a training, however many launches it takes; the registry of models. Only this package knows MLflow.

Training never waits for a server. What is to be logged is appended to a file in the run's folder (`spool`), a thread
sends it from there (`courier`), and what could not be sent stays for later (`sync`).
"""

from distdiff.tracking.address import CHAMPION, DATABASE, fetch, where
from distdiff.tracking.card import make as card
from distdiff.tracking.card import write as write_card
from distdiff.tracking.courier import sync
from distdiff.tracking.run import Dataset, Run, attach, flatten, run

__all__ = [
    "CHAMPION",
    "DATABASE",
    "Dataset",
    "Run",
    "attach",
    "card",
    "fetch",
    "flatten",
    "run",
    "sync",
    "where",
    "write_card",
]
