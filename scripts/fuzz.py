"""Damages images, option files and checkpoints by a seed, runs them through the commands, and counts how they end.

    python scripts/fuzz.py --images 2000 --options 1000 --checkpoints 300 --seed 0 --jobs 2

Every run is a process of its own, forked from one that has imported everything, with a limit of time and of memory.
Images go through a command in folders of --batch; where a folder's run dies, it is halved until the image is found.
Printed is a table in Markdown:

right           exit code 0 and the result is there; of damage that checksums cover, the same result as without it
one line        the command says in one line what is wrong, or names the image as left out
unclear line    one line, but only that of an error in BasicSR, or about an input that is right
silent          exit code 0 for an input that is wrong by construction, or an image that is neither done nor named

Exit code 1 if there is any traceback, crash, hang or silent one. Their inputs are kept in --keep, and any case is made
again, and run with its output shown, by --only, for example --only option:123 or --only image:5.
"""
import argparse
import collections
import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple, Optional

os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')  # no threads before processes are forked
warnings.simplefilter('ignore')
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import tifffile  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from PIL import Image, features  # noqa: E402

from cdnsr_basicsr import cli, load_plugins  # noqa: E402

load_plugins()
from basicsr import test, train  # noqa: E402,F401
from basicsr.archs import build_network  # noqa: E402
from cdnsr_basicsr import calibration, export  # noqa: E402,F401
from cdnsr_basicsr.checkpoint import save_checkpoint  # noqa: E402
from cdnsr_basicsr.conversion import convert  # noqa: E402,F401
from cdnsr_basicsr.data import label, prepare  # noqa: E402,F401
from cdnsr_basicsr.inference import runtime, upscale  # noqa: E402,F401

ENDS = ('right', 'one line', 'unclear line', 'traceback', 'crash', 'hang', 'silent')
BAD = ENDS[3:]
SECONDS = dict(image=20, option=60, checkpoint=60)  # of one case
IMAGE_COMMANDS = ('upscale', 'prepare', 'calibrate')
CHECKPOINT_COMMANDS = ('upscale', 'convert', 'train', 'label', 'export', 'calibrate')


class Ended(NamedTuple):
    """How a run has ended: by itself with an exit code, by a signal, or by the limit of time (`hang`)."""
    how: str
    code: int
    output: str


def run(argv: list, folder: Path, seconds: float, memory: int) -> Ended:
    """Runs a command in a process of its own, in a folder."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            os.chdir(folder)
            pages = int(Path('/proc/self/statm').read_text().split()[5])
            # not RLIMIT_AS: LMDBs are mapped as a terabyte
            resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + memory, ) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            output = os.open('output.txt', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            for number, fd in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
                os.dup2(fd, number)
            faulthandler.enable()
            code = cli.main([str(argument) for argument in argv])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 255)
    ended, status, end = 0, 0, time.monotonic() + seconds
    try:
        while not ended and time.monotonic() < end:
            ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0 if ended else 0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # also what it has started
        if not ended:
            os.waitpid(pid, 0)
    path = folder / 'output.txt'
    output = path.read_text(errors='replace') if path.exists() else ''
    if not ended:
        return Ended('hang', -1, output)
    code = os.waitstatus_to_exitcode(status)
    return Ended('crash' if code < 0 else 'exit', code, output)


def said(ended: Ended) -> str:
    """What kind of end that of a run is, as far as its exit code and its output tell."""
    if ended.how != 'exit':
        return ended.how
    if 'Traceback (most recent call last)' in ended.output or ended.code not in (0, 1, 2):
        return 'traceback'
    if ended.code == 0:
        return 'right'
    errors = re.findall(r'^(?:basicsr[a-z ]*: error: |Failed: |Left out).*$', ended.output, re.M)
    if not errors:
        return 'traceback'  # no line at all is no better
    last = ended.output.rstrip().splitlines()[-1]
    more = ended.code == 2 and last != errors[-1]  # an error of several lines
    return 'unclear line' if more or 'BasicSR cannot set this up' in errors[-1] else 'one line'


# what is damaged


def pattern(height: int, width: int, shift: int = 0) -> np.ndarray:
    """An image by rule, uint8 RGB."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin((x * a + y * b + shift) / 5) for a, b in ((1, .3), (.2, 1), (.7, -.6))]
    return np.stack(waves, 2).astype(np.uint8)


