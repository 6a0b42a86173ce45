"""PCSR through the commands, from training to upscaled files."""
import copy
import csv
import cv2
import importlib.util
import pytest
import torch
import yaml
from pathlib import Path

from basicsr.archs import build_network
from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import load_checkpoint, save_checkpoint
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.evaluation import quality, read_pairs, to_image, to_tensor
from tests.helpers import fsrcnn, pcsr, photograph, routed, run


@pytest.fixture
def model(tmp_path):
    block, path = pcsr(fsrcnn(8)), str(tmp_path / 'net.pth')
    x = torch.from_numpy(photograph(40, 50, 0)).permute(2, 0, 1).flip(0).unsqueeze(0).float() / 255
    save_checkpoint(dict(params=routed(block, x).state_dict(), network_g=block, scale=4), path)
    return path


def one_line(capsys):
    text = capsys.readouterr().err.strip()
    assert '\n' not in text
    return text


@pytest.mark.slow
def test_a_run_of_both_phases(work, write, train_opt, capsys):
    train = {key: train_opt['train'][key] for key in ('ema_decay', 'total_iter', 'optim_g', 'scheduler', 'pixel_opt')}
    data = {key: value for key, value in train_opt['datasets']['train'].items()}
    opt = dict(train_opt, model_type='PCSRModel', network_g=pcsr(fsrcnn(8)), tile=dict(patch_size=32, step=24))
    opt['datasets'] = dict(train_opt['datasets'], train=dict(data, type='PairedImageDataset'))
    first = copy.deepcopy(dict(opt, name='phase0', train=dict(train, phase=0)))
    output = run('-m', 'cdnsr_basicsr', 'train', '-opt', write(first))
    assert 'l_pix:' in output and '# heavy: 100.0 %' in output
    second = copy.deepcopy(dict(opt, name='phase1', routing=dict(k=0.5)))
    second['train'] = dict(train, phase=1, freeze=['backbone', 'heavy'], average_opt=dict(type='AverageLoss'))
    start = 'experiments/phase0/models/net_g_latest.pth'
    second['path'] = dict(pretrain_network_g=start, param_key_g='params_ema', strict_load_g=False, resume_state=None)
    output = run('-m', 'cdnsr_basicsr', 'train', '-opt', write(second))
    assert 'Routing val' in output and '# light:' in output and 'l_average:' in output
    trained = load_network('experiments/phase1/models/net_g_latest.pth').state_dict()
    before = torch.load(start, weights_only=True)['params_ema']
    # the moving average rounds
    assert all(torch.allclose(trained[key], value) for key, value in before.items())
    assert cli.main(['upscale', '-m', start, '-i', 'datasets/val/lq/0.png', '-o', 'out']) == 0
    assert cv2.imread('out/0.png').shape == (96, 112, 3)
    capsys.readouterr()
    assert cli.main(['upscale', '-m', start, '-i', 'datasets/val/lq/0.png', '-o', 'out', '--budget', '0.5']) == 2
    assert 'needs a network that routes' in one_line(capsys)


@pytest.mark.parametrize('scale,shape', [(None, (160, 200)), ('2.5', (100, 125))])
def test_upscale_with_budget_map_and_scale(model, tmp_path, capsys, scale, shape):
    cv2.imwrite(str(tmp_path / 'a.png'), photograph(40, 50, 0))
    arguments = ['upscale', '-m', model, '-i', str(tmp_path / 'a.png'), '-o', str(tmp_path / 'out'), '--map']
    arguments += ['--budget', '0.9'] + (['--scale', scale] if scale else [])
    assert cli.main(arguments) == 0
    assert cv2.imread(str(tmp_path / 'out/a.png')).shape == (*shape, 3)
    assert cv2.imread(str(tmp_path / 'out/a_map.png')) is not None
    text = capsys.readouterr().out
    assert f'x{scale or 4} to' in text and 'Pixels of class 0 to 1' in text
    assert float(text.split('cost ')[1].split()[0]) == pytest.approx(0.9, abs=0.001)


@pytest.mark.parametrize('arguments,words', [(['--scale', '0.5'], 'scale from 1 to 64, but got 0.5'),
                                             (['--scale', '1e9'], 'scale from 1 to 64, but got 1e+09'),
                                             (['--target-ms', '9'], 'budget in MACs only'),
                                             (['--scale', '-1'], 'above 0')])
