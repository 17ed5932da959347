"""Impute an atlas with dask workers that SLURM starts, one GPU each; it runs on a login node, or as a small job.

python launch/slurm/impute_dask.py --jobs 32 --queue gpu --model models:/NAME@champion --data atlas.zarr --out X.zarr

Other options are those of ``distdiff impute`` (or of ``--task denoise`` ...). It needs ``pip install
'distdiff[slurm]'``, and a folder that this node and all nodes of the jobs see. Each job computes one output shard after
the other, also one that starts late; the shard of a job that dies goes to another job, and the same line continues
work that was stopped.
"""

import workers

if __name__ == "__main__":
    parser = workers.options(__doc__)
    parser.add_argument("--task", default="impute", help="or complete, denoise, deepen, generate")
    parser.add_argument("--cpu", action="store_true", help="no GPU: a process on every core")
    asked, words = parser.parse_known_args()
    processes, directives = (asked.cores, []) if asked.cpu else (1, ["--gpus=1"])
    workers.run(asked, [asked.task, *words], processes=processes, directives=directives)
