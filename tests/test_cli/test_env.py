"""`basicsr env` and `basicsr --version`: what there is, and what of it fails."""
import os
import pytest
import re
import subprocess
import sys
import torch
from importlib import metadata
from types import SimpleNamespace

import cdnsr_basicsr
from cdnsr_basicsr import cli, environment
from tests.helpers import ENV, documented, strict_json

OWN = metadata.EntryPoint('cdnsr', 'cdnsr_basicsr:register', 'basicsr.plugins')


@pytest.fixture
def installed(monkeypatch):
    """Sets the plugins that are installed, by default this one alone, and leaves out what is slow to import."""

    def set_(*points):
        monkeypatch.setattr(metadata, 'entry_points', lambda: {'basicsr.plugins': points})

    set_(OWN)
    monkeypatch.setattr(environment, 'OPTIONAL', {'no-package': 'no_such_module'})
    return set_


def env(capfd, *arguments):
    """Exit code, standard output and standard error of `basicsr env`."""
    code = cli.main(['env', *arguments])
    return (code, *capfd.readouterr())


def version(capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main(['--version'])
    assert not ended.value.code
    return capfd.readouterr().out.splitlines()


def test_json_says_what_the_text_says(installed, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, plain, _ = env(capfd)
    assert code == 0
    code, output, _ = env(capfd, '--json')
    content = strict_json(output)
    assert code == 0 and set(content) == documented('env') and content['failed'] == []
    versions = content['versions']
    assert versions['torch'] == torch.__version__ and versions['cdnsr_basicsr'] == cdnsr_basicsr.__version__
    assert versions['python'] == '.'.join(map(str, sys.version_info[:3])) and versions['no-package'] is None
    assert re.search('^no-package +not installed$', plain, re.M)
    assert content['plugins'] == {'cdnsr': 'cdnsr_basicsr:register'}
    assert content['cpu']['threads'] == torch.get_num_threads() and content['cpu']['cpus'] >= 1
    assert content['cuda'] == torch.version.cuda
    paths = content['paths']
    assert os.path.isfile(os.path.join(paths['shipped_models'], 'models.json'))
    assert paths['own_models'] == str(tmp_path / 'experiments/pretrained_models')
    assert paths['speeds'] == os.path.join(os.environ['XDG_CACHE_HOME'], 'cdnsr_basicsr', 'speed.json')
    assert f'{paths["own_models"]} (does not exist)' in plain and f'{paths["shipped_models"]}\n' in plain
    said = [*versions.values(), content['system'], content['cpu']['model'], *paths.values(), 'cdnsr_basicsr:register']
    assert [value for value in said if value and value not in plain] == []


def test_gpus_are_named(installed, capfd, monkeypatch):
    gpu = SimpleNamespace(name='NVIDIA Abacus', total_memory=80 * 2**30 + 5)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('torch.cuda.get_device_properties', lambda index: gpu)
    code, output, _ = env(capfd, '--json')
    assert code == 0 and strict_json(output)['gpus'] == [dict(name='NVIDIA Abacus', memory_mib=81920)] * 2
    assert re.search('^GPU 1 +NVIDIA Abacus, 81920 MiB$', env(capfd)[1], re.M)
    assert version(capfd)[1] == f'torch {torch.__version__} on cuda (NVIDIA Abacus)'


def test_a_driver_that_fails_is_named(installed, capfd, monkeypatch):

    def fail():
        raise RuntimeError('no\ndriver')

    monkeypatch.setattr('torch.cuda.is_available', fail)
    code, output, errors = env(capfd, '--json')
    content = strict_json(output)
    assert code == 1 and content['failed'] == [dict(name='torch', reason='RuntimeError: no driver')]
    assert content['versions']['torch'] == torch.__version__ and content['gpus'] == []
    assert 'Failed: torch: RuntimeError: no driver\n' in errors
    assert version(capfd)[1].startswith(f'torch {torch.__version__} on cpu (')


def test_torch_that_cannot_be_imported_is_named(installed, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    code, output, errors = env(capfd)
    assert code == 1 and errors.startswith('Failed: torch: ModuleNotFoundError: ')
    assert re.search('^torch +cannot be imported$', output, re.M) and re.search(r'^numpy +\d', output, re.M)
    code, output, _ = env(capfd, '--json')
    content = strict_json(output)
    assert code == 1 and content['failed'][0]['name'] == 'torch'
    assert (content['versions']['torch'], content['cpu']['threads'], content['cuda']) == (None, None, None)
    lines = version(capfd)
    assert lines[0] == f'cdnsr_basicsr {cdnsr_basicsr.__version__}'
    assert lines[1].startswith('torch cannot be imported: ModuleNotFoundError: ')


@pytest.mark.slow
def test_without_torch_from_the_beginning():
    code = ("import sys; sys.modules['torch'] = None; from cdnsr_basicsr import cli\n"
            "sys.exit(cli.main(['env', '--json']))")
    done = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True)
    content = strict_json(done.stdout)
    failed = {failure['name'] for failure in content['failed']}
    assert done.returncode == 1 and {'torch', 'torchvision', 'basicsr'} <= failed
    assert content['versions']['numpy'] and content['cpu']['model']
    assert [name for name in failed if f'\nFailed: {name}: ' not in f'\n{done.stderr}'] == []


def test_a_plugin_that_fails_is_named_and_the_others_are_loaded(installed, capfd, tmp_path, monkeypatch):
    (tmp_path / 'plugin_of_env.py').write_text('loaded = []\nregister = lambda: loaded.append(1)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(OWN, metadata.EntryPoint('broken', 'no_such_module:register', 'basicsr.plugins'),
              metadata.EntryPoint('other', 'plugin_of_env:register', 'basicsr.plugins'))
    code, output, errors = env(capfd)
    assert code == 1
    assert errors == "Failed: plugin broken: ModuleNotFoundError: No module named 'no_such_module'\n"
    assert re.findall(r'^plugin (\w+)', output, re.M) == ['broken', 'other', 'cdnsr']
    assert len(sys.modules['plugin_of_env'].loaded) == 1
    assert version(capfd)[2] == 'plugins: broken, other, cdnsr'
    assert len(sys.modules['plugin_of_env'].loaded) == 1  # named only


def test_an_extra_that_is_broken_is_named(installed, capfd, tmp_path, monkeypatch):
    (tmp_path / 'broken_extra.py').write_text('import no_such_module')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(environment, 'OPTIONAL', {'broken-extra': 'broken_extra'})
    code, output, errors = env(capfd)
    assert code == 1 and re.search('^broken-extra +cannot be imported$', output, re.M)
    assert errors == "Failed: broken-extra: ModuleNotFoundError: No module named 'no_such_module'\n"


@pytest.mark.slow
def test_all_optional_packages_have_a_version_or_are_not_installed(capfd):
    content = strict_json(env(capfd, '--json')[1])
    for name in environment.OPTIONAL:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            assert content['versions'][name] is None
        else:
            assert re.match(r'\d+\.\d+', content['versions'][name])


def test_version_needs_no_plugin(installed, capfd):
    installed()
    lines = version(capfd)
    assert lines[0] == f'cdnsr_basicsr {cdnsr_basicsr.__version__}' and lines[2:] == ['plugins: none']
    assert lines[1].startswith(f'torch {torch.__version__} on c')
