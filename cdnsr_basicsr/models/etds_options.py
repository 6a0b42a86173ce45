"""What an option file for ETDSModel may hold."""
from ..options import OptionError, check_keys, check_number
from .cdnsr_options import check_loss_block

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
    net_opt = opt.get('network_g', {})
    if net_opt.get('type') != 'ETDS':
        raise OptionError('network_g.type', f"ETDSModel needs type ETDS, but got {net_opt.get('type')!r}")
    if opt.get('scale') != net_opt.get('upscale', 4):
        raise OptionError('scale', f"is {opt.get('scale')!r}, but network_g.upscale is {net_opt.get('upscale', 4)!r}")
    check_keys(opt, KEYS['option file'], 'option file')
    for name in ('path', 'train', 'val'):
        if opt.get(name):
            check_keys(opt[name], KEYS[name], name)
    if is_train:
        train_opt = opt['train']
        if not train_opt.get('pixel_opt'):
            raise OptionError('train.pixel_opt', 'a pixel loss is needed')
        for name in ('pixel', 'residual'):
            if train_opt.get(f'{name}_opt'):
                check_loss_block(train_opt[f'{name}_opt'], name)
        check_number(train_opt.get('residual_freeze_iter', 0), 'train.residual_freeze_iter', 0, integer=True)
