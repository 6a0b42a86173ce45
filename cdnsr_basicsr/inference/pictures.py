"""Converts images between files, PIL images and arrays, and the tensors that networks take."""
from __future__ import annotations

import itertools
import math
import numpy as np
import torch
from pathlib import Path
from PIL import Image, ImageOps
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence

from ..memory import MemoryLimit
from ..options import OptionError, shown
from .image_io import ImageError, read_image
from .luma import from_luma, in_colours, to_gray, to_luma

if TYPE_CHECKING:
    from .upscaler import Plan, Upscaler

NO_ROWS = np.empty(0)
CONVERTED_ROWS, CONVERTED_PIXELS = 256, 2**19  # of a strip, that become pixels at a time: small, for the cache
CONVERTED_BYTES, COLOURED_BYTES = 48, 96  # that each of these takes meanwhile; where its colours are bicubic


class NotFinite(ImageError):
    """An image was computed with values that are not finite."""

    def __init__(self) -> None:
        super().__init__('the network computes values for it that are not finite, even in float32')


class Opened(NamedTuple):
    """An image as pixels.

    Attributes:
        pixels: of shape (h, w, c), uint8, uint16 or float in [0, 1]; c is 1 for gray, 2 for gray and alpha, 3 for RGB,
            4 for RGBA.
        like: Makes of such pixels an image of the kind that was opened.
        mapped_bytes: What of the pixels takes memory only when it is read.
    """
    pixels: np.ndarray
    like: Callable[[np.ndarray], Any]
    mapped_bytes: int = 0


def opened(image: Any, memory_limit: Optional[MemoryLimit] = None) -> Opened:
    """Opens a path, a PIL image, an array (h, w) or (h, w, c), or a tensor (1, c, h, w).

    Args:
        image: It.
        memory_limit: Of the memory in which a file is read; see read_image.

    Raises:
        OptionError: It is none of these.
        ImageError: The file cannot be read.
    """
    if isinstance(image, (str, Path)):
        pixels = read_image(image, memory_limit=memory_limit).pixels
        return Opened(pixels, lambda pixels: pixels, pixels.nbytes)
    if isinstance(image, Image.Image):
        return _opened_pil(ImageOps.exif_transpose(image))
    if isinstance(image, torch.Tensor) and image.dim() == 4 and len(image) == 1:
        pixels = image[0].permute(1, 2, 0).float().cpu().numpy()
        return Opened(pixels, lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0))
    if not isinstance(image, np.ndarray):
        raise OptionError(
            'image', 'expected a path, a PIL image, an array (h, w) or (h, w, c), or a tensor '
            f'(1, c, h, w), but got {type(image).__name__}')
    if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != 'f':
        raise OptionError('image', f'expected an array of uint8, uint16 or float in [0, 1], but got {image.dtype}')
    flat = image.ndim == 2
    pixels = image[..., None] if flat else image
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or not pixels.size:
        raise OptionError('image', f'expected an array of shape (h, w) or (h, w, 1 to 4), but got {image.shape}')
    return Opened(pixels, lambda result: result[..., 0] if flat else result)


def _opened_pil(image: Image.Image) -> Opened:
    """Pixels of a PIL image; modes other than gray and RGB become RGB, transparent colours become alpha."""
    profile = image.info.get('icc_profile')
    if image.mode.startswith('I;16'):
        pixels = np.asarray(image).astype(np.uint16)
    else:
        if image.mode not in ('L', 'LA', 'RGB', 'RGBA'):
            if image.mode in ('I', 'F'):
                raise OptionError('image', f'expected a PIL image of 8 or 16 bits, but got mode {shown(image.mode)}')
            profile = profile if image.mode in ('1', 'P', 'PA') else None  # of CMYK, Lab and the like it is not RGB's
            mode = 'L' if image.mode == '1' else 'RGBA' if image.mode == 'PA' or 'transparency' in image.info else 'RGB'
            image = image.convert(mode)
        pixels = np.asarray(image)

    def like(result: np.ndarray) -> Image.Image:
        made = Image.fromarray(result[..., 0] if result.shape[2] == 1 else result)
        if profile:
            made.info['icc_profile'] = profile
        return made

    return Opened(pixels[..., None] if pixels.ndim == 2 else pixels, like)


