"""Everything that is needed to run basicsr 1.4.2 on current Python, torch and torchvision.

No other module of this package depends on these details. `provide_missing_modules` acts where an import fails,
`patch_basicsr` where BasicSR itself misbehaves; what upstream has mended is left alone or replaced by the same
behaviour, so all of it is harmless with BasicSR's git master. Numbers are threads on
https://github.com/XPixelGroup/BasicSR; where none is named, none could be found.
"""
from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import os
import re
import shutil
import sys
import tempfile
import time
import types
import warnings
import weakref
import zipfile
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from .options import OptionError, OptionLoader, force_yml_value, parse_force_yml


def _fill_functional_tensor(module: types.ModuleType) -> None:
    from torchvision.transforms.functional import rgb_to_grayscale
    module.rgb_to_grayscale = rgb_to_grayscale


def _fill_distutils_version(module: types.ModuleType) -> None:
    from packaging.version import parse
    module.LooseVersion = parse


class _MissingModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last in ``sys.meta_path``: asked only for modules that nothing else finds."""

    stand_ins: dict[str, Callable[[types.ModuleType], None]] = {
        # degradations.py imports it, torchvision 0.17 removed it: #649, #663, #711, mended on master by #650.
        'torchvision.transforms.functional_tensor': _fill_functional_tensor,
        # arch_util.py compares versions with it, Python 3.12 removed it.
        'distutils': lambda module: None,
        'distutils.version': _fill_distutils_version,
    }

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.stand_ins:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=fullname == 'distutils')
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        self.stand_ins[module.__name__](module)


def provide_missing_modules() -> None:
    """Lets BasicSR import modules that torchvision and Python have removed. Costs nothing where they exist."""
    if not any(isinstance(finder, _MissingModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MissingModuleFinder())


def _around(mended: Callable) -> Callable:
    """Turns a function into a replacement of one of BasicSR's: it is called with the original, with the further
    arguments of `mend`, and then with the caller's.
    """

    def mend(original: Callable, *given: Any) -> Callable:

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return mended(original, *given, *args, **kwargs)

        return function

    return mend


def _ordered_yaml() -> tuple[type, type]:
    """#768: BasicSR's loader constructs any Python object (``!!python/object/apply`` runs code). This one does not."""
    import yaml
    return OptionLoader, yaml.SafeDumper


@_around
def _checked_parse_options(original: Callable, root_path: str, is_train: bool = True) -> tuple[dict, Any]:
    """BasicSR passes ``--force_yml`` to ``exec``: only key:sub=value may reach it, whichever program calls.

    Stock option files also say ``num_gpu: 1``, with which BasicSR fails on a machine without a GPU, and do not ask for
    pinned memory, without which each copy to a GPU is waited for.
    """
    import torch

    from basicsr.utils.misc import set_random_seed
    if '--force_yml' in sys.argv:
        for entry in sys.argv[sys.argv.index('--force_yml') + 1:]:
            if entry.startswith('-'):
                break
            parse_force_yml(entry)
    opt, args = original(root_path, is_train)
    if opt.get('manual_seed') is not None:  # again: it may be one that --force_yml gives
        set_random_seed(opt['manual_seed'] + opt['rank'])
    if opt['num_gpu'] != 0 and not torch.cuda.is_available():
        print(f"num_gpu is {opt['num_gpu']}, but there is no CUDA GPU: running on the CPU.", flush=True)
        opt['num_gpu'] = 0
    if opt['num_gpu'] != 0 and is_train:  # without it every batch is waited for
        opt['datasets']['train'].setdefault('pin_memory', True)
    if opt['num_gpu'] == 0 and is_train and opt['datasets']['train'].get('prefetch_mode') == 'cuda':
        print('prefetch_mode is cuda, but this runs on the CPU: using prefetch_mode cpu.', flush=True)
        opt['datasets']['train']['prefetch_mode'] = 'cpu'
    return opt, args


def _expanduser_each(path: Any) -> Any:
    """parse_options expands ``~`` in every ``pretrain_network*`` path and stops at a list of them."""
    if isinstance(path, list):
        return [item if item is None else os.path.expanduser(item) for item in path]
    return os.path.expanduser(path)


def _remove_leftovers(opt: dict) -> None:
    """Removes the hidden files and folders that a run killed while saving has left in this experiment."""
    if opt['rank'] != 0:
        return
    for key in ('models', 'training_states'):
        for path in Path(opt['path'][key]).glob('.*'):
            if path.name.startswith('.saving_'):
                shutil.rmtree(path, ignore_errors=True)
            elif re.fullmatch(r'\.\d+\..*\.(pth|state)', path.name):
                path.unlink()


