"""Compares upscaled images with bicubic upsampling; fails if one of them is not better.

Usage: python scripts/quickstart_report.py PREPARED_FOLDER NAME=FOLDER [NAME=FOLDER ...]
"""
import cv2
import numpy as np
import sys
from pathlib import Path

import cdnsr_basicsr

cdnsr_basicsr.register()

from basicsr.metrics import calculate_psnr, calculate_ssim  # noqa: E402
from basicsr.utils.matlab_functions import imresize  # noqa: E402

SCALE = 4


def measure(image: np.ndarray, gt: np.ndarray) -> str:
    metrics = [metric(image, gt, SCALE, test_y_channel=True) for metric in (calculate_psnr, calculate_ssim)]
    return '{:5.2f} / {:.4f}'.format(*metrics)


def main(data: str, *named_folders: str) -> int:
    folders = dict(item.split('=', 1) for item in named_folders)
    print(f'{"PSNR / SSIM":14s}{"bicubic":>18s}' + ''.join(f'{name:>18s}' for name in folders) + '   (Y channel)')
    worse = []
    for path in sorted(Path(data, 'gt').glob('*.png')):
        gt = cv2.imread(str(path))
        lq = cv2.imread(str(Path(data, 'lq', path.name))).astype(np.float32) / 255
        texts = [measure(np.round(np.clip(imresize(lq, SCALE), 0, 1) * 255).astype(np.uint8), gt)]
        for name, folder in folders.items():
            picture = next(file for file in sorted(Path(folder).glob(f'{path.stem}*.png')) if '_map' not in file.stem)
            texts.append(measure(cv2.imread(str(picture)), gt))
            if float(texts[-1].split()[0]) <= float(texts[0].split()[0]):
                worse.append(f'{path.stem} by {name}')
        print(f'{path.stem:14s}' + ''.join(f'{text:>18s}' for text in texts))
    if worse:
        print(f'Not better than bicubic: {", ".join(worse)}', file=sys.stderr)
    return 1 if worse else 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
