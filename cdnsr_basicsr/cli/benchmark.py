"""`basicsr benchmark`: networks side by side."""
from __future__ import annotations

import argparse

from .. import load_plugins
from ..options import OptionError
from ..settings import BACKENDS, COSTS
from .arguments import FLAGS, Commands, add_engine, check_budgets, count, new_command, said_by_flags, say_left_out


def add_parser(commands: Commands) -> None:
    command = new_command(commands, 'benchmark',
                          'compare networks on photographs: quality, cost, time and memory, whole, tiled and routed',
                          run)
    command.add_argument(
        '-m',
        dest='models',
        nargs='+',
        required=True,
        metavar='MODEL',
        help='checkpoints, names of models (basicsr models), or option files that name one at path.pretrain_network_g')
    command.add_argument(
        '--data', required=True, metavar='FOLDER', help='photographs, or a folder with gt/ and lq/ (prepare --whole)')
    command.add_argument('-o', dest='output', metavar='FOLDER', help='write benchmark.md, .csv and .png there')
    command.add_argument(
        '--budgets', type=float, nargs='+', default=[], metavar='FRACTION', help='budgets of networks with branches')
    command.add_argument('--repeat', type=count, default=3, metavar='N', help='timed runs of each (default: 3)')
    command.add_argument('--limit', type=count, metavar='N', help='only the first N photographs')
    command.add_argument('--cost', choices=COSTS, default=COSTS[0], help='what a budget counts (default: macs)')
    command.add_argument('--no-ssim', action='store_true', help='without SSIM, which takes longer than all the rest')
    command.add_argument('--branches', action='store_true', help='each branch alone too, and bicubic upsampling')
    command.add_argument(
        '--oracle', action='store_true', help="the budgets also routed by the branches' true errors, as a bound")
    add_engine(command, '+')
    command.add_argument(
        '--backends',
        nargs='+',
        choices=BACKENDS,
        default=[BACKENDS[0]],
        help='what runs the networks in tiles (default: torch)')


def run(args: argparse.Namespace) -> int:
    check_budgets(args.budgets)
    load_plugins()
    from ..benchmark import Settings, benchmark, markdown, write_report
    from ..files import make_writable
    from ..inference.pixel_upscaler import PATCH_SIZE
    from ..loading import check_tile, choose_device
    with said_by_flags(FLAGS):
        check_tile(args.patch_size or PATCH_SIZE, args.step)  # the larger of the engines' defaults
    if args.oracle and not args.budgets:
        raise OptionError('--oracle', 'goes with --budgets')
    if set(args.backends) - {'torch'}:
        if args.device not in (None, 'cpu'):
            raise OptionError(f'--device {args.device}', 'only torch runs on others than the CPU')
        args.device = 'cpu'
    with said_by_flags(FLAGS):
        device = choose_device(args.device)
    if args.output:
        make_writable(args.output)
    settings = Settings(
        models=args.models,
        data=args.data,
        budgets=args.budgets,
        precisions=args.precision,
        repeat=args.repeat,
        limit=args.limit,
        patch_size=args.patch_size,
        step=args.step,
        device=str(device),
        backends=args.backends,
        oracle=args.oracle,
        branches=args.branches,
        cost=args.cost,
        with_ssim=not args.no_ssim)
    measured, text, left_out = benchmark(settings)
    print(f'{text}\n\n{markdown(measured)}', end='')
    if args.output:
        write_report(measured, text, args.output)
    return say_left_out(left_out)
