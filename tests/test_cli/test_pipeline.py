"""Whole runs through the command, each in a process of its own, as a user starts them."""
import contextlib
import copy
import os
import pytest
import random
import re
import signal
import subprocess
import sys
import time
import torch

from cdnsr_basicsr.conversion.convert import load_network
from tests.helpers import ENV, iterations, run, start, tensorboard_tags

pytestmark = pytest.mark.slow  # whole runs, in processes of their own


def test_train_and_test(work, train_opt, write):
    train_opt['val']['save_map'] = True
    output = run('-m', 'cdnsr_basicsr', 'train', '-opt', write(train_opt))
    assert iterations(output) == [1, 2, 3, 4]
    assert 'l_pixel:' in output and 'l_class:' in output and 'l_average:' in output
    assert output.count('Routing val') == 3  # at 2, 4 and the end
    latest = work / 'experiments/tiny/models/net_g_latest.pth'
    assert load_network(str(latest)).upscale == 4
    tags = tensorboard_tags(work / 'tb_logger/tiny')
    assert {'losses/l_pixel', 'losses/l_class', 'losses/l_average', 'tau', 'lr', 'cost', 'entropy'} <= tags['scalars']
    assert {'share_0', 'metrics/val/psnr', 'routing/val/share_2', 'routing/val/cost'} <= tags['scalars']
    assert tags['images'] == {f'val/{i}/{kind}' for i in range(3) for kind in ('sr', 'difficulty_map')}
    assert list((work / 'experiments/tiny/visualization').rglob('*_2_map.png'))

    test_opt = {key: value for key, value in train_opt.items() if key not in ('train', 'logger', 'datasets')}
    test_opt.update(name='tiny_test', datasets=dict(test=train_opt['datasets']['val']))
    test_opt.update(path=dict(pretrain_network_g=str(latest), param_key_g='params_ema', strict_load_g=True))
    test_opt.update(val={**train_opt['val'], 'save_img': True, 'suffix': None})
    output = run('-m', 'cdnsr_basicsr', 'test', '-opt', write(test_opt, 'test.yml'))
    assert re.search(r'# psnr: \d', output) and re.search(r'class 0: [\d.]+ % \(\d+ tiles\)', output)
    names = sorted(path.name for path in (work / 'results/tiny_test/visualization/val').iterdir())
    assert names == sorted(f'{i}_tiny_test{kind}.png' for i in range(3) for kind in ('', '_map'))


STOCK = """
name: stock
model_type: SRModel
scale: 4
num_gpu: 1  # set num_gpu: 0 for cpu mode
manual_seed: 0
datasets:
  train:
    name: train
    type: PairedImageDataset
    dataroot_gt: datasets/train/gt.lmdb
    dataroot_lq: datasets/train/lq.lmdb
    filename_tmpl: '{}'
    io_backend:
      type: lmdb
    gt_size: 32
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 1
    batch_size_per_gpu: 4
    dataset_enlarge_ratio: 10
    prefetch_mode: ~
  val:
    name: val
    type: PairedImageDataset
    dataroot_gt: datasets/val/gt
    dataroot_lq: datasets/val/lq
    io_backend:
      type: disk
  val_2:
    name: again
    type: PairedImageDataset
    dataroot_gt: datasets/val/gt
    dataroot_lq: datasets/val/lq
    io_backend:
      type: disk
network_g:
  type: MSRResNet
  num_in_ch: 3
  num_out_ch: 3
  num_feat: 4
  num_block: 1
  upscale: 4
path:
  pretrain_network_g: ~
  param_key_g: params
  strict_load_g: true
  resume_state: ~
train:
  ema_decay: 0.999
  optim_g:
    type: Adam
    lr: !!float 2e-4
    weight_decay: 0
    betas: [0.9, 0.99]
  scheduler:
    type: MultiStepLR
    milestones: [2, 3]
    gamma: 0.5
  total_iter: 4
  warmup_iter: -1  # no warm up
  pixel_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean
val:
  val_freq: !!float 2
  save_img: false
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 4
      test_y_channel: false
      better: higher
    ssim:
      type: calculate_ssim
      crop_border: 4
      test_y_channel: false
logger:
  print_freq: 1
  save_checkpoint_freq: !!float 2
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~
dist_params:
  backend: nccl
  port: 29500
"""


