"""Measures a trained routed network, adds it to cdnsr_basicsr/pretrained_models, and creates its card.

Usage, in the repository:
    python scripts/ship_model.py NAME CHECKPOINT --images Set5=FOLDER Set14=FOLDER photographs=FOLDER CID22=FOLDER \\
        --licence LICENCE --trained-on TEXT --use TEXT [--teacher NAME --teacher-licence LICENCE]

CHECKPOINT contains its description, like those of `basicsr train` and `basicsr route`. Its router, price and margin are
shipped unchanged; branches with several convs in training (SPAN) are shipped folded. The folders are those of
scripts/model_card.py; leave out a set that the network was trained on. Finally, the script does what that script does.
"""
import argparse
import copy
import inspect
import os
import tempfile
import torch
from model_card import (
    ROOT,
    add_arguments,
    figures_of,
    folders_of,
    measure,
    parts_of,
    sha256_of,
    write_card,
    write_index,
    write_lists,
)
from pathlib import Path

from cdnsr_basicsr import zoo
from cdnsr_basicsr.conversion.convert import convert, save
from cdnsr_basicsr.conversion.plain import SIZES, TOLERANCE
from cdnsr_basicsr.options import OptionError

CARD = '''# {name}

{use}.

## Data and licence

Trained on {trained_on}. Teacher: {teacher}. The weights are published under {licence}.

## How it was trained

TO BE WRITTEN: commands and hours.

## What it is bad at

TO BE WRITTEN.

## Measured

<!-- measured: begin, by scripts/model_card.py -->
<!-- measured: end -->
'''


def check_name(name):
    """Refuses names that commands would take for paths."""
    if os.path.dirname(name) or os.path.splitext(name)[1] or not name:
        raise OptionError(name or "''", 'expected a name without a folder and a suffix')


@torch.no_grad()
def folded(converted):
    """The routed network with its branches in the form for inference, if their arch has an option for it.

    Raises:
        ValueError: A folded branch computes something else.
    """
    net, block = copy.deepcopy(converted.net), copy.deepcopy(converted.block)
    for branch, before, options in zip(net.branches, converted.net.branches, block['branches']):
        if options.get('deploy') or 'deploy' not in inspect.signature(type(branch)).parameters:
            continue
        branch.switch_to_deploy()
        options['deploy'] = True
        for height, width in SIZES:
            image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
            if not (branch(image) - before(image)).abs().max() <= TOLERANCE:
                raise ValueError(f'{options["type"]} and its folded form differ on {height}x{width} pixels')
    return converted._replace(net=net, block=block)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', metavar='NAME')
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument('--licence', required=True, help='of the weights')
    parser.add_argument('--trained-on', required=True, metavar='TEXT', help='the data')
    parser.add_argument('--use', required=True, metavar='TEXT', help='what it is for, and what not; one line')
    parser.add_argument('--teacher', metavar='NAME', help='teacher that it was distilled from')
    parser.add_argument('--teacher-licence', metavar='LICENCE')
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        ship(args)
    except (OptionError, ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')


def ship(args):
    """Ships the network; raises OptionError before the package has been changed."""
    check_name(args.name)
    if (args.teacher is None) != (args.teacher_licence is None):
        raise OptionError('--teacher', 'requires --teacher-licence, and the reverse')
    folders = folders_of(args)
    converted = convert(args.checkpoint)
    if 'branches' not in converted.block:
        raise OptionError(args.checkpoint, f'{converted.block["type"]} is not a routed network; see basicsr route')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f'{args.name}.safetensors')
        save(folded(converted), str(path))
        size = path.stat().st_size
        if size >= zoo.MOST_BYTES:
            raise OptionError(args.checkpoint,
                              f'takes {size / 1e6:.1f} MB; a shipped model takes less than {zoo.MOST_BYTES / 1e6:g}')
        measured = measure(path, folders, args.budgets, args.repeat)
        parts, figures = parts_of(path, folders), figures_of(measured, args.repeat)
        old = zoo.shipped_models().get(args.name)
        if not args.repeat:
            if old is None:
                raise OptionError('--repeat 0', f'{args.name} has no time yet')
            figures.update(ms_per_megapixel=old.ms_per_megapixel, measured_on=old.measured_on)
        (zoo.SHIPPED / path.name).write_bytes(path.read_bytes())
    teacher = args.teacher and dict(name=args.teacher, licence=args.teacher_licence)
    entry = dict(file=path.name, sha256=sha256_of(zoo.SHIPPED / path.name), scale=converted.scale, licence=args.licence)
    entry.update(trained_on=args.trained_on, teacher=teacher, use=args.use, **figures)
    write_index(args.name, entry)
    if old is not None and old.file != path.name:
        old.path.unlink()
    card = ROOT / 'docs/models' / f'{args.name}.md'
    if not card.exists():
        taught = f'{args.teacher} ({args.teacher_licence})' if teacher else 'none'
        card.write_text(
            CARD.format(name=args.name, use=args.use, trained_on=args.trained_on, teacher=taught, licence=args.licence),
            encoding='utf-8')
    write_card(zoo.shipped_models()[args.name], measured, parts, args.budgets, args.repeat)
    write_lists()
    print(f'Shipped {args.name}: {size / 1e6:.2f} MB. Complete its card, {card}, by hand.')


if __name__ == '__main__':
    main()
