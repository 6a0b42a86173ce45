"""Reads headers of image files, and decodes their pixels."""
from __future__ import annotations

import cv2
import mmap
import numpy as np
import os
import re
import struct
import sys
import tifffile
import zlib
from contextlib import suppress
from importlib import import_module
from PIL import AvifImagePlugin, Image, UnidentifiedImageError
from typing import BinaryIO, Callable, NamedTuple, Optional, Tuple

from .metadata import ORIENTATION, XMP, Directory, number_of, read_exif

ACCEPTED = ('accepted: complete PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, AVIF and PNM files of at most 16 bits a '
            'channel, integers')

# What says that it unpacks to more than FREE_BYTES and PLAUSIBLE times its size is refused: photographs reach 100, a
# white page as JPEG 1000. Of deflate 1032 is the exact limit.
FREE_BYTES, PLAUSIBLE, DEFLATE = 2**27, 4000, 1032
MAX_METADATA = 2**24  # bytes of a colour profile, unpacked; the largest of printers have 4 million

PNG_SIGNATURE, PNG_END = b'\x89PNG\r\n\x1a\n', b'\0\0\0\0IEND\xaeB`\x82'
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # bits, by colour type
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
TIFF_SIGNATURES = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
EXTRA_TAG, PROFILE_TAG, DNG_TAG = 338, 34675, 50706
SIGNATURES = ((rb'\xff\xd8\xff', 'JPEG'), (rb'RIFF....WEBP', 'WEBP'), (rb'GIF8[79]a', 'GIF'),
              (rb'BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0', 'BMP'), (rb'P[1-4]\s', 'PPM'), (rb'P[56]\s', 'PNM'),
              (rb'\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51', 'JPEG2000'), (rb'\x59\xa6\x6a\x95', 'SUN'),
              (rb'\xff\x0a|\0\0\0\x0cJXL ', 'JXL'), (rb'#\?R(ADIANCE|GBE)',
                                                     'HDR'), (rb'P[Ff]\s', 'PFM'), (rb'\x76\x2f\x31\x01', 'EXR'))
HDR_KINDS = ('HDR', 'EXR', 'PFM')
HDR_TRANSFERS = (16, 18)  # PQ and HLG of ITU-T H.273
NO_HDR = 'contains HDR values, which have no white level; map them to 8 or 16 bits first'
# what Pillow reads only with another package, which adds itself to it: kind -> module, package
EXTRA_READERS = {'HEIF': ('pillow_heif', 'pillow-heif'), 'JXL': ('pillow_jxl', 'pillow-jxl-plugin')}

PILLOW_MODES = {'1': 'L', 'L': 'L', 'LA': 'LA', 'RGB': 'RGB', 'P': 'RGB', 'CMYK': 'RGB', 'YCbCr': 'RGB'}
PILLOW_MODES.update({'PA': 'RGBA', 'RGBA': 'RGBA', 'RGBa': 'RGBA', 'I;16': 'I;16'})
WITH_ALPHA = {'L': 'LA', 'RGB': 'RGBA'}
ROWS = 256  # at a time, for no further copy of the whole


class Stored(NamedTuple):
    """What a header says.

    Attributes:
        shape: (h, w, c) as in the file, not upright; c is 1 for gray, 2 with alpha, 3 for RGB, 4 with alpha.
        dtype: uint8 or uint16.
        fill: Decodes into an array of `shape` and `dtype`, zeros, which may have any strides.
        orientation: EXIF's, 1 to 8.
        profile, exif, xmp: Metadata, as they are in the file.
        notes: What the pixels do not show of the file, such as further frames.
        mapped: Where in the file an array of native numbers begins, and whether its first axis is that of channels;
            None if pixels are stored in another way.
    """
    shape: Tuple[int, int, int]
    dtype: np.dtype
    fill: Callable[[np.ndarray], None]
    orientation: int = 1
    profile: Optional[bytes] = None
    exif: Directory = Directory({}, {})
    xmp: Optional[bytes] = None
    notes: Tuple[str, ...] = ()
    mapped: Optional[Tuple[int, bool]] = None


