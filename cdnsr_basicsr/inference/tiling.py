"""Cutting an image into tiles and blending upscaled tiles back together. Needs torch only."""
from __future__ import annotations

import torch
from torch.nn import functional as F


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


def tile_starts(length: int, patch_size: int, step: int) -> list[int]:
    """First pixels of the tiles along one axis: every `step` pixels, the last one shifted inside.

    >>> tile_starts(100, 64, 60)
    [0, 36]
    """
    starts = list(range(0, max(length - patch_size, 0) + 1, step))
    if starts[-1] + patch_size < length:
        starts.append(length - patch_size)
    return starts


class Tiling:
    """The tiles of one image.

    Every pixel is covered. An image smaller than a tile is padded for cutting and cropped back when blended.

    Args:
        height: Image height in pixels, at least 1.
        width: Image width in pixels, at least 1.
        patch_size: Side of a tile in pixels.
        step: Distance of neighbouring tiles in pixels, at most patch_size.

    Attributes:
        tops, lefts: First row / column of the tile rows / columns. Tiles are numbered row by row.
    """

    def __init__(self, height: int, width: int, patch_size: int, step: int) -> None:
        if height < 1 or width < 1:
            raise ValueError(f'Expected an image of at least 1x1 pixels, but got {height}x{width}.')
        if not 1 <= step <= patch_size:
            raise ValueError(f'Expected a step from 1 to patch_size {patch_size}, but got {step}.')
        self.height, self.width, self.patch_size, self.step = height, width, patch_size, step
        self.tops = tile_starts(height, patch_size, step)
        self.lefts = tile_starts(width, patch_size, step)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def cut(self, image: torch.Tensor) -> torch.Tensor:
        """Cuts an image of shape (c, height, width) into tiles of shape (n, c, patch_size, patch_size)."""
        if image.shape[-2:] != (self.height, self.width):
            raise ValueError(f'Expected an image of {self.height}x{self.width}, but got {tuple(image.shape)}.')
        image = pad_to(image, self.patch_size, self.patch_size)
        rows = image.unfold(1, self.patch_size, 1)[:, self.tops]  # (c, rows, w, p)
        tiles = rows.unfold(2, self.patch_size, 1)[:, :, self.lefts]  # (c, rows, columns, p, p), last two (y, x)
        return tiles.permute(1, 2, 0, 3, 4).reshape(len(self), image.shape[0], self.patch_size, self.patch_size)

    def blend(self, tiles: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Averages upscaled tiles where they overlap, the nearer tile centre counting more.

        The weight of a tile falls linearly to its edges and stays above zero. The result is
        sum(weight * tile) / sum(weight), computed as a running mean, which is exact where all tiles agree.

        Args:
            tiles: of shape (n, c, patch_size * scale, patch_size * scale).
            scale: Upsampling factor of the tiles.

        Returns:
            Image of shape (c, height * scale, width * scale).
        """
        size = self.patch_size * scale
        if tiles.shape[0] != len(self) or tiles.shape[-2:] != (size, size):
            raise ValueError(f'Expected {len(self)} tiles of {size}x{size}, but got {tuple(tiles.shape)}.')
        height, width = (max(length, self.patch_size) * scale for length in (self.height, self.width))
        ramp = torch.arange(1, size + 1, dtype=tiles.dtype, device=tiles.device)
        ramp = torch.minimum(ramp, ramp.flip(0))
        weight = ramp[:, None] * ramp
        image = tiles.new_zeros(tiles.shape[1], height, width)
        total = tiles.new_zeros(height, width)
        for tile, (top, left) in zip(tiles, ((top, left) for top in self.tops for left in self.lefts)):
            window = (..., slice(top * scale, top * scale + size), slice(left * scale, left * scale + size))
            total[window] += weight
            image[window] += (weight / total[window]) * (tile - image[window])
        return image[:, :self.height * scale, :self.width * scale]

    def class_map(self, classes: torch.Tensor) -> torch.Tensor:
        """Says for every pixel which class the tile that counts most there has.

        Args:
            classes: of shape (n, ).

        Returns:
            Map of shape (height, width).
        """
        grid = classes.view(len(self.tops), len(self.lefts))
        return grid[self._owner(self.tops, self.height)][:, self._owner(self.lefts, self.width)]

    def _owner(self, starts: list[int], length: int) -> torch.Tensor:
        """Index of the tile whose centre is nearest, for every pixel along one axis."""
        middles = [(start + following + self.patch_size) / 2 for start, following in zip(starts, starts[1:])]
        return torch.bucketize(torch.arange(length) + 0.5, torch.tensor(middles, dtype=torch.float32))
