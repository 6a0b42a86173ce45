"""What an option file for CDNSRModel may hold."""
from ..inference.network import PRECISIONS
from ..inference.tiling import PATCH_SIZE
from ..options import OptionError, check_choice, check_flag, check_keys, check_number, check_path, check_tested

DISTILLATION_LOSSES = ('kd', 'feature', 'csd', 'cs')
# in the order in which they are summed and logged, and which part each one trains, if it is one part alone
LOSSES = {
    'pixel': None,
    'branch': None,
    'class': 'classifier',
    'average': 'classifier',
    'flops': 'classifier',
    'label': 'classifier',
    'error': 'classifier',
    **dict.fromkeys(DISTILLATION_LOSSES, 'branches')
}
# accepted types of the losses that are called with more than an image and its GT
TYPES = {
    'branch': ('L1Loss', 'MSELoss', 'CharbonnierLoss'),
    'class': ('ClassLoss', ),
    'average': ('AverageLoss', ),
    'flops': ('FLOPsLoss', ),
    'label': ('LabelLoss', ),
    'error': ('ErrorLoss', ),
    'kd': ('KDL1Loss', ),
    'feature': ('FeatureDistillLoss', ),
    'csd': ('CSDLoss', 'ContrastLoss'),
    'cs': ('CSDLoss', 'ContrastLoss'),
    'teacher': ('L1Loss', 'MSELoss', 'CharbonnierLoss')  # of a single network
}
# what CDNSRModel and BasicSR's pipelines read, block by block
KEYS = {
    'option file': ('name', 'model_type', 'scale', 'num_gpu', 'manual_seed', 'datasets', 'network_g', 'network_t',
                    'tile', 'path', 'train', 'val', 'logger', 'dist_params', 'find_unused_parameters'),
    'tile': ('patch_size', 'step'),
    'path': ('pretrain_network_g', 'pretrain_network_branches', 'param_key_g', 'strict_load_g', 'pretrain_network_t',
             'strict_load_t', 'resume_state', 'ignore_resume_networks', 'experiments_root', 'results_root'),
    'train': ('ema_decay', 'freeze', 'optim_g', 'scheduler', 'tau_min', 'total_iter', 'warmup_iter', 'precision',
              'channels_last', 'compile', 'feature_extractor', 'balance', 'collapse_share', 'collapse_iter',
              *(f'{name}_opt' for name in LOSSES)),
    'feature_extractor': ('weights', ),
    'val': ('metrics', 'pbar', 'save_img', 'save_map', 'suffix', 'val_freq'),
}


def check_blocks(opt, arch, keys):
    """Refuses another network than the model's, another scale than the network's, and unknown keys.

    Args:
        opt (dict): Content of the option file.
        arch (str | None): Type of the network, whose model is called <arch>Model; None accepts any.
        keys (dict[str, tuple[str]]): Accepted keys of each block, and of the 'option file' itself.

    Raises:
        OptionError: For the first mistake found.
    """
    net_opt = opt.get('network_g', {})
    if arch is not None and net_opt.get('type') != arch:
        raise OptionError('network_g.type', f"{arch}Model needs type {arch}, but got {net_opt.get('type')!r}")
    upscale = net_opt.get('upscale', 4 if arch else opt.get('scale'))
    if opt.get('scale') != upscale:
        raise OptionError('scale', f"is {opt.get('scale')!r}, but network_g.upscale is {upscale!r}")
    check_keys(opt, keys['option file'], 'option file')
    for name, accepted in keys.items():
        if opt.get(name) is not None:
            check_keys(opt[name], accepted, name)


