"""SPAN, SPANV2 and SMFANet."""
import copy
import inspect
import pytest
import torch
from torch.nn import functional as F

from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY

SPAN, SPANV2, SMFANet = (ARCH_REGISTRY.get(name) for name in ('SPAN', 'SPANV2', 'SMFANet'))
RepConv3x3 = inspect.getmodule(SPAN).RepConv3x3
SMALL = [dict(type='SPAN', num_feat=8, num_block=2), dict(type='SPANV2', num_feat=8, num_block=2)]
SMALL += [dict(type='SMFANet', num_feat=8, num_block=2), dict(type='SPAN', num_feat=8, num_block=2, deploy=True)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def stirred(net):
    """A network with all of its weights away from where they start."""
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return net.eval()


@pytest.mark.parametrize('upscale', [2, 3, 4])
@pytest.mark.parametrize('block', SMALL, ids=lambda block: block['type'] + 'deploy' * block.get('deploy', False))
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (7, 8), (13, 21)])
def test_any_size_and_either_kind_of_image(block, upscale, size):
    for channels in (3, 1):
        net = build_network(dict(block, upscale=upscale, num_in_ch=channels, num_out_ch=channels)).eval()
        with torch.no_grad():
            output = net(torch.rand(2, channels, *size))
        assert output.shape == (2, channels, size[0] * upscale, size[1] * upscale)
        assert output.isfinite().all()


@pytest.mark.parametrize('block', SMALL[:3], ids=lambda block: block['type'])
@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_starts_as_bilinear_upsampling_and_all_weights_learn(block, upscale):
    torch.manual_seed(0)
    net = build_network(dict(block, upscale=upscale))
    x = torch.rand(2, 3, 12, 16)
    expected = F.interpolate(x, scale_factor=upscale, mode='bilinear')
    inner = (..., slice(2 * upscale, -2 * upscale), slice(2 * upscale, -2 * upscale))  # zeros surround the image
    torch.testing.assert_close(net(x)[inner], expected[inner], atol=1e-4, rtol=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):  # those before the last conv have a gradient once that is no zero
        optimizer.zero_grad()
        (net(x) - torch.rand_like(expected)).abs().mean().backward()
        optimizer.step()
    still = [name for name, param in net.named_parameters() if param.grad is None or not param.grad.any()]
    assert not still


def test_features_come_through_the_guided_blocks_at_the_start():
    torch.manual_seed(0)
    x, sizes = torch.rand(2, 3, 24, 24), []
    for block in SPANV2().body:
        x = block(x)
        sizes.append(x.std())
    assert sizes[-1] > 0.5 * sizes[0]  # less than a thousandth as torch initialises the convs


@pytest.mark.parametrize('sizes', [(1, 1), (6, 9)])
@pytest.mark.parametrize('channels', [(3, 8), (8, 8)])
def test_a_folded_conv_is_the_convs_it_was_trained_as(channels, sizes):
    torch.manual_seed(0)
    conv = RepConv3x3(*channels)
    x = torch.randn(2, channels[0], *sizes)
    # the long way: a bias of the first 1x1 conv is added in the padding too
    slow = conv.squeeze(conv.spatial(conv.expand(F.pad(x, (1, 1, 1, 1))))) + conv.skip(x)
    torch.testing.assert_close(conv(x), slow)
    conv.switch_to_deploy()
    assert [name for name, _ in conv.named_parameters()] == ['conv.weight', 'conv.bias']
    torch.testing.assert_close(conv(x), slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('block', SMALL, ids=lambda block: block['type'] + 'deploy' * block.get('deploy', False))
@pytest.mark.parametrize('upscale', [2, 3, 4])
@pytest.mark.parametrize('channels', [3, 1])
def test_deployed_it_makes_the_same_image(block, upscale, channels):
    torch.manual_seed(0)
    net = stirred(build_network(dict(block, upscale=upscale, num_in_ch=channels, num_out_ch=channels)))
    fast = copy.deepcopy(net)
    for module in list(fast.modules()):  # as the engine does
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
            module.switch_to_deploy()  # a second time changes nothing
    for size in ((1, 1), (9, 20), (16, 8)):
        x = torch.rand(2, channels, *size)
        with torch.no_grad():
            expected, output = net(x), fast(x)
        torch.testing.assert_close(output, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_the_weights_of_a_deployed_span_load_into_its_deploy_form():
    net = stirred(SPAN(num_feat=8, num_block=2))
    x = torch.rand(1, 3, 9, 8)
    with torch.no_grad():
        expected = net(x)
        net.switch_to_deploy()
        other = SPAN(num_feat=8, num_block=2, deploy=True).eval()
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('size', [(8, 8), (9, 15), (30, 17), (64, 40)])
def test_smfa_equals_a_loop_over_pixels(size):
    torch.manual_seed(0)
    smfa = stirred(SMFANet(num_feat=4, num_block=1)).body[0].smfa
    x = torch.randn(1, 4, *size)
    h, w = size
    with torch.no_grad():
        detail, features = smfa.conv_first(x).split(4, dim=1)
        pooled = torch.empty(1, 4, h // 8, w // 8)
        for i in range(h // 8):
            for j in range(w // 8):  # adaptive pooling: from the floor of where a cell begins to the ceiling of its end
                rows = slice(i * h // (h // 8), -(-(i + 1) * h // (h // 8)))
                columns = slice(j * w // (w // 8), -(-(j + 1) * w // (w // 8)))
                pooled[..., i, j] = features[..., rows, columns].amax((2, 3))
        mean = features.mean((2, 3), keepdim=True)
        variance = ((features - mean)**2).sum((2, 3), keepdim=True) / (h * w - 1)
        cells = smfa.conv_depthwise(pooled) * smfa.alpha + variance * smfa.beta
        cells = F.gelu(smfa.conv_modulation(cells))
        modulation = torch.empty(1, 4, h, w)
        for y in range(h):
            for column in range(w):
                modulation[..., y, column] = cells[..., y * (h // 8) // h, column * (w // 8) // w]
        expected = smfa.conv_last(features * modulation + smfa.local_detail(detail))
        torch.testing.assert_close(smfa(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('build, message', [
    (lambda: SPAN(num_in_ch=3, num_out_ch=1), 'as many outputs as inputs, but got 1 and 3'),
    (lambda: SPAN(num_block=0), 'num_block of at least 1, but got 0'),
    (lambda: SPANV2(num_in_ch=3, num_out_ch=1), 'as many outputs as inputs, but got 1 and 3'),
    (lambda: SPANV2(num_block=0), 'num_block of at least 1, but got 0'),
    (lambda: SMFANet(num_feat=9), 'an even num_feat, but got 9'),
])
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_in_bfloat16_the_convs_are_folded_in_float32():
    torch.manual_seed(0)
    conv = RepConv3x3(8, 8).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        output = conv(x)
        weight, bias = (tensor.detach() for tensor in conv.folded(torch.float64))
        expected = F.conv2d(x, weight.float(), bias.float(), padding=1)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


@pytest.mark.parametrize('block', SMALL, ids=lambda block: block['type'] + 'deploy' * block.get('deploy', False))
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_as_a_whole(block, dtype):
    torch.manual_seed(0)
    net = build_network(dict(block, upscale=2)).eval()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = net(x)
        output = net.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0)
