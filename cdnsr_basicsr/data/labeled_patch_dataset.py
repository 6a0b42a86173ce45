import numpy as np
import random
import torch
from collections import Counter
from dataclasses import dataclass
from os import path as osp
from torchvision.transforms.functional import normalize
from typing import Optional

from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils import bgr2ycbcr, imfrombytes, img2tensor
from basicsr.utils.registry import DATASET_REGISTRY
from ..options import OptionError, check_number, schema
from ..options.kinds import FLAG, word
from ..options.schema import PairedData, check_block
from .labels import read_labels
from .pictures import keys_of_lmdb


@dataclass
class LabeledPatches(PairedData):
    """A dataset of GT and LQ with a label for each patch, as LabeledPatchDataset reads it."""
    label_file: Optional[str] = schema.key(
        None, word('path'),
        'labels from `basicsr label`; without them, every label is -1. If they contain the errors of the '
        'branches (`--by branches`) and gt_size is the size of the patches, the dataset returns these errors, too')
    classes: Optional[list] = schema.key(None, word('list of classes', 'array'),
                                         'use only the patches of these classes, to train a branch; ~: all')
    balance: bool = schema.key(False, FLAG, 'repeat patches of rarer classes until all classes are equally frequent')
    dataroot_teacher: Optional[str] = schema.key(
        None, word('path'), 'LMDB of the outputs of a teacher for the LQ patches (`basicsr label --teacher`), which '
        'are cropped, flipped and rotated like these')


