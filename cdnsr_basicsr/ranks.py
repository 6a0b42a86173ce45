"""The processes of a distributed run keep an eye on each other, so that none waits for one that is lost."""
from __future__ import annotations

import itertools
import math
import os
import re
import sys
import threading
import time
import uuid
from datetime import timedelta
from typing import Any, NoReturn, Optional

from .options import OptionError, one_line

SILENCE = 60.  # seconds without a sign of life after which a rank counts as lost
BEATS = 12  # signs of life in that time
# how torch, gloo and NCCL say that another process is not there
LOST = re.compile(r'gloo|nccl|connection|peer|socket|timed out|broken pipe|recvvalue|store', re.I)


class RankWatch:
    """Publishes signs of life of this process and looks for those of the others, in threads beside the training.

    torch tells of a lost process late (gloo waits for half an hour if it is stopped) and does not name it. A rank that
    gives no sign of life for 60 seconds (or BASICSR_RANK_TIMEOUT, an environment variable) ends the others, with one
    line that names it. One that is killed is named after a quarter of that, if torch reports that it is gone.

    Attributes:
        iteration: That this process has begun.
        restarted: Whether torchrun has started this run again; known of all processes from `start` on.
    """

    def __init__(self) -> None:
        self.rank, self.world_size, self.iteration = 0, 1, 0
        self.restarted, self.attempt = was_restarted(), ''
        self.store: Any = None
        self.silence = read_silence()
        self.interval = self.silence / BEATS
        self.lost: Optional[str] = None
        self.last_words = ''  # of this process, once it knows what it ends of
        self.at_end, self.silent = threading.Event(), threading.Event()  # no verdicts any more; no signs of life
        self.said = threading.Event()
        self.talk = threading.Thread(target=self._talk, name='rank watch', daemon=True)
        self.words: list[str] = []  # of each rank, the newest
        self.heard: list[float] = []  # when it has changed

    def __enter__(self) -> RankWatch:
        return self

    def __exit__(self, *args: object) -> None:
        self.at_end.set()
        self.silent.set()
        if self.lost:  # torch's threads that wait for the lost rank let no process end as others do
            _end(self.lost)
        # a thread that comes back from C++ while Python shuts down aborts the process
        if self.talk.is_alive():
            self.talk.join(self.silence)

    def start(self, rank: int, world_size: int) -> None:
        """Begins to watch; called when torch.distributed is initialised."""
        if world_size == 1:
            return
        from torch.distributed import TCPStore, all_gather_object
        # each machine's torchrun counts by itself what it has started again, and the store may be that of the last time
        told: list[Any] = [None] * world_size
        all_gather_object(told, (self.restarted, uuid.uuid4().hex))
        self.restarted, self.attempt = any(restarted for restarted, _ in told), told[0][1]
        address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        # a connection of its own: torch's blocks while one of its threads waits
        self.store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self.silence))
        self.rank, self.world_size = rank, world_size
        self.words, self.heard = [''] * world_size, [time.monotonic()] * world_size
        # two threads, because the first hangs when the process is stopped that holds the store
        self.talk.start()
        threading.Thread(target=self._judge, name='rank watch', daemon=True).start()

    def say_why(self, message: str) -> None:
        """Tells the others, before this process ends, what it ends of."""
        if self.store is not None:
            self.at_end.set()
            self.last_words = f'error {message}'
            self.said.wait(2 * self.interval)

    def part(self) -> None:
        """Ends the watch when all processes have come to the end."""
        if self.store is None:
            return
        from torch import distributed
        distributed.barrier()  # gloo can hang when one process leaves before the others
        self.at_end.set()
        distributed.destroy_process_group()

    def explain(self, error: BaseException) -> bool:
        """Whether an error tells of another rank, which is then named where this context ends, and the process with it.
        """
        if self.store is None or not LOST.search(f'{type(error).__name__} {error}'):
            return False
        self.at_end.set()  # the line comes from here
        begin = time.monotonic()
        while not self.lost and time.monotonic() - begin < self.silence / 4 + 3 * self.interval:
            time.sleep(self.interval / 5)
            self.lost = self._lost(after=self.silence / 4)
        if not self.lost:
            reached = {rank: int(word.split()[1]) for rank, word in enumerate(self.words) if word.startswith('beat ')}
            behind = [rank for rank, iteration in reached.items() if iteration < max(reached.values())]
            self.lost = 'the processes have lost contact with each other'
            if behind:
                self.lost = (f'rank {behind[0]} is stuck at iteration {reached[behind[0]]}, the others wait for it '
                             f'at {max(reached.values())}')
            self.lost += f' ({one_line(error)})'
        return True

    def _talk(self) -> None:
        """Publishes signs of life of this process, and reads those of the others."""
        for beat in itertools.count():
            word = self.last_words or f'beat {self.iteration} {beat}'
            try:
                self.store.set(self._key(self.rank), word)
                for rank in range(self.world_size):
                    if self.store.check([self._key(rank)]):
                        heard = self.store.get(self._key(rank)).decode()
                        if heard != self.words[rank]:
                            self.words[rank], self.heard[rank] = heard, time.monotonic()
            except Exception:  # the store is gone, and with it the rank that holds it: the silence will be noticed
                return
            if word == self.last_words:
                self.said.set()
                return
            if self.silent.wait(self.interval / 5 if self.at_end.is_set() else self.interval):
                return

    def _judge(self) -> None:
        """Ends the process when another one is lost: the main thread waits in torch, where nothing reaches it."""
        before = time.monotonic()
        while not self.at_end.wait(self.interval):
            now = time.monotonic()
            if now - before > 3 * self.interval:  # this process was stopped itself, and has heard of nobody
                self.heard = [now] * self.world_size
            before = now
            found = self._lost(after=self.silence)
            if found and not self.at_end.is_set():
                _end(found)

    def _lost(self, after: float) -> Optional[str]:
        for rank, word in enumerate(self.words):
            if word.startswith('error ') and rank != self.rank:
                return f'rank {rank} has ended: {word[len("error "):]}'
        now = time.monotonic()
        silent = [rank for rank, heard in enumerate(self.heard) if rank != self.rank and now - heard > after]
        if not silent:
            return None  # if all are silent, the first: they are heard through the store, which it mostly holds
        return (f'rank {silent[0]} has not reported for {now - self.heard[silent[0]]:.0f} seconds: it was '
                'killed or stopped, or its machine is lost')

    def _key(self, rank: int) -> str:
        return f'basicsr/rank_watch/{self.attempt}/{rank}'


def _end(message: str) -> NoReturn:
    print(f'basicsr: error: {message}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def was_restarted() -> bool:
    """Whether torchrun has started this process again after one was lost (--max-restarts)."""
    return os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'


def read_silence() -> float:
    """Seconds without a sign of life after which a rank counts as lost."""
    text = os.environ.get('BASICSR_RANK_TIMEOUT', str(SILENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise OptionError(f'BASICSR_RANK_TIMEOUT={text}', 'expected a number of seconds, at least 1')
    return seconds
