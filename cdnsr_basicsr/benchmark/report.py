"""What a benchmark has measured, as table, CSV and plot."""
from __future__ import annotations

import csv
import numpy as np
import statistics
from pathlib import Path
from typing import Sequence

from ..files import replace_when_done
from .rows import ROUTED, Measured, Row

COLUMNS = ('model', 'network', 'method', 'precision', 'PSNR', 'pooled', 'SSIM', 'kMACs/pixel', 'MFLOPs/patch (papers)',
           'ms/megapixel', 'times BasicSR', 'peak MiB', 'classes %')


def summary(row: Row, about: dict, results: list[dict], pooled: float, ms: float, first: float) -> Measured:
    """What was measured of a row.

    Args:
        row: The row.
        about: What `Bench.describe` says of its network.
        results: What `measure` says of each photograph.
        pooled: PSNR of all photographs together.
        ms: Median time in milliseconds per megapixel.
        first: That of the first row of the model.
    """

    def mean(key: str) -> float:
        return statistics.fmean(result.get(key, float('nan')) for result in results)

    counts = np.sum([result.get('counts', [0] * len(about['branches'])) for result in results], axis=0)
    shares = (100 * counts / max(counts.sum(), 1)).tolist()
    mflops = float(np.dot(shares, about['mflops'])) / 100 if counts.sum() else float('nan')
    one = int(np.argmax(about['mflops'])) if row.branch is None else row.branch
    network = about['network'] if row.kind in ROUTED else about['branches'][one]
    network = 'Interpolation' if row.kind == 'bicubic' else network
    peak = max(result.get('peak', float('nan')) for result in results)
    return Measured(row, network, mean('psnr'), pooled, mean('ssim'), mean('kmacs'), mflops, ms, first / ms, peak,
                    shares)


def labels(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: that of its file, or its path where others have the same."""
    stems = [Path(model).stem for model in dict.fromkeys(models)]
    return {model: Path(model).stem if stems.count(Path(model).stem) == 1 else model for model in models}


def cells(measured: Measured, label: str) -> list[str]:
    """One row of the table as text; a figure that could not be measured is a dash."""
    m, row = measured, measured.row

    def number(value: float, digits: int) -> str:
        return '-' if value != value else f'{value:.{digits}f}'

    return [
        label, m.network, row.name, row.precision,
        number(m.psnr, 3),
        number(m.pooled, 3),
        number(m.ssim, 4),
        number(m.kmacs, 2),
        number(m.patch_mflops, 0),
        number(m.ms, 1),
        number(m.speed, 2),
        number(m.peak_mib, 0), ' / '.join(f'{share:.0f}' for share in m.shares) if row.kind in ROUTED else ''
    ]


def table(measured: Sequence[Measured]) -> list[list[str]]:
    """The table as text, without its head."""
    names = labels([m.row.model for m in measured])
    return [cells(m, names[m.row.model]) for m in measured]


def markdown(measured: Sequence[Measured]) -> str:
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|' + ' --- |' * len(COLUMNS)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in table(measured)]) + '\n'


def write_report(measured: Sequence[Measured], text: str, folder: str) -> None:
    """Writes benchmark.md, benchmark.csv and benchmark.png (PSNR against time, and against MACs)."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with replace_when_done(root / 'benchmark.md') as temporary:
        temporary.write_text(f'{text}\n\n{markdown(measured)}', encoding='utf-8')
    with replace_when_done(root / 'benchmark.csv') as temporary, open(temporary, 'w', newline='') as file:
        csv.writer(file).writerows([COLUMNS, *table(measured)])
    with replace_when_done(root / 'benchmark.png') as temporary:
        _plot(measured, text, temporary)


def _plot(measured: Sequence[Measured], text: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(text, fontsize=8)
    lines: dict[str, list[Measured]] = {}
    names = labels([m.row.model for m in measured])
    for m in measured:
        name = m.row._replace(budget=None).name  # budgets are one line
        lines.setdefault(f'{names[m.row.model]}, {name}, {m.row.precision}', []).append(m)
    axis_labels = dict(ms='ms per megapixel', kmacs='thousand MACs per pixel, classifier and overlap included')
    for axes, (key, label) in zip(figure.subplots(1, 2), axis_labels.items()):
        for number, (name, points) in enumerate(lines.items()):
            points = sorted((getattr(m, key), m.psnr) for m in points)
            style = dict(color=f'C{number % 10}', marker='os^v'[number // 10 % 4], label=name)
            axes.plot(*zip(*points), linestyle='-' if len(points) > 1 else '', **style)
        axes.set(xlabel=label, ylabel='PSNR (RGB) in dB')
        axes.grid(alpha=0.3)
        if key == 'ms':
            axes.set_xscale('log')
            axes.xaxis.set_major_formatter('{x:.0f}')
            axes.xaxis.set_minor_formatter('{x:.0f}')
            axes.tick_params(axis='x', which='both', labelsize=7)
            figure.legend(loc='outside lower center', ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