def _load_resume_state(opt: dict) -> Optional[dict]:
    """Loads the newest complete training state, on any device.

    BasicSR moves it to the current CUDA device, which fails where there is none, and takes the newest file name,
    which after a kill may be a half-written file.
    """
    from basicsr.utils import check_resume
    from .checkpoint import read_pth

    paths = []
    if opt['auto_resume']:
        _remove_leftovers(opt)
        states = [path for path in Path(opt['path']['training_states']).glob('*.state') if path.stem.isdigit()]
        paths = sorted(states, key=lambda path: int(path.stem), reverse=True)
    if not paths and opt['path'].get('resume_state'):
        paths = [Path(opt['path']['resume_state'])]
    for path in paths:
        if opt['auto_resume'] and not zipfile.is_zipfile(path):  # the end of the file, which makes it one, is missing
            print(f'{path} is incomplete; trying the previous state.', flush=True)
            continue
        try:
            state = read_pth(str(path))
            iteration = state['iter']
        except (OptionError, OSError, KeyError, TypeError) as error:  # it cannot be read, or holds something else
            reason = ' '.join(str(error).split())[:200]
            raise OptionError('path.resume_state', f'{path} cannot be loaded: {reason}') from error
        opt['path']['resume_state'] = str(path)
        # BasicSR resumes every network, also a teacher, of which a model never saves anything
        saved = Path(opt['path']['models'])
        ignored = opt['path'].get('ignore_resume_networks') or []
        opt['path']['ignore_resume_networks'] = ignored + [
            name for name in opt if name.startswith('network_') and name not in ignored and name != 'network_g'
            and not any(saved.glob(f'net_{name[len("network_"):]}_*.pth'))
        ]
        check_resume(opt, iteration)
        return state
    opt['path']['resume_state'] = None
    return None


@contextlib.contextmanager
def _one_pretended_gpu() -> Iterator[None]:
    """BasicSR picks ``rank % device_count()`` as this process's GPU: a division by zero where there is none."""
    import torch
    device_count, set_device = torch.cuda.device_count, torch.cuda.set_device
    torch.cuda.device_count, torch.cuda.set_device = (lambda: 1), (lambda device: None)
    try:
        yield
    finally:
        torch.cuda.device_count, torch.cuda.set_device = device_count, set_device


def _share_gpus() -> bool:
    """Whether two processes share a GPU. That each sees fewer GPUs than there are processes is no proof: on some
    clusters each Slurm task sees only its own.
    """
    import socket
    import torch
    own = socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    taken = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(taken, own)
    return len(set(taken)) < len(taken)


def _store_of_a_restart() -> dict[str, Any]:
    """Arguments of init_process_group where torchrun has restarted a run on one machine: a new section of the store.
    The store outlives the run (torch 2.14 and others), and with it the addresses of processes that are gone.

    On several machines, which do not count restarts alike, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
    """
    from torch.distributed import PrefixStore, TCPStore
    count, shared = (os.environ.get(f'TORCHELASTIC_{name}') for name in ('RESTART_COUNT', 'USE_AGENT_STORE'))
    if count in (None, '0') or shared != 'True' or os.environ.get('GROUP_WORLD_SIZE') != '1':
        return {}
    store = TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)
    rank, processes = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    return dict(store=PrefixStore(f'restart {count}', store), rank=rank, world_size=processes)


@_around
def _init_dist_anywhere(original: Callable, launcher: str, backend: str = 'nccl', **kwargs: Any) -> None:
    """Starts distributed training: on CPUs with gloo; on GPUs with NCCL, BasicSR's choice, and gloo for tensors on the
    CPU. NCCL needs a GPU for each process.

    #729 (CVE-2024-27763): BasicSR also pastes SLURM_NODELIST into a shell command.
    """
    import torch
    if launcher == 'slurm' and not re.fullmatch(r'[A-Za-z0-9_.,\[\]-]+', os.environ.get('SLURM_NODELIST', '')):
        raise OptionError('--launcher slurm', 'SLURM_NODELIST is unset or not a list of host names')
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise OptionError('--launcher pytorch', 'start it with torchrun --nproc_per_node=N -m cdnsr_basicsr ...')
    if launcher == 'pytorch':
        kwargs = {**kwargs, **_store_of_a_restart()}
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get('LOCAL_WORLD_SIZE' if launcher == 'pytorch' else 'SLURM_NTASKS_PER_NODE') or 1)
    if gpus > 0:
        original(launcher, 'cpu:gloo,cuda:nccl' if backend == 'nccl' else backend, **kwargs)
        if gpus < processes and _share_gpus():
            raise OptionError(f'--launcher {launcher}', f'{processes} processes on a machine with {gpus} GPUs: each '
                              'needs one')
        return
    with _one_pretended_gpu():
        original(launcher, 'gloo', **kwargs)


