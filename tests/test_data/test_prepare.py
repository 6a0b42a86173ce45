import cv2
import numpy as np
import os
import pytest
import shutil
import signal
import subprocess
import sys
import tifffile
import time
from pathlib import Path
from PIL import Image

from basicsr.data import build_dataset
from cdnsr_basicsr import cli
from cdnsr_basicsr.data.prepare import make_lq, patch_keys, patch_starts, prepare, read_bgr, resize, smallest
from cdnsr_basicsr.evaluation import read_pairs
from cdnsr_basicsr.inference.image_io import list_images
from cdnsr_basicsr.options import OptionError
from tests.helpers import decode, photograph, read_lmdb


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / 'hr'
    folder.mkdir()
    for i, name in enumerate(('a.png', 'b.c.png', 'ü é.png')):
        cv2.imwrite(str(folder / name), photograph(seed=i))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_lq_equals_published_lq(shared, scale):
    for name in ('Set5', 'Set14'):
        for path in sorted(shared(f'data/benchmark/{name}/HR').glob('*.png')):
            published = cv2.imread(str(path.parents[1] / f'LR_x{scale}' / path.name))
            gt, lq = make_lq(cv2.imread(str(path)), scale)
            assert gt.shape[:2] == (lq.shape[0] * scale, lq.shape[1] * scale)
            # some HR files were cropped by up to 3 pixels more than what the x2 and x3 files were made of
            assert 0 <= published.shape[0] - lq.shape[0] <= 1 and 0 <= published.shape[1] - lq.shape[1] <= 1
            published = published[:lq.shape[0], :lq.shape[1]]
            assert np.abs(lq.astype(float) - published).mean() <= 0.25, path


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_patches_are_aligned_crops(photographs, tmp_path, scale):
    crop, step = 12 * scale, 8 * scale
    done = prepare(str(photographs), str(tmp_path / 'out'), scale, (1, 0.7), crop, step, workers=2)
    gts, lqs = (read_lmdb(tmp_path / 'out' / name) for name in ('gt.lmdb', 'lq.lmdb'))
    assert len(gts) == done.pairs > 0 and gts.keys() == lqs.keys()
    image = cv2.imread(str(photographs / 'a.png'))
    for fraction, mark in ((1, 's1000'), (0.7, 's0700')):
        gt, lq = make_lq(image if fraction == 1 else resize(image, fraction), scale)
        keys = [key for key in gts if key.startswith(f'a_{mark}')]
        assert keys
        for key in keys:
            top, left = (int(part[1:]) for part in key.split('_')[2:])
            assert np.array_equal(decode(gts[key]), gt[top:top + crop, left:left + crop])
            top, left, size = top // scale, left // scale, crop // scale
            assert np.array_equal(decode(lqs[key]), lq[top:top + size, left:left + size])


def test_basicsr_reads_the_lmdb(photographs, tmp_path):
    done = prepare(str(photographs), str(tmp_path / 'out'), 4, (1, ), 48, 32)
    assert not any('.' in key for key in read_lmdb(tmp_path / 'out' / 'gt.lmdb'))
    dataset = build_dataset({
        'name': 'stock',
        'type': 'PairedImageDataset',
        'phase': 'train',
        'scale': 4,
        'dataroot_gt': str(tmp_path / 'out' / 'gt.lmdb'),
        'dataroot_lq': str(tmp_path / 'out' / 'lq.lmdb'),
        'io_backend': {
            'type': 'lmdb'
        },
        'gt_size': 48,
        'use_hflip': True,
        'use_rot': True
    })
    assert len(dataset) == done.pairs == len((tmp_path / 'out' / 'meta_info.txt').read_text().splitlines())
    assert dataset[0]['lq'].shape == (3, 12, 12) and dataset[0]['gt'].shape == (3, 48, 48)


@pytest.mark.slow
def test_same_result_on_any_number_of_workers(photographs, tmp_path):
    for workers in (1, 5):
        prepare(str(photographs), str(tmp_path / f'out{workers}'), 4, (1, 0.8), 48, 32, workers)
    for name in ('gt.lmdb', 'lq.lmdb'):
        assert read_lmdb(tmp_path / 'out1' / name) == read_lmdb(tmp_path / 'out5' / name)
    assert (tmp_path / 'out1/meta_info.txt').read_text() == (tmp_path / 'out5/meta_info.txt').read_text()


