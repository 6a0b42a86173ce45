import copy
import pytest
import torch
from torch.utils.data import DataLoader

from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.train import load_resume_state
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.models import ETDSModel
from cdnsr_basicsr.options import OptionError
from tests.helpers import Images, batch, make, step, two_processes

FREEZE = 3


@pytest.fixture
def opt(opt):
    """Options of a small ETDS whose residual stream is frozen for three iterations."""
    opt.update(model_type='ETDSModel', network_g=dict(type='ETDS', num_feat=10, num_block=2, num_residual_feat=4))
    opt['train'] = {key: value for key, value in opt['train'].items() if key in ('total_iter', 'optim_g', 'scheduler')}
    opt['train'].update(
        pixel_opt=dict(type='L1Loss'),
        residual_opt=dict(type='L1Loss', loss_weight=0.5),
        residual_freeze_iter=FREEZE,
        ema_decay=0.9)
    opt['train']['optim_g'].update(weight_decay=0.1)
    del opt['tile']
    return opt


def weights(net):
    """Copies of the weights of the residual stream, and of the others."""
    streams = [{}, {}]
    for name, value in net.state_dict().items():
        streams['residual' not in name][name] = value.clone()
    return streams


def moved(before, after):
    return [not torch.equal(before[name], after[name]) for name in before]


def run(model, first, last):
    """Trains, and returns in which iterations anything of the residual stream, and of the rest, has moved."""
    residual, others = [], []
    for i in range(first, last + 1):
        before = weights(model.net_g)
        step(model, i)
        for iterations, then, now in zip((residual, others), before, weights(model.net_g)):
            if any(moved(then, now)):
                iterations.append(i)
    return residual, others


def test_residual_stream_is_frozen_for_exactly_so_many_iterations(opt):
    model = make(opt)
    start = weights(model.net_g)[0]
    assert run(model, 1, FREEZE) == ([], [1, 2, 3])
    for name, value in weights(model.net_g_ema)[0].items():
        torch.testing.assert_close(value, start[name], atol=1e-6, rtol=0)
    assert run(model, FREEZE + 1, 6) == ([4, 5, 6], [4, 5, 6])


def test_without_freezing_both_streams_are_trained_from_the_start(opt):
    del opt['train']['residual_freeze_iter']
    assert run(make(opt), 1, 2) == ([1, 2], [1, 2])


def test_losses(opt):
    model = make(opt)
    net = copy.deepcopy(model.net_g)
    step(model)
    log = model.get_current_log()
    assert list(log) == ['l_pix', 'l_residual']
    output, residual = net(batch()['lq'], return_residual=True)
    errors = [(image - batch()['gt']).abs().mean().item() for image in (output, residual)]
    assert [log['l_pix'], log['l_residual']] == pytest.approx([errors[0], 0.5 * errors[1]], abs=1e-6)

    opt['train']['residual_opt'] = None
    model = make(opt)
    step(model)
    assert list(model.get_current_log()) == ['l_pix']


def test_residual_loss_reaches_the_residual_stream_alone(opt):
    opt['train'].update(pixel_opt=dict(type='L1Loss', loss_weight=0), residual_freeze_iter=0)
    model = make(opt)
    step(model)
    grads = {name: param.grad.abs().sum() for name, param in model.net_g.named_parameters()}
    assert {name for name, grad in grads.items() if grad > 0} >= {'conv_residual_last.bias', 'residual_convs.1.weight'}
    assert all(grad == 0 for name, grad in grads.items() if 'residual' not in name or 'add_residual' in name)


@pytest.mark.parametrize('at', [2, 3, 5])
def test_resumed_training_equals_uninterrupted(opt, tmp_path, at):
    whole = make(opt)
    for i in range(1, 8):
        step(whole, i)
        if i == at:
            whole.save(0, i)
    resumed_opt = copy.deepcopy(opt)
    resumed_opt['path']['resume_state'] = str(tmp_path / 'training_states' / f'{at}.state')
    state = load_resume_state(resumed_opt)
    model = build_model(resumed_opt)
    model.resume_training(state)
    residual, others = run(model, at + 1, 7)
    assert residual == list(range(max(at, FREEZE) + 1, 8)) and others == list(range(at + 1, 8))
    for net, other in ((model.net_g, whole.net_g), (model.net_g_ema, whole.net_g_ema)):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key], atol=1e-6, rtol=1e-5)


