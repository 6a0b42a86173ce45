"""Checks the images of an option file before the first iteration."""
from __future__ import annotations

import copy
import logging
import os
import torch
from contextlib import contextmanager
from os import path as osp
from tqdm import tqdm
from typing import Any, Callable, Iterator, Mapping, Optional

from ..options import OptionError, built_network, check_number, find_registered, is_first_process, one_line
from ..options.checks import names_in
from ..options.networks import of_basicsr_or_ours
from .labels import read_labels
from .pictures import Database, Folder, NotAPicture, Pictures, check_decodes, decoded, keys_of_lmdb, read_names

DECODED = 2**25  # bytes of a dataset's images that are decoded; of the others, headers and ends are checked
MAX_ITEMS = 10**8  # of an enlarged dataset: their order is a list
CROPPED = 400  # RealESRGANDataset's images, whatever they were
SSIM_WINDOW = 11
ROOTS = ('dataroot_gt', 'dataroot_lq')
PAIRED = ('PairedImageDataset', 'RealESRGANPairedDataset')
ENDINGS = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
Size = tuple  # (height, width)


@contextmanager
def unlogged() -> Iterator[None]:
    """Keeps BasicSR's logger unchanged: its first use decides permanently whether there is a log file."""
    from basicsr.utils.logger import initialized_logger
    logger, before = logging.getLogger('basicsr'), dict(initialized_logger)
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    logger.handlers[:] = [logging.NullHandler()]
    initialized_logger['basicsr'] = True
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
        initialized_logger.clear()
        initialized_logger.update(before)


def as_basicsr_reads(name: str, block: Mapping, opt: Mapping) -> dict:
    """A dataset's block as BasicSR's parse_options passes it on."""
    block = dict(copy.deepcopy(dict(block)), phase=name.split('_')[0])
    if 'scale' in opt:
        block['scale'] = opt['scale']
    for key in ROOTS:
        if isinstance(block.get(key), str):
            block[key] = osp.expanduser(block[key])
    return block


def files_in(folder: str) -> list[str]:
    """The files that BasicSR reads as images of a folder: all that are not hidden."""
    return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith('.') and entry.is_file())


def listed(block: Mapping, key: str, where: str) -> tuple[Optional[Pictures], list[str]]:
    """A dataset's images at one of its roots, and their names there, as far as they are known.

    Raises:
        OptionError: The root is no folder, or an LMDB where io_backend says otherwise, or is cut off or damaged.
    """
    root, place = block.get(key), f'{where}.{key}'
    if not isinstance(root, str):
        return None, []
    if not osp.isdir(root):
        raise OptionError(place, f'is not a folder: {root}')
    if block.get('io_backend', {}).get('type') == 'lmdb':
        if not root.endswith('.lmdb'):
            raise OptionError(place, f'{root} does not end in .lmdb, as io_backend.type: lmdb requires; or is it disk?')
        names = keys_of_lmdb(root, place)
        return Database(root), names
    if root.rstrip('/').endswith('.lmdb') or osp.isfile(osp.join(root, 'data.mdb')):
        raise OptionError(f'{where}.io_backend.type', f'is disk, but {root} is an LMDB; accepted: lmdb')
    return Folder(root), files_in(root)


