"""Published SPAN, SPANV2 and SMFANet."""
import pytest
import torch

from cdnsr_basicsr.archs import SPAN
from cdnsr_basicsr.conversion import modern_family
from cdnsr_basicsr.conversion.convert import convert
from cdnsr_basicsr.conversion.weights import rename
from cdnsr_basicsr.options import OptionError

PUBLISHED = {
    'SPAN_ch48_x4': ('span', dict(type='SPAN', num_feat=48, num_block=6, upscale=4, deploy=True)),
    'SPAN_ch28_x4': ('span', dict(type='SPAN', num_feat=28, num_block=6, upscale=4, deploy=True)),
    'SPANV2_x4': ('spanv2', dict(type='SPANV2', num_feat=32, num_block=5, upscale=4)),
    'SMFANet_x2': ('smfanet', dict(type='SMFANet', num_feat=36, num_block=8, upscale=2)),
    'SMFANet_x3': ('smfanet', dict(type='SMFANet', num_feat=36, num_block=8, upscale=3)),
    'SMFANet_x4': ('smfanet', dict(type='SMFANet', num_feat=36, num_block=8, upscale=4)),
    'SMFANet_plus_x4': ('smfanet', dict(type='SMFANet', num_feat=48, num_block=12, upscale=4)),
}


@pytest.fixture
def write(tmp_path):

    def write(content):
        torch.save(content, tmp_path / 'foreign.pth')
        return str(tmp_path / 'foreign.pth')

    return write


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_weights_give_the_recorded_output(shared, name):
    golden = torch.load(shared('golden/modern.pth'), weights_only=True, map_location='cpu')[name]
    family, block = PUBLISHED[name]
    converted = convert(shared(f'weights/{name}.pth'))
    assert converted.family == family
    assert {key: converted.block[key] for key in block} == block
    expected = golden['output']
    with torch.no_grad():
        output = converted.net(golden['input'])
    torch.testing.assert_close(output, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def published_span(net, img_range=255.):
    """The weights of a SPAN in its training form, as its repository saves them: a stale folded conv beside each."""
    state = {}
    parts = {'expand': 'conv.0', 'spatial': 'conv.1', 'squeeze': 'conv.2', 'skip': 'sk'}
    for key, value in net.state_dict().items():
        for ours, theirs in (('conv_first.', 'conv_1.'), ('conv_after_body.', 'conv_2.'), ('conv_last.',
                                                                                           'upsampler.0.')):
            key = key.replace(ours, theirs)
        for i in range(len(net.body)):
            for j in (1, 2, 3):
                key = key.replace(f'body.{i}.conv{j}.', f'block_{i + 1}.c{j}_r.')
        for ours, theirs in parts.items():
            key = key.replace(f'.{ours}.', f'.{theirs}.')
        state[key] = value
        if '.sk.' in key:
            state[key.replace('.sk.',
                              '.eval_conv.')] = torch.randn(*value.shape[:2], 3, 3) if value.dim() == 4 else value
    mean = net.mean.flatten().repeat_interleave(net.upscale**2)
    state['upsampler.0.weight'] = state['upsampler.0.weight'] / img_range
    state['upsampler.0.bias'] = state['upsampler.0.bias'] / img_range + mean
    return state


@pytest.mark.parametrize('upscale', [2, 3, 4])
@pytest.mark.parametrize('wrapped', [True, False])
def test_a_span_in_training_form(write, upscale, wrapped):
    torch.manual_seed(0)
    net = SPAN(num_feat=8, upscale=upscale).eval()
    state = published_span(net)
    converted = convert(write(dict(params_ema=state) if wrapped else state))
    block = dict(type='SPAN', num_in_ch=3, num_out_ch=3, num_feat=8, num_block=6, upscale=upscale, img_range=255.)
    assert converted.block == dict(block, rgb_mean=[0.4488, 0.4371, 0.4040], deploy=False)
    x = torch.rand(1, 3, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(converted.net(x), net(x), atol=1e-4, rtol=0)


def test_a_span_that_sees_pixels_as_they_are(write):
    torch.manual_seed(0)
    net = SPAN(num_feat=8, img_range=1., rgb_mean=(0., 0., 0.)).eval()
    state = dict(published_span(net, img_range=1.), no_norm=torch.zeros(1))
    converted = convert(write(state))
    assert converted.block['img_range'] == 1 and converted.block['rgb_mean'] == [0, 0, 0]
    x = torch.rand(1, 3, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(converted.net(x), net(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize('family, name, key', [('span', 'SPAN_ch28_x4', 'block_2.c2_r.eval_conv.bias'),
                                               ('spanv2', 'SPANV2_x4', 'block_3.guidance_map_conv.bias'),
                                               ('smfanet', 'SMFANet_x4', 'feats.3.smfa.alpha')])
def test_an_incomplete_or_larger_network_is_refused(shared, write, family, name, key):
    content = torch.load(shared(f'weights/{name}.pth'), weights_only=True, map_location='cpu')
    state = content.get('params', content)
    with pytest.raises(OptionError, match='Missing key'):
        convert(write({name: value for name, value in state.items() if name != key}))
    with pytest.raises(OptionError, match='extra.weight'):
        convert(write({**state, 'extra.weight': torch.zeros(3)}))
    with pytest.raises(OptionError, match='is not of family carn'):
        convert(write(state), 'carn')


def test_tables_rename_every_published_weight(shared):
    for name, table in (('SPAN_ch28_x4', modern_family.SPAN), ('SPANV2_x4', modern_family.SPANV2),
                        ('SMFANet_x4', modern_family.SMFANET)):
        content = torch.load(shared(f'weights/{name}.pth'), weights_only=True, map_location='cpu')
        state = content.get('params', content)
        assert len(rename(state, table)) == len(state)