def test_moments_of_the_optimizer_do_not_move_a_frozen_stream(opt):
    model = make(opt)
    run(model, 4, 6)  # the optimizer has a state for all parameters
    state = copy.deepcopy(model.optimizer_g.state_dict()['state'])
    assert run(model, 2, 2)[0] == []
    names = [name for name, _ in model.net_g.named_parameters()]
    for index, after in model.optimizer_g.state_dict()['state'].items():
        assert torch.equal(state[index]['exp_avg'], after['exp_avg']) == ('residual' in names[index])


def test_checkpoint_describes_itself_and_validation_takes_its_network(opt, tmp_path):
    model = make(opt)
    run(model, 1, 5)
    model.save(0, 5)
    path = str(tmp_path / 'models' / 'net_g_5.pth')
    content = torch.load(path, weights_only=True)
    assert content.keys() == {'params', 'params_ema', 'network_g', 'scale'}
    assert content['network_g'] == opt['network_g'] and content['scale'] == 4
    net, item = load_network(path), Images()[1]
    model.feed_data({key: value[None] for key, value in item.items() if key in ('lq', 'gt')})
    model.test()
    with torch.no_grad():
        torch.testing.assert_close(model.output, net(item['lq'][None]))
    model.validation(DataLoader(Images()), 5, None)
    assert model.metric_results['psnr'] > 0


def train(model):
    """In which iterations the residual stream has moved, and sums of the weights, with other data in each process."""
    residual = []
    for i in range(1, 6):
        before = weights(model.net_g)[0]
        lq = torch.rand(2, 3, 8, 8)
        model.feed_data({'lq': lq, 'gt': 1 - lq.repeat_interleave(4, 2).repeat_interleave(4, 3)})
        model.optimize_parameters(i)
        if any(moved(before, weights(model.net_g)[0])):
            residual.append(i)
    sums = [param.double().sum().item() for param in model.get_bare_model(model.net_g).parameters()]
    return {'residual': residual, 'sums': sums, 'drawn': lq.sum().item()}


@pytest.mark.slow
def test_two_processes_keep_one_network_and_freeze_alike(opt, tmp_path):
    first, second = two_processes(opt, tmp_path, train)
    assert first['residual'] == second['residual'] == [4, 5]
    assert first['sums'] == second['sums'] and first['drawn'] != second['drawn']


def change(opt, key, value):
    *blocks, last = key.split('.')
    block = opt
    for name in blocks:
        block = block[name]
    block[last] = value


@pytest.mark.parametrize('key,value,message', [
    ('network_g', {
        'type': 'FSRCNN'
    }, "network_g.type: ETDSModel needs type ETDS, but got 'FSRCNN'"),
    ('scale', 3, 'scale: is 3, but network_g.upscale is 4'),
    ('tile', {}, 'option file.tile: unknown key; accepted: datasets, '),
    ('train.perceptual_opt', {}, 'train.perceptual_opt: unknown key; accepted: channels_last, '),
    ('train.freeze', [], 'train.freeze: unknown key'),
    ('path.pretrain_network_branches', [], 'path.pretrain_network_branches: unknown key'),
    ('val.save_map', True, 'val.save_map: unknown key'),
    ('train.pixel_opt', None, 'train.pixel_opt: a pixel loss is needed'),
    ('train.residual_opt.reduction', 'none', 'train.residual_opt.reduction: none leaves no single value'),
    ('train.residual_opt.loss_weight', -1, 'train.residual_opt.loss_weight: expected a number at least 0, but got -1'),
    ('train.residual_freeze_iter', 2.5, 'train.residual_freeze_iter: expected an integer at least 0, but got 2.5'),
    ('train.residual_freeze_iter', -1, 'train.residual_freeze_iter: expected an integer at least 0, but got -1'),
])
def test_wrong_options_are_refused_by_name(opt, key, value, message):
    opt = {name: opt[name] for name in ('name', 'scale', 'network_g', 'path', 'train', 'val')}
    opt['path'] = {'pretrain_network_g': None}
    ETDSModel.check_options(opt, True)
    change(opt, key, value)
    with pytest.raises(OptionError) as error:
        ETDSModel.check_options(opt, True)
    assert str(error.value).startswith(message) and '\n' not in str(error.value)


def test_pretrained_network_is_where_training_begins(opt, tmp_path):
    net = build_network(opt['network_g'])
    path = tmp_path / 'net.pth'
    torch.save({'params': net.state_dict(), 'params_ema': net.state_dict()}, path)
    opt['path']['pretrain_network_g'] = str(path)
    model = make(opt)
    for trained in (model.net_g, model.net_g_ema):
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in trained.state_dict().items())
