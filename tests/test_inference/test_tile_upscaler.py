import cv2
import itertools
import logging
import math
import pytest
import subprocess
import sys
import torch

from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from basicsr.utils import tensor2img
from cdnsr_basicsr.archs import Interpolation
from cdnsr_basicsr.complexity import count_macs
from cdnsr_basicsr.conversion.classsr_family import ARMNetFamily
from cdnsr_basicsr.conversion.registry import Source
from cdnsr_basicsr.conversion.weights import slice_to
from cdnsr_basicsr.data.prepare import make_lq
from cdnsr_basicsr.inference import TileUpscaler, Tiling, network, tile_upscaler, upscaler
from cdnsr_basicsr.inference.speed import Speed
from cdnsr_basicsr.inference.tiling import Canvas, TensorRows, pad_to
from tests.helpers import carn, fsrcnn, spread, swinir


def slow(net, lq, upscaler):
    """One tile after the other through its branch, blended by the definition."""
    tiling, scale = Tiling(*lq.shape[2:], upscaler.patch_size, upscaler.step), net.upscale
    image = pad_to(lq[0], *tiling.padded)
    total, weights = (torch.zeros(3, *(scale * length for length in tiling.padded)) for _ in range(2))
    ramps = [torch.arange(scale * size) + 1. for size in tiling.size]
    ramps = [torch.minimum(ramp, ramp.flip(0)) for ramp in ramps]
    classes = []
    for top, left in itertools.product(tiling.tops, tiling.lefts):
        tile = image[None, :, top:top + tiling.size[0], left:left + tiling.size[1]]
        classes.append(int(net.classifier(tile).argmax()))
        there = (slice(None), slice(scale * top,
                                    scale * (top + tiling.size[0])), slice(scale * left,
                                                                           scale * (left + tiling.size[1])))
        weight = ramps[0][:, None] * ramps[1]
        total[there] += weight * net.branches[classes[-1]](tile)[0]
        weights[there] += weight
    return (total / weights)[:, :scale * lq.shape[2], :scale * lq.shape[3]], classes


@torch.no_grad()
@pytest.mark.parametrize('size', [(1, 1), (3, 50), (16, 16), (37, 29)])
@pytest.mark.parametrize('upscale', [2, 3, 4])
def test_upscaling_equals_one_tile_at_a_time(tiny_net, size, upscale):
    net = spread(build_network(tiny_net(upscale, [fsrcnn(4, upscale), carn(4, upscale)])).eval())
    lq = torch.rand(1, 3, *size) * torch.linspace(0, 1, size[1])
    upscaler = TileUpscaler(net, 16, 12, max_tiles=1)
    result = upscaler.upscale(lq)
    image, classes = slow(net, lq, upscaler)
    assert result.image.shape == (1, 3, size[0] * upscale, size[1] * upscale)
    assert result.plan.classes.tolist() == classes
    torch.testing.assert_close(result.image[0], image, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize('size', [(1, 1), (5, 90), (64, 64), (131, 77)])
@pytest.mark.parametrize('max_tiles,canvas_bytes', [(1, 1), (4, 40000), (16, 2**30)])
def test_a_network_that_sees_single_pixels_gives_the_same_in_strips_and_blocks(monkeypatch, size, max_tiles,
                                                                               canvas_bytes):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 1), torch.nn.PixelShuffle(2)).eval()
    lq = torch.rand(1, 3, *size)
    monkeypatch.setitem(tile_upscaler.CANVAS_BYTES, 'cpu', canvas_bytes)
    upscaler = TileUpscaler(net, 16, 14, max_tiles=max_tiles)
    plan = upscaler.plan(TensorRows(lq))
    assert (len(plan.strips) > 1) == (canvas_bytes < 2**20 and size[0] > 14)
    torch.testing.assert_close(upscaler.upscale(lq).image, net(lq), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('size', [(1, 1), (70, 40), (45, 130)])
@pytest.mark.parametrize('paired_bytes', [1, 2**26])
def test_an_image_does_not_depend_on_how_many_rows_of_tiles_a_device_holds(tiny_net, monkeypatch, size, paired_bytes):
    """Neither on which tiles run together, which the memory of a strip must not decide."""
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, *size)
    monkeypatch.setattr(tile_upscaler, 'MERGED_BYTES', paired_bytes)
    images, blocks = [], []
    for canvas_bytes in (1, 100000, 2**30):
        monkeypatch.setitem(tile_upscaler.CANVAS_BYTES, 'cpu', canvas_bytes)
        upscaler = TileUpscaler(net, 16, 12)
        blocks.append(sorted(item for strip in upscaler.plan(TensorRows(lq)).strips for item in strip))
        images.append(upscaler.upscale(lq).image)
    assert blocks[0] == blocks[1] == blocks[2]
    assert max(block.rows for _, block in blocks[0]) <= (1 if paired_bytes == 1 else 16)
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize('block', [
    carn(8),
    fsrcnn(8),
    dict(type='MSRResNet', num_in_ch=3, num_out_ch=3, num_feat=8, num_block=2),
    dict(type='EDSR', num_in_ch=3, num_out_ch=3, num_feat=8, num_block=2)
])
@pytest.mark.parametrize('size', [(50, 83), (129, 64)])
def test_any_network_is_tiled_and_differs_from_the_whole_image_by_its_border_effect_only(block, size):
    net = build_network(block).eval()
    x = torch.rand(1, 3, 90, 90)
    with torch.no_grad():
        # what a border does: the same pixels, with and without what lies beyond
        border = (net(x)[..., 4 * 13:-4 * 13, 4 * 13:-4 * 13] - net(x[..., 13:-13, 13:-13])).abs().max()
        lq = torch.rand(1, 3, *size)
        upscaler = TileUpscaler(net, 32, 24)
        result = upscaler.upscale(lq)
        assert (result.image - net(lq)).abs().max() <= 1.5 * border + 1e-5
    assert set(result.plan.classes.tolist()) == {0} and upscaler.scale == 4


