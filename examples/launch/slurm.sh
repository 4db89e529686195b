#!/usr/bin/env bash
# sbatch --nodes=8 examples/launch/slurm.sh examples/pretrain.py --preset k400 --data shards/index.json \
#     --output /shared/runs/k400
# Before its time is up, or when it is preempted, the run saves itself, and the job is queued again to go on from there.
#SBATCH --job-name=adamae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

machines=$SLURM_JOB_NUM_NODES
processes=$((machines * ${SLURM_GPUS_ON_NODE:?no GPUs were asked for}))
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
config=${CONFIG:-examples/launch/many_machines.yaml} # or fsdp2.yaml, deepspeed_zero2.yaml

stopped=
trap 'stopped=yes; kill -TERM "$step"' TERM
# The number of a machine is known on that machine alone.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' _ \
    --config_file "$config" --num_machines "$machines" --num_processes "$processes" \
    --main_process_ip "$main" --main_process_port "${PORT:-29500}" "$@" --resume auto &
step=$!
code=0
wait "$step" || code=$?
if [[ $stopped ]]; then
    wait "$step" || true # the first one was interrupted by the signal
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
