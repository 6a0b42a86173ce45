"""Upscaling a whole image by a network that routes pixels: features in tiles, then each pixel by its sampler."""
from __future__ import annotations

import copy
import itertools
import torch
from torch import nn
from typing import Any, Iterator, NamedTuple, Optional, Sequence, cast

from .network import PRECISIONS, PixelRouted, deployed
from .speed import is_out_of_memory
from .tiling import LEAST_SIZE, Rows, fit, to_device
from .upscaler import Upscaler, algorithm_search

PATCH_SIZE = 128  # largest side of a tile if none is given, in LR pixels
MAX_SCALE = 64
STRIP_PIXELS = 2**19  # LR pixels whose features are in memory together; more only if one row of tiles has more
BAND_PIXELS = {'cpu': 2**17, 'cuda': 2**22}  # of the result, that are computed together
MAX_TILES = {'cpu': 1, 'cuda': 16}
TRIED_SIDE, TRIED_PIXELS = 64, 2**16  # of a tile, and of a band, by which it is seen what memory others take
# bytes for each pixel of the result in a strip: its margin and sampler; where they are compared with those of others
CHOSEN_BYTES, COMPARED_BYTES = 16, 48
BUDGET_ONLY = 'PCSR takes a budget in MACs only, no time and no loss'


