"""What a training does on its way from the option file to the last iteration, ours and BasicSR's own models alike."""
import contextlib
import copy
import errno
import fcntl
import gc
import logging
import math
import os
import pytest
import shutil
import signal
import subprocess
import sys
import time
import torch

from basicsr.models import lr_scheduler
from cdnsr_basicsr import cli, pipeline
from cdnsr_basicsr.files import RunLock
from cdnsr_basicsr.options import OptionError
from tests.helpers import ENV, iterations, start

pytestmark = pytest.mark.slow  # whole runs, in processes of their own
ARGS = cli.build_parser().parse_args(['train', '-opt', 'a.yml'])


class Run:
    """What a call of the command has left."""

    def __init__(self, code, error, lines):
        self.code, self.error, self.lines = code, error, lines
        self.iterations = iterations('\n'.join(lines))


@pytest.fixture
def train(work, write, capsys, monkeypatch):
    """Trains in this process by an option block."""
    from basicsr.utils.logger import initialized_logger
    lines, logger, handler = [], logging.getLogger('basicsr'), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setitem(initialized_logger, 'basicsr', True)
    monkeypatch.setattr(logger, 'handlers', [handler])
    monkeypatch.setattr(logger, 'level', logging.INFO)

    def train_(opt, *arguments, command='train'):
        lines.clear()
        gc.collect()  # LMDBs of an earlier run, which cannot be opened twice
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', ['basicsr'])
        code = cli.main([command, '-opt', write(opt), *arguments])
        return Run(code, capsys.readouterr().err.strip().splitlines(), list(lines))

    return train_


@pytest.fixture
def opts(train_opt):
    """Trainings of one small network, by our model and by BasicSR's, on the 36 patches or the 3 whole images."""

    def make(model_type, data='LabeledPatchDataset', batch_size=4, enlarge=1, total_iter=20, **train):
        opt = copy.deepcopy(train_opt)
        opt.update(model_type=model_type, network_g=opt['network_g']['branches'][0])
        del opt['tile'], opt['train']['class_opt'], opt['train']['average_opt']
        opt['datasets']['train'].update(type=data, batch_size_per_gpu=batch_size, dataset_enlarge_ratio=enlarge)
        opt['train'].update(total_iter=total_iter, **train)
        opt['train']['scheduler'].update(periods=[total_iter])
        opt['logger'].update(save_checkpoint_freq=6, use_tb_logger=False)
        opt['val'].update(val_freq=1000)
        return opt

    return make


def state(work, iteration):
    return torch.load(work / f'experiments/tiny/training_states/{iteration}.state', weights_only=True)


@pytest.mark.parametrize('model_type,data', [('FastSRModel', 'LabeledPatchDataset'), ('SRModel', 'PairedImageDataset')])
@pytest.mark.parametrize('batch_size,enlarge', [(5, 1), (20, 1), (36, 1), (7, 2)])
def test_training_ends_at_total_iter(train, opts, work, model_type, data, batch_size, enlarge):
    # 36 patches in batches that leave a rest, which BasicSR drops but counts
    run = train(opts(model_type, data, batch_size, enlarge))
    assert run.code == 0 and run.iterations == list(range(1, 21))
    assert (work / 'experiments/tiny/models/net_g_latest.pth').is_file()
    assert state(work, 18)['schedulers'][0]['last_epoch'] == 17


@pytest.mark.parametrize('model_type', ['FastSRModel', 'SRModel'])
@pytest.mark.parametrize('batch_size,enlarge', [(4, 100), (36, 1), (1, 1)])
def test_resumed_training_ends_at_total_iter(train, opts, work, model_type, batch_size, enlarge):
    assert train(opts(model_type, enlarge=1, total_iter=12)).code == 0
    run = train(opts(model_type, batch_size=batch_size, enlarge=enlarge, total_iter=24), '--auto_resume')
    assert run.code == 0 and run.iterations == list(range(13, 25))
    assert state(work, 24)['iter'] == 24


def test_finished_training_is_resumed_without_an_iteration(train, opts, work):
    assert train(opts('SRModel', total_iter=6)).code == 0
    run = train(opts('SRModel', total_iter=6), '--auto_resume')
    assert run.code == 0 and run.iterations == []
    run = train(opts('SRModel', total_iter=5), '--auto_resume')
    assert run.code == 2 and 'train.total_iter: is 5, but ' in run.error[-1]
    assert 'already at iteration 6' in run.error[-1]


