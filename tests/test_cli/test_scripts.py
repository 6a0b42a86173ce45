"""The scripts: those that start trainings, and those that measure, ship and damage."""
import copy
import cv2
import importlib
import os
import pytest
import shlex
import socket
import subprocess
import sys
import torch
import yaml
from pathlib import Path

from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from cdnsr_basicsr import cli, zoo
from cdnsr_basicsr.checkpoint import load_checkpoint, save_checkpoint
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.evaluation import read_pairs, to_image, to_tensor
from cdnsr_basicsr.inference import make_upscaler
from cdnsr_basicsr.options import read_options, resolve_options
from tests.helpers import BACKBONES, ENV, ROOT, fsrcnn, iterations, photograph, run

pytestmark = pytest.mark.slow  # whole runs, in processes of their own


def bash(script, *args, cwd, **env):
    # the scripts call python and basicsr by their names
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    env = dict(dict(ENV, PATH=path), **env)
    return subprocess.run(['bash', str(script), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def commands(tmp_path):
    """A folder for commands that stand in for those of a cluster."""
    folder = tmp_path / 'bin'
    folder.mkdir()

    def add(name, text):
        (folder / name).write_text('#!/usr/bin/env bash\n' + text)
        (folder / name).chmod(0o755)
        return str(folder)

    return add


def test_dist_train(work, train_opt, write):
    done = bash(ROOT / 'scripts/dist_train.sh', '2', write(train_opt), '--force_yml', 'train:total_iter=2', cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'DistributedDataParallel' in done.stdout + done.stderr
    load_network(str(work / 'experiments/tiny/models/net_g_latest.pth'))
    assert bash(ROOT / 'scripts/dist_train.sh', '2', cwd=work).returncode == 2


def test_a_day_with_a_gpu_needs_one(tmp_path):
    done = bash(ROOT / 'scripts/gpu_day.sh', str(tmp_path / 'out'), cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == 'gpu_day.sh: there is no GPU here that torch can use\n'
    assert not (tmp_path / 'out').exists()
    assert bash(ROOT / 'scripts/gpu_day.sh', cwd=tmp_path).returncode == 2


def test_a_day_with_gpus_has_no_wrong_command(tmp_path, commands):
    commands('basicsr', 'exit 0')
    folder = commands('python', 'case "$*" in *device_count*) echo 2;; *carn*) exit 3;; esac')
    (tmp_path / 'pcsr.pth').touch()
    script, path = ROOT / 'scripts/gpu_day.sh', f'{folder}:{os.environ["PATH"]}'
    done = bash(script, 'out', 'pcsr.pth', cwd=tmp_path, PATH=path)
    assert done.returncode == 1 and '1 parts failed' in done.stdout, done.stdout + done.stderr
    lines = (tmp_path / 'out/summary.txt').read_text().splitlines()
    assert [line.split()[2] for line in lines if line.startswith('rc 3')] == ['train_speed_carn']
    ran = [shlex.split(line.split(' s  ', 1)[1]) for line in lines]
    for command in (words for words in ran if words[0] == 'basicsr'):
        args = cli.build_parser().parse_args(command[1:])
        if args.command == 'train':
            resolve_options(str(ROOT / args.opt), args.force_yml)
    names = [words[1] for words in ran if words[:1] == ['python'] and words[1].startswith('scripts/')]
    assert len(ran) > 20 and 'scripts/gpu_day.py' in names and all((ROOT / name).is_file() for name in names)


@pytest.mark.parametrize('part', ['equal', 'speed', 'memory', 'busy'])
def test_parts_of_a_day_with_a_gpu_can_be_tried_without_one(part):
    output = run('scripts/gpu_day.py', part, '--models', 'cdnsr-fsrcnn-x4', '--side', '48')
    assert output.startswith('no GPU') and 'FAIL' not in output, output


def test_dist_train_on_several_machines(work, commands):
    path = f'{commands("python", "echo $@")}:{os.environ["PATH"]}'
    command = (ROOT / 'scripts/dist_train.sh', '4', 'a.yml')
    done = bash(*command, cwd=work, PATH=path, NNODES='2', NODE_RANK='1', MASTER_ADDR='first')
    assert done.stdout.split() == [
        '-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1', '--master_addr=first', '--master_port=29500',
        '--nproc_per_node=4', '-m', 'cdnsr_basicsr', 'train', '-opt', 'a.yml', '--launcher', 'pytorch'
    ]
    done = bash(*command, cwd=work, PATH=path, NNODES='2', NODE_RANK='1')
    assert done.returncode != 0 and 'MASTER_ADDR: is needed with NNODES' in done.stderr


def test_slurm_train(work, train_opt, write, commands):
    # srun stands in for a cluster of one machine: it starts the tasks with what Slurm tells them
    commands('scontrol', 'echo localhost')
    folder = commands(
        'srun', '''
echo "srun $*" | head -c 200; echo
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_NTASKS=2 SLURM_NODELIST='node[01]' "$@" &
done
wait -n && wait -n
''')
    with socket.socket() as probe:
        probe.bind(('', 0))
        train_opt['dist_params'] = dict(backend='nccl', port=probe.getsockname()[1])
    train_opt['train']['total_iter'] = 2
    path = f'{folder}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = bash(ROOT / 'scripts/slurm_train.sh', 'gpus', '2', write(train_opt), cwd=work, PATH=path)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert 'srun --partition=gpus --job-name=opt --gres=gpu:2 --ntasks=2 --ntasks-per-node=2' in output
    assert iterations(output) == [1, 2] and 'DistributedDataParallel' in output
    load_network(str(work / 'experiments/tiny/models/net_g_latest.pth'))


TINY = [
    'datasets:train:gt_size=32', 'datasets:train:num_worker_per_gpu=0', 'datasets:train:batch_size_per_gpu=4',
    'logger:use_tb_logger=false', 'logger:save_checkpoint_freq=1'
]


def stages_without_vgg(folder, backbone):
    """A copy of the scripts, and of the options as they are, but without VGG19's weights, which are not at hand."""
    options, scripts = folder / 'options', folder / 'scripts'
    options.mkdir(parents=True)
    scripts.mkdir()
    for path in (ROOT / 'options').glob(f'train_*{backbone}*.yml'):
        opt = read_options(str(path))
        if path.stem.endswith('distill'):
            opt['train']['feature_extractor'] = dict(weights='random')
            opt['train']['csd_opt']['layer_weights'] = dict(relu1_1=1)
            opt['train']['cs_opt'].update(layer='relu1_1')
        (options / path.name).write_text(yaml.safe_dump(opt, sort_keys=False))
    for name in ('train_all.sh', 'dist_train.sh', 'backbones.yml'):
        (scripts / name).write_text((ROOT / 'scripts' / name).read_text())
    return scripts


def train_all(scripts, backbone, work, iterations):
    """Runs all stages, which come in their order."""
    done = bash(scripts / 'train_all.sh', backbone, *TINY, cwd=work, ITER=iterations)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    order = [f'train_{backbone}_branch{i}' for i in (1, 2, 3)]
    order += [f'train_cdnsr_{backbone}{stage}' for stage in ('', '_joint', '_distill')]
    places = [output.index(f'== {i + 1} of 6: {name}\n') for i, name in enumerate(order)]
    assert places == sorted(places)
    assert output.count('End of training') == 6


@pytest.mark.parametrize('backbone', ['etds', 'span', 'modern'])
def test_train_all_measures_errors_where_a_classifier_predicts_them(work, tmp_path, backbone):
    train_all(stages_without_vgg(tmp_path / 'copy', backbone), backbone, work, '1')
    line = (work / 'datasets/train/labels_branches.txt').read_text().splitlines()[-1].split()
    assert len(line) == 6  # key, label, score, and the errors of three branches
    net = load_network(str(work / f'experiments/train_cdnsr_{backbone}_distill/models/net_g_latest.pth'))
    assert hasattr(net.classifier, 'errors')

    name = f'test_cdnsr_{backbone}'
    images = [f'datasets:test_{i}:dataroot_{kind}=datasets/val/{kind}' for i in (1, 2) for kind in ('gt', 'lq')]
    output = run('-m', 'cdnsr_basicsr', 'test', '-opt', str(ROOT / f'options/{name}.yml'), '--force_yml', *images)
    for dataset in ('Set5', 'Set14'):
        assert f'Validation {dataset}\n' in output and f'Routing {dataset}\n' in output
        results = work / 'results' / name / 'visualization' / dataset
        assert len(list(results.glob(f'*_{name}.png'))) == len(list(results.glob('*_map.png'))) == 3


def test_train_all_runs_the_stages_in_order_and_goes_on_after_any(work, tmp_path):
    scripts = stages_without_vgg(tmp_path / 'copy', 'fsrcnn')
    train_all(scripts, 'fsrcnn', work, '2')
    final = work / 'experiments/train_cdnsr_fsrcnn_distill/models/net_g_latest.pth'
    load_network(str(final))

    final.unlink()  # as if stopped before the end of the last stage
    other = bash(scripts / 'train_all.sh', 'fsrcnn', *TINY, cwd=work, ITER='3')
    assert other.returncode == 2 and 'train_fsrcnn_branch1 is finished, but with other options' in other.stderr
    assert 'remove experiments/train_fsrcnn_branch1 to train it anew' in other.stderr
    again = bash(scripts / 'train_all.sh', 'fsrcnn', *TINY, cwd=work, ITER='2')
    output = again.stdout + again.stderr
    assert again.returncode == 0, output
    assert output.count('is finished') == 5 and 'Resuming training from epoch: 0, iter: 2' in output
    load_network(str(final))


@pytest.mark.parametrize('arguments,message', [
    ((), f'Usage: bash scripts/train_all.sh {"|".join(BACKBONES)} [KEY:SUB=VALUE ...]\n'),
    (('edsr', ), f'Usage: bash scripts/train_all.sh {"|".join(BACKBONES)} ['),
    (('carn|etds', ), 'Usage: bash scripts/train_all.sh carn|etds|'),
    (('etds_light', ), 'Usage: bash scripts/train_all.sh carn|etds|'),
    (('fsrcnn', ), 'datasets/train contains no gt.lmdb: basicsr prepare -i YOUR_PHOTOGRAPHS -o datasets/train'),
])
def test_train_all_says_what_is_missing(tmp_path, arguments, message, commands):
    folder = commands('basicsr', 'exit 1')
    done = bash(ROOT / 'scripts/train_all.sh', *arguments, cwd=tmp_path, PATH=f'{folder}:{os.environ["PATH"]}')
    assert done.returncode == 2 and message in done.stderr


def test_reproduce_measures_named_models(tmp_path, commands):
    folder = commands('python', 'echo "$@"')
    (tmp_path / 'set 5').mkdir()
    path = f'{folder}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    command = (ROOT / 'scripts/reproduce.sh', 'Set5=set 5', 'photographs=.')
    for env, names, repeat in ((dict(), '', '3'), (dict(MODELS='a b', REPEAT='0'), 'a b ', '0')):
        done = bash(*command, cwd=tmp_path, PATH=path, **env)
        assert done.returncode == 0, done.stderr
        assert done.stdout == (f'{ROOT}/scripts/model_card.py {names}--images Set5=set 5 photographs=. '
                               f'--repeat {repeat}\n')


@pytest.mark.parametrize('arguments,message', [
    ((), 'Usage: bash scripts/reproduce.sh Set5=FOLDER'),
    (('HR', ), 'HR: expected SET=FOLDER. Usage: bash scripts/reproduce.sh Set5=FOLDER'),
    (('Set5=nowhere', ), 'nowhere: no such folder; expected HR images'),
    (('Set6=.', 'photographs=.'),
     'error: --images Set6: expected SET=FOLDER; sets: Set5, Set14, photographs, CID22, degraded'),
    (('Set5=.', ), 'error: --images: photographs=FOLDER is missing'),
    (('photographs=.', ), 'error: --images: Set5=FOLDER is missing; cdnsr-'),
])
def test_reproduce_says_what_is_missing(tmp_path, arguments, message):
    done = bash(ROOT / 'scripts/reproduce.sh', *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture
def scripts_of_models(tmp_path, monkeypatch, shipped):
    """ship_model and model_card, for a package of tiny models and documents that hold no more than their markers."""
    monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
    ship_model, model_card = map(importlib.import_module, ('ship_model', 'model_card'))
    root = tmp_path / 'root'
    (root / 'docs/models').mkdir(parents=True)
    for name, kind in (('README.md', 'models'), ('docs/ModelZoo.md', 'models'), ('mkdocs.yml', 'cards')):
        (root / name).write_text(f'above\n<!-- {kind}: begin, by a script -->\nold\n<!-- {kind}: end -->\nbelow\n')
    for module in (ship_model, model_card):
        monkeypatch.setattr(module, 'ROOT', root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '80')  # which the script sets
    for name, sides in (('small', (90, 100)), ('large', (200, 212))):
        os.mkdir(name)
        for i in range(2):
            cv2.imwrite(f'{name}/{i}.png', photograph(*sides, i))
    return ship_model, model_card, root


def routed_of_span():
    """A routed network as `basicsr route` makes it, of branches in the form for training; its option block too."""
    span = dict(type='SPAN', num_in_ch=3, num_out_ch=3, num_feat=4, num_block=1, upscale=2)
    mapper = dict(type='ErrorMap', num_in_ch=3, num_feat=4, price=3.25, margin=1.5, reference='gt')
    block = dict(type='CDNSR', upscale=2, branches=[fsrcnn(2, 2), span], classifier=mapper)
    return build_network(copy.deepcopy(block)).eval(), block


SHIP = ['--images', 'Set5=small', 'photographs=large', '--licence', 'MIT', '--trained-on', 'noise', '--use', 'tests']


def test_a_model_is_shipped_and_measured_again(scripts_of_models, capsys):
    ship_model, model_card, root = scripts_of_models
    net, block = routed_of_span()
    torch.nn.init.normal_(net.branches[1].conv_last.weight, std=0.01)
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=2), 'routed.pth')
    teacher = ['--teacher', 'Big', '--teacher-licence', 'BSD-3-Clause']
    ship_model.main(['new', 'routed.pth', *SHIP, *teacher, '--repeat', '1', '--budgets', '0.6'])
    model = zoo.shipped_models()['new']
    assert model.file == 'new.safetensors' and zoo.checked(model) == str(model.path)
    assert (model.scale, model.use, model.trained_on, model.licence) == (2, 'tests', 'noise', 'MIT')
    assert model.teacher == dict(name='Big', licence='BSD-3-Clause') and model.ms_per_megapixel > 0
    assert list(model.psnr) == list(model.psnr_rgb) == ['Set5', 'photographs']

    content = load_checkpoint('new')
    assert content['network_g']['classifier'] == block['classifier']  # price and margin are the user's
    assert content['network_g']['branches'][1] == dict(block['branches'][1], deploy=True)
    image = torch.rand(1, 3, 40, 44)
    with torch.no_grad():
        branch = load_network('new').branches[1]
        assert (branch(image) - net.branches[1](image)).abs().max() < 1e-4
    psnr = []
    for pair in read_pairs('small', 2):
        result = to_image(make_upscaler(load_network('new')).upscale(to_tensor(pair.lq)).image)
        psnr.append(calculate_psnr(result[..., ::-1], pair.gt[..., ::-1], 2, test_y_channel=True))
    assert sum(psnr) / len(psnr) == pytest.approx(model.psnr['Set5'], abs=0.1)  # the speed of this machine routes

    card = (root / 'docs/models/new.md').read_text()
    assert card.startswith('# new\n\ntests.\n') and 'Teacher: Big (BSD-3-Clause).' in card
    rows = [line.split(' | ') for line in card.splitlines() if line.startswith('| ')]
    assert [row[0][2:] for row in rows[2:]] == [
        'bicubic', 'branch 1 alone: FSRCNN, num_feat 2', 'branch 2 alone: SPAN, num_feat 4', 'routed',
        'routed, budget 0.6'
    ] and rows[0][:3] == ['| ', 'Set5', 'photographs'] and 'ms/megapixel' in rows[0]
    picture = root / 'docs/models/new.jpg'
    assert picture.stat().st_size < 200_000 and cv2.imread(str(picture)).shape == (2 * 354, 3 * 320 + 12, 3)
    for name, line in (('README.md', 'new '), ('docs/ModelZoo.md', '- [new](models/new.md)'),
                       ('mkdocs.yml', '      - new: docs/models/new.md')):
        text = (root / name).read_text()
        assert text.startswith('above\n') and text.endswith('\nbelow\n') and f'\n{line}' in text and 'old' not in text

    (root / 'docs/models/new.md').write_text(card.replace('TO BE WRITTEN', 'By hand'))
    picture.unlink()
    model_card.main(['new', *SHIP[:3], '--repeat', '0'])
    again = (root / 'docs/models/new.md').read_text()
    assert again.count('By hand') == 2 and 'ms/megapixel' not in again and picture.is_file()
    assert zoo.shipped_models()['new'].ms_per_megapixel == model.ms_per_megapixel


def test_a_model_for_degraded_images_is_shown_beside_the_best_for_clean_ones(scripts_of_models, monkeypatch):
    ship_model, _, root = scripts_of_models
    net, block = routed_of_span()
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=2), 'routed.pth')
    ship_model.main(['clean', 'routed.pth', *SHIP, '--repeat', '1'])
    monkeypatch.setattr(zoo, 'BEST', 'clean')
    for name, sides in (('gt', (200, 212)), ('lq', (100, 106))):
        Path('degraded', name).mkdir(parents=True)
        cv2.imwrite(f'degraded/{name}/0.png', photograph(*sides))
    ship_model.main(['dirty', 'routed.pth', SHIP[0], 'degraded=degraded', *SHIP[1:], '--repeat', '1'])
    card = (root / 'docs/models/dirty.md').read_text()
    assert '![Crops of photographs: bicubic x2, clean, dirty, HR](dirty.jpg)' in card
    assert 'the degraded photographs' in card.replace('\n', ' ')
    assert cv2.imread(str(root / 'docs/models/dirty.jpg')).shape == (2 * 354, 4 * 320 + 18, 3)
    assert 'degraded' in zoo.shipped_models()['dirty'].psnr
    rows = [line.split() for line in zoo.describe(zoo.shipped_models().values()).splitlines()]
    assert 'degraded' in rows[0] and [row for row in rows if row[:1] == ['clean']][0][rows[0].index('degraded')] == '-'


def test_what_cannot_be_shipped(scripts_of_models, monkeypatch, capsys):
    ship_model, _, root = scripts_of_models
    net, block = routed_of_span()
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=2), 'routed.pth')
    before = {path: path.read_bytes() for path in zoo.SHIPPED.iterdir()}
    monkeypatch.setattr(zoo, 'MOST_BYTES', 4000)
    for arguments, message in ((['a.pth', 'routed.pth', *SHIP], 'a.pth: expected a name without a folder and a suffix'),
                               (['a', 'routed.pth', *SHIP, '--teacher',
                                 'Big'], '--teacher: requires --teacher-licence'),
                               (['a', 'none.pth', *SHIP], 'none.pth: no such checkpoint file'),
                               (['a', 'tiny_fsrcnn',
                                 *SHIP], 'tiny_fsrcnn: FSRCNN is not a routed network; see basicsr route'),
                               (['a', 'routed.pth', *SHIP], 'routed.pth: takes ')):
        with pytest.raises(SystemExit) as end:
            ship_model.main(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and f'error: {message}' in error and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in zoo.SHIPPED.iterdir()} == before


