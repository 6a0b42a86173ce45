"""Self-describing checkpoints: BasicSR's weights plus what is needed to build the network."""
from __future__ import annotations

import hashlib
import inspect
import json
import os
import torch
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from os import path as osp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from typing import Any, Iterator, Optional

from .files import replace_when_done
from .inference.network import geometry
from .options import OptionError, check_network, find_type, one_line, read_options
from .registration import taken_from_basicsr
from .zoo import find_checkpoint

OURS = __name__.split('.')[0]
ABOUT = ('network_g', 'scale')  # what a checkpoint says of itself
DESCRIPTION = 'network_g'  # among the weights of a CDNSR
CHECKSUM = 'sha256'  # in the metadata of a .safetensors, which has no checksums of its own
WRAPPERS = ('params_ema', 'params', 'state_dict', 'model_state_dict', 'model', 'sd')  # what weights are found under
PREFIXES = ('module.', '_orig_mod.')  # that DistributedDataParallel and torch.compile put before names of weights
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)  # counters and indices among the buffers
MOST_UNPACKED = 2**28  # bytes that compressed records may unpack to; torch.save compresses nothing
MOST_SHARED = 16  # times that a stored number may be used; more would be weights out of nothing
MOST_SCALE = 64
SMALL = 2**12  # values of a tensor
MOST_DEPTH, MOST_VALUES, MOST_LETTERS = 16, 10000, 200  # of a description
# BasicSR's archs that make a larger image of one image. The others are for video, faces, noise, flow or features
UPSCALE_IMAGES = ('ECBSR', 'EDSR', 'MSRResNet', 'RCAN', 'RRDBNet', 'SRVGGNetCompact', 'SwinIR')


def save_checkpoint(content: dict, path: str) -> None:
    """Saves to a temporary file and renames it, so that a killed run leaves no half-written checkpoint.

    The weights of a CDNSR network get its description among them, for programs that read nothing but weights.

    Args:
        content: `params`, `network_g`, `scale`, and in a .pth whatever else there is.
        path: A .pth, or a .safetensors, which holds `params` and, as its metadata, the other two.
    """
    if isinstance(content.get('network_g'), Mapping) and content['network_g'].get('type') == 'CDNSR':
        described = {DESCRIPTION: description_of(content['network_g'])}
        content = {key: {**value, **described} if key in WRAPPERS else value for key, value in content.items()}
    with replace_when_done(path) as temporary:
        if osp.splitext(path)[1] != '.safetensors':
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # what it makes of a full disk
                raise OSError(f'the checkpoint cannot be written; is the disk full? ({one_line(error)})') from error
            return
        about = {key: json.dumps(content[key]) for key in ABOUT}
        tensors = {key: value.detach().clone().contiguous() for key, value in content['params'].items()}
        about[CHECKSUM] = digest(tensors, about)
        temporary.write_bytes(save(tensors, {'format': 'pt', **about}))  # save_file would hide it from other users


def description_of(block: Mapping) -> torch.Tensor:
    """An option block as a tensor: the bytes of its JSON."""
    return torch.tensor(list(json.dumps(plain(block)).encode()), dtype=torch.uint8)


