"""MLflow: one run for each training, and the registry of models. Only this package imports MLflow.

Training does not wait for a server. What is to be logged is appended to a file in the run's folder (:mod:`.spool`), a
thread sends it from there (:mod:`.background`, :mod:`.sender`), and :func:`sync` sends later what could not be sent.
"""

from distdiff.tracking.address import CHAMPION, DATABASE, fetch, public_uri, tracking_uri
from distdiff.tracking.background import sync
from distdiff.tracking.card import make as card
from distdiff.tracking.card import write as write_card
from distdiff.tracking.certificates import described, log_certificate
from distdiff.tracking.run import Dataset, Run, attach, flatten, run

__all__ = [
    "CHAMPION",
    "DATABASE",
    "Dataset",
    "Run",
    "attach",
    "card",
    "described",
    "fetch",
    "flatten",
    "log_certificate",
    "public_uri",
    "run",
    "sync",
    "tracking_uri",
    "write_card",
]
