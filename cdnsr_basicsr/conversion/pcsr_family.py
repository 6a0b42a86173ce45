"""PCSR (ECCV 2024): its networks, with CARN's and FSRCNN's features, and the plain CARN and FSRCNN beside them."""
from __future__ import annotations

import re
from typing import Any, cast

from .classsr_family import CARN_M, FSRCNN
from .registry import Family, Found, Source, State, register
from .weights import part_of, rename

BATCH_NORM_EPS = 1e-5
# option block of a plain network, its table of names, and the argument that is its width
NETWORKS = {
    'carn': (dict(type='CARN_M', num_feat=52, fusion_bias=True), CARN_M, 'nf'),
    'fsrcnn': (dict(type='FSRCNN', num_feat=56), FSRCNN, 'd')
}


def fold_batch_norms(state: State) -> State:
    """Folds the batch norms behind CARN's fusion convs, NAME.1 behind NAME.0, into them."""
    import torch
    state = dict(state)
    for key in [key for key in state if re.search(r'(^|\.)c\d\.1\.running_mean$', key)]:
        conv, norm = f'{key[:-len("1.running_mean")]}0.', key[:-len('running_mean')]
        parts = [state.pop(norm + name).double() for name in ('weight', 'bias', 'running_mean', 'running_var')]
        state.pop(f'{norm}num_batches_tracked', None)
        weight, bias, mean, var = parts
        factor = weight / (var + BATCH_NORM_EPS).sqrt()
        before = state.get(f'{conv}bias', torch.zeros_like(mean)).double()
        state[f'{conv}weight'] = (state[f'{conv}weight'].double() * factor.view(-1, 1, 1, 1)).float()
        state[f'{conv}bias'] = ((before - mean) * factor + bias).float()
    return state


def hidden_of(spec: dict[str, Any]) -> list[int]:
    """Widths of the hidden layers of a published sampler."""
    return list(spec['args']['imnet_spec']['args']['hidden_list'])


@register
class PCSRFamily(Family):
    """The networks of PCSR's checkpoints, which hold a dict `model` of name, args and sd."""
    names = ('pcsr', )
    projects = 'PCSR'
    files = '`carn-pcsr-phase1`, `fsrcnn-pcsr-phase1` (phase 0 too), and its plain `carn-x4`, `fsrcnn-x4`'
    order = 0  # what a file says of itself goes before the names of its weights

    def detect(self, source: Source) -> bool:
        model = source.content.get('model')
        if not isinstance(model, dict) or not {'name', 'args', 'sd'} <= set(model):
            return False
        name = model['name']
        routed = name in ('pcsr-phase0', 'pcsr-phase1')
        return name in NETWORKS or routed and model['args']['encoder_spec']['name'] in NETWORKS

    def load(self, source: Source, upscale: int) -> Found:
        model, state = source.content['model'], source.state
        name, args = model['name'], model['args']
        if name in NETWORKS:
            block, state, notes = _plain(name, args, state)
            return Found(dict(block, upscale=args.get('scale', args.get('upscale', 4))), state, notes)
        spec = args['encoder_spec']
        backbone, encoder, notes = _plain(spec['name'], spec['args'], part_of(state, 'encoder.'))
        block = dict(
            type='PCSR', backbone=backbone, upscale=4, phase=int(name[-1]), heavy=hidden_of(args['heavy_sampler_spec']))
        weights = {key: value for key, value in state.items() if not key.startswith('encoder.')}
        state = {f'backbone.{key}': value for key, value in encoder.items()}
        for key, value in weights.items():
            found = re.fullmatch(r'(\w+?)(?:_sampler)?\.imnet\.layers\.(\d+)\.(\w+)', key)
            part, layer, parameter = cast(re.Match[str], found).groups()
            state[f'{part}.layers.{int(layer) // 2}.{parameter}'] = value
        if name == 'pcsr-phase1':
            block.update(light=hidden_of(args['light_sampler_spec']), classifier=hidden_of(args['classifier_spec']))
        return Found(block, state, notes)


def _plain(name: str, args: dict[str, Any], state: State) -> Found:
    block, table, width = NETWORKS[name]
    folded = fold_batch_norms(state)
    notes = ('its batch norms were folded into the convs before them', ) if len(folded) < len(state) else ()
    return Found(dict(block, num_feat=args.get(width, block['num_feat'])), rename(folded, table), notes)
