#!/usr/bin/env bash
# From nothing to 4x images and a first training: installs into .venv, upscales photographs with a model of this package,
# fine-tunes another one for two minutes on photographs that scikit-image ships, and tests it on others.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh

step() { printf '\n== %s\n' "$1"; }
model=cdnsr-modern-x4  # what is upscaled with
data=datasets/quickstart
out=results/quickstart

step 'Models of this package'
basicsr models

step 'Three photographs, four times as large, at half the cost of the hardest branch'
python scripts/quickstart_photos.py "$data/photographs"
basicsr upscale -m "$model" -i "$data/photographs/held_out" -o "$out" --budget 0.5 --map --overwrite
echo "The images and their difficulty maps (*_map.png): $out"

step 'The same photographs made four times as small, and large again'
basicsr prepare -i "$data/photographs/held_out" -o "$data/held_out" --whole --overwrite
basicsr upscale -m "$model" -i "$data/held_out/lq" -o "$out/upscaled" --overwrite
python scripts/quickstart_report.py "$data/held_out" "$model=$out/upscaled"

step 'Fine-tuning cdnsr-fsrcnn-x4 on 13 other photographs'
basicsr prepare -i "$data/photographs/train" -o "$data/train" --overwrite
log=$(mktemp)
trap 'rm -f "$log"' EXIT
run() {  # shows the progress; on failure all of the output
    basicsr "$@" 2>&1 | tee "$log" | sed -un 's/.*iter: *\([0-9,]*\),.*eta: \([^,]*\),.*\(l_branch[a-z]*: [^ ]*\).*/iteration \1  \3  time left \2/p' ||
        { cat "$log"; exit 1; }
}
run train -opt options/train_cdnsr_fsrcnn_quickstart.yml
step 'Testing it on the photographs that were held out'
run test -opt options/test_cdnsr_fsrcnn_quickstart.yml
sed -n '/Routing held_out/,/class 2/p' "$log"
basicsr upscale -m cdnsr-fsrcnn-x4 -i "$data/held_out/lq" -o "$out/fsrcnn" --overwrite
python scripts/quickstart_report.py "$data/held_out" "cdnsr-fsrcnn-x4=$out/fsrcnn" \
    fine-tuned=results/test_cdnsr_fsrcnn_quickstart/visualization/held_out
