"""Pictures from and to files: bit depth, alpha and colour profile survive, what is broken or too much is refused."""
from __future__ import annotations

import cv2
import io
import logging
import numpy as np
import os
import struct
import sys
import threading
import tifffile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from PIL import Image
from typing import Dict, Iterable, Iterator, NamedTuple, Optional, Tuple, Union

from ..files import replace_when_done

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.bmp')
ACCEPTED = 'accepted are whole PNG, JPEG, WebP, TIFF and BMP files of at most 16 bits a channel, integers'
# what can be written, and the longest side in pixels. PNG and JPEG: limits of libpng and libjpeg, not of the formats
MAX_SIDES = {'.png': 10**6, '.jpg': 65500, '.jpeg': 65500, '.webp': 16383, '.tif': 2**31 - 1, '.tiff': 2**31 - 1}
TIFF = ('.tif', '.tiff')
MAX_PIXELS_IN_MEMORY = 2**28
BIGTIFF_BYTES = 2**30  # of pixels, from which a TIFF becomes a BigTIFF: many programs count to 2 GiB only in others

PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # bits, by colour type
PNG_SIGNATURE, PNG_END = b'\x89PNG\r\n\x1a\n', b'\0\0\0\0IEND\xaeB`\x82'
TIFF_SIGNATURES = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
# TIFF: none, two numbers for deflate, packbits; tifffile reads the others with imagecodecs only
TIFFFILE_COMPRESSIONS = (1, 8, 32946, 32773)
ORIENTATION_TAG, PROFILE_TAG = 274, 34675
PILLOW_MODES = {'1': 'L', 'L': 'L', 'LA': 'LA', 'RGB': 'RGB', 'P': 'RGB', 'CMYK': 'RGB', 'YCbCr': 'RGB'}
PILLOW_MODES.update(PA='RGBA', RGBA='RGBA', RGBa='RGBA')
TILE = 256

# otherwise tifffile's remarks on broken files would go to the terminal; the errors say enough
logging.getLogger('tifffile').addHandler(logging.NullHandler())
# Pillow's limit of pixels belongs to the whole process
_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be read or written; one line that says of which file, why, and what is accepted."""


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        pixels: of shape (h, w, c), uint8 or uint16; c is 1 for gray, 2 for gray and alpha, 3 for RGB, 4 for RGBA.
            Alpha is not premultiplied. May be a read-only memory map.
        icc_profile: The colour profile of `pixels`, None if the file has none.
    """
    pixels: np.ndarray
    icc_profile: Optional[bytes]