@pytest.mark.parametrize('summed', [False, True])
@pytest.mark.parametrize('modes', [('bilinear', 'bilinear'), ('bilinear', 'bicubic')])
@pytest.mark.parametrize('down', [False, True])
def test_a_smooth_gradient_has_no_step_at_tile_borders(tiny_net, modes, down, summed, monkeypatch):
    canvas = tile_upscaler.Canvas
    monkeypatch.setattr(tile_upscaler, 'Canvas', lambda *arguments: canvas(*arguments[:-1], summed))
    net = build_network(tiny_net(2, [{'type': 'Interpolation', 'upscale': 2, 'mode': mode} for mode in modes])).eval()
    ramp = torch.linspace(0, 1, 200).expand(1, 3, 60, 200).contiguous()
    ramp = ramp.transpose(2, 3) if down else ramp
    upscaler = TileUpscaler(net, 16, 12)
    tiling = upscaler.tiling_of(*ramp.shape[2:])
    logits = torch.zeros(len(tiling), 2)
    logits[torch.arange(len(tiling)), torch.arange(len(tiling)) % 2] = 9  # the branches meet everywhere
    result = upscaler.upscale(ramp, upscaler.plan(TensorRows(ramp), logits))
    assert result.plan.classes.unique().tolist() == [0, 1]
    image = result.image.transpose(2, 3) if down else result.image
    differences = image[..., 8:-8, 9:-8] - image[..., 8:-8, 8:-9]
    assert differences.min() > 0 and differences.max() < 2 * differences.mean()


def test_where_different_branches_meet_one_fades_into_the_other(tiny_net):

    class Constant(torch.nn.Module):

        def __init__(self, value):
            super().__init__()
            self.register_buffer('value', torch.tensor(value))

        def forward(self, x):
            return self.value.expand(len(x), 3, 2 * x.shape[2], 2 * x.shape[3])

    net = build_network(tiny_net(2, [{'type': 'Interpolation', 'upscale': 2}] * 2)).eval()
    net.branches = torch.nn.ModuleList([Constant(0.), Constant(1.)])
    upscaler = TileUpscaler(net, 16, 8, cost='latency')
    logits = torch.zeros(len(upscaler.tiling_of(16, 88)), 2)
    logits[1::2, 1] = logits[::2, 0] = 1
    lq = torch.rand(1, 3, 16, 88)
    image = upscaler.upscale(lq, upscaler.plan(TensorRows(lq), logits)).image
    steps = (image[..., 1:] - image[..., :-1]).abs()
    # over 8 pixels of LQ, 16 of the result: about 1/16 each
    assert image.min() == 0 and image.max() == 1 and steps.max() < 2 / 16


@pytest.mark.slow
def test_cost_counts_classifier_and_overlap(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 28, 40)
    for max_tiles in (1, 4):
        upscaler = TileUpscaler(net, 16, 12, max_tiles=max_tiles)
        plan = upscaler.plan(TensorRows(lq))
        assert plan.tiling.size == (16, 16) and len(plan.tiling) == 6
        macs = [count_macs(branch, 16, 16) for branch in net.branches]
        spent = 6 * count_macs(net.classifier, 16, 16)
        for kind, block in plan.strips[0]:
            top, bottom, left, right = plan.tiling.box(block)
            spent += count_macs(net.branches[kind], bottom - top, right - left)
        assert plan.cost == pytest.approx(spent / count_macs(net.branches[2], 28, 40), rel=1e-3)
        assert upscaler.costs.tolist() == pytest.approx([value / macs[2] for value in macs])


@pytest.mark.slow
def test_a_budget_is_kept_to_one_tile_classifier_and_overlap_included(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 120, 90) * torch.rand(1, 1, 120, 90)
    previous = None
    for budget in (0, 0.7, 0.9, 1.1, 1.3, 9):
        plan = TileUpscaler(net, 16, 14, budget=budget, max_tiles=4).plan(TensorRows(lq))
        tile = 2 * plan.tiling.size[0] * plan.tiling.size[1] / (120 * 90)
        classes = plan.classes.tolist()
        if budget == 0:
            assert set(classes) == {0}
        elif budget == 9:
            assert set(classes) == {2}
        else:
            assert budget - tile < plan.cost <= budget
        if previous:
            assert all(now >= before for now, before in zip(classes, previous.classes.tolist()))
        previous = plan


@pytest.mark.slow
def test_a_target_time_is_kept_by_the_measured_speed(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 120, 90)
    counts = []
    for target in (0, 5, 8, 1000):
        upscaler = TileUpscaler(net, 16, 14, target_ms=target, max_tiles=1)
        upscaler.measured = Speed([1] * 4, [0.05, 0.1, 0.2, 0.01])
        plan = upscaler.plan(TensorRows(lq))
        area = plan.tiling.size[0] * plan.tiling.size[1] / 256
        ms = area * sum([0.05, 0.1, 0.2][k] + 0.01 for k in plan.classes.tolist())
        assert ms <= target or set(plan.classes.tolist()) == {0}
        assert target - ms < 0.11 or set(plan.classes.tolist()) == {2} or target == 0
        counts.append(ms)
    assert counts == sorted(counts)
    with pytest.raises(ValueError, match='at most one of budget, target_ms'):
        TileUpscaler(net, 16, 14, target_ms=1, budget=1)


