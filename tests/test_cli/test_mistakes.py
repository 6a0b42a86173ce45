"""One clear line, exit code 2, no traceback: whatever is wrong with an option file or a flag."""
import copy
import pytest
import shutil
import sys
import yaml
from pathlib import Path

from cdnsr_basicsr import cli
from cdnsr_basicsr.options import OptionError, parse_force_yml, read_options, resolve_options
from cdnsr_basicsr.options.reading import apply_force_yml


def set_in(opt, key, value):
    block = opt
    *way, last = key.split(':')
    for name in way:
        block = block[int(name)] if isinstance(block, list) else block[name]
    last = int(last) if isinstance(block, list) else last
    if value is None:
        del block[last]
    else:
        block[last] = value


MISTAKES = [
    ('network_g:branches:0', dict(type='SwinIR', window_size=7),
     'network_g.branches[0].img_size: expected a multiple of window_size, 7, such as 63, but got 64'),
    ('network_g:branches:0', dict(type='SwinIR', window_size=0), 'network_g.branches[0].window_size: expected an'),
    ('model_type', 'CDNSRModell', "model_type: unknown type 'CDNSRModell'; accepted: CDNSRModel, "),
    ('network_g:type', 'CARN', "network_g.type: unknown type 'CARN'; accepted: BasicVSR, "),
    ('network_g:num_classes', 3,
     'network_g.num_classes: unknown key; accepted: branches, classifier, mixture, upscale'),
    ('network_g:mixture', 'hard', 'network_g.mixture: accepted: gumbel, softmax'),
    ('network_g:branches:1:nf', 52, 'network_g.branches[1].nf: unknown key; accepted: num_feat, '),
    ('network_g:branches:2:type', 'CARN_L', "network_g.branches[2].type: unknown type 'CARN_L'"),
    ('network_g:branches:0:num_feat', 'abc', 'network_g.branches[0].num_feat: expected an integer from 1 to 65536'),
    ('network_g:classifier:width', 8, 'network_g.classifier.width: unknown key; accepted: num_classes, num_feat'),
    ('network_g:classifier', None, "network_g: key 'classifier' is missing"),
    ('network_g:branches:0:upscale', 3, 'network_g.branches[0].upscale: must be 4'),
    ('scale', 3, 'scale: is 3, but network_g.upscale is 4'),
    ('tiles', {}, 'option file.tiles: unknown key; accepted: datasets, dist_params, '),
    ('path:pretrained', 'a.pth', 'path.pretrained: unknown key; accepted: experiments_root, '),
    ('tile:overlap', 4, 'tile.overlap: unknown key; accepted: patch_size, step'),
    ('train:class_opt:weight', 1, 'train.class_opt.weight: unknown key; accepted: loss_weight'),
    ('train:class_opt:type', 'ClassLos', "train.class_opt.type: unknown type 'ClassLos'; accepted: AverageLoss, "),
    ('train:pixel_opt', None, "train.pixel_opt: a loss is needed: pixel_opt or branch_opt"),
    ('train:flops', {}, 'train.flops: unknown key; accepted: average_opt, '),
    ('train:freeze', ['all'], 'train.freeze: accepted: [branches], [classifier] or []'),
    ('val:save_maps', True, 'val.save_maps: unknown key; accepted: metrics, '),
    ('val:metrics:psnr:type', 'psnr', "val.metrics.psnr.type: unknown type 'psnr'; accepted: calculate_niqe, "),
    ('datasets:train:type', 'LmdbDataset', "datasets.train.type: unknown type 'LmdbDataset'"),
    ('datasets:train:class', [0], 'datasets.train.class: unknown key; accepted: balance, '),
    ('datasets:train:classes', [0], 'datasets.train.classes: needs label_file'),
    ('datasets:train:dataroot_gt', 'no/gt.lmdb', 'datasets.train.dataroot_gt: no such file or folder: no/gt.lmdb'),
    ('datasets:val:dataroot_lq', 'no/lq', 'datasets.val.dataroot_lq: no such file or folder: no/lq'),
    ('datasets:train', None, 'datasets.train: is missing'),
    ('path:pretrain_network_g', 'no.pth', 'path.pretrain_network_g: no.pth: no such checkpoint file'),
    ('path:resume_state', 'no.state', 'path.resume_state: no such file or folder: no.state'),
    ('path:pretrain_network_branches', ['no.pth'] * 3,
     'path.pretrain_network_branches: no.pth: no such checkpoint file'),
    ('path:pretrain_network_branches', 'no.pth', 'path.pretrain_network_branches: expected a list of 3'),
    ('train', 'x', "train: expected a block of options, but got 'x'"),
    ('val:metrics', ['psnr'], 'val.metrics: expected a block of options'),
    ('val:metrics:psnr:crop_border', None, "val.metrics.psnr: key 'crop_border' is missing"),
    ('val:val_freq', None, "val: key 'val_freq' is missing"),
    ('logger:print_freq', None, "logger: key 'print_freq' is missing"),
    ('train:total_iter', 'abc', "train.total_iter: expected a whole number from 1 to 100000000, but got 'abc'"),
    ('train:freeze', ['branches'], 'train.freeze: branches without weights would stay random'),
    ('datasets:train:batch_size_per_gpu', 'x',
     'datasets.train.batch_size_per_gpu: expected an integer from 1 to 65536'),
    ('datasets:train:gt_size', None, "datasets.train: key 'gt_size' is missing"),
    ('datasets:val:name', None, "datasets.val: key 'name' is missing"),
    ('network_g:branches', [1, 2], "network_g.branches[0]: expected a block with a type, but got 1"),
    ('scale', '4', "scale: expected a number from 1 to 16, but got '4'"),
    ('name', None, 'name: is missing from the option file'),
    ('name', '../x', "name: expected the name of a folder, but got '../x'"),
    ('manual_seed', 'abc', "manual_seed: expected an integer from 0 to 2147483648, but got 'abc'"),
    ('logger:save_checkpoint_freq', 0, 'logger.save_checkpoint_freq: expected a whole number from 1 to'),
    ('logger:print_freq', 'abc', "logger.print_freq: expected a whole number from 1 to"),
    ('val:val_freq', 0, 'val.val_freq: expected a whole number from 1 to'),
    ('val:metrics:psnr:crop_border', -4, 'val.metrics.psnr.crop_border: expected an integer from 0 to'),
    ('val:metrics:psnr:better', 'hihger', 'val.metrics.psnr.better: accepted: higher, lower'),
    ('train:total_iter', 1000000, 'train.scheduler.periods: end at iteration '),
    ('train:warmup_iter', 'abc', 'train.warmup_iter: expected a whole number from -1 to'),
    ('train:ema_decay', 2, 'train.ema_decay: expected a number from 0 to 1, but got 2'),
    ('logger', None, 'logger: is missing from the option file'),
    ('train:optim_g:lr', 'abc', "train.optim_g.lr: expected a number from 0 to 1000000.0, but got 'abc'"),
    ('train:optim_g:type', 'Adamm', "train.optim_g.type: accepted: Adam, Muon; got 'Adamm'"),
    ('train:optim_g:beta', 1, 'train.optim_g.beta: unknown key; accepted: amsgrad, betas, '),
    ('train:scheduler:type', 'Cosine', 'train.scheduler.type: accepted: CosineAnnealingRestartLR, MultiStepLR, '),
]

