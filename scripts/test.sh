#!/usr/bin/env bash
# Checks the style and runs the tests, in .venv, which is made if it is missing. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh '[dev]'

flake8 .
isort --check-only --diff .
yapf --diff --recursive cdnsr_basicsr tests scripts setup.py
python -m pytest "$@"
