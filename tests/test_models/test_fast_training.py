"""FastSRModel: SRModel in another precision and memory layout."""
import copy
import math
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from basicsr.archs import build_network
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.models import build_model
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.models import CDNSRModel, ETDSModel, FastSRModel, PCSRModel
from cdnsr_basicsr.models.fast_options import check_training
from cdnsr_basicsr.models.fast_training import FastTraining
from cdnsr_basicsr.options import OptionError
from tests.helpers import Images, batch, carn, swinir


@pytest.fixture
def fast_opt(opt):
    opt.update(model_type='FastSRModel', network_g=carn())
    del opt['tile']
    opt['train'] = {
        key: value
        for key, value in opt['train'].items() if key in ('total_iter', 'optim_g', 'scheduler', 'pixel_opt')
    }
    opt['train']['ema_decay'] = 0.5
    return opt


def trained(opt, steps=3):
    torch.manual_seed(1)
    model = build_model(copy.deepcopy(opt))
    data = batch()
    for i in range(1, steps + 1):
        model.feed_data(data)
        model.optimize_parameters(i)
    return model


def difference(model, other):
    pairs = zip(model.net_g_ema.state_dict().values(), other.net_g_ema.state_dict().values())
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize('channels_last', [True, False])
def test_in_float32_it_trains_what_basicsr_trains(fast_opt, channels_last):
    fast_opt['train']['channels_last'] = channels_last
    fast, stock = (trained({**fast_opt, 'model_type': kind}) for kind in ('FastSRModel', 'SRModel'))
    assert difference(fast, stock) < 1e-5
    assert fast.get_current_log()['l_pix'] == pytest.approx(stock.get_current_log()['l_pix'], rel=1e-4)


def test_resuming_goes_on_with_random_numbers_and_best_metrics(fast_opt, tmp_path):
    model = trained(fast_opt)
    model.save(0, 3)
    model.validation(DataLoader(Images()), 3, None)
    state = torch.load(tmp_path / 'training_states' / '3.state', weights_only=True)
    torch.set_rng_state(state['processes'][0]['random_state']['torch'])
    expected = torch.rand(2)
    resumed = build_model(copy.deepcopy(fast_opt))
    torch.manual_seed(99)
    resumed.resume_training(state)
    assert torch.equal(torch.rand(2), expected)
    assert resumed.best_metric_results == model.best_metric_results and model.best_metric_results['images']['psnr']
    del state['processes'], state['best_metric_results']  # one of BasicSR's own
    resumed.resume_training(state)


def test_validating_more_often_does_not_change_the_training(fast_opt):
    model = trained(fast_opt)
    torch.manual_seed(5)
    model.validation(DataLoader(Images()), 3, None)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn)


@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
def test_half_precision_is_used_and_changes_little(fast_opt, precision):
    stock = trained(fast_opt, 1)
    fast_opt['train']['precision'] = precision
    model = trained(fast_opt, 1)
    assert not torch.equal(model.output, stock.output), 'the precision was not used'
    assert all(param.dtype == torch.float32 for param in model.net_g.parameters())
    assert model.get_current_log()['l_pix'] == pytest.approx(stock.get_current_log()['l_pix'], rel=0.02)