# of every kind a few: nothing of it may reach BasicSR
MISTAKES += [
    ('train:optim_g:lr', 1e30, 'train.optim_g.lr: expected a number from 0 to 1000000.0, but got 1e+30'),
    ('train:optim_g:lr', float('inf'), 'train.optim_g.lr: expected a number from 0'),
    ('train:optim_g:lr', float('nan'), 'train.optim_g.lr: expected a number from 0'),
    ('train:optim_g:lr', -1e-4, 'train.optim_g.lr: expected a number from 0'),
    ('train:optim_g:lr', None, "train.optim_g: key 'lr' is missing"),
    ('train:optim_g:type', ['Adam'], "train.optim_g.type: accepted: Adam, Muon; got ['Adam']"),
    ('train:optim_g:betas', [0.9, 1.5], 'train.optim_g.betas: expected a number from 0 to 1, but got 1.5'),
    ('train:optim_g:betas', [0.9, 1], 'train.optim_g.betas: expected numbers from 0 to below 1'),
    ('train:optim_g:betas', 0.9, 'train.optim_g.betas: expected a list of 2 values, but got 0.9'),
    ('train:optim_g:weight_decay', -1, 'train.optim_g.weight_decay: expected a number from 0 to 1, but got -1'),
    ('train:optim_g:amsgrad', 'no', "train.optim_g.amsgrad: accepted: true, false; got 'no'"),
    ('train:optim_g', [], 'train.optim_g: expected a block of options, but got []'),
    ('train:scheduler:gamma', 1, 'train.scheduler.gamma: unknown key; accepted: eta_min, last_epoch, periods, '),
    ('train:scheduler:eta_min', 1, 'train.scheduler.eta_min: expected a number from 0 to 0.001, but got 1'),
    ('train:scheduler:periods', [], 'train.scheduler.periods: expected a list, but got []'),
    ('train:scheduler:periods', 4, 'train.scheduler.periods: expected a list, but got 4'),
    ('train:scheduler:restart_weights', [1, 1], 'train.scheduler.restart_weights: expected a weight for each of 1'),
    ('train:total_iter', 1.5, 'train.total_iter: expected a whole number'),
    ('train:total_iter', float('inf'), 'train.total_iter: expected a whole number'),
    ('train:total_iter', 10**9, 'train.total_iter: expected a whole number from 1 to 100000000'),
    ('train:ema_decay', 1, 'train.ema_decay: 1 would keep the first weights forever'),
    ('train:pixel_opt:loss_weight', float('nan'), 'train.pixel_opt.loss_weight: expected a number from 0'),
    ('train:pixel_opt:loss_weight', -1, 'train.pixel_opt.loss_weight: expected a number from 0'),
    ('train:pixel_opt:reduction', 'max', "train.pixel_opt.reduction: accepted: mean, sum, none; got 'max'"),
    ('train:pixel_opt', 'L1Loss', "train.pixel_opt: expected a block of options with a key 'type'"),
    ('logger:use_tb_logger', 'no', "logger.use_tb_logger: accepted: true, false; got 'no'"),
    ('logger:print_frequency', 1, 'logger.print_frequency: unknown key; accepted: print_freq, '),
    ('logger:wandb', dict(projekt='x'), 'logger.wandb.projekt: unknown key; accepted: project, resume_id'),
    ('val:save_img', 3, 'val.save_img: accepted: true, false; got 3'),
    ('val:suffix', '../x', "val.suffix: expected the name of a folder, but got '../x'"),
    ('val:metrics:psnr:test_y_chanel', True, 'val.metrics.psnr.test_y_chanel: unknown key; accepted: better, '),
    ('val:metrics:psnr:test_y_channel', 'no', "val.metrics.psnr.test_y_channel: accepted: true, false; got 'no'"),
    ('val:metrics:psnr:input_order', 'CHW', "val.metrics.psnr.input_order: accepted: HWC; got 'CHW'"),
    ('val:metrics:psnr:type', 'calculate_psnr_pt', 'val.metrics.psnr.type: calculate_psnr_pt compares tensors'),
    ('datasets:val:name', '../../va', "datasets.val.name: expected the name of a folder, but got '../../va'"),
    ('datasets:val:name', '', "datasets.val.name: expected the name of a folder, but got ''"),
    ('datasets:val:use_hflipp', True, 'datasets.val.use_hflipp: unknown key; accepted: batch_size_per_gpu, '),
    ('datasets:val:type', 'SingleImageDataset', 'val.metrics.psnr: compares with GT, but datasets.val, a Single'),
    ('datasets:valid', {}, 'datasets.valid: unknown key; accepted: train, val, val_2 ...'),
    ('datasets:train', [], 'datasets.train: expected a block of options'),
    ('datasets:train:use_hflip', 'no', "datasets.train.use_hflip: accepted: true, false; got 'no'"),
    ('datasets:train:use_rot', None, "datasets.train: key 'use_rot' is missing"),
    ('datasets:train:num_worker_per_gpu', 10**9, 'datasets.train.num_worker_per_gpu: expected an integer from 0 to'),
    ('datasets:train:batch_size_per_gpu', 10**9, 'datasets.train.batch_size_per_gpu: expected an integer from 1 to'),
    ('datasets:train:dataset_enlarge_ratio', 1e12, 'datasets.train.dataset_enlarge_ratio: expected a number from'),
    ('datasets:train:gt_size', -32, 'datasets.train.gt_size: expected an integer from 1'),
    ('datasets:train:color', 'gray', "datasets.train.color: accepted: y, None; got 'gray'"),
    ('datasets:train:prefetch_mode', 'gpu', "datasets.train.prefetch_mode: accepted: cpu, cuda, None; got 'gpu'"),
    ('datasets:train:persistent_workers', True, 'datasets.train.persistent_workers: needs num_worker_per_gpu'),
    ('datasets:train:io_backend', 'lmdb', "datasets.train.io_backend: expected a block of options, but got 'lmdb'"),
    ('datasets:train:io_backend:type', 'zip', "datasets.train.io_backend.type: accepted: disk, lmdb, memcached; "),
    ('datasets:train:io_backend:path', 'x', 'datasets.train.io_backend.path: unknown key; accepted: client_keys, '),
    ('datasets:train:mean', [0.5], 'datasets.train: mean and std must be given together'),
    ('datasets:train:label_file', 1, 'datasets.train.label_file: no such file: 1'),
    ('datasets:train:filename_tmpl', '../{}', 'datasets.train.filename_tmpl: expected a name with one {}'),
    ('network_g', None, 'network_g: is missing from the option file'),
    ('model_type', ['CDNSRModel'], "model_type: unknown type ['CDNSRModel']; accepted: "),
    ('name', 'a\x00b', 'name: expected the name of a folder'),
    ('num_gpu', 'all', "num_gpu: expected an integer from 0 to 1024, but got 'all'"),
    ('manual_seed', 2**40, 'manual_seed: expected an integer from 0 to'),
    ('dist_params', dict(backend='tcp'), "dist_params.backend: accepted: nccl, gloo; got 'tcp'"),
    ('find_unused_parameters', 'yes', "find_unused_parameters: accepted: true, false; got 'yes'"),
    ('path:strict_load_g', 'no', "path.strict_load_g: accepted: true, false; got 'no'"),
    ('path:param_key_g', 3, 'path.param_key_g: expected a word such as params_ema, but got 3'),
    ('tile', 0, 'tile: expected a block of options, but got 0'),
]


