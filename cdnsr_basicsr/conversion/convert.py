"""Converts files that other projects have published, and one's own, to self-describing checkpoints."""
from __future__ import annotations

import importlib.util
import torch
from contextlib import suppress
from torch import nn
from typing import Any, Mapping, NamedTuple, Optional, cast

from basicsr.archs import build_network
from ..checkpoint import (
    build,
    load_by_option_file,
    load_checkpoint,
    load_described,
    plain,
    save_checkpoint,
    start_weights,
    weights_of,
)
from ..files import replace_when_done
from ..options import OptionError, one_line
from .plain import options_of, plain_branches, prove_equal, to_plain
from .registry import Found, Source, families
from .weights import slice_to


class Converted(NamedTuple):
    """What was converted.

    Attributes:
        net: The network, in evaluation mode.
        block: Its option block.
        family: That of `families`, or 'own' for a file that describes itself or is described by an option file.
        notes: What a user should know.
    """
    net: nn.Module
    block: dict[str, Any]
    family: str
    notes: tuple[str, ...]

    @property
    def scale(self) -> int:
        """Upsampling factor; some of BasicSR's archs call it scale."""
        return int(self.block.get('upscale', self.block.get('scale', 4)))


def recognise(content: dict[str, Any],
              path: str,
              family: str = 'auto',
              upscale: Optional[int] = None) -> tuple[str, Found]:
    """Finds out what network a file holds.

    Args:
        content: Of the checkpoint `path`.
        path: For messages.
        family: Name of a family, or 'auto' to try them all.
        upscale: Upsampling factor, of files that do not tell it. Default: 4.

    Raises:
        OptionError: It is of no known family.
    """
    source, misfit = Source(weights_of(content, path), content), None
    for name, candidate in families().items():
        if family in ('auto', name):
            try:
                if candidate.detect(source):
                    return name, candidate.load(source, upscale or 4)
            # of an incomplete network or a strange description
            except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError) as error:
                reason = f'has no {error}' if isinstance(error, KeyError) else one_line(error)
                misfit = misfit or OptionError(path, f'looks like {name}, but {reason}')  # another family may know it
    if misfit:
        raise misfit
    first = f'First keys: {", ".join(list(source.state)[:5])}'
    if family != 'auto':
        raise OptionError(path, f'is not of family {family}. {first}')
    projects = '; '.join(dict.fromkeys(known.projects for known in families().values()))
    others = 'give the option file that it was trained with: -opt FILE'
    if not importlib.util.find_spec('spandrel'):
        others += ", or, for community networks, pip install 'cdnsr-basicsr[spandrel]' (Python 3.10 or newer)"
    raise OptionError(path,
                      f'is of no known family; known: {", ".join(families())}: files of {projects}; {others}. {first}')


def load_network(path: Optional[str], opt_path: Optional[str] = None) -> nn.Module:
    """The network of a checkpoint of any kind alone; see `convert`."""
    return convert(path, opt_path=opt_path).net


def weights_for(net: nn.Module, path: str, key: Optional[str] = None) -> Mapping[str, torch.Tensor]:
    """The weights of a checkpoint to start a network from, under the network's names, also if it is of another project.

    Args:
        net: The network.
        path, key: See start_weights.

    Raises:
        OptionError: See there.
    """
    weights, names = start_weights(path, key), net.state_dict().keys()
    if names and names != weights.keys():
        with suppress(OptionError):
            renamed = recognise(load_checkpoint(path), path)[1].state
            return renamed if renamed.keys() == names else weights
    return weights


