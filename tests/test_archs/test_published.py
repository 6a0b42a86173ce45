import pytest
import torch

from basicsr.archs import build_network
from basicsr.archs.rcan_arch import RCAN
from cdnsr_basicsr.archs import CARN_M, FSRCNN
from cdnsr_basicsr.archs.cdnsr_arch import gumbel_softmax
from tests import published

BACKBONES = {
    'carn': ([{
        'type': 'CARN_M',
        'num_feat': n
    } for n in (36, 52, 64)], published.CARN),
    'fsrcnn': ([{
        'type': 'FSRCNN',
        'num_feat': n
    } for n in (16, 36, 56)], published.FSRCNN),
    'srresnet': ([{
        'type': 'MSRResNet',
        'num_feat': n
    } for n in (36, 52, 64)], published.SRRESNET),
}


def load_golden(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize('backbone', list(BACKBONES))
def test_cdnsr_equals_golden(shared, backbone):
    golden = load_golden(shared(f'golden/cdnsr_{backbone}.pth'))
    branches, table = BACKBONES[backbone]
    net = build_network({'type': 'CDNSR', 'branches': branches, 'classifier': {'type': 'PatchClassifier'}}).eval()
    net.load_state_dict(published.rename_cdnsr(golden['state_dict'], table))

    with torch.no_grad():
        output, routing = net(golden['input'], return_routing=True)
        branch_outputs = [branch(golden['input'][:2]) for branch in net.branches]
    torch.testing.assert_close(routing.logits, golden['logits'], atol=1e-5, rtol=0)
    torch.testing.assert_close(routing.logits.softmax(1), golden['probs'], atol=1e-5, rtol=0)
    assert routing.weights.sum(0).int().tolist() == golden['picks']
    # the random SRResNets reach values of 30, where float32 itself is 2e-5 off; 1e-5 is meant for images in [0, 1]
    atol = 1e-5 * max(1, float(golden['hard_output'].abs().max()))
    torch.testing.assert_close(output, golden['hard_output'], atol=atol, rtol=0)
    for ours, theirs in zip(branch_outputs, golden['branch_outputs']):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)

    weights = gumbel_softmax(routing.logits, golden['tau'], golden['uniform'])
    torch.testing.assert_close(weights, golden['gumbel_probs'], atol=1e-5, rtol=0)
    soft = torch.einsum('bm,mbchw->bchw', weights[:2], torch.stack(branch_outputs))
    torch.testing.assert_close(soft, golden['soft_output'], atol=atol, rtol=0)


def test_rcan_of_basicsr_equals_golden(shared):
    golden = load_golden(shared('golden/rcan_small.pth'))
    # the published network sees 0..255 but shifts it by a mean of 0..1
    net = RCAN(3, 3, 36, 2, 3, 16, 4, rgb_mean=[mean / 255 for mean in (0.4488, 0.4371, 0.4040)]).eval()
    net.load_state_dict(published.rename(golden['state_dict'], published.RCAN))
    with torch.no_grad():
        output = net(golden['input'] / 255)
    torch.testing.assert_close(output, golden['output'] / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize('width', [36, 52, 64])
def test_carn_sliced_from_published_weights(shared, width):
    weights = torch.load(shared('weights/arm-carn.pth'), map_location='cpu', weights_only=True)
    golden = load_golden(shared('golden/arm_published.pth'))['arm-carn']
    net = CARN_M(num_feat=width, fusion_bias=True).eval()
    net.load_state_dict(published.slice_to(published.rename(weights, published.CARN), net))
    with torch.no_grad():
        torch.testing.assert_close(net(golden['input']), golden['outputs'][width], atol=1e-5, rtol=0)


@pytest.mark.parametrize('width', [16, 36, 56])
def test_fsrcnn_sliced_from_published_weights(shared, width):
    weights = torch.load(shared('weights/arm-fsrcnn.pth'), map_location='cpu', weights_only=True)
    golden = load_golden(shared('golden/arm_published.pth'))['arm-fsrcnn']
    net = FSRCNN(num_feat=width).eval()
    net.load_state_dict(published.slice_to(published.rename(weights, published.FSRCNN), net))
    with torch.no_grad():
        torch.testing.assert_close(net(golden['input']), golden['outputs'][width], atol=1e-5, rtol=0)
