"""Networks side by side on photographs, their quality, cost and time: what `basicsr benchmark` does."""
from __future__ import annotations

import statistics
import tempfile
import torch
from contextlib import ExitStack
from tqdm import tqdm
from typing import Callable

from ..evaluation import PairStore, pooled_psnr
from ..export import check_backend
from ..inference.speed import machine
from ..options import OptionError
from .report import as_dict, markdown, summary, write_report
from .rows import Measured, Network, Row, Settings, rows_of
from .runners import network_of
from .worker import running_worker

__all__ = ['Measured', 'Row', 'Settings', 'as_dict', 'benchmark', 'markdown', 'write_report']


def benchmark(settings: Settings,
              wanted: Callable[[Row], bool] = lambda row: True) -> tuple[list[Measured], str, list[tuple[str, str]]]:
    """Measures models on photographs. All rows take turns, photograph by photograph, in processes of their own.

    Args:
        settings: What is compared, and how.
        wanted: Which of the rows are measured, of each model at least one that is tuned. Default: all.

    Returns:
        The rows; a line that says on what they were measured; photographs that were left out, and why.

    Raises:
        OptionError: A model or the folder cannot be used, or the models are of different scales.
    """
    for backend in settings.backends:
        check_backend(backend)
    networks = {model: network_of(model, settings) for model in dict.fromkeys([*settings.models, *settings.singles])}
    for model in settings.singles:
        if networks[model].num_branches or networks[model].routes_pixels:
            raise OptionError('--singles', f'{model} is routed; expected networks without branches')
    check_comparable(networks)
    if settings.oracle and not settings.budgets and not any(network.maps_errors for network in networks.values()):
        raise OptionError('--oracle', 'requires --budgets, unless a classifier is an ErrorMap')
    first = next(iter(networks.values()))
    rows = list(
        dict.fromkeys(row for model, network in networks.items() for row in rows_of(settings, model, network)
                      if wanted(row)))
    results: dict[Row, list[dict]] = {row: [] for row in rows}
    seconds = dict.fromkeys(rows, 0.)
    left_out: list[tuple[str, str]] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pairs = PairStore(folder, settings.data, int(first.scale), settings.limit, left_out)
        sizes = [max(size) for size in pairs.sizes]
        # two processes per model, and one per other backend: kept memory cannot be given up again. On a GPU one, as
        # each would hold its share
        apart = settings.device == 'cpu'
        keys = {row: (row.model, row.tuned or not apart, row.backend) for row in rows}
        asks = {key: stack.enter_context(running_worker(settings, pairs, *key)) for key in dict.fromkeys(keys.values())}
        described = {key: ask() for key, ask in asks.items()}
        bar = stack.enter_context(
            tqdm(total=len(sizes) * (settings.repeat + 1) * len(rows), desc='benchmark', unit='run', disable=None))
        for number in range(len(sizes)):
            times: dict[Row, list[float]] = {row: [] for row in rows}
            for turn in range(settings.repeat + 1):
                for row in rows:
                    answer = asks[keys[row]](row, number, turn == 0)
                    bar.update()
                    if turn == 0:
                        results[row].append(answer)
                    else:
                        times[row].append(answer.get('seconds', float('nan')))
            for row in rows:
                seconds[row] += statistics.median(times[row]) if settings.repeat else float('nan')

    measured = []
    for row in rows:
        both = (row, Row(row.model, 'whole', False))
        ms, baseline = (1000 * seconds.get(which, float('nan')) / pairs.megapixels for which in both)
        psnrs = [result.get('psnr', float('nan')) for result in results[row]]
        pooled = pooled_psnr(psnrs, pairs.sizes, int(first.scale))
        measured.append(summary(row, described[row.model, True, 'torch'], results[row], pooled, ms, baseline))
    timed = f'medians of {settings.repeat} runs, all rows in turns' if settings.repeat else 'not timed'
    gray = '; PSNR and SSIM of luma' if first.channels == 1 else ''
    text = (f'{len(sizes)} photograph{"s" * (len(sizes) != 1)} of {min(sizes)} to {max(sizes)} pixels, x{first.scale}, '
            f'tiles of at most {settings.patch_size or "the default size"}'
            f'{", budgets of time" * (settings.cost == "latency")}; {machine(torch.device(settings.device))}; '
            f'{timed}{gray}')
    for row in rows:
        if not all(result.get('finite', True) for result in results[row]):
            text += f'\nNo PSNR, because values are not finite: {row.model}, {row.name}, {row.precision}'
    return measured, text, left_out


def check_comparable(networks: dict[str, Network]) -> None:
    """Refuses networks whose figures cannot be compared."""
    scales = sorted({network.scale for network in networks.values()})
    if len(scales) != 1:
        raise OptionError('-m', f'all models must have the same scale, but have {scales}')
    if len({network.channels for network in networks.values()}) != 1:
        gray = ', '.join(model for model, network in networks.items() if network.channels == 1)
        raise OptionError('-m', f'networks for grayscale images ({gray}) cannot be compared with others')
    if scales[0] != int(scales[0]):
        raise OptionError('-m', f'only networks with an integer scale can be compared, but x{scales[0]} was given')