@pytest.fixture
def no_pipeline(monkeypatch):
    """Lets only the checks run; says whether they passed."""
    import basicsr.train
    started = []
    monkeypatch.setattr(basicsr.train, 'train_pipeline', started.append)
    return started


@pytest.mark.parametrize('key,value,message', MISTAKES)
def test_option_mistakes(work, train_opt, write, no_pipeline, capsys, key, value, message):
    set_in(train_opt, key, value)
    assert cli.main(['train', '-opt', write(train_opt, 'my.yml')]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'basicsr: error: my.yml: {message}')
    assert not no_pipeline


@pytest.mark.slow
def test_an_error_in_training_keeps_its_traceback(work, train_opt, write, monkeypatch):
    from cdnsr_basicsr.models import CDNSRModel

    def build_model():  # whatever the name of what fails
        raise RuntimeError('a bug')

    monkeypatch.setattr(CDNSRModel, 'optimize_parameters', lambda self, current_iter: build_model())
    with pytest.raises(RuntimeError, match='a bug'):
        cli.main(['train', '-opt', write(train_opt)])


IN_STOCK_MODELS = [
    (dict(train=dict(net_d_iterss=1)), 'train.net_d_iterss: unknown key; accepted: '),
    (dict(train=dict(pixel_opt=None)), 'train.pixel_opt: a loss is needed: pixel_opt or perceptual_opt'),
    (dict(path=dict(pretrain_network_gs=None)), 'path.pretrain_network_gs: unknown key; accepted: '),
    (dict(path=dict(pretrain_model_g='a.pth')), 'path.pretrain_model_g: is an old name'),
    (dict(val=dict(save_imgs=True)), 'val.save_imgs: unknown key; accepted: '),
    (dict(dist_paramss={}), 'option file.dist_paramss: unknown key; accepted: '),
    (dict(model_type='SRGANModel'), 'network_d: is missing from the option file; SRGANModel needs it'),
    (dict(model_type='RealESRNetModel'), "option file: key 'resize_prob' is missing"),
]


