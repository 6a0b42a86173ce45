"""`basicsr label`: difficulty labels of patches."""
from __future__ import annotations

import argparse

from .. import load_plugins
from ..memory import keep_freed_memory
from ..options import OptionError
from .arguments import CHECKPOINT, DESCRIPTION, Commands, count, new_command, said_by_flags

# of arguments of `label`
FLAGS = dict(folder='-d', by='--by', model='-m', overwrite='--overwrite', teacher='--teacher')
FLAGS.update(num_classes='--classes', thresholds='--thresholds', margin='--margin')


def add_parser(commands: Commands) -> None:
    command = new_command(commands, 'label', 'label the patches of a prepared dataset by difficulty', run)
    command.add_argument('-d', dest='data', required=True, metavar='OUT', help='folder written by prepare')
    command.add_argument(
        '--by',
        required=True,
        choices=['psnr', 'branches', 'bicubic'],
        help='criterion: PSNR of a network; cheapest branch of a CDNSR that is good enough; PSNR of bicubic upsampling')
    command.add_argument('-m', dest='model', metavar='MODEL', help=CHECKPOINT)
    command.add_argument(
        '-opt',
        metavar='FILE',
        help=f'{DESCRIPTION}; with --by branches and without -m, the one that will train the classifier')
    command.add_argument('--classes', type=int, metavar='M', help='number of classes of equal size (default: 3)')
    command.add_argument(
        '--thresholds',
        type=float,
        nargs='+',
        metavar='DB',
        help='PSNRs that separate the classes, instead of classes of equal size')
    command.add_argument(
        '--margin', type=float, help='accepted L1 error above that of the best branch, relative (default: 0.05)')
    command.add_argument('--workers', type=count, metavar='N', help='number of reader threads (default: all CPUs)')
    command.add_argument(
        '--teacher',
        action='store_true',
        help='with --by psnr: store the outputs of MODEL in OUT/teacher.lmdb, for dataroot_teacher')
    command.add_argument('--overwrite', action='store_true', help='replace existing results')


def check(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    if args.by == 'bicubic' and (args.model or args.opt):
        raise OptionError('--by bicubic', 'needs no network')
    if args.by != 'bicubic' and args.model is None and (args.by == 'psnr' or args.opt is None):
        raise OptionError(f'--by {args.by}', 'needs a network: -m MODEL')
    if args.by == 'branches' and args.thresholds:
        raise OptionError('--thresholds', 'requires --by psnr or bicubic')
    if args.classes is not None and (args.by == 'branches' or args.thresholds):
        raise OptionError(f'--classes {args.classes}', 'cannot be combined with --by branches or --thresholds')
    if args.margin is not None and args.by != 'branches':
        raise OptionError(f'--margin {args.margin}', 'expected a finite number of at least 0, and --by branches')


def run(args: argparse.Namespace) -> int:
    check(args)
    load_plugins()
    keep_freed_memory()
    from ..data.label import label
    given = dict(num_classes=args.classes, thresholds=args.thresholds, margin=args.margin, workers=args.workers)
    given = {name: value for name, value in given.items() if value is not None}
    with said_by_flags(**FLAGS):
        path, counts = label(
            args.data, args.by, args.model, args.opt, overwrite=args.overwrite, teacher=args.teacher, **given)
    print(f'Wrote {path}: ' + ', '.join(f'class {k}: {count}' for k, count in enumerate(counts)) + '.')
    return 0
