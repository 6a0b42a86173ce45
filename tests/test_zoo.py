"""Models by name: found where they should be, refused in one line; those that are shipped are what models.json says."""
import cv2
import hashlib
import json
import numpy as np
import os
import pytest
import shutil
import torch
from dataclasses import replace
from pathlib import Path

from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from basicsr.models.base_model import BaseModel
from cdnsr_basicsr import checkpoint, cli, zoo
from cdnsr_basicsr.calibration import calibration_path
from cdnsr_basicsr.checkpoint import load_checkpoint
from cdnsr_basicsr.cli.arguments import settings_of
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.evaluation import read_pairs, to_image, to_tensor
from cdnsr_basicsr.inference import make_upscaler
from cdnsr_basicsr.loading import upscaler_for
from cdnsr_basicsr.options import OptionError
from cdnsr_basicsr.zoo import find_checkpoint, shipped_models
from tests.helpers import ROOT, fsrcnn, photograph

SHIPPED = shipped_models()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a small picture."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('a.png', photograph(20, 24, 0))
    return tmp_path


def one_line(capsys):
    text = capsys.readouterr().err.strip()
    assert '\n' not in text
    return text


def put(path, content=b''):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return path


def test_upscale_takes_a_name(folder, shipped):
    for model, output in (('tiny_fsrcnn', 'named'), (str(shipped['tiny_fsrcnn'].path), 'path')):
        assert cli.main(['upscale', '-m', model, '-i', 'a.png', '-o', output]) == 0
    named, path = (cv2.imread(f'{output}/a.png') for output in ('named', 'path'))
    assert named.shape == (80, 96, 3) and np.array_equal(named, path)


def test_option_files_of_upscale_take_a_name(folder, shipped):
    block = ', '.join(f'{key}: {value}' for key, value in fsrcnn(2).items())
    Path('a.yml').write_text(f'network_g: {{{block}}}\npath: {{pretrain_network_g: tiny_fsrcnn}}\n')
    assert cli.main(['upscale', '-opt', 'a.yml', '-i', 'a.png', '-o', 'out']) == 0
    assert cv2.imread('out/a.png').shape == (80, 96, 3)


@pytest.mark.slow
def test_convert_and_export_take_a_name(folder, shipped, capsys):
    assert cli.main(['convert', 'tiny_cdnsr', '-o', 'own.safetensors']) == 0
    assert load_checkpoint('own.safetensors')['network_g'] == load_checkpoint('tiny_cdnsr')['network_g']
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    assert cli.main(['export', 'tiny_fsrcnn', '-o', 'exported']) == 0
    assert json.loads(Path('exported/export.json').read_text())['about']['source'] == 'tiny_fsrcnn'
    os.rename('exported', 'tiny_cdnsr')  # an exported folder of a model's name is that folder
    args = ['upscale', '-m', 'tiny_cdnsr', '-i', 'a.png', '-o', 'out', '--map']
    assert cli.main(args) == 2 and 'needs a network that routes' in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark_takes_names(folder, shipped, capsys):
    arguments = ['benchmark', '-m', 'tiny_fsrcnn', '--data', '.', '--repeat', '1', '--patch-size', '16']
    Path('experiments/pretrained_models').mkdir(parents=True)
    # its processes have the package itself
    shutil.copy(shipped['tiny_fsrcnn'].path, 'experiments/pretrained_models/tiny_fsrcnn.pth')
    assert cli.main(arguments) == 0
    assert '| tiny_fsrcnn | FSRCNN |' in capsys.readouterr().out


@pytest.mark.slow
def test_calibration_of_a_shipped_model_is_kept_in_the_cache(folder, shipped, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
    before = sorted(zoo.SHIPPED.iterdir())
    arguments = ['-m', 'tiny_cdnsr', '--patch-size', '16', '--step', '14']
    assert cli.main(['calibrate', *arguments, '-i', '.', '--budgets', '0.7']) == 0
    path = folder / 'cache/cdnsr_basicsr/tiny_cdnsr.calibration.json'
    assert f'Wrote {path}.' in capsys.readouterr().out and sorted(zoo.SHIPPED.iterdir()) == before
    args = cli.build_parser().parse_args(['upscale', *arguments, '-i', 'a.png', '-o', 'out'])
    assert upscaler_for(settings_of(args)).measured.tile_ms == json.loads(path.read_text())['tile_ms']
    local = put('experiments/pretrained_models/net.pth')
    assert calibration_path('net') == Path(local).with_suffix('.calibration.json')


def test_basicsr_loads_by_name(shipped):
    net = build_network(fsrcnn(2))
    BaseModel.load_network(BaseModel(dict(num_gpu=0, is_train=False)), net, 'tiny_fsrcnn', True, 'params_ema')
    expected = load_network('tiny_fsrcnn').state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())


