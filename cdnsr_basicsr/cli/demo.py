"""`basicsr demo`: a local page to try networks on."""
from __future__ import annotations

import argparse

from ..demo.server import HOST, MEGABYTES, MEGAPIXELS
from ..options import OptionError
from ..zoo import BEST
from . import arguments

MOST_PORTS = 65535


def add_parser(commands: arguments.Commands) -> None:
    command = arguments.new_command(
        commands, 'demo', 'open a local page to try a network: before and after, difficulty map, budget, time', run)
    command.add_argument(
        '-m', dest='model', default=BEST, metavar='MODEL', help=f'{arguments.CHECKPOINT} (default: {BEST})')
    command.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if available)')
    command.add_argument(
        '--host', default=HOST, metavar='ADDRESS', help=f'address to listen on (default: {HOST}, this machine alone)')
    command.add_argument(
        '--port',
        type=arguments.count,
        metavar='N',
        help='port to listen on (default: the first free one from 7860 on)')
    command.add_argument(
        '--max-megapixels',
        type=arguments.count,
        default=MEGAPIXELS,
        metavar='N',
        help=f'refuse images of more than N megapixels (default: {MEGAPIXELS})')
    command.add_argument(
        '--max-megabytes',
        type=arguments.count,
        default=MEGABYTES,
        metavar='N',
        help=f'refuse files of more than N megabytes (default: {MEGABYTES})')
    command.add_argument('--no-browser', action='store_false', dest='browser', help='do not open a browser')


def run(args: argparse.Namespace) -> int:
    from ..demo.server import check_installed, serve
    from ..loading import choose_device
    check_installed()
    if args.port is not None and args.port > MOST_PORTS:
        raise OptionError(f'--port {args.port}', f'expected a port up to {MOST_PORTS}')
    from ..zoo import shipped_models
    with arguments.said_by_flags(model='-m', port='--port', host='--host'):
        device = str(choose_device(args.device))
        models = list(dict.fromkeys([args.model, *shipped_models()]))
        print(f'Loading {args.model} ...', flush=True)
        try:
            serve(models, device, args.host, args.port, args.max_megapixels, args.max_megabytes, args.browser,
                  lambda url: print(f'The page is at {url}; Ctrl-C ends it.', flush=True))
        except KeyboardInterrupt:
            print('\nEnded; all images are deleted.')
    return 0
