"""Blocks of option files as dataclasses: each key with its default, what it takes, and a line that says what it means.

A block is checked by them (`check_block`) and read through them (`filled`). The reference of options and the schema for
editors are made of them, see scripts/document_options.py. Those of a model or dataset stand beside it.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Optional, TypeVar

from .kinds import FLAG, MAX_FREQ, Kind, choice, fitting, integer, list_of, number, optional, text, typed, whole, word
from .reading import read_options
from .values import OptionError, check_keys, check_name, check_number, check_path, shown

TOP = 'option file'  # where the keys are that stand in no block
MAX_SEED = 2**31  # numpy takes 2**32, and workers and processes add to it
MAX_WORKERS = 256  # of a process
Struct = TypeVar('Struct')


def key(default: Any, kind: Kind, meaning: str) -> Any:
    """A key of a block. The default is `...` where it is required."""
    return dataclasses.field(default=default, metadata={'kind': kind, 'meaning': meaning})


def block(struct: type) -> Kind:
    """A block whose keys are those of a dataclass, or `~`."""
    schema = {'anyOf': [{'$ref': f'#/$defs/{struct.__name__}'}, {'type': 'null'}]}
    return Kind('block', schema, lambda value, where: None
                if value is None else check_block(struct, value, where), struct)


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


def check_values(block: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Checks the values of those keys of a block that are known; of the file itself, `where` is TOP."""
    for name, value in block.items():
        if name in kinds:
            kinds[name].check(value, name if where == TOP else f'{where}.{name}')


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
    known = {name: kind_of(field) for name, field in fields_of(struct).items()}
    check_keys(block, (*known, *block) if others and isinstance(block, Mapping) else known, where, required)
    check_values(block, known, where)


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


def _check_gpus(value: Any, where: str) -> None:
    if value != 'auto':
        check_number(value, where, 0, 2**10, integer=True)


def _check_template(value: Any, where: str) -> None:
    if not isinstance(value, str) or value.count('{}') != 1 or set(value.replace('{}', '')) & set('{}/\\'):
        raise OptionError(where, f"expected a name with one {{}}, such as '{{}}x4', but got {shown(value)}")


def _per_channel(low: float) -> Kind:
    return optional(list_of(number(low, 2**16), 1, 3, words='list of 1 or 3 numbers'))


NAME = Kind('name of a folder', {'type': 'string'}, check_name)
NAMES = optional(
    fitting(
        list_of(word('name'), words='list of names'), lambda names: all(isinstance(name, str) for name in names),
        'a list of names such as network_d'))
PATH = Kind('path', {'type': 'string'}, check_path)
CHECKPOINT = word('checkpoint, or name of a model')
WANDB_NAME = optional(text('name', 'a name'))
KEY_OF_WEIGHTS = optional(text('word', 'a word such as params_ema'))


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
    ignore_resume_networks: Optional[list[Any]] = key(None, NAMES,
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
    total_iter: int = key(..., whole(1), 'iterations of the training')
    warmup_iter: int = key(-1, whole(-1), 'iterations in which the learning rate rises; -1: none')
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
    mean: Optional[list[Any]] = key(None, _per_channel(-2**16), 'is subtracted from the images')
    std: Optional[list[Any]] = key(None, _per_channel(1e-6), 'the images are divided by it, after mean')
    color: Optional[str] = key(None, choice('y', None), 'y: luma alone is read')
    phase: Optional[str] = key(None, word('word'), 'set by BasicSR: train, val or test')
    scale: Optional[float] = key(None, word('number', 'number'), "set by BasicSR: the file's")


@dataclass
class Head:
    """What stands at the top of an option file."""
    name: str = key(..., NAME, 'name of the run, and of its folder')
    model_type: str = key(..., word('registered model'), 'what is trained or tested')
    scale: Optional[float] = key(None, optional(number(1, 16)), 'how many times larger images become')
    num_gpu: Any = key(..., Kind('auto, or integer from 0 to 1024', {}, _check_gpus),
                       'GPUs of this machine; several get a process each')
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
