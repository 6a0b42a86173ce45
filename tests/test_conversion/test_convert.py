import json
import os
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from basicsr.archs import build_network
from cdnsr_basicsr.archs import CARN_M
from cdnsr_basicsr.checkpoint import load_checkpoint
from cdnsr_basicsr.conversion import classsr_family
from cdnsr_basicsr.conversion.convert import convert, load_network, save
from cdnsr_basicsr.conversion.weights import rename
from cdnsr_basicsr.options import OptionError

WEIGHTS = [
    ('arm-carn', 'arm', 'CARN_M', 4, 64),
    ('carn_m', 'carn', 'CARN_M', 4, 64),
    ('FSRCNN_x4', 'fsrcnn', 'FSRCNN', 4, 56),
]


@pytest.fixture
def write(tmp_path):

    def write(content, name='foreign.pth'):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return write


def published_names(net, table):
    """A network's weights under the names that a table renames into them."""
    ours = net.state_dict()
    theirs = {}
    for key in CARN_M_NAMES:
        theirs[key] = ours[list(rename({key: None}, table))[0]]
    return theirs


CARN_M_NAMES = [
    f'{name}.{kind}' for kind in ('weight', 'bias')
    for name in ('entry', 'exit', 'upsample.up.body.0', 'upsample.up.body.3', *(f'b{i}.b1.body.{j}' for i in (1, 2, 3)
                                                                                for j in (0, 2, 4)))
] + [f'{prefix}c{i}.0.weight' for prefix in ('', 'b1.', 'b2.', 'b3.') for i in (1, 2, 3)]


def carn_of_classsr(num_feat=8, mean=(0.4488, 0.4371, 0.4040), seed=0):
    """A CARN-M, and its weights under ClassSR's names."""
    torch.manual_seed(seed)
    net = CARN_M(num_feat=num_feat, rgb_mean=mean).eval()
    identity = torch.eye(3).view(3, 3, 1, 1)
    shifts = {'sub_mean.weight': identity, 'sub_mean.bias': -torch.tensor(mean)}
    shifts.update({'add_mean.weight': identity, 'add_mean.bias': torch.tensor(mean)})
    return net, {**published_names(net, classsr_family.CARN_M), **shifts}


