"""Rules of the house: who may import whom, and that every option file builds."""
import ast
import copy
import pytest
import re
import torch
from pathlib import Path

from basicsr.archs import build_network
from basicsr.models import build_model
from cdnsr_basicsr import checks
from cdnsr_basicsr.options import read_options
from tests.conftest import BACKBONES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'cdnsr_basicsr'
OPTIONS = sorted((ROOT / 'options').glob('*.yml'))
# room or module -> what of this package it may import; downward only, nothing imports cli
ALLOWED = {
    '__init__': {'_compat', 'archs', 'data', 'losses', 'models', 'options'},
    '__main__': {'cli'},
    '_compat': {'checkpoint', 'options', 'zoo'},
    'archs': set(),
    'losses': set(),
    'complexity': set(),
    'decoding': set(),
    'conversion': {'archs', 'checkpoint', 'files', 'options'},
    'files': {'options'},
    'options': set(),
    'zoo': {'options'},
    'checkpoint': {'files', 'inference', 'options', 'zoo'},
    'evaluation': {'data', 'inference', 'options'},
    'inference': {'complexity', 'decoding', 'files'},
    'benchmark': {
        '__init__', 'archs', 'calibration', 'checkpoint', 'complexity', 'evaluation', 'export', 'files', 'inference',
        'memory', 'options'
    },
    'calibration': {'evaluation', 'files', 'inference', 'options', 'zoo'},
    'checks': {'options'},
    'data': {'archs', 'checkpoint', 'files', 'inference', 'losses', 'options'},
    'export': {'files', 'inference', 'options'},
    'memory': set(),
    'models': {'checkpoint', 'inference', 'losses', 'options'},
    'ranks': {'options'},
    'pipeline': {'__init__', 'checkpoint', 'checks', 'data', 'files', 'memory', 'options', 'ranks'},
    'cli': {
        '__init__', 'benchmark', 'calibration', 'checkpoint', 'conversion', 'data', 'export', 'files', 'inference',
        'memory', 'options', 'pipeline', 'zoo'
    },
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].replace('.py', '')


def imports_of(path):
    """Rooms of this package, and other packages, that a file imports."""
    rooms, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split('.')[0])
        elif isinstance(node, ast.ImportFrom):
            base = path.parent.parts[len(PACKAGE.parts):] if node.level == 1 else path.parent.parts[len(PACKAGE.parts
                                                                                                        ):-1]
            parts = list(base) + (node.module.split('.') if node.module else [])
            names = [alias.name for alias in node.names]
            rooms |= {parts[0]} if parts else {
                n if (PACKAGE / n).exists() or (PACKAGE / f'{n}.py').exists() else '__init__'
                for n in names
            }
    return rooms - {room_of(path)}, others


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    rooms, _ = imports_of(path)
    assert rooms <= ALLOWED[room_of(path)]


@pytest.mark.parametrize('name', ['inference/tiling.py', 'inference/budget.py', 'complexity.py'])
def test_tiling_and_complexity_need_torch_only(name):
    _, others = imports_of(PACKAGE / name)
    assert others <= {'torch', '__future__', 'copy', 'typing', 'statistics', 'time'}


@pytest.mark.parametrize('path', sorted((PACKAGE / 'archs').glob('*_arch.py')), ids=lambda path: path.name)
def test_archs_could_go_upstream(path):
    rooms, others = imports_of(path)
    assert not rooms and others <= {'basicsr', 'torch', 'typing', 'contextlib', 'math'}


def test_every_import_is_a_declared_dependency():
    needed = (ROOT / 'setup.py').read_text().split('extras_require')[0]  # and what export and its runtimes need
    declared = set(re.findall(r"'([a-z-]+)>=", needed))
    names = {'yaml': 'pyyaml', 'cv2': 'opencv-python', 'PIL': 'pillow'}
    used = set()
    for path in PACKAGE.rglob('*.py'):
        used |= imports_of(path)[1]
    import sys
    standard = set(getattr(sys, 'stdlib_module_names', ())) or used
    assert {names.get(name, name) for name in used - standard - {PACKAGE.name}} <= declared


@pytest.mark.parametrize('path', OPTIONS, ids=lambda path: path.name)
def test_option_file_builds(path, monkeypatch):
    opt = read_options(str(path))
    assert opt['name'] == path.stem and opt['num_gpu'] == 'auto'
    monkeypatch.setattr(checks, 'check_path', lambda value, where: None)
    monkeypatch.setattr('os.path.isfile', lambda path: True)
    checks.check_options(opt, path.stem.startswith('train'))
    net = build_network(opt['network_g'])
    assert net(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8 * opt['scale'], 8 * opt['scale'])
    for block in opt['datasets'].values():
        assert block['dataroot_gt'].startswith('datasets/') and block['dataroot_lq'].startswith('datasets/')


@pytest.mark.parametrize(
    'path', [path for path in OPTIONS if path.stem.startswith('train')], ids=lambda path: path.name)
