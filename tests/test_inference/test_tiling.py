import itertools
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cdnsr_basicsr.inference.tiling import Tiling, pad_to, tile_starts

SIZES = [(1, 1), (1, 40), (7, 3), (16, 16), (17, 33), (30, 45)]
TILES = [(16, 16), (16, 14), (16, 5), (16, 1), (1, 1), (3, 2)]


@pytest.mark.parametrize('size,tile,scale', list(itertools.product(SIZES, TILES, (1, 3))))
def test_an_identity_network_returns_the_input_exactly(size, tile, scale):
    image = torch.rand(3, *size)
    tiling = Tiling(*size, *tile)
    upscaled = tiling.cut(image).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.equal(tiling.blend(upscaled, scale), image.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


def test_tiles_are_crops_in_row_order():
    image = torch.rand(3, 23, 31)
    tiling = Tiling(23, 31, 8, 6)
    corners = [(top, left) for top in tiling.tops for left in tiling.lefts]
    for tile, (top, left) in zip(tiling.cut(image), corners):
        assert torch.equal(tile, image[:, top:top + 8, left:left + 8])
    assert len(tiling) == len(corners) == len(tiling.cut(image))


@pytest.mark.parametrize('length', range(1, 60))
@pytest.mark.parametrize('patch_size,step', [(8, 8), (8, 5), (8, 1)])
def test_starts_cover_every_pixel_and_stay_inside(length, patch_size, step):
    starts = tile_starts(length, patch_size, step)
    assert {i for start in starts for i in range(start, start + patch_size)} >= set(range(length))
    assert starts == sorted(set(starts)) and starts[0] == 0
    if length >= patch_size:
        assert starts[-1] + patch_size == length
        assert all(following - start <= step for start, following in zip(starts, starts[1:]))


def test_blend_is_the_weighted_average():
    tiling, scale = Tiling(20, 13, 8, 3), 2
    tiles = torch.rand(len(tiling), 3, 16, 16, dtype=torch.float64)
    total, weights = np.zeros((3, 40, 26)), np.zeros((40, 26))
    corners = [(top, left) for top in tiling.tops for left in tiling.lefts]
    for tile, (top, left) in zip(tiles, corners):
        for y, x in itertools.product(range(16), range(16)):
            weight = min(y + 1, 16 - y) * min(x + 1, 16 - x)
            total[:, 2 * top + y, 2 * left + x] += weight * tile[:, y, x].numpy()
            weights[2 * top + y, 2 * left + x] += weight
    assert weights.min() > 0
    np.testing.assert_allclose(tiling.blend(tiles, scale).numpy(), total / weights, atol=1e-12)


def test_class_map_names_the_tile_with_the_nearest_centre():
    tiling = Tiling(21, 30, 8, 5)
    class_map = tiling.class_map(torch.arange(len(tiling)))
    for y, x in itertools.product(range(21), range(30)):
        row = min(range(len(tiling.tops)), key=lambda i: abs(tiling.tops[i] + 4 - y - 0.5))
        column = min(range(len(tiling.lefts)), key=lambda i: abs(tiling.lefts[i] + 4 - x - 0.5))
        ours = divmod(int(class_map[y, x]), len(tiling.lefts))
        for chosen, best, starts, position in ((ours[0], row, tiling.tops, y), (ours[1], column, tiling.lefts, x)):
            assert abs(starts[chosen] + 4 - position - 0.5) == abs(starts[best] + 4 - position - 0.5)


def test_padding_reflects_then_repeats():
    image = torch.tensor([[[1., 2., 3.]]])
    assert pad_to(image, 1, 8).tolist() == [[[1, 2, 3, 2, 1, 1, 1, 1]]]
    assert pad_to(image, 3, 2).tolist() == [[[1, 2, 3]] * 3]


def test_stitching_equals_golden_where_the_published_code_covers(shared):
    pytest.importorskip('numpy', minversion='2.0', reason='the file holds scalars of numpy 2')
    path = shared('golden/stitch.pth')
    scalars = [np._core.multiarray.scalar, np.dtype, np.dtypes.Int64DType]
    with torch.serialization.safe_globals(scalars):
        rows = torch.load(path, weights_only=True)['rows']
    for row in rows:
        image = row['lq'].permute(2, 0, 1)
        tiling = Tiling(*image.shape[1:], row['patch_size'], row['step'])
        upscaled = F.interpolate(tiling.cut(image), scale_factor=4, mode='nearest')
        height, width = (4 * int(length) for length in row['covered'])
        blended = tiling.blend(upscaled, 4)[:, :height, :width]
        torch.testing.assert_close(blended, row['stitched_nearest_x4'].permute(2, 0, 1), atol=1e-6, rtol=0)
        assert tiling.blend(upscaled, 4).shape[1:] == (4 * image.shape[1], 4 * image.shape[2])


@pytest.mark.parametrize('arguments,message', [
    ((0, 5, 8, 8), 'at least 1x1 pixels, but got 0x5'),
    ((5, 5, 8, 9), 'step from 1 to patch_size 8, but got 9'),
    ((5, 5, 8, 0), 'step from 1 to patch_size 8, but got 0'),
])
def test_wrong_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tiling(*arguments)


def test_wrong_tiles_are_named():
    with pytest.raises(ValueError, match=r'Expected 4 tiles of 16x16, but got \(3, 3, 16, 16\)'):
        Tiling(10, 10, 8, 6).blend(torch.rand(3, 3, 16, 16), 2)
    with pytest.raises(ValueError, match='Expected an image of 10x10'):
        Tiling(10, 10, 8, 6).cut(torch.rand(3, 10, 11))
