"""Draws PSNR against time and against multiply-accumulates: branches alone, the routed network, the oracle.

Usage: python scripts/plot_frontier.py OUT.png TITLE=benchmark.csv [TITLE=benchmark.csv ...] [--precision float32]

The files are those of `basicsr benchmark --branches --oracle --budgets ...`; each model in each of them is a row of the
figure.
"""
import argparse
import csv
import numpy as np
from collections import defaultdict
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

AXES = {'ms/megapixel': 'ms per megapixel', 'kMACs/pixel': 'thousand MACs per pixel, classifier and overlap included'}


def read(items, precision):
    """Rows of each model, under a title."""
    figures = {}
    for item in items:
        title, _, path = item.partition('=')
        models = defaultdict(list)
        with open(path, newline='') as file:
            for row in csv.DictReader(file):
                # the oracle and the plain baseline are there in one precision only
                if row['precision'] == precision or 'BasicSR' in row['method']:
                    models[row['model']].append(row)
        for model, rows in models.items():
            figures[f'{model}, {title}'] = rows
    return figures


def draw(axes, rows, key):

    def points(test):
        return sorted((float(row[key]), float(row['PSNR'])) for row in rows if test(row['method']))

    branches = any(row['method'].startswith('branch') for row in rows)
    for row in rows:
        number = row['method'].split(',')[0]
        if number.startswith('branch' if branches else 'whole') and row['method'].endswith('tuned'):
            axes.plot(float(row[key]), float(row['PSNR']), 'C0s')
            axes.annotate(f' {number}', (float(row[key]), float(row['PSNR'])), fontsize=8, va='top')
    axes.plot([], [], 'C0s', label='one network, whole image, with all that the engine has')
    axes.plot(*zip(*points(lambda name: name.startswith('routed, budget'))), 'C1o-', label='routed, by budget')
    oracle = points(lambda name: name.startswith('oracle'))
    if oracle:
        axes.plot(*zip(*oracle), 'C2^--', label='routed by true errors (oracle)')
    baseline = points(lambda name: name == 'whole image (BasicSR)') if key == 'ms/megapixel' else []
    axes.plot(*np.reshape(baseline, (-1, 2)).T, 'C3D', label="hardest branch or network, BasicSR's way")
    if key == 'ms/megapixel':
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter('{x:.0f}')
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=AXES[key], ylabel='PSNR (RGB) in dB')
    axes.grid(alpha=0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out')
    parser.add_argument('items', nargs='+', metavar='TITLE=benchmark.csv')
    parser.add_argument('--precision', default='float32')
    args = parser.parse_args()
    figures = read(args.items, args.precision)
    figure = Figure(figsize=(11, 3.6 * len(figures)), layout='constrained')
    FigureCanvasAgg(figure)
    for parts, (title, rows) in zip(figure.subplots(len(figures), 2, squeeze=False), figures.items()):
        for axes, key in zip(parts, AXES):
            draw(axes, rows, key)
        parts[0].set_title(f'{title}, {args.precision}', fontsize=9, loc='left')
    figure.axes[1].legend(fontsize=8, loc='lower right')
    figure.savefig(args.out, dpi=100)


if __name__ == '__main__':
    main()
