"""From a folder of photographs to aligned GT and LQ patches in BasicSR's LMDB format."""
from __future__ import annotations

import cv2
import lmdb
import numpy as np
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tqdm import tqdm
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, Tuple, TypeVar, Union

from ..files import replace_folder_when_done
from ..inference.image_io import MAX_SIDES, ImageError, list_images, read_image
from ..options import OptionError
from ..settings import MAX_MEGAPIXELS

PNG_COMPRESSION = 1
MARKER = 'meta_info.txt'  # written last: a folder that has it is finished
PARTS = ('gt.lmdb', 'lq.lmdb', 'teacher.lmdb', 'gt', 'lq', MARKER)  # of a prepared dataset, with its labels

Item = TypeVar('Item')
Result = TypeVar('Result')


class Pair(NamedTuple):
    """A GT image and its LQ image, or patches of them: uint8 BGR or gray of shapes (h*scale, w*scale, c) and (h, w, c).
    """
    key: str
    gt: np.ndarray
    lq: np.ndarray


class Prepared(NamedTuple):
    """What a run of `prepare` did.

    Attributes:
        pairs: Number of pairs written.
        unreadable: Path of each photograph that cannot be read, and why.
        too_small: Photographs that are smaller than a patch, or than what can be made smaller.
        notes: Path of each photograph of which only a part was used, and which, such as the first frame.
        left_out: Files that are no images.
    """
    pairs: int
    unreadable: List[Tuple[str, str]]
    too_small: List[str]
    notes: List[Tuple[str, str]]
    left_out: List[Path]


def patch_starts(length: int, crop: int, step: int) -> list[int]:
    """First pixels of the patches along one axis: every `step` pixels, the last one shifted inside.

    >>> patch_starts(100, 64, 60)
    [0, 36]
    """
    starts = list(range(0, max(length - crop, 0) + 1, step))
    if starts[-1] + crop < length:
        starts.append(length - crop)
    return starts


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Maps in threads, in order, never running more than a few items ahead of the consumer."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def read_bgr(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads a photograph as BasicSR's datasets have it.

    Returns:
        uint8 BGR of shape (h, w, 3), upright: gray three times, without alpha, 16 bits rounded to 8; what of the file
        was not read.

    Raises:
        ImageError: The file cannot be read.
    """
    picture = read_image(path, max_megapixels)
    pixels = picture.pixels[..., [2, 1, 0] if picture.pixels.shape[2] >= 3 else [0, 0, 0]]
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return pixels, picture.notes


def to_gray(image: np.ndarray) -> np.ndarray:
    """BGR of shape (h, w, 3) as gray of shape (h, w, 1), the luma of BT.601 from 0 to 255; uint8."""
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., np.newaxis]


def resize(image: np.ndarray, factor: float) -> np.ndarray:
    """MATLAB's bicubic imresize of a uint8 image of shape (h, w, c), rounded to uint8 once, at the end."""
    from basicsr.utils.matlab_functions import imresize
    resized = imresize(image.astype(np.float32) / 255, factor)
    return np.round(np.clip(resized, 0, 1) * 255).astype(np.uint8)


def smallest(scale: int) -> int:
    """Smallest side of an image that BasicSR's imresize can downscale by `scale`."""
    return 2 * scale


