"""Images as a browser shows them: 8 bits, no larger than needed, the same pixels as in the file at 100 %."""
from __future__ import annotations

import base64
import cv2
import io
import numpy as np
from PIL import Image
from typing import NamedTuple, Optional

from ..inference.difficulty_map import class_colors

LONGEST = 2048  # pixels of the side of an image that is shown as a whole
MARGIN = 4  # pixels around a part that bicubic interpolation looks at
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


class Box(NamedTuple):
    """A part of an image: its first column and row, its width and its height, in pixels."""
    x: int
    y: int
    width: int
    height: int

    def within(self, size: tuple[int, int]) -> Box:
        """The same part, moved and cut so that it lies in an image of this height and width."""
        width, height = (max(1, min(length, most)) for length, most in zip(self[2:], size[::-1]))
        return Box(max(0, min(self.x, size[1] - width)), max(0, min(self.y, size[0] - height)), width, height)


def in_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels of uint8 or uint16 as uint8."""
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which an image is shown as a whole."""
    factor = min(1., LONGEST / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image of shape (h, w, c) at another height and width: bicubic, or means of areas where it gets smaller."""
    interpolation = cv2.INTER_CUBIC if size[0] > pixels.shape[0] else cv2.INTER_AREA
    return cv2.resize(pixels, size[::-1], interpolation=interpolation).reshape(*size, pixels.shape[2])


def bicubic_part(pixels: np.ndarray, out_size: tuple[int, int], box: Box) -> np.ndarray:
    """A part of an image that is enlarged bicubically.

    Args:
        pixels: of shape (h, w, c), uint8 or uint16.
        out_size: Height and width of the whole result.
        box: The part of the result.

    Returns:
        Pixels of shape (box.height, box.width, c), uint8.
    """
    height, width, channels = pixels.shape
    down, across = height / out_size[0], width / out_size[1]  # pixels of the image for each one of the result
    top, left = (max(0, int(start * step) - MARGIN) for start, step in ((box.y, down), (box.x, across)))
    bottom, right = int((box.y + box.height) * down) + MARGIN, int((box.x + box.width) * across) + MARGIN
    part = np.ascontiguousarray(in_8_bits(pixels[top:bottom, left:right]))
    places = np.array([[across, 0, (box.x + 0.5) * across - 0.5 - left], [0, down, (box.y + 0.5) * down - 0.5 - top]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    enlarged = cv2.warpAffine(part, places, (box.width, box.height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return enlarged.reshape(box.height, box.width, channels)


def encoded(pixels: np.ndarray, profile: Optional[bytes], exact: bool = False) -> tuple[bytes, str]:
    """An image as a file for a browser.

    Args:
        pixels: of shape (h, w, c), uint8.
        profile: Its colour profile.
        exact: Whether every pixel has to be as it is: PNG. Otherwise JPEG, or WebP where there is alpha.

    Returns:
        The file, and its kind, such as 'png'.
    """
    image, file = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels,
                                  MODES[pixels.shape[2]]), io.BytesIO()
    if exact:
        image.save(file, 'PNG', compress_level=1, icc_profile=profile)
        return file.getvalue(), 'png'
    if pixels.shape[2] in (1, 3):
        image.save(file, 'JPEG', quality=92, subsampling=0, icc_profile=profile)
        return file.getvalue(), 'jpeg'
    profile = profile if pixels.shape[2] == 4 else None
    image.convert('RGBA').save(file, 'WebP', quality=92, method=1, icc_profile=profile)
    return file.getvalue(), 'webp'


def data_url(data: bytes, kind: str) -> str:
    """A file within a page."""
    return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'


def map_url(class_map: np.ndarray, num_classes: int) -> str:
    """The classes of an image's pixels, of shape (h, w), in the colours of a difficulty map."""
    height, width = shown_size(class_map.shape[:2])
    classes = cv2.resize(class_map.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    image, file = Image.fromarray(classes, 'P'), io.BytesIO()
    image.putpalette(class_colors(num_classes)[:, ::-1].tobytes())
    image.save(file, 'PNG')
    return data_url(file.getvalue(), 'png')
