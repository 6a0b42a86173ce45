#!/usr/bin/env bash
# From nothing to a trained and tested CDNSR-FSRCNN: installs into .venv, makes a small dataset of the photographs that
# scikit-image ships, trains for a few minutes on a CPU, and tests on photographs that were held out.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh

step() { printf '\n== %s\n' "$1"; }
data=datasets/quickstart

step 'Photographs, patches and labels'
python scripts/quickstart_photos.py "$data/photographs"
basicsr prepare -i "$data/photographs/train" -o "$data/train" --overwrite
basicsr prepare -i "$data/photographs/held_out" -o "$data/held_out" --whole --overwrite
basicsr label -d "$data/train" --by bicubic

log=$(mktemp)
trap 'rm -f "$log"' EXIT
run() {  # shows the progress; on failure all of the output
    basicsr "$@" 2>&1 | tee "$log" | sed -un 's/.*iter: *\([0-9,]*\),.*eta: \([^,]*\),.*\(l_pix[a-z]*: [^ ]*\).*/iteration \1  \3  time left \2/p' ||
        { cat "$log"; exit 1; }
}
for branch in 1 2 3; do
    step "Training branch $branch of 3 on its class of patches"
    run train -opt "options/train_fsrcnn_branch${branch}_quickstart.yml"
done
step 'Training the classifier'
run train -opt options/train_cdnsr_fsrcnn_quickstart.yml
step 'Testing on held-out photographs'
run test -opt options/test_cdnsr_fsrcnn_quickstart.yml
python scripts/quickstart_report.py "$data/held_out" results/test_cdnsr_fsrcnn_quickstart
