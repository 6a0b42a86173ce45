import pytest
import subprocess
import sys

from cdnsr_basicsr import _compat
from cdnsr_basicsr.options import OptionError


def test_stand_ins_are_asked_last_and_once():
    _compat.provide_missing_modules()
    _compat.provide_missing_modules()
    finders = [finder for finder in sys.meta_path if isinstance(finder, _compat._MissingModuleFinder)]
    assert len(finders) == 1 and sys.meta_path.index(finders[0]) > 0
    assert finders[0].find_spec('no_such_module') is None


def test_removed_modules_are_found_and_work():
    # in a process of its own, in which nothing else provides distutils
    code = '''
import sys
class NoDistutils:
    def find_spec(self, name, path=None, target=None):
        if name.startswith('distutils'):
            stand_ins = [finder for finder in sys.meta_path if type(finder).__name__ == '_MissingModuleFinder']
            return stand_ins[0].find_spec(name)
sys.modules.pop('distutils', None)
import cdnsr_basicsr
sys.meta_path.insert(0, NoDistutils())
from distutils.version import LooseVersion
assert LooseVersion('0.10.0') >= LooseVersion('0.9.0') and LooseVersion('0.22.1+cu130') >= LooseVersion('0.9.0')
import basicsr
from basicsr.data.degradations import rgb_to_grayscale
import torch
assert rgb_to_grayscale(torch.rand(1, 3, 4, 4)).shape == (1, 1, 4, 4)
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_patching_twice_changes_nothing():
    import basicsr.train
    from basicsr.models.base_model import BaseModel
    before = (basicsr.train.parse_options, basicsr.train.load_resume_state, BaseModel.model_to_device)
    _compat.patch_basicsr()
    assert before == (basicsr.train.parse_options, basicsr.train.load_resume_state, BaseModel.model_to_device)


def test_help_needs_neither_torch_nor_basicsr():
    code = "import sys, cdnsr_basicsr.cli; assert not {'torch', 'basicsr', 'cv2', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_launcher_without_torchrun_is_explained(monkeypatch):
    from basicsr.utils.dist_util import init_dist
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    with pytest.raises(OptionError, match='torchrun --nproc_per_node=N -m cdnsr_basicsr'):
        init_dist('pytorch')
