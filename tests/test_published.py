"""Archs against outputs that were recorded: from the published code and networks, and from this package."""
import pytest
import torch
from pathlib import Path

from basicsr.archs import build_network
from cdnsr_basicsr.archs import CARN_M, ETDS, FSRCNN, PlainConvSR
from cdnsr_basicsr.archs.cdnsr_arch import gumbel_softmax
from cdnsr_basicsr.conversion import classsr_family
from cdnsr_basicsr.conversion.registry import Source, families
from cdnsr_basicsr.conversion.weights import slice_to
from cdnsr_basicsr.inference.network import deployed
from tests.helpers import close

GOLDEN = Path(__file__).parent / 'own_golden.pth'


def assert_equals_recorded(ours, recorded):
    """Equal to 1e-5, relative to the largest value where that is above 1.

    The recorded inputs or weights are random: values reach 30, where float32 itself is 2e-5 off.
    """
    torch.testing.assert_close(ours, recorded, atol=1e-5 * max(1, float(recorded.abs().max())), rtol=0)


def load_golden(path):
    return torch.load(path, weights_only=True)


def build(found):
    net = build_network(dict(found.block)).eval()
    net.load_state_dict(found.state)
    return net


@pytest.mark.parametrize('backbone, arch, widths', [('carn', 'CARN_M', [36, 52, 64]),
                                                    ('fsrcnn', 'FSRCNN', [16, 36, 56]),
                                                    ('srresnet', 'MSRResNet', [36, 52, 64])])
def test_cdnsr_equals_golden(shared, backbone, arch, widths):
    golden = load_golden(shared(f'golden/cdnsr_{backbone}.pth'))
    found = families()['cdnsr'].load(Source(golden['state_dict']), 4)
    assert [(block['type'], block['num_feat']) for block in found.block['branches']] == [(arch, n) for n in widths]
    net = build(found)

    with torch.no_grad():
        output, routing = net(golden['input'], return_routing=True)
        branch_outputs = [branch(golden['input'][:2]) for branch in net.branches]
    assert_equals_recorded(routing.logits, golden['logits'])
    assert_equals_recorded(routing.logits.softmax(1), golden['probs'])
    assert routing.weights.sum(0).int().tolist() == golden['picks']
    assert_equals_recorded(output, golden['hard_output'])
    for ours, theirs in zip(branch_outputs, golden['branch_outputs']):
        assert_equals_recorded(ours, theirs)

    weights = gumbel_softmax(routing.logits, golden['tau'], golden['uniform'])
    assert_equals_recorded(weights, golden['gumbel_probs'])
    soft = torch.einsum('bm,mbchw->bchw', weights[:2], torch.stack(branch_outputs))
    assert_equals_recorded(soft, golden['soft_output'])


def test_rcan_of_basicsr_equals_golden(shared):
    golden = load_golden(shared('golden/rcan_small.pth'))
    found = classsr_family.rcan(golden['state_dict'])
    expected = dict(num_feat=36, num_group=2, num_block=3, squeeze_factor=16, upscale=4, img_range=255)
    assert {key: found.block[key] for key in expected} == expected
    with torch.no_grad():
        output = build(found)(golden['input'] / 255)
    assert_equals_recorded(output, golden['output'] / 255)


@pytest.mark.parametrize('width', [36, 52, 64])
def test_carn_sliced_from_published_weights(shared, width):
    weights = torch.load(shared('weights/arm-carn.pth'), map_location='cpu', weights_only=True)
    golden = load_golden(shared('golden/arm_published.pth'))['arm-carn']
    net = CARN_M(num_feat=width, fusion_bias=True).eval()
    net.load_state_dict(slice_to(families()['arm'].load(Source(weights), 4).state, net))
    with torch.no_grad():
        assert_equals_recorded(net(golden['input']), golden['outputs'][width])


@pytest.mark.parametrize('width', [16, 36, 56])
def test_fsrcnn_sliced_from_published_weights(shared, width):
    weights = torch.load(shared('weights/arm-fsrcnn.pth'), map_location='cpu', weights_only=True)
    golden = load_golden(shared('golden/arm_published.pth'))['arm-fsrcnn']
    net = FSRCNN(num_feat=width).eval()
    net.load_state_dict(slice_to(families()['arm'].load(Source(weights), 4).state, net))
    with torch.no_grad():
        assert_equals_recorded(net(golden['input']), golden['outputs'][width])


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_etds_equals_golden(shared, scale):
    golden = torch.load(shared('golden/etds.pth'), weights_only=True)[f'x{scale}']
    net = ETDS(**golden['config'])
    net.load_state_dict(golden['state_dict'])
    with torch.no_grad():
        output, residual = net(golden['input'], return_residual=True)
        assert torch.equal(net(golden['input']), output)
    close(output, golden['output'])
    close(residual, golden['residual_output'])
    with torch.no_grad():
        close(deployed(net, torch.float32)(golden['input']), golden['output'])


@pytest.mark.parametrize('name', ['M5C16_x4', 'M6C32_x4', 'M7C48_x4', 'M6C32_x2', 'M6C32_x3'])
def test_plain_conv_equals_published(shared, name):
    golden = torch.load(shared('golden/etds_published.pth'), weights_only=True)[f'ETDS_{name}']
    state = torch.load(shared(f'weights/ETDS_{name}.pth'), map_location='cpu', weights_only=True)
    net = PlainConvSR(upscale=golden['upscale'], num_feat=golden['num_feat'], num_block=golden['num_block'])
    net.load_state_dict(state)
    with torch.no_grad():
        close(net(golden['input']), golden['output'])


def test_own_golden():
    # recorded from this package when it equalled the published networks; see record_own_golden
    golden = torch.load(GOLDEN, weights_only=True)
    for entry in golden:
        net = build_network(entry['network_g']).eval()
        net.load_state_dict(entry['params'])
        with torch.no_grad():
            torch.testing.assert_close(net(entry['input']), entry['output'], atol=1e-5, rtol=0)


def record_own_golden():
    torch.manual_seed(0)
    classifier = {'type': 'PatchClassifier', 'num_feat': 8}
    blocks = [{'type': 'CARN_M', 'num_feat': 4, 'upscale': scale} for scale in (2, 3, 4)]
    blocks += [{'type': 'FSRCNN', 'num_feat': 6, 'upscale': scale} for scale in (2, 3, 4)]
    blocks += [{
        'type': 'CDNSR',
        'upscale': 3,
        'branches': [blocks[4], blocks[1]],
        'classifier': classifier
    }, classifier]
    entries = []
    for block in blocks:
        net = build_network(block).eval()
        x = torch.rand(2, 3, 5, 7)
        with torch.no_grad():
            for param in net.parameters():
                param.add_(0.05 * torch.randn_like(param))
            entries.append({'network_g': block, 'params': net.state_dict(), 'input': x, 'output': net(x)})
    torch.save(entries, GOLDEN)
