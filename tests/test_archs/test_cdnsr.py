"""CDNSR and its classifiers: PatchClassifier, ErrorPredictor and ErrorMap."""
import inspect
import math
import pytest
import torch

from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY

ErrorMap, ErrorPredictor, PatchClassifier = (
    ARCH_REGISTRY.get(name) for name in ('ErrorMap', 'ErrorPredictor', 'PatchClassifier'))
gumbel_softmax = inspect.getmodule(ARCH_REGISTRY.get('CDNSR')).gumbel_softmax


def fsrcnn(num_feat=4, upscale=4):
    return dict(type='FSRCNN', num_feat=num_feat, num_shrink=3, num_map=1, upscale=upscale)


MIXED = [
    dict(type='Interpolation', upscale=2),
    fsrcnn(4, 2),
    dict(type='CARN_M', num_feat=4, upscale=2),
    dict(type='MSRResNet', num_feat=4, num_block=1, upscale=2),
    dict(type='RCAN', num_in_ch=3, num_out_ch=3, num_feat=16, num_group=1, num_block=1, upscale=2),
]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def cdnsr(upscale=4, branches=None, **kwargs):
    """Option block of a small CDNSR with three branches of growing cost."""
    branches = branches or [fsrcnn(2 * i + 2, upscale) for i in range(3)]
    classifier = dict(type='PatchClassifier', num_feat=8)
    return dict(dict(type='CDNSR', upscale=upscale, branches=branches, classifier=classifier), **kwargs)


def spread(net):
    """Makes a random classifier decide differently on different patches."""
    with torch.no_grad():
        net.classifier.fc.weight.mul_(300)
        channels = net.classifier.convs[0].in_channels
        logits = net.classifier(torch.rand(64, channels, 12, 16) * torch.rand(64, 1, 1, 1))
        net.classifier.fc.bias.sub_(logits.mean(0))
    return net


@pytest.mark.parametrize('num_classes', [2, 3, 4, 5])
def test_routing_equals_one_patch_at_a_time(num_classes):
    net = spread(build_network(cdnsr(2, MIXED[:num_classes])).eval())
    x = torch.rand(24, 3, 12, 16) * torch.rand(24, 1, 1, 1)
    with torch.no_grad():
        output, routing = net(x, return_routing=True)
        for i in range(len(x)):
            k = int(net.classifier(x[i:i + 1]).argmax())
            torch.testing.assert_close(output[i:i + 1], net.branches[k](x[i:i + 1]), atol=1e-5, rtol=0)
            assert routing.weights[i].tolist() == [float(j == k) for j in range(num_classes)]
    assert (routing.weights.sum(0) > 0).sum() > 1, 'the test is void: all patches went to one branch'
    assert routing.branch_outputs is None


def test_evaluation_runs_only_the_branches_chosen():
    net = build_network(cdnsr()).eval()
    with torch.no_grad():
        net.classifier.fc.bias.copy_(torch.tensor([-100., 100., -100.]))
    ran = []
    for i, branch in enumerate(net.branches):
        branch.register_forward_hook(lambda module, args, output, i=i: ran.append((i, len(args[0]))))
    with torch.no_grad():
        net(torch.rand(7, 3, 8, 8))
    assert ran == [(1, 7)]


@pytest.mark.parametrize('mixture', ['gumbel', 'softmax'])
def test_training_mixes_all_branches_in_one_pass_each(mixture):
    net = build_network(cdnsr(mixture=mixture)).train()
    passes = []
    for branch in net.branches:
        branch.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    x = torch.rand(5, 3, 8, 12)
    output, routing = net(x, return_routing=True)
    assert passes == [5, 5, 5]
    expected = sum(routing.weights[:, i, None, None, None] * net.branches[i](x) for i in range(3))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(5))
    if mixture == 'softmax':
        torch.testing.assert_close(routing.weights, routing.logits.softmax(1))
    assert [output.shape for output in routing.branch_outputs] == [(5, 3, 32, 48)] * 3


def test_forward_returns_one_tensor():
    net = build_network(cdnsr(3))
    for mode in (True, False):
        assert net.train(mode)(torch.rand(2, 3, 8, 8)).shape == (2, 3, 24, 24)


def test_gumbel_softmax_samples_classes_by_their_probability():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    sample = gumbel_softmax(probabilities.log().expand(40000, 3), tau=0.1).argmax(1)
    torch.testing.assert_close(torch.bincount(sample) / 40000, probabilities, atol=0.01, rtol=0)


