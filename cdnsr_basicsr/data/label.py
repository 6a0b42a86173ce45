"""Difficulty labels for the patches of a prepared dataset."""
from __future__ import annotations

import cv2
import itertools
import numpy as np
import os
import torch
from contextlib import ExitStack, contextmanager
from pathlib import Path
from torch import nn
from tqdm import tqdm
from typing import Any, Iterator, Optional, Sequence

from ..checkpoint import load_branches
from ..conversion.convert import load_network
from ..files import make_writable, replace_folder_when_done
from ..inference.luma import to_luma
from ..inference.network import common_geometry, run_padded
from ..losses import squared_error
from ..options import OptionError, one_line
from .labels import Label, write_labels
from .pictures import Database, NotAPicture, decoded, keys_of_lmdb
from .prepare import encode, new_database, parallel_map

BATCH = 16  # fixed, so that labels do not depend on the number of workers


def equal_parts(scores: Sequence[float], num_classes: int) -> list[int]:
    """Classes of equal size by score, the highest scores being class 0; ties go by position.

    >>> equal_parts([30., 20., 40.], 3)
    [1, 2, 0]
    """
    labels = [0] * len(scores)
    for rank, index in enumerate(sorted(range(len(scores)), key=lambda i: (-scores[i], i))):
        labels[index] = rank * num_classes // len(scores)
    return labels


def by_thresholds(scores: Sequence[float], thresholds: Sequence[float]) -> list[int]:
    """Class of each score: the number of thresholds it does not reach.

    >>> by_thresholds([40., 30., 20.], [27.2, 35.1])
    [0, 1, 2]
    """
    return [sum(score < threshold for threshold in thresholds) for score in scores]


def cheapest_within(errors: np.ndarray, margin: float) -> np.ndarray:
    """The first branch whose error is at most (1 + margin) times that of the best one.

    Args:
        errors: of shape (n, M), branches from cheap to dear.
        margin: Relative margin, at least 0.

    Returns:
        Classes of shape (n, ).
    """
    return (errors <= (1 + margin) * errors.min(axis=1, keepdims=True)).argmax(axis=1)


def patch_psnr(output: torch.Tensor, gt: torch.Tensor, border: int) -> torch.Tensor:
    """PSNR of each patch in dB over all channels at 8 bits, without `border` pixels at each side; infinite if equal.

    Args:
        output: of shape (b, c, h, w).
        gt: of the same shape.
        border: Pixels left out, if the patch is larger than that.

    Returns:
        Tensor of shape (b, ).
    """
    error = output.clamp(0, 1).mul(255).round() - gt.mul(255).round()
    if min(error.shape[-2:]) > 2 * border > 0:
        error = error[..., border:-border, border:-border]
    return 10 * torch.log10(255**2 / error.double().square().mean(dim=(1, 2, 3)))


def read_batches(folder: Path, workers: int) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """Reads the patches of a prepared dataset in the order of their keys.

    Yields:
        Keys, LQ patches (b, 3, h, w) and GT patches (b, 3, h*scale, w*scale), RGB in [0, 1]; all of one size.
    """
    from basicsr.utils import img2tensor

    roots = [str(folder / 'lq.lmdb'), str(folder / 'gt.lmdb')]
    names = [keys_of_lmdb(root, f'folder={folder}') for root in roots]
    if set(names[0]) != set(names[1]):
        odd = min(set(names[0]) ^ set(names[1]))
        raise OptionError(f'folder={folder}', f'is not a complete dataset: {odd} is in one LMDB only')
    databases, keys = [Database(root) for root in roots], sorted(names[0])

    def read(key: str) -> tuple[str, torch.Tensor, torch.Tensor]:
        images = []
        for database in databases:
            try:
                images.append(decoded(database.read(key)).astype(np.float32) / 255)
            except NotAPicture as error:
                raise OptionError(f'folder={folder}', f'{database.name(key)} {error}') from None
        return (key, *img2tensor(images))

    items = tqdm(parallel_map(read, keys, workers), 'label', len(keys), unit='patch', disable=None)
    for _, same_size in itertools.groupby(items, key=lambda item: item[1].shape):
        while batch := list(itertools.islice(same_size, BATCH)):
            batch_keys, lq, gt = zip(*batch)
            yield list(batch_keys), torch.stack(lq), torch.stack(gt)


@contextmanager
def teacher_writer(path: Path) -> Iterator[Any]:
    """Yields BasicSR's LmdbMaker; its LMDB takes the place of `path` when the block ends without an error."""
    with replace_folder_when_done(path) as work:
        made = work / path.name
        with new_database(made) as maker:
            yield maker
        for file in made.iterdir():
            file.rename(work / file.name)
        made.rmdir()


