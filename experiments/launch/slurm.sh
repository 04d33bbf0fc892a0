#!/bin/bash
# Training on several GPU nodes: one process a GPU, joined through SLURM's own variables.
#   sbatch --nodes=8 experiments/launch/slurm.sh --preset=paper --workdir=/shared/run --p1_data=/shared/verse
# Submit it from the clone, whose .venv has requirements.txt and requirements-cuda12.txt, or name another one in RADGS_VENV.
# SLURM sends SIGTERM ahead of a preemption or the time limit: the run saves, and is queued again, to go on from there.
#SBATCH --job-name=radgs
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=4G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Every node sees the same environment; kept programs and XLA's cache belong to one user and may lie on the shared file system.
source "${RADGS_VENV:-.venv}/bin/activate"
# srun does not take this over from the job.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
status=0
# Every task sees all of its node's GPUs, and jax takes the one of the task's number.
srun --gpu-bind=none --kill-on-bad-exit=1 python -m experiments.train --stage=full --distributed=auto "$@" || status=$?

# 143 is the status of a run that has saved and ended after SIGTERM.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
