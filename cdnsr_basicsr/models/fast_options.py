"""What an option file for FastSRModel may hold, and what those of the other models have in common with it."""
from dataclasses import dataclass
from typing import Mapping, Optional

from ..inference.network import PRECISIONS
from ..options import OptionError
from ..options.kinds import FLAG, choice, loss, optional, typed
from ..options.schema import CHECKPOINT, TOP, NetworkPaths, OptionFile, Training, block, check_block, key

PIXEL_LOSSES = ('L1Loss', 'MSELoss', 'CharbonnierLoss')


@dataclass
class PrecisionTraining(Training):
    """How a model is trained."""
    precision: str = key('float32', choice(*PRECISIONS),
                         'precision of the networks, by autocast; float16 with loss scaling')
    channels_last: bool = key(True, FLAG, 'train in the memory layout channels last')


@dataclass
class SingleTraining(PrecisionTraining):
    """How a model is trained."""
    pixel_opt: Mapping = key(..., loss(), 'loss between image and GT')
    teacher_opt: Optional[Mapping] = key(None, loss(*PIXEL_LOSSES), "loss between image and teacher's image")


@dataclass
class FastPaths(NetworkPaths):
    """Initial weights and states. BasicSR creates the folders."""
    pretrain_network_t: Optional[str] = key(None, CHECKPOINT, 'weights of network_t')
    strict_load_t: bool = key(True, FLAG, 'refuse missing and additional weights')


@dataclass
class FastFile(OptionFile):
    """Keys at the top of an option file."""
    network_t: Optional[Mapping] = key(
        None, optional(typed('block: type, and arguments of the network')),
        'a teacher, unless datasets.train.dataroot_teacher has its outputs for the patches')
    path: FastPaths = key(..., block(FastPaths), 'initial weights')
    train: SingleTraining = key(None, block(SingleTraining), 'training; required in training')


def check_file(opt, arch, struct, is_train):
    """Refuses a network of another type or scale than the model's, unknown keys and wrong values.

    Args:
        opt (dict): Content of the option file.
        arch (str | None): Type of the network, whose model is called <arch>Model; None accepts any.
        struct (type): Dataclass of the file.
        is_train (bool): Whether it is about to be trained; otherwise, blocks for training are ignored.

    Raises:
        OptionError: For the first mistake found.
    """
    net_opt = opt.get('network_g', {})
    if arch is not None and net_opt.get('type') != arch:
        raise OptionError('network_g.type', f"{arch}Model needs type {arch}, but got {net_opt.get('type')!r}")
    upscale = net_opt.get('upscale', 4 if arch else opt.get('scale'))
    if opt.get('scale') != upscale:
        raise OptionError('scale', f"is {opt.get('scale')!r}, but network_g.upscale is {upscale!r}")
    check_block(struct, opt if is_train else {name: opt[name] for name in opt if name != 'train'}, TOP)


def check_tested(opt):
    """Refuses to test a network without weights.

    Args:
        opt (dict): Content of the option file.

    Raises:
        OptionError: It names none.
    """
    if not opt['path'].get('pretrain_network_g'):
        raise OptionError('path.pretrain_network_g', 'is needed for a test: a checkpoint, or the name of a model')


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
        raise OptionError('datasets.train.dataroot_teacher', 'expected one teacher: this, or network_t')
    return network or outputs


def check_training(opt):
    """Refuses a training of a single network without a pixel loss, and half a teacher: one without a loss that compares
    with it, or such a loss alone.

    Args:
        opt (dict): Content of the option file of a training.

    Raises:
        OptionError: For the first mistake found.
    """
    if not opt['train'].get('pixel_opt'):
        raise OptionError('train.pixel_opt', 'a pixel loss is needed')
    loss_opt = opt['train'].get('teacher_opt')
    if has_teacher(opt) != bool(loss_opt):
        raise OptionError(
            'train.teacher_opt', 'requires a teacher, network_t and path.pretrain_network_t or '
            'datasets.train.dataroot_teacher, and the reverse')


def check_options(opt, is_train, arch=None, struct=FastFile):
    """Refuses what FastSRModel, or a model of its kind, cannot use, by name.

    Args:
        opt (dict): Content of the option file.
        is_train (bool): Whether it is about to be trained.
        arch (str | None): Type of the network, whose model is called <arch>Model; None accepts any. Default: None.
        struct (type): Dataclass of the file. Default: FastFile.

    Raises:
        OptionError: For the first mistake found.
    """
    check_file(opt, arch, struct, is_train)
    if is_train:
        check_training(opt)
    else:
        check_tested(opt)
