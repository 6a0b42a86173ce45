"""What only a GPU can show of this package, part by part; gpu_day.sh runs them all.

Usage, in the repository:
    python scripts/gpu_day.py PART [--models MODEL ...] [--side 768]

PART is one of
    equal    images of the GPU and the CPU, with and without TF32, in three precisions
    waits    how often the host waits for an image and for a training step, by torch's own count
    speed    the measurement of an engine in a new process, before and after libraries have been loaded
    memory   an image in less and less memory
    busy     the share of the time in which the GPU computes
    compile  branches on blocks of fixed size: as they are, by torch.compile, and as CUDA graphs

Without a GPU each part does what it can on the CPU: so that it can be tried. Its exit code is 1 if something is not as
docs/Design.md says.
"""
import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
import torch
import warnings

import cdnsr_basicsr

cdnsr_basicsr.register()

from bench_train import OurStep, options_of  # noqa: E402

from cdnsr_basicsr.conversion.convert import load_network  # noqa: E402
from cdnsr_basicsr.inference import make_upscaler  # noqa: E402
from cdnsr_basicsr.inference.network import pixel_routed, routed  # noqa: E402

MODELS = ['cdnsr-modern-x4', 'cdnsr-etds-x4', 'cdnsr-fsrcnn-x4']
GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
EXACT = 0.05  # grey levels by which an image may differ in float32 without TF32
failures = []


def check(holds, text):
    """Says whether something is as it should be."""
    print(f'{"ok  " if holds else "FAIL"}  {text}', flush=True)
    if not holds:
        failures.append(text)


def photograph(side):
    """An image of 2 x 3 parts of `side`, smooth at the left."""
    generator = torch.Generator().manual_seed(0)
    size = (2 * side // 3, side)
    coarse = torch.rand(1, 3, *(length // 6 + 1 for length in size), generator=generator)
    fine = torch.rand(1, 3, *size, generator=generator) * torch.linspace(0, 0.3, side)
    return (0.7 * torch.nn.functional.interpolate(coarse, size=size, mode='bicubic') + fine).clamp(0, 1)


def engine(model, device=DEVICE, **kwargs):
    return make_upscaler(load_network(model).eval().to(device), **kwargs)


def wait():
    if GPU:
        torch.cuda.synchronize()


def seconds_of(function, rounds=10):
    """Median time of a function that has been warmed up."""
    found = []
    for i in range(rounds + 3):
        wait()
        begin = time.perf_counter()
        function()
        wait()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[3:])


def equal(models, side):
    lq = photograph(side)
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = tf32
        for model in models:
            pixels = pixel_routed(load_network(model)) is not None
            for kwargs in ({}, dict(budget=0.6), dict(precision='bfloat16'), dict(precision='float16')):
                if 'budget' in kwargs and not pixels and routed(load_network(model)) is None:
                    continue
                on_cpu = engine(model, 'cpu', **kwargs).upscale(lq)
                on_gpu = engine(model, **kwargs).upscale(lq.to(DEVICE))
                difference = 255 * (on_gpu.image.cpu() - on_cpu.image).abs()
                said = (f'{model} {kwargs or ""} TF32 {"on" if tf32 else "off"}: at most {difference.max():.3f} and on '
                        f'average {difference.mean():.5f} grey levels from the CPU, cost {on_gpu.cost:.4f} and '
                        f'{on_cpu.cost:.4f}')
                exact = not tf32 and 'precision' not in kwargs
                check(bool(on_gpu.image.isfinite().all()) and (not exact or difference.mean() < EXACT), said)


def waits_of(function):
    """Lines at which the host waited, as torch says."""
    if not GPU:
        function()
        return []
    wait()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            function()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return [f'{os.path.basename(one.filename)}:{one.lineno}' for one in seen if 'synchroniz' in str(one.message)]


def waits(models, side):
    lq = photograph(side).to(DEVICE)
    for model in models:
        upscaler = engine(model)
        upscaler.upscale(lq)
        found = waits_of(lambda upscaler=upscaler: upscaler.upscale(lq))
        # torch does not count the one in the end, by torch.cuda.synchronize
        check(len(found) <= 1, f'{model}: {len(found)} waits for an image of one strip {found}')
    for backbone in ('fsrcnn', 'carn'):
        for train in ({}, dict(precision='float16')):
            step = OurStep(options_of(backbone), torch.device(DEVICE), **train)
            lq, gt = torch.rand(16, 3, 32, 32, device=DEVICE), torch.rand(16, 3, 128, 128, device=DEVICE)
            for _ in range(3):
                step(lq, gt)
            found = waits_of(lambda step=step: step(lq, gt))
            check(not found, f'training of {backbone} {train or ""}: {len(found)} waits for a step {found}')


def speed(models, side):
    code = ('import sys, time; sys.path.insert(0, sys.argv[2]); import gpu_day; '
            'upscaler = gpu_day.engine(sys.argv[1]); '
            'cold, warm = (upscaler.measure_speed(fresh=True) for _ in range(2)); '
            'print(*cold.max_tiles, *cold.tile_ms, *warm.max_tiles, *warm.tile_ms, '
            'gpu_day.torch.cuda.memory_reserved() / 2**20)')
    for model in models:
        if routed(load_network(model)) is None:
            continue
        with tempfile.TemporaryDirectory() as cache:
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, '-c', code, model,
                                   os.path.dirname(os.path.abspath(__file__))],
                                  env=dict(os.environ, XDG_CACHE_HOME=cache),
                                  capture_output=True,
                                  text=True,
                                  check=False)
            taken = time.perf_counter() - begin
        if done.returncode:
            check(False, f'{model}: {done.stderr.strip().splitlines()[-1:]}')
            continue
        *values, reserved = map(float, done.stdout.split())
        parts = len(values) // 4
        cold, warm = values[parts:2 * parts], values[3 * parts:]
        ratio = max(max(a, b) / min(a, b) for a, b in zip(cold, warm))
        check(
            not GPU or ratio < 1.5, f'{model}: measured twice in {taken:.0f} s; tiles at once {values[:parts]} and '
            f'{values[2 * parts:3 * parts]}, ms of a tile {cold} and {warm}, {reserved:.0f} MiB reserved afterwards')