def described_by(tensor: torch.Tensor) -> Any:
    """The option block that `description_of` has made a tensor of.

    Raises:
        ValueError: It has not.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > MOST_VALUES * MOST_LETTERS:
        raise ValueError('contains no description of a network')
    return json.loads(bytes(tensor.tolist()))


def digest(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> str:
    """SHA-256 of weights and their description."""
    sha256 = hashlib.sha256(json.dumps([about.get(key) for key in ABOUT]).encode())
    for key in sorted(tensors):
        sha256.update(f'{key} {tensors[key].dtype} {tuple(tensors[key].shape)}'.encode())
        sha256.update(tensors[key].contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def read_safetensors(path: str) -> dict:
    """Content of a .safetensors file, laid out like that of a .pth."""
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            content: dict = {key: json.loads(metadata[key]) for key in ABOUT if key in metadata}
            content['params'] = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise OptionError(path, f'not a readable .safetensors file: {one_line(error)}') from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != digest(content['params'], metadata):
        raise OptionError(path, f'is damaged: its content has changed (its {CHECKSUM} differs)')
    return content


def read_pth(path: str) -> Any:
    """Content of a .pth file, without running code from it."""
    with open(path, 'rb') as file:
        if file.read(4) == b'PK\3\4':  # not of torch before 1.6
            check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of kinds of tensors that are refused later
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # what the unpickler raises on a broken file has no common type
        kind = type(error).__name__  # torch's own words advise to load it in an unsafe way
        raise OptionError(
            path, f'not a readable checkpoint ({kind}); accepted: files of weights that '
            'torch.load reads with weights_only=True') from error


def check_archive(path: str) -> None:
    """Verifies the checksums of a file that torch.save has written; torch.load does not.

    Raises:
        OptionError: The file is damaged, or unpacks to very much more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            unpacked = sum(record.file_size for record in records if record.compress_type != zipfile.ZIP_STORED)
            if unpacked > MOST_UNPACKED:
                raise OptionError(
                    path, f'is compressed and would unpack to {unpacked} bytes; accepted: at most '
                    f'{MOST_UNPACKED}, or uncompressed files as torch.save writes them')
            packed = sum(record.compress_size for record in records)
            if packed > os.path.getsize(path):
                raise OptionError(path, f'is damaged: its records would have {packed} bytes')
            damaged = archive.testzip()
    except OptionError:
        raise
    except Exception as error:  # of any type, as the damage wants it
        raise OptionError(path, f'is damaged: {one_line(error) or type(error).__name__}') from error
    if damaged is not None:
        raise OptionError(path, f'is damaged: {damaged} has changed (its checksum differs)')


