"""Keeping freed memory in the process, where that saves time."""
from __future__ import annotations

import ctypes
import sys

# parameters of glibc's mallopt and their values: serve large blocks from the heap, hardly ever give its end back, and
# grow it by 64 MiB at a time
MALLOPT = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, 2**31 - 1), 'M_TOP_PAD': (-2, 64 * 2**20)}


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory in the process instead of handing every large block back to the kernel.

    On a CPU each activation of a network is otherwise unmapped and faulted in again, page by page. The process stays as
    large as it has ever been. Does nothing where the C library is another one.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has no mallopt
        return False
    return all([mallopt(parameter, value) == 1 for parameter, value in MALLOPT.values()])
