import pytest
import torch

from basicsr.archs import build_network
from cdnsr_basicsr.archs import CARN_M, FSRCNN
from cdnsr_basicsr.archs.cdnsr_arch import gumbel_softmax
from cdnsr_basicsr.conversion import classsr, slice_to


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
    found = classsr.cdnsr(golden['state_dict'])
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
    found = classsr.rcan(golden['state_dict'])
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
    net.load_state_dict(slice_to(classsr.arm(weights).state, net))
    with torch.no_grad():
        assert_equals_recorded(net(golden['input']), golden['outputs'][width])


@pytest.mark.parametrize('width', [16, 36, 56])
def test_fsrcnn_sliced_from_published_weights(shared, width):
    weights = torch.load(shared('weights/arm-fsrcnn.pth'), map_location='cpu', weights_only=True)
    golden = load_golden(shared('golden/arm_published.pth'))['arm-fsrcnn']
    net = FSRCNN(num_feat=width).eval()
    net.load_state_dict(slice_to(classsr.arm(weights).state, net))
    with torch.no_grad():
        assert_equals_recorded(net(golden['input']), golden['outputs'][width])
