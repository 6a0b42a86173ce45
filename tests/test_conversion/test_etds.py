import pytest
import torch

from basicsr.archs import build_network
from basicsr.archs.ecbsr_arch import ECBSR
from cdnsr_basicsr.archs import CARN_M, FSRCNN
from cdnsr_basicsr.conversion.etds_family import recognise
from cdnsr_basicsr.conversion.plain import options_of
from tests.helpers import close


def block(num_feat, num_block, residual=False, clip=True, act_type='relu', upscale=4):
    return dict(
        type='PlainConvSR',
        num_in_ch=3,
        num_out_ch=3,
        upscale=upscale,
        num_feat=num_feat,
        num_block=num_block,
        act_type=act_type,
        residual=residual,
        clip=clip)


PUBLISHED = {
    'ETDS_M5C16_x4': block(16, 5),
    'ETDS_M4C32_x4': block(32, 4),
    'ETDS_M6C32_x4': block(32, 6),
    'ETDS_M7C48_x4': block(48, 7),
    'ETDS_M6C32_x2': block(32, 6, upscale=2),
    'ETDS_M6C32_x3': block(32, 6, upscale=3),
    'ECBSR_M4C16_x4': block(16, 4, True, False, 'prelu'),
    'ECBSR_M6C40_x4': block(40, 6, True, False, 'prelu'),
    'ECBSR_ET_M4C16_x4': block(20, 4, act_type='prelu'),
    'ECBSR_ET_M6C40_x4': block(44, 6, act_type='prelu'),
    'ABPN_M4C28_x4': block([28] * 5 + [48], 5, True, False),
    'ABPN_M6C40_x4': block([40] * 7 + [48], 7, True, False),
    'ABPN_ET_M4C28_x4': block([32] * 5 + [52], 5),
    'ABPN_ET_M6C40_x4': block([44] * 7 + [52], 7),
}


@pytest.mark.parametrize('name', list(PUBLISHED))
def test_published_files(shared, name):
    state = torch.load(shared(f'weights/{name}.pth'), map_location='cpu', weights_only=True)
    found, renamed, _ = recognise(state)
    assert found == PUBLISHED[name]
    build_network(found).load_state_dict(renamed)
    assert len(renamed) == len(state) and sum(map(torch.sum, renamed.values())) == sum(map(torch.sum, state.values()))


@pytest.mark.parametrize('upscale', [2, 3, 4])
@pytest.mark.parametrize('options', [
    dict(type='ETDS', num_in_ch=3, num_out_ch=3, num_feat=9, num_block=12, num_residual_feat=3),
    dict(type='ETDS', num_in_ch=1, num_out_ch=1, num_feat=9, num_block=0, num_residual_feat=4),
    block(5, 12, clip=False),
    block([5, 6], 1),
    block(4, 3, act_type='prelu'),
    dict(block(4, 2), num_in_ch=1, num_out_ch=1),
])
def test_names_of_this_package(options, upscale):
    options = dict(options, upscale=upscale)
    state = build_network(options).state_dict()
    found, renamed, _ = recognise(state)
    assert found == options and renamed == state


@pytest.mark.parametrize('act_type', ['relu', 'prelu'])
@pytest.mark.parametrize('clip', [True, False])
def test_more_layers_than_digits(act_type, clip):
    # positions are numbers: 10 comes after 9
    net = build_network(block(4, 12, not clip, clip, act_type, upscale=3))
    state = {}
    for i, conv in enumerate((net.conv_first, *net.backbone_convs, net.conv_last, *([net.conv_clip] if clip else []))):
        state.update({f'backbone.{i}.0.weight': conv.weight, f'backbone.{i}.0.bias': conv.bias})
    for i, act in enumerate(net.acts):
        state.update({f'backbone.{i}.1.{name}': value for name, value in act.state_dict().items()})
    found, renamed, _ = recognise(dict(sorted(state.items())))
    assert found == options_of(net)
    other = build_network(found)
    other.load_state_dict(renamed)
    x = torch.rand(1, 3, 7, 9)
    close(other(x), net(x), 0)


def broken(name, value):
    state = dict(build_network(block(4, 2)).state_dict())
    state[name] = value
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize('state', [
    {},
    FSRCNN(num_feat=4).state_dict(),
    CARN_M(num_feat=4).state_dict(),
    ECBSR(3, 3, 1, 4, False, 'prelu', 4).state_dict(),
    broken('conv_last.bias', None),
    broken('conv_last.weight', torch.zeros(47, 4, 3, 3)),
    broken('conv_first.weight', torch.zeros(4)),
    broken('backbone_convs.1.weight', None),
    broken('backbone_convs.3.weight', torch.zeros(4, 4, 3, 3)),
    broken('conv_first.weight', torch.zeros(4, 0, 3, 3)),
    broken('conv_residual_first.weight', torch.zeros(0, 3, 3, 3)),
    broken('backbone_convs.1.weight', torch.tensor(0.)),
    broken('fc.weight', torch.zeros(4)),
    {
        'backbone.0.weight': torch.zeros(4, 3, 3, 3)
    },
    {
        'backbone.0.bias': torch.zeros(4)
    },
    {
        'backbone.0.weight': torch.zeros(4)
    },
])
def test_other_weights_are_not_recognised(state):
    assert recognise(state) is None