def pair_names(block: Mapping, where: str) -> Iterator[tuple[Pictures, str, Pictures, str]]:
    """The pairs of a paired dataset: GT, its name, LQ, its name.

    Raises:
        OptionError: One of a pair is missing.
    """
    (gt, gt_names), (lq, lq_names) = (listed(block, key, where) for key in ROOTS)
    assert gt is not None and lq is not None, 'both are required'
    template, given = block.get('filename_tmpl', '{}'), block.get('meta_info_file') or block.get('meta_info')
    names = {name: name for name in gt_names}
    if isinstance(gt, Folder):
        if given and 'meta_info' in block:  # RealESRGANPairedDataset: GT, LQ
            names = dict(_paths_of_pairs(given, f'{where}.meta_info'))
        elif given:
            gt_names = read_names(osp.expanduser(given), f'{where}.meta_info_file', ' ')
        if 'meta_info' not in block or not given:
            names = {}
            for name in gt_names:
                stem, ending = osp.splitext(osp.basename(name))
                names[name] = template.format(stem) + ending
        known = {key: set(found) for key, found in (('gt', files_in(gt.root)), ('lq', lq_names))}
        for gt_name, lq_name in names.items():
            for key, pictures, name in (('gt', gt, gt_name), ('lq', lq, lq_name)):
                if name not in known[key] and not osp.isfile(pictures.name(name)):
                    other = gt.name(gt_name) if key == 'lq' else given
                    raise OptionError(f'{where}.dataroot_{key}', f'{pictures.name(name)} is missing, for {other}')
        extra = sorted(set(lq_names) - set(names.values())) if not given else []
        if extra:
            raise OptionError(f'{where}.dataroot_gt', f'has no image for {lq.name(extra[0])}')
    else:
        for one, others, root in ((gt_names, lq_names, block['dataroot_lq']), (lq_names, gt_names,
                                                                               block['dataroot_gt'])):
            missing = sorted(set(one) - set(others))
            if missing:
                raise OptionError(where, f'{root} has no {missing[0]}, which the other LMDB has')
    return ((gt, gt_name, lq, lq_name) for gt_name, lq_name in sorted(names.items()))


def _paths_of_pairs(path: str, where: str) -> Iterator[tuple[str, str]]:
    for line in read_names(osp.expanduser(path), where, '\n'):
        parts = line.split(', ')
        if len(parts) != 2:
            raise OptionError(where, f"expected lines 'GT, LQ', but got {line!r}")
        yield parts[0], parts[1]


class Looked:
    """Checks images, each only once, and shows progress if it takes long.

    Args:
        where: Place of the dataset in the option file.
        total: Number of images.
        step: Of how many images one is decoded.
    """

    def __init__(self, where: str, total: int, step: int) -> None:
        self.where = where
        self.step = step
        self.number = 0
        self.bar = tqdm(total=total, desc=f'checking {where}', unit='image', disable=None, delay=2, leave=False)

    def size(self, pictures: Pictures, name: str, key: str) -> Size:
        """Height and width.

        Raises:
            OptionError: It cannot be read.
        """
        place = f'{self.where}.{key}'
        try:
            size = pictures.size(name)
            if self.number % self.step == 0:
                check_decodes(pictures.read(name))
        except NotAPicture as error:
            raise OptionError(place, f'{pictures.name(name)} {error}') from None
        except (OSError, UnicodeError) as error:
            raise OptionError(place, f'{pictures.name(name)} cannot be read: {error}') from None
        self.number += 1
        self.bar.update()
        return size