def images() -> dict:
    """Right images in all formats and depths that are read: name -> content."""
    rgb = Image.fromarray(pattern(40, 48))
    rgba, frames = rgb.convert('RGBA'), [Image.fromarray(pattern(40, 48, shift)) for shift in (9, 30)]
    rgba.putalpha(rgb.convert('L'))
    made = {}

    def put(name: str, image: Image.Image, **kwargs) -> None:
        file = io.BytesIO()
        image.save(file, format=kwargs.pop('format', None) or name.rsplit('.', 1)[1].replace('tif', 'tiff'), **kwargs)
        made[name] = file.getvalue()

    exif = Image.Exif()
    exif[274] = 6
    several = dict(save_all=True, append_images=frames)
    for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'):
        image = rgb.convert('I').point(lambda value: value * 200).convert('I;16') if mode == 'I;16' else rgba.convert(
            mode)
        put(f'{mode.replace(";", "")}.png', image)
    put('profile.png', rgb, icc_profile=b'\0' * 200, exif=exif)
    put('animated.png', rgb, **several)
    for mode in ('L', 'RGB', 'CMYK'):
        put(f'{mode}.jpeg', rgb.convert(mode), exif=exif)
    put('progressive.jpeg', rgb, progressive=True)
    put('lossless.webp', rgba, lossless=True)
    put('lossy.webp', rgb, exif=exif)
    put('animated.webp', rgb, **several)
    for mode in ('1', 'L', 'P', 'RGB'):
        put(f'{mode}.bmp', rgb.convert(mode))
    put('plain.gif', rgb)
    for name, key in (('avif', 'avif'), ('jp2', 'jpg_2000')):
        if features.check(key):
            put(f'plain.{name}', rgb, format={'jp2': 'JPEG2000'}.get(name))
    for compression in (None, 'tiff_lzw', 'tiff_deflate', 'packbits', 'jpeg', 'group4'):
        put(f'{compression}.tif', rgb.convert('1') if compression == 'group4' else rgb, compression=compression)
    put('pages.tif', rgb, **several)
    for name, pixels in (('8', pattern(40, 48)), ('16', pattern(40, 48).astype(np.uint16) * 257),
                         ('32', pattern(40, 48).astype(np.float32) / 255)):
        for planar in ('contig', 'separate'):
            file = io.BytesIO()
            data = pixels if planar == 'contig' else pixels.transpose(2, 0, 1)
            tifffile.imwrite(file, data, photometric='rgb', planarconfig=planar)
            made[f'{name}{planar}.tif'] = file.getvalue()
    ok, data = cv2.imencode('.png', pattern(40, 48).astype(np.uint16) * 257)
    assert ok
    made['rgb16.png'] = data.tobytes()
    return made