def test_all_kinds_of_images_are_read(tmp_path):
    folder, image = tmp_path / 'hr', photograph(64, 64)
    (folder / 'sub').mkdir(parents=True)
    kinds = {
        'gray.png': image[..., 0],
        'alpha.png': np.dstack([image, image[..., 0]]),
        'deep.png': image.astype(np.uint16) * 257,
        'photo.JPG': image,
        'photo.webp': image,
        'photo.bmp': image,
        'photo.tiff': image,
        'sub/photo.png': image
    }
    for name, content in kinds.items():
        assert cv2.imwrite(str(folder / name), content)
    (folder / 'no_suffix').write_bytes((folder / 'gray.png').read_bytes())
    (folder / 'notes.txt').write_text('no image')
    (folder / '.hidden.png').write_bytes(b'broken')
    images, others, _ = list_images(folder, by_content=True)
    assert len(images) == 9 and [path.name for path in others] == ['notes.txt']
    done = prepare(str(folder), str(tmp_path / 'out'), 4, (1, ), 64, 64)
    assert done == (9, [], [], [], others)
    gts = read_lmdb(tmp_path / 'out' / 'gt.lmdb')
    assert all(decode(data).shape == (64, 64, 3) and decode(data).dtype == np.uint8 for data in gts.values())
    assert np.array_equal(decode(gts['deep_s1000_y00000_x00000']), image)


def test_other_files_may_have_any_name(photographs, tmp_path):
    (photographs / os.fsdecode(b'notes\xff.txt')).write_text('no picture')
    images, others, _ = list_images(photographs, by_content=True)
    assert os.fsdecode(b'notes\xff.txt') in [path.name for path in others]
    assert len(images) == sum(path.suffix == '.png' for path in photographs.iterdir())


def test_a_mount_point_is_refused_before_any_work(photographs, tmp_path, monkeypatch):
    (tmp_path / 'out').mkdir()
    monkeypatch.setattr(Path, 'is_mount', lambda path: path == (tmp_path / 'out').resolve())
    with pytest.raises(OSError, match='is a mount point'):
        prepare(str(photographs), str(tmp_path / 'out'), crop=32)
    assert not list((tmp_path / 'out').iterdir())


def test_keys_are_unique_and_plain(tmp_path):
    paths = [tmp_path / name for name in ('a.b.png', 'a_b.png', 'a_b.jpg', 'ü.png', 'é.png', 'x/y.png')]
    keys = list(patch_keys(paths, tmp_path).values())
    assert keys == ['a_b', 'a_b-2', 'a_b-3', '_', '_-2', 'x_y']


@pytest.mark.slow
def test_broken_and_small_files_are_named_and_left_out(photographs, tmp_path, capsys):
    from cdnsr_basicsr.cli import main
    (photographs / 'broken.png').write_bytes((photographs / 'a.png').read_bytes()[:100])
    cv2.imwrite(str(photographs / 'small.png'), photograph(20, 20))
    code = main(['prepare', '-i', str(photographs), '-o', str(tmp_path / 'out'), '--crop', '48'])
    error = capsys.readouterr().err
    assert code == 1
    assert f'cannot be read: {photographs}/broken.png' in error
    assert f'smaller than a patch: {photographs}/small.png' in error
    assert (tmp_path / 'out' / 'meta_info.txt').exists()


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_whole_leaves_out_what_cannot_be_made_smaller(photographs, tmp_path, capsys, scale):
    from cdnsr_basicsr.cli import main
    for side in range(1, 3 * scale):
        cv2.imwrite(str(photographs / f'{side:02}.png'), photograph(64, 64)[:side])
        cv2.imwrite(str(photographs / f'{side:02}w.png'), photograph(64, 64)[:, :side])
    command = ['prepare', '-i', str(photographs), '-o', str(tmp_path / 'out'), '--whole', '--scale', str(scale)]
    assert main(command) == 0
    error = capsys.readouterr().err
    for side in range(1, 3 * scale):
        for mark in ('', 'w'):
            left_out = f'smaller than a patch: {photographs}/{side:02}{mark}.png' in error
            assert left_out == (side < smallest(scale)) != (tmp_path / f'out/gt/{side:02}{mark}.png').exists()
    assert (tmp_path / 'out/gt/a.png').exists()


