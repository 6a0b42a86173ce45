"""Blocks of option files as dataclasses: each key with its default, what it takes, and a line that says what it means.

A block is checked by them (`check_block`) and read through them (`filled`). The reference of options and the schema for
editors are made of them, see scripts/document_options.py. Those of a model or dataset stand beside it.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Mapping, Optional, TypeVar

from .reading import read_options
from .values import (
    OptionError,
    check_choice,
    check_flag,
    check_keys,
    check_list,
    check_name,
    check_number,
    check_path,
    check_whole,
    shown,
)

TOP = 'option file'  # where the keys are that stand in no block
MAX_ITER = 10**8  # BasicSR's own longest trainings take 10**6
MAX_FREQ = 10**12  # never, as some write it
MAX_SEED = 2**31  # numpy takes 2**32, and workers and processes add to it
MAX_WORKERS = 256  # of a process
Struct = TypeVar('Struct')


@dataclass(frozen=True)
class Kind:
    """What a key takes.

    Args:
        words: Said in the reference.
        schema: Said as JSON schema.
        check: Refuses anything else, given the value and its place.
        struct: The keys of the block that it takes, if they are known.
        types: The types of the loss that it takes.
        trains: The part of a network that this loss trains, if it is one alone.
    """
    words: str
    schema: Mapping[str, Any]
    check: Callable[[Any, str], None] = lambda value, where: None
    struct: Optional[type] = None
    types: tuple[str, ...] = ()
    trains: Optional[str] = None


def key(default: Any, kind: Kind, meaning: str) -> Any:
    """A key of a block. The default is `...` where it is required."""
    return dataclasses.field(default=default, metadata={'kind': kind, 'meaning': meaning})


def number(low: float = float('-inf'), high: Optional[float] = None) -> Kind:
    words, schema = _span('number', low, high)
    return Kind(words, schema, lambda value, where: check_number(value, where, low, high))


def integer(low: int, high: Optional[int] = None) -> Kind:
    words, schema = _span('integer', low, high)
    return Kind(words, schema, lambda value, where: check_number(value, where, low, high, integer=True))


def whole(low: int, high: int) -> Kind:
    """An integer that may be written as 5e3."""
    words, schema = _span('integer', low, high)
    return Kind(words, schema, lambda value, where: check_whole(value, where, low, high))


def _span(words: str, low: float, high: Optional[float]) -> tuple[str, dict[str, Any]]:
    schema: dict[str, Any] = {'type': words}
    if low > float('-inf'):
        words, schema['minimum'] = f'{words} from {low}', low
    if high is not None:
        words, schema['maximum'] = f'{words} to {high}' if high < MAX_ITER else words, high
    return words, schema


def choice(*accepted: Any) -> Kind:
    words = ', '.join('~' if value is None else f'`{value}`' for value in accepted)
    return Kind(words, {'enum': list(accepted)}, lambda value, where: check_choice(value, where, accepted))


def optional(kind: Kind) -> Kind:
    """Also `~`, the default."""
    schema = {**kind.schema, 'type': [kind.schema['type'], 'null']}
    return dataclasses.replace(
        kind, schema=schema, check=lambda value, where: None if value is None else kind.check(value, where))


def block(struct: type) -> Kind:
    """A block whose keys are those of a dataclass, or `~`."""
    schema = {'anyOf': [{'$ref': f'#/$defs/{struct.__name__}'}, {'type': 'null'}]}
    return Kind('block', schema, lambda value, where: None
                if value is None else check_block(struct, value, where), struct)


def typed(words: str, *required: str) -> Kind:
    """A block of what is checked against a constructor, elsewhere."""
    return Kind(words, {'type': 'object', 'required': ['type', *required]})


def loss(*types: str, trains: Optional[str] = None) -> Kind:
    """The block of a loss, of these types (any, if none is given), or `~`."""

    def check(value: Any, where: str) -> None:
        if not value:
            return
        if types:
            check_choice(value.get('type'), f'{where}.type', types)
        check_number(value.get('loss_weight', 1), f'{where}.loss_weight', 0)
        check_number(value.get('num_negatives', 1), f'{where}.num_negatives', 1, integer=True)
        if value.get('reduction') == 'none':
            raise OptionError(f'{where}.reduction', 'none leaves no single value to minimise; accepted: mean, sum')
        check_number(value.get('target', 0), f'{where}.target', 0, 1)
        for layer, weight in (value.get('layer_weights') or {}).items():
            check_number(weight, f'{where}.layer_weights.{layer}', 0)

    named: dict[str, Any] = {'enum': list(types)} if types else {'type': 'string'}
    schema = {'type': ['object', 'null'], 'required': ['type'], 'properties': {'type': named}}
    words = 'block: ' + (', '.join(f'`{name}`' for name in types) or 'type, and arguments of the loss')
    return Kind(words, schema, check, types=types, trains=trains)


def word(words: str, schema_type: str = 'string') -> Kind:
    """A value that is looked at elsewhere, or `~`."""
    return Kind(words, {'type': [schema_type, 'null']})


def _check_gpus(value: Any, where: str) -> None:
    if value != 'auto':
        check_number(value, where, 0, 2**10, integer=True)


def _check_wandb_name(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise OptionError(where, f'expected a name, but got {shown(value)}')


def _check_key_of_weights(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise OptionError(where, f'expected a word such as params_ema, but got {shown(value)}')


def _check_networks(value: Any, where: str) -> None:
    check_list(value, where)
    for name in value:
        if not isinstance(name, str):
            raise OptionError(where, f'expected a list of names such as network_d, but got {shown(value)}')


def _check_template(value: Any, where: str) -> None:
    if not isinstance(value, str) or value.count('{}') != 1 or set(value.replace('{}', '')) & set('{}/\\'):
        raise OptionError(where, f"expected a name with one {{}}, such as '{{}}x4', but got {shown(value)}")


def _per_channel(name: str) -> Kind:
    """Numbers for one channel or three; those of `std` are divisors."""

    def check(value: Any, where: str) -> None:
        check_list(value, where, 1, 3)
        for item in value:
            check_number(item, where, 1e-6 if name == 'std' else -2**16, 2**16)

    return optional(Kind('list of 1 or 3 numbers', {'type': 'array'}, check))


FLAG = Kind('true, false', {'type': 'boolean'}, check_flag)
NAME = Kind('name of a folder', {'type': 'string'}, check_name)
PATH = Kind('path', {'type': 'string'}, check_path)
CHECKPOINT = word('checkpoint, or name of a model')
WANDB_NAME = optional(Kind('name', {'type': 'string'}, _check_wandb_name))
KEY_OF_WEIGHTS = optional(Kind('word', {'type': 'string'}, _check_key_of_weights))


def fields_of(struct: type) -> dict[str, dataclasses.Field[Any]]:
    """The keys of a block, in order."""
    return {field.name: field for field in dataclasses.fields(struct)}


def kind_of(field: dataclasses.Field[Any]) -> Kind:
    """What a key takes."""
    kind: Kind = field.metadata['kind']
    return kind


def required_in(struct: type) -> list[str]:
    """The keys that a block needs."""
    return [name for name, field in fields_of(struct).items() if field.default is ...]


def check_block(struct: type, block: Any, where: str, required: Iterable[str] = (), others: bool = False) -> None:
    """Refuses unknown and missing keys and wrong values of a block.

    Args:
        struct: Dataclass of its keys.
        block: What the option file says.
        where: Its place, for messages; TOP for the file itself.
        required: Keys that are needed.
        others: Whether other keys are left alone.

    Raises:
        OptionError: For the first mistake found.
    """
    known = fields_of(struct)
    check_keys(block, (*known, *block) if others and isinstance(block, Mapping) else known, where, required)
    for name, value in block.items():
        if name in known:
            kind_of(known[name]).check(value, name if where == TOP else f'{where}.{name}')


def filled(struct: type[Struct], block: Any) -> Struct:
    """A block as its dataclass: what is not said, or is `~`, has its default; other keys are left out."""
    values = {}
    for name, field in fields_of(struct).items():
        value, inner = (block or {}).get(name), kind_of(field).struct
        if inner is not None:
            value = filled(inner, value)
        if value is not None:
            values[name] = value
    return struct(**values)


@dataclass
class Wandb:
    """Copies TensorBoard's figures to wandb, which has to be installed."""
    project: Optional[str] = key(None, WANDB_NAME, 'project to copy them to; none: nothing is copied')
    resume_id: Optional[str] = key(None, WANDB_NAME, 'id of a run that goes on')


