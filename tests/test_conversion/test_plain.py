import copy
import pytest
import torch
from torch import nn

from basicsr.archs import build_network
from basicsr.archs.ecbsr_arch import ECBSR
from cdnsr_basicsr.archs import ETDS, FSRCNN, PlainConvSR
from cdnsr_basicsr.conversion.etds_family import recognise
from cdnsr_basicsr.conversion.plain import options_of, plain_branches, prove_equal, to_plain
from tests.helpers import close, fsrcnn, shaken

PUBLISHED = ['ECBSR_{}M4C16_x4', 'ECBSR_{}M6C40_x4', 'ABPN_{}M4C28_x4', 'ABPN_{}M6C40_x4']


def load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def recognised(path):
    """The network of a published file, with its weights."""
    block, state, _ = recognise(load(path))
    net = build_network(block)
    net.load_state_dict(state)
    return net.eval()


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_etds_becomes_the_published_plain_network(shared, scale):
    golden = load(shared('golden/etds.pth'))[f'x{scale}']
    net = ETDS(**golden['config'])
    net.load_state_dict(golden['state_dict'])
    plain = to_plain(net, clip=True)
    assert list(plain.state_dict()) == list(golden['plain_state_dict'])
    for name, value in plain.state_dict().items():
        close(value, golden['plain_state_dict'][name], 1e-6)
    with torch.no_grad():
        close(plain(golden['input']), golden['plain_output'])
    prove_equal(net, plain, clip=True)


@pytest.mark.parametrize('name', PUBLISHED)
def test_residual_networks_become_the_published_plain_networks(shared, name):
    source, converted = (recognised(shared(f'weights/{name.format(form)}.pth')) for form in ('', 'ET_'))
    plain = to_plain(source, clip=True)
    assert options_of(plain) == options_of(converted)
    for key, value in plain.state_dict().items():
        close(value, converted.state_dict()[key], 1e-6)
    x = torch.rand(2, 3, 19, 26)
    with torch.no_grad():
        close(plain(x), converted(x), 1e-4)
        close(source(x).clamp(0, 1), converted(x), 1e-4)
    prove_equal(source, plain, clip=True)
    prove_equal(source, to_plain(source))


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_networks_upscale(shared, name):
    # far from nearest-neighbour upsampling's error would be an activation or a sum in the wrong place
    net = recognised(shared(f'weights/{name.format("")}.pth'))
    x = torch.linspace(0, 1, 24).expand(1, 3, 20, 24).contiguous()
    expected = nn.functional.interpolate(x, scale_factor=4, mode='bilinear')
    with torch.no_grad():
        close(net(x)[..., 8:-8, 8:-8], expected[..., 8:-8, 8:-8], 0.02)


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('kwargs', [{
    'num_residual_feat': 3
}, {
    'num_residual_feat': 5,
    'upscale': 3
}, {
    'num_residual_feat': 9,
    'num_feat': 10
}, {
    'num_in_ch': 1,
    'num_out_ch': 1,
    'num_residual_feat': 2,
    'num_feat': 7,
    'upscale': 2
}])
def test_etds_with_any_width_of_the_residual_stream(kwargs, clip):
    net = shaken(ETDS(**{'num_feat': 12, 'num_block': 2, **kwargs}))
    for multiple in (1, 4):
        plain = to_plain(net, clip, multiple)
        assert all(conv.out_channels % multiple == 0 for conv in (plain.conv_first, *plain.backbone_convs))
        prove_equal(net, plain, clip)
    net.switch_to_deploy()
    prove_equal(net, to_plain(net, clip), clip)


@pytest.mark.parametrize('act_type', ['prelu', 'relu', 'rrelu', 'linear'])
@pytest.mark.parametrize('with_idt', [True, False])
@pytest.mark.parametrize('colors,upscale,clip', [(3, 3, True), (1, 2, False), (3, 4, False)])
def test_ecbsr_in_training_form(act_type, with_idt, colors, upscale, clip):
    net = shaken(ECBSR(colors, colors, 2, 7, with_idt, act_type, upscale))
    plain = to_plain(net, clip)
    assert plain.conv_first.out_channels == 12 - 4 * (colors == 1) and not plain.residual
    prove_equal(net, plain, clip)
    if act_type == 'prelu':  # without rounding in between
        x = torch.rand(1, colors, 9, 8)
        with torch.no_grad():
            for block in net.backbone[:-1]:
                block.act.weight.copy_(torch.rand(7))
            close(to_plain(net)(x), net(x), 1e-4)


def test_ecbsr_from_gray_to_colour():
    net = shaken(ECBSR(1, 3, 1, 6, False, 'prelu', 2))
    prove_equal(net, to_plain(net))


@pytest.mark.parametrize('act_type', ['relu', 'prelu'])
def test_residual_network_with_a_width_for_each_conv(act_type):
    net = shaken(PlainConvSR(upscale=3, num_feat=[6, 5, 27], num_block=2, act_type=act_type, residual=True, clip=False))
    plain = to_plain(net, clip=True)
    assert options_of(plain)['num_feat'] == [12, 8, 32] and options_of(plain)['act_type'] == act_type
    assert options_of(to_plain(net, multiple=1))['num_feat'] == [9, 8, 30]
    prove_equal(net, plain, clip=True)


