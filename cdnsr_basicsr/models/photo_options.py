"""Keys of an option file for FastRealESRNetModel."""
from dataclasses import dataclass

from ..options import OptionError
from ..options.kinds import integer
from ..options.schema import fields_of, key
from . import fast_options
from .degradation import Degradations
from .fast_options import FastFile

DATASETS = ('PhotographDataset', 'RealESRGANDataset')


@dataclass
class PhotoFile(Degradations, FastFile):
    """Keys at the top of an option file."""
    queue_size: int = key(192, integer(1, 2**16),
                          'pool of degraded pairs from which batches are drawn; a multiple of the batch')


def check_options(opt, is_train):
    """Refuses what FastRealESRNetModel cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    fast_options.check_options(opt, is_train, struct=PhotoFile)
    if not is_train:
        return
    data = opt['datasets']['train']
    if data['type'] not in DATASETS:
        raise OptionError(
            'datasets.train.type', f"accepted: {', '.join(DATASETS)}, whose images this model degrades; "
            f"got {data['type']} (FastSRModel trains on pairs)")
    if data.get('gt_size') is None:
        raise OptionError('datasets.train.gt_size', 'is needed: the side of the GT patches')
    size, batch = opt.get('queue_size') or fields_of(PhotoFile)['queue_size'].default, data['batch_size_per_gpu']
    if size % batch:
        nearest = [max(1, size // batch + more) * batch for more in (0, 1)]
        raise OptionError(
            'queue_size', f'{size} is not a multiple of batch_size_per_gpu, {batch}; accepted: '
            f'multiples, such as {" or ".join(str(value) for value in sorted(set(nearest)))}')
