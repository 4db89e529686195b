#!/usr/bin/env bash
# sbatch --nodes=8 examples/launch/slurm.sh examples/pretrain.py --preset k400 --data shards/index.json \
#     --output /shared/runs/k400
# Two minutes before the time limit the run saves its state, and the job is queued again and resumes. A preempted or
# cancelled job saves its state too; --requeue makes Slurm queue a preempted job again. A run that fails is not queued
# again. Submit from the checkout, in the environment of the package. Fit the #SBATCH lines to your cluster, and
# --workers (reader processes for each GPU) to the cores.
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
# scancel signals the training processes. If srun itself got SIGTERM, it would kill them.
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM # Slurm signals the training processes too; wait until they have saved

# SLURM_NODEID is known only on each machine, hence bash -c. srun does not inherit --cpus-per-task from sbatch.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' _ \
    --config_file "$config" --num_machines "$machines" --num_processes "$processes" \
    --main_process_ip "$main" --main_process_port "${PORT:-29500}" "$@" --resume auto &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do # a signal interrupts wait
    code=0
    wait "$step" || code=$?
done
if [[ $time_is_up && $code != 0 ]]; then # a finished run is not queued again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