def kind_of(head: bytes) -> Optional[str]:
    """The kind of a file by its first 64 bytes; None if it is unknown."""
    if head.startswith(PNG_SIGNATURE):
        return 'PNG'
    if head[:4] in TIFF_SIGNATURES:
        return 'TIFF'
    if head[4:8] == b'ftyp':
        brands = head[8:12] + head[16:min(int.from_bytes(head[:4], 'big'), 64)]
        return 'AVIF' if re.search(b'avi[fs]', brands) else 'HEIF' if re.search(b'he[iv][cxms]|mi?f1', brands) else None
    return next((kind for start, kind in SIGNATURES if re.match(start, head, re.S)), None)


def read_header(file: BinaryIO, max_pixels: int, allow: Callable[[int], None]) -> Stored:
    """Reads everything but the pixels of an image; refuses an impossible size.

    Args:
        file: The file, at its beginning.
        max_pixels: More are refused.
        allow: Called with the number of bytes of the pixels, where memory for them is needed to read the header.

    Raises:
        ValueError: The file is broken or of a kind that is not accepted; so do other exceptions, of any type.
    """
    head = file.read(64)
    kind = kind_of(head)
    file.seek(0)
    if kind is None:
        raise ValueError('of an unknown kind' if len(head) == 64 else 'truncated, or not an image')
    if kind in HDR_KINDS:
        raise ValueError(NO_HDR)
    readers = {'PNG': _png, 'TIFF': _tiff, 'PNM': _pnm}
    if kind in readers:
        return readers[kind](file, max_pixels)
    return _by_pillow(file, max_pixels, kind, allow)


def check_size(file: BinaryIO, max_pixels: int, width: int, height: int, row_bytes: int, most: int = PLAUSIBLE) -> None:
    """Refuses what is larger than asked for, and what a file of this size cannot hold.

    Args:
        width, height: Of the image.
        row_bytes: Of a row as it is stored, unpacked.
        most: How many times its size a file can unpack to.
    """
    size = os.fstat(file.fileno()).st_size
    if width < 1 or height < 1:
        raise ValueError(f'broken, of {width}x{height} pixels')
    if width * height > max_pixels:
        limit = f'{max_pixels / 1e6:g} megapixels, the limit (--max-megapixels)'
        raise ValueError(f'{width}x{height} is larger than {limit}')
    if height * row_bytes > max(FREE_BYTES, most * size) or (most == 1 and height * row_bytes > size):
        raise ValueError(f'claims to be {width}x{height}, for which {size} bytes are too few')


# PNG


