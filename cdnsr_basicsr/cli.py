"""The `basicsr` command."""
from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from typing import Any, Iterator, NoReturn, Optional, Sequence

from . import __version__, load_plugins
from .conversion.registry import names_of_families
from .memory import keep_freed_memory
from .options import OptionError, check_keys, check_number, one_line, read_options, read_routing
from .pipeline import RunFailed, run_pipeline
from .zoo import describe, shipped_models

CHECKPOINT = 'checkpoint of the network, or name of a model (basicsr models)'


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


def count(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer of at least 1, but got {text!r}')
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    command.add_argument(
        '--gray', action='store_true', help='write gray images, for networks of one channel (color: y in the dataset)')
    command.add_argument('--workers', type=count, default=None, metavar='N', help='threads (default: all CPUs)')
    add_max_megapixels(command)
    command.add_argument('--overwrite', action='store_true', help='replace a finished OUT')

    text = 'label the patches of a prepared dataset by difficulty'
    command = commands.add_parser('label', help=text, description=text)
    command.add_argument('-d', dest='data', required=True, metavar='OUT', help='folder that prepare wrote')
    command.add_argument(
        '--by',
        required=True,
        choices=['psnr', 'branches', 'bicubic'],
        help='PSNR of a network; cheapest good branch of a CDNSR; PSNR of bicubic upsampling')
    command.add_argument('-m', dest='model', metavar='MODEL', help=CHECKPOINT)
    command.add_argument(
        '-opt',
        metavar='FILE',
        help='option file that describes MODEL, if it does not do so itself; or, for branches without -m, the one that '
        'is going to train the classifier')
    command.add_argument('--classes', type=int, metavar='M', help='number of equal parts (default: 3)')
    command.add_argument(
        '--thresholds',
        type=float,
        nargs='+',
        metavar='DB',
        help='PSNRs that separate the classes, instead of equal parts')
    command.add_argument(
        '--margin', type=float, help='L1 error allowed above the best branch, relative (default: 0.05)')
    command.add_argument('--workers', type=count, default=None, metavar='N', help='reading threads (default: all CPUs)')
    command.add_argument(
        '--teacher',
        action='store_true',
        help='with psnr, keep what MODEL makes of the patches in OUT/teacher.lmdb, for dataroot_teacher')
    command.add_argument('--overwrite', action='store_true', help='replace what exists already')

    text = 'write a network as ONNX files, for onnxruntime and OpenVINO, and compare them with torch'
    command = commands.add_parser('export', help=text, description=text)
    command.add_argument('model', metavar='MODEL', help=CHECKPOINT)
    command.add_argument('-o', dest='output', required=True, metavar='DIR', help='folder to write')
    command.add_argument('-opt', metavar='FILE', help='option file that describes MODEL, if it does not do so itself')
    command.add_argument('--overwrite', action='store_true', help='replace a finished DIR')

    text = 'upscale pictures with a trained network'
    command = commands.add_parser('upscale', help=text, description=text)
    add_model(command, f'{CHECKPOINT}, or a folder that export has written')
    command.add_argument(
        '--backend',
        choices=['torch', 'onnxruntime', 'openvino'],
        help='what runs the network (default: torch; for an exported network openvino or onnxruntime, on the CPU)')
    command.add_argument('-i', dest='input', required=True, metavar='FILE_OR_FOLDER', help='picture or folder')
    command.add_argument('-o', dest='output', required=True, metavar='FOLDER', help='folder for the results')
    limits = command.add_mutually_exclusive_group()
    limits.add_argument(
        '--budget',
        type=float,
        metavar='FRACTION',
        help='cost per picture, of that of the hardest branch on the whole picture; classifier and tile overlap count '
        '(default: no limit, each tile gets its most probable branch)')
    limits.add_argument('--target-ms', type=float, metavar='MS', help='time per picture instead, by measured speed')
    command.add_argument(
        '--cost',
        choices=['macs', 'latency'],
        default='macs',
        help='what --budget counts: multiply-accumulates or measured time (default: macs)')
    command.add_argument('--map', action='store_true', help='write difficulty maps too, as NAME_map.png')
    command.add_argument(
        '--scale', type=float, metavar='S', help='upsampling factor of a PCSR network, such as 2.5 (default: its own)')
    add_engine(command)
    command.add_argument('--suffix', default='', help='added to the names of the results')
    command.add_argument(
        '--ext',
        metavar='EXT',
        help='format of the results: png, tif, jpg or webp (default: TIFF stays TIFF, all else becomes png)')
    command.add_argument(
        '--shard', metavar='I/N', help='do the I-th of N parts of a folder (torchrun: one part per process)')
    add_max_megapixels(command)
    command.add_argument(
        '--strip-metadata', action='store_true', help='results without EXIF and XMP; the colour profile is kept')
    command.add_argument('--overwrite', action='store_true', help='replace existing results')

    text = 'list the models that this package ships, with what they bring and cost'
    commands.add_parser('models', help=text, description=text)

    text = 'make a checkpoint that describes itself of a published one, or of your own'
    command = commands.add_parser('convert', help=text, description=text)
    command.add_argument('input', metavar='IN', help='checkpoint (.pth or .safetensors), or name of a model')
    command.add_argument('-o', dest='output', required=True, metavar='OUT', help='file to write: .pth or .safetensors')
    command.add_argument(
        '--from',
        dest='family',
        metavar='FAMILY',
        default='auto',
        help=f'whose file it is: {names_of_families()} (default: auto, told by its weights)')
    command.add_argument(
        '-opt', metavar='FILE', help='option file that describes IN, one of BasicSR\'s own checkpoints')
    command.add_argument(
        '--num-feat', type=count, metavar='N', help='branch of this width of an ARM-Net (default: the widest)')
    command.add_argument('--scale', type=count, metavar='N', help='scale, of files that do not tell it (default: 4)')
    command.add_argument(
        '--plain',
        action='store_true',
        help='turn ETDS, ECBSR and ABPN, branches too, into equivalent plain convs, for inference')
    command.add_argument(
        '--clip', action='store_true', help='with --plain: a last conv that clips to [0, 1], as published for phones')
    command.add_argument('--overwrite', action='store_true', help='replace an existing OUT')

    text = 'measure what budgets of a routed network bring and cost, and keep the table beside its checkpoint'
    command = commands.add_parser('calibrate', help=text, description=text)
    command.add_argument('-m', dest='model', required=True, metavar='MODEL', help=CHECKPOINT)
    command.add_argument('-opt', metavar='FILE', help='option file that describes MODEL, if it does not do so itself')
    command.add_argument(
        '-i', dest='input', required=True, metavar='FOLDER', help='photographs, or a folder with gt/ and lq/')
    command.add_argument(
        '--budgets', type=float, nargs='+', metavar='FRACTION', help='budgets to try (default: 0.3 to 1.2)')
    command.add_argument('--limit', type=count, metavar='N', help='only the first N photographs')
    add_engine(command, routed_only=True)

    text = 'compare networks on photographs: quality, cost, time and memory, whole, tiled and routed'
    command = commands.add_parser('benchmark', help=text, description=text)
    command.add_argument(
        '-m',
        dest='models',
        nargs='+',
        required=True,
        metavar='MODEL',
        help='checkpoints, names of models (basicsr models), or option files that name one at path.pretrain_network_g')
    command.add_argument(
        '--data', required=True, metavar='FOLDER', help='photographs, or a folder with gt/ and lq/ (prepare --whole)')
    command.add_argument('-o', dest='output', metavar='FOLDER', help='write benchmark.md, .csv and .png there')
    command.add_argument(
        '--budgets', type=float, nargs='+', default=[], metavar='FRACTION', help='budgets of networks with branches')
    command.add_argument('--repeat', type=count, default=3, metavar='N', help='timed runs of each (default: 3)')
    command.add_argument('--limit', type=count, metavar='N', help='only the first N photographs')
    command.add_argument(
        '--cost', choices=['macs', 'latency'], default='macs', help='what a budget counts (default: macs)')
    command.add_argument('--no-ssim', action='store_true', help='without SSIM, which takes longer than all the rest')
    command.add_argument('--branches', action='store_true', help='each branch alone too, and bicubic upsampling')
    command.add_argument(
        '--oracle', action='store_true', help="the budgets also routed by the branches' true errors, as a bound")
    add_engine(command, '+')
    command.add_argument(
        '--backends',
        nargs='+',
        choices=['torch', 'onnxruntime', 'openvino'],
        default=['torch'],
        help='what runs the networks in tiles (default: torch)')
    return parser


def add_model(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument('-m', dest='model', metavar='MODEL', help=text)
    command.add_argument(
        '-opt', metavar='FILE', help='option file that describes MODEL, or names it at path.pretrain_network_g')


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


def run_prepare(args: argparse.Namespace) -> int:
    from .data.prepare import prepare
    done = prepare(args.input, args.output, args.scale, args.scales, args.crop, args.step, args.workers, args.whole,
                   args.overwrite, args.gray, args.max_megapixels)
    print(f'Wrote {done.pairs} {"photographs" if args.whole else "patches"} to {args.output}.')
    say_what_is_missing(args.input, done.notes, done.left_out)
    for path in done.too_small:
        print(f'Left out, smaller than a patch: {path}', file=sys.stderr)
    for path, reason in done.unreadable:
        print(f'Left out, cannot be read: {path}: {reason}', file=sys.stderr)
    return 1 if done.unreadable else 0


def say_what_is_missing(folder: str, notes: Sequence[tuple[str, str]], left_out: Sequence[Any]) -> None:
    """Names pictures that were not done as a whole, and files that are no pictures, those of each ending in a line."""
    for path, note in notes:
        print(f'Not the whole of {path}: {note}.')
    endings: dict[str, list[str]] = {}
    for path in left_out:
        endings.setdefault(path.suffix or 'no ending', []).append(os.path.relpath(path, folder))
    for ending, names in sorted(endings.items()):
        print(f'Left alone, no picture by its ending: {ending}: {", ".join(names)}')


def run_label(args: argparse.Namespace) -> int:
    load_plugins()
    keep_freed_memory()
    from .data.label import label
    path, counts = label(args.data, args.by, args.model, args.opt, args.classes, args.thresholds, args.margin,
                         args.workers, args.overwrite, args.teacher)
    print(f'Wrote {path}: ' + ', '.join(f'class {k}: {count}' for k, count in enumerate(counts)) + '.')
    return 0


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
    from .export import check_backend, is_exported, needs
    from .inference.runtime import installed
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
    from .checkpoint import load_network
    device = choose_device(args.device)
    net = load_network(args.model, args.opt).to(device)
    if device.type == 'cpu':
        keep_freed_memory()
    return net


def make_upscaler(args: argparse.Namespace, **kwargs: Any) -> Any:
    """The engine for the network and the settings that the arguments name."""
    from .calibration import read_calibration, speed_of
    from .export import in_backend, is_exported, load_exported
    from .inference import default_patch_size
    from .inference import make_upscaler as make_engine
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
    from .inference.pixel_engine import is_pixel_routed, route
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


def parse_shard(text: Optional[str]) -> tuple[int, int]:
    """I/N as two numbers. Default: the process's place among those that torchrun has started."""
    rank, processes = os.environ.get('RANK'), os.environ.get('WORLD_SIZE')
    if text is None and rank and processes:
        if not (rank.isdecimal() and processes.isdecimal() and int(rank) < int(processes)):
            raise OptionError(f'RANK {rank}, WORLD_SIZE {processes}', 'expected a rank below the size, as of torchrun')
        return int(rank) + 1, int(processes)
    if text is None:
        return 1, 1
    part, _, parts = text.partition('/')
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise OptionError(f'--shard {text}', 'expected I/N with I from 1 to N, for example 2/8')
    return int(part), int(parts)


def run_export(args: argparse.Namespace) -> int:
    load_plugins()
    from .checkpoint import load_described
    from .export import export_to_folder
    net, block = load_described(args.model, args.opt)
    about = dict(source=os.path.basename(args.model), network_g=block, written_by=f'cdnsr_basicsr {__version__}')
    off = export_to_folder(net, args.model, args.output, about, args.overwrite)
    said = ', '.join(f'{backend} {levels:.1g}' for backend, levels in off.items())
    print(f'Wrote {args.output}. Largest difference from torch, in grey levels of 255: {said}.')
    return 0


def run_models(args: argparse.Namespace) -> int:
    print(describe(shipped_models().values()), end='')
    return 0


def run_upscale(args: argparse.Namespace) -> int:
    from .inference.image_io import MAX_SIDES
    extension = args.ext and f'.{args.ext.lower().lstrip(".")}'
    if extension not in (None, *MAX_SIDES):
        raise OptionError(f'--ext {args.ext}', 'accepted: png, jpg, webp, tif')
    for flag, value in (('--budget', args.budget), ('--target-ms', args.target_ms), ('--scale', args.scale)):
        if value is not None and not 0 < value < float('inf'):
            raise OptionError(f'{flag} {value}', 'expected a number above 0')
    for flag, value in (('-i', args.input), ('-o', args.output)):
        if not value:
            raise OptionError(flag, 'expected a path, but got nothing')
    if os.path.sep in args.suffix:
        raise OptionError(f'--suffix {args.suffix}', f'expected no {os.path.sep}')
    if args.cost == 'latency' and args.budget is None:
        raise OptionError('--cost latency', 'says what a budget counts; give --budget')
    shard = parse_shard(args.shard)
    upscaler = make_upscaler(args, budget=args.budget, target_ms=args.target_ms, cost=args.cost, scale=args.scale)
    if not upscaler.routed and (args.budget or args.target_ms or args.map):
        raise OptionError('--budget, --target-ms, --map', 'need a network that routes, CDNSR or PCSR')

    from .inference.upscale import upscale_files
    done = upscale_files(upscaler, args.input, args.output, args.suffix, extension, args.map, args.overwrite, shard,
                         args.max_megapixels, args.strip_metadata)
    print(f'Upscaled {done.done} picture{"s" * (done.done != 1)} x{upscaler.scale} to {args.output}: '
          f'{done.megapixels:.1f} megapixels in {done.seconds:.1f} s.')
    if upscaler.routed and done.done:
        shares = ' / '.join(f'{100 * number / sum(done.counts):.0f}' for number in done.counts)
        print(f'{upscaler.unit} of class 0 to {len(done.counts) - 1}: {shares} %; cost {done.cost:.3f} of the hardest '
              'branch on whole pictures, classifier and tile overlap included.')
    if done.present:
        print(f'Left alone, there already: {done.present} (--overwrite replaces them{", with maps" * args.map}).')
    say_what_is_missing(args.input, done.notes, done.left_out)
    for path, reason in done.failed:
        print(f'Failed: {path}: {reason}', file=sys.stderr)
    return 1 if done.failed else 0


def run_convert(args: argparse.Namespace) -> int:
    if os.path.splitext(args.output)[1] not in ('.pth', '.safetensors'):
        raise OptionError(f'-o {args.output}', 'expected a name that ends in .pth or .safetensors')
    if not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise OptionError(os.path.dirname(args.output), 'no such folder')
    if os.path.exists(args.output) and not args.overwrite:
        raise OptionError(args.output, 'is there already; --overwrite replaces it')
    if args.clip and not args.plain:
        raise OptionError('--clip', 'goes with --plain')
    load_plugins()
    from .conversion.convert import convert, describe, made_plain, save
    converted = convert(args.input, args.family, args.opt, args.num_feat, args.scale)
    if args.plain:
        converted = made_plain(converted, args.input, args.clip)
    save(converted, args.output)
    print(f'{describe(converted)}\nWrote {args.output}.')
    return 0


def run_calibrate(args: argparse.Namespace) -> int:
    budgets = check_budgets(args.budgets or [])
    net = load_on_device(args)
    from .calibration import BUDGETS, calibrate, calibration_path, markdown
    from .inference import default_patch_size
    patch_size, step = tile_of(args)
    patch_size = patch_size or default_patch_size(net)
    check_tile(patch_size, step)
    left_out: list[tuple[str, str]] = []
    table = calibrate(net, args.model, args.input, args.precision, budgets or BUDGETS, patch_size, step, args.limit,
                      left_out)
    print(f'{markdown(table)}\nWrote {calibration_path(args.model)}.')
    return say_left_out(left_out)


def say_left_out(photographs: Sequence[tuple[str, str]]) -> int:
    """Names photographs that were not measured with; the exit code says whether there are any."""
    for path, reason in photographs:
        print(f'Left out: {path}: {reason}', file=sys.stderr)
    return 1 if photographs else 0


def check_budgets(budgets: Sequence[float]) -> Sequence[float]:
    for budget in budgets:
        if not 0 < budget < float('inf'):
            raise OptionError(f'--budgets {budget}', 'expected numbers above 0')
    return budgets


def run_benchmark(args: argparse.Namespace) -> int:
    check_budgets(args.budgets)
    load_plugins()
    from .benchmark import benchmark, markdown, write_report
    from .files import make_writable
    patch_size, step = args.patch_size, args.step
    check_tile(patch_size or 128, step)
    if args.oracle and not args.budgets:
        raise OptionError('--oracle', 'goes with --budgets')
    if set(args.backends) - {'torch'}:
        if args.device not in (None, 'cpu'):
            raise OptionError(f'--device {args.device}', 'only torch runs on others than the CPU')
        args.device = 'cpu'
    if args.output:
        make_writable(args.output)
    left_out: list[tuple[str, str]] = []
    measured, text = benchmark(args.models, args.data,
                               args.budgets, args.precision, args.repeat, args.limit, patch_size, step,
                               str(choose_device(args.device)), args.backends, args.oracle, args.branches, args.cost,
                               not args.no_ssim, left_out)
    print(f'{text}\n\n{markdown(measured)}', end='')
    if args.output:
        write_report(measured, text, args.output)
    return say_left_out(left_out)


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
        Exit code: 0 done; 1 done but some files were left out, or a run that was set up has failed; 2 a mistake in the
            options or arguments.
    """
    args = build_parser().parse_args(argv)
    commands = dict(train=run_pipeline, test=run_pipeline, prepare=run_prepare, label=run_label, upscale=run_upscale)
    commands.update(convert=run_convert, export=run_export, calibrate=run_calibrate, benchmark=run_benchmark)
    commands.update(models=run_models)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files need not be UTF-8
    try:
        with contextlib.nullcontext() if args.command in ('train', 'test') else terminable():
            return commands[args.command](args)
    except OptionError as error:
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        if args.command in ('train', 'test'):
            raise
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('basicsr: interrupted', file=sys.stderr)
        return 130
