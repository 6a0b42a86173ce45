"""Upscaling a whole image tile by tile, each tile by the branch that its difficulty asks for."""
from __future__ import annotations

import copy
import itertools
import logging
import math
import time
import torch
from contextlib import contextmanager, suppress
from torch import nn
from typing import Callable, Iterator, NamedTuple, Optional, Protocol, Sequence

from ..complexity import count_macs
from .budget import RoutingPath, predicted_quality
from .speed import Speed, is_out_of_memory, kind_of, measured_speed
from .tiling import LEAST_SIZE, PATCH_SIZE, Block, Canvas, Tiling, pad_to

PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
CANVAS_BYTES = {'cpu': 2**26, 'cuda': 2**29}  # of the strip that is being blended: bounds memory, and tiles per pass
CLASSIFIED_TOGETHER = {'cpu': 32, 'cuda': 512}  # tiles
FEW_TILES, DEFAULT_MAX_TILES = 32, {'cpu': 4, 'cuda': 32}  # an image of few is done before a measurement would be
MOST_MULTIPLE = 128  # of the sides of images that is looked for
MERGED_TILES = 4  # of a block; not measured, so that an image comes out the same on every machine


class Rows(Protocol):
    """An image that hands out its rows; it need not be in memory as a whole."""
    height: int
    width: int

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows of the image, of shape (c, bottom - top, width), in [0, 1]."""


class TensorRows:
    """A tensor of shape (1, c, h, w) as Rows."""

    def __init__(self, image: torch.Tensor) -> None:
        if image.dim() != 4 or image.shape[0] != 1:
            raise ValueError(f'Expected one image of shape (1, c, h, w), but got {tuple(image.shape)}.')
        self.image = image[0]
        self.height, self.width = image.shape[2:]

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self.image[:, top:bottom]


Strips = list[list[tuple[int, Block]]]  # for each strip of an image its blocks of tiles and their classes


class Plan(NamedTuple):
    """What will be run on an image.

    Attributes:
        tiling: The tiles.
        classes: of shape (n, ), class of each tile, on CPU.
        strips: What is run.
        tile_rows: Tile rows of a strip.
        max_tiles: Most tiles per forward pass of each branch.
        cost: MACs to be spent, classifier and tile overlap included, relative to the dearest branch on the whole image.
        quality: Predicted quality: mean probability that a tile's branch is strong enough.
    """
    tiling: Tiling
    classes: torch.Tensor
    strips: Strips
    tile_rows: int
    max_tiles: list[int]
    cost: float
    quality: float

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


class Upscaled(NamedTuple):
    """An upscaled image and how it came about.

    Attributes:
        image: of shape (1, c, h * scale, w * scale), float32, on the network's device.
        classes, tiling, cost: As in Plan.
        seconds: Wall time.
    """
    image: torch.Tensor
    classes: torch.Tensor
    tiling: Tiling
    cost: float
    seconds: float


def deployed(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network for inference: channels last, rewritten where the arch knows a faster form of itself.

    Weights of convs and linear layers are kept in `dtype`, because autocast would convert them at every call; but for
    layers that the arch runs in float32 whatever autocast says (`keeps_float32`).
    """
    net = copy.deepcopy(net).requires_grad_(False).eval()
    for module in list(net.modules()):
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
    if dtype != torch.float32:
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and not hasattr(module, 'keeps_float32'):
                module.to(dtype)
    return net.to(memory_format=torch.channels_last)


class NotFinite(ArithmeticError):
    """An image came out with values that are no finite numbers."""


