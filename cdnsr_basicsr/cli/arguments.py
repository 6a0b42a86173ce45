"""What commands share: arguments, checks of them, and what they say in the end."""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

from .. import load_plugins
from ..memory import keep_freed_memory
from ..options import OptionError, check_keys, check_number, one_line, read_options, read_routing

CHECKPOINT = 'checkpoint of the network, or name of a model (basicsr models)'
DESCRIPTION = 'option file that describes MODEL, if it does not do so itself'
Commands = Any  # what argparse's add_subparsers returns, a class without a public name
Run = Callable[[argparse.Namespace], int]


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


def count(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer of at least 1, but got {text!r}')
    return int(text)


def add_max_megapixels(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--max-megapixels', type=count, default=1000, metavar='N', help='refuse larger pictures (default: 1000)')


def add_engine(command: argparse.ArgumentParser, precisions: Optional[str] = None, routed_only: bool = False) -> None:
    command.add_argument(
        '--precision',
        choices=['float32', 'bfloat16', 'float16'],
        nargs=precisions,
        default=['float32'] if precisions else 'float32',
        help='of the branches (default: float32)')
    command.add_argument(
        '--patch-size',
        type=count,
        default=None,
        metavar='N',
        help='largest side of a tile (default: 96' + ('' if routed_only else '; 128 for PCSR') + ')')
    command.add_argument(
        '--step',
        type=count,
        default=None,
        metavar='N',
        help='patch size less the overlap of tiles (default: 4 less' +
        ('' if routed_only else ', 8 for a network without branches, 12 for PCSR') + ')')
    command.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')


@contextlib.contextmanager
def said_by_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Lets errors of a function name flags where they name its arguments: '--scale 0' for 'scale=0'.

    Args:
        flags: Flag of each argument.
    """

    def flag_of(match: re.Match) -> str:
        return flags[match[1]] + ('' if match[2] else ' ')

    try:
        yield
    except OptionError as error:
        named = rf'(?<!\S)({"|".join(flags)})=(True)?'
        key, message = (re.sub(named, flag_of, text) for text in (error.key, error.message))
        raise OptionError(flags.get(key, key), message) from error


def check_budgets(budgets: Sequence[float]) -> Sequence[float]:
    for budget in budgets:
        if not 0 < budget < float('inf'):
            raise OptionError(f'--budgets {budget}', 'expected numbers above 0')
    return budgets


def say_what_is_missing(folder: str, notes: Sequence[tuple[str, str]], left_out: Sequence[Any]) -> None:
    """Names pictures that were not done as a whole, and files that are no pictures, those of each ending in a line."""
    for path, note in notes:
        print(f'Not the whole of {path}: {note}.')
    endings: dict[str, list[str]] = {}
    for path in left_out:
        endings.setdefault(path.suffix or 'no ending', []).append(os.path.relpath(path, folder))
    for ending, names in sorted(endings.items()):
        print(f'Left alone, no picture by its ending: {ending}: {", ".join(names)}')


def say_left_out(photographs: Sequence[tuple[str, str]]) -> int:
    """Names photographs that were not measured with; the exit code says whether there are any."""
    for path, reason in photographs:
        print(f'Left out: {path}: {reason}', file=sys.stderr)
    return 1 if photographs else 0


def choose_device(name: Optional[str]) -> Any:
    """The device of a name. Default: the process's GPU if there is one, otherwise the CPU."""
    import torch
    if name in (None, 'cuda'):
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if name or torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == 'cuda':
            torch.cuda.set_device(device)  # events, synchronisation and statistics go by it
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise OptionError(f'--device {name}', f'cannot be used: {str(error).splitlines()[0]}') from error
    return device


def check_tile(patch_size: int, step: Optional[int]) -> None:
    if patch_size < 8 or not 1 <= (step or 1) <= patch_size:
        where = f'--patch-size {patch_size}' + (f' --step {step}' if step else '')
        raise OptionError(where, 'expected a patch size of at least 8, and a step up to it')


def choose_backend(args: argparse.Namespace) -> str:
    """What is to run the network; refused if it cannot."""
    from ..export import check_backend, is_exported, needs
    from ..inference.runtime import installed
    backend = args.backend or 'torch'
    if is_exported(args.model):
        if args.backend == 'torch':
            raise OptionError('--backend torch', f'{args.model} is an exported network; give the checkpoint instead')
        if not args.backend and not installed():
            raise needs(None)
        backend = args.backend or installed()[0]
    check_backend(backend, args.precision)
    if backend != 'torch':
        if args.device not in (None, 'cpu'):
            raise OptionError(f'--device {args.device}', f'{backend} runs on the CPU; --backend torch runs on others')
        args.device = 'cpu'
    return backend


def load_on_device(args: argparse.Namespace) -> Any:
    """The network that the arguments name, on the device that they name."""
    if not args.model and not args.opt:
        raise OptionError('-m', 'a checkpoint is needed: -m MODEL, or -opt FILE that names one')
    load_plugins()
    from ..checkpoint import load_network
    device = choose_device(args.device)
    net = load_network(args.model, args.opt).to(device)
    if device.type == 'cpu':
        keep_freed_memory()
    return net


def make_upscaler(args: argparse.Namespace, **kwargs: Any) -> Any:
    """The engine for the network and the settings that the arguments name."""
    from ..calibration import read_calibration, speed_of
    from ..export import in_backend, is_exported, load_exported
    from ..inference import default_patch_size
    from ..inference import make_upscaler as make_engine
    backend, calibration = choose_backend(args), None
    patch_size, step = tile_of(args)
    if is_exported(args.model):
        keep_freed_memory()
        model, net = args.model, load_exported(args.model, backend)
    else:
        net = load_on_device(args)
        model = args.model or read_options(args.opt)['path']['pretrain_network_g']
        calibration = read_calibration(model, net, args.precision, patch_size or default_patch_size(net))
    if calibration:
        kwargs['float32_branches'] = calibration.float32_branches
    check_tile(patch_size or default_patch_size(net), step)
    route_by(args, net, kwargs)
    if backend != 'torch' and not is_exported(args.model):
        net = in_backend(net, backend, model)
    try:
        upscaler = make_engine(net, patch_size, step, precision=args.precision, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise OptionError(model, one_line(error)) from error
    if calibration and backend == 'torch':
        upscaler.measured = speed_of(calibration, upscaler)
    return upscaler


def route_by(args: argparse.Namespace, net: Any, kwargs: dict) -> None:
    """Routes pixels as the option file says, if there is one; a budget of the arguments comes first."""
    from ..inference.pixel_engine import is_pixel_routed, route
    routing = read_routing(args.opt) if args.opt and is_pixel_routed(net) else {}
    if not routing:
        return
    route(net, routing)
    if kwargs.get('budget') is None and kwargs.get('target_ms') is None:
        kwargs['budget'] = routing.get('budget')


def tile_of(args: argparse.Namespace) -> tuple[Optional[int], Optional[int]]:
    """Patch size and step: the arguments', else the option file's, else None, the engine's."""
    tile = (read_options(args.opt).get('tile') or {}) if args.opt else {}
    check_keys(tile, ('patch_size', 'step'), f'{args.opt}: tile')
    for key, value in tile.items():
        check_number(value, f'{args.opt}: tile.{key}', 1, integer=True)
    patch_size = args.patch_size or tile.get('patch_size')
    step = args.step or (tile.get('step') if args.patch_size is None else None)
    return patch_size, step
