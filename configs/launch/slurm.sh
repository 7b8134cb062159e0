#!/bin/bash
# A pretraining on the GPUs of some nodes, which goes on by itself in a new job when its time is over or its node is taken:
#
#     sbatch --nodes=2 slurm.sh CONFIG DATA OUTPUT [--set KEY=VALUE ...]
#
#SBATCH --job-name=synco-fast
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
config=$1 data=$2 output=$3
shift 3

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rm -f "$output/status.json" # of the job before
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds that torchrun waits for the last checkpoint
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \
    -m synco_fast pretrain "$config" --data "$data" --set output="$output" --resume auto "$@" &
run=$!

# SLURM sends SIGUSR1 to this script 300 seconds before the time is over, and SIGTERM when it takes the nodes.
# srun would end its tasks at once for a SIGTERM of its own, so it goes to them.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1 TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends a wait, and not what it waits for
    wait "$run" || code=$?
done

# torchrun's exit code is 1 whatever the run's was, so the run says itself how it ended.
if grep -q '"stopped"' "$output/status.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
