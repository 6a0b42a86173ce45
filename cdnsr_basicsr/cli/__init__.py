"""The `basicsr` command."""
from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from importlib import import_module
from typing import Any, Iterator, NoReturn, Optional, Sequence

from ..options import OptionError
from ..pipeline import RunFailed

# modules beside this one, in the order of --help: each has add_parser and run (train has test too), and imports what is
# slow to import where it runs
COMMANDS = ('train', 'prepare', 'label', 'export', 'upscale', 'models', 'convert', 'route', 'calibrate', 'benchmark',
            'demo', 'env')
TRAINING = ('train', 'test')  # BasicSR's pipelines see to signals and errors of files themselves


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


class Version(argparse.Action):
    """Imports torch only when needed."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        from ..environment import summary
        print(summary(), end='')
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='basicsr', description='Train, run and compare super-resolution networks with BasicSR and its plugins.')
    parser.add_argument(
        '--version',
        action=Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help='show the versions of this package and torch, the device and the plugins, and exit')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name in COMMANDS:
        import_module(f'{__name__}.{name}').add_parser(commands)
    return parser


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM, as of Slurm, timeout or docker stop, end the process as Ctrl-C does: nothing is left over."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other may set handlers
        return

    def stop(number: int, frame: Any) -> NoReturn:
        while frame is not None:
            if frame.f_globals.get('__name__') == 'importlib._bootstrap':
                os._exit(128 + number)  # half-imported modules turn the exception into others; nothing is begun yet
            frame = frame.f_back
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        Exit code: 0 done; 1 done but some files were left out, a run that was set up has failed, or, of env, something
            cannot be imported; 2 a mistake in the options or arguments.
    """
    args = build_parser().parse_args(argv)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files need not be UTF-8
    try:
        with contextlib.nullcontext() if args.command in TRAINING else terminable():
            return args.run(args)
    except OptionError as error:
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        if args.command in TRAINING:
            raise
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('basicsr: interrupted', file=sys.stderr)
        return 130
