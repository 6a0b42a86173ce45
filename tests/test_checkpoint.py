"""Checkpoints: every damage and every impossible description is one line, before anything of its size is built."""
import copy
import cv2
import functools
import inspect
import json
import os
import pytest
import random
import struct
import torch
import yaml
import zipfile
from pathlib import Path
from torch import nn

from basicsr.archs import build_network
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import ARCH_REGISTRY
from cdnsr_basicsr import checkpoint, cli
from cdnsr_basicsr.checkpoint import WithoutMemory, build, load_checkpoint, save_checkpoint, weights_of
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.options import OptionError, check_network
from tests.helpers import fsrcnn, photograph


@pytest.fixture
def content(tiny_net):
    """Of a checkpoint that describes itself."""
    block = tiny_net()
    return dict(params=build_network(copy.deepcopy(block)).state_dict(), network_g=block, scale=4)


@pytest.fixture
def refused(tmp_path):
    """The one line that a checkpoint, or a path, is refused with."""

    def refused_(content):
        path = content
        if not isinstance(content, Path):
            path = tmp_path / 'x.pth'
            torch.save(content, path)
        with pytest.raises(OptionError) as caught:
            load_network(str(path))
        line = str(caught.value)
        assert line.startswith(f'{path}: ') and len(line.splitlines()) == 1 and len(line) < 2000
        return line[len(f'{path}: '):]

    return refused_


def same(net, weights):
    return all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


@pytest.mark.slow
def test_bits_that_were_flipped_are_noticed_or_make_no_difference(content, tmp_path):
    """Each byte that matters stands under a checksum; others, such as padding, change nothing."""
    for suffix in ('.pth', '.safetensors'):
        save_checkpoint(content, tmp_path / f'right{suffix}')
        data, path, seen = (tmp_path / f'right{suffix}').read_bytes(), tmp_path / f'x{suffix}', 0
        for position in random.Random(0).sample(range(8 * len(data)), 120):
            flipped = bytearray(data)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
            try:
                assert same(load_network(str(path)), content['params'])
            except OptionError as error:
                assert len(str(error).splitlines()) == 1
                seen += 1
        assert seen > 60


def test_a_flipped_bit_of_a_weight_is_named(content, refused, tmp_path):
    torch.save(content, tmp_path / 'x.pth')
    with zipfile.ZipFile(tmp_path / 'x.pth') as archive:
        record = archive.getinfo('x/data/3')
    data = bytearray((tmp_path / 'x.pth').read_bytes())
    start = record.header_offset + 26
    start += 4 + sum(struct.unpack('<HH', data[start:start + 4]))
    data[start] ^= 1
    (tmp_path / 'x.pth').write_bytes(data)
    assert refused(tmp_path / 'x.pth') == 'is damaged: x/data/3 has changed (its checksum differs)'


def test_what_is_no_checkpoint(content, refused, tmp_path):
    path = tmp_path / 'y.pth'
    path.write_bytes(b'')
    assert refused(path) == 'is empty'
    path.write_text('hello\n')
    assert refused(path).startswith('not a readable checkpoint (')
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[:-3000])
    assert refused(path).startswith('is damaged: ')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', 'no weights')
    assert refused(path).startswith('not a readable checkpoint (')
    assert refused([1, 2]) == 'expected a dict of weights, but got list'
    path.unlink()
    os.mkfifo(path)  # nothing would ever come out of it
    assert refused(path) == 'is not a file that can be read; expected a checkpoint'
    assert refused(tmp_path) == 'is a folder; expected a checkpoint'


def test_archives_that_unpack_to_too_much(content, refused, tmp_path, monkeypatch):
    """torch.save compresses nothing; what others have compressed loads, unless it is a bomb."""
    monkeypatch.setattr(checkpoint, 'MOST_UNPACKED', 2 * 10**6)
    torch.save(content, tmp_path / 'right.pth')
    for size in (None, 10**6):
        with zipfile.ZipFile(tmp_path / 'right.pth') as right:
            with zipfile.ZipFile(tmp_path / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
                for name in right.namelist():
                    zeros = size if name.split('/')[-1] in ('0', '1', '2') else None
                    archive.writestr(name, bytes(zeros) if zeros else right.read(name))
        if size is None:
            assert same(load_network(str(tmp_path / 'x.pth')), content['params'])
    assert refused(tmp_path / 'x.pth').startswith('is compressed and would unpack to 3')


def test_safetensors_that_are_none(content, refused, tmp_path):
    path = tmp_path / 'x.safetensors'
    save_checkpoint(content, path)
    data = path.read_bytes()
    size, = struct.unpack('<Q', data[:8])
    path.write_bytes(struct.pack('<Q', 2**60) + data[8:])
    assert refused(path).startswith('not a readable .safetensors file: ')
    header = json.loads(data[8:8 + size])
    header['__metadata__']['network_g'] = 100000 * '[' + 100000 * ']'
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data[8 + size:])
    assert refused(path).startswith('not a readable .safetensors file: ')
    header['__metadata__'] = {}  # of other programs: without checksum and description
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data[8 + size:])
    assert same(build(content['network_g'], weights_of(load_checkpoint(path), 'x'), 'x', 'x'), content['params'])


