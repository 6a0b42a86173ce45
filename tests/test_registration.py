"""This package's classes beside those of others in BasicSR's registries, each in a process of its own."""
import os
import pytest
import shutil
import subprocess
import sys
from pathlib import Path

import basicsr

pytestmark = pytest.mark.slow  # processes of their own

ROOT = Path(__file__).resolve().parent.parent
# the archs of what it makes, and the warnings of registering
SHOWN = '''
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    cdnsr_basicsr.load_plugins()
    cdnsr_basicsr.load_plugins()
messages = [str(warning.message) for warning in caught if 'already registered' in str(warning.message)]
'''
OTHERS = '''
import torch
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY


@ARCH_REGISTRY.register()
class SPAN(torch.nn.Module):
    pass


@ARCH_REGISTRY.register()
class CARN_M(torch.nn.Module):
    pass


@LOSS_REGISTRY.register()
def ClassLoss():
    pass


@MODEL_REGISTRY.register()
class CDNSRModel:
    pass


@DATASET_REGISTRY.register()
class LabeledPatchDataset:
    pass


def register():
    pass
'''


def run(code, folder):
    """Runs a program that finds modules in a folder first, then this package."""
    path = os.pathsep.join((str(folder), str(ROOT)))
    subprocess.run([sys.executable, '-c', code], check=True, cwd=folder, env={**os.environ, 'PYTHONPATH': path})


@pytest.fixture
def others(tmp_path):
    """A folder with a plugin that has names of this package."""
    (tmp_path / 'others.py').write_text(OTHERS)
    return tmp_path


@pytest.mark.parametrize('how', ['module', 'plugin'])
def test_names_that_others_have_taken_get_a_suffix_and_a_warning(others, how):
    if how == 'plugin':
        (others / 'others-1.0.dist-info').mkdir()
        (others / 'others-1.0.dist-info' / 'METADATA').write_text('Name: others\nVersion: 1.0\n')
        (others / 'others-1.0.dist-info' /
         'entry_points.txt').write_text('[basicsr.plugins]\nothers = others:register\n')
    first = 'import others' if how == 'module' else ''
    run(
        f'import cdnsr_basicsr\n{first}\n{SHOWN}' + '''
import others, torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
from cdnsr_basicsr import archs, data, losses, models
from cdnsr_basicsr.options import check_network
expected = ['arch CARN_M', 'arch SPAN', 'dataset LabeledPatchDataset', 'loss ClassLoss', 'model CDNSRModel']
assert sorted(messages) == [f'others has already registered a {name} in BasicSR; that of cdnsr_basicsr is '
                            f'{name.split()[1]}_cdnsr' for name in expected], messages
for registry, ours, name in ((ARCH_REGISTRY, archs, 'SPAN'), (LOSS_REGISTRY, losses, 'ClassLoss'),
                             (MODEL_REGISTRY, models, 'CDNSRModel'), (DATASET_REGISTRY, data, 'LabeledPatchDataset')):
    assert registry.get(name) is getattr(others, name)
    assert registry.get(f'{name}_cdnsr') is getattr(ours, name)
    assert getattr(ours, name).__module__.startswith('cdnsr_basicsr.')
    assert 'register' not in vars(registry)  # as it was
assert ARCH_REGISTRY.get('ETDS') is archs.ETDS and 'ETDS_cdnsr' not in ARCH_REGISTRY
branches = [dict(type='SPAN_cdnsr', num_feat=4, num_block=1), dict(type='CARN_M_cdnsr', num_feat=8)]
block = dict(type='CDNSR', branches=branches, classifier=dict(type='PatchClassifier', num_feat=4))
for block in (block, dict(type='PCSR', backbone=branches[1], light=[4], heavy=[4], classifier=[4])):
    check_network(block, 'network_g')
    assert build_network(block).eval()(torch.rand(1, 3, 9, 8)).shape == (1, 3, 36, 32)
''', others)


def test_what_has_gone_upstream_is_taken_from_there(tmp_path):
    package = tmp_path / 'basicsr'
    shutil.copytree(basicsr.__path__[0], package, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('archs/span_arch.py', 'archs/cdnsr_arch.py', 'losses/routing_loss.py'):
        shutil.copy(ROOT / 'cdnsr_basicsr' / name, package / name)
    run(
        'import cdnsr_basicsr\n' + SHOWN + '''
import torch
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY
from cdnsr_basicsr import archs, losses
from cdnsr_basicsr.archs.span_arch import SPAN
from cdnsr_basicsr.checkpoint import build
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.options import OptionError
assert not messages, messages
assert SPAN is archs.SPAN is ARCH_REGISTRY.get('SPAN') and SPAN.__module__ == 'basicsr.archs.span_arch'
assert losses.ClassLoss is LOSS_REGISTRY.get('ClassLoss')
assert losses.ClassLoss.__module__ == 'basicsr.losses.routing_loss'
assert archs.ETDS.__module__ == 'cdnsr_basicsr.archs.etds_arch'
assert not {'SPAN_cdnsr', 'CDNSR_cdnsr', 'PatchClassifier_cdnsr'} & set(ARCH_REGISTRY.keys())
net = SPAN(num_feat=4, num_block=1)
built = build(dict(type='SPAN', num_feat=4, num_block=1), net.state_dict(), 'a', 'b')  # one that upscales, also there
assert type(built) is SPAN
try:
    build(dict(type='PatchClassifier', num_feat=4), {}, 'a', 'b')
    raise AssertionError('a classifier is not a network that upscales')
except OptionError as error:
    assert 'not a network that enlarges an image' in str(error)
net = load_network('cdnsr-etds-x4')
assert type(net).__module__ == 'basicsr.archs.cdnsr_arch'
assert type(net.branches[0]).__module__.startswith('cdnsr_basicsr.')
assert net(torch.rand(2, 3, 9, 8)).shape == (2, 3, 36, 32)
''', tmp_path)


def test_a_name_of_no_one_else_has_no_suffix(tmp_path):
    run(
        'import cdnsr_basicsr\n' + SHOWN + '''
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
assert not messages, messages
for registry in (ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY):
    assert not [name for name in registry.keys() if name.endswith('_cdnsr')]
''', tmp_path)


def test_the_counter_of_operations_is_imported_where_it_counts(tmp_path):
    run(
        '''
import cdnsr_basicsr, sys
assert 'torch' not in sys.modules
cdnsr_basicsr.register()
assert 'torch.utils.flop_counter' not in sys.modules
''', tmp_path)
