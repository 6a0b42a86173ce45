"""What an option file for ETDSModel may hold."""
from dataclasses import dataclass
from typing import Mapping, Optional

from ..options.schema import block, integer, key, loss
from .fast_options import FastFile, SingleTraining, check_file, check_tested, check_training


@dataclass
class ETDSTraining(SingleTraining):
    """How a model is trained."""
    residual_opt: Optional[Mapping] = key(None, loss(),
                                          'the residual stream near the GT; its loss_weight is alpha of Eq. 15')
    residual_freeze_iter: int = key(0, integer(0), 'iterations in which the residual stream stays as it is')


@dataclass
class ETDSFile(FastFile):
    """What stands at the top of an option file."""
    train: ETDSTraining = key(None, block(ETDSTraining), 'how it is trained; needed in training')


def check_options(opt, is_train):
    """Refuses what ETDSModel cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    check_file(opt, 'ETDS', ETDSFile, is_train)
    if is_train:
        check_training(opt)
    else:
        check_tested(opt)
