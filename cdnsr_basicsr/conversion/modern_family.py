"""SPAN (CVPRW 2024), SPANV2 (NTIRE 2026) and SMFANet (ECCV 2024), as their repositories and challenges publish them."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .registry import Family, Found, Source, register
from .weights import Table, count, rename

if TYPE_CHECKING:
    import torch

SPAN: Table = [
    (r'^conv_1\.', 'conv_first.'),
    (r'^block_(\d)\.c(\d)_r\.', r'body.<\1>.conv\2.'),
    (r'^conv_2\.', 'conv_after_body.'),
    (r'^upsampler\.0\.', 'conv_last.'),
]
FOLDED: Table = [(r'(.*)\.eval_conv\.', r'\1.conv.')]
UNFOLDED: Table = [
    (r'.*\.eval_conv\.', None),  # made anew of the others at every evaluation
    (r'(.*)\.conv\.0\.', r'\1.expand.'),
    (r'(.*)\.conv\.1\.', r'\1.spatial.'),
    (r'(.*)\.conv\.2\.', r'\1.squeeze.'),
    (r'(.*)\.sk\.', r'\1.skip.'),
]
SPANV2: Table = [
    (r'^block_(\d)\.c(\d)\.conv\.', r'body.<\1>.conv\2.'),
    (r'^block_(\d)\.guidance_map_conv\.', r'body.<\1>.guidance.'),
    (r'^depthwise_conv\.', 'conv_depthwise.'),
    (r'^pointwise_conv\.', 'conv_last.'),
]
SMFANET: Table = [
    (r'^to_feat\.', 'conv_first.'),
    (r'^to_img\.0\.', 'conv_last.'),
    (r'^feats\.(\d+)\.smfa\.linear_0\.', r'body.\1.smfa.conv_first.'),
    (r'^feats\.(\d+)\.smfa\.linear_1\.', r'body.\1.smfa.conv_modulation.'),
    (r'^feats\.(\d+)\.smfa\.linear_2\.', r'body.\1.smfa.conv_last.'),
    (r'^feats\.(\d+)\.smfa\.lde\.conv_0\.0\.', r'body.\1.smfa.local_detail.conv_depthwise.'),
    (r'^feats\.(\d+)\.smfa\.lde\.conv_0\.1\.', r'body.\1.smfa.local_detail.conv1.'),
    (r'^feats\.(\d+)\.smfa\.lde\.conv_1\.', r'body.\1.smfa.local_detail.conv2.'),
    (r'^feats\.(\d+)\.smfa\.dw_conv\.', r'body.\1.smfa.conv_depthwise.'),
    (r'^feats\.(\d+)\.smfa\.belt', r'body.\1.smfa.beta'),
    (r'^feats\.(\d+)\.smfa\.alpha', r'body.\1.smfa.alpha'),
    (r'^feats\.(\d+)\.pcfn\.conv_0\.', r'body.\1.pcfn.conv_first.'),
    (r'^feats\.(\d+)\.pcfn\.conv_1\.', r'body.\1.pcfn.conv_partial.'),
    (r'^feats\.(\d+)\.pcfn\.conv_2\.', r'body.\1.pcfn.conv_last.'),
]
IMG_RANGE = 255.
RGB_MEAN = (0.4488, 0.4371, 0.4040)


def _block(arch: str, first: torch.Tensor, sub_pixels: torch.Tensor, num_block: int) -> dict[str, Any]:
    """The option block of a network, by the weight of its first conv and that of the one before the pixel shuffle."""
    num_feat, num_in_ch = first.shape[:2]
    upscale = math.isqrt(len(sub_pixels) // num_in_ch)
    if upscale < 1 or num_in_ch * upscale**2 != len(sub_pixels):
        raise ValueError(f'{len(sub_pixels)} sub-pixels do not make an integer scale for {num_in_ch} channels')
    return dict(
        type=arch, num_in_ch=num_in_ch, num_out_ch=num_in_ch, num_feat=num_feat, num_block=num_block, upscale=upscale)


@register
class SPANFamily(Family):
    """SPAN, folded or in its training form."""
    names = ('span', )
    projects = 'SPAN'
    files = 'its checkpoints in either form; folded ones get `deploy: true`'

    def detect(self, source: Source) -> bool:
        return {'conv_cat.weight', 'upsampler.0.weight'} <= set(source.state)

    def load(self, source: Source, upscale: int) -> Found:
        import torch
        state = source.state
        folded = 'conv_1.sk.weight' not in state
        name = 'conv_1.eval_conv.weight' if folded else 'conv_1.sk.weight'
        num_block = count(state, r'block_\d\.c1_r\.' + ('eval_conv' if folded else 'sk') + r'\.weight', 4)
        block = _block('SPAN', state[name], state['upsampler.0.weight'], num_block)
        # files of other projects have a mark of this name if they see pixels as they are
        img_range, mean = (1., (0., ) * 3) if 'no_norm' in state else (IMG_RANGE, RGB_MEAN)
        block.update(img_range=img_range, rgb_mean=list(mean), deploy=folded)
        state = {key: value for key, value in state.items() if key != 'no_norm'}
        state = rename(rename(state, FOLDED if folded else UNFOLDED), SPAN)
        if folded:  # the range of pixels is part of the weights
            weight = state['conv_first.conv.weight']
            state['conv_first.conv.weight'] = weight * img_range
        else:  # the published network makes pixels from 0 to 1 in its last conv
            weight, bias = state['conv_last.weight'], state['conv_last.bias']
            colors = torch.tensor(mean) if block['num_in_ch'] == 3 else torch.tensor([sum(mean) / 3])
            shift = colors.repeat_interleave(len(bias) // len(colors))
            state['conv_last.weight'], state['conv_last.bias'] = weight * img_range, (bias - shift) * img_range
        return Found(block, state)


class _Renamed(Family):
    """A network that differs in names alone.

    Attributes:
        arch: Its arch.
        table: Its names there.
        first, sub_pixels: Names of the weights of its first conv, and of the one that makes the sub-pixels.
        blocks: Pattern of a weight that each block has one of.
    """
    arch: str
    table: Table
    first: str
    sub_pixels: str
    blocks: str

    def detect(self, source: Source) -> bool:
        return {self.first, self.sub_pixels} <= set(source.state) and count(source.state, self.blocks, 4) > 0

    def load(self, source: Source, upscale: int) -> Found:
        state = source.state
        block = _block(self.arch, state[self.first], state[self.sub_pixels], count(state, self.blocks, 4))
        return Found(block, rename(state, self.table))


@register
class SPANV2Family(_Renamed):
    """SPANV2."""
    names, projects, files = ('spanv2', ), 'SPANV2', 'its checkpoint'
    arch, table = 'SPANV2', SPANV2
    first, sub_pixels, blocks = 'block_1.c1.conv.weight', 'conv_near.weight', r'block_\d\.c1\.conv\.weight'


@register
class SMFANetFamily(_Renamed):
    """SMFANet and SMFANet+."""
    names, projects, files = ('smfanet', ), 'SMFANet', 'its checkpoints, including SMFANet+'
    arch, table = 'SMFANet', SMFANET
    first, sub_pixels, blocks = 'to_feat.weight', 'to_img.0.weight', r'feats\.\d+\.smfa\.linear_0\.weight'
