"""`basicsr export`: a network as ONNX files."""
from __future__ import annotations

import argparse
import os

from .. import __version__, load_plugins
from .arguments import CHECKPOINT, DESCRIPTION, Commands, new_command


def add_parser(commands: Commands) -> None:
    command = new_command(commands, 'export',
                          'export a network to ONNX files for ONNX Runtime and OpenVINO, and compare them with torch',
                          run)
    command.add_argument('model', metavar='MODEL', help=CHECKPOINT)
    command.add_argument('-o', dest='output', required=True, metavar='DIR', help='output folder')
    command.add_argument('-opt', metavar='FILE', help=DESCRIPTION)
    command.add_argument('--overwrite', action='store_true', help='replace an existing DIR')


def run(args: argparse.Namespace) -> int:
    load_plugins()
    from ..conversion.convert import convert
    from ..export import export_to_folder
    converted = convert(args.model, opt_path=args.opt)
    about = dict(
        source=os.path.basename(args.model), network_g=converted.block, written_by=f'cdnsr_basicsr {__version__}')
    off = export_to_folder(converted.net, args.model, args.output, about, args.overwrite)
    said = ', '.join(f'{backend} {levels:.1g}' for backend, levels in off.items())
    print(f'Wrote {args.output}. Largest difference from torch, in grey levels of 255: {said}.')
    return 0
