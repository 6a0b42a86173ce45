"""Degrades photographs as a training does, to measure how well networks undo it: PNG pairs in gt/ and lq/.

    python scripts/degrade.py -opt options/train_photo_branch1.yml -i PHOTOGRAPHS -o OUT [--seed 0]

Blur, resizes, noise and JPEG are drawn for each image out of what the option file says, by the seed and the number of
the image: the same files always become the same pairs. `basicsr benchmark --data OUT` measures with them, and
`basicsr test` by an option file that names OUT/gt and OUT/lq.

`make_pairs` makes training patches of the photographs that the option file names; train_on_gpu.py learns from them.
"""
from __future__ import annotations

import argparse
import copy
import cv2
import numpy as np
import os
import random
import sys
import torch
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cdnsr_basicsr  # noqa: E402

cdnsr_basicsr.register()

from basicsr.data import build_dataset  # noqa: E402
from basicsr.utils import FileClient  # noqa: E402
from cdnsr_basicsr.data.photograph_dataset import CROPPED  # noqa: E402
from cdnsr_basicsr.data.prepare import encode, patch_keys, read_bgr  # noqa: E402
from cdnsr_basicsr.files import replace_folder_when_done  # noqa: E402
from cdnsr_basicsr.inference.image_io import ImageError, list_images  # noqa: E402
from cdnsr_basicsr.models.degradation import BLURS, Degradation  # noqa: E402
from cdnsr_basicsr.models.photo_options import check_options  # noqa: E402
from cdnsr_basicsr.models.training_state import random_state, set_random_state  # noqa: E402
from cdnsr_basicsr.options import OptionError, check_number, resolve_options  # noqa: E402
from cdnsr_basicsr.options.schema import MAX_SEED  # noqa: E402

CHUNK = 64  # pairs that are made of a few photographs, one after another
PHOTOGRAPHS = 16  # of a chunk: decoding one takes as long as several pairs
SMALLEST = 16  # sides of an LQ image: blur reaches over 10 pixels
KEPT = 2**29  # bytes of decoded photographs that a process keeps
CPU = torch.device('cpu')


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Lets random numbers begin at a seed for a while."""
    before = random_state()
    numbers = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(numbers[0]))
    np.random.seed(numbers[1])
    torch.default_generator.manual_seed(int(numbers[2]))  # a GPU's goes on
    try:
        yield
    finally:
        set_random_state(before)


class Cropping:
    """A file client that hands out crops of decoded images, of RealESRGANDataset's size, in the place of files."""

    def __init__(self, client: FileClient) -> None:
        self.client, self.decoded = client, OrderedDict()

    def get(self, path: str, client_key: str) -> bytes:
        if path not in self.decoded:
            image = cv2.imdecode(np.frombuffer(self.client.get(path, client_key), np.uint8), cv2.IMREAD_COLOR)
            if image is None:
                raise ValueError(f'{path} cannot be read')
            self.decoded[path] = image
            while len(self.decoded) > 1 and sum(image.nbytes for image in self.decoded.values()) > KEPT:
                self.decoded.popitem(last=False)
        image = self.decoded[path]
        top, left = (random.randint(0, max(0, side - CROPPED)) for side in image.shape[:2])
        return cv2.imencode('.bmp', image[top:top + CROPPED, left:left + CROPPED])[1].tobytes()


class Pairs(torch.utils.data.Dataset):
    """Chunks of training pairs, each of which is the same whoever makes it."""

    def __init__(self, opt: dict[str, Any], count: int, seed: int) -> None:
        block = dict(copy.deepcopy(opt['datasets']['train']), phase='train', scale=opt['scale'])
        self.photographs, self.count, self.seed = build_dataset(block), count, seed
        backend = dict(self.photographs.io_backend_opt)
        self.client, self.opt, self.gt_size = backend, copy.deepcopy(opt), block['gt_size']

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self.client, dict):  # in the process that reads
            kind = self.client.pop('type')
            self.client = self.photographs.file_client = Cropping(FileClient(kind, **self.client))
            self.degradation = Degradation(self.opt, CPU, self.gt_size)
            cv2.setNumThreads(1)
        with seeded(self.seed, index):
            several = random.sample(range(len(self.photographs)), min(PHOTOGRAPHS, len(self.photographs)))
            made = [self._pair(random.choice(several)) for _ in range(min(CHUNK, self.count - index * CHUNK))]
        gt, lq = (np.stack(images) for images in zip(*made))
        return gt, lq

    def _pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        data = self.photographs[index]
        lq, gt = self.degradation({name: data[name][None] for name in ('gt', *BLURS)})
        return pixels(gt), pixels(lq)


def pixels(image: torch.Tensor) -> np.ndarray:
    """A batch of one image, of shape (1, 3, h, w) in [0, 1], as uint8 of shape (h, w, 3)."""
    return (255 * image[0]).round().byte().permute(1, 2, 0).numpy()


