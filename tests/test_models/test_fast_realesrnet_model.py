"""FastRealESRNetModel: FastSRModel that degrades photographs, and what its option files may say."""
import copy
import cv2
import numpy as np
import pytest
import random
import torch
from dataclasses import asdict
from torch.nn import functional as F
from torch.utils.data import DataLoader

from basicsr.archs import build_network
from basicsr.models import build_model
from cdnsr_basicsr.models.degradation import Degradation, Degradations, Jpeg, trimmed
from cdnsr_basicsr.models.fast_realesrnet_model import PairPool
from cdnsr_basicsr.models.photo_options import check_options
from cdnsr_basicsr.options import OptionError, checks, read_options
from cdnsr_basicsr.options.schema import filled
from tests.helpers import ROOT, Images, carn, close, photographs, swinir

CPU = torch.device('cpu')
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))]
FILES = sorted((ROOT / 'options').glob('train_photo_branch?.yml'))
# nothing but what making it smaller does
NOTHING = dict(resize_prob=[0, 0, 1], gaussian_noise_prob=1, noise_range=[0, 0], jpeg_range=[100, 100])
NOTHING.update({f'{key}2': value for key, value in NOTHING.items()}, second_blur_prob=0)


@pytest.fixture
def photo_opt(opt):
    """A short training of a small network; of batches of 2, with a pool of 4 pairs."""
    opt.update(model_type='FastRealESRNetModel', network_g=carn(), queue_size=4)
    opt['datasets'] = {'train': dict(type='PhotographDataset', gt_size=32, batch_size_per_gpu=2)}
    del opt['tile']
    kept = ('total_iter', 'optim_g', 'scheduler', 'pixel_opt')
    opt['train'] = {key: value for key, value in opt['train'].items() if key in kept}
    opt['train']['ema_decay'] = 0.5
    return opt


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def degrade(number=0, data=None, device=CPU, gt_size=64, **changes):
    """LQ and GT of a batch, whole images, with a seed."""
    seed(number)
    return Degradation(dict(changes, scale=4), torch.device(device), gt_size)(data or photographs(2, 64))


def steps(model, *iterations):
    for i in iterations:
        model.update_learning_rate(i)
        model.feed_data(photographs())
        model.optimize_parameters(i)


@pytest.mark.parametrize('device', DEVICES)
def test_a_fixed_seed_is_a_fixed_result_and_another_one_is_not(device):
    lq, gt = degrade(device=device)
    assert lq.shape == (2, 3, 16, 16) and gt.shape == (2, 3, 64, 64) and lq.device.type == device
    assert torch.equal(degrade(device=device)[0], lq) and not torch.equal(degrade(1, device=device)[0], lq)
    assert 0 <= lq.min() and lq.max() <= 1 and torch.equal((255 * lq).round() / 255, lq)


def test_images_of_a_batch_are_degraded_differently():
    data = photographs(2, 64)
    same = dict(data, gt=data['gt'][:1].expand(2, -1, -1, -1).contiguous())
    lq, gt = degrade(data=same, noise_range=[1, 8], gaussian_noise_prob=1)
    assert torch.equal(gt[0], gt[1]) and not torch.equal(lq[0], lq[1])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('number', range(6))
def test_without_strength_the_lq_is_the_gt_made_smaller(number, device):
    # The image is smooth, so that area, bilinear and bicubic sampling agree to a grey level, and it is gray, since JPEG
    # halves the resolution of colours at any quality. The rest is rounding: of two JPEGs of quality 100, and to 8 bits.
    data = photographs(2, 128)
    smooth = F.interpolate(torch.rand(2, 1, 3, 3), size=(128, 128), mode='bilinear')
    data['gt'] = ((255 * smooth).round() / 255).expand(-1, 3, -1, -1).contiguous()
    lq, gt = degrade(number, data, device, 128, **NOTHING)
    assert torch.equal(gt.cpu(), data['gt'])
    difference = (lq - F.interpolate(gt, size=(32, 32), mode='area')).abs() * 255
    assert difference.max() < 3 and difference.mean() < 1