@torch.no_grad()
def label(folder: str,
          by: str,
          model: Optional[str] = None,
          opt_path: Optional[str] = None,
          num_classes: int = 3,
          thresholds: Optional[Sequence[float]] = None,
          margin: float = 0.05,
          workers: Optional[int] = None,
          overwrite: bool = False,
          teacher: bool = False) -> tuple[Path, list[int]]:
    """Labels every patch of a prepared dataset with a class, 0 being the easiest.

    Args:
        folder: Folder written by `prepare`.
        by: 'psnr': equal parts, or parts by `thresholds`, of a network's PSNR on each patch (ClassSR).
            'branches': the cheapest branch of a CDNSR network whose L1 error is within `margin` of its best (CDNSR);
                the squared errors of all branches are written too.
            'bicubic': as 'psnr', of bicubic upsampling; needs no network.
        model: Checkpoint of the network, or its name.
        opt_path: Option file that describes it, if it does not do so itself; without `model`, for 'branches', the
            option file that is going to train the classifier: the branches are those of
            path.pretrain_network_branches.
        num_classes: Number of classes for equal parts, 2 to 5.
        thresholds: PSNRs in dB that separate the classes, instead of equal parts; at most 4.
        margin: Relative margin of 'branches', at least 0.
        workers: Reading threads. Default: the number of CPUs. The labels do not depend on it.
        overwrite: Whether to replace existing labels, and the outputs of a teacher.
        teacher: Whether to save the outputs of the network of 'psnr', in 8 bits, in teacher.lmdb beside the patches:
            LabeledPatchDataset's dataroot_teacher, from which trainings learn without running the network.

    Returns:
        Label file and number of patches per class.

    Raises:
        OptionError: An argument does not fit, or the dataset or the network cannot be read.
    """
    from basicsr.utils import tensor2img
    from ..archs import CDNSR, Interpolation

    root = Path(folder)
    for name in ('lq.lmdb', 'gt.lmdb'):
        if not (root / name / 'data.mdb').is_file():
            raise OptionError(f'folder={folder}', f'contains no {name}; expected a folder that `basicsr prepare` wrote')
    path, kept = root / f'labels_{by}.txt', root / 'teacher.lmdb'
    for made in [path] + [kept] * teacher:
        if made.exists() and not overwrite:
            raise OptionError(str(made), 'already exists; overwrite=True replaces it')
    if teacher and by != 'psnr':
        raise OptionError('teacher=True', 'requires by=psnr')
    if not 2 <= num_classes <= 5:
        raise OptionError(f'num_classes={num_classes}', 'expected 2 to 5')
    if thresholds and (len(thresholds) > 4 or not np.isfinite(thresholds).all()):
        raise OptionError('thresholds', 'expected 1 to 4 finite numbers')
    if not 0 <= margin < float('inf'):
        raise OptionError(f'margin={margin}', 'expected a finite number of at least 0')

    make_writable(root)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    nets: list[nn.Module] = []
    if by == 'branches' and model is None and opt_path is not None:
        nets = load_branches(opt_path)
    elif by != 'bicubic':
        net = load_network(model, opt_path)
        if by == 'branches' and not isinstance(net, CDNSR):
            raise OptionError(f'model={model}', f'by=branches needs a CDNSR network, but this is {type(net).__name__}')
        nets = list(net.branches) if by == 'branches' else [net]
    nets = [net.to(device, memory_format=torch.channels_last) for net in nets]  # several times as fast on a CPU

    named = f'model={model}' if model else str(opt_path)
    net_scale, channels, multiple = 1, 3, 1
    if nets:
        try:
            net_scale, channels, multiple = common_geometry(nets)
        except ValueError as error:
            raise OptionError(named, one_line(error)) from error
    if teacher and channels != 3:
        raise OptionError('teacher=True', f'needs a network of 3 channels; {named} has {channels}')
    keys: list[str] = []
    rows: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    cv2.setNumThreads(1)  # the readers are threads already
    with ExitStack() as stack:
        writer = stack.enter_context(teacher_writer(kept)) if teacher else None
        for batch_keys, lq, gt in read_batches(root, workers or os.cpu_count() or 1):
            scale = gt.shape[-1] // lq.shape[-1]
            if not nets:
                nets, net_scale = [Interpolation(upscale=scale)], scale
            if net_scale != scale:
                raise OptionError(named, f'enlarges {net_scale} times, but the patches of {folder} are x{scale}')
            if channels == 1:
                lq, gt = to_luma(lq, 1), to_luma(gt, 1)
            lq, gt = lq.to(device, memory_format=torch.channels_last), gt.to(device)
            try:
                outputs = [run_padded(branch, lq, scale, multiple) for branch in nets]
            except RuntimeError as error:
                raise OptionError(named, f'cannot upscale the patches of {folder}: {one_line(error)}') from error
            if not all(output.isfinite().all() for output in outputs):
                raise OptionError(named, f'computes values that are not finite for the patches of {folder}')
            if by == 'branches':
                scores = torch.stack([255 * (output - gt).abs().mean(dim=(1, 2, 3)) for output in outputs], dim=1)
                squares.append(torch.stack([squared_error(output, gt) for output in outputs], dim=1).cpu().numpy())
            else:
                scores = patch_psnr(outputs[0], gt, border=scale).unsqueeze(1)
            keys += batch_keys
            rows.append(scores.double().cpu().numpy())
            if writer:
                for key, image in zip(batch_keys, tensor2img(list(outputs[0].unbind()))):
                    writer.put(encode(image), key, image.shape)

    table = np.concatenate(rows)
    if by == 'branches':
        classes = cheapest_within(table, margin).tolist()
        scores = [table[i, k] for i, k in enumerate(classes)]
        num_classes = table.shape[1]
    else:
        scores = table[:, 0].tolist()
        classes = by_thresholds(scores, thresholds) if thresholds else equal_parts(scores, num_classes)
        num_classes = len(thresholds) + 1 if thresholds else num_classes
    errors = np.concatenate(squares).tolist() if squares else [()] * len(keys)
    write_labels(path, dict(zip(keys, map(Label, classes, scores, map(tuple, errors)))))
    return path, np.bincount(classes, minlength=num_classes).tolist()