def python(script, *args, cwd):
    command = [sys.executable, str(ROOT / 'scripts' / script), *args]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True)


@pytest.mark.parametrize('backbone', ['fsrcnn', 'etds'])  # a published classifier, and one that predicts errors
def test_training_steps_are_timed_side_by_side(tmp_path, backbone):
    done = python('bench_train.py', backbone, '--batch', '2', '--rounds', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split(' | ') for line in done.stdout.splitlines() if line.startswith('| ')][2:]
    assert [row[0][2:]
            for row in rows][::2] == ['published way', 'batched', 'default, bfloat16', 'default, classifier frozen']
    for _, ms, images, _ in rows:
        assert float(ms) > 0 and abs(float(images) * float(ms) / 2000 - 1) < 0.1


def test_training_steps_of_every_backbone_can_be_timed(tmp_path):
    help = python('bench_train.py', '--help', cwd=tmp_path).stdout
    assert f'{{{",".join(BACKBONES)}}}' in help


def test_trainings_of_equal_time_are_compared(work, train_opt):
    for name, width in (('narrow', 2), ('wide', 4)):
        opt = dict(train_opt, network_g=fsrcnn(width), model_type='FastSRModel', name=name)
        opt.pop('tile')
        opt['train'] = {key: opt['train'][key] for key in ('optim_g', 'scheduler', 'pixel_opt', 'ema_decay')}
        opt['datasets']['train'].update(label_file=None, batch_size_per_gpu=2)
        (work / f'{name}.yml').write_text(yaml.safe_dump(opt))
    command = [ROOT / 'scripts/compare_training.py', '--minutes', '0.02', '--points', '2', '--val', 'datasets/val']
    runs = ['Narrow narrow.yml', 'Wide, lr 1e-4 wide.yml train:optim_g:lr=1e-4']
    python(*command, '-o', 'compare.csv', *runs, cwd=work)
    rows = [
        line.split(',') for line in (work / 'compare.csv').read_text().replace('"Wide, lr', '"Wide lr').splitlines()
    ]
    assert rows[0] == ['name', 'iteration', 'minutes', 'PSNR val']
    assert [row[0].strip('"') for row in rows[1:]] == ['Narrow'] * 2 + ['Wide lr 1e-4'] * 2
    iterations = [int(row[1]) for row in rows[1:]]
    assert iterations[1] == 2 * iterations[0] and iterations[3] == 2 * iterations[2]
    assert all(0 < float(row[2]) < 0.2 and 5 < float(row[3]) < 50 for row in rows[1:])
    opt = yaml.safe_load((work / 'experiments/compare_Wide_lr_1e_4.yml').read_text())
    assert opt['train']['total_iter'] == iterations[3] and opt['train']['scheduler']['periods'] == [iterations[3]]

    before = (work / 'compare.csv').read_text()
    python(*command, '-o', 'again.csv', *runs, cwd=work)  # finished: the same figures, from the logs
    assert (work / 'again.csv').read_text() == before
    pytest.importorskip('matplotlib')
    python(command[0], '--plot', 'compare.png', 'compare.csv', cwd=work)
    assert cv2.imread(str(work / 'compare.png')) is not None