@dataclass
class Logger:
    """What is said and saved while training."""
    print_freq: int = key(..., whole(1, MAX_FREQ), 'iterations between two lines of the log')
    save_checkpoint_freq: int = key(..., whole(1, MAX_FREQ), 'iterations between two checkpoints and training states')
    use_tb_logger: bool = key(..., FLAG, 'whether TensorBoard gets the figures, in tb_logger/')
    wandb: Wandb = key(None, block(Wandb), 'figures also go to wandb')


@dataclass
class DistParams:
    """How the processes of `--launcher slurm` talk to each other."""
    backend: str = key('nccl', choice('nccl', 'gloo'), 'backend of torch.distributed; gloo where there is no GPU')
    port: Optional[int] = key(None, optional(integer(1, 65535)), 'port of the first process')


@dataclass
class Paths:
    """Where networks start from. Folders are made by BasicSR."""
    resume_state: Optional[str] = key(None, optional(PATH), 'training state to go on from (`--auto_resume` finds it)')
    ignore_resume_networks: Optional[list[Any]] = key(
        None, optional(Kind('list of names', {'type': 'array'}, _check_networks)),
        'networks that are not loaded where a training goes on')
    experiments_root: Optional[str] = key(None, word('path'), 'set by BasicSR: experiments/NAME')
    results_root: Optional[str] = key(None, word('path'), 'set by BasicSR: results/NAME')


