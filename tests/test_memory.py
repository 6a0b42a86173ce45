"""Memory that is freed stays in the process, and a limit of it is kept."""
import cv2
import importlib
import itertools
import json
import numpy as np
import pytest
import re
import subprocess
import sys
import torch
from pathlib import Path

import cdnsr_basicsr as sr
from basicsr.archs import build_network
from cdnsr_basicsr import cli, memory
from cdnsr_basicsr.inference import PixelUpscaler, TileUpscaler, tile_upscaler
from cdnsr_basicsr.inference.image_io import read_image
from cdnsr_basicsr.inference.pictures import side_by_side
from cdnsr_basicsr.inference.tiling import Canvas, TensorRows, Tiling, parts_within, shared_out
from cdnsr_basicsr.loading import memory_limit_of
from cdnsr_basicsr.memory import MIB, SPARE, UNEVEN, GpuMemory, HostMemory, MemoryLimit, ShortOfMemory, available
from cdnsr_basicsr.options import OptionError
from cdnsr_basicsr.settings import bytes_of
from tests.helpers import ENV, ROOT, carn, fsrcnn, pcsr, photograph, spread

CODE = """
import sys
import torch
from pathlib import Path
from cdnsr_basicsr.memory import keep_freed_memory


def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


kept = sys.argv[1] == 'keep' and keep_freed_memory()
block = torch.ones(2**26)  # 256 MiB
full = resident()
del block
print(int(kept), int(resident() > full - 2**26))
"""


def left(argument):
    return subprocess.run([sys.executable, '-c', CODE, argument], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_freed_memory_is_kept_only_if_asked():
    assert left('give back').split() == ['0', '0']
    assert left('keep').split() == ['1', '1']


class Fake:
    """Memory of which `base` bytes are held, and what the largest pass has taken until it is given back."""
    holder = 'nothing'

    def __init__(self, base=100 * MIB, free=1000 * MIB):
        self.base, self.free, self.kept, self.most = base, free, 0, 0

    def take(self, size):
        self.kept = max(self.kept, size)
        self.most = max(self.most, self.used())

    def used(self):
        return self.base + self.kept

    def peak(self):
        return self.most

    def available(self):
        return self.free

    def trim(self):
        self.kept = 0

    def enforce(self, limit):
        return False


# sizes


@pytest.mark.parametrize('text,size', [('4G', 2**32), ('4GiB', 2**32), ('4g', 2**32), ('512M', 2**29), ('1mib', 2**20),
                                       ('1.5G', 3 * 2**29)])
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize('text', ['4', '4GB', '4 G', '-4G', '0G', '', 'G', '4K', '1e3M', 'most', '4,5G', 4, None])
def test_what_is_no_size(text):
    with pytest.raises(OptionError, match=r'expected a size such as 4G, 4GiB or 512M, or auto'):
        bytes_of(text)


def test_a_wrong_size_is_one_line(capsys):
    assert cli.main(['upscale', '-m', 'x', '-i', 'x', '-o', 'x', '--memory', '4GB']) == 2
    assert capsys.readouterr().err == ('basicsr: error: --memory 4GB: expected a size such as 4G, 4GiB or 512M, or '
                                       'auto\n')


# what is free


def files(root, **contents):
    for name, text in contents.items():
        path = root / name.replace('__', '/').replace('_dot_', '.')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_is_free_is_the_least_of_machine_and_groups(tmp_path):
    files(tmp_path, proc__meminfo='MemTotal: 9000 kB\nMemAvailable: 8000 kB\n')
    assert available(tmp_path) == 8000 * 1024
    files(tmp_path, proc__self__cgroup='0::/a/b\n')
    assert available(tmp_path) == 8000 * 1024
    group = tmp_path / 'sys/fs/cgroup/a'
    files(group, memory_dot_max='5000000', memory_dot_current='4000000', memory_dot_stat='anon 1\ninactive_file 250000')
    assert available(tmp_path) == 1250000
    files(group / 'b', memory_dot_max='max', memory_dot_current='1', memory_dot_stat='')
    assert available(tmp_path) == 1250000  # the group above counts
    files(group / 'b', memory_dot_max='900', memory_dot_current='1000', memory_dot_stat='anon 1')
    assert available(tmp_path) == 0


def test_what_is_free_in_a_group_of_the_first_version(tmp_path):
    files(tmp_path, proc__meminfo='MemAvailable: 8000 kB\n', proc__self__cgroup='5:cpu,memory:/docker/x\n1:cpu:/\n')
    group = tmp_path / 'sys/fs/cgroup/memory'  # a container sees its own as the root
    files(group, memory_dot_stat='total_inactive_file 50')
    (group / 'memory.limit_in_bytes').write_text('1000')
    (group / 'memory.usage_in_bytes').write_text('400')
    assert available(tmp_path) == 650


def test_auto_takes_three_quarters_of_what_is_free(monkeypatch):
    assert MemoryLimit(Fake(base=100, free=1000)).size == 850
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')  # of torchrun
    assert MemoryLimit(Fake(base=100, free=1000)).size == 350


@pytest.mark.slow
def test_what_the_process_and_its_decoder_hold(tmp_path):
    host = HostMemory()
    cv2.imwrite(str(tmp_path / 'a.png'), photograph())
    read_image(tmp_path / 'a.png')
    alone = memory._status('self', 'VmRSS')
    assert abs(host.used() - host._others() - alone) < MIB and host._others() > 20 * MIB
    host.trim()  # of what is freed and kept, the block would take its memory
    before = host.used()
    block = np.ones(2**26, np.uint8)
    assert 60 * MIB < host.used() - before < 70 * MIB and host.peak() >= host.used() - MIB
    del block
    assert host.used() > before + 60 * MIB  # kept
    host.trim()
    assert host.used() < before + 4 * MIB


def test_a_gpu_s_memory_is_torch_s(monkeypatch):
    called = {}
    fakes = dict(
        memory_reserved=300,
        max_memory_reserved=500,
        mem_get_info=(1000, 4000),
        empty_cache=None,
        set_per_process_memory_fraction=None)
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, n=name, v=value: called.setdefault(n, args) and v or v)
    memory_limit = memory_limit_of('auto', torch.device('cuda:1'))
    assert isinstance(memory_limit.memory, GpuMemory) and not memory_limit.of_host and memory_limit.enforced
    assert memory_limit.size == 300 + 750 and called['set_per_process_memory_fraction'] == (1050 / 4000, 1)
    assert memory_limit.memory.peak() == 500 and called['mem_get_info'] == (1, )
    assert memory_limit.has_room(10**12)  # torch itself refuses
    called.clear()
    assert memory_limit_of('1G', torch.device('cuda:0')).size == 2**30
    assert called['set_per_process_memory_fraction'] == (1., 0)  # more than there is


