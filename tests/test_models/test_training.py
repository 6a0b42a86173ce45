"""Precision, labels, the collapse guard and resuming in CDNSRModel."""
import copy
import logging
import math
import numpy as np
import pytest
import random
import torch
from torch.utils.data import DataLoader

from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.train import load_resume_state
from cdnsr_basicsr.losses import AverageLoss, squared_error
from cdnsr_basicsr.losses.routing_loss import average_loss
from cdnsr_basicsr.models.cdnsr_options import check_training
from cdnsr_basicsr.models.collapse_guard import CollapseGuard, class_counts, routing_entropy, softened
from cdnsr_basicsr.options import OptionError
from tests.helpers import Images, batch, step


def make(opt):
    torch.manual_seed(3)
    return build_model(copy.deepcopy(opt))


@pytest.fixture
def warnings(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if 'collapsed' in record.getMessage()]


@pytest.mark.parametrize('options', [
    dict(channels_last=False),
    dict(precision='bfloat16'),
    dict(precision='float16'),
    dict(precision='bfloat16', channels_last=False),
])
def test_precision_and_layout_change_little(opt, options):
    opt['network_g']['mixture'] = 'softmax'
    values = []
    for train in ({}, options):
        model = make({**opt, 'train': {**opt['train'], **train}})
        step(model)
        values.append(model.get_current_log())
        assert all(param.dtype == torch.float32 for param in model.net_g.parameters())
    exact = 'precision' not in options
    for key in ('l_pixel', 'l_class', 'cost'):
        assert values[1][key] == pytest.approx(values[0][key], rel=1e-4 if exact else 0.03)
    assert values[1]['l_pixel'] != values[0]['l_pixel'] or exact, 'the precision was not used'


@pytest.mark.slow
def test_float16_passes_over_a_step_that_overflows(opt):
    model = make({**opt, 'train': {**opt['train'], 'precision': 'float16'}})
    before = copy.deepcopy(model.net_g.state_dict())
    scale = model.scaler.get_scale()
    data = batch()
    data['gt'][0, 0, 0, 0] = math.inf
    model.feed_data(data)
    model.optimize_parameters(1)
    assert all(torch.equal(value, before[key]) for key, value in model.net_g.state_dict().items())
    assert model.scaler.get_scale() == scale / 2
    for i in range(2, 20):  # until the scale is small enough
        step(model, i)
    assert not all(torch.equal(value, before[key]) for key, value in model.net_g.state_dict().items())
    assert all(torch.isfinite(value).all() for value in model.net_g.state_dict().values())


@pytest.mark.slow
def test_compiled_branches_train_and_save_the_same_weights(opt, monkeypatch, tmp_path):
    compiled, original = [], torch.nn.Module.compile

    def traced(self):  # by dynamo, without the compiler of C++ that inductor needs
        compiled.append(self)
        original(self, backend='aot_eager')

    monkeypatch.setattr(torch.nn.Module, 'compile', traced)
    opt['network_g']['mixture'] = 'softmax'
    plain, model = make(opt), make({**opt, 'train': {**opt['train'], 'compile': True}})
    assert compiled == list(model.net_g.branches)
    for i in (1, 2):
        step(plain, i)
        step(model, i)
    model.save(0, 2)
    saved = torch.load(tmp_path / 'models' / 'net_g_2.pth', weights_only=True)['params']
    assert list(saved) == [*plain.net_g.state_dict(), 'network_g']  # and the network's description
    for key, value in plain.net_g.state_dict().items():
        torch.testing.assert_close(saved[key], value, atol=1e-5, rtol=1e-4)


def test_branch_loss_is_that_of_each_branch_alone(opt):
    opt['train'].update(branch_opt=dict(type='L1Loss', loss_weight=2), pixel_opt=dict(type='L1Loss', loss_weight=0))
    opt['train'].update({f'{name}_opt': None for name in ('class', 'average', 'flops')})
    opt['network_g']['mixture'] = 'softmax'
    model = make(opt)
    data = batch()
    with torch.no_grad():
        weights = model.net_g.classifier(data['lq']).softmax(1)
        errors = [(branch(data['lq']) - data['gt']).abs().mean((1, 2, 3)) for branch in model.net_g.branches]
    step(model)
    expected = 2 * (weights * torch.stack(errors, 1)).sum(1).mean()
    assert model.get_current_log()['l_branch'] == pytest.approx(expected.item(), rel=1e-5)
    for part in (model.net_g.classifier, *model.net_g.branches):
        assert any(param.grad.abs().sum() > 0 for param in part.parameters())


