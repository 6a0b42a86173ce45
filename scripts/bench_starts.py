"""Measures what docs/Deviations.md says about initialisation and joint training, on the quickstart's data.

Usage, after scripts/quickstart.sh, in the repository:
    python scripts/bench_starts.py fsrcnn          start of FSRCNN: PSNR after 800 iterations
    python scripts/bench_starts.py classifier      start of the classifier: agreement with the labels
    python scripts/bench_starts.py branches CHECKPOINT ...    L1 of each branch on each class
"""
import cv2
import sys
import torch
from pathlib import Path
from torch import nn

import cdnsr_basicsr

cdnsr_basicsr.register()

from basicsr.metrics import calculate_psnr  # noqa: E402
from basicsr.utils import tensor2img  # noqa: E402
from cdnsr_basicsr.archs import FSRCNN, PatchClassifier  # noqa: E402
from cdnsr_basicsr.checkpoint import load_network  # noqa: E402
from cdnsr_basicsr.data.label import read_batches  # noqa: E402
from cdnsr_basicsr.data.labels import read_labels  # noqa: E402
from cdnsr_basicsr.losses.routing_loss import average_loss, class_loss  # noqa: E402

DATA = Path('datasets/quickstart')
TRAINED = 'experiments/train_cdnsr_fsrcnn_quickstart/models/net_g_latest.pth'


def read_patches():
    keys, lq, gt = zip(*read_batches(DATA / 'train', workers=2))
    labels = read_labels(DATA / 'train' / 'labels_bicubic.txt')
    labels = torch.tensor([labels[key].label for batch in keys for key in batch])
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:2000]
    return torch.cat(lq)[chosen], torch.cat(gt)[chosen], labels[chosen]


def held_out_psnr(net):
    values = []
    for path in sorted((DATA / 'held_out' / 'lq').glob('*.png')):
        lq = torch.from_numpy(cv2.imread(str(path))[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            image = tensor2img(net(lq))
        gt = cv2.imread(str(path.parents[1] / 'gt' / path.name))
        values.append(calculate_psnr(image, gt, 4, test_y_channel=True))
    return sum(values) / len(values)


def train(net, loss, lr, iterations):
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        scheduler.step()


def bench_fsrcnn(lq, gt):
    for start in ('paper', 'bilinear'):
        for lr in (1e-3, 3e-3):
            torch.manual_seed(0)
            net = FSRCNN()
            if start == 'paper':
                for module in net.modules():
                    if isinstance(module, nn.Conv2d):
                        nn.init.kaiming_normal_(module.weight, a=0.25)
                nn.init.normal_(net.deconv.weight, std=0.001)

            def loss(net):
                index, turns = torch.randint(len(lq), (16, )), int(torch.randint(4, (1, )))
                x, y = (torch.rot90(images[index], turns, (2, 3)) for images in (lq, gt))
                return (net(x) - y).abs().mean()

            train(net, loss, lr, 800)
            print(f'start {start}, lr {lr}: {held_out_psnr(net):.2f} dB', flush=True)


@torch.no_grad()
def branch_errors(branches, lq, gt):
    """L1 of each branch on each patch in grey levels, (n, M), and the outputs, (n, M, 3, H, W)."""
    outputs = torch.stack([torch.cat([branch(part) for part in lq.split(64)]) for branch in branches], dim=1)
    return torch.stack([255 * (outputs[:, i] - gt).abs().mean(dim=(1, 2, 3)) for i in range(len(branches))], 1), outputs


def bench_classifier(lq, gt, labels):
    errors, outputs = branch_errors(load_network(TRAINED).branches, lq, gt)
    by_label = errors.gather(1, labels[:, None]).mean()
    print(f'all hard {errors[:, -1].mean():.3f}, labels {by_label:.3f}, best {errors.min(1)[0].mean():.3f}')
    for start, lr in (('default', 1e-3), ('default', 5e-3), (1, 1e-3), (4, 1e-3), (8, 1e-3)):
        torch.manual_seed(0)
        net = PatchClassifier()
        net.convs[0].reset_parameters()
        if start != 'default':
            weight = net.convs[0].weight.data
            weight.sub_(weight.mean(dim=(2, 3), keepdim=True)).mul_(start)

        def loss(net):
            index = torch.randint(len(lq), (16, ))
            weights = net(lq[index]).softmax(1)
            mixture = torch.einsum('bm,bmchw->bchw', weights, outputs[index])
            return 2000 * (mixture - gt[index]).abs().mean() + class_loss(weights) + 6 * average_loss(weights)

        train(net, loss, lr, 600)
        with torch.no_grad():
            classes = torch.cat([net(part) for part in lq.split(64)]).argmax(1)
        agreement, routed = (classes == labels).float().mean(), errors.gather(1, classes[:, None]).mean()
        print(f'start {start}, lr {lr}: agreement {100 * agreement:.0f} %, L1 as routed {routed:.3f}', flush=True)


def bench_branches(lq, gt, labels, paths):
    for path in paths:
        errors, _ = branch_errors(load_network(path).branches, lq, gt)
        for i in range(errors.shape[1]):
            means = ', '.join(f'{errors[labels == k, i].mean():.2f}' for k in range(3))
            print(f'{path}: branch {i}, L1 on classes 0, 1, 2: {means}')


if __name__ == '__main__':
    lq, gt, labels = read_patches()
    if sys.argv[1] == 'fsrcnn':
        bench_fsrcnn(lq, gt)
    elif sys.argv[1] == 'classifier':
        bench_classifier(lq, gt, labels)
    else:
        bench_branches(lq, gt, labels, sys.argv[2:])