def plain(value: Any) -> Any:
    """An option block as plain dicts, lists and scalars, which torch.load accepts with weights_only=True."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def load_checkpoint(path: str) -> dict:
    """Loads a checkpoint onto the CPU without running code from it.

    Args:
        path: A file, or a model's name; see find_checkpoint.

    Raises:
        OptionError: The file is missing, damaged or no checkpoint.
    """
    path = find_checkpoint(path)
    if not os.path.getsize(path):
        raise OptionError(path, 'is empty')
    content = read_safetensors(path) if osp.splitext(path)[1] == '.safetensors' else read_pth(path)
    if not isinstance(content, dict):
        raise OptionError(path, f'expected a dict of weights, but got {type(content).__name__}')
    return content


def load_described(content: dict, path: str) -> tuple[nn.Module, dict]:
    """Builds a network in evaluation mode from a checkpoint that describes it, with its EMA weights if there are any.

    Args:
        content: Of the checkpoint `path`.
        path: For messages.

    Returns:
        The network and its option block.

    Raises:
        OptionError: It describes no network that upscales, or holds weights of another one.
    """
    block = content['network_g']
    net = build(block, weights_of(content, path), path, path)
    check_scale(content, block, path)
    return net, plain(block)


def load_by_option_file(opt_path: str, path: Optional[str] = None) -> tuple[nn.Module, dict]:
    """As load_described, of a checkpoint that an option file describes, such as those of BasicSR's SRModel.

    Args:
        opt_path: Option file whose network_g describes it.
        path: Checkpoint, or a model's name. Default: path.pretrain_network_g of the option file.
    """
    opt = read_options(opt_path)
    paths = opt.get('path') or {}
    if not isinstance(paths, Mapping):
        raise OptionError(f'{opt_path}: path', f'expected a block of options, but got {paths!r}')
    path = path or paths.get('pretrain_network_g')
    if not isinstance(path, str):
        raise OptionError(opt_path, 'names no checkpoint at path.pretrain_network_g; give one with -m')
    if opt.get('network_g') is None:
        raise OptionError(opt_path, 'has no network_g block')
    return build(opt['network_g'], weights_of(load_checkpoint(path), path), opt_path, path), plain(opt['network_g'])


def load_branches(opt_path: str) -> list[nn.Module]:
    """Builds the branches of a CDNSR in evaluation mode from path.pretrain_network_branches of its option file.

    Raises:
        OptionError: The option file names none, or they cannot be built or loaded.
    """
    opt = read_options(opt_path)
    blocks, paths = [
        opt[block].get(key) if isinstance(opt.get(block), Mapping) else None
        for block, key in (('network_g', 'branches'), ('path', 'pretrain_network_branches'))
    ]
    fit = isinstance(blocks, list) and isinstance(paths, list) and len(blocks) == len(paths)
    if not fit or not all(path is None or isinstance(path, str) for path in paths):
        raise OptionError(
            opt_path, 'does not name a checkpoint for each of network_g.branches at '
            'path.pretrain_network_branches; give a CDNSR with -m')
    return [
        build(block, {} if path is None else weights_of(load_checkpoint(path), path), opt_path, path or opt_path)
        for block, path in zip(blocks, paths)
    ]


def weights_of(content: dict, path: str, key: Optional[str] = None) -> dict[str, torch.Tensor]:
    """The weights in the content of a checkpoint, whatever they are wrapped in; the EMA ones if there are any.

    Args:
        content: Of the checkpoint `path`.
        key: What to look under first.

    Returns:
        Weights by name, in float32; the others are counters and indices.

    Raises:
        OptionError: It holds none, or tensors that are no weights.
    """
    state: Any = content
    for _ in range(4):
        if not isinstance(state, dict):
            raise OptionError(path, 'contains no weights: expected a dict of tensors')
        names = [name for name in (key, *WRAPPERS) if not isinstance(state.get(name), (torch.Tensor, type(None)))]
        if not names:
            break
        state = state[names[0]]
    tensors = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    if state is content and not (state and tensors):
        raise OptionError(path, f"expected 'params' or 'params_ema', but found {names_of(content)}")
    if not tensors:
        raise OptionError(path, 'contains no weights: expected a dict of tensors')
    weights = {}
    for name, value in state.items():
        if not (isinstance(name, str) and len(name) <= MOST_LETTERS and name.isprintable()):
            raise OptionError(path, f'contains no weights: expected names of layers, but got {repr(name)[:50]}')
        if name == DESCRIPTION:
            continue
        for prefix in PREFIXES:
            name = name[len(prefix):] if name.startswith(prefix) else name
        check_tensor(name, value, path)
        weights[name] = value.detach().to(torch.float32) if value.is_floating_point() else value
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if sum(value.numel() * value.itemsize for value in state.values()) > MOST_SHARED * sum(stored.values()):
        raise OptionError(path, 'contains no weights: its tensors are larger than their stored data')
    return weights


def names_of(content: dict) -> str:
    """A few of the names that a checkpoint holds, in a line."""
    return ', '.join(' '.join(str(name).split())[:50] for name in list(content)[:5]) or 'nothing'


def check_tensor(name: str, value: torch.Tensor, path: str) -> None:
    """Refuses tensors that cannot be a network's weights."""
    kind = str(value.dtype).rsplit('.', 1)[-1]
    if value.layout != torch.strided or value.is_nested:
        kind = f'sparse or nested {kind}'
    elif value.is_quantized:
        kind = f'quantised {kind}'
    elif value.device.type != 'cpu':
        kind = f'{kind} without values'
    elif value.dtype in (*FLOATS, *WHOLE):
        return
    accepted = ', '.join(str(dtype).rsplit('.', 1)[-1] for dtype in FLOATS)
    raise OptionError(path, f'{name} is {kind}; accepted are dense tensors of {accepted}')


