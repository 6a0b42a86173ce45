"""`basicsr upscale`: upscales image files and folders."""
from __future__ import annotations

import argparse
import sys

from ..memory import MIB, mib
from ..options import OptionError
from ..settings import BACKENDS, COSTS, WEIGHED, Settings
from . import arguments


def add_parser(commands: arguments.Commands) -> None:
    command = arguments.new_command(commands, 'upscale', 'upscale images with a trained network', run)
    command.add_argument(
        '-m', dest='model', metavar='MODEL', help=f'{arguments.CHECKPOINT}, or a folder written by export')
    command.add_argument(
        '-opt', metavar='FILE', help='option file that describes MODEL, or names it at path.pretrain_network_g')
    command.add_argument(
        '--backend',
        choices=BACKENDS,
        help='runtime of the network (default: torch; for an exported network openvino or onnxruntime, on the CPU)')
    command.add_argument('-i', dest='input', required=True, metavar='FILE_OR_FOLDER', help='image, or folder of images')
    command.add_argument('-o', dest='output', required=True, metavar='FOLDER', help='output folder')
    limits = command.add_mutually_exclusive_group()
    limits.add_argument(
        '--budget',
        type=float,
        metavar='FRACTION',
        help='largest cost of all images together, relative to the hardest branch on whole images, including '
        'classifier and tile overlap (default: no limit; the price stored in the network decides, or each tile gets '
        'its most probable branch)')
    limits.add_argument(
        '--target-ms', type=float, metavar='MS', help='instead of a budget: average time per image, by measured speed')
    limits.add_argument(
        '--max-loss',
        type=float,
        metavar='DB',
        help='instead of a budget: largest predicted loss of PSNR against the hardest branch, at the least cost')
    limits.add_argument(
        '--fidelity',
        type=float,
        metavar='DB',
        help="instead of a budget: predicted PSNR relative to the hardest branch's image (networks of basicsr route)")
    command.add_argument(
        '--per-picture',
        action='store_true',
        help='apply the limit to each image separately (default: to the folder as a whole, at one price, if the router '
        'predicts errors)')
    command.add_argument(
        '--weigh',
        choices=WEIGHED,
        default=WEIGHED[0],
        help='what counts equally in a folder: errors of all pixels, or decibels of all images (default: pixels)')
    command.add_argument(
        '--cost',
        choices=COSTS,
        default=Settings.cost,
        help='what --budget counts: multiply-accumulates or measured time (default: latency if the branches have '
        'different archs, otherwise macs)')
    command.add_argument('--map', action='store_true', help='also write difficulty maps, as NAME_map.png')
    command.add_argument(
        '--scale',
        type=float,
        metavar='S',
        help='upscaling factor of a PCSR network, for example 2.5 (default: its own)')
    arguments.add_engine(command)
    arguments.add_resources(command)
    command.add_argument('--suffix', default='', help='appended to the names of the results')
    command.add_argument(
        '--ext',
        metavar='EXT',
        help='format of the results: png, tif, jpg or webp (default: tif for TIFF, otherwise png)')
    command.add_argument(
        '--shard', metavar='I/N', help='process the I-th of N parts of a folder (torchrun: one part per process)')
    command.add_argument(
        '--ray',
        nargs='?',
        const='local',
        metavar='ADDRESS',
        help='upscale on all machines of a Ray cluster, one engine per GPU, or per OMP_NUM_THREADS cores (default: 1); '
        'auto: one that runs here; without ADDRESS: on this machine. -i and -o may be URIs, such as s3://bucket/folder')
    arguments.add_max_megapixels(command)
    command.add_argument(
        '--strip-metadata', action='store_true', help='drop EXIF and XMP from the results; the colour profile is kept')
    command.add_argument('--overwrite', action='store_true', help='replace existing results')
    arguments.add_json(command)


@arguments.answers
def run(args: argparse.Namespace, say: arguments.Say) -> int:
    for flag, value in (('-i', args.input), ('-o', args.output)):
        if not value:
            raise OptionError(flag, 'expected a path, but got nothing')
    with arguments.said_by_flags(suffix='--suffix', ext='--ext', shard='--shard', map='--map', weigh='--weigh'):
        settings = arguments.settings_of(args)
        from ..inference.upscale import check_naming, is_uri, parse_shard
        from ..loading import upscaler_for
        check_naming(args.suffix, args.ext)
        shards = parse_shard(args.shard)[1]
        named = ('suffix', 'ext', 'map', 'overwrite', 'max_megapixels', 'strip_metadata', 'per_picture', 'weigh')
        how = {name: getattr(args, name) for name in named}
        if args.ray:
            if args.shard or shards > 1:
                given = '--shard' if args.shard else 'torchrun (RANK, WORLD_SIZE)'
                raise OptionError('--ray', f'cannot be combined with {given}: the engines share all images')
            from ..cluster import upscale_on_cluster
            upscaler, done = upscale_on_cluster(settings, args.input, args.output, args.ray, **how)
        else:
            for flag, name in (('-i', args.input), ('-o', args.output)):
                if is_uri(name):
                    raise OptionError(f'{flag} {name}', 'is a URI, which requires --ray')
            upscaler = upscaler_for(settings)
            done = upscaler.upscale_folder(args.input, args.output, shard=args.shard, **how)
    routed = upscaler.routed and done.done > 0
    shares = [100 * number / sum(done.counts) for number in done.counts] if routed else []
    text = (f'Upscaled {done.done} image{"s" * (done.done != 1)} x{upscaler.scale} to {args.output}: '
            f'{done.megapixels:.1f} megapixels in {done.seconds:.1f} s.\n')
    if routed:
        counted = ', in operations' if getattr(upscaler, 'by_time', False) else ''
        text += (f'{upscaler.unit} of class 0 to {len(done.counts) - 1}: '
                 f'{" / ".join(f"{share:.0f}" for share in shares)} %; cost {done.cost:.3f} of the hardest branch on '
                 f'whole images{counted}, including classifier and tile overlap.\n')
    if done.present:
        text += f'Skipped, already exist: {done.present} (--overwrite replaces them{", with maps" * args.map}).\n'
    if done.memory_limit is not None and done.peak is not None:
        text += f'Peak memory: {mib(done.peak)} (limit: {mib(done.memory_limit)}).\n'
    say(
        text,
        dict(
            output=args.output,
            scale=upscaler.scale,
            done=done.done,
            present=done.present,
            failed=arguments.reasons(done.failed),
            notes=[dict(path=path, note=note) for path, note in done.notes],
            left_out=done.left_out,
            megapixels=done.megapixels,
            seconds=done.seconds,
            cost=done.cost if routed else None,
            unit=upscaler.unit.lower() if routed else None,
            counts=done.counts if routed else [],
            shares=shares,
            memory_mib=None if done.memory_limit is None else done.memory_limit / MIB,
            peak_mib=None if done.peak is None else done.peak / MIB))
    arguments.say_what_is_missing(args.input, done.notes, done.left_out)
    for path, reason in done.failed:
        print(f'Failed: {path}: {reason}', file=sys.stderr)
    return 1 if done.failed else 0
