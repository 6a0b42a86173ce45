"""Upscaling a whole image tile by tile, each tile by the branch that its difficulty asks for."""
from __future__ import annotations

import functools
import torch
from torch import nn
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, cast

from ..complexity import count_macs
from .budget import RoutingPath, SettledPath, settled
from .network import (
    PRECISIONS,
    MapsErrors,
    arch_of,
    branches_of,
    common_geometry,
    deployed,
    maps_errors,
    predicts_errors,
    routed,
)
from .speed import Speed, is_out_of_memory, measured_speed
from .tiling import PATCH_SIZE, Block, Canvas, Rows, Tiling, pad_to
from .upscaler import Upscaler, algorithm_search, to_device

CANVAS_BYTES = {'cpu': 2**26, 'cuda': 2**29}  # of the strip that is being blended: bounds memory, and tiles per pass
MERGED_BYTES = 2**26  # of the rows of tiles, upscaled, that are merged up and down
CLASSIFIED_TOGETHER = {'cpu': 32, 'cuda': 512}  # tiles
FEW_TILES, DEFAULT_MAX_TILES = 32, {'cpu': 4, 'cuda': 32}  # an image of few is done before a measurement would be
MERGED_SIDE = 256  # pixels of a block of merged tiles, about; not measured: an image is the same on every machine
MAPPED_ROWS = 512  # of an image whose errors are predicted at once

Strips = list[list[tuple[int, Block]]]  # for each strip of an image its blocks of tiles and their classes


class TilePlan(NamedTuple):
    """What will be run on an image.

    Attributes:
        tiling: The tiles.
        classes: of shape (n, ), class of each tile, on CPU.
        strips: What is run.
        tile_rows: Tile rows of a strip.
        max_tiles: Most tiles per forward pass of each branch.
        cost: MACs to be spent, classifier and tile overlap included, relative to the hardest branch on the whole image.
        out_size: Height and width of the result.
    """
    tiling: Tiling
    classes: torch.Tensor
    strips: Strips
    tile_rows: int
    max_tiles: list[int]
    cost: float
    out_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.tiling.height, self.tiling.width

    @property
    def counts(self) -> list[int]:
        """Tiles of each class."""
        return torch.bincount(self.classes, minlength=len(self.max_tiles)).tolist()

    def class_map(self) -> torch.Tensor:
        """Class of each LR pixel, of shape (h, w)."""
        return self.tiling.class_map(self.classes)


