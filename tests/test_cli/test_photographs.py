"""Training for photographs, from a folder of them to a checkpoint, on a CPU."""
import copy
import cv2
import pytest
import torch
from pathlib import Path

from cdnsr_basicsr import cli
from tests.helpers import fsrcnn, photograph

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def photo_opt(work, train_opt):
    """A short training on a folder of two photographs, with defaults for all that may be left out."""
    Path('photos').mkdir()
    for i in range(2):
        cv2.imwrite(f'photos/{i}.png', photograph(410, 420, i))
    opt = copy.deepcopy(train_opt)
    opt.update(model_type='FastRealESRNetModel', network_g=fsrcnn(), queue_size=4)
    data = dict(name='train', type='PhotographDataset', dataroot_gt='photos', io_backend=dict(type='disk'), gt_size=32)
    data.update(num_worker_per_gpu=1, batch_size_per_gpu=2, dataset_enlarge_ratio=10)
    opt['datasets']['train'] = data
    for key in ('class_opt', 'average_opt'):
        del opt['train'][key]
    del opt['tile']
    opt['logger'].update(use_tb_logger=False)
    return opt


def trained(path='experiments/tiny/models/net_g_latest.pth'):
    content = torch.load(path, weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in content['params_ema'].values())
    assert content['network_g']['type'] == 'FSRCNN' and content['scale'] == 4
    return content['params']


@pytest.mark.parametrize('data', ['folder', 'lmdb', 'RealESRGANDataset'])
def test_photographs_train_a_network(photo_opt, write, data, capfd):
    block = photo_opt['datasets']['train']
    if data == 'lmdb':
        assert cli.main(['prepare', '-i', 'photos', '-o', 'datasets_photo', '--crop', '400']) == 0
        block.update(dataroot_gt='datasets_photo/gt.lmdb', io_backend=dict(type='lmdb'))
    if data == 'RealESRGANDataset':
        Path('list.txt').write_text('0.png\n1.png\n')
        kernels = dict(kernel_list=['iso', 'aniso'], kernel_prob=[0.5, 0.5], blur_sigma=[0.2, 3], blur_kernel_size=21)
        kernels.update(betag_range=[0.5, 4], betap_range=[1, 2], sinc_prob=0.1)
        block.update(kernels, **{f'{key}2': value for key, value in kernels.items()}, final_sinc_prob=0.8)
        block.update(type=data, meta_info='list.txt', use_hflip=True, use_rot=True)
    assert cli.main(['train', '-opt', write(photo_opt)]) == 0, capfd.readouterr().err
    trained()
    state = torch.load('experiments/tiny/training_states/4.state', weights_only=True)
    pool = state['processes'][0]['pool']
    assert pool['count'] == 4 and pool['pairs'][1].shape == (4, 3, 32, 32) and pool['pairs'][0].float().std() > 0
    photo_opt['train'].update(total_iter=6)
    photo_opt['train']['scheduler'].update(periods=[6])
    assert cli.main(['train', '-opt', write(photo_opt), '--auto_resume']) == 0
    assert Path('experiments/tiny/training_states/6.state').is_file()

    photo_opt['path'].update(pretrain_network_g='experiments/tiny/models/net_g_latest.pth')
    photo_opt['datasets'] = dict(test=photo_opt['datasets']['val'])
    photo_opt.update(name='tested')
    assert cli.main(['test', '-opt', write(photo_opt)]) == 0
    assert Path('results/tested').is_dir()


def test_a_mistake_is_one_line(photo_opt, write, capfd):
    photo_opt['queue_size'] = 5
    assert cli.main(['train', '-opt', write(photo_opt)]) == 2
    error = capfd.readouterr().err
    assert 'opt.yml: queue_size: 5 is not a multiple of batch_size_per_gpu, 2' in error and error.count('\n') == 1
    assert not Path('experiments').exists()
