"""Reads and writes image files: keeps bit depth, alpha, colour profile and metadata, and refuses broken files."""
from __future__ import annotations

import cv2
import io
import logging
import numpy as np
import os
import tifffile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from PIL import Image
from typing import Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

from ..decoding.formats import ACCEPTED, PNG_END, PROFILE_TAG, kind_of, png_chunk
from ..decoding.metadata import MAKER_NOTE, add_to_tiff, resized_exif, resized_xmp
from ..decoding.process import DecodingError, Picture, TooLittleRoom, decode, resident
from ..files import replace_when_done
from ..memory import MemoryLimit
from ..settings import MAX_MEGAPIXELS

# what is read, by ending; the last line only to say of each file why it is not
EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.bmp', '.jfif', '.avif', '.gif', '.jp2', '.apng',
              '.dib', '.j2k', '.jpe', '.mpo', '.pbm', '.pgm', '.pnm', '.ppm', '.ras', '.heic', '.heif', '.hif', '.jxl',
              '.exr', '.hdr', '.pfm', '.pic')
# what can be written, and the longest side in pixels. PNG and JPEG: limits of libpng and libjpeg, not of the formats
MAX_SIDES = {'.png': 10**6, '.jpg': 65500, '.jpeg': 65500, '.webp': 16383, '.tif': 2**31 - 1, '.tiff': 2**31 - 1}
TIFF = ('.tif', '.tiff')
MAX_PIXELS_IN_MEMORY = 2**28
BIGTIFF_BYTES = 2**30  # of pixels, from which a TIFF becomes a BigTIFF: many programs count to 2 GiB only in others
# bytes for each pixel, of 8 bits, that a format takes beside the pixels when it is written; measured
ENCODED = {'.png': 0.6, '.jpg': 9, '.jpeg': 9, '.webp': 32}
JPEG_BLOCK = 65502  # bytes of EXIF or XMP that fit into a JPEG
TILE = 256

# otherwise tifffile's remarks would go to the terminal; the errors say enough
logging.getLogger('tifffile').addHandler(logging.NullHandler())


class ImageError(ValueError):
    """An image cannot be read or written; one line that says which file, why, and what is accepted."""


class Found(NamedTuple):
    """What a folder and its subfolders hold, sorted.

    Attributes:
        images: Files to read.
        others: Files whose names do not end like those of images.
        closed: Folders that cannot be read, and why.
    """
    images: List[Path]
    others: List[Path]
    closed: List[Tuple[Path, str]]


def list_images(folder: Path, by_content: bool = False) -> Found:
    """Lists a folder with its subfolders; hidden ones and hidden files are left out.

    Linked folders are followed, each folder once: if it lies in `folder` too, where it is not a link.

    Args:
        folder: An existing folder.
        by_content: Whether files with other endings are images if they begin like one.
    """
    found, links = Found([], [], []), [folder]
    visited: set[Path] = set()

    def failed(error: OSError) -> None:
        found.closed.append((Path(error.filename), str(error.strerror)))

    while links:
        top = links.pop(0)
        if top.resolve() in visited:
            continue
        for place, folders, files in os.walk(top, onerror=failed):
            visited.add(Path(place).resolve())
            folders[:] = sorted(name for name in folders if not name.startswith('.'))
            links += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
            for path in (Path(place, name) for name in files if not name.startswith('.')):
                wanted = path.suffix.lower() in EXTENSIONS or (by_content and _begins_like_an_image(path))
                (found.images if wanted else found.others).append(path)
    return Found(sorted(found.images), sorted(found.others), sorted(found.closed))


def _begins_like_an_image(path: Path) -> bool:
    # not of a pipe, which would wait for a writer; and two letters, as of BMP and PNM, are no proof
    with suppress(OSError):
        if path.is_file():
            with open(path, 'rb') as file:
                return kind_of(file.read(64)) not in (None, 'BMP', 'PPM', 'PNM', 'PFM')
    return False