@pytest.mark.parametrize('kind', ['FastSRModel', 'ETDSModel'])
def test_float16_passes_over_overflows_and_resumes_with_its_scale(fast_opt, tmp_path, kind):
    fast_opt['train'].update(precision='float16', pixel_opt=dict(type='L1Loss'))  # its weight of 100 overflows, too
    if kind == 'ETDSModel':
        fast_opt.update(model_type=kind, network_g=dict(type='ETDS', num_feat=10, num_block=2, num_residual_feat=4))
        fast_opt['train'].update(residual_opt=dict(type='L1Loss'), residual_freeze_iter=1)
    model = trained(fast_opt, 0)
    before, scale = copy.deepcopy(model.net_g.state_dict()), model.scaler.get_scale()
    for i, wrong in ((1, True), (2, True), (3, False)):
        data = batch()
        if wrong:
            data['lq'][0, 0, 0, 0] = math.inf
        model.feed_data(data)
        model.optimize_parameters(i)
        assert any(not torch.equal(value, before[key]) for key, value in model.net_g.state_dict().items()) != wrong
    assert model.scaler.get_scale() == scale / 4
    assert all(torch.isfinite(value).all() for value in model.net_g.state_dict().values())
    model.save(0, 3)
    fast_opt['path']['pretrain_network_g'] = str(tmp_path / 'models' / 'net_g_3.pth')
    resumed = trained(fast_opt, 0)
    resumed.resume_training(torch.load(tmp_path / 'training_states' / '3.state', weights_only=True))
    assert resumed.scaler.state_dict() == model.scaler.state_dict()
    for trained_on in (model, resumed):
        trained_on.feed_data(batch())
        trained_on.optimize_parameters(4)
    assert all(torch.equal(*pair) for pair in zip(model.net_g.parameters(), resumed.net_g.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize('precisions', [('float32', 'float16'), ('float16', 'float32')])
def test_the_precision_can_be_changed_by_a_resume(fast_opt, tmp_path, precisions):
    for precision in precisions:
        fast_opt['train']['precision'] = precision
        model = trained(fast_opt)
        if precision == precisions[0]:
            model.save(0, 3)
    model.resume_training(torch.load(tmp_path / 'training_states' / '3.state', weights_only=True))
    model.optimize_parameters(4)
    assert np.isfinite(model.get_current_log()['l_pix'])


@pytest.mark.parametrize('model', [CDNSRModel, ETDSModel, FastSRModel, PCSRModel])
def test_there_is_one_training_step(model):
    assert model.optimize_parameters is FastTraining.optimize_parameters


def test_its_checkpoint_describes_itself(fast_opt):
    model = trained(fast_opt)
    model.save(0, -1)
    net = load_network(f"{fast_opt['path']['models']}/net_g_latest.pth")
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model.net_g_ema(x))


@pytest.mark.parametrize('change,message', [
    (dict(precision='half'), 'train.precision: .*float32, bfloat16, float16'),
    (dict(channels_last='yes'), 'train.channels_last'),
    (dict(pixel_opt=None), 'train.pixel_opt: a pixel loss is needed'),
    (dict(class_opt=dict(type='ClassLoss')), 'train.class_opt: unknown key'),
])
def test_wrong_options_are_refused_by_name(fast_opt, change, message):
    keys = ('name', 'model_type', 'scale', 'network_g', 'path', 'train')
    opt = {key: fast_opt[key] for key in keys}
    opt['path'] = {}
    FastSRModel.check_options(opt, True)
    opt['train'].update(change)
    with pytest.raises(OptionError, match=message):
        FastSRModel.check_options(opt, True)


def test_threads_of_several_gpus_do_not_know_a_precision(fast_opt):
    fast_opt['train']['precision'] = 'bfloat16'
    model = build_model(copy.deepcopy(fast_opt))
    model.opt['num_gpu'] = 2
    with pytest.raises(OptionError, match='bfloat16 on 2 GPUs needs a process for each'):
        model.model_to_device(model.net_g)


def test_a_network_that_wants_multiples_trains_and_validates(fast_opt):
    fast_opt['network_g'] = swinir(7)
    fast_opt['datasets'] = {'train': {'gt_size': 4 * 7}}
    model = build_model(copy.deepcopy(fast_opt))
    model.feed_data({'lq': torch.rand(2, 3, 7, 7), 'gt': torch.rand(2, 3, 28, 28)})
    model.optimize_parameters(1)
    model.validation(DataLoader(Images()), 1, None)
    assert model.metric_results['psnr'] > 0
    fast_opt['datasets']['train']['gt_size'] = 32
    words = 'gt_size: 32 makes LQ patches of 8 pixels, but network_g takes multiples of 7 only, such as gt_size 28'
    with pytest.raises(OptionError, match=words):
        build_model(copy.deepcopy(fast_opt))


@pytest.fixture
def taught_opt(fast_opt, tmp_path):
    """With a teacher that is wider."""
    torch.manual_seed(5)
    fast_opt['network_t'] = carn(12)
    torch.save({'params': build_network(fast_opt['network_t']).state_dict()}, tmp_path / 'teacher.pth')
    fast_opt['path']['pretrain_network_t'] = str(tmp_path / 'teacher.pth')
    fast_opt['train']['teacher_opt'] = dict(type='L1Loss', loss_weight=0.5)
    return fast_opt


@pytest.mark.slow
def test_a_published_file_teaches_under_the_names_of_its_project(taught_opt, shared):
    path = str(shared('weights/SPANV2_x4.pth'))
    taught_opt['network_t'] = dict(type='SPANV2', num_feat=32, num_block=5, upscale=4)
    taught_opt['path']['pretrain_network_t'] = path
    model = trained(taught_opt, steps=1)
    with torch.no_grad():
        expected = 0.5 * (model.output - load_network(path)(model.lq)).abs().mean()
    assert model.get_current_log()['l_teacher'] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
def test_a_published_network_that_spandrel_reads_teaches(taught_opt, tmp_path):
    pytest.importorskip('spandrel')
    teacher = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4).eval()
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')  # as its authors publish it
    taught_opt['network_t'] = dict(type='Spandrel', architecture='Compact')
    model = trained(taught_opt, steps=1)
    with torch.no_grad():
        expected = 0.5 * (model.output - teacher(model.lq)).abs().mean()
    assert model.get_current_log()['l_teacher'] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