@dataclass
class NetworkPaths(Paths):
    """Where networks start from. Folders are made by BasicSR."""
    pretrain_network_g: Optional[str] = key(None, CHECKPOINT, 'weights of network_g; needed in a test')
    param_key_g: Optional[str] = key('params', KEY_OF_WEIGHTS, 'which weights of it: params or params_ema')
    strict_load_g: bool = key(True, FLAG, 'whether all weights must be there, and no others')


@dataclass
class Training:
    """How a model is trained."""
    optim_g: Mapping[str, Any] = key(..., typed('block: type, lr, and arguments of torch.optim', 'lr'), 'the optimizer')
    scheduler: Mapping[str, Any] = key(..., typed('block: type, and its arguments'),
                                       'the learning rate over the iterations')
    total_iter: int = key(..., whole(1, MAX_ITER), 'iterations of the training')
    warmup_iter: int = key(-1, whole(-1, MAX_ITER), 'iterations in which the learning rate rises; -1: none')
    ema_decay: float = key(0, number(0, 1), 'share of the averaged weights that stays in an iteration; 0: no average')


@dataclass
class Validation:
    """How a model is validated and tested."""
    val_freq: int = key(None, whole(1, MAX_FREQ), 'iterations between two validations; needed in training')
    save_img: bool = key(..., FLAG, 'whether images are saved')
    suffix: Optional[str] = key(None, optional(NAME),
                                'ends their names; ~: the name of the run. A test needs to say it')
    pbar: Optional[bool] = key(None, FLAG, 'whether progress is shown; left out: in a terminal')
    metrics: Optional[Mapping[str, Any]] = key(None, word('blocks by name: type, and arguments of the metric',
                                                          'object'), 'what is measured')


@dataclass
class RoutedValidation(Validation):
    """How a model is validated and tested."""
    save_map: bool = key(False, FLAG, 'whether the difficulty map is saved beside each image')


@dataclass
class AnyData:
    """What every dataset says."""
    name: str = key(..., NAME, 'name of the dataset, in logs and results')
    type: str = key(..., word('registered dataset'), 'what reads it')
    batch_size_per_gpu: int = key(None, integer(1, 2**16), 'patches of a batch, in each process; needed in training')
    num_worker_per_gpu: int = key(None, integer(0, MAX_WORKERS), 'processes that read; needed in training')
    dataset_enlarge_ratio: float = key(1, number(1e-6, 10**6), 'how often the dataset is gone through in an epoch')
    prefetch_mode: Optional[str] = key(None, choice('cpu', 'cuda', None),
                                       'who reads ahead: a thread, a stream of the GPU')
    num_prefetch_queue: int = key(1, integer(1, 2**10), 'batches that prefetch_mode cpu reads ahead')
    pin_memory: bool = key(None, FLAG, 'whether batches lie in pinned memory; on a GPU they do')
    persistent_workers: bool = key(False, FLAG, 'whether workers stay from one epoch to the next')


