"""Cutting an image into tiles, merging tiles of one class, blending what comes back. Needs torch only."""
from __future__ import annotations

import torch
from torch.nn import functional as F
from typing import Callable, NamedTuple, Optional, Protocol, Sequence

PATCH_SIZE = 96  # largest side of a tile if none is given, in pixels: see docs/Deviations.md
OVERLAP = 4  # of neighbouring tiles of a network with branches
MAPPED_PATCH_SIZE = 68  # the same, where errors of cells are known: eight of them in a step
LEAST_SIZE = 16  # of a tile, in pixels; not every network can do less


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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; to a GPU without waiting."""
    if tensor.device == device:
        return tensor
    if device.type != 'cuda':
        return tensor.to(device)
    if tensor.device.type == 'cpu':
        tensor = tensor.contiguous().pin_memory()  # of an expanded tensor, or one within a larger, too much is pinned
    return tensor.to(device, non_blocking=True)


def pad_to(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pads an image at the bottom and right: reflected as far as there are pixels, the last one repeated beyond.

    Args:
        image: of shape (c, h, w), h and w at least 1.
        height: Least height wanted; a higher image stays as it is.
        width: Least width wanted.

    Returns:
        Image of shape (c, max(h, height), max(w, width)).
    """
    for axis, size in ((-2, height), (-1, width)):
        missing = size - image.shape[axis]
        if missing <= 0:
            continue
        reflected = min(missing, image.shape[axis] - 1)
        for amount, mode in ((reflected, 'reflect'), (missing - reflected, 'replicate')):
            if amount > 0:
                padding = (0, 0, 0, amount) if axis == -2 else (0, amount, 0, 0)
                image = F.pad(image.unsqueeze(0), padding, mode=mode).squeeze(0)
    return image


