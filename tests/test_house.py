"""Rules for all modules: who may import whom, that every option file builds, and that docs equal the code."""
import ast
import copy
import importlib.util
import os
import pytest
import re
import sys
import torch
from pathlib import Path

from basicsr.archs import build_network
from basicsr.models import build_model
from cdnsr_basicsr.options import checks, read_options
from tests.helpers import BACKBONES, photographs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'cdnsr_basicsr'
OPTIONS = sorted((ROOT / 'options').glob('*.yml'))
# module (a file or folder) -> what of this package it may import; downward only, nothing imports cli
ALLOWED = {
    '__init__': {'loading', '_compat', 'archs', 'conversion', 'data', 'losses', 'models', 'options', 'registration'},
    '__main__': {'cli'},
    '_compat': {'checkpoint', 'conversion', 'options', 'zoo'},
    'archs': {'registration'},
    'losses': {'registration'},
    'registration': set(),
    'complexity': set(),
    'decoding': set(),
    'conversion': {'archs', 'checkpoint', 'files', 'options'},
    'demo': {'decoding', 'inference', 'loading', 'options', 'settings'},
    'environment': {'__init__', '_compat', 'machine', 'zoo'},
    'files': {'options'},
    'machine': set(),
    'options': set(),
    'zoo': {'options'},
    'checkpoint': {'files', 'inference', 'options', 'registration', 'zoo'},
    'evaluation': {'data', 'inference', 'options'},
    'inference': {'complexity', 'decoding', 'files', 'machine', 'memory', 'options', 'settings'},
    'settings': {'options'},
    'cluster': {'files', 'inference', 'loading', 'options', 'settings'},
    'loading': {'__init__', 'calibration', 'conversion', 'export', 'inference', 'memory', 'options', 'settings'},
    'benchmark': {
        '__init__', 'archs', 'calibration', 'complexity', 'conversion', 'evaluation', 'export', 'files', 'inference',
        'loading', 'memory', 'options'
    },
    'calibration': {'evaluation', 'files', 'inference', 'machine', 'options', 'zoo'},
    'data':
    {'archs', 'checkpoint', 'conversion', 'files', 'inference', 'losses', 'options', 'registration', 'settings'},
    'export': {'files', 'inference', 'options'},
    'memory': set(),
    'models': {'checkpoint', 'files', 'inference', 'losses', 'options', 'registration'},
    'ranks': {'options'},
    'router': {'inference', 'losses'},
    'routing': {'archs', 'complexity', 'evaluation', 'files', 'inference', 'losses', 'memory', 'options', 'router'},
    'spandrel_support': {'__init__', 'checkpoint', 'inference'},
    'pipeline': {'__init__', 'checkpoint', 'data', 'files', 'memory', 'options', 'ranks'},
    'cli': {
        '__init__', 'archs', 'benchmark', 'calibration', 'checkpoint', 'cluster', 'conversion', 'data', 'demo',
        'environment', 'export', 'files', 'inference', 'loading', 'memory', 'options', 'pipeline', 'router', 'routing',
        'settings', 'zoo'
    },
}


@pytest.mark.parametrize('module',
                         ['inference', 'loading.py', 'calibration.py', 'export.py', 'benchmark', 'data/label.py'])
def test_one_place_asks_what_a_network_can(module):
    files = [PACKAGE / module] if module.endswith('.py') else sorted((PACKAGE / module).glob('*.py'))
    asking = [path.name for path in files if 'hasattr(' in path.read_text()]
    assert asking == (['network.py'] if module == 'inference' else [])


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].replace('.py', '')


def imports_of(path):
    """Modules of this package, and other packages, that a file imports."""
    modules, others = set(), set()
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
            modules |= {parts[0]} if parts else {
                n if (PACKAGE / n).exists() or (PACKAGE / f'{n}.py').exists() else '__init__'
                for n in names
            }
    return modules - {module_of(path)}, others


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    modules, _ = imports_of(path)
    assert modules <= ALLOWED[module_of(path)]


