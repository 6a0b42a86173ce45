"""The `basicsr` command."""
from __future__ import annotations

import argparse
import os
import sys
import traceback
from importlib import metadata
from typing import Optional, Sequence

from . import __version__, register
from .memory import keep_freed_memory
from .options import OptionError, apply_force_yml, check_options, read_options


def count(text: str) -> int:
    """Argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='basicsr', description='Trains, tests and feeds super-resolution networks with BasicSR and its plugins.')
    parser.add_argument('--version', action='version', version=f'cdnsr_basicsr {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    for name, text in (('train', 'train a model: BasicSR\'s train_pipeline in the current folder'),
                       ('test', 'test a model: BasicSR\'s test_pipeline in the current folder')):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument('-opt', required=True, metavar='FILE', help='option file (YAML)')
        command.add_argument(
            '--launcher',
            choices=['none', 'pytorch', 'slurm'],
            default='none',
            help='how the processes of a distributed run are started (default: none)')
        command.add_argument('--auto_resume', action='store_true', help='go on from the newest complete training state')
        command.add_argument('--debug', action='store_true', help='log every iteration, validate every 8th')
        command.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
        command.add_argument(
            '--force_yml',
            nargs='+',
            default=[],
            metavar='KEY:SUB=VALUE',
            help='change options of the file, for example train:ema_decay=0.999')

    text = 'make GT/LQ patches in LMDB out of a folder of photographs'
    command = commands.add_parser('prepare', help=text, description=text)
    command.add_argument(
        '-i', dest='input', required=True, metavar='HR_FOLDER', help='photographs, subfolders included')
    command.add_argument('-o', dest='output', required=True, metavar='OUT', help='folder to write')
    command.add_argument('--scale', type=int, default=4, help='LQ is this much smaller than GT (default: 4)')
    command.add_argument(
        '--scales',
        type=float,
        nargs='+',
        default=[1, 0.9, 0.8, 0.7, 0.6],
        metavar='FRACTION',
        help='sizes of each photograph to cut patches from (default: 1 0.9 0.8 0.7 0.6)')
    command.add_argument('--crop', type=int, help='side of a GT patch (default: 32 x scale)')
    command.add_argument('--step', type=int, help='distance of GT patches (default: 3/4 of crop)')
    command.add_argument(
        '--whole',
        action='store_true',
        help='write whole photographs into OUT/gt and OUT/lq, for validation, instead of patches')
    command.add_argument('--workers', type=count, default=None, metavar='N', help='threads (default: all CPUs)')
    command.add_argument('--overwrite', action='store_true', help='replace a finished OUT')

    text = 'label the patches of a prepared dataset by difficulty'
    command = commands.add_parser('label', help=text, description=text)
    command.add_argument('-d', dest='data', required=True, metavar='OUT', help='folder that prepare wrote')
    command.add_argument(
        '--by',
        required=True,
        choices=['psnr', 'branches', 'bicubic'],
        help='PSNR of a network; cheapest good branch of a CDNSR; PSNR of bicubic upsampling')
    command.add_argument('-m', dest='model', metavar='MODEL', help='checkpoint of the network')
    command.add_argument('-opt', metavar='FILE', help='option file that describes MODEL, if it does not do so itself')
    command.add_argument('--classes', type=int, default=3, metavar='M', help='number of equal parts (default: 3)')
    command.add_argument(
        '--thresholds',
        type=float,
        nargs='+',
        metavar='DB',
        help='PSNRs that separate the classes, instead of equal parts')
    command.add_argument(
        '--margin', type=float, help='L1 error allowed above the best branch, relative (default: 0.05)')
    command.add_argument('--workers', type=count, default=None, metavar='N', help='reading threads (default: all CPUs)')
    command.add_argument('--overwrite', action='store_true', help='replace existing labels')
    return parser


def load_plugins() -> None:
    """Registers this plugin and all others in the entry-point group `basicsr.plugins`."""
    register()
    points = metadata.entry_points()
    # Python 3.9 returns a dict of groups
    group = points.select(group='basicsr.plugins') if hasattr(points, 'select') else points.get('basicsr.plugins', ())
    for point in group:
        try:
            point.load()()
        except Exception as error:
            raise OptionError(f'plugin {point.name} ({point.value})', f'cannot be loaded: {error!r}') from error


# BasicSR's and our functions that turn an option file into objects
SETUP = {
    'check_options', 'parse_options', 'load_resume_state', '_load_resume_state', 'make_exp_dirs', 'init_tb_loggers',
    'build_dataset', 'build_dataloader', 'create_train_val_dataloader', 'build_model', 'resume_training'
}


def failed_in_setup(error: BaseException) -> bool:
    """Whether an error was raised while an option file was turned into objects: then it is the option file's fault."""
    return any(frame.name in SETUP for frame in traceback.extract_tb(error.__traceback__))


def run_pipeline(args: argparse.Namespace) -> int:
    """Runs BasicSR's train_pipeline or test_pipeline with the current folder as root."""
    is_train = args.command == 'train'
    opt = read_options(args.opt)
    # BasicSR's parse_options reads sys.argv
    sys.argv = [f'basicsr {args.command}', '-opt', args.opt, '--launcher', args.launcher]
    sys.argv += ['--auto_resume'] * args.auto_resume + ['--debug'] * args.debug
    sys.argv += ['--force_yml', *args.force_yml] if args.force_yml else []
    try:
        apply_force_yml(opt, args.force_yml)
        load_plugins()
        check_options(opt, is_train, args.auto_resume)
        import torch

        from basicsr import test, train
        if not torch.cuda.is_available():
            keep_freed_memory()
        pipeline = train.train_pipeline if is_train else test.test_pipeline
        pipeline(os.getcwd())
    except OptionError as error:
        raise OptionError(args.opt, str(error)) from error
    except Exception as error:
        if args.debug or not failed_in_setup(error):
            raise
        reason = ' '.join(str(error).split())[:300]
        message = f'BasicSR cannot set this up: {type(error).__name__}: {reason} (--debug shows where)'
        raise OptionError(args.opt, message) from error

    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # gloo can hang when one process leaves before the others
        dist.destroy_process_group()
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    from .data.prepare import prepare
    done = prepare(args.input, args.output, args.scale, args.scales, args.crop, args.step, args.workers, args.whole,
                   args.overwrite)
    print(f'Wrote {done.pairs} {"photographs" if args.whole else "patches"} to {args.output}.')
    for path in done.too_small:
        print(f'Left out, smaller than a patch: {path}', file=sys.stderr)
    for path in done.unreadable:
        print(f'Left out, cannot be read: {path}', file=sys.stderr)
    return 1 if done.unreadable else 0


def run_label(args: argparse.Namespace) -> int:
    load_plugins()
    from .data.label import label
    path, counts = label(args.data, args.by, args.model, args.opt, args.classes, args.thresholds, args.margin,
                         args.workers, args.overwrite)
    print(f'Wrote {path}: ' + ', '.join(f'class {k}: {count}' for k, count in enumerate(counts)) + '.')
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        Exit code: 0 done, 1 done but some files were left out, 2 a mistake in the options or arguments.
    """
    args = build_parser().parse_args(argv)
    commands = {'train': run_pipeline, 'test': run_pipeline, 'prepare': run_prepare, 'label': run_label}
    try:
        return commands[args.command](args)
    except OptionError as error:
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        if args.command in ('train', 'test'):
            raise
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('basicsr: interrupted', file=sys.stderr)
        return 130
