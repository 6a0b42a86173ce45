"""The memory of the process: keeping what is freed, where that saves time, and staying below a limit."""
from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator, Optional, Protocol

# parameters of glibc's mallopt and their values: serve large blocks from the heap, hardly ever give its end back, and
# grow it by 64 MiB at a time
MALLOPT = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, 2**31 - 1), 'M_TOP_PAD': (-2, 64 * 2**20)}
MIB = 2**20
SHARE = 0.75  # of what is free, that 'auto' takes
SPARE = 48 * MIB  # of a limit, for what no plan knows: modules, code compiled for a size, gaps between what is freed
REUSED = 0.75  # of what a pass has taken and freed, that the next one takes in any case instead of more
UNEVEN = 1.25  # times what a pass takes is what others may take for their size, which fit less well between each other
ROUNDED = 16 * MIB  # figures that users are told are multiples of this


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
        return torch.cuda.max_memory_allocated() / MIB
    peak = _status('self', 'VmHWM')
    return peak / MIB if peak else float('nan')


class ShortOfMemory(MemoryError):
    """What would take more memory than the limit allows; one line that says how much."""


class Memory(Protocol):
    """The memory that is limited, in bytes. What is freed in it is kept, until `trim`."""
    holder: str

    def used(self) -> int:
        """How much is held."""

    def peak(self) -> int:
        """How much was held at most."""

    def available(self) -> int:
        """How much more can be had."""

    def trim(self) -> None:
        """Gives back what is freed."""

    def enforce(self, limit: int) -> bool:
        """Has more than that refused to torch, and says whether that is possible."""


class HostMemory:
    """Resident memory of this process and of those that it has started, which here are decoders.

    Raises:
        OSError: It cannot be measured, or freed memory not be kept, on this system.
    """
    holder = 'Python, torch and the network'

    def __init__(self) -> None:
        if not keep_freed_memory() or not _status('self', 'VmRSS'):
            raise OSError('needs Linux with glibc, and /proc')

    def used(self) -> int:
        return _status('self', 'VmRSS') + self._others()

    def peak(self) -> int:
        return _status('self', 'VmHWM') + self._others()

    @staticmethod
    def _others() -> int:
        pids = []
        for task in os.listdir('/proc/self/task'):
            with suppress(OSError):  # a thread that has just ended
                pids += Path('/proc/self/task', task, 'children').read_text().split()
        return sum(_status(pid, 'VmRSS') for pid in pids)

    def available(self) -> int:
        return available()

    def trim(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)

    def enforce(self, limit: int) -> bool:
        return False  # RLIMIT_DATA would have the next malloc of any library fail, which few of them survive


class GpuMemory:
    """Memory of a GPU that torch has reserved for its tensors; without what CUDA itself takes, some 0.5 GiB.

    Args:
        device: Number of the GPU.
    """
    holder = 'the network'

    def __init__(self, device: int) -> None:
        import torch
        self.cuda, self.device = torch.cuda, device

    def used(self) -> int:
        return self.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        return self.cuda.max_memory_reserved(self.device)

    def available(self) -> int:
        return self.cuda.mem_get_info(self.device)[0]

    def trim(self) -> None:
        self.cuda.empty_cache()

    def enforce(self, limit: int) -> bool:
        self.cuda.set_per_process_memory_fraction(min(1., limit / self.cuda.mem_get_info(self.device)[1]), self.device)
        return True  # torch gives back what it has kept before it fails