class Tiles:
    """Tiles of one size along one axis, inside the image, and which pixels each one owns.

    Args:
        length: Of the image, in pixels.
        patch_size: Largest size of a tile.
        step: patch_size minus the overlap, half of which is each tile's halo.

    Attributes:
        size: Of a tile.
        starts: First pixel of each.
        bounds: First pixel that each one owns; then `length`.
    """

    def __init__(self, length: int, patch_size: int, step: int) -> None:
        size, count, distance = fit(length, patch_size, step)
        self.size = min(size, length)
        self.starts = [min(number * distance, length - self.size) for number in range(count)]
        self.bounds = [0, *(start + (patch_size - step) // 2 for start in self.starts[1:]), length]


class Taken(NamedTuple):
    """What memory is taken, in bytes.

    Attributes:
        by_tile: For each LR pixel of a tile in a forward pass of the backbone.
        by_band: For each pixel of the result that is computed together with others.
        features: For each LR pixel of a strip.
    """
    by_tile: float
    by_band: float
    features: float


class PixelPlan:
    """What is done with an image. Which sampler its pixels get is known when its strips are done.

    Attributes:
        size: Height and width of the image.
        out_size: Those of the result.
        rows, columns: The tiles.
        tile_rows: Rows of tiles in a strip.
        max_tiles: Most tiles per forward pass of the backbone.
        band_pixels: Pixels of the result that are computed together.
        counts: Pixels of the result by each sampler, so far.
        cost: MACs spent so far, relative to the heavy sampler on the whole image without tiles.
    """

    def __init__(self, size: tuple[int, int], out_size: tuple[int, int], patch_size: int, step: int, samplers: int,
                 max_tiles: int, strip_pixels: int, band_pixels: int) -> None:
        self.size, self.out_size = size, out_size
        self.max_tiles, self.band_pixels = max_tiles, band_pixels
        # a wide image has lower tiles, as long as the halo is no large part of them
        halo = patch_size - step
        height = min(patch_size, max(strip_pixels // size[1], 4 * halo, LEAST_SIZE))
        self.rows, self.columns = Tiles(size[0], height, height - halo), Tiles(size[1], patch_size, step)
        self.tile_rows = max(1, strip_pixels // (self.rows.size * size[1]))
        self.counts = [0] * samplers
        self.cost = 0.
        self.classes: list[torch.Tensor] = []

    @property
    def strip_pixels(self) -> int:
        """LR pixels of a strip, at most."""
        return min(self.size[0], self.tile_rows * self.rows.size) * self.size[1]

    def class_map(self) -> torch.Tensor:
        """Which sampler has the pixel in the middle of each LR pixel, of shape (h, w), on CPU."""
        return torch.cat(self.classes).cpu()


class PixelUpscaler(Upscaler):
    """Computes the features of an image in tiles, classifies its pixels, and runs each through its sampler.

    Features are cropped to what a tile owns, not blended. An image of any size goes through in strips, of which only
    the features, the margins and a band of the result are in memory. Without a budget the network's k, adaptive and
    refinement are followed, adaptive within a strip.

    Args:
        net: A PCSR network.
        patch_size: Largest side of a tile in LR pixels, halo included.
        step: patch_size less twice the halo, by which neighbouring tiles overlap.
        budget: Cost that may be spent, as a fraction of the heavy sampler's on the whole image without tiles; backbone,
            halo and classifier count. In each strip as many pixels get the heavy sampler as it allows, those with the
            largest margin. Default: no limit, the network's k.
        target_ms, max_loss, fidelity, cost: As of TileUpscaler; but only a budget in MACs is supported.
        precision: 'float32' | 'bfloat16' | 'float16': of backbone and samplers. The classifier always runs in float32.
        max_tiles: Most tiles per forward pass of the backbone. Default: 1 on a CPU, 16 on a GPU.
        scale: Upsampling factor, also a fractional one. Default: the network's.
    """
    unit = 'Pixels'

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
                 max_tiles: Optional[int] = None,
                 scale: Optional[float] = None) -> None:
        if cost == 'latency':
            raise ValueError(BUDGET_ONLY)
        self.source = pixels = cast(PixelRouted, net)
        scale = pixels.upscale if scale is None else scale
        if not 1 <= scale <= MAX_SCALE:
            raise ValueError(f'expected a scale from 1 to {MAX_SCALE}, but got {scale:g}')
        step = max(1, patch_size - 12) if step is None else step
        super().__init__(net, scale, pixels.num_in_ch, patch_size, step, budget, [PRECISIONS[precision]], max_tiles)
        self._take_limits(budget, target_ms, max_loss, fidelity)
        self.max_tiles: int = max_tiles or MAX_TILES[self.kind]
        self.num_classes = len(pixels.samplers)  # 1 in phase 0
        self.routed = self.num_classes > 1
        parts = ([pixels.classifier] if self.routed else []) + list(pixels.samplers)
        # of first layers per LR pixel, of the classifier per pixel of the result, and of each sampler per pixel
        self.lq_macs = sum(mlp.macs() - mlp.macs(first=False) for mlp in parts)
        self.pixel_macs = pixels.classifier.macs(first=False) if self.routed else 0
        self.sampler_macs = [mlp.macs(first=False) for mlp in pixels.samplers]

    def _take_limits(self,
                     budget: Optional[float] = None,
                     target_ms: Optional[float] = None,
                     max_loss: Optional[float] = None,
                     fidelity: Optional[float] = None) -> None:
        if any(limit is not None for limit in (target_ms, max_loss, fidelity)):
            raise ValueError(BUDGET_ONLY)
        self.budget = budget

    def _copy(self) -> None:
        self.fast = cast(PixelRouted, deployed(self.net, self.dtypes[0]))
        if self.routed:
            self.fast.classifier = copy.deepcopy(self.source.classifier).requires_grad_(False)
        self.taken: Optional[Taken] = None

    def plan(self, image: Rows) -> PixelPlan:
        """Decides how an image is cut. Nothing is computed yet."""
        size = (image.height, image.width)
        usual = (self.max_tiles, STRIP_PIXELS, BAND_PIXELS[self.kind])

        def planned(max_tiles: int, strip_pixels: int, band_pixels: int) -> PixelPlan:
            return PixelPlan(size, self.size_of(*size), self.patch_size, self.step, self.num_classes, max_tiles,
                             strip_pixels, band_pixels)

        if self.memory_limit is None:
            return planned(*usual)
        self._update()
        room = self.memory_limit.free()
        # strips last: a budget and adaptive thresholds look at a strip
        for strip, tiles, band in itertools.product(*(halved(number) for number in (usual[1], usual[0], usual[2]))):
            plan = planned(tiles, strip, band)
            if self._bytes_of(plan) <= room:
                return plan
        raise self.memory_limit.short_of(self._bytes_of(plan), 'a strip of tiles')

    def _bytes_of(self, plan: PixelPlan) -> int:
        """What a plan takes."""
        taken, (height, width) = self._take_bytes(), plan.out_size
        lq = plan.strip_pixels
        pixels = lq * height * width // (plan.size[0] * plan.size[1])
        compared = self.routed and (self.budget is not None or self.source.adaptive)
        tiles = taken.by_tile * plan.max_tiles * plan.rows.size * plan.columns.size
        band = taken.by_band * max(plan.band_pixels, width)
        each = (COMPARED_BYTES if compared else CHOSEN_BYTES) if self.routed else 1
        return int(lq * taken.features + pixels * each + max(tiles, band))

    def _least_bytes(self) -> int:
        return int(self._take_bytes().by_tile * min(self.patch_size, LEAST_SIZE + 2 * (self.patch_size - self.step))**2)

    @torch.inference_mode()
    def _take_bytes(self) -> Taken:
        """Measures what tiles and bands take."""
        assert self.memory_limit is not None
        if self.taken is None:
            side, channels = TRIED_SIDE, self.channels
            tile = torch.rand(1, channels, side, side, device=self.device)
            by_tile = self.memory_limit.growth(lambda: self._run([tile])) / side**2
            features = self._run([tile]).permute(0, 2, 3, 1).contiguous()
            lq = tile.permute(0, 2, 3, 1).contiguous()
            out_size = self.size_of(side, side)
            rows = min(out_size[0], max(1, TRIED_PIXELS // out_size[1]))
            grid, _, last = self.source.grid((side, side), out_size, self.device).band(0, rows)
            heavy = torch.arange(out_size[1], device=self.device).expand(1, rows, -1) % 2 == 0
            heavy = heavy if self.routed else torch.ones_like(heavy)

            def band() -> torch.Tensor:
                if self.routed:
                    self.fast.margin(features[:, :last], grid)
                picture = self.fast.sample(features[:, :last], grid, heavy, int(heavy.sum()))[0].float()
                picture += self.source.bilinear(lq, (side, side), out_size, 0, rows, 0)[0]
                return self.source.refine(picture.unsqueeze(0), heavy) if self.routed else picture

            by_band = self.memory_limit.growth(band) / (rows * out_size[1])
            of_features = features.shape[-1] * features.element_size()
            # lq as it comes, and channels last; a tile as it is cut out, twice
            self.taken = Taken(by_tile + 8 * channels, by_band, of_features + 12 * channels)
        return self.taken

    @torch.inference_mode()
    def strips(self, image: Rows, plan: PixelPlan) -> Iterator[torch.Tensor]:
        self._update()
        grid = self.source.grid(plan.size, plan.out_size, self.device)
        refines = self.routed and self.source.refinement
        held = None  # the last two rows, as sampled, and their samplers: the first of them is context, the other waits
        for picture, heavy in self._sampled(image, plan, grid):
            if held is not None:
                picture, heavy = torch.cat([held[0], picture]), torch.cat([held[1], heavy])
            first = 0 if held is None else len(held[0]) - 1
            held = picture[-2:], heavy[-2:]
            finished = self.source.refine(picture.unsqueeze(0), heavy.unsqueeze(0))[0] if refines else picture
            if len(finished) - 1 > first:
                yield finished[first:-1]
        yield finished[-1:]

    def _sampled(self, image: Rows, plan: PixelPlan, grid: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Bands of the result before refinement, of shape (rows, W, c), and which of their pixels are heavy."""
        for row in range(0, len(plan.rows.starts), plan.tile_rows):
            yield from self._sampled_strip(image, plan, grid, row)

    def _sampled_strip(self, image: Rows, plan: PixelPlan, grid: Any,
                       row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As _sampled, of the strip that begins with a row of tiles."""
        most = max(1, plan.band_pixels // plan.out_size[1])
        lq, lq_top, features, tiled = self._features(image, plan, row)
        first, last = (plan.rows.bounds[min(end, len(plan.rows.starts))] for end in (row, row + plan.tile_rows))
        top, bottom = grid.first_row(first), grid.first_row(last)
        heavy, counts = self._choose(features, grid, top, bottom, first, plan, tiled, most)
        rows, columns = (torch.arange(*ends, device=heavy.device) for ends in ((first, last), (plan.size[1], )))
        middles = (2 * rows + 1) * plan.out_size[0] // (2 * plan.size[0]) - top
        columns = (2 * columns + 1) * plan.out_size[1] // (2 * plan.size[1])
        plan.classes.append((heavy[middles][:, columns] & self.routed).to(torch.uint8))

        def band_of(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            band, start, stop = grid.band(top + begin, top + end)
            if self.taken is not None:
                self._ask_for(self.taken.by_band * (end - begin) * plan.out_size[1], 'a band of the result')
            part, count = heavy[begin:end], sum(counts[begin:end]) if heavy.is_cuda else None
            picture = self.fast.sample(features[:, start - first:stop - first], band, part.unsqueeze(0), count)
            picture = picture[0].float()
            picture += self.source.bilinear(lq, plan.size, plan.out_size, top + begin, top + end, lq_top)[0]
            self.watch((top + end) / plan.out_size[0])
            return picture, part

        yield from self._in_parts('rows sampled', band_of, bottom - top, most)

    def _features(self, image: Rows, plan: PixelPlan, row: int) -> tuple[torch.Tensor, int, torch.Tensor, int]:
        """Runs the backbone on the tiles of a strip.

        Args:
            image: The image.
            plan: How it is cut.
            row: First row of tiles of the strip.

        Returns:
            Rows of the image (1, rows, w, c) with one more than needed at either side, the first one's number, features
            of the rows that the strip owns (1, h, w, num_feat), and how many pixels the tiles have.
        """
        rows, columns = plan.rows, plan.columns
        following = min(row + plan.tile_rows, len(rows.starts))
        top = max(0, rows.starts[row] - 1)
        lq = to_device(image.rows(top, min(plan.size[0], rows.starts[following - 1] + rows.size + 1)), self.device)
        lq = lq.float().permute(1, 2, 0).contiguous().permute(2, 0, 1).unsqueeze(0)
        boxes = [(y, x) for y in range(row, following) for x in range(len(columns.starts))]
        first, features = rows.bounds[row], torch.empty(0)
        while boxes:
            most = min(plan.max_tiles, self.max_tiles)
            group = boxes[:most]
            corners = [(rows.starts[y] - top, columns.starts[x]) for y, x in group]
            try:
                outputs = self._run([lq[:, :, y:y + rows.size, x:x + columns.size] for y, x in corners])
            except RuntimeError as error:
                if most == 1 or not is_out_of_memory(error):
                    raise
                outputs = None
            if outputs is None:  # not above, where the error still holds what the pass had allocated
                self._save_memory(most // 2)
                continue
            if not len(features):
                features = outputs.new_empty(1, rows.bounds[following] - first, plan.size[1], outputs.shape[1])
            for (y, x), output in zip(group, outputs.permute(0, 2, 3, 1)):
                (y0, y1), (x0, x1) = rows.bounds[y:y + 2], columns.bounds[x:x + 2]
                features[0, y0 - first:y1 - first, x0:x1] = output[y0 - rows.starts[y]:y1 - rows.starts[y],
                                                                   x0 - columns.starts[x]:x1 - columns.starts[x]]
            boxes = boxes[len(group):]
        tiled = (following - row) * len(columns.starts) * rows.size * columns.size
        return lq.permute(0, 2, 3, 1), top, features, tiled

    def _run(self, tiles: list[torch.Tensor]) -> torch.Tensor:
        """Features of tiles of one size."""
        if self.taken is not None:
            self._ask_for(self.taken.by_tile * sum(tile[0, 0].numel() for tile in tiles), 'tiles')
        together = torch.cat(tiles).contiguous(memory_format=torch.channels_last)
        dtype = self.dtypes[0]
        half = dtype != torch.float32
        with algorithm_search(False), torch.autocast(self.device.type, dtype, enabled=half, cache_enabled=False):
            return self.fast.features(together)

    def _choose(self, features: torch.Tensor, grid: Any, top: int, bottom: int, first: int, plan: PixelPlan, tiled: int,
                most: int) -> tuple[torch.Tensor, list[int]]:
        """Which pixels of a strip are heavy; and what they cost, into the plan.

        Returns:
            Of shape (rows, W), bool; and how many they are in each row.
        """
        width, rows = plan.out_size[1], bottom - top
        pixels, lq_pixels = rows * width, features.shape[1] * features.shape[2]
        if not self.routed:
            heavy, counts = torch.ones(rows, width, dtype=torch.bool, device=features.device), [width] * rows
        else:

            def margin_of(begin: int, end: int) -> torch.Tensor:
                band, start, stop = grid.band(top + begin, top + end)
                return self.fast.margin(features[:, start - first:stop - first], band)[0].float()

            margin = torch.cat(list(self._in_parts('rows classified', margin_of, rows, most)))
            if self.budget is None:
                heavy = margin > self.source.threshold(margin.unsqueeze(0))[0]
            else:
                light, dear = self.sampler_macs
                left = self._left(plan) * pixels / (plan.out_size[0] * width)
                count = pixels if dear <= light else int(max(0, min(pixels, left / (dear - light))))
                heavy = largest(margin.nan_to_num(), count)
            counts = heavy.sum(dim=1).tolist()  # all that the host waits for in a strip
        count = sum(counts)
        by_sampler = [pixels - count, count][-self.num_classes:]
        plan.counts = [total + more for total, more in zip(plan.counts, by_sampler)]
        height, length = plan.size
        plan.cost += self.spent(tiled, lq_pixels, by_sampler) / self.whole(height * length, plan.out_size[0] * width)
        return heavy, counts

    def _left(self, plan: PixelPlan) -> float:
        """MACs that a budget leaves for heavy pixels, beyond what the whole image costs with light ones."""
        lq_pixels, pixels = (height * width for height, width in (plan.size, plan.out_size))
        tiled = len(plan.rows.starts) * len(plan.columns.starts) * plan.rows.size * plan.columns.size
        return (self.budget or 0) * self.whole(lq_pixels, pixels) - self.spent(tiled, lq_pixels, [pixels, 0])

    def spent(self, tiled: float, lq_pixels: float, counts: Sequence[float]) -> float:
        """MACs, given the LR pixels of the tiles, those of the image, and the pixels by each sampler."""
        return float(tiled * self.source.backbone_macs + lq_pixels * self.lq_macs + sum(counts) * self.pixel_macs +
                     sum(macs * count for macs, count in zip(self.sampler_macs, counts)))

    def whole(self, lq_pixels: float, pixels: float) -> float:
        """MACs of the heavy sampler on a whole image without tiles, given its pixels and those of the result."""
        heavy = self.source.heavy.macs() - self.sampler_macs[-1]
        return float(lq_pixels * (self.source.backbone_macs + heavy) + pixels * self.sampler_macs[-1])

    @property
    def whole_macs(self) -> float:
        """MACs of the heavy sampler on a whole image, per pixel of the result."""
        return self.whole(1 / self.scale**2, 1)


def halved(number: int) -> list[int]:
    """A number, half of it and so on, to 1."""
    return [number >> i for i in range(number.bit_length())]


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Marks the `count` largest values; of equal ones, the first. With a larger count none is given up.

    Args:
        values: of any shape.
        count: From 0 to the number of values.
    """
    if count == 0 or count == values.numel():
        return torch.full_like(values, count > 0, dtype=torch.bool)
    flat = values.flatten()
    # one block of a GPU would do all of kthvalue
    threshold = flat.sort().values[-count] if flat.is_cuda else flat.kthvalue(len(flat) - count + 1).values
    chosen, equal = flat > threshold, flat == threshold
    chosen |= equal & (equal.cumsum(0) <= count - chosen.sum())
    return chosen.view_as(values)
