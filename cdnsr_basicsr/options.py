"""Reading option files and refusing wrong ones with one clear line."""
from __future__ import annotations

import inspect
import os
import re
import yaml
from typing import Any, Iterable, Mapping, Optional


class OptionError(ValueError):
    """A mistake in an option file or on the command line.

    Args:
        key: Where: the option's path (``train.freeze``), a file or a command line flag.
        message: What is wrong and what is accepted.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f'{key}: {message}')


def one_line(error: BaseException) -> str:
    """What an error says, short and without line breaks."""
    return ' '.join(str(error).split())[:300]


class OptionLoader(yaml.SafeLoader):
    """YAML loader that builds plain data only and reads ``2e-4`` as a number, as YAML 1.2 does."""

    def construct_mapping_once(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == 'tag:yaml.org,2002:merge':
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key {key!r} stands twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


OptionLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
                             lambda loader, node: loader.construct_mapping_once(node, deep=True))
OptionLoader.add_implicit_resolver('tag:yaml.org,2002:float', re.compile(r'^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$'),
                                   list('-+0123456789'))


def read_options(path: str) -> dict:
    """Reads an option file without running anything that stands in it.

    Args:
        path: YAML file.

    Raises:
        OptionError: The file is missing, is no YAML mapping, or holds a tag other than YAML's own (such as
            ``!!python/object/apply``, which BasicSR's loader would execute).
    """
    try:
        with open(path, encoding='utf-8') as file:
            opt = yaml.load(file, Loader=OptionLoader)
    except FileNotFoundError:
        raise OptionError(path, 'no such option file') from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(path, f'cannot be read: {error}') from None
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else '?'
        raise OptionError(path,
                          f'line {line}: {error.problem}; accepted are plain values, lists and mappings') from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(path, f'not valid YAML: {" ".join(str(error).split())}') from None
    if not isinstance(opt, dict):
        raise OptionError(path, f'expected a mapping of options, but got {type(opt).__name__}')
    return opt


def parse_force_yml(entry: str) -> tuple[list[str], Any]:
    """Splits one ``--force_yml`` entry, ``key:sub=value``, into its keys and its value.

    Raises:
        OptionError: The entry has another form. BasicSR pastes the keys into code that it executes.
    """
    match = re.fullmatch(r'\s*([A-Za-z0-9_.-]+(?::[A-Za-z0-9_.-]+)*)\s*=([^=]*)', entry)
    if match is None:
        raise OptionError(f'--force_yml {entry}', 'accepted is key:sub=value, for example train:ema_decay=0.999')
    return match.group(1).split(':'), force_yml_value(match.group(2).strip())


def force_yml_value(text: str) -> Any:
    """The value of a ``--force_yml`` entry: a YAML scalar or list; ``None``, ``True`` and ``False`` in any case."""
    if text.lower() == 'none':
        return None
    try:
        return yaml.load(text, Loader=OptionLoader)
    except yaml.YAMLError:
        raise OptionError(f'--force_yml ...={text}', 'the value is no YAML scalar or list') from None


def apply_force_yml(opt: dict, entries: Iterable[str]) -> None:
    """Sets ``--force_yml`` entries in ``opt``, in place. A last key may be new, the way to it must exist."""
    for entry in entries:
        keys, value = parse_force_yml(entry)
        block = opt
        for key in keys[:-1]:
            if not isinstance(block.get(key), dict):
                blocks = ', '.join(str(name) for name, sub in block.items() if isinstance(sub, dict))
                raise OptionError(f'--force_yml {entry}', f'{key!r} is no block of the option file; accepted: {blocks}')
            block = block[key]
        block[keys[-1]] = value


def check_keys(block: Any, accepted: Iterable[str], where: str, required: Iterable[str] = ()) -> None:
    """Refuses unknown and missing keys of one option block.

    Raises:
        OptionError: With the place, the key and what is accepted.
    """
    if not isinstance(block, Mapping):
        raise OptionError(where, f'expected a block of options, but got {block!r}')
    accepted = list(accepted)
    for key in block:
        if key not in accepted:
            raise OptionError(f'{where}.{key}', f'unknown key; accepted: {", ".join(sorted(accepted))}')
    for key in required:
        if key not in block:
            raise OptionError(where, f'key {key!r} is missing')


def check_number(value: Any, where: str, low: float, high: Optional[float] = None, integer: bool = False) -> None:
    """Refuses a value that is no number (an integer, if asked for) in [low, high]."""
    kinds = (int, ) if integer else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        span = f'at least {low}' if high is None else f'from {low} to {high}'
        raise OptionError(where, f'expected {"an integer" if integer else "a number"} {span}, but got {value!r}')


def check_choice(value: Any, where: str, accepted: Iterable[Any]) -> None:
    """Refuses a value that is none of those accepted."""
    accepted = list(accepted)
    if value not in accepted:
        raise OptionError(where, f'accepted: {", ".join(str(item) for item in accepted)}; got {value!r}')


def check_routing(block: Any, where: str) -> None:
    """Refuses what does not say how PCSR routes pixels."""
    check_keys(block, ('k', 'adaptive', 'refinement', 'budget'), where)
    check_number(block.get('k', 0), f'{where}.k', float('-inf'))
    for key in ('adaptive', 'refinement'):
        check_choice(block.get(key, False), f'{where}.{key}', [True, False])
    if block.get('budget') is not None:
        check_number(block['budget'], f'{where}.budget', 0)
        if block.get('k') or block.get('adaptive'):
            raise OptionError(f'{where}.budget', 'replaces k and adaptive; give one of them')


def read_routing(path: str) -> dict:
    """How an option file says that PCSR routes pixels; empty if it does not."""
    routing = read_options(path).get('routing')
    if routing:
        check_routing(routing, f'{path}: routing')
    return routing or {}


def find_registered(registry: Any, name: Any, where: str) -> Any:
    """The class or function of this name in one of BasicSR's registries."""
    for candidate in (name, f'{name}_basicsr'):
        if candidate in registry:
            return registry.get(candidate)
    raise OptionError(where, f'unknown type {name!r}; accepted: {", ".join(sorted(registry.keys()))}')


