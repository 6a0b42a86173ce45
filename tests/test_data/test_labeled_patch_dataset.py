import pytest
import random
import shutil
import torch
from collections import Counter

from basicsr.archs import build_network
from basicsr.data import build_dataset
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.data.label import label
from cdnsr_basicsr.data.labels import Label, read_labels, write_labels
from cdnsr_basicsr.options import OptionError
from tests.helpers import read_lmdb


@pytest.fixture
def block(dataset):
    path, _ = label(str(dataset), 'bicubic')
    return {
        'name': 'patches',
        'type': 'LabeledPatchDataset',
        'phase': 'train',
        'scale': 4,
        'dataroot_gt': str(dataset / 'gt.lmdb'),
        'dataroot_lq': str(dataset / 'lq.lmdb'),
        'io_backend': {
            'type': 'lmdb'
        },
        'label_file': str(path),
        'gt_size': 32,
        'use_hflip': True,
        'use_rot': True
    }


def test_items_have_their_label(block):
    data, labels = build_dataset(block), read_labels(block['label_file'])
    assert len(data) == len(labels)
    for item in data:
        assert item['lq'].shape == (3, 8, 8) and item['gt'].shape == (3, 32, 32) and item['lq'].dtype == torch.float32
        assert 0 <= item['lq'].min() and item['lq'].max() <= 1
        assert item['label'] == labels[item['gt_path']].label and item['lq_path'] == item['gt_path']
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert batch['label'].dtype == torch.int64


def test_classes_keep_only_theirs(block):
    labels = read_labels(block['label_file'])
    for classes in ([0], [1, 2]):
        data = build_dataset({**block, 'classes': classes})
        assert {item['label'] for item in data} == set(classes)
        assert len(data) == sum(entry.label in classes for entry in labels.values())


def test_balance_makes_classes_equally_frequent_and_loses_none(block):
    labels = read_labels(block['label_file'])
    uneven = {key: Label(0 if i < 2 else 1, 0.) for i, key in enumerate(sorted(labels))}
    write_labels(block['label_file'], uneven)
    data = build_dataset({**block, 'balance': True})
    assert Counter(data.labels) == {0: len(labels) - 2, 1: len(labels) - 2}
    assert {path['gt_path'] for path in data.paths} == set(labels)


def test_folders_work_too(block, tmp_path):
    for name in ('gt', 'lq'):
        (tmp_path / name).mkdir()
        for key, png in read_lmdb(block[f'dataroot_{name}']).items():
            (tmp_path / name / f'{key}.png').write_bytes(png)
    folders = {'dataroot_gt': str(tmp_path / 'gt'), 'dataroot_lq': str(tmp_path / 'lq'), 'io_backend': {'type': 'disk'}}
    data = build_dataset({**block, **folders, 'classes': [2]})
    labels = read_labels(block['label_file'])
    assert len(data) == sum(entry.label == 2 for entry in labels.values())
    assert all(labels[item['gt_path'].split('/')[-1][:-4]].label == 2 for item in data)


def test_without_label_file_labels_are_minus_one(block):
    assert {item['label'] for item in build_dataset({**block, 'label_file': None})} == {-1}


@pytest.mark.parametrize('change,message', [
    ({
        'classes': 0
    }, r'classes: expected a list of classes such as \[0\], but got 0'),
    ({
        'classes': [7]
    }, r'has no patch of classes \[7\]; it has \[0, 1, 2\]'),
    ({
        'label_file': None,
        'balance': True
    }, 'balance: needs label_file'),
    ({
        'label_file': 'nowhere.txt'
    }, 'no such file: nowhere.txt'),
    ({
        'lable_file': 'x'
    }, 'lable_file: unknown key; accepted: balance, batch_size_per_gpu'),
    ({
        'gt_size': 36
    }, 'gt_size: expected an integer from 4 to 32, but got 36'),
    ({
        'gt_size': 30
    }, 'gt_size: 30 is not a multiple of the scale, 4'),
    ({
        'gt_size': None
    }, 'gt_size: expected an integer from 4 to 32, but got None'),
    ({
        'scale': 2
    }, r'dataroot_lq: its patches are not those of .*, downscaled by 2'),
])
def test_mistakes_are_named(block, change, message):
    with pytest.raises(OptionError, match=message):
        build_dataset({**block, **change})


def test_labels_of_other_data_are_refused(block):
    write_labels(block['label_file'], {'other': Label(0, 1.)})
    with pytest.raises(OptionError, match='has no label for .* patches, such as .*; it was made for other data'):
        build_dataset(block)


