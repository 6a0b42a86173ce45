"""Keys of an option file for CDNSRModel."""
from dataclasses import dataclass
from typing import Mapping, Optional

from ..inference.tiling import PATCH_SIZE
from ..options import OptionError, check_choice, check_number, check_path
from ..options.kinds import FLAG, Kind, choice, integer, loss, number, optional, word
from ..options.schema import RoutedValidation, block, fields_of, filled, key, kind_of
from .fast_options import PIXEL_LOSSES, FastFile, FastPaths, PrecisionTraining, check_file, check_tested, has_teacher


def check_frozen(value, where):
    """Refuses anything except one of CDNSR's two parts."""
    if (value or []) not in ([], ['branches'], ['classifier']):
        raise OptionError(where, f'accepted: [branches], [classifier] or []; got {value!r}')


def check_weights(value, where):
    """Refuses anything that cannot be weights of VGG19."""
    if value not in ('imagenet', 'random'):
        check_path(value, where)


@dataclass
class FeatureExtractor:
    """VGG19, whose features distillation compares."""
    weights: str = key('imagenet', Kind('`imagenet`, `random`, path', {'type': 'string'}, check_weights),
                       'weights of VGG19; imagenet: downloaded once, 550 MB')


@dataclass
class CDNSRTraining(PrecisionTraining):
    """How a model is trained. Each given loss NAME_opt is added to the total and logged as l_NAME, in this order."""
    compile: bool = key(False, FLAG, 'compile the branches with torch.compile')
    freeze: list = key((), Kind('[branches], [classifier], []', {'type': ['array', 'null']}, check_frozen),
                       'the part to freeze; frozen branches are not run if no loss needs their images')
    tau_min: float = key(0.4, number(0.01, 1),
                         'lowest temperature of the Gumbel mixture: max(1 - iter / total_iter, tau_min)')
    balance: str = key('warn', choice('warn', 'auto'),
                       'if routing collapses: only warn, or raise the weight of average_opt, too')
    collapse_share: float = key(0.95, number(0.01, 1), 'share of one class that counts as collapsed')
    collapse_iter: int = key(500, integer(1), 'iterations over which the share is measured')
    pixel_opt: Optional[Mapping] = key(None, loss(), 'loss between mixture and GT')
    branch_opt: Optional[Mapping] = key(None, loss(*PIXEL_LOSSES),
                                        'loss between each branch alone and GT, where it is used')
    class_opt: Optional[Mapping] = key(None, loss('ClassLoss', trains='classifier'), 'rewards confident decisions')
    average_opt: Optional[Mapping] = key(None, loss('AverageLoss', trains='classifier'),
                                         'rewards equal shares of the classes, over all processes')
    flops_opt: Optional[Mapping] = key(None, loss('FLOPsLoss', trains='classifier'),
                                       'limits the expected cost to `target`')
    label_opt: Optional[Mapping] = key(None, loss('LabelLoss', trains='classifier'),
                                       "cross entropy with the dataset's labels; fades out over `num_iter` iterations")
    error_opt: Optional[Mapping] = key(
        None, loss('ErrorLoss', trains='classifier'),
        "loss of the predicted errors of the branches, with errors measured beforehand (label --by branches) or in "
        'training; for classifiers that predict errors')
    kd_opt: Optional[Mapping] = key(None, loss('KDL1Loss', trains='branches'),
                                    'loss between images of easy branches and those of all harder ones')
    feature_opt: Optional[Mapping] = key(None, loss('FeatureDistillLoss', trains='branches'),
                                         'the same for VGG19 features')
    csd_opt: Optional[Mapping] = key(
        None, loss('CSDLoss', 'ContrastLoss', trains='branches'),
        'rewards VGG19 features of easy branches that are close to the hardest, far from other, blurred patches')
    cs_opt: Optional[Mapping] = key(None, loss('CSDLoss', 'ContrastLoss', trains='branches'),
                                    'the same for embeddings, with a projection head that is trained, too')
    feature_extractor: FeatureExtractor = key(None, block(FeatureExtractor),
                                              'VGG19 for feature_opt, csd_opt and cs_opt')