@pytest.mark.parametrize('change, grows', [
    (dict(noise_range=[8, 8]), 3),
    (dict(jpeg_range2=[10, 10]), 3),
    (dict(gaussian_noise_prob2=0, poisson_scale_range2=[0.5, 0.5]), 2),
])
def test_every_strength_shows(change, grows):
    errors = []
    for changes in (NOTHING, {**NOTHING, **change}):
        lq, gt = degrade(0, photographs(2, 128), CPU, 128, **changes)
        errors.append((lq - F.interpolate(gt, size=(32, 32), mode='area')).abs().mean().item() * 255)
    assert errors[1] > errors[0] + grows / 4, errors


def test_blur_shows():
    data = photographs(2, 64)
    data['gt'] = torch.rand_like(data['gt'])
    sharp, _ = degrade(0, data, **NOTHING)
    data['kernel1'] = torch.full((2, 21, 21), 1 / 441)
    blurred, _ = degrade(0, data, **NOTHING)
    assert blurred.std() < 0.3 * sharp.std()


def test_resizes_leave_the_content_where_it_is():
    # One grey level for each GT pixel: a shift by one is a level. BasicSR's own resize ends up to 1.4 pixels off.
    data = photographs(1, 64)
    data['gt'] = (torch.arange(64.) / 255 + 0.2).expand(1, 3, 64, 64).contiguous()
    expected = F.interpolate(data['gt'], size=(16, 16), mode='area')
    changes = {**NOTHING, 'resize_prob': [0, 1, 0], 'resize_range': [0.7, 1]}
    off = [(degrade(number, data, **changes)[0] - expected)[..., 14].mean().item() * 255 for number in range(20)]
    assert max(map(abs, off)) < 0.75, off


def test_kernels_lose_only_what_cannot_be_seen():
    pulse = photographs()['kernel1']
    assert trimmed(pulse).shape == (2, 1, 1)
    wide = torch.from_numpy(cv2.getGaussianKernel(21, 1.2)).float()
    kernels = torch.stack([wide @ wide.T, pulse[0]])
    cut = trimmed(kernels)
    assert cut.shape[-1] < 15 and cut.shape[-1] % 2 == 1
    close(cut.sum((1, 2)), torch.ones(2))
    rim = (21 - cut.shape[-1]) // 2
    assert (F.pad(cut, [rim] * 4) - kernels).abs().sum((1, 2)).max() < 2.5e-3
    box = torch.full((1, 21, 21), 1 / 441)
    assert trimmed(box).shape == box.shape


def test_jpeg_is_that_of_files():
    images = photographs(2, 48)['gt']
    low, high = (Jpeg()(images, torch.tensor([quality, 95.])) for quality in (5., 95.))
    assert torch.equal(low[1], high[1]) and not torch.equal(low[0], high[0])
    assert (low[0] - images[0]).abs().mean() > 3 * (high[0] - images[0]).abs().mean()
    pixels = (255 * images[0]).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
    data = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 5])[1]
    assert np.array_equal((255 * low[0]).round().byte().permute(1, 2, 0).numpy()[..., ::-1], cv2.imdecode(data, 1))


def test_the_pool_fills_and_then_mixes_pairs_that_stay_pairs():
    pool, seen = PairPool(6), []
    for i in range(30):
        values = torch.tensor([2. * i, 2. * i + 1])[:, None, None, None] / 255
        lq, gt = pool.exchange(values.expand(2, 3, 2, 2), values.expand(2, 3, 8, 8))
        assert torch.equal(lq[:, 0, 0, 0], gt[:, 0, 0, 0]) and gt.shape == (2, 3, 8, 8)
        assert torch.equal(lq[:, 0, 0, 0], values[:, 0, 0, 0]) == (i < 3)
        seen += [] if i < 3 else (255 * lq[:, 0, 0, 0]).round().int().tolist()
    assert len(set(seen)) == len(seen) == 54, 'a pair is handed out once'
    assert any(b - a not in (1, ) for a, b in zip(seen[::2], seen[1::2])), 'batches are drawn'