def test_patches_of_the_least_size(photographs, tmp_path):
    cv2.imwrite(str(photographs / 'low.png'), photograph(64, 64)[:5])
    done = prepare(str(photographs), str(tmp_path / 'out'), 4, (1, 0.05), 4, 4)
    assert [Path(path).name for path in done.too_small] == ['low.png'] and done.pairs > 0


@pytest.mark.slow
def test_what_is_not_used_of_a_folder_is_named(photographs, tmp_path, capsys, shared):
    from cdnsr_basicsr.cli import main
    frames = [Image.fromarray(photograph(seed=seed)) for seed in range(3)]
    frames[0].save(photographs / 'frames.gif', save_all=True, append_images=frames[1:])
    frames[0].save(photographs / 'b.jfif', format='JPEG')
    cv2.imwrite(str(photographs / 'light.hdr'), np.linspace(0, 10, 64 * 64 * 3, dtype=np.float32).reshape(64, 64, 3))
    tifffile.imwrite(photographs / 'float.tif', np.ones((64, 64, 3), np.float32), photometric='rgb')
    (photographs / 'notes.txt').write_text('no image')
    crashes = [path for path in sorted(shared('cases').iterdir()) if 'segfault' in path.name]
    for path in crashes:
        shutil.copy(path, photographs)
    (tmp_path / 'linked').mkdir()
    frames[1].save(tmp_path / 'linked/c.png')
    (photographs / 'link').symlink_to(tmp_path / 'linked')
    (photographs / 'loop').symlink_to('.')
    assert main(['prepare', '-i', str(photographs), '-o', str(tmp_path / 'out'), '--whole']) == 1
    output, error = capsys.readouterr()
    assert f'Read in part: {photographs}/frames.gif: only the first of 3 frames.' in output
    assert 'Skipped, not an image format: .txt: notes.txt' in output
    assert f'Left out, cannot be read: {photographs}/light.hdr: contains HDR values' in error
    assert f'Left out, cannot be read: {photographs}/float.tif: TIFF of 32 bits, floating point' in error
    assert error.count('Left out, cannot be read: ') == 2 + len(crashes) == len(error.splitlines())
    names = sorted(path.name for path in (tmp_path / 'out/gt').iterdir())
    assert names == ['___.png', 'a.png', 'b.png', 'b_c.png', 'frames.png', 'link_c.png']


def test_deep_colours_are_rounded_and_alpha_is_dropped(tmp_path):
    values = np.random.default_rng(0).integers(0, 65535, (32, 32, 4), np.uint16, endpoint=True)
    cv2.imwrite(str(tmp_path / 'a.png'), values)
    pixels, notes = read_bgr(tmp_path / 'a.png')
    assert np.array_equal(pixels, np.round(values[..., :3] / 257)) and pixels.dtype == np.uint8 and notes == ()


def test_evaluation_refuses_what_it_cannot_read_in_one_line(photographs):
    Image.fromarray(photograph(7, 60)).save(photographs / 'z.png')
    with pytest.raises(OptionError, match='z.png: is smaller than 8 pixels'):
        list(read_pairs(str(photographs), 4))
    (photographs / 'z.png').write_bytes(b'#?RADIANCE\n')
    with pytest.raises(OptionError, match='z.png: cannot be read: contains HDR values'):
        list(read_pairs(str(photographs), 4))


def test_whole_photographs_that_no_png_holds_are_left_out(photographs, tmp_path):
    Image.fromarray(np.zeros((8, 1000008), np.uint8)).save(photographs / 'wide.bmp')
    done = prepare(str(photographs), str(tmp_path / 'out'), whole=True)
    assert done.pairs and [(Path(path).name, reason) for path, reason in done.unreadable
                           ] == [('wide.bmp', '1000008x8, but PNG has at most 1000000 pixels a side')]


