"""The registry of families: one file makes `--from`, its help, detection and messages know of a family."""
import pytest
import subprocess
import sys
import torch

from basicsr.archs import build_network
from cdnsr_basicsr import cli
from cdnsr_basicsr.conversion import registry
from cdnsr_basicsr.conversion.convert import convert, describe
from cdnsr_basicsr.conversion.registry import Family, Found, families, register
from cdnsr_basicsr.options import OptionError
from tests.helpers import fsrcnn


class ToyFamily(Family):
    """FSRCNNs, saved by the number of each weight."""
    names, projects, files = ('toy', 'brick'), 'ToySR', 'its files'

    def detect(self, source):
        return '0' in source.state and source.content.get('by') == 'toys'

    def load(self, source, upscale):
        keys = build_network(fsrcnn(4, upscale)).state_dict()
        return Found(
            fsrcnn(4, upscale), {
                key: source.state[str(i)]
                for i, key in enumerate(keys)
            }, ('toys are small', ))


@pytest.fixture
def toys(monkeypatch):
    """As if a file *_family.py held ToyFamily."""
    families()
    monkeypatch.setattr(registry, '_registered', list(registry._registered))
    register(ToyFamily)
    families.cache_clear()
    yield
    families.cache_clear()


@pytest.fixture
def toy(tmp_path):
    """A file of ToySR, less some weights; and the network."""

    def toy(*missing):
        net = build_network(fsrcnn(4, 3)).eval()
        state = {str(i): value for i, value in enumerate(net.state_dict().values()) if i not in missing}
        torch.save(dict(params=state, by='toys'), tmp_path / 'toy.pth')
        return str(tmp_path / 'toy.pth'), net

    return toy


def test_families_are_tried_in_this_order():
    # what a file says of itself, then the lineage whose names other projects share, then what has names of its own
    names = 'pcsr cdnsr classsr arm carn etds ecbsr abpn fsrcnn span spanv2 smfanet spandrel'
    assert ' '.join(families()) == names
    assert all(family.projects and family.files for family in families().values())


def test_a_registered_family_is_known_everywhere(toys, toy, capsys):
    path, net = toy()
    converted = convert(path, upscale=3)
    assert converted.family == 'toy' and converted.notes == ('toys are small', )
    x = torch.rand(1, 3, 7, 9)
    with torch.no_grad():
        assert torch.equal(converted.net(x), net(x))
    assert 'FSRCNN x3 (ToySR)' in describe(converted)
    assert convert(path, 'brick', upscale=3).family == 'brick'
    with pytest.raises(SystemExit):
        cli.main(['convert', '--help'])
    assert 'toy' in capsys.readouterr().out
    with pytest.raises(OptionError, match='--from vgg: accepted: .*, toy$'):
        convert(path, 'vgg')


def test_what_a_family_misses_is_said_in_one_line(toys, toy):
    with pytest.raises(OptionError, match="looks like toy, but has no '3'"):
        convert(toy(3)[0], upscale=3)


def test_without_its_file_a_family_is_unknown(toy):
    with pytest.raises(
            OptionError, match=r'of no known family; known: pcsr, cdnsr, .*: files of PCSR; .*First keys: 0'):
        convert(toy()[0])
    with pytest.raises(OptionError, match='--from toy: accepted: auto, abpn'):
        convert(toy()[0], 'toy')


def test_a_name_is_taken_once(toys):
    with pytest.raises(ValueError, match='ToyFamily: a family of the name brick already exists'):
        register(ToyFamily)


def test_the_names_need_neither_torch_nor_basicsr():
    code = '''
import sys
from cdnsr_basicsr.conversion.registry import families
assert 'etds' in families() and not {'torch', 'basicsr', 'numpy'} & set(sys.modules)
'''
    subprocess.run([sys.executable, '-c', code], check=True)