def test_files_of_torch_before_1_6(content, tmp_path):
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    assert same(load_network(str(tmp_path / 'x.pth')), content['params'])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(content, tmp_path, dtype):
    content['params'] = {key: value.to(dtype) for key, value in content['params'].items()}
    for name in ('x.pth', 'x.safetensors'):
        save_checkpoint(content, tmp_path / name)
        net = load_network(str(tmp_path / name))
        assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
        assert same(net, {key: value.float() for key, value in content['params'].items()})


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make,message', [
    (lambda x: x.to(torch.int8), 'is int8; accepted are dense tensors of float32, float16, bfloat16, float64'),
    (lambda x: x.to(torch.complex64), 'is complex64; accepted'),
    (lambda x: x.to_sparse(), 'is sparse or nested float32; accepted'),
    (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), 'is quantised quint8; accepted'),
    (lambda x: x.to('meta'), 'is float32 without values; accepted'),
    (lambda x: x.to(torch.float8_e4m3fn), 'is float8_e4m3fn; accepted'),
    (lambda x: x.to(torch.int64), 'is int64, not float32'),
    (lambda x: torch.zeros(1).expand(10**6, 10**6),
     'contains no weights: its tensors are larger than their stored data'),
    (lambda x: torch.full_like(x, torch.inf), 'contains values that are not finite in '),
    (lambda x: 1e300 * torch.ones_like(x, dtype=torch.float64), 'contains values that are not finite in '),
    (lambda x: [1, 2], 'contains no weights: expected a dict of tensors'),
])
def test_tensors_that_are_no_weights(content, refused, make, message):
    name = 'branches.0.map.0.weight'
    assert name in content['params']
    content['params'][name] = make(content['params'][name])
    assert message in refused(content)


@pytest.mark.parametrize('wrap', [
    lambda weights: {'params': weights, 'params_ema': None},
    lambda weights: {'params_ema': weights, 'params': {}},
    lambda weights: {'state_dict': {f'module.{key}': value for key, value in weights.items()}, 'epoch': 3},
    lambda weights: {'model': {f'_orig_mod.{key}': value for key, value in weights.items()}},
    lambda weights: {'model': {'state_dict': weights}},
    lambda weights: weights,
], ids=['params', 'ema', 'state_dict', 'model', 'twice', 'bare'])  # yapf: disable
def test_weights_are_found_in_what_they_are_wrapped_in(content, tmp_path, wrap):
    torch.save(wrap(content['params']), tmp_path / 'x.pth')
    weights = weights_of(load_checkpoint(tmp_path / 'x.pth'), 'x.pth')
    assert list(weights) == list(content['params'])
    assert all(torch.equal(value, content['params'][key]) for key, value in weights.items())
    (tmp_path / 'x.yml').write_text(yaml.safe_dump(dict(network_g=content['network_g'])))
    assert same(load_network(str(tmp_path / 'x.pth'), str(tmp_path / 'x.yml')), weights)


def endless(content):
    content['network_g']['branches'][0] = content['network_g']


def laughs(content):
    """10^12 values, each of which is held once."""
    for _ in range(12):
        content['network_g']['mixture'] = [content['network_g'].get('mixture')] * 10


def set_in(*way):
    *blocks, key, value = way

    def change(content):
        for block in blocks:
            content = content[block]
        content[key] = value

    return change


