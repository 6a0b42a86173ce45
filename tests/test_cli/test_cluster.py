"""`basicsr upscale --ray`: what is done of a folder is what `upscale` does of it, whoever is killed meanwhile."""
import cv2
import filecmp
import json
import numpy as np
import os
import pytest
import re
import shutil
import signal
import subprocess
import sys
import time
import torch
from pathlib import Path

from basicsr.archs import build_network
from cdnsr_basicsr import cluster
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.inference import make_upscaler
from cdnsr_basicsr.inference.pictures import PictureRows
from cdnsr_basicsr.inference.speed import Speed
from cdnsr_basicsr.inference.upscale import Handling, Job, is_uri
from cdnsr_basicsr.options import OptionError
from cdnsr_basicsr.settings import Settings
from tests.helpers import ENV, fsrcnn, strict_json

# a plugin for all processes of a test, in its folder: of a picture of this colour its network kills whoever runs it
DEADLY = (10, 20, 30)
PLUGIN = f'''
import os, signal
from torch.nn import functional as F
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.utils.registry import ARCH_REGISTRY

class Deadly(RRDBNet):
    upscale = 2

    def __init__(self, upscale=2):
        super().__init__(3, 3, upscale, 2, 1, 2)

    def forward(self, x):
        colour = (255 * x.amax((0, 2, 3))).round().tolist()
        if colour == {list(DEADLY)} and colour == (255 * x.amin((0, 2, 3))).round().tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        return F.interpolate(x, scale_factor=2)

def register():
    if 'Deadly' not in ARCH_REGISTRY:
        ARCH_REGISTRY.register(Deadly)
'''


def needs_ray():
    pytest.importorskip('ray.data', reason='Ray is not installed')


def draw(name, height, width, seed, strength=1.):
    """Writes waves and noise."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    y, x, c = np.mgrid[:height, :width, :3]
    waves = 0.5 + 0.45 * np.sin((x + 2 * y) / 3 + c + seed)
    noise = np.random.default_rng(seed).normal(0, 0.05, waves.shape)
    assert cv2.imwrite(str(name), ((0.5 + strength * (waves + noise - 0.5)).clip(0, 1) * 255).astype('uint8'))


def save(net_block, name, prepare=lambda net: None):
    torch.manual_seed(1)
    net = build_network(dict(net_block)).eval()
    prepare(net)
    save_checkpoint(dict(params=net.state_dict(), network_g=net_block, scale=2), name)
    return net


def start(*arguments, **kwargs):
    """The command, on a cluster of two engines that it starts if it is told `--ray`."""
    env = dict(ENV, XDG_CACHE_HOME=os.environ['XDG_CACHE_HOME'], **kwargs)
    command = [sys.executable, '-m', 'cdnsr_basicsr', 'upscale', *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, code=0, **kwargs):
    process = start(*arguments, **kwargs)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, output + errors
    assert 'Traceback' not in errors
    return output, errors


def files(folder):
    """All files of a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob('*') if path.is_file())


def assert_same_files(first, second, names):
    _, mismatch, errors = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not mismatch and not errors


