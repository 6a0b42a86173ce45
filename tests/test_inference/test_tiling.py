import itertools
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cdnsr_basicsr.inference.tiling import Block, Canvas, Tiling, fit, pad_to, shapes

SIZES = [(1, 1), (1, 40), (7, 3), (16, 16), (17, 33), (30, 45), (61, 38)]
TILES = [(16, 16), (16, 14), (16, 5), (16, 1), (1, 1), (3, 2), (20, 12)]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    empty = torch.empty

    def filled(*size, **kwargs):
        tensor = empty(*size, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, 'empty', filled)


def padded(image, tiling):
    return pad_to(image, *tiling.padded)


def cut(image, tiling, block):
    top, bottom, left, right = tiling.box(block)
    return padded(image, tiling)[:, top:bottom, left:right]


def blend(tiling, strips, upscaled, scale, channels=3, max_rows=10**6, summed=False):
    """What an engine does with upscaled blocks."""
    canvas, rows = Canvas(tiling, scale, channels, max_rows, torch.device('cpu'), summed), []
    for number, blocks in enumerate(strips):
        for _, block in blocks:
            canvas.add(block, upscaled(block))
        rows.append(canvas.finished().clone())
        if number + 1 < len(strips):
            canvas.advance()
    return torch.cat(rows).permute(2, 0, 1)


@pytest.mark.parametrize('size,tile,scale', list(itertools.product(SIZES, TILES, (1, 3))))
@pytest.mark.parametrize('max_rows,max_tiles', [(1000, 1), (1, 2), (3, 4)])
def test_an_identity_network_returns_the_input_exactly(size, tile, scale, max_rows, max_tiles):
    image = torch.rand(3, *size)
    tiling = Tiling(*size, *tile)
    strips = tiling.merge(torch.randint(2, (len(tiling), )), max_tiles, max_rows, high=1 if max_rows % 2 else 2)

    def nearest(block):
        return cut(image, tiling, block).repeat_interleave(scale, 1).repeat_interleave(scale, 2)

    expected = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    assert torch.equal(blend(tiling, strips, nearest, scale, max_rows=max_rows), expected)


