"""`basicsr prepare`: training and validation sets out of photographs."""
from __future__ import annotations

import argparse
import sys

from .arguments import Commands, add_max_megapixels, count, new_command, said_by_flags, say_what_is_missing

# of arguments of `prepare`
FLAGS = dict(hr_folder='-i', out='-o', overwrite='--overwrite')
FLAGS.update(scale='--scale', scales='--scales', crop='--crop', step='--step')


def add_parser(commands: Commands) -> None:
    command = new_command(commands, 'prepare', 'cut a folder of photographs into GT/LQ patches in LMDB', run)
    command.add_argument(
        '-i',
        dest='input',
        required=True,
        metavar='HR_FOLDER',
        help='folder of photographs, including subfolders, or one with pairs of images in gt/ and lq/')
    command.add_argument('-o', dest='output', required=True, metavar='OUT', help='output folder')
    command.add_argument('--scale', type=int, default=4, help='downscaling factor from GT to LQ (default: 4)')
    command.add_argument(
        '--scales',
        type=float,
        nargs='+',
        default=[1, 0.9, 0.8, 0.7, 0.6],
        metavar='FRACTION',
        help='relative sizes at which each photograph is cut into patches (default: 1 0.9 0.8 0.7 0.6)')
    command.add_argument('--crop', type=int, help='side of a GT patch in pixels (default: 32 x scale)')
    command.add_argument('--step', type=int, help='distance between GT patches in pixels (default: 3/4 of crop)')
    command.add_argument(
        '--whole',
        action='store_true',
        help='write whole images to OUT/gt and OUT/lq, for validation, instead of patches')
    command.add_argument(
        '--gray',
        action='store_true',
        help='write grayscale images, for networks with one channel (color: y in the dataset)')
    command.add_argument('--workers', type=count, metavar='N', help='number of threads (default: all CPUs)')
    add_max_megapixels(command)
    command.add_argument('--overwrite', action='store_true', help='replace an existing OUT')


def run(args: argparse.Namespace) -> int:
    from ..data.prepare import prepare
    with said_by_flags(**FLAGS):
        done = prepare(args.input, args.output, args.scale, args.scales, args.crop, args.step, args.workers, args.whole,
                       args.overwrite, args.gray, args.max_megapixels)
    print(f'Wrote {done.pairs} {"photographs" if args.whole else "patches"} to {args.output}.')
    say_what_is_missing(args.input, done.notes, done.left_out)
    for path in done.too_small:
        print(f'Left out, smaller than a patch: {path}', file=sys.stderr)
    for path, reason in done.unreadable:
        print(f'Left out, cannot be read: {path}: {reason}', file=sys.stderr)
    return 1 if done.unreadable else 0
