"""Blocks of option files as dataclasses: each key with its default, accepted values, and a line with its meaning.

They check a block (`check_block`) and read it (`filled`). scripts/document_options.py generates the reference of
options and the schema for editors from them. Blocks of a model or dataset are defined beside it.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Optional, TypeVar

from .kinds import FLAG, MAX_FREQ, Kind, choice, fitting, integer, list_of, number, optional, text, typed, whole, word
from .reading import read_options
from .values import OptionError, check_keys, check_name, check_number, check_path, shown

TOP = 'option file'  # the place of keys outside of all blocks
MAX_SEED = 2**31  # numpy accepts 2**32, and workers and processes add to the seed
MAX_WORKERS = 256  # of a process
Struct = TypeVar('Struct')


def key(default: Any, kind: Kind, meaning: str) -> Any:
    """A key of a block. The default `...` means that it is required."""
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
    """The accepted values of a key."""
    kind: Kind = field.metadata['kind']
    return kind


def required_in(struct: type) -> list[str]:
    """The required keys of a block."""
    return [name for name, field in fields_of(struct).items() if field.default is ...]


def check_values(block: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Checks the values of the known keys of a block; for the file itself, `where` is TOP."""
    for name, value in block.items():
        if name in kinds:
            kinds[name].check(value, name if where == TOP else f'{where}.{name}')


def check_block(struct: type, block: Any, where: str, required: Iterable[str] = (), others: bool = False) -> None:
    """Refuses unknown and missing keys and wrong values of a block.

    Args:
        struct: Dataclass that defines the block.
        block: The block in the option file.
        where: Its place in messages; TOP for the file itself.
        required: Further required keys.
        others: Whether other keys are accepted.

    Raises:
        OptionError: For the first mistake found.
    """
    known = {name: kind_of(field) for name, field in fields_of(struct).items()}
    check_keys(block, (*known, *block) if others and isinstance(block, Mapping) else known, where, required)
    check_values(block, known, where)


def filled(struct: type[Struct], block: Any) -> Struct:
    """A block as its dataclass: keys that are missing or `~` get their defaults; unknown keys are dropped."""
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
    """Copies TensorBoard's values to wandb, which must be installed."""
    project: Optional[str] = key(None, WANDB_NAME, 'project to copy them to; ~: nothing is copied')
    resume_id: Optional[str] = key(None, WANDB_NAME, 'id of a run to resume')


@dataclass
class Logger:
    """What is logged and saved during training."""
    print_freq: int = key(..., whole(1, MAX_FREQ), 'iterations between two log lines')
    save_checkpoint_freq: int = key(..., whole(1, MAX_FREQ), 'iterations between two checkpoints and training states')
    use_tb_logger: bool = key(..., FLAG, 'write TensorBoard logs to tb_logger/')
    wandb: Wandb = key(None, block(Wandb), 'copy logged values to wandb')


@dataclass
class DistParams:
    """How the processes of `--launcher slurm` communicate."""
    backend: str = key('nccl', choice('nccl', 'gloo'), 'backend of torch.distributed; gloo without GPUs')
    port: Optional[int] = key(None, optional(integer(1, 65535)), 'port of the first process')


@dataclass
class Paths:
    """Initial weights and states. BasicSR creates the folders."""
    resume_state: Optional[str] = key(None, optional(PATH), 'training state to resume from (`--auto_resume` finds it)')
    ignore_resume_networks: Optional[list[Any]] = key(None, NAMES,
                                                      'networks that are not loaded when a training is resumed')
    experiments_root: Optional[str] = key(None, word('path'), 'set by BasicSR: experiments/NAME')
    results_root: Optional[str] = key(None, word('path'), 'set by BasicSR: results/NAME')


@dataclass
class NetworkPaths(Paths):
    """Initial weights and states. BasicSR creates the folders."""
    pretrain_network_g: Optional[str] = key(None, CHECKPOINT, 'weights of network_g; required in a test')
    param_key_g: Optional[str] = key('params', KEY_OF_WEIGHTS, 'which weights of that checkpoint: params or params_ema')
    strict_load_g: bool = key(True, FLAG, 'refuse missing and additional weights')


@dataclass
class Training:
    """How a model is trained."""
    optim_g: Mapping[str, Any] = key(..., typed('block: type, lr, and arguments of torch.optim', 'lr'), 'the optimizer')
    scheduler: Mapping[str, Any] = key(..., typed('block: type, and its arguments'),
                                       'learning rate over the iterations')
    total_iter: int = key(..., whole(1), 'length of the training in iterations')
    warmup_iter: int = key(-1, whole(-1), 'iterations of warm-up, in which the learning rate rises; -1: none')
    ema_decay: float = key(0, number(0, 1), 'decay of the running mean of the weights (EMA); 0: no mean')


@dataclass
class Validation:
    """How a model is validated and tested."""
    val_freq: int = key(None, whole(1, MAX_FREQ), 'iterations between two validations; required in training')
    save_img: bool = key(..., FLAG, 'save the images')
    suffix: Optional[str] = key(None, optional(NAME),
                                'ending of their file names; ~: the name of the run. Required in a test')
    pbar: Optional[bool] = key(None, FLAG, 'show progress; ~: in a terminal only')
    metrics: Optional[Mapping[str, Any]] = key(None, word('blocks by name: type, and arguments of the metric',
                                                          'object'), 'metrics to compute')