@pytest.mark.slow
@pytest.mark.parametrize('change,message', IN_STOCK_MODELS)
def test_mistakes_in_option_files_of_basicsr(work, train_opt, write, no_pipeline, capsys, change, message):
    for key in ('class_opt', 'average_opt'):
        del train_opt['train'][key]
    del train_opt['tile']
    train_opt.update(model_type='SRModel', network_g=dict(type='MSRResNet', num_feat=4, num_block=1))
    assert cli.main(['train', '-opt', write(train_opt)]) == 0
    for key, value in change.items():
        train_opt[key] = {**train_opt[key], **value} if isinstance(train_opt.get(key), dict) else value
    assert cli.main(['train', '-opt', write(train_opt, 'my.yml')]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'basicsr: error: my.yml: {message}')


def test_pictures_are_looked_at_before_the_pipeline(work, train_opt, write, no_pipeline, capsys):
    for part in ('gt', 'lq'):
        shutil.copytree(work / 'datasets/val' / part, work / 'broken' / part)
    first = min((work / 'broken/lq').iterdir())
    first.write_bytes(first.read_bytes()[:100])
    train_opt['datasets']['val'].update(dataroot_gt='broken/gt', dataroot_lq='broken/lq')
    assert cli.main(['train', '-opt', write(train_opt)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith(f'datasets.val.dataroot_lq: broken/lq/{first.name} is truncated: its end is missing')
    assert not no_pipeline


LEVELS = [f'l{i}: &l{i} [{", ".join([f"*l{i - 1}"] * 9)}]' for i in range(1, 30)]


@pytest.mark.parametrize('text', [
    '\n'.join(['l0: &l0 [x, x, x, x, x, x, x, x, x]', *LEVELS]),
    '\n'.join(['l0: &l0 {x: 1}', *(f'l{i}: &l{i} {{<<: [{", ".join([f"*l{i - 1}"] * 9)}]}}' for i in range(1, 30))]),
    'name: &a [*a]',
    'name: &a {b: {c: *a}}',
])
def test_aliases_that_would_fill_the_memory(work, write, capsys, text):
    assert cli.main(['train', '-opt', write(text)]) == 2
    error = capsys.readouterr().err.strip()
    assert 'aliases expand it to more than 100000 values' in error and len(error.splitlines()) == 1


def test_files_too_large_for_options(work, write, capsys):
    assert cli.main(['train', '-opt', write('a: 1\n' + '#' * 2**22)]) == 2
    assert 'is larger than an option file may be, 4 MiB' in capsys.readouterr().err


def test_resuming_needs_no_start_weights(work, train_opt, write, no_pipeline):
    train_opt['path']['pretrain_network_branches'] = ['gone.pth'] * 3
    assert cli.main(['train', '-opt', write(train_opt)]) == 2
    assert cli.main(['train', '-opt', write(train_opt), '--auto_resume']) == 0


def test_empty_folder_is_refused(work, train_opt, write, capsys):
    (work / 'empty').mkdir()
    train_opt['datasets']['val']['dataroot_gt'] = 'empty'
    assert cli.main(['train', '-opt', write(train_opt)]) == 2
    assert 'datasets.val.dataroot_gt: is an empty folder: empty' in capsys.readouterr().err


def test_a_test_that_saves_images_needs_a_suffix(work, train_opt, write, capsys):
    opt = {key: value for key, value in train_opt.items() if key not in ('train', 'logger')}
    opt.update(datasets=dict(test=train_opt['datasets']['val']), val=dict(save_img=True))
    assert cli.main(['test', '-opt', write(opt)]) == 2
    assert "val: key 'suffix' is missing" in capsys.readouterr().err


def test_a_test_without_weights_is_refused(work, train_opt, write, capsys):
    opt = {key: value for key, value in train_opt.items() if key not in ('train', 'logger')}
    opt.update(datasets=dict(test=train_opt['datasets']['val']), val=dict(save_img=False))
    assert cli.main(['test', '-opt', write(opt)]) == 2
    assert 'path.pretrain_network_g: is needed for a test' in capsys.readouterr().err


def test_right_options_pass(work, train_opt, write, no_pipeline):
    assert cli.main(['train', '-opt', write(train_opt)]) == 0
    assert no_pipeline == [str(work)]


@pytest.mark.parametrize('text,message', [
    ('name: !!python/object/apply:os.system ["touch owned"]', 'could not determine a constructor'),
    ('a: [1, 2', 'not valid YAML'),
    ('- a\n- b', 'expected a mapping of options, but got list'),
    ('a: 1\na: 2', "line 2: key 'a' appears twice"),
    ('', 'expected a mapping of options, but got NoneType'),
])
def test_option_files_that_are_refused(work, write, capsys, text, message):
    assert cli.main(['train', '-opt', write(text)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (work / 'owned').exists()


def test_basicsr_itself_no_longer_runs_code_from_an_option_file(work, write):
    from basicsr.utils.options import ordered_yaml
    name = write('name: !!python/object/apply:os.system ["touch owned"]')
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.load((work / name).read_text(), Loader=ordered_yaml()[0])
    assert not (work / 'owned').exists()


def test_numbers_and_merges_are_read(work, write):
    opt = read_options(write('a: 2e-4\nb: !!float 1e-4\nc: 1e3x\nbase: &base {x: 1}\nd: {<<: *base, y: 2}\ne: -1E+2'))
    assert opt == {'a': 2e-4, 'b': 1e-4, 'c': '1e3x', 'base': {'x': 1}, 'd': {'x': 1, 'y': 2}, 'e': -100.}


@pytest.mark.parametrize('entry', [
    'train', 'a"]=__import__("os").system("touch owned");opt["a=1', 'train:lr=[1', "a'b=1", 'a[0]=1', 'a:=1', '=1',
    'a=b=c', 'name=!!python/object/apply:os.system ["touch owned"]'
])
def test_force_yml_runs_no_code(work, train_opt, write, no_pipeline, capsys, entry):
    assert cli.main(['train', '-opt', write(train_opt), '--force_yml', entry]) == 2
    error = capsys.readouterr().err.strip()
    assert '--force_yml' in error and len(error.splitlines()) == 1
    assert not (work / 'owned').exists() and not no_pipeline


def test_force_yml_values():
    cases = {
        'a=1': 1,
        'a=2e-4': 2e-4,
        'a=-1.5': -1.5,
        'a=True': True,
        'a=none': None,
        'a=~': None,
        'a=[1, 2]': [1, 2],
        'a= text ': 'text',
        'a=[branches]': ['branches'],
        'a=!!float 3': 3.
    }
    for entry, value in cases.items():
        assert parse_force_yml(entry) == (['a'], value)
    opt = {'train': {'lr': 1, 'sub': {}}}
    apply_force_yml(opt, ['train:lr=2', 'train:sub:new=x', 'name=y'])
    assert opt == {'train': {'lr': 2, 'sub': {'new': 'x'}}, 'name': 'y'}
    with pytest.raises(OptionError, match="'trian' is not a block of the file; accepted: train"):
        apply_force_yml(opt, ['trian:lr=2'])


def test_forced_options_are_checked_and_reach_basicsr(work, train_opt, write, monkeypatch, capsys):
    import basicsr.train
    seen = []
    monkeypatch.setattr(basicsr.train, 'train_pipeline', lambda root: seen.append(basicsr.train.parse_options(root)[0]))
    arguments = ['train', '-opt', write(train_opt), '--force_yml']
    assert cli.main(arguments + ['train:total_iter=3', 'train:freeze=[]', 'train:optim_g:lr=1e-3']) == 0
    assert seen[0]['train']['total_iter'] == 3 and seen[0]['train']['freeze'] == []
    assert seen[0]['train']['optim_g']['lr'] == 1e-3
    assert cli.main(arguments + ['train:freese=[branches]']) == 2
    assert 'train.freese: unknown key' in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_in_setting_up_is_one_line(work, train_opt, write, monkeypatch, capsys):
    from cdnsr_basicsr.models import CDNSRModel

    def fail(self, opt):
        raise RuntimeError('two\nlines')

    monkeypatch.setattr(CDNSRModel, '__init__', fail)
    assert cli.main(['train', '-opt', write(train_opt)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1] == ('basicsr: error: opt.yml: BasicSR cannot set this up: RuntimeError: two lines '
                         '(--debug shows where)')
    with pytest.raises(RuntimeError, match='two\nlines'):
        cli.main(['train', '-opt', write(train_opt), '--debug'])


@pytest.mark.parametrize('forced', [[], ['train:freeze=[]', 'train:optim_g:lr=1e-3']])
def test_basicsr_reads_and_copies_the_resolved_file(work, train_opt, write, monkeypatch, forced):
    import basicsr.train
    copied, argv = [], list(sys.argv)

    def pipeline(root):
        opt, args = basicsr.train.parse_options(root)
        assert sys.argv == argv and opt['train']['total_iter'] == train_opt['train']['total_iter']
        Path('copy').mkdir()
        basicsr.train.copy_opt_file(args.opt, 'copy')
        copied.append(Path(args.opt))

    monkeypatch.setattr(basicsr.train, 'train_pipeline', pipeline)
    name = write('# a comment\n' + yaml.safe_dump(train_opt))
    assert cli.main(['train', '-opt', name, *(['--force_yml', *forced] if forced else [])]) == 0
    assert copied[0].name == name and not copied[0].parent.exists()
    expected = read_options(name)
    apply_force_yml(expected, forced)
    assert read_options(f'copy/{name}') == expected
    assert ('# a comment' in Path('copy', name).read_text()) == (not forced)


def test_a_resolved_file_says_the_same(work, write):
    name = write("a: '2e-4'\nb: 2e-4\nc: [1e5, ~, 'null', 'true', 0x10]\nd: {ü: 'x: y', 3: -.inf}\ne: '# no'\n")
    opt, text = resolve_options(name, ['f=1e-7', 'd:g=[a, 1]'])
    Path('again.yml').write_text(text)
    assert read_options('again.yml') == opt and (opt['a'], opt['b'], opt['f']) == ('2e-4', 2e-4, 1e-7)
    assert resolve_options(name, None) == (read_options(name), Path(name).read_text())


def test_list_of_branch_checkpoints_gets_through_basicsr(work, train_opt, write, monkeypatch):
    import basicsr.train
    paths = ['~/a.pth', 'b.pth', 'c.pth']
    opt = copy.deepcopy(train_opt)
    opt['path']['pretrain_network_branches'] = paths
    monkeypatch.setattr('sys.argv', ['basicsr', '-opt', write(opt)])
    parsed, _ = basicsr.train.parse_options(str(work))
    assert parsed['path']['pretrain_network_branches'][1:] == paths[1:]
    assert not parsed['path']['pretrain_network_branches'][0].startswith('~')


def test_broken_plugin_is_named(monkeypatch, capsys, work, train_opt, write):
    from importlib import metadata
    point = metadata.EntryPoint('other', 'no_such_module:register', 'basicsr.plugins')

    class Points(list):

        def select(self, group):
            return self

    monkeypatch.setattr(metadata, 'entry_points', lambda: Points([point]))
    assert cli.main(['train', '-opt', write(train_opt)]) == 2
    assert 'plugin other (no_such_module:register): cannot be loaded' in capsys.readouterr().err


def test_other_plugins_load_beside_this_one(monkeypatch, work, train_opt, write, no_pipeline):
    from importlib import metadata

    from basicsr.utils.registry import ARCH_REGISTRY
    (work / 'other_plugin.py').write_text('''
from torch import nn
from basicsr.utils.registry import ARCH_REGISTRY

def register():
    @ARCH_REGISTRY.register()
    class NetOfAnotherPlugin(nn.Conv2d):
        pass
''')
    monkeypatch.syspath_prepend(str(work))
    point = metadata.EntryPoint('other', 'other_plugin:register', 'basicsr.plugins')
    monkeypatch.setattr(metadata, 'entry_points', lambda: {'basicsr.plugins': [point]})  # as on Python 3.9
    assert cli.main(['train', '-opt', write(train_opt)]) == 0
    assert 'NetOfAnotherPlugin' in ARCH_REGISTRY and 'CDNSR' in ARCH_REGISTRY


def test_slurm_node_list_cannot_run_commands(monkeypatch):
    from basicsr.utils.dist_util import init_dist
    monkeypatch.setenv('SLURM_NODELIST', 'node1; touch owned')
    with pytest.raises(OptionError, match='SLURM_NODELIST'):
        init_dist('slurm')
