#!/bin/bash
# Training on a TPU slice: the same command on every host of it, joined through the TPU's own metadata.
#   experiments/launch/tpu_vm.sh NAME ZONE --preset=paper --workdir=/mnt/shared/run --p1_data=/mnt/shared/verse
# The hosts need this repository in ~/radgs_jax, with `pip install -r requirements-tpu.txt`, and one shared file system.
set -euo pipefail

name=$1
zone=$2
shift 2
printf -v flags ' %q' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="cd radgs_jax && python -m experiments.train --stage=full --distributed=auto$flags"
