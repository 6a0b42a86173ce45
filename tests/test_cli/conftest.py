import cv2
import pytest
import yaml
from pathlib import Path

from cdnsr_basicsr.data.label import label
from cdnsr_basicsr.data.prepare import prepare
from tests.helpers import photograph


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    """A folder with datasets/train (patches and labels) and datasets/val (whole images)."""
    root = tmp_path_factory.mktemp('work')
    (root / 'hr').mkdir()
    for i in range(3):
        cv2.imwrite(str(root / 'hr' / f'{i}.png'), photograph(96, 112, i))
    prepare(str(root / 'hr'), str(root / 'datasets/train'), 4, (1, ), 32, 32)
    label(str(root / 'datasets/train'), 'bicubic')
    prepare(str(root / 'hr'), str(root / 'datasets/val'), 4, whole=True)
    return root


@pytest.fixture
def work(prepared, tmp_path, monkeypatch):
    """An empty working folder that has the datasets."""
    (tmp_path / 'datasets').symlink_to(prepared / 'datasets')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train_opt(tiny_net):
    """A short training of a small CDNSR, as the content of an option file."""
    data = dict(type='LabeledPatchDataset', dataroot_gt='datasets/train/gt.lmdb', dataroot_lq='datasets/train/lq.lmdb')
    data.update(name='train', io_backend=dict(type='lmdb'), gt_size=32, use_hflip=True, use_rot=True)
    data.update(num_worker_per_gpu=0, batch_size_per_gpu=4, dataset_enlarge_ratio=10)
    val = dict(name='val', type='PairedImageDataset', dataroot_gt='datasets/val/gt', dataroot_lq='datasets/val/lq')
    val.update(io_backend=dict(type='disk'))
    train = dict(ema_decay=0.9, total_iter=4, optim_g=dict(type='Adam', lr=0.001))
    train.update(scheduler=dict(type='CosineAnnealingRestartLR', periods=[4], restart_weights=[1], eta_min=1e-7))
    train.update(pixel_opt=dict(type='L1Loss'), class_opt=dict(type='ClassLoss'), average_opt=dict(type='AverageLoss'))
    return dict(
        name='tiny',
        model_type='CDNSRModel',
        scale=4,
        num_gpu='auto',
        manual_seed=0,
        datasets=dict(train=data, val=val),
        network_g=tiny_net(),
        tile=dict(patch_size=16, step=12),
        path=dict(pretrain_network_g=None, strict_load_g=True, resume_state=None),
        train=train,
        val=dict(val_freq=2, save_img=False, metrics=dict(psnr=dict(type='calculate_psnr', crop_border=4))),
        logger=dict(print_freq=1, save_checkpoint_freq=2, use_tb_logger=True))


@pytest.fixture
def write(work):
    """Writes an option file and returns its name."""

    def write_(opt, name='opt.yml'):
        Path(work, name).write_text(opt if isinstance(opt, str) else yaml.safe_dump(opt, sort_keys=False))
        return name

    return write_
