"""Networks that ONNX Runtime and OpenVINO run: the same pictures as in torch, of every size, for every arch."""
import copy
import pytest
import torch
from torch import nn

from basicsr.archs import build_network
from cdnsr_basicsr.export import in_backend
from cdnsr_basicsr.inference import TileUpscaler, runtime
from cdnsr_basicsr.inference.runtime import ExportedNetwork, ExportedPart, precisions
from cdnsr_basicsr.inference.speed import Speed
from tests.helpers import carn, fsrcnn, run, spread, swinir

pytest.importorskip('onnx')
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in runtime.installed(), reason=f'{name} is not installed'))
    for name in runtime.BACKENDS
]
ARCHS = {
    'carn': carn(8, 3),
    'fsrcnn': fsrcnn(4, 2),
    'srresnet': dict(type='MSRResNet', num_feat=4, num_block=1, upscale=4),
    'rcan':
    dict(type='RCAN', num_in_ch=3, num_out_ch=3, num_feat=4, num_group=1, num_block=1, squeeze_factor=2, upscale=2),
    'bicubic': dict(type='Interpolation', upscale=4),
    'bilinear': dict(type='Interpolation', upscale=3, mode='bilinear')
}


def randomized(net):
    """A network that does more than interpolate."""
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval()


def levels(actual, expected):
    """Difference in grey levels."""
    return 255 * float((actual - expected).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('arch', ARCHS)
def test_branches_equal_torch(backend, arch):
    net = randomized(build_network(ARCHS[arch]))
    part = in_backend(net, backend, 'net.pth')
    assert part.known_geometry == (net.upscale if hasattr(net, 'upscale') else ARCHS[arch]['upscale'], 3, 1)
    for shape in ((1, 3, 16, 16), (3, 3, 19, 34), (2, 3, 61, 17)):
        x = torch.rand(shape)
        with torch.no_grad():
            expected = net(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            assert levels(part(x.contiguous(memory_format=layout)), expected) < 0.1
        assert levels(part(x[..., ::2, 1:]), net(x[..., ::2, 1:]).detach()) < 0.1  # no copy of its own
    assert not part(x).requires_grad and copy.deepcopy(part) is part


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', [(75, 41), (16, 50), (7, 1)])
def test_the_engine_routes_and_upscales_as_with_torch(backend, size, tiny_net):
    net = spread(build_network(tiny_net(3, [dict(type='Interpolation', upscale=3), fsrcnn(4, 3), carn(8, 3)]))).eval()
    exported = in_backend(net, backend, 'net.pth')
    lq = torch.rand(1, 3, *size)
    for budget in (None, 0.02, 0.5, 9):
        expected, actual = (TileUpscaler(n, 16, 14, budget=budget, cost='macs').upscale(lq) for n in (net, exported))
        assert torch.equal(actual.plan.classes, expected.plan.classes)
        assert actual.cost == pytest.approx(expected.cost, abs=3e-3)  # the MACs of a tile of 64 are scaled by area
        assert levels(actual.image, expected.image) < 0.1
    upscaler, plain = TileUpscaler(exported, 64), TileUpscaler(net, 64)
    assert upscaler.branch_macs == plain.branch_macs and upscaler.classifier_macs == plain.classifier_macs
    assert min(upscaler.speed.tile_ms) > 0


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
def test_predicted_errors_are_routed_by_time_as_with_torch(backend, tiny_net):
    block = dict(tiny_net(), classifier=dict(type='ErrorPredictor', num_feat=4))
    net = build_network(block).eval()
    with torch.no_grad():
        net.classifier.head.weight.mul_(30)  # different tiles, different errors, the less the dearer the branch
        net.classifier.head.bias.copy_(torch.tensor([2, 0.3, 0.5]))
        net.classifier.costs.copy_(torch.tensor([0.1, 0.4, 1]))
    lq, speed = torch.rand(1, 3, 60, 47), Speed([4] * 3, [1., 5., 6., 0.1])
    for target in (40, 60, 90):
        classes = []
        for network in (net, in_backend(net, backend, 'net.pth')):
            upscaler = TileUpscaler(network, 16, 14, target_ms=target)
            upscaler.measured = speed
            classes.append(upscaler.upscale(lq).plan.classes)
        assert torch.equal(*classes) and len(classes[0].unique()) > 1


@pytest.mark.parametrize('backend', BACKENDS)
def test_sides_of_a_multiple_and_gray(backend):
    """Networks that take sides of multiples only, and gray pictures only."""

    class Halved(nn.Module):

        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 8, 2, stride=2), nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x):
            return nn.functional.pixel_shuffle(self.up(nn.functional.pixel_shuffle(self.down(x), 2)), 2)

    net = Halved().eval()
    exported = in_backend(net, backend, 'net.pth')
    assert exported.known_geometry == (2, 1, 2)
    lq = torch.rand(1, 1, 37, 51)
    expected, actual = (TileUpscaler(n, 18).upscale(lq).image for n in (net, exported))
    assert actual.shape == (1, 1, 74, 102) and levels(actual, expected) < 0.1


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('backend', BACKENDS)
def test_windows_of_any_size_are_exported(backend):
    net = randomized(build_network(swinir(7, 2)))
    part = in_backend(net, backend, 'net.pth')
    assert part.known_geometry == (2, 3, 7)
    for batch, *sides in ((1, 7, 7), (2, 14, 14), (3, 7, 21), (1, 35, 28)):
        x = torch.rand(batch, 3, *sides)
        assert levels(part(x), net(x)) < 0.1


