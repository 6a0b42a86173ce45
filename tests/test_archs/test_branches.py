"""CARN_M, FSRCNN and Interpolation, and what branches have in common."""
import pytest
import torch
from torch.nn import functional as F

from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY

CARN_M, FSRCNN, Interpolation = (ARCH_REGISTRY.get(name) for name in ('CARN_M', 'FSRCNN', 'Interpolation'))
BRANCHES = [{
    'type': 'CARN_M',
    'num_feat': 8
}, {
    'type': 'FSRCNN',
    'num_feat': 6
}, {
    'type': 'Interpolation'
}, {
    'type': 'Interpolation',
    'mode': 'bilinear'
}, {
    'type': 'MSRResNet',
    'num_feat': 4,
    'num_block': 1
}, {
    'type': 'RCAN',
    'num_in_ch': 3,
    'num_out_ch': 3,
    'num_feat': 16,
    'num_group': 1,
    'num_block': 1
}]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('upscale', [2, 3, 4])
@pytest.mark.parametrize('block', BRANCHES, ids=lambda block: block['type'] + block.get('mode', ''))
@pytest.mark.parametrize('size', [(1, 1), (5, 8), (13, 7)])
def test_size_is_exactly_upscaled(block, upscale, size):
    net = build_network({**block, 'upscale': upscale}).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, *size)).shape == (2, 3, size[0] * upscale, size[1] * upscale)


@pytest.mark.parametrize('cls,kwargs', [(CARN_M, {}), (CARN_M, {'fusion_bias': True, 'group': 2}), (FSRCNN, {})])
@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_state_dict_round_trip(cls, kwargs, upscale):
    net, other = (cls(num_feat=8, upscale=upscale, **kwargs) for _ in range(2))
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.01 * torch.randn_like(param))
    other.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 9, 6)
    assert torch.equal(net(x), other(x))


def test_fusion_bias_exists_only_if_asked_for():
    names = [name for name, _ in CARN_M(num_feat=8).named_parameters() if 'fusions' in name]
    with_bias = [name for name, _ in CARN_M(num_feat=8, fusion_bias=True).named_parameters() if 'fusions' in name]
    assert len(names) == 12 and len(with_bias) == 24


def test_carn_mean_is_no_parameter():
    net = CARN_M(num_feat=8)
    assert not any('mean' in name for name, _ in net.named_parameters())
    assert not any('mean' in name for name in net.state_dict())


@pytest.mark.parametrize('upscale', [1, 2, 3, 4])
def test_fsrcnn_starts_as_bilinear_upsampling(upscale):
    net = FSRCNN(num_feat=8, upscale=upscale)
    x = torch.rand(1, 3, 12, 9)
    expected = F.interpolate(x, scale_factor=upscale, mode='bilinear')
    inner = slice(2 * upscale, -2 * upscale)
    # what the random channels add is small, and nothing at the start of an average photograph
    assert (net(x) - expected)[..., inner, inner].abs().mean() < 0.05
    net.deconv.weight.data[3:] = 0
    torch.testing.assert_close(net(x)[..., inner, inner], expected[..., inner, inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize('upscale', [2, 3, 4])
@pytest.mark.parametrize('fusion_bias', [True, False])
def test_carn_starts_as_bilinear_upsampling(upscale, fusion_bias):
    net = CARN_M(num_feat=36, upscale=upscale, fusion_bias=fusion_bias)
    x = torch.rand(1, 3, 12, 9)
    expected = x
    for factor in (2, 2) if upscale == 4 else (upscale, ):
        expected = F.interpolate(expected, scale_factor=factor, mode='bilinear')
    inner = slice(2 * upscale, -2 * upscale)
    assert (net(x) - expected)[..., inner, inner].abs().mean() < 0.05
    net.conv_last.weight.data[:, 6:] = 0
    torch.testing.assert_close(net(x)[..., inner, inner], expected[..., inner, inner], atol=1e-5, rtol=0)
    loss = (net(x) - torch.rand(1, 3, 12 * upscale, 9 * upscale)).square().mean()
    gradients = torch.autograd.grad(loss, [net.conv_first.weight, net.upconvs[0].weight, net.conv_last.weight])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_fsrcnn_too_narrow_for_colours_still_works():
    assert FSRCNN(num_feat=2, num_shrink=2)(torch.rand(1, 3, 4, 4)).shape == (1, 3, 16, 16)


def test_interpolation_keeps_constants_and_has_no_weights():
    for mode in ('bicubic', 'bilinear'):
        net = Interpolation(upscale=3, mode=mode)
        assert not list(net.parameters())
        torch.testing.assert_close(net(torch.full((1, 3, 5, 4), 0.3)), torch.full((1, 3, 15, 12), 0.3))


@pytest.mark.parametrize('build,message', [
    (lambda: CARN_M(upscale=5), 'upscale 2, 3 or 4, but got 5'),
    (lambda: CARN_M(num_feat=10), 'multiple of group 4, but got 10'),
    (lambda: FSRCNN(upscale=10), 'from 1 to 9, but got 10'),
    (lambda: Interpolation(mode='nearest'), "'bicubic' or 'bilinear', but got 'nearest'"),
])
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize('upscale', range(1, 10))
def test_deconv_in_training_is_the_transposed_conv(upscale):
    net = build_network({'type': 'FSRCNN', 'num_feat': 5, 'upscale': upscale}).deconv.double()
    torch.nn.init.normal_(net.weight)
    torch.nn.init.normal_(net.bias)
    x, results = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True), []
    grad = torch.randn(2, 3, 6 * upscale, 7 * upscale, dtype=torch.float64)
    for training in (True, False):
        output = net.train(training)(x)
        results.append((output, *torch.autograd.grad(output, (x, net.weight, net.bias), grad)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_deconv_in_training_under_autocast_and_without_gradients():
    net = build_network({'type': 'FSRCNN', 'num_feat': 8, 'upscale': 4}).deconv
    x = torch.randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16):
        output = net(x)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert net.weight.grad.dtype == torch.float32 and net.weight.grad.abs().sum() > 0
    torch.testing.assert_close(output.float(), net.eval()(x), atol=0.02, rtol=0.02)
    net.train().requires_grad_(False)
    torch.testing.assert_close(net(x), net.eval()(x))


def test_prelu_in_training_is_the_prelu():
    net = FSRCNN(num_feat=4).extract[1].double()
    net.weight.data.fill_(-0.3)
    x, results = torch.randn(2, 4, 6, 7, dtype=torch.float64, requires_grad=True), []
    with torch.no_grad():
        x[0, 0, 0, :2] = 0
    grad = torch.randn_like(x)
    for training in (True, False):
        output = net.train(training)(x)
        results.append((output, *torch.autograd.grad(output, (x, net.weight), grad)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
