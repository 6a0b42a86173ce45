"""Operations on the weights of other projects: renaming, counting, folding."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING, Optional, Sequence

from .registry import State

if TYPE_CHECKING:
    import torch
    from torch import nn

Table = Sequence[tuple[str, Optional[str]]]


def rename(state: State, table: Table) -> State:
    """Renames weights.

    Args:
        state: Weights by name.
        table: Patterns and new names; the first pattern that fits counts. <n> in a new name stands for n - 1, and None
            leaves a weight out. What fits none keeps its name.
    """
    renamed: State = {}
    for key, value in state.items():
        for pattern, new in table:
            if re.match(pattern, key):
                if new is not None:
                    name = re.sub(pattern, new, key)
                    renamed[re.sub(r'<(\d)>', lambda match: str(int(match.group(1)) - 1), name)] = value
                break
        else:
            renamed[key] = value
    return renamed


def part_of(state: State, prefix: str) -> State:
    """The weights whose names begin with a prefix, without it."""
    return {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}


def count(state: State, pattern: str, dim: int) -> int:
    """How many weights of `dim` dimensions have names that fit a pattern as a whole."""
    return sum(bool(re.fullmatch(pattern, key)) and value.dim() == dim for key, value in state.items())


def slice_to(state: State, net: nn.Module) -> State:
    """The first channels of a slimmable network's weights, as many as `net` has."""
    return {key: state[key][tuple(slice(0, size) for size in target.shape)] for key, target in net.state_dict().items()}


def upscale_of(state: State, prefix: str, width: int) -> int:
    """Upsampling factor of a sequence of convs, of `width` channels, and pixel shuffles."""
    factor = 1
    for key, value in state.items():
        if key.startswith(prefix) and value.dim() == 4:
            factor *= round((value.shape[0] / width)**0.5)
    return factor


def fold_mean_shift(state: State, first: str, last: str) -> tuple[State, list[float], tuple[str, ...]]:
    """Takes the 1x1 convs sub_mean and add_mean, which surround a network, into its first and last conv.

    M x + s before a zero-padded conv is (x - mean) with mean = -M^-1 s before a conv whose weights are W M: exact, as
    the padding is zero on both sides of M. Published code trains these convs by mistake, so they need not be the
    identity and the constant that they began as.

    Args:
        state: Weights with `sub_mean.weight` (3, 3, 1, 1), `sub_mean.bias` (3), and the same of add_mean.
        first: Name of the first conv.
        last: Name of the last conv.

    Returns:
        Weights without the two convs, for a network that subtracts a mean and adds it again; the mean; notes.
    """
    import torch
    outer = {key: state[key] for key in state if re.match('(sub|add)_mean', key)}
    state = {key: value for key, value in state.items() if key not in outer}
    before, shift, after, back = (
        outer[f'{name}_mean.{kind}'].double() for name in ('sub', 'add') for kind in ('weight', 'bias'))
    before, after, identity = before[..., 0, 0], after[..., 0, 0], torch.eye(len(shift)).double()
    mean = -torch.linalg.solve(before, shift)
    if torch.equal(before, identity) and torch.equal(after, identity) and torch.equal(shift, -back):
        return state, rounded(mean), ()
    weight, dtype = state[f'{first}.weight'], state[f'{first}.weight'].dtype
    state[f'{first}.weight'] = torch.einsum('oikl,ij->ojkl', weight.double(), before).to(dtype)
    mean = torch.tensor(rounded(mean)).double()
    weight, bias = state[f'{last}.weight'].double(), state[f'{last}.bias'].double()
    state[f'{last}.weight'] = torch.einsum('po,oikl->pikl', after, weight).to(dtype)
    state[f'{last}.bias'] = (after @ bias + back - mean).to(dtype)
    return state, mean.tolist(), ('its trained mean shifts were folded into the first and last conv', )


def rounded(values: torch.Tensor) -> list[float]:
    """float32 numbers as short decimal ones: 0.4488 instead of 0.4487999975681305."""
    return [float(f'{value:.7g}') for value in values.tolist()]
