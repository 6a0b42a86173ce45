"""CARN-pytorch, by the authors of CARN (ECCV 2018): CARN-M, with one upsampling part for each of x2, x3 and x4."""
from __future__ import annotations

from .classsr_family import carn_m
from .registry import Family, Found, Source, register
from .weights import Table, rename

NAMES: Table = [(r'^(sub|add)_mean\.shifter\.', r'\1_mean.'), (r'^(b\d\.)?c(\d)\.body\.', r'\1c\2.')]


@register
class CARNFamily(Family):
    """The CARN-M of one scale."""
    names = ('carn', )
    projects = 'CARN-pytorch'
    files = "CARN-pytorch's `carn_m.pth` (`--scale 2`)"

    def detect(self, source: Source) -> bool:
        return {'sub_mean.shifter.weight', 'c1.body.0.weight', 'entry.weight'} <= set(source.state)

    def load(self, source: Source, upscale: int) -> Found:
        state = source.state
        scales = [scale for scale in (2, 3, 4) if f'upsample.up{scale}.body.0.weight' in state]
        if scales:  # a network of one scale has upsample.up
            if upscale not in scales:
                raise ValueError(f'contains x{", x".join(map(str, scales))}, not x{upscale}')
            others = [(rf'^upsample\.up{scale}\.', None) for scale in scales if scale != upscale]
            state = rename(state, [*others, (rf'^upsample\.up{upscale}\.', 'upsample.up.')])
        if 'b1.b1.body.4.weight' not in state:
            raise ValueError('contains CARN, for which there is no arch; CARN-M is CARN_M')
        found = carn_m(rename(state, NAMES))
        if len(scales) < 2:
            return found
        note = f'of the upsamplers x{", x".join(map(str, scales))} that of x{upscale} was used'
        return found._replace(notes=(*found.notes, note))
