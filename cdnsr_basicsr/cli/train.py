"""`basicsr train` and `basicsr test`: BasicSR's pipelines."""
from __future__ import annotations

import argparse

from ..pipeline import run_pipeline
from .arguments import Commands, new_command


def add_parser(commands: Commands) -> None:
    for name, text in (('train', 'train a model with BasicSR\'s train_pipeline, in the current folder'),
                       ('test', 'test a model with BasicSR\'s test_pipeline, in the current folder')):
        command = new_command(commands, name, text, run)
        command.add_argument('-opt', required=True, metavar='FILE', help='option file (YAML)')
        command.add_argument(
            '--launcher',
            choices=['none', 'pytorch', 'slurm'],
            default='none',
            help='how the processes of a distributed run are launched (default: none)')
        command.add_argument(
            '--auto_resume', action='store_true', help='resume from the newest complete training state')
        command.add_argument('--debug', action='store_true', help='log every iteration and validate every 8th')
        command.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
        command.add_argument(
            '--force_yml',
            nargs='+',
            default=[],
            metavar='KEY:SUB=VALUE',
            help='override options of the file, for example train:ema_decay=0.999')


def run(args: argparse.Namespace) -> int:
    return run_pipeline(args)