def test_where_it_cannot_be_measured_that_is_said(monkeypatch):
    monkeypatch.setattr(memory, '_status', lambda pid, key: 0)
    with pytest.raises(OptionError, match='memory=4G: needs Linux with glibc, and /proc'):
        memory_limit_of('4G', torch.device('cpu'))


# limits


def test_what_is_reserved_is_not_free():
    memory_limit = MemoryLimit(Fake(), 500 * MIB)
    assert memory_limit.free() == 400 * MIB - SPARE
    with memory_limit.reserving(50 * MIB), memory_limit.reserving(20 * MIB):
        assert memory_limit.free() == 330 * MIB - SPARE
        with memory_limit.shared_by(2):
            assert memory_limit.free() == (330 * MIB - SPARE) // 2
    assert memory_limit.free() == 400 * MIB - SPARE
    with memory_limit.reserving(500 * MIB):
        assert memory_limit.free() == 0


@pytest.mark.parametrize('users,reserved,size', [(1, 0, 1), (1, 70 * MIB, 333 * MIB), (2, 5, 77 * MIB), (2, 0, 2**31)])
def test_the_figure_that_is_named_suffices(users, reserved, size):
    memory_limit = MemoryLimit(Fake(), 300 * MIB)
    with memory_limit.reserving(reserved), memory_limit.shared_by(users):
        text = str(memory_limit.short_of(size, 'tiles'))
        assert text.endswith('but the limit is 300M') and f'{round(size * users / MIB)}M for tiles' in text
        memory_limit.size = bytes_of(text.split()[1])
        assert size <= memory_limit.free() <= size + 24 * MIB


