"""Times training steps: the published way, one patch at a time, against this package's, with its options side by side.

Usage, in the repository:
    python scripts/bench_train.py fsrcnn                    # batch 16 of random 32x32 patches, x4
    python scripts/bench_train.py carn --rounds 5 --compile

It runs on the GPU if there is one. Every row trains all branches and the classifier (train.freeze is empty) unless it
says otherwise, with the losses and the optimiser of options/train_cdnsr_BACKBONE.yml. Where that file has a classifier
that predicts errors, which the published way does not know, the classifier and the losses of train_cdnsr_fsrcnn.yml
take its place. All rows take turns in one process, on a CPU with freed memory kept in it; medians over the rounds are
printed.
"""
import argparse
import copy
import statistics
import time
import torch
import yaml
from pathlib import Path

import cdnsr_basicsr

cdnsr_basicsr.register()

from basicsr.archs import build_network  # noqa: E402
from basicsr.losses import build_loss  # noqa: E402
from basicsr.models import build_model  # noqa: E402
from cdnsr_basicsr.archs.cdnsr_arch import gumbel_softmax  # noqa: E402
from cdnsr_basicsr.inference import TileUpscaler  # noqa: E402
from cdnsr_basicsr.memory import keep_freed_memory  # noqa: E402
from cdnsr_basicsr.options import read_options  # noqa: E402

SCRIPTS = Path(__file__).resolve().parent
OPTIONS = SCRIPTS.parent / 'options'
BACKBONES = yaml.safe_load((SCRIPTS / 'backbones.yml').read_text(encoding='utf-8'))
LOSSES = ('pixel', 'class', 'average', 'flops')


def options_of(backbone):
    """Options of a backbone's stage 2, with the published losses and a classifier for them."""
    opt = read_options(str(OPTIONS / f'train_cdnsr_{backbone}.yml'))
    if 'error_opt' in opt['train']:
        published = read_options(str(OPTIONS / 'train_cdnsr_fsrcnn.yml'))
        opt['network_g']['classifier'] = published['network_g']['classifier']
        del opt['train']['error_opt']
        opt['train'].update({f'{name}_opt': published['train'][f'{name}_opt'] for name in LOSSES})
    return opt


class PublishedStep:
    """What CDNSR's and ClassSR's released code does in a training step: each patch alone through all branches."""

    def __init__(self, opt, device, tricks):
        self.layout = torch.channels_last if tricks else torch.contiguous_format
        self.net = build_network(opt['network_g']).to(device).to(memory_format=self.layout)
        self.costs = TileUpscaler(self.net).costs.to(device)
        if not tricks:
            for module in self.net.modules():
                if isinstance(module, (torch.nn.ConvTranspose2d, torch.nn.PReLU)):
                    module.eval()  # in training ours are faster than torch's
        self.losses = {name: build_loss(opt['train'][f'{name}_opt']) for name in LOSSES}
        self.optimizer = torch.optim.Adam(self.net.parameters(), 2e-4, betas=(0.9, 0.99))

    def __call__(self, lq, gt):
        self.optimizer.zero_grad()
        outputs, weights = [], []
        for patch in lq:
            patch = patch.unsqueeze(0).contiguous(memory_format=self.layout)
            p = gumbel_softmax(self.net.classifier(patch), 1.)
            outputs.append(sum(p[:, i, None, None, None] * branch(patch) for i, branch in enumerate(self.net.branches)))
            weights.append(p)
        output, weights = torch.cat(outputs), torch.cat(weights)
        arguments = {'pixel': (output, gt), 'flops': (weights, self.costs)}
        sum(loss(*arguments.get(name, (weights, ))) for name, loss in self.losses.items()).backward()
        self.optimizer.step()


class OurStep:
    """CDNSRModel, as `basicsr train` drives it."""

    def __init__(self, opt, device, freeze=(), **train):
        opt = copy.deepcopy(opt)
        opt.update(num_gpu=int(device.type == 'cuda'), dist=False, is_train=True, rank=0, world_size=1)
        opt['path'] = {}
        opt['train'].update(ema_decay=0, label_opt=None, balance='warn', freeze=list(freeze), **train)
        if 'classifier' in freeze:  # nothing is left for the other losses to train
            opt['train'].update({f'{name}_opt': None for name in LOSSES if name != 'pixel'})
        self.model = build_model(opt)

    def __call__(self, lq, gt):
        self.model.feed_data({'lq': lq, 'gt': gt})
        self.model.optimize_parameters(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('backbone', choices=sorted(BACKBONES))
    parser.add_argument('--batch', type=int, default=16, help='patches in a batch (default: 16)')
    parser.add_argument('--rounds', type=int, default=7, help='counted steps of every row (default: 7)')
    parser.add_argument('--compile', action='store_true', help='add rows with torch.compile')
    args = parser.parse_args()

    keep_freed_memory()  # as the command does
    torch.backends.cudnn.benchmark = True  # as BasicSR's pipeline does
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    opt = options_of(args.backbone)
    half = 'float16' if device.type == 'cuda' else 'bfloat16'
    rows = {
        'published way': lambda: PublishedStep(opt, device, tricks=False),
        'published way with our layers and channels_last': lambda: PublishedStep(opt, device, tricks=True),
        'batched': lambda: OurStep(opt, device, channels_last=False),
        'batched, channels_last (default)': lambda: OurStep(opt, device),
        f'default, {half}': lambda: OurStep(opt, device, precision=half),
    }
    if args.compile:
        rows['default, compile'] = lambda: OurStep(opt, device, compile=True)
        rows[f'default, compile, {half}'] = lambda: OurStep(opt, device, compile=True, precision=half)
    rows['default, branches frozen'] = lambda: OurStep(opt, device, freeze=('branches', ))
    rows['default, classifier frozen'] = lambda: OurStep(opt, device, freeze=('classifier', ))

    lq, gt = torch.rand(args.batch, 3, 32, 32, device=device), torch.rand(args.batch, 3, 128, 128, device=device)
    steps, seconds = {name: make() for name, make in rows.items()}, {name: [] for name in rows}
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    warm_up = 20 if device.type == 'cuda' else 2  # float16's loss scale has to find its size too
    for count in range(args.rounds + warm_up):
        for name, step in steps.items():
            wait()
            begin = time.perf_counter()
            step(lq, gt)
            wait()
            if count >= warm_up:
                seconds[name].append(time.perf_counter() - begin)

    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(
        f'CDNSR-{args.backbone}, batch {args.batch}, {name}, torch {torch.__version__}, median of {args.rounds} steps')
    print('| training step | ms | images/s | times the published way |')
    print('| --- | --- | --- | --- |')
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        ratio = medians['published way'] / median
        print(f'| {name} | {1000 * median:.1f} | {args.batch / median:.1f} | {ratio:.2f} |')


if __name__ == '__main__':
    main()
