"""The difficulty map: an image that shows the class of each part of an image."""
from __future__ import annotations

import cv2
import numpy as np
from pathlib import Path

MAP_SIDES = (512, 2048)  # the map's longer side is brought between these, in pixels


def class_colors(num_classes: int) -> np.ndarray:
    """One BGR colour per class, of shape (num_classes, 3), uint8: green, over yellow, to red."""
    hardness = np.linspace(0, 1, num_classes)
    red, green = np.minimum(1, 2 * hardness), np.minimum(1, 2 * (1 - hardness))
    return np.round(255 * np.stack([np.zeros_like(red), green, red], axis=1)).astype(np.uint8)


def draw_difficulty_map(image: np.ndarray, class_map: np.ndarray, num_classes: int) -> np.ndarray:
    """Colours an image by class and puts a legend with the classes' shares of the area below.

    Args:
        image: of shape (H, W, 3), uint8, BGR; or (H, W), gray.
        class_map: of shape (h, w), class of each LR pixel; shown at the image's size.
        num_classes: Number of classes M.

    Returns:
        Image of shape (H + legend, max(W, legend's width), 3), uint8, BGR.
    """
    colors, image = class_colors(num_classes), in_bgr(image)
    full = cv2.resize(class_map.astype(np.uint8), (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST)
    tinted = cv2.addWeighted(image, 0.6, colors[full], 0.4, 0)
    edges = np.zeros(full.shape, bool)
    edges[1:] |= full[1:] != full[:-1]
    edges[:, 1:] |= full[:, 1:] != full[:, :-1]
    tinted[edges] = 255

    # bincount would make 64-bit numbers of them all
    shares = [np.count_nonzero(class_map == i) / class_map.size for i in range(num_classes)]
    row, box, width = 26, 16, 190
    columns = max(1, image.shape[1] // width)
    rows = -(-num_classes // columns)
    picture = np.full((image.shape[0] + rows * row, max(image.shape[1], width), 3), 255, np.uint8)
    picture[:image.shape[0], :image.shape[1]] = tinted
    for i, share in enumerate(shares):
        x, y = i % columns * width + 6, image.shape[0] + i // columns * row + 5
        cv2.rectangle(picture, (x, y), (x + box, y + box), tuple(int(value) for value in colors[i]), -1)
        name = 'easiest' if i == 0 else 'hardest' if i == num_classes - 1 else ''
        cv2.putText(picture, f'{i} {name} {100 * share:.1f} %', (x + box + 6, y + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.45,
                    (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def in_bgr(image: np.ndarray) -> np.ndarray:
    """An image of shape (H, W, 3), or a gray one of shape (H, W), with three channels."""
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def draw_over(pixels: np.ndarray, class_map: np.ndarray, num_classes: int) -> np.ndarray:
    """Draws the classes over an image, at a size suitable for viewing.

    Args:
        pixels: of shape (h, w, c), uint8, uint16 or float in [0, 1], gray or RGB, with or without alpha.
        class_map: of shape (h, w), class of each pixel.
        num_classes: Number of classes M.

    Returns:
        Image of shape (H, W, 3), uint8, BGR.
    """
    height, width, channels = pixels.shape
    factor = min(MAP_SIDES[1] / max(height, width), max(1, -(-MAP_SIDES[0] // max(height, width))))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    image = np.ascontiguousarray(pixels[..., 2::-1] if channels >= 3 else pixels[..., 0])
    if image.dtype.kind == 'f':
        image = (image.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    image = cv2.resize(image, size, interpolation=interpolation)
    image = (image // 256).astype(np.uint8) if image.dtype == np.uint16 else image
    return draw_difficulty_map(image, class_map, num_classes)


def map_bytes(pixels: np.ndarray) -> int:
    """What `save_difficulty_map` takes: copies of the image and of the classes, and some of what it draws."""
    height, width, channels = pixels.shape
    copied: int = height * width * (min(channels, 3) * pixels.itemsize + 3)
    return copied + 12 * 3 * MAP_SIDES[1]**2


def save_difficulty_map(path: Path, pixels: np.ndarray, class_map: np.ndarray, num_classes: int) -> None:
    """Writes what `draw_over` draws as PNG.

    Raises:
        OSError: The file cannot be written.
    """
    encoded = cv2.imencode('.png', draw_over(pixels, class_map, num_classes))[1]
    # not cv2.imwrite, which dies of names that are not UTF-8, nor tofile, which is silent on a full disk
    path.write_bytes(encoded.tobytes())
