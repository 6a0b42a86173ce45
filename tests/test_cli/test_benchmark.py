import copy
import csv
import cv2
import json
import math
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from basicsr.archs import build_network
from cdnsr_basicsr import benchmark, calibration, cli
from cdnsr_basicsr.archs import Interpolation
from cdnsr_basicsr.benchmark import Measured, Row, Settings, write_report
from cdnsr_basicsr.benchmark.report import cells, draw, frontier, labels
from cdnsr_basicsr.benchmark.rows import Network, rows_of
from cdnsr_basicsr.benchmark.runners import Bench, one_tile_at_a_time
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.cli.arguments import settings_of
from cdnsr_basicsr.complexity import count_macs
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.evaluation import PairStore, pooled_psnr, quality, read_pairs, to_image, to_tensor
from cdnsr_basicsr.inference import TileUpscaler
from cdnsr_basicsr.inference.tiling import TensorRows
from cdnsr_basicsr.loading import upscaler_for
from cdnsr_basicsr.options import OptionError
from tests.helpers import carn, documented, fsrcnn, photograph, spread, strict_json, swinir


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / 'hr'
    folder.mkdir()
    for i in range(2):
        cv2.imwrite(str(folder / f'{i}.png'), photograph(101 + 20 * i, 130, i))
    return str(folder)


@pytest.fixture
def model(tmp_path, tiny_net):
    block = tiny_net(4, [fsrcnn(4), carn(8), carn(16)])
    path = tmp_path / 'net.pth'
    save_checkpoint(dict(params=spread(build_network(block)).state_dict(), network_g=block, scale=4), str(path))
    return str(path)


@pytest.mark.slow
def test_benchmark_measures_every_row_and_writes_table_and_plot(model, photographs, tmp_path, capsys):
    arguments = ['-m', model, '--data', photographs, '--repeat', '1', '--patch-size', '16', '--step', '14']
    arguments += ['--budgets', '0.01', '9', '--precision', 'float32', 'bfloat16', '-o', str(tmp_path / 'out')]
    assert cli.main(['benchmark', *arguments]) == 0
    text = capsys.readouterr().out
    assert '2 photographs of 128 to 128 pixels, x4' in text and 'torch' in text
    assert (tmp_path / 'out/benchmark.md').read_text() == text
    assert cv2.imread(str(tmp_path / 'out/benchmark.png')).shape[1] > 800
    with open(tmp_path / 'out/benchmark.csv') as file:
        rows = {(row['method'], row['precision']): row for row in csv.DictReader(file)}
    names = ['whole image (BasicSR)', 'whole image, tuned', 'tiled', 'routed', 'routed, budget 0.01']
    loops = ['one tile at a time', 'one tile at a time, 32/28']
    for name in names + loops + ['routed, budget 9']:
        row = rows[name, 'float32']
        assert float(row['ms/megapixel']) > 0 and float(row['peak MiB']) > 50
        assert name in (names[0], *loops) or (name, 'bfloat16') in rows

    # the figures are those of the networks
    net = load_network(model)
    hard, easy = net.branches[2], net.branches[0]
    psnrs = []
    for pair in read_pairs(photographs, 4):
        with torch.no_grad():
            psnrs.append(quality(to_image(hard(to_tensor(pair.lq))), pair.gt, 4)[0])
    whole, tuned = rows['whole image (BasicSR)', 'float32'], rows['whole image, tuned', 'float32']
    assert float(whole['PSNR']) == pytest.approx(np.mean(psnrs), abs=1e-3) == float(tuned['PSNR'])
    assert float(whole['kMACs/pixel']) == pytest.approx(count_macs(hard, 16, 16) / 256 / 16 / 1000, abs=0.01)
    assert float(whole['MFLOPs/patch (papers)']) == pytest.approx(2 * count_macs(hard, 32, 32) / 1e6, abs=0.5)
    all_easy, all_hard = rows['routed, budget 0.01', 'float32'], rows['routed, budget 9', 'float32']
    mflops = 2 * count_macs(easy, 32, 32, papers=True) / 1e6
    assert float(all_easy['MFLOPs/patch (papers)']) == pytest.approx(mflops, abs=0.5)
    assert (all_easy['classes %'], all_hard['classes %']) == ('100 / 0 / 0', '0 / 0 / 100')
    assert all_hard['PSNR'] == rows['tiled', 'float32']['PSNR']
    assert whole['times BasicSR'] == '1.00' and whole['network'] == 'CARN_M' and all_hard['network'] == 'CDNSR'


