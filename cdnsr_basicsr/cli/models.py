"""`basicsr models`: what this package ships."""
from __future__ import annotations

import argparse
from dataclasses import asdict

from ..zoo import describe, shipped_models
from .arguments import Commands, Say, add_json, answers, new_command


def add_parser(commands: Commands) -> None:
    add_json(new_command(commands, 'models', 'list the shipped models, with their quality and cost', run))


@answers
def run(args: argparse.Namespace, say: Say) -> int:
    models = shipped_models().values()
    content = [dict(asdict(model), file=str(model.path), bytes=model.path.stat().st_size) for model in models]
    say(describe(models), dict(models=content))
    return 0