def read_image(path: Union[str, Path]) -> Picture:
    """Reads the first picture of a PNG, JPEG, WebP, TIFF or BMP file, upright.

    The kind is told by the file's content. 16 bits a channel stay 16, fewer than 8 are scaled to 8; palettes and CMYK
    become RGB (the profile of CMYK is dropped), transparent colours become alpha. No gamma is applied.

    Raises:
        ImageError: The file cannot be read, is broken or of a kind that is not accepted.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f'{path}: not a file; {ACCEPTED}')
        with open(path, 'rb') as file, warnings.catch_warnings():
            warnings.filterwarnings('ignore', module=r'PIL\.')
            signature = file.read(8)
            if signature == PNG_SIGNATURE:
                pixels, orientation, profile = _read_png(path)
            elif signature[:4] in TIFF_SIGNATURES:
                pixels, orientation, profile = _read_tiff(path)
            else:
                pixels, orientation, profile = _read_by_pillow(path, ('JPEG', 'WEBP', 'BMP'))
            return Picture(_upright(pixels, orientation), profile or None)
    except ImageError:
        raise
    # decoders meet broken files with errors of any type, from SyntaxError to MemoryError
    except Exception as error:
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise ImageError(f'{path}: {reason.splitlines()[0]}; {ACCEPTED}') from error


def check_writable(path: Union[str, Path], shape: Tuple[int, int, int], dtype: np.dtype) -> None:
    """Raises ImageError if the format that the extension of `path` stands for cannot hold (h, w, c) of `dtype`."""
    (height, width, channels), extension = shape, Path(path).suffix.lower()
    if extension not in MAX_SIDES:
        raise ImageError(f'{path}: the extension names no format to write; use one of {", ".join(MAX_SIDES)}')
    if max(height, width) > MAX_SIDES[extension]:
        raise ImageError(f'{path}: {width}x{height} is too large, {extension} ends at {MAX_SIDES[extension]} pixels '
                         'a side; use .tif')
    if extension not in TIFF and height * width > MAX_PIXELS_IN_MEMORY:
        raise ImageError(f'{path}: {width}x{height} is too large, {extension} is written from memory and ends at '
                         f'{MAX_PIXELS_IN_MEMORY} pixels; use .tif')
    if np.dtype(dtype) != np.uint8 and extension in ('.jpg', '.jpeg', '.webp'):
        raise ImageError(f'{path}: {extension} holds 8 bits a channel, not {np.dtype(dtype).name}; use .png or .tif')
    if channels in (2, 4) and extension in ('.jpg', '.jpeg'):
        raise ImageError(f'{path}: {extension} holds no alpha channel; use .png, .webp or .tif')


def write_image(path: Union[str, Path],
                shape: Tuple[int, int, int],
                dtype: np.dtype,
                strips: Iterable[np.ndarray],
                icc_profile: Optional[bytes] = None) -> None:
    """Writes a picture that comes in strips, completely or not at all.

    TIFF is written while the strips come, in memory for about 256 rows; other formats gather the picture first. PNG
    has no 16-bit gray with alpha here, and WebP no gray: they become RGB with or without alpha, and lose the profile.

    Args:
        path: The extension gives the format.
        shape: (h, w, c), c as in Picture.
        dtype: uint8 or uint16.
        strips: Blocks (rows, w, c) of that dtype, from top to bottom.
        icc_profile: Colour profile of the picture.

    Raises:
        ImageError: See check_writable.
    """
    path, dtype, channels = Path(path), np.dtype(dtype), shape[2]
    check_writable(path, shape, dtype)
    strips, extension = _checked(strips, shape, dtype), path.suffix.lower()
    with replace_when_done(path) as temporary:
        if extension in TIFF:
            _write_tiff(temporary, shape, dtype, strips, icc_profile)
        # Pillow writes no 16 bits, cv2 no gray with alpha
        elif extension == '.png' and (dtype == np.uint16 or channels != 2):
            order = {1: [0], 2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
            _write_png(temporary, _gathered(strips, shape, dtype, order), None if channels == 2 else icc_profile)
        else:
            # without the last axis if that is 1, as Pillow wants it
            pixels = _gathered(strips, shape, dtype, list(range(channels))).reshape(shape[:2 if channels == 1 else 3])
            profile = None if extension == '.webp' and channels < 3 else icc_profile
            kind, encoded = Image.registered_extensions()[extension], io.BytesIO()
            Image.fromarray(pixels).save(
                encoded, kind, quality=95, subsampling=0, compress_level=2, icc_profile=profile)
            temporary.write_bytes(encoded.getbuffer())  # Pillow itself is silent on a disk that is full at the end


def _read_png(path: Path) -> Tuple[np.ndarray, int, Optional[bytes]]:
    # Pillow cuts 16-bit colours down to 8 bits, mistakes the transparent gray of fewer bits than 8, and accepts data
    # that end too soon. cv2 does not, but knows no transparent gray, and skips what is broken beside the pixels.
    chunks = _png_chunks(path)
    depth, kind = chunks[b'IHDR'][8:10]
    if depth not in PNG_DEPTHS.get(kind, ()):  # libpng would write to the terminal
        raise ValueError(f'broken PNG, {depth} bits of colour type {kind}')
    pixels = _read_by_cv2(path)
    if kind == 4:
        pixels = np.ascontiguousarray(pixels[..., [0, 3]])
    elif kind == 0 and b'tRNS' in chunks:
        white = np.iinfo(pixels.dtype).max
        key = int.from_bytes(chunks[b'tRNS'], 'big') * white // (2**depth - 1)
        pixels = np.concatenate([pixels, np.where(pixels == key, 0, white).astype(pixels.dtype)], axis=2)
    exif, profile = Image.Exif(), None
    # what is broken there leaves the pixels whole
    with suppress(Exception):  # Pillow's are of any type
        exif.load(chunks.get(b'eXIf', b''))
    with suppress(zlib.error, KeyError, IndexError):
        profile = zlib.decompress(chunks[b'iCCP'].split(b'\0', 1)[1][1:])
    return pixels, exif.get(ORIENTATION_TAG, 1), profile


def _png_chunks(path: Path) -> Dict[bytes, bytes]:
    """Checks all chunks; returns those that are not pixels."""
    chunks: Dict[bytes, bytes] = {}
    with open(path, 'rb') as file:
        file.seek(len(PNG_SIGNATURE))
        while b'IEND' not in chunks:
            head = file.read(8)
            if len(head) < 8:
                raise ValueError('truncated PNG')
            length, name = struct.unpack('>I4s', head)
            data = file.read(length)
            if zlib.crc32(data, zlib.crc32(name)).to_bytes(4, 'big') != file.read(4):
                raise ValueError('broken PNG, a checksum is wrong')
            if name != b'IDAT':
                chunks.setdefault(name, data)
    return chunks


def _read_tiff(path: Path) -> Tuple[np.ndarray, int, Optional[bytes]]:
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        depth, channels = page.bitspersample, page.samplesperpixel
        if depth not in (1, 2, 4, 8, 16) or page.sampleformat != 1:
            raise ValueError(f'TIFF of {depth} bits, sample format {page.sampleformat}')
        orientation, profile = page.tags.valueof(ORIENTATION_TAG, default=1), page.tags.valueof(PROFILE_TAG)
        # gray, gray with white as 0, RGB; not if an extra sample of kind 1 says that colours are multiplied by alpha
        inverted = page.photometric == 0
        plain = page.photometric in (0, 1, 2) and depth >= 8 and page.imagedepth == 1 and channels <= 4
        plain = plain and 1 not in page.extrasamples and not (inverted and channels > 1)
        if plain and page.compression in TIFFFILE_COMPRESSIONS:
            native = depth == 8 or tif.byteorder == {'little': '<', 'big': '>'}[sys.byteorder]
            mapped = page.is_memmappable and native and not inverted
            pixels = tifffile.memmap(path, page=0, mode='r') if mapped else page.asarray()
            if channels > 1 and page.planarconfig == 2:
                pixels = np.moveaxis(pixels, 0, -1)
            pixels = pixels.reshape(*pixels.shape[:2], -1)
        elif plain and depth == 16:
            pixels = _read_by_cv2(path)
        elif depth == 16:
            raise ValueError('16-bit TIFF that is neither gray nor RGB, or has premultiplied alpha')
        else:
            # turns the picture itself; whether the tag then still says so depends on Pillow's version
            pixels, _, profile = _read_by_pillow(path, ('TIFF', ))
            orientation, inverted = 1, False
    if plain and (pixels.shape[2], pixels.dtype.itemsize * 8) != (channels, depth):
        raise ValueError(f'TIFF of {channels} channels in a compression that is not read for them; save it deflated')
    return np.invert(pixels) if inverted else pixels, orientation, profile


def _read_by_cv2(path: Path) -> np.ndarray:
    # not cv2.imread, which crashes on names that are not UTF-8
    pixels = cv2.imdecode(np.memmap(path, np.uint8, 'r'), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError('broken pixel data')
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] >= 3:
        code = cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
        # in blocks, for no second copy of the whole
        for top in range(0, len(pixels), TILE):
            pixels[top:top + TILE] = cv2.cvtColor(pixels[top:top + TILE], code)
    return pixels


def _read_by_pillow(path: Path, formats: Tuple[str, ...]) -> Tuple[np.ndarray, int, Optional[bytes]]:
    with _without_pixel_limit(), Image.open(path, formats=formats) as picture:
        orientation = picture.getexif().get(ORIENTATION_TAG, 1)
        picture.load()
        if picture.mode not in PILLOW_MODES:
            raise ValueError(f'picture of Pillow mode {picture.mode}')
        mode, (width, height) = PILLOW_MODES[picture.mode], picture.size
        pixels = np.empty((height, width, len(mode)), np.uint8)
        # in blocks: of a whole picture Pillow makes several copies
        rows = max(1, 2**22 // width)
        for top in range(0, height, rows):
            block = picture.crop((0, top, width, min(top + rows, height))).convert(mode)
            pixels[top:top + rows] = np.asarray(block).reshape(-1, width, len(mode))
        return pixels, orientation, None if picture.mode == 'CMYK' else picture.info.get('icc_profile')


@contextmanager
def _without_pixel_limit() -> Iterator[None]:
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation; other values than 2 to 8 mean that nothing is to be done."""
    if orientation not in range(2, 9):
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _checked(strips: Iterable[np.ndarray], shape: Tuple[int, int, int], dtype: np.dtype) -> Iterator[np.ndarray]:
    rows = 0
    for strip in strips:
        assert strip.dtype == dtype and strip.shape[1:] == tuple(shape[1:]), (strip.shape, strip.dtype)
        rows += len(strip)
        assert rows <= shape[0], (rows, shape)
        yield strip
    assert rows == shape[0], (rows, shape)


