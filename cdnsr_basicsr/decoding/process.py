"""The process that decodes: one that crashes, hangs or runs out of memory costs one image.

A process is started when the first image is read, and again after it has died. It is asked over a socket, of which an
end is its standard input, and goes when that is closed. It gets an open file, and gives back one in memory that holds
pixels and metadata.
"""
from __future__ import annotations

import atexit
import contextlib
import json
import math
import mmap
import numpy as np
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Optional, Tuple, Union

HEADER_BYTES = 2**28  # that a decoder may take to read a header
WORK_BYTES = 12  # and further ones for each byte of pixels: JPEG 2000 and AVIF take the most
# bytes for each byte of pixels that decoders mostly take, with what they give back; beside twice their file. Measured
USUAL_BYTES = {'JPEG': 2.6, 'PNG': 2.6, 'TIFF': 2.6, 'BMP': 2.6, 'PNM': 2.6, 'GIF': 3.4, 'AVIF': 3.6, 'WEBP': 5.2}
OTHERS_BYTES, LEAST_BYTES = 8, 2**24  # of other kinds; and beside
CPU_SECONDS = 10  # for a header, and one more for each megabyte of pixels
LONGEST = 2**16  # bytes of a message
ENVIRONMENT = dict(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MALLOC_ARENA_MAX='2')
# OpenCV's own limits, which it reads at its start; formats.check_size knows better ones
ENVIRONMENT.update({f'OPENCV_IO_MAX_IMAGE_{name}': str(2**40) for name in ('WIDTH', 'HEIGHT', 'PIXELS')})
PROGRAM = 'import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import serve; serve()'


class DecodingError(ValueError):
    """An image that cannot be read; one line that says why."""


class TooLittleRoom(DecodingError):
    """An image that takes more memory than it may.

    Attributes:
        needs: Bytes that its pixels and its decoder take.
    """

    def __init__(self, message: str, needs: int) -> None:
        super().__init__(message)
        self.needs = needs


class Picture(NamedTuple):
    """A decoded image, upright.

    Attributes:
        pixels: of shape (h, w, c), uint8 or uint16; c is 1 for gray, 2 for gray and alpha, 3 for RGB, 4 for RGBA.
            Alpha is not premultiplied. May be a read-only memory map.
        icc_profile: The colour profile of `pixels`, None if the file has none.
        exif: What describes the photograph, beginning with Exif\\0\\0; None if the file says nothing.
        xmp: XMP as text in UTF-8, None if the file has none.
        notes: What the pixels do not show of the file, such as further frames.
    """
    pixels: np.ndarray
    icc_profile: Optional[bytes] = None
    exif: Optional[bytes] = None
    xmp: Optional[bytes] = None
    notes: Tuple[str, ...] = ()


def decode(file: BinaryIO, max_pixels: int, room: Optional[int] = None) -> Picture:
    """Decodes an open file in a process of its own; as many threads as call it have one each.

    Args:
        file: It.
        max_pixels: More are refused.
        room: Bytes that its pixels and its decoder, the program itself too, may take. Default: as many as its size can
            need.

    Raises:
        DecodingError: The file is broken, too large, of a kind that is not accepted, or killed its decoder;
            TooLittleRoom, if it is known how much it needs.
    """
    with _decoder() as decoder:
        reply, data = decoder.ask(file, max_pixels, room)
    if 'needs' in reply:
        raise TooLittleRoom(reply['error'], reply['needs'])
    if 'error' in reply:
        raise DecodingError(reply['error'])
    shape, dtype = tuple(reply['shape']), np.dtype(reply['dtype'])
    size = math.prod(shape) * dtype.itemsize if reply['mapped'] is None else 0
    metadata, position = [], size
    for length in reply['metadata']:
        metadata.append(bytes(data[position:position + length]) or None)
        position += length
    if reply['mapped'] is None:
        pixels = np.frombuffer(data, dtype, math.prod(shape)).reshape(shape)
    else:
        offset, planar = reply['mapped']
        pixels = np.memmap(file, dtype, 'r', offset, (shape[2], *shape[:2]) if planar else shape)
        pixels = np.moveaxis(pixels, 0, -1) if planar else pixels
    return Picture(pixels, *metadata, tuple(reply['notes']))