def test_resumed_training_equals_the_uninterrupted_one(photo_opt, tmp_path):
    seed(1)
    model = build_model(copy.deepcopy(photo_opt))
    steps(model, 1, 2, 3)
    model.save(0, 3)
    steps(model, 4, 5, 6)
    seed(77)
    photo_opt['path']['pretrain_network_g'] = str(tmp_path / 'models' / 'net_g_3.pth')
    photo_opt['path']['param_key_g'] = 'params'
    resumed = build_model(copy.deepcopy(photo_opt))
    state = torch.load(tmp_path / 'training_states' / '3.state', weights_only=True)
    resumed.resume_training(copy.deepcopy(state))
    assert resumed.pool.count == 4
    steps(resumed, 4, 5, 6)
    assert all(torch.equal(*pair) for pair in zip(model.net_g.parameters(), resumed.net_g.parameters()))

    photo_opt['queue_size'] = 8
    other = build_model(copy.deepcopy(photo_opt))
    other.resume_training(state)
    assert other.pool.count == 0, 'a pool of another size is filled again'
    steps(other, 4)
    assert other.pool.count == 2


def test_validation_is_that_of_fastsrmodel_and_leaves_the_pool_alone(photo_opt):
    seed(1)
    model = build_model(copy.deepcopy(photo_opt))
    steps(model, 1)
    pool = copy.deepcopy(model.pool.state())
    model.validation(DataLoader(Images()), 1, None)
    fast = build_model(copy.deepcopy(dict(photo_opt, model_type='FastSRModel')))
    fast.net_g_ema.load_state_dict(model.net_g_ema.state_dict())
    fast.validation(DataLoader(Images()), 1, None)
    assert model.metric_results == fast.metric_results
    assert all(torch.equal(*pair) for pair in zip(model.pool.state()['pairs'], pool['pairs']))
    assert model.is_train


def test_a_teacher_sees_the_degraded_images(photo_opt, tmp_path):
    photo_opt['network_t'] = carn(8)
    torch.save({'params': build_network(photo_opt['network_t']).state_dict()}, tmp_path / 'teacher.pth')
    photo_opt['path']['pretrain_network_t'] = str(tmp_path / 'teacher.pth')
    photo_opt['train']['teacher_opt'] = dict(type='L1Loss', loss_weight=2)
    model = build_model(copy.deepcopy(photo_opt))
    steps(model, 1)
    expected = 2 * (model.output - model.net_t(model.lq)).abs().mean().item()
    assert model.get_current_log()['l_teacher'] == pytest.approx(expected, rel=1e-4)


def test_patches_have_to_fit_the_network(photo_opt):
    photo_opt['network_g'] = swinir(7)
    with pytest.raises(OptionError, match='datasets.train.gt_size: 32 makes LQ patches of 8 pixels'):
        build_model(copy.deepcopy(photo_opt))


def test_option_files_say_the_defaults():
    assert len(FILES) == 3
    for path in FILES:
        opt, defaults = read_options(str(path)), asdict(filled(Degradations, {}))
        assert {
            key: opt[key]
            for key in defaults
        } == {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in defaults.items()
        }


@pytest.fixture
def checked(monkeypatch):
    """Checks an option file as `basicsr train` does, but for paths."""
    monkeypatch.setattr(checks, 'check_path', lambda value, where: None)
    return lambda opt: checks.check_options(opt, True)


