"""Makes docs/upscaled.png: a part of a photograph by bicubic upsampling and by a model, and the branch of each tile.

Usage, in the repository, after the quickstart: python scripts/readme_picture.py cdnsr-modern-x4 docs/upscaled.png
The photograph is scikit-image's astronaut (NASA, public domain), at its own size of 512 pixels.
"""
import cv2
import numpy as np
import subprocess
import sys
import tempfile
from pathlib import Path

PART = (slice(0, 150), slice(150, 300))  # rows and columns of the photograph
SCALE = 4
ROUTING = ['--budget', '0.6', '--patch-size', '64']  # smaller tiles than usual, as the picture is small


def titled(image, title):
    head = np.full((34, image.shape[1], 3), 255, np.uint8)
    cv2.putText(head, title, (4, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([head, image])


def main(model, out):
    import skimage
    photograph = Path(skimage.__file__).parent / 'data' / 'astronaut.png'
    with tempfile.TemporaryDirectory() as folder:
        command = ['upscale', '-m', model, '-i', str(photograph), '-o', folder, '--map', *ROUTING]
        subprocess.run([sys.executable, '-m', 'cdnsr_basicsr', *command], check=True)
        pictures = {path.stem.endswith('_map'): cv2.imread(str(path)) for path in Path(folder).glob('*.png')}
    part = cv2.imread(str(photograph))[PART]
    size = tuple(SCALE * length for length in part.shape[1::-1])
    bicubic = cv2.resize(part, size, interpolation=cv2.INTER_CUBIC)
    large = tuple(slice(SCALE * side.start, SCALE * side.stop) for side in PART)
    difficulty = cv2.resize(pictures[True], size, interpolation=cv2.INTER_AREA)
    titles = {'bicubic x4': bicubic, model: pictures[False][large], 'the branch of each tile, budget 0.6': difficulty}
    gap = np.full((size[1] + 34, 6, 3), 255, np.uint8)
    columns = [column for title, image in titles.items() for column in (titled(image, title), gap)]
    picture = np.concatenate(columns[:-1], axis=1)
    cv2.imwrite(out, cv2.resize(picture, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA))


if __name__ == '__main__':
    main(*sys.argv[1:])
