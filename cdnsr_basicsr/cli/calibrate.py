"""`basicsr calibrate`: what budgets bring."""
from __future__ import annotations

import argparse

from . import arguments


def add_parser(commands: arguments.Commands) -> None:
    command = arguments.new_command(
        commands, 'calibrate',
        'measure quality and cost of a routed network over budgets, and store the table beside its checkpoint', run)
    command.add_argument('-m', dest='model', required=True, metavar='MODEL', help=arguments.CHECKPOINT)
    command.add_argument('-opt', metavar='FILE', help=arguments.DESCRIPTION)
    command.add_argument(
        '-i', dest='input', required=True, metavar='FOLDER', help='folder of photographs, or one with gt/ and lq/')
    command.add_argument(
        '--budgets', type=float, nargs='+', metavar='FRACTION', help='budgets to measure (default: 0.3 to 1.2)')
    command.add_argument('--limit', type=arguments.count, metavar='N', help='use only the first N photographs')
    arguments.add_engine(command, routed_only=True)
    arguments.add_json(command)


@arguments.answers
def run(args: argparse.Namespace, say: arguments.Say) -> int:
    budgets = arguments.check_budgets(args.budgets or [])
    from ..calibration import BUDGETS, calibrate, calibration_path, markdown
    from ..inference import default_patch_size
    from ..loading import load_on_device, tile_of
    with arguments.said_by_flags():
        settings = arguments.settings_of(args)
        net = load_on_device(settings)
        patch_size, step = tile_of(settings, default_patch_size(net))
    left_out: list[tuple[str, str]] = []
    table = calibrate(net, args.model, args.input, args.precision, budgets or BUDGETS, patch_size, step, args.limit,
                      left_out)
    path = calibration_path(args.model)
    say(f'{markdown(table)}\nWrote {path}.\n',
        dict(table.content(), file=str(path), left_out=arguments.reasons(left_out)))
    return arguments.say_left_out(left_out)
