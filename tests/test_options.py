"""Blocks of option files and checkpoints: each mistake is told by its place, before anything is built."""
import importlib.util
import json
import pytest
import torch
from pathlib import Path
from torch import nn

from basicsr.utils.registry import ARCH_REGISTRY
from cdnsr_basicsr.inference import pixel_upscaler, tiling
from cdnsr_basicsr.models.cdnsr_options import CDNSRFile, CDNSRTraining, Tile
from cdnsr_basicsr.models.pcsr_options import PCSRFile
from cdnsr_basicsr.options import OptionError, built_network, check_network, check_number, find_registered, networks
from cdnsr_basicsr.options.reading import apply_force_yml, read_options
from cdnsr_basicsr.options.schema import Logger, check_block, fields_of, filled, kind_of
from cdnsr_basicsr.options.values import check_flag

ROOT = Path(__file__).resolve().parents[1]

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
    (cdnsr(branches=[VGG, FSRCNN]), r'net.branches\[0\].type: VGGFeatureExtractor is not a network that upscales'),
    (cdnsr(branches=[FSRCNN, CLASSIFIER]), r'net.branches\[1\].type: PatchClassifier is not a network that upscales'),
    (cdnsr(classifier=FSRCNN), 'net.classifier.type: FSRCNN is not a classifier'),
    (cdnsr(classifier=[CLASSIFIER]), "net.classifier: expected a block of options with a key 'type'"),
    (cdnsr(mixture=[]), 'net.mixture: expected a word'),
    (dict(type='PCSR', backbone=VGG), 'net.backbone.type: VGGFeatureExtractor is not a network that upscales'),
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
    monkeypatch.setattr(networks, 'MAX_WEIGHTS', 1000)
    with pytest.raises(OptionError, match='net: has more than 1000 weights'):
        built_network(dict(RCAN), 'net')
    monkeypatch.setattr(networks, 'MAX_WEIGHTS', 2**30)
    monkeypatch.setattr(networks, 'MAX_LAYERS', 10)
    with pytest.raises(OptionError, match='net: has more than 10 layers'):
        built_network(dict(RCAN), 'net')
    nn.Sequential(*(nn.ReLU() for _ in range(20)))  # none of it lasts


def test_values_that_do_not_go_together_are_the_blocks_mistake():
    with pytest.raises(OptionError, match='net: does not make a network: RuntimeError'):
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


@pytest.fixture(scope='module')
def documents():
    """scripts/document_options.py as a module."""
    spec = importlib.util.spec_from_file_location('document_options', ROOT / 'scripts' / 'document_options.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_and_schema_are_current(documents):
    stale = [path.name for path, text in documents.documents().items() if path.read_text() != text]
    assert stale == [], 'python scripts/document_options.py writes them'


def test_every_key_says_what_it_means(documents):
    structs = {struct for entries in documents.blocks().values() for struct, _ in entries}
    structs |= set(documents.DATASETS.values())
    assert {CDNSRTraining, Logger, Tile} <= structs
    for struct in structs:
        for name, field in fields_of(struct).items():
            assert field.metadata['meaning'] and kind_of(field).words, f'{struct.__name__}.{name}'


def refused(value, schema, root):
    """What a JSON schema refuses of a value, as far as ours go; None if nothing."""
    if '$ref' in schema:
        return refused(value, root['$defs'][schema['$ref'].rsplit('/', 1)[-1]], root)
    kinds = {'object': dict, 'array': (list, tuple), 'string': str, 'boolean': bool, 'null': type(None)}
    kinds.update(integer=(int, float), number=(int, float))
    types = schema.get('type', list(kinds))
    if not any(isinstance(value, kinds[name]) for name in ([types] if isinstance(types, str) else types)):
        return f'{value!r} is no {types}'
    if 'const' in schema and value != schema['const'] or 'enum' in schema and value not in schema['enum']:
        return f'{value!r} is not accepted'
    if isinstance(value, (int, float)) and not schema.get('minimum', value) <= value <= schema.get('maximum', value):
        return f'{value!r} is out of bounds'
    if isinstance(value, dict):
        missing = [key for key in schema.get('required', ()) if key not in value]
        if missing:
            return f'{missing[0]} is missing'
        for key, item in value.items():
            inner = schema.get('properties', {}).get(key, schema.get('additionalProperties', True))
            reason = f'{key} is unknown' if inner is False else inner is not True and refused(item, inner, root)
            if reason:
                return reason
    parts = list(schema.get('allOf', ()))
    if 'if' in schema and not refused(value, schema['if'], root):
        parts.append(schema['then'])
    if 'anyOf' in schema and all(refused(value, part, root) for part in schema['anyOf']):
        return refused(value, schema['anyOf'][0], root)
    return next((reason for reason in (refused(value, part, root) for part in parts) if reason), None)


@pytest.mark.parametrize('path', sorted((ROOT / 'options').glob('*.yml')), ids=lambda path: path.stem)
def test_option_files_fit_the_schema(path):
    root = json.loads((ROOT / 'cdnsr_basicsr/options/schema.json').read_text())
    assert refused(read_options(str(path)), root, root) is None


@pytest.mark.parametrize('force, reason', [
    ('train:tau=0.5', 'tau is unknown'),
    ('train:tau_min=0', '0 is out of bounds'),
    ('train:freeze=branches', "'branches' is no"),
    ('train:class_opt:type=KDL1Loss', "'KDL1Loss' is not accepted"),
    ('datasets:train:clases=[0]', 'clases is unknown'),
    ('datasets:train:io_backend=lmdb', "'lmdb' is no object"),
    ('network_g=~', 'None is no object'),
])
def test_the_schema_refuses_mistakes(force, reason):
    root = json.loads((ROOT / 'cdnsr_basicsr/options/schema.json').read_text())
    opt = read_options(str(ROOT / 'options/train_classsr_carn.yml'))
    apply_force_yml(opt, [force])
    assert reason in str(refused(opt, root, root))


def test_blocks_are_filled_with_defaults():
    opt = filled(CDNSRFile, dict(train=dict(tau_min=0.5, freeze=None, other=1), tile=None, val=dict(save_img=True)))
    assert (opt.train.tau_min, opt.train.freeze, opt.train.balance) == (0.5, (), 'warn')
    assert (opt.tile.patch_size, opt.tile.step) == (tiling.PATCH_SIZE, None)
    assert (opt.val.save_img, opt.val.save_map) == (True, False)
    assert opt.train.feature_extractor.weights == 'imagenet' and not hasattr(opt.train, 'other')
    assert filled(PCSRFile, {}).tile.patch_size == pixel_upscaler.PATCH_SIZE


@pytest.mark.parametrize('block, message', [
    (dict(tau=0.5), 'train.tau: unknown key; accepted: average_opt, balance, '),
    (dict(tau_min='x'), "train.tau_min: expected a number from 0.01 to 1, but got 'x'"),
    (dict(collapse_iter=0), 'train.collapse_iter: expected an integer at least 1, but got 0'),
    (dict(feature_extractor=3), 'train.feature_extractor: expected a block of options, but got 3'),
    (dict(feature_extractor=dict(weights='gone.pth')), 'train.feature_extractor.weights: no such file or folder'),
    ({}, "train: key 'total_iter' is missing"),
])
def test_blocks_refuse_by_name(block, message):
    with pytest.raises(OptionError, match=message):
        check_block(CDNSRTraining, block, 'train', () if block else ['total_iter'])
