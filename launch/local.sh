#!/usr/bin/env bash
# Train on this machine with torchrun: launch/local.sh RECIPE DATASET OUT [RANKS]
# `dig-scale train` does the same without torchrun; use this one to put your own torchrun options in.
set -euo pipefail
recipe=${1:?recipe.toml} dataset=${2:?packed dataset} out=${3:?folder to train in}
ranks=${4:-$(python -c 'import os, torch; print(torch.cuda.device_count() or len(os.sched_getaffinity(0)))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
exec torchrun --standalone --nproc-per-node "$ranks" -m dig_scale.training.trainer "$recipe" "$dataset" "$out"
