"""The memory of the process: keeping what is freed, where that saves time, and how much it was at most."""
from __future__ import annotations

import ctypes
import sys
from pathlib import Path

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


def peak_mib(is_cuda: bool) -> float:
    """Most memory that was in use so far, in MiB: of the process, on a GPU of its tensors; NaN if that is not known."""
    if is_cuda:
        import torch
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path('/proc/self/status')
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith('VmHWM'):
            return int(line.split()[1]) / 1024
    return float('nan')