def test_option_file_trains_one_step(path, tmp_path):
    opt = copy.deepcopy(read_options(str(path)))
    opt.update(num_gpu=0, dist=False, is_train=True, rank=0, world_size=1)
    opt['path'] = {'resume_state': None}
    if 'feature_extractor' in opt['train']:
        opt['train']['feature_extractor']['weights'] = 'random'
    model = build_model(opt)
    before = copy.deepcopy(model.net_g.state_dict())
    lq, gt = (torch.rand(2, 3, 8 * scale, 8 * scale) for scale in (1, opt['scale']))
    model.feed_data({'lq': lq, 'gt': gt, 'lq_path': ['a'] * 2, 'label': torch.tensor([0, 2])})
    model.update_learning_rate(1, warmup_iter=-1)
    model.optimize_parameters(1)
    moved = {
        key.split('.')[0]
        for key, value in model.net_g.state_dict().items() if not torch.equal(value, before[key])
    }
    if opt['model_type'] == 'CDNSRModel':
        assert moved == {'branches', 'classifier'} - set(opt['train'].get('freeze', []))
        losses = {f"l_{name[:-4]}" for name, block in opt['train'].items() if name.endswith('_opt') and block}
        assert {name for name in model.get_current_log() if name.startswith('l_')} == losses
    elif opt['model_type'] == 'PCSRModel':
        assert moved == {0: {'backbone', 'heavy'}, 1: {'light', 'classifier'}}[opt['train']['phase']]
    else:
        assert moved


def test_usage_in_the_readme_equals_help(capsys):
    from cdnsr_basicsr import cli
    readme = (ROOT / 'README.md').read_text()
    usage = {}
    for block in re.findall(r'```text\n\$ basicsr ([^\n]*)\n(.*?)```', readme, re.S):
        usage[block[0]] = block[1]
    assert set(usage) == {
        '--help', 'train --help', 'test --help', 'prepare --help', 'label --help', 'convert --help', 'export --help',
        'models --help', 'upscale --help', 'calibrate --help', 'benchmark --help'
    }
    for command, text in usage.items():
        with pytest.raises(SystemExit):
            cli.main(command.split())
        assert normalized(capsys.readouterr().out) == normalized(text)


def test_a_command_is_a_module_and_a_name_in_the_list():
    from cdnsr_basicsr import cli
    modules = {path.stem for path in (PACKAGE / 'cli').glob('*.py')} - {'__init__', 'arguments'}
    assert modules == set(cli.COMMANDS) and len(cli.COMMANDS) == len(modules)


def test_help_of_convert_names_every_family(capsys):
    from cdnsr_basicsr import cli
    from cdnsr_basicsr.conversion.convert import FAMILIES
    with pytest.raises(SystemExit):
        cli.main(['convert', '--help'])
    named = re.search('whose file it is: (.*?) [(]default', normalized(capsys.readouterr().out)).group(1)
    assert re.split(', | or ', named) == sorted(FAMILIES)


def test_readme_and_model_zoo_list_the_shipped_models_as_the_command_does(capsys):
    from cdnsr_basicsr import cli
    assert cli.main(['models']) == 0
    listed = normalized(capsys.readouterr().out)
    for name in ('README.md', 'docs/ModelZoo.md'):
        assert listed in normalized((ROOT / name).read_text()), f'{name} does not hold what `basicsr models` prints'


def normalized(text):
    # Python 3.9 says 'optional arguments', newer ones wrap and repeat metavars differently
    return re.sub(r'\s+', ' ', text.replace('optional arguments:', 'options:')).strip()


def test_readme_lists_every_option_file():
    readme = (ROOT / 'README.md').read_text()
    placeholders = {'etds_[tsml]_x[234]': 'etds_SIZE_xSCALE', f'({"|".join(BACKBONES)})(?!_SIZE)': 'BACKBONE'}
    names = {path.name: path.name for path in OPTIONS}
    for pattern, placeholder in placeholders.items():
        names = {name: re.sub(pattern, placeholder, general) for name, general in names.items()}
    assert [name for name, general in names.items() if name not in readme and general not in readme] == []


def backbones_with(pattern):
    """Backbones of the option files whose names fit a pattern with one group."""
    matches = (re.fullmatch(pattern, path.stem) for path in OPTIONS)
    return sorted({match.group(1) for match in matches if match})


def backbones_that_predict_errors():
    """Backbones whose stage 2 has a classifier that predicts the errors of the branches."""
    stages = {name: read_options(str(ROOT / 'options' / f'train_cdnsr_{name}.yml')) for name in BACKBONES}
    return [name for name, opt in stages.items() if opt['network_g']['classifier']['type'] == 'ErrorPredictor']


@pytest.mark.parametrize('name, sentence, backbones', [
    ('README.md', r'BACKBONE is (.*?)\. ', BACKBONES),
    ('README.md', r'`train_classsr_BACKBONE\.yml` instead of stages 2 to 4, for (.*?)\. ',
     backbones_with('train_classsr_(.*)')),
    ('README.md', r'then `train_pcsr_BACKBONE_phase1\.yml`, for (.*?), and `test_pcsr',
     backbones_with('train_pcsr_(.*)_phase1')),
    ('docs/Deviations.md', 'the option files of (.*?) and the shipped models', backbones_that_predict_errors()),
])  # yapf: disable
def test_sentences_name_the_backbones_that_have_option_files(name, sentence, backbones):
    found = re.findall(sentence, normalized((ROOT / name).read_text()))
    assert len(found) == 1
    assert sorted(re.findall('`([^`]*)`', found[0])) == backbones
