#!/bin/bash
# What train.sbatch runs on each node: the launcher, and USR1 for the processes that train. The launcher has no use for
# that signal and would die of it, so it ignores it; the processes, which inherit that, listen for it once they train.
set -uo pipefail

per_node=${SLURM_GPUS_ON_NODE:-1}
trap '' USR1
accelerate launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * per_node))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    launch/train.py "$@" &
launcher=$!
trap 'pkill -USR1 -P "$launcher"' USR1
trap : TERM # which SLURM sends to all: the node waits for its launcher, or the rest would be killed at once

status=0
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher"
    status=$?
done
exit "$status"
