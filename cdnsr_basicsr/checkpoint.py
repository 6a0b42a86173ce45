"""Self-describing checkpoints: BasicSR's weights plus what is needed to build the network."""
from __future__ import annotations

import json
import torch
from collections.abc import Mapping
from os import path as osp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from typing import Any, Optional, Union

from .files import replace_when_done
from .options import OptionError, check_network, one_line, read_options
from .zoo import find_checkpoint

ABOUT = ('network_g', 'scale')  # what a checkpoint says of itself


def save_checkpoint(content: dict, path: str) -> None:
    """Saves to a temporary file and renames it, so that a killed run leaves no half-written checkpoint.

    Args:
        content: `params`, `network_g`, `scale`, and in a .pth whatever else there is.
        path: A .pth, or a .safetensors, which holds `params` and, as its metadata, the other two.
    """
    with replace_when_done(path) as temporary:
        if osp.splitext(path)[1] != '.safetensors':
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # what it makes of a full disk
                raise OSError(f'the checkpoint cannot be written; is the disk full? ({one_line(error)})') from error
            return
        about = {key: json.dumps(content[key]) for key in ABOUT}
        tensors = {key: value.detach().clone().contiguous() for key, value in content['params'].items()}
        temporary.write_bytes(save(tensors, {'format': 'pt', **about}))  # save_file would hide it from other users


def read_safetensors(path: str) -> dict:
    """Content of a .safetensors file, laid out like that of a .pth."""
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            content: dict = {key: json.loads(metadata[key]) for key in ABOUT if key in metadata}
            content['params'] = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise OptionError(path, f'not a readable .safetensors file: {one_line(error)}') from error
    return content


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
        OptionError: The file is missing or no checkpoint.
    """
    path = find_checkpoint(path)
    if osp.splitext(path)[1] == '.safetensors':
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # what the unpickler raises on a broken file has no common type
        kind = type(error).__name__  # torch's own words advise to load it in an unsafe way
        raise OptionError(
            path, f'not a readable checkpoint ({kind}); accepted are files of weights that '
            'torch.load reads with weights_only=True') from error
    if not isinstance(content, dict):
        raise OptionError(path, f'expected a dict of weights, but got {type(content).__name__}')
    return content


def load_network(path: Optional[str], opt_path: Optional[str] = None) -> nn.Module:
    """The network of a checkpoint alone; see `load_described`."""
    return load_described(path, opt_path)[0]


def load_described(path: Optional[str], opt_path: Optional[str] = None) -> tuple[nn.Module, dict]:
    """Builds a network in evaluation mode from a checkpoint, with its EMA weights if there are any.

    Args:
        path: Checkpoint, or a model's name. Default: path.pretrain_network_g of the option file.
        opt_path: Option file whose network_g describes it; needed for files without a description of their own,
            such as those of BasicSR's SRModel.

    Returns:
        The network and its option block.

    Raises:
        OptionError: The file cannot be read, says nothing about its network, or holds weights of another one.
    """
    opt = read_options(opt_path) if opt_path else {}
    paths = opt.get('path') or {}
    if not isinstance(paths, Mapping):
        raise OptionError(f'{opt_path}: path', f'expected a block of options, but got {paths!r}')
    path = path or paths.get('pretrain_network_g')
    if not isinstance(path, str):
        raise OptionError(opt_path or '-m', 'names no checkpoint at path.pretrain_network_g; give one by -m')
    content = load_checkpoint(path)
    block: Union[dict, None] = opt.get('network_g') if opt_path else content.get('network_g')
    if block is None:
        raise OptionError(
            opt_path or path, 'has no network_g block; give the option file it was trained with by -opt, '
            'or make it describe itself by basicsr convert')
    return build(block, weights_of(content, path), opt_path or path, path), plain(block)


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
            opt_path, 'names no checkpoint for each of network_g.branches at '
            'path.pretrain_network_branches; give a CDNSR by -m')
    return [
        build(block, {} if path is None else weights_of(load_checkpoint(path), path), opt_path, path or opt_path)
        for block, path in zip(blocks, paths)
    ]


def weights_of(content: dict, path: str) -> dict[str, torch.Tensor]:
    """The weights in the content of a checkpoint, the EMA ones if there are any.

    Raises:
        OptionError: It holds none.
    """
    weights = content.get('params_ema', content.get('params'))
    if weights is None:
        raise OptionError(path, f"expected 'params' or 'params_ema', but found {', '.join(list(content)[:5])}")
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise OptionError(path, 'holds no weights: expected a dict of tensors')
    return {str(key)[7:] if str(key).startswith('module.') else str(key): value for key, value in weights.items()}


def build(block: Any, weights: dict[str, torch.Tensor], described_by: str, path: str) -> nn.Module:
    """Builds a network in evaluation mode from its option block and all of its weights.

    Args:
        block: network_g of the file `described_by`.
        weights: Weights of the file `path`.

    Raises:
        OptionError: The block describes no network, or one of other weights.
    """
    from basicsr.archs import build_network

    check_network(block, f'{described_by}: network_g')
    try:
        net = build_network(block)
    except Exception as error:  # wrong arguments of networks show in errors of any type
        raise OptionError(f'{described_by}: network_g', f'makes no network: {type(error).__name__}: '
                          f'{one_line(error)}') from error
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise OptionError(
            path, f'does not fit the network {block["type"]}: {str(error).splitlines()[1].strip()[:200]}') from None
    for name, weight in net.state_dict().items():
        if not torch.isfinite(weight).all():
            raise OptionError(path, f'holds values that are not finite in {name}; its training has failed')
    return net.eval()