@pytest.mark.slow
def test_errors_come_with_whole_patches_only(block, dataset, tmp_path, tiny_net):
    net = build_network(tiny_net())
    save_checkpoint({'params': net.state_dict(), 'network_g': tiny_net(), 'scale': 4}, str(tmp_path / 'net.pth'))
    path, _ = label(str(dataset), 'branches', str(tmp_path / 'net.pth'))
    labels = read_labels(path)
    for item in build_dataset({**block, 'label_file': str(path)}):
        assert item['errors'].tolist() == pytest.approx(labels[item['gt_path']].errors, rel=1e-6)
    # what is cut out of a patch has other errors
    assert 'errors' not in build_dataset({**block, 'label_file': str(path), 'gt_size': 16})[0]
    assert 'errors' not in build_dataset(block)[0]


@pytest.fixture
def taught(block, dataset, tmp_path):
    """A dataset with what bicubic upsampling makes of its patches."""
    net_opt = dict(type='Interpolation', upscale=4)
    net = build_network(net_opt)
    save_checkpoint({'params': net.state_dict(), 'network_g': net_opt, 'scale': 4}, str(tmp_path / 'teacher.pth'))
    label(str(dataset), 'psnr', str(tmp_path / 'teacher.pth'), teacher=True)
    return dict(block, dataroot_teacher=str(dataset / 'teacher.lmdb')), net


@pytest.mark.slow
@pytest.mark.parametrize('change', [
    {},
    dict(color='y'),
    dict(mean=[0.4, 0.5, 0.6], std=[0.5, 0.5, 0.25]),
    dict(classes=[1]),
    dict(phase='val'),
])
def test_what_the_teacher_made_is_cropped_and_turned_as_the_patch_is(taught, dataset, change):
    """A teacher that makes the GT."""
    shutil.copytree(dataset / 'gt.lmdb', dataset / 'teacher.lmdb', dirs_exist_ok=True)
    block = {**taught[0], 'gt_size': 16, **change}
    data = build_dataset(block)
    del block['dataroot_teacher']
    alone = build_dataset(block)
    for seed in range(30):
        random.seed(seed)
        item, drawn = data[seed % len(data)], random.random()
        random.seed(seed)
        expected = alone[seed % len(data)]
        assert drawn == random.random()  # a teacher changes nothing of what comes after
        assert torch.equal(item['lq'], expected['lq']) and torch.equal(item['gt'], expected['gt'])
        assert torch.equal(item['teacher'], item['gt'])


@pytest.mark.slow
def test_what_the_teacher_made_are_its_outputs_in_8_bits(taught):
    block, net = taught
    for item in build_dataset(dict(block, phase='val')):
        expected = net(item['lq'].unsqueeze(0))[0].clamp(0, 1)
        assert (item['teacher'] - expected).abs().max() <= 0.5001 / 255


@pytest.mark.slow
def test_outputs_of_other_patches_or_sizes_are_refused(taught, dataset, tmp_path):
    block, _ = taught
    for change, message in [(dict(dataroot_teacher=block['dataroot_lq']), 'contains images of other sizes than'),
                            (dict(dataroot_teacher=str(tmp_path / 'nowhere.lmdb')), 'is not an LMDB of images'),
                            (dict(io_backend=dict(type='disk')), 'requires io_backend: {type: lmdb}')]:
        with pytest.raises(OptionError, match=f'datasets.patches.dataroot_teacher: .*{message}'):
            build_dataset({**block, **change})
    meta = dataset / 'teacher.lmdb' / 'meta_info.txt'
    meta.write_text(''.join(meta.read_text().splitlines(True)[1:]))
    with pytest.raises(OptionError, match='was made from other patches than those of'):
        build_dataset(block)


@pytest.mark.slow
def test_a_teacher_is_replaced_only_when_asked_for_and_goes_with_psnr_alone(taught, dataset, tmp_path):
    block, _ = taught
    (dataset / 'labels_psnr.txt').unlink()
    model, before = str(tmp_path / 'teacher.pth'), (dataset / 'teacher.lmdb' / 'data.mdb').stat().st_ino
    with pytest.raises(OptionError, match='teacher.lmdb: already exists; overwrite=True replaces it'):
        label(str(dataset), 'psnr', model, teacher=True)
    assert (dataset / 'teacher.lmdb' / 'data.mdb').stat().st_ino == before
    label(str(dataset), 'psnr', model, teacher=True, overwrite=True)
    assert (dataset / 'teacher.lmdb' / 'data.mdb').stat().st_ino != before
    with pytest.raises(OptionError, match='teacher=True: requires by=psnr'):
        label(str(dataset), 'bicubic', teacher=True, overwrite=True)
    assert not [path.name for path in dataset.iterdir() if path.name.startswith('.')]
