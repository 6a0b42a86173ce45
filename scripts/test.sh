#!/usr/bin/env bash
# Checks style and types and runs the tests, in .venv, which is made if it is missing. Arguments go to pytest, and leave out
# the checks of layout, which take a minute: -m "not slow" is for a quick turn, without whole trainings and the like.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh '[dev]'

ruff check .
if [ $# -eq 0 ]; then
    yapf --parallel --diff --recursive cdnsr_basicsr tests scripts setup.py
    # what could go to BasicSR passes its linters, too
    flake8 cdnsr_basicsr/archs cdnsr_basicsr/losses tests/test_archs
    isort --check-only --diff cdnsr_basicsr/archs cdnsr_basicsr/losses tests/test_archs
fi
# the stubs of numpy and torch say other things on other Pythons: types are checked from one version on
if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    mypy
fi
# a process of tests for each core, up to four, and a core for each of them
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest --numprocesses auto --maxprocesses 4 "$@"