def _gathered(strips: Iterator[np.ndarray], shape: Tuple[int, int, int], dtype: np.dtype, order: list) -> np.ndarray:
    """The whole picture, its channels taken in `order`."""
    pixels, top = np.empty((*shape[:2], len(order)), dtype), 0
    for strip in strips:
        pixels[top:top + len(strip)] = strip[..., order]
        top += len(strip)
    return pixels


def _write_png(path: Path, pixels: np.ndarray, profile: Optional[bytes]) -> None:
    # photographs become about as small as with Pillow's level 4, in half the time
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    try:
        str(path).encode()
        written = cv2.imwrite(str(path), pixels, fast)
    except UnicodeEncodeError:  # cv2.imwrite crashes on names that are not UTF-8
        written = path.write_bytes(cv2.imencode('.png', pixels, fast)[1])
    if not (written and _png_is_whole(path)):
        raise OSError(f'{path}: cannot be written; is the disk full?')
    if profile:
        # not every cv2 writes profiles; their place is after signature and header, 33 bytes
        chunk, data = b'iCCPICC profile\0\0' + zlib.compress(profile), memoryview(path.read_bytes())
        with open(path, 'wb') as file:
            file.write(data[:33])
            file.write(struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk)))
            file.write(data[33:])


def _png_is_whole(path: Path) -> bool:
    """Whether a file ends as a PNG does; OpenCV says nothing when the disk is full at the end of the file."""
    with open(path, 'rb') as file:
        file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
        return file.read() == PNG_END


def _write_tiff(path: Path, shape: Tuple[int, int, int], dtype: np.dtype, strips: Iterator[np.ndarray],
                profile: Optional[bytes]) -> None:
    height, width, channels = shape
    with tifffile.TiffWriter(path, bigtiff=height * width * channels * dtype.itemsize >= BIGTIFF_BYTES) as tif:
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


def _deflated_tiles(strips: Iterator[np.ndarray], width: int, channels: int, dtype: np.dtype) -> Iterator[bytes]:
    """Cuts strips into tiles, row by row, and compresses them; what sticks out of the picture has no meaning."""
    band, filled = np.zeros((TILE, -(-width // TILE) * TILE, channels), dtype), 0
    tiles = np.split(band, band.shape[1] // TILE, axis=1)
    # not left to tifffile, whose threads first collect half a gigabyte of tiles
    with ThreadPoolExecutor() as pool:
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
    return zlib.compress(differences, 1)
