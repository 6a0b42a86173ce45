"""Runs checks.py in a process whose GPU is pretended; here each of its tests is one of these."""
import ast
import os
import pytest
import shutil
import site
import subprocess
import sys
import torch
from pathlib import Path
from xml.etree import ElementTree

from tests.helpers import ENV, ROOT

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent
CHECKS = [node.name for node in ast.parse((FOLDER / 'checks.py').read_text()).body if node.__class__ is ast.FunctionDef]
SEES_A_GPU = 'import torch; assert torch.cuda.get_device_name() == "Pretended GPU"; torch.rand(1, pin_memory=True)'


def headers():
    """Folder of CUDA's headers; None without them."""
    homes = [os.environ.get('CUDA_HOME'), '/usr/local/cuda', *Path('/usr/local').glob('cuda-*')]
    homes += [home for folder in site.getsitepackages() for home in Path(folder, 'nvidia').glob('*')]
    folders = [Path(home, 'include') for home in homes if home]
    needed = ('cuda_runtime_api.h', 'crt/host_defines.h')
    return next((folder for folder in folders if all((folder / name).is_file() for name in needed)), None)


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    """What became of each check: its failures, by its name."""
    folder, include = tmp_path_factory.mktemp('pretend_gpu'), headers()
    if torch.version.cuda is None or include is None or shutil.which('g++') is None:
        pytest.skip("needs g++, CUDA's headers and a CUDA build of torch")
    shim, report = folder / 'libcuda.so.1', folder / 'report.xml'  # with the name of what it stands for
    command = ['g++', '-O1', '-shared', '-fPIC', '-Wl,-soname,libcuda.so.1', f'-I{include}', FOLDER / 'shim.cpp']
    built = subprocess.run([*command, '-o', shim], capture_output=True, text=True, check=False)
    env = {name: value for name, value in ENV.items() if name != 'CUDA_VISIBLE_DEVICES'}
    env.update(LD_PRELOAD=str(shim), XDG_CACHE_HOME=str(folder))
    tried = subprocess.run([sys.executable, '-c', SEES_A_GPU], env=env, capture_output=True, text=True, check=False)
    if built.returncode or tried.returncode:
        reason = (built.stderr + tried.stderr).strip().splitlines()[-1:]
        pytest.skip(f'torch {torch.__version__} does not take the pretended GPU: {reason}')
    command = ['-m', 'pytest', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider', '-p', 'tests.pretend_gpu.pretend']
    command += [f'--basetemp={folder / "checks"}', f'--junitxml={report}', FOLDER / 'checks.py']
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert report.is_file(), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter('testcase'):
        failures = [f'{case.get("name")}\n{one.text}' for kind in ('failure', 'error') for one in case.iter(kind)]
        found.setdefault(case.get('name').split('[')[0], []).extend(failures)
    return found


@pytest.mark.parametrize('check', [name for name in CHECKS if name.startswith('test_')])
def test_on_a_pretended_gpu(outcomes, check):
    assert not outcomes[check], '\n'.join(outcomes[check])
