"""PCSR."""
import copy
import inspect
import itertools
import math
import pytest
import torch
from fractions import Fraction
from torch.nn import functional as F

from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY

pcsr_arch = inspect.getmodule(ARCH_REGISTRY.get('PCSR'))
bilinear, pixel_grid = pcsr_arch.bilinear, pcsr_arch.pixel_grid
refine, two_means_threshold = pcsr_arch.refine, pcsr_arch.two_means_threshold

CARN = dict(type='CARN_M', num_feat=8, upscale=4)
FSRCNN = dict(type='FSRCNN', num_feat=8, num_shrink=3, num_map=1, upscale=4)
BACKBONES = [
    CARN, FSRCNN,
    dict(type='MSRResNet', num_feat=8, num_block=2),
    dict(type='EDSR', num_in_ch=3, num_out_ch=3, num_feat=8, num_block=2),
    dict(type='RCAN', num_in_ch=3, num_out_ch=3, num_feat=8, num_group=1, num_block=1, squeeze_factor=4)
]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pcsr(backbone=None, **kwargs):
    """Option block of a small PCSR."""
    hidden = dict(light=[4, 4], heavy=[6, 6, 6], classifier=[5])
    return dict(type='PCSR', backbone=backbone or CARN, **dict(hidden, **kwargs))


def routed(block, x=None, size=None, contrast=30):
    """The network in evaluation, its classifier such that both samplers are taken."""
    net = build_network(block).eval()
    with torch.no_grad():
        net.classifier.layers[-1].weight *= contrast
        margin = net(torch.rand(1, 3, 16, 16) if x is None else x, size, return_routing=True)[1].margin
        net.classifier.layers[-1].bias[1] -= margin.median()
    return net