def test_stock_option_file_runs_unchanged_and_resumes(work, write):
    command = ('-m', 'cdnsr_basicsr', 'train', '-opt', write(STOCK))
    output = run(*command)
    assert iterations(output) == [1, 2, 3, 4] and 'Model [SRModel] is created' in output
    assert output.count('Validation again') == 3
    assert 'there is no CUDA GPU: running on the CPU' in output
    write(STOCK.replace('total_iter: 4', 'total_iter: 6'))
    assert iterations(run(*command, '--auto_resume')) == [5, 6]


def test_branch_is_pretrained_on_its_class(work, train_opt, write):
    opt = copy.deepcopy(train_opt)
    opt.update(model_type='SRModel', network_g=opt['network_g']['branches'][0])
    del opt['tile'], opt['train']['class_opt'], opt['train']['average_opt']
    opt['datasets']['train'].update(label_file='datasets/train/labels_bicubic.txt', classes=[0])
    output = run('-m', 'cdnsr_basicsr', 'train', '-opt', write(opt))
    assert 'Number of train images: 12' in output  # of 36


@pytest.mark.parametrize('resume', [(), ('--auto_resume', )])
def test_the_option_file_that_basicsr_has_copied_can_be_used(work, train_opt, write, resume):
    train_opt['train'].update(total_iter=2)
    experiment = work / 'experiments' / train_opt['name']
    run('-m', 'cdnsr_basicsr', 'train', '-opt', write(train_opt, 'my.yml'))
    assert (experiment / 'my.yml').is_file()
    run('-m', 'cdnsr_basicsr', 'train', '-opt', str(experiment / 'my.yml'), *resume)
    assert (experiment / 'my.yml').is_file() and (experiment / 'models' / 'net_g_latest.pth').is_file()


def test_auto_resume_after_a_kill(work, train_opt, write):
    train_opt['train'].update(total_iter=2000)
    train_opt['train']['scheduler'].update(periods=[2000])
    train_opt['logger'].update(save_checkpoint_freq=3)
    train_opt['val'].update(val_freq=1000)
    command = ('-m', 'cdnsr_basicsr', 'train', '-opt', write(train_opt), '--auto_resume')
    states = work / 'experiments/tiny/training_states'
    process = start(*command)
    while process.poll() is None and len(list(states.glob('[0-9]*.state'))) < 3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    newest = max(int(path.stem) for path in states.glob('[0-9]*.state'))
    assert 9 <= newest < 2000
    (states / '1999.state').write_bytes(b'half')

    train_opt['train'].update(total_iter=newest + 2)
    write(train_opt)
    output = run(*command)
    assert f'iter: {newest}.' in output
    assert iterations(output) == [newest + 1, newest + 2]
    load_network(str(work / 'experiments/tiny/models/net_g_latest.pth'))


