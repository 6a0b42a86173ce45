"""`basicsr convert`: checkpoints that describe themselves."""
from __future__ import annotations

import argparse

from .. import load_plugins
from ..conversion.registry import names_of_families
from ..options import OptionError
from .arguments import Commands, check_checkpoint_to_write, count, new_command


def add_parser(commands: Commands) -> None:
    command = new_command(commands, 'convert',
                          'convert a published checkpoint, or one of your own, to one that needs no option file', run)
    command.add_argument('input', metavar='IN', help='checkpoint (.pth or .safetensors), or name of a model')
    command.add_argument('-o', dest='output', required=True, metavar='OUT', help='output file: .pth or .safetensors')
    command.add_argument(
        '--from',
        dest='family',
        metavar='FAMILY',
        default='auto',
        help=f'family of the file: {names_of_families()} (default: auto, detected from its weights)')
    command.add_argument(
        '-opt', metavar='FILE', help='option file that describes IN, for checkpoints of BasicSR\'s own models')
    command.add_argument(
        '--num-feat', type=count, metavar='N', help='width of the branch to take from an ARM-Net (default: the widest)')
    command.add_argument('--scale', type=count, metavar='N', help='scale, for files that do not state it (default: 4)')
    command.add_argument(
        '--plain',
        action='store_true',
        help='turn ETDS, ECBSR and ABPN, in branches too, into equivalent plain convolutions, for inference')
    command.add_argument(
        '--clip',
        action='store_true',
        help='with --plain: add a last convolution that clips to [0, 1], as published for phones')
    command.add_argument('--overwrite', action='store_true', help='replace an existing OUT')


def run(args: argparse.Namespace) -> int:
    check_checkpoint_to_write(args.output, args.overwrite)
    if args.clip and not args.plain:
        raise OptionError('--clip', 'requires --plain')
    load_plugins()
    from ..conversion.convert import convert, describe, made_plain, save
    converted = convert(args.input, args.family, args.opt, args.num_feat, args.scale)
    if args.plain:
        converted = made_plain(converted, args.input, args.clip)
    save(converted, args.output)
    print(f'{describe(converted)}\nWrote {args.output}.')
    return 0