def test_gumbel_softmax_at_the_ends():
    logits = torch.randn(50, 4)
    assert gumbel_softmax(logits, tau=1e-4).max(1)[0].mean() > 0.99
    torch.testing.assert_close(gumbel_softmax(logits, tau=1e6), torch.full((50, 4), 0.25), atol=1e-3, rtol=0)
    assert torch.isfinite(gumbel_softmax(logits, 0.4, torch.zeros(50, 4))).all()
    assert torch.isfinite(gumbel_softmax(logits, 0.4, torch.ones(50, 4))).all()


@pytest.mark.parametrize('part,other', [('branches', 'classifier'), ('classifier', 'branches')])
def test_frozen_part_gets_no_gradient_and_stays_in_evaluation(part, other):
    net = build_network(cdnsr())
    net.freeze([part])
    net.train()
    assert not getattr(net, part).training and getattr(net, other).training
    net(torch.rand(4, 3, 8, 8)).square().mean().backward()
    assert all(param.grad is None for param in getattr(net, part).parameters())
    convs = [param for param in getattr(net, other).parameters() if param.dim() == 4]
    assert convs and all(param.grad.abs().sum() > 0 for param in convs)


@pytest.mark.parametrize('size', [(1, 1), (3, 9), (4, 4), (33, 31)])
def test_classifier_takes_any_size(size):
    assert PatchClassifier(num_feat=8, num_classes=4)(torch.rand(2, 3, *size)).shape == (2, 4)


@pytest.mark.parametrize('change,message', [
    ({
        'branches': [fsrcnn()]
    }, 'expected 2 to 5 branches, but got 1'),
    ({
        'branches': [fsrcnn()] * 6
    }, 'expected 2 to 5 branches, but got 6'),
    ({
        'mixture': 'hard'
    }, "expected mixture 'gumbel' or 'softmax', but got 'hard'"),
    ({
        'classifier': {
            'type': 'PatchClassifier',
            'num_classes': 2
        }
    }, 'the classifier has 2 classes for 3 branches'),
])
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build_network({**cdnsr(), **change})


def test_unknown_part_cannot_be_frozen():
    with pytest.raises(ValueError, match="'classifier' or 'branches', but got 'branch'"):
        build_network(cdnsr()).freeze(['branch'])


@pytest.mark.parametrize('channels_last', [False, True])
def test_gradients_of_the_mixture(channels_last):
    net = build_network(cdnsr(mixture='softmax')).double().train()
    x = torch.rand(3, 3, 8, 12, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    grad = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    params = list(net.parameters())
    output, routing = net(x, return_routing=True)
    ours = torch.autograd.grad(output, params, grad)
    weights = net.classifier(x).softmax(1)
    expected = sum(weights[:, i, None, None, None] * branch(x) for i, branch in enumerate(net.branches))
    torch.testing.assert_close(output, expected)
    for ours_, theirs in zip(ours, torch.autograd.grad(expected, params, grad)):
        torch.testing.assert_close(ours_, theirs)


def predicted_errors(net, x):
    """What ErrorPredictor predicts, written down without its forward."""
    for conv in (*net.convs, net.hidden):
        x = torch.nn.functional.leaky_relu(conv(x), 0.1)
    x = net.head(x)
    first = torch.exp(x[:, 0])
    maps = [first] + [first - first * x[:, i] for i in range(1, x.shape[1])]
    return torch.stack([values.mean(dim=(1, 2)) for values in maps], dim=1)


@pytest.mark.parametrize('num_classes', [2, 3, 5])
@pytest.mark.parametrize('size', [(1, 1), (3, 5), (32, 32), (37, 64)])
def test_the_class_of_an_error_predictor_is_the_cheapest_error(num_classes, size):
    net = ErrorPredictor(num_feat=4, num_classes=num_classes, price=3.).eval()
    net.costs.copy_(torch.arange(1, num_classes + 1) / num_classes)
    torch.nn.init.normal_(net.head.weight)
    x = torch.rand(6, 3, *size)
    with torch.no_grad():
        logits, errors = net(x), predicted_errors(net, x)
    torch.testing.assert_close(net.errors(logits), errors, rtol=1e-4, atol=1e-4)
    assert logits.argmax(1).tolist() == (errors + 3 * net.costs).argmin(1).tolist()


def test_errors_predicted_for_a_tile_are_the_mean_of_those_of_its_parts():
    net = ErrorPredictor(num_feat=4).eval()
    for conv in net.convs:  # a 3x3 layer would look across the border
        conv.weight.data[:, :, 0] = conv.weight.data[:, :, 2] = 0
        conv.weight.data[:, :, :, 0] = conv.weight.data[:, :, :, 2] = 0
    x = torch.rand(1, 3, 64, 64)
    parts = torch.cat([x[..., top:top + 32, left:left + 32] for top in (0, 32) for left in (0, 32)])
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], net(parts).mean(0))


