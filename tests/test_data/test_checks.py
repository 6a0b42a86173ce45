"""Mistakes in data are told before the first iteration, by the names of the files, for every dataset class."""
import copy
import cv2
import numpy as np
import os
import pytest
import shutil
import torch
from pathlib import Path
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cdnsr_basicsr import cli
from cdnsr_basicsr.data.checks import Named, Unreadable, check_data
from cdnsr_basicsr.data.labels import Label, write_labels
from cdnsr_basicsr.data.pictures import NotAPicture, check_decodes, keys_of_lmdb, picture_size
from cdnsr_basicsr.data.prepare import prepare
from cdnsr_basicsr.options import OptionError
from tests.helpers import photograph

FSRCNN = dict(type='FSRCNN', num_feat=4, num_shrink=3, num_map=1, upscale=4)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A working folder with four pairs of pictures, gt/0.png of 64x48 pixels and lq/0.png of a quarter to 3.png."""
    monkeypatch.chdir(tmp_path)
    for part, size in (('gt', (48, 64)), ('lq', (12, 16))):
        Path(part).mkdir()
        for i in range(4):
            cv2.imwrite(f'{part}/{i}.png', cv2.resize(photograph(48, 64, i), size[::-1]))
    return tmp_path


@pytest.fixture
def opt(data):
    block = dict(dataroot_gt='gt', dataroot_lq='lq', io_backend=dict(type='disk'), type='PairedImageDataset')
    train = dict(block, name='train', gt_size=32, use_hflip=True, use_rot=True)
    return dict(
        model_type='SRModel',
        scale=4,
        network_g=dict(FSRCNN),
        datasets=dict(train=train, val=dict(block, name='val')),
        val=dict(metrics=dict(psnr=dict(type='calculate_psnr', crop_border=4))))


def refused(opt, message):
    with pytest.raises(OptionError) as caught:
        check_data(opt)
    assert message in str(caught.value), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_right_data_passes_and_leaves_no_trace(opt):
    import logging

    from basicsr.utils.logger import initialized_logger
    before = copy.deepcopy(opt), dict(initialized_logger), list(logging.getLogger('basicsr').handlers)
    state = torch.get_rng_state()
    check_data(opt)
    assert before == (opt, initialized_logger, logging.getLogger('basicsr').handlers)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('phase', ['train', 'val'])
@pytest.mark.parametrize('ending', ['.png', '.jpg', '.bmp', '.webp', '.tif'])
def test_pictures_that_are_cut_off(opt, phase, ending):
    shutil.copytree('gt', 'other')
    for folder in ('other', 'lq'):
        cv2.imwrite(f'{folder}/4{ending}', cv2.imread(f'{folder}/1.png'))
    opt['datasets'][phase]['dataroot_gt'] = 'other'
    opt['datasets'].pop('val' if phase == 'train' else 'train')
    check_data(opt)
    path = Path('other/4' + ending)
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])
    refused(opt, f'datasets.{phase}.dataroot_gt: other/4{ending} ')


def test_files_that_are_no_pictures(opt):
    Path('gt/.DS_Store').write_text('hidden: BasicSR passes over it')
    for part in ('gt', 'lq'):
        Path(part, 'Thumbs.db').write_text('no picture')
    refused(opt, 'datasets.train.dataroot_gt: gt/Thumbs.db is no picture that can be read')
    Path('gt/Thumbs.db').unlink()
    refused(opt, 'datasets.train.dataroot_gt: has no picture for lq/Thumbs.db')
    Path('lq/Thumbs.db').unlink()
    Path('lq/2.png').write_bytes(b'')
    refused(opt, 'datasets.train.dataroot_lq: lq/2.png is no picture')


def test_pairs_that_do_not_match(opt):
    os.rename('lq/3.png', 'lq/4.png')
    refused(opt, 'datasets.train.dataroot_lq: lq/3.png is missing, of gt/3.png')
    opt['datasets']['train']['filename_tmpl'] = '{}x4'
    refused(opt, 'datasets.train.dataroot_lq: lq/0x4.png is missing, of gt/0.png')


@pytest.mark.parametrize('change,message', [
    (dict(gt_size=60), 'datasets.train.gt_size: is 60, but gt/0.png is only 64x48 pixels large'),
    (dict(gt_size=30), 'datasets.train.gt_size: 30 is no multiple of the scale, 4'),
    (dict(dataroot_lq='gt'), 'datasets.train.dataroot_gt: gt/0.png is 64x48, but its LQ 64x48: not scale: 4 times'),
    (dict(meta_info_file='names.txt'), 'datasets.train.dataroot_gt: gt/gone.png is missing, of names.txt'),
    (dict(meta_info_file='bom.txt'), 'datasets.train.meta_info_file: bom.txt begins with a byte order mark'),
    (dict(io_backend=dict(type='lmdb')), 'datasets.train.dataroot_gt: gt does not end in .lmdb'),
    (dict(mean=[0.5] * 2, std=[0.5] * 2), 'datasets.train: PairedImageDataset cannot read it: '),
    (dict(color='y'), 'datasets.train: has pictures of 1 channels, but network_g takes 3; leave out color: y'),
    (dict(dataset_enlarge_ratio=10**9), 'datasets.train.dataset_enlarge_ratio: makes 4000000000 items of 4'),
])
def test_options_that_do_not_fit_the_pictures(opt, change, message):
    Path('names.txt').write_text('0.png (48,64,3)\ngone.png (48,64,3)\n')
    Path('bom.txt').write_text('0.png (48,64,3)\n', encoding='utf-8-sig')
    opt['network_g']['num_in_ch'] = 3
    opt['datasets']['train'].update(change)
    refused(opt, message)


def test_validation_sets_are_looked_at_too(opt):
    for i in range(4):  # BasicSR crops what remains of GT
        cv2.imwrite(f'gt/{i}.png', cv2.copyMakeBorder(cv2.imread(f'gt/{i}.png'), 0, 3, 0, 2, cv2.BORDER_REFLECT))
    refused(opt, 'datasets.train.dataroot_gt: gt/0.png is 66x51, but its LQ 16x12')
    del opt['datasets']['train']
    check_data(opt)
    opt['val']['metrics']['psnr']['crop_border'] = 26
    refused(opt, 'val.metrics.psnr.crop_border: 26 leaves too little of gt/0.png, 66x51')
    opt['val']['metrics']['psnr']['crop_border'] = 4
    opt['scale'] = 5
    refused(opt, 'datasets.val.dataroot_gt: gt/0.png is 66x51, but its LQ 16x12: not scale: 5 times as large')


def test_channels_that_do_not_fit_the_network(opt):
    opt['network_g'].update(num_in_ch=1, num_out_ch=1)
    refused(opt, 'datasets.train: has pictures of 3 channels, but network_g takes 1; color: y makes them gray')
    for block in opt['datasets'].values():
        block['color'] = 'y'
    check_data(opt)
    opt['network_g']['num_out_ch'] = 3
    refused(opt, 'network_g: makes (3, 32, 32) (channels, height, width) of ')


def test_a_network_of_another_scale(opt):
    opt['network_g']['upscale'] = 2
    refused(opt, 'network_g: makes (3, 16, 16) (channels, height, width) of ')


@pytest.fixture
def databases(data):
    prepare('gt', 'patches', 4, (1, ), 32, 16)
    return Path('patches')


@pytest.fixture
def lmdb_opt(databases, opt):
    del opt['datasets']['val']
    opt['datasets']['train'].update(
        dataroot_gt='patches/gt.lmdb', dataroot_lq='patches/lq.lmdb', io_backend=dict(type='lmdb'))
    return opt


@pytest.mark.slow
def test_lmdbs_that_are_cut_off_or_damaged(lmdb_opt):
    check_data(lmdb_opt)
    whole = Path('patches/lq.lmdb/data.mdb').read_bytes()
    for part in (whole[:len(whole) // 2], whole[:5000], b'', b'\xff' * len(whole)):
        Path('patches/lq.lmdb/data.mdb').write_bytes(part)
        refused(lmdb_opt, 'datasets.train.dataroot_lq: patches/lq.lmdb is cut off or damaged')
    Path('patches/lq.lmdb/data.mdb').unlink()
    refused(lmdb_opt, 'datasets.train.dataroot_lq: patches/lq.lmdb is no LMDB of pictures: it has no data.mdb')


@pytest.mark.slow
def test_what_a_teacher_made_is_walked_through_too(lmdb_opt):
    shutil.copytree('patches/gt.lmdb', 'patches/teacher.lmdb')
    lmdb_opt['datasets']['train'].update(type='LabeledPatchDataset', dataroot_teacher='patches/teacher.lmdb')
    check_data(lmdb_opt)
    path = Path('patches/teacher.lmdb/data.mdb')
    path.write_bytes(path.read_bytes()[:5000])
    refused(lmdb_opt, 'datasets.train.dataroot_teacher: patches/teacher.lmdb is cut off or damaged')


def test_label_survives_a_damaged_lmdb(databases, capsys):
    path = databases / 'gt.lmdb' / 'data.mdb'
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert cli.main(['label', '-d', 'patches', '--by', 'bicubic']) == 2
    assert 'patches/gt.lmdb is cut off or damaged' in capsys.readouterr().err


def test_labels_of_other_classes(lmdb_opt):
    keys = keys_of_lmdb('patches/gt.lmdb', 'datasets.train')
    write_labels('labels.txt', {key: Label(2 * (i == 0), 0.5) for i, key in enumerate(keys)})
    lmdb_opt['datasets']['train'].update(type='LabeledPatchDataset', label_file='labels.txt')
    lmdb_opt.update(
        network_g=dict(
            type='CDNSR', branches=[FSRCNN, FSRCNN], classifier=dict(type='PatchClassifier', num_feat=4), upscale=4),
        train=dict(label_opt=dict(type='LabelLoss')))
    refused(lmdb_opt, 'datasets.train.label_file: holds labels such as 2; accepted: 0 to 1, one class per branch')
    lmdb_opt['datasets']['train']['classes'] = [0, 1]
    check_data(lmdb_opt)  # the others are left out
    del lmdb_opt['datasets']['train']['classes'], lmdb_opt['train']
    check_data(lmdb_opt)  # nothing asks for labels


def test_keys_that_are_not_there(lmdb_opt):
    for part in ('gt', 'lq'):
        with open(f'patches/{part}.lmdb/meta_info.txt', 'a') as file:
            file.write('gone.png (32,32,3) 1\n')
    refused(lmdb_opt, 'datasets.train.dataroot_gt: patches/gt.lmdb: gone is not there, though meta_info.txt names it')


@pytest.mark.slow
def test_meta_info_as_editors_write_it(lmdb_opt):
    path = Path('patches/gt.lmdb/meta_info.txt')
    text = path.read_text()
    path.write_bytes(text.replace('\n', '\r\n').encode())
    check_data(lmdb_opt)  # BasicSR reads that
    path.write_text(text, encoding='utf-8-sig')
    refused(lmdb_opt, 'patches/gt.lmdb/meta_info.txt begins with a byte order mark')
    path.write_text(text + '\n')
    refused(lmdb_opt, f"meta_info.txt, line {len(text.splitlines()) + 1}: names no picture")
    path.write_text(''.join(text.splitlines(True)[1:]))
    refused(lmdb_opt, 'datasets.train: patches/gt.lmdb has no ')


def test_backends_that_are_not_what_they_say(lmdb_opt):
    lmdb_opt['datasets']['train']['io_backend'] = dict(type='disk')
    refused(lmdb_opt, 'datasets.train.io_backend.type: is disk, but patches/gt.lmdb is an LMDB')


def test_single_images(opt):
    opt['datasets'] = dict(
        test=dict(name='a', type='SingleImageDataset', dataroot_lq='lq', io_backend=dict(type='disk')))
    check_data(opt)
    Path('lq/Thumbs.db').write_text('no picture')
    refused(opt, 'datasets.test.dataroot_lq: lq/Thumbs.db is no picture')


def test_pictures_of_faces_are_as_large_as_the_network_makes_them(opt):
    opt.update(model_type='StyleGAN2Model', network_g=dict(type='StyleGAN2Generator', out_size=32, narrow=0.1))
    prepare('gt', 'faces', 4, (1, ), 32, 16)
    block = dict(name='faces', type='FFHQDataset', dataroot_gt='faces/gt.lmdb', io_backend=dict(type='lmdb'))
    opt['datasets'] = dict(train=dict(block, use_hflip=True, mean=[0.5] * 3, std=[0.5] * 3))
    check_data(opt)
    opt['network_g']['out_size'] = 64
    refused(opt, '32x32, but network_g.out_size is 64')


def test_pictures_to_be_degraded(opt):
    Path('names.txt').write_text('0.png\n1.png\n')
    degraded = dict(name='df2k', type='RealESRGANDataset', dataroot_gt='gt', meta_info='names.txt', use_hflip=True)
    degraded.update(io_backend=dict(type='disk'), use_rot=False, gt_size=256, final_sinc_prob=0.8)
    for number in ('', '2'):
        degraded.update({f'blur_kernel_size{number}': 21, f'kernel_list{number}': ['iso'], f'sinc_prob{number}': 0.1})
        degraded.update({f'kernel_prob{number}': [1], f'blur_sigma{number}': [0.2, 3]})
        degraded.update({f'betag_range{number}': [0.5, 4], f'betap_range{number}': [1, 2]})
    opt.update(model_type='RealESRNetModel', datasets=dict(train=degraded))
    check_data(opt)
    Path('gt/1.png').write_bytes(Path('gt/1.png').read_bytes()[:200])
    refused(opt, 'datasets.train.dataroot_gt: gt/1.png is cut off')


def test_clips(opt):
    for part in ('gt', 'lq'):
        os.makedirs(f'clips/{part}/000')
        for i in range(3):
            shutil.copy(f'{part}/{i}.png', f'clips/{part}/000/{i:08d}.png')
    block = dict(name='Vid4', type='VideoTestDataset', dataroot_gt='clips/gt', dataroot_lq='clips/lq', cache_data=True)
    block.update(io_backend=dict(type='disk'), num_frame=3, padding='reflection')
    opt.update(model_type='EDVRModel', datasets=dict(val=block))
    opt['network_g'] = dict(type='EDVR', num_feat=8, num_frame=3, num_extract_block=1, num_reconstruct_block=1)
    check_data(opt)
    Path('clips/lq/000/00000001.png').write_bytes(b'x')
    refused(opt, 'datasets.val.dataroot_lq: clips/lq/000/00000001.png is no picture')
    shutil.copy('gt/1.png', 'clips/lq/000/00000001.png')
    refused(opt, 'datasets.val.dataroot_gt: clips/gt/000/00000001.png is 64x48, but its LQ 64x48: not scale: 4 times')


def test_datasets_of_others_are_judged_by_what_is_known_of_them(opt, monkeypatch):
    from basicsr.utils.registry import DATASET_REGISTRY
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'Broken', Broken)
    opt['datasets'] = dict(train=dict(name='a', type='Broken', dataroot_gt='lq', dataroot_lq='gt'))
    check_data(opt)  # who knows how large its LQ are
    Path('gt/1.png').write_bytes(Path('gt/1.png').read_bytes()[:200])
    refused(opt, 'datasets.train.dataroot_lq: gt/1.png is cut off')


def png(**kwargs):
    import io
    buffer = io.BytesIO()
    Image.fromarray(photograph(20, 30, 0)).save(buffer, 'png', **kwargs)
    return buffer.getvalue()


def test_sizes_of_headers():
    for ending, options in (('png', []), ('jpg', []), ('bmp', []), ('webp', []), ('tif', [])):
        data = cv2.imencode(f'.{ending}', photograph(20, 30, 0), options)[1].tobytes()
        assert picture_size(data, data, lambda: data) == (20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    import io
    buffer = io.BytesIO()
    Image.fromarray(photograph(20, 30, 0)).save(buffer, 'jpeg', exif=exif)
    data = buffer.getvalue()
    assert picture_size(data, data, lambda: data) == cv2.imdecode(np.frombuffer(data, np.uint8),
                                                                  1).shape[:2] == (30, 20)


def test_frames_and_damage_are_refused():
    animated = png(save_all=True, append_images=[Image.fromarray(photograph(20, 30, 1))])
    with pytest.raises(NotAPicture, match='animated'):
        picture_size(animated, animated, lambda: animated)
    data = bytearray(png())
    check_decodes(bytes(data))
    data[len(data) // 2] ^= 255
    assert picture_size(bytes(data), bytes(data), lambda: bytes(data)) == (20, 30)
    with pytest.raises(NotAPicture):
        check_decodes(bytes(data))


class Broken(Dataset):
    """As BasicSR's: an error that names nothing, from the second item on."""

    def __init__(self):
        self.opt = dict(name='broken')
        self.paths = [dict(gt_path='a.png', lq_path='b.png')] * 2

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return index if index == 0 else None + index


@pytest.mark.slow
@pytest.mark.parametrize('workers,context', [(0, None), (1, 'fork'), (1, 'spawn')])
def test_what_fails_while_training_is_named_in_one_line(workers, context):
    loader = DataLoader(Named(Broken()), num_workers=workers, multiprocessing_context=context)
    items = iter(loader)
    assert next(items).item() == 0
    with pytest.raises(Unreadable) as caught:
        next(items)
    assert str(caught.value).startswith('datasets.broken: b.png (lq) cannot be read: TypeError: ') or str(
        caught.value).startswith('datasets.broken: a.png (gt) cannot be read: TypeError: ')
    assert len(str(caught.value).splitlines()) == 1


def test_other_processes_leave_it_to_the_first(opt, monkeypatch):
    Path('lq/2.png').write_bytes(b'')
    monkeypatch.setenv('RANK', '1')
    check_data(opt)


def test_keys_need_their_files(data):
    with pytest.raises(OptionError, match='here: lq is no LMDB of pictures: it has no data.mdb'):
        keys_of_lmdb('lq', 'here')
