"""`basicsr env`: what a bug report needs."""
from __future__ import annotations

import argparse
import sys

from .arguments import Commands, Say, add_json, answers, new_command


def add_parser(commands: Commands) -> None:
    add_json(
        new_command(commands, 'env', 'print what a bug report needs: versions, CPU, GPUs, plugins and folders', run))


@answers
def run(args: argparse.Namespace, say: Say) -> int:
    from ..environment import Environment, describe
    content = Environment().content()
    say(describe(content), content)
    for failure in content['failed']:
        print(f'Failed: {failure["name"]}: {failure["reason"]}', file=sys.stderr)
    return 1 if content['failed'] else 0
