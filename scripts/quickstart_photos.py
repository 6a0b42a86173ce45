"""Copies the photographs that scikit-image ships inside its package into a training and a held-out folder."""
import cv2
import numpy as np
import shutil
import skimage
import sys
from pathlib import Path

HELD_OUT = ['astronaut.png', 'chelsea.png', 'coffee.png']
TRAINING = [
    'brick.png', 'camera.png', 'coins.png', 'grass.png', 'gravel.png', 'hubble_deep_field.jpg', 'ihc.png', 'moon.png',
    'motorcycle_left.png', 'motorcycle_right.png', 'page.png', 'retina.jpg', 'rocket.jpg'
]


def main(out: str) -> None:
    source = Path(skimage.__file__).parent / 'data'
    for folder, names in (('train', TRAINING), ('held_out', HELD_OUT)):
        target = Path(out, folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(source / name, target / name)
            if folder == 'train':
                # so few photographs would teach the classifier that dark is easy and orange is hard: negatives and
                # swapped colours leave texture as the only sign of difficulty
                image = cv2.imread(str(source / name))
                cv2.imwrite(str(target / f'{Path(name).stem}_negative.png'), 255 - image)
                cv2.imwrite(str(target / f'{Path(name).stem}_swapped.png'), np.roll(image, 1, axis=2))


if __name__ == '__main__':
    main(*sys.argv[1:])
