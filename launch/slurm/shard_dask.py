"""Shard files with dask workers that SLURM starts; it runs on a login node, or as a small job.

python launch/slurm/shard_dask.py --jobs 8 --cores 16 --memory 64GB --queue cpu A.h5ad B.h5ad --out /shared/atlas.zarr

Other options are those of ``distdiff shard``. It needs ``pip install 'distdiff[slurm]'``, and a folder that all nodes
see. The same line goes on with a build that was stopped.
"""

import argparse

from dask_jobqueue import SLURMCluster

from distdiff.cli import main


def run() -> None:
    """Start the workers, shard, and let them go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="SLURM jobs to start")
    parser.add_argument("--cores", type=int, default=8, help="processes of a job, one core each")
    parser.add_argument("--memory", default="32GB", help="of a job")
    parser.add_argument("--walltime", default="04:00:00", help="of a job")
    parser.add_argument("--queue", help="SLURM partition")
    parser.add_argument("--account", help="SLURM account")
    mine, words = parser.parse_known_args()
    with SLURMCluster(
        cores=mine.cores, processes=mine.cores, memory=mine.memory, walltime=mine.walltime, queue=mine.queue,
        account=mine.account, job_extra_directives=["--requeue"],
    ) as cluster:  # fmt: skip
        cluster.scale(jobs=mine.jobs)
        main(["shard", *words, "--scheduler", cluster.scheduler_address])


if __name__ == "__main__":
    run()
