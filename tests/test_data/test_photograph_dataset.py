"""PhotographDataset, and scripts/degrade.py, which degrades what it reads."""
import copy
import cv2
import importlib.util
import numpy as np
import pytest
import random
import sys

from basicsr.data import build_dataset
from cdnsr_basicsr import cli
from cdnsr_basicsr.data.photograph_dataset import CROPPED, PhotographDataset
from cdnsr_basicsr.data.prepare import prepare
from tests.helpers import ROOT, decode, photograph


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Three photographs; one is smaller than RealESRGANDataset's crops."""
    root = tmp_path_factory.mktemp('photographs')
    for i, (height, width) in enumerate(((500, 450), (401, 620), (150, 230))):
        image = cv2.resize(photograph(height // 4, width // 4, i), (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / f'{i}.png'), image)
    return root


@pytest.fixture
def opt(folder):
    data = dict(name='train', type='PhotographDataset', dataroot_gt=str(folder), io_backend=dict(type='disk'))
    return dict(scale=4, datasets=dict(train=dict(data, gt_size=64, use_hflip=False, use_rot=False)))


@pytest.fixture(scope='module')
def degrade():
    """scripts/degrade.py as a module."""
    spec = importlib.util.spec_from_file_location('degrade', ROOT / 'scripts/degrade.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['degrade'] = module  # for workers that are not forked
    spec.loader.exec_module(module)
    return module


def block_of(opt, **changes):
    return dict(copy.deepcopy(opt['datasets']['train']), phase='train', scale=opt['scale'], **changes)


def test_patches_are_parts_of_the_photographs_with_room_for_the_last_crop(opt, folder):
    dataset = build_dataset(block_of(opt))
    assert isinstance(dataset, PhotographDataset) and len(dataset) == 3
    for i, entry in enumerate(dataset):
        assert entry['gt'].shape == (3, 96, 96) and entry['kernel1'].shape == (21, 21)
        assert abs(entry['kernel1'].sum() - 1) < 1e-5 and entry['gt_path'] == str(folder / f'{i}.png')
        image = cv2.imread(entry['gt_path'])
        if i < 2:  # the third is padded
            patch = (255 * entry['gt']).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
            assert cv2.matchTemplate(image, np.ascontiguousarray(patch), cv2.TM_SQDIFF_NORMED).min() < 1e-6
    assert len({float(dataset[0]['gt'].sum()) for _ in range(8)}) > 4, 'places are random'
    assert build_dataset(block_of(opt) | dict(gt_size=CROPPED))[2]['gt'].shape == (3, CROPPED, CROPPED)


def test_a_list_chooses_among_the_images(opt, tmp_path):
    (tmp_path / 'meta_info.txt').write_text('1.png (401,620,3)\n')
    assert len(build_dataset(block_of(opt, meta_info=str(tmp_path / 'meta_info.txt')))) == 1


@pytest.mark.parametrize('whole', [True, False])
def test_it_reads_what_prepare_writes(opt, folder, tmp_path, whole):
    prepare(str(folder), str(tmp_path / 'out'), 4, (1, ), CROPPED, whole=whole, workers=1)
    if whole:
        changes = dict(dataroot_gt=str(tmp_path / 'out/gt'), meta_info=str(tmp_path / 'out/meta_info.txt'))
    else:
        changes = dict(dataroot_gt=str(tmp_path / 'out/gt.lmdb'), io_backend=dict(type='lmdb'))
    dataset = build_dataset({**block_of(opt), **changes})
    assert len(dataset) == (3 if whole else 6)
    assert all(entry['gt'].shape == (3, 96, 96) for entry in dataset)


def test_pairs_are_patches_with_a_degradation_each(degrade, opt):
    gt, lq = degrade.make_pairs(opt, 20)
    assert gt.shape == (20, 64, 64, 3) and lq.shape == (20, 16, 16, 3) and gt.dtype == lq.dtype == np.uint8
    small = np.stack([cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA) for image in gt]).astype(float)
    error = np.abs(small - lq).mean((1, 2, 3))
    assert error.min() > 0.5 and error.max() < 40 and error.max() > 1.5 * error.min()
    for i in range(20):  # a pair belongs together
        others = np.abs(small - lq[i]).mean((1, 2, 3))
        assert others[i] == others.min()
    red, blue = ((gt[..., i].astype(float) - lq.repeat(4, 1).repeat(4, 2)[..., i]).mean() for i in (0, 2))
    assert abs(red) < 4 and abs(blue) < 4


def test_a_seed_decides_whoever_makes_the_pairs(degrade, opt, monkeypatch):
    monkeypatch.setattr(degrade, 'CHUNK', 4)
    opt['datasets']['train'].update(gt_size=32)
    state = random.getstate()
    gt, lq = degrade.make_pairs(opt, 10, seed=3)
    assert len(gt) == 10 and random.getstate() == state, 'nobody else notices'
    for workers in (0, 2):
        for ours, theirs in zip((gt, lq), degrade.make_pairs(opt, 10, workers, 3)):
            assert np.array_equal(ours, theirs)
    assert not np.array_equal(degrade.make_pairs(opt, 10, seed=4)[1], lq)


@pytest.fixture
def command(degrade, folder, tmp_path, monkeypatch, capsys):
    """Runs scripts/degrade.py on the photographs; what it has written by name."""

    def run(name, *arguments):
        out = tmp_path / name
        argv = ['degrade.py', '-opt', str(ROOT / 'options/train_photo_branch1.yml'), '-i', str(folder), '-o', str(out)]
        monkeypatch.setattr(sys, 'argv', [*argv, *arguments])
        assert degrade.main() == 0 and f'Wrote 3 pairs to {out}' in capsys.readouterr().out
        return {f'{path.parent.name}/{path.name}': path.read_bytes() for path in sorted(out.glob('*/*'))}

    return run


def test_a_test_set_is_the_same_each_time(command, folder):
    first = command('first', '--seed', '5')
    assert sorted(first) == [f'{kind}/{i}.png' for kind in ('gt', 'lq') for i in range(3)]
    assert command('again', '--seed', '5') == first
    other = command('other')
    for name in first:
        assert (first[name] == other[name]) == name.startswith('gt')
    for i, (height, width) in enumerate(((500, 448), (400, 620), (148, 228))):
        gt, lq = (decode(first[f'{kind}/{i}.png']) for kind in ('gt', 'lq'))
        assert np.array_equal(gt, cv2.imread(str(folder / f'{i}.png'))[:height, :width])
        assert lq.shape == (height // 4, width // 4, 3)
        small = cv2.resize(gt, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
        assert 0.5 < np.abs(small.astype(float) - lq).mean() < 40


def test_what_is_taken_is_not_written_over(command, capsys):
    command('out')
    with pytest.raises(SystemExit):
        command('out')
    assert 'is not empty; choose a new folder' in capsys.readouterr().err


@pytest.mark.parametrize('arguments, message', [
    (('--seed', '-1'), '--seed: expected an integer from 0 to '),
    (('--force_yml', 'noise_range=[3,1]'), 'noise_range: expected the smaller number first, but got [3, 1]'),
    (('-i', 'nowhere'), 'nowhere: no such folder, or no images in it'),
    (('-i', 'small'), 'a.png: is smaller than 64 pixels'),
])
def test_mistakes_are_one_line_and_leave_nothing(command, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'small').mkdir()
    cv2.imwrite('small/a.png', photograph(60, 90))
    with pytest.raises(SystemExit):
        command('out', *arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ['small']


@pytest.mark.slow
def test_a_benchmark_measures_on_a_degraded_set(command, tmp_path, capsys):
    command('set')
    code = cli.main(['benchmark', '-m', 'cdnsr-fsrcnn-x4', '--data', str(tmp_path / 'set'), '--device', 'cpu'])
    out = capsys.readouterr().out
    assert code == 0 and 'PSNR' in out, out