def test_files_come_before_names_and_the_users_before_the_packages(folder, shipped, monkeypatch):
    assert find_checkpoint('tiny_fsrcnn') == str(shipped['tiny_fsrcnn'].path)
    os.mkdir('tiny_fsrcnn')  # is no checkpoint
    assert find_checkpoint('tiny_fsrcnn') == str(shipped['tiny_fsrcnn'].path)
    os.rmdir('tiny_fsrcnn')
    for suffix in ('.safetensors', '.pth', ''):
        path = put(f'experiments/pretrained_models/tiny_fsrcnn{suffix}')
        assert find_checkpoint('tiny_fsrcnn') == path
    put('tiny_fsrcnn')
    assert find_checkpoint('tiny_fsrcnn') == find_checkpoint(Path('tiny_fsrcnn')) == 'tiny_fsrcnn'
    monkeypatch.setenv('HOME', str(folder))
    put('net.pth')
    assert find_checkpoint('~/net.pth') == str(folder / 'net.pth')


@pytest.mark.parametrize('path', ['tiny_fsrcn.pth', './tiny_fsrcnn', 'a/b', '~/tiny_fsrcnn', 'net.safetensors', ''])
def test_a_path_is_no_name(folder, shipped, monkeypatch, path):
    monkeypatch.setenv('HOME', str(folder))
    put('experiments/pretrained_models/net.safetensors')
    with pytest.raises(OptionError) as error:
        find_checkpoint(path)
    assert str(error.value) == f'{path}: no such checkpoint file'


def test_an_unknown_name_is_told_what_there_is(folder, shipped, monkeypatch, capsys):
    put('experiments/pretrained_models/mine.pth')
    assert cli.main(['upscale', '-m', 'tiny_fsrcn', '-i', 'a.png', '-o', 'out']) == 2
    assert one_line(capsys) == ('basicsr: error: tiny_fsrcn: no such checkpoint file, and no model of this name; did '
                                'you mean tiny_fsrcnn? known: mine, tiny_cdnsr, tiny_fsrcnn')
    with pytest.raises(OptionError, match='name; known: mine, tiny'):
        find_checkpoint('0')
    with pytest.raises(OptionError, match=r'^path.pretrain_network_t: fsrcnn: no such .* did you mean tiny_fsrcnn\?'):
        checkpoint.check_pretrained(
            dict(pretrain_network_g='tiny_cdnsr', pretrain_network_t='fsrcnn', resume_state='x'))
    with pytest.raises(OptionError, match='^path.pretrain_network_branches: expected a checkpoint, but got 5$'):
        checkpoint.check_pretrained(dict(pretrain_network_branches=['tiny_fsrcnn', 5]))


def test_a_changed_file_is_refused(folder, shipped, capsys):
    path = shipped['tiny_fsrcnn'].path
    path.write_bytes(path.read_bytes()[:-1] + b'x')
    assert cli.main(['upscale', '-m', 'tiny_fsrcnn', '-i', 'a.png', '-o', 'out']) == 2
    assert one_line(capsys).startswith(f'basicsr: error: {path}: has changed since it was shipped')
    path.unlink()
    assert cli.main(['convert', 'tiny_fsrcnn', '-o', 'own.pth']) == 2
    assert one_line(capsys).startswith(f'basicsr: error: {path}: cannot be read: No such file')


def test_models_are_listed(shipped, capsys, monkeypatch):
    mb = [f'{model.path.stat().st_size / 1e6:.2f}' for model in shipped.values()]
    figures = ['30.13', '27.50', '12.3', 'Apache-2.0']
    for columns in ('200', '1', '0', 'x'):
        monkeypatch.setenv('COLUMNS', columns)
        assert cli.main(['models']) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()
                for line in lines[:4]] == [['model', 'scale', 'MB', 'Set5', 'Set14', 'ms/megapixel', 'licence'],
                                           ['tiny_cdnsr', 'x4', mb[0], *figures],
                                           ['tiny_fsrcnn', 'x4', mb[1], *figures], []]
        assert len({line.index('Apache') if i else line.index('licence') for i, line in enumerate(lines[:3])}) == 1
        text = ' '.join(' '.join(lines[4:]).split())
        assert text.startswith('tiny_cdnsr: trying tiny_fsrcnn: trying PSNR in dB')
        assert ('tiny_cdnsr: with budget 0.6. tiny_cdnsr, tiny_fsrcnn: measured on an abacus. tiny_cdnsr, tiny_fsrcnn: '
                'trained on nothing.') in text