def memory(models, side):
    lq = photograph(2 * side)
    for model in models:
        expected = engine(model).upscale(lq.to(DEVICE)).image.cpu()
        for gib in (4, 2, 1, 0.5) if GPU else ():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
            try:
                difference = 255 * (engine(model).upscale(lq.to(DEVICE)).image.cpu() - expected).abs()
                check(difference.mean() < 0.1, f'{model} in {gib} GiB: at most {difference.max():.3f} grey levels')
            except RuntimeError as error:  # with little enough memory there is no way
                check(gib < 1, f'{model} in {gib} GiB: {type(error).__name__} {str(error)[:80]}')
            finally:
                torch.cuda.set_per_process_memory_fraction(1.)


def busy(models, side):
    from torch.profiler import ProfilerActivity, profile
    lq = photograph(2 * side).to(DEVICE)
    megapixels = lq.shape[2] * lq.shape[3] * 16 / 1e6
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * GPU
    for model in models:
        for precision in ('float32', 'bfloat16', 'float16'):
            upscaler = engine(model, precision=precision)
            seconds = seconds_of(lambda upscaler=upscaler: upscaler.upscale(lq), 5)
            with profile(activities=activities) as profiled:
                upscaler.upscale(lq)
                wait()
            kernels = [one for one in profiled.key_averages() if one.device_type == torch.autograd.DeviceType.CUDA]
            computing = sum(one.self_device_time_total for one in kernels) / 1e6
            print(
                f'{model} {precision}: {1000 * seconds / megapixels:.2f} ms per megapixel, the GPU is busy '
                f'{100 * computing / seconds:.0f} % of the time',
                flush=True)


@torch.inference_mode()
def compile_(models, side):
    """See `compile` above."""
    sizes = [(1, 96), (16, 96), (64, 96), (4, 256)] if side >= 256 else [(1, 32)]
    print('| branch | blocks | eager ms | torch.compile ms | CUDA graph ms |\n| --- | --- | --- | --- | --- |')
    for model in models:
        upscaler = engine(model)
        if not hasattr(upscaler, 'run'):
            continue
        upscaler.upscale(photograph(64).to(DEVICE))  # makes the copies
        for number, branch in enumerate(upscaler.branches):
            for count, length in sizes:
                x = torch.rand(count, upscaler.channels, length, length, device=DEVICE)
                x = x.to(memory_format=torch.channels_last)
                times = [seconds_of(lambda branch=branch, x=x: branch(x))]
                expected = branch(x)
                torch._dynamo.reset()
                compiled = torch.compile(copy.deepcopy(branch))
                times.append(seconds_of(lambda compiled=compiled, x=x: compiled(x)))
                difference = (compiled(x) - expected).abs().max().item()
                if GPU:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        branch(x)
                    times.append(seconds_of(graph.replay))
                shown = [f'{1000 * one:.3f}' for one in times] + ['-'] * (3 - len(times))
                print(f'| {model} {number} | {count} of {length} | {" | ".join(shown)} |', flush=True)
                if difference > 1e-2:
                    check(False, f'{model} {number}: torch.compile makes something else, by {difference:.3f}')


def main():
    parts = dict(equal=equal, waits=waits, speed=speed, memory=memory, busy=busy, compile=compile_)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('part', choices=sorted(parts))
    parser.add_argument('--models', nargs='+', default=MODELS, help='checkpoints (default: those that are shipped)')
    parser.add_argument('--side', type=int, default=768, help='width of the image in pixels (default: 768)')
    args = parser.parse_args()
    print(torch.cuda.get_device_name() if GPU else 'no GPU', torch.__version__, flush=True)
    parts[args.part](args.models, args.side)
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