@pytest.mark.parametrize('length', range(1, 90))
@pytest.mark.parametrize('patch_size,step', [(32, 32), (32, 28), (20, 1), (8, 5)])
def test_tiles_cover_every_pixel_and_hardly_more(length, patch_size, step):
    size, count, distance = fit(length, patch_size, step)
    assert distance == size - (patch_size - step)
    overlap = patch_size - step
    end = (count - 1) * (size - overlap) + size
    assert size <= patch_size and (count == 1 or size > overlap)
    assert length <= end and (end < length + count or size == min(patch_size, 16))
    # no more tiles than the regular grid with its last tile shifted inside
    assert count == 1 + max(0, -(-(length - patch_size) // step))


@pytest.mark.parametrize('length', range(1, 100, 7))
@pytest.mark.parametrize('multiple', [2, 8, 16])
def test_sides_of_tiles_and_blocks_are_multiples_where_a_network_wants_that(length, multiple):
    tiling = Tiling(length, 2 * length, 20, 14, multiple)
    for _, block in tiling.merge(torch.zeros(len(tiling), dtype=torch.int64), 4, 4)[0]:
        top, bottom, left, right = tiling.box(block)
        assert (bottom - top) % multiple == (right - left) % multiple == 0
    assert tiling.padded[0] >= length and tiling.padded[1] >= 2 * length


def test_blend_is_the_weighted_average():
    tiling, scale = Tiling(40, 33, 20, 12), 2
    assert len(tiling) == 9 and tiling.size == (19, 17)
    blocks = [Block(0, 0, 2, 2), Block(0, 2, 1, 1), Block(1, 2, 2, 1), Block(2, 0, 1, 1), Block(2, 1, 1, 1)]
    outputs = {}
    total, weights = np.zeros((3, 82, 70)), np.zeros((82, 70))
    for block in blocks:
        top, bottom, left, right = (scale * value for value in tiling.box(block))
        outputs[block] = torch.rand(3, bottom - top, right - left)
        for row, column in itertools.product(range(block.rows), range(block.columns)):
            y0 = scale * tiling.tops[block.row + row]
            x0 = scale * tiling.lefts[block.column + column]
            for y, x in itertools.product(range(38), range(34)):  # the sum of its tiles' weights
                weight = min(y + 1, 38 - y) * min(x + 1, 34 - x)
                total[:, y0 + y, x0 + x] += weight * outputs[block][:, y0 + y - top, x0 + x - left].numpy()
                weights[y0 + y, x0 + x] += weight
    ours = blend(tiling, [[(0, block) for block in blocks]], outputs.get, scale)
    np.testing.assert_allclose(ours.numpy(), (total / weights.clip(1))[:, :80, :66], atol=1e-6)


@pytest.mark.parametrize('max_tiles', [1, 2, 3, 4, 16, 64])
@pytest.mark.parametrize('max_rows, high', [(1, 1), (5, 1), (2, 2), (4, 2), (8, 4), (8, 8), (100, 1), (100, 2)])
def test_merging_keeps_every_tile_once_and_classes_apart(max_tiles, max_rows, high):
    tiling = Tiling(200, 170, 16, 14)
    grid = (torch.rand(len(tiling)) < 0.2).long()
    strips = tiling.merge(grid, max_tiles, max_rows, high)
    seen = torch.zeros(len(tiling.tops), len(tiling.lefts), dtype=torch.int64)
    for number, blocks in enumerate(strips):
        for kind, (row, column, rows, columns) in blocks:
            assert rows * columns <= max_tiles and rows <= high and (rows, columns) in shapes(max_tiles, high)
            assert number == row // max_rows == (row + rows - 1) // max_rows
            assert (grid.view_as(seen)[row:row + rows, column:column + columns] == kind).all()
            seen[row:row + rows, column:column + columns] += 1
    assert (seen == 1).all()
    together = tiling.merge(grid, max_tiles, 10**6, high)[0]
    assert sorted(together) == sorted(item for blocks in strips for item in blocks)  # strips change nothing


def test_merging_uniform_tiles_saves_overlap():
    tiling = Tiling(124, 124, 64, 60)
    strips = tiling.merge(torch.zeros(4, dtype=torch.int64), 4, 4)
    assert strips == [[(0, Block(0, 0, 2, 2))]] and tiling.box(strips[0][0][1]) == (0, 124, 0, 124)


def test_blocks_halve_down_to_single_tiles():
    pending, tiles = [Block(1, 2, 4, 2)], []
    while pending:
        block = pending.pop()
        halves = block.halves()
        pending += [half for part in halves for half in part]
        tiles += [] if halves else [block]
    assert sorted(tiles) == [Block(row, column, 1, 1) for row in range(1, 5) for column in (2, 3)]


@pytest.mark.parametrize('size', [(1, 1), (30, 77), (64, 50)])
@pytest.mark.parametrize('cell', [1, 8])
def test_means_of_tiles_are_those_of_the_pixels_that_they_own(size, cell):
    tiling = Tiling(*size, 20, 16)
    values = torch.rand(2, *(-(-length // cell) for length in size))
    pixels = values.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :size[0], :size[1]]
    owner = tiling.class_map(torch.arange(len(tiling)))
    expected = torch.stack([pixels[:, owner == tile].mean(dim=1) for tile in range(len(tiling))])
    # a middle may lie within a pixel, of which each tile then has half
    torch.testing.assert_close(tiling.means(values, cell).float(), expected, atol=0.06 if size[0] > 1 else 1e-6, rtol=0)
    torch.testing.assert_close(tiling.means(torch.ones_like(values), cell).float(), torch.ones(len(tiling), 2))


def test_class_map_names_the_tile_with_the_nearest_centre():
    tiling = Tiling(41, 50, 18, 12)
    class_map = tiling.class_map(torch.arange(len(tiling)))
    assert class_map.shape == (41, 50) and len(class_map.unique()) == len(tiling)
    centres = [[start + size / 2 for start in starts] for starts, size in zip((tiling.tops, tiling.lefts), tiling.size)]
    for y, x in itertools.product(range(41), range(50)):
        ours = divmod(int(class_map[y, x]), len(tiling.lefts))
        for chosen, along, position in zip(ours, centres, (y, x)):
            distances = [abs(centre - position - 0.5) for centre in along]
            assert distances[chosen] == min(distances)


@pytest.mark.parametrize('size,tile', list(itertools.product(SIZES, TILES)))
@pytest.mark.parametrize('max_rows,max_tiles', [(1000, 1), (1, 2), (3, 4)])
def test_the_sum_for_a_gpu_equals_the_running_mean(size, tile, max_rows, max_tiles):
    tiling = Tiling(*size, *tile)
    strips = tiling.merge(torch.randint(2, (len(tiling), )), max_tiles, max_rows, high=1 if max_rows % 2 else 2)
    blocks = {}

    def any_image(block):
        top, bottom, left, right = tiling.box(block)
        return blocks.setdefault(block, torch.rand(3, 2 * (bottom - top), 2 * (right - left)))

    mean, total = (blend(tiling, strips, any_image, 2, max_rows=max_rows, summed=summed) for summed in (False, True))
    torch.testing.assert_close(total, mean, atol=1e-5, rtol=0)


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
        tiling = Tiling(*image.shape[1:], int(row['patch_size']), int(row['step']))
        strips = tiling.merge(torch.zeros(len(tiling), dtype=torch.int64), 4, 2)

        def nearest(block):
            return F.interpolate(cut(image, tiling, block)[None], scale_factor=4, mode='nearest')[0]

        blended = blend(tiling, strips, nearest, 4, max_rows=2)
        height, width = (4 * int(length) for length in row['covered'])
        torch.testing.assert_close(
            blended[:, :height, :width], row['stitched_nearest_x4'].permute(2, 0, 1), atol=1e-6, rtol=0)
        assert blended.shape[1:] == (4 * image.shape[1], 4 * image.shape[2])


@pytest.mark.parametrize('arguments,message', [
    ((0, 5, 8, 8), 'at least 1x1 pixels, but got 0x5'),
    ((5, 5, 8, 9), 'step from 1 to patch_size 8, but got 9'),
    ((5, 5, 8, 0), 'step from 1 to patch_size 8, but got 0'),
])
def test_wrong_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tiling(*arguments)


def test_a_block_of_a_wrong_size_is_named():
    tiling = Tiling(30, 30, 20, 16)
    with pytest.raises(ValueError, match=r'Expected a block of 34x34 pixels, but got \(16, 16\)'):
        Canvas(tiling, 2, 3, 2, torch.device('cpu')).add(Block(0, 0, 1, 1), torch.rand(3, 16, 16))
