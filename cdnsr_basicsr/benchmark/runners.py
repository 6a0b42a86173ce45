"""How each kind of row upscales: functions of a Bench and a row that return a Runner."""
from __future__ import annotations

import numpy as np
import torch
from contextlib import ExitStack
from torch import nn
from typing import Callable, NamedTuple, Optional

from ..archs import Interpolation
from ..calibration import Calibration, read_calibration
from ..complexity import count_macs
from ..conversion.convert import load_network
from ..evaluation import PairStore, to_tensor
from ..export import in_backend
from ..inference import TileUpscaler, default_patch_size, make_upscaler
from ..inference.network import (
    PRECISIONS,
    branches_of,
    common_geometry,
    deployed,
    maps_errors,
    pixel_routed,
    routed,
    run_padded,
)
from ..inference.tiling import TensorRows
from ..loading import route_by
from ..options import OptionError, read_options
from .rows import LOOPS, Network, Row, Settings


class Result(NamedTuple):
    """The result of a runner for an image.

    Attributes:
        image: of shape (1, c, H, W).
        kmacs: Thousand MACs per pixel of it.
        counts: Tiles, or pixels, of each class.
    """
    image: torch.Tensor
    kmacs: float
    counts: list[int]


Runner = Callable[[torch.Tensor], Result]  # of an LQ image of shape (1, c, h, w), in [0, 1]


def is_option_file(model: str) -> bool:
    return model.endswith(('.yml', '.yaml'))


def checkpoint_of(model: str) -> str:
    """The checkpoint that an option file names; any other model is one."""
    return read_options(model)['path']['pretrain_network_g'] if is_option_file(model) else model


def load(model: str) -> nn.Module:
    if not is_option_file(model):
        return load_network(model)
    net = load_network(None, model)
    route_by(model, net)
    return net


def network_of(model: str, settings: Settings) -> Network:
    """What a benchmark has to know of a model in advance.

    Raises:
        OptionError: It cannot be loaded, or is no network for super-resolution.
    """
    net = load(model)
    try:
        upscaler = make_upscaler(net, settings.patch_size, settings.step)
    except ValueError as error:
        raise OptionError(model, str(error)) from error
    parts = routed(net)
    if parts is None:
        return Network(upscaler.scale, upscaler.channels, routes_pixels=pixel_routed(net) is not None)
    maps = maps_errors(parts.classifier) is not None
    return Network(upscaler.scale, upscaler.channels, upscaler.num_classes, maps_errors=maps)


