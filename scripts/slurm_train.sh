#!/usr/bin/env bash
# Trains on a Slurm cluster, one process per GPU.
# Usage: bash scripts/slurm_train.sh PARTITION GPUS OPTION_FILE [further arguments of basicsr train]
# GPUS_PER_NODE (default 8 or GPUS, if less), CPUS_PER_TASK (default 5) and SRUN_ARGS change what is asked of srun.
set -euo pipefail
[ $# -ge 3 ] || { echo 'Usage: bash scripts/slurm_train.sh PARTITION GPUS OPTION_FILE [arguments]' >&2; exit 2; }
partition=$1 gpus=$2 opt=$3
shift 3
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# shellcheck disable=SC2086  # SRUN_ARGS is a list
exec srun --partition="$partition" --job-name="$(basename "$opt" .yml)" --gres=gpu:"$per_node" --ntasks="$gpus" \
    --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u -m cdnsr_basicsr train -opt "$opt" --launcher slurm "$@"
