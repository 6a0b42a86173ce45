"""BasicSR's own models on a CPU, and CDNSR under them."""
import copy
import cv2
import pytest
import torch
from pathlib import Path

from cdnsr_basicsr import cli
from cdnsr_basicsr.options.checks import check_model_of_cdnsr
from tests.helpers import fsrcnn, photograph, run

pytestmark = pytest.mark.slow  # whole runs, in processes of their own

ITERATIONS = 2


@pytest.fixture
def stock_opt(train_opt):
    """A short training by a stock model, without validation and TensorBoard."""
    opt = copy.deepcopy(train_opt)
    opt.update(model_type='SRModel', network_g=fsrcnn())
    opt['datasets']['train'].update(type='PairedImageDataset')
    opt['train'].update(total_iter=ITERATIONS, ema_decay=0.5)
    opt['logger'].update(use_tb_logger=False)
    for key in ('class_opt', 'average_opt'):
        del opt['train'][key]
    del opt['datasets']['val'], opt['val'], opt['tile']
    return opt


def synthesis(opt, model):
    """Options of Real-ESRGAN's training, on one photograph."""
    Path('photos').mkdir()
    cv2.imwrite('photos/a.png', photograph(400, 400))
    Path('meta_info_real.txt').write_text('a.png\n')
    kernels = dict(kernel_list=['iso', 'aniso'], kernel_prob=[0.5, 0.5], blur_sigma=[0.2, 3], blur_kernel_size=21)
    kernels.update(betag_range=[0.5, 4], betap_range=[1, 2], sinc_prob=0.1)
    data = dict(name='train', type='RealESRGANDataset', dataroot_gt='photos', meta_info='meta_info_real.txt')
    data.update(io_backend=dict(type='disk'), use_hflip=True, use_rot=False, gt_size=32, final_sinc_prob=0.8)
    data.update(kernels, **{f'{key}2': value for key, value in kernels.items()})
    data.update(num_worker_per_gpu=0, batch_size_per_gpu=1, dataset_enlarge_ratio=9)
    degradations = dict(resize_prob=[0.2, 0.7, 0.1], resize_range=[0.3, 1.2], gaussian_noise_prob=0.5)
    degradations.update(noise_range=[1, 30], poisson_scale_range=[0.1, 3], gray_noise_prob=0.4, jpeg_range=[30, 95])
    opt.update(degradations, **{f'{key}2': value for key, value in degradations.items()})
    opt.update(model_type=model, gt_size=32, second_blur_prob=0.8, queue_size=1)
    opt.update(
        dict(gt_usm=True) if model == 'RealESRNetModel' else dict(l1_gt_usm=True, percep_gt_usm=True, gan_gt_usm=False))
    opt['datasets']['train'] = data
    if model == 'RealESRGANModel':
        opt['network_d'] = dict(type='UNetDiscriminatorSN', num_in_ch=3, num_feat=4)
        opt['train'].update(optim_d=dict(type='Adam', lr=1e-4), net_d_iters=1, net_d_init_iters=0)
        opt['train'].update(gan_opt=dict(type='GANLoss', gan_type='vanilla', real_label_val=1., fake_label_val=0.))


@pytest.mark.parametrize('routed', [True, False])
@pytest.mark.parametrize('model', ['RealESRNetModel', 'RealESRGANModel'])
def test_real_esrgan_trains_on_a_cpu(work, stock_opt, write, tiny_net, model, routed):
    synthesis(stock_opt, model)
    stock_opt['network_g'] = tiny_net() if routed else fsrcnn()
    assert cli.main(['train', '-opt', write(stock_opt)]) == 0
    weights = torch.load('experiments/tiny/models/net_g_latest.pth')['params']
    torch.manual_seed(0)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert Path(f'experiments/tiny/training_states/{ITERATIONS}.state').is_file()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_filters_take_images_in_any_layout(layout):
    from basicsr.utils.img_process_util import filter2D
    image, kernels = torch.rand(2, 3, 20, 24), torch.rand(2, 5, 5)
    for kernel in (kernels, kernels[:1]):
        assert torch.equal(filter2D(image.to(memory_format=layout), kernel), filter2D(image, kernel))


def test_a_prefetcher_of_gpus_gives_way_to_that_of_cpus(work, stock_opt, write):
    stock_opt['datasets']['train'].update(prefetch_mode='cuda', pin_memory=True)
    output = run('-m', 'cdnsr_basicsr', 'train', '-opt', write(stock_opt))
    assert output.count('prefetch_mode is cuda, but this runs on the CPU: using prefetch_mode cpu.') == 1


def test_cdnsr_under_a_stock_model_says_what_is_missing(work, stock_opt, write, tiny_net, capfd):
    stock_opt.update(network_g=tiny_net())
    output = run('-m', 'cdnsr_basicsr', 'train', '-opt', write(stock_opt))
    warnings = [line for line in output.splitlines() if line.startswith('basicsr: warning: ')]
    words = ('model_type', 'SRModel', 'tau', 'tiles', 'checkpoints', 'CDNSRModel')
    assert len(warnings) == 1 and all(word in warnings[0] for word in words)
    missing = check_model_of_cdnsr(dict(stock_opt, model_type='FastSRModel'), True)
    assert 'tau' in missing and 'checkpoints' not in missing
    assert check_model_of_cdnsr(dict(stock_opt, model_type='CDNSRModel'), True) is None

    stock_opt['network_g']['classifier'] = dict(type='ErrorPredictor', num_feat=4)
    for model in ('FastSRModel', 'SRModel'):
        stock_opt.update(name='refused', model_type=model)
        assert cli.main(['train', '-opt', write(stock_opt)]) == 2
        error = capfd.readouterr().err
        assert f'opt.yml: model_type: {model} cannot train an ErrorPredictor' in error and error.count('\n') == 1
    assert not Path('experiments/refused').exists()
