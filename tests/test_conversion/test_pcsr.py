import pytest
import torch

from basicsr.archs import build_network
from cdnsr_basicsr.archs.pcsr_arch import pixel_grid
from cdnsr_basicsr.conversion.registry import Source, families
from cdnsr_basicsr.evaluation import quality, read_pairs, to_image, to_tensor

MEAN = torch.tensor((0.4488, 0.4371, 0.4040)).view(3, 1, 1)


def found(content):
    source, family = Source(content['model']['sd'], content), families()['pcsr']
    assert family.detect(source)
    return family.load(source, 4)


def load(path):
    block, state, _ = found(torch.load(path, map_location='cpu', weights_only=True))
    net = build_network(block).eval()
    net.load_state_dict(state)
    return net


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('family', ['carn', 'fsrcnn'])
def test_pcsr_equals_golden(shared, family):
    golden = torch.load(shared('golden/pcsr.pth'), weights_only=True)[f'{family}-pcsr-phase1']
    net = load(shared(f'weights/pcsr_{family}-pcsr-phase1.pth'))
    # The recorded images were shifted by CARN's mean for both networks. CARN_M does so itself; FSRCNN's weights belong
    # to images that are not shifted (see below), and are compared on shifted ones.
    shift = MEAN if family == 'fsrcnn' else torch.zeros(3, 1, 1)
    lq = golden['lq'] - shift
    size = golden['light'].shape[1:]
    features, grid = net.features(lq).permute(0, 2, 3, 1), pixel_grid(lq.shape[2:], size)
    for name in ('light', 'heavy'):
        everywhere = torch.full((1, *size), name == 'heavy')
        sampled = net.sample(features, grid, everywhere)[0].permute(2, 0, 1)
        torch.testing.assert_close(sampled, golden[name], atol=1e-4, rtol=0)
    probability = golden['hard_probability']
    torch.testing.assert_close(torch.sigmoid(net.margin(features, grid)[0]), probability, atol=1e-4, rtol=0)

    net.costs = golden['cost_list']
    for k in (0, 1):
        # some recorded probabilities are so near to the threshold, 3e-7 in one case, that float32's error decides
        threshold = net.costs[1]**k / (net.costs[0]**k + net.costs[1]**k)
        undecided = ((probability - threshold).abs() < 1e-5).float()[None]
        assert undecided.sum() <= 4
        decided = torch.nn.functional.max_pool2d(undecided, 5, 1, 2)[0] == 0
        for refinement in (False, True):
            net.k, net.refinement = k, refinement
            output, routing = net(lq, return_routing=True)
            recorded = golden[f'k={k} refinement={refinement}']
            difference = (output[0] + shift - recorded['output']).abs()
            assert difference[:, decided].max() < 1e-4
            assert float(routing.heavy.float().mean()) == pytest.approx(float(recorded['hard_fraction']), abs=2e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('name', ['carn-pcsr-phase1', 'fsrcnn-pcsr-phase1', 'carn-x4', 'fsrcnn-x4'])
def test_published_networks_beat_bicubic(shared, name):
    """Shifted by a mean that they do not expect, they would be 5 dB worse than bicubic."""
    net = load(shared(f'weights/pcsr_{name}.pth'))
    for pair in read_pairs(str(shared('data/photos512')), 4, 2):
        lq = to_tensor(pair.lq)
        bicubic = torch.nn.functional.interpolate(lq, scale_factor=4, mode='bicubic')
        ours, theirs = (quality(to_image(image), pair.gt, 4, with_ssim=False)[0] for image in (net(lq), bicubic))
        assert ours > theirs + 0.3


def test_phase_0_has_a_heavy_sampler_alone(shared):
    content = torch.load(shared('weights/pcsr_carn-pcsr-phase1.pth'), map_location='cpu', weights_only=True)
    model = content['model']
    model.update(
        name='pcsr-phase0',
        args={
            key: value
            for key, value in model['args'].items() if key in ('encoder_spec', 'heavy_sampler_spec')
        })
    model['sd'] = {key: value for key, value in model['sd'].items() if key.startswith(('encoder.', 'heavy_sampler.'))}
    block, state, _ = found(content)
    net = build_network(block).eval()
    net.load_state_dict(state)
    x = torch.rand(1, 3, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.train()(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize('content', [{}, {
    'model': 3
}, {
    'model': {
        'name': 'liif',
        'args': {},
        'sd': {}
    }
}, {
    'params': {}
}])
def test_other_checkpoints_are_not_recognised(content):
    assert not families()['pcsr'].detect(Source({}, content))