@pytest.mark.parametrize('name', ['inference/tiling.py', 'inference/budget.py', 'complexity.py'])
def test_tiling_and_complexity_need_torch_only(name):
    _, others = imports_of(PACKAGE / name)
    assert others <= {'torch', '__future__', 'contextlib', 'copy', 'logging', 'typing', 'statistics', 'time'}


STANDARD = {'collections', 'contextlib', 'copy', 'itertools', 'math', 'os', 'typing'}  # modules that these need
UPSTREAM = sorted([*(PACKAGE / 'archs').glob('*_arch.py'), *(PACKAGE / 'losses').glob('[a-z]*.py')])


@pytest.mark.parametrize('path', UPSTREAM, ids=lambda path: path.name)
def test_archs_and_losses_could_go_upstream(path):
    modules, others = imports_of(path)
    assert not modules and others <= {'basicsr', 'torch', 'torchvision', *STANDARD}
    # an arch that imports all archs imports itself; the counter of operations is not in every torch that BasicSR takes
    text = path.read_text()
    assert 'from basicsr.archs import' not in text and not re.search(r'^(from|import) torch.utils.flop', text, re.M)


@pytest.mark.parametrize('path', sorted((ROOT / 'tests' / 'test_archs').glob('test_*.py')), ids=lambda path: path.name)
def test_tests_of_archs_could_go_upstream(path):
    assert not re.search(r'^ *(from|import) +(cdnsr_basicsr|tests|\.)', path.read_text(), re.M)


def test_every_import_is_a_declared_dependency():
    needed = (ROOT / 'setup.py').read_text().split('extras_require')[0]  # and what export and its runtimes need
    declared = set(re.findall(r"'([a-z-]+)(?:\[[a-z]+\])?>=", needed))
    names = {'yaml': 'pyyaml', 'cv2': 'opencv-python', 'PIL': 'pillow'}
    used = {name for path in PACKAGE.rglob('*.py') for name in imports_of(path)[1]}
    installed = {names.get(name, name) for name in used - {PACKAGE.name} if not is_standard(name)}
    assert installed <= declared
    assert {'basicsr', 'numpy', 'opencv-python', 'pyyaml', 'torch'} <= installed  # these are found


def is_standard(name):
    """Whether a module comes with Python. Python 3.9 has no list of these: it has them in a folder of its own."""
    if sys.version_info >= (3, 10):
        return name in sys.stdlib_module_names
    spec = importlib.util.find_spec(name)
    place = Path(spec.origin or '') if spec else Path()
    return name in sys.builtin_module_names or (Path(os.__file__).parent in place.parents
                                                and 'site-packages' not in place.parts)


@pytest.mark.slow
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
        degraded = block['type'] == 'PhotographDataset'
        for key in ('dataroot_gt', ) if degraded else ('dataroot_gt', 'dataroot_lq'):
            assert block[key].startswith('datasets/')


@pytest.mark.slow
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
    if opt['model_type'] == 'FastRealESRNetModel':
        model.feed_data(photographs(2, 224))
    else:
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


