"""`basicsr benchmark`: networks side by side."""
from __future__ import annotations

import argparse

from .. import load_plugins
from ..options import OptionError
from ..settings import BACKENDS, COSTS
from . import arguments


def add_parser(commands: arguments.Commands) -> None:
    command = arguments.new_command(
        commands, 'benchmark',
        'compare networks on photographs: quality, cost, time and memory, on whole images, in tiles and routed', run)
    command.add_argument(
        '-m',
        dest='models',
        nargs='+',
        required=True,
        metavar='MODEL',
        help='checkpoints, names of models (see basicsr models), or option files that name one at '
        'path.pretrain_network_g')
    command.add_argument(
        '--singles',
        nargs='+',
        default=[],
        metavar='MODEL',
        help='networks without branches to compare with, on whole images only')
    command.add_argument(
        '--data',
        required=True,
        metavar='FOLDER',
        help='folder of photographs, or one with gt/ and lq/ (from prepare --whole)')
    command.add_argument(
        '-o',
        dest='output',
        metavar='FOLDER',
        help='write benchmark.md, benchmark.csv and benchmark.png to this folder')
    command.add_argument(
        '--budgets',
        type=float,
        nargs='+',
        default=[],
        metavar='FRACTION',
        help='budgets to measure, for networks with branches')
    command.add_argument(
        '--repeat', type=arguments.count, default=3, metavar='N', help='number of timed runs (default: 3)')
    command.add_argument('--limit', type=arguments.count, metavar='N', help='use only the first N photographs')
    command.add_argument(
        '--cost',
        choices=COSTS,
        help='what a budget counts (default: latency if the branches have different archs, otherwise macs)')
    command.add_argument(
        '--no-ssim', action='store_false', dest='with_ssim', help='skip SSIM, which takes longer than everything else')
    command.add_argument(
        '--branches', action='store_true', help='also measure each branch alone, and bicubic upsampling')
    command.add_argument(
        '--oracle',
        action='store_true',
        help="also route by the branches' true errors, an upper bound: at each budget, and at an ErrorMap's price")
    arguments.add_engine(command, '+')
    command.add_argument(
        '--backends',
        nargs='+',
        choices=BACKENDS,
        default=[BACKENDS[0]],
        help='runtimes for the networks in tiles (default: torch)')
    arguments.add_json(command)


@arguments.answers
def run(args: argparse.Namespace, say: arguments.Say) -> int:
    arguments.check_budgets(args.budgets)
    load_plugins()
    from ..benchmark import Settings, as_dict, benchmark, markdown, write_report
    from ..files import make_writable
    from ..inference.pixel_upscaler import PATCH_SIZE
    from ..loading import check_tile, choose_device
    with arguments.said_by_flags():
        check_tile(args.patch_size or PATCH_SIZE, args.step)  # the larger of the engines' defaults
    if set(args.backends) - {'torch'}:
        if args.device not in (None, 'cpu'):
            raise OptionError(f'--device {args.device}', 'only torch runs on other devices than the CPU')
        args.device = 'cpu'
    with arguments.said_by_flags():
        args.device = str(choose_device(args.device))
    if args.output:
        make_writable(args.output)
    settings = Settings(precisions=args.precision, **arguments.given_for(Settings, args))
    measured, text, left_out = benchmark(settings)
    say(f'{text}\n\n{markdown(measured)}',
        dict(measured=text, rows=[as_dict(row) for row in measured], left_out=arguments.reasons(left_out)))
    if args.output:
        write_report(measured, text, args.output)
    return arguments.say_left_out(left_out)