class TileUpscaler(Upscaler):
    """Cuts an image into tiles, classifies them all, runs each class through its branch, blends the results.

    Args:
        net: A CDNSR network (attributes classifier, branches, upscale), or any super-resolution network, which is then
            run on all tiles.
        patch_size: Largest side of a tile in LR pixels.
        step: Distance of neighbouring tiles in LR pixels. Default: patch_size less 4 (8 for a network without
            branches).
        budget: Cost that may be spent on an image, as a fraction of the hardest branch's on the whole image without
            tiles; classifier and overlap count. Default: no limit, the most probable class.
        target_ms: Time that may be spent on an image, in milliseconds, by the measured speed of the branches.
        cost: 'macs' | 'latency': what a budget, or the price of a predicted error, counts. Default: time where branches
            are of different archs, else MACs.
        precision: 'float32' | 'bfloat16' | 'float16': of the branches. The classifier always runs in float32.
        float32_branches: Branches that keep float32.
        max_tiles: Most tiles per forward pass. Default: the fastest number by a short measurement, which is kept for
            each network and machine.

    Attributes:
        multiple: What the sides of tiles must be multiples of.
        branch_macs: MACs of each branch for one tile.
        classifier_macs: MACs of the classifier for one tile.
        hardest: The branch that leaves the least error, which budgets are relative to: the last one, where no
            calibration says otherwise.
    """
    unit = 'Tiles'

    def __init__(self,
                 net: nn.Module,
                 patch_size: int = PATCH_SIZE,
                 step: Optional[int] = None,
                 budget: Optional[float] = None,
                 target_ms: Optional[float] = None,
                 cost: Optional[str] = None,
                 precision: str = 'float32',
                 float32_branches: Sequence[int] = (),
                 max_tiles: Optional[int] = None) -> None:
        if cost not in (None, 'macs', 'latency'):
            raise ValueError(f"Expected cost 'macs' or 'latency', but got {cost!r}.")
        if budget is not None and target_ms is not None:
            raise ValueError('Expected a budget or target_ms, but got both.')
        self.sources = branches_of(net)
        scale, channels, self.multiple = common_geometry(self.sources)
        tiles = routed(net)
        self.routed = tiles is not None
        patch_size = -(-patch_size // self.multiple) * self.multiple
        step = max(1, patch_size - (4 if self.routed else 8)) if step is None else step
        dtypes = [torch.float32 if i in float32_branches else PRECISIONS[precision] for i in range(len(self.sources))]
        super().__init__(net, scale, channels, patch_size, step, budget, dtypes, max_tiles)
        self.num_classes = len(self.sources)
        alike = len({arch_of(branch) for branch in self.sources}) == 1
        self.target_ms, self.cost_kind = target_ms, cost or ('macs' if alike else 'latency')
        self.hardest = self.num_classes - 1
        self.classifier_macs = 0
        if tiles is not None:
            try:
                self.classifier_macs = count_macs(tiles.classifier, patch_size, patch_size, channels)
            except RuntimeError as error:
                text = f'the classifier takes no images of {channels} channel{"s" * (channels != 1)}: {error}'
                raise ValueError(text) from error
        self.branch_macs = [count_macs(branch, patch_size, patch_size, channels) for branch in self.sources]
        if budget is not None and self.cost_kind == 'macs' and self.branch_macs[self.hardest] == 0:
            raise ValueError('the branches have no multiply-accumulates to count; use cost latency')

    @property
    def limited(self) -> bool:
        """Whether there is a limit to what may be spent."""
        return self.budget is not None or self.target_ms is not None

    @property
    def whole_macs(self) -> float:
        return self.branch_macs[self.hardest] / self.patch_size**2 / self.scale**2

    def tiling_of(self, height: int, width: int) -> Tiling:
        """The tiles of an image."""
        return Tiling(height, width, self.patch_size, self.step, self.multiple)

    def _copy(self) -> None:
        self.sources = branches_of(self.net)
        tiles = routed(self.net)
        self.classifier = None if tiles is None else deployed(tiles.classifier, torch.float32)
        self.branches = [deployed(branch, dtype) for branch, dtype in zip(self.sources, self.dtypes)]

    @property
    def by_time(self) -> bool:
        """Whether costs are times."""
        return self.cost_kind == 'latency' or self.target_ms is not None

    @property
    def part_costs(self) -> Sequence[float]:
        """Milliseconds or MACs of a tile of patch_size: of each branch, then of the classifier."""
        return self.speed.tile_ms if self.by_time else (*self.branch_macs, self.classifier_macs)

    @property
    def costs(self) -> torch.Tensor:
        """Cost of each branch relative to the dearest, of shape (M, )."""
        costs = torch.tensor(self.part_costs[:self.num_classes], dtype=torch.float32)
        return costs / (costs.max() or 1)

    @property
    def speed(self) -> Speed:
        """Measured speed of branches and classifier on this machine."""
        return self.measure_speed() if self.measured is None else self.measured

    def measure_speed(self, fresh: bool = False) -> Speed:
        """Measures branches and classifier, or takes what is known of this network and machine if not `fresh`."""
        if self.measured is None or fresh:
            self._update()
            parts: list[Callable[[torch.Tensor], torch.Tensor]]
            parts = [functools.partial(self._run, i) for i in range(len(self.branches))]
            names = [f'{branch}{dtype}' for branch, dtype in zip(self.branches, self.dtypes)]
            if self.classifier is not None:
                parts.append(self.classifier)
                names.append(str(self.classifier))
            self.measured = measured_speed(parts, names, self.patch_size, self.channels, self.device, fresh)
        return self.measured

    def _max_tiles(self, n: int) -> list[int]:
        """Most tiles per forward pass of each branch, for an image of n tiles."""
        if self.max_tiles is not None:
            return [self.max_tiles] * len(self.sources)
        if n <= FEW_TILES:
            return [DEFAULT_MAX_TILES[self.kind]] * len(self.sources)
        return self.speed.max_tiles[:len(self.sources)]

    @torch.inference_mode()
    def _run(self, branch: int, tiles: torch.Tensor) -> torch.Tensor:
        """Runs a batch of tiles or blocks, of shape (b, c, h, w), through a branch."""
        dtype = self.dtypes[branch]
        with algorithm_search(False):
            with torch.autocast(tiles.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                return cast(torch.Tensor, self.branches[branch](tiles))

    @torch.inference_mode()
    def plan(self,
             image: Rows,
             logits: Optional[torch.Tensor] = None,
             errors: Optional[torch.Tensor] = None) -> TilePlan:
        """Decides the class of every tile of an image, and which run together.

        Args:
            image: The image.
            logits: of shape (n, M), instead of the classifier's; for each tile, as `tiling_of` cuts them.
            errors: of shape (n, M), mean squared error of each tile in each class, in grey levels, instead of what the
                classifier says or predicts.
        """
        self._update()
        tiling = self.tiling_of(image.height, image.width)
        row_bytes = int(4 * (self.channels + 1) * tiling.padded[1] * tiling.size[0] * self.scale**2)
        # by the image alone, not by the device: the same tiles are merged everywhere
        high = 2**max(1, (MERGED_SIDE // self.step).bit_length() - 1)
        merged = high**2 if self.max_tiles is None else min(self.max_tiles, high**2)
        while high > 1 and (high > merged or high * row_bytes > MERGED_BYTES):
            high //= 2
        tile_rows = min(len(tiling.tops), max(1, CANVAS_BYTES[self.kind] // row_bytes // high) * high)
        max_tiles = self._max_tiles(len(tiling))
        classes = torch.zeros(len(tiling), dtype=torch.int64)

        def merge(classes: torch.Tensor) -> Strips:
            return tiling.merge(classes, merged, tile_rows, high)

        if self.classifier is not None:
            mapper = maps_errors(self.classifier)
            if errors is not None and mapper is None:
                # what argmax(log p - lambda c) then maximises is -(error + lambda c), of all pixels of a tile together
                pixels = tiling.class_map(torch.arange(len(tiling))).flatten().bincount()
                logits = -errors * pixels.unsqueeze(1)
            if logits is not None or mapper is None:
                classes = self._classes_by_logits(
                    self._logits(self.classifier, image, tiling) if logits is None else logits.cpu(), tiling, merge)
            else:
                if errors is None:
                    errors = tiling.means(self._error_map(mapper, image), mapper.cell)
                classes = self._classes_by_errors(errors, mapper.price, tiling, merge)
        strips = merge(classes)
        macs = (*self.branch_macs, self.classifier_macs)
        whole = self._whole(tiling, macs)
        cost = self._spent(tiling, strips, macs) / whole if whole else float('nan')
        out_size = self.size_of(image.height, image.width)
        return TilePlan(tiling, classes, strips, tile_rows, max_tiles, cost, out_size)

    def _limit(self, tiling: Tiling) -> float:
        """What may be spent on an image."""
        return self.target_ms or 0. if self.budget is None else self.budget * self._whole(tiling, self.part_costs)

    def _classes_by_errors(self, errors: torch.Tensor, price: float, tiling: Tiling,
                           merge: Callable[[torch.Tensor], Strips]) -> torch.Tensor:
        """Class of each tile: by its errors and what the classes cost, overlap included."""
        grid, parts = errors.nan_to_num().view(len(tiling.tops), len(tiling.lefts), -1), self.part_costs
        border = (1 - self.step / self.patch_size) / 2
        if not self.limited:
            return settled(grid, price * self.costs.double(), border).flatten()
        path = SettledPath(grid, torch.tensor(parts[:self.num_classes]), border)
        return path.within(self._limit(tiling), lambda classes: self._spent(tiling, merge(classes), parts))

    def _classes_by_logits(self, logits: torch.Tensor, tiling: Tiling, merge: Callable[[torch.Tensor],
                                                                                       Strips]) -> torch.Tensor:
        """Class of each tile: the most probable one, or what the budget allows."""
        logits = logits.nan_to_num()
        if not self.limited:
            return logits.argmax(dim=1)
        parts = self.part_costs
        if self.by_time and predicts_errors(self.classifier) is None:  # what is slower than a later one is not chosen
            for i, ms in enumerate(parts[:self.num_classes]):
                if any(later <= ms for later in parts[i + 1:self.num_classes]):
                    logits = logits.index_fill(1, torch.tensor(i), -torch.inf)
        path = RoutingPath(logits, torch.tensor(parts[:self.num_classes]))
        return path.within(self._limit(tiling), lambda classes: self._spent(tiling, merge(classes), parts))

    def _spent(self, tiling: Tiling, strips: Strips, parts: Sequence[float]) -> float:
        """What an image costs, given the costs of branches and classifier for a tile of patch_size."""
        total = parts[-1] * len(tiling) * tiling.size[0] * tiling.size[1]
        for strip in strips:
            for kind, block in strip:
                top, bottom, left, right = tiling.box(block)
                total += parts[kind] * (bottom - top) * (right - left)
        return total / self.patch_size**2

    def _whole(self, tiling: Tiling, parts: Sequence[float]) -> float:
        """What the hardest branch costs on the image without tiles."""
        return parts[self.hardest] * tiling.height * tiling.width / self.patch_size**2

    def _lq_rows(self, image: Rows, tiling: Tiling, first: int, last: int) -> torch.Tensor:
        """What the tile rows from `first` to `last` cover, of shape (c, rows, width), on the device."""
        top, bottom = tiling.tops[first], tiling.tops[last] + tiling.size[0]
        rows = to_device(image.rows(top, min(bottom, image.height)), self.device)
        return pad_to(rows, bottom - top, tiling.padded[1])

    def _logits(self, classifier: nn.Module, image: Rows, tiling: Tiling) -> torch.Tensor:
        """What the classifier says of the tiles, of shape (n, M), on the CPU; of predicted errors, where there is a
        limit, without the costs that their logits count.
        """
        logits, predictor = self._classify(classifier, image, tiling), predicts_errors(classifier)
        return (-predictor.errors(logits) if self.limited and predictor is not None else logits).cpu()

    def _error_map(self, mapper: MapsErrors, image: Rows) -> torch.Tensor:
        """Predicted errors of all cells of an image, of shape (M, rows, columns), on the CPU."""
        parts, cell = [], mapper.cell
        for top in range(0, image.height, MAPPED_ROWS):
            bottom = min(top + MAPPED_ROWS, image.height)
            first, last = max(0, top - mapper.reach), min(bottom + mapper.reach, image.height)
            rows = to_device(image.rows(first, last), self.device).unsqueeze(0)
            with algorithm_search(False):
                errors = mapper.error_map(rows.contiguous(memory_format=torch.channels_last))[0]
            parts.append(errors[:, (top - first) // cell:][:, :-(-(bottom - top) // cell)].cpu())
        return torch.cat(parts, dim=1)

    def _classify(self, classifier: nn.Module, image: Rows, tiling: Tiling) -> torch.Tensor:
        """What the classifier says of the tiles, of shape (n, M)."""
        (height, width), tops, logits = tiling.size, tiling.tops, []
        together = CLASSIFIED_TOGETHER[self.kind]
        tile_rows = max(1, together // len(tiling.lefts))
        for first in range(0, len(tops), tile_rows):
            last = min(first + tile_rows, len(tops)) - 1
            rows = self._lq_rows(image, tiling, first, last)
            starts = [(top - tops[first], left) for top in tops[first:last + 1] for left in tiling.lefts]
            tiles = torch.stack([rows[:, y:y + height, x:x + width] for y, x in starts])
            with algorithm_search(False):
                logits += [
                    classifier(part.contiguous(memory_format=torch.channels_last)) for part in tiles.split(together)
                ]
        return torch.cat(logits)

    @torch.inference_mode()
    def strips(self, image: Rows, plan: TilePlan) -> Iterator[torch.Tensor]:
        tiling = plan.tiling
        canvas: Optional[Canvas] = None
        for number, blocks in enumerate(plan.strips):
            first = number * plan.tile_rows
            lq = self._lq_rows(image, tiling, first, min(first + plan.tile_rows, len(tiling.tops)) - 1)
            for kind, group in batches(blocks, plan.max_tiles):
                for block, output in self._run_blocks(kind, group, lq, tiling.tops[first], tiling):
                    if canvas is None:
                        canvas = Canvas(tiling, int(self.scale), output.shape[0], plan.tile_rows, output.device,
                                        output.is_cuda)
                    canvas.add(block, output)
            assert canvas is not None, 'a strip has blocks'
            yield canvas.finished()
            if number + 1 < len(plan.strips):
                canvas.advance()

    def _run_blocks(self, kind: int, blocks: list[Block], lq: torch.Tensor, top: int,
                    tiling: Tiling) -> Iterator[tuple[Block, torch.Tensor]]:
        """Runs blocks of one size through a branch; in halves, if memory does not suffice.

        Args:
            kind: The branch.
            blocks: Blocks of one size.
            lq: Rows of the image, of shape (c, rows, w).
            top: The first of these rows.
            tiling: The tiles.
        """
        count = len(blocks) * blocks[0].tiles
        if count <= (self.max_tiles or count):
            boxes = [tiling.box(block) for block in blocks]
            try:
                outputs = self._run_boxes(kind, [(y0 - top, y1 - top, x0, x1) for y0, y1, x0, x1 in boxes], lq)
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
            else:
                yield from zip(blocks, outputs.unbind(0))
                return
            self._save_memory(count // 2)  # not above, where the error still holds what the pass had allocated
        halves = [blocks[:len(blocks) // 2], blocks[len(blocks) // 2:]] if len(blocks) > 1 else blocks[0].halves()
        for half in halves:
            yield from self._run_blocks(kind, half, lq, top, tiling)

    def _run_boxes(self, kind: int, boxes: list[tuple[int, int, int, int]], lq: torch.Tensor) -> torch.Tensor:
        """Runs parts of an image of one size through a branch; a box has top, bottom, left and right."""
        tiles = torch.stack([lq[:, top:bottom, left:right] for top, bottom, left, right in boxes])
        return self._run(kind, tiles.contiguous(memory_format=torch.channels_last))


def batches(blocks: list[tuple[int, Block]], max_tiles: list[int]) -> Iterator[tuple[int, list[Block]]]:
    """Blocks of one class and size, as many as fit into a forward pass, always a power of two of them."""
    groups: dict[tuple[int, int, int], list[Block]] = {}
    for kind, block in blocks:
        groups.setdefault((kind, block.rows, block.columns), []).append(block)
    for (kind, rows, columns), group in groups.items():
        batch = 1
        while 2 * batch * rows * columns <= max_tiles[kind]:
            batch *= 2
        while group:
            while batch > len(group):
                batch //= 2
            yield kind, group[:batch]
            group = group[batch:]
