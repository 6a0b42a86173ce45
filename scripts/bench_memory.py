"""Measures what `basicsr upscale --memory` takes, the process and its decoders together, beside the limit.

Usage: python scripts/bench_memory.py [--models NAME ...] [--sizes 256x256 ...] [--memory 4G least] [--threads 1]

`least` is the figure that the command names when it refuses a limit of 1M. NAME is a shipped model, a checkpoint, or
a network of NETWORKS with random weights. Images are smooth, their last rows noise; results are PNG, or TIFF if too
large. The resident size is read from /proc every 4 ms.
"""
import argparse
import cv2
import numpy as np
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FSRCNN = dict(type='FSRCNN', num_feat=56, num_shrink=12, num_map=4, upscale=4)
NETWORKS = dict(
    SMFANet=dict(type='SMFANet', upscale=4),
    SwinIR=dict(
        type='SwinIR',
        upscale=4,
        img_size=64,
        window_size=8,
        img_range=1.,
        depths=[6] * 4,
        embed_dim=60,
        num_heads=[6] * 4,
        mlp_ratio=2,
        upsampler='pixelshuffledirect'),
    PCSR=dict(type='PCSR', backbone=FSRCNN))
RUN = [sys.executable, '-m', 'cdnsr_basicsr', 'upscale']


def image(width, height):
    """Smooth, the last eighth noise, of shape (height, width, 3)."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = np.linspace(0, 255, width).astype(np.uint8)[:, None]
    rows = pixels[-max(1, height // 8):]
    rows[:] = np.random.default_rng(0).integers(0, 256, rows.shape, np.uint8)
    return pixels


def checkpoint(name, folder):
    """A network of NETWORKS with random weights, as a file; any other name as it is."""
    if name not in NETWORKS:
        return name
    import torch

    import cdnsr_basicsr
    from basicsr.archs import build_network
    from cdnsr_basicsr.checkpoint import save_checkpoint
    cdnsr_basicsr.register()
    torch.manual_seed(0)
    block, path = NETWORKS[name], Path(folder, f'{name}.pth')
    net = build_network(dict(block))
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=4), str(path))
    return str(path)


def resident(pid):
    """Bytes of a process and of those that it has started."""
    try:
        size = int(Path('/proc', pid, 'statm').read_text().split()[1]) * os.sysconf('SC_PAGESIZE')
        children = [
            child for path in Path('/proc', pid, 'task').glob('*/children') for child in path.read_text().split()
        ]
        called = Path('/proc', pid, 'cmdline').read_bytes()
        # one that has not begun its own program yet is in the memory of the other
        return size + sum(
            resident(child) for child in children if Path('/proc', child, 'cmdline').read_bytes() != called)
    except (OSError, IndexError):  # it has just ended
        return 0


def peak_of(*arguments, **kwargs):
    """Runs the command: its exit code, its peak in MiB, its seconds, and what it says."""
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile('w+') as said:
        process = subprocess.Popen([*RUN, *arguments], stdout=said, stderr=subprocess.STDOUT, **kwargs)
        while process.poll() is None:
            peak = max(peak, resident(str(process.pid)))
            time.sleep(0.004)
        said.seek(0)
        return process.returncode, peak / 2**20, time.perf_counter() - begin, said.read()


def least(*arguments, **kwargs):
    """The smallest limit with which the command says that it can do it, and what `peak_of` says of that."""
    memory = '1M'
    for _ in range(6):  # first it is said of the network, then of the image
        code, peak, seconds, said = peak_of(*arguments, '--memory', memory, **kwargs)
        needed = re.search(r'needs (\d+M) of memory', said)
        if code != 2 or not needed:
            break
        memory = needed[1]
    return memory, code, peak, seconds, said


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        '--models', nargs='+', default=['cdnsr-modern-x4', 'cdnsr-etds-x4', 'cdnsr-fsrcnn-x4', *NETWORKS])
    parser.add_argument('--sizes', nargs='+', default=['256x256', '1280x720'])
    parser.add_argument('--memory', nargs='+', default=['4G', 'least'])
    parser.add_argument('--threads', default='1')
    args = parser.parse_args()
    print('| network | LR image | limit | peak | s |')
    print('| --- | --- | ---: | ---: | ---: |')
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model = checkpoint(name, folder)
            for size in args.sizes:
                path = str(Path(folder, f'{size}.png'))
                cv2.imwrite(path, image(*map(int, size.split('x'))))
                arguments = ['-m', model, '-i', path, '-o', str(Path(folder, 'out')), '--overwrite']
                arguments += ['--threads', args.threads]
                for memory in args.memory:
                    if memory == 'least':
                        limit, code, peak, seconds, said = least(*arguments)
                    else:
                        limit, (code, peak, seconds, said) = memory, peak_of(*arguments, '--memory', memory)
                    failed = '' if code == 0 else f' {said}'
                    print(f'| {name} | {size} | {limit} | {peak:.0f} | {seconds:.0f} |{failed}', flush=True)


if __name__ == '__main__':
    main()