@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_clip_is_taken_out(upscale):
    net = shaken(ETDS(upscale=upscale, num_feat=8, num_block=1))
    clipped = to_plain(net, clip=True)
    unclipped = to_plain(clipped)
    prove_equal(net, unclipped)
    prove_equal(clipped, unclipped)
    prove_equal(clipped, to_plain(clipped, clip=True), clip=True)
    clipped.conv_clip.bias.data[0] = 0.9
    with pytest.raises(ValueError, match='conv_clip does more than clip'):
        to_plain(clipped)


@pytest.mark.parametrize('name', ['M5C16_x4', 'M6C32_x2', 'M6C32_x3'])
def test_clip_is_taken_out_of_published_networks(shared, name):
    net = recognised(shared(f'weights/ETDS_{name}.pth'))
    plain = to_plain(net)
    assert not plain.clip and 'conv_clip.weight' not in plain.state_dict()
    prove_equal(net, plain)


def test_conversion_keeps_source_type_and_mode():
    net = ETDS(num_feat=8, num_block=1).double().train()
    before = copy.deepcopy(net.state_dict())
    plain = to_plain(net)
    assert plain.training and plain.conv_last.weight.dtype == torch.float64
    prove_equal(net, plain)
    assert net.training and plain.training and all(torch.equal(net.state_dict()[key], before[key]) for key in before)
    assert not any(param.grad_fn for param in plain.parameters())


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match='FSRCNN cannot be made plain; accepted: ETDS, ECBSR, PlainConvSR'):
        to_plain(FSRCNN())
    with pytest.raises(ValueError, match='act_type softplus'):
        to_plain(ECBSR(3, 3, 1, 4, False, 'softplus', 4))


def test_a_difference_is_found():
    net = shaken(ETDS(num_feat=8, num_block=1, upscale=2))
    plain = to_plain(net)
    prove_equal(net, plain)
    plain.conv_last.bias.data[7] += 2e-4
    with pytest.raises(ValueError, match=r'ETDS and its plain form differ by 0\.0002 on 1x1 pixels'):
        prove_equal(net, plain)
    plain.conv_last.bias.data[7] = float('nan')
    with pytest.raises(ValueError, match='differ by nan'):
        prove_equal(net, plain)


def test_a_missing_clip_is_found():
    net = shaken(ETDS(num_feat=8, num_block=1))
    with torch.no_grad():
        net.conv_last.weight.mul_(5)
    with pytest.raises(ValueError, match='differ'):
        prove_equal(net, to_plain(net), clip=True)
    with pytest.raises(ValueError, match='differ'):
        prove_equal(net, to_plain(net, clip=True))


@pytest.mark.parametrize('block', [{}, {
    'clip': False
}, {
    'num_feat': [4, 6, 8],
    'act_type': 'prelu',
    'residual': True,
    'clip': False
}, {
    'num_in_ch': 1,
    'num_out_ch': 1,
    'upscale': 3
}])
def test_options_build_the_network(block):
    net = shaken(PlainConvSR(**{'num_feat': 8, 'num_block': 2, **block}))
    other = build_network(options_of(net)).eval()
    other.load_state_dict(net.state_dict())
    x = torch.rand(1, block.get('num_in_ch', 3), 6, 7)
    assert torch.equal(net(x), other(x))
    assert set(options_of(net)) == {'type', *PlainConvSR.__init__.__code__.co_varnames[1:9]}


def test_branches_of_a_routed_network(tiny_net):
    etds = {'type': 'ETDS', 'num_feat': 9, 'num_block': 1, 'num_residual_feat': 4, 'upscale': 2}
    abpn = {'type': 'PlainConvSR', 'num_feat': 5, 'num_block': 1, 'residual': True, 'clip': False, 'upscale': 2}
    plain = {'type': 'PlainConvSR', 'num_feat': 4, 'num_block': 1, 'upscale': 2}
    ecbsr = dict(num_in_ch=3, num_out_ch=3, num_block=1, num_channel=4, with_idt=False, act_type='prelu', scale=2)
    block = tiny_net(2, [plain, etds, abpn, dict(ecbsr, type='ECBSR'), fsrcnn(6, 2)])
    net, before = shaken(build_network(block)), copy.deepcopy(block)
    converted, changed = plain_branches(net, block)
    assert block == before and isinstance(net.branches[1], ETDS)
    types = ['PlainConvSR'] * 4 + ['FSRCNN']
    assert [branch['type'] for branch in changed['branches']] == types
    assert changed['branches'][0] == plain and changed['branches'][1]['clip'] is False
    assert {
        key: changed[key]
        for key in changed if key != 'branches'
    } == {
        key: block[key]
        for key in block if key != 'branches'
    }
    loaded = build_network(changed).eval()
    loaded.load_state_dict(converted.state_dict())
    x = torch.rand(6, 3, 16, 12)
    with torch.no_grad():
        for branch, source in zip(loaded.branches, net.branches):
            close(branch(x), source(x), 1e-4)
        close(loaded(x), net(x), 1e-4)