@pytest.mark.slow
def test_branches_alone_and_the_oracle_bound_the_router(model, photographs, capsys):
    arguments = ['-m', model, '--data', photographs, '--repeat', '1', '--patch-size', '16', '--step', '16']
    budgets = ['--budgets', '0.01', '0.4', '0.7', '9', '--cost', 'macs']
    assert cli.main(['benchmark', *arguments, *budgets, '--oracle', '--branches']) == 0
    table = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    rows = {row[2]: dict(zip(table[0], row)) for row in table[1:]}
    psnr = {name: float(row['PSNR']) for name, row in rows.items() if name != '---'}
    net = load_network(model)
    pairs = list(read_pairs(photographs, 4))
    for i, branch in enumerate([*net.branches, Interpolation()]):
        names = [f'branch {i + 1}, {kind}' for kind in ('whole image (BasicSR)', 'whole image, tuned')]
        with torch.no_grad():
            expected = np.mean([quality(to_image(branch(to_tensor(pair.lq))), pair.gt, 4)[0] for pair in pairs])
        for name in names if i < 3 else ['bicubic']:
            assert psnr[name] == pytest.approx(expected, abs=1e-3)
    assert rows['branch 1, tiled']['network'] == 'FSRCNN' and rows['bicubic']['kMACs/pixel'] == '0.00'
    assert float(rows['branch 1, whole image, tuned']['kMACs/pixel']) == pytest.approx(
        count_macs(net.branches[0], 16, 16) / 256 / 16 / 1000, abs=0.01)
    # with nothing to choose it is the router's, else at least as good at the same cost
    for budget in ('0.01', '9'):
        assert psnr[f'oracle, budget {budget}'] == psnr[f'routed, budget {budget}']
    for budget in ('0.4', '0.7'):
        oracle, routed = rows[f'oracle, budget {budget}'], rows[f'routed, budget {budget}']
        assert float(oracle['PSNR']) > float(routed['PSNR']) - 0.002
        whole = float(rows['whole image (BasicSR)']['kMACs/pixel'])
        assert float(oracle['kMACs/pixel']) <= float(budget) * whole + 0.01


@pytest.mark.slow
@pytest.mark.parametrize('step', [16, 12])
def test_the_oracle_of_an_error_map_settles_true_errors(photographs, tmp_path, tiny_net, step):
    block = {**tiny_net(4, [fsrcnn(4), carn(8)]), 'classifier': {'type': 'ErrorMap', 'num_feat': 8, 'price': 50.}}
    net, model = build_network(copy.deepcopy(block)).eval(), str(tmp_path / 'net.pth')
    for branch, level in zip(net.branches, (0.3, 0.2)):  # gray images: one is better in the dark, one in the bright
        *_, last = branch.modules()
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, level)
    brighter = photograph(200, 256) * np.linspace(0, 1, 256)[:, None] / 2 + np.linspace(0, 127, 256)[:, None]
    cv2.imwrite(f'{photographs}/0.png', brighter.astype(np.uint8))
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=4), model)
    (tmp_path / 'pairs').mkdir()
    pairs = PairStore(str(tmp_path / 'pairs'), photographs, 4)
    bench, lq = Bench(Settings([model], 'hr', patch_size=16, step=step), pairs, model), to_tensor(pairs.lq(0))
    upscaler = TileUpscaler(net, 16, step)
    tiling = upscaler.tiling_of(*lq.shape[2:])

    # the slow way: errors of one pixel after another, each counted for the tile whose centre is nearest
    owner = tiling.class_map(torch.arange(len(tiling))).repeat_interleave(4, 0).repeat_interleave(4, 1)
    errors = torch.zeros(len(tiling), 2, dtype=torch.float64)
    for i, branch in enumerate(net.branches):
        image = TileUpscaler(branch, 16, step).upscale(lq).image.clamp(0, 1)
        square = 255**2 * (image - to_tensor(pairs.gt(0))).double().square().mean(dim=1)[0]
        for tile in range(len(tiling)):
            errors[tile, i] = square[owner == tile].mean()
    torch.testing.assert_close(bench.true_errors(0), errors, rtol=1e-4, atol=1e-4)

    # no tile would be cheaper in the other class, if each side where classes differ costs the strips beside it
    grid = upscaler.plan(TensorRows(lq), errors=errors).classes.view(len(tiling.tops), len(tiling.lefts))
    assert bench.runner(Row(model, 'oracle', True))(lq).counts == torch.bincount(grid.flatten(), minlength=2).tolist()
    costs, border = 50 * upscaler.costs, (1 - step / 16) / 2

    def total(row, column, kind):
        cost = errors.view(*grid.shape, 2)[row, column, kind] + costs[kind]
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= y < grid.shape[0] and 0 <= x < grid.shape[1] and grid[y, x] != kind:
                cost += border * (costs[kind] + costs[grid[y, x]])
        return cost

    assert set(grid.flatten().tolist()) == {0, 1}
    for row, column in np.ndindex(*grid.shape):
        kind = grid[row, column]
        assert total(row, column, kind) <= total(row, column, 1 - kind)


