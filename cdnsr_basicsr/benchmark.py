"""Networks side by side on photographs, their quality, cost and time: what `basicsr benchmark` does."""
from __future__ import annotations

import csv
import ctypes
import math
import multiprocessing
import numpy as np
import signal
import statistics
import tempfile
import time
import torch
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from torch import nn
from tqdm import tqdm
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

from . import load_plugins
from .archs import Interpolation
from .calibration import read_calibration
from .checkpoint import load_network
from .complexity import count_macs
from .evaluation import PairStore, quality_of, to_tensor
from .export import check_backend, in_backend
from .files import replace_when_done
from .inference import TileUpscaler, default_patch_size, make_upscaler
from .inference.network import (PRECISIONS, branches_of, common_geometry, deployed, pixel_routed, route, routed,
                                run_padded)
from .inference.runtime import precisions as precisions_of
from .inference.speed import is_out_of_memory, machine
from .inference.tiling import TensorRows
from .inference.upscaler import algorithm_search
from .memory import keep_freed_memory
from .options import OptionError, read_options, read_routing

# patch size and step of a loop over tiles, if they are not those of the run; ClassSR's and CDNSR's training size
LOOPS = {'loop': None, 'published loop': (32, 28)}


class Row(NamedTuple):
    """One way to upscale.

    Attributes:
        model: Checkpoint, or option file that names one.
        kind: 'whole': one branch, or a network without branches, on the whole image. 'bicubic': bicubic upsampling.
            'loop', 'published loop': one tile at a time. 'tiled': as 'whole', in tiles. 'routed': each tile by its
            branch, each pixel by its sampler. 'oracle': as 'routed', by the branches' true errors instead of the
            classifier's word.
        tuned: Whether it gets what the engine has: channels last, freed memory kept, fast forms of layers, precision.
        precision: Of the branches.
        budget: Of the routing.
        backend: What runs the network: 'torch', 'onnxruntime' or 'openvino'.
        branch: Which branch is 'whole' or 'tiled'. Default: the hardest.
    """
    model: str
    kind: str
    tuned: bool
    precision: str = 'float32'
    budget: Optional[float] = None
    backend: str = 'torch'
    branch: Optional[int] = None

    @property
    def name(self) -> str:
        alone = '' if self.branch is None else f'branch {self.branch + 1}, '
        if self.kind == 'whole':
            return alone + ('whole image, tuned' if self.tuned else 'whole image (BasicSR)')
        if self.kind in LOOPS:
            return 'one tile at a time' + (', 32/28' if LOOPS[self.kind] else '')
        name = alone + (self.kind if self.budget is None else f'{self.kind}, budget {self.budget:g}')
        return name if self.backend == 'torch' else f'{name} ({self.backend})'


class Measured(NamedTuple):
    """What was measured of a row; NaN where memory did not suffice.

    Attributes:
        row: The row.
        network: Type of the network.
        psnr, ssim: Means over the photographs, of RGB, or of the luma of networks for gray pictures, `scale` pixels of
            border left out; NaN if a result is not finite.
        kmacs: Thousand MACs per pixel of the result, classifier and tile overlap included.
        patch_mflops: The papers' convention: million FLOPs (2 per MAC, transposed convs at their output size) per patch
            of 32x32, averaged over the tiles; of the branches alone, without classifier and overlap.
        ms: Median time in milliseconds per megapixel of the result.
        speed: How many times as fast as the first row of the model.
        peak_mib: Most memory in use, in MiB: of the process, on a GPU of its tensors.
        shares: Part of the tiles, or pixels, in each class, in percent.
    """
    row: Row
    network: str
    psnr: float
    ssim: float
    kmacs: float
    patch_mflops: float
    ms: float
    speed: float
    peak_mib: float
    shares: list[float]


class Settings(NamedTuple):
    """What all rows have in common."""
    patch_size: Optional[int]
    step: Optional[int]
    device: str
    cost: str
    with_ssim: bool
    pairs: PairStore


def is_option_file(model: str) -> bool:
    return model.endswith(('.yml', '.yaml'))


