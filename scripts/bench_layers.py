"""Times FSRCNN's layers in training, torch's own against this package's: medians of 25 turns, on one CPU thread.

Usage: python scripts/bench_layers.py
"""
import statistics
import time
import torch

import cdnsr_basicsr

cdnsr_basicsr.register()

from cdnsr_basicsr.archs import FSRCNN  # noqa: E402

torch.set_num_threads(1)
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
