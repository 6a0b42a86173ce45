"""`basicsr route`: a routed network of networks that are trained already."""
from __future__ import annotations

import argparse
import os

from .. import load_plugins
from ..options import OptionError
from . import arguments


def add_parser(commands: arguments.Commands) -> None:
    command = arguments.new_command(
        commands, 'route', 'make a routed network of a heavy network and lighter ones, which stay as they are: '
        'learns from photographs where the lighter ones do', run)
    command.add_argument('heavy', metavar='HEAVY', help='checkpoint of the heavy network, or name of a model')
    command.add_argument(
        '--with',
        dest='lighter',
        nargs='+',
        required=True,
        metavar='LIGHT',
        help='1 to 4 lighter ones of the same scale, or bicubic')
    command.add_argument(
        '-i',
        dest='input',
        required=True,
        metavar='FOLDER',
        help='photographs to learn from, which are made small, or a folder with gt/ and lq/')
    command.add_argument('-o', dest='output', required=True, metavar='OUT', help='file to write: .pth or .safetensors')
    command.add_argument(
        '--max-loss',
        type=float,
        default=0.02,
        metavar='DB',
        help='dB that routing may cost, against HEAVY alone, of all photographs together (default: 0.02)')
    command.add_argument('--limit', type=arguments.count, metavar='N', help='only the first N photographs')
    command.add_argument('--overwrite', action='store_true', help='replace an existing OUT')
    command.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')


def run(args: argparse.Namespace) -> int:
    arguments.check_checkpoint_to_write(args.output, args.overwrite)
    if len(args.lighter) > 4:
        raise OptionError('--with', f'expected 1 to 4 networks, but got {len(args.lighter)}')
    if not 0 < args.max_loss < float('inf'):
        raise OptionError(f'--max-loss {args.max_loss}', 'expected a number above 0')
    load_plugins()
    from ..conversion.convert import Converted, convert, save
    from ..loading import choose_device
    from ..router import route
    with arguments.said_by_flags():
        device = choose_device(args.device)
    heavy = convert(args.heavy)
    converted = [bicubic(heavy.scale) if name == 'bicubic' else convert(name) for name in args.lighter] + [heavy]
    for name, network in zip((*args.lighter, args.heavy), converted):
        if 'branches' in network.block:
            raise OptionError(name, 'routes already; a branch is a network without branches')
    left_out: list[tuple[str, str]] = []
    try:
        routed = route([network.block for network in converted], [network.net for network in converted], args.input,
                       args.max_loss, args.limit, device, left_out)
    except ValueError as error:
        raise OptionError('--with', str(error)) from error
    save(Converted(routed.net.cpu(), routed.block, 'own', ()), args.output)
    others = f'{routed.held_back} others' if routed.held_back else 'the same, which says little (5 or more are needed)'
    print(f'{routed.photographs} photographs learnt from; on {others}:\n\n'
          '| branch | PSNR alone | share |\n| --- | --- | --- |')
    for name, psnr, share in zip((*args.lighter, args.heavy), routed.psnr, routed.shares):
        print(f'| {os.path.basename(name)} | {psnr:.3f} | {100 * share:.1f} % |')
    print(f'\nRouted: {routed.cost:.2f} of the time of {os.path.basename(args.heavy)}, overlap of tiles not counted, '
          f'{routed.loss:.3f} dB below it.\nWrote {args.output}.')
    return arguments.say_left_out(left_out)


def bicubic(scale: int):  # type: ignore[no-untyped-def]
    """Bicubic upsampling as a network that has been converted."""
    from ..archs import Interpolation
    from ..conversion.convert import Converted
    return Converted(Interpolation(scale), dict(type='Interpolation', upscale=scale), 'own', ())
