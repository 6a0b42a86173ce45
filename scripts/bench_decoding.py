"""Times reading an image by several libraries and by this package's decoder process, per megapixel.

Usage: python scripts/bench_decoding.py PHOTOGRAPH      (with imagecodecs; pyvips, if it is installed)

Medians of 9 turns of wall-clock time, in which all take turns; files are in the system's cache.
"""
import argparse
import contextlib
import cv2
import imagecodecs
import io
import numpy as np
import statistics
import tempfile
import tifffile
import time
from pathlib import Path
from PIL import Image

from cdnsr_basicsr.inference.image_io import read_image

TURNS = 9


def by_vips(path):
    import pyvips
    pyvips.cache_set_max(0)
    return pyvips.Image.new_from_file(str(path)).numpy()


def by_imagecodecs(path):
    return tifffile.imread(path) if path.suffix == '.tif' else imagecodecs.imread(str(path))


READERS = {
    'OpenCV': lambda path: cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED),
    'Pillow': lambda path: np.asarray(Image.open(io.BytesIO(path.read_bytes()))),
    'pyvips': by_vips,
    'imagecodecs': by_imagecodecs,
    'here': lambda path: read_image(path).pixels,
}

parser = argparse.ArgumentParser()
parser.add_argument('photograph')
photograph = read_image(parser.parse_args().photograph).pixels[..., :3]
height, width = photograph.shape[:2]
noise = np.random.default_rng(0).integers(0, 128, photograph.shape, np.uint16)
deep, image = photograph * np.uint16(257) + noise // 2, Image.fromarray(photograph)
deep = np.maximum(deep, photograph * np.uint16(257))  # where the sum has gone beyond white
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    image.save(folder / 'PNG, 8 bits.png')
    cv2.imwrite(str(folder / 'PNG, 16 bits.png'), deep[..., ::-1])
    image.quantize(64).save(folder / 'PNG, palette.png')
    image.save(folder / 'JPEG.jpg', quality=92)
    image.save(folder / 'WebP.webp', quality=90)
    options = dict(photometric='rgb', predictor=True, rowsperstrip=64)
    tifffile.imwrite(folder / 'TIFF, LZW, 8 bits.tif', photograph, compression='lzw', **options)
    tifffile.imwrite(folder / 'TIFF, deflate, 16 bits.tif', deep, compression='zlib', **options)
    image.save(folder / 'AVIF.avif')
    image.quantize(64).save(folder / 'GIF.gif')
    print(f'{width}x{height}, milliseconds a megapixel')
    print(f'| file | {" | ".join(READERS)} |')
    print('| --- |' + ' ---: |' * len(READERS))
    for path in sorted(folder.iterdir()):
        times = {reader: [] for reader in READERS}
        for turn in range(TURNS + 1):  # the first one is not counted
            for reader, read in READERS.items():
                begin = time.perf_counter()
                with contextlib.suppress(Exception):  # does not read it, or is not installed
                    pixels = read(path)
                    wrong = path.stem.endswith('16 bits') and pixels.dtype != np.uint16
                    times[reader] += [] if wrong or turn == 0 else [time.perf_counter() - begin]
        cells = [f'{1e9 * statistics.median(some) / height / width:.0f}' if some else '-' for some in times.values()]
        print(f'| {path.stem} | {" | ".join(cells)} |', flush=True)