@pytest.fixture
def error_opt(opt):
    opt['network_g']['classifier'] = {'type': 'ErrorPredictor', 'num_feat': 4}
    opt['path']['pretrain_network_branches'] = None
    opt['train'].update({f'{name}_opt': None for name in ('pixel', 'class', 'average', 'flops')})
    opt['train'].update(error_opt=dict(type='ErrorLoss'), freeze=['branches'])
    return opt


@pytest.mark.slow
def test_known_errors_train_without_running_branches(error_opt, monkeypatch):
    logs = []
    for known in (True, False):
        model = make(error_opt)
        assert model.net_g.classifier.costs.tolist() == pytest.approx(model.costs.tolist())
        data = batch()
        with torch.no_grad():
            outputs = [branch(data['lq']) for branch in model.net_g.branches]
        if known:
            data['errors'] = torch.stack([squared_error(output, data['gt']) for output in outputs], dim=1)
            for branch in model.net_g.branches:
                monkeypatch.setattr(branch, 'forward', None)
        model.feed_data(data)
        model.optimize_parameters(1)
        assert all(param.grad.abs().sum() > 0 for param in model.net_g.classifier.head.parameters())
        logs.append(model.get_current_log())
    for key, value in logs[0].items():
        assert value == pytest.approx(logs[1][key], rel=1e-4), key


@pytest.mark.slow
def test_an_error_predictor_learns_which_branch_errs_less(error_opt):
    error_opt['train']['optim_g']['lr'] = 0.01
    model = make(error_opt)
    smooth, busy = torch.full((4, 3, 16, 16), 0.5), torch.rand(4, 3, 16, 16)
    errors = torch.tensor([[1., 0.99, 0.98]] * 4 + [[400., 300., 50.]] * 4)
    data = {**batch(8), 'lq': torch.cat([smooth, busy]), 'gt': torch.zeros(8, 3, 64, 64), 'errors': errors}
    for i in range(1, 301):
        model.feed_data(data)
        model.optimize_parameters(i)
    classifier = model.net_g.classifier.eval()
    with torch.no_grad():
        logits = classifier(data['lq'])
    assert classifier.errors(logits).mean(0).tolist() == pytest.approx(errors.mean(0).tolist(), rel=0.2)
    assert logits.argmax(1).tolist() == [0] * 4 + [2] * 4


def test_an_error_predictor_that_nothing_trains_is_refused(error_opt):
    error_opt['train'].update(
        error_opt=None, freeze=[], class_opt=None, average_opt=None, flops_opt=None, label_opt=None)
    with pytest.raises(OptionError, match='is what trains ErrorPredictor; without it, freeze: \\[classifier\\]'):
        make(error_opt)
    error_opt['train']['freeze'] = ['classifier']
    make(error_opt)


def test_errors_of_another_network_are_refused(error_opt):
    model = make(error_opt)
    model.feed_data({**batch(2), 'errors': torch.ones(2, 4)})
    with pytest.raises(OptionError, match='holds 4 errors for each patch, but there are 3 branches'):
        model.optimize_parameters(1)


def test_error_loss_needs_a_classifier_that_predicts_errors(error_opt):
    error_opt['network_g']['classifier'] = {'type': 'PatchClassifier', 'num_feat': 4}
    with pytest.raises(OptionError, match='error_opt: needs a classifier that predicts errors.*PatchClassifier'):
        make(error_opt)


def test_a_router_that_knows_distances_to_the_hardest_branch_is_not_taught_the_ground_truth(error_opt):
    error_opt['path']['pretrain_network_g'] = 'branches.pth'
    error_opt['datasets'] = {}
    check_training(error_opt)
    error_opt['network_g']['classifier'] = {'type': 'ErrorMap', 'num_feat': 4, 'reference': 'hardest'}
    with pytest.raises(OptionError, match='error_opt: teaches errors towards the ground truth.*basicsr route'):
        check_training(error_opt)