@pytest.mark.slow
def test_budgets_of_a_benchmark_can_count_time(model, photographs, capsys):
    arguments = ['-m', model, '--data', photographs, '--repeat', '1', '--patch-size', '16', '--step', '16']
    assert cli.main(['benchmark', *arguments, '--no-ssim', '--budgets', '1e-9', '--cost', 'latency']) == 0
    text = capsys.readouterr().out
    assert ', budgets of time;' in text
    row = [line for line in text.splitlines() if 'budget 1e-09' in line][0].strip('| ').split(' | ')
    assert row[6] == '-' and row[-1] == '100 / 0 / 0'  # no SSIM


@pytest.mark.slow
def test_single_networks_are_measured_on_the_whole_image_beside_routed_ones(model, photographs, tmp_path, capsys):
    block, single = carn(8), str(tmp_path / 'single.pth')
    save_checkpoint(dict(params=build_network(carn(8)).state_dict(), network_g=block, scale=4), single)
    arguments = ['-m', model, '--data', photographs, '--repeat', '1', '--no-ssim', '--patch-size', '16']
    arguments += ['--precision', 'float32', 'bfloat16', '-o', str(tmp_path / 'out')]
    assert cli.main(['benchmark', *arguments, '--singles', single, single]) == 0
    with open(tmp_path / 'out/benchmark.csv') as file:
        rows = list(csv.DictReader(file))
    rows_of_single = [row for row in rows if row['model'] == 'single']
    assert [(row['method'], row['precision']) for row in rows_of_single] == [('whole image (BasicSR)', 'float32'),
                                                                             ('whole image, tuned', 'float32'),
                                                                             ('whole image, tuned', 'bfloat16')]
    assert {row['method'] for row in rows if row['model'] == 'net'} > {'tiled', 'routed', 'whole image (BasicSR)'}

    # pooled, the slow way: all pixels that are measured in one row
    net, squares, psnrs = load_network(single), [], []
    for pair in read_pairs(photographs, 4):
        with torch.no_grad():
            image = to_image(net(to_tensor(pair.lq)))
        squares.append((image.astype(float) - pair.gt)[4:-4, 4:-4].ravel()**2)
        psnrs.append(10 * np.log10(255**2 / squares[-1].mean()))
    assert float(rows_of_single[0]['pooled']) == pytest.approx(
        10 * np.log10(255**2 / np.concatenate(squares).mean()), abs=6e-4)
    assert float(rows_of_single[0]['PSNR']) == pytest.approx(np.mean(psnrs), abs=6e-4)
    assert cli.main(['benchmark', '-m', single, '--data', photographs, '--singles', model]) == 2
    assert f'--singles: {model} is routed; expected networks without branches' in capsys.readouterr().err


def test_pooled_psnr_is_that_of_all_pixels_together():
    generator, sizes = np.random.default_rng(0), [(40, 60), (30, 31), (12, 50)]  # of the last no border is left out
    images = [[generator.integers(0, high, (*size, 3), dtype=np.uint8) for high in (256, 9 + 99 * i)]
              for i, size in enumerate(sizes)]
    psnrs = [quality(image, gt, 4, with_ssim=False)[0] for image, gt in images]
    squares = [(image.astype(float) - gt)**2 for image, gt in images]
    squares = [part[4:-4, 4:-4].ravel() for part in squares[:2]] + [squares[2].ravel()]
    expected = 10 * np.log10(255**2 / np.concatenate(squares).mean())
    assert pooled_psnr(psnrs, sizes, 4) == pytest.approx(expected) != pytest.approx(np.mean(psnrs), abs=0.1)
    assert pooled_psnr([math.inf, math.inf], sizes[:2], 4) == math.inf
    assert pooled_psnr([math.inf, 30.], [(50, 50)] * 2, 4) == pytest.approx(30 + 10 * np.log10(2))
    assert math.isnan(pooled_psnr([math.nan, 30.], sizes[:2], 4))