class _Decoder:

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = json.dumps([os.path.abspath(folder) for folder in sys.path])
        with theirs:
            # in a session of its own: Ctrl-C is for this process alone, which ends the decoder in order
            self.process = subprocess.Popen([sys.executable, '-c', PROGRAM.format(__name__), path],
                                            stdin=theirs,
                                            stdout=subprocess.DEVNULL,
                                            env=dict(os.environ, **ENVIRONMENT),
                                            start_new_session=True)

    def ask(self, file: BinaryIO, max_pixels: int, room: Optional[int]) -> tuple[dict[str, Any], Any]:
        """The reply, and the memory that holds what does not fit into it."""
        try:
            question = json.dumps([max_pixels, room]).encode()
            socket.send_fds(self.socket, [question], [file.fileno()])
            message, files, _, _ = socket.recv_fds(self.socket, LONGEST, 1)
        except (BrokenPipeError, ConnectionResetError):
            message = b''
        if not message:
            return {'error': self._cause_of_death() + ', or has too little memory' * (room is not None)}, b''
        data: Any = b''
        for number in files:
            size = os.fstat(number).st_size
            data = mmap.mmap(number, size) if size else b''
            os.close(number)
        return json.loads(message), data

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGXCPU:
            return f'takes more than {CPU_SECONDS} s plus 1 s a megabyte to decode'
        if code == -signal.SIGKILL:
            return 'its decoder was killed; is there too little memory?'
        name = signal.Signals(-code).name if code < 0 else f'exit code {code}'
        return f'broken, it crashes its decoder ({name})'

    def is_alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def end(self) -> None:
        self.socket.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


_idle: list[_Decoder] = []
_lock = threading.Lock()


def resident() -> int:
    """Bytes that the decoders hold which are waiting for an image."""
    with _lock:
        return sum(_pages(decoder.process.pid)[1] for decoder in _idle)


@contextlib.contextmanager
def _decoder() -> Iterator[_Decoder]:
    """A decoder that no other thread uses; a new one if there is none."""
    decoder = None
    with _lock:
        while _idle and decoder is None:
            decoder = _idle.pop()
            decoder = decoder if decoder.is_alive() else decoder.end()
    decoder = decoder or _Decoder()
    try:
        yield decoder
    except BaseException:  # Ctrl-C, too: a reply that nobody has read would be taken for the next one's
        decoder.end()
        raise
    with _lock:
        _idle.append(decoder)


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


# what runs in the decoder