@pytest.mark.parametrize('name', ['class', 'average', 'flops'])
def test_losses_of_the_mixture_cannot_train_an_error_predictor(error_opt, name):
    error_opt['train'][f'{name}_opt'] = dict(type={'flops': 'FLOPsLoss'}.get(name, f'{name.title()}Loss'))
    with pytest.raises(OptionError, match=f'{name}_opt: cannot train ErrorPredictor.*use error_opt'):
        make(error_opt)


@pytest.mark.slow
def test_jointly_each_branch_learns_where_it_is_used_and_errors_are_those_of_now(error_opt):
    error_opt['train'].update(freeze=[], branch_opt=dict(type='L1Loss', loss_weight=1000))
    model = make(error_opt)
    data = batch()
    with torch.no_grad():
        model.net_g.eval()
        predicted = model.net_g.classifier.errors(model.net_g.classifier(data['lq']))
        errors = [squared_error(branch(data['lq']), data['gt']) for branch in model.net_g.branches]
        expected = model.losses['error'](predicted, torch.stack(errors, dim=1))
        model.net_g.train()
    model.feed_data({**data, 'errors': torch.zeros(len(data['lq']), 3)})  # of branches as they were
    model.optimize_parameters(1)
    assert model.get_current_log()['l_error'] == pytest.approx(expected.item(), rel=1e-4)
    gradients = [param.grad.clone() for param in model.net_g.classifier.parameters()]
    for branch in model.net_g.branches:
        assert any(param.grad.abs().sum() > 0 for param in branch.parameters())
    model = make(error_opt)
    model.losses['branch'].loss_weight = 0.
    model.feed_data(data)
    model.optimize_parameters(1)
    for gradient, param in zip(gradients, model.net_g.classifier.parameters()):
        torch.testing.assert_close(gradient, param.grad)


@pytest.mark.slow
def test_a_branch_without_weights_needs_no_checkpoint(error_opt, tmp_path):
    branches = error_opt['network_g']['branches']
    paths = [None]
    for i, block in enumerate(branches[1:]):
        paths.append(str(tmp_path / f'{i}.pth'))
        torch.save({'params_ema': build_network(block).state_dict()}, paths[-1])
    error_opt['path']['pretrain_network_branches'] = paths
    with pytest.raises(OptionError, match='is ~ for a FSRCNN, which has weights'):
        make(error_opt)
    branches[0] = {'type': 'Interpolation', 'upscale': 4}
    model = make(error_opt)
    expected = torch.load(paths[1], weights_only=True)['params_ema']
    for key, value in model.net_g.branches[1].state_dict().items():
        torch.testing.assert_close(value, expected[key])


def labelled(labels):
    return {**batch(len(labels)), 'label': torch.tensor(labels)}


@pytest.mark.slow
def test_labels_teach_the_classifier(opt):
    opt['train'].update(label_opt=dict(type='LabelLoss', num_iter=100), pixel_opt=dict(type='L1Loss', loss_weight=0))
    opt['train'].update({f'{name}_opt': None for name in ('class', 'average', 'flops')})
    opt['train']['optim_g']['lr'] = 0.01
    model = make(opt)
    data = labelled([0, 1, 2, 2, 1, 0])
    for i in range(1, 61):
        model.feed_data(data)
        model.optimize_parameters(i)
        if i == 1:
            assert all(param.grad.abs().sum() > 0 for param in model.net_g.classifier.parameters())
            assert all(param.grad.abs().sum() == 0 for param in model.net_g.branches.parameters())
    assert model.net_g.classifier(data['lq']).argmax(1).tolist() == [0, 1, 2, 2, 1, 0]
    model.optimize_parameters(101)
    assert model.get_current_log()['l_label'] == 0


def test_entropy_at_the_ends():
    assert routing_entropy(torch.zeros(4, 3)).item() == pytest.approx(1)
    assert routing_entropy(1000 * torch.eye(3)).item() == pytest.approx(0)


def test_guard_looks_at_whole_windows(warnings):
    guard = CollapseGuard(3, max_share=0.8, num_iter=3)
    mixed, one = torch.eye(3), torch.eye(3)[[1, 1, 1]]
    for logits in (one, one, mixed, one, one):
        guard(class_counts(logits))
    assert warnings() == []  # 7 of 9, then a window that is not over
    guard(class_counts(one))
    assert len(warnings()) == 1
    assert 'class 1 took 100.0 % of the patches of the last 3 iterations' in warnings()[0]
    assert 'Raise train.average_opt.loss_weight (train.balance: auto does so), lower the weight' in warnings()[0]
    for _ in range(3):
        guard(class_counts(torch.eye(3)[[2]]))
    assert 'raise the weight of train.flops_opt' in warnings()[1]


