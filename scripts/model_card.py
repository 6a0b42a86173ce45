"""Measures this package's models again, and updates every place that states the results.

Usage, in the repository:
    python scripts/model_card.py [NAME ...] --images Set5=FOLDER Set14=FOLDER photographs=FOLDER CID22=FOLDER

The folders hold HR images, which are downscaled by the model's scale; that of the set "degraded" has gt/ and lq/, as
scripts/degrade.py writes them. A model is measured on the sets for which models.json has its figures. The script writes
these figures; docs/models/NAME.md between the lines "measured: begin" and "measured: end"; docs/models/NAME.jpg, with
crops of two of the photographs, whose licence must allow that (of the degraded ones, if there are any, beside the
result of the best model for clean images); and the lists of models in README.md, docs/ModelZoo.md and mkdocs.yml.
`git diff` shows what has changed.

Times are those of the photographs: medians of --repeat runs, all rows in turns, so let nothing else run. On a busy
machine, use --repeat 0: no times are measured, and models.json keeps its old ones.
"""
import argparse
import cv2
import hashlib
import json
import numpy as np
import os
import textwrap
import torch
from pathlib import Path
from readme_picture import titled
from torch.nn import functional as F

import cdnsr_basicsr

cdnsr_basicsr.register()

from cdnsr_basicsr import zoo  # noqa: E402
from cdnsr_basicsr.archs import Interpolation  # noqa: E402
from cdnsr_basicsr.benchmark import Settings, benchmark  # noqa: E402
from cdnsr_basicsr.checkpoint import load_checkpoint  # noqa: E402
from cdnsr_basicsr.cli.arguments import check_budgets  # noqa: E402
from cdnsr_basicsr.conversion.convert import load_network  # noqa: E402
from cdnsr_basicsr.evaluation import read_pairs, to_image, to_tensor  # noqa: E402
from cdnsr_basicsr.files import replace_when_done  # noqa: E402
from cdnsr_basicsr.inference import make_upscaler  # noqa: E402
from cdnsr_basicsr.inference.speed import machine  # noqa: E402
from cdnsr_basicsr.options import OptionError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (0.3, 0.5, 0.7)
SIDE = 160  # of the crops in NAME.jpg, in HR pixels
MOST_BYTES = 200_000  # of NAME.jpg


def add_arguments(parser):
    """Adds the arguments that say what is measured, and how."""
    parser.add_argument(
        '--images',
        nargs='+',
        required=True,
        metavar='SET=FOLDER',
        help=f'HR images of the sets: {", ".join(zoo.IMAGES)}')
    parser.add_argument(
        '--budgets',
        nargs='+',
        type=float,
        default=BUDGETS,
        metavar='FRACTION',
        help=f'budgets to measure (default: {" ".join(map(str, BUDGETS))})')
    parser.add_argument(
        '--repeat', type=int, default=3, metavar='N', help='number of timed runs; 0: no times (default: 3)')


def folders_of(args):
    """Folder of each set, from the arguments; raises OptionError."""
    folders = dict(item.split('=', 1) if '=' in item else (item, '') for item in args.images)
    for name, folder in folders.items():
        if name not in zoo.IMAGES:
            raise OptionError(f'--images {name}', f'expected SET=FOLDER; sets: {", ".join(zoo.IMAGES)}')
        if not os.path.isdir(folder):
            raise OptionError(f'--images {name}={folder}', 'no such folder; expected HR images')
    if 'photographs' not in folders:
        raise OptionError('--images', 'photographs=FOLDER is missing; times and crops are taken from it')
    check_budgets(args.budgets)
    if args.repeat < 0:
        raise OptionError(f'--repeat {args.repeat}', 'expected at least 0')
    return folders


def wanted(row):
    """Whether a card shows a row of the benchmark: bicubic upsampling, each branch alone, or the routed network."""
    return row.kind in ('bicubic', 'routed') or (row.kind == 'whole' and row.tuned and row.branch is not None)


def measure(path, folders, budgets, repeat):
    """Runs `basicsr benchmark` on each set.

    Args:
        path: The checkpoint.
        folders: The folder of each set.
        budgets, repeat: See the arguments.

    Returns:
        For each set, the rows and the line that says on what they were measured.
    """
    measured = {}
    for name, folder in folders.items():
        timed = repeat if name == 'photographs' else 0
        settings = Settings([str(path)], folder, budgets, repeat=timed, branches=True, with_ssim=False)
        rows, text, left_out = benchmark(settings, wanted)
        if left_out:
            raise OptionError(*left_out[0])
        measured[name] = rows, text
    return measured


