"""Two processes train one network, and validate as one process does."""
import copy
import pytest
import torch
from torch.utils.data import DataLoader

from basicsr.models import build_model
from tests.helpers import Images, batch, carn, fsrcnn, pcsr, spread, sums, two_processes

pytestmark = pytest.mark.slow  # whole runs, in processes of their own


def first_images(count):
    dataset = Images()
    dataset.__class__ = type('Images', (Images, ), {'__len__': lambda self: count})
    return dataset


def validate(model, count):
    """Metrics, best metrics and what is logged."""
    scalars = {}
    model.get_bare_model(model.net_g).load_state_dict(torch.load('net.pth'))

    class Logger:

        def add_scalar(self, name, value, current_iter):
            scalars[name] = float(value)

        def add_image(self, *args, **kwargs):
            pass

    model.validation(DataLoader(first_images(int(count))), 4, Logger() if model.opt['rank'] == 0 else None)
    return {
        'metrics': {
            key: float(value)
            for key, value in model.metric_results.items()
        },
        'scalars': scalars,
        'best': float(model.best_metric_results['images']['psnr']['val']),
        'iter': model.best_metric_results['images']['psnr']['iter']
    }


def single_train_block(opt):
    """What training one network needs, of the options of a CDNSR."""
    return {key: opt['train'][key] for key in ('total_iter', 'optim_g', 'scheduler', 'pixel_opt')}


def of_cdnsr(opt):
    return opt


def of_single_network(opt):
    """Without EMA, so that what is validated is trained by DistributedDataParallel, which broadcasts CARN_M's mean."""
    del opt['tile']
    return dict(opt, model_type='FastSRModel', network_g=carn(), train=dict(single_train_block(opt), ema_decay=0))


def of_pcsr(opt):
    train = dict(single_train_block(opt), phase=1, ema_decay=0)
    return dict(opt, model_type='PCSRModel', network_g=pcsr(fsrcnn(8)), tile=dict(patch_size=24, step=12), train=train)


@pytest.mark.parametrize('make,count,shares', [(of_cdnsr, '3', 3), (of_cdnsr, '1', 3), (of_single_network, '3', 0),
                                               (of_pcsr, '3', 2), (of_pcsr, '1', 2)])
def test_two_processes_validate_as_one(opt, tmp_path, make, count, shares, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opt = make(opt)
    model = build_model(copy.deepcopy(opt))
    if make is of_cdnsr:
        spread(model.net_g)
    torch.save(model.net_g.state_dict(), 'net.pth')
    single = validate(model, count)
    for rank, shared in enumerate(two_processes(opt, tmp_path, validate, count)):
        assert shared['metrics'] == pytest.approx(single['metrics'], abs=1e-6)
        assert shared['best'] == pytest.approx(single['best'], abs=1e-6) and shared['iter'] == 4
        assert shared['scalars'] == ({} if rank else pytest.approx(single['scalars'], abs=1e-6))
    assert len([name for name in single['scalars'] if 'share' in name]) == shares


def train(model):
    """Sums of the weights after some steps on other data in each process."""
    for i in range(1, 4):
        data = batch(4)
        lq = torch.rand_like(data['lq'])
        model.feed_data(dict(data, lq=lq))
        model.optimize_parameters(i)
    model.save(0, 3)
    nets = {'net': model.get_bare_model(model.net_g), 'head': model.get_bare_model(model.losses['cs'])}
    return {
        'sums': {
            name: [param.double().sum().item() for param in net.parameters()]
            for name, net in nets.items()
        },
        'weight': model.losses['average'].loss_weight,
        'drawn': lq.sum().item()
    }


def test_two_processes_train_mixed_branches(opt, tmp_path):
    """A single CARN_M: DistributedDataParallel broadcasts its mean, alone."""
    etds = {'type': 'ETDS', 'num_feat': 6, 'num_block': 1}
    opt['network_g']['branches'] = [etds, dict(etds, num_feat=8), carn()]
    first, second = two_processes(opt, tmp_path, sums)
    assert first['sums'] == second['sums'] and first['drawn'] != second['drawn']


def test_two_processes_keep_one_network_one_head_and_one_guard(opt, tmp_path):
    opt['train'].update(feature_extractor=dict(weights='random'), balance='auto', collapse_iter=1, collapse_share=0.34)
    opt['train'].update(cs_opt=dict(type='ContrastLoss', layer='relu1_1', num_dim=8, num_negatives=2))
    first, second = two_processes(opt, tmp_path, train)
    assert first['sums'] == second['sums'] and first['weight'] == second['weight'] > 6
    assert first['drawn'] != second['drawn']
    state = torch.load(tmp_path / 'training_states' / '3.state', weights_only=True)
    states = [process['random_state']['torch'] for process in state['processes']]
    assert len(states) == 2 and not torch.equal(*states)
    assert set(state['losses']['cs']) == {'head.0.weight', 'head.0.bias', 'head.2.weight', 'head.2.bias'}
