"""ClassSR, CDNSR and ARM-Net: one lineage of code, with the same names.

ClassSR (CVPR 2021) and CDNSR (ICASSP 2023): a classifier and the branches net1, net2, ..., or a branch alone. ARM-Net
(ECCV 2022): one slimmable network whose first channels are the smaller branches.
"""
from __future__ import annotations

from .registry import Family, Found, Source, State, register
from .weights import Table, count, fold_mean_shift, part_of, rename, upscale_of

CARN_M: Table = [
    (r'^entry\.', 'conv_first.'),
    (r'^exit\.', 'conv_last.'),
    (r'^b(\d)\.b1\.body\.0\.', r'body.bodies.<\1>.bodies.0.conv1.'),
    (r'^b(\d)\.b1\.body\.2\.', r'body.bodies.<\1>.bodies.0.conv2.'),
    (r'^b(\d)\.b1\.body\.4\.', r'body.bodies.<\1>.bodies.0.conv3.'),
    (r'^b(\d)\.c(\d)\.0\.', r'body.bodies.<\1>.fusions.<\2>.'),
    (r'^c(\d)\.0\.', r'body.fusions.<\1>.'),
    (r'^upsample\.up\.body\.0\.', 'upconvs.0.'),
    (r'^upsample\.up\.body\.3\.', 'upconvs.1.'),
]
FSRCNN: Table = [
    (r'^head_conv\.', 'extract.'),
    (r'^tail_conv\.', 'deconv.'),
    (r'^body_conv\.0\.', 'shrink.'),
    (r'^body_conv\.([1-5])\.', r'map.<\1>.'),
    (r'^body_conv\.6\.', 'expand.'),
]
MSRRESNET: Table = [(r'^recon_trunk\.', 'body.'), (r'^HRconv\.', 'conv_hr.')]
RCAN: Table = [
    (r'^head\.0\.', 'conv_first.'),
    (r'^body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.0\.', r'body.\1.residual_group.\2.rcab.3.attention.1.'),
    (r'^body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.2\.', r'body.\1.residual_group.\2.rcab.3.attention.3.'),
    (r'^body\.(\d+)\.body\.(\d+)\.body\.', r'body.\1.residual_group.\2.rcab.'),
    (r'^body\.(\d+)\.body\.\d+\.', r'body.\1.conv.'),
    (r'^body\.\d+\.', 'conv_after_body.'),
    (r'^tail\.0\.', 'upsample.'),
    (r'^tail\.1\.', 'conv_last.'),
]
CLASSIFIER: Table = [(r'^lastOut\.', 'fc.'), *[(rf'^CondNet\.{2 * i}\.', f'convs.{i}.') for i in range(5)]]

CARN_M_NEEDS = {'sub_mean.weight', 'entry.weight', 'c1.0.weight', 'b1.b1.body.4.weight', 'upsample.up.body.0.weight'}
FSRCNN_NEEDS = {'head_conv.0.weight', 'body_conv.0.0.weight', 'tail_conv.weight'}
MSRRESNET_NEEDS = {'recon_trunk.0.conv1.weight', 'upconv1.weight', 'HRconv.weight'}
SQUEEZE = 'body.0.body.0.body.3.conv_du.0.weight'
RCAN_NEEDS = {'head.0.weight', SQUEEZE, 'tail.1.weight'}


def carn_m(state: State) -> Found:
    """CARN-M; ARM-Net's fusion convs have a bias."""
    width = len(state['entry.weight'])
    block = dict(type='CARN_M', num_in_ch=3, num_out_ch=3, num_feat=width)
    block.update(
        upscale=upscale_of(state, 'upsample.up.body.', width),
        group=width // state['b1.b1.body.0.weight'].shape[1],
        fusion_bias='c1.0.bias' in state)
    state, mean, notes = fold_mean_shift(state, 'entry', 'exit')
    return Found(dict(block, rgb_mean=mean), rename(state, CARN_M), notes)


def fsrcnn(state: State) -> Found:
    """FSRCNN without activations between the mapping convs."""
    block = dict(type='FSRCNN', num_in_ch=3, num_out_ch=3, num_feat=len(state['head_conv.0.weight']))
    block.update(num_shrink=len(state['body_conv.0.0.weight']), num_map=4, upscale=4)
    return Found(block, rename(state, FSRCNN), ('assumed to be x4, the only published scale', ))


def msrresnet(state: State) -> Found:
    """SRResNet, which is BasicSR's MSRResNet."""
    width = len(state['conv_first.weight'])
    block = dict(type='MSRResNet', num_in_ch=3, num_out_ch=3, num_feat=width)
    block.update(
        num_block=count(state, r'recon_trunk\.\d+\.conv1\.weight', 4), upscale=upscale_of(state, 'upconv', width))
    return Found(block, rename(state, MSRRESNET))


