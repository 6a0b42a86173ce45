"""Networks as plain convs (equivalent transformation).

Paper: Equivalent Transformation and Dual Stream Network Construction for Mobile Image Super-Resolution (CVPR 2023).
"""
from __future__ import annotations

import copy
import torch
from torch import nn
from typing import Any, Mapping, NamedTuple, Optional

from basicsr.archs.ecbsr_arch import ECBSR
from ..archs import CDNSR, ETDS, PlainConvSR

TOLERANCE = 1e-4  # a fortieth of a gray level
SIZES = ((1, 1), (3, 17), (23, 8), (31, 33))  # of the images that networks are compared on


class _Layers(NamedTuple):
    """What a network computes: 3x3 convs, activations between them, a pixel shuffle."""
    convs: list[tuple[torch.Tensor, torch.Tensor]]  # weight and bias
    slopes: Optional[list[torch.Tensor]]  # of the PReLUs; None: ReLUs
    residual: bool  # whether the repeated input is added
    upscale: int


def _layers(net: nn.Module) -> _Layers:
    if isinstance(net, ETDS):
        return _Layers(net.plain_layers(), None, False, net.upscale)
    if isinstance(net, PlainConvSR):
        convs = [(conv.weight, conv.bias) for conv in (net.conv_first, *net.backbone_convs, net.conv_last)]
        if net.clip:
            fold = copy.deepcopy(net)
            fold.set_clip()
            if not all(map(torch.equal, net.conv_clip.parameters(), fold.conv_clip.parameters())):
                raise ValueError('conv_clip does more than clip')
            weight, bias = (tensor[:net.num_sub_pixels] for tensor in convs[-1])
            convs[-1] = (-weight, 1 - bias)
        slopes: Optional[list[Any]] = [act.weight for act in net.acts] if net.act_type == 'prelu' else None
        return _Layers(convs, slopes, net.residual, net.upscale)
    if isinstance(net, ECBSR):
        blocks, slopes = list(net.backbone), None
        kind = blocks[0].act_type
        if kind not in ('prelu', 'relu', 'rrelu', 'linear'):
            raise ValueError(f'ECBSR with act_type {kind} is not a network of ReLUs or PReLUs')
        if kind == 'prelu':
            slopes = [block.act.weight for block in blocks[:-1]]
        elif kind == 'linear':
            slopes = [torch.ones_like(block.conv3x3.bias) for block in blocks[:-1]]
        # in evaluation, the slope of rrelu is the mean of -0.05 and 0.05
        return _Layers([block.rep_params() for block in blocks], slopes, True, net.scale)
    raise ValueError(f'{type(net).__name__} cannot be made plain; accepted: ETDS, ECBSR, PlainConvSR')


