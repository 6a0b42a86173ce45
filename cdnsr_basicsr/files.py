"""Files that appear under their name only when they are complete."""
from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union


@contextmanager
def replace_when_done(path: Union[str, Path]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, and renames it to ``path`` when the block ends without an error.

    The temporary name ends like the final one, so that libraries which go by the extension can write it. Whatever
    was at ``path`` stays untouched until then; after an error the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
