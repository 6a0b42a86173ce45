"""What tests of several modules build, run and read. Tests of archs have their own, to go upstream with these."""
import copy
import cv2
import json
import lmdb
import numpy as np
import os
import png
import re
import subprocess
import sys
import torch
import yaml
from pathlib import Path
from torch.utils.data import Dataset

from basicsr.archs import build_network
from basicsr.models import build_model

ROOT = Path(__file__).resolve().parent.parent
BACKBONES = sorted(yaml.safe_load((ROOT / 'scripts/backbones.yml').read_text()))
# of processes that tests start: this package comes first, and other folders that were given remain
ENV = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
ENV['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
SCRIPT = '''
import importlib, json, os, sys, torch, yaml
import cdnsr_basicsr
cdnsr_basicsr.register()
from basicsr.archs import build_network
from basicsr.models import build_model
torch.distributed.init_process_group('gloo')
opt = yaml.safe_load(open('opt.yml'))
rank = int(os.environ['RANK'])
opt.update(dist=True, rank=rank, world_size=2)
torch.manual_seed(rank)
function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
found = function(build_model(opt), *sys.argv[3:])
with open(f'results_{rank}.json', 'w') as file:
    json.dump(found, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
'''


def carn(num_feat=4, upscale=4):
    return {'type': 'CARN_M', 'num_feat': num_feat, 'upscale': upscale}


def fsrcnn(num_feat=4, upscale=4):
    return {'type': 'FSRCNN', 'num_feat': num_feat, 'num_shrink': 3, 'num_map': 1, 'upscale': upscale}


def swinir(window_size=7, upscale=4, **kwargs):
    block = {'type': 'SwinIR', 'embed_dim': 4, 'depths': [2], 'num_heads': [2], 'mlp_ratio': 2, 'img_range': 1.}
    sizes = {'window_size': window_size, 'img_size': 2 * window_size, 'upscale': upscale}
    return {**block, 'upsampler': 'pixelshuffledirect', **sizes, **kwargs}


def pcsr(backbone=None, **kwargs):
    """Option block of a small PCSR."""
    hidden = dict(light=[4, 4], heavy=[6, 6, 6], classifier=[5])
    return dict(type='PCSR', backbone=backbone or carn(8), **dict(hidden, **kwargs))


def spread(net):
    """Makes a random classifier decide differently on different patches."""
    with torch.no_grad():
        net.classifier.fc.weight.mul_(300)
        channels = net.classifier.convs[0].in_channels
        logits = net.classifier(torch.rand(64, channels, 12, 16) * torch.rand(64, 1, 1, 1))
        net.classifier.fc.bias.sub_(logits.mean(0))
    return net


def routed(block, x=None, size=None, contrast=30):
    """The network in evaluation, its classifier such that both samplers are taken."""
    net = build_network(block).eval()
    with torch.no_grad():
        net.classifier.layers[-1].weight *= contrast
        margin = net(torch.rand(1, 3, 16, 16) if x is None else x, size, return_routing=True)[1].margin
        net.classifier.layers[-1].bias[1] -= margin.median()
    return net


def shaken(net):
    """The network with no weight at zero, in evaluation mode."""
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return net.eval()


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def photograph(height=100, width=140, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def decode(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def read_lmdb(path):
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        return {key.decode(): bytes(value) for key, value in txn.cursor()}


def turned(pixels, orientation):
    """By the tag's definition: what the first row and the first column of the file are in the picture."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels.swapaxes(0, 1)[:, ::-1],
        7: pixels.swapaxes(0, 1)[::-1, ::-1],
        8: pixels.swapaxes(0, 1)[::-1]
    }[orientation]


def decode_by_pypng(path):
    reader = png.Reader(filename=str(path))
    reader.preamble()
    # pypng would shift the values to the significant bits
    reader.sbit = None
    width, height, rows, info = reader.asDirect()
    values = np.array([list(row) for row in rows]).reshape(height, width, info['planes'])
    return values if info['bitdepth'] == 16 else (values * 255 // (2**info['bitdepth'] - 1)), info['bitdepth']


class Images(Dataset):
    """Whole images of different odd sizes."""
    opt = {'name': 'images'}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        height, width = (5, 9, 23)[index], (7, 40, 18)[index]
        lq, gt = (torch.rand(3, height * s, width * s, generator=generator) for s in (1, 4))
        lq *= torch.linspace(0, 1, width)  # tiles of different contrast
        return {'lq': lq, 'gt': gt, 'lq_path': f'{index}.png', 'gt_path': f'{index}.png'}


def batch(size=6):
    generator = torch.Generator().manual_seed(7)
    lq = torch.rand(size, 3, 8, 8, generator=generator)
    gt = 1 - lq.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return {'lq': lq, 'gt': gt, 'lq_path': ['a'] * size, 'gt_path': ['a'] * size}


def photographs(size=2, side=64):
    """A batch of PhotographDataset: smooth images, and kernels that change nothing."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(size, 3, side // 16, side // 16, generator=generator)
    gt = torch.nn.functional.interpolate(coarse, size=(side, side), mode='bicubic').clamp(0, 1)
    pulse = torch.zeros(size, 21, 21)
    pulse[:, 10, 10] = 1
    return {'gt': (255 * gt).round() / 255, 'kernel1': pulse, 'kernel2': pulse, 'sinc_kernel': pulse}


def make(opt):
    return build_model(copy.deepcopy(opt))


def step(model, current_iter=1):
    model.update_learning_rate(current_iter)
    model.feed_data(batch())
    model.optimize_parameters(current_iter)


def two_processes(opt, folder, function, *args):
    """What a function of a test module returns for the model, in each of two processes."""
    (folder / 'opt.yml').write_text(yaml.safe_dump(opt))
    (folder / 'script.py').write_text(SCRIPT)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py']
    command += [function.__module__, function.__name__, *args]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f'results_{rank}.json').read_text()) for rank in (0, 1)]


def sums(model):
    """Sums of the weights after some steps on other data in each process."""
    for i in range(1, 4):
        data = batch(2)
        lq = torch.rand_like(data['lq'])
        model.feed_data(dict(data, lq=lq))
        model.optimize_parameters(i)
    return {
        'sums': [param.double().sum().item() for param in model.get_bare_model(model.net_g).parameters()],
        'drawn': lq.sum().item()
    }


def start(*command, **kwargs):
    return subprocess.Popen([sys.executable, *command],
                            env=ENV,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            text=True,
                            **kwargs)


def run(*command):
    process = start(*command)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def strict_json(text):
    """One JSON object by a strict parser: Python's own takes NaN and Infinity, too."""

    def refuse(name):
        raise ValueError(f'{name} is no JSON')

    content = json.loads(text, parse_constant=refuse)
    assert isinstance(content, dict)
    return content


def documented(command):
    """Keys that docs/Json.md names in the tables of a command."""
    section = (ROOT / 'docs/Json.md').read_text().split(f'\n## {command}\n')[1].split('\n## ')[0]
    return set(re.findall(r'`(.*?)`', ' '.join(re.findall(r'^\| (`[^|]*`) \|', section, re.M))))


def iterations(output):
    return [int(number) for number in re.findall(r'iter: *(\d+), lr', output)]


def tensorboard_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {kind: set(names) for kind, names in events.Tags().items() if kind in ('scalars', 'images')}
