"""`basicsr export`, `upscale --backend`: the same pictures, one clear line for a mistake, and nothing half done."""
import cv2
import hashlib
import json
import numpy as np
import os
import pytest
import shutil
import signal
import subprocess
import sys
import time
import torch
from pathlib import Path

from basicsr.archs import build_network
from cdnsr_basicsr import cli, export
from cdnsr_basicsr.benchmark.rows import Network, Row, Settings, rows_of
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.complexity import count_macs
from cdnsr_basicsr.inference import runtime
from tests.helpers import carn, fsrcnn, photograph, spread

onnx = pytest.importorskip('onnx')
if not runtime.installed():
    pytest.skip('neither onnxruntime nor openvino is installed', allow_module_level=True)
BACKENDS = runtime.installed()


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A folder with a routed and a plain checkpoint, and what export makes of them."""
    folder = tmp_path_factory.mktemp('models')
    block = dict(type='CDNSR', upscale=2, classifier=dict(type='PatchClassifier', num_feat=8))
    block['branches'] = [dict(type='Interpolation', upscale=2), fsrcnn(4, 2), carn(8, 2)]
    for name, block in (('routed', block), ('plain', carn(4, 2))):
        torch.manual_seed(1)
        net = build_network(block).eval()
        net = spread(net) if name == 'routed' else net
        save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=2), folder / f'{name}.pth')
        assert cli.main(['export', str(folder / f'{name}.pth'), '-o', str(folder / name)]) == 0
    return folder


@pytest.fixture
def picture(tmp_path):
    path = str(tmp_path / 'picture.png')
    cv2.imwrite(path, photograph(71, 94))
    return path


def upscale(model, picture, *arguments, out='out'):
    """The result of `basicsr upscale`, or its exit code if that is not 0."""
    folder = Path(picture).parent / out
    code = cli.main(['upscale', '-m', str(model), '-i', picture, '-o', str(folder), '--overwrite', *arguments])
    return code or cv2.imread(str(folder / 'picture.png')).astype(int)


def one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
def test_the_folder_says_what_it_holds(models):
    content = json.loads((models / 'routed/export.json').read_text())
    assert sorted(os.listdir(
        models / 'routed')) == ['branch_0.onnx', 'branch_1.onnx', 'branch_2.onnx', 'classifier.onnx', 'export.json']
    assert sorted(os.listdir(models / 'plain')) == ['branch_0.onnx', 'export.json']
    assert (content['format'], content['scale'], content['channels'], content['multiple']) == (2, 2, 3, 1)
    assert content['about']['source'] == 'routed.pth' and content['about']['network_g']['type'] == 'CDNSR'
    net = build_network(content['about']['network_g'])
    assert [block['macs'] for block in content['branches']] == [count_macs(branch, 64, 64) for branch in net.branches]
    assert content['routing']['costs'][2] == 1 and 'argmax_i (log_softmax' in content['routing']['rule']
    for block in (*content['branches'], content['classifier']):
        data = (models / 'routed' / block['file']).read_bytes()
        assert hashlib.sha256(data).hexdigest() == block['sha256']
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
        shape = model.graph.input[0].type.tensor_type.shape
        assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ['batch', 3, 'height', 'width']


@pytest.mark.slow
def test_modern_networks_keep_their_pictures(tmp_path, picture, capsys):
    branches = [dict(type='SPANV2', num_feat=8, num_block=2, upscale=2), dict(type='SPAN', num_feat=8, num_block=2)]
    branches.append(dict(type='SMFANet', num_feat=8, num_block=2))
    block = dict(type='CDNSR', upscale=2, classifier=dict(type='ErrorPredictor', num_feat=4))
    block['branches'] = [dict(branch, upscale=2) for branch in branches]
    torch.manual_seed(1)
    net = build_network(block).eval()
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.01 * torch.randn_like(param))
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=2), tmp_path / 'modern.pth')
    assert cli.main(['export', str(tmp_path / 'modern.pth'), '-o', str(tmp_path / 'modern')]) == 0
    # SMFANet's pooling can be exported for sides of which 8 is a divisor: what exports pads the others
    assert json.loads((tmp_path / 'modern/export.json').read_text())['multiple'] == 8
    for kind in range(3):
        others = {backend: export.load_exported(tmp_path / 'modern', backend) for backend in BACKENDS}
        x = torch.rand(2, 3, 24, 32)
        with torch.no_grad():
            expected = net.branches[kind](x)
            for other in others.values():
                torch.testing.assert_close(other.branches[kind](x), expected, atol=1e-4, rtol=0)
    expected = upscale(tmp_path / 'modern.pth', picture, out='torch')
    assert np.abs(upscale(tmp_path / 'modern', picture) - expected).mean() < 1


def test_what_torch_itself_loses_is_allowed_to_others():
    # the published SPAN makes of noise values of hundreds, of which float32 loses tens
    class Wild(torch.nn.Module):

        def __init__(self, factor):
            super().__init__()
            self.factor, self.known_geometry = factor, (1, 3, 1)

        def forward(self, x):
            return (x * self.factor + 1e6) - 1e6

    net = Wild(1.)
    assert export.compare(net, {'other': Wild(1.001)})['other'] > 0.1
    with pytest.raises(export.OptionError, match='other makes an output that differs by '):
        export.compare(net, {'other': Wild(2.)})


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('model', ['routed', 'plain'])
def test_pictures_are_the_same_within_one_grey_level(models, picture, backend, model):
    small = ('--patch-size', '24', '--step', '20')
    budgets = [('--budget', budget, '--cost', 'macs') for budget in ('0.6', '0.01')]  # times differ between runtimes
    for options in ((), *budgets) if model == 'routed' else ((), ):
        expected = upscale(models / f'{model}.pth', picture, *small, *options, out='torch')
        assert expected.shape == (142, 188, 3)
        for path in (models / model, models / f'{model}.pth'):
            actual = upscale(path, picture, '--backend', backend, *small, *options, out=backend)
            assert np.abs(actual - expected).max() <= 1
    assert np.abs(upscale(models / model, picture, *small, *options) - expected).max() <= 1  # whatever is installed


@pytest.mark.slow
def test_an_exported_folder_is_not_replaced_unless_told(models, tmp_path, capsys):
    out = tmp_path / 'out'
    shutil.copytree(models / 'routed', out)
    assert cli.main(['export', str(models / 'plain.pth'), '-o', str(out)]) == 2
    assert one_line(capsys).endswith('is already exported; --overwrite replaces it')
    assert cli.main(['export', str(models / 'plain.pth'), '-o', str(out), '--overwrite']) == 0
    assert sorted(os.listdir(out)) == ['branch_0.onnx', 'export.json'] and os.listdir(tmp_path) == ['out']
    (out / 'thesis.tex').write_text('years of work')
    assert cli.main(['export', str(models / 'plain.pth'), '-o', str(out), '--overwrite']) == 2
    assert 'contains thesis.tex, no part of an exported network' in one_line(capsys)
    assert cli.main(['export', str(models / 'plain.pth'), '-o', str(out / 'thesis.tex')]) == 2
    assert 'is a file; expected a folder' in one_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize('difference', ['shifted', 'broken'])
def test_what_differs_from_torch_is_not_exported(models, tmp_path, monkeypatch, capsys, difference):
    make = export.to_onnx

    def other(part, name, *arguments):
        """Another network's branch, by a tenth of a grey level and more."""
        if name == 'branch_1' and difference == 'broken':
            part = build_network(fsrcnn(4, 3)).eval()
        elif name == 'branch_1':
            part.deconv.bias.data += 0.0005
            try:
                return make(part, name, *arguments)
            finally:
                part.deconv.bias.data -= 0.0005
        return make(part, name, *arguments)

    monkeypatch.setattr(export, 'to_onnx', other)
    assert cli.main(['export', str(models / 'routed.pth'), '-o', str(tmp_path / 'out')]) == 2
    assert 'branch_1: ' in one_line(capsys) and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_what_cannot_be_exported_is_one_line(models, tmp_path, monkeypatch, capsys):

    def fail(*args, **kwargs):
        raise RuntimeError('this\nlayer has no ONNX')

    monkeypatch.setattr(torch.onnx, 'export', fail)
    assert cli.main(['export', str(models / 'plain.pth'), '-o', str(tmp_path / 'out')]) == 2
    assert 'branch_0: cannot be exported: RuntimeError: this layer has no ONNX' in one_line(capsys)
    assert cli.main(['export', 'none.pth', '-o', str(tmp_path / 'out')]) == 2
    assert 'none.pth: no such checkpoint file' in one_line(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_missing_packages_are_named(models, picture, tmp_path, monkeypatch, capsys):
    find = runtime.importlib.util.find_spec
    missing = set(runtime.BACKENDS)
    monkeypatch.setattr(runtime.importlib.util, 'find_spec',
                        lambda name, *args: name not in missing and find(name, *args))
    assert cli.main(['export', str(models / 'plain.pth'), '-o', str(tmp_path / 'out')]) == 2
    assert "pip install 'cdnsr-basicsr[onnx]' or pip install 'cdnsr-basicsr[openvino]'" in one_line(capsys)
    assert upscale(models / 'plain', picture) == 2
    assert "pip install 'cdnsr-basicsr[onnx]'" in one_line(capsys)
    assert upscale(models / 'plain.pth', picture, '--backend', 'onnxruntime') == 2
    assert one_line(capsys).endswith("--backend onnxruntime: not installed; pip install 'cdnsr-basicsr[onnx]'")
    missing.clear()
    missing.add('onnx')
    assert cli.main(['export', str(models / 'plain.pth'), '-o', str(tmp_path / 'out')]) == 2
    assert 'not installed' in one_line(capsys)
    assert upscale(models / 'plain', picture).shape == (142, 188, 3)  # running needs the runtime only


def changed(folder, tmp_path, sign=True, **entries):
    """A copy of an exported folder with another description, which has the checksum that it should have if `sign`."""
    out = tmp_path / 'changed'
    shutil.copytree(folder, out)
    path = out / 'export.json'
    content = json.loads(path.read_text())
    content.update(entries)
    content = {key: value for key, value in content.items() if value is not None}
    if sign:
        content['sha256'] = export.digest(content)
    path.write_text(json.dumps(content))
    return out


@pytest.mark.parametrize('entries,message', [
    (dict(format=1), 'expected format 2, but got 1; export the network again'),
    (dict(format=None), 'expected format 2, but got None'),
    (dict(scale=0), 'scale: expected an integer from 1 to 64, but got 0'),
    (dict(scale='2'), "scale: expected an integer from 1 to 64, but got '2'"),
    (dict(channels=4), 'channels: accepted: 1, 3; got 4'),
    (dict(multiple=None), "key 'multiple' is missing"),
    (dict(pickle='x'), 'pickle: unknown key; accepted:'),
    (dict(branches=[]), 'branches: expected a list of 2 to 9'),
    (dict(branches=[1, 2]), 'branch_0: expected a block of options, but got 1'),
    (dict(branches=[dict(file='../x', sha256='', macs=1)] * 2), 'branch_0.file: accepted: branch_0.onnx; got '),
    (dict(branches=[dict(file='branch_0.onnx', sha256=[], macs=1)] * 2), 'has changed since the export'),
    (dict(branches=[dict(file='branch_0.onnx', sha256='', macs=-1)] * 2), 'branch_0.macs: expected an integer'),
    (dict(classifier=3), 'classifier: expected a block of options, but got 3'),
])
def test_a_wrong_description_is_one_line(models, picture, tmp_path, capsys, entries, message):
    folder = changed(models / 'routed', tmp_path, **entries)
    assert upscale(folder, picture) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize('key', ['scale', 'channels', 'multiple', 'tile', 'branches', 'routing', 'about', 'sha256'])
def test_every_edit_of_a_description_is_noticed(models, picture, tmp_path, capsys, key):
    """Also of what would be taken for a network: other costs route tiles otherwise."""
    content = json.loads((models / 'routed/export.json').read_text())
    value = content[key]
    value = dict(
        branches=lambda: [*value[:-1], dict(value[-1], macs=1)],
        routing=lambda: dict(value, costs=[0, 0, 0]),
        about=lambda: {},
        sha256=lambda: value[:-1]).get(key, lambda: value + 1)()
    assert upscale(changed(models / 'routed', tmp_path, sign=False, **{key: value}), picture) == 2
    assert one_line(capsys).endswith('export.json: has changed since the export (its SHA-256 differs); export the '
                                     'network again')


def test_broken_folders_are_one_line(models, picture, tmp_path, capsys):
    folder = tmp_path / 'broken'
    shutil.copytree(models / 'routed', folder)
    data = (folder / 'branch_1.onnx').read_bytes()
    (folder / 'branch_1.onnx').write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert upscale(folder, picture) == 2
    assert 'branch_1.onnx: has changed since the export' in one_line(capsys)
    (folder / 'branch_1.onnx').unlink()
    assert upscale(folder, picture) == 2
    assert 'branch_1.onnx: no such file, which the exported network needs' in one_line(capsys)
    os.mkfifo(folder / 'branch_1.onnx')  # nothing would ever come out of it
    assert upscale(folder, picture) == 2
    assert 'branch_1.onnx: no such file, which the exported network needs' in one_line(capsys)
    (folder / 'export.json').write_text('{"format": 1')
    assert upscale(folder, picture) == 2
    assert 'export.json: describes no exported network: ' in one_line(capsys)
    (folder / 'export.json').write_text('[]')
    assert upscale(folder, picture) == 2
    assert 'expected a block of options, but got []' in one_line(capsys)
    (folder / 'export.json').unlink()
    assert upscale(folder, picture) == 2
    assert 'broken: is a folder; expected a checkpoint' in one_line(capsys)


@pytest.mark.parametrize('backend', BACKENDS)
def test_what_is_no_network_is_one_line(models, picture, tmp_path, capsys, backend):
    """An ONNX file that is none, with the right checksum; and a scale that the network does not have."""
    block = dict(file='branch_0.onnx', sha256=hashlib.sha256(b'none').hexdigest(), macs=1)
    folder = changed(models / 'plain', tmp_path, branches=[block])
    (folder / 'branch_0.onnx').write_bytes(b'none')
    assert upscale(folder, picture, '--backend', backend) == 2
    assert f': {backend} cannot read it: ' in one_line(capsys)
    shutil.rmtree(folder)
    assert upscale(changed(models / 'plain', tmp_path, scale=3), picture, '--backend', backend) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'Failed: {picture}: branch_0 ')


