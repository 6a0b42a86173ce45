"""scripts/upstream_check.sh passes on the BasicSR that is installed, fails where something could not go upstream."""
import os
import pytest
import shutil
import subprocess
import sys
from pathlib import Path

import basicsr

pytestmark = pytest.mark.slow  # processes of their own

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(basicsr.__path__[0])


def check(path, *args, root=ROOT):
    env = {**os.environ, 'PATH': os.pathsep.join((str(Path(sys.executable).parent), os.environ['PATH']))}
    script = root / 'scripts' / 'upstream_check.sh'
    return subprocess.run(['bash', str(script), str(path), *args], env=env, capture_output=True, text=True)


def state_of(folder):
    """Names, sizes and times of all files."""
    stats = {path: path.stat() for path in folder.rglob('*') if '__pycache__' not in path.parts}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def tree(tmp_path):
    """A folder with BasicSR's package."""
    shutil.copytree(INSTALLED, tmp_path / 'tree' / 'basicsr', ignore=shutil.ignore_patterns('__pycache__'))
    return tmp_path / 'tree'


def test_what_is_no_basicsr_is_said_in_one_line(tmp_path):
    for path in (tmp_path, tmp_path / 'none', ''):
        result = check(path)
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.count('\n') == 1 and f"'{path}' is no BasicSR: expected" in result.stderr


def test_archs_and_losses_run_in_basicsr(tree):
    (tree / 'basicsr' / 'version.py').unlink()  # as in a fresh checkout
    before = state_of(tree)
    result = check(tree, '-k', 'mean_is_no_parameter')
    assert result.returncode == 0, result.stdout + result.stderr
    assert state_of(tree) == before
    lines = result.stdout.splitlines()
    assert lines[-1].startswith('All steps have passed') and 'FAIL' not in result.stdout
    assert any('written in the copy, basicsr/version.py' in line for line in lines)
    ran = {line.split()[1][:-1] for line in lines if line.endswith('comes back from its state dict')}
    files = [
        *(ROOT / 'cdnsr_basicsr' / 'archs').glob('*_arch.py'), *(ROOT / 'cdnsr_basicsr' / 'losses').glob('[a-z]*.py')
    ]
    assert ran == {f'basicsr/{path.parent.name}/{path.name}' for path in files}
    assert any('1 passed' in line for line in lines)


def test_a_name_that_basicsr_has_is_told(tree):
    shutil.copy(ROOT / 'cdnsr_basicsr' / 'archs' / 'span_arch.py', tree / 'basicsr' / 'archs')
    result = check(tree)
    assert result.returncode == 1 and 'BasicSR has a file archs/span_arch.py' in result.stdout
    assert '... has a SPAN' in result.stdout and 'SPANV2' not in result.stdout


@pytest.mark.parametrize('name, old, new, expected', [
    ('archs/cdnsr_arch.py', 'from basicsr.utils', 'from basicsr.archs import build_network\nfrom basicsr.utils',
     'FAIL  BasicSR imports with them'),
    ('archs/etds_arch.py', 'from basicsr.utils', 'import cdnsr_basicsr\nfrom basicsr.utils',
     'FAIL  BasicSR imports with them'),
])
def test_an_arch_that_needs_more_than_basicsr_fails(tmp_path, name, old, new, expected):
    for part in ('cdnsr_basicsr/archs', 'cdnsr_basicsr/losses', 'scripts', 'tests/test_archs'):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'setup.cfg', tmp_path)
    broken = tmp_path / 'cdnsr_basicsr' / name
    broken.write_text(broken.read_text().replace(old, new, 1))
    result = check(INSTALLED, root=tmp_path)
    assert result.returncode == 1 and expected in result.stdout