def test_evaluation_can_leave_out_what_it_cannot_read(photographs):
    expected = [pair.name for pair in read_pairs(str(photographs), 4)]
    Image.fromarray(photograph(7, 60)).save(photographs / 'small.png')
    (photographs / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    left_out = []
    assert [pair.name for pair in read_pairs(str(photographs), 4, left_out=left_out)] == expected
    assert [Path(path).name for path, _ in left_out] == ['broken.png', 'small.png']
    left_out = []
    for path in photographs.rglob('*'):
        if path.is_file() and path.name not in ('small.png', 'broken.png'):
            path.unlink()
    with pytest.raises(OptionError, match='contains no photograph that can be used, such as .*small.png: is smaller'):
        list(read_pairs(str(photographs), 4, left_out=left_out))


@pytest.mark.slow
def test_finished_folder_is_not_overwritten_unless_told(photographs, tmp_path, capsys):
    from cdnsr_basicsr.cli import main
    out = tmp_path / 'out'
    command = ['prepare', '-i', str(photographs), '-o', str(out), '--crop', '48', '--step', '48']
    assert main(command) == 0
    (out / 'labels_psnr.txt').write_text('old')
    before = read_lmdb(out / 'gt.lmdb')
    assert main(command) == 2
    assert 'is already prepared; --overwrite replaces it' in capsys.readouterr().err
    assert read_lmdb(out / 'gt.lmdb') == before and (out / 'labels_psnr.txt').exists()
    assert main(command + ['--overwrite', '--scales', '0.8']) == 0
    assert read_lmdb(out / 'gt.lmdb').keys() != before.keys() and not (out / 'labels_psnr.txt').exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hr', 'out']


def test_folder_with_other_things_is_never_replaced(photographs, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'thesis.tex').write_text('years of work')
    with pytest.raises(OptionError, match='contains thesis.tex, which is not part of a prepared dataset'):
        prepare(str(photographs), str(out), 4, (1, ), 48, 48, overwrite=True)
    assert (out / 'thesis.tex').read_text() == 'years of work'


def test_an_error_leaves_nothing(photographs, tmp_path, monkeypatch):
    from cdnsr_basicsr.data import prepare as module
    calls = []

    def fail_later(image):
        calls.append(1)
        if len(calls) > 8:
            raise OSError('disk full')
        return encode(image)

    encode = module.encode
    monkeypatch.setattr(module, 'encode', fail_later)
    with pytest.raises(OSError, match='disk full'):
        prepare(str(photographs), str(tmp_path / 'out'), 4, (1, ), 48, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hr']


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    folder = tmp_path / 'hr'
    folder.mkdir()
    for i in range(40):
        cv2.imwrite(str(folder / f'{i}.png'), photograph(400, 400, i))
    command = [sys.executable, '-m', 'cdnsr_basicsr', 'prepare', '-i', str(folder), '-o', str(tmp_path / 'out')]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob('.out.preparing-*/gt.lmdb/data.mdb')):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'out').exists()
    assert list(tmp_path.glob('.out.preparing-*')), 'the test is void: the run was over before it was killed'
    prepare(str(folder), str(tmp_path / 'out'), 4, (1, ), 128, 128)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hr', 'out']


def test_whole_photographs(photographs, tmp_path):
    done = prepare(str(photographs), str(tmp_path / 'out'), 3, whole=True)
    assert done.pairs == 3
    names = sorted(path.name for path in (tmp_path / 'out/gt').iterdir())
    assert names == sorted(path.name for path in (tmp_path / 'out/lq').iterdir()) == ['___.png', 'a.png', 'b_c.png']
    gt, lq = (cv2.imread(str(tmp_path / 'out' / name / 'a.png')) for name in ('gt', 'lq'))
    assert gt.shape == (99, 138, 3) and lq.shape == (33, 46, 3)
    assert np.array_equal(gt, cv2.imread(str(photographs / 'a.png'))[:99, :138])


def test_out_may_be_a_link(photographs, tmp_path):
    (tmp_path / 'big_disk').mkdir()
    (tmp_path / 'out').symlink_to(tmp_path / 'big_disk')
    prepare(str(photographs), str(tmp_path / 'out'), 4, (1, ), 48, 48)
    assert (tmp_path / 'out').is_symlink() and (tmp_path / 'big_disk' / 'meta_info.txt').exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['big_disk', 'hr', 'out']