@pytest.mark.parametrize('arguments,message', [
    (['--backend', 'torch'], 'is an exported network; give the checkpoint instead'),
    (['--device', 'cuda'], 'runs on the CPU; --backend torch runs on others'),
    (['--precision', 'float16'], 'not in float16'),
    (['--budget', '0.5'], 'needs a network that routes'),
])
def test_what_a_backend_cannot_do_is_one_line(models, picture, capsys, arguments, message):
    assert upscale(models / 'plain', picture, *arguments) == 2
    assert message in one_line(capsys)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_looks_finished(models, tmp_path):
    out = tmp_path / 'out'
    command = [sys.executable, '-m', 'cdnsr_basicsr', 'export', str(models / 'routed.pth'), '-o', str(out)]
    process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2], stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob('.out.preparing-*/branch_0.onnx')):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert os.listdir(tmp_path), 'the test is void: the run was over before it was killed'
    assert cli.main(['export', str(models / 'routed.pth'), '-o', str(out)]) == 0
    assert os.listdir(tmp_path) == ['out']


@pytest.mark.slow
def test_benchmark_has_rows_for_each_backend(models, tmp_path, monkeypatch, capsys):
    precisions = ['float32', 'bfloat16']
    monkeypatch.setattr('cdnsr_basicsr.benchmark.rows.precisions_of', lambda name: precisions[:1 + (name == 'a')])
    settings = Settings(['m'], 'hr', budgets=[0.5], precisions=precisions, backends=['b', 'a'])
    rows = rows_of(settings, 'm', Network(scale=4, channels=3, num_branches=2))
    assert [(row.precision, row.budget, row.backend) for row in rows
            if row.kind == 'routed'] == [('float32', None, 'b'), ('float32', None, 'a'), ('float32', 0.5, 'b'),
                                         ('float32', 0.5, 'a'), ('bfloat16', None, 'a'), ('bfloat16', 0.5, 'a')]
    assert {row.backend for row in rows if row.kind not in ('tiled', 'routed')} == {'torch'}
    assert Row('m', 'routed', True, budget=0.5, backend='openvino').name == 'routed, budget 0.5 (openvino)'
    monkeypatch.undo()

    (tmp_path / 'hr').mkdir()
    cv2.imwrite(str(tmp_path / 'hr/0.png'), photograph(101, 130))
    arguments = ['-m', str(models / 'routed.pth'), '--data', str(tmp_path / 'hr'), '--repeat', '1']
    assert cli.main(['benchmark', *arguments, '--backends', 'torch', *BACKENDS, '--patch-size', '32']) == 0
    table = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| routed')]
    figures = {row[2]: row[4:8] for row in table}
    for backend in BACKENDS:
        for method in ('tiled', 'routed'):
            expected, actual = figures[method], figures[f'{method} ({backend})']
            assert [float(value) for value in actual] == pytest.approx([float(value) for value in expected], abs=0.011)
    assert cli.main(['benchmark', *arguments, '--backends', BACKENDS[0], '--device', 'cuda']) == 2
    assert 'only torch runs on other devices than the CPU' in one_line(capsys)
