"""Names of models where option files and `basicsr label` name checkpoints."""
import copy
import os
import pytest
import shutil
import torch
from pathlib import Path

from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import load_checkpoint, weights_of
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.models import CDNSRModel
from tests.helpers import fsrcnn


@pytest.fixture
def still_opt(train_opt):
    """A training that changes nothing, without TensorBoard."""
    opt = copy.deepcopy(train_opt)
    opt['train'].update(total_iter=1, optim_g=dict(type='Adam', lr=0.), ema_decay=0)
    opt['logger'].update(use_tb_logger=False)
    opt['manual_seed'] = 5  # another than that of the shipped networks
    del opt['datasets']['val'], opt['val']
    return opt


def trained():
    path = 'experiments/tiny/models/net_g_latest.pth'
    return weights_of(load_checkpoint(path), path, 'params')


def same(weights, name):
    expected = load_network(name).state_dict()
    return list(weights) == list(expected) and all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_training_starts_from_a_shipped_model(work, still_opt, write, shipped):
    still_opt['path']['pretrain_network_g'] = 'tiny_cdnsr'
    assert cli.main(['train', '-opt', write(still_opt)]) == 0
    assert same(trained(), 'tiny_cdnsr')


@pytest.mark.slow
def test_a_model_of_basicsr_starts_from_a_shipped_model(work, still_opt, write, shipped):
    opt = dict(still_opt, model_type='SRModel', network_g=fsrcnn(2))
    opt['train'] = {key: value for key, value in opt['train'].items() if key not in ('class_opt', 'average_opt')}
    opt['datasets']['train'].update(type='PairedImageDataset')
    opt['path'].update(pretrain_network_g='tiny_fsrcnn', param_key_g='params_ema')
    assert cli.main(['train', '-opt', write(opt)]) == 0
    assert same(trained(), 'tiny_fsrcnn')


@pytest.mark.slow
def test_branches_start_from_models_of_the_users_and_of_this_package(work, still_opt, write, shipped):
    Path('experiments/pretrained_models').mkdir(parents=True)
    shutil.copy(shipped['tiny_fsrcnn'].path, 'experiments/pretrained_models/mine.pth')
    still_opt['network_g']['branches'] = [fsrcnn(2) for _ in range(3)]
    still_opt['path']['pretrain_network_branches'] = ['tiny_fsrcnn', 'mine', str(shipped['tiny_fsrcnn'].path)]
    assert cli.main(['train', '-opt', write(still_opt)]) == 0
    for i in range(3):
        start = f'branches.{i}.'
        branch = {key[len(start):]: value for key, value in trained().items() if key.startswith(start)}
        assert same(branch, 'tiny_fsrcnn')


@pytest.mark.slow
def test_a_teacher_by_name(work, still_opt, write, shipped, monkeypatch):
    loaded, original = [], CDNSRModel.load_network

    def watch(self, net, *args, **kwargs):
        original(self, net, *args, **kwargs)
        loaded.append(copy.deepcopy(self.get_bare_model(net).state_dict()))

    monkeypatch.setattr(CDNSRModel, 'load_network', watch)
    still_opt.update(network_t=fsrcnn(2))
    still_opt['train'].update(kd_opt=dict(type='KDL1Loss'))
    still_opt['path']['pretrain_network_t'] = 'tiny_fsrcnn'
    assert cli.main(['train', '-opt', write(still_opt)]) == 0
    assert len(loaded) == 1 and same(loaded[0], 'tiny_fsrcnn')


def test_an_unknown_name_in_an_option_file(work, still_opt, write, shipped, capsys):
    still_opt['path']['pretrain_network_g'] = 'tiny_cdnr'
    assert cli.main(['train', '-opt', write(still_opt)]) == 2
    error = capsys.readouterr().err.strip()
    assert error == (
        'basicsr: error: opt.yml: path.pretrain_network_g: tiny_cdnr: no such checkpoint file, and no model '
        'of this name; did you mean tiny_cdnsr? known: tiny_cdnsr, tiny_fsrcnn')
    assert not os.path.exists('experiments')


@pytest.mark.slow
def test_labels_by_a_name(work, shipped, capsys):
    shutil.copytree('datasets/train', 'own')
    assert cli.main(['label', '-d', 'own', '--by', 'branches', '-m', 'tiny_cdnsr']) == 0
    assert 'Wrote own/labels_branches.txt: class 0: ' in capsys.readouterr().out