def test_a_frontier_is_without_what_is_worse_than_something_cheaper():
    points = [(9., 31.), (2., 30.), (3., 29.), (5., 32.), (2., 28.), (4., 30.), (12., 33.)]
    assert frontier(points) == [(2., 30.), (5., 32.), (12., 33.)]
    assert frontier([]) == []


def test_the_plot_sets_routed_networks_against_the_frontier_of_single_ones():

    def measured(model, kind, pooled, ms, shares, **kwargs):
        row = Row(model, kind, **{'tuned': True, **kwargs})
        return Measured(row, 'Net', pooled - 1, pooled, math.nan, ms / 10, math.nan, ms, math.nan, math.nan, shares)

    rows = [
        measured('routed.pth', 'whole', 32, 90, [0, 100], tuned=False),
        measured('routed.pth', 'whole', 32, 40, [0, 100]),
        measured('routed.pth', 'tiled', 32, 35, [0, 100]),  # faster, but not on the whole image
        measured('routed.pth', 'bicubic', 28, 5, [0, 0]),
        measured('routed.pth', 'whole', 30, 10, [100, 0], branch=0),
        measured('routed.pth', 'routed', 31.9, 30, [20, 80]),
        measured('routed.pth', 'routed', 31, 15, [60, 40], budget=0.5),
        measured('routed.pth', 'oracle', 31.5, 15, [60, 40], budget=0.5),
        measured('pixels.pth', 'whole', 35, 8, [60, 40]),  # routes: no single network
        measured('good.pth', 'whole', 31, 8, [100]),
        measured('slow.pth', 'whole', 30.5, 20, [100]),  # worse than good.pth
        measured('large.pth', 'whole', math.nan, math.nan, [0]),
    ]
    for key, factor in (('ms', 1), ('kmacs', 10)):
        axes = Figure().subplots()
        draw(axes, rows, key)
        lines = {line.get_label(): line for line in axes.get_lines()}
        points = {name: [(x * factor, y) for x, y in line.get_xydata()] for name, line in lines.items()}
        assert points['frontier of single networks, tuned'] == [(5, 28), (8, 31), (40, 32)]
        assert points['routed, routed'] == [(15, 31), (30, 31.9)] and points['routed, oracle'] == [(15, 31.5)]
        assert (lines['routed, routed'].get_linestyle(), lines['routed, oracle'].get_linestyle()) == ('-', '--')
        assert {text.get_text().strip()
                for text in axes.texts} == {'bicubic', 'routed, branch 1', 'routed, branch 2', 'good', 'slow'}
        assert ('whole image (BasicSR)' in lines) == (key == 'ms')


def test_networks_without_branches_are_whole_and_tiled():
    settings = Settings(['a.pth'], 'hr', budgets=[0.5], precisions=['float32', 'bfloat16'])
    rows = rows_of(settings, 'a.pth', Network(scale=4, channels=3))
    assert [(row.kind, row.tuned, row.precision) for row in rows] == [('whole', False, 'float32'),
                                                                      ('whole', True, 'float32'),
                                                                      ('whole', True, 'bfloat16'),
                                                                      ('tiled', True, 'float32'),
                                                                      ('tiled', True, 'bfloat16')]


def test_the_oracle_is_there_without_a_budget_where_a_classifier_maps_errors():
    settings = Settings(['a.pth'], 'hr', budgets=[0.5], oracle=True)
    for maps_errors in (False, True):
        rows = rows_of(settings, 'a.pth', Network(4, 3, num_branches=3, maps_errors=maps_errors))
        assert [row.budget for row in rows if row.kind == 'oracle'] == [None, 0.5][1 - maps_errors:]


@pytest.mark.slow
def test_a_small_picture_costs_what_is_computed(model, photographs, tmp_path):
    bench = Bench(Settings([model], 'hr', patch_size=64, step=60), None, model)
    output, macs, counts = bench.runner(Row(model, 'loop', False, 'float32'))(torch.rand(1, 3, 20, 32))
    branch, classifier = bench.net.branches[counts.index(1)], bench.net.classifier
    assert sum(counts) == 1
    exact = sum(count_macs(part, 64, 64, 3) for part in (branch, classifier)) / 64**2 / 16 / 1000
    assert macs == pytest.approx(exact)