@pytest.mark.parametrize('data', ['LabeledPatchDataset', 'PairedImageDataset'])
def test_no_full_batch_is_refused_for_every_dataset(train, opts, work, data):
    run = train(opts('SRModel', data, batch_size=37))
    assert run.code == 2 and len(run.error) == 1
    assert 'datasets.train: 36 images x dataset_enlarge_ratio 1 do not fill a batch of 37' in run.error[0]
    assert not list(work.glob('experiments/tiny/models/*'))


def test_no_full_batch_in_each_of_several_processes(opts, work):
    from basicsr import train as basicsr_train
    opt = opts('SRModel', batch_size=20)
    opt.update(num_gpu=0, dist=True, rank=1, world_size=2)
    for phase, data in opt['datasets'].items():
        data.update(phase=phase, scale=4)
    with contextlib.ExitStack() as stack:
        run = pipeline._Run(ARGS, '', pipeline.RankWatch(), stack)
        run.opt = opt
        with pytest.raises(OptionError, match='do not fill a batch of 20 in each of 2 processes'):
            run.of_training(basicsr_train)['create_train_val_dataloader'](opt, logging.getLogger('quiet'))


@pytest.mark.parametrize('gpus,length', [(1, 9), (2, 4), (4, 2)])
def test_iterations_of_several_gpus_without_a_launcher(gpus, length, opts, work, monkeypatch):
    from basicsr import train as basicsr_train
    opt = opts('SRModel')
    opt.update(num_gpu=gpus, dist=False, rank=0, world_size=1)
    for phase, data in opt['datasets'].items():
        data.update(phase=phase, scale=4)
    with contextlib.ExitStack() as stack:
        run = pipeline._Run(ARGS, '', pipeline.RankWatch(), stack)
        run.opt, run.current_iter, run.start_epoch = opt, 3, 7
        create = run.of_training(basicsr_train)['create_train_val_dataloader']
        loader, _, _, last_epoch, total_iter = create(opt, logging.getLogger('quiet'))
    assert len(loader) == length
    done = 3 + (last_epoch + 1 - 7) * length  # epochs 7 to last_epoch, if nothing stopped them at total_iter
    assert total_iter == 20 and done - length < 20 <= done


def test_data_that_end_too_soon_are_no_finished_training(train, opts, work, monkeypatch):
    from torch.utils.data import DataLoader
    monkeypatch.setattr(DataLoader, '__len__', lambda self: 100)  # a dataset that promises more than it has
    run = train(opts('SRModel'))
    assert run.code == 1 and 'the data ended at iteration 9 of 20' in run.error[-1]
    assert not (work / 'experiments/tiny/models/net_g_latest.pth').exists()


@pytest.mark.parametrize('model_type', ['FastSRModel', 'SRModel'])
def test_loss_that_is_not_finite_ends_the_training(train, opts, work, model_type):
    run = train(opts(model_type, total_iter=12))
    assert run.code == 0
    opt = opts(model_type, total_iter=2000, optim_g=dict(type='Adam', lr=1e6))
    opt['logger'].update(print_freq=100, save_checkpoint_freq=5)
    run = train(opt, '--auto_resume')
    assert run.code == 1 and len(run.error) == 1
    # noticed by the weights when they were to be saved, before the first losses are printed
    assert 'iteration 15: net_g contains values that are not finite' in run.error[0]
    assert 'the newest good state is that of iteration 12' in run.error[0]
    for path in [*work.glob('experiments/tiny/models/*.pth')]:
        assert all(torch.isfinite(value).all() for value in torch.load(path)['params'].values()), path
    opt['logger'].update(print_freq=2, save_checkpoint_freq=1000)
    run = train(opt, '--auto_resume')
    assert run.code == 1 and 'iteration 14: l_pix is not finite (nan)' in run.error[0]
    assert 'Best' not in ''.join(run.lines)
    run = train(opts(model_type, total_iter=24), '--auto_resume')
    assert run.code == 0 and run.iterations == list(range(13, 25))


def test_debug_goes_on_with_what_is_not_finite(train, opts):
    opt = opts('SRModel', total_iter=16, optim_g=dict(type='Adam', lr=1e6))
    assert train(opt, '--debug').code == 0


