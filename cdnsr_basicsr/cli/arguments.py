"""Shared by the commands: arguments, their checks, and summaries."""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence

from ..options import OptionError
from ..settings import MAX_MEGAPIXELS, PRECISIONS, Settings

CHECKPOINT = 'checkpoint, or name of a model (see basicsr models)'
DESCRIPTION = 'option file that describes MODEL, for checkpoints without a description'
# flags of the settings, for messages
FLAGS = {field.name: '--' + field.name.replace('_', '-') for field in fields(Settings)}
FLAGS.update(model='-m', opt='-opt')
Commands = Any  # what argparse's add_subparsers returns, a class without a public name
Run = Callable[[argparse.Namespace], int]
Say = Callable[[str, dict[str, Any]], None]


def new_command(commands: Commands, name: str, text: str, run: Run) -> argparse.ArgumentParser:
    """A command without arguments yet.

    Args:
        commands: All commands.
        name: Of the new one.
        text: What it does, as its help says.
        run: Does it, and returns the exit code.
    """
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def add_json(command: argparse.ArgumentParser) -> None:
    """For commands whose run `answers`."""
    command.add_argument(
        '--json', action='store_true', help='print one JSON object instead of text (docs/Json.md has its keys)')


def answers(run: Callable[[argparse.Namespace, Say], int]) -> Run:
    """Makes the `run` of a command with `--json` from a function that returns its result as text and as content.

    With `--json`, standard output holds the content alone: what the command, plugins, libraries and processes print
    meanwhile goes to standard error. Where the function raises, nothing is printed.
    """

    @functools.wraps(run)
    def answering(args: argparse.Namespace) -> int:
        if not args.json:
            return run(args, lambda text, content: print(text, end=''))
        said: list[dict[str, Any]] = []
        with standard_output_to_error():
            code = run(args, lambda text, content: said.append(content))
        for content in said:
            print(json.dumps(finite(content), indent=1, allow_nan=False))
        return code

    return answering


@contextlib.contextmanager
def standard_output_to_error() -> Iterator[None]:
    """Redirects standard output to standard error, also for other processes and for libraries in other languages."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def finite(value: Any) -> Any:
    """Replaces numbers that are not finite, which JSON lacks, by None, also within lists and dicts."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer of at least 1, but got {text!r}')
    return int(text)


def add_max_megapixels(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--max-megapixels',
        type=count,
        default=MAX_MEGAPIXELS,
        metavar='N',
        help=f'refuse images of more than N megapixels (default: {MAX_MEGAPIXELS})')


def add_engine(command: argparse.ArgumentParser, precisions: Optional[str] = None, routed_only: bool = False) -> None:
    command.add_argument(
        '--precision',
        choices=PRECISIONS,
        nargs=precisions,
        default=[Settings.precision] if precisions else Settings.precision,
        help=f'precision of the branches (default: {Settings.precision})')
    sizes, steps = '; 68 for an ErrorMap, 128 for PCSR', ', 8 for a network without branches, 12 for PCSR'
    if routed_only:
        sizes, steps = '; 68 for an ErrorMap', ''
    command.add_argument(
        '--patch-size', type=count, metavar='N', help=f'largest side of a tile in LR pixels (default: 96{sizes})')
    command.add_argument(
        '--step', type=count, metavar='N', help=f'patch size minus the overlap of tiles (default: 4 less{steps})')
    command.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if available)')


def add_resources(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--memory',
        metavar='SIZE',
        help='stay below this, for example 4G, 4GiB or 512M; auto: three quarters of what is free. On a CPU, the '
        'resident memory of the process and its decoders; on a GPU, what torch reserves there (default: no limit)')
    command.add_argument(
        '--threads', type=count, metavar='N', help='number of threads that compute (default: one for each CPU core)')


@contextlib.contextmanager
def said_by_flags(**others: str) -> Iterator[None]:
    """Makes errors of a function name flags instead of its arguments: '--scale 0' for 'scale=0'.

    Args:
        others: Flag of each argument that is none of the settings.
    """
    flags = {**FLAGS, **others}

    def flag_of(match: re.Match) -> str:
        return flags[match[1]] + ('' if match[2] else ' ')

    try:
        yield
    except OptionError as error:
        named = rf'(?<!\S)({"|".join(flags)})=(True)?'
        key, message = (re.sub(named, flag_of, text) for text in (error.key, error.message))
        raise OptionError(flags.get(key, key), message) from error


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings among the arguments."""
    if not args.model and not args.opt:
        raise OptionError('-m', 'a checkpoint is needed: -m MODEL, or -opt FILE that names one')
    return Settings(**given_for(Settings, args))


def given_for(struct: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for which a dataclass has fields."""
    return {field.name: getattr(args, field.name) for field in fields(struct) if hasattr(args, field.name)}


def check_checkpoint_to_write(path: str, overwrite: bool) -> None:
    """Refuses a name without a checkpoint's extension, in a missing folder, or of an existing file."""
    if os.path.splitext(path)[1] not in ('.pth', '.safetensors'):
        raise OptionError(f'-o {path}', 'expected a name that ends in .pth or .safetensors')
    if not os.path.isdir(os.path.dirname(path) or '.'):
        raise OptionError(os.path.dirname(path), 'no such folder')
    if os.path.exists(path) and not overwrite:
        raise OptionError(path, 'already exists; --overwrite replaces it')


def check_budgets(budgets: Sequence[float]) -> Sequence[float]:
    for budget in budgets:
        if not 0 < budget < float('inf'):
            raise OptionError(f'--budgets {budget}', 'expected numbers above 0')
    return budgets


def say_what_is_missing(folder: str, notes: Sequence[tuple[str, str]], left_out: Sequence[Any]) -> None:
    """Prints images that were read in part, and files that are not images, one line for each extension."""
    for path, note in notes:
        print(f'Read in part: {path}: {note}.')
    endings: dict[str, list[str]] = {}
    for path in left_out:
        endings.setdefault(Path(path).suffix or 'no extension', []).append(os.path.relpath(path, folder))
    for ending, names in sorted(endings.items()):
        print(f'Skipped, not an image format: {ending}: {", ".join(names)}')


def reasons(photographs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Files that were left out or failed, with the reason, for --json."""
    return [dict(path=path, reason=reason) for path, reason in photographs]


def say_left_out(photographs: Sequence[tuple[str, str]]) -> int:
    """Prints photographs that were left out; the exit code says whether there are any."""
    for path, reason in photographs:
        print(f'Left out: {path}: {reason}', file=sys.stderr)
    return 1 if photographs else 0
