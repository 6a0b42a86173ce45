# Sourced by the other scripts: makes or reuses .venv in the repository and installs the package into it.
# Usage: source scripts/setup_venv.sh [EXTRAS]     EXTRAS: for example [dev]
# PYTHON chooses the interpreter (3.9 or newer) that a new .venv is made of.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.9}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.9 or newer found; name one by PYTHON=..." >&2
    return 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    rm -rf .venv
    "$python" -m venv .venv
fi
export PATH="$PWD/.venv/bin:$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! python -c 'from importlib.metadata import version; version("basicsr")' 2>/dev/null; then
    echo 'Installing torch and torchvision, then basicsr (a few minutes, 5 GB) ...'
    python -m pip install --quiet --upgrade setuptools wheel
    python -m pip install --quiet 'torch>=2.6' 'torchvision>=0.21'
    # basicsr asks for torch in its build environment: without isolation it is not downloaded a second time
    python -m pip install --quiet cython numpy
    PYTHONPATH="$PWD/scripts/python313${PYTHONPATH:+:$PYTHONPATH}" \
        python -m pip install --quiet --no-build-isolation 'basicsr>=1.4.2'
fi
python -m pip install --quiet --no-build-isolation -e ".${1:-}"
