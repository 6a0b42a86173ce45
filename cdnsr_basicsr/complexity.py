"""Real cost of a network: multiply-accumulate operations, counted by torch itself, and measured time."""
from __future__ import annotations

import copy
import statistics
import time
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_macs(module: nn.Module, height: int, width: int, channels: int = 3) -> int:
    """Counts the multiply-accumulates of convs and matrix products for one input of (1, channels, height, width).

    A transposed conv counts at its input size, where it is computed (ClassSR's and CDNSR's tables count it at its
    output size, 16 times too much for x4). Interpolation and element-wise operations count as nothing.

    Args:
        module: Any network; a copy of it is run once, in evaluation mode.
        height: Input height in pixels.
        width: Input width in pixels.
        channels: Input channels.
    """
    counter = FlopCounterMode(display=False)
    for device in ('meta', 'cpu'):  # without computing, if the module can do that
        copied = copy.deepcopy(module).to(device).eval()
        try:
            with counter:
                copied(torch.zeros(1, channels, height, width, device=device))
            break
        except (RuntimeError, NotImplementedError):
            if device == 'cpu':
                raise
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure_latency(module: nn.Module, x: torch.Tensor, rounds: int = 3) -> float:
    """Median time of a forward pass in seconds, after one that is not counted.

    Args:
        module: Any network or function.
        x: Its input; decides device, size and memory format.
        rounds: Passes that are counted.
    """
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    seconds = []
    for _ in range(rounds + 1):
        wait()
        begin = time.perf_counter()
        module(x)
        wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
