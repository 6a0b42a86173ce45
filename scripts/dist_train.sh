#!/usr/bin/env bash
# Trains with several processes on this machine, one per GPU (or on CPUs, where there is none).
# Usage: bash scripts/dist_train.sh NPROC OPTION_FILE [further arguments of basicsr train]
# On several machines, run it on each with NNODES, NODE_RANK (0 on the first) and MASTER_ADDR (the first's) set.
set -euo pipefail
[ $# -ge 2 ] || { echo 'Usage: bash scripts/dist_train.sh NPROC OPTION_FILE [arguments]' >&2; exit 2; }
nproc=$1 opt=$2
shift 2
if [ "${NNODES:-1}" -gt 1 ]; then
    : "${NODE_RANK:?is needed with NNODES}" "${MASTER_ADDR:?is needed with NNODES}"
    nodes=(--nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}")
else
    nodes=(--standalone)
fi
# torchrun's default of one thread each, unless the user says otherwise, wastes CPUs where there is no GPU
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + nproc - 1) / nproc ))}
exec python -m torch.distributed.run "${nodes[@]}" --nproc_per_node="$nproc" -m cdnsr_basicsr train -opt "$opt" \
    --launcher pytorch "$@"
