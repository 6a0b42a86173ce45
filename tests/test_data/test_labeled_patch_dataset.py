import pytest
import torch
from collections import Counter

from basicsr.archs import build_network
from basicsr.data import build_dataset
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.data.label import label
from cdnsr_basicsr.data.labels import Label, read_labels, write_labels
from cdnsr_basicsr.options import OptionError
from tests.test_data.test_label import dataset as dataset  # noqa: F401


@pytest.fixture
def block(dataset):  # noqa: F811
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
    from tests.test_data.test_label import read_lmdb
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
    }, r'has no patch of classes \[7\]; it holds \[0, 1, 2\]'),
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
    }, 'gt_size: 30 is no multiple of the scale, 4'),
    ({
        'gt_size': None
    }, 'gt_size: expected an integer from 4 to 32, but got None'),
    ({
        'scale': 2
    }, r'dataroot_lq: its patches are not those of .*, 2 times as small'),
])
def test_mistakes_are_named(block, change, message):
    with pytest.raises(OptionError, match=message):
        build_dataset({**block, **change})


def test_labels_of_other_data_are_refused(block):
    write_labels(block['label_file'], {'other': Label(0, 1.)})
    with pytest.raises(OptionError, match='has no label for .* patches, such as .*; it was made for other data'):
        build_dataset(block)


def test_errors_come_with_whole_patches_only(block, dataset, tmp_path, tiny_net):  # noqa: F811
    net = build_network(tiny_net())
    save_checkpoint({'params': net.state_dict(), 'network_g': tiny_net(), 'scale': 4}, str(tmp_path / 'net.pth'))
    path, _ = label(str(dataset), 'branches', str(tmp_path / 'net.pth'))
    labels = read_labels(path)
    for item in build_dataset({**block, 'label_file': str(path)}):
        assert item['errors'].tolist() == pytest.approx(labels[item['gt_path']].errors, rel=1e-6)
    # what is cut out of a patch has other errors
    assert 'errors' not in build_dataset({**block, 'label_file': str(path), 'gt_size': 16})[0]
    assert 'errors' not in build_dataset(block)[0]
