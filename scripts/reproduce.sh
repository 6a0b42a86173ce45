#!/usr/bin/env bash
# Measures the models of this package again: makes their figures, tables and illustrations from HR images.
# Usage: bash scripts/reproduce.sh Set5=FOLDER Set14=FOLDER photographs=FOLDER CID22=FOLDER
# It rewrites models.json, docs/models and the lists of models, so that `git diff` shows what is different here. Let
# nothing else run: it measures time (REPEAT=0 does not). MODELS='a b' measures only some of the models.
set -euo pipefail
usage='Usage: bash scripts/reproduce.sh Set5=FOLDER Set14=FOLDER photographs=FOLDER CID22=FOLDER'
[ $# -gt 0 ] || { echo "$usage" >&2; exit 2; }
command -v basicsr >/dev/null || { echo 'The basicsr command is missing: source .venv/bin/activate' >&2; exit 2; }
for images in "$@"; do
    [[ $images == *=* ]] || { echo "$images: expected SET=FOLDER. $usage" >&2; exit 2; }
    [ -d "${images#*=}" ] || { echo "${images#*=}: no such folder; expected HR images" >&2; exit 2; }
done
# shellcheck disable=SC2086  # MODELS is a list
python "$(dirname "$0")/model_card.py" ${MODELS:-} --images "$@" --repeat "${REPEAT:-3}"
