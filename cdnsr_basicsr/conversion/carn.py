"""CARN-pytorch, by the authors of CARN (ECCV 2018): CARN-M, with one upsampling part for each of x2, x3 and x4."""
from __future__ import annotations

from typing import Optional

from . import Found, State, Table, rename
from .classsr import carn_m

NAMES: Table = [(r'^(sub|add)_mean\.shifter\.', r'\1_mean.'), (r'^(b\d\.)?c(\d)\.body\.', r'\1c\2.')]


def carn(state: State, upscale: int = 4) -> Optional[Found]:
    """The CARN-M of one scale."""
    if not {'sub_mean.shifter.weight', 'c1.body.0.weight', 'entry.weight'} <= set(state):
        return None
    scales = [scale for scale in (2, 3, 4) if f'upsample.up{scale}.body.0.weight' in state]
    if scales:  # a network of one scale has upsample.up
        if upscale not in scales:
            raise ValueError(f'holds x{", x".join(map(str, scales))}, not x{upscale}')
        others = [(rf'^upsample\.up{scale}\.', None) for scale in scales if scale != upscale]
        state = rename(state, [*others, (rf'^upsample\.up{upscale}\.', 'upsample.up.')])
    if 'b1.b1.body.4.weight' not in state:
        raise ValueError('holds CARN, of which there is no arch here; CARN-M is CARN_M')
    found = carn_m(rename(state, NAMES))
    return found and found._replace(
        notes=(*found.notes,
               *([f'of the upsampling parts x{", x".join(map(str, scales))} that of x{upscale} was taken']
                 if len(scales) > 1 else [])))