def checkpoint_of(model: str) -> str:
    """The checkpoint that an option file names; any other model is one."""
    return read_options(model)['path']['pretrain_network_g'] if is_option_file(model) else model


def load(model: str) -> nn.Module:
    if not is_option_file(model):
        return load_network(model)
    net = load_network(None, model)
    routing = read_routing(model) if pixel_routed(net) is not None else {}
    if routing:
        route(net, routing)
    return net


def one_tile_at_a_time(net: nn.Module,
                       lq: torch.Tensor,
                       patch_size: int,
                       step: int,
                       multiple: int = 1) -> tuple[torch.Tensor, list[int]]:
    """The published way: for each tile the classifier, one branch, and a mean where tiles overlap.

    Args:
        net: A CDNSR network.
        lq: of shape (1, c, h, w), in [0, 1].
        patch_size: Side of a tile, a multiple of `multiple`; a smaller image is padded to such a side.
        step: Distance of tiles.
        multiple: What the branches want the sides of tiles to be multiples of.

    Returns:
        The result, and the class of each tile.
    """
    height, width = lq.shape[2:]
    output, count = (lq.new_zeros(*lq.shape[:2], height * net.upscale, width * net.upscale) for _ in range(2))
    classes = []
    for top in range(0, max(height - patch_size, 0) + step, step):
        for left in range(0, max(width - patch_size, 0) + step, step):
            top, left = max(0, min(top, height - patch_size)), max(0, min(left, width - patch_size))
            tile = lq[:, :, top:top + patch_size, left:left + patch_size]
            classes.append(int(net.classifier(tile).argmax()))
            upscaled = run_padded(net.branches[classes[-1]], tile, net.upscale, multiple)
            there = (..., slice(top * net.upscale, top * net.upscale + upscaled.shape[2]),
                     slice(left * net.upscale, left * net.upscale + upscaled.shape[3]))
            output[there] += upscaled
            count[there] += 1
    return output / count, classes


