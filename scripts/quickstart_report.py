"""Compares the pictures of a test run with bicubic upsampling; fails if the model is not better on each of them."""
import cv2
import numpy as np
import sys
from pathlib import Path

import cdnsr_basicsr

cdnsr_basicsr.register()

from basicsr.metrics import calculate_psnr, calculate_ssim  # noqa: E402
from basicsr.utils.matlab_functions import imresize  # noqa: E402

SCALE = 4


def measure(image: np.ndarray, gt: np.ndarray) -> tuple:
    return tuple(float(metric(image, gt, SCALE, test_y_channel=True)) for metric in (calculate_psnr, calculate_ssim))


def main(data: str, results: str) -> int:
    pictures = Path(results, 'visualization', 'held_out')
    log = max(Path(results).glob('test_*.log'), key=lambda path: path.stat().st_mtime).read_text()
    routing = log[log.index('Routing held_out'):].strip().splitlines()
    classes_used = sum(': 0.0 %' not in line for line in routing if '# class' in line)

    worse = []
    print(f'{"photograph":12s} {"bicubic PSNR / SSIM":>22s} {"CDNSR-FSRCNN PSNR / SSIM":>26s}   (Y channel)')
    for path in sorted(Path(data, 'gt').glob('*.png')):
        gt = cv2.imread(str(path))
        lq = cv2.imread(str(Path(data, 'lq', path.name))).astype(np.float32) / 255
        bicubic = measure(np.round(np.clip(imresize(lq, SCALE), 0, 1) * 255).astype(np.uint8), gt)
        model = measure(cv2.imread(str(next(pictures.glob(f'{path.stem}_*quickstart.png')))), gt)
        print(f'{path.stem:12s} {bicubic[0]:13.2f} / {bicubic[1]:.4f} {model[0]:17.2f} / {model[1]:.4f}')
        if model[0] <= bicubic[0]:
            worse.append(path.stem)
    print('\n' + '\n'.join(line.strip() for line in routing))
    print(f'\nUpscaled pictures and their difficulty maps (*_map.png): {pictures}')
    if worse:
        print(f'Not better than bicubic: {", ".join(worse)}', file=sys.stderr)
    if classes_used < 2:
        print('Only one class was used.', file=sys.stderr)
    return 1 if worse or classes_used < 2 else 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