ON_GPU = f"""
import cdnsr_basicsr, json, numpy as np, sys, torch
cdnsr_basicsr.register()
sys.path.insert(0, {str(ROOT / 'scripts')!r})
import train_on_gpu as it
"""


def test_what_is_learnt_from_on_a_gpu(tmp_path):
    """LR pictures, patches and learning rates are those of `basicsr prepare` and `basicsr train`."""
    (tmp_path / 'photographs').mkdir()
    for i, sides in enumerate([(61, 90), (150, 70)]):
        cv2.imwrite(str(tmp_path / f'photographs/{i}.png'), photograph(*sides, seed=i))
    (tmp_path / 'try.py').write_text(ON_GPU + """
from basicsr.models import build_model
from basicsr.utils.matlab_functions import imresize
from cdnsr_basicsr.options import resolve_options

picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))
for factor in (1 / 2, 1 / 3, 1 / 4, 0.8, 0.6):
    ours = it.shrink(picture, factor).numpy()
    theirs = np.round(255 * imresize(picture.numpy() / np.float32(255), factor)).clip(0, 255)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 1e-3

photographs, seen = it.Photographs(it.pairs(['photographs'], 4), 4), set()
generator = torch.Generator().manual_seed(0)
lq, gt = photographs.patches(64, 12, True, True, False, generator)
for small, large in zip(lq, gt):  # turned and mirrored together; borders have other pixels around them
    made = it.shrink((255 * large).round().byte().permute(1, 2, 0), 1 / 4).permute(2, 0, 1) / 255
    assert (made - small)[:, 3:-3, 3:-3].abs().max() < 1.5 / 255
upright = photographs.patches(64, 12, False, False, False, generator)[0]
where = [photographs.images[0][start:start + h * w].view(h, w, 3).unfold(0, 12, 1).unfold(1, 12, 1)
         for start, h, w in zip(photographs.start, photographs.height, photographs.width)]
for patch in upright:
    found = [((255 * patch).round().byte() == places).flatten(2).all(2).any().item() for places in where]
    assert sum(found) == 1
    seen.update(i for i, here in enumerate(found) if here)
assert seen == {0, 1}

opt, _ = resolve_options('branch.yml', ['train:warmup_iter=20', 'train:total_iter=60', 'train:scheduler:periods=[60]'])
opt.update(is_train=True, dist=False, rank=0, world_size=1, num_gpu=0)
opt['path'].update(models='.', training_states='.', experiments_root='.')
model = build_model(opt)
for i, rate in enumerate(it.rates(opt['train'], 60), 1):
    model.update_learning_rate(i, 20)
    assert abs(model.get_current_learning_rate()[0] - rate) < 1e-9
""")
    (tmp_path / 'branch.yml').write_text((ROOT / 'options/train_modern_branch1.yml').read_text())
    done = python(tmp_path / 'try.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_networks_are_trained_side_by_side(tmp_path):
    (tmp_path / 'photographs').mkdir()
    cv2.imwrite(str(tmp_path / 'photographs/0.png'), photograph(120, 160))
    changes = 'datasets:train:batch_size_per_gpu=2 datasets:train:gt_size=32'
    runs = [
        f'V2 {ROOT}/options/train_modern_branch1.yml {changes} train:total_iter=8',
        f'ETDS, slow {ROOT}/options/train_etds_branch3.yml {changes} train:total_iter=4 train:ema_decay=0'
    ]
    command = [
        ROOT / 'scripts/train_on_gpu.py', '--photographs', 'photographs', '--val', 'photographs', '--points', '2'
    ]
    done = python(*command, '-o', 'out', *runs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(',', 2) for line in (tmp_path / 'out/psnr.csv').read_text().splitlines()]
    assert [row[:2] for row in rows] == [['name', 'iteration'], ['V2', '4'], ['"ETDS, slow"', '2'], ['V2', '8'],
                                         ['"ETDS, slow"', '4']]
    assert all(5 < float(row[2]) < 60 for row in rows[1:])
    assert load_network(str(tmp_path / 'out/V2/net_g_latest.pth')).upscale == 4
    assert set(torch.load(tmp_path / 'out/ETDS_slow/net_g_latest.pth')) == {'params', 'network_g', 'scale'}
    cut = python(*command, '--seconds', '0.01', '-o', 'cut', runs[0].replace('iter=8', 'iter=100000'), cwd=tmp_path)
    assert cut.returncode == 0, cut.stderr
    for name, sides in (('gt', (120, 160)), ('lq', (30, 40))):
        (tmp_path / f'val/{name}').mkdir(parents=True)
        cv2.imwrite(str(tmp_path / f'val/{name}/0.png'), photograph(*sides))
    photo = f'photo {ROOT}/options/train_photo_branch1.yml {changes} train:total_iter=2 ' \
        'datasets:train:num_worker_per_gpu=0 datasets:train:dataroot_gt=photographs datasets:train:io_backend:type=disk'
    done = python(command[0], '--degraded', '5', '--val', 'val', '-o', 'degraded', photo, cwd=tmp_path)
    assert done.returncode == 0 and '5 images' in done.stdout, done.stderr
    assert load_network(str(tmp_path / 'degraded/photo/net_g_latest.pth')).upscale == 4
    large = python(*command, '-o', 'large', runs[0].replace('gt_size=32', 'gt_size=128'), cwd=tmp_path)
    assert large.returncode == 1 and 'none has 128x128 pixels' in large.stderr
    last = (tmp_path / 'cut/psnr.csv').read_text().splitlines()[-1]
    assert last.startswith('V2,') and int(last.split(',')[1]) < 100


def test_a_network_of_another_scale_has_the_best_upsampler_for_its_blocks(tmp_path):
    """To the same scale, no other last conv has a smaller error; to others, it is better than bilinear upsampling."""
    (tmp_path / 'photographs').mkdir()
    for i, sides in enumerate([(300, 420), (330, 310)]):
        cv2.imwrite(str(tmp_path / f'photographs/{i}.png'), photograph(*sides, seed=i))
    network = build_network(dict(type='SPANV2', num_feat=4, num_block=2, upscale=4))
    block = dict(type='SPANV2', num_in_ch=3, num_out_ch=3, num_feat=4, num_block=2, upscale=4)
    save_checkpoint(dict(params=network.state_dict(), network_g=block, scale=4), str(tmp_path / 'x4.pth'))
    (tmp_path / 'try.py').write_text(ON_GPU + """
import rescale
from cdnsr_basicsr.conversion.convert import load_network
rescale.PATCHES, rescale.SIDE = 5, 40
old = load_network('x4.pth')
for scale in (4, 2, 3):
    photographs = it.Photographs(it.pairs(['photographs'], scale), scale)
    sys.argv = f'rescale.py x4.pth --scale {scale} --photographs photographs -o x{scale}.made.pth'.split()
    rescale.main()
    made = load_network(f'x{scale}.made.pth').eval()
    assert made.upscale == scale and str(made.body.state_dict()) == str(old.body.state_dict())
    generator = torch.Generator().manual_seed(0)  # the same patches
    patches = [photographs.patches(1, 40, True, True, False, generator) for _ in range(5)]

    def error(net):
        with torch.no_grad():
            errors = [(net(lq) - gt).square()[..., 8 * scale:-8 * scale, 8 * scale:-8 * scale] for lq, gt in patches]
        return sum(error.mean() for error in errors)

    least = error(made)
    fresh = type(made)(num_feat=4, num_block=2, upscale=scale)  # bilinear upsampling
    assert least < 0.99 * error(fresh)
    for i in range(4):
        moved = load_network(f'x{scale}.made.pth')
        moved.conv_last.weight.data += 1e-3 * torch.randn(moved.conv_last.weight.shape, generator=generator)
        assert error(moved) > least
""")
    done = python(tmp_path / 'try.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    other = python(
        ROOT / 'scripts/rescale.py',
        'cdnsr-etds-x4',
        '--scale',
        '2',
        '--photographs',
        'photographs',
        '-o',
        'other.pth',
        cwd=tmp_path)
    assert other.returncode == 2 and 'expected a SPANV2, but it is of type CDNSR' in other.stderr
    assert not (tmp_path / 'other.pth').exists()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_a_small_campaign_of_damage_counts_every_case(tmp_path):
    done = python('fuzz.py', '--images', '8', '--options', '6', '--checkpoints', '6', '--seed', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(' | ') for line in done.stdout.splitlines() if line.startswith('| ')][2:]
    cases = dict.fromkeys(('image', 'option', 'checkpoint'), 0)
    for kind, command, count, *ends in rows:
        cases[kind[2:]] += int(count) if command != 'calibrate' or kind[2:] != 'image' else 0
        assert sum(map(int, (end.rstrip(' |') for end in ends))) == int(count)
    assert cases == dict(image=16, option=6, checkpoint=6)  # images go through upscale and prepare


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_a_campaign_finds_each_kind_of_bad_end(tmp_path):
    """The same judge, of commands that end as they never should."""
    (tmp_path / 'judge.py').write_text(f'''
import os, sys, time
sys.path.insert(0, {str(ROOT / 'scripts')!r})
import fuzz
from pathlib import Path

def end(main, seconds=30):
    fuzz.cli.main = main
    return fuzz.said(fuzz.run(['x'], Path('.'), seconds, 2**30))

def says(text, code):
    return lambda argv: print(text, file=sys.stderr) or code

print(end(says('', 0)), end(says('basicsr: error: x: is wrong', 2)), end(says('Failed: x: broken', 1)),
      end(says('basicsr: error: x: BasicSR cannot set this up: TypeError', 2)), end(says('', 2)),
      end(lambda argv: 1 / 0), end(lambda argv: bytearray(2**31)), end(lambda argv: os.abort()),
      end(lambda argv: time.sleep(99), 1), sep=', ')
seeds = fuzz.images()
cases = [[fuzz.image(seeds, n, seed) for n in range(20)] for seed in (0, 0, 1)]
print(cases[0] == cases[1], cases[0] == cases[2])
''')
    done = subprocess.run([sys.executable, 'judge.py'], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        'right, one line, one line, unclear line, traceback, traceback, traceback, crash, hang', 'True False'
    ], done.stderr
