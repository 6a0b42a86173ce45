"""Keys of an option file for PCSRModel."""
from dataclasses import dataclass
from typing import Mapping, Optional

from ..inference.pixel_upscaler import PATCH_SIZE
from ..options import OptionError, check_choice, check_number, check_routing
from ..options.kinds import Kind, choice, integer, loss, optional
from ..options.schema import NetworkPaths, OptionFile, RoutedValidation, Routing, Training, block, filled, key
from .cdnsr_options import check_step
from .fast_options import PrecisionTraining, check_file, check_tested


def check_frozen(value, where):
    """Refuses anything except parts that phase 1 can freeze."""
    if value is not None and (not isinstance(value, list) or not set(value) <= {'backbone', 'heavy'}):
        raise OptionError(where, f'accepted: [backbone, heavy], one of them or []; got {value!r}')


@dataclass
class PCSRTraining(Training):
    """How a model is trained."""
    # as in the other models, but no keys
    precision, channels_last = PrecisionTraining.precision, PrecisionTraining.channels_last
    phase: int = key(
        1, choice(0, 1),
        '0: train backbone and heavy sampler only, without the others. 1: train the mixture of both samplers')
    freeze: list = key((), Kind('[backbone, heavy], one of them, []', {'type': ['array', 'null']}, check_frozen),
                       'parts to freeze in phase 1')
    pixel_opt: Mapping = key(..., loss(), 'loss between image and GT')
    average_opt: Optional[Mapping] = key(None, loss('AverageLoss'), 'rewards equal shares of the samplers, in phase 1')


@dataclass
class PCSRTile:
    """Tiles in validation, in tests and in `basicsr upscale -opt`, in LR pixels."""
    patch_size: int = key(PATCH_SIZE, integer(8), 'largest side of a tile')
    step: Optional[int] = key(None, optional(integer(1)), 'patch_size minus the overlap; ~: 12 less')


@dataclass
class PCSRFile(OptionFile):
    """Keys at the top of an option file."""
    routing: Routing = key(None, block(Routing), 'how pixels are routed in validation')
    tile: PCSRTile = key(None, block(PCSRTile), 'tiles in validation')
    path: NetworkPaths = key(..., block(NetworkPaths), 'initial weights')
    train: PCSRTraining = key(None, block(PCSRTraining), 'training; required in training')
    val: RoutedValidation = key(None, block(RoutedValidation), 'validation; required in a test')


def check_options(opt, is_train):
    """Refuses what PCSRModel cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.

    Raises:
        OptionError: For the first mistake found.
    """
    check_file(opt, 'PCSR', PCSRFile, is_train)
    net_opt = opt['network_g']
    check_number(net_opt.get('upscale', 4), 'network_g.upscale', 1)
    check_choice(net_opt.get('phase', 1), 'network_g.phase', [0, 1])
    for name in ('light', 'heavy', 'classifier'):
        widths = net_opt.get(name, [])
        if not isinstance(widths, list):
            raise OptionError(f'network_g.{name}', f'expected a list of widths of layers, but got {widths!r}')
        for width in widths:
            check_number(width, f'network_g.{name}', 1, integer=True)

    check_step(filled(PCSRTile, opt.get('tile')))
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
    train_opt = filled(PCSRTraining, opt['train'])
    phase, freeze = train_opt.phase, train_opt.freeze
    if opt['network_g'].get('phase', phase) != phase:
        raise OptionError('network_g.phase', f"is {opt['network_g']['phase']}, but train.phase is {phase}")
    if not opt['train'].get('pixel_opt'):
        raise OptionError('train.pixel_opt', 'a pixel loss is needed')
    if phase == 0 and (train_opt.average_opt or freeze):
        raise OptionError('train.phase', '0 trains backbone and heavy sampler alone, without average_opt and freeze')
    if freeze and not any(opt['path'].get(key) for key in ('pretrain_network_g', 'resume_state')):
        raise OptionError('train.freeze', f'{freeze[0]} without weights would stay random; name them at path')