@pytest.mark.slow
def test_sizes_that_come_often_are_compiled_for_and_few_are_kept(monkeypatch):
    pytest.importorskip('openvino')
    monkeypatch.setattr(runtime, 'OFTEN', 2)
    monkeypatch.setattr(runtime, 'MOST_SIZES', 2)
    net = randomized(build_network(fsrcnn(4, 2)))
    part = in_backend(net, 'openvino', 'net.pth')
    part.run.uses.clear()
    for turn in range(2):
        for size in (16, 20, 24, 16):
            for _ in range(3):
                x = torch.rand(1, 3, size, 18)
                assert levels(part(x), net(x).detach()) < 0.1
    kept = [key for key in part.run.requests if len(key) == 2]
    assert [key[1] for key in kept] == [(1, 24, 18, 3), (1, 16, 18, 3)]
    assert (torch.float32, ) in part.run.requests


SIGNALS = """
import gc, os, signal, torch, cdnsr_basicsr
cdnsr_basicsr.register()
from basicsr.archs import build_network
from cdnsr_basicsr.export import in_backend
from tests.helpers import fsrcnn
signal.signal(signal.SIGUSR1, lambda *_: print('handled'))
first, second = (in_backend(build_network(fsrcnn(4, 2)).eval(), 'openvino', name) for name in 'ab')
for net in (first, second):
    net(torch.rand(1, 3, 8, 8))
del net, first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.slow
def test_signals_are_handled_after_networks_of_openvino_are_gone():
    pytest.importorskip('openvino')
    assert run('-c', SIGNALS).strip().endswith('handled')


OTHERS = """
import torch, cdnsr_basicsr
cdnsr_basicsr.register()
from basicsr.archs import build_network
from cdnsr_basicsr.export import to_onnx
from cdnsr_basicsr.inference.runtime import OpenVino
from tests.helpers import carn, fsrcnn
wrong, right = (to_onnx(build_network(block).eval(), 'net', 3, 1) for block in (fsrcnn(4, 3), carn(8, 2)))
for turn in range(4):
    for sides in ((16, 16), (33, 47), (64, 61)):
        for model, refused in ((wrong, True), (right, False)):
            shape = (1, 3, *(2 * side for side in sides))
            try:
                assert OpenVino(model)(torch.rand(1, 3, *sides), torch.float32, shape).shape == shape and not refused
            except ValueError:
                assert refused
print('alive')
"""


@pytest.mark.slow
def test_outputs_that_are_larger_than_expected_overwrite_nothing():
    pytest.importorskip('openvino')
    assert run('-c', OTHERS).strip().endswith('alive')


def test_half_precision_is_openvino_s_own():
    pytest.importorskip('openvino')
    if 'bfloat16' not in precisions('openvino'):
        pytest.skip('this CPU has no bfloat16')
    net = randomized(build_network(carn(8, 2)))
    exported, lq = in_backend(net, 'openvino', 'net.pth'), torch.rand(1, 3, 40, 33)
    exact, half = (TileUpscaler(exported, 32, precision=kind).upscale(lq).image for kind in ('float32', 'bfloat16'))
    assert exact.dtype == half.dtype == torch.float32
    assert 0.01 < levels(half, exact) < 20


def test_onnxruntime_refuses_half_precision():
    pytest.importorskip('onnxruntime')
    exported = in_backend(build_network(fsrcnn(4, 2)).eval(), 'onnxruntime', 'net.pth')
    with pytest.raises(RuntimeError, match='computes in float32'):
        TileUpscaler(exported, 32, precision='bfloat16').upscale(torch.rand(1, 3, 20, 20))


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
def test_results_are_not_overwritten_by_the_next_ones(backend, tiny_net):
    net = build_network(tiny_net(2)).eval()
    exported = in_backend(net, backend, 'net.pth')
    assert isinstance(exported, ExportedNetwork)
    for part, source in ((exported.classifier, net.classifier), (exported.branches[2], net.branches[2])):
        first, second = (torch.rand(2, 3, 16, 16) for _ in range(2))
        results = [part(first), part(second)]
        for x, result in zip((first, second), results):
            torch.testing.assert_close(result, source(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
def test_broken_models_are_one_line(backend):
    with pytest.raises(ValueError, match=r'^a part: \w+ cannot read it: [^\n]+$'):
        ExportedPart(b'no ONNX', backend, 'a part', 0, 3)
    part = in_backend(build_network(fsrcnn(4, 2)).eval(), backend, 'net.pth')
    with pytest.raises(RuntimeError, match=r'^branch_0 \w+: [^\n]+$'):
        part(torch.rand(1, 1, 16, 16))
    part.known_geometry = (3, 3, 1)  # what a changed description would say
    with pytest.raises(RuntimeError, match=r'^branch_0 \w+[^\n]+$'):
        part(torch.rand(1, 3, 16, 16))