class Bench:
    """Runs the rows of one model and backend in a process of its own."""

    def __init__(self, settings: Settings, model: str, backend: str) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.net = load(model).to(self.device)
        self.model = model
        if backend != 'torch':
            self.net = in_backend(self.net, backend, model)
        self.channels = channels_of(self.net)
        self.runners: dict[Row, Callable] = {}
        self.number = 0  # of the image that is being upscaled
        self.errors: dict[int, torch.Tensor] = {}

    def true_errors(self, lq: torch.Tensor) -> torch.Tensor:
        """Squared error of each branch on each tile, of shape (n, M), as the engine cuts tiles."""
        if self.number not in self.errors:
            upscaler = make_upscaler(self.net, *self.settings[:2])
            tiling = upscaler.tiling_of(*lq.shape[2:])
            owner = tiling.class_map(torch.arange(len(tiling))).flatten()
            gt = to_tensor(self.settings.pairs.gt(self.number), self.channels).to(self.device)
            columns = []
            for branch in self.net.branches:
                alone = TileUpscaler(branch, upscaler.patch_size, upscaler.step)
                error = (alone.upscale(lq).image.clamp(0, 1) - gt).square().mean(dim=1)
                error = nn.functional.avg_pool2d(error, upscaler.scale).flatten().cpu()
                columns.append(torch.bincount(owner, error, len(tiling)))
            self.errors[self.number] = torch.stack(columns, dim=1)
        return self.errors[self.number]

    def runner(self, row: Row) -> Callable:
        """A function of an LQ image (1, c, h, w) that returns the result, kMACs per pixel of it, and tiles by class."""
        if row in self.runners:
            return self.runners[row]
        net, dtype = self.net, PRECISIONS[row.precision]
        kwargs = dict(precision=row.precision, budget=row.budget)
        if row.kind in ('routed', 'oracle'):
            kwargs['cost'] = self.settings.cost
            if row.backend == 'torch' and routed(net) is not None:
                patch_size = self.settings.patch_size or default_patch_size(net)
                calibration = read_calibration(checkpoint_of(self.model), net, row.precision, patch_size)
                kwargs['float32_branches'] = calibration.float32_branches if calibration else ()
        upscaler = make_upscaler(net, *self.settings[:2], **kwargs)
        whole = upscaler.whole_macs / 1000
        if pixel_routed(net) is not None:
            if row.kind != 'whole':

                def run(lq: torch.Tensor) -> tuple[torch.Tensor, float, list[int]]:
                    upscaled = upscaler.upscale(lq)
                    return upscaled.image, whole * upscaled.cost, upscaled.counts
            else:
                branch = deployed(net, dtype) if row.tuned else net

                def run(lq: torch.Tensor) -> tuple[torch.Tensor, float, list[int]]:
                    with torch.autocast(lq.device.type, dtype, enabled=dtype != torch.float32):
                        output, routing = branch(lq, return_routing=True)
                    pixels, lq_pixels = output.shape[2] * output.shape[3], lq.shape[2] * lq.shape[3]
                    heavy = pixels if routing is None else int(routing.heavy.sum())
                    counts = [pixels - heavy, heavy][-upscaler.num_classes:]
                    return output, upscaler.spent(lq_pixels, lq_pixels, counts) / pixels / 1000, counts

            self.runners[row] = run
            return run
        branches = branches_of(net)
        one = int(np.argmax(upscaler.branch_macs)) if row.branch is None else row.branch
        alone = np.eye(len(branches), dtype=int)[one].tolist()
        multiple, scale = upscaler.multiple, upscaler.scale
        whole_of_one = upscaler.branch_macs[one] / max(upscaler.branch_macs) * whole
        if row.kind == 'bicubic':

            def run(lq: torch.Tensor) -> tuple[torch.Tensor, float, list[int]]:
                return Interpolation(upscale=scale)(lq), 0., [0] * len(branches)
        elif row.kind == 'whole':
            branch = deployed(branches[one], dtype) if row.tuned else branches[one]

            def run(lq: torch.Tensor) -> tuple[torch.Tensor, float, list[int]]:
                with torch.autocast(lq.device.type, dtype, enabled=dtype != torch.float32):
                    lq = lq.contiguous(memory_format=torch.channels_last) if row.tuned else lq
                    return run_padded(branch, lq, scale, multiple).float(), whole_of_one, alone
        elif row.kind in LOOPS:
            patch_size, step = LOOPS[row.kind] or (upscaler.patch_size, upscaler.step)
            tile = TileUpscaler(net, patch_size, step)
            patch_size = tile.patch_size  # a multiple

            def run(lq: torch.Tensor) -> tuple[torch.Tensor, float, list[int]]:
                output, classes = one_tile_at_a_time(net, lq, patch_size, step, multiple)
                spent = sum(tile.branch_macs[kind] + tile.classifier_macs for kind in classes)
                spent *= min(1, lq.shape[2] / patch_size) * min(1, lq.shape[3] / patch_size)  # of a small picture
                counts = np.bincount(classes, minlength=len(branches)).tolist()
                return output, spent / (output.shape[2] * output.shape[3]) / 1000, counts
        else:
            if row.kind == 'tiled' and upscaler.routed:
                upscaler = TileUpscaler(branches[one], upscaler.patch_size, upscaler.step, precision=row.precision)
                whole = whole_of_one
            upscaler.measure_speed()  # now, not within what is measured

            def run(lq: torch.Tensor) -> tuple[torch.Tensor, float, list[int]]:
                # as logits: what argmax(log p - lambda c) then maximises is -(error + lambda c)
                logits = -self.true_errors(lq) if row.kind == 'oracle' else None
                plan = None if logits is None else upscaler.plan(TensorRows(lq), logits)
                upscaled = upscaler.upscale(lq, plan)
                return upscaled.image, whole * upscaled.cost, alone if row.kind == 'tiled' else upscaled.counts

        self.runners[row] = run
        return run

    @torch.inference_mode()
    def measure(self, row: Row, number: int, look: bool) -> dict:
        """Upscales an image.

        Args:
            row: How.
            number: Which image.
            look: Whether to say how good the result is and what memory it took, besides the time.
        """
        lq = to_tensor(self.settings.pairs.lq(number), self.channels).to(self.device)
        run = self.runner(row)
        self.number = number
        wait = torch.cuda.synchronize if lq.is_cuda else lambda: None
        known = look and begin_peak(lq.is_cuda)
        try:
            with algorithm_search(True):  # as BasicSR's pipelines; the engine does without, for its tiles
                wait()
                begin = time.perf_counter()
                image, kmacs, counts = run(lq)
                wait()
                seconds = time.perf_counter() - begin
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {}  # what is missing becomes NaN, in the table a dash
        if not look:
            return {'seconds': seconds}
        peak = peak_mib(lq.is_cuda) if known else float('nan')
        gt = self.settings.pairs.gt(number)
        psnr, ssim = quality_of(image, gt, image.shape[2] // lq.shape[2], self.settings.with_ssim)
        return dict(psnr=psnr, ssim=ssim, kmacs=kmacs, counts=counts, peak=peak, finite=not math.isnan(psnr))

    def describe(self) -> dict:
        """Type of the network, its scale, and MFLOPs of its branches in the papers' convention."""
        if pixel_routed(self.net) is not None:
            mflops = [2 * 32 * 32 * self.net.upscale**2 * cost / 1e6 for cost in self.net.costs]
            name = type(self.net).__name__
            return dict(network=name, branches=[name] * len(mflops), mflops=mflops)
        branches = branches_of(self.net)
        _, channels, multiple = common_geometry(branches)
        side = -(-32 // multiple) * multiple
        mflops = [
            2 * count_macs(branch, side, side, channels, papers=True) * (32 / side)**2 / 1e6 for branch in branches
        ]
        return dict(
            network=type(self.net).__name__, branches=[type(branch).__name__ for branch in branches], mflops=mflops)


def channels_of(net: nn.Module) -> int:
    """Channels of the images that a network takes: 3, or 1 for gray."""
    return make_upscaler(net).channels


def begin_peak(is_cuda: bool) -> bool:
    """Forgets the most memory that was in use so far, on a CPU after giving back what is free; says if it could."""
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
    except (AttributeError, OSError):
        return False
    return True


def peak_mib(is_cuda: bool) -> float:
    if is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('VmHWM'):
            return int(line.split()[1]) / 1024
    return float('nan')


def serve(connection: Connection, settings: Settings, model: str, tuned: bool, backend: str, threads: int) -> None:
    """Answers what the benchmark asks, in a process of its own: its memory is its own, and kept or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    load_plugins()
    torch.set_num_threads(threads)
    if settings.device.startswith('cuda'):
        torch.cuda.set_device(settings.device)
    if tuned and settings.device == 'cpu':
        keep_freed_memory()
    try:
        bench = Bench(settings, model, backend)
        connection.send(bench.describe())
        while True:
            question = connection.recv()
            if question is None:
                return
            connection.send(bench.measure(*question))
    except Exception as error:
        connection.send({'fatal': f'{type(error).__name__}: {error}'})


@contextmanager
def worker(*arguments: object) -> Iterator[Callable]:
    """A process that serves; yields a function that asks it."""
    ours, theirs = multiprocessing.get_context('spawn').Pipe()
    process = multiprocessing.get_context('spawn').Process(
        target=serve, args=(theirs, *arguments, torch.get_num_threads()), daemon=True)
    process.start()
    theirs.close()

    def ask(*question: object) -> dict:
        try:
            if question:
                ours.send(question)
            answer = ours.recv()
        except (EOFError, OSError):
            raise OptionError(str(arguments[1]), 'the process that ran it was killed, perhaps for memory') from None
        if 'fatal' in answer:
            raise OptionError(str(arguments[1]), answer['fatal'])
        return answer

    try:
        yield ask
    finally:
        try:
            ours.send(None)
        except OSError:  # it has ended
            pass
        process.join(timeout=5)
        process.kill()


def rows_of(model: str,
            routed: bool,
            precisions: Sequence[str],
            budgets: Sequence[float],
            backends: Sequence[str] = ('torch', ),
            pixels: bool = False,
            oracle: bool = False,
            num_branches: int = 0) -> list[Row]:
    """The rows of a model, which routes tiles, pixels or neither; the first is what the others are compared with.

    Whole images, and what routes pixels, are torch's.
    """
    rows = [Row(model, 'whole', tuned=False)]
    rows += [Row(model, 'whole', True, precision) for precision in precisions]
    rows += [Row(model, kind, tuned=False) for kind in LOOPS] if routed else []
    backends = ('torch', ) if pixels else backends
    for kind, limits in (('tiled', () if pixels else (None, )), ('routed', (None, *budgets) if routed or pixels else
                                                                 ())):
        rows += [
            Row(model, kind, True, precision, budget, backend) for precision in precisions for budget in limits
            for backend in backends if precision in precisions_of(backend)
        ]
    if num_branches:
        rows.append(Row(model, 'bicubic', True))
        for i in range(num_branches):
            rows.append(Row(model, 'whole', tuned=False, branch=i))
            rows += [
                Row(model, kind, True, precision, branch=i) for kind in ('whole', 'tiled') for precision in precisions
            ]
    if routed and oracle:
        rows += [Row(model, 'oracle', True, precisions[0], budget) for budget in budgets]
    return rows


def benchmark(models: Sequence[str],
              data: str,
              budgets: Sequence[float] = (),
              precisions: Sequence[str] = ('float32', ),
              repeat: int = 3,
              limit: Optional[int] = None,
              patch_size: Optional[int] = None,
              step: Optional[int] = None,
              device: str = 'cpu',
              backends: Sequence[str] = ('torch', ),
              oracle: bool = False,
              branches: bool = False,
              cost: str = 'macs',
              with_ssim: bool = True,
              left_out: Optional[list[tuple[str, str]]] = None) -> tuple[list[Measured], str]:
    """Measures models on photographs. All rows take turns, photograph by photograph, in processes of their own.

    Args:
        models: Checkpoints, or option files that name one.
        data: Folder of photographs; see read_pairs.
        budgets: Budgets of networks with branches, besides the published rule.
        precisions: Precisions of all rows but BasicSR's.
        repeat: Timed runs of each row and photograph, after one that is not.
        limit: Most photographs. Default: all.
        patch_size: Largest side of a tile. Default: the engine's.
        step: patch_size less the overlap of tiles.
        device: Where to run.
        backends: What is to run tiled and routed rows, those other than torch on the CPU; where one has no such
            precision, the row is left out.
        oracle: Whether to route by true errors too, at each budget.
        branches: Whether to measure each branch alone too, and bicubic upsampling.
        cost: 'macs' | 'latency': what a budget counts.
        with_ssim: Whether to compute SSIM.
        left_out: See read_pairs.

    Returns:
        The rows, and a line that says on what they were measured.

    Raises:
        OptionError: A model or the folder cannot be used, or the models are of different scales.
    """
    for backend in backends:
        check_backend(backend)
    routed, pixels, scales, channels, num_branches = {}, {}, {}, {}, {}
    for model in dict.fromkeys(models):
        net = load(model)
        try:
            upscaler = make_upscaler(net, patch_size, step)
            scales[model], channels[model] = upscaler.scale, upscaler.channels
            routed_[model], pixels[model] = routed(net) is not None, pixel_routed(net) is not None
            num_branches[model] = len(net.branches) if branches and routed_[model] else 0
        except ValueError as error:
            raise OptionError(model, str(error)) from error
    if len(set(scales.values())) != 1:
        raise OptionError('-m', f'all models must have one scale, but have {sorted(set(scales.values()))}')
    if len(set(channels.values())) != 1:
        gray = ', '.join(model for model, count in channels.items() if count == 1)
        raise OptionError('-m', f'networks for gray pictures ({gray}) cannot be compared with those for colours')
    scale = next(iter(scales.values()))
    if scale != int(scale):
        raise OptionError('-m', f'only networks of whole scales can be compared, but x{scale} was given')
    rows = [
        row for model in routed for row in rows_of(model, routed[model], precisions, budgets, backends, pixels[model],
                                                   oracle, num_branches[model])
    ]
    rows = list(dict.fromkeys(rows))
    results: dict[Row, list[dict]] = {row: [] for row in rows}
    seconds: dict[Row, list[float]] = {row: [] for row in rows}
    with ExitStack() as stack:
        pairs = PairStore(stack.enter_context(tempfile.TemporaryDirectory()), data, scale, limit, left_out)
        sizes = [max(size) for size in pairs.sizes]
        settings = Settings(patch_size, step, device, cost, with_ssim, pairs)
        # two processes per model, and one per other backend: kept memory cannot be given up again. On a GPU one, as
        # each would hold its share
        apart = (False, True) if device == 'cpu' else (True, )
        keys = [(model, tuned, 'torch') for model in routed for tuned in apart]
        keys += [(row.model, True, row.backend) for row in rows if row.tuned]
        asks = {key: stack.enter_context(worker(settings, *key)) for key in dict.fromkeys(keys)}
        described = {key: ask() for key, ask in asks.items()}
        bar = stack.enter_context(
            tqdm(total=len(sizes) * (repeat + 1) * len(rows), desc='benchmark', unit='run', disable=None))
        for number in range(len(sizes)):
            times: dict[Row, list[float]] = {row: [] for row in rows}
            for turn in range(repeat + 1):
                for row in rows:
                    answer = asks[row.model, row.tuned or apart == (True, ), row.backend](row, number, turn == 0)
                    bar.update()
                    if turn == 0:
                        results[row].append(answer)
                    else:
                        times[row].append(answer.get('seconds', float('nan')))
            for row in rows:
                seconds[row].append(statistics.median(times[row]))

    measured = []
    for row in rows:
        about = described[row.model, True, 'torch']
        ms = 1000 * sum(seconds[row]) / pairs.megapixels
        first = 1000 * sum(seconds[Row(row.model, 'whole', tuned=False)]) / pairs.megapixels
        measured.append(_summary(row, about, results[row], ms, first))
    where = machine(torch.device(device))
    gray = '; PSNR and SSIM of luma' if 1 in channels.values() else ''
    text = (f'{len(sizes)} photograph{"s" * (len(sizes) != 1)} of {min(sizes)} to {max(sizes)} pixels, x{scale}, '
            f'tiles of at most {patch_size or "the usual size"}{", budgets of time" * (cost == "latency")}; {where}; '
            f'medians of {repeat} runs, all rows in turns{gray}')
    for row in rows:
        if not all(result.get('finite', True) for result in results[row]):
            text += f'\nNo PSNR, as values are no finite numbers: {row.model}, {row.name}, {row.precision}'
    return measured, text


def _summary(row: Row, about: dict, results: list[dict], ms: float, first: float) -> Measured:

    def mean(key: str) -> float:
        return statistics.fmean(result.get(key, float('nan')) for result in results)

    counts = np.sum([result.get('counts', [0] * len(about['branches'])) for result in results], axis=0)
    shares = (100 * counts / max(counts.sum(), 1)).tolist()
    mflops = float(np.dot(shares, about['mflops'])) / 100 if counts.sum() else float('nan')
    one = int(np.argmax(about['mflops'])) if row.branch is None else row.branch
    network = about['network'] if row.kind in ('routed', 'oracle', *LOOPS) else about['branches'][one]
    network = 'Interpolation' if row.kind == 'bicubic' else network
    peak = max(result.get('peak', float('nan')) for result in results)
    return Measured(row, network, mean('psnr'), mean('ssim'), mean('kmacs'), mflops, ms, first / ms, peak, shares)


COLUMNS = ('model', 'network', 'method', 'precision', 'PSNR', 'SSIM', 'kMACs/pixel', 'MFLOPs/patch (papers)',
           'ms/megapixel', 'times BasicSR', 'peak MiB', 'classes %')


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
        number(m.ssim, 4),
        number(m.kmacs, 2),
        number(m.patch_mflops, 0),
        number(m.ms, 1),
        number(m.speed, 2),
        number(m.peak_mib, 0),
        ' / '.join(f'{share:.0f}' for share in m.shares) if row.kind in ('routed', 'oracle', *LOOPS) else ''
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
