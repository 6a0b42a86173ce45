"""What an option file for ETDSModel may hold."""
from ..options import OptionError, check_number
from .cdnsr_options import check_blocks, check_loss_block

# what ETDSModel and BasicSR's pipelines read, block by block
KEYS = {
    'option file': ('name', 'model_type', 'scale', 'num_gpu', 'manual_seed', 'datasets', 'network_g', 'path', 'train',
                    'val', 'logger', 'dist_params', 'find_unused_parameters'),
    'path': ('pretrain_network_g', 'param_key_g', 'strict_load_g', 'resume_state', 'ignore_resume_networks',
             'experiments_root', 'results_root'),
    'train': ('ema_decay', 'optim_g', 'scheduler', 'total_iter', 'warmup_iter', 'pixel_opt', 'residual_opt',
              'residual_freeze_iter'),
    'val': ('metrics', 'pbar', 'save_img', 'suffix', 'val_freq'),
}


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
        if not train_opt.get('pixel_opt'):
            raise OptionError('train.pixel_opt', 'a pixel loss is needed')
        for name in ('pixel', 'residual'):
            if train_opt.get(f'{name}_opt'):
                check_loss_block(train_opt[f'{name}_opt'], name)
        check_number(train_opt.get('residual_freeze_iter', 0), 'train.residual_freeze_iter', 0, integer=True)
