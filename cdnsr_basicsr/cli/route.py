"""`basicsr route`: combines trained networks into a routed network."""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

from .. import load_plugins
from ..options import OptionError
from ..settings import PRECISIONS, Settings
from . import arguments

if TYPE_CHECKING:
    from ..conversion.convert import Converted


def add_parser(commands: arguments.Commands) -> None:
    command = arguments.new_command(
        commands, 'route', 'combine a heavy network and lighter ones, all unchanged, into one routed network: learn '
        'where the lighter ones suffice, and measure the gain', run)
    command.add_argument('heavy', metavar='HEAVY', help='checkpoint of the heavy network, or name of a model')
    command.add_argument(
        '--with',
        dest='lighter',
        nargs='+',
        required=True,
        metavar='LIGHT',
        help='1 to 4 lighter networks of the same scale, or bicubic')
    command.add_argument(
        '-i',
        dest='input',
        required=True,
        metavar='FOLDER',
        help='images like those you upscale, as they are, or a folder with lq/ and gt/; with --reference gt: '
        'photographs, which are downscaled, or such a folder')
    command.add_argument('-o', dest='output', required=True, metavar='OUT', help='output file: .pth or .safetensors')
    command.add_argument(
        '-opt',
        dest='options',
        nargs='+',
        default=[],
        metavar='FILE',
        help="option files, in any order, for checkpoints without a description, such as those of BasicSR's own models")
    command.add_argument(
        '--reference',
        choices=('hardest', 'gt'),
        default='hardest',
        help="what errors are measured against: HEAVY's image, or the ground truth (default: hardest)")
    goals = command.add_mutually_exclusive_group()
    goals.add_argument(
        '--fidelity',
        type=float,
        metavar='DB',
        help="PSNR relative to HEAVY's image that routing maintains, over all images together (default: 45)")
    goals.add_argument(
        '--max-loss',
        type=float,
        metavar='DB',
        help='with --reference gt: PSNR that routing may lose against HEAVY alone, over all images together '
        '(default: 0.02)')
    command.add_argument('--limit', type=arguments.count, metavar='N', help='use only the first N images')
    command.add_argument('--overwrite', action='store_true', help='replace an existing OUT')
    command.add_argument(
        '--precision',
        choices=PRECISIONS,
        default=Settings.precision,
        help=f'precision of the networks (default: {Settings.precision})')
    command.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if available)')


def run(args: argparse.Namespace) -> int:
    arguments.check_checkpoint_to_write(args.output, args.overwrite)
    picture = Path(args.output).with_suffix('.png')
    if picture.exists() and not args.overwrite:
        raise OptionError(str(picture), 'already exists; --overwrite replaces it')
    if len(args.lighter) > 4:
        raise OptionError('--with', f'expected 1 to 4 networks, but got {len(args.lighter)}')
    for flag, value, reference in (('--fidelity', args.fidelity, 'hardest'), ('--max-loss', args.max_loss, 'gt')):
        if value is not None and not 0 < value < float('inf'):
            raise OptionError(f'{flag} {value}', 'expected a number above 0')
        if value is not None and reference != args.reference:
            raise OptionError(flag, f'requires --reference {reference}')
    load_plugins()
    from ..conversion.convert import Converted, save
    from ..loading import choose_device
    from ..memory import keep_freed_memory
    from ..router import Goal
    from ..routing import FIDELITY, MAX_LOSS, draw, markdown, route, verdict
    with arguments.said_by_flags():
        device = choose_device(args.device)
    if device.type == 'cpu':
        keep_freed_memory()
    heavy = network(args.heavy, args.options)
    named = {name: bicubic(heavy.scale) if name == 'bicubic' else network(name, args.options) for name in args.lighter}
    for name, branch in (*named.items(), (args.heavy, heavy)):
        if 'branches' in branch.block:
            raise OptionError(name, 'is already routed; expected a network without branches')
    left_out: list[tuple[str, str]] = []
    if args.reference == 'gt':
        goal = Goal('gt', MAX_LOSS if args.max_loss is None else args.max_loss)
    else:
        goal = Goal('hardest', FIDELITY if args.fidelity is None else args.fidelity)
    networks = [*named.values(), heavy]
    try:
        routed = route([branch.block for branch in networks], [branch.net for branch in networks],
                       [os.path.basename(name) for name in (*named, args.heavy)],
                       args.input,
                       goal,
                       args.limit,
                       device,
                       left_out,
                       lambda text: print(text, file=sys.stderr, flush=True),
                       precision=args.precision)
    except ValueError as error:
        raise OptionError('--with', str(error)) from error
    save(Converted(routed.net.cpu(), routed.block, 'own', ()), args.output)
    draw(routed, picture)
    held_back = 'parts of others' if routed.apart else 'other parts of the same (with 3 photographs or more: of others)'
    print(f'{routed.photographs} photographs; trained on {routed.parts[0]} parts of some, measured on {held_back}:\n\n'
          f'{markdown(routed)}\n{verdict(routed)}\nWrote {args.output} and {picture}.')
    return arguments.say_left_out(left_out)


def network(path: str, options: Sequence[str]) -> Converted:
    """Loads a network; without a description of its own, by the first option file that fits."""
    from ..conversion.convert import convert
    misfit: Optional[OptionError] = None
    for opt_path in (None, *options):
        try:
            return convert(path, opt_path=opt_path)
        except OptionError as error:
            misfit = error
    assert misfit is not None
    raise misfit


def bicubic(scale: int) -> Converted:
    """Bicubic upsampling as a converted network."""
    from ..archs import Interpolation
    from ..conversion.convert import Converted
    return Converted(Interpolation(scale), dict(type='Interpolation', upscale=scale), 'own', ())
