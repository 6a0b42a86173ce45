"""Reads properties of an image from a file or an LMDB value without decoding it."""
from __future__ import annotations

import cv2
import io
import numpy as np
import os
import struct
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from PIL import Image
from typing import Callable, Iterator, Union

from ..options import OptionError

PNG, IEND = b'\x89PNG\r\n\x1a\n', b'\x00\x00\x00\x00IEND\xaeB`\x82'
JPEG, EOI = b'\xff\xd8\xff', b'\xff\xd9'
NEAR = 2**16  # bytes at either end of a file that are examined
ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width change places
# walks through an LMDB where a crash does no harm: a file that is shorter than it says ends a process by SIGBUS
SCAN = '''
import lmdb, sys
try:
    with lmdb.open(sys.argv[1], readonly=True, lock=False, readahead=False) as env, env.begin(buffers=True) as txn:
        for key, value in txn.cursor():
            value[-1:].tobytes()
except lmdb.Error as error:
    sys.exit(str(error))
'''


class NotAPicture(ValueError):
    """A file cannot be used for training or testing; the message says why."""


@contextmanager
def any_size() -> Iterator[None]:
    """Lets Pillow open images of any size: only their headers are read."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of damaged metadata, which does not matter
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def decoded(data: bytes) -> np.ndarray:
    """Decodes an image as BasicSR does, with OpenCV: shape (h, w, 3), BGR, uint8."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise NotAPicture('is not an image that can be read')
    return image


def decoded_size(data: bytes) -> tuple[int, int]:
    height, width, _ = decoded(data).shape
    return height, width


def png_size(head: bytes, tail: bytes, whole: Callable[[], bytes]) -> tuple[int, int]:
    """Height and width of a PNG. It must have its end, and no frames: OpenCV may crash on these."""
    if IEND not in tail:
        raise NotAPicture('is truncated: its end is missing')
    place, upright = 8, True
    while place + 8 <= len(head):
        length, kind = struct.unpack('>I4s', head[place:place + 8])
        if kind == b'acTL':
            raise NotAPicture('is an animated PNG; save one of its frames')
        if kind == b'IDAT':
            break
        upright = upright and kind != b'eXIf'
        place += length + 12
    width, height = struct.unpack('>II', head[16:24])
    return (height, width) if upright else decoded_size(whole())


def picture_size(head: bytes, tail: bytes, whole: Callable[[], bytes]) -> tuple[int, int]:
    """Height and width of an image, as BasicSR would decode it.

    Args:
        head: Its first bytes.
        tail: Its last bytes.
        whole: Gives all of them.

    Raises:
        NotAPicture: It is not an image, is truncated, or cannot be read by OpenCV, which BasicSR reads images with.
    """
    if head.startswith(PNG) and len(head) >= 33:
        return png_size(head, tail, whole)
    if head.startswith(JPEG):
        if EOI not in tail:
            raise NotAPicture('is truncated: its end is missing')
        try:
            with any_size(), Image.open(io.BytesIO(whole())) as image:
                width, height = image.size
                turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
        except Exception:  # whatever Pillow makes of damaged metadata: OpenCV decides
            pass
    return decoded_size(whole())


def check_decodes(data: bytes) -> None:
    """Decodes an image strictly: OpenCV fills what is damaged with grey.

    Raises:
        NotAPicture: Some of it is damaged.
    """
    decoded(data)
    if data.startswith((PNG, JPEG)):
        try:
            with any_size(), Image.open(io.BytesIO(data)) as image:
                image.load()
        except Exception as error:  # Pillow's have no common type
            raise NotAPicture(f'is damaged: {error}') from None


class Folder:
    """Images by their paths relative to a folder."""

    def __init__(self, root: str) -> None:
        self.root = root

    def name(self, key: str) -> str:
        return os.path.join(self.root, key)

    def read(self, key: str) -> bytes:
        return Path(self.name(key)).read_bytes()

    def size(self, key: str) -> tuple[int, int]:
        """Height and width of an image; NotAPicture or OSError if it has none."""
        with open(self.name(key), 'rb') as file:
            head = file.read(NEAR)
            file.seek(max(0, os.fstat(file.fileno()).st_size - NEAR))
            return picture_size(head, file.read(NEAR), lambda: self.read(key))

    def bytes_of(self, key: str) -> int:
        return os.path.getsize(self.name(key))


class Database:
    """Images by their keys in an LMDB that has been checked."""

    def __init__(self, root: str) -> None:
        import lmdb
        self.root = root
        self.environment = lmdb.open(root, readonly=True, lock=False, readahead=False)

    def name(self, key: str) -> str:
        return f'{self.root}: {key}'

    def read(self, key: str) -> bytes:
        with self.environment.begin() as transaction:
            value = transaction.get(key.encode('ascii'))
        if value is None:
            raise NotAPicture('is missing, although meta_info.txt lists it')
        return value

    def size(self, key: str) -> tuple[int, int]:
        """Height and width of an image; NotAPicture if it has none."""
        value = self.read(key)
        return picture_size(value[:NEAR], value[-NEAR:], lambda: value)

    def bytes_of(self, key: str) -> int:
        return len(self.read(key))

    def close(self) -> None:
        self.environment.close()


def keys_of_lmdb(root: str, where: str, walk: bool = True) -> list[str]:
    """The keys that meta_info.txt of an LMDB names, once the whole database has been walked through, if `walk` is set.

    Raises:
        OptionError: It is none, cut off or damaged, or meta_info.txt is not as BasicSR expects it.
    """
    for name in ('data.mdb', 'meta_info.txt'):
        if not os.path.isfile(os.path.join(root, name)):
            raise OptionError(where, f'{root} is not an LMDB of images: it has no {name}')
    if walk:
        scan = subprocess.run([sys.executable, '-c', SCAN, root], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if scan.returncode:
            said = scan.stderr.decode(errors='replace').strip().splitlines()
            reason = said[-1] if scan.returncode > 0 and said else 'reading it to the end crashes'
            raise OptionError(where, f'{root} is truncated or damaged ({reason}); create it again')
    return read_names(os.path.join(root, 'meta_info.txt'), where, '.')


def read_names(path: str, where: str, end: str) -> list[str]:
    """The text before `end` in each line of a text file, as BasicSR reads it.

    Raises:
        OptionError: It is no text, begins with a byte order mark, has empty lines or lines twice.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(where, f'{path} cannot be read: {error}') from None
    if text.startswith('\ufeff'):
        raise OptionError(where, f'{path} begins with a byte order mark; save it as UTF-8 without one')
    names = [line.split(end)[0].strip() for line in text.splitlines()]
    for number, name in enumerate(names, 1):
        if not name:
            raise OptionError(where, f'{path}, line {number}: names no image')
    if not names:
        raise OptionError(where, f'{path} names no image')
    return names


Pictures = Union[Folder, Database]
