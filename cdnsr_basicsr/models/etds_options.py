"""Keys of an option file for ETDSModel."""
from dataclasses import dataclass
from functools import partial
from typing import Mapping, Optional

from ..options.kinds import integer, loss
from ..options.schema import block, key
from . import fast_options
from .fast_options import FastFile, SingleTraining


@dataclass
class ETDSTraining(SingleTraining):
    """How a model is trained."""
    residual_opt: Optional[Mapping] = key(None, loss(),
                                          'loss between residual stream and GT; its loss_weight is alpha of Eq. 15')
    residual_freeze_iter: int = key(0, integer(0), 'iterations in which the residual stream is frozen')


@dataclass
class ETDSFile(FastFile):
    """Keys at the top of an option file."""
    train: ETDSTraining = key(None, block(ETDSTraining), 'training; required in training')


check_options = partial(fast_options.check_options, arch='ETDS', struct=ETDSFile)
