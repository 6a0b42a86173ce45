"""Blocks of option files and checkpoints: each mistake is told by its place, before anything is built."""
import pytest
import torch
from torch import nn

from basicsr.utils.registry import ARCH_REGISTRY
from cdnsr_basicsr import options
from cdnsr_basicsr.options import OptionError, built_network, check_flag, check_network, check_number, find_registered

FSRCNN = dict(type='FSRCNN', num_feat=4, num_shrink=3, num_map=1, upscale=4)
VGG = dict(type='VGGFeatureExtractor', layer_name_list=['conv1_1'])
CLASSIFIER = dict(type='PatchClassifier', num_feat=8)
SWINIR = dict(type='SwinIR', img_size=16, window_size=8, depths=[2, 2], num_heads=[2, 2], embed_dim=8, upscale=4)
RCAN = dict(type='RCAN', num_in_ch=3, num_out_ch=3, num_feat=16, num_group=2, num_block=2)
ECBSR = dict(type='ECBSR', num_in_ch=1, num_out_ch=1, num_block=1, num_channel=4)
ECBSR.update(with_idt=False, act_type='prelu', scale=2)


def cdnsr(**changed):
    return {**dict(type='CDNSR', branches=[FSRCNN] * 3, classifier=CLASSIFIER, upscale=4), **changed}


WRONG_NETWORKS = [
    (cdnsr(type=['CDNSR']), r"net.type: unknown type \['CDNSR'\]; accepted: "),
    (cdnsr(type={}), 'net.type: unknown type {}; accepted: '),
    (cdnsr(type=None), 'net.type: unknown type None; accepted: '),
    (cdnsr(upscale=0), 'net.upscale: expected an integer from 1 to 16, but got 0'),
    (cdnsr(upscale='4'), "net.upscale: expected an integer from 1 to 16, but got '4'"),
    (cdnsr(upscale=10**9), 'net.upscale: expected an integer from 1 to 16'),
    (cdnsr(upscale=float('nan')), 'net.upscale: expected an integer from 1 to 16'),
    (cdnsr(upscale=True), 'net.upscale: expected an integer from 1 to 16'),
    (cdnsr(branches={}), 'net.branches: expected a list of 2 to 5 branches'),
    (cdnsr(branches=[FSRCNN]), 'net.branches: expected a list of 2 to 5 branches'),
    (cdnsr(branches=[FSRCNN, 'FSRCNN']), r'net.branches\[1\]: expected a block with a type'),
    (cdnsr(branches=[VGG, FSRCNN]), r'net.branches\[0\].type: VGGFeatureExtractor is no network that upscales'),
    (cdnsr(branches=[FSRCNN, CLASSIFIER]), r'net.branches\[1\].type: PatchClassifier is no network that upscales'),
    (cdnsr(classifier=FSRCNN), 'net.classifier.type: FSRCNN is no classifier'),
    (cdnsr(classifier=[CLASSIFIER]), "net.classifier: expected a block of options with a key 'type'"),
    (cdnsr(mixture=[]), 'net.mixture: expected a word'),
    (dict(type='PCSR', backbone=VGG), 'net.backbone.type: VGGFeatureExtractor is no network that upscales'),
    (dict(type='PCSR', backbone=FSRCNN, heavy=[8, 'x']), r'net.heavy\[1\]: expected an integer'),
    (dict(FSRCNN, num_feat=[4]), 'net.num_feat: expected an integer'),
    (dict(FSRCNN, num_feat={}), 'net.num_feat: expected an integer'),
    (dict(FSRCNN, num_feat=None), 'net.num_feat: expected an integer'),
    (dict(FSRCNN, num_feat=4.5), 'net.num_feat: expected an integer'),
    (dict(FSRCNN, num_feat=10**9), 'net.num_feat: expected an integer from 1 to 65536, but got 1000000000'),
    (dict(FSRCNN, num_map=10**7), 'net.num_map: expected an integer from 0 to 1000, but got 10000000'),
    (dict(FSRCNN, original='no'), "net.original: accepted: true, false; got 'no'"),
    (dict(RCAN, num_group=1000, num_block=1000), 'net: would be 1000000 blocks deep; at most 1000 are accepted'),
    (dict(RCAN, res_scale='x'), 'net.res_scale: expected a number'),
    (dict(RCAN, rgb_mean=0.5), 'net.rgb_mean: expected a list of numbers'),
    (dict(SWINIR, depths=[1000] * 4), 'net: would be 4000 blocks deep'),
    (dict(SWINIR, norm_layer='LayerNorm'), 'net.norm_layer: takes a class'),
    (dict(ECBSR, scale=[2]), r'net.scale: expected an integer from 1 to 16, but got \[2\]'),
    (dict(ECBSR, with_idt=1), 'net.with_idt: accepted: true, false; got 1'),
    (dict(type='BasicVSR', spynet_path='gone.pth'), 'net.spynet_path: no such file or folder: gone.pth'),
    ('FSRCNN', "net: expected a block of options with a key 'type'"),
]