@dataclass
class PairedData(AnyData):
    """A dataset of GT and LQ, as PairedImageDataset reads it."""
    dataroot_gt: str = key(..., word('path'), 'folder or LMDB of the GT')
    dataroot_lq: str = key(..., word('path'), 'folder or LMDB of the LQ')
    meta_info_file: Optional[str] = key(None, word('path'), 'file that lists the names of the images')
    io_backend: Mapping[str, Any] = key(..., typed('block: type disk, or lmdb'), 'what the images lie in')
    filename_tmpl: str = key('{}', Kind('name with one {}', {'type': 'string'}, _check_template),
                             "name of an LQ file, {} being GT's")
    gt_size: Optional[int] = key(None, optional(integer(1, 2**16)), 'side of the GT patches; needed in training')
    use_hflip: bool = key(None, FLAG, 'whether patches are flipped, either way; needed in training')
    use_rot: bool = key(None, FLAG, 'whether patches are turned; needed in training')
    mean: Optional[list[Any]] = key(None, _per_channel('mean'), 'is subtracted from the images')
    std: Optional[list[Any]] = key(None, _per_channel('std'), 'the images are divided by it, after mean')
    color: Optional[str] = key(None, choice('y', None), 'y: luma alone is read')
    phase: Optional[str] = key(None, word('word'), 'set by BasicSR: train, val or test')
    scale: Optional[float] = key(None, word('number', 'number'), "set by BasicSR: the file's")


@dataclass
class Head:
    """What stands at the top of an option file."""
    name: str = key(..., NAME, 'name of the run, and of its folder')
    model_type: str = key(..., word('registered model'), 'what is trained or tested')
    scale: Optional[float] = key(None, optional(number(1, 16)), 'how many times larger images become')
    num_gpu: Any = key(..., Kind('auto, or integer from 0 to 1024', {}, _check_gpus), 'GPUs of this machine')
    manual_seed: Optional[int] = key(None, optional(integer(0, MAX_SEED)),
                                     'seed of random numbers; ~: another each time')
    find_unused_parameters: bool = key(False, FLAG, "DistributedDataParallel's, for several processes")
    dist_params: DistParams = key(None, block(DistParams), 'how the processes of Slurm meet')


@dataclass
class OptionFile(Head):
    """What stands at the top of an option file."""
    datasets: Mapping[str, Any] = key(..., Kind('blocks: train, val, val_2 ...; test, test_1 ...', {}), 'what is read')
    network_g: Mapping[str, Any] = key(..., typed('block: type, and arguments of the network'), 'the network')
    path: Paths = key(..., block(Paths), 'where it starts from')
    train: Training = key(None, block(Training), 'how it is trained; needed in training')
    val: Validation = key(None, block(Validation), 'how it is validated; needed in a test')
    logger: Logger = key(None, block(Logger), 'what is said and saved; needed in training')


@dataclass
class Routing:
    """How PCSR routes pixels, in validation and in `basicsr upscale -opt`."""
    k: float = key(0, number(), 'exponent of the cost: the larger, the cheaper')
    adaptive: bool = key(False, FLAG, 'whether the threshold follows from each image')
    refinement: bool = key(True, FLAG, 'whether borders between light and heavy pixels are smoothed')
    budget: Optional[float] = key(None, optional(number(0)),
                                  "fraction of the heavy sampler's cost that may be spent, instead of k and adaptive")


def check_routing(block: Any, where: str) -> None:
    """Refuses what does not say how PCSR routes pixels."""
    check_block(Routing, block, where)
    if block.get('budget') is not None and (block.get('k') or block.get('adaptive')):
        raise OptionError(f'{where}.budget', 'replaces k and adaptive; give one of them')


def read_routing(path: str) -> dict[str, Any]:
    """How an option file says that PCSR routes pixels; empty if it does not."""
    routing = read_options(path).get('routing')
    if routing:
        check_routing(routing, f'{path}: routing')
    return routing or {}
