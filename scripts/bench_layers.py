"""Times layers on one CPU thread, in turns: medians.

Usage: python scripts/bench_layers.py                      # FSRCNN's in training, torch's own against this package's
       python scripts/bench_layers.py CHECKPOINT [...]     # a network against nothing but its convs, of the same images
"""
import os
import statistics
import sys
import time
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cdnsr_basicsr

cdnsr_basicsr.register()

from cdnsr_basicsr.archs import FSRCNN  # noqa: E402
from cdnsr_basicsr.checkpoint import load_network  # noqa: E402
from cdnsr_basicsr.inference.engine import deployed  # noqa: E402
from cdnsr_basicsr.memory import keep_freed_memory  # noqa: E402

SIZE = 188  # of a block of four tiles, as the engine makes them
ACTIVATIONS = ('relu', 'relu_', 'silu', 'silu_', 'sigmoid', 'gelu', 'prelu', 'leaky_relu')


class Recorded(TorchDispatchMode):
    """Keeps the convs and activations that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.convs, self.activations = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        if name in ('convolution', 'addmm'):
            self.convs.append((func, args))
        elif name in ACTIVATIONS:
            self.activations.append((func, [arg.clone() if torch.is_tensor(arg) else arg for arg in args]))
        return func(*args, **(kwargs or {}))


def milliseconds(function):
    begin = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - begin)


def compare_with_convs(paths):
    keep_freed_memory()
    print('| network | us per LR pixel | of its convs alone | with their activations |')
    print('| --- | --- | --- | --- |')
    for path in paths:
        net = deployed(load_network(path), torch.float32)
        x = torch.rand(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        recorded, times = Recorded(), ([], [], [])
        with torch.no_grad():
            with recorded:
                net(x)
            runs = (lambda: net(x), lambda: [func(*args) for func, args in recorded.convs],
                    lambda: [func(*args) for func, args in recorded.convs + recorded.activations])
            for _ in range(16):
                for run, values in zip(runs, times):
                    values.append(milliseconds(run))
        whole, convs, both = (statistics.median(values[1:]) for values in times)
        print(f'| {path} | {1000 * whole / SIZE**2:.2f} | {whole / convs:.2f} times | {whole / both:.2f} times |')


def compare_layers():
    net = FSRCNN(num_feat=56)
    x = torch.randn(16, 56, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    print('| layer, batch 16, 56 channels | forward, ms | backward, ms |')
    print('| --- | --- | --- |')
    for name, layer in (('PReLU', net.extract[1]), ('deconvolution', net.deconv)):
        for mode in (False, True):  # in evaluation mode the layers are torch's
            layer.train(mode)
            grad, forward, backward = torch.randn_like(layer(x)), [], []
            for _ in range(25):
                begin = time.perf_counter()
                output = layer(x)
                middle = time.perf_counter()
                output.backward(grad)
                forward.append(1000 * (middle - begin))
                backward.append(1000 * (time.perf_counter() - middle))
            medians = f'{statistics.median(forward):.1f} | {statistics.median(backward):.1f}'
            print(f"| {name}, {'ours' if mode else 'torch'} | {medians} |")


if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)
if len(sys.argv) > 1:
    compare_with_convs(sys.argv[1:])
else:
    compare_layers()