def rcan(state: State) -> Found:
    """RCAN, which is BasicSR's, but sees 0 to 255."""
    width, squeezed = len(state['head.0.weight']), len(state[SQUEEZE])
    block = dict(type='RCAN', num_in_ch=3, num_out_ch=3, num_feat=width)
    block.update(
        num_group=count(state, r'body\.\d+\.body\.0\.body\.0\.weight', 4),
        num_block=count(state, r'body\.0\.body\.\d+\.body\.0\.weight', 4),
        squeeze_factor=16 if width // 16 == squeezed else width // squeezed,
        upscale=upscale_of(state, 'tail.0.', width),
        img_range=255.)
    state, mean, notes = fold_mean_shift(state, 'head.0', 'tail.1')
    # shifts that had been trained are folded for a mean of 0 to 255 too: BasicSR multiplies it by img_range
    return Found(dict(block, rgb_mean=[value / 255 for value in mean]), rename(state, RCAN), notes)


# names that tell a network, and what makes it of its weights
BRANCHES = ((CARN_M_NEEDS, carn_m), (FSRCNN_NEEDS, fsrcnn), (MSRRESNET_NEEDS, msrresnet), (RCAN_NEEDS, rcan))


def is_arm_carn(state: State) -> bool:
    """Whether these are the weights of ARM-Net's CARN-M, which is no branch of ClassSR or CDNSR."""
    return CARN_M_NEEDS | {'c1.0.bias'} <= set(state)


def is_branch(state: State) -> bool:
    """Whether these are the weights of a branch alone."""
    return not is_arm_carn(state) and any(needs <= set(state) for needs, _ in BRANCHES)


def branch(state: State) -> Found:
    """A branch alone."""
    return next(load(state) for needs, load in BRANCHES if needs <= set(state))


def branches_of(state: State) -> list[State]:
    """The weights of each branch of a whole network."""
    branches: list[State] = []
    while part := part_of(state, f'net{len(branches) + 1}.'):
        branches.append(part)
    return branches


def is_whole(state: State) -> bool:
    """Whether these are the weights of a classifier and its branches."""
    branches = branches_of(state)
    return 'classifier.CondNet.0.weight' in state and len(branches) > 1 and all(map(is_branch, branches))


def whole(state: State, mixture: str) -> Found:
    """A classifier and its branches."""
    branches = [branch(part) for part in branches_of(state)]
    parts = ('classifier.', *(f'net{i + 1}.' for i in range(len(branches))))
    others = [key for key in state if not key.startswith(parts)]
    if others:
        raise ValueError(f'{others[0]} belongs neither to the classifier nor to one of the branches')
    classifier = rename(part_of(state, 'classifier.'), CLASSIFIER)
    renamed = {f'classifier.{key}': value for key, value in classifier.items()}
    for i, found in enumerate(branches):
        renamed.update({f'branches.{i}.{key}': value for key, value in found.state.items()})
    block = dict(type='CDNSR', upscale=branches[-1].block['upscale'], branches=[found.block for found in branches])
    block.update(classifier=dict(type='PatchClassifier', num_in_ch=3, num_feat=len(classifier['convs.0.weight'])))
    notes = tuple(dict.fromkeys(note for found in branches for note in found.notes))
    return Found(dict(block, mixture=mixture), renamed, notes)


@register
class CDNSRFamily(Family):
    """A CDNSR, or one of its branches."""
    names = ('cdnsr', )
    projects = 'CDNSR, or a branch of CDNSR, ClassSR or ARM-Net'
    files = "checkpoints of CDNSR's code: classifier and branches, or a single branch"
    order = 1  # its branches and PCSR's networks have names in common
    mixture = 'gumbel'

    def detect(self, source: Source) -> bool:
        return is_whole(source.state) or is_branch(source.state)

    def load(self, source: Source, upscale: int) -> Found:
        return whole(source.state, self.mixture) if is_whole(source.state) else branch(source.state)


@register
class ClassSRFamily(CDNSRFamily):
    """A ClassSR, or one of its branches: its files look like CDNSR's."""
    names = ('classsr', )
    projects = 'ClassSR, or a branch of it'
    files = "checkpoints of ClassSR's code, likewise"
    mixture = 'softmax'


@register
class ARMNetFamily(Family):
    """An ARM-Net of CARN-M or FSRCNN branches; any smaller one is among its first channels."""
    names = ('arm', )
    projects = 'ARM-Net'
    files = '`arm-carn.pth`, `arm-fsrcnn.pth` (`--from arm --num-feat 36`)'
    order = 1  # its FSRCNN looks like a single branch of the others

    def detect(self, source: Source) -> bool:
        return is_arm_carn(source.state) or FSRCNN_NEEDS <= set(source.state)

    def load(self, source: Source, upscale: int) -> Found:
        return (carn_m if is_arm_carn(source.state) else fsrcnn)(source.state)