EXTREME = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to three damages."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = chance.randrange(min(len(data), chance.choice((64, 400, len(data)))) or 1)
        length = chance.choice((1, 4, 16, len(data) // 4))
        kind = chance.choice(('bit', 'bit', 'byte', 'number', 'number', 'cut', 'drop', 'twice', 'zeros', 'noise'))
        if kind == 'bit' and data:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 'byte' and data:
            data[place] = chance.randrange(256)
        elif kind == 'number':
            form = chance.choice(('>I', '<I', '>H', '<H'))
            packed = struct.pack(form, chance.choice(EXTREME) % 2**(16 if form[1] == 'H' else 32))
            data[place:place + len(packed)] = packed
        elif kind == 'cut':
            del data[chance.randrange(len(data) + 1):]
        elif kind == 'drop':
            del data[place:place + length]
        elif kind == 'twice':
            data[place:place] = data[place:place + length]
        elif kind == 'zeros':
            data[place:place + length] = bytes(len(data[place:place + length]))
        elif kind == 'noise':
            data[place:place + length] = chance.randbytes(len(data[place:place + length]))
    return bytes(data)


def with_right_checksums(data: bytes) -> bytes:
    """A damaged PNG whose chunks have the right checksums again, so that what is damaged reaches a decoder."""
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        length = min(struct.unpack('>I', data[place:place + 4])[0], len(data) - place - 12)
        body = data[place + 4:place + 8 + length]
        parts += [struct.pack('>I', length), body, struct.pack('>I', zlib.crc32(body))]
        place += 12 + length
    return b''.join(parts)


def image(seeds: dict, number: int, seed: int) -> tuple:
    """Name and content of an image: one of ten is left as it is, some have the ending of another format."""
    chance = random.Random(f'{seed}:picture:{number}')
    name = chance.choice(sorted(seeds))
    data, suffix = seeds[name], Path(name).suffix
    if chance.random() > 0.1:
        data = damaged(data, chance)
        if suffix == '.png' and chance.random() < 0.5:
            data = with_right_checksums(data)
        if chance.random() < 0.05:
            suffix = chance.choice(('.png', '.jpeg', '.tif', '.webp'))
    return f'p{number:06d}{suffix}', data


def option_bases(data: Path) -> list:
    """Right option files: a short training of each model, and a test."""
    fsrcnn = dict(type='FSRCNN', num_in_ch=3, num_out_ch=3, num_feat=4, num_shrink=3, num_map=1, upscale=4)
    pairs = dict(dataroot_gt=str(data / 'gt'), dataroot_lq=str(data / 'lq'), io_backend=dict(type='disk'))
    val = dict(name='val', type='PairedImageDataset', **pairs)
    metrics = dict(psnr=dict(type='calculate_psnr', crop_border=4, test_y_channel=False))
    training = dict(name='train', type='LabeledPatchDataset', **pairs, gt_size=64, use_hflip=True, use_rot=True)
    training.update(num_worker_per_gpu=0, batch_size_per_gpu=2, dataset_enlarge_ratio=1)
    schedule = dict(type='CosineAnnealingRestartLR', periods=[2], restart_weights=[1], eta_min=1e-7)
    steps = dict(ema_decay=0.9, optim_g=dict(type='Adam', lr=1e-4, weight_decay=0, betas=[0.9, 0.99]))
    steps.update(scheduler=schedule, total_iter=2, warmup_iter=-1)
    steps.update(pixel_opt=dict(type='L1Loss', loss_weight=1.0, reduction='mean'))
    opt = dict(name='a', model_type='FastSRModel', scale=4, num_gpu=0, manual_seed=0)
    opt.update(datasets=dict(train=training, val=val), network_g=fsrcnn)
    opt.update(
        path=dict(pretrain_network_g=str(data / 'plain.pth'), strict_load_g=True, resume_state=None), train=steps)
    opt.update(val=dict(val_freq=2, save_img=False, metrics=metrics))
    opt.update(logger=dict(print_freq=1, save_checkpoint_freq=2, use_tb_logger=False))
    stock, routed = copy.deepcopy(opt), copy.deepcopy(opt)
    stock.update(model_type='SRModel')
    stock['datasets']['train'].update(type='PairedImageDataset')
    classifier = dict(type='PatchClassifier', num_feat=8)
    routed.update(model_type='CDNSRModel', tile=dict(patch_size=16, step=12))
    routed.update(network_g=dict(type='CDNSR', upscale=4, branches=[fsrcnn, dict(fsrcnn)], classifier=classifier))
    routed['path'].update(pretrain_network_g=str(data / 'routed.pth'))
    routed['train'].update(average_opt=dict(type='AverageLoss', loss_weight=0.1))
    tested = {key: copy.deepcopy(opt[key]) for key in ('name', 'model_type', 'scale', 'num_gpu', 'network_g', 'path')}
    tested.update(datasets=dict(test_1=dict(val)), val=dict(save_img=False, suffix=None, metrics=metrics))
    return [('train', opt), ('train', stock), ('train', routed), ('test', tested)]


def places(block, way: tuple = ()) -> list:
    """All places in an option file, as keys."""
    items = block.items() if isinstance(block, dict) else enumerate(block) if isinstance(block, list) else ()
    return [place for key, value in items for place in [(*way, key), *places(value, (*way, key))]]


def at(block, way: tuple):
    for key in way:
        block = block[key]
    return block


LARGE = {'lr', 'batch_size_per_gpu', 'num_worker_per_gpu', 'gt_size', 'total_iter', 'ema_decay', 'upscale', 'scale'}
LARGE |= {'num_feat', 'num_map', 'num_shrink', 'dataset_enlarge_ratio', 'patch_size', 'num_in_ch'}
NEGATIVE = LARGE | {'val_freq', 'print_freq', 'save_checkpoint_freq', 'manual_seed', 'crop_border'}
ZERO = {
    'batch_size_per_gpu', 'gt_size', 'val_freq', 'print_freq', 'save_checkpoint_freq', 'scale', 'upscale', 'num_feat'
}
TEXTS = [  # YAML that is refused as such, or is none
    'a0: &a0 [x, x]\n' + ''.join(f'a{i + 1}: &a{i + 1} [{9 * f"*a{i}, "}]\n' for i in range(20)),
    100000 * '[', 'a: !!python/object/apply:os.system ["touch owned"]\n', 'name: a\nname: b\n', 'a: ' + 5000 * '9',
    'a: \0\n', '- a\n', '', '? [a]\n: b\n', 'a: {b: *c}\n', '&a [*a]\n', '%YAML 9.9\n---\na: 1\n', '\ud83d'
]  # yapf: disable


def option(bases: list, number: int, seed: int) -> tuple:
    """Command, text, what was done, and the key that is wrong by construction; None where it might be right, '' where
    the file is right."""
    chance = random.Random(f'{seed}:option:{number}')
    command, opt = copy.deepcopy(chance.choice(bases))
    ways = places(opt)
    blocks = [(), *(way for way in ways if isinstance(at(opt, way), dict))]
    leaves = [way for way in ways if at(opt, way) is not None and not isinstance(at(opt, way), dict)]
    numbers = [way for way in leaves if type(at(opt, way)) in (int, float)]
    kind = chance.choice(('unknown', 'typo', 'type', 'type', 'infinite', 'range', 'range', 'remove', 'swap', 'folder',
                          'bytes', 'text', 'right'))
    wrong, done = None, kind
    if kind == 'unknown':
        way, wrong = chance.choice([way for way in blocks if way != ('val', 'metrics')]), chance.choice(
            ('nonsense', 'weight', 'pretrained', 'use_amp'))
        at(opt, way)[wrong] = chance.choice((1, 'x', True, None))
        done = f'unknown key {way}: {wrong}'
    elif kind == 'typo':
        way = chance.choice([way for way in ways if isinstance(way[-1], str) and way[:-1] != ('val', 'metrics')])
        block, position = at(opt, way[:-1]), chance.randrange(len(way[-1]))
        wrong = way[-1][:position] + way[-1][position + 1:] or 'x'
        block[wrong] = block.pop(way[-1])
        done = f'typo {way}: {wrong}'
    elif kind == 'type':
        way = chance.choice([way for way in ways if at(opt, way) is not None])
        value, wrong = at(opt, way), str(way[-1])
        others = {bool: ('yes please', 2.5, [True]), str: (3.5, ['a'], True), list: (5, 'x'), dict: (5, 'x', [1])}
        at(opt, way[:-1])[way[-1]] = new = chance.choice((*others.get(type(value), ('abc', [1])), {'a': 1}))
        if type(value) is dict and isinstance(new, dict):
            wrong = 'a'
        done = f'type {way}: {new!r}'
    elif kind in ('infinite', 'range'):
        way = chance.choice(numbers)
        new = chance.choice((math.nan, math.inf, -math.inf) if kind == 'infinite' else (0, -1, -10**9, 10**12, 1e30))
        at(opt, way[:-1])[way[-1]] = new
        name = way[-1] if isinstance(way[-1], str) else way[-2]
        if kind == 'infinite' or name in (LARGE if new > 0 else NEGATIVE if new < -1 else ZERO if new == 0 else ()):
            wrong = name
        done = f'{kind} {way}: {new}'
    elif kind == 'remove':
        way = chance.choice(ways)
        del at(opt, way[:-1])[way[-1]]
        done = f'removed {way}'
    elif kind == 'swap':
        way, other = chance.choice(leaves), chance.choice([way for way in leaves if way[-1] != 'total_iter'])
        if way[-1] != 'total_iter':
            at(opt, way[:-1])[way[-1]] = copy.deepcopy(at(opt, other))
        done = f'{way} is that of {other}'
    elif kind == 'folder':
        way = chance.choice([way for way in leaves if way[-1] == 'name'])
        at(opt, way[:-1])['name'] = chance.choice(
            ('../../va', '/tmp/fuzz_absolute', 'a/b', '..', '', 'x' * 300, 'a\0b'))
        # that of a training set goes into no path
        wrong, done = None if way[1:2] == ('train', ) else 'name', f'{way}: {at(opt, way)!r}'
    elif kind == 'right':
        opt = dict(chance.sample(sorted(opt.items()), len(opt)))
        wrong = ''
    text = yaml.safe_dump(opt, sort_keys=False).encode()
    if kind == 'right':
        text = chance.choice((text, text.replace(b'\n', b'\r\n'), b'# a comment\n' + text, text.rstrip() + b'\n...\n'))
    elif kind == 'bytes':
        text = damaged(text, chance)
    elif kind == 'text':
        bad = chance.randrange(len(TEXTS))
        text, wrong, done = TEXTS[bad].encode('utf-8', 'surrogatepass'), 'text', f'text {bad}'
    return command, text, done, wrong


def set_in(*way):
    *blocks, key, value = way
    return lambda content: at(content, tuple(blocks)).__setitem__(key, value)


def each(change):
    """Changes all weights."""
    return lambda content: content.update(params={key: change(value) for key, value in content['params'].items()})


def wrong_weights() -> list:
    """Changes of the content of a checkpoint after which its weights are wrong."""
    changes = [each(lambda value, dtype=dtype: value.to(dtype))
               for dtype in (torch.int8, torch.int64, torch.complex64, torch.bool)]  # yapf: disable
    changes += [each(lambda value: torch.full_like(value, torch.nan)), each(lambda value: value[None])]
    changes += [each(lambda value: value.to('meta')), each(lambda value: value.to_sparse())]
    changes += [each(lambda value: torch.zeros(1).expand(10**6, 10**6))]
    changes += [
        set_in('params', value) for value in ({}, None, 3, [], {
            1: torch.zeros(1)
        }, {
            'a' * 10**5: torch.zeros(1)
        })
    ]
    changes += [lambda content: content['params'].pop(next(iter(content['params'])))]
    return [*changes, lambda content: content['params'].update({'a\nb': torch.zeros(1)})]


def wrong_descriptions() -> list:
    """Changes of the content of a checkpoint after which it does not describe its network. No training looks."""
    changes = []
    for value in (0, '4', 10**9, -4, None, [4], math.nan):
        changes += [set_in('scale', value), set_in('network_g', 'upscale', value)]
        changes += [set_in('network_g', key, value) for key in ('num_feat', 'type', 'num_map')]
    for value in (10**7, 10**12, 2.5):
        changes += [set_in('network_g', 'num_map', value), set_in('network_g', 'num_feat', value)]
    for name in ('VGGFeatureExtractor', 'UNetDiscriminatorSN', 'StyleGAN2Generator', 'PatchClassifier', 'EDVR',
                 ['FSRCNN']):
        changes += [
            set_in('network_g', 'type', name),
            set_in('network_g', dict(type=name, layer_name_list=['conv1_1']))
        ]
    changes += [set_in('network_g', value) for value in ({}, 'FSRCNN', [1], 10000 * [0], 3)]
    return [*changes, lambda content: content['network_g'].update(branches=[content['network_g']] * 3)]


def checkpoint_case(bases: Path, number: int, seed: int, folder: Path) -> tuple:
    """Writes a damaged checkpoint into a folder.

    Returns:
        Command, arguments, the base that was damaged, what was done, and whether it is right: False by construction,
        True if it must behave like the base where it is accepted, None if nothing is known.
    """
    chance = random.Random(f'{seed}:checkpoint:{number}')
    command = CHECKPOINT_COMMANDS[number % len(CHECKPOINT_COMMANDS)]
    names = sorted(path.name for path in bases.iterdir() if path.suffix in ('.pth', '.safetensors'))
    if command == 'upscale' and (bases / 'exported').is_dir():
        names.append('exported')
    base = chance.choice(names)
    model = folder / base
    if base == 'exported':
        shutil.copytree(bases / base, model)
        path = chance.choice(sorted(model.iterdir()))
        path.write_bytes(damaged(path.read_bytes(), chance))
        right, done = True, f'bytes of {path.name}'
    elif chance.random() < 0.5 or base.startswith(('legacy', 'bare')):
        model.write_bytes(damaged((bases / base).read_bytes(), chance))
        right, done = None if base.startswith('legacy') else True, 'bytes'
    else:
        content = torch.load(bases / 'plain.pth', weights_only=True)
        changes = wrong_weights() + (wrong_descriptions() if command != 'train' else [])
        change, base, model = chance.randrange(len(changes)), 'plain.pth', folder / 'plain.pth'
        changes[change](content)
        torch.save(content, model, _use_new_zipfile_serialization=chance.random() < 0.8)
        right, done = False, f'content {change}'
    described = ['-opt', bases / 'bare.yml'] if base.startswith('bare') else []
    argv = {
        'upscale': ['upscale', '-m', base, *described, '-i', bases / 'lq' / '0.png', '-o', 'out'],
        'convert': ['convert', base, *described, '-o', 'out.safetensors'],
        'train': ['train', '-opt', 'train.yml'],
        'label': ['label', '-d', 'data', '--by', 'psnr', '-m', base, *described],
        'export': ['export', base, *described, '-o', 'out'],
        'calibrate': ['calibrate', '-m', base, *described, '-i', bases / 'gt', '--limit', '1', '--budgets', '0.5'],
    }[command]
    if command == 'train':
        kind = 2 if base.startswith(('routed', 'legacy')) else 1
        opt = copy.deepcopy(option_bases(bases)[kind][1])
        if described:
            opt.update(network_g=yaml.safe_load((bases / 'bare.yml').read_text())['network_g'])
        opt['path'].update(pretrain_network_g=base)
        (folder / 'train.yml').write_text(yaml.safe_dump(opt))
    elif command == 'label':
        (folder / 'data').mkdir()
        for name in ('gt.lmdb', 'lq.lmdb', 'meta_info.txt'):
            (folder / 'data' / name).symlink_to(bases / 'patches' / name)
    return command, argv, base, done, right


# how it ends


class Campaign:
    """Runs cases of one seed and counts their ends; see the top of this file."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work, self.counts, self.kept = args, work, collections.Counter(), []
        self.memory = args.memory * 2**20
        self.bases = work / 'bases'

    def make_bases(self) -> None:
        """Makes the right inputs, and the results of right checkpoints to compare with."""
        torch.manual_seed(0)
        for name, size in (('gt', 96), ('lq', 24)):
            (self.bases / name).mkdir(parents=True)
            for i in range(4):
                image = Image.fromarray(pattern(96, 96, 25 * i)).resize((size, size), Image.Resampling.BOX)
                image.save(self.bases / name / f'{i}.png')
        bases = {name: opt for name, (_, opt) in zip(('plain', '', 'routed'), option_bases(self.bases)) if name}
        for name, opt in bases.items():
            content = dict(params=build_network(opt['network_g']).state_dict(), network_g=opt['network_g'], scale=4)
            save_checkpoint(content, self.bases / f'{name}.pth')
            save_checkpoint(content, self.bases / f'{name}.safetensors')
        torch.save(content, self.bases / 'legacy.pth', _use_new_zipfile_serialization=False)
        block = dict(type='MSRResNet', num_in_ch=3, num_out_ch=3, num_feat=4, num_block=1, upscale=4)
        torch.save(build_network(block).state_dict(), self.bases / 'bare.pth')
        (self.bases / 'bare.yml').write_text(yaml.safe_dump(dict(network_g=block)))
        commands = [['prepare', '-i', 'gt', '-o', 'patches', '--crop', '32', '--scales', '1', '--workers', '1']]
        if runtime.installed():
            commands.append(['export', 'plain.pth', '-o', 'exported'])
        names = sorted(path.name for path in self.bases.iterdir() if path.suffix in ('.pth', '.safetensors'))
        for name in [*names, *(['exported'] if runtime.installed() else [])]:
            described = ['-opt', 'bare.yml'] if name == 'bare.pth' else []
            commands.append(['upscale', '-m', name, *described, '-i', 'lq/0.png', '-o', f'right/{name}'])
            if name != 'exported':
                commands.append(['convert', name, *described, '-o', f'right/{name}/out.safetensors'])
        for argv in commands:
            ended = run(argv, self.bases, 120, self.memory)
            assert said(ended) == 'right', f'{" ".join(argv)}: {ended}'
        self.seeds = images()
        for folder in self.args.corpus:
            self.seeds.update({str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()})

    def count(self, kind: str, command: str, number: int, end: str, folder: Path, argv: list, done: str = '') -> None:
        """Counts a case, and keeps it if it has ended badly."""
        self.counts[f'{kind}|{command}|{end}'] += 1
        if self.args.only:
            print(f'{kind} {number}, {done or command}: {end}\n{(folder / "output.txt").read_text(errors="replace")}')
        if end in BAD or (end == 'unclear line' and self.args.keep_unclear):
            kept = Path(self.args.keep, f'{end}_{kind}_{command}_{number}'.replace(' ', '_'))
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(
                folder,
                kept,
                symlinks=True,
                ignore=lambda at, names: [
                    name for name in names if name in ('experiments', 'out', 'data') or
                    (kind == 'image' and at.endswith('/in') and not name.startswith(f'p{number:06d}.'))
                ])
            (kept / 'command.txt').write_text(f'basicsr {" ".join(map(str, argv))}\n{done}\n')
            print(f'{end}: {kind} {number}, {command} {done}: kept in {kept}', file=sys.stderr, flush=True)

    def images(self, command: str, numbers: list) -> None:
        """Runs images through a command, in one run if none of them ends it."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            folder, left = Path(folder), {}
            (folder / 'in').mkdir()
            for number in numbers:
                name, data = image(self.seeds, number, self.args.seed)
                (folder / 'in' / name).write_bytes(data)
                left[number] = name
            argv = {
                'upscale': ['upscale', '-m', self.bases / 'plain.pth', '-i', 'in', '-o', 'out'],
                'prepare': ['prepare', '-i', 'in', '-o', 'out', '--whole', '--workers', '1'],
                'calibrate': ['calibrate', '-m', self.bases / 'routed.pth', '-i', 'in', '--budgets', '0.5'],
            }[command]
            ended = run(argv, folder, SECONDS['image'] + 2 * len(numbers), self.memory)
            end = said(ended)
            if end in BAD:
                if len(numbers) == 1:
                    self.count('image', command, numbers[0], end, folder, argv)
                else:
                    for half in (numbers[::2], numbers[1::2]):
                        self.images(command, half)
                return
            refused = ended.code == 2  # the folder as a whole: the others are still to be tried
            for number, name in list(left.items()):
                results = [path for path in (folder / 'out').rglob(f'{Path(name).stem}*') if self.is_image(path)]
                if name in ended.output and not results:
                    self.count('image', command, number, 'one line', folder, argv)
                elif results or (command == 'calibrate' and ended.code in (0, 1)):
                    self.count('image', command, number, 'right', folder, argv)
                elif refused and len(numbers) > 1:
                    continue
                else:
                    self.count('image', command, number, 'one line' if refused else 'silent', folder, argv)
                del left[number]
        rest = list(left)
        if rest and len(rest) == len(numbers):  # it does not say which of them
            self.images(command, rest[::2])
            self.images(command, rest[1::2])
        elif rest:
            self.images(command, rest)

    @staticmethod
    def is_image(path: Path) -> bool:
        """Whether a result is whole, as far as its header tells."""
        try:
            with tifffile.TiffFile(path) if path.suffix == '.tif' else Image.open(path) as image:
                return bool(image.pages[0].shape if path.suffix == '.tif' else image.size)
        except (OSError, ValueError, tifffile.TiffFileError, Image.DecompressionBombError):
            return False

    def option(self, number: int) -> None:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            folder = Path(folder)
            command, text, done, wrong = option(option_bases(self.bases), number, self.args.seed)
            (folder / 'opt.yml').write_bytes(text)
            argv = [command, '-opt', 'opt.yml']
            ended = run(argv, folder, SECONDS['option'], self.memory)
            end = said(ended)
            if end == 'hang' and 'iter:' in ended.output and wrong is None:
                end = 'right'  # a long training is none
            if end == 'right' and wrong:
                named = [
                    line for line in ended.output.splitlines() if wrong in line and re.search('WARN|ignored', line)
                ]
                end = 'one line' if named else 'silent'
            elif end == 'right' and command == 'train' and not list(folder.glob('experiments/*/models/*_latest.pth')):
                end = 'silent'
            elif wrong == '' and end == 'one line':
                end = 'unclear line'
            self.count('option', command, number, end, folder, argv, done)

    def checkpoint(self, number: int) -> None:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            folder = Path(folder)
            command, argv, base, done, right = checkpoint_case(self.bases, number, self.args.seed, folder)
            ended = run(argv, folder, SECONDS['checkpoint'], self.memory)
            end = said(ended)
            if end == 'right' and right is False:
                end = 'silent'
            elif end == 'right' and right and command in ('upscale', 'convert'):
                result = 'out/0.png' if command == 'upscale' else 'out.safetensors'
                expected = self.bases / 'right' / base / Path(result).name
                if not (folder / result).exists() or (folder / result).read_bytes() != expected.read_bytes():
                    end = 'silent'
            self.count('checkpoint', command, number, end, folder, argv, f'{base}, {done}')

    def tasks(self) -> list:
        """What is to be run: method and arguments."""
        if self.args.only:
            kind, number = self.args.only.split(':')
            if kind == 'image':
                return [('images', command, [int(number)]) for command in IMAGE_COMMANDS]
            return [(kind, int(number))]
        args, tasks = self.args, []
        for start in range(0, args.images, args.batch):
            numbers = list(range(start, min(start + args.batch, args.images)))
            tasks += [('images', 'upscale', numbers), ('images', 'prepare', numbers)]
            tasks.append(('images', 'calibrate', numbers[:max(1, args.batch // 10)]))  # it measures, which takes time
        tasks += [('option', number) for number in range(args.options)]
        return tasks + [('checkpoint', number) for number in range(args.checkpoints)]

    def work_off(self, share: int) -> None:
        """Does this process's share of the tasks, and writes its counts beside the others'."""
        tasks = self.tasks()[share::self.args.jobs]
        for done, (method, *arguments) in enumerate(tasks, 1):
            getattr(self, method)(*arguments)
            if share == 0 and done % 50 == 0:
                print(f'{done} of {len(tasks)} tasks of the first process are done', file=sys.stderr, flush=True)
        (self.work / f'counts_{share}.json').write_text(json.dumps(self.counts))


def table(counts: collections.Counter) -> str:
    """One row for each kind and command."""
    rows = sorted({tuple(key.split('|')[:2]) for key in counts})
    lines = [f'| input | command | cases | {" | ".join(ENDS)} |', '| --- ' * (3 + len(ENDS)) + '|']
    for kind, command in rows:
        numbers = [counts[f'{kind}|{command}|{end}'] for end in ENDS]
        lines.append(f'| {kind} | {command} | {sum(numbers)} | {" | ".join(map(str, numbers))} |')
    return '\n'.join(lines)


def main(argv: Optional[list] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ('images', 'options', 'checkpoints'):
        parser.add_argument(f'--{kind}', type=int, default=0, metavar='N', help=f'how many {kind} (default: 0)')
    parser.add_argument('--seed', type=int, default=0, help='what decides of all damages (default: 0)')
    parser.add_argument('--jobs', type=int, default=2, help='processes (default: 2)')
    parser.add_argument('--batch', type=int, default=50, help='images of a folder (default: 50)')
    parser.add_argument(
        '--memory', type=int, default=4096, metavar='MIB', help='of a run, beyond imports (default: 4096)')
    parser.add_argument('--corpus', nargs='+', default=[], metavar='FOLDER', help='further images to damage')
    parser.add_argument('--keep', default='fuzz_failures', metavar='FOLDER', help='inputs that end badly')
    parser.add_argument('--keep-unclear', action='store_true', help='keep inputs with an unclear line too')
    parser.add_argument('--only', metavar='KIND:NUMBER', help='one case: image, option or checkpoint and its number')
    args = parser.parse_args(argv)
    args.jobs, args.keep = 1 if args.only else args.jobs, os.path.abspath(args.keep)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='fuzz_') as work:
        os.environ['XDG_CACHE_HOME'] = os.path.join(work, 'cache')
        campaign = Campaign(args, Path(work))
        campaign.make_bases()
        workers = []
        for share in range(args.jobs):
            workers.append(os.fork())
            if not workers[-1]:
                try:
                    campaign.work_off(share)
                    sys.stdout.flush()
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
        for pid in workers:
            os.waitpid(pid, 0)
        counts = collections.Counter()
        for share in range(args.jobs):
            counts.update(json.loads(Path(work, f'counts_{share}.json').read_text()))
    print(f'{table(counts)}\n\nSeed {args.seed}, {time.monotonic() - begin:.0f} s.')
    return int(any(counts[key] for key in counts if key.rsplit('|', 1)[1] in BAD))


if __name__ == '__main__':
    sys.exit(main())