@pytest.mark.parametrize('change,message', [
    (set_in('params', 5), 'contains no weights: expected a dict of tensors'),
    (set_in('params', {}), 'does not fit the network CDNSR: Missing key'),
    (set_in('params', {3: torch.zeros(1)}), 'contains no weights: expected names of layers, but got 3'),
    (set_in('params', {'k' * 10**6: torch.zeros(1)}), "contains no weights: expected names of layers, but got 'kkkk"),
    (set_in('params', {'a\nb': torch.zeros(1)}), "contains no weights: expected names of layers, but got 'a\\nb'"),
    (set_in('scale', 0), 'scale: expected a number from 1 to 64, but got 0'),
    (set_in('scale', '4'), "scale: expected a number from 1 to 64, but got '4'"),
    (set_in('scale', 10**9), 'scale: expected a number from 1 to 64, but got 1000000000'),
    (set_in('scale', 2), 'scale: is 2, but its network_g is x4'),
    (endless, 'network_g: describes no network: it is nested more than 16 levels deep'),
    (laughs, 'network_g: describes no network: it is nested more than 16 levels deep or has more than 10000 values'),
    (set_in('network_g', 'mixture',
            'x' * 10**6), 'network_g: describes no network: contains a text of 1000000 or unprintable characters'),
    (set_in('network_g', 'upscale', 10**
            400), 'network_g: describes no network: contains a number of more than 63 bits'),
    (set_in('network_g', 'mixture', torch.ones(1)), 'network_g: describes no network: contains a value of type Tensor'),
    (set_in('network_g', 'branches', 1, 'num_map', 900), 'does not fit the network CDNSR: '),
    (set_in('network_g', 'branches', 1, 'num_feat', 60000), 'does not fit the network CDNSR: '),
])
def test_descriptions_that_are_none(content, refused, change, message):
    change(content)
    assert refused(content).startswith(message)


@pytest.mark.parametrize('key,value', [('num_map', 10**7), ('num_feat', 10**9)])
def test_a_network_is_not_built_larger_than_its_weights(content, monkeypatch, key, value):
    """10^7 layers would take hours, 10^9 channels more memory than there is."""
    monkeypatch.setattr(checkpoint, 'check_network', lambda block, where: None)  # which refuses these by their values
    block = dict(fsrcnn(), **{key: value})
    made, original = [], nn.Conv2d.__init__

    def watched(self, *args, **kwargs):
        made.append(args)
        original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Conv2d, '__init__', watched)
    with pytest.raises(OptionError, match='does not fit the network FSRCNN: it would have many more weights'):
        build(block, build_network(fsrcnn()).state_dict(), 'x', 'x')
    assert len(made) < 2000


UPSCALING = {
    'CARN_M', 'CDNSR', 'ECBSR', 'EDSR', 'ETDS', 'FSRCNN', 'Interpolation', 'MSRResNet', 'PCSR', 'PlainConvSR', 'RCAN',
    'RRDBNet', 'SMFANet', 'SPAN', 'SPANV2', 'SRVGGNetCompact', 'SwinIR'
}
NEEDED = dict(
    ECBSR=dict(num_in_ch=3, num_out_ch=3, num_block=2, num_channel=8, with_idt=False, act_type='prelu', scale=4),
    SwinIR=dict(window_size=8, embed_dim=12, depths=[2, 2], num_heads=[2, 2], upscale=4, upsampler='pixelshuffle'),
    RCAN=dict(num_in_ch=3, num_out_ch=3, num_feat=8, num_group=1, num_block=1, squeeze_factor=4),
    RRDBNet=dict(num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, num_grow_ch=4),
    PCSR=dict(backbone=fsrcnn()),
    CDNSR=dict(branches=[fsrcnn(), fsrcnn(6)], classifier=dict(type='ErrorPredictor')))


@pytest.mark.parametrize('name', sorted(name.split('_basicsr')[0] for name in ARCH_REGISTRY.keys()))
@pytest.mark.parametrize('place', ['network', 'branch'])
def test_only_networks_that_upscale_images_are_built(content, refused, monkeypatch, name, place):
    arch = ARCH_REGISTRY.get(name)
    if arch.__module__.split('.')[0] not in ('basicsr', 'cdnsr_basicsr'):
        pytest.skip('registered by another test')
    if name == 'Spandrel':
        pytest.skip('is built from its weights: tests/test_conversion/test_spandrel.py')
    given = NEEDED.get(name) or {
        key: 3
        for key, parameter in inspect.signature(arch).parameters.items()
        if parameter.default is parameter.empty and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    }
    block = dict(given, type=name)
    if name in UPSCALING:
        if place == 'branch':
            return
        net = build_network(copy.deepcopy(block))
        assert same(build(block, net.state_dict(), 'x', 'x'), net.state_dict())
        with WithoutMemory():
            outline = build_network(copy.deepcopy(block))
        assert {key: (value.shape, value.dtype) for key, value in outline.state_dict().items()} == {
            key: (value.shape, value.dtype) for key, value in net.state_dict().items()}  # yapf: disable
        return

    @functools.wraps(arch.__init__)
    def init(self, *args, **kwargs):
        raise AssertionError('it is being built')  # VGGFeatureExtractor would start a download

    monkeypatch.setattr(arch, '__init__', init)
    if place == 'network':
        content['network_g'] = block
    else:
        content['network_g']['branches'][1] = block
    where = {'network': 'network_g', 'branch': 'network_g.branches[1]'}[place]
    assert refused(content) == f'{where}.type: {name} is not a network that enlarges an image'


