"""Photographs with ground truth, and the quality of their upscaled images."""
from __future__ import annotations

import numpy as np
import torch
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, TypeVar

from .data.prepare import has_pairs, lq_of, make_lq, read_bgr, smallest
from .inference.image_io import ImageError, list_images
from .inference.luma import to_luma
from .options import OptionError

Read = TypeVar('Read')


class Pair(NamedTuple):
    """A photograph and its LQ version: uint8 RGB of shapes (h*scale, w*scale, 3) and (h, w, 3)."""
    name: str
    lq: np.ndarray
    gt: np.ndarray


class Unusable(OptionError):
    """A photograph that cannot be measured with."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


def read_pairs(folder: str,
               scale: int,
               limit: Optional[int] = None,
               left_out: Optional[list[tuple[str, str]]] = None,
               most: Optional[int] = None) -> Iterator[Pair]:
    """Reads photographs; makes the LQ images by MATLAB's bicubic, if the folder has none.

    Args:
        folder: Folder of photographs, or one with gt/ and lq/ as `basicsr prepare --whole` writes it.
        scale: Downscaling factor.
        limit: Most photographs to read, the first ones. Default: all.
        left_out: Where photographs that cannot be read or are too small are named, with the reason. Default: they are
            errors.
        most: Most of these to read, evenly spread. Default: all.

    Raises:
        OptionError: The folder is missing or empty, or its images do not fit together, or none can be used.
    """
    root = Path(folder)
    has_lq, paths = _photographs(root)

    def read(path: Path) -> Pair:
        gt = _read(path)
        least = scale if has_lq else smallest(scale)
        if min(gt.shape[:2]) < least:
            raise Unusable(str(path), f'is smaller than {least} pixels')
        if has_lq:
            lq = _read(lq_of(path, root))
            if gt.shape[:2] != (scale * lq.shape[0], scale * lq.shape[1]):
                raise OptionError(str(path), f'is not x{scale} of its LQ image')
        else:
            gt, lq = make_lq(gt, scale)
        return Pair(path.stem, np.ascontiguousarray(lq), np.ascontiguousarray(gt))

    yield from _usable(_spread(paths[:limit], most), read, folder, left_out)


def read_lq(folder: str,
            scale: int,
            limit: Optional[int] = None,
            left_out: Optional[list[tuple[str, str]]] = None,
            most: Optional[int] = None) -> Iterator[tuple[np.ndarray, Optional[np.ndarray]]]:
    """Reads images to upscale, unchanged, and their ground truth if the folder has both, in lq/ and gt/.

    Args:
        folder, scale, limit, left_out, most: See read_pairs.

    Yields:
        uint8 RGB of shape (h, w, 3), and of (h*scale, w*scale, 3) or None.

    Raises:
        OptionError: See read_pairs.
    """
    has_gt, paths = _photographs(Path(folder))
    if has_gt:
        yield from ((pair.lq, pair.gt) for pair in read_pairs(folder, scale, limit, left_out, most))
    else:
        yield from ((lq, None) for lq in _usable(_spread(paths[:limit], most), _read, folder, left_out))


def photographs_in(folder: str, limit: Optional[int] = None, most: Optional[int] = None) -> int:
    """How many photographs are read of a folder, or are left out; see read_pairs."""
    return len(_spread(_photographs(Path(folder))[1][:limit], most))


def _photographs(root: Path) -> tuple[bool, list[Path]]:
    """Whether a folder has LQ images and GT images, and its photographs: the latter, if so."""
    if not root.is_dir():
        raise OptionError(str(root), 'no such folder; expected photographs')
    has_lq = has_pairs(root)
    paths, _, closed = list_images(root / 'gt' if has_lq else root, by_content=True)
    for place, reason in closed:
        raise OptionError(str(place), f'cannot be listed: {reason}')
    if not paths:
        raise OptionError(str(root), 'contains no photographs')
    return has_lq, paths


def _spread(paths: list[Path], most: Optional[int]) -> list[Path]:
    """At most so many of these, evenly spread."""
    return paths if most is None else paths[::-(-len(paths) // most)]


def _usable(paths: Sequence[Path], read: Callable[[Path], Read], folder: str,
            left_out: Optional[list[tuple[str, str]]]) -> Iterator[Read]:
    """What is read of those that can be used; the others are named."""
    found = False
    for number, path in enumerate(paths, 1):
        try:
            image = read(path)
        except Unusable as error:
            if left_out is None:
                raise
            left_out.append((error.path, error.reason))
            if number == len(paths) and not found:
                raise OptionError(folder, f'contains no photograph that can be used, such as {error}') from error
        else:
            found = True
            yield image


class PairStore:
    """Pairs in a temporary folder: made once, loaded again for every measurement, also by other processes.

    Args:
        folder: An empty folder.
        data, scale, limit, left_out: See read_pairs.

    Attributes:
        sizes: Height and width of each GT image.
    """

    def __init__(self,
                 folder: str,
                 data: str,
                 scale: int,
                 limit: Optional[int] = None,
                 left_out: Optional[list[tuple[str, str]]] = None) -> None:
        self.folder, self.sizes = folder, []
        for number, pair in enumerate(read_pairs(data, scale, limit, left_out)):
            np.savez(f'{folder}/{number}.npz', lq=pair.lq, gt=pair.gt)
            self.sizes.append(pair.gt.shape[:2])

    @property
    def megapixels(self) -> float:
        """Of all GT images together."""
        return sum(height * width for height, width in self.sizes) / 1e6

    def lq(self, number: int) -> np.ndarray:
        return np.load(f'{self.folder}/{number}.npz')['lq']

    def gt(self, number: int) -> np.ndarray:
        return np.load(f'{self.folder}/{number}.npz')['gt']


def _read(path: Path) -> np.ndarray:
    """A photograph as uint8 RGB of shape (h, w, 3)."""
    try:
        return np.ascontiguousarray(read_bgr(path)[0][..., ::-1])
    except ImageError as error:
        raise Unusable(str(path), f"cannot be read: {str(error).removeprefix(f'{path}: ')}") from error


def to_tensor(image: np.ndarray, channels: int = 3) -> torch.Tensor:
    """uint8 RGB of shape (h, w, 3) as a tensor of shape (1, channels, h, w) in [0, 1]; of one channel it is luma."""
    tensor = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).float().div(255).contiguous()
    return tensor if channels == 3 else to_luma(tensor, 1)


def to_image(tensor: torch.Tensor) -> np.ndarray:
    """The reverse, rounded and clipped."""
    return tensor[0].permute(1, 2, 0).mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def border_of(size: Sequence[int], border: int) -> int:
    """Pixels left out at each side of an image of this height and width: none, if it is hardly larger than that."""
    return border if min(size) > 2 * border + 11 else 0  # 11: SSIM's window


def quality(image: np.ndarray, gt: np.ndarray, border: int, with_ssim: bool = True) -> tuple[float, float]:
    """PSNR in dB and SSIM over all channels, as BasicSR computes them.

    Args:
        image: uint8 of shape (h, w, c).
        gt: Of the same shape.
        border: Pixels left out at each side; see border_of.
        with_ssim: Whether to compute SSIM, which takes much longer; NaN otherwise.
    """
    from basicsr.metrics import calculate_psnr, calculate_ssim
    border = border_of(gt.shape[:2], border)
    ssim = calculate_ssim(image, gt, border) if with_ssim and min(gt.shape[:2]) >= 11 else float('nan')
    return float(calculate_psnr(image, gt, border)), float(ssim)


def pooled_psnr(psnrs: Sequence[float], sizes: Iterable[Sequence[int]], border: int) -> float:
    """PSNR in dB of all pixels of several images together.

    Args:
        psnrs: PSNR of each, as `quality` computes it.
        sizes: Height and width of each.
        border: See `quality`.
    """
    kept = [[side - 2 * border_of(size, border) for side in size] for size in sizes]
    with np.errstate(divide='ignore'):  # images without an error have an infinite PSNR, together, too
        return float(-10 * np.log10(np.average(10**(-np.array(psnrs) / 10), weights=np.prod(kept, axis=1))))


def quality_of(result: torch.Tensor, gt: np.ndarray, border: int, with_ssim: bool = True) -> tuple[float, float]:
    """As `quality`, of a network's output: of RGB, or of luma if it has one channel; NaN if it is not finite.

    Args:
        result: of shape (1, c, h, w), in about [0, 1].
        gt: uint8 RGB of shape (h, w, 3).
        border, with_ssim: See `quality`.
    """
    if not result.isfinite().all():
        return float('nan'), float('nan')
    gt = gt if result.shape[1] == 3 else to_image(to_tensor(gt, 1))
    return quality(to_image(result), gt, border, with_ssim)


def luma_psnr_of(result: torch.Tensor, gt: np.ndarray, border: int) -> float:
    """PSNR in dB of the Y channel, as papers report it and BasicSR computes it; NaN if the result is not finite.

    Args:
        result, gt, border: See `quality_of`.
    """
    from basicsr.metrics import calculate_psnr
    if result.shape[1] != 3 or not result.isfinite().all():
        return quality_of(result, gt, border, with_ssim=False)[0]
    # BasicSR takes the channels for BGR
    images = [image[..., ::-1] for image in (to_image(result), gt)]
    return float(calculate_psnr(*images, border_of(gt.shape[:2], border), test_y_channel=True))
