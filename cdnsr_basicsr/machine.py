"""This machine, as far as it is known without torch."""
from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """Name of the CPU, as Linux has it."""
    lines = Path('/proc/cpuinfo').read_text().splitlines() if os.path.exists('/proc/cpuinfo') else []
    models = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return (models or [platform.processor()])[0]


def cache_folder() -> Path:
    """Where what was measured on this machine is kept for this user."""
    return Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'cdnsr_basicsr'


def speed_file() -> Path:
    """Where measured speeds are remembered."""
    return cache_folder() / 'speed.json'
