"""What shard_dask.py and impute_dask.py share: dask workers that SLURM starts, and a command that they do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distdiff.cli import main


def options(description: str | None) -> argparse.ArgumentParser:
    """What a user may say about the jobs; whatever else is said is for ``distdiff``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--jobs", type=int, default=4, help="SLURM jobs to start")
    parser.add_argument("--cores", type=int, default=8, help="of a job")
    parser.add_argument("--memory", default="32GB", help="of a job")
    parser.add_argument("--walltime", default="04:00:00", help="of a job")
    parser.add_argument("--queue", help="SLURM partition")
    parser.add_argument("--account", help="SLURM account")
    parser.add_argument("--interface", help="network of the jobs, for example ib0")
    return parser


def run(asked: argparse.Namespace, words: Sequence[str], *, processes: int, directives: Sequence[str] = ()) -> None:
    """Queue the jobs, let them do ``distdiff WORDS`` from the first on that runs, and let them go.

    A job that ends early (cancelled, out of time, its node dead) is replaced by a new one.
    """
    from dask_jobqueue import SLURMCluster

    with SLURMCluster(
        cores=asked.cores, processes=processes, memory=asked.memory, walltime=asked.walltime, queue=asked.queue,
        account=asked.account, interface=asked.interface, job_extra_directives=list(directives),
    ) as cluster:  # fmt: skip
        cluster.adapt(minimum_jobs=asked.jobs, maximum_jobs=asked.jobs)
        print(f"{asked.jobs} jobs are queued; work begins when the first one runs", flush=True)
        cluster.wait_for_workers(1)
        main([*words, "--scheduler", cluster.scheduler_address])