def engines_of(process):
    """Process ids of the engines that a command has started and that are at work."""
    parents, titles = {}, {}
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            parents[int(entry.name)] = int((entry / 'stat').read_text().rpartition(') ')[2].split()[1])
            titles[int(entry.name)] = (entry / 'cmdline').read_bytes().decode()
        except OSError:
            pass

    def descends(pid):
        while pid in parents and pid != process.pid:
            pid = parents[pid]
        return pid == process.pid

    return [pid for pid, title in titles.items() if 'MapBatches(Upscaling)' in title and descends(pid)]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_an_engine_that_is_killed_loses_nothing(work):
    """2000 small pictures, some of them broken, and one engine of two killed in the middle."""
    needs_ray()
    sizes = np.random.default_rng(0).integers(8, 25, (2000, 2))
    for number, (height, width) in enumerate(sizes.tolist()):
        draw(f'in/{number % 10}/{number}.png', height, width, number)
    broken = [f'in/{number % 10}/{number}.png' for number in (3, 1234)]
    for name in broken:
        Path(name).write_bytes(Path(name).read_bytes()[:100])
    Path('in/notes.txt').write_text('no picture')
    Path('out/5').mkdir(parents=True)
    Path('out/5/5.png').write_text('mine')
    save(fsrcnn(4, 2), 'net.pth')
    arguments = ('-m', 'net.pth', '--json')
    run(*arguments, '-i', 'in/4', '-o', 'plain/4', code=1)

    begin = time.monotonic()
    process = start(*arguments, '-i', 'in', '-o', 'out', '--ray')
    while len(files('out')) < 300:
        assert process.poll() is None and time.monotonic() < begin + 200
        time.sleep(0.2)
    os.kill(engines_of(process)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    seconds = time.monotonic() - begin
    assert process.returncode == 1
    print(f'{seconds:.0f} s for 2000 pictures with an engine killed')

    whole = sorted({f'in/{name}' for name in files('in')} - {'in/notes.txt', *broken})
    assert [f'in/{name}' for name in files('out')] == whole  # nothing is lost or left over
    assert Path('out/5/5.png').read_text() == 'mine'
    assert len(files('plain')) == 199
    assert_same_files('plain', 'out', files('plain'))
    for name in {*whole} - {'in/5/5.png'}:
        assert cv2.imread(f'out/{name[3:]}').shape[0] == 2 * cv2.imread(name).shape[0]
    content = strict_json(output)
    assert (content['done'], content['present']) == (1997, 1)
    assert sorted(item['path'] for item in content['failed']) == sorted(broken)
    assert content['failed'] == sorted(content['failed'], key=lambda item: item['path'])
    assert content['left_out'] == ['in/notes.txt']
    said = [line for line in errors.splitlines() if not line.startswith(('Failed: ', 'Left alone'))]
    assert said == [], said  # nothing of Ray's
    for name in broken:
        os.remove(name)

    again = strict_json(run(*arguments, '-i', 'in', '-o', 'out', '--ray')[0])  # without a cluster: there is nothing to do
    assert (again['done'], again['present'], again['failed']) == (0, 1998, [])


@pytest.mark.slow
def test_uris_one_price_and_a_picture_that_kills_every_engine(work):
    needs_ray()
    (work / 'plugin/deadly-1.dist-info').mkdir(parents=True)
    (work / 'plugin/deadly.py').write_text(PLUGIN)
    (work / 'plugin/deadly-1.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: deadly\nVersion: 1\n')
    (work / 'plugin/deadly-1.dist-info/entry_points.txt').write_text('[basicsr.plugins]\ndeadly = deadly:register\n')
    path = os.pathsep.join([str(work / 'plugin'), ENV['PYTHONPATH']])
    program = ('import sys, torch; sys.path[:0] = sys.argv[1:2]; import deadly, cdnsr_basicsr; cdnsr_basicsr.register();'
               'deadly.register(); from tests.test_cli import test_cluster; test_cluster.save_mapped()')
    subprocess.run([sys.executable, '-c', program, str(work / 'plugin')], env=ENV, check=True, capture_output=True)

    for number in range(12):
        draw(f'in/{"ab"[number % 2]}/{number}.png', 30 + 3 * number, 70, number, number / 12)
    Path('in/a/.hidden.png').write_text('no picture')
    Path('in/broken.png').write_text('no picture')
    uri = f'file://{work}'
    arguments = ('-m', 'net.pth', '--budget', 0.6, '--cost', 'macs', '--patch-size', 16, '--map', '--suffix', '_2')
    plain = run(*arguments, '-i', 'in', '-o', 'plain', code=1, PYTHONPATH=path)[0]
    cost = float(re.search(r'cost ([\d.]+)', plain)[1])
    assert 0.58 < cost <= 0.6
    cv2.imwrite('in/deadly.png', np.full((40, 40, 3), DEADLY[::-1], np.uint8))
    output, errors = run(*arguments, '-i', f'{uri}/in/', '-o', f'{uri}/new/out', '--ray', code=1, PYTHONPATH=path)
    assert output.startswith(f'Upscaled 12 pictures x2 to {uri}/new/out: ')
    assert re.search(r'class 0 to 1: .*', output)[0] == re.search(r'class 0 to 1: .*', plain)[0]
    assert files('new/out') == files('plain') and len(files('plain')) == 24
    assert_same_files('plain', 'new/out', files('plain'))
    failed = [line for line in errors.splitlines() if line.startswith('Failed')]
    assert failed[0].startswith(f'Failed: {uri}/in/broken.png: truncated, or no image; ')
    assert failed[1] == f'Failed: {uri}/in/deadly.png: 3 engines were killed by it; is there too little memory?'
    assert len(failed) == 2 and not list(Path('new').rglob('.*'))


def save_mapped():
    """A network whose hardest branch kills."""
    branches = [dict(type='Interpolation', upscale=2), dict(type='Deadly', upscale=2)]
    block = dict(type='CDNSR', upscale=2, branches=branches, classifier=dict(type='ErrorMap', num_feat=8))

    def prepare(net):
        torch.nn.init.zeros_(net.classifier.head.weight)
        net.classifier.head.bias.data = torch.tensor([0., 0.6])

    save(block, 'net.pth', prepare)
