"""Real cost of a network: multiply-accumulate operations, counted by torch itself, and measured time."""
from __future__ import annotations

import copy
import logging
import statistics
import time
import torch
from contextlib import contextmanager, nullcontext
from torch import nn
from typing import Any, Callable, Iterator

LONG = 1.  # seconds of warm passes that are enough for a measurement
SPREAD = 0.2  # by which a median may exceed the fastest pass: well above the usual noise
TRIES = 3  # measurements, if passes differ by more than that


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Context in which tensors have a shape and a device, but no values, and nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # not public: a torch may lack it
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True  # it logs each error, also one that does not matter here
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.disabled = before


@torch.no_grad()
def count_macs(module: nn.Module, height: int, width: int, channels: int = 3, papers: bool = False) -> int:
    """Counts the multiply-accumulates of convs and matrix products for one input of (1, channels, height, width).

    A transposed conv counts at its input size, where it is computed (ClassSR's and CDNSR's tables count it at its
    output size, 16 times too much for x4). Interpolation and element-wise operations count as nothing. A conv that is
    trained as several (`folded`) counts as the one.

    Args:
        module: Any network; a copy of it is run once, in evaluation mode. One that knows (`exported_macs`) is asked.
        height: Input height in pixels.
        width: Input width in pixels.
        channels: Input channels.
        papers: Whether to count transposed convs at their output size after all, as those tables do.
    """
    if hasattr(module, 'exported_macs'):
        return module.exported_macs(height, width)
    from torch.utils.flop_counter import FlopCounterMode
    counter = FlopCounterMode(display=False)
    # fake tensors are for networks that ask for a device; one that asks for values is computed, in much time and memory
    for device, context in ('meta', nullcontext), ('cpu', fake_tensors), ('cpu', nullcontext):
        copied, more = copy.deepcopy(module).to(device).eval(), []
        for layer in list(copied.modules()):
            if hasattr(layer, 'folded'):  # folding them is no work on the image
                layer.switch_to_deploy()
            if papers and isinstance(layer, nn.ConvTranspose2d):
                layer.register_forward_hook(lambda layer, inputs, output: more.append(layer.weight.numel(
                ) // layer.groups * (output[0, 0].numel() - inputs[0][0, 0].numel())))
        try:
            with context(), counter:
                copied(torch.zeros(1, channels, height, width, device=device))
            break
        except Exception:  # a network may say anything of tensors without values
            if (device, context) == ('cpu', nullcontext):
                raise
    return counter.get_total_flops() // 2 + sum(more)


@torch.inference_mode()
def measure_latency(module: Callable[[torch.Tensor], Any], x: torch.Tensor, rounds: int = 5) -> tuple[float, bool]:
    """Median time of a forward pass in seconds, and whether it can be relied on.

    A first pass is never counted: it may load libraries and search for algorithms. Where the machine is busy with
    something else, passes differ, and are measured again; the least median counts.

    Args:
        module: Any network or function.
        x: Its input; decides device, size and memory format.
        rounds: Passes that are counted, fewer if they are long.

    Returns:
        The time, and whether the passes were about equally long.
    """

    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    def one_pass() -> float:
        wait()
        begin = time.perf_counter()
        module(x)
        wait()
        return time.perf_counter() - begin

    one_pass()
    fastest = median = float('inf')
    for _ in range(TRIES):
        seconds: list[float] = []
        while len(seconds) < rounds and sum(seconds) < LONG:
            seconds.append(one_pass())
        fastest, median = min(fastest, *seconds), min(median, statistics.median(seconds))
        if median <= (1 + SPREAD) * fastest:
            return median, True
    return median, False