def figures_of(measured, repeat):
    """Figures for models.json: those of the routed network without a budget."""
    routed = {}
    for name, (rows, _) in measured.items():
        routed[name] = next(m for m in rows if m.row.kind == 'routed' and m.row.budget is None)
    figures = dict(
        psnr={
            name: round(m.psnr_y, 2)
            for name, m in routed.items()
        },
        psnr_rgb={
            name: round(m.psnr, 2)
            for name, m in routed.items()
        })
    if repeat:
        figures.update(ms_per_megapixel=round(routed['photographs'].ms, 1), measured_on=machine(torch.device('cpu')))
    return figures


def label(row, block):
    """Name of a benchmark row in a card."""
    if row.branch is None:
        return row.kind if row.budget is None else f'{row.kind}, budget {row.budget:g}'
    branch = block['branches'][row.branch]
    width = f', num_feat {branch["num_feat"]}' if 'num_feat' in branch else ''
    return f'branch {row.branch + 1} alone: {branch["type"]}{width}'


def table(measured, block, repeat):
    """The rows of all sets as a Markdown table."""
    columns = ['', *measured, 'kMACs/pixel', *['ms/megapixel'] * bool(repeat), 'tiles of each branch in %']
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(columns)]
    order = ['bicubic', 'whole', 'routed']
    rows = sorted(enumerate(measured['photographs'][0]), key=lambda item: order.index(item[1].row.kind))
    for number, photograph in rows:
        if photograph.row.branch is not None and photograph.network == 'Interpolation':
            continue  # is bicubic, which has a row
        psnr = [f'{its[number].psnr_y:.2f} / {its[number].psnr:.2f}' for its, _ in measured.values()]
        times = [f'{photograph.ms:.1f}'] * bool(repeat)
        shares = ' / '.join(f'{share:.0f}' for share in photograph.shares) if photograph.row.kind == 'routed' else ''
        cells = [label(photograph.row, block), *psnr, f'{photograph.kmacs:.2f}', *times, shares]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def windows(error):
    """Means of an error of shape (h, w) over all crops of SIDE pixels whose corners are at multiples of 16."""
    return F.avg_pool2d(torch.from_numpy(error)[None, None], SIDE, 16)[0, 0]


@torch.inference_mode()
def parts_of(path, folders):
    """The crops of photographs where a model gains most over bicubic upsampling, and where its error is largest.

    Args:
        path: The checkpoint.
        folders: Of each set.

    Returns:
        For each of the two, a tuple: its squared error (or gain); the photograph, row and column; BGR images by their
        titles: bicubic, of degraded photographs the result of zoo.BEST, the model's, ground truth.
    """
    folder = folders.get('degraded', folders['photographs'])
    upscaler = make_upscaler(load_network(str(path)))
    scale, best = int(upscaler.scale), [(-np.inf, '', {}), (-np.inf, '', {})]
    others = {f'bicubic x{scale}': make_upscaler(Interpolation(upscale=scale))}
    if 'degraded' in folders:
        others[zoo.BEST] = make_upscaler(load_network(zoo.find_checkpoint(zoo.BEST)))
    for pair in read_pairs(folder, scale):
        if min(pair.gt.shape[:2]) < SIDE:
            continue
        lq = to_tensor(pair.lq)
        images = {name: to_image(net.upscale(lq).image) for name, net in {**others, Path(path).stem: upscaler}.items()}
        names = list(images)
        errors = [
            windows(np.square(images[name] - pair.gt.astype(np.float32)).mean(axis=2)) for name in (names[0], names[-1])
        ]
        images['HR'] = pair.gt
        for i, value in enumerate((errors[0] - errors[1], errors[1])):
            row, column = (16 * int(n) for n in np.unravel_index(int(value.argmax()), value.shape))
            if value.max() > best[i][0]:
                cut = {name: image[row:row + SIDE, column:column + SIDE, ::-1] for name, image in images.items()}
                best[i] = float(value.max()), f'{pair.name}, row {row}, column {column}', cut
    if not all(images for *_, images in best):
        raise OptionError(folder, f'contains no photograph of at least {SIDE} pixels on each side')
    return best