def test_models_are_listed_by_scale_and_quality(shipped):
    first = shipped['tiny_fsrcnn']
    figures = {
        'x2': (2, 40, 1),
        'worse': (4, 30, 1),
        'better': (4, 31, 9),
        'as_good_and_fast': (4, 31, 8),
        'x3': (3, 35, 1)
    }
    models = [
        replace(first, name=name, scale=scale, psnr=dict(photographs=psnr), ms_per_megapixel=ms)
        for name, (scale, psnr, ms) in figures.items()
    ]
    assert [model.name for model in zoo.best_first(models)] == ['as_good_and_fast', 'better', 'worse', 'x3', 'x2']


def test_a_list_of_models_says_who_taught_them(shipped):
    taught = replace(shipped['tiny_fsrcnn'], teacher=dict(name='Big', licence='MIT'))
    assert 'tiny_fsrcnn: taught by Big (MIT).\n' in zoo.describe([shipped['tiny_cdnsr'], taught])


def test_the_list_of_shipped_models_is_readable_at_100_columns(monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    models = zoo.best_first(SHIPPED.values())
    text = zoo.describe(models)
    assert max(map(len, text.splitlines())) <= 100
    assert all(f'\n{model.name}: ' in text for model in models)


def test_a_build_without_models(folder, monkeypatch, capsys):
    monkeypatch.setattr(zoo, 'SHIPPED', folder)
    Path('models.json').write_text('{}')
    assert cli.main(['models']) == 0
    assert capsys.readouterr().out == 'This build ships no models.\n'
    assert cli.main(['upscale', '-m', 'tiny', '-i', 'a.png', '-o', 'out']) == 2
    assert one_line(capsys).endswith('tiny: no such checkpoint file, and no model of this name; this build ships none')


def test_nothing_is_shipped_that_the_index_does_not_name():
    assert {path.name for path in zoo.SHIPPED.iterdir()} == {'models.json', *(model.file for model in SHIPPED.values())}
    assert all(os.path.splitext(name)[0] == name and '/' not in name for name in SHIPPED)  # else they would be paths


@pytest.mark.parametrize('name', list(SHIPPED))
def test_shipped_file(name):
    model = SHIPPED[name]
    data = model.path.read_bytes()
    assert len(data) < zoo.MOST_BYTES and hashlib.sha256(data).hexdigest() == model.sha256
    assert model.licence and model.trained_on and model.measured_on and model.ms_per_megapixel > 0
    assert model.use and '\n' not in model.use
    assert set(model.psnr) == set(
        model.psnr_rgb) and {'Set5', 'Set14', 'photographs'} <= set(model.psnr) <= set(zoo.IMAGES)
    assert all(model.psnr_rgb[images] < model.psnr[images] for images in model.psnr)  # Y has less noise
    assert model.teacher is None or set(model.teacher) == {'name', 'licence'}
    content = load_checkpoint(name)
    assert content['scale'] == model.scale and 'params' in content
    assert make_upscaler(load_network(name)).scale == model.scale


@pytest.mark.parametrize('name', list(SHIPPED))
def test_shipped_model_has_a_card(name):
    card = (ROOT / 'docs/models' / f'{name}.md').read_text()
    assert card.startswith(f'# {name}\n') and 'TO BE WRITTEN' not in card
    for heading in ('Data and licence', 'How it was trained', 'What it is bad at', 'Measured'):
        assert f'\n## {heading}\n' in card
    routed = next(line for line in card.splitlines() if line.startswith('| routed |'))
    model, cells = SHIPPED[name], routed.split(' | ')
    assert cells[1:1 + len(model.psnr)] == [f'{model.psnr[its]:.2f} / {model.psnr_rgb[its]:.2f}' for its in model.psnr]
    assert (ROOT / 'docs/models' / f'{name}.jpg').stat().st_size < 2e5


@pytest.mark.slow
@pytest.mark.parametrize('name', list(SHIPPED))
def test_shipped_model_is_as_good_as_the_index_says(name, shared):
    model = SHIPPED[name]
    upscaler, scale = make_upscaler(load_network(name), budget=model.budget), int(model.scale)
    psnr = []
    for pair in read_pairs(str(shared('data/benchmark/Set5') / 'HR'), scale):
        image = to_image(upscaler.upscale(to_tensor(pair.lq)).image)
        # BasicSR takes the channels for BGR
        psnr.append(calculate_psnr(image[..., ::-1], pair.gt[..., ::-1], scale, test_y_channel=True))
    assert np.mean(psnr) == pytest.approx(
        model.psnr['Set5'], abs=0.05)  # where branches cost measured time, routing depends on the machine
