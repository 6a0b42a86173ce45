#!/usr/bin/env bash
# What only a GPU can show, in about 20 minutes, in an environment such as scripts/setup_venv.sh makes.
# Usage: bash scripts/gpu_day.sh OUT [CHECKPOINT ...]
# Each part writes OUT/PART.log; OUT/summary.txt says which have passed. Checkpoints, of PCSR or published ones such as
# SPANV2_x4.pth, SPAN_ch48_x4.pth and SMFANet_x4.pth, are measured beside the models that are shipped.
set -uo pipefail
[ $# -ge 1 ] || { echo 'Usage: bash scripts/gpu_day.sh OUT [CHECKPOINT ...]' >&2; exit 2; }
out=$(realpath -m "$1")
shift
models=(cdnsr-modern-x4 cdnsr-etds-x4 cdnsr-fsrcnn-x4)
for checkpoint in "$@"; do models+=("$(realpath "$checkpoint")") || exit 2; done
cd "$(dirname "$0")/.." || exit 1
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo 'gpu_day.sh: there is no GPU here that torch can use' >&2; exit 1; }
mkdir -p "$out"
: > "$out/summary.txt"
failed=0

go() {  # NAME SECONDS COMMAND...: runs a part, for so long at most
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=$((failed + 1))
    printf '%-6s %-16s %4d s  %s\n' "$([ $code -eq 0 ] && echo ok || echo "rc $code")" "$name" $((SECONDS - begin)) \
        "${*//$'\n'/ }" | tee -a "$out/summary.txt"
}

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
data=$out/data
go env 60 basicsr env
go data 120 bash -c 'set -e; python scripts/quickstart_photos.py "$1/photographs"
    basicsr prepare -i "$1/photographs/held_out" -o "$1/held_out" --whole --overwrite
    basicsr prepare -i "$1/photographs/train" -o "$1/train" --overwrite' - "$data"
go tests 400 python -m pytest -q -m 'not slow' tests/test_inference tests/test_models tests/test_archs tests/test_losses
for part in equal waits speed memory busy compile; do
    go $part 240 python scripts/gpu_day.py $part --models "${models[@]}"
done

# training: three precisions, prefetch, compile, and going on with a state on the same device and on the other one
train() { go "$1" "$2" basicsr train -opt options/train_cdnsr_fsrcnn_quickstart.yml "${@:4}" --force_yml "${common[@]}" $3; }
common=(datasets:train:dataroot_gt="$data/train/gt.lmdb" datasets:train:dataroot_lq="$data/train/lq.lmdb"
        datasets:val:dataroot_gt="$data/held_out/gt" datasets:val:dataroot_lq="$data/held_out/lq" num_gpu=1
        train:total_iter=200 'train:scheduler:periods=[200]' val:val_freq=200 logger:print_freq=50
        logger:save_checkpoint_freq=100)
for precision in float32 bfloat16 float16; do
    train train_$precision 120 "train:precision=$precision name=gpu_$precision"
done
train train_prefetch 120 'datasets:train:prefetch_mode=cuda datasets:train:pin_memory=true name=gpu_prefetch'
train train_compile 240 'train:compile=true name=gpu_compile'
train resume 90 'train:precision=float16 name=gpu_float16 train:total_iter=240 train:scheduler:periods=[240]' --auto_resume
CUDA_VISIBLE_DEVICES='' train resume_on_cpu 180 'name=gpu_float32 train:total_iter=205 train:scheduler:periods=[205]' \
    --auto_resume

go train_speed 180 python scripts/bench_train.py fsrcnn --batch 64 --compile
go train_speed_carn 180 python scripts/bench_train.py carn --batch 64
go benchmark 300 basicsr benchmark -m "${models[@]}" --data "$data/held_out" --branches --budgets 0.6 \
    --precision float32 bfloat16 float16 --limit 2 -o "$out/benchmark"
go upscale 90 basicsr upscale -m cdnsr-modern-x4 -i "$data/held_out/lq" -o "$out/upscaled" --overwrite
if [ "$gpus" -gt 1 ]; then
    common=("${common[@]/num_gpu=1/num_gpu=auto}")
    train all_gpus 180 'name=gpu_all'
    go all_gpus_upscale 90 python -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m cdnsr_basicsr upscale \
        -m cdnsr-modern-x4 -i "$data/held_out/lq" -o "$out/upscaled_by_all" --overwrite
fi
echo "$failed parts failed; logs and $out/summary.txt are in $out"
[ "$failed" -eq 0 ]
