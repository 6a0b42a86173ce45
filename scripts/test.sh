#!/usr/bin/env bash
# Checks style and types and runs the tests, in .venv, which is made if it is missing. Arguments go to pytest:
# -m "not slow" leaves out whole trainings and other tests that take long.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh '[dev]'

ruff check .
yapf --diff --recursive cdnsr_basicsr tests scripts setup.py
# what could go to BasicSR passes its linters, too
flake8 cdnsr_basicsr/archs cdnsr_basicsr/losses tests/test_archs
isort --check-only --diff cdnsr_basicsr/archs cdnsr_basicsr/losses tests/test_archs
# the stubs of numpy and torch say other things on other Pythons: types are checked from one version on
if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    mypy
fi
python -m pytest "$@"