def convert(path: Optional[str],
            family: str = 'auto',
            opt_path: Optional[str] = None,
            num_feat: Optional[int] = None,
            upscale: Optional[int] = None) -> Converted:
    """Builds the network of a checkpoint, with all of its weights.

    Args:
        path: Checkpoint, own or of another project, or a model's name. Default: path.pretrain_network_g of the option
            file.
        family: Name of a family, or 'auto'.
        opt_path: Option file that describes the checkpoint, if it does not do so itself, such as BasicSR's own.
        num_feat: Width of the branch to take out of an ARM-Net. Default: all channels.
        upscale: Upsampling factor, of files that do not tell it. Default: 4.

    Raises:
        OptionError: The conversion failed; the message says why.
    """
    if family not in ('auto', *families()):
        raise OptionError(f'--from {family}', f'accepted: auto, {", ".join(sorted(families()))}')
    given = num_feat or upscale or family != 'auto'
    described = 'already has a description; family, width and scale are for files without one'
    if opt_path:
        if given:
            raise OptionError(path or opt_path, described)
        return Converted(*load_by_option_file(opt_path, path), 'own', ())
    if path is None:
        raise OptionError('-m', 'a checkpoint is needed')
    content = load_checkpoint(path)
    if family == 'auto' and 'network_g' in content:
        if given:
            raise OptionError(path, described)
        return Converted(*load_described(content, path), 'own', ())
    name, (block, state, notes) = recognise(content, path, family, upscale)
    if upscale and block['upscale'] != upscale:
        raise OptionError(path, f"is of scale x{block['upscale']}, not x{upscale}")
    if num_feat and num_feat != block.get('num_feat'):
        if name != 'arm':
            raise OptionError(
                path, 'has a single width; only an ARM-Net contains narrower networks '
                '(--from arm, if it is one)')
        if num_feat > block['num_feat']:
            raise OptionError(path, f"has no branch of width {num_feat}; the widest is {block['num_feat']}")
        block = dict(block, num_feat=num_feat)
        try:
            state = slice_to(state, build_network(block))
            notes = (*notes, f'the first {num_feat} channels were used')
        except (ValueError, RuntimeError) as error:
            raise OptionError(path, f'has no branch of width {num_feat}: {one_line(error)}') from error
    return Converted(build(block, state, path, path), plain(block), name, notes)


def made_plain(converted: Converted, path: str, clip: bool = False) -> Converted:
    """The equivalent of plain convs, for inference; of a routed network, all its branches that have one.

    Args:
        converted: What has been converted from `path`.
        clip: Whether the result clips its output to [0, 1].

    Raises:
        OptionError: No part has a plain form, or the result is not equal.
    """
    net, block, family, notes = converted
    plain_net: nn.Module
    try:
        if 'branches' in block:
            if clip:
                raise ValueError('a branch must not clip: its tiles are blended first')
            plain_net, plain_block = plain_branches(cast(Any, net), block)
        else:
            alone = to_plain(net, clip)
            prove_equal(net, alone, clip)
            plain_net, plain_block = alone, options_of(alone)
    except ValueError as error:
        raise OptionError(path, one_line(error)) from error
    if plain_block == block:
        raise OptionError(path, 'is already plain, or cannot be: expected ETDS, ECBSR or ABPN')
    return Converted(plain_net, plain(plain_block), family, (*notes, 'equality was checked on random images'))


def save(converted: Converted, path: str) -> None:
    """Writes a self-describing checkpoint, and checks that it loads, before it gets its name.

    Args:
        converted: What is to be written.
        path: A .pth or .safetensors.

    Raises:
        OptionError: It does not load with the same weights.
    """
    state = converted.net.state_dict()
    with replace_when_done(path) as temporary:
        save_checkpoint(dict(params=state, network_g=converted.block, scale=converted.scale), str(temporary))
        loaded = load_network(str(temporary)).state_dict()
        if any(not torch.equal(value, loaded[key]) for key, value in state.items()):
            raise OptionError(path, 'is not the same when read back from the file')


def describe(converted: Converted) -> str:
    """What was converted, in a few lines."""
    block = {key: value for key, value in converted.block.items() if key not in ('branches', 'classifier')}
    project = f' ({families()[converted.family].projects})' if converted.family in families() else ''
    lines = [f'{block["type"]} x{converted.scale}{project}: {arguments(block)}']
    for i, branch in enumerate(converted.block.get('branches', [])):
        lines.append(f'  branch {i}: {branch["type"]} {arguments(branch)}')
    weights = sum(value.numel() for value in converted.net.state_dict().values())
    return '\n'.join([*lines, f'{weights} weights, all of them used.', *(f'Note: {note}.' for note in converted.notes)])


def arguments(block: dict[str, Any]) -> str:
    """Arguments of an option block on a line."""
    return ', '.join(f'{key} {value}' for key, value in block.items() if key not in ('type', 'upscale'))
