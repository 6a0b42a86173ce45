import cv2
import numpy as np
import pytest
import subprocess
import sys
import tifffile
import torch

from basicsr.archs import build_network
from cdnsr_basicsr.archs import pcsr_arch
from cdnsr_basicsr.inference import PixelUpscaler, TileUpscaler, make_upscaler, pixel_upscaler
from cdnsr_basicsr.inference.pixel_upscaler import Tiles, largest
from cdnsr_basicsr.inference.tiling import TensorRows
from cdnsr_basicsr.inference.upscale import upscale_files
from tests.helpers import carn, fsrcnn, pcsr, routed

HALO = 6  # of the small FSRCNN: 5x5 once, 3x3 once; rounded up


def photograph(height, width):
    """Flat at the left, textured at the right."""
    return torch.rand(1, 3, height, width) * torch.linspace(0, 1, width)**2


@pytest.fixture
def net():
    return routed(pcsr(fsrcnn(8)), photograph(30, 30))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('size', [(1, 1), (3, 5), (16, 90), (61, 47)])
@pytest.mark.parametrize('scale', [None, 2.5, 3])
@pytest.mark.parametrize('strip,band', [(2**19, 2**17), (1, 2**17), (1, 50), (700, 333)])
def test_equals_the_whole_image_across_tiles_strips_and_bands(net, monkeypatch, size, scale, strip, band):
    monkeypatch.setattr(pixel_upscaler, 'STRIP_PIXELS', strip)
    monkeypatch.setattr(pixel_upscaler, 'BAND_PIXELS', dict(cpu=band))
    lq = photograph(*size)
    upscaler = PixelUpscaler(net, 30, 30 - 2 * HALO, scale=scale)
    result = upscaler.upscale(lq)
    expected, routing = net(lq, upscaler.size_of(*size), return_routing=True)
    assert result.image.shape == expected.shape
    torch.testing.assert_close(result.image, expected, atol=1e-5, rtol=0)
    heavy = int(routing.heavy.sum())
    assert result.counts == [routing.heavy.numel() - heavy, heavy]
    middles = [(2 * torch.arange(n) + 1) * m // (2 * n) for n, m in zip(size, expected.shape[2:])]
    assert torch.equal(result.plan.class_map(), routing.heavy[0][middles[0]][:, middles[1]].to(torch.uint8))
    strips = [len(rows) for rows in upscaler.strips(TensorRows(lq), upscaler.plan(TensorRows(lq)))]
    assert sum(strips) == expected.shape[2] and min(strips) > 0


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('backbone', [carn(8), dict(type='MSRResNet', num_feat=8, num_block=2)])
def test_cropped_features_differ_by_what_the_halo_cannot_see_only(backbone):
    net, lq = build_network(pcsr(backbone)).eval(), torch.rand(1, 3, 90, 75)
    net.k = -1000  # all heavy: no pixel changes its sampler
    expected = net(lq)
    differences = [(PixelUpscaler(net, 40, 40 - 2 * halo).upscale(lq).image - expected).abs().max() for halo in (1, 14)]
    assert differences[1] < 1e-2 and differences[1] < 0.1 * differences[0]


def test_tiles_own_every_pixel_once_and_have_their_halo():
    for length in (1, 7, 16, 17, 40, 41, 99, 100, 513):
        for patch_size, step in ((16, 16), (20, 14), (40, 28), (64, 52)):
            tiles = Tiles(length, patch_size, step)
            assert tiles.bounds[0] == 0 and tiles.bounds[-1] == length and tiles.bounds == sorted(tiles.bounds)
            assert len(tiles.starts) == len(tiles.bounds) - 1 and tiles.size <= max(patch_size, 1)
            for start, first, last in zip(tiles.starts, tiles.bounds, tiles.bounds[1:]):
                halo = (patch_size - step) // 2
                assert start == 0 or first - start >= halo
                assert start + tiles.size == length or start + tiles.size - last >= halo
                assert 0 <= start <= first < last <= start + tiles.size <= length


def test_a_budget_is_kept_to_one_pixel_and_grows_monotonously(net):
    lq = photograph(61, 47)
    free = PixelUpscaler(net, 30, 18).upscale(lq)
    cheapest, dearest = (PixelUpscaler(net, 30, 18, budget=budget).upscale(lq) for budget in (0, 99))
    assert cheapest.counts[1] == 0 and dearest.counts[0] == 0 and cheapest.cost < free.cost < dearest.cost
    previous, step = None, (dearest.cost - cheapest.cost) / sum(free.counts)
    for share in (0.1, 0.3, 0.5, 0.8, 0.95):
        budget = cheapest.cost + share * (dearest.cost - cheapest.cost)
        upscaler = PixelUpscaler(net, 30, 18, budget=budget)
        result = upscaler.upscale(lq)
        assert budget - 1.01 * step <= result.cost <= budget + 1e-9
        classes = result.plan.class_map()
        assert previous is None or (classes >= previous).all()
        previous = classes
    net.k = 3  # a budget does not follow it
    assert upscaler.upscale(lq).counts == result.counts


def test_a_budget_is_kept_where_all_pixels_are_alike(net):
    with torch.no_grad():
        for parameter in net.classifier.layers[-1].parameters():
            parameter.zero_()
    lq = torch.full((1, 3, 20, 20), 0.5)
    ends = [PixelUpscaler(net, budget=budget).upscale(lq).cost for budget in (0, 99)]
    result = PixelUpscaler(net, budget=sum(ends) / 2).upscale(lq)
    assert abs(result.counts[0] - result.counts[1]) <= 2
    net.adaptive = True
    assert PixelUpscaler(net).upscale(lq).counts == [6400, 0]


def test_cost_is_that_of_all_parts(net):
    lq = photograph(60, 40)
    upscaler = PixelUpscaler(net, 30, 18)
    result = upscaler.upscale(lq)
    light, heavy, classifier = 4 * 4 + 4 * 3, 2 * 6 * 6 + 6 * 3, 5 * 2
    first = 12 * (4 + 6 + 5)
    tiles = len(result.plan.rows.starts) * len(result.plan.columns.starts)
    tiled = tiles * result.plan.rows.size * result.plan.columns.size
    spent = tiled * net.backbone_macs + 2400 * (first + 16 * classifier)
    spent += light * result.counts[0] + heavy * result.counts[1]
    assert tiled > 2400
    whole = 2400 * (net.backbone_macs + 12 * 6 + 16 * heavy)
    assert result.cost == pytest.approx(spent / whole)
    assert upscaler.whole_macs == pytest.approx(whole / 38400)


def test_largest_takes_the_first_of_equals():
    values = torch.tensor([[3., 1, 2], [2, 2, 0]])
    for count, expected in enumerate(['000000', '100000', '101000', '101100', '101110', '111110', '111111']):
        assert ''.join(str(int(chosen)) for chosen in largest(values, count).flatten()) == expected


def test_k_adaptive_refinement_and_new_weights_are_followed(net):
    lq = photograph(20, 30)
    upscaler = PixelUpscaler(net)
    first = upscaler.upscale(lq)
    net.refinement = False
    assert upscaler.upscale(lq).counts == first.counts
    assert not torch.equal(upscaler.upscale(lq).image, first.image)
    net.k = 1000
    assert upscaler.upscale(lq).counts[1] == 0
    net.adaptive = True
    with torch.no_grad():
        heavy = net(lq, return_routing=True)[1].heavy
        assert upscaler.upscale(lq).counts[1] == int(heavy.sum()) > 0
        before = upscaler.upscale(lq).image
        net.heavy.layers[-1].bias.add_(0.5)
        assert (upscaler.upscale(lq).image - before).max() > 0.4


def test_half_precision_changes_little(net):
    lq = photograph(20, 30)
    exact = PixelUpscaler(net, budget=9).upscale(lq).image
    half = PixelUpscaler(net, budget=9, precision='bfloat16').upscale(lq).image
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < 0.05


def test_phase_0_is_all_heavy():
    net, lq = build_network(pcsr(fsrcnn(8), phase=0)).eval(), photograph(9, 8)
    upscaler = PixelUpscaler(net)
    result = upscaler.upscale(lq)
    assert not upscaler.routed and result.counts == [9 * 8 * 16] and result.cost == pytest.approx(1)
    with torch.no_grad():
        torch.testing.assert_close(result.image, net(lq), atol=1e-5, rtol=0)
    assert set(result.plan.class_map().flatten().tolist()) == {0}


def test_it_is_watched_and_limited_as_other_engines_are(net, monkeypatch):
    monkeypatch.setitem(pixel_upscaler.BAND_PIXELS, 'cpu', 400)
    base, lq = PixelUpscaler(net, patch_size=16), torch.rand(1, 3, 20, 24)
    limited, seen = base.limited_to(budget=0.6), []
    limited.watch = seen.append
    expected = PixelUpscaler(net, patch_size=16, budget=0.6).upscale(lq)
    result = limited.upscale(lq)
    assert torch.equal(result.image, expected.image) and result.counts == expected.counts
    assert seen == sorted(seen) and len(seen) > 5 and seen[-1] == 1 and base.budget is None
    with pytest.raises(ValueError, match='budget in MACs only'):
        base.limited_to(max_loss=0.1)


def test_one_function_knows_which_engine_a_network_gets(net):
    assert isinstance(make_upscaler(net, None, None, scale=2.5), PixelUpscaler)
    other = build_network(fsrcnn(4)).eval()
    assert isinstance(make_upscaler(other, None, None, scale=4), TileUpscaler)
    with pytest.raises(ValueError, match='fixed scale'):
        make_upscaler(other, scale=2.5)
    with pytest.raises(ValueError, match='step from 1 to the patch size, 96, but got 100'):
        make_upscaler(other, step=100)
    assert make_upscaler(net, step=100).step == 100
    with pytest.raises(ValueError, match='scale from 1 to 64'):
        make_upscaler(net, scale=0.9)
    for wrong in (dict(target_ms=3), dict(cost='latency', budget=1)):
        with pytest.raises(ValueError, match='budget in MACs only'):
            make_upscaler(net, **wrong)


STREAMED = """
import resource, torch, cdnsr_basicsr
cdnsr_basicsr.register()
from basicsr.archs import build_network
from cdnsr_basicsr.inference import PixelUpscaler
from cdnsr_basicsr.inference.tiling import TensorRows
from tests.helpers import fsrcnn, pcsr

class Endless:
    width = 1024

    def __init__(self, height):
        self.height = height

    def rows(self, top, bottom):
        return torch.rand(3, bottom - top, self.width)

upscaler = PixelUpscaler(build_network(pcsr(fsrcnn(8))).eval())
peaks = []
for height in (1024, 3072):
    rows = sum(len(strip) for strip in upscaler.strips(Endless(height), upscaler.plan(Endless(height))))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(rows, peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_strip_not_by_the_image():
    result = subprocess.run([sys.executable, '-c', STREAMED], capture_output=True, text=True, check=True)
    rows, mib = map(int, result.stdout.split())
    assert rows == 4 * 3072 and mib < 200  # what is added has 34 megapixels, 384 MiB in float32


def test_out_of_memory_makes_smaller_batches(net, monkeypatch):
    lq, tried = photograph(61, 47), []
    expected = PixelUpscaler(net, 30, 18).upscale(lq).image
    original = pcsr_arch.PCSR.features

    def features(self, x):
        tried.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return original(self, x)

    monkeypatch.setattr(pcsr_arch.PCSR, 'features', features)
    upscaler = PixelUpscaler(net, 30, 18, max_tiles=8)
    torch.testing.assert_close(upscaler.upscale(lq).image, expected, atol=1e-5, rtol=0)
    assert tried[0] > 2 and tried[-1] <= 2 == upscaler.max_tiles


@pytest.mark.parametrize('part', ['margin', 'sample'])
def test_out_of_memory_makes_lower_bands(net, monkeypatch, part):
    lq, tried, original = photograph(61, 47), [], getattr(pcsr_arch.PCSR, part)
    expected = PixelUpscaler(net, 30, 18).upscale(lq)

    def short(self, features, grid, *args):
        tried.append(len(grid.rows))
        if len(grid.rows) > 70:
            raise torch.OutOfMemoryError
        return original(self, features, grid, *args)

    monkeypatch.setattr(pcsr_arch.PCSR, part, short)
    upscaler = PixelUpscaler(net, 30, 18)
    for _ in range(2):
        found = upscaler.upscale(lq)
        torch.testing.assert_close(found.image, expected.image, atol=1e-5, rtol=0)
        assert found.counts == expected.counts
    assert [rows for rows in tried if rows > 70] == [244, 122]  # and not again for the second image


@torch.no_grad()
def test_samplers_that_are_told_how_many_pixels_are_heavy_make_the_same(net):
    features, grid = net.features(photograph(9, 11)).permute(0, 2, 3, 1), pcsr_arch.pixel_grid((9, 11), (30, 31))
    for share in (0, 0.3, 1):
        heavy = torch.rand(1, 30, 31) < share
        counted = net.sample(features, grid, heavy)
        assert torch.equal(net.sample(features, grid, heavy, int(heavy.sum())), counted)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_files_of_any_channels_at_a_fractional_scale(net, tmp_path, channels, monkeypatch):
    monkeypatch.setattr(pixel_upscaler, 'STRIP_PIXELS', 1)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 21, channels), np.uint8)
    if channels == 2:
        tifffile.imwrite(tmp_path / 'a.tif', pixels, photometric='minisblack', extrasamples=['unassalpha'])
    else:
        cv2.imwrite(str(tmp_path / 'a.tif'), pixels)
    done = upscale_files(
        PixelUpscaler(net, 30, 18, scale=2.5, budget=0.9), str(tmp_path / 'a.tif'), str(tmp_path / 'out'), map=True)
    assert (done.done, done.failed) == (1, []) and sum(done.counts) == 82 * 52
    image = tifffile.imread(tmp_path / 'out' / 'a.tif')
    assert image.shape == (82, 52, channels)[:3 if channels > 1 else 2]
    assert cv2.imread(str(tmp_path / 'out' / 'a_map.png')) is not None


@pytest.mark.slow
@pytest.mark.parametrize('size', [(61, 47), (33, 150), (90, 20)])
def test_a_budget_is_kept_over_strips_of_different_cost(net, monkeypatch, size):
    """The last strip has more halo for its pixels than the others: what it lacks must not be spent by them."""
    monkeypatch.setattr(pixel_upscaler, 'STRIP_PIXELS', 700)
    lq = photograph(*size)
    floor, most = (PixelUpscaler(net, 30, 18, budget=budget).upscale(lq).cost for budget in (0, 99))
    assert len(PixelUpscaler(net, 30, 18).plan(TensorRows(lq)).rows.starts) > 1
    costs = []
    for share in (0, 0.01, 0.05, 0.3, 0.8, 1):
        budget = floor + share * (most - floor)
        costs.append(PixelUpscaler(net, 30, 18, budget=budget).upscale(lq).cost)
        assert budget - 0.01 * (most - floor) <= costs[-1] <= budget + 1e-9
    assert costs == sorted(costs)


@torch.no_grad()
def test_samplers_that_overflow_are_done_again_in_float32(net, tmp_path, caplog):
    net.k = -1000  # all heavy
    for layer, factor in ((net.heavy.layers[0], 1e5), (net.heavy.layers[-1], 1e-5)):
        layer.weight *= factor
    net.heavy.layers[0].bias *= 1e5
    lq = photograph(20, 30)[0].permute(1, 2, 0).mul(255).byte().numpy()
    cv2.imwrite(str(tmp_path / 'a.png'), lq)
    assert not PixelUpscaler(net, precision='float16').upscale(photograph(20, 30)).image.isfinite().all()
    results = []
    for precision in ('float32', 'float16'):
        upscaler = PixelUpscaler(net, precision=precision)
        done = upscale_files(upscaler, str(tmp_path / 'a.png'), str(tmp_path / precision))
        assert (done.done, done.failed) == (1, [])
        results.append(cv2.imread(str(tmp_path / precision / 'a.png')))
    assert np.array_equal(*results) and caplog.text.count('computed again in float32') == 1