class Bench:
    """A network on its device, and what its rows have in common.

    Args:
        settings: Those of the benchmark.
        pairs: The photographs, for rows that look at their ground truth.
        model: Checkpoint, or option file that names one.
        backend: What runs the network.

    Attributes:
        plain: Its engine, without a budget.
        branches: Its branches; a network without is one.
        number: Which photograph is being upscaled.
    """

    def __init__(self, settings: Settings, pairs: Optional[PairStore], model: str, backend: str = 'torch') -> None:
        self.settings, self.pairs, self.model = settings, pairs, model
        self.device = torch.device(settings.device)
        self.net = load(model).to(self.device)
        if backend != 'torch':
            self.net = in_backend(self.net, backend, model)
        self.plain = make_upscaler(self.net, settings.patch_size, settings.step)
        calibration = self.calibration('float32') if backend == 'torch' else None
        if calibration:
            self.plain.take_hardest(calibration.hardest)
        self.branches = branches_of(self.net)
        self.runners: dict[Row, Runner] = {}
        self.settled = ExitStack()
        self.number = 0
        self.errors: dict[int, torch.Tensor] = {}

    def calibration(self, precision: str) -> Optional[Calibration]:
        """What is known of the model in a precision, with the tiles of this benchmark."""
        patch_size = self.settings.patch_size or default_patch_size(self.net)
        return read_calibration(checkpoint_of(self.model), self.net, precision, patch_size)

    def runner(self, row: Row) -> Runner:
        if row not in self.runners:
            kinds = RUNNERS if pixel_routed(self.net) is None else PIXEL_RUNNERS
            self.runners[row] = kinds[row.kind](self, row)
        return self.runners[row]

    def branch_of(self, row: Row) -> int:
        """Which branch a row is of."""
        return self.plain.hardest if row.branch is None else row.branch

    def kmacs_of(self, branch: int) -> float:
        """Thousand MACs of a branch on a whole image, per pixel of the result."""
        return self.plain.branch_macs[branch] / self.plain.patch_size**2 / self.plain.scale**2 / 1000

    def alone(self, branch: int) -> list[int]:
        """Counts of a result that a single branch computed."""
        return [int(i == branch) for i in range(len(self.branches))]

    def lq(self, number: int) -> torch.Tensor:
        """An LQ image as a tensor, on the device."""
        return to_tensor(self.pairs.lq(number), self.plain.channels).to(self.device)

    def true_errors(self, number: int) -> torch.Tensor:
        """Mean squared error of each branch on each tile of a photograph, in grey levels, as the engine cuts
        tiles; of shape (n, M).
        """
        if number not in self.errors:
            lq, gt = self.lq(number), to_tensor(self.pairs.gt(number), self.plain.channels).to(self.device)
            maps = []
            for branch in self.branches:
                alone = TileUpscaler(branch, self.plain.patch_size, self.plain.step)
                error = (alone.upscale(lq).image.clamp(0, 1) - gt).square().mean(dim=1)
                maps.append(nn.functional.avg_pool2d(255**2 * error, self.plain.scale).cpu())
            self.errors[number] = self.plain.tiling_of(*lq.shape[2:]).means(torch.cat(maps), cell=1)
        return self.errors[number]

    def describe(self) -> dict:
        """Types of the network and its branches, and MFLOPs of these in the papers' convention."""
        name = type(self.net).__name__
        if pixel_routed(self.net) is not None:
            mflops = [2 * 32 * 32 * self.net.upscale**2 * cost / 1e6 for cost in self.net.costs]
            return dict(network=name, branches=[name] * len(mflops), mflops=mflops, hardest=len(mflops) - 1)
        _, channels, multiple = common_geometry(self.branches)
        side = -(-32 // multiple) * multiple
        mflops = [
            2 * count_macs(branch, side, side, channels, papers=True) * (32 / side)**2 / 1e6 for branch in self.branches
        ]
        names = [type(branch).__name__ for branch in self.branches]
        return dict(network=name, branches=names, mflops=mflops, hardest=self.plain.hardest)


def in_precision(lq: torch.Tensor, dtype: torch.dtype) -> torch.autocast:
    """A context in which a network computes in `dtype`."""
    return torch.autocast(lq.device.type, dtype, enabled=dtype != torch.float32)


def whole(bench: Bench, row: Row) -> Runner:
    """One branch, or a network without branches, on the whole image."""
    dtype, index = PRECISIONS[row.precision], bench.branch_of(row)
    branch = deployed(bench.branches[index], dtype) if row.tuned else bench.branches[index]

    def run(lq: torch.Tensor) -> Result:
        with in_precision(lq, dtype):
            lq = lq.contiguous(memory_format=torch.channels_last) if row.tuned else lq
            image = run_padded(branch, lq, bench.plain.scale, bench.plain.multiple).float()
        return Result(image, bench.kmacs_of(index), bench.alone(index))

    return run


def bicubic(bench: Bench, row: Row) -> Runner:
    """Bicubic upsampling."""
    net = Interpolation(upscale=bench.plain.scale)
    return lambda lq: Result(net(lq), 0., [0] * len(bench.branches))


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


def loop(bench: Bench, row: Row) -> Runner:
    """One tile at a time, the published way."""
    patch_size, step = LOOPS[row.kind] or (bench.plain.patch_size, bench.plain.step)
    tile = TileUpscaler(bench.net, patch_size, step)
    patch_size = tile.patch_size  # a multiple

    def run(lq: torch.Tensor) -> Result:
        image, classes = one_tile_at_a_time(bench.net, lq, patch_size, step, bench.plain.multiple)
        spent = sum(tile.branch_macs[kind] + tile.classifier_macs for kind in classes)
        spent *= min(1, lq.shape[2] / patch_size) * min(1, lq.shape[3] / patch_size)  # of a small image
        counts = np.bincount(classes, minlength=len(bench.branches)).tolist()
        return Result(image, spent / (image.shape[2] * image.shape[3]) / 1000, counts)

    return run


def tiled(bench: Bench, row: Row) -> Runner:
    """As `whole`, in tiles."""
    index = bench.branch_of(row)
    upscaler = TileUpscaler(bench.branches[index], bench.plain.patch_size, bench.plain.step, precision=row.precision)
    upscaler.measure_speed()  # now, not within what is measured

    def run(lq: torch.Tensor) -> Result:
        upscaled = upscaler.upscale(lq)
        return Result(upscaled.image, bench.kmacs_of(index) * upscaled.cost, bench.alone(index))

    return run


def by_classes(bench: Bench, row: Row) -> Runner:
    """Each tile by its branch: that of the classifier, or of the oracle, which knows the branches' true errors; or each
    pixel by its sampler.
    """
    settings = bench.settings
    calibration = bench.calibration(row.precision) if row.backend == 'torch' else None
    upscaler = make_upscaler(
        bench.net,
        settings.patch_size,
        settings.step,
        budget=row.budget,
        cost=settings.cost,
        precision=row.precision,
        float32_branches=calibration.float32_branches if calibration else ())
    if isinstance(upscaler, TileUpscaler):
        upscaler.measure_speed()  # now, not within what is measured
        if calibration:
            upscaler.take_hardest(calibration.hardest)
        every = range(len(bench.pairs.sizes)) if bench.pairs else ()
        errors = [bench.true_errors(number) for number in every] if row.kind == 'oracle' else None
        images = (TensorRows(bench.lq(number)) for number in every)
        bench.settled.enter_context(upscaler.together(images, errors=errors))  # as upscale does with a folder

    def run(lq: torch.Tensor) -> Result:
        plan = None
        if row.kind == 'oracle':
            plan = upscaler.plan(TensorRows(lq), errors=bench.true_errors(bench.number))
        upscaled = upscaler.upscale(lq, plan)
        return Result(upscaled.image, upscaler.whole_macs / 1000 * upscaled.cost, upscaled.counts)

    return run


def pixels_whole(bench: Bench, row: Row) -> Runner:
    """A network that routes pixels, on the whole image."""
    dtype = PRECISIONS[row.precision]
    net = deployed(bench.net, dtype) if row.tuned else bench.net

    def run(lq: torch.Tensor) -> Result:
        with in_precision(lq, dtype):
            image, routing = net(lq, return_routing=True)
        pixels, lq_pixels = image.shape[2] * image.shape[3], lq.shape[2] * lq.shape[3]
        heavy = pixels if routing is None else int(routing.heavy.sum())
        counts = [pixels - heavy, heavy][-bench.plain.num_classes:]
        return Result(image, bench.plain.spent(lq_pixels, lq_pixels, counts) / pixels / 1000, counts)

    return run


RUNNERS = dict(whole=whole, bicubic=bicubic, tiled=tiled, routed=by_classes, oracle=by_classes)
RUNNERS.update(dict.fromkeys(LOOPS, loop))
PIXEL_RUNNERS = dict(whole=pixels_whole, routed=by_classes)