@torch.no_grad()
def to_plain(net: nn.Module, clip: bool = False, multiple: int = 4) -> PlainConvSR:
    """The network of plain convs that computes the same on images in [0, 1].

    The input of a network that adds it to its output is carried through all layers in channels of its own. Widths are
    filled up with zeros, between the network's channels and the carried ones.

    Args:
        net: ETDS, PlainConvSR (ABPN or a re-parameterised ECBSR, with residual=True), or BasicSR's ECBSR.
        clip: Whether the result clips its output to [0, 1]. Default: as the network itself, unclipped; where the
            network has a clip, it is taken out.
        multiple: What widths are filled up to a multiple of. The published converted networks have 4.

    Raises:
        ValueError: The network is of another kind.
    """
    convs, slopes, residual, upscale = _layers(net)
    colors, sub_pixels = convs[0][0].shape[1], convs[-1][0].shape[0]
    carried = colors if residual else 0
    widths = [-(-(len(bias) + carried) // multiple) * multiple for _, bias in convs[:-1]]
    plain = PlainConvSR(
        num_in_ch=colors,
        num_out_ch=sub_pixels // upscale**2,
        upscale=upscale,
        num_feat=widths,
        num_block=len(widths) - 1,
        act_type='relu' if slopes is None else 'prelu',
        clip=clip).to(convs[0][0])
    layers: list[Any] = [plain.conv_first, *plain.backbone_convs, plain.conv_last]
    for conv, (weight, bias) in zip(layers, convs):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        conv.weight[:weight.shape[0], :weight.shape[1]] = weight
        conv.bias[:len(bias)] = bias
        if residual and conv is not plain.conv_last:
            conv.weight[-carried:, -carried:, 1, 1].fill_diagonal_(1)
    for act, slope in zip(list[Any](plain.acts), slopes or ()):
        nn.init.zeros_(act.weight)  # the carried input has no negative values
        act.weight[:len(slope)] = slope
    last: Any = plain.conv_last
    if residual:
        last.weight[:sub_pixels, -colors:, 1, 1] = torch.eye(colors).repeat_interleave(sub_pixels // colors, dim=0)
    if clip:
        last.weight.neg_()
        last.bias.neg_().add_(1)
        plain.set_clip()
    return plain.train(net.training)


def options_of(net: PlainConvSR) -> dict[str, Any]:
    """The option block that builds a network like this one."""
    widths = [conv.out_channels for conv in (net.conv_first, *net.backbone_convs)]
    return {
        'type': 'PlainConvSR',
        'num_in_ch': net.conv_first.in_channels,
        'num_out_ch': net.num_sub_pixels // net.upscale**2,
        'upscale': net.upscale,
        'num_feat': widths[0] if len(set(widths)) == 1 else widths,
        'num_block': len(net.backbone_convs),
        'act_type': net.act_type,
        'residual': net.residual,
        'clip': net.clip,
    }


@torch.no_grad()
def prove_equal(source: nn.Module, plain: PlainConvSR, clip: bool = False) -> None:
    """Compares two networks, in evaluation, on random images and on ones of black and white pixels, of several sizes.

    Args:
        source: Network that has been converted.
        plain: The converted network.
        clip: Whether `plain` clips its output to [0, 1]; that of `source` is clipped for the comparison then. (If it is
            the source that clips, that of `plain` is.)

    Raises:
        ValueError: They differ by more than 1e-4.
    """
    nets, weight = [copy.deepcopy(net).eval() for net in (source, plain)], plain.conv_first.weight
    clipped = (clip, getattr(source, 'clip', False) and not clip)
    generator = torch.Generator().manual_seed(0)
    for height, width in SIZES:
        x = torch.rand(2, weight.shape[1], height, width, generator=generator)
        x[1].round_()
        outputs = [net(x.to(weight)) for net in nets]
        expected, found = (output.clamp(0, 1) if clips else output for output, clips in zip(outputs, clipped))
        difference = (expected - found).abs().max().item()
        if not difference <= TOLERANCE:  # nor is anything that is no number
            raise ValueError(f'{type(source).__name__} and its plain form differ by {difference:.2g} on '
                             f'{height}x{width} pixels; at most {TOLERANCE} is accepted')


def plain_branches(net: CDNSR, network_g: Mapping[str, Any]) -> tuple[CDNSR, dict[str, Any]]:
    """Makes the branches of a routed network plain, without clip, where that can be done and has not been.

    Args:
        net: Stays as it is.
        network_g: Its option block; stays as it is.

    Returns:
        A copy of the network with the plain branches, and its option block.

    Raises:
        ValueError: A branch and its plain form differ.
    """
    net, network_g = copy.deepcopy(net), dict(network_g, branches=list(network_g['branches']))
    for i, branch in enumerate(net.branches):
        if isinstance(branch, (ETDS, ECBSR)) or isinstance(branch, PlainConvSR) and branch.residual:
            net.branches[i] = plain = to_plain(branch)
            prove_equal(branch, plain)
            network_g['branches'][i] = options_of(plain)
    return net, network_g
