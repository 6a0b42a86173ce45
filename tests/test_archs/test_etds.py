"""ETDS and PlainConvSR."""
import copy
import pytest
import torch
from torch.nn import functional as F

from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY

ETDS, PlainConvSR = (ARCH_REGISTRY.get(name) for name in ('ETDS', 'PlainConvSR'))
NETS = [(ETDS, {}), (ETDS, {
    'num_residual_feat': 5
}), (PlainConvSR, {}), (PlainConvSR, {
    'clip': False
}), (PlainConvSR, {
    'clip': False,
    'residual': True,
    'act_type': 'prelu'
}), (PlainConvSR, {
    'num_feat': [5, 4, 7],
    'act_type': 'prelu'
})]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def shaken(net):
    """The network with no weight at zero, in evaluation mode."""
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return net.eval()


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize('cls,kwargs', NETS)
@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_size_is_exactly_upscaled_and_state_dict_round_trips(cls, kwargs, upscale):
    block = {'type': cls.__name__, 'num_feat': 9, 'num_block': 2, 'upscale': upscale, **kwargs}
    net, other = shaken(build_network(block)), build_network(block).eval()
    other.load_state_dict(net.state_dict())
    for size in ((1, 1), (5, 8), (13, 7)):
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            assert net(x).shape == (2, 3, size[0] * upscale, size[1] * upscale)
            assert torch.equal(net(x), other(x))


@pytest.mark.parametrize('cls,kwargs', NETS)
def test_everything_but_the_clip_is_trained(cls, kwargs):
    net = cls(**{'num_feat': 9, 'num_block': 2, **kwargs})
    optimizer = torch.optim.Adam([param for param in net.parameters() if param.requires_grad], 1e-3)
    x, gt = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 32, 32)
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):  # what starts at zero lets the gradient through after the first
        optimizer.zero_grad()
        (net(x) - gt).abs().mean().backward()
        optimizer.step()
    kept = [name for name, value in net.state_dict().items() if torch.equal(value, before[name])]
    assert kept == [name for name in before if 'conv_clip' in name]


@pytest.mark.parametrize('upscale', [1, 2, 3, 4])
@pytest.mark.parametrize('num_residual_feat', [3, 6])
def test_residual_stream_starts_as_nearest_neighbour(upscale, num_residual_feat):
    net = ETDS(num_feat=12, num_block=3, upscale=upscale, num_residual_feat=num_residual_feat)
    x = torch.rand(2, 3, 5, 9)
    output, residual = net(x, return_residual=True)
    close(residual, F.interpolate(x, scale_factor=upscale, mode='nearest'), 1e-7)
    assert torch.equal(output, residual)


def test_residual_channels_beyond_the_colours_learn():
    net = ETDS(num_feat=12, num_block=2, num_residual_feat=6)
    # one step moves the way out of the channels, the next reaches what comes before
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = net(torch.rand(2, 3, 8, 8))
        (output - torch.rand_like(output)).square().mean().backward()
        optimizer.step()
    assert (net.conv_residual_first.weight.grad[3:].flatten(1).abs().sum(dim=1) > 0).all()
    assert (net.conv_residual_last.weight.grad[:, 3:].abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize('num_in_ch,num_residual_feat', [(3, 3), (3, 4), (3, 11), (1, 1), (1, 5)])
@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_deployed_equals_the_two_streams(num_in_ch, num_residual_feat, upscale):
    net = shaken(ETDS(num_in_ch, num_in_ch, upscale, 2, 12, num_residual_feat))
    plain, state = copy.deepcopy(net), torch.get_rng_state()
    plain.switch_to_deploy()
    assert torch.equal(state, torch.get_rng_state())
    for size in ((1, 1), (7, 5), (16, 33)):
        x = torch.rand(2, num_in_ch, *size)
        with torch.no_grad():
            close(plain(x), net(x))
    convs = ('conv_first', 'backbone_convs.0', 'backbone_convs.1', 'conv_last')
    assert list(plain.state_dict()) == [f'{conv}.{kind}' for conv in convs for kind in ('weight', 'bias')]
    assert not plain.residual_parameters() and len(net.residual_parameters()) == 12
    plain.switch_to_deploy()  # again: nothing happens
    with torch.no_grad():
        close(plain(x), net(x))
    with pytest.raises(RuntimeError, match='no residual stream'):
        plain(x, return_residual=True)


def test_deployed_keeps_type_and_values_of_double_precision():
    net = shaken(ETDS(num_feat=8, num_block=1).double())
    x = torch.rand(1, 3, 6, 5, dtype=torch.float64)
    expected = net(x)
    net.switch_to_deploy()
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_clip_is_the_clip(upscale):
    net = PlainConvSR(upscale=upscale, num_feat=8, num_block=1)
    shaken(net).set_clip()
    assert net.conv_last.out_channels == {2: 12, 3: 28, 4: 48}[upscale]
    plain = PlainConvSR(upscale=upscale, num_feat=8, num_block=1, clip=False)
    rows = plain.conv_last.out_channels
    with torch.no_grad():
        state = {name: value for name, value in net.state_dict().items() if 'clip' not in name}
        state['conv_last.weight'] = -5 * state['conv_last.weight'][:rows]
        state['conv_last.bias'] = 1 - state['conv_last.bias'][:rows]
        net.conv_last.weight.mul_(5)
        plain.load_state_dict(state)
        x = torch.rand(2, 3, 9, 7)
        unclipped = plain(x)
        assert unclipped.min() < 0 and unclipped.max() > 1
        close(net(x), unclipped.clamp(0, 1))


def test_residual_is_the_repeated_input():
    net = PlainConvSR(upscale=3, num_feat=4, num_block=1, residual=True, clip=False)
    x = torch.rand(1, 3, 5, 4)
    close(net(x), F.interpolate(x, scale_factor=3, mode='nearest'), 0)
    # without it, the start is a picture that no clip cuts off
    close(PlainConvSR(num_feat=4)(x), torch.full((1, 3, 20, 16), 0.5), 0)


@pytest.mark.parametrize('build,message', [
    (lambda: ETDS(num_residual_feat=2), r'from num_in_ch \(3\) to less than num_feat \(32\), but got 2'),
    (lambda: ETDS(num_feat=3), 'but got 3'),
    (lambda: ETDS(num_out_ch=1), 'as many outputs as inputs, but got 1 and 3'),
    (lambda: PlainConvSR(num_feat=[8, 8]), r'num_block \+ 1 = 5 convs, but got \[8, 8\]'),
    (lambda: PlainConvSR(act_type='gelu'), "'relu' or 'prelu', but got 'gelu'"),
    (lambda: PlainConvSR(residual=True), 'residual=True needs clip=False'),
    (lambda: PlainConvSR(num_out_ch=1, residual=True, clip=False), 'as many inputs as outputs, but got 3 and 1'),
])
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