def check_options(opt, is_train):
    """Refuses what CDNSRModel cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    check_blocks(opt, 'CDNSR', KEYS)
    net_opt = opt['network_g']
    branches, upscale = net_opt['branches'], net_opt.get('upscale', 4)
    if not isinstance(branches, list) or not 2 <= len(branches) <= 5:
        raise OptionError('network_g.branches', f'expected a list of 2 to 5 branches, but got {branches!r}')
    for i, branch in enumerate(branches):
        if not isinstance(branch, dict):
            raise OptionError(f'network_g.branches[{i}]', f'expected a block with a type, but got {branch!r}')
        if branch.get('upscale', upscale) != upscale:
            raise OptionError(f'network_g.branches[{i}].upscale', f'must be {upscale} like network_g.upscale')
    check_choice(net_opt.get('mixture', 'gumbel'), 'network_g.mixture', ['gumbel', 'softmax'])
    tile = opt.get('tile') or {}
    patch_size = tile.get('patch_size', PATCH_SIZE)
    check_number(patch_size, 'tile.patch_size', 1, integer=True)
    check_number(tile.get('step', patch_size), 'tile.step', 1, patch_size, integer=True)

    paths = opt['path'].get('pretrain_network_branches')
    if paths is not None and (not isinstance(paths, list) or len(paths) != len(branches)):
        raise OptionError('path.pretrain_network_branches', f'expected a list of {len(branches)} checkpoints, one '
                          f'per branch, but got {paths!r}')
    if paths and not is_train:
        raise OptionError('path.pretrain_network_branches', 'is for training; name the trained CDNSR by '
                          'pretrain_network_g')
    if is_train:
        check_training(opt)
    else:
        check_tested(opt)


def has_teacher(opt):
    """Whether there is a network, or outputs of one, to learn from.

    Args:
        opt (dict): Content of the option file.

    Raises:
        OptionError: It is only half there, or there are two.
    """
    network = 'network_t' in opt
    outputs = bool((opt.get('datasets', {}).get('train') or {}).get('dataroot_teacher'))
    if network != bool(opt['path'].get('pretrain_network_t')):
        raise OptionError('network_t', 'a teacher needs both network_t and path.pretrain_network_t')
    if network and outputs:
        raise OptionError('datasets.train.dataroot_teacher', 'one teacher is enough: this, or network_t')
    return network or outputs


def check_loss_block(block, name):
    """Refuses a loss of another kind than its name says, and values that would fail in the first iteration.

    Args:
        block (dict): Loss block.
        name (str): Its name in the option file, without _opt.

    Raises:
        OptionError: For the first mistake found.
    """
    where = f'train.{name}_opt'
    if name in TYPES:
        check_choice(block.get('type'), f'{where}.type', TYPES[name])
    check_number(block.get('loss_weight', 1), f'{where}.loss_weight', 0)
    check_number(block.get('num_negatives', 1), f'{where}.num_negatives', 1, integer=True)
    if block.get('reduction') == 'none':
        raise OptionError(f'{where}.reduction', 'none leaves no single value to minimise; accepted: mean, sum')
    check_number(block.get('target', 0), f'{where}.target', 0, 1)
    for layer, weight in (block.get('layer_weights') or {}).items():
        check_number(weight, f'{where}.layer_weights.{layer}', 0)


def check_training(opt):
    """Refuses what CDNSRModel cannot be trained with.

    Args:
        opt (dict): Content of the option file, otherwise checked.

    Raises:
        OptionError: For the first mistake found.
    """
    train_opt, data_opt = opt['train'], opt['datasets'].get('train') or {}
    check_number(train_opt.get('tau_min', 0.4), 'train.tau_min', 0.01, 1)
    check_number(train_opt.get('collapse_share', 0.95), 'train.collapse_share', 0.01, 1)
    check_number(train_opt.get('collapse_iter', 500), 'train.collapse_iter', 1, integer=True)
    check_choice(train_opt.get('precision', 'float32'), 'train.precision', list(PRECISIONS))
    check_choice(train_opt.get('balance', 'warn'), 'train.balance', ['warn', 'auto'])
    for key in ('channels_last', 'compile'):
        check_flag(train_opt.get(key, False), f'train.{key}')
    if 'feature_extractor' in train_opt:
        check_keys(train_opt['feature_extractor'], KEYS['feature_extractor'], 'train.feature_extractor')
        weights = train_opt['feature_extractor'].get('weights', 'imagenet')
        if weights not in ('imagenet', 'random'):
            check_path(weights, 'train.feature_extractor.weights')

    freeze = train_opt.get('freeze') or []
    if freeze not in ([], ['branches'], ['classifier']):
        raise OptionError('train.freeze', f'accepted: [branches], [classifier] or []; got {freeze!r}')
    starts = [opt['path'].get(key) for key in ('pretrain_network_g', 'resume_state')]
    branches = [opt['path'].get('pretrain_network_branches')] if freeze == ['branches'] else []
    if freeze and not any(starts + branches):
        raise OptionError('train.freeze', f'{freeze[0]} without weights would stay random; name them at path')

    losses = [name for name in LOSSES if train_opt.get(f'{name}_opt')]
    enough = {'pixel', 'branch'} | ({'label', 'error'} if freeze == ['branches'] else set())
    if not enough.intersection(losses):
        raise OptionError(
            'train.pixel_opt', 'a loss is needed: pixel_opt or branch_opt; with freeze: [branches] also '
            'label_opt or error_opt')
    for name in losses:
        check_loss_block(train_opt[f'{name}_opt'], name)
        trained = LOSSES[name]
        if [trained] == freeze:
            raise OptionError(f'train.{name}_opt', f'trains the {trained} only, which train.freeze keeps as they are')
    if train_opt.get('balance') == 'auto' and 'average' not in losses:
        raise OptionError('train.balance', 'auto raises the weight of average_opt, which is missing')
    if 'label' in losses and data_opt.get('label_file') is None:
        raise OptionError('train.label_opt', 'needs datasets.train.label_file, which `basicsr label` writes')
    if 'label' in losses and data_opt.get('type') != 'LabeledPatchDataset':
        raise OptionError('train.label_opt',
                          f"needs a LabeledPatchDataset, but datasets.train.type is {data_opt.get('type')}")
    if has_teacher(opt) and not set(losses) & set(DISTILLATION_LOSSES):
        raise OptionError('network_t' if 'network_t' in opt else 'datasets.train.dataroot_teacher',
                          f"teaches nothing without {', '.join(f'{name}_opt' for name in DISTILLATION_LOSSES)}")
    for name in sorted({'csd', 'cs'}.intersection(losses)):
        if data_opt.get('batch_size_per_gpu', 2) < 2:
            raise OptionError(
                f'train.{name}_opt', 'takes negatives from the other samples of a batch, but '
                'datasets.train.batch_size_per_gpu is 1')
    for name in sorted({'feature', 'csd', 'cs'}.intersection(losses)):
        if (data_opt.get('gt_size') or 16) < 16:
            raise OptionError(
                f'train.{name}_opt', 'VGG19 needs patches of at least 16 pixels, but '
                f"datasets.train.gt_size is {data_opt['gt_size']}")
