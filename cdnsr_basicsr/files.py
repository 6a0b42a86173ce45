"""Files and folders that appear under their name only when they are complete."""
from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Optional, Union

from .options import OptionError

MAX_NAME = 255  # bytes of a file's name


@contextmanager
def replace_when_done(path: Union[str, Path]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, and renames it to ``path`` when the block ends without an error.

    The temporary name ends like the final one, so that libraries which go by the extension can write it. Whatever
    was at ``path`` stays untouched until then; after an error the temporary file is removed.
    """
    path = Path(path)
    name = path.name
    while len(os.fsencode(f'.{os.getpid()}.{name}')) > MAX_NAME:  # a name that is long enough already
        name = name[1:]
    temporary = path.with_name(f'.{os.getpid()}.{name}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_writable(folder: Union[str, Path]) -> None:
    """Makes a folder if it is missing, and writes to it, so that one that cannot be is known before the work is done.

    Raises:
        OSError: It cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix='.', dir=folder) as file:
            file.write(b'0')
    except OSError as error:
        raise OSError(f'{folder}: cannot be written: {error.strerror}') from error


def is_running(pid: str) -> bool:
    """Whether another process of this number exists."""
    if pid == str(os.getpid()):
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def replace_folder_when_done(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside ``path``, which takes its place when the block ends without an error.

    What runs that were killed have left beside it is removed.

    Raises:
        OSError: ``path`` is a mount point, whose place nothing can take.
    """
    if path.is_mount():
        raise OSError(f'{path}: is a mount point and cannot be replaced; choose a folder inside it')
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f'.{path.name}.preparing-*'):
        if not is_running(stale.name.split('-')[-1]):  # left by a run that was killed
            shutil.rmtree(stale)
    work = path.parent / f'.{path.name}.preparing-{os.getpid()}'
    work.mkdir()
    try:
        yield work
        replaced = path.parent / f'.{path.name}.replaced-{os.getpid()}'  # never taken for a stale one: it is finished
        if path.exists():
            os.rename(path, replaced)
        os.rename(work, path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class RunLock:
    """Makes a folder belong to one run at a time, on all machines that share its drive, where that can lock files.

    The lock is a hidden file beside the folder, which the run may move away and make anew. It is the system's, so that
    it ends with its process however that ends; the file alone locks nothing.

    Args:
        folder: What the run writes; it need not exist.

    Raises:
        OptionError: Another run has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder.with_name(f'.{folder.name}.lock')
        self.descriptor: Optional[int] = None

    def __enter__(self) -> RunLock:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.read(descriptor, 200).decode(errors='replace').strip()
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise OptionError(
                        str(self.folder), f'belongs to a run that is still active{owner and f" ({owner})"}; wait '
                        'for its end, or choose another name') from None
                reason = f'cannot be locked on this drive ({error.strerror})'
                print(f'{self.folder}: {reason}; do not start a second run of this name.', flush=True)
                return self
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.file), os.fstat(descriptor)):
                    break
            os.close(descriptor)  # its owner has removed the file between the two calls
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
        self.descriptor = descriptor
        return self

    def __exit__(self, *args: object) -> None:
        if self.descriptor is not None:
            self.file.unlink(missing_ok=True)
            os.close(self.descriptor)
