#!/usr/bin/env bash
# Can the archs and losses of this repository go upstream as they are? Puts them, and tests/test_archs, into a copy of a
# BasicSR tree, where this package cannot be imported; builds and runs them there, tests them, and lints them by BasicSR's
# own rules. One line a step; exit code 0 if all steps have passed, 1 if one has not, 2 if PATH is no BasicSR.
# Usage: bash scripts/upstream_check.sh PATH [ARGUMENTS OF PYTEST]
#   PATH: BasicSR's sources, or an installed package basicsr, or the folder that holds it. It is left as it is.
#   ARGUMENTS OF PYTEST: for instance -k span, for the tests of one arch
# It runs the python of .venv, if there is one, else that of the PATH; torch and BasicSR's requirements must be there.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
given=${1:-}
[[ $(basename "$given") == basicsr && -d $given/archs ]] && given=$given/..
if [[ ! -f $given/basicsr/archs/__init__.py || ! -f $given/basicsr/utils/registry.py ]]; then
    echo "upstream_check.sh: '$given' is no BasicSR: expected a folder with basicsr/archs and basicsr/utils/registry.py" >&2
    exit 2
fi
given=$(cd "$given" && pwd)
shift
[[ -x $root/.venv/bin/python ]] && PATH=$root/.venv/bin:$PATH
failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/BasicSR

# step WHAT COMMAND...: runs a command and says in one line how it went, and below what it said if it has failed
step() {
    local what=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        echo "ok    $what"
    else
        echo "FAIL  $what"
        tail -n 25 "$work/log" | sed 's/^/      /'
        failed=$((failed + 1))
        return 1
    fi
}

# mend FILE MODULE SCRIPT WHY: edits a file of the copy by sed where it imports a module that is not to be had here
mend() {
    if grep -qs "^from $2 import" "$tree/basicsr/$1" && ! python -c "import $2" 2>/dev/null; then
        sed -i "$3" "$tree/basicsr/$1"
        echo "note  mended in the copy, basicsr/$1: $4"
    fi
}

mkdir -p "$tree/tests/test_archs" "$work/site"
cp -r "$given/basicsr" "$tree/"
find "$tree" -name __pycache__ -prune -exec rm -rf {} +
if [[ -f $given/setup.cfg ]]; then
    cp "$given/setup.cfg" "$tree/"
else
    cp "$root/setup.cfg" "$tree/"
    echo "note  no setup.cfg there: linted by this repository's, which has BasicSR's rules"
fi
if [[ ! -f $tree/basicsr/version.py ]]; then
    printf "__version__ = 'unknown'\n__gitsha__ = 'unknown'\n" >"$tree/basicsr/version.py"
    echo "note  written in the copy, basicsr/version.py, which BasicSR's setup.py writes"
fi
mend data/degradations.py torchvision.transforms.functional_tensor \
    's/transforms.functional_tensor import/transforms.functional import/' \
    'rgb_to_grayscale of torchvision.transforms.functional, as on upstream master (#650)'
mend archs/arch_util.py distutils.version 's/^from distutils.version import LooseVersion/from packaging.version import parse as LooseVersion/' \
    'versions compared by packaging, since Python 3.12 has no distutils'

# from here on Python sees the copy, and no cdnsr_basicsr, wherever that is installed
cd "$tree" || exit 1
echo "import sys; sys.modules['cdnsr_basicsr'] = None" >"$work/site/sitecustomize.py"
export PYTHONPATH=$tree:$work/site PYTHONDONTWRITEBYTECODE=1
alone() {
    python -c "import basicsr; assert basicsr.__file__.startswith('$tree/'), basicsr.__file__" &&
        ! python -c 'import cdnsr_basicsr' 2>/dev/null
}
step 'the copy of BasicSR imports, and cdnsr_basicsr does not' alone || exit 1

new_names() {
    local file kind names=0 name
    for file in "$root"/cdnsr_basicsr/archs/*_arch.py "$root"/cdnsr_basicsr/losses/[a-z]*.py; do
        kind=$(basename "$(dirname "$file")")
        if [[ -e basicsr/$kind/$(basename "$file") ]]; then
            echo "BasicSR has a file $kind/$(basename "$file")"
            names=1
        fi
        for name in $(grep -A1 '^@[A-Z]*_REGISTRY.register()' "$file" | sed -nE 's/^(class|def) (\w+).*/\2/p'); do
            if grep -rlE "^(class|def) $name\b" "basicsr/$kind"; then
                echo "... has a $name"
                names=1
            fi
        done
    done
    return $names
}
step 'names of files and classes are new to BasicSR' new_names || exit 1
cp "$root"/cdnsr_basicsr/archs/*_arch.py basicsr/archs/
cp "$root"/cdnsr_basicsr/losses/[a-z]*.py basicsr/losses/
cp "$root"/tests/test_archs/test_*.py tests/test_archs/
files=$(cd "$root/cdnsr_basicsr" && printf 'basicsr/%s ' archs/*_arch.py losses/[a-z]*.py)
step 'BasicSR imports with them' python -c 'import basicsr' || exit 1

# prints a line for each arch and loss
python "$root/scripts/upstream_forward.py" $files || failed=$((failed + 1))
step 'tests of archs, unchanged' python -m pytest -q -o addopts= -p no:cacheprovider tests/test_archs "$@" &&
    echo "      $(tail -n 1 "$work/log")"
for linter in 'flake8 --config setup.cfg' 'isort --check-only --diff' 'yapf --diff --style setup.cfg'; do
    name=${linter%% *}
    if python -m "$name" --version >/dev/null 2>&1; then
        step "$name, by $([[ -f $given/setup.cfg ]] && echo "BasicSR's own" || echo "this repository's") setup.cfg" \
            python -m $linter $files tests/test_archs/*.py
    else
        echo "note  $name is not installed: left out"
    fi
done
if [[ $failed -gt 0 ]]; then
    echo "FAIL  $failed of the steps above"
    exit 1
fi
echo "All steps have passed: the archs and losses of this repository run in $given as they are."