def serve() -> None:
    """Decodes files until the other end is closed."""
    from .formats import ACCEPTED  # noqa: F401  what fails here is said at the terminal
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # the remarks of decoders
    warnings.simplefilter('ignore')
    threading.Thread(target=_end_with, args=(os.getppid(), ), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = socket.socket(fileno=0)
    while True:
        message, files, _, _ = socket.recv_fds(channel, LONGEST, 1)
        if not message:
            os._exit(0)
        with os.fdopen(files[0], 'rb') as file:
            reply, data = _decode(file, *json.loads(message))
            socket.send_fds(channel, [json.dumps(reply).encode()], data)
            for number in data:
                os.close(number)


def _end_with(parent: int) -> None:
    """Ends this process when its parent has died, while it decodes too."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _decode(file: BinaryIO, max_pixels: int, room: Optional[int]) -> tuple[dict[str, Any], list[int]]:
    from .formats import kind_of, read_header

    own = _pages()[1]

    def allow(size: int) -> None:
        """Lets this process decode that many bytes of pixels."""
        needs = own + math.ceil(usual * size) + 2 * os.fstat(file.fileno()).st_size + LEAST_BYTES
        if room is not None and needs > room:
            raise TooLittleRoom(f'takes {needs} bytes to decode', needs)
        _limit(HEADER_BYTES + WORK_BYTES * size, CPU_SECONDS + size / 1e6, None if room is None else room - own - size)

    try:
        # a header is read in any case: it says what the pixels take
        _limit(HEADER_BYTES, CPU_SECONDS, None if room is None else max(LEAST_BYTES, room - own))
        usual = USUAL_BYTES.get(kind_of(file.read(64)) or '', OTHERS_BYTES)
        file.seek(0)
        stored = read_header(file, max_pixels, allow)
        height, width, _ = stored.shape
        metadata = _clean(stored)
        size = math.prod(stored.shape) * stored.dtype.itemsize
        turned = stored.orientation in range(2, 9)
        mapped = None if turned else stored.mapped
        if not mapped:
            allow(size)
        shape = (width, height, stored.shape[2]) if turned and stored.orientation >= 5 else stored.shape
        size = 0 if mapped else size
        number = os.memfd_create('image')
        os.ftruncate(number, size + sum(map(len, metadata)))
        if size:
            pixels = np.frombuffer(mmap.mmap(number, size), stored.dtype).reshape(shape)
            stored.fill(as_stored(pixels, stored.orientation))
        os.lseek(number, size, os.SEEK_SET)
        with os.fdopen(os.dup(number), 'wb') as memory:
            memory.write(b''.join(metadata))
        reply = dict(shape=shape, dtype=stored.dtype.name, mapped=mapped, notes=stored.notes)
        return dict(reply, metadata=[len(part) for part in metadata]), [number]
    except TooLittleRoom as error:
        return {'error': str(error), 'needs': error.needs}, []
    # decoders meet broken files with errors of any type, from SyntaxError to MemoryError
    except Exception as error:
        reason = 'takes too much memory' if isinstance(error, MemoryError) else str(error) or type(error).__name__
        return {'error': ' '.join(reason.split())[:300]}, []


def _clean(stored: Any) -> list[bytes]:
    """Profile, EXIF and XMP, empty where there is none."""
    from .metadata import clean_exif, clean_xmp
    parts = stored.profile, clean_exif(stored.exif), clean_xmp(stored.xmp) if isinstance(stored.xmp, bytes) else None
    return [part if isinstance(part, bytes) else b'' for part in parts]


def _pages(pid: Union[int, str] = 'self') -> List[int]:
    """What /proc says of a process's memory, in bytes: all, resident, shared, code, 0, written, 0; 0 if it is gone."""
    try:
        with open(f'/proc/{pid}/statm') as file:
            return [int(pages) * mmap.PAGESIZE for pages in file.read().split()]
    except OSError:
        return [0] * 7


def _limit(size: int, seconds: float, room: Optional[int]) -> None:
    """Lets this process take so much more memory and time of a CPU than it has by now.

    Args:
        size: Bytes of its address space.
        seconds: Time.
        room: Bytes of what it writes itself, which are resident sooner or later. Default: as many.
    """
    taken, _, _, _, _, written, _ = _pages()
    ends = {resource.RLIMIT_AS: taken + size, resource.RLIMIT_CPU: math.ceil(time.process_time() + seconds)}
    ends[resource.RLIMIT_DATA] = resource.RLIM_INFINITY if room is None else written + room
    for kind, wanted in ends.items():
        most = resource.getrlimit(kind)[1]
        unlimited = resource.RLIM_INFINITY  # -1
        resource.setrlimit(kind,
                           (wanted if most == unlimited else most if wanted == unlimited else min(wanted, most), most))


def as_stored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Shows upright pixels as a file of that EXIF orientation has them; values but 2 to 8 mean that it is upright."""
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation in range(5, 9) else pixels