def make_lq(image: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops an image to a multiple of `scale`, at the top left, and makes its LQ image.

    Args:
        image: uint8 of shape (h, w, c), h and w at least `smallest(scale)`.
        scale: Downscaling factor.

    Returns:
        GT and LQ image.
    """
    height, width = image.shape[0] // scale * scale, image.shape[1] // scale * scale
    gt = np.ascontiguousarray(image[:height, :width])
    return gt, resize(gt, 1 / scale)


def patch_keys(paths: list[Path], root: Path) -> dict[Path, str]:
    """Names images for LMDB: the path below the root, in letters, digits, '-' and '_', and unique."""
    keys: dict[Path, str] = {}
    taken = set()
    for path in paths:
        name = re.sub(r'[^A-Za-z0-9_-]', '_', str(path.relative_to(root).with_suffix('')))[-200:]
        key, number = name, 1
        while key in taken:
            number += 1
            key = f'{name}-{number}'
        taken.add(key)
        keys[path] = key
    return keys


def has_pairs(root: Path) -> bool:
    """Whether a folder holds GT and LQ images that belong together, in gt/ and lq/."""
    return (root / 'gt').is_dir() and (root / 'lq').is_dir()


def lq_of(path: Path, root: Path) -> Path:
    """The LQ image of a GT image, of the same name in lq/; where its ending is another, the first of these.

    Args:
        path: The GT image, in gt/ of `root`.
        root: See has_pairs.
    """
    same = root / 'lq' / path.relative_to(root / 'gt')
    if same.exists() or not same.parent.is_dir():
        return same
    return min((other for other in same.parent.iterdir() if other.stem == path.stem), default=same)


def cut_aligned(gt: np.ndarray, lq: np.ndarray, name: str, scale: int, crop: int, step: int) -> Iterator[Pair]:
    """Cuts aligned patches from a GT and an LQ image; see cut_pairs, whose names have `name` as their beginning."""
    for top in patch_starts(gt.shape[0], crop, step):
        for left in patch_starts(gt.shape[1], crop, step):
            rows, columns = slice(top // scale, (top + crop) // scale), slice(left // scale, (left + crop) // scale)
            yield Pair(f'{name}_y{top:05d}_x{left:05d}', gt[top:top + crop, left:left + crop], lq[rows, columns])


def cut_pairs(image: np.ndarray, key: str, scale: int, scales: list[float], crop: int, step: int) -> Iterator[Pair]:
    """Cuts aligned patches from an image and from smaller versions of it.

    Args:
        image: uint8 of shape (h, w, c).
        key: Name of the image; patches are called `<key>_s<thousandths of scale>_y<top>_x<left>`.
        scale: LQ is this much smaller than GT.
        scales: Sizes to cut from, as fractions of the image's.
        crop: Side of a GT patch, a multiple of scale.
        step: Distance of neighbouring GT patches, a multiple of scale.
    """
    for fraction in scales:
        height, width = (int(np.ceil(length * fraction)) for length in image.shape[:2])
        if min(height, width) < max(crop, smallest(scale), smallest(2)):
            continue
        gt, lq = make_lq(image if fraction == 1 else resize(image, fraction), scale)
        yield from cut_aligned(gt, lq, f'{key}_s{round(1000 * fraction):04d}', scale, crop, step)


def encode(image: np.ndarray) -> bytes:
    """PNG bytes of an image."""
    ok, data = cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION])
    assert ok, f'OpenCV could not encode an image of {image.shape}'
    return data.tobytes()


@contextmanager
def finished_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a hidden folder beside `out`, which takes its place when the block ends without an error.

    Raises:
        OptionError: `out` holds a finished dataset and `overwrite` is not set, or it holds files of another kind.
    """
    if out.exists():
        if not out.is_dir():
            raise OptionError(f'out={out}', 'is a file; expected a folder')
        strange = [
            path.name for path in out.iterdir() if path.name not in PARTS and not path.name.startswith('labels_')
        ]
        if strange:
            raise OptionError(f'out={out}', f'contains {strange[0]}, which is not part of a prepared dataset; choose a '
                              'new folder')
        if any(out.iterdir()) and not overwrite:
            raise OptionError(f'out={out}', 'is already prepared; overwrite=True replaces it, labels included')
    with replace_folder_when_done(out) as work:
        yield work


@contextmanager
def new_database(path: Path) -> Iterator[Any]:
    """Yields BasicSR's LmdbMaker, which is finished when the block ends, unless it ends with an error.

    Raises:
        OSError: It cannot be written.
    """
    from basicsr.utils.lmdb_util import LmdbMaker
    maker = LmdbMaker(str(path), compress_level=PNG_COMPRESSION)
    try:
        yield maker
        maker.close()
    except BaseException as error:
        maker.txn.abort()
        maker.env.close()
        maker.txt_file.close()
        if isinstance(error, lmdb.Error):
            raise OSError(f'{path.name} cannot be written; is the disk full? ({error})') from error
        raise


class PairWriter:
    """Writes pairs into gt.lmdb and lq.lmdb, or into the folders gt and lq as PNG files, and meta_info.txt."""

    def __init__(self, folder: Path, as_files: bool) -> None:
        self.folder, self.as_files, self.lines = folder, as_files, []
        self.makers, self.open = {}, ExitStack()

    def __enter__(self) -> PairWriter:
        for name in ('gt', 'lq'):
            if self.as_files:
                (self.folder / name).mkdir()
            else:
                self.makers[name] = self.open.enter_context(new_database(self.folder / f'{name}.lmdb'))
        return self

    def put(self, key: str, shape: tuple, gt: bytes, lq: bytes, lq_shape: tuple) -> None:
        for name, data, size in (('gt', gt, shape), ('lq', lq, lq_shape)):
            if self.as_files:
                (self.folder / name / f'{key}.png').write_bytes(data)
            else:
                self.makers[name].put(data, key, size)
        self.lines.append(f'{key}.png ({shape[0]},{shape[1]},{shape[2]})\n')

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.open.__exit__(kind, *error)
        if kind is None:
            (self.folder / MARKER).write_text(''.join(self.lines), encoding='ascii')


def prepare(hr_folder: str,
            out: str,
            scale: int = 4,
            scales: Iterable[float] = (1, 0.9, 0.8, 0.7, 0.6),
            crop: Optional[int] = None,
            step: Optional[int] = None,
            workers: Optional[int] = None,
            whole: bool = False,
            overwrite: bool = False,
            gray: bool = False,
            max_megapixels: float = MAX_MEGAPIXELS) -> Prepared:
    """Makes a training or validation set out of photographs.

    Args:
        hr_folder: Folder of photographs, read with its subfolders; or one with images that belong together, GT in gt/
            and LQ in lq/, of which patches are cut at their own size only.
        out: Folder to write: gt.lmdb, lq.lmdb and meta_info.txt (or, for `whole`, the folders gt and lq of PNG files).
        scale: LQ is this much smaller than GT.
        scales: Sizes to cut patches from, as fractions of the photograph's, in (0, 1].
        crop: Side of a GT patch in pixels, a multiple of scale. Default: 32 * scale.
        step: Distance of neighbouring GT patches in pixels, a multiple of scale, at most crop. Default: 3/4 of crop.
        workers: Threads. Default: the number of CPUs.
        whole: Whether to write whole photographs, for validation, instead of patches.
        overwrite: Whether to replace a finished `out`.
        gray: Whether to write gray images. With `color: y`, datasets make the same of them as of the colours.
        max_megapixels: Larger photographs are left out.

    Raises:
        OptionError: An argument is out of range, `out` is taken, or there is nothing to write.
    """
    root, target, scales = Path(hr_folder), Path(out).resolve(), list(scales)
    if not root.is_dir():
        raise OptionError(f'hr_folder={hr_folder}', 'no such folder')
    if scale < 1:
        raise OptionError(f'scale={scale}', 'expected an integer of at least 1')
    if not scales or not all(0 < fraction <= 1 for fraction in scales):
        raise OptionError(f'scales={scales}', 'expected fractions in (0, 1]')
    if target == root.resolve() or root.resolve() in target.parents or target in root.resolve().parents:
        raise OptionError(f'out={out}', f'must not be inside hr_folder={hr_folder}, nor the reverse')
    crop = 32 * scale if crop is None else crop
    step = max(crop * 3 // 4 // scale, 1) * scale if step is None else step
    if crop < scale or crop % scale:
        raise OptionError(f'crop={crop}', f'expected a multiple of the scale {scale}')
    if not scale <= step <= crop or step % scale:
        raise OptionError(f'step={step}', f'expected a multiple of the scale {scale}, at most the crop {crop}')
    scales = sorted({round(fraction, 3) for fraction in scales}, reverse=True)
    workers = workers or os.cpu_count() or 1

    paired = has_pairs(root)
    paths, others, closed = list_images(root / 'gt' if paired else root, by_content=True)
    if not paths:
        raise OptionError(f'hr_folder={hr_folder}', 'contains no images')
    keys = patch_keys(paths, root / 'gt' if paired else root)

    def encode_pairs(path: Path) -> Union[ImageError, list[tuple]]:
        try:
            image, parts = read_bgr(path, max_megapixels)
            lq = read_bgr(lq_of(path, root), max_megapixels)[0] if paired else None
        except ImageError as error:
            return error
        if lq is not None and image.shape[:2] != (scale * lq.shape[0], scale * lq.shape[1]):
            return ImageError(f'{path}: is not x{scale} of its LQ image')
        if whole and max(image.shape[:2]) > MAX_SIDES['.png']:
            height, width = image.shape[:2]
            return ImageError(f"{path}: {width}x{height}, but PNG has at most {MAX_SIDES['.png']} pixels a side")
        notes.extend((str(path), note) for note in parts)
        image = to_gray(image) if gray else image
        if lq is not None:
            lq = to_gray(lq) if gray else lq
            small = min(image.shape[:2]) < (1 if whole else crop)
            made = [Pair(keys[path], image, lq)] if whole else cut_aligned(image, lq, keys[path], scale, crop, step)
            pairs = [] if small else made
        elif not whole:
            pairs = cut_pairs(image, keys[path], scale, scales, crop, step)
        else:
            pairs = [Pair(keys[path], *make_lq(image, scale))] if min(image.shape[:2]) >= smallest(scale) else []
        return [(pair.key, pair.gt.shape, encode(pair.gt), encode(pair.lq), pair.lq.shape) for pair in pairs]

    unreadable = [(str(path), f'cannot be listed: {reason}') for path, reason in closed]
    too_small, notes, count = [], [], 0
    with finished_folder(target, overwrite) as folder, PairWriter(folder, as_files=whole) as writer:
        results = parallel_map(encode_pairs, paths, workers)
        for path, pairs in zip(paths, tqdm(results, 'prepare', len(paths), unit='image', disable=None)):
            if isinstance(pairs, ImageError):
                unreadable.append((str(path), str(pairs).removeprefix(f'{path}: ')))
            elif not pairs:
                too_small.append(str(path))
            else:
                count += len(pairs)
                for pair in pairs:
                    writer.put(*pair)
        if count == 0:
            names = ', '.join([f'{Path(path).name} ({reason.split(";")[0]})' for path, reason in unreadable[:5]] +
                              [Path(path).name for path in too_small[:5 - len(unreadable[:5])]])
            raise OptionError(
                f'hr_folder={hr_folder}', f'no image could be used: {len(unreadable)} cannot be read, '
                f'{len(too_small)} are smaller than a patch: {names}')
    return Prepared(count, unreadable, too_small, sorted(notes), others)