def write_picture(parts, path):
    """Writes the crops side by side, enlarged twice, as a JPEG of at most MOST_BYTES."""
    lines = []
    for _, _, images in parts:
        columns = []
        for title, image in images.items():
            columns.append(titled(cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST), title))
            columns.append(np.full((columns[0].shape[0], 6, 3), 255, np.uint8))
        lines.append(np.concatenate(columns[:-1], axis=1))
    for quality in range(90, 0, -10):
        data = cv2.imencode('.jpg', np.concatenate(lines), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        if len(data) <= MOST_BYTES:
            break
    with replace_when_done(path) as temporary:
        temporary.write_bytes(data.tobytes())


def rewrite(path, kind, text):
    """Replaces the lines of a file between those that say "KIND: begin" and "KIND: end"; raises OptionError."""
    lines = path.read_text(encoding='utf-8').splitlines()
    found = [[i for i, line in enumerate(lines) if f'{kind}: {end}' in line] for end in ('begin', 'end')]
    if [len(places) for places in found] != [1, 1] or found[0] > found[1]:
        raise OptionError(str(path), f'expected a line with "{kind}: begin" and, below it, one with "{kind}: end"')
    lines[found[0][0] + 1:found[1][0]] = text.splitlines()
    with replace_when_done(path) as temporary:
        temporary.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def write_card(model, measured, parts, budgets, repeat):
    """Writes the crops of a model and the measured part of its card.

    Args:
        model: The ShippedModel, with its new figures.
        measured: See `measure`.
        parts: See `parts_of`.
        budgets, repeat: See the arguments.
    """
    cards = ROOT / 'docs' / 'models'
    write_picture(parts, cards / f'{model.name}.jpg')
    images = ' '.join(f'{name}=FOLDER' for name in measured)
    budgets = '' if tuple(budgets) == BUDGETS else f' --budgets {" ".join(map(str, budgets))}'
    paragraphs = [
        f'PSNR in dB of the Y channel / of RGB, averaged over the images, without a border of {model.scale:g} pixels. '
        f'"routed" is what `basicsr upscale -m {model.name}` does; a budget is a fraction of the cost of the hardest '
        'branch alone. Operations, tiles and times (if measured) are those of the photographs: '
        f'{measured["photographs"][1]}.',
        f'"routed" takes {model.ms_per_megapixel:.1f} ms per megapixel of the result: '
        f'{model.measured_on}.', f'![Crops of photographs: {", ".join(parts[0][2])}]({model.name}.jpg)',
        f'Above: where the model gains most over bicubic upsampling (photograph {parts[0][1]}). Below: where its '
        f'error is largest (photograph {parts[1][1]}). Both have the largest squared gain or error among all crops of '
        f'{SIDE}x{SIDE} pixels of the {"degraded " * ("degraded" in measured)}photographs, with corners at multiples '
        'of 16.', f'Made by `python scripts/model_card.py {model.name} --images {images} --repeat {repeat}{budgets}`.'
    ]
    wrapped = [textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False) for text in paragraphs]
    content = [table(measured, load_checkpoint(str(model.path))['network_g'], repeat), *wrapped]
    rewrite(cards / f'{model.name}.md', 'measured', '\n' + '\n\n'.join(content) + '\n\n')


def write_lists():
    """Writes the lists of all models."""
    models = zoo.best_first(zoo.shipped_models().values())
    os.environ['COLUMNS'] = '110'
    text = zoo.describe(models)
    *told, notes = text.split('\n\n')  # README leaves out where they were measured and trained
    told.append(notes.split('\n')[0])
    rewrite(ROOT / 'README.md', 'models', '\n```text\n' + '\n\n'.join(told) + '\n```\n\n')
    listed = f'\n```text\n{text}```\n\n'
    cards = ''.join(f'- [{model.name}](models/{model.name}.md)\n' for model in models)
    rewrite(ROOT / 'docs/ModelZoo.md', 'models', f'{listed}The cards of the models:\n\n{cards}\n')
    pages = ''.join(f'      - {model.name}: docs/models/{model.name}.md\n' for model in models)
    rewrite(ROOT / 'mkdocs.yml', 'cards', pages)


def write_index(name, entry):
    """Writes the entry of a model to models.json."""
    path = zoo.SHIPPED / 'models.json'
    index = json.loads(path.read_text(encoding='utf-8'))
    index[name] = entry
    with replace_when_done(path) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry_of(name):
    """The entry of a model in models.json."""
    return json.loads((zoo.SHIPPED / 'models.json').read_text(encoding='utf-8'))[name]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help='models (default: all)')
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        folders, shipped = folders_of(args), zoo.shipped_models()
        for name in args.names:
            if name not in shipped:
                raise OptionError(name, f'not a model of this package; {zoo.known(name, set(shipped))}')
        for name in args.names or shipped:
            missing = [images for images in shipped[name].psnr if images not in folders]
            if missing:
                raise OptionError('--images', f'{missing[0]}=FOLDER is missing; {name} has figures for it')
        for name in args.names or shipped:
            path = zoo.checked(shipped[name])
            measured = measure(path, {images: folders[images]
                                      for images in shipped[name].psnr}, args.budgets, args.repeat)
            parts = parts_of(path, {images: folders[images] for images in measured})
            write_index(name, {**entry_of(name), **figures_of(measured, args.repeat)})
            write_card(zoo.shipped_models()[name], measured, parts, args.budgets, args.repeat)
            write_lists()
            print(f'Wrote docs/models/{name}.md and .jpg.', flush=True)
    except (OptionError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')


if __name__ == '__main__':
    main()