@pytest.mark.parametrize('model_type', ['FastSRModel', 'CDNSRModel'])
def test_a_single_loss_that_was_not_finite_is_noticed_at_the_next_print(train, opts, train_opt, monkeypatch,
                                                                        model_type):
    from cdnsr_basicsr.models.fast_training import FastTraining
    feed_data = FastTraining.feed_data
    batches = []

    def feed(self, data):
        batches.append(data)
        if len(batches) == 2:  # an L1 loss of infinity has a gradient of 1: the network stays finite
            data = dict(data, gt=data['gt'].index_fill(0, torch.tensor([0]), math.inf))
        feed_data(self, data)

    monkeypatch.setattr(FastTraining, 'feed_data', feed)
    opt = opts(model_type) if model_type == 'FastSRModel' else train_opt
    opt['logger'].update(print_freq=4, save_checkpoint_freq=3)
    opt['val'].update(val_freq=1000)
    run = train(opt)
    assert run.code == 1 and 'iteration 4: l_pix' in run.error[0] and 'is not finite' in run.error[0]


SCHEDULES = [
    dict(type='CosineAnnealingRestartLR', periods=[40], restart_weights=[1], eta_min=1e-7),
    dict(type='CosineAnnealingRestartLR', periods=[10, 30], restart_weights=[1, 0.5], eta_min=1e-5),
    dict(type='MultiStepLR', milestones=[5, 10, 15], gamma=0.5),
    dict(type='MultiStepRestartLR', milestones=[3, 14], gamma=0.1, restarts=[0, 8], restart_weights=[2, 0.5]),
]


def learning_rates(schedule, lr, count):
    """Of each iteration, by the scheduler as it is without any resuming."""
    arguments = {key: value for key, value in schedule.items() if key != 'type'}
    kind = schedule['type'].replace('MultiStepLR', 'MultiStepRestartLR')
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler, rates = getattr(lr_scheduler, kind)(optimizer, **arguments), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize('after', SCHEDULES)
@pytest.mark.parametrize('before', SCHEDULES[:1])
def test_the_file_s_learning_rate_and_schedule_hold_after_a_resume(train, opts, work, before, after):
    opt = opts('SRModel', total_iter=12)
    opt['train'].update(scheduler=dict(before), optim_g=dict(type='Adam', lr=1e-3, betas=[0.9, 0.99]))
    assert train(opt).code == 0
    opt['train'].update(total_iter=18, scheduler=dict(after))
    opt['train']['optim_g'].update(lr=3e-4, betas=[0.8, 0.95])
    run = train(opt, '--auto_resume')
    assert run.code == 0 and run.iterations == list(range(13, 19))
    said = [line for line in run.lines if 'applies from here on' in line]
    assert len(said) == 1 and 'betas' in said[0] and 'lr' in said[0]
    group = state(work, 18)['optimizers'][0]['param_groups'][0]
    assert list(group['betas']) == [0.8, 0.95] and group['initial_lr'] == 3e-4
    assert group['lr'] == pytest.approx(learning_rates(after, 3e-4, 18)[-1], rel=1e-6)
    assert state(work, 18)['optimizers'][0]['state'][0]['step'] == 18  # the moments went on


@pytest.mark.parametrize('model_type', ['FastSRModel', 'SRModel'])
def test_the_file_s_weight_of_a_loss_holds_after_a_resume(train, opts, model_type):
    opt = opts(model_type, total_iter=6)
    assert train(opt).code == 0
    opt = opts(model_type, total_iter=12, pixel_opt=dict(type='L1Loss', loss_weight=1000))
    run = train(opt, '--auto_resume')
    losses = [float(line.split('l_pix:')[1].split()[0]) for line in run.lines if 'l_pix:' in line]
    assert run.code == 0 and len(losses) == 6 and min(losses) > 10


def test_an_unchanged_file_resumes_exactly_and_says_nothing(train, opts, work):
    opt = opts('FastSRModel', total_iter=18)
    assert train(opt).code == 0
    whole = state(work, 18)
    (work / 'experiments/tiny/training_states/18.state').unlink()
    run = train(opt, '--auto_resume')
    assert run.iterations == list(range(13, 19)) and not [line for line in run.lines if 'as in the file' in line]
    assert state(work, 18)['schedulers'] == whole['schedulers']
    assert state(work, 18)['optimizers'][0]['param_groups'] == whole['optimizers'][0]['param_groups']


def test_another_optimizer_begins_without_moments(train, opts, monkeypatch):
    from cdnsr_basicsr.models import FastSRModel
    adam = FastSRModel.get_optimizer
    monkeypatch.setattr(  # which BasicSR 1.4.2 does not know
        FastSRModel, 'get_optimizer',
        lambda self, optim_type, params, lr, **kwargs: torch.optim.SGD(params, lr, **kwargs)
        if optim_type == 'SGD' else adam(self, optim_type, params, lr, **kwargs))
    opt = opts('FastSRModel', total_iter=6)
    assert train(opt).code == 0
    opt = opts('FastSRModel', total_iter=12)
    opt['train'].update(optim_g=dict(type='SGD', lr=1e-3, momentum=0.9))
    run = train(opt, '--auto_resume')
    assert run.code == 0 and run.iterations == list(range(7, 13)), run.error
    assert any('type (SGD starts without moments)' in line for line in run.lines)


