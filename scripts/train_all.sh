#!/usr/bin/env bash
# Trains a CDNSR from nothing in four stages: branches, classifier, both together, distillation.
# Usage, in a folder with datasets/train and datasets/val (basicsr prepare):
#     bash scripts/train_all.sh BACKBONE [KEY:SUB=VALUE ...]
# BACKBONE is the name of a row of scripts/backbones.yml; without one, they are named.
# KEY:SUB=VALUE changes an option in all stages, as --force_yml does. ITER=N shortens every stage to N iterations.
# NPROC=N trains with N processes, one per GPU. A stage that is finished is passed over, one that was stopped goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
options=$here/../options
backbone=${1:-}
backbones=$(sed -n 's/^\([a-z0-9]*\):.*/\1/p' "$here/backbones.yml" | LC_ALL=C sort)
grep -qxF -e "$backbone" <<< "$backbones" ||
    { echo "Usage: bash scripts/train_all.sh ${backbones//$'\n'/|} [KEY:SUB=VALUE ...]" >&2; exit 2; }
shift
command -v basicsr >/dev/null || { echo 'The basicsr command is missing: source .venv/bin/activate' >&2; exit 2; }
for lmdb in gt lq; do
    [ -f "datasets/train/$lmdb.lmdb/data.mdb" ] ||
        { echo "datasets/train contains no $lmdb.lmdb: basicsr prepare -i YOUR_PHOTOGRAPHS -o datasets/train" >&2; exit 2; }
    [ -d "datasets/val/$lmdb" ] ||
        { echo "datasets/val contains no $lmdb: basicsr prepare -i OTHER_PHOTOGRAPHS -o datasets/val --whole" >&2; exit 2; }
done
[ -f datasets/train/labels_bicubic.txt ] || basicsr label -d datasets/train --by bicubic

force=("$@")
[ -z "${ITER:-}" ] || force+=("train:total_iter=$ITER" "train:scheduler:periods=[$ITER]")
stages=("train_${backbone}_branch1" "train_${backbone}_branch2" "train_${backbone}_branch3"
    "train_cdnsr_$backbone" "train_cdnsr_${backbone}_joint" "train_cdnsr_${backbone}_distill")
for i in "${!stages[@]}"; do
    stage=${stages[$i]}
    changed=${force[*]:-no changes}
    if [ -f "experiments/$stage/models/net_g_latest.pth" ]; then
        record=$(cat "experiments/$stage/train_all.txt" 2>/dev/null || echo "$changed")
        [ "$record" = "$changed" ] ||
            { echo "$stage is finished, but with other options ($record); remove experiments/$stage to train it anew" >&2
              exit 2; }
        echo "== $((i + 1)) of ${#stages[@]}: $stage is finished"
        continue
    fi
    echo "== $((i + 1)) of ${#stages[@]}: $stage"
    if [ "$i" -eq 3 ] && grep -q labels_branches "$options/$stage.yml"; then
        basicsr label -d datasets/train --by branches -opt "$options/$stage.yml" --overwrite
    fi
    arguments=("$options/$stage.yml" --auto_resume)
    [ ${#force[@]} -eq 0 ] || arguments+=(--force_yml "${force[@]}")
    if [ "${NPROC:-1}" -gt 1 ]; then
        bash "$here/dist_train.sh" "$NPROC" "${arguments[@]}"
    else
        basicsr train -opt "${arguments[@]}"
    fi
    echo "$changed" > "experiments/$stage/train_all.txt"
done
echo "The network: experiments/${stages[5]}/models/net_g_latest.pth"