def slow(net, x, size):
    """Each pixel of the result by the definition: its features, position and cell in one row, through all layers."""
    h, w = x.shape[2:]
    features = net.features(x)
    light, heavy, logits = (torch.empty(n, *size) for n in (3, 3, 2))
    for row, column in itertools.product(range(size[0]), range(size[1])):
        centre = Fraction(2 * row + 1, 2 * size[0]) * h, Fraction(2 * column + 1, 2 * size[1]) * w  # in LR pixels
        i, j = (int(position) for position in centre)
        position = [float(2 * (centre[0] - i) - 1), float(2 * (centre[1] - j) - 1)]
        inputs = torch.cat([features[0, :, i, j], torch.tensor([*position, 2 * h / size[0], 2 * w / size[1]])])
        for mlp, output in ((net.light, light), (net.heavy, heavy), (net.classifier, logits)):
            values = inputs
            for number, layer in enumerate(mlp.layers):
                values = layer(values if number == 0 else values.relu())
            output[:, row, column] = values
    base = F.interpolate(x, size=size, mode='bilinear', align_corners=False)[0]
    return light + base, heavy + base, logits.softmax(dim=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('backbone', BACKBONES[:3], ids=lambda block: block['type'])
@pytest.mark.parametrize('size', [(34, 46), (17, 23), (51, 69), (40, 30), (18, 61)])
def test_equals_one_pixel_at_a_time(backbone, size):
    x = torch.rand(1, 3, 17, 23)
    net = routed(pcsr(backbone), x, size)
    net.refinement = False
    output, routing = net(x, size, return_routing=True)
    light, heavy, probability = slow(net, x, size)
    torch.testing.assert_close(torch.sigmoid(routing.margin[0]), probability[1], atol=1e-5, rtol=0)
    assert output.shape == (1, 3, *size) and 0.05 < routing.heavy.float().mean() < 0.95
    torch.testing.assert_close(output[0], torch.where(routing.heavy, heavy, light)[0:3], atol=1e-5, rtol=0)
    assert torch.equal(routing.heavy, routing.margin > 0)

    mixture = net.train()(x, size)[0]
    torch.testing.assert_close(mixture, probability[0] * light + probability[1] * heavy, atol=1e-5, rtol=0)
    first = build_network(pcsr(backbone, phase=0))
    assert not first.load_state_dict(net.state_dict(), strict=False).missing_keys
    for mode in (True, False):
        torch.testing.assert_close(first.train(mode)(x, size)[0], heavy, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize('backbone', BACKBONES, ids=lambda block: block['type'])
@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_any_backbone_at_any_scale_without_dead_parameters(backbone, upscale):
    net = build_network(pcsr(dict(backbone, upscale=upscale), upscale=upscale))
    assert not set(pcsr_arch.BACKBONES[backbone['type']][1]) & set(dict(net.backbone.named_children()))
    with torch.enable_grad():
        net(torch.rand(2, 3, 9, 8)).square().mean().backward()
    assert all(param.grad is not None for param in net.parameters())
    net.eval()
    for size in ((1, 1), (3, 5), (9, 8)):
        x = torch.rand(2, 3, *size)
        output = net(x)
        assert output.shape == (2, 3, upscale * size[0], upscale * size[1])
        single = torch.cat([net(image) for image in x.split(1)])
        torch.testing.assert_close(output, single, atol=1e-5, rtol=0)


def test_a_gray_network():
    net = build_network(pcsr(dict(FSRCNN, num_in_ch=1, num_out_ch=1))).eval()
    assert net(torch.rand(1, 1, 5, 6)).shape == (1, 1, 20, 24)


@pytest.mark.parametrize('wrong,words', [(dict(backbone=dict(type='ECBSR')), 'CARN_M'), (dict(upscale=0.5), 'upscale'),
                                         (dict(phase=2), 'phase')])
def test_wrong_arguments_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        build_network(dict(pcsr(), **wrong))


@torch.no_grad()
def test_memory_bands_and_chunks_change_nothing(monkeypatch):
    net, x = routed(pcsr()), torch.rand(2, 3, 13, 11)
    whole, routing = net(x, (31, 47), return_routing=True)
    monkeypatch.setattr(pcsr_arch, 'BAND_PIXELS', dict(cpu=200))
    monkeypatch.setattr(pcsr_arch, 'SAMPLED_TOGETHER', dict(cpu=7))
    banded, other = net(x, (31, 47), return_routing=True)
    torch.testing.assert_close(banded, whole, atol=1e-5, rtol=0)
    assert torch.equal(routing.heavy, other.heavy)


@torch.no_grad()
def test_only_the_chosen_sampler_is_evaluated():
    net, x, rows = routed(pcsr()), torch.rand(1, 3, 12, 10), dict(light=0, heavy=0)
    for name in rows:

        def count(layer, inputs, output, name=name):
            rows[name] += len(inputs[0])

        getattr(net, name).layers[-1].register_forward_hook(count)
    heavy = net(x, return_routing=True)[1].heavy
    assert rows == dict(light=int((~heavy).sum()), heavy=int(heavy.sum())) and min(rows.values()) > 0


@torch.no_grad()
def test_k_is_the_exponent_of_the_cost():
    net, x = routed(pcsr(), contrast=3), torch.rand(1, 3, 12, 10)
    probability = torch.sigmoid(net(x, return_routing=True)[1].margin)
    both = torch.stack([1 - probability, probability])
    shares = []
    for k in (0, 0.3, 1, 3, 1000):
        net.k = k
        heavy = net(x, return_routing=True)[1].heavy
        if k < 10:
            scores = both / (torch.tensor(net.costs) / sum(net.costs)).view(2, 1, 1, 1)**k
            assert (heavy != scores.argmax(dim=0).bool()).sum() <= 1
        shares.append(float(heavy.float().mean()))
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.4 and shares[-1] == 0


def test_costs_are_those_of_backbone_and_sampler():
    net = build_network(pcsr(dict(type='MSRResNet', num_feat=4, num_block=1)))
    backbone = 9 * 3 * 4 + 2 * 9 * 4 * 4
    assert net.backbone_macs == backbone
    assert net.costs == (backbone / 16 + 8 * 4 + 4 * 4 + 4 * 3, backbone / 16 + 8 * 6 + 2 * 6 * 6 + 6 * 3)


def test_refinement_is_the_mean_of_nine_beside_heavy_pixels_only():
    torch.manual_seed(1)
    picture, heavy = torch.rand(2, 9, 8, 3), torch.rand(2, 9, 8) > 0.85
    refined = refine(picture, heavy)
    changed = 0
    for b, y, x in itertools.product(range(2), range(9), range(8)):
        around = (b, slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2))
        inside = 0 < y < 8 and 0 < x < 7
        if inside and not heavy[b, y, x] and heavy[around].any():
            changed += 1
            torch.testing.assert_close(refined[b, y, x], picture[around].mean(dim=(0, 1)))
        else:
            assert torch.equal(refined[b, y, x], picture[b, y, x])
    assert changed > 10
    for size in ((1, 1), (1, 5), (2, 2)):
        assert torch.equal(
            refine(picture[:, :size[0], :size[1]], heavy[:, :size[0], :size[1]]), picture[:, :size[0], :size[1]])


def test_two_means_find_two_clusters():
    low, high = 0.2 + 0.01 * torch.rand(3, 300), 0.7 + 0.01 * torch.rand(3, 30)
    threshold = two_means_threshold(torch.cat([low, high], dim=1))
    assert ((threshold > 0.4) & (threshold < 0.5)).all()
    # a fixed point: half way between the means of what lies on either side
    values = torch.rand(1, 999)**2
    threshold = two_means_threshold(values, 200)
    upper = values > threshold
    assert float(threshold) == pytest.approx(float(values[upper].mean() + values[~upper].mean()) / 2, abs=1e-6)
    assert two_means_threshold(torch.full((2, 9), 0.3)).isnan().all()


@torch.no_grad()
@pytest.mark.parametrize('size', [(1, 1), (6, 7)])
def test_adaptive_decides_per_image_and_does_not_fail_on_a_flat_one(size):
    net = routed(pcsr(FSRCNN, classifier=[]))
    net.adaptive, net.k = True, 5
    flat, x = torch.full((1, 3, *size), 0.5), torch.rand(1, 3, 16, 16)
    margin = net(x, return_routing=True)[1].margin
    heavy = torch.sigmoid(margin) > two_means_threshold(torch.sigmoid(margin).flatten(1))
    assert torch.equal(net(x, return_routing=True)[1].heavy, heavy) and 0 < heavy.float().mean() < 1
    assert torch.isfinite(net(flat)).all()
    net.classifier.layers[0].weight.zero_()
    for bias, share in ((-1., 0), (1., 1)):
        net.classifier.layers[0].bias.copy_(torch.tensor([0, bias]))
        assert net(flat, return_routing=True)[1].heavy.float().mean() == share


@pytest.mark.parametrize('size,out_size', [((5, 7), (20, 28)), ((17, 23), (40, 31)), ((4, 3), (4, 3)),
                                           ((1, 1), (5, 3))])
def test_bilinear_in_bands_is_that_of_torch(size, out_size):
    x = torch.rand(2, 3, *size)
    expected = F.interpolate(x, size=out_size, mode='bilinear', align_corners=False)
    x = x.permute(0, 2, 3, 1)
    torch.testing.assert_close(bilinear(x, size, out_size).permute(0, 3, 1, 2), expected, atol=1e-5, rtol=0)
    middle = out_size[0] // 2
    first = max(0, math.floor((middle + 0.5) * size[0] / out_size[0] - 0.5))
    lower = bilinear(x[:, first:], size, out_size, middle, out_size[0], first)
    torch.testing.assert_close(lower.permute(0, 3, 1, 2), expected[:, :, middle:], atol=1e-5, rtol=0)


def test_the_grid_of_a_band_is_a_part_of_the_whole():
    grid = pixel_grid((7, 5), (19, 12))
    band, first, last = grid.band(6, 15)
    assert torch.equal(band.rows + first, grid.rows[6:15]) and band.rows[0] == 0 and last == grid.rows[14] + 1
    assert torch.equal(band.y, grid.y[6:15]) and torch.equal(band.columns, grid.columns)
    assert grid.y.abs().max() <= 1 and grid.x.abs().max() <= 1


@torch.no_grad()
def test_under_autocast_and_copied(tmp_path):
    net, x = copy.deepcopy(routed(pcsr())), torch.rand(1, 3, 9, 8)
    exact = net(x)
    with torch.autocast('cpu', torch.bfloat16):
        half = net(x)
    assert half.dtype == torch.float32
    assert (half - exact).abs().median() < 0.02
