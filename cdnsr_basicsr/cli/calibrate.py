"""`basicsr calibrate`: what budgets bring."""
from __future__ import annotations

import argparse

from .arguments import (CHECKPOINT, DESCRIPTION, Commands, add_engine, check_budgets, check_tile, count, load_on_device,
                        new_command, say_left_out, tile_of)


def add_parser(commands: Commands) -> None:
    command = new_command(
        commands, 'calibrate',
        'measure what budgets of a routed network bring and cost, and keep the table beside its checkpoint', run)
    command.add_argument('-m', dest='model', required=True, metavar='MODEL', help=CHECKPOINT)
    command.add_argument('-opt', metavar='FILE', help=DESCRIPTION)
    command.add_argument(
        '-i', dest='input', required=True, metavar='FOLDER', help='photographs, or a folder with gt/ and lq/')
    command.add_argument(
        '--budgets', type=float, nargs='+', metavar='FRACTION', help='budgets to try (default: 0.3 to 1.2)')
    command.add_argument('--limit', type=count, metavar='N', help='only the first N photographs')
    add_engine(command, routed_only=True)


def run(args: argparse.Namespace) -> int:
    budgets = check_budgets(args.budgets or [])
    net = load_on_device(args)
    from ..calibration import BUDGETS, calibrate, calibration_path, markdown
    from ..inference import default_patch_size
    patch_size, step = tile_of(args)
    patch_size = patch_size or default_patch_size(net)
    check_tile(patch_size, step)
    left_out: list[tuple[str, str]] = []
    table = calibrate(net, args.model, args.input, args.precision, budgets or BUDGETS, patch_size, step, args.limit,
                      left_out)
    print(f'{markdown(table)}\nWrote {calibration_path(args.model)}.')
    return say_left_out(left_out)
