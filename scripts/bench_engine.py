"""Times the engine on images of growing size, and says which part of the time is its own.

Usage, in the repository:
    python scripts/bench_engine.py MODEL photographs                    # 16 photographs: results of 2K, 4K and 8K
    python scripts/bench_engine.py MODEL photographs --precision bfloat16

The same pixels are upscaled three times over: 16 photographs by themselves, in 4 mosaics of 2x2, in one of 4x4. Sizes
take turns; medians over the rounds are printed. The engine's own part is everything but the calls of the classifier and
the branches.
"""
import argparse
import numpy as np
import statistics
import time
import torch

import cdnsr_basicsr

cdnsr_basicsr.register()

from cdnsr_basicsr.conversion.convert import load_network  # noqa: E402
from cdnsr_basicsr.evaluation import read_pairs, to_tensor  # noqa: E402
from cdnsr_basicsr.inference import TileUpscaler  # noqa: E402
from cdnsr_basicsr.memory import keep_freed_memory  # noqa: E402


class Timed(torch.nn.Module):
    """A module that adds up its time."""

    def __init__(self, module):
        super().__init__()
        self.module, self.seconds = module, 0.

    def forward(self, x):
        begin = time.perf_counter()
        output = self.module(x)
        self.seconds += time.perf_counter() - begin
        return output


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', help='checkpoint')
    parser.add_argument(
        'data', help='photographs, at least 256x512 in LR; the first 16, again and again if there are fewer')
    parser.add_argument('--precision', default='float32')
    parser.add_argument('--budget', type=float)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()

    keep_freed_memory()
    upscaler = TileUpscaler(load_network(args.model), precision=args.precision, budget=args.budget)
    lqs = [
        pair.lq if pair.lq.shape[1] >= pair.lq.shape[0] else np.rot90(pair.lq)
        for pair in read_pairs(args.data, upscaler.scale)
    ]
    lqs = [lq[:256, :512] for lq in lqs if lq.shape[0] >= 256 and lq.shape[1] >= 512][:16]
    lqs = [lqs[i % len(lqs)] for i in range(16)]
    sizes = []
    for count in (1, 2, 4):
        blocks = [lqs[i:i + count * count] for i in range(0, 16, count * count)]
        images = [np.vstack([np.hstack(block[i:i + count]) for i in range(0, count**2, count)]) for block in blocks]
        sizes.append([to_tensor(image) for image in images])

    seconds, own = [[] for _ in sizes], [[] for _ in sizes]
    for turn in range(args.rounds + 1):
        for i, images in enumerate(sizes):
            upscaler.upscale(images[0])  # in the form that is fast, and warm
            parts = [Timed(part) for part in (upscaler.classifier, *upscaler.branches)]
            kept = upscaler.classifier, upscaler.branches
            upscaler.classifier, upscaler.branches = parts[0], parts[1:]
            begin = time.perf_counter()
            for image in images:
                upscaler.upscale(image)
            total = time.perf_counter() - begin
            upscaler.classifier, upscaler.branches = kept
            if turn > 0:
                seconds[i].append(total)
                own[i].append(1 - sum(part.seconds for part in parts) / total)

    pixels = 16 * 256 * 512
    print(f'{args.model}, {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of '
          f'{args.rounds} rounds, {pixels / 1e6:.2f} megapixels of LR in each')
    print('| LR image | us per LR pixel | to the smallest | engine\'s own part |')
    print('| --- | --- | --- | --- |')
    medians = [statistics.median(values) for values in seconds]
    for images, median, parts in zip(sizes, medians, own):
        size = 'x'.join(str(length) for length in images[0].shape[2:])
        print(f'| {size} | {1e6 * median / pixels:.2f} | {median / medians[0]:.3f} | '
              f'{100 * statistics.median(parts):.1f} % |')


if __name__ == '__main__':
    main()