def test_a_teacher_is_compared_with_the_output_and_stays_as_it_is(taught_opt, tmp_path):
    model = trained(taught_opt, steps=1)
    teacher = build_network(taught_opt['network_t'])
    teacher.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True)['params'])
    with torch.no_grad():
        expected = 0.5 * (model.output - teacher.eval()(model.lq)).abs().mean()
    assert model.get_current_log()['l_teacher'] == pytest.approx(expected.item(), rel=1e-4)
    for ours, theirs in zip(model.net_t.parameters(), teacher.parameters()):
        assert torch.equal(ours, theirs) and not ours.requires_grad

    taught_opt['train']['teacher_opt']['loss_weight'] = 1e3  # now it is the teacher that is learnt
    model = trained(taught_opt, steps=30)
    with torch.no_grad():
        before, after = ((net(model.lq) - teacher(model.lq)).abs().mean()
                         for net in (trained(taught_opt, 0).net_g, model.net_g))
    assert after < 0.7 * before


@pytest.mark.slow
def test_outputs_of_a_teacher_in_the_batch_teach_as_it_would(taught_opt):
    online = trained(taught_opt, steps=3)
    images = online.net_t(batch()['lq'])
    del taught_opt['network_t'], taught_opt['path']['pretrain_network_t']
    torch.manual_seed(1)
    model = build_model(copy.deepcopy(taught_opt))
    for i in range(1, 4):
        model.feed_data(dict(batch(), teacher=images))
        model.optimize_parameters(i)
    assert model.net_t is None and difference(model, online) < 1e-6
    assert model.get_current_log()['l_teacher'] == pytest.approx(online.get_current_log()['l_teacher'], rel=1e-4)


@pytest.mark.parametrize('block, key, message', [
    (None, 'network_t', 'network_t: a teacher needs both network_t and path.pretrain_network_t'),
    ('path', 'pretrain_network_t', 'network_t: a teacher needs both network_t and path.pretrain_network_t'),
    ('train', 'teacher_opt', 'train.teacher_opt: requires a teacher'),
])
def test_half_a_teacher_is_refused(taught_opt, block, key, message):
    taught_opt['datasets'] = dict(train={})
    (taught_opt if block is None else taught_opt[block]).pop(key)
    with pytest.raises(OptionError, match=message):
        check_training(taught_opt)


def test_a_loss_needs_a_teacher_and_one_only(taught_opt):
    taught_opt['datasets'] = dict(train=dict(dataroot_teacher='teacher.lmdb'))
    with pytest.raises(OptionError, match='datasets.train.dataroot_teacher: expected one teacher: this, or network_t'):
        check_training(taught_opt)
    del taught_opt['network_t'], taught_opt['path']['pretrain_network_t']
    check_training(taught_opt)
    del taught_opt['datasets']['train']['dataroot_teacher']
    with pytest.raises(OptionError, match='train.teacher_opt: requires a teacher, .* or datasets.train.dataroot_te'):
        check_training(taught_opt)


@pytest.mark.parametrize('change, message', [
    (dict(network_t=dict(carn(12), upscale=2)), 'network_t: enlarges 2 times; expected a network of scale 4'),
    (dict(network_t=swinir(7)), 'datasets.train.gt_size'),
])
def test_a_teacher_that_does_not_fit_is_refused(taught_opt, change, message):
    taught_opt.update(change)
    taught_opt['datasets'] = dict(train=dict(gt_size=32))
    with pytest.raises(OptionError, match=message):
        trained(taught_opt, 0)