# forks a run as soon as it is asked to, without the seconds that importing takes, so that kills hit everything else
FORKING = '''
import os, sys
from cdnsr_basicsr import cli, register
register()
import basicsr.train, torch
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open('run.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(cli.main(['train', '-opt', 'opt.yml', '--auto_resume']))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


@pytest.mark.parametrize('model_type', ['CDNSRModel', 'SRModel'])
def test_killed_at_random_moments(work, train_opt, write, model_type):
    if model_type == 'SRModel':
        train_opt.update(model_type='SRModel', network_g=dict(type='MSRResNet', num_feat=8, num_block=2))
        del train_opt['tile'], train_opt['train']['class_opt'], train_opt['train']['average_opt']
    total = 600
    train_opt['train'].update(total_iter=total)
    train_opt['train']['scheduler'].update(periods=[total])
    train_opt['logger'].update(save_checkpoint_freq=5, use_tb_logger=False)
    train_opt['val'].update(val_freq=25)
    write(train_opt)
    folder = work / 'experiments' / 'tiny'
    moments, reached, longest = random.Random(0), [0], 0.6
    server = subprocess.Popen([sys.executable, '-c', FORKING],
                              env=ENV,
                              stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE,
                              text=True)
    codes = []
    while len(codes) < 10 or codes[-1] != 0:
        server.stdin.write('go\n')
        server.stdin.flush()
        child = int(server.stdout.readline())
        if len(codes) < 10:
            time.sleep(moments.uniform(0.1, longest))
            with contextlib.suppress(ProcessLookupError):  # it is done already
                os.kill(child, signal.SIGKILL)
        codes.append(int(server.stdout.readline()))
        assert len(codes) < 13 and codes[-1] in (0, -signal.SIGKILL), (work / 'run.log').read_text()
        states = [int(path.stem) for path in folder.glob('training_states/[0-9]*.state')]
        for path in [*folder.glob('training_states/[0-9]*.state'), *folder.glob('models/net_g_*.pth')]:
            torch.load(path, weights_only=True)  # whatever has its final name is complete
        reached.append(max(states, default=0))
        longest *= 1.5 if reached[-1] == reached[-2] else 1  # a busy machine gets nowhere before it is killed
    server.stdin.close()
    server.wait()
    assert reached == sorted(reached), 'a killed run lost what was saved before it'
    assert codes.count(-signal.SIGKILL) >= 5 and len(set(reached)) > 3, 'the kills missed'
    assert reached[-1] == total
    state = torch.load(folder / 'training_states' / f'{total}.state', weights_only=True)
    assert state['iter'] == total and state['schedulers'][0]['last_epoch'] == total - 1
    weights = [torch.load(folder / f'models/net_g_{name}.pth', weights_only=True) for name in ('latest', total)]
    for key, value in weights[0]['params'].items():
        assert torch.equal(value, weights[1]['params'][key])
    if model_type == 'CDNSRModel':
        load_network(str(folder / 'models/net_g_latest.pth'))


def test_two_processes_on_cpu_train_one_model(work, train_opt, write):
    # two processes of 2 patches must do what one process of 4 does, in every loss; no augmentation, no noise
    train_opt['network_g']['mixture'] = 'softmax'
    train_opt['train'].update(flops_opt=dict(type='FLOPsLoss', target=0.5), kd_opt=dict(type='KDL1Loss'))
    train_opt['datasets']['train'].update(use_hflip=False, use_rot=False, num_worker_per_gpu=1)
    single = run('-m', 'cdnsr_basicsr', 'train', '-opt', write({**train_opt, 'name': 'single'}))
    train_opt['datasets']['train'].update(batch_size_per_gpu=2)
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    command = ('-m', 'cdnsr_basicsr', 'train', '-opt', write({**train_opt, 'name': 'double'}), '--launcher', 'pytorch')
    output = run(*torchrun, *command)
    assert iterations(output) == iterations(single) == [1, 2, 3, 4]
    assert 'Network: DistributedDataParallel - CDNSR' in output and output.count('Routing val') == 3
    losses = [{
        name: [float(value) for value in re.findall(rf'{name}: ([\d.]+e[+-]\d+)', text)]
        for name in ('l_pixel', 'l_class', 'l_average', 'l_flops', 'l_kd', 'cost', 'entropy', 'share_0')
    } for text in (single, output)]
    weights = []
    for name in ('single', 'double'):
        path = work / 'experiments' / name / 'models' / 'net_g_latest.pth'
        weights.append(torch.load(path, weights_only=True)['params'])
    for name, values in losses[0].items():
        assert len(values) == 4 and losses[1][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], atol=1e-5, rtol=1e-4)


def test_a_process_reports_one_line(work, write):
    process = start('-m', 'cdnsr_basicsr', 'train', '-opt', 'nowhere.yml')
    output = process.communicate()[0]
    assert process.returncode == 2
    assert output.strip() == 'basicsr: error: nowhere.yml: no such option file'