def test_a_state_of_other_parameters_is_refused(train, opts, work):
    opt = opts('FastSRModel', total_iter=6)
    assert train(opt).code == 0
    # weights that fit, a state that does not
    path = work / 'experiments/tiny/training_states/6.state'
    content = torch.load(path, weights_only=True)
    content['optimizers'][0]['param_groups'][0]['params'].pop()
    torch.save(content, path)
    run = train(opts('FastSRModel', total_iter=12), '--auto_resume')
    assert run.code == 2 and 'path.resume_state: belongs to a training of other parameters' in run.error[-1]


@contextlib.contextmanager
def locked_elsewhere(folder):
    """Another process that has a folder, as a run has."""
    code = ('import sys, time\nfrom pathlib import Path\nfrom cdnsr_basicsr.files import RunLock\n'
            'with RunLock(Path(sys.argv[1])):\n    print("locked", flush=True)\n    time.sleep(600)')
    process = subprocess.Popen([sys.executable, '-c', code, str(folder)], env=ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'locked\n'
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_second_run_of_a_name_is_refused_while_the_first_is_alive(train, opts, work):
    opt = opts('FastSRModel', total_iter=2)
    assert train(opt).code == 0
    before = sorted(path.name for path in work.glob('experiments/*'))
    with locked_elsewhere(work / 'experiments/tiny') as first:
        for arguments in ((), ('--auto_resume', )):
            run = train(opt, *arguments)
            assert run.code == 2 and len(run.error) == 1
            assert f'belongs to a run that is still active (process {first.pid} on ' in run.error[0]
        assert sorted({path.name for path in work.glob('experiments/*')} - {'.tiny.lock'}) == before
        first.send_signal(signal.SIGKILL)  # which no program can clean up after
        first.wait()
        assert train(opt).code == 0
    assert not list(work.glob('experiments/.*'))


def test_runs_of_one_name_within_a_second_are_all_kept(train, opts, work, monkeypatch):
    begin = time.time()  # seconds pass five times as slowly
    monkeypatch.setattr('basicsr.utils.misc.get_time_str', lambda: str(int(begin + (time.time() - begin) / 5)))
    for _ in range(4):
        assert train(opts('FastSRModel', total_iter=1)).code == 0
    folders = [path for path in work.glob('experiments/tiny*') if (path / 'models/net_g_latest.pth').is_file()]
    assert len(folders) == 4


def test_second_test_of_a_name_is_refused(train, opts, work):
    opt = opts('FastSRModel', total_iter=2)
    assert train(opt).code == 0
    opt['path'].update(pretrain_network_g='experiments/tiny/models/net_g_latest.pth')
    opt['datasets'] = dict(test=opt['datasets']['val'])
    with locked_elsewhere(work / 'results/tiny'):
        run = train(opt, command='test')
        assert run.code == 2 and 'results/tiny: belongs to a run that is still active' in run.error[0]
    assert train(opt, command='test').code == 0


def test_a_drive_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):

    def lockf(descriptor, operation):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'lockf', lockf)
    with RunLock(tmp_path / 'run'):
        assert 'cannot be locked on this drive (No locks available)' in capsys.readouterr().out


def test_lock_survives_that_its_owner_removes_the_file_meanwhile(tmp_path, monkeypatch):
    lockf, calls = fcntl.lockf, []

    def late(descriptor, operation):
        lockf(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / '.run.lock').unlink()  # as its former owner does

    monkeypatch.setattr(fcntl, 'lockf', late)
    with RunLock(tmp_path / 'run'):
        assert len(calls) == 2
        with pytest.raises(AssertionError), locked_elsewhere(tmp_path / 'run'):
            pass


@pytest.mark.parametrize('model_type', ['FastSRModel', 'SRModel'])
def test_training_goes_on_without_tensorboard(train, opts, work, model_type, monkeypatch):
    opt = opts(model_type, total_iter=12)
    opt['logger'].update(use_tb_logger=True)
    from tensorboard.summary.writer.record_writer import RecordWriter
    write, written = RecordWriter.write, []

    def write_until_full(self, data):
        written.append(data)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, 'No space left on device')
        write(self, data)

    monkeypatch.setattr(RecordWriter, 'write', write_until_full)
    run = train(opt)
    assert run.code == 0 and run.iterations == list(range(1, 13))
    said = [line for line in run.lines if 'TensorBoard cannot write to' in line]
    assert len(said) == 1 and 'No space left on device' in said[0] and 'goes on without it' in said[0]
    assert 'Traceback' not in ''.join(run.error)


