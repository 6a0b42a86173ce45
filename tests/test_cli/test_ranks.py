"""Several processes: whatever starts them, and what becomes of the others when one is lost."""
import copy
import cv2
import os
import pytest
import re
import signal
import socket
import subprocess
import sys
import time
import torch
from pathlib import Path

from cdnsr_basicsr.ranks import RankWatch
from tests.helpers import ENV, ROOT, iterations, photograph

pytestmark = pytest.mark.slow  # whole runs, in processes of their own


@pytest.fixture
def opt(train_opt):
    """A training of BasicSR's own parts, with a data loader worker."""
    opt = copy.deepcopy(train_opt)
    opt.update(model_type='SRModel', network_g=opt['network_g']['branches'][0])
    del opt['tile'], opt['train']['class_opt'], opt['train']['average_opt']
    opt['datasets']['train'].update(type='PairedImageDataset', num_worker_per_gpu=1, batch_size_per_gpu=2)
    opt['logger'].update(use_tb_logger=False)
    opt['val'].update(val_freq=4)
    return opt


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def start(command, **env):
    env = {**ENV, **env}
    return subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def by_hand(name, launcher='pytorch', **more):
    """Two processes without any program that looks after them."""
    port, processes = str(free_port()), []
    for rank in ('0', '1'):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port, **more)
        command = [sys.executable, '-m', 'cdnsr_basicsr', 'train', '-opt', name, '--launcher', launcher]
        processes.append(start(command, **env))
    return processes


def outputs(processes, timeout=120):
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_dist_train(work, opt, write):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    command = ['bash', ROOT / 'scripts/dist_train.sh', 2, write(opt)]
    output, = outputs([start(command, PATH=path)])
    assert iterations(output) == [1, 2, 3, 4], output
    assert (work / 'experiments/tiny/models/net_g_latest.pth').is_file()


@pytest.mark.parametrize('program', [('-m', 'cdnsr_basicsr'), ('command', )])
def test_torchrun(work, opt, write, program):
    if program == ('command', ):  # as pip writes it
        Path('basicsr_command').write_text('import sys\nfrom cdnsr_basicsr.cli import main\n'
                                           'if __name__ == "__main__":\n    sys.exit(main())\n')
        program = ('basicsr_command', )
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    output, = outputs([start([*torchrun, *program, 'train', '-opt', write(opt), '--launcher', 'pytorch'])])
    assert iterations(output) == [1, 2, 3, 4], output
    assert (work / 'experiments/tiny/models/net_g_latest.pth').is_file()


def test_without_torchrun(work, opt, write):
    processes = by_hand(write(opt))
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert iterations(first) == [1, 2, 3, 4] and iterations(second) == []


def test_no_thread_is_left_in_torch_when_python_shuts_down(monkeypatch):
    # one that comes back then aborts the process, after a training that has done all that was asked
    class Store:

        def __init__(self, *args, **kwargs):
            pass

        def set(self, key, word):
            time.sleep(0.3)

        def check(self, keys):
            return False

    def gather(told, mine):
        told[:] = [mine, mine]

    monkeypatch.setattr(torch.distributed, 'TCPStore', Store)
    monkeypatch.setattr(torch.distributed, 'all_gather_object', gather)
    for name, value in (('MASTER_ADDR', '127.0.0.1'), ('MASTER_PORT', '1'), ('BASICSR_RANK_TIMEOUT', '60')):
        monkeypatch.setenv(name, value)
    with RankWatch() as ranks:
        ranks.start(0, 2)
    assert not ranks.talk.is_alive()


def test_slurm(work, opt, write):
    Path('bin').mkdir()
    Path('bin/scontrol').write_text('#!/bin/sh\necho 127.0.0.1\n')
    Path('bin/scontrol').chmod(0o755)
    port, processes = str(free_port()), []
    for rank in ('0', '1'):
        env = dict(SLURM_PROCID=rank, SLURM_NTASKS='2', SLURM_NODELIST='node[1-2]', MASTER_PORT=port)
        env['PATH'] = f'{work}/bin:{os.environ["PATH"]}'
        command = [sys.executable, '-m', 'cdnsr_basicsr', 'train', '-opt', write(opt), '--launcher', 'slurm']
        processes.append(start(command, **env))
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert iterations(first) == [1, 2, 3, 4]


# the command, on a machine that says it has two GPUs; its processes then train on the CPU
TWO_GPUS = 'import sys, torch; torch.cuda.device_count = lambda: 2; from cdnsr_basicsr import cli; ' \
    'sys.exit(cli.main(sys.argv[1:]))'


def on_two_gpus(*arguments):
    return start([sys.executable, '-c', TWO_GPUS, 'train', *arguments])


def test_each_gpu_gets_a_process(work, opt, write):
    name = write({**opt, 'num_gpu': 'auto'})
    process = on_two_gpus('-opt', name, '--force_yml', 'name=both')
    output, = outputs([process], 300)
    assert process.returncode == 0, output
    assert 'Starting a process for each of 2 GPUs' in output and 'world_size: 2' in output
    assert iterations(output) == [1, 2, 3, 4]
    assert Path('experiments/both/models/net_g_latest.pth').is_file()
    process = on_two_gpus('-opt', name, '--force_yml', 'scale=0')
    output, = outputs([process], 300)
    assert process.returncode == 2 and 'basicsr: error: ' in output and 'Traceback' not in output, output


