"""FSRCNN (ECCV 2016) in its original form, as in FSRCNN-pytorch and ETDS's published FSRCNN_x*.pth."""
from __future__ import annotations

import re

from .registry import Family, Found, Source, register
from .weights import count


@register
class FSRCNNFamily(Family):
    """FSRCNN whose scale is not in its weights, since the deconvolution has 9x9 taps for every one."""
    names = ('fsrcnn', )
    projects = 'FSRCNN-pytorch, ETDS'
    files = "FSRCNN-pytorch's and ETDS's `FSRCNN_x4.pth`"

    def detect(self, source: Source) -> bool:
        return {'first_part.0.weight', 'mid_part.0.weight', 'last_part.weight'} <= set(source.state)

    def load(self, source: Source, upscale: int) -> Found:
        state = source.state
        first, num_map = state['first_part.0.weight'], count(state, r'mid_part\.\d+\.weight', 4) - 2
        block = dict(type='FSRCNN', num_in_ch=first.shape[1], num_out_ch=state['last_part.weight'].shape[1])
        block.update(num_feat=len(first), num_shrink=len(state['mid_part.0.weight']), num_map=num_map)
        names = {'first_part.': 'extract.', 'last_part.': 'deconv.'}
        for layer in range(2 * (num_map + 2)):  # convs and activations in turns
            part, index = ('shrink', layer) if layer < 2 else ('map', layer - 2)
            if index >= 2 * num_map:
                part, index = 'expand', index - 2 * num_map
            names[f'mid_part.{layer}.'] = f'{part}.{index}.'
        renamed = {
            re.sub(r'^(first_part\.|mid_part\.\d+\.|last_part\.)', lambda m: names[m.group()], key): value
            for key, value in state.items()
        }
        note = f'assumed to be x{upscale}: the weights do not tell'
        return Found(dict(block, upscale=upscale, original=True), renamed, (note, ))