def test_room_is_made_when_it_is_needed():
    fake = Fake()
    memory_limit = MemoryLimit(fake, 200 * MIB + SPARE // 4)
    assert not memory_limit.has_room(101 * MIB) and memory_limit.has_room(80 * MIB)
    fake.take(80 * MIB)
    assert memory_limit.has_room(80 * MIB) and fake.kept  # what was freed is taken again
    assert memory_limit.has_room(100 * MIB) and not fake.kept  # a larger one might not fit into that
    memory_limit.trim()
    fake.take(50 * MIB)  # by something else, so that it may not fit
    assert memory_limit.has_room(80 * MIB) and not fake.kept


def test_growth_leaves_out_what_the_first_run_keeps():
    fake, runs = Fake(), []

    def run():
        if not runs:
            fake.base += 30 * MIB
        runs.append(1)
        fake.take(8 * MIB)

    assert MemoryLimit(fake, 1).growth(run) == UNEVEN * 8 * MIB


# plans


def test_memory_is_shared_out_as_an_obvious_count_says():
    for room, height, least, wanted in itertools.product(range(0, 60, 3), (1, 4, 7), (1, 5, 20), (5, 30, 90)):
        rows, wanted = (2, 4, 6, 7), max(wanted, least)
        found = shared_out(room, lambda count: height * count, rows, least, wanted)
        if room < 2 * height + least:
            assert found is None
            continue
        left = room - 2 * height
        for_pass = min(wanted, max(least, left - left // 4))
        fitting = [count for count in rows if height * count + for_pass <= room]
        assert found == (max(fitting), room - height * max(fitting)) and found[1] >= least


@pytest.mark.parametrize('size', [(64, 64), (188, 188), (17, 260), (260, 68), (16, 8)])
@pytest.mark.parametrize('multiple', [1, 8])
def test_parts_cover_a_block_and_keep_to_what_is_allowed(size, multiple):
    for most in (1, 3000, 9000, 20000, 10**6):
        down, across = parts_within(*size, most, 16, multiple)
        for length, parts in zip(size, (down, across)):
            assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
            assert parts[-1].end == length and all(part.start % multiple == 0 for part in parts)
            for part in parts:
                assert part.first == max(0, part.start - 16) and part.last == min(length, part.end + 16)
        largest = max((y.last - y.first) * (x.last - x.first) for y in down for x in across)
        if size[0] * size[1] <= most:
            assert len(down) == len(across) == 1
        smallest = np.prod([min(length, 48 + 2 * multiple) for length in size])
        assert largest <= max(most, smallest)


@pytest.mark.parametrize('size,max_rows,summed', [((50, 40), 2, False), ((50, 40), 9, False), ((9, 300), 1, True)])
def test_bytes_of_a_canvas(size, max_rows, summed):
    tiling = Tiling(*size, 16, 12)
    canvas = Canvas(tiling, 2, 3, max_rows, torch.device('cpu'), summed)
    held = 4 * (canvas.image.numel() + canvas.total.numel())
    copied = 0 if len(tiling.tops) <= max_rows else 4 * canvas.image.shape[1] * (4 - summed) * 2 * 4
    counted = Canvas.bytes_of(tiling, 2, 3, max_rows, summed)
    assert held <= counted <= held + copied + 4 * canvas.image.shape[1] * (4 - summed) * 8


def under(upscaler, fake, limit, per_pixel, monkeypatch):
    """The engine with a limit of memory, where each pixel of a pass takes so many bytes."""
    run = upscaler.run

    def taking(branch, tiles):
        fake.take(per_pixel * tiles.shape[0] * tiles.shape[2] * tiles.shape[3])
        return run(branch, tiles)

    monkeypatch.setattr(upscaler, 'run', taking)
    upscaler.limit_memory(MemoryLimit(fake, limit))
    return upscaler


@pytest.mark.slow
def test_passes_stay_below_the_limit_and_the_image_stays_the_same(tiny_net, monkeypatch):
    net = spread(build_network(tiny_net(4, [fsrcnn(4), carn(4), carn(8)])).eval())
    lq, per_pixel = torch.rand(1, 3, 200, 420) * torch.linspace(0, 1, 420), 20000
    expected = TileUpscaler(net, 96, 92, max_tiles=4).upscale(lq).image
    tried = []
    for limit in (400, 600, 1000, 4000):
        fake = Fake()
        upscaler = under(TileUpscaler(net, 96, 92, max_tiles=4), fake, limit * MIB, per_pixel, monkeypatch)
        image = upscaler.upscale(lq).image
        assert (image - expected).abs().max() < 1e-5  # of whole blocks, or of parts with what is around them
        assert fake.most <= limit * MIB
        tried.append(fake.most)
    assert tried[0] < tried[1] < tried[2] == tried[3]  # it takes no more than is usual


@pytest.mark.slow
def test_too_little_for_the_smallest_plan_is_refused_with_a_figure_that_suffices(tiny_net, monkeypatch):
    net = spread(build_network(tiny_net()).eval())
    upscaler = TileUpscaler(net, 96, 92)
    with pytest.raises(ShortOfMemory, match='needs .*M for the smallest tile'):
        under(upscaler, Fake(), 160 * MIB, 10**4, monkeypatch)
    lq = TensorRows(torch.rand(1, 3, 120, 4000))
    upscaler = under(TileUpscaler(net, 96, 92), Fake(), 208 * MIB, 4000, monkeypatch)
    with pytest.raises(ShortOfMemory, match='a strip of tiles') as caught:
        upscaler.plan(lq)
    assert '\n' not in str(caught.value)
    upscaler.memory_limit.size = bytes_of(str(caught.value).split()[1])
    upscaler.measured = tile_upscaler.Speed([2] * 3, [1.] * 4)
    plan = upscaler.plan(lq)
    assert plan.tile_rows < 3 and max(plan.max_tiles) == 1 and max(plan.max_pixels) < 188 * 188


@pytest.mark.slow
def test_what_the_router_frees_does_not_pile_up(tiny_net, monkeypatch):
    """A heap in which a quarter of each pass is not taken again."""
    monkeypatch.setitem(tile_upscaler.CLASSIFIED_TOGETHER, 'cpu', 2)
    fake, lq = Fake(), TensorRows(torch.rand(1, 3, 4000, 90))
    upscaler = under(TileUpscaler(build_network(tiny_net()).eval(), 96, 92), fake, 300 * MIB, 100, monkeypatch)
    upscaler.bytes_per_pixel[-1] = 4000.
    rows, canvas, held = upscaler._lq_rows, tile_upscaler.Canvas, []

    def leaking(*args):
        fake.take(fake.kept + 1000 * 2 * 96**2)
        return rows(*args)

    monkeypatch.setattr(upscaler, '_lq_rows', leaking)
    upscaler.measured = tile_upscaler.Speed([2] * 3, [1.] * 4)
    plan = upscaler.plan(lq)
    assert 200 * MIB < fake.most <= 300 * MIB
    monkeypatch.setattr(upscaler, '_lq_rows', rows)
    fake.kept = 50 * MIB
    monkeypatch.setattr(tile_upscaler, 'Canvas', lambda *args: held.append(fake.kept) or canvas(*args))
    next(upscaler.strips(lq, plan))
    assert held[0] < 10 * MIB


@pytest.mark.slow
def test_plenty_changes_no_plan(tiny_net, monkeypatch):
    net, lq = spread(build_network(tiny_net()).eval()), TensorRows(torch.rand(1, 3, 150, 300))
    usual = TileUpscaler(net, 96, 92).plan(lq)
    plan = under(TileUpscaler(net, 96, 92), Fake(), 2**50, 10**4, monkeypatch).plan(lq)
    assert plan.strips == usual.strips and plan.tile_rows == usual.tile_rows and plan.max_tiles == usual.max_tiles


@pytest.mark.slow
def test_pixels_stay_below_the_limit():
    net, lq = build_network(pcsr()).eval(), torch.rand(1, 3, 150, 200)
    expected = PixelUpscaler(net, 64, 52).upscale(lq).image
    bands = []
    for limit in (180, 200, 2**20):
        upscaler = PixelUpscaler(net, 64, 52)
        upscaler.limit_memory(MemoryLimit(Fake(), limit * MIB))
        upscaler.taken = upscaler.taken._replace(by_tile=4000., by_band=1000.)
        plan = upscaler.plan(TensorRows(lq))
        assert upscaler._bytes_of(plan) <= upscaler.memory_limit.free()
        bands.append(plan.band_pixels)
        assert (upscaler.upscale(lq).image - expected).abs().max() < 1e-5
    assert bands[0] < bands[1] < bands[2]
    upscaler.memory_limit.size = 120 * MIB
    with pytest.raises(ShortOfMemory) as caught:
        upscaler.plan(TensorRows(lq))
    upscaler.memory_limit.size = bytes_of(str(caught.value).split()[1])
    upscaler.plan(TensorRows(lq))


def test_images_side_by_side_need_not_have_the_same_strips():
    first, second = np.arange(24).reshape(6, 2, 2), np.arange(12).reshape(6, 2, 1)
    strips = list(side_by_side(iter(np.split(first, [1, 4])), iter(np.split(second, [3, 5]))))
    assert np.array_equal(np.concatenate(strips), np.concatenate([first, second], axis=2))


# files


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['png', 'jpg', 'webp', 'avif', 'bmp', 'tif'])
def test_reading_stays_below_the_limit(tmp_path, kind):
    path, pixels = tmp_path / f'a.{kind}', np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    from PIL import Image
    Image.fromarray(pixels).save(path, **({'compression': 'tiff_lzw'} if kind == 'tif' else {}))
    usual = read_image(path).pixels
    memory_limit = MemoryLimit(Fake(), 100 * MIB + SPARE + 10 * MIB)
    with pytest.raises(ShortOfMemory, match=r'\d+M for reading it') as caught:
        read_image(path, memory_limit=memory_limit)
    memory_limit.size = bytes_of(str(caught.value).split()[1])
    assert np.array_equal(read_image(path, memory_limit=memory_limit).pixels, usual)
    assert np.array_equal(read_image(path).pixels, usual)  # the next one may take more again


WRITING = """
import json, sys
import numpy as np
from cdnsr_basicsr.inference.image_io import bytes_to_write, write_image
from cdnsr_basicsr.memory import HostMemory
host, found = HostMemory(), []
noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 4), np.uint8)
for kind, channels, dtype in json.loads(sys.argv[1]):
    pixels = np.ascontiguousarray(noise[..., :channels]).astype(dtype) * (257 if dtype == 'uint16' else 1)
    for rows in (16, 1500):  # the first one loads what is needed
        host.trim()
        before = host.used()
        strips = (pixels[top:min(rows, top + 100)] for top in range(0, rows, 100))
        name = f'{sys.argv[2]}/a.{kind}'
        write_image(name, (rows, *pixels.shape[1:]), pixels.dtype, strips)
    found.append([host.used() - before, bytes_to_write(name, pixels.shape, pixels.dtype)])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_writing_takes_no_more_than_is_counted(tmp_path):
    kinds = [(kind, channels, 'uint8') for kind in ('png', 'webp', 'tif') for channels in (1, 2, 3, 4)]
    kinds += [('jpg', 1, 'uint8'), ('jpg', 3, 'uint8'), ('png', 2, 'uint16'), ('png', 3, 'uint16'),
              ('tif', 4, 'uint16')]
    done = subprocess.run([sys.executable, '-c', WRITING,
                           json.dumps(kinds), str(tmp_path)],
                          env=ENV,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    for kind, (taken, counted) in zip(kinds, json.loads(done.stdout)):
        assert taken < counted + 4 * MIB, (kind, taken / MIB, counted / MIB)


@pytest.fixture
def limited(tmp_path, tiny_net, monkeypatch):
    """Upscales a folder by the command, with so many MiB beside what the process holds; exit code and what it says."""
    from cdnsr_basicsr.checkpoint import save_checkpoint
    monkeypatch.chdir(tmp_path)
    net = spread(build_network(tiny_net()).eval())
    save_checkpoint({'params': net.state_dict(), 'network_g': tiny_net(), 'scale': 4}, 'net.pth')
    Path('in').mkdir()
    cv2.imwrite('in/a.png', photograph(60, 90))
    cv2.imwrite('in/c.png', photograph(50, 70, 1))
    read_image('in/a.png')  # its decoder counts

    def run(more, *arguments, source='in'):
        host = HostMemory()
        host.trim()
        size = (host.used() + SPARE) // MIB + more
        return cli.main(['upscale', '-m', 'net.pth', '-i', source, '-o', 'out', '--memory', f'{size}M', *arguments])

    return run


@pytest.mark.slow
def test_a_picture_that_takes_too_much_is_left_out_and_the_others_are_done(limited, capsys):
    cv2.imwrite('in/b.png', photograph(1600, 3000))
    assert limited(150) == 1
    said = capsys.readouterr()
    assert sorted(path.name for path in Path('out').iterdir()) == ['a.png', 'c.png']
    failure, = [line for line in said.err.splitlines() if line.startswith('Failed')]
    assert re.fullmatch(r'Failed: in/b.png: needs .*, but the limit is \d+M', failure)
    assert '(limit: ' in said.out
    assert limited(150, source='in/b.png') == 2  # nothing at all was done
    said = capsys.readouterr()
    assert said.err.count('\n') == 1 and 'in/b.png needs' in said.err and not said.out
    assert not Path('out/b.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [(), ('--ext', 'tif', '--map'), ('--budget', '0.8', '--threads', '1')])
def test_the_pictures_are_the_same(limited, arguments, capsys):
    rgba = np.dstack([photograph(60, 90, 2), photograph(60, 90, 3)[..., 0]])
    cv2.imwrite('in/d.png', rgba)
    assert cli.main(['upscale', '-m', 'net.pth', '-i', 'in', '-o', 'usual', *arguments]) == 0
    assert limited(200, '--json', *arguments) == 0
    content = json.loads(capsys.readouterr().out.split('\n', 1)[1].partition('{')[2].join(['{', '']))
    assert content['memory_mib'] > 200 and content['peak_mib'] > 0
    for path in Path('usual').iterdir():
        usual, image = read_image(path).pixels, read_image(Path('out', path.name)).pixels
        assert np.abs(usual.astype(int) - image).max() <= 1


def test_only_the_memory_of_torch_is_limited(monkeypatch):
    monkeypatch.setattr('cdnsr_basicsr.loading.check_backend', lambda *args: None)
    with pytest.raises(OptionError, match='memory=4G: the memory of onnxruntime cannot be limited'):
        sr.load('net.pth', backend='onnxruntime', memory='4G')


# the process

# with the smallest limit that is accepted, and two with more
MEASURED = [('cdnsr-etds-x4', '7680x4320', 'least'), ('cdnsr-etds-x4', '7680x4320', '2G'),
            ('cdnsr-modern-x4', '512x512', 'least'), ('cdnsr-modern-x3', '256x256', 'least'),
            ('cdnsr-modern-x2', '256x256', 'least'), ('cdnsr-fsrcnn-x4', '1280x720', 'least'),
            ('cdnsr-fsrcnn-x4', '1280x720', 'auto'), ('SMFANet', '256x256', 'least'), ('SwinIR', '100x70', 'least'),
            ('PCSR', '320x240', 'least')]


@pytest.mark.slow
@pytest.mark.parametrize('name,size,memory', MEASURED, ids=[' '.join(row) for row in MEASURED])
def test_the_process_stays_below_the_limit(tmp_path, monkeypatch, name, size, memory):
    monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
    bench = importlib.import_module('bench_memory')
    path = str(tmp_path / 'lr.png')
    cv2.imwrite(path, bench.image(*map(int, size.split('x'))))
    arguments = ['-m', bench.checkpoint(name, tmp_path), '-i', path, '-o', str(tmp_path / 'out'), '--threads', '1']
    if memory == 'least':
        memory, code, peak, _, said = bench.least(*arguments, env=ENV)
    else:
        code, peak, _, said = bench.peak_of(*arguments, '--memory', memory, env=ENV)
    assert code == 0, said
    told = re.search(r'Peak memory: (\d+)M \(limit: (\d+)M\)', said)
    assert peak <= int(told[2]) and memory in ('auto', '2G', f'{told[2]}M'), said
    assert int(told[1]) <= int(told[2])
