"""Times layers on one CPU thread, or OMP_NUM_THREADS, in turns: medians.

Usage: python scripts/bench_layers.py                      # FSRCNN's and SMFANet's, torch's own against this package's
       python scripts/bench_layers.py CHECKPOINT [...]     # a network against nothing but its convs, of the same images
"""
import copy
import os
import statistics
import sys
import time
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cdnsr_basicsr

cdnsr_basicsr.register()

from cdnsr_basicsr.archs import FSRCNN, SMFANet  # noqa: E402
from cdnsr_basicsr.archs.smfanet_arch import variance  # noqa: E402
from cdnsr_basicsr.conversion.convert import load_network  # noqa: E402
from cdnsr_basicsr.inference.network import deployed  # noqa: E402
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
    fsrcnn, detail = FSRCNN(num_feat=56), SMFANet().body[0].smfa.local_detail
    layers = []
    for mode in (False, True):  # in evaluation mode FSRCNN's layers are torch's
        whose = 'ours' if mode else 'torch'
        for name, layer in (('PReLU', fsrcnn.extract[1]), ('deconvolution', fsrcnn.deconv)):
            layers.append((f'{name}, {whose}', 56, copy.deepcopy(layer).train(mode)))
    layers += [('variance, torch', 36, lambda x: torch.var(x, dim=(2, 3), keepdim=True)),
               ('variance, ours', 36, variance)]
    layers.append(('local detail, torch', 36, lambda x: detail.conv2(F.gelu(detail.conv1(detail.conv_depthwise(x))))))
    layers.append(('local detail, ours', 36, detail))
    print('| layer, batch 16 of 32x32 | channels | forward, ms | backward, ms |')
    print('| --- | --- | --- | --- |')
    for name, channels, layer in layers:
        x = torch.randn(16, channels, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
        grad, forward, backward = torch.randn_like(layer(x)), [], []
        for _ in range(25):
            begin = time.perf_counter()
            output = layer(x)
            middle = time.perf_counter()
            output.backward(grad)
            forward.append(1000 * (middle - begin))
            backward.append(1000 * (time.perf_counter() - middle))
        print(f'| {name} | {channels} | {statistics.median(forward):.1f} | {statistics.median(backward):.1f} |')


if 'OMP_NUM_THREADS' not in os.environ:
    torch.set_num_threads(1)
if len(sys.argv) > 1:
    compare_with_convs(sys.argv[1:])
else:
    compare_layers()