@_around
def _archive_time_of_its_own(original: Callable, path: str) -> None:
    """BasicSR names the archive of an earlier run by the second: two runs within one second would share it."""
    from basicsr.utils import misc
    while os.path.exists(path) and os.path.exists(f'{path}_archived_{misc.get_time_str()}'):
        time.sleep(0.1)
    original(path)


@_around
def _model_to_any_device(original: Callable, self: Any, net: Any) -> Any:
    """Wraps a network for distributed training on CPU, where ``device_ids`` must not be given."""
    if not self.opt['dist'] or self.device.type != 'cpu':
        return original(self, net)
    from torch.nn.parallel import DistributedDataParallel
    unused = self.opt.get('find_unused_parameters', False)
    return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)


def _load_network(self, net, load_path: str, strict: bool = True, param_key: Optional[str] = 'params') -> None:
    """BasicSR's load_network accepts only .pth files with weights under `param_key`, but any values in them.

    This one accepts what commands accept as a checkpoint: also a model's name, a .safetensors file, and weights as
    other projects save them.
    """
    from basicsr.utils import get_root_logger
    from .checkpoint import load_weights
    from .conversion.convert import weights_for

    net = self.get_bare_model(net)
    weights = weights_for(net, load_path, param_key)
    get_root_logger().info(f'Loading {type(net).__name__} from {load_path}.')
    if not strict:  # else all keys have to fit, and the first that does not is named
        self._print_different_keys_loading(net, weights, strict)
    load_weights(net, weights, type(net).__name__, load_path, strict)


@_around
def _get_quietly(original: Callable, self: Any, name: str, suffix: str = 'basicsr') -> Any:
    """BasicSR reports names that it has suffixed itself, such as SRVGGNetCompact, as missing whenever they are used."""
    suffixed = f'{name}_{suffix}'
    return original(self, suffixed if name not in self and suffixed in self else name)


@_around
def _saved_when_complete(original: Callable, key: str, self: Any, *args: Any, **kwargs: Any) -> None:
    """If BasicSR is killed while it saves, half a file is left under the final name: it saves elsewhere, and the
    complete file is moved here.

    BasicSR also goes on after it has failed three times to write a file; here that is an error.
    """
    from basicsr.utils.dist_util import get_dist_info
    if get_dist_info()[0] != 0:  # BasicSR saves nothing there, and the folder may be missing
        return
    path, folder = self.opt['path'], Path(self.opt['path'][key])
    with tempfile.TemporaryDirectory(prefix='.saving_', dir=folder) as temporary:
        self.opt['path'] = {**path, key: temporary}
        try:
            original(self, *args, **kwargs)
        finally:
            self.opt['path'] = path
        for file in Path(temporary).iterdir():
            if not zipfile.is_zipfile(file):
                raise OSError(f'{folder / file.name} cannot be written; is the disk full?')
            file.replace(folder / file.name)


PROGRESS = ('last_epoch', '_step_count', '_last_lr', 'base_lrs')  # of a scheduler; the rest is its shape
# of an optimizer's groups: how torch computes, and what differs between its versions
IMPLEMENTATION = ('foreach', 'fused', 'maximize', 'capturable', 'differentiable', 'decoupled_weight_decay')


def _settings(group: dict) -> dict:
    """The settings of a parameter group that come from the option file. The current learning rate follows from
    initial_lr."""
    return {key: value for key, value in group.items() if key not in ('params', 'lr', *IMPLEMENTATION)}


