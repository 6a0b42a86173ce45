import copy
import logging
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.inference import PixelUpscaler
from cdnsr_basicsr.losses.routing_loss import average_loss
from cdnsr_basicsr.models import PCSRModel
from cdnsr_basicsr.options import OptionError
from tests.helpers import Images, fsrcnn, make, pcsr, step, sums, two_processes


@pytest.fixture
def opt(opt):
    """Options of a small PCSR in phase 1."""
    train = {key: opt['train'][key] for key in ('total_iter', 'optim_g', 'scheduler')}
    train.update(phase=1, pixel_opt=dict(type='L1Loss', loss_weight=1000), average_opt=dict(type='AverageLoss'))
    return dict(
        opt,
        model_type='PCSRModel',
        network_g=pcsr(fsrcnn(8)),
        tile=dict(patch_size=24, step=12),
        train=dict(train, ema_decay=0.5))


def moved(model, before):
    state = model.get_bare_model(model.net_g).state_dict()
    return {key.split('.')[0] for key, value in state.items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize('phase,freeze,parts,logged', [
    (0, [], {'backbone', 'heavy'}, ['l_pix']),
    (1, [], {'backbone', 'heavy', 'light', 'classifier'}, ['l_pix', 'l_average', 'share_heavy']),
    (1, ['backbone', 'heavy'], {'light', 'classifier'}, ['l_pix', 'l_average', 'share_heavy']),
])
def test_what_a_phase_trains(opt, phase, freeze, parts, logged):
    opt['train'].update(phase=phase, freeze=freeze, average_opt=opt['train']['average_opt'] if phase else None)
    model = make(opt)
    before = copy.deepcopy(model.net_g.state_dict())
    step(model)
    assert moved(model, before) == parts
    assert list(model.get_current_log()) == logged and np.isfinite(list(model.get_current_log().values())).all()
    optimized = {id(param) for group in model.optimizer_g.param_groups for param in group['params']}
    assert optimized == {id(param) for part in parts for param in getattr(model.net_g, part).parameters()}


def test_the_average_loss_of_pixels_is_the_published_one():
    probability = torch.rand(3 * 50)**2
    published = (probability.sum() - 75).abs() / 75
    assert float(average_loss(torch.stack([1 - probability, probability], dim=1))) == pytest.approx(float(published))


def test_the_average_loss_reaches_the_classifier_alone(opt):
    opt['train']['pixel_opt']['loss_weight'] = 0
    model = make(opt)
    step(model)
    for part in ('classifier', 'light', 'heavy'):
        gradient = sum(param.grad.abs().sum() for param in getattr(model.net_g, part).parameters())
        assert (gradient > 0) == (part == 'classifier')


def test_training_lowers_the_loss(opt):
    opt['train']['optim_g']['lr'] = 0.005
    model, values = make(opt), []
    for i in range(40):
        step(model)
        values.append(model.get_current_log()['l_pix'])
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_phase_1_starts_from_the_checkpoint_of_phase_0(opt, tmp_path):
    first = copy.deepcopy(opt)
    first['train'].update(phase=0, average_opt=None)
    model = make(first)
    step(model)
    model.save(0, -1)
    path = str(tmp_path / 'models' / 'net_g_latest.pth')
    content = torch.load(path, weights_only=True)
    assert content['network_g'] == dict(opt['network_g'], phase=0) and content['scale'] == 4
    x = torch.rand(1, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_network(path)(x), model.net_g_ema(x))

    opt['path'].update(pretrain_network_g=path, strict_load_g=False, param_key_g='params_ema')
    second = make(opt)
    for net in (second.net_g, second.net_g_ema):
        state = net.state_dict()
        assert all(torch.equal(state[key], value) for key, value in content['params_ema'].items())


def test_checkpoint_describes_itself(opt, tmp_path):
    model = make(opt)
    step(model)
    model.save(0, 3)
    net, x = load_network(str(tmp_path / 'models' / 'net_g_3.pth')), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model.net_g_ema(x))


def test_resumed_training_is_uninterrupted_training(opt, tmp_path):
    straight = make(opt)
    for i in (1, 2, 3):
        step(straight, i)
        if i == 2:
            straight.save(0, 2)
    state = torch.load(tmp_path / 'training_states' / '2.state', weights_only=True)
    opt['path'].update(pretrain_network_g=str(tmp_path / 'models' / 'net_g_2.pth'), resume_state='2.state')
    resumed = make(opt)
    resumed.resume_training(state)
    step(resumed, 3)
    for name in ('net_g', 'net_g_ema'):
        for ours, theirs in zip(getattr(resumed, name).parameters(), getattr(straight, name).parameters()):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize('routing', [{}, {'k': 1}, {'adaptive': True, 'refinement': False}, {'budget': 0.9}])