class MemoryLimit:
    """How much memory may be held at most. Who plans something asks how much is free and reserves what it will take.

    Args:
        memory: What is limited.
        size: Bytes. Default: what is held, and SHARE of what is available, parted between the processes that torchrun
            has started on this machine.

    Attributes:
        size: Bytes.
        reserved: Bytes that will be taken beside what is planned.
        users: By how many what is free is planned with.
    """

    def __init__(self, memory: Memory, size: Optional[int] = None) -> None:
        if size is None:
            processes = os.environ.get('LOCAL_WORLD_SIZE', '1')
            share = SHARE / int(processes) if processes.isdecimal() and int(processes) else SHARE
            size = memory.used() + int(share * memory.available())
        self.memory, self.size, self.reserved, self.users = memory, size, 0, 1
        self.taken = 0  # by the largest pass since memory was given back: most of it will be taken again, not more
        self.enforced = memory.enforce(size)

    @property
    def of_host(self) -> bool:
        """Whether it limits the memory in which images are read and written."""
        return isinstance(self.memory, HostMemory)

    @contextmanager
    def reserving(self, size: int) -> Iterator[None]:
        """Context in which so many bytes are not free, because they will be taken; see `reserved`."""
        self.reserved += size
        try:
            yield
        finally:
            self.reserved -= size

    @contextmanager
    def shared_by(self, users: int) -> Iterator[None]:
        """Context in which that many plan, each with an equal part of what is free; all plans will be held at once."""
        self.users = users
        try:
            yield
        finally:
            self.users = 1

    def trim(self) -> None:
        """Gives back what was freed."""
        self.memory.trim()
        self.taken = 0

    def free(self) -> int:
        """Bytes that can be planned with; what was freed is given back first."""
        self.trim()
        return max(0, self.size - self.memory.used() - self.reserved - SPARE) // self.users

    def has_room(self, size: int) -> bool:
        """Whether a pass can take so many bytes now; if need be, what was freed is given back first."""
        for trimmed in (False, True):
            more = size - int(REUSED * min(size, self.taken))
            if self.enforced or self.memory.used() + more + SPARE // 4 <= self.size:
                self.taken = max(size, self.taken)
                return True
            if not trimmed:
                self.trim()
        return False

    def growth(self, run: Callable[[], object]) -> int:
        """Bytes that something takes, beyond what its first run loads and keeps; some more, see UNEVEN."""
        run()
        self.trim()
        before = self.memory.used()
        run()
        return int(UNEVEN * max(0, self.memory.used() - before))

    def short_of(self, size: int, what: str) -> ShortOfMemory:
        """The error to be raised where at least so many bytes have to be free.

        Args:
            size: Bytes.
            what: For what they are.
        """
        held, size = self.memory.used(), size * self.users
        parts = [f'{mib(held + SPARE)} for {self.memory.holder}', f'{mib(size)} for {what}']
        parts[1:1] = [f'{mib(self.reserved)} for the image and its result'] if self.reserved else []
        total = rounded(held + SPARE + self.reserved + size)
        return ShortOfMemory(f'needs {mib(total)} of memory ({", ".join(parts)}), but the limit is {mib(self.size)}')


def rounded(size: int) -> int:
    """A size that users are told: enough, and short."""
    return -(-(size + ROUNDED // 2) // ROUNDED) * ROUNDED


def mib(size: float) -> str:
    """A size as users read and give it."""
    return f'{round(size / MIB)}M'


def available(root: Path = Path('/')) -> int:
    """Bytes that the processes of this machine, or of the container that this one is in, can still take.

    Args:
        root: Where proc and sys are.
    """
    found = [_kib(root / 'proc/meminfo', 'MemAvailable')]
    with suppress(OSError):
        for line in (root / 'proc/self/cgroup').read_text().splitlines():
            _, names, path = line.split(':', 2)
            second = names == ''
            if not (second or 'memory' in names.split(',')):
                continue
            folder = root / 'sys/fs/cgroup' / ('' if second else 'memory')
            files = ('memory.max', 'memory.current') if second else ('memory.limit_in_bytes', 'memory.usage_in_bytes')
            place = folder / path.lstrip('/')
            # a limit of any group above holds too; in a container these are not to be seen
            for group in (place, *place.parents):
                if folder not in (group, *group.parents):
                    break
                with suppress(OSError, ValueError):
                    most, taken = (int((group / name).read_text()) for name in files)
                    found.append(max(0, most - taken + _cached(group / 'memory.stat')))
    return min(found)


def _cached(path: Path) -> int:
    """What a group holds of files, and the kernel takes back first."""
    names = ('inactive_file', 'total_inactive_file')
    lines = (line.split() for line in path.read_text().splitlines())
    return max((int(value) for name, value in lines if name in names), default=0)


def _status(pid: str, key: str) -> int:
    """A size of a process in bytes; 0 if there is no such process, or no /proc."""
    return _kib(Path('/proc', pid, 'status'), key)


def _kib(path: Path, key: str) -> int:
    """What a file of /proc says of a key in kB, in bytes; 0 if it says nothing."""
    with suppress(OSError):
        for line in path.read_text(errors='replace').splitlines():
            if line.startswith(f'{key}:'):
                return 1024 * int(line.split()[1])
    return 0