def test_usage_in_the_docs_equals_help(capsys):
    from cdnsr_basicsr import cli
    page = (ROOT / 'docs' / 'CommandLine.md').read_text()
    usage = {}
    for block in re.findall(r'```text\n\$ basicsr ([^\n]*)\n(.*?)```', page, re.S):
        usage[block[0]] = block[1]
    assert set(usage) == {
        '--help', 'train --help', 'test --help', 'prepare --help', 'label --help', 'convert --help', 'export --help',
        'models --help', 'upscale --help', 'route --help', 'calibrate --help', 'benchmark --help', 'demo --help',
        'env --help'
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
    from cdnsr_basicsr.conversion.registry import families
    with pytest.raises(SystemExit):
        cli.main(['convert', '--help'])
    named = re.search('family of the file: (.*?) [(]default', normalized(capsys.readouterr().out)).group(1)
    assert re.split(', | or ', named) == sorted(families())


def test_readme_says_of_every_family_which_files_are_read():
    from cdnsr_basicsr.conversion.registry import families
    table = re.search(r'\| method .* weights that `basicsr convert` reads \|\n\| --- .*\n((\|.*\n)+)',
                      (ROOT / 'README.md').read_text())
    cells = [row.rstrip(' |').rsplit(' | ', 1)[1] for row in table.group(1).splitlines()]
    assert sorted(cells) == sorted({family.files for family in families().values()})


def test_readme_and_model_zoo_list_the_shipped_models_as_the_command_does(capsys):
    from cdnsr_basicsr import cli
    assert cli.main(['models']) == 0
    listed = normalized(capsys.readouterr().out)
    for name, text in (('README.md', listed.partition('best first.')[0]), ('docs/ModelZoo.md', listed)):
        assert text in normalized((ROOT / name).read_text()), f'{name} does not hold what `basicsr models` prints'


def normalized(text):
    # Python 3.9 says 'optional arguments', newer ones wrap and repeat metavars differently
    return re.sub(r'\s+', ' ', text.replace('optional arguments:', 'options:')).strip()


def test_docs_list_every_option_file():
    page = (ROOT / 'docs' / 'Training.md').read_text()
    placeholders = {'etds_[tsml]_x[234]': 'etds_SIZE_xSCALE', f'({"|".join(BACKBONES)})(?!_SIZE)': 'BACKBONE'}
    names = {path.name: path.name for path in OPTIONS}
    for pattern, placeholder in placeholders.items():
        names = {name: re.sub(pattern, placeholder, general) for name, general in names.items()}
    assert [name for name, general in names.items() if name not in page and general not in page] == []


def backbones_with(pattern):
    """Backbones of the option files whose names fit a pattern with one group."""
    matches = (re.fullmatch(pattern, path.stem) for path in OPTIONS)
    return sorted({match.group(1) for match in matches if match})


def backbones_that_predict_errors():
    """Backbones whose stage 2 has a classifier that predicts the errors of the branches."""
    stages = {name: read_options(str(ROOT / 'options' / f'train_cdnsr_{name}.yml')) for name in BACKBONES}
    return [name for name, opt in stages.items() if opt['network_g']['classifier']['type'].startswith('Error')]


def test_docs_say_which_backbones_have_which_option_files():
    row = r'^\| `(\w+)` \|[^|]*\| (published|predicts errors|maps errors) \| (yes|-) \| (yes|-) \|$'
    rows = re.findall(row, (ROOT / 'docs' / 'Training.md').read_text(), re.M)
    assert [name for name, *_ in rows] == BACKBONES == backbones_with('train_cdnsr_([a-z0-9]+)')
    assert [name for name, classifier, *_ in rows if classifier != 'published'] == backbones_that_predict_errors()
    assert [name for name, _, classsr, _ in rows if classsr == 'yes'] == backbones_with('train_classsr_(.*)')
    assert [name for name, _, _, pcsr in rows if pcsr == 'yes'] == backbones_with('train_pcsr_(.*)_phase1')


def anchors_of(page):
    """What links to headings of a page of Markdown are called."""
    headings = re.findall('^#+ (.*)$', re.sub('```.*?```', '', page.read_text(), flags=re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').rglob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_of_the_docs_lead_somewhere(page):
    text = re.sub('```.*?```', '', page.read_text(), flags=re.S)
    for place, _, anchor in re.findall(r'\]\((?!https?:)([^)#]*)(#([^)]*))?\)', text):
        target = (page.parent / place) if place else page
        assert target.exists(), f'{page.name}: {place}'
        assert not anchor or anchor in anchors_of(target), f'{page.name}: {place}#{anchor}'