def test_what_ends_the_command_ends_its_processes(work, opt, write):
    opt['train'].update(total_iter=100000)
    opt['train']['scheduler'].update(periods=[100000])
    opt['logger'].update(save_checkpoint_freq=5)
    opt['val'].update(val_freq=100000)
    process = on_two_gpus('-opt', write({**opt, 'num_gpu': 2}))
    states = work / 'experiments/tiny/training_states'
    while process.poll() is None and not list(states.glob('*.state')):
        time.sleep(0.05)
    process.terminate()
    outputs([process], 300)
    number = len(list(states.glob('*.state')))
    time.sleep(2)
    assert process.returncode != 0 and len(list(states.glob('*.state'))) == number


@pytest.mark.parametrize('lost', [0, 1])
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_and_ends_the_others(work, opt, write, lost, how):
    opt['train'].update(total_iter=100000)
    opt['train']['scheduler'].update(periods=[100000])
    opt['logger'].update(save_checkpoint_freq=5)
    opt['val'].update(val_freq=100000)
    processes = by_hand(write(opt), BASICSR_RANK_TIMEOUT='8')
    states = work / 'experiments/tiny/training_states'
    while all(process.poll() is None for process in processes) and not list(states.glob('*.state')):
        time.sleep(0.05)
    begin = time.monotonic()
    os.kill(processes[lost].pid, how)
    other = processes[1 - lost]
    output = other.communicate(timeout=60)[0]
    seconds = time.monotonic() - begin
    processes[lost].kill()
    processes[lost].communicate()
    said = [line for line in output.splitlines() if line.startswith('basicsr: error: ')]
    assert other.returncode == 1 and len(said) == 1, output
    assert said[0].startswith(f'basicsr: error: rank {lost} has not reported for '), output
    assert 'Traceback' not in output.split('Start training')[-1]
    assert seconds < 20  # of 8 that were asked for, on a busy machine
    newest = max(states.glob('[0-9]*.state'), key=lambda path: int(path.stem))
    assert torch.load(newest, weights_only=True)['iter'] == int(newest.stem)


def test_a_rank_that_ends_tells_the_others_why(work, opt, write):
    # one process has fewer data than the other, as on a machine with a half-copied dataset
    write(opt)
    port, processes = str(free_port()), []
    for rank, ratio in (('0', '10'), ('1', '0.01')):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        command = [sys.executable, '-m', 'cdnsr_basicsr', 'train', '-opt', 'opt.yml', '--launcher', 'pytorch']
        command += ['--force_yml', f'datasets:train:dataset_enlarge_ratio={ratio}']
        processes.append(start(command, BASICSR_RANK_TIMEOUT='8', **env))
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [1, 2], first + second
    assert 'do not fill a batch of 2' in second.strip().splitlines()[-1]
    assert 'basicsr: error: rank 1 has ended: datasets.train: 36 images x ' in first


def test_torchrun_starts_again_what_was_killed(work, opt, write):
    """Both processes go on from the newest state, without being told to, and end as if nothing had happened."""
    for kind, side in (('gt', 32), ('lq', 8)):  # one patch: after a resume, an epoch begins again
        Path(kind).mkdir()
        cv2.imwrite(f'{kind}/0.png', photograph(side, side))
    opt['datasets']['train'].update(dataroot_gt='gt', dataroot_lq='lq', io_backend=dict(type='disk'))
    opt['datasets']['train'].update(use_hflip=False, use_rot=False, dataset_enlarge_ratio=400, num_worker_per_gpu=0)
    opt['train'].update(total_iter=60)
    opt['train']['scheduler'].update(periods=[60])
    opt['logger'].update(save_checkpoint_freq=10)
    opt['val'].update(val_freq=1000)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1']
    command = [*torchrun, '-m', 'cdnsr_basicsr', 'train', '--launcher', 'pytorch', '-opt']
    undisturbed = start([*command, write(dict(opt, name='undisturbed'), 'undisturbed.yml')])
    output, = outputs([undisturbed], timeout=240)
    assert undisturbed.returncode == 0 and iterations(output) == list(range(1, 61)), output
    process = start([*command, write(opt)])
    states = work / 'experiments/tiny/training_states'
    while process.poll() is None and not list(states.glob('[0-9]*.state')):
        time.sleep(0.02)
    os.kill(trainings_of(process)[0], signal.SIGKILL)
    output, = outputs([process], timeout=240)
    assert process.returncode == 0, output
    done = iterations(output)
    resumed = int(re.search(r'Resuming training from epoch: \d+, iter: (\d+)', output)[1])
    assert resumed >= 10 and resumed % 10 == 0 and done[resumed - 60:] == list(range(resumed + 1, 61)), output
    assert done[:resumed - 60] == list(range(1, len(done) - 60 + resumed + 1)) and len(done) >= 60, output
    assert sorted(path.name for path in (work / 'experiments').iterdir()) == ['tiny', 'undisturbed']
    for iteration in (*range(10, 70, 10), 'latest'):
        first, second = (
            torch.load(work / f'experiments/{name}/models/net_g_{iteration}.pth', weights_only=True)
            for name in ('tiny', 'undisturbed'))
        for key in ('params', 'params_ema'):
            assert all(torch.equal(value, second[key][name]) for name, value in first[key].items()), (iteration, key)


def trainings_of(process):
    """Process ids of the trainings that torchrun has started, by rank."""
    found = {}
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            parent = int((entry / 'stat').read_text().rpartition(') ')[2].split()[1])
            environment = (entry / 'environ').read_bytes().decode().split('\0')
        except OSError:
            continue
        if parent == process.pid:
            found.update((int(text[5:]), int(entry.name)) for text in environment if text.startswith('RANK='))
    return found
