"""Shard files with dask workers that SLURM starts; it runs on a login node, or as a small job.

python launch/slurm/shard_dask.py --jobs 8 --cores 16 --memory 64GB --queue cpu A.h5ad B.h5ad --out /shared/atlas.zarr

Other options are those of ``distdiff shard``. It needs ``pip install 'distdiff[slurm]'``, and a folder that all nodes
see. The same line goes on with a build that was stopped.
"""

import workers

if __name__ == "__main__":
    asked, words = workers.options(__doc__).parse_known_args()
    workers.run(asked, ["shard", *words], processes=asked.cores)  # one process a core