def test_guard_raises_the_average_loss_so_often_and_no_more(warnings):
    loss = AverageLoss(0.5)
    guard = CollapseGuard(3, num_iter=1, average_loss=loss)
    for _ in range(12):
        guard(class_counts(torch.eye(3)[[0]]))
    assert loss.loss_weight == 0.5 * 2**10
    assert 'is raised to 1.' in warnings()[0] and 'is 512 and stays so' in warnings()[-1]
    guard.iterations = 9
    guard(class_counts(torch.eye(3)[[0]]))  # a window that was longer before resuming
    assert guard.iterations == 0
    again = AverageLoss(0.5)
    resumed = CollapseGuard(3, num_iter=5, average_loss=again)
    resumed.load_state_dict(guard.state_dict())
    assert again.loss_weight == loss.loss_weight and resumed.raises == 10


def collapse(opt, balance, iterations=180):
    """Trains with a FLOPs loss that wants everything easy; returns the largest share of one class in the last 80."""
    opt['train'].update(balance=balance, collapse_iter=10, total_iter=iterations, freeze=['branches'])
    opt['train'].update(pixel_opt=dict(type='L1Loss', loss_weight=0.01), class_opt=None)
    opt['train'].update(average_opt=dict(type='AverageLoss', loss_weight=0.02))
    opt['train'].update(flops_opt=dict(type='FLOPsLoss', target=0, loss_weight=1))
    opt['train']['optim_g']['lr'] = 0.003
    opt['train']['scheduler']['milestones'] = [iterations]
    opt['network_g']['mixture'] = 'softmax'
    model, shares = make(opt), []
    generator = torch.Generator().manual_seed(5)
    for i in range(1, iterations + 1):
        contrast = torch.rand(12, 1, 1, 1, generator=generator)
        lq = 0.5 + contrast * (torch.rand(12, 3, 8, 8, generator=generator) - 0.5)
        model.feed_data({'lq': lq, 'gt': lq.repeat_interleave(4, 2).repeat_interleave(4, 3)})
        model.optimize_parameters(i)
        shares.append([model.get_current_log()[f'share_{k}'] for k in range(3)])
    return np.mean(shares[-80:], axis=0).max(), model


@pytest.mark.slow
def test_routing_collapses_and_the_guard_says_so(opt, warnings):
    share, model = collapse(opt, 'warn')
    assert share == 1 and model.losses['average'].loss_weight == 0.02
    assert warnings() and 'class 0 took' in warnings()[-1]


@pytest.mark.slow
def test_auto_balance_recovers_from_the_same_collapse(opt, warnings):
    share, model = collapse(opt, 'auto')
    assert share < 0.8
    assert model.losses['average'].loss_weight > 0.1 and 'is raised to' in warnings()[0]


def test_softened_weights_have_a_gradient_where_the_softmax_has_none():
    logits = torch.tensor([[60., -60., 0.]] * 4, requires_grad=True)
    gradients = [
        torch.autograd.grad(average_loss(p), logits)[0].abs().sum() for p in (logits.softmax(1), softened(logits))
    ]
    assert gradients[0] < 1e-12 and gradients[1] > 1e-3
    balanced = 60 * torch.eye(3)
    torch.testing.assert_close(softened(balanced), balanced.softmax(1))