@DATASET_REGISTRY.register()
class LabeledPatchDataset(PairedImageDataset):
    """Paired patches with a difficulty label each, from LMDB or folders.

    It reads and augments as PairedImageDataset does and takes all its options.

    Args:
        opt (dict): Config for datasets, with the keys of LabeledPatches.
    """

    def __init__(self, opt):
        self.check_options(opt, f"datasets.{opt.get('name', '')}")
        super(LabeledPatchDataset, self).__init__(opt)
        if opt.get('dataroot_teacher'):
            self._open_teacher(opt)
        gt_sizes, lq_sizes = (self._sizes(opt, key) for key in ('dataroot_gt', 'dataroot_lq'))
        # whether patches are as large as gt_size, so that nothing is cropped from them
        self.whole_patches = gt_sizes == {(opt.get('gt_size'), opt.get('gt_size'))}
        if opt.get('phase') == 'train' and gt_sizes and lq_sizes:
            self._check_sizes(opt, gt_sizes, lq_sizes)
        self.labels = [-1] * len(self.paths)
        self.errors = [()] * len(self.paths)
        if opt.get('label_file') is not None:
            self._read_labels(opt)

    @staticmethod
    def check_options(opt, where):
        """Refuses unknown keys and impossible combinations.

        Args:
            opt (dict): Dataset block.
            where (str): Its place in the option file, for messages.

        Raises:
            OptionError: For the first mistake found.
        """
        training = ('gt_size', 'use_hflip', 'use_rot') if where == 'datasets.train' else ()
        check_block(LabeledPatches, opt, where, ('dataroot_gt', 'dataroot_lq', 'io_backend') + training)
        classes = opt.get('classes')
        if classes is not None:
            valid = isinstance(classes, list) and classes and all(type(i) is int and i >= 0 for i in classes)
            if not valid:
                raise OptionError(f'{where}.classes', f'expected a list of classes such as [0], but got {classes!r}')
        for key in ('classes', 'balance'):
            if opt.get(key) and opt.get('label_file') is None:
                raise OptionError(f'{where}.{key}', 'needs label_file, the labels that `basicsr label` wrote')
        label_file = opt.get('label_file')
        if label_file is not None and not (isinstance(label_file, str) and osp.isfile(label_file)):
            raise OptionError(f'{where}.label_file', f'no such file: {label_file} (`basicsr label` writes it)')
        if opt.get('dataroot_teacher') and opt['io_backend'].get('type') != 'lmdb':
            raise OptionError(f'{where}.dataroot_teacher', 'requires io_backend: {type: lmdb}')

    def _open_teacher(self, opt):
        """Opens the teacher's outputs, to be read beside the patches."""
        root, where = opt['dataroot_teacher'], f"datasets.{opt.get('name', '')}.dataroot_teacher"
        # check_data has walked through it, once for all processes
        if set(keys_of_lmdb(root, where, walk=False)) != {path['gt_path'] for path in self.paths}:
            raise OptionError(where, f"{root} was made from other patches than those of {opt['dataroot_gt']}")
        if self._sizes(opt, 'dataroot_teacher') != self._sizes(opt, 'dataroot_gt'):
            raise OptionError(where, f"{root} contains images of other sizes than {opt['dataroot_gt']}")
        for key, value in (('db_paths', root), ('client_keys', 'teacher')):
            self.io_backend_opt[key].append(value)

    def _read_labels(self, opt):
        label_file = opt['label_file']
        known = read_labels(label_file)
        keys = [osp.splitext(osp.basename(path['gt_path']))[0] for path in self.paths]
        unknown = [key for key in keys if key not in known]
        if unknown:
            raise OptionError(
                label_file, f'has no label for {len(unknown)} of {len(keys)} patches, such as {unknown[0]}; '
                'it was made for other data')
        wanted = opt.get('classes')
        kept = [i for i, key in enumerate(keys) if wanted is None or known[key].label in wanted]
        if not kept:
            raise OptionError(
                label_file, f'has no patch of classes {wanted}; it has '
                f'{sorted({known[key].label for key in keys})}')
        if opt.get('balance'):
            kept = self._balance(kept, [known[keys[i]].label for i in kept])
        self.paths = [self.paths[i] for i in kept]
        self.labels = [known[keys[i]].label for i in kept]
        usable = any(entry.errors for entry in known.values()) and self.whole_patches
        self.errors = [known[keys[i]].errors if usable else () for i in kept]

    @staticmethod
    def _sizes(opt, key):
        """Height and width of the patches in an LMDB, each once; none if its meta_info.txt does not say."""
        sizes = set()
        if opt['io_backend'].get('type') != 'lmdb':
            return sizes
        try:
            with open(osp.join(opt[key], 'meta_info.txt'), encoding='utf-8') as file:
                for line in filter(str.strip, file):
                    height, width, _ = line.rsplit('(', 1)[-1].split(')')[0].split(',')
                    sizes.add((int(height), int(width)))
        except (OSError, ValueError):  # written by another program
            return set()
        return sizes

    @staticmethod
    def _check_sizes(opt, gt_sizes, lq_sizes):
        """Refuses patches that do not fit gt_size or scale, of which the first batch would fail."""
        where = f"datasets.{opt.get('name', '')}"
        scale, gt_size = opt['scale'], opt['gt_size']
        check_number(gt_size, f'{where}.gt_size', scale, min(map(min, gt_sizes)), integer=True)
        if gt_size % scale:
            raise OptionError(f'{where}.gt_size', f'{gt_size} is not a multiple of the scale, {scale}')
        if gt_sizes != {(height * scale, width * scale) for height, width in lq_sizes}:
            raise OptionError(f'{where}.dataroot_lq',
                              f"its patches are not those of {opt['dataroot_gt']}, downscaled by {scale}")

    @staticmethod
    def _balance(indices, labels):
        """Repeats the indices of every class, in turn, up to the size of the largest class."""
        size = max(Counter(labels).values())
        balanced = []
        for label in sorted(set(labels)):
            members = [index for index, label_ in zip(indices, labels) if label_ == label]
            balanced += [members[i % len(members)] for i in range(size)]
        return balanced

    def __getitem__(self, index):
        """
        Returns:
            dict: lq (Tensor) of shape (c, h, w) and gt (Tensor) of shape (c, h*scale, w*scale), RGB in [0, 1]; label
                (int); lq_path and gt_path (str); where they are known, errors (Tensor) of shape (M, ) and teacher
                (Tensor) of gt's shape.
        """
        taught = self.opt.get('dataroot_teacher')
        drawn = random.getstate() if taught else None
        data = super(LabeledPatchDataset, self).__getitem__(index)
        if taught:
            random.setstate(drawn)  # the same crop, flip and turn
            data['teacher'] = self._teacher_output(self.paths[index]['gt_path'])
        data['label'] = self.labels[index]
        if self.errors[index]:
            data['errors'] = torch.tensor(self.errors[index])
        return data

    def _teacher_output(self, key):
        """The teacher's output for a patch, treated as PairedImageDataset treats GT."""
        image = imfrombytes(self.file_client.get(key, 'teacher'), float32=True)
        if self.opt['phase'] == 'train':
            scale = self.opt['scale']
            lq = np.empty((image.shape[0] // scale, image.shape[1] // scale))
            image, _ = paired_random_crop(image, lq, self.opt['gt_size'], scale, key)
            image = augment([image], self.opt['use_hflip'], self.opt['use_rot'])
        if self.opt.get('color') == 'y':
            image = bgr2ycbcr(image, y_only=True)[..., None]
        output = img2tensor(image)
        if self.mean is not None or self.std is not None:
            normalize(output, self.mean, self.std, inplace=True)
        return output