def start_weights(path: str, key: Optional[str] = None) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint to start from, of any network; see `weights_of`.

    Raises:
        OptionError: It cannot be read, or they are not finite.
    """
    weights = weights_of(load_checkpoint(path), path, key)
    check_finite(weights, path)
    return weights


def check_pretrained(paths: Mapping[str, Any]) -> None:
    """Refuses checkpoints to start from that cannot be found or loaded.

    Args:
        paths: The block `path` of an option file.
    """
    for key, value in paths.items():
        if 'pretrain_network' not in str(key) or value is None:
            continue
        param_key = paths.get(str(key).replace('pretrain_network', 'param_key'))
        for item in value if isinstance(value, list) else [value]:
            if item is None:  # a branch without weights
                continue
            if not isinstance(item, str):
                raise OptionError(f'path.{key}', f'expected a checkpoint, but got {item!r}')
            try:
                start_weights(item, param_key if isinstance(param_key, str) else None)
            except OptionError as error:
                raise OptionError(f'path.{key}', str(error)) from error


def check_finite(weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Refuses weights that are infinite or NaN."""
    name = not_finite(weights)
    if name is not None:
        raise OptionError(path, f'contains values that are not finite in {name}; its training has failed')


def not_finite(weights: Mapping[str, torch.Tensor]) -> Optional[str]:
    """The name of the first weights that are infinite or NaN, or None; waits for the device once."""
    finite = torch.stack([torch.isfinite(weight).all() for weight in weights.values()] or [torch.tensor(True)])
    return None if finite.all() else list(weights)[finite.tolist().index(False)]


def check_described(block: Any, where: str) -> None:
    """Refuses a description with other than plain values, or longer than any network's: a file can contain an endless
    one.

    Raises:
        OptionError: Before anything has gone through it by recursion.
    """
    rest, values = [(block, 0)], 0
    while rest:
        value, depth = rest.pop()
        values += 1
        if isinstance(value, (Mapping, list, tuple)):
            if values + len(value) > MOST_VALUES or depth == MOST_DEPTH:
                raise OptionError(
                    where, f'describes no network: it is nested more than {MOST_DEPTH} levels deep or '
                    f'has more than {MOST_VALUES} values')
            items = [*value, *value.values()] if isinstance(value, Mapping) else value
            rest += [(item, depth + 1) for item in items]
        elif not isinstance(value, (str, int, float, type(None))):
            raise OptionError(where, f'describes no network: contains a value of type {type(value).__name__}')
        elif isinstance(value, str) and not (len(value) <= MOST_LETTERS and value.isprintable()):
            raise OptionError(where, f'describes no network: contains a text of {len(value)} or unprintable characters')
        elif isinstance(value, int) and abs(value) > 2**63:
            raise OptionError(where, 'describes no network: contains a number of more than 63 bits')


def check_scale(content: dict, block: Mapping, path: str) -> None:
    """Refuses a scale that is invalid, or not that of the network in the same file."""
    if 'scale' not in content:
        return
    scale, upscale = content['scale'], block.get('upscale', block.get('scale'))
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not 1 <= scale <= MOST_SCALE:
        raise OptionError(path, f'scale: expected a number from 1 to {MOST_SCALE}, but got {repr(scale)[:50]}')
    if upscale not in (None, scale):
        raise OptionError(path, f'scale: is {scale}, but its network_g is x{upscale}')


def check_upscales(block: Mapping, where: str) -> None:
    """Refuses networks, and branches of networks, that do not turn one image into a larger one.

    Nothing is known of archs of other plugins; see `try_upscaling`.
    """
    from basicsr.utils.registry import ARCH_REGISTRY
    arch = find_type(ARCH_REGISTRY, block, where)
    package, takes = arch.__module__.split('.')[0], inspect.signature(arch).parameters
    if package == OURS or arch in taken_from_basicsr:
        upscales = 'upscale' in takes
    else:
        upscales = package != 'basicsr' or arch.__name__ in UPSCALE_IMAGES
    if not upscales:
        raise OptionError(f'{where}.type', f'{block["type"]} is not a network that enlarges an image')
    branches = block.get('branches')
    for i, branch in enumerate(branches if isinstance(branches, list) else ()):
        check_upscales(branch, f'{where}.branches[{i}]')