def find_type(registry: Any, block: Any, where: str) -> Any:
    """The class or function that a block's `type` names."""
    if not isinstance(block, Mapping) or 'type' not in block:
        raise OptionError(where, "expected a block of options with a key 'type'")
    return find_registered(registry, block['type'], f'{where}.type')


def check_arguments(target: Any, block: Mapping, where: str, given: Iterable[str] = ()) -> None:
    """Compares a block's keys with the arguments of what it builds.

    Args:
        target: Class or function to be called with the block's values.
        block: Option block; its ``type`` is left out.
        where: The block's place, for messages.
        given: Arguments that the caller adds by itself.
    """
    parameters = list(inspect.signature(target).parameters.values())
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    required = {parameter.name for parameter in named if parameter.default is parameter.empty} - set(given)
    arguments = {key: value for key, value in block.items() if key != 'type'}
    accepted = {parameter.name for parameter in named} | (set(arguments) if len(named) < len(parameters) else set())
    check_keys(arguments, accepted, where, sorted(required))


def check_network(block: Any, where: str) -> None:
    """Checks a network block and the networks inside it (branches, classifier) against their constructors."""
    from basicsr.utils.registry import ARCH_REGISTRY
    given = ('num_classes', ) if where.endswith('.classifier') else ()
    check_arguments(find_type(ARCH_REGISTRY, block, where), block, where, given)
    if block['type'] == 'SwinIR':
        check_windows(block, where)
    for key, value in block.items():
        if isinstance(value, Mapping) and 'type' in value:
            check_network(value, f'{where}.{key}')
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    check_network(item, f'{where}.{key}[{index}]')


def check_windows(block: Mapping, where: str) -> None:
    """Refuses a SwinIR that BasicSR cannot build: its defaults, 64 and 7, do not fit together."""
    size, window = block.get('img_size', 64), block.get('window_size', 7)
    check_number(window, f'{where}.window_size', 1, integer=True)
    for side in size if isinstance(size, (list, tuple)) else [size]:
        check_number(side, f'{where}.img_size', 1, integer=True)
        if side > window and side % window:
            raise OptionError(
                f'{where}.img_size', f'expected a multiple of window_size, {window}, such as '
                f'{side // window * window}, but got {size}')


def check_loss(block: Any, where: str) -> None:
    """Checks a loss block against the loss's constructor."""
    from basicsr.utils.registry import LOSS_REGISTRY
    check_arguments(find_type(LOSS_REGISTRY, block, where), block, where)


def check_path(value: Any, where: str) -> None:
    """Refuses a path that does not exist."""
    if not isinstance(value, str):
        raise OptionError(where, f'expected a path, but got {value!r}')
    if not os.path.exists(os.path.expanduser(value)):
        raise OptionError(where, f'no such file or folder: {value}')


def check_dataset(block: Any, where: str) -> None:
    """Checks a dataset block: type, folders, and the dataset's own check if it has one."""
    from basicsr.utils.registry import DATASET_REGISTRY
    dataset = find_type(DATASET_REGISTRY, block, where)
    training = ('batch_size_per_gpu', 'num_worker_per_gpu') if where == 'datasets.train' else ()
    check_keys(block, block, where, ('name', *training))
    for key in training:
        check_number(block[key], f'{where}.{key}', int(key == 'batch_size_per_gpu'), integer=True)
    for key in ('dataroot_gt', 'dataroot_lq', 'meta_info_file'):
        path = block.get(key)
        if isinstance(path, str):
            check_path(path, f'{where}.{key}')
            if os.path.isdir(os.path.expanduser(path)) and not os.listdir(os.path.expanduser(path)):
                raise OptionError(f'{where}.{key}', f'is an empty folder: {path}')
    if hasattr(dataset, 'check_options'):
        dataset.check_options(block, where)


