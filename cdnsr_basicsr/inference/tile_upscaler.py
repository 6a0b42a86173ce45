"""Upscaling a whole image tile by tile, each tile by the branch that its difficulty asks for."""
from __future__ import annotations

import functools
import itertools
import math
import torch
from contextlib import contextmanager
from torch import nn
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, cast

from ..complexity import count_macs
from ..memory import MemoryLimit
from .budget import RoutingPath, SettledPath, settled, turning_price
from .network import (
    PRECISIONS,
    MapsErrors,
    PredictsErrors,
    arch_of,
    branches_of,
    common_geometry,
    deployed,
    maps_errors,
    precision_of,
    predicts_errors,
    reference_of,
    routed,
)
from .speed import MAX_TILES, Speed, is_out_of_memory, measured_speed
from .tiling import (
    LEAST_SIZE,
    OVERLAP,
    PATCH_SIZE,
    Block,
    Canvas,
    Rows,
    Tiling,
    pad_to,
    parts_within,
    shared_out,
    to_device,
)
from .upscaler import Upscaler, algorithm_search, say

CANVAS_BYTES = {'cpu': 2**26, 'cuda': 2**29}  # of the strip that is being blended: bounds memory, and tiles per pass
MERGED_BYTES = 2**26  # of the rows of tiles, upscaled, that are merged up and down
CLASSIFIED_TOGETHER = {'cpu': 32, 'cuda': 512}  # tiles
FEW_TILES, DEFAULT_MAX_TILES = 32, {'cpu': 4, 'cuda': 32}  # an image of few is done before a measurement would be
MERGED_SIDE = 256  # pixels of a block of merged tiles, about; not measured: an image is the same on every machine
MAPPED_ROWS = 512  # of an image whose errors are predicted at once
AROUND = 32  # pixels added on each side of a part of a block: the shipped networks see no further
TRIED_SIDE = 32  # of a tile that measures how much memory a larger one takes
LOWEST_PRICE, HIGHEST_PRICE = 1e-5, 1e9  # squared error per cost of the most expensive branch: more no tile can save

Strips = list[list[tuple[int, Block]]]  # for each strip of an image its blocks of tiles and their classes


class Look(NamedTuple):
    """The predictions for an image from which its routing is decided.

    Attributes:
        tiling: The tiles.
        tile_rows: Tile rows of a strip.
        merge: Makes of the classes of all tiles what is run.
        pass_bytes: What a forward pass may take; infinite without a limit of memory.
        errors: Predicted errors of the tiles, of shape (rows, columns, M); empty where they are not asked for.
        weight: What a squared error of the image counts, per pixel, beside those of other images.
    """
    tiling: Tiling
    tile_rows: int
    merge: Callable[[torch.Tensor], Strips]
    pass_bytes: float
    errors: torch.Tensor
    weight: float = 1.


class Prediction(NamedTuple):
    """What the classifier says of an image: all that has to be computed before its classes are decided.

    Attributes:
        logits: of shape (n, M), on the CPU; None of a classifier that maps errors.
        errors: Predicted errors of the tiles, of shape (n, M), on the CPU; None if the classifier predicts none.
    """
    logits: Optional[torch.Tensor]
    errors: Optional[torch.Tensor]