def test_latency_can_be_what_a_budget_counts(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 120, 90)
    upscaler = TileUpscaler(net, 16, 14, budget=0.8, cost='latency', max_tiles=1)
    upscaler.measured = Speed([1] * 4, [1., 1., 2., 0.])  # the middle branch is as fast as the easy one
    plan = upscaler.plan(TensorRows(lq))
    area = plan.tiling.size[0] * plan.tiling.size[1]
    spent = area * sum([1, 1, 2][k] for k in plan.classes.tolist()) / (2 * 120 * 90)
    assert 0.8 - 2 * area / (120 * 90) < spent <= 0.8


@pytest.mark.slow
def test_a_limit_is_spent_where_predicted_errors_fall_most(tiny_net):
    block = {**tiny_net(4, [fsrcnn(4), carn(8), carn(16)]), 'classifier': {'type': 'ErrorPredictor', 'num_feat': 4}}
    torch.manual_seed(1)
    net = build_network(block).eval()
    torch.nn.init.normal_(net.classifier.head.weight, std=0.3)
    lq = torch.rand(1, 3, 120, 90) * torch.rand(1, 1, 120, 90)
    ms = torch.tensor([1., 4., 5.])
    chosen = []
    for costs in ([0., 0., 0.], [0.1, 0.3, 1.]):  # what the logits count beside errors must not matter
        net.classifier.costs.copy_(torch.tensor(costs))
        upscaler = TileUpscaler(net, 16, 14, budget=0.5, cost='latency', max_tiles=1)
        upscaler.measured = Speed([1] * 4, [*ms.tolist(), 0.1])
        plan = upscaler.plan(TensorRows(lq))
        with torch.no_grad():
            errors = net.classifier.errors(upscaler._classify(upscaler.classifier, TensorRows(lq),
                                                              plan.tiling)).double()
        chosen.append(plan.classes)
        # at some price per millisecond, each tile has the class of least error + price * time; one may lag behind
        prices = ((errors[:, :1] - errors[:, 1:]) /
                  (ms[1:] - ms[0])).flatten().tolist() + ((errors[:, 1] - errors[:, 2]) / (ms[2] - ms[1])).tolist()
        wrong = [int(((errors + price * ms).argmin(dim=1) != plan.classes).sum()) for price in prices]
        assert len(set(plan.classes.tolist())) > 1 and min(wrong) <= 1
    assert torch.equal(*chosen)


@pytest.mark.slow
def test_new_weights_are_followed(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 20, 20)
    upscaler = TileUpscaler(net, 16, 12)
    before = upscaler.upscale(lq).image
    assert torch.equal(upscaler.upscale(lq).image, before)
    with torch.no_grad():
        for branch in net.branches:
            branch.deconv.bias += 0.25
    torch.testing.assert_close(upscaler.upscale(lq).image, before + 0.25)
    other = build_network(tiny_net())
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(upscaler.upscale(lq).image, TileUpscaler(other.eval(), 16, 12).upscale(lq).image)


@pytest.mark.slow
def test_fused_optimizers_need_a_refresh(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 20, 20)
    upscaler = TileUpscaler(net, 16, 12)
    before = upscaler.upscale(lq).image
    for param in net.parameters():
        param.data.add_(0.1)  # leaves the version alone, as fused optimizers do
    upscaler.refresh()
    after = upscaler.upscale(lq).image
    assert not torch.equal(after, before)
    assert torch.equal(after, TileUpscaler(net, 16, 12).upscale(lq).image)


@pytest.mark.slow
def test_a_branch_that_was_replaced_is_followed(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 20, 20)
    upscaler = TileUpscaler(net, 16, 12, budget=9)
    upscaler.upscale(lq)
    net.branches[2] = build_network(fsrcnn(6)).eval()
    assert torch.equal(upscaler.upscale(lq).image, TileUpscaler(net, 16, 12, budget=9).upscale(lq).image)


@pytest.mark.slow
def test_small_images_do_not_depend_on_what_came_before(tiny_net):
    net = spread(build_network(tiny_net(4, [carn(8), carn(12)])).eval())
    lq = torch.rand(1, 3, 60, 70)
    upscaler = TileUpscaler(net, 16, 14)
    before = upscaler.upscale(lq).image
    upscaler.upscale(torch.rand(1, 3, 200, 200))
    assert upscaler.measured is not None
    assert torch.equal(upscaler.upscale(lq).image, before)


