"""The form in which the engine runs networks that have one for inference."""
import pytest
import torch

from basicsr.archs import build_network
from cdnsr_basicsr.archs import ETDS
from cdnsr_basicsr.inference import TileUpscaler
from cdnsr_basicsr.inference.network import deployed
from tests.helpers import close, shaken

SMALL = [dict(type='SPAN', num_feat=8, num_block=2), dict(type='SPANV2', num_feat=8, num_block=2)]


def stirred(net):
    """A network with all of its weights away from where they start."""
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return net.eval()


def test_engine_upscales_with_the_deployed_form():
    net = shaken(ETDS(num_feat=8, num_block=1, upscale=3))
    upscaler, x = TileUpscaler(net, 32), torch.rand(1, 3, 20, 28)
    with torch.no_grad():
        close(upscaler.upscale(x).image, net(x))
    assert not net.deployed and upscaler.branches[0].deployed


@pytest.mark.parametrize('block', SMALL, ids=lambda block: block['type'])
def test_what_needs_float32_keeps_it(block):
    torch.manual_seed(0)
    net = stirred(build_network(dict(block, num_feat=16)))
    x = torch.rand(1, 3, 24, 24)
    mixed, rounded = deployed(net, torch.bfloat16), deployed(net, torch.bfloat16)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Conv2d):  # as it would be without
            module.register_forward_hook(lambda layer, args, out: out.bfloat16().float())
            module.to(torch.bfloat16).float()
    assert mixed.conv_last.weight.dtype == torch.float32
    assert mixed.body[0].conv2.weight.dtype == torch.bfloat16 if block['type'] == 'SPANV2' else True
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        output = mixed(x)
    with torch.no_grad():
        expected, worse = net(x), rounded(x)
    assert output.dtype == torch.float32
    assert (output - expected).abs().mean() < (worse - expected).abs().mean()
