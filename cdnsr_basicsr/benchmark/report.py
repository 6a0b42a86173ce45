"""Reports measurements as table, CSV and plot."""
from __future__ import annotations

import csv
import numpy as np
import statistics
from pathlib import Path
from typing import Any, Iterable, Sequence

from ..files import replace_when_done
from .rows import ROUTED, Measured, Row

COLUMNS = ('model', 'network', 'method', 'precision', 'PSNR', 'pooled', 'SSIM', 'kMACs/pixel', 'MFLOPs/patch (papers)',
           'ms/megapixel', 'times BasicSR', 'peak MiB', 'classes %')


def summary(row: Row, about: dict, results: list[dict], pooled: float, ms: float, first: float) -> Measured:
    """Summarises the measurements of a row.

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
    one = about['hardest'] if row.branch is None else row.branch
    network = about['network'] if row.kind in ROUTED else about['branches'][one]
    network = 'Interpolation' if row.kind == 'bicubic' else network
    peak = max(result.get('peak', float('nan')) for result in results)
    return Measured(row, network, mean('psnr'), pooled, mean('ssim'), mean('kmacs'), mflops, ms, first / ms, peak,
                    shares, mean('psnr_y'))


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


def as_dict(measured: Measured) -> dict[str, Any]:
    """One row of the table as numbers; NaN where one could not be measured."""
    m, row = measured, measured.row
    return dict(
        model=row.model,
        network=m.network,
        method=row.name,
        precision=row.precision,
        backend=row.backend,
        budget=row.budget,
        psnr=m.psnr,
        psnr_y=m.psnr_y,
        pooled=m.pooled,
        ssim=m.ssim,
        kmacs_per_pixel=m.kmacs,
        mflops_per_patch=m.patch_mflops,
        ms_per_megapixel=m.ms,
        times_basicsr=m.speed,
        peak_mib=m.peak_mib,
        shares=list(m.shares) if row.kind in ROUTED else [])


def table(measured: Sequence[Measured]) -> list[list[str]]:
    """The table as text, without its head."""
    names = labels([m.row.model for m in measured])
    return [cells(m, names[m.row.model]) for m in measured]


def markdown(measured: Sequence[Measured]) -> str:
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|' + ' --- |' * len(COLUMNS)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in table(measured)]) + '\n'


def write_report(measured: Sequence[Measured], text: str, folder: str) -> None:
    """Writes benchmark.md, benchmark.csv and benchmark.png."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with replace_when_done(root / 'benchmark.md') as temporary:
        temporary.write_text(f'{text}\n\n{markdown(measured)}', encoding='utf-8')
    with replace_when_done(root / 'benchmark.csv') as temporary, open(temporary, 'w', newline='') as file:
        csv.writer(file).writerows([COLUMNS, *table(measured)])
    with replace_when_done(root / 'benchmark.png') as temporary:
        plot(measured, text, temporary)


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of some points (cost, quality) that are better than every cheaper one, by cost."""
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((cost, quality))
    return kept


def single_networks(measured: Sequence[Measured], names: dict[str, str]) -> dict[str, Measured]:
    """What upscales whole images alone, with all that the engine has: networks, branches and bicubic, by name."""
    singles = {}
    for m in measured:
        if m.row.kind == 'bicubic':
            singles['bicubic'] = m
        elif m.row.kind == 'whole' and m.row.tuned and np.count_nonzero(m.shares) < 2:  # else it routes pixels
            branch = f', branch {np.argmax(m.shares) + 1}' if len(m.shares) > 1 else ''
            singles[names[m.row.model] + branch] = m
    return singles


def draw(axes: Any, measured: Sequence[Measured], key: str) -> None:
    """Draws pooled PSNR against a cost: the frontier of single networks, and networks that route, over their budgets.

    Args:
        axes: Of matplotlib.
        measured: Rows of one precision, and those that are there in one only.
        key: The cost: 'ms' | 'kmacs'.
    """
    names = labels([m.row.model for m in measured])
    points = {name: (getattr(m, key), m.pooled) for name, m in single_networks(measured, names).items()}
    points = {name: point for name, point in points.items() if np.isfinite(point).all()}
    axes.plot(*np.reshape(frontier(points.values()), (-1, 2)).T, 'k-', label='frontier of single networks, tuned')
    for name, point in points.items():
        axes.plot(*point, 'ks', markersize=4)
        axes.annotate(f' {name}', point, fontsize=7, va='top')
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for m in measured:
        if m.row.kind in ('routed', 'oracle'):
            name = m.row._replace(budget=None).name  # budgets are one line
            lines.setdefault((m.row.model, name), []).append((getattr(m, key), m.pooled))
    for (model, name), line in lines.items():
        style = '^--' if name == 'oracle' else 'o-'
        colour = f'C{list(names).index(model) % 10}'
        axes.plot(*zip(*sorted(line)), style, color=colour, label=f'{names[model]}, {name}')
    if key == 'ms':
        plain = [(m.ms, m.pooled) for m in measured if m.row.kind == 'whole' and not m.row.tuned]
        axes.plot(*np.reshape(plain, (-1, 2)).T, 'kx', label='whole image (BasicSR)')


def plot(measured: Sequence[Measured], text: str, path: Path) -> None:
    """Draws pooled PSNR against time and against MACs, for each precision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    precisions = list(dict.fromkeys(m.row.precision for m in measured if m.row.kind == 'whole' and m.row.tuned))
    figure = Figure(figsize=(13, 6 * len(precisions)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(text, fontsize=8)
    costs = dict(ms='ms per megapixel', kmacs='thousand MACs per pixel, classifier and overlap included')
    for number, (precision, pair) in enumerate(zip(precisions, figure.subplots(len(precisions), 2, squeeze=False))):
        # BasicSR's rows and bicubic are there in one precision only
        shown = [m for m in measured if m.row.precision == precision or m.row.kind == 'bicubic' or not m.row.tuned]
        for axes, (key, label) in zip(pair, costs.items()):
            draw(axes, shown, key)
            axes.set(xlabel=label, ylabel='pooled PSNR in dB')
            axes.set_title(precision, fontsize=9, loc='left')
            axes.grid(alpha=0.3)
        pair[0].set_xscale('log')
        pair[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        pair[0].xaxis.set_major_formatter('{x:g}')
        pair[0].xaxis.set_minor_formatter(NullFormatter())
        if number == 0:  # where the oracle is
            figure.legend(*pair[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