def test_what_is_refused(model, tmp_path, capsys, arguments, words):
    cv2.imwrite(str(tmp_path / 'a.png'), photograph(40, 50, 0))
    assert cli.main(['upscale', '-m', model, '-i',
                     str(tmp_path / 'a.png'), '-o',
                     str(tmp_path / 'out'), *arguments]) == 2
    assert words in one_line(capsys)


def test_calibrate_and_fixed_scales_are_refused_in_one_line(model, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / 'a.png'), photograph(40, 50, 0))
    assert cli.main(['calibrate', '-m', model, '-i', str(tmp_path)]) == 2
    assert 'has no branches' in one_line(capsys)
    block, path = fsrcnn(4), str(tmp_path / 'fixed.pth')
    save_checkpoint(dict(params=build_network(block).state_dict(), network_g=block, scale=4), path)
    image, folder = str(tmp_path / 'a.png'), str(tmp_path / 'out')
    assert cli.main(['upscale', '-m', path, '-i', image, '-o', folder, '--scale', '2.5']) == 2
    assert 'FSRCNN has a fixed scale' in one_line(capsys)


@pytest.mark.slow
def test_benchmark_measures_pixels_beside_other_networks(model, tmp_path):
    (tmp_path / 'hr').mkdir()
    cv2.imwrite(str(tmp_path / 'hr/a.png'), photograph(160, 200, 0))
    block, path = fsrcnn(4), str(tmp_path / 'other.pth')
    save_checkpoint(dict(params=build_network(block).state_dict(), network_g=block, scale=4), path)
    arguments = ['-m', model, path, '--data', str(tmp_path / 'hr'), '--repeat', '1', '--budgets', '0.8']
    backends = [name for name in ('torch', 'onnxruntime') if importlib.util.find_spec(name)]  # pixels are torch's
    arguments += ['--backends', *(backends if importlib.util.find_spec('onnx') else ['torch'])]
    assert cli.main(['benchmark', *arguments, '-o', str(tmp_path / 'out')]) == 0
    with open(tmp_path / 'out/benchmark.csv') as file:
        rows = {(row['model'], row['method']): row for row in csv.DictReader(file)}
    names = ['whole image (BasicSR)', 'whole image, tuned', 'routed', 'routed, budget 0.8']
    assert [name for label, name in rows if label == 'net'] == names
    assert all(float(row['ms/megapixel']) > 0 for row in rows.values())
    net = load_network(model)
    pair = next(read_pairs(str(tmp_path / 'hr'), 4))
    with torch.no_grad():
        output, routing = net(to_tensor(pair.lq), return_routing=True)
    psnr = quality(to_image(output), pair.gt, 4, with_ssim=False)[0]
    assert float(rows['net', 'routed']['PSNR']) == pytest.approx(psnr, abs=0.01)
    assert float(rows['net', names[0]]['PSNR']) == pytest.approx(psnr, abs=0.001)
    shares = rows['net', 'routed']['classes %'].split(' / ')
    assert int(shares[1]) == pytest.approx(100 * float(routing.heavy.float().mean()), abs=1)
    whole = net.backbone_macs / 16 + 12 * 6 / 16 + 2 * 6 * 6 + 6 * 3
    assert float(rows['net', 'routed, budget 0.8']['kMACs/pixel']) == pytest.approx(0.8 * whole / 1000, abs=0.006)


@pytest.mark.slow
def test_an_option_file_says_how_pixels_are_routed(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('a.png', photograph(40, 50, 0))
    block = load_checkpoint(model)['network_g']

    def shares(routing, *arguments):
        Path('opt.yml').write_text(yaml.safe_dump(dict(network_g=block, routing=routing)))
        assert cli.main(['upscale', '-m', model, '-opt', 'opt.yml', '-i', 'a.png', '-o', 'out', '--overwrite',
                         *arguments]) == 0  # yapf: disable
        return capsys.readouterr().out.split('class 0 to 1: ')[1].split(' %')[0]

    assert shares(dict(k=-1000)) == '0 / 100' and shares(dict(k=1000)) == '100 / 0'
    assert shares(dict(budget=9)) == '0 / 100' and shares(dict(budget=9), '--budget', '0.01') == '100 / 0'
    assert cli.main(['upscale', '-m', model, '-opt', 'opt.yml', '-i', 'a.png', '-o', 'x', '--step', '200']) == 2
    assert '--step 200: expected at most the patch size, 128' in one_line(capsys)
    assert shares(None, '--step', '100')  # of PCSR's tiles of 128