@pytest.mark.parametrize('phase', [0, 1])
def test_validation_goes_through_the_engine_and_says_what_it_cost(opt, tmp_path, caplog, routing, phase):
    opt['train'].update(phase=phase, average_opt=None)
    opt['routing'], opt['val']['save_map'] = routing, True
    model, scalars, images = make(opt), {}, {}

    class Logger:

        def add_scalar(self, name, value, current_iter):
            scalars[name] = value

        def add_image(self, name, image, current_iter, dataformats):
            images[name] = image

    with caplog.at_level(logging.INFO, logger='basicsr'):
        logging.getLogger('basicsr').propagate = True
        model.validation(DataLoader(Images()), 4, Logger(), save_img=True)
    net = model.net_g_ema
    counts, errors = torch.zeros(len(net.samplers)), [[] for _ in net.samplers]
    for data in DataLoader(Images()):
        upscaled = PixelUpscaler(net, 24, 12, budget=routing.get('budget')).upscale(data['lq'])
        counts += torch.tensor(upscaled.counts)
        error = upscaled.image[0].clamp(0, 1).mul(255).round() - data['gt'][0].mul(255).round()
        owner = np.kron(upscaled.plan.class_map(), np.ones((4, 4)))
        for i, values in enumerate(errors):
            values += error.numpy()[:, owner == i].flatten().tolist()
    shares = (counts / counts.sum()).tolist()
    names = ['light', 'heavy'][-len(shares):]
    assert [scalars[f'routing/images/share_{name}'] for name in names] == pytest.approx(shares)
    assert [scalars[f'routing/images/count_{name}'] for name in names] == counts.tolist()
    for name, values in zip(names, errors):
        psnr = pytest.approx(10 * np.log10(255**2 / np.mean(np.square(values)))) if values else None
        assert scalars.get(f'routing/images/psnr_{name}') == psnr
    assert 0 < scalars['routing/images/cost'] and np.isfinite(scalars['metrics/images/psnr'])
    assert f'# heavy: {100 * shares[-1]:.1f} %' in caplog.text
    maps = sorted(path.name for path in (tmp_path / 'visualization').rglob('*.png'))
    assert maps == [f'{i}_4{suffix}.png' for i in range(3) for suffix in ('', '_map')]
    assert set(images) == {f'images/{i}/{kind}' for i in range(3) for kind in ('sr', 'difficulty_map')}


def test_gt_of_another_size_is_refused_and_none_is_needed(opt):
    opt['val']['metrics'] = None
    model = make(opt)
    step(model)  # leaves the GT of a training batch behind
    with pytest.raises(OptionError, match=r'b.png: GT of \(18, 18\) is not x4 of LQ of \(9, 9\)'):
        model.feed_data(dict(lq=torch.rand(1, 3, 9, 9), gt=torch.rand(1, 3, 18, 18), lq_path=['a'], gt_path='b.png'))

    class NoGT(Images):

        def __getitem__(self, index):
            return {key: value for key, value in super().__getitem__(index).items() if 'gt' not in key}

    model.validation(DataLoader(NoGT()), 1, None)


@pytest.mark.parametrize('change,words', [
    (dict(network_g=dict(type='FSRCNN')), 'network_g.type'),
    (dict(scale=2), 'scale: is 2'),
    (dict(network_g=pcsr(heavy=[4, 0])), 'network_g.heavy'),
    (dict(network_g=pcsr(heavy=4)), 'network_g.heavy'),
    (dict(network_g=pcsr(phase=0)), 'network_g.phase: is 0, but train.phase is 1'),
    (dict(routing=dict(kk=1)), 'kk'),
    (dict(routing=dict(k='a')), 'routing.k'),
    (dict(routing=dict(adaptive=2)), 'routing.adaptive'),
    (dict(routing=dict(budget=-1)), 'routing.budget'),
    (dict(routing=dict(budget=1, k=2)), 'routing.budget: replaces'),
    (dict(tile=dict(patch_size=4)), 'tile.patch_size'),
    (dict(tile=dict(step=200)), 'tile.step'),
    (dict(train=dict(phase=2)), 'train.phase'),
    (dict(train=dict(phase=0)), 'train.phase: 0 trains'),
    (dict(train=dict(freeze=['light'])), 'train.freeze: accepted'),
    (dict(train=dict(freeze=['heavy'])), 'would stay random'),
    (dict(train=dict(pixel_opt=None)), 'pixel_opt: a pixel loss is needed'),
    (dict(train=dict(average_opt=dict(type='L1Loss'))), 'average_opt.type'),
    (dict(train=dict(pixel_opt=dict(type='L1Loss', reduction='none'))), 'reduction'),
    (dict(train=dict(tau_min=1)), 'tau_min'),
])
def test_mistakes_are_refused_in_one_line(opt, change, words):
    keys = ('name', 'model_type', 'scale', 'num_gpu', 'network_g', 'tile', 'train', 'val')
    opt = dict({key: opt[key] for key in keys}, path={}, datasets={})
    PCSRModel.check_options(opt, True)
    wrong = dict(opt, **change)
    if 'train' in change:
        wrong['train'] = dict(opt['train'], **change['train'])
    with pytest.raises(OptionError, match=words) as error:
        PCSRModel.check_options(wrong, True)
    assert '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('backbone', ['FSRCNN', 'CARN_M'])
def test_two_processes_train_one_network(opt, tmp_path, backbone):
    # CARN_M has a buffer, the mean, and DistributedDataParallel broadcasts buffers
    opt['network_g']['backbone'] = {'type': backbone, 'num_feat': 4}
    for phase in (0, 1) if backbone == 'FSRCNN' else (0, ):
        opt['train'].update(phase=phase, average_opt=dict(type='AverageLoss') if phase else None)
        first, second = two_processes(opt, tmp_path, sums)
        assert first['sums'] == second['sums'] and first['drawn'] != second['drawn']