@dataclass
class RoutedValidation(Validation):
    """How a model is validated and tested."""
    save_map: bool = key(False, FLAG, 'save the difficulty map beside each image')


@dataclass
class AnyData:
    """Keys of every dataset."""
    name: str = key(..., NAME, 'name of the dataset, in logs and results')
    type: str = key(..., word('registered dataset'), 'class of the dataset')
    batch_size_per_gpu: int = key(None, integer(1, 2**16), 'patches per batch in each process; required in training')
    num_worker_per_gpu: int = key(None, integer(0, MAX_WORKERS), 'reading processes; required in training')
    dataset_enlarge_ratio: float = key(1, number(1e-6, 10**6), 'passes over the dataset in an epoch')
    prefetch_mode: Optional[str] = key(None, choice('cpu', 'cuda', None),
                                       'read ahead in a thread (cpu) or a stream of the GPU (cuda)')
    num_prefetch_queue: int = key(1, integer(1, 2**10), 'batches to read ahead with prefetch_mode cpu')
    pin_memory: bool = key(None, FLAG, 'put batches in pinned memory; ~: on a GPU')
    persistent_workers: bool = key(False, FLAG, 'keep workers from one epoch to the next')


@dataclass
class PairedData(AnyData):
    """A dataset of GT and LQ images, as PairedImageDataset reads it."""
    dataroot_gt: str = key(..., word('path'), 'folder or LMDB of the GT images')
    dataroot_lq: str = key(..., word('path'), 'folder or LMDB of the LQ images')
    meta_info_file: Optional[str] = key(None, word('path'), 'file that lists the names of the images')
    io_backend: Mapping[str, Any] = key(..., typed('block: type disk, or lmdb'), 'how the images are stored')
    filename_tmpl: str = key('{}', Kind('name with one {}', {'type': 'string'}, _check_template),
                             "name of an LQ file; {} is the GT's name")
    gt_size: Optional[int] = key(None, optional(integer(1, 2**16)), 'side of the GT patches; required in training')
    use_hflip: bool = key(None, FLAG, 'flip patches horizontally at random; required in training')
    use_rot: bool = key(None, FLAG, 'rotate patches at random; required in training')
    mean: Optional[list[Any]] = key(None, _per_channel(-2**16), 'subtracted from the images')
    std: Optional[list[Any]] = key(None, _per_channel(1e-6), 'the images are divided by it, after mean is subtracted')
    color: Optional[str] = key(None, choice('y', None), 'y: read luma only')
    phase: Optional[str] = key(None, word('word'), 'set by BasicSR: train, val or test')
    scale: Optional[float] = key(None, word('number', 'number'), "set by BasicSR: the option file's scale")


@dataclass
class Head:
    """Keys at the top of an option file."""
    name: str = key(..., NAME, 'name of the run and of its folder')
    model_type: str = key(..., word('registered model'), 'model to train or test')
    scale: Optional[float] = key(None, optional(number(1, 16)), 'upscaling factor')
    num_gpu: Any = key(..., Kind('auto, or integer from 0 to 1024', {}, _check_gpus),
                       'GPUs of this machine; one process for each')
    manual_seed: Optional[int] = key(None, optional(integer(0, MAX_SEED)), 'random seed; ~: a new one each time')
    find_unused_parameters: bool = key(False, FLAG, "argument of DistributedDataParallel")
    dist_params: DistParams = key(None, block(DistParams), 'how processes of Slurm communicate')


@dataclass
class OptionFile(Head):
    """Keys at the top of an option file."""
    datasets: Mapping[str, Any] = key(..., Kind('blocks: train, val, val_2 ...; test, test_1 ...', {}), 'the datasets')
    network_g: Mapping[str, Any] = key(..., typed('block: type, and arguments of the network'), 'the network')
    path: Paths = key(..., block(Paths), 'initial weights')
    train: Training = key(None, block(Training), 'training; required in training')
    val: Validation = key(None, block(Validation), 'validation; required in a test')
    logger: Logger = key(None, block(Logger), 'logs and checkpoints; required in training')


@dataclass
class Routing:
    """How PCSR routes pixels, in validation and in `basicsr upscale -opt`."""
    k: float = key(0, number(), 'exponent of the cost; a larger one is cheaper')
    adaptive: bool = key(False, FLAG, 'compute the threshold from each image')
    refinement: bool = key(True, FLAG, 'smooth borders between light and heavy pixels')
    budget: Optional[float] = key(None, optional(number(0)),
                                  "largest cost, as a fraction of the heavy sampler's, instead of k and adaptive")


def check_routing(block: Any, where: str) -> None:
    """Refuses an invalid `routing` block of PCSR."""
    check_block(Routing, block, where)
    if block.get('budget') is not None and (block.get('k') or block.get('adaptive')):
        raise OptionError(f'{where}.budget', 'replaces k and adaptive; give one of them')


def read_routing(path: str) -> dict[str, Any]:
    """The `routing` block of an option file; empty if there is none."""
    routing = read_options(path).get('routing')
    if routing:
        check_routing(routing, f'{path}: routing')
    return routing or {}
