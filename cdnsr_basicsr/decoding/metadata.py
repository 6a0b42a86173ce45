"""EXIF and XMP of an image that has been turned upright, and gets another size."""
from __future__ import annotations

import re
from contextlib import suppress
from PIL import Image
from typing import Any, Optional

EXIF_IFD, GPS_IFD, INTEROP_IFD, MAKER_NOTE = 34665, 34853, 40965, 37500
ORIENTATION, WIDTH, HEIGHT = 274, 40962, 40963
# of the first directory, what describes a photograph: caption, camera, resolution, software, date, artist, computer,
# rating, copyright, and what Windows has of title, comment, author, keywords, subject. The rest describes the pixels
DESCRIBING = (270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 18246, 33432, 40091, 40092, 40093, 40094, 40095)


def clean_exif(exif: Image.Exif) -> Optional[bytes]:
    """What describes the photograph, without thumbnail, for upright pixels; None if there is nothing.

    A directory or an entry that is broken is left out.
    """
    kept = Image.Exif()
    for tag in DESCRIBING:
        with suppress(Exception):  # Pillow's errors on what is broken are of any type
            _keep(kept, kept, tag, exif.get(tag))
    for place in (EXIF_IFD, GPS_IFD):
        entries: dict[int, Any] = {}
        with suppress(Exception):
            entries = dict(exif.get_ifd(place))
        if INTEROP_IFD in entries:
            entries.pop(INTEROP_IFD)
            with suppress(Exception):
                entries[INTEROP_IFD] = dict(exif.get_ifd(INTEROP_IFD))
        for tag, value in entries.items():
            with suppress(Exception):
                _keep(kept, kept.get_ifd(place), tag, value)
    if not (len(kept) or kept.get_ifd(EXIF_IFD) or kept.get_ifd(GPS_IFD)):
        return None
    kept[ORIENTATION] = 1
    return kept.tobytes()


def _keep(exif: Image.Exif, place: Any, tag: int, value: Any) -> None:
    """Enters a value, if it can be written."""
    if value is None:
        return
    place[tag] = value
    try:
        exif.tobytes()
    except Exception:
        del place[tag]
        raise


def resized_exif(exif: bytes, width: int, height: int, without: tuple[int, ...] = ()) -> bytes:
    """Says another size where EXIF says one, and leaves some entries of the photograph's directory out."""
    parsed = parse_exif(exif)
    entries = parsed.get_ifd(EXIF_IFD)
    entries.update((tag, length) for tag, length in ((WIDTH, width), (HEIGHT, height)) if tag in entries)
    for tag in without:
        entries.pop(tag, None)
    return parsed.tobytes()


def parse_exif(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data)
    for place in (EXIF_IFD, GPS_IFD, INTEROP_IFD):
        if place != INTEROP_IFD or INTEROP_IFD in exif.get_ifd(EXIF_IFD):
            exif.get_ifd(place)
    return exif


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