def test_no_training_is_of_a_network_that_starts_a_download():
    block = dict(type='VGGFeatureExtractor', layer_name_list=['conv1_1'])
    with pytest.raises(
            OptionError, match='network_g.type: VGGFeatureExtractor computes features for losses, not image'):
        check_network(block, 'network_g')


def test_networks_of_other_plugins_are_tried(content, refused, monkeypatch):

    class Foreign(nn.Module):

        def __init__(self, upscale=2, features=False):
            super().__init__()
            self.conv, self.upscale, self.features = nn.Conv2d(3, 3 * upscale**2, 1), upscale, features

        def forward(self, x):
            x = self.conv(x)
            return {'features': x} if self.features else nn.functional.pixel_shuffle(x, self.upscale)

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Foreign', Foreign)
    block = dict(type='Foreign', upscale=4)
    net = Foreign(4)
    assert same(build(block, net.state_dict(), 'x', 'x'), net.state_dict())
    content.update(params=net.state_dict(), network_g=dict(block, features=True))
    assert refused(content).startswith('network_g.type: Foreign makes no image from ')


COMMANDS = [
    ('upscale', '-m', 'x.pth', '-i', '.', '-o', 'out'),
    ('convert', 'x.pth', '-o', 'out.pth'),
    ('export', 'x.pth', '-o', 'out'),
    ('label', '-d', 'datasets/train', '--by', 'psnr', '-m', 'x.pth'),
    ('calibrate', '-m', 'x.pth', '-i', 'datasets/val/gt'),
    ('benchmark', '-m', 'x.pth', '--data', 'datasets/val/gt', '--repeat', '1'),
]


@pytest.mark.parametrize('command', COMMANDS, ids=lambda command: command[0])
def test_every_command_refuses_in_one_line(tests_folder, content, capsys, command):
    content['network_g']['branches'][0] = dict(type='VGGFeatureExtractor', layer_name_list=['conv1_1'])
    torch.save(content, 'x.pth')
    before = sorted(os.listdir())
    assert cli.main(list(command)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(
        'basicsr: error: x.pth: network_g.branches[0].type: VGGFeatureExtractor is not a network that '
        'enlarges an image')
    assert sorted(os.listdir()) == before


@pytest.fixture
def tests_folder(tmp_path, monkeypatch):
    """A working folder with what the commands look for before they load a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in ('train/lq.lmdb', 'train/gt.lmdb', 'val/gt'):
        Path('datasets', name).mkdir(parents=True)
    for name in ('lq', 'gt'):
        Path(f'datasets/train/{name}.lmdb/data.mdb').touch()
    cv2.imwrite('datasets/val/gt/a.png', photograph(64, 64, 0))
    return tmp_path


@pytest.mark.parametrize('name', ['bare.pth', 'own.safetensors', 'ema.pth', 'other.pth'])
def test_basicsr_starts_from_any_checkpoint(tmp_path, name):
    """`pretrain_network_*` of BasicSR's own models: weights as they are, a .safetensors, any key."""
    block = dict(type='MSRResNet', num_in_ch=3, num_out_ch=3, num_feat=4, num_block=1, upscale=4)
    weights, path = build_network(block).state_dict(), str(tmp_path / name)
    if name == 'own.safetensors':
        save_checkpoint(dict(params=weights, network_g=block, scale=4), path)
    else:
        wrapped = {'bare.pth': weights, 'ema.pth': dict(params_ema=weights), 'other.pth': dict(mine=weights)}
        torch.save(wrapped[name], path)
    net = build_network(block)
    model = BaseModel(dict(num_gpu=0, is_train=False))
    model.load_network(net, path, True, 'mine' if name == 'other.pth' else 'params')
    assert same(net, weights)
    weights['conv_first.bias'][1] = torch.nan
    torch.save(weights, tmp_path / 'nan.pth')
    with pytest.raises(OptionError, match='nan.pth: contains values that are not finite in conv_first.bias'):
        model.load_network(net, str(tmp_path / 'nan.pth'))
    with pytest.raises(OptionError, match=f'{name}: does not fit the network FSRCNN: Missing key'):
        model.load_network(build_network(fsrcnn()), path, True, 'mine' if name == 'other.pth' else 'params')


def test_of_two_sets_of_weights_basicsr_takes_the_one_it_asks_for(tmp_path):
    net = build_network(fsrcnn())
    weights = [{key: torch.full_like(value, i) for key, value in net.state_dict().items()} for i in (1, 2)]
    torch.save(dict(params=weights[0], params_ema=weights[1]), tmp_path / 'x.pth')
    model = BaseModel(dict(num_gpu=0, is_train=False))
    for key, expected in (('params', weights[0]), ('params_ema', weights[1]), (None, weights[1])):
        model.load_network(net, str(tmp_path / 'x.pth'), True, key)
        assert same(net, expected)