class TilePlan(NamedTuple):
    """What will be run on an image.

    Attributes:
        tiling: The tiles.
        classes: of shape (n, ), class of each tile, on CPU.
        strips: What is run.
        tile_rows: Tile rows of a strip.
        max_tiles: Most tiles per forward pass of each branch.
        max_pixels: Most pixels of a block, likewise; larger ones are run in parts, where memory is limited.
        cost: MACs to be spent, classifier and tile overlap included, relative to the hardest branch on the whole image.
        out_size: Height and width of the result.
    """
    tiling: Tiling
    classes: torch.Tensor
    strips: Strips
    tile_rows: int
    max_tiles: list[int]
    max_pixels: list[float]
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
        """Class of each LR pixel, of shape (h, w), uint8."""
        return self.tiling.class_map(self.classes.to(torch.uint8))

    def in_lower_strips(self) -> Optional[TilePlan]:
        """The same blocks in strips of about half as many tile rows; None if blocks are as high as strips."""
        high = max(block.rows for strip in self.strips for _, block in strip)
        tile_rows = max(1, self.tile_rows // 2 // high) * high
        if tile_rows >= self.tile_rows:
            return None
        strips: Strips = [[] for _ in range(-(-len(self.tiling.tops) // tile_rows))]
        for kind, block in itertools.chain(*self.strips):
            strips[block.row // tile_rows].append((kind, block))
        return self._replace(strips=strips, tile_rows=tile_rows)


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
        max_loss: PSNR that an image may lose against the hardest branch alone, in dB, as predicted; of a classifier
            that predicts errors. No more is spent than that needs.
        fidelity: PSNR relative to the hardest branch's image that an image has to have, in dB, likewise; of a
            classifier whose errors are relative to that image.
        cost: 'macs' | 'latency': what a budget, or the price of a predicted error, counts. Default: time where branches
            are of different archs, else MACs.
        precision: 'float32' | 'bfloat16' | 'float16': of the branches. The classifier always runs in float32.
        float32_branches: Branches that keep float32.
        max_tiles: Most tiles per forward pass. Default: the fastest number by a short measurement, which is kept for
            each network and machine.

    Attributes:
        multiple: What the sides of tiles must be multiples of.
        reference: What the errors that the classifier predicts are relative to; see `reference_of`.
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
                 max_loss: Optional[float] = None,
                 fidelity: Optional[float] = None,
                 cost: Optional[str] = None,
                 precision: str = 'float32',
                 float32_branches: Sequence[int] = (),
                 max_tiles: Optional[int] = None) -> None:
        if cost not in (None, 'macs', 'latency'):
            raise ValueError(f"Expected cost 'macs' or 'latency', but got {cost!r}.")
        self.sources = branches_of(net)
        scale, channels, self.multiple = common_geometry(self.sources)
        tiles = routed(net)
        self.routed = tiles is not None
        patch_size = -(-patch_size // self.multiple) * self.multiple
        step = max(1, patch_size - (OVERLAP if self.routed else 8)) if step is None else step
        kept = ['float32' if i in float32_branches else precision for i in range(len(self.sources))]
        found = [precision_of(branch, kind) for branch, kind in zip(self.sources, kept)]
        for branch in dict.fromkeys(arch_of(b) for b, kind, can in zip(self.sources, kept, found) if kind != can):
            say(f'{branch} cannot run in {precision}; it runs in float32.')
        dtypes = [PRECISIONS[kind] for kind in found]
        super().__init__(net, scale, channels, patch_size, step, budget, dtypes, max_tiles)
        self.num_classes = len(self.sources)
        alike = len({arch_of(branch) for branch in self.sources}) == 1
        self.price: Optional[float] = None  # of all images together, once it is known
        self.weigh = 'pixels'
        self.cost_kind = cost or ('macs' if alike else 'latency')
        self.hardest = self.num_classes - 1
        self.reference = None if tiles is None else reference_of(tiles.classifier)
        self.predicts = self.reference is not None
        self.classifier_macs = 0
        if tiles is not None:
            try:
                self.classifier_macs = count_macs(tiles.classifier, patch_size, patch_size, channels)
            except RuntimeError as error:
                text = f'the classifier does not accept images of {channels} channel{"s" * (channels != 1)}: {error}'
                raise ValueError(text) from error
        self.branch_macs = [count_macs(branch, patch_size, patch_size, channels) for branch in self.sources]
        self._take_limits(budget, target_ms, max_loss, fidelity)

    def _take_limits(self,
                     budget: Optional[float] = None,
                     target_ms: Optional[float] = None,
                     max_loss: Optional[float] = None,
                     fidelity: Optional[float] = None) -> None:
        if sum(limit is not None for limit in (budget, target_ms, max_loss, fidelity)) > 1:
            raise ValueError('Expected at most one of budget, target_ms, max_loss and fidelity.')
        if self.routed:
            check_limits(max_loss, fidelity, self.reference)
        if budget is not None and self.cost_kind == 'macs' and self.branch_macs[self.hardest] == 0:
            raise ValueError('the branches have no multiply-accumulates to count; use cost latency')
        self.budget, self.target_ms, self.max_loss, self.fidelity = budget, target_ms, max_loss, fidelity

    def take_hardest(self, branch: int) -> None:
        """Takes a branch that was found to leave the least error for the hardest; not where errors are relative to the
        image of the last one."""
        if self.reference != 'hardest':
            self.hardest = branch

    @property
    def margin(self) -> float:
        """True errors, or losses of PSNR, relative to those that the classifier predicts; see ErrorMap."""
        tiles = routed(self.net)
        return float(getattr(tiles.classifier, 'margin', 1.)) if tiles is not None else 1.

    @property
    def limited(self) -> bool:
        """Whether there is a limit to what may be spent."""
        limits = (self.budget, self.target_ms, self.max_loss, self.fidelity)
        return any(limit is not None for limit in limits)

    @property
    def shares_price(self) -> bool:
        return self.limited and self.predicts

    @property
    def limited_by_errors(self) -> bool:
        """Whether that is a limit to errors, which as little as possible is spent to keep to."""
        return self.max_loss is not None or self.fidelity is not None

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
        self.bytes_per_pixel: list[float] = []

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
        """Cost of each branch relative to the most expensive, of shape (M, )."""
        costs = torch.tensor(self.part_costs[:self.num_classes], dtype=torch.float32)
        return costs / (costs.max() or 1)

    @property
    def speed(self) -> Speed:
        """Measured speed of branches and classifier on this machine."""
        return self.measure_speed() if self.measured is None else self.measured

    def measure_speed(self, fresh: bool = False) -> Speed:
        """Speed of branches and classifier: measured if `fresh`, otherwise from the cache if it is known."""
        if self.measured is None or fresh:
            self._update()
            parts = self._parts()
            names = [f'{branch}{dtype}' for branch, dtype in zip(self.branches, self.dtypes)]
            names += [] if self.classifier is None else [str(self.classifier)]
            most = None
            if self.memory_limit is not None:
                self._take_bytes(self.memory_limit)
                free, tile = self.memory_limit.free(), self.patch_size**2
                most = [int(free / size / tile) for size in self.bytes_per_pixel]
                if not min(most):
                    raise self.memory_limit.short_of(
                        int(max(self.bytes_per_pixel) * tile), 'a tile, whose time is measured')
            self.measured = measured_speed(parts, names, self.patch_size, self.channels, self.device, fresh, most)
        return self.measured

    def _parts(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """What computes on tiles: the branches, and the classifier if there is one."""
        parts: list[Callable[[torch.Tensor], torch.Tensor]]
        parts = [functools.partial(self.run, i) for i in range(len(self.branches))]
        return parts if self.classifier is None else [*parts, self.classifier]

    def _max_tiles(self, n: int, most: list[float]) -> list[int]:
        """Most tiles per forward pass of each branch, for an image of n tiles.

        Args:
            n: Tiles.
            most: How many of them there is memory for.
        """
        if self.max_tiles is not None:
            usual = [self.max_tiles] * len(self.sources)
        elif n <= FEW_TILES or max(most) < 2:
            usual = [DEFAULT_MAX_TILES[self.kind]] * len(self.sources)
        else:
            usual = self.speed.max_tiles[:len(self.sources)]
        return [max(1, int(min(pair))) for pair in zip(usual, most)]

    @torch.inference_mode()
    def _take_bytes(self, memory_limit: MemoryLimit) -> None:
        """Measures what a pixel of a tile takes in a forward pass of each branch, and of the classifier."""
        if self.bytes_per_pixel:
            return
        mapper, found = maps_errors(self.classifier), []
        # the tile as it is cut out, channels last, and what is blended by a product
        copies = 8 * self.channels + 4 * self.scale**2 * (self.kind == 'cuda')
        for part in self._parts():
            if mapper is not None and part is self.classifier:
                part = mapper.error_map
            size = 0.
            for side in (-(-TRIED_SIDE // self.multiple) * self.multiple, self.patch_size):
                if size * side**2 > memory_limit.free():
                    break
                tiles = torch.rand(1, self.channels, side, side, device=self.device)
                size = memory_limit.growth(lambda: part(tiles.to(memory_format=torch.channels_last))) / side**2 + copies
            found.append(size)
        self.bytes_per_pixel = found

    @property
    def around(self) -> int:
        """Pixels that a part of a block is run with on each side."""
        return -(-AROUND // self.multiple) * self.multiple

    def _least_side(self) -> int:
        """Side of the smallest part that a tile or block can be run in."""
        return -(-LEAST_SIZE // self.multiple) * self.multiple + 2 * self.around

    def _least_bytes(self) -> int:
        assert self.memory_limit is not None
        self._take_bytes(self.memory_limit)
        side = min(self._least_side(), self.patch_size)
        return int(max(self.bytes_per_pixel) * side**2)

    @torch.inference_mode()
    def run(self, branch: int, tiles: torch.Tensor) -> torch.Tensor:
        """Runs a batch of tiles or blocks, of shape (b, c, h, w), through a branch."""
        dtype = self.dtypes[branch]
        with algorithm_search(False):
            with torch.autocast(tiles.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                return cast(torch.Tensor, self.branches[branch](tiles))

    @torch.inference_mode()
    def predict(self, image: Rows) -> Prediction:
        """Runs the classifier, so that `plan` can decide under one limit after the other at once."""
        self._update()
        tiling = self.tiling_of(image.height, image.width)
        mapper, predictor = maps_errors(self.classifier), predicts_errors(self.classifier)
        if self.classifier is None or mapper is not None:
            return Prediction(None, None if mapper is None else self._errors(image, tiling))
        logits = self._classify(self.classifier, image, tiling)
        if predictor is None:
            return Prediction(logits.cpu(), None)
        return Prediction(*torch.stack([logits, predictor.errors(logits)]).cpu())  # one copy, for one wait

    @torch.inference_mode()
    def plan(self,
             image: Rows,
             logits: Optional[torch.Tensor] = None,
             errors: Optional[torch.Tensor] = None,
             prediction: Optional[Prediction] = None) -> TilePlan:
        """Decides the class of every tile of an image, and which run together.

        Args:
            image: The image.
            logits: of shape (n, M), instead of the classifier's; for each tile, as `tiling_of` cuts them.
            errors: of shape (n, M), mean squared error of each tile in each class, in grey levels, instead of what the
                classifier says or predicts.
            prediction: What `predict` has said of the image. Default: the classifier is run here.
        """
        self._update()
        mapped = maps_errors(self.classifier) is not None
        by_errors = errors is not None or logits is None and self.predicts and (mapped or self.limited)
        if prediction is not None:
            logits, errors = (None, prediction.errors) if by_errors else (prediction.logits, None)
        look = self._look(image, by_errors, errors)
        tiling = look.tiling
        max_pixels = [look.pass_bytes / size
                      for size in self.bytes_per_pixel[:self.num_classes]] or [math.inf] * self.num_classes
        max_tiles = self._max_tiles(len(tiling), [most / math.prod(tiling.size) for most in max_pixels])
        if self.classifier is None:
            classes = torch.zeros(len(tiling), dtype=torch.int64)
        elif by_errors:
            classes = self._classes_by_errors(look)
        else:
            logits = self._classify(self.classifier, image, tiling) if logits is None else logits
            classes = self._classes_by_logits(logits.cpu(), look)
        strips = look.merge(classes)
        macs = (*self.branch_macs, self.classifier_macs)
        whole = self._whole(tiling, macs)
        cost = self._spent(tiling, strips, macs) / whole if whole else float('nan')
        return TilePlan(tiling, classes, strips, look.tile_rows, max_tiles, max_pixels, cost,
                        self.size_of(tiling.height, tiling.width))

    @torch.inference_mode()
    def _look(self, image: Rows, by_errors: bool, errors: Optional[torch.Tensor] = None) -> Look:
        """Cuts an image and, if its classes are a matter of errors and these are not known, predicts them."""
        tiling = self.tiling_of(image.height, image.width)
        row_bytes = self._row_bytes(tiling)
        # by the image alone, not by the device: the same tiles are merged everywhere
        high = 2**max(1, (MERGED_SIDE // self.step).bit_length() - 1)
        merged = high**2 if self.max_tiles is None else min(self.max_tiles, high**2)
        while high > 1 and (high > merged or high * row_bytes > MERGED_BYTES):
            high //= 2
        canvas_bytes = min(CANVAS_BYTES[self.kind], self.known_to_fit.get('canvas', CANVAS_BYTES[self.kind]))
        tile_rows = min(len(tiling.tops), max(1, canvas_bytes // row_bytes // high) * high)
        pass_bytes = math.inf
        if self.memory_limit is not None:
            tile_rows, pass_bytes = self._within(self.memory_limit, tiling, high, tile_rows, merged)

        def merge(classes: torch.Tensor) -> Strips:
            return tiling.merge(classes, merged, tile_rows, high)

        if not by_errors:
            return Look(tiling, tile_rows, merge, pass_bytes, torch.empty(0))
        errors = self._errors(image, tiling) if errors is None else errors
        errors, weight = errors.double().nan_to_num(), 1.
        if self.weigh == 'pictures':  # decibels of an image grow with what it loses of its own error
            weight = 1e6 / max(float(errors[:, self.hardest].mean()), 1e-3) / (tiling.height * tiling.width)
        grid = errors.view(len(tiling.tops), len(tiling.lefts), -1)
        return Look(tiling, tile_rows, merge, pass_bytes, grid, weight)

    def _within(self, memory_limit: MemoryLimit, tiling: Tiling, high: int, usual_rows: int,
                merged: int) -> tuple[int, int]:
        """Tile rows of a strip, and bytes of a forward pass, that stay below a limit of memory.

        Args:
            memory_limit: The limit.
            tiling: The tiles.
            high: Tile rows of the highest block.
            usual_rows: Tile rows of a strip without a limit.
            merged: Tiles of the largest block.

        Raises:
            ShortOfMemory: There are none.
        """
        self._take_bytes(memory_limit)
        (height, width), per_pixel = tiling.size, max(self.bytes_per_pixel)
        # the largest block, of a strip the rows as the image gives them, and padded
        block = [min(count, high) * side for count, side in zip((len(tiling.tops), len(tiling.lefts)), tiling.size)]
        put_together = int(4 * self.channels * math.prod(block) * self.scale**2)

        def strip(rows: int) -> int:
            lq = 8 * self.channels * (tiling.tops[rows - 1] + height) * tiling.padded[1]
            return put_together + lq + Canvas.bytes_of(tiling, int(self.scale), self.channels, rows, self.kind
                                                       == 'cuda')

        least = per_pixel * math.prod(min(side, self._least_side()) for side in block)
        wanted = per_pixel * max(merged, MAX_TILES[self.kind][-1]) * height * width
        rows = [*range(high, usual_rows, high), usual_rows]
        found = shared_out(memory_limit.free(), strip, rows, int(least), int(wanted))
        if found is None:
            raise memory_limit.short_of(strip(rows[0]) + int(least), 'a strip of tiles')
        return found

    def _row_bytes(self, tiling: Tiling) -> int:
        """Bytes of a row of tiles on the canvas."""
        return int(4 * (self.channels + 1) * tiling.padded[1] * tiling.size[0] * self.scale**2)

    def _errors(self, image: Rows, tiling: Tiling) -> torch.Tensor:
        """Predicted errors of the tiles, of shape (n, M), on the CPU."""
        mapper = maps_errors(self.classifier)
        if mapper is not None:
            return tiling.means(self._error_map(mapper, image), mapper.cell)
        classifier = cast(nn.Module, self.classifier)
        return cast(PredictsErrors, classifier).errors(self._classify(classifier, image, tiling)).cpu()

    @property
    def border(self) -> float:
        """Share of a tile's cost that each side costs whose neighbour is of another class."""
        # what maps errors decides in cells, whose overlap is nothing but that; tiles overlap anyway
        return 0. if maps_errors(self.classifier) is None else (1 - self.step / self.patch_size) / 2

    def _limit(self, tiling: Tiling) -> float:
        """What may be spent on an image."""
        return self.target_ms or 0. if self.budget is None else self.budget * self._whole(tiling, self.part_costs)

    def _classes_by_errors(self, look: Look) -> torch.Tensor:
        """Class of each tile: by its predicted errors and what the classes cost, overlap included."""
        price = self.price
        if price is None and self.limited_by_errors:
            price = self._common_price([look])
        if price is None and self.limited:
            costs, border = torch.tensor(self.part_costs[:self.num_classes]), self.border
            path = SettledPath(look.errors, costs, border) if border else RoutingPath(-look.errors.flatten(0, 1), costs)
            return path.within(self._limit(look.tiling), lambda classes: self._cost(look, classes))
        price = cast(PredictsErrors, self.classifier).price if price is None else price
        return self._at(price, look)

    def _at(self, price: float, look: Look) -> torch.Tensor:
        """Class of each tile at a price."""
        return settled(look.errors, price / look.weight * self.costs.double(), self.border).flatten()

    @contextmanager
    def together(self,
                 images: Iterable[Rows],
                 weigh: str = 'pixels',
                 errors: Optional[Sequence[torch.Tensor]] = None) -> Iterator[None]:
        """See Upscaler.

        Args:
            images, weigh: See there.
            errors: Of the tiles of each image, instead of the predicted ones; see `plan`.
        """
        if not self.shares_price:
            yield
            return
        self.weigh = weigh
        self.fix_price(self._common_price(self.looks_of(images, errors)), weigh)
        try:
            yield
        finally:
            self.fix_price(None)

    def fix_price(self, price: Optional[float], weigh: str = 'pixels') -> None:
        """Takes a price for all further images, as `together` finds one; None: each keeps to a limit by itself."""
        self.exact, self.price, self.weigh = None, price, weigh  # a copy of this has no price yet

    def _common_price(self, looks: Sequence[Look]) -> float:
        """The price at which images together keep to the limit, and lose or cost no more than that needs."""
        return self.price_within(self.limit_of(looks), lambda price: self.sum_at(price, looks))

    def looks_of(self, images: Iterable[Rows], errors: Optional[Iterable[torch.Tensor]] = None) -> list[Look]:
        """What is to be decided of images, for `limit_of` and `sum_at`; those of known errors need no rows."""
        self._update()
        known: Iterable[Optional[torch.Tensor]] = itertools.repeat(None) if errors is None else errors
        return [self._look(image, True, errors_of) for image, errors_of in zip(images, known)]

    def limit_of(self, looks: Sequence[Look]) -> float:
        """What images may cost, or lose, together: the sum of what parts of them may."""
        if not self.limited_by_errors:
            return sum(self._limit(look.tiling) for look in looks)
        if self.max_loss is not None:
            least = sum(_share(look) * float(_flat(look)[:, self.hardest].sum()) for look in looks)
            return least * 10**(self.max_loss / self.margin / 10)
        return sum(_share(look) * len(look.tiling) for look in looks) * square_of(self.fidelity) / self.margin

    def sum_at(self, price: float, looks: Sequence[Look]) -> float:
        """What images cost, or lose, together at a price."""
        if not self.limited_by_errors:
            return sum(self._cost(look, self._at(price, look)) for look in looks)
        return sum(_share(look) * float(_flat(look).gather(1, self._at(price, look)[:, None]).sum()) for look in looks)

    def price_within(self, limit: float, sum_at: Callable[[float], float]) -> float:
        """The price at which a sum keeps to a limit as closely as it can."""
        if self.limited_by_errors:
            return turning_price(lambda price: sum_at(price) <= limit, LOWEST_PRICE, HIGHEST_PRICE)[0]
        return turning_price(lambda price: sum_at(price) > limit, LOWEST_PRICE, HIGHEST_PRICE)[1]

    def _cost(self, look: Look, classes: torch.Tensor) -> float:
        """What an image costs, in the unit of part_costs."""
        return self._spent(look.tiling, look.merge(classes), self.part_costs)

    def _classes_by_logits(self, logits: torch.Tensor, look: Look) -> torch.Tensor:
        """Class of each tile: the most probable one, or what the budget allows."""
        logits = logits.nan_to_num()
        if not self.limited:
            return logits.argmax(dim=1)
        parts = self.part_costs
        if self.by_time and not self.predicts:  # what is slower than a later one is not chosen
            for i, ms in enumerate(parts[:self.num_classes]):
                if any(later <= ms for later in parts[i + 1:self.num_classes]):
                    logits = logits.index_fill(1, torch.tensor(i), -torch.inf)
        path = RoutingPath(logits, torch.tensor(parts[:self.num_classes]))
        return path.within(self._limit(look.tiling), lambda classes: self._cost(look, classes))

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

    def milliseconds(self, plan: TilePlan) -> tuple[float, float]:
        """How long a plan takes, and the hardest branch on the image without tiles, by the measured speed of the parts:
        an estimate."""
        parts = self.speed.tile_ms
        return self._spent(plan.tiling, plan.strips, parts), self._whole(plan.tiling, parts)

    def decibels(self, plan: TilePlan, errors: torch.Tensor) -> float:
        """The `max_loss` that leads to a plan or, if errors are relative to the hardest branch's image, the `fidelity`.

        Args:
            plan: The plan.
            errors: Predicted errors of the tiles, of shape (n, M).
        """
        errors = errors.double().nan_to_num().clamp(min=0)
        taken = float(errors.gather(1, plan.classes[:, None]).mean())
        reference = 255**2 if self.reference == 'hardest' else float(errors[:, self.hardest].mean())
        if self.reference == 'hardest':
            return 10 * math.log10(reference / max(taken * self.margin, 1e-9))
        return self.margin * 10 * math.log10(max(taken, 1e-9) / max(reference, 1e-9))

    def _lq_rows(self, image: Rows, tiling: Tiling, first: int, last: int) -> torch.Tensor:
        """What the tile rows from `first` to `last` cover, of shape (c, rows, width), on the device."""
        top, bottom = tiling.tops[first], tiling.tops[last] + tiling.size[0]
        rows = to_device(image.rows(top, min(bottom, image.height)), self.device)
        return pad_to(rows, bottom - top, tiling.padded[1])

    def _error_map(self, mapper: MapsErrors, image: Rows) -> torch.Tensor:
        """Predicted errors of all cells of an image, of shape (M, rows, columns), on the CPU."""
        cell, most, row = mapper.cell, MAPPED_ROWS, 0.
        if self.memory_limit is not None:
            self._take_bytes(self.memory_limit)
            # of the image itself, too: as it comes, and on the device
            row = (self.bytes_per_pixel[-1] + 8 * self.channels) * image.width
            rows = int(self.memory_limit.free() / row) - 2 * mapper.reach
            if rows < cell:
                raise self.memory_limit.short_of(int(row * (cell + 2 * mapper.reach)), 'the router')
            most = min(most, rows // cell * cell)

        def errors_of(top: int, bottom: int) -> torch.Tensor:
            first, last = max(0, top - mapper.reach), min(bottom + mapper.reach, image.height)
            self._ask_for(row * (last - first), 'the router')
            rows = to_device(image.rows(first, last), self.device).unsqueeze(0)
            with algorithm_search(False):
                errors = mapper.error_map(rows.contiguous(memory_format=torch.channels_last))[0]
            return errors[:, (top - first) // cell:][:, :-(-(bottom - top) // cell)]

        return torch.cat(list(self._in_parts('rows mapped', errors_of, image.height, most, cell)), dim=1).cpu()

    def _classify(self, classifier: nn.Module, image: Rows, tiling: Tiling) -> torch.Tensor:
        """What the classifier says of the tiles, of shape (n, M)."""
        (height, width), tops, columns = tiling.size, tiling.tops, len(tiling.lefts)
        tile = row = 0.

        def logits_of(first: int, last: int) -> torch.Tensor:
            self._ask_for(row + tile * (last - first), 'the router')  # what was freed is seldom taken again as a whole
            rows = self._lq_rows(image, tiling, first // columns, (last - 1) // columns)
            places = [divmod(number, columns) for number in range(first, last)]
            starts = [(tops[row] - tops[first // columns], tiling.lefts[column]) for row, column in places]
            tiles = torch.stack([rows[:, y:y + height, x:x + width] for y, x in starts])
            with algorithm_search(False):
                return cast(torch.Tensor, classifier(tiles.contiguous(memory_format=torch.channels_last)))

        together = CLASSIFIED_TOGETHER[self.kind]
        if self.memory_limit is not None:
            self._take_bytes(self.memory_limit)
            tile, row = self.bytes_per_pixel[-1] * height * width, 8 * self.channels * height * tiling.padded[1]
            together = max(1, min(together, int((self.memory_limit.free() - row) / tile)))
        most = together // columns * columns or together  # whole rows, if they are not too long
        return torch.cat(list(self._in_parts('tiles classified', logits_of, len(tiling), most)))

    @torch.inference_mode()
    def strips(self, image: Rows, plan: TilePlan) -> Iterator[torch.Tensor]:
        while True:
            strips = self._strips(image, plan)
            try:
                first = next(strips)
                break
            except RuntimeError as error:
                lower = plan.in_lower_strips() if is_out_of_memory(error) else None
                if lower is None:
                    raise
            plan = lower  # not above, where the error still holds the canvas
            self.known_to_fit['canvas'] = plan.tile_rows * self._row_bytes(plan.tiling)
            self._give_memory_back()
        yield first
        yield from strips

    def _strips(self, image: Rows, plan: TilePlan) -> Iterator[torch.Tensor]:
        tiling, done = plan.tiling, 0
        canvas: Optional[Canvas] = None
        if self.memory_limit is not None:
            self.memory_limit.trim()  # the canvas is larger than anything that the router has freed
        for number, blocks in enumerate(plan.strips):
            first = number * plan.tile_rows
            lq = self._lq_rows(image, tiling, first, min(first + plan.tile_rows, len(tiling.tops)) - 1)
            for kind, group in batches(blocks, plan.max_tiles):
                most = plan.max_pixels[kind]
                for block, output in self._run_blocks(kind, group, lq, tiling.tops[first], tiling, most):
                    if canvas is None:
                        canvas = Canvas(tiling, int(self.scale), output.shape[0], plan.tile_rows, output.device,
                                        output.is_cuda)
                    canvas.add(block, output)
                    del output  # not beside those of the next pass
                done += sum(block.tiles for block in group)
                self.watch(done / len(tiling))
            assert canvas is not None, 'a strip has blocks'
            yield canvas.finished()
            if number + 1 < len(plan.strips):
                canvas.advance()

    def _run_blocks(self, kind: int, blocks: list[Block], lq: torch.Tensor, top: int, tiling: Tiling,
                    most: float) -> Iterator[tuple[Block, torch.Tensor]]:
        """Runs blocks of one size through a branch; in halves, if memory does not suffice.

        Args:
            kind: The branch.
            blocks: Blocks of one size.
            lq: Rows of the image, of shape (c, rows, w).
            top: The first of these rows.
            tiling: The tiles.
            most: Pixels of a block that is not run in parts.
        """
        count = len(blocks) * blocks[0].tiles
        if count <= (self.max_tiles or count):
            boxes = [tiling.box(block) for block in blocks]
            try:
                boxes = [(y0 - top, y1 - top, x0, x1) for y0, y1, x0, x1 in boxes]
                if len(boxes) == 1 and tiling.area(blocks[0]) > most:
                    outputs = self._run_in_parts(kind, boxes[0], lq, most)
                else:
                    outputs = self._run_boxes(kind, boxes, lq)
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
            else:
                yield from zip(blocks, outputs.unbind(0))
                return
            self._save_memory(count // 2)  # not above, where the error still holds what the pass had allocated
        halves = [blocks[:len(blocks) // 2], blocks[len(blocks) // 2:]] if len(blocks) > 1 else blocks[0].halves()
        for half in halves:
            yield from self._run_blocks(kind, half, lq, top, tiling, most)

    def _run_boxes(self, kind: int, boxes: list[tuple[int, int, int, int]], lq: torch.Tensor) -> torch.Tensor:
        """Runs parts of an image of one size through a branch; a box has top, bottom, left and right."""
        if self.memory_limit is not None:
            top, bottom, left, right = boxes[0]
            self._ask_for(self.bytes_per_pixel[kind] * len(boxes) * (bottom - top) * (right - left), 'tiles')
        tiles = torch.stack([lq[:, top:bottom, left:right] for top, bottom, left, right in boxes])
        return self.run(kind, tiles.contiguous(memory_format=torch.channels_last))

    def _run_in_parts(self, kind: int, box: tuple[int, int, int, int], lq: torch.Tensor, most: float) -> torch.Tensor:
        """As `_run_boxes` with one box, in parts of at most so many pixels. Each sees what is around it in the box, so
        that the result is the same up to rounding, if the branch sees no further."""
        top, bottom, left, right = box
        down, across = parts_within(bottom - top, right - left, most, self.around, self.multiple)
        whole, scale = torch.empty(0), int(self.scale)
        for y, x in itertools.product(down, across):
            part = self._run_boxes(kind, [(top + y.first, top + y.last, left + x.first, left + x.last)], lq)
            if not len(whole):
                whole = part.new_empty(1, part.shape[1], (bottom - top) * scale, (right - left) * scale)
            whole[:, :, y.start * scale:y.end * scale,
                  x.start * scale:x.end * scale] = part[:, :, (y.start - y.first) * scale:(y.end - y.first) * scale,
                                                        (x.start - x.first) * scale:(x.end - x.first) * scale]
            del part
        return whole


def _share(look: Look) -> float:
    """What a squared error of a tile counts."""
    return look.weight * look.tiling.height * look.tiling.width / len(look.tiling)


def _flat(look: Look) -> torch.Tensor:
    """Predicted errors of the tiles, of shape (n, M)."""
    return look.errors.flatten(0, 1).clamp(min=0)


def square_of(psnr: Optional[float]) -> float:
    """The mean squared error in grey levels of a PSNR in dB."""
    return 255**2 / 10**((psnr or 0.) / 10)


def check_limits(max_loss: Optional[float], fidelity: Optional[float], reference: Optional[str]) -> None:
    """Refuses limits to errors that a classifier does not predict; see `reference_of`.

    Raises:
        ValueError: With what is needed.
    """
    if max_loss is not None and reference is None:
        raise ValueError(f'max_loss={max_loss:g} needs a classifier that predicts errors, ErrorMap or ErrorPredictor')
    if max_loss is not None and reference == 'hardest':
        raise ValueError(f'max_loss={max_loss:g} needs a router of errors relative to the ground truth; this one '
                         "predicts errors relative to the hardest branch's image, which fidelity limits")
    if fidelity is not None and reference != 'hardest':
        raise ValueError(f'fidelity={fidelity:g} needs a router of errors relative to the hardest branch\'s image, '
                         'which basicsr route makes with --reference hardest')


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