def test_upscaling_draws_no_random_numbers(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    upscaler, lq = TileUpscaler(net, 16, 12), torch.rand(1, 3, 20, 20)
    state = torch.get_rng_state()
    upscaler.upscale(lq)
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_that_are_no_numbers_do_not_move_other_tiles(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 60, 60)
    lq[..., :10, :10] = torch.nan
    assert set(TileUpscaler(net, 16, 14, budget=9).plan(TensorRows(lq)).classes.tolist()) == {2}
    assert set(TileUpscaler(net, 16, 14, budget=0.01).plan(TensorRows(lq)).classes.tolist()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize('precision,tolerance', [('bfloat16', 0.03), ('float16', 0.004)])
def test_half_precision_is_near_and_a_branch_can_keep_float32(tiny_net, precision, tolerance):
    net = spread(build_network(tiny_net(4, [carn(8), carn(12)])).eval())
    lq = torch.rand(1, 3, 60, 70)
    exact = TileUpscaler(net, 16, 12).upscale(lq)
    half = TileUpscaler(net, 16, 12, precision=precision).upscale(lq)
    assert half.image.dtype == torch.float32 and half.plan.classes.equal(
        exact.plan.classes)  # the classifier keeps float32
    assert 0 < (half.image - exact.image).abs().max() < tolerance
    kept = TileUpscaler(net, 16, 12, precision=precision, float32_branches=[0, 1]).upscale(lq)
    assert torch.equal(kept.image, exact.image)
    upscaler = TileUpscaler(net, 16, 12, precision=precision, float32_branches=[1], budget=9)
    assert torch.equal(upscaler.upscale(lq).image, TileUpscaler(net, 16, 12, budget=9).upscale(lq).image)


STREAMED = """
import resource, torch, cdnsr_basicsr
cdnsr_basicsr.register()
from basicsr.archs import build_network
from cdnsr_basicsr.inference import TileUpscaler

class Endless:
    height, width = 6000, 2000

    def rows(self, top, bottom):
        return torch.rand(3, bottom - top, self.width)

net = build_network(dict(type='FSRCNN', num_feat=4, num_shrink=3, num_map=1, upscale=4)).eval()
upscaler = TileUpscaler(net, max_tiles=4)
upscaler.upscale(torch.rand(1, 3, 200, 200))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = upscaler.plan(Endless())
rows = sum(len(strip) for strip in upscaler.strips(Endless(), plan))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_strip_not_by_the_image():
    result = subprocess.run([sys.executable, '-c', STREAMED], capture_output=True, text=True, check=True)
    rows, mib = map(int, result.stdout.split())
    assert rows == 24000 and mib < 500  # the result has 192 megapixels, 2200 MiB in float32


@pytest.mark.slow
def test_tiles_of_a_photograph_are_as_good_as_the_whole(shared):
    path = shared('data/photos2k/0001.webp')
    net = build_network(dict(type='CARN_M', num_feat=64, upscale=4, fusion_bias=True)).eval()
    weights = torch.load(shared('weights/arm-carn.pth'), weights_only=True)
    net.load_state_dict(slice_to(ARMNetFamily().load(Source(weights), 4).state, net))
    gt, lq = make_lq(cv2.imread(str(path))[600:1200, 300:1200], 4)
    lq = torch.from_numpy(lq[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        whole = calculate_psnr(tensor2img(net(lq)), gt, 4)
    for max_tiles in (1, 4):
        tiled = TileUpscaler(net, 64, 60, max_tiles=max_tiles).upscale(lq)
        assert calculate_psnr(tensor2img(tiled.image), gt, 4) > whole - 0.02


@pytest.mark.slow
@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory.'),
    RuntimeError('GET was unable to find an engine to execute this computation'),
    RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
])
def test_out_of_memory_halves_the_batch_and_goes_on(tiny_net, monkeypatch, error):
    net, said = spread(build_network(tiny_net(4, [carn(4), fsrcnn(4)])).eval()), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger('basicsr'), 'handlers', [handler])
    lq = torch.rand(1, 3, 100, 100)
    expected = TileUpscaler(net, 16, 16, max_tiles=1).upscale(lq)
    upscaler = TileUpscaler(net, 16, 16, max_tiles=16)
    run, sizes, failures = upscaler.run, [], []

    def short(branch, tiles):
        sizes.append(tiles.shape[0] * tiles.shape[2] * tiles.shape[3])
        if sizes[-1] > 16 * 16:
            failures.append(sizes[-1])
            raise error
        return run(branch, tiles)

    upscaler.run = short
    torch.testing.assert_close(upscaler.upscale(lq).image, expected.image, atol=1e-5, rtol=0)
    assert max(sizes) > 3 * 16 * 16 and len(failures) <= 4  # not once for every batch
    assert sum('smaller batches' in text for text in said) == 1
    assert max(upscaler.plan(TensorRows(lq)).max_tiles) == 1  # the next image begins there
    upscaler.run = lambda branch, tiles: (_ for _ in ()).throw(torch.OutOfMemoryError('one tile is too much'))
    with pytest.raises(torch.OutOfMemoryError, match='one tile'):
        upscaler.upscale(lq)


def falls_short(function, large):
    """A function that runs out of memory where `large` is true of its arguments; and how often it has."""
    failed = []

    def short(*args, **kwargs):
        if large(*args):
            failed.append(args)
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return function(*args, **kwargs)

    return short, failed


def test_out_of_memory_in_the_classifier_has_it_see_fewer_tiles(tiny_net):
    net, lq = spread(build_network(tiny_net()).eval()), torch.rand(1, 3, 75, 50)
    expected = TileUpscaler(net, 16, 12).upscale(lq)
    upscaler = TileUpscaler(net, 16, 12)
    upscaler._update()
    upscaler.classifier.forward, failed = falls_short(upscaler.classifier.forward, lambda tiles: len(tiles) > 3)
    found = [upscaler.upscale(lq) for _ in range(2)]
    assert all(torch.equal(one.plan.classes, expected.plan.classes) for one in found)
    assert [len(tiles) for tiles, in failed] == [24, 12, 6]  # and not again for the second image
    upscaler.classifier.forward, _ = falls_short(upscaler.classifier.forward, lambda tiles: True)
    with pytest.raises(torch.OutOfMemoryError):
        upscaler.upscale(lq)


def test_out_of_memory_in_an_error_map_has_fewer_rows_mapped(tiny_net):
    net, lq = mapped(tiny_net), torch.rand(1, 3, 101, 70)
    upscaler = TileUpscaler(net, 20, 16)
    upscaler._update()
    short, failed = falls_short(upscaler.classifier.error_map, lambda rows: rows.shape[2] > 60)
    upscaler.classifier.error_map = short
    found, expected = (one.predict(TensorRows(lq)).errors for one in (upscaler, TileUpscaler(net, 20, 16)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert failed


def test_out_of_memory_for_a_strip_makes_lower_strips_of_the_same_blocks(tiny_net, monkeypatch):
    net, lq = spread(build_network(tiny_net()).eval()), torch.rand(1, 3, 150, 50)
    monkeypatch.setattr(tile_upscaler, 'MERGED_BYTES', 2 * 4 * 4 * 52 * 16 * 4**2)  # blocks of up to two rows of tiles
    expected = TileUpscaler(net, 16, 12).upscale(lq)
    init, failed = falls_short(Canvas.__init__, lambda *args: args[4] > 4)
    monkeypatch.setattr(Canvas, '__init__', init)
    upscaler = TileUpscaler(net, 16, 12)
    found = [upscaler.upscale(lq) for _ in range(2)]
    assert max(block.rows for strip in expected.plan.strips for _, block in strip) == 2
    assert [args[4] for args in failed] == [13, 6]  # and not again for the second image
    for one in found:
        torch.testing.assert_close(one.image, expected.image, atol=1e-5, rtol=0)
    monkeypatch.setattr(Canvas, '__init__', falls_short(init, lambda *args: True)[0])
    with pytest.raises(torch.OutOfMemoryError):
        upscaler.upscale(lq)


def test_an_error_that_has_nothing_to_do_with_memory_is_not_tried_again(tiny_net):
    calls = []

    def broken(branch, tiles):
        calls.append(len(tiles))
        raise RuntimeError('shapes do not fit')

    upscaler = TileUpscaler(build_network(tiny_net()).eval(), 16, 16, max_tiles=16)
    upscaler.run = broken
    with pytest.raises(RuntimeError, match='do not fit'):
        upscaler.upscale(torch.rand(1, 3, 100, 100))
    assert len(calls) == 1


@pytest.mark.parametrize('words', ['CUDA error: out of memory', 'cuDNN error: CUDNN_STATUS_NOT_INITIALIZED'])
def test_a_gpu_that_fails_is_not_taken_for_a_network_that_does(words):

    class Failing(torch.nn.Conv2d):

        def forward(self, x):
            raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        network.geometry(Failing(3, 3, 1))


def test_a_network_without_weights_is_where_it_was_put():
    assert network.device_of(Interpolation().to('meta')) == torch.device('meta')
    assert not Interpolation().state_dict()


def test_cudnn_searches_again_after_an_error():
    torch.backends.cudnn.benchmark = True
    try:
        with pytest.raises(ZeroDivisionError), upscaler.algorithm_search(False):
            assert not torch.backends.cudnn.benchmark
            raise ZeroDivisionError
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize('together', [1, 3, 7, 1000])
def test_tiles_are_classified_by_themselves_however_many_together(tiny_net, monkeypatch, together):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 75, 50)
    upscaler = TileUpscaler(net, 16, 12)
    tiling = upscaler.plan(TensorRows(lq)).tiling
    monkeypatch.setitem(tile_upscaler.CLASSIFIED_TOGETHER, 'cpu', together)
    with torch.no_grad():
        found = upscaler._classify(upscaler.classifier, TensorRows(lq), tiling)
        (height, width), padded = tiling.size, pad_to(lq[0], *tiling.padded)
        alone = [net.classifier(padded[None, :, y:y + height, x:x + width]) for y in tiling.tops for x in tiling.lefts]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-3, rtol=1e-4)  # logits of up to 300


def test_a_network_that_makes_no_larger_image_is_named():
    with pytest.raises(ValueError, match='Conv2d makes .* not a super-resolution network'):
        TileUpscaler(torch.nn.Conv2d(3, 5, 3, padding=1))


@torch.no_grad()
@pytest.mark.parametrize('multiple', [2, 7, 8, 12, 48, 100])
def test_networks_that_want_multiples_get_them(multiple):

    class Picky(torch.nn.Module):

        def forward(self, x):
            if x.shape[2] % multiple or x.shape[3] % multiple:
                raise RuntimeError('shape is invalid')
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    upscaler = TileUpscaler(Picky(), 20)
    assert upscaler.multiple == multiple
    for size in ((1, 1), (37, 50), (64, 41)):
        lq = torch.rand(1, 3, *size)
        assert torch.equal(upscaler.upscale(lq).image, lq.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.slow
@torch.no_grad()
def test_branches_that_want_other_multiples_go_together(tiny_net):
    net = spread(build_network(tiny_net(2)).eval())
    whole = torch.nn.PixelShuffle(2)

    class Picky(torch.nn.Module):

        def forward(self, x):
            if x.shape[2] % 8 or x.shape[3] % 8:
                raise RuntimeError('shape is invalid')
            return whole(x.repeat_interleave(4, 1))

    net.branches[1] = Picky()
    upscaler = TileUpscaler(net, 20)
    assert upscaler.multiple == 8 and upscaler.upscale(torch.rand(1, 3, 50, 43)).image.shape == (1, 3, 100, 86)
    net.branches[2] = build_network(swinir(6, 2)).eval()
    upscaler, lq = TileUpscaler(net, 20), torch.rand(1, 3, 50, 43)
    logits = torch.eye(3).repeat(len(upscaler.tiling_of(50, 43)), 1)[:len(upscaler.tiling_of(50, 43))]
    assert upscaler.multiple == 24 and upscaler.upscale(lq, upscaler.plan(TensorRows(lq),
                                                                          logits)).image.shape == (1, 3, 100, 86)
    net.branches[1] = build_network(fsrcnn(4, 3))
    with pytest.raises(ValueError, match='branches differ in scale'):
        TileUpscaler(net, 20)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('window_size', [5, 7, 8, 16])
def test_windows_of_any_size(window_size):
    net = build_network(swinir(window_size)).eval()
    assert network.geometry(net) == (4, 3, window_size)
    for size in ((1, 1), (window_size, 2 * window_size), (30, 41)):
        lq = torch.rand(2, 3, *size)
        padded = torch.stack([pad_to(image, *(-(-side // window_size) * window_size for side in size)) for image in lq])
        expected = net(padded)[..., :4 * size[0], :4 * size[1]]
        assert torch.equal(network.run_padded(net, lq, 4, window_size), expected)
        image = TileUpscaler(net, 64).upscale(lq[:1]).image
        assert image.shape == expected[:1].shape
        if min(size) >= 16:  # smaller images are padded further
            torch.testing.assert_close(image, expected[:1], atol=1e-4, rtol=0)


@pytest.mark.parametrize('accepted,words', [
    ([64], 'accepts no square images except those of 64 pixels'),
    ([], 'accepts no square of 16 to 128 pixels, of 3 channels: not 16; of 1 channel: not 16'),
    ([33, 41, 49], 'accepts square images of 33 and 41 pixels, but none between'),
])
def test_sizes_that_are_no_multiples_are_named(accepted, words):

    class Picky(torch.nn.Module):

        def forward(self, x):
            if x.shape[3] not in accepted:
                raise RuntimeError(f'not\n{x.shape[3]}')
            return x

    with pytest.raises(ValueError, match=f'^Picky {words}'):
        TileUpscaler(Picky())


@pytest.mark.slow
def test_slow_branches_are_not_chosen_by_time_where_a_stronger_one_is_faster(tiny_net):
    net = spread(build_network(tiny_net()).eval())
    lq = torch.rand(1, 3, 120, 90)
    chosen = set()
    for budget in (0.01, 0.5, 1, 9):
        upscaler = TileUpscaler(net, 16, 14, budget=budget, cost='latency', max_tiles=1)
        upscaler.measured = Speed([1] * 4, [5., 1., 2., 0.])
        chosen |= set(upscaler.plan(TensorRows(lq)).classes.tolist())
    assert chosen == {1, 2}


@pytest.mark.slow
def test_branches_without_macs_have_no_cost(tiny_net):
    net = build_network(tiny_net(2, [{'type': 'Interpolation', 'upscale': 2}] * 2)).eval()
    assert math.isnan(TileUpscaler(net, 16).upscale(torch.rand(1, 3, 20, 20)).cost)
    with pytest.raises(ValueError, match='use cost latency'):
        TileUpscaler(net, 16, budget=0.5)


def test_gray_networks_have_one_channel():
    net = build_network(dict(carn(8), num_in_ch=1, num_out_ch=1, rgb_mean=[0.5])).eval()
    upscaler = TileUpscaler(net, 16)
    assert upscaler.channels == 1 and upscaler.upscale(torch.rand(1, 1, 20, 30)).image.shape == (1, 1, 80, 120)


def test_branches_that_take_any_channels_are_gray_among_gray_ones(tiny_net):
    gray = dict(num_in_ch=1, num_out_ch=1)
    net = build_network(tiny_net(branches=[dict(type='Interpolation'), dict(fsrcnn(4), **gray)]))
    with pytest.raises(ValueError, match='the classifier does not accept images of 1 channel'):
        TileUpscaler(net)
    block = tiny_net(branches=[dict(type='Interpolation'), dict(fsrcnn(4), **gray)])
    block['classifier']['num_in_ch'] = 1
    assert TileUpscaler(build_network(block)).channels == 1


def test_macs_are_counted_at_the_input_size_of_a_transposed_conv():
    deconv = torch.nn.ConvTranspose2d(8, 3, 9, stride=4, padding=3, output_padding=1)
    assert count_macs(deconv, 10, 12, channels=8) == 10 * 12 * 8 * 3 * 81
    grouped = torch.nn.Conv2d(8, 4, 3, padding=1, groups=2)
    assert count_macs(grouped, 10, 12, channels=8) == 10 * 12 * 8 * 4 * 9 // 2


@pytest.mark.parametrize('num_feat,published', [(16, 141e6), (36, 304e6), (56, 468e6)])
def test_the_papers_count_transposed_convs_at_their_output_size(num_feat, published):
    net = build_network({'type': 'FSRCNN', 'num_feat': num_feat})
    assert 2 * count_macs(net, 32, 32, papers=True) == pytest.approx(published, rel=0.01)


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
        TileUpscaler(build_network(tiny_net()).eval(), 16, 12).upscale(torch.rand(2, 3, 8, 8))


def mapped(tiny_net, **kwargs):
    """A network whose ErrorMap tells cells apart."""
    block = {**tiny_net(4, [fsrcnn(4), carn(8), carn(16)]), 'classifier': {'type': 'ErrorMap', 'num_feat': 8, **kwargs}}
    net = build_network(block).eval()
    torch.nn.init.normal_(net.classifier.head.weight, std=0.5)
    return net


def half_smooth(height, width):
    """An image that is busier towards the right."""
    return 0.5 + (torch.rand(1, 3, height, width) - 0.5) * torch.linspace(0, 1, width)


@pytest.mark.parametrize('rows', [8, 24, 512])
def test_errors_are_the_same_however_many_rows_are_mapped_at_once(tiny_net, monkeypatch, rows):
    net, lq = mapped(tiny_net), torch.rand(1, 3, 101, 70)
    monkeypatch.setattr(tile_upscaler, 'MAPPED_ROWS', rows)
    upscaler = TileUpscaler(net, 20, 16)
    with torch.inference_mode():
        found = upscaler._error_map(net.classifier, TensorRows(lq))
        torch.testing.assert_close(found, net.classifier.error_map(lq)[0], rtol=1e-4, atol=1e-4)


def test_without_a_limit_tiles_get_the_least_error_and_price(tiny_net):
    net, lq = mapped(tiny_net, price=30.), half_smooth(90, 130)
    upscaler = TileUpscaler(net, 16, 16)  # no overlap: borders are free
    plan = upscaler.plan(TensorRows(lq))
    with torch.no_grad():
        errors = plan.tiling.means(net.classifier.error_map(lq)[0], 8)
    assert plan.classes.tolist() == (errors + 30 * upscaler.costs).argmin(dim=1).tolist()
    assert len(set(plan.classes.tolist())) > 1


@pytest.mark.parametrize('cost', ['macs', 'latency'])
def test_a_budget_is_kept_by_predicted_errors_of_cells(tiny_net, cost):
    net, lq = mapped(tiny_net), half_smooth(120, 150)
    spent = []
    for budget in (0.2, 0.5, 0.8, 5):
        upscaler = TileUpscaler(net, 20, 16, budget=budget, cost=cost, max_tiles=64)
        ms = [1., 3., 8., 0.01]
        upscaler.measured = Speed([1] * 4, ms)
        plan = upscaler.plan(TensorRows(lq))
        parts = ms if cost == 'latency' else [*upscaler.branch_macs, upscaler.classifier_macs]
        spent.append(upscaler._spent(plan.tiling, plan.strips, parts) / upscaler._whole(plan.tiling, parts))
        assert spent[-1] <= budget or set(plan.classes.tolist()) == {0}
        if spent[-1] < budget - 0.05:  # all that is worth spending, whatever it costs
            errors = plan.tiling.means(upscaler._error_map(net.classifier, TensorRows(lq)), 8)
            assert plan.classes.tolist() == errors.argmin(dim=1).tolist()
    assert spent == sorted(spent) and 0.15 < spent[0] < spent[1]


def ranked(tiny_net, **kwargs):
    """A network whose branches leave 1, 0.6 and 0.4 of what the texture says, it says."""
    net = mapped(tiny_net, **kwargs)
    torch.nn.init.zeros_(net.classifier.head.weight)
    net.classifier.head.bias.data = torch.tensor([0., 0.4, 0.6])
    return net


@torch.no_grad()
def looked(upscaler, images, weigh='pixels'):
    """Plans of images that keep to a limit together, each one's predicted errors of its tiles, and what they count."""
    with upscaler.together(map(TensorRows, images), weigh):
        plans = [upscaler.plan(TensorRows(lq)) for lq in images]
    errors = [
        plan.tiling.means(upscaler._error_map(upscaler.net.classifier, TensorRows(lq)), 8).double()
        for plan, lq in zip(plans, images)
    ]
    return plans, errors


FOLDER = [(120, 150, 1.), (40, 90, 0.2), (90, 70, 0.5)]


@pytest.mark.parametrize('limit', [dict(budget=0.3), dict(budget=0.6), dict(target_ms=150.)])
def test_a_folder_keeps_to_a_budget_together_where_it_saves_most(tiny_net, limit):
    net, images = ranked(tiny_net), [0.5 + size * (half_smooth(h, w) - 0.5) for h, w, size in FOLDER]
    upscaler = TileUpscaler(net, 16, 16, cost='latency', max_tiles=1, **limit)  # no overlap: borders are free
    upscaler.measured = Speed([1] * 4, [1., 3., 8., 0.01])
    plans, errors = looked(upscaler, images)

    def spent(plans):
        return [upscaler._spent(plan.tiling, plan.strips, upscaler.part_costs) for plan in plans]

    allowed = sum(
        limit.get('target_ms') or limit['budget'] * upscaler._whole(plan.tiling, upscaler.part_costs) for plan in plans)
    assert 0.97 * allowed < sum(spent(plans)) <= allowed
    # a tile of any picture that would save more by a dearer class than another one does has it
    costs = torch.tensor([1., 3., 8.]).double() / 8
    classes, errors = torch.cat([plan.classes for plan in plans]), torch.cat(errors)
    rises = [((e[k] - e.min()) / (costs[i] - costs[k])) for e, k in zip(errors, classes) for i in range(k + 1, 3)]
    saves = [((e[i] - e[k]) / (costs[k] - costs[i])) for e, k in zip(errors, classes) for i in range(k)]
    assert min(saves) >= max(
        (e[k] - e[i]) / (costs[i] - costs[k]) for e, k in zip(errors, classes) for i in range(k + 1, 3)) - 1e-3
    assert rises

    alone = [upscaler.plan(TensorRows(lq)) for lq in images]  # afterwards each by itself again
    shares = [ms / upscaler._limit(plan.tiling) for ms, plan in zip(spent(alone), alone)]
    together = [ms / upscaler._limit(plan.tiling) for ms, plan in zip(spent(plans), plans)]
    assert max(shares) <= 1 < max(together) and min(together) < min(shares)


@pytest.mark.parametrize('max_loss', [0.02, 0.3])
@pytest.mark.parametrize('weigh', ['pixels', 'pictures'])
def test_a_folder_loses_no_more_than_it_may(tiny_net, max_loss, weigh):
    """Of all pixels together, or of the pictures' decibels on average; and it saves what it can."""
    net, images = ranked(tiny_net, margin=1.25), [0.5 + size * (half_smooth(h, w) - 0.5) for h, w, size in FOLDER]
    upscaler = TileUpscaler(net, 16, 16, cost='latency', max_loss=max_loss, max_tiles=1)
    upscaler.measured, upscaler.hardest = Speed([1] * 4, [1., 3., 8., 0.01]), 2
    plans, errors = looked(upscaler, images, weigh)

    def lost(plans):
        sums = torch.tensor(
            [[float(e.clamp(min=0).gather(1, plan.classes[:, None]).mean()) for e, plan in zip(errors, plans)],
             [float(e[:, 2].clamp(min=0).mean()) for e in errors]])
        if weigh == 'pictures':
            return 10 * torch.log10((sums[0] / sums[1]).mean())
        return 10 * torch.log10((sums * torch.tensor([h * w for h, w, _ in FOLDER])).sum(1)).diff().neg().item()

    assert float(lost(plans)) <= max_loss / 1.25 + 1e-4
    upscaler.max_loss *= 1.5
    cheaper, _ = looked(upscaler, images, weigh)
    assert sum(plan.classes.sum() for plan in cheaper) < sum(plan.classes.sum() for plan in plans)
    single = upscaler.plan(TensorRows(images[0]))
    share = errors[0].clamp(min=0).gather(1, single.classes[:, None]).sum() / errors[0][:, 2].clamp(min=0).sum()
    assert 10 * torch.log10(share) <= upscaler.max_loss / 1.25 + 1e-4


def test_a_loss_is_predicted_by_errors_alone(tiny_net):
    with pytest.raises(ValueError, match='max_loss=0.02 needs a classifier that predicts errors'):
        TileUpscaler(build_network(tiny_net()).eval(), 16, 12, max_loss=0.02)
    with pytest.raises(ValueError, match='at most one of budget, target_ms, max_loss and fidelity'):
        TileUpscaler(mapped(tiny_net), 16, 12, max_loss=0.02, budget=0.5)
    with pytest.raises(ValueError, match='margin above 0'):
        mapped(tiny_net, margin=0.)


def test_budgets_are_of_the_hardest_branch_which_is_the_last_one(tiny_net):
    """Also where another one has more operations."""
    net = build_network(tiny_net(4, [fsrcnn(4), carn(16), carn(8)])).eval()
    upscaler = TileUpscaler(net, 32, 28)
    assert upscaler.hardest == 2 and upscaler.branch_macs[1] > upscaler.branch_macs[2]
    assert upscaler.whole_macs == upscaler.branch_macs[2] / 32**2 / 16
    all_last = upscaler.plan(TensorRows(torch.rand(1, 3, 32, 32)), torch.tensor([[0., 0., 1.]]))
    assert all_last.cost == pytest.approx(1 + upscaler.classifier_macs / upscaler.branch_macs[2])


@pytest.mark.parametrize('classifier', ['PatchClassifier', 'ErrorPredictor', 'ErrorMap'])
def test_one_prediction_serves_all_limits(tiny_net, classifier):
    """What is decided of it is what an engine with that limit decides by itself, and it is run once."""
    block = {**tiny_net(4, [fsrcnn(4), carn(8), carn(16)]), 'classifier': {'type': classifier, 'num_feat': 8}}
    net = build_network(block).eval()
    lq = TensorRows(torch.rand(1, 3, 60, 70) * torch.linspace(0, 1, 70))
    options = dict(patch_size=16, step=12, cost='macs', max_tiles=4)
    base = TileUpscaler(net, **options)
    prediction = base.predict(lq)
    asked, runs = base.classifier, []
    asked.register_forward_hook(lambda *args: runs.append(1))
    limits = [{}, {'budget': 0.3}, {'budget': 0.8}]
    limits += [{'max_loss': 0.1}, {'max_loss': 1.}] if classifier != 'PatchClassifier' else []
    for limit in limits:
        plan = base.limited_to(**limit).plan(lq, prediction=prediction)
        expected = TileUpscaler(net, **options, **limit).plan(lq)
        assert plan.classes.tolist() == expected.classes.tolist() and plan.strips == expected.strips
        assert plan.cost == expected.cost
    assert not runs and base.budget is base.max_loss is None
    with pytest.raises(ValueError, match='at most one'):
        base.limited_to(budget=1, max_loss=1)
    with pytest.raises(ValueError, match='needs a'):
        base.limited_to(fidelity=40)


@pytest.mark.parametrize('reference', ['gt', 'hardest'])
def test_decibels_are_the_limit_that_a_plan_keeps_to(tiny_net, reference):
    block = {**tiny_net(4, [fsrcnn(4), carn(8)]), 'classifier': {'type': 'ErrorMap', 'num_feat': 8}}
    block['classifier']['reference'] = reference
    upscaler = TileUpscaler(build_network(block).eval(), 16, 12, cost='macs', max_tiles=4)
    lq = TensorRows(torch.rand(1, 3, 60, 70))
    errors = 1 + 50 * torch.rand(len(upscaler.tiling_of(60, 70)), 2)
    errors[:, 1] = 0 if reference == 'hardest' else 1
    limit = {'gt': 'max_loss', 'hardest': 'fidelity'}[reference]
    for value in {'gt': (0.5, 3), 'hardest': (36, 40)}[reference]:
        plan = upscaler.limited_to(**{limit: value}).plan(lq, errors=errors)
        reached = upscaler.decibels(plan, errors)
        assert len(plan.classes.unique()) == 2 and (reached <= value if reference == 'gt' else reached >= value)
        assert abs(reached - value) < 1.5  # one tile more would be too many


def test_estimated_time_is_that_of_blocks_and_classifier(tiny_net):
    upscaler = TileUpscaler(spread(build_network(tiny_net()).eval()), 16, 16, max_tiles=1)
    upscaler.measured = Speed([1, 1, 1, 1], [1., 2., 4., 0.5])
    lq = TensorRows(torch.rand(1, 3, 32, 48))
    plan = upscaler.plan(lq, logits=torch.eye(3).repeat(2, 1))
    assert upscaler.milliseconds(plan) == (2 * (1 + 2 + 4) + 6 * 0.5, 6 * 4)


@pytest.mark.parametrize('size', [(5, 7), (131, 77)])
def test_what_watches_sees_the_share_that_is_done_and_can_stop_it(tiny_net, monkeypatch, size):
    monkeypatch.setitem(tile_upscaler.CANVAS_BYTES, 'cpu', 40000)
    upscaler = TileUpscaler(spread(build_network(tiny_net()).eval()), 16, 12, max_tiles=2)
    seen, other = [], upscaler.limited_to()
    other.watch = seen.append
    upscaler.upscale(torch.rand(1, 3, *size))
    assert not seen  # each has its own
    other.upscale(torch.rand(1, 3, *size))
    assert seen == sorted(seen) and seen[-1] == 1 and (len(seen) > 20) == (size[0] > 16)

    def stop(share):
        raise KeyboardInterrupt

    other.watch = stop
    with pytest.raises(KeyboardInterrupt):
        other.upscale(torch.rand(1, 3, *size))
