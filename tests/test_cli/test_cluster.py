"""`basicsr upscale --ray`: what is done of a folder is what `upscale` does of it, whoever is killed meanwhile."""
import cv2
import filecmp
import numpy as np
import os
import pytest
import re
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
from cdnsr_basicsr.inference.upscale import Handling, is_uri
from cdnsr_basicsr.settings import Settings
from tests.helpers import ENV, fsrcnn, strict_json

# a plugin for all processes of a test, in its folder: its network kills whoever runs it on an image of these colours
DEADLY = ((10, 20, 30), (200, 210, 220))
PLUGIN = f'''
import os, signal
from torch import nn
from torch.nn import functional as F
from basicsr.utils.registry import ARCH_REGISTRY

class Deadly(nn.Module):

    def __init__(self, upscale=2):
        super().__init__()
        self.upscale = upscale
        self.convs = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 48), (48, 48), (48, 3))))

    def forward(self, x):
        colours = [(255 * values).round().tolist() for values in (x.amin((0, 2, 3)), x.amax((0, 2, 3)))]
        if colours == {[list(colour) for colour in DEADLY]} and 'HARMLESS' not in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.interpolate(self.convs(x), scale_factor=2)

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


def mapped(name, hardest):
    """A network that prefers its second branch where there is texture."""
    branches = [dict(type='Interpolation', upscale=2), hardest]
    block = dict(type='CDNSR', upscale=2, branches=branches, classifier=dict(type='ErrorMap', num_feat=8))

    def prepare(net):
        torch.nn.init.zeros_(net.classifier.head.weight)
        net.classifier.head.bias.data = torch.tensor([0., 0.6])

    return save(block, name, prepare)


def start(*arguments, **kwargs):
    """The command, on a cluster of two engines that it starts if it is told `--ray`."""
    env = dict(ENV, XDG_CACHE_HOME=os.environ['XDG_CACHE_HOME'], **kwargs)
    command = [sys.executable, '-m', 'cdnsr_basicsr', 'upscale', *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, code=0, **kwargs):
    process = start(*arguments, **kwargs)
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == code, output + errors
    assert 'Traceback' not in errors
    return output, errors


def files(folder):
    """All files of a folder, hidden ones too."""
    return sorted(
        os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names)


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
        assert process.poll() is None and time.monotonic() < begin + 900
        time.sleep(0.2)
    os.kill(engines_of(process)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=1200)
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
    said = [line for line in errors.splitlines() if not line.startswith(('Failed: ', 'Skipped'))]
    assert said == [], said  # nothing of Ray's
    for name in broken:
        os.remove(name)

    again = strict_json(run(*arguments, '-i', 'in', '-o', 'out', '--ray')[0])  # starts no cluster
    assert (again['done'], again['present'], again['failed']) == (0, 1998, [])


@pytest.mark.slow
def test_uris_one_price_and_a_picture_that_kills_every_engine(work):
    needs_ray()
    (work / 'plugin/deadly-1.dist-info').mkdir(parents=True)
    (work / 'plugin/deadly.py').write_text(PLUGIN)
    (work / 'plugin/deadly-1.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: deadly\nVersion: 1\n')
    (work / 'plugin/deadly-1.dist-info/entry_points.txt').write_text('[basicsr.plugins]\ndeadly = deadly:register\n')
    path = os.pathsep.join([str(work / 'plugin'), ENV['PYTHONPATH']])
    program = ('import cdnsr_basicsr; cdnsr_basicsr.register(); import deadly; deadly.register(); '
               'from tests.test_cli.test_cluster import mapped; mapped("net.pth", dict(type="Deadly", upscale=2))')
    subprocess.run([sys.executable, '-c', program], env=dict(ENV, PYTHONPATH=path), check=True)

    for number in range(12):
        draw(f'in/{"ab"[number % 2]}/{number}.png', 20 + 3 * number, 40, number, number / 12)
    Path('in/a/.hidden.png').write_text('no picture')
    Path('in/broken.png').write_text('no picture')
    uri = f'file://{work}'
    arguments = ('-m', 'net.pth', '--budget', 0.6, '--cost', 'macs', '--patch-size', 16, '--map', '--suffix', '_2')
    columns = np.indices((40, 40)).sum(0) % 2  # texture, which the second branch gets
    cv2.imwrite('in/deadly.png', np.array(DEADLY, np.uint8)[columns][..., ::-1])
    plain = run(*arguments, '-i', 'in', '-o', 'plain', code=1, PYTHONPATH=path, HARMLESS='1')[0]
    cost = float(re.search(r'cost ([\d.]+)', plain)[1])
    assert 0.5 < cost <= 0.6
    output, errors = run(*arguments, '-i', f'{uri}/in/', '-o', f'{uri}/new/out', '--ray', code=1, PYTHONPATH=path)
    assert output.startswith(f'Upscaled 12 images x2 to {uri}/new/out: ')
    others = [name for name in files('plain') if 'deadly' not in name]
    assert files('new/out') == others and len(others) == 24
    assert_same_files('plain', 'new/out', others)  # so they have one price
    failed = [line for line in errors.splitlines() if line.startswith('Failed')]
    assert failed[0].startswith(f'Failed: {uri}/in/broken.png: truncated, or not an image; ')
    assert failed[1] == f'Failed: {uri}/in/deadly.png: 3 engines were killed by it; is there too little memory?'
    assert len(failed) == 2 and not list(Path('new').rglob('.*'))


# what needs no cluster


def cli_run(*arguments):
    from cdnsr_basicsr import cli
    try:
        return cli.main(['upscale', *map(str, arguments)])
    except SystemExit as error:  # as argparse ends
        return error.code


@pytest.mark.parametrize('arguments,message', [
    (('--ray', '--shard', '1/2'), '--ray: cannot be combined with --shard: the engines share all images'),
    (('--ray', '--device', 'cuda:1'), '--device cuda:1: Ray gives each engine a GPU; accepted: cpu, cuda'),
    (('--ray', '-i', 'nowhere'), 'nowhere: no such file or folder'),
    (('--ray', '-i', 'nonsense://in'), 'nonsense://in: cannot be opened by fsspec: '),
    (('--ray', '-o', 'memory://out'), 'memory://out: is in the memory of this process, where no engine sees it'),
    (('--ray', '-i', 'file://{work}/empty'), 'file://{work}/empty: contains no image (.png, .jpg, '),
    (('--ray', '-i', 'file://{work}/in', '-o', 'in'), 'in: the results would replace the images; use another folder'),
    (('-i', 's3://bucket/in'), '-i s3://bucket/in: is a URI, which requires --ray'),
    (('-o', 's3://bucket/out'), '-o s3://bucket/out: is a URI, which requires --ray'),
])
def test_a_mistake_is_said_in_one_line(work, capsys, arguments, message):
    if '--ray' in arguments and arguments[1] != '--shard':
        needs_ray()
    draw('in/a.png', 9, 9, 0)
    Path('empty').mkdir()
    save(fsrcnn(4, 2), 'net.pth')
    given = [str(argument).format(work=work) for argument in arguments]
    rest = [item for flag, name in (('-i', 'in'), ('-o', 'out')) if flag not in given for item in (flag, name)]
    assert cli_run('-m', 'net.pth', *rest, *given) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f'basicsr: error: {message.format(work=work)}'), errors


def test_torchrun_and_ray_do_not_go_together(work, capsys, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert cli_run('-m', 'net.pth', '-i', 'in', '-o', 'out', '--ray') == 2
    error = capsys.readouterr().err
    assert error.startswith('basicsr: error: --ray: cannot be combined with torchrun (RANK, WORLD_SIZE)')


def test_without_ray_one_line_names_the_extra(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    draw('in/a.png', 9, 9, 0)
    save(fsrcnn(4, 2), 'net.pth')
    assert cli_run('-m', 'net.pth', '-i', 'in', '-o', 'out', '--ray') == 2
    said = "basicsr: error: --ray: needs Ray: pip install 'cdnsr-basicsr[ray]' (Python 3.10 or newer)\n"
    assert capsys.readouterr().err == said


def test_what_is_a_uri():
    assert is_uri('s3://bucket/a') and is_uri('file:///a') and is_uri('zip://::file:///a.zip')
    assert not any(map(is_uri, ('a', '/a', 'a/b://', './s3:/a', 'C:\\a', '')))


def test_attempts_at_a_picture_are_counted_until_it_is_ended():
    attempts = cluster.Attempts()
    assert [attempts.begin('Upscaling', 'a') for _ in range(3)] == [(0, None), (1, None), (2, None)]
    assert attempts.begin('Upscaling', 'b') == (0, None)
    attempts.end('Upscaling', 'b', 'done', False)
    assert attempts.begin('Upscaling', 'b') == (0, 'done')  # by one that was killed before it could say so
    assert attempts.begin('Looking', 'b') == (0, None)
    attempts.forget([('Upscaling', 'b')])
    assert attempts.found == {}
    attempts.end('Upscaling', 'a', 'lost', True)
    assert attempts.begin('Looking', 'a') == (3, None)  # it stays lost


@pytest.mark.parametrize('weigh', ['pixels', 'pictures'])
@pytest.mark.parametrize('limit', [dict(budget=0.6), dict(max_loss=0.5)])
def test_all_engines_have_the_price_that_one_upscaler_finds(work, weigh, limit, monkeypatch):
    """And the costs that it is for, whatever another machine would measure."""
    net = mapped('mapped.pth', fsrcnn(4, 2))
    speed = Speed([1, 1, 1], [1., 5., 0.1])
    monkeypatch.setattr('cdnsr_basicsr.inference.tile_upscaler.measured_speed', lambda *args: speed)
    for number in range(3):
        draw(f'in/{number}.png', 60, 70, number, number / 3)
    settings = Settings('mapped.pth', patch_size=16, device='cpu', **limit)
    orders = cluster.Orders(settings, 1, str(work), Handling(), weigh, 'in', 'out', 'out/.work')
    pixels = [cv2.imread(f'in/{number}.png')[..., ::-1] for number in range(3)]
    images = [PictureRows(image, 3) for image in pixels]
    upscaler = make_upscaler(net, 16, **limit)
    assert upscaler.by_time and upscaler.shares_price
    with upscaler.together(images, weigh):
        expected, plans = upscaler.price, [upscaler.plan(image).classes for image in images]
    looked = [(image.height, image.width, upscaler.predict(image).errors) for image in images]
    assert cluster.speed_of(orders) == speed
    parts = [cluster.Weighing(orders, cluster.Price(None, speed), part) for part in (looked[::2], looked[1::2])]
    together = sum(part.limit() for part in parts)
    found = upscaler.price_within(together, lambda price: sum(part.sum_at(price) for part in parts))
    assert found == pytest.approx(expected)
    price = cluster.Price(found, speed)
    monkeypatch.setattr('cdnsr_basicsr.inference.tile_upscaler.measured_speed', None)  # nothing is measured again
    engine = cluster.upscaler_of(orders, price)
    for image, classes in zip(images, plans):
        assert torch.equal(engine.plan(image).classes, classes)


def test_names_below_uris(work):
    needs_ray()
    for name in ('b.png', 'sub/a.jpg', 'sub/.hidden.png', '.hidden/c.png', 'notes.txt', 'sub/out/a.png', 'b_2.png'):
        draw(f'in/{name}' if name != 'notes.txt' else 'in/notes.png', 2, 2, 0)
    os.rename('in/notes.png', 'in/notes.txt')
    uri = f'file://{work}/in'
    expected = [Path(name) for name in ('b.png', 'b_2.png', 'sub/a.jpg', 'sub/out/a.png')]
    assert cluster.listed(uri, 'elsewhere', '', None) == (expected, uri, [f'{uri}/notes.txt'], [])
    assert cluster.listed('in', f'file://{work}/new', '', None) == (expected, 'in', ['in/notes.txt'], [])
    assert cluster.listed(uri, f'{uri}/sub/out', '', None)[0] == expected[:3]
    assert cluster.listed(uri, 'in', '_2', None)[0] == [expected[0], *expected[2:]]
    assert cluster.listed(f'{uri}/b.png', 'new', '', None) == ([Path('b.png')], uri, [], [])
    assert cluster.listed('in/b.png', f'file://{work}/new', '', None) == ([Path('b.png')], 'in', [], [])
    assert cluster.files_below(f'{uri}/sub') == {f'{uri}/sub/{name}' for name in files('in/sub')}
    assert cluster.files_below('in/sub') == {f'in/sub/{name}' for name in files('in/sub')}
    assert cluster.files_below('nowhere') == cluster.files_below(f'{uri}/nowhere') == set()


def test_where_a_sent_file_appears_at_once_it_is_not_renamed(work, monkeypatch):
    needs_ray()
    sent = []

    class ObjectStore:
        protocol = ('s3', 's3a')

        def put_file(self, path, name):
            sent.append((Path(path).read_text(), name))

    monkeypatch.setattr('fsspec.core.url_to_fs', lambda uri: (ObjectStore(), uri.partition('://')[2]))
    engine = object.__new__(cluster.Upscaling)
    engine.orders = cluster.Orders(
        Settings('net.pth'), 1, '', Handling(), 'pixels', 'in', 's3://b/out', 's3://b/out/.w')
    Path('a').write_text('whole')
    engine._publish('a', 's3://b/out/sub/a.png')
    assert sent == [('whole', 'b/out/sub/a.png')]
