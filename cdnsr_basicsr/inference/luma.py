"""Luma for networks with one channel, and colour images from the luma that they compute.

They see what BasicSR's `color: y` trains them on: the luma of ITU-R BT.601 in studio range, from 16 / 255 to 235 / 255.
"""
from __future__ import annotations

import torch
from typing import Iterable, Iterator

from .tiling import Rows, to_device

BLACK, SPAN = 16 / 255, 219 / 255
KEYS_A = -0.75  # of the bicubic kernel, as torch has it
ROWS, PIXELS = 256, 2**19  # of a strip, that get their colours at a time


def to_gray(image: torch.Tensor, dim: int) -> torch.Tensor:
    """An RGB image, whose channels are the axis `dim`, as one of a single channel, black being 0 and white 1."""
    red, green, blue = image.unbind(dim)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(dim)


def to_luma(image: torch.Tensor, dim: int) -> torch.Tensor:
    """The input of a network with one channel for a gray or RGB image in [0, 1], whose channels are the axis `dim`."""
    return BLACK + SPAN * (image if image.shape[dim] == 1 else to_gray(image, dim))


def from_luma(luma: torch.Tensor) -> torch.Tensor:
    """Converts luma to a gray image, with 0 for black and 1 for white."""
    return (luma - BLACK) / SPAN


def _taps(length: int, out_length: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels along an axis make those of the upscaled image from `first` to `last`, of shape (4, n), and weights.
    """
    position = (torch.arange(first, last, dtype=torch.float64) + 0.5) * length / out_length - 0.5
    start = position.floor()
    offsets = torch.arange(-1, 3).unsqueeze(1)
    x = (position - start - offsets).abs()
    near = ((KEYS_A + 2) * x - (KEYS_A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * KEYS_A - 4 * KEYS_A
    return (start + offsets).long().clamp_(0, length - 1), torch.where(x <= 1, near, far).float()


def bicubic(image: Rows, out_size: tuple[int, int], top: int, bottom: int, device: torch.device) -> torch.Tensor:
    """Rows of an image that is upsampled by torch's bicubic interpolation, at any scale.

    Args:
        image: The image.
        out_size: Height and width of the upscaled image.
        top, bottom: Which of its rows.
        device: Where they are wanted.

    Returns:
        Rows of shape (c, bottom - top, width).
    """
    rows, row_weights = _taps(image.height, out_size[0], top, bottom)
    columns, column_weights = (to_device(part, device) for part in _taps(image.width, out_size[1], 0, out_size[1]))
    first, last = int(rows.min()), int(rows.max()) + 1
    lq = to_device(image.rows(first, last), device)
    wide = sum(lq.index_select(2, index) * weight for index, weight in zip(columns, column_weights))
    rows, row_weights = to_device(rows - first, device), to_device(row_weights.unsqueeze(2), device)
    high: torch.Tensor = sum(wide.index_select(1, index) * weight for index, weight in zip(rows, row_weights))
    return high


def in_colours(strips: Iterable[torch.Tensor], image: Rows, out_size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """An upscaled image in colours: its luma is the network's, its Cb and Cr are bicubic.

    Args:
        strips: Luma as the network makes it of `to_luma(image)`, from top to bottom, of shape (rows, width, 1).
        image: The image in RGB.
        out_size: Height and width of the upscaled image.

    Yields:
        RGB of shape (rows, width, 3), in about [0, 1].
    """
    top = 0
    for strip in strips:
        for luma in strip.split(max(1, min(ROWS, PIXELS // strip.shape[1]))):
            colors = bicubic(image, out_size, top, top + len(luma), luma.device).permute(1, 2, 0)
            top += len(luma)
            yield colors + (from_luma(luma) - to_gray(colors, 2))  # R - Y and B - Y, which Cb and Cr are, stay