def fit(length: int, patch_size: int, step: int, multiple: int = 1) -> tuple[int, int, int]:
    """Size, number and distance of the tiles along one axis: as few as with `patch_size` and `step`, hardly larger.

    Neighbours overlap by patch_size - step; the last tile ends fewer pixels behind the image than there are tiles.
    Where a network wants a multiple, size and overlap are rounded up to it; a small image has one tile of 16 pixels.

    >>> fit(341, 64, 60)
    (61, 6, 57)
    """

    def up(value: int) -> int:
        return -(-value // multiple) * multiple

    overlap = up(patch_size - step)
    patch_size = max(up(patch_size), overlap + multiple)
    count = max(1, -(-(length - overlap) // (patch_size - overlap)))
    size = up(max(-(-(length + (count - 1) * overlap) // count), min(patch_size, LEAST_SIZE)))
    return size, count, size - overlap


def shapes(max_tiles: int, high: int = 2) -> list[tuple[int, int]]:
    """Rows and columns of merged tiles, in the order in which they are placed.

    Powers of two, nearly square where more than one row is allowed: few, and with little border.

    >>> shapes(4), shapes(4, 1)
    ([(2, 2), (1, 2), (2, 1), (1, 1)], [(1, 4), (1, 2), (1, 1)])
    """
    sides = [2**i for i in range(max_tiles.bit_length())]
    found = [(rows, columns) for rows in sides for columns in sides if rows <= high and rows * columns <= max_tiles]
    square = [shape for shape in found if high == 1 or max(shape) <= 2 * min(shape)]
    return sorted(square, key=lambda shape: (-shape[0] * shape[1], shape[0]))


class Block(NamedTuple):
    """Neighbouring tiles that are run as one rectangle: the first tile's row and column, and how many of each."""
    row: int
    column: int
    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """How many tiles it has."""
        return self.rows * self.columns

    def halves(self) -> list[list[Block]]:
        """The block as two; none of a single tile."""
        if self.rows > 1:
            half = self.rows // 2
            return [[self._replace(rows=half)], [self._replace(row=self.row + half, rows=self.rows - half)]]
        half = self.columns // 2
        return [[self._replace(columns=half)], [self._replace(column=self.column + half, columns=self.columns -
                                                              half)]] if half else []


class Part(NamedTuple):
    """A part of a rectangle that is run alone, along one axis or both: with what is around it, which is then cut off.

    Attributes:
        start, end: What it is responsible for.
        first, last: What it is run with.
    """
    start: int
    end: int
    first: int
    last: int


def parted(length: int, count: int, around: int, multiple: int = 1) -> list[Part]:
    """Parts of about equal length, as many as asked for, or fewer if there are not so many multiples.

    >>> parted(20, 2, 4)
    [Part(start=0, end=10, first=0, last=14), Part(start=10, end=20, first=6, last=20)]
    """
    edges = [multiple * round(number * length / count / multiple) for number in range(count)]
    edges = [*dict.fromkeys(edge for edge in edges if edge < length), length]
    return [Part(start, end, max(0, start - around), min(length, end + around)) for start, end in zip(edges, edges[1:])]


def parts_within(height: int, width: int, most: float, around: int, multiple: int = 1) -> tuple[list[Part], list[Part]]:
    """The parts of a rectangle, along both axes, of which each has at most `most` pixels with what is around it.

    Of all ways the one with the fewest pixels altogether is taken; if there is none, the one with the smallest parts.
    """
    cuts = [[parted(length, count, around, multiple) for count in range(1,
                                                                        max(1, length // LEAST_SIZE) + 1)]
            for length in (height, width)]

    def sizes(pair: tuple[list[Part], list[Part]]) -> tuple[int, int]:
        lengths = [[part.last - part.first for part in parts] for parts in pair]
        return max(lengths[0]) * max(lengths[1]), sum(lengths[0]) * sum(lengths[1])

    pairs = [(down, across) for down in cuts[0] for across in cuts[1]]
    return min(pairs, key=lambda pair: (max(0, sizes(pair)[0] - most), sizes(pair)[1]))


def shared_out(room: int, canvas: Callable[[int], int], rows: Sequence[int], least: int,
               wanted: int) -> Optional[tuple[int, int]]:
    """Shares memory out between the strip that is blended and a forward pass. Larger passes come before higher strips.

    Args:
        room: Bytes.
        canvas: What a strip of so many tile rows takes.
        rows: Tile rows that a strip can have, ascending.
        least: What the smallest pass takes.
        wanted: What the largest useful one takes.

    Returns:
        Tile rows of a strip, and bytes for a pass; None if that is not enough for the least of both.
    """
    left = room - canvas(rows[0])
    if left < least:
        return None
    # a strip of a few more rows is worth the last quarter: less is blended twice
    for_pass = min(wanted, max(least, left - left // 4))
    most = max(count for count in rows if count == rows[0] or canvas(count) + for_pass <= room)
    return most, room - canvas(most)


class Tiling:
    """The tiles of one image.

    Every pixel is covered. All tiles have one size, chosen so that they end where the image ends (the published code
    has tiles of patch_size always, and leaves out what remains at the right and the bottom). An image that is a few
    pixels short of it is padded, and cropped back when blended.

    Args:
        height: Image height in pixels, at least 1.
        width: Image width in pixels, at least 1.
        patch_size: Largest side of a tile in pixels.
        step: patch_size minus the overlap of neighbouring tiles, in pixels; at most patch_size.
        multiple: What the sides of tiles and of merged tiles are multiples of.

    Attributes:
        size: Height and width of a tile.
        tops, lefts: First row / column of the tile rows / columns. Tiles are numbered row by row.
        padded: Height and width that the tiles cover.
    """

    def __init__(self, height: int, width: int, patch_size: int, step: int, multiple: int = 1) -> None:
        if height < 1 or width < 1:
            raise ValueError(f'Expected an image of at least 1x1 pixels, but got {height}x{width}.')
        if not 1 <= step <= patch_size:
            raise ValueError(f'Expected a step from 1 to patch_size {patch_size}, but got {step}.')
        self.height, self.width = height, width
        tile_height, rows, down = fit(height, patch_size, step, multiple)
        tile_width, columns, across = fit(width, patch_size, step, multiple)
        self.size = (tile_height, tile_width)
        self.tops = [row * down for row in range(rows)]
        self.lefts = [column * across for column in range(columns)]
        self.padded = (self.tops[-1] + tile_height, self.lefts[-1] + tile_width)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def box(self, block: Block) -> tuple[int, int, int, int]:
        """Pixels of a block: top, bottom, left, right. They can lie a little outside the image."""
        bottom = self.tops[block.row + block.rows - 1] + self.size[0]
        right = self.lefts[block.column + block.columns - 1] + self.size[1]
        return self.tops[block.row], bottom, self.lefts[block.column], right

    def area(self, block: Block) -> int:
        """Pixels of a block."""
        top, bottom, left, right = self.box(block)
        return (bottom - top) * (right - left)

    def means(self, values: torch.Tensor, cell: int) -> torch.Tensor:
        """Mean over each tile, up to the middle of where it overlaps its neighbours, of what is known for cells.

        Args:
            values: of shape (M, rows, columns), for each cell of the image.
            cell: Side of a cell in pixels; the last ones may reach beyond the image.

        Returns:
            Means of shape (n, M).
        """
        shares = []
        for axis, (starts, length) in enumerate(((self.tops, self.height), (self.lefts, self.width))):
            edges = torch.tensor([0., *self._middles(starts, axis), float(length)], dtype=torch.float64)
            begins = cell * torch.arange(values.shape[1 + axis], dtype=torch.float64)
            ends = torch.minimum(edges[1:, None], begins + cell)
            shared = (ends - torch.maximum(edges[:-1, None], begins)).clamp(min=0)
            shares.append(shared / shared.sum(dim=1, keepdim=True))
        return torch.einsum('yr,mrc,xc->yxm', shares[0], values.double(), shares[1]).flatten(0, 1)

    def class_map(self, classes: torch.Tensor) -> torch.Tensor:
        """Says for every pixel which class the tile that counts most there has.

        Args:
            classes: of shape (n, ).

        Returns:
            Map of shape (height, width).
        """
        grid = classes.view(len(self.tops), len(self.lefts))
        rows, columns = self._owner(self.tops, 0, self.height), self._owner(self.lefts, 1, self.width)
        return grid[rows][:, columns]

    def _owner(self, starts: list[int], axis: int, length: int) -> torch.Tensor:
        """Index of the tile whose centre is nearest, for every pixel along one axis."""
        middles = torch.tensor(self._middles(starts, axis), dtype=torch.float32)
        return torch.bucketize(torch.arange(length) + 0.5, middles)

    def _middles(self, starts: list[int], axis: int) -> list[float]:
        """Where along one axis the middles lie of what neighbouring tiles share."""
        return [(start + following + self.size[axis]) / 2 for start, following in zip(starts, starts[1:])]

    def merge(self,
              classes: torch.Tensor,
              max_tiles: int,
              max_rows: int,
              high: int = 2) -> list[list[tuple[int, Block]]]:
        """Merges neighbouring tiles of one class into rectangles, so that their overlap is computed once.

        The rectangles are of few shapes: a network is slow on a size that it has not seen before. Larger ones are
        placed first, from left to right and down; those of two rows begin at every second row, of four at every fourth,
        so that they are the same however many rows a strip has.

        Args:
            classes: of shape (n, ).
            max_tiles: Most tiles of a rectangle.
            max_rows: Tile rows that belong to one strip, a multiple of `high`, but for an only strip.
            high: Most rows of a rectangle, a power of two.

        Returns:
            For each strip its rectangles and their classes; each tile is in exactly one.
        """
        grid = classes.view(len(self.tops), len(self.lefts))
        strips: list[list[tuple[int, Block]]] = [[] for _ in range(-(-len(self.tops) // max_rows))]
        free = [bytearray(b'1' * len(self.lefts)) for _ in self.tops]
        for rows, columns in shapes(max_tiles, high):
            if rows > grid.shape[0] or columns > grid.shape[1]:
                continue
            windows = grid.unfold(0, rows, 1).unfold(1, columns, 1).flatten(2)
            alike = (windows == windows[..., :1]).all(dim=2)
            row_free, row_taken = b'1' * columns, b'0' * columns
            for row, column in alike.nonzero().tolist():
                if row % rows or free[row][column:column + columns] != row_free:
                    continue
                kind = int(grid[row, column])
                window = free[row:row + rows]
                if any(y[column:column + columns] != row_free for y in window):
                    continue
                for y in window:
                    y[column:column + columns] = row_taken
                strips[row // max_rows].append((kind, Block(row, column, rows, columns)))
        return strips


class Canvas:
    """A strip of an upscaled image, into which upscaled blocks of tiles are blended.

    A tile's weight falls linearly to its edges and stays above zero, a block's is the sum of its tiles' weights, and
    the result is sum(weight * block) / sum(weight). It is computed as a running mean, which is exact where all blocks
    agree, and only where blocks overlap; or, if `summed`, as a sum over blocks times their shares, in few operations.

    Args:
        tiling: The tiles.
        scale: Upsampling factor.
        channels: Channels of the image.
        max_rows: Tile rows of a strip.
        device: Where the image is.
        summed: How it is computed. On a GPU every operation takes time, however few pixels it is for.
    """

    def __init__(self,
                 tiling: Tiling,
                 scale: int,
                 channels: int,
                 max_rows: int,
                 device: torch.device,
                 summed: bool = False) -> None:
        self.tiling, self.scale, self.max_rows, self.summed = tiling, scale, max_rows, summed
        self.height, self.width = tiling.height * scale, tiling.width * scale
        rows, columns = self.size_of(tiling, scale, max_rows)
        self.image = torch.empty(rows, columns, channels, device=device)
        self.total = torch.empty(0 if summed else rows, columns, 1, device=device)
        self.first_row = 0  # of tiles, in the strip
        self.top = 0  # of the strip, in pixels of the upscaled image
        self.starts = (tiling.tops, tiling.lefts)
        # small, and computed on the CPU: nothing here waits for a GPU
        self.ramps = [self._ramp(size * scale) for size in tiling.size]
        self.totals = [self._sum(axis, 0, len(self.starts[axis])) for axis in (0, 1)]
        self.weights: dict[tuple[int, int, int], tuple[torch.Tensor, int, int]] = {}
        if summed:
            self.image.zero_()
            return
        for buffer in (self.image, self.total):  # the rest is written before it is read
            for start, end in self._shared(0, rows):
                buffer[start:end] = 0
            for start, end in self._shared(1, columns):
                buffer[:, start:end] = 0

    @staticmethod
    def size_of(tiling: Tiling, scale: int, max_rows: int) -> tuple[int, int]:
        """Height and width of a strip."""
        last = min(max_rows, len(tiling.tops)) - 1
        return (tiling.tops[last] + tiling.size[0]) * scale, tiling.padded[1] * scale

    @classmethod
    def bytes_of(cls, tiling: Tiling, scale: int, channels: int, max_rows: int, summed: bool = False) -> int:
        """What a strip takes, with the copy of the rows that the next one shares with it."""
        rows, columns = cls.size_of(tiling, scale, max_rows)
        overlap = (tiling.tops[0] + tiling.size[0] - tiling.tops[1]) * scale if len(tiling.tops) > max_rows else 0
        return 4 * (rows + overlap) * columns * (channels + (not summed))

    def _shared(self, axis: int, length: int) -> list[tuple[int, int]]:
        """From where to where along one axis tiles overlap, within the first `length` pixels of the upscaled image."""
        starts, size = self.starts[axis], self.tiling.size[axis]
        return [(self.scale * following, min(self.scale * (start + size), length))
                for start, following in zip(starts, starts[1:]) if self.scale * following < length]

    @staticmethod
    def _ramp(size: int) -> torch.Tensor:
        """Weights of one tile along one axis: whole numbers, so that their sums are exact."""
        ramp = torch.arange(1, size + 1, dtype=torch.float32)
        return torch.minimum(ramp, ramp.flip(0))

    def _sum(self, axis: int, first: int, count: int) -> torch.Tensor:
        """Sum of the weights of some tiles along one axis, from the first one's first pixel on."""
        ramp, starts = self.ramps[axis], self.starts[axis][first:first + count]
        total = ramp.new_zeros((starts[-1] - starts[0]) * self.scale + len(ramp))
        for start in starts:
            total[(start - starts[0]) * self.scale:][:len(ramp)] += ramp
        return total

    def _axis_weights(self, axis: int, first: int, count: int) -> tuple[torch.Tensor, int, int]:
        """Share of neighbouring tiles in the weights along one axis, and from where to where it is all of them."""
        key = (axis, first, count)
        if key not in self.weights:
            own = self._sum(axis, first, count)
            share = own / self.totals[axis][self.starts[axis][first] * self.scale:][:len(own)]
            alone = (share == 1).nonzero().flatten().tolist()
            bounds = (alone[0], alone[-1] + 1) if alone else (len(own), len(own))
            self.weights[key] = (to_device(share, self.image.device), *bounds)
        return self.weights[key]

    def add(self, block: Block, image: torch.Tensor) -> None:
        """Blends an upscaled block.

        Args:
            block: Where it belongs; in the strip at hand.
            image: of shape (c, h, w).
        """
        image = image.permute(1, 2, 0)
        wy, top, bottom = self._axis_weights(0, block.row, block.rows)
        wx, left, right = self._axis_weights(1, block.column, block.columns)
        y = self.tiling.tops[block.row] * self.scale - self.top
        x = self.tiling.lefts[block.column] * self.scale
        height, width = len(wy), len(wx)
        if image.shape[:2] != (height, width):
            raise ValueError(f'Expected a block of {height}x{width} pixels, but got {tuple(image.shape[:2])}.')
        if self.summed:
            weight = (wy[:, None] * wx).unsqueeze(2)
            self.image[y:y + height, x:x + width].addcmul_(image.to(self.image.dtype), weight)
            return
        self.image[y + top:y + bottom, x + left:x + right] = image[top:bottom, left:right]
        for rows, columns in ((slice(0, top), slice(0, width)), (slice(bottom, height), slice(0, width)),
                              (slice(top, bottom), slice(0, left)), (slice(top, bottom), slice(right, width))):
            if rows.start < rows.stop and columns.start < columns.stop:
                there = (slice(y + rows.start, y + rows.stop), slice(x + columns.start, x + columns.stop))
                weight = (wy[rows, None] * wx[columns]).unsqueeze(2)
                self.total[there] += weight
                self.image[there].lerp_(image[rows, columns].to(self.image.dtype), weight / self.total[there])

    def finished(self) -> torch.Tensor:
        """The rows of the upscaled image that are complete after the strip at hand and were not before.

        Returns:
            Image of shape (rows, width, c); `advance` overwrites it.
        """
        following = self.first_row + self.max_rows
        end = self.height if following >= len(self.tiling.tops) else self.tiling.tops[following] * self.scale
        return self.image[:min(end, self.height) - self.top, :self.width]

    def advance(self) -> None:
        """Goes on to the next strip, keeping the rows that it shares with the one at hand."""
        bottom = self.tiling.tops[self.first_row + self.max_rows - 1] * self.scale + len(self.ramps[0])
        self.first_row += self.max_rows
        top = self.tiling.tops[self.first_row] * self.scale
        shared = max(0, bottom - top)
        for buffer in (self.image, self.total):
            buffer[:shared] = buffer[top - self.top:][:shared].clone()
        (self.image if self.summed else self.total)[shared:] = 0
        self.top = top