@pytest.mark.parametrize('arch', [ErrorMap, ErrorPredictor])
def test_price_of_an_error_is_above_zero(arch):
    with pytest.raises(ValueError, match=f'{arch.__name__}: expected a price above 0, but got 0'):
        arch(price=0)


def wave(order, place):
    """Value of a wave of an orthonormal cosine transform of four pixels."""
    return math.cos(math.pi * order * (place + 0.5) / 4) * (0.5**0.5 if order else 0.5)


def energy_of(y, v, u, row, column):
    """Mean square of pattern (v, u) in a cell of 8x8 pixels, whose 4x4 squares begin a pixel before it."""
    total = 0.
    for top in range(8 * row - 1, 8 * row + 7, 2):
        for left in range(8 * column - 1, 8 * column + 7, 2):
            value = 0.
            for i in range(4):
                for j in range(4):
                    pixel = y[min(max(top + i, 0), y.shape[0] - 1), min(max(left + j, 0), y.shape[1] - 1)]
                    value += wave(v, i) * wave(u, j) * pixel
            total += value**2
    return total / 16


def test_energies_are_those_of_a_cosine_transform_of_luma():
    x = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    y = 255 * (0.299 * x[0, 0] + 0.587 * x[0, 1] + 0.114 * x[0, 2])
    found = ErrorMap().double().energies(x)
    assert found.shape == (1, 15, 2, 3)
    patterns = [(v, u) for v in range(4) for u in range(4)][1:]
    for index, row, column in ((0, 0, 0), (3, 1, 1), (7, 0, 2), (14, 1, 2)):
        expected = math.log(energy_of(y, *patterns[index], row, column) + 0.1)
        assert float(found[0, index, row, column]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size', [(1, 1), (3, 9), (32, 32), (41, 70)])
def test_a_map_has_an_error_of_every_cell(channels, size):
    net = ErrorMap(channels, num_feat=8, num_classes=4, price=3.).eval()
    net.costs.copy_(torch.tensor([0.1, 0.2, 0.5, 1.]))
    x = torch.rand(2, channels, *size)
    with torch.no_grad():
        found, logits = net.error_map(x), net(x)
    assert found.shape == (2, 4, -(-size[0] // 8), -(-size[1] // 8)) and bool((found[:, 0] > 0).all())
    torch.testing.assert_close(net.errors(logits), found.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    assert logits.argmax(1).tolist() == (found.mean(dim=(2, 3)) + 3 * net.costs).argmin(1).tolist()


def test_a_map_neither_sees_brightness_nor_more_than_it_says():
    net = ErrorMap(num_feat=8).eval()
    x = 0.2 + 0.5 * torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        found = net.error_map(x)
        torch.testing.assert_close(net.error_map(x + 0.1), found, rtol=1e-3, atol=1e-3)
        other = torch.rand_like(x)
        seen = slice(48 - net.reach, 56 + net.reach)
        other[..., seen, seen] = x[..., seen, seen]
        torch.testing.assert_close(net.error_map(other)[..., 6, 6], found[..., 6, 6])
        assert not torch.allclose(net.error_map(other), found)


def test_cdnsr_with_an_error_predictor_routes_and_mixes():
    net = build_network({**cdnsr(), 'classifier': {'type': 'ErrorPredictor', 'num_feat': 4}})
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        output, routing = net.eval()(x, return_routing=True)
        k = int(routing.logits[0].argmax())
        torch.testing.assert_close(output[:1], net.branches[k](x[:1]), atol=1e-5, rtol=0)
    output, routing = net.train()(x, return_routing=True, run_branches=False)
    assert output is None and routing.branch_outputs is None
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(3))