@pytest.mark.parametrize('block,message', WRONG_NETWORKS)
def test_networks_that_cannot_be(block, message):
    with pytest.raises(OptionError, match=message):
        check_network(block, 'net')


@pytest.mark.parametrize('block', [
    cdnsr(), SWINIR, ECBSR,
    dict(RCAN, res_scale=0.1, rgb_mean=[0.4, 0.4, 0.4]),
    dict(type='PCSR', backbone=FSRCNN, light=[], upscale=2.5),
    dict(type='EDVR', num_feat=8, num_reconstruct_block=1),
    dict(type='StyleGAN2Generator', out_size=8, channel_multiplier=1, narrow=0.125),
    dict(type='VGGStyleDiscriminator', num_in_ch=3, num_feat=4),
])  # yapf: disable
def test_networks_that_can_be(block):
    built_network(block, 'net')


def test_networks_are_no_larger_than_memory(monkeypatch):
    monkeypatch.setattr(options, 'MAX_WEIGHTS', 1000)
    with pytest.raises(OptionError, match='net: has more than 1000 weights'):
        built_network(dict(RCAN), 'net')
    monkeypatch.setattr(options, 'MAX_WEIGHTS', 2**30)
    monkeypatch.setattr(options, 'MAX_LAYERS', 10)
    with pytest.raises(OptionError, match='net: has more than 10 layers'):
        built_network(dict(RCAN), 'net')
    nn.Sequential(*(nn.ReLU() for _ in range(20)))  # none of it lasts


def test_values_that_do_not_go_together_are_the_blocks_mistake():
    with pytest.raises(OptionError, match='net: makes no network: RuntimeError'):
        built_network(dict(RCAN, rgb_mean=[0.4, 0.4]), 'net')


def test_networks_of_other_plugins_are_judged_by_what_is_known_of_them(monkeypatch):

    class Foreign(nn.Module):

        def __init__(self, slope=0, num_feat=4, extra=None, required=None):
            super().__init__()
            self.slope = torch.tensor(slope)

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Foreign', Foreign)
    built_network(dict(type='Foreign', slope=0.5, extra=dict(a=1)), 'net')
    check_network(dict(type='Foreign', required=[4, 6], extra=[[1, 2]]), 'net')
    with pytest.raises(OptionError, match='net.num_feat: expected an integer'):
        check_network(dict(type='Foreign', num_feat='x'), 'net')


@pytest.mark.parametrize('name', [[], {}, None, 3])
def test_registries_are_asked_for_any_name(name):
    with pytest.raises(OptionError, match='here: unknown type'):
        find_registered(ARCH_REGISTRY, name, 'here')


@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan'), True, None, '1', [1], {}])
def test_what_is_no_number(value):
    with pytest.raises(OptionError, match='here: expected a number, but got'):
        check_number(value, 'here', float('-inf'))


def test_what_is_no_flag():
    for value in (0, 1, 'no', None, 1.0):
        with pytest.raises(OptionError, match='accepted: true, false; got'):
            check_flag(value, 'here')
    check_flag(False, 'here')
