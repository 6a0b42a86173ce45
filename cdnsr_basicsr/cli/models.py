"""`basicsr models`: what this package ships."""
from __future__ import annotations

import argparse

from ..zoo import describe, shipped_models
from .arguments import Commands, new_command


def add_parser(commands: Commands) -> None:
    new_command(commands, 'models', 'list the shipped models, with their quality and cost', run)


def run(args: argparse.Namespace) -> int:
    print(describe(shipped_models().values()), end='')
    return 0