def check_model_of_cdnsr(opt: Mapping, is_train: bool) -> Optional[str]:
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
    if is_train and isinstance(classifier, Mapping) and classifier.get('type') == 'ErrorPredictor':
        raise OptionError(
            'model_type', f'{model} cannot train an ErrorPredictor, to which only errors have a gradient '
            '(train.error_opt); use CDNSRModel')
    missing = ['annealing of tau'] * is_train + ['tiles in validation, so that an image has one class as a whole']
    if is_train and model not in ('FastSRModel', 'ETDSModel'):
        missing.append('the description of the network in checkpoints')
    return f'model_type {model} with CDNSR lacks {"; ".join(missing)}. CDNSRModel has all of it.'


def check_tested(opt: Mapping) -> None:
    """Refuses to test a network without weights."""
    if not opt['path'].get('pretrain_network_g'):
        raise OptionError('path.pretrain_network_g', 'is needed for a test: a checkpoint, or the name of a model')


def check_schedule(train_opt: Mapping) -> None:
    """Refuses what BasicSR would fail of at the first step, or at the end of the last period."""
    scheduler, total = train_opt['scheduler'], train_opt['total_iter']
    periods = scheduler.get('periods') if isinstance(scheduler, Mapping) else None
    if isinstance(periods, list):
        for period in periods:
            check_number(period, 'train.scheduler.periods', 1)
        if sum(periods) < total:
            raise OptionError('train.scheduler.periods', f'end at iteration {sum(periods)}, before total_iter {total}')
    if 'warmup_iter' in train_opt:
        check_number(train_opt['warmup_iter'], 'train.warmup_iter', -1, integer=True)
    if 'ema_decay' in train_opt:
        check_number(train_opt['ema_decay'], 'train.ema_decay', 0, 1)


def check_options(opt: dict, is_train: bool) -> None:
    """Checks an option file before BasicSR reads it: types, network and loss arguments, files, our own blocks.

    A model or dataset class may bring its own check as a static method ``check_options``; that is where this
    plugin's blocks refuse unknown keys. Blocks of other BasicSR models are left to them. Whether networks to start from
    can be found is not asked here.

    Args:
        opt: Content of the option file.
        is_train: Whether it is about to be trained (otherwise tested).

    Raises:
        OptionError: For the first mistake found.
    """
    from basicsr.utils.registry import METRIC_REGISTRY, MODEL_REGISTRY

    for key in ['name', 'model_type', 'num_gpu', 'datasets', 'path'] + (['train', 'logger'] if is_train else ['val']):
        if opt.get(key) is None:
            raise OptionError(key, 'is missing from the option file')
    blocks = {'datasets': (), 'path': (), 'train': (), 'logger': (), 'val': ('save_img', )}
    if is_train:
        blocks.update(
            train=('optim_g', 'scheduler', 'total_iter'),
            val=('save_img', 'val_freq'),
            logger=('print_freq', 'save_checkpoint_freq', 'use_tb_logger'))
    elif isinstance(opt['val'], Mapping) and opt['val'].get('save_img'):
        blocks.update(val=('suffix', ))
    for key, required in blocks.items():
        if opt.get(key) is not None:
            check_keys(opt[key], opt[key], key, required)
    if not isinstance(opt['name'], str) or os.path.basename(opt['name']) != opt['name'] or opt['name'] in ('.', '..'):
        raise OptionError('name', f'expected the name of a folder, but got {opt["name"]!r}')
    if opt.get('manual_seed') is not None:
        check_number(opt['manual_seed'], 'manual_seed', 0, integer=True)
    model = find_registered(MODEL_REGISTRY, opt['model_type'], 'model_type')

    for key, block in opt.items():
        if str(key).startswith('network_'):
            check_network(block, key)
    if is_train:
        for key, block in opt['train'].items():
            if str(key).endswith('_opt') and block is not None:
                check_loss(block, f'train.{key}')
        check_number(opt['train']['total_iter'], 'train.total_iter', 1)
        check_schedule(opt['train'])
        for block, keys in (('logger', ('print_freq', 'save_checkpoint_freq')), ('val', ('val_freq', ))):
            for key in keys:
                if key in (opt.get(block) or {}):
                    check_number(opt[block][key], f'{block}.{key}', 1)
        if 'train' not in opt['datasets']:
            raise OptionError('datasets.train', 'is missing from the option file')
    metrics = (opt.get('val') or {}).get('metrics') or {}
    check_keys(metrics, metrics, 'val.metrics')
    for name, block in metrics.items():
        metric = find_type(METRIC_REGISTRY, block, f'val.metrics.{name}')
        arguments = {key: value for key, value in block.items() if key != 'better'}
        check_arguments(metric, arguments, f'val.metrics.{name}', given=('img', 'img2'))
        check_choice(block.get('better', 'higher'), f'val.metrics.{name}.better', ('higher', 'lower'))
        check_number(block.get('crop_border', 0), f'val.metrics.{name}.crop_border', 0, integer=True)

    for name, block in opt['datasets'].items():
        check_dataset(block, f'datasets.{name}')
    if opt['path'].get('resume_state') is not None:
        check_path(opt['path']['resume_state'], 'path.resume_state')
    if hasattr(model, 'check_options'):
        model.check_options(opt, is_train)
