#!/usr/bin/env bash
# sbatch --nodes=8 examples/launch/slurm.sh examples/pretrain.py --preset k400 --data shards/index.json \
#     --output /shared/runs/k400
# Two minutes before its time is up the run saves itself, and the job is queued again to go on from there. A job that
# Slurm preempts or that is cancelled saves itself too; Slurm queues the first one again, because of --requeue. A run that
# fails is not queued again. Submit it from the checkout, in its environment; fit the lines below to your cluster, and
# --workers (processes that read, for each GPU) to the cores.
#SBATCH --job-name=adamae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

machines=$SLURM_JOB_NUM_NODES
processes=$((machines * ${SLURM_GPUS_ON_NODE:?no GPUs were asked for}))
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
config=${CONFIG:-examples/launch/many_machines.yaml} # or fsdp2.yaml, deepspeed_zero2.yaml

time_is_up=
# scancel reaches the processes of the training; srun itself would take SIGTERM for an order to kill them.
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM # Slurm has told the processes too: wait until they have saved

# The number of a machine is known on that machine alone; srun does not take --cpus-per-task over from sbatch.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' _ \
    --config_file "$config" --num_machines "$machines" --num_processes "$processes" \
    --main_process_ip "$main" --main_process_port "${PORT:-29500}" "$@" --resume auto &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do # a signal ends a wait
    code=0
    wait "$step" || code=$?
done
if [[ $time_is_up && $code != 0 ]]; then # a run that ended in time is not queued again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
