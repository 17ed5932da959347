#!/bin/bash
# What train.sbatch runs on each node: the launcher, and USR1 for the processes that train when SLURM says USR1 or TERM.
# The launcher has no use for either and would end the processes in the middle of a save, so it ignores both; the
# processes, which inherit that, listen for them once they train.
set -uo pipefail

per_node=${SLURM_GPUS_ON_NODE:-1}
unset SLURM_JOB_END_TIME # train.sbatch tells when to leave, and then queues the job again
export PET_SIGNALS_TO_HANDLE=SIGINT # torch's launcher would listen for TERM
trap '' USR1 TERM
accelerate launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * per_node))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    launch/train.py "$@" &
launcher=$!
asked=0
trap 'asked=1; pkill -USR1 -P "$launcher"' USR1 TERM # TERM: the job is preempted, or another node failed

status=0
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher"
    status=$?
done
# srun ends all nodes when one fails: the first, which still tells MLflow, would be cut short by the others
((asked && SLURM_NODEID > 0)) && exit 0
exit "$status"