@_around
def _resumes_as_configured(original: Callable, self: Any, resume_state: dict) -> None:
    """A training state also holds learning rates and the schedule, and BasicSR prefers them to the option file's. Here
    the option file decides; only moments and progress are taken from the state.
    """
    from basicsr.utils import get_root_logger
    built = [[dict(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
    shapes = [dict(scheduler.state_dict()) for scheduler in self.schedulers]
    states, changed = [], set()
    for state, optimizer, groups in zip(resume_state['optimizers'], self.optimizers, built):
        old, new = _settings(state['param_groups'][0]), _settings(groups[0])
        if set(old) != set(new):
            changed.add(f'type ({type(optimizer).__name__} starts without moments)')
            state = optimizer.state_dict()
        changed |= {key.replace('initial_lr', 'lr') for key in old if key in new and not _same(old[key], new[key])}
        states.append(state)
    for state, shape in zip(resume_state['schedulers'], shapes):
        keys = [key for key in shape if not key.startswith('_') and key not in (*PROGRESS, 'cumulative_period')]
        changed |= {key for key in keys if not _same(state.get(key), shape[key])}
    progress = [{key: state[key] for key in PROGRESS if key in state} for state in resume_state['schedulers']]
    try:
        original(self, {**resume_state, 'optimizers': states, 'schedulers': progress})
    except (ValueError, AssertionError) as error:  # torch compares parameters, BasicSR counts optimizers
        raise OptionError(
            'path.resume_state', f'belongs to a training of other parameters ({error}); resume it with the networks, '
            'losses and train.freeze that it was saved with') from error
    if not changed:
        return
    for optimizer, groups in zip(self.optimizers, built):
        for group, new in zip(optimizer.param_groups, groups):
            group.update((key, value) for key, value in new.items() if key != 'params')
    for scheduler, shape in zip(self.schedulers, shapes):
        _replay(scheduler, shape, resume_state['iter'])
    said = ', '.join(sorted(changed))
    get_root_logger().warning('The option file differs from the training state (train.optim_*, train.scheduler), and '
                              f'applies from here on: {said}.')


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same, listed as tuples or as lists."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _replay(scheduler: Any, beginning: dict, current_iter: int) -> None:
    """Runs a scheduler from its start to an iteration: some compute each learning rate from the one before."""
    scheduler.load_state_dict(beginning)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about steps of the scheduler before those of the optimizer
        for _ in range(current_iter - 1):  # BasicSR makes no step before the first iteration
            scheduler.step()


@_around
def _on_its_device(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Some models ask for CUDA by name, whatever device the option file says."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OnCPU(TorchFunctionMode):

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.cuda:
                return args[0]
            kwargs = dict(kwargs or {})
            if kwargs.get('device') == 'cuda':
                kwargs['device'] = 'cpu'
            return func(*args, **kwargs)

    opt = args[0] if original.__name__ == '__init__' else self.opt
    with OnCPU() if opt['num_gpu'] == 0 else contextlib.nullcontext():
        return original(self, *args, **kwargs)


@_around
def _of_views(original: Callable, self: Any, data: dict) -> None:
    """VideoRecurrentModel squeezes its input in place; on a CPU, where nothing is copied, that would also change the
    ground truth that it is compared with.
    """
    original(self, {key: value.view_as(value) if key in ('lq', 'gt') else value for key, value in data.items()})


def _prefetched_errors(generator_class: type) -> None:
    """The thread of `prefetch_mode: cpu` ends at an error in reading, and the training waits for it forever."""

    class Failed:

        def __init__(self, error: BaseException) -> None:
            self.error = error

    run, get_next = generator_class.run, generator_class.__next__

    def run_and_tell(self) -> None:
        try:
            run(self)
        except BaseException as error:
            self.queue.put(Failed(error))

    def next_or_error(self) -> Any:
        item = get_next(self)
        if isinstance(item, Failed):
            raise item.error
        return item

    generator_class.run, generator_class.__next__ = run_and_tell, next_or_error


def _begun_once(prefetcher: type) -> None:
    """BasicSR begins to read the data, and begins again before the first batch.

    The first reader goes on beside the second: it fills its queue for nothing and, without workers, opens the same
    files through the same dataset at the same time, which fails now and then.
    """

    def __init__(self, loader: Any) -> None:
        self.ori_loader, self.loader = loader, None

    def next_(self) -> Any:
        if self.loader is None:
            self.reset()
        return next(self.loader, None)

    prefetcher.__init__, prefetcher.next = __init__, next_


@_around
def _used_on_this_stream(original: Callable, self: Any) -> Any:
    """CUDAPrefetcher fills tensors on a stream of its own, which may fill them again while they are still in use."""
    import torch
    batch = original(self)
    for value in (batch or {}).values():
        if isinstance(value, torch.Tensor) and value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
    return batch


def _sharing_backend(backend: type) -> type:
    """LMDB opens a database once in a process, but BasicSR for every dataset: for training and validation, say."""
    import lmdb
    opened: Any = weakref.WeakValueDictionary()

    def open_once(path: str, **kwargs: Any) -> Any:
        key = (os.getpid(), os.path.realpath(path), *sorted(kwargs.items()))
        environment = opened.get(key)
        try:
            environment.info()
        except (AttributeError, lmdb.Error):  # none yet, or one that has been closed
            environment = opened[key] = lmdb.open(path, **kwargs)
        return environment

    class SharingBackend(backend):

        def __init__(self, db_paths, client_keys='default', readonly=True, lock=False, readahead=False, **kwargs):
            self.db_paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
            keys = [client_keys] if isinstance(client_keys, str) else client_keys
            assert len(keys) == len(self.db_paths), (keys, self.db_paths)
            kwargs.update(readonly=readonly, lock=lock, readahead=readahead)
            self._client = {key: open_once(path, **kwargs) for key, path in zip(keys, self.db_paths)}

    return SharingBackend


@_around
def _of_contiguous(original: Callable, img: Any, kernel: Any) -> Any:
    """filter2D takes views, which images that lie channels last do not have; on a CPU padding leaves them so."""
    return original(img.contiguous(), kernel)


def _window_reverse(windows: Any, window_size: int, h: int, w: int) -> Any:
    """Windows (number of them * b, window_size, window_size, c) as an image (b, h, w, c), in SwinIR.

    Upstream's turns b into a constant, so that an exported SwinIR is wrong for every other batch size.
    """
    x = windows.view(-1, h // window_size, w // window_size, window_size, window_size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, windows.shape[-1])


def patch_basicsr() -> None:
    """Mends BasicSR's functions in place. Calling it again does nothing."""
    provide_missing_modules()
    import basicsr.test
    import basicsr.train
    from basicsr.archs import swinir_arch
    from basicsr.data import prefetch_dataloader
    from basicsr.models import base_model, realesrgan_model, realesrnet_model, video_base_model, video_recurrent_model
    from basicsr.utils import dist_util, file_client, img_process_util, misc, options, registry

    if getattr(options, 'patched_by_cdnsr_basicsr', False):
        return
    options.patched_by_cdnsr_basicsr = True

    warnings.filterwarnings('ignore', 'torch.meshgrid', UserWarning)  # SwinIR's, of a default that may change
    swinir_arch.window_reverse = _window_reverse
    filter2D = _of_contiguous(img_process_util.filter2D)
    for module in (img_process_util, realesrgan_model, realesrnet_model):
        module.filter2D = filter2D
    for model in (realesrgan_model.RealESRGANModel, realesrnet_model.RealESRNetModel):
        model.__init__ = _on_its_device(model.__init__)
        model.feed_data = _on_its_device(model.feed_data)
    for model in (video_base_model.VideoBaseModel, video_recurrent_model.VideoRecurrentModel):
        model.dist_validation = _on_its_device(model.dist_validation)
        model.feed_data = _of_views(model.feed_data)
    _prefetched_errors(prefetch_dataloader.PrefetchGenerator)
    _begun_once(prefetch_dataloader.CPUPrefetcher)
    prefetch_dataloader.CUDAPrefetcher.next = _used_on_this_stream(prefetch_dataloader.CUDAPrefetcher.next)
    registry.Registry.get = _get_quietly(registry.Registry.get)
    backends = file_client.FileClient._backends
    backends['lmdb'] = _sharing_backend(backends['lmdb'])
    options.ordered_yaml = _ordered_yaml
    options._postprocess_yml_value = force_yml_value  # upstream's evaluates lists
    options.osp = types.SimpleNamespace(**{**vars(os.path), 'expanduser': _expanduser_each})
    parse_options = _checked_parse_options(options.parse_options)
    init_dist = _init_dist_anywhere(dist_util.init_dist)
    options.parse_options = basicsr.train.parse_options = basicsr.test.parse_options = parse_options
    options.init_dist = dist_util.init_dist = init_dist
    mkdir_and_rename = _archive_time_of_its_own(misc.mkdir_and_rename)
    misc.mkdir_and_rename = basicsr.train.mkdir_and_rename = mkdir_and_rename
    basicsr.train.load_resume_state = _load_resume_state
    for name, key in (('save_network', 'models'), ('save_training_state', 'training_states')):
        setattr(base_model.BaseModel, name, _saved_when_complete(getattr(base_model.BaseModel, name), key))
    base_model.BaseModel.load_network = _load_network
    base_model.BaseModel.resume_training = _resumes_as_configured(base_model.BaseModel.resume_training)
    base_model.BaseModel.model_to_device = _model_to_any_device(base_model.BaseModel.model_to_device)
