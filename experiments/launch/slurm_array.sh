#!/bin/bash
# Many cases on many machines: every task of the array does one part, and a job after it puts them together.
#   jobs=64
#   part=$(sbatch --parsable --array=0-$((jobs - 1)) experiments/launch/slurm_array.sh register --cases=C.json --out=OUT)
#   sbatch --dependency=afterany:$part experiments/launch/slurm_array.sh register --cases=C.json --out=OUT
# The command is any that takes --shard: register, prepare, study or table1. The array is always all of 0 to jobs - 1, also when some
# are sent again: the job after it makes what is missing, by itself.
#SBATCH --job-name=radgs-cases
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
set -euo pipefail

command=$1
shift
source "${RADGS_VENV:-.venv}/bin/activate"
shard=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    shard=("--shard=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
fi
exec python -m "experiments.$command" "$@" "${shard[@]}"
