import copy
import hashlib
import json
import os
import pytest
import torch
from pathlib import Path

import cdnsr_basicsr
from basicsr.archs import build_network
from cdnsr_basicsr import zoo
from cdnsr_basicsr.checkpoint import save_checkpoint
from tests.helpers import ROOT, fsrcnn

cdnsr_basicsr.register()

# photographs, recorded tensors and weights of other projects; not part of this repository
SHARED = Path(os.environ.get('CDNSR_TEST_DATA', ROOT.parent / 'shared'))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is measured goes to a folder of the test run, not to the user's."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp() / 'cache'))


@pytest.fixture
def shared():
    """Finds a file of the test data, or skips the test."""

    def find(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f'{name} is not at hand (CDNSR_TEST_DATA)')
        return path

    return find


@pytest.fixture
def shipped(tmp_path_factory, monkeypatch, tiny_net):
    """A package that ships the models tiny_cdnsr and tiny_fsrcnn; the entry of each by its name."""
    folder = tmp_path_factory.mktemp('pretrained_models')
    monkeypatch.setattr(zoo, 'SHIPPED', folder)
    index = {}
    for name, block in (('tiny_cdnsr', tiny_net()), ('tiny_fsrcnn', fsrcnn(2))):
        net = build_network(copy.deepcopy(block))
        save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=4), str(folder / f'{name}.pth'))
        sha256 = hashlib.sha256((folder / f'{name}.pth').read_bytes()).hexdigest()
        index[name] = dict(file=f'{name}.pth', sha256=sha256, scale=4, licence='Apache-2.0', trained_on='nothing')
        index[name].update(psnr=dict(Set5=30.126, Set14=27.5), psnr_rgb=dict(Set5=28.5, Set14=25.75), use='trying')
        index[name].update(ms_per_megapixel=12.34, measured_on='an abacus')
    index['tiny_cdnsr']['budget'] = 0.6
    (folder / 'models.json').write_text(json.dumps(index))
    return zoo.shipped_models()


@pytest.fixture
def tiny_net():
    """Option block of a small CDNSR with three branches of growing cost."""

    def block(upscale=4, branches=None, **kwargs):
        branches = branches or [fsrcnn(2 * i + 2, upscale) for i in range(3)]
        classifier = {'type': 'PatchClassifier', 'num_feat': 8}
        return {'type': 'CDNSR', 'upscale': upscale, 'branches': branches, 'classifier': classifier, **kwargs}

    return block
