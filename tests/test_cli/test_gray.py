"""Networks for gray pictures, from photographs to results: what they see is the same everywhere."""
import cv2
import numpy as np
import pytest
import torch
from pathlib import Path

from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr
from basicsr.utils import bgr2ycbcr
from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.data.labels import read_labels
from cdnsr_basicsr.data.prepare import make_lq
from cdnsr_basicsr.inference import runtime
from cdnsr_basicsr.losses import squared_error
from tests.helpers import fsrcnn, photograph, run, spread, tensorboard_tags

ONE = dict(num_in_ch=1, num_out_ch=1)


@pytest.fixture
def gray_net(tiny_net):
    block = tiny_net(4, [dict(type='Interpolation'), dict(fsrcnn(4), **ONE), dict(fsrcnn(8), **ONE)])
    block['classifier']['num_in_ch'] = 1
    return block


@pytest.fixture
def model(work, gray_net):
    net = spread(build_network(gray_net))
    for i in (1, 2):  # not as dark as at random
        net.branches[i].deconv.bias.data.fill_(0.4)
    save_checkpoint(dict(params=net.state_dict(), network_g=gray_net, scale=4), 'gray.pth')
    return 'gray.pth'


def dataset(root, **kwargs):
    block = dict(name='train', type='LabeledPatchDataset', gt_size=32, use_hflip=False, use_rot=False, phase='train')
    folders = {f'dataroot_{kind}': f'{root}/{kind}.lmdb' for kind in ('gt', 'lq')}
    return build_dataset({**block, **folders, 'scale': 4, 'io_backend': dict(type='lmdb'), 'color': 'y', **kwargs})


def prepare_gray(work):
    (work / 'hr').mkdir()
    for i in range(3):
        cv2.imwrite(f'hr/{i}.png', photograph(96, 112, i))
    arguments = ['prepare', '-i', 'hr', '--gray', '-o']
    assert cli.main([*arguments, 'gray', '--scales', '1', '--crop', '32', '--step', '32']) == 0
    assert cli.main([*arguments, 'gray_val', '--whole']) == 0


def test_gray_patches_are_what_a_dataset_makes_of_colours(work):
    prepare_gray(work)
    assert cv2.imread('gray_val/gt/0.png', cv2.IMREAD_UNCHANGED).shape == (96, 112)
    gray, colours = dataset('gray'), dataset('datasets/train')
    assert len(gray) == len(colours) > 20
    for i in range(0, len(gray), 5):
        for key, levels in (('gt', 0.51), ('lq', 2)):  # but for rounding to 8 bits; LQ colours are clipped, too
            assert gray[i][key].shape[0] == 1 and (gray[i][key] - colours[i][key]).abs().max() < levels / 255


@pytest.mark.slow
def test_a_gray_network_is_labelled_for_trained_and_validated(work, model, train_opt, gray_net, write):
    prepare_gray(work)
    assert cli.main(['label', '-d', 'gray', '--by', 'branches', '-m', model]) == 0
    labels, data, net = read_labels('gray/labels_branches.txt'), dataset('gray'), load_network(model)
    item = data[3]
    with torch.no_grad():
        expected = [squared_error(branch(item['lq'][None]), item['gt'][None]) for branch in net.branches]
    key = Path(item['gt_path']).stem
    assert labels[key].errors == pytest.approx([float(error) for error in expected], rel=1e-3)

    train_opt.update(network_g=gray_net)
    train_opt['path']['pretrain_network_g'] = model
    train_opt['datasets']['train'].update(
        dataroot_gt='gray/gt.lmdb', dataroot_lq='gray/lq.lmdb', color='y', label_file='gray/labels_branches.txt')
    train_opt['datasets']['val'].update(dataroot_gt='gray_val/gt', dataroot_lq='gray_val/lq', color='y')
    train_opt['train'].update(
        label_opt=dict(type='LabelLoss'),
        feature_opt=dict(type='FeatureDistillLoss'),
        feature_extractor=dict(weights='random'))
    train_opt['val'].update(save_map=True, save_img=True)
    run('-m', 'cdnsr_basicsr', 'train', '-opt', write(train_opt))
    shown = tensorboard_tags('tb_logger/tiny')['images']
    assert shown == {f'val/{i}/{kind}' for i in range(3) for kind in ('sr', 'difficulty_map')}
    visualization = Path('experiments/tiny/visualization')
    assert cv2.imread(str(visualization / '0/0_4_map.png')).shape[2] == 3
    assert cv2.imread(str(visualization / '0/0_4.png'), cv2.IMREAD_UNCHANGED).shape == (96, 112)


@pytest.mark.slow
def test_the_quality_of_a_gray_network_is_that_of_luma(work, model, capsys):
    Path('hr').mkdir()
    cv2.imwrite('hr/a.png', photograph(96, 112))
    net, (gt, lq) = load_network(model), make_lq(photograph(96, 112), 4)
    with torch.no_grad():  # by BasicSR's own conversion
        result = net.branches[2](torch.from_numpy(bgr2ycbcr(lq / np.float32(255), y_only=True))[None, None])
    images = result[0, 0].mul(255).round().clamp(0, 255).numpy(), bgr2ycbcr(gt / np.float32(255), y_only=True) * 255
    expected = calculate_psnr(images[0], images[1].round(), 4)
    arguments = ['-m', model, '--data', 'hr', '--repeat', '1', '--budgets', '9', '--branches', '--oracle', '--no-ssim']
    arguments += ['--cost', 'macs']  # times of networks so small are chance
    assert cli.main(['benchmark', *arguments]) == 0
    text = capsys.readouterr().out
    assert 'PSNR and SSIM of luma' in text
    lines = [line.split(' | ') for line in text.splitlines() if line.startswith('| gray ')]
    measured = {line[2]: float(line[4]) for line in lines}
    for name in ('whole image (BasicSR)', 'branch 3, whole image, tuned'):
        assert measured[name] == pytest.approx(expected, abs=0.001)
    assert len(measured) == len(lines) == 18 and measured['routed, budget 9'] == measured['oracle, budget 9']
    assert cli.main(['calibrate', '-m', model, '-i', 'hr', '--budgets', '9']) == 0
    assert f'| {measured["branch 3, tiled"]:.2f}' in capsys.readouterr().out
    block = fsrcnn(4)
    save_checkpoint(dict(params=build_network(block).state_dict(), network_g=block, scale=4), 'rgb.pth')
    assert cli.main(['benchmark', '-m', model, 'rgb.pth', '--data', 'hr']) == 2
    assert 'networks for grayscale images (gray.pth) cannot be compared' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not runtime.installed(), reason='neither onnxruntime nor openvino is installed')
def test_an_exported_gray_network_makes_the_same_pictures(work, model):
    pytest.importorskip('onnx')
    Path('in').mkdir()
    image = photograph(40, 50)
    for name, pixels in (('gray', image[..., 1]), ('equal', image[..., [1, 1, 1]]), ('colours', image)):
        cv2.imwrite(f'in/{name}.png', pixels)
    assert cli.main(['export', model, '-o', 'exported']) == 0
    for network in (model, 'exported'):
        assert cli.main(['upscale', '-m', network, '-i', 'in', '-o', f'out_{network}']) == 0
    for name in ('gray', 'equal', 'colours'):
        results = [
            cv2.imread(f'out_{network}/{name}.png', cv2.IMREAD_UNCHANGED).astype(int) for network in (model, 'exported')
        ]
        assert np.abs(results[0] - results[1]).max() <= 1
        assert results[0].shape == ((160, 200) if name == 'gray' else (160, 200, 3))
