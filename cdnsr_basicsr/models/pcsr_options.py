"""What an option file for PCSRModel may hold."""
from ..options import OptionError, check_choice, check_number, check_routing, check_tested
from .cdnsr_options import check_blocks

# what PCSRModel and BasicSR's pipelines read, block by block
KEYS = {
    'option file': ('name', 'model_type', 'scale', 'num_gpu', 'manual_seed', 'datasets', 'network_g', 'routing', 'tile',
                    'path', 'train', 'val', 'logger', 'dist_params', 'find_unused_parameters'),
    'tile': ('patch_size', 'step'),
    'path': ('pretrain_network_g', 'param_key_g', 'strict_load_g', 'resume_state', 'ignore_resume_networks',
             'experiments_root', 'results_root'),
    'train':
    ('phase', 'freeze', 'ema_decay', 'optim_g', 'scheduler', 'total_iter', 'warmup_iter', 'pixel_opt', 'average_opt'),
    'val': ('metrics', 'pbar', 'save_img', 'save_map', 'suffix', 'val_freq'),
}


def check_options(opt, is_train):
    """Refuses what PCSRModel cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    check_blocks(opt, 'PCSR', KEYS)
    net_opt = opt['network_g']
    check_number(net_opt.get('upscale', 4), 'network_g.upscale', 1)
    check_choice(net_opt.get('phase', 1), 'network_g.phase', [0, 1])
    for name in ('light', 'heavy', 'classifier'):
        widths = net_opt.get(name, [])
        if not isinstance(widths, list):
            raise OptionError(f'network_g.{name}', f'expected a list of widths of layers, but got {widths!r}')
        for width in widths:
            check_number(width, f'network_g.{name}', 1, integer=True)

    tile = opt.get('tile') or {}
    patch_size = tile.get('patch_size', 128)
    check_number(patch_size, 'tile.patch_size', 8, integer=True)
    check_number(tile.get('step', patch_size), 'tile.step', 1, patch_size, integer=True)
    check_routing(opt.get('routing') or {}, 'routing')
    if is_train:
        check_training(opt)
    else:
        check_tested(opt)


def check_training(opt):
    """Refuses what PCSRModel cannot be trained with.

    Args:
        opt (dict): Content of the option file, otherwise checked.

    Raises:
        OptionError: For the first mistake found.
    """
    train_opt, phase = opt['train'], opt['train'].get('phase', 1)
    check_choice(phase, 'train.phase', [0, 1])
    if opt['network_g'].get('phase', phase) != phase:
        raise OptionError('network_g.phase', f"is {opt['network_g']['phase']}, but train.phase is {phase}")
    if not train_opt.get('pixel_opt'):
        raise OptionError('train.pixel_opt', 'a pixel loss is needed')
    for name in ('pixel_opt', 'average_opt'):
        block = train_opt.get(name) or {}
        check_number(block.get('loss_weight', 1), f'train.{name}.loss_weight', 0)
        if block.get('reduction') == 'none':
            raise OptionError(f'train.{name}.reduction', 'none leaves no single value to minimise; accepted: mean, sum')
    average_opt, freeze = train_opt.get('average_opt'), train_opt.get('freeze') or []
    if average_opt:
        check_choice(average_opt.get('type'), 'train.average_opt.type', ['AverageLoss'])
    if phase == 0 and (average_opt or freeze):
        raise OptionError('train.phase', '0 trains backbone and heavy sampler alone, without average_opt and freeze')
    if not isinstance(freeze, list) or not set(freeze) <= {'backbone', 'heavy'}:
        raise OptionError('train.freeze', f'accepted: [backbone, heavy], one of them or []; got {freeze!r}')
    if freeze and not any(opt['path'].get(key) for key in ('pretrain_network_g', 'resume_state')):
        raise OptionError('train.freeze', f'{freeze[0]} without weights would stay random; name them at path')