@dataclass
class CDNSRPaths(FastPaths):
    """Initial weights and states. BasicSR creates the folders."""
    pretrain_network_branches: Optional[list] = key(
        None, word('list of checkpoints', 'array'), 'for training: one for each branch; ~ for a branch without weights')


@dataclass
class Tile:
    """Tiles in validation, in tests and in `basicsr upscale -opt`, in LR pixels."""
    patch_size: int = key(PATCH_SIZE, integer(1), 'largest side of a tile')
    step: Optional[int] = key(None, optional(integer(1)), 'patch_size minus the overlap; ~: 4 less')


@dataclass
class CDNSRFile(FastFile):
    """Keys at the top of an option file."""
    tile: Tile = key(None, block(Tile), 'tiles in validation')
    path: CDNSRPaths = key(..., block(CDNSRPaths), 'initial weights')
    train: CDNSRTraining = key(None, block(CDNSRTraining), 'training; required in training')
    val: RoutedValidation = key(None, block(RoutedValidation), 'validation; required in a test')


# in the order in which they are summed and logged
LOSSES = {
    name[:-len('_opt')]: kind_of(field)
    for name, field in fields_of(CDNSRTraining).items() if name.endswith('_opt')
}
DISTILLATION_LOSSES = tuple(name for name, kind in LOSSES.items() if kind.trains == 'branches')


def check_step(tile):
    """Refuses tiles that do not touch.

    Args:
        tile (Tile): The block `tile`.

    Raises:
        OptionError: The step is larger than the tiles.
    """
    if tile.step is not None:
        check_number(tile.step, 'tile.step', 1, tile.patch_size, integer=True)


def check_options(opt, is_train):
    """Refuses what CDNSRModel cannot use, by name.

    Args:
        opt (dict): Content of the option file, whose network_g has been checked by itself.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    check_file(opt, 'CDNSR', CDNSRFile, is_train)
    net_opt = opt['network_g']
    branches, upscale = net_opt['branches'], net_opt.get('upscale', 4)
    for i, branch in enumerate(branches):
        if branch.get('upscale', upscale) != upscale:
            raise OptionError(f'network_g.branches[{i}].upscale', f'must be {upscale} like network_g.upscale')
        if is_train and branch['type'] == 'Spandrel':
            raise OptionError(
                f'network_g.branches[{i}].type', 'Spandrel networks are not trained as branches; basicsr '
                'route combines them without training')
    check_choice(net_opt.get('mixture', 'gumbel'), 'network_g.mixture', ['gumbel', 'softmax'])
    check_step(filled(Tile, opt.get('tile')))

    paths = opt['path'].get('pretrain_network_branches')
    if paths is not None and (not isinstance(paths, list) or len(paths) != len(branches)):
        raise OptionError('path.pretrain_network_branches', f'expected a list of {len(branches)} checkpoints, one '
                          f'per branch, but got {paths!r}')
    if paths and not is_train:
        raise OptionError('path.pretrain_network_branches', 'is for training; name the trained CDNSR with '
                          'pretrain_network_g')
    if is_train:
        check_training(opt)
    else:
        check_tested(opt)


def check_training(opt):
    """Refuses what CDNSRModel cannot be trained with.

    Args:
        opt (dict): Content of the option file, otherwise checked.

    Raises:
        OptionError: For the first mistake found.
    """
    train_opt, data_opt = opt['train'], opt['datasets'].get('train') or {}
    freeze = train_opt.get('freeze') or []
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
    if 'error' in losses and opt['network_g']['classifier'].get('reference', 'gt') != 'gt':
        raise OptionError(
            'train.error_opt', 'trains on errors relative to the ground truth, but '
            f"network_g.classifier.reference is {opt['network_g']['classifier']['reference']}; "
            'basicsr route trains such routers')
    for name in losses:
        trained = LOSSES[name].trains
        if [trained] == freeze:
            raise OptionError(f'train.{name}_opt', f'trains the {trained} only, but train.freeze freezes them')
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
