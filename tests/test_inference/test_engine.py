import pytest
import torch

from basicsr.archs import build_network
from cdnsr_basicsr.complexity import count_macs
from cdnsr_basicsr.inference import RoutedUpscaler, Tiling
from tests.conftest import carn, fsrcnn
from tests.test_archs.test_cdnsr import spread


@pytest.mark.parametrize('size', [(1, 1), (3, 50), (16, 16), (37, 29)])
@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_upscaling_equals_one_tile_at_a_time(tiny_net, size, upscale):
    net = spread(build_network(tiny_net(upscale, [fsrcnn(4, upscale), carn(4, upscale)])).eval())
    lq = torch.rand(1, 3, *size) * torch.linspace(0, 1, size[1])
    result = RoutedUpscaler(net, 16, 12, batch=3).upscale(lq)
    tiling, tiles = Tiling(*size, 16, 12), []
    with torch.no_grad():
        for i, tile in enumerate(Tiling(*size, 16, 12).cut(lq[0])):
            k = int(net.classifier(tile[None]).argmax())
            assert result.classes[i] == k
            tiles.append(net.branches[k](tile[None])[0])
    assert result.image.shape == (1, 3, size[0] * upscale, size[1] * upscale)
    torch.testing.assert_close(result.image[0], tiling.blend(torch.stack(tiles), upscale), atol=1e-5, rtol=0)


def test_a_smooth_gradient_has_no_step_at_tile_borders(tiny_net):
    net = build_network(tiny_net(2, [{'type': 'Interpolation', 'upscale': 2, 'mode': 'bilinear'}] * 2)).eval()
    ramp = torch.linspace(0, 1, 200).expand(1, 3, 40, 200).contiguous()
    image = RoutedUpscaler(net, 16, 12).upscale(ramp).image
    differences = image[..., 8:-8, 9:-8] - image[..., 8:-8, 8:-9]
    assert differences.min() > 0 and differences.max() < 2 * differences.mean()


def test_cost_counts_classifier_and_overlap(tiny_net):
    net = build_network(tiny_net()).eval()
    upscaler = RoutedUpscaler(net, 16, 12)
    tiling = Tiling(28, 40, 16, 12)
    macs = [count_macs(branch, 16, 16) for branch in net.branches]
    spent = 6 * count_macs(net.classifier, 16, 16) + 2 * macs[0] + 4 * macs[2]
    classes = torch.tensor([0, 2, 2, 0, 2, 2])
    assert len(tiling) == 6
    assert upscaler.cost(classes, tiling) == pytest.approx(spent / (macs[2] / 256 * 28 * 40))
    assert upscaler.costs.tolist() == pytest.approx([value / macs[2] for value in macs])


def test_macs_are_counted_at_the_input_size_of_a_transposed_conv():
    deconv = torch.nn.ConvTranspose2d(8, 3, 9, stride=4, padding=3, output_padding=1)
    assert count_macs(deconv, 10, 12, channels=8) == 10 * 12 * 8 * 3 * 81
    grouped = torch.nn.Conv2d(8, 4, 3, padding=1, groups=2)
    assert count_macs(grouped, 10, 12, channels=8) == 10 * 12 * 8 * 4 * 9 // 2


@pytest.mark.parametrize('block,published', [({
    'type': 'FSRCNN',
    'num_feat': 16
}, 21.8e6), ({
    'type': 'FSRCNN',
    'num_feat': 36
}, 35.8e6), ({
    'type': 'FSRCNN',
    'num_feat': 56
}, 49.8e6), ({
    'type': 'CARN_M',
    'num_feat': 36
}, 0.38e9), ({
    'type': 'CARN_M',
    'num_feat': 64
}, 1.15e9), ({
    'type': 'PatchClassifier'
}, 7.6e6)])
def test_macs_of_the_backbones(block, published):
    # FLOPs per 32x32 patch, 2 per MAC; FSRCNN's published figures count the transposed conv at its output size
    assert 2 * count_macs(build_network(block), 32, 32) == pytest.approx(published, rel=0.015)


def test_upscaler_takes_one_image(tiny_net):
    with pytest.raises(ValueError, match='one image'):
        RoutedUpscaler(build_network(tiny_net()).eval(), 16, 12).upscale(torch.rand(2, 3, 8, 8))