@torch.no_grad()
@pytest.mark.parametrize('size', [(40, 61), (16, 16), (9, 30), (2, 30), (1, 1)])
def test_one_tile_at_a_time_is_the_mean_of_tiles(tiny_net, size):
    net = spread(build_network(tiny_net()).eval())
    for branch in net.branches:  # a network that sees single pixels gives the same, however it is cut
        branch.forward = lambda x: x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    lq = torch.rand(1, 3, *size)
    expected = lq.repeat_interleave(4, 2).repeat_interleave(4, 3)
    output, classes = one_tile_at_a_time(net, lq, 16, 14)
    torch.testing.assert_close(output, expected)
    assert len(classes) == math.prod(1 + max(0, -(-(length - 16) // 14)) for length in size)


@pytest.mark.slow
@torch.no_grad()
def test_windows_that_do_not_divide_tiles_run_in_every_row(tmp_path, tiny_net, photographs):
    block = tiny_net(4, [fsrcnn(4), swinir(7)])
    model = str(tmp_path / 'net.pth')
    save_checkpoint(dict(params=build_network(block).state_dict(), network_g=block, scale=4), model)
    settings = Settings([model], 'hr', budgets=[9.])
    bench = Bench(settings, None, model)
    hard, lq = bench.net.branches[1], torch.rand(1, 3, 28, 42)
    bench.net.classifier.fc.bias.data = torch.tensor([0., 99.])
    macs = count_macs(hard, 28, 42) / (16 * 28 * 42) / 1000
    for row in rows_of(settings, model, Network(scale=4, channels=3, num_branches=2)):
        output, spent, counts = bench.runner(row)(lq)
        assert output.shape == (1, 3, 112, 168) and (counts[0], counts[1] > 0) == (0, True)
        if row.kind == 'whole':
            torch.testing.assert_close(output, hard(lq), atol=1e-5, rtol=0)
            assert spent == pytest.approx(macs)
    assert bench.describe()['mflops'][1] == pytest.approx(2 * count_macs(hard, 35, 35) * (32 / 35)**2 / 1e6)


@pytest.mark.slow
def test_what_did_not_fit_into_memory_is_a_dash(tmp_path):
    nan = math.nan
    row = Measured(Row('a.pth', 'whole', True), 'CARN_M', *[nan] * 8, [0, 0, 100])
    assert cells(row, 'a')[4:] == ['-'] * 8 + ['']
    assert labels(['x/net.pth', 'y/net.pth', 'z.pth']) == {
        'x/net.pth': 'x/net.pth',
        'y/net.pth': 'y/net.pth',
        'z.pth': 'z'
    }
    write_report([row], 'text', str(tmp_path))
    assert (tmp_path / 'benchmark.png').stat().st_size > 0


@pytest.mark.slow
def test_pairs_are_read_from_photographs_or_from_prepared_folders(photographs, prepared, tmp_path):
    pairs = list(read_pairs(photographs, 4))
    assert [pair.gt.shape for pair in pairs] == [(100, 128, 3), (120, 128, 3)]
    assert [pair.lq.shape for pair in pairs] == [(25, 32, 3), (30, 32, 3)]
    assert np.array_equal(pairs[0].gt[..., ::-1], cv2.imread(f'{photographs}/0.png')[:100, :128])
    ready = list(read_pairs(str(prepared / 'datasets/val'), 4, limit=2))
    assert len(ready) == 2 and np.array_equal(ready[1].lq[..., ::-1],
                                              cv2.imread(str(prepared / f'datasets/val/lq/{ready[1].name}.png')))
    store = PairStore(str(tmp_path), photographs, 4)
    assert np.array_equal(store.lq(1), pairs[1].lq) and np.array_equal(store.gt(0), pairs[0].gt)
    assert store.megapixels == (100 * 128 + 120 * 128) / 1e6
    with pytest.raises(OptionError, match='is not x3 of its LQ image'):
        list(read_pairs(str(prepared / 'datasets/val'), 3))


@pytest.mark.slow
def test_calibration_is_kept_beside_the_model_and_used(model, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, 'MOST_LOSS', -1.)  # so that every branch loses too much in half precision
    arguments = ['-m', model, '-i', photographs, '--precision', 'bfloat16', '--budgets', '0.01', '0.7', '9']
    assert cli.main(['calibrate', *arguments, '--patch-size', '16', '--step', '14']) == 0
    assert 'branch 2 (float32)' in capsys.readouterr().out
    table = json.loads((tmp_path / 'net.calibration.json').read_text())
    assert table['float32_branches'] == [0, 1, 2] and table['photographs'] == 2
    assert [point['budget'] for point in table['points']] == [None, 0.01, 0.7, 9]
    easy, middle, hard = table['points'][1:]
    assert easy['cost'] < middle['cost'] <= 0.7 < 1 < hard['cost']
    assert easy['psnr'] == pytest.approx(table['branch_psnr'][0], abs=0.02)
    assert hard['psnr'] == pytest.approx(table['branch_psnr'][2], abs=1e-6)
    assert len(table['tile_ms']) == 4 and min(table['tile_ms']) > 0

    upscale = ['upscale', '-m', model, '-i', f'{photographs}/0.png', '--patch-size', '16', '--step', '14']
    assert cli.main([*upscale, '-o', str(tmp_path / 'float'), '--budget', '99']) == 0
    assert cli.main([*upscale, '-o', str(tmp_path / 'half'), '--budget', '99', '--precision', 'bfloat16']) == 0
    results = [cv2.imread(str(tmp_path / kind / '0.png')) for kind in ('float', 'half')]
    assert np.array_equal(*results)  # all branches have kept float32

    # a benchmark lets the same branches keep float32 where it routes
    (tmp_path / 'pairs').mkdir()
    pairs = PairStore(str(tmp_path / 'pairs'), photographs, 4)
    bench, lq = Bench(Settings([model], 'hr', patch_size=16, step=14), pairs, model), to_tensor(pairs.lq(0))
    for kind in ('routed', 'tiled'):
        images = [bench.runner(Row(model, kind, True, precision))(lq)[0] for precision in ('float32', 'bfloat16')]
        assert torch.equal(*images) == (kind == 'routed')

    args = cli.build_parser().parse_args([*upscale, '-o', 'out', '--precision', 'bfloat16'])
    assert upscaler_for(settings_of(args)).measured.tile_ms == table['tile_ms']
    (tmp_path / 'net.calibration.json').write_text(json.dumps(dict(table, machine='another')))
    assert upscaler_for(settings_of(args)).measured is None
    (tmp_path / 'net.calibration.json').write_text(json.dumps(dict(table, network=['another'])))
    assert upscaler_for(settings_of(args)).dtypes == [torch.bfloat16] * 3
    (tmp_path / 'net.calibration.json').write_text(json.dumps(table))
    assert upscaler_for(settings_of(args)).dtypes == [torch.float32] * 3
    content = torch.load(model)
    content['params']['branches.0.deconv.bias'] += 1  # a network that was trained anew
    torch.save(content, model)
    assert upscaler_for(settings_of(args)).dtypes == [torch.bfloat16] * 3
    (tmp_path / 'net.calibration.json').write_text('{"machine": 3')
    assert cli.main([*upscale, '-o', str(tmp_path / 'third')]) == 2
    assert 'net.calibration.json: is not a calibration' in capsys.readouterr().err


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(model, photographs, tmp_path, monkeypatch,
                                                                            capsys):

    def nothing(*args, **kwargs):
        raise AssertionError('measured')

    monkeypatch.setattr(benchmark, 'benchmark', nothing)
    monkeypatch.setattr(calibration, 'PairStore', nothing)
    (tmp_path / 'file').write_text('')
    for place in (tmp_path / 'file', tmp_path / 'file/below',
                  '/proc/self'):  # no file can be made there, by root either
        assert cli.main(['benchmark', '-m', model, '--data', photographs, '-o', str(place)]) == 2
        error = capsys.readouterr().err
        assert f'{place}: cannot be written: ' in error and error.count('\n') == 1
    monkeypatch.setattr(calibration, 'calibration_path', lambda model: tmp_path / 'file/net.calibration.json')
    assert cli.main(['calibrate', '-m', model, '-i', photographs]) == 2
    assert f'{tmp_path}/file: cannot be written: ' in capsys.readouterr().err


def overflowing(first):
    """Block and weights of a network whose features are `first` at the beginning, 40000 times that in the end."""
    block = dict(type='MSRResNet', num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, upscale=4)
    weights = build_network(dict(block)).state_dict()
    weights['conv_first.weight'] *= 0
    weights['conv_first.bias'].fill_(first)
    weights.update({key: 200 * value for key, value in weights.items() if key.startswith('upconv')})
    return block, weights


@pytest.mark.slow
def test_rows_and_branches_that_are_not_finite_are_named(photographs, tmp_path, tiny_net, capsys):
    block, weights = overflowing(300)
    routed = tiny_net(4, [fsrcnn(4), block])
    params = spread(build_network(copy.deepcopy(routed))).state_dict()
    params.update({f'branches.1.{key}': value for key, value in weights.items()})
    path = str(tmp_path / 'net.pth')
    save_checkpoint(dict(params=params, network_g=routed, scale=4), path)
    arguments = ['-m', path, '--precision', 'float16', '--limit', '1', '--budgets', '9']
    assert cli.main(['calibrate', *arguments, '-i', photographs]) == 0
    table = json.loads((tmp_path / 'net.calibration.json').read_text())
    assert table['float32_branches'] == [1] and all(math.isfinite(point['psnr']) for point in table['points'])
    (tmp_path / 'net.calibration.json').unlink()
    assert cli.main(['benchmark', *arguments, '--data', photographs, '--repeat', '1', '--no-ssim']) == 0
    text = capsys.readouterr().out
    rows = {line.split(' | ')[2]: line.split(' | ')[4] for line in text.splitlines() if ' | float16 | ' in line}
    assert rows['tiled'] == rows['routed, budget 9'] == '-'
    assert f'No PSNR, because values are not finite: {path}, tiled, float16\n' in text
    assert f'{path}, whole image (BasicSR)' not in text

    block, weights = overflowing(1e37)
    params.update({f'branches.1.{key}': value for key, value in weights.items()})
    save_checkpoint(dict(params=params, network_g=routed, scale=4), path)
    assert cli.main(['calibrate', *arguments, '-i', photographs]) == 2
    assert f'{path}: branch 1 computes values that are not finite' in capsys.readouterr().err


def numbers(row):
    """Cells of the table from a row of --json."""
    keys = dict(psnr=3, pooled=3, ssim=4, kmacs_per_pixel=2, mflops_per_patch=0, ms_per_megapixel=1, times_basicsr=2)
    keys['peak_mib'] = 0
    cells_of_row = ['-' if row[key] is None else f'{row[key]:.{digits}f}' for key, digits in keys.items()]
    return [*cells_of_row, ' / '.join(f'{share:.0f}' for share in row['shares'])]


def test_json_of_a_benchmark_says_what_the_table_says(monkeypatch, capfd):
    nan = math.nan
    rows = [
        Measured(Row('a.pth', 'whole', True), 'CARN_M', *[nan] * 8, [0, 0, 100]),
        Measured(Row('a.pth', 'routed', True, 'bfloat16', 0.5), 'CDNSR',
                 *np.arange(1, 9) / 7, [25., 75., 0.])
    ]
    monkeypatch.setattr(benchmark, 'benchmark', lambda settings: (rows, 'a line', [('hr/1.png', 'is broken')]))
    assert cli.main(['benchmark', '-m', 'a.pth', '--data', '.']) == 1
    plain, plain_errors = capfd.readouterr()
    assert cli.main(['benchmark', '-m', 'a.pth', '--data', '.', '--json']) == 1
    output, errors = capfd.readouterr()
    content = strict_json(output)
    assert errors == plain_errors == 'Left out: hr/1.png: is broken\n'
    assert content['measured'] == plain.splitlines()[0] == 'a line'
    assert content['left_out'] == [dict(path='hr/1.png', reason='is broken')]
    table = [line.strip('|').split('|') for line in plain.splitlines()[4:]]
    assert len(table) == len(content['rows']) == 2
    for cells_of_row, row in zip(table, content['rows']):
        assert set(row) == documented('benchmark')
        about = ['a', row['network'], row['method'], row['precision']]
        assert [cell.strip() for cell in cells_of_row] == about + numbers(row)
    assert [(row['budget'], row['backend'], row['psnr']) for row in content['rows']] == [(None, 'torch', None),
                                                                                         (0.5, 'torch', 1 / 7)]


@pytest.mark.slow
def test_json_of_a_measured_benchmark_and_calibration(model, photographs, tmp_path, capfd):
    arguments = ['-m', model, '--patch-size', '16', '--limit', '1', '--budgets', '0.5', '--json']
    more = ['--data', photographs, '--repeat', '1', '--no-ssim', '-o', str(tmp_path / 'out')]
    assert cli.main(['benchmark', *arguments, *more, '--singles', model]) == 2  # it is routed
    assert capfd.readouterr().out == ''
    assert cli.main(['benchmark', *arguments, *more]) == 0
    content = strict_json(capfd.readouterr().out)
    with open(tmp_path / 'out/benchmark.csv') as file:
        table = list(csv.reader(file))[1:]
    assert [row[4:] for row in table] == [numbers(row) for row in content['rows']] and len(table) > 4
    assert (tmp_path / 'out/benchmark.md').read_text().startswith(f'{content["measured"]}\n\n')
    assert content['rows'][0]['ssim'] is None and content['left_out'] == []

    assert cli.main(['calibrate', *arguments, '-i', photographs]) == 0
    content = strict_json(capfd.readouterr().out)
    assert set(content) == documented('calibrate')
    assert content.pop('file') == str(tmp_path / 'net.calibration.json') and content.pop('left_out') == []
    assert content == json.loads((tmp_path / 'net.calibration.json').read_text())


def test_json_of_a_calibration_says_what_the_table_says(model, monkeypatch, capfd):
    table = calibration.Calibration(
        ['a', 'b'], 'an abacus', 'bfloat16', 64, 60, 2, [4, 2, 1], [0.1, 0.25, 0.01], [30.5, math.nan], [1],
        [calibration.Point(None, 0.5, 31, 20.25),
         calibration.Point(0.3, 0.29, 30.75, math.inf)])
    monkeypatch.setattr(calibration, 'calibrate', lambda *args: args[-1].append(('hr/1.png', 'is broken')) or table)
    arguments = ['calibrate', '-m', model, '-i', 'hr']
    assert cli.main(arguments) == 1
    plain, plain_errors = capfd.readouterr()
    assert cli.main([*arguments, '--json']) == 1
    output, errors = capfd.readouterr()
    content = strict_json(output)
    assert errors == plain_errors == 'Left out: hr/1.png: is broken\n'
    assert set(content) == documented('calibrate')
    assert content['left_out'] == [dict(path='hr/1.png', reason='is broken')]
    assert plain.endswith(f'\nWrote {content["file"]}.\n')
    assert plain.startswith(f'{content["photographs"]} photographs, {content["precision"]}, tiles of at most '
                            f'{content["patch_size"]}; {content["machine"]}\n')
    assert content['branch_psnr'] == [30.5, None] and content['float32_branches'] == [1]
    assert '| branch 0 | 0.100 | 4 | 30.500 |\n| branch 1 (float32) | 0.250 | 2 | nan |\n' in plain
    assert (content['tile_ms'], content['max_tiles']) == ([0.1, 0.25, 0.01], [4, 2, 1])
    assert content['points'] == [
        dict(budget=None, cost=0.5, psnr=31, ms=20.25),
        dict(budget=0.3, cost=0.29, psnr=30.75, ms=None)
    ]
    assert '| - | 0.500 | 31.000 | 20.2 |\n| 0.3 | 0.290 | 30.750 | inf |\n' in plain


@pytest.mark.parametrize('command,message', [
    (['benchmark', '-m', 'none.pth', '--data', '.'], 'none.pth: no such checkpoint file'),
    (['benchmark', '-m', 'MODEL', '--data', 'nowhere'], 'nowhere: no such folder'),
    (['benchmark', '-m', 'MODEL', '--data', 'empty'], 'empty: contains no photographs'),
    (['benchmark', '-m', 'MODEL', '--data', '.', '--budgets', '0.5', '-1'], '--budgets -1.0: expected numbers above 0'),
    (['benchmark', '-m', 'MODEL', '--data', '.', '--oracle'], '--oracle: requires --budgets, unless a classifier is'),
    (['benchmark', '-m', 'MODEL', 'PLAIN2', '--data', 'empty'], 'all models must have the same scale, but have [2, 4]'),
    (['calibrate', '-m', 'PLAIN2', '-i', 'empty'], 'FSRCNN has no branches to choose from'),
    (['calibrate', '-m', 'MODEL', '-i', 'empty'], 'empty: contains no photographs'),
])
def test_mistakes_are_one_line(model, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    block = fsrcnn(4, 2)
    save_checkpoint(dict(params=build_network(block).state_dict(), network_g=block, scale=2), 'plain2.pth')
    command = [{'MODEL': model, 'PLAIN2': 'plain2.pth'}.get(word, word) for word in command]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
