"""Puts a trained network into cdnsr_basicsr/pretrained_models, with what `basicsr models` says of it.

Usage, in the repository:
    python scripts/ship_model.py NAME CHECKPOINT SET5 SET14 PHOTOGRAPHS --licence LICENCE --trained-on TEXT

The three folders hold HR images. PSNR (Y channel) and time are measured with the shipped file: the time is the median
of three runs over all photographs, with the engine's settings, so let nothing else run.
"""
import argparse
import hashlib
import json
import numpy as np
import statistics
import time
import torch

import cdnsr_basicsr

cdnsr_basicsr.register()

from basicsr.metrics import calculate_psnr  # noqa: E402
from cdnsr_basicsr.checkpoint import ABOUT, load_checkpoint, save_checkpoint, weights_of  # noqa: E402
from cdnsr_basicsr.conversion.convert import load_network  # noqa: E402
from cdnsr_basicsr.evaluation import read_pairs, to_image, to_tensor  # noqa: E402
from cdnsr_basicsr.files import replace_when_done  # noqa: E402
from cdnsr_basicsr.inference import make_upscaler  # noqa: E402
from cdnsr_basicsr.inference.speed import machine  # noqa: E402
from cdnsr_basicsr.memory import keep_freed_memory  # noqa: E402
from cdnsr_basicsr.zoo import SHIPPED  # noqa: E402


def measure(upscaler, pairs, repeat):
    """Mean PSNR in dB, and the median time in milliseconds per megapixel of the result."""
    psnr, times = [], []
    for turn in range(1 + repeat):
        seconds = 0
        for pair in pairs:
            lq = to_tensor(pair.lq)
            begin = time.perf_counter()
            image = upscaler.upscale(lq).image
            seconds += time.perf_counter() - begin
            if turn == 0:  # BasicSR takes the channels for BGR
                images = [image[..., ::-1] for image in (to_image(image), pair.gt)]
                psnr.append(calculate_psnr(*images, upscaler.scale, test_y_channel=True))
        times.append(1000 * seconds / sum(pair.gt.shape[0] * pair.gt.shape[1] / 1e6 for pair in pairs))
    return float(np.mean(psnr)), statistics.median(times[1:] or times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name')
    parser.add_argument('checkpoint')
    parser.add_argument('folders', nargs=3, metavar=('SET5', 'SET14', 'PHOTOGRAPHS'))
    parser.add_argument('--licence', required=True)
    parser.add_argument('--trained-on', required=True)
    args = parser.parse_args()

    keep_freed_memory()
    content = load_checkpoint(args.checkpoint)
    photographs = [list(read_pairs(folder, content['scale'])) for folder in args.folders]
    path = SHIPPED / f'{args.name}.pth'
    weights = weights_of(content, args.checkpoint)
    save_checkpoint(dict(params=weights, **{key: content[key] for key in ABOUT}), str(path))
    upscaler = make_upscaler(load_network(str(path)))
    figures = [measure(upscaler, pairs, repeat) for pairs, repeat in zip(photographs, (0, 0, 3))]
    index = json.loads((SHIPPED / 'models.json').read_text(encoding='utf-8'))
    index[args.name] = dict(
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        scale=content['scale'],
        licence=args.licence,
        trained_on=args.trained_on,
        psnr={
            name: round(psnr, 2)
            for name, (psnr, _) in zip(('Set5', 'Set14', 'photographs'), figures)
        },
        ms_per_megapixel=round(figures[2][1], 1),
        measured_on=machine(torch.device('cpu')))
    with replace_when_done(SHIPPED / 'models.json') as temporary:
        temporary.write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
    print(json.dumps(index[args.name], indent=2))


if __name__ == '__main__':
    main()