def test_a_short_file_is_enough(checked):
    opt = read_options(str(FILES[0]))
    for key in asdict(filled(Degradations, {})):
        del opt[key]
    del opt['queue_size']
    for key in set(opt['datasets']['train']) - {
            'name', 'type', 'dataroot_gt', 'io_backend', 'gt_size', 'num_worker_per_gpu', 'batch_size_per_gpu'
    }:
        del opt['datasets']['train'][key]
    checked(opt)


@pytest.mark.parametrize('key, value, message', [
    ('resize_prob', [0.2, 0.7], 'resize_prob: expected a list of 3 values, but got [0.2, 0.7]'),
    ('resize_prob', [0.2, 0.7, 0.2], 'resize_prob: expected probabilities whose sum is 1, but got [0.2, 0.7, 0.2]'),
    ('resize_range', [1.1, 1.2], 'resize_range: expected one number up to 1 and one from 1 on, but got [1.1, 1.2]'),
    ('resize_range2', [0, 1.2], 'resize_range2: expected a number from 0.05 to 16, but got 0'),
    ('noise_range', [8, 1], 'noise_range: expected the smaller number first, but got [8, 1]'),
    ('noise_range2', 4, 'noise_range2: expected a list of 2 values, but got 4'),
    ('noise_range', [0, 300], 'noise_range: expected a number from 0 to 255, but got 300'),
    ('jpeg_range', [0, 90], 'jpeg_range: expected a number from 1 to 100, but got 0'),
    ('gray_noise_prob', 2, 'gray_noise_prob: expected a number from 0 to 1, but got 2'),
    ('gt_usm', 'no', "gt_usm: accepted: true, false; got 'no'"),
    ('queue_size', 100,
     'queue_size: 100 is not a multiple of batch_size_per_gpu, 16; accepted: multiples, such as 96 or '
     '112'),
    ('queue_size', 4, 'queue_size: 4 is not a multiple of batch_size_per_gpu, 16; accepted: multiples, such as 16'),
    ('nosie_range', [1, 2], 'nosie_range: unknown key; accepted: '),
    ('datasets.train.kernel_prob', [1], 'datasets.train.kernel_prob: expected 2 probabilities, one for each of '
     'kernel_list, but got [1]'),
    ('datasets.train.kernel_prob2', [0.5, 0.6], 'datasets.train.kernel_prob2: expected probabilities whose sum is 1, '
     'but got [0.5, 0.6]'),
    ('datasets.train.kernel_list', ['gauss', 'iso'], 'datasets.train.kernel_list: accepted: iso, aniso'),
    ('datasets.train.blur_sigma', [0, 1], 'datasets.train.blur_sigma: expected a number from 0.01 to 100, but got 0'),
    ('datasets.train.gt_size', 512, 'datasets.train.gt_size: expected an integer from 1 to 400, but got 512'),
    ('datasets.train.sinc', 1, 'datasets.train.sinc: unknown key; accepted: '),
    ('datasets.train.dataroot_teacher', 'a', 'datasets.train.dataroot_teacher: unknown key'),
    ('datasets.train.type', 'LabeledPatchDataset', 'datasets.train.'),
])
def test_wrong_values_are_refused_in_one_line(checked, key, value, message):
    opt = read_options(str(FILES[0]))
    checked(opt)
    block, name = (opt['datasets']['train'], key.rsplit('.', 1)[-1]) if '.' in key else (opt, key)
    block[name] = value
    with pytest.raises(OptionError) as error:
        checked(opt)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_pairs_are_for_another_model(checked):
    opt = read_options(str(ROOT / 'options/train_span_branch1.yml'))
    opt['datasets']['train'].update(label_file=None, classes=None)
    opt['model_type'] = 'FastRealESRNetModel'
    with pytest.raises(OptionError, match='datasets.train.type: accepted: PhotographDataset, RealESRGANDataset, whose'):
        checked(opt)
    with pytest.raises(OptionError, match='path.pretrain_network_g: is needed for a test'):
        check_options(opt, False)
