"""What an option file for FastSRModel may hold."""
from ..inference.engine import PRECISIONS
from ..options import OptionError, check_choice, check_flag, check_tested
from .cdnsr_options import check_blocks, check_loss_block, has_teacher

# what FastSRModel and BasicSR's pipelines read, block by block
KEYS = {
    'option file': ('name', 'model_type', 'scale', 'num_gpu', 'manual_seed', 'datasets', 'network_g', 'network_t',
                    'path', 'train', 'val', 'logger', 'dist_params', 'find_unused_parameters'),
    'path': ('pretrain_network_g', 'param_key_g', 'strict_load_g', 'pretrain_network_t', 'strict_load_t',
             'resume_state', 'ignore_resume_networks', 'experiments_root', 'results_root'),
    'train': ('ema_decay', 'optim_g', 'scheduler', 'total_iter', 'warmup_iter', 'precision', 'channels_last',
              'pixel_opt', 'teacher_opt'),
    'val': ('metrics', 'pbar', 'save_img', 'suffix', 'val_freq'),
}


def check_training(train_opt):
    """Refuses what a single network cannot be trained with.

    Args:
        train_opt (dict): The option file's `train` block, its keys otherwise checked.

    Raises:
        OptionError: For the first mistake found.
    """
    if not train_opt.get('pixel_opt'):
        raise OptionError('train.pixel_opt', 'a pixel loss is needed')
    check_loss_block(train_opt['pixel_opt'], 'pixel')
    check_choice(train_opt.get('precision', 'float32'), 'train.precision', list(PRECISIONS))
    check_flag(train_opt.get('channels_last', True), 'train.channels_last')


def check_teacher(opt):
    """Refuses a teacher without a loss that compares with it, and such a loss without a teacher.

    Args:
        opt (dict): Content of the option file of a training.

    Raises:
        OptionError: For the first mistake found.
    """
    loss_opt = opt['train'].get('teacher_opt')
    if has_teacher(opt) != bool(loss_opt):
        raise OptionError(
            'train.teacher_opt', 'goes with a teacher, network_t and path.pretrain_network_t or '
            'datasets.train.dataroot_teacher, and the other way round')
    if loss_opt:
        check_loss_block(loss_opt, 'teacher')


def check_options(opt, is_train):
    """Refuses what FastSRModel cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    check_blocks(opt, None, KEYS)
    if is_train:
        check_training(opt['train'])
        check_teacher(opt)
    else:
        check_tested(opt)
