"""EXIF and XMP of an image that is turned upright, and gets another size.

Entries are kept as the bytes that they are: what Pillow writes has other types than what it read, and no letters beyond
ASCII.
"""
from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple

EXIF, GPS, INTEROP, MAKER_NOTE = 34665, 34853, 40965, 37500
BELOW = {0: (EXIF, GPS), EXIF: (INTEROP, )}  # directories that a directory points to
DESCRIPTION, RESOLUTION, ORIENTATION, XMP = 270, (282, 283, 296), 274, 700
# of the first directory, what describes a photograph: caption, camera, resolution, software, date, artist, computer,
# rating, copyright, and what Windows has of title, comment, author, keywords, subject. The rest describes the pixels
DESCRIBING = (270, 271, 272, *RESOLUTION, 305, 306, 315, 316, 18246, 33432, 40091, 40092, 40093, 40094, 40095)
OF_PIXELS = rb'ImageJ=|\{"shape"|.{0,200}<OME'  # captions that programs of microscopy use for what the pixels are
WIDTH, HEIGHT = 40962, 40963
ASCII, SHORT, LONG, LONG8 = 2, 3, 4, 16
BYTES = {1: 1, ASCII: 1, SHORT: 2, LONG: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of each type
UNITS = {SHORT: 2, LONG: 4, 5: 4, 8: 2, 9: 4, 10: 4, 11: 4, 12: 8, 13: 4}  # bytes whose order depends on the file's
MAX_ENTRIES, MAX_BYTES = 1000, 2**22  # of a directory; more are not meant well


class Directory(NamedTuple):
    """Entries by tag, as type and little-endian bytes, and directories that entries point to."""
    entries: Dict[int, Tuple[int, bytes]]
    below: Dict[int, Directory]


def read_exif(data: Any) -> Directory:
    """The directories of EXIF, or of a whole TIFF; what is broken in them is left out.

    Args:
        data: bytes or a memory map.
    """
    empty = Directory({}, {})
    if data[:6] == b'Exif\0\0':
        data = data[6:]
    order = {b'II': '<', b'MM': '>'}.get(data[:2])
    if order is None or len(data) < 16:
        return empty
    big = struct.unpack_from(f'{order}H', data, 2)[0] == 43
    first = struct.unpack_from(f'{order}{"Q" if big else "I"}', data, 8 if big else 4)[0]
    return _read_directory(data, first, order, big, 0)


def _read_directory(data: Any, place: int, order: str, big: bool, name: int) -> Directory:
    found = Directory({}, {})
    width, pointer, row = (8, 'Q', 20) if big else (4, 'I', 12)
    if place + 8 > len(data):
        return found
    count = struct.unpack_from(f'{order}{"Q" if big else "H"}', data, place)[0]
    place, left = place + (8 if big else 2), MAX_BYTES
    for start in range(place, min(place + row * min(count, MAX_ENTRIES), len(data) - row + 1), row):
        tag, kind, number = struct.unpack_from(f'{order}HH{pointer}', data, start)
        if tag in BELOW.get(name, ()):
            offset = struct.unpack_from(f'{order}{pointer}', data, start + row - width)[0]
            found.below[tag] = _read_directory(data, offset, order, big, tag)
        size = BYTES.get(kind, 0) * number
        begin = start + row - width
        if size > width:
            begin = struct.unpack_from(f'{order}{pointer}', data, begin)[0]
        if not 0 < size <= min(left, len(data) - begin) or tag in found.entries or tag in BELOW.get(name, ()):
            continue
        left -= size
        value = bytes(data[begin:begin + size])
        if order == '>' and kind in UNITS:
            unit = UNITS[kind]
            value = b''.join(value[at:at + unit][::-1] for at in range(0, size, unit))
        found.entries[tag] = (kind, value)
    return found


def number_of(directory: Directory, tag: int, default: int) -> int:
    """The first number of an entry of integers."""
    kind, value = directory.entries.get(tag, (0, b''))
    return int.from_bytes(value[:BYTES[kind]], 'little') if kind in (SHORT, LONG) else default


def clean_exif(exif: Directory) -> Optional[bytes]:
    """EXIF of what describes the photograph, for upright pixels, without thumbnail; None if there is nothing."""
    entries = {tag: exif.entries[tag] for tag in DESCRIBING if tag in exif.entries}
    if re.match(OF_PIXELS, entries.get(DESCRIPTION, (0, b''))[1], re.S):
        del entries[DESCRIPTION]
    below = {tag: directory for tag, directory in exif.below.items() if directory.entries}
    if not below and not set(entries) - set(RESOLUTION):
        return None
    entries[ORIENTATION] = (SHORT, b'\1\0')
    return pack_exif(Directory(entries, below))


def pack_exif(exif: Directory) -> bytes:
    return b'Exif\0\0II*\0\x08\0\0\0' + _pack(exif, 8)


def _pack(directory: Directory, place: int, big: bool = False, ready: Optional[Dict[int, bytes]] = None) -> bytes:
    """A directory for the position `place`, then its values, then those below it; `ready` are rows as they are."""
    width, pointer, row = (8, 'Q', 20) if big else (4, 'I', 12)
    rows, values = dict(ready or {}), b''
    count = len({**rows, **directory.entries, **directory.below})
    end = place + (16 if big else 6) + row * count
    for tag, (kind, value) in directory.entries.items():
        stored = value.ljust(width, b'\0')
        if len(value) > width:
            stored = struct.pack(f'<{pointer}', end + len(values))
            values += value + b'\0' * (len(value) % 2)
        rows[tag] = struct.pack(f'<HH{pointer}', tag, kind, len(value) // BYTES[kind]) + stored
    for tag, below in directory.below.items():
        rows[tag] = struct.pack(f'<HH{pointer}{pointer}', tag, LONG8 if big else LONG, 1, end + len(values))
        values += _pack(below, end + len(values), big)
    head = struct.pack('<Q' if big else '<H', len(rows))
    return head + b''.join(rows[tag] for tag in sorted(rows)) + struct.pack(f'<{pointer}', 0) + values


def resized_exif(exif: bytes, width: int, height: int, without: Tuple[int, ...] = ()) -> bytes:
    """Says another size where EXIF says one, and leaves some entries of the photograph's directory out."""
    parsed = read_exif(exif)
    entries = parsed.below[EXIF].entries if EXIF in parsed.below else {}
    for tag, length in ((WIDTH, width), (HEIGHT, height)):
        if tag in entries:
            entries[tag] = (LONG, struct.pack('<I', length))
    for tag in without:
        entries.pop(tag, None)
    return pack_exif(parsed)


def add_to_tiff(path: Path, exif: Optional[bytes], xmp: Optional[bytes]) -> None:
    """Adds EXIF and XMP to a little-endian TIFF of one page: a new directory at its end."""
    added = read_exif(exif) if exif else Directory({}, {})
    if xmp:
        added.entries[XMP] = (1, xmp)
    if not added.entries:
        return
    with open(path, 'r+b') as file:
        big = file.read(4) == b'II+\0'
        pointer, row = ('Q', 20) if big else ('I', 12)
        file.seek(8 if big else 4)
        file.seek(struct.unpack(f'<{pointer}', file.read(8 if big else 4))[0])
        count = struct.unpack('<Q' if big else '<H', file.read(8 if big else 2))[0]
        rows = [file.read(row) for _ in range(count)]
        place = file.seek(0, 2)
        file.write(b'\0' * (place % 2))
        place += place % 2
        file.write(_pack(added, place, big, {int.from_bytes(data[:2], 'little'): data for data in rows}))
        file.seek(8 if big else 4)
        file.write(struct.pack(f'<{pointer}', place))


def clean_xmp(xmp: bytes) -> Optional[bytes]:
    """XMP for upright pixels, without thumbnails; None if it is no text."""
    try:
        xmp.decode()
    except UnicodeDecodeError:
        return None
    xmp = re.sub(rb'<(xmp|xap):Thumbnails>.*?</\1:Thumbnails>', b'', xmp.strip(b'\0'), flags=re.S)
    return re.sub(rb'(tiff:Orientation(?:="|=\'|>))\d+', rb'\g<1>1', xmp) or None


def resized_xmp(xmp: bytes, width: int, height: int) -> bytes:
    """Says another size where XMP says one."""
    sizes = {rb'tiff:ImageWidth|exif:PixelXDimension': width, rb'tiff:ImageLength|exif:PixelYDimension': height}
    for names, length in sizes.items():
        xmp = re.sub(rb'((?:' + names + rb')(?:="|=\'|>))\d+', rb'\g<1>%d' % length, xmp)
    return xmp
