"""Files and folders that appear under their name only when they are complete."""
from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union

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
        raise OSError(f'{path}: is a mount point and cannot be replaced; choose a folder inside of it')
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