def _png(file: BinaryIO, max_pixels: int) -> Stored:
    # Pillow cuts 16-bit colours down to 8 bits, mistakes the transparent gray of fewer bits than 8, and accepts data
    # that end too soon. cv2 does not, but knows no transparent gray.
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    chunks, pixels = _png_chunks(data)
    width, height, depth, kind = struct.unpack_from('>IIBB', _checked_header(chunks))
    dtype = np.dtype(np.uint16 if depth == 16 else np.uint8)
    row_bytes = -(-width * PNG_CHANNELS[kind] * depth // 8)
    check_size(file, max_pixels, width, height, row_bytes, DEFLATE)
    packed = sum(end - start - 12 for start, end in pixels)
    if height * row_bytes > FREE_BYTES and height * row_bytes > PLAUSIBLE // 40 * packed:
        _check_inflated(data, pixels, height * row_bytes)
    if chunks.get(b'cICP', b'')[1:2] in (bytes([code]) for code in HDR_TRANSFERS):
        raise ValueError(NO_HDR)
    key = chunks.pop(b'tRNS', None) if kind in (0, 4, 6) else None
    key = int.from_bytes(key, 'big') * np.iinfo(dtype).max // (2**depth - 1) if key and kind == 0 else None
    colors = 1 if kind in (0, 4) else 3
    channels = colors + (key is not None or kind in (4, 6) or b'tRNS' in chunks)

    def fill(out: np.ndarray) -> None:
        clean = _clean_png(data, chunks, pixels)
        decoded = cv2.imdecode(np.frombuffer(clean, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None or decoded.shape[:2] != out.shape[:2] or decoded.dtype != out.dtype:
            raise ValueError('broken pixel data')
        decoded = decoded.reshape(height, width, -1)
        for top in range(0, height, ROWS):
            rows, place = decoded[top:top + ROWS], out[top:top + ROWS]
            if channels >= 3:
                place[:] = cv2.cvtColor(rows, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGBA)
                continue
            place[..., 0] = rows[..., 0]
            if channels == 2:
                alpha = rows[..., -1] if key is None else np.where(rows[..., 0] == key, 0, np.iinfo(dtype).max)
                place[..., 1] = alpha

    exif, profile, xmp = read_exif(chunks.get(b'eXIf', b'')), None, None
    # what is broken there leaves the pixels whole
    with suppress(zlib.error, KeyError, IndexError):
        profile = _inflated(chunks[b'iCCP'].split(b'\0', 1)[1][1:])
    with suppress(zlib.error, KeyError, IndexError):
        text = chunks[b'iTXt'][20:].split(b'\0', 2)[2]
        xmp = _inflated(text) if chunks[b'iTXt'][18] else text
    frames = int.from_bytes(chunks.get(b'acTL', b'')[:4], 'big')
    return Stored((height, width, channels), dtype, fill, number_of(exif, ORIENTATION, 1), profile, exif, xmp,
                  first_of(frames))


def _png_chunks(data: mmap.mmap) -> tuple[dict[bytes, bytes], list[tuple[int, int]]]:
    """Checks all chunks.

    Returns:
        Those that are not pixels, the first of each name; where those with pixels begin and end.
    """
    chunks: dict[bytes, bytes] = {}
    pixels: list[tuple[int, int]] = []
    position = len(PNG_SIGNATURE)
    while b'IEND' not in chunks:
        if position + 12 > len(data):
            raise ValueError('truncated PNG')
        length, name = struct.unpack_from('>I4s', data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError('truncated PNG')
        with memoryview(data) as view, view[position + 4:end - 4] as body:
            whole = zlib.crc32(body) == int.from_bytes(data[end - 4:end], 'big')
        beside = name[:1].islower() and name != b'tRNS'  # of no meaning for the pixels
        if not whole and not beside:
            raise ValueError('broken PNG, a checksum is wrong')
        if (name == b'IHDR') != (not chunks):
            raise ValueError('broken PNG, its header is misplaced')
        if name == b'IDAT':
            if pixels and pixels[-1][1] != position:
                raise ValueError('broken PNG, its pixels are interrupted')
            pixels.append((position, end))
        elif not beside and name not in (b'IHDR', b'PLTE', b'tRNS', b'IEND'):
            raise ValueError(f'broken PNG, with a chunk {name!r}')
        elif name in (b'PLTE', b'tRNS') and (name in chunks or pixels):
            raise ValueError(f'broken PNG, {name.decode()} is misplaced')
        elif whole and (name != b'iTXt' or data[position + 8:position + 26] == b'XML:com.adobe.xmp\0'):
            chunks.setdefault(name, data[position + 8:end - 4])
        position = end
    if not pixels:
        raise ValueError('broken PNG, without pixels')
    return chunks, pixels


def _checked_header(chunks: dict[bytes, bytes]) -> bytes:
    """The header of a PNG, if it and the lengths of palette and transparent colours can be."""
    header, palette, key = chunks[b'IHDR'], chunks.get(b'PLTE', b''), chunks.get(b'tRNS', b'')
    if len(header) != 13 or header[10:12] != b'\0\0' or header[12] > 1:
        raise ValueError('broken PNG header')
    depth, kind = header[8:10]
    if depth not in PNG_DEPTHS.get(kind, ()):
        raise ValueError(f'broken PNG, {depth} bits of colour type {kind}')
    colors, rest = divmod(len(palette), 3)
    if kind in (2, 3, 6) and (rest or colors > 256 or kind == 3 and not colors):
        raise ValueError('broken PNG palette')
    if key and not {0: len(key) == 2, 2: len(key) == 6, 3: len(key) <= colors}.get(kind, True):
        raise ValueError('broken PNG, transparent colours')
    return header


def _clean_png(data: mmap.mmap, chunks: dict[bytes, bytes], pixels: list[tuple[int, int]]) -> bytearray:
    """The same PNG of signature, header, palette, transparent colours and pixels alone."""
    clean = bytearray(PNG_SIGNATURE)
    for name in (b'IHDR', b'PLTE', b'tRNS'):
        if name in chunks and not (name == b'PLTE' and chunks[b'IHDR'][9] in (0, 4)):
            clean += png_chunk(name, chunks[name])
    with memoryview(data) as view:
        for start, end in pixels:
            clean += view[start:end]
    return clean + PNG_END


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(body, zlib.crc32(name)))


def _check_inflated(data: mmap.mmap, pixels: list[tuple[int, int]], expected: int) -> None:
    """Counts what much larger pixels than usual unpack to, before there is memory for them."""
    count, stream = 0, zlib.decompressobj()
    for start, end in pixels:
        body = data[start + 8:end - 4]
        while body and not stream.eof and count < expected:
            count += len(stream.decompress(body, 2**20))
            body = stream.unconsumed_tail
    if count < expected:
        raise ValueError('broken pixel data that ends too soon')


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    unpacked = stream.decompress(data, MAX_METADATA)
    if stream.unconsumed_tail:
        raise ValueError(f'its metadata unpacks to more than {MAX_METADATA} bytes')
    return unpacked


# TIFF


def _tiff(file: BinaryIO, max_pixels: int) -> Stored:
    tif = tifffile.TiffFile(file, name='image')
    page = tif.pages.first
    height, width, channels, depth = page.imagelength, page.imagewidth, page.samplesperpixel, page.bitspersample
    if DNG_TAG in page.tags or page.is_reduced:
        raise ValueError('a raw camera file, or begins with a preview')
    if page.sampleformat == 3:
        raise ValueError(f'TIFF of {depth} bits, floating point, has no white level; map it to 8 or 16 bits first')
    if depth not in (1, 2, 4, 8, 16) or page.sampleformat != 1 or page.imagedepth != 1:
        raise ValueError(f'TIFF of {depth} bits, sample format {page.sampleformat}')
    most = 1 if page.compression == 1 else PLAUSIBLE
    check_size(file, max_pixels, width, height, -(-width * channels * depth // 8), most)
    _check_segments(page)
    exif = read_exif(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    orientation = number_of(exif, ORIENTATION, 1)
    about = dict(profile=_bytes_of(page, PROFILE_TAG), exif=exif, xmp=_bytes_of(page, XMP), notes=_pages(tif))
    # gray, gray with white as 0, RGB
    colors = {0: 1, 1: 1, 2: 3}.get(page.photometric)
    if colors is None or depth < 8 or channels < colors:
        if depth == 16:
            raise ValueError('16-bit TIFF that is neither gray nor RGB')
        if page.photometric == 5:  # CMYK becomes RGB
            about['profile'] = None
        stored = _by_pillow(file, max_pixels, 'TIFF')  # turns it upright
        size = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
        return stored._replace(shape=(*size, stored.shape[2]), orientation=1, **about)
    return _plain_tiff(file, page, colors)._replace(orientation=orientation, **about)


def _plain_tiff(file: BinaryIO, page: tifffile.TiffPage, colors: int) -> Stored:
    """Gray or RGB of 8 or 16 bits.

    Of further channels the first that says that it is alpha is kept. A single one of which nothing is said is alpha
    too, as OpenCV writes it.
    """
    kinds = page.tags.valueof(EXTRA_TAG, default=2 if page.samplesperpixel == colors + 1 else ())
    kinds = [kinds] if isinstance(kinds, int) else list(kinds[:page.samplesperpixel - colors])
    alpha = next((number for number, kind in enumerate(kinds) if kind in (1, 2)), None)
    wanted = [*range(colors), *([] if alpha is None else [colors + alpha])]
    inverted, premultiplied = page.photometric == 0, alpha is not None and kinds[alpha] == 1
    dtype, planar = np.dtype(f'u{page.bitspersample // 8}'), page.planarconfig == 2
    shape = (page.imagelength, page.imagewidth, len(wanted))

    def fill(out: np.ndarray) -> None:
        for pixels, (plane, _, top, left, _), _ in page.segments():
            if pixels is None:
                raise ValueError('broken TIFF, a part has no data')
            place = out[top:top + pixels.shape[1], left:left + pixels.shape[2]]
            pixels = pixels[0, :place.shape[0], :place.shape[1]]
            for number, sample in enumerate(wanted):
                if not planar:
                    place[..., number] = pixels[..., sample]
                elif plane == sample:
                    place[..., number] = pixels[..., 0]
        for top in range(0, len(out), ROWS):
            rows = out[top:top + ROWS]
            if inverted:
                rows[..., 0] = ~rows[..., 0]
            if premultiplied:
                rows[..., :-1] = unmultiplied(rows)

    native = dtype.itemsize == 1 or page.parent.byteorder == {'little': '<', 'big': '>'}[sys.byteorder]
    as_it_is = native and not inverted and not premultiplied and len(wanted) == page.samplesperpixel
    mapped = page.is_memmappable and as_it_is
    if mapped and page.dataoffsets[0] + page.nbytes > os.fstat(file.fileno()).st_size:
        raise ValueError('truncated TIFF')
    mapped = (int(page.dataoffsets[0]), planar and page.samplesperpixel > 1) if mapped else None
    return Stored(shape, dtype, fill, mapped=mapped)


def unmultiplied(pixels: np.ndarray) -> np.ndarray:
    """Colours of pixels whose colours are multiplied by their last channel, alpha."""
    white, alpha = int(np.iinfo(pixels.dtype).max), pixels[..., -1:].astype(np.int64)
    colors = (pixels[..., :-1].astype(np.int64) * white + alpha // 2) // np.maximum(alpha, 1)
    return np.minimum(colors, white).astype(pixels.dtype)


def _check_segments(page: tifffile.TiffPage) -> None:
    """Refuses a TIFF some of whose strips or tiles have no data; tifffile makes them black."""
    if len(page.dataoffsets) < np.prod(page.chunked) or not all(page.dataoffsets) or not all(page.databytecounts):
        raise ValueError('broken TIFF, a part has no data')


def _bytes_of(page: tifffile.TiffPage, tag: int) -> Optional[bytes]:
    value = page.tags.valueof(tag)
    return value if isinstance(value, bytes) and len(value) <= MAX_METADATA else None


def _pages(tif: tifffile.TiffFile) -> tuple[str, ...]:
    try:
        return first_of(len(tif.pages), 'pages')
    except Exception:  # a broken chain of pages, which begins with a whole one
        return ('more pages cannot be read', )


# PNM of full depth


def _pnm(file: BinaryIO, max_pixels: int) -> Stored:
    gap = rb'(?:\s|#[^\n]*\n)+'
    head = re.match(rb'P([56])' + gap + rb'(\d{1,9})' + gap + rb'(\d{1,9})' + gap + rb'(\d{1,5})\s', file.read(4096))
    if not head:
        raise ValueError('broken PNM header')
    width, height, white = (int(number) for number in head.groups()[1:])
    shape, dtype = (height, width, 1 if head[1] == b'5' else 3), np.dtype('u1' if white < 256 else '>u2')
    if not 0 < white < 65536:
        raise ValueError('broken PNM header')
    check_size(file, max_pixels, width, height, width * shape[2] * dtype.itemsize, 1)

    def fill(out: np.ndarray) -> None:
        full = np.iinfo(out.dtype).max
        file.seek(head.end())
        for top in range(0, height, ROWS):
            rows = out[top:top + ROWS]
            data = file.read(rows.size * dtype.itemsize)
            if len(data) < rows.size * dtype.itemsize:
                raise ValueError('truncated PNM')
            values = np.frombuffer(data, dtype).reshape(rows.shape)
            rows[:] = values if white == full else (np.minimum(values, white) * np.float64(full / white)).round()

    return Stored(shape, dtype.newbyteorder('='), fill)


# the others


def _by_pillow(file: BinaryIO, max_pixels: int, kind: str, allow: Callable[[int], None] = int) -> Stored:
    Image.MAX_IMAGE_PIXELS = None  # check_size is asked instead
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are read beside each other
    file.seek(0)
    if kind in EXTRA_READERS:
        _add_reader(kind)
    bits, sized = 8, {'WEBP': _webp_size, 'JXL': _jxl_size}.get(kind)
    if sized:  # when Pillow opens them, it takes memory for all pixels
        width, height, bits = sized(file)
        file.seek(0)
        check_size(file, max_pixels, width, height, 3 * width)
        allow(4 * width * height)
    try:
        image = Image.open(file, formats=[kind, *(['MPO'] if kind == 'JPEG' else [])])
    except UnidentifiedImageError:
        raise ValueError(f'broken {kind}, or an unsupported variant') from None
    if image.mode not in PILLOW_MODES:
        raise ValueError(f'{kind} of Pillow mode {image.mode}')
    mode, (width, height), info = PILLOW_MODES[image.mode], image.size, image.info
    if 'transparency' in info and image.mode in ('1', 'L', 'P', 'RGB'):
        mode = WITH_ALPHA[mode]
    check_size(file, max_pixels, width, height, -(-width // 8) if image.mode == '1' else width * len(image.getbands()))
    dtype, channels = (np.uint16, 1) if mode == 'I;16' else (np.uint8, len(mode))
    exif, frames = read_exif(info.get('exif') or b''), 1
    with suppress(Exception):  # of any type, where a frame after the first is broken
        frames = getattr(image, 'n_frames', 1)

    def fill(out: np.ndarray) -> None:
        image.load()
        if image.size != (out.shape[1], out.shape[0]):
            raise ValueError('broken, with two sizes')
        # in blocks: of a whole image Pillow makes several copies
        for top in range(0, len(out), ROWS):
            rows = out[top:top + ROWS]
            block = image.crop((0, top, image.width, top + len(rows)))
            rows[:] = np.asarray(block if mode == image.mode else block.convert(mode)).reshape(rows.shape)

    # JPEG XL is upright, whatever its EXIF says, but for a JPEG that is packed in it
    orientation = 1 if kind == 'JXL' and not image.jpeg else number_of(exif, ORIENTATION, 1)
    profile = None if image.mode == 'CMYK' else info.get('icc_profile')
    notes = first_of(frames) + _cut_down(file, kind, bits if dtype == np.uint8 else 8)
    return Stored((height, width, channels), np.dtype(dtype), fill, orientation, profile, exif, info.get('xmp'), notes)


def _add_reader(kind: str) -> None:
    module, package = EXTRA_READERS[kind]
    try:
        added = import_module(module)
    except ImportError:
        how = "pip install 'cdnsr-basicsr[formats]'"
        raise ValueError(f'{kind} is read by {package}, which is not installed; {how}') from None
    if kind == 'HEIF':
        added.register_heif_opener(thumbnails=False)
    else:
        sys.modules[f'{module}.JpegXLImagePlugin'].DECODE_THREADS = 0


def _webp_size(file: BinaryIO) -> tuple[int, int, int]:
    """Width, height and bits of WebP."""
    head = file.read(30)
    chunk, body = head[12:16], head[20:]
    if chunk == b'VP8X':
        width, height = (int.from_bytes(body[start:start + 3], 'little') + 1 for start in (4, 7))
    elif chunk == b'VP8L':
        both = int.from_bytes(body[1:5], 'little')
        width, height = (both & 16383) + 1, (both >> 14 & 16383) + 1
    else:
        width, height = (int.from_bytes(body[start:start + 2], 'little') & 16383 for start in (6, 8))
    return width, height, 8


def _jxl_size(file: BinaryIO) -> tuple[int, int, int]:
    """Width, height and bits of JPEG XL."""
    head = file.read(2**16)
    found = re.search(rb'jxl(c|p....)\xff\x0a', head, re.S)
    start = 2 if head[:2] == b'\xff\x0a' else found.end() if found else len(head)
    stored, position = int.from_bytes(head[start:start + 32], 'little'), 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return stored >> position - count & (1 << count) - 1

    def size() -> tuple[int, int]:
        small = take(1)
        height = 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1
        over, under = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[take(3)]
        if over:
            return height * over // under, height
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1, height

    width, height = size()
    if take(1):  # all is as usual
        return width, height, 8
    if take(1):
        take(3)  # orientation
        if take(1):
            size()  # to be shown in
        if take(2):
            return width, height, 8  # preview or animation, where the search ends
    if take(1):
        raise ValueError(NO_HDR)
    choice = take(2)
    return width, height, (8, 10, 12)[choice] if choice < 3 else take(6) + 1


def _cut_down(file: BinaryIO, kind: str, bits: int) -> tuple[str, ...]:
    """Says of which depth the colours are that Pillow cuts down to 8 bits; refuses HDR."""
    if kind in ('AVIF', 'HEIF', 'JPEG2000'):
        file.seek(0)
        head = file.read(2**16)
        found = re.search(rb'colrnclx..(..)', head, re.S)
        if found and int.from_bytes(found[1], 'big') in HDR_TRANSFERS:
            raise ValueError(NO_HDR)
        pattern = rb'\xff\x51.{36}..(.)' if kind == 'JPEG2000' else rb'pixi.{4}[\1-\4](.)'
        found = bits == 8 and re.search(pattern, head, re.S)
        bits = (found[1][0] & 127) + (kind == 'JPEG2000') if found else 8
    return (f'only 8 of its {bits} bits', ) if bits > 8 else ()


def first_of(number: int, unit: str = 'frames') -> tuple[str, ...]:
    return (f'only the first of {number} {unit}', ) if number > 1 else ()