def test_training_goes_on_where_tensorboard_has_no_folder(train, opts, work):
    opt = opts('SRModel', total_iter=2)
    opt['logger'].update(use_tb_logger=True)
    (work / 'tb_logger').write_text('a file')
    run = train(opt)
    assert run.code == 0 and run.iterations == [1, 2] and run.error == []
    assert len([line for line in run.lines if 'TensorBoard cannot be used' in line]) == 1


def test_a_log_file_that_is_full_is_said_once(capsys, monkeypatch):
    logger, handler = logging.getLogger('basicsr'), logging.FileHandler('/dev/full')
    monkeypatch.setattr(logger, 'handlers', [handler])
    with contextlib.ExitStack() as stack:
        pipeline._Run(ARGS, '', pipeline.RankWatch(), stack)._tb_logger(lambda opt: None, {})
        for _ in range(3):
            logger.error('a line')
    handler.stream = None  # which cannot be flushed
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and '/dev/full cannot be written: ' in said[0] and 'No space left on device' in said[0]


def test_a_vanished_experiment_is_made_again(train, opts, work, monkeypatch):
    from cdnsr_basicsr.models import FastSRModel
    step = FastSRModel.optimize_parameters

    def optimize_parameters(self, current_iter):
        if current_iter == 3:
            shutil.rmtree(work / 'experiments')
        step(self, current_iter)

    monkeypatch.setattr(FastSRModel, 'optimize_parameters', optimize_parameters)
    run = train(opts('FastSRModel', total_iter=6))
    assert run.code == 0 and any('has disappeared and is created again' in line for line in run.lines)
    assert (work / 'experiments/tiny/models/net_g_latest.pth').is_file() and state(work, 6)['iter'] == 6


@pytest.mark.parametrize('model_type', ['FastSRModel', 'SRModel'])
def test_a_checkpoint_that_cannot_be_written_ends_the_training(train, opts, work, model_type, monkeypatch):
    assert train(opts(model_type, total_iter=6)).code == 0
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between BasicSR's tries
    save = torch.save

    def full(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        os.truncate(path, 100)
        raise RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')

    monkeypatch.setattr(torch, 'save', full)
    run = train(opts(model_type, total_iter=12), '--auto_resume')
    assert run.code == 1 and 'cannot be written; is the disk full?' in run.error[-1]
    assert 'Traceback' not in ''.join(run.error)
    monkeypatch.undo()
    assert state(work, 6)['iter'] == 6
    assert sorted(path.name
                  for path in work.glob('experiments/tiny/*/*')) == ['6.state', 'net_g_6.pth', 'net_g_latest.pth']


def test_sigterm_while_importing_ends_at_once(tmp_path):
    module = tmp_path / 'slow_module.py'
    module.write_text('import time\nprint("importing", flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n'
                      '    raise ImportError("half imported")\n')
    code = ('import sys\nfrom cdnsr_basicsr import cli\nfrom cdnsr_basicsr.cli import models\nsys.path.insert(0, ".")\n'
            'def run(args):\n    import slow_module\n'
            'models.run = run\nsys.exit(cli.main(["models"]))')
    process = start('-c', code, cwd=tmp_path)
    assert process.stdout.readline() == 'importing\n'
    time.sleep(0.1)
    process.terminate()
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 143 and output == ''


def test_stock_state_saving_needs_no_rank(tmp_path):
    from basicsr.models.sr_model import SRModel
    opt = dict(num_gpu=0, dist=False, is_train=True, path=dict(models=str(tmp_path), training_states=str(tmp_path)))
    opt.update(network_g=dict(type='MSRResNet', num_feat=4, num_block=1), train=dict(pixel_opt=dict(type='L1Loss')))
    opt['train'].update(optim_g=dict(type='Adam', lr=1e-3), scheduler=dict(type='MultiStepLR', milestones=[2]))
    model = SRModel(opt)
    model.save(0, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['3.state', 'net_g_3.pth']


def test_option_error_of_a_wrong_rank_timeout(monkeypatch):
    from cdnsr_basicsr.ranks import read_silence
    assert read_silence() == 60
    for text in ('x', '0', 'nan', '-1'):
        monkeypatch.setenv('BASICSR_RANK_TIMEOUT', text)
        with pytest.raises(OptionError, match='expected a number of seconds'):
            read_silence()
