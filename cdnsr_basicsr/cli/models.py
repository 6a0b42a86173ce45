"""`basicsr models`: what this package ships."""
from __future__ import annotations

import argparse
from dataclasses import asdict

from ..zoo import best_first, describe, shipped_models
from .arguments import Commands, Say, add_json, answers, new_command


def add_parser(commands: Commands) -> None:
    text = 'list the shipped models, best first: which to take for what, quality and cost'
    add_json(new_command(commands, 'models', text, run))


@answers
def run(args: argparse.Namespace, say: Say) -> int:
    models = best_first(shipped_models().values())
    content = [dict(asdict(model), file=str(model.path), bytes=model.path.stat().st_size) for model in models]
    say(describe(models), dict(models=content))
    return 0
