"""A process of its own for each model and backend, which measures its rows, memory included."""
from __future__ import annotations

import ctypes
import math
import multiprocessing
import signal
import time
import torch
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Callable, Iterator

from .. import load_plugins
from ..evaluation import PairStore, luma_psnr_of, quality_of
from ..inference.speed import is_out_of_memory
from ..inference.upscaler import algorithm_search
from ..memory import keep_freed_memory, peak_mib
from ..options import OptionError
from .rows import Row, Settings
from .runners import Bench


@torch.inference_mode()
def measure(bench: Bench, row: Row, number: int, look: bool) -> dict:
    """Upscales an image.

    Args:
        bench: The network.
        row: How.
        number: Which image.
        look: Whether to say how good the result is and what memory it took, besides the time.
    """
    lq = bench.lq(number)
    run = bench.runner(row)
    bench.number = number
    wait = torch.cuda.synchronize if lq.is_cuda else lambda: None
    known = look and begin_peak(lq.is_cuda)
    try:
        with algorithm_search(True):  # as BasicSR's pipelines; the engine does without, for its tiles
            wait()
            begin = time.perf_counter()
            image, kmacs, counts = run(lq)
            wait()
            seconds = time.perf_counter() - begin
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {}  # what is missing becomes NaN, in the table a dash
    if not look:
        return {'seconds': seconds}
    peak = peak_mib(lq.is_cuda) if known else float('nan')
    gt = bench.pairs.gt(number)
    border = image.shape[2] // lq.shape[2]
    psnr, ssim = quality_of(image, gt, border, bench.settings.with_ssim)
    luma = luma_psnr_of(image, gt, border)
    return dict(psnr=psnr, psnr_y=luma, ssim=ssim, kmacs=kmacs, counts=counts, peak=peak, finite=not math.isnan(psnr))


def begin_peak(is_cuda: bool) -> bool:
    """Forgets the most memory that was in use so far, on a CPU after giving back what is free; says if it could."""
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
    except (AttributeError, OSError):
        return False
    return True


def serve(connection: Connection, settings: Settings, pairs: PairStore, model: str, tuned: bool, backend: str,
          threads: int) -> None:
    """Answers what the benchmark asks, in a process of its own: its memory is its own, and kept or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    load_plugins()
    torch.set_num_threads(threads)
    if settings.device.startswith('cuda'):
        torch.cuda.set_device(settings.device)
    if tuned and settings.device == 'cpu':
        keep_freed_memory()
    try:
        bench = Bench(settings, pairs, model, backend)
        connection.send(bench.describe())
        while True:
            question = connection.recv()
            if question is None:
                return
            connection.send(measure(bench, *question))
    except Exception as error:
        connection.send({'fatal': f'{type(error).__name__}: {error}'})


@contextmanager
def running_worker(settings: Settings, pairs: PairStore, model: str, tuned: bool, backend: str) -> Iterator[Callable]:
    """A process that serves; yields a function that asks it: without arguments what the network is, with those of
    `measure` what it has measured.
    """
    ours, theirs = multiprocessing.get_context('spawn').Pipe()
    process = multiprocessing.get_context('spawn').Process(
        target=serve, args=(theirs, settings, pairs, model, tuned, backend, torch.get_num_threads()), daemon=True)
    process.start()
    theirs.close()

    def ask(*question: object) -> dict:
        try:
            if question:
                ours.send(question)
            answer = ours.recv()
        except (EOFError, OSError):
            raise OptionError(model, 'its process was killed, perhaps because memory ran out') from None
        if 'fatal' in answer:
            raise OptionError(model, answer['fatal'])
        return answer

    try:
        yield ask
    finally:
        try:
            ours.send(None)
        except OSError:  # it has ended
            pass
        process.join(timeout=5)
        process.kill()
