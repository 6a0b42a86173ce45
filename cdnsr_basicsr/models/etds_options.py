"""What an option file for ETDSModel may hold."""
from ..options import check_number, check_tested
from .cdnsr_options import check_blocks, check_loss_block
from .fast_options import KEYS as FAST_KEYS
from .fast_options import check_teacher, check_training

# what ETDSModel and BasicSR's pipelines read, block by block
KEYS = dict(FAST_KEYS, train=(*FAST_KEYS['train'], 'residual_opt', 'residual_freeze_iter'))


def check_options(opt, is_train):
    """Refuses what ETDSModel cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    check_blocks(opt, 'ETDS', KEYS)
    if is_train:
        train_opt = opt['train']
        check_training(train_opt)
        check_teacher(opt)
        if train_opt.get('residual_opt'):
            check_loss_block(train_opt['residual_opt'], 'residual')
        check_number(train_opt.get('residual_freeze_iter', 0), 'train.residual_freeze_iter', 0, integer=True)
    else:
        check_tested(opt)
