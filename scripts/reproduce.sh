#!/usr/bin/env bash
# Measures the models of this package on the photographs at hand: their tables in docs/Results.md.
# Usage: bash scripts/reproduce.sh HR_FOLDER [HR_FOLDER ...]     for instance Set5/HR Set14/HR held_out_photographs
# For each folder, results/reproduce/N_NAME gets benchmark.md, .csv and .png. Let nothing else run: it measures
# time. A folder of 8 photographs of 2048 pixels takes 7 minutes on 2 CPU cores. MODELS='a b' measures others.
set -euo pipefail
[ $# -gt 0 ] || { echo 'Usage: bash scripts/reproduce.sh HR_FOLDER [HR_FOLDER ...]' >&2; exit 2; }
command -v basicsr >/dev/null || { echo 'The basicsr command is missing: source .venv/bin/activate' >&2; exit 2; }
for data in "$@"; do
    [ -d "$data" ] || { echo "$data: no such folder; expected HR photographs" >&2; exit 2; }
done
number=0
for data in "$@"; do
    number=$((number + 1))
    name=$(basename "$(cd "$data" && pwd)")
    out=results/reproduce/${number}_$name
    # shellcheck disable=SC2086  # MODELS is a list
    basicsr benchmark -m ${MODELS:-cdnsr-fsrcnn-x4 cdnsr-etds-x4} --data "$data" --branches --oracle --no-ssim \
        --budgets 0.1 0.2 0.3 0.4 0.5 0.6 0.8 1.0 --precision float32 bfloat16 --repeat 2 -o "$out"
done
