"""ETDS, and ECBSR and ABPN as its authors publish them (CVPR 2023): files of weights that say nothing of their network.

ETDS has the names of this package, in training form and converted. ECBSR (re-parameterised) and ABPN count their
layers, so that a layer's name depends on the depth; they, and what they are converted to (_ET_), become PlainConvSR.
"""
from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Optional, cast

from .registry import Family, Found, Source, State, register
from .weights import Table, rename

if TYPE_CHECKING:
    from torch import nn

LAYER = re.compile(r'(backbone((?:\.\d+)+))\.(weight|bias)$')


def sequence_table(state: State) -> Table:
    """The names in PlainConvSR of layers that are counted, as ECBSR's and ABPN's are.

    Args:
        state: Weights named backbone.<position>.weight and .bias, in any order. A last 1x1 conv is that of the clip; a
            single vector is a PReLU's.
    """
    positions = {}
    for key in state:
        layer, position, kind = cast(re.Match[str], LAYER.match(key)).groups()
        if kind == 'weight':
            positions[layer] = [int(part) for part in position[1:].split('.')]
    layers = sorted(positions, key=positions.__getitem__)
    convs = [layer for layer in layers if state[f'{layer}.weight'].dim() == 4]
    acts = [layer for layer in layers if state[f'{layer}.weight'].dim() == 1]
    clips = bool(convs) and state[f'{convs[-1]}.weight'].shape[-1] == 1
    last = ['conv_last', 'conv_clip'] if clips else ['conv_last']
    names = ['conv_first', *(f'backbone_convs.{i}' for i in range(len(convs) - 1 - len(last))), *last]
    pairs = [*zip(convs, names), *((layer, f'acts.{i}') for i, layer in enumerate(acts))]
    return [(rf'^{re.escape(layer)}\.', f'{name}.') for layer, name in pairs]


def recognise(state: State) -> Optional[Found]:
    """Finds out by names and shapes which network weights belong to.

    Known are ETDS in training form and converted, with and without clip; ECBSR, re-parameterised, and ABPN, and both
    converted. Names and shapes of PlainConvSR do not say whether the input is added to the output: weights under ETDS's
    names are taken for a network that does not add it, ECBSR and ABPN without clip for networks that do.

    Args:
        state: Weights by name.

    Returns:
        The network, or None: these are no weights of such a one.
    """
    import torch

    from ..archs import ETDS, PlainConvSR
    from .plain import options_of
    counted = bool(state) and all(map(LAYER.match, state))
    if counted:
        state = rename(state, sequence_table(state))
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    first, last = (shapes.get(f'conv_{place}.weight', ()) for place in ('first', 'last'))
    if len(first) != 4 or len(last) != 4 or 0 in first or last[0] < first[1]:
        return None
    num_feat, num_in_ch, *_ = first
    widths = [(shapes.get(f'backbone_convs.{i}.weight') or (0, ))[0] for i in range(len(shapes))]
    widths = widths[:widths.index(0)]
    # as many outputs as inputs; the clip may have more channels than there are sub-pixels, but less than x(scale + 1)
    net: nn.Module
    block: dict[str, Any] = dict(num_in_ch=num_in_ch, num_out_ch=num_in_ch, upscale=math.isqrt(last[0] // num_in_ch))
    block.update(num_block=len(widths))
    try:
        with torch.device('meta'):
            if 'conv_residual_first.weight' in shapes:
                num_residual_feat = shapes['conv_residual_first.weight'][0]
                block.update(num_feat=num_feat + num_residual_feat, num_residual_feat=num_residual_feat)
                net, block = ETDS(**block), dict(block, type='ETDS')
            else:
                clip, act_type = 'conv_clip.weight' in shapes, 'prelu' if 'acts.0.weight' in shapes else 'relu'
                block.update(num_feat=[num_feat, *widths], act_type=act_type, residual=counted and not clip, clip=clip)
                net = plain = PlainConvSR(**block)
                block = options_of(plain)
    except (ValueError, RuntimeError):  # shapes that no such network has
        return None
    fits = shapes == {name: tuple(value.shape) for name, value in net.state_dict().items()}
    return Found(block, state) if fits else None


@register
class ETDSFamily(Family):
    """ETDS, and its ECBSR and ABPN: only names and shapes of all weights together tell them."""
    names = ('etds', 'ecbsr', 'abpn')
    projects = 'ETDS, and its ECBSR and ABPN'
    files = '`ETDS_*.pth`, `ECBSR_*.pth`, `ABPN_*.pth`, converted (`_ET_`) or not'

    def detect(self, source: Source) -> bool:
        return recognise(source.state) is not None

    def load(self, source: Source, upscale: int) -> Found:
        found = recognise(source.state)
        assert found is not None
        return found