@pytest.mark.slow
def test_resumed_training_equals_uninterrupted_with_noise_guard_and_scaler(opt, tmp_path):
    opt['train'].update(ema_decay=0.9, precision='float16', balance='auto', collapse_iter=3, collapse_share=0.34)
    opt['train'].update(csd_opt=dict(type='CSDLoss', layer_weights=dict(relu1_1=1), num_negatives=2))
    opt['train'].update(cs_opt=dict(type='ContrastLoss', layer='relu1_1', num_dim=8, num_negatives=2))
    opt['train'].update(feature_extractor=dict(weights='random'))
    whole = make(opt)
    extractor = whole.distillation.extractor.state_dict()
    drawn = []
    for i in range(1, 9):
        step(whole, i)
        drawn.append((random.random(), np.random.rand()))
        if i == 4:
            whole.save(0, i)
    assert whole.guard.raises > 1
    resumed_opt = copy.deepcopy(opt)
    resumed_opt['path']['resume_state'] = str(tmp_path / 'training_states' / '4.state')
    state = load_resume_state(resumed_opt)
    torch.manual_seed(99)
    model = build_model(resumed_opt)
    model.distillation.extractor.load_state_dict(extractor)
    model.resume_training(state)
    for i in range(5, 9):
        step(model, i)
        assert (random.random(), np.random.rand()) == drawn[i - 1]
    for net, other in ((model.net_g, whole.net_g), (model.net_g_ema, whole.net_g_ema), (model.losses['cs'],
                                                                                        whole.losses['cs'])):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key], atol=1e-6, rtol=1e-5)
    assert model.get_current_log()['tau'] == whole.get_current_log()['tau']
    assert model.scaler.state_dict() == whole.scaler.state_dict()
    assert model.losses['average'].loss_weight == whole.losses['average'].loss_weight > 6
    assert model.guard.state_dict() == whole.guard.state_dict()


@pytest.mark.slow
def test_best_metrics_are_resumed_also_when_validation_follows_saving(opt, tmp_path):
    model = make(opt)
    step(model)
    model.save(0, 2)
    model.validation(DataLoader(Images()), 2, None)
    best = model.best_metric_results
    assert best['images']['psnr']['iter'] == 2
    state = torch.load(tmp_path / 'training_states' / '2.state', weights_only=True)
    resumed = make(opt)
    resumed.resume_training(state)
    assert resumed.best_metric_results == best
    resumed.best_metric_results['images']['psnr']['val'] = 99.
    resumed.validation(DataLoader(Images()), 4, None)
    assert resumed.best_metric_results['images']['psnr'] == {'better': 'higher', 'val': 99., 'iter': 2}


@pytest.mark.slow
def test_another_choice_of_metrics_starts_its_best_anew(opt, tmp_path):
    model = make(opt)
    model.validation(DataLoader(Images()), 2, None)
    model.save(0, 2)
    opt['val']['metrics']['ssim'] = dict(type='calculate_ssim', crop_border=4)
    resumed = make(opt)
    resumed.resume_training(torch.load(tmp_path / 'training_states' / '2.state', weights_only=True))
    resumed.validation(DataLoader(Images()), 4, None)
    assert {
        name: best['iter']
        for name, best in resumed.best_metric_results['images'].items()
    } == {
        'psnr': 4,
        'ssim': 4
    }


@pytest.mark.slow
@pytest.mark.parametrize('scheduler', [
    dict(type='CosineAnnealingRestartLR', periods=[4], restart_weights=[1], eta_min=0),
    dict(type='MultiStepLR', milestones=[2], gamma=0.5),
])
def test_a_longer_schedule_can_be_resumed(opt, tmp_path, scheduler):
    opt['train'].update(total_iter=4, scheduler=dict(scheduler))
    model = make(opt)
    for i in range(1, 5):
        step(model, i)
    model.save(0, 4)
    opt['train'].update(
        total_iter=40,
        scheduler=dict(scheduler, **(dict(periods=[40]) if 'periods' in scheduler else dict(milestones=[2, 10]))))
    resumed = make(opt)
    resumed.resume_training(torch.load(tmp_path / 'training_states' / '4.state', weights_only=True))
    rates = []
    for i in range(5, 41):
        step(resumed, i)
        rates.append(resumed.get_current_learning_rate()[0])
    if 'periods' in scheduler:
        assert rates[0] > 0.0009 and rates[-1] < 0.0001 and rates == sorted(rates, reverse=True)
    else:
        assert rates[0] == 0.0005 and rates[-1] == 0.00025


def test_validation_leaves_the_training_noise_alone(opt):
    drawn = []
    for validates in (False, True):
        model = make(opt)
        if validates:
            model.validation(DataLoader(Images()), 1, None)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_state_of_an_earlier_version_still_resumes(opt, tmp_path):
    model = make(opt)
    model.save(0, 2)
    path = tmp_path / 'training_states' / '2.state'
    state = {
        key: value
        for key, value in torch.load(path, weights_only=True).items()
        if key in ('epoch', 'iter', 'optimizers', 'schedulers')
    }
    make(opt).resume_training(state)