@torch.no_grad()
def assert_same(net, other, atol=1e-6):
    for size in ((9, 13), (16, 7)):
        x = torch.rand(2, 3, *size)
        torch.testing.assert_close(net(x), other(x), atol=atol, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name, family, arch, upscale, num_feat', WEIGHTS, ids=lambda value: str(value))
def test_published_weights_are_recognised_and_load(shared, tmp_path, name, family, arch, upscale, num_feat):
    converted = convert(shared(f'weights/{name}.pth'))
    assert converted.family == family
    block = converted.block
    assert (block['type'], block['upscale'], block['num_feat']) == (arch, upscale, num_feat)
    for ending in ('pth', 'safetensors'):
        save(converted, str(tmp_path / f'x.{ending}'))
        assert_same(load_network(str(tmp_path / f'x.{ending}')), converted.net, atol=0)


@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_carn_pytorch_has_one_upsampling_part_for_each_scale(shared, upscale):
    state = load_checkpoint(shared('weights/carn_m.pth'))
    converted = convert(shared('weights/carn_m.pth'), upscale=upscale)
    assert converted.block['upscale'] == upscale
    torch.testing.assert_close(converted.net.upconvs[0].weight, state[f'upsample.up{upscale}.body.0.weight'])
    assert converted.net(torch.rand(1, 3, 8, 9)).shape == (1, 3, 8 * upscale, 9 * upscale)


def test_original_fsrcnn_equals_its_formula(shared):
    state = load_checkpoint(shared('weights/FSRCNN_x4.pth'))
    net = convert(shared('weights/FSRCNN_x4.pth')).net

    def layer(x, name, index, **kwargs):
        x = F.conv2d(x, state[f'{name}.{index}.weight'], state[f'{name}.{index}.bias'], **kwargs)
        return F.prelu(x, state[f'{name}.{index + 1}.weight'])

    x = torch.rand(1, 3, 11, 14)
    out = layer(x, 'first_part', 0, padding=2)
    out = layer(out, 'mid_part', 0)
    for index in (2, 4, 6, 8):
        out = layer(out, 'mid_part', index, padding=1)
    out = layer(out, 'mid_part', 10)
    out = F.conv_transpose2d(
        out, state['last_part.weight'], state['last_part.bias'], stride=4, padding=4, output_padding=3)
    with torch.no_grad():
        torch.testing.assert_close(net(x), out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('num_feat', [36, 52])
def test_a_branch_of_arm_net(shared, num_feat):
    converted = convert(shared('weights/arm-carn.pth'), num_feat=num_feat)
    golden = torch.load(shared('golden/arm_published.pth'), weights_only=True)['arm-carn']
    assert converted.block['num_feat'] == num_feat
    with torch.no_grad():
        torch.testing.assert_close(converted.net(golden['input']), golden['outputs'][num_feat], atol=1e-5, rtol=0)


def test_an_arm_net_has_branches_up_to_its_width(shared):
    with pytest.raises(OptionError, match='no branch of width 90; the widest is 64'):
        convert(shared('weights/arm-carn.pth'), num_feat=90)
    with pytest.raises(OptionError, match='no branch of width 37'):
        convert(shared('weights/arm-carn.pth'), num_feat=37)
    with pytest.raises(OptionError, match='--from arm, if it is one'):  # names alone do not tell ARM-Net's FSRCNN
        convert(shared('weights/arm-fsrcnn.pth'), num_feat=36)
    assert convert(shared('weights/arm-fsrcnn.pth'), 'arm', num_feat=36).block['num_feat'] == 36


@pytest.mark.parametrize('key, value, message', [
    ('mask.weight', torch.zeros(2), 'mask.weight belongs neither to the classifier nor to one of the branches'),
    ('net5.entry.weight', torch.zeros(2), 'net5.entry.weight belongs neither'),
])
def test_no_weight_is_left_out_silently(shared, write, key, value, message):
    state = torch.load(shared('golden/cdnsr_fsrcnn.pth'), weights_only=True)['state_dict']
    with pytest.raises(OptionError, match=message):
        convert(write(dict(state, **{key: value})))


def test_weights_that_are_no_numbers_are_not_written(write, tmp_path):
    _, state = carn_of_classsr()
    state['entry.bias'][0] = float('nan')
    with pytest.raises(OptionError, match='contains values that are not finite in conv_first.bias'):
        save(convert(write(state)), str(tmp_path / 'x.pth'))
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.slow
@pytest.mark.parametrize('family, mixture', [('auto', 'gumbel'), ('cdnsr', 'gumbel'), ('classsr', 'softmax')])
@pytest.mark.parametrize('backbone', ['carn', 'fsrcnn', 'srresnet'])
def test_a_whole_network(shared, write, backbone, family, mixture):
    golden = torch.load(shared(f'golden/cdnsr_{backbone}.pth'), weights_only=True)
    converted = convert(write(golden['state_dict']), family)
    assert converted.block['mixture'] == mixture
    with torch.no_grad():
        output = converted.net(golden['input'])
    torch.testing.assert_close(
        output, golden['hard_output'], atol=1e-5 * max(1, golden['hard_output'].abs().max()), rtol=0)


def test_a_whole_network_of_rcan(shared, write):
    golden = torch.load(shared('golden/rcan_small.pth'), weights_only=True)
    classifier = torch.load(shared('golden/cdnsr_carn.pth'), weights_only=True)
    state = {key: value for key, value in classifier['state_dict'].items() if key.startswith('classifier.')}
    for i in (1, 2, 3):
        state.update({f'net{i}.{key}': value for key, value in golden['state_dict'].items()})
    converted = convert(write(state))
    assert [block['type'] for block in converted.block['branches']] == ['RCAN'] * 3
    with torch.no_grad():
        output, routing = converted.net(golden['input'] / 255, return_routing=True)
        # its classifier sees 0 to 1 in the published code too
        logits = converted.net.classifier(classifier['input'])
    torch.testing.assert_close(
        output, golden['output'] / 255, atol=1e-5 * float(golden['output'].abs().max()) / 255, rtol=0)
    torch.testing.assert_close(logits, classifier['logits'], atol=1e-4, rtol=0)


@pytest.mark.parametrize('wrap', [
    lambda state: state, lambda state: {'params': state}, lambda state: {'params_ema': state, 'params': {}},
    lambda state: {'state_dict': {f'module.{key}': value for key, value in state.items()}, 'epoch': 3},
    lambda state: {'model': {'sd': state}}
], ids=['bare', 'params', 'ema', 'state_dict', 'model'])  # yapf: disable
def test_wrapped_weights(write, wrap):
    net, state = carn_of_classsr()
    assert_same(convert(write(wrap(state))).net, net)


def test_mean_shifts_that_were_trained_are_folded(write):
    """They are convs in the published code, and are optimised there."""
    mean = (0.45, 0.44, 0.4)
    plain_net, state = carn_of_classsr(mean=(0., 0., 0.))
    state.update({'sub_mean.weight': torch.eye(3).view(3, 3, 1, 1) + 0.1 * torch.randn(3, 3, 1, 1)})
    state.update({'add_mean.weight': torch.eye(3).view(3, 3, 1, 1) + 0.1 * torch.randn(3, 3, 1, 1)})
    state.update({'sub_mean.bias': -torch.tensor(mean) + 0.05 * torch.randn(3), 'add_mean.bias': torch.tensor(mean)})

    def published(x):
        x = F.conv2d(x, state['sub_mean.weight'], state['sub_mean.bias'])
        return F.conv2d(plain_net(x), state['add_mean.weight'], state['add_mean.bias'])

    converted = convert(write(state))
    assert_same(converted.net, published, atol=1e-5)
    assert any('mean shifts' in note for note in converted.notes)


def test_an_own_checkpoint_changes_its_format_only(write, tmp_path):
    block = {'type': 'FSRCNN', 'num_feat': 4, 'upscale': 2}
    net = build_network(dict(block))
    content = {'params': {key: torch.zeros_like(value) for key, value in net.state_dict().items()}}
    path = write(dict(content, params_ema=net.state_dict(), network_g=block, scale=2))
    converted = convert(path)
    assert converted.family == 'own' and converted.block == block
    save(converted, str(tmp_path / 'x.safetensors'))
    with safe_open(str(tmp_path / 'x.safetensors'), 'pt') as file:
        assert json.loads(file.metadata()['network_g']) == block and file.metadata()['scale'] == '2'
    assert_same(load_network(str(tmp_path / 'x.safetensors')), net.eval(), atol=0)  # the EMA weights
    again = convert(str(tmp_path / 'x.safetensors'))
    assert_same(again.net, net, atol=0)


@pytest.mark.parametrize('content, kwargs, message', [
    ({'a': torch.zeros(1), 'b': torch.zeros(1)}, {}, r'of no known family; known: .*cdnsr.*First keys: a, b'),
    ({'a.weight': torch.zeros(1)}, {'family': 'carn'}, 'is not of family carn. First keys: a.weight'),
    ({'a.weight': torch.zeros(1)}, {'family': 'vgg'}, '--from vgg: accepted: auto, abpn, arm, carn'),
    ({}, {}, "expected 'params' or 'params_ema', but found nothing"),
    ({'epoch': 3, 'arch': 'x'}, {}, "expected 'params' or 'params_ema', but found epoch, arch"),
    ([1, 2], {}, 'expected a dict of weights, but got list'),
    (carn_of_classsr()[1], {'upscale': 2}, 'is of scale x4, not x2'),
    (carn_of_classsr()[1], {'num_feat': 4}, 'only an ARM-Net contains narrower networks'),
])  # yapf: disable
def test_what_cannot_be_converted_is_said_in_one_line(write, content, kwargs, message):
    with pytest.raises(OptionError, match=message) as caught:
        convert(write(content), **kwargs)
    assert '\n' not in str(caught.value)


def test_an_incomplete_network_names_what_is_missing(write):
    _, state = carn_of_classsr()
    del state['b2.b1.body.2.bias']
    with pytest.raises(
            OptionError, match=r'does not fit the network CARN_M: Missing key.*body.bodies.1.bodies.0.conv2.bias'):
        convert(write(state))
    _, state = carn_of_classsr()
    with pytest.raises(OptionError, match=r'does not fit .*Unexpected key.*extra'):
        convert(write(dict(state, extra=torch.zeros(2))))


class Harmful:

    def __reduce__(self):
        return os.system, ('touch harmed', )


def test_a_file_runs_no_code(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match='not a readable checkpoint'):
        convert(write({'entry.weight': Harmful()}))
    assert not (tmp_path / 'harmed').exists()


def test_a_broken_safetensors_file(tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{"a":')
    with pytest.raises(OptionError, match='not a readable .safetensors file'):
        load_checkpoint(str(tmp_path / 'x.safetensors'))