def step_of(pictures: Pictures, names: list[str]) -> int:
    """N such that every N-th image is decoded, about DECODED bytes in total."""
    probe = names[::max(1, len(names) // 100)]
    total = 0
    for name in probe:
        try:
            total += pictures.bytes_of(name)
        except (OSError, UnicodeError, NotAPicture):
            continue  # reported where it is checked
    return max(1, round(total / max(1, len(probe)) * len(names) / DECODED))


def check_pair(block: Mapping, where: str, gt: str, gt_size: Size, lq_size: Size) -> None:
    """Refuses a GT of another size than the LQ times the scale, or, in training, smaller than its crops."""
    scale, trained = block['scale'], block['phase'] == 'train'
    spare = 1 if trained else max(scale, 12)  # BasicSR crops what remains of a GT that has not been cut to a multiple
    if not all(0 <= one - scale * other < spare for one, other in zip(gt_size, lq_size)):
        raise OptionError(
            f'{where}.dataroot_gt', f'{gt} is {gt_size[1]}x{gt_size[0]}, but its LQ {lq_size[1]}x{lq_size[0]}: not '
            f'scale: {scale} times as large')
    if trained:
        check_crop(block, where, gt, gt_size)


def check_crop(block: Mapping, where: str, gt: str, gt_size: Size) -> None:
    if block.get('gt_size') and min(gt_size) < block['gt_size']:
        raise OptionError(f'{where}.gt_size',
                          f"is {block['gt_size']}, but {gt} is only {gt_size[1]}x{gt_size[0]} pixels large")


def check_gt_size(block: Mapping, where: str) -> None:
    """Refuses crops that are no multiple of the scale."""
    if block.get('gt_size') and block.get('scale') and block['gt_size'] % block['scale']:
        raise OptionError(f'{where}.gt_size', f"{block['gt_size']} is not a multiple of the scale, {block['scale']}")


def check_metric_size(metrics: Mapping, where: str, gt: str, gt_size: Size) -> None:
    """Refuses borders that leave nothing to compare."""
    for name, metric in metrics.items():
        least = SSIM_WINDOW if 'ssim' in metric['type'] else 1
        if min(gt_size) - 2 * metric.get('crop_border', 0) < least:
            raise OptionError(f'val.metrics.{name}.crop_border',
                              f"{metric.get('crop_border', 0)} leaves too little of {gt}, {gt_size[1]}x{gt_size[0]}")


def check_pairs(block: Mapping, where: str, metrics: Mapping) -> None:
    """Checks all pairs of a paired dataset."""
    pairs = list(pair_names(block, where))
    looked = Looked(where, 2 * len(pairs), step_of(pairs[0][0], [pair[1] for pair in pairs]))
    for gt, gt_name, lq, lq_name in pairs:
        gt_size = looked.size(gt, gt_name, 'dataroot_gt')
        lq_size = looked.size(lq, lq_name, 'dataroot_lq')
        check_pair(block, where, gt.name(gt_name), gt_size, lq_size)
        if block['phase'] != 'train':
            check_metric_size(metrics, where, gt.name(gt_name), gt_size)
    looked.bar.close()
    for pictures in (pairs[0][0], pairs[0][2]):
        if isinstance(pictures, Database):
            pictures.close()


def check_singles(block: Mapping, where: str, key: str, check: Callable[[str, Size], None]) -> None:
    """Checks all images of a dataset with a single root."""
    pictures, names = listed(block, key, where)
    assert pictures is not None, 'it is required'
    given = block.get('meta_info_file') or block.get('meta_info')
    if isinstance(pictures, Folder) and given:
        names = read_names(
            osp.expanduser(given), f"{where}.{'meta_info' if 'meta_info' in block else 'meta_info_file'}", ' ')
    looked = Looked(where, len(names), step_of(pictures, names))
    for name in names:
        check(pictures.name(name), looked.size(pictures, name, key))
    looked.bar.close()
    if isinstance(pictures, Database):
        pictures.close()


def check_frames(block: Mapping, where: str, known: bool) -> None:
    """Checks the frames of a dataset of clips: every file below its roots with an image extension.

    Used for datasets of other plugins too, of which nothing else is known.
    """
    if block.get('io_backend', {}).get('type') == 'lmdb':
        for key in ROOTS:
            root = block.get(key)
            if isinstance(root, str) and (known or osp.isfile(osp.join(root, 'meta_info.txt'))):
                keys_of_lmdb(root, f'{where}.{key}')
        return
    gt, lq = (Folder(block[key]) if isinstance(block.get(key), str) else None for key in ROOTS)
    for pictures, key in ((gt, 'dataroot_gt'), (lq, 'dataroot_lq')):
        if pictures is None:
            continue
        names = sorted(
            osp.relpath(osp.join(folder, name), pictures.root) for folder, _, files in os.walk(pictures.root)
            for name in files if not name.startswith('.') and name.lower().endswith(ENDINGS))
        looked = Looked(where, len(names), step_of(pictures, names))
        for name in names:
            size = looked.size(pictures, name, key)
            paired = known and key == 'dataroot_lq' and gt is not None and block.get('scale')
            if paired and osp.isfile(gt.name(name)):
                check_pair(block, where, gt.name(name), gt.size(name), size)
        looked.bar.close()


def check_pictures(dataset: Any, block: Mapping, where: str, opt: Mapping) -> None:
    """Checks the images of a dataset, according to its class."""
    names, trained = names_in(dataset), block['phase'] == 'train'
    metrics = {} if trained else (opt.get('val') or {}).get('metrics') or {}
    if trained:
        check_gt_size(block, where)
    if names & set(PAIRED):
        check_pairs(block, where, metrics)
        if block.get('dataroot_teacher'):
            keys_of_lmdb(block['dataroot_teacher'], f'{where}.dataroot_teacher')
        if block.get('label_file') and (opt.get('train') or {}).get('label_opt'):
            check_labels(block, where, len(opt['network_g']['branches']))
    elif 'SingleImageDataset' in names:
        check_singles(block, where, 'dataroot_lq', lambda name, size: None)
    elif 'RealESRGANDataset' in names:
        for place, holder in ((where, block), ('gt_size', opt)):
            if holder.get('gt_size') is not None:
                check_number(holder['gt_size'], place, 1, CROPPED, integer=True)
        check_singles(block, where, 'dataroot_gt', lambda name, size: None)
    elif 'FFHQDataset' in names:
        wanted = (opt.get('network_g') or {}).get('out_size')

        def check(name: str, size: Size) -> None:
            if wanted is not None and size != (wanted, wanted):
                raise OptionError(f'{where}.dataroot_gt',
                                  f'{name} is {size[1]}x{size[0]}, but network_g.out_size is {wanted}')

        check_singles(block, where, 'dataroot_gt', check)
    else:
        check_frames(block, where, of_basicsr_or_ours(dataset))


def check_labels(block: Mapping, where: str, num_classes: int) -> None:
    """Refuses labels of other classes, all at once: a step that checked its own would wait for a GPU."""
    labels = {entry.label for entry in read_labels(block['label_file']).values()}
    highest = max(labels.intersection(block.get('classes') or labels), default=0)
    if highest >= num_classes:
        raise OptionError(f'{where}.label_file',
                          f'holds labels such as {highest}; accepted: 0 to {num_classes - 1}, one class per branch')


def first_item(dataset: Any, block: dict, where: str) -> Any:
    """A dataset's first item, as BasicSR will read it.

    Raises:
        OptionError: It cannot be built or read.
    """
    if 'cache_data' in block:
        block = dict(block, cache_data=False)
    client = None
    try:
        built = dataset(block)
        count = len(built) * block.get('dataset_enlarge_ratio', 1)
        if not 0 < count <= MAX_ITEMS:
            raise OptionError(f'{where}.dataset_enlarge_ratio',
                              f'makes {count:.0f} items of {len(built)}; accepted: up to {MAX_ITEMS}')
        item = built[0]
        client = getattr(built.file_client, 'client', None)
    except OptionError:
        raise
    except KeyError as error:
        raise OptionError(where, f'key {error} is missing') from error
    except Exception as error:  # what wrong options and files lead to has no common type
        raise OptionError(where,
                          f"{block['type']} cannot read it: {type(error).__name__}: {one_line(error)}") from error
    finally:
        for environment in getattr(client, '_client', {}).values():
            environment.close()  # the training opens it again
    return item


def check_channels(model: Any, net: Any, item: Mapping, block: Mapping, where: str, opt: Mapping) -> None:
    """Runs the network on an image, if that is what the model does with it.

    Raises:
        OptionError: It has other channels than the network takes, or the result is not as large as GT.
    """
    from basicsr.models.sr_model import SRModel
    lq, gt = item.get('lq'), item.get('gt')
    if not issubclass(model, SRModel) or not of_basicsr_or_ours(model):
        return
    if not isinstance(lq, torch.Tensor) or lq.dim() != 3:
        return
    side = min(64, *lq.shape[1:])
    if block['phase'] == 'train':
        side = lq.shape[1]  # networks may want it so
    try:
        with torch.no_grad():
            output = net.eval()(lq[None, :, :side, :side])
    except Exception as error:
        wanted = (opt['network_g'].get('num_in_ch') or opt['network_g'].get('in_chans'))
        if wanted is not None and wanted != lq.shape[0]:
            hint = '; color: y makes them gray' if wanted == 1 else '; leave out color: y' if lq.shape[0] == 1 else ''
            raise OptionError(where, f'has images of {lq.shape[0]} channels, but network_g takes {wanted}'
                              f'{hint}') from error
        if block['phase'] != 'train':
            return  # models pad what they validate
        raise OptionError(
            'network_g', f'cannot upscale a patch of {where}, {tuple(lq.shape)}: {type(error).__name__}: '
            f'{one_line(error)}') from error
    output = output[-1] if isinstance(output, (tuple, list)) else output
    scale = block.get('scale')
    if isinstance(gt, torch.Tensor) and scale and output.shape[1:] != (gt.shape[0], side * scale, side * scale):
        raise OptionError(
            'network_g',
            f'makes {tuple(output.shape[1:])} (channels, height, width) of {tuple(lq.shape[:1])} x {side} x '
            f'{side}, but {where} with scale: {scale} has {(gt.shape[0], side * scale, side * scale)}')


class Unreadable(OptionError):
    """An item that a dataset cannot read, by the names of its files.

    Args:
        text: What is wrong, or, where an error has come out of a worker, all that torch has written of it.
    """

    def __init__(self, text: str) -> None:
        ValueError.__init__(self, text.strip().split(f'{Unreadable.__name__}: ')[-1])


class Named(torch.utils.data.Dataset):
    """A dataset whose errors name the files that they are of, in this process as in workers.

    Args:
        dataset: One of BasicSR's, or one like it.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except OptionError as error:
            raise Unreadable(str(error)) from error
        except Exception as error:  # NoneType has no attribute, and the like
            where = f"datasets.{self.dataset.opt.get('name', '')}" if hasattr(self.dataset, 'opt') else 'datasets'
            raise Unreadable(f'{where}: {self._blamed(index)} cannot be read: {type(error).__name__}: '
                             f'{one_line(error)}') from error

    def _blamed(self, index: int) -> str:
        """The file of an item that can no longer be read, or all of its files."""
        paths = getattr(self.dataset, 'paths', None) or getattr(self.dataset, 'keys', None) or {}
        try:
            entry = paths[index]
        except (KeyError, IndexError, TypeError):
            return f'item {index}'
        named = entry if isinstance(entry, dict) else dict.fromkeys(('lq', 'gt'), entry)
        client = getattr(self.dataset, 'file_client', None)
        for name, path in named.items():
            key = name.replace('_path', '')
            try:
                decoded(bytes(client.get(path, key)))
            except Exception:  # it is the one
                return f'{path} ({key})'
        return ' and '.join(dict.fromkeys(named.values()))


def check_data(opt: Mapping) -> None:
    """Checks all images of a checked option file, and runs the network on the first of each dataset.

    Sizes and ends of all of them are checked, some are decoded. Only the first process of several does it.

    Raises:
        OptionError: For the first that cannot be trained or tested with, by its name.
    """
    from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
    if not is_first_process():
        return
    model = find_registered(MODEL_REGISTRY, opt['model_type'], 'model_type')
    with unlogged(), torch.random.fork_rng(devices=[]):
        nets = {key: built_network(opt[key], key) for key in opt if str(key).startswith('network_')}
        for name, block in opt['datasets'].items():
            where, dataset = f'datasets.{name}', find_registered(DATASET_REGISTRY, block['type'], 'type')
            read = as_basicsr_reads(name, block, opt)
            check_pictures(dataset, read, where, opt)
            if of_basicsr_or_ours(dataset):
                item = first_item(dataset, copy.deepcopy(read), where)
                if 'network_g' in nets:
                    check_channels(model, nets['network_g'], item, read, where, opt)
