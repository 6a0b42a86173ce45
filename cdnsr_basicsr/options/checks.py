"""Checks an option file, block by block, before BasicSR reads it."""
from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import re
from typing import Any, Callable, Iterable, Mapping, Optional

from . import schema, stock
from .kinds import FLAG, whole
from .networks import check_argument, check_arguments, check_network, find_registered, find_type, of_basicsr_or_ours
from .values import OptionError, check_choice, check_keys, check_number, check_path, one_line, shown

# more is no learning rate at all; what is too large for a network shows when its losses are no longer finite
MAX_LR = 1e6


def tried(where: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what BasicSR is going to call; an error becomes one of the option."""
    try:
        return function(*args, **kwargs)
    except OptionError:
        raise
    except Exception as error:  # has no common type
        raise OptionError(where, f'{type(error).__name__}: {one_line(error)}') from error


def names_in(target: Any) -> set[str]:
    """The names of a class and of those that it is made from."""
    return {parent.__name__ for parent in inspect.getmro(target)}


def bare_model(model: Any, **attributes: Any) -> Any:
    """A model without networks, to ask its methods what they accept."""
    instance = object.__new__(model)
    vars(instance).update(attributes)
    return instance


def check_known(model: Any, block: Mapping[str, Any], where: str, accepted: Iterable[str]) -> None:
    """Refuses keys that one of BasicSR's models, in the version at hand, does not read. Others are left to them."""
    if model.__module__.split('.')[0] != 'basicsr':
        return
    source = ''.join(inspect.getsource(parent) for parent in inspect.getmro(model)[:-1])
    read = set(re.findall(r"opt(?:\['train'\])?(?:\.get\(|\[)'(\w+)'", source))
    check_keys(block, (read | set(accepted)) & (set(block) | set(accepted)), where)


def check_optimizer(model: Any, block: Any, where: str) -> Any:
    """Checks the block of an optimizer against the model and torch's constructor.

    Returns:
        Such an optimizer of a single weight.
    """
    import torch
    check_keys(block, block, where, ('type', 'lr'))
    weights = [torch.nn.Parameter(torch.zeros(1))]

    def known(name: Any) -> tuple[bool, Any]:
        """Whether the model takes this type, and its class, if that can be found out."""
        try:
            return True, type(bare_model(model).get_optimizer(name, weights, lr=0.1))
        except NotImplementedError:
            return False, None
        except Exception:  # it is known, and asks for more
            return True, getattr(torch.optim, str(name), None)

    if not isinstance(block['type'], str) or not known(block['type'])[0]:
        check_choice(block['type'], f'{where}.type', (name for name in stock.OPTIMIZERS if known(name)[0]))
    target = known(block['type'])[1]
    if target is not None:
        check_arguments(target, block, where, taken=('params', ))
    check_number(block['lr'], f'{where}.lr', 0, MAX_LR)
    schema.check_values(block, stock.OPTIMIZER, where)
    for key, value in block.items():
        if key not in ('type', 'lr', *stock.OPTIMIZER) and target is not None and value is not None:
            default = inspect.signature(target).parameters[key].default
            if isinstance(default, bool) or default is None:
                FLAG.check(value, f'{where}.{key}')
    options = {key: value for key, value in block.items() if key != 'type'}
    return tried(where, bare_model(model).get_optimizer, block['type'], weights, **copy.deepcopy(options))


def check_scheduler(model: Any, block: Any, optimizer: Any, total: float, lr: float) -> None:
    """Checks train.scheduler: also that its last period does not end before the training does.

    Args:
        model: The model's class.
        block: The scheduler's block.
        optimizer: A small one, to try it with.
        total: Iterations of the training.
        lr: The largest learning rate of the optimizers.
    """
    from basicsr.models import lr_scheduler
    where = 'train.scheduler'
    check_keys(block, block, where, ('type', ))
    name = block['type']
    if of_basicsr_or_ours(model):
        check_choice(name, f'{where}.type', stock.SCHEDULERS)
    if name not in stock.SCHEDULERS:
        return
    target = getattr(lr_scheduler, name.replace('MultiStepLR', 'MultiStepRestartLR'))
    check_arguments(target, block, where, taken=('optimizer', ))
    schema.check_values(block, stock.SCHEDULE, where)
    count = len(block.get('periods', block.get('restarts', [0])))
    if len(block.get('restart_weights', [1])) != count:
        raise OptionError(
            f'{where}.restart_weights', f'expected a weight for each of {count}, but got '
            f"{shown(block.get('restart_weights', [1]))}")
    check_number(block.get('eta_min', 0), f'{where}.eta_min', 0, lr or MAX_LR)
    if 'periods' in block and sum(block['periods']) < total:
        raise OptionError(f'{where}.periods', f"end at iteration {sum(block['periods'])}, before total_iter {total}")
    probe = bare_model(model, opt=dict(train=dict(scheduler=dict(block))), optimizers=[optimizer], schedulers=[])
    tried(where, probe.setup_schedulers)


def check_loss(block: Any, where: str) -> None:
    """Checks a loss block against the loss's constructor."""
    from basicsr.utils.registry import LOSS_REGISTRY
    target = find_type(LOSS_REGISTRY, block, where)
    check_arguments(target, block, where)
    parameters, known = inspect.signature(target).parameters, of_basicsr_or_ours(target)
    for key, value in block.items():
        place = f'{where}.{key}'
        if key == 'type' or key not in parameters:
            continue
        default = parameters[key].default
        if known and key in stock.LOSS:
            stock.LOSS[key].check(value, place)
        elif key == 'layer_weights' and known:
            check_layers(value, place, block.get('vgg_type', 'vgg19'), default is None)
        elif known and key.endswith('weight'):
            check_number(value, place, 0, stock.MAX_WEIGHT)
        elif default is None and known and value is not None:
            whole(1).check(value, place)
        elif default is not None or not known:
            check_argument(value, default, place, known)


def check_layers(value: Any, where: str, vgg_type: str, optional: bool) -> None:
    """Refuses what does not weight layers of a VGG."""
    from basicsr.archs.vgg_arch import NAMES
    if value is None and optional:
        return
    check_keys(value, NAMES[vgg_type.split('_')[0]], where)
    for layer, weight in value.items():
        check_number(weight, f'{where}.{layer}', 0, stock.MAX_WEIGHT)
    if not value:
        raise OptionError(where, 'names no layer')


def check_metrics(model: Any, metrics: Any, datasets: Mapping[str, Any]) -> None:
    """Checks val.metrics: what would fail at the first validation, too."""
    from basicsr.utils.registry import DATASET_REGISTRY, METRIC_REGISTRY
    if metrics is None:
        return
    check_keys(metrics, metrics, 'val.metrics')
    for name, block in metrics.items():
        where = f'val.metrics.{name}'
        if not isinstance(name, str):
            raise OptionError(where, 'expected a word as the name of a metric')
        metric = find_type(METRIC_REGISTRY, block, where)
        arguments = {key: value for key, value in block.items() if key != 'better'}
        check_arguments(metric, arguments, where, taken=('img', 'img2'))
        parameters = inspect.signature(metric).parameters
        if of_basicsr_or_ours(metric):
            check_keys(arguments, ('type', 'better', *(set(parameters) - {'img', 'img2', 'kwargs'})), where)
        schema.check_values(block, stock.METRIC, where)
        if of_basicsr_or_ours(metric) and of_basicsr_or_ours(model):
            if block['type'].endswith('_pt'):
                raise OptionError(
                    f'{where}.type', f"{block['type']} compares tensors, but models pass images; "
                    f"accepted: {block['type'][:-3]}")
            schema.check_values(block, stock.METRIC_OF_IMAGES, where)
        for key, data in datasets.items():
            without = data.get('dataroot_gt') is None or 'SingleImageDataset' in names_in(
                find_type(DATASET_REGISTRY, data, f'datasets.{key}'))
            if not str(key).startswith('train') and 'img2' in parameters and without:
                raise OptionError(where, f"compares with GT, but datasets.{key}, a {data['type']}, has none")


def check_validation(model: Any, block: Any, is_train: bool, datasets: Mapping[str, Any]) -> None:
    """Checks the block `val`."""
    known = of_basicsr_or_ours(model) and not hasattr(model, 'check_options')  # which knows its own keys
    required = ('save_img', 'val_freq') if is_train else ('save_img', )
    if not is_train and isinstance(block, Mapping) and block.get('save_img'):
        required = ('save_img', 'suffix')
    check_keys(block, stock.VAL_KEYS if known else block, 'val', required)
    schema.check_block(schema.RoutedValidation, block, 'val', others=True)
    schema.check_values(block, stock.VAL, 'val')
    check_metrics(model, block.get('metrics'), datasets)


def check_logger(block: Any) -> None:
    """Checks the block `logger`."""
    schema.check_block(schema.Logger, block, 'logger', schema.required_in(schema.Logger))
    wandb = block.get('wandb') or {}
    if wandb.get('project') is not None:
        if not block['use_tb_logger']:
            raise OptionError('logger.wandb.project', 'needs logger.use_tb_logger: true, whose values it copies')
        if importlib.util.find_spec('wandb') is None:
            raise OptionError('logger.wandb.project', 'needs the package wandb: pip install wandb')


def check_paths(model: Any, block: Any, networks: Iterable[str]) -> None:
    """Checks the block `path`, except whether checkpoints can be found.

    Args:
        model: The model's class.
        block: The block.
        networks: Names of the networks: g, d ...
    """
    check_keys(block, block, 'path')
    if 'pretrain_model_g' in block:
        raise OptionError('path.pretrain_model_g', 'is an old name that is no longer read; use pretrain_network_g')
    names = [f'{key}_{name}' for name in networks for key in ('pretrain_network', 'param_key', 'strict_load')]
    check_known(model, block, 'path', (*stock.PATH_KEYS, *names))
    for key, value in block.items():
        where = f'path.{key}'
        if str(key).startswith('strict_load'):
            FLAG.check(value, where)
        elif str(key).startswith('param_key'):
            schema.KEY_OF_WEIGHTS.check(value, where)
    schema.check_block(schema.Paths, block, 'path', others=True)


def check_training(model: Any, opt: Mapping[str, Any]) -> None:
    """Checks the block `train`; unknown keys are left to the models of others."""
    from basicsr.models.sr_model import SRModel
    block = opt['train']
    schema.check_block(schema.Training, block, 'train', schema.required_in(schema.Training), others=True)
    check_known(model, block, 'train', stock.TRAIN_KEYS)
    for key, value in block.items():
        if str(key).endswith('_opt') and value is not None:
            check_loss(value, f'train.{key}')
    schema.check_values(block, stock.TRAIN, 'train')
    if block.get('ema_decay') == 1:
        raise OptionError('train.ema_decay', '1 would keep the first weights forever; expected less, such as 0.999')
    if model.init_training_settings is SRModel.init_training_settings:
        if not block.get('pixel_opt') and not block.get('perceptual_opt'):
            raise OptionError('train.pixel_opt', 'a loss is needed: pixel_opt or perceptual_opt')
    if of_basicsr_or_ours(model) and names_in(model) & set(stock.GAN_MODELS):
        if opt.get('network_d') is None:
            raise OptionError('network_d', f"is missing from the option file; {opt['model_type']} needs it")
        check_keys(block, block, 'train', ('optim_d', 'gan_opt'))
    optimizers = {key: value for key, value in block.items() if str(key).startswith('optim_')}
    tried_out = {key: check_optimizer(model, value, f'train.{key}') for key, value in optimizers.items()}
    lr = max(value['lr'] for value in optimizers.values())
    check_scheduler(model, block['scheduler'], tried_out['optim_g'], block['total_iter'], lr)


def check_loader(block: Mapping[str, Any], where: str, trained: bool) -> None:
    """Checks how many images a dataset hands over, by how many workers."""
    schema.check_block(
        schema.AnyData, block, where, ('batch_size_per_gpu', 'num_worker_per_gpu') if trained else (), others=True)
    if block.get('persistent_workers') and not (trained and block['num_worker_per_gpu']):
        raise OptionError(f'{where}.persistent_workers', 'needs num_worker_per_gpu of at least 1, in training')
    if block.get('prefetch_mode') == 'cuda' and block.get('pin_memory') is False:
        raise OptionError(f'{where}.pin_memory', 'must be true with prefetch_mode: cuda')


def check_backend(block: Any, where: str) -> None:
    """Checks an io_backend."""
    check_keys(block, block, where, ('type', ))
    check_choice(block['type'], f'{where}.type', stock.BACKENDS)
    check_keys(block, ('type', *stock.BACKENDS[block['type']]), where)
    schema.check_values(block, dict.fromkeys(('readonly', 'lock', 'readahead'), FLAG), where)
    if block['type'] == 'memcached' and importlib.util.find_spec('mc') is None:
        raise OptionError(f'{where}.type', 'memcached needs the package mc; accepted: disk, lmdb')


def check_dataset(block: Any, where: str, opt: Mapping[str, Any]) -> None:
    """Checks a dataset block: type, values, folders, and the dataset's own check if it has one."""
    from basicsr.utils.registry import DATASET_REGISTRY
    dataset, trained = find_type(DATASET_REGISTRY, block, where), where == 'datasets.train'
    check_keys(block, block, where, ('name', ))
    for key in block:
        if not isinstance(key, str):
            raise OptionError(f'{where}.{key}', 'expected a word as a key')
    check_loader(block, where, trained)
    if of_basicsr_or_ours(dataset):
        schema.check_block(schema.PairedData, block, where, others=True)
        schema.check_values(block, stock.DATASET, where)
        if (block.get('mean') is None) != (block.get('std') is None):
            raise OptionError(where, 'mean and std must be given together; one of them is missing')
    if hasattr(dataset, 'check_options'):
        dataset.check_options(block, where)
    if dataset.__module__.startswith('basicsr.'):
        check_keys(block, stock.DATASET_KEYS, where, ('io_backend', ))
    if of_basicsr_or_ours(dataset):
        given = {**getattr(dataset, 'defaults', {}), **block}
        for name in names_in(dataset) & set(stock.NEEDED):
            always, in_training = stock.NEEDED[name]
            check_keys(given, given, where, (*always, *(in_training if trained else ())))
            for key in ('gt_size', 'dataroot_gt', 'dataroot_lq', 'meta_info_file'):
                if key in (*always, *in_training) and block.get(key) is None and (trained or key != 'gt_size'):
                    raise OptionError(f'{where}.{key}', 'is empty')
            if 'gt_size' in (*always, *in_training) or 'PairedImageDataset' == name:
                if opt.get('scale') is None:
                    raise OptionError('scale', f"is missing from the option file; {block['type']} needs it")
    if 'io_backend' in block:
        check_backend(block['io_backend'], f'{where}.io_backend')
    for key in ('dataroot_gt', 'dataroot_lq', 'dataroot_flow', 'meta_info_file', 'meta_info'):
        path = block.get(key)
        if path is not None:
            if isinstance(path, list) and not of_basicsr_or_ours(dataset):
                continue  # several folders, as other plugins have them
            check_path(path, f'{where}.{key}')
            if os.path.isdir(os.path.expanduser(path)) and not os.listdir(os.path.expanduser(path)):
                raise OptionError(f'{where}.{key}', f'is an empty folder: {path}')


def check_datasets(datasets: Any, is_train: bool, opt: Mapping[str, Any]) -> None:
    """Checks the block `datasets`."""
    check_keys(datasets, datasets, 'datasets')
    phases = ('train', 'val') if is_train else ('val', 'test')
    for name, block in datasets.items():
        phase = name.split('_')[0] if isinstance(name, str) else ''
        if phase not in phases or (phase == 'train' and name != 'train'):
            accepted = 'train, val, val_2 ...' if is_train else 'test, test_1, test_2 ..., val'
            raise OptionError(f'datasets.{name}', f'unknown key; accepted: {accepted}')
        check_dataset(block, f'datasets.{name}', opt)
    if not datasets or (is_train and 'train' not in datasets):
        raise OptionError(f'datasets.{phases[0] if is_train else "test"}', 'is missing from the option file')


def check_head(opt: Mapping[str, Any], required: Iterable[str]) -> None:
    """Checks what stands at the top of an option file."""
    for key in required:
        if opt.get(key) is None:
            raise OptionError(key, 'is missing from the option file')
    schema.check_block(schema.Head, opt, schema.TOP, others=True)


def check_options(opt: dict[str, Any], is_train: bool) -> None:
    """Checks an option file before BasicSR reads it: keys, types and values of all blocks that are known here.

    A model or dataset class may bring its own check as a static method ``check_options``. Unknown keys in blocks of
    models of other plugins, and in `train` of BasicSR's, are left to them. Whether networks to start from can be found,
    and what the images are, is not asked here.

    Args:
        opt: Content of the option file.
        is_train: Whether it is about to be trained (otherwise tested).

    Raises:
        OptionError: For the first mistake found.
    """
    from basicsr.utils.registry import MODEL_REGISTRY

    needed = ('name', 'model_type', 'num_gpu', 'datasets', 'path')
    check_head(opt, needed + (('train', 'logger') if is_train else ('val', )))
    model = find_registered(MODEL_REGISTRY, opt['model_type'], 'model_type')
    for key in ('datasets', 'path', 'train', 'logger', 'val'):
        if opt.get(key) is not None:
            check_keys(opt[key], opt[key], key)

    if of_basicsr_or_ours(model) and opt.get('network_g') is None:
        raise OptionError('network_g', 'is missing from the option file')
    networks = {key: block for key, block in opt.items() if str(key).startswith('network_')}
    check_known(model, opt, 'option file', (*stock.HEAD_KEYS, *networks))
    for key, block in networks.items():
        check_network(block, key)
    if names_in(model) & {'RealESRGANModel', 'RealESRNetModel'}:
        if is_train and opt.get('high_order_degradation', True):
            check_keys(opt, opt, 'option file', stock.DEGRADATION)
        schema.check_values(opt, stock.REAL, schema.TOP)
    if is_train:
        check_training(model, opt)
        check_logger(opt['logger'])
    check_datasets(opt['datasets'], is_train, opt)
    if opt.get('val') is not None:
        check_validation(model, opt['val'], is_train, opt['datasets'])
    check_paths(model, opt['path'], [key[len('network_'):] for key in opt if str(key).startswith('network_')])
    if hasattr(model, 'check_options'):
        model.check_options(opt, is_train)


def check_model_of_cdnsr(opt: Mapping[str, Any], is_train: bool) -> Optional[str]:
    """Looks whether CDNSR is trained or tested by another model than its own.

    Returns:
        What is then missing, to be said; None if nothing is.

    Raises:
        OptionError: The model cannot train it.
    """
    net, model = opt.get('network_g'), opt['model_type']
    if not isinstance(net, Mapping) or net.get('type') != 'CDNSR' or model == 'CDNSRModel':
        return None
    classifier = net.get('classifier')
    kind = classifier.get('type') if isinstance(classifier, Mapping) else None
    if is_train and kind in ('ErrorMap', 'ErrorPredictor'):
        raise OptionError(
            'model_type', f'{model} cannot train an {kind}, to which only errors have a gradient '
            '(train.error_opt); use CDNSRModel')
    missing = ['annealing of tau'] * is_train + ['tiles in validation, so that an image has one class as a whole']
    if is_train and model not in ('FastSRModel', 'ETDSModel', 'FastRealESRNetModel'):
        missing.append('the description of the network in checkpoints')
    return f'model_type {model} with CDNSR lacks {"; ".join(missing)}. CDNSRModel has all of it.'