def read_image(path: Union[str, Path],
               max_megapixels: float = MAX_MEGAPIXELS,
               memory_limit: Optional[MemoryLimit] = None) -> Picture:
    """Reads the first image of a file, upright.

    The kind is told by the file's content. 16 bits a channel stay 16, fewer than 8 are scaled to 8; palettes and CMYK
    become RGB (the profile of CMYK is dropped), transparent colours become alpha. No gamma is applied. Of further
    channels the first that says that it is alpha is kept, undone if colours are multiplied by it.

    Args:
        path: The file.
        max_megapixels: Larger ones are refused, before there is memory for them.
        memory_limit: Of the memory in which it is read. Default: none.

    Raises:
        ImageError: The file cannot be read, is broken or of a kind that is not accepted.
        ShortOfMemory: Reading it would exceed the limit.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f'{path}: not a file; {ACCEPTED}')
        with open(path, 'rb') as file:
            room = None if memory_limit is None else memory_limit.free() + resident()
            return decode(file, round(max_megapixels * 10**6), room)
    except TooLittleRoom as error:
        if memory_limit is None:
            raise
        raise memory_limit.short_of(error.needs - resident(), 'reading it') from error
    except (OSError, DecodingError) as error:
        raise ImageError(f'{path}: {getattr(error, "strerror", None) or error}; {ACCEPTED}') from error


def check_writable(path: Union[str, Path], shape: Tuple[int, int, int], dtype: np.dtype) -> None:
    """Raises ImageError if the format of `path`, by its extension, cannot store (h, w, c) of `dtype`."""
    (height, width, channels), extension = shape, Path(path).suffix.lower()
    if extension not in MAX_SIDES:
        raise ImageError(f'{path}: this extension cannot be written; use one of {", ".join(MAX_SIDES)}')
    if max(height, width) > MAX_SIDES[extension]:
        raise ImageError(f'{path}: {width}x{height} is too large, {extension} allows {MAX_SIDES[extension]} pixels '
                         'a side; use .tif')
    if extension not in TIFF and height * width > MAX_PIXELS_IN_MEMORY:
        raise ImageError(f'{path}: {width}x{height} is too large, {extension} is written from memory, up to '
                         f'{MAX_PIXELS_IN_MEMORY} pixels; use .tif')
    if np.dtype(dtype) != np.uint8 and extension in ('.jpg', '.jpeg', '.webp'):
        raise ImageError(f'{path}: {extension} has 8 bits a channel, not {np.dtype(dtype).name}; use .png or .tif')
    if channels in (2, 4) and extension in ('.jpg', '.jpeg'):
        raise ImageError(f'{path}: {extension} does not support alpha; use .png, .webp or .tif')


def bytes_to_write(path: Union[str, Path], shape: Tuple[int, int, int], dtype: np.dtype) -> int:
    """The most memory that writing an image takes, the image included; see `write_image`."""
    (height, width, channels), itemsize, extension = shape, np.dtype(dtype).itemsize, Path(path).suffix.lower()
    if extension in TIFF:  # a row of tiles, as it comes and deflated
        return 3 * TILE * -(-width // TILE) * TILE * channels * itemsize
    with_alpha = channels in (2, 4)
    if extension == '.png' and (itemsize == 2 or channels != 2):
        stored = {1: 1, 2: 4, 3: 3, 4: 4}[channels] * itemsize
        return int(height * width * stored * (1 + ENCODED['.png'] / 3))
    if extension == '.png':
        return height * width * (channels + 8)
    more = ENCODED[extension] * (1 if channels >= 3 or extension == '.webp' else 0.5)
    return int(height * width * (channels + more * (1 + 1.5 * (extension == '.webp' and with_alpha))))


def write_image(path: Union[str, Path],
                shape: Tuple[int, int, int],
                dtype: np.dtype,
                strips: Iterable[np.ndarray],
                icc_profile: Optional[bytes] = None,
                exif: Optional[bytes] = None,
                xmp: Optional[bytes] = None) -> Tuple[str, ...]:
    """Writes an image given in strips, completely or not at all.

    TIFF is written while the strips come, in memory for about 256 rows; other formats gather the image first. PNG
    has no 16-bit gray with alpha here, and WebP no gray: they become RGB with or without alpha, and lose the profile.

    Args:
        path: The extension gives the format.
        shape: (h, w, c), c as in Picture.
        dtype: uint8 or uint16.
        strips: Blocks (rows, w, c) of that dtype, from top to bottom.
        icc_profile: Colour profile of the image.
        exif, xmp: As in Image; where they say a size, it becomes this one.

    Returns:
        What the file could not hold.

    Raises:
        ImageError: See check_writable.
    """
    path, dtype, channels = Path(path), np.dtype(dtype), shape[2]
    check_writable(path, shape, dtype)
    strips, extension = _checked(strips, shape, dtype), path.suffix.lower()
    lost: List[str] = []
    exif = exif and resized_exif(exif, shape[1], shape[0])
    xmp = xmp and resized_xmp(xmp, shape[1], shape[0])
    with replace_when_done(path) as temporary:
        if extension in TIFF:
            _write_tiff(temporary, shape, dtype, strips, icc_profile, exif, xmp)
        # Pillow writes no 16 bits, cv2 no gray with alpha
        elif extension == '.png' and (dtype == np.uint16 or channels != 2):
            order = {1: [0], 2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
            profile = None if channels == 2 else icc_profile
            _write_png(temporary, _gathered(strips, shape, dtype, order))
            _add_to_png(temporary, profile, exif, xmp)
        else:
            # without the last axis if that is 1, as Pillow wants it
            pixels = _gathered(strips, shape, dtype, list(range(channels))).reshape(shape[:2 if channels == 1 else 3])
            profile = None if extension == '.webp' and channels < 3 else icc_profile
            if extension in ('.jpg', '.jpeg'):
                exif, xmp, lost = _fitting_into_jpeg(exif, xmp, (shape[1], shape[0]))
            kind, encoded = Image.registered_extensions()[extension], io.BytesIO()
            about = {} if extension == '.png' else dict(exif=exif or b'', xmp=xmp or b'', icc_profile=profile)
            Image.fromarray(pixels).save(encoded, kind, quality=95, subsampling=0, compress_level=2, **about)
            temporary.write_bytes(encoded.getbuffer())  # Pillow itself is silent on a disk that is full at the end
            if extension == '.png':
                _add_to_png(temporary, profile, exif, xmp)
    return tuple(lost)


def _fitting_into_jpeg(exif: Optional[bytes], xmp: Optional[bytes],
                       size: Tuple[int, int]) -> Tuple[Optional[bytes], Optional[bytes], List[str]]:
    """The parts of EXIF and XMP that fit into a JPEG, and notes on those that do not."""
    lost = []
    if exif and len(exif) > JPEG_BLOCK:
        lost.append('JPEG has no room for its maker note')
        exif = resized_exif(exif, *size, (MAKER_NOTE, ))
        if len(exif) > JPEG_BLOCK:
            exif, lost = None, ['JPEG has no room for its EXIF']
    if xmp and len(xmp) > JPEG_BLOCK:
        xmp, lost = None, [*lost, 'JPEG has no room for its XMP']
    return exif, xmp, lost


def _checked(strips: Iterable[np.ndarray], shape: Tuple[int, int, int], dtype: np.dtype) -> Iterator[np.ndarray]:
    rows = 0
    for strip in strips:
        assert strip.dtype == dtype and strip.shape[1:] == tuple(shape[1:]), (strip.shape, strip.dtype)
        rows += len(strip)
        assert rows <= shape[0], (rows, shape)
        yield strip
    assert rows == shape[0], (rows, shape)


def _gathered(strips: Iterator[np.ndarray], shape: Tuple[int, int, int], dtype: np.dtype,
              order: List[int]) -> np.ndarray:
    """The whole image, with its channels in `order`."""
    pixels, top = np.empty((*shape[:2], len(order)), dtype), 0
    for strip in strips:
        pixels[top:top + len(strip)] = strip[..., order]
        top += len(strip)
    return pixels


def _write_png(path: Path, pixels: np.ndarray) -> None:
    # photographs become about as small as with Pillow's level 4, in half the time
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    try:
        str(path).encode()
        written = cv2.imwrite(str(path), pixels, fast)
    except UnicodeEncodeError:  # cv2.imwrite crashes on names that are not UTF-8
        written = path.write_bytes(cv2.imencode('.png', pixels, fast)[1].tobytes()) > 0
    if not (written and _png_is_whole(path)):
        raise OSError(f'{path}: cannot be written; is the disk full?')


def _add_to_png(path: Path, profile: Optional[bytes], exif: Optional[bytes], xmp: Optional[bytes]) -> None:
    """Adds metadata to a PNG without any; not every cv2 and Pillow write them all."""
    chunks = [png_chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(profile))] if profile else []
    chunks += [png_chunk(b'eXIf', exif[6:])] if exif else []
    chunks += [png_chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + xmp)] if xmp else []
    if not chunks:
        return
    # their place is after signature and header, 33 bytes
    data = memoryview(path.read_bytes())
    with open(path, 'wb') as file:
        file.write(data[:33])
        file.writelines([*chunks, data[33:]])


def _png_is_whole(path: Path) -> bool:
    """Whether a file ends as a PNG does; OpenCV says nothing when the disk is full at the end of the file."""
    with open(path, 'rb') as file:
        file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
        return file.read() == PNG_END


def _write_tiff(path: Path, shape: Tuple[int, int, int], dtype: np.dtype, strips: Iterator[np.ndarray],
                profile: Optional[bytes], exif: Optional[bytes], xmp: Optional[bytes]) -> None:
    height, width, channels = shape
    big = height * width * channels * dtype.itemsize >= BIGTIFF_BYTES
    with tifffile.TiffWriter(path, bigtiff=big, byteorder='<') as tif:
        tif.write(
            _deflated_tiles(strips, width, channels, dtype),
            shape=(height, width) if channels == 1 else shape,
            dtype=dtype,
            tile=(TILE, TILE),
            photometric='rgb' if channels >= 3 else 'minisblack',
            planarconfig='contig' if channels > 1 else None,
            extrasamples=['unassalpha'] if channels in (2, 4) else None,
            compression='zlib',
            predictor=True,
            metadata=None,
            extratags=[(PROFILE_TAG, 7, len(profile), profile, True)] if profile else [])
    add_to_tiff(path, exif, xmp)


def _deflated_tiles(strips: Iterator[np.ndarray], width: int, channels: int, dtype: np.dtype) -> Iterator[bytes]:
    """Cuts strips into tiles, row by row, and compresses them; pixels outside of the image have no meaning."""
    band, filled = np.zeros((TILE, -(-width // TILE) * TILE, channels), dtype), 0
    tiles = np.split(band, band.shape[1] // TILE, axis=1)
    # not left to tifffile, whose threads first collect half a gigabyte of tiles
    with ThreadPoolExecutor(cv2.getNumThreads()) as pool:
        for strip in strips:
            while len(strip):
                part, strip = strip[:TILE - filled], strip[TILE - filled:]
                band[filled:filled + len(part), :width] = part
                filled += len(part)
                if filled == TILE:
                    yield from pool.map(_deflated, tiles)
                    filled = 0
        if filled:
            yield from pool.map(_deflated, tiles)


def _deflated(tile: np.ndarray) -> bytes:
    differences = tile.copy()
    differences[:, 1:] -= tile[:, :-1]  # TIFF's horizontal predictor
    return zlib.compress(differences.astype(differences.dtype.newbyteorder('<'), copy=False).data, 1)