def test_out_must_not_lie_in_the_input(photographs):
    for out in (photographs, photographs / 'val', photographs.parent):
        with pytest.raises(OptionError, match='must not be inside'):
            prepare(str(photographs), str(out))


@pytest.mark.parametrize('name,value,message', [
    ('hr_folder', 'nowhere', 'no such folder'),
    ('scale', 0, 'expected an integer of at least 1'),
    ('scales', [1.5], 'expected fractions'),
    ('crop', 50, 'expected a multiple of the scale 4'),
    ('step', 200, 'expected a multiple of the scale 4, at most the crop 128'),
])
def test_wrong_arguments_are_named(photographs, tmp_path, capsys, name, value, message):
    from cdnsr_basicsr.cli import main
    arguments = {'hr_folder': str(photographs), 'out': str(tmp_path / 'out'), name: value}
    with pytest.raises(OptionError) as error:
        prepare(**arguments)
    assert str(error.value).startswith(f'{name}={value}: {message}')

    flags = {key: {'hr_folder': '-i', 'out': '-o'}.get(key, f'--{key}') for key in arguments}
    values = [word for key in arguments for word in (flags[key], str(arguments[key]).strip('[]'))]
    assert main(['prepare', *values]) == 2
    assert capsys.readouterr().err.startswith(f'basicsr: error: {flags[name]} {value}: {message}')
    assert not (tmp_path / 'out').exists()


def test_nothing_that_is_large_enough(photographs, tmp_path):
    with pytest.raises(OptionError, match='no image could be used: 0 cannot be read, 3 are smaller than a patch'):
        prepare(str(photographs), str(tmp_path / 'out'), crop=512, step=512)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('length', range(8, 60))
@pytest.mark.parametrize('step', [8, 5, 1])
def test_patches_cover_every_pixel_and_stay_inside(length, step):
    starts = patch_starts(length, 8, step)
    assert {i for start in starts for i in range(start, start + 8)} == set(range(length))
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert all(following - start <= step for start, following in zip(starts, starts[1:]))


@pytest.mark.parametrize('whole', [False, True])
def test_images_that_belong_together_stay_together(tmp_path, capsys, whole):
    generator = np.random.default_rng(0)
    for name in ('gt/in', 'lq/in'):
        (tmp_path / 'pairs' / name).mkdir(parents=True)
    lq = generator.integers(0, 256, (70, 50, 3)).astype(np.uint8)
    gt = lq.repeat(2, 0).repeat(2, 1)
    for name, ending in (('a', 'png'), ('in/b', 'tif')):  # the LQ image has an ending of its own
        cv2.imwrite(str(tmp_path / f'pairs/gt/{name}.png'), gt)
        cv2.imwrite(str(tmp_path / f'pairs/lq/{name}.{ending}'), lq)
    cv2.imwrite(str(tmp_path / 'pairs/gt/wrong.png'), gt[:-2])
    cv2.imwrite(str(tmp_path / 'pairs/lq/wrong.png'), lq)
    cv2.imwrite(str(tmp_path / 'pairs/gt/alone.png'), gt)
    arguments = ['-i', str(tmp_path / 'pairs'), '-o', str(tmp_path / 'out'), '--scale', '2', *['--whole'] * whole]
    assert cli.main(['prepare', *arguments]) == 1
    said = capsys.readouterr()
    assert 'wrong.png: is not x2 of its LQ image' in said.err and 'alone.png' in said.err
    if whole:
        found = {path.stem: cv2.imread(str(path)) for path in (tmp_path / 'out/gt').iterdir()}
        small = {path.stem: cv2.imread(str(path)) for path in (tmp_path / 'out/lq').iterdir()}
        assert set(found) == {'a', 'in_b'} and all(np.array_equal(image, gt) for image in found.values())
    else:
        found, small = ({
            key: decode(data)
            for key, data in read_lmdb(tmp_path / f'out/{name}.lmdb').items()
        } for name in ('gt', 'lq'))
        assert set(found) == set(small) and len(found) == 2 * 3 * 2 and 'a_y00000_x00000' in found
    for key, image in found.items():
        assert np.array_equal(image, small[key].repeat(2, 0).repeat(2, 1))