def make_pairs(opt: dict[str, Any], count: int, workers: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Degraded training patches, each with a degradation of its own.

    Args:
        opt: Content of an option file such as options/train_photo_branch1.yml. Read are scale, the degradation,
            and datasets.train: a PhotographDataset or RealESRGANDataset with its photographs and gt_size.
        count: Number of pairs.
        workers: Processes that make them; 0: this one does.
        seed: The same one gives the same pairs, whatever the number of workers.

    Returns:
        uint8 RGB: GT of shape (count, gt_size, gt_size, 3), LQ of shape (count, gt_size / scale, gt_size / scale, 3).
    """
    pairs = Pairs(opt, count, seed)
    chunks = list(torch.utils.data.DataLoader(pairs, batch_size=None, num_workers=workers, collate_fn=tuple))
    gt, lq = (np.concatenate(images) for images in zip(*chunks))
    return gt, lq


def degraded(image: np.ndarray, opt: dict[str, Any], kernels: dict[str, torch.Tensor]) -> np.ndarray:
    """The LQ image of a whole photograph.

    Args:
        image: uint8 RGB of shape (h, w, 3), both multiples of the scale.
        opt: Content of the option file.
        kernels: Of one item of the dataset.

    Returns:
        uint8 RGB of shape (h / scale, w / scale, 3).
    """
    height, width = image.shape[:2]
    side, scale = max(height, width), opt['scale']
    # RealESRNetModel cuts squares
    square = cv2.copyMakeBorder(image, 0, side - height, 0, side - width, cv2.BORDER_REFLECT_101)
    gt = torch.from_numpy(square).permute(2, 0, 1)[None] / 255.
    lq, _ = Degradation(opt, CPU, side)(dict(kernels, gt=gt))
    return pixels(lq)[:height // scale, :width // scale]


def kernels_of(opt: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random blur kernels as the option file has them, of shape (1, 21, 21) each."""
    block = dict(copy.deepcopy(opt['datasets']['train']), phase='train', scale=opt['scale'])
    block.update(dataroot_gt='.', io_backend=dict(type='disk'), meta_info=os.devnull)
    maker = build_dataset(block)
    maker.paths, maker.file_client = ['black'], Black()
    data = maker[0]
    return {name: data[name][None] for name in BLURS}


class Black:
    """A file client whose only image is black: for what a dataset makes beside its images."""

    def get(self, path: str, client_key: str) -> bytes:
        return cv2.imencode('.bmp', np.zeros((CROPPED, CROPPED, 3), np.uint8))[1].tobytes()


def write_pairs(opt: dict[str, Any], photographs: str, out: str, seed: int) -> int:
    """Writes a degraded set.

    Args:
        opt: Content of the option file.
        photographs: Folder of HR photographs, read with its subfolders.
        out: New folder for gt/ and lq/.
        seed: Of random numbers.

    Returns:
        Number of pairs.

    Raises:
        OptionError, ImageError: Something cannot be used; one line says what.
    """
    check_options(opt, True)
    root, target, scale = Path(photographs), Path(out), opt['scale']
    paths = list_images(root).images if root.is_dir() else []
    if not paths:
        raise OptionError(photographs, 'no such folder, or no images in it')
    if target.exists() and any(target.iterdir()):
        raise OptionError(out, 'is not empty; choose a new folder')
    with replace_folder_when_done(target.resolve()) as work:
        for name in ('gt', 'lq'):
            (work / name).mkdir()
        for number, (path, key) in enumerate(patch_keys(paths, root).items()):
            image, _ = read_bgr(path)
            height, width = (side // scale * scale for side in image.shape[:2])
            if min(height, width) < SMALLEST * scale:
                raise ImageError(f'{path}: is smaller than {SMALLEST * scale} pixels')
            gt = np.ascontiguousarray(image[:height, :width, ::-1])
            with seeded(seed, number):
                lq = degraded(gt, opt, kernels_of(opt))
            for name, made in (('gt', gt), ('lq', lq)):
                (work / name / f'{key}.png').write_bytes(encode(np.ascontiguousarray(made[..., ::-1])))
    return len(paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('-opt', required=True, help='option file of a training on photographs')
    parser.add_argument('-i', dest='photographs', required=True, metavar='PHOTOGRAPHS', help='folder of HR photographs')
    parser.add_argument('-o', dest='out', required=True, metavar='OUT', help='new folder for gt/ and lq/')
    parser.add_argument('--seed', type=int, default=0, help='of random numbers (default: 0)')
    parser.add_argument('--force_yml', nargs='+', help='changes to the option file, as basicsr train takes them')
    args = parser.parse_args()
    try:
        check_number(args.seed, '--seed', 0, MAX_SEED, integer=True)
        count = write_pairs(resolve_options(args.opt, args.force_yml)[0], args.photographs, args.out, args.seed)
    except (OptionError, ImageError) as error:
        parser.error(str(error))
    print(f'Wrote {count} pairs to {args.out}.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
