"""A visitor's image without the page: what is computed when, that it is what the command writes, and what is left."""
import copy
import cv2
import numpy as np
import pytest
import threading
import time
from PIL import Image

from basicsr.archs import build_network
from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.demo import session as sessions
from cdnsr_basicsr.demo import views
from cdnsr_basicsr.demo.session import Engines, Session, Sessions, Stopped
from cdnsr_basicsr.inference import TileUpscaler
from cdnsr_basicsr.inference.image_io import ImageError
from cdnsr_basicsr.inference.speed import Speed
from tests.helpers import carn, fsrcnn, pcsr, photograph, spread


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No waiting, neither for a visitor nor for measurements of speed."""

    def measure_speed(self, fresh=False):
        parts = self.num_classes + self.routed
        self.measured = Speed([4] * parts, [1. + part for part in range(parts)])
        return self.measured

    monkeypatch.setattr(sessions, 'REST', 0.)
    monkeypatch.setattr(TileUpscaler, 'measure_speed', measure_speed)


@pytest.fixture
def model(tiny_net, tmp_path):
    """Saves a network, and returns its file."""

    def save(block=None, name='net.pth'):
        block = block or tiny_net()
        net = build_network(copy.deepcopy(block))
        net = spread(net) if block['type'] == 'CDNSR' and block['classifier']['type'] == 'PatchClassifier' else net
        save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=4), str(tmp_path / name))
        return str(tmp_path / name)

    return save


@pytest.fixture
def visitor(tmp_path):
    (tmp_path / 'served').mkdir()
    return Session(tmp_path / 'served', Engines())


def put(path, pixels=None, **kwargs):
    pixels = photograph(70, 100) if pixels is None else pixels
    if pixels.dtype == np.uint16:
        cv2.imwrite(str(path), pixels)
    else:
        Image.fromarray(pixels).save(path, **kwargs)
    return path


def settle(visitor, path, limit=None, value=0., opened=True):
    """Decides and computes."""
    if opened:
        engine = visitor.engines.get(path, 'float32', 'cpu')
        visitor.decide(engine, path, limit, value)
    return list(visitor.upscale())


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010f] = 6, 'Maker'  # on its side
KINDS = {
    'rgb.png': {},
    'turned.jpg': dict(exif=EXIF.tobytes(), icc_profile=b'profile of some kind'),
    'gray.png': dict(pixels=photograph(50, 61)[..., 0]),
    'alpha.png': dict(pixels=np.dstack([photograph(50, 61), photograph(50, 61, 1)[..., 0]])),
    '16_bits.png': dict(pixels=photograph(40, 50).astype(np.uint16) * 257 + 3),
    'plain.tif': {},
    'small.webp': dict(pixels=photograph(3, 1))
}


@pytest.mark.parametrize('name', KINDS)
def test_a_result_is_the_file_that_the_command_writes(visitor, tmp_path, name):
    path, image = 'cdnsr-fsrcnn-x4', put(tmp_path / name, **KINDS[name])
    visitor.open(image, name, 1, move=False)
    settle(visitor, path, 'budget', 0.6)
    out = tmp_path / 'out'
    assert cli.main(['upscale', '-m', path, '-i',
                     str(image), '-o',
                     str(out), '--budget', '0.6', '--device', 'cpu']) == 0
    expected = next(out.iterdir())
    assert visitor.result.file.name == expected.name and visitor.result.file.read_bytes() == expected.read_bytes()
    assert visitor.before.is_file() and visitor.after.is_file() and not visitor.stale


def test_the_image_is_predicted_once_for_all_limits_of_a_network(visitor, model, tmp_path, monkeypatch):
    path, calls, predict = model(), [], TileUpscaler.predict
    monkeypatch.setattr(TileUpscaler, 'predict', lambda self, rows: calls.append(1) or predict(self, rows))
    visitor.open(put(tmp_path / 'a.png', photograph(300, 400)), 'a.png', 1, move=False)
    engine = visitor.engines.get(path, 'float32', 'cpu')
    costs = []
    for budget in (0.1, 0.8, 0.8, 1.2):
        changed = visitor.decide(engine, path, 'budget', budget)
        costs.append((changed, visitor.decision.plan.cost))
    assert [changed for changed, _ in costs] == [True, True, False, True]
    assert costs[0][1] < costs[1][1] < costs[3][1] and calls == [1]
    assert visitor.result is None  # no pixel has been computed
    settle(visitor, path, opened=False)
    assert calls == [1] and visitor.result.plan.cost == costs[3][1]
    for budget in (0.1, 1.2):  # there and back: what there is need not be computed again
        visitor.decide(engine, path, 'budget', budget)
        assert visitor.stale == (budget == 0.1)
    assert list(visitor.upscale()) == [] and calls == [1]


def test_a_network_that_decides_while_it_runs(visitor, model, tmp_path):
    path = model(pcsr())
    visitor.open(put(tmp_path / 'a.png', photograph(20, 24)), 'a.png', 1, move=False)
    settle(visitor, path, 'budget', 0.7)
    assert visitor.decision.plan is None and sum(visitor.result.plan.counts) == 80 * 96


def test_what_changes_meanwhile_is_what_is_computed(visitor, model, tmp_path):
    path = model()
    visitor.open(put(tmp_path / 'a.png', photograph(200, 300)), 'a.png', 1, move=False)
    engine = visitor.engines.get(path, 'float32', 'cpu')
    visitor.decide(engine, path, 'budget', 1.2)
    run = visitor.upscale()
    next(run)
    visitor.decide(engine, path, 'budget', 0.1)
    list(run)
    assert visitor.result.decision is visitor.decision and visitor.result.plan.cost < 0.5
    assert len(list(visitor.folder.glob('result-*'))) == 1


def test_stopping_leaves_nothing_and_it_can_go_on(visitor, model, tmp_path, monkeypatch):
    path, begun = model(), threading.Event()
    visitor.open(put(tmp_path / 'a.png', photograph(200, 300)), 'a.png', 1, move=False)
    run, checks = TileUpscaler.run, []

    def slowly(self, branch, tiles):
        checks.append(branch)
        begun.set()
        time.sleep(0.05)
        return run(self, branch, tiles)

    engine = visitor.engines.get(path, 'float32', 'cpu')
    visitor.decide(engine, path, None, 0.)
    monkeypatch.setattr(TileUpscaler, 'run', slowly)
    following = visitor.upscale()
    next(following)
    assert begun.wait(10)
    visitor.stop()
    with pytest.raises(Stopped):
        list(following)
    assert len(checks) < 20 and not list(visitor.folder.glob('result-*')) and visitor.stale
    monkeypatch.setattr(TileUpscaler, 'run', run)
    with pytest.raises(Stopped):
        list(visitor.upscale())
    visitor.resume()
    shares = list(visitor.upscale())
    assert shares and not visitor.stale


def test_a_broken_image_leaves_the_one_at_hand(visitor, model, tmp_path):
    path = model()
    visitor.open(put(tmp_path / 'a.png'), 'a.png', 1, move=False)
    settle(visitor, path)
    before, broken = visitor.result, tmp_path / 'b.png'
    broken.write_bytes((tmp_path / 'a.png').read_bytes()[:-30])
    with pytest.raises(ImageError, match='truncated'):
        visitor.open(broken, 'b.png', 1, move=True)
    with pytest.raises(ImageError, match='larger than 0.001 megapixels'):
        visitor.open(tmp_path / 'a.png', 'a.png', 0.001, move=False)
    assert visitor.result is before and visitor.source.name == 'a.png' and visitor.before.is_file()
    assert len(list(visitor.folder.glob('image-*'))) == 1 and not broken.exists()
    visitor.open(put(tmp_path / 'c.png'), 'c.png', 1, move=False)
    assert visitor.result is None and [path.name for path in visitor.folder.iterdir()] == ['image-2']


def test_a_failure_is_said_where_it_is_waited_for(visitor, model, tmp_path, monkeypatch):
    path = model()
    visitor.open(put(tmp_path / 'a.png'), 'a.png', 1, move=False)

    def fail(*args, **kwargs):
        raise RuntimeError('no')

    monkeypatch.setattr(sessions, 'write_upscaled', fail)
    with pytest.raises(RuntimeError, match='no'):
        settle(visitor, path)
    assert visitor.stale and not list(visitor.folder.glob('result-*')) and not visitor.engines.running.locked()


@pytest.mark.parametrize('while_it_runs', [False, True])
def test_nothing_of_a_visitor_who_has_left_remains(model, tmp_path, while_it_runs):
    root = tmp_path / 'served'
    root.mkdir()
    path, all_of_them = model(), Sessions(root, Engines())
    visitor, other = all_of_them.of('one'), all_of_them.of('other')
    for each in (visitor, other):
        each.open(put(tmp_path / 'a.png', photograph(200, 300)), 'a.png', 1, move=False)
    visitor.decide(all_of_them.engines.get(path, 'float32', 'cpu'), path, None, 0.)
    run = visitor.upscale()
    next(run) if while_it_runs else list(run)
    assert all_of_them.by_token(visitor.token) is visitor and all_of_them.by_token('other') is None
    all_of_them.end('one')
    assert list(root.iterdir()) == [other.folder] and all_of_them.by_token(visitor.token) is None
    with pytest.raises(Stopped):
        all_of_them.of('one')  # what still arrives from its page
    assert visitor.part(views.Box(0, 0, 9, 9)) is None
    all_of_them.end_all()
    assert list(root.iterdir()) == []


def test_only_what_was_uploaded_is_taken(tmp_path):
    all_of_them = Sessions(tmp_path, Engines())
    uploaded = tmp_path / ('a1' * 32) / 'photo.png'
    uploaded.parent.mkdir()
    put(uploaded)
    put(tmp_path / 'a.png')
    other = all_of_them.of('other').folder / 'image-1'
    other.mkdir()
    put(other / 'secret.png')
    assert all_of_them.uploaded(str(uploaded)) == uploaded
    for path in (tmp_path / 'a.png', other / 'secret.png', uploaded.parent, uploaded.with_name('none.png'),
                 uploaded.parent / '..' / other.relative_to(tmp_path) / 'secret.png', '/etc/hostname', ''):
        assert all_of_them.uploaded(str(path)) is None


@pytest.mark.parametrize('scale', [2, 3, 4, 2.5])
def test_a_part_at_full_size_is_a_part_of_the_bicubic_image(scale):
    pixels = photograph(40, 30)
    size = round(40 * scale), round(30 * scale)
    whole = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_CUBIC).astype(int)
    for box in (views.Box(0, 0, 7, 9), views.Box(size[1] - 8, size[0] - 5, 8, 5), views.Box(31, 17, 20, 22)):
        part = views.bicubic_part(pixels, size, box)
        expected = whole[box.y:box.y + box.height, box.x:box.x + box.width]
        # warpAffine knows 32 places between two pixels
        assert np.abs(part - expected).max() <= (3 if scale in (2, 4) else 12)
    assert views.Box(-5, 90, 10, 500).within((40, 30)) == views.Box(0, 0, 10, 40)


def test_a_part_is_shown_pixel_by_pixel(visitor, model, tmp_path):
    path = model(dict(carn(4), upscale=4))
    visitor.open(put(tmp_path / 'a.png', photograph(40, 50).astype(np.uint16) * 257), 'a.png', 1, move=False)
    settle(visitor, path)
    shown = visitor.part(views.Box(20, 30, 40, 33))
    data = views.base64.b64decode(shown['after'].split(',')[1])
    result = cv2.imread(str(visitor.result.file), cv2.IMREAD_UNCHANGED)
    expected = np.round(result[30:63, 20:60] / 257)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), expected)
    assert (shown['x'], shown['y'], shown['width'], shown['height']) == (20, 30, 40, 33)


def test_of_many_engines_the_last_ones_are_kept(model, monkeypatch):
    monkeypatch.setattr(sessions, 'LOADED', 2)
    engines, paths = Engines(), [model(fsrcnn(2), f'{i}.pth') for i in range(3)]
    first = engines.get(paths[0], 'float32', 'cpu')
    engines.get(paths[1], 'float32', 'cpu')
    assert engines.get(paths[0], 'float32', 'cpu') is first
    engines.get(paths[2], 'float32', 'cpu')
    assert [engines.has(path, 'float32', 'cpu') for path in paths] == [True, False, True]