def weights_of(net: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """A network's weights and their versions, by which it is seen that they have changed."""
    return [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in [*net.parameters(), *net.buffers()]]


def same_weights(state: list, other: list) -> bool:
    """Whether two results of `weights_of` are of the same weights, unchanged."""
    return len(state) == len(other) and all(tensor is copied and version == then
                                            for (tensor, version), (copied, then) in zip(state, other))


@contextmanager
def algorithm_search(wanted: bool) -> Iterator[None]:
    """Context with or without cuDNN's search for the fastest algorithm, which begins anew for every size of tiles."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def device_of(net: nn.Module) -> torch.device:
    """Where a network is; of one without weights its buffers say so."""
    return next(itertools.chain(net.parameters(), net.buffers()), torch.empty(0)).device


def to_device(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of an image on a device; to a GPU without waiting."""
    if rows.device == device:
        return rows
    if device.type != 'cuda':
        return rows.to(device)
    if rows.device.type == 'cpu':
        rows = rows.contiguous().pin_memory()  # of an expanded tensor, or one within a larger, too much is pinned
    return rows.to(device, non_blocking=True)


def probe(net: nn.Module, channels: int, size: int) -> tuple[tuple[int, ...], str]:
    """Shape of what a network makes of an image of one gray, without the batch, () if that is no image; and, if it
    cannot, what it says.
    """
    device = device_of(net)
    was_training = net.training
    try:
        with torch.no_grad():  # no inference tensors: some networks keep what they have converted
            output = net.eval()(torch.zeros(1, channels, size, size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error) or 'CUDA' in str(error) or 'cuDNN' in str(error):
            raise
        # a wrong number of channels or pixels, as each layer puts it
        return (), ' '.join(str(error).split())[:120] or type(error).__name__
    finally:
        net.train(was_training)
    return tuple(output.shape[1:]) if isinstance(output, torch.Tensor) and output.dim() == 4 else (), ''


def geometry(net: nn.Module, channels: Sequence[int] = (3, 1)) -> tuple[int, int, int]:
    """Upsampling factor of a network, channels of its images, and the number that sides must be multiples of.

    Found by running it on square images, mostly of 16 and 17 pixels; where sides must be multiples, up to the first two
    that it takes. A network that knows (attribute `exported_geometry`) is asked.

    Args:
        net: The network.
        channels: Channels to try.

    Raises:
        ValueError: It makes no image of a whole multiple of its input's size out of these channels, or only of images
            of one size.
    """
    if hasattr(net, 'exported_geometry'):
        return net.exported_geometry
    name, reasons = type(net).__name__, {}
    for sizes in ((LEAST_SIZE, 32, 64), range(LEAST_SIZE + 1, MOST_MULTIPLE + 1)):
        for count, size in itertools.product(channels, sizes):
            shape, reason = probe(net, count, size)
            if not reason:
                return _geometry_from(net, count, size, shape)
            reasons.setdefault(count, f'{count} channel{"s" * (count != 1)}: {reason}')
    raise ValueError(
        f'{name} takes no square image of {LEAST_SIZE} to {MOST_MULTIPLE} pixels, of {"; of ".join(reasons.values())}')


def _geometry_from(net: nn.Module, channels: int, size: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """As `geometry`, given the shape of what a network makes of the first size that it takes."""
    name = type(net).__name__
    if len(shape) != 3 or shape[0] != channels or shape[1] != shape[2] or shape[1] % size:
        raise ValueError(
            f'{name} makes {shape or "no image"} out of ({channels}, {size}, {size}): no super-resolution network')
    scale = shape[1] // size
    for multiple in range(1, size + 1):
        larger = size + multiple
        if probe(net, channels, larger)[0] == (channels, scale * larger, scale * larger):
            break
    else:
        raise ValueError(f'{name} takes no other square images than of {size} pixels')
    if size % multiple:
        raise ValueError(f'{name} takes square images of {size} and {larger} pixels, and none between: no multiples')
    return scale, channels, multiple


def common_geometry(nets: Sequence[nn.Module]) -> tuple[int, int, int]:
    """As `geometry`, of networks that the same images go through: their multiple is the least common one.

    Raises:
        ValueError: One of them has no geometry, or they differ in scale or channels.
    """
    found = [geometry(net) for net in nets]
    if len({channels for _, channels, _ in found}) > 1:  # some, such as Interpolation, take any number
        with suppress(ValueError):
            found = [geometry(net, (1, )) for net in nets]
    if len({kind[:2] for kind in found}) > 1:
        raise ValueError(f'the branches differ in scale or channels: {[kind[:2] for kind in found]}')
    return (*found[0][:2], math.lcm(*(multiple for _, _, multiple in found)))


@torch.no_grad()
def run_padded(net: nn.Module, x: torch.Tensor, scale: int, multiple: int) -> torch.Tensor:
    """What a network makes of images of any size: they are padded to its multiple, and the result is cropped.

    Args:
        net: The network.
        x: The images, of shape (b, c, h, w), in [0, 1].
        scale, multiple: See `geometry`.

    Returns:
        Images of shape (b, c, h * scale, w * scale).
    """
    height, width = x.shape[2:]
    sides = [-(-side // multiple) * multiple for side in (height, width)]
    if sides == [height, width]:
        return net(x)
    padded = pad_to(x.flatten(0, 1), *sides).unflatten(0, x.shape[:2])
    return net(padded)[..., :height * scale, :width * scale]


def is_routed(net: nn.Module) -> bool:
    """Whether a network has a classifier that chooses between branches."""
    return hasattr(net, 'classifier') and hasattr(net, 'branches')


class RoutedUpscaler:
    """Cuts an image into tiles, classifies them all, runs each class through its branch, blends the results.

    The network is copied in a form that is fast in inference, and again when its weights have changed. Changes that
    leave their versions alone (fused optimizers, `.data`) need a call of `refresh`.

    Args:
        net: A CDNSR network (attributes classifier, branches, upscale), or any super-resolution network, which is then
            run on all tiles.
        patch_size: Largest side of a tile in LR pixels.
        step: Distance of neighbouring tiles in LR pixels. Default: patch_size less 4 (8 for a network without
            branches).
        budget: Cost that may be spent on an image, as a fraction of the dearest branch's on the whole image without
            tiles; classifier and overlap count. Default: no limit, the most probable class.
        target_ms: Time that may be spent on an image, in milliseconds, by the measured speed of the branches.
        cost: 'macs' | 'latency': what a budget counts.
        precision: 'float32' | 'bfloat16' | 'float16': of the branches. The classifier always runs in float32.
        float32_branches: Branches that keep float32.
        max_tiles: Most tiles per forward pass. Default: the fastest number by a short measurement, which is kept for
            each network and machine.

    Attributes:
        scale: Upsampling factor.
        channels: Channels of the images: 3, or 1 for gray.
        multiple: What the sides of tiles must be multiples of.
        branch_macs: MACs of each branch for one tile.
        classifier_macs: MACs of the classifier for one tile.
        num_classes: Number of classes M.
        unit: What gets a class.
    """
    unit = 'Tiles'

    def __init__(self,
                 net: nn.Module,
                 patch_size: int = PATCH_SIZE,
                 step: Optional[int] = None,
                 budget: Optional[float] = None,
                 target_ms: Optional[float] = None,
                 cost: str = 'macs',
                 precision: str = 'float32',
                 float32_branches: Sequence[int] = (),
                 max_tiles: Optional[int] = None) -> None:
        self.net = net
        self.routed = is_routed(net)
        self.sources = list(net.branches) if self.routed else [net]
        self.scale, self.channels, self.multiple = common_geometry(self.sources)
        self.patch_size = patch_size = -(-patch_size // self.multiple) * self.multiple
        self.step = max(1, patch_size - (4 if self.routed else 8)) if step is None else step
        self.budget, self.target_ms, self.cost_kind = budget, target_ms, cost
        dtype = PRECISIONS[precision]
        self.dtypes = [torch.float32 if i in float32_branches else dtype for i in range(len(self.sources))]
        self.device = device_of(net)
        self.kind = kind_of(self.device)
        self.classifier_macs = 0
        if self.routed:
            try:
                self.classifier_macs = count_macs(net.classifier, patch_size, patch_size, self.channels)
            except RuntimeError as error:
                text = f'the classifier takes no images of {self.channels} channel{"s" * (self.channels != 1)}: {error}'
                raise ValueError(text) from error
        self.branch_macs = [count_macs(branch, patch_size, patch_size, self.channels) for branch in self.sources]
        if budget is not None and cost == 'macs' and max(self.branch_macs) == 0:
            raise ValueError('the branches have no multiply-accumulates to count; use cost latency')
        self.given_max_tiles = max_tiles
        if cost not in ('macs', 'latency'):
            raise ValueError(f"Expected cost 'macs' or 'latency', but got {cost!r}.")
        if budget is not None and target_ms is not None:
            raise ValueError('Expected a budget or target_ms, but got both.')
        self.measured: Optional[Speed] = None
        self.short_of_memory = False
        self.exact: Optional[RoutedUpscaler] = None  # the same in float32, once that is wanted
        self.branches: Optional[list[nn.Module]] = None
        self.copied: list[tuple[torch.Tensor, int]] = []  # the weights that the copies were made of, and their versions

    @property
    def num_classes(self) -> int:
        return len(self.sources)

    @property
    def limited(self) -> bool:
        """Whether there is a limit to what may be spent."""
        return self.budget is not None or self.target_ms is not None

    @property
    def whole_macs(self) -> float:
        """MACs of the dearest branch on a whole image, per pixel of the result."""
        return max(self.branch_macs) / self.patch_size**2 / self.scale**2

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for an image."""
        return height * self.scale, width * self.scale

    def tiling_of(self, height: int, width: int) -> Tiling:
        """The tiles of an image."""
        return Tiling(height, width, self.patch_size, self.step, self.multiple)

    def refresh(self) -> None:
        """Takes over the network's weights at the next image, whatever their versions say."""
        self.copied = []

    def by_precision(self) -> Iterator[RoutedUpscaler]:
        """This engine, and then, for an image that its precision cannot hold, the same in float32; says so once."""
        yield self
        if any(dtype != torch.float32 for dtype in self.dtypes):
            if self.exact is None:
                say_overflow()
                self.exact = copy.copy(self)
                self.exact.dtypes = [torch.float32] * len(self.dtypes)
                self.exact.branches = self.exact.measured = None
            yield self.exact

    def _copy(self) -> None:
        """Takes over the network's present weights, if they have changed."""
        state = weights_of(self.net)
        if self.branches is None or not same_weights(state, self.copied):
            self.sources = list(self.net.branches) if self.routed else [self.net]
            self.classifier = deployed(self.net.classifier, torch.float32) if self.routed else None
            self.branches = [deployed(branch, dtype) for branch, dtype in zip(self.sources, self.dtypes)]
            self.copied = state

    @property
    def costs(self) -> torch.Tensor:
        """MACs of each branch relative to the dearest, of shape (M, )."""
        macs = torch.tensor(self.branch_macs, dtype=torch.float32)
        return macs / macs.max().clamp(min=1)

    @property
    def speed(self) -> Speed:
        """Measured speed of branches and classifier on this machine."""
        return self.measure_speed() if self.measured is None else self.measured

    def measure_speed(self, fresh: bool = False) -> Speed:
        """Measures branches and classifier, or takes what is known of this network and machine if not `fresh`."""
        if self.measured is None or fresh:
            self._copy()
            parts = [(lambda x, i=i: self._run(i, x)) for i in range(len(self.branches))]
            names = [f'{branch}{dtype}' for branch, dtype in zip(self.branches, self.dtypes)]
            if self.routed:
                parts.append(self.classifier)
                names.append(str(self.classifier))
            self.measured = measured_speed(parts, names, self.patch_size, self.channels, self.device, fresh)
        return self.measured

    def _max_tiles(self, n: int) -> list[int]:
        """Most tiles per forward pass of each branch, for an image of n tiles."""
        if self.given_max_tiles is not None:
            return [self.given_max_tiles] * len(self.sources)
        if n <= FEW_TILES:
            return [DEFAULT_MAX_TILES[self.kind]] * len(self.sources)
        return self.speed.max_tiles[:len(self.sources)]

    @torch.inference_mode()
    def _run(self, branch: int, tiles: torch.Tensor) -> torch.Tensor:
        """Runs a batch of tiles or blocks, of shape (b, c, h, w), through a branch."""
        dtype = self.dtypes[branch]
        with algorithm_search(False):
            with torch.autocast(tiles.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                return self.branches[branch](tiles)

    @torch.inference_mode()
    def upscale(self, lq: torch.Tensor, logits: Optional[torch.Tensor] = None) -> Upscaled:
        """Upscales one image.

        Args:
            lq: of shape (1, c, h, w), in [0, 1], h and w at least 1, on the network's device.
            logits: of shape (n, M), instead of the classifier's; for each tile, as `tiling_of` cuts them.
        """
        begin = time.perf_counter()
        rows = TensorRows(lq)
        plan = self.plan(rows, logits)
        image, top = None, 0
        for strip in self.strips(rows, plan):
            if len(plan.strips) == 1:
                image = strip
                break
            if image is None:
                image = strip.new_empty(lq.shape[2] * self.scale, *strip.shape[1:])
            image[top:top + len(strip)] = strip  # the next strip overwrites it
            top += len(strip)
        image = image.permute(2, 0, 1).unsqueeze(0)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)  # once per image, for an honest time
        return Upscaled(image, plan.classes, plan.tiling, plan.cost, time.perf_counter() - begin)

    @torch.inference_mode()
    def plan(self, image: Rows, logits: Optional[torch.Tensor] = None) -> Plan:
        """Decides the class of every tile of an image, by given logits or the classifier's, and which run together."""
        self._copy()
        tiling = self.tiling_of(image.height, image.width)
        row_bytes = 4 * (self.channels + 1) * tiling.padded[1] * tiling.size[0] * self.scale**2
        tile_rows = max(1, min(len(tiling.tops), CANVAS_BYTES[self.kind] // row_bytes))
        max_tiles = self._max_tiles(len(tiling))
        merged = MERGED_TILES if self.given_max_tiles is None else min(self.given_max_tiles, MERGED_TILES)
        classes, quality = torch.zeros(len(tiling), dtype=torch.int64), 1.
        if self.routed:
            scores = logits
            if logits is None:
                scores = logits = self._classify(image, tiling)
                if self.limited and hasattr(self.classifier, 'errors'):  # free of the costs that its logits count
                    scores = -self.classifier.errors(logits)
            logits, scores = logits.cpu(), scores.cpu()
            classes = self._classes(scores, tiling, lambda classes: tiling.merge(classes, merged, tile_rows))
            quality = predicted_quality(logits, self.costs, classes)
        strips = tiling.merge(classes, merged, tile_rows)
        macs = (*self.branch_macs, self.classifier_macs)
        whole = self._whole(tiling, macs)
        cost = self._spent(tiling, strips, macs) / whole if whole else float('nan')
        return Plan(tiling, classes, strips, tile_rows, max_tiles, cost, quality)

    def _classes(self, logits: torch.Tensor, tiling: Tiling, merge: Callable[[torch.Tensor], Strips]) -> torch.Tensor:
        """Class of each tile: the most probable one, or what the budget allows."""
        logits = logits.nan_to_num()
        if not self.limited:
            return logits.argmax(dim=1)
        by_time = self.cost_kind == 'latency' or self.target_ms is not None
        parts = self.speed.tile_ms if by_time else (*self.branch_macs, self.classifier_macs)
        limit = self.target_ms if self.budget is None else self.budget * self._whole(tiling, parts)
        if by_time:  # a branch that is slower than a stronger one is none to choose
            strength = self.branch_macs
            for i, ms in enumerate(parts[:-1]):
                if any(strength[j] > strength[i] and parts[j] <= ms for j in range(len(strength))):
                    logits = logits.index_fill(1, torch.tensor(i), -torch.inf)
        path = RoutingPath(logits, torch.tensor(parts[:-1]))
        return path.within(limit, lambda classes: self._spent(tiling, merge(classes), parts))

    def _spent(self, tiling: Tiling, strips: Strips, parts: Sequence[float]) -> float:
        """What an image costs, given the costs of branches and classifier for a tile of patch_size."""
        total = parts[-1] * len(tiling) * tiling.size[0] * tiling.size[1]
        for strip in strips:
            for kind, block in strip:
                top, bottom, left, right = tiling.box(block)
                total += parts[kind] * (bottom - top) * (right - left)
        return total / self.patch_size**2

    def _whole(self, tiling: Tiling, parts: Sequence[float]) -> float:
        """What the dearest branch costs on the image without tiles."""
        hardest = self.branch_macs.index(max(self.branch_macs))
        return parts[hardest] * tiling.height * tiling.width / self.patch_size**2

    def _lq_rows(self, image: Rows, tiling: Tiling, first: int, last: int) -> torch.Tensor:
        """What the tile rows from `first` to `last` cover, of shape (c, rows, width), on the device."""
        top, bottom = tiling.tops[first], tiling.tops[last] + tiling.size[0]
        rows = to_device(image.rows(top, min(bottom, image.height)), self.device)
        return pad_to(rows, bottom - top, tiling.padded[1])

    def _classify(self, image: Rows, tiling: Tiling) -> torch.Tensor:
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
                    self.classifier(part.contiguous(memory_format=torch.channels_last))
                    for part in tiles.split(together)
                ]
        return torch.cat(logits)

    @torch.inference_mode()
    def strips(self, image: Rows, plan: Plan) -> Iterator[torch.Tensor]:
        """Upscales an image as planned, strip by strip.

        Yields:
            Finished rows of the upscaled image, from top to bottom, of shape (rows, w * scale, c), float32, on the
            network's device. Each is overwritten when the next one is asked for.
        """
        tiling, canvas = plan.tiling, None
        for number, blocks in enumerate(plan.strips):
            first = number * plan.tile_rows
            lq = self._lq_rows(image, tiling, first, min(first + plan.tile_rows, len(tiling.tops)) - 1)
            for kind, group in batches(blocks, plan.max_tiles):
                for block, output in self._run_blocks(kind, group, lq, tiling.tops[first], tiling):
                    if canvas is None:
                        canvas = Canvas(tiling, self.scale, output.shape[0], plan.tile_rows, output.device,
                                        output.is_cuda)
                    canvas.add(block, output)
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
        if count <= (self.given_max_tiles or count):
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

    def _save_memory(self, max_tiles: int) -> None:
        """Goes on with smaller batches, also for further images; says so once."""
        if self.given_max_tiles is None or max_tiles < self.given_max_tiles:
            self.given_max_tiles = max_tiles
        saving_memory(say=not self.short_of_memory)
        self.short_of_memory = True


def say_overflow() -> None:
    """Says that an image is done in another precision than was asked for."""
    logging.getLogger('basicsr').warning(
        'Values overflow in this precision: images that have them are done again in float32.')


def saving_memory(say: bool = True) -> None:
    """Gives back what is free, and says that batches are smaller from now on."""
    if say:
        logging.getLogger('basicsr').warning('Out of memory: going on with smaller batches.')
    torch.cuda.empty_cache()


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