def white_of(dtype: np.dtype) -> int:
    """The value of white."""
    return 1 if dtype.kind == 'f' else int(np.iinfo(dtype).max)


class PictureRows:
    """Some channels of an image as Rows for a network: RGB in [0, 1], or luma.

    Args:
        pixels: of shape (h, w, c), uint8, uint16 or float in [0, 1]; c is 1 or 3.
        channels: Channels of the network: 3, or 1 for gray images.
    """

    def __init__(self, pixels: np.ndarray, channels: int) -> None:
        self.pixels, self.channels = pixels, channels
        self.height, self.width = pixels.shape[:2]

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        part = self.pixels[top:bottom].astype(np.float32)
        part /= white_of(self.pixels.dtype)
        image = torch.from_numpy(part).permute(2, 0, 1)
        return to_luma(image, 0) if self.channels == 1 else image.expand(3, -1, -1)


def rows_together(width: int) -> int:
    """Rows of a strip that become pixels at a time."""
    return max(1, min(CONVERTED_ROWS, CONVERTED_PIXELS // width))


def to_arrays(strips: Iterable[torch.Tensor], dtype: np.dtype, gray: bool) -> Iterator[np.ndarray]:
    """Turns strips of an image into pixels on the host. While a GPU computes one, the one before is handed out.

    Args:
        strips: of shape (rows, w, c), in about [0, 1].
        dtype: uint8, uint16 or a float.
        gray: Whether to make one channel of three.

    Raises:
        NotFinite: Some values are no finite numbers, which pixels would not tell.
    """
    white = white_of(dtype)

    def converted(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = to_gray(part, 2) if gray and part.shape[2] == 3 else part
        total = part.sum()  # finite where all values are
        if dtype.kind == 'f':
            return part.clamp(0, 1), total
        return part.mul(white).round_().clamp_(0, white).to(torch.uint8 if white == 255 else torch.int32), total

    def finished(values: torch.Tensor, total: torch.Tensor) -> np.ndarray:
        if not math.isfinite(total):
            raise NotFinite
        return values.numpy().astype(dtype, copy=False)

    def arrived(parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
                copied: Optional[torch.cuda.Event]) -> Iterator[np.ndarray]:
        if copied is not None:
            copied.synchronize()
        return itertools.starmap(finished, parts)

    waiting: tuple[list[tuple[torch.Tensor, torch.Tensor]], Optional[torch.cuda.Event]] = ([], None)
    for strip in strips:
        parts = map(converted, strip.split(rows_together(strip.shape[1])))
        if not strip.is_cuda:
            yield from itertools.starmap(finished, parts)
            continue
        host = [(in_pinned_memory(values), in_pinned_memory(total)) for values, total in parts]
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(strip.device))
        yield from arrived(*waiting)  # of the strip before, while the GPU is busy with this one
        waiting = host, copied
    yield from arrived(*waiting)


def in_pinned_memory(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor on a GPU will be on the host when the GPU gets to it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def upscaled_strips(upscaler: Upscaler,
                    pixels: np.ndarray,
                    plan: Optional[Plan] = None) -> tuple[Plan, Iterator[np.ndarray]]:
    """Upscales pixels of shape (h, w, c), c being 1 for gray, 2 for gray and alpha, 3 for RGB, 4 for RGBA.

    Gray is computed as three equal channels, if the network takes three. If it takes one, an image in colours gets its
    luma from the network, and its Cb and Cr by bicubic interpolation. Alpha is upscaled like a gray image.

    Args:
        upscaler: The engine.
        pixels: The image.
        plan: Of the engine, for `color_rows`. Default: that is decided here.

    Returns:
        What is run for the colours, and strips of such pixels (rows, w * scale, c).
    """
    colors, alpha = parted(pixels)
    plane = color_rows(upscaler, pixels).pixels
    with_alpha = varies(alpha)
    width = upscaler.size_of(*pixels.shape[:2])[1]
    each = COLOURED_BYTES if plane.shape[2] > upscaler.channels else CONVERTED_BYTES
    with upscaler.reserving(each * max(width, CONVERTED_PIXELS)), upscaler.beside(1 + with_alpha):
        plan, strips = upscaled_plane(upscaler, plane, plan)
        alphas = upscaled_plane(upscaler, alpha)[1] if with_alpha else iter(())
    if plane.shape[2] < colors.shape[2]:
        strips = (np.repeat(strip, 3, axis=2) for strip in strips)
    if not alpha.size:
        return plan, strips
    if not with_alpha:  # mostly it is opaque everywhere
        level = alpha.flat[0]
        return plan, (np.concatenate([strip, np.full((*strip.shape[:2], 1), level)], axis=2) for strip in strips)
    return plan, side_by_side(strips, alphas)


def side_by_side(*images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The channels of images of one size together. Their strips need not have the same rows."""
    strips: list[np.ndarray] = [next(image, NO_ROWS) for image in images]
    while all(len(strip) for strip in strips):
        rows = min(len(strip) for strip in strips)
        yield np.concatenate([strip[:rows] for strip in strips], axis=2)
        strips = [strip[rows:] if len(strip) > rows else next(image, NO_ROWS) for strip, image in zip(strips, images)]


def color_rows(upscaler: Upscaler, pixels: np.ndarray) -> PictureRows:
    """The colours as `upscaled_strips` passes them to the engine."""
    colors, _ = parted(pixels)
    gray = upscaler.channels == 1 and colors.shape[2] == 3 and is_gray(pixels)
    return PictureRows(colors[..., :1] if gray else colors, upscaler.channels)


def planned_rows(upscaler: Upscaler, pixels: np.ndarray) -> Iterator[PictureRows]:
    """The images that `upscaled_strips` plans: the colours, and alpha if it varies."""
    colors, alpha = parted(pixels)
    yield PictureRows(colors, upscaler.channels)
    if varies(alpha):
        yield PictureRows(alpha, upscaler.channels)


def parted(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gray or RGB of an image (h, w, c), and its alpha, with zero channels if there is none."""
    colors = pixels.shape[2] // 3 * 2 + 1
    return pixels[..., :colors], pixels[..., colors:]


def varies(alpha: np.ndarray) -> bool:
    """Whether alpha varies."""
    return bool((alpha != alpha[:1, :1]).any())


def is_gray(pixels: np.ndarray) -> bool:
    """Whether the first three channels of an image (h, w, c) are equal everywhere."""
    blocks = (pixels[top:top + CONVERTED_ROWS] for top in range(0, len(pixels), CONVERTED_ROWS))
    return all((block[..., 1:3] == block[..., :1]).all() for block in blocks)


def upscaled_plane(upscaler: Upscaler,
                   pixels: np.ndarray,
                   plan: Optional[Plan] = None) -> tuple[Plan, Iterator[np.ndarray]]:
    """Upscales gray or RGB pixels, of shape (h, w, 1 or 3); see `upscaled_strips`."""
    rows = PictureRows(pixels, upscaler.channels)
    plan = upscaler.plan(rows) if plan is None else plan
    strips = upscaler.strips(rows, plan)
    if upscaler.channels == 1 and pixels.shape[2] == 3:
        strips = in_colours(strips, PictureRows(pixels, 3), upscaler.size_of(rows.height, rows.width))
    elif upscaler.channels == 1:
        strips = map(from_luma, strips)
    return plan, to_arrays(strips, pixels.dtype, gray=pixels.shape[2] == 1)