def try_upscaling(net: nn.Module, where: str) -> None:
    """Refuses a network of an unknown arch if it does not turn an image into a larger one."""
    for part in (net, *getattr(net, 'branches', ())):
        if type(part).__module__.split('.')[0] not in ('basicsr', OURS):
            try:
                geometry(part)
            except Exception as error:  # of any type, as the network puts it
                raise OptionError(f'{where}.type', one_line(error)) from error


class WithoutMemory(TorchFunctionMode):
    """Within it, the larger tensors that networks are made of have shapes only, as on the device meta. The smaller ones
    keep their values, which some archs compute with: SwinIR its depths, ECBSR its scales."""
    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES and kwargs.get('device') is None:
            outline = func(*args, **{**kwargs, 'device': 'meta'})
            if outline.numel() > SMALL:
                return outline
        return func(*args, **kwargs)


@contextmanager
def no_larger_than(weights: Mapping[str, torch.Tensor], misfit: OptionError) -> Iterator[None]:
    """Stops the construction of a network that has far more parameters than these weights."""
    # some is built and thrown away, some is shared or computed
    most = [4 * len(weights) + 1000, 4 * sum(value.numel() for value in weights.values()) + 10**7]

    def count(parent: nn.Module, name: str, weight: Optional[nn.Parameter]) -> None:
        most[0] -= 1
        most[1] -= 0 if weight is None else weight.numel()
        if min(most) < 0:
            raise misfit

    hook = torch_module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def load_weights(net: nn.Module,
                 weights: Mapping[str, torch.Tensor],
                 name: str,
                 path: str,
                 strict: bool = True) -> None:
    """Loads weights into a network.

    Raises:
        OptionError: They are those of another network.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # an outline takes over nothing
            net.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        lines = str(error).splitlines()[1:] or [str(error)]
        raise OptionError(path, f'does not fit the network {name}: {lines[0].strip()[:200]}') from None
    for key, value in net.state_dict().items():
        if key in weights and value.is_floating_point() != weights[key].is_floating_point():
            kinds = [str(tensor.dtype).rsplit('.', 1)[-1] for tensor in (value, weights[key])]
            raise OptionError(path, f'does not fit the network {name}: {key} is {kinds[1]}, not {kinds[0]}')


def build(block: Any, weights: dict[str, torch.Tensor], described_by: str, path: str) -> nn.Module:
    """Builds a network that upscales in evaluation mode from its option block and all of its weights.

    Its shapes are compared with those of the weights before anything of its size is allocated.

    Args:
        block: network_g of the file `described_by`.
        weights: Weights of the file `path`.

    Raises:
        OptionError: The block describes no network that upscales, or one of other weights.
    """
    from basicsr.archs import build_network

    where = f'{described_by}: network_g'
    check_described(block, where)
    check_upscales(block, where)
    check_network(block, where)
    misfit = OptionError(
        path, f'does not fit the network {block["type"]}: it would have many more weights than the '
        f'{len(weights)} tensors of the file')
    try:
        with no_larger_than(weights, misfit):
            try:
                with WithoutMemory():
                    outline = build_network(block)
            except OptionError:
                raise
            except Exception:  # an arch that wants to see values; or it has wrong arguments, and the next line raises
                outline = None
            if outline is not None:
                load_weights(outline, weights, block['type'], path)
            net = build_network(block)
    except OptionError:
        raise
    except Exception as error:  # wrong arguments of networks show in errors of any type
        raise OptionError(where, f'does not make a network: {type(error).__name__}: {one_line(error)}') from error
    load_weights(net, weights, block['type'], path)
    check_finite(net.state_dict(), path)
    try_upscaling(net.eval(), where)
    return net
